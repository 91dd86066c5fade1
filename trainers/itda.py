"""ITDA, inference-time decomposition of activations (Leask, Nanda and Al Moubayed 2025, arXiv
2505.17769): the dictionary is activations themselves, gathered in one pass, without training.

    code:  r = x;  steps times:  j = argmax_j |W_dec[j] . r|,  z_j += W_dec[j] . r,
                                 r -= (W_dec[j] . r) W_dec[j]
    grow:  x / |x| becomes a row of W_dec where |r|^2 > tau |x|^2

so x_hat = z @ W_dec, without biases, and z may be negative. A row of W_dec is called an atom. Each
has a label, the document, position and token of its activation, and two dictionaries gathered from
the same text in the same order are compared by the labels that they share (`jaccard`).

Each batch is coded with the dictionary as it was before the batch; that is the loss that is logged.
Then what was coded badly enters. What the paper leaves open, and is decided here (RECONSTRUCTION):

- tau is a share of |x|^2. The paper compares |r|^2 itself, in the units of one layer.
- Near copies in one batch: the paper only says that they are removed. Candidates come in the order
  of the batch, and one enters only if what entered before it, from this batch too, does not explain
  it. To the letter, all would have to be coded again after each one that enters. Here an eighth as
  many enter at once as there are atoms, of which none explains another within tau alone; then those
  left are coded again. So the size of the batch decides little about the dictionary.
- The dictionary begins with random rows of the first batch, however well others explain them.
- It is cropped to the first `d_sae` atoms: once it is full, nothing enters.
- A row counts as coded once what is left is 1e-4 of its length. An atom's own activation then has
  one latent; without this its code would go on to fit what rounding left.

The atoms depend on the order of the data, so on `shuffle_seed`; the first ones on `seed` too.
Exclude special tokens: their long activations enter at once. The learning rate and all else that
belongs to gradients has no effect.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from saekit import kernels
from saekit.config import TrainConfig
from saekit.errors import ConfigError
from saekit.sae import SAE, MatchingPursuit
from saekit.trainers._base import Batch, Trainer


@dataclass(frozen=True, kw_only=True)
class ITDAConfig(TrainConfig):
    """ITDA: the dictionary is activations that those before them did not explain, gathered in one
    pass."""

    n_tokens: int = 1_250_000
    """Activations to gather from, about as many as in the paper."""

    steps: int = 40
    """Steps of the pursuit: latents per token, at most. The SAE can be used with another number."""

    tau: float = 0.1
    """Share of an activation's squared length that may be left without its entering the
    dictionary. It decides how many enter; d_sae only how many may."""

    residual: float = 1e-4
    """Share of an activation's length at or below which what is left is not looked at any more."""

    initial_atoms: int = 1
    """Rows of the first batch, drawn at random, that the dictionary begins with."""

    life_windows: int = 0
    """Nothing but 0: an atom never changes, so there is no history to keep."""

    def __post_init__(self) -> None:
        super().__post_init__()
        MatchingPursuit(self.steps, self.residual)
        if not 0 < self.tau < 1:
            raise ConfigError(
                f"tau={self.tau} must lie between 0 and 1: it is the share of an activation's "
                "squared length that may stay unexplained"
            )
        if not 1 <= self.initial_atoms <= min(self.d_sae, self.batch_size):
            raise ConfigError(
                f"initial_atoms={self.initial_atoms} must lie in 1..{self.d_sae} (d_sae) and not "
                f"exceed batch_size={self.batch_size}: they are rows of the first batch"
            )
        if self.life_windows:
            raise ConfigError(
                f"life_windows={self.life_windows} must be 0: an atom of itda never changes, so "
                "there is no history to keep"
            )


class ITDATrainer(Trainer):
    """See the module. Slots of the dictionary that hold no atom yet come last."""

    Config = ITDAConfig
    NEEDS = frozenset[Literal["grad", "label"]]({"label"})
    cfg: ITDAConfig
    W_dec: Tensor
    labels: Tensor
    """Document, position and token of each atom, [d_sae, 3]; -1 where not known."""
    n_atoms: Tensor
    l0: Tensor
    """Latents that fire a token, on the mean over the last batch."""

    def __init__(self, cfg: ITDAConfig, d_in: int) -> None:
        super().__init__(cfg, d_in)
        self.register_buffer("W_dec", torch.zeros(cfg.d_sae, d_in))
        self.register_buffer("labels", torch.full((cfg.d_sae, 3), -1))
        self.register_buffer("n_atoms", torch.tensor(0))
        self.register_buffer("l0", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "row d_in"]) -> None:
        # The sample begins with the first batch, which will give them their labels.
        rows = sample[: self.cfg.batch_size].norm(dim=1).nonzero().flatten()
        order = torch.randperm(len(rows), generator=self.generator, device=self.generator.device)
        first = rows[order[: self.cfg.initial_atoms]]
        self._add(sample[first], self.labels[: len(first)])

    def _label_first(self, x: Float[Tensor, "row d_in"], label: Int[Tensor, "row 3"]) -> None:
        """Label the atoms that the dictionary began with, where their rows are found here."""
        unknown = (self.labels[: int(self.n_atoms), 0] < 0).nonzero().flatten()
        if len(unknown):
            cosine, row = (normalize(x) @ self.W_dec[unknown].T).max(0)
            same = cosine > 1 - 1e-5
            self.labels[unknown[same]] = label[row[same]]

    def _add(self, x: Float[Tensor, "row d_in"], label: Int[Tensor, "row 3"]) -> None:
        slots = slice(int(self.n_atoms), int(self.n_atoms) + len(x))
        self.W_dec[slots] = normalize(x)
        self.labels[slots] = label
        self.n_atoms += len(x)

    def _code(
        self, x: Float[Tensor, "row d_in"]
    ) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"], Float[Tensor, " row"]]:
        """Values, latents, and the squared length of what is left."""
        cfg, atoms = self.cfg, self.W_dec[: int(self.n_atoms)]
        values, indices, rest = kernels.matching_pursuit(
            x, atoms, cfg.steps, cfg.residual, signed=True
        )
        return *kernels.merge_repeats(values, indices), rest.square().sum(1)

    @torch.no_grad()
    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        x, label = batch.x, batch.label
        assert label is not None
        self._label_first(x, label)
        values, indices, error = self._code(x)
        self.dead.saw(values, indices, len(x))
        # A slot without an atom is not a silent one.
        self.dead.since[int(self.n_atoms) :] = 0
        self.l0 = (values != 0).sum() / len(x)
        self._grow(x, label, error)
        return {"mse": error.mean()}

    def _grow(
        self,
        x: Float[Tensor, "row d_in"],
        label: Int[Tensor, "row 3"],
        error: Float[Tensor, " row"],
    ) -> None:
        """Let rows enter whose squared error is too large; see the module for the rule."""
        tau, size = self.cfg.tau, x.square().sum(1)
        missed = (error > tau * size).nonzero().flatten()
        while len(missed) and self.n_atoms < self.cfg.d_sae:
            n = int(self.n_atoms)
            most = min(max(1, n // 8), self.cfg.d_sae - n)
            new = missed[_apart(x[missed], most, 1 - tau)]
            self._add(x[new], label[new])
            *_, error = self._code(x[missed])
            missed = missed[error > tau * size[missed]]

    def metrics(self) -> dict[str, float]:
        n = int(self.n_atoms)
        return {"l0": float(self.l0), "atoms": float(n), "dead": float(self.dead.mask.sum()) / n}

    def export(self) -> SAE:
        pursuit = MatchingPursuit(self.cfg.steps, self.cfg.residual, signed=True)
        atoms = self.W_dec[: int(self.n_atoms)].clone()
        return SAE.of_atoms(atoms, atoms.new_zeros(self.d_in), pursuit)

    def extras(self) -> dict[str, Tensor]:
        """`labels` of the atoms: document, position and token, [d_sae, 3]."""
        return {"labels": self.labels[: int(self.n_atoms)]}


def jaccard(a: Int[Tensor, "atom_a 3"], b: Int[Tensor, "atom_b 3"]) -> float:
    """How alike two dictionaries are: the labels that both have, as a share of those that either
    has. Says something only where both were gathered from the same text in the same order."""
    ours, theirs = (set(map(tuple, labels.tolist())) for labels in (a, b))
    return len(ours & theirs) / len(ours | theirs)


def _apart(
    x: Float[Tensor, "row d_in"], most: int, squared_cosine: float
) -> Int[Tensor, " chosen"]:
    """The first rows, `most` at most, of which none has such a squared cosine with one before it or
    a larger one."""
    unit = normalize(x)
    free = torch.ones(len(x), dtype=torch.bool, device=x.device)
    chosen: list[int] = []
    while len(chosen) < most and free.any():
        chosen.append(int(free.int().argmax()))
        free &= (unit @ unit[chosen[-1]]).square() < squared_cosine
    return torch.tensor(chosen, device=x.device)


KIND = ITDATrainer
