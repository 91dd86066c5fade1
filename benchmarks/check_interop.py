"""Whether saekit and the tools whose files it reads and writes compute the same, in float32.

    python benchmarks/check_interop.py --pythons sae/bin/python sparsify/bin/python dl/bin/python \
        overcomplete/bin/python
    python benchmarks/check_interop.py --make envs   # makes these environments first, from PyPI

Each tool, in its own environment, trains or builds SAEs and saves them its own way, and says what
they compute on some rows; saekit reads them and must say the same. The other way round saekit
writes SAEs for the tool, and the tool must compute what saekit does. One line for each SAE, in
`results/interop.jsonl`; `docs/interop.md` has the table. Nothing is timed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _record import FOLDER, RESULTS, append, show
from safetensors.torch import load_file, save_file

from saekit import SAE, JumpReLU, MatchingPursuit, ReLU, TopK, interop
from saekit.errors import CheckpointError
from saekit.interop._stored import Stored
from saekit.sae import LayerNorm, UnitRow

PEERS = {
    "sae_lens": ("sae-lens==6.54.12",),
    "sparsify": ("eai-sparsify==1.3.3",),
    "dictionary_learning": ("dictionary-learning==0.1.0",),
    # It asks matplotlib for what 3.9 took away.
    "overcomplete": ("overcomplete==0.3.0", "matplotlib<3.9"),
    "circuit_tracer": ("circuit-tracer==0.5.0",),
}
TORCH = "torch==2.13.0"
"""First, so that nothing else decides which build of it comes."""
REFUSED = {("sae_lens", "matching_pursuit")}
"""What a tool makes and an SAE here cannot hold: SAELens lets the rows of a pursuit's decoder grow
and shrink in training, so that a step may leave more than it found."""
ALLOWED = 1e-5
"""How far two float32 results may be apart, as a share of their row's largest entry."""
D_IN, D_SAE = 16, 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pythons", nargs="*", default=[], help="pythons that have a tool each")
    parser.add_argument("--make", type=Path, help="folder to make environments in, one a tool")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    pythons = [*args.pythons, *(map(str, make_environments(args.make)) if args.make else [])]
    lines = [line for python in pythons for line in check(python)]
    for line in lines:
        append("interop", line, args.results)
    show(
        "interop",
        ["tool", "way", "SAE", "latents apart", "x_hat apart", ""],
        [
            (
                _of(line),
                line["way"],
                line["case"],
                _figure(line, "z"),
                _figure(line, "x_hat"),
                _verdict(line),
            )
            for line in lines
        ],
    )
    failed = sum(not line["passed"] for line in lines)
    print(f"{len(lines) - failed} of {len(lines)} agree to {ALLOWED:g}")
    sys.exit(1 if failed or not lines else 0)


def _of(line: dict[str, Any]) -> str:
    return f"{line['impl']} {next(iter(line['peer_versions'].values()))}"


def _verdict(line: dict[str, Any]) -> str:
    if line.get("refused"):
        return f"refused: {line['refused']}"
    return "pass" if line["passed"] else f"FAIL {line.get('error', '')}"


def _figure(line: dict[str, Any], name: str) -> str:
    return "" if line.get(name) is None else f"{line[name]:.1e}"


def make_environments(folder: Path, names: Collection[str] = tuple(PEERS)) -> list[Path]:
    """One for each tool, made anew where it is not there."""
    made = []
    for name, packages in PEERS.items():
        if name not in names:
            continue
        python = folder / name / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
            for wanted in ((TORCH,), packages):
                command = [str(python), "-m", "pip", "install", "-q", *wanted]
                subprocess.run(command, check=True)
        made.append(python)
    return made


def peer_of(python: str) -> str:
    """Which tool an environment has. Raises SystemExit where it has none of them."""
    names = {name: name for name in PEERS}
    code = f"import importlib.util as u; print([n for n in {list(names)} if u.find_spec(n)])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.replace("'", '"'))
    # circuit-tracer brings what SAELens stands on, not SAELens itself.
    best = [name for name in ("circuit_tracer", *found) if name in found]
    if not best:
        raise SystemExit(f"{python} has none of {', '.join(names)}")
    return str(best[0])


def check(python: str) -> Iterator[dict[str, Any]]:
    """Both ways, of the tool that this Python has."""
    peer = peer_of(python)
    with tempfile.TemporaryDirectory() as scratch:
        theirs, ours = Path(scratch) / "theirs", Path(scratch) / "ours"
        theirs.mkdir()
        told = _drive(python, peer, ["--make", str(theirs)])
        for case in told["made"]:
            line = _about(peer, told, "read", case)
            if (peer, case) in REFUSED:
                yield {**line, **_refused(theirs / case)}
            else:
                yield {**line, **_read(theirs / case)}
        exported = list(_export(peer, ours))
        told = _drive(python, peer, ["--load", *(str(path) for path, *_ in exported)])
        for path, case, sae, x in exported:
            answer = path.parent.with_name(f"{path.parent.name}.expected.safetensors")
            line = _about(peer, told, "written", case)
            if path.name in told["failed"] or not answer.exists():
                yield {**line, "passed": False, "error": told["failed"].get(path.name)}
                continue
            yield {**line, **_compared(load_file(answer), sae.encode(x), sae(x))}


def _about(peer: str, told: dict[str, Any], way: str, case: str) -> dict[str, Any]:
    return {
        "op": "interop",
        "impl": peer,
        "way": way,
        "case": case,
        "peer_versions": told["versions"],
        "dtype": "float32",
        "allowed": ALLOWED,
    }


def _drive(python: str, peer: str, arguments: list[str]) -> dict[str, Any]:
    script = FOLDER / "peers" / f"{peer}_interop.py"
    done = subprocess.run(
        [python, str(script), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{script.name} failed:\n{done.stderr[-3000:]}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@torch.no_grad()
def _read(folder: Path) -> dict[str, Any]:
    """What saekit makes of a folder that the tool saved, beside what the tool computes."""
    expected = load_file(folder.with_name(f"{folder.name}.expected.safetensors"))
    stored: Stored = interop.read_stored(folder)
    sae = interop.folded(stored, folder)
    z = sae.encode(expected["x"])
    return _compared(expected, z if stored.unit is None else z / stored.unit, sae(expected["x"]))


def _refused(folder: Path) -> dict[str, Any]:
    """It passes where saekit says why it cannot be."""
    try:
        interop.read(folder)
    except CheckpointError as error:
        return {"passed": True, "refused": str(error).replace(str(folder), folder.name)}
    return {"passed": False, "error": "it should have been refused"}


def _compared(
    expected: dict[str, torch.Tensor], z: torch.Tensor, x_hat: torch.Tensor
) -> dict[str, Any]:
    """Largest difference of a row over its largest entry, and how many rows exceed what is
    allowed; L0 of both."""
    figures: dict[str, Any] = {}
    apart = 0
    for name, found in (("z", z), ("x_hat", x_hat)):
        a, b = expected[name].double(), found.detach().double()
        relative = (a - b).abs().amax(1) / torch.maximum(a, b).abs().amax(1).clamp_min(1e-12)
        figures[name] = float(relative.max())
        apart = max(apart, int((relative > ALLOWED).sum()))
    l0 = [float((t != 0).sum(1).double().mean()) for t in (expected["z"], z)]
    return {
        **figures,
        "rows": len(z),
        "rows_apart": apart,
        "l0": l0[0],
        "l0_saekit": l0[1],
        "passed": apart == 0 and l0[0] > 0,
    }


def _export(peer: str, out: Path) -> Iterator[tuple[Path, str, SAE, torch.Tensor]]:
    """SAEs of every kind that the format holds, written for the tool; the rows to try them on."""
    torch.manual_seed(0)
    for case, sae in _kinds().items():
        folder = out / case / ("layers.0" if peer == "sparsify" else "sae")
        sae = _without_bias(sae) if peer == "overcomplete" else sae
        try:
            interop.write(sae, folder, peer)
        except CheckpointError:
            continue
        x = 3 * torch.randn(256, D_IN)
        save_file({"x": x}, folder.parent / "expected.safetensors")
        yield folder, case, sae, x


def _kinds() -> dict[str, SAE]:
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN))
    sae = SAE(
        W_dec.T + 0.1 * torch.randn(D_IN, D_SAE),
        torch.randn(D_SAE),
        W_dec,
        torch.randn(D_IN),
        ReLU(),
    )
    jump, top = JumpReLU(torch.rand(D_SAE)), TopK(5)
    wide = replace(sae, W_dec=torch.randn(D_SAE, D_IN - 3), b_dec=torch.randn(D_IN - 3))
    skip = torch.randn(D_IN, D_IN)
    stops = MatchingPursuit(7, rest=2.0, once=True)
    return {
        "relu": sae,
        "topk": replace(sae, activation=top),
        "jumprelu": replace(sae, activation=jump),
        "pursuit": SAE.of_atoms(W_dec, sae.b_dec, MatchingPursuit(7)),
        "pursuit that stops": SAE.of_atoms(W_dec, sae.b_dec, stops),
        "topk, layer norm": replace(sae, activation=top, row_norm=LayerNorm()),
        "jumprelu, unit rows": replace(sae, activation=jump, row_norm=UnitRow()),
        "relu transcoder": wide,
        "jumprelu transcoder": replace(wide, activation=jump),
        "relu, skip": replace(sae, W_skip=skip),
        "jumprelu, skip": replace(sae, W_skip=skip, activation=jump),
        "topk, skip": replace(sae, W_skip=skip, activation=top),
    }


def _without_bias(sae: SAE) -> SAE:
    if isinstance(sae.activation, MatchingPursuit):
        return SAE.of_atoms(sae.W_dec, torch.zeros_like(sae.b_dec), sae.activation)
    return replace(sae, b_dec=torch.zeros_like(sae.b_dec))


if __name__ == "__main__":
    main()
