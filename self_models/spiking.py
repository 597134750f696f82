"""Spike trains, the LIF layer over time, and what the spiking VGG and ResNet have in common.

Layer by layer: a layer's spikes at all steps depend only on the layer before it, so it runs as one convolution over
T * B images and a scan over time. Samples go through in chunks, so that no float tensor of T * B images is ever held;
what training keeps of a layer is its spikes, one byte for each neuron and step (see neuron.py).

Inside, a feature map is stored channels-last and flat: (n, B, N) with N = H * W * C, n the steps.
"""
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

from self_models import neuron as lif
from self_models.layers import initialize
from self_models.neuron import PoissonGenerator

CHUNK_BYTES = {'cpu': 16 << 20, 'cuda': 1 << 30}  # float working memory of a layer; on a CPU it should stay in cache
GROUP_BYTES = {'cpu': 64 << 20, 'cuda': 4 << 30}  # of the gradients between two convolutions, in the backward pass


@dataclasses.dataclass
class SpikeTrain:
    """The spikes of a layer at steps start ... start + n - 1, with the dropout and the pools that follow it.

    fired: (n, B, N) bool
    shape: (C, H, W) or (features,) of the layer; N is its product
    mask: (B, N) factors held over time, or None; pools: 2x2 average pools after it
    link: (n, B, N') with N' after the pools; holds no data (stride 0), carries the gradient of floats(); or None
    fault: () 0, or NaN where a potential of this layer or of one before it left the finite range
    """
    fired: torch.Tensor
    shape: tuple
    start: int
    mask: torch.Tensor = None
    pools: int = 0
    link: torch.Tensor = None
    fault: torch.Tensor | float = 0.0

    @property
    def pooled_shape(self):
        return (*self.shape[:1], *(size >> self.pools for size in self.shape[1:]))

    @property
    def steps(self):
        return len(self.fired)

    def floats(self, samples, rows, dtype):
        """What the next layer is given: (m * b, C, H', W') or (m * b, features), for m rows and b samples."""
        # as bytes, which a CPU reads several times faster than bools
        x = self.fired.view(torch.uint8)[rows, samples].to(dtype, memory_format=torch.contiguous_format)
        if self.mask is not None:
            x.mul_(self.mask[samples])
        return self.pool(unflatten(x, self.shape))

    def pool(self, x):
        for _ in range(self.pools):
            x = F.avg_pool2d(x, 2)
        return x

    def total(self, rows, dtype):
        """floats() of all samples, summed over the steps of `rows`, a slice: (B, N')."""
        counts = torch.zeros(self.fired.shape[1:], dtype=dtype, device=self.fired.device)
        spikes = torch.empty_like(counts)
        for row in self.fired.view(torch.uint8)[rows].unbind():
            counts += spikes.copy_(row)
        if self.mask is not None:
            counts *= self.mask
        return flatten(self.pool(unflatten(counts[None], self.shape)), 1)[0]

    def pull_back(self, grad, samples, dtype, scale=1.0):
        """The gradient of floats(), (n, b, N'), times scale, back through pools and mask: (n, b, N) of `dtype`."""
        steps, batch, _ = grad.shape
        # each pixel of a 2x2 window gets a quarter
        grad = torch.mul(grad.to(dtype), scale * 0.25 ** self.pools)
        for pool in range(self.pools, 0, -1):
            (h, w), (high, wide) = ([size >> p for size in self.shape[1:]] for p in (pool, pool - 1))
            grad = (grad.view(-1, h, 1, w, 1, self.shape[0]).expand(-1, -1, 2, -1, 2, -1)
                    .reshape(-1, 2 * h, 2 * w, self.shape[0]).contiguous())  # of one pixel reshape makes a view
            if (high, wide) != (2 * h, 2 * w):  # an odd last row or column belongs to no window
                grad = F.pad(grad, (0, 0, 0, wide - 2 * w, 0, high - 2 * h))
        grad = grad.view(steps, batch, -1)
        return grad if self.mask is None else grad.mul_(self.mask[samples])

    def part(self, samples):
        """The train of a slice of the samples; of a train without link."""
        return dataclasses.replace(self, fired=self.fired[:, samples],
                                   mask=None if self.mask is None else self.mask[samples])


def join(trains):
    """One train of the samples of several, which are of the same layer."""
    if len(trains) == 1:
        return trains[0]
    links = [train.link for train in trains]
    return dataclasses.replace(
        trains[0], fired=torch.cat([train.fired for train in trains], 1),
        mask=None if trains[0].mask is None else torch.cat([train.mask for train in trains]),
        link=None if links[0] is None else _Joined.apply(*links), fault=sum(train.fault for train in trains))


class _Joined(torch.autograd.Function):
    """The link (n, B, N') of a train joined from others, whose links are (n, b, N')."""

    @staticmethod
    def forward(ctx, *links):
        ctx.sizes = [link.shape[1] for link in links]
        return links[0][:, :1].expand(-1, sum(ctx.sizes), -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad.split(ctx.sizes, 1)


def unflatten(x, shape):
    """(m, b, N) stored channels-last -> (m * b, C, H, W) or (m * b, features)."""
    if len(shape) == 1:
        return x.flatten(0, 1)
    c, h, w = shape
    return x.view(-1, h, w, c).permute(0, 3, 1, 2)


def flatten(x, steps):
    """(m * b, C, H, W) or (m * b, features) -> (m, b, N); no copy where a feature map is channels-last already."""
    if x.dim() == 4:
        x = x.permute(0, 2, 3, 1)
    return x.reshape(steps, -1, math.prod(x.shape[1:]))


def chunks(batch, sample_bytes, weights):
    """Slices over `batch` samples, each of as many as fit into the working memory, at least one.

    weights: of the layer. Its memory is at least twice theirs, or the time would go into adding up their gradients.
    """
    known = [weight for weight in weights if weight is not None]
    memory = max(CHUNK_BYTES[known[0].device.type], *(2 * weight.nbytes for weight in known))
    size = max(1, memory // max(1, sample_bytes))
    return [slice(i, min(i + size, batch)) for i in range(0, batch, size)]


@dataclasses.dataclass
class Branch:
    """One of the inputs that an LIF layer adds up: a spike train through a synapse (Conv2d, Linear, None: identity)."""
    train: SpikeTrain
    synapse: nn.Module = None

    def output_shape(self):
        shape = self.train.pooled_shape
        if self.synapse is None:
            return shape
        if isinstance(self.synapse, nn.Linear):
            return (self.synapse.out_features,)
        sizes = zip(shape[1:], self.synapse.padding, self.synapse.kernel_size, self.synapse.stride, strict=True)
        return (self.synapse.out_channels, *((size + 2 * p - k) // s + 1 for size, p, k, s in sizes))

    @property
    def weight(self):
        return None if self.synapse is None else self.synapse.weight

    def output(self, x, weight):
        """W s of spikes (m * b, ...)."""
        if self.synapse is None:
            return x
        if isinstance(self.synapse, nn.Linear):
            return F.linear(x.flatten(1), weight)
        return F.conv2d(x, weight, stride=self.synapse.stride, padding=self.synapse.padding)

    def input_gradient(self, grad, weight):
        """The gradient of x (m * b, C, H, W) or (m * b, features) from that of output(x, weight)."""
        if self.synapse is None:
            return grad
        if isinstance(self.synapse, nn.Linear):
            return (grad @ weight).view(-1, *self.train.pooled_shape)
        shape = (len(grad), *self.train.pooled_shape)
        return nn.grad.conv2d_input(shape, weight, grad, stride=self.synapse.stride, padding=self.synapse.padding)

    def weight_gradient(self, x, grad, total):
        """The gradient of the weight from x and that of output(x, weight), added to `total` unless that is None."""
        dtype = self.synapse.weight.dtype
        if isinstance(self.synapse, nn.Linear):
            x = x.flatten(1)
            if total is not None and grad.dtype == dtype:
                return total.addmm_(grad.t(), x)  # a classifier's weights are large: no second copy
            part = grad.t() @ x
        else:
            part = nn.grad.conv2d_weight(x, self.synapse.weight.shape, grad, stride=self.synapse.stride,
                                         padding=self.synapse.padding)
        return part.to(dtype) if total is None else total.add_(part)


def prepare(weight, dtype):
    """A weight as convolutions like it best: of `dtype`, channels-last. None stays None."""
    if weight is None:
        return None
    weight = weight.detach().to(dtype)
    return weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight


def window(branches):
    """(start, steps): the steps at which a layer has all its input; before `start` it has none."""
    start = min(branch.train.start for branch in branches)
    return start, min(branch.train.start + branch.train.steps for branch in branches) - start


def currents(branches, weights, samples, dtype, compute_dtype):
    """The input current W s of an LIF layer over its window: (n, b, N) of `dtype`, for a slice of samples.

    The first branch must start with the window. compute_dtype: of the convolutions, as autocast wants it.
    """
    start, steps = window(branches)
    total = None
    for branch, weight in zip(branches, weights, strict=True):
        delay = branch.train.start - start
        if delay >= steps:  # its first spike comes too late for this window
            continue
        x = branch.train.floats(samples, slice(0, steps - delay), compute_dtype)
        current = flatten(branch.output(x, weight), steps - delay).to(dtype)
        if total is None:
            total = current
        else:
            total[delay:] += current
    return total


def lif_layer(branches, neuron, dropout=None, pools=0):
    """Run an LIF layer over time: the SpikeTrain that the branches' summed currents cause, one step later.

    branches: [Branch, ...], all of one output shape. neuron: neuron.Neuron. dropout: an nn.Dropout, whose mask is
    drawn once for each sample and held over all steps. Differentiable in the branches' weights and trains.
    """
    start, steps = window(branches)
    source, shape = branches[0].train, branches[0].output_shape()
    weights = [branch.weight for branch in branches if branch.weight is not None]
    dtype, compute_dtype, device = *dtypes(weights[0]), weights[0].device
    batch, size = source.fired.shape[1], math.prod(shape)
    fired = torch.empty(steps, batch, size, dtype=torch.bool, device=device)
    fault = sum(branch.train.fault for branch in branches)
    learns = torch.is_grad_enabled() and (
        any(w.requires_grad for w in weights) or any(b.train.link is not None for b in branches))
    # LinearSpike's gradient needs the potentials; STDB's follows from the spikes
    factor = torch.empty(fired.shape, dtype=dtype, device=device) if learns and neuron.activation == 'Linear' else None
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        prepared = [prepare(branch.weight, compute_dtype) for branch in branches]
        for samples in chunks(batch, working_bytes(branches, dtype), weights):
            current = currents(branches, prepared, samples, dtype, compute_dtype).flatten(1)
            u, _ = lif.integrate(current, fired[:, samples].flatten(1), neuron)
            # A potential that is not finite stays so: the last ones tell. Spikes do not, as NaN exceeds no threshold.
            fault = fault + sum(0 * end for end in torch.aminmax(u))
            if factor is not None:
                factor[:, samples] = lif.linear_factor(current, neuron.threshold).view(factor[:, samples].shape)
        mask = None
        if dropout is not None and dropout.training and dropout.p > 0:
            mask = F.dropout(torch.ones(batch, size, dtype=dtype, device=device), dropout.p)
    train = SpikeTrain(fired, shape, start + 1, mask=mask, pools=pools, fault=fault)
    if learns:
        inputs = [t for b in branches for t in (b.train.link, b.weight)]
        train.link = _LIFLayer.apply(train, factor, branches, neuron, compute_dtype, *inputs)
    return train


def dtypes(weight):
    """(type of the potentials, type of the convolutions): autocast lowers the latter, of a float32 network."""
    kind = weight.device.type
    lowered = torch.is_autocast_enabled(kind) and weight.dtype == torch.float32
    return weight.dtype, torch.get_autocast_dtype(kind) if lowered else weight.dtype


def working_bytes(branches, dtype):
    """Float memory of one sample on its way through a layer: its spikes and its currents at all steps."""
    values = math.prod(branches[0].output_shape()) + max(math.prod(branch.train.shape) for branch in branches)
    return window(branches)[1] * values * dtype.itemsize


class _LIFLayer(torch.autograd.Function):
    """The gradient of lif_layer. Forward gives the link of its train; the spikes themselves are there already."""

    @staticmethod
    def forward(ctx, train, factor, branches, neuron, compute_dtype, *inputs):
        tensors = [train.fired if factor is None else factor, train.mask]
        for branch in branches:
            tensors += [branch.train.fired, branch.train.mask]
        ctx.save_for_backward(*tensors, *inputs[1::2])
        # without their tensors, so that those are freed with the saved ones, after the backward pass
        ctx.train, *trains = (dataclasses.replace(t, fired=None, mask=None, link=None)
                              for t in (train, *(branch.train for branch in branches)))
        ctx.branches = [Branch(t, branch.synapse) for t, branch in zip(trains, branches, strict=True)]
        ctx.neuron, ctx.compute_dtype = neuron, compute_dtype
        weight = next(w for w in inputs[1::2] if w is not None)
        size = math.prod(train.pooled_shape)
        return weight.new_zeros(1, dtype=compute_dtype).expand(train.steps, train.fired.shape[1], size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        neuron, compute_dtype = ctx.neuron, ctx.compute_dtype
        saved = list(ctx.saved_tensors)
        weights = saved[-len(ctx.branches):]
        state = saved[0]
        train = dataclasses.replace(ctx.train, fired=saved[0], mask=saved[1])
        branches = [Branch(dataclasses.replace(branch.train, fired=saved[2 + 2 * i], mask=saved[3 + 2 * i]),
                           branch.synapse) for i, branch in enumerate(ctx.branches)]
        start, steps = window(branches)
        dtype = next(w for w in weights if w is not None).dtype
        wanted = list(zip(ctx.needs_input_grad[5::2], ctx.needs_input_grad[6::2], strict=True))
        prepared = [prepare(weight, compute_dtype) for weight in weights]
        link_grads, weight_grads = [None] * len(branches), [None] * len(branches)
        for i, branch in enumerate(branches):
            if wanted[i][0]:
                batch, size = branch.train.fired.shape[1], math.prod(branch.train.pooled_shape)
                link_grads[i] = grad.new_empty(branch.train.steps, batch, size)
                link_grads[i][steps - (branch.train.start - start):] = 0  # spikes after the window reach nothing
        for samples in chunks(grad.shape[1], working_bytes(branches, dtype), weights):
            g = train.pull_back(grad[:, samples], samples, dtype, lif.surrogate_scale(neuron))
            lif.integrate_backward(g.flatten(1), state[:, samples].flatten(1), train.start, neuron)
            g = g.to(compute_dtype)
            for i, (branch, weight) in enumerate(zip(branches, prepared, strict=True)):
                rows = slice(0, steps - (branch.train.start - start))
                if rows.stop <= 0:
                    continue
                out = unflatten(g[branch.train.start - start:], train.shape)
                if wanted[i][1]:
                    x = branch.train.floats(samples, rows, compute_dtype)
                    weight_grads[i] = branch.weight_gradient(x, out, weight_grads[i])
                if wanted[i][0]:
                    link_grads[i][rows, samples] = flatten(branch.input_gradient(out, weight), rows.stop)
        return None, None, None, None, None, *(g for pair in zip(link_grads, weight_grads, strict=True) for g in pair)


class _SpikeCounts(torch.autograd.Function):
    """Sum over time of what a train gives, (B, N'), as a function of its link."""

    @staticmethod
    def forward(ctx, link, train, dtype):
        ctx.steps = train.steps
        return train.total(slice(0, train.steps), dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad.expand(ctx.steps, *grad.shape), None, None


def stages_of(modules):
    """[(synapse, nn.Dropout or None, number of pools), ...]: one for each LIF layer of a plain chain of modules."""
    stages = []
    for module in modules:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            stages.append((module, None, 0))
        elif isinstance(module, nn.Dropout):
            stages[-1] = (stages[-1][0], module, stages[-1][2])
        elif isinstance(module, nn.AvgPool2d):
            stages[-1] = (*stages[-1][:2], stages[-1][2] + 1)
    return stages


class SpikingNetwork(nn.Module):
    """What the spiking VGG and ResNet share: hyper-parameters, thresholds, input and output.

    A subclass builds its modules, calls `set_layers` and defines `balanced_stages()` and `convolutional(train)`, which
    yields the inputs [Branch, ...] and the SpikeTrain of one convolutional LIF layer after another and returns the
    last; where LIF layers follow that are not convolutional, it defines `dense(train)` likewise. `self.thresholds`
    holds the threshold of every LIF layer, in order. Nothing is kept from one forward pass to the next.
    """

    def __init__(self, activation, timesteps, leak, default_threshold, alpha, beta, gamma, backend, rate):
        super().__init__()
        if backend not in ('torch', 'triton'):
            raise ValueError(f"unknown backend {backend!r}: choose 'torch' or 'triton'")
        self.backend = backend
        if activation not in ('STDB', 'Linear'):
            raise ValueError(f"unknown activation {activation!r}: choose 'STDB' or 'Linear'")
        self.activation, self.alpha, self.beta, self.gamma = activation, alpha, beta, gamma
        self.default_threshold = check_threshold(default_threshold)
        self.input_layer = PoissonGenerator(rate)
        self.network_update(timesteps, leak)

    def set_layers(self, names, depth, balanced):
        """names: of the LIF layers' synapses; depth: LIF layers on the shortest way from input to output;
        balanced: how many of them, from the first, threshold balancing reaches."""
        self.layer_names, self.depth, self.balanced = names, depth, balanced
        self.thresholds = [self.default_threshold] * len(names)
        initialize(self)

    def network_update(self, timesteps, leak):
        """Set the number of time steps (1 or more) and the leak (in (0, 1]); raises ValueError for others."""
        if timesteps < 1 or int(timesteps) != timesteps:
            raise ValueError(f'timesteps must be a whole number of 1 or more, not {timesteps}')
        if not 0 < leak <= 1:
            raise ValueError(f'leak must be above 0 and at most 1, not {leak}')
        self.timesteps, self.leak = int(timesteps), float(leak)

    def threshold_update(self, scaling_factor=1.0, thresholds=()):
        """Set thresholds, each times scaling_factor: of all LIF layers, or of the balanced ones. Changes no argument.

        Raises ValueError for another number of them, or where one is not above 0. Without thresholds, nothing happens.
        """
        thresholds = [check_threshold(float(value) * scaling_factor) for value in thresholds]
        if thresholds and len(thresholds) not in (self.balanced, len(self.thresholds)):
            raise ValueError(f'{len(thresholds)} thresholds for a network of {len(self.thresholds)} LIF layers'
                             + (f', {self.balanced} of them balanced' if self.balanced < len(self.thresholds) else ''))
        self.thresholds[:len(thresholds)] = thresholds

    def neuron(self, index):
        """The Neuron of LIF layer `index`."""
        return lif.Neuron(self.thresholds[index], self.leak, self.activation, self.alpha, self.beta, self.gamma,
                          self.backend)

    def encode(self, x, steps):
        """Poisson spikes of images x (B, C, H, W) at `steps` steps; a pixel's sign goes into the mask."""
        dtype = self.classifier[-1].weight.dtype
        fired = torch.empty(steps, len(x), x[0].numel(), dtype=torch.bool, device=x.device)
        for row in fired:
            row.copy_(flatten(self.input_layer.fires(x), 1)[0])
        return SpikeTrain(fired, tuple(x.shape[1:]), 0, mask=flatten(x.sign().to(dtype), 1)[0])

    def forward(self, x):
        """(B, C, H, W) float images -> (B, labels): the output currents W s summed over all time steps.

        All NaN where a potential of any layer left the finite range: its neuron is silent, which would hide it.
        """
        weight = self.classifier[-1].weight
        if self.timesteps <= self.depth:
            return F.linear(weight.new_zeros(len(x), weight.shape[1]), weight)
        train = self.last_spikes(x)
        counts = _SpikeCounts.apply(train.link, train, weight.dtype)
        return self.readout(unflatten(counts[None], train.pooled_shape)) + train.fault

    @torch.no_grad()
    def curve(self, x, at):
        """The outputs after each of `at` time steps: (len(at), B, labels), from one pass over `timesteps`.

        (B, C, H, W) float images; at: whole numbers in ascending order, from 1 to timesteps. The outputs after t steps
        are those of the same network at timesteps = t, given the same random draws.
        """
        if list(at) != sorted(at) or not 1 <= at[0] <= at[-1] <= self.timesteps:
            raise ValueError(f'at must ascend from 1 or more to {self.timesteps} or less, not {at}')
        weight = self.classifier[-1].weight
        outputs, counts, row = weight.new_zeros(len(at), len(x), len(weight)), 0, 0
        if self.timesteps <= self.depth:
            return outputs
        train = self.last_spikes(x)
        for i, steps in enumerate(at):
            stop = max(0, steps - train.start)
            counts = counts + train.total(slice(row, stop), weight.dtype)
            outputs[i], row = self.readout(unflatten(counts[None], train.pooled_shape)), stop
        return outputs + train.fault

    def last_spikes(self, x):
        """The spikes that the output layer receives from images x (B, C, H, W)."""
        train = self.input_train(x)
        # Samples go through the convolutions in groups, so that, when learning, gradients wait for one group only:
        # autograd takes the last group back to the input before it begins with the one before.
        size = len(x)
        if torch.is_grad_enabled():
            size = max(1, GROUP_BYTES[x.device.type] // (train.steps * self.largest_convolution(train) * x.itemsize))
        groups = [slice(i, i + size) for i in range(0, len(x), size)]
        train = join([last(self.convolutional(train.part(samples))) for samples in groups])
        return last(self.dense(train))

    def layers(self, x):
        """Yield the inputs [Branch, ...] and the SpikeTrain of every LIF layer, in the order of `layer_names`, as
        images x (B, C, H, W) go through. `timesteps` must be above `depth`."""
        train = yield from self.convolutional(self.input_train(x))
        yield from self.dense(train)

    def input_train(self, x):
        """The spikes of images x (B, C, H, W) that can reach the output: each layer delays by one step, so of T steps
        the last `depth` cannot."""
        return self.encode(x, self.timesteps - self.depth)

    def dense(self, train):
        """The LIF layers after the convolutional ones: none."""
        yield from ()
        return train

    def largest_convolution(self, train):
        """The most values that one of the balanced convolutions takes and gives, of one sample at one step."""
        sizes, train = [], dataclasses.replace(train, fired=None, mask=None)
        for synapse, _, pools in self.balanced_stages():
            if isinstance(synapse, nn.Linear):
                break
            shape = Branch(train, synapse).output_shape()
            sizes.append(math.prod(train.pooled_shape) + math.prod(shape))
            train = dataclasses.replace(train, shape=shape, pools=pools)
        return max(sizes)

    def chain(self, train, stages, first=0):
        """LIF layers one after the other, from number `first` on: yields what `layers` does, returns the last train."""
        for index, (synapse, dropout, pools) in enumerate(stages, first):
            branches = [Branch(train, synapse)]
            train = lif_layer(branches, self.neuron(index), dropout, pools)
            yield branches, train
        return train

    def readout(self, counts):
        """The output layer on spike counts: sum_t W s(t) = W sum_t s(t), so it is one product whatever T."""
        with torch.autocast(counts.device.type, enabled=False):  # counts go beyond the 8 bits of bfloat16
            return self.classifier[-1](counts.flatten(1))


def last(layers):
    """Run through a generator like SpikingNetwork.chain; returns the last train."""
    while True:
        try:
            next(layers)  # what it yields is not held, so a layer's input can go when the next layer runs
        except StopIteration as done:
            return done.value


def check_threshold(value):
    if not 0 < value <= torch.finfo(torch.float32).max:
        raise ValueError(f'a threshold must be above 0 and no more than float32 holds, not {value}')
    return value
