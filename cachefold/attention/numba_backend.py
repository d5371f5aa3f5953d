"""The CPU backend: fused kernels compiled by numba, bfloat16 and float32.

Loads without numba, so that `available` can say what is missing.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from cachefold.attention import blocked
from cachefold.attention.call import PagedCall, ParallelCall, StepCall, entry_key_dim

MAX_GROUPS = 16


class NumbaBackend:
    """Decoding and prefill on the CPU; training is plain torch.

    >>> BACKEND.name
    'numba'
    """

    name = "numba"

    def available(self) -> tuple[bool, str]:
        """Whether numba is installed."""
        if importlib.util.find_spec("numba") is None:
            return False, "numba is not installed"
        return True, ""

    def supports(self, call: ParallelCall | PagedCall | StepCall) -> tuple[bool, str]:
        """Whether the kernels were made for these shapes and types."""
        if isinstance(call, ParallelCall):
            return False, "its kernels are for inference with a cache"
        if call.query.device.type != "cpu":
            return False, f"it runs on the CPU, not on {call.query.device.type}"
        dtypes = {tensor.dtype for tensor in _model_tensors(call)}
        if dtypes not in ({torch.bfloat16}, {torch.float32}):
            names = ", ".join(sorted(str(dtype) for dtype in dtypes))
            return False, f"entries and tokens must all be bfloat16 or all float32, not {names}"
        return _supports_shape(call)

    def parallel(self, call: ParallelCall) -> Tensor:
        """The training form, in plain torch."""
        return blocked.parallel(call)

    def attend(self, call: PagedCall) -> Tensor:
        """Attends from Q new tokens; (B, H, Q, Dv)."""
        from cachefold.attention import numba_calls

        return (numba_calls.decode if call.query.shape[2] == 1 else numba_calls.prefill)(call)

    def step(self, call: StepCall) -> Tensor:
        """Folds in place, then attends from the new token; (B, H, 1, Dv)."""
        from cachefold.attention import numba_calls

        return numba_calls.step(call)


BACKEND = NumbaBackend()


def _model_tensors(call: PagedCall | StepCall) -> list[Tensor]:
    if isinstance(call, PagedCall):
        exact, opened = (call.exact_key, call.exact_value), (call.open_key, call.open_value)
        return [call.query, call.pages, *exact, *opened]
    new, ring, tail = call.new, call.ring, call.tail
    tokens = [tensor for run in (new, ring) for tensor in (run.key, run.value, run.cos)]
    return [call.query, call.pages, *tokens, tail.cos]


def _supports_shape(call: PagedCall | StepCall) -> tuple[bool, str]:
    key = call.exact_key if isinstance(call, PagedCall) else call.new.key
    key_dim = call.query.shape[-1]
    value_dim = call.pages.shape[1] // call.page_size - entry_key_dim(call)
    groups = call.query.shape[1] // key.shape[1]
    if key_dim % 16 or value_dim % 16:
        return False, f"head dims must be multiples of 16, not {key_dim} and {value_dim}"
    if groups > MAX_GROUPS:
        return False, f"at most {MAX_GROUPS} query heads may share a kv head, not {groups}"
    if isinstance(call, StepCall) and call.new.cos.shape[-1] % 32:
        return False, f"rotary dims must be a multiple of 32, not {call.new.cos.shape[-1]}"
    return True, ""
