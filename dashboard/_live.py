"""What a run belongs to, opened to be run: its SAE, the language model, the cache of activations.

Everything is on the CPU and in fp32. Axes: row, d.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from saekit import checkpoint
from saekit.activations_cache.model import LanguageModel
from saekit.activations_cache.store import ActivationCache
from saekit.activations_cache.unshuffled import unshuffled
from saekit.dashboard.data import Run, quote
from saekit.errors import SaekitError
from saekit.sae import SAE


@dataclass(frozen=True)
class Origin:
    """Model and hook of an SAE, as far as they are known."""

    model: str | None
    hook: str | None
    fingerprint: str | None = None
    """Of the model's weights; None where nothing says which they were."""

    @classmethod
    def of(cls, run: Run, model: str | None = None, hook: str | None = None) -> "Origin":
        """From the run; `model` and `hook` are for an SAE that does not say."""
        made = run.provenance
        if made is None:
            return cls(model, hook or run.config.get("hook"))
        return cls(made.model, made.hook, made.model_fingerprint)

    def lacking(self, path: Path) -> tuple[str, str] | None:
        """What is missing before the model can be run, and the command with it; else None."""
        if self.model and self.hook:
            return None
        given = [f"--model {quote(self.model) if self.model else 'MODEL'}"]
        given.append(f"--hook {quote(self.hook) if self.hook else 'HOOK'}")
        what = "This SAE does not say which model and hook point it is of: name them."
        return what, f"saekit dashboard {quote(str(path))} {' '.join(given)}"


def load_sae(path: Path) -> SAE:
    """The SAE of a finished run. Raises SaekitError for one that maps to another width."""
    sae = checkpoint.load(path).to(torch.float32)
    if sae.d_in != sae.d_out:
        raise SaekitError(
            f"{path} turns width {sae.d_in} into width {sae.d_out}: it predicts another hook's "
            "activations, and what it gives cannot take the place of what it reads"
        )
    return sae


def load_model(name: str, fingerprint: str | None) -> LanguageModel:
    """The language model of that name. Raises SaekitError where it cannot be loaded, predicts no
    next token, or is not the one with the fingerprint."""
    model = LanguageModel.load(name)
    if fingerprint is not None and model.fingerprint != fingerprint:
        raise SaekitError(
            f"the SAE was trained on weights of '{name}' with fingerprint {fingerprint[:12]}, but "
            f"that name now leads to {model.fingerprint[:12]}: put the old weights back"
        )
    if not model.causal:
        raise SaekitError(
            f"'{name}' is an encoder and predicts no next token: texts are read and steered with "
            "decoders alone"
        )
    return model


def check_width(model: LanguageModel, hook: str, sae: SAE) -> None:
    """Raises SaekitError where the SAE does not fit the hook point."""
    width = model.widths([hook])[hook]
    if width != sae.d_in:
        raise SaekitError(
            f"the SAE reads activations of width {sae.d_in}, and '{hook}' of '{model.name}' has "
            f"width {width}: give the hook point that it was trained on"
        )


def open_cache(run: Run) -> ActivationCache:
    """The cache that a run was trained on, in the order of its text.

    Raises SaekitError where the run does not say which it is, it is not there any more, or it is of
    another model or lacks the hook.
    """
    where = run.config.get("cache")
    if not where:
        raise SaekitError("this SAE does not say which cache of activations it was trained on")
    cache = unshuffled(ActivationCache.open(where))
    made = run.provenance
    if made is not None and made.model_fingerprint != cache.model_fingerprint:
        raise SaekitError(
            f"the SAE was trained on model '{made.model}' (fingerprint "
            f"{made.model_fingerprint[:12]}), and {cache.url} now holds activations of "
            f"'{cache.model}' ({cache.model_fingerprint[:12]})"
        )
    cache.width(run.hook)
    return cache
