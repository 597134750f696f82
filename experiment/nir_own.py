"""A network of one's own as nodes of NIR: its graph, call by call, as far as NIR knows what is called."""
import math
import operator
from types import SimpleNamespace

import numpy as np
import torch
from torch import fx, nn

from experiment import UserError
from self_models.conversion import folded_layer
from self_models.encoding import ENCODINGS
from self_models.layers import Scale
from self_models.plain import LIF, HeldDropout, Repeat
from self_models.traced import MAX_POOLS, PRODUCTS, QUOTIENTS, SUMS, argument, is_max_pool, owner_of

NORMS = nn.modules.batchnorm._BatchNorm
SHAPED = {'view', 'reshape', torch.reshape, 'flatten', torch.flatten, 'squeeze', torch.squeeze, 'contiguous', 'clone',
          torch.clone, 'to', 'float', 'double', 'type', 'type_as'}  # keep the order of values
POOLS = {'avg_pool2d': nn.AvgPool2d, 'adaptive_avg_pool2d': nn.AdaptiveAvgPool2d}
MINUS, NEGATIVE = {operator.sub, torch.sub, torch.subtract, 'sub'}, {operator.neg, torch.neg, 'neg'}
ONE = np.ones(())


def add_all(model, nodes):
    """Add the nodes of a PlainNetwork to an nir_export.Nodes; returns the names of those that give the output.

    Raises UserError, which names the module, for what NIR does not know.
    """
    rows, weight = 1 if ENCODINGS[model.encoding].constant else model.timesteps, next(model.parameters())
    training = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            return Ways(model.eval(), nodes).run(weight.new_zeros(rows, *nodes.shapes['input']))
    finally:
        for module, before in training:
            module.training = before


class Ways(fx.Interpreter):
    """One pass of a blank image along the graph of a PlainNetwork, which adds its nodes.

    ways: for each call that depends on the image, the nodes whose outputs add up to what it gives: {name: a factor,
    () or (C,)}. A spike is worth its threshold; that is the factor, which goes into the weights behind it.
    """

    def __init__(self, model, nodes):
        super().__init__(model._space, graph=model._graph)
        self.nodes, self.ways, self.extra_traceback = nodes, {}, False  # which would lengthen a UserError
        self.dtype = values(next(model.parameters())).dtype

    def run_node(self, node):
        result, sources = super().run_node(node), [each for each in node.all_input_nodes if each in self.ways]
        if node.op == 'placeholder':
            self.ways[node] = {'input': ONE}
        elif node.op == 'output':
            return self.ready(self.ways[sources[0]])
        elif sources and isinstance(result, torch.Tensor):
            self.ways[node] = self.way(node, sources[0], tuple(result.shape[1:]))
        elif sources and isinstance(result, (tuple, list)) and isinstance(result[0], torch.Tensor):
            self.refuse(node)
        return result

    def way(self, node, source, shape):
        """What a call gives, values of this shape. source: the first call that it is given."""
        module, before = self.module_of(node), tuple(self.env[source].shape[1:])
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        others = [each for each in [*args, *kwargs.values()] if not isinstance(each, torch.Tensor)]
        given = [each for each in node.args if isinstance(each, fx.Node) and each in self.ways]
        alike = len(given) == len(node.args) and not kwargs and all(self.env[each].shape[1:] == shape for each in given)
        name = node.target if module is not None else node.name
        if isinstance(module, LIF):
            # importers take one threshold for all neurons of a layer, so bounds of channels go before and behind
            bounds = ONE if module.bounds is None else values(module.bounds).astype(np.float64)
            neurons = self.nodes.neurons(name, *self.ready(self.times(source, 1 / bounds)))
            return {neurons: module.threshold.item() * bounds}
        if isinstance(module, (HeldDropout, Repeat, nn.Identity, nn.Flatten)) or node.target in SHAPED:
            return self.reshaped(node, name, source, before, shape)
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            return self.synapse(node, name, module, source, before)
        if isinstance(module, NORMS):
            if self.norm_of(source) is module:
                return self.ways[source]
            names, factor = self.together(source)
            weight, bias = folded_layer(SimpleNamespace(weight=torch.eye(before[0]).to(module.running_var), bias=None),
                                        module, None)
            return {self.nodes.mix(name, values(weight) * factor.astype(self.dtype), *names, bias=values(bias)): ONE}
        if isinstance(module, Scale):
            factor = values(module.factor)
            return self.times(source, factor.reshape(-1) if factor.ndim else factor)
        if node.target in PRODUCTS and len(given) == 1 == len(others) and isinstance(others[0], (int, float)):
            return self.times(source, 1 / others[0] if node.target in QUOTIENTS else others[0])
        if node.target in SUMS and alike:
            return self.added(node)
        if node.target in (torch.cat, torch.concat, torch.concatenate):
            if argument(node, 1, 'dim', 0) in (1, -len(shape)) and all(each in self.ways for each in node.args[0]):
                return self.side_by_side(name, node.args[0], shape[0])
        return self.pooled(node, name, module, source, before, shape)

    def module_of(self, node):
        return self.submodules[node.target] if node.op == 'call_module' else None

    def norm_of(self, node):
        """The batch norm that is all that a synapse's outputs go to, or None."""
        norm = self.module_of(next(iter(node.users))) if len(node.users) == 1 else None
        synapse = isinstance(self.module_of(node), (nn.Conv1d, nn.Conv2d, nn.Linear))
        return norm if synapse and isinstance(norm, NORMS) else None

    def ready(self, way):
        """The names of nodes that give what a way does: where there is a factor, of a further node."""
        def scaled(name, factor):
            factor = np.broadcast_to(factor, self.nodes.shapes[name][:1]).astype(self.dtype)
            return self.nodes.mix(f'{name}.scale', np.diag(factor), name)
        return [name if np.all(factor == 1) else scaled(name, factor) for name, factor in way.items()]

    def together(self, node):
        """(names of nodes, the one factor of what they give)."""
        way = self.ways[node]
        factor, *others = way.values()
        return (list(way), factor) if all(np.array_equal(each, factor) for each in others) else (self.ready(way), ONE)

    def times(self, source, number):
        return {name: factor * number for name, factor in self.ways[source].items()}

    def added(self, node):
        total = {}
        for i, each in enumerate(node.args):
            sign = -1 if node.target in NEGATIVE or i and node.target in MINUS else 1
            for name, factor in self.ways[each].items():
                total[name] = total.get(name, 0) + sign * factor
        return total

    def side_by_side(self, name, parts, channels):
        """What several calls give as channels of one: each goes to its own, and the others get nothing from it."""
        way, start = {}, 0
        for part in parts:
            names, factor = self.together(part)
            own = self.nodes.shapes[names[0]][0]
            matrix = np.zeros((channels, own), self.dtype)
            matrix[range(start, start + own), range(own)] = factor
            way[self.nodes.mix(name, matrix, *names)] = ONE
            start += own
        return way

    def synapse(self, node, name, module, source, before):
        linear = isinstance(module, nn.Linear)
        if linear and len(before) > 1:
            self.refuse(node, ' of more than features', 'flatten before it')
        if not linear and (module.padding_mode != 'zeros' or padding_of(module) is None):
            self.refuse(node, ' with this padding', 'pad with zeros, the same on both sides')
        if not linear and len({size % 2 for size in module.kernel_size}) > 1:
            self.refuse(node, ' of this kernel', 'take sizes that are all odd or all even')
        names, factor = self.together(source)
        return {self.nodes.synapse(name, module, *names, norm=self.norm_of(node), factor=factor): ONE}

    def reshaped(self, node, name, source, before, shape):
        if shape == before:
            return self.ways[source]
        start = next((i for i in range(len(before)) if (*before[:i], math.prod(before[i:])) == shape), None)
        if start is None:
            self.refuse(node, ' but to flatten')
        names, factor = self.together(source)
        if start == 0:
            factor = np.repeat(np.broadcast_to(factor, before[:1]), math.prod(before[1:]))
        return {self.nodes.flatten(name, start, *names): factor}

    def pooled(self, node, name, module, source, before, shape):
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if module is None and getattr(node.target, '__name__', '') in POOLS:
            more = {key: each for key, each in kwargs.items() if key != 'input'}
            module = POOLS[node.target.__name__](*args[1:], **more)
        if node.target in ('mean', torch.mean) and len(before) == 3:
            dims = argument(node, 1, 'dim')
            if {d % 4 for d in (dims if isinstance(dims, (tuple, list)) else (dims,))} == {2, 3}:
                module = nn.AdaptiveAvgPool2d(1)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            found = adaptive(before[1:], shape[1:] or (1, 1))
            padding = (0, 0)
        elif isinstance(module, nn.AvgPool2d):
            kernel, stride, padding = ((each, each) if isinstance(each, int) else tuple(each) for each in (
                module.kernel_size, module.stride, module.padding))
            same = module.count_include_pad or not any(padding)
            found = (kernel, stride) if same and module.divisor_override is None else None
        else:
            maximum = isinstance(module, MAX_POOLS) or is_max_pool(node.target)
            self.refuse(node, remedy='put nn.AvgPool2d in its place' if maximum else None)
        if found is None:
            self.refuse(node, ' with these windows', 'take windows of one size, whose divisor is all their pixels')
        names, factor = self.together(source)
        pool = self.nodes.pool(name, *found, padding, *names)
        if len(shape) == 3 and self.nodes.shapes[pool] != shape:
            self.refuse(node, ' with ceil_mode', 'leave ceil_mode out')
        return {pool if len(shape) == 3 else self.nodes.flatten(f'{name}.flatten', 0, pool): factor}

    def refuse(self, node, how='', remedy=None):
        module = self.module_of(node)
        what = f'{getattr(node.target, "__name__", node.target)}()' if module is None else type(module).__name__
        where = owner_of(node, self.submodules) if module is None else node.target
        raise UserError(f'--export_nir: {where or "the network"}: NIR does not know {what}{how}: '
                        f'{remedy or "leave --export_nir out"}')


def values(tensor):
    """A tensor as a numpy array."""
    return tensor.detach().cpu().contiguous().numpy()


def adaptive(sizes, outputs):
    """(kernel, stride) of the pool that an adaptive one is, from maps of `sizes` to such of `outputs`; None if the two
    are not the same everywhere."""
    kernels, strides = [], []
    for size, count_of in zip(sizes, outputs, strict=True):
        starts = [i * size // count_of for i in range(count_of)]
        kernel = {-(-(i + 1) * size // count_of) - start for i, start in enumerate(starts)}
        steps = {b - a for a, b in zip(starts, starts[1:])} or {1}
        if len(kernel) > 1 or len(steps) > 1 or 0 in steps:
            return None
        kernels, strides = [*kernels, *kernel], [*strides, *steps]
    return kernels, strides


def padding_of(convolution):
    """How many pixels a convolution pads on both sides; None if the two differ."""
    if not isinstance(convolution.padding, str):
        return convolution.padding
    sides = convolution._reversed_padding_repeated_twice[::-1]
    return sides[::2] if sides[::2] == sides[1::2] else None
