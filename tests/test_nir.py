"""The NIR file: read back and run as its metadata says, and taken by other tools.

Needs the package nir; the tests of importers need snntorch, or spikingjelly, and nirtorch, and are left out elsewhere.
"""
import contextlib
import copy
import graphlib
import io
import math
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import snn
import step_by_step
from conftest import digits, fails, fill, load, network, run, same, ternary
from experiment import UserError, engine, nir_export
from self_models import QCFS, VGG, ResNet, convert, quantize, spiking

nir = pytest.importorskip('nir')

THRESHOLD = 1 + 2 ** -10  # no potential of `dyadic` weights equals it: importers differ in whether they fire there
DIGITS = (1, 8, 8)


@pytest.fixture(autouse=True)
def few_neurons(monkeypatch):
    """VGGs are made quicker with few neurons in their linear layers."""
    monkeypatch.setattr('self_models.layers.VGG_HIDDEN', 64)


def dyadic(model, mean):
    """float64 weights that are multiples of 1/32, so that sums are exact, whatever their order; eval mode."""
    for i, (_, p) in enumerate(sorted(model.named_parameters())):
        draw = np.random.RandomState(i).standard_normal(tuple(p.shape)) + mean
        p.data = torch.from_numpy(np.round(32 * draw * math.sqrt(2 / np.prod(p.shape[1:]))) / 32)
    if hasattr(model, 'thresholds'):
        model.threshold_update(1.0, [THRESHOLD] * len(model.thresholds))
    return model.eval()


def vgg(leak=1.0, timesteps=9, bias=False, **options):
    """A VGG5 with few channels."""
    def conv(inputs, outputs):
        return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)

    model = network('VGG5', dataset='DIGITS', timesteps=timesteps, leak=leak, bias=bias, **options)
    model.features = nn.Sequential(
        conv(1, 4), nn.ReLU(), nn.AvgPool2d(2), conv(4, 6), nn.ReLU(), nn.Dropout(), conv(6, 8), nn.ReLU(),
        nn.AvgPool2d(2))
    model.classifier = nn.Sequential(
        nn.Linear(32, 16, bias=bias), nn.ReLU(), nn.Dropout(), nn.Linear(16, 12, bias=bias), nn.ReLU(), nn.Dropout(),
        nn.Linear(12, 10, bias=bias))
    return dyadic(model, 0.5)


def resnet(leak=1.0, timesteps=9, **options):
    model = network('RESNET6', dataset='DIGITS', timesteps=timesteps, leak=leak, **options)
    for module in model.modules():
        if hasattr(module, 'factor'):
            module.factor = torch.tensor(0.75, dtype=torch.float64)
    return dyadic(model, 0.05)


SAME_STEP = {'encoding': 'direct', 'delay': 0, 'initial_potential': 0.5, 'bias': True}


def written(model, folder, **about):
    path = folder / 'snn.nir'
    nir_export.export(model, DIGITS, path, **about)
    return nir.read(path)


def images(count=3):
    return ternary((count, *DIGITS), scale=1.25).double()  # 1.25: at rate 0.9, too, the encoder passes it on


def spikes_of(model, x):
    """{name of the layer: its spikes (T, B, ...)}, step by step."""
    with torch.no_grad():
        _, history = step_by_step.run(model, x)
    trains = {name: torch.stack(train) for name, train in zip(model.layer_names, history, strict=True)}
    assert all(train.any() and not train[len(train) // 2:].all() for train in trains.values())
    return trains


# -- the file is enough -----------------------------------------------------------------------------------------------

def run_file(graph, x):
    """Logits (B, labels) of images x (B, C, H, W): nothing is known but the graph and the words of its metadata."""
    about = graph.metadata
    assert (about['reset'], about['output'][:13]) == ('subtract', 'the sum over ')
    assert about['fire_before_integrate'] == (about['delay'] == 1)
    before = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    order = list(graphlib.TopologicalSorter(before).static_order())
    potentials, logits = {}, 0
    for _ in range(about['timesteps']):
        given = {}
        for name in order:
            node = graph.nodes[name]
            value = {key: torch.as_tensor(array) for key, array in vars(node).items() if isinstance(array, np.ndarray)}
            source = sum(given[a] for a in before[name])
            if isinstance(node, nir.Input):
                given[name] = x if about['input_encoding'].startswith('direct') else torch.where(
                    torch.rand_like(x) <= about['input_rate'] * x.abs(), x.sign(), 0)
            elif isinstance(node, nir.Conv2d):
                assert node.groups == 1
                given[name] = F.conv2d(source, value['weight'], value['bias'], tuple(node.stride), tuple(node.padding),
                                       tuple(node.dilation))
            elif isinstance(node, nir.Conv1d):
                given[name] = F.conv1d(source, value['weight'], value['bias'], node.stride, node.padding, node.dilation)
            elif isinstance(node, (nir.Linear, nir.Affine)):
                given[name] = F.linear(source, value['weight'], value.get('bias'))
            elif isinstance(node, nir.AvgPool2d):
                given[name] = F.avg_pool2d(source, tuple(node.kernel_size), tuple(node.stride), tuple(node.padding))
            elif isinstance(node, nir.Flatten):
                given[name] = source.flatten(1 + node.start_dim, node.end_dim)  # of the shape without batch
            elif isinstance(node, (nir.IF, nir.LIF)):
                begin = about['initial_potential'] * value['v_threshold']
                u = potentials.get(name, torch.zeros_like(source) + begin)
                assert source.shape[1:] == value['v_threshold'].shape
                change = value['r'] * source
                if isinstance(node, nir.LIF):
                    change = (value['v_leak'] - u + change) / value['tau']
                after = u + about['dt'] * change
                fires_on = u if about['fire_before_integrate'] else after
                given[name] = (fires_on > value['v_threshold']).to(u.dtype)
                potentials[name] = after - value['v_threshold'] * given[name]
            else:
                assert isinstance(node, nir.Output)
                logits = logits + source
    return logits


@pytest.mark.parametrize('build', [vgg, resnet])
@pytest.mark.parametrize('leak', [1.0, 0.75])
def test_the_file_run_as_its_metadata_says_is_the_network(build, leak, tmp_path):
    model, x = build(leak), images()
    spikes_of(model, x)
    logits = model(x)
    assert logits.any() and torch.equal(run_file(written(model, tmp_path), x), logits)


@pytest.mark.parametrize('build', [vgg, resnet])
@pytest.mark.parametrize('leak', [1.0, 0.75])
def test_direct_input_no_delay_and_biases_are_in_the_file_too(build, leak, tmp_path):
    model, x = build(leak, timesteps=4, **SAME_STEP), images()
    logits = model(x)
    assert logits.any() and torch.equal(run_file(written(model, tmp_path), x), logits)
    said = nir_export.export(model, DIGITS, tmp_path / 'snn.nir')
    assert 'begins at 0.5 of the threshold' in said and 'fires before' not in said


def test_each_layers_own_leak_is_in_the_file(tmp_path):
    model, x = vgg(timesteps=4, **SAME_STEP), images()
    model.leak_update([1.0, 0.5, 0.75, 1.0, 0.25])
    assert torch.allclose(run_file(written(model, tmp_path), x), model(x), rtol=1e-9)


def test_a_leak_that_binary_numbers_only_come_near(tmp_path):
    model, x = vgg(0.99), images()
    assert torch.allclose(run_file(written(model, tmp_path), x), model(x), rtol=1e-9)


def test_weights_keep_their_precision(tmp_path):
    graph = written(vgg().float(), tmp_path)
    assert graph.nodes['features.0'].weight.dtype == graph.nodes['classifier.0'].weight.dtype == np.float32


@pytest.mark.parametrize('build', [vgg, resnet])
@pytest.mark.parametrize('leak', [1.0, 0.75])
def test_what_is_read_back(build, leak, tmp_path):
    model = build(leak)
    model.threshold_update(1.0, [0.5 + i for i in range(len(model.thresholds))])
    graph = written(model, tmp_path, dataset='DIGITS')
    about = graph.metadata
    assert (about['timesteps'], about['leak'], about['reset']) == (9, leak, 'subtract')
    assert (about['fire_before_integrate'], about['delay'], about['dataset']) == (True, 1, 'DIGITS')
    assert about['input_rate'] == (1.0 if build is vgg else 0.9) and 'signed Poisson' in about['input_encoding']
    assert 'no leak, no spike' in about['output']

    weights = dict(model.named_parameters())
    with_weights = {name for name, node in graph.nodes.items() if isinstance(node, (nir.Conv2d, nir.Linear))}
    assert {f'{name}.weight' for name in with_weights} == weights.keys()
    for name in with_weights:
        assert np.array_equal(graph.nodes[name].weight, weights[f'{name}.weight'].detach())
        assert not np.any(getattr(graph.nodes[name], 'bias', 0))

    neurons = {name: node for name, node in graph.nodes.items() if isinstance(node, (nir.IF, nir.LIF))}
    assert neurons.keys() == {f'{name}.neuron' for name in model.layer_names}
    for name, threshold in zip(model.layer_names, model.thresholds.tolist(), strict=True):
        node = neurons[f'{name}.neuron']
        assert node.metadata == {'threshold': threshold, 'leak': leak, 'reset': 'subtract'}
        assert np.all(node.v_threshold == threshold) and not node.v_reset.any()
        if leak == 1:
            assert type(node) is nir.IF and np.all(node.r * about['dt'] == 1)
        else:  # of v + dt / tau (v_leak - v + r I), what is left of v and of I
            assert type(node) is nir.LIF and not node.v_leak.any()
            assert 1 - about['dt'] / node.tau == pytest.approx(leak, rel=1e-15)
            assert about['dt'] / node.tau * node.r == pytest.approx(1, rel=1e-15)


@pytest.mark.parametrize('build', [vgg, resnet])
def test_every_node_lies_on_a_way_from_input_to_output(build, tmp_path):
    graph = written(build(), tmp_path)

    def reached(start, edges):
        seen, new = set(), {start}
        while new:
            seen |= new
            new = {b for a, b in edges if a in seen} - seen
        return seen

    assert reached('input', graph.edges) == graph.nodes.keys()
    assert reached('output', [(b, a) for a, b in graph.edges]) == graph.nodes.keys()
    sources = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    adds = {name: set(before) for name, before in sources.items() if len(before) > 1}
    assert adds == ({} if build is vgg else {
        'layer1.0.residual.3.neuron': {'layer1.0.residual.3', 'pre_process.8'},  # the identity has no weights
        'layer2.0.residual.3.neuron': {'layer2.0.residual.3', 'layer2.0.identity.0'}})


@pytest.mark.parametrize('size', [(224, 224), (232, 240)])
def test_the_last_pool_of_large_images(size):
    model = network('RESNET12', labels=3, input_shape=(3, *size))
    graph = nir_export.to_graph(model, (3, *size))
    node, (before,) = graph.nodes['final_pool'], [a for a, b in graph.edges if b == 'final_pool']
    x = torch.rand(1, *graph.nodes[before].output_type['output'])
    pooled = F.avg_pool2d(x, node.kernel_size.tolist(), node.stride.tolist())
    assert torch.allclose(pooled, model.final_pool(x)) and pooled.shape[2:] == (2, 2)


# -- networks of one's own --------------------------------------------------------------------------------------------

class Own(nn.Module):
    """What NIR knows: batch norm behind a convolution, a linear layer, neurons and a sum; adds, one with a factor;
    channels side by side; groups, dilation, unequal sides; pools with padding, over all, and of functions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.grouped = nn.Conv2d(4, 6, (5, 3), stride=(1, 2), padding=(2, 0), dilation=(1, 2), groups=2)
        self.pool, self.norm, self.inner = nn.AvgPool2d(3, 2, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.mixed = nn.Conv2d(8, 3, 3, padding='same', bias=False)
        self.tail = nn.Sequential(nn.Flatten(), nn.Linear(6 * 8 * 2 + 3 + 4, 8), nn.BatchNorm1d(8), nn.ReLU(),
                                  nn.Dropout(), nn.Linear(8, 10))

    def forward(self, x):
        a = self.first(x)
        b = F.relu(sum([self.norm(a), self.inner(a)]) - a / 4)
        c = F.relu(self.mixed(torch.cat([F.avg_pool2d(a, 2), self.pool(b) + self.pool(b)], dim=-3)))
        d = F.relu(self.grouped(2 * a + b))
        return self.tail(torch.cat([d.flatten(1), c.mean((2, 3)), F.adaptive_avg_pool2d(b, 1).view(x.size(0), -1)], 1))


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.way = nn.Sequential(nn.Conv1d(1, 4, 5, stride=3), nn.ReLU(), nn.Conv1d(4, 4, 3, groups=4),
                                 nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))

    def forward(self, x):
        return self.way(x.flatten(2))


class Named(nn.Module):
    """Modules with names that torch, or a second call of another one, may have, too."""

    def __init__(self):
        super().__init__()
        self.squeeze, self.sub, self.mean = nn.Conv2d(1, 4, 3, padding=1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.add, self.fc_1, self.fc, self.last = nn.Conv2d(4, 4, 1), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.sub(F.relu(self.squeeze(x)))
        x = self.mean(torch.cat(tensors=[x, F.relu(self.add(x))], axis=1)).flatten(1)
        return self.last(F.relu(self.fc(F.relu(self.fc_1(x)))))


def own(build=Own, channels=False, **options):
    """The spiking network of one's own in float64, its batch norms as training leaves them, eval mode."""
    ann = fill(build(), 1).double()
    draw = torch.Generator().manual_seed(0)
    for module in ann.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.2, 0.2, generator=draw)
            module.running_var.uniform_(0.3, 2.0, generator=draw)
    if channels:
        ann = quantize(ann, channels=True)
        for module in ann.modules():
            if isinstance(module, QCFS):
                module.bound.data.uniform_(0.3, 1.3, generator=draw)
    model = spiking(ann, 6, **options)
    if not channels:
        model.threshold_update(1.0, [0.3 + 0.1 * i for i in range(len(model.layer_names))])
    return model.double().eval()


@pytest.mark.parametrize('build', [Own, Line, Named])
@pytest.mark.parametrize('options', [
    {'encoding': 'direct', 'delay': 0}, {'leak': 0.9, 'initial_potential': 0.25}, {'channels': True}])
def test_the_file_of_a_network_of_ones_own_is_the_network(build, options, tmp_path):
    model, x = own(build, **options), images()
    logits = model(x)
    assert all(record.spikes.any() and not record.spikes.all() for record in model.record(x))
    assert torch.allclose(run_file(written(model, tmp_path), x), logits, rtol=1e-9)


def test_thresholds_and_batch_norm_are_in_the_weights_by_hand(tmp_path):
    ann = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0), nn.ReLU(), nn.Conv2d(1, 1, 1, bias=False),
                        nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    for number, p in enumerate(ann.parameters()):
        nn.init.constant_(p, 1 + number)  # of the convolution weight 1, bias 2, of batch norm 3 and 4; 5; 6 and 7
    ann[1].running_mean.fill_(1.5)
    ann[1].running_var.fill_(4)
    model = spiking(ann.eval(), 3, encoding='direct')
    model.threshold_update(1.0, [0.5, 0.25])
    graph = nir_export.to_graph(model, (1, 2, 2))
    assert [*graph.nodes] == ['input', '0', '2.neuron', '3', '4.neuron', '5', '6', 'output']
    # 3 (w x + 2 - 1.5) / 2 + 4
    assert (graph.nodes['0'].weight.item(), graph.nodes['0'].bias.item()) == (1.5, 4.75)
    assert graph.nodes['3'].weight.item() == 5 * 0.5 and graph.nodes['6'].weight.tolist() == [[6 * 0.25] * 4] * 2
    assert np.all(graph.nodes['2.neuron'].v_threshold == 0.5) and graph.nodes['6'].bias.tolist() == [7, 7]


def test_exporting_leaves_the_network_as_it_is():
    model = own(encoding='direct')
    model.train()
    model.get_submodule('norm').eval()  # as one frozen
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    nir_export.to_graph(model, DIGITS)
    assert same(model.state_dict(), before) and torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in model.modules()] and not all(modes)


@pytest.mark.parametrize('module, words', [
    (nn.MaxPool2d(2), '2: NIR does not know MaxPool2d: put nn.AvgPool2d in its place'),
    (nn.Conv2d(2, 2, 3, padding=1, padding_mode='circular'), '2: NIR does not know Conv2d with this padding'),
    (nn.Conv2d(2, 2, 2, padding='same'), '2: NIR does not know Conv2d with this padding'),
    (nn.Conv2d(2, 2, (2, 3)), '2: NIR does not know Conv2d of this kernel'),
    (nn.ConvTranspose2d(2, 2, 2), '2: NIR does not know ConvTranspose2d'),
    (nn.AvgPool2d(3, ceil_mode=True), '2: NIR does not know AvgPool2d with ceil_mode'),
    (nn.AvgPool2d(2, divisor_override=3), '2: NIR does not know AvgPool2d with these windows'),
    (nn.AdaptiveAvgPool2d(3), '2: NIR does not know AdaptiveAvgPool2d with these windows'),
    (nn.PixelShuffle(1), '2: NIR does not know PixelShuffle'), (nn.ZeroPad2d(1), '2: NIR does not know ZeroPad2d'),
    (nn.Linear(8, 8), '2: NIR does not know Linear of more than features: flatten before it')])
def test_what_nir_does_not_know_is_refused_by_name(module, words):
    ann = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), module, nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    ann(torch.zeros(1, *DIGITS))
    with warnings.catch_warnings(), pytest.raises(UserError, match=f'^--export_nir: {re.escape(words)}') as caught:
        warnings.simplefilter('ignore')
        nir_export.to_graph(spiking(ann, 2), DIGITS)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('call, words', [
    (lambda x: x[:, :1], 'getitem()'), (lambda x: x.chunk(2, 1)[0], 'chunk()'), (lambda x: x + 1, 'add()'),
    (lambda x: x.permute(0, 1, 3, 2), 'permute()'), (lambda x: x.view(x.size(0), 4, 4, 8), 'view() but to flatten'),
    (lambda x: F.pad(x, (1, 1)), 'pad()'), (lambda x: F.conv2d(x, torch.ones(2, 2, 1, 1)), 'conv2d()'),
    (lambda x: torch.add(x, x, alpha=2), 'add()'), (lambda x: torch.add(input=x, other=x), 'add()'),
    (lambda x: x.mean(2), 'mean()'), (lambda x: torch.cat([x, x], 2), 'cat()'),
    (lambda x: x * torch.ones(2, 1, 1), 'mul()'), (lambda x: x + torch.ones(2, 8, 8).to(x), 'add()')])
def test_functions_that_nir_does_not_know_are_refused_too(call, words):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 2, 3, padding=1), nn.LazyLinear(10)

        def forward(self, x):
            return self.last(torch.flatten(F.relu(call(F.relu(self.first(x)))), 1))

    ann = Net()
    ann(torch.zeros(1, *DIGITS))
    with pytest.raises(UserError, match=f'^--export_nir: the network: NIR does not know {re.escape(words)}'):
        nir_export.to_graph(spiking(ann, 2), DIGITS)


# -- other tools ------------------------------------------------------------------------------------------------------
# They integrate, then fire, so that they spike a step earlier at each layer. What else they do differently is set
# right by the lines below; that these suffice is asserted spike by spike.

class Delay(nn.Module):
    """A synapse whose current comes one step later."""

    def __init__(self, synapse):
        super().__init__()
        self.synapse, self.last = synapse, None

    def forward(self, x):
        now, self.last = self.last, self.synapse(x)
        return torch.zeros_like(self.last) if now is None else now


def spikingjelly(path, subtract=True):
    """The file as SpikingJelly imports it; subtract: with its reset set to this network's."""
    pytest.importorskip('nirtorch')
    exchange = pytest.importorskip('spikingjelly.activation_based.nir_exchange')
    net = exchange.import_from_nir(str(path), dt=float(nir.read(path).metadata['dt']))
    for module in net.modules():
        if subtract and hasattr(module, 'v_reset'):
            module.v_reset = None
    return net


def snntorch(path, subtract=True):
    """The file as snnTorch imports it; subtract: with its neurons replaced by this network's."""
    pytest.importorskip('nirtorch')
    library = pytest.importorskip('snntorch')
    from snntorch.import_nir import import_from_nir
    graph = nir.read(path)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        net = import_from_nir(graph)
    net.flatten = nn.Flatten()  # its own takes in the batch
    for name, node in graph.nodes.items():
        if subtract and name.endswith('.neuron'):
            threshold = float(node.v_threshold.flat[0])
            setattr(net, name.replace('.', '_'), library.Leaky(node.metadata['leak'], threshold, init_hidden=True))
    return net


def run_tool(net, model, x):
    """{name of the layer: its spikes (T, B, ...)}."""
    trains, state = {name: [] for name in model.layer_names}, None
    for name in model.layer_names:
        def keep(module, inputs, output, name=name):
            trains[name].append(output[0] if isinstance(output, tuple) else output)
        net.get_submodule(f'{name}.neuron'.replace('.', '_')).register_forward_hook(keep)
    with torch.no_grad():
        for _ in range(model.timesteps):
            _, state = net((x if model.encoding == 'direct' else x.sign()).float(), state)
    return {name: torch.stack(train).double() for name, train in trains.items()}


def start_potentials(net, tool, graph, count):
    """Set the potentials of `count` images to those that the network begins with, which NIR does not know."""
    for name, node in graph.nodes.items():
        if name.endswith('.neuron'):
            neuron = net.get_submodule(name.replace('.', '_'))
            start = torch.from_numpy(graph.metadata['initial_potential'] * node.v_threshold).float()
            if tool is spikingjelly:
                neuron.module.v = start.expand(count, *start.shape)
            else:
                neuron.mem = start.expand(count, *start.shape)


@pytest.mark.parametrize('tool, leak', [(spikingjelly, 1.0), (snntorch, 1.0), (snntorch, 0.5)])
def test_importers_spike_as_a_vgg_does(tool, leak, tmp_path):
    model, x = vgg(leak), images()
    written(model, tmp_path)
    ours, theirs = spikes_of(model, x), run_tool(tool(tmp_path / 'snn.nir'), model, x)
    for delay, name in enumerate(model.layer_names, 1):
        assert not ours[name][:delay].any()
        assert torch.equal(ours[name][delay:], theirs[name][:-delay]), name


@pytest.mark.parametrize('tool', [spikingjelly, snntorch])
def test_importers_spike_as_a_resnet_does_with_its_residuals_delayed(tool, tmp_path):
    """The second neurons of a block get the identity's spikes a step before those that went through the first."""
    model, x = resnet(), images(1)
    written(model, tmp_path)
    net = tool(tmp_path / 'snn.nir')
    for block in ('layer1_0', 'layer2_0'):
        setattr(net, f'{block}_residual_3', Delay(net.get_submodule(f'{block}_residual_3')))
    ours, theirs = spikes_of(model, x), run_tool(net, model, x)
    for delay, name in zip([1, 2, 3, 4, 4, 5, 5], model.layer_names, strict=True):
        assert torch.equal(ours[name][delay:], theirs[name][:-delay]), name


@pytest.mark.parametrize('tool', [spikingjelly, snntorch])
@pytest.mark.parametrize('build, options', [
    (vgg, {}), (vgg, {'bias': True}), (resnet, {}), (vgg, {'bias': True, 'initial_potential': 0.5})])
def test_importers_spike_as_a_network_without_delay_does_but_for_the_soft_reset(tool, build, options, tmp_path):
    model, x = build(timesteps=6, encoding='direct', delay=0, **options), images(1).sign()
    graph, net = written(model, tmp_path), tool(tmp_path / 'snn.nir')
    if model.initial_potential:
        start_potentials(net, tool, graph, len(x))
    theirs = run_tool(net, model, x)
    with torch.no_grad():
        _, history = step_by_step.run(model, x)
    for name, ours in zip(model.layer_names, history, strict=True):
        assert torch.stack(ours).any() and torch.equal(torch.stack(ours), theirs[name]), name


@pytest.mark.parametrize('tool, delay', [(spikingjelly, 0), (snntorch, 1)])
def test_importers_spike_as_layers_of_differing_leaks_do(tool, delay, tmp_path):
    """Of learned leaks some may be 1. SpikingJelly leaks on what is left after a spike, snnTorch on what was before."""
    model, x = vgg(delay=delay), images()
    model.leak_update([1.0, 0.75, 0.875, 1.0, 0.9375])
    model.threshold_update(2.0, [THRESHOLD] * 5)
    graph = written(model, tmp_path)
    kinds = {type(graph.nodes[f'{name}.neuron']) for name in model.layer_names}
    assert graph.metadata['dt'] == 1e-4 and kinds == {nir.LIF}
    ours, theirs = spikes_of(model, x), run_tool(tool(tmp_path / 'snn.nir'), model, x)
    for i, name in enumerate(model.layer_names, 1):
        shift = delay * i
        assert torch.equal(ours[name][shift:], theirs[name][:len(theirs[name]) - shift]), name


def quantized(kind, architecture, timesteps):
    """The spiking network of an ANN with QCFS and batch norm, in float64.

    Its numbers are such that float32 holds every sum and that no potential is a threshold: these are numbers without
    common divisor, over 512, while a potential is a few halves of its threshold plus 128ths of the one before, as the
    biases are too.
    """
    ann = kind(architecture, dataset='DIGITS', activation='QCFS', levels=4, batch_norm=True).double().eval()
    bound = 512  # of the input: 1
    with torch.no_grad():
        for i, module in enumerate(ann.modules()):
            draw = np.random.RandomState(i)
            if isinstance(module, QCFS):
                bound += 1
                module.bound.fill_(bound / 512)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eps = 0.0
                module.bias.copy_(torch.from_numpy(draw.randint(-4, 5, module.bias.shape) / 32))
                module.bias.mul_(bound / 512)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                shape = module.weight.shape
                weight = (draw.standard_normal(shape) + 0.02) * math.sqrt(2 / np.prod(shape[1:]))
                module.weight.copy_(torch.from_numpy(np.round(32 * weight) / 32))
    return convert(ann, timesteps)


@pytest.mark.parametrize('tool', [spikingjelly, snntorch])
@pytest.mark.parametrize('kind, architecture', [(VGG, 'VGG5'), (ResNet, 'RESNET6')])
@pytest.mark.parametrize('timesteps', [1, 4])
def test_importers_spike_as_a_converted_network_does_in_the_same_step(
        tool, kind, architecture, timesteps, tmp_path):
    model, x = quantized(kind, architecture, timesteps), images()
    graph, net = written(model, tmp_path), tool(tmp_path / 'snn.nir')
    start_potentials(net, tool, graph, len(x))
    ours, theirs = spikes_of(model, x), run_tool(net, model, x)
    for name in model.layer_names:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize('tool', [spikingjelly, snntorch])
@pytest.mark.parametrize('channels', [False, True])
def test_importers_spike_as_a_network_of_ones_own_does(tool, channels, tmp_path):
    model, x = own(channels=channels, encoding='direct', delay=0, initial_potential=0.0), images(1)
    written(model, tmp_path)
    theirs = run_tool(tool(tmp_path / 'snn.nir'), model, x)
    for record in model.record(x):  # whose potentials are no thresholds, nor near them
        assert record.spikes.any() and torch.equal(record.spikes.double(), theirs[record.name]), record.name


@pytest.fixture
def one_neuron(tmp_path):
    """A neuron of threshold 1 that is given 0.75 at each of 8 steps; (model, image)."""
    model = network('VGG5', dataset='DIGITS', timesteps=8)
    model.features = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU())
    model.classifier = nn.Sequential(nn.Linear(1, 1, bias=False))
    model.set_layers(['features.0'], depth=1, first=1, carries=False)
    for p in model.parameters():
        p.data.fill_(0.75)
    nir_export.export(model, (1, 1, 1), tmp_path / 'snn.nir')
    return model, torch.ones(1, 1, 1, 1)


def when(trains):
    return trains['features.0'].flatten().nonzero().flatten().tolist()


def test_the_one_neuron_as_worked_out_by_hand(one_neuron):
    # u = 0.75 1.5 1.25 1 1.75 1.5 1.25 1: fires at the step after each that is above 1
    assert when(spikes_of(*one_neuron)) == [2, 3, 5, 6, 7]
    assert one_neuron[0](one_neuron[1]).item() == 5 * 0.75


def test_spikingjelly_resets_to_zero_and_fires_at_the_threshold(one_neuron, tmp_path):
    # to zero: u before the reset is 0.75 1.5 0.75 1.5 ...
    assert when(run_tool(spikingjelly(tmp_path / 'snn.nir', subtract=False), *one_neuron)) == [1, 3, 5, 7]
    # subtracting: u before the reset is 0.75 1.5 1.25 1 0.75 1.5 1.25 1, and 1 is enough
    assert when(run_tool(spikingjelly(tmp_path / 'snn.nir'), *one_neuron)) == [1, 2, 3, 5, 6, 7]


def test_snntorch_fires_above_the_threshold(one_neuron, tmp_path):
    assert when(run_tool(snntorch(tmp_path / 'snn.nir'), *one_neuron)) == [1, 2, 4, 5, 6]


# -- the command ------------------------------------------------------------------------------------------------------

FLAGS = [*digits(20, 10), '--default_threshold', '0.3', '--export_nir']


def test_a_run_writes_its_best_epoch_and_says_what_nir_cannot(tmp_path, in_an_empty_folder, capsys):
    run(snn, *FLAGS, 'trained.nir', '--timesteps', 8, '--epochs', 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('trained.nir: written as NIR')]
    assert len(lines) == 1 and 'subtracts the threshold' in lines[0] and 'fires before it integrates' in lines[0]
    state = load('trained_models/snn/snn_resnet6_digits_8.pth')
    run(snn, *FLAGS, 'tested.nir', '--pretrained_snn', 'trained_models/snn/snn_resnet6_digits_8.pth', '--test_only')
    for path in ('trained.nir', 'tested.nir'):
        graph = nir.read(path)
        assert (graph.metadata['architecture'], graph.metadata['timesteps']) == ('RESNET6', 8)
        for name, weight in state['state_dict'].items():
            node = graph.nodes.get(name.removesuffix('.weight'))
            assert name in ('thresholds', 'leaks') or np.array_equal(node.weight, weight)
    assert {path.name for path in tmp_path.iterdir()} == {'trained.nir', 'tested.nir', 'trained_models', 'logs'}


def test_where_it_cannot_write_it_says_so_before_anything_else(tmp_path, in_an_empty_folder, monkeypatch):
    Path('file').write_text('in the way')
    fails(snn, 'file: cannot write there', *FLAGS, 'file/x.nir')
    fails(snn, 'is a folder', *FLAGS, '.')
    monkeypatch.setattr('tempfile.TemporaryFile', lambda **_: (_ for _ in ()).throw(PermissionError(13, 'Not allowed')))
    fails(snn, 'cannot write there .Not allowed', *FLAGS, 'x.nir')
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_without_the_package_it_says_how_to_get_it(tmp_path, in_an_empty_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'nir', None)
    fails(snn, 'pip install nir', *FLAGS, 'x.nir')
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_ones_own_is_written_or_refused_before_anything_is_trained(
        tmp_path, in_an_empty_folder, monkeypatch):
    Path('own.py').write_text("""
from torch import nn
def net(labels, pool=nn.AvgPool2d):
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), pool(2), nn.Flatten(),
                         nn.Linear(4, labels))
def bad(labels):
    return net(labels, nn.MaxPool2d)
""")
    flags = ['--dataset', 'DIGITS', '--train_samples', 40, '--test_samples', 20, '--no-gpu', '--timesteps', 4,
             '--default_threshold', 0.3, '--epochs', 1]
    run(snn, '-a', 'own.py:net', *flags, '--export_nir', 'own.nir')
    state, graph = load('trained_models/snn/snn_own_net_digits_4.pth')['state_dict'], nir.read('own.nir')
    assert np.allclose(graph.nodes['5'].weight, 0.3 * state['5.weight'])
    monkeypatch.setattr(engine, 'train', lambda *_: pytest.fail('came to the training'))
    fails(snn, '--export_nir: 3: NIR does not know MaxPool2d', '-a', 'own.py:bad', *flags, '--export_nir', 'bad.nir')
    assert {path.name for path in tmp_path.glob('*.nir')} == {'own.nir'}
