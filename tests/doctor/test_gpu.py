"""The state of GPUs, from a made-up driver: this has never run on a device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from linbench.doctor.gpu import describe, states
from linbench.record import Environment


class DriverError(Exception):
    pass


def driver(**answers: Any) -> ModuleType:
    """A module like NVML's with one GPU; an answer that is an exception is raised."""
    known: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetClockInfo": 1740,
        "nvmlDeviceGetMaxClockInfo": 1980,
        "nvmlDeviceGetTemperature": 41,
        "nvmlDeviceGetPowerUsage": 90_400,
        "nvmlDeviceGetEnforcedPowerLimit": 700_000,
        "nvmlDeviceGetCurrentClocksEventReasons": 0x1,
        "nvmlDeviceGetComputeRunningProcesses": [],
        "nvmlDeviceGetPersistenceMode": 1,
    }
    module = ModuleType("pynvml")

    def answering(answer: Any) -> Any:
        def call(*_: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    for name, answer in (known | answers).items():
        if answer is not Missing:
            setattr(module, name, answering(answer))
    module.NVMLError, module.NVML_CLOCK_SM, module.NVML_TEMPERATURE_GPU = DriverError, 1, 0  # type: ignore[attr-defined]
    return module


class Missing:
    """A function that this version of the module does not have."""


def state(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> tuple[str, str | None]:
    monkeypatch.setitem(sys.modules, "pynvml", driver(**answers))
    (finding,) = states()
    return finding.seen, finding.advice


def test_an_idle_gpu_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    assert state(monkeypatch) == ("1740 of 1980 MHz, 41 °C, 90 of 700 W", None)


@pytest.mark.parametrize(
    ("answers", "seen", "advice"),
    [
        ({"nvmlDeviceGetCurrentClocksEventReasons": 0x4 | 0x40}, "slowed down by power cap, heat (hardware)", "cool"),
        ({"nvmlDeviceGetComputeRunningProcesses": ["x", "y"]}, "2 processes on it", "end what else"),
        ({"nvmlDeviceGetPersistenceMode": 0}, "persistence mode off", "nvidia-smi -pm 1"),
        (
            {"nvmlDeviceGetCurrentClocksEventReasons": Missing, "nvmlDeviceGetCurrentClocksThrottleReasons": 0x80},
            "external power brake",
            "power",
        ),
    ],
)
def test_each_disturbance_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], seen: str, advice: str
) -> None:
    found = state(monkeypatch, **answers)
    assert seen in found[0]
    assert advice in (found[1] or "")


def test_what_a_gpu_does_not_support_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = dict.fromkeys(("nvmlDeviceGetTemperature", "nvmlDeviceGetPowerUsage"), DriverError("not supported"))
    assert state(monkeypatch, **refused) == ("1740 of 1980 MHz", None)


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"])
def test_a_driver_that_does_not_answer_is_a_finding(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    seen, advice = state(monkeypatch, **{broken: DriverError("no library")})
    assert seen == "unknown (no library)"
    assert advice is not None


def test_without_the_package_the_advice_is_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (finding,) = states()
    assert "pip install nvidia-ml-py" in (finding.advice or "")


def test_a_machine_without_a_gpu_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, environment: Callable[..., Environment]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (finding,) = describe(environment(), {"cuda": "torch sees none"})
    assert (finding.seen, finding.advice) == ("torch sees none", None)
    named = describe(environment(gpus=["H100"], driver="550.1"), {})
    assert [finding.subject for finding in named] == ["GPU", "GPU state"]
