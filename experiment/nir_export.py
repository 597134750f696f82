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
input's encoding and what the output is. That is all it takes to run
the file (a test does). A tool that does not heed the metadata runs another network.
"""
import io
import os
import tempfile
from pathlib import Path

import numpy as np
from torch import nn

from experiment import UserError, importing
from experiment.files import write_atomically
from self_models import Scale
from self_models.encoding import ENCODINGS

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
    """The nir.NIRGraph of a VGG_SNN_STDB or RESNET_SNN_STDB in eval mode, for images of input_shape (C, H, W).

    A node of weights has the name of the model's module, its neurons that name and '.neuron'. Currents that meet at
    neurons add up. about: further metadata, numbers and texts by name. Raises UserError without the package nir.
    """
    nir, nodes, edges = _nir(), {}, []
    shapes = {}  # what each node gives: (C, H, W) or (features,)
    dt = 1.0 if model.leak == 1 else 1e-4
    described = semantics(model)

    def add(name, node, shape, *sources):
        nodes[name], shapes[name] = node, tuple(int(size) for size in shape)
        edges.extend((source, name) for source in sources)
        return name

    def bias_of(module):
        return module.bias.detach().cpu().numpy()

    def synapse(name, source):
        module, shape = model.get_submodule(name), shapes[source]
        weight = module.weight.detach().cpu().contiguous().numpy()
        if isinstance(module, nn.Linear):
            if len(shape) > 1:
                flat = nir.Flatten({'input': np.array(shape)}, start_dim=0)  # NIR's shapes have no batch
                source = add('flatten', flat, (np.prod(shape),), source)
            node = nir.Linear(weight) if module.bias is None else nir.Affine(weight, bias_of(module))
            return add(name, node, weight.shape[:1], source)
        node = nir.Conv2d(shape[1:], weight, module.stride, module.padding, module.dilation, module.groups,
                          bias=np.zeros(len(weight), weight.dtype) if module.bias is None else bias_of(module))
        return add(name, node, node.output_type['output'], source)

    def scale(name, source, factor):
        # a convolution, as importers know no nir.Scale; not one a channel, as SpikingJelly knows no groups
        shape, factor = shapes[source], factor.detach().cpu().numpy()
        weight = factor * np.eye(shape[0], dtype=factor.dtype)[:, :, None, None]
        node = nir.Conv2d(shape[1:], weight, (1, 1), (0, 0), (1, 1), 1, bias=np.zeros(shape[0], factor.dtype))
        return add(name, node, shape, source)

    def pool(name, source, kernel, stride):
        c, *sizes = shapes[source]
        sizes = [(size - k) // s + 1 for size, k, s in zip(sizes, kernel, stride, strict=True)]
        return add(name, nir.AvgPool2d(np.array(kernel), np.array(stride), np.zeros(2, int)), (c, *sizes), source)

    def neurons(layer, *sources):
        shape, index = shapes[sources[0]], model.layer_names.index(layer)
        threshold, leak = model.thresholds[index].item(), model.leaks[index].item()

        def all_of(value):
            return np.full(shape, value, np.float64)  # float32 would change the leak

        known = {'threshold': threshold, 'leak': leak, 'reset': described['reset']}
        common = {'v_threshold': all_of(threshold), 'v_reset': all_of(0), 'metadata': known}
        if dt == 1:
            node = nir.IF(r=all_of(1), **common)
        else:
            lost = max(1 - leak, 2.0 ** -53)
            node = nir.LIF(tau=all_of(dt / lost), r=all_of(1 / lost), v_leak=all_of(0), **common)
        return add(f'{layer}.neuron', node, shape, *sources)

    def chain(part, source):
        """The modules of an nn.Sequential, one after the other; neurons in place of ReLUs, no dropout."""
        for i, module in enumerate(model.get_submodule(part)):
            name = f'{part}.{i}'
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                source = layer = synapse(name, source)
            elif isinstance(module, nn.ReLU):
                source = neurons(layer, source)
            elif isinstance(module, nn.AvgPool2d):
                source = pool(name, source, (2, 2), (2, 2))
        return source

    last = add('input', nir.Input({'input': np.array(input_shape)}), input_shape)
    if hasattr(model, 'features'):
        last = chain('features', last)
    else:
        last = chain('pre_process', last)
        for stage in ('layer1', 'layer2', 'layer3', 'layer4'):
            for i, block in enumerate(model.get_submodule(stage)):
                conv1, conv2 = f'{stage}.{i}.residual.0', f'{stage}.{i}.residual.3'
                inner = neurons(conv1, synapse(conv1, last))
                identity, name = last, f'{stage}.{i}.identity.0'
                if len(block.identity) and isinstance(block.identity[0], Scale):
                    identity = scale(name, last, block.identity[0].factor)
                elif len(block.identity):
                    identity = synapse(name, last)
                last = neurons(conv2, synapse(conv2, inner), identity)
        if isinstance(model.final_pool, nn.AdaptiveAvgPool2d):
            # to 2 pixels: of n, the first and the last n / 2, rounded up
            sizes = shapes[last][1:]
            last = pool('final_pool', last, [-(-size // 2) for size in sizes], [size // 2 for size in sizes])
    last = chain('classifier', last)
    add('output', nir.Output({'output': np.array(shapes[last])}), shapes[last], last)
    return nir.NIRGraph(nodes, edges, metadata={
        **described, 'timesteps': model.timesteps, 'leaks': model.leaks.tolist(), 'dt': dt,
        **({} if model.leak is None else {'leak': model.leak}),
        'input_rate': float(model.input_layer.rate), **about})


def _nir():
    with importing('nir', '--export_nir'):
        import nir
    return nir
