"""``linbench check``: mechanisms in, one finding for each property out. Every property runs in a process of its own."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from linbench import registry
from linbench.cell import Scalar
from linbench.check_table import Result, console, show
from linbench.config import name_of
from linbench.conformance.finding import Finding, failed
from linbench.environment import available_memory_bytes, default_threads
from linbench.errors import UsageError
from linbench.protocol import Examined, ExamineRequest
from linbench.runner import Runner
from linbench.sweep import MEMORY_SHARE

TIME_LIMIT_S = 120.0
LOOK_LIMIT_S = 120.0
"""For building a mechanism before anything is asked of it; the first also waits for the server to import torch."""
PATIENCE = 3
"""After so many properties without an answer in time the others are not tried: each would cost the limit again."""
INTERRUPTED = 130


@dataclass(frozen=True)
class Request:
    """What is asked of every mechanism."""

    implementations: Sequence[str] = ()
    properties: Sequence[str] = ()
    """Empty: all."""
    settings: Sequence[str] = ()
    """Hyperparameters as ``name=value``."""
    quick: bool = False
    device: str = "cpu"
    time_limit_s: float = TIME_LIMIT_S


@dataclass(frozen=True)
class _Subject:
    """A mechanism that is meant: its name, and the import path of what is not registered."""

    name: str
    target: str | None = None
    by_all: bool = False
    """Meant by ``all``: one that cannot be looked at does not stop the others."""

    @property
    def typed(self) -> str:
        """As it was asked for."""
        return self.target or self.name


def check_all(names: Sequence[str], request: Request, *, as_json: bool = False) -> int:
    """Check mechanisms and print what was found.

    Args:
        names: registered names, import paths ``module.Class``, or ``all``.

    Returns:
        0, 1 when one of them is refuted or cannot be looked at, 130 after Ctrl-C.

    Raises:
        UsageError: no such mechanism, implementation, hyperparameter or property, or no time to look at it.
    """
    if not request.time_limit_s > 0:
        raise UsageError(f"check: --time-limit-s {request.time_limit_s:g}: a number of seconds above 0 is needed")
    subjects, settings = _subjects(names), _settings(request.settings)
    out, results = console(), []
    try:
        with Runner(also_preload=["linbench.conformance.kit"]) as runner:
            for subject in subjects:
                result = Result(subject.typed)
                results.append(result)
                _look(subject, _asked(subject, settings, request), request, runner, result)
                if not as_json:
                    show(result, _title(subject, request), out)
    except KeyboardInterrupt:
        if results and results[-1].findings and not as_json:
            show(results[-1], _title(subject, request), out)
        print("\nStopped; what is above is what was looked at.", file=sys.stderr)
        return INTERRUPTED
    if as_json:
        print(json.dumps({result.name: _plain(result) for result in results}, indent=2))
    elif len(results) > 1:
        bad = [result.name for result in results if not result.passed and result.refusal is None]
        unseen = [result.name for result in results if result.refusal is not None]
        told = f"; not looked at: {', '.join(unseen)}" if unseen else ""
        line = f"{len(results)} mechanisms; refuted: {', '.join(bad) or 'none'}{told}."
        out.print(line, markup=False, soft_wrap=True)
    return 0 if all(result.passed for result in results) else 1


def _subjects(names: Sequence[str]) -> list[_Subject]:
    """The mechanisms that are meant, each once.

    Raises:
        UsageError: none is named, or one that there is not.
    """
    if not names:
        raise UsageError("check: name a mechanism before the options: linbench check NAME --property causality")
    known = registry.targets()
    meant: list[_Subject] = []
    for name in names:
        if name == "all":
            meant += [_Subject(every, by_all=True) for every in sorted(known)]
        elif name in known:
            meant.append(_Subject(name))
        elif "." in name:
            meant.append(_Subject(name_of(name), name))
        else:
            choices = f"choose from all, {', '.join(sorted(known))}, or give an import path"
            raise UsageError(f"unknown mechanism '{name}'{_hint(name, known)}; {choices}")
    return list(dict.fromkeys(meant))


def _hint(name: str, known: Sequence[str] | dict[str, str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _title(subject: _Subject, request: Request) -> str:
    words = [word for setting in request.settings for word in ("--set", setting)]
    words += ["--quick"] if request.quick else []
    words += ["--device", request.device] if request.device != "cpu" else []
    return " ".join(["linbench check", subject.typed, *words])


def _asked(subject: _Subject, settings: dict[str, Scalar], request: Request) -> ExamineRequest:
    return ExamineRequest(
        mechanism=subject.name,
        target=subject.target,
        hyperparameters=settings,
        implementations=list(request.implementations),
        quick=request.quick,
        device=request.device,
        threads=default_threads(),
        memory_limit_bytes=int(available_memory_bytes() * MEMORY_SHARE) if request.device == "cpu" else None,
    )


def _look(subject: _Subject, asked: ExamineRequest, request: Request, runner: Runner, result: Result) -> None:
    """Fill in a result as findings come."""
    began = time.perf_counter()
    with _progress(subject.typed) as tell:
        tell("starting")
        try:
            known = runner.examine(asked, LOOK_LIMIT_S)
        except RuntimeError as error:
            result.refusal = str(error)
            return
        if known.usage_error is not None and subject.by_all and not request.settings:
            result.refusal = known.usage_error
            return
        _refuse(known)
        result.meanings = {name: meaning.replace("``", "") for name, meaning in known.properties.items()}
        result.notes = known.notes
        wanted = [_property(name, result.meanings) for name in request.properties] or list(result.meanings)
        unanswered = 0
        for number, property_ in enumerate(wanted, 1):
            tell(f"{property_} ({number} of {len(wanted)})")
            if unanswered < PATIENCE:
                about = asked.model_copy(update={"property": property_})
                finding, in_time = _examined(about, request.time_limit_s, runner)
                unanswered += not in_time
            else:
                finding = failed(f"not looked at: {PATIENCE} properties before it gave no answer in time")
            result.findings[property_] = finding
            result.seconds = time.perf_counter() - began


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[str], None]]:
    """One line on a terminal that says what is looked at; nothing elsewhere."""
    with Console(stderr=True).status("") as status:
        yield lambda what: status.update(f"{name}: {what}")


def _property(name: str, known: dict[str, str]) -> str:
    """The property that is meant; blanks may be typed as hyphens or underscores."""
    plain = re.sub(r"[-_]", " ", name.strip().lower())
    if plain not in known:
        raise UsageError(f"unknown property '{name}'{_hint(plain, known)}; choose from {', '.join(known)}")
    return plain


def _examined(asked: ExamineRequest, time_limit_s: float, runner: Runner) -> tuple[Finding, bool]:
    """The finding, and whether an answer came in time; a process that ends without one came to its end."""
    began = time.perf_counter()
    try:
        answer = runner.examine(asked, time_limit_s)
    except RuntimeError as error:
        in_time = time.perf_counter() - began < time_limit_s
        return failed(str(error) if in_time else f"{error}; --time-limit-s is {time_limit_s:g}"), in_time
    _refuse(answer)
    return answer.finding or failed("nothing was found"), True


def _refuse(answer: Examined) -> None:
    if answer.usage_error is not None:
        raise UsageError(answer.usage_error)


def _settings(words: Sequence[str]) -> dict[str, Scalar]:
    """``window=64`` as name and value, the value read as JSON, else as a word."""
    settings: dict[str, Scalar] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not re.fullmatch(r"\w+", name):
            raise UsageError(f"check: --set {word}: write --set hyperparameter=value")
        settings[name] = _scalar(value)
    return settings


def _scalar(text: str) -> Scalar:
    try:
        value = json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
    return value if isinstance(value, bool | int | float | str | None) else text


def _plain(result: Result) -> dict[str, Any]:
    findings = {
        name: {"means": result.meanings[name], **finding.model_dump(mode="json")}
        for name, finding in result.findings.items()
    }
    about = {"passed": result.passed, "seconds": round(result.seconds, 3), "notes": result.notes}
    return {**about, "refusal": result.refusal, "properties": findings}
