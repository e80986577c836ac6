"""``linbench gate speed``: the flags of the gate, then the words that every sweep takes. ``costs`` has its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from linbench.errors import UsageError
from linbench.gate.speed import Asked, gate
from linbench.gate.statistics import THRESHOLD
from linbench.gate.table import plain, show
from linbench.verbs import VERBS, Parser

if TYPE_CHECKING:
    from omegaconf import DictConfig

GATES = ("speed", "costs")


def run(argv: Sequence[str]) -> int:
    """Compare two versions of the code.

    Returns:
        0 pass, 1 slower, wrong or costlier, 3 undecided, 4 invalid.

    Raises:
        UsageError: bad words, or no such commit.
    """
    if not argv or argv[0] not in (*GATES, "-h", "--help"):
        raise UsageError(f"gate: choose from {', '.join(GATES)}, as in linbench gate speed --base main +sweep=gate")
    if argv[0] == "costs":
        from linbench.gate import costs_command

        return costs_command.run(argv[1:])
    parser = Parser(prog="linbench gate speed", description=VERBS["gate"], epilog="Further words compose the sweep.")
    parser.add_argument("--base", required=True, help="commit, branch or tag to compare with")
    parser.add_argument("--head", help="commit, branch or tag (default: the working tree)")
    parser.add_argument("--repository", type=Path, default=Path(), help="default: the one of this folder")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="practical, as 0.05 (default: %(default)g)")
    parser.add_argument("--budget-s", type=float, default=1800.0, help="for further rounds (default: %(default)g)")
    parser.add_argument("--all", action="store_true", help="cells that run the same code in both trees, too")
    parser.add_argument("--seed", type=int, default=0, help="of the orders")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there, too")
    options, words = parser.parse_known_args(argv[1:] if argv[0] in GATES else argv)
    asked = Asked(
        options.repository,
        options.base,
        options.head,
        options.threshold,
        options.budget_s,
        options.all,
        options.seed,
    )
    return _composed(asked, options.json, words)


def _composed(asked: Asked, path: Path | None, words: Sequence[str]) -> int:
    from linbench.hydra_front import checked, compose_and_call
    from linbench.plan import expand
    from linbench.sweep import measures_of

    def task(config: DictConfig, _command: str) -> int:
        found = checked(config)
        measures = measures_of(found)
        if "speed" not in measures:
            raise UsageError("gate: measure: speed has to be among the measures")
        result = gate(expand(found), measures, found.time_limit_s, asked)
        show(result)
        if path is not None:
            path.write_text(json.dumps(plain(result), indent=1) + "\n", encoding="utf-8")
        return result.exit_code

    return compose_and_call(task, "gate", words)
