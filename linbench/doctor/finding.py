"""What the doctor says of one subject."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """One line of the table: what was looked at, what was seen, and what to change (None when it is well)."""

    subject: str
    seen: str
    advice: str | None = None
