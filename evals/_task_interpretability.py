"""Which latents tell of which attribute of the indirect-object task, by F1 on prompts that their
predicates were not chosen on.

Families of predicates: who the IO is, who the S is, which order; and who the IO or the S is in
prompts of one order. A latent is read at each place of the prompt apart: "fires where the IO stands
in prompts whose IO is Mary". Of each group of families the place and the union that tell best on
the prompts of the fit are taken.

Axes: row (prompts), place, latent, sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.evals._indirect_object_prompts import ORDERS, Prompts
from saekit.evals._predicates import (
    Choice,
    Family,
    Firings,
    Thresholds,
    best_thresholds,
    choose,
    resampled_f1,
)
from saekit.evals._task_scores import Table
from saekit.sae import SparseCode

TOLD = (0.8, 0.5)
"""F1 from which latents are counted."""

GROUPS: dict[str, tuple[str, ...]] = {
    "io": ("io", "io_abb", "io_bab"),
    "s": ("s", "s_abb", "s_bab"),
    "pos": ("pos",),
}


def families(prompts: Prompts, union: int) -> list[Family]:
    """Unions are of a quarter of the names at most: one that always holds tells nothing."""
    n = len(prompts.names)
    most = max(1, min(union, n // 4))
    found = [Family("pos", prompts.order, len(ORDERS))]
    for name, value in (("io", prompts.io), ("s", prompts.subject)):
        found.append(Family(name, value, n, most))
        for i, order in enumerate(ORDERS):
            here = value.where(prompts.order == i, -1)
            found.append(Family(f"{name}_{order.lower()}", here, n, most))
    return found


@dataclass(frozen=True, eq=False)
class Sight:
    """What latents do on some prompts, and what the prompts are."""

    firings: tuple[Firings, ...]
    """By place."""
    families: list[Family]

    @classmethod
    def of(cls, codes: Sequence[SparseCode], d_sae: int, families: list[Family]) -> "Sight":
        return cls(tuple(Firings.of(code, d_sae) for code in codes), families)


@dataclass(frozen=True)
class Predicates:
    """The best predicate of each latent in each family, at each place, on the prompts of a fit."""

    fit: Sight

    @cached_property
    def alive(self) -> list[Int[Tensor, " latent"]]:
        """Latents that fire, by place."""
        return [firings.count.nonzero()[:, 0] for firings in self.fit.firings]

    @cached_property
    def choices(self) -> list[list[Choice]]:
        """By place and family."""
        return [
            [choose(firings.with_values(f, latents), f.most) for f in self.fit.families]
            for firings, latents in zip(self.fit.firings, self.alive, strict=True)
        ]

    @cached_property
    def thresholds(self) -> list[Thresholds]:
        """By place."""
        return [
            best_thresholds(firings, self.fit.families, latents)
            for firings, latents in zip(self.fit.firings, self.alive, strict=True)
        ]

    def fit_f1(self, group: Sequence[str]) -> Float[Tensor, "place d_sae"]:
        """The best F1 in the families of the group, on the fit's prompts; 0 for a silent latent."""
        table = torch.zeros(len(self.fit.firings), self.fit.firings[0].d_sae).double()
        for place, (latents, choices) in enumerate(zip(self.alive, self.choices, strict=True)):
            for family, choice in zip(self.fit.families, choices, strict=True):
                if family.name in group:
                    table[place, latents] = torch.maximum(table[place, latents], choice.f1)
        return table

    def held_out_f1(
        self, group: Sequence[str], other: Sight, weights: Float[Tensor, "sample row"]
    ) -> Float[Tensor, "latent sample"]:
        """F1 on other prompts of the place and predicate that were best on the fit's, for every
        latent that fires there, by rising number."""
        best = self.fit_f1(group)
        top, place_of = best.max(0)
        found = []
        for place, (latents, choices) in enumerate(zip(self.alive, self.choices, strict=True)):
            left = (place_of[latents] == place) & (top[latents] > 0)
            for i, (family, choice) in enumerate(zip(self.fit.families, choices, strict=True)):
                if family.name not in group:
                    continue
                mine = left & (choice.f1 == top[latents])
                left &= ~mine
                f1 = resampled_f1(
                    other.firings[place],
                    other.families[i],
                    latents[mine],
                    choice.union[mine],
                    weights,
                )
                found.append((latents[mine], f1))
        return _by_latent(found)

    def held_out_f1_of_thresholds(
        self, other: Sight, weights: Float[Tensor, "sample row"]
    ) -> Float[Tensor, "latent sample"]:
        """The same, of the single value of any family and the threshold that were best."""
        top = torch.zeros(len(self.alive), self.fit.firings[0].d_sae).double()
        for place, (latents, chosen) in enumerate(zip(self.alive, self.thresholds, strict=True)):
            top[place, latents] = chosen.f1
        place_of = top.argmax(0)
        found = []
        for place, (latents, chosen) in enumerate(zip(self.alive, self.thresholds, strict=True)):
            firings = other.firings[place].above(latents, chosen.threshold)
            for i, family in enumerate(other.families):
                mine = (place_of[latents] == place) & (chosen.family == i)
                union = chosen.value[mine, None] == torch.arange(family.size)
                f1 = resampled_f1(firings, family, latents[mine], union, weights)
                found.append((latents[mine], f1))
        return _by_latent(found)


def count_told(
    table: Table,
    who: str,
    predicates: Predicates,
    sight: Sight,
    weights: Float[Tensor, "sample row"],
) -> Float[Tensor, "latent sample"]:
    """How many latents tell of each attribute, and of any; returns the F1 for the latter."""
    any_f1 = predicates.held_out_f1(sum(GROUPS.values(), ()), sight, weights)
    by_group = {name: predicates.held_out_f1(of, sight, weights) for name, of in GROUPS.items()}
    for group, f1 in {**by_group, "any": any_f1}.items():
        for threshold in TOLD:
            key = f"{who}_f1_{round(100 * threshold)}_{group}"
            table.add_count(key, _at_least(f1, threshold), _definition(threshold, group))
    chosen = predicates.held_out_f1_of_thresholds(sight, weights)
    for threshold in TOLD:
        table.add_count(
            f"{who}_f1_{round(100 * threshold)}_best_threshold",
            _at_least(chosen, threshold),
            f"latents with F1 >= {threshold:g} as classifiers f >= their best threshold of their "
            "best single value, both chosen on the prompts of the fit",
        )
    return any_f1


def count_occluded(
    table: Table,
    who: str,
    alpha: float,
    predicates: Predicates,
    sight: Sight,
    weights: Float[Tensor, "sample row"],
) -> None:
    """How many latents tell of the IO and of the S once a share of the IO's code is taken away:
    those of the "sae", or of one that was "refitted"."""
    fitted = {"sae": "which the SAE was not fitted to", "refitted": "which this SAE was fitted to"}
    for group in ("io", "s"):
        f1 = predicates.held_out_f1(GROUPS[group], sight, weights)
        table.add_count(
            f"{who}_f1_50_{group}_without_{round(100 * alpha)}_io",
            _at_least(f1, 0.5),
            f"{_definition(0.5, group)}; of activations less {alpha:g} of their supervised IO code "
            f"(least squares), {fitted[who]}",
        )


def _at_least(f1: Float[Tensor, "latent sample"], threshold: float) -> Float[Tensor, " sample"]:
    """Latents with an F1 of `threshold` or more, in each resample."""
    # What divides to 0.8 exactly must count, however it rounds.
    return (f1 >= threshold - 1e-12).double().sum(0)


def _definition(threshold: float, group: str) -> str:
    of = {
        "io": "who the IO is (unions; also in prompts of one order alone)",
        "s": "who the S is (unions; also in prompts of one order alone)",
        "pos": "the order",
        "any": "the IO, the S or the order",
    }
    known = f"latents with F1 >= {threshold:g} for {of[group]}, as classifiers f > 0 at their place"
    chance = (
        "; a latent that always fires has 0.67 for the order" if group in ("pos", "any") else ""
    )
    return f"{known}, place and predicate chosen on the prompts of the fit{chance}"


def _by_latent(
    found: list[tuple[Int[Tensor, " _"], Float[Tensor, "_ sample"]]],
) -> Float[Tensor, "latent sample"]:
    order = torch.cat([latents for latents, _ in found]).argsort()
    return torch.cat([f1 for _, f1 in found])[order]
