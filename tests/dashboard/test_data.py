import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from saekit.dashboard import data
from saekit.dashboard.data import Run
from saekit.errors import SaekitError
from saekit.results import LatentExamples


@pytest.fixture
def examples(hostile_run: Path) -> LatentExamples:
    found = Run.open(hostile_run).examples
    assert found is not None
    return found


def test_a_finished_run_has_everything(any_run: Path) -> None:
    run = Run.open(any_run)
    assert run.kind == "topk"
    assert run.hook == "resid_post.0"
    assert not run.training
    assert run.missing() == []
    assert run.examples is not None
    assert run.d_sae == len(run.examples.density)


def test_a_half_written_last_line_of_the_log_is_passed_over(hostile_run: Path) -> None:
    curves = Run.open(hostile_run).curves
    np.testing.assert_array_equal(curves["step"], [1, 2])
    np.testing.assert_array_equal(curves["ev"], [np.nan, 0.5])


def test_a_run_without_results_says_which_commands_make_them(hostile_run: Path) -> None:
    shutil.rmtree(hostile_run / "results")
    assert Run.open(hostile_run).missing() == [
        f"saekit eval core --sae '{hostile_run}'",
        f"saekit eval examples --sae '{hostile_run}'",
    ]


def test_a_run_still_training_is_read_and_asks_for_its_training_first(hostile_run: Path) -> None:
    (hostile_run / "config.json").unlink()
    run = Run.open(hostile_run)
    assert run.training
    (command,) = run.missing()
    assert command == f"saekit train topk '{hostile_run}/config.toml' --out '{hostile_run}'"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SaekitError, match=r"is no run: it holds neither config\.toml"):
        Run.open(tmp_path)
    with pytest.raises(SaekitError, match=r"there is no such folder\. Give the folder that"):
        Run.open(tmp_path / "absent")


def test_results_of_other_weights_are_refused(hostile_run: Path) -> None:
    path = hostile_run / "config.json"
    config = json.loads(path.read_text()) | {"fingerprint": "0" * 64}
    path.write_text(json.dumps(config))
    with pytest.raises(SaekitError, match=r"trained again since.*saekit eval core"):
        Run.open(hostile_run)


def test_examples_of_another_width_are_refused(hostile_run: Path) -> None:
    path = hostile_run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_sae": 4}))
    with pytest.raises(SaekitError, match="tells of 3 latents, the SAE has 4"):
        Run.open(hostile_run)


@pytest.mark.parametrize(
    ("file", "name"),
    [("core.json", "core"), ("latents.json", "examples"), ("latents.safetensors", "examples")],
)
def test_a_damaged_result_names_the_command_that_writes_it_again(
    file: str, name: str, hostile_run: Path
) -> None:
    path = hostile_run / "results" / file
    assert path.exists()
    path.write_text("{}")
    with pytest.raises(SaekitError, match=f"saekit eval {name} --sae"):
        Run.open(hostile_run)


def test_contexts_leave_out_padding_and_mark_the_peak(examples: LatentExamples) -> None:
    (context,) = data.contexts(examples, 1)
    assert [span.text for span in context.spans] == ["the", "(", "the", "\\u202eevil"]
    assert [span.is_peak for span in context.spans] == [False, True, False, False]
    assert [span.act for span in context.spans] == [0.5, 1.0, 0.0, 0.0]
    assert data.contexts(examples, 2) == []


@pytest.mark.parametrize(
    ("text", "shown", "named"),
    [
        ("\n", "↵", "↵"),
        ("\t", "→", "→"),
        ("  ", "  ", "␣␣"),
        (" a b ", " a b ", "␣a b␣"),
        ("", "", "(empty)"),
        ("\x00\u202e\ud800", "\\u0000\\u202e\\ud800", "\\u0000\\u202e\\ud800"),
        ("é漢🙂", "é漢🙂", "é漢🙂"),
    ],
)
def test_what_cannot_be_seen_in_a_token_is_made_visible(text: str, shown: str, named: str) -> None:
    assert data.show_token(text) == shown
    assert data.name_token(text) == named


def test_output_tokens_are_empty_where_the_latent_writes_to_none(examples: LatentExamples) -> None:
    assert [token.name for token in data.promoted(examples, 1)] == ["␣cat", "→"]
    assert data.promoted(examples, 2) == data.suppressed(examples, 2) == []


def test_selection_filters_and_sorts(examples: LatentExamples) -> None:
    assert data.select(examples).tolist() == [1, 0]
    assert data.select(examples, descending=False).tolist() == [0, 1]
    assert data.select(examples, sort_by="maximum").tolist() == [0, 1]
    assert data.select(examples, show="dead").tolist() == [2]
    assert data.select(examples, show="all", sort_by="latent", descending=False).tolist() == [
        0,
        1,
        2,
    ]
    assert data.select(examples, density=(0.1, 1.0)).tolist() == [1]


@pytest.mark.parametrize(
    ("query", "where", "found"),
    [
        ("THE CAT", "contexts", [0]),
        ("the(the", "contexts", [1, 0]),
        ("(", "fires on", [1, 0]),
        ("Script", "fires on", [0]),
        ("script", "promotes", [0]),
        ("nowhere", "contexts", []),
    ],
)
def test_search_looks_where_it_is_told(
    query: str, where: data.Where, found: list[int], examples: LatentExamples
) -> None:
    assert data.select(examples, query=query, where=where).tolist() == found


def test_the_table_names_what_a_latent_fires_on(examples: LatentExamples) -> None:
    table = data.latent_table(examples)
    assert table["fires on"].tolist() == [
        "<script>alert(1)</script>  \\u202eevil",
        "(",
        "",
    ]
    assert table["promotes"][2] == ""


def test_the_sample_is_seeded_and_takes_each_part_of_the_densities(tiny_run: Path) -> None:
    examples = Run.open(tiny_run).examples
    assert examples is not None
    order = data.select(examples)
    chosen = data.sample_latents(examples, 5, seed=1)
    assert chosen == data.sample_latents(examples, 5, seed=1)
    groups = np.array_split(order, 5)
    assert all(latent in group for latent, group in zip(chosen, groups, strict=True))
    assert data.sample_latents(examples, 10_000, seed=1) == order.tolist()
    assert data.sample_latents(examples, 0, seed=1) == []
