"""What is worth doing on a GPU, most valuable first: results, peaks, tests, times beside peers, other configurations.

    scripts/gpu_bench                        seven minutes, some for every part; again, and it goes on
    scripts/gpu_bench correctness peaks      these parts alone
    scripts/gpu_bench --dry-run              what there is to do, and what of it is done; needs no GPU
    scripts/gpu_bench --device cpu --output DIR    rehearses on a machine without one: kernels in Triton's
                                             interpreter, tiny sizes, everything is called and nothing is timed

A Python that has torch with a GPU, triton, numpy, psutil, pydantic and pytest is taken as it is (``PYTHON`` names it),
so that nothing has to be installed on a lent machine; packages to compare with are found on ``PYTHONPATH``.

Every item is a line in results/MACHINE/gpu_bench/PART.jsonl before the next one begins. What crashes, hangs or poisons
the device costs its own item and no other. A summary of all that is there comes last, and into summary.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gpu_bench_parts.plan import PARTS

MINUTES = 7.0
"""A lent machine ends a command after ten; compiling may outlast an item's limit by some seconds."""


def main() -> int:
    """0 when all that ran is right, 1 when something is wrong or has failed, 2 when nothing can run here."""
    options = parsed()
    if options.child:
        from gpu_bench_parts import child

        return child.main(options.child, options)
    if options.dry_run:
        from gpu_bench_parts import overview

        print(overview.page(options.parts or PARTS, options))
        return 0
    if (reason := missing(options.device)) is not None:
        print(f"gpu_bench: {reason}", file=sys.stderr)
        return 2
    if options.device == "cpu" and options.output is None:
        print("gpu_bench: a rehearsal needs --output DIR, because it is no result", file=sys.stderr)
        return 2
    from gpu_bench_parts import parent

    return parent.run(options)


def missing(device: str) -> str | None:
    """Why nothing can run on that device, in one sentence."""
    if device == "cpu":
        return None
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device (--device cpu --output DIR rehearses without one)."
    from linbench_kernels.device import unavailable

    reason = unavailable("cuda")
    return None if reason is None else f"{reason}."


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which no item begins (default: 7)")
    parser.add_argument("--output", type=Path, help="folder of the records (default: results/MACHINE/gpu_bench)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--mechanisms", nargs="+", metavar="NAME", help="of those with kernels (default: all)")
    parser.add_argument("--again", action="store_true", help="take up what did not end well, too")
    parser.add_argument("--dry-run", action="store_true", help="only say what there is to do")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
