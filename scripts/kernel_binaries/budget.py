"""What a default may cost by its binary, by the kind of its object."""

from __future__ import annotations

import math
from typing import Any

STUB = 100
"""Fewer instructions cannot be a kernel: assemblers have been seen to leave one empty."""
WIDEST = 128
"""D and M up to which nothing spills but a gated backward."""
GATED_BACKWARD_BYTES = 256
"""Per thread; there lost bits of bf16 are multiplied too, and decays have gradients."""


def over_budget(row: dict[str, Any]) -> str | None:
    """What a default may not do, in a clause; None when all is well.

    On sm_90 in bf16 up to 128 no forward, step or ungated backward spills, and a gated backward 256 bytes at most. What
    other architectures and dtypes spill is in the table. Nowhere are products serialised, and nowhere does a pass that
    walks the chunks once store a state of each of them.
    """
    idle = row["products"] and not row["tensor_core_instructions"]
    broken = {
        f"{row['instructions']} instructions cannot be a kernel": row["instructions"] < STUB,
        f"{row['serialised_wgmma']} serialised products": bool(row["serialised_wgmma"]),
        f"{row['state_bytes']} bytes of states in memory": row["one_pass"] and row["state_bytes"] > 0,
        "no tensor core is used": row["dtype"] == "bfloat16" and idle,
        f"{row['spill_bytes']} bytes spilled": row["spill_bytes"] > allowed_spills(row),
    }
    return next((reason for reason, is_so in broken.items() if is_so), None)


def allowed_spills(row: dict[str, Any]) -> float:
    """Bytes per thread."""
    narrow = max(row["key_dim"], row["value_dim"]) <= WIDEST
    if row["arch"] != "sm_90" or row["dtype"] != "bfloat16" or not narrow:
        return math.inf  # fp16 and fp32 are there to be right
    return GATED_BACKWARD_BYTES if row["gated"] and row["pass"] == "backward" else 0
