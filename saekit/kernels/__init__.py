"""The ops that sparse autoencoders spend their time in. `reference` defines them; callers use
these."""

from saekit.kernels.eager import sparse_decode, topk_encode

__all__ = ["sparse_decode", "topk_encode"]
