"""Short names for series and settings: only what distinguishes them within this report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from linbench.report.settings import Series, Setting
from linbench.report.units import tokens

_JOINT = "\u00a0·\u00a0"
"""Between mechanism and implementation: no line may break there."""


def series_names(series: Sequence[Series]) -> dict[Series, str]:
    """A name for each series: the mechanism, with the hyperparameters, implementation and path that set it apart.

    Hyperparameters that are the same in every variant of a mechanism are left out, and so is the implementation where
    there is only one.
    """
    by_mechanism: dict[str, list[Series]] = defaultdict(list)
    for one in series:
        by_mechanism[one.mechanism].append(one)
    return {one: _series_name(one, by_mechanism[one.mechanism]) for one in series}


def _series_name(one: Series, siblings: list[Series]) -> str:
    varying = [
        f"{name}={value}"
        for name, value in one.parameters.items()
        if any(name not in other.parameters or other.parameters[name] != value for other in siblings)
    ]
    name = f"{one.mechanism}({', '.join(varying)})" if varying else one.mechanism
    if len({other.target for other in siblings}) > 1 and one.target:
        name = f"{name} [{one.target}]"
    return f"{name}{_JOINT}{one.implementation}" if len({other.implementation for other in siblings}) > 1 else name


def variant_name(one: Series) -> str:
    """The mechanism with all its hyperparameters."""
    inside = ", ".join(f"{name}={value}" for name, value in one.parameters.items())
    return f"{one.mechanism}({inside})" if inside else one.mechanism


def variant_names(series: Sequence[Series]) -> dict[Series, str]:
    """As :func:`series_names`, for numbers that do not depend on the implementation: its name is left out."""
    variants = {one: replace(one, implementation="any") for one in series}
    names = series_names(list(dict.fromkeys(variants.values())))
    return {one: names[variant] for one, variant in variants.items()}


def setting_names(settings: Sequence[Setting], *, with_pass: bool = True) -> dict[Setting, str]:
    """A name for each setting: device, dtype, mask and pass, and the machine and the shape where they differ."""
    machines = len({setting.machine for setting in settings}) > 1
    shapes = len({setting.shape for setting in settings}) > 1
    names = {}
    for setting in settings:
        parts = [setting.machine] if machines else []
        parts += [setting.device, setting.dtype, mask_name(setting.causal)]
        parts += [pass_name(setting.pass_)] if with_pass else []
        names[setting] = ", ".join([*parts, setting.shape] if shapes else parts)
    return names


def mask_name(causal: bool) -> str:
    """``causal`` or ``non-causal``."""
    return "causal" if causal else "non-causal"


def pass_name(pass_: str) -> str:
    """``forward + backward`` for ``forward_backward``."""
    return pass_.replace("_", " + ")


def listing(words: Sequence[str], conjunction: str = "and") -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {conjunction} {words[-1]}"


def length_ranges(lengths: Sequence[int], measured: Sequence[int]) -> str:
    """``1k to 4k and 64k``: runs of neighbours among the lengths ``measured`` are drawn together."""
    order = sorted(set(measured))
    runs: list[list[int]] = []
    for length in sorted(set(lengths)):
        if runs and order.index(length) == order.index(runs[-1][-1]) + 1:
            runs[-1].append(length)
        else:
            runs.append([length])
    return listing([tokens(run[0]) if len(run) == 1 else f"{tokens(run[0])} to {tokens(run[-1])}" for run in runs])
