"""A small file of each format that is read, exactly as its tool lays it out, and beside it what
that tool computes, written down by hand, row by row."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from saekit import SAE, TopK, save

D_IN, D_SAE, K = 5, 12, 3


@dataclass(frozen=True)
class Foreign:
    """A file or folder of another tool's, and what that tool makes of one row."""

    path: Path
    encode: Callable[[Tensor], Tensor]
    """[d_in] -> [d_sae]"""
    decode: Callable[[Tensor, Tensor], Tensor]
    """([d_sae], [d_in]) -> [d_out]"""


def weights(d_out: int = D_IN) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return (
        torch.randn(D_IN, D_SAE, generator=g),
        torch.randn(D_SAE, generator=g) / 3,
        torch.randn(D_SAE, d_out, generator=g),
        torch.randn(d_out, generator=g),
    )


def topk(pre: Tensor) -> Tensor:
    least = pre.sort(descending=True).values[K - 1]
    return torch.where((pre >= least) & (pre > 0), pre, 0.0)


def above(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.where((pre > threshold) & (pre > 0), pre, 0.0)


def put(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path)


def put_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def native(at: Path) -> Foreign:
    W, b, D, c = weights()
    save(SAE(W, b, D, c, TopK(K)), at)
    return Foreign(at, lambda x: topk(x @ W + b), lambda z, x: z @ D + c)


def lens(at: Path, architecture: str, tensors: dict[str, Tensor], **options: Any) -> None:
    put(at / "sae_weights.safetensors", tensors)
    config = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.0.hook_resid_post"},
    }
    put_json(at / "cfg.json", config | options)


def sae_lens_gated(at: Path) -> Foreign:
    W, b, D, c = weights()
    gate, r = b.flip(0), b / 2
    named = {"W_enc": W, "b_mag": b, "b_gate": gate, "r_mag": r, "W_dec": D, "b_dec": c}
    lens(at, "gated", named)

    def encode(x: Tensor) -> Tensor:
        pre = (x - c) @ W
        return torch.where(pre + gate > 0, (r.exp() * pre + b).clamp_min(0), 0.0)

    return Foreign(at, encode, lambda z, x: z @ D + c)


def sae_lens_topk(at: Path) -> Foreign:
    """By decoder norms, and with rows normalised."""
    W, b, D, c = weights()
    named = {"W_enc": W, "b_enc": b, "W_dec": D, "b_dec": c}
    options = {"k": K, "rescale_acts_by_decoder_norm": True, "normalize_activations": "layer_norm"}
    lens(at, "topk", named, **options)
    norm = D.norm(dim=1)

    def encode(x: Tensor) -> Tensor:
        x = (x - x.mean()) / (x.std() + 1e-5)
        return topk(((x - c) @ W + b) * norm)

    return Foreign(at, encode, lambda z, x: ((z / norm) @ D + c) * x.std() + x.mean())


def sae_lens_scaled(at: Path) -> Foreign:
    """A checkpoint of BatchTopK, whose input was scaled."""
    W, b, D, c = weights()
    named = {"W_enc": W, "b_enc": b, "W_dec": D, "b_dec": c}
    named["topk_threshold"] = torch.tensor(0.7, dtype=torch.float64)
    how = "expected_average_only_in"
    lens(at, "batchtopk", named, normalize_activations=how, k=K, aux_loss_coefficient=1.0)
    put_json(at / "activation_scaler.json", {"scaling_factor": 0.4, "has_whitening": False})
    return Foreign(at, lambda x: above((0.4 * x - c) @ W + b, 0.7), lambda z, x: (z @ D + c) / 0.4)


def sae_lens_whitened(at: Path) -> Foreign:
    W, b, D, c = weights()
    lens(
        at,
        "jumprelu",
        {"W_enc": W, "b_enc": b, "W_dec": D, "b_dec": c, "threshold": b.abs()},
        normalize_activations="covariance_whitening",
        apply_b_dec_to_input=False,
    )
    M = torch.eye(D_IN) + W[:, :D_IN] / 5
    held = {"mean": c.flip(0), "matrix": M, "inverse_matrix": torch.linalg.inv(M)}
    put(at / "activation_whitening.safetensors", held)
    put_json(at / "activation_scaler.json", {"scaling_factor": None, "has_whitening": True})
    mean = c.flip(0)
    return Foreign(
        at,
        lambda x: above(((x - mean) @ M) @ W + b, b.abs()),
        lambda z, x: (z @ D + c) @ torch.linalg.inv(M) + mean,
    )


def sae_lens_flat(at: Path) -> Foreign:
    """As it was before version 6."""
    W, b, D, c = weights()
    named = {"W_enc": W, "b_enc": b, "W_dec": D, "b_dec": c, "scaling_factor": torch.ones(D_SAE)}
    put(at / "sae_weights.safetensors", named)
    config = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "hook_point": "blocks.0.hook_resid_pre",
        "model_name": "gpt2-small",
        "normalize_activations": False,
        "dtype": "torch.float32",
    }
    put_json(at / "cfg.json", config)
    return Foreign(at, lambda x: topk((x - c) @ W + b), lambda z, x: z @ D + c)


def sae_lens_skip(at: Path) -> Foreign:
    W, b, D, c = weights(4)
    S = W[:, :4]
    lens(
        at,
        "jumprelu_skip_transcoder",
        {"W_enc": W, "b_enc": b, "W_dec": D, "b_dec": c, "threshold": b.abs(), "W_skip": S.T},
        d_out=4,
        apply_b_dec_to_input=False,
    )
    return Foreign(at, lambda x: above(x @ W + b, b.abs()), lambda z, x: z @ D + c + x @ S)


def sae_lens_pursuit(at: Path) -> Foreign:
    _, _, D, c = weights()
    D = torch.nn.functional.normalize(D)
    options = {"max_iterations": 6, "residual_threshold": 0.5, "stop_on_duplicate_support": True}
    lens(at, "matching_pursuit", {"W_dec": D, "b_dec": c}, **options)

    def encode(x: Tensor) -> Tensor:
        left, z = x - c, torch.zeros(D_SAE)
        for _ in range(6):
            value, at = (D @ left).clamp_min(0).max(0)
            again = bool(z[at] != 0) or bool(value == 0)
            z[at] += value
            left = left - value * D[at]
            if again or left.norm() < 0.5:
                break
        return z

    return Foreign(at, encode, lambda z, x: z @ D + c)


def sparsify(at: Path) -> Foreign:
    W, b, D, c = weights()
    at = at / "layers.2"
    named = {"encoder.weight": W.T, "encoder.bias": b, "W_dec": D, "b_dec": c}
    put(at / "sae.safetensors", named)
    config = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": D_SAE,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D_IN,
    }
    put_json(at / "cfg.json", config)
    return Foreign(at, lambda x: topk((x - c) @ W + b), lambda z, x: z @ D + c)


def dictionary_learning(at: Path) -> Foreign:
    W, b, D, c = weights()
    at = at / "trainer_0"
    at.mkdir(parents=True, exist_ok=True)
    state = {
        "k": torch.tensor(K, dtype=torch.int),
        "threshold": torch.tensor(0.6),
        "encoder.weight": W.T,
        "encoder.bias": b,
        "decoder.weight": D.T,
        "b_dec": c,
    }
    torch.save(state, at / "ae.pt")
    trainer = {"trainer_class": "BatchTopKTrainer", "dict_class": "BatchTopKSAE", "k": K}
    put_json(at / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 128}})
    return Foreign(at, lambda x: above((x - c) @ W + b, 0.6), lambda z, x: z @ D + c)


def dictionary_learning_backup(at: Path) -> Foreign:
    """In units of activations that were divided by 2.5; its final form is in those of x."""
    W, b, D, c = weights()
    state = {"W_enc": W, "b_enc": b, "W_dec": D, "b_dec": c, "threshold": b.abs()}
    optimiser = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]}
    at.mkdir(parents=True, exist_ok=True)
    config = {"dict_class": "JumpReluAutoEncoder"}
    backup = {"step": 3, "ae": state, "optimizer": optimiser, "config": config}
    torch.save({**backup, "norm_factor": 2.5}, at / "ae.pt")
    put_json(at / "config.json", {"trainer": config})
    return Foreign(
        at,
        lambda x: above(x @ W + 2.5 * b, 2.5 * b.abs()),
        lambda z, x: z @ D + 2.5 * c,
    )


def dictionary_learning_standard(at: Path) -> Foreign:
    """Loaded there with decoder columns of norm 1."""
    W, b, D, c = weights()
    at.mkdir(parents=True, exist_ok=True)
    state = {"bias": c, "encoder.weight": W.T, "encoder.bias": b, "decoder.weight": D.T}
    torch.save(state, at / "ae.pt")
    put_json(at / "config.json", {"trainer": {"dict_class": "AutoEncoder"}})
    norm = D.norm(dim=1)
    return Foreign(
        at,
        lambda x: ((x - c) @ W + b).clamp_min(0) * norm,
        lambda z, x: (z / norm) @ D + c,
    )


def gemma_scope(at: Path) -> Foreign:
    W, b, D, c = weights(4)
    at = at / "layer_3" / "width_16k" / "average_l0_71"
    at.mkdir(parents=True, exist_ok=True)
    named = {"W_enc": W, "b_enc": b, "W_dec": D, "b_dec": c, "threshold": b.abs()}
    arrays: dict[str, Any] = {name: t.numpy() for name, t in named.items()}
    np.savez(at / "params.npz", **arrays)
    return Foreign(at, lambda x: above(x @ W + b, b.abs()), lambda z, x: z @ D + c)


def gemma_scope_2(at: Path) -> Foreign:
    W, b, D, c = weights(4)
    at = at / "transcoder" / "layer_3_width_16k_l0_small_affine"
    S = W[:, :4]
    named = {"w_enc": W, "b_enc": b, "w_dec": D, "b_dec": c, "threshold": b.abs()}
    put(at / "params.safetensors", named | {"affine_skip_connection": S})
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m", "affine_connection": True}
    put_json(at / "config.json", config)
    return Foreign(at, lambda x: above(x @ W + b, b.abs()), lambda z, x: z @ D + c + x @ S)


def llama_scope_v1(at: Path) -> Foreign:
    """A threshold on latents that are in units of x, with decoder rows of norm 1."""
    W, b, D, c = weights()
    at = at / "Llama3_1-8B-Base-L3TC-8x"
    named = {"encoder.weight": W.T, "encoder.bias": b, "decoder.weight": D.T, "decoder.bias": c}
    half = {name: t.to(torch.bfloat16) for name, t in named.items()}
    put(at / "checkpoints" / "final.safetensors", half)
    config = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.8,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 3.0, "out": 5.0},
        "sparsity_include_decoder_norm": True,
        "hook_point_in": "blocks.3.hook_mlp_in",
        "hook_point_out": "blocks.3.hook_mlp_out",
    }
    put_json(at / "hyperparams.json", config)
    W, b, D, c = (t.to(torch.bfloat16).float() for t in (W, b, D, c))
    into, out, norm = math.sqrt(D_IN) / 3, math.sqrt(D_IN) / 5, D.norm(dim=1)

    scaled: Tensor = D * (into / out) / norm[:, None]

    def decode(z: Tensor, x: Tensor) -> Tensor:
        return z @ scaled + c / out

    return Foreign(at, lambda x: above((x @ W + b / into) * norm, 0.8), decode)


def llama_scope_r1(at: Path) -> Foreign:
    W, b, D, c = weights()
    named = {"encoder.weight": W.T, "encoder.bias": b, "decoder.weight": D.T, "decoder.bias": c}
    named["log_jumprelu_threshold"] = b - 0.5
    hook = "blocks.3.hook_resid_post"
    named[f"dataset_average_activation_norm.{hook}"] = torch.tensor(4.0)
    put(at / "sae_weights.safetensors", named)
    config = {"d_model": D_IN, "expansion_factor": 2, "hook_point_in": hook, "act_fn": "jumprelu"}
    config |= {"sparsity_include_decoder_norm": False}
    put_json(at / "config.json", config)
    s = math.sqrt(D_IN) / 4
    return Foreign(
        at, lambda x: above(s * x @ W + b, (b - 0.5).exp()), lambda z, x: (z @ D + c) / s
    )


def llamascopium(at: Path) -> Foreign:
    W, b, D, c = weights()
    named = {"W_E": W, "b_E": b, "W_D": D, "b_D": c}
    named["activation_function.log_jumprelu_threshold"] = b - 0.5
    put(at / "sae_weights.safetensors", named)
    config = {
        "sae_type": "sae",
        "d_model": D_IN,
        "expansion_factor": 2.4,
        "act_fn": "jumprelu",
        "norm_activation": "token-wise",
        "sparsity_include_decoder_norm": True,
        "hook_point_in": "blocks.3.hook_resid_post",
        "hook_point_out": "blocks.3.hook_resid_post",
        "use_glu_encoder": False,
    }
    put_json(at / "config.json", config)
    norm: Tensor = D.norm(dim=1)

    def encode(x: Tensor) -> Tensor:
        pre = (x * math.sqrt(D_IN) / x.norm()) @ W + b
        return above(pre * norm, (b - 0.5).exp()) / norm

    return Foreign(at, encode, lambda z, x: (z @ D + c) * x.norm() / math.sqrt(D_IN))


def openai_gpt2(at: Path) -> Foreign:
    W, b, D, c = weights()
    at.mkdir(parents=True, exist_ok=True)
    state = {
        "pre_bias": c,
        "latent_bias": b,
        "encoder.weight": W.T,
        "decoder.weight": D.T,
        "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
        "latents_activation_frequency": torch.ones(D_SAE),
        "latents_mean_square": torch.zeros(D_SAE),
        "activation": "TopK",
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"},
    }
    torch.save(state, at / "3.pt")

    def encode(x: Tensor) -> Tensor:
        return topk(((x - x.mean()) / (x.std() + 1e-5) - c) @ W + b)

    return Foreign(at / "3.pt", encode, lambda z, x: (z @ D + c) * x.std() + x.mean())


def openai_gpt2_relu(at: Path) -> Foreign:
    W, b, D, c = weights()
    at.mkdir(parents=True, exist_ok=True)
    state = {"pre_bias": c, "latent_bias": b, "encoder.weight": W.T, "decoder.weight": D.T}
    torch.save(state | {"activation": "ReLU"}, at / "0.pt")
    return Foreign(at / "0.pt", lambda x: ((x - c) @ W + b).clamp_min(0), lambda z, x: z @ D + c)


def circuit_tracer(at: Path) -> Foreign:
    W, b, D, c = weights()
    S = W[:, :D_IN]
    for layer in range(2):
        named = {"W_enc": W.T + layer, "b_enc": b, "W_dec": D, "b_dec": c, "W_skip": S.T}
        named["activation_function.threshold"] = b.abs()
        put(at / f"layer_{layer}.safetensors", named)
    config = {
        "model_kind": "transcoder_set",
        "model_name": "google/gemma-2-2b",
        "feature_input_hook": "ln2.hook_normalized",
        "feature_output_hook": "hook_mlp_out",
        "scan": "gemma-2-2b",
    }
    (at / "config.yaml").write_text(yaml.safe_dump(config))
    return Foreign(
        at / "layer_1.safetensors",
        lambda x: above(x @ (W + 1) + b, b.abs()),
        lambda z, x: z @ D + c + x @ S,
    )


def overcomplete(at: Path) -> Foreign:
    W, b, D, _ = weights()
    at.mkdir(parents=True, exist_ok=True)
    state = {
        "encoder.final_block.0.weight": W.T,
        "encoder.final_block.0.bias": b,
        "dictionary._weights": D,
        "dictionary.multiplier": torch.tensor(0.3),
    }
    torch.save(state, at / "sae.pt")
    put_json(at / "overcomplete.json", {"class": "TopKSAE", "top_k": K, "normalization": "l1"})
    rows = D / D.abs().sum(1, keepdim=True) * math.exp(0.3)
    return Foreign(at, lambda x: topk(x @ W + b), lambda z, x: z @ rows)


FOREIGN: dict[str, Callable[[Path], Foreign]] = {
    make.__name__: make
    for make in (
        native,
        sae_lens_gated,
        sae_lens_topk,
        sae_lens_scaled,
        sae_lens_whitened,
        sae_lens_flat,
        sae_lens_skip,
        sae_lens_pursuit,
        sparsify,
        dictionary_learning,
        dictionary_learning_backup,
        dictionary_learning_standard,
        gemma_scope,
        gemma_scope_2,
        llama_scope_v1,
        llama_scope_r1,
        llamascopium,
        openai_gpt2,
        openai_gpt2_relu,
        circuit_tracer,
        overcomplete,
    )
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`any_foreign` is each of these in turn."""
    if "any_foreign" in metafunc.fixturenames:
        metafunc.parametrize("any_foreign", list(FOREIGN), indirect=True)


@pytest.fixture
def any_foreign(request: pytest.FixtureRequest, tmp_path: Path) -> Foreign:
    return FOREIGN[request.param](tmp_path / "foreign")


@pytest.fixture
def foreign() -> dict[str, Callable[[Path], Foreign]]:
    """All of them, to be made where a test wants them."""
    return FOREIGN
