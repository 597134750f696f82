"""Any network as a graph of calls (torch.fx): what may stand in it, and a QCFS of its own for every ReLU.

Between the activations stands what is linear in the activations at each time step, so that a spiking network can run it
over T * B images as it is. A network with anything else is refused by name before anything runs.
"""
import copy
import inspect
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from self_models.layers import Scale
from self_models.qcfs import QCFS

SYNAPSES = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)
POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
             nn.AdaptiveMaxPool3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
SHAPES = (nn.Flatten, nn.Unflatten, nn.Identity, Scale, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
          nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d,
          nn.ReplicationPad1d, nn.ReplicationPad2d, nn.CircularPad1d, nn.CircularPad2d)
ACTIVATIONS = (nn.ReLU, QCFS)
LINEAR_MODULES = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, *POOLS, *MAX_POOLS, *DROPOUTS,
                  *SHAPES)
RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, 'relu', 'relu_'}
FUNCTION_POOLS = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
                  F.adaptive_avg_pool3d}
FUNCTION_MAX_POOLS = {F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
                      F.adaptive_max_pool3d}
FUNCTION_SYNAPSES = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d,
                     F.conv_transpose3d, torch.conv1d, torch.conv2d, torch.conv3d}
PRODUCTS = {operator.mul, operator.imul, operator.truediv, operator.itruediv, operator.matmul, torch.mul,
            torch.multiply, torch.div, torch.divide, torch.true_divide, torch.matmul, torch.mm, 'mul', 'mul_',
            'multiply', 'div', 'div_', 'divide', 'true_divide', 'matmul', 'mm'}
SUMS = {operator.add, operator.iadd, operator.sub, operator.isub, operator.neg, torch.add, torch.sub, torch.neg, 'add',
        'add_', 'sub', 'sub_', 'neg', 'neg_'}
DIMENSIONS = {  # of a function or method: where its dimensions stand (position, name), and the default
    torch.flatten: (1, 'start_dim', 0), 'flatten': (1, 'start_dim', 0), torch.cat: (1, 'dim', 0),
    torch.concat: (1, 'dim', 0), torch.concatenate: (1, 'dim', 0), torch.mean: (1, 'dim', None),
    'mean': (1, 'dim', None), torch.sum: (1, 'dim', None), 'sum': (1, 'dim', None), torch.chunk: (2, 'dim', 0),
    'chunk': (2, 'dim', 0), torch.split: (2, 'dim', 0), 'split': (2, 'dim', 0), torch.squeeze: (1, 'dim', None),
    'squeeze': (1, 'dim', None), torch.unsqueeze: (1, 'dim', None), 'unsqueeze': (1, 'dim', None),
    'narrow': (1, 'dim', None), torch.narrow: (1, 'dim', None), torch.transpose: (slice(1, 3), None, None),
    'transpose': (slice(1, 3), None, None), 'unflatten': (1, 'dim', None), torch.unflatten: (1, 'dim', None)}
FREE = {'view', 'reshape', torch.reshape, 'contiguous', 'clone', torch.clone, 'to', 'float', 'double', 'half',
        'bfloat16', 'type', 'type_as', 'size', 'dim', getattr, operator.getitem, F.pad, F.interpolate, F.pixel_shuffle,
        F.pixel_unshuffle, 'permute', torch.permute, 'expand_as', 'requires_grad_'}
SIZES = {'size', 'dim'}
REMEDIES = {  # of what is refused: what to put in its place
    'activation': 'put nn.ReLU or QCFS in its place',
    'norm': 'put batch norm in its place',
    'softmax': 'leave it out: the loss and the predictions take logits',
    'product': 'a spiking network adds up its inputs: leave the product of activations out, or add them',
    'other': 'use layers that are linear in their input, and nn.ReLU or QCFS between them'}
_NORMS = ('Norm', 'norm', 'LRN')
_ACTIVATIONS = ('LU', 'lu', 'igmoid', 'anh', 'Shrink', 'shrink', 'Mish', 'mish', 'wish', 'clamp', 'clip', 'sign',
                'Threshold', 'threshold', 'Softplus', 'softplus', 'abs', 'exp', 'sqrt', 'square', 'pow', 'maximum',
                'minimum', 'max', 'min')


class Refused(ValueError):
    """A network that cannot become a spiking one; the text names the module and what to put in its place."""


class _Tracer(fx.Tracer):
    """Takes a module for one call if its own forward is torch's, or this project's activation or layer."""

    def is_leaf_module(self, module, name):
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            return False
        known = isinstance(module, (*LINEAR_MODULES, *ACTIVATIONS))
        home = type(module).forward.__module__
        return known and home.startswith(('torch.', 'self_models.')) or super().is_leaf_module(module, name)


class Call(NamedTuple):
    """A call of an activation. owner: the path of the module that makes it. target: the path of the activation module,
    or None of a function."""
    node: fx.Node
    owner: str
    target: str | None


def trace(ann: nn.Module) -> tuple[nn.Module, fx.Graph]:
    """(a copy of the ANN, the graph of its calls in eval mode). Raises Refused if torch.fx cannot follow it."""
    tree = copy.deepcopy(ann)
    training = {name: module.training for name, module in tree.named_modules()}
    name = type(ann).__name__
    defaults = {key: value.default for key, value in inspect.signature(ann.forward).parameters.items()
                if value.default is not inspect.Parameter.empty}
    try:
        graph = _Tracer().trace(tree.eval(), concrete_args=defaults or None)
    except Exception as error:  # tracing runs the network's own code
        reason = ' '.join(str(error).split())
        if isinstance(error, fx.proxy.TraceError):
            reason = f'its way depends on values ({reason})'
        raise Refused(f'{name} cannot be traced: {reason}; write its forward without conditions on values') from error
    for path, module in tree.named_modules():
        module.training = training.get(path, module.training)
    modules, order = dict(tree.named_modules()), {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:  # later readers of what a call wrote to get what it wrote
        if writes_to_input(node, modules):
            for user in [user for user in node.args[0].users if order[user] > order[node]]:
                user.replace_input_with(node.args[0], node)
    wanted = len(inspect.signature(ann.forward).parameters) - len(defaults)
    further = [node for node in graph.nodes if node.op == 'placeholder'][wanted:]  # arguments at their defaults
    for node in reversed(graph.nodes):
        if not node.users and node.op != 'output' and (node.op != 'placeholder' or node in further):
            graph.erase_node(node)
    return tree, graph


def writes_to_input(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a call changes its first argument."""
    if node.op == 'call_module':
        return getattr(modules[node.target], 'inplace', False)
    if node.op not in ('call_function', 'call_method'):
        return False
    name = node.target if isinstance(node.target, str) else node.target.__name__
    operators = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
    return name.endswith('_') or node.target in operators or node.kwargs.get('inplace', False)


def activations_of(tree: nn.Module, graph: fx.Graph) -> list[Call]:
    """The calls of ReLU and QCFS, in their order. Raises Refused if anything else in the graph cannot be spiking."""
    modules, calls, weights, sizes = dict(tree.named_modules()), [], set(), set()
    behind = {}  # node: whether an activation is behind it with no synapse between
    inputs = [node for node in graph.nodes if node.op == 'placeholder']
    if len(inputs) != 1 or str(inputs[0].target).startswith('*'):
        raise Refused(f'{type(tree).__name__} takes {len(inputs)} inputs: a spiking network takes one, the images')
    for node in graph.nodes:
        values = [each for each in node.all_input_nodes if each not in weights and each not in sizes]
        behind[node] = any(behind[each] for each in node.all_input_nodes)
        if node.op == 'get_attr' or node.op not in ('placeholder', 'output') and not values and all(
                each in weights for each in node.all_input_nodes):
            weights.add(node)
        elif node.op in ('call_module', 'call_function', 'call_method'):
            module = modules[node.target] if node.op == 'call_module' else None
            if is_activation(node, module):
                calls.append(Call(node, owner_of(node, modules), node.target if module is not None else None))
                behind[node] = True
                continue
            if not values or node.target in SIZES or node.target is getattr and node.args[1] in ('shape', 'ndim'):
                sizes.add(node)
                continue
            check(node, module, values, weights, owner_of(node, modules))
            if isinstance(module, SYNAPSES) or node.target in FUNCTION_SYNAPSES:
                behind[node] = False
        elif node.op == 'output':
            if not isinstance(node.args[0], fx.Node):
                raise Refused(f'{type(tree).__name__} gives more than one output: have it return the logits alone')
            if behind[node.args[0]]:
                raise Refused(f'{type(tree).__name__} has an activation behind its last layer: leave it out, so that '
                              'the output is the logits')
    if not calls:
        raise Refused(f'{type(tree).__name__} has no ReLU and no QCFS that could become spiking neurons')
    return calls


def is_activation(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node calls a ReLU or a QCFS."""
    return isinstance(module, ACTIVATIONS) if module is not None else node.target in RELUS


def owner_of(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """The path of the module whose forward makes a call."""
    stack = [path for path, _ in (node.meta.get('nn_module_stack') or {}).values()]
    stack = [path for path in stack if path in modules and path != node.target]
    return stack[-1] if stack else ''


def check(node: fx.Node, module: nn.Module | None, values: list[fx.Node], weights: set, owner: str) -> None:
    """Raise Refused unless a call is linear in the activations and keeps the samples apart."""
    target = node.target
    if module is not None:
        where, what = target, type(module).__name__
    else:
        where, what = owner or 'the network', getattr(target, '__name__', str(target)) + '()'

    def refuse(why, remedy):
        raise Refused(f'{where}: {what} {why}: {REMEDIES.get(remedy, remedy)}')

    if module is not None:
        if isinstance(module, nn.MultiheadAttention):
            refuse('is a product of activations', 'product')
        if isinstance(module, LINEAR_MODULES):
            if isinstance(module, nn.Flatten) and module.start_dim != 1 and module.start_dim >= -1:
                if module.start_dim == 0:
                    refuse('mixes samples', 'flatten from dimension 1 on')
            return
        refuse_by_name(what, refuse)
    elif target in PRODUCTS:
        if sum(each in values for each in node.all_input_nodes) > 1 or node.args[0] is node.args[1]:
            refuse('is a product of activations', 'product')
        if target in ('div', 'div_', operator.truediv, torch.div) and node.args[1] in values:
            refuse('divides by an activation', 'product')
    elif target in FUNCTION_SYNAPSES:
        if any(each in values for each in node.all_input_nodes[1:]):
            refuse('has weights that depend on the input', 'product')
    elif target in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d):
        if node.kwargs.get('training', node.args[2] if len(node.args) > 2 else True):
            refuse('drops in evaluation, too', 'say training=self.training')
    elif target in DIMENSIONS:
        position, name, default = DIMENSIONS[target]
        args = [each for each in node.args[position]] if isinstance(position, slice) else [
            node.args[position] if len(node.args) > position else node.kwargs.get(name, default)]
        if position == 1 and len(node.args) > 2 and target in ('mean', 'sum', 'squeeze'):
            args = list(node.args[1:])
        dims = [dim for each in args for dim in (each if isinstance(each, (list, tuple)) else [each])]
        if 0 in dims or None in dims:
            refuse('mixes samples', 'name the dimensions, from 1 on')
    elif target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        of_list = node.args[0].target in (torch.chunk, 'chunk', torch.split, 'split')
        if not of_list and index[0] != slice(None) and index[0] is not Ellipsis:
            refuse('takes some of the samples', 'index from dimension 1 on')
    elif target in ('permute', torch.permute):
        dims = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
        if dims[0] != 0:
            refuse('moves the samples', 'keep dimension 0')
    elif target not in SUMS | FREE | FUNCTION_POOLS | FUNCTION_MAX_POOLS and not known_pool(target):
        refuse_by_name(what, refuse)


def known_pool(target) -> bool:
    """Whether a function pools; torch wraps some of its own, so that they are told by name."""
    name = getattr(target, '__name__', '')
    return 'avg_pool' in name or is_max_pool(target)


def is_max_pool(target) -> bool:
    return 'max_pool' in getattr(target, '__name__', '')


def refuse_by_name(what: str, refuse: Callable) -> None:
    if 'oftmax' in what or 'oftmin' in what:
        refuse('has no spiking counterpart', 'softmax')
    if any(word in what for word in ('ttention', 'matmul', 'bmm', 'einsum', 'LSTM', 'GRU', 'RNN', 'ransformer')):
        refuse('is a product of activations', 'product')
    if any(word in what for word in _NORMS):
        refuse('depends on all the values of a sample', 'norm')
    refuse('has no spiking counterpart', 'activation' if any(word in what for word in _ACTIVATIONS) else 'other')


def put(tree: nn.Module, call: Call, module: nn.Module, used: set[str]) -> str:
    """Put a module into the tree for a call of an activation or a dropout; returns its path.

    The first call of a module takes its place and its name, a further one, or a function, a name beside it.
    """
    if call.target is not None and call.target not in used:
        path = call.target
    else:
        stem = call.target if call.target is not None else '.'.join(filter(None, (call.owner, _name_of(call.node))))
        numbers = [''] if call.target is None else []
        taken, number = {name for name, _ in tree.named_modules()}, 0
        while not numbers or stem + numbers[0] in taken or stem + numbers[0] in used:
            number += 1
            numbers = [f'_{number}']
        path = stem + numbers[0]
    parent, _, name = path.rpartition('.')
    owner = tree.get_submodule(parent)
    if name not in owner._modules and hasattr(owner, name):
        name = f'{name}_module'
        path = '.'.join(filter(None, (parent, name)))
    owner.add_module(name, module)
    used.add(path)
    return path


def _name_of(node):
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return name.rstrip('_')


def replace(graph: fx.Graph, node: fx.Node, path: str) -> None:
    """Have the graph call the module at `path` in place of a node."""
    source = node.args[0] if node.args else node.kwargs['input']
    with graph.inserting_after(node):
        new = graph.call_module(path, (source,))
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def channels_of(node: fx.Node, modules: dict[str, nn.Module]) -> int | None:
    """How many channels (dimension 1) a node gives, as the layers before it say; None if they do not."""
    module = modules.get(node.target) if node.op == 'call_module' else None
    for name in ('out_channels', 'out_features', 'num_features'):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    found = [channels_of(each, modules) for each in node.all_input_nodes]
    if node.target in (torch.cat, torch.concat):
        return None if None in found else sum(found)
    keeps = node.target in SUMS or module is not None and not isinstance(module, (nn.Flatten, nn.Unflatten))
    return found[0] if keeps and found else None


def compiled(graph: fx.Graph) -> Callable:
    """A graph as a function (tree of modules, *inputs) -> output."""
    code = graph.python_code('self')
    names = dict(code.globals)
    exec(code.src, names)  # the graph's own code, as fx.GraphModule does
    return names['forward']


class Graphed:
    """For an nn.Module that runs a graph: its modules, parameters and buffers are those of a tree, by their names.

    The tree itself is held beside them, not as a child, so that no name gets a prefix and no name of the tree's can
    hide an attribute.
    """

    def hold(self, tree: nn.Module, graph: fx.Graph) -> None:
        """Take over a tree of modules and the graph that calls them."""
        space = nn.Module()
        for name, value in vars(tree).items():  # tensors that its code made: they are to move with the rest
            if isinstance(value, torch.Tensor):
                space.register_buffer(name, value, persistent=False)
        for kind in ('_modules', '_parameters', '_buffers', '_non_persistent_buffers_set'):
            held = getattr(space, kind)
            held.update(getattr(tree, kind))
            self.__dict__[kind] = held
        self.__dict__['_space'], self.__dict__['_graph'] = space, graph
        self._compile()

    def _compile(self):
        self.__dict__['_run'] = compiled(self._graph)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return self._run(self._space, x)

    def __getstate__(self):
        state = self.__dict__.copy()
        del state['_run']
        state['_graph'] = fx.GraphModule(self._space, self._graph)  # which can be pickled
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__['_graph'] = state['_graph'].graph
        self._compile()


class Traced(Graphed, nn.Module):
    """A network that runs by its graph, with a module of its own for every activation."""

    def __init__(self, tree: nn.Module, graph: fx.Graph):
        super().__init__()
        self.hold(tree, graph)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the network that was traced."""
        return self.run(x)


def quantize(ann: nn.Module, levels: int = 8, channels: bool = False, bound: float = 2.0) -> nn.Module:
    """A copy of an ANN with a QCFS of its own for every call of a ReLU.

    levels, bound: of QCFS; channels: a bound for each channel, not one for the layer. The copy is of the ANN's own
    class if each ReLU is a module that is called once, else it runs by its graph (Traced). Weights keep their names.
    Raises ValueError for a network that cannot become a spiking one.
    """
    tree, graph = trace(ann)
    calls = activations_of(tree, graph)
    modules, used = dict(tree.named_modules()), set()
    own = [call.target for call in calls]
    plain = None not in own and len(set(own)) == len(own)
    first = next(tree.parameters())
    for call in calls:
        if isinstance(modules.get(call.target), QCFS):
            used.add(call.target)
            continue
        count = None
        if channels and (count := channels_of(call.node.args[0], modules)) is None:
            raise Refused(f'{call.target or call.owner}: how many channels it has is unknown: take one bound a layer')
        new = QCFS(levels, bound, count).to(first.device, first.dtype).train(tree.training)
        path = put(tree, call, new, used)
        replace(graph, call.node, path)
    return tree if plain else Traced(tree, graph)
