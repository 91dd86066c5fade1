"""Language models of transformers, decoders and encoders, with their tokenizers: read the
activations inside, take gradients of the loss, or replace activations on the way through.

Axes: batch (rows of a pass), pos (tokens of a row, padded on the right), d (width of a hook point),
vocab.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit.activations_cache import architectures, fingerprints, hooks
from saekit.activations_cache.hooks import HookPoint
from saekit.activations_cache.model_base import Model, Pass
from saekit.errors import ConfigError, ModelError

_Edit = Callable[[Tensor], Tensor | None]


class LanguageModel(Model):
    """A decoder or an encoder of transformers, its tokenizer, and its hook points."""

    def __init__(
        self,
        name: str,
        fingerprint: str,
        model: Any,
        tokenizer: Any,
        points: dict[str, HookPoint] | None = None,
    ) -> None:
        """`points` where they are not those of the table. The model is put into evaluation mode
        and its weights are frozen.

        Raises ModelError for an architecture without hook points, and for a tokenizer of another
        model.
        """
        self.tokenizer = tokenizer
        self.config: Any = model.config
        self.architecture = architectures.find(self.config.model_type)
        if points is None:
            points = hooks.hook_points(model, self.config.model_type)
        super().__init__(name, fingerprint, model, points)
        self.causal = self.architecture.kind == "decoder"
        """Whether a position sees none after it, and the next token is predicted."""
        if not self.causal and getattr(self.config, "is_decoder", False):
            raise ModelError(
                f"'{name}' is an encoder that is set up as a decoder (is_decoder in its "
                "config.json), which is not supported: give a decoder, or set it to false"
            )
        self.tokenizer_fingerprint = fingerprints.of_tokenizer(tokenizer)
        self._check_tokenizer()

    @classmethod
    def load(
        cls, name: str, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "LanguageModel":
        """Load "demo" (the embedded model), a folder in transformers format, or a model of the hub.

        Raises ModelError where there is no such model, it is no language model, or it is of an
        architecture without hook points.
        """
        from saekit.activations_cache.model import load

        model = load(name, device=device, dtype=dtype)
        if not isinstance(model, LanguageModel):
            raise ModelError(f"model '{name}' reads no text: give a language model")
        return model

    @cached_property
    def context(self) -> int:
        """The most tokens that the model can look at once."""
        most = int(self.config.max_position_embeddings)
        # RoBERTa numbers its positions from behind the padding's.
        return most - self.config.pad_token_id - 1 if self.config.model_type == "roberta" else most

    @cached_property
    def prefix(self) -> list[int]:
        """What every window begins with: the beginning-of-sequence token of a decoder, the
        classification token of an encoder."""
        tokenizer = self.tokenizer
        if self.causal:
            known = _first(tokenizer.bos_token_id, tokenizer.eos_token_id)
        else:
            known = _first(tokenizer.cls_token_id, tokenizer.bos_token_id)
        if self.causal and not known:
            raise ModelError(
                f"the tokenizer of '{self.name}' has neither a beginning- nor an end-of-sequence "
                "token: set bos_token in its tokenizer_config.json"
            )
        return known

    @cached_property
    def suffix(self) -> list[int]:
        """What every window ends with: the separator of an encoder."""
        if self.causal:
            return []
        return _first(self.tokenizer.sep_token_id, self.tokenizer.eos_token_id)

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of the tokenizer's special tokens."""
        return frozenset([*self.tokenizer.all_special_ids, *self.prefix, *self.suffix])

    @cached_property
    def vocab(self) -> list[str]:
        """Every token as text, by id; ids that the tokenizer does not know are empty."""
        known = min(len(self.tokenizer), self._n_embedded)
        texts = self.tokenizer.batch_decode([[i] for i in range(known)])
        return [*texts, *[""] * (self._n_embedded - known)]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, and nothing else: "<bos>" in a text is five characters."""
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def inputs(
        self,
        ids: Int[Tensor, "batch pos"],
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
    ) -> dict[str, Tensor]:
        """What a pass takes. Rows of a causal model may be padded on the right with any token and
        need no mask; padding of an encoder must be 0 in the mask."""
        given = {
            "input_ids": ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        return {key: x for key, x in given.items() if x is not None}

    def capture_with_gradients(
        self, inputs: Mapping[str, Tensor], scored: Bool[Tensor, "batch pos"], names: Sequence[str]
    ) -> tuple[dict[str, Float[Tensor, "batch pos _"]], dict[str, Float[Tensor, "batch pos _"]]]:
        """Activations, and the gradient of the next-token loss with respect to each of them.

        The loss is the cross-entropy in nats, summed over the scored positions: those whose next
        token stands at the next position of the same window. A sum, so that no gradient depends on
        which windows go together. A gradient holds the effect on the losses of all later positions
        too; where nothing scored comes after, it is 0.

        Raises ConfigError for an encoder, and where a last position is scored.
        """
        if not self.causal:
            return super().capture_with_gradients(inputs, scored, names)
        self._need_next_token("loss")
        if scored[:, -1].any():
            raise ConfigError("the last position of a row cannot be scored: it has no next token")
        run = self._pass(inputs, names)
        seen: dict[HookPoint, Tensor] = {}
        points = {self.points["embed"]} | run.wanted.keys()
        attach = {point: partial(self._keep, run, seen, point) for point in points}
        with hooks.attached(attach), torch.enable_grad():
            logits = self._run(inputs).logits
            self._all_reached(run)
            counted = scored[:, :-1].to(logits.device)
            target = inputs["input_ids"].to(logits.device)[:, 1:][counted]
            picked = logits[:, :-1][counted]
            wide = picked.to(torch.promote_types(picked.dtype, torch.float32))
            torch.nn.functional.cross_entropy(wide, target, reduction="sum").backward()
        by_name = {name: x for point, x in seen.items() for name in run.wanted[point]}
        acts = {name: by_name[name].detach() for name in names}
        return acts, {name: _gradient(by_name[name]) for name in names}

    def _keep(
        self, run: Pass, seen: dict[HookPoint, Tensor], point: HookPoint, x: Tensor
    ) -> Tensor | None:
        """Keep an activation whose gradient is wanted. What has no graph begins one: weights are
        frozen, so nothing has one up to the embedding."""
        begun = None if x.requires_grad else x.detach().requires_grad_()
        if point in run.wanted:
            self._reached(run, point)
            seen[point] = self._rows(point, x if begun is None else begun, run.shape)
            seen[point].retain_grad()
        return begun

    @torch.no_grad()
    def logits(
        self,
        ids: Int[Tensor, "batch pos"],
        edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> Float[Tensor, "batch pos vocab"]:
        """Next-token logits, with the activation at each hook in `edits` replaced by its
        function's value.

        Raises ModelError for an encoder.
        """
        self._need_next_token("logits")
        attach: dict[HookPoint, _Edit] = {}
        for name, edit in (edits or {}).items():
            point = hooks.find(self.points, name, self.name, self.model)
            attach |= self._edit_mid(name, edit) if name.startswith("resid_mid.") else {point: edit}
        with hooks.attached(attach):
            logits: Tensor = self._run(self.inputs(ids)).logits
        return logits

    def unembed(self) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "d_model vocab"]]:
        """Gain of the final norm, and the matrix from the normed residual stream to logits.

        Raises ModelError for an encoder.
        """
        self._need_next_token("unembedding")
        base = self._callee.get_submodule(self._callee.base_model_prefix)
        norm = self._own(base.get_submodule(self.architecture.final_norm))
        head = self._own(self._callee.get_output_embeddings())
        return norm.weight.float() + self.architecture.gain_offset, head.weight.T.float()

    def residual_map(self, hook: str) -> Float[Tensor, "d d_model"] | None:
        """How a vector at this hook point enters the residual stream; None where it does so
        nonlinearly, or the hook point is a module's path."""
        point = hooks.find(self.points, hook, self.name, self.model)
        kind = hook.split(".")[0]
        if hook not in self.points or not self.causal:
            return None
        if kind in ("attn_z", "mlp_hidden"):
            if not self.architecture.linear_out:
                return None
            module = self._projection(point)
            weight: Tensor = module.weight.float()
            # GPT-2's Conv1D keeps [in, out], Linear [out, in].
            return weight.T if isinstance(module, nn.Linear) else weight
        return torch.eye(int(self.config.hidden_size), device=self.device)

    def _projection(self, point: HookPoint) -> Any:
        """The module that carries heads or neurons to the residual stream."""
        return point.module

    def _own(self, module: Any) -> Any:
        """The module of transformers in the place of one that may be wrapped."""
        return module

    def _edit_mid(self, name: str, edit: Callable[[Tensor], Tensor]) -> dict[HookPoint, _Edit]:
        """An edit between attention and MLP, made on what attention adds.

        In a pre-LayerNorm block no module puts resid_mid out: its reader, the norm, is on the MLP's
        side branch alone, and an edit there would leave the residual stream as it was.
        """
        if not self.architecture.mid_is_read:
            return {self.points[name]: edit}
        layer = name.split(".")[1]
        before: list[Tensor] = []
        return {
            self.points[f"resid_pre.{layer}"]: before.append,
            self.points[f"attn_out.{layer}"]: lambda x: edit(before[-1] + x) - before[-1],
        }

    def _need_next_token(self, what: str) -> None:
        if not self.causal:
            raise ModelError(
                f"'{self.name}' is an encoder and has no next-token {what}: give a causal language "
                "model"
            )
        if self._callee.get_output_embeddings() is None:
            raise ModelError(
                f"'{self.name}' is a bare {type(self._callee).__name__} and has no next-token "
                f"{what}: give the model with its head (...ForCausalLM)"
            )

    @cached_property
    def _n_embedded(self) -> int:
        return int(self._own(self._callee.get_input_embeddings()).weight.shape[0])

    def _check_tokenizer(self) -> None:
        """Refuse a tokenizer with an id that the model has no embedding for.

        Special tokens may lie beyond: text never becomes one, and some models are published so.
        """
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        rare = {i for i, token in added.items() if token.special}
        ids = set(self.tokenizer.get_vocab().values()) - rare
        largest = max([*ids, *self.prefix, *self.suffix], default=0)
        if largest >= self._n_embedded:
            raise ModelError(
                f"the tokenizer does not belong to model '{self.name}': its largest token id is "
                f"{largest}, and the model has embeddings for {self._n_embedded} tokens: give the "
                "model's own tokenizer"
            )

    @cached_property
    def _takes_use_cache(self) -> bool:
        return "use_cache" in inspect.signature(self._callee.forward).parameters

    @property
    def _callee(self) -> Any:
        """The module of transformers that a pass calls."""
        return self.model

    def _run(self, inputs: Mapping[str, Tensor]) -> Any:
        _, length = self._shape(inputs)
        if length > self.context:
            raise ConfigError(
                f"a window of {length} tokens exceeds the context of {self.context} of "
                f"'{self.name}'"
            )
        # A GPU answers an index out of range with an error that nothing afterwards survives.
        if (largest := int(inputs["input_ids"].max())) >= self._n_embedded:
            raise ModelError(
                f"token id {largest} is beyond the {self._n_embedded} tokens that '{self.name}' "
                "has embeddings for: leave out the text with that special token"
            )
        given = {key: x.to(self.device) for key, x in inputs.items()}
        options = {"use_cache": False} if self._takes_use_cache else {}
        return self._callee(**given, **options)

    def _shape(self, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        rows, length = inputs["input_ids"].shape
        return rows, length

    def _probe(self) -> dict[str, Tensor]:
        return self.inputs(torch.full((2, 3), (self.prefix or [0])[0]))


def _first(*ids: int | None) -> list[int]:
    return next(([i] for i in ids if i is not None), [])


def _gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad
