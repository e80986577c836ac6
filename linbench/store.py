"""Append and read results: one JSON line per cell or frontier, durable line by line, one file per run."""

from __future__ import annotations

import gc
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Annotated, NamedTuple, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from linbench.errors import UsageError
from linbench.record import SCHEMA_VERSION, Frontier, Record, Round, Run

KINDS: dict[str, type[Record | Round | Frontier]] = {"cell": Record, "round": Round, "frontier": Frontier}
"""What a line after the first may be, by its ``kind``."""
Line = TypeVar("Line", Run, Record | Round | Frontier)
_ANY_LINE: TypeAdapter[Record | Round | Frontier] = TypeAdapter(
    Annotated[Record | Round | Frontier, Field(discriminator="kind")]
)
_NEWER = "{path} has schema {schema}; this linbench reads schemas up to {known}: upgrade it"
_FRONTIER = re.compile(r'"kind"\s*:\s*"frontier"')


class Contents(NamedTuple):
    """What one results file holds. Rounds may belong to records of an earlier file: :func:`read_all` joins them."""

    run: Run
    records: list[Record]
    rounds: list[Round]
    frontiers: list[Frontier]


class RunFile:
    """A results file that is being written. Every line is on the disk before :meth:`append` returns."""

    def __init__(self, folder: Path, run: Run) -> None:
        """Create ``folder/RUN.jsonl`` with the run as its first line.

        Raises:
            UsageError: the folder or the file cannot be written.
        """
        self.path = folder / f"{run.run}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("x", encoding="utf-8")
            self._write(run)
            directory = os.open(folder, os.O_RDONLY)
            os.fsync(directory)  # without this the file's name may be lost with the machine's power
            os.close(directory)
        except OSError as error:
            raise UsageError(f"results_dir: cannot write {self.path}: {error.strerror or error}") from error

    def append(self, line: Record | Round | Frontier) -> None:
        """Write one line and wait until it is on the disk."""
        self._write(line)

    def _write(self, line: BaseModel) -> None:
        self._file.write(line.model_dump_json(by_alias=True, exclude_none=True) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> RunFile:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._file.close()


def read(path: Path, wanted: Callable[[str], object] = lambda _: True) -> Contents:
    """Read one results file.

    Args:
        path: of the file.
        wanted: says of the text of a line whether it counts; the first one always does.

    A last line that was cut off in mid-write is dropped with a warning.

    Raises:
        UsageError: the file cannot be read, is not one of linbench's, or was written by a newer linbench.
    """
    contents: Contents | None = None
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith("\n"):
                    warnings.warn(f"{path}: the last line was cut off in mid-write and is left out", stacklevel=2)
                elif contents is None:
                    contents = Contents(_parse(text, {"run": Run}, path, 1), [], [], [])
                elif text.strip() and wanted(text):
                    _sort(_read_line(text, path, number), contents)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if contents is None:
        raise UsageError(f"{path} is not a linbench results file: it has no complete line")
    return contents


def _sort(line: Record | Round | Frontier, contents: Contents) -> None:
    if isinstance(line, Record):
        contents.records.append(line)
    elif isinstance(line, Round):
        contents.rounds.append(line)
    else:
        contents.frontiers.append(line)


def _read_line(text: str, path: Path, number: int) -> Record | Round | Frontier:
    """In one pass where all is well; what is wrong is found out slowly."""
    try:
        line = _ANY_LINE.validate_json(text)
    except ValidationError:
        return _parse(text, KINDS, path, number)
    if line.schema_version > SCHEMA_VERSION:
        raise UsageError(_NEWER.format(path=path, schema=line.schema_version, known=SCHEMA_VERSION))
    return line


@contextmanager
def _no_collection() -> Iterator[None]:
    """Nothing of what is read is garbage: looking for it among a hundred thousand records takes as long as reading."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _parse(text: str, kinds: Mapping[str, type[Line]], path: Path, number: int) -> Line:
    try:
        content = json.loads(text)
        kind, schema = content["kind"], int(content["schema_version"])
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is not a linbench results file: line {number} is none of its lines") from error
    if schema > SCHEMA_VERSION:
        raise UsageError(_NEWER.format(path=path, schema=schema, known=SCHEMA_VERSION))
    if kind not in kinds:
        raise UsageError(f"{path} is not a linbench results file: line {number} is of kind '{kind}'")
    try:
        return kinds[kind].model_validate(content)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or kind
        what = error.errors()[0]["msg"]
        raise UsageError(f"{path} is not a linbench results file: line {number}, {where}: {what}") from error


def results_files(paths: Iterable[Path]) -> list[Path]:
    """The results files among ``paths``: files as they are, folders searched through.

    Raises:
        UsageError: a path does not exist, or there is no results file at all.
    """
    named = list(paths)
    found: list[Path] = []
    for path in named:
        if path.is_dir():
            found.extend(sorted(path.rglob("*.jsonl")))
        elif path.is_file():
            found.append(path)
        else:
            raise UsageError(f"{path} does not exist; name a results file or a folder of them")
    if not found:
        where = ", ".join(str(path) for path in named)
        raise UsageError(f"no results (*.jsonl) under {where}; `linbench run +sweep=smoke` makes some")
    return found


@_no_collection()
def read_all(paths: Iterable[Path]) -> tuple[list[Run], list[Record]]:
    """Read several files: their runs, and the newest record of every cell on every machine, oldest first.

    Every record has its rounds: those that were made after it, of the same cell, by the same code.
    """
    runs, records = read_history(paths)
    machines = {run.run: run.environment.machine for run in runs}
    newest: dict[tuple[str, str], Record] = {}
    for record in records:
        key = (machines[record.run], record.cell.key)
        newest.pop(key, None)  # so that the newest stands last
        newest[key] = record
    return runs, list(newest.values())


def read_history(paths: Iterable[Path]) -> tuple[list[Run], list[Record]]:
    """As :func:`read_all`, but with every record of a cell that there is."""
    runs: list[Run] = []
    every: list[Record] = []
    owners: dict[tuple[str, str], list[Record]] = {}
    rounds: list[tuple[str, Round]] = []
    contents = sorted((read(path) for path in paths), key=lambda contents: contents.run.time)
    for run, records, again, _ in contents:
        runs.append(run)
        every += records
        for record in records:
            owners.setdefault((run.environment.machine, record.cell.key), []).append(record)
        rounds += [(run.environment.machine, one) for one in again]
    for machine, one in rounds:
        earlier = [record for record in owners.get((machine, one.cell_key), []) if record.time <= one.time]
        if earlier and earlier[-1].code == one.code:
            earlier[-1].rounds.append(one)
    return runs, every


def read_frontiers(paths: Iterable[Path]) -> list[Frontier]:
    """The newest frontier of every series on every machine, oldest first."""
    newest: dict[tuple[str, str], Frontier] = {}
    for contents in sorted((read(path, _FRONTIER.search) for path in paths), key=lambda contents: contents.run.time):
        for line in contents.frontiers:
            key = (contents.run.environment.machine, line.cell.series())
            newest.pop(key, None)  # so that the newest stands last
            newest[key] = line
    return list(newest.values())
