# pyright: reportMissingImports=false
"""SAELens evaluates an SAE that it is given, on tokens that it is given: its own `run_evals`, every
metric on.

Tokens come from a stand-in for its store, as the store cuts text in its own way. The rest is what
its users run: the model as an AutoModelForCausalLM, special tokens left out.
"""

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.load_model import load_model
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file


class Store:
    """The windows in order, again and again."""

    def __init__(self, tokens: torch.Tensor, size: int) -> None:
        self.tokens, self.at = tokens, 0
        self.store_batch_size_prompts = size
        self.context_size = tokens.shape[1]

    def get_batch_tokens(self, batch_size: int) -> torch.Tensor:
        some = self.tokens[self.at : self.at + batch_size]
        self.at = (self.at + batch_size) % len(self.tokens)
        return some

    def reset_input_dataset(self) -> None:
        self.at = 0


def sae_of(weights: dict[str, torch.Tensor], job: dict[str, Any]) -> Any:
    d_in, d_sae = weights["W_enc"].shape
    # Biases of the input are folded into b_enc already.
    common = {
        "d_in": d_in,
        "d_sae": d_sae,
        "apply_b_dec_to_input": False,
        "metadata": SAEMetadata(hook_name=job["hook"]),
    }
    sae: Any
    if job["activation"] == "topk":
        sae = TopKSAE(TopKSAEConfig(k=job["k"], **common))
    elif job["activation"] == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(**common))
    else:
        sae = StandardSAE(StandardSAEConfig(**common))
    with torch.no_grad():
        for name, tensor in weights.items():
            getattr(sae, name).copy_(tensor)
    return sae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sae", required=True, help="safetensors: weights")
    parser.add_argument("--tokens", required=True, help="safetensors: tokens [window, pos]")
    parser.add_argument("--model", required=True, help="a folder in transformers format")
    parser.add_argument("--job", required=True, help="JSON: activation, k, hook, batches")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    args = parser.parse_args()
    job = json.loads(args.job)
    tokens = load_file(args.tokens)["tokens"].long()
    model = load_model("AutoModelForCausalLM", args.model, "cpu", hook_names=[job["hook"]])
    size = len(tokens) // job["batches"]
    config = get_eval_everything_config(size, job["batches"], job["batches"])
    found, by_latent = run_evals(
        sae_of(load_file(args.sae), job),
        Store(tokens, size),
        model,
        ActivationScaler(),
        config,
    )
    metrics = {name: value for group in found.values() for name, value in group.items()}
    density = by_latent["feature_density"]
    args.out.write_text(json.dumps({"metrics": metrics, "density": density}), encoding="utf-8")
    packages = ("sae-lens", "transformer-lens", "torch", "transformers")
    print(json.dumps({"versions": {p: importlib.metadata.version(p) for p in packages}}))


if __name__ == "__main__":
    main()
