"""The connections of a spiking network, found by a pass of spikes along its graph."""
import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from experiment.graph import NORMS, BlankPass, Pass, identity
from self_models import traced
from self_models.encoding import ENCODINGS
from self_models.layers import Scale
from self_models.plain import HeldDropout
from self_models.spiking_network import SpikingNetwork

PASSED = (HeldDropout, Scale, NORMS)  # modules that change values, not the number of spikes
CONSTANTS = {F.pad, *traced.CATS}  # which may put values beside the spikes
CASTS = {*traced.CASTS, 'type'}
ROWS = 64  # of a pool's input that are processed at once


@dataclasses.dataclass
class Layer:
    """Sums over images of what a layer did. surrogate: counts of its arguments, see delta_t and z_counts in count.py.

    spikes: (n,) at each of n steps; NaN for direct input, which has none.
    """
    name: str
    neurons: int
    threshold: float | None  # None: the input
    first_step: int = 0
    spikes: torch.Tensor | int = 0
    surrogate: torch.Tensor | int = 0
    leak: float | None = None


@dataclasses.dataclass
class Connection:
    """The connections from one layer to another, and sums over images of what went through them.

    fan_out: (k, ...) connections of each input, after pools, of the k samples that an image is cut into, most often 1.
    macs: of an image at one step; additions: of a plain identity in the ANN. biases: neurons that a bias is added to at
    each of bias_steps steps. constant: direct input, no spikes. mac_steps: at how many steps its MACs are computed: 0
    for spikes, 1 for direct input, all for the output of another synapse. nonzero_operations: of each input that is not
    0, however many spikes are in it.
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
    spikes: float = 0
    operations: float = 0
    nonzero_operations: float = 0
    biases: int = 0
    bias_steps: int = 0
    constant: bool = False
    mac_steps: int = 0


class Flow(NamedTuple):
    """What one call of the graph passes to the next.

    spikes: (rows, ...) the number of spikes that no synapse has taken yet, steps outermost; or a tuple of such tensors.
    sources: the layers that they come from, {name: (n,) their spikes at each step}. real: there are other values than
    spikes; constant: all is the same at each step. through: the connections that it came through last. biased: whether
    something is added to it at each step.
    """
    spikes: torch.Tensor | tuple
    sources: dict[str, torch.Tensor | None]
    real: bool = False
    constant: bool = False
    through: tuple[str, ...] = ()
    biased: bool = False


def joined(flows: list[Flow]) -> Flow:
    """The input of a call with several; its spikes are those of the first."""
    return Flow(
        flows[0].spikes, {name: spikes for each in flows for name, spikes in each.sources.items()},
        any(each.real for each in flows), all(each.constant for each in flows),
        tuple(dict.fromkeys(name for each in flows for name in each.through)), any(each.biased for each in flows))


class Walk(Pass):
    """A Pass of spikes.

    A subclass defines source(layer, value, node), the Flow of the input or of an LIF layer whose call gives `value`,
    and meet(name, kind, flow, connect, padded_macs) for a Flow that reaches a connection. connect: gives the
    connection's output with weights of 1.
    """

    def __init__(self, network: SpikingNetwork):
        super().__init__(network)
        self.calls, self.constant = Counter(), ENCODINGS[network.encoding].constant
        self.weight = next(network.parameters())

    def made(self, node: fx.Node, value: object, before: list[Flow]) -> Flow | None:
        layer, flow = 'input' if node.op == 'placeholder' else self.layer_of(node), None
        if before:
            with torch.autocast(self.weight.device.type, enabled=False):
                flow = self.behind(node, layer, value, before)
        return self.source(layer, value, node) if layer else flow

    def behind(self, node: fx.Node, layer: str | None, value: torch.Tensor, before: list[Flow]) -> Flow | None:
        """The Flow behind a call that is no source."""
        flow, module, function = joined(before), self.module_of(node), self.function_of(node)
        if layer or node.op == 'output':
            return self.arrive(layer or node.target, flow)
        if function is identity:
            self.meet(node.args[1], 'identity', flow, lambda x: x)
            return flow._replace(spikes=nothing(value), sources={})
        if isinstance(module, traced.SYNAPSES) or function in traced.FUNCTION_SYNAPSES | traced.MATRIX_PRODUCTS:
            return self.synapse(node, module, flow, value)
        return self.passed(node, module, flow, value, before)

    def arrive(self, layer: str, flow: Flow) -> None:
        """What reaches neurons, or the output, without a synapse."""
        if flow.sources:
            self.meet(f'{layer}.identity', 'identity', flow, lambda x: x)

    def replay(self, node: fx.Node, instead: Callable) -> object:
        """A call with instead(argument) for each argument that is a call's."""
        return getattr(self, node.op)(node.target, *fx.node.map_arg((node.args, node.kwargs), instead))

    def synapse(self, node: fx.Node, module: nn.Module | None, flow: Flow, value: torch.Tensor) -> Flow:
        """The Flow behind a synapse, which has no spikes any more."""
        bias = traced.argument(node, 2, 'bias') if module is None else module.bias
        weight = module.weight if module is not None else next(
            self.env[each] for each in node.all_input_nodes if each not in self.found and each is not bias)

        def connect(x):
            def given(each):
                other = self.env[each]
                ones = torch.ones_like(other, dtype=x.dtype) if isinstance(other, torch.Tensor) else other
                return x if each in self.found else None if each is bias else ones
            return self.replay(node, given) if module is None else ones_through(module, x, value.shape[2:])

        name = node.target if module is not None else node.name
        self.calls[name] += 1
        name = f'{name} ({self.calls[name]})' if self.calls[name] > 1 else name
        product = self.function_of(node) in traced.MATRIX_PRODUCTS
        kind = 'linear' if product or weight.dim() < 3 else 'conv' + 'x'.join(map(str, weight.shape[2:]))
        if product:  # a sum over the last dimension of what is in front of the @
            macs = value.numel() * (flow.spikes if traced.source_of(node) in self.found else weight).shape[-1]
        else:
            turned = 'ranspose' in str(node.target if module is None else type(module))
            macs = math.prod(weight.shape[1:]) * (flow.spikes if turned else value).numel()
        self.meet(name, kind, flow, connect, macs)
        return Flow(nothing(value), {}, True, flow.constant, (name,), flow.biased or bias is not None)

    def passed(self, node: fx.Node, module: nn.Module | None, flow: Flow, value: torch.Tensor,
               before: list[Flow]) -> Flow:
        """The Flow behind a call that passes spikes on."""
        def call(x=None, blank=False):
            def given(each):
                if each not in self.found:
                    return self.env[each]
                spikes = self.found[each].spikes if x is None else x
                spikes = spikes.float() if getattr(spikes, 'dtype', None) == torch.bool else spikes
                return fx.node.map_aggregate(spikes, torch.zeros_like) if blank else spikes
            return self.replay(node, given)

        def others():
            """The numbers and weights of a sum or a product."""
            given = [each for each in (*node.args, node.kwargs.get('other')) if each is not None]
            return [self.env.get(each, each) for each in given
                    if each not in self.found and not traced.adds_nothing(node, each)]

        def pooled():
            name = type(module).__name__ if module is not None else function.__name__
            if f'{spikes.dim() - 1}d' in name:  # of a tensor without channels, (B, W) or (B, H, W)
                return add_up(lambda x: call(x.squeeze(1)).unsqueeze(1), spikes.unsqueeze(1)).squeeze(1)
            return add_up(call, spikes)

        spikes, biased, function = flow.spikes, flow.biased, self.function_of(node)
        if isinstance(module, PASSED) or function in CASTS:
            biased |= isinstance(module, NORMS)
        elif function in traced.SUMS:
            there = [each.spikes for each in before if each.sources] or [spikes]
            spikes = there[0] if len(there) == 1 else sum(each.float() for each in there)
            spikes, biased = spikes.broadcast_to(len(spikes), *value.shape[1:]), biased or bool(others())
        elif function in traced.PRODUCTS:
            spikes = math.prod([torch.as_tensor(each, device=spikes.device) != 0 for each in others()], start=spikes)
        elif isinstance(module, traced.MAX_POOLS) or traced.is_max_pool(function):
            spikes = pooled() if flow.real else call()
        elif isinstance(module, (*traced.POOLS, nn.Upsample)) or function is F.interpolate or traced.is_pool(function):
            spikes = pooled()
        elif isinstance(module, nn.modules.padding._ConstantPadNd) or function in CONSTANTS:
            constants = call(blank=True)  # no spikes
            spikes, biased = call() - constants, biased or bool(constants.any())
        else:
            spikes = call()
            if function in ('mean', torch.mean):
                spikes = spikes * (flow.spikes.numel() / spikes.numel())
        return flow._replace(spikes=spikes, biased=biased)


class Outline(Walk, BlankPass):
    """A Walk in which every neuron spikes once: it finds the layers and connections, without counts.

    layers, connections: {name: Layer}, {name: Connection}.
    """

    def __init__(self, network: SpikingNetwork, shape: tuple):
        super().__init__(network)
        self.layers, self.connections = {}, {}
        self.parameters = dict(zip(network.layer_names, zip(network.thresholds.tolist(), network.leaks.tolist())))
        self.run(self.weight.new_zeros(1, *shape))

    def source(self, layer: str, value: torch.Tensor, node: fx.Node) -> Flow:
        threshold, leak = self.parameters.get(layer, (None, None))
        self.layers[layer] = Layer(layer, value.numel(), threshold, leak=leak)
        constant = self.constant and layer == 'input'
        return Flow(torch.ones_like(value), {layer: None}, constant, constant)

    def meet(self, name: str, kind: str, flow: Flow, connect: Callable, padded_macs: int = 0) -> None:
        plain, spikes, steps = kind == 'identity', flow.spikes.double(), self.network.timesteps
        with torch.enable_grad():
            ones = torch.ones_like(spikes, requires_grad=True)
            fan_out, = torch.autograd.grad(connect(ones).sum(), ones)
        reached = int((fan_out * ((spikes > 0) | bool(flow.through and not plain))).sum())
        self.connections[name] = Connection(
            name, kind, sum(self.layers[each].neurons for each in flow.sources), 0, steps, fan_out,
            macs=0 if plain else reached, macs_with_padding=padded_macs, additions=reached if plain else 0,
            constant=flow.constant, mac_steps=0 if plain or not flow.real else 1 if flow.constant else steps)

    def arrive(self, layer: str, flow: Flow) -> None:
        super().arrive(layer, flow)
        if flow.biased:  # two biases that meet at a neuron count as one
            through = [self.connections[name] for name in flow.through or [f'{layer}.identity']]
            own = [each for each in through if each.constant == flow.constant]
            (own or through)[0].biases += flow.spikes.numel()


def nothing(value: torch.Tensor) -> torch.Tensor:
    """No spikes, in the shape of a value."""
    return value.new_zeros(()).expand(value.shape)


def ones_through(module: nn.Module, x: torch.Tensor, size: torch.Size | None = None) -> torch.Tensor:
    """The outputs of a convolution or linear layer of weights 1 without a bias. size: (H, W) of the outputs of a
    transposed convolution, if it was called with one."""
    if isinstance(module, nn.Linear):
        return x.sum(-1, keepdim=True).expand(*x.shape[:-1], module.out_features)
    weight = x.new_ones(()).expand(module.weight.shape)
    if module.transposed:
        whole = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in zip(
            x.shape[2:], module.stride, module.padding, module.dilation, module.kernel_size)]
        further = module.output_padding if size is None else [a - b for a, b in zip(size, whole)]
        return getattr(F, f'conv_transpose{x.dim() - 2}d')(x, weight, None, module.stride, module.padding, further,
                                                           module.groups, module.dilation)
    return module._conv_forward(x, weight, None)  # with its padding mode


def add_up(pool: Callable, x: torch.Tensor) -> torch.Tensor:
    """(n, C, ...) through a pool, or an interpolation, with 1 in place of each weight that is not 0.

    Its dimensions are independent: for each, the outputs of a line of ones at each place tell which weights are not 0.
    """
    reached, size = [], x.shape[2:]
    for d, n in enumerate(size):
        lines = torch.eye(n, device=x.device).view(n, 1, *[n if i == d else 1 for i in range(len(size))])
        reached.append(pool(lines.expand(n, 1, *size).contiguous()).movedim(d + 2, 1).flatten(2)[..., 0] != 0)

    def through(x):
        for d, line in enumerate(reached, 2):
            x = torch.tensordot(x, line.to(x.dtype), ([d], [0])).movedim(-1, d)
        return x
    return torch.cat([through(part.float()) for part in x.split(ROWS)])
