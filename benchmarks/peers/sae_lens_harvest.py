# pyright: reportMissingImports=false
"""SAELens: text to activations on disk with its CacheActivationsRunner.

The runner keeps one hook point, so several take as many passes over the text. Its HookedTransformer
takes names from a list and no folder, so the model is given as an AutoModelForCausalLM: hook points
are outputs of modules, and a pass runs to the logits. Documents are joined and cut, so that every
window is full. Where the wanted precision is refused, float32 is kept, and the record says so.
"""

import shutil
import warnings

from _driver import arguments, documents, folder_bytes, measured, tell
from datasets import Dataset
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from transformers import AutoConfig

PLACES = {"attn_out": ".attn", "mlp_out": ".mlp", "resid_post": ""}
"""Of GPT-2."""

warnings.filterwarnings("ignore")
args = arguments(__doc__ or "")
hooks = args.hooks or [f"resid_post.{args.layer}"]
width = AutoConfig.from_pretrained(args.model).hidden_size
dataset = Dataset.from_dict({"text": documents(args.text)})
# Whole buffers of whole batches: a part of one is an error in the runner.
batch = args.batch_size * args.context
batches = max(1, args.n_tokens // batch)
per_buffer = next(n for n in range(min(4, batches), 0, -1) if batches % n == 0)


def runner(hook: str, dtype: str) -> CacheActivationsRunner:
    place, layer = hook.split(".")
    itemsize = {"float32": 4, "float16": 2, "bfloat16": 2}[dtype]
    cfg = CacheActivationsRunnerConfig(
        dataset_path="",
        model_name=args.model,
        model_class_name="AutoModelForCausalLM",
        model_batch_size=args.batch_size,
        hook_name=f"transformer.h.{layer}{PLACES[place]}",
        d_in=width,
        training_tokens=batches * batch,
        context_size=args.context,
        new_cached_activations_path=f"{args.out}/{hook}",
        shuffle=False,
        dtype=dtype,
        device=args.device,
        buffer_size_gb=(per_buffer * batch + 0.5) * width * itemsize / 1e9,
    )
    return CacheActivationsRunner(cfg, override_dataset=dataset)


refused = None
kept = args.dtype
try:
    # Built and run: a precision may be refused as late as that.
    runner(hooks[0], kept).run()
except Exception as error:  # What it says is what the record is for.
    refused = f"{kept}: {type(error).__name__}: {error}".splitlines()[0][:200]
    kept = "float32"
shutil.rmtree(args.out, ignore_errors=True)
if refused:
    runner(hooks[0], kept).run()  # The warm-up.
    shutil.rmtree(args.out)

runners = [runner(hook, kept) for hook in hooks]
with measured() as run:
    made = [one.run() for one in runners]
record = {
    "impl": "sae_lens",
    "hooks": len(hooks),
    "dtype": kept,
    "refused": refused,
    "passes": len(hooks),
    "rows": len(made[0]) * args.context,
    "seconds": run.seconds,
    "growth_mib": run.growth_mib,
    "bytes": folder_bytes(args.out),
}
tell(record, ("sae-lens", "transformer-lens", "torch", "transformers", "datasets"))
