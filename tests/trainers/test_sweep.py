import pytest

from saekit.errors import ConfigError
from saekit.trainers._sweep import expand
from saekit.trainers.topk import TopKConfig


def test_lists_stand_for_every_combination_and_name_the_runs() -> None:
    table = {
        "n_tokens": 1_000,
        "run": [
            {"kind": "topk", "k": [2, 4], "seed": [0, 1]},
            {"kind": "topk", "name": "wide", "d_sae": 512, "hook": ["mlp_out.0", "mlp_out.1"]},
        ],
    }
    runs = expand(table)
    assert [run.name for run in runs] == [
        "topk-k2-seed0",
        "topk-k2-seed1",
        "topk-k4-seed0",
        "topk-k4-seed1",
        "wide-hookmlp_out.0",
        "wide-hookmlp_out.1",
    ]
    assert runs[1].config == TopKConfig(n_tokens=1_000, k=2, seed=1)
    assert runs[-1].hook == "mlp_out.1" and runs[0].hook is None
    assert runs[-1].config == TopKConfig(n_tokens=1_000, d_sae=512)


def test_a_value_that_is_a_list_itself_is_one_value() -> None:
    (run,) = expand({"run": [{"kind": "topk", "exclude": ["special", "bos"]}]})
    assert run.config.exclude == ("special", "bos") and run.name == "topk"


def test_a_list_of_kinds_is_named_by_kind() -> None:
    runs = expand({"k": 4, "run": [{"kind": ["topk", "batch_topk"], "name": "a", "seed": [1]}]})
    assert [run.name for run in runs] == ["a-topk-seed1", "a-batch_topk-seed1"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, r"needs one \[\[run\]\] table"),
        ({"run": [{"k": 2}]}, "needs its kind"),
        ({"run": [{"kind": "topq"}]}, "did you mean 'topk'"),
        ({"run": [{"kind": "topk", "kk": 2}]}, "has no key 'kk'"),
        ({"run": [{"kind": "topk"}, {"kind": "topk", "k": 3}]}, "two runs .* called 'topk'"),
    ],
)
def test_a_sweep_that_cannot_be_meant_is_refused(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(table)
