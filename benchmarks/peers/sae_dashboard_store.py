"""SAEDashboard's generation of what it shows of some latents, from tokens at hand. Runs in its own
environment:

    python sae_dashboard_store.py --d-sae 4096 --k 32 --latents 256 --tokens 59648

Model and SAE have the shape of the embedded ones and random weights, and tokens are random: what is
timed does not depend on what they mean.
"""

# Of an environment of its own, whose packages are older.
# pyright: reportMissingImports=false, reportCallIssue=false

import argparse
import importlib.metadata
import json
import resource
import time
import warnings

import torch
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import HookedSAETransformer, TopKSAE, TopKSAEConfig
from transformer_lens import HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

HOOK = "blocks.1.hook_resid_post"
WIDTH, CONTEXT = 256, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder in transformers format")
    for name in ("--d-sae", "--k", "--latents", "--tokens"):
        parser.add_argument(name, type=int, required=True)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.tokenizer)
    model = HookedSAETransformer(
        HookedTransformerConfig(
            n_layers=4,
            d_model=WIDTH,
            n_ctx=CONTEXT,
            n_heads=8,
            d_head=32,
            d_vocab=len(tokenizer),
            act_fn="gelu_new",
            normalization_type="LN",
            seed=0,
        )
    )
    model.tokenizer = tokenizer
    # It folds the norms of decoder rows, which TopK allows only so; rows have norm 1 anyway.
    options = {"d_in": WIDTH, "d_sae": args.d_sae, "k": args.k, "dtype": "float32"}
    sae = TopKSAE(TopKSAEConfig(**options, device="cpu", rescale_acts_by_decoder_norm=True))
    sae.cfg.metadata.hook_name = HOOK
    rows = torch.nn.functional.normalize(torch.randn(args.d_sae, WIDTH), dim=1)
    sae.W_dec.data, sae.W_enc.data = rows, rows.T.clone()
    tokens = torch.randint(1, len(tokenizer), (args.tokens // CONTEXT, CONTEXT))
    config = SaeVisConfig(hook_point=HOOK, features=list(range(args.latents)))
    begun = time.perf_counter()
    data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - begun,
                "latents": len(data.feature_data_dict),
                "tokens": tokens.numel(),
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "version": importlib.metadata.version("sae-dashboard"),
            }
        )
    )


if __name__ == "__main__":
    main()
