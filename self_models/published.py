"""The published functions of one time step."""
import torch
from torch import nn

from self_models.encoding import ENCODINGS
from self_models.surrogate import Linear, SpikeTimeDependent


class STDB(torch.autograd.Function):
    """Spike [z > 0] whose gradient is alpha exp(-beta dt) (Rathi et al. 2020, eq. 12).

    STDB.apply(z, dt, alpha=0.3, beta=0.01): z and dt of one shape; dt in time steps since the neuron's last earlier
    spike.
    """

    @staticmethod
    def forward(ctx, z: torch.Tensor, dt: torch.Tensor, alpha: float = 0.3, beta: float = 0.01) -> torch.Tensor:
        ctx.save_for_backward(dt)
        ctx.surrogate = SpikeTimeDependent(alpha=alpha, beta=beta)
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dt, = ctx.saved_tensors
        return grad * ctx.surrogate.gradient(dt), None, None, None


class LinearSpike(torch.autograd.Function):
    """Spike [z > 0] whose gradient is gamma max(0, 1 - |z|) (Bellec et al. 2018; published code).

    LinearSpike.apply(z, gamma=0.3), or as published LinearSpike.apply(z, dt), in which dt has no effect.
    """

    @staticmethod
    def forward(ctx, z: torch.Tensor, gamma: float | torch.Tensor = 0.3) -> torch.Tensor:
        ctx.save_for_backward(z)
        ctx.surrogate = Linear(gamma=0.3 if isinstance(gamma, torch.Tensor) else gamma)
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, = ctx.saved_tensors
        return grad * ctx.surrogate.gradient(z), None


class PoissonGenerator(nn.Module):
    """Rate coding: signed Poisson spikes, sign(x) where rand <= rate |x|, else 0; fresh in every call.

    rate: 1 for VGG, 0.9 for ResNet (published code).
    """

    def __init__(self, rate: float = 1.0):
        super().__init__()
        self.rate = rate

    def fires(self, x: torch.Tensor) -> torch.Tensor:
        """x of any shape -> bool, the same shape."""
        return ENCODINGS['poisson'].fires(x, 0, self.rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of any shape -> -1, 0 or 1, same shape and type."""
        return torch.where(self.fires(x), x.sign(), 0)
