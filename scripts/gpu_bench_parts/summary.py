"""Everything that is on the disk as one page: what is wrong first, then times beside peers, what it comes to last."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from gpu_bench_parts.plan import PARTS, Extent
from gpu_bench_parts.records import Records
from linbench.stats import ratio_of_medians

BROKEN = ("wrong", "failed", "crash", "timeout")
Line = dict[str, Any]


def page(folder: Path, extent: Extent) -> str:
    """Markdown; and ``tables.json`` beside the records, where other configurations were faster."""
    found = {part: list(Records(folder, part).items().values()) for part in PARTS}
    proposed = proposals(found["tuning"])
    if proposed:
        (folder / "tables.json").write_text(json.dumps(proposed, indent=1) + "\n")
    if not extent.rehearsal:
        write_tables(folder, found["tuning"])
    parts = [
        "# What was found on a GPU"
        if not extent.rehearsal
        else "# A rehearsal without a GPU: nothing here is a result",
        where(folder),
        errors(found["correctness"]),
        tests(folder),
        peaks(found["peaks"]),
        times("Beside others", found["side_by_side"], copy_rate(found["peaks"])),
        times("The next token", found["decode"], copy_rate(found["peaks"])),
        tuned(proposed, found["tuning"]),
        absent([*found["side_by_side"], *found["decode"]]),
        broken(line for lines in found.values() for line in lines),
        conclusions(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def anything_wrong(folder: Path) -> bool:
    """Whether any item is wrong or did not come to its end."""
    return any(line["status"] in BROKEN for part in PARTS for line in Records(folder, part).items().values())


def where(folder: Path) -> str:
    """The device and the versions of the last session."""
    last = last_session(folder)
    if last is None:
        return "Nothing has been run."
    about = last["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in last["packages"].items())
    return f"{device(folder)}, driver {about.get('driver')}, {versions}; linbench at {about.get('commit')}."


def last_session(folder: Path) -> Line | None:
    """What was noted of the machine when it was last run."""
    sessions = [line for part in PARTS for line in Records(folder, part).read() if line["kind"] == "session"]
    return max(sessions, key=lambda line: str(line["time"]), default=None)


def device(folder: Path) -> str:
    """What it was run on."""
    last = last_session(folder)
    about = {"gpus": [], "cpu": "an unknown device"} if last is None else last["environment"]
    return ", ".join(about["gpus"]) or str(about["cpu"])


def errors(lines: list[Line]) -> str:
    """The worst relative error of every mechanism by dtype."""
    if not lines:
        return ""
    worst: dict[tuple[str, str], float] = {}
    for line in lines:
        name, _, _, dtype, _ = line["key"].split()
        numbers = [x if isinstance(x, float | int) else float("inf") for x in line.get("errors", {}).values()]
        if numbers:
            worst[name, dtype] = max(worst.get((name, dtype), 0.0), *numbers)
    dtypes = list(dict.fromkeys(dtype for _, dtype in worst))
    rows = [f"| mechanism | {' | '.join(dtypes)} |", "| --- |" + " ---: |" * len(dtypes)]
    for name in dict.fromkeys(name for name, _ in worst):
        cells = (f"{worst[name, dtype]:.2g}" if (name, dtype) in worst else "–" for dtype in dtypes)
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(["## Results: worst relative error against fp64", "", counted(lines), "", *rows])


def tests(folder: Path) -> str:
    """How many tests of the kernels ended how, the newest of each; those that failed by name."""
    newest = {line["test"]: line for line in Records(folder, "kernel_tests").read() if line["kind"] == "test"}
    if not newest:
        return ""
    outcomes = Counter(line["outcome"] for line in newest.values())
    said = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    failed = [f"- {test}: {line.get('reason')}" for test, line in newest.items() if line["outcome"] == "failed"]
    return "\n".join(["## Tests of the kernels", "", f"{said}.", *failed])


def peaks(lines: list[Line]) -> str:
    """Rates, and what the clock says of kernels of known length."""
    said = []
    for line in lines:
        if "peaks" in line:
            rates = {dtype: f"{rate / 1e12:.0f}" for dtype, rate in line["peaks"]["product_flops_per_s"].items()}
            products = ", ".join(f"{rate} in {dtype}" for dtype, rate in rates.items())
            said.append(f"Copies {copy_rate(lines) or 0:.3g} bytes/s; products in TFLOP/s: {products}.")
        for nominal, measured in line.get("known_us", []):
            said.append(f"A kernel of {nominal:g} µs is measured as {measured:g} µs.")
    return "\n".join(["## Peaks and clock", "", *said]) if said else ""


def copy_rate(lines: list[Line]) -> float | None:
    """Bytes per second of the largest copy, which no cache holds; None where it has not been measured."""
    for line in lines:
        if "peaks" in line:
            rates = line["peaks"]["copy_bytes_per_s"]
            return float(rates[max(rates, key=int)])
    return None


def times(title: str, lines: list[Line], rate: float | None) -> str:
    """One row an item: ours, how near to the floor of its bytes, and the fastest of the others."""
    timed = [line for line in lines if "times" in line]
    if not timed:
        return ""
    header = (
        "| operator | pass | shape | ours, ms | host, ms | of the floor | fastest other | its ms | other / ours, 95 % |"
    )
    rows = ["| --- | --- | --- | ---: | ---: | ---: | --- | ---: | --- |", *(row(line, rate) for line in timed)]
    return "\n".join([f"## {title}", "", counted(lines), "", header, *rows])


def row(line: Line, rate: float | None) -> str:
    """Ours and the fastest of the others."""
    shape = f"B={line['batch']} H={line['heads']} N={line['tokens']} D={line['width']} {line['dtype']}"
    ours = line["times"]["ours"]
    if not ours["samples_ms"]:
        return f"| `{line['mechanism']}` | {line['pass']} | {shape} | not timed |" + " – |" * 5
    middle = median(ours["samples_ms"])
    host = f"{median(ours['host_ms']):.4g}" if ours.get("host_ms") else "–"
    floor = f"{line['cost']['min_bytes'] / rate * 1e3 / middle:.0%}" if rate else "–"
    cells = [f"`{line['mechanism']}`", line["pass"], shape, f"{middle:.4g}", host, floor]
    name = fastest(line)
    if name is None:
        return f"| {' | '.join(cells)} | – | – | – |"
    theirs = line["times"][name]["samples_ms"]
    ratio = ratio_of_medians([theirs], [ours["samples_ms"]])
    cells += [name, f"{median(theirs):.4g}", f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"]
    return f"| {' | '.join(cells)} |"


def fastest(line: Line) -> str | None:
    """The name of the fastest side that is not ours; None where there is none."""
    others = {name: median(x["samples_ms"]) for name, x in line["times"].items() if x["samples_ms"] and name != "ours"}
    return min(others, key=lambda name: others[name]) if others else None


def proposals(lines: list[Line]) -> list[Line]:
    """Of every kernel and task the configuration that was faster than the table's, where one was."""
    best: dict[str, Line] = {}
    for line in lines:
        for one in line.get("best", []):
            key = json.dumps([one["family"], one["kernel"], one["task"]], sort_keys=True)
            if one["changed"] and one["ratio"] > best.get(key, {"ratio": 1.0})["ratio"]:
                best[key] = {**one, "seen_with": f"{line['mechanism']} {line['pass']} {line['shape']}"}
    return list(best.values())


def write_tables(folder: Path, lines: list[Line]) -> None:
    """``tuned/ARCH.json``: the best configuration of every task that was tuned, the table's own where none was faster.

    As ``linbench_kernels.tables`` reads it from ``linbench_kernels/tuned``.
    """
    from linbench_kernels import tables

    best: dict[str, dict[str, Line]] = {}
    for line in lines:
        for one in line.get("best", []):
            task, arch = one["task"], str(one["task"].get("arch"))
            key = json.dumps([one["family"], task], sort_keys=True)
            if key not in best.setdefault(arch, {}) or one["ratio"] > best[arch][key]["ratio"]:
                entry = {"family": one["family"], "task": task, "config": one["best"]}
                best[arch][key] = {**entry, "ratio": one["ratio"]}
    for arch, entries in best.items():
        tables.write(folder / "tuned" / f"{arch}.json", f"measured on {device(folder)}", list(entries.values()))


def tuned(proposed: list[Line], lines: list[Line]) -> str:
    """What might take the place of a line of the tables."""
    if not lines:
        return ""
    trials = sum(len(line.get("trials", [])) for line in lines)
    said = [f"{trials} configurations were tried beside the tables'; {len(proposed)} kernels have a faster one."]
    for one in proposed:
        changed = {key: value for key, value in one["best"].items() if value != one["config"].get(key)}
        told = ", ".join(f"{key} {one['config'].get(key)} → {value}" for key, value in changed.items())
        said.append(f"- {one['family']} {one['kernel']} ({one['seen_with']}): {told}: {one['ratio']:.3f} times as fast")
    return "\n".join(["## Tables", "", *said])


def absent(lines: list[Line]) -> str:
    """Who could not be asked, each with its first reason and how often."""
    reasons: dict[tuple[str, str], int] = {}
    for line in lines:
        for name, reason in line.get("left_out", {}).items():
            reasons[name, reason] = reasons.get((name, reason), 0) + 1
    said = [f"- {name}: {reason} ({count})" for (name, reason), count in reasons.items()]
    return "\n".join(["## Left out", "", *said]) if said else ""


def broken(lines: Iterable[Line]) -> str:
    """What is wrong, and what did not come to its end."""
    said = [f"- {x['part']} {x['key']}: {x['status']}: {x.get('reason')}" for x in lines if x["status"] in BROKEN]
    return "\n".join(["## Wrong, or without an end", "", *said]) if said else ""


def conclusions(found: dict[str, list[Line]]) -> str:
    """Sentences: how far each part is, and the geometric mean of other / ours by pass."""
    said = [f"- {part}: {counted(lines)}" for part, lines in found.items()]
    for pass_ in ("forward", "forward_backward", "decode"):
        ratios = []
        for line in (*found["side_by_side"], *found["decode"]):
            name = fastest(line) if line.get("pass") == pass_ and line.get("mechanism") != "softmax" else None
            if name is not None and line["times"]["ours"]["samples_ms"]:
                ratios.append(median(line["times"][name]["samples_ms"]) / median(line["times"]["ours"]["samples_ms"]))
        if ratios:
            mean, least = geometric_mean(ratios), min(ratios)
            slower = sum(ratio < 1 for ratio in ratios)
            said.append(
                f"- {pass_}: the fastest other takes {mean:.2f} times as long as ours in the geometric mean of"
                f" {len(ratios)} rows, {least:.2f} at least; ours is slower in {slower}."
            )
    return "\n".join(["## In short", "", *said])


def counted(lines: list[Line]) -> str:
    """How many items ended how."""
    outcomes = Counter(line["status"] for line in lines)
    return ", ".join(f"{count} {status}" for status, count in outcomes.most_common()) + "." if lines else "not begun."
