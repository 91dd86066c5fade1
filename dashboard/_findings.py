"""What evaluations found of a run, beside what `Run` holds: every result, and those of controls."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from saekit.dashboard.data import Run, eval_command, quote
from saekit.errors import SaekitError
from saekit.results import CONTROLS, RESULTS, Control, EvalResult

_Read = TypeVar("_Read")


def results(run: Run) -> dict[str, EvalResult]:
    """The result of every evaluation of the run, `core` first.

    Raises SaekitError where one cannot be read, or is of other weights than the run's.
    """
    found = _results(run.path / RESULTS, lambda name: eval_command(name, run.path))
    for name, result in found.items():
        if run.fingerprint and result.sae_fingerprint not in (None, run.fingerprint):
            raise SaekitError(
                f"{run.path / RESULTS / name}.json was measured on other weights than those that "
                "the run now holds: it was trained again since. Measure again: "
                f"`{eval_command(name, run.path)}`"
            )
    return found


def controls(run: Run) -> dict[str, dict[str, EvalResult]]:
    """What was found of the run's controls, by control and evaluation. Raises what `results` does.

    Left out are results of a control as it was before it was last made.
    """
    again = controls_command(run.path)
    found = {}
    for file in sorted((run.path / RESULTS / CONTROLS).glob(f"*/{Control.FILE}")):
        control = _read(file, partial(Control.load, file.parent), again)
        if run.fingerprint and control.of != run.fingerprint:
            raise SaekitError(
                f"{file.parent} is a control of other weights than those that the run now holds: "
                f"it was trained again since. Measure again: `{again}`"
            )
        of_control = _results(file.parent, lambda _: again)
        found[control.name] = {
            name: result
            for name, result in of_control.items()
            if result.sae_fingerprint == control.sae_fingerprint
        }
    return {name: measured for name, measured in found.items() if measured}


def controls_command(path: Path) -> str:
    """The command that writes the results of a run's controls."""
    return f"saekit eval all --sae {quote(str(path))} --controls"


def _results(folder: Path, command: Callable[[str], str]) -> dict[str, EvalResult]:
    found = {}
    for file in sorted(folder.glob("*.json"), key=lambda file: (file.stem != "core", file.stem)):
        # Controls, and what earlier versions kept of latents, are told of in files of other kinds.
        if file.name not in ("latents.json", Control.FILE):
            found[file.stem] = _read(
                file, partial(EvalResult.load, folder, file.stem), command(file.stem)
            )
    return found


def _read(file: Path, load: Callable[[], _Read], command: str) -> _Read:
    try:
        return load()
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise SaekitError(
            f"{file} or what is beside it cannot be read ({error}); write it again: `{command}`"
        ) from error
