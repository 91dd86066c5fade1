"""Hook points: one vocabulary of places inside a transformer, mapped to each architecture's
modules.

    resid_pre.3   into block 3            resid_post.3  out of block 3
    resid_mid.3   between its attention and its MLP
    attn_out.3    what attention adds     mlp_out.3     what the MLP adds
    attn_z.3      the heads' outputs, side by side, before the output projection
    mlp_hidden.3  the MLP's neurons, before its output projection
    embed         the token embedding

A pre-LayerNorm block obeys resid_pre + attn_out = resid_mid and resid_mid + mlp_out = resid_post.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from saekit.errors import ModelError, nearest

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Architecture:
    """Where a family of models keeps its parts: paths of modules, those below `blocks` within a
    block."""

    blocks: str
    attn: str
    attn_proj: str
    mlp: str
    mlp_proj: str
    mid_norm: str | None
    """The norm that reads resid_mid; None where attention and MLP read the block's input in
    parallel."""


_LLAMA = Architecture(
    blocks="model.layers",
    attn="self_attn",
    attn_proj="self_attn.o_proj",
    mlp="mlp",
    mlp_proj="mlp.down_proj",
    mid_norm="post_attention_layernorm",
)

ARCHITECTURES = {
    "gpt2": Architecture(
        blocks="transformer.h",
        attn="attn",
        attn_proj="attn.c_proj",
        mlp="mlp",
        mlp_proj="mlp.c_proj",
        mid_norm="ln_2",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt_neox": Architecture(
        blocks="gpt_neox.layers",
        attn="attention",
        attn_proj="attention.dense",
        mlp="mlp",
        mlp_proj="mlp.dense_4h_to_h",
        mid_norm=None,
    ),
}
"""By the `model_type` of the model's transformers config."""


@dataclass(frozen=True)
class HookPoint:
    """A place in a model: what goes into a module, or what comes out of it."""

    module: nn.Module
    side: Side


def hook_points(model: nn.Module, model_type: str) -> dict[str, HookPoint]:
    """Every hook point of the model by name, in the order in which a forward pass meets them.

    Raises ModelError for an architecture that is not in the table.
    """
    if model_type not in ARCHITECTURES:
        raise ModelError(
            f"architecture '{model_type}' has no hook points yet; known: {', '.join(ARCHITECTURES)}"
        )
    parts = ARCHITECTURES[model_type]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    assert isinstance(embedding, nn.Module)
    points = {"embed": HookPoint(embedding, "output")}
    for layer, block in enumerate(model.get_submodule(parts.blocks).children()):
        place = block.get_submodule
        points[f"resid_pre.{layer}"] = HookPoint(block, "input")
        points[f"attn_z.{layer}"] = HookPoint(place(parts.attn_proj), "input")
        points[f"attn_out.{layer}"] = HookPoint(place(parts.attn), "output")
        if parts.mid_norm is not None:
            points[f"resid_mid.{layer}"] = HookPoint(place(parts.mid_norm), "input")
        points[f"mlp_hidden.{layer}"] = HookPoint(place(parts.mlp_proj), "input")
        points[f"mlp_out.{layer}"] = HookPoint(place(parts.mlp), "output")
        points[f"resid_post.{layer}"] = HookPoint(block, "output")
    return points


def find(points: Mapping[str, HookPoint], name: str, model: str) -> HookPoint:
    """The named point. Raises ModelError with the nearest name where the model lacks it."""
    if name in points:
        return points[name]
    raise ModelError(
        f"model '{model}' has no hook point '{name}'; {nearest(name, points)} `saekit inspect "
        f"{model}` lists them with their widths"
    )


@contextmanager
def attached(edits: Mapping[HookPoint, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """While open, each function sees the activation at its point; a tensor it returns takes its
    place."""
    with ExitStack() as stack:
        for point, edit in edits.items():
            if point.side == "input":
                handle = point.module.register_forward_pre_hook(_on_input(edit))
            else:
                handle = point.module.register_forward_hook(_on_output(edit))
            stack.callback(handle.remove)
        yield


def _on_input(edit: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        edited = edit(args[0])
        return None if edited is None else (edited, *args[1:])

    return hook


def _on_output(edit: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # Attention modules return (output, weights), others the output alone.
        if isinstance(output, tuple):
            edited = edit(output[0])
            return None if edited is None else (edited, *output[1:])
        return edit(output)

    return hook
