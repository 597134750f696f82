"""T of 1 to 8: direct input, neurons without delay, learned thresholds and leaks, QCFS, and their conversion."""
import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import self_models.lif_layer as lif_layer
import step_by_step
from conftest import ROOT, fill, network, ternary
from experiment import checkpoint
from self_models import (
    ARCHITECTURES,
    QCFS,
    RESNET_SNN_STDB,
    VGG,
    VGG_SNN_STDB,
    LIFParameters,
    ResNet,
    convert,
    copy_weights,
    find_thresholds,
    fit_bounds,
)
from self_models.layers import Scale
from self_models.lif import lif_forward
from self_models.plain import LIF
from self_models.surrogate import SURROGATES

DIRECT = {'encoding': 'direct', 'delay': 0}
LEARNED = {'learn_threshold': True, 'learn_leak': True}

pytestmark = pytest.mark.usefixtures('small_classifiers')


def weights_only(model):
    """A view for `fill`: the parameters but thresholds and leaks."""
    named = [(name, p) for name, p in model.named_parameters() if name not in ('thresholds', 'leaks')]
    holder = nn.Module()
    holder.named_parameters = lambda: named
    return holder


def filled(architecture, seed=3, **options):
    model = network(architecture, **{'dataset': 'DIGITS', **options}).double()
    fill(weights_only(model), seed)
    return model.eval()


def against_reference(model, x, masks=None, rtol=1e-9):
    """Logits and every gradient, also of thresholds, leaks and directly fed images, of the model and plain autograd."""
    labels, x = torch.arange(len(x)) % 10, x.requires_grad_(model.encoding == 'direct')
    wanted = {**dict(model.named_parameters()), 'images': x}
    logits = model(x)
    F.cross_entropy(logits / model.timesteps, labels).backward()
    got = {name: p.grad for name, p in wanted.items()}
    model.zero_grad()
    x.grad = None
    want, history = step_by_step.run(model, x, masks)
    F.cross_entropy(want / model.timesteps, labels).backward()
    assert torch.allclose(logits, want, rtol=rtol, atol=rtol * want.abs().max().item())
    for name, p in wanted.items():
        if p.grad is None:
            assert got[name] is None or not got[name].any(), name
        else:
            assert (got[name] - p.grad).norm() <= rtol * p.grad.norm() + 1e-15, name
    return history


# tests/data/direct_*.npz were computed with the published successor of the method, in float64
@pytest.mark.parametrize('architecture, timesteps, seed', [('VGG5', 5, 20), ('RESNET12', 5, 23)])
def test_numbers_of_the_published_successor(architecture, timesteps, seed):
    want = np.load(ROOT / 'tests' / 'data' / f'direct_{architecture.lower()}_cifar10.npz')
    model = filled(architecture, seed, dataset='CIFAR10', activation='Linear', timesteps=timesteps, **DIRECT, **LEARNED)
    model.threshold_update(1.0, want['thresholds'].tolist())
    model.leak_update(want['leaks'].tolist())
    logits = model(torch.from_numpy(np.random.RandomState(70 + seed).uniform(-1, 1, size=(2, 3, 32, 32))))
    loss = F.cross_entropy(logits / timesteps, torch.arange(2))
    loss.backward()
    found = {'logits': logits.detach(), 'loss': loss.detach(), 'grad_thresholds': model.thresholds.grad,
             'grad_leaks': model.leaks.grad}
    for name, p in model.named_parameters():
        if name not in ('thresholds', 'leaks'):
            found[f'grad/{name}'] = torch.cat([p.grad.norm()[None], p.grad.flatten()[:16]])
    for key, value in found.items():
        assert np.allclose(value, want[key], rtol=1e-6, atol=1e-6 * abs(want[key]).max()), key


# -- the neuron -------------------------------------------------------------------------------------------------------

def test_a_neuron_without_delay_by_hand():
    # theta 1, leak 1/2, u(-1) = 1/2: h = .25 + .9 = 1.15 fires, u = .15; h = .075 + .9 = .975; h = .4875 + .9 fires
    neuron = LIFParameters(1.0, 0.5, SURROGATES['STDB'](), delay=0, initial_potential=0.5)
    for current in (torch.full((3, 1), 0.9, dtype=torch.float64), torch.full((1,), 0.9, dtype=torch.float64)):
        h, spikes = torch.empty(3, 1, dtype=torch.float64), torch.empty(3, 1, dtype=torch.bool)
        lif_forward(current, spikes, neuron, potentials=h)
        assert h.flatten().tolist() == pytest.approx([1.15, 0.975, 1.3875])
        assert spikes.flatten().tolist() == [True, False, True]


def test_bounds_are_fitted_by_hand():
    net = nn.Sequential(QCFS(1), nn.Flatten(), QCFS(4, channels=2)).train()
    images = torch.tensor([[[1.0], [-1.0]]] * 15 + [[[4.0], [-1.0]]])  # (B, C, 1)
    fit_bounds(net, images)
    # a bound b up to 2 makes b of fifteen 1 and a 4: 15 (1 - b)^2 + (4 - b)^2 is least at 19 / 16; of quarters at 5 / 4
    assert net[0].bound.item() == 1.25 and net.training and not net[0]._forward_pre_hooks
    assert net[2].bound.tolist() == [1.25, 2]  # what comes is 1.25 alone, and nothing, for which the bound stays


@pytest.mark.parametrize('timesteps', [1, 2, 5, 16])
def test_under_constant_current_a_neuron_fires_as_often_as_qcfs_says(timesteps):
    # clip(floor(T I / theta + 1/2), 0, T) times, from theta / 2 and without leak
    current, theta = torch.linspace(-0.9, 2.1, 1009, dtype=torch.float64) + 1e-5 * math.pi, 0.7  # no ties
    spikes = torch.empty(timesteps, 1009, dtype=torch.bool)
    neuron = LIFParameters(theta, 1.0, SURROGATES['STDB'](), delay=0, initial_potential=0.5)
    lif_forward(current, spikes, neuron)
    want = (timesteps * current / theta + 0.5).floor().clamp(0, timesteps)
    assert torch.equal(spikes.sum(0).double(), want)


@pytest.mark.parametrize('architecture', ['VGG5', 'RESNET6'])
@pytest.mark.parametrize('activation', ['STDB', 'Linear'])
@pytest.mark.parametrize('encoding', ['direct', 'poisson'])
@pytest.mark.parametrize('delay', [0, 1])
@pytest.mark.parametrize('initial, bias', [(0.0, False), (0.4, True), (0.4, False)])
def test_every_neuron_against_step_by_step(architecture, activation, encoding, delay, initial, bias):
    model = filled(architecture, activation=activation, encoding=encoding, delay=delay, initial_potential=initial,
                   bias=bias, gamma=0.9, alpha=0.9, beta=0.2, **LEARNED)
    model.timesteps = model.output_delay + 8
    r = np.random.RandomState(1)
    model.threshold_update(1.0, r.uniform(0.6, 2.0, len(model.thresholds)))
    model.leak_update(r.uniform(0.5, 1.0, len(model.leaks)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith('bias'):
                p.uniform_(-0.1, 0.3)
        for module in model.modules():
            if hasattr(module, 'factor'):
                module.factor.fill_(0.6)
    x = ternary((3, 1, 8, 8), 5, 1.25, low=0)
    history = against_reference(model, x)
    assert all(torch.stack(each).any() for each in history) and (x.grad is None) == (encoding == 'poisson')
    if activation == 'Linear' and initial:  # else a gradient needs spikes in every layer, or two of a neuron
        assert model.thresholds.grad.any() and model.leaks.grad.any()


@pytest.mark.parametrize('activation, width', [
    ('Rectangle', 9.0), ('ATan', 1.5), ('FastSigmoid', 2.0), ('Sigmoid', 2.5), ('Gaussian', 0.8), ('Inverse', 1.0)])
@pytest.mark.parametrize('delay, timesteps', [(0, 1), (0, 4), (0, 12), (1, 1), (1, 4), (1, 12)])
@pytest.mark.parametrize('architecture, learned', [('VGG5', {}), ('RESNET6', LEARNED)], ids=['fixed', 'learned'])
def test_every_surrogate_against_step_by_step(architecture, activation, width, delay, timesteps, learned, own_classes,
                                              monkeypatch):
    model = filled(architecture, activation=activation, width=width, gamma=0.9, alpha=0.7, encoding='direct',
                   delay=delay, initial_potential=0.4, **learned)
    model.timesteps = len(model.thresholds) * delay + timesteps  # so that the residual paths' spikes arrive, too
    r = np.random.RandomState(1)
    model.threshold_update(1.0, r.uniform(0.2, 0.8, len(model.thresholds)))
    model.leak_update(r.uniform(0.5, 1.0, len(model.leaks)))
    if timesteps == 4:
        monkeypatch.setattr(lif_layer, 'chunks', lambda batch, *_: [slice(i, i + 1) for i in range(batch)])
    against_reference(model, ternary((3, 1, 8, 8), 5, 1.25, low=0))
    assert all(p.grad.any() for p in model.parameters())


def test_fixed_thresholds_and_leaks_get_no_gradient_and_the_same_weights_gradients():
    x, gradients = ternary((3, 1, 8, 8), 5, low=0), []
    for learned in ({}, LEARNED):
        model = filled('VGG5', activation='STDB', timesteps=4, beta=0.2, default_threshold=0.75, **DIRECT, **learned)
        model.leak_update([0.5, 0.75, 1, 1, 0.5])
        model(x).logsumexp(1).sum().backward()
        gradients.append([p.grad for p in weights_only(model).named_parameters() and model.parameters()
                          if p.dim() > 1])
        assert isinstance(model.thresholds, nn.Parameter) == bool(learned)
        assert all((values.grad is None) != bool(learned) for values in (model.thresholds, model.leaks))
    assert all(a.any() for a in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_chunks_groups_and_dropout_change_nothing(monkeypatch):
    x = ternary((5, 1, 8, 8), 5, low=0)
    model = filled('VGG5', activation='Linear', timesteps=4, gamma=0.9, default_threshold=2.0, dropout=0.5, **DIRECT,
                   **LEARNED)
    monkeypatch.setattr(lif_layer, 'chunks', lambda batch, *_: [slice(i, i + 1) for i in range(batch)])
    monkeypatch.setattr('self_models.spiking_network.GROUP_BYTES', {'cpu': 2 * 4 * 65 * 64 * 8 + 1})
    against_reference(model, x)
    model.train()
    trains, original = [], lif_layer.lif_layer
    monkeypatch.setattr('self_models.spiking_network.lif_layer',
                        lambda *args: trains.append(original(*args)) or trains[-1])
    monkeypatch.setattr('self_models.spiking_network.GROUP_BYTES', {'cpu': 2 ** 40})
    logits = model(x)
    masks = [train.mask if train.mask is None or len(train.shape) == 1 else
             train.mask.view(-1, *train.shape[1:], train.shape[0]).permute(0, 3, 1, 2) for train in trains]
    assert [mask is not None for mask in masks] == [False, True, False, True, True]
    assert torch.allclose(logits, step_by_step.run(model, x, masks)[0])


@pytest.mark.parametrize('options', [{}, LEARNED, {'activation': 'Linear'}])
def test_float32_and_autocast(options):
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    exact = filled('RESNET6', timesteps=4, default_threshold=1.5, **DIRECT, **options)
    want = exact(x.double())
    single = filled('RESNET6', timesteps=4, default_threshold=1.5, **DIRECT, **options).float()
    assert torch.allclose(single(x).double(), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())
    with torch.autocast('cpu', torch.bfloat16):
        autocast = single(x)
    autocast.sum().backward()
    assert all(p.grad.isfinite().all() for p in single.parameters()) and autocast.dtype == torch.float32
    assert 0 < (autocast - want).norm() < 0.3 * want.norm()


def test_images_and_currents_are_left_as_they_are():
    model, x = filled('VGG5', timesteps=4, **DIRECT), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    before = x.clone()
    first = model(x)
    assert torch.equal(x, before) and torch.equal(model(x), first)
    for activation in ('STDB', 'Linear'):
        current = (4 * torch.rand(8, 5, dtype=torch.float64) - 1).requires_grad_()
        before = current.detach().clone()
        LIF(4, 0.7, 0.9, activation, delay=0, learn_threshold=True)(current).pow(2).sum().backward()
        assert torch.equal(current, before) and current.grad.any()


@pytest.mark.parametrize('delay', [0, 1])
def test_the_curve_holds_the_outputs_of_fewer_steps(delay):
    model = filled('RESNET6', encoding='direct', delay=delay, initial_potential=0.5, bias=True, default_threshold=2.0)
    with torch.no_grad():
        model.classifier[0].bias.uniform_(-1, 1)
    model.timesteps = model.output_delay + 4
    x = ternary((2, 1, 8, 8), 5, low=0)
    at = [model.output_delay + 1, model.output_delay + 2, model.output_delay + 4]
    curve = model.curve(x, at)
    for steps, outputs in zip(at, curve, strict=True):
        model.timesteps = steps
        assert torch.allclose(outputs, model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('options', [{}, {'encoding': 'direct'}])
def test_no_images_leave_nothing_to_record(options):
    model = network('VGG5', dataset='DIGITS', timesteps=9, **options)
    records = list(model.record(torch.zeros(0, 1, 8, 8)))
    assert [record.spikes.tensors()[0].shape[1] for record in records] == [0] * 5


def test_looking_at_potentials_leaves_gradients_and_autocast_as_they_are():
    model = network('VGG5', dataset='DIGITS', timesteps=9, encoding='direct')
    first, second = list(model.record(torch.rand(2, 1, 8, 8)))[:2]
    with torch.autocast('cpu', torch.bfloat16):
        for _ in zip(first.potentials(), second.potentials()):  # the second is left in its middle
            assert torch.is_grad_enabled() and torch.is_autocast_enabled('cpu')
        assert torch.is_grad_enabled() and torch.is_autocast_enabled('cpu')


def test_learned_values_stay_in_their_ranges():
    model = network('VGG5', dataset='DIGITS', **LEARNED)
    with torch.no_grad():
        model.thresholds[:] = torch.tensor([-1.0, 0.0, 1e-9, 0.5, 3.0])
        model.leaks[:] = torch.tensor([-1.0, 0.0, 1.5, 0.5, 1.0])
    model.constrain()
    assert (model.thresholds > 0).all() and model.thresholds[3:].tolist() == [0.5, 3.0]
    assert (model.leaks > 0).all() and (model.leaks <= 1).all() and model.leaks[2:].tolist() == [1.0, 0.5, 1.0]


def test_leaks():
    model = network('VGG5', dataset='DIGITS', leak=0.9)
    assert model.leaks.tolist() == [0.9] * 5 and model.leak == 0.9
    model.leak_update([0.5, 0.6, 0.7, 0.8, 1])
    assert model.leak is None and model.leaks.tolist() == [0.5, 0.6, 0.7, 0.8, 1.0]
    for bad in ([0.5] * 4, [0.5, 0.6, 0.7, 0.8, 1.1], [0, 1, 1, 1, 1], [math.nan] * 5):
        with pytest.raises(ValueError, match='leak'):
            model.leak_update(bad)
    x = ternary((9, 1, 8, 8), 5, low=0).float()
    find_thresholds(fill(model, 3), x, 20)
    assert model.leaks.tolist() == [0.5, 0.6, 0.7, 0.8, 1.0]


@pytest.mark.parametrize('options, message', [
    ({'encoding': 'rate'}, 'encoding'), ({'delay': 2}, 'delay'), ({'initial_potential': 1.0}, 'initial_potential'),
    ({'initial_potential': -0.1}, 'initial_potential'), ({'initial_potential': math.nan}, 'initial_potential')])
def test_values_that_make_no_network(options, message):
    with pytest.raises(ValueError, match=message):
        network('VGG5', **options)


@pytest.mark.parametrize('architecture', ['VGG5', 'RESNET6'])
@pytest.mark.parametrize('encoding, delay, bias', [('direct', 0, False), ('direct', 1, False), ('poisson', 0, False),
                                                   ('direct', 0, True), ('direct', 1, True), ('poisson', 1, True)])
def test_thresholds_are_balanced_for_every_neuron(architecture, encoding, delay, bias):
    model = filled(architecture, 4, encoding=encoding, delay=delay, bias=bias)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith('bias'):
                p.uniform_(-0.1, 0.2)
    x = ternary((6, 1, 8, 8), 1, 1.25, low=0)
    want = step_by_step.find_thresholds(model, x, 30)
    assert find_thresholds(model, x, 30) == pytest.approx(want, rel=1e-9)


# -- the ANN ----------------------------------------------------------------------------------------------------------

def test_qcfs_by_hand():
    # theta 2, L 4: steps of 1/2, each rounded to the nearest
    x = torch.tensor([-0.3, 0.2, 0.3, 0.8, 1.9, 2.5], dtype=torch.float64, requires_grad=True)
    module = QCFS(levels=4, bound=2.0).double()
    y = module(x)
    assert y.tolist() == pytest.approx([0, 0, 0.5, 1.0, 2.0, 2.0])
    y.backward(torch.tensor([1.0, 10, 100, 1e3, 1e4, 1e5], dtype=torch.float64))
    assert x.grad.tolist() == [0, 10, 100, 1e3, 1e4, 0]
    # (y - x) / theta inside, 1 above, 0 below
    assert module.bound.grad.item() == pytest.approx(10 * -0.1 + 100 * 0.1 + 1e3 * 0.1 + 1e4 * 0.05 + 1e5)


def test_the_qcfs_activation_against_numbers_of_other_code():
    data = np.load(ROOT / 'tests' / 'data' / 'qcfs_activation.npz')
    module = QCFS(int(data['act_L']), float(data['act_theta'])).double()
    x = torch.from_numpy(data['act_x']).requires_grad_()
    y = module(x)
    y.backward(torch.from_numpy(data['act_g']))
    assert np.allclose(y.detach(), data['act_y'], rtol=1e-6) and np.allclose(x.grad, data['act_gx'], rtol=1e-6)
    assert module.bound.grad.item() == pytest.approx(data['act_gtheta'].item(), rel=1e-6)


@pytest.mark.parametrize('layout', ['large', 'channels_last', 'permuted', 'strided gradient'])
def test_qcfs_of_every_layout(layout, monkeypatch):
    monkeypatch.setattr('self_models.qcfs.BLOCK', 7)
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    grad = torch.randn_like(x)
    if layout == 'channels_last':
        x = x.to(memory_format=torch.channels_last)
    elif layout == 'permuted':
        x = x.permute(1, 3, 0, 2)
        grad = grad.permute(1, 3, 0, 2).contiguous()
    elif layout == 'strided gradient':
        grad = torch.randn(4, 3, 5, 6, dtype=torch.float64).transpose(0, 1)
    module, plain = QCFS(3, 0.9).double(), torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    x = x.detach().requires_grad_()
    module(x).backward(grad)
    got, x.grad = x.grad.clone(), None
    # plain autograd, straight through the floor
    v = (x / plain).clamp(0, 1)
    y = plain * (v + ((3 * v + 0.5).floor() / 3 - v).detach())
    y.backward(grad)
    assert torch.allclose(got, x.grad) and torch.allclose(module.bound.grad, plain.grad)
    assert torch.allclose(module(x), y)


def test_qcfs_of_bfloat16_rounds_no_more_than_what_it_gives():
    # as under --amp on a CPU; a bound whose steps bfloat16 does not hold
    x = torch.randn(1000).bfloat16()
    grad = torch.randn(1000).bfloat16()
    narrow, wide = QCFS(8, 1.3), QCFS(8, 1.3)
    a, b = x.clone().requires_grad_(), x.float().requires_grad_()
    y, expected = narrow(a), wide(b)
    y.backward(grad)
    expected.backward(grad.float())
    assert y.dtype == a.grad.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16()) and torch.equal(a.grad, b.grad.bfloat16())
    assert narrow.bound.grad.item() == pytest.approx(wide.bound.grad.item(), rel=1e-6)


@pytest.mark.parametrize('activation', ['ReLU', 'QCFS'])
def test_an_ann_channels_last_is_the_same(activation):
    ann = VGG('VGG5', input_shape=(3, 9, 8), activation=activation, levels=2 ** 20).double().eval()
    x, gradients = torch.randn(2, 3, 9, 8, dtype=torch.float64), []
    for layout in (torch.contiguous_format, torch.channels_last):
        ann.to(memory_format=layout).zero_grad()
        ann(x.contiguous(memory_format=layout)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in ann.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12) and a.abs().sum() > 0


@pytest.mark.parametrize('levels, bound', [(0, 1.0), (2.5, 1.0), (4, 0.0), (4, -1.0), (4, math.inf), (4, math.nan)])
def test_qcfs_of_no_levels_or_bound(levels, bound):
    with pytest.raises(ValueError, match='levels|bound'):
        QCFS(levels, bound)


@pytest.mark.parametrize('architecture', ['VGG5', 'RESNET6'])
def test_modules_of_an_ann(architecture):
    kind = VGG if architecture == 'VGG5' else ResNet
    for activation, module in (('ReLU', nn.ReLU), ('QCFS', QCFS)):
        model = kind(architecture, dataset='DIGITS', activation=activation, levels=5, batch_norm=True)
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
        assert len(norms) == len(layers) - 1 and len([m for m in model.modules() if isinstance(m, module)]) == (
            5 if architecture == 'VGG5' else 7)
        assert all(layer.bias is None for layer in layers)
    with pytest.raises(ValueError, match='activation'):
        kind(architecture, activation='ReLU6')


# -- conversion -------------------------------------------------------------------------------------------------------

def trained_like(architecture, levels, seed=0, activation='QCFS', shape=None):
    """An ANN in float64 whose batch norms and bounds are as training leaves them: none at its initial value."""
    torch.manual_seed(seed)
    kind = VGG if architecture.startswith('VGG') else ResNet
    model = kind(architecture, dataset='DIGITS', input_shape=shape, activation=activation, levels=levels,
                 batch_norm=True).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.normal_(0.05, 1).mul_(math.sqrt(2 / module.weight[0].numel()))
            elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.3, 0.5),
                                          (module.running_mean, -0.2, 0.2), (module.running_var, 0.3, 2.0)):
                    tensor.uniform_(low, high)
            elif isinstance(module, QCFS):
                module.bound.uniform_(1.0, 2.5)
    return model


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_one_level_at_one_step_is_the_ann(architecture):
    model = trained_like(architecture, levels=1, shape=(2, 16, 16))
    x = torch.rand(3, 2, 16, 16, dtype=torch.float64) * 2 - 1
    snn = convert(model, timesteps=1)
    with torch.no_grad():
        want, got = model(x), snn(x)
    assert want.std() > 0 and (got - want).abs().max() <= 1e-12 * want.abs().max()
    assert (snn.timesteps, snn.delay, snn.encoding, snn.initial_potential, snn.leak) == (1, 0, 'direct', 0.5, 1.0)


@pytest.mark.parametrize('architecture', ['VGG5', 'RESNET12'])
def test_its_own_state_can_be_loaded_after_thresholds_were_learned(architecture):
    snn = convert(trained_like(architecture, levels=2), timesteps=2, learn_threshold=True)
    with torch.no_grad():
        snn.thresholds *= torch.linspace(0.5, 2, len(snn.thresholds)).to(snn.thresholds)
    weights = {key: value.clone() for key, value in snn.state_dict().items()}
    state = {'state_dict': weights, **checkpoint.snn_state(snn)}
    with torch.no_grad():
        snn.thresholds *= 1.5  # a later epoch
    checkpoint.load_snn(snn, state, 'own.pth')
    assert all(torch.equal(value, weights[key]) for key, value in snn.state_dict().items())


@pytest.mark.parametrize('architecture', ['VGG5', 'RESNET12'])
def test_thresholds_can_be_scaled_again_after_a_state_was_loaded(architecture):
    snn = convert(trained_like(architecture, levels=2), timesteps=2)
    thresholds, state = snn.thresholds.tolist(), {key: value.clone() for key, value in snn.state_dict().items()}
    snn.threshold_update(0.5, thresholds)
    want = {key: value.clone() for key, value in snn.state_dict().items()}
    snn.load_state_dict(state)
    snn.threshold_update(0.5, thresholds)
    for key, value in snn.state_dict().items():
        assert torch.allclose(value, want[key], rtol=1e-12), key


@pytest.mark.parametrize('architecture', ['VGG5', 'RESNET12'])
def test_thresholds_that_were_learned_can_be_set_to_themselves_and_scaled(architecture):
    snn = convert(trained_like(architecture, levels=2, shape=(2, 16, 16)), timesteps=2, learn_threshold=True)
    x = torch.rand(3, 2, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        snn.thresholds *= torch.linspace(0.5, 2, len(snn.thresholds)).to(snn.thresholds)
        want = {key: value.clone() for key, value in snn.state_dict().items()}
        snn.threshold_update(1.0, snn.thresholds.tolist())
        assert all(torch.equal(value, want[key]) for key, value in snn.state_dict().items())
        twice = copy.deepcopy(snn)
        twice.threshold_update(2.0, snn.thresholds.tolist())
        snn.thresholds *= 2
        for source, synapse in [each for stage in snn.stages() for each in stage.inputs] + [(0, snn.classifier[-1])]:
            if source >= 0:  # behind a layer, whose spikes are worth twice as much
                (synapse.factor if isinstance(synapse, Scale) else synapse.weight).mul_(2)
        assert torch.allclose(twice(x), snn(x), rtol=1e-9) and snn(x).std() > 0


@pytest.mark.parametrize('architecture', ['VGG5', 'RESNET12'])
def test_a_state_says_whether_weights_carry_thresholds(architecture):
    snn = convert(trained_like(architecture, levels=2), timesteps=2)
    fresh = network(architecture, dataset='DIGITS', bias=True, **(
        {'scale': True} if architecture == 'RESNET12' else {})).double()
    file = io.BytesIO()
    torch.save(snn.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    thresholds = snn.thresholds.tolist()
    for each in (snn, fresh):
        each.threshold_update(0.5, thresholds)
    assert fresh.balanced == len(fresh.layer_names)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in snn.state_dict().items())
    # also after it went through a file of the scripts
    resumed, again = (network(architecture, dataset='DIGITS', bias=True, **(
        {'scale': True} if architecture == 'RESNET12' else {})).double() for _ in range(2))
    checkpoint.load_snn(resumed, {'state_dict': snn.state_dict(), **checkpoint.snn_state(snn)}, 'a.pth')
    again.load_state_dict(resumed.state_dict())
    again.threshold_update(2.0, snn.thresholds.tolist())
    snn.threshold_update(2.0, snn.thresholds.tolist())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in snn.state_dict().items())


def test_what_is_frozen_or_does_not_drop_stays_so():
    ann = trained_like('VGG5', levels=2).train()
    ann.features.requires_grad_(False)
    dropout = next(module for module in ann.classifier if isinstance(module, nn.Dropout)).eval()
    snn = convert(ann, 2)
    assert {name.split('.')[0] for name, p in snn.named_parameters() if not p.requires_grad} == {'features'}
    assert all(p.requires_grad for p in snn.classifier.parameters())
    assert not next(each for each in snn.classifier if isinstance(each, nn.Dropout)).training and snn.training
    assert {each.p for each in convert(ann, 2, dropout=0.05).modules() if isinstance(each, nn.Dropout)} == {0.05, 0.5}
    assert dropout.p == 0.5


def test_the_weights_of_a_pruned_spiking_network_are_those_that_are_left():
    snn, x = convert(trained_like('VGG5', 2, shape=(2, 16, 16)), 2), torch.rand(3, 2, 16, 16, dtype=torch.float64)
    layer, second, *_ = [module for module in snn.features if isinstance(module, nn.Conv2d)]
    prune.l1_unstructured(layer, 'weight', 0.5)
    with torch.no_grad():
        layer.weight_orig.mul_(1.7)  # as a step of training, or another checkpoint
    for _ in range(2):
        snn(x).square().sum().backward()
    grad, got = layer.weight_orig.grad, snn(x)
    assert torch.equal(grad != 0, (grad != 0) & (layer.weight_mask != 0)) and grad.any()
    prune.l1_unstructured(second, 'weight', 0.5)
    before = snn.thresholds.clone()
    with pytest.raises(ValueError, match='make them permanent first, as prune.remove does'):
        snn.threshold_update(2.0, before.tolist())
    assert torch.equal(snn.thresholds, before)
    prune.remove(second, 'weight')
    got = snn(x)
    prune.remove(layer, 'weight')
    assert torch.equal(got, snn(x))


def test_numbers_and_names_that_a_network_is_given():
    assert VGG_SNN_STDB('VGG5', dataset='DIGITS', default_threshold=1, learn_threshold=True).thresholds.requires_grad
    for make, option in ((VGG, {'activation': 'QCFS', 'bounds': 'channels'}), (RESNET_SNN_STDB, {'scale': 'channels'})):
        with pytest.raises(ValueError, match="unknown (bounds|scale) 'channels': choose "):
            make('VGG5' if make is VGG else 'RESNET6', dataset='DIGITS', **option)


@pytest.mark.parametrize('updates', range(4))
def test_a_copy_runs_at_its_own_thresholds(updates):
    snn = network('VGG5', dataset='DIGITS', timesteps=8)
    for _ in range(updates):
        snn.threshold_update(1.0, [0.5] * 5)
    snn.lif_parameters(0)
    for each in (copy.deepcopy(snn), pickle.loads(pickle.dumps(snn))):
        each.threshold_update(1.0, [7.0] * 5)
        assert each.lif_parameters(0).threshold == 7
    snn.thresholds.data.fill_(3)
    assert snn.lif_parameters(0).threshold == 3


class IntegrateAndFire(nn.Module):
    """In place of a QCFS: adds up its input from bound / 2 on, and spikes, as high as the bound, above the bound."""

    def __init__(self, bound):
        super().__init__()
        self.bound, self.u = bound, bound / 2

    def forward(self, x):
        u = self.u + x
        spikes = (u > self.bound).to(x)
        self.u = u - self.bound * spikes
        return self.bound * spikes


def with_neurons(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QCFS):
                setattr(module, name, IntegrateAndFire(child.bound.item()))
    return model


@pytest.mark.parametrize('architecture', ['VGG5', 'VGG9', 'RESNET12'])
def test_a_converted_network_does_what_neurons_in_the_ann_do(architecture):
    x = torch.rand(2, 1, 16, 16, dtype=torch.float64)
    for timesteps in (1, 3, 8):
        model = trained_like(architecture, levels=4, shape=(1, 16, 16))
        got = convert(model, timesteps)(x).detach()
        with torch.no_grad():
            stepped = with_neurons(model)
            want = sum(stepped(x) for _ in range(timesteps))
        assert (got - want).abs().max() <= 1e-9 * want.abs().max()


def test_relu_with_batch_norm_is_folded_and_not_converted_by_bounds():
    model = trained_like('RESNET6', levels=1, activation='ReLU')
    snn = RESNET_SNN_STDB('RESNET6', dataset='DIGITS', bias=True, timesteps=40, encoding='direct', delay=0).double()
    copy_weights(model, snn.eval())
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():  # the folded weights give what the ANN gives, ReLU for ReLU
        y = snn.pre_process(x)
        assert torch.allclose(y, model.pre_process(x), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match='no bounds.*find_thresholds'):
        convert(model, 4)


def test_an_ann_without_batch_norm_is_copied_as_it_is():
    model, snn = VGG('VGG5', dataset='DIGITS'), VGG_SNN_STDB('VGG5', dataset='DIGITS')
    copy_weights(model, snn)
    assert all(torch.equal(value, snn.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('spoil', [
    lambda m: m.features[2].bound.data.fill_(0), lambda m: m.features[2].bound.data.fill_(math.nan),
    lambda m: m.features[1].running_var.fill_(math.inf), lambda m: m.features[1].running_var.fill_(-1),
    lambda m: m.features[1].weight.data.fill_(math.nan)])
def test_bounds_and_batch_norms_that_cannot_be_folded(spoil):
    model = trained_like('VGG5', 4)
    spoil(model)
    with pytest.raises(ValueError, match='bound|batch norm'):
        convert(model, 4)
