"""Language models: load one by name, read the activations inside it, or replace them on the way
through.

The only module here that knows transformers. Axes: batch (windows), pos (tokens of a window,
padded on the right), d (width of a hook point), vocab.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.activations_cache import hooks
from saekit.demo import MODEL_DIR
from saekit.errors import ConfigError, ModelError, first_line
from saekit.files import file_sha256


class _Stop(Exception):
    """Raised inside a forward pass once everything asked for has been seen."""


class LanguageModel:
    """A causal language model of transformers, its tokenizer, and its hook points."""

    def __init__(self, name: str, fingerprint: str, model: Any, tokenizer: Any) -> None:
        self.name = name
        self.fingerprint = fingerprint
        """What the weights are: the same wherever and in whatever precision they are loaded."""
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.config: Any = model.config
        self.points = hooks.hook_points(model, self.config.model_type)

    @classmethod
    def load(
        cls, name: str, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "LanguageModel":
        """Load "demo" (the embedded model), a folder in transformers format, or a model of the hub.

        Raises ModelError where there is no such model, or it is of an architecture without hook
        points.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = str(MODEL_DIR) if name == "demo" else name
        _quiet_loading()
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model '{name}' cannot be loaded: {first_line(error)}. Give 'demo', a folder with "
                "config.json, model.safetensors and tokenizer.json, or a hub id"
            ) from error
        return cls(name, _fingerprint(path, model), model.to(device), tokenizer)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @cached_property
    def context(self) -> int:
        """The most tokens that the model can look at once."""
        return int(self.config.max_position_embeddings)

    @cached_property
    def bos(self) -> int:
        """The token that every window begins with."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ModelError(
            f"the tokenizer of '{self.name}' has neither a beginning- nor an end-of-sequence "
            "token: "
            "set bos_token in its tokenizer_config.json"
        )

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of the tokenizer's special tokens."""
        return frozenset(self.tokenizer.all_special_ids) | {self.bos}

    @cached_property
    def vocab(self) -> list[str]:
        """Every token as text, by id; ids that the tokenizer does not know are empty."""
        known = len(self.tokenizer)
        texts = self.tokenizer.batch_decode([[i] for i in range(known)])
        return [*texts, *[""] * (int(self.config.vocab_size) - known)]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, and nothing else: "<bos>" in a text is five characters."""
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def widths(self, names: Sequence[str] | None = None) -> dict[str, int]:
        """Width of the activation at the named hook points, or at every one of the model."""
        names = list(self.points) if names is None else names
        probe = torch.full((1, 1), self.bos, device=self.device)
        seen = self.capture(probe, names)
        return {name: seen[name].shape[-1] for name in names}

    @torch.no_grad()
    def capture(
        self, ids: Int[Tensor, "batch pos"], names: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos _"]]:
        """Activations at the named hook points. The model runs no further than the last of them.

        Rows may be padded on the right with any token: attention is causal, so padding never
        reaches what stands before it. Raises ModelError for a hook point that the model lacks.
        """
        seen: dict[str, Tensor] = {}
        wanted = {name: hooks.find(self.points, name, self.name) for name in names}

        def keep(name: str) -> Callable[[Tensor], None]:
            def see(x: Tensor) -> None:
                seen[name] = x
                if len(seen) == len(wanted):
                    raise _Stop

            return see

        attach = {point: keep(name) for name, point in wanted.items()}
        with hooks.attached(attach), suppress(_Stop):
            self._forward(ids)
        return seen

    def capture_with_gradients(
        self, ids: Int[Tensor, "batch pos"], lengths: Int[Tensor, " batch"], names: Sequence[str]
    ) -> tuple[dict[str, Float[Tensor, "batch pos _"]], dict[str, Float[Tensor, "batch pos _"]]]:
        """Activations, and the gradient of the next-token loss with respect to each of them.

        The loss is the cross-entropy in nats, summed over each window's first `length` - 1
        positions: a sum, so that no gradient depends on which windows go together. A gradient
        holds the effect on the losses of all later positions too; at a window's last position it
        is 0.
        """
        wanted = {name: hooks.find(self.points, name, self.name) for name in names}
        seen: dict[str, Tensor] = {}

        def start(x: Tensor) -> Tensor:
            # Weights are frozen, so the graph must begin somewhere: in front of every hook point.
            seen["embed"] = x.detach().requires_grad_()
            return seen["embed"]

        def keep(name: str) -> Callable[[Tensor], None]:
            def see(x: Tensor) -> None:
                x.retain_grad()
                seen[name] = x

            return see

        attach: dict[hooks.HookPoint, Callable[[Tensor], Tensor | None]] = {
            point: keep(name) for name, point in wanted.items()
        }
        attach[self.points["embed"]] = start
        with hooks.attached(attach), torch.enable_grad():
            logits = self._forward(ids).logits
            scored = torch.arange(ids.shape[1] - 1) < lengths[:, None] - 1
            target = ids[:, 1:][scored].to(logits.device)
            picked = logits[:, :-1][scored.to(logits.device)]
            wide = picked.to(torch.promote_types(picked.dtype, torch.float32))
            torch.nn.functional.cross_entropy(wide, target, reduction="sum").backward()
        grads: dict[str, Any] = {name: seen[name].grad for name in names}
        return {name: seen[name].detach() for name in names}, grads

    @torch.no_grad()
    def logits(
        self,
        ids: Int[Tensor, "batch pos"],
        edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> Float[Tensor, "batch pos vocab"]:
        """Next-token logits, with the activation at each hook in `edits` replaced by its
        function's value."""
        attach: dict[hooks.HookPoint, Callable[[Tensor], Tensor | None]] = {}
        for name, edit in (edits or {}).items():
            point = hooks.find(self.points, name, self.name)
            attach |= self._edit_mid(name, edit) if name.startswith("resid_mid.") else {point: edit}
        with hooks.attached(attach):
            logits: Tensor = self._forward(ids).logits
        return logits

    def _edit_mid(
        self, name: str, edit: Callable[[Tensor], Tensor]
    ) -> dict[hooks.HookPoint, Callable[[Tensor], Tensor | None]]:
        """An edit between attention and MLP, made on what attention adds.

        No module puts resid_mid out: its reader, the norm, is on the MLP's side branch alone, and
        an edit there would leave the residual stream as it was.
        """
        layer = name.split(".")[1]
        before: list[Tensor] = []

        def see(x: Tensor) -> None:
            before[:] = [x]

        def add(attn_out: Tensor) -> Tensor:
            return edit(before[0] + attn_out) - before[0]

        return {self.points[f"resid_pre.{layer}"]: see, self.points[f"attn_out.{layer}"]: add}

    def _forward(self, ids: Tensor) -> Any:
        if ids.shape[1] > self.context:
            raise ConfigError(
                f"a window of {ids.shape[1]} tokens exceeds the context of {self.context} of "
                f"'{self.name}'"
            )
        ones = torch.ones_like(ids)
        return self.model(
            input_ids=ids.to(self.device), attention_mask=ones.to(self.device), use_cache=False
        )

    def unembed(self) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "d_model vocab"]]:
        """Gain of the final norm, and the matrix from the normed residual stream to logits."""
        W_U = self.model.get_output_embeddings().weight.T.float()
        base = self.model.get_submodule(self.model.base_model_prefix)
        norms = (getattr(base, name, None) for name in ("ln_f", "norm", "final_layer_norm"))
        gain = next(norm for norm in norms if norm is not None).weight.float()
        return gain, W_U

    def residual_map(self, hook: str) -> Float[Tensor, "d d_model"] | None:
        """How a vector at this hook point enters the residual stream; None where it does so
        nonlinearly."""
        point = hooks.find(self.points, hook, self.name)
        kind = hook.split(".")[0]
        if kind in ("attn_z", "mlp_hidden"):
            module: Any = point.module
            weight: Tensor = module.weight.float()
            # GPT-2's Conv1D keeps [in, out], Linear [out, in].
            return weight.T if isinstance(module, nn.Linear) else weight
        return torch.eye(int(self.config.hidden_size), device=self.device)


def _fingerprint(path: str, model: Any) -> str:
    """SHA-256 of the config and weights of a local folder; repository and commit for a model of
    the hub."""
    folder = Path(path)
    if not folder.is_dir():
        return f"{path}@{model.config._commit_hash}"
    digest = sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(file_sha256(file).encode())
    return digest.hexdigest()


def _quiet_loading() -> None:
    """transformers draws a bar and logs a report for each load; our own commands say what
    matters."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
