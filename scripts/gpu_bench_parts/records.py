"""What has been done: one JSON line for each item, on the disk before the next one begins."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_bench_parts.plan import Item

SCHEMA_VERSION = 1
"""1: lines of kind ``session`` (environment, versions) and ``item`` (part, key, code, status, and what was found)."""


class Records:
    """The file of one part."""

    def __init__(self, folder: Path, part: str) -> None:
        self.path = folder / f"{part}.jsonl"

    def read(self) -> list[dict[str, Any]]:
        """The lines; a last one that was cut off in mid-write is left out."""
        if not self.path.is_file():
            return []
        whole = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in whole if line.strip()]

    def items(self) -> dict[str, dict[str, Any]]:
        """The newest line of each item, by its key."""
        return {line["key"]: line for line in self.read() if line["kind"] == "item"}

    def pending(self, items: list[Item], again: bool = False) -> list[Item]:
        """Those without a line of the same code; with ``again`` those that did not end well, too."""
        found = self.items()

        def done(item: Item) -> bool:
            line = found.get(item.key)
            return line is not None and line["code"] == item.code and not (again and line["status"] != "ok")

        return [item for item in items if not done(item)]

    def append(self, kind: str, **values: Any) -> None:
        """Write one line and wait until it is on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps({"kind": kind, "schema_version": SCHEMA_VERSION, "time": now, **values}, allow_nan=False)
        with self.path.open("a+b") as file:
            file.seek(0)
            whole = file.read()
            file.truncate(whole.rfind(b"\n") + 1)  # what was cut off in mid-write
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def item(self, item: Item, status: str, elapsed_s: float, reason: str | None = None, **found: Any) -> None:
        """What became of an item: ``ok``, ``wrong``, ``refused``, ``failed``, ``timeout`` or ``crash``."""
        told = {"part": item.part, "key": item.key, "code": item.code, "status": status}
        if reason is not None:
            told["reason"] = reason
        self.append("item", **told, elapsed_s=round(elapsed_s, 3), **found)
