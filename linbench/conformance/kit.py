"""The properties by name, and how one is looked at in every implementation and form that a mechanism has."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from linbench.cell import Scalar
from linbench.conformance import agreement, causality, claims, costs, gradients, repeatability, robustness, shapes
from linbench.conformance.finding import Finding, Verdict, failed, worst
from linbench.conformance.subject import Size, Subject
from linbench.errors import UsageError
from linbench.parameters import checked

Scope = Literal["every", "fast", "form", "mechanism"]


@dataclass(frozen=True)
class Property:
    """One thing that a mechanism has to hold."""

    name: str
    examine: Callable[[Subject], Finding]
    scope: Scope = "fast"
    """``every`` implementation, the reference included; every ``fast`` one; once a ``form``; once a ``mechanism``."""

    @property
    def meaning(self) -> str:
        """What it means, in a sentence."""
        return (self.examine.__doc__ or "").strip().partition("\n")[0]


PROPERTIES = {
    property_.name: property_
    for property_ in (
        Property("shape", shapes.output_shape, "every"),
        Property("operands intact", shapes.operands_intact),
        Property("rows", agreement.chosen_rows, "form"),
        Property("forms agree", agreement.forms_agree),
        Property("settings", agreement.every_setting),
        Property("bf16 and fp16", agreement.narrow_dtypes),
        Property("queries and keys", agreement.more_keys_than_queries),
        Property("batch", agreement.alone_as_in_a_batch, "every"),
        Property("causality", causality.future_changes_nothing, "every"),
        Property("step", causality.step_is_the_parallel_form, "form"),
        Property("prefill agrees", causality.prefill_is_the_parallel_form, "form"),
        Property("state bytes", causality.state_is_as_large_as_stated, "form"),
        Property("gradients", gradients.gradients_agree),
        Property("finite differences", gradients.finite_differences, "every"),
        Property("same seed", repeatability.same_seed_same_bits, "every"),
        Property("other seed", repeatability.other_seed_other_draws),
        Property("no memory", repeatability.no_memory_between_calls, "every"),
        Property("strides", robustness.any_strides, "every"),
        Property("unwritten memory", robustness.unwritten_memory, "every"),
        Property("extremes", robustness.extreme_numbers),
        Property("cost model", costs.cost_model_is_sane, "form"),
        Property("growth of work", costs.work_grows_as_claimed, "form"),
        Property("work done", costs.work_is_done),
        Property("growth of memory", costs.memory_grows_as_claimed, "form"),
        Property("rows sum to one", claims.rows_sum_to_one, "every"),
        Property("linear in values", claims.linear_in_values, "every"),
        Property("order", claims.order_does_not_matter, "every"),
        Property("duplicates", claims.duplicates_change_nothing, "every"),
        Property("exact limit", claims.exact_limit, "every"),
        Property("convergence", claims.convergence, "form"),
        Property("kind", agreement.kind_is_true, "form"),
    )
}


@dataclass(frozen=True)
class Examination:
    """What is asked: a mechanism, its settings, and which of its implementations."""

    name: str
    target: str | None = None
    hyperparameters: dict[str, Scalar] | None = None
    implementations: tuple[str, ...] = ()
    """Empty: all that it has."""
    quick: bool = False
    device: str = "cpu"

    def subjects(self, scope: Scope = "fast") -> list[Subject]:
        """The implementations and forms that a property of that scope looks at.

        Raises:
            UsageError: no such mechanism, implementation or hyperparameter.
        """
        cls = Subject(self.name, False, "reference", self.target).cls
        checked(cls.hyperparameters(), self.hyperparameters or {}, f"mechanism.{self.name}", "hyperparameters")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"--device cuda: torch {torch.__version__} sees no CUDA device")
        fast = [name for name in cls.implementations() if name != "reference"] or ["reference"]
        chosen = [name for name in (self.implementations or fast) if name != "reference"] or ["reference"]
        if unknown := [name for name in chosen if name not in cls.implementations()]:
            choices = ", ".join(cls.implementations())
            raise UsageError(f"{self.name} has no implementation '{unknown[0]}'; choose from {choices}")
        if scope == "every":
            chosen = [*dict.fromkeys(["reference", *chosen])]
        if scope in ("form", "mechanism"):
            chosen = chosen[:1] if "torch" not in chosen else ["torch"]
        forms = cls.description.causal_forms[:1] if scope == "mechanism" else cls.description.causal_forms
        subjects = [
            Subject(self.name, causal, name, self.target, dict(self.hyperparameters or {}), self.quick, self.device)
            for name in chosen
            for causal in forms
        ]
        able = [subject for subject in subjects if subject.unavailable is None]
        if not able or not {*self.implementations} <= {"reference", *(subject.implementation for subject in able)}:
            lacking = next(subject for subject in subjects if subject.unavailable is not None)
            raise UsageError(f"{self.name}, {lacking.implementation}: {lacking.unavailable}")
        return able

    def notes(self) -> list[str]:
        """Where the odd shape is refused: the shape that is looked at instead, and why."""
        told = []
        for subject in self.subjects("form"):
            odd = Size(1, 2, 150, 6, 5)
            reason = subject.refusal(odd)
            if reason is not None:
                told.append(f"{subject.form}: {subject.size(*odd)} instead of {odd}: {reason}")
        return told


def examine(asked: Examination, name: str, enter: Callable[[str], None] = lambda stage: None) -> Finding:
    """One property in every implementation and form; an exception is a failure with its reason.

    Args:
        enter: is told what is looked at, before it is.
    """
    found = list(_each(asked, PROPERTIES[name], enter))
    whole = worst(found)
    # where it applies nowhere, the last form (the causal one, if there are two) has the reason that says more
    return found[-1] if found and whole.verdict is Verdict.NOT_APPLICABLE else whole


def _each(asked: Examination, wanted: Property, enter: Callable[[str], None]) -> Iterator[Finding]:
    for subject in asked.subjects(wanted.scope):
        place = f"{subject.implementation}, {subject.form}"
        enter(place)
        finding = _guarded(wanted, subject)
        reason = f"{place}: {finding.reason}" if finding.reason else place
        yield finding.model_copy(update={"reason": reason})


def _guarded(wanted: Property, subject: Subject) -> Finding:
    state = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            subject.size(1, 2, 150, 6, 5)
            return wanted.examine(subject)
    except UsageError as error:
        return failed(str(error))
    except Exception as error:
        return failed(_told(error))
    finally:
        torch.set_rng_state(state)


def _told(error: Exception) -> str:
    """One line: the error, and the innermost frame outside torch."""
    text = str(error).strip().splitlines()
    torchs = str(Path(torch.__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(torchs)]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {text[0] if text else 'no message'}{place}"
