"""sparsify (EleutherAI): a folder of `cfg.json` and `sae.safetensors` for each hook point.

    pre = relu((x - b_dec) @ encoder.weight.T + encoder.bias)       (x itself, for a transcoder)
    z = the k largest of pre,    y = z @ W_dec + b_dec  (+ x @ W_skip.T)

encoder.weight and W_dec are [d_sae, d_in]. The folder's name is the path of the module below the
base model, such as `layers.10`; sparsify finds it by that. delphi reads these folders, too. After
EleutherAI/sparsify 1.3.3, sparse_coder.py.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from saekit.errors import CheckpointError
from saekit.files import write_atomic, write_json
from saekit.interop._files import Tensors, load_json, load_safetensors
from saekit.interop._stored import Stored, uncentred
from saekit.sae import SAE, TopK

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"

FILES = (CONFIG, WEIGHTS)
HOLDS = "TopK; transcoders of one width, with a skip path or without"


def detect(path: Path) -> bool:
    """Whether the folder is one of sparsify's, whole or damaged."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def read(path: Path) -> Stored:
    """Raises CheckpointError for what cannot be held: groupmax, and latents with a sign."""
    options = load_json(path / CONFIG)
    options.must_be("activation", "topk", why="only its TopK has a counterpart here")
    options.must_be("signed", False, why="latents would have a sign")
    k = options.take("k", int)
    transcode = options.take("transcode", bool, False)
    skip = options.take("skip_connection", bool, False)
    d_in = options.take("d_in", int)
    num_latents = options.take("num_latents", int, 0)
    expansion = options.take("expansion_factor", int, 32)
    tensors = Tensors(path / WEIGHTS, load_safetensors(path / WEIGHTS))
    W_enc = tensors.take("encoder.weight", "d_sae", "d_in")
    d_sae = tensors.size("d_sae")
    if (tensors.size("d_in"), d_sae) != (d_in, num_latents or d_in * expansion):
        raise CheckpointError(
            f"{path / WEIGHTS} holds {d_sae} latents of width {tensors.size('d_in')}, {CONFIG} "
            f"says {num_latents or d_in * expansion} of width {d_in}"
        )
    if not 1 <= k <= d_sae:
        raise CheckpointError(f"{path / CONFIG}: k={k} must lie in 1..{d_sae}, the latents")
    b_enc = tensors.take("encoder.bias", "d_sae")
    W_dec = tensors.take("W_dec", "d_sae", "d_in")
    b_dec = tensors.take("b_dec", "d_in")
    W_skip = tensors.take("W_skip", "d_in", "d_in").T if skip else None
    tensors.finish()
    return Stored(
        format="sparsify",
        W_enc=W_enc.T,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        activation=TopK(k),
        W_skip=W_skip,
        centred=not transcode,
        origin={"hookpoint": path.name, "transcode": transcode, **options.scalars()},
    )


def write(sae: SAE, path: Path, origin: dict[str, Any]) -> None:
    """Raises CheckpointError for an SAE that sparsify has no form for."""
    if not isinstance(sae.activation, TopK):
        raise CheckpointError(
            f"sparsify holds TopK alone, and this SAE's activation is "
            f"{type(sae.activation).__name__}: convert to sae_lens in its place"
        )
    if sae.row_norm is not None or sae.d_in != sae.d_out:
        raise CheckpointError(
            "sparsify holds neither rows that are normalised nor an output of another width than "
            "the input: convert to sae_lens in its place"
        )
    # An SAE's bias is subtracted from x there, which is put back into the encoder's bias. With a
    # skip path it is a transcoder's form that holds it.
    transcode = sae.W_skip is not None or origin.get("transcode") is True
    bias = sae.b_enc if transcode else uncentred(sae)
    tensors = {
        "encoder.weight": sae.W_enc.T,
        "encoder.bias": bias,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.T
    contiguous = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_atomic(path / WEIGHTS, lambda file: save_file(contiguous, file))
    config = {
        "activation": "topk",
        # Of no use beside num_latents, but there in every file.
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": bool((sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-3),
        "num_latents": sae.d_sae,
        "k": sae.activation.k,
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": transcode,
        "d_in": sae.d_in,
    }
    write_json(path / CONFIG, config)
