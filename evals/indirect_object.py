"""What an SAE is worth on a task with a known answer: the indirect object (Makelov, Lange and Nanda
2024, arXiv 2405.08366).

Prompts "When Mary and John went to the store, John gave a drink to" have three attributes: the
indirect object IO (Mary), the subject S (John), and the order Pos of their first mention (ABB,
BAB). An activation at the SAE's hook, where the IO stands, where S does (twice) or at the last
token, may hold each. Three tests compare the SAE with supervised dictionaries, which know the
attributes (`_supervised`), and with random ones of its width and sparsity (`_controls`):

    approximation     does x_hat do the model's work, and does nothing of it lie in x - x_hat?
    sparse control    does exchanging k latents change the attribute as the counterfactual does?
    interpretability  do single latents tell an attribute's value?

The equations stand in `_task_scores`, `_edits` and `_predicates`. The baseline is mean ablation
over the task's prompts, so that nothing here compares with shares against zero ablation. All places
are replaced at once, with what the same place holds in another prompt or in a reconstruction. An
edit at a place that later layers no longer read changes nothing: then the patch agrees with no
intervention, `*_agreement_none`, which to read first.

Feature occlusion: activations less a share alpha of their supervised IO code are read by the SAE,
which was not trained on such, and, as the paper's figure is understood, by SAEs refitted to them:
`occluded_out` writes what to train them on, and `refitted` names them.

Axes: row (prompts), place, d, d_sae, sample (resamples of the prompts).
"""

import logging
from collections.abc import Iterator
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saekit import seeds
from saekit.errors import ConfigError, Undefined
from saekit.evals import _task_occluded
from saekit.evals._base import Eval, EvalConfig, Findings
from saekit.evals._controls import random_pursuit_sae, random_sae
from saekit.evals._edits import Candidates, by_score, greedy
from saekit.evals._indirect_object_config import IndirectObjectConfig
from saekit.evals._indirect_object_prompts import (
    ATTRIBUTES,
    ROLES,
    Attribute,
    Prompts,
    changed,
    make,
)
from saekit.evals._metrics import Reconstruction
from saekit.evals._supervised import Code, Design, SupervisedDictionary
from saekit.evals._task_codes import Coder
from saekit.evals._task_interpretability import (
    GROUPS,
    Predicates,
    count_occluded,
    count_told,
)
from saekit.evals._task_patch import Patcher
from saekit.evals._task_scores import Table
from saekit.evals._task_tests import WHO, Editor, Places, Target, Task, approximation, clean
from saekit.progress import bar
from saekit.results import Metric
from saekit.sae import SAE

__all__ = ["EVAL", "IndirectObject", "IndirectObjectConfig"]

log = logging.getLogger(__name__)

_CODES: tuple[Code, ...] = ("mean", "mse")
_EDITORS = {
    "sae": "the SAE's, by greedy search for the counterfactual's activation",
    "by_f1": "the SAE's, those that tell most of the attribute (F1 on the prompts of the fit)",
    "random_latents": "the SAE's, drawn from those active in either prompt",
    "random_sae": "a random SAE's, by greedy search",
    "random_pursuit": "those of a random dictionary, encoded by matching pursuit, by greedy search",
}


class IndirectObject(Eval):
    Config: ClassVar[type[EvalConfig]] = IndirectObjectConfig
    cfg: IndirectObjectConfig

    def run(self) -> Findings:
        cfg = self.cfg
        model = self.load_model()
        split = cfg.split
        assert split != "all"
        prompts = make(model, cfg.n_fit + cfg.n_test, cfg.seed, split, cfg.names)
        if cfg.occluded_out is not None:
            _task_occluded.refuse(cfg.occluded_out)
        again = _task_occluded.refitted(
            cfg.refitted, self.cache, self.hook, cfg.occlude, self.device
        )
        places = tuple(ROLES.index(role) for role in cfg.positions)
        with bar("prompts", self._passes(), shown=self.progress) as shown:
            patcher = Patcher(model, self.hook, places, cfg.batch_size, shown.advance)
            run = _Run(cfg, self._dictionaries(), patcher, prompts, again)
            findings = run.findings()
        if cfg.occluded_out is not None:
            token = run.fit.ids.gather(1, run.fit.at[:, list(places)])
            hooks = {
                _task_occluded.hook_of(self.hook, alpha): run.occluded(run.x_fit, run.fit, alpha)
                for alpha in cfg.occlude
            }
            _task_occluded.write(cfg.occluded_out, self.cache, hooks, token)
        return findings

    def _dictionaries(self) -> dict[str, SAE]:
        """The SAE, and the random ones where there can be any."""
        found = {"sae": self.sae}
        of = {"random_sae": random_sae, "random_pursuit": random_pursuit_sae}
        for name, control_of in of.items():
            try:
                control = control_of(self.sae, self.cache, self.hook, seed=self.cfg.seed)
            except ConfigError as reason:
                log.warning("every number of %s is left out: %s", name, reason)
            else:
                found[name] = control.to(self.device)
        return found

    def _passes(self) -> int:
        """Prompts that will run, each as often as it does."""
        cfg = self.cfg
        a_target = 4 + len(_EDITORS) * len(cfg.k)
        edits = 2 + 2 * (len(_CODES) + 3) + 2 + len(cfg.attributes) * a_target
        return cfg.n_fit + cfg.n_test + edits * cfg.n_patch


EVAL = IndirectObject


class _Run:
    """One evaluation under way."""

    def __init__(
        self,
        cfg: IndirectObjectConfig,
        saes: dict[str, SAE],
        patcher: Patcher,
        prompts: Prompts,
        refitted: dict[float, SAE],
    ) -> None:
        self.cfg, self.patcher = cfg, patcher
        self.refitted = {alpha: Coder(sae, cfg.batch_size) for alpha, sae in refitted.items()}
        self.fit, self.test = prompts[: cfg.n_fit], prompts[cfg.n_fit :]
        self.x_fit, self.x_test = patcher.read(self.fit), patcher.read(self.test)
        patched = self.test[: cfg.n_patch]
        table = Table.over(cfg.n_patch, cfg.n_bootstrap, cfg.seed)
        self.task = Task(patcher, patched, self.x_test[: cfg.n_patch], table)
        self.told = Table.over(cfg.n_test, cfg.n_bootstrap, cfg.seed)
        self.supervised = self._supervised()
        self.mean = self.supervised["mean"].mean.view(self.x_fit.shape[1:])
        self.coders = {who: Coder(sae, cfg.batch_size) for who, sae in saes.items()}
        self.predicates = {
            who: Predicates(coder.sight(self.x_fit, self.fit, cfg.union))
            for who, coder in self.coders.items()
        }

    def findings(self) -> Findings:
        clean(self.task)
        self._approximation()
        for attribute in self.cfg.attributes:
            self._control(attribute)
        for who in self.coders:
            self._interpretability(who)
        self._causal_check()
        self._occlusion()
        metrics = {**self.task.table.metrics, **self.told.metrics}
        return Findings(metrics=metrics, arrays={**self.task.table.arrays, **self.told.arrays})

    def _supervised(self) -> dict[Code, SupervisedDictionary]:
        size, sizes = self.cfg.batch_size, self.fit.sizes
        rows = zip(
            torch.split(self.x_fit.flatten(1), size),
            torch.split(self.fit.values, size),
            strict=True,
        )
        first, *rest = (Design.of(x, values, sizes) for x, values in rows)
        design = sum(rest, first)
        return {code: SupervisedDictionary.fit(design, code) for code in _CODES}

    def _approximation(self) -> None:
        encoded: dict[str, Places] = {}
        for who, coder in self.coders.items():
            encoded[who] = coder.decode(coder.code(self.x_test), self.x_test)
        for code, dictionary in self.supervised.items():
            x_hat = dictionary.reconstruct(self.test.values)
            encoded[f"{code}_code"] = x_hat.view_as(self.x_test)
        for who, x_hat in encoded.items():
            self._explained(who, x_hat)
        n = self.cfg.n_patch
        approximation(self.task, {who: x[:n] for who, x in encoded.items()}, self.mean)

    def _explained(self, who: str, x_hat: Places) -> None:
        quality = Reconstruction.of(self.x_test.flatten(1), x_hat.flatten(1))
        try:
            value = quality.ev
        except Undefined as reason:
            log.warning("%s_ev is left out: %s", who, reason)
            return
        self.told.metrics[f"{who}_ev"] = Metric(
            value=value,
            definition=f"1 - sum|x - x_hat|^2 / sum|x - mu|^2 over prompts and places, x_hat "
            f"{WHO[who]}, mu the mean at the place; an interval is not given",
            n=quality.n,
        )

    def _control(self, attribute: Attribute) -> None:
        cfg, task = self.cfg, self.task
        prompts = changed(task.prompts, attribute, cfg.seed)
        target = Target.of(task, attribute, prompts)
        target.baselines()
        column = ATTRIBUTES.index(attribute)
        old, new = task.prompts.values[:, column], prompts.values[:, column]
        for code, dictionary in self.supervised.items():
            x = dictionary.edit(task.x.flatten(1), attribute, old, new).view_as(task.x)
            target.edited(f"{code}_code", x, f"with u[{attribute}] exchanged ({code} code)")
        if cfg.k:
            for editor in self._editors(target):
                for k in cfg.k:
                    editor.score(target, k)

    def _editors(self, target: Target) -> Iterator[Editor]:
        cfg, task, most = self.cfg, self.task, max(self.cfg.k)
        goal = target.x.flatten(0, 1)
        for who, coder in self.coders.items():
            code = coder.code(task.x)
            kept = task.x if cfg.error_term == "keep" else coder.decode(code, task.x)
            start, candidates = kept.flatten(0, 1), Candidates.of(code, coder.code(target.x))
            W_dec = coder.sae.W_dec.cpu()
            orders = {who: greedy(start, goal, candidates, W_dec, most)}
            if who == "sae":
                orders["by_f1"] = by_score(candidates, self._told(target, candidates), most)
                generator = seeds.stream("random latents", cfg.seed)
                drawn = torch.rand(candidates.latent.shape, generator=generator)
                orders["random_latents"] = by_score(candidates, drawn.double(), most)
            for name, order in orders.items():
                yield Editor(name, _EDITORS[name], start, candidates, W_dec, order)

    def _told(self, target: Target, candidates: Candidates) -> Float[Tensor, "rows slot"]:
        """How well each candidate tells the attribute at its place, on the prompts of the fit."""
        f1 = self.predicates["sae"].fit_f1(GROUPS[target.attribute.lower()])
        place = torch.arange(len(candidates.latent)) % len(f1)
        return f1[place[:, None], candidates.latent]

    def _interpretability(self, who: str) -> None:
        predicates = self.predicates[who]
        sight = self.coders[who].sight(self.x_test, self.test, self.cfg.union)
        weights = self.told.resamples.weights.double()
        f1 = count_told(self.told, who, predicates, sight, weights)
        alive = torch.cat(predicates.alive).unique()
        by_latent = torch.zeros(self.coders[who].sae.d_sae, dtype=torch.float64)
        by_latent[alive] = f1[:, 0]
        self.told.arrays[f"{who}_f1"] = by_latent.numpy()

    def _causal_check(self) -> None:
        """Keep, or remove, the latents that tell who the IO or the S is, where they stand. Those
        that tell the order are no part of it: one that always fires has an F1 of 0.67 for that."""
        cfg, task, coder = self.cfg, self.task, self.coders["sae"]
        tells = self.predicates["sae"].fit_f1(GROUPS["io"] + GROUPS["s"]) >= cfg.told
        code = coder.code(task.x)
        place = torch.arange(len(code.values)) % len(tells)
        telling = tells[place[:, None], code.indices]
        start = task.x if cfg.error_term == "keep" else coder.decode(code, task.x)
        percent = round(100 * cfg.told)
        for verb, taken in (("keep", ~telling), ("remove", telling)):
            values = code.values * taken
            gone = (values[:, None] @ coder.sae.W_dec.cpu()[code.indices])[:, 0]
            task.difference(
                f"sae_{verb}_f1_{percent}_ld",
                start - gone.view_as(start),
                f"with the SAE's latents {'below' if verb == 'keep' else 'of'} F1 {cfg.told:g} for "
                "the IO or the S (on the prompts of the fit, at their place) set to 0",
            )

    def occluded(self, x: Places, prompts: Prompts, alpha: float) -> Places:
        """Activations of these prompts less that share of their IO code."""
        code = self.supervised["mse"].part("IO", prompts.io)
        return x - alpha * code.view_as(x).float()

    def _occlusion(self) -> None:
        weights = self.told.resamples.weights.double()
        for alpha in self.cfg.occlude:
            x_fit = self.occluded(self.x_fit, self.fit, alpha)
            x_test = self.occluded(self.x_test, self.test, alpha)
            readers = {"sae": self.coders["sae"]}
            if alpha in self.refitted:
                readers["refitted"] = self.refitted[alpha]
            for who, coder in readers.items():
                predicates = Predicates(coder.sight(x_fit, self.fit, self.cfg.union))
                sight = coder.sight(x_test, self.test, self.cfg.union)
                count_occluded(self.told, who, alpha, predicates, sight, weights)
