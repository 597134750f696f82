"""What is faster on a CPU than torch's own; on other devices, torch's own is used.

Convolutions of small feature maps as matrix products over their patches: at 4x4 pixels or fewer, torch's convolution
takes up to three times as long, its gradient in bfloat16 up to twenty times; for larger maps it is faster
(docs/performance.md). Dropout with a mask that is drawn five times as fast. Freed memory that is kept.
"""
import ctypes
import platform

import torch
import torch.nn.functional as F
from torch import nn

from self_models.qcfs import blocks

LARGEST_MAP = 16  # pixels


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """The type that convolutions with a weight are computed in: autocast lowers it, of float32."""
    kind = weight.device.type
    autocast = torch.is_autocast_enabled(kind) and weight.dtype == torch.float32
    return torch.get_autocast_dtype(kind) if autocast else weight.dtype


def takes_patches(synapse: nn.Module | None, shape: tuple, device: torch.device) -> bool:
    """Whether a synapse is a convolution that keeps the size of its input, of the small shape (C, H, W)."""
    return (device.type == 'cpu' and isinstance(synapse, nn.Conv2d) and shape[1] * shape[2] <= LARGEST_MAP
            and set(synapse.stride) == {1}
            and all(size == 2 * p + 1 for size, p in zip(synapse.kernel_size, synapse.padding, strict=True)))


def patches(x: torch.Tensor, kernel_size: tuple) -> torch.Tensor:
    """(n, C, H, W) -> (n * H * W, k * m * C): the window of k x m pixels around each pixel, 0 beyond the edge."""
    (n, c, h, w), (k, m) = x.shape, kernel_size
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, m // 2, m // 2, k // 2, k // 2))  # (n, H + k - 1, W + m - 1, C)
    image, row, pixel, channel = padded.stride()
    windows = padded.as_strided((n, h, w, k, m, c), (image, row, pixel, row, pixel, channel))
    return windows.reshape(n * h * w, k * m * c)


def pixels(x: torch.Tensor) -> torch.Tensor:
    """(n, C, H, W) -> (n * H * W, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def maps(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(n * H * W, C) -> (n, C, H, W), n, H and W as `like` has them."""
    return x.view(len(like), *like.shape[2:], x.shape[1]).permute(0, 3, 1, 2)


def matrix(weight: torch.Tensor) -> torch.Tensor:
    """The weight (C', C, k, m) of a convolution -> that of patches, (C', k * m * C); no copy if channels-last."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(n, C, H, W) -> (n, C', H, W), as F.conv2d with the padding that keeps the size."""
    return maps(F.linear(patches(x, weight.shape[2:]), matrix(weight), bias), x)


def turn(weight: torch.Tensor) -> torch.Tensor:
    """The weight (C', C, k, m) with its kernels turned by 180 degrees, from outputs to inputs: (k * m * C', C)."""
    return weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 2)


def input_gradient(grad: torch.Tensor, turned: torch.Tensor, kernel_size: tuple) -> torch.Tensor:
    """The gradient (n, C, H, W) of x from that of convolve(x, weight), (n, C', H, W), and turn(weight)."""
    return maps(patches(grad, kernel_size) @ turned, grad)


def weight_gradient(x: torch.Tensor, grad: torch.Tensor, shape: tuple) -> torch.Tensor:
    """The gradient of the weight, of `shape` (C', C, k, m), from x (n, C, H, W) and that of convolve(x, weight)."""
    outputs, inputs, k, m = shape
    part = pixels(grad).t() @ patches(x, (k, m))  # (C', k * m * C)
    return part.view(outputs, k, m, inputs).permute(0, 3, 1, 2)


class Conv2d(nn.Conv2d):
    """nn.Conv2d; of a small map on a CPU as a product over patches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, C, H, W) -> (n, C', H', W')."""
        # the transforms of torch.func do not take the function below
        if torch._C._are_functorch_transforms_active() or not takes_patches(self, x.shape[1:], x.device):
            return super().forward(x)
        dtype = compute_dtype(self.weight)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return _Convolution.apply(x.to(dtype), self.weight.to(dtype), bias)


class _Convolution(torch.autograd.Function):
    """convolve() and its gradients; it keeps x, not the patches."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return convolve(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (input_gradient(grad, turn(weight), weight.shape[2:]) if wanted[0] else None,
                weight_gradient(x, grad, weight.shape) if wanted[1] else None,
                grad.sum((0, 2, 3)) if wanted[2] else None)


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU p is rounded to a multiple of 1 / 65536."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of any shape -> the same shape and type."""
        if torch._C._are_functorch_transforms_active():
            return super().forward(x)
        return x * dropout_factors(x, self.p) if self.training and self.p else x


@torch.no_grad()
def dropout_factors(like: torch.Tensor, p: float) -> torch.Tensor:
    """Factors of the shape, type and layout of `like`: 0 with probability p, else 1 / (1 - p)."""
    if like.is_cuda or not 0 < p < 1:
        return F.dropout(torch.ones_like(like), p)
    factors = torch.empty_like(like)
    # the generator takes the same time for 64 bits, which are enough for four values
    bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
    flat = factors.as_strided((like.numel(),), (1,))
    for out, drawn in blocks(flat, bits[:like.numel()]):
        # 2 ** 15 - 1 is the largest int16
        out.copy_(drawn >= min(round(p * 2 ** 16) - 2 ** 15, 2 ** 15 - 1)).mul_(1 / (1 - p))
    return factors


def keep_memory() -> None:
    """Make glibc keep freed memory for the next tensor; with other C libraries, do nothing.

    By default it returns tensors above 32 MB to the system, which must then clear each page of the next one: 100,000
    page faults in a training step of VGG5 with batch norm at B = 128, a fifth of its time.
    """
    if platform.libc_ver()[0] == 'glibc':
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # mallopt(3)
        for parameter, value in ((trim_threshold, -1), (top_pad, 64 << 20), (mmap_max, 0)):
            ctypes.CDLL(None).mallopt(parameter, value)
