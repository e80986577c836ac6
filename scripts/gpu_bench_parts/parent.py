"""The parent: a child for each part, another after what killed it, and the summary at the end; it touches no device."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from gpu_bench_parts import plan, summary
from gpu_bench_parts.child import RESTART
from gpu_bench_parts.records import Records

ROOT = Path(__file__).parents[2]
GRACE_S = 25.0
"""What an item may take beyond the end of a run before it is killed."""
LEAST_S = 20.0
"""No child is started for less."""
STARTS = 30
"""Of one part in a run."""


def run(options: argparse.Namespace) -> int:
    """All parts that were asked for, until the time is over; 1 if anything is wrong or has failed, or cannot run."""
    until = time.time() + 60 * options.minutes
    folder = options.output or ROOT / "results" / machine(options.device) / "gpu_bench"
    folder.mkdir(parents=True, exist_ok=True)
    broken: dict[str, str] = {}
    for part, share in shares(options.parts):
        left_s = until - time.time()
        if left_s < min(LEAST_S, 30 * options.minutes):
            break
        reason = run_part(part, options, folder, time.time() + min(left_s, share * 60 * options.minutes))
        if reason is not None:
            broken[part] = reason
    extent = plan.of_options(options)
    text = summary.page(folder, extent)
    (folder / "summary.md").write_text(text)
    print(text)
    for part, reason in broken.items():
        print(f"gpu_bench: {part}: {reason}", file=sys.stderr)
    return int(bool(broken) or summary.anything_wrong(folder))


def shares(parts: list[str]) -> list[tuple[str, float]]:
    """Parts and the share of the time that each may take: all of what is left for those that are named.

    Without a name every part has its share first; then the time that is left goes to them in their order.
    """
    return [(part, 1.0) for part in parts] or [*plan.SHARES.items(), *((part, 1.0) for part in plan.PARTS)]


def machine(device: str) -> str:
    """The folder's name under results/, asked in a process of its own: a parent with a context would take memory."""
    code = "from linbench.environment import describe; print(describe(['cuda'], 1).machine)"
    if device == "cpu":
        raise ValueError("a rehearsal has no folder under results/")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def run_part(part: str, options: argparse.Namespace, folder: Path, until: float) -> str | None:
    """Children until the part is done or the time is over; the reason where none can begin."""
    items = importlib.import_module(f"gpu_bench_parts.{part}").items(plan.of_options(options))
    if not Records(folder, part).pending(items, options.again):
        return None
    with TemporaryDirectory() as scratch:
        for _ in range(STARTS):
            code = child(part, options, folder, until, Path(scratch))
            if code == 0 or time.time() >= until:
                return None
            if code != RESTART and not given_up(part, options, folder, Path(scratch), code):
                said = (Path(scratch) / "said").read_text(errors="replace").strip().splitlines()
                return f"its process ended with {code} before an item: {said[-1] if said else 'without a word'}"
    return f"given up after {STARTS} processes"


def child(part: str, options: argparse.Namespace, folder: Path, until: float, scratch: Path) -> int:
    """The exit code of one process; 0 where it had to be ended because the time was over."""
    words = [str(ROOT / "scripts" / "gpu_bench.py"), "--child", part, "--device", options.device]
    words += ["--output", str(folder), "--until", str(until), "--scratch", str(scratch)]
    words += ["--mechanisms", *options.mechanisms] if options.mechanisms else []
    words += ["--again"] if options.again else []
    environment = {**os.environ, "TRITON_INTERPRET": "1"} if options.device == "cpu" else dict(os.environ)
    with (scratch / "said").open("wb") as said:
        process = subprocess.Popen([sys.executable, *words], env=environment, stderr=said, start_new_session=True)
        try:
            return process.wait(timeout=max(until + GRACE_S - time.time(), 1.0))
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as ended:
            os.killpg(process.pid, 9)
            process.wait()
            if isinstance(ended, KeyboardInterrupt):
                raise
            return 0


def given_up(part: str, options: argparse.Namespace, folder: Path, scratch: Path, code: int) -> bool:
    """Write the line of the item that a dead child was at; whether there was one."""
    marker = scratch / "doing"
    if not marker.is_file():
        return False
    doing = json.loads(marker.read_text())
    marker.unlink()
    elapsed_s = time.time() - doing["began"]
    extent = plan.of_options(options)
    items = importlib.import_module(f"gpu_bench_parts.{part}").items(extent)
    (item,) = [one for one in items if one.key == doing["key"]]
    late = elapsed_s >= 0.95 * doing["limit_s"]
    reason = f"no end within {doing['limit_s']:g} s" if late else f"its process ended with {code}"
    Records(folder, part).item(item, "timeout" if late else "crash", elapsed_s, reason)
    print(f"{part}  {item.key}  {reason}", flush=True)
    return True
