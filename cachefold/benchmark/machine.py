"""The machine a figure belongs to: what it is, and how fast it reads its memory."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cachefold.benchmark.timing import elapsed_ms

PACKAGES = ("torch", "transformers", "numba", "triton", "numpy", "llama-cpp-python")
MEBI = 1024 * 1024
_FALLBACK_CACHE = 32 * MEBI
_SYSFS = Path("/sys/devices/system/cpu/cpu0/cache")


class Bandwidth(NamedTuple):
    """Measured memory bandwidth."""

    gbps: float
    """10^9 bytes/s, median of the best method."""
    method: str
    """The best method."""
    methods: dict[str, float]
    """Of every method tried, 10^9 bytes/s."""


def device() -> torch.device:
    """CUDA when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_threads(threads: int | None) -> int:
    """Sets the CPU threads of torch and numba; None = numba takes as many as torch has.

    Returns:
        Threads of torch.

    Raises:
        ValueError: more than the machine gives.
    """
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if threads is not None and threads > (most or 1):
        raise ValueError(f"--threads {threads} is more than the {most} CPUs this process may use")
    wanted = threads or torch.get_num_threads()
    if importlib.util.find_spec("numba") is not None:
        import numba

        numba.set_num_threads(min(wanted, numba.config.NUMBA_NUM_THREADS))
    # After numba, whose start sets the threads of OpenMP, and so torch's, to all CPUs.
    torch.set_num_threads(wanted)
    return torch.get_num_threads()


def last_level_cache() -> int:
    """Bytes of the largest cache between the cores and the memory."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).L2_cache_size
    return max(caches().values(), default=_FALLBACK_CACHE)


def caches() -> dict[str, int]:
    """Bytes of the caches of the first core by level, such as `L3`; empty where unknown."""
    found: dict[str, int] = {}
    for index in sorted(_SYSFS.glob("index*")):
        try:
            kind = (index / "type").read_text().strip()
            level = (index / "level").read_text().strip()
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = int(size.removesuffix("K")) * 1024
    return found


class Reader:
    """Reads a buffer much larger than the last-level cache: a measure, and a way to empty it.

    Args:
        nbytes: of the buffer; None = 8 x the last-level cache, at least 256 MiB.

    >>> Reader(nbytes=1 << 16).read() > 0
    True
    """

    def __init__(self, nbytes: int | None = None) -> None:
        nbytes = nbytes or max(8 * last_level_cache(), 256 * MEBI)
        self.buffer = torch.ones(nbytes // 4, dtype=torch.float32, device=device())

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return 4 * self.buffer.numel()

    def read(self) -> float:
        """Sums the buffer once; bandwidth in 10^9 bytes/s."""
        return self.nbytes / elapsed_ms(self.buffer.sum) / 1e6

    def bandwidth(self, repeats: int = 9) -> Bandwidth:
        """The best of several ways to read, each timed `repeats` times after a first call."""
        found = {}
        for name, (run, nbytes) in self._methods().items():
            run()
            ms = statistics.median(elapsed_ms(run) for _ in range(repeats))
            found[name] = nbytes / ms / 1e6
        best = max(found, key=lambda name: found[name])
        return Bandwidth(found[best], best, found)

    def _methods(self) -> dict[str, tuple[Callable[[], object], int]]:
        """What to call and the bytes it moves."""
        half = self.buffer.numel() // 2
        front, back = self.buffer[:half], self.buffer[half : 2 * half]
        methods: dict[str, tuple[Callable[[], object], int]] = {
            "torch sum": (self.buffer.sum, self.nbytes),
            "torch dot": (functools.partial(torch.dot, front, back), 8 * half),
            "torch copy, read + write": (functools.partial(front.copy_, back), 8 * half),
        }
        if self.buffer.device.type == "cpu" and importlib.util.find_spec("numba") is not None:
            run = functools.partial(_numba_sum(), self.buffer.numpy(), torch.get_num_threads())
            methods["numba sum"] = (run, self.nbytes)
        return methods


@functools.cache
def _numba_sum() -> Callable[[Any, int], Any]:
    """Compiles a sum over a flat array in so many parts."""
    import numba
    import numpy as np

    # In a function of its own the loop becomes vector instructions, inside prange it does not.
    @numba.njit(fastmath=True)
    def one(values: Any) -> Any:
        found = np.float32(0)
        for i in range(len(values)):
            found += values[i]
        return found

    @numba.njit(parallel=True)
    def total(values: Any, parts: int) -> Any:
        sums = np.zeros(parts, np.float32)
        share = len(values) // parts
        for part in numba.prange(parts):
            sums[part] = one(values[part * share : (part + 1) * share])
        return sums.sum()

    return total


def environment() -> dict[str, Any]:
    """Hardware, versions, threads and load, for a report."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "caches_bytes": caches(),
        "memory_bytes": _memory().get("MemTotal", 0),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        # Not imported by name: the package itself knows layers above this one.
        "cachefold": importlib.import_module("cachefold").__version__,
        "commit": _commit(),
        **{name: _version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        facts["cuda"] = torch.version.cuda
    return facts | {"load_at_start": busy()}


def busy() -> float:
    """Runnable processes of the last minute, one per busy CPU; 0 where the system won't say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def available_bytes() -> int:
    """Memory that can be taken now; GPU memory where there is a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return _memory().get("MemAvailable", 8 << 30)


def _memory() -> dict[str, int]:
    """Bytes by the names of /proc/meminfo; empty on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines)
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1] == "kB"}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the code, with `+` when files are changed; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
