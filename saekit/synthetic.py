"""Activations of which the right answer is known, and how much of it a dictionary found.

    x = codes @ directions + bias,   codes = fires * relu(mean + sd * noise)

How often each feature fires, which fire together, which only below another and which never beside
another is all chosen (after `synthetic/` of SAELens and SynthSAEBench, arXiv 2602.14687). Rows are
made in blocks, each from the seed and its own number: row i is the same row however many are asked
for at once, on one machine. Axes: row, d_in, n_features, d_sae.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.config import Config
from saekit.errors import ConfigError
from saekit.seeds import stream

BLOCK = 1024
"""Rows that one seed makes."""


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig(Config):
    """Features drawn at random. Trees of them come first, so that their roots fire most often."""

    n_features: int = 512
    """Directions that activations are made of."""

    d_in: int = 128
    """Width of the activations."""

    firing: Literal["zipf", "linear", "constant"] = "zipf"
    """How chances to fire fall from p_max to p_min over the features that have no parent: as
    1 / rank ** zipf_exponent, stretched to that range; along a line; or all of them p_max."""

    p_max: float = 0.3
    """Chance of the most frequent feature to fire."""

    p_min: float = 0.01
    """Chance of the rarest feature without a parent to fire."""

    zipf_exponent: float = 1.0
    """How steeply chances fall with rank."""

    n_trees: int = 0
    """Features that have others below them, which fire only where they do."""

    branching: tuple[int, ...] = (3,)
    """Children of each feature of a tree, level by level."""

    p_child: float = 0.2
    """Chance of a child to fire where its parent does."""

    exclusive: bool = True
    """Let at most one child of a parent fire."""

    correlation: float = 0.0
    """Share of a feature's latent Gaussian that factors common to all features explain; 0 lets
    features fire independently."""

    correlation_rank: int = 32
    """Common factors. Two features' Gaussians correlate by about correlation / sqrt(this)."""

    magnitude: float = 1.0
    """Mean of a firing feature's value."""

    magnitude_sd: float = 0.0
    """Its standard deviation, before values below 0 are cut off."""

    bias_norm: float = 1.0
    """Length of what is added to every row."""

    orthogonal_steps: int = 50
    """Steps that push the directions apart; 0 leaves them random."""

    seed: int = 0
    """Of the directions and of the rows."""

    def __post_init__(self) -> None:
        if min(self.n_features, self.d_in, self.correlation_rank) < 1:
            raise ConfigError(
                f"n_features={self.n_features}, d_in={self.d_in} and correlation_rank="
                f"{self.correlation_rank} must each be at least 1"
            )
        if not 0 < self.p_min <= self.p_max <= 1:
            raise ConfigError(
                f"p_min={self.p_min} and p_max={self.p_max} are chances: they must hold "
                "0 < p_min <= p_max <= 1"
            )
        if not 0 <= self.correlation < 1:
            raise ConfigError(
                f"correlation={self.correlation} is a share: it must be at least 0 and below 1"
            )
        if not 0 <= self.p_child <= 1 or min(self.branching, default=1) < 1 or self.n_trees < 0:
            raise ConfigError(
                f"n_trees={self.n_trees} may not be negative, branching={self.branching} must be "
                f"counts of at least 1, and p_child={self.p_child} a chance from 0 to 1"
            )
        if not self.zipf_exponent > 0:
            raise ConfigError(
                f"zipf_exponent={self.zipf_exponent} must be positive: chances of one size are "
                "firing='constant'"
            )
        if self.exclusive and self.n_trees and self.p_child * max(self.branching, default=0) > 1:
            raise ConfigError(
                f"{max(self.branching)} children that exclude each other cannot each fire with a "
                f"chance of p_child={self.p_child}: together they may not exceed 1"
            )
        in_trees = self.n_trees * _tree_size(self.branching)
        if in_trees > self.n_features:
            raise ConfigError(
                f"{self.n_trees} trees branching {self.branching} take {in_trees} features, more "
                f"than n_features={self.n_features}: give fewer trees or more features"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Synthetic:
    """A known dictionary and the law by which its features fire."""

    directions: Float[Tensor, "n_features d_in"]
    """Unit rows."""
    p: Float[Tensor, " n_features"]
    """Chance to fire; of a feature with a parent, where that fires."""
    bias: Float[Tensor, " d_in"]
    parent: Int[Tensor, " n_features"]
    """The feature without which it does not fire, which stands before it; -1 for none."""
    group: Int[Tensor, " n_features"]
    """Of the features with the same number, which is that of one of them, at most one fires."""
    factor: Float[Tensor, "n_features rank"] | None = None
    """Loadings of each feature's Gaussian on common factors; None for independent features."""
    magnitude: float = 1.0
    magnitude_sd: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.parent >= torch.arange(self.n_features)).any():
            raise ConfigError("parent must name features that stand before their children")
        most = float(torch.zeros(self.n_features).index_add(0, self.group, self.p).max())
        if most > 1 + 1e-6:
            raise ConfigError(
                f"the chances of a group of features that exclude each other add up to {most:g}: "
                "they may not exceed 1"
            )

    @classmethod
    def from_config(cls, cfg: SyntheticConfig) -> "Synthetic":
        generator = stream("directions", cfg.seed)
        rows = _spread(_normal(generator, cfg.n_features, cfg.d_in), cfg.orthogonal_steps)
        bias = torch.nn.functional.normalize(_normal(generator, cfg.d_in), dim=0) * cfg.bias_norm
        factor = None
        if cfg.correlation > 0:
            loadings = _normal(generator, cfg.n_features, cfg.correlation_rank)
            factor = torch.nn.functional.normalize(loadings) * cfg.correlation**0.5
        parent, group = _forest(cfg)
        p = torch.full((cfg.n_features,), cfg.p_child)
        without = parent < 0
        p[without] = _chances(cfg, int(without.sum()))
        return cls(
            directions=rows,
            p=p,
            bias=bias,
            parent=parent,
            group=group,
            factor=factor,
            magnitude=cfg.magnitude,
            magnitude_sd=cfg.magnitude_sd,
            seed=cfg.seed,
        )

    @property
    def n_features(self) -> int:
        return self.directions.shape[0]

    @property
    def d_in(self) -> int:
        return self.directions.shape[1]

    @cached_property
    def rate(self) -> Float[Tensor, " n_features"]:
        """How often each feature fires; their sum is the mean L0. Of children, exact only where
        features are independent."""
        rate = self.p.clone()
        for level in self._levels:
            rate[level] *= rate[self.parent[level]]
        return rate

    def sample(
        self, n: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "{n} d_in"], Float[Tensor, "{n} n_features"]]:
        """Rows and their codes, from a generator of the caller's."""
        codes = torch.zeros(n, self.n_features)
        fired = self._fires(n, generator).nonzero(as_tuple=True)
        value = torch.full((len(fired[0]),), self.magnitude)
        if self.magnitude_sd > 0:
            value += self.magnitude_sd * _normal(generator, len(value))
        codes[fired] = value.relu_()
        return codes @ self.directions + self.bias, codes

    def rows(
        self, start: int, stop: int
    ) -> tuple[Float[Tensor, "row d_in"], Float[Tensor, "row n_features"]]:
        """Rows start..stop of the endless list of them, and their codes."""
        x, codes = [], []
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            first = block * BLOCK
            whole = self.sample(BLOCK, stream("rows", self.seed, block))
            part = slice(max(start - first, 0), stop - first)
            x.append(whole[0][part])
            codes.append(whole[1][part])
        return torch.cat(x), torch.cat(codes)

    def _fires(self, n: int, generator: torch.Generator) -> Bool[Tensor, "{n} n_features"]:
        """Each group has one Gaussian; its features own intervals of it, from the top down."""
        leaders, of = self.group.unique(return_inverse=True)
        z = _normal(generator, n, len(leaders))
        if self.factor is not None:
            loadings = self.factor[leaders]
            own = (1 - loadings.square().sum(1)).sqrt()
            z = own * z + _normal(generator, n, loadings.shape[1]) @ loadings.T
        if len(leaders) < self.n_features:
            z = z[:, of]
        low, high = self._interval
        fires = (z > low) & (z <= high)
        for level in self._levels:
            fires[:, level] &= fires[:, self.parent[level]]
        return fires

    @cached_property
    def _interval(self) -> tuple[Float[Tensor, " n_features"], Float[Tensor, " n_features"]]:
        """Where in its group's Gaussian each feature fires: above, and up to."""
        taken = torch.zeros(self.n_features, dtype=torch.float64)
        used: dict[int, float] = {}
        for i, (group, p) in enumerate(zip(self.group.tolist(), self.p.tolist(), strict=True)):
            taken[i] = used.get(group, 0.0)
            used[group] = float(taken[i]) + p
        below = (taken + self.p).clamp_max(1)
        return -torch.special.ndtri(below).float(), -torch.special.ndtri(taken).float()

    @cached_property
    def _levels(self) -> list[Int[Tensor, " level"]]:
        """The features with a parent, those nearest to their root first."""
        depth = torch.zeros(self.n_features, dtype=torch.int64)
        for i, parent in enumerate(self.parent.tolist()):
            depth[i] = depth[parent] + 1 if parent >= 0 else 0
        return [(depth == d).nonzero().flatten() for d in range(1, int(depth.max()) + 1)]


# By level of the hierarchical tree: how much of each direction is that of its siblings.
_TOP_MIX = (0.0, 0.3, 0.44, 0.529, 0.594, 0.6467, 0.692, 0.733, 0.7739)
_CHILD_MIX = (0.0, 0.0895, 0.163, 0.226, 0.282, 0.3335, 0.3825, 0.431, 0.482)


def hierarchical_tree(level: int, seed: int = 0) -> Synthetic:
    """The tree of Costa et al. 2025 (arXiv 2506.03093; code: mpsae/MP-SAE), 20 features in 20
    dimensions, whose siblings have a cosine of level / 10.

    Three parents of which one fires at most (each with 0.2), below each three children of which
    one fires at most (0.2), and eight leaves that fire alone (0.05): 1.36 a row on the mean. The
    parents and the leaves are siblings; parents are features 0, 4 and 8, leaves 12 to 19. Raises
    ConfigError for a level that is none of 0..8.
    """
    if not 0 <= level < len(_TOP_MIX):
        raise ConfigError(f"level={level} must lie in 0..8: siblings have a cosine of level / 10")
    generator = stream("directions", seed)
    orthonormal = torch.linalg.qr(_normal(generator, 20, 20)).Q
    directions = orthonormal.clone()
    parents, leaves = [0, 4, 8], list(range(12, 20))
    families = [list(range(p + 1, p + 4)) for p in parents]
    for siblings, mix in [([*parents, *leaves], _TOP_MIX), *((f, _CHILD_MIX) for f in families)]:
        rows = orthonormal[siblings]
        others = (rows.sum(0) - rows) / (len(siblings) - 1)
        directions[siblings] = (1 - mix[level]) * rows + mix[level] * others
    group = torch.arange(20)
    parent = torch.full((20,), -1)
    group[parents] = 0
    for p, family in zip(parents, families, strict=True):
        group[family] = family[0]
        parent[family] = p
    chance = torch.full((20,), 0.2)
    chance[leaves] = 0.05
    return Synthetic(
        directions=torch.nn.functional.normalize(directions),
        p=chance,
        bias=torch.zeros(20),
        parent=parent,
        group=group,
        magnitude=1.5,
        magnitude_sd=0.25,
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class Recovery:
    """What a dictionary has found of the true one."""

    cosine: Float[Tensor, " n_features"]
    """Of each feature with the latent that the best one-to-one matching gives it; 0 without one."""
    latent: Int[Tensor, " n_features"]
    """That latent; -1 where there are fewer latents than features and it has none."""
    best: Float[Tensor, " n_features"]
    """The largest of each feature with any latent."""
    feature: Int[Tensor, " d_sae"]
    """The feature that each latent is nearest to."""
    nearest: Float[Tensor, " d_sae"]
    """Its cosine with that feature."""

    @property
    def mcc(self) -> float:
        """Mean of the matched pairs' cosines. The features or latents that are left over where the
        numbers differ do not count: see `best` and `nearest`, too."""
        return float(self.cosine[self.latent >= 0].mean())

    @property
    def uniqueness(self) -> float:
        """Different features that latents are nearest to, as a share of the latents."""
        return len(self.feature.unique()) / len(self.feature)

    def share(self, least: float = 0.9) -> float:
        """Features matched by a cosine above `least`."""
        return float((self.cosine > least).float().mean())


def recovery(
    W_dec: Float[Tensor, "d_sae d_in"],
    directions: Float[Tensor, "n_features d_in"],
    *,
    signed: bool = False,
) -> Recovery:
    """Match latents to features one to one so that the sum of their cosines is largest.

    As in SAELens, a latent that points the other way counts as found; with `signed` it does not.
    """
    normalise = torch.nn.functional.normalize
    cosine = normalise(directions.detach().float()) @ normalise(W_dec.detach().float()).T
    if not signed:
        cosine = cosine.abs()
    latent = matching(cosine)
    matched = cosine.gather(1, latent.clamp_min(0)[:, None])[:, 0]
    nearest, feature = cosine.max(0)
    return Recovery(
        cosine=matched.masked_fill(latent < 0, 0.0),
        latent=latent,
        best=cosine.amax(1),
        feature=feature,
        nearest=nearest,
    )


@dataclass(frozen=True, eq=False)
class Detection:
    """How well each latent tells when a feature is there, as counts that add up over batches."""

    hits: Int[Tensor, " d_sae"]
    """Rows on which both were there."""
    fired: Int[Tensor, " d_sae"]
    present: Int[Tensor, " d_sae"]
    """Rows on which the feature was."""

    @classmethod
    def of(
        cls,
        z: Float[Tensor, "row d_sae"],
        codes: Float[Tensor, "row n_features"],
        feature: Int[Tensor, " d_sae"],
    ) -> "Detection":
        """Of latents and of the true codes; `feature` says which one each latent is to tell."""
        fires, there = z != 0, (codes > 0)[:, feature]
        return cls((fires & there).sum(0), fires.sum(0), there.sum(0))

    def __add__(self, other: "Detection") -> "Detection":
        return Detection(
            self.hits + other.hits, self.fired + other.fired, self.present + other.present
        )

    @property
    def precision(self) -> Float[Tensor, " d_sae"]:
        """0 for a latent that never fires."""
        return self.hits / self.fired.clamp_min(1)

    @property
    def recall(self) -> Float[Tensor, " d_sae"]:
        """0 for a feature that is never there."""
        return self.hits / self.present.clamp_min(1)

    @property
    def f1(self) -> Float[Tensor, " d_sae"]:
        """The harmonic mean of both."""
        return 2 * self.hits / (self.fired + self.present).clamp_min(1)


def matching(similarity: Float[Tensor, "row column"]) -> Int[Tensor, " row"]:
    """The column of each row in the one-to-one matching whose similarities add up to most; -1 for
    rows left over where there are more rows than columns.

    The Hungarian method by shortest augmenting paths (Kuhn; Jonker and Volgenant): at worst
    row^2 * column steps, of which numpy takes `column` at once.
    """
    if similarity.shape[0] > similarity.shape[1]:
        of_column = matching(similarity.T)
        rows = torch.full((similarity.shape[0],), -1)
        rows[of_column] = torch.arange(similarity.shape[1])
        return rows
    cost = -similarity.detach().cpu().double().numpy()
    n_rows, n_columns = cost.shape
    row_price, column_price = np.zeros(n_rows), np.zeros(n_columns)
    row_of = np.full(n_columns, -1)
    for row in range(n_rows):
        # Distances from `row` over tight edges; `came[j]` is the column before j on the way.
        distance = np.full(n_columns, np.inf)
        came = np.full(n_columns, -1)
        done = np.zeros(n_columns, dtype=bool)
        at, column, so_far = row, -1, 0.0
        while True:
            through = so_far + cost[at] - row_price[at] - column_price
            nearer = ~done & (through < distance)
            distance[nearer] = through[nearer]
            came[nearer] = column
            column = int(np.where(done, np.inf, distance).argmin())
            so_far = float(distance[column])
            done[column] = True
            at = int(row_of[column])
            if at < 0:
                break
        inner = done.copy()
        inner[column] = False
        slack = so_far - distance[inner]
        column_price[inner] -= slack
        row_price[row_of[inner]] += slack
        row_price[row] += so_far
        while column >= 0:
            before = int(came[column])
            row_of[column] = row if before < 0 else row_of[before]
            column = before
    column_of = np.empty(n_rows, dtype=np.int64)
    taken = (row_of >= 0).nonzero()[0]
    column_of[row_of[taken]] = taken
    return torch.from_numpy(column_of)


def _normal(generator: torch.Generator, *shape: int) -> Float[Tensor, "..."]:
    return torch.randn(*shape, generator=generator)


def _spread(rows: Float[Tensor, "n d"], steps: int) -> Float[Tensor, "n d"]:
    """Unit rows with smaller squared cosines, by descent along the gradient of their sum.

    That gradient is rows @ (rows.T @ rows), so that no matrix of all pairs is made.
    """
    n, d = rows.shape
    rows = torch.nn.functional.normalize(rows)
    # Half the inverse of the largest eigenvalue that rows.T @ rows has at random.
    rate = 0.5 / (1 + (n / d) ** 0.5) ** 2
    for _ in range(steps):
        rows = torch.nn.functional.normalize(rows - rate * rows @ (rows.T @ rows))
    return rows


def _chances(cfg: SyntheticConfig, n: int) -> Float[Tensor, " {n}"]:
    """Chances to fire of the features without a parent, most frequent first."""
    if cfg.firing == "constant":
        return torch.full((n,), cfg.p_max)
    if cfg.firing == "linear" or n == 1:
        return torch.linspace(cfg.p_max, cfg.p_min, n)
    law = torch.arange(1, n + 1, dtype=torch.float64) ** -cfg.zipf_exponent
    share = (law - law[-1]) / (law[0] - law[-1])
    return (cfg.p_min + share * (cfg.p_max - cfg.p_min)).float()


def _tree_size(branching: tuple[int, ...]) -> int:
    size, level = 1, 1
    for width in branching:
        level *= width
        size += level
    return size


def _forest(
    cfg: SyntheticConfig,
) -> tuple[Int[Tensor, " n_features"], Int[Tensor, " n_features"]]:
    """Parents and groups: tree by tree, each level by level, and then the features that stand
    alone."""
    parent, group = torch.full((cfg.n_features,), -1), torch.arange(cfg.n_features)
    free = 0
    for _ in range(cfg.n_trees):
        level, free = [free], free + 1
        for width in cfg.branching:
            children: list[int] = []
            for above in level:
                own = list(range(free, free + width))
                parent[own] = above
                if cfg.exclusive:
                    group[own] = own[0]
                children += own
                free += width
            level = children
    return parent, group
