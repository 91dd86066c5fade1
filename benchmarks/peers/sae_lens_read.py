# pyright: reportPossiblyUnboundVariable=false, reportMissingImports=false
"""SAELens: shuffled batches from a cache that its CacheActivationsRunner wrote (`--out`).

They come from its ActivationsStore; a plain read of the same files takes turns with it.
"""

import time
import warnings

import torch
from _driver import arguments, plain_read, tell
from sae_lens.training.activations_store import ActivationsStore
from transformers import AutoConfig

warnings.filterwarnings("ignore")
args = arguments(__doc__ or "")
width = AutoConfig.from_pretrained(args.model).hidden_size
folder = f"{args.out}/resid_post.{args.layer}"


def store() -> ActivationsStore:
    return ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=f"transformer.h.{args.layer}",
        hook_head_index=None,
        context_size=args.context,
        d_in=width,
        n_batches_in_buffer=max(20, 2 * args.read_batch // args.context),
        total_training_tokens=args.n_tokens,
        store_batch_size_prompts=args.batch_size,
        train_batch_size_tokens=args.read_batch,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device(args.device),
        dtype="float32",
        cached_activations_path=folder,
    )


plain, seconds, given = [], [], 0
for _ in range(args.rounds + 1):  # The first is the warm-up.
    total, took = plain_read(folder, "*.arrow")
    plain.append(took)
    source = store()
    # The store begins again by itself: an epoch is as many rows as there are.
    n = len(source.cached_activation_dataset) * args.context // args.read_batch
    begun = time.perf_counter()
    for _ in range(n):
        x = next(source)
    seconds.append(time.perf_counter() - begun)
    given = n * x.nbytes
record = {
    "impl": "sae_lens",
    "dtype": "float32",
    "given_bytes": given,
    "seconds": seconds[1:],
    "plain_bytes": total,
    "plain_seconds": plain[1:],
}
tell(record, ("sae-lens", "torch", "datasets"))
