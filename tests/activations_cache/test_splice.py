import pytest
import torch
from torch import Tensor

from saekit import ActivationCache
from saekit.activations_cache.model import LanguageModel
from saekit.activations_cache.splice import continuation, only_at, text_positions
from saekit.errors import ConfigError

HOOK = "resid_post.0"


@pytest.fixture(scope="module")
def model(tiny_cache: ActivationCache) -> LanguageModel:
    return LanguageModel.load(tiny_cache.model)


@pytest.fixture(scope="module")
def ids(model: LanguageModel) -> list[int]:
    return [*model.prefix, *model.tokenize(["the cat sees"])[0]]


def test_the_likeliest_continuation_is_that_of_a_plain_loop(
    model: LanguageModel, ids: list[int]
) -> None:
    grown = list(ids)
    for _ in range(5):
        grown.append(int(model.logits(torch.tensor([grown]))[0, -1].argmax()))
    found = continuation(model, ids, 5, temperature=0.0)
    assert found == grown[len(ids) :][: len(found)]
    assert len(found) == 5 or found[-1] in model.special


def test_tokens_are_drawn_from_the_softmax_of_the_logits(
    model: LanguageModel, ids: list[int]
) -> None:
    n, temperature = 600, 0.5
    p = (model.logits(torch.tensor([ids]))[0, -1] / temperature).softmax(0)
    drawn = [
        continuation(model, ids, 1, temperature=temperature, seed=seed)[0] for seed in range(n)
    ]
    share = torch.bincount(torch.tensor(drawn), minlength=len(p)) / n
    # Four standard deviations of each token's share: one in some hundred runs of all seeds.
    assert ((share - p).abs() <= 4 * (p * (1 - p) / n).sqrt() + 4 / n).all()
    assert len(set(drawn)) > 1


def test_a_seed_gives_one_continuation_and_an_edit_that_changes_nothing_gives_it_too(
    model: LanguageModel, ids: list[int]
) -> None:
    one = continuation(model, ids, 8, seed=3)
    assert one == continuation(model, ids, 8, seed=3)
    assert one == continuation(model, ids, 8, seed=3, hook=HOOK, edit=lambda x: x)
    assert one != continuation(model, ids, 8, seed=4)
    assert one != continuation(model, ids, 8, seed=3, hook=HOOK, edit=torch.zeros_like)


def test_the_edit_reaches_new_tokens_and_no_special_or_earlier_one(
    model: LanguageModel, ids: list[int]
) -> None:
    rows = []

    def count(x: Tensor) -> Tensor:
        rows.append(len(x))
        return x

    first = len(ids) - 1
    found = continuation(model, ids, 4, hook=HOOK, edit=count, first=first, temperature=0.0)
    assert rows == list(range(1, 1 + len(found)))
    rows.clear()
    continuation(model, ids, 1, hook=HOOK, edit=count)
    assert rows == [len(ids) - len(model.prefix)]


def test_it_ends_where_the_context_does(model: LanguageModel, ids: list[int]) -> None:
    full = (ids * model.context)[: model.context]
    assert continuation(model, full, 3) == []
    assert len(continuation(model, full[:-1], 3)) == 1


def test_a_negative_temperature_is_refused(model: LanguageModel, ids: list[int]) -> None:
    with pytest.raises(ConfigError, match="temperature=-1.0"):
        continuation(model, ids, 1, temperature=-1.0)


def test_an_edit_is_made_at_its_positions_alone(model: LanguageModel) -> None:
    batch = torch.tensor([[*model.prefix, 5, 6, *model.prefix, 7]])
    edited = text_positions(model, batch, first=2)
    assert edited.tolist() == [[False, False, True, False, True]]
    x = torch.ones(1, 5, 3)
    assert torch.equal(only_at(edited, torch.zeros_like)(x)[0, :, 0], 1 - edited[0].float())
    assert x.all()
