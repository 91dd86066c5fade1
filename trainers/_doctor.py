"""What became of each latent of a run, and why the dead died: read from the history that training
left (see `_life`).

Nothing is measured on a scale of its own. Pre-activations are taken in units of their spread, the
standard deviation over rows, so that neither the input's scale nor a latent's norm matters; norms
are compared with those of the living. Axes: record (the start, then each window), latent.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import normalize

from saekit import checkpoint
from saekit.config import TrainConfig, read_toml
from saekit.errors import CheckpointError, ConfigError, SaekitError
from saekit.trainers import _kinds, _life, _state
from saekit.trainers._run import CONFIG
from saekit.trainers._schedules import warm_then_decay

STATES = ("alive", "dying", "dead", "never fired")
"""How a latent is at the end.

- never fired: on no row of the whole run
- dead: silent for `dead_after` tokens or more. New weights do not end the silence, firing does
- dying: not dead, but silent throughout the last window, and for so long that at the rate at which
  it fired until then `MISSED` firings are missing
- alive: all others
"""
ALIVE, DYING, DEAD, NEVER = range(4)

MISSED = 10
"""Independent rows would leave out so many firings once in e^10; rows of one text are not
independent, so fewer would accuse latents that wait for their topic."""
SHRUNKEN = 0.1
"""Of the living's median norm: half of what "resample" gives a new encoder, so that none which
was replanted and did not learn counts as shrunken."""
TWIN = 0.9
"""Cosine of two decoder rows. By chance the closest of 10,000 has 0.5 in 64 dimensions, 0.2 in
512; a feature that was split in two usually stays below 0.9."""
FALL = 1.0
"""Spreads by which a mean sinks. Where training goes well the means of latents, dead or alive, move
by a third of a spread over a whole run."""
SUDDEN = 0.5
"""Share of the fall that lies in one window; no window of a steady fall has as much."""
WINDOWS = 8
"""Fewer windows are too long for one to be called sudden."""
NEAR = 0.5
"""Spreads. Of normally distributed pre-activations, four times as many rows reach nearly
half a spread higher: such a latent is a few rows or a few steps from firing."""


@dataclass(frozen=True)
class Cause:
    """Why a latent is dead, as far as its history tells."""

    name: str
    rule: str
    """What is so of a latent that this is said of, with the threshold."""
    remedy: str
    """What to try; {revival} stands for the next way to revive the dead."""


CAUSES = (
    Cause(
        "just replanted",
        "it was given new weights less than dead_after tokens before the end, and has not fired "
        "since: too early to tell",
        "nothing yet; where most are such, --resample-every leaves them too little time",
    ),
    Cause(
        "weights shrank",
        f"its encoder or its decoder is shorter than {SHRUNKEN:g} of the living's median, and "
        "than half of what latents begin with",
        "less --weight-decay or a weaker sparsity penalty",
    ),
    Cause(
        "duplicate",
        f"its decoder row has a cosine above {TWIN:g} with a living latent's, which does its work",
        "a smaller --d-sae: the data has fewer features than this finds room for",
    ),
    Cause(
        "thrown out",
        f"its mean pre-activation sank by {FALL:g} spread or more, {SUDDEN:.0%} of that or more "
        "within one window: a few steps were too large",
        "a lower --lr, a longer --lr-warmup, --clip-norm, or where there is a sparsity penalty a "
        "weaker one",
    ),
    Cause(
        "pushed away",
        f"its mean pre-activation sank by {FALL:g} spread or more, little by little: to below 0 on "
        f"every row, or {FALL:g} spread further than the living's",
        "a lower --lr or a weaker sparsity penalty, or {revival}",
    ),
    Cause(
        "just below",
        f"at best it is less than {NEAR:g} spread short of firing",
        "more --n-tokens, or {revival}: a small push is enough",
    ),
    Cause(
        "below zero",
        "its pre-activation is below 0 on every row looked at: it points away from the data, and "
        "gets no gradient",
        "{revival}, or another --b-dec-init if most began so",
    ),
    Cause(
        "crowded out",
        "it is positive on some rows, but others, or its threshold, always lie higher",
        "{revival}, a smaller --d-sae, or a weaker sparsity (a larger --k)",
    ),
)
"""In the order in which they are tried: the first whose rule holds is named, the last is what is
left. First what makes the later figures meaningless, then what a latent's past tells, which is
closer to the cause, then where it stands now."""

BY_ITSELF = "by itself"

FIGURES = ("margin", "top", "mean", "encoder norm", "decoder norm")
"""What is held up as evidence: the first three in spreads, norms as shares of the living's median.
`margin` is how far the best pre-activation came above what it needed, `top` the largest."""


@dataclass(frozen=True)
class Window:
    """Latents counted at the end of a window."""

    step: int
    alive: int
    dead: int
    died: int
    """Dead by its end, and not by that of the window before."""
    revived: int
    """Dead or replanted before, and fired in it."""
    replanted: int


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """See the module; the tensors have an entry a latent."""

    windows: tuple[Window, ...]
    state: Int[Tensor, " latent"]
    """Index into STATES."""
    cause: Int[Tensor, " latent"]
    """Index into CAUSES; -1 for one that is neither dead nor never fired."""
    last_fired: Int[Tensor, " latent"]
    """The step of its last firing; 0 where it never fired."""
    revivals: dict[str, Bool[Tensor, " latent"]]
    """Which latents were dead and fired again, by what brought them back."""
    start: dict[str, Float[Tensor, " latent"]]
    """FIGURES when its weights were new: at the start, or at the end of the window in which it was
    last replanted."""
    before: dict[str, Float[Tensor, " latent"]]
    """FIGURES when it was last sure to be alive: as the window of its last firing began. `start`
    where it has not fired since."""
    after: dict[str, Float[Tensor, " latent"]]
    """FIGURES at the end."""
    fall: Float[Tensor, " latent"]
    """Spreads by which its mean pre-activation sank in the worst window up to its last firing."""
    fall_step: Int[Tensor, " latent"]
    """The step at which that window ended."""
    twin: Int[Tensor, " latent"]
    """The living latent whose decoder row is closest; -1 for those that are not dead."""
    cosine: Float[Tensor, " latent"]
    """Of these two rows."""

    @property
    def revived(self) -> Bool[Tensor, " latent"]:
        return torch.stack(list(self.revivals.values())).any(0)

    def of(self, cause: int) -> Int[Tensor, " index"]:
        """The latents with a cause."""
        return (self.cause == cause).nonzero().flatten()


@dataclass(frozen=True, eq=False)
class Examination:
    """A run's diagnosis, and what of the run it is to be read with."""

    diagnosis: Diagnosis
    config: TrainConfig
    finished: bool

    @property
    def policy(self) -> str | None:
        """How the run revives dead latents; None for a kind that has no choice of ways."""
        chosen: str | None = getattr(self.config, "revive", "")
        if chosen == "":
            return None
        if chosen is None:  # left to the kind, some of whose recipes resample
            return "resample" if any(w.replanted for w in self.diagnosis.windows) else "none"
        idle = chosen == "auxk" and getattr(self.config, "auxk_coef", 1) == 0
        return "none" if idle else chosen

    def remedy(self, cause: int) -> str:
        return CAUSES[cause].remedy.format(revival=self._revival())

    def _revival(self) -> str:
        """A way to revive the dead that the kind has, and that the run has not tried."""
        (kind_of_field,) = [f.type for f in fields(self.config) if f.name == "revive"] or [None]
        # A Literal, or one beside None.
        ways = {way for part in (kind_of_field, *get_args(kind_of_field)) for way in get_args(part)}
        if self.policy == "resample":
            return "a smaller --resample-every"
        for way in ("auxk", "resample", "ghost"):
            if way in ways - {self.policy}:
                return f"--revive {way}"
        return "a kind that takes --revive"

    @property
    def tokens(self) -> int:
        """Seen so far."""
        return self.diagnosis.windows[-1].step * self.config.batch_size

    def seen(self, cause: int) -> str:
        """What the figures do not say: of the latents with this cause, when, and beside which."""
        of, latents, cfg = self.diagnosis, self.diagnosis.of(cause), self.config
        said = []
        fired = of.last_fired[latents]
        if (fired > 0).any():
            said.append(f"They last fired around step {int(fired[fired > 0].median()):,}.")
        if CAUSES[cause].name == "thrown out":
            step, fall = int(of.fall_step[latents].median()), float(of.fall[latents].median())
            factor = warm_then_decay(
                step - 1, cfg.n_steps, cfg.lr_warmup, cfg.lr_decay, cfg.lr_shape
            )
            said.append(
                f"The worst window took {fall:.2g} spreads and ended around step {step:,}, when "
                f"the learning rate was {cfg.lr * factor:.2g}."
            )
        if CAUSES[cause].name == "duplicate":
            one = int(latents[of.cosine[latents].argmax()])
            said.append(
                f"The closest: {one} and the living {int(of.twin[one])}, with a cosine of "
                f"{float(of.cosine[one]):.3f}."
            )
        return " ".join(said)


def examine(run: Path) -> Examination:
    """Diagnose a run, finished or in training as its last checkpoint has it.

    Raises ConfigError for a folder that is no run or a run that keeps no history, and SaekitError
    where there is none yet.
    """
    if not (run / CONFIG).exists():
        raise ConfigError(
            f"{run} holds no history of its latents: it was not trained by saekit here. Give the "
            "folder that `saekit train ... --out` wrote; of an SAE from elsewhere `saekit eval "
            "core` counts the dead"
        )
    settings = read_toml(run / CONFIG)
    kind = settings["kind"]
    config_of = _kinds.kind(kind).Config
    known = [f.name for f in fields(config_of)]
    config = config_of.from_dict({name: settings[name] for name in known if name in settings})
    if config.life_windows == 0:
        remedy = "train it again with --life-windows 32, or let `saekit eval core` count the dead"
        if config_of().life_windows == 0:
            remedy = f"{kind} has none to keep; let `saekit eval core` count the dead"
        raise ConfigError(
            f"{run} was trained with life_windows=0, and so without a history of its latents: "
            f"{remedy}"
        )
    finished = (run / checkpoint.CONFIG).exists()
    life, W_dec = _whole(run) if finished else _in_training(run, config)
    policy = getattr(config, "revive", None)
    return Examination(diagnose(life, W_dec, config.dead_after, policy), config, finished)


def _read(path: Path, *starts: str) -> dict[str, Tensor]:
    """The tensors whose names start so."""
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(starts)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): it belongs to the run, copy it from where the run "
            "was trained"
        ) from error


def _whole(run: Path) -> tuple[dict[str, Tensor], Tensor | None]:
    """The history and the decoder of a finished run."""
    return _read(run / _life.FILE, ""), checkpoint.load(run).W_dec


def _in_training(run: Path, config: TrainConfig) -> tuple[dict[str, Tensor], Tensor | None]:
    """The history so far and the decoder, from a run's last checkpoint."""
    if not (run / _state.FILE).exists():
        raise SaekitError(
            f"{run} is not finished, and has no checkpoint yet that could be looked at: its first "
            f"comes after {config.checkpoint_every} steps"
        )
    state = _read(run / _state.FILE, "life/", "trainer/W_dec")
    life = {n.removeprefix("life/"): t for n, t in state.items() if n.startswith("life/")}
    if len(life["step"]) < 2:
        raise SaekitError(
            f"{run} is not finished, and its last checkpoint is from before the end of the first "
            f"window ({config.n_steps / config.life_windows:.0f} steps): look again later"
        )
    return life, state.get("trainer/W_dec")


def steps_taken(run: Path) -> int | None:
    """By a run in training, up to its last checkpoint; None where it has none yet."""
    path = run / _state.FILE
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        step: int = json.loads(file.metadata()["position"])["step"]
    return step


def diagnose(
    life: Mapping[str, Tensor],
    W_dec: Float[Tensor, "latent d_out"] | None,
    dead_after: int,
    policy: str | None,
) -> Diagnosis:
    """From the tensors of a `LifeHistory` and the decoder at its end; without a decoder no latent
    is called a duplicate."""
    past = _Past.of(life, dead_after)
    state = _states(past)
    living, ill = state == ALIVE, state >= DEAD
    figures = _figures(life, living)
    start = _at(figures, past.base)
    after = {name: table[-1] for name, table in figures.items()}
    fall, fall_step = _worst_fall(figures["mean"], past)
    twin, cosine = _twins(W_dec, ill, living)
    holds = {
        "just replanted": past.fresh,
        "weights shrank": _shrunken(figures),
        "duplicate": cosine > TWIN,
        **_pushed(start, after, fall, living, len(past.step)),
        "just below": after["margin"] >= -NEAR,
        "below zero": after["top"] <= 0,
        "crowded out": torch.ones_like(ill),
    }
    return Diagnosis(
        windows=_windows(past),
        state=state,
        cause=_first(holds, ill),
        last_fired=past.heard[-1] * past.step[-1] // past.tokens[-1],
        revivals=_revivals(past, policy),
        start=start,
        before=_at(figures, torch.maximum(past.last[-1] - 1, past.base)),
        after=after,
        fall=fall,
        fall_step=fall_step,
        twin=twin,
        cosine=cosine,
    )


@dataclass(frozen=True, eq=False)
class _Past:
    """When each latent fired, was silent, and was replanted."""

    step: Int[Tensor, " record"]
    rows: Int[Tensor, " record"]
    tokens: Int[Tensor, " record"]
    """Seen up to each record."""
    fired: Int[Tensor, "record latent"]
    """Rows of each record on which it fired."""
    replanted: Bool[Tensor, "record latent"]
    last: Int[Tensor, "record latent"]
    """Up to each record: the one in which it last fired, -1 for none yet."""
    planted: Int[Tensor, "record latent"]
    """The one in which it was last replanted, -1 for none yet."""
    heard: Int[Tensor, "record latent"]
    """After how many tokens it last fired, 0 for not yet."""
    dead: Bool[Tensor, "record latent"]
    fresh: Bool[Tensor, " latent"]
    """Replanted less than dead_after tokens before the end, and silent since."""

    @classmethod
    def of(cls, life: Mapping[str, Tensor], dead_after: int) -> "_Past":
        tokens, fired = life["rows"].cumsum(0), life["fired"] > 0
        record = torch.arange(len(tokens))[:, None]
        last = torch.where(fired, record, -1).cummax(0).values
        planted = torch.where(life["replanted"], record, -1).cummax(0).values
        heard = torch.where(fired, tokens[:, None] - life["since"], 0).cummax(0).values
        return cls(
            step=life["step"],
            rows=life["rows"],
            tokens=tokens,
            fired=life["fired"],
            replanted=life["replanted"],
            last=last,
            planted=planted,
            heard=heard,
            dead=tokens[:, None] - heard >= dead_after,
            fresh=(planted[-1] > last[-1]) & (life["since"][-1] < dead_after),
        )

    @property
    def base(self) -> Int[Tensor, " latent"]:
        """The record at which its weights were new."""
        return self.planted[-1].clamp_min(0)

    @property
    def anew(self) -> Bool[Tensor, "window latent"]:
        """Whether by the end of each window it was replanted since it had fired before that."""
        return self.planted[1:] > self.last[:-1]

    @property
    def came_back(self) -> Bool[Tensor, "window latent"]:
        """Whether it was dead or replanted before each window, and fired in it."""
        return (self.fired[1:] > 0) & (self.dead[:-1] | self.anew)


def _windows(past: _Past) -> tuple[Window, ...]:
    dead, came_back = past.dead, past.came_back
    return tuple(
        Window(
            step=int(past.step[i]),
            alive=int((~dead[i]).sum()),
            dead=int(dead[i].sum()),
            died=int((dead[i] & ~dead[i - 1]).sum()),
            revived=int(came_back[i - 1].sum()),
            replanted=int(past.replanted[i].sum()),
        )
        for i in range(1, len(past.step))
    )


def _revivals(past: _Past, policy: str | None) -> dict[str, Bool[Tensor, " latent"]]:
    nursed = policy if policy in ("auxk", "ghost") else BY_ITSELF
    came_back, anew = past.came_back, past.anew
    return {nursed: (came_back & ~anew).any(0), "resample": (came_back & anew).any(0)}


def _states(past: _Past) -> Int[Tensor, " latent"]:
    """See STATES."""
    silent = past.tokens[-1] - past.heard[-1]
    missing = past.fired.sum(0) / past.heard[-1].clamp_min(1) * silent
    state = torch.full_like(past.last[-1], ALIVE)
    state[(silent >= past.rows[-1]) & (missing >= MISSED)] = DYING
    state[past.dead[-1]] = DEAD
    state[past.last[-1] < 0] = NEVER
    return state


def _worst_fall(
    mean: Float[Tensor, "record latent"], past: _Past
) -> tuple[Float[Tensor, " latent"], Int[Tensor, " latent"]]:
    """Spreads by which each mean sank in its worst window, and the step at which that ended; only
    windows between new weights and the last firing count."""
    n, last, base = len(mean), past.last[-1], past.base
    record = torch.arange(1, n)[:, None]
    until = torch.where(last > base, last + 1, n)
    falls = (mean[:-1] - mean[1:]).masked_fill((record <= base) | (record > until), -torch.inf)
    fall, worst = falls.max(0)
    return fall.clamp_min(0), past.step[1:][worst]


def _shrunken(figures: Mapping[str, Float[Tensor, "record latent"]]) -> Bool[Tensor, " latent"]:
    """What began short and did not learn has not shrunk."""
    norms = [figures[f"{side}oder norm"] for side in ("enc", "dec")]
    enc, dec = ((norm[-1] < SHRUNKEN) & (norm[-1] < norm[0].median() / 2) for norm in norms)
    return enc | dec


def _pushed(
    start: Mapping[str, Float[Tensor, " latent"]],
    after: Mapping[str, Float[Tensor, " latent"]],
    fall: Float[Tensor, " latent"],
    living: Bool[Tensor, " latent"],
    n_records: int,
) -> dict[str, Bool[Tensor, " latent"]]:
    """Of which latents the rules of the two causes are true that a sinking mean has: "thrown out"
    within a window, "pushed away" little by little."""
    sunk = start["mean"] - after["mean"]
    usual = sunk[living].median().clamp_min(0) if living.any() else sunk.new_zeros(())
    # What could not have fired at the start did not die of a fall, however far it moved since.
    fell = (start["top"] > 0) & (sunk >= FALL)
    return {
        "thrown out": fell & (fall >= SUDDEN * sunk) & (n_records > WINDOWS),
        "pushed away": fell & ((sunk - usual >= FALL) | (after["top"] <= 0)),
    }


def _first(
    holds: Mapping[str, Bool[Tensor, " latent"]], ill: Bool[Tensor, " latent"]
) -> Int[Tensor, " latent"]:
    """The first of CAUSES whose rule holds, of the ill; -1 of the others."""
    cause = torch.full(ill.shape, -1)
    for i, named in reversed(list(enumerate(CAUSES))):
        cause[holds[named.name] & ill] = i
    return cause


def _at(
    figures: Mapping[str, Float[Tensor, "record latent"]], record: Int[Tensor, " latent"]
) -> dict[str, Float[Tensor, " latent"]]:
    """What each latent has at a record of its own."""
    return {name: table.gather(0, record[None])[0] for name, table in figures.items()}


def _figures(
    life: Mapping[str, Tensor], living: Bool[Tensor, " latent"]
) -> dict[str, Float[Tensor, "record latent"]]:
    """FIGURES of every record. Where none lives, norms are compared with all at the start."""
    at, who = (-1, living) if living.any() else (0, torch.ones_like(living))
    # A latent without weights has no spread; in units of nearly nothing its figures would be lost.
    unit = life["spread"].clamp_min(1e-3 * float(life["spread"][at, who].median()) + 1e-12)
    norms = {
        f"{side}oder norm": life[f"{side}_norm"]
        / life[f"{side}_norm"][at, who].median().clamp_min(1e-12)
        for side in ("enc", "dec")
    }
    return {name: life[name] / unit for name in ("margin", "top", "mean")} | norms


def _twins(
    W_dec: Float[Tensor, "latent d_out"] | None,
    ill: Bool[Tensor, " latent"],
    living: Bool[Tensor, " latent"],
) -> tuple[Int[Tensor, " latent"], Float[Tensor, " latent"]]:
    """Of each ill latent the living one with the closest decoder row, and the cosine of the two;
    -1 and 0 for the others."""
    twin = torch.full((len(ill),), -1)
    cosine = torch.zeros(len(ill))
    if W_dec is None or not living.any():
        return twin, cosine
    rows, others = normalize(W_dec, dim=1), living.nonzero().flatten()
    for some in ill.nonzero().flatten().split(1024):
        closest = (rows[some] @ rows[others].T).max(1)
        twin[some], cosine[some] = others[closest.indices], closest.values
    return twin, cosine
