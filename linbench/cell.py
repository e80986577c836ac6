"""One point of a sweep: mechanism, hyperparameters, implementation, shape, dtype, pass, inputs, device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from linbench.compact import share_fields_set

Scalar = bool | int | float | str | None
Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Pass = Literal["forward", "backward", "forward_backward", "prefill", "decode"]
BACKWARD_PASSES = ("backward", "forward_backward")
DTYPE_BYTES: dict[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class Cell(BaseModel):
    """One point of a sweep. Frozen, serialisable, and the same on every machine.

    Letters: B = ``batch``, H = ``heads``, N = ``length`` (tokens), D = ``head_dim`` (key width per head),
    M = ``value_dim`` (value width per head).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    mechanism: str
    target: str | None = None
    """Import path ``module.Class`` of a mechanism that is not linbench's own."""
    hyperparameters: dict[str, Scalar] = Field(default_factory=dict)
    implementation: str = "torch"
    length: PositiveInt
    batch: PositiveInt = 1
    heads: PositiveInt = 8
    head_dim: PositiveInt = 64
    value_dim: PositiveInt = 64
    dtype: Dtype = "float32"
    causal: bool = False
    pass_: Pass = Field(default="forward", alias="pass")
    inputs: str = "gaussian"
    inputs_target: str | None = None
    """Import path ``module.function`` of an input family that is not linbench's own."""
    inputs_parameters: dict[str, Scalar] = Field(default_factory=dict)
    device: str = "cpu"
    device_parameters: dict[str, Scalar] = Field(default_factory=dict)
    seed: NonNegativeInt = 0

    def model_post_init(self, _: object, /) -> None:
        """Keep small what every record has."""
        share_fields_set(self)

    @cached_property
    def key(self) -> str:
        """Sixteen hexadecimal digits that name this cell; equal cells have equal keys."""
        return digest(self.model_dump(mode="json", by_alias=True))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy that makes a key of its own."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("key", None)
        return copied

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of q, k, v and o."""
        return DTYPE_BYTES[self.dtype]

    @property
    def variant(self) -> str:
        """The mechanism with what distinguishes it, as a person would say it: ``performer(features=64)``."""
        inside = ", ".join(f"{name}={value}" for name, value in self.hyperparameters.items())
        return f"{self.mechanism}({inside})" if inside else self.mechanism

    @property
    def label(self) -> str:
        """One line for a progress bar or an error."""
        return (
            f"{self.mechanism}/{self.implementation} N={self.length} {'causal' if self.causal else 'full'}"
            f" {self.pass_} {self.dtype} {self.inputs} {self.device}"
        )

    def series(self) -> str:
        """The key of this cell without its length: the line of a figure on which it lies."""
        return digest(self.model_dump(mode="json", by_alias=True, exclude={"length"}))


def digest(value: object) -> str:
    """The first sixteen hexadecimal digits of the SHA-256 of ``value`` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
