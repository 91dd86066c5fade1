"""The first two tests of a dictionary on a task: does it approximate, and can it be edited? Each
writes its numbers into a table.

Axes: row (prompts), place, d, sample (resamples of the prompts).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from saekit.evals._edits import Candidates, Order, apply, share_changed
from saekit.evals._indirect_object_prompts import Attribute, Prompts
from saekit.evals._task_patch import Answers, Patcher
from saekit.evals._task_scores import Samples, Table, effect, necessity, recovered, sufficiency

Places = Float[Tensor, "row place d"]

WHO = {
    "sae": "the SAE's reconstruction",
    "random_sae": "the reconstruction of a random SAE of the same width and L0",
    "random_pursuit": "the reconstruction of a random dictionary of the same width, encoded by "
    "matching pursuit in as many steps as the SAE's L0",
    "mean_code": "the supervised dictionary of mean codes, mu + sum_i u[i, v_i]",
    "mse_code": "the supervised dictionary of least squares codes, mu + sum_i u[i, v_i]",
}


@dataclass(frozen=True)
class Task:
    """Prompts, the activations at their places, and a table for what edits of these do."""

    patcher: Patcher
    prompts: Prompts
    x: Places
    table: Table

    @cached_property
    def clean(self) -> Answers:
        return self.patcher.answer(self.prompts)

    @cached_property
    def clean_mean(self) -> Samples:
        """LD_clean."""
        return self.table.mean(self.clean.difference)

    def difference(self, name: str, replacement: Places, how: str) -> Samples:
        """The mean logit difference with the activation replaced; also into the table."""
        answers = self.patcher.answer(self.prompts, replacement)
        what = f"mean over prompts of logit(IO) - logit(S), {how}"
        self.table.add_mean(name, answers.difference, what)
        return self.table.mean(answers.difference)


def clean(task: Task) -> None:
    """How well the untouched model solves the task."""
    answers, prompts = task.clean, task.prompts
    task.table.add_mean(
        "ld_clean", answers.difference, "mean over prompts of logit(IO) - logit(S), untouched model"
    )
    task.table.add_mean(
        "accuracy", answers.difference > 0, "share of prompts with logit(IO) > logit(S)"
    )
    task.table.add_mean(
        "top1",
        answers.top == prompts.token[prompts.io],
        "share of prompts whose most likely next token, of the whole vocabulary, is the IO",
    )


def approximation(
    task: Task, encoded: Mapping[str, Places], mean: Float[Tensor, "place d"]
) -> None:
    """Sufficiency, recovered and necessity of each reconstruction, by its name in `WHO`."""
    table, of_clean = task.table, task.clean_mean
    ablated = task.difference(
        "ld_mean_ablated",
        mean.expand_as(task.x),
        "the activations replaced by their mean at that place over the prompts of the fit",
    )
    for who, x_hat in encoded.items():
        name = WHO[who]
        of_x_hat = task.difference(f"{who}_ld", x_hat, f"the activations replaced by {name}")
        without = task.difference(
            f"{who}_necessity_ld",
            mean + (task.x - x_hat),
            f"the activations replaced by mean + (x - x_hat), x_hat {name}",
        )
        table.add(
            f"{who}_sufficiency",
            sufficiency(of_clean, of_x_hat),
            f"{who}_ld / ld_clean; 1: x_hat does the activation's work",
        )
        table.add(
            f"{who}_recovered_mean",
            recovered(of_clean, ablated, of_x_hat),
            f"|{who}_ld - ld_mean_ablated| / |ld_clean - ld_mean_ablated|; 1: as good as the "
            "activation, 0: as its mean",
        )
        table.add(
            f"{who}_necessity_mean",
            necessity(of_clean, ablated, without),
            f"1 - |ld_mean_ablated - {who}_necessity_ld| / |ld_mean_ablated - ld_clean|; 1: "
            "nothing that counts is left in x - x_hat",
        )


@dataclass(frozen=True)
class Target:
    """The counterfactual of one attribute: its prompts, activations and answers."""

    task: Task
    attribute: Attribute
    prompts: Prompts
    x: Places
    answers: Answers
    """Of the source prompts, patched with the target's activations."""

    @classmethod
    def of(cls, task: Task, attribute: Attribute, prompts: Prompts) -> "Target":
        x = task.patcher.read(prompts)
        return cls(task, attribute, prompts, x, task.patcher.answer(task.prompts, x))

    def score(self, how: str, answers: Answers, what: str) -> None:
        """Agreement with the patch, and the share of its effect on the mean logit difference."""
        table, name = self.task.table, self.attribute.lower()
        table.add_mean(
            f"{name}_agreement_{how}",
            answers.top == self.answers.top,
            f"share of prompts whose most likely next token {what} is that with the activations of "
            f"the prompt with another {self.attribute}",
        )
        table.add_mean(
            f"{name}_ld_{how}",
            answers.difference,
            f"mean over prompts of logit(IO) - logit(S) {what}",
        )
        if how in ("none", "patch"):
            return
        patched = table.mean(self.answers.difference)
        table.add(
            f"{name}_effect_{how}",
            effect(self.task.clean_mean, patched, table.mean(answers.difference)),
            f"({name}_ld_{how} - ld_clean) / ({name}_ld_patch - ld_clean); 1: the patch's, 0: none",
        )

    def baselines(self) -> None:
        """Of the untouched model, and of the patch itself."""
        self.score("none", self.task.clean, "of the untouched model")
        table, name = self.task.table, self.attribute.lower()
        table.add_mean(
            f"{name}_ld_patch",
            self.answers.difference,
            "mean over prompts of logit(IO) - logit(S), of the prompt's own names, with the "
            f"activations of the prompt with another {self.attribute}",
        )

    def edited(self, how: str, x: Places, what: str) -> None:
        self.score(how, self.task.patcher.answer(self.task.prompts, x), what)


@dataclass(frozen=True)
class Editor:
    """Exchanges latents of one dictionary, in one order."""

    name: str
    what: str
    start: Float[Tensor, "rows d"]
    """Of the places one after another, prompt by prompt."""
    candidates: Candidates
    W_dec: Float[Tensor, "d_sae d"]
    order: Order

    def score(self, target: Target, k: int) -> None:
        first = self.order[:, :k]
        x = apply(self.start, self.candidates, self.W_dec, first).view_as(target.x)
        how = f"{self.name}_k{k}"
        target.edited(how, x, f"with {k} latents exchanged at each place, {self.what}")
        changed = share_changed(self.candidates, self.W_dec, first)
        table, name = target.task.table, target.attribute.lower()
        table.add_mean(
            f"{name}_share_{how}",
            changed.view(target.x.shape[:2]).mean(1),
            "mean over prompts and places of the share of the reconstruction that the edit takes "
            "away: sum over its latents of w_j = f_j d_j . v / |v|^2, v = sum_j f_j d_j",
        )
