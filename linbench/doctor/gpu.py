"""NVIDIA GPUs as their driver sees them: clocks, heat, power, what slows them down, and who else uses them.

Written against the documentation of NVML; it has never run on a device.
"""

from __future__ import annotations

import importlib
from typing import Any

from linbench.doctor.finding import Finding
from linbench.record import Environment

SLOWED = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "external power brake",
}
"""Bits of NVML's clocks event reasons that make a time meaningless. Idle clocks (0x1) and clocks that somebody has set
(0x2) are no disturbance."""


def describe(environment: Environment, missing: dict[str, str]) -> list[Finding]:
    """The GPUs of the machine, and the state of each where the driver can be asked.

    Args:
        environment: names the GPUs that torch sees.
        missing: why there are none, by device.
    """
    if not environment.gpus:
        return [Finding("GPU", missing.get("cuda", "none"))]
    driver = f", driver {environment.driver}" if environment.driver else ""
    return [Finding("GPU", f"{', '.join(environment.gpus)}{driver}"), *states()]


def states() -> list[Finding]:
    """One finding for each GPU that the driver knows."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return [Finding("GPU state", "unknown", "pip install nvidia-ml-py, so that clocks and throttling can be seen")]
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return [
            Finding("GPU state", f"unknown ({error})", "the driver cannot be asked: install its management library")
        ]
    try:
        return [_state(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        return [Finding("GPU state", f"unknown ({error})", "the driver does not answer: reload it")]
    finally:
        nvml.nvmlShutdown()


def _state(nvml: Any, index: int) -> Finding:
    device = nvml.nvmlDeviceGetHandleByIndex(index)
    told, advice = [], []

    def ask(question: str, *arguments: Any) -> Any:
        """The driver's answer, or None where this GPU has none."""
        try:
            return getattr(nvml, question)(device, *arguments)
        except (nvml.NVMLError, AttributeError):  # not supported by the GPU, or not known to this version
            return None

    now = ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM)
    most = ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM)
    if now is not None and most is not None:
        told.append(f"{now} of {most} MHz")
    if (heat := ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU)) is not None:
        told.append(f"{heat} °C")
    power_mw, limit_mw = ask("nvmlDeviceGetPowerUsage"), ask("nvmlDeviceGetEnforcedPowerLimit")
    if power_mw is not None and limit_mw is not None:
        told.append(f"{power_mw / 1e3:.0f} of {limit_mw / 1e3:.0f} W")
    bits = ask("nvmlDeviceGetCurrentClocksEventReasons")
    if bits is None:  # its name in drivers before 2023
        bits = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    if slowed := [name for bit, name in SLOWED.items() if bits is not None and bits & bit]:
        told.append(f"slowed down by {', '.join(slowed)}")
        advice.append("let it cool, or see to its power, before measuring")
    if others := ask("nvmlDeviceGetComputeRunningProcesses"):
        told.append(f"{len(others)} process{'es' if len(others) > 1 else ''} on it")
        advice.append("end what else runs on it")
    if ask("nvmlDeviceGetPersistenceMode") == 0:
        told.append("persistence mode off")
        advice.append("switch persistence mode on (nvidia-smi -pm 1), or every first call wakes the driver")
    return Finding(f"GPU {index} state", ", ".join(told) or "not told by the driver", "; ".join(advice) or None)
