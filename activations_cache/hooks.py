"""Hook points: one vocabulary of places inside a transformer, mapped to each architecture's
modules.

    resid_pre.3   into block 3            resid_post.3  out of block 3
    resid_mid.3   between its attention and its MLP
    attn_out.3    what attention adds     mlp_out.3     what the MLP adds
    attn_z.3      the heads' outputs, side by side, before the output projection
    mlp_hidden.3  the MLP's neurons, before its output projection
    embed         the token embedding (of images: patches, special positions and places together)

A pre-LayerNorm block obeys resid_pre + attn_out = resid_mid and resid_mid + mlp_out = resid_post.
A post-LayerNorm block obeys the same with a norm around each sum: resid_mid is the normed
resid_pre + attn_out, resid_post the normed resid_mid + mlp_out.

Beside these, the path of any module is a hook point: `transformer.h.3.attn` is what that module
gives (its first part where it gives several), `transformer.h.3.attn:input` the first thing it is
given.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from saekit.activations_cache import architectures
from saekit.errors import ModelError, nearest

Side = Literal["input", "output"]

INPUT = ":input"
"""Ending of a path that means what goes into the module."""


@dataclass(frozen=True)
class HookPoint:
    """A place in a model: what goes into a module, or what comes out of it."""

    module: nn.Module
    side: Side
    path: str = field(compare=False)
    """Where the module stands in its model, for messages."""


def hook_points(model: nn.Module, model_type: str) -> dict[str, HookPoint]:
    """Every hook point of the vocabulary by name, in the order in which a forward pass meets them.

    Raises ModelError for an architecture that is not in the table.
    """
    parts = architectures.find(model_type)
    # A model with a head keeps the transformer itself under the name that transformers calls its
    # prefix; the bare transformer has no such part.
    prefix = str(getattr(model, "base_model_prefix", ""))
    root = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    points = {"embed": raw_point(model, root + parts.embed)}
    blocks = model.get_submodule(root + parts.blocks)
    for layer in range(len(list(blocks.children()))):
        for kind in architectures.PLACES:
            place = getattr(parts, kind)
            if place is not None:
                path = f"{root}{parts.blocks}.{layer}.{place}".replace(f".{INPUT}", INPUT)
                points[f"{kind}.{layer}"] = raw_point(model, path.removesuffix("."))
    return points


def raw_point(model: nn.Module, name: str) -> HookPoint:
    """The hook point at a module's path. Raises AttributeError where there is no such module."""
    path = name.removesuffix(INPUT)
    return HookPoint(model.get_submodule(path), "output" if path == name else "input", name)


def find(points: Mapping[str, HookPoint], name: str, label: str, model: nn.Module) -> HookPoint:
    """The named point of the vocabulary, or of the model's modules.

    Raises ModelError with the nearest name where the model, which goes by `label`, lacks it.
    """
    if name in points:
        return points[name]
    if name.removesuffix(INPUT):
        with suppress(AttributeError):
            return raw_point(model, name)
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    known = [*points, *paths]
    wanted = name.removesuffix(INPUT)
    # A model has thousands of modules: they are not listed where none is near.
    near = nearest(wanted, known if get_close_matches(wanted, known, n=1) else points or paths)
    raise ModelError(
        f"model '{label}' has no hook point '{name}'; {near} `saekit inspect {label}` lists them "
        "with their widths"
    )


@contextmanager
def attached(edits: Mapping[HookPoint, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """While open, each function sees the activation at its point; a tensor it returns takes its
    place. Raises ModelError, in the pass, where what goes through a point is no tensor."""
    with ExitStack() as stack:
        for point, edit in edits.items():
            if point.side == "input":
                hook = partial(_on_input, point, edit)
                handle = point.module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = point.module.register_forward_hook(partial(_on_output, point, edit))
            stack.callback(handle.remove)
        yield


def _on_input(
    point: HookPoint,
    edit: Callable[[Tensor], Tensor | None],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if args:
        edited = edit(_tensor(point, args[0]))
        return None if edited is None else ((edited, *args[1:]), kwargs)
    name = next(iter(kwargs), "")
    edited = edit(_tensor(point, kwargs.get(name)))
    return None if edited is None else (args, {**kwargs, name: edited})


def _on_output(
    point: HookPoint,
    edit: Callable[[Tensor], Tensor | None],
    module: nn.Module,
    args: tuple[Any, ...],
    output: Any,
) -> Any:
    # Attention modules return (output, weights), whole models a mapping, others the output alone.
    if isinstance(output, tuple):
        edited = edit(_tensor(point, output[0]))
        return None if edited is None else (edited, *output[1:])
    if isinstance(output, MutableMapping):
        first: Any = next(iter(output), None)
        edited = edit(_tensor(point, output.get(first)))
        if edited is not None:
            output[first] = edited
        return None
    return edit(_tensor(point, output))


def _tensor(point: HookPoint, x: object) -> Tensor:
    if isinstance(x, Tensor):
        return x
    raise ModelError(
        f"hook point '{point.path}' cannot be read: the first {point.side} of that "
        f"{type(point.module).__name__} is of type {type(x).__name__}, not a tensor; name a module "
        "inside it"
    )
