"""Peak memory of a call above what was held before it."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

_Result = TypeVar("_Result")
_PROC = Path("/proc/self")
_SAMPLE_S = 0.002


def peak_bytes(run: Callable[[], _Result]) -> tuple[_Result, int, str]:
    """Calls `run` and measures its peak memory, what it returns included.

    Returns:
        What `run` returned, bytes, and how they were measured.

    Raises:
        RuntimeError: a system that tells nothing about memory.

    >>> _, nbytes, _ = peak_bytes(lambda: torch.ones(16 * 1024 * 1024))
    >>> round(nbytes / 2**20) in range(60, 80)  # MiB
    True
    """
    gc.collect()
    if torch.cuda.is_available():
        return _on_gpu(run)
    if not (_PROC / "status").exists():
        raise RuntimeError("peak memory of the CPU is measured on Linux only")
    _give_back()
    if _reset_high_water_mark():
        before = _status("VmRSS")
        result = run()
        return result, _status("VmHWM") - before, "VmHWM, reset before"
    return _sampled(run)


def _on_gpu(run: Callable[[], _Result]) -> tuple[_Result, int, str]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before, "torch.cuda.max_memory_allocated"


def _give_back() -> None:
    """Hands freed memory back to the system: what a call takes from it would not be seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _reset_high_water_mark() -> bool:
    """Sets the peak of this process to what it holds now; False where that is not allowed."""
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"Linux always says {name}")


def _sampled(run: Callable[[], _Result]) -> tuple[_Result, int, str]:
    """Looks at the memory every few ms beside the run."""
    before = peak = _status("VmRSS")
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_SAMPLE_S):
            peak = max(peak, _status("VmRSS"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = run()
        peak = max(peak, _status("VmRSS"))
    finally:
        done.set()
        watcher.join()
    return result, peak - before, f"VmRSS, every {1000 * _SAMPLE_S:g} ms"


def dense_cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values of a transformers cache.

    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    >>> dense_cache_bytes(cache)
    64
    """
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
