"""The report: its counts against those made by hand, by brute force and by NeuroBench (PyPI: neurobench)."""
import io
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import fx, nn
from torch.utils.data import TensorDataset

import self_models
import snn
import step_by_step
from conftest import digits, fails, fill, network, run, ternary
from experiment import engine, graph, setup
from experiment.data import Data
from experiment.reporting import count, numbers, plots, report
from experiment.reporting.connections import Connection, Layer, add_up, ones_through
from self_models import QCFS, VGG, LayerRecord, LIFParameters, ResNet, convert
from self_models.conversion import copy_weights
from self_models.lif import lif_backward
from self_models.lif_layer import SynapticInput
from self_models.spike_train import SpikeTrain
from self_models.surrogate import SURROGATES

SMALL = digits(40, 30)
FLAGS = [*SMALL, '--timesteps', '9', '--default_threshold', '0.2']
# but those of what tests before left open, which happens to be collected during one of these
own_warnings_are_errors = pytest.mark.filterwarnings(
    'error', 'ignore::ResourceWarning', 'ignore::pytest.PytestUnraisableExceptionWarning')


@pytest.fixture(autouse=True)
def few_neurons_and_pixels(monkeypatch):
    """VGGs are quicker with few neurons in their linear layers, and figures with few pixels."""
    savefig = Figure.savefig
    monkeypatch.setattr('self_models.layers.VGG_HIDDEN', 64)
    monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **options: savefig(self, *args, **options | {'dpi': 30}))


def one_spike_each(shape, synapse, pools=0):
    """Synaptic operations of a single spike, at each place of (C, H, W) or (features,) in turn."""
    x = torch.eye(math.prod(shape)).view(-1, *shape)
    for _ in range(pools):
        x = add_up(nn.AvgPool2d(2), x)
    return ones_through(synapse, x).flatten(1).sum(1).view(shape)


# -- counts by hand ---------------------------------------------------------------------------------------------------

def test_spikes_near_a_border_reach_fewer_neurons():
    operations = one_spike_each((1, 3, 3), nn.Conv2d(1, 2, 3, padding=1, bias=False))
    assert operations.tolist() == [[[8, 12, 8], [12, 18, 12], [8, 12, 8]]]  # 4, 6 or 9 positions x 2 channels


def test_a_stride_makes_neurons_differ():
    # along a line of 4, kernels stand at 0 and 2 and reach -1 ... 1 and 1 ... 3
    operations = one_spike_each((1, 4, 4), nn.Conv2d(1, 5, 3, stride=2, padding=1, bias=False))
    line = torch.tensor([1., 2, 1, 1])
    assert torch.equal(operations[0], 5 * torch.outer(line, line))


def test_each_spike_before_a_pool_counts_and_an_odd_rest_reaches_nothing():
    operations = one_spike_each((1, 5, 5), nn.Conv2d(1, 3, 3, padding=1, bias=False), pools=1)
    want = torch.zeros(5, 5)
    want[:4, :4] = 3 * 4  # each of the 2x2 windows reaches all four positions
    assert torch.equal(operations[0], want)


def test_each_input_of_a_linear_layer_reaches_all_its_neurons():
    assert one_spike_each((6,), nn.Linear(6, 7, bias=False)).tolist() == [7] * 6


def test_spikes_add_up_over_steps_and_samples_whatever_their_sign_and_those_of_one_window_are_one_input():
    ann = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.AvgPool2d(2),
                        nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    nn.init.ones_(ann[0].weight)
    images = torch.zeros(2, 1, 4, 4)
    images[0, 0, :2, :2] = 1  # 4 in one window
    images[1, 0, 0, 0] = images[1, 0, 3, 3] = 1  # in two
    images[1, 0, 1, 2] = -1  # a spike of the input, of which no neuron fires
    _, found = counted(self_models.spiking(ann, 3, delay=0, default_threshold=0.5), images)
    assert (found['0'].spikes, found['0'].operations, found['0'].nonzero_operations) == (3 * 7, 3 * 7, 3 * 7)
    # each of the 2x2 windows reaches all four positions
    assert (found['3'].spikes, found['3'].operations, found['3'].nonzero_operations) == (3 * 6, 3 * 6 * 4, 3 * 3 * 4)


@pytest.mark.parametrize('size, kernel_size, stride, padding, pools', [
    ((2, 5, 4), 3, 1, 1, 0), ((2, 6, 7), 3, 2, 1, 0), ((1, 7, 7), 5, 1, 2, 0), ((2, 5, 6), 1, 2, 0, 0),
    ((1, 9, 6), 3, 1, 1, 1), ((1, 8, 12), 3, 2, 1, 2)])
def test_against_brute_force(size, kernel_size, stride, padding, pools):
    synapse = nn.Conv2d(size[0], 3, kernel_size, stride=stride, padding=padding, bias=False)
    want = torch.zeros(size)
    for place in range(math.prod(size)):
        x = torch.eye(math.prod(size))[place].view(1, *size)
        for _ in range(pools):
            x = F.avg_pool2d(x, 2)
        # a weight of 1 all over: an output that changes is one more operation
        want.view(-1)[place] = (F.conv2d(x, torch.ones_like(synapse.weight), stride=stride, padding=padding) > 0).sum()
    assert torch.equal(one_spike_each(size, synapse, pools), want)


def test_delta_t_by_hand():
    spikes = torch.zeros(6, 1, 2, dtype=torch.bool)
    spikes[1, 0, 0] = spikes[4, 0, 0] = True
    # the first neuron sees, step after step: never, never, 1, 2, 3 (as it fires again), 1; the other one never
    assert count.delta_t(spikes).tolist() == [2 + 6, 2, 1, 1, 0, 0]


def test_delta_t_is_that_of_the_gradient():
    spikes = torch.rand(15, 2, 30, generator=torch.Generator().manual_seed(0)) < 0.2
    counts = count.delta_t(spikes)
    assert counts.sum() == 15 * 60 and (counts[:6] > 0).all()
    # at leak 0 lif_backward leaves the factors exp(-beta dt) alone; of a neuron that never fired it is exp(-300)
    neuron = LIFParameters(1.0, 0.0, SURROGATES['STDB'](alpha=1.0, beta=0.3))
    factors = torch.ones(15, 60, dtype=torch.float64)
    lif_backward(factors, spikes.flatten(1), 1, neuron)
    want = sum(count * math.exp(-0.3 * dt) for dt, count in enumerate(counts.tolist()) if dt > 0)
    assert factors.sum().item() == pytest.approx(want)


def test_z_by_hand():
    synapse = nn.Linear(1, 1, bias=False)
    nn.init.constant_(synapse.weight, 1.2)
    # u = 0, 1.2, 2.4, 2.4 + 1.2 - 2 after inputs 0, 1, 1, 1
    train = SpikeTrain(torch.tensor([False, True, True, True]).view(4, 1, 1), (1,), 0)
    record = LayerRecord('a', LIFParameters(2.0, 1.0, SURROGATES['Linear']()), [SynapticInput(train, synapse)], train)
    counts = sum(count.z_counts(u, 2.0) for _, _, u in record.potentials())
    between = {round(count.Z_EDGES[i], 1): int(n) for i, n in enumerate(counts[1:-1].tolist()) if n}
    # z = -1 (a bin holds its upper edge), -0.4 and 0.2 (which rounding may put on either side), -0.2
    assert counts.sum() == 4 and between[-1.1] == 1 and sum(between.values()) == 4
    assert all(any(abs(low + 0.05 - z) < 0.051 for low in between) for z in (-0.4, 0.2, -0.2))


# -- whole networks ---------------------------------------------------------------------------------------------------

def counted(model, images):
    """{name: (Connection)} of count.measure on images, in batches of 2."""
    args = SimpleNamespace(seed=0, batch_size=2, num_workers=0, amp=False)
    labels = torch.zeros(len(images), dtype=torch.int64)
    data = Data(None, TensorDataset(images, labels), list(range(10)), images.shape[1:])
    layers, connections = count.measure(model, data, torch.device('cpu'), args)
    return layers, {connection.name: connection for connection in connections}


# steps at which each connection's input comes: by hand, for T = 12 and T = 14
RESNET6_WINDOWS = {
    'pre_process.0': (0, 7, 0), 'pre_process.3': (1, 8, 0), 'pre_process.6': (2, 9, 0),
    'layer1.0.residual.0': (3, 10, 1), 'layer1.0.identity': (3, 10, 1), 'layer1.0.residual.3': (4, 10, 0),
    'layer2.0.residual.0': (4, 11, 0), 'layer2.0.identity.0': (4, 11, 0), 'layer2.0.residual.3': (5, 11, 0),
    'classifier.0': (5, 12, 0)}
VGG5_WINDOWS = {  # first step, the step after the last, pools before it
    'features.0': (0, 9, 0), 'features.3': (1, 10, 1), 'features.6': (2, 11, 0), 'classifier.0': (3, 12, 1),
    'classifier.3': (4, 13, 0), 'classifier.6': (5, 14, 0)}
NETWORKS = [('VGG5', 14, VGG5_WINDOWS), ('RESNET6', 12, RESNET6_WINDOWS)]


def filled(architecture, **options):
    return fill(network(architecture, dataset='DIGITS', **options), 3).eval()


def spiking(architecture, timesteps):
    """(model, images): a network that spikes in every layer, and images that are encoded without chance."""
    model = filled(architecture, timesteps=timesteps).double()
    model.threshold_update(0.2, [1.0] * len(model.thresholds))
    return model, ternary((3, 1, 8, 8), 5, 1.25, low=-1)


def inputs_of(model, images, windows):
    """{name: inputs (steps * B, ...)} of modules in the step-by-step reference, within their windows."""
    inputs = {name: [] for name in windows}
    hooks = [model.get_submodule(name).register_forward_pre_hook(
        lambda _, args, name=name: inputs[name].append(args[0])) for name in windows]
    with torch.no_grad():
        step_by_step.run(model, images)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(inputs[name][start:stop]) for name, (start, stop, _) in windows.items()}


@pytest.mark.parametrize('architecture, timesteps, windows', NETWORKS)
def test_networks_against_the_step_by_step_reference(architecture, timesteps, windows):
    model, images = spiking(architecture, timesteps)
    _, connections = counted(model, images)
    assert connections.keys() == windows.keys()
    for name, x in inputs_of(model, images, windows).items():
        synapse, (start, stop, pools) = model.get_submodule(name), windows[name]

        def reached(x, synapse=synapse):  # sum over outputs of what comes in there, weights 1
            if isinstance(synapse, nn.Conv2d):
                return F.conv2d(x, torch.ones_like(synapse.weight), None, synapse.stride, synapse.padding).sum().item()
            return x.sum().item() * (synapse.out_features if isinstance(synapse, nn.Linear) else 1)

        connection = connections[name]
        assert (connection.first_step, connection.steps) == (start, stop - start), name
        assert connection.operations == reached(x.abs() * 4 ** pools) > 0, name
        assert connection.nonzero_operations == reached((x != 0).double()), name
        assert connection.spikes == x.abs().sum().item() * 4 ** pools, name  # 8x8 images: no odd rest


@pytest.mark.parametrize('architecture, timesteps, windows', NETWORKS)
def test_networks_against_neurobench(architecture, timesteps, windows):
    workload = pytest.importorskip('neurobench.metrics.workload')
    models = pytest.importorskip('neurobench.models')
    model, images = spiking(architecture, timesteps)
    _, connections = counted(model, images)
    model.forward = lambda x: step_by_step.run(model, x)[0]
    watched, names = models.TorchModel(model), {module: name for name, module in model.named_modules()}
    watched.register_hooks()
    with torch.no_grad():
        outputs = watched(images)
        for hook in watched.connection_hooks:  # of all T steps; a report counts those that can reach the output
            start, stop, _ = windows[names[hook.layer]]
            hook.inputs = hook.inputs[start:stop]
        operations = workload.SynapticOperations()(watched, outputs, (images, None))
    # NeuroBench knows no plain identity, and calls operations on pooled values MACs
    ours = [c for c in connections.values() if c.kind != 'identity']
    binary, pooled = ([c for c in ours if bool(windows[c.name][2]) == pools] for pools in (False, True))
    assert operations['Effective_ACs'] * 3 == sum(c.operations for c in binary) > 0
    assert operations['Effective_MACs'] * 3 == sum(c.nonzero_operations for c in pooled) > 0


def test_layers_count_spikes_of_every_step():
    model, images = spiking('RESNET6', 12)
    layers, _ = counted(model, images)
    with torch.no_grad():
        _, history = step_by_step.run(model, images)
    assert layers[0].spikes.tolist() == [images.abs().gt(0).sum()] * 7
    for layer, spikes in zip(layers[1:], history, strict=True):
        want = [spikes[t].sum().item() for t in range(layer.first_step, layer.first_step + 7)]
        assert layer.spikes.tolist() == want and layer.neurons == spikes[0][0].numel()


@pytest.mark.parametrize('architecture', ['VGG5', 'VGG16', 'RESNET12'])
def test_the_graph_of_a_layer_by_layer_network_is_that_of_its_ann(architecture):
    ann = fill((VGG if architecture.startswith('VGG') else ResNet)(architecture, dataset='MNIST'), 1).eval()
    model, x = network(architecture, dataset='MNIST').eval(), ternary((2, 1, 28, 28), 5).float()
    copy_weights(ann, model)
    found = graph.graph_of(model)
    for node in found.nodes:
        if node.target is graph.neurons:
            node.target = lambda current, layer: current.relu()
    with torch.no_grad():
        assert torch.allclose(fx.Interpreter(model, graph=found).run(x), ann(x), rtol=1e-4)
    assert [node.args[1] for node in found.nodes if len(node.args) == 2 and node.args[1] in model.layer_names] == (
        model.layer_names)


def test_macs_are_those_of_a_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode
    model, images = spiking('RESNET6', 12)
    _, connections = counted(model, images)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ResNet('RESNET6', dataset='DIGITS').double()(images[:1])
    assert sum(c.macs_with_padding for c in connections.values()) == counter.get_total_flops() / 2
    assert connections['layer1.0.identity'].additions == 64 * 4 * 4
    # a 3x3 kernel on 8x8 pixels, padded: 8 rows of 3 but for the two at the border
    assert connections['pre_process.0'].macs == 64 * (8 * 3 - 2) ** 2


def test_summary_by_hand():
    layer = Layer('a', 10, 0.5, 1, torch.tensor([2., 6]), torch.tensor([30., 10]))
    connection = Connection('b', 'linear', 10, 1, 2, None, 1000, 2000, 0, spikes=8, operations=800,
                                  nonzero_operations=400)
    model = SimpleNamespace(surrogate=SURROGATES['STDB'](alpha=0.5, beta=0.25))
    got = numbers.summary(model, [layer, layer], [connection], 4)
    assert got['layers'][1]['firing_rate_by_step'] == pytest.approx([0.05, 0.15])
    assert got['layers'][1]['spikes_per_neuron'] == pytest.approx(0.2)
    assert got['surrogate']['gradient'] == pytest.approx([0.5 * math.exp(-0.25)])
    assert (got['surrogate']['never_share'], got['surrogate']['count']) == (0.75, [10])
    total, energy = got['operations']['total'], got['operations']['energy_uj']
    assert (total['synaptic_operations'], total['nonzero_inputs'], total['ann_macs']) == (200, 100, 1000)
    assert total['estimate'] == pytest.approx(0.2 * 2000)
    assert energy['ann'] == pytest.approx(1000 * 4.6e-6) and energy['ann_with_padding'] == pytest.approx(2000 * 4.6e-6)
    assert energy['snn_exact'] == pytest.approx(200 * 0.9e-6)
    assert energy['snn_estimate'] == pytest.approx(400 * 0.9e-6)


@pytest.mark.parametrize('activation, formula, gradient', [  # at z = 1
    ('Rectangle', 'gamma [|z| < width / 2], z = u/theta - 1', 0),
    ('ATan', 'gamma / (1 + (pi/2 * width * z)^2), z = u/theta - 1', 0.5 / (1 + math.pi ** 2 / 4)),
    ('FastSigmoid', 'gamma / (1 + width * |z|)^2, z = u/theta - 1', 0.5 / 4),
    ('Sigmoid', '4 * gamma * s (1 - s), s = sigmoid(width * z), z = u/theta - 1', 2 * math.e / (1 + math.e) ** 2)])
def test_the_surrogates_numbers_by_hand(activation, formula, gradient):
    layer = Layer('a', 10, 0.5, 1, surrogate=torch.arange(62.))
    got = numbers.surrogate_numbers(SimpleNamespace(surrogate=SURROGATES[activation](gamma=0.5)), [layer, layer])
    assert (got['activation'], got['formula'], got['gamma'], got['width']) == (activation, formula, 0.5, 1.0)
    assert got['gradient_at_edges'][30] == 0.5 and got['z_edges'][40] == 1  # at z = 0
    assert got['gradient_at_edges'][40] == pytest.approx(gradient) == got['gradient_at_edges'][20]
    assert (got['below'], got['count'][:2], got['above'], got['total']) == (0, [2, 4], 122, 61 * 62)


def test_reports_of_the_published_surrogates_have_the_keys_that_they_had():
    layer = Layer('a', 10, 0.5, 1, surrogate=torch.ones(62))
    common = {'activation', 'formula', 'count', 'total', 'count_by_layer', 'count_by_layer_is'}
    for name, formula, keys in (
            ('Linear', 'gamma max(0, 1 - |z|), z = u/theta - 1',
             {'gamma', 'z_edges', 'gradient_at_edges', 'below', 'above'}),
            ('STDB', 'alpha exp(-beta delta_t)',
             {'alpha', 'beta', 'delta_t', 'gradient', 'never', 'never_share', 'never_largest_gradient'})):
        got = numbers.surrogate_numbers(SimpleNamespace(surrogate=SURROGATES[name]()), [layer])
        assert got.keys() == common | keys and (got['activation'], got['formula']) == (name, formula)
    assert got['never_largest_gradient'] == pytest.approx(0.3 * math.exp(-10))  # from step -999 to step 1


# -- direct input, neurons without delay, biases -----------------------------------------------------------------------

def low_latency(architecture, timesteps, **options):
    """(model, images): a network with biases, given the image itself, no pixel 0; leaks and thresholds differ."""
    options = {'encoding': 'direct', 'delay': 0, 'initial_potential': 0.5, 'bias': True, **options}
    model = filled(architecture, timesteps=timesteps, **options).double()
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith('factor'):
                value.fill_(0.75)
        for name, value in model.named_parameters():
            if name.endswith('bias'):
                value.div_(100)
            elif name.endswith('weight'):
                value.sub_(0.9 * value.mean())  # or every neuron would fire
        model.threshold_update(1.0, [0.3 + 0.05 * i for i in range(len(model.layer_names))])
        model.leak_update([1 - 0.02 * i for i in range(len(model.layer_names))])
    x = ternary((3, 1, 8, 8), 5, low=0) + 0.5
    return model, (-x if options['encoding'] == 'poisson' else x)


@pytest.mark.parametrize('architecture, windows', [('VGG5', VGG5_WINDOWS), ('RESNET6', RESNET6_WINDOWS)])
@pytest.mark.parametrize('timesteps', [1, 4])
def test_direct_input_without_delay_against_neurobench(architecture, windows, timesteps):
    workload = pytest.importorskip('neurobench.metrics.workload')
    models = pytest.importorskip('neurobench.models')
    model, images = low_latency(architecture, timesteps)
    _, connections = counted(model, images)
    first, *others = [c for c in connections.values() if c.kind != 'identity']
    assert connections.keys() == windows.keys() and first.constant and not first.operations
    assert {(c.first_step, c.steps) for c in connections.values()} == {(0, timesteps)}
    model.forward = lambda x: step_by_step.run(model, x)[0]
    watched = models.TorchModel(model)
    watched.register_hooks()
    with torch.no_grad():
        operations = workload.SynapticOperations()(watched, watched(images), (images, None))
    binary, pooled = ([c for c in others if bool(windows[c.name][2]) == pools] for pools in (False, True))
    assert operations['Effective_ACs'] * 3 == sum(c.operations for c in binary) > 0
    # NeuroBench counts the image anew at each step
    assert operations['Effective_MACs'] * 3 == pytest.approx(
        3 * first.macs * timesteps + sum(c.nonzero_operations for c in pooled))
    row, energy = (numbers.operation_numbers([first], 3)[key] for key in ('connections', 'energy_uj'))
    assert row[0]['macs'] == first.macs and row[0]['macs_every_step'] == timesteps * first.macs
    assert row[0]['bias_additions'] == 64 * 64 and row[0]['input_spikes_per_neuron'] is None
    assert energy['snn_exact'] == pytest.approx((4.6 * first.macs + 0.9 * 64 * 64) / 1e6)
    assert energy['snn_exact_every_step'] == pytest.approx(timesteps * energy['snn_exact'])


def test_a_bias_is_an_addition_a_neuron_and_step():
    model, images = low_latency('RESNET6', 4)
    _, connections = counted(model, images)
    rows = {row['name']: row for row in numbers.operation_numbers(connections.values(), 3)['connections']}
    assert {name: row['bias_additions'] for name, row in rows.items()} == {
        'pre_process.0': 64 * 64, 'pre_process.3': 4 * 64 * 64, 'pre_process.6': 4 * 64 * 64,
        'layer1.0.residual.0': 4 * 64 * 16, 'layer1.0.identity': 0, 'layer1.0.residual.3': 4 * 64 * 16,
        # the identity's bias and the residual's are one
        'layer2.0.residual.0': 4 * 128 * 4, 'layer2.0.identity.0': 0, 'layer2.0.residual.3': 4 * 128 * 4,
        'classifier.0': 4 * 10}
    assert rows['layer1.0.identity']['synaptic_operations'] * 3 == connections['layer1.0.identity'].spikes > 0
    assert rows['layer1.0.identity']['ann_additions'] == 64 * 16 and rows['classifier.0']['ann_additions'] == 10


def test_layers_without_delay_count_the_spikes_of_all_steps():
    model, images = low_latency('VGG5', 4, learn_threshold=True, learn_leak=True)
    layers, _ = counted(model, images)
    with torch.no_grad():
        _, history = step_by_step.run(model, images)
    for layer, spikes, leak in zip(layers[1:], history, model.leaks.tolist(), strict=True):
        assert layer.spikes.tolist() == [row.sum().item() for row in spikes] and layer.leak == leak
    found = numbers.layer_numbers(layers[0], 3)
    assert (found['steps'], found['firing_rate'], found['firing_rate_by_step']) == (4, None, None)


def test_z_is_of_the_potential_that_a_neuron_without_delay_fires_on():
    model, images = low_latency('VGG5', 4, activation='Linear')
    layers, _ = counted(model, images)
    for layer in layers[1:]:
        above = layer.surrogate[count.Z_EDGES.index(0.0) + 1:].sum().item()
        assert above == layer.spikes.sum().item()


TITLES = {
    'STDB': 'STDB: 0.3 exp(-0.01 Δt)', 'Linear': 'Linear: 0.3 max(0, 1 - |z|)',
    'Rectangle': 'Rectangle: 0.3 [|z| < 1 / 2]',
    'ATan': 'ATan: 0.3 / (1 + (pi/2 * 1 * z)^2)', 'FastSigmoid': 'FastSigmoid: 0.3 / (1 + 1 * |z|)^2',
    'Sigmoid': 'Sigmoid: 4 * 0.3 * s (1 - s), s = sigmoid(1 * z)', 'Gaussian': 'Gaussian: 0.3 exp(-(1 * z)^2)',
    'Inverse': 'Inverse: 0.3 / Δt, without beta'}


@own_warnings_are_errors
@pytest.mark.parametrize('architecture, activation, encoding, delay, timesteps', [
    ('RESNET6', 'STDB', 'poisson', 0, 1), ('VGG5', 'Linear', 'poisson', 0, 1), ('RESNET6', 'Linear', 'direct', 1, 6),
    ('VGG5', 'STDB', 'direct', 0, 1), ('VGG5', 'Rectangle', 'direct', 0, 2), ('RESNET6', 'ATan', 'poisson', 1, 7),
    ('VGG5', 'FastSigmoid', 'direct', 0, 2), ('RESNET6', 'Sigmoid', 'direct', 0, 1),
    ('VGG5', 'Gaussian', 'Alternating', 0, 2), ('VGG5', 'Inverse', 'Alternating', 0, 5)])
def test_every_network_of_few_steps_is_drawn(architecture, activation, encoding, delay, timesteps, own_classes):
    model, images = low_latency(architecture, timesteps, activation=activation, encoding=encoding, delay=delay)
    layers, connections = counted(model, images)
    found = json.loads(json.dumps(numbers.summary(model, layers, list(connections.values()), 3), allow_nan=False))
    assert sum(found['surrogate']['count']) + sum(
        found['surrogate'].get(key, 0) for key in ('never', 'below', 'above')) == found['surrogate']['total']
    about = {'timesteps': timesteps, 'latency': model.output_delay, 'test_images': 3, **found,
             'accuracy': {'time_steps': [timesteps], 'accuracy': [0.5], 'ann': 0.6}}
    surrogate = plots.draw_surrogate(about)
    assert surrogate.axes[0].get_title() == TITLES[activation]
    others = [draw(about) for draw in (plots.draw_accuracy, plots.draw_activity, plots.draw_operations)]
    # these do not depend on the surrogate, but for whether it is of spikes
    for figure in [surrogate, *(others if activation in ('STDB', 'Linear', 'ATan') else [])]:
        figure.savefig(io.BytesIO())


@pytest.mark.parametrize('architecture', ['VGG5', 'RESNET6'])
def test_bounds_of_channels_are_said_to_be_in_the_weights(architecture):
    kind = {'VGG5': VGG, 'RESNET6': ResNet}[architecture]
    for bounds in ('channel', 'layer'):
        ann = kind(architecture, dataset='DIGITS', activation='QCFS', batch_norm=True, bounds=bounds).eval()
        for module in ann.modules():
            if isinstance(module, QCFS):
                module.bound.data.fill_(0.5)
        for model in (convert(ann, 4), self_models.spiking(ann, 4)):
            layers, _ = counted(model, ternary((2, 1, 8, 8), 5).float())
            assert {layer.threshold for layer in layers[1:]} == {1.0 if bounds == 'channel' else 0.5}
            assert numbers.in_units_of_bounds(model) == (bounds == 'channel')
    assert not numbers.in_units_of_bounds(filled(architecture))  # untrained, of the default threshold


# -- networks of one's own --------------------------------------------------------------------------------------------

def both(architecture, timesteps, **options):
    """(the network layer by layer, the same as any network), of an ANN with batch norm, its last layer with a bias."""
    ann = fill({'VGG5': VGG, 'RESNET6': ResNet}[architecture](
        architecture, dataset='DIGITS', activation='QCFS', batch_norm=True), 4).double().eval()
    for number, bound in enumerate(module.bound for module in ann.modules() if isinstance(module, QCFS)):
        bound.data.fill_(0.5 + 0.25 * number)
    ann.classifier[-1] = nn.Linear(ann.classifier[-1].in_features, 10).double()
    return convert(ann, timesteps, **options), self_models.spiking(ann, timesteps, **options)


@pytest.mark.parametrize('architecture', ['VGG5', 'RESNET6'])
@pytest.mark.parametrize('options', [{}, {'encoding': 'poisson', 'activation': 'Linear', 'leak': 0.9}])
def test_any_network_is_counted_as_the_published_ones_are(architecture, options):
    found = []
    for model in both(architecture, 4, **options):
        layers, connections = counted(model, ternary((3, 1, 8, 8), 5))
        found.append(numbers.summary(model, layers, list(connections.values()), 3))
    for a, b in zip(*(each['layers'] for each in found), strict=True):
        assert {**a, 'name': ''} == {**b, 'name': ''} and a['firing_rate'] != 0
    assert found[0]['surrogate']['count'] == found[1]['surrogate']['count']
    # of the two branches of a block, either comes first
    for a, b in zip(*(sorted(each['operations']['connections'], key=lambda row: (row['ann_macs'], row['kind']))
                      for each in found), strict=True):
        assert a['kind'] == b['kind'] and a.keys() == b.keys()
        for key in a.keys() - {'name', 'kind'}:
            assert a[key] == (b[key] if b[key] is None else pytest.approx(b[key], rel=1e-12)), key
    for key in ('total', 'energy_uj'):
        assert found[0]['operations'][key] == pytest.approx(found[1]['operations'][key], rel=1e-12)


def test_any_network_with_a_delay_is_counted_at_all_steps():
    ours, plain = both('RESNET6', 9, delay=1, encoding='poisson', initial_potential=0.0)
    layers, others = (counted(model, ternary((3, 1, 8, 8), 5, 1.25))[0] for model in (ours, plain))
    for a, b in zip(layers, others, strict=True):
        steps = len(a.spikes)
        assert a.spikes.sum() > 0 and torch.equal(b.spikes[a.first_step:a.first_step + steps], a.spikes)
        assert (b.first_step, len(b.spikes)) == (0, 9) and steps < 9


class Own(nn.Module):
    """For images (2, 4, 4); all weights are 1, so that any input above 0.5 makes a neuron fire."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, bias=False)
        self.mixed, self.inner = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 3, 1, bias=False)
        self.norm, self.head, self.last = nn.BatchNorm2d(3), nn.Linear(12, 7, bias=False), nn.Linear(7, 5)
        for p in self.parameters():
            nn.init.constant_(p, float(p.dim() > 1 or p is self.norm.weight))

    def forward(self, x):
        a = F.relu(self.grouped(x))
        b = F.relu(self.mixed(torch.cat([F.avg_pool2d(x, 2), a], 1)))
        c = F.relu(self.norm(self.inner(b)) + b)
        return self.last(self.head(torch.flatten(c, 1)))


def test_a_network_of_ones_own_by_hand():
    model = self_models.spiking(Own(), 2, default_threshold=0.5, delay=0).eval()
    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, 0, 0] = x[0, 0, 1, 1] = 1  # which spike at each of the two steps, as nothing else does
    layers, connections = counted(model, x)
    # of the first channel's, (1, 1) reaches all 2x2 positions of the two maps of its group; the other group is silent
    assert [layer.spikes.tolist() for layer in layers] == [[2, 2], [8, 8], [12, 12], [12, 12]]
    rows = {row['name']: row for row in numbers.operation_numbers(connections.values(), 1)['connections']}
    assert list(rows) == ['grouped', 'mixed', 'inner', 'relu_2.identity', 'head', 'last']

    def column(key):
        return [row[key] for row in rows.values()]

    assert column('kind') == ['conv3x3', 'conv1x1', 'conv1x1', 'identity', 'linear', 'linear']
    # (0, 0) reaches one position, (1, 1) all four; then all reach three maps, each its own neuron, or seven neurons
    assert column('synaptic_operations') == [2 * 2 * (1 + 4), 2 * 3 * (2 + 8), 2 * 3 * 12, 2 * 12, 2 * 7 * 12, 0]
    assert column('nonzero_inputs') == [2 * 2 * (1 + 4), 2 * 3 * (1 + 8), 2 * 3 * 12, 2 * 12, 2 * 7 * 12, 0]  # one pool
    # along a line of 4, kernels at 0 and 2 have 5 products of 6; what follows another synapse costs MACs at each step
    assert column('ann_macs') == [5 * 5 * 2 * 2, 6 * 4 * 3, 3 * 4 * 3, 0, 12 * 7, 7 * 5]
    assert column('ann_macs_with_padding') == [9 * 4 * 4, 6 * 4 * 3, 3 * 4 * 3, 0, 12 * 7, 7 * 5]
    assert column('macs') == [0, 0, 0, 0, 0, 2 * 7 * 5]
    assert column('input_neurons') == [32, 32 + 16, 12, 12, 12, 0]
    assert column('estimate') == pytest.approx([2 * 2 / 32 * 144, 2 * 10 / 48 * 72, 2 * 36, 2 * 12, 2 * 84, 0])
    # a bias of mixed, batch norm's of inner and the last one's, a neuron and step
    assert column('bias_additions') == [0, 2 * 12, 2 * 12, 0, 0, 2 * 5]
    assert column('ann_additions') == [0, 12, 12, 12, 0, 5]


class Cast(Own):
    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        a = F.relu(self.grouped(x))
        a = self.one.expand_as(a) * a
        b = torch.cat([F.avg_pool2d(x, 2), a], 1)
        b = F.relu(F.conv2d(b, self.mixed.weight.to(b), self.mixed.bias.type_as(x)))
        c = F.relu(self.norm(self.inner(b)) + b * self.one[:3].type_as(x))
        return self.last(self.head(torch.flatten(c, 1)))


class Summed(Own):
    def forward(self, x):
        a = F.relu(sum([self.grouped(x)]))  # 0 + what it gives
        b = F.relu(self.mixed(torch.cat([F.avg_pool2d(x, 2), a], 1)))
        return self.last(self.head(torch.flatten(F.relu(sum([self.norm(self.inner(b)), b])), 1)))


class Likened(Own):
    def forward(self, x):
        a = F.relu(self.grouped(x))
        b = F.relu(self.mixed(torch.cat([F.avg_pool2d(x, 2), a.type_as(x)], 1).to(x)))
        c = F.relu(self.norm(self.inner(b)) + b.expand_as(b))
        return self.last(self.head(torch.flatten(c.type_as(a), 1)))


def test_weights_in_the_form_of_others_and_zeros_are_no_inputs():
    counts = []
    for ann in (Own(), Cast(), Summed(), Likened()):
        model = self_models.spiking(ann, 2, default_threshold=0.5, delay=0).eval()
        layers, connections = counted(model, torch.ones(1, 2, 4, 4))
        counts.append([{**row, 'name': ''}
                       for row in numbers.operation_numbers(connections.values(), 1)['connections']])
        assert model.depth == 2  # the image is in the first and the second
    assert counts[0] == counts[1] == counts[2] == counts[3]


class Way(nn.Module):
    def __init__(self, way, **modules):
        super().__init__()
        self.way = way
        for name, module in modules.items():
            setattr(self, name, module)
        for p in self.parameters():
            nn.init.constant_(p, float(p.dim() > 1))

    def forward(self, x):
        return self.way(self, x)


def voting(pool):
    return Way(lambda n, x: n.fc(pool(F.relu(n.fc0(x.flatten(1))))), fc0=nn.Linear(16, 16), fc=nn.Linear(8, 5))


def rows(pool):
    return Way(lambda n, x: n.fc(pool(F.relu(n.fc0(x[:, 0]))).flatten(1)), fc0=nn.Linear(4, 4), fc=nn.Linear(4, 5))


def turned(padding, **size):
    return Way(lambda n, x: n.fc(F.relu(n.up(F.relu(n.down(x)), **size)).flatten(1)),
               down=nn.Conv2d(1, 2, 3, stride=2, padding=1), fc=nn.Linear(32, 5),
               up=nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, output_padding=padding))


@pytest.mark.parametrize('one, same', [
    (lambda: voting(nn.AvgPool1d(2)), lambda: voting(lambda x: F.avg_pool1d(x.unsqueeze(1), 2).squeeze(1))),
    (lambda: rows(nn.AvgPool2d(2)), lambda: rows(lambda x: F.avg_pool2d(x.unsqueeze(1), 2).squeeze(1))),
    (lambda: turned(0, output_size=(4, 4)), lambda: turned(1)),
    (lambda: Way(lambda n, x: F.relu(n.fc0(x.flatten(1))) @ n.fc.weight, fc0=nn.Linear(16, 16), fc=nn.Linear(5, 16)),
     lambda: Way(lambda n, x: F.linear(F.relu(n.fc0(x.flatten(1))), n.fc.weight.T), fc0=nn.Linear(16, 16),
                 fc=nn.Linear(5, 16)))])
def test_other_spellings_count_alike(one, same):
    counts = []
    for make in (one, same):
        model = self_models.spiking(make(), 2, default_threshold=0.5, delay=0).eval()
        _, connections = counted(model, torch.ones(1, 1, 4, 4))
        counts.append([{**row, 'name': ''}
                       for row in numbers.operation_numbers(connections.values(), 1)['connections']])
    assert counts[0] == counts[1] and all(row['ann_macs'] > 0 for row in counts[0])


def test_a_product_with_a_stack_of_matrices_by_hand():
    stack = Way(lambda n, x: n.fc((F.relu(n.fc0(x.flatten(1))).unflatten(1, (4, 1, 4)) @ n.w).flatten(1)),
                fc0=nn.Linear(16, 16), fc=nn.Linear(12, 5))
    stack.w = nn.Parameter(torch.ones(4, 4, 3))
    model = self_models.spiking(stack, 2, default_threshold=0.5, delay=0).eval()
    _, connections = counted(model, torch.ones(1, 1, 4, 4))
    row = numbers.operation_numbers(connections.values(), 1)['connections'][1]
    # four groups of four neurons, each to the three of its group; all spike at both steps
    assert row['kind'] == 'linear' and row['ann_macs'] == row['ann_macs_with_padding'] == 4 * 4 * 3
    assert row['synaptic_operations'] == 2 * 4 * 4 * 3


def test_the_image_itself_at_neurons_by_hand():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 1, 1, bias=False), nn.Linear(4, 5, bias=False)

        def forward(self, x):
            return self.fc(F.relu(self.conv(x) + x).flatten(1))

    model = self_models.spiking(Direct(), 3, default_threshold=0.5, delay=0, encoding='direct').eval()
    with torch.no_grad():
        model.conv.weight.fill_(1)
    layers, connections = counted(model, torch.ones(1, 1, 2, 2))  # each of the 4 neurons fires at each of the 3 steps
    found = numbers.operation_numbers(connections.values(), 1)
    # 4 products and 4 additions of the image, once or at each step; 4 * 3 spikes, each with 5 connections
    assert [(row['name'], row['macs'], row['bias_additions'], row['bias_additions_every_step'],
             row['synaptic_operations'], row['input_spikes_per_neuron']) for row in found['connections']] == [
        ('conv', 4, 0, 0, 0, None), ('relu.identity', 0, 4, 12, 0, None), ('fc', 0, 0, 0, 60, 3)]
    assert found['energy_uj']['snn_exact'] == pytest.approx((4 * 4.6 + 64 * 0.9) / 1e6)
    assert found['energy_uj']['snn_exact_every_step'] == pytest.approx((12 * 4.6 + 72 * 0.9) / 1e6)
    assert found['energy_uj']['ann'] == pytest.approx(((4 + 20) * 4.6 + 4 * 0.9) / 1e6)


class Cut(nn.Module):
    """For images (1, 2, 2), each row of which becomes a sample, with a padding that is no 0; all weights are 1."""

    def __init__(self):
        super().__init__()
        self.sub, self.conv, self.fc = nn.Identity(), nn.Conv2d(1, 1, 1, bias=False), nn.Linear(8, 5, bias=False)
        for p in self.parameters():
            nn.init.ones_(p)

    def forward(self, x):
        return self.fc(F.relu(self.conv(F.pad(self.sub(x).view(-1, 1, 1, 2), (1, 1), value=-1.0))).view(-1, 8))


def test_a_network_that_cuts_an_image_into_samples_by_hand():
    model = self_models.spiking(Cut(), 2, default_threshold=0.5, delay=0).eval()
    layers, connections = counted(model, torch.ones(1, 1, 2, 2))  # every pixel spikes at each of the two steps
    # 4 neurons of a pixel each fire at both steps; the 4 of the padding, -1, never do
    assert [(layer.neurons, layer.spikes.tolist()) for layer in layers] == [(4, [4, 4]), (8, [4, 4])]
    rows = {row['name']: row for row in numbers.operation_numbers(connections.values(), 1)['connections']}
    assert [row['synaptic_operations'] for row in rows.values()] == [2 * 4, 2 * 4 * 5]
    assert [row['ann_macs'] for row in rows.values()] == [4, 8 * 5]
    assert [row['ann_macs_with_padding'] for row in rows.values()] == [8, 8 * 5]


@pytest.mark.parametrize('pool, shape, want', [
    (nn.AvgPool2d(2), (3, 4), [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]),
    (nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), (3, 3), [[1, 2, 1], [2, 4, 2], [1, 2, 1]]),
    (nn.AvgPool2d(2, ceil_mode=True), (3, 2), [[1, 1], [1, 1], [1, 1]]),
    (nn.AdaptiveAvgPool2d((2, 1)), (3, 2), [[1, 1], [2, 2], [1, 1]]),
    (nn.AdaptiveAvgPool2d(2), (3, 3), [[1, 2, 1], [2, 4, 2], [1, 2, 1]]),  # windows that overlap
    (nn.AvgPool1d(3, 1), (5,), [1, 2, 3, 2, 1]),
    (nn.Upsample(scale_factor=2), (1, 2), [[4, 4]]), (nn.AvgPool3d((2, 1, 1)), (2, 1, 1), [[[1]], [[1]]])])
def test_how_many_outputs_of_a_pool_a_pixel_comes_to(pool, shape, want):
    one_each = torch.eye(math.prod(shape)).view(-1, 1, *shape)
    assert add_up(pool, one_each).flatten(1).sum(1).view(shape).tolist() == want


@pytest.mark.parametrize('synapse', [
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    nn.Conv2d(4, 2, 3, padding='same', padding_mode='circular'), nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1),
    nn.Linear(6, 3)])
def test_connections_of_a_synapse_by_brute_force(synapse):
    shape, weight = (4, 5, 6), synapse.weight
    one_each = torch.eye(math.prod(shape)).view(-1, *shape)
    with torch.no_grad():
        weight.fill_(1)
        reached = synapse(one_each) != synapse(torch.zeros(1, *shape))
    assert torch.equal(ones_through(synapse, one_each).flatten(1).sum(1), reached.flatten(1).sum(1).float())


@own_warnings_are_errors
@pytest.mark.parametrize('encoding', ['direct', 'poisson'])
def test_reports_of_a_network_of_ones_own(encoding, in_an_empty_folder):
    Path('own.py').write_text("""
from torch import nn
def net(labels):
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, labels))
""")
    run(snn, '-a', 'own.py:net', '--dataset', 'DIGITS', '--train_samples', 40, '--test_samples', 30, '--no-gpu',
        '--timesteps', 4, '--default_threshold', 0.2, '--encoding', encoding, '--epochs', 1, '--report', 'r')
    got = read('r')
    assert len(got['figures']) == 5 and all(Path('r', name).exists() for name in got['figures'])
    assert [layer['name'] for layer in got['layers']] == ['input', '2', '6'] and got['latency'] == 2
    assert [row['name'] for row in got['operations']['connections']] == ['0', '5', '7']
    assert (got['operations']['total']['macs'] > 0) == (encoding == 'direct')


# -- runs -------------------------------------------------------------------------------------------------------------

def read(folder):
    def no_json(text):
        raise AssertionError(f'{text} is not JSON')
    return json.loads(Path(folder, 'report.json').read_text(), parse_constant=no_json)


def test_a_report_may_lie_in_the_folder_of_the_runs_own_name(in_an_empty_folder):
    pytest.importorskip('tensorboard')
    for flags in ([], ['--tensorboard'], []):
        run(snn, *FLAGS, '--epochs', 1, '--name', 'mine', '--report', 'logs/snn/mine', *flags)
        assert {path.name for path in Path('logs/snn/mine').iterdir()} >= {'report.json', 'accuracy.png'}


def test_reports_of_a_run_and_of_its_best_epoch_agree(in_an_empty_folder, capsys):
    run(snn, *FLAGS, '--epochs', 2, '--name', 'mine', '--alpha', 0.5, '--report', 'a/b')
    capsys.readouterr()
    before = Path('trained_models/snn/mine.pth').read_bytes()
    run(snn, *SMALL, '--test_only', '--pretrained_snn', 'trained_models/snn/mine.pth', '--report', 'c')
    accuracy = capsys.readouterr().out.split('loaded SNN: test accuracy ')[1].split(' ')[0]
    assert Path('trained_models/snn/mine.pth').read_bytes() == before
    trained, tested = read('a/b'), read('c')
    for key in ('layers', 'surrogate', 'operations', 'accuracy', 'training'):
        assert trained[key] == tested[key], key
    assert tested['accuracy']['time_steps'] == list(range(1, 10))
    assert f'{tested["accuracy"]["accuracy"][-1]:.2%}' == accuracy
    assert tested['test_images'] == 30 and tested['surrogate']['alpha'] == 0.5  # the training's, not the default
    assert [row['epoch'] for row in tested['training']] == [1, 2]
    assert [layer['threshold'] for layer in tested['layers']] == [None] + [0.2] * 7
    assert tested['surrogate']['total'] == 30 * 4 * sum(layer['neurons'] for layer in tested['layers'][1:])
    for name in ('accuracy', 'activity', 'surrogate', 'operations', 'training'):
        assert f'{name}.png' in tested['figures'] and Path('c', f'{name}.png').read_bytes().startswith(b'\x89PNG')


@own_warnings_are_errors  # matplotlib's
@pytest.mark.parametrize('activation', ['STDB', 'Linear'])
@pytest.mark.parametrize('architecture, more, threshold, shade', [  # shade 0: not even the input spikes
    ('RESNET6', 1, 0.5, 1), ('VGG5', 2, 0.5, 1), ('RESNET6', 3, 0.5, 0), ('VGG5', 5, 3e38, 1),
    ('RESNET6', 2, 2e-38, 1)])
def test_every_network_that_runs_is_drawn(architecture, activation, more, threshold, shade):
    depth = 5  # of both
    model = filled(architecture, activation=activation, timesteps=depth + more, default_threshold=threshold)
    assert setup.too_few_steps(model) is None
    layers, connections = counted(model, shade * ternary((3, 1, 8, 8), 5, 1.25).float())
    found = numbers.summary(model, layers, list(connections.values()), 3)
    spikes = sum(layer['spikes_per_neuron'] for layer in found['layers'][1:])
    assert (spikes > 0) == (shade == 1 and threshold < 1)
    about = {'timesteps': model.timesteps, 'latency': model.output_delay, 'test_images': 3, **found,
             'accuracy': {'time_steps': [depth + more], 'accuracy': [0.0], 'ann': None}}
    found['layers'][-1]['name'] = found['operations']['connections'][-1]['name'] = '$^$'  # as a module may be called
    surrogate = plots.draw_surrogate(about)
    # the others do not depend on the surrogate
    others = [plots.draw_activity(about), plots.draw_operations(about)] if activation == 'STDB' else []
    for figure in [surrogate, *others]:
        figure.savefig(io.BytesIO())
    bottom = surrogate.axes[1]
    assert bottom.get_yscale() == ('log' if any(found['surrogate']['count']) else 'linear')
    assert [bar.get_height() for bar in bottom.patches] == pytest.approx(
        [100 * count / found['surrogate']['total'] for count in found['surrogate']['count']])


@own_warnings_are_errors
def test_a_run_of_the_fewest_steps_ends_in_its_report(in_an_empty_folder):
    run(snn, *FLAGS, '--timesteps', 6, '--epochs', 1, '--report', 'r')
    got = read('r')
    assert (got['surrogate']['count'], got['surrogate']['never_share']) == ([], 1.0)  # one step has no earlier one
    assert len(got['figures']) == 5 and all(Path('r', name).exists() for name in got['figures'])


def test_the_figures_draw_the_numbers_of_the_json(in_an_empty_folder):
    run(snn, *FLAGS, '--test_only', '--activation', 'Linear', '--report', '.')
    got = read('.')
    assert got['training'] is None and 'training.png' not in got['figures']
    for of_channels in (False, True):
        label = plots.draw_activity({**got, 'in_units_of_bounds': of_channels}).axes[2].get_xlabel()
        assert ('bounds of channels' in label) == of_channels
    numbers = got['surrogate']
    assert sum(numbers['count']) + numbers['below'] + numbers['above'] == numbers['total']
    assert max(numbers['gradient_at_edges']) == 0.3
    line = plots.draw_accuracy(got).axes[0].lines[0]
    assert line.get_ydata() == pytest.approx([100 * value for value in got['accuracy']['accuracy']])
    bars = plots.draw_operations(got).axes[0].containers[1]
    assert [bar.get_width() for bar in bars] == [row['synaptic_operations'] for row in got['operations']['connections']]
    energy = plots.draw_operations(got).axes[1].containers[0]
    assert [bar.get_height() for bar in energy] == [got['operations']['energy_uj'][key] for key in (
        'ann', 'snn_exact', 'snn_estimate')]


def test_what_stands_in_the_way_is_said_before_the_evaluation(in_an_empty_folder, monkeypatch):
    flags = [*FLAGS, '--test_only', '--report']

    def evaluated(*_):
        raise AssertionError('came to the evaluation')

    monkeypatch.setattr(engine, 'test_over_time', evaluated)
    Path('file').write_text('in the way')
    fails(snn, 'file: cannot write there', *flags, 'file')
    fails(snn, 'no spike reaches the output in fewer than 6,', *flags, 'folder', '--timesteps', 5)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    fails(snn, 'pip install matplotlib', *flags, 'folder')
    assert not Path('folder').exists()


def test_training_curves_are_those_of_the_checkpoint():
    own, other = [{'epoch': 1, 'n': 1}, {'epoch': 2, 'n': 2}], [{'epoch': 1, 'n': 3}, {'epoch': 2, 'n': 4}]
    longer = [*own, {'epoch': 3, 'n': 5}]
    for later, want in ((None, own), ([], own), (other, own), (own[:1], own), (longer, longer)):
        assert numbers.training_rows('a.pth', own, later) == (want, f'training curves: {len(want)} epochs')
    for checkpoint, history, said in ((None, None, 'not trained here'), ('a.pth', None, 'a.pth says nothing'),
                                      ('a.pth', [], 'a.pth says nothing')):
        rows, line = numbers.training_rows(checkpoint, history)
        assert rows is None and said in line
    for odd in ([{'epoch': 1, 'test_loss': None}], [{'epoch': '1'}], [{'epoch': 1, 'test_loss': math.nan}], [['epoch']],
                ['epoch'], 'epoch', 3, {'epoch': 1}, [{'n': 1}], [{'epoch': 10 ** 400}], [{'epoch': torch.ones(2)}]):
        rows, line = numbers.training_rows('a.pth', odd)
        assert rows is None and 'cannot be read' in line and '\n' not in line, odd


def test_a_report_has_nothing_of_another_run_or_report(in_an_empty_folder, monkeypatch):
    losses, written = iter(range(1, 100)), report.write

    def test_over_time(*_):  # whose first epoch is the best, and whose losses are its own
        return engine.Metrics(float(next(losses)), 0.5), [0.5] * 9

    with monkeypatch.context() as patch:
        patch.setattr(engine, 'test_over_time', test_over_time)
        for name, epochs in (('a', 2), ('b', 3)):
            run(snn, *FLAGS, '--test_samples', 5, '--name', name, '--epochs', epochs)
    Path('other').mkdir()
    shutil.copy('trained_models/snn/a.pth', 'other/b.pth')  # named as the other run

    def curves(path):
        shown = []
        monkeypatch.setattr(report, 'write', lambda model, data, run, known: shown.extend(
            numbers.training_rows(known.checkpoint, known.history, known.later)[0]))
        run(snn, *SMALL, '--test_samples', 5, '--test_only', '--pretrained_snn', path, '--report', 'r')
        return [row['test_loss'] for row in shown]

    assert curves('trained_models/snn/a.pth') == curves('trained_models/snn/a.last.pth') == [1, 2]
    assert curves('trained_models/snn/b.pth') == [3, 4, 5]
    shutil.copy('trained_models/snn/a.pth', 'trained_models/snn/a.folded.pth')
    assert curves('trained_models/snn/a.folded.pth') == [1, 2]
    assert curves('other/b.pth') == [1]  # its own, of the best epoch
    shutil.copy('trained_models/snn/b.last.pth', 'other/b.last.pth')
    assert curves('other/b.pth') == [1]
    Path('other/b.last.pth').write_bytes(b'damaged')
    assert curves('other/b.pth') == [1]
    state = torch.load('other/b.pth', weights_only=True)
    del state['history']
    torch.save(state, 'other/b.pth')
    monkeypatch.setattr(report, 'write', written)
    for name in ('mine', 'training'):
        Path('r', f'{name}.png').touch()
    run(snn, *SMALL, '--test_samples', 5, '--test_only', '--pretrained_snn', 'other/b.pth', '--report', 'r')
    assert {path.name for path in Path('r').glob('*.png')} == {*read('r')['figures'], 'mine.png'}
    assert read('r')['training'] is None and not Path('r/training.png').exists()


@pytest.mark.parametrize('architecture, delay, activation, steps', [
    ('VGG5', 0, 'STDB', 1), ('VGG5', 0, 'Linear', 4), ('RESNET6', 0, 'STDB', 4), ('RESNET6', 1, 'Linear', 8)])
@own_warnings_are_errors
def test_direct_input_costs_macs_once_an_image_and_a_bias_an_addition(architecture, delay, activation, steps):
    model = filled(architecture, timesteps=steps, activation=activation, encoding='direct', delay=delay,
                   initial_potential=0.5, bias=True).double()
    layers, connections = counted(model, ternary((3, 1, 8, 8), 5, low=0))
    found = numbers.summary(model, layers, list(connections.values()), 3)
    first, *others = found['operations']['connections']
    assert first['macs'] == first['ann_macs'] == 64 * 22 * 22  # of 3x3 weights, 22 = 3 * 8 - 2 reach each row's pixels
    assert first['macs_every_step'] == first['macs'] * first['steps'] and first['synaptic_operations'] == 0
    assert all(row['macs'] == 0 for row in others)
    assert first['bias_additions'] == 64 * 8 * 8 and first['bias_additions_every_step'] == 64 * 8 * 8 * first['steps']
    assert others[-1]['bias_additions'] == 10 * steps
    assert found['layers'][0]['firing_rate'] is None and found['layers'][1]['firing_rate'] is not None
