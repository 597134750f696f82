"""What was counted of a spiking network as the numbers of its report; docs/report.md says how each was counted."""
import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from experiment.reporting.connections import Connection, Layer
from experiment.reporting.count import Z_EDGES
from self_models import NEVER
from self_models.conversion import has_biases
from self_models.plain import PlainNetwork
from self_models.spiking_network import SpikingNetwork

# 45 nm CMOS, 32 bit floating point: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014
MAC_PJ, AC_PJ = 4.6, 0.9


def in_units_of_bounds(model: SpikingNetwork) -> bool:
    """Whether potentials are in units of the bounds of a QCFS ANN's channels, which makes every threshold 1."""
    if isinstance(model, PlainNetwork):
        return any(lif.bounds is not None for lif in model.lifs)
    # a threshold of 1 that nothing else explains: these are in the weights on both sides of a layer
    return bool((model.thresholds == 1).all() and (has_biases(model) or model.initial_potential))


def summary(model: SpikingNetwork, layers: list[Layer], connections: list[Connection], images: int) -> dict:
    """{'layers', 'surrogate', 'operations'}: the numbers of the report, of `images` images, as JSON knows them."""
    return {'layers': [layer_numbers(layer, images) for layer in layers],
            'surrogate': surrogate_numbers(model, layers[1:]),
            'operations': operation_numbers(connections, images)}


def layer_numbers(layer: Layer, images: int) -> dict:
    rates = layer.spikes / (images * layer.neurons)
    spikes = {'spikes_per_neuron': rates.sum().item(), 'firing_rate': rates.mean().item(),
              'firing_rate_by_step': rates.tolist()}
    if rates.isnan().any():  # direct input; JSON has no NaN
        spikes = dict.fromkeys(spikes)
    return {'name': layer.name, 'neurons': layer.neurons, 'threshold': layer.threshold, 'leak': layer.leak,
            'first_step': layer.first_step, 'steps': len(rates), **spikes}


def surrogate_numbers(model: SpikingNetwork, layers: list[Layer]) -> dict:
    """The surrogate gradient with respect to z, and how often each of its arguments was met in LIF layers."""
    counts = pad_sequence([layer.surrogate for layer in layers]).sum(1)  # with biases a layer has steps of its own
    total = counts.sum().item()
    by_layer = {layer.name: layer.surrogate.tolist() for layer in layers}
    surrogate = model.surrogate
    about = {'activation': surrogate.name, 'formula': surrogate.formula + (
        '' if surrogate.of_spikes else ', z = u/theta - 1')}
    about |= {flag: getattr(surrogate, flag) for flag in surrogate.flags}

    def gradient(arguments):
        return surrogate.gradient(torch.tensor(arguments, dtype=torch.float64)).tolist()

    if not surrogate.of_spikes:
        return {**about, 'z_edges': Z_EDGES, 'gradient_at_edges': gradient(Z_EDGES),
                'count': counts[1:-1].tolist(), 'below': counts[0].item(), 'above': counts[-1].item(), 'total': total,
                'count_by_layer': by_layer, 'count_by_layer_is': 'below, then the bins, then above'}
    delta_t, first = list(range(1, len(counts))), min(layer.first_step for layer in layers)
    return {**about, 'delta_t': delta_t, 'gradient': gradient(delta_t), 'count': counts[1:].tolist(),
            'never': counts[0].item(), 'never_share': counts[0].item() / total,
            'never_largest_gradient': gradient(first + NEVER), 'total': total,
            'count_by_layer': by_layer, 'count_by_layer_is': 'never, then delta_t = 1, 2, ...'}


def operation_numbers(connections: Iterable[Connection], images: int) -> dict:
    """Operations and energy of an image, of each connection and in all."""
    rows, counts = [], []
    for c in connections:
        per_neuron = None if c.mac_steps or c.constant else c.spikes / images / c.neurons
        direct = c.additions if c.constant else 0  # of the image itself, to neurons without a layer between
        counts.append({
            'synaptic_operations': c.operations / images, 'nonzero_inputs': c.nonzero_operations / images,
            'estimate': 0.0 if per_neuron is None else per_neuron * (c.macs_with_padding + c.additions),
            'macs': c.macs * c.mac_steps, 'macs_with_padding': c.macs_with_padding * c.mac_steps,
            'macs_every_step': c.macs * c.steps if c.mac_steps else 0,
            'bias_additions': direct + c.biases * (1 if c.constant else c.bias_steps),
            'bias_additions_every_step': direct * c.steps + c.biases * c.bias_steps,
            'ann_macs': c.macs, 'ann_macs_with_padding': c.macs_with_padding, 'ann_additions': c.additions + c.biases})
        rows.append({
            'name': c.name, 'kind': c.kind, 'first_step': c.first_step, 'steps': c.steps, 'input_neurons': c.neurons,
            'input_spikes_per_neuron': per_neuron, **counts[-1]})
    total = {key: sum(each[key] for each in counts) for key in counts[0]}

    def energy(macs, *additions):
        return (total[macs] * MAC_PJ + sum(total[key] for key in additions) * AC_PJ) / 1e6

    return {
        'connections': rows, 'total': total, 'pj_per_mac': MAC_PJ, 'pj_per_ac': AC_PJ,
        'energy_source': '45 nm CMOS, 32 bit floating point: M. Horowitz, ISSCC 2014',
        'energy_uj': {
            'ann': energy('ann_macs', 'ann_additions'),
            'ann_with_padding': energy('ann_macs_with_padding', 'ann_additions'),
            'snn_exact': energy('macs', 'synaptic_operations', 'bias_additions'),
            'snn_exact_every_step': energy('macs_every_step', 'synaptic_operations', 'bias_additions_every_step'),
            'snn_nonzero_inputs': energy('macs', 'nonzero_inputs', 'bias_additions'),
            'snn_estimate': energy('macs_with_padding', 'estimate', 'bias_additions')}}


def training_rows(checkpoint: Path | str | None, history: list | None, later: list | None = None,
                  ) -> tuple[list[dict] | None, str]:
    """(what was noted of each epoch of a network's training, as JSON knows it, or None; a line to say).

    checkpoint: the file that the network is from, or None. history: its epochs, as the file says. later: the epochs of
    another file, which are taken if they begin with `history`.
    """
    if checkpoint is None:
        return None, 'training curves: none, as this network was not trained here'
    if not history:
        return None, f'training curves: left out, as {checkpoint} says nothing of its training'
    try:
        rows, more = (json.loads(json.dumps(each, allow_nan=False)) for each in (history, later or history))
        rows = more if more[:len(rows)] == rows else rows
        for row in rows:
            if 'epoch' not in row or not all(type(value) in (int, float) and math.isfinite(value) for key, value
                                             in row.items() if key == 'epoch' or key.endswith(('_loss', '_accuracy'))):
                raise ValueError('what should be numbers are none')
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return None, f'training curves: left out, as those of {checkpoint} cannot be read ({error})'
    return rows, f'training curves: {len(rows)} epochs'
