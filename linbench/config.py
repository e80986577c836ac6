"""The schema of ``configs/``: an unknown key or a wrong type is an error here and nowhere later."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from linbench.cell import Dtype, Pass, Scalar
from linbench.errors import UsageError

GROUPS = ("mechanism", "inputs", "measure", "device")


def config_dir() -> Path:
    """The folder of the configuration files: inside the installed package, else at the top of the checkout."""
    package = Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UsageError(f"linbench's own configs are missing from {package}; install linbench again")


def name_of(target: str) -> str:
    """The name of ``my_module.MyAttention``, a mechanism given by its import path: ``my_attention``.

    Raises:
        UsageError: that is no import path.
    """
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", target):
        raise UsageError(f"'{target}' is no import path; write my_module.MyAttention")
    words = re.sub(r"([a-z0-9])([A-Z])|([A-Z])([A-Z][a-z])", r"\1\3_\2\4", target.rpartition(".")[2])
    return words.lower()


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _filled(values: list[Any]) -> list[Any]:
    if not values:
        raise ValueError("an empty list leaves nothing to measure")
    return list(dict.fromkeys(values))


Number = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Seed = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]


class Shard(BaseModel):
    """One of ``count`` equal shares of a plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int = Field(0, ge=0)
    count: int = Field(1, ge=1)


class FrontierSearch(BaseModel):
    """How far and how closely the longest sequence that fits is searched for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    largest: Number = 2**24
    """Tokens; no longer sequence is tried."""
    relative_gap: float = Field(1 / 16, gt=0, lt=1)
    """The search ends when the bracket is no wider than this share of its upper end."""


class CrossoverSearch(BaseModel):
    """How often the brackets are halved in which mechanisms pass exact attention."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bisections: Seed = 0


class Choice(BaseModel):
    """One chosen file of a group: what it names, and its parameters, each a list of values to multiply."""

    name: str
    target: str | None = None
    parameters: dict[str, list[Scalar]] = Field(default_factory=dict)


class Axes(BaseModel):
    """The plain keys. Each takes a value or a list; here each is a list without repeats."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    implementation: Annotated[list[str], BeforeValidator(_as_list)]
    length: Annotated[list[Number], BeforeValidator(_as_list)]
    batch: Annotated[list[Number], BeforeValidator(_as_list)]
    heads: Annotated[list[Number], BeforeValidator(_as_list)]
    head_dim: Annotated[list[Number], BeforeValidator(_as_list)]
    value_dim: Annotated[list[Number | None], BeforeValidator(_as_list)]
    dtype: Annotated[list[Dtype], BeforeValidator(_as_list)]
    causal: Annotated[list[bool], BeforeValidator(_as_list)]
    pass_: Annotated[list[Pass], BeforeValidator(_as_list), Field(alias="pass")]
    seed: Annotated[list[Seed], BeforeValidator(_as_list)]

    def model_post_init(self, _context: object) -> None:
        """Drop repeats, refuse empty lists."""
        for name in type(self).model_fields:
            try:
                setattr(self, name, _filled(getattr(self, name)))
            except ValueError as error:
                raise UsageError(f"{name.rstrip('_')}=[]: {error}") from error


class Config(BaseModel):
    """A composed and checked configuration."""

    mechanisms: list[Choice]
    inputs: list[Choice]
    measures: list[Choice]
    devices: list[Choice]
    axes: Axes
    time_limit_s: PositiveFloat
    results_dir: str
    resume: bool
    rounds: PositiveInt
    retries: int
    shard: Shard
    frontier: FrontierSearch = FrontierSearch()
    crossover: CrossoverSearch = CrossoverSearch()
    sweep: str = "run"


class _Settings(BaseModel):
    """The keys that are one value, not an axis."""

    model_config = ConfigDict(extra="forbid")

    time_limit_s: PositiveFloat
    results_dir: str = Field(min_length=1)
    resume: bool
    rounds: Number
    retries: Seed
    shard: Shard
    frontier: FrontierSearch = FrontierSearch()
    crossover: CrossoverSearch = CrossoverSearch()


def parse(raw: Mapping[str, Any], options: Mapping[str, list[str]], sweep: str = "run") -> Config:
    """Check a composed configuration.

    Args:
        raw: the composed configuration as plain dictionaries and lists.
        options: the files that each group offers, for the error messages.
        sweep: name of the sweep file, for the name of the run.

    Raises:
        UsageError: unknown key, wrong type, value out of range, nothing chosen, or a choice that does not exist.
    """
    axes = {name: raw[name] for name in _keys(Axes) if name in raw}
    settings = {name: raw[name] for name in _keys(_Settings) if name in raw}
    known = [*_keys(Axes), *_keys(_Settings), *GROUPS]
    for name in raw:
        if name not in known:
            raise UsageError(_unknown_key(name, known))
    for name, value in settings.items():
        if isinstance(value, list):
            raise UsageError(f"{name}={value}: {name} takes one value, it is not an axis of the sweep")
    try:
        checked_axes = Axes(**axes)
        checked = _Settings(**settings)
    except ValidationError as error:
        raise UsageError(_first_sentence(error, {**axes, **settings})) from error
    if checked.shard.index >= checked.shard.count:
        raise UsageError(f"shard.index={checked.shard.index}: choose from 0 to {checked.shard.count - 1}")
    if checked.crossover.bisections and checked.shard.count > 1:
        raise UsageError("crossover.bisections needs all cells of the plan: leave out the shards, or set it to 0")
    groups = {group: _choices(group, raw.get(group) or {}, options.get(group, [])) for group in GROUPS}
    return Config(
        mechanisms=groups["mechanism"],
        inputs=groups["inputs"],
        measures=groups["measure"],
        devices=groups["device"],
        axes=checked_axes,
        sweep=sweep,
        **dict(checked),
    )


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _unknown_key(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return f"unknown key '{name}'{hint}; choose from {', '.join(known)}"


def _choices(group: str, entries: object, options: list[str]) -> list[Choice]:
    """The chosen files of a group. A file says what it names with ``_target_``; an entry without it was only tuned."""
    if not isinstance(entries, Mapping):
        raise UsageError(f"{group}={entries}: choose from {', '.join(options)}")
    chosen = []
    for name, node in (_with_targets(entries, options) if group == "mechanism" else entries).items():
        if not isinstance(node, Mapping):
            raise UsageError(f"{group}.{name}={node}: {group}.{name} holds parameters, it is not a value itself")
        if "_target_" in node:
            parameters = {key: _as_list(value) for key, value in node.items() if key != "_target_"}
            chosen.append(_checked_choice(group, str(name), node["_target_"], parameters))
        elif name not in options:
            raise UsageError(f"unknown {group} '{name}'; choose from {', '.join(options)}")
    if not chosen:
        raise UsageError(f"{group}=[]: nothing is chosen; choose from {', '.join(options)}")
    return chosen


def _with_targets(entries: Mapping[Any, Any], options: list[str]) -> dict[Any, Any]:
    """``mechanism._target_=my_module.MyAttention``, or a list of such: each becomes an entry ``my_attention``."""
    named = {name: node for name, node in entries.items() if name != "_target_"}
    for target in _as_list(entries.get("_target_") or []):  # type: ignore[attr-defined]
        try:
            name = name_of(str(target))
        except UsageError as error:
            raise UsageError(f"mechanism._target_={target}: {error}") from error
        if name in options or "_target_" in named.get(name, {}):
            raise UsageError(f"mechanism._target_={target}: there is another '{name}'; rename the class")
        named[name] = {"_target_": str(target), **named.get(name, {})}
    return named


def _checked_choice(group: str, name: str, target: object, parameters: dict[str, Any]) -> Choice:
    for key, values in parameters.items():
        if not values or any(isinstance(value, list | dict) for value in values):
            raise UsageError(f"{group}.{name}.{key}={values}: a value or a list of values is needed")
        if group == "measure" and len(values) > 1:
            raise UsageError(
                f"measure.{name}.{key}={values}: a measure has one setting, it is not an axis of the sweep"
            )
    return Choice(name=name, target=str(target), parameters=parameters)


def _first_sentence(error: ValidationError, values: Mapping[str, Any]) -> str:
    first = error.errors()[0]
    key = str(first["loc"][0])
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "missing":
        return f"key '{key}' is missing from the configuration"
    inside = "".join(f".{part}" for part in first["loc"][1:] if isinstance(part, str) and part.isidentifier())
    return f"{key}{inside if isinstance(values.get(key), dict) else ''}={first['input']}: {message}"
