"""What is reckoned while somebody looks: a text read and steered, the error, two SAEs matched."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from saekit import SAE, ActivationCache, TopK, load
from saekit.activations_cache.model import LanguageModel
from saekit.dashboard import _dark, _live, _matched, _prompt, _steer
from saekit.dashboard._live import Origin
from saekit.dashboard._steer import Change, Settings
from saekit.dashboard.data import Run
from saekit.errors import SaekitError

HOOK = "resid_post.0"
TEXT = "the cat sees and a dog likes number 3"


@pytest.fixture(scope="module")
def model(tiny_cache: ActivationCache) -> LanguageModel:
    return LanguageModel.load(tiny_cache.model)


@pytest.fixture(scope="module")
def sae(tiny_run: Path) -> SAE:
    return load(tiny_run)


def test_losses_and_latents_of_a_text_are_those_of_a_plain_loop(
    model: LanguageModel, sae: SAE
) -> None:
    reading = _prompt.read(model, sae, HOOK, TEXT)
    ids = torch.tensor([[*model.prefix, *model.tokenize([TEXT])[0]]])
    x = model.capture(model.inputs(ids), [HOOK])[HOOK][0]
    spliced = x.clone()
    spliced[1:] = sae(x[1:])
    log_p = model.logits(ids)[0].log_softmax(1)
    log_q = model.logits(ids, {HOOK: lambda _: spliced[None]})[0].log_softmax(1)
    assert np.isnan(reading.ce[0]) and np.isnan(reading.error[0])
    for t in range(1, ids.shape[1]):
        token = int(ids[0, t])
        assert reading.ce[t] == pytest.approx(-float(log_p[t - 1, token]), rel=1e-4)
        assert reading.ce_sae[t] == pytest.approx(-float(log_q[t - 1, token]), rel=1e-4)
        z = sae.encode(x[t : t + 1])[0]
        assert reading.activation(int(z.argmax()))[t] == pytest.approx(float(z.max()), rel=1e-4)
        assert reading.latents[t, 0] == int(z.argmax())
        left = float((x[t] - sae(x[t : t + 1])[0]).norm() / x[t].norm())
        assert reading.error[t] == pytest.approx(left, rel=1e-4)
    assert reading.ce_sae[1] == pytest.approx(reading.ce[1]), "BOS, which predicts it, stays"
    assert reading.scored.tolist() == [False, False, *[True] * (ids.shape[1] - 2)]
    assert reading.mean(reading.ce) == pytest.approx(reading.ce[2:].mean())


def test_a_text_beyond_the_context_is_cut_and_that_is_told(model: LanguageModel, sae: SAE) -> None:
    reading = _prompt.read(model, sae, HOOK, "the cat " * 40)
    assert len(reading.tokens) == model.context
    assert reading.n_cut == 1 + len(model.tokenize(["the cat " * 40])[0]) - model.context > 0


def test_a_text_without_tokens_is_refused(model: LanguageModel, sae: SAE) -> None:
    with pytest.raises(SaekitError, match="no tokens"):
        _prompt.read(model, sae, HOOK, "")


@pytest.fixture
def small() -> tuple[SAE, Tensor]:
    """Three latents along the axes of a plane, and two rows."""
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    sae = SAE(W.T.clone(), torch.zeros(3), W, torch.tensor([0.5, 0.0]), TopK(1))
    return sae, torch.tensor([[2.0, 1.0], [0.0, 3.0]])


@pytest.mark.parametrize(
    ("changes", "kept", "replaced"),
    [
        ((), [[2.0, 1.0], [0.0, 3.0]], [[2.5, 0.0], [0.5, 3.0]]),
        ((Change(0, "ablate"),), [[0.0, 1.0], [0.0, 3.0]], [[0.5, 0.0], [0.5, 3.0]]),
        ((Change(0, "scale", 2.0),), [[4.0, 1.0], [0.0, 3.0]], [[4.5, 0.0], [0.5, 3.0]]),
        ((Change(1, "set", 7.0),), [[2.0, 8.0], [0.0, 7.0]], [[2.5, 7.0], [0.5, 7.0]]),
        (
            (Change(1, "set", 9.0), Change(1, "set", 7.0)),
            [[2.0, 8.0], [0.0, 7.0]],
            [[2.5, 7.0], [0.5, 7.0]],
        ),
    ],
)
def test_steering_by_hand(
    changes: tuple[Change, ...],
    kept: list[list[float]],
    replaced: list[list[float]],
    small: tuple[SAE, Tensor],
) -> None:
    sae, x = small
    for keep_error, expected in ((True, kept), (False, replaced)):
        found = _steer.steering(sae, changes, keep_error=keep_error)(x)
        torch.testing.assert_close(found, torch.tensor(expected))
    assert torch.equal(x, torch.tensor([[2.0, 1.0], [0.0, 3.0]]))


def test_nothing_changed_is_the_untouched_model_and_a_change_is_not(
    model: LanguageModel, sae: SAE
) -> None:
    settings = Settings(n_tokens=6, n_samples=2, seed=5)
    same = _steer.steer(model, sae, HOOK, TEXT, (), settings)
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert [one.clean for one in same.continued] == [one.steered for one in same.continued]
    assert [one.seed for one in same.continued] == [5, 6]
    far = _steer.steer(model, sae, HOOK, TEXT, (Change(0, "set", 300.0),), settings)
    assert far.kl > 0.01
    assert [one.clean for one in far.continued] == [one.clean for one in same.continued]
    assert far.continued[0].steered != far.continued[0].clean
    assert sum(each.clean for each in far.next_tokens) <= 1 + 1e-6


def test_only_new_tokens_leaves_the_text_before_as_it_is(model: LanguageModel, sae: SAE) -> None:
    change = (Change(0, "set", 300.0),)
    everywhere = _steer.steer(model, sae, HOOK, TEXT, change, Settings(n_tokens=1))
    new = _steer.steer(model, sae, HOOK, TEXT, change, Settings(n_tokens=1, new_only=True))
    assert new.kl != pytest.approx(everywhere.kl, rel=1e-3)
    assert new.kl > 0.01


@pytest.mark.parametrize(
    "text", ["1:sets:2", "x:set:2", "1:set", "1:ablate:0", "1:set:nan", "1:set:1e9", "²:set:1", "1"]
)
def test_changes_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        _steer.read_changes(text)


def test_changes_survive_the_address() -> None:
    changes = (Change(12, "set", -0.5), Change(0, "ablate"), Change(3, "scale", 2.0))
    assert _steer.read_changes(_steer.write_changes(changes)) == changes
    assert _steer.read_changes("") == ()


def test_a_latent_that_is_not_there_is_refused(small: tuple[SAE, Tensor]) -> None:
    with pytest.raises(SaekitError, match="latent 3 is not there: the SAE has 0 to 2"):
        _steer.steering(small[0], (Change(3, "ablate"),), keep_error=True)


def test_the_mean_share_of_error_is_what_core_calls_fvu(
    tiny_run: Path, tiny_cache: ActivationCache, sae: SAE, model: LanguageModel
) -> None:
    errors = _dark.look(sae, tiny_cache, HOOK)
    core = Run.open(tiny_run).core
    assert core is not None
    assert errors.n == core.metrics["fvu"].n
    assert errors.fvu == pytest.approx(core.metrics["fvu"].value, rel=1e-5)
    table = _dark.hardest(errors, model.vocab, n=1000)
    assert sum(v for v in table["of the error"] if isinstance(v, float)) == pytest.approx(1)
    worst = _dark.worst(errors, model.vocab, 3)
    assert worst[0].peak == pytest.approx(errors.shares.max())
    assert worst[0].peak >= worst[1].peak >= worst[2].peak
    assert [span.act for span in worst[0].spans if span.is_peak] == [worst[0].peak]
    text = _dark.text_of(errors, errors.documents[0], model.vocab)
    assert "".join(span.text for span in text).startswith("<bos>")


def test_a_cache_of_another_model_is_refused(tiny_run: Path) -> None:
    run = Run.open(tiny_run)
    assert run.provenance is not None
    object.__setattr__(run.provenance, "model_fingerprint", "0" * 64)
    with pytest.raises(SaekitError, match="was trained on model"):
        _live.open_cache(run)


def test_a_model_with_other_weights_is_refused(tiny_run: Path) -> None:
    origin = Origin.of(Run.open(tiny_run))
    assert origin.model is not None and origin.hook == HOOK
    assert origin.lacking(tiny_run) is None
    with pytest.raises(SaekitError, match="put the old weights back"):
        _live.load_model(origin.model, "0" * 64)


def directions(n: int, d: int) -> SAE:
    W = torch.nn.functional.normalize(torch.randn(n, d), dim=1)
    return SAE(W.T.clone(), torch.zeros(n), W, torch.zeros(d), TopK(1))


@pytest.mark.parametrize("max_matching", [10, 0])
def test_a_shuffled_copy_is_matched_latent_by_latent(max_matching: int) -> None:
    a = directions(8, 6)
    order = torch.randperm(8)
    b = SAE(a.W_enc[:, order], a.b_enc, 3 * a.W_dec[order], a.b_dec, a.activation)
    found = _matched.match(a, b, (None, None), max_matching)
    assert found.one_to_one == (max_matching > 0)
    assert found.mean == pytest.approx(1) and found.share(0.9) == 1
    for latent in range(8):
        counterpart = found.of(latent)
        assert counterpart is not None
        assert int(order[counterpart[0]]) == latent


def test_dead_latents_are_not_matched() -> None:
    a, b = directions(4, 6), directions(5, 6)
    density = np.array([0.1, 0.0, 0.2, 0.3])
    found = _matched.match(a, b, (density, None))
    assert found.n == (3, 5)
    assert sorted(found.latent.tolist()) == [0, 2, 3]
    assert found.of(1) is None


def test_saes_of_two_widths_do_not_match() -> None:
    with pytest.raises(SaekitError, match="of widths 6 and 5"):
        _matched.match(directions(4, 6), directions(4, 5), (None, None))
