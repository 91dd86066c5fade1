"""Kinds of sparse autoencoder, one module each, and the loop that fits them."""

from saekit.trainers._base import Batch, Trainer, coefficient
from saekit.trainers._kinds import kind, names
from saekit.trainers._loop import RunSpec, train, train_many
from saekit.trainers._run import Callback

__all__ = [
    "Batch",
    "Callback",
    "RunSpec",
    "Trainer",
    "coefficient",
    "kind",
    "names",
    "train",
    "train_many",
]
