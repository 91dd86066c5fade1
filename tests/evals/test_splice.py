import pytest
import torch
from torch import Tensor

from saekit import ActivationCache
from saekit.activations_cache.model import LanguageModel
from saekit.activations_cache.splice import Edit, only_at
from saekit.evals import _splice
from saekit.evals._splice import Losses, spliced_losses, token_losses

HOOK = "resid_post.0"


@pytest.fixture(scope="module")
def model(tiny_cache: ActivationCache) -> LanguageModel:
    return LanguageModel.load(tiny_cache.model)


def losses(
    model: LanguageModel, cache: ActivationCache, n_tokens: int = 10_000, **edits: Edit
) -> dict[str, Losses]:
    windows = cache.windows("test")
    return spliced_losses(
        model, cache, HOOK, edits, windows, n_tokens, lambda _: None, kl=("zero",)
    )


def test_losses_agree_with_a_loop_over_windows_and_positions(
    model: LanguageModel, tiny_cache: ActivationCache
) -> None:
    ce, ce_zero, kl = [], [], []
    for window in tiny_cache.windows("test"):
        ids = window.tokens[None]

        def zero(x: Tensor, keep: Tensor = window.keep) -> Tensor:
            return x * ~keep[None, :, None]

        log_p = model.logits(ids)[0].double().log_softmax(1)
        log_q = model.logits(ids, {HOOK: zero})[0].double().log_softmax(1)
        for t in range(len(window.tokens) - 1):
            if window.keep[t]:
                ce.append(-log_p[t, window.tokens[t + 1]])
                ce_zero.append(-log_q[t, window.tokens[t + 1]])
                kl.append((log_p[t].exp() * (log_p[t] - log_q[t])).sum())
    found = losses(model, tiny_cache, zero=torch.zeros_like)
    assert found["clean"].ce.n == found["zero"].ce.n == found["zero"].kl.n == len(ce)
    assert found["clean"].ce.value == pytest.approx(float(sum(ce)) / len(ce), rel=1e-5)
    assert found["zero"].ce.value == pytest.approx(float(sum(ce_zero)) / len(ce), rel=1e-5)
    assert found["zero"].kl.value == pytest.approx(float(sum(kl)) / len(ce), rel=1e-5)
    assert found["clean"].kl.n == 0


@pytest.mark.parametrize("n", [7, 10_000])
def test_the_loss_of_each_token_is_that_of_its_row(
    n: int, model: LanguageModel, tiny_cache: ActivationCache
) -> None:
    expected = [
        (window.start + t, float(-log_p[t, window.tokens[t + 1]]))
        for window in tiny_cache.windows("test")
        for log_p in [model.logits(window.tokens[None])[0].double().log_softmax(1)]
        for t in range(len(window.tokens) - 1)
        if window.keep[t]
    ][:n]
    told: list[int] = []
    windows = tiny_cache.windows("test")
    found = list(token_losses(model, tiny_cache, HOOK, windows, n, told.append))
    assert torch.cat([rows for rows, _ in found]).tolist() == [row for row, _ in expected]
    assert torch.cat([loss for _, loss in found]).tolist() == pytest.approx(
        [loss for _, loss in expected], rel=1e-5
    )
    assert sum(told) == len(expected)


def test_only_kept_positions_are_edited(
    model: LanguageModel, tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = next(tiny_cache.windows("test"))
    assert not window.keep[0]
    batch = _splice._Batch.of([window], 100, "cpu")
    x = torch.randn(1, len(window.tokens), 16)
    edited = only_at(batch.edited, torch.zeros_like)(x)
    assert torch.equal(edited[0, 0], x[0, 0])
    assert not edited[0, 1:].any()
    assert x[0, 1:].all()


def test_the_first_tokens_count_however_many_windows_run_at_once(
    model: LanguageModel, tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = losses(model, tiny_cache, 37, zero=torch.zeros_like)
    monkeypatch.setattr(_splice, "_LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(_splice, "_PROBABILITIES_AT_ONCE", 1)
    one = losses(model, tiny_cache, 37, zero=torch.zeros_like)
    assert many["zero"].ce.n == one["zero"].ce.n == 37
    assert one["zero"].ce.value == pytest.approx(many["zero"].ce.value, rel=1e-5)
    assert one["zero"].kl.value == pytest.approx(many["zero"].kl.value, rel=1e-5)


def test_no_window_beyond_the_last_token_runs(tiny_cache: ActivationCache) -> None:
    every = list(tiny_cache.windows("test"))
    scored = [int(window.keep[:-1].sum()) for window in every]
    assert scored[0] > 1
    for n, expected in ((0, 0), (1, 1), (scored[0], 1), (scored[0] + 1, 2), (10_000, len(every))):
        assert len(list(_splice._needed(iter(every), n))) == expected


def test_an_edit_sees_exactly_the_kept_activations_of_the_cache(
    model: LanguageModel, tiny_cache: ActivationCache
) -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    found = losses(model, tiny_cache, look=look)
    stored = tiny_cache.rows(HOOK, tiny_cache.indices("test"))
    torch.testing.assert_close(torch.cat(seen), stored, rtol=1e-2, atol=1e-2)
    assert found["look"].ce == found["clean"].ce
