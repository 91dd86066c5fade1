# pyright: reportMissingImports=false
"""SAELens trains, builds, saves and loads SAEs."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _interop import BATCH, D_IN, D_SAE, STEPS, Answer, batches, main
from sae_lens import SAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer, SAETrainerConfig

SIZES = {"d_in": D_IN, "d_sae": D_SAE}
TRAINED: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 0.1},
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "matryoshka_batchtopk": {"k": 4, "matryoshka_widths": [16, D_SAE]},
    "jumprelu": {"l0_coefficient": 0.05},
    "gated": {"l1_coefficient": 0.1},
    "matching_pursuit": {"max_iterations": 6},
}
TRANSCODERS = (
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)


def make(out: Path) -> Iterator[tuple[str, Callable[[torch.Tensor], Answer]]]:
    for name, options in TRAINED.items():
        sae = train(name, options)
        sae.save_inference_model(out / name)
        yield name, of(SAE.load_from_disk(out / name))
        if name in ("topk", "batchtopk", "gated"):
            # As a checkpoint has it, before it is made ready for use.
            sae.save_model(out / f"{name}-unfinished")
            yield f"{name}-unfinished", of(SAE.load_from_disk(out / name))
    for how in ("layer_norm", "constant_norm_rescale"):
        yield save(out, f"topk-{how}", "topk", k=4, normalize_activations=how)
    for once in (True, False):
        yield pursuit(out, once)
    yield save(out, "standard-uncentred", "standard", apply_b_dec_to_input=False)
    yield save(out, "topk-by-norm", "topk", k=4, rescale_acts_by_decoder_norm=True)
    for name in TRANSCODERS:
        yield save(out, name, name, d_out=D_IN - 3, apply_b_dec_to_input=False)
    for how in ("expected_average_only_in", "covariance_whitening"):
        yield scaled(out, how)
    yield flat(out)


def train(name: str, options: dict[str, Any]) -> Any:
    sae_class, config_class = get_sae_training_class(name)
    sae: Any = sae_class(config_class(**SIZES, **options))
    config = SAETrainerConfig(
        total_training_samples=STEPS * BATCH, train_batch_size_samples=BATCH, lr=1e-2, lr_end=1e-3
    )
    SAETrainer(config, sae, batches()).fit()
    return sae


def built(name: str, **options: Any) -> Any:
    """An SAE with weights drawn at random, biases and thresholds too."""
    sae_class, config_class = get_sae_class(name)
    sae: Any = sae_class(config_class(**SIZES, **options))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    return sae


def save(out: Path, case: str, name: str, **options: Any) -> tuple[str, Any]:
    built(name, **options).save_model(out / case)
    return case, of(SAE.load_from_disk(out / case))


def pursuit(out: Path, once: bool) -> tuple[str, Any]:
    """With rows of norm 1, which its training does not keep."""
    options = {"max_iterations": 9, "residual_threshold": 1.0, "stop_on_duplicate_support": once}
    sae = built("matching_pursuit", **options)
    sae.W_dec.data = torch.nn.functional.normalize(sae.W_dec.data)
    case = f"pursuit-{'once' if once else 'again'}"
    sae.save_model(out / case)
    return case, of(SAE.load_from_disk(out / case))


def scaled(out: Path, how: str) -> tuple[str, Any]:
    """A checkpoint whose scaling the SAE itself knows nothing of."""
    sae = built("standard", normalize_activations=how)
    sae.save_model(out / how)
    scaler = ActivationScaler()
    if how == "covariance_whitening":
        scaler.estimate_whitening(D_IN, batches(), n_batches_for_norm_estimate=20)
    else:
        scaler.scaling_factor = 0.37
    scaler.save(str(out / how / "activation_scaler.json"))

    def compute(x: torch.Tensor) -> Answer:
        z = sae.encode(scaler.scale(x))
        return z, scaler.unscale(sae.decode(z))

    return how, compute


def flat(out: Path) -> tuple[str, Any]:
    """A config of before version 6."""
    built("topk", k=4).save_model(out / "flat")
    old = {
        **SIZES,
        "architecture": "standard",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 4},
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "hook_name": "blocks.0.hook_resid_post",
        "model_name": "gpt2",
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
        "context_size": 128,
    }
    (out / "flat" / "cfg.json").write_text(json.dumps(old))
    return "flat", of(SAE.load_from_disk(out / "flat"))


def of(sae: Any) -> Callable[[torch.Tensor], Answer]:
    def compute(x: torch.Tensor) -> Answer:
        return sae.encode(x), sae(x)

    return compute


def load(folder: Path, x: torch.Tensor) -> Answer:
    return of(SAE.load_from_disk(folder))(x)


if __name__ == "__main__":
    main("sae-lens", make, load)
