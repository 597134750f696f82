"""Any network as a graph of calls (torch.fx): what it may contain, and a QCFS of its own for every ReLU.

Between the activations, all is linear in the activations at each time step, so that a spiking network can run it over
T * B images unchanged. A network with anything else is refused by name before anything runs.
"""
import contextlib
import copy
import inspect
import operator
import pickle
import random
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.optim.swa_utils import AveragedModel

from self_models.layers import Scale, compute_weights
from self_models.qcfs import QCFS

SYNAPSES = (nn.modules.conv._ConvNd, nn.Linear)
POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
             nn.AdaptiveMaxPool3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
SHAPES = (nn.Flatten, nn.Unflatten, nn.Identity, Scale, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
          nn.Upsample, nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd,
          nn.modules.padding._ReplicationPadNd, nn.modules.padding._CircularPadNd)
ACTIVATIONS = (nn.ReLU, QCFS)
LINEAR_MODULES = (*SYNAPSES, nn.modules.batchnorm._BatchNorm, *POOLS, *MAX_POOLS, *DROPOUTS, *SHAPES)
RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, 'relu', 'relu_'}
FUNCTION_DROPOUTS = {F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d,
                     F.dropout3d: nn.Dropout3d}
PATH_DROPS = {'stochastic_depth': 3, 'drop_block2d': 5, 'drop_block3d': 5}  # torchvision's: where `training` stands
FUNCTION_SYNAPSES = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d,
                     F.conv_transpose3d}
MATRIX_PRODUCTS = {operator.matmul, torch.matmul, torch.mm, 'matmul', 'mm'}
QUOTIENTS = {operator.truediv, torch.div, torch.divide, torch.true_divide, 'div', 'divide', 'true_divide'}
PRODUCTS = {operator.mul, torch.mul, torch.multiply, 'mul', 'multiply', *QUOTIENTS, *MATRIX_PRODUCTS}
SUMS = {operator.add, operator.sub, operator.neg, torch.add, torch.sub, torch.subtract, torch.neg, 'add', 'sub', 'neg'}
IN_PLACE = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
            operator.itruediv: operator.truediv}  # a tensor has no @= of its own
DIMENSIONS = {  # of a function or method: the position of its dimensions, their names, and their default
    'flatten': (1, ('start_dim',), 0), 'unflatten': (1, ('dim',), None), 'cat': (1, ('dim',), 0),
    'concat': (1, ('dim',), 0), 'concatenate': (1, ('dim',), 0), 'mean': (1, ('dim',), None),
    'sum': (1, ('dim',), None), 'chunk': (2, ('dim',), 0), 'split': (2, ('dim',), 0), 'squeeze': (1, ('dim',), None),
    'unsqueeze': (1, ('dim',), None), 'narrow': (1, ('dim',), None), 'transpose': (1, ('dim0', 'dim1'), None)}
SPELLINGS = {*DIMENSIONS, *(getattr(torch, name) for name in DIMENSIONS)}
RESHAPES = {'view', 'reshape', torch.reshape}
PERMUTES = {'permute', torch.permute}
CASTS = {'to', 'float', 'double', 'half', 'bfloat16', 'type_as'}
CATS = {torch.cat, torch.concat, torch.concatenate}
VIEWS = {*RESHAPES, *PERMUTES, *CASTS, operator.getitem, 'contiguous', 'type', 'expand_as', 'requires_grad_',
         *(name for name in DIMENSIONS if name not in ('mean', 'sum', 'cat')),
         *(getattr(torch, name) for name in ('flatten', 'unflatten', 'chunk', 'split', 'squeeze', 'unsqueeze', 'narrow',
                                             'transpose'))}
LIKE = {'expand_as', 'type_as', 'to'}  # give their first argument in the form of another
FREE = {'clone', torch.clone, F.pad, F.interpolate, F.pixel_shuffle, F.pixel_unshuffle}
# leave the number of channels as it is
KEEPERS = {*CASTS, 'contiguous', 'clone', F.pad, F.interpolate}
REMEDIES = {  # of what is refused: what to put in its place
    'activation': 'put nn.ReLU or QCFS in its place',
    'norm': 'put batch norm in its place',
    'softmax': 'leave it out: the loss and the predictions take logits',
    'product': 'a spiking network adds up its inputs: leave the product of activations out, or add them',
    'samples': 'name the dimensions, from 1 on',
    'copies': 'put the copies together with torch.cat, as in torch.cat([x, x, x], 1)',
    'other': 'use layers that are linear in their input, and nn.ReLU or QCFS between them'}
_PRODUCTS = re.compile('ttention|matmul|bmm|einsum|LSTM|GRU|RNN|ransformer|ilinear|addcmul|outer|^dot$|^prod$')
_NORMS = re.compile('Norm|norm|LRN')
_ACTIVATIONS = re.compile('LU|lu$|lu6|igmoid|anh|[sS]hrink|ish$|clamp|clip|[sS]ign|hreshold|oftplus|^abs$|^exp(m1|2)?$|'
                          'sqrt$|square|pow$|^max|^min|^amax|^amin|^heaviside')
_RANDOM = re.compile('rand|bernoulli|normal(?!ize)|multinomial|poisson')
# what a node of the graph gives: what depends on the input's values; a tensor that does not; a number that does not, or
# that counts the samples; a shape that begins with that count
VALUE, WEIGHT, SIZE, COUNT, SHAPE = 'value', 'weight', 'size', 'count', 'shape'


class Refused(ValueError):
    """A network that cannot become a spiking one; the text names the module and what to put in its place."""


class _Proxy(fx.Proxy):
    """Records x += y and its like as calls that change x; torch.fx takes them for x + y."""


def _recorded(function):
    return lambda self, other: self.tracer.create_proxy('call_function', function, (self, other), {})


for _function in IN_PLACE:
    setattr(_Proxy, f'__{_function.__name__}__', _recorded(_function))


class _Tracer(fx.Tracer):
    """Takes a module for one call if its own forward is torch's, or this project's activation or layer."""

    def __init__(self, buffers=True):
        """buffers: whether what is computed from a buffer is computed anew in each forward; else it is a constant."""
        super().__init__()
        self.proxy_buffer_attributes = buffers

    def proxy(self, node):
        return _Proxy(node, self)

    def is_leaf_module(self, module, name):
        if isinstance(module, (nn.Sequential, nn.ModuleList)) or 'forward' in vars(module):
            return False
        # of the class itself: a parametrization makes a class of torch's from any
        home = type(module).forward.__module__
        known = isinstance(module, (*LINEAR_MODULES, *ACTIVATIONS)) or super().is_leaf_module(module, name)
        return known and home.startswith(('torch.', 'self_models.'))

    def call_module(self, m, forward, args, kwargs):
        if m not in self.submodule_paths:  # made by the network's code, as nn.ReLU()(x): its own calls are taken
            if not set(m.parameters()) <= set(self.root.parameters()):
                raise Refused(f'{type(self.root).__name__} calls a {type(m).__name__} that is no part of it, so that '
                              'its weights are not trained: register it, as nn.ModuleList does')
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, *args, **options):
        if self.surroundings != _surroundings():
            raise Refused(f'{type(self.root).__name__} runs a part of itself under no_grad or autocast, or in a '
                          'torch.autograd.Function of its own, which its spiking network would not: write it without; '
                          'requires_grad_(False) freezes weights')
        return super().create_node(*args, **options)

    def trace(self, *args, **options):
        self.surroundings, draws = _surroundings(), _draws()
        graph = super().trace(*args, **options)
        if draws != _draws():
            raise Refused(f'{type(self.root).__name__} draws random numbers in evaluation: leave them out')
        if isinstance(graph._codegen, fx.graph._PyTreeCodeGen):  # an argument's default is a tuple, a list or a dict
            graph.set_codegen(fx.graph.CodeGen())
            output = next(iter(reversed(graph.nodes)))
            if len(output.args[0]) == 1:
                output.args = tuple(output.args[0])
        for node in graph.nodes:
            node.type = None  # a hint, which need be no valid code
            if node.op in ('call_function', 'call_method') and node.target in SPELLINGS:
                node.kwargs = {{'axis': 'dim', 'keepdims': 'keepdim'}.get(key, key): each
                               for key, each in node.kwargs.items()}
        return graph


def _surroundings():
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *(
        torch.is_autocast_enabled(kind) for kind in ('cpu', 'cuda'))


def _draws():
    """What changes with every random number that is drawn."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy = pickle.dumps(np.random.get_state(legacy=False))  # whatever its generator
    return [each.tolist() for each in (torch.get_rng_state(), *cuda)], numpy, random.getstate()


class Call(NamedTuple):
    """A call of an activation. owner: the path of the module that makes it. target: the path of the activation module,
    or None of a function."""
    node: fx.Node
    owner: str
    target: str | None


def trace(ann: nn.Module) -> tuple[nn.Module, fx.Graph]:
    """(a copy of the ANN, the graph of its calls in eval mode). Raises Refused if torch.fx cannot follow it.

    Nothing in the graph changes its input: what the ANN's own code reads of a tensor that a call changed in place, it
    reads of that call. Dropouts that are functions become modules.
    """
    ann = unwrapped(ann)
    name = type(ann).__name__
    if ann._forward_hooks or ann._forward_pre_hooks:
        raise Refused(f'{name} has hooks of its own, which a copy of its calls does not run: remove them')
    if 'forward' in vars(ann):
        raise Refused(f"{name} has a forward of its own beside that of its class, which a copy of its calls does not "
                      'run: put it into the class')
    if _results(ann):
        with torch.no_grad():
            compute_weights(ann)
    if kept := _results(ann):
        raise Refused(f'{name} cannot be traced: RuntimeError: Only Tensors created by the user can be copied, and '
                      f'{kept[0]} is a result with a gradient: detach it, or delete it')
    try:
        tree = copy.deepcopy(ann)
        traced, graph, inputs = _followed(ann)
    except Refused:
        raise
    except Exception as error:  # tracing runs the network's own code
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        if isinstance(error, fx.proxy.TraceError):
            remedy = 'index it, as w[0], w[1]' if 'be iterated' in reason else (
                'write its forward without conditions on them, such as assert')
            reason = f'its way depends on values or shapes ({reason}): {remedy}'
        elif any(each in reason for each in ("'len'", 'int()', 'as an integer')):
            reason += ": write x.size(0) for len(x), // for int() of a quotient, and no range() of a size"
        raise Refused(f'{name} cannot be traced: {reason}') from error
    read = {node.target for node in graph.nodes if node.op == 'get_attr'}
    for key, value in vars(traced).items():  # tensors that its code makes
        if isinstance(value, torch.Tensor) and key not in vars(tree) and key in read:
            if value.requires_grad:
                raise Refused(f'{name} computes with a weight that torch.fx does not follow: read it as self.NAME, not '
                              'from a list')
            setattr(tree, key, value)
    modules = dict(tree.named_modules())
    read_in_order(graph, modules)
    further = [node for node in graph.nodes if node.op == 'placeholder'][inputs:]
    for node in reversed(graph.nodes):
        # further: arguments at their defaults
        if not node.users and node.op != 'output' and (node.op != 'placeholder' or node in further):
            graph.erase_node(node)
    used, idle = set(), _idle(ann, graph)
    for node in list(graph.nodes):
        if node in idle:
            node.replace_all_uses_with(source_of(node))
            graph.erase_node(node)
        elif node.target in FUNCTION_DROPOUTS and not argument(node, 2, 'training', True):
            owner, dropout = owner_of(node, modules), FUNCTION_DROPOUTS[node.target](argument(node, 1, 'p', 0.5))
            replace(graph, node, put(tree, Call(node, owner, None), dropout.train(modules[owner].training), used))
    return tree, graph


def _results(ann):
    """The names of tensors that a network keeps and that were computed from others with a gradient."""
    return ['.'.join(filter(None, (path, key))) for path, module in ann.named_modules()
            for key, value in {**vars(module), **module._buffers}.items()
            if isinstance(value, torch.Tensor) and value.grad_fn is not None]


def _idle(ann, graph):
    """The calls of a graph that change nothing: functions that drop paths, in evaluation, and dropouts that drop in
    training no more than in evaluation."""
    idle = {node for node in graph.nodes if (place := PATH_DROPS.get(getattr(node.target, '__name__', None)))
            and not argument(node, place, 'training', True)}
    dropouts = [node for node in graph.nodes if node.target in FUNCTION_DROPOUTS]
    if dropouts:
        with contextlib.suppress(Exception):  # its code for training cannot be traced
            again = [node for node in _followed(ann, training=True)[1].nodes if node.target in FUNCTION_DROPOUTS]
            if len(again) == len(dropouts):
                idle.update(node for node, other in zip(dropouts, again)
                            if not argument(node, 2, 'training', True) and not argument(other, 2, 'training', True))
    return idle


def _followed(ann, training=False):
    """(a copy of the ANN, the graph of its calls, how many of its arguments have no default)."""
    parameters = inspect.signature(ann.forward).parameters
    defaults = {key: value.default for key, value in parameters.items() if value.default is not value.empty}
    for buffers in (True, False):
        traced = copy.deepcopy(ann, {id(each): each for each in ann.parameters()})
        traced.train() if training else traced.eval()
        try:
            graph = _Tracer(buffers).trace(traced, concrete_args=defaults or None)
            return traced, graph, len(parameters) - len(defaults)
        except Exception:
            if not buffers:  # else its code may need a buffer's value, as for a condition
                raise


def lost_train(ann: nn.Module) -> list[str]:
    """A line on a network's own train(), which it has no more when it runs by its graph; none if it has torch's."""
    ann = unwrapped(ann)
    own = type(ann).train is not nn.Module.train and not isinstance(ann, Graphed)
    return [f'{type(ann).__name__}: its own train() is not called: let a part of the network have it'] if own else []


def lost_code(ann: nn.Module) -> list[str]:
    """A line if a network makes other calls in training than in evaluation, whose graph it runs by."""
    ann = unwrapped(ann)
    try:
        same = _calls(_followed(ann)[1]) == _calls(_followed(ann, training=True)[1])
    except Exception:  # its code for training cannot be traced
        same = False
    return [] if same else [f'{type(ann).__name__}: its code for training alone is left out: make each ReLU an nn.ReLU '
                            'that is called once']


def _calls(graph):
    """What each node of a graph calls with what, but for whether a dropout drops."""
    order, calls = {node: i for i, node in enumerate(graph.nodes)}, []
    for node in order:
        given = source_of(node) if node.target in FUNCTION_DROPOUTS else (node.args, node.kwargs)
        calls.append((node.op, node.target, fx.node.map_arg(given, order.get)))
    return calls


def _calls_the_same(ann, graph):
    """Whether a network's graph is this one: its code may hold a ReLU in a list, too, or ask for its type."""
    try:
        return _calls(trace(ann)[1]) == _calls(graph)
    except Exception:
        return False


def weight_of(module: nn.Module) -> torch.Tensor:
    """A tensor that tells the device and the type of a module's layers."""
    found = [each for each in module.modules() if not hasattr(each, 'threshold')]  # neurons have their own type
    tensors = (value for kind in (nn.Module.parameters, nn.Module.buffers) for each in found
               for value in kind(each, recurse=False) if value.is_floating_point())
    return next(tensors, torch.empty(0))


def unwrapped(ann: nn.Module) -> nn.Module:
    """The network itself, of one that torch.compile or a parallel wrapper holds."""
    while True:
        if isinstance(getattr(ann, '_orig_mod', None), nn.Module):
            ann = ann._orig_mod
        elif isinstance(ann, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
            ann = ann.module
        else:
            return ann


def read_in_order(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Have what a call changed in place read of that call by all later readers, and nothing be changed in place.

    meta['changes'] says of a call that it changes what is read later on, or reads what is changed later on. Raises
    Refused if a view of it, or what it is a view of, is read later on.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target in IN_PLACE and is_number(source_of(node)):
            node.target = IN_PLACE[node.target]  # a number has no place
        if not writes_to_input(node, modules):
            continue
        written, changed = source_of(node), node.kwargs.get('out')
        aliases, waiting = set(), [written]
        while waiting:
            alias = waiting.pop()
            if alias not in aliases:
                aliases.add(alias)
                waiting += [user for user in alias.users if source_of(user) is alias and shares_memory(user, modules)]
                waiting += [source_of(alias)] if shares_memory(alias, modules) else []
        later = [(alias, user) for alias in aliases for user in alias.users if order[alias] < order[node] < order[user]]
        held = [alias for alias in aliases if alias.op == 'get_attr']
        counter = not node.users and not later and all(is_buffer(alias, modules) for alias in held)  # nothing reads it
        if changed is not None or any(alias is not written for alias, _ in later) or held and not counter:
            raise Refused(f'{owner_of(node, modules) or "the network"}: {said(node, modules)[1]} changes in place what '
                          'is read elsewhere, too: leave out its inplace=True, or its _, or its out=, or its +=')
        for _, user in later:
            user.replace_input_with(written, node)
        for user in {user for alias in aliases for user in alias.users} - aliases:
            user.meta['changes'] = order[user] < order[node] or user.meta.get('changes', False)
        node.meta['changes'] = bool(later) or node.meta.get('changes', False)
        if node.op == 'call_method' and node.target not in RELUS:
            node.target = node.target.removesuffix('_')
        node.target = IN_PLACE.get(node.target, node.target)


def is_buffer(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node reads a buffer of a module."""
    owner, _, name = node.target.rpartition('.')
    return name in getattr(modules.get(owner), '_buffers', ())


def source_of(node: fx.Node) -> fx.Node:
    """The first argument of a call."""
    return node.args[0] if node.args else node.kwargs.get('input', next(iter(node.kwargs.values()), None))


def adds_nothing(node: fx.Node, value) -> bool:
    """Whether an argument is the 0 of a sum: Python's sum() begins with it."""
    return node.target in SUMS and isinstance(value, (int, float)) and value == 0


def argument(node: fx.Node, position: int, name: str, default=None):
    """An argument of a call, by its position or its name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def shares_memory(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether what a call gives may be its first argument, or a part of it."""
    if node.op == 'call_module':
        return isinstance(modules[node.target], (nn.Identity, nn.Flatten, nn.Unflatten, *DROPOUTS)) or (
            writes_to_input(node, modules))
    return node.op.startswith('call') and (
        node.target in VIEWS or node.target in FUNCTION_DROPOUTS or writes_to_input(node, modules)
        or getattr(node.target, '__name__', '') in PATH_DROPS)


def writes_to_input(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a call changes its first argument, or one named out."""
    if node.op == 'call_module':
        return getattr(modules[node.target], 'inplace', False)
    if node.op not in ('call_function', 'call_method'):
        return False
    name = node.target if isinstance(node.target, str) else node.target.__name__
    inplace = node.kwargs.get('inplace', node.target is F.relu and len(node.args) > 1 and node.args[1])
    if node.target in FUNCTION_DROPOUTS:
        inplace = argument(node, 3, 'inplace', False)
    inplace = inplace or node.target in IN_PLACE or name.endswith('_') and name != 'requires_grad_'
    return inplace or node.kwargs.get('out') is not None


def activations_of(tree: nn.Module, graph: fx.Graph) -> list[Call]:
    """The calls of ReLU and QCFS, in their order. Raises Refused if anything else in the graph cannot be spiking.

    meta['kind'] and meta['rank'] of each node say what it gives: VALUE, WEIGHT, ..., and how many dimensions, or None.
    """
    modules, calls, kinds, ranks = dict(tree.named_modules()), [], {}, {}
    name, behind = type(tree).__name__, {}  # node: whether an activation is behind it with no synapse between
    inputs = [str(node.target) for node in graph.nodes if node.op == 'placeholder']
    if len(inputs) != 1 or inputs[0].startswith('*'):
        count = 'any number of' if any(each.startswith('*') for each in inputs) else len(inputs)
        raise Refused(f'{name} takes {count} inputs: a spiking network takes one, the images')
    for node in graph.nodes:
        where, what = said(node, modules)

        def refuse(why, remedy, where=where, what=what):
            raise Refused(f'{where}: {what} {why}: {REMEDIES.get(remedy, remedy)}')

        module = modules[node.target] if node.op == 'call_module' else None
        values = [each for each in givers(node) if kinds[each] == VALUE]
        behind[node] = any(behind[each] for each in values)
        kinds[node], ranks[node] = VALUE, None
        if node.op == 'placeholder':
            ranks[node] = rank_taken(node, modules)
        elif node.op == 'output':
            if not isinstance(node.args[0], fx.Node):
                raise Refused(f'{name} gives more than one output: have it return the logits alone')
            if behind[node.args[0]]:
                raise Refused(f'{name} has an activation behind its last layer: leave it out, so that the output is '
                              'the logits')
        elif not values or is_size(node):
            kinds[node] = kind_of(node, kinds, ranks, refuse)
        else:
            ranks[node] = rank_of(node, module, what, values, ranks)
            if is_activation(node, module):
                if module is not None and (module._forward_hooks or module._forward_pre_hooks):
                    refuse('has hooks, which the neurons in its place do not have', 'remove them')
                calls.append(Call(node, owner_of(node, modules), node.target if module is not None else None))
                behind[node] = True
                continue
            check(node, module, what, kinds, ranks, refuse)
            if isinstance(module, SYNAPSES) or module is None and node.target in FUNCTION_SYNAPSES | MATRIX_PRODUCTS:
                behind[node] = False
    if not calls:
        raise Refused(f'{name} has no ReLU and no QCFS that could become spiking neurons')
    for node in graph.nodes:
        node.meta.update(kind=kinds[node], rank=ranks[node])
    return calls


def givers(node: fx.Node) -> list[fx.Node]:
    """The nodes with whose values a call computes: not the tensor in whose form it gives its first argument."""
    source = source_of(node) if node.target in LIKE else None
    return [source] if isinstance(source, fx.Node) else node.all_input_nodes


def others(graph: fx.Graph, nodes: list[fx.Node]) -> set[str]:
    """The paths of the modules that a graph calls beside those nodes: an activation may also be called on a weight."""
    return {node.target for node in graph.nodes if node.op == 'call_module' and node not in nodes}


def said(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """(where, what) a node calls, for a message."""
    if node.op == 'call_module':
        return node.target, type(modules[node.target]).__name__
    if node.target is getattr:
        return owner_of(node, modules) or 'the network', f'.{node.args[1]}'
    name = getattr(node.target, '__name__', str(node.target))
    return owner_of(node, modules) or 'the network', name.lstrip('_') + '()'


def is_activation(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node calls a ReLU or a QCFS."""
    return isinstance(module, ACTIVATIONS) if module is not None else node.target in RELUS


def owner_of(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """The path of the module whose forward makes a call."""
    stack = [path for path, _ in (node.meta.get('nn_module_stack') or {}).values()]
    stack = [path for path in stack if path in modules and path != node.target]
    return stack[-1] if stack else ''


def is_size(node: fx.Node) -> bool:
    """Whether a node asks for a shape, a type or a device."""
    return node.op == 'call_method' and node.target in ('size', 'dim') or (
        node.target is getattr and node.args[1] in ('shape', 'ndim', 'dtype', 'device'))


def is_number(node: fx.Node) -> bool:
    """Whether a node gives a shape or what is computed from its numbers."""
    return is_size(node) or getattr(node.target, '__module__', '') == '_operator' and bool(node.all_input_nodes) and (
        all(map(is_number, node.all_input_nodes)))


def kind_of(node: fx.Node, kinds: dict, ranks: dict, refuse: Callable) -> str:
    """The kind of what a node gives that does not depend on values; refuses random numbers, and what computes with the
    number of samples, which are T times as many in a spiking network."""
    inputs = [kinds[each] for each in node.all_input_nodes]
    name = getattr(node.target, '__name__', str(node.target))
    if node.op in ('call_function', 'call_method') and _RANDOM.search(name):
        refuse('draws random numbers', 'leave them out')
    if is_size(node) and VALUE in inputs:
        dim = argument(node, 1, 'dim') if node.target == 'size' else None
        if node.target != 'size' and node.args[1:] != ('shape',):
            return SIZE
        if dim is not None:
            return COUNT if first(dim, ranks[node.args[0]]) else SIZE
        ranks[node] = ranks[node.args[0]]
        return SHAPE
    if COUNT not in inputs and SHAPE not in inputs:
        return WEIGHT if node.op == 'get_attr' or WEIGHT in inputs or not inputs else SIZE
    if node.target is operator.getitem:
        index = node.args[1]
        if isinstance(index, slice):
            ranks[node] = None
            return SHAPE if index.start is None or first(index.start, ranks[node.args[0]]) else SIZE
        return COUNT if first(index, ranks[node.args[0]]) else SIZE
    if node.target is operator.mul and SHAPE not in inputs:
        return COUNT
    if name not in ('zeros', 'ones', 'full', 'expand', 'repeat', 'broadcast_to', 'new_zeros', 'new_ones',
                    'new_full') or not counted(node, kinds, 1 if node.op == 'call_method' else 0):
        refuse('computes with the number of samples', 'write it without')
    return WEIGHT


def counted(node: fx.Node, kinds: dict, position: int) -> bool:
    """Whether the number of samples stands first of the sizes from an argument's position on, and nowhere else."""
    sizes = node.args[position:] or [node.kwargs.get('size', node.kwargs.get('shape'))]
    sizes = sizes[0] if isinstance(sizes[0], (list, tuple)) else sizes
    counts = [each for each in node.all_input_nodes if kinds[each] in (COUNT, SHAPE)]
    return counts == [sizes[0]] and sum(each is sizes[0] for each in sizes) == 1


def first(dim: int, rank: int | None) -> bool:
    """Whether a dimension is the samples', of a tensor of so many; of one of unknown rank, any below -1 may be."""
    return dim == 0 or isinstance(dim, int) and (dim == -rank if rank else dim < -1)


def rank_that(name: str) -> int | None:
    """How many dimensions a layer of that name takes and gives; None if its name does not tell."""
    kind = re.search('(Conv|conv|BatchNorm).*([123])d$', name)
    return int(kind[2]) + 2 if kind and name != 'BatchNorm1d' else None


def rank_taken(node: fx.Node, modules: dict[str, nn.Module]) -> int | None:
    """How many dimensions the layers behind a node take, also behind sums and products; None if none tells."""
    for user in node.users:
        known = rank_that(said(user, modules)[1].removesuffix('()'))
        if not known and user.op != 'call_module' and user.target in SUMS | PRODUCTS - MATRIX_PRODUCTS:
            known = rank_taken(user, modules)
        if known:
            return known
    return None


def rank_of(node: fx.Node, module: nn.Module | None, what: str, values: list[fx.Node], ranks: dict) -> int | None:
    """How many dimensions a node gives, as far as its name and what it is given tell."""
    given, name = ranks[values[0]], what.removesuffix('()')
    if known := rank_that(name):
        return known
    if node.target in RESHAPES and len(node.args) > 1:
        sizes = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
        return len(sizes) if not isinstance(sizes[0], fx.Node) or len(sizes) > 1 else None
    if name == 'getitem' and source_of(node).target not in (torch.chunk, 'chunk', torch.split, 'split'):
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if not all(each is None or each is Ellipsis or type(each) in (int, slice) for each in index):
            return None
        return given and given + index.count(None) - sum(isinstance(each, int) for each in index)
    if name == 'squeeze':
        dims = argument(node, 1, 'dim')
        return given and given - (len(dims) if isinstance(dims, (list, tuple)) else 1)
    if name in ('unflatten', 'Unflatten'):
        sizes = argument(node, 2, 'sizes') if module is None else module.unflattened_size
        return given + len(sizes) - 1 if given and isinstance(sizes, (list, tuple)) else None
    if name == 'expand_as':
        return ranks[argument(node, 1, 'other')]
    if name in ('type_as', 'to'):
        return given
    if node.target in MATRIX_PRODUCTS:
        return None
    if name in ('flatten', 'Flatten'):
        start, end = (argument(node, 1, 'start_dim', 0), argument(node, 2, 'end_dim', -1)) if module is None else (
            module.start_dim, module.end_dim)
        if (start, end) == (1, -1):
            return 2
        return given - (end % given - start % given) if given and type(start) is type(end) is int else None
    if name in ('mean', 'sum'):
        dims, keeps = argument(node, 1, 'dim'), argument(node, 2, 'keepdim', False)
        lost = 0 if keeps else len(dims) if isinstance(dims, (list, tuple)) else 1
        return given and given - lost
    if name == 'unsqueeze':
        return given and given + 1
    known = [ranks[each] for each in values]
    return None if None in known else max(known)


def check(node: fx.Node, module: nn.Module | None, what: str, kinds: dict, ranks: dict, refuse: Callable) -> None:
    """Refuse a call unless it is linear in the activations and keeps the samples apart."""
    target, name, source = node.target, what.removesuffix('()'), source_of(node)
    of_values = [each for each in (*node.args, *node.kwargs.values())
                 if isinstance(each, fx.Node) and kinds[each] == VALUE]
    rank = ranks[next(each for each in node.all_input_nodes if kinds[each] == VALUE)]
    counts = any(kinds[each] in (COUNT, SHAPE) for each in node.all_input_nodes)
    if isinstance(target, type):  # a NamedTuple, a dataclass
        refuse('gives more than one output', 'return the logits alone')
    if counts and target not in RESHAPES:
        refuse('computes with the number of samples', 'write it without')
    if module is not None:
        check_module(module, name, rank, refuse)
    elif target in PRODUCTS:
        if len(of_values) > 1:
            refuse('is a product of activations', 'product')
        if target in QUOTIENTS:
            if of_values[0] is not source:
                refuse('divides by an activation', 'product')
            if node.kwargs.get('rounding_mode'):
                refuse('rounds', 'divide without rounding_mode')
        if target in MATRIX_PRODUCTS and of_values[0] is not source and (rank or 0) < 3:
            refuse('mixes samples', 'put the weights behind the @')
    elif target in FUNCTION_SYNAPSES:
        if of_values != [source]:
            refuse('has weights that depend on the input', 'product')
    elif target in FUNCTION_DROPOUTS:  # trace() has made modules of the others
        refuse('drops in evaluation, too', 'say training=self.training')
    elif target in SPELLINGS:
        position, names, default = DIMENSIONS[name]
        dims = [argument(node, position + i, each, default) for i, each in enumerate(names)]
        dims = [dim for each in dims for dim in (each if isinstance(each, (list, tuple)) else [each])]
        # a new dimension moves the others
        if None in dims or any(first(dim, rank and rank + (name == 'unsqueeze')) for dim in dims):
            refuse('mixes samples', 'samples')
    elif target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if source.target in (torch.chunk, 'chunk', torch.split, 'split'):
            return
        numbers = len([each for each in index[1:] if each is not None])  # behind an Ellipsis, from the last one on
        if index[0] is Ellipsis and numbers < (rank or 2):
            return
        if index[0] != slice(None):
            refuse('takes some of the samples', 'index from dimension 1 on')
    elif target in PERMUTES:
        dims = argument(node, 1, 'dims')
        if (dims if isinstance(dims, (list, tuple)) else [dims])[0] != 0:
            refuse('moves the samples', 'keep dimension 0')
    elif target in RESHAPES:
        sizes = node.args[1:] or [node.kwargs.get('size', node.kwargs.get('shape'))]
        start = sizes[0][0] if isinstance(sizes[0], (list, tuple)) else sizes[0]
        if not (counted(node, kinds, 1) if counts else start == -1):
            refuse('mixes samples', 'begin its sizes with -1 or x.size(0)')
    elif target in VIEWS:
        kind = next((each for each in (*node.args, *node.kwargs.values()) if isinstance(each, torch.dtype)), None)
        if kind is not None and not kind.is_floating_point or name == 'type' and kind is None:
            refuse('rounds', 'keep floating-point numbers')
    elif target is F.pad and rank and len(argument(node, 1, 'pad')) >= 2 * rank:
        refuse('adds samples', 'pad from dimension 1 on')
    elif target not in SUMS | FREE and not is_pool(target):
        refuse_by_name(name, refuse)


def check_module(module: nn.Module, name: str, rank: int | None, refuse: Callable) -> None:
    """Refuse a module unless it is linear in its input and keeps the samples apart."""
    if not isinstance(module, LINEAR_MODULES):
        refuse_by_name(name, refuse)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
        refuse('has no running statistics', 'build it with track_running_stats=True')
    if getattr(module, 'return_indices', False):
        refuse('gives more than one output', 'build it without return_indices')
    if isinstance(module, (nn.Flatten, nn.Unflatten)):
        if first(getattr(module, 'start_dim', getattr(module, 'dim', None)), rank):
            refuse('mixes samples', 'flatten from dimension 1 on')


def is_average_pool(name: str) -> bool:
    """Whether a function of torch of that name averages; torch wraps some of its own, so that they are told by name."""
    return re.fullmatch('(adaptive_)?avg_pool[123]d', name) is not None


def is_max_pool(target) -> bool:
    return re.fullmatch('(adaptive_)?max_pool[123]d', getattr(target, '__name__', '')) is not None


def is_pool(target) -> bool:
    """Whether a function is one of torch that pools."""
    home = getattr(target, '__module__', None) or ''
    return home.startswith('torch') and (is_average_pool(target.__name__) or is_max_pool(target))


def refuse_by_name(name: str, refuse: Callable) -> None:
    if 'oftmax' in name or 'oftmin' in name:
        refuse('has no spiking counterpart', 'softmax')
    if _PRODUCTS.search(name):
        refuse('is a product of activations', 'product')
    if name == 'batch_norm':
        refuse('would not follow into training', 'put nn.BatchNorm1d, 2d or 3d in its place')
    if _NORMS.search(name):
        refuse('depends on all the values of a sample', 'norm')
    if name in ('expand', 'repeat', 'tile', 'broadcast_to', 'repeat_interleave'):
        refuse('is not followed', 'copies')
    refuse('has no spiking counterpart', 'activation' if _ACTIVATIONS.search(name) else 'other')


def put(tree: nn.Module, call: Call, module: nn.Module, used: set[str]) -> str:
    """Put a module into the tree for a call of an activation or a dropout; returns its path.

    The first call of a module takes its place and its name, a further one, or a function, a name beside it.
    """
    target = call.target or '.'.join(filter(None, (call.owner, _name_of(call.node))))
    parent, _, stem = target.rpartition('.')
    owner, name, number = tree.get_submodule(parent), stem, 0
    while hasattr(owner, name) and (target != call.target or number or target in used):
        number += 1
        name = f'{stem}_{number}'
    owner.add_module(name, module)
    path = '.'.join(filter(None, (parent, name)))
    used.add(path)
    return path


def _name_of(node):
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return name.rstrip('_')


def replace(graph: fx.Graph, node: fx.Node, path: str) -> None:
    """Have the graph call the module at `path` in place of a node."""
    with graph.inserting_after(node):
        new = graph.call_module(path, (source_of(node),))
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def channels_of(node: fx.Node, modules: dict[str, nn.Module]) -> int | None:
    """How many channels (dimension 1) a node gives, as the layers before it say; None if they do not."""
    module = modules.get(node.target) if node.op == 'call_module' else None
    rank = node.meta.get('rank')
    if isinstance(module, nn.Linear) and rank != 2:  # its outputs are the last dimension
        return channels_of(source_of(node), modules) if rank else None
    for name in ('out_channels', 'out_features', 'num_features'):
        if isinstance(getattr(module, name, None), int) and getattr(module, name) > 0:  # 0: of a lazy layer
            return getattr(module, name)
    if node.target in CATS:
        parts = source_of(node)
        found = [None] if isinstance(parts, fx.Node) else [channels_of(each, modules) for each in parts]
        return None if None in found or argument(node, 1, 'dim', 0) != 1 else sum(found)
    if node.target is F.pad and len(argument(node, 1, 'pad')) >= 2 * (rank or 4) - 2:
        return None
    if module is None:
        keeps = node.target in SUMS | PRODUCTS - MATRIX_PRODUCTS | KEEPERS or is_pool(node.target)
    else:
        keeps = not isinstance(module, (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle))
    inputs = [source_of(node)] if module is None and node.target in KEEPERS else node.all_input_nodes
    found = [channels_of(each, modules) for each in inputs] if keeps else []
    return max((each for each in found if each is not None), default=None)


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

    def __setattr__(self, name, value):
        own = name in self.__dict__ or hasattr(type(self), name)
        if own and not isinstance(value, (torch.Tensor, nn.Module)):  # also if a module of the tree has the name
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return self._run(self._space, x)

    def __getstate__(self):
        state, holder = self.__dict__.copy(), nn.Module()
        del state['_run']
        holder.tree = self._space  # in which no name can be one of GraphModule's own
        state['_graph'] = fx.GraphModule(holder, _renamed(self._graph, 'tree.{}'.format))  # which can be pickled
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__['_graph'] = _renamed(state['_graph'].graph, lambda path: path.removeprefix('tree.'))
        self._compile()


def _renamed(graph, name):
    """A copy of a graph whose modules, parameters and buffers have other paths."""
    graph = copy.deepcopy(graph)
    for node in graph.nodes:
        if node.op in ('call_module', 'get_attr'):
            node.target = name(node.target)
    return graph


class Traced(Graphed, nn.Module):
    """A network that runs by its graph, with a module of its own for every activation.

    notes: lines that say how its training differs from that of the network it was made from.
    """
    notes = ()

    def __init__(self, tree: nn.Module, graph: fx.Graph):
        super().__init__()
        self.hold(tree, graph)
        self.training = tree.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the network that was traced."""
        return self.run(x)


def quantize(ann: nn.Module, levels: int = 8, channels: bool = False, bound: float = 2.0) -> nn.Module:
    """A copy of an ANN with a QCFS of its own for every call of a ReLU.

    levels, bound: of QCFS; channels: a bound for each channel, not one for the layer. A QCFS that is there stays as it
    is: to train with other levels, set its `levels`. The copy is of the ANN's own
    class if each ReLU is a module that is called once, and called in the same way as QCFS. Else it runs by its graph
    (Traced), and a warning says if code for training is left out. Weights keep their names.

    Raises ValueError for a network that cannot become a spiking one.
    """
    tree, graph = trace(ann)
    calls = activations_of(tree, graph)
    own = [call.target for call in calls]
    modules = dict(tree.named_modules())
    names = [id(module) for _, module in tree.named_modules(remove_duplicate=False)]  # some have several
    used = others(graph, [call.node for call in calls])
    plain = None not in own and len(set(own)) == len(own) and used.isdisjoint(own) and not any(
        call.node.meta.get('changes') or names.count(id(modules[call.target])) > 1 for call in calls)
    first, fresh = weight_of(tree), []
    for call, module in [(call, modules.get(call.target)) for call in calls]:
        if isinstance(module, QCFS):
            used.add(call.target)
            continue
        count = None
        if channels and (count := channels_of(source_of(call.node), modules)) is None:
            raise Refused(f'{call.target or call.owner}: how many channels it has is unknown: take one bound a layer')
        new = QCFS(levels, bound, count).to(first.device, first.dtype).train(tree.training)
        path = put(tree, call, new, used)
        replace(graph, call.node, path)
        modules[path] = new
        fresh.append(call)
    if plain:
        copied = copy.deepcopy(unwrapped(ann))
        for call in fresh:
            put(copied, call, tree.get_submodule(call.target), set())
        if _calls_the_same(copied, graph):
            return copied
    made = Traced(tree, graph)
    made.notes = lost_train(ann) + lost_code(ann)
    for note in made.notes:
        warnings.warn(note, stacklevel=2)
    return made
