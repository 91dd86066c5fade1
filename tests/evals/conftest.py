"""SAEs whose behaviour is known beforehand, and what holds results to plain loops."""

import dataclasses
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saekit import ActivationCache
from saekit.results import EvalResult, Provenance
from saekit.sae import SAE, ReLU, TopK

WIDTH = 16

LOOPS: dict[str, dict[str, list[str]]] = tomllib.loads(
    Path(__file__).with_name("loops.toml").read_text()
)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


@pytest.fixture
def covered() -> Callable[[EvalResult], None]:
    """Refuses a result that has a number which no test holds to a plain loop."""

    def check(result: EvalResult) -> None:
        patterns = [one for some in LOOPS[result.eval].values() for one in some]
        alone = [name for name in result.metrics if not _matches(name, patterns)]
        assert not alone, (
            f"{alone} of '{result.eval}' are held to no plain loop: write one in float64, give its "
            "numbers to `agree`, and name the test in loops.toml"
        )

    return check


@pytest.fixture
def agree(
    request: pytest.FixtureRequest, covered: Callable[[EvalResult], None]
) -> Callable[..., None]:
    """Holds a result to numbers of a plain loop, to 1e-6, and the test to what loops.toml says that
    it looks at: no more and no less."""
    test: str = request.node.originalname

    def check(
        result: EvalResult, expected: dict[str, float], rel: float = 1e-6, abs: float = 1e-9
    ) -> None:
        covered(result)
        patterns = LOOPS[result.eval][test]
        unsaid = [name for name in expected if not _matches(name, patterns)]
        assert not unsaid, f"loops.toml does not say that {test} looks at {unsaid}"
        for pattern in patterns:
            assert any(re.fullmatch(pattern, name) for name in expected), (
                f"loops.toml says that {test} looks at {pattern}, and it does not"
            )
        found = {name: metric.value for name, metric in result.metrics.items()}
        assert expected.keys() <= found.keys()
        off = {
            name: (found[name], value)
            for name, value in expected.items()
            if found[name] != pytest.approx(value, rel=rel, abs=abs)
        }
        assert not off, f"found, and in a plain loop: {off}"

    return check


@pytest.fixture(scope="session")
def trained_on() -> Callable[..., SAE]:
    """The SAE as if trained on a cache, at resid_post.0 unless a change says otherwise."""

    def of(sae: SAE, cache: ActivationCache, **changes: Any) -> SAE:
        origin = Provenance(
            kind="topk",
            hook="resid_post.0",
            model=cache.model,
            model_fingerprint=cache.model_fingerprint,
            cache_fingerprint=cache.fingerprint,
            config={"seed": 0, "d_sae": sae.d_sae},
            rows_seen=1,
            versions={},
        )
        return dataclasses.replace(sae, provenance=dataclasses.replace(origin, **changes))

    return of


@pytest.fixture
def exact() -> SAE:
    """x = relu(x) - relu(-x): reconstructs anything, without error."""
    eye, zero = torch.eye(WIDTH), torch.zeros(WIDTH)
    return SAE(
        torch.cat([eye, -eye], 1), torch.zeros(2 * WIDTH), torch.cat([eye, -eye]), zero, ReLU()
    )


@pytest.fixture
def silent() -> SAE:
    """Never fires, and so reconstructs zero."""
    return SAE(
        torch.zeros(WIDTH, 8), -torch.ones(8), torch.zeros(8, WIDTH), torch.zeros(WIDTH), TopK(2)
    )


@pytest.fixture
def random_sae() -> SAE:
    """Encoder weights of -1, 0 and 1, so that no rounding depends on how rows are batched: equal
    contexts, of which the tiny corpus has many, then have equal latents."""
    generator = torch.Generator().manual_seed(1)
    W_enc = torch.randint(-1, 2, (WIDTH, 40), generator=generator).float()
    b_enc = torch.randint(-2, 3, (40,), generator=generator) / 4
    W_dec = torch.randn(40, WIDTH, generator=generator) / 10
    return SAE(W_enc, b_enc, W_dec, torch.zeros(WIDTH), TopK(4))


@pytest.fixture
def pursued() -> Callable[[SAE, Tensor, int], Tensor]:
    """Gradient pursuit of one row, by the equations, in fp64 and over the whole dictionary."""

    def latents(sae: SAE, x: Tensor, steps: int) -> Tensor:
        W_dec, norm = sae.W_dec.double(), sae.W_dec.double().norm(dim=1)
        D = torch.stack([row / n if n > 0 else row for row, n in zip(W_dec, norm, strict=True)])
        s = x.double() - sae.b_dec.double()
        w = torch.zeros(len(D), dtype=torch.float64)
        support: set[int] = set()
        for _ in range(steps):
            r = s - w @ D
            p = D @ r
            support.add(int(p.argmax()))
            g = torch.tensor([float(p[i]) if i in support else 0.0 for i in range(len(D))]).double()
            c = g @ D
            if float(c @ c) > 0:
                w = (w + float(c @ r) / float(c @ c) * g).clamp_min(0)
        return torch.where(norm > 0, w / norm, 0.0)

    return latents
