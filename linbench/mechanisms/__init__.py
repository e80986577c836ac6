"""One file per mechanism: what it is, its reference, its fast path, its cost model."""
