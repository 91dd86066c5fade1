"""SAEs whose behaviour is known beforehand."""

import pytest
import torch

from saekit.sae import SAE, ReLU, TopK

WIDTH = 16


@pytest.fixture
def exact() -> SAE:
    """x = relu(x) - relu(-x): reconstructs anything, without error."""
    eye, zero = torch.eye(WIDTH), torch.zeros(WIDTH)
    return SAE(
        torch.cat([eye, -eye], 1), torch.zeros(2 * WIDTH), torch.cat([eye, -eye]), zero, ReLU()
    )


@pytest.fixture
def silent() -> SAE:
    """Never fires, and so reconstructs zero."""
    return SAE(
        torch.zeros(WIDTH, 8), -torch.ones(8), torch.zeros(8, WIDTH), torch.zeros(WIDTH), TopK(2)
    )


@pytest.fixture
def random_sae() -> SAE:
    """Encoder weights of -1, 0 and 1, so that no rounding depends on how rows are batched: equal
    contexts, of which the tiny corpus has many, then have equal latents."""
    generator = torch.Generator().manual_seed(1)
    W_enc = torch.randint(-1, 2, (WIDTH, 40), generator=generator).float()
    b_enc = torch.randint(-2, 3, (40,), generator=generator) / 4
    W_dec = torch.randn(40, WIDTH, generator=generator) / 10
    return SAE(W_enc, b_enc, W_dec, torch.zeros(WIDTH), TopK(4))
