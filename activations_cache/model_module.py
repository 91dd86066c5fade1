"""Any module of torch as a model: its hook points are the paths of the modules inside it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.activations_cache import fingerprints, hooks
from saekit.activations_cache.hooks import HookPoint
from saekit.activations_cache.model_base import Model
from saekit.activations_cache.tokens import Cursor, TokenBatch
from saekit.errors import ConfigError, ModelError


class ModuleModel(Model):
    """A module with named modules inside. An activation [batch, d] counts as one position."""

    def __init__(
        self, module: nn.Module, name: str = "module", example: Mapping[str, Tensor] | None = None
    ) -> None:
        """`example`: keyword arguments of a small pass, which `widths` needs. The module is put
        into evaluation mode and its weights are frozen.

        Raises ModelError for a module without modules inside.
        """
        points = {path: hooks.raw_point(module, path) for path, _ in module.named_modules() if path}
        if not points:
            raise ModelError(
                f"'{name}' has no modules inside, so there is nothing to hook: wrap it in "
                "torch.nn.Sequential"
            )
        super().__init__(name, fingerprints.of_module(module), module, points)
        self._example = example
        # Unlike the vocabulary of an architecture, a module's path promises nothing.
        self._run_once = set()

    def widths(self, names: Sequence[str] | None = None) -> dict[str, int]:
        """Width of the activation at the named hook points, or at every one that can be read.

        Raises ConfigError without an example of inputs, and ModelError as `visit` does.
        """
        if names is not None:
            return super().widths(names)
        widths: dict[str, int] = {}
        for name in self.points:
            try:
                widths |= super().widths([name])
            except ModelError:
                continue
        return widths

    def _rows(
        self, point: HookPoint, x: Tensor, shape: tuple[int, int]
    ) -> Float[Tensor, "batch pos _"]:
        if x.is_floating_point() and x.ndim in (2, 3) and len(x) == shape[0]:
            return x if x.ndim == 3 else x[:, None]
        raise ModelError(
            f"hook point '{point.path}' of '{self.name}' gives {list(x.shape)} of {x.dtype}, not "
            f"floating-point numbers of shape [{shape[0]}, d] or [{shape[0]}, pos, d] for "
            f"{shape[0]} rows: name a module whose activation is a vector for each row"
        )

    def _shape(self, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        return len(next(iter(inputs.values()))), 1

    def _probe(self) -> dict[str, Tensor]:
        if self._example is None:
            raise ConfigError(
                f"the widths of '{self.name}' can only be seen in a pass: give "
                "ModuleModel(..., example={'name of an argument': tensor})"
            )
        return dict(self._example)


def module_batches(
    inputs: Callable[[], Iterable[Mapping[str, Tensor]]], *, n_positions: int = 1
) -> Callable[[Cursor], Iterator[TokenBatch]]:
    """Inputs of any module as the `data` of a harvest.

    `inputs()` gives the keyword arguments of one pass after the other, each tensor with the batch
    first, and the same ones each time it is called. Row j of pass i is document "input/i/j" with
    `n_positions` rows; its `token` is the position.
    """

    def data(start: Cursor) -> Iterator[TokenBatch]:
        n_tokens = start.n_tokens
        for number, given in enumerate(islice(inputs(), start.document, None), start.document):
            batch = len(next(iter(given.values())))
            shape = (batch, n_positions)
            position = torch.arange(n_positions).expand(shape)
            n_tokens += batch * n_positions
            yield TokenBatch(
                inputs=dict(given),
                kept=torch.ones(shape, dtype=torch.bool),
                token=position,
                position=position,
                mask=torch.zeros(shape, dtype=torch.int64),
                document=torch.arange(batch)[:, None].expand(shape),
                names=tuple(f"input/{number}/{row}" for row in range(batch)),
                end=Cursor(number + 1, 0, n_tokens),
            )

    return data
