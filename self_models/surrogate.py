"""The surrogate gradients STDB and LinearSpike: as autograd Functions of one time step, and as factors over all steps.

A spike is [z > 0], z = u / theta - 1. Its gradient with respect to z is the surrogate's height times a factor:

    STDB          alpha exp(-beta dt)      dt: time steps since the neuron's last earlier spike
    LinearSpike   gamma max(0, 1 - |z|)
"""
import math

import torch

SURROGATES = ('STDB', 'Linear')
NEVER = 999  # before its first spike a neuron counts as having fired at step -999 (published code)


class STDB(torch.autograd.Function):
    """Spike [z > 0] whose gradient is alpha exp(-beta dt) (Rathi et al. 2020, eq. 12).

    STDB.apply(z, dt, alpha=0.3, beta=0.01): z and dt of one shape; dt in time steps since the neuron's last earlier
    spike. The exponential is of the product: exp(-dt)**beta underflows to 0 in float32 from dt = 104.
    """

    @staticmethod
    def forward(ctx, z: torch.Tensor, dt: torch.Tensor, alpha: float = 0.3, beta: float = 0.01) -> torch.Tensor:
        ctx.save_for_backward(dt)
        ctx.alpha, ctx.beta = alpha, beta
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dt, = ctx.saved_tensors
        return grad * ctx.alpha * torch.exp(-ctx.beta * dt), None, None, None


class LinearSpike(torch.autograd.Function):
    """Spike [z > 0] whose gradient is gamma max(0, 1 - |z|) (Bellec et al. 2018; published code).

    LinearSpike.apply(z, gamma=0.3).
    """

    @staticmethod
    def forward(ctx, z: torch.Tensor, gamma: float = 0.3) -> torch.Tensor:
        ctx.save_for_backward(z)
        ctx.gamma = gamma
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, = ctx.saved_tensors
        return grad * ctx.gamma * (1 - z.abs()).clamp(min=0), None


def first_stdb_factor(start: int, beta: float) -> float:
    """exp(-beta dt) of a neuron at step `start` that has not fired yet."""
    return math.exp(-beta * (start + NEVER))


def apply_stdb_factor(grad: torch.Tensor, spikes: torch.Tensor, start: int, beta: float) -> None:
    """Multiply the gradient of the spikes, grad (n, M), by exp(-beta dt), in place; spikes (n, M) bool.

    start: the step of row 0. dt is the time since the last *earlier* spike, so with s the spikes
        f[k] = exp(-beta) max(f[k-1], s[k-1]),   f[0] = exp(-beta (start + 999))
    """
    rows = grad.unbind()
    factor = torch.full_like(rows[0], first_stdb_factor(start, beta))
    earlier, decay = torch.empty_like(factor), math.exp(-beta)
    rows[0].mul_(factor)
    for row, fired in zip(rows[1:], spikes.view(torch.uint8).unbind(), strict=False):
        earlier.copy_(fired)
        row.mul_(torch.maximum(factor, earlier, out=factor).mul_(decay))


def linear_factor(potentials: torch.Tensor, threshold: float) -> torch.Tensor:
    """max(0, 1 - |z|) for potentials of any shape."""
    return (1 - (potentials / threshold - 1).abs_()).clamp_(min=0)
