"""What a model or a tokenizer is, as a short string: equal where they are the same."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from saekit.files import file_sha256


def of_files(path: str, model: Any) -> str:
    """SHA-256 of the config and weights of a local folder; repository and commit for a model of
    the hub. The same in whatever precision the weights are loaded."""
    folder = Path(path)
    if not folder.is_dir():
        return f"{path}@{model.config._commit_hash}"
    digest = sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(file_sha256(file).encode())
    return digest.hexdigest()


def of_module(module: nn.Module) -> str:
    """xxh3_128 of the names, shapes, types and bytes of everything in the module's state."""
    digest = xxhash.xxh3_128()
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            continue
        digest.update(f"{name} {list(value.shape)} {value.dtype} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_tokenizer(tokenizer: Any) -> str:
    """xxh3_128 of what turns text into ids: the tokenizer's own serialisation, its special tokens
    and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        made: dict[str, Any] = json.loads(backend.to_str())
        # Every call with padding or truncation leaves its settings behind in there.
        made = {key: value for key, value in made.items() if key not in ("padding", "truncation")}
    else:
        made = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    told = json.dumps([made, special, tokenizer.chat_template], sort_keys=True)
    return xxhash.xxh3_128(told.encode()).hexdigest()
