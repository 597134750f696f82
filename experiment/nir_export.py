"""A spiking network as a NIR graph, the exchange format of neuromorphic tools (Pedersen et al. 2024, neuroir.org).

NIR's neurons are differential equations; these constants make their Euler step of length dt that of the network:

    IF, where all leak 1    dv/dt = r I                    v <- v + dt r I                      = v + I
        dt = 1, r = 1
    LIF, elsewhere          tau dv/dt = v_leak - v + r I   v <- v + dt/tau (v_leak - v + r I)   = leak v + I
        dt = 1e-4, tau = dt / (1 - leak), r = tau / dt = 1 / (1 - leak), v_leak = 0

The two dt are what importers presume (an r of 1 in an IF: snnTorch, Norse; 1e-4 in an LIF: snnTorch, SpikingJelly), and
the file names its own. Where only some layers leak, one that does not is an LIF too, of the largest float64 below 1: at
dt = 1e-4 snnTorch would refuse an IF.

Biases are NIR's own. NIR knows one reset, v <- v_reset, and neurons that fire in the step of their input, from 0. The
network's soft reset, v <- v - threshold, its delay and its initial potential are in the graph's metadata, with the
input's encoding and what the output is. That is all it takes to run the file (a test does). A tool that does not heed
the metadata runs another network.
"""
import io
import os
import tempfile
from pathlib import Path

import numpy as np
from torch import nn

from experiment import UserError, importing, nir_own
from experiment.files import write_atomically
from self_models import Scale
from self_models.conversion import folded_layer
from self_models.encoding import ENCODINGS
from self_models.plain import PlainNetwork

NEURONS = {  # by delay; symbols: step t, potential u, threshold theta, current I, spikes o
    1: 'o(t) = [u(t-1) > theta], u(t) = leak u(t-1) + I(t) - theta o(t)',
    0: 'h(t) = leak u(t-1) + I(t), o(t) = [h(t) > theta], u(t) = h(t) - theta o(t)'}


def semantics(model):
    """What of a network NIR's nodes do not say."""
    return {'neuron': f'{NEURONS[model.delay]}, u(-1) = initial_potential theta',
            'initial_potential': model.initial_potential,
            'reset': 'subtract',  # theta, once a spike; NIR's v_reset is not used
            'fire_before_integrate': bool(model.delay),  # on u(t-1): what fires at t does not depend on I(t)
            'delay': model.delay,  # steps, of every layer of neurons; follows from the line above
            'input_encoding': ENCODINGS[model.encoding].description,
            'output': 'the sum over all steps of what reaches the output node: no leak, no spike'}


def check(path):
    """Raise UserError, before hours of training, where a NIR file cannot be written to `path`."""
    path, folder = Path(path), Path(path).parent
    _nir()
    if path.is_dir():
        raise UserError(f'--export_nir {path}: is a folder; name a file in it, such as {path / "snn.nir"}')
    if not folder.is_dir():
        raise UserError(f'--export_nir {path}: there is no folder {folder}; make it, or name another')
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f'--export_nir {path}: cannot write in {folder} ({error.strerror}); make it writable, or '
                        'name another') from error


def export(model, input_shape, path, **about):
    """Write a spiking network to `path` as NIR; returns a line to say. What is there is replaced once that is whole.

    input_shape: (C, H, W). about: further metadata, numbers and texts by name. Raises UserError where it cannot.
    """
    graph, file = to_graph(model, input_shape, **about), io.BytesIO()
    _nir().write(file, graph)
    write_atomically(Path(path), lambda target: target.write(file.getbuffer()))
    what, keys = ['subtracts the threshold'], ['reset']
    if model.delay:
        what, keys = [*what, 'fires before it integrates'], [*keys, 'fire_before_integrate']
    if model.initial_potential:
        what = [*what, f'begins at {model.initial_potential:g} of the threshold']
        keys = [*keys, 'initial_potential']
    return (f'{os.fspath(path)}: written as NIR, whose neurons reset to v_reset: this network {" and ".join(what)}, so '
            f'set the tool that reads it to that (metadata: {", ".join(keys)})')


def to_graph(model, input_shape, **about):
    """The nir.NIRGraph of a spiking network, for images of input_shape (C, H, W).

    A node of weights has the name of the model's module, neurons that of their layer and '.neuron'. Currents that meet
    at neurons add up. about: further metadata, numbers and texts by name. Raises UserError without the package nir, and
    for a network of one's own with what NIR does not know.
    """
    nodes = Nodes(model, input_shape)
    last = nir_own.add_all(model, nodes) if isinstance(model, PlainNetwork) else add_layers(model, nodes)
    nodes.add('output', nodes.nir.Output({'output': np.array(nodes.shapes[last[0]])}), nodes.shapes[last[0]], *last)
    return nodes.nir.NIRGraph(nodes.nodes, nodes.edges, metadata={
        **semantics(model), 'timesteps': model.timesteps, 'leaks': model.leaks.tolist(), 'dt': nodes.dt,
        **({} if model.leak is None else {'leak': model.leak}),
        'input_rate': float(model.input_layer.rate), **about})


class Nodes:
    """The nodes and edges of a NIR graph that is being built, and the shape of what each node gives: (C, ...)."""

    def __init__(self, model, input_shape):
        self.nir, self.model, self.dt = _nir(), model, 1.0 if model.leak == 1 else 1e-4
        self.nodes, self.edges, self.shapes = {}, [], {}
        self.add('input', self.nir.Input({'input': np.array(input_shape)}), input_shape)

    def add(self, name, node, shape, *sources):
        """Add a node of that name, or with a number behind it if there is one; returns its name."""
        same = {name, *(f'{name}_{i}' for i in range(len(self.nodes)))} & self.nodes.keys()
        name = f'{name}_{len(same)}' if same else name
        self.nodes[name], self.shapes[name] = node, tuple(int(size) for size in shape)
        self.edges.extend((source, name) for source in sources)
        return name

    def synapse(self, name, module, *sources, norm=None, factor=1.0):
        """Add a convolution or a linear layer. norm: a batch norm behind it, or None. factor: () or (inputs,), of what
        it is given."""
        weight, bias = (None if each is None else nir_own.values(each) for each in folded_layer(module, norm, None))
        shape = self.shapes[sources[0]]
        if isinstance(module, nn.Linear):
            if len(shape) > 1:
                sources = [self.flatten('flatten', 0, *sources)]
            weight = (weight * factor).astype(weight.dtype)
            node = self.nir.Linear(weight) if bias is None else self.nir.Affine(weight, bias)
            return self.add(name, node, weight.shape[:1], *sources)
        if module.groups > 1:  # which NIR's check of types and SpikingJelly do not know
            parts = np.split(weight, module.groups)
            weight = np.concatenate([np.pad(part, [(0, 0), (i * part.shape[1], shape[0] - (i + 1) * part.shape[1]),
                                                   *[(0, 0)] * (part.ndim - 2)]) for i, part in enumerate(parts)])
        weight = (weight * np.reshape(factor, (-1, *[1] * len(shape[1:])))).astype(weight.dtype)
        bias = np.zeros(len(weight), weight.dtype) if bias is None else bias
        # nir takes every kernel for a square one: zeros around it make it so
        more = [(max(module.kernel_size) - size) // 2 for size in module.kernel_size]
        weight = np.pad(weight, [(0, 0), (0, 0), *((each, each) for each in more)])
        padding = [p + each * d for p, each, d in zip(nir_own.padding_of(module), more, module.dilation, strict=True)]
        return self.convolution(name, weight, bias, module.stride, padding, module.dilation, *sources)

    def convolution(self, name, weight, bias, stride, padding, dilation, *sources):
        size = self.shapes[sources[0]][1:]
        if len(size) == 1:
            node = self.nir.Conv1d(size[0], weight, stride[0], padding[0], dilation[0], 1, bias)
        else:
            node = self.nir.Conv2d(size, weight, stride, padding, dilation, 1, bias)
        return self.add(name, node, node.output_type['output'], *sources)

    def mix(self, name, matrix, *sources, bias=None):
        """Add a matrix (C', C) of the channels: a convolution of 1 pixel, as importers know no nir.Scale, not one a
        channel, as SpikingJelly knows no groups; of features, a linear layer."""
        ones = [1] * (len(self.shapes[sources[0]]) - 1)
        bias = np.zeros(len(matrix), matrix.dtype) if bias is None else bias
        if not ones:
            return self.add(name, self.nir.Affine(matrix, bias), matrix.shape[:1], *sources)
        return self.convolution(name, matrix.reshape(*matrix.shape, *ones), bias, ones, [0] * len(ones), ones, *sources)

    def flatten(self, name, start, *sources):
        shape = self.shapes[sources[0]]  # NIR's shapes have no batch
        node = self.nir.Flatten({'input': np.array(shape)}, start_dim=start)
        return self.add(name, node, (*shape[:start], np.prod(shape[start:])), *sources)

    def pool(self, name, kernel, stride, padding, *sources):
        c, *sizes = self.shapes[sources[0]]
        sizes = [(size + 2 * p - k) // s + 1 for size, k, s, p in zip(sizes, kernel, stride, padding, strict=True)]
        return self.add(name, self.nir.AvgPool2d(*map(np.array, (kernel, stride, padding))), (c, *sizes), *sources)

    def neurons(self, layer, *sources):
        shape, index = self.shapes[sources[0]], self.model.layer_names.index(layer)
        threshold, leak = self.model.thresholds[index].item(), self.model.leaks[index].item()

        def all_of(value):
            return np.full(shape, value, np.float64)  # float32 would change the leak

        known = {'threshold': threshold, 'leak': leak, 'reset': semantics(self.model)['reset']}
        common = {'v_threshold': all_of(threshold), 'v_reset': all_of(0), 'metadata': known}
        if self.dt == 1:
            node = self.nir.IF(r=all_of(1), **common)
        else:
            lost = max(1 - leak, 2.0 ** -53)
            node = self.nir.LIF(tau=all_of(self.dt / lost), r=all_of(1 / lost), v_leak=all_of(0), **common)
        return self.add(f'{layer}.neuron', node, shape, *sources)


def add_layers(model, nodes):
    """Add the layers of a VGG_SNN_STDB or RESNET_SNN_STDB; returns the names of the nodes that give the output."""
    def synapse(name, source):
        return nodes.synapse(name, model.get_submodule(name), source)

    def chain(part, source):
        """The modules of an nn.Sequential, one after the other; neurons in place of ReLUs, no dropout."""
        for i, module in enumerate(model.get_submodule(part)):
            name = f'{part}.{i}'
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                source = layer = synapse(name, source)
            elif isinstance(module, nn.ReLU):
                source = nodes.neurons(layer, source)
            elif isinstance(module, nn.AvgPool2d):
                source = nodes.pool(name, (2, 2), (2, 2), (0, 0), source)
        return source

    if hasattr(model, 'features'):
        return [chain('classifier', chain('features', 'input'))]
    last = chain('pre_process', 'input')
    for stage in ('layer1', 'layer2', 'layer3', 'layer4'):
        for i, block in enumerate(model.get_submodule(stage)):
            conv1, conv2 = f'{stage}.{i}.residual.0', f'{stage}.{i}.residual.3'
            inner = nodes.neurons(conv1, synapse(conv1, last))
            identity, name = last, f'{stage}.{i}.identity.0'
            if len(block.identity) and isinstance(block.identity[0], Scale):
                factor = nir_own.values(block.identity[0].factor)
                identity = nodes.mix(name, factor.reshape(-1) * np.eye(nodes.shapes[last][0], dtype=factor.dtype), last)
            elif len(block.identity):
                identity = synapse(name, last)
            last = nodes.neurons(conv2, synapse(conv2, inner), identity)
    if isinstance(model.final_pool, nn.AdaptiveAvgPool2d):
        last = nodes.pool('final_pool', *nir_own.adaptive(nodes.shapes[last][1:], (2, 2)), (0, 0), last)
    return [chain('classifier', last)]


def _nir():
    with importing('nir', '--export_nir'):
        import nir
    return nir
