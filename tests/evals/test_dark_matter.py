import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saekit import ActivationCache, checkpoint, evaluate, train
from saekit.activations_cache.model import LanguageModel
from saekit.activations_cache.planted import CONTEXT, cache_of
from saekit.activations_cache.shuffle import shuffle
from saekit.activations_cache.verify import verify
from saekit.errors import CacheError, CheckpointError, ConfigError, SaekitError
from saekit.evals._dark_parts import Rows
from saekit.evals._resample import widening
from saekit.evals.dark_matter import DarkMatterConfig
from saekit.results import EvalResult
from saekit.sae import SAE, JumpReLU, ReLU, SparseCode
from saekit.seeds import stream
from saekit.trainers.topk import TopKConfig

HOOK = "resid_post.0"
Agree = Callable[..., None]
TrainedOn = Callable[..., SAE]
Pursued = Callable[[SAE, Tensor, int], Tensor]


def dark(sae: SAE, cache: ActivationCache, **config: Any) -> EvalResult:
    config = {"ce_tokens": 0, "n_bootstrap": 0, **config}
    return evaluate("dark_matter", sae, cache, hook=HOOK, config=DarkMatterConfig(**config))


def values(result: EvalResult) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


class Plain:
    """The same numbers once more: all rows at once, numpy's least squares, sums row by row."""

    def __init__(self, sae: SAE, cache: ActivationCache, intercept: bool = True) -> None:
        self.intercept = intercept
        train, test = cache.indices("train"), cache.indices("test")
        self.document: list[int] = cache.take("document", test).tolist()
        self.token: list[list[int]] = [
            cache.take("token", index).tolist() for index in (train, test)
        ]
        both = [cache.rows(HOOK, index) for index in (train, test)]
        self.x: list[Any] = [rows.double().numpy() for rows in both]
        self.x_hat: list[Any] = [sae(rows).double().numpy() for rows in both]
        self.l0: list[Any] = [(sae.encode(rows) != 0).sum(1).double().numpy() for rows in both]
        self.gain = (self.x[0] * self.x_hat[0]).sum() / (self.x_hat[0] ** 2).sum()

    def predicted(self, u: list[Any], target: list[Any]) -> list[Any]:
        """A least squares prediction of the target from u, on train and test rows."""
        ones = [np.ones((len(rows), 1 if self.intercept else 0)) for rows in u]
        a, b = (np.concatenate(both, 1) for both in zip(u, ones, strict=True))
        fit = np.linalg.lstsq(a, target[0], rcond=None)[0]
        return [a @ fit, b @ fit]

    def parts(self, gain: float = 1.0) -> tuple[list[Any], list[Any], list[Any]]:
        error = [x - gain * hat for x, hat in zip(self.x, self.x_hat, strict=True)]
        linear = self.predicted(self.x, error)
        return error, linear, [e - part for e, part in zip(error, linear, strict=True)]

    def fvu(self, left: Any) -> float:
        return total(left) / total(self.x[1] - self.x[1].mean(0))

    def r2_of_norm(self, vectors: list[Any], u: list[Any] | None = None) -> float:
        squares = [np.array([[float(row @ row)] for row in rows]) for rows in vectors]
        found = self.predicted(self.x if u is None else u, squares)
        return r2_pooled(squares[1], found[1])


def total(rows: Any) -> float:
    return sum(float(value) ** 2 for row in rows for value in row)


def r2_pooled(y: Any, y_hat: Any) -> float:
    return 1 - total(y - y_hat) / total(y - y.mean(0))


def r2_uniform(y: Any, y_hat: Any) -> float:
    d: int = y.shape[1]
    return sum(r2_pooled(y[:, j : j + 1], y_hat[:, j : j + 1]) for j in range(d)) / d


@pytest.mark.parametrize(("intercept", "suffix"), [(True, ""), (False, "_no_intercept")])
def test_every_number_agrees_with_plain_least_squares(
    intercept: bool, suffix: str, random_sae: SAE, tiny_cache: ActivationCache, agree: Agree
) -> None:
    plain = Plain(random_sae, tiny_cache, intercept)
    error, linear, nonlinear = plain.parts()
    scaled, scaled_linear, scaled_rest = plain.parts(plain.gain)
    expected = {
        "fvu_nonlinear": plain.fvu(nonlinear[1]),
        "fvu_linear": plain.fvu(error[1]) - plain.fvu(nonlinear[1]),
        "fvu_nonlinear_rescaled": plain.fvu(scaled_rest[1]),
        "fvu_linear_rescaled": plain.fvu(scaled[1]) - plain.fvu(scaled_rest[1]),
        "r2_vec_uniform": r2_uniform(error[1], linear[1]),
        "r2_vec_pooled": r2_pooled(error[1], linear[1]),
        "r2_vec_uniform_rescaled": r2_uniform(scaled[1], scaled_linear[1]),
        "r2_vec_pooled_rescaled": r2_pooled(scaled[1], scaled_linear[1]),
        "r2_norm_sq": plain.r2_of_norm(error),
        "r2_norm_sq_rescaled": plain.r2_of_norm(scaled),
        "r2_norm_sq_x": plain.r2_of_norm(plain.x),
        "r2_norm_sq_x_hat": plain.r2_of_norm(plain.x_hat),
        "r2_norm_sq_linear": plain.r2_of_norm(linear),
        "r2_norm_sq_nonlinear": plain.r2_of_norm(nonlinear),
        "r2_norm_sq_x_hat_plus_nonlinear": plain.r2_of_norm(
            [a + b for a, b in zip(plain.x_hat, nonlinear, strict=True)]
        ),
    }
    expected = {name + suffix: value for name, value in expected.items()}
    result = dark(random_sae, tiny_cache)
    assert {result.metrics[name].n for name in expected} == {len(plain.x[1])}
    expected |= {
        "fvu_total": plain.fvu(error[1]),
        "fvu_total_rescaled": plain.fvu(scaled[1]),
        "gain_star": plain.gain,
        "fit_rows": len(plain.x[0]),
    }
    agree(result, expected)
    assert result.metrics["gain_star"].n == len(plain.x[0])


def test_baselines_of_the_norm_agree_with_a_loop(
    random_sae: SAE, tiny_cache: ActivationCache, agree: Agree
) -> None:
    random_sae = dataclasses.replace(random_sae, activation=ReLU())
    plain = Plain(random_sae, tiny_cache)
    every: tuple[list[Any], ...] = (plain.x, plain.x_hat, plain.l0, plain.token)
    for both in every:
        both[0] = both[0][:60]  # so few that some held-out tokens are not among them
    error = plain.parts()[0]
    squares = [np.array([[float(row @ row)] for row in rows]) for rows in error]
    by_token: dict[int, list[float]] = {}
    for token, square in zip(plain.token[0], squares[0][:, 0], strict=True):
        by_token.setdefault(token, []).append(float(square))
    overall = float(squares[0].mean())
    guess = [[sum(s := by_token.get(t, [overall])) / len(s)] for t in plain.token[1]]
    assert not set(plain.token[1]) <= set(by_token)
    lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in plain.x]
    expected = {
        "r2_norm_sq_from_token": r2_pooled(squares[1], np.array(guess)),
        "r2_norm_sq_from_length": plain.r2_of_norm(error, lengths),
        "r2_norm_sq_from_l0": plain.r2_of_norm(error, [l0[:, None] for l0 in plain.l0]),
    }
    agree(dark(random_sae, tiny_cache, fit_rows=60), expected)


def test_the_loss_as_a_baseline_of_the_norm_agrees_with_a_loop(
    random_sae: SAE, tiny_cache: ActivationCache, agree: Agree
) -> None:
    model = LanguageModel.load(tiny_cache.model)
    u: list[Any] = []
    squares: list[Any] = []
    for split in ("train", "test"):
        losses, lengths = [], []
        for window in tiny_cache.windows(split):
            log_p = model.logits(window.tokens[None])[0].double().log_softmax(1)
            for t in range(len(window.tokens) - 1):
                if window.keep[t]:
                    x = tiny_cache.rows(HOOK, torch.tensor([window.start + t]))
                    losses.append([-float(log_p[t, window.tokens[t + 1]])])
                    lengths.append([float((x - random_sae(x)).double().square().sum())])
        u.append(np.array(losses))
        squares.append(np.array(lengths))
    few = [u[0][:200], u[1][:200]]
    for n, (a, b) in {10_000: u, 200: few}.items():
        ones = np.ones((len(a), 1))
        fit = np.linalg.lstsq(np.concatenate([a, ones], 1), squares[0][: len(a)], rcond=None)[0]
        guess = b @ fit[:1] + fit[1]
        result = dark(random_sae, tiny_cache, ce_tokens=n, n_bootstrap=20)
        agree(result, {"r2_norm_sq_from_loss": r2_pooled(squares[1][: len(b)], guess)}, abs=1e-6)
        metric = result.metrics["r2_norm_sq_from_loss"]
        assert metric.n == len(b)
        assert metric.interval is not None and metric.interval[0] < metric.value


class Noisy(SAE):
    """An SAE with noise of this variance on each dimension of its reconstructions: a function of
    the row, but so wild a one that nothing predicts it."""

    variance = 0.02

    def decode(self, z: Tensor | SparseCode, x: Tensor | None = None) -> Tensor:
        assert x is not None
        mix = torch.randn(self.d_in, self.d_in, generator=torch.Generator().manual_seed(5))
        wild = (1e5 * (x.double() @ mix.double())).sin() * math.sqrt(2 * self.variance)
        x_hat: Tensor = super().decode(z, x)
        return x_hat.add(wild.float())


@pytest.fixture(scope="module")
def truth() -> dict[str, Tensor]:
    """Sparse sums of 12 directions at right angles in 24 dimensions, and noise."""
    generator = torch.Generator().manual_seed(2)
    n, d, m = 60 * CONTEXT, 24, 12
    W_dec = torch.linalg.qr(torch.randn(d, m, generator=generator)).Q.T.contiguous()
    fires = torch.rand(n, m, generator=generator) < 0.3
    codes = fires * (1 + torch.rand(n, m, generator=generator))
    return {"W_dec": W_dec, "codes": codes, "noise": 0.05 * torch.randn(n, d, generator=generator)}


@pytest.mark.parametrize("absent", [0, 6])
@pytest.mark.parametrize("before", ["none", "outside", "everywhere"])
@pytest.mark.parametrize("after", [False, True])
def test_each_injected_error_lands_in_its_part(
    absent: int, before: str, after: bool, truth: dict[str, Tensor], tmp_path: Path
) -> None:
    """The control of the paper's appendix: what an SAE reconstructs exactly is the truth. Absent
    features are linear error, and so is noise before the encoder where the dictionary has no
    direction. Noise after the decoder is nonlinear; so is noise along a direction that the encoder
    drops where the feature is silent.
    """
    W_dec, codes = truth["W_dec"], truth["codes"]
    along = truth["noise"] @ W_dec.T
    outside = truth["noise"] - along @ W_dec
    x, linear = codes @ W_dec, codes[:, :absent] @ W_dec[:absent]
    nonlinear = torch.zeros_like(x)
    if before != "none":
        x, linear = x + outside, linear + outside
    if before == "everywhere":
        x = x + along @ W_dec
        linear = linear + along[:, :absent] @ W_dec[:absent]
        nonlinear = (along * (codes == 0))[:, absent:] @ W_dec[absent:]
    left = W_dec.clone()
    left[:absent] = 0
    kind = Noisy if after else SAE
    sae = kind(W_dec.T, torch.zeros(12), left, torch.zeros(24), JumpReLU(torch.full((12,), 0.6)))
    assert torch.equal(sae.encode(x) != 0, codes != 0)
    cache = cache_of([(x, None)], tmp_path / "cache", holdout=0.5)
    found = values(dark(sae, cache))
    test = cache.indices("test")
    scatter = float((x[test] - x[test].mean(0)).square().sum())
    noise = Noisy.variance * 24 * len(test) if after else 0
    expected = {
        "fvu_linear": float(linear[test].square().sum()) / scatter,
        "fvu_nonlinear": (float(nonlinear[test].square().sum()) + noise) / scatter,
    }
    assert found["fvu_nonlinear"] == pytest.approx(expected["fvu_nonlinear"], rel=0.03, abs=1e-9)
    # What a fit takes up of noise it loses again: d weights, from as many rows as are held out.
    lost = 0.03 * expected["fvu_nonlinear"]
    assert found["fvu_linear"] == pytest.approx(expected["fvu_linear"], abs=lost + 1e-9, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_changes_no_number(
    batch_size: int, random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    config: dict[str, Any] = {"n_bootstrap": 5, "fit_rows": 60, "max_rows": 40}
    whole = dark(random_sae, tiny_cache, **config)
    parts = dark(random_sae, tiny_cache, batch_size=batch_size, **config)
    assert values(parts) == pytest.approx(values(whole), rel=1e-5)
    intervals = {name: metric.interval for name, metric in whole.metrics.items()}
    assert intervals["fvu_linear"] is not None
    for name, interval in intervals.items():
        found = parts.metrics[name].interval
        assert (found is None) == (interval is None)
        assert interval is None or found == pytest.approx(interval, rel=1e-5), name


def test_intervals_are_over_documents_with_fit_and_mean_held_fixed(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    plain = Plain(random_sae, tiny_cache)
    error, linear, nonlinear = (part[1] for part in plain.parts())
    names = sorted(set(plain.document))
    rows = {name: [i for i, d in enumerate(plain.document) if d == name] for name in names}
    generator = stream("bootstrap", 3)
    x, mean, error_mean = plain.x[1], plain.x[1].mean(0), error.mean(0)
    r2, fvu = [], []
    for _ in range(30):
        picks = torch.randint(len(names), (len(names),), generator=generator).tolist()
        some = [row for pick in picks for row in rows[names[pick]]]
        r2.append(1 - total(nonlinear[some]) / total(error[some] - error_mean))
        fvu.append((total(error[some]) - total(nonlinear[some])) / total(x[some] - mean))
    result = dark(random_sae, tiny_cache, n_bootstrap=30, seed=3)
    samples = result.arrays["fvu_total_samples"] - result.arrays["fvu_nonlinear_samples"]
    assert samples[1:] == pytest.approx(np.array(fvu), rel=1e-6)
    for name, drawn in (("r2_vec_pooled", r2), ("fvu_linear", fvu)):
        value, ends = result.metrics[name].value, np.quantile(drawn, [0.025, 0.975])
        wider = value + widening(len(names)) * (ends - value)
        assert result.metrics[name].interval == pytest.approx(tuple(wider), rel=1e-6)
        assert f"of {len(names)} documents alone" in result.metrics[name].definition
    assert "hold the fit fixed" in result.metrics["fit_rows"].definition


def test_without_resamples_there_are_no_intervals(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    result = dark(random_sae, tiny_cache)
    assert {metric.interval for metric in result.metrics.values()} == {None}
    assert "interval: it is undefined" not in result.metrics["fit_rows"].definition


def test_an_sae_that_merely_shrinks_has_an_error_that_is_all_linear_until_rescaled(
    exact: SAE, tiny_cache: ActivationCache
) -> None:
    shrunk = dataclasses.replace(exact, W_dec=exact.W_dec / 2)
    found = values(dark(shrunk, tiny_cache))
    assert found["gain_star"] == pytest.approx(2)
    assert found["r2_vec_pooled"] == pytest.approx(1, abs=1e-9)
    assert found["fvu_total"] == pytest.approx(found["fvu_linear"])
    assert found["fvu_nonlinear"] == pytest.approx(0, abs=1e-9)
    assert found["fvu_total_rescaled"] == pytest.approx(0, abs=1e-9)


def test_a_bias_that_the_decoder_missed_is_dark_matter_without_intercept_only(
    exact: SAE, tiny_cache: ActivationCache
) -> None:
    off = dataclasses.replace(exact, W_dec=exact.W_dec * 0.5, b_dec=torch.full((16,), 3.0))
    found = values(dark(off, tiny_cache))
    assert found["r2_vec_pooled"] == pytest.approx(1, abs=1e-9)
    assert found["r2_vec_pooled_no_intercept"] < 0.9


def test_an_exact_sae_leaves_nothing_to_explain_and_says_so(
    exact: SAE, tiny_cache: ActivationCache, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = dark(exact, tiny_cache, n_bootstrap=5)
    assert result.metrics["fvu_total"].value == 0
    assert "r2_vec_pooled" not in result.metrics and "r2_norm_sq" not in result.metrics
    assert (
        "r2_vec_pooled is left out: the error: it does not" in result.metrics["fit_rows"].definition
    )
    assert "r2_vec_pooled is left out: the error: it does not vary" in caplog.text


def test_a_silent_sae_has_no_gain_and_an_error_that_is_x(
    silent: SAE, tiny_cache: ActivationCache
) -> None:
    result = dark(silent, tiny_cache)
    found = values(result)
    assert not [name for name in found if name == "gain_star" or "rescaled" in name]
    assert "gain_star is left out: x_hat is 0 on all rows" in result.metrics["fit_rows"].definition
    assert found["r2_vec_uniform"] == pytest.approx(1, abs=1e-9)


def test_a_part_put_back_wins_loss_back(
    random_sae: SAE, tiny_cache: ActivationCache, agree: Agree
) -> None:
    """Parts are of the activations that the model has as it runs, not of those in the cache, which
    are rounded; the map is fitted on the latter."""
    plain = Plain(random_sae, tiny_cache)
    model = LanguageModel.load(tiny_cache.model)
    error, linear, _ = (part[1] for part in plain.parts())
    ones = np.ones((len(plain.x[0]), 1))
    fit = np.linalg.lstsq(
        np.concatenate([plain.x[0], ones], 1), plain.x[0] - plain.x_hat[0], rcond=None
    )[0]

    def part(x: Tensor) -> Tensor:
        return torch.from_numpy(x.double().numpy() @ fit[:-1] + fit[-1]).float()

    edits: dict[str, Callable[[Tensor], Tensor]] = {
        "clean": lambda x: x,
        "sae": random_sae,
        "sae_plus_linear": lambda x: random_sae(x) + part(x),
        "sae_plus_nonlinear": lambda x: x - part(x),
    }
    ce: dict[str, list[float]] = {name: [] for name in edits}
    document: list[int] = []
    for window in tiny_cache.windows("test"):
        kept = window.keep.nonzero()[:, 0].tolist()
        for name, edit in edits.items():

            def splice(x: Tensor, edit: Any = edit, kept: list[int] = kept) -> Tensor:
                x = x.clone()
                x[0, kept] = edit(x[0, kept])
                return x

            logits = model.logits(window.tokens[None], {HOOK: splice})[0].double()
            log_p = logits - logits.exp().sum(1, keepdim=True).log()
            ce[name] += [
                -float(log_p[t, window.tokens[t + 1]]) for t in kept if t + 1 < len(window.tokens)
            ]
        document += [window.document] * (len(ce["clean"]) - len(document))
    result = dark(random_sae, tiny_cache, ce_tokens=10_000, n_bootstrap=20, seed=2)
    mean = {name: math.fsum(losses) / len(losses) for name, losses in ce.items()}
    rise = mean["sae"] - mean["clean"]
    expected = {f"ce_{name}": value for name, value in mean.items()}
    for name, left in (("linear", error - linear), ("nonlinear", linear)):
        back = mean["sae"] - mean[f"sae_plus_{name}"]
        expected[f"ce_recovered_from_sae_{name}"] = back / rise
        expected[f"variance_recovered_from_sae_{name}"] = 1 - total(left) / total(error)
    agree(result, expected, abs=1e-6)
    assert {result.metrics[f"ce_{name}"].n for name in ce} == {len(ce["clean"])}
    names, generator, shares = sorted(set(document)), stream("bootstrap", 2), []
    for _ in range(20):
        picks = torch.randint(len(names), (len(names),), generator=generator).tolist()
        some = [i for pick in picks for i, d in enumerate(document) if d == names[pick]]
        clean, sae, back = (
            sum(ce[k][i] for i in some) for k in ("clean", "sae", "sae_plus_linear")
        )
        shares.append((sae - back) / (sae - clean))
    share = result.metrics["ce_recovered_from_sae_linear"]
    ends = np.quantile(shares, [0.025, 0.975])
    assert share.interval == pytest.approx(
        tuple(share.value + widening(len(names)) * (ends - share.value)),
        rel=1e-5,  # on some resamples the SAE costs so little that fp32 shows
    )


def test_an_sae_that_costs_nothing_gives_no_share_of_the_loss(
    exact: SAE, tiny_cache: ActivationCache
) -> None:
    result = dark(exact, tiny_cache, ce_tokens=100)
    assert result.metrics["ce_sae"].value == result.metrics["ce_clean"].value
    assert not [name for name in result.metrics if "recovered" in name]
    assert "ce_recovered_from_sae_linear is left out" in result.metrics["fit_rows"].definition


def saved(sae: SAE, folder: Path) -> str:
    checkpoint.save(sae, folder)
    return str(folder)


def test_other_saes_as_predictors_agree_with_plain_least_squares(
    random_sae: SAE,
    tiny_cache: ActivationCache,
    trained_on: TrainedOn,
    tmp_path: Path,
    agree: Agree,
) -> None:
    hook = "mlp_out.1"
    W_dec = torch.randn(40, 16) / 5
    other = dataclasses.replace(random_sae, W_dec=W_dec, b_dec=torch.randn(16))
    path = saved(trained_on(other, tiny_cache, hook=hook), tmp_path / "elsewhere")
    expected = {}
    for intercept, suffix in ((True, ""), (False, "_no_intercept")):
        plain = Plain(random_sae, tiny_cache, intercept)
        u = [
            other(tiny_cache.rows(hook, tiny_cache.indices(split))).double().numpy()
            for split in ("train", "test")
        ]
        for name, part in zip(("error", "linear", "nonlinear"), plain.parts(), strict=True):
            guess = plain.predicted(u, part)[1]
            for kind, r2 in (("uniform", r2_uniform), ("pooled", r2_pooled)):
                expected[f"r2_{name}_{kind}_from_elsewhere{suffix}"] = r2(part[1], guess)
    agree(dark(random_sae, tiny_cache, others=(path,)), expected)


def test_lengths_of_errors_agree_with_plain_least_squares(
    random_sae: SAE,
    tiny_cache: ActivationCache,
    trained_on: TrainedOn,
    tmp_path: Path,
    agree: Agree,
) -> None:
    other = dataclasses.replace(random_sae, W_dec=torch.randn(40, 16) / 5)
    path = saved(trained_on(other, tiny_cache), tmp_path / "larger")
    result = dark(random_sae, tiny_cache, others=(path,))
    plain = [Plain(sae, tiny_cache) for sae in (random_sae, other)]
    lengths = []
    for one in plain:
        error, _, nonlinear = one.parts()
        lengths.append(
            [[np.linalg.norm(e, axis=1)[:, None] for e in v] for v in (error, nonlinear)]
        )
    expected = {}
    for i in range(2):
        for j in range(2):
            target = lengths[j][0]
            alone = r2_pooled(target[1], plain[0].predicted(lengths[i][0], target)[1])
            both = [np.concatenate(pair, 1) for pair in zip(*lengths[i], strict=True)]
            together = r2_pooled(target[1], plain[0].predicted(both, target)[1])
            assert result.arrays["length_r2"][i, j] == pytest.approx(alone, abs=1e-9)
            table = result.arrays["length_r2_with_nonlinear"]
            assert table[i, j] == pytest.approx(together, abs=1e-9)
            if (i, j) == (1, 0):
                expected["length_r2_from_larger"] = alone
                expected["length_gain_from_larger"] = (together - alone) / (1 - alone)
    agree(result, expected)
    # Intervals, too, are over documents.
    drawn = dark(random_sae, tiny_cache, others=(path,), n_bootstrap=20)
    for name in ("length_r2_from_larger", "length_gain_from_larger"):
        assert drawn.metrics[name].value == pytest.approx(expected[name])
        assert drawn.metrics[name].interval is not None
    assert drawn.metrics["r2_error_pooled_from_larger"].interval is None


@pytest.mark.parametrize("size", [7, 4096])
def test_pursuit_is_judged_on_the_same_rows_as_the_sae(
    size: int, random_sae: SAE, tiny_cache: ActivationCache, agree: Agree, pursued: Pursued
) -> None:
    result = dark(random_sae, tiny_cache, pursuit=True, pursuit_rows=60, batch_size=size)
    plain = Plain(random_sae, tiny_cache)
    W_dec = random_sae.W_dec.double()
    plain.x, plain.x_hat = ([rows[:60] for rows in both] for both in (plain.x, plain.x_hat))
    steps = [l0[:60].astype(int).tolist() for l0 in plain.l0]
    codes = [
        [pursued(random_sae, torch.from_numpy(x), n) for x, n in zip(rows, ns, strict=True)]
        for rows, ns in zip(plain.x, steps, strict=True)
    ]
    expected = {
        "pursuit_sae_l0_mean": sum(steps[1]) / 60,
        "pursuit_l0_mean": sum(int((z != 0).sum()) for z in codes[1]) / 60,
    }
    found = [np.stack([(z @ W_dec).numpy() for z in some]) for some in codes]
    for name, x_hat in (("pursuit_sae", plain.x_hat), ("pursuit", found)):
        plain.x_hat = x_hat
        error, _, nonlinear = plain.parts()
        expected[f"{name}_fvu_total"] = plain.fvu(error[1])
        expected[f"{name}_fvu_nonlinear"] = plain.fvu(nonlinear[1])
    agree(result, expected)
    assert expected["pursuit_fvu_total"] < expected["pursuit_sae_fvu_total"]


def test_the_parts_are_a_cache_to_train_on(
    random_sae: SAE, tiny_cache: ActivationCache, tmp_path: Path
) -> None:
    where = str(tmp_path / "parts")
    dark(random_sae, tiny_cache, parts_out=where, batch_size=50)
    parts = ActivationCache.open(where)
    assert verify(parts) == []
    assert parts.documents == tiny_cache.documents
    splits = [parts.indices("train"), parts.indices("test")]
    assert torch.equal(splits[1], tiny_cache.indices("test"))
    plain = Plain(random_sae, tiny_cache)
    ends = ("error", "linear_error", "nonlinear_error")
    for name, expected in zip(ends, plain.parts(), strict=True):
        for index, rows in zip(splits, expected, strict=True):
            found = parts.rows(f"{HOOK}:{name}", index)
            torch.testing.assert_close(found, torch.from_numpy(rows).float(), rtol=1e-2, atol=1e-2)
        every = np.concatenate(expected)
        stats = parts.stats(f"{HOOK}:{name}")
        assert stats.sum_squares == pytest.approx(total(every), rel=1e-6)
        assert stats.mean.tolist() == pytest.approx(every.mean(0).tolist(), abs=1e-6)
    for column in ("token", "document", "position", "mask"):
        rows = torch.arange(parts.n_rows)
        assert torch.equal(parts.take(column, rows), tiny_cache.take(column, rows))
    cfg = TopKConfig(d_sae=32, k=4, n_tokens=1_000, batch_size=128)
    sae = train(cfg, parts, hook=f"{HOOK}:nonlinear_error", out=tmp_path / "run")
    with pytest.raises(CacheError, match="trained on hook 'resid_post.0:nonlinear_error'"):
        evaluate("core", sae, tiny_cache, hook=HOOK)
    with pytest.raises(CacheError, match="has no activations at 'resid_post.0:nonlinear_error'"):
        evaluate("core", sae, tiny_cache)
    with pytest.raises(CacheError, match="holds a cache already: give another folder"):
        dark(random_sae, tiny_cache, parts_out=where)
    shuffled = shuffle(tiny_cache, tmp_path / "shuffled")
    with pytest.raises(CacheError, match="is shuffled: give the cache that it was made from"):
        dark(random_sae, shuffled, parts_out=str(tmp_path / "more"))


def test_an_other_sae_of_another_model_is_refused_by_its_path(
    random_sae: SAE, tiny_cache: ActivationCache, trained_on: TrainedOn, tmp_path: Path
) -> None:
    stranger = trained_on(random_sae, tiny_cache, model="gpt9", model_fingerprint="f" * 64)
    path = saved(stranger, tmp_path / "far")
    with pytest.raises(CacheError, match=r"others: .*/far: the SAE was trained on model 'gpt9'"):
        dark(random_sae, tiny_cache, others=(path,))


def test_other_saes_must_differ_in_name_and_be_there(
    random_sae: SAE, tiny_cache: ActivationCache, trained_on: TrainedOn, tmp_path: Path
) -> None:
    own = trained_on(random_sae, tiny_cache)
    paths = tuple(saved(own, tmp_path / a / "run") for a in ("a", "b"))
    with pytest.raises(ConfigError, match="is not the first of the name 'run'"):
        dark(random_sae, tiny_cache, others=paths)
    with pytest.raises(CheckpointError, match="holds no finished SAE"):
        dark(random_sae, tiny_cache, others=(str(tmp_path / "nothing"),))


def test_a_fit_to_too_few_rows_is_refused_with_the_remedy(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    with pytest.raises(SaekitError, match="17 rows do not determine .* 17 weights .*set ridge"):
        dark(random_sae, tiny_cache, fit_rows=17)
    assert dark(random_sae, tiny_cache, fit_rows=17, ridge=0.01).metrics["fvu_linear"].value < 1


def test_a_loose_fit_is_noted_in_the_result(
    random_sae: SAE, tiny_cache: ActivationCache, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert (
            "are few"
            not in dark(random_sae, tiny_cache, fit_rows=170).metrics["fit_rows"].definition
        )
        assert not caplog.text
        loose = dark(random_sae, tiny_cache, fit_rows=169)
    assert "169 rows are few to fit maps with 17 weights" in loose.metrics["fit_rows"].definition
    assert "169 rows are few" in caplog.text


def test_rows_to_fit_on_lie_in_runs_all_over_the_split(tiny_cache: ActivationCache) -> None:
    rows = Rows(tiny_cache, torch.arange(10_000), 64)
    assert rows.spread(10_000) is rows
    assert torch.equal(rows.spread(100).index, torch.arange(100))
    index = rows.spread(4_000).index
    assert len(index) == 3 * 1024
    assert index[::1024].tolist() == [0, 4 * 1024, 8 * 1024]
    assert (index.view(3, 1024).diff(dim=1) == 1).all()
    # Of nine whole runs the numbers 0, 2.67, 5.33 and 8, rounded.
    assert (rows.spread(4 * 1024).index[::1024] // 1024).tolist() == [0, 3, 5, 8]


@pytest.mark.parametrize("holdout", [0.0, 1.0])
def test_a_cache_without_one_of_the_splits_is_refused(
    holdout: float, random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    config = {**tiny_cache.manifest.config, "holdout": holdout}
    manifest = dataclasses.replace(tiny_cache.manifest, config=config)
    missing = "train" if holdout else "test"
    with pytest.raises(CacheError, match=f"split '{missing}' of .* has no rows outside"):
        dark(random_sae, ActivationCache(tiny_cache.path, manifest))


def test_reconstructions_that_are_not_finite_are_refused(
    random_sae: SAE, tiny_cache: ActivationCache
) -> None:
    # Finite weights, whose products are not.
    broken = dataclasses.replace(random_sae, W_dec=random_sae.W_dec * 3e38)
    with pytest.raises(SaekitError, match="reconstructions at 'resid_post.0' contain NaN"):
        dark(broken, tiny_cache)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"split": "train"}, "split='train' would measure on rows that the maps are fitted on"),
        ({"fit_rows": 0}, "fit_rows=0 must be at least 1"),
        ({"pursuit_rows": 0}, "pursuit_rows=0 must be at least 1"),
        ({"ce_tokens": -1}, "ce_tokens=-1 must not be negative"),
        ({"n_bootstrap": -1}, "n_bootstrap=-1 must not be negative"),
        ({"ridge": -0.1}, "ridge=-0.1 may not be negative"),
    ],
)
def test_values_that_cannot_work_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DarkMatterConfig.from_dict(values)
