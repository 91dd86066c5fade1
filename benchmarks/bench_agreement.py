"""The core evaluation beside SAELens's own, of the same SAEs, tokens and mask.

    python benchmarks/bench_agreement.py --python sae/bin/python   # a minute on two cores
    python benchmarks/bench_agreement.py --make envs   # makes that environment first, from PyPI
    python benchmarks/table.py                         # the table of docs/peers.md

Documents are cut to their first full window, as SAELens takes windows of one length only. SAEs of
three kinds are trained by us, and given to both. SAELens runs twice, in one batch and in several,
as some of its numbers are means over batches. One line for each kind.
"""

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from _evals_page import SAME
from _record import FOLDER, RESULTS, append
from check_interop import make_environments
from rich.progress import track
from safetensors.torch import save_file

import saekit.demo
from saekit import SAE, ActivationCache, HarvestConfig, JumpReLU, TopK, evaluate, harvest, train
from saekit.activations_cache.model import LanguageModel
from saekit.config import TrainConfig
from saekit.demo import corpus
from saekit.evals.core import CoreConfig
from saekit.results import EvalResult
from saekit.trainers import kind

NAME = "agreement"
HOOK, THEIRS = "resid_post.2", "transformer.h.2"
"""The same place by both names."""
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"k": 32},
    "jumprelu": {"target_l0": 32.0},
    "relu": {"target_l0": 32.0},
}


def windows(cache: ActivationCache, context: int) -> torch.Tensor:
    """The cache's tokens, all of whose windows must be full."""
    found = list(cache.windows("all"))
    assert all(len(window.tokens) == context for window in found)
    return torch.stack([window.tokens for window in found])


def full_documents(context: int, n: int) -> list[str]:
    """Texts that fill a window, so that nothing is padded."""
    model = LanguageModel.load("demo")
    texts: list[str] = []
    for document in corpus.modules():
        if len(model.tokenizer(document.text[: 40 * context])["input_ids"]) > context:
            texts.append(document.text[: 40 * context])
        if len(texts) == n:
            return texts
    raise SystemExit(f"the corpus has {len(texts)} modules of {context} tokens, not {n}")


def theirs(
    python: str, sae: SAE, tokens: torch.Tensor, batches: int, folder: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """What SAELens finds, and which versions of what found it."""
    weights = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    how = sae.activation
    if isinstance(how, JumpReLU):
        weights["threshold"] = how.threshold
    job = {
        "activation": type(how).__name__.lower(),
        "k": how.k if isinstance(how, TopK) else None,
        "hook": THEIRS,
        "batches": batches,
    }
    save_file({name: t.contiguous() for name, t in weights.items()}, folder / "sae.safetensors")
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    out = folder / "found.json"
    command = [python, str(FOLDER / "peers" / "sae_lens_eval.py")]
    command += ["--sae", str(folder / "sae.safetensors")]
    command += ["--tokens", str(folder / "tokens.safetensors")]
    command += ["--model", str(Path(saekit.demo.__file__).parent / "model")]
    command += ["--job", json.dumps(job), "--out", str(out)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    versions: dict[str, str] = json.loads(said.splitlines()[-1])["versions"]
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found, versions


def compared(args: argparse.Namespace, name: str, cache: ActivationCache, folder: Path) -> None:
    options = {"d_sae": 1024, "n_tokens": args.train_tokens, "batch_size": 1024, "lr": 4e-3}
    options |= {"dead_after": 100_000, "life_windows": 0, **KINDS[name]}
    config: TrainConfig = kind(name).Config.from_dict(options)
    sae = train(config, cache)
    tokens = windows(cache, args.context)
    ours = evaluate(
        "core",
        sae,
        cache,
        # No intervals: SAELens has none.
        config=CoreConfig(split="all", ce_tokens=tokens.numel(), n_bootstrap=0, device="cpu"),
    )
    one, versions = theirs(args.python, sae, tokens, 1, folder)
    several, _ = theirs(args.python, sae, tokens, args.batches, folder)
    line = line_of(name, sae, ours, one, several, tokens, args.batches, versions)
    line["their_way_in_batches"] = their_way(sae, cache, tokens, args.batches)
    append(NAME, line, args.results)


def their_way(
    sae: SAE, cache: ActivationCache, tokens: torch.Tensor, batches: int
) -> dict[str, float]:
    """The numbers that differ, reckoned by us as SAELens's source reckons them."""
    model = LanguageModel.load("demo")
    keep = torch.stack([window.keep for window in cache.windows("all")])
    assert keep[:, 1:].all() and not keep[:, 0].any(), "one special token, the first of a window"
    ablated, kl, legacy, bias = ([] for _ in range(4))
    with torch.no_grad():
        for some, kept in zip(tokens.chunk(batches), keep.chunk(batches), strict=True):
            seen: list[torch.Tensor] = []

            def spliced(
                x: torch.Tensor, kept: torch.Tensor = kept, seen: list[torch.Tensor] = seen
            ) -> torch.Tensor:
                seen.append(x[kept])
                x = x.clone()
                x[kept] = sae(x[kept])
                return x

            ids = some.long()
            clean, edited, zero = (
                model.logits(ids, hooks).log_softmax(-1)
                for hooks in ({}, {HOOK: spliced}, {HOOK: torch.zeros_like})
            )
            # The special token too is set to zero.
            targets = ids[:, 2:, None]
            ablated.append(-zero[:, 1:-1].gather(2, targets).flatten())
            # A window's last token counts, which has none to predict.
            kl.append((clean.exp() * (clean - edited)).sum(-1)[kept])
            x = seen[0]
            x_hat = sae(x)
            spread = (x - x.mean(0)).square().sum(1)
            legacy.append(1 - (x - x_hat).square().sum(1) / spread)
            bias.append((x_hat.square().sum(1).mean() / (x * x_hat).sum(1).mean())[None])
    found = {
        "ce_loss_with_ablation": ablated,
        "kl_div_with_sae": kl,
        "explained_variance_legacy": legacy,
        "relative_reconstruction_bias": bias,
    }
    return {name: float(torch.cat(values).double().mean()) for name, values in found.items()}


def line_of(
    name: str,
    sae: SAE,
    ours: EvalResult,
    one: dict[str, Any],
    several: dict[str, Any],
    tokens: torch.Tensor,
    batches: int,
    versions: dict[str, str],
) -> dict[str, Any]:
    density = torch.from_numpy(ours.arrays["density"])
    apart = (density - torch.tensor(one["density"])).abs().max()
    return {
        "op": "core",
        "impl": "sae_lens",
        "kind": name,
        "device": "cpu",
        "hook": HOOK,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "windows": list(tokens.shape),
        "batches": batches,
        "peer_versions": versions,
        "ours": {key: ours.metrics[key].value for key in SAME.values() if key in ours.metrics},
        "theirs": {key: _number(one["metrics"][key]) for key in SAME},
        "theirs_in_batches": {key: _number(several["metrics"][key]) for key in SAME},
        "density_apart": float(apart),
    }


def _number(value: float) -> float | None:
    """None for NaN: lines are plain JSON."""
    return value if math.isfinite(value) else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--python", help="a Python that has sae-lens installed")
    which.add_argument("--make", type=Path, help="folder to make an environment in that has it")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batches", type=int, default=8, help="of the second run")
    parser.add_argument("--train-tokens", type=int, default=100_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.make:
        (python,) = make_environments(args.make, ["sae_lens"])
        args.python = str(python)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = full_documents(args.context, args.windows)
        text = folder / "text.jsonl"
        lines = (json.dumps({"text": one}) + "\n" for one in texts)
        text.write_text("".join(lines), encoding="utf-8")
        config = HarvestConfig(
            dataset=str(text),
            hooks=(HOOK,),
            context=args.context,
            layout="truncate",
            dtype="float32",
            holdout=0.0,
            device="cpu",
        )
        cache = harvest(config, folder / "cache")
        for name in track(args.kinds, "kinds"):
            compared(args, name, cache, folder)


if __name__ == "__main__":
    main()
