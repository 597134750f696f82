"""Quantization-clip-floor-shift (QCFS): an activation whose steps are those of a spiking neuron's rate.

Bu et al., "Optimal ANN-SNN conversion for high-accuracy and ultra-low-latency spiking neural networks", ICLR 2022.
"""
import torch
from torch import nn

SMALLEST = 1e-4  # the least value of a learned bound, threshold or leak
BLOCK = 2 ** 17  # values that are processed together, so that they stay in a CPU's cache
LARGEST = 2 ** 30  # of them on a GPU, as torch.dot takes fewer than 2 ** 31


class QCFS(nn.Module):
    """y = theta floor(L clip(x / theta, 0, 1) + 1/2) / L, with one learned bound theta for the whole layer.

    levels: L, 1 or more. bound: theta at first, above 0. channels: a bound for each of so many channels, dimension 1 of
    the input; None for one bound. Raises ValueError for others. Gradients, straight through the floor:
    dy/dx = [0 < x < theta]; dy/dtheta = y / theta - x / theta inside, 1 from theta on, 0 below.
    """

    def __init__(self, levels: int = 8, bound: float = 2.0, channels: int | None = None):
        super().__init__()
        if levels < 1 or int(levels) != levels:
            raise ValueError(f'levels must be a whole number of 1 or more, not {levels}')
        if not 0 < bound < float('inf'):
            raise ValueError(f'a bound must be above 0, not {bound}')
        self.levels = int(levels)
        self.bound = nn.Parameter(torch.full(() if channels is None else (channels,), float(bound)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of any shape, with bounds for channels (B, C, ...) -> the same shape and type."""
        if not self.bound.dim():
            return _QCFS.apply(x, self.bound, self.levels)
        bound = self.bound.view(-1, *[1] * (x.dim() - 2))
        return (_QCFS.apply(x / bound, self.bound.new_ones(()), self.levels) * bound).to(x.dtype)

    @torch.no_grad()
    def constrain(self) -> None:
        """Keep the bound above 0; after each training step."""
        self.bound.clamp_(min=SMALLEST)

    def extra_repr(self):
        return f'levels={self.levels}'


@torch.no_grad()
def fit_bounds(ann: nn.Module, images: torch.Tensor) -> None:
    """Set the bounds of a network whose weights were trained with ReLU, before it is trained further with QCFS.

    images: (B, ...), some training images. Of 16 parts of the largest input of a layer, or of its channel, the one is
    taken with which QCFS is nearest to ReLU, in the mean of squares. Layers are set in the order of their calls; one
    that is called several times gets the largest bound. If none of its inputs is above 0, a bound stays as it is.
    """
    fitted = {}

    def set_bound(module, given):
        x = given[0].to(torch.promote_types(given[0].dtype, torch.float32))  # squares of 16 bits overflow
        others = [d for d in range(x.dim()) if d != 1 or not module.bound.dim()]
        largest, before, bounds, errors = x.amax(others), module.bound.clone(), [], []
        for part in range(1, 17):
            module.bound.copy_(largest * part / 16)
            module.constrain()
            bounds.append(module.bound.clone())
            errors.append((module.forward(x) - x.relu()).square().mean(others))
        best = torch.stack(errors).argmin(0, keepdim=True)
        bound = torch.where(largest > 0, torch.stack(bounds).gather(0, best)[0], 0)
        fitted[module] = torch.maximum(bound, fitted.get(module, bound))
        module.bound.copy_(torch.where(fitted[module] > 0, fitted[module], before))

    modes, hooks = [(module, module.training) for module in ann.modules()], []
    for module in ann.modules():
        if isinstance(module, QCFS):
            hooks.append(module.register_forward_pre_hook(set_bound))
    try:
        ann.eval()
        ann(images)
    finally:
        ann.train(modes[0][1])
        for module, mode in modes:  # some may be frozen
            module.training = mode
        for hook in hooks:
            hook.remove()


def blocks(*tensors):
    """The tensors, of one shape and layout, cut alike into flat pieces of BLOCK values; on a GPU of LARGEST."""
    flat = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]
    size = LARGEST if tensors[0].is_cuda else BLOCK
    return zip(*(tensor.split(size) for tensor in flat), strict=True)


class _QCFS(torch.autograd.Function):
    """It computes in float32 if x and y are narrower, so that the bound is the threshold after conversion."""

    @staticmethod
    def forward(ctx, x, bound, levels):
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()
        ctx.save_for_backward(x, bound)
        ctx.levels, ctx.dtype = levels, torch.promote_types(x.dtype, torch.float32)
        step = number(bound, ctx.dtype) / levels
        y = torch.empty_like(x)
        for values, out in blocks(x, y):
            torch.mul(quantize(values.to(ctx.dtype), step, levels), step, out=out)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, bound = ctx.saved_tensors
        theta = number(bound, ctx.dtype)
        step = theta / ctx.levels
        if grad.stride() != x.stride():
            grad = torch.empty_like(x).copy_(grad)
        grad_x, total = torch.empty_like(x), torch.zeros((), dtype=ctx.dtype, device=x.device)
        for values, given, out in blocks(x, grad, grad_x):
            values, given = values.to(ctx.dtype), given.to(ctx.dtype)
            inside = out if out.dtype == ctx.dtype else torch.empty_like(values)
            if x.is_cuda:
                torch.mul(given, (values > 0) & (values < theta), out=inside)
            else:  # the same in one pass
                torch.ops.aten.hardtanh_backward.grad_input(given, values, 0.0, theta, grad_input=inside)
            if inside is not out:
                out.copy_(inside)
            # theta dy/dtheta = y - x inside, y outside
            total += torch.dot(quantize(values, step, ctx.levels), given).mul_(step).sub_(torch.dot(inside, values))
        return grad_x, (total / theta).to(bound.dtype), None


def number(bound, dtype):
    """The bound as a number; on a GPU as a tensor () of dtype, so that the host need not wait."""
    return bound.detach().to(dtype) if bound.is_cuda else bound.item()


def quantize(x, step, levels):
    """floor(clip(x / step, 0, L) + 1/2), of the shape and type of x."""
    return torch.div(x, step).clamp_(0, levels).add_(0.5).floor_()
