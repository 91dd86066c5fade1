"""Kinds of sparse autoencoder, one module each, and the loop that fits them."""

from saekit.trainers._base import Trainer
from saekit.trainers._kinds import kind, names
from saekit.trainers._loop import train

__all__ = ["Trainer", "kind", "names", "train"]
