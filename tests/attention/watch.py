"""What the tests of several backends watch: memory left unwritten, and waits for the device."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def poison(monkeypatch):
    """New memory is NaN: what a kernel forgets to write shows. The sizes of all that is new."""
    sizes = []

    def poisoned(allocate):
        def allocate_nan(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            sizes.append(tensor.numel())
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return allocate_nan

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    return sizes


class Waits(TorchDispatchMode):
    """Notes where the host waits for a number of the device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero,
            torch.ops.aten.equal,
        ):  # fmt: skip
            self.seen.append(func)
        return func(*args, **(kwargs or {}))
