"""What a layer sends to the next one over time: its spikes, or the image itself for direct input.

A feature map is stored channels-last and flat: (n, B, N) with N = H * W * C, n the steps.
"""
import dataclasses
import math

import torch
import torch.nn.functional as F


@dataclasses.dataclass
class SpikeTrain:
    """The spikes of a layer at steps start ... start + n - 1, with the dropout and the pools that follow it.

    spikes: (n, B, N) bool
    shape: (C, H, W) or (features,) of the layer; N is its product
    mask: (B, N) factors held over time, or None; pools: 2x2 average pools after it
    proxy: (n, B, N') with N' after the pools; holds no data (stride 0), stands for floats() in autograd; or None
    fault: () 0, or NaN if a potential of this layer or of one before it left the finite range
    """
    spikes: torch.Tensor
    shape: tuple
    start: int
    mask: torch.Tensor | None = None
    pools: int = 0
    proxy: torch.Tensor | None = None
    fault: torch.Tensor | float = 0.0

    constant = False  # it changes from step to step

    @property
    def pooled_shape(self) -> tuple:
        return (*self.shape[:1], *(size >> self.pools for size in self.shape[1:]))

    @property
    def steps(self) -> int:
        return len(self.spikes)

    @property
    def batch(self) -> int:
        return self.spikes.shape[1]

    def tensors(self) -> list:
        """The tensors kept for the backward pass; without() is the rest, with_tensors() joins both again."""
        return [self.spikes, self.mask]

    def without(self) -> 'SpikeTrain':
        return dataclasses.replace(self, spikes=None, mask=None, proxy=None)

    def with_tensors(self, spikes: torch.Tensor | None, mask: torch.Tensor | None) -> 'SpikeTrain':
        return dataclasses.replace(self, spikes=spikes, mask=mask)

    def floats(self, samples: slice, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """What the next layer is given: (m * b, C, H', W') or (m * b, features), for m rows and b samples."""
        # as bytes: a CPU reads them several times faster than bools
        x = self.spikes.view(torch.uint8)[rows, samples].to(dtype, memory_format=torch.contiguous_format)
        if self.mask is not None:
            x.mul_(self.mask[samples])
        return self.pool(unflatten(x, self.shape))

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.pools):
            x = F.avg_pool2d(x, 2)
        return x

    def total(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """floats() of all samples, summed over the steps of `rows`: (B, N').

        Of `dtype`, or of float32 if that is narrower: bfloat16 counts to 256 only, float16 to 2048.
        """
        dtype = at_least_float32(dtype)
        counts = torch.zeros(self.spikes.shape[1:], dtype=dtype, device=self.spikes.device)
        spikes = torch.empty_like(counts)
        for row in self.spikes.view(torch.uint8)[rows].unbind():
            counts += spikes.copy_(row)
        if self.mask is not None:
            counts *= self.mask
        return flatten(self.pool(unflatten(counts[None], self.shape)), 1)[0]

    def pull_back(self, grad: torch.Tensor, samples: slice, dtype: torch.dtype,
                  scale: float | torch.Tensor = 1.0) -> torch.Tensor:
        """The gradient of floats(), (n, b, N'), times scale, back through pools and mask: (n, b, N) of `dtype`."""
        steps, batch, _ = grad.shape
        # p pools average windows of 2^p x 2^p pixels: each pixel gets the window's gradient, divided by their number
        grad = torch.mul(grad.to(dtype), scale * 0.25 ** self.pools)
        if self.pools:
            (c, high, wide), (_, h, w), k = self.shape, self.pooled_shape, 2 ** self.pools
            grad = (grad.view(-1, h, 1, w, 1, c).expand(-1, -1, k, -1, k, -1)
                    .reshape(-1, k * h, k * w, c).contiguous())  # of one pixel reshape makes a view
            if (high, wide) != (k * h, k * w):  # a last row or column that belongs to no window
                grad = F.pad(grad, (0, 0, 0, wide - k * w, 0, high - k * h))
        grad = grad.view(steps, batch, -1)
        return grad if self.mask is None else grad.mul_(self.mask[samples])

    def part(self, samples: slice) -> 'SpikeTrain':
        """The train of a slice of the samples; of a train without proxy."""
        return dataclasses.replace(self, spikes=self.spikes[:, samples],
                                   mask=None if self.mask is None else self.mask[samples])


@dataclasses.dataclass
class DirectInput:
    """Direct input: the images themselves, (B, C, H, W), at each of `steps` steps. It has the methods of a SpikeTrain.

    The current that they cause is the same at all steps, so it is computed once, and so is its gradient.

    proxy: (1, B, N) the images themselves, if their gradient is wanted; or None
    """
    images: torch.Tensor
    shape: tuple
    steps: int
    proxy: torch.Tensor | None = None

    constant = True
    start, pools, mask, fault = 0, 0, None, 0.0

    @property
    def pooled_shape(self) -> tuple:
        return self.shape

    @property
    def batch(self) -> int:
        return len(self.images)

    def tensors(self) -> list:
        return [self.images, None]

    def without(self) -> 'DirectInput':
        return dataclasses.replace(self, images=None, proxy=None)

    def with_tensors(self, images: torch.Tensor, _: None) -> 'DirectInput':
        return dataclasses.replace(self, images=images)

    def floats(self, samples: slice, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """(b, C, H, W), of any step."""
        return self.images[samples].to(dtype, memory_format=torch.channels_last)

    def part(self, samples: slice) -> 'DirectInput':
        return dataclasses.replace(self, images=self.images[samples],
                                   proxy=None if self.proxy is None else self.proxy[:, samples])


def join(trains: list[SpikeTrain]) -> SpikeTrain:
    """One train of the samples of several, which are of the same layer."""
    if len(trains) == 1:
        return trains[0]
    proxies = [train.proxy for train in trains]
    return dataclasses.replace(
        trains[0], spikes=torch.cat([train.spikes for train in trains], 1),
        mask=None if trains[0].mask is None else torch.cat([train.mask for train in trains]),
        proxy=None if proxies[0] is None else _Joined.apply(*proxies), fault=sum(train.fault for train in trains))


class _Joined(torch.autograd.Function):
    """The proxy (n, B, N') of a train joined from others, whose proxies are (n, b, N')."""

    @staticmethod
    def forward(ctx, *proxies):
        ctx.sizes = [proxy.shape[1] for proxy in proxies]
        return proxies[0][:, :1].expand(-1, sum(ctx.sizes), -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad.split(ctx.sizes, 1)


class SpikeCounts(torch.autograd.Function):
    """Sum of what a train gives in its first `steps` steps, (B, N'), as a function of its proxy."""

    @staticmethod
    def forward(ctx, proxy: torch.Tensor, train: SpikeTrain, steps: int, dtype: torch.dtype) -> torch.Tensor:
        ctx.steps, ctx.after, ctx.dtype = steps, train.steps - steps, proxy.dtype
        return train.total(slice(0, steps), dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = grad.to(ctx.dtype).expand(ctx.steps, *grad.shape)  # one copy, not one a step
        return F.pad(grad, (0, 0, 0, 0, 0, ctx.after)) if ctx.after else grad, None, None, None


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type of sums over time, for weights of `dtype`: a narrower type loses small terms."""
    return torch.promote_types(dtype, torch.float32)


def unflatten(x: torch.Tensor, shape: tuple) -> torch.Tensor:
    """(m, b, N) stored channels-last -> (m * b, C, H, W) or (m * b, features)."""
    if len(shape) == 1:
        return x.flatten(0, 1)
    c, h, w = shape
    return x.view(-1, h, w, c).permute(0, 3, 1, 2)


def flatten(x: torch.Tensor, steps: int) -> torch.Tensor:
    """(m * b, C, H, W) or (m * b, features) -> (m, b, N); no copy if a feature map is channels-last already."""
    if x.dim() == 4:
        x = x.permute(0, 2, 3, 1)
    return x.reshape(steps, -1, math.prod(x.shape[1:]))
