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


KNOWN_SPILLS = {
    ("features.forward", "performer"): 24_044,
    ("features.forward", "hedgehog"): 3_632,
    ("features.forward", "rfa"): 4_352,
    ("features.queries", "performer"): 1_152,
    ("features.queries", "hedgehog"): 392,
    ("features.queries", "rfa"): 804,
    ("features.keys", "performer"): 1_304,
    ("features.keys", "hedgehog"): 732,
    ("features.keys", "rfa"): 1_212,
}
"""What does not keep to the budget yet, and may not become worse: W and its lost bits fill the registers."""


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
    known = max((KNOWN_SPILLS.get((row["kernel"], name), 0) for name in row["mechanisms"]), default=0)
    return known or (GATED_BACKWARD_BYTES if row["gated"] and row["pass"] == "backward" else 0)
