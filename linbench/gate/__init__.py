"""The gate: is this change slower? It says PASS, SLOWER, FASTER, UNDECIDED or INVALID."""
