"""Which backend computes an attention call, and why the others do not.

`auto` takes the first of `ORDER` that runs on this machine and supports the call. Choices and
refusals are logged, each once per process.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from typing import Protocol

import torch
from torch import Tensor

from cachefold.attention import torch_native
from cachefold.attention.call import PagedCall, ParallelCall, StepCall
from cachefold.core.names import closest

logger = logging.getLogger(__name__)

_MODULES = {
    "numba": "numba_backend",
    "triton": "triton_backend",
    "torch": "torch_native",
    "reference": "reference",
}
ORDER = tuple(_MODULES)
"""Names of the backends, the fastest first."""
_HOME_DEVICES = {"numba": "cpu", "triton": "cuda"}
"""Where a backend that is a package of its own is missed when that is not installed."""
_KINDS: dict[type, str] = {ParallelCall: "whole texts", PagedCall: "prefill", StepCall: "decoding"}

Call = ParallelCall | PagedCall | StepCall


class Backend(Protocol):
    """One way to compute attention calls; `BACKEND` of a module of this package."""

    @property
    def name(self) -> str:
        """As users write it."""
        ...

    def available(self) -> tuple[bool, str]:
        """Whether it runs on this machine, and else why not."""
        ...

    def supports(self, call: Call) -> tuple[bool, str]:
        """Whether it computes this call, and else why not; asked in every layer, so cheap."""
        ...

    def parallel(self, call: ParallelCall) -> Tensor:
        """Attends from every token of a text; (B, H, T, Dv), differentiable."""
        ...

    def attend(self, call: PagedCall) -> Tensor:
        """Attends from new tokens to entries in pages; (B, H, Q, Dv)."""
        ...

    def step(self, call: StepCall) -> Tensor:
        """Folds in place what leaves the ring, attends from the new token; (B, H, 1, Dv)."""
        ...


def choose(call: Call, wanted: str = "auto") -> Backend:
    """Finds the backend of a call.

    Args:
        call: what is to be computed.
        wanted: `auto`, or the name of a backend, which then must do it.

    Raises:
        ValueError: unknown name, or the wanted backend can't do it here; says why.

    >>> one = torch.ones(1, 1, 1, 2)
    >>> call = ParallelCall(
    ...     query=one, exact_key=one, exact_value=one, merged_key=one, merged_value=one,
    ...     alpha=torch.zeros(1, 1, 1), valid=torch.ones(1, 1, dtype=torch.bool), delay=1,
    ...     scaling=1.0)
    >>> choose(call, "reference").name
    'reference'
    """
    if type(call) is StepCall and torch.compiler.is_compiling():
        return _traceable(wanted)
    if wanted != "auto":
        check_name(wanted)
        backend, reason = _attempt(wanted, call)
        if backend is None:
            raise ValueError(
                f"backend {wanted!r} can't compute {_KINDS[type(call)]} here: {reason}. Leave "
                'the backend at "auto", or see `cachefold ls backends`.'
            )
        return backend
    for name in ORDER:
        backend, reason = _attempt(name, call)
        if backend is not None:
            return backend
        _tell_refusal(name, reason, call.query.device.type)
    raise AssertionError("reference computes every call")


def _traceable(wanted: str) -> Backend:
    """The backend of a compiled step: nothing is imported, asked or logged inside a graph."""
    if wanted not in ("auto", "torch"):
        raise ValueError(
            f"torch.compile can't look into backend {wanted!r}; make the cache with "
            'backend="torch" or "auto", or do not compile the step'
        )
    return torch_native.BACKEND


def check_name(name: str) -> None:
    """Refuses a name that is neither `auto` nor a backend.

    Raises:
        ValueError: says the closest name.

    >>> check_name("numba")
    """
    allowed = ("auto", *ORDER)
    if name not in allowed:
        raise ValueError(
            f"unknown backend {name!r}.{closest(name, allowed)} Choose one of: "
            f"{', '.join(allowed)}. See `cachefold ls backends`."
        )


def list_backends() -> dict[str, tuple[bool, str]]:
    """Whether each backend runs on this machine, and else why not; the fastest first.

    >>> list_backends()["reference"]
    (True, '')
    """
    return {name: (load_backend(name)[0] is not None, load_backend(name)[1]) for name in ORDER}


@functools.cache
def tell(level: int, message: str) -> None:
    """Logs a message once per process.

    >>> tell(logging.DEBUG, "said once")
    """
    logger.log(level, message)


@functools.cache
def load_backend(name: str) -> tuple[Backend | None, str]:
    """The backend if it runs on this machine, else why not; looked up once per process.

    >>> load_backend("reference")[0].name
    'reference'
    """
    try:
        module = importlib.import_module(f"cachefold.attention.{_MODULES[name]}")
    except ImportError as error:
        return None, str(error)
    backend: Backend = module.BACKEND
    ok, reason = backend.available()
    return (backend, "") if ok else (None, reason)


def _attempt(name: str, call: Call) -> tuple[Backend | None, str]:
    """The backend if it computes the call, else why not."""
    backend, reason = load_backend(name)
    if backend is None:
        return None, reason
    if type(call) is PagedCall and name != "reference" and _needs_gradient(call):
        return None, "it gives no gradient after a cache; run under torch.no_grad()"
    ok, reason = backend.supports(call)
    if not ok:
        return None, reason
    _tell_choice(name, _KINDS[type(call)])
    return backend, ""


def _needs_gradient(call: PagedCall) -> bool:
    inputs = [call.query, call.exact_key, call.exact_value, call.open_key, call.open_value]
    inputs += [] if call.open_bias is None else [call.open_bias]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


@functools.cache
def _tell_choice(name: str, kind: str) -> None:
    logger.info("%s: backend %s", kind, name)


@functools.cache
def _tell_refusal(name: str, reason: str, device: str) -> None:
    missed = _HOME_DEVICES.get(name) == device and importlib.util.find_spec(name) is None
    level = logging.WARNING if missed else logging.INFO
    hint = f"; it would be faster on this machine: pip install {name}" if missed else ""
    logger.log(level, "backend %s is not used: %s%s", name, reason, hint)
