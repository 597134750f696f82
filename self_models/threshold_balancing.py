"""Threshold balancing, layer by layer (Rathi et al. 2020, algorithm 1; Diehl et al. 2016)."""
import math
import tempfile
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from self_models.encoding import ENCODINGS
from self_models.layers import compute_weights
from self_models.lif import LIFParameters, lif_forward
from self_models.lif_layer import CHUNK_BYTES, SynapticInput, dtypes, input_current, prepare
from self_models.plain import PlainNetwork, Repeat, along_channels, segments
from self_models.spike_train import DirectInput, SpikeTrain, at_least_float32, flatten
from self_models.spiking_network import SpikingNetwork, check_timesteps
from self_models.traced import unwrapped, weight_of

BLOCK_BYTES = 128 << 20  # the most float memory of a convolution or product, but for a single image at a single step
SPOOL_BYTES = 256 << 20  # a layer's spikes are kept in memory up to this, beyond it in a temporary file
BINS = 2 ** 16  # of the histogram that a percentile is read from


class DeadLayerError(ValueError):
    """A layer whose input is never above 0, so that it has no threshold."""


class Pieces(NamedTuple):
    """The pieces in which a layer is processed: slices of samples, and for each, blocks of steps (first, stop)."""
    groups: list[slice]
    blocks: list[tuple[int, int]]


class SpikeStore:
    """The spikes of a layer at `steps` steps, `size` neurons, as bits: in memory while few, else in a temporary file.

    They are written and read by groups of samples (slices), a few steps at a time. shift: how many of the steps, the
    first ones, are empty; what is written as of step 0 stands after them.
    """

    def __init__(self, steps: int, size: int, shift: int = 0):
        self.file = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)
        self.steps, self.size, self.row, self.shift = steps, size, -(-size // 8), shift
        self.spiked = False

    def _seek(self, group, first):
        self.file.seek((group.start * self.steps + (group.stop - group.start) * first) * self.row)

    def write(self, group: slice, first: int, spikes: torch.Tensor) -> None:
        """spikes: (m, b, size) bool, of steps first ... first + m - 1; those beyond the last step are left out."""
        spikes = spikes[:self.steps - self.shift - first]
        self.spiked = self.spiked or bool(spikes.any())
        if first == 0 and self.shift:
            self._seek(group, 0)
            self.file.write(bytes(self.shift * (group.stop - group.start) * self.row))
        self._seek(group, first + self.shift)
        if spikes.is_cuda:  # pack before the copy, which is the slow part
            padded = F.pad(spikes.view(torch.uint8), (0, 8 * self.row - self.size))
            bits = (padded.unflatten(-1, (-1, 8)) << _shifts(spikes.device)).sum(-1, dtype=torch.uint8).cpu().numpy()
        else:
            bits = np.packbits(spikes.numpy(), axis=-1)
        self.file.write(bits.data)

    def read(self, group: slice, first: int, stop: int, device: torch.device) -> torch.Tensor:
        """(m, b, size) bool on `device`."""
        self._seek(group, first)
        shape = (stop - first, group.stop - group.start, self.row)
        bits = np.frombuffer(self.file.read(math.prod(shape)), np.uint8).reshape(shape)
        if device.type == 'cuda':
            bits = torch.from_numpy(bits.copy()).to(device)
            return (bits.unsqueeze(-1) >> _shifts(device) & 1).flatten(-2)[..., :self.size].bool()
        return torch.from_numpy(np.unpackbits(bits, axis=-1, count=self.size)).view(torch.bool)


def _shifts(device):
    """Of the bits in a byte, the first one highest, as in numpy.packbits."""
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)


@torch.no_grad()
def find_thresholds(model: SpikingNetwork, images: torch.Tensor, timesteps: int, progress: bool = False,
                    percentile: float = 100) -> list[float]:
    """Balance the thresholds of a spiking network, layer after layer; returns them, a list of floats.

    A layer's threshold is the maximum over images, units and steps of its input current W s + b, with the layers before
    it spiking at the thresholds already found, at leak 1 and without dropout; or, to be less sensitive to outliers, a
    percentile of those currents (as Rueckauer et al. 2017 take one of activations). Of a ResNet only the pre-process
    layers are balanced. If the network carries its thresholds (copy_weights says when), all layers are, and a spike is
    worth its threshold: that goes into the weights behind it, so that currents and biases stay in the ANN's units.

    model: VGG_SNN_STDB, RESNET_SNN_STDB or what spiking() made of any network, whose LIFs are all balanced; it is left
    at the thresholds found, else as it was.
    images: (B, C, H, W), on any device. timesteps: T, 1 or more. progress: show a bar on a terminal.
    percentile: in (0, 100]; 100 is the maximum. Another is found to 1 / 32768 of the maximum, in twice the time.
    Raises DeadLayerError, a ValueError, for a layer whose threshold would not exceed 0 or is not finite, and ValueError
    for timesteps < 1, a percentile out of range and images that are no floats of that shape.

    Memory grows neither with B nor with T: images go through a few at a time, a few steps at a time, and a layer's
    spikes wait for the next layer as bits, in a temporary file if there are many (B T N / 8 bytes).
    """
    model, timesteps = unwrapped(model), check_timesteps(timesteps)
    plain = isinstance(model, PlainNetwork)
    if images.dim() != 4 and not plain or not len(images) or not images.is_floating_point():
        raise ValueError(f'images must be floats of shape (B, C, H, W) with B of 1 or more, not {tuple(images.shape)} '
                         f'of {images.dtype}')
    if not 0 < percentile <= 100:
        raise ValueError(f'percentile must be above 0 and at most 100, not {percentile}')
    before = (model.timesteps, model.initial_leak), model.leaks.tolist()
    training = [module for module in model.modules() if module.training]
    model.network_update(timesteps, 1.0)
    model.eval()
    try:
        compute_weights(model)
        balance_all = _balance_plain if plain else _balance_all
        thresholds = balance_all(model, images, timesteps, percentile, progress)
    finally:
        for module in training:
            module.training = True
        model.network_update(*before[0])
        model.set_neurons('leaks', before[1])  # whatever training has made of them
    model.threshold_update(1.0, thresholds)
    return thresholds


class Source(NamedTuple):
    """Where a layer's spikes come from: their store (None for direct input), a train of their shape, and a factor for
    the weights behind, besides the one that these carry already."""
    store: SpikeStore | None
    train: SpikeTrain | DirectInput
    worth: float = 1.0


def _balance_all(model, images, timesteps, percentile, progress):
    """The thresholds of a layer-by-layer network, one layer after another."""
    shape = tuple(images.shape[1:])
    groups = groups_of(images, model.largest_convolution(shape))
    size = groups[0].stop
    stages = model.stages()[:model.balanced]
    first = stages[0].inputs[0][1]
    device, dtype = first.weight.device, dtypes(first.weight)[0]
    carried = model.thresholds.tolist() if model.carried else None
    # With a delay, what a layer does at its last step reaches nothing. A bias and an initial potential act from the
    # first step on, also before the first spike comes, and in a residual block two delays meet: there the trains begin
    # with empty rows.
    shift = model.delay if carried or model.initial_potential or first.bias is not None else 0
    encoding = ENCODINGS[model.encoding]
    if encoding.constant:
        sources = {-1: Source(None, DirectInput(None, shape, timesteps))}
    else:
        # of the input only the bits are stored; a pixel's sign is the mask of its train
        sources = {-1: Source(SpikeStore(timesteps, images[0].numel()), SpikeTrain(None, shape, 0))}
        for group in groups:
            for t in range(timesteps):
                sources[-1].store.write(group, t, flatten(encoding.fires(images[group], t, model.input_layer.rate), 1))
    steps, thresholds = timesteps, []
    with (tqdm(total=len(stages) * len(groups), desc='thresholds', disable=None if progress else True) as bar,
          torch.autocast(device.type, enabled=False)):
        for index, stage in enumerate(stages):
            inputs = [(sources[source], synapse) for source, synapse in stage.inputs]
            source = partial(current_source, inputs, images if index == 0 else None, dtype, device)
            shape = SynapticInput(inputs[0][0].train, inputs[0][1]).output_shape()
            needed = {number for later in stages[index + 1:] for number, _ in later.inputs}
            kept_steps = steps if shift else steps - model.delay
            output = SpikeStore(kept_steps, math.prod(shape), shift) if index in needed else None
            memory = max(CHUNK_BYTES[device.type], *(min(synapse.weight.nbytes, BLOCK_BYTES) for _, synapse in inputs
                                                     if hasattr(synapse, 'weight')))
            values = math.prod(shape) + sum(math.prod(each.train.shape) for each, _ in inputs)
            block = max(1, memory // (size * dtype.itemsize * values))
            pieces = Pieces(groups, [(i, min(i + block, steps)) for i in range(0, steps, block)])
            neuron = model.lif_parameters(index).detached()
            current, narrow = source(), source if len(inputs) == 1 else None
            guess = partial(likely_threshold, current, pieces, narrow, shape[0])
            threshold = balance(current, pieces, neuron, percentile, output, bar, guess)
            store = inputs[0][0].store
            check_found(threshold, model.layer_names[index], timesteps, percentile,
                        store is not None and not store.spiked and all(
                            getattr(synapse, 'bias', None) is None for _, synapse in inputs))
            thresholds.append(threshold)
            sources = {number: each for number, each in sources.items() if number in needed}
            sources[index] = Source(output, SpikeTrain(None, shape, 0, pools=stage.pools),
                                    threshold / carried[index] if carried else 1.0)
            steps = kept_steps
    return thresholds


def groups_of(images: torch.Tensor, values: int) -> list[slice]:
    """The images in groups, the smallest part that is run again (see balance); the steps make up the batch.

    values: of one image at one step, at most.
    """
    size = max(1, min(16, len(images) // 8, BLOCK_BYTES // 2 // (values * images.itemsize)))
    return [slice(i, min(i + size, len(images))) for i in range(0, len(images), size)]


def check_found(threshold: float, name: str, timesteps: int, percentile: float, silent: bool) -> None:
    """Raise DeadLayerError unless a threshold is above 0 and finite. silent: its input has no spikes and no bias."""
    if 0 < threshold < math.inf:
        return
    if silent:
        why = (f'never receives a spike within {timesteps} time steps: balance over more steps or images, or train the '
               'ANN further')
    elif percentile == 100 or threshold:
        why = f'has an input of {threshold} at most, so no threshold can be found: train the ANN again'
    else:
        why = (f'has an input whose {percentile}th percentile is not above 0, so no threshold can be found: take a '
               'higher percentile, or train the ANN further')
    raise DeadLayerError(f'{name} {why}')


def _balance_plain(model, images, timesteps, percentile, progress):
    """The thresholds of a PlainNetwork, one LIF after another: what each is given comes from the spikes of those before
    it, by the part of the network between them."""
    ways, lifs, weight = segments(model), model.lifs, weight_of(model)
    model.timesteps = 1
    with torch.autocast(weight.device.type, enabled=False):
        currents = {record.name: (record.current.shape, record.current.dtype)
                    for record in model.record(images[:1].to(weight.device, weight.dtype))}
    shapes = {name: tuple(shape[2:]) for name, (shape, _) in currents.items()} | {'input': tuple(images.shape[1:])}
    # of an image, which the network may cut into several samples
    sizes = {name: math.prod(shape[1:]) for name, (shape, _) in currents.items()} | {
        'input': math.prod(images.shape[1:])}
    values = [sizes[name] + sum(sizes[source] for source in way.sources) for name, way in zip(model.layer_names, ways)]
    groups, repeats = groups_of(images, max(values)), [each for each in model.modules() if isinstance(each, Repeat)]
    stores, worth, thresholds = {}, {}, []
    encoding = ENCODINGS[model.encoding]
    if not encoding.constant:
        stores['input'] = SpikeStore(timesteps, sizes['input'])
        for group in groups:
            for t in range(timesteps):
                spikes = encoding.fires(images[group], t, model.input_layer.rate)
                stores['input'].write(group, t, spikes.flatten(1)[None])

    def values_of(source, group, first, stop):
        if source not in stores:  # direct input
            return images[group].to(weight.device, weight.dtype, copy=True)  # their potentials are written over them
        spikes = stores[source].read(group, first, stop, weight.device).flatten(0, 1).view(-1, *shapes[source])
        if source == 'input':
            return spikes * images[group].sign().to(weight.device, weight.dtype).repeat(
                stop - first, *[1] * (images.dim() - 1))
        return spikes * worth[source]

    with (tqdm(total=len(lifs) * len(groups), desc='thresholds', disable=None if progress else True) as bar,
          torch.autocast(weight.device.type, enabled=False)):
        for number, (name, lif, way) in enumerate(zip(model.layer_names, lifs, ways)):
            def current(group, first, stop, lif=lif, way=way):
                for repeat in repeats:
                    repeat.timesteps = stop - first
                found = way.current(*(values_of(source, group, first, stop) for source in way.sources))
                found = found if lif.bounds is None else found / along_channels(lif.bounds, found)
                found = found.reshape(1 if lif.once else stop - first, group.stop - group.start, -1)
                return found.to(torch.promote_types(found.dtype, torch.float32)).expand(stop - first, -1, -1)

            needed = {source for later in ways[number + 1:] for source in later.sources}
            output = SpikeStore(timesteps, sizes[name], model.delay) if name in needed else None
            block = max(1, CHUNK_BYTES[weight.device.type] // (groups[0].stop * weight.itemsize * values[number]))
            pieces = Pieces(groups, [(i, min(i + block, timesteps)) for i in range(0, timesteps, block)])
            guess = partial(likely_threshold, current, pieces)
            threshold = balance(current, pieces, lif.parameters_of().detached(), percentile, output, bar, guess)
            silent = any(source in stores for source in way.sources) and threshold == 0 and not any(
                stores[source].spiked for source in way.sources if source in stores)
            check_found(threshold, name, timesteps, percentile, silent)
            thresholds.append(threshold)
            stores = {source: store for source, store in stores.items() if source in needed}
            if output is not None:
                stores[name] = output
                dtype = currents[name][1]  # the network may change its type on the way
                worth[name] = torch.tensor(threshold, dtype=dtype, device=weight.device)
                if lif.bounds is not None:
                    worth[name] = worth[name] * lif.bounds.to(dtype).view(-1, *[1] * (len(shapes[name]) - 1))
    return thresholds


def current_source(inputs: list[tuple[Source, nn.Module | None]], images: torch.Tensor | None, dtype: torch.dtype,
                   device: torch.device, channels: slice | torch.Tensor = slice(None)) -> Callable:
    """A function (group, first, stop) -> (m, b, N) currents of a layer, from stored spikes or from direct input.

    inputs: pairs of a Source and the synapse that it comes in through. images: (B, C, H, W) that are the direct input
    or whose signs the spikes have, or None. channels: indices of the output channels that are wanted; all of them
    unless given, which a layer of several inputs needs.
    """
    weights = [prepare(synapse.weight[channels], synapse.weight.dtype) * source.worth
               if hasattr(synapse, 'weight') else None for source, synapse in inputs]
    compute_dtype = next(weight.dtype for weight in weights if weight is not None)
    biases = [None if getattr(synapse, 'bias', None) is None else synapse.bias.detach()[channels]
              for _, synapse in inputs]

    def current(group, first, stop):
        steps, synapses = stop - first, []
        for (store, train, worth), synapse in inputs:
            if train.constant:
                part = DirectInput(images[group].to(device), train.shape, steps)
            else:
                mask = None if images is None else flatten(images[group].sign(), 1)[0].to(device, dtype)
                if worth != 1 and not hasattr(synapse, 'weight'):
                    mask = torch.full((), worth, dtype=dtype, device=device).expand(group.stop - group.start, 1)
                part = SpikeTrain(store.read(group, first, stop, device), train.shape, 0, mask=mask, pools=train.pools)
            synapses.append(SynapticInput(part, synapse))
        return input_current(synapses, (0, steps), weights, biases, slice(None), dtype,
                             compute_dtype).expand(steps, -1, -1)

    return current


def balance(current: Callable, pieces: Pieces, neuron: LIFParameters, percentile: float, output: SpikeStore | None,
            bar: tqdm, guess: Callable) -> float:
    """The largest of the currents over all pieces, or a percentile of them; `output` is given the spikes at that.

    current: (group, first, stop) -> (m, b, N). guess: gives one of the currents that is likely the largest.

    Spikes need the threshold, and the threshold needs every current. So that currents need not be found twice, spikes
    are found along with the maximum, at the maximum so far; a group's are valid if it did not grow since. It seldom
    grows, as it starts from a current that is likely the largest.
    """
    if not pieces.blocks:  # the delays of the layers before have used up every step
        return 0.0
    if percentile < 100:
        threshold, last_growth = current_percentile(current, pieces, percentile, bar), len(pieces.groups)
    else:
        threshold, last_growth = 0.0, 0
        if output is not None:
            threshold = guess()
        for number, group in enumerate(pieces.groups):
            before, threshold = threshold, largest_current(current, group, pieces, neuron, threshold, output)
            if threshold > before:
                last_growth = number + 1
            bar.update()
    if output is not None and 0 < threshold < math.inf:
        for group in pieces.groups[:last_growth]:
            write_spikes(current, group, pieces, neuron._replace(threshold=threshold), output)
    return threshold


def largest_current(current: Callable, group: slice, pieces: Pieces, neuron: LIFParameters, least: float,
                    output: SpikeStore | None) -> float:
    """The largest current of a group, at least `least`; infinite if one is no number.

    `output` is given the spikes at the threshold `least` for as long as no current is larger.
    """
    state = None
    for first, stop in pieces.blocks:
        step_currents = current(group, first, stop)
        largest = step_currents.max().item()
        if math.isnan(largest):
            return math.inf
        if largest > least:
            least, output = largest, None
        if output is not None:
            state = write_block(step_currents, group, first, neuron._replace(threshold=least), output, state)
    return least


def write_spikes(current: Callable, group: slice, pieces: Pieces, neuron: LIFParameters, output: SpikeStore) -> None:
    """Give `output` the spikes of a group."""
    state = None
    for first, stop in pieces.blocks:
        state = write_block(current(group, first, stop), group, first, neuron, output, state)


def write_block(step_currents: torch.Tensor, group: slice, first: int, neuron: LIFParameters, output: SpikeStore,
                state: tuple | None) -> tuple:
    """Give `output` the spikes that currents (m, b, N) cause from the step `first` on; state: as for lif_forward."""
    spikes = torch.empty(step_currents.shape, dtype=torch.bool, device=step_currents.device)
    flat = step_currents.flatten(1)
    state = lif_forward(flat, spikes.flatten(1), neuron, state,
                        potentials=flat if step_currents.is_contiguous() else None)
    output.write(group, first, spikes)
    return state


def current_percentile(current: Callable, pieces: Pieces, percentile: float, bar: tqdm) -> float:
    """A percentile of the currents, by nearest rank and to 2 / BINS of the largest; 0 if it is not above 0."""
    counts, top, total = torch.zeros(BINS, dtype=torch.float64, device='cpu'), 0.0, 0  # of currents in 0 ... top
    for group in pieces.groups:
        for block in pieces.blocks:
            values = current(group, *block).flatten()
            values = values.to(at_least_float32(values.dtype))  # in which histc counts
            largest = values.max().item()
            if not math.isfinite(largest):
                return math.inf
            top = top or max(0.0, largest)
            while top < largest:
                top *= 2
                counts = torch.cat([counts.view(-1, 2).sum(1), counts.new_zeros(BINS // 2)])
            if top:
                for part in values.split(2 ** 24):  # up to which float32 counts exactly
                    counts += torch.histc(part, BINS, 0, top).cpu()
            total += len(values)
        bar.update()
    # of n values in ascending order the 1 + round(p (n - 1))th
    above = total - 1 - round(percentile / 100 * (total - 1))
    index = int((counts.flip(0).cumsum(0).flip(0) > above).sum()) - 1  # the last bin with more than that from it on
    return (index + 1) / BINS * top if index > 0 else 0.0


def likely_threshold(current: Callable, pieces: Pieces, narrow: Callable | None = None, channels: int = 1) -> float:
    """A current of the layer that is likely its largest, 0 or more.

    The eighth of the channels with the largest currents in the last few steps is searched over all steps, which takes
    little time; without `narrow`, it is the largest in those steps.
    """
    groups, blocks = pieces
    steps = blocks[-1][1]
    few = max(1, steps // 16)
    late = [(max(i, steps - few), stop) for i, stop in blocks if stop > steps - few]
    if narrow is None:
        return max(0.0, *(current(group, i, stop).max().item() for group in groups for i, stop in late))
    # currents are stored channels-last: (m, b, H * W * C); of each step the largest, as one outlier says little
    largest = sum(current(group, i, stop).view(stop - i, -1, channels).amax(1).sum(0)
                  for group in groups for i, stop in late)
    few_channels = narrow(largest.topk(-(-channels // 8)).indices)
    _, group, block = max(((few_channels(group, *block).max().item(), group, block)
                           for group in groups for block in blocks), key=lambda found: found[0])
    # found by the same product as later on: another one's last bit may differ
    return max(0.0, current(group, *block).max().item())
