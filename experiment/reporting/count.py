"""Counting what a spiking network does on the test images: spikes, synaptic operations, the surrogate's arguments.

`measure` counts in one pass over the test images, batch by batch; nothing but sums is kept.
"""
import dataclasses
import math

import torch
from torch import nn
from tqdm import tqdm

from experiment import engine
from experiment.data import epoch_loader
from self_models.plain import PlainNetwork

Z_EDGES = [i / 10 for i in range(-30, 31)]  # of the histogram of z


@dataclasses.dataclass
class Layer:
    """Sums over images of what a layer did. surrogate: see delta_t and z_values.

    spikes: (n,) at each of n steps; of direct input n NaNs, as there are none.
    """
    name: str
    neurons: int
    threshold: float | None  # None: the input
    first_step: int
    spikes: torch.Tensor | int = 0
    surrogate: torch.Tensor | int = 0
    leak: float | None = None


@dataclasses.dataclass
class Connection:
    """The connections from one layer to another, and sums over images of what went through them.

    fan_out: connections of each input, (C, H', W') or (features,), after the 2x2 pools. pool: a further pool between
    them or None; value_fan_out: connections of what comes out of it. additions: of a plain identity in the ANN.
    biases: neurons that a bias is added to at each of bias_steps steps. constant: direct input, no spikes. mac_steps:
    how many times an image its MACs are computed: 0 of spikes, 1 of direct input, at each step of what a synapse gives.
    """
    name: str
    kind: str
    neurons: int
    first_step: int
    steps: int
    fan_out: torch.Tensor
    macs: int
    macs_with_padding: int
    additions: int
    pool: nn.Module | None = None
    value_fan_out: torch.Tensor | None = None
    spikes: float = 0
    operations: float = 0
    nonzero_operations: float = 0
    biases: int = 0
    bias_steps: int = 0
    constant: bool = False
    mac_steps: int = 0


def fan_out(branch):
    """To how many outputs each input of a branch is connected: (C, H', W') or (features,), after the pools.

    That is the transposed convolution of ones with ones: at a border a kernel reaches outside and connects less.
    """
    ones = torch.ones(1, *branch.output_shape(), device=branch.train.tensors()[0].device)
    if branch.weight is None:  # an identity, whatever its factor
        return ones[0].double()
    with torch.autocast(ones.device.type, enabled=False):
        weight = torch.ones_like(branch.weight, dtype=torch.float32)
        return branch.input_gradient(ones, branch.turned(weight))[0].double()


def pool_fan_out(pool, shape):
    """In how many windows of a pool each pixel of maps (C, H, W) is; without a pool in 1. Of that shape."""
    if pool is None:
        return torch.ones(shape, dtype=torch.float64)
    _, h, w = shape
    one_pixel_each = torch.eye(h * w).view(h * w, 1, h, w)
    return (pool(one_pixel_each) > 0).sum((1, 2, 3)).view(h, w).double().expand(shape)


def connection_of(name, branch, record):
    """The Connection of a branch into the LIF layer of a LayerRecord."""
    outputs, first, (start, steps), shape = fan_out(branch), branch.train.start, record.window, branch.output_shape()
    plain = branch.weight is None
    kind = ('identity' if plain else 'linear' if isinstance(branch.synapse, nn.Linear)
            else 'conv{}x{}'.format(*branch.synapse.kernel_size))
    # where two inputs of a layer have a bias, the two are added as one: that of the synapse it is named after
    biased = branch.bias is not None and name == record.name
    return Connection(
        name, kind, math.prod(branch.train.shape), first, max(0, start + steps - first), outputs,
        macs=0 if plain else int(outputs.sum()),
        macs_with_padding=0 if plain else branch.weight.numel() * math.prod(shape[1:]),
        additions=int(outputs.sum()) if plain else 0, value_fan_out=outputs,
        biases=math.prod(shape) if biased else 0, bias_steps=steps, constant=branch.train.constant,
        mac_steps=int(branch.train.constant))


def output_connection(model, name, train):
    """The Connection of the last LIF layer with the output layer."""
    layer, pool = model.classifier[-1], getattr(model, 'final_pool', None)
    if isinstance(pool, nn.Identity):
        pool = None
    outputs = layer.out_features * pool_fan_out(pool, train.pooled_shape).to(train.spikes.device)
    return Connection(name, 'linear', math.prod(train.shape), train.start, train.steps, outputs,
                      macs=layer.weight.numel(), macs_with_padding=layer.weight.numel(), additions=0, pool=pool,
                      value_fan_out=torch.full_like(outputs[:1, :1, :1] if pool else outputs, layer.out_features),
                      biases=0 if layer.bias is None else layer.out_features, bias_steps=model.timesteps)


def spikes_by_step(train):
    """(n,) spikes of a train at each step, over all samples and neurons; NaN of direct input."""
    if train.constant:
        return torch.full((train.steps,), math.nan, dtype=torch.float64)
    return torch.stack([fired.count_nonzero() for fired in train.spikes]).double()  # ten times as fast as sum((1, 2))


def synaptic_operations(train, steps, outputs):
    """Sum over the spikes of the first `steps` steps of their neurons' fan-out. outputs: as fan_out() gives it."""
    return (train.spikes_per_input(steps) * outputs).sum().item()


def nonzero_operations(train, steps, outputs, pool=None):
    """The same with each input after the pools that is not 0, whatever its value, taken for one event."""
    if not train.pools and pool is None:
        return synaptic_operations(train, steps, outputs)
    total = 0.0
    for step in range(steps):  # one after another: (B, C, H', W') floats
        values = train.floats(slice(None), slice(step, step + 1), torch.float32)
        values = values if pool is None else pool(values)
        total += ((values != 0).sum(0) * outputs).sum().item()
    return total


def delta_t(train):
    """(n,) how often each Δt was met over the neurons, samples and n steps of a train; at 0: never fired before.

    Δt is the number of steps since the neuron's last *earlier* spike, as for the gradient of STDB.
    """
    since = torch.zeros(train.spikes[0].numel(), dtype=torch.int64, device=train.spikes.device)
    counts = 0
    for fired in train.spikes.flatten(1):
        counts = counts + torch.bincount(since, minlength=train.steps)
        since += since > 0
        since[fired] = 1
    return counts.double()


def z_values(record):
    """z_counts() over the neurons, samples and steps of a LayerRecord."""
    return sum(z_counts(u, float(record.parameters.threshold)) for _, _, u in record.potentials())


def z_counts(u, threshold):
    """(len(Z_EDGES) + 1,) how often z = u / theta - 1 was below, between two, and above all of Z_EDGES.

    u: the potentials that neurons fire on, which are overwritten. A bin holds its upper edge, so that a neuron at rest,
    z = -1, is outside of Linear's triangle.
    """
    # the number of Z_EDGES, which are tenths, below z
    below = u.div_(threshold).sub_(1).mul_(10).ceil_().sub_(10 * Z_EDGES[0]).clamp_(0, len(Z_EDGES))
    return torch.bincount(below.long().flatten(), minlength=len(Z_EDGES) + 1).double()


@torch.no_grad()
def measure(model, data, device, args):
    """One pass over the test images, with the random draws of their evaluation: (layers, connections), both lists.

    layers: the input's and every LIF Layer's. connections: every Connection, the output layer's at the end.
    """
    from experiment.reporting import count_graph  # which builds on this module
    model.eval()
    layers, connections = {}, {}  # by name
    batch = count_graph.count_batch if isinstance(model, PlainNetwork) else count_batch
    engine.seed_all(engine.seed_for(args.seed, 0))
    loader = epoch_loader(data.test, args.batch_size, args.num_workers, pin_memory=device.type == 'cuda')
    with engine.autocast(device, args.amp):
        for images, _ in tqdm(loader, desc='report', leave=False, disable=None):
            batch(model, images.to(device, non_blocking=True), layers, connections)
    return list(layers.values()), list(connections.values())


def count_batch(model, images, layers, connections):
    """Add what a batch of images does to the Layers and Connections, by name; new ones where there are none yet."""
    names = {module: name for name, module in model.named_modules()}
    for index, record in enumerate(model.record(images)):
        name, train = record.name, record.spikes
        if index == 0:
            count_layer(layers, 'input', record.inputs[0].train)
        surrogate = delta_t(train) if model.surrogate.of_spikes else z_values(record)
        count_layer(layers, name, train, record.parameters.detached(), surrogate)
        for branch in record.inputs:
            plain = branch.weight is None
            key = name.rsplit('.residual', 1)[0] + '.identity' if plain else names[branch.synapse]
            if key not in connections:
                connections[key] = connection_of(key, branch, record)
            count_connection(connections[key], branch.train)
    key = names[model.classifier[-1]]
    if key not in connections:
        connections[key] = output_connection(model, key, train)
    count_connection(connections[key], train)


def count_layer(layers, name, train, parameters=None, surrogate=0):
    """Add a batch's train to the Layer of that name, a new one where there is none yet.

    parameters: the LIFParameters; None of the input.
    """
    if name not in layers:
        threshold, leak = (float(parameters.threshold), float(parameters.leak)) if parameters else (None, None)
        layers[name] = Layer(name, math.prod(train.shape), threshold, train.start, leak=leak)
    layer = layers[name]
    layer.spikes = layer.spikes + spikes_by_step(train)
    layer.surrogate = layer.surrogate + surrogate


def count_connection(connection, train):
    """Add what a batch's train sends through the Connection; of direct input nothing is to be counted."""
    if connection.constant:
        return
    connection.spikes += spikes_by_step(train)[:connection.steps].sum().item()
    connection.operations += synaptic_operations(train, connection.steps, connection.fan_out)
    connection.nonzero_operations += nonzero_operations(train, connection.steps, connection.value_fan_out,
                                                        connection.pool)
