# pyright: reportMissingImports=false
"""dictionary_learning trains an SAE on given rows: its own trainers' updates."""

from collections.abc import Iterator
from typing import Any

import torch
from _train import Job, Weights, main
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.top_k import TopKTrainer


def fit(job: Job, batches: Iterator[torch.Tensor], d_in: int) -> tuple[Any, Weights]:
    steps = job["n_steps"]
    common = {
        "steps": steps,
        "activation_dim": d_in,
        "dict_size": job["d_sae"],
        "layer": 0,
        "lm_name": "given rows",
        "lr": job["lr"],
        "warmup_steps": job["warmup"],
        "decay_start": steps - job["decay"],
        "seed": job["seed"],
        "device": job["device"],
    }
    trainer: Any
    if job["kind"] == "jumprelu":
        trainer = JumpReluTrainer(
            target_l0=job["l0"], sparsity_warmup_steps=job["warmup"], **common
        )
    else:
        kind = TopKTrainer if job["kind"] == "topk" else BatchTopKTrainer
        # The threshold is to begin early enough in a short run, as it does in a long one.
        trainer = kind(k=job["l0"], threshold_start_step=min(1000, steps // 2), **common)
    trainer.dead_feature_threshold = job["dead_after"]
    for step in range(steps):
        trainer.update(step, next(batches))
    ae = trainer.ae
    if job["kind"] == "jumprelu":
        weights = {n: getattr(ae, n).detach() for n in ("W_enc", "b_enc", "W_dec", "b_dec")}
        weights["threshold"] = ae.threshold.detach().clamp_min(0)
        return ae.encode, weights
    weights = {
        "W_enc": ae.encoder.weight.detach().T,
        "b_enc": ae.encoder.bias.detach(),
        "W_dec": ae.decoder.weight.detach().T,
        "b_dec": ae.b_dec.detach(),
    }
    weights["b_enc"] = weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]
    if job["kind"] == "batch_topk":
        weights["threshold"] = ae.threshold.detach().repeat(job["d_sae"])
    return ae.encode, weights


if __name__ == "__main__":
    main("dictionary-learning", fit)
