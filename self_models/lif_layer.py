"""An LIF layer with its synapses over all time steps, and its gradient.

Layer by layer: a layer's spikes at all steps depend only on the layer before it, so it runs as one convolution over
T * B images and a scan over time. Samples go through in chunks, so that no float tensor of T * B images is ever held;
what training keeps of a layer is its spikes, one byte for each neuron and step, from which STDB's gradient follows.
For other surrogates it also keeps the factor, for gradients of the threshold and the leak the potentials.
"""
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

from self_models import patches
from self_models.dropout import dropout_factors
from self_models.layers import Scale
from self_models.lif import (
    LIFParameters,
    lif_backward,
    lif_forward,
    parameter_gradients,
    surrogate_state,
)
from self_models.spike_train import DirectInput, SpikeTrain, at_least_float32, flatten, unflatten

CHUNK_BYTES = {'cpu': 16 << 20, 'cuda': 1 << 30}  # float working memory of a layer; on a CPU it should stay in cache


@dataclasses.dataclass
class SynapticInput:
    """One of the inputs that an LIF layer adds up: a spike train through a synapse.

    synapse: nn.Conv2d or nn.Linear, with a bias or without, layers.Scale, or None: the identity.
    """
    train: SpikeTrain | DirectInput
    synapse: nn.Module | None = None

    @property
    def weight(self) -> torch.Tensor | None:
        return getattr(self.synapse, 'weight', None)

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.synapse, 'bias', None)

    def output_shape(self) -> tuple:
        """(C, H, W) or (features,)."""
        shape = self.train.pooled_shape
        if isinstance(self.synapse, nn.Linear):
            return (self.synapse.out_features,)
        if not isinstance(self.synapse, nn.Conv2d):
            return shape
        sizes = zip(shape[1:], self.synapse.padding, self.synapse.kernel_size, self.synapse.stride, strict=True)
        return (self.synapse.out_channels, *((size + 2 * p - k) // s + 1 for size, p, k, s in sizes))

    def takes_patches(self, device: torch.device) -> bool:
        """Whether it is a convolution that is computed as a matrix product, see patches.py."""
        return patches.takes_patches(self.synapse, self.train.pooled_shape, device)

    def patch_values(self) -> int:
        """How many values the patches of one image are, of input or gradient; 0 where none are taken."""
        if not self.takes_patches(self.train.tensors()[0].device):
            return 0
        channels = max(self.synapse.in_channels, self.synapse.out_channels)
        return channels * math.prod((*self.train.pooled_shape[1:], *self.synapse.kernel_size))

    def output(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None = None) -> torch.Tensor:
        """W s + b of spikes (m * b, ...)."""
        if self.synapse is None:
            return x
        if isinstance(self.synapse, Scale):
            return self.synapse(x)
        if isinstance(self.synapse, nn.Linear):
            return F.linear(x.flatten(1), weight, bias)
        if self.takes_patches(x.device):
            return patches.convolve(x, weight, bias)
        return F.conv2d(x, weight, bias=bias, stride=self.synapse.stride, padding=self.synapse.padding)

    def turned(self, weight: torch.Tensor | None) -> torch.Tensor | None:
        """A weight as input_gradient() takes it; to be called once for all samples, as it may copy."""
        return patches.turn(weight) if weight is not None and self.takes_patches(weight.device) else weight

    def input_gradient(self, grad: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """The gradient of x (m * b, C, H, W) or (m * b, features) from that of output(x, ...); weight: turned()."""
        if self.synapse is None:
            return grad
        if isinstance(self.synapse, Scale):
            return self.synapse(grad)
        if isinstance(self.synapse, nn.Linear):
            return (grad @ weight).view(-1, *self.train.pooled_shape)
        if self.takes_patches(grad.device):
            return patches.input_gradient(grad, weight, self.synapse.kernel_size)
        shape = (len(grad), *self.train.pooled_shape)
        return nn.grad.conv2d_input(shape, weight, grad, stride=self.synapse.stride, padding=self.synapse.padding)

    def weight_gradient(self, x: torch.Tensor, grad: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
        """The gradient of the weight from x and that of output(x, weight), added to `total` unless that is None."""
        dtype = at_least_float32(self.weight.dtype)
        if self.takes_patches(x.device):
            part = patches.weight_gradient(x, grad, self.weight.shape)
        elif isinstance(self.synapse, nn.Linear):
            x = x.flatten(1)
            if total is not None and grad.dtype == dtype:
                return total.addmm_(grad.t(), x)  # a classifier's weights are large: no second copy
            part = grad.t() @ x
        else:
            part = nn.grad.conv2d_weight(x, self.weight.shape, grad, stride=self.synapse.stride,
                                         padding=self.synapse.padding)
        return part.to(dtype) if total is None else total.add_(part)


def chunks(batch: int, sample_bytes: int, weights: list[torch.Tensor], dtype: torch.dtype) -> list[slice]:
    """Slices over `batch` samples, each of as many as fit into the working memory, at least one.

    weights: of the layer. Its memory is at least twice what they take in dtype, or the time would go into adding up
    their gradients.
    """
    memory = max(CHUNK_BYTES[weights[0].device.type], *(2 * weight.numel() * dtype.itemsize for weight in weights))
    size = max(1, memory // max(1, sample_bytes))
    return [slice(i, min(i + size, batch)) for i in range(0, batch, size)]


def prepare(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A weight or bias as convolutions like it best: of `dtype`, channels-last. None stays None."""
    if tensor is None:
        return None
    tensor = tensor.detach().to(dtype)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def dtypes(weight: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(type of the potentials, type of the convolutions): autocast lowers the latter, of a float32 network."""
    return at_least_float32(weight.dtype), patches.compute_dtype(weight)


def window(inputs: list[SynapticInput], parameters: LIFParameters) -> tuple[int, int]:
    """(start, steps): the steps at which a layer has all its input; before `start` nothing happens in it.

    A bias is an input at every step, and an initial potential leaks from the first one on.
    """
    from_start = parameters.initial_potential or any(each.bias is not None for each in inputs)
    start = 0 if from_start else min(each.train.start for each in inputs)
    return start, min(each.train.start + each.train.steps for each in inputs) - start


def working_bytes(inputs: list[SynapticInput], steps: int, dtype: torch.dtype) -> int:
    """Float memory of one sample on its way through a layer, at all steps: its spikes, their patches, its currents."""
    values = math.prod(inputs[0].output_shape()) + max(math.prod(each.train.shape) for each in inputs)
    values += max(each.patch_values() for each in inputs)
    return steps * values * dtype.itemsize


def input_current(inputs: list[SynapticInput], window: tuple[int, int], weights: list[torch.Tensor | None],
                  biases: list[torch.Tensor | None], samples: slice, dtype: torch.dtype,
                  compute_dtype: torch.dtype) -> torch.Tensor:
    """The input current W s + b of an LIF layer over its window, for a slice of samples: (n, b, N) of `dtype`.

    Of direct input (1, b, N), the same at all steps. compute_dtype: of the convolutions, as autocast wants it.
    """
    (start, steps), total = window, None
    for each, weight, bias in zip(inputs, weights, biases, strict=True):
        delay = each.train.start - start
        rows = 1 if each.train.constant else max(0, steps - delay)
        if rows:
            x = each.train.floats(samples, slice(0, rows), compute_dtype)
            current = flatten(each.output(x, weight, bias), rows).to(dtype)
        if total is None and delay == 0:
            total = current
            continue
        if total is None:
            size, device = math.prod(each.output_shape()), each.train.tensors()[0].device
            total = torch.zeros(steps, samples.stop - samples.start, size, dtype=dtype, device=device)
        if rows:
            total[delay:] += current
        if bias is not None:  # before the first spike comes
            total[:delay].unflatten(-1, (-1, len(bias))).add_(bias)
    return total


def lif_layer(inputs: list[SynapticInput], parameters: LIFParameters, dropout: nn.Dropout | None = None,
              pools: int = 0) -> SpikeTrain:
    """Run an LIF layer over time: the SpikeTrain that the inputs' summed currents cause, `delay` steps later.

    inputs: all of one output shape, those with a weight among them. dropout: its mask is drawn once for each sample and
    held over all steps. pools: 2x2 average pools behind. Differentiable in the inputs' weights, biases and trains, and
    in the threshold and the leak where those are tensors.
    """
    (start, steps), shape = window(inputs, parameters), inputs[0].output_shape()
    weights = [each.weight for each in inputs if each.weight is not None]
    dtype, compute_dtype, device = *dtypes(weights[0]), weights[0].device
    batch, size = inputs[0].train.batch, math.prod(shape)
    spikes = torch.empty(steps, batch, size, dtype=torch.bool, device=device)
    fault = sum(each.train.fault for each in inputs)
    learns = torch.is_grad_enabled() and (parameters.learned or any(
        tensor is not None and tensor.requires_grad
        for each in inputs for tensor in (each.weight, each.bias, each.train.proxy)))
    learned = learns and parameters.learned  # then the potentials are kept; factored: else the surrogate's factors
    factored = learns and not learned and not parameters.surrogate.of_spikes
    kept = torch.empty(spikes.shape, dtype=dtype, device=device) if learned or factored else spikes
    numbers = parameters.detached()
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        ready = [[prepare(getattr(each, kind), compute_dtype) for each in inputs] for kind in ('weight', 'bias')]
        for samples in chunks(batch, working_bytes(inputs, steps, dtype), weights, dtype):
            current = input_current(inputs, (start, steps), *ready, samples, dtype, compute_dtype).flatten(1)
            potentials = current if len(current) == steps else None
            if learned:
                potentials = kept[:, samples].flatten(1)
            elif factored and potentials is None:
                potentials = current.new_empty(steps, current.shape[1])
            u, _ = lif_forward(current if len(current) == steps else current[0], spikes[:, samples].flatten(1), numbers,
                               potentials=potentials)
            # A potential that is not finite stays so: the last ones tell. Spikes do not, as NaN exceeds no threshold.
            fault = fault + sum(0 * end for end in torch.aminmax(u))
            if factored:
                kept[:, samples] = surrogate_state(potentials, numbers).view(kept[:, samples].shape)
        mask = None
        if dropout is not None and dropout.training and dropout.p > 0:
            mask = dropout_factors(torch.empty(batch, size, dtype=dtype, device=device), dropout.p)
    train = SpikeTrain(spikes, shape, start + parameters.delay, mask=mask, pools=pools, fault=fault)
    if learns:
        given = [tensor for each in inputs for tensor in (each.train.proxy, each.weight, each.bias)]
        values = [value if isinstance(value, torch.Tensor) else None for value in parameters[:2]]
        train.proxy = _LIFLayer.apply(train, kept, inputs, numbers, ready[0], *values, *given)
    return train


class _LIFLayer(torch.autograd.Function):
    """The gradient of lif_layer. Forward gives the proxy of its train; the spikes themselves are there already."""

    FIRST = 7  # of forward's arguments, the first input's proxy

    @staticmethod
    def forward(ctx, train, kept, inputs, parameters, ready, threshold, leak, *given):
        # ready: the weights of the inputs as prepare() gives them; what autocast lowers is not lowered again
        weight = next(weight for weight in given[1::3] if weight is not None)
        ctx.save_for_backward(kept, train.mask, *(tensor for each in inputs for tensor in each.train.tensors()),
                              *ready)
        # without their tensors, so that those are freed with the saved ones, after the backward pass
        ctx.train, ctx.inputs = train.without(), [SynapticInput(each.train.without(), each.synapse) for each in inputs]
        ctx.parameters, ctx.dtype = parameters, dtypes(weight)[0]
        size = math.prod(train.pooled_shape)
        compute_dtype = next(weight for weight in ready if weight is not None).dtype
        return weight.new_zeros(1, dtype=compute_dtype).expand(train.steps, train.batch, size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        parameters, dtype, count = ctx.parameters, ctx.dtype, len(ctx.inputs)
        kept, mask, *saved = ctx.saved_tensors
        train = ctx.train.with_tensors(None, mask)
        inputs = [SynapticInput(each.train.with_tensors(*saved[2 * i:2 * i + 2]), each.synapse)
                  for i, each in enumerate(ctx.inputs)]
        ready = saved[2 * count:]
        known = [weight for weight in ready if weight is not None]
        compute_dtype = known[0].dtype
        (start, steps), given = window(inputs, parameters), ctx.needs_input_grad[_LIFLayer.FIRST:]
        wanted = list(zip(given[::3], given[1::3], given[2::3], strict=True))
        learned = any(ctx.needs_input_grad[_LIFLayer.FIRST - 2:_LIFLayer.FIRST])
        turned = [each.turned(weight) if wanted[i][0] else None
                  for i, (each, weight) in enumerate(zip(inputs, ready, strict=True))]
        proxy_grads, weight_grads, bias_grads = [None] * count, [None] * count, [None] * count
        own_grads = [None, None]
        for i, each in enumerate(inputs):
            if wanted[i][0]:
                rows = 1 if each.train.constant else each.train.steps
                proxy_grads[i] = grad.new_empty(rows, each.train.batch, math.prod(each.train.pooled_shape))
                # spikes after the window reach nothing
                proxy_grads[i][max(0, steps - (each.train.start - start)):] = 0
        for samples in chunks(grad.shape[1], working_bytes(inputs, steps, dtype), known, dtype):
            g = train.pull_back(grad[:, samples], samples, dtype, parameters.height)
            state = kept[:, samples].flatten(1)
            factors = surrogate_state(state, parameters) if learned else state
            lif_backward(g.flatten(1), factors, train.start, parameters)
            if learned:
                parts = parameter_gradients(g.flatten(1), state, parameters)
                own_grads = [part if total is None else total + part for part, total in zip(parts, own_grads)]
            for i in range(count):
                if wanted[i][2]:
                    part = g.reshape(-1, train.shape[0]).sum(0)
                    bias_grads[i] = part if bias_grads[i] is None else bias_grads[i] + part
            once = g.sum(0, keepdim=True).to(compute_dtype) if inputs[0].train.constant else None
            g = g.to(compute_dtype)
            for i, (each, weight) in enumerate(zip(inputs, turned, strict=True)):
                delay = each.train.start - start
                rows = slice(0, 1 if each.train.constant else max(0, steps - delay))
                if not rows.stop:
                    continue
                out = unflatten(g[delay:] if once is None else once, train.shape)
                if wanted[i][1]:
                    x = each.train.floats(samples, rows, compute_dtype)
                    weight_grads[i] = each.weight_gradient(x, out, weight_grads[i])
                if wanted[i][0]:
                    proxy_grads[i][rows, samples] = flatten(each.input_gradient(out, weight), rows.stop)
        own_grads = [part if wants else None
                     for part, wants in zip(own_grads, ctx.needs_input_grad[_LIFLayer.FIRST - 2:], strict=False)]
        return (None, None, None, None, None, *own_grads,
                *(part for parts in zip(proxy_grads, weight_grads, bias_grads, strict=True) for part in parts))
