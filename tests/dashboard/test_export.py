import csv
import io
import json
import re
from pathlib import Path

import pytest

from saekit import cli
from saekit.dashboard import export
from saekit.dashboard.data import Run
from saekit.errors import SaekitError
from saekit.features import FeatureStore

HOSTILE = ("<script>alert", "<img", "\u202e", "</script>alert")


@pytest.fixture
def run(hostile_run: Path) -> Run:
    return Run.open(hostile_run)


@pytest.fixture
def store(run: Run) -> FeatureStore:
    assert run.features is not None
    return run.features


def label(run: Run, texts: dict[str, str]) -> None:
    explained = {"explanations": texts}
    (run.path / "explanations.json").write_text(json.dumps(explained))


def test_a_page_shows_everything_of_its_latents_as_text(run: Run, store: FeatureStore) -> None:
    label(run, {"0": "<img src=x> of wolves"})
    page = export.html_page(run, store, [0, 2])
    assert "&lt;img src=x&gt; of wolves" in page
    assert "Latent 0" in page
    assert "Latent 1<" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "\\u202eevil" in page
    assert "Drawn at random from 3 to 4" in page
    assert "Silent" in page
    assert "It fired on none" in page
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert not any(text in page for text in HOSTILE)
    assert not re.search(r"(src|href)=[\"']?http", page), "nothing is fetched"


def test_csv_has_a_row_a_latent_and_no_formula(run: Run, store: FeatureStore) -> None:
    label(run, {"1": "=HYPERLINK(\u202e)"})
    rows = list(csv.DictReader(io.StringIO(export.csv_table(run, store, [1, 0]))))
    assert [row["latent"] for row in rows] == ["1", "0"]
    assert float(rows[0]["density"]) == 0.2
    assert rows[0]["fires on"] == "("
    assert [row["label"] for row in rows] == ["'=HYPERLINK(\\u202e)", ""]
    store.vocab[9] = "=1+1"
    rows = list(csv.DictReader(io.StringIO(export.csv_table(run, store, [1]))))
    assert rows[0]["fires on"] == "'=1+1"


def test_neuronpedias_layout_is_that_of_sae_dashboard(store: FeatureStore) -> None:
    """Names and meanings as in sae_dashboard 0.8.0, neuronpedia/neuronpedia_dashboard.py."""
    batch = json.loads(json.dumps(export.neuronpedia(store, [0], "mine"), allow_nan=False))
    assert set(batch) == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("tiny", 0, "mine")
    (feature,) = batch["features"]
    assert set(feature) == {
        *("feature_index", "neuron_alignment_indices", "neuron_alignment_values"),
        *("neuron_alignment_l1", "correlated_neurons_indices", "correlated_neurons_l1"),
        *("correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1"),
        *("correlated_features_pearson", "neg_str", "neg_values", "pos_str", "pos_values"),
        *("frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
        *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "n_prompts_total"),
        *("n_tokens_in_prompt", "dataset", "decoder_weights_dist", "activations", "vector"),
    }
    assert feature["pos_str"] == ["<script>alert(1)</script>", "</script>"]
    assert feature["freq_hist_data_bar_values"] == [1, 3]
    assert feature["freq_hist_data_bar_heights"] == [3, 1]
    assert feature["frac_nonzero"] == 0.01
    first, _, drawn = feature["activations"]
    assert first == {
        "bin_min": -1,
        "bin_max": 4,
        "bin_contains": -1,
        "tokens": ["the", " cat", "<script>alert(1)</script>", "\n", VOCAB_7],
        "values": [0, 0, 4, 0, 0],
        "qualifying_token_index": 2,
    }
    assert (drawn["bin_min"], drawn["bin_max"], drawn["bin_contains"]) == (3, 4, 0.5)


VOCAB_7 = "| a | *b* |"


def test_batches_hold_every_latent_asked_for(store: FeatureStore, tmp_path: Path) -> None:
    out = tmp_path / "np"
    export.write_neuronpedia(store, [0, 1], out, "mine", per_batch=1)
    batches = [json.loads((out / f"batch-{n}.json").read_text()) for n in (0, 1)]
    assert [batch["features"][0]["feature_index"] for batch in batches] == [0, 1]
    assert len(list(out.iterdir())) == 2


def _script(path: Path) -> object:
    """What a file of the site hands to the page."""
    text = path.read_text()
    return json.loads(text[text.index("(") + 1 : text.rindex(")")].partition(", ")[2] or "null")


def test_the_site_has_every_latent_and_no_markup_of_a_corpus(run: Run, tmp_path: Path) -> None:
    label(run, {"1": "</script><img src=x>"})
    page = export.write_site(run, tmp_path / "site")
    files = {path.relative_to(page.parent).as_posix() for path in page.parent.rglob("*.*")}
    assert files == {".saekit-site", "index.html", "list.js", "blocks/0.js"}
    listed = (page.parent / "list.js").read_text()
    columns = json.loads(listed[len("saekitList(") : -len(");\n")])
    assert columns["density"] == [0.01, 0.2, 0]
    assert columns["label"] == ["", "</script><img src=x>", ""]
    assert columns["kurtosis"] == [9, 30, None]
    block = _script(page.parent / "blocks" / "0.js")
    assert isinstance(block, list)
    first, _, dead = block
    document, at, tokens, acts = first["contexts"][0][1][0]
    assert document == "<img src=x onerror=alert(1)>"
    assert (at, tokens[2], acts) == (2, "<script>alert(1)</script>", {"2": 4.0})
    assert dead["histogram"] == []
    for path in page.parent.rglob("*.*"):
        assert not any(text in path.read_text() for text in HOSTILE), path
    html = page.read_text()
    assert "innerHTML" not in html
    assert "default-src 'none'" in html
    assert not re.search(r"https?://", html)


def test_a_site_is_written_over_a_site_and_over_nothing_else(run: Run, tmp_path: Path) -> None:
    export.write_site(run, tmp_path / "site")
    export.write_site(run, tmp_path / "site")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(SaekitError, match="holds files that are no site of saekit's"):
        export.write_site(run, tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_the_command_writes_each_format(run: Run, tmp_path: Path) -> None:
    page, table, batches = tmp_path / "a.html", tmp_path / "a.csv", tmp_path / "np"
    command = ["features", "export", str(run.path)]
    assert cli.main([*command, "--out", str(page), "--latents", "1"]) == 0
    assert "Latent 1" in page.read_text() and "Latent 0" not in page.read_text()
    assert cli.main([*command, "--format", "csv", "--out", str(table)]) == 0
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [row["latent"] for row in rows] == ["1", "0"], "those that fire, densest first"
    neuronpedia = [*command, "--format", "neuronpedia", "--out", str(batches)]
    assert cli.main(neuronpedia) == 0
    assert json.loads((batches / "batch-0.json").read_text())["sae_set"] == run.path.name
    assert cli.main(neuronpedia) == 2, "what is there is not mixed with"
    site = tmp_path / "site"
    assert cli.main(["dashboard", str(run.path), "--export", str(site)]) == 0
    assert (site / "index.html").is_file()


def test_a_run_without_a_store_says_how_to_make_it(run: Run, tmp_path: Path) -> None:
    (run.path / "results" / "features" / "features.json").unlink()
    with pytest.raises(SaekitError, match="saekit features build"):
        export.write_site(Run.open(run.path), tmp_path / "site")
    assert not (tmp_path / "site").exists()
