"""The verbs, and the data flow in the order in which it happens."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from linbench import __version__
from linbench.errors import UsageError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from linbench.record import Frontier, Record, Run
    from linbench.sweep import Plan

VERBS = {
    "run": "measure a sweep: linbench run +sweep=smoke",
    "plan": "show what a sweep would measure, what it costs and what is left out, without running it",
    "frontier": "search the longest sequence that fits into memory and time: linbench frontier +sweep=frontier",
    "check": "try to refute a mechanism: causality, gradients, strides, costs, what it claims: linbench check NAME",
    "capture": "keep q, k, v of a Hugging Face model on a text: linbench capture MODEL --text FILE --out FILE",
    "report": "build the report of results files or folders",
    "list": "show mechanisms, inputs, sweeps, measures and devices",
    "doctor": "say whether this machine is fit to measure",
}
CONFIGURED = ("run", "plan", "frontier")
"""The verbs whose words Hydra composes."""
USAGE, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """The ``linbench`` command.

    Returns:
        its exit code: 0, 1 for an unfit machine or a refuted mechanism, 2 for bad input, 130 for Ctrl-C.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    warnings.showwarning = _show_warning
    try:
        return _dispatch(argv)
    except UsageError as error:
        print(f"linbench: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:  # `linbench list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(argv: list[str]) -> int:
    if argv[:1] in (["-sc"], ["--shell-completion"]):
        return _complete(argv)
    verb, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(_help())
        return 0
    if verb in ("-V", "--version"):
        print(f"linbench {__version__}")
        return 0
    if verb in CONFIGURED:
        from linbench.hydra_front import compose_and_call

        return compose_and_call({"run": run, "plan": plan, "frontier": frontier}[verb], verb, rest)
    others = {"check": check, "capture": capture, "report": report, "list": list_choices, "doctor": doctor}
    if verb in others:
        return others[verb](rest)
    raise UsageError(f"unknown verb '{verb}'; choose from {', '.join(VERBS)}")


def _help() -> str:
    lines = [f"  {verb:9} {text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            "linbench: which attention mechanism at my length, on my device, and what do I lose?",
            "",
            *lines,
            "",
            '`linbench VERB --help` says more. Completion: eval "$(linbench -sc install=bash)"',
        ]
    )


def run(config: DictConfig, command: str) -> int:
    """Config → plan → runner → store → report."""
    from linbench.execution import execute
    from linbench.hydra_front import checked
    from linbench.progress import SweepProgress, duration
    from linbench.report.rounds import sentence
    from linbench.runner import Runner
    from linbench.store import read_all
    from linbench.sweep import prepare

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice is a Ctrl-C
    asked = checked(config)
    try:
        with Runner() as runner:
            plan = prepare(asked, runner)
            _announce(plan, "cells", len(plan.pending), len(plan.finished))
            if plan.pending or plan.repeated:
                with SweepProgress(plan.pending, plan.repeated) as progress:
                    execute(plan, runner, command, progress)
    except KeyboardInterrupt:
        return _stopped(command)
    records = plan.records
    files = [plan.folder / f"{name}.jsonl" for name in plan.runs]
    spent = duration(sum(record.elapsed_s + sum(again.elapsed_s for again in record.rounds) for record in records))
    print(f"{_tally(records)}; {spent} of measuring. Records: {files[-1]}")
    if told := sentence(records):
        print(told)
    title = f"linbench {asked.sweep} on {plan.environment.machine}"
    runs, _ = read_all(files)
    print(f"Report: {_write_report(runs, records, [], files[-1].with_suffix('.report'), title)}")
    return 0


def plan(config: DictConfig, _command: str) -> int:
    """Config → plan, shown."""
    from linbench.hydra_front import checked
    from linbench.plan_table import show
    from linbench.runner import Runner
    from linbench.sweep import prepare

    with Runner() as runner:
        show(prepare(checked(config), runner))
    return 0


def frontier(config: DictConfig, command: str) -> int:
    """Config → series → the longest length of each that fits → store → report."""
    from linbench.frontier import execute, prepare
    from linbench.frontier_progress import FrontierProgress
    from linbench.hydra_front import checked
    from linbench.runner import Runner
    from linbench.store import read_all

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    asked = checked(config)
    try:
        with Runner() as runner:
            searches = prepare(asked, runner)
            plan = searches.plan
            _announce(plan, "series", len(searches.pending), len(searches.done))
            if searches.pending:
                with FrontierProgress(len(searches.pending)) as progress:
                    execute(searches, runner, command, progress)
    except KeyboardInterrupt:
        return _stopped(command)
    files = [plan.folder / f"{name}.jsonl" for name in sorted({line.run for line in searches.frontiers})]
    title = f"linbench {asked.sweep} on {plan.environment.machine}"
    runs, _ = read_all(files)
    page = _write_report(runs, [], searches.frontiers, files[-1].with_suffix(".report"), title)
    print(f"{len(searches.frontiers)} frontiers. Records: {files[-1]}\nReport: {page}")
    return 0


def check(argv: list[str]) -> int:
    """A mechanism → one finding for each property."""
    from linbench.checking import TIME_LIMIT_S, Request, check_all

    parser = _Parser(prog="linbench check", description=VERBS["check"])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a mechanism, an import path my_module.MyClass, or all"
    )
    parser.add_argument("--implementation", nargs="+", default=[], help="default: all that it has")
    parser.add_argument(
        "--property", nargs="+", default=[], help="only these, as causality forms-agree; after NAME (default: all)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="set a hyperparameter; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller sizes")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--time-limit-s", type=float, default=TIME_LIMIT_S, help="for one property (default: %(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    request = Request(
        implementations=options.implementation,
        properties=options.property,
        settings=options.set,
        quick=options.quick,
        device=options.device,
        time_limit_s=options.time_limit_s,
    )
    return check_all(options.names, request, as_json=options.json)


def capture(argv: list[str]) -> int:
    """A model and a text → a file of q, k, v."""
    from linbench.capture import Request, capture

    parser = _Parser(prog="linbench capture", description=VERBS["capture"])
    parser.add_argument("model", metavar="MODEL", help="a folder with a Hugging Face model, or its name on the hub")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8, one text each")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--layers", type=int, nargs="+", help="counted from 0 (default: first, middle, last)")
    parser.add_argument("--heads", type=int, nargs="+", help="of the queries, counted from 0 (default: all)")
    parser.add_argument("--tokens", type=int, help="of each text (default: as many as the shortest has)")
    options = parser.parse_args(argv)
    asked = Request(options.model, options.text, options.out, options.layers, options.heads, options.tokens)
    print(capture(asked))
    return 0


def report(argv: list[str]) -> int:
    """Records → report."""
    from linbench.store import read_all, read_frontiers, results_files

    parser = _Parser(prog="linbench report", description=VERBS["report"])
    parser.add_argument("paths", nargs="*", default=["results"], help="results files or folders (default: results)")
    parser.add_argument("--output", help="folder to write (default: all.report, beside the results)")
    parser.add_argument("--title", help="heading of the page")
    options = parser.parse_args(argv)
    paths = [Path(path) for path in options.paths]
    beside = paths[0] if paths[0].is_dir() else paths[0].parent
    folder = Path(options.output) if options.output else beside / "all.report"
    files = results_files(paths)
    runs, records = read_all(files)
    frontiers = read_frontiers(files)
    page = _write_report(runs, records, frontiers, folder, options.title or f"linbench: {', '.join(options.paths)}")
    print(f"{_tally(records)}{f'; {len(frontiers)} frontiers' if frontiers else ''}. Report: {page}")
    return 0


def list_choices(argv: list[str]) -> int:
    """What there is to choose from."""
    from linbench.listing import GROUPS, show

    parser = _Parser(prog="linbench list", description=VERBS["list"])
    parser.add_argument("group", nargs="?", choices=GROUPS, help="one group only (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    show([options.group] if options.group else list(GROUPS), as_json=options.json)
    return 0


def doctor(argv: list[str]) -> int:
    """Is this machine fit to measure?"""
    from linbench.doctor import examine

    _Parser(prog="linbench doctor", description=VERBS["doctor"]).parse_args(argv)
    return examine()


def _announce(plan: Plan, what: str, pending: int, finished: int) -> None:
    for problem in plan.problems:
        print(f"linbench: warning: {problem}", file=sys.stderr)
    known = f", {finished} more are finished already" if finished else ""
    environment = plan.environment
    where = (
        ", ".join(environment.gpus) or f"{environment.cpu}, {environment.threads} of {environment.cores_logical} CPUs"
    )
    print(f"{pending} {what}{known}. {where}. Results: {plan.folder}")


def _stopped(command: str) -> int:
    print(f"\nStopped. What was measured is kept; this goes on from there: {command}", file=sys.stderr)
    return INTERRUPTED


def _tally(records: Sequence[Record]) -> str:
    counts: dict[str, int] = {}
    for record in records:
        counts[str(record.best_status)] = counts.get(str(record.best_status), 0) + 1
    parts = ", ".join(f"{count} {status}" for status, count in sorted(counts.items(), key=lambda item: -item[1]))
    return f"{len(records)} cells: {parts}"


def _write_report(
    runs: Sequence[Run], records: Sequence[Record], frontiers: Sequence[Frontier], folder: Path, title: str
) -> Path:
    from linbench.report import write_report

    try:
        return write_report(records, runs, folder, title, frontiers)
    except OSError as error:
        raise UsageError(f"the report cannot be written to {folder}: {error.strerror or error}") from error


def _complete(argv: list[str]) -> int:
    """Shell completion: the verb is ours, the rest is Hydra's.

    Hydra's script calls ``linbench -sc query=SHELL`` with the typed line in COMP_LINE; the verb is taken out of it.
    """
    from linbench.hydra_front import hydra_completion

    typed = re.match(r"^\s*(\S+)\s+(\S+)(\s.*)$", os.environ.get("COMP_LINE", ""))
    if any(argument.startswith("query=") for argument in argv):
        if not typed:
            begun = os.environ.get("COMP_LINE", "").split()[1:]
            print(*(verb for verb in VERBS if not begun or verb.startswith(begun[0])))
            return 0
        if typed[2] not in CONFIGURED:
            return 0
        os.environ["COMP_LINE"] = typed[1] + typed[3]
    return hydra_completion(argv)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise UsageError(f"{self.prog.removeprefix('linbench ')}: {message}")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"linbench: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
