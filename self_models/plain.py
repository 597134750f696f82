"""Any network as a spiking network: an LIF for each of its activations; the rest stays as it is.

Time steps and samples share the first dimension, (T * B, ...), steps outermost, so convolutions, batch norm, pools and
sums are torch's own. A spike is worth its threshold: an LIF gives theta s(t), so that currents, biases and the branches
of a sum stay in the units of the ANN, and the output's mean over time stands for its logits.
"""
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import fx, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing the compiler at once

from self_models.encoding import ENCODINGS
from self_models.layers import Exact
from self_models.lif import LIFParameters, lif_backward, lif_forward, parameter_gradients, surrogate_state
from self_models.published import PoissonGenerator
from self_models.qcfs import QCFS, SMALLEST
from self_models.spiking_network import SpikingNetwork, check_leak, check_neurons, check_threshold, check_timesteps
from self_models.surrogate import FLAGS, SURROGATES
from self_models.traced import (
    COUNT,
    DROPOUTS,
    MAX_POOLS,
    SHAPE,
    SIZE,
    VALUE,
    WEIGHT,
    Call,
    Graphed,
    Refused,
    activations_of,
    compiled,
    givers,
    is_max_pool,
    is_size,
    lost_train,
    others,
    owner_of,
    put,
    replace,
    source_of,
    trace,
    weight_of,
)

SETTINGS = {'activation', 'delay', 'initial_potential', 'backend', *FLAGS}  # of neurons
# with which the mean output of a network of QCFS is the ANN's (Bu et al. 2022, theorem 2)
QUANTIZED = {'encoding': 'direct', 'delay': 0, 'initial_potential': 0.5, 'leak': 1.0}
BLOCK, SHORTEST = 2 ** 19, 2 ** 15  # values of a tensor that a thread processes at once, and of one row of it


class LIF(Exact):
    """Leaky integrate-and-fire neurons in place of an activation: currents (T * B, ...) -> theta s(t), (T * B, ...).

    timesteps: T. threshold, leak: buffers (), or parameters if learn_threshold, learn_leak. activation: the surrogate
    gradient by its name, with the flags of surrogate.py. delay: steps from input to spike, 1 or 0. initial_potential:
    in thresholds. bounds: (C,) by which each channel (dimension 1) is divided before and multiplied after, or None.
    The attribute once: the currents are (B, ...), the same at all steps; False at first. Equations: lif.py. Raises
    ValueError for settings that no neuron has, and for currents whose first dimension is no multiple of T.
    """
    exact = 'threshold', 'leak'

    def __init__(self, timesteps: int = 1, threshold: float = 1.0, leak: float = 1.0, activation: str = 'STDB',
                 delay: int = 1, initial_potential: float = 0.0, learn_threshold: bool = False,
                 learn_leak: bool = False, backend: str = 'torch', bounds: torch.Tensor | None = None, **flags: float):
        super().__init__()
        check_neurons(backend, activation, delay, initial_potential)
        if unknown := flags.keys() - FLAGS.keys():
            raise ValueError(f'unknown {", ".join(sorted(unknown))}: choose of {", ".join(FLAGS)}')
        self.timesteps, self.delay, self.initial_potential = check_timesteps(timesteps), delay, initial_potential
        self.activation, self.flags, self.backend, self.once = activation, flags, backend, False
        for name, value, learned in (('threshold', check_threshold(threshold), learn_threshold),
                                     ('leak', check_leak(leak), learn_leak)):
            if learned:
                self.register_parameter(name, nn.Parameter(torch.tensor(float(value))))
            else:
                self.register_buffer(name, torch.tensor(value, dtype=torch.float64))
        self.register_buffer('bounds', bounds)
        SURROGATES[activation](**flags)  # raises ValueError for values that make none

    def parameters_of(self) -> LIFParameters:
        """Its LIFParameters."""
        surrogate = SURROGATES[self.activation](**self.flags)
        return LIFParameters(self.threshold, self.leak, surrogate, self.backend, self.delay, self.initial_potential)

    @_disable_dynamo  # the scan over time writes into views, which a compiler does not follow
    def forward(self, current: torch.Tensor) -> torch.Tensor:
        """(T * B, ...), or (B, ...) if once -> (T * B, ...) of the same type: theta at a spike, else 0."""
        if not self.once and len(current) % self.timesteps:
            raise ValueError(f'{len(current)} currents are no whole number of batches over {self.timesteps} time steps')
        if self.bounds is None:
            return _LIF.apply(current, self.threshold, self.leak, self.parameters_of(), self.timesteps, self.once)
        bounds = along_channels(self.bounds, current)
        return bounds * _LIF.apply(current / bounds, self.threshold, self.leak, self.parameters_of(), self.timesteps,
                                   self.once)

    def extra_repr(self):
        return f'T={self.timesteps}, threshold={self.threshold.item():.4g}, leak={self.leak.item():.4g}'


def along_channels(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Values (C,) in a shape and type that multiply x (n, C, ...)."""
    return values.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


def rows(x: torch.Tensor, count: int) -> torch.Tensor:
    """A dense tensor (count * B, ...), however its other dimensions are stored, as (count, M), without a copy."""
    return x.as_strided((count, x.numel() // count), (x.numel() // count, 1))


def dense(x: torch.Tensor) -> torch.Tensor:
    """A tensor with the first dimension outermost and no gaps, of torch's two usual layouts: as it is, or a copy."""
    if x.is_contiguous() or x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def empty_over(x: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor (count, ...) in the layout of a dense x (n, ...)."""
    return torch.empty_strided((count, *x.shape[1:]), strides_of(x), dtype=dtype, device=x.device)


def strides_of(x: torch.Tensor) -> tuple:
    """The strides of a dense tensor; torch may give any to a first dimension of 1."""
    return (x.numel() // max(1, len(x)), *x.stride()[1:])


def blocks(x: torch.Tensor) -> list[slice]:
    """Slices of the columns of x (n, M), of so many that they stay in a CPU's cache; on a GPU one of all."""
    size = x.shape[1] if x.is_cuda else max(SHORTEST, BLOCK // len(x)) * torch.get_num_threads()
    return [slice(i, min(i + size, x.shape[1])) for i in range(0, x.shape[1], size)]


class _LIF(torch.autograd.Function):
    """theta s(t) of LIF neurons, and its gradients.

    It keeps the currents, and computes the potentials again, or its output if the surrogate is of the spikes.
    Neurons are processed in blocks that stay in a CPU's cache, each over all steps.
    """

    @staticmethod
    def forward(ctx, current, threshold, leak, parameters, steps, once):
        current, numbers, delay = dense(current), parameters.detached(), parameters.delay
        dtype = torch.promote_types(current.dtype, torch.float32)
        batch = len(current) if once else len(current) // steps
        count = steps - delay  # of the currents whose spikes leave within the steps
        out = empty_over(current, steps * batch, current.dtype)
        ctx.of_spikes = parameters.surrogate.of_spikes and not any(ctx.needs_input_grad[1:3])
        ctx.shape = numbers, steps, once, dtype
        ctx.save_for_backward(out if ctx.of_spikes else current)
        if not out.numel() or not count:
            return out.zero_()
        given, spikes, faults = rows(current, 1 if once else steps)[:count], rows(out, steps), []
        spikes[:delay].zero_()
        spikes = spikes[delay:]
        slices = blocks(spikes)
        work = torch.empty(slices[0].stop, dtype=dtype, device=current.device)
        for some in slices:
            part, to = given[:, some].to(dtype), spikes[:, some]
            fires = to if to.dtype == dtype else torch.empty(to.shape, dtype=dtype, device=to.device)
            u, _ = lif_forward(part[0] if once else part, fires, numbers,
                               potentials=work[:some.stop - some.start].expand(count, -1))
            faults.append(sum(0 * end for end in torch.aminmax(u)))
            fires.mul_(numbers.threshold + faults[-1])
            if fires is not to:
                to.copy_(fires)
        # a potential that is not finite stays so, and makes all that its layer gives NaN
        if len(faults) > 1 and sum(faults).isnan():
            spikes.fill_(torch.nan)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        numbers, steps, once, dtype = ctx.shape
        kept, = ctx.saved_tensors
        learned, delay, count = any(ctx.needs_input_grad[1:3]), numbers.delay, steps - numbers.delay
        if grad.stride() != strides_of(kept):
            grad = empty_over(kept, len(grad), grad.dtype).copy_(grad)
        found = empty_over(kept, len(grad) // steps if once else len(grad), kept.dtype)
        if not grad.numel() or not count:
            return found.zero_(), None, None, None, None, None
        given, known = rows(grad, steps)[delay:], rows(kept, 1 if once and not ctx.of_spikes else steps)
        result, own = rows(found, 1 if once else steps), [0, 0]
        result[count:].zero_()
        slices = blocks(given)
        work = torch.empty(count + (count if learned else 1), slices[0].stop, dtype=dtype, device=grad.device)
        for some in slices:
            part = given[:, some].to(dtype)
            potentials, spikes = work[:count, :some.stop - some.start], work[count:, :some.stop - some.start]
            if ctx.of_spikes:
                state = known[delay:, some] > 0
            else:
                current = known[:count, some].to(dtype)
                lif_forward(current[0] if once else current, spikes if learned else spikes.expand(count, -1), numbers,
                            potentials=potentials)
                state = surrogate_state(potentials, numbers)
            g = result[:count, some] if not once and kept.dtype == dtype else torch.empty_like(part)
            # of theta s(t) with respect to s(t), and of the spike with respect to the potential
            torch.mul(part, numbers.threshold * numbers.height, out=g)
            lif_backward(g, state, delay, numbers)
            if learned:
                parts = parameter_gradients(g, potentials, numbers)
                own = [own[0] + parts[0] + (part * spikes).sum(), own[1] + parts[1]]
            if once:
                result[:, some] = g.sum(0)
            elif kept.dtype != dtype:
                result[:count, some] = g
        return (found, *own, None, None, None) if learned else (found, None, None, None, None, None)


class HeldDropout(nn.Module):
    """A dropout whose mask is drawn once for each sample and held over the time steps: (T * B, ...), or (B, ...) if
    once."""

    def __init__(self, dropout: nn.Module, timesteps: int = 1):
        super().__init__()
        self.dropout, self.timesteps, self.once = dropout, timesteps, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x -> the same shape and type."""
        if not self.training or not self.dropout.p:
            return x
        steps = 1 if self.once else self.timesteps
        over_time = x.unflatten(0, (steps, len(x) // steps))
        return (over_time * self.dropout(torch.ones_like(over_time[0]))).flatten(0, 1)


class Repeat(nn.Module):
    """What is the same at all time steps, (B, ...), at each of them: (T * B, ...)."""

    def __init__(self, timesteps: int = 1):
        super().__init__()
        self.timesteps = timesteps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x] * self.timesteps)


class PlainRecord(NamedTuple):
    """What one LIF is given and does: current, potentials and spikes (T, B, ...) at each step, spikes as bool. The
    potential is the one that the neuron fires on."""
    name: str
    parameters: LIFParameters
    current: torch.Tensor
    potentials: torch.Tensor
    spikes: torch.Tensor


class PlainNetwork(Graphed, SpikingNetwork):
    """The spiking network of any ANN; made by spiking(). Modules, weights and their names are the ANN's.

    notes: lines that say how it differs from the ANN. activations: the paths of the ANN's modules that the LIFs
    replace, None for a function. Other attributes: as for SpikingNetwork.
    """

    def __init__(self, tree: nn.Module, graph: fx.Graph, names: list[str], activations: list[str | None], depth: int,
                 rate: float, options: dict):
        super().__init__(rate=rate, **options)
        self.__dict__['input_layer'] = PoissonGenerator(rate)
        del self._modules['input_layer']
        self.layer_names, self.depth, self.notes, self.activations = names, depth, [], activations
        self.hold(tree, graph)
        self.timesteps = options['timesteps']

    carried = True  # a spike is worth its threshold

    def __setattr__(self, name, value):
        if name == 'encoding' and '_space' in vars(self) and (  # its graph is of the one
                value not in ENCODINGS or ENCODINGS[value].constant != ENCODINGS[self.encoding].constant):
            raise ValueError(f'the encoding cannot become {value!r}: make the network with it, as spiking(ann, '
                             f'timesteps, encoding={value!r})')
        super().__setattr__(name, value)
        if name in SETTINGS and '_space' in vars(self):  # what is set on the network holds for its LIFs
            for lif in self.lifs:
                if name in FLAGS:
                    lif.flags[name] = value
                else:
                    setattr(lif, name, value)

    @property
    def timesteps(self) -> int:
        return self.__dict__['_timesteps']

    @timesteps.setter
    def timesteps(self, value: int):
        self.__dict__['_timesteps'] = value
        for module in self.modules():
            if isinstance(module, (LIF, HeldDropout, Repeat)):
                module.timesteps = value

    @property
    def lifs(self) -> list[LIF]:
        """Its LIF modules, in the order of their calls."""
        return [self._space.get_submodule(name) for name in self.layer_names]

    @property
    def thresholds(self) -> torch.Tensor:
        return torch.stack([lif.threshold for lif in self.lifs])

    @property
    def leaks(self) -> torch.Tensor:
        return torch.stack([lif.leak for lif in self.lifs])

    @property
    def balanced(self) -> int:
        return len(self.layer_names)

    def set_neurons(self, what: str, values: list[float]) -> None:
        for lif, value in zip(self.lifs, values):
            getattr(lif, what.removesuffix('s')).fill_(value)

    @torch.no_grad()
    def constrain(self) -> None:
        """Bring learned thresholds above 0 and learned leaks into (0, 1]; to be called after each training step."""
        for lif in self.lifs:
            if lif.threshold.requires_grad:
                lif.threshold.clamp_(min=SMALLEST)
            if lif.leak.requires_grad:
                lif.leak.clamp_(SMALLEST, 1)

    @torch.no_grad()
    def copy_from(self, ann: nn.Module) -> None:
        """Copy the weights of the ANN that it was made from, or of one like it; QCFS bounds become thresholds.

        Raises ValueError for an ANN with other weights or bounds; nothing is copied then.
        """
        found, lifs, kept = (
            {name: module for name, module in network.named_modules(remove_duplicate=False) if isinstance(module, kind)}
            for network, kind in ((ann, QCFS), (self, LIF), (self, QCFS)))
        known, found = found, {name: module for name, module in found.items() if name not in kept}  # neurons now
        weights = {key: value for key, value in ann.state_dict().items() if key.rpartition('.')[0] not in found}
        own = {key: value for key, value in self.state_dict().items() if key.rpartition('.')[0] not in lifs}
        paths = self.layer_names if set(self.layer_names) <= found.keys() else self.activations  # of a quantized copy
        bounds = [checked_bound(known[name].bound) if name in known else None for name in paths]
        left = {id(each) for each in found.values()} - {id(found[name]) for name in paths if name in found}
        if left:
            raise ValueError('the ANN and the spiking network have different layouts: the ANN has further QCFS')
        given = {**weights, **{f'bounds of {name}': bound if bound is not None and bound.dim() else None
                               for name, bound in zip(self.layer_names, bounds)}}
        wanted = {**own, **{f'bounds of {name}': lif.bounds for name, lif in zip(self.layer_names, self.lifs)}}
        given, wanted = ({key: None if value is None else value.shape for key, value in each.items()}
                         for each in (given, wanted))
        wrong = sorted(key for key in given.keys() | wanted.keys() if given.get(key, 0) != wanted.get(key, 0))
        if wrong:
            raise ValueError(f'the ANN and the spiking network have different layouts: {wrong[0]} differs')
        for key, value in weights.items():
            own[key].copy_(value)
        for lif, bound in zip(self.lifs, bounds):
            if bound is not None:
                (lif.bounds if bound.dim() else lif.threshold).copy_(bound)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, ...) as the network's input: unchanged for direct input, else spikes at each step."""
        encoding = ENCODINGS[self.encoding]
        if encoding.constant:
            return x
        return torch.cat([torch.where(encoding.fires(x, t, self.input_layer.rate), x.sign(), 0)
                          for t in range(self.timesteps)])

    def over_time(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, ...) -> the output at each step, (T, B, labels)."""
        output = self.run(self.encode(x))
        if len(output) != self.timesteps * len(x):
            raise ValueError(f'the network gives {len(output)} outputs for {len(x)} images at {self.timesteps} time '
                             'steps: its forward mixes samples')
        output = output.to(torch.promote_types(output.dtype, x.dtype))  # a sum in autocast's bfloat16 would be rounded
        return output.view(self.timesteps, len(x), *output.shape[1:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ...) float images -> (B, labels): the output summed over all time steps."""
        return self.over_time(x).sum(0)

    @torch.no_grad()
    def curve(self, x: torch.Tensor, at: list[int]) -> torch.Tensor:
        """The outputs after each of `at` time steps: (len(at), B, labels), from one pass over `timesteps`.

        (B, ...) float images; at: whole numbers in ascending order, from 1 to timesteps. Raises ValueError for others.
        """
        at = self.checked_curve(at)
        output = self.over_time(x)
        # in 16 bits a running sum would be rounded at each step
        total = output.cumsum(0, dtype=torch.promote_types(output.dtype, torch.float32))
        return total[[steps - 1 for steps in at]].to(output.dtype)

    @torch.no_grad()
    def record(self, x: torch.Tensor) -> Iterator[PlainRecord]:
        """Yield what every LIF is given and does, in the order of `layer_names`, as images x (B, ...) go through."""
        found, hooks = {}, []
        for name, lif in zip(self.layer_names, self.lifs):
            def look(lif, given, output, name=name):
                found[name] = self._recorded(name, lif, given[0])
            hooks.append(lif.register_forward_hook(look))
        try:
            self.run(self.encode(x))
        finally:
            for hook in hooks:
                hook.remove()
        yield from (found[name] for name in self.layer_names)

    @staticmethod
    def _recorded(name, lif, current):
        """The PlainRecord of a call of an LIF."""
        parameters, steps = lif.parameters_of().detached(), lif.timesteps
        if lif.bounds is not None:
            current = current / along_channels(lif.bounds, current)
        current = current.unflatten(0, (1, -1) if lif.once else (steps, -1))
        current = current.expand(steps, *current.shape[1:]).contiguous()
        flat = current.flatten(1).to(torch.promote_types(current.dtype, torch.float32))
        potentials, spikes = torch.empty_like(flat), torch.zeros_like(flat, dtype=torch.bool)
        u, _ = lif_forward(flat, spikes, parameters, potentials=potentials)
        if parameters.delay:
            first = torch.full_like(u, parameters.initial_potential * parameters.threshold)
            potentials = torch.cat([first[None], potentials[:-1]])
            spikes = torch.cat([torch.zeros_like(spikes[:1]), spikes[:-1]])
        return PlainRecord(name, parameters, current, potentials.view(current.shape), spikes.view(current.shape))


def spiking(ann: nn.Module, timesteps: int, **options) -> PlainNetwork:
    """The spiking network of any ANN: a copy of it with an LIF for each call of ReLU or QCFS.

    timesteps: T. options: of VGG_SNN_STDB and RESNET_SNN_STDB, but for their layouts: activation 'STDB', leak 1.0,
    default_threshold 1.0, alpha, beta, gamma, width, backend, encoding, delay, initial_potential, learn_threshold,
    learn_leak. Of QCFS the bounds become the thresholds, and direct input, delay 0, initial potential 1/2 and leak 1
    are the defaults; of ReLU thresholds are default_threshold until find_thresholds balances them.

    Its output over the steps, divided by their number, stands for the ANN's logits. Raises ValueError, in a line that
    names the module and what to put in its place, for a network that cannot be spiking (traced.py says which can).
    """
    tree, graph = trace(ann)
    calls = activations_of(tree, graph)
    modules = dict(tree.named_modules())
    found = {call: modules.get(call.target) for call in calls}
    quantized = [isinstance(module, QCFS) for module in found.values()]
    if any(quantized) and not all(quantized):
        raise Refused('some of its activations are QCFS, others ReLU: quantize() makes all of them QCFS')
    options = {'activation': 'STDB', 'leak': 1.0, 'default_threshold': 1.0, 'alpha': FLAGS['alpha'],
               'beta': FLAGS['beta'], 'gamma': FLAGS['gamma'], 'backend': 'torch', 'timesteps': timesteps,
               **(QUANTIZED if quantized[0] else {}), **options}
    options['timesteps'] = check_timesteps(timesteps)
    names, weight = [], weight_of(tree)
    dropouts = [node for node in graph.nodes if node.op == 'call_module' and node.meta['kind'] == VALUE and (
        isinstance(modules[node.target], DROPOUTS))]
    used = others(graph, [*dropouts, *(call.node for call in calls)])
    for call, module in found.items():
        lif = _lif_of(module, options).to(weight.device).train(tree.training)
        names.append(put(tree, call, lif.double() if weight.dtype == torch.float64 else lif, used))
        replace(graph, call.node, names[-1])
    for node in dropouts:
        dropout, call = modules[node.target], Call(node, owner_of(node, modules), node.target)
        replace(graph, node, put(tree, call, HeldDropout(dropout).train(dropout.training), used))
    modules = dict(tree.named_modules())
    encoding = ENCODINGS.get(options.get('encoding', 'poisson'))  # an unknown one is refused by PlainNetwork
    direct = bool(encoding and encoding.constant)
    if direct:
        _repeat(tree, graph, modules, used)
    notes = lost_train(ann) + _notes(graph, modules, direct)
    rate = 0.9 if type(tree).__name__ == 'ResNet' and type(tree).__module__.startswith('self_models.') else 1.0
    network = PlainNetwork(tree, graph, names, [call.target for call in calls], _depth(graph, modules), rate, options)
    network.training = tree.training
    network.notes = notes
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return network


def checked_bound(bound: torch.Tensor) -> torch.Tensor:
    """The bound () or (C,) of a QCFS. Raises ValueError if it is not finite or not above 0."""
    bound = bound.detach()
    wrong = bound[~((bound > 0) & bound.isfinite())]
    if len(wrong):
        raise ValueError(f'a QCFS bound must be finite and above 0, not {wrong[0].item()}')
    return bound


def _lif_of(activation, options):
    """The LIF that takes the place of a ReLU (its module or None) or a QCFS."""
    threshold, bounds = options['default_threshold'], None
    if isinstance(activation, QCFS):
        found = checked_bound(activation.bound)
        threshold, bounds = (1.0, found.clone()) if found.dim() else (found.item(), None)
    keys = ('timesteps', 'leak', 'activation', 'delay', 'initial_potential', 'learn_threshold', 'learn_leak', 'backend',
            *FLAGS)
    return LIF(threshold=threshold, bounds=bounds, **{key: options[key] for key in keys if key in options})


def _repeat(tree, graph, modules, used):
    """Compute what does not depend on spikes once, and repeat it where it meets what does."""
    once, taken = set(), []
    for node in graph.nodes:
        module = modules.get(node.target) if node.op == 'call_module' else None
        if isinstance(module, (LIF, HeldDropout)):
            module.once = node.args[0] in once
        if isinstance(module, LIF):
            continue
        if all(each in once for each in node.all_input_nodes) and node.op != 'output':
            once.add(node)
        elif node.op != 'output':
            taken += [(each, node) for each in node.all_input_nodes if each in once and _of_input(each)]
    if any(_is_size(each) for each, _ in taken):  # the size of a tensor (B, ...) would stand for that of (T * B, ...)
        for node in graph.nodes:
            if node.op == 'call_module' and isinstance(modules[node.target], (LIF, HeldDropout)):
                modules[node.target].once = False
        image = next(node for node in graph.nodes if node.op == 'placeholder')
        taken = [(image, user) for user in list(image.users)]
    if not taken:
        return
    used.add('repeat')  # if the tree has this name, it stays the tree's
    path = put(tree, Call(next(iter(graph.nodes)), 'repeat', 'repeat'), Repeat().train(tree.training), used)
    modules[path] = tree.get_submodule(path)
    repeated = {}
    for source, user in taken:
        if source not in repeated:
            with graph.inserting_after(source):
                repeated[source] = graph.call_module(path, (source,))
        user.replace_input_with(source, repeated[source])


def _of_input(node):
    """Whether a node depends on the images or their number, as weights and other sizes do not."""
    kind = node.meta.get('kind', VALUE)
    if kind == WEIGHT and node.target in ('type_as', 'to'):  # of the type of an image
        return _of_input(source_of(node))
    return kind in (COUNT, SHAPE) or kind != SIZE and (
        node.op == 'placeholder' or any(map(_of_input, node.all_input_nodes)))


def _is_size(node):
    sized = is_size(node) and (node.target == 'size' or node.args[1:] == ('shape',))
    return sized or bool(node.op != 'call_module' and node.all_input_nodes) and all(
        map(_is_size, node.all_input_nodes))


def _depth(graph, modules):
    """How many LIFs are on the shortest way from the input to the output."""
    depths = {}
    for node in graph.nodes:
        if node.meta.get('kind', VALUE) != VALUE:  # a weight or a size
            continue
        before = [depths[each] for each in givers(node) if each in depths]
        if node.op == 'placeholder' or before:
            is_lif = node.op == 'call_module' and isinstance(modules.get(node.target), LIF)
            depths[node] = min(before, default=0) + is_lif
    return depths[next(node for node in graph.nodes if node.op == 'output')]


def _notes(graph, modules, direct):
    """Lines on how a spiking network differs from its ANN. direct: whether its input is the images, not spikes."""
    spiked, notes = set(), []
    for node in graph.nodes:
        module = modules.get(node.target) if node.op == 'call_module' else None
        spikes = isinstance(module, LIF) or node.op == 'placeholder' and not direct
        if spikes or any(each in spiked for each in givers(node)):
            spiked.add(node)
            if isinstance(module, MAX_POOLS) or module is None and is_max_pool(node.target):
                name = node.target if module is not None else node.target.__name__
                notes.append(f'{name}: the maximum of spikes at each step is not that of the ANN over time; average '
                             'pools convert without loss')
    return notes


class Segment(NamedTuple):
    """The way to one LIF. sources: the LIFs (names) that it begins at, and 'input' if it begins at the images; current:
    (their outputs, in this order) -> what the LIF is given."""
    sources: list[str]
    current: Callable


def segments(network: PlainNetwork) -> list[Segment]:
    """The Segment of each LIF of a network, in call order."""
    modules, found = dict(network.named_modules()), []

    def is_source(node):
        return node.op == 'placeholder' or node.op == 'call_module' and isinstance(modules[node.target], LIF)

    for lif in [node for node in network._graph.nodes if node.op == 'call_module' and is_source(node)]:
        way, waiting = set(), [lif.args[0]]
        while waiting:
            node = waiting.pop()
            if node not in way:
                way.add(node)
                waiting += [] if is_source(node) else node.all_input_nodes
        piece, copies = fx.Graph(), {}
        way = [node for node in network._graph.nodes if node in way]
        sources = [node for node in way if is_source(node)]
        for i, node in enumerate(sources):
            copies[node] = piece.placeholder(f'source{i}')
        for node in way:
            if node not in copies:
                copies[node] = piece.node_copy(node, copies.__getitem__)
        piece.output(copies[lif.args[0]])
        names = ['input' if node.op == 'placeholder' else node.target for node in sources]
        found.append(Segment(names, partial(compiled(piece), network._space)))
    return found
