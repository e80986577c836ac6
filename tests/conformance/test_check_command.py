"""``linbench check`` as it is typed: exit codes, table, reasons, and mechanisms that do not survive being looked at."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from linbench import registry
from linbench.check_table import Result, show
from linbench.cli import main
from linbench.conformance.finding import Finding, Verdict, failed, not_applicable, passed, within
from linbench.conformance.kit import PROPERTIES
from linbench.runner import Runner

HERE = Path(__file__).parent
PLUG_INS = HERE.parent / "plug_ins"
HEAD = "from broken_mechanisms import Mean\n"


@dataclass(frozen=True)
class Answer:
    """What the command left behind."""

    code: int
    out: str
    errors: str

    def row(self, name: str) -> list[str]:
        """The cells of a property's row."""
        (line,) = [line for line in self.out.splitlines() if line.startswith(f"│ {name} ")]
        return [cell.strip() for cell in line.strip("│").split("│")]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """The verb in this process; what it looks at is in children all the same."""
    for folder in (HERE, PLUG_INS):
        monkeypatch.syspath_prepend(str(folder))

    def command(*words: str) -> Answer:
        code = main(["check", *words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Answer(code, captured.out, captured.err)

    return command


def test_a_sound_mechanism_gives_a_table_with_figures_and_0(check: Callable[..., Answer]) -> None:
    found = check("sound_mechanisms.Sound", "--quick", "--property", "forms-agree", "same_seed", "order")
    assert found.code == 0
    assert "linbench check sound_mechanisms.Sound --quick" in found.out
    _, measured, bound, verdict, where = found.row("forms agree")
    assert float(measured) <= float(bound) == 2e-6
    assert verdict == "passed"
    assert where.startswith("torch, causal: float32 B=")
    assert found.row("same seed")[1:4] == ["", "", "passed"]
    assert found.row("order")[3:] == ["not applicable", "torch, causal: not claimed"]
    assert "sound_mechanisms.Sound: 2 passed, 1 not applicable; " in found.out


def test_a_refuted_mechanism_gives_1_and_says_why(check: Callable[..., Answer]) -> None:
    found = check("unsound_results.LeaksTheFuture", "--quick", "--property", "shape", "causality")
    assert found.code == 1
    assert found.row("shape")[3] == "passed"
    assert found.row("causality")[3] == "failed"
    told = found.out.partition("\ncausality: ")[2]
    meaning, reason = told.splitlines()[:2]
    assert meaning.startswith("Another future")
    assert "another future of everything from 1" in reason
    assert reason.endswith("bound 0)")
    assert "1 passed, 1 failed" in found.out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("linera",), ["unknown mechanism 'linera' (did you mean 'linear'?)", "choose from all,", "softmax"]),
        (("no.such.Module",), ["'no.such.Module'", "No module named 'no'"]),
        (("broken_mechanisms.Nobody",), ["has no attribute 'Nobody'"]),
        (("broken_mechanisms.ctypes",), ["is not a subclass of linbench.mechanisms.base.Mechanism"]),
        (("linear", "--property", "cause"), ["unknown property 'cause'", "choose from shape, operands intact"]),
        (("linear", "--set", "foo=1"), ["linear.foo=1", "none of that name", "hyperparameters of linear: none"]),
        (("performer", "--set", "features=-3"), ["features=-3", "greater than or equal to 1"]),
        (("performer", "--set", "kernel=foo"), ["kernel=foo", "positive"]),
        (("performer", "--set", "features"), ["--set features", "hyperparameter=value"]),
        (("linear", "--implementation", "cuda"), ["no implementation 'cuda'", "choose from reference, torch"]),
        (("linear", "--time-limit-s", "0"), ["--time-limit-s 0", "above 0"]),
        (("--property", "causality", "linear"), ["name a mechanism before the options"]),
        ((), ["name a mechanism"]),
    ],
)
def test_bad_input_is_one_sentence_with_the_choices_and_2(
    check: Callable[..., Answer], words: tuple[str, ...], parts: list[str]
) -> None:
    found = check(*words)
    assert found.code == 2
    assert found.out == ""
    (sentence,) = found.errors.splitlines()
    for part in parts:
        assert part in sentence


def test_an_unknown_flag_is_refused(check: Callable[..., Answer]) -> None:
    found = check("linear", "--frobnicate")
    assert (found.code, found.errors.count("\n")) == (2, 1)
    assert "--frobnicate" in found.errors


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Segfaults", "killed by SIGSEGV in stage 'torch, not causal': broken_mechanisms.py:"),
        ("Exits", "the process ended with exit code 7 and gave no answer in stage 'torch, not causal'"),
        ("Raises", "torch, not causal: IndexError: an index that is not there at broken_mechanisms.py:"),
    ],
)
def test_a_mechanism_that_breaks_down_fails_with_the_place(check: Callable[..., Answer], name: str, words: str) -> None:
    found = check(f"broken_mechanisms.{name}", "--property", "operands-intact", "cost-model")
    assert found.code == 1
    assert found.row("operands intact")[3] == "failed"
    assert found.row("cost model")[3] == "passed"
    assert words in found.out


def test_a_mechanism_that_never_answers_costs_three_limits_and_no_more(check: Callable[..., Answer]) -> None:
    asked = ("operands-intact", "no-memory", "strides", "batch", "other-seed")
    found = check("broken_mechanisms.Sleeps", "--time-limit-s", "0.7", "--property", *asked)
    assert found.code == 1
    assert found.out.count("no answer in time") >= 2
    assert "--time-limit-s is 0.7" in found.out
    assert "batch, other seed\n    not looked at: 3 properties before it gave no answer in time" in found.out


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os\nos._exit(5)\n", (1, "cannot be looked at: the process ended with exit code 5")),
        ("import ctypes\nctypes.string_at(0)\n", (1, "cannot be looked at: killed by SIGSEGV")),
        ("raise SystemExit('go away')\n", (1, "cannot be looked at: the process ended with exit code 1")),
        ("import nowhere_to_be_found\n", (2, "No module named 'nowhere_to_be_found'")),
        ("raise KeyError('no such key')\n", (2, "'no such key'")),
        ("class Mine(\n", (2, "was never closed")),
    ],
)
def test_a_file_that_cannot_be_imported_is_reported(
    check: Callable[..., Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    expected: tuple[int, str],
) -> None:
    (tmp_path / "my_module.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    found = check("my_module.Mine")
    code, words = expected
    assert found.code == code
    assert words in (found.errors if code == 2 else found.out)


def test_a_mechanism_that_dies_when_it_is_built_is_reported(check: Callable[..., Answer]) -> None:
    found = check("broken_mechanisms.DiesWhenBuilt")
    assert found.code == 1
    assert "broken_mechanisms.DiesWhenBuilt cannot be looked at: killed by SIGSEGV" in found.out


def as_json(found: Answer) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads(found.out)
    return contents


def test_json_holds_what_the_table_holds_and_nothing_else_is_printed(check: Callable[..., Answer]) -> None:
    found = check("sound_mechanisms.Sound", "unsound_results.WrongRows", "--quick", "--property", "rows", "--json")
    assert (found.code, found.errors) == (1, "")
    contents = as_json(found)
    assert [result["passed"] for result in contents.values()] == [True, False]
    sound = contents["sound_mechanisms.Sound"]["properties"]["rows"]
    assert (sound["verdict"], sound["bound"]) == ("passed", 1e-12)
    assert 0 <= sound["measured"] <= 1e-12
    wrong = contents["unsound_results.WrongRows"]["properties"]["rows"]
    assert wrong["verdict"] == "failed"
    assert "rows last, 0" in wrong["reason"]
    assert wrong["means"].startswith("reference(rows) is reference()[rows]")


def test_without_a_choice_every_property_is_looked_at(check: Callable[..., Answer]) -> None:
    contents = as_json(check("broken_mechanisms.Mean", "--quick", "--json"))
    assert list(contents["broken_mechanisms.Mean"]["properties"]) == list(PROPERTIES)


def test_quick_takes_shorter_sequences(check: Callable[..., Answer]) -> None:
    for words, tokens in (((), 2048), (("--quick",), 1024)):
        found = check("broken_mechanisms.Mean", "--property", "growth of memory", "--json", *words)
        reason = as_json(found)["broken_mechanisms.Mean"]["properties"]["growth of memory"]["reason"]
        assert f"N={tokens}," in reason
        assert f"at N={4 * tokens};" in reason


def test_set_chooses_the_hyperparameters_that_are_looked_at(check: Callable[..., Answer]) -> None:
    words = ("sound_mechanisms.Sound", "--property", "settings", "--json")
    free, fixed = (as_json(check(*words, *more))["sound_mechanisms.Sound"] for more in ((), ("--set", "power=2")))
    assert free["properties"]["settings"]["reason"].startswith("torch, causal: power=2")
    assert fixed["properties"]["settings"]["verdict"] == "not applicable"
    wrong = check("unsound_results.IgnoresASetting", "--property", "forms agree", "--quick", "--set", "power=2")
    assert wrong.code == 1
    assert "linbench check unsound_results.IgnoresASetting --set power=2 --quick" in wrong.out


def test_implementation_chooses_what_is_looked_at(check: Callable[..., Answer]) -> None:
    words = ("broken_mechanisms.Raises", "--property", "batch", "--implementation")
    assert check(*words, "reference").code == 0
    assert check(*words, "torch").code == 1


def entry_point(folder: Path, *lines: str) -> None:
    """A distribution as pip leaves it."""
    about = folder / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("\n".join(["[linbench.mechanisms]", *lines, ""]))


def test_an_installed_mechanism_is_known_by_its_name_and_part_of_all(
    check: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one that cannot be imported, which does not stop the others."""
    (tmp_path / "theirs.py").write_text(f"{HEAD}\n\nclass Theirs(Mean):\n    pass\n")
    entry_point(tmp_path, "theirs = theirs:Theirs", "absent = nowhere_to_be_found:Absent")
    monkeypatch.syspath_prepend(str(tmp_path))
    named = check("theirs", "--property", "rows")
    assert named.code == 0
    assert "theirs: 1 passed" in named.out
    monkeypatch.setattr(registry, "BUILT_IN", {"linear": registry.BUILT_IN["linear"]})
    every = check("all", "--property", "rows")
    assert every.code == 1
    assert "absent cannot be looked at: mechanism 'absent' cannot be loaded" in every.out
    assert "3 mechanisms; refuted: none; not looked at: absent." in every.out
    assert check("absent").code == 2


def test_ctrl_c_shows_what_was_found_until_then(check: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Runner.examine

    def examine(self: Runner, request: Any, limit_s: float) -> Any:
        if request.property == "order":
            raise KeyboardInterrupt
        return whole(self, request, limit_s)

    monkeypatch.setattr(Runner, "examine", examine)
    found = check("sound_mechanisms.Sound", "--property", "rows", "order", "kind")
    assert found.code == 130
    assert found.row("rows")[3] == "passed"
    assert "kind" not in found.out
    assert "Stopped" in found.errors


def test_the_installed_command_writes_a_whole_table_to_a_pipe(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "linbench", "check", "linformer", "--property", "kind", "exact-limit"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"not causal: \d+ tokens, {'rank': \d+, 'projection': 'pool'} +│", done.stdout)
    assert "\x1b" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def printed(width: int, findings: dict[str, Finding]) -> str:
    out = io.StringIO()
    meanings = {name: f"what {name} means" for name in findings}
    console = Console(file=out, width=width, highlight=False)
    show(Result("it", meanings, ["a note"], findings, seconds=1.0), "linbench check it", console)
    return out.getvalue()


@pytest.mark.parametrize(("width", "where"), [(80, False), (140, True)])
def test_the_table_keeps_to_the_terminal(width: int, where: bool) -> None:
    every = {name: within(1.23456e-9, 1e-4, "somewhere [B, H] " + 30 * "far away ") for name in PROPERTIES}
    told = printed(width, every)
    assert max(map(len, told.splitlines())) <= width
    assert ("somewhere [B, H] far away" in told) is where
    assert "1.23e-09" in told


def test_a_reason_that_many_share_is_told_once() -> None:
    findings = {"shape": failed("it raises"), "rows": passed(), "step": failed("it raises"), "kind": failed("it lies")}
    told = printed(120, findings | {"order": not_applicable("not claimed")})
    assert "\nshape, step\n    it raises\nkind: what kind means\n    it lies\nit: 1 passed, 3 failed" in told
    assert all(verdict in told for verdict in Verdict)
