"""Random numbers for Triton's training kernels, gradients through them, and when they are near."""

from __future__ import annotations

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
BATCH = 2
# Largest error, as a part of the largest expected number; the float64 reference gets the same
# rounded inputs. Half precision rounds probabilities, the output and the gradients once each; the
# interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
HALVES = [torch.float16, torch.bfloat16]


def draw_alpha(draw, kind, *shape):
    alpha = torch.sigmoid(2 * draw(*shape))
    if kind == "hard":
        return alpha.round()
    return {
        "soft": alpha,
        "mild": 0.8 + 0.2 * alpha,  # what is carried over a block is still felt
        "merge": torch.ones_like(alpha),
        "append": 0 * alpha,
    }[kind]


def drawer(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_gradients(function, leaves, grads):
    """Outputs of function(leaves), then the gradient of every leaf (0 where none flows)."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    outputs = function(leaves)
    torch.autograd.backward(outputs, [g.to(o.dtype) for o, g in zip(outputs, grads, strict=True)])
    return [
        *(output.detach() for output in outputs),
        *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves),
    ]


def assert_near(actual, expected, tolerance):
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.isfinite().all(), f"number {i}"
        error = (a.double() - e).abs().max().item()
        assert error <= tolerance * max(1.0, e.abs().max().item()), f"number {i}"
