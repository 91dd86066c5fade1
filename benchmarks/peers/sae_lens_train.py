# pyright: reportMissingImports=false
"""SAELens trains an SAE on given rows: its own SAETrainer, without the language model."""

from collections.abc import Iterator
from typing import Any

import torch
from _train import Job, Weights, main
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer, SAETrainerConfig


def fit(job: Job, batches: Iterator[torch.Tensor], d_in: int) -> tuple[Any, Weights]:
    sizes = {"d_in": d_in, "d_sae": job["d_sae"], "device": job["device"]}
    sae: Any
    if job["kind"] == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(k=job["l0"], **sizes))
    elif job["kind"] == "batch_topk":
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=job["l0"], **sizes))
    else:
        cfg = JumpReLUTrainingSAEConfig(
            jumprelu_sparsity_loss_mode="quadratic",
            target_l0=job["l0"],
            l0_warm_up_steps=job["warmup"],
            **sizes,
        )
        sae = JumpReLUTrainingSAE(cfg)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=job["n_steps"] * job["batch_size"],
            train_batch_size_samples=job["batch_size"],
            lr=job["lr"],
            lr_end=job["lr"] / 10,  # what its own runner sets
            lr_warm_up_steps=job["warmup"],
            lr_decay_steps=job["decay"],
            device=job["device"],
            dead_feature_window=max(1, job["dead_after"] // job["batch_size"]),
        ),
        sae,
        batches,
    )
    trainer.fit()
    weights = {name: getattr(sae, name).detach() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    encode = sae.encode
    if job["kind"] == "jumprelu":
        weights["threshold"] = sae.threshold.detach()
    else:
        # Latents are chosen, and given out, as if rows of W_dec had norm 1.
        norm = weights["W_dec"].norm(dim=1)
        weights["W_enc"] = weights["W_enc"] * norm
        weights["b_enc"] = weights["b_enc"] * norm
        weights["W_dec"] = weights["W_dec"] / norm[:, None]
    if job["kind"] == "batch_topk":
        weights["threshold"] = sae.topk_threshold.detach().float().repeat(job["d_sae"])
        encode = None  # In training form it looks at the whole batch.
    weights["b_enc"] = weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]
    return encode, weights


if __name__ == "__main__":
    main("sae-lens", fit)
