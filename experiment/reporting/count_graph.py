"""Counting what a network of one's own does: count.py's Layers and Connections from the graph of a PlainNetwork.

The spikes of its neurons go along the graph in place of values, so that what comes to a synapse is how many spikes do.
"""
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from experiment.reporting.count import Connection, count_layer, delta_t, z_counts
from self_models.encoding import ENCODINGS
from self_models.layers import Scale
from self_models.plain import LIF, HeldDropout, PlainNetwork, Repeat
from self_models.spike_train import DirectInput, SpikeTrain
from self_models.traced import (
    FUNCTION_SYNAPSES,
    MATRIX_PRODUCTS,
    MAX_POOLS,
    POOLS,
    PRODUCTS,
    SUMS,
    SYNAPSES,
    is_average_pool,
    is_max_pool,
)

NORMS = nn.modules.batchnorm._BatchNorm
PASSED = (Repeat, HeldDropout, Scale, NORMS)  # modules that change values, not how many spikes there are
CASTS = {'to', 'float', 'double', 'half', 'bfloat16', 'type', 'type_as'}
TRANSPOSED = {nn.ConvTranspose1d: F.conv_transpose1d, nn.ConvTranspose2d: F.conv_transpose2d,
              nn.ConvTranspose3d: F.conv_transpose3d}


@dataclasses.dataclass
class Flow:
    """What one call of the graph gives to the next.

    spikes: (n, ...) how many spikes come there that no synapse has taken; or several of them. real: other values than
    spikes are among it; constant: all of it is the same at each step. sources: the neurons that the spikes are from, by
    name. through: the connections that it came through last. biased: whether something is added to it at each step.
    """
    spikes: torch.Tensor | tuple
    real: bool
    constant: bool
    sources: tuple[str, ...]
    through: tuple[str, ...] = ()
    biased: bool = False


class Synapse(NamedTuple):
    """A call of a synapse, or the way of spikes to neurons without one.

    given: its Flow, spikes (1, ...) summed; events: (1, ...) at how many of the n it was not 0. connect: of what is
    given, its outputs at weights of 1.
    """
    kind: str
    given: Flow
    events: torch.Tensor
    connect: Callable
    padded_macs: int = 0


class Walk(fx.Interpreter):
    """One pass of spikes along the graph. sources: (n, ...) of each LIF and of the 'input', by name.

    synapses: what they came to, by name; biases: how many neurons something is added to, by the name of its synapse.
    """

    def __init__(self, model: PlainNetwork, sources: dict[str, torch.Tensor]):
        super().__init__(model._space, graph=model._graph)
        self.sources, self.constant = sources, ENCODINGS[model.encoding].constant
        self.synapses, self.biases = {}, {}
        self.run(sources['input'].float())

    def run_node(self, node):
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.op == 'placeholder':
            return Flow(super().run_node(node), self.constant, self.constant, ('input',))
        flows = [self.env[each] for each in node.all_input_nodes if isinstance(self.env[each], Flow)]
        if not flows:
            return super().run_node(node)
        module = self.fetch_attr(node.target) if node.op == 'call_module' else None
        flow = Flow(flows[0].spikes, any(each.real for each in flows), all(each.constant for each in flows),
                    *(tuple(dict.fromkeys(name for each in flows for name in getattr(each, what)))
                      for what in ('sources', 'through')), any(each.biased for each in flows))
        if isinstance(module, LIF) or node.op == 'output':
            return self.end(node.target, flow)
        if isinstance(module, SYNAPSES) or node.target in FUNCTION_SYNAPSES | MATRIX_PRODUCTS:
            return self.synapse(node, module, args, kwargs, flow)

        def call(x=None):
            given = fx.node.map_aggregate((args, kwargs), lambda each: (
                each if not isinstance(each, Flow) else each.spikes if x is None else x))
            return getattr(self, node.op)(node.target, *given)

        others = [each for each in [*args, kwargs.get('other')] if isinstance(each, (torch.Tensor, int, float))]
        if isinstance(module, PASSED) or node.target in CASTS:
            flow.biased |= isinstance(module, NORMS)
        elif node.target in SUMS:
            flow.spikes = sum([each.spikes for each in flows] + [
                torch.zeros_like(each) for each in others if isinstance(each, torch.Tensor)])
            flow.biased |= bool(others)
        elif node.target in PRODUCTS:
            flow.spikes = math.prod([torch.as_tensor(each, device=flow.spikes.device) != 0 for each in others],
                                    start=flow.spikes)
        elif isinstance(module, MAX_POOLS) or is_max_pool(node.target):
            flow.spikes = add_up(call, flow.spikes) if flow.real else call()
        elif isinstance(module, (*POOLS, nn.Upsample)) or node.target is F.interpolate or is_average_pool(
                getattr(node.target, '__name__', '')):
            flow.spikes = add_up(call, flow.spikes)
        else:
            result = call()
            if not isinstance(result[0] if isinstance(result, (tuple, list)) and result else result, torch.Tensor):
                return result  # a size
            if node.target in ('mean', torch.mean):
                result = result * (flow.spikes.numel() / result.numel())
            flow.spikes = result
        return flow

    def end(self, name, flow):
        """What comes to neurons, or to the output: spikes without a synapse, and a bias."""
        plain = f'{name}.identity'
        if flow.sources:
            self.meet(plain, 'identity', flow, lambda x: x)
        if flow.biased:
            through = flow.through or (plain,)
            own = [each for each in through if self.synapses[each].given.constant == flow.constant]
            name_of = (own or through)[0]
            self.biases[name_of] = self.biases.get(name_of, 0) + flow.spikes[0].numel()
        return Flow(self.sources[name].float(), False, False, (name,)) if name in self.sources else None

    def meet(self, name, kind, flow, *more):
        total = dataclasses.replace(flow, spikes=flow.spikes.sum(0, keepdim=True, dtype=torch.float64))
        self.synapses[name] = Synapse(kind, total, (flow.spikes != 0).sum(0, keepdim=True).double(), *more)

    def synapse(self, node, module, args, kwargs, flow):
        """The Flow behind a synapse, which takes all spikes and gives none."""
        if module is not None:
            weight, bias, connect = module.weight, module.bias, partial(connections, module)
        else:
            tensors = [each for each in (*args, kwargs.get('weight')) if isinstance(each, torch.Tensor)]
            weight, bias = tensors[0], kwargs.get('bias', args[2] if len(args) > 2 else None)

            def connect(x):
                def one(each):
                    return x if isinstance(each, Flow) else torch.ones_like(each, dtype=x.dtype) if isinstance(
                        each, torch.Tensor) else each
                given = [None if i == 2 else one(each) for i, each in enumerate(args)]
                return getattr(self, node.op)(node.target, given, {
                    key: one(each) for key, each in kwargs.items() if key != 'bias'})

        name = node.target if module is not None else node.name
        calls = sum(each.split(' (')[0] == name for each in self.synapses)
        name = f'{name} ({calls + 1})' if calls else name
        out = connect(flow.spikes[:1])
        turned = 'ranspose' in str(node.target if module is None else type(module)) or node.target in MATRIX_PRODUCTS
        kind = 'linear' if weight.dim() < 3 else 'conv' + 'x'.join(map(str, weight.shape[2:]))
        self.meet(name, kind, flow, connect, math.prod(weight.shape[1:]) * (flow.spikes[0] if turned else out).numel())
        nothing = out.new_zeros([1] * out.dim()).expand(len(flow.spikes), *out.shape[1:])
        return Flow(nothing, True, flow.constant, (), (name,), flow.biased or bias is not None)


def connections(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The outputs of a convolution or linear layer of weights 1 without a bias."""
    weight = x.new_ones(()).expand(module.weight.shape)
    if isinstance(module, nn.Linear):
        return F.linear(x, weight)
    transposed = next((call for kind, call in TRANSPOSED.items() if isinstance(module, kind)), None)
    if transposed is None:
        return module._conv_forward(x, weight, None)  # with its padding mode
    return transposed(x, weight, None, module.stride, module.padding, module.output_padding, module.groups,
                      module.dilation)


def add_up(pool: Callable, x: torch.Tensor) -> torch.Tensor:
    """(n, C, ...) through a pool, or an interpolation, with 1 in place of each weight that is not 0.

    Its dimensions are independent: along each, what a line of ones at one place comes to tells which are not 0.
    """
    size = x.shape[2:]
    for d, n in enumerate(size, 2):
        lines = torch.eye(n, device=x.device).view(n, 1, *[n if i == d else 1 for i in range(2, x.dim())])
        reached = pool(lines.expand(n, 1, *size).contiguous()).movedim(d, 1).flatten(2)[..., 0] != 0
        x = torch.tensordot(x, reached.to(x.dtype), ([d], [0])).movedim(-1, d)
    return x


def connections_of(model, sources):
    """{name: Connection} of a network, of which nothing is counted yet. sources: as of Walk, of any number of rows."""
    walk, found = Walk(model, {name: torch.ones_like(rows[:1]) for name, rows in sources.items()}), {}
    for name, synapse in walk.synapses.items():
        given, plain = synapse.given, synapse.kind == 'identity'
        with torch.enable_grad():
            ones = torch.ones_like(given.spikes, requires_grad=True)
            fan_out, = torch.autograd.grad(synapse.connect(ones).sum(), ones)
        reached = int((fan_out * ((given.spikes > 0) | bool(given.through and not plain))).sum())
        constant, steps = given.constant, model.timesteps
        found[name] = Connection(
            name, synapse.kind, sum(sources[each][0].numel() for each in given.sources), 0, steps, fan_out,
            macs=0 if plain else reached, macs_with_padding=synapse.padded_macs, additions=reached if plain else 0,
            biases=walk.biases.get(name, 0), bias_steps=steps, constant=constant,
            mac_steps=0 if plain or not given.real else 1 if constant else steps)
    return found


def count_batch(model, images, layers, connections):
    """As count.count_batch, of a PlainNetwork: all its steps are counted."""
    steps, given, sources, hooks = model.timesteps, model.encode(images), {}, []

    def train_of(x):
        return SpikeTrain(x.unflatten(0, (steps, -1)).flatten(2), tuple(x.shape[1:]), 0)

    def look(name, lif, currents, output):
        sources[name] = output != 0
        train, of_spikes = train_of(sources[name]), model.surrogate.of_spikes
        surrogate = delta_t(train) if of_spikes else z_counts(
            model._recorded(name, lif, currents[0]).potentials, float(lif.threshold))
        count_layer(layers, name, train, lif.parameters_of().detached(), surrogate)

    if ENCODINGS[model.encoding].constant:
        sources['input'] = torch.zeros_like(given[:1], dtype=torch.bool).expand(steps * len(given), *given.shape[1:])
        count_layer(layers, 'input', DirectInput(images, tuple(images.shape[1:]), steps))
    else:
        sources['input'] = given != 0
        count_layer(layers, 'input', train_of(sources['input']))
    for name, lif in zip(model.layer_names, model.lifs):
        hooks.append(lif.register_forward_hook(partial(look, name)))
    try:
        model.run(given)
    finally:
        for hook in hooks:
            hook.remove()
    with torch.autocast(images.device.type, enabled=False):
        if not connections:
            connections |= connections_of(model, sources)
        for name, synapse in Walk(model, sources).synapses.items():
            each = connections[name]
            if not each.mac_steps:
                each.spikes += sum(sources[source].count_nonzero().item() for source in synapse.given.sources)
                each.operations += (synapse.given.spikes * each.fan_out).sum().item()
                each.nonzero_operations += (synapse.events * each.fan_out).sum().item()
