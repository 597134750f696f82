"""What the input layer is given at each time step: Poisson spikes of the image's pixels, or the image itself."""
import torch
from torch import nn

ENCODINGS = ('poisson', 'direct')


class PoissonGenerator(nn.Module):
    """Rate coding: signed Poisson spikes, sign(x) where rand <= rate |x|, else 0; fresh in every call.

    rate: 1 for VGG, 0.9 for ResNet (published code). Source: Rathi et al. 2020, section 2.1.
    """

    def __init__(self, rate: float = 1.0):
        super().__init__()
        self.rate = rate

    def fires(self, x: torch.Tensor) -> torch.Tensor:
        """x of any shape -> bool, the same shape."""
        # drawn in float32 at least: bfloat16 draws multiples of 1/256, and 0 <= 0.001 as often
        return torch.rand_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) <= self.rate * x.abs()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of any shape -> -1, 0 or 1, same shape and type."""
        return torch.where(self.fires(x), x.sign(), 0)
