"""Poisson input, the surrogate gradients STDB and LinearSpike, and the LIF layer over time.

The neuron (Rathi et al. 2020, eqs. 1-4), with time steps t, potential u, threshold theta, leak lambda, spikes o:

    z(t) = u(t-1) / theta - 1,   o(t) = [z(t) > 0],   u(t) = lambda u(t-1) + W s(t) - theta o(t),   u(-1) = 0

A neuron fires on the potential before this step's input, so each layer adds one step of delay. A layer is therefore
run over all its steps at once: it takes currents at steps a ... b-1 and gives spikes at steps a+1 ... b, and nothing
outside these windows can reach the output.

A layer's spikes are kept as one byte for each neuron and step, the *code*: code[k] = 1 + the index of the last spike
at or before row k, 0 where there was none yet. It says both whether a neuron fires (code[k] == k + 1) and when it
fired before (code[k-1]), which is all that STDB's gradient needs.
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


def code_dtype(steps):
    """The smallest integer type that holds codes 0 ... steps."""
    return torch.uint8 if steps < 256 else torch.int16 if steps < 1 << 15 else torch.int32


def integrate(current, codes, neuron, state=None):
    """Run LIF neurons over time: fill `codes` and turn `current` into the potentials u, in place.

    current: (n, M) floats, the input W s at n successive steps. codes: (n, M) integers, rows contiguous.
    Row k of the codes holds the spikes that current[:k+1] causes; they leave one step later than row k's current.
    state: what the call on the steps before returned, (u, spikes), each (M,); None at the start.
    """
    if neuron.backend == 'triton':
        from self_models import kernels
        return kernels.integrate(current, codes, neuron, state)
    u, spikes = state or (torch.zeros_like(current[0]), torch.zeros_like(current[0]))
    fired = torch.empty_like(u, dtype=torch.bool)
    number = fired.view(torch.uint8) if codes.dtype == torch.uint8 else fired  # bytes multiply faster
    code = torch.zeros_like(codes[0])
    for k in range(len(current)):
        u = current[k].add_(u, alpha=neuron.leak).sub_(spikes, alpha=neuron.threshold)
        torch.gt(u, neuron.threshold, out=fired)  # as u / theta - 1 > 0, to the last bit
        code = torch.maximum(torch.mul(number, k + 1, out=codes[k]), code, out=codes[k])
        spikes.copy_(fired)
    return u, spikes


def spike_factor(codes, start, beta, dtype):
    """exp(-beta dt) for every neuron and step: (n, M) of `dtype` from (n, M) codes; `start` is the step of row 0.

    dt is the time since the last *earlier* spike, so the factor of row k is, with s the spikes,
        e[k] = exp(-beta) max(e[k-1], s[k-1]),   e[0] = exp(-beta (start + 999))
    """
    factor = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    factor[0] = math.exp(-beta * (start + NEVER))
    spikes = torch.empty_like(factor[0])
    for k in range(1, len(codes)):
        spikes.copy_(codes[k - 1] == k)
        torch.maximum(factor[k - 1], spikes, out=factor[k]).mul_(math.exp(-beta))
    return factor


def linear_factor(potentials, threshold):
    """max(0, 1 - |z|) for potentials of any shape."""
    return (1 - (potentials / threshold - 1).abs_()).clamp_(min=0)


def integrate_backward(grad, state, start, neuron):
    """Turn the gradient of the spikes, `grad` (n, M), into that of the currents, in place.

    state (n, M): the codes for STDB, linear_factor() of the potentials for Linear. start: the step of row 0.
    With do/du = scale factor, from u(t) = lambda u(t-1) + I(t) - theta o(t), the reset without gradient:
        g[k] = lambda g[k+1] + scale factor[k] grad[k]
    """
    if neuron.backend == 'triton':
        from self_models import kernels
        return kernels.integrate_backward(grad, state, start, neuron)
    stdb, scale, leak = neuron.activation == 'STDB', surrogate_scale(neuron), neuron.leak
    factor = spike_factor(state, start, neuron.beta, grad.dtype) if stdb else state
    carried = torch.zeros_like(grad[0])
    for k in reversed(range(len(grad))):
        torch.addcmul(carried, factor[k], grad[k], value=scale, out=grad[k])
        carried = grad[k] if leak == 1 else torch.mul(grad[k], leak, out=carried)
    return None
