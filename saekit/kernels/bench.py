"""What `saekit bench` runs: how long the ops and whole training steps of TopK and BatchTopK SAEs
take on this machine, beside plain PyTorch, and the table of what was found.

Before anything is timed it is checked. How it is measured: `bench_setting`; what: `bench_ops` and
`bench_steps`; other libraries': `bench_peers`.
"""

from collections.abc import Iterable, Iterator

from saekit.errors import first_line
from saekit.kernels.bench_ops import check_ops, ops
from saekit.kernels.bench_setting import PLAIN, Line, Setting
from saekit.kernels.bench_steps import BATCH_TOPK, TOPK, check_steps, steps

COLUMNS = ("shape", "what", "ms", "min..max", "tokens/s", "GiB", f"times {PLAIN}")


def every(setting: Setting, *, peers: bool = False) -> Iterator[Line]:
    """The ops and the steps of a shape; those of other libraries, too, that are installed."""
    check_ops(setting)
    check_steps(setting)
    yield from ops(setting)
    for op in (TOPK, BATCH_TOPK):
        yield from steps(setting, op)
    if peers:
        yield from peer_steps(setting)


def peer_steps(setting: Setting) -> Iterator[Line]:
    """A peer's failure is a line, too."""
    from saekit.kernels import bench_peers

    shape = setting.shape
    sizes = (shape.d_in, shape.d_sae, shape.k, setting.batch_size)
    for name, mode, make in bench_peers.peers(*sizes, setting.following):
        try:
            line = setting.measure(TOPK, name, make, mode)
        except Exception as error:
            line = setting.line(TOPK, name, mode, ms=None, error=first_line(error))
        yield line


def rows(lines: Iterable[Line]) -> Iterator[tuple[str, ...]]:
    """Lines of results as a table under COLUMNS. GiB: memory at its fullest."""
    for line in lines:
        sizes = f"{line['d_in']} {line['d_sae']} {line['k']}"
        what = ", ".join(filter(None, (line["op"], line["impl"], line["variant"])))
        if line["ms"] is None:
            yield line["shape"] or sizes, f"{what}: {line['error']}", "-", "", "", "", ""
            continue
        yield (
            line["shape"] or sizes,
            what,
            _short(line["ms"]),
            f"{_short(line['ms_min'])}..{_short(line['ms_max'])}",
            f"{line['tokens_per_s']:,}" if "tokens_per_s" in line else "",
            f"{line['peak_gib']:.2f}" if "peak_gib" in line else "",
            f"{line['ratio']:.2f}" if "ratio" in line else "",
        )


def _short(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.3g}"
