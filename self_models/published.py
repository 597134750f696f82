"""The published spike functions of one time step, as autograd Functions; self_models.surrogate hands them out, too."""
import torch

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

    LinearSpike.apply(z, gamma=0.3).
    """

    @staticmethod
    def forward(ctx, z: torch.Tensor, gamma: float = 0.3) -> torch.Tensor:
        ctx.save_for_backward(z)
        ctx.surrogate = Linear(gamma=gamma)
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, = ctx.saved_tensors
        return grad * ctx.surrogate.gradient(z), None
