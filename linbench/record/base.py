"""What every block and line of a record is made of: its status, and a model that takes no NaN and no unknown field."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from linbench.compact import share_fields_set

SCHEMA_VERSION = 6


class Status(StrEnum):
    """What became of a cell. Only ``ok`` and ``noisy`` carry measurements."""

    OK = "ok"
    NOISY = "noisy"
    OOM = "oom"
    TIMEOUT = "timeout"
    UNSUPPORTED = "unsupported"
    COMPILE_ERROR = "compile_error"
    INCORRECT = "incorrect"
    CRASH = "crash"
    IMPOSSIBLE = "impossible"


CONTRACT = ConfigDict(extra="forbid", allow_inf_nan=False, populate_by_name=True, use_attribute_docstrings=True)
"""No unknown field, no NaN, no infinity."""
MEASURED = frozenset({Status.OK, Status.NOISY})


class Block(BaseModel):
    """A part of a record: no unknown fields, no NaN, no infinity."""

    model_config = CONTRACT

    def model_post_init(self, _: object, /) -> None:
        """Keep small what there are millions of."""
        share_fields_set(self)
