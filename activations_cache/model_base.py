"""What every kind of model shares: hook points, and passes that show the activations there.

Axes: batch (rows of a pass), pos (positions of a row, padded on the right), d (width of a hook
point).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saekit.activations_cache import hooks
from saekit.activations_cache.hooks import HookPoint
from saekit.errors import ConfigError, ModelError


class _Stop(Exception):
    """Raised inside a forward pass once everything asked for has been seen."""


@dataclass(frozen=True)
class Pass:
    """What a pass of a model is asked for."""

    wanted: dict[HookPoint, list[str]]
    """Names by hook point: two names may lead to one place."""
    left: set[HookPoint]
    """Those that the pass has not reached yet."""
    shape: tuple[int, int]
    """Rows and positions."""


class Model:
    """A model and its hook points."""

    tokenizer_fingerprint: str | None = None
    """What the tokenizer is; None where there is none."""

    def __init__(
        self, name: str, fingerprint: str, model: Any, points: dict[str, HookPoint]
    ) -> None:
        self.name = name
        self.fingerprint = fingerprint
        """What the weights are. Read from files: the same in whatever precision they are loaded."""
        self.model: Any = model.eval().requires_grad_(False)
        self.points = points
        """The hook points that have a name of their own; `visit` takes any module's path too."""
        self._run_once = set(points.values())
        """Hook points whose modules are known to run but once in a pass."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def widths(self, names: Sequence[str] | None = None) -> dict[str, int]:
        """Width of the activation at the named hook points, or at every one of `points`.

        Raises ModelError for a hook point that the model lacks, or that cannot be read.
        """
        names = list(self.points) if names is None else names
        widths: dict[str, int] = {}
        self.visit(self._probe(), names, lambda name, x: widths.update({name: x.shape[-1]}))
        return {name: widths[name] for name in names}

    @torch.no_grad()
    def visit(
        self,
        inputs: Mapping[str, Tensor],
        names: Sequence[str],
        see: Callable[[str, Float[Tensor, "batch pos _"]], None],
    ) -> None:
        """Run the model, and hand over each named activation as soon as it is computed.

        `inputs` are keyword arguments of the model's forward. `see` must neither keep nor change
        what it is given. The model runs no further than the last hook point asked for; only the
        first pass with a module that was named by its path runs to the end, to make sure that this
        module runs but once.

        Raises ModelError for a hook point that the model lacks, that is not reached or reached
        twice, or whose activation is not a row of numbers for every position.
        """
        run = self._pass(inputs, names)
        unsure = run.wanted.keys() - self._run_once
        look = partial(self._look, run, see, not unsure)
        if run.wanted:
            with (
                hooks.attached({point: partial(look, point) for point in run.wanted}),
                suppress(_Stop),
            ):
                self._run(inputs)
            self._all_reached(run)
            self._run_once |= unsure

    def capture(
        self, inputs: Mapping[str, Tensor], names: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos _"]]:
        """Activations at the named hook points. Raises what `visit` raises."""
        seen: dict[str, Tensor] = {}
        # A module further on may work in place.
        self.visit(inputs, names, lambda name, x: seen.update({name: x.clone()}))
        return {name: seen[name] for name in names}

    def capture_with_gradients(
        self, inputs: Mapping[str, Tensor], scored: Bool[Tensor, "batch pos"], names: Sequence[str]
    ) -> tuple[dict[str, Float[Tensor, "batch pos _"]], dict[str, Float[Tensor, "batch pos _"]]]:
        """Activations, and the gradient of the next-token loss with respect to each of them.

        Raises ConfigError where the model has no such loss.
        """
        raise ConfigError(
            f"'{self.name}' predicts no next token, so there is no loss to take gradients of: "
            "leave gradients out, or give a causal language model"
        )

    def _pass(self, inputs: Mapping[str, Tensor], names: Iterable[str]) -> "Pass":
        wanted: dict[HookPoint, list[str]] = {}
        for name in dict.fromkeys(names):
            point = hooks.find(self.points, name, self.name, self.model)
            wanted.setdefault(point, []).append(name)
        return Pass(wanted, set(wanted), self._shape(inputs))

    def _look(
        self,
        run: "Pass",
        see: Callable[[str, Float[Tensor, "batch pos _"]], None],
        may_stop: bool,
        point: HookPoint,
        x: Tensor,
    ) -> None:
        self._reached(run, point)
        rows = self._rows(point, x, run.shape)
        for name in run.wanted[point]:
            see(name, rows)
        if may_stop and not run.left:
            raise _Stop

    def _reached(self, run: "Pass", point: HookPoint) -> None:
        if point not in run.left:
            raise ModelError(
                f"the module of hook point '{point.path}' runs more than once in a pass of "
                f"'{self.name}', so its activation is not one thing: name a module that runs once"
            )
        run.left.remove(point)

    def _all_reached(self, run: "Pass") -> None:
        if run.left:
            raise ModelError(
                f"no pass of '{self.name}' reaches "
                f"{', '.join(sorted(point.path for point in run.left))}: that module is there, but "
                "is not called; name another"
            )

    def _rows(
        self, point: HookPoint, x: Tensor, shape: tuple[int, int]
    ) -> Float[Tensor, "batch pos _"]:
        """The activation with its axes. Raises ModelError where they are not rows and positions of
        the pass, and a width."""
        if x.ndim == 3 and tuple(x.shape[:2]) == shape and x.is_floating_point():
            return x
        raise ModelError(
            f"hook point '{point.path}' of '{self.name}' gives {list(x.shape)} of {x.dtype}, not "
            f"floating-point numbers of shape [{shape[0]}, {shape[1]}, d] for {shape[0]} rows of "
            f"{shape[1]} positions: name a module whose activation is a vector at each position"
        )

    def _probe(self) -> dict[str, Tensor]:
        """Inputs of a small pass, of several rows and positions."""
        raise NotImplementedError

    def _shape(self, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        """Rows and positions of a pass with these inputs."""
        raise NotImplementedError

    def _run(self, inputs: Mapping[str, Tensor]) -> Any:
        return self.model(**{key: x.to(self.device) for key, x in inputs.items()})
