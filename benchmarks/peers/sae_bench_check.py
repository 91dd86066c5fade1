# pyright: reportMissingImports=false, reportCallIssue=false
"""Whether SAEBench's core evaluation takes a saekit SAE: run in an environment with both, without a
network.

    python benchmarks/peers/sae_bench_check.py

A model of random weights, tokens drawn at random, and an SAE of each kind; what comes out must be
what saekit computes itself. transformer_lens is that of SAEBench, older than saekit's own.
"""

import json
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from sae_bench.evals.core.main import CoreEvalConfig, run_evals
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from transformer_lens import HookedTransformer, HookedTransformerConfig

from saekit import SAE, JumpReLU, MatchingPursuit, ReLU, TopK
from saekit.sae import Activation
from saekit.sae_bench import custom_sae

HOOK = "blocks.1.hook_resid_post"


def main() -> None:
    torch.manual_seed(0)
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=2, d_model=16, n_ctx=32, d_head=8, n_heads=2, d_vocab=50, act_fn="gelu"
        )
    )
    tokens = torch.randint(0, 50, (8, 32))
    store: Any = SimpleNamespace(
        get_batch_tokens=lambda n=8: tokens[:n],
        reset_input_dataset=lambda: None,
        store_batch_size_prompts=8,
        context_size=32,
        normalize_activations="none",
    )
    x = model.run_with_cache(tokens)[1][HOOK]
    W_dec = torch.randn(64, 16)
    for how in (ReLU(), TopK(4), JumpReLU(torch.rand(64)), MatchingPursuit(4)):
        sae = _sae(how, W_dec, x.flatten(0, 1).mean(0))
        taken = custom_sae(sae, model_name="tiny", hook_layer=1, hook_name=HOOK)
        found = load_and_format_sae("mine", taken, "cpu")
        assert found is not None and found[1] is taken
        both = taken(x), sae(x.flatten(0, 1)).view_as(x)
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)
        config = CoreEvalConfig(
            batch_size_prompts=8,
            n_eval_reconstruction_batches=1,
            n_eval_sparsity_variance_batches=1,
            compute_kl=True,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
            compute_featurewise_weight_based_metrics=True,
        )
        metrics, _ = run_evals(found[1], store, model, config)
        l0 = metrics["sparsity"]["l0"]
        ours = float((sae.encode(x.flatten(0, 1)) != 0).sum(1).float().mean())
        assert abs(l0 - ours) < 1e-3, (l0, ours)
        line = {"kind": type(how).__name__, "l0": l0, "saekit_l0": ours}
        print(json.dumps({"sae-bench": version("sae-bench"), **line}))


def _sae(how: Activation, W_dec: torch.Tensor, mean: torch.Tensor) -> SAE:
    if isinstance(how, MatchingPursuit):
        return SAE.of_atoms(torch.nn.functional.normalize(W_dec), mean, how)
    return SAE(W_dec.T, -mean @ W_dec.T, W_dec, mean, how)


if __name__ == "__main__":
    main()
