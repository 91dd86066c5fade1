"""Places to store a cache in (a folder, fsspec's memory, an S3 server of this process), and a cache
made by hand."""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saekit.activations_cache import shards
from saekit.activations_cache.manifest import Manifest
from saekit.activations_cache.masks import KINDS
from saekit.activations_cache.stats import HookStats
from saekit.activations_cache.storage import Storage, storage
from saekit.activations_cache.store import ActivationCache


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server on a free port, with an empty bucket named `bucket`."""
    # Here, so that a machine that only lends its GPU to the other tests does without them.
    from botocore.session import get_session
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = get_session().create_client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    client.create_bucket(Bucket="bucket")
    client.close()
    yield endpoint
    server.stop()


@pytest.fixture
def s3_url(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of its own in the bucket, reached as a user reaches it: by the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return f"s3://bucket/{uuid.uuid4().hex}"


@pytest.fixture(params=["local", "memory", "s3"])
def any_storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Storage:
    """An empty storage of each kind; what is fetched goes into the test's own folder."""
    monkeypatch.setenv("SAEKIT_CACHE_DIR", str(tmp_path / "fetched"))
    if request.param == "local":
        return storage(tmp_path / "cache")
    if request.param == "memory":
        return storage(f"memory://{uuid.uuid4().hex}")
    return storage(request.getfixturevalue("s3_url"))


@pytest.fixture(scope="session")
def make_cache() -> Callable[..., ActivationCache]:
    """Makes a cache by hand whose rows say which they are: at hook point `h`, row r is
    [r, r + 1/4, r + 1/2], its gradient is the negative, and its token is r.

    Windows of ten rows, their first special; documents of three windows. Every 37th row is
    nonfinite. With `numbered_apart`, each shard numbers its documents from 0, as ranks do.
    """

    def make(
        where: Path | str,
        rows: tuple[int, ...] = (130, 70, 101),
        dtype: torch.dtype = torch.float32,
        numbered_apart: bool = False,
    ) -> ActivationCache:
        folder = storage(where)
        first, n_documents, entries, masks_seen = 0, 0, [], []
        for number, n in enumerate(rows):
            row, here = torch.arange(first, first + n), torch.arange(n)
            new = [f"document {n_documents + i}" for i in range(-(-n // 30))]
            x = row[:, None] + torch.arange(3) / 4
            x[row % 37 == 36] = torch.nan
            mask = (here % 10 == 0) * KINDS["special"] | (row % 37 == 36) * KINDS["nonfinite"]
            offset = n_documents if numbered_apart else 0
            columns = {
                "h": x.to(dtype),
                "h.grad": -x.to(torch.bfloat16 if dtype == torch.int8 else dtype),
                "token": row.int(),
                "document": (here // 30 + n_documents - offset).int(),
                "position": (here % 10).int(),
                "mask": mask.to(torch.uint8),
            }
            if dtype == torch.int8:
                columns["h"] = torch.full((n, 3), 2, dtype=dtype)
                columns["h.scale"] = row / 2
            entry = shards.write(folder, f"shard-{number:05d}.safetensors", columns, new)
            entries.append(replace(entry, document_offset=offset))
            masks_seen.append(mask)
            first, n_documents = first + n, n_documents + len(new)
        mask = torch.cat(masks_seen)
        Manifest(
            config={"holdout": 0.25, "dtype": str(dtype).removeprefix("torch."), "gradients": True},
            model="by hand",
            model_fingerprint="by hand",
            tokenizer_fingerprint=None,
            hooks={"h": 3},
            shards=tuple(entries),
            stats={"h": HookStats(n=int((mask == 0).sum()), sum=(0.0, 0.0, 0.0))},
            marked={kind: int((mask & bit != 0).sum()) for kind, bit in KINDS.items()},
            complete=True,
        ).save(folder)
        return ActivationCache.open(where)

    return make
