"""The verbs, and the data flow in the order in which it happens."""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linbench import __version__
from linbench.errors import UsageError
from linbench.records_cli import advise, compare, export, report, tally, write_page
from linbench.verbs import VERBS, Parser

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from linbench.sweep import Plan

CONFIGURED = ("run", "plan", "frontier")
"""The verbs whose words Hydra composes."""
USAGE, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """The ``linbench`` command.

    Returns:
        its exit code: 0; 1 for an unfit machine, a refuted mechanism or a slower head; 2 for bad input; 3 and 4 of a
        gate that is undecided or invalid; 130 for Ctrl-C.
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
    others = {
        "check": check,
        "capture": capture,
        "report": report,
        "compare": compare,
        "advise": advise,
        "export": export,
        "gate": gate,
        "history": history,
        "bisect": bisect,
        "list": list_choices,
        "doctor": doctor,
    }
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
    from linbench.refining import refined
    from linbench.report.rounds import sentence
    from linbench.runner import Runner
    from linbench.store import read_all
    from linbench.sweep import prepare

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice is a Ctrl-C
    asked = checked(config)
    try:
        with Runner() as runner:
            plan = prepare(asked, runner)
            for bisections_left in range(asked.crossover.bisections, -1, -1):
                _announce(plan, "cells", len(plan.pending), len(plan.finished))
                if plan.pending or plan.repeated:
                    with SweepProgress(plan.pending, plan.repeated) as progress:
                        execute(plan, runner, command, progress)
                before = plan
                plan = refined(before, runner) if bisections_left else before
                if plan is before:
                    break
    except KeyboardInterrupt:
        return _stopped(command)
    records = plan.records
    files = [plan.folder / f"{name}.jsonl" for name in plan.runs]
    spent = duration(sum(record.elapsed_s + sum(again.elapsed_s for again in record.rounds) for record in records))
    print(f"{tally(records)}; {spent} of measuring. Records: {files[-1]}")
    if told := sentence(records):
        print(told)
    title = f"linbench {asked.sweep} on {plan.environment.machine}"
    runs, _ = read_all(files)
    print(f"Report: {write_page(runs, records, [], files[-1].with_suffix('.report'), title)}")
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
    page = write_page(runs, [], searches.frontiers, files[-1].with_suffix(".report"), title)
    print(f"{len(searches.frontiers)} frontiers. Records: {files[-1]}\nReport: {page}")
    return 0


def check(argv: list[str]) -> int:
    """A mechanism → one finding for each property."""
    from linbench.checking import TIME_LIMIT_S, Request, check_all

    parser = Parser(prog="linbench check", description=VERBS["check"])
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

    parser = Parser(prog="linbench capture", description=VERBS["capture"])
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


def gate(argv: list[str]) -> int:
    """Two versions of the code → is one slower?"""
    from linbench.gate.command import run

    return run(argv)


def history(argv: list[str]) -> int:
    """Records of many commits → where a metric moved, and why."""
    from linbench.history.command import run

    return run(argv)


def bisect(argv: list[str]) -> int:
    """Two commits and a sweep → the commit that made it slower."""
    from linbench.gate.bisect import run

    return run(argv)


def list_choices(argv: list[str]) -> int:
    """What there is to choose from."""
    from linbench.listing import GROUPS, show

    parser = Parser(prog="linbench list", description=VERBS["list"])
    parser.add_argument("group", nargs="?", choices=GROUPS, help="one group only (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    show([options.group] if options.group else list(GROUPS), as_json=options.json)
    return 0


def doctor(argv: list[str]) -> int:
    """Is this machine fit to measure?"""
    from linbench.doctor import examine

    Parser(prog="linbench doctor", description=VERBS["doctor"]).parse_args(argv)
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


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"linbench: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
