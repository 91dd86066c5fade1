# pyright: reportMissingImports=false
"""dictionary_learning: text to shuffled batches with its ActivationBuffer, which keeps nothing.

The buffer lives in memory and holds one hook point; a second epoch runs the model again. It cuts
every text to its first window, so documents are given to it in pieces of about a window, over again
where they do not suffice.
"""

import traceback
import warnings
from collections.abc import Iterator
from itertools import cycle

import torch
from _driver import arguments, documents, measured, tell

warnings.filterwarnings("ignore")
args = arguments(__doc__ or "")
PACKAGES = ("dictionary-learning", "nnsight", "torch", "transformers")
CHARACTERS = 4
"""Of a token, at least as many on average as these texts have: windows are full."""
if len(args.hooks) > 1:
    refused = "one hook point to a buffer (`submodule` in dictionary_learning/buffer.py)"
    tell({"impl": "dictionary_learning", "hooks": len(args.hooks), "refused": refused}, PACKAGES)
    raise SystemExit
torch.set_grad_enabled(False)


def pieces() -> Iterator[str]:
    size = CHARACTERS * args.context
    # A refresh may ask for more than there is.
    for text in cycle(documents(args.text)):
        for begin in range(0, len(text), size):
            yield text[begin : begin + size]


try:
    from dictionary_learning.buffer import ActivationBuffer
    from nnsight import LanguageModel

    model = LanguageModel(args.model, device_map=args.device, dispatch=True)
    # A refresh fills the whole buffer; from one to the next, half of it is given out.
    n_contexts = 4 * args.batch_size

    def buffer() -> ActivationBuffer:
        return ActivationBuffer(
            pieces(),
            model,
            model.transformer.h[args.layer],
            d_submodule=model.config.hidden_size,
            n_ctxs=n_contexts,
            ctx_len=args.context,
            refresh_batch_size=args.batch_size,
            out_batch_size=args.read_batch,
            device=args.device,
        )

    next(buffer())  # The warm-up.
    rows = 0
    with measured() as run:
        source = buffer()
        while rows < args.n_tokens:
            rows += len(next(source))
    # What was computed, given out or not.
    computed = rows + int((~source.read).sum())
except Exception as error:  # What it says is what the record is for.
    traceback.print_exc()
    refused = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    tell({"impl": "dictionary_learning", "hooks": 1, "refused": refused}, PACKAGES)
    raise SystemExit from None
record = {
    "impl": "dictionary_learning",
    "hooks": 1,
    "dtype": str(source.activations.dtype).removeprefix("torch."),
    "refused": "no cache on disk (dictionary_learning/buffer.py holds activations in memory)",
    "passes": 1,
    "rows": computed,
    "seconds": run.seconds,
    "growth_mib": run.growth_mib,
    "bytes": 0,
}
tell(record, PACKAGES)
