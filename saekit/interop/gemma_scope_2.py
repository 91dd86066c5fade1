"""Gemma Scope 2 (Gemma 3): `params.safetensors` with w_enc [d_in, d_sae], w_dec [d_sae, d_out],
b_enc, b_dec, threshold and, in some transcoders, affine_skip_connection [d_in, d_out]; a
`config.json` beside it in most folders.

    pre = x @ w_enc + b_enc,    z = relu(pre) where pre > threshold
    y = z @ w_dec + b_dec  (+ x @ affine_skip_connection)
"""

from pathlib import Path
from typing import Any

from saekit.errors import CheckpointError
from saekit.interop._files import Tensors, load_json, load_safetensors
from saekit.interop._stored import Stored
from saekit.sae import JumpReLU

WEIGHTS = "params.safetensors"
CONFIG = "config.json"
FILES = (WEIGHTS, CONFIG)
HOLDS = "JumpReLU; transcoders, with a skip path or without"


def detect(path: Path) -> bool:
    """Whether it is such a file, or a folder with one."""
    return path.name == WEIGHTS or (path / WEIGHTS).is_file()


def read(path: Path) -> Stored:
    """Raises CheckpointError for crosscoders and cross-layer transcoders, which have more than one
    output."""
    file = path / WEIGHTS if path.is_dir() else path
    origin = _origin(file.parent / CONFIG)
    found = load_safetensors(file)
    tensors = Tensors(file, found)
    if (w_dec := found.get("w_dec")) is not None and w_dec.ndim == 3:
        raise CheckpointError(
            f"{file}: w_dec has shape {list(w_dec.shape)}, as of a crosscoder or a cross-layer "
            "transcoder: an SAE here has one input and one output"
        )
    W_enc = tensors.take("w_enc", "d_in", "d_sae")
    W_dec = tensors.take("w_dec", "d_sae", "d_out")
    b_enc = tensors.take("b_enc", "d_sae")
    b_dec = tensors.take("b_dec", "d_out")
    threshold = tensors.take("threshold", "d_sae")
    W_skip = tensors.take_if("affine_skip_connection", "d_in", "d_out")
    tensors.finish()
    return Stored(
        format="gemma_scope_2",
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        activation=JumpReLU(threshold),
        W_skip=W_skip,
        origin=origin,
    )


def _origin(config: Path) -> dict[str, Any]:
    about: dict[str, Any] = {"folder": "/".join(config.absolute().parts[-4:-1])}
    if not config.is_file():
        return about
    options = load_json(config)
    options.must_be("architecture", "jump_relu", "jumprelu", why="Gemma Scope 2 has JumpReLU alone")
    return {**about, **options.scalars()}
