"""Counting what a spiking network does on the test images: spikes, synaptic operations, the surrogate's arguments.

`measure` counts in one pass over the test images, batch by batch and layer by layer; only sums are kept.
"""
import argparse
import math
from collections.abc import Callable

import torch
from torch import fx
from tqdm import tqdm

from experiment import engine
from experiment.data import Data, epoch_loader
from experiment.reporting.connections import Connection, Flow, Layer, Outline, Walk, nothing
from self_models.plain import PlainNetwork
from self_models.spike_train import unflatten
from self_models.spiking_network import SpikingNetwork

Z_EDGES = [i / 10 for i in range(-30, 31)]  # of the histogram of z


def delta_t(spikes: torch.Tensor) -> torch.Tensor:
    """(n,) how often each Δt occurred, for spikes (n, ...) bool; at 0: never fired before.

    Δt is the number of steps since the neuron's last *earlier* spike, as in the gradient of STDB.
    """
    since = torch.zeros(spikes[0].numel(), dtype=torch.int64, device=spikes.device)
    counts = 0
    for fired in spikes.flatten(1):
        counts = counts + torch.bincount(since, minlength=len(spikes))
        since += since > 0
        since[fired] = 1
    return counts.double()


def z_counts(u: torch.Tensor, threshold: float) -> torch.Tensor:
    """(len(Z_EDGES) + 1,) how often z = u / theta - 1 was below, between two, and above all of Z_EDGES.

    u: the potentials that decide about spikes; they are overwritten. A bin contains its upper edge, so that a neuron at
    rest, z = -1, is outside of Linear's triangle.
    """
    # the number of Z_EDGES, which are tenths, below z
    below = u.div_(threshold).sub_(1).mul_(10).ceil_().sub_(10 * Z_EDGES[0]).clamp_(0, len(Z_EDGES))
    return torch.bincount(below.long().flatten(), minlength=len(Z_EDGES) + 1).double()


@torch.no_grad()
def measure(model: SpikingNetwork, data: Data, device: torch.device, args: argparse.Namespace,
            ) -> tuple[list[Layer], list[Connection]]:
    """One pass over the test images, with the same random draws as their test.

    The layers are the input and every LIF layer; the connection to the output comes last.
    """
    model.eval()
    outline = Outline(model, data.input_shape)
    count = PlainCount if isinstance(model, PlainNetwork) else LayerCount
    engine.seed_all(engine.seed_for(args.seed, 0))
    loader = epoch_loader(data.test, args.batch_size, args.num_workers, pin_memory=device.type == 'cuda')
    with engine.autocast(device, args.amp):
        for images, _ in tqdm(loader, desc='report', leave=False, disable=None):
            count(model, outline, images.to(device, non_blocking=True)).run()
    return list(outline.layers.values()), list(outline.connections.values())


class PlainCount(Walk):
    """A Walk of the spikes of a PlainNetwork on a batch of images, at all steps; it adds them to an Outline.

    window: the first step and the number of steps of the next layer.
    """

    def __init__(self, network: SpikingNetwork, outline: Outline, images: torch.Tensor):
        super().__init__(network)
        self.outline, self.images, self.window = outline, images, (0, network.timesteps)

    def run(self) -> None:
        super().run(self.network.encode(self.images))

    def spikes_of(self, layer: str, value: torch.Tensor, node: fx.Node) -> tuple[torch.Tensor, int, Callable]:
        """Of a layer (spikes (n, B, ...) bool, their first step, what gives the potentials that it fired on)."""
        def potentials():
            return [self.network._recorded(layer, self.module_of(node), self.env[node.args[0]]).potentials]
        return (value != 0).unflatten(0, (self.network.timesteps, -1)), 0, potentials

    def source(self, layer: str, value: torch.Tensor, node: fx.Node) -> Flow:
        found = self.outline.layers[layer]
        if layer == 'input' and self.constant:
            by_step = torch.full((self.window[1],), math.nan, dtype=torch.float64)
            flow = Flow(nothing(value), {layer: by_step}, real=True, constant=True)
        else:
            spikes, found.first_step, potentials = self.spikes_of(layer, value, node)
            # ten times as fast as sum((1, 2))
            by_step = torch.stack([fired.count_nonzero() for fired in spikes]).double()
            flow = Flow(spikes.flatten(0, 1), {layer: by_step})
            if layer != 'input':
                found.surrogate = found.surrogate + (delta_t(spikes) if self.network.surrogate.of_spikes else sum(
                    z_counts(u, found.threshold) for u in potentials()))
        found.spikes = found.spikes + by_step
        return flow

    def meet(self, name: str, kind: str, flow: Flow, connect: Callable, padded_macs: int = 0) -> None:
        connection, (start, steps) = self.outline.connections[name], self.window
        connection.first_step = min((self.outline.layers[each].first_step for each in flow.sources), default=0)
        connection.steps, connection.bias_steps = max(0, start + steps - connection.first_step), steps
        if connection.mac_steps:
            return
        batch = len(self.images) * len(connection.fan_out)  # samples
        spikes = flow.spikes[:connection.steps * batch]

        def operations(of):
            total = torch.zeros_like(of[:batch], dtype=torch.float32)
            for step in of.split(batch):  # some ten times as fast as sum(0)
                total += step
            total = total.unflatten(0, (len(self.images), -1)).sum(0, dtype=torch.float64)
            return (total * connection.fan_out).sum().item()

        connection.spikes += sum(each[:connection.steps].nansum().item() for each in flow.sources.values())
        connection.operations += operations(spikes)
        connection.nonzero_operations += operations(spikes != 0)


class LayerCount(PlainCount):
    """The same for a layer-by-layer network, at the steps that can reach the output."""

    def run(self) -> None:
        self.records = self.network.record(self.images)
        self.next_record()
        Walk.run(self, self.weight.new_zeros(1, *self.images.shape[1:]))  # for the shapes

    def next_record(self) -> None:
        self.record = next(self.records, None)
        self.window = self.record.window if self.record else (0, self.network.timesteps)

    def spikes_of(self, layer: str, value: torch.Tensor, node: fx.Node) -> tuple[torch.Tensor, int, Callable]:
        train, record = self.record.spikes, self.record
        if layer == 'input':
            train = record.inputs[0].train
        else:
            self.next_record()
        spikes = unflatten(train.spikes, train.shape).unflatten(0, train.spikes.shape[:2])
        return spikes, train.start, lambda: (u for _, _, u in record.potentials())
