"""Which heads the latents of an attention SAE read, and which source tokens (Kissane et al. 2024,
arXiv 2406.17759).

For SAEs on `attn_z.L`, the heads' outputs side by side. Beside the numbers of `core` it gives

    head attribution  h[i, k] = |W_dec[i, block_k]| / sum_j |W_dec[i, block_j]|     (by weights)
    DFA[t, h, s] = A_h[t, s] (v_h[s] . W_enc[block_h, i])                           (by activations)

DFA, direct feature attribution, is taken of some latents where they are strongest, with the
patterns A and values v of the model's own pass. It sums to the pre-activation (for a matching
pursuit: that of the first step). It shows what the latent reads through the values, not why the
heads look there.

Ablating one attention layer changes the loss little, so `ce_recovered_zero` is fragile: read it
beside `ce_delta`, which stands in the same result.

Arrays: `head_attribution` [d_sae, head]; `head_latents` [head, 10], the latents with the largest
share of each head (-1: no more that fire); and of the entries (a latent in a context, strongest
first): `dfa_latent`, `dfa_row` (of the cache: the destination), `dfa_pre` and `dfa_bias` [entry],
`dfa_head` [entry, head] (summed over sources), `dfa_source` [entry, source] (summed over heads) and
`dfa_token` [entry, source] (-1 after the destination).

Axes: row, d, head, d_sae, entry, source.
"""

import logging
from collections import defaultdict
from dataclasses import dataclass, replace
from math import log as ln
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from numpy import ndarray
from torch import Tensor

from saekit import seeds
from saekit.activations_cache.model import LanguageModel
from saekit.activations_cache.store import ActivationCache, Window
from saekit.errors import ConfigError
from saekit.evals._attribution import Entries, Site, attribution, head_attribution, mixing, site
from saekit.evals._base import EvalConfig, Findings
from saekit.evals._splice import _compare_with_cache
from saekit.evals.core import Core, CoreConfig
from saekit.progress import bar
from saekit.results import Metric

log = logging.getLogger(__name__)

_HALF = 0.5
_TOP = 10
_RARE = (1e-5, 1e-6)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(CoreConfig):
    latents: tuple[int, ...] = ()
    """Latents to attribute to heads and source tokens. Where none is given, `n_latents` are drawn
    of those that fire."""

    n_latents: int = 30
    """Latents to draw. 0 leaves attribution by activations out."""

    n_contexts: int = 4
    """Contexts of each latent: where it is strongest, at most one in each window of the text."""

    seed: int = 0
    """Of all that is drawn: latents, and resamples of documents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_latents < 0:
            raise ConfigError(
                f"n_latents={self.n_latents} must not be negative; 0 leaves attribution out"
            )
        if self.n_contexts < 1:
            raise ConfigError(f"n_contexts={self.n_contexts} must be at least 1")


class Attention(Core):
    Config: ClassVar[type[EvalConfig]] = AttentionConfig
    cfg: AttentionConfig

    @classmethod
    def misfit(cls, cache: ActivationCache, hook: str) -> str | None:
        if hook.startswith("attn_z."):
            return None
        return f"{hook} does not hold the outputs of attention heads, as attn_z.L does"

    def run(self) -> Findings:
        model = self.load_model()
        where = site(model, self.hook)
        chosen = self._given()
        found = super().run()
        metrics, n = found.metrics, found.metrics["ev"].n
        fires = torch.from_numpy(found.arrays["density"]) > 0
        metrics |= _rare(found.arrays["density"], metrics, n)
        heads = head_attribution(self.sae.W_dec.cpu(), where.n_heads)
        arrays = found.arrays | {
            "head_attribution": heads.float().numpy(),
            "head_latents": _strongest_of_heads(heads, fires),
        }
        metrics |= _by_weights(heads[fires & (heads > 0).any(1)], metrics, n)
        if chosen is None:
            chosen = self._drawn(fires)
        if len(chosen):
            entries = self._entries(chosen)
            if len(entries.row):
                more, some = self._by_activations(model, where, entries, heads)
                metrics, arrays = metrics | more, arrays | some
            else:
                _leave_out(metrics, "dfa_...", f"none of the latents {chosen.tolist()} fires")
        return Findings(metrics=metrics, arrays=arrays)

    def _given(self) -> Int[Tensor, " latent"] | None:
        given = torch.tensor(sorted(set(self.cfg.latents)), dtype=torch.long)
        if len(given) and not 0 <= int(given.min()) <= int(given.max()) < self.sae.d_sae:
            raise ConfigError(
                f"latents={list(self.cfg.latents)} must lie in 0..{self.sae.d_sae - 1}: the SAE "
                f"has {self.sae.d_sae} latents"
            )
        return given if len(given) else None

    def _drawn(self, fires: Tensor) -> Int[Tensor, " latent"]:
        live = fires.nonzero().flatten()
        order = torch.randperm(len(live), generator=seeds.stream("attention", self.cfg.seed))
        return live[order[: self.cfg.n_latents]].sort().values

    def _entries(self, chosen: Int[Tensor, " latent"]) -> "Entries":
        """Where the chosen latents are strongest, among the rows that every number is over."""
        cfg, cache = self.cfg, self.cache
        wanted = torch.zeros(self.sae.d_sae, dtype=torch.bool)
        wanted[chosen] = True
        rows = torch.split(cache.indices(cfg.split, cfg.exclude)[: cfg.max_rows], cfg.batch_size)
        best = Entries.empty()
        for row, x in zip(rows, self.batches(), strict=True):
            code = self.sae.encode_sparse(x)
            values, indices = code.values.cpu(), code.indices.cpu()
            active = wanted[indices] & (values > 0)
            where = row[active.nonzero()[:, 0]]
            # The place in the window: a window lies in consecutive rows.
            start = where - cache.take("position", where).long()
            found = indices[active], start, where, values[active].double()
            best = best.joined(Entries(*(t.numpy() for t in found)), cfg.n_contexts)
        return best

    def _by_activations(
        self,
        model: LanguageModel,
        where: Site,
        entries: "Entries",
        heads: Float[Tensor, "d_sae head"],
    ) -> tuple[dict[str, Metric], dict[str, ndarray]]:
        """Attribution of the entries, a pass of the model for each window that they lie in."""
        longest = int((entries.row - entries.start).max()) + 1
        n = len(entries.row)
        by_head, by_source = np.zeros((n, where.n_heads)), np.zeros((n, longest))
        token = np.full((n, longest), -1, dtype=np.int32)
        pre = np.zeros(n)
        in_window = defaultdict(list)
        for entry, start in enumerate(entries.start.tolist()):
            in_window[start].append(entry)
        with bar("attribution", len(in_window), shown=self.progress) as shown:
            for start, some in in_window.items():
                # Attention is causal: nothing after the last destination matters.
                row = torch.from_numpy(entries.row[some])
                stop = int(row.max()) + 1
                window = self._window(start, stop, row)
                mixed = mixing(model, where, window.tokens)
                _compare_with_cache(mixed.z[window.keep].float(), [window], self.cache, self.hook)
                latent, at = torch.from_numpy(entries.latent[some]), row - start
                column = self.sae.W_enc.cpu()[:, latent]
                parts = attribution(mixed, column, at).numpy()
                by_head[some], by_source[some, : stop - start] = parts.sum(2), parts.sum(1)
                for entry, t in zip(some, at.tolist(), strict=True):
                    token[entry, : t + 1] = window.tokens[: t + 1]
                z = mixed.z[at].to(self.device, torch.float32)
                pre[some] = self.sae.pre(z).cpu().gather(1, latent[:, None])[:, 0].double()
                shown.advance(1)
        bias = self.sae.b_enc.cpu().double().numpy()[entries.latent]
        top_by_weights = heads.argmax(1).numpy()[entries.latent]
        arrays = {
            "dfa_latent": entries.latent,
            "dfa_row": entries.row,
            "dfa_pre": pre.astype(np.float32),
            "dfa_bias": bias.astype(np.float32),
            "dfa_head": by_head.astype(np.float32),
            "dfa_source": by_source.astype(np.float32),
            "dfa_token": token,
        }
        at = entries.row - entries.start
        return _shares(by_head, by_source, at, pre, bias, top_by_weights), arrays

    def _window(self, start: int, stop: int, row: Int[Tensor, " some"]) -> Window:
        """The beginning of a window, in which only the rows given are kept."""
        keep = torch.zeros(stop - start, dtype=torch.bool)
        keep[row - start] = True
        rows = torch.arange(start, stop)
        document = int(self.cache.take("document", rows[:1]))
        return Window(self.cache.take("token", rows).long(), document, start, keep)


EVAL = Attention


def _rare(density: ndarray, metrics: dict[str, Metric], n: int) -> dict[str, Metric]:
    """Shares of latents below the densities that the paper counts, where n rows can tell."""
    found = {}
    for bound in _RARE:
        name = f"below_{bound:.0e}_share".replace("e-0", "e-")
        if n * bound >= 1:
            found[name] = Metric(
                value=float((density < bound).mean()),
                definition=f"share of latents, dead ones too, that fire on less than {bound:g} of "
                "the rows",
                n=n,
            )
        else:
            reason = f"{n} rows cannot tell densities below {bound:g} from 0"
            _leave_out(metrics, name, reason, level=logging.INFO)
    return found


def _by_weights(
    heads: Float[Tensor, "latent head"], metrics: dict[str, Metric], n_rows: int
) -> dict[str, Metric]:
    """Summaries of h[i, k] over the latents that fire."""
    n, n_heads = heads.shape
    if n == 0:
        _leave_out(metrics, "single_head_share", "no latent fires that has a decoder row")
        return {}
    top = heads.max(1).values
    over = f"over the latents that fire on any of the {n_rows} rows"
    share = "h[i, k] = |W_dec[i, head k]| / sum_j |W_dec[i, head j]|"
    entropy = -torch.special.xlogy(heads, heads).sum(1)
    return {
        "single_head_share": Metric(
            value=float((top > _HALF).double().mean()),
            definition=f"share of latents with max_k h[i, k] > {_HALF}, where {share}, norms not "
            f"squared; {over}; {n_heads} heads, and 1/{n_heads} each is where all are alike",
            n=n,
        ),
        "top_head_mean": Metric(
            value=float(top.mean()),
            definition=f"mean of max_k h[i, k], where {share}; {over}; 1: each latent in one head, "
            f"1/{n_heads}: all {n_heads} heads alike",
            n=n,
        ),
        "head_entropy_mean": Metric(
            value=float(entropy.mean()),
            definition=f"mean of -sum_k h[i, k] ln h[i, k], nats, where {share}; {over}; 0: each "
            f"latent in one head, ln {n_heads} = {ln(n_heads):.4g}: all heads alike",
            n=n,
        ),
    }


def _strongest_of_heads(
    heads: Float[Tensor, "d_sae head"], fires: Tensor
) -> Int64[ndarray, "head _"]:
    """For each head the latents that fire and have the largest share of it; -1 for no more."""
    latent = fires.nonzero().flatten()
    order = heads[latent].argsort(dim=0, descending=True, stable=True)[:_TOP]
    found = torch.full((heads.shape[1], _TOP), -1)
    found[:, : len(order)] = latent[order].T
    return found.numpy()


def _shares(
    by_head: Float64[ndarray, "entry head"],
    by_source: Float64[ndarray, "entry source"],
    at: Int64[ndarray, " entry"],
    pre: Float64[ndarray, " entry"],
    bias: Float64[ndarray, " entry"],
    top_by_weights: Int64[ndarray, " entry"],
) -> dict[str, Metric]:
    """Summaries of DFA over all entries; every ratio is one of sums over them."""
    n = len(pre)
    entry = np.arange(n)
    of_heads, of_sources = np.abs(by_head), np.abs(by_source)
    heads, sources = of_heads.sum(), of_sources.sum()
    over = "over all entries, a latent where it is strongest"
    apart = np.abs(by_head.sum(1) + bias - pre).sum()
    ratios = {
        "dfa_residual": (
            apart,
            np.abs(pre).sum(),
            "sum |sum_hs DFA[t, h, s] + b_enc - pre| / sum |pre|; 0: attribution is exact, as it "
            "must be but for rounding",
        ),
        "dfa_top_head_share": (
            of_heads.max(1).sum(),
            heads,
            "sum max_h |DFA_h| / sum sum_h |DFA_h|, DFA_h = sum_s DFA[t, h, s]; 1: each entry "
            f"comes through one head, 1/{by_head.shape[1]}: through all alike",
        ),
        "dfa_self_share": (
            of_sources[entry, at].sum(),
            sources,
            "sum |DFA_t| / sum sum_s |DFA_s|, DFA_s = sum_h DFA[t, h, s]: what comes from the "
            "destination's own position",
        ),
        "dfa_first_share": (
            of_sources[at > 0, 0].sum(),
            sources,
            "sum |DFA_0| / sum sum_s |DFA_s|, DFA_s = sum_h DFA[t, h, s]: what comes from the "
            "window's first position, where attention rests (0 for a destination there)",
        ),
    }
    metrics = {
        "dfa_head_agreement": Metric(
            value=float((of_heads.argmax(1) == top_by_weights).mean()),
            definition="share of entries whose head with the largest |sum_s DFA[t, h, s]| is the "
            "head with the largest h[i, k]",
            n=n,
        )
    }
    for name, (part, whole, equation) in ratios.items():
        if whole > 0:
            value = float(part / whole)
            metrics[name] = Metric(value=value, definition=f"{equation}; {over}", n=n)
        else:
            _leave_out(metrics, name, "it divides by 0", near="dfa_head_agreement")
    return metrics


def _leave_out(
    metrics: dict[str, Metric],
    name: str,
    reason: str,
    near: str = "dead_share",
    level: int = logging.WARNING,
) -> None:
    """Say why a number is not there, in the log and at the metric that it rests on."""
    log.log(level, "%s is left out: %s", name, reason)
    beside = metrics[near]
    metrics[near] = replace(beside, definition=f"{beside.definition}. No {name}: {reason}")
