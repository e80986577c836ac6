"""Parameters of mechanisms and input families: read off a signature, checked, refused in one sentence."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from linbench.errors import UsageError


def signature_model(name: str, function: Callable[..., Any], leave_out: tuple[str, ...]) -> type[BaseModel]:
    """A pydantic model of a function's parameters: types, ranges, choices and defaults; nothing else is accepted."""
    return _signature_model(name, function, leave_out)


@cache  # making the model takes longer than building most mechanisms
def _signature_model(name: str, function: Callable[..., Any], leave_out: tuple[str, ...]) -> type[BaseModel]:
    signature = inspect.signature(function, eval_str=True)
    fields: dict[str, Any] = {
        parameter.name: (parameter.annotation, parameter.default)
        for parameter in signature.parameters.values()
        if parameter.name not in leave_out
    }
    return create_model(name, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)


def checked(model: type[BaseModel], values: Mapping[str, Any], where: str, kind: str) -> dict[str, Any]:
    """The values with the model's defaults filled in.

    Args:
        where: configuration key that holds the values, for example ``mechanism.performer``.
        kind: what the parameters are called to the user.

    Raises:
        UsageError: unknown parameter, wrong type, or a value out of range.
    """
    try:
        return dict(model(**values))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        choices = ", ".join(model.model_fields) or "none"
        wrong = "there is none of that name" if first["type"] == "extra_forbidden" else first["msg"].lower()
        told = f"{wrong}; {kind} of {where.rpartition('.')[2]}: {choices}"
        raise UsageError(f"{where}.{field}={first['input']}: {told}") from error
