"""What spiking networks share: encoding, thresholds and leaks; for VGG and ResNet also the way through the layers.

The layers of these run one after the other, each over all time steps (see lif_layer.py). A network has no state between
forward passes.
"""
import dataclasses
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from self_models.encoding import ENCODINGS
from self_models.layers import Exact, Scale, compute_weights, initialize
from self_models.lif import LIFParameters, lif_forward
from self_models.lif_layer import SynapticInput, currents, lif_layer, prepared, window
from self_models.published import PoissonGenerator
from self_models.qcfs import SMALLEST
from self_models.spike_train import DirectInput, SpikeCounts, SpikeTrain, at_least_float32, flatten, join, unflatten
from self_models.surrogate import FLAGS, SURROGATES, Surrogate

GROUP_BYTES = {'cpu': 64 << 20, 'cuda': 4 << 30}  # of the gradients between two convolutions, in the backward pass
# yields inputs and spikes of each LIF layer in turn, returns the last spikes
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
        """(first step, number of steps) of its input; its spikes come `parameters.delay` steps later."""
        return window(self.inputs, self.parameters)

    def potentials(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Yield (samples, input current, membrane potential), both (n, b, N), for groups of samples.

        The potential is the one after the input of each of the window's n steps, which decides about the spike (p in
        lif.py); N is stored as in SpikeTrain. Both are computed again.
        """
        kind, steps = self.inputs[0].train.tensors()[0].device.type, self.window[1]
        groups = currents(self.inputs, self.window, prepared(self.inputs))
        while True:
            # not around the yield: what the caller does between two groups is not for these modes
            with torch.no_grad(), torch.autocast(kind, enabled=False):
                samples, current = next(groups, (None, None))
                if current is None:
                    return
                current = current.expand(steps, -1, -1)
                potentials = torch.empty_like(current, memory_format=torch.contiguous_format)
                lif_forward(current.flatten(1), torch.empty_like(potentials, dtype=torch.bool).flatten(1),
                            self.parameters, potentials=potentials.flatten(1))
            yield samples, current, potentials


class Stage(NamedTuple):
    """An LIF layer and what follows it.

    inputs: ((source, synapse), ...): the number of the LIF layer whose spikes come in, -1 for the input layer, and the
    nn.Conv2d, nn.Linear, layers.Scale or None (the identity) that they go through. dropout: of its spikes, or None.
    pools: 2x2 average pools behind it.
    """
    inputs: tuple[tuple[int, nn.Module | None], ...]
    dropout: nn.Dropout | None = None
    pools: int = 0


def stages_of(modules: Iterable[nn.Module]) -> list[Stage]:
    """A Stage for each LIF layer of a plain chain of modules."""
    stages = []
    for module in modules:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            stages.append(Stage(((len(stages) - 1, module),)))
        elif isinstance(module, nn.Dropout):
            stages[-1] = stages[-1]._replace(dropout=module)
        elif isinstance(module, nn.AvgPool2d):
            stages[-1] = stages[-1]._replace(pools=stages[-1].pools + 1)
    return stages


class SpikingNetwork(nn.Module):
    """The hyper-parameters that all spiking networks share. A subclass has `thresholds` and `leaks`, 1-D tensors with a
    value for each LIF layer in the order of `layer_names`, `set_neurons` and `constrain`; forward, `curve` and
    `record`; `balanced`, how many layers threshold balancing reaches; and `depth`, the LIF layers on the shortest way
    from input to output.

    activation: the surrogate by its name, with alpha, beta, gamma and width, see surrogate.py. encoding: 'poisson'
    (rate coding), 'direct' (the image itself at each step) or another, see encoding.py. delay: 1, or 0 for neurons that
    fire in the step of their input. initial_potential: u(-1) in thresholds, in [0, 1). learn_threshold, learn_leak:
    make `thresholds`, `leaks` parameters; in what spiking() makes, `threshold` and `leak` of each LIF, of which
    `thresholds` and `leaks` are copies.

    initial_leak: of all layers, until leak_update or learning. output_delay: steps before the first at which a spike
    that the images cause can be at the output; without biases, T must be above it for more than nothing.
    """

    def __init__(self, activation: str, timesteps: int, leak: float, default_threshold: float, alpha: float,
                 beta: float, gamma: float, backend: str, rate: float, encoding: str = 'poisson', delay: int = 1,
                 initial_potential: float = 0.0, learn_threshold: bool = False, learn_leak: bool = False,
                 width: float = 1.0):
        super().__init__()
        check_neurons(backend, activation, delay, initial_potential)
        check_choice('encoding', encoding, ENCODINGS)
        self.backend, self.encoding, self.delay = backend, encoding, delay
        self.initial_potential = float(initial_potential)
        self.activation, self.alpha, self.beta, self.gamma, self.width = activation, alpha, beta, gamma, width
        _ = self.surrogate  # raises ValueError for values that make none
        self.default_threshold = check_threshold(default_threshold)
        self.learn_threshold, self.learn_leak = learn_threshold, learn_leak
        self.timesteps, self.initial_leak = check_timesteps(timesteps), check_leak(leak)
        self.input_layer = PoissonGenerator(rate)

    @property
    def output_delay(self) -> int:
        return self.depth * self.delay

    @property
    def surrogate(self) -> Surrogate:
        return SURROGATES[self.activation](**{flag: getattr(self, flag) for flag in FLAGS})

    @property
    def leak(self) -> float | None:
        """The leak of all layers; None if they differ."""
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
        if len(leaks) != len(self.layer_names):
            raise ValueError(f'{len(leaks)} leaks for a network of {len(self.layer_names)} LIF layers')
        self.set_neurons('leaks', leaks)

    @torch.no_grad()
    def threshold_update(self, scaling_factor: float = 1.0, thresholds: Sequence[float] = ()) -> None:
        """Set thresholds, each times scaling_factor: of all LIF layers, or of the balanced ones. Changes no argument.

        If a layer-by-layer network carries its thresholds, the weights behind each layer change with its threshold.
        Raises ValueError for another number of thresholds, or if one is not above 0. Without any, nothing happens.
        """
        count = len(self.layer_names)
        thresholds = [check_threshold(float(value) * scaling_factor) for value in thresholds]
        if thresholds and len(thresholds) not in (self.balanced, count):
            raise ValueError(f'{len(thresholds)} thresholds for a network of {count} LIF layers'
                             + (f', {self.balanced} of them balanced' if self.balanced < count else ''))
        self.set_neurons('thresholds', thresholds)

    def set_neurons(self, what: str, values: list[float]) -> None:
        """Set the 'thresholds' or 'leaks' of the first layers to these values."""
        raise NotImplementedError

    def checked_curve(self, at: Sequence[float]) -> list[int]:
        """The time steps of curve() as a list. Raises ValueError unless they ascend and are from 1 to `timesteps`."""
        given, at = list(at), [int(steps) for steps in at]
        if not at or at != given or at != sorted(at) or not 1 <= at[0] <= at[-1] <= self.timesteps:
            raise ValueError(f'at must ascend from 1 or more to {self.timesteps} or less, one whole number at least, '
                             f'not {given}')
        return at


class LayerByLayer(Exact, SpikingNetwork):
    """What the spiking VGG and ResNet share: a layer runs over all time steps before the next one does.

    A subclass builds its modules, calls `set_layers` and defines `stages()`, which lists its LIF layers.

    thresholds, leaks: parameters if learned, else buffers. carried: the thresholds that the weights behind each layer
    were multiplied by, so that its spikes are worth their threshold; None if spikes are worth 1, as published.
    """
    exact = 'thresholds', 'leaks'

    def set_layers(self, names: list[str], depth: int, first: int, carries: bool) -> None:
        """names: of the LIF layers' synapses; depth: LIF layers on the shortest way from input to output; first: how
        many are one chain from the input on; carries: whether the weights behind a layer can carry its threshold."""
        self.layer_names, self.depth, self.first, self.carries = names, depth, first, carries

        for what, value, learned in (('thresholds', self.default_threshold, self.learn_threshold),
                                     ('leaks', self.initial_leak, self.learn_leak)):
            if learned:
                self.register_parameter(what, nn.Parameter(torch.full((len(names),), value)))
            else:
                self.register_buffer(what, torch.full((len(names),), value, dtype=torch.float64))
        self.carried, self._numbers = None, {}
        initialize(self)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.carried and hasattr(destination, '_metadata'):  # else it may be unknown, as of a former state's file
            destination._metadata[prefix[:-1]]['carries'] = True

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        whole = f'{prefix}thresholds' in state_dict
        behind = {prefix + name for name, _ in self.named_parameters() if name not in ('thresholds', 'leaks')
                  and not name.startswith(f'{self.layer_names[0]}.') and 'bias' not in name}
        replaced = whole or behind <= state_dict.keys()  # else some weights stay, and so does what they carry
        for what in ('thresholds', 'leaks'):  # an ANN's weights, or those of a published SNN, come without
            state_dict.setdefault(prefix + what, getattr(self, what))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        # the weights are those of a network like this one, or of an ANN
        carries = whole and local_metadata.get('carries', bool(self.carried))
        if replaced:
            self.carried = self.thresholds.tolist() if carries else None

    def __getstate__(self):
        return {**self.__dict__, '_numbers': {}}  # the tensors of a copy count their changes anew

    @property
    def balanced(self) -> int:
        """How many of the LIF layers, from the first on, threshold balancing reaches: all if the weights carry the
        thresholds, else, as published, those before the residual blocks."""
        return len(self.layer_names) if self.carried else self.first

    def set_neurons(self, what: str, values: list[float]) -> None:
        own = getattr(self, what)
        values = torch.tensor(values, dtype=torch.float64).to(own)
        if what == 'thresholds' and self.carried:
            # training may have changed both them and the weights
            self.carried = (own.clamp(min=SMALLEST) if self.learn_threshold else own).tolist()
            self.carry(values.tolist())
        own[:len(values)] = values

    @torch.no_grad()
    def carry(self, thresholds: Sequence[float]) -> None:
        """Have the weights behind the first layers carry these thresholds, in place of those that they carry now.

        Raises ValueError if such weights are computed from others; nothing is changed then.
        """
        carried = self.carried or [1.0] * len(self.thresholds)
        behind = [*(stage.inputs for stage in self.stages()), ((len(carried) - 1, self.classifier[-1]),)]
        behind = [each for inputs in behind for each in inputs if each[0] >= 0]
        if not all(isinstance(getattr(synapse, 'weight', None), (nn.Parameter, type(None))) for _, synapse in behind):
            raise ValueError('weights that carry thresholds are computed from others, as by pruning: make them '
                             'permanent first, as prune.remove does')
        self.carried = [*thresholds, *carried[len(thresholds):]]
        for source, synapse in behind:
            if self.carried[source] != carried[source]:
                values = synapse.factor if isinstance(synapse, Scale) else synapse.weight
                values *= self.carried[source] / carried[source]

    @torch.no_grad()
    def constrain(self) -> None:
        """Bring learned thresholds above 0 and learned leaks into (0, 1]; to be called after each training step."""
        if self.learn_threshold:
            self.thresholds.clamp_(min=SMALLEST)
        if self.learn_leak:
            self.leaks.clamp_(SMALLEST, 1)

    def lif_parameters(self, index: int) -> LIFParameters:
        """The LIFParameters of LIF layer `index`: tensors () of what is learned, numbers of what is not."""
        threshold, leak = (values[index] if values.requires_grad else self._as_numbers(what, values)[index]
                           for what, values in (('thresholds', self.thresholds), ('leaks', self.leaks)))
        return LIFParameters(threshold, leak, self.surrogate, self.backend, self.delay, self.initial_potential)

    def _as_numbers(self, what, values):
        """A fixed 1-D tensor as a list. A GPU's is read again only when it changes, but for .data, as reading waits."""
        if values.device.type == 'cpu':
            return values.tolist()
        version = None if values.is_inference() else values._version
        known, known_version, numbers = self._numbers.get(what, (None, None, None))
        if known is not values or version is None or version != known_version:
            numbers = values.tolist()
            self._numbers[what] = values, version, numbers
        return numbers

    def encode(self, x: torch.Tensor, steps: int) -> SpikeTrain | DirectInput:
        """What the first layer is given of images x (B, C, H, W) over `steps` steps.

        A spike's sign goes into the mask; spikes have no gradient.
        """
        encoding = ENCODINGS[self.encoding]
        dtype, shape = self.classifier[-1].weight.dtype, tuple(x.shape[1:])
        if encoding.constant:
            x = x.to(dtype)
            return DirectInput(x.detach(), shape, steps, proxy=flatten(x, 1) if x.requires_grad else None)
        spikes = torch.empty(steps, len(x), math.prod(shape), dtype=torch.bool, device=x.device)
        for t, row in enumerate(spikes):
            row.copy_(flatten(encoding.fires(x, t, self.input_layer.rate), 1)[0])
        return SpikeTrain(spikes, shape, 0, mask=flatten(x.sign().to(dtype), 1)[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) float images -> (B, labels): the output currents W s + b summed over all time steps.

        In the weights' type, or in float32 if that is narrower, as are spike counts and membrane potentials.
        All NaN if a potential of any layer left the finite range: a silent neuron would hide that.
        """
        if self.is_silent(x):
            return self.silent_output(x, self.timesteps)
        train = self.last_spikes(x)
        # if the images' spikes come too late, some are after the last time step
        steps = min(train.steps, max(0, self.timesteps - train.start))
        if train.proxy is None:
            counts = train.total(slice(0, steps), self.classifier[-1].weight.dtype)
        else:
            counts = SpikeCounts.apply(train.proxy, train, steps, self.classifier[-1].weight.dtype)
        return self.readout(unflatten(counts[None], train.pooled_shape), self.timesteps) + train.fault

    @torch.no_grad()
    def curve(self, x: torch.Tensor, at: list[int]) -> torch.Tensor:
        """The outputs after each of `at` time steps: (len(at), B, labels), from one pass over `timesteps`.

        (B, C, H, W) float images; at: whole numbers in ascending order, from 1 to timesteps. The outputs after t steps
        are those of the same network at timesteps = t, given the same random draws.
        """
        at = self.checked_curve(at)
        if self.is_silent(x):
            return torch.stack([self.silent_output(x, steps) for steps in at])
        outputs, counts, row = [], 0, 0
        train = self.last_spikes(x)
        for steps in at:
            stop = max(0, steps - train.start)
            counts = counts + train.total(slice(row, stop), self.classifier[-1].weight.dtype)
            outputs.append(self.readout(unflatten(counts[None], train.pooled_shape), steps))
            row = stop
        return torch.stack(outputs) + train.fault

    def is_silent(self, x: torch.Tensor) -> bool:
        """Whether no spike can reach the output: without images, or with too few steps and no bias to cause one."""
        if not len(x) or self.timesteps > self.output_delay:
            return not len(x)
        return all(getattr(synapse, 'bias', None) is None for stage in self.stages() for _, synapse in stage.inputs)

    def silent_output(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        """The output (B, labels) after so many steps if no spike has reached it, or without images."""
        weight = self.classifier[-1].weight
        counts = weight.new_zeros(len(x), weight.shape[1], dtype=at_least_float32(weight.dtype))
        return LayerByLayer.readout(self, counts, steps)

    def stages(self) -> list[Stage]:
        """The LIF layers, in the order in which they run."""
        raise NotImplementedError

    def last_spikes(self, x: torch.Tensor) -> SpikeTrain:
        """The spikes that the output layer receives from images x (B, C, H, W)."""
        compute_weights(self)
        train, stages = self.input_train(x), self.stages()
        dense = next((i for i, stage in enumerate(stages) if isinstance(stage.inputs[0][1], nn.Linear)), len(stages))
        # In training, samples go through the convolutions in groups, so that the gradients of one group only are in
        # memory: autograd takes a group back to the input before it begins the next.
        size = len(x)
        if torch.is_grad_enabled():
            size = max(1, GROUP_BYTES[x.device.type]
                       // (train.steps * self.largest_convolution(train.shape) * x.itemsize))
        groups = [slice(i, i + size) for i in range(0, len(x), size)]
        train = join([run_through(self.layers(train.part(samples), 0, dense)) for samples in groups])
        return run_through(self.layers(train, dense, len(stages)))

    def record(self, x: torch.Tensor) -> Iterator[LayerRecord]:
        """Yield what every LIF layer is given and does, in the order of `layer_names`, as images x (B, C, H, W) go
        through: input current, membrane potentials, spikes. `timesteps` must be above `output_delay`."""
        compute_weights(self)
        for index, (inputs, train) in enumerate(self.layers(self.input_train(x), 0, len(self.stages()))):
            yield LayerRecord(self.layer_names[index], self.lif_parameters(index), inputs, train)

    def input_train(self, x: torch.Tensor) -> SpikeTrain | DirectInput:
        """The input of the first layer, without the last `output_delay` of the T steps, which cannot reach the output.
        At least one step, for networks in which only biases make neurons fire."""
        return self.encode(x, max(1, self.timesteps - self.output_delay))

    def largest_convolution(self, shape: tuple) -> int:
        """The most values that one of the convolutions takes and gives, of one sample at one step.

        shape: (C, H, W) of the images.
        """
        sizes, trains = [0], {-1: SpikeTrain(None, shape, 0)}
        for index, stage in enumerate(self.stages()):
            inputs = [SynapticInput(trains[source], synapse) for source, synapse in stage.inputs]
            if isinstance(inputs[0].synapse, nn.Linear):
                break
            sizes += [math.prod(each.train.pooled_shape) + math.prod(each.output_shape()) for each in inputs]
            trains[index] = SpikeTrain(None, inputs[0].output_shape(), 0, pools=stage.pools)
        return max(sizes)

    def layers(self, train: SpikeTrain | DirectInput, first: int, stop: int) -> Layers:
        """Run LIF layers first ... stop - 1, given the spikes of the layer before: yields the inputs
        [SynapticInput, ...] and the SpikeTrain of one after another, returns the last train."""
        stages, trains = self.stages()[first:stop], {first - 1: train}
        for index, stage in enumerate(stages, first):
            inputs = [SynapticInput(trains[source], synapse) for source, synapse in stage.inputs]
            needed = {source for later in stages[index - first + 1:] for source, _ in later.inputs}
            trains = {source: each for source, each in trains.items() if source in needed}
            train = trains[index] = lif_layer(inputs, self.lif_parameters(index), stage.dropout, stage.pools)
            yield inputs, train
        return train

    def readout(self, counts: torch.Tensor, steps: int) -> torch.Tensor:
        """The output layer on spike counts over so many steps: sum_t (W s(t) + b) = W sum_t s(t) + T b, one product."""
        layer = self.classifier[-1]
        with torch.autocast(counts.device.type, enabled=False):  # counts go beyond the 8 bits of bfloat16
            weight, bias = (None if each is None else each.to(counts.dtype) for each in (layer.weight, layer.bias))
            return F.linear(counts.flatten(1), weight, None if bias is None else steps * bias)


def run_through(layers: Layers) -> SpikeTrain:
    """Run through a generator like LayerByLayer.layers; returns the last train."""
    while True:
        try:
            next(layers)  # what it yields is not held, so a layer's input can go when the next layer runs
        except StopIteration as done:
            return done.value


def check_choice(what: str, value: object, known: Iterable) -> None:
    if value not in known:
        raise ValueError(f'unknown {what} {value!r}: choose {" or ".join(map(repr, known))}')


def check_neurons(backend: str, activation: str, delay: int, initial_potential: float) -> None:
    check_choice('backend', backend, ('torch', 'triton'))
    check_choice('activation', activation, SURROGATES)
    check_choice('delay', delay, (0, 1))
    if not 0 <= initial_potential < 1:
        raise ValueError(f'initial_potential must be at least 0 and below 1, not {initial_potential}')


def check_threshold(value: float) -> float:
    if not torch.finfo(torch.float32).tiny <= value <= torch.finfo(torch.float32).max:
        raise ValueError(f'a threshold must be above 0 and a number that float32 holds, not {value}')
    return float(value)


def check_leak(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f'leak must be above 0 and at most 1, not {value}')
    return float(value)


def check_timesteps(value: int) -> int:
    if value < 1 or int(value) != value:
        raise ValueError(f'timesteps must be a whole number of 1 or more, not {value}')
    return int(value)
