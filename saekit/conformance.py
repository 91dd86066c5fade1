"""Whether something that encodes and decodes behaves as evaluations take for granted.

Any object will do that has these two methods, of whatever library, under no other base class:

    encode(x [row, d_in]) -> z [row, d_sae]        decode(z [row, d_sae]) -> x_hat [row, d_in]

with torch tensors on the CPU, in float32. What a check finds may hang on the rows that it is tried
on: give activations that the SAE was trained for where there are any. Axes: row, d_in, d_sae.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.errors import first_line
from saekit.sae import SAE, MatchingPursuit, TopK
from saekit.seeds import stream

CLOSE = 1e-4
"""Relative difference that fp32 may leave between two ways to the same number."""
FEW = 0.01
"""Share of the rows that may differ all the same: where a latent lies at its threshold, or two at
rank k, rounding decides whether it fires."""
TINY = 1e-6
"""Share of a row's largest latent below which a value is what should have been 0."""


@runtime_checkable
class Autoencoder(Protocol):
    """What can be checked."""

    def encode(self, x: Tensor, /) -> Tensor: ...

    def decode(self, z: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    expected: str
    found: str
    passed: bool | None
    """None where it could not be looked at."""


@dataclass(frozen=True, kw_only=True)
class Reported:
    """What the SAE's own library says of it, on the same rows."""

    k: int | None = None
    """Latents that a row has at most."""
    l0: float | None = None
    """Mean over rows of the latents != 0, to 5 %."""
    ev: float | None = None
    """Explained variance about the mean, 1 - sum|x - x_hat|^2 / sum|x - mu|^2, to 0.01."""


def rows_for(d_in: int, n: int = 256) -> Float[Tensor, "{n} {d_in}"]:
    """Gaussian rows with norms from about 0.1 to 1000, for an SAE that no activations are given
    for: nobody knows how long the ones are that it was trained on."""
    x = torch.randn(n, d_in, generator=stream("conformance", d_in))
    scale = torch.logspace(-1, 3, 5).repeat(n // 5 + 1)[:n, None]
    return torch.nn.functional.normalize(x) * scale


@torch.no_grad()
def check(
    sae: Autoencoder,
    x: Float[Tensor, "row d_in"],
    *,
    reported: Reported | None = None,
    real: bool = False,
) -> list[Check]:
    """Everything that can be looked at. `real` says that x are activations that the SAE is for, so
    that its reconstructions should be near."""
    try:
        z = sae.encode(x.clone())
        x_hat = sae.decode(z.clone())
    except Exception as error:
        found = f"{type(error).__name__}: {first_line(error)}"
        return [Check("it encodes and decodes", "no error", found, False)]
    shapes = _shapes(x, z, x_hat)
    if not all(one.passed for one in shapes):
        return shapes
    parts: list[Callable[[], Iterable[Check]]] = [
        lambda: _numbers(sae, x),
        lambda: _firing(z),
        lambda: _repeats(sae, x, z),
        lambda: _decoding(sae, x, z, x_hat),
        lambda: _scaling(sae, z),
        lambda: _quality(x, z, x_hat, _claims(sae, reported or Reported()), real),
        lambda: _sparse(sae, x, z) if isinstance(sae, SAE) else [],
    ]
    return shapes + [one for part in parts for one in _tried(part)]


def _tried(part: Callable[[], Iterable[Check]]) -> list[Check]:
    """What a part finds; an error of the object's is a finding, too."""
    found: list[Check] = []
    try:
        for one in part():
            found.append(one)
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        after = f"after '{found[-1].name}'" if found else "while it is looked at"
        found.append(Check(f"no error {after}", "no error", what, False))
    return found


def _shapes(x: Tensor, z: Tensor, x_hat: Tensor) -> list[Check]:
    n, d_in = x.shape
    fits = z.ndim == 2 and len(z) == n and z.is_floating_point()
    want = (n, d_in), x.dtype
    return [
        Check("encode's shape", f"[{n}, d_sae], floating", _kind(z), fits),
        Check(
            "decode's shape and dtype",
            f"[{n}, {d_in}] {x.dtype}",
            _kind(x_hat),
            (tuple(x_hat.shape), x_hat.dtype) == want,
        ),
    ]


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def _numbers(sae: Autoencoder, x: Tensor) -> Iterable[Check]:
    wide = torch.cat([x, torch.zeros_like(x[:1]), 1e3 * x[:8]])
    z = sae.encode(wide.clone())
    bad = int((~torch.cat([z, sae.decode(z)], 1).isfinite()).sum())
    yield Check(
        "finite, for a row of zeros and rows 1000 times as long, too",
        "no NaN, no infinity",
        f"{bad} entries that are not finite",
        bad == 0,
    )
    kept = x.clone()
    sae.encode(kept)
    same = kept.equal(x)
    found = "unchanged" if same else "x was written to"
    yield Check("encode leaves x as it was", "unchanged", found, same)


def _firing(z: Tensor) -> Iterable[Check]:
    fires = z != 0
    count = int(fires.sum())
    yield Check(
        "some latents fire and some do not",
        "0 < mean L0 < d_sae",
        f"{count / len(z):.4g} of {z.shape[1]}{'' if count else ': give rows that it is for'}",
        0 < count < z.numel(),
    )
    top = z.abs().amax(1, keepdim=True)
    small = int((fires & (z.abs() < TINY * top)).sum())
    yield Check(
        "latents that do not fire are exactly 0",
        f"hardly any with |z| < {TINY:g} of the row's largest",
        f"{small} of {count}",
        small <= 1e-4 * max(count, 1),
    )


def _repeats(sae: Autoencoder, x: Tensor, z: Tensor) -> Iterable[Check]:
    """Whether a row's latents hang on anything but the row."""
    order = torch.randperm(len(x), generator=stream("conformance", 0))
    back = order.argsort()
    others = {
        "the same again": sae.encode(x.clone()),
        "in another order": sae.encode(x[order])[back],
        "in batches of 1": torch.cat([sae.encode(row.clone()) for row in x.split(1)]),
        "in batches of 7": torch.cat([sae.encode(rows.clone()) for rows in x.split(7)]),
    }
    for how, other in others.items():
        yield _rows_differ(f"encode, {how}", other, z)


def _rows_differ(name: str, a: Tensor, b: Tensor) -> Check:
    if a.shape != b.shape:
        return Check(name, f"shape {list(b.shape)}", f"shape {list(a.shape)}", False)
    largest = torch.maximum(a.abs().amax(1), b.abs().amax(1))
    n = int(((a - b).abs().amax(1) > CLOSE * largest).sum())
    most = int(FEW * len(a))
    return Check(name, f"at most {most} of {len(a)} rows differ", f"{n} differ", n <= most)


def _decoding(sae: Autoencoder, x: Tensor, z: Tensor, x_hat: Tensor) -> Iterable[Check]:
    sae.encode(3 * x.flip(0))
    yield _rows_differ(
        "decode does not hang on what was encoded last", sae.decode(z.clone()), x_hat
    )
    yield _rows_differ(
        "decode, in batches of 7",
        torch.cat([sae.decode(rows.clone()) for rows in z.split(7)]),
        x_hat,
    )
    zero = sae.decode(torch.zeros_like(z))
    other = z.roll(1, 0)
    mixed = sae.decode(0.5 * z + 2 * other) - zero
    sum_of = 0.5 * (x_hat - zero) + 2 * (sae.decode(other) - zero)
    apart = float((mixed - sum_of).norm() / sum_of.norm().clamp_min(1e-30))
    yield Check(
        "decode is linear in z, but for a constant",
        f"off by < {CLOSE:g}",
        f"{apart:.2g}",
        apart < CLOSE,
    )


def _scaling(sae: Autoencoder, z: Tensor) -> Iterable[Check]:
    """Latents are in units of the decoder's rows: what scales either is folded into both."""
    zero = sae.decode(torch.zeros_like(z[:1]))
    W_dec, b_dec = (getattr(sae, name, None) for name in ("W_dec", "b_dec"))
    name = "W_dec is what each latent adds"
    expected = "decode(one latent at 1) - decode(0) is its row of W_dec"
    if not isinstance(W_dec, Tensor):
        yield Check(name, expected, "it has no W_dec", None)
    elif tuple(W_dec.shape) != (z.shape[1], zero.shape[1]):
        yield Check(name, expected, f"W_dec is {list(W_dec.shape)}, not [d_sae, d_in]", False)
    else:
        some = torch.linspace(0, z.shape[1] - 1, min(64, z.shape[1])).long()
        added = sae.decode(torch.eye(z.shape[1], dtype=z.dtype)[some]) - zero
        ratio = added.norm(dim=1) / W_dec[some].norm(dim=1).clamp_min(1e-30)
        apart = (added - W_dec[some]).norm() / W_dec[some].norm().clamp_min(1e-30)
        yield Check(
            name,
            expected,
            f"{float(ratio.median()):.4g} times as long, off by {float(apart):.2g}",
            # The constant is taken off again, which costs digits where it is long.
            bool(apart < CLOSE * (1 + zero.norm() / W_dec[some].norm(dim=1).mean())),
        )
    name, expected = "b_dec is what no latent gives", "decode(0) is b_dec"
    if not isinstance(b_dec, Tensor) or b_dec.shape != zero.shape[1:]:
        yield Check(name, expected, "it has no b_dec [d_in]", None)
    else:
        off = float((zero[0] - b_dec).norm())
        yield Check(name, expected, f"{off:.2g} away", off <= CLOSE * max(float(b_dec.norm()), 1))


def _claims(sae: Autoencoder, reported: Reported) -> Reported:
    """What is reported, and for a saekit SAE what its activation says of itself."""
    how = sae.activation if isinstance(sae, SAE) else None
    if reported.k is not None or not isinstance(how, TopK | MatchingPursuit):
        return reported
    return replace(reported, k=how.k if isinstance(how, TopK) else how.steps)


def _quality(
    x: Tensor, z: Tensor, x_hat: Tensor, reported: Reported, real: bool
) -> Iterable[Check]:
    count = (z != 0).sum(1)
    if reported.k is not None:
        most = int(count.max())
        yield Check("L0 of every row", f"at most {reported.k}", str(most), most <= reported.k)
    if reported.l0 is not None:
        l0 = float(count.double().mean())
        near = abs(l0 - reported.l0) <= 0.05 * reported.l0
        yield Check("mean L0, as reported", f"{reported.l0:g} to 5 %", f"{l0:.4g}", near)
    a, b = x.double(), x_hat.double()
    ev = 1 - float((a - b).square().sum() / (a - a.mean(0)).square().sum().clamp_min(1e-300))
    if reported.ev is not None:
        near = abs(ev - reported.ev) <= 0.01
        yield Check("ev, as reported", f"{reported.ev:g} to 0.01", f"{ev:.4g}", near)
    name, expected = "x_hat is in the units of x", "ev > 0, and gain from 0.5 to 2"
    if not real:
        yield Check(name, expected, "not looked at: give activations it is for", None)
        return
    gain = float((a * b).sum() / b.square().sum().clamp_min(1e-300))
    found = f"ev {ev:.4g}, gain sum(x . x_hat) / sum|x_hat|^2 = {gain:.4g}"
    yield Check(name, expected, found, ev > 0 and 0.5 <= gain <= 2)


def _sparse(sae: SAE, x: Tensor, z: Tensor) -> Iterable[Check]:
    code = sae.encode_sparse(x)
    yield _rows_differ("sparse codes are the dense ones", code.dense(sae.d_sae), z)
    yield _rows_differ("decode of sparse codes", sae.decode(code), sae.decode(z))
