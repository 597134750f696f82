"""Poisson input, the surrogate gradients STDB and LinearSpike, and the LIF layer over time.

The neuron (Rathi et al. 2020, eqs. 1-4), with time steps t, potential u, threshold theta, leak lambda, spikes o:

    z(t) = u(t-1) / theta - 1,   o(t) = [z(t) > 0],   u(t) = lambda u(t-1) + W s(t) - theta o(t),   u(-1) = 0

A neuron fires on the potential before this step's input, so each layer adds one step of delay. A layer is therefore
run over all its steps at once: it takes currents at steps a ... b-1 and gives spikes at steps a+1 ... b, and nothing
outside these windows can reach the output.

A layer's spikes are kept as one byte for each neuron and step, from which STDB's gradient follows.
"""
import math
from typing import NamedTuple

import torch
from torch import nn

NEVER = 999  # before its first spike a neuron counts as having fired at step -999 (published code)


class PoissonGenerator(nn.Module):
    """Signed Poisson encoder: sign(x) where rand <= rate |x|, else 0; fresh in every call.

    rate: 1 for VGG, 0.9 for ResNet (published code). Source: Rathi et al. 2020, section 2.1.
    """

    def __init__(self, rate=1.0):
        super().__init__()
        self.rate = rate

    def fires(self, x):
        """x of any shape -> bool, the same shape."""
        return torch.rand_like(x) <= self.rate * x.abs()

    def forward(self, x):
        """x of any shape -> -1, 0 or 1, same shape and type."""
        return torch.where(self.fires(x), x.sign(), 0)


class STDB(torch.autograd.Function):
    """Spike [z > 0] whose gradient is alpha exp(-beta dt) (Rathi et al. 2020, eq. 12).

    STDB.apply(z, dt, alpha=0.3, beta=0.01): z and dt of one shape; dt in time steps since the neuron's last earlier
    spike. The exponential is of the product: exp(-dt)**beta underflows to 0 in float32 from dt = 104.
    """

    @staticmethod
    def forward(ctx, z, dt, alpha=0.3, beta=0.01):
        ctx.save_for_backward(dt)
        ctx.alpha, ctx.beta = alpha, beta
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        dt, = ctx.saved_tensors
        return grad * ctx.alpha * torch.exp(-ctx.beta * dt), None, None, None


class LinearSpike(torch.autograd.Function):
    """Spike [z > 0] whose gradient is gamma max(0, 1 - |z|) (Bellec et al. 2018; published code).

    LinearSpike.apply(z, gamma=0.3).
    """

    @staticmethod
    def forward(ctx, z, gamma=0.3):
        ctx.save_for_backward(z)
        ctx.gamma = gamma
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        z, = ctx.saved_tensors
        return grad * ctx.gamma * (1 - z.abs()).clamp(min=0), None


class Neuron(NamedTuple):
    """What an LIF layer needs to know. activation: 'STDB' (alpha, beta) or 'Linear' (gamma).

    backend: 'torch', or 'triton' for the kernels of kernels.py.
    """
    threshold: float
    leak: float
    activation: str
    alpha: float
    beta: float
    gamma: float
    backend: str = 'torch'


def surrogate_scale(neuron):
    """The surrogate's height with respect to the potential: z = u / theta - 1, so dz/du = 1 / theta."""
    return (neuron.alpha if neuron.activation == 'STDB' else neuron.gamma) / neuron.threshold


def integrate(current, fired, neuron, state=None):
    """Run LIF neurons over time: fill `fired` and turn `current` into the potentials u, in place.

    current: (n, M) floats, the input W s at n successive steps. fired: (n, M) bool, rows contiguous.
    Row k of `fired` holds the spikes that current[:k+1] causes; they leave one step later than row k's current.
    state: what the call on the steps before returned, (u, spikes), each (M,); None at the start.
    """
    if neuron.backend == 'triton':
        from self_models import kernels
        return kernels.integrate(current, fired, neuron, state)
    u, spikes = state or (torch.zeros_like(current[0]), torch.zeros_like(current[0]))
    for row, out in zip(current.unbind(), fired.unbind(), strict=True):
        u = row.add_(u, alpha=neuron.leak).sub_(spikes, alpha=neuron.threshold)
        torch.gt(u, neuron.threshold, out=spikes)  # as u / theta - 1 > 0, to the last bit
        out.copy_(spikes)  # by way of floats, as a CPU reads bools several times slower
    return u, spikes


def linear_factor(potentials, threshold):
    """max(0, 1 - |z|) for potentials of any shape."""
    return (1 - (potentials / threshold - 1).abs_()).clamp_(min=0)


def integrate_backward(grad, state, start, neuron):
    """Turn the gradient of the spikes into that of the currents, in place.

    grad (n, M): the gradient of the spikes times surrogate_scale(neuron). state (n, M): for STDB the spikes, bool; for
    Linear linear_factor() of the potentials. start: the step of row 0.

    With do/du = scale f, from u(t) = lambda u(t-1) + I(t) - theta o(t), the reset without gradient:
        g[k] = lambda g[k+1] + f[k] grad[k]
    STDB's f is exp(-beta dt), dt the time since the last *earlier* spike. So, with s the spikes,
        f[k] = exp(-beta) max(f[k-1], s[k-1]),   f[0] = exp(-beta (start + 999))
    """
    if neuron.backend == 'triton':
        from self_models import kernels
        kernels.integrate_backward(grad, state, start, neuron)
        return
    rows = grad.unbind()
    if neuron.activation == 'Linear':
        grad.mul_(state)
    else:
        factor = torch.full_like(rows[0], math.exp(-neuron.beta * (start + NEVER)))
        spikes, decay = torch.empty_like(factor), math.exp(-neuron.beta)
        rows[0].mul_(factor)
        for row, fired in zip(rows[1:], state.view(torch.uint8).unbind(), strict=False):
            spikes.copy_(fired)
            row.mul_(torch.maximum(factor, spikes, out=factor).mul_(decay))
    later = rows[-1]
    for row in reversed(rows[:-1]):
        later = row.add_(later, alpha=neuron.leak)
