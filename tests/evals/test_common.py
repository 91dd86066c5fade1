"""The contract of every evaluation: a new file in `evals/` is held to it by existing."""

import ast
import math
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saekit import ActivationCache, evaluate
from saekit.errors import SaekitError
from saekit.evals import _kinds
from saekit.evals._base import Eval, EvalConfig
from saekit.results import EvalResult
from saekit.sae import SAE

HOOK = "resid_post.0"
HOOKS = {"attention": "attn_z.1"}
"""Of evaluations that are of one kind of hook point."""
ELSEWHERE = {"ground_truth", "indirect_object"}
"""Evaluations that need more than the tiny model has, planted features or words: their own tests
hold them to the same."""


@pytest.fixture(params=_kinds.names())
def any_eval(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=[name for name in _kinds.names() if name not in ELSEWHERE])
def here(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def run(name: str, sae: SAE, cache: ActivationCache, out: Path) -> EvalResult:
    return evaluate(name, sae, cache, hook=HOOKS.get(name, HOOK), out=out)


def test_it_is_an_eval_with_a_config_of_its_own(any_eval: str) -> None:
    kind = _kinds.find(any_eval)
    assert issubclass(kind, Eval)
    assert issubclass(kind.Config, EvalConfig) and kind.Config is not EvalConfig
    assert kind.Config.from_dict(kind.Config().to_dict()) == kind.Config()


def test_every_metric_is_finite_counted_and_defined(
    here: str, random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    result = run(here, random_sae, tiny_cache, tmp_path)
    assert result.metrics
    for metric in result.metrics.values():
        assert math.isfinite(metric.value) and metric.n > 0 and metric.definition


def test_no_number_is_without_its_plain_loop(
    here: str,
    random_sae: SAE,
    tiny_cache: ActivationCache,
    tmp_path: Path,
    covered: Callable[[EvalResult], None],
) -> None:
    """Results of other configs, and of those elsewhere, are asked the same where loops are."""
    covered(run(here, random_sae, tiny_cache, tmp_path))


def test_the_tests_that_loops_toml_names_are_there(any_eval: str) -> None:
    """In the evaluation's own file, or one of loops of several: each with what holds it to them."""
    folder = Path(__file__).parent
    found: dict[str, set[str]] = {}
    for path in folder.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, set()).update(one.arg for one in node.args.args)
    named = tomllib.loads((folder / "loops.toml").read_text(encoding="utf-8"))[any_eval]
    assert named and all("agree" in found.get(test, ()) for test in named)


@pytest.mark.parametrize("where", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_an_sae_with_nan_among_its_weights_gives_no_number(
    any_eval: str, where: str, random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    spoilt = getattr(random_sae, where).clone()
    spoilt.flatten()[3] = math.nan
    sae = replace(random_sae, **{where: spoilt})
    with pytest.raises(SaekitError, match=f"1 of the .* weights of the SAE's {where} are NaN"):
        run(any_eval, sae, tiny_cache, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_second_run_is_identical(
    here: str, random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    first = run(here, random_sae, tiny_cache, tmp_path / "first")
    second = run(here, random_sae, tiny_cache, tmp_path / "second")
    assert first.metrics == second.metrics
    files = [file for file in (tmp_path / "first").rglob("*") if file.is_file()]
    for file in files:
        again = tmp_path / "second" / file.relative_to(tmp_path / "first")
        assert file.read_bytes() == again.read_bytes()


def test_weights_in_float64_change_no_number(
    here: str, random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    """Evaluations run in float32, whatever the file holds."""
    given = run(here, random_sae, tiny_cache, tmp_path / "given")
    wide = run(here, random_sae.to(dtype=torch.float64), tiny_cache, tmp_path / "wide")
    assert wide.metrics == given.metrics


def test_it_leaves_the_sae_as_it_was(
    here: str, random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in random_sae.tensors().items()}
    run(here, random_sae, tiny_cache, tmp_path)
    assert all((before[name] == tensor).all() for name, tensor in random_sae.tensors().items())
