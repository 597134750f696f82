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

from self_models.lif import LIFParameters, lif_forward
from self_models.lif_layer import CHUNK_BYTES, SynapticInput, dtypes, input_current, prepare
from self_models.spike_train import DirectInput, SpikeTrain, at_least_float32, flatten
from self_models.spiking_network import SpikingNetwork

BLOCK_BYTES = 128 << 20  # the most float memory of a convolution or product, but for a single image at a single step
SPOOL_BYTES = 256 << 20  # a layer's spikes are kept in memory up to this, beyond it in a temporary file
BINS = 2 ** 16  # of the histogram that a percentile is read from


class DeadLayerError(ValueError):
    """A layer whose input does not exceed 0, so that no threshold can be found for it."""


class Pieces(NamedTuple):
    """What the work on a layer is cut into: slices of samples, each run through in blocks of steps (first, stop)."""
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

    A layer's threshold is the maximum over images, units and steps of its input current W s, with the layers before
    it spiking at the thresholds already found, at leak 1 and without dropout; or, less at the mercy of outliers, a
    percentile of those currents (as Rueckauer et al. 2017 take one of activations). Of a ResNet only the pre-process
    layers are balanced.

    model: VGG_SNN_STDB or RESNET_SNN_STDB; it is left at the thresholds found, else as it was.
    images: (B, C, H, W), on any device. timesteps: T, 1 or more. progress: show a bar on a terminal.
    percentile: in (0, 100], where 100 is the maximum; found to 1 / 32768 of that, and in twice its time.
    Raises DeadLayerError, a ValueError, for a layer whose threshold would not exceed 0 or is not finite, and ValueError
    for timesteps < 1, a percentile out of range and images that are no floats of that shape.

    Memory grows neither with B nor with T: images go through a few at a time, a few steps at a time, and a layer's
    spikes wait for the next layer as bits, in a temporary file where they are many (B T N / 8 bytes).
    """
    if images.dim() != 4 or not len(images) or not images.is_floating_point():
        raise ValueError(f'images must be floats of shape (B, C, H, W) with B of 1 or more, not {tuple(images.shape)} '
                         f'of {images.dtype}')
    if not 0 < percentile <= 100:
        raise ValueError(f'percentile must be above 0 and at most 100, not {percentile}')
    before = (model.timesteps, model.initial_leak), model.leaks.tolist()
    model.network_update(timesteps, 1.0)
    try:
        thresholds = _balance_all(model, images, timesteps, percentile, progress)
    finally:
        model.network_update(*before[0])
        model.leak_update(before[1])
    model.threshold_update(1.0, thresholds)
    return thresholds


def _balance_all(model, images, timesteps, percentile, progress):
    """The thresholds, one layer after another; find_thresholds without its care for the model."""
    # a group is what runs again at the least (see balance); the steps make up the batch
    shape = tuple(images.shape[1:])
    fitting = BLOCK_BYTES // 2 // (model.largest_convolution(shape) * images.itemsize)
    size = max(1, min(16, len(images) // 8, fitting))
    groups = [slice(i, min(i + size, len(images))) for i in range(0, len(images), size)]
    stages = model.balanced_stages()
    device, dtype = stages[0][0].weight.device, dtypes(stages[0][0].weight)[0]
    if model.encoding == 'direct':
        train, store = DirectInput(None, shape, timesteps), None
    else:
        # of the input only the bits are stored; a pixel's sign is the mask of its train
        train, store = SpikeTrain(None, shape, 0), SpikeStore(timesteps, images[0].numel())
        for group in groups:
            for t in range(timesteps):
                store.write(group, t, flatten(model.input_layer.fires(images[group]), 1))
    steps, thresholds = timesteps, []
    with (tqdm(total=len(stages) * len(groups), desc='thresholds', disable=None if progress else True) as bar,
          torch.autocast(device.type, enabled=False)):
        for index, (synapse, _, pools) in enumerate(stages):
            source = partial(current_source, store, train, images if index == 0 else None, synapse)
            shape = SynapticInput(train, synapse).output_shape()
            later = index + 1 < len(stages)
            # With a delay, what a layer does at its last step reaches nothing. A bias and an initial potential act
            # from the first step on, also before the first spike comes: there the trains begin with empty rows.
            shift = model.delay if synapse.bias is not None or model.initial_potential else 0
            kept_steps = steps if shift else steps - model.delay
            output = SpikeStore(kept_steps, math.prod(shape), shift) if later else None
            memory = max(CHUNK_BYTES[device.type], min(synapse.weight.nbytes, BLOCK_BYTES))
            block = max(1, memory // (size * dtype.itemsize * (math.prod(train.shape) + math.prod(shape))))
            pieces = Pieces(groups, [(i, min(i + block, steps)) for i in range(0, steps, block)])
            neuron = model.lif_parameters(index).detached()
            threshold = balance(source, pieces, shape[0], neuron, percentile, output, bar)
            if not 0 < threshold < math.inf:
                if store is not None and not store.spiked and synapse.bias is None:
                    why = (f'never receives a spike within {timesteps} time steps: balance over more steps or images, '
                           'or train the ANN further')
                elif percentile == 100 or threshold:
                    why = f'has an input of {threshold} at most, so no threshold can be found: train the ANN anew'
                else:
                    why = (f'has an input whose {percentile}th percentile is not above 0, so no threshold can be '
                           'found: take a higher percentile, or train the ANN further')
                raise DeadLayerError(f'{model.layer_names[index]} {why}')
            thresholds.append(threshold)
            store, train, steps = output, SpikeTrain(None, shape, 0, pools=pools), kept_steps
    return thresholds


def current_source(store: SpikeStore | None, train: SpikeTrain | DirectInput, images: torch.Tensor | None,
                   synapse: nn.Module, channels: slice | torch.Tensor = slice(None)) -> Callable:
    """A function (group, first, stop) -> (m, b, N) currents, from the stored spikes of `train`, or from direct input.

    images: (B, C, H, W) that are the direct input or whose signs these spikes have, or None. channels: indices of the
    output channels that are wanted; all of them unless given.
    """
    (dtype, compute_dtype), device = dtypes(synapse.weight), synapse.weight.device
    weight = prepare(synapse.weight[channels], compute_dtype)
    bias = None if synapse.bias is None else synapse.bias.detach()[channels]

    def current(group, first, stop):
        steps = stop - first
        if train.constant:
            part = DirectInput(images[group].to(device), train.shape, steps)
        else:
            mask = None if images is None else flatten(images[group].sign(), 1)[0].to(device, dtype)
            part = SpikeTrain(store.read(group, first, stop, device), train.shape, 0, mask=mask, pools=train.pools)
        return input_current([SynapticInput(part, synapse)], (0, steps), [weight], [bias], slice(None), dtype,
                             compute_dtype).expand(steps, -1, -1)

    return current


def balance(source: Callable, pieces: Pieces, channels: int, neuron: LIFParameters, percentile: float,
            output: SpikeStore | None, bar: tqdm) -> float:
    """The largest of the currents over all pieces, or a percentile of them; `output` is given the spikes at that.

    source: current_source, but for its argument `channels`, of which the layer has so many.

    Spikes need the threshold, and the threshold needs every current. So that currents need not be found twice, spikes
    are found along with the maximum, at the maximum so far; a group's are valid if it did not grow since. It seldom
    grows, as it starts from that of the few channels that look largest, which cost little to run through first.
    """
    if not pieces.blocks:  # the delays of the layers before have used up every step
        return 0.0
    current = source()

    def run(group, threshold):
        at_start, state = threshold, None
        for first, stop in pieces.blocks:
            step_currents = current(group, first, stop)
            if percentile == 100:
                largest = step_currents.max().item()
                if math.isnan(largest):
                    return math.inf
                threshold = max(threshold, largest)
            if output is not None and threshold == at_start:
                spikes = torch.empty(step_currents.shape, dtype=torch.bool, device=step_currents.device)
                flat = step_currents.flatten(1)
                state = lif_forward(flat, spikes.flatten(1), neuron._replace(threshold=threshold), state,
                                    potentials=flat if step_currents.is_contiguous() else None)
                output.write(group, first, spikes)
        return threshold

    if percentile < 100:
        threshold = current_percentile(current, pieces, percentile, bar)
        if output is not None and 0 < threshold < math.inf:
            for group in pieces.groups:
                run(group, threshold)
        return threshold
    threshold, last_growth = 0.0, 0
    if output is not None:
        threshold = likely_threshold(source, current, pieces, channels)
    for number, group in enumerate(pieces.groups):
        before, threshold = threshold, run(group, threshold)
        if threshold > before:
            last_growth = number + 1
        bar.update()
    if output is not None and 0 < threshold < math.inf:
        for group in pieces.groups[:last_growth]:
            run(group, threshold)
    return threshold


def current_percentile(current: Callable, pieces: Pieces, percentile: float, bar: tqdm) -> float:
    """A percentile of the currents, by nearest rank and to 2 / BINS of the largest; 0 where it is not above 0."""
    counts, top, total = torch.zeros(BINS, dtype=torch.float64), 0.0, 0  # of currents in 0 ... top
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


def likely_threshold(source: Callable, current: Callable, pieces: Pieces, channels: int) -> float:
    """A current of the layer that is likely its largest, 0 or more.

    It is where the eighth of the channels that is the largest in the last few steps has its own largest current.
    """
    groups, blocks = pieces
    steps = blocks[-1][1]
    few = max(1, steps // 16)
    late = [(max(i, steps - few), stop) for i, stop in blocks if stop > steps - few]
    # currents are stored channels-last: (m, b, H * W * C); of each step the largest, as one outlier says little
    largest = sum(current(group, i, stop).view(stop - i, -1, channels).amax(1).sum(0)
                  for group in groups for i, stop in late)
    narrow = source(largest.topk(-(-channels // 8)).indices)
    _, group, block = max(((narrow(group, *block).max().item(), group, block) for group in groups for block in blocks),
                          key=lambda found: found[0])
    # found by the same product as later on: another one's last bit may differ
    return max(0.0, current(group, *block).max().item())
