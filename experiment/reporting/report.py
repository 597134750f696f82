"""What a spiking network did on the test images, as figures and as one JSON with every number in them.

`measure` counts in one pass over the test images, batch by batch; nothing but sums is kept. `summary` makes the JSON of
what it counted, and the figures are drawn from that JSON alone.
"""
import dataclasses
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from experiment import UserError, engine, files, log, setup
from experiment.data import epoch_loader
from experiment.reporting import figures
from self_models.layers import Scale
from self_models.spike_train import unflatten
from self_models.surrogate import NEVER

# 45 nm CMOS, 32 bit floating point: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014
MAC_PJ, AC_PJ = 4.6, 0.9
Z_EDGES = [i / 10 for i in range(-30, 31)]  # of the histogram of z, which Linear's gradient depends on

NOTES = {  # of every network; notes_of() adds what else holds for the one at hand
    'exact': 'Synaptic operations: each spike counts as many ACs as its neuron has outgoing connections, image '
             'borders and strides considered. They are counted from the spikes themselves.',
    'estimate': 'rate x FLOPs: the spikes of a mean input neuron times the MACs of the layer, padding included.',
    'pooled': 'An average pool is linear: each spike comes through it with a fixed part of the weight (of 2x2 pixels '
              'W/4). So each spike before the pool is a binary event and counts its own ACs, as an AC costs what it '
              'does only without a multiplication. Were spikes pooled first, fewer values would go out, but multiples '
              'of 1/4: nonzero_inputs counts each of those that is not 0 once, as NeuroBench does. The estimate takes '
              'a spike before a 2x2 pool for a quarter of an event.',
    'identity': 'A 1x1 convolution in the identity of a residual block counts as any other; a plain identity counts '
                'one AC a spike, in the ANN one addition (AC) a unit.',
    'output': 'The output layer counts its ACs at every spike, also where this code multiplies once with the sum.',
    'left_out': 'Not in the energy: memory, membrane potentials, spike generation, and the additions of pools in the '
                'ANN. Dropout is off in evaluation.',
    'ann': 'MACs of the same layers on real numbers, once an image; products with the padding are left out, so that '
           'they compare with the exact count. macs_with_padding is what FLOPs counters say.',
    'delta_t': f'Steps since the last earlier spike of the neuron, over all LIF neurons, steps and images; before its '
               f'first spike a neuron counts as having fired at step -{NEVER} (never).',
}


def notes_of(model):
    """How the numbers of a network were counted: {what: text}."""
    if model.delay:
        steps = ('Counted are the steps whose spikes can reach the output. Each LIF layer delays by one step, so in a '
                 'network of depth L the layers compute T - L steps, each from its first_step on; before that a layer '
                 'is silent, and its last steps come too late.')
        if has_biases(model) or model.initial_potential:
            steps = steps.replace('compute T - L steps, each', 'compute to T - L steps after the delays before them, '
                                  'and, as biases and initial potentials are there from the start, each')
    else:
        steps = 'Counted are all T steps of every layer: without delay a spike is at the output in its own step.'
    notes = {'steps': f'{steps} All means are of one image.', **NOTES}
    if model.encoding == 'direct':
        notes['direct'] = ('The first layer is given the image itself, not spikes: it costs MACs (every pixel counts, '
                           'whatever its value). Its input is the same at all steps, so its current is computed once '
                           'an image, which is what macs and the energy count; macs_every_step and '
                           'snn_exact_every_step are what it would cost to compute it anew at each step. That the '
                           'current is added to the membrane potential at each step is left out as the rest of the '
                           'neuron is. The input has no firing rate.')
    else:
        notes['signed'] = 'A spike of the input is +1 or -1; both cost one AC for each connection.'
    if has_biases(model):
        notes['biases'] = ('A bias costs one addition (AC) for each neuron and step that is counted'
                           + (', in the first layer one an image, as part of its constant current'
                              if model.encoding == 'direct' else '')
                           + '; of the output layer at all T steps. Two biases that meet at a neuron of a residual '
                             'block are one, counted with the residual. In the ANN: one addition a unit.')
    if any(isinstance(module, Scale) for module in model.modules()):
        notes['identity'] += " The identity's factor is taken for part of its synaptic weight and costs nothing."
    return notes


def has_biases(model):
    return model.classifier[-1].bias is not None


@dataclasses.dataclass
class Layer:
    """Sums over images of what a layer did. surrogate: see delta_t and z_values.

    spikes: (n,) at each of n steps; of direct input n NaNs, as there are none.
    """
    name: str
    neurons: int
    threshold: float | None  # None: the input
    first_step: int
    spikes: torch.Tensor = 0
    surrogate: torch.Tensor = 0
    leak: float | None = None


@dataclasses.dataclass
class Connection:
    """The connections from one layer to another, and sums over images of what went through them.

    fan_out: connections of each input, (C, H', W') or (features,), after the 2x2 pools. pool: a further pool between
    them or None; value_fan_out: connections of what comes out of it. additions: of a plain identity in the ANN.
    biases: neurons that a bias is added to at each of bias_steps steps. constant: direct input, no spikes.
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
    pool: nn.Module = None
    value_fan_out: torch.Tensor = None
    spikes: float = 0
    operations: float = 0
    nonzero_operations: float = 0
    biases: int = 0
    bias_steps: int = 0
    constant: bool = False


def check(folder, model):
    """Raise UserError, before the evaluation, where no report can come of it."""
    figures.check('--report')
    if silent := setup.too_few_steps(model):
        raise UserError(f'--report: {silent}')
    files.check_writable(Path(folder))


# -- counting ---------------------------------------------------------------------------------------------------------

def fan_out(branch):
    """To how many outputs each input of a branch is connected: (C, H', W') or (features,), after the pools.

    That is the transposed convolution of ones with ones: at a border a kernel reaches outside and connects less.
    """
    ones = torch.ones(1, *branch.output_shape(), device=branch.train.tensors()[0].device)
    if branch.weight is None:  # an identity, whatever its factor
        return ones[0].double()
    with torch.autocast(ones.device.type, enabled=False):
        return branch.input_gradient(ones, torch.ones_like(branch.weight, dtype=torch.float32))[0].double()


def pool_fan_out(pool, shape):
    """In how many windows of a pool each pixel of maps (C, H, W) is; without a pool in 1. Of that shape."""
    if pool is None:
        return torch.ones(shape, dtype=torch.float64)
    _, h, w = shape
    one_pixel_each = torch.eye(h * w).view(h * w, 1, h, w)
    return (pool(one_pixel_each) > 0).sum((1, 2, 3)).view(h, w).double().expand(shape)


def connection_of(name, branch, record):
    """The Connection of a branch into the LIF layer of a LayerRecord."""
    outputs, first, (start, steps), shape = fan_out(branch), branch.train.start, record.window, branch.output_shape()
    plain = branch.weight is None
    kind = ('identity' if plain else 'linear' if isinstance(branch.synapse, nn.Linear)
            else 'conv{}x{}'.format(*branch.synapse.kernel_size))
    # where two inputs of a layer have a bias, the two are added as one: that of the synapse it is named after
    biased = branch.bias is not None and name == record.name
    return Connection(
        name, kind, math.prod(branch.train.shape), first, max(0, start + steps - first), outputs,
        macs=0 if plain else int(outputs.sum()),
        macs_with_padding=0 if plain else branch.weight.numel() * math.prod(shape[1:]),
        additions=int(outputs.sum()) if plain else 0, value_fan_out=outputs,
        biases=math.prod(shape) if biased else 0, bias_steps=steps, constant=branch.train.constant)


def output_connection(model, name, train):
    """The Connection of the last LIF layer with the output layer."""
    layer, pool = model.classifier[-1], getattr(model, 'final_pool', None)
    if isinstance(pool, nn.Identity):
        pool = None
    outputs = layer.out_features * pool_fan_out(pool, train.pooled_shape).to(train.spikes.device)
    return Connection(name, 'linear', math.prod(train.shape), train.start, train.steps, outputs,
                      macs=layer.weight.numel(), macs_with_padding=layer.weight.numel(), additions=0, pool=pool,
                      value_fan_out=torch.full_like(outputs[:1, :1, :1] if pool else outputs, layer.out_features),
                      biases=0 if layer.bias is None else layer.out_features, bias_steps=model.timesteps)


def spikes_by_step(train):
    """(n,) spikes of a train at each step, over all samples and neurons; NaN of direct input."""
    if train.constant:
        return torch.full((train.steps,), math.nan, dtype=torch.float64)
    return torch.stack([fired.count_nonzero() for fired in train.spikes]).double()  # ten times as fast as sum((1, 2))


def synaptic_operations(train, steps, outputs):
    """Sum over the spikes of the first `steps` steps of their neurons' fan-out. outputs: as fan_out() gives it."""
    # without the mask, which is the sign of an input spike; each pool has divided by 4
    counts = dataclasses.replace(train, mask=None).total(slice(0, steps), torch.float64).sum(0) * 4 ** train.pools
    return (unflatten(counts[None, None], train.pooled_shape)[0] * outputs).sum().item()


def nonzero_operations(train, steps, outputs, pool=None):
    """The same with each input after the pools that is not 0, whatever its value, taken for one event."""
    if not train.pools and pool is None:
        return synaptic_operations(train, steps, outputs)
    total = 0.0
    for step in range(steps):  # one after another: (B, C, H', W') floats
        values = train.floats(slice(None), slice(step, step + 1), torch.float32)
        values = values if pool is None else pool(values)
        total += ((values != 0).sum(0) * outputs).sum().item()
    return total


def delta_t(train):
    """(n,) how often each Δt was met over the neurons, samples and n steps of a train; at 0: never fired before.

    Δt is the number of steps since the neuron's last *earlier* spike, as for the gradient of STDB.
    """
    since = torch.zeros(train.spikes[0].numel(), dtype=torch.int64, device=train.spikes.device)
    counts = 0
    for fired in train.spikes.flatten(1):
        counts = counts + torch.bincount(since, minlength=train.steps)
        since += since > 0
        since[fired] = 1
    return counts.double()


def z_values(record):
    """(len(Z_EDGES) + 1,) how often z = u / theta - 1 was below, between two, and above all of Z_EDGES.

    Over the neurons, samples and steps of a LayerRecord; u is the potential that the neuron fires on. A bin holds its
    upper edge, so that a neuron at rest, z = -1, is outside of Linear's triangle.
    """
    counts, threshold = 0, float(record.parameters.threshold)
    for _, _, u in record.potentials():
        # the number of Z_EDGES, which are tenths, below z
        below = u.div_(threshold).sub_(1).mul_(10).ceil_().sub_(10 * Z_EDGES[0]).clamp_(0, len(Z_EDGES))
        counts = counts + torch.bincount(below.long().flatten(), minlength=len(Z_EDGES) + 1)
    return counts.double()


@torch.no_grad()
def measure(model, data, device, args):
    """One pass over the test images, with the random draws of their evaluation: (layers, connections), both lists.

    layers: the input's and every LIF Layer's. connections: every Connection, the output layer's at the end.
    """
    model.eval()
    names = {module: name for name, module in model.named_modules()}
    layers, connections = {}, {}  # by name
    engine.seed_all(engine.seed_for(args.seed, 0))
    loader = epoch_loader(data.test, args.batch_size, args.num_workers, pin_memory=device.type == 'cuda')
    with engine.lowered(device, args.amp):
        for images, _ in tqdm(loader, desc='report', leave=False, disable=None):
            for index, record in enumerate(model.record(images.to(device, non_blocking=True))):
                name, train = record.name, record.spikes
                if index == 0:
                    count_layer(layers, 'input', record.inputs[0].train)
                surrogate = delta_t(train) if model.activation == 'STDB' else z_values(record)
                count_layer(layers, name, train, record.parameters.detached(), surrogate)
                for branch in record.inputs:
                    plain = branch.weight is None
                    key = name.rsplit('.residual', 1)[0] + '.identity' if plain else names[branch.synapse]
                    if key not in connections:
                        connections[key] = connection_of(key, branch, record)
                    count_connection(connections[key], branch.train)
            key = names[model.classifier[-1]]
            if key not in connections:
                connections[key] = output_connection(model, key, train)
            count_connection(connections[key], train)
    return list(layers.values()), list(connections.values())


def count_layer(layers, name, train, parameters=None, surrogate=0):
    """Add a batch's train to the Layer of that name, a new one where there is none yet.

    parameters: the LIFParameters; None of the input.
    """
    if name not in layers:
        threshold, leak = (float(parameters.threshold), float(parameters.leak)) if parameters else (None, None)
        layers[name] = Layer(name, math.prod(train.shape), threshold, train.start, leak=leak)
    layer = layers[name]
    layer.spikes = layer.spikes + spikes_by_step(train)
    layer.surrogate = layer.surrogate + surrogate


def count_connection(connection, train):
    """Add what a batch's train sends through the Connection; of direct input nothing is to be counted."""
    if connection.constant:
        return
    connection.spikes += spikes_by_step(train)[:connection.steps].sum().item()
    connection.operations += synaptic_operations(train, connection.steps, connection.fan_out)
    connection.nonzero_operations += nonzero_operations(train, connection.steps, connection.value_fan_out,
                                                        connection.pool)


# -- the numbers ------------------------------------------------------------------------------------------------------

def summary(model, layers, connections, images):
    """{'layers', 'surrogate', 'operations'}: the numbers of the report, of `images` images, as JSON knows them."""
    return {'layers': [layer_numbers(layer, images) for layer in layers],
            'surrogate': surrogate_numbers(model, layers[1:]),
            'operations': operation_numbers(connections, images)}


def layer_numbers(layer, images):
    rates = layer.spikes / (images * layer.neurons)
    spikes = {'spikes_per_neuron': rates.sum().item(), 'firing_rate': rates.mean().item(),
              'firing_rate_by_step': rates.tolist()}
    if rates.isnan().any():  # direct input; JSON has no NaN
        spikes = dict.fromkeys(spikes)
    return {'name': layer.name, 'neurons': layer.neurons, 'threshold': layer.threshold, 'leak': layer.leak,
            'first_step': layer.first_step, 'steps': len(rates), **spikes}


def surrogate_numbers(model, layers):
    """The surrogate gradient with respect to z, and how often each of its arguments was met in LIF layers."""
    longest = max(len(layer.surrogate) for layer in layers)  # with biases a layer's steps differ from another's
    counts = sum(F.pad(layer.surrogate, (0, longest - len(layer.surrogate))) for layer in layers)
    total = counts.sum().item()
    by_layer = {layer.name: layer.surrogate.tolist() for layer in layers}
    if model.activation == 'Linear':
        # gamma max(0, 1 - |z|)
        gradient = [model.gamma * max(0, 1 - abs(z)) for z in Z_EDGES]
        return {'activation': 'Linear', 'formula': 'gamma max(0, 1 - |z|), z = u/theta - 1', 'gamma': model.gamma,
                'z_edges': Z_EDGES, 'gradient_at_edges': gradient,
                'count': counts[1:-1].tolist(), 'below': counts[0].item(), 'above': counts[-1].item(), 'total': total,
                'count_by_layer': by_layer, 'count_by_layer_is': 'below, then the bins, then above'}
    # alpha exp(-beta dt)
    gradient = [model.alpha * math.exp(-model.beta * dt) for dt in range(1, len(counts))]
    first = min(layer.first_step for layer in layers)
    return {'activation': 'STDB', 'formula': 'alpha exp(-beta delta_t)', 'alpha': model.alpha, 'beta': model.beta,
            'delta_t': list(range(1, len(counts))), 'gradient': gradient, 'count': counts[1:].tolist(),
            'never': counts[0].item(), 'never_share': counts[0].item() / total,
            'never_largest_gradient': model.alpha * math.exp(-model.beta * (first + NEVER)), 'total': total,
            'count_by_layer': by_layer, 'count_by_layer_is': 'never, then delta_t = 1, 2, ...'}


def operation_numbers(connections, images):
    """Operations and energy of an image, of each connection and in all."""
    rows = []
    for c in connections:
        per_neuron = None if c.constant else c.spikes / images / c.neurons
        rows.append({
            'name': c.name, 'kind': c.kind, 'first_step': c.first_step, 'steps': c.steps, 'input_neurons': c.neurons,
            'input_spikes_per_neuron': per_neuron, 'synaptic_operations': c.operations / images,
            'nonzero_inputs': c.nonzero_operations / images,
            'estimate': 0.0 if c.constant else per_neuron * (c.macs_with_padding + c.additions),
            'macs': c.macs if c.constant else 0, 'macs_with_padding': c.macs_with_padding if c.constant else 0,
            'macs_every_step': c.macs * c.steps if c.constant else 0,
            'bias_additions': c.biases * (1 if c.constant else c.bias_steps),
            'bias_additions_every_step': c.biases * c.bias_steps,
            'ann_macs': c.macs, 'ann_macs_with_padding': c.macs_with_padding, 'ann_additions': c.additions + c.biases})
    total = {key: sum(row[key] for row in rows) for key in (
        'synaptic_operations', 'nonzero_inputs', 'estimate', 'macs', 'macs_with_padding', 'macs_every_step',
        'bias_additions', 'bias_additions_every_step', 'ann_macs', 'ann_macs_with_padding', 'ann_additions')}

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


def training_rows(checkpoint):
    """(what the run that wrote a checkpoint noted of each epoch, or None; a line to say).

    It stands in logs/snn/<the checkpoint's stem>.jsonl, a line of JSON an epoch.
    """
    if checkpoint is None:
        return None, 'training curves: none, as this network was not trained here'
    path = Path('logs', 'snn', Path(checkpoint).stem.removesuffix('.last') + '.jsonl')
    rows = []
    try:
        for line in path.read_text(encoding='utf-8').splitlines():
            row = json.loads(line)
            if 'epoch' in row:
                if not all(type(value) in (int, float) and math.isfinite(value) for key, value in row.items()
                           if key == 'epoch' or key.endswith(('_loss', '_accuracy'))):
                    raise ValueError('what should be numbers are none')
                # an epoch done again, after a resume or by a later run, replaces what was there
                rows = [*(before for before in rows if before['epoch'] < row['epoch']), row]
    except FileNotFoundError:
        return None, f'training curves: left out, as there is no {path}'
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return None, f'training curves: left out, as {path} cannot be read ({error})'
    return rows or None, f'training curves: {len(rows)} epochs of {path}'


class Known(NamedTuple):
    """What is known of a network already.

    at, accuracy: time steps and the test accuracies (fractions) after them. ann_accuracy: the ANN's, or None.
    conversion: what the conversion measured, {} where nothing was converted. checkpoint: the file that the network is
    from, or None for one that was just converted or not trained.
    """
    at: list
    accuracy: list
    ann_accuracy: float | None
    conversion: dict
    checkpoint: Path | str | None


def write(model, data, run, known):
    """Measure the network on the test images and write the figures and report.json into the folder of --report.

    run: run.Run. known: Known. Raises UserError.
    """
    folder, args, say = run.args.report, run.args, run.say
    at, accuracy, ann_accuracy, conversion, checkpoint = known
    layers, connections = measure(model, data, run.device, args)
    training, line = training_rows(checkpoint)
    report = {
        'command': log.command(), 'checkpoint': checkpoint and str(checkpoint),
        'arguments': log.arguments(args), 'test_images': len(data.test), 'timesteps': model.timesteps,
        'leak': model.leak, 'leaks': model.leaks.tolist(), 'depth': model.depth, 'latency': model.latency,
        'delay': model.delay, 'encoding': model.encoding, 'initial_potential': model.initial_potential,
        'conversion': conversion,
        'accuracy': {'time_steps': at, 'accuracy': accuracy, 'ann': ann_accuracy},
        **summary(model, layers, connections, len(data.test)), 'training': training, 'notes': notes_of(model)}
    drawn = {'accuracy': draw_accuracy(report), 'activity': draw_activity(report),
             'surrogate': draw_surrogate(report), 'operations': draw_operations(report),
             **({'training': draw_training(training)} if training else {})}
    report['figures'] = [f'{name}.png' for name in drawn]
    for name, figure in drawn.items():
        files.write_atomically(Path(folder, f'{name}.png'), lambda file, figure=figure: figure.savefig(file, dpi=150))
    text = json.dumps(report, indent=1)
    files.write_atomically(Path(folder, 'report.json'), lambda file: file.write(text.encode()))
    total, energy = report['operations']['total'], report['operations']['energy_uj']
    more = ''.join(f', {total[key]:.4g} {what}' for key, what in (
        ('macs', 'MACs in the first layer'), ('bias_additions', 'additions of biases')) if total[key])
    say(line)
    say(f'report: {Path(folder, "report.json")}, {", ".join(report["figures"])}; an image takes '
        f'{total["synaptic_operations"]:.4g} synaptic operations{more}, '
        f'{energy["snn_exact"]:.4g} uJ, the ANN {total["ann_macs"]:.4g} MACs, {energy["ann"]:.4g} uJ')


# -- figures, each from the report's numbers alone -------------------------------------------------------------------

SNN, SNN_LIGHT, ANN, GREY = '#1f5fa8', '#8fb8de', '#c8553d', '#e6e6e6'


def draw_accuracy(report):
    figure, numbers = figures.new_figure(6.4, 4), report['accuracy']
    axes = figure.subplots()
    few = len(numbers['time_steps']) <= 30
    axes.plot(numbers['time_steps'], [100 * value for value in numbers['accuracy']], color=SNN,
              marker='o' if few else None, markersize=4, clip_on=False, label='SNN')
    if numbers['ann'] is not None:
        axes.axhline(100 * numbers['ann'], color=ANN, linestyle='--', label='ANN')
    if report['latency']:
        axes.axvspan(0, report['latency'], color=GREY, linewidth=0, label='no spike can be at the output yet')
    axes.set(xlabel='time steps', ylabel='test accuracy (%)', xlim=(0, report['timesteps']), ylim=(0, 102),
             title=f'Accuracy over time, {report["test_images"]} test images')
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=3, frameon=False, fontsize='small')
    return figure


def draw_activity(report):
    layers = report['layers']
    figure = figures.new_figure(11, 1.8 + 0.28 * len(layers))
    rate_axes, count_axes, threshold_axes = figure.subplots(1, 3, sharey=True, width_ratios=[2, 1, 1])
    direct = layers[0]['firing_rate_by_step'] is None
    rates = [[math.nan] * layer['first_step'] + (layer['firing_rate_by_step'] or []) for layer in layers]
    rates = [row + [math.nan] * (report['timesteps'] - len(row)) for row in rates]
    names, places = [layer['name'] for layer in layers], range(len(layers))
    rate_axes.set_facecolor(GREY)
    image = rate_axes.imshow(rates, aspect='auto', cmap='viridis', vmin=0, interpolation='none')
    figure.colorbar(image, ax=rate_axes)
    grey = (['the input is no spikes'] if direct else []) + (
        ['silent, or too late for the output'] if report['latency'] else [])
    rate_axes.xaxis.get_major_locator().set_params(integer=True)
    rate_axes.set(xlabel='time step' + (f' (grey: {"; ".join(grey)})' if grey else ''),
                  title='Firing rate (spikes per neuron and step)')
    rate_axes.set_yticks(places, names, fontsize='small')
    count_axes.barh(places, [math.nan if layer['spikes_per_neuron'] is None else layer['spikes_per_neuron']
                             for layer in layers], color=SNN)
    steps = ' to '.join(map(str, sorted({min(counted := [layer['steps'] for layer in layers]), max(counted)})))
    count_axes.set(xlabel=f'spikes per neuron and image\n{steps} steps of T = {report["timesteps"]}',
                   title='Spikes')
    threshold_axes.barh(places, [layer['threshold'] or math.nan for layer in layers], color=SNN_LIGHT)
    threshold_axes.set(xlabel='membrane potential θ', title='Threshold')
    for axes in (count_axes, threshold_axes):
        axes.grid(axis='x', alpha=0.3)
    return figure


def draw_surrogate(report):
    numbers = report['surrogate']
    shares = [100 * count / numbers['total'] for count in numbers['count']]
    figure = figures.new_figure(8, 5.5)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.4])
    if numbers['activation'] == 'STDB':
        # a neuron is looked at in T - L steps: of one there is no delta_t, and a single one makes no line
        top.plot(numbers['delta_t'], numbers['gradient'], color=ANN, marker='o' if len(shares) == 1 else None)
        bottom.xaxis.get_major_locator().set_params(integer=True)
        bottom.set_xlim(0, max(2, len(shares) + 1))
        bottom.bar(numbers['delta_t'], shares, width=1, color=SNN)
        top.set(title=f'STDB: {numbers["alpha"]:g} exp(-{numbers["beta"]:g} Δt)')
        bottom.set(xlabel='Δt, time steps since the last earlier spike')
        apart = (f'not drawn: never fired before, {numbers["never_share"]:.1%}\n'
                 f'(gradient {numbers["never_largest_gradient"]:.1e} or less)')
    else:
        edges = numbers['z_edges']
        bottom.set_xlim(edges[0], edges[-1])
        top.plot(edges, numbers['gradient_at_edges'], color=ANN)
        bottom.bar(edges[:-1], shares, width=edges[1] - edges[0], align='edge', color=SNN)
        top.set(title=f'Linear: {numbers["gamma"]:g} max(0, 1 - |z|)')
        bottom.set(xlabel='z = u/θ - 1')
        apart = (f'not drawn: below {edges[0]:g}, {numbers["below"] / numbers["total"]:.1%};\n'
                 f'above {edges[-1]:g}, {numbers["above"] / numbers["total"]:.1%}')
    top.set(ylabel='surrogate gradient')
    top.margins(y=0.1)
    top.set_ylim(bottom=0)
    # a logarithmic axis has no place for zeros alone, as of a network that never fires
    bottom.set(ylabel='share of neurons × steps (%)', yscale='log' if any(shares) else 'linear')
    bottom.set_ylim(bottom=None if any(shares) else 0)
    bottom.text(0.98, 0.95, apart, transform=bottom.transAxes, ha='right', va='top', fontsize='small',
                bbox={'facecolor': 'white', 'edgecolor': '0.8'})
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    return figure


def draw_operations(report):
    numbers = report['operations']
    rows, energy = numbers['connections'], numbers['energy_uj']
    figure = figures.new_figure(11, 2.5 + 0.45 * len(rows))
    axes, energy_axes = figure.subplots(1, 2, width_ratios=[2.2, 1])
    direct, biased = numbers['total']['macs'] > 0, numbers['total']['bias_additions'] > 0
    what = 'SNN: ACs and MACs' if direct else 'SNN: ACs'

    def snn(*keys):
        return [sum(row[key] for key in (*keys, 'bias_additions')) for row in rows]

    series = [('ANN: MACs', ANN, [row['ann_macs'] + row['ann_additions'] for row in rows], energy['ann']),
              (f'{what}, exact', SNN, snn('synaptic_operations', 'macs'), energy['snn_exact']),
              (f'{what}, rate × FLOPs', SNN_LIGHT, snn('estimate', 'macs_with_padding'), energy['snn_estimate'])]
    for i, (label, color, values, _) in enumerate(series):
        axes.barh([place + 0.27 * (i - 1) for place in range(len(rows))], values, height=0.27, color=color, label=label)
    axes.set_yticks(range(len(rows)), [f'{row["name"]} ({row["kind"]})' for row in rows], fontsize='small')
    axes.invert_yaxis()
    smallest = min([value for *_, values, _ in series for value in values if value > 0], default=1)
    axes.set(xscale='log', xlim=(smallest / 2, None), xlabel='operations of an image',
             title='Operations of each connection')
    axes.margins(y=0.02)
    figure.legend(*axes.get_legend_handles_labels(), fontsize='small', loc='outside upper center', ncols=3,
                  frameon=False)
    bars = energy_axes.bar([label.replace(': ', ':\n').replace(', ', ',\n') for label, *_ in series],
                           [value for *_, value in series], color=[color for _, color, *_ in series])
    energy_axes.bar_label(bars, fmt='%.4g', padding=2)
    energy_axes.set(ylabel='µJ an image', title=f'Energy\n{MAC_PJ} pJ a MAC, {AC_PJ} pJ an AC')
    energy_axes.margins(y=0.12)
    energy_axes.tick_params(axis='x', labelsize='small')
    for each, direction in ((axes, 'x'), (energy_axes, 'y')):
        each.grid(axis=direction, alpha=0.3)
        each.set_axisbelow(True)
    of_input = ('the first layer, given the image itself, MACs, once an image' if direct
                else 'a negative input spike as a positive one')
    figure.supxlabel(
        'Exact: each spike counts as many ACs as its neuron has outgoing connections, borders and strides considered; '
        'a spike before an average pool counts\n'
        f'its own ACs (the estimate: a quarter), {of_input}, a plain identity one AC a spike'
        + (', a bias one AC a neuron and step' if biased else '')
        + '. Synapses only: neither memory nor neurons.\n'
        f'Energy: {numbers["energy_source"]}.', fontsize='x-small', x=0.01, ha='left')
    return figure


def draw_training(rows):
    figure = figures.new_figure(10, 3.8)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for axes, what, scale in ((loss_axes, 'loss', 1), (accuracy_axes, 'accuracy', 100)):
        for part, color in (('train', SNN_LIGHT), ('validation', '#4a4a4a'), ('test', SNN)):
            points = [(row['epoch'], scale * row[f'{part}_{what}']) for row in rows if f'{part}_{what}' in row]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, marker='o', markersize=3, label=part)
        axes.set(xlabel='epoch', ylabel='cross-entropy' if what == 'loss' else 'accuracy (%)', title=what.capitalize())
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    return figure
