"""Explanations: rules by hand, and a language model that is a server of this machine."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saekit import ActivationCache, checkpoint, cli, explanations, load
from saekit.errors import ConfigError, SaekitError
from saekit.evals import _explain_contexts as contexts
from saekit.evals import _explain_prompts as prompts
from saekit.evals._explain_contexts import NOTHING, Contexts, balanced_accuracy, for_scoring
from saekit.evals._explain_endpoint import KEY, Answers, Endpoint
from saekit.evals._explain_rules import Rules, f1
from saekit.features import FeatureStore

VOCAB = ["the", " cat", " Cat", " dog", "\n", "(", "3", " 14", "x"]
SECRET = "sk-0123456789"


def of(tokens: list[list[int]], fires: list[list[int]]) -> Contexts:
    acts = np.array(fires, dtype=np.float64)
    return Contexts(np.array(tokens), acts > 0, acts)


@pytest.mark.parametrize(
    ("tokens", "fires", "text"),
    [
        ([[0, 1, 8], [0, 3, 8], [1, 5, 0]], [[0, 1, 0], [0, 0, 0], [2, 0, 0]], 'on " cat"'),
        (
            [[0, 1, 8], [2, 3, 8], [0, 3, 0]],
            [[0, 1, 0], [2, 0, 0], [0, 0, 0]],
            'on " Cat", " cat"',
        ),
        ([[6, 0, 7], [8, 5, 1]], [[2, 0, 1], [0, 0, 0]], 'on "3", " 14"'),
        (
            [[5, 1, 8, 3], [5, 0, 1, 8], [5, 8, 3, 0], [1, 8, 3, 0]],
            [[0, 3, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
            'after "("',
        ),
        (
            [[1, 5, 0, 8], [0, 5, 8, 1], [3, 5, 0, 8], [1, 0, 3, 8]],
            [[3, 0, 0, 0], [2, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]],
            'before "("',
        ),
        (
            [[0, 1, 8, 1], [0, 3, 5, 1], [0, 1, 3, 1]],
            [[0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]],
            'on " cat" after "the"',
        ),
    ],
)
def test_the_rule_is_the_one_that_was_planted(
    tokens: list[list[int]], fires: list[list[int]], text: str
) -> None:
    rule = Rules(VOCAB).best(of(tokens, fires))
    assert rule is not None
    assert rule.text == text
    assert (rule.fires(np.array(tokens)) == (np.array(fires) > 0)).all()


def test_many_tokens_of_a_class_are_told_as_the_class() -> None:
    vocab = [*(f" {number}" for number in range(12)), "a", "b"]
    tokens = [[number, 12] for number in range(12)] + [[12, 13]]
    rule = Rules(vocab).best(of(tokens, [[1, 0]] * 12 + [[0, 0]]))
    assert rule is not None and rule.text == "on digits"


def test_nothing_is_said_of_a_latent_that_never_fires_and_empty_places_never_count() -> None:
    assert Rules(VOCAB).best(of([[0, 1]], [[0, 0]])) is None
    rule = Rules(VOCAB).best(of([[1, NOTHING], [1, 0]], [[1, 0], [1, 0]]))
    assert rule is not None
    assert rule.fires(np.array([[NOTHING, NOTHING], [0, NOTHING]])).sum() == 0


def test_scores_by_hand() -> None:
    yes, no = np.array([True, True, False, False]), np.array([True, False, False, False])
    assert balanced_accuracy(no, yes) == (0.75, 4)
    assert balanced_accuracy(~yes, yes) == (0.0, 4)
    assert balanced_accuracy(np.ones(4, bool), yes) == (0.5, 4), "a constant has one half"
    assert balanced_accuracy(yes, np.ones(4, bool)) is None
    assert f1(no[None], yes[None]) == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def store(tiny_run: Path) -> FeatureStore:
    return FeatureStore.open(tiny_run / "results")


@pytest.fixture(scope="module")
def halves(
    tiny_run: Path, tiny_cache: ActivationCache, store: FeatureStore
) -> tuple[contexts.Half, contexts.Half]:
    return contexts.draw(load(tiny_run), tiny_cache, "resid_post.0", store, n=40, seed=0)


def test_windows_say_of_every_latent_where_it_fires(
    tiny_run: Path,
    tiny_cache: ActivationCache,
    store: FeatureStore,
    halves: tuple[contexts.Half, contexts.Half],
) -> None:
    """Against a plain loop over the cache."""
    sae = load(tiny_run)
    by_text = {}
    for window in tiny_cache.windows("all"):
        z = sae.encode(tiny_cache.row_slice("resid_post.0", window.start,
                                            window.start + len(window.tokens)))  # fmt: skip
        z[~window.keep] = 0
        scoring = for_scoring(tiny_cache.documents[window.document])
        by_text[scoring, *window.tokens.tolist()] = (z > 0).numpy()
    assert store.header.window == tiny_cache.manifest.config["context"], "none is cut"
    n_fires = 0
    for at, half in enumerate(halves):
        fires = np.stack([half.fires(latent) for latent in range(64)], axis=2)
        n_fires += int(fires.sum())
        for row, fired in zip(half.tokens, fires, strict=True):
            text = tuple(row[row != NOTHING].tolist())
            assert (fired[: len(text)] == by_text[bool(at), *text]).all()
    assert n_fires > 500


def test_no_document_serves_both_to_explain_and_to_score(
    store: FeatureStore, halves: tuple[contexts.Half, contexts.Half]
) -> None:
    latent = store.latent(3)
    made, scoring = contexts.of_latent(store, latent, halves)
    texts = [{tuple(row[row != NOTHING]) for row in half.tokens} for half in (made, scoring)]
    assert len(made) > 5 and len(scoring) > 5
    for passage in latent.passages:
        kept = for_scoring(store.documents[passage.document])
        assert tuple(passage.tokens.tolist()) in texts[kept]
    assert made.positive.any() and not made.positive.all()


class Model:
    """A language model on 127.0.0.1, which knows one answer: a latent responds to " cat"."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.fail: list[int] = []
        self.stop_after: int | None = None
        model = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                model.keys.append(self.headers.get("Authorization"))
                stopped = model.stop_after is not None and len(model.bodies) >= model.stop_after
                status = model.fail.pop() if model.fail else 401 if stopped else 200
                answer: Any = {"error": f"no: {self.headers.get('Authorization')}"}
                if status == 200:
                    model.bodies.append(body)
                    content = model.answer(body["messages"])
                    answer = {"choices": [{"message": {"content": content}}]}
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def answer(self, messages: list[dict[str, str]]) -> str:
        asked = messages[1]["content"]
        if not asked.startswith("Explanation:"):
            return "\n the word cat\nand more"
        items = [json.loads(text) for text in re.findall(r'^\d+\. (".*")$', asked, re.MULTILINE)]
        marked = "<<" in messages[0]["content"]
        said = [
            "cat" in "".join(re.findall("<<(.*?)>>", i)) if marked else "cat" in i for i in items
        ]
        return f"Here: {json.dumps([int(each) for each in said])}"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    monkeypatch.setenv(KEY, SECRET)
    model = Model()
    thread = threading.Thread(target=model.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield model
    model.server.shutdown()
    thread.join()
    model.server.server_close()


def answers(model: Model, path: Path, **options: Any) -> Answers:
    endpoint = Endpoint(url=model.url, model="m", wait=0.0, concurrency=3)
    return Answers(path / "answers.jsonl", endpoint, **options)


def questions(n: int) -> list[list[dict[str, str]]]:
    return [prompts._messages("s", f"question {at}") for at in range(n)]


def test_answers_are_kept_and_asked_for_once(model: Model, tmp_path: Path) -> None:
    asked = questions(5)
    first = answers(model, tmp_path)
    assert first.cost(asked).n == 5
    told: list[int] = []
    assert first.ask([*asked, asked[0]], told.append) == ["\n the word cat\nand more"] * 6
    assert sum(told) == 6
    assert len(model.bodies) == 5 and set(model.keys) == {f"Bearer {SECRET}"}
    again = answers(model, tmp_path, send=False)
    assert again.ask(asked) == first.ask(asked)
    assert again.cost(asked).n == 0 and len(model.bodies) == 5
    assert SECRET not in (tmp_path / "answers.jsonl").read_text()
    with pytest.raises(SaekitError, match="holds no answer to 1 of 6 questions"):
        again.ask([*asked, *questions(6)[5:]])


def test_what_was_stopped_goes_on(model: Model, tmp_path: Path) -> None:
    model.stop_after = 3
    with pytest.raises(SaekitError, match="refuses: status 401.*Bearer …") as error:
        answers(model, tmp_path).ask(questions(6))
    assert SECRET not in str(error.value)
    path = tmp_path / "answers.jsonl"
    n = len(path.read_text().splitlines())
    assert n == 3
    with path.open("a") as file:
        file.write('{"key": "half a li')
    model.stop_after = None
    assert len(answers(model, tmp_path).ask(questions(6))) == 6
    assert len(model.bodies) == 6
    assert len(path.read_text().splitlines()) == 6
    path.write_text("[]\n" + path.read_text())
    with pytest.raises(SaekitError, match="line 1 is no stored answer"):
        answers(model, tmp_path)


def test_an_endpoint_that_is_busy_is_asked_again_and_not_for_ever(
    model: Model, tmp_path: Path
) -> None:
    model.fail = [429, 503]
    assert len(answers(model, tmp_path).ask(questions(1))) == 1
    model.fail = [500] * 20
    with pytest.raises(SaekitError, match="did not answer, asked 5 times: status 500"):
        answers(model, tmp_path).ask(questions(3)[2:])


def test_a_key_is_not_sent_in_the_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)
    with pytest.raises(ConfigError, match="is not encrypted"):
        Endpoint(url="http://192.0.2.1/v1", model="m")
    with pytest.raises(ConfigError, match="is no address"):
        Endpoint(url="file:///etc/passwd", model="m")
    monkeypatch.delenv(KEY)
    Endpoint(url="http://192.0.2.1/v1", model="m")


def test_questions_hold_as_many_of_each_kind_and_their_answers() -> None:
    some = of([[0, 1, 8]] * 3 + [[0, 3, 8]] * 9, [[0, 1, 0]] * 3 + [[0, 0, 0]] * 9)
    rng = np.random.default_rng(0)
    detect = prompts.to_detect("cats", some, VOCAB, rng)
    assert detect is not None
    (_, user), true = detect
    texts = [json.loads(text) for text in re.findall(r'^\d+\. (".*")$', user["content"], re.M)]
    assert [" cat" in text for text in texts] == true.tolist()
    assert true.sum() == 3 and len(true) == 6
    fuzz = prompts.to_fuzz("cats", some, VOCAB, rng)
    assert fuzz is not None
    (_, user), true = fuzz
    texts = [json.loads(text) for text in re.findall(r'^\d+\. (".*")$', user["content"], re.M)]
    assert ["<< cat>>" in text for text in texts] == true.tolist()
    assert all(text.count("<<") == 1 for text in texts) and 0 < true.sum() < len(true)
    made = prompts.to_explain(some, VOCAB)
    assert made is not None and made[1]["content"].count("the<< cat>>x") == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("I think [0] so\n[1,0,0].", [True, False, False]),
        ("[1, 0]", None),
        ("yes", None),
        ("[1, 2, 3]", None),
    ],
)
def test_an_answer_is_the_list_asked_for_or_none(text: str, said: list[bool] | None) -> None:
    found = prompts.answers(text, 3)
    assert (None if found is None else found.tolist()) == said


def run_command(*arguments: str) -> int:
    return cli.main(["features", "explain", *arguments])


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def test_the_command_explains_by_rules_and_then_by_a_model(
    copy: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(str(copy), "--n-random", "40") == 0
    found = explanations.read(copy, checkpoint.fingerprint(load(copy)))
    assert len(found) > 50 and {one.by for one in found.values()} == {"rules"}
    scores = [one.detection for one in found.values() if one.detection is not None]
    assert np.mean(scores) > 0.6, "the tiny model's latents follow its few words"
    told = [str(copy), "--endpoint", model.url, "--model", "m", "--latents", "3", "7"]
    told += ["--n-random", "40", "--price-in", "1000000"]
    capsys.readouterr()
    assert run_command(*told) == 0
    said = capsys.readouterr().out
    assert "6 questions to m" in said and "by the prices given" in said
    assert "Nothing was sent" in said and not model.bodies
    assert run_command(*told, "--yes") == 0
    assert len(model.bodies) == 6
    first = explanations.read(copy)
    assert (first[3].text, first[3].by) == ("the word cat", "m")
    assert first[3].detection is not None and first[3].fuzzing is not None
    assert first[5].by == "rules", "those of other latents stay"
    model.server.shutdown()
    (copy / explanations.FILE).unlink()
    assert run_command(*told, "--replay") == 0
    replayed = explanations.read(copy)
    assert replayed == {3: first[3], 7: first[7]}
    assert run_command(*told[:-2], "--latents", "9", "--replay") == 1


def test_explanations_of_other_weights_are_refused(copy: Path) -> None:
    one = {3: explanations.Explanation("x", by="rules")}
    explanations.keep(copy, one, "a" * 64)
    assert explanations.read(copy, "a" * 64) == one
    with pytest.raises(SaekitError, match="explains weights aaaaaaaaaaaa"):
        explanations.read(copy, "b" * 64)
    two = {4: explanations.Explanation("y")}
    explanations.keep(copy, two, "b" * 64)
    assert explanations.read(copy, "b" * 64) == two
    (copy / explanations.FILE).write_text('{"explanations": {"5": "by hand"}}')
    assert explanations.read(copy, "b" * 64)[5].text == "by hand"
    (copy / explanations.FILE).write_text("[")
    with pytest.raises(SaekitError, match="cannot be read"):
        explanations.read(copy)
    with pytest.raises(SaekitError, match="cannot be read"):
        explanations.keep(copy, one, "a" * 64)


def test_an_endpoint_without_a_model_is_refused(copy: Path) -> None:
    assert run_command(str(copy), "--endpoint", "http://127.0.0.1:1/v1") == 2
    assert run_command(str(copy), "--replay") == 2
