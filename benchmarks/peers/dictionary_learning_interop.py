# pyright: reportMissingImports=false
"""dictionary_learning trains SAEs by its own trainSAE, saves and loads them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _interop import D_IN, D_SAE, STEPS, Answer, batches, main
from dictionary_learning.dictionary import AutoEncoderNew, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary
from safetensors.torch import load_file

COMMON = {
    "activation_dim": D_IN,
    "dict_size": D_SAE,
    "layer": 0,
    "lm_name": "given rows",
    "device": "cpu",
    "seed": 0,
}
WARM = {"warmup_steps": 10, "sparsity_warmup_steps": 10}
BUDGET = {"k": 4, "threshold_start_step": STEPS // 2, "warmup_steps": 10}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "standard": (StandardTrainer, {"l1_penalty": 0.05, **WARM}),
    "april": (StandardTrainerAprilUpdate, {"l1_penalty": 0.05, **WARM}),
    "april-new": (
        StandardTrainerAprilUpdate,
        {"l1_penalty": 0.05, **WARM, "dict_class": AutoEncoderNew},
    ),
    "p_anneal": (PAnnealTrainer, {"initial_sparsity_penalty": 0.05, **WARM}),
    "gated": (GatedSAETrainer, {"l1_penalty": 0.05, **WARM}),
    "gated_anneal": (
        GatedAnnealTrainer,
        {"initial_sparsity_penalty": 0.05, **WARM},
    ),
    "jumprelu": (JumpReluTrainer, {"target_l0": 4, **WARM}),
    "topk": (TopKTrainer, BUDGET),
    "batch_topk": (BatchTopKTrainer, BUDGET),
    "matryoshka": (MatryoshkaBatchTopKTrainer, {**BUDGET, "group_fractions": [0.25, 0.75]}),
}


def make(out: Path) -> Iterator[tuple[str, Callable[[torch.Tensor], Answer]]]:
    for name, (trainer, options) in CASES.items():
        for scaled in (False, True):
            case = f"{name}-scaled" if scaled else name
            try:
                trainSAE(
                    batches(),
                    [{"trainer": trainer, "steps": STEPS, **COMMON, **options}],
                    STEPS,
                    save_dir=str(out / case),
                    save_steps=[STEPS - 1],
                    normalize_activations=scaled,
                    device="cpu",
                )
            except AttributeError as error:
                # Some of its classes cannot be scaled back.
                assert scaled and "scale_biases" in str(error), error
                continue
            folder = f"{case}/trainer_0"
            yield folder, of(_loaded(out / folder, name))


def _loaded(folder: Path, name: str) -> Any:
    if name != "april-new":
        return load_dictionary(str(folder), "cpu")[0]
    # Its config names the class that the trainer usually has.
    return AutoEncoderNew.from_pretrained(folder / "ae.pt")


def of(ae: Any) -> Callable[[torch.Tensor], Answer]:
    def compute(x: torch.Tensor) -> Answer:
        z = ae.encode(x)
        return z, ae.decode(z)

    return compute


def load(folder: Path, x: torch.Tensor) -> Answer:
    # It reads pickled files alone, and saekit writes none: its state dict, as safetensors.
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    sizes = (trainer["activation_dim"], trainer["dict_size"])
    ae: Any
    if trainer["dict_class"] == "AutoEncoderTopK":
        ae = AutoEncoderTopK(*sizes, trainer["k"])
    else:
        classes = {"AutoEncoderNew": AutoEncoderNew, "JumpReluAutoEncoder": JumpReluAutoEncoder}
        ae = classes[trainer["dict_class"]](*sizes)
    ae.load_state_dict(load_file(folder / "ae.safetensors"))
    return of(ae)(x)


if __name__ == "__main__":
    main("dictionary-learning", make, load)
