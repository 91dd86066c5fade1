"""Things that many tests need: real, small, made here, offline."""

import json
import multiprocessing
import runpy
import socket
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers import trainers as tokenizer_trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from saekit import ActivationCache, HarvestConfig, evaluate, harvest, train
from saekit.trainers.topk import TopKConfig

# Tensors here are so small that a second thread costs more than it brings.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Ranks:
    """Processes that work together, as torchrun would start them."""

    processes: list[ForkServerProcess]

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Until all have ended; returns their exit codes. Who has not by then is killed."""
        for process in self.processes:
            process.join(seconds)
        return self.kill()

    def kill(self) -> list[int | None]:
        for process in self.processes:
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]


@pytest.fixture(scope="session")
def start_ranks() -> Callable[..., Ranks]:
    """Starts n processes that run a script by `runpy.run_path`, whose globals are what is given and
    ENV: the environment that says who each is. What `preload` names is imported once for all."""

    def start(n: int, script: Path, preload: tuple[str, ...] = (), **given: Any) -> Ranks:
        context = multiprocessing.get_context("forkserver")
        # Of no effect once the server runs: it is for whoever comes first.
        context.set_forkserver_preload(["saekit.cli", "saekit.evals._base", *preload])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        processes = []
        for rank in range(n):
            env = {"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = context.Process(
                target=runpy.run_path, args=(str(script), {**given, "ENV": env})
            )
            process.start()
            processes.append(process)
        return Ranks(processes)

    return start


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Forty short documents, each of another length."""
    subjects = ("the cat", "a dog", "our bird", "one fish", "that cow")
    verbs = ("sees", "likes", "hears", "finds")
    pairs = [f"{subject} {verb}" for subject in subjects for verb in verbs]
    return [
        " and ".join(f"{pairs[(7 * i + j) % 20]} number {i * j}" for j in range(1 + i % 6))
        for i in range(40)
    ]


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A two-layer GPT-2 with random weights and a byte-level BPE, as a folder in transformers
    format."""
    folder = tmp_path_factory.mktemp("tiny_lm")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizer_trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<bos>", pad_token="<bos>"
    )
    fast.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(fast),
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        for parameter in model.parameters():
            # Far from the usual start, so that what stands before a token changes its logits.
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tiny_lm: Path, corpus_file: Path) -> HarvestConfig:
    return HarvestConfig(
        model=str(tiny_lm),
        dataset=str(corpus_file),
        hooks=("resid_post.0", "attn_z.1", "mlp_out.1"),
        n_tokens=900,
        context=24,
        batch_size=4,
        holdout=0.25,
        shard_mib=0.041,  # four batches
    )


@pytest.fixture(scope="session")
def tiny_cache(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: HarvestConfig
) -> ActivationCache:
    """Nine hundred rows at three hook points, in several shards."""
    return harvest(tiny_config, tmp_path_factory.mktemp("caches") / "tiny")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_cache: ActivationCache) -> Path:
    """A finished TopK run on the tiny cache, with the results of every evaluation."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    cfg = TopKConfig(d_sae=64, k=4, n_tokens=20_000, batch_size=128, dead_after=2_000)
    sae = train(cfg, tiny_cache, hook="resid_post.0", out=run)
    for name in ("core", "examples"):
        evaluate(name, sae, tiny_cache, out=run / "results")
    return run
