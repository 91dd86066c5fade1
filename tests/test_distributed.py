"""How processes that start together find each other."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch._C._distributed_c10d import HashStore

from saekit.distributed import agreed
from saekit.errors import SaekitError


def test_each_start_has_a_name_of_its_own_in_one_store() -> None:
    store = HashStore()
    names = []
    for _ in range(3):
        # As after a restart by torchrun: what the ended processes said is still in the store.
        with ThreadPoolExecutor(3) as pool:
            of_each = pool.map(lambda rank: agreed(store, rank, 3, 30.0), range(3))
            (name,) = set(of_each)
        names.append(name)
    assert len(set(names)) == 3


def test_who_does_not_start_is_named() -> None:
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        two = [pool.submit(agreed, store, rank, 3, 0.2) for rank in (0, 1)]
        assert two[1].result() != ""
        with pytest.raises(SaekitError, match=r"rank 0 of 3 has waited 0.2 s .* rank 2: look"):
            two[0].result()
