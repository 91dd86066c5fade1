"""Language models through TransformerLens' TransformerBridge: the same hook points, found among
the bridge's own hook modules.

Weights stay as they are: nothing is folded or centred, so activations equal those of the plain
model, but for the order of operations inside attention. Beside the vocabulary, the paths of the
bridge's modules are hook points: `blocks.0.attn.v.hook_out`, `blocks.0.hook_mlp_in`.
"""

import copy
from typing import Any

from saekit.activations_cache import architectures, hooks
from saekit.activations_cache.architectures import PLACES, Architecture
from saekit.activations_cache.hooks import HookPoint
from saekit.activations_cache.model_language import LanguageModel
from saekit.errors import ModelError, first_line


class BridgeModel(LanguageModel):
    """A language model inside a TransformerBridge."""

    def __init__(self, name: str, fingerprint: str, model: Any, tokenizer: Any) -> None:
        """Raises ModelError for an architecture whose hook points the bridge does not have."""
        self._plain = model.original_model
        parts = architectures.find(self._plain.config.model_type)
        super().__init__(name, fingerprint, model, tokenizer, _points(name, model, parts))

    @property
    def _callee(self) -> Any:
        return self._plain

    def _own(self, module: Any) -> Any:
        return getattr(module, "original_component", module)

    def _projection(self, point: HookPoint) -> Any:
        return self._own(self.model.get_submodule(point.path.rpartition(".")[0]))


def bridged(name: str, model: Any, tokenizer: Any) -> Any:
    """A TransformerBridge around a loaded model of transformers, whose modules it replaces.

    Raises ModelError where TransformerLens does not know the architecture.
    """
    from transformer_lens.model_bridge import TransformerBridge

    # What the model is now, not what the files were made as: a bare encoder is loaded with a head.
    model.config.architectures = [type(model).__name__]
    try:
        return TransformerBridge.boot_transformers(
            name,
            device=str(model.device),
            dtype=model.dtype,
            hf_model=model,
            # It sets special tokens and padding on the tokenizer that it is given.
            tokenizer=copy.deepcopy(tokenizer),
        )
    except (ValueError, AttributeError) as error:
        raise ModelError(
            f"TransformerBridge cannot take '{name}' ({type(model).__name__}): "
            f"{first_line(error)[:200]}. Leave the backend out"
        ) from error


def _points(name: str, bridge: Any, parts: Architecture) -> dict[str, HookPoint]:
    points = {"embed": hooks.raw_point(bridge, "embed.hook_out")}
    try:
        for layer in range(len(bridge.blocks)):
            for kind, place in _places(parts).items():
                path = f"blocks.{layer}.{place}"
                points[f"{kind}.{layer}"] = hooks.raw_point(bridge, path)
    except AttributeError as error:
        raise ModelError(
            f"the TransformerBridge of '{name}' lacks a hook point ({first_line(error)}): leave "
            "the backend out"
        ) from error
    return points


def _places(parts: Architecture) -> dict[str, str]:
    """The bridge's hook modules within a block, in the order of a pass."""
    # The contribution to the residual stream is what comes out of the norm behind, where one is.
    attn, mlp = ("attn.o", "mlp.out") if parts.linear_out else ("ln1_post", "ln2_post")
    places = {
        "resid_pre": "hook_in",
        "attn_z": "attn.o.hook_in",
        "attn_out": f"{attn}.hook_out",
        "resid_mid": "ln2.hook_in" if parts.mid_is_read else "ln1.hook_out",
        "mlp_hidden": "mlp.out.hook_in",
        "mlp_out": f"{mlp}.hook_out",
        "resid_post": "hook_out",
    }
    return {kind: places[kind] for kind in PLACES if getattr(parts, kind) is not None}
