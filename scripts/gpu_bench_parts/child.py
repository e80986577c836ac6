"""The child: the items of one part, one after the other, until they are done or the time is over."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gpu_bench_parts.bench import POISONED, Bench, RefusedError, UnfinishedError
from gpu_bench_parts.plan import Item, of_options
from gpu_bench_parts.records import Records
from linbench import environment

RESTART = 4
"""Exit code of a child whose device is of no more use; what it did last is on the disk."""
PACKAGES = (
    "torch",
    "triton",
    "fla-core",
    "flash-linear-attention",
    "mamba-ssm",
    "flashinfer-python",
    "flash-qla",
    "helion",
)


def main(part: str, options: argparse.Namespace) -> int:
    """0 when the part is done, or the time is over."""
    about = of_options(options)
    bench = Bench(about, options.output, options.until)
    records = Records(options.output, part)
    module = importlib.import_module(f"gpu_bench_parts.{part}")
    pending = records.pending(module.items(about), options.again)
    if not pending:
        return 0
    records.append("session", **session(options.device))
    for item in pending:
        if time.time() + item.expected_s > options.until:
            break
        status = one(module.run, item, bench, records, options.scratch)
        if status is None:
            break
        if status == "poisoned":
            return RESTART
    return 0


def session(device: str) -> dict[str, Any]:
    """Where the lines after this one were made, and with what."""
    devices = ["cuda"] if device == "cuda" else ["cpu"]
    told = environment.describe(devices, torch.get_num_threads()).model_dump(mode="json", exclude={"peaks"})
    versions = {name: found for name in PACKAGES if (found := installed(name)) is not None}
    return {"environment": told, "packages": versions, "rehearsal": device == "cpu"}


def installed(package: str) -> str | None:
    """Its version; None where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def one(run: Any, item: Item, bench: Bench, records: Records, scratch: Path) -> str | None:
    """Do an item and write its line: its status, ``poisoned`` for a device that is lost, None where time was over.

    The marker says what was being done, for the parent of a child that never comes back.
    """
    marker = scratch / "doing"
    marker.write_text(json.dumps({"key": item.key, "began": time.time(), "limit_s": item.limit_s}))
    faulthandler.dump_traceback_later(item.limit_s, exit=True)
    began = time.perf_counter()
    poisoned = False
    try:
        found = run(item, bench)
    except UnfinishedError:
        return None
    except RefusedError as error:
        found = {"status": "refused", "reason": str(error)}
    except torch.OutOfMemoryError as error:
        found = {"status": "refused", "reason": f"out of memory: {line_of(error)}"}
        torch.cuda.empty_cache()
    except Exception as error:  # whatever a kernel or a package of others raises
        found = {"status": "failed", "reason": f"{type(error).__name__}: {line_of(error)}"}
        poisoned = any(sign in str(error) for sign in POISONED)
    finally:
        faulthandler.cancel_dump_traceback_later()
        marker.unlink()
    status = found.pop("status", "ok")
    elapsed_s = time.perf_counter() - began
    records.item(item, status, elapsed_s, found.pop("reason", None), **found)
    said = "" if status == "ok" else f": {records.items()[item.key]['reason']}"
    print(f"{item.part}  {item.key}  {status}  {elapsed_s:.1f} s{said}", flush=True)
    return "poisoned" if poisoned else status


def line_of(error: Exception) -> str:
    """The first line of what an exception says."""
    return (str(error).strip().splitlines() or ["no message"])[0][:300]
