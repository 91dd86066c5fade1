"""Names to places, and what is refused at a place."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from saekit.activations_cache import hooks
from saekit.errors import ModelError


class Gives(nn.Module):
    """Gives what it was made to give."""

    def __init__(self, what: object) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor, extra: Tensor | None = None) -> object:
        return self.what if self.what is not None else x


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("resid_pots.0", "resid_post.0"),
        ("h.0.atn", "h.0.attn"),
        ("h.0.atn:input", "h.0.attn"),
    ],
)
def test_an_unknown_point_is_refused_with_the_nearest_name(given: str, name: str) -> None:
    attn = nn.Module()
    attn.attn = nn.Linear(2, 2)
    model = nn.Module()
    model.h = nn.ModuleList([attn])
    points = {"resid_post.0": hooks.raw_point(model, "h.0")}
    with pytest.raises(ModelError, match=f"'m' has no hook point '{given}'; did you .*'{name}'"):
        hooks.find(points, given, "m", model)


def test_an_unknown_point_without_a_near_name_is_refused_with_the_vocabulary() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    points = {"resid_post.0": hooks.raw_point(model, "0")}
    with pytest.raises(ModelError, match="there are: resid_post.0 `saekit inspect m`"):
        hooks.find(points, "xyzzy", "m", model)
    for name in ("", ":input"):
        with pytest.raises(ModelError, match="has no hook point"):
            hooks.find(points, name, "m", model)


def test_a_path_is_the_module_output_and_with_input_what_it_is_given() -> None:
    model = nn.Sequential(OrderedDict(inner=nn.Linear(2, 2)))
    assert hooks.find({}, "inner", "m", model).side == "output"
    assert hooks.find({}, "inner:input", "m", model).side == "input"


@pytest.mark.parametrize("what", [None, (torch.ones(2), 7), OrderedDict(first=torch.ones(2))])
def test_an_edit_takes_the_place_of_the_first_thing_a_module_gives(what: object) -> None:
    module = Gives(what)
    point = hooks.raw_point(nn.ModuleDict({"m": module}), "m")
    with hooks.attached({point: lambda x: x + 4}):
        given = module(torch.ones(2))
    first = given if isinstance(given, Tensor) else next(iter(dict(enumerate(given)).values()))
    if isinstance(given, OrderedDict):
        first = given["first"]
    assert isinstance(first, Tensor)
    assert first.tolist() == [5, 5]


def test_an_edit_takes_the_place_of_the_first_argument_however_it_is_passed() -> None:
    module = Gives(None)
    point = hooks.raw_point(nn.ModuleDict({"m": module}), "m:input")
    with hooks.attached({point: lambda x: x + 1}):
        by_place, by_name = module(torch.ones(2), torch.ones(1)), module(x=torch.ones(2))
    assert by_place.tolist() == by_name.tolist() == [2, 2]


@pytest.mark.parametrize("side", ["", ":input"])
def test_a_place_without_a_tensor_is_refused(side: str) -> None:
    module = Gives("text")
    point = hooks.raw_point(nn.ModuleDict({"m": module}), "m" + side)
    told = "output of that Gives is of type str" if not side else "input .* is of type NoneType"
    with hooks.attached({point: lambda x: None}), pytest.raises(ModelError, match=told):
        module(torch.ones(1)) if not side else module(x=None)


def test_nothing_stays_attached() -> None:
    module = Gives(None)
    point = hooks.raw_point(nn.ModuleDict({"m": module}), "m")
    with hooks.attached({point: lambda x: x + 1}):
        pass
    assert module(torch.ones(1)).tolist() == [1]
