"""A spiking network as a NIR graph, the exchange format of neuromorphic tools (Pedersen et al. 2024, neuroir.org).

NIR's neurons are differential equations; these constants make their Euler step of length dt that of the network:

    IF, if every leak is 1   dv/dt = r I                    v <- v + dt r I                      = v + I
        dt = 1, r = 1
    LIF, otherwise          tau dv/dt = v_leak - v + r I   v <- v + dt/tau (v_leak - v + r I)   = leak v + I
        dt = 1e-4, tau = dt / (1 - leak), r = tau / dt = 1 / (1 - leak), v_leak = 0

Importers assume the two dt (r = 1 in an IF: snnTorch, Norse; 1e-4 in an LIF: snnTorch, SpikingJelly); the file names
its dt. If only some layers leak, the others are LIF, too, with the largest float64 below 1 as leak: at dt = 1e-4
snnTorch refuses an IF.

Biases are NIR's own. NIR knows one reset, v <- v_reset, and neurons that fire in the step of their input, from 0. The
network's soft reset, v <- v - threshold, its delay and its initial potential are in the graph's metadata, with the
input's encoding and what the output is. That is enough to run the file (a test does). A tool that ignores the metadata
runs another network.
"""
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from experiment import UserError, importing
from experiment.files import check_writable, write_atomically
from experiment.nir_nodes import Nodes
from self_models.encoding import ENCODINGS
from self_models.spiking_network import SpikingNetwork

if TYPE_CHECKING:
    from nir import NIRGraph

NEURONS = {  # by delay; symbols: step t, potential u, threshold theta, current I, spikes o
    1: 'o(t) = [u(t-1) > theta], u(t) = leak u(t-1) + I(t) - theta o(t)',
    0: 'h(t) = leak u(t-1) + I(t), o(t) = [h(t) > theta], u(t) = h(t) - theta o(t)'}


def check(path: str) -> None:
    """Raise UserError, before hours of training, if a NIR file cannot be written to `path`."""
    _nir()
    if os.path.isdir(path):
        raise UserError(f'--export_nir {path}: is a folder; name a file in it, such as {Path(path, "snn.nir")}')
    check_writable(Path(path).parent)


def export(model: SpikingNetwork, input_shape: tuple, path: str | Path, **about) -> str:
    """Write a spiking network to `path` as NIR; returns a line to say. What is there is replaced once that is whole.

    input_shape: (C, H, W). about: further metadata, numbers and texts by name. Raises UserError if it cannot.
    """
    graph, file = to_graph(model, input_shape, **about), io.BytesIO()
    _nir().write(file, graph)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), lambda target: target.write(file.getbuffer()))
    told = {'reset': 'subtracts the threshold'}
    if model.delay:
        told['fire_before_integrate'] = 'fires before it integrates'
    if model.initial_potential:
        told['initial_potential'] = f'begins at {model.initial_potential:g} of the threshold'
    return (f'{os.fspath(path)}: written as NIR, whose neurons reset to v_reset: this network '
            f'{" and ".join(told.values())}, so set the tool that reads it to that (metadata: {", ".join(told)})')


def to_graph(model: SpikingNetwork, input_shape: tuple, **about) -> 'NIRGraph':
    """The nir.NIRGraph of a spiking network, for images of input_shape (C, H, W).

    A node of weights has the name of the model's module, neurons that of their layer and '.neuron'. Currents that meet
    at neurons add up. about: further metadata, numbers and texts by name. Raises UserError without the package nir, and
    for your own network if it has something that NIR does not know.
    """
    nir = _nir()
    with torch.no_grad():
        made = Nodes(model, nir, input_shape)
    return nir.NIRGraph(made.nodes, made.edges, metadata={
        # what NIR's nodes do not express
        'neuron': f'{NEURONS[model.delay]}, u(-1) = initial_potential theta',
        'initial_potential': model.initial_potential,
        'reset': 'subtract',  # theta, once a spike; NIR's v_reset is not used
        'fire_before_integrate': bool(model.delay),  # on u(t-1): what fires at t does not depend on I(t)
        'delay': model.delay,  # steps, of every layer of neurons; follows from the line above
        'input_encoding': ENCODINGS[model.encoding].description,
        'output': 'the sum over all steps of what reaches the output node: no leak, no spike',
        'timesteps': model.timesteps, 'leaks': model.leaks.tolist(), 'dt': made.dt,
        **({} if model.leak is None else {'leak': model.leak}),
        'input_rate': float(model.input_layer.rate), **about})


def _nir():
    with importing('nir', '--export_nir'):
        import nir
    return nir
