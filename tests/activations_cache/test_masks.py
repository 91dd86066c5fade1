import pytest

from saekit.activations_cache import masks
from saekit.errors import ConfigError


def test_each_kind_is_one_bit_of_a_byte_of_its_own() -> None:
    values = list(masks.KINDS.values())
    assert all(value.bit_count() == 1 and value < 256 for value in values)
    assert len(set(values)) == len(values)


def test_bits_of_several_kinds_add_up_and_repeats_do_not() -> None:
    assert masks.bits(()) == 0
    assert masks.bits(("bos", "special", "bos")) == 5


def test_an_unknown_kind_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match="'padding' is unknown; a cache marks: special, last, bos"
    ):
        masks.bits(["padding"])


def test_every_kind_is_defined_in_words() -> None:
    assert masks.__doc__ is not None
    assert [kind for kind in masks.KINDS if f"`{kind}`" not in masks.__doc__] == []
