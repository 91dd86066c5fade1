"""Gemma Scope (Gemma 2): `params.npz` with W_enc [d_in, d_sae], W_dec, b_enc, b_dec and threshold,
in capital or in small letters.

    pre = x @ W_enc + b_enc,    z = relu(pre) where pre > threshold,    x_hat = z @ W_dec + b_dec

b_dec is not subtracted from x. Where x is taken says the path on the hub alone: SAEs of the
attention read the concatenated heads (hook_z), transcoders what ln2 gives out, and those of the
embedding the embedding times sqrt(d_model), which is what enters layer 0.
"""

from pathlib import Path

from saekit.interop._files import Tensors, load_npz
from saekit.interop._stored import Stored
from saekit.sae import JumpReLU

WEIGHTS = "params.npz"
FILES = (WEIGHTS,)
HOLDS = "JumpReLU; transcoders"


def detect(path: Path) -> bool:
    """Whether it is such a file, or a folder with one."""
    return path.name == WEIGHTS or (path / WEIGHTS).is_file()


def read(path: Path) -> Stored:
    """Raises CheckpointError for other arrays than these."""
    file = path / WEIGHTS if path.is_dir() else path
    found = load_npz(file)
    names = {name.lower(): name for name in found}
    tensors = Tensors(
        file, found if len(names) < len(found) else {low: found[n] for low, n in names.items()}
    )
    W_enc = tensors.take("w_enc", "d_in", "d_sae")
    W_dec = tensors.take("w_dec", "d_sae", "d_out")
    b_enc = tensors.take("b_enc", "d_sae")
    b_dec = tensors.take("b_dec", "d_out")
    threshold = tensors.take("threshold", "d_sae")
    tensors.finish()
    return Stored(
        format="gemma_scope",
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        activation=JumpReLU(threshold),
        origin={"folder": "/".join(file.absolute().parts[-5:-1])},
    )
