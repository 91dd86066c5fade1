"""On the embedded model, which solves the task."""

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

from saekit import ActivationCache, HarvestConfig, checkpoint, evaluate, harvest, train
from saekit.activations_cache.model import LanguageModel
from saekit.activations_cache.verify import verify
from saekit.errors import CacheError, ConfigError, SaekitError
from saekit.evals._controls import random_pursuit_sae, random_sae
from saekit.evals._edits import Candidates
from saekit.evals._indirect_object_prompts import (
    ATTRIBUTES,
    ROLES,
    Attribute,
    Prompts,
    changed,
    make,
)
from saekit.evals._resample import FEW
from saekit.evals._task_codes import Coder
from saekit.evals._task_patch import Patcher
from saekit.evals._task_scores import Table, effect, necessity, recovered, sufficiency
from saekit.evals.indirect_object import IndirectObjectConfig
from saekit.results import EvalResult
from saekit.sae import SAE, ReLU, TopK
from saekit.seeds import stream
from saekit.trainers.topk import TopKConfig

HOOK = "resid_post.1"
Agree = Callable[..., None]
NAMES = ("George", "Emily", "Robert", "Rachel", "Kate", "Peter", "Helen", "David")
SMALL: dict[str, Any] = {
    "n_fit": 48,
    "n_test": 12,
    "n_patch": 3,
    "names": NAMES,
    "k": (2,),
    "attributes": ("IO",),
    "occlude": (1.0,),
    "n_bootstrap": 20,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> ActivationCache:
    cfg = HarvestConfig(
        model="demo", dataset=str(corpus_file), hooks=(HOOK,), n_tokens=300, context=32
    )
    return harvest(cfg, tmp_path_factory.mktemp("demo") / "cache")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.load("demo")


@pytest.fixture(scope="module")
def prompts(model: LanguageModel) -> Prompts:
    return make(model, 12, 0, "test")


@pytest.fixture(scope="module")
def wide_exact() -> SAE:
    eye = torch.eye(256)
    both = torch.cat([eye, -eye])
    return SAE(both.T.clone(), torch.zeros(512), both, torch.zeros(256), ReLU())


@pytest.fixture(scope="module")
def sparse() -> SAE:
    """Random directions, six to a row."""
    rows = torch.randn(80, 256, generator=torch.Generator().manual_seed(0))
    rows = rows / rows.norm(dim=1, keepdim=True)
    return SAE(rows.T.clone(), torch.zeros(80), rows, torch.zeros(256), TopK(6))


def run(sae: SAE, cache: ActivationCache, **changes: Any) -> EvalResult:
    cfg = IndirectObjectConfig(device="cpu", **{**SMALL, **changes})
    return evaluate("indirect_object", sae, cache, hook=HOOK, config=cfg)


@pytest.fixture(scope="module")
def found(sparse: SAE, cache: ActivationCache) -> EvalResult:
    return run(sparse, cache)


def values(result: EvalResult) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


def one_answer(
    model: LanguageModel, prompts: Prompts, row: int, places: list[int], new: Tensor | None
) -> tuple[float, int]:
    """Logit difference and answer of a prompt alone, without padding."""
    ids = prompts.ids[row, : prompts.length[row]][None]

    def edit(x: Tensor) -> Tensor:
        assert new is not None
        x = x.clone()
        for place, value in zip(places, new, strict=True):
            x[0, prompts.at[row, place]] = value
        return x

    logits = model.logits(ids, None if new is None else {HOOK: edit})[0, -1].double()
    io, subject = (prompts.token[n[row]] for n in (prompts.io, prompts.subject))
    return float(logits[io] - logits[subject]), int(logits.argmax())


# The prompts.


def test_the_embedded_model_solves_the_prompts(model: LanguageModel) -> None:
    some = make(model, 100, 1, "test")
    answers = Patcher(model, HOOK, (3,), 2048).answer(some)
    assert (answers.difference > 0).double().mean() > 0.95
    assert (answers.top == some.token[some.io]).double().mean() > 0.95


def test_roles_are_where_the_names_stand(model: LanguageModel, prompts: Prompts) -> None:
    for row in range(len(prompts)):
        ids = prompts.ids[row, : prompts.length[row]].tolist()
        io, subject = (int(prompts.token[n[row]]) for n in (prompts.io, prompts.subject))
        first = [i for i, token in enumerate(ids) if token == subject]
        assert prompts.at[row].tolist() == [ids.index(io), *first, len(ids) - 1]
        assert ("ABB", "BAB")[prompts.order[row]] == ("ABB" if ids.index(io) < first[0] else "BAB")
        assert ids[0] == model.prefix[0]
        assert model.vocab[io] == f" {prompts.names[prompts.io[row]]}"


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_counterfactual_changes_one_attribute(prompts: Prompts, attribute: Attribute) -> None:
    other = changed(prompts, attribute, 0)
    column = ATTRIBUTES.index(attribute)
    same = other.values == prompts.values
    assert not same[:, column].any() and same.sum() == 2 * len(prompts)
    assert (other.io != other.subject).all()
    moved = (other.ids != prompts.ids).sum(1)
    assert moved.tolist() == [{"IO": 1, "S": 2, "Pos": 2}[attribute]] * len(prompts)
    rows = torch.arange(len(prompts))
    for role, name in (("io", other.io), ("s1", other.subject), ("s2", other.subject)):
        assert (other.ids[rows, other.at[:, ROLES.index(role)]] == other.token[name]).all()


def test_a_seed_gives_the_same_prompts_and_no_prompt_comes_twice(model: LanguageModel) -> None:
    some, again = make(model, 60, 4, "test"), make(model, 60, 4, "test")
    assert torch.equal(some.ids, again.ids)
    assert len(some.ids.unique(dim=0)) == 60


def test_names_of_several_tokens_are_left_out(model: LanguageModel) -> None:
    some = make(model, 5, 0, "test", (*NAMES, "Nebuchadnezzar"))
    assert some.names == NAMES


def test_a_model_without_the_names_is_refused(random_sae: SAE, tiny_cache: ActivationCache) -> None:
    with pytest.raises(ConfigError, match="only 0 of 40 names are tokens of their own"):
        evaluate("indirect_object", random_sae, tiny_cache, hook="resid_post.0")


# Running them.


def test_activations_and_answers_are_those_of_each_prompt_alone(
    model: LanguageModel, prompts: Prompts
) -> None:
    places = [0, 3]
    patcher = Patcher(model, HOOK, tuple(places), 70)
    x = patcher.read(prompts)
    new = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    clean, patched = patcher.answer(prompts), patcher.answer(prompts, new)
    for row in range(len(prompts)):
        ids = prompts.ids[row, : prompts.length[row]][None]
        alone = model.capture(model.inputs(ids), [HOOK])[HOOK][0, prompts.at[row, places]]
        torch.testing.assert_close(x[row], alone, rtol=1e-4, atol=1e-4)
        for answers, by in ((clean, None), (patched, new[row])):
            difference, top = one_answer(model, prompts, row, places, by)
            assert answers.difference[row].item() == pytest.approx(difference, abs=1e-3)
            assert answers.top[row].item() == top


def test_an_activation_in_its_own_place_changes_nothing(
    model: LanguageModel, prompts: Prompts
) -> None:
    patcher = Patcher(model, HOOK, (0, 1, 2, 3), 4096)
    clean, patched = patcher.answer(prompts), patcher.answer(prompts, patcher.read(prompts))
    torch.testing.assert_close(patched.difference, clean.difference, rtol=1e-5, atol=1e-4)


def test_logits_that_are_not_finite_are_refused(model: LanguageModel, prompts: Prompts) -> None:
    patcher = Patcher(model, HOOK, (0,), 4096)
    with pytest.raises(SaekitError, match="logits contain NaN or infinity"):
        patcher.answer(prompts, torch.full((len(prompts), 1, 256), math.nan))


# The scores.


def test_scores_worked_by_hand() -> None:
    clean, ablated, x_hat, without = (torch.tensor([v]) for v in (3.0, -1.0, 2.0, 0.0))
    assert sufficiency(clean, x_hat).item() == pytest.approx(2 / 3)
    assert recovered(clean, ablated, x_hat).item() == pytest.approx(0.75)
    assert necessity(clean, ablated, without).item() == pytest.approx(0.75)
    assert effect(clean, ablated, x_hat).item() == pytest.approx(0.25)
    # What lies beyond mean ablation counts as recovered: absolute values, as in the paper's code.
    assert recovered(clean, ablated, torch.tensor([-2.0])).item() == pytest.approx(0.25)


def test_a_share_of_nothing_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    table = Table.over(4, 10, 0)
    same = table.mean(torch.ones(4))
    with caplog.at_level(logging.WARNING):
        table.add("share", recovered(same, same, same * 2), "")
    assert not table.metrics
    assert "share is left out: what it is a share of is no more than 0.01" in caplog.text


def test_a_share_of_what_may_be_nothing_is_left_out() -> None:
    """293 would be recovered of an ablation that moves the logits by chance."""
    table = Table.over(20, 50, 0)
    noise = torch.randn(20, generator=torch.Generator().manual_seed(0))
    clean, ablated = table.mean(10 + noise), table.mean(10.05 + noise.flip(0))
    table.add("share", recovered(clean, ablated, ablated - 15), "")
    assert abs(float(clean[0] - ablated[0])) > 0.01 and not table.metrics
    table.add("share", recovered(clean, ablated - 5, ablated), "")
    assert table.metrics["share"].value == pytest.approx(1, abs=0.1)


def test_intervals_are_the_quantiles_of_seeded_resamples() -> None:
    data = torch.arange(30.0).square()
    table, again = Table.over(30, 400, 0), Table.over(30, 400, 0)
    for some in (table, again):
        some.add_mean("mean", data, "mean")
    low, high = table.metrics["mean"].interval or (0.0, 0.0)
    assert table.metrics == again.metrics
    weights = table.resamples.weights[1:].double()
    assert (weights.sum(1) == 30).all()
    means = (weights * data).sum(1) / 30
    tails = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert [low, high] == pytest.approx(tails.tolist(), rel=1e-12)
    assert low < data.mean().item() < high
    assert table.metrics["mean"].value == pytest.approx(data.mean().item())


def test_the_interval_of_a_count_lies_about_the_count() -> None:
    table = Table.over(FEW, 4, 0)
    table.add_count("count", torch.tensor([10.0, 2.0, 3.0, 4.0, 3.0]), "")
    low, high = table.metrics["count"].interval or (0.0, 0.0)
    assert 9 <= low < 10 < high <= 11


# The whole.


def test_an_exact_sae_does_all_and_leaves_nothing(wide_exact: SAE, cache: ActivationCache) -> None:
    numbers = values(run(wide_exact, cache, positions=("io",), k=(512,), occlude=(), n_patch=2))
    for name in ("sufficiency", "recovered_mean", "necessity_mean", "ev"):
        assert numbers[f"sae_{name}"] == pytest.approx(1, abs=1e-4)
    # Exchanging all latents is the patch.
    assert numbers["io_agreement_sae_k512"] == 1
    assert numbers["io_effect_sae_k512"] == pytest.approx(1, abs=1e-4)
    assert numbers["io_share_sae_k512"] == pytest.approx(1, abs=0.02)


class Told:
    """What latents tell, in plain loops: `z[row][place][latent]`, and what each prompt is."""

    def __init__(self, sae: SAE, x: Tensor, prompts: Prompts) -> None:
        self.z = [[one(sae.encode, place).tolist() for place in row] for row in x]
        self.values = [list(zip(*rows, strict=True)) for rows in zip(*self.z, strict=True)]
        order, n = prompts.order.tolist(), len(prompts.names)
        self.families: dict[str, tuple[list[int], int, int]] = {"pos": (order, 2, 1)}
        for name, of in (("io", prompts.io.tolist()), ("s", prompts.subject.tolist())):
            self.families[name] = (of, n, n // 4)
            for i, end in enumerate(("abb", "bab")):
                here = [v if o == i else -1 for v, o in zip(of, order, strict=True)]
                self.families[f"{name}_{end}"] = (here, n, n // 4)
        self.holds = {
            name: [{row for row, v in enumerate(of) if v == value} for value in range(size)]
            for name, (of, size, _) in self.families.items()
        }
        self.fires: dict[tuple[int, int, float], set[int]] = {}
        self.best: dict[tuple[int, int, str], tuple[float, set[int]]] = {}

    def f1(self, place: int, latent: int, family: str, union: set[int], least: float = 0) -> float:
        """Of firing, or of a value of `least` or more, as a classifier of these values."""
        key = place, latent, least
        if key not in self.fires:
            values = enumerate(self.values[place][latent])
            self.fires[key] = {row for row, v in values if v > 0 and v >= least}
        fires, holds = self.fires[key], self.holds[family]
        both = sum(len(fires & holds[v]) for v in union)
        return 2 * both / max(len(fires) + sum(len(holds[v]) for v in union), 1)

    def union(self, place: int, latent: int, family: str) -> tuple[float, set[int]]:
        """The best that greedy search finds; of equals, the first."""
        key = place, latent, family
        if key not in self.best:
            chosen: set[int] = set()
            best, (_, size, most) = 0.0, self.families[family]
            for _ in range(most):
                left = {
                    v: self.f1(place, latent, family, chosen | {v})
                    for v in range(size)
                    if v not in chosen
                }
                top = max(left, key=lambda v: left[v])
                if chosen and left[top] <= best:
                    break
                chosen, best = chosen | {top}, left[top]
            self.best[key] = best, chosen
        return self.best[key]

    def tells(self, place: int, latent: int, group: tuple[str, ...]) -> float:
        """The best F1 of the latent at a place; 0 where it never fires."""
        if not any(self.values[place][latent]):
            return 0.0
        return max(self.union(place, latent, family)[0] for family in group)

    def alive(self, place: int) -> list[int]:
        return [i for i, some in enumerate(self.values[place]) if any(v > 0 for v in some)]


GROUPS = {"io": ("io", "io_abb", "io_bab"), "s": ("s", "s_abb", "s_bab"), "pos": ("pos",)}


def held_out(fit: Told, test: Told, group: tuple[str, ...]) -> list[float]:
    """F1 on the test's prompts of the place and union that are best on the fit's."""
    found: dict[int, tuple[float, float]] = {}
    for place in range(4):
        for latent in fit.alive(place):
            for family in (name for name in fit.families if name in group):
                f1, union = fit.union(place, latent, family)
                if f1 > found.get(latent, (0.0, 0.0))[0]:
                    found[latent] = f1, test.f1(place, latent, family, union)
    return [f1 for _, f1 in found.values()]


def held_out_of_thresholds(fit: Told, test: Told) -> list[float]:
    """The same, of single values and the best threshold."""
    found: dict[int, tuple[float, float]] = {}
    for place in range(4):
        for latent in fit.alive(place):
            values = sorted(set(fit.values[place][latent]) - {0.0}, reverse=True)
            for least in values:
                for family, (_, size, _) in fit.families.items():
                    for value in range(size):
                        f1 = fit.f1(place, latent, family, {value}, least)
                        if f1 > found.get(latent, (0.0, 0.0))[0]:
                            told = test.f1(place, latent, family, {value}, least)
                            found[latent] = f1, told
    return [f1 for _, f1 in found.values()]


class Task:
    """The task once more, prompt by prompt and place by place: everything but the passes of model
    and SAEs in float64."""

    def __init__(self, sae: SAE, cache: ActivationCache, model: LanguageModel) -> None:
        self.model = model
        every = make(model, 60, 0, "test", NAMES)
        self.fit, self.test = every[:48], every[48:]
        self.x_fit, self.x_test = self.read(self.fit), self.read(self.test)
        self.saes = {
            "sae": sae,
            "random_sae": random_sae(sae, cache, HOOK),
            "random_pursuit": random_pursuit_sae(sae, cache, HOOK),
        }
        self.mean = self.x_fit.mean(0)
        of = [(p.io.tolist(), p.subject.tolist(), p.order.tolist()) for p in (self.fit, self.test)]
        self.of_fit, self.of_test = (list(zip(*some, strict=True)) for some in of)
        self.codes = {"mean_code": self.mean_codes(), "mse_code": self.mse_codes()}

    def read(self, prompts: Prompts) -> Tensor:
        found = []
        for row in range(len(prompts)):
            ids = prompts.ids[row, : prompts.length[row]][None]
            seen = self.model.capture(self.model.inputs(ids), [HOOK])[HOOK]
            found.append(seen[0, prompts.at[row]].double())
        return torch.stack(found)

    def mean_codes(self) -> dict[tuple[int, int], Tensor]:
        """u[attribute, value], of all places."""
        codes = {}
        for i in range(3):
            for value in {known[i] for known in self.of_fit}:
                alike = [
                    a for a, known in zip(self.x_fit, self.of_fit, strict=True) if known[i] == value
                ]
                codes[i, value] = torch.stack(alike).mean(0) - self.mean
        return codes

    def mse_codes(self) -> dict[tuple[int, int], Tensor]:
        """The least squares solution that is shortest."""
        keys = sorted({(i, known[i]) for known in self.of_fit for i in range(3)})
        hot = np.array([[float(known[i] == v) for i, v in keys] for known in self.of_fit])
        centred = (self.x_fit - self.mean).flatten(1).numpy()
        solved = torch.from_numpy(np.linalg.lstsq(hot, centred, rcond=None)[0])
        return {key: row.view_as(self.mean) for key, row in zip(keys, solved, strict=True)}

    def x_hat(self, who: str, row: int) -> Tensor:
        """Of a prompt of the test."""
        if who in self.codes:
            parts = [self.codes[who][i, v] for i, v in enumerate(self.of_test[row])]
            return self.mean + sum(parts, torch.zeros(1))
        sae, places = self.saes[who], self.x_test[row].float()
        hats = [sae.decode(sae.encode_sparse(x[None]), x[None])[0] for x in places]
        return torch.stack(hats).double()

    def run(self, row: int, new: Tensor | None) -> tuple[float, int]:
        """Logit difference and answer of a prompt of the test."""
        places = [0, 1, 2, 3]
        return one_answer(self.model, self.test, row, places, None if new is None else new.float())


def one(encode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The latents of one activation, as the SAE's own pass gives them."""
    return encode(x.float()[None])[0].double()


@pytest.fixture(scope="module")
def task(sparse: SAE, cache: ActivationCache, model: LanguageModel) -> Task:
    return Task(sparse, cache, model)


@pytest.fixture(scope="module")
def refitted(
    sparse: SAE,
    cache: ActivationCache,
    trained_on: Callable[..., SAE],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """As if trained on activations without the code of the IO."""
    rows = torch.randn(80, 256, generator=torch.Generator().manual_seed(5))
    folder = tmp_path_factory.mktemp("refitted")
    sae = dataclasses.replace(sparse, W_enc=rows.T.contiguous(), W_dec=rows)
    checkpoint.save(trained_on(sae, cache, hook=f"{HOOK}:without_100_io"), folder)
    return folder


@pytest.fixture(scope="module")
def alone(sparse: SAE, cache: ActivationCache, refitted: Path) -> EvalResult:
    """Prompts and places one by one, so that the passes are those of the loops to the last digit:
    sums in float32 depend on what stands beside a row."""
    return run(sparse, cache, batch_size=1, refitted=(str(refitted),))


def exchanged(z_a: Tensor, z_b: Tensor, W_dec: Tensor, order: list[int]) -> tuple[Tensor, float]:
    """What exchanging these latents adds, and their share of the reconstruction."""
    step = sum(((z_b[j] - z_a[j]) * W_dec[j] for j in order), torch.zeros(1))
    v = sum((z_a[j] * W_dec[j] for j in range(len(W_dec))), torch.zeros(1))
    square = float(v @ v)
    return step, sum(float(z_a[j] * (W_dec[j] @ v)) / square for j in order)


def greedy(z_a: Tensor, z_b: Tensor, W_dec: Tensor, a: Tensor, b: Tensor) -> list[int]:
    """The two latents that bring a nearest to b, one after the other."""
    left, at = [j for j in range(len(z_a)) if z_a[j] != z_b[j]], a.clone()
    chosen: list[int] = []
    while left and len(chosen) < 2:
        steps = {j: (z_b[j] - z_a[j]) * W_dec[j] for j in left}
        away = {j: float((at + step - b).norm()) for j, step in steps.items()}
        best = min(away, key=lambda j: away[j])
        if away[best] >= float((at - b).norm()):
            break
        at = at + steps[best]
        left.remove(best)
        chosen.append(best)
    return chosen


def test_losses_and_edits_agree_with_prompts_run_one_by_one(
    alone: EvalResult, task: Task, agree: Agree
) -> None:
    n = 3
    clean = [task.run(row, None) for row in range(n)]
    expected = {"ld_clean": sum(d for d, _ in clean) / n}
    expected["accuracy"] = sum(d > 0 for d, _ in clean) / n
    answer = task.test.token[task.test.io].tolist()
    expected["top1"] = sum(top == io for (_, top), io in zip(clean, answer, strict=False)) / n

    def ld(new: Callable[[int], Tensor]) -> float:
        return sum(task.run(row, new(row))[0] for row in range(n)) / n

    ablated = expected["ld_mean_ablated"] = ld(lambda row: task.mean)
    of_clean = expected["ld_clean"]
    for who in (*task.saes, *task.codes):
        hats = [task.x_hat(who, row) for row in range(len(task.test))]
        x_hat = ld(lambda row, hats=hats: hats[row])  # type: ignore[misc]
        without = ld(lambda row, hats=hats: task.mean + task.x_test[row] - hats[row])  # type: ignore[misc]
        x, mu = task.x_test, task.x_test.mean(0)
        error = math.fsum(float((a - b).square().sum()) for a, b in zip(x, hats, strict=True))
        expected |= {
            f"{who}_ld": x_hat,
            f"{who}_necessity_ld": without,
            f"{who}_sufficiency": x_hat / of_clean,
            f"{who}_recovered_mean": abs(x_hat - ablated) / abs(of_clean - ablated),
            f"{who}_necessity_mean": 1 - abs(ablated - without) / abs(ablated - of_clean),
            f"{who}_ev": 1 - error / math.fsum(float((a - mu).square().sum()) for a in x),
        }
    target = changed(task.test[:n], "IO", 0)
    b, told = task.read(target), Told(task.saes["sae"], task.x_fit, task.fit)
    patched = [task.run(row, b[row]) for row in range(n)]
    patch = expected["io_ld_patch"] = sum(d for d, _ in patched) / n
    edits: dict[str, list[Tensor]] = {}
    shares: dict[str, list[float]] = {}
    for who, codes in task.codes.items():
        new = [(codes[0, int(target.io[r])] - codes[0, task.of_test[r][0]]) for r in range(n)]
        edits[who] = [task.x_test[row] + new[row] for row in range(n)]
    # A draw for each slot that a latent may have.
    pairs = (Coder(task.saes["sae"], 1).code(x.float()) for x in (task.x_test[:n], b))
    slots = Candidates.of(*pairs).latent.tolist()
    draws = torch.rand(n * 4, 12, generator=stream("random latents", 0)).tolist()
    for who, sae in task.saes.items():
        W_dec = sae.W_dec.double()
        for row in range(n):
            orders: dict[str, list[Tensor]] = {}
            for place in range(4):
                a = task.x_test[row, place]
                z_a, z_b = one(sae.encode, a), one(sae.encode, b[row, place])
                choice = {who: greedy(z_a, z_b, W_dec, a, b[row, place])}
                if who == "sae":
                    usable = [j for j in range(80) if z_a[j] != z_b[j]]
                    f1 = {j: told.tells(place, j, GROUPS["io"]) for j in usable}
                    choice["by_f1"] = sorted(usable, key=lambda j: (-f1[j], j))[:2]
                    draw = dict(zip(slots[4 * row + place], draws[4 * row + place], strict=True))
                    choice["random_latents"] = sorted(usable, key=lambda j: -draw[j])[:2]
                for how, order in choice.items():
                    step, share = exchanged(z_a, z_b, W_dec, order)
                    orders.setdefault(how, []).append(a + step)
                    shares.setdefault(how, []).append(share)
            for how, places in orders.items():
                edits.setdefault(f"{how}_k2", []).append(torch.stack(places))
    expected |= {f"io_share_{how}_k2": sum(some) / (4 * n) for how, some in shares.items()}
    answers = {how: [task.run(row, x[row]) for row in range(n)] for how, x in edits.items()}
    for how, some in {**answers, "none": clean}.items():
        agreed = sum(top == wanted for (_, top), (_, wanted) in zip(some, patched, strict=True))
        expected[f"io_agreement_{how}"] = agreed / n
        expected[f"io_ld_{how}"] = sum(d for d, _ in some) / n
        if how != "none":
            expected[f"io_effect_{how}"] = (expected[f"io_ld_{how}"] - of_clean) / (
                patch - of_clean
            )
    sae = task.saes["sae"]
    for verb in ("keep", "remove"):

        def cut(row: int, verb: str = verb) -> Tensor:
            x = task.x_test[row].clone()
            for place in range(4):
                z = one(sae.encode, task.x_test[row, place])
                for j in z.nonzero()[:, 0].tolist():
                    telling = told.tells(place, j, GROUPS["io"] + GROUPS["s"]) >= 0.6
                    if telling == (verb == "remove"):
                        x[place] -= z[j] * sae.W_dec[j].double()
            return x

        expected[f"sae_{verb}_f1_60_ld"] = ld(cut)
    # Logits of 15 and more, in fp32.
    agree(alone, expected, abs=1e-5)


def test_counts_of_latents_that_tell_agree_with_plain_loops(
    alone: EvalResult, task: Task, refitted: Path, agree: Agree
) -> None:
    expected: dict[str, float] = {}
    for who, sae in task.saes.items():
        fit, test = Told(sae, task.x_fit, task.fit), Told(sae, task.x_test, task.test)
        f1 = {name: held_out(fit, test, group) for name, group in GROUPS.items()}
        f1["any"] = held_out(fit, test, sum(GROUPS.values(), ()))
        f1["best_threshold"] = held_out_of_thresholds(fit, test)
        expected |= {
            f"{who}_f1_{round(100 * least)}_{name}": sum(v >= least - 1e-12 for v in some)
            for name, some in f1.items()
            for least in (0.8, 0.5)
        }
    codes = task.codes["mse_code"]
    without = [
        torch.stack([a - codes[0, known[0]] for a, known in zip(x, of, strict=True)])
        for x, of in ((task.x_fit, task.of_fit), (task.x_test, task.of_test))
    ]
    for who, sae in (("sae", task.saes["sae"]), ("refitted", checkpoint.load(refitted))):
        fit, test = Told(sae, without[0], task.fit), Told(sae, without[1], task.test)
        for name in ("io", "s"):
            some = held_out(fit, test, GROUPS[name])
            key = f"{who}_f1_50_{name}_without_100_io"
            expected[key] = sum(v >= 0.5 - 1e-12 for v in some)
    agree(alone, expected)
    assert 0 < expected["sae_f1_50_any"] < 80


def test_batch_size_changes_no_number(
    found: EvalResult, sparse: SAE, cache: ActivationCache
) -> None:
    again = run(sparse, cache, batch_size=60)
    assert values(again) == pytest.approx(values(found), rel=1e-4, abs=1e-4)
    assert again.arrays.keys() == found.arrays.keys()


def test_every_metric_is_finite_counted_and_defined_and_the_sae_left_alone(
    sparse: SAE, found: EvalResult
) -> None:
    """What `test_common` asks of an evaluation, whose tiny model does not know a name."""
    for metric in found.metrics.values():
        assert math.isfinite(metric.value) and metric.n > 0 and metric.definition
    rows = torch.randn(80, 256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sparse.W_dec, rows / rows.norm(dim=1, keepdim=True))


def test_a_second_run_is_identical(sparse: SAE, cache: ActivationCache, found: EvalResult) -> None:
    again = run(sparse, cache)
    assert again.metrics == found.metrics
    assert all((again.arrays[name] == array).all() for name, array in found.arrays.items())


def test_the_supervised_dictionaries_edit_what_the_model_reads(found: EvalResult) -> None:
    numbers = values(found)
    assert numbers["io_agreement_none"] < 0.2 < 0.8 < numbers["io_agreement_mse_code"]
    assert numbers["mse_code_sufficiency"] > 0.8
    assert numbers["mse_code_ev"] > numbers["sae_ev"]


def test_where_nothing_is_read_any_more_no_share_is_given(
    sparse: SAE, cache: ActivationCache, caplog: pytest.LogCaptureFixture
) -> None:
    """The model has not yet moved the name to the last position."""
    with caplog.at_level(logging.WARNING):
        numbers = values(run(sparse, cache, positions=("last",), k=(), occlude=(), n_patch=12))
    assert numbers["io_agreement_none"] == 1
    assert abs(numbers["io_ld_patch"] - numbers["ld_clean"]) < 1
    assert not {"io_effect_mse_code", "sae_recovered_mean"} & numbers.keys()
    assert "sae_recovered_mean is left out" in caplog.text


def test_dropping_the_error_term_starts_at_the_reconstruction(
    found: EvalResult, sparse: SAE, cache: ActivationCache
) -> None:
    dropped = values(run(sparse, cache, error_term="drop", occlude=()))
    kept = values(found)
    assert dropped["sae_ld"] == pytest.approx(kept["sae_ld"], abs=1e-4)
    assert abs(dropped["io_ld_sae_k2"] - kept["io_ld_sae_k2"]) > 0.1


def test_saes_are_refitted_to_activations_without_the_io(
    sparse: SAE, cache: ActivationCache, model: LanguageModel, tmp_path: Path
) -> None:
    out = tmp_path / "occluded"
    both = {"occlude": (0.5, 1.0)}
    plain = values(run(sparse, cache, occluded_out=str(out), **both))
    occluded = ActivationCache.open(out)
    assert not verify(occluded)
    assert list(occluded.hooks) == [f"{HOOK}:without_50_io", f"{HOOK}:without_100_io"]
    assert (occluded.n_rows, occluded.model_fingerprint) == (48 * 4, cache.model_fingerprint)
    fit = make(model, 60, 0, "test", NAMES)[:48]
    x = Patcher(model, HOOK, (0, 1, 2, 3), 64).read(fit)
    # Least squares on one-hot attributes, the shortest of the solutions.
    hot = [torch.nn.functional.one_hot(v).double() for v in (fit.io, fit.subject, fit.order)]
    flat = x.double().flatten(1)
    U = torch.linalg.pinv(torch.cat(hot, 1)) @ (flat - flat.mean(0))
    io = (hot[0] @ U[:8]).view_as(x)
    rows = torch.arange(48 * 4)
    for percent in (50, 100):
        stored = occluded.rows(f"{HOOK}:without_{percent}_io", rows)
        expected = (x - percent / 100 * io).flatten(0, 1).float()
        torch.testing.assert_close(stored, expected, rtol=1e-4, atol=1e-4)
    assert occluded.take("token", rows)[::4].tolist() == fit.ids.gather(1, fit.at)[:, 0].tolist()
    paths = []
    for percent in (50, 100):
        cfg = TopKConfig(d_sae=32, k=4, n_tokens=4000, batch_size=96, dead_after=2000)
        hook = f"{HOOK}:without_{percent}_io"
        train(cfg, occluded, hook=hook, out=tmp_path / f"{percent}", device="cpu")
        paths.append(str(tmp_path / f"{percent}"))
    again = run(sparse, cache, refitted=tuple(paths), **both)
    found = values(again)
    new = {name for name in found if name.startswith("refitted_")}
    assert new == {
        f"refitted_f1_50_{group}_without_{percent}_io"
        for group in ("io", "s")
        for percent in (50, 100)
    }
    assert {name: found[name] for name in plain} == plain
    metric = again.metrics["refitted_f1_50_s_without_100_io"]
    assert "which this SAE was fitted to" in metric.definition
    with pytest.raises(CacheError, match="holds a cache already: give another folder as occluded"):
        run(sparse, cache, occluded_out=str(out))
    with pytest.raises(ConfigError, match="is an SAE of .*without_50_io.*, and what is counted is"):
        run(sparse, cache, refitted=tuple(paths), occlude=(1.0,))
    with pytest.raises(ConfigError, match="names two SAEs of"):
        run(sparse, cache, refitted=(paths[0], paths[0]), **both)


def test_a_silent_sae_tells_nothing(
    sparse: SAE, cache: ActivationCache, caplog: pytest.LogCaptureFixture
) -> None:
    silent = dataclasses.replace(sparse, b_enc=torch.full((80,), -1e6))
    with caplog.at_level(logging.WARNING):
        result = run(silent, cache)
    numbers = values(result)
    assert all(math.isfinite(number) for number in numbers.values())
    assert "every number of random_sae is left out: " in caplog.text
    assert numbers["sae_f1_50_any"] == numbers["io_share_sae_k2"] == 0
    assert numbers["io_ld_sae_k2"] == pytest.approx(numbers["ld_clean"], abs=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split": "all"}, "split='all' is none of the task's"),
        ({"n_patch": 0}, "n_patch=0 must be at least 1"),
        ({"n_patch": 9, "n_test": 8}, "n_patch=9 exceeds n_test=8"),
        ({"max_rows": 100}, "3000 prompts exceed max_rows=100"),
        ({"k": (2, 0)}, "must each be at least 1"),
        ({"k": (2, 2)}, "names something twice"),
        ({"positions": ()}, "positions is empty"),
        ({"n_bootstrap": -1}, "n_bootstrap=-1 must not be negative"),
    ],
)
def test_what_cannot_work_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IndirectObjectConfig(**given)
