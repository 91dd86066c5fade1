import pytest

from saekit.dashboard import notebook
from saekit.results import Metric


def test_text_is_coloured_by_value_and_escaped() -> None:
    html = notebook.text(["<b>", " a", "\n"], [0.0, -1.0, 2.0], "a.py")._repr_html_()
    assert "&lt;b&gt;" in html and "<b>" not in html and "↵" in html and "a.py" in html
    assert repr(notebook.text(["<b>"], [1.0])) == "1.00 <b>"
    assert html.count('class="on') == 1 and html.startswith("<style>")


def test_a_value_for_each_token_is_asked_for() -> None:
    with pytest.raises(ValueError, match="2 tokens and 1 values"):
        notebook.text(["a", "b"], [1.0])


def test_the_metrics_named_are_shown() -> None:
    known = {name: Metric(value=0.5, definition=f"of {name}", n=3) for name in ("ev", "mse")}
    one, both = notebook.metrics(known, "ev").body, notebook.metrics(known).body
    assert "of ev" in one and "of mse" not in one and "of mse" in both
