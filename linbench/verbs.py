"""What the command line knows: its verbs, and how it refuses their arguments."""

from __future__ import annotations

import argparse
from typing import NoReturn

from linbench.errors import UsageError

VERBS = {
    "run": "measure a sweep: linbench run +sweep=smoke",
    "plan": "show what a sweep would measure, what it costs and what is left out, without running it",
    "frontier": "search the longest sequence that fits into memory and time: linbench frontier +sweep=frontier",
    "check": "try to refute a mechanism: causality, gradients, strides, costs, what it claims: linbench check NAME",
    "capture": "keep q, k, v of a Hugging Face model on a text: linbench capture MODEL --text FILE --out FILE",
    "report": "build the report of results files or folders",
    "compare": "hold two runs, commits or machines against each other: linbench compare A B",
    "advise": "say which mechanism to take, from records: linbench advise --length 8192 --causal --max-error 0.1",
    "export": "write records for other tools: linbench export results/ --output cells.csv",
    "gate": "say whether a change is slower, wrong or costlier: linbench gate speed --base main +sweep=gate",
    "history": "say where a metric moved over commits, and what moved it: linbench history RECORDS",
    "bisect": "find the commit that made a cell slower or wrong: linbench bisect --good v1 --bad main +sweep=gate",
    "list": "show mechanisms, inputs, sweeps, measures and devices",
    "doctor": "say whether this machine is fit to measure",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise UsageError(f"{self.prog.removeprefix('linbench ')}: {message}")
