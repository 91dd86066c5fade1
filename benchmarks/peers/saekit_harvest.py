"""saekit in the peers' place: text to activations on disk."""

import shutil

from _driver import arguments, folder_bytes, measured, tell

from saekit import HarvestConfig, harvest
from saekit.activations_cache.model import LanguageModel

args = arguments(__doc__ or "")
hooks = tuple(args.hooks) or (f"resid_post.{args.layer}",)
cfg = HarvestConfig(
    model=args.model,
    dataset=args.text,
    hooks=hooks,
    n_tokens=args.n_tokens,
    context=args.context,
    batch_size=args.batch_size,
    dtype=args.dtype,
    device=args.device,
)
model = LanguageModel.load(args.model, args.device)
harvest(cfg, args.out, model=model)  # The warm-up.
shutil.rmtree(args.out)
with measured() as run:
    cache = harvest(cfg, args.out, model=model)
record = {
    "impl": "saekit",
    "hooks": len(hooks),
    "dtype": args.dtype,
    "passes": 1,
    "rows": cache.n_rows,
    "seconds": run.seconds,
    "growth_mib": run.growth_mib,
    "bytes": folder_bytes(args.out),
}
tell(record, ("saekit", "torch", "transformers"))
