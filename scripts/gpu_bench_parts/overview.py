"""What there is to do, as a page: nothing is run, and no device is needed."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable

from gpu_bench_parts import plan
from gpu_bench_parts.records import Records

SHOWN = 6
"""Items of a part that are named."""


def page(parts: Iterable[str], options: argparse.Namespace) -> str:
    """Parts in their order: how many items, how many of them are done, about how long, and the next ones."""
    extent = plan.of_options(options)
    lines = []
    for part in parts:
        items = importlib.import_module(f"gpu_bench_parts.{part}").items(extent)
        pending = Records(options.output, part).pending(items, options.again) if options.output else items
        minutes = sum(item.expected_s for item in pending) / 60
        lines.append(f"{part}: {len(items)} items, {len(items) - len(pending)} done, about {minutes:.0f} minutes left")
        lines += [f"    {item.key}" for item in pending[:SHOWN]]
        lines += [f"    … and {len(pending) - SHOWN} more"] * (len(pending) > SHOWN)
    return "\n".join(lines)
