"""Every number of the core row once more, in plain loops of float64 over all rows; and what may not
move it: how rows are cut and ordered, and what type weights and rows are stored as."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saekit import ActivationCache, HarvestConfig, evaluate, harvest
from saekit.activations_cache.model import LanguageModel
from saekit.evals.core import CoreConfig
from saekit.results import EvalResult
from saekit.sae import SAE

HOOK = "resid_post.0"
Row = list[float]


def core(sae: SAE, cache: ActivationCache, **config: Any) -> EvalResult:
    return evaluate("core", sae, cache, hook=HOOK, config=CoreConfig(n_bootstrap=0, **config))


def values(result: EvalResult) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


def dot(a: Row, b: Row) -> float:
    return math.fsum(p * q for p, q in zip(a, b, strict=True))


def minus(a: Row, b: Row) -> Row:
    return [p - q for p, q in zip(a, b, strict=True)]


def square(a: Row) -> float:
    return dot(a, a)


def mean(numbers: list[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def mean_row(rows: list[Row]) -> Row:
    return [mean(list(column)) for column in zip(*rows, strict=True)]


def reconstruction(x: list[Row], x_hat: list[Row], centre: Row) -> dict[str, float]:
    """`centre` is the mean over the whole cache."""
    mu, m = mean_row(x), mean([value for row in x for value in row])
    e = [minus(a, b) for a, b in zip(x, x_hat, strict=True)]
    pairs = list(zip(x, x_hat, strict=True))
    error = math.fsum(map(square, e))
    scatter = math.fsum(square(minus(a, mu)) for a in x)
    dots, hats = math.fsum(dot(a, b) for a, b in pairs), math.fsum(map(square, x_hat))
    e_mean = mean_row(e)
    dimensions = [
        1 - square([row[j] for row in e]) / square([row[j] - mu[j] for row in x])
        for j in range(len(mu))
    ]
    return {
        "ev": 1 - error / scatter,
        "fvu": error / scatter,
        "mse": error / len(x),
        "cosine": mean([dot(a, b) / math.sqrt(square(a) * square(b)) for a, b in pairs]),
        "l2_ratio": mean([math.sqrt(square(b) / square(a)) for a, b in pairs]),
        "relative_reconstruction_bias": hats / dots,
        "gain": dots / hats,
        "ev_dimension_mean": mean(dimensions),
        "ev_token_mean": mean(
            [1 - square(err) / square(minus(a, centre)) for err, a in zip(e, x, strict=True)]
        ),
        "ev_uncentred": 1 - error / math.fsum(map(square, x)),
        "ev_centred_error": 1 - math.fsum(square(minus(err, e_mean)) for err in e) / scatter,
        "ev_scalar_mean": 1 - error / math.fsum((v - m) ** 2 for row in x for v in row),
    }


def sparsity(z: list[Row], W_dec: list[Row]) -> dict[str, float]:
    n = len(z)
    l0 = sorted(sum(v != 0 for v in row) for row in z)
    density = sorted(sum(row[i] != 0 for row in z) / n for i in range(len(W_dec)))
    lengths = [math.sqrt(square(row)) for row in W_dec]
    half = len(density) // 2
    return {
        "l0_mean": sum(l0) / n,
        **{f"l0_p{p}": l0[math.ceil(p / 100 * n) - 1] for p in (5, 50, 95)},
        "l1_mean": mean([dot([abs(v) for v in row], lengths) for row in z]),
        "dead_share": sum(share == 0 for share in density) / len(density),
        "dense_share": sum(share > 0.1 for share in density) / len(density),
        "density_median": (density[half - 1] + density[half]) / 2,
    }


def log_softmax(logits: Row) -> Row:
    top = max(logits)
    log_sum = math.log(math.fsum(math.exp(v - top) for v in logits))
    return [v - top - log_sum for v in logits]


def losses(sae: SAE, cache: ActivationCache, model: LanguageModel) -> dict[str, float]:
    """Window by window, token by token."""
    train = cache.rows(HOOK, cache.indices("train")).double().mean(0).float()
    found: dict[str, list[float]] = {name: [] for name in ("clean", "sae", "zero", "mean", "kl")}
    for window in cache.windows("test"):

        def spliced(name: str, keep: Tensor = window.keep, ids: Tensor = window.tokens) -> Tensor:
            def edit(x: Tensor) -> Tensor:
                x = x.clone()
                new = {"sae": sae(x[0]), "zero": 0 * x[0], "mean": train.expand_as(x[0])}[name]
                x[0, keep] = new[keep]
                return x

            return model.logits(ids[None], {} if name == "clean" else {HOOK: edit})[0]

        logits = {name: spliced(name).double().tolist() for name in found if name != "kl"}
        for t in range(len(window.tokens) - 1):
            if not window.keep[t]:
                continue
            log_p = {name: log_softmax(rows[t]) for name, rows in logits.items()}
            for name, row in log_p.items():
                found[name].append(-row[int(window.tokens[t + 1])])
            clean, edited = log_p["clean"], log_p["sae"]
            found["kl"].append(
                math.fsum(math.exp(p) * (p - q) for p, q in zip(clean, edited, strict=True))
            )
    ce = {name: mean(each) for name, each in found.items()}
    rise = {name: ce[name] - ce["clean"] for name in ("sae", "zero", "mean")}
    shares = {
        f"ce_recovered_{name}": (ce[name] - ce["sae"]) / rise[name]
        for name in ("zero", "mean")
        if rise[name] > 1e-6
    }
    return {
        **{f"ce_{name}": ce[name] for name in ("clean", "sae", "zero", "mean")},
        "ce_delta": rise["sae"],
        "kl_sae": ce["kl"],
        **shares,
    }


def test_every_number_agrees_with_plain_loops(
    random_sae: SAE, tiny_cache: ActivationCache, agree: Callable[..., None]
) -> None:
    x = tiny_cache.rows(HOOK, tiny_cache.indices("test"))
    stats = tiny_cache.stats(HOOK)
    z = random_sae.encode(x).double()
    expected = {
        **reconstruction(
            x.double().tolist(),
            random_sae(x).double().tolist(),
            (torch.tensor(stats.sum, dtype=torch.float64) / stats.n).tolist(),
        ),
        **sparsity(z.tolist(), random_sae.W_dec.double().tolist()),
        **losses(random_sae, tiny_cache, LanguageModel.load(tiny_cache.model)),
    }
    agree(core(random_sae, tiny_cache), expected)


@pytest.fixture(scope="module")
def backwards(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: HarvestConfig, texts: list[str]
) -> Iterator[tuple[ActivationCache, ActivationCache]]:
    """All of the documents, first to last and last to first."""
    folder = tmp_path_factory.mktemp("orders")
    caches = []
    for name, some in (("forwards", texts), ("backwards", texts[::-1])):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
        config = dataclasses.replace(
            tiny_config, dataset=str(path), n_tokens=10**6, dtype="float32", holdout=0.0
        )
        caches.append(harvest(config, folder / name))
    yield caches[0], caches[1]


@pytest.mark.parametrize("batch_size", [4096, 50])
def test_the_order_of_documents_changes_no_number(
    batch_size: int, random_sae: SAE, backwards: tuple[ActivationCache, ActivationCache]
) -> None:
    one, other = backwards
    assert one.n_rows == other.n_rows and one.documents != other.documents
    found, again = (
        values(core(random_sae, cache, split="all", batch_size=size))
        for cache, size in ((one, 4096), (other, batch_size))
    )
    assert again == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "rel"), [(torch.float64, 1e-12), (torch.bfloat16, 0.02), (torch.float16, 2e-3)]
)
def test_the_type_of_the_weights_moves_numbers_by_its_rounding_alone(
    dtype: torch.dtype, rel: float, random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    """Evaluations run in float32 whatever the file holds, so float64 changes nothing."""
    found, other = (
        values(core(sae, tiny_cache)) for sae in (random_sae, random_sae.to(dtype=dtype))
    )
    for name, value in found.items():
        assert other[name] == pytest.approx(value, rel=rel, abs=rel), name


@pytest.mark.parametrize(("dtype", "rel"), [("bfloat16", 0.02), ("float16", 2e-3)])
def test_the_type_of_stored_rows_moves_numbers_by_its_rounding_alone(
    dtype: str,
    rel: float,
    random_sae: SAE,
    tmp_path: Path,
    backwards: tuple[ActivationCache, ActivationCache],
) -> None:
    """A latent near 0 may change sides, so that counts are no more exact than values are."""
    given = {**backwards[0].manifest.config, "dtype": dtype}
    known = {field.name for field in dataclasses.fields(HarvestConfig)}
    config = HarvestConfig.from_dict({k: v for k, v in given.items() if k in known})
    rounded = harvest(config, tmp_path / "rounded")
    found, other = (
        values(core(random_sae, cache, split="all", ce_tokens=0))
        for cache in (backwards[0], rounded)
    )
    for name, value in found.items():
        assert other[name] == pytest.approx(value, rel=rel, abs=rel), name
