"""The GPU backend: Triton kernels for training, prefill and decoding, on NVIDIA and AMD cards.

Loads without triton, so that `available` can say what is missing. Legend: B batch, K kv heads, G
query heads per kv head, D key dim, Dv value dim.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from cachefold.attention.call import PagedCall, ParallelCall, StepCall, entry_key_dim

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_DIM = 256
"""A tile of wider vectors does not fit in shared memory."""
MAX_GROUPS = 64
"""Query heads of one kv head are the rows of a tile; more overflow the registers."""


class TritonBackend:
    """Every call on a GPU.

    >>> BACKEND.name
    'triton'
    """

    name = "triton"

    def available(self) -> tuple[bool, str]:
        """Whether triton is installed and there is a GPU."""
        if importlib.util.find_spec("triton") is None:
            return False, "triton is not installed"
        if not torch.cuda.is_available():
            return False, "torch finds no CUDA or ROCm GPU"
        return True, ""

    def supports(self, call: ParallelCall | PagedCall | StepCall) -> tuple[bool, str]:
        """Whether the kernels take these shapes and types."""
        if isinstance(call, ParallelCall):
            from cachefold.attention import triton_train_tiles

            ok, reason = triton_train_tiles.supports(call)
        else:
            reason = _refusal(call)
        if not reason and call.query.device.type != "cuda":
            reason = f"it runs on a GPU, not on {call.query.device.type}"
        return not reason, reason

    def parallel(self, call: ParallelCall) -> Tensor:
        """Attends from every token of a text; (B, H, T, Dv), differentiable."""
        from cachefold.attention import triton_train

        return triton_train.parallel(call)

    def attend(self, call: PagedCall) -> Tensor:
        """Attends from Q new tokens; (B, H, Q, Dv), without gradient."""
        from cachefold.attention import triton_decode, triton_prefill

        # A lone query keeps few programs busy: split its entries instead.
        return (triton_decode if call.query.shape[2] == 1 else triton_prefill).attend(call)

    def step(self, call: StepCall) -> Tensor:
        """Folds in place, then attends from the new token; (B, H, 1, Dv), without gradient."""
        from cachefold.attention import triton_step

        return triton_step.step(call)


BACKEND = TritonBackend()


def _refusal(call: PagedCall | StepCall) -> str:
    """Why the kernels can't do a call; empty if they can."""
    dtypes = {tensor.dtype for tensor in _numbers(call)} - {*DTYPES}
    if dtypes:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        return f"numbers must be bfloat16, float16 or float32, not {names}"
    if call.page_size not in (16, 32):
        return f"pages must have 16 or 32 entries, not {call.page_size}"
    key_dim, kv_heads = call.query.shape[-1], call.table.shape[1]
    value_dim = call.pages.shape[1] // call.page_size - entry_key_dim(call)
    if max(key_dim, value_dim) > MAX_DIM:
        return f"head dims go up to {MAX_DIM}, not {key_dim} and {value_dim}"
    groups = call.query.shape[1] // kv_heads
    if groups > MAX_GROUPS:
        return f"at most {MAX_GROUPS} query heads may share a kv head, not {groups}"
    return _refused_memory(call)


def _refused_memory(call: PagedCall | StepCall) -> str:
    """What is not laid out as the kernels need it; they copy all but the state of a step."""
    if call.pages.stride(1) != 1:
        return "the numbers of a page must lie side by side"
    if isinstance(call, StepCall):
        batch = call.query.shape[0]
        state = [*call.ring.tensors(), *call.tail.tensors(), call.table, call.lengths]
        if not all(tensor.is_contiguous() and tensor.shape[0] == batch for tensor in state):
            return "ring, open entry, block table and lengths must be contiguous, one per request"
    return ""


def _numbers(call: PagedCall | StepCall) -> list[Tensor]:
    if isinstance(call, PagedCall):
        keys_values = [call.exact_key, call.exact_value, call.open_key, call.open_value]
        bias = [] if call.open_bias is None else [call.open_bias]
        return [call.query, call.pages, *keys_values, *bias]
    runs = [run.named() for run in (call.new, call.ring, call.tail)]
    tokens = [tensor for run in runs for name, tensor in run.items() if name != "valid"]
    factors = [x for x in (call.factors, call.size_weight) if x is not None]
    return [call.query, call.pages, *tokens, *factors]
