"""Any module of torch, its hook points the paths of the modules inside."""

import pytest
import torch
from torch import Tensor, nn

from saekit.activations_cache.model import wrap
from saekit.activations_cache.model_module import ModuleModel
from saekit.errors import ConfigError, ModelError


class Net(nn.Module):
    """A convolution, a layer that is used twice, one that is never used, and one in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.act = nn.ReLU(inplace=True)
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.count = nn.Flatten(0)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x))
        h = self.twice(self.twice(h))
        self.count(h)
        out: Tensor = self.last(h)
        return out


@pytest.fixture
def model() -> ModuleModel:
    return ModuleModel(Net(), "net", example={"x": torch.ones(2, 3)})


def test_rows_of_a_matrix_count_as_one_position_each(model: ModuleModel) -> None:
    x = torch.randn(5, 3)
    seen = model.capture({"x": x}, ["first", "last:input", "last"])
    assert {name: list(a.shape) for name, a in seen.items()} == {
        "first": [5, 1, 4],
        "last:input": [5, 1, 4],
        "last": [5, 1, 2],
    }
    assert seen["last"].squeeze(1).equal(model.model(x))


def test_positions_are_kept_where_there_are_some(model: ModuleModel) -> None:
    assert model.capture({"x": torch.randn(5, 7, 3)}, ["first"])["first"].shape == (5, 7, 4)


def test_an_activation_is_seen_before_a_module_changes_it_in_place(model: ModuleModel) -> None:
    x = torch.randn(5, 3)
    seen = model.capture({"x": x}, ["first", "last"])["first"]
    assert seen.squeeze(1).equal(model.model.first(x))
    assert (seen < 0).any(), "the ReLU behind works in place"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("twice", "hook point 'twice' runs more than once in a pass of 'net'"),
        ("twice:input", "hook point 'twice:input' runs more than once"),
        ("never", "no pass of 'net' reaches never"),
        ("count", r"'count' of 'net' gives \[20\] of torch.float32, not"),
        ("frist", "did you mean 'first'"),
    ],
)
def test_what_is_no_vector_for_each_row_is_refused(
    model: ModuleModel, name: str, told: str
) -> None:
    for names in ([name], [name, "last"]):
        with pytest.raises(ModelError, match=told):
            model.visit({"x": torch.ones(5, 3)}, names, lambda name, x: None)


def test_the_pass_stops_early_once_a_module_is_known_to_run_once(model: ModuleModel) -> None:
    reached = []
    model.model.last.register_forward_pre_hook(lambda *_: reached.append(1))
    for _ in range(3):
        model.capture({"x": torch.ones(5, 3)}, ["first"])
    assert len(reached) == 1


def test_widths_come_from_the_example(model: ModuleModel) -> None:
    assert model.widths() == {"first": 4, "act": 4, "last": 2}
    assert model.widths(["last", "last:input"]) == {"last": 2, "last:input": 4}
    with pytest.raises(ModelError, match="more than once"):
        model.widths(["twice"])
    with pytest.raises(ConfigError, match="give ModuleModel.*example="):
        ModuleModel(Net(), "net").widths()


def test_a_module_has_no_next_token_loss(model: ModuleModel) -> None:
    with pytest.raises(ConfigError, match="'net' predicts no next token"):
        model.capture_with_gradients({"x": torch.ones(2, 3)}, torch.ones(2, 1).bool(), ["first"])


def test_a_module_without_modules_inside_is_refused() -> None:
    with pytest.raises(ModelError, match="'line' has no modules inside"):
        ModuleModel(nn.Linear(1, 1), "line")


def test_wrapping_any_module_gives_a_module_model() -> None:
    net = Net()
    one, same, other = wrap(net, name="net"), wrap(net), wrap(Net())
    assert isinstance(one, ModuleModel)
    assert (one.name, same.name) == ("net", "in-memory")
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.tokenizer_fingerprint is None
    assert not net.training and not any(p.requires_grad for p in net.parameters())
