"""Models: load one by name, or wrap one that is in memory."""

import logging
import sys
from typing import Any

import torch
from torch import nn

from saekit.activations_cache import architectures, fingerprints
from saekit.activations_cache.model_base import Model
from saekit.activations_cache.model_language import LanguageModel
from saekit.activations_cache.model_module import ModuleModel
from saekit.demo import MODEL_DIR
from saekit.errors import ConfigError, ModelError, first_line

__all__ = ["BACKENDS", "LanguageModel", "Model", "load", "wrap"]

BACKENDS = ("transformers", "transformer_lens")
_RANDOM = "#random="


def load(
    name: str,
    *,
    backend: str = "transformers",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Load "demo" (the embedded model), a folder in transformers format, or a model of the hub.

    `name#random=SEED` is the same architecture with weights as they were before any training, drawn
    anew with that seed: the baseline that says how much of a result is the model's. `backend`
    "transformer_lens" runs a language model through its TransformerBridge. Raises ModelError where
    there is no such model, or it is of an architecture without hook points, and ConfigError for
    another backend or a seed that is no number.
    """
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoTokenizer,
    )

    if backend not in BACKENDS:
        raise ConfigError(f"backend '{backend}' is unknown; there are: {', '.join(BACKENDS)}")
    trained, seed = _without_seed(name)
    path = str(MODEL_DIR) if trained == "demo" else trained
    _quiet_loading()
    try:
        config = AutoConfig.from_pretrained(path)
        kind = _kind(config.model_type) or architectures.find(config.model_type).kind
        if backend == "transformer_lens" and kind == "vision":
            raise ConfigError(f"'{name}' is a vision model: the bridge is for language models")
        if kind == "decoder":
            loader: Any = AutoModelForCausalLM
        else:
            loader = AutoModelForMaskedLM if backend == "transformer_lens" else AutoModel
        if seed is None:
            # Other files of weights are pickles, which can run code as they are read.
            model = loader.from_pretrained(path, dtype=dtype, use_safetensors=True)
        else:
            model = _untrained(loader, config, seed)
        tokenizer = None if kind == "vision" else AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model '{name}' cannot be loaded: {first_line(error)}. Give 'demo', a folder with "
            "config.json, model.safetensors and tokenizer.json, or a hub id"
        ) from error
    if seed is None:
        fingerprint = fingerprints.of_files(path, model)
    else:
        # What a seed draws is another thing with another version of torch or transformers.
        fingerprint = fingerprints.of_module(model)
        for weight in model.parameters():  # buffers stay as precise as they are, as when loaded
            weight.data = weight.data.to(dtype)
    model = model.to(device)
    if kind == "vision":
        from saekit.activations_cache.model_vision import VisionModel, image_processor

        return VisionModel(name, fingerprint, model, image_processor(path))
    if backend == "transformer_lens":
        from saekit.activations_cache.model_bridge import BridgeModel, bridged

        return BridgeModel(name, fingerprint, bridged(name, model, tokenizer), tokenizer)
    return LanguageModel(name, fingerprint, model, tokenizer)


def wrap(
    model: nn.Module, tokenizer: Any = None, name: str = "in-memory", *, processor: Any = None
) -> Model:
    """A model that is already in memory: a transformers model with its tokenizer (a vision model
    with its image processor, or none), a TransformerBridge, or any other module.

    The model is put into evaluation mode and its weights are frozen. Its fingerprint is that of its
    state. Raises ConfigError for a language model without a tokenizer.
    """
    from transformers import PreTrainedModel

    # TransformerLens takes seconds to import; nobody can have a bridge who has not done so.
    lens = sys.modules.get("transformer_lens.model_bridge")
    if lens is not None and isinstance(model, lens.TransformerBridge):
        from saekit.activations_cache.model_bridge import BridgeModel

        known = model.tokenizer if tokenizer is None else tokenizer
        return BridgeModel(name, fingerprints.of_module(model), model, _given(known, name))
    kind = _kind(model.config.model_type) if isinstance(model, PreTrainedModel) else None
    if kind is None:
        return ModuleModel(model, name)
    fingerprint = fingerprints.of_module(model)
    if kind == "vision":
        from saekit.activations_cache.model_vision import VisionModel

        return VisionModel(name, fingerprint, model, processor)
    return LanguageModel(name, fingerprint, model, _given(tokenizer, name))


def _without_seed(name: str) -> tuple[str, int | None]:
    trained, mark, seed = name.partition(_RANDOM)
    if not mark:
        return name, None
    if not seed.isdecimal():
        raise ConfigError(f"'{name}' must end in a seed, a whole number: {trained}{_RANDOM}0")
    return trained, int(seed)


def _untrained(loader: Any, config: Any, seed: int) -> nn.Module:
    """The model of a config, in float32 on the CPU, so that a seed means the same everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = loader.from_config(config, dtype=torch.float32)
    return model.eval()


def _kind(model_type: str) -> str | None:
    if model_type == "clip":
        return "vision"  # the tower inside it
    known = architectures.ARCHITECTURES.get(model_type)
    return None if known is None else known.kind


def _given(tokenizer: Any, name: str) -> Any:
    if tokenizer is None:
        raise ConfigError(f"'{name}' is a language model: give its tokenizer too, tokenizer=...")
    return tokenizer


def _quiet_loading() -> None:
    """transformers draws a bar and logs a report for each load; our own commands say what
    matters."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
