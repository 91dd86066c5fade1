"""Which heads and which source tokens a latent of an attention SAE reads (Kissane et al. 2024,
arXiv 2406.17759).

An SAE at `attn_z.L` reads the heads' outputs side by side, z[t] = concat_h sum_s A_h[t, s] v_h[s].
That is linear in the values once the patterns A are given, so a latent's pre-activation is a sum
over heads and source tokens. Patterns and values are those that the model itself computed in a
pass, so grouped queries, biases of the values, soft caps, windows and sinks need no care of their
own; and no attribution is given out unless they mix to the z of the same pass.

Axes: d (= head x d_head, heads side by side), head, kv (heads of the values, each read by
head / kv heads), pos, source (a position that is looked at), entry (a latent at a destination).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from numpy import ndarray
from torch import Tensor

from saekit.activations_cache.hooks import INPUT
from saekit.activations_cache.model import LanguageModel
from saekit.errors import ConfigError, ModelError

_Values = Callable[[Float[Tensor, "pos _"], int, int], Float[Tensor, "pos kv d_head"]]

VALUES: dict[str, _Values] = {
    "v_proj": lambda x, n_heads, d_head: x.view(len(x), -1, d_head),
    "c_attn": lambda x, n_heads, d_head: x[:, -n_heads * d_head :].view(len(x), -1, d_head),
    "qkv_proj": lambda x, n_heads, d_head: (
        x[:, n_heads * d_head :].chunk(2, 1)[1].reshape(len(x), -1, d_head)
    ),
    "query_key_value": lambda x, n_heads, d_head: x.view(len(x), n_heads, 3, d_head)[:, :, 2],
}
"""Modules that put out an attention's values, by their name inside it, and where in what they put
out the values stand, given the number of heads and d_head."""

_TOLERANCE = 1e-4
"""How far patterns times values may be from z, in units of its length, beside what rounding in the
model's dtype explains."""


@dataclass(frozen=True)
class Site:
    """Where in a model an attention SAE reads."""

    hook: str
    layer: int
    attention: str
    """Path of the attention module."""
    values: str
    """Path of the module that puts out the values."""
    n_heads: int
    d_head: int


@dataclass(frozen=True, eq=False)
class Mixing:
    """What an attention layer did in one window."""

    pattern: Float[Tensor, "head pos source"]
    """Rows are destinations. With a sink a row sums to less than 1."""
    value: Float[Tensor, "kv source d_head"]
    z: Float[Tensor, "pos d"]
    """The heads' outputs, side by side."""


@dataclass(frozen=True, eq=False)
class Entries:
    """Latents where they are strongest, by latent and from the strongest down."""

    latent: Int64[ndarray, " entry"]
    start: Int64[ndarray, " entry"]
    """Row of the cache where the window begins."""
    row: Int64[ndarray, " entry"]
    value: Float64[ndarray, " entry"]

    @classmethod
    def empty(cls) -> "Entries":
        none = np.zeros(0, np.int64)
        return cls(none, none, none, np.zeros(0))

    def joined(self, other: "Entries", n: int) -> "Entries":
        """The n strongest of each latent, at most one of a window; of equals, the first rows."""
        latent, start, row, value = (
            np.concatenate([getattr(self, name), getattr(other, name)])
            for name in ("latent", "start", "row", "value")
        )
        order = np.lexsort((row, -value, start, latent))
        pairs = np.stack([latent, start], axis=1)[order]
        _, first = np.unique(pairs, axis=0, return_index=True)
        best = order[first]
        best = best[np.lexsort((row[best], -value[best], latent[best]))]
        rank = np.arange(len(best)) - np.searchsorted(latent[best], latent[best])
        best = best[rank < n]
        return Entries(latent[best], start[best], row[best], value[best])


def head_attribution(W_dec: Float[Tensor, "d_sae d"], n_heads: int) -> Float[Tensor, "d_sae head"]:
    """h[i, k] = |W_dec[i, block_k]| / sum_j |W_dec[i, block_j]|: the share of each head in a
    latent's decoder row. Norms are not squared; rows sum to 1, but that of a latent whose decoder
    row is 0 is 0.

    It depends on how long each head's outputs are: a head with long ones has a large share.
    """
    norms: Tensor = W_dec.double().unflatten(1, (n_heads, -1)).norm(dim=2)
    total = norms.sum(1, keepdim=True)
    return norms / total.where(total > 0, 1)


def site(model: LanguageModel, hook: str) -> Site:
    """Heads and modules behind a hook point `attn_z.L`.

    Raises ConfigError for another hook point, and ModelError where it is not known which module
    puts out the values.
    """
    kind, _, layer = hook.partition(".")
    if kind != "attn_z" or hook not in model.points:
        raise ConfigError(
            f"hook '{hook}' of '{model.name}' does not hold the outputs of attention heads, which "
            "are what is attributed: give an SAE that was trained on attn_z.L"
        )
    if not model.causal:
        raise ModelError(
            f"'{model.name}' is an encoder, and attribution to heads is there for decoders alone: "
            "give an SAE of a causal language model"
        )
    attention = model.points[hook].path.removesuffix(INPUT).rpartition(".")[0]
    parts = dict(model.model.get_submodule(attention).named_children())
    found = [name for name in VALUES if name in parts]
    if len(found) != 1:
        raise ModelError(
            f"'{attention}' of '{model.name}' has the modules {', '.join(parts)}, and just one of "
            f"{', '.join(VALUES)} is asked for, which gives the values: its attention is not known"
        )
    n_heads = int(model.config.num_attention_heads)
    width = model.widths([hook])[hook]
    return Site(hook, int(layer), attention, f"{attention}.{found[0]}", n_heads, width // n_heads)


@torch.no_grad()
def mixing(model: LanguageModel, where: Site, tokens: Int[Tensor, " pos"]) -> Mixing:
    """Patterns, values and outputs of one pass over a window, on the CPU in fp64.

    Raises ModelError where the model does not give its patterns, and where patterns and values do
    not mix to the outputs, so that any attribution would be wrong.
    """
    patterns: list[Tensor | None] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        patterns.append(output[1] if isinstance(output, tuple) and len(output) > 1 else None)

    handle = model.model.get_submodule(where.attention).register_forward_hook(keep)
    # The pass stops at the last of these, which comes after the patterns.
    names = (where.values, where.hook, f"resid_post.{where.layer}")
    try:
        with _eager(model.model):
            seen = model.capture(model.inputs(tokens[None]), names)
    finally:
        handle.remove()
    pattern = patterns[-1]
    if pattern is None:
        raise ModelError(
            f"'{where.attention}' of '{model.name}' does not give its attention pattern, which "
            "attribution to source tokens needs: leave it out with n_latents=0"
        )
    split = VALUES[where.values.rpartition(".")[2]]
    value = split(seen[where.values][0], where.n_heads, where.d_head).transpose(0, 1)
    z = seen[where.hook][0]
    epsilon = torch.finfo(z.dtype).eps
    mixed = Mixing(pattern[0].cpu().double(), value.cpu().double(), z.cpu().double())
    _check(mixed, where, model.name, _TOLERANCE + 4 * epsilon)
    return mixed


def attribution(
    mixed: Mixing, W_enc: Float[Tensor, "d entry"], destination: Int[Tensor, " entry"]
) -> Float[Tensor, "entry head source"]:
    """Direct feature attribution, DFA[e, h, s] = A_h[t_e, s] (v_h[s] . W_enc[block_h, e]), in fp64.

    `W_enc` holds one encoder column for each entry. Summed over heads and sources and with the
    latent's b_enc added it is the pre-activation, exactly but for rounding. Only the way through
    the values is seen: what made a head look there is not.
    """
    n_heads = len(mixed.pattern)
    value = mixed.value.repeat_interleave(n_heads // len(mixed.value), dim=0)
    blocks = W_enc.double().unflatten(0, (n_heads, -1))
    reads = torch.einsum("hsd,hde->ehs", value, blocks)
    return mixed.pattern[:, destination].transpose(0, 1) * reads


def _check(mixed: Mixing, where: Site, name: str, allowed: float) -> None:
    """Refuse patterns and values that do not mix to z."""
    n_heads = len(mixed.pattern)
    if mixed.value.shape[2] == where.d_head and n_heads % len(mixed.value) == 0:
        value = mixed.value.repeat_interleave(n_heads // len(mixed.value), dim=0)
        z = (mixed.pattern @ value).transpose(0, 1).flatten(1)
        apart, length = float((z - mixed.z).norm()), float(mixed.z.norm())
        if apart <= allowed * length:
            return
        how = f"differ from them by {apart / max(length, 1e-30):.2g} of their length"
    else:
        how = f"are of {len(mixed.value)} heads for {n_heads} patterns"
    raise ModelError(
        f"the outputs at '{where.hook}' of '{name}' should be its attention patterns times the "
        f"values that '{where.values}' gives, but these {how}: this attention does more than mix "
        "them, and there is no attribution for it. Leave it out with n_latents=0"
    )


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """While open, attention is computed step by step: other ways do not give their patterns."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
