"""Clocks, power, temperature and the reasons of lowered clocks of an NVIDIA GPU, through its management library."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import torch

from linbench.errors import UsageError
from linbench.record import DeviceConditions

LOWERED = {
    0x04: "SwPowerCap",
    0x08: "HwSlowdown",
    0x20: "SwThermalSlowdown",
    0x40: "HwThermalSlowdown",
    0x80: "HwPowerBrakeSlowdown",
}
"""Bits of NVML's clock event reasons that make a time not the device's own; idleness and settings are none of them."""


class DeviceWatch:
    """Reads the state of one GPU. Needs the package ``nvidia-ml-py``, which the extra ``gpu`` installs."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle
        self._sm: list[int] = []
        self._memory: list[int] = []
        self._power: list[float] = []
        self._temperature: list[int] = []
        self._reasons: set[str] = set()
        self.discarded = self.kept = 0
        """Samples taken with lowered clocks: set aside, and kept because the time was over."""

    @classmethod
    def of(cls, device: torch.device) -> Self | None:
        """The watch of a CUDA device; None without the management library, or where it does not know the device."""
        try:
            import pynvml
        except ImportError:
            return None
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        try:
            pynvml.nvmlInit()
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"))
        except pynvml.NVMLError:
            return None

    def lowered(self) -> bool:
        """Read everything once; whether the clocks are lowered at this moment."""
        nvml, handle = self._library, self._handle
        self._sm.append(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        self._memory.append(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM))
        self._power.append(nvml.nvmlDeviceGetPowerUsage(handle) / 1e3)
        self._temperature.append(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        now = {name for bit, name in LOWERED.items() if bits & bit}
        self._reasons |= now
        return bool(now)

    def conditions(self, locked_mhz: int | None = None) -> DeviceConditions:
        """What was read so far."""
        return DeviceConditions(
            sm_clock_mhz=self._sm,
            memory_clock_mhz=self._memory,
            power_watts=self._power,
            temperature_celsius=self._temperature,
            throttle_reasons=sorted(self._reasons),
            locked_sm_clock_mhz=locked_mhz,
            discarded_samples=self.discarded,
            lowered_samples=self.kept,
        )

    @contextlib.contextmanager
    def locked(self, mhz: int | None) -> Iterator[None]:
        """Hold the multiprocessors' clock at ``mhz`` meanwhile; None leaves it alone.

        A process that is killed leaves the clock locked until ``nvidia-smi -rgc``, or until the next cell ends.

        Raises:
            UsageError: this user may not lock clocks.
        """
        if mhz is None:
            yield
            return
        try:
            self._library.nvmlDeviceSetGpuLockedClocks(self._handle, mhz, mhz)
        except self._library.NVMLError as error:
            raise UsageError(
                f"device.cuda.lock_clock_mhz={mhz}: the driver refuses ({error}); it needs root"
            ) from error
        try:
            yield
        finally:
            self._library.nvmlDeviceResetGpuLockedClocks(self._handle)
