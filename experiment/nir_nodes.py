"""The nodes of a NIR graph, made call by call along the graph of a spiking network, as far as NIR knows what is called.

Importers (SpikingJelly, snnTorch) know less than NIR does: no nir.Scale, no groups, one threshold for all neurons of a
layer. So a factor of channels goes into the weights behind it, or becomes a convolution of 1 pixel.
"""
import math
import operator
from collections.abc import Sequence
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import NoReturn

import numpy as np
import torch
from torch import fx, nn

from experiment import UserError
from experiment.graph import NORMS, BlankPass, identity
from self_models.conversion import folded_layer
from self_models.layers import Scale
from self_models.plain import LIF, HeldDropout, Repeat
from self_models.spiking_network import SpikingNetwork
from self_models.traced import (
    CATS,
    MAX_POOLS,
    PRODUCTS,
    QUOTIENTS,
    SUMS,
    adds_nothing,
    argument,
    is_max_pool,
    said,
    source_of,
)

SYNAPSES = (nn.Conv1d, nn.Conv2d, nn.Linear)
SHAPED = {identity, 'view', 'reshape', torch.reshape, 'flatten', torch.flatten, 'squeeze', torch.squeeze, 'contiguous',
          'clone', torch.clone, 'to', 'float', 'double', 'type', 'type_as'}  # keep the order of values
MINUS, NEGATIVE = {operator.sub, torch.sub, torch.subtract, 'sub'}, {operator.neg, torch.neg, 'neg'}
POOLS = {'avg_pool2d': nn.AvgPool2d, 'adaptive_avg_pool2d': nn.AdaptiveAvgPool2d}
ONE = np.ones(())
# the nodes whose outputs add up to what a call gives: {name: a factor, () or (C,)}
Way = dict[str, np.ndarray]


class Nodes(BlankPass):
    """A pass that makes the nodes and edges of a NIR graph. Raises UserError, which names the module, for what NIR does
    not know.

    shapes: of what each node gives, (C, ...). found: a Way for each call. Its factors go into the weights behind it: in
    a plain network a spike is worth its threshold.
    """

    def __init__(self, network: SpikingNetwork, nir: ModuleType, input_shape: tuple):
        super().__init__(network)
        self.nir, self.dt = nir, 1.0 if network.leak == 1 else 1e-4
        self.nodes, self.edges, self.shapes = {}, [], {}
        weight = next(network.parameters())
        self.dtype = values(weight).dtype
        self.run(weight.new_zeros(1, *input_shape))

    def made(self, node: fx.Node, value: object, before: list[Way]) -> Way | str:
        if not isinstance(value, torch.Tensor):
            self.refuse(node)
        shape = tuple(value.shape[1:])
        if node.op == 'placeholder':
            return {self.add('input', self.nir.Input({'input': np.array(shape)}), shape): ONE}
        way, module, function = before[0], self.module_of(node), self.function_of(node)
        if node.op == 'output':
            return self.add('output', self.nir.Output({'output': np.array(shape)}), shape, *self.ready(way))
        given = self.shapes[next(iter(way))]
        name = node.target if module is not None else node.name
        if layer := self.layer_of(node):
            return self.neurons(layer, module, way)
        if isinstance(module, (HeldDropout, Repeat, nn.Identity, nn.Flatten)) or function in SHAPED:
            return way if shape == given else self.flattened(node, name, way, given, shape)
        if isinstance(module, SYNAPSES):
            return self.synapse(node, module, way, given)
        if isinstance(module, NORMS):
            return way if self.norm_of(source_of(node)) is module else self.norm(name, module, way)
        if isinstance(module, Scale):
            names, factor = self.together(way)
            return {self.scale(name, factor * values(module.factor).reshape(-1), *names): ONE}
        others = [self.env[each] if isinstance(each, fx.Node) else each for each in (*node.args, *node.kwargs.values())
                  if (not isinstance(each, fx.Node) or each not in self.found) and not adds_nothing(node, each)]
        if function in PRODUCTS and len(before) == 1 == len(others) and isinstance(others[0], (int, float)):
            return times(way, 1 / others[0] if function in QUOTIENTS else others[0])
        alike = not others and not node.kwargs and all(
            self.env[each].shape[1:] == shape for each in node.args if not adds_nothing(node, each))
        if function in SUMS and alike:
            return self.sum(node)
        if function in CATS and argument(node, 1, 'dim', 0) in (1, -len(shape)) and (
                all(each in self.found for each in source_of(node))):
            return self.side_by_side(name, [self.found[each] for each in source_of(node)], shape[0])
        return self.pool(node, name, module, way, given, shape)

    # -- what a call becomes ------------------------------------------------------------------------------------------

    def neurons(self, layer: str, lif: LIF | None, way: Way) -> Way:
        """An LIF layer. lif: its module in a plain network, whose spikes are worth their threshold; else None."""
        bounds = ONE if lif is None or lif.bounds is None else values(lif.bounds).astype(np.float64)
        sources, index = self.ready(times(way, 1 / bounds)), self.network.layer_names.index(layer)
        threshold, leak = self.network.thresholds[index].item(), self.network.leaks[index].item()
        shape = self.shapes[sources[0]]

        def all_of(value):
            return np.full(shape, value, np.float64)  # float32 would change the leak

        common = {'v_threshold': all_of(threshold), 'v_reset': all_of(0),
                  'metadata': {'threshold': threshold, 'leak': leak, 'reset': 'subtract'}}
        if self.dt == 1:
            node = self.nir.IF(r=all_of(1), **common)
        else:
            lost = max(1 - leak, 2.0 ** -53)
            node = self.nir.LIF(tau=all_of(self.dt / lost), r=all_of(1 / lost), v_leak=all_of(0), **common)
        return {self.add(f'{layer}.neuron', node, shape, *sources): ONE if lif is None else threshold * bounds}

    def synapse(self, node: fx.Node, module: nn.Module, way: Way, given: tuple) -> Way:
        """A convolution or a linear layer, with the batch norm that is all that its outputs go to."""
        names, factor = self.together(way)
        weight, bias = (None if each is None else values(each)
                        for each in folded_layer(module, self.norm_of(node)))
        if isinstance(module, nn.Linear):
            if len(given) > 1:
                self.refuse(node, ' of more than features', 'flatten before it')
            weight = (weight * factor).astype(weight.dtype)
            made = self.nir.Linear(weight) if bias is None else self.nir.Affine(weight, bias)
            return {self.add(node.target, made, weight.shape[:1], *names): ONE}
        padding = module.padding
        if isinstance(padding, str):  # as pixels; None if it differs between the two sides
            sides = module._reversed_padding_repeated_twice[::-1]
            padding = sides[::2] if sides[::2] == sides[1::2] else None
        if module.padding_mode != 'zeros' or padding is None:
            self.refuse(node, ' with this padding', 'pad with zeros, the same on both sides')
        if len({size % 2 for size in module.kernel_size}) > 1:
            self.refuse(node, ' of this kernel', 'take sizes that are all odd or all even')
        if module.groups > 1:
            parts = np.split(weight, module.groups)
            weight = np.concatenate([np.pad(part, [(0, 0), (i * part.shape[1], given[0] - (i + 1) * part.shape[1]),
                                                   *[(0, 0)] * (part.ndim - 2)]) for i, part in enumerate(parts)])
        weight = (weight * np.reshape(factor, (-1, *[1] * len(given[1:])))).astype(weight.dtype)
        # nir assumes square kernels: zeros around the weight make it square
        more = [(max(module.kernel_size) - size) // 2 for size in module.kernel_size]
        weight = np.pad(weight, [(0, 0), (0, 0), *((each, each) for each in more)])
        padding = [p + each * d for p, each, d in zip(padding, more, module.dilation, strict=True)]
        return {self.convolution(node.target, weight, bias, module.stride, padding, module.dilation, *names): ONE}

    def norm(self, name: str, norm: nn.Module, way: Way) -> Way:
        """A batch norm that is not behind a synapse alone."""
        names, factor = self.together(way)
        ones = SimpleNamespace(weight=torch.eye(len(norm.running_var)).to(norm.running_var), bias=None)
        weight, bias = folded_layer(ones, norm)
        return {self.mix(name, values(weight) * factor.astype(self.dtype), *names, bias=values(bias)): ONE}

    def sum(self, node: fx.Node) -> Way:
        total = {}
        for i, each in enumerate(node.args):
            if adds_nothing(node, each):
                continue
            sign = -1 if node.target in NEGATIVE or i and node.target in MINUS else 1
            for name, factor in self.found[each].items():
                total[name] = total.get(name, 0) + sign * factor
        return total

    def side_by_side(self, name: str, parts: list[Way], channels: int) -> Way:
        """A concatenation of channels: each call goes to its own channels."""
        way, start = {}, 0
        for part in parts:
            names, factor = self.together(part)
            own = self.shapes[names[0]][0]
            matrix = np.zeros((channels, own), self.dtype)
            matrix[range(start, start + own), range(own)] = factor
            way[self.mix(name, matrix, *names)] = ONE
            start += own
        return way

    def flattened(self, node: fx.Node, name: str, way: Way, given: tuple, shape: tuple) -> Way:
        start = next((i for i in range(len(given)) if (*given[:i], math.prod(given[i:])) == shape), None)
        if start is None:
            self.refuse(node, ' but to flatten')
        names, factor = self.together(way)
        if start == 0 and factor.ndim:
            factor = np.repeat(factor, math.prod(given[1:]))
        made = self.nir.Flatten({'input': np.array(given)}, start_dim=start)  # NIR's shapes have no batch
        return {self.add(name, made, shape, *names): factor}

    def pool(self, node: fx.Node, name: str, module: nn.Module | None, way: Way, given: tuple, shape: tuple) -> Way:
        """An average pool or a mean over the map; anything else is refused."""
        function = getattr(node.target, '__name__', '')
        if module is None and function in POOLS:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            module = POOLS[function](*args[1:], **{key: each for key, each in kwargs.items() if key != 'input'})
        if self.function_of(node) in ('mean', torch.mean) and len(given) == 3:
            dims = argument(node, 1, 'dim')
            if {d % 4 for d in (dims if isinstance(dims, (tuple, list)) else (dims,))} == {2, 3}:
                module = nn.AdaptiveAvgPool2d(1)
        if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AvgPool2d)) and len(given) != 3:
            self.refuse(node, ' without channels', 'give it (B, C, H, W)')
        if isinstance(module, nn.AdaptiveAvgPool2d):
            windows = adaptive(given[1:], shape[1:] or (1, 1))
        elif isinstance(module, nn.AvgPool2d):
            windows = [(each, each) if isinstance(each, int) else tuple(each)
                       for each in (module.kernel_size, module.stride, module.padding)]
            if module.divisor_override is not None or any(windows[2]) and not module.count_include_pad:
                windows = None
        else:
            maximum = isinstance(module, MAX_POOLS) or is_max_pool(node.target)
            self.refuse(node, remedy='put nn.AvgPool2d in its place' if maximum else None)
        if windows is None:
            self.refuse(node, ' with these windows', 'take windows of one size, whose divisor is all their pixels')
        names, factor = self.together(way)
        sizes = [(size + 2 * p - k) // s + 1 for size, k, s, p in zip(given[1:], *windows, strict=True)]
        if len(shape) == 3 and tuple(sizes) != shape[1:]:
            self.refuse(node, ' with ceil_mode', 'leave ceil_mode out')
        pool = self.add(name, self.nir.AvgPool2d(*map(np.array, windows)), (given[0], *sizes), *names)
        way = {pool: factor}
        return way if len(shape) == 3 else self.flattened(node, f'{name}.flatten', way, self.shapes[pool], shape)

    # -- nodes --------------------------------------------------------------------------------------------------------

    def add(self, name: str, node: object, shape: Sequence[int], *sources: str) -> str:
        """Add a node of that name, or with a number behind it if there is one; returns its name."""
        free = (f'{name}_{i}' if i else name for i in count())
        name = next(each for each in free if each not in self.nodes)
        self.nodes[name], self.shapes[name] = node, tuple(int(size) for size in shape)
        self.edges.extend((source, name) for source in sources)
        return name

    def convolution(self, name: str, weight: np.ndarray, bias: np.ndarray | None, stride: Sequence[int],
                    padding: Sequence[int], dilation: Sequence[int], *sources: str) -> str:
        size, bias = self.shapes[sources[0]][1:], np.zeros(len(weight), weight.dtype) if bias is None else bias
        if len(size) == 1:
            node = self.nir.Conv1d(size[0], weight, stride[0], padding[0], dilation[0], 1, bias)
        else:
            node = self.nir.Conv2d(size, weight, stride, padding, dilation, 1, bias)
        return self.add(name, node, node.output_type['output'], *sources)

    def mix(self, name: str, matrix: np.ndarray, *sources: str, bias: np.ndarray | None = None) -> str:
        """Add a matrix (C', C) of the channels: a convolution of 1 pixel; of features, a linear layer."""
        ones = [1] * (len(self.shapes[sources[0]]) - 1)
        if ones:
            matrix = matrix.reshape(*matrix.shape, *ones)
            return self.convolution(name, matrix, bias, ones, [0] * len(ones), ones, *sources)
        bias = np.zeros(len(matrix), matrix.dtype) if bias is None else bias
        return self.add(name, self.nir.Affine(matrix, bias), matrix.shape[:1], *sources)

    def scale(self, name: str, factor: np.ndarray, *sources: str) -> str:
        """Add a factor () or (C,) of the channels."""
        factor = np.broadcast_to(factor, self.shapes[sources[0]][:1]).astype(self.dtype)
        return self.mix(name, np.diag(factor), *sources)

    def ready(self, way: Way) -> list[str]:
        """The names of nodes that give what a way does; a factor becomes a node of its own."""
        return [name if np.all(factor == 1) else self.scale(f'{name}.scale', factor, name)
                for name, factor in way.items()]

    def together(self, way: Way) -> tuple[list[str], np.ndarray]:
        """(names of nodes, the one factor of what they give)."""
        factor, *others = way.values()
        return (list(way), factor) if all(np.array_equal(each, factor) for each in others) else (self.ready(way), ONE)

    def norm_of(self, node: fx.Node) -> nn.Module | None:
        """The batch norm that is all that a synapse's outputs go to, or None."""
        norm = self.module_of(next(iter(node.users))) if len(node.users) == 1 else None
        synapse = isinstance(self.module_of(node), SYNAPSES)
        return norm if synapse and isinstance(norm, NORMS) else None

    def refuse(self, node: fx.Node, how: str = '', remedy: str | None = None) -> NoReturn:
        where, what = said(node, self.submodules)
        raise UserError(f'--export_nir: {where}: NIR does not know {what}{how}: {remedy or "leave --export_nir out"}')


def times(way: Way, number: float | np.ndarray) -> Way:
    return {name: factor * number for name, factor in way.items()}


def values(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()


def adaptive(sizes: Sequence[int], outputs: Sequence[int]) -> list[Sequence[int]] | None:
    """[kernel, stride, padding] of the pool that an adaptive one equals, from maps of `sizes` to `outputs`; None if its
    windows differ."""
    strides = [size // number if number > 1 else 1 for size, number in zip(sizes, outputs, strict=True)]
    kernels = [size - (number - 1) * stride for size, number, stride in zip(sizes, outputs, strides)]
    same = all(stride and (i * size // number, -(-(i + 1) * size // number)) == (i * stride, i * stride + kernel)
               for size, number, stride, kernel in zip(sizes, outputs, strides, kernels) for i in range(number))
    return [kernels, strides, (0, 0)] if same else None
