# pyright: reportPossiblyUnboundVariable=false
"""saekit in the peers' place: shuffled batches from the cache that `saekit_harvest.py` wrote.

The cache is shuffled on disk first, as training would have it; that is not timed.
"""

import time

import torch
from _driver import arguments, plain_read, tell

from saekit import ActivationCache
from saekit.activations_cache.reader import Reader
from saekit.activations_cache.shuffle import shuffle

args = arguments(__doc__ or "")
hook = f"resid_post.{args.layer}"
folder = f"{args.out}/shuffled"
shuffle(ActivationCache.open(args.out), folder)
cache = ActivationCache.open(folder)

plain, seconds, given = [], [], 0
for number in range(args.rounds + 1):  # The first is the warm-up.
    total, took = plain_read(folder, "*.safetensors")
    plain.append(took)
    begun, given = time.perf_counter(), 0
    for batch in Reader(
        cache,
        (hook,),
        args.read_batch,
        seed=number,
        split="all",
        exclude=(),
        dtype=torch.float32,
        device=args.device,
    ):
        given += batch[hook].nbytes
    seconds.append(time.perf_counter() - begun)
record = {
    "impl": "saekit",
    "dtype": "float32",
    "given_bytes": given,
    "seconds": seconds[1:],
    "plain_bytes": total,
    "plain_seconds": plain[1:],
}
tell(record, ("saekit", "torch"))
