"""An LIF layer with its synapses over all time steps, and its gradient.

A layer's spikes at all steps depend only on the layer before it, so it runs as one convolution over T * B images and a
scan over time. Samples go through in chunks, so that its forward makes no float tensor of T * B images but what
training keeps.

Spikes are bytes, but autograd needs floats. So spikes are outside of autograd, and the proxy of their train, a tensor
of the same shape without data, stands for them in its graph:

    spikes of layer k  --floats(), W s + b, scan over time-->  spikes of layer k + 1
    proxy of layer k   <------- _LIFLayer.backward ----------  proxy of layer k + 1

Training keeps one of these for each neuron and step of a layer (see what_to_keep):

    'spikes'      one byte, which gives STDB's gradient
    'factors'     of the surrogate
    'potentials'  which give the factors and the gradients of the threshold and the leak
"""
import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from self_models import cpu
from self_models.layers import Scale
from self_models.lif import (
    LIFParameters,
    lif_backward,
    lif_forward,
    parameter_gradients,
    surrogate_state,
)
from self_models.spike_train import DirectInput, SpikeTrain, at_least_float32, flatten, unflatten

CHUNK_BYTES = {'cpu': 16 << 20, 'cuda': 1 << 30}  # float working memory of a layer; on a CPU it should fit a cache


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
        """Whether it is a convolution that is computed as a matrix product (cpu.py)."""
        return cpu.takes_patches(self.synapse, self.train.pooled_shape, device)

    def patch_values(self) -> int:
        """How many values the patches of one image have, of input or gradient; 0 without patches."""
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
            return cpu.convolve(x, weight, bias)
        return F.conv2d(x, weight, bias=bias, stride=self.synapse.stride, padding=self.synapse.padding)

    def turned(self, weight: torch.Tensor | None) -> torch.Tensor | None:
        """A weight for input_gradient(); called once for all samples, as it may copy."""
        return cpu.turn(weight) if weight is not None and self.takes_patches(weight.device) else weight

    def input_gradient(self, grad: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """The gradient of x (m * b, C, H, W) or (m * b, features) from that of output(x, ...); weight: turned()."""
        if self.synapse is None:
            return grad
        if isinstance(self.synapse, Scale):
            return self.synapse(grad)
        if isinstance(self.synapse, nn.Linear):
            return (grad @ weight).view(-1, *self.train.pooled_shape)
        if self.takes_patches(grad.device):
            return cpu.input_gradient(grad, weight, self.synapse.kernel_size)
        shape = (len(grad), *self.train.pooled_shape)
        return nn.grad.conv2d_input(shape, weight, grad, stride=self.synapse.stride, padding=self.synapse.padding)

    def weight_gradient(self, x: torch.Tensor, grad: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
        """The gradient of the weight from x and that of output(x, weight), added to `total` unless that is None."""
        dtype = at_least_float32(self.weight.dtype)
        if self.takes_patches(x.device):
            part = cpu.weight_gradient(x, grad, self.weight.shape)
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

    weights: of the layer. The memory is at least twice theirs in dtype, else adding up their gradients takes the time.
    """
    memory = max(CHUNK_BYTES[weights[0].device.type], *(2 * weight.numel() * dtype.itemsize for weight in weights))
    size = max(1, memory // max(1, sample_bytes))
    return [slice(i, min(i + size, batch)) for i in range(0, batch, size)]


def prepare(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A weight or bias in the fastest form for convolutions: of `dtype`, channels-last. None stays None."""
    if tensor is None:
        return None
    tensor = tensor.detach().to(dtype)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def dtypes(weight: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(type of the potentials, type of the convolutions): autocast lowers the latter, of a float32 network."""
    return at_least_float32(weight.dtype), cpu.compute_dtype(weight)


def window(inputs: list[SynapticInput], parameters: LIFParameters) -> tuple[int, int]:
    """(start, steps): the steps at which a layer has all its inputs; before `start` it is at rest.

    A bias is an input at every step, and an initial potential leaks from the first step on.
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

    For direct input (1, b, N), the same at all steps. compute_dtype: of the convolutions, by autocast.
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


def prepared(inputs: list[SynapticInput]) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """(weights, biases) of the inputs, as prepare() gives them: as autocast has them, if it is on here."""
    compute_dtype = dtypes(next(each.weight for each in inputs if each.weight is not None))[1]
    return ([prepare(each.weight, compute_dtype) for each in inputs],
            [prepare(each.bias, compute_dtype) for each in inputs])


def currents(inputs: list[SynapticInput], window: tuple[int, int],
             ready: tuple[list, list]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (samples, their input_current()) for groups of samples that fit into the working memory.

    ready: prepared() of the inputs.
    """
    weights = [each.weight for each in inputs if each.weight is not None]
    dtype, compute_dtype = at_least_float32(weights[0].dtype), next(each.dtype for each in ready[0] if each is not None)
    for samples in chunks(inputs[0].train.batch, working_bytes(inputs, window[1], dtype), weights, dtype):
        yield samples, input_current(inputs, window, *ready, samples, dtype, compute_dtype)


def what_to_keep(inputs: list[SynapticInput], parameters: LIFParameters) -> str | None:
    """What the gradients need: 'spikes', 'factors' or 'potentials'; None without gradients."""
    given = [tensor for each in inputs for tensor in (each.weight, each.bias, each.train.proxy)]
    wanted = parameters.learned or any(tensor is not None and tensor.requires_grad for tensor in given)
    if not (torch.is_grad_enabled() and wanted):
        return None
    if parameters.learned:
        return 'potentials'
    return 'spikes' if parameters.surrogate.of_spikes else 'factors'


def lif_layer(inputs: list[SynapticInput], parameters: LIFParameters, dropout: nn.Dropout | None = None,
              pools: int = 0) -> SpikeTrain:
    """Run an LIF layer over time: the SpikeTrain that the inputs' summed currents cause, `delay` steps later.

    inputs: all of one output shape, those with a weight among them. dropout: its mask is drawn once for each sample and
    held over all steps. pools: 2x2 average pools behind. Differentiable in the inputs' weights, biases and trains, and
    in the threshold and the leak if these are tensors.
    """
    (start, steps), shape = window(inputs, parameters), inputs[0].output_shape()
    weight = next(each.weight for each in inputs if each.weight is not None)
    dtype, device, batch, size = dtypes(weight)[0], weight.device, inputs[0].train.batch, math.prod(shape)
    spikes = torch.empty(steps, batch, size, dtype=torch.bool, device=device)
    fault = sum(each.train.fault for each in inputs)
    keep, numbers = what_to_keep(inputs, parameters), parameters.detached()
    kept = torch.empty(spikes.shape, dtype=dtype, device=device) if keep in ('potentials', 'factors') else spikes
    ready = prepared(inputs)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for samples, current in currents(inputs, (start, steps), ready):
            current = current.flatten(1)
            once = len(current) < steps  # the same at all steps; else the potentials may take its place
            potentials = None if once else current
            if keep == 'potentials':
                potentials = kept[:, samples].flatten(1)
            elif keep == 'factors' and once:
                potentials = current.new_empty(steps, current.shape[1])
            u, _ = lif_forward(current[0] if once else current, spikes[:, samples].flatten(1), numbers,
                               potentials=potentials)
            # a potential that is not finite stays so, so the last ones tell; spikes do not, as NaN exceeds no threshold
            fault = fault + sum(0 * end for end in torch.aminmax(u))
            if keep == 'factors':
                kept[:, samples] = surrogate_state(potentials, numbers).view(kept[:, samples].shape)
        mask = None
        if dropout is not None and dropout.training and dropout.p > 0:
            mask = cpu.dropout_factors(torch.empty(batch, size, dtype=dtype, device=device), dropout.p)
    train = SpikeTrain(spikes, shape, start + parameters.delay, mask=mask, pools=pools, fault=fault)
    if keep:
        given = [tensor for each in inputs for tensor in (each.train.proxy, each.weight, each.bias)]
        learned = [value if isinstance(value, torch.Tensor) else None for value in parameters[:2]]
        train.proxy = _LIFLayer.apply(train, kept, inputs, numbers, ready[0], *learned, *given)
    return train


class _InputGradients:
    """The gradients of one input, (proxy, weight, bias), each None unless wanted, added up over chunks of samples.

    weight: as prepare() gives it. grad: of the layer's train. window: of the layer.
    """

    def __init__(self, given: SynapticInput, weight: torch.Tensor | None, wanted: tuple[bool, bool, bool],
                 grad: torch.Tensor, window: tuple[int, int]):
        self.given, self.wanted, train = given, wanted, given.train
        self.delay = train.start - window[0]
        self.rows = 1 if train.constant else max(0, window[1] - self.delay)  # of its steps, those in the window
        self.proxy = self.weight = self.bias = None
        if wanted[0]:
            self.turned = given.turned(weight)
            steps = 1 if train.constant else train.steps
            self.proxy = grad.new_empty(steps, train.batch, math.prod(train.pooled_shape))
            self.proxy[self.rows:] = 0  # spikes after the window have no effect

    def add(self, g: torch.Tensor, lowered: torch.Tensor, samples: slice, shape: tuple) -> None:
        """g: the gradient (n, b, N) of the layer's current over the window; lowered: the same as autocast has it."""
        if self.wanted[2]:
            part = g.reshape(-1, shape[0]).sum(0)
            self.bias = part if self.bias is None else self.bias + part
        if not self.rows:
            return
        train = self.given.train
        out = g.sum(0, keepdim=True).to(lowered.dtype) if train.constant else lowered[self.delay:]
        out = unflatten(out, shape)
        if self.wanted[1]:
            x = train.floats(samples, slice(0, self.rows), lowered.dtype)
            self.weight = self.given.weight_gradient(x, out, self.weight)
        if self.wanted[0]:
            self.proxy[:self.rows, samples] = flatten(self.given.input_gradient(out, self.turned), self.rows)


class _LIFLayer(torch.autograd.Function):
    """The gradient of lif_layer. Forward gives the proxy of its train; the spikes themselves are there already."""

    LEARNED, GIVEN = slice(5, 7), slice(7, None)  # of forward's arguments: threshold and leak; the inputs' tensors

    @staticmethod
    def forward(ctx, train, kept, inputs, parameters, ready, threshold, leak, *given):
        # ready: the weights of the inputs as prepare() gives them; what autocast lowers is not lowered again
        weight = next(weight for weight in given[1::3] if weight is not None)
        ctx.save_for_backward(kept, train.mask, *(tensor for each in inputs for tensor in each.train.tensors()),
                              *ready)
        # without their tensors, which are saved above, so that all are freed after the backward pass
        ctx.train, ctx.inputs = train.without(), [SynapticInput(each.train.without(), each.synapse) for each in inputs]
        ctx.parameters, ctx.dtype = parameters, dtypes(weight)[0]
        size = math.prod(train.pooled_shape)
        compute_dtype = next(weight for weight in ready if weight is not None).dtype
        return weight.new_zeros(1, dtype=compute_dtype).expand(train.steps, train.batch, size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        parameters, dtype = ctx.parameters, ctx.dtype
        kept, mask, *saved = ctx.saved_tensors
        train = ctx.train.with_tensors(None, mask)
        inputs = [SynapticInput(each.train.with_tensors(*saved[2 * i:2 * i + 2]), each.synapse)
                  for i, each in enumerate(ctx.inputs)]
        ready = saved[2 * len(inputs):]
        weights = [weight for weight in ready if weight is not None]
        span, given = window(inputs, parameters), ctx.needs_input_grad[_LIFLayer.GIVEN]
        of_inputs = [_InputGradients(each, weight, wanted, grad, span) for each, weight, wanted in zip(
            inputs, ready, zip(given[::3], given[1::3], given[2::3], strict=True), strict=True)]
        learned, own = any(ctx.needs_input_grad[_LIFLayer.LEARNED]), [0, 0]
        for samples in chunks(grad.shape[1], working_bytes(inputs, span[1], dtype), weights, dtype):
            g = train.pull_back(grad[:, samples], samples, dtype, parameters.height)
            state = kept[:, samples].flatten(1)
            lif_backward(g.flatten(1), surrogate_state(state, parameters) if learned else state, train.start,
                         parameters)
            if learned:
                own = [a + b for a, b in zip(own, parameter_gradients(g.flatten(1), state, parameters), strict=True)]
            lowered = g.to(weights[0].dtype)
            for each in of_inputs:
                each.add(g, lowered, samples, train.shape)
        own = [value if wanted else None
               for value, wanted in zip(own, ctx.needs_input_grad[_LIFLayer.LEARNED], strict=True)]
        return (*[None] * 5, *own,
                *(value for each in of_inputs for value in (each.proxy, each.weight, each.bias)))
