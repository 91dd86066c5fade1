import math
from typing import Any

import pytest
import torch
from torch import Tensor

from saekit.conformance import Reported, check, rows_for
from saekit.evals import _conformance
from saekit.sae import SAE, Activation, JumpReLU, MatchingPursuit, ReLU, TopK

D_IN, D_SAE = 12, 40


def weights() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    rows = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=g))
    b_enc, b_dec = (torch.randn(n, generator=g) / 10 for n in (D_SAE, D_IN))
    return rows.T * 0.7, b_enc, rows * 1.3, b_dec


def trained(activation: Activation) -> SAE:
    W_enc, b_enc, W_dec, b_dec = weights()
    if isinstance(activation, MatchingPursuit):
        return SAE.of_atoms(torch.nn.functional.normalize(W_dec), b_dec, activation)
    return SAE(W_enc, b_enc, W_dec, b_dec, activation)


class Plain:
    """Another library's: nothing but two methods and what they need."""

    d_in = D_IN

    def __init__(self) -> None:
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = weights()

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.W_enc + self.b_enc).relu()

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.W_dec + self.b_dec


def failed(sae: Any, x: Tensor | None = None, **options: Any) -> set[str]:
    x = rows_for(D_IN, 60) if x is None else x
    return {one.name for one in check(sae, x, **options) if one.passed is False}


@pytest.mark.parametrize(
    "activation",
    [ReLU(), TopK(3), JumpReLU(torch.full((D_SAE,), 0.2)), MatchingPursuit(steps=4)],
    ids=lambda how: type(how).__name__,
)
def test_every_activation_of_ours_passes(activation: Activation) -> None:
    found = check(trained(activation), rows_for(D_IN))
    assert [one for one in found if one.passed is False] == []
    assert sum(one.passed is None for one in found) == 1  # x_hat's units: no activations were given
    assert len(found) > 15


def test_an_object_with_two_methods_passes() -> None:
    assert failed(Plain()) == set()

    class Bare:
        def encode(self, x: Tensor) -> Tensor:
            return Plain().encode(x)

        def decode(self, z: Tensor) -> Tensor:
            return Plain().decode(z)

    unseen = [one.name for one in check(Bare(), rows_for(D_IN)) if one.passed is None]
    assert unseen[:2] == ["W_dec is what each latent adds", "b_dec is what no latent gives"]


class BatchDependent(Plain):
    """As many as 3 latents a row on the mean: which ones, the batch decides."""

    def encode(self, x: Tensor) -> Tensor:
        z = super().encode(x)
        least = z.flatten().topk(3 * len(z)).values[-1]
        return z * (z >= least)


class Noisy(Plain):
    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x) * (1 + 0.1 * torch.rand(len(x), 1))


class KnowsPlaces(Plain):
    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x) * torch.arange(1, len(x) + 1)[:, None]


class WritesToX(Plain):
    def encode(self, x: Tensor) -> Tensor:
        x -= self.b_dec
        return super().encode(x)


class DividesByNorm(Plain):
    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x / x.norm(dim=1, keepdim=True))


class Remembers(Plain):
    """Scales by what was encoded last, as a layer norm does that is undone at decoding."""

    def encode(self, x: Tensor) -> Tensor:
        self.scale = float(x.norm())
        return super().encode(x / self.scale)

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z) * self.scale


class Soft(Plain):
    def encode(self, x: Tensor) -> Tensor:
        z: Tensor = torch.nn.functional.softplus(x @ self.W_enc + self.b_enc, beta=100) + 1e-9
        return z


class Silent(Plain):
    def encode(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), D_SAE)


class Rectified(Plain):
    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z).relu()


class Unfolded(Plain):
    """Latents in units of another length than the decoder's rows."""

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z / self.W_dec.norm(dim=1))


class Transposed(Plain):
    def decode(self, z: Tensor) -> Tensor:
        return z @ self.W_dec.T + self.b_dec

    def __init__(self) -> None:
        super().__init__()
        self.W_dec = self.W_dec.T


class OtherBias(Plain):
    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z) + 1


class Half(Plain):
    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z).half()


class Narrow(Plain):
    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z)[:, 1:]


class Flat(Plain):
    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x).flatten()

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z.view(-1, D_SAE))


class Raises(Plain):
    def encode(self, x: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nmore")


class RaisesOnOneRow(Plain):
    def encode(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            raise RuntimeError("expected more than 1 value")
        return super().encode(x)


BATCH = {"encode, in batches of 1", "encode, in batches of 7"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (BatchDependent, BATCH),
        (Noisy, {"encode, the same again", "encode, in another order", *BATCH}),
        (KnowsPlaces, {"encode, in another order", *BATCH}),
        (WritesToX, {"encode leaves x as it was"}),
        (DividesByNorm, {"finite, for a row of zeros and rows 1000 times as long, too"}),
        (
            Remembers,
            {
                *BATCH,
                "decode does not hang on what was encoded last",
                "decode, in batches of 7",
                "decode is linear in z, but for a constant",
                "W_dec is what each latent adds",
                "b_dec is what no latent gives",
            },
        ),
        (
            Soft,
            {"some latents fire and some do not", "latents that do not fire are exactly 0"},
        ),
        (Silent, {"some latents fire and some do not"}),
        (
            Rectified,
            {
                "decode is linear in z, but for a constant",
                "W_dec is what each latent adds",
                "b_dec is what no latent gives",
            },
        ),
        (Unfolded, {"W_dec is what each latent adds"}),
        (Transposed, {"W_dec is what each latent adds"}),
        (OtherBias, {"b_dec is what no latent gives"}),
        (Half, {"decode's shape and dtype"}),
        (Narrow, {"decode's shape and dtype"}),
        (Flat, {"encode's shape"}),
        (Raises, {"it encodes and decodes"}),
        (RaisesOnOneRow, {"no error while it is looked at"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_each_fault_fails_its_own_checks_and_no_others(
    kind: type[Plain], expected: set[str]
) -> None:
    assert failed(kind()) == expected


def test_an_error_of_the_object_is_what_was_found() -> None:
    (one,) = check(Raises(), rows_for(D_IN))
    assert one.found == "RuntimeError: mat1 and mat2 shapes cannot be multiplied"


def test_what_its_library_reports_is_compared() -> None:
    x = rows_for(D_IN, 50)
    sae = trained(TopK(3))
    z, x_hat = sae.encode(x), sae(x)
    ev = 1 - float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    l0 = float((z != 0).float().sum(1).mean())
    assert failed(sae, x, reported=Reported(l0=l0, ev=ev)) == set()
    assert failed(sae, x, reported=Reported(k=2, l0=l0 * 1.1, ev=ev + 0.02)) == {
        "L0 of every row",
        "mean L0, as reported",
        "ev, as reported",
    }
    # What a TopK says of itself needs no report.
    assert "at most 3" in [one.expected for one in check(sae, x)]


def test_reconstructions_must_be_in_the_units_of_activations_it_is_for() -> None:
    eye = torch.eye(D_IN)
    x = torch.randn(200, D_IN)
    good = SAE(
        torch.cat([eye, -eye], 1),
        torch.zeros(2 * D_IN),
        torch.cat([eye, -eye]) * 0.9,
        torch.zeros(D_IN),
        ReLU(),
    )
    assert failed(good, x, real=True) == set()
    for scale in (0.3, -1.0, 5.0):
        other = SAE(good.W_enc, good.b_enc, good.W_dec * scale, good.b_dec, ReLU())
        assert failed(other, x, real=True) == {"x_hat is in the units of x"}, scale
    (unseen,) = [one for one in check(good, x) if one.passed is None]
    assert unseen.name == "x_hat is in the units of x"


def test_rows_are_of_many_lengths_and_the_same_each_time() -> None:
    x = rows_for(5, 23)
    assert x.shape == (23, 5) and x.equal(rows_for(5, 23))
    lengths = {f"{length:.2g}" for length in x.norm(dim=1).tolist()}
    assert lengths == {"0.1", "1", "10", "1e+02", "1e+03"}


# saekit's own metrics.

_NAMES = (
    "mmcs_signed_features",
    "mmcs_signed_latents",
    "mcc_signed",
    "mcc_abs",
    "uniqueness_signed",
)


def test_our_metrics_give_the_answers_that_are_known() -> None:
    found = _conformance.checks()
    assert [one for one in found if not one.passed] == []
    assert len(found) > 50 and len({one.name for one in found}) == len(found)


@pytest.mark.parametrize(
    ("name", "planted", "fails"),
    [
        ("ce_recovered", lambda clean, sae, ablated: sae / clean, "ce_recovered_zero"),
        ("kl_divergence", lambda p, q: (p - q).abs().sum(1), "kl, (2, 1, 1) / 4 from"),
        ("cross_entropy", lambda p, at: p.exp()[:, at], "cross-entropy, of p = 1/4"),
        ("scores", lambda *_: dict.fromkeys(_NAMES, math.nan), "mmcs, signed, A in B"),
    ],
)
def test_a_metric_that_is_off_is_found(
    name: str, planted: Any, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_conformance, name, planted)
    assert [one for one in _conformance.checks() if not one.passed][0].name.startswith(fails)
