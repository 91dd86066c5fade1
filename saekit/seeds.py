"""Streams of random numbers that no other part of a run draws from.

A plain `manual_seed(0)` gives everyone who calls it the same numbers: initial weights would then
equal the directions of a synthetic dictionary with the same seed, and training begin at the answer.
"""

from zlib import crc32

import numpy as np
import torch


def stream(purpose: str, *key: int, device: str = "cpu") -> torch.Generator:
    """A generator for one purpose, and for any numbers that tell its uses apart."""
    words = np.random.SeedSequence([crc32(purpose.encode()), *key])
    return torch.Generator(device).manual_seed(int(words.generate_state(1, np.uint64)[0]))
