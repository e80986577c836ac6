"""The answer in sentences: which mechanism is fastest where, where exact attention is passed, and what is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from linbench.record import Record
from linbench.report.crossover import Crossover, fastest_exact
from linbench.report.names import length_ranges, listing, mask_name, pass_name, setting_names, variant_names
from linbench.report.pareto import common_length
from linbench.report.points import Point, Points
from linbench.report.settings import EXACT, Series, Setting
from linbench.report.units import error, skill, tokens
from linbench.stats import ratio_of_medians

_MOST_NAMED = 8
_MOST_LEADING, _MOST_FINDINGS = 3, 4
"""Names in a finding of the leading sentence, and findings in it."""
_TIE = 1.25
"""Medians further apart than this factor are not examined for a tie: few intervals are that wide."""

_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


@dataclass(frozen=True)
class Answer:
    """What was found in one setting."""

    heading: str
    setting: Setting
    lead: str
    """Where, and what passes exact attention there, in a sentence that stands alone."""
    sentences: list[str]


def summary(points: Points, records: Sequence[Record]) -> str:
    """How much there is in the report, with every status counted."""
    statuses = Counter(record.best_status for record in records)
    counted = ", ".join(f"{count:,} {status.replace('_', ' ')}" for status, count in statuses.most_common())
    lengths = sorted({point.length for point in points.pooled})
    if not lengths:
        return "There are no records."
    reach = tokens(lengths[0]) if len(lengths) == 1 else f"{tokens(lengths[0])} to {tokens(lengths[-1])}"
    mechanisms = len({series.mechanism for series in points.series})
    variants = f" in {len(points.series)} variants and implementations" if len(points.series) > mechanisms else ""
    return (
        f"{mechanisms} {_plural('mechanism', mechanisms)}{variants}, "
        f"{len(lengths)} {_plural('length', len(lengths))} ({reach} tokens), "
        f"{len(records):,} {_plural('record', len(records))}: {counted}."
    )


def make_answers(points: Points, crossings: dict[Setting, list[Crossover]], names: dict[Series, str]) -> list[Answer]:
    """One answer for each setting."""
    headings, variants = setting_names(points.settings), variant_names(points.series)
    return [
        Answer(
            headings[setting],
            setting,
            _lead(points, setting, crossings[setting], names),
            [
                *_fastest(group, names),
                *_passing(group, crossings[setting], names),
                *_losses(points, setting, crossings[setting], variants),
            ],
        )
        for setting, group in points.by_setting.items()
    ]


def _lead(points: Points, setting: Setting, found: list[Crossover], names: dict[Series, str]) -> str:
    """``On this Xeon (cpu), fp32, causal, forward, D = 64: linear passes softmax (torch) at 2,048–4,096 tokens``."""
    where = f"On {_place(points, setting)}, {_SHORT.get(setting.dtype, setting.dtype)}, {mask_name(setting.causal)}"
    where += f", {pass_name(setting.pass_)}, D = {setting.head_dim}"
    exact = fastest_exact(points.by_setting[setting])
    compared = [one for one in found if one.ratios]
    # a series that was run at one length only has no say beside those that were run at many
    several = [one for one in compared if len(one.ratios) > 1] or compared
    findings: dict[tuple[str, str], list[str]] = {}
    # nearest to being faster first, so that what is cut off is what matters least
    for one in sorted(several, key=lambda one: (one.high is None, one.high or 0, one.ratios[one.longest].value)):
        at = exact[one.high or one.longest].series.implementation
        findings.setdefault(_passes(one, at), []).append(names[one.series])
    told = [f"{_cut(who, most=_MOST_LEADING)} {what[len(who) > 1]}" for what, who in findings.items()]
    hidden = len(told) - _MOST_FINDINGS
    told = [*told[:_MOST_FINDINGS], f"{hidden} more findings are in the chart"] if hidden > 1 else told
    return f"{where}: {'; '.join(told) or 'nothing to compare with exact softmax'}."


def _place(points: Points, setting: Setting) -> str:
    """The device as a person calls it; the machine's name where no run describes it."""
    for environment in points.environments.values():
        if environment.machine == setting.machine:
            gpus = environment.gpus if setting.device.startswith("cuda") else []
            return f"this {gpus[0]}" if gpus else f"this {environment.cpu} ({setting.device})"
    return setting.machine


def _passes(one: Crossover, exact: str) -> tuple[str, str]:
    """The finding as the rest of a sentence whose subject is one mechanism, and of one that has several."""
    if one.high is None:
        rest = f"softmax ({exact}) up to {one.longest:,} tokens"
        return f"does not pass {rest}", f"do not pass {rest}"
    if one.low:
        rest = f"softmax ({exact}) at {one.low:,}–{one.high:,} tokens"
        return f"passes {rest}", f"pass {rest}"
    since = f"at {one.high:,} tokens" if len(one.ratios) == 1 else f"from {one.high:,} tokens on"
    return f"is faster than softmax ({exact}) {since}", f"are faster than softmax ({exact}) {since}"


def _fastest(group: list[Point], names: dict[Series, str]) -> list[str]:
    """Which series is fastest at which lengths, and where that is too close to call."""
    timed = [point for point in group if point.latency_ms]
    lengths = sorted({point.length for point in timed})
    if not lengths:
        return ["Nothing was timed here: see what failed and why."]
    won: dict[Series, list[int]] = {}
    ties: dict[tuple[Series, Series], list[int]] = {}
    for length in lengths:
        first, *others = sorted((p for p in timed if p.length == length), key=_latency)
        won.setdefault(first.series, []).append(length)
        for other in others:
            close = _latency(other) < _TIE * _latency(first)
            if close and ratio_of_medians(other.samples_ms, first.samples_ms).sign == 0:
                ties.setdefault((first.series, other.series), []).append(length)
    wins = [f"{names[series]} at {length_ranges(where, lengths)}" for series, where in won.items()]
    sentences = [f"Fastest: {listing(wins)}."]
    if ties:
        close_calls = [
            f"{names[a]} and {names[b]} at {length_ranges(where, lengths)}" for (a, b), where in ties.items()
        ]
        sentences.append(f"Too close to call: {_cut(close_calls, '; ')}.")
    return sentences


def _passing(group: list[Point], found: list[Crossover], names: dict[Series, str]) -> list[str]:
    """Where each mechanism passes exact attention; series with the same finding share a sentence."""
    if not any(point.series.mechanism == EXACT for point in group):
        return ["Exact softmax attention was not measured here, so there is nothing to pass and no crossover."]
    if all(point.series.mechanism == EXACT for point in group):
        return ["Only exact softmax attention was measured here, so there is no crossover."]
    if not found:
        return ["Exact softmax attention gave no time here, so there is no crossover."]
    findings: dict[str, list[str]] = {}
    for one in sorted(found, key=lambda one: (one.high is None, one.high or 0)):
        findings.setdefault(one.finding, []).append(names[one.series])
    return [*(f"{what}: {_cut(who)}." for what, who in findings.items()), *_exact_missing(group)]


def _exact_missing(group: list[Point]) -> list[str]:
    """Lengths at which something else was timed and no implementation of exact attention was, and why not."""
    exact = [point for point in group if point.series.mechanism == EXACT]
    timed = {point.length for point in group if point.latency_ms}
    missing = sorted(timed - {point.length for point in exact if point.latency_ms})
    if not missing:
        return []
    why = sorted({point.status.replace("_", " ") for point in exact if point.length in missing and not point.measured})
    because = f" ({', '.join(why)})" if why else ""
    return [f"Exact softmax gave no time at {length_ranges(missing, [p.length for p in group])}{because}."]


def _losses(points: Points, setting: Setting, found: list[Crossover], names: dict[Series, str]) -> list[str]:
    """Error and skill of what is not exact attention, best first, at the common length of each family of inputs."""
    judged = [p for p in points.inputs_by_setting[setting] if p.errors and p.series.mechanism != EXACT]
    if not judged:
        return ["Error was not measured here."] if any(p.measured for p in points.by_setting[setting]) else []
    passing = {one.series for one in found if one.high is not None}
    sentences = []
    for inputs in sorted({point.inputs or "" for point in judged}):
        family = [p for p in judged if p.inputs == inputs and (p.series in passing or not passing)]
        if family:
            length = common_length(family)
            there = [point for point in family if point.length == length]
            who = "What those that pass it lose" if passing else "What is lost"
            sentences.append(f"{who} at {tokens(length)} on {inputs} inputs: {_loss_list(there, names)}.")
    return sentences


def _loss_list(points: list[Point], names: dict[Series, str]) -> str:
    """Best skill first; those without any are named together."""
    # implementations of one variant differ in rounding only: the first speaks for all
    first = {names[point.series]: point for point in reversed(points)}
    ordered = sorted(first.values(), key=lambda point: -_skill(point))
    useful = [_loss(point, names) for point in ordered if _skill(point) > 0]
    useless = [_loss(point, names) for point in ordered if _skill(point) <= 0]
    parts = [_cut(useful)] if useful else []
    parts += [f"no better than the mean of the visible values: {_cut(useless)}"] if useless else []
    return "; ".join(parts)


def _cut(parts: list[str], separator: str = ", ", most: int = _MOST_NAMED) -> str:
    hidden = len(parts) - most
    shown = parts if hidden <= 0 else [*parts[:most], f"{hidden} more in the tables"]
    return listing(shown) if separator == ", " else separator.join(shown)


def _loss(point: Point, names: dict[Series, str]) -> str:
    wrong = error(point.relative_error.value) if point.relative_error else "unknown"
    reading = "error" if point.reading == "error" else "distance"
    return f"{names[point.series]} ({reading} {wrong}, skill {skill(_skill(point))})"


def _skill(point: Point) -> float:
    return point.error_median("skill") or 0.0


def _latency(point: Point) -> float:
    return point.latency_ms.value if point.latency_ms else float("inf")


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
