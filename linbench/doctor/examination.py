"""The examination from start to end: what is looked at, in order, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from linbench.doctor import agreement, gpu, load, machine, speed, timer
from linbench.doctor.finding import Finding
from linbench.environment import default_threads
from linbench.protocol import SurveyRequest, TryClockRequest
from linbench.runner import Runner


def examine(console: Console | None = None) -> int:
    """Print the findings and the verdict. Returns 0 when the machine is fit, 1 when something should change first."""
    console = console or Console(highlight=False)
    with Runner() as runner:
        findings = list(_findings(runner))
    return show(findings, console)


def _findings(runner: Runner) -> Iterator[Finding]:
    """All findings, in the order of the table; about ten seconds."""
    threads = default_threads()
    survey = runner.survey(SurveyRequest(devices=["cpu", "cuda"], threads=threads))
    environment = survey.environment
    yield from machine.describe(environment)
    yield from gpu.describe(environment, survey.missing_devices)
    yield load.foreign_load()
    before = load.read()
    for device, peaks in environment.peaks.items():
        yield from speed.describe(device, peaks)
        try:
            trial = runner.try_clock(TryClockRequest(device=device, threads=threads))
        except RuntimeError as error:
            yield Finding(f"{device} timer bias", str(error), "repair this first")
            continue
        yield from timer.judge(device, trial.kernels)
        yield agreement.within_a_process(device, trial)
    yield agreement.between_processes(runner, threads)
    yield load.steal(before, load.read())


def show(findings: Sequence[Finding], console: Console) -> int:
    """Print the table, the verdict, and what to change. Returns the exit code."""
    table = Table(title="linbench doctor", title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("seen", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for finding in findings:
        words = (finding.subject, finding.seen, "change" if finding.advice else "well")
        table.add_row(*map(Text, words))  # a bracket in a message is no markup
    console.print(table)
    advised = [finding for finding in findings if finding.advice]
    if not advised:
        console.print("This machine is fit to measure.")
        return 0
    console.print("Numbers from this machine deserve doubt until this has been changed:")
    for finding in advised:
        console.print(f"- {finding.subject}: {finding.advice}", markup=False, soft_wrap=not console.is_terminal)
    return 1
