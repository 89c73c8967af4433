"""One abstraction over CPU, CUDA and XPU: which device, which dtype is fast on it, how much memory was used."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from pathlib import Path

import torch

from auto_round.errors import SpecError

COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
ACCELERATORS = ("cuda", "xpu")
MEASURED_SECONDS = 0.1


def resolve_device(name: str | int | torch.device) -> torch.device:
    """Turn "auto", "cpu", "cuda:1", "xpu" or an index such as 0 or "0" into a device.

    "auto" is the accelerator torch sees, else the CPU. Raises SpecError when the device is unknown or not present.
    """
    text = str(name).strip().lower()
    present = next((kind for kind in ACCELERATORS if _count(kind)), None)
    if text == "auto":
        return torch.device(present or "cpu")
    if text.isdigit():
        text = f"{present or 'cpu'}:{text}" if present else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        raise SpecError(f"device {name!r} is not known; use auto, cpu, cuda, cuda:0, xpu or an index") from None
    if device.type not in ("cpu", *ACCELERATORS):
        raise SpecError(f"device {name!r} is not supported; use auto, cpu, cuda or xpu")
    if device.type != "cpu" and (device.index or 0) >= _count(device.type):
        raise SpecError(f"device {name!r} is not there: torch sees {_count(device.type)} {device.type} device(s)")
    return device


def _count(kind: str) -> int:
    module = torch.get_device_module(kind)
    return int(module.device_count()) if module.is_available() else 0


def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype to compute in: bfloat16 where its matmul beats float32's, else float32.

    Accelerators are asked; on a CPU both are timed in turns, since the gap is a factor of 2 one way or of 10 to 100 the
    other way.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "xpu":
        return torch.bfloat16
    best = {torch.bfloat16: float("inf"), torch.float32: float("inf")}
    # Longer than another process holds the cores at a time: its turns must not look like a slow dtype.
    end = time.perf_counter() + MEASURED_SECONDS
    while time.perf_counter() < end:
        best = {dtype: min(seconds, _matmul_seconds(dtype)) for dtype, seconds in best.items()}
    return min(best, key=lambda dtype: best[dtype])


def _matmul_seconds(dtype: torch.dtype, size: int = 384) -> float:
    a = torch.ones(size, size, dtype=dtype)
    begin = time.perf_counter()
    a @ a
    return time.perf_counter() - begin


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn "auto" or a dtype's name into the dtype blocks are run in; raise SpecError for another name."""
    if name == "auto":
        return fast_dtype(device)
    if name not in COMPUTE_DTYPES:
        raise SpecError(f"compute_dtype={name!r} is not known; use auto, {', '.join(COMPUTE_DTYPES)}")
    return COMPUTE_DTYPES[name]


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far."""
    try:
        # Not getrusage where this is: a process begins with the peak of the one that started it there.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int | None:
    """Largest memory allocated on an accelerator so far; None on the CPU."""
    if device.type == "cpu":
        return None
    return int(torch.get_device_module(device).max_memory_allocated(device))


def free_device_bytes(device: torch.device) -> int | None:
    """Memory left on an accelerator, with what torch keeps and does not use; None on the CPU, or if it cannot tell."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    try:
        free = int(module.mem_get_info(device)[0])
    except (AttributeError, NotImplementedError, RuntimeError):  # XPUs in old versions of torch, or without the means
        return None
    return free + int(module.memory_reserved(device)) - int(module.memory_allocated(device))


def release_cached(device: torch.device) -> None:
    """Give memory that is cached but not used back to an accelerator's driver or, on a CPU, to the system."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
    # glibc keeps what was freed between blocks still in use: as much as the run itself needs. Others have no such call.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
