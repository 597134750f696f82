"""What the spiking VGG and ResNet have in common: encoding, thresholds and leaks, the way through the layers, readout.

The layers run one after the other, each over all time steps (see lif_layer.py); nothing is kept from one forward pass
to the next.
"""
import dataclasses
import math
from collections.abc import Generator, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from self_models.encoding import ENCODINGS, PoissonGenerator
from self_models.layers import initialize
from self_models.lif import LIFParameters, lif_forward
from self_models.lif_layer import (
    SynapticInput,
    chunks,
    dtypes,
    input_current,
    lif_layer,
    prepare,
    window,
    working_bytes,
)
from self_models.spike_train import DirectInput, SpikeCounts, SpikeTrain, at_least_float32, flatten, join, unflatten
from self_models.surrogate import SURROGATES

GROUP_BYTES = {'cpu': 64 << 20, 'cuda': 4 << 30}  # of the gradients between two convolutions, in the backward pass
SMALLEST = 1e-4  # that a learned threshold or leak becomes
# yields inputs and spikes of one LIF layer after another, returns the last spikes
Layers = Generator[tuple[list[SynapticInput], SpikeTrain], None, SpikeTrain]


@dataclasses.dataclass
class LayerRecord:
    """What one LIF layer is given and does on a batch of images."""
    name: str  # of its synapse; in a residual block of the last one
    parameters: LIFParameters
    inputs: list[SynapticInput]
    spikes: SpikeTrain

    @property
    def window(self) -> tuple[int, int]:
        """(first step, number of steps) of its input; spikes leave `parameters.delay` steps later."""
        return window(self.inputs, self.parameters)

    def potentials(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Yield (samples, input current, membrane potential), both (n, b, N), for some samples after others.

        The potential is the one after the input of each of the window's n steps, which the neuron fires on (p of
        lif.py); N is stored as in SpikeTrain. They are computed anew.
        """
        weights = [each.weight for each in self.inputs if each.weight is not None]
        dtype, compute_dtype = dtypes(weights[0])
        steps = self.window[1]
        with torch.no_grad(), torch.autocast(weights[0].device.type, enabled=False):
            ready = [[prepare(getattr(each, kind), compute_dtype) for each in self.inputs]
                     for kind in ('weight', 'bias')]
            for samples in chunks(self.spikes.batch, working_bytes(self.inputs, steps, dtype), weights, dtype):
                current = input_current(self.inputs, self.window, *ready, samples, dtype, compute_dtype)
                current = current.expand(steps, -1, -1)
                potentials = torch.empty_like(current, memory_format=torch.contiguous_format)
                lif_forward(current.flatten(1), torch.empty_like(potentials, dtype=torch.bool).flatten(1),
                            self.parameters, potentials=potentials.flatten(1))
                yield samples, current, potentials


def stages_of(modules: Iterable[nn.Module]) -> list[tuple]:
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
    """What the spiking VGG and ResNet share: hyper-parameters, thresholds and leaks, input and output.

    A subclass builds its modules, calls `set_layers` and defines `balanced_stages()` and `convolutional(train)`, which
    yields the inputs [SynapticInput, ...] and the SpikeTrain of one convolutional LIF layer after another and returns
    the last; where LIF layers follow that are not convolutional, it defines `dense(train)` likewise.

    activation: 'STDB' (alpha, beta) or 'Linear' (gamma). encoding: 'poisson' (rate coding) or 'direct' (the image
    itself at each step). delay: 1, or 0 for neurons that fire in the step of their input. initial_potential: u(-1) in
    thresholds, in [0, 1). learn_threshold, learn_leak: make `thresholds`, `leaks` parameters.

    thresholds, leaks: 1-D tensors, a value for each LIF layer, in the order of `layer_names`. initial_leak: of all
    layers, until leak_update or learning. latency: the first step, from 0, at which a spike can be at the output; no
    fewer time steps than latency + 1 give more than nothing.
    """

    def __init__(self, activation: str, timesteps: int, leak: float, default_threshold: float, alpha: float,
                 beta: float, gamma: float, backend: str, rate: float, encoding: str = 'poisson', delay: int = 1,
                 initial_potential: float = 0.0, learn_threshold: bool = False, learn_leak: bool = False):
        super().__init__()
        for what, value, known in (('backend', backend, ('torch', 'triton')), ('activation', activation, SURROGATES),
                                   ('encoding', encoding, ENCODINGS), ('delay', delay, (0, 1))):
            if value not in known:
                raise ValueError(f'unknown {what} {value!r}: choose {" or ".join(map(repr, known))}')
        if not 0 <= initial_potential < 1:
            raise ValueError(f'initial_potential must be at least 0 and below 1, not {initial_potential}')
        self.backend, self.encoding, self.delay = backend, encoding, delay
        self.initial_potential = float(initial_potential)
        self.activation, self.alpha, self.beta, self.gamma = activation, alpha, beta, gamma
        self.default_threshold = check_threshold(default_threshold)
        self.learn_threshold, self.learn_leak = learn_threshold, learn_leak
        self.timesteps, self.initial_leak = check_timesteps(timesteps), check_leak(leak)
        self.input_layer = PoissonGenerator(rate)

    def set_layers(self, names: list[str], depth: int, balanced: int) -> None:
        """names: of the LIF layers' synapses; depth: LIF layers on the shortest way from input to output;
        balanced: how many of them, from the first, threshold balancing reaches."""
        self.layer_names, self.depth, self.balanced = names, depth, balanced

        def values(value, learned):
            # fixed ones stay on the CPU, where reading them waits for nothing
            return (nn.Parameter(torch.full((len(names),), value)) if learned
                    else torch.full((len(names),), value, dtype=torch.float64))

        self.thresholds = values(self.default_threshold, self.learn_threshold)
        self.leaks = values(self.initial_leak, self.learn_leak)
        initialize(self)

    @property
    def latency(self) -> int:
        return self.depth * self.delay

    @property
    def leak(self) -> float | None:
        """The leak of all layers; None where they differ."""
        leaks = self.leaks.tolist()
        return leaks[0] if len(set(leaks)) == 1 else None

    def network_update(self, timesteps: int, leak: float) -> None:
        """Set the number of time steps, 1 or more, and the leak of all layers, in (0, 1]; else raise ValueError."""
        self.timesteps, self.initial_leak = check_timesteps(timesteps), check_leak(leak)
        self.leak_update([leak] * len(self.leaks))

    @torch.no_grad()
    def leak_update(self, leaks: Sequence[float]) -> None:
        """Set the leaks of all LIF layers, each in (0, 1]. Raises ValueError for others or another number of them."""
        leaks = [check_leak(float(leak)) for leak in leaks]
        if len(leaks) != len(self.leaks):
            raise ValueError(f'{len(leaks)} leaks for a network of {len(self.leaks)} LIF layers')
        self.leaks.copy_(torch.tensor(leaks, dtype=torch.float64))

    @torch.no_grad()
    def threshold_update(self, scaling_factor: float = 1.0, thresholds: Sequence[float] = ()) -> None:
        """Set thresholds, each times scaling_factor: of all LIF layers, or of the balanced ones. Changes no argument.

        Raises ValueError for another number of them, or where one is not above 0. Without thresholds, nothing happens.
        """
        thresholds = [check_threshold(float(value) * scaling_factor) for value in thresholds]
        if thresholds and len(thresholds) not in (self.balanced, len(self.thresholds)):
            raise ValueError(f'{len(thresholds)} thresholds for a network of {len(self.thresholds)} LIF layers'
                             + (f', {self.balanced} of them balanced' if self.balanced < len(self.thresholds) else ''))
        self.thresholds[:len(thresholds)] = torch.tensor(thresholds, dtype=torch.float64).to(self.thresholds)

    @torch.no_grad()
    def constrain(self) -> None:
        """Bring learned thresholds above 0 and learned leaks into (0, 1]; to be called after each training step."""
        if self.learn_threshold:
            self.thresholds.clamp_(min=SMALLEST)
        if self.learn_leak:
            self.leaks.clamp_(SMALLEST, 1)

    def neuron_parameters(self) -> list:
        """The learned thresholds and leaks, which take no weight decay."""
        return [values for values in (self.thresholds, self.leaks) if isinstance(values, nn.Parameter)]

    def lif_parameters(self, index: int) -> LIFParameters:
        """The LIFParameters of LIF layer `index`."""
        threshold, leak = (values[index] if isinstance(values, nn.Parameter) else values[index].item()
                           for values in (self.thresholds, self.leaks))
        return LIFParameters(threshold, leak, self.activation, self.alpha, self.beta, self.gamma, self.backend,
                             self.delay, self.initial_potential)

    def encode(self, x: torch.Tensor, steps: int) -> SpikeTrain | DirectInput:
        """What the first layer is given of images x (B, C, H, W) over `steps` steps.

        Of Poisson spikes a pixel's sign goes into the mask; they are drawn, and have no gradient.
        """
        dtype, shape = self.classifier[-1].weight.dtype, tuple(x.shape[1:])
        if self.encoding == 'direct':
            x = x.to(dtype)
            return DirectInput(x.detach(), shape, steps, proxy=flatten(x, 1) if x.requires_grad else None)
        spikes = torch.empty(steps, len(x), x[0].numel(), dtype=torch.bool, device=x.device)
        for row in spikes:
            row.copy_(flatten(self.input_layer.fires(x), 1)[0])
        return SpikeTrain(spikes, shape, 0, mask=flatten(x.sign().to(dtype), 1)[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) float images -> (B, labels): the output currents W s + b summed over all time steps.

        In the weights' type, or in float32 if that is narrower, as are spike counts and membrane potentials.
        All NaN where a potential of any layer left the finite range: its neuron is silent, which would hide it.
        """
        if self.timesteps <= self.latency or not len(x):
            return self.silent_output(x, self.timesteps)
        train = self.last_spikes(x)
        if train.proxy is None:
            counts = train.total(slice(0, train.steps), self.classifier[-1].weight.dtype)
        else:
            counts = SpikeCounts.apply(train.proxy, train, self.classifier[-1].weight.dtype)
        return self.readout(unflatten(counts[None], train.pooled_shape), self.timesteps) + train.fault

    @torch.no_grad()
    def curve(self, x: torch.Tensor, at: list[int]) -> torch.Tensor:
        """The outputs after each of `at` time steps: (len(at), B, labels), from one pass over `timesteps`.

        (B, C, H, W) float images; at: whole numbers in ascending order, from 1 to timesteps. The outputs after t steps
        are those of the same network at timesteps = t, given the same random draws.
        """
        given, at = list(at), [int(steps) for steps in at]
        if not at or at != given or at != sorted(at) or not 1 <= at[0] <= at[-1] <= self.timesteps:
            raise ValueError(f'at must ascend from 1 or more to {self.timesteps} or less, one whole number at least, '
                             f'not {given}')
        if self.timesteps <= self.latency or not len(x):
            return torch.stack([self.silent_output(x, steps) for steps in at])
        outputs, counts, row = [], 0, 0
        train = self.last_spikes(x)
        for steps in at:
            stop = max(0, steps - train.start)
            counts = counts + train.total(slice(row, stop), self.classifier[-1].weight.dtype)
            outputs.append(self.readout(unflatten(counts[None], train.pooled_shape), steps))
            row = stop
        return torch.stack(outputs) + train.fault

    def silent_output(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        """The output (B, labels) after so many steps, none of whose spikes has reached it, or of no images."""
        weight = self.classifier[-1].weight
        counts = weight.new_zeros(len(x), weight.shape[1], dtype=at_least_float32(weight.dtype))
        return SpikingNetwork.readout(self, counts, steps)

    def last_spikes(self, x: torch.Tensor) -> SpikeTrain:
        """The spikes that the output layer receives from images x (B, C, H, W)."""
        train = self.input_train(x)
        # Samples go through the convolutions in groups, so that, when learning, gradients wait for one group only:
        # autograd takes the last group back to the input before it begins with the one before.
        size = len(x)
        if torch.is_grad_enabled():
            size = max(1, GROUP_BYTES[x.device.type]
                       // (train.steps * self.largest_convolution(train.shape) * x.itemsize))
        groups = [slice(i, i + size) for i in range(0, len(x), size)]
        train = join([last(self.convolutional(train.part(samples))) for samples in groups])
        return last(self.dense(train))

    def record(self, x: torch.Tensor) -> Iterator[LayerRecord]:
        """Yield what every LIF layer is given and does, in the order of `layer_names`, as images x (B, C, H, W) go
        through: input current, membrane potentials, spikes. `timesteps` must be above `latency`."""
        def layers():
            train = yield from self.convolutional(self.input_train(x))
            yield from self.dense(train)
        for index, (inputs, train) in enumerate(layers()):
            yield LayerRecord(self.layer_names[index], self.lif_parameters(index), inputs, train)

    def input_train(self, x: torch.Tensor) -> SpikeTrain | DirectInput:
        """What the first layer is given that can reach the output: of T steps the last `latency` cannot."""
        return self.encode(x, self.timesteps - self.latency)

    def dense(self, train: SpikeTrain) -> Layers:
        """The LIF layers after the convolutional ones: none."""
        yield from ()
        return train

    def largest_convolution(self, shape: tuple) -> int:
        """The most values that one of the balanced convolutions takes and gives, of one sample at one step.

        shape: (C, H, W) of the images.
        """
        sizes, train = [], SpikeTrain(None, shape, 0)
        for synapse, _, pools in self.balanced_stages():
            if isinstance(synapse, nn.Linear):
                break
            shape = SynapticInput(train, synapse).output_shape()
            sizes.append(math.prod(train.pooled_shape) + math.prod(shape))
            train = SpikeTrain(None, shape, 0, pools=pools)
        return max(sizes)

    def chain(self, train: SpikeTrain | DirectInput, stages: list[tuple], first: int = 0) -> Layers:
        """LIF layers one after the other, from number `first` on: yields what `convolutional` does, returns the last
        train."""
        for index, (synapse, dropout, pools) in enumerate(stages, first):
            inputs = [SynapticInput(train, synapse)]
            train = lif_layer(inputs, self.lif_parameters(index), dropout, pools)
            yield inputs, train
        return train

    def readout(self, counts: torch.Tensor, steps: int) -> torch.Tensor:
        """The output layer on spike counts over so many steps: sum_t (W s(t) + b) = W sum_t s(t) + T b, one product."""
        layer = self.classifier[-1]
        with torch.autocast(counts.device.type, enabled=False):  # counts go beyond the 8 bits of bfloat16
            weight, bias = (None if each is None else each.to(counts.dtype) for each in (layer.weight, layer.bias))
            return F.linear(counts.flatten(1), weight, None if bias is None else steps * bias)


def last(layers: Layers) -> SpikeTrain:
    """Run through a generator like SpikingNetwork.chain; returns the last train."""
    while True:
        try:
            next(layers)  # what it yields is not held, so a layer's input can go when the next layer runs
        except StopIteration as done:
            return done.value


def check_threshold(value: float) -> float:
    if not torch.finfo(torch.float32).tiny <= value <= torch.finfo(torch.float32).max:
        raise ValueError(f'a threshold must be above 0 and a number that float32 holds, not {value}')
    return value


def check_leak(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f'leak must be above 0 and at most 1, not {value}')
    return float(value)


def check_timesteps(value: int) -> int:
    if value < 1 or int(value) != value:
        raise ValueError(f'timesteps must be a whole number of 1 or more, not {value}')
    return int(value)
