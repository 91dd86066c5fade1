"""A planted dictionary: activations of which the right answer is known."""

import pytest
import torch
from torch import Tensor

from saekit import ActivationCache
from saekit.activations_cache.planted import cache_of
from saekit.trainers import _kinds

D_IN, N_FEATURES, ACTIVE, N_ROWS = 32, 48, 3, 20_000


@pytest.fixture(scope="module", params=_kinds.names())
def any_kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def directions() -> Tensor:
    """Unit rows: the features that the planted activations are made of."""
    rows = torch.randn(N_FEATURES, D_IN, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(rows)


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory, directions: Tensor) -> ActivationCache:
    """A cache whose rows are sums of three of the directions, around a mean that is not zero."""
    g = torch.Generator().manual_seed(2)
    which = torch.rand(N_ROWS, N_FEATURES, generator=g).topk(ACTIVE, dim=1).indices
    strength = 1 + torch.rand(N_ROWS, ACTIVE, generator=g)
    x = (strength[..., None] * directions[which]).sum(1) + torch.linspace(-1, 1, D_IN)
    grad = torch.randn(N_ROWS, D_IN, generator=g)
    return cache_of([(x, grad)], tmp_path_factory.mktemp("planted"))
