from pathlib import Path

import numpy as np
import pytest

from saekit.dashboard import _notes, features
from saekit.dashboard._search import places
from saekit.dashboard.data import Run
from saekit.dashboard.features import Query, Where
from saekit.errors import SaekitError
from saekit.features import FeatureStore


@pytest.fixture
def store(hostile_run: Path) -> FeatureStore:
    found = Run.open(hostile_run).features
    assert found is not None
    return found


def test_contexts_mark_the_token_that_they_were_picked_for(store: FeatureStore) -> None:
    (context,) = features.contexts(store, store.latent(1))
    assert [span.text for span in context.spans] == ["the", "(", "the", "\\u202eevil"]
    assert [span.is_peak for span in context.spans] == [False, True, False, False]
    assert [span.act for span in context.spans] == [0.5, 1.0, 0.0, 0.0]
    assert features.contexts(store, store.latent(2)) == []


def test_contexts_are_of_the_kind_and_quantile_asked_for(store: FeatureStore) -> None:
    latent = store.latent(0)
    assert [c.peak for c in features.contexts(store, latent)] == [4, 2]
    assert [c.peak for c in features.contexts(store, latent, limit=1)] == [4]
    assert [c.peak for c in features.contexts(store, latent, "sample", 1)] == [4]
    assert features.contexts(store, latent, "sample", 0) == []
    (silent,) = features.contexts(store, latent, "silent")
    assert not any(span.act for span in silent.spans)


def test_a_number_that_the_sae_does_not_have_is_refused(store: FeatureStore) -> None:
    for index in (3, -1):
        with pytest.raises(SaekitError, match=f"no latent {index}: this SAE has 0 to 2"):
            store.latent(index)


def test_output_tokens_are_empty_where_the_latent_writes_to_none(store: FeatureStore) -> None:
    assert [token.name for token in features.promoted(store, store.latent(1))] == ["␣cat", "→"]
    dead = store.latent(2)
    assert features.promoted(store, dead) == features.suppressed(store, dead) == []


def test_input_tokens_have_their_shares(store: FeatureStore) -> None:
    found = features.input_tokens(store, store.latent(0))
    assert [(token.name, token.share, token.count) for token in found] == [
        ("<script>alert(1)</script>", 0.75, 3),
        ("\\u202eevil", 0.25, 1),
    ]


def test_neighbours_say_what_they_fire_on(store: FeatureStore) -> None:
    first, second = features.neighbours(store, store.latent(0), "near")
    assert (first.latent, first.near, first.fires_on) == (1, 0.5, "(")
    assert first.density == pytest.approx(0.2)
    assert (second.latent, second.fires_on) == (2, "")
    (only,) = features.neighbours(store, store.latent(0), "coactive")
    assert (only.latent, only.near) == (1, 0.125)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (Query(), [1, 0]),
        (Query(descending=False), [0, 1]),
        (Query(sort_by="maximum"), [0, 1]),
        (Query(show="dead"), [2]),
        (Query(show="dense"), [1]),
        (Query(show="starred"), [0]),
        (Query(show="all", sort_by="latent", descending=False), [0, 1, 2]),
        (Query(show="all", sort_by="latent"), [2, 1, 0]),
        (Query(show="all", sort_by="kurtosis"), [1, 0, 2]),
        (Query(show="all", sort_by="kurtosis", descending=False), [0, 1, 2]),
        (Query(density=(0.1, 1.0)), [1]),
        (Query(kurtosis=(0.0, 10.0)), [0]),
        (Query(show="all", like=1), [1, 0, 2]),
        (Query(text="wolf", where="label or note"), [1]),
    ],
)
def test_selection_filters_and_sorts(query: Query, found: list[int], store: FeatureStore) -> None:
    texts = {1: "Wolves and a wolf", 0: "other"}
    assert features.select(store, query, texts, starred=[0, 99]).tolist() == found


@pytest.mark.parametrize(
    ("query", "where", "found"),
    [
        ("THE CAT", "contexts", [0]),
        ("the(the", "contexts", [1, 0]),
        ("e(t", "contexts", [1, 0]),
        ("catthe", "contexts", []),
        ("(", "fires on", [1, 0]),
        ("Script", "fires on", [0]),
        ("script", "promotes", [0]),
        ("nowhere", "contexts", []),
    ],
)
def test_search_looks_where_it_is_told(
    query: str, where: Where, found: list[int], store: FeatureStore
) -> None:
    assert features.select(store, Query(text=query, where=where)).tolist() == found


def test_search_finds_what_joined_texts_hold() -> None:
    """Against the plain way, over many short vocabularies that overlap in every way."""
    generator = np.random.default_rng(0)
    vocab = ["a", "b", "ab", "ba", "aa", "", "abc", "c"]
    for _ in range(300):
        tokens = generator.integers(0, len(vocab) + 1, size=(6, 7)).astype(np.uint16)
        tokens[:, -1] = len(vocab)
        wanted = "".join(generator.choice(list("abc"), size=generator.integers(1, 6)))
        pieces = [[vocab[t] if t < len(vocab) else "\0" for t in row] for row in tokens]
        expected = {at for at, row in enumerate(pieces) if wanted in "".join(row)}
        found = set((places(vocab, tokens.ravel(), wanted) // 7).tolist())
        # A token without text lies between no two characters, but ends what was matched so far.
        without = {at for at in expected if 5 not in tokens[at]}
        assert without <= found <= expected, (wanted, pieces)


def test_the_table_names_what_a_latent_fires_on(store: FeatureStore) -> None:
    table = features.table(store, np.array([1, 0, 2]))
    assert table["latent"].tolist() == [1, 0, 2]
    assert table["fires on"].tolist() == ["(", "<script>alert(1…  \\u202eevil", ""]
    assert table["promotes"][2] == ""


def test_the_sample_is_seeded_and_takes_each_part_of_the_densities(tiny_run: Path) -> None:
    store = Run.open(tiny_run).features
    assert store is not None
    order = features.select(store)
    chosen = features.sample_latents(store, 5, seed=1)
    assert chosen == features.sample_latents(store, 5, seed=1)
    groups = np.array_split(order, 5)
    assert all(latent in group for latent, group in zip(chosen, groups, strict=True))
    assert features.sample_latents(store, 10_000, seed=1) == order.tolist()
    assert features.sample_latents(store, 0, seed=1) == []


def test_notes_are_kept_in_one_file_and_leave_when_empty(hostile_run: Path) -> None:
    assert _notes.read(hostile_run) == {}
    _notes.keep(hostile_run, 1, star=True)
    _notes.keep(hostile_run, 0, text="a </script> *wolf*")
    _notes.keep(hostile_run, 1, text="x")
    notes = _notes.read(hostile_run)
    assert (notes[1].star, notes[1].text) == (True, "x")
    assert (notes[0].star, notes[0].text) == (False, "a </script> *wolf*")
    _notes.keep(hostile_run, 0, text="")
    assert list(_notes.read(hostile_run)) == [1]


def test_a_damaged_file_of_notes_is_not_written_over(hostile_run: Path) -> None:
    (hostile_run / "notes.json").write_text("[")
    with pytest.raises(SaekitError, match=r"notes\.json cannot be read"):
        _notes.keep(hostile_run, 0, star=True)
    assert (hostile_run / "notes.json").read_text() == "["
    with pytest.raises(SaekitError, match="longer than 10,000 characters"):
        _notes.keep(hostile_run, 0, text="x" * 10_001)
