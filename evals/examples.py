"""For every latent: where it fires, how often, how strongly, which tokens it promotes, and which
latents are near to it. Writes the feature store, which report and dashboard read.

In two passes, in bounded memory (see `saekit.features` for what is in the store). The first encodes
the rows once, in stored order; the active latents wait on disk, some 12 bytes each. The second goes
latent by latent over these, and everything that it finds follows from all places where the latent
fires: no batch, no sample. `_features_latents` and `_features_near` say what is found and how.

Several processes share the rows of the first pass, in runs that do not hang on their number, and
the files of the second: the store is that of one process, byte for byte.

Axes: place (tokens of windows, laid end to end), d, d_sae.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy import ndarray

from saekit import checkpoint, features
from saekit.activations_cache.model import LanguageModel
from saekit.errors import ConfigError
from saekit.evals import _features_latents
from saekit.evals._base import Eval, EvalConfig, Findings
from saekit.evals._features_build import Workshop
from saekit.evals._features_near import decoder_neighbours, logit_effects, map_of
from saekit.evals._features_spool import Coded, Spool, Text, Writer
from saekit.evals._features_write import AT_ONCE, Files, write_texts
from saekit.features import FeatureStore, Header
from saekit.results import Metric

_DENSE = 1 << 26
"""Elements of a dense `[rows, d_sae]` tensor while rows are encoded."""

_FREE = ("device", "batch_size")
"""Keys of the config that do not change what is found."""


@dataclass(frozen=True, kw_only=True)
class ExamplesConfig(EvalConfig):
    split: Literal["train", "test", "all"] = "all"
    """Documents to look at. Examples are to be read, not scored, so all of them serve."""

    n_contexts: int = 12
    """Strongest contexts kept for each latent, at most one from each window that the model saw."""

    quantiles: int = 5
    """Groups of the values of a latent, equally many in each, that samples are drawn from."""

    n_samples: int = 4
    """Contexts drawn at random from each quantile."""

    n_silent: int = 6
    """Contexts in which near latents fire most and the latent does not."""

    window: int = 24
    """Tokens of a context, the strongest in the middle where the text allows."""

    bins: int = 24
    """Bins of a latent's histogram, from 0 to its maximum."""

    top: int = 10
    """Promoted, suppressed and input tokens of a latent."""

    near: int = 10
    """Nearest latents of a latent, by decoder rows and by rows where they fire."""

    seed: int = 0
    """Of what is drawn at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_contexts", "window", "bins", "top", "near", "quantiles"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("n_samples", "n_silent", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        if self.quantiles > 100:
            raise ConfigError(f"quantiles={self.quantiles} must be at most 100")


class Examples(Eval):
    Config: ClassVar[type[EvalConfig]] = ExamplesConfig
    NORMALISED = True
    SHARES_ROWS = True
    cfg: ExamplesConfig

    LATENTS_PER_FILE: ClassVar[int] = 4096
    LATENTS_PER_GROUP: ClassVar[int] = 128

    def run(self) -> Findings:
        if self.out is not None:
            return self._report(self.build(self.out))
        if self.mesh.size > 1:
            raise ConfigError(
                f"{self.mesh.size} processes make a feature store in a folder that all of them "
                "see: name one, out=..."
            )
        with tempfile.TemporaryDirectory() as folder:
            return self._report(self.build(Path(folder)))

    def build(self, results: Path) -> FeatureStore:
        """Make the store in a folder of results, or go on where its making stopped.

        Raises SaekitError where another process, which is none of the mesh, is at it.
        """
        shop = Workshop(results, self._plan(), progress=self.progress, mesh=self.mesh)
        with shop.open():
            if not shop.finished():
                self._make(shop)
            # None opens it before rank 0 has moved it.
            self.mesh.numbers([])
        return FeatureStore.open(results)

    def _plan(self) -> dict[str, Any]:
        """What decides what will be in the store."""
        config = self.cfg.to_dict()
        return {
            "version": features.VERSION,
            "sae": checkpoint.fingerprint(self.given),
            "cache": self.cache.fingerprint,
            "hook": self.hook,
            "config": {key: config[key] for key in config if key not in _FREE},
        }

    def _make(self, shop: Workshop) -> None:
        first = self.mesh.rank == 0
        model = self.load_model() if first else None
        (n_vocab,) = self.mesh.numbers([] if model is None else [len(model.vocab)])
        if first:
            Text.kept_in(shop.folder, lambda: Text.of(self.cache, self.cfg))
        shop.meet()
        text = Text.kept_in(shop.folder)
        self._encode(shop, text)
        spool = Spool(shop.folder, text.n_places)
        self._look_around(shop, model, spool, text)
        documents = np.unique(text.document)
        files = Files(
            folder=shop.store,
            header=self._header(text),
            text=text,
            spool=spool,
            known=self._known(shop),
            peaks=shop.arrays("peaks")["place"],
            documents=documents,
            n_vocab=n_vocab,
        )
        self._write(shop, files)
        if model is not None:
            write_texts(shop.store / "vocab.parquet", model.vocab)
            names = [self.cache.documents[at] for at in documents]
            write_texts(shop.store / "documents.parquet", names)
            shop.finish(files.header)

    def _encode(self, shop: Workshop, text: Text) -> None:
        """The first pass, over what is not on disk."""
        mesh, there = self.mesh, Spool.there(shop.folder)
        flat = mesh.numbers([place for bounds in there for place in bounds])
        there = list(zip(flat[::2], flat[1::2], strict=True))
        runs = list(text.runs(there, self.cfg.batch_size))
        first, stop = (len(runs) * n // mesh.data for n in (mesh.data_rank, mesh.data_rank + 1))
        done = sum(int(text.keep[begin:end].sum()) for begin, end in there)
        size = min(self.cfg.batch_size, max(1, _DENSE // self.sae.d_sae))
        writer = Writer(shop.folder, self.sae.d_sae)
        with shop.bar("rows", text.n_rows, done) as told:
            for begin, end in runs[first:stop]:
                kept = begin + np.flatnonzero(text.keep[begin:end])
                coded = self._code(kept, torch.from_numpy(text.row(kept)), size)
                written = writer.add(begin, end, coded)
                told.advance(len(kept))
                if written:
                    told.reached()
            writer.flush()

    def _look_around(
        self, shop: Workshop, model: LanguageModel | None, spool: Spool, text: Text
    ) -> None:
        """Between the passes: what each latent's row needs to know of others. A process each, rank
        0 that for which it has the model."""
        cfg, W_dec = self.cfg, self.sae.W_dec

        def places() -> dict[str, ndarray]:
            near = shop.arrays("neighbours")
            return {"xy": map_of(W_dec, near["near"], near["near_cosine"], shop.works)}

        if model is not None:
            effects = partial(logit_effects, self.sae, model, self.hook, cfg.top, shop.works)
            shop.make("logits", effects)
        shop.make("neighbours", lambda: decoder_neighbours(W_dec, cfg.near, shop.works), by=1)
        shop.make("map", places, by=1)
        shop.make("peaks", lambda: {"place": self._peaks(spool, text, shop.works)}, by=2)
        shop.meet()

    def _known(self, shop: Workshop) -> dict[str, ndarray]:
        """Columns of the latents' rows that are known before the second pass."""
        near, place = shop.arrays("neighbours"), shop.arrays("map")["xy"]
        known = shop.arrays("logits") | near
        known |= {"nearest_cosine": near["near_cosine"][:, :1].sum(1)}
        return known | {"x": place[:, 0], "y": place[:, 1]}

    def _write(self, shop: Workshop, files: Files) -> None:
        """The second pass, over the files that are not there."""
        left = self.mesh.numbers([n for n in range(files.count) if not files.there(n)])
        sizes = {number: last - first for number in left for first, last in [files.bounds(number)]}
        with shop.bar("latents", self.sae.d_sae, self.sae.d_sae - sum(sizes.values())) as told:
            for number in told.dealt(left):
                for step in files.write(number):
                    told.advance(step)
                told.reached()

    def _code(self, place: ndarray, row: torch.Tensor, size: int) -> Coded:
        """What the SAE makes of some rows, given their places."""
        mean = self._mean()
        parts: list[list[torch.Tensor]] = [
            [torch.zeros(0, dtype=torch.long)] * 2 + [torch.zeros(0)] * 3
        ]
        for some in torch.split(row, size):
            x = self.cache.rows(self.hook, some).to(self.device)
            code = self.sae.encode_sparse(x)
            active = code.values != 0
            error = (x - self.sae.decode(code)).square().sum(1)
            spread = (x - mean).square().sum(1)
            made = [active.sum(1), code.indices[active], code.values[active], error, spread]
            parts.append([tensor.cpu() for tensor in made])
        found = [torch.cat(part).numpy() for part in zip(*parts, strict=True)]
        return Coded(np.repeat(place, found[0]), found[1], found[2], place, found[3], found[4])

    def _mean(self) -> torch.Tensor:
        return torch.as_tensor(self.cache.stats(self.hook).mean).to(self.device, torch.float32)

    def _peaks(self, spool: Spool, text: Text, works: Callable[[], object]) -> ndarray:
        """Places where each latent is strongest, as many as there are silent contexts; -1 for no
        more."""
        peaks = np.full((self.sae.d_sae, max(1, self.cfg.n_silent)), -1)
        for first, last in spool.chunks(0, self.sae.d_sae, AT_ONCE):
            found = _features_latents.peaks(spool.actives(first, last), text, peaks.shape[1])
            peaks[first + found.latent, found.rank] = found.place
            works()
        return peaks

    def _header(self, text: Text) -> Header:
        cfg = self.cfg
        return Header(
            d_sae=self.sae.d_sae,
            hook=self.hook,
            model=self.cache.model,
            n_rows=text.n_rows,
            split=cfg.split,
            exclude=cfg.exclude,
            sae_fingerprint=checkpoint.fingerprint(self.given),
            cache_fingerprint=self.cache.fingerprint,
            config=asdict(cfg),
            n_contexts=cfg.n_contexts,
            window=cfg.window,
            quantiles=cfg.quantiles,
            latents_per_file=self.LATENTS_PER_FILE,
            latents_per_group=self.LATENTS_PER_GROUP,
        )

    def _report(self, store: FeatureStore) -> Findings:
        n, d_sae = store.header.n_rows, store.d_sae
        where = f"the first {n} rows of split '{self.cfg.split}'"
        tops = store.top_tokens.reshape(d_sae, self.cfg.n_contexts, -1)[..., 0]
        return Findings(
            metrics={
                "latents_with_examples": Metric(
                    value=float((store.column("maximum") > 0).sum()),
                    definition=f"latents with a value above 0 on {where}",
                    n=n,
                ),
                "examples": Metric(
                    value=float((tops < len(store.vocab)).sum()),
                    definition=f"strongest windows kept, at most {self.cfg.n_contexts} a latent, "
                    f"of {where}",
                    n=n,
                ),
            },
        )


EVAL = Examples
