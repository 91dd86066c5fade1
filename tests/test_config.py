from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.activations_cache.config import HarvestConfig
from saekit.config import Config, TrainConfig, differences, read_toml
from saekit.errors import ConfigError
from saekit.evals import _kinds as eval_kinds
from saekit.trainers import _kinds as sae_kinds
from saekit.trainers.topk import TopKConfig

CONFIGS: list[type[Config]] = [
    HarvestConfig,
    *(sae_kinds.kind(name).Config for name in sae_kinds.names()),
    *(eval_kinds.find(name).Config for name in eval_kinds.names()),
]


@settings(max_examples=50, deadline=None)
@given(
    d_sae=st.integers(1, 10_000),
    lr=st.floats(1e-9, 1e3),
    exclude=st.lists(st.text(max_size=5), max_size=3).map(tuple),
)
def test_a_config_survives_plain_data_and_toml(
    d_sae: int, lr: float, exclude: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    cfg = TopKConfig(d_sae=d_sae, k=1, lr=lr, exclude=exclude)
    assert TopKConfig.from_dict(cfg.to_dict()) == cfg
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_text(tomli_w.dumps(cfg.to_dict()), encoding="utf-8")
    assert TopKConfig.from_toml(path) == cfg


def test_an_unknown_key_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        ConfigError, match="TopKConfig has no key 'n_token'; did you mean 'n_tokens'"
    ):
        TopKConfig.from_dict({"n_token": 3})


def test_a_value_of_a_wrong_type_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="lr='fast'"):
        TopKConfig.from_dict({"lr": "fast"})


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ({"n_tokens": 0}, "n_tokens=0 must be at least 1"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"lr_warmup": 0.7, "lr_decay": 0.7}, "may not exceed 1"),
    ],
)
def test_bad_training_values_are_refused_with_the_rule(option: dict[str, int], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        TrainConfig(**option)  # type: ignore[arg-type]


def test_a_missing_and_a_broken_toml_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_toml(tmp_path / "gone.toml")
    (tmp_path / "broken.toml").write_text("k = = 3")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        read_toml(tmp_path / "broken.toml")


def test_differences_name_each_key_with_both_values() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "c": 3}) == (
        "b: None there, 2 here, c: 3 there, None here"
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_has_its_help_beneath_it(config: type[Config]) -> None:
    """Read from the source, as the command line does."""
    import ast
    import inspect

    helped = set()
    for owner in config.__mro__:
        if not issubclass(owner, Config):
            continue
        body = ast.parse(inspect.getsource(owner)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(field.target, ast.Name)
                helped.add(field.target.id)
    assert {field.name for field in fields(config)} <= helped


def test_a_config_cannot_be_changed() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Small(Config):
        k: int = 1

    with pytest.raises(AttributeError):
        Small().k = 2  # type: ignore[misc]
