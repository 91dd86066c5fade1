"""The ops that sparse autoencoders spend their time in. `reference` defines them; callers use
these."""

from saekit.kernels._choose import Choice, KernelUnavailable, choose, usual_precision
from saekit.kernels.ops import column_topk, encode, sparse_decode, topk_encode
from saekit.kernels.reference import Code, Rule, merge_repeats, row_offsets, rows_of
from saekit.kernels.sharded import batch_topk, matching_pursuit, row_topk, topk_code

__all__ = [
    "Choice",
    "Code",
    "KernelUnavailable",
    "Rule",
    "batch_topk",
    "choose",
    "column_topk",
    "encode",
    "matching_pursuit",
    "merge_repeats",
    "row_offsets",
    "row_topk",
    "rows_of",
    "sparse_decode",
    "topk_code",
    "topk_encode",
    "usual_precision",
]
