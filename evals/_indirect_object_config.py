"""What the evaluation on the indirect object can be asked for."""

from dataclasses import dataclass
from typing import Literal

from saekit.errors import ConfigError
from saekit.evals._base import ResampledConfig
from saekit.evals._indirect_object_prompts import ATTRIBUTES, ROLES, Attribute, Role


@dataclass(frozen=True, kw_only=True)
class IndirectObjectConfig(ResampledConfig):
    """The prompts are made here, of the task's own names and templates: of the cache only the model
    is read. `max_rows` bounds the prompts; every token that is looked at is a name or the last one,
    so that `exclude` leaves none out."""

    split: Literal["train", "test", "all"] = "test"
    """Names and templates: "test" are those that the embedded model never saw in the task. There
    is no "all"."""

    n_fit: int = 2000
    """Prompts that supervised dictionaries and predicates are fitted to."""

    n_test: int = 1000
    """Other prompts, for explained variance and F1."""

    n_patch: int = 200
    """The first of those, which run through the model once for each edit."""

    names: tuple[str, ...] = ()
    """Names in place of the task's own."""

    positions: tuple[Role, ...] = ROLES
    """Where activations are read and replaced, all at once: where the indirect object stands, the
    subject first and again, and the last token."""

    attributes: tuple[Attribute, ...] = ATTRIBUTES
    """Attributes to edit."""

    k: tuple[int, ...] = (2, 4, 6)
    """Latents to exchange at each position."""

    error_term: Literal["keep", "drop"] = "keep"
    """Whether edits are of the activation, or of its reconstruction."""

    union: int = 10
    """Names that a predicate may join, but at most a quarter of them."""

    told: float = 0.6
    """F1 for the IO or the S from which latents are kept, or removed, in the causal check."""

    occlude: tuple[float, ...] = (0.5, 1.0)
    """Shares of the supervised IO code to take away before latents are counted."""

    occluded_out: str | None = None
    """Folder or URL for a cache of the fit's activations less those shares, that SAEs can be
    refitted on: `saekit train topk --cache FOLDER --hook HOOK:without_50_io`."""

    refitted: tuple[str, ...] = ()
    """Folders of SAEs trained on that cache: their latents are counted too, as the paper does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split == "all":
            raise ConfigError(
                "split='all' is none of the task's: give 'test' or 'train', whose names and "
                "templates differ"
            )
        for name in ("n_fit", "n_test", "n_patch", "union"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_patch > self.n_test:
            raise ConfigError(
                f"n_patch={self.n_patch} exceeds n_test={self.n_test}: it is how many of those run "
                "through the model with edits"
            )
        if self.n_fit + self.n_test > self.max_rows:
            raise ConfigError(
                f"n_fit + n_test = {self.n_fit + self.n_test} prompts exceed "
                f"max_rows={self.max_rows}: raise it, or ask for fewer"
            )
        for name in ("positions", "attributes", "k", "occlude"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ConfigError(f"{name}={given} names something twice")
        if not self.positions:
            raise ConfigError(f"positions is empty: give at least one of {', '.join(ROLES)}")
        if min(self.k, default=1) < 1:
            raise ConfigError(f"k={self.k} must each be at least 1: latents to exchange")
