# pyright: reportPossiblyUnboundVariable=false
"""Harvest against the bare forward pass of the same model over the same batches.

    python benchmarks/bench_harvest.py --model demo
    python benchmarks/bench_harvest.py --random gpt-7b --device cuda --out /dev/shm/bench
    python benchmarks/bench_harvest.py --model demo --peers /path/to/a/peer's/python ...

Bare: the model stopped at the last hook point, nothing kept. Harvest: `saekit.harvest` from those
batches to checked shards on the disk. The two take turns in one process. Before anything is timed,
rows of a harvest are compared with what the model computes. With `--peers`, each peer goes from
text to its own kind of cache in a process of its own, and saekit does the same beside it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from _record import (
    FOLDER,
    MIB,
    RESULTS,
    append,
    clear,
    file_system,
    ratio,
    show,
    summary,
    to_host_seconds,
    write_seconds,
)
from peers._driver import folder_bytes, measured

from saekit import HarvestConfig, harvest
from saekit.activations_cache import corpus, tokens
from saekit.activations_cache.config import DTYPES
from saekit.activations_cache.job import Job
from saekit.activations_cache.masks import KINDS
from saekit.activations_cache.model import LanguageModel, wrap
from saekit.activations_cache.tokens import Cursor, TokenBatch
from saekit.demo import MODEL_DIR

PLACES = ("resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_out", "resid_post")
PEER_PLACES = ("attn_out", "mlp_out", "resid_post")
"""Those that every peer can name."""

SIZES: dict[str, dict[str, Any]] = {
    "gpt2-124m": {"model_type": "gpt2", "n_positions": 1024},
    "gpt-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 50_257,
        "max_position_embeddings": 4096,
    },
    "gpt-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11_008,
        "vocab_size": 32_000,
        "max_position_embeddings": 4096,
    },
}
"""Shapes of random models: GPT-2's, and those of Llama's."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help='"demo" or a folder; reads text')
    parser.add_argument("--random", choices=SIZES, help="random weights and tokens instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("bench-harvest"), help="made and removed")
    parser.add_argument("--n-tokens", type=int, default=131_072)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--n-hooks", type=int, default=12)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=DTYPES, help="on disk")
    parser.add_argument("--model-dtype", choices=DTYPES, help="float32 on a CPU, else bfloat16")
    parser.add_argument("--memory-mib", type=float, default=1024.0)
    parser.add_argument("--shard-mib", type=float, default=128.0)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--warm-ups", type=int, default=1)
    parser.add_argument("--stages", action="store_true", help="also time a harvest's parts")
    parser.add_argument("--peers", nargs="*", default=[], help="pythons that have a peer installed")
    parser.add_argument("--peers-only", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def spread(model: LanguageModel, n: int, places: tuple[str, ...] = PLACES) -> tuple[str, ...]:
    """So many hook points, evenly over the model in the order of the pass; the last is the last
    block's output."""
    blocks = 1 + max(int(name.split(".")[1]) for name in model.points if "." in name)
    names = [f"{place}.{layer}" for layer in range(blocks) for place in places]
    names = [name for name in names if name in model.points]
    if n > len(names):
        raise SystemExit(f"--n-hooks {n}: the model has {len(names)} of these places")
    return tuple(names[len(names) - 1 - (n - 1 - i) * len(names) // n] for i in range(n))


def random_model(size: str, device: str, dtype: torch.dtype) -> LanguageModel:
    """Weights are made where they stay."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    values = dict(SIZES[size])
    config = AutoConfig.for_model(values.pop("model_type"), **values, bos_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # Tokens are drawn: a tokenizer is only asked which token begins a window.
    backend = Tokenizer(WordLevel({"<bos>": 0}, unk_token="<bos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")
    wrapped = wrap(model, tokenizer, name=f"random {size}")
    assert isinstance(wrapped, LanguageModel)
    return wrapped


def random_batches(vocab: int, args: argparse.Namespace) -> list[TokenBatch]:
    """Full windows, each a document."""
    shape = args.batch_size, args.context
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(args.context).expand(shape)
    mask = torch.zeros(shape, dtype=torch.long)
    mask[:, 0] |= KINDS["bos"] | KINDS["special"]
    mask[:, -1] |= KINDS["last"]
    batches = []
    for number in range(max(1, args.n_tokens // (shape[0] * shape[1]))):
        ids = torch.randint(1, vocab, shape, generator=generator)
        ids[:, 0] = 0
        n_documents = (number + 1) * shape[0]
        batches.append(
            TokenBatch(
                inputs={"input_ids": ids},
                kept=torch.ones(shape, dtype=torch.bool),
                token=ids,
                position=position,
                mask=mask,
                document=torch.arange(shape[0])[:, None].expand(shape),
                names=tuple(f"random/{i}" for i in range(n_documents - shape[0], n_documents)),
                end=Cursor(n_documents, 0, n_documents * args.context),
            )
        )
    return batches


def text_batches(model: Any, args: argparse.Namespace) -> list[TokenBatch]:
    windows = tokens.windows(
        corpus.documents("demo"), model, context=args.context, n_tokens=args.n_tokens
    )
    return list(tokens.batches(windows, model, args.batch_size, context=args.context))


class _Stop(Exception):
    pass


def bare(model: LanguageModel, batches: list[TokenBatch], last: str) -> float:
    """Seconds of the forward passes alone, stopped at the last hook point by a hook of our own."""

    def stop(*_: Any) -> None:
        raise _Stop

    point = model.points[last]
    module = point.module
    handle = (
        module.register_forward_hook(stop)
        if point.side == "output"
        else module.register_forward_pre_hook(stop)
    )
    begun = time.perf_counter()
    with handle, torch.no_grad():
        for batch in batches:
            inputs = {key: x.to(model.device) for key, x in batch.inputs.items()}
            with suppress(_Stop):
                model.model(**inputs, use_cache=False)
    synchronize(model)
    return time.perf_counter() - begun


def synchronize(model: LanguageModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


class Case:
    """One model, one set of batches, one precision on disk."""

    def __init__(
        self, args: argparse.Namespace, model: LanguageModel, batches: list[TokenBatch], dtype: str
    ) -> None:
        self.args, self.model, self.batches = args, model, batches
        self.n_tokens = sum(batch.n_rows for batch in batches)
        self.cfg = HarvestConfig(
            model=model.name,
            dataset="batches",
            hooks=spread(model, args.n_hooks),
            n_tokens=self.n_tokens,
            context=args.context,
            batch_size=args.batch_size,
            dtype=dtype,  # type: ignore[arg-type]  # argparse knows the choices
            memory_mib=args.memory_mib,
            shard_mib=args.shard_mib,
            device=args.device,
        )
        self.out = args.out / "cache"

    def harvest(self) -> float:
        clear(self.out)
        begun = time.perf_counter()
        harvest(self.cfg, self.out, model=self.model, data=lambda start: iter(self.batches))
        return time.perf_counter() - begun

    def check(self) -> None:
        """Rows on disk are what the model computes."""
        from saekit import ActivationCache

        cache = ActivationCache.open(self.out)
        starts = [0]
        for batch in self.batches:
            starts.append(starts[-1] + batch.n_rows)
        if cache.n_rows != starts[-1]:
            raise SystemExit(f"{cache.n_rows} rows were kept of {starts[-1]}")
        for number in {0, len(self.batches) // 2, len(self.batches) - 1}:
            batch = self.batches[number]
            acts = self.model.capture(batch.inputs, self.cfg.hooks)
            for hook, x in acts.items():
                want = x[batch.kept.to(x.device)].cpu()
                got = cache.row_slice(hook, starts[number], starts[number + 1])
                off = self._off(got, want)
                if not off <= 1:
                    raise SystemExit(f"'{hook}' on disk is not what was computed ({off:.3g})")

    def _off(self, got: torch.Tensor, want: torch.Tensor) -> float:
        """The worst row's distance as a part of what there may be: of int8 rounding to the nearest
        step, of the other types what sums in another order may do."""
        if self.cfg.dtype == "int8":
            want = want.float()
            step = want.abs().amax(1, keepdim=True) / 127
            return float(((got - want).abs() / step).amax() / 0.55)
        want = want.to(DTYPES[self.cfg.dtype]).float()
        return float(((got - want).norm(dim=1) / want.norm(dim=1)).amax() / 0.01)

    def into_memory(self) -> float:
        """A harvest that ends in its buffers: nothing hashed, nothing written."""
        job = Job(self.cfg, self.model)
        rows = job.buffer()
        begun = time.perf_counter()
        for number, batch in enumerate(self.batches):
            if number % job.batches_per_shard == 0:
                rows.clear(Cursor(), 0)
            rows.add(self.model, batch)
        rows.seal()
        synchronize(self.model)
        return time.perf_counter() - begun

    def hooks_alone(self) -> float:
        begun = time.perf_counter()
        for batch in self.batches:
            self.model.visit(batch.inputs, self.cfg.hooks, lambda name, x: None)
        synchronize(self.model)
        return time.perf_counter() - begun

    def run(self) -> dict[str, Any]:
        args, last = self.args, self.cfg.hooks[-1]
        on_gpu = self.model.device.type == "cuda"
        for _ in range(args.warm_ups):
            bare(self.model, self.batches[:4], last)
        bare_s, harvest_s, disk_s, growth, bare_growth = [], [], [], [], []
        for number in range(args.warm_ups + args.pairs):
            with measured() as of_bare:
                bare_s.append(bare(self.model, self.batches, last))
            with measured() as of_harvest:
                harvest_s.append(self.harvest())
            bare_growth.append(of_bare.growth_mib)
            growth.append(of_harvest.growth_mib)
            size = folder_bytes(str(self.out))
            if number == 0:
                self.check()
            clear(self.out)
            disk_s.append(write_seconds(self.args.out, size))
        bare_s, harvest_s, disk_s = (x[args.warm_ups :] for x in (bare_s, harvest_s, disk_s))
        seconds, disk = statistics.median(harvest_s), statistics.median(disk_s)
        case = {
            "op": "harvest",
            "impl": "saekit",
            "against": "bare forward pass",
            "model": self.model.name,
            "model_dtype": str(next(self.model.model.parameters()).dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "hooks": len(self.cfg.hooks),
            "last_hook": last,
            "dtype": self.cfg.dtype,
            "batch_size": args.batch_size,
            "context": args.context,
            "tokens": self.n_tokens,
            "bytes": size,
            "bytes_per_token": round(size / self.n_tokens, 1),
            "seconds": summary(harvest_s),
            "bare_seconds": summary(bare_s),
            "tokens_per_s": round(self.n_tokens / seconds),
            "bare_tokens_per_s": round(self.n_tokens / statistics.median(bare_s)),
            **ratio(harvest_s, bare_s),
            "mb_per_s": round(size / seconds / 1e6, 1),
            "disk_mb_per_s": round(size / disk / 1e6, 1),
            "file_system": file_system(args.out),
            # The rate at which the disk alone would take these rows: no harvest can pass it.
            "disk_tokens_per_s": round(self.n_tokens / disk),
            "memory_mib": args.memory_mib,
            "shard_mib": args.shard_mib,
            "growth_mib": _most(growth),
            "bare_growth_mib": _most(bare_growth),
        }
        if on_gpu:
            copy = to_host_seconds(self.model.device, 512 * MIB)
            case["to_host_mb_per_s"] = round(512 * MIB / copy / 1e6, 1)
            case["gpu_peak_mib"] = round(torch.cuda.max_memory_allocated() / MIB, 1)
            pinned: dict[str, int] = getattr(torch.cuda, "host_memory_stats", dict)()
            case["pinned_mib"] = round(pinned.get("allocated_bytes.peak", 0) / MIB, 1)
        if args.stages:
            parts = {"hooks": self.hooks_alone, "into memory": self.into_memory}
            took: dict[str, list[float]] = {name: [] for name in parts}
            again = []
            for number in range(1 + max(3, args.pairs)):
                plain = bare(self.model, self.batches, last)
                now = {name: part() for name, part in parts.items()}
                if number:
                    again.append(plain)
                    for name, value in now.items():
                        took[name].append(value)
            case["stages"] = {name: ratio(values, again) for name, values in took.items()}
        return case


def _most(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def text_file(path: Path, n_tokens: int) -> None:
    """The corpus as a file that every peer can read, about half as long again as is needed."""
    from saekit.demo.corpus import modules

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        written = 0
        for document in modules():
            # At least two characters make a token of the embedded model.
            if written > 6 * n_tokens:
                break
            written += file.write(json.dumps({"text": document.text}) + "\n")


def told(python: str, driver: str, args: argparse.Namespace, **options: Any) -> dict[str, Any]:
    """What a driver says, run in its own environment."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    hooks = [flag.removeprefix("--hooks=") for flag in flags if flag.startswith("--hooks=")]
    flags = [flag for flag in flags if not flag.startswith("--hooks=")]
    if hooks:
        flags += ["--hooks", *hooks[0].split(",")]
    made = subprocess.run(
        [python, str(FOLDER / "peers" / f"{driver}.py"), *flags, f"--device={args.device}"],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        raise SystemExit(f"{python} {driver}.py failed:\n{made.stderr[-2000:]}")
    record: dict[str, Any] = json.loads(made.stdout.strip().splitlines()[-1])
    return record


def peer_of(python: str) -> str:
    """Which peer an environment has."""
    for package in ("sae_lens", "dictionary_learning"):
        find = f"import importlib.util as i, sys; sys.exit(i.find_spec('{package}') is None)"
        if subprocess.run([python, "-c", find]).returncode == 0:
            return package
    raise SystemExit(f"{python} has neither sae_lens nor dictionary_learning")


def against_peers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Text to activations on disk, each in a process of its own, in turns."""
    folder = MODEL_DIR if args.model == "demo" else Path(args.model)
    model = LanguageModel.load(str(folder))
    several = spread(model, min(args.n_hooks, 12), PEER_PLACES)
    last = several[-1]
    text = args.out / "text.jsonl"
    text_file(text, args.n_tokens)
    peers = {peer_of(python): python for python in args.peers}
    cases = []
    for hooks in ((last,), several):
        rounds: dict[str, list[dict[str, Any]]] = {}
        for _ in range(max(3, args.pairs) if len(hooks) == 1 else 3):
            for name, python in {"saekit": sys.executable, **peers}.items():
                out = args.out / "peer"
                clear(out)
                record = told(
                    python,
                    f"{name}_harvest",
                    args,
                    model=folder,
                    text=text,
                    layer=last.split(".")[1],
                    hooks=",".join(hooks),
                    n_tokens=args.n_tokens,
                    context=args.context,
                    batch_size=args.batch_size,
                    # SAELens cannot keep the others, or says that it cannot.
                    dtype=args.dtype[0],
                    out=out,
                )
                clear(out)
                rounds.setdefault(name, []).append(record)
        cases += [_peer_case(args, folder, name, found) for name, found in rounds.items()]
    return cases


def _peer_case(
    args: argparse.Namespace, folder: Path, name: str, found: list[dict[str, Any]]
) -> dict[str, Any]:
    first = found[0]
    case = {
        "op": "text to disk",
        "impl": name,
        "model": "demo" if folder == MODEL_DIR else str(folder),
        "device": args.device,
        "hooks": first["hooks"],
        "dtype": first.get("dtype"),
        "refused": first.get("refused"),
        "context": args.context,
        "batch_size": args.batch_size,
        "peer_versions": first["versions"],
    }
    if "seconds" not in first:
        return case
    seconds = [record["seconds"] for record in found]
    rate = first["rows"] / statistics.median(seconds)
    return case | {
        "passes": first["passes"],
        "tokens": first["rows"],
        "bytes": first["bytes"],
        "seconds": summary(seconds),
        "tokens_per_s": round(rate),
        "mb_per_s": round(first["bytes"] / statistics.median(seconds) / 1e6, 1),
        "growth_mib": _most([record["growth_mib"] for record in found]),
    }


def show_harvest(lines: list[dict[str, Any]]) -> None:
    columns = ["model", "hooks", "dtype", "bare tok/s", "harvest tok/s", "ratio", "min..max"]
    columns += ["MB/s", "disk MB/s", "growth MiB", "of MiB"]
    show(
        "harvest against the bare forward pass",
        columns,
        [
            (
                f"{line['model']}, {line['device']}",
                str(line["hooks"]),
                line["dtype"],
                f"{line['bare_tokens_per_s']:,}",
                f"{line['tokens_per_s']:,}",
                f"{line['ratio']:.3f}",
                f"{line['ratio_min']:.3f}..{line['ratio_max']:.3f}",
                f"{line['mb_per_s']:,.0f}",
                f"{line['disk_mb_per_s']:,.0f}",
                f"{line['growth_mib'] or 0:,.0f}",
                f"{line['memory_mib']:,.0f}",
            )
            for line in lines
        ],
    )
    for line in lines:
        for stage, found in line.get("stages", {}).items():
            print(
                f"{line['model']} {line['dtype']}: {stage} {found['ratio']:.3f} of the bare pass's "
                f"speed ({found['ratio_min']:.3f}..{found['ratio_max']:.3f})"
            )


def show_peers(lines: list[dict[str, Any]]) -> None:
    show(
        "text to activations on disk",
        ("implementation", "hooks", "passes", "dtype", "tok/s", "MB/s", "growth MiB", "cannot"),
        [
            (
                line["impl"],
                str(line["hooks"]),
                str(line.get("passes", "")),
                line["dtype"] or "",
                f"{line['tokens_per_s']:,}" if "seconds" in line else "",
                f"{line['mb_per_s']:,.1f}" if line.get("bytes") else "",
                f"{line['growth_mib'] or 0:,.0f}" if "seconds" in line else "",
                (line["refused"] or "")[:60],
            )
            for line in lines
        ],
    )


def main() -> None:
    args = arguments()
    harvested, peers = [], []
    if not args.peers_only:
        on_gpu = args.device.startswith("cuda")
        dtype = DTYPES[args.model_dtype or ("bfloat16" if on_gpu else "float32")]
        if args.random:
            model = random_model(args.random, args.device, dtype)
            batches = random_batches(model.model.config.vocab_size, args)
        else:
            model = LanguageModel.load(args.model, args.device, dtype)
            batches = text_batches(model, args)
        for name in args.dtype:
            harvested.append(
                append("harvest", Case(args, model, batches, name).run(), args.results)
            )
    if args.peers:
        peers = [append("harvest", case, args.results) for case in against_peers(args)]
    clear(args.out)
    if peers:
        show_peers(peers)
    if harvested:
        show_harvest(harvested)


if __name__ == "__main__":
    main()
