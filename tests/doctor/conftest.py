"""A made-up machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from linbench.record import Environment


def make_environment(**changes: object) -> Environment:
    known: dict[str, object] = {
        "machine": "m",
        "cpu": "A CPU",
        "cpu_flags": ["avx2"],
        "cores_physical": 4,
        "cores_logical": 8,
        "threads": 3,
        "memory_bytes": 2**34,
        "gpus": [],
        "python": "3.11",
        "torch": "2.13",
        "blas": "mkl",
        "os": "Linux",
        "clock": "tsc",
        "linbench": "0.1.0",
    }
    return Environment.model_validate(known | changes)


@pytest.fixture
def environment() -> Callable[..., Environment]:
    return make_environment
