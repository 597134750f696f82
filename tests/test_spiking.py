"""The spiking networks against numbers of the published code and against the step-by-step reference."""
import copy
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import self_models.layers as layers
import self_models.lif_layer as lif_layer
import self_models.spiking_network as spiking_network
import step_by_step
from conftest import ROOT, fill, network, ternary
from self_models import ARCHITECTURES, INPUT_SHAPES, VGG, ResNet, find_thresholds
from self_models.architectures import RESNET_STAGES
from self_models.spike_train import SpikeTrain

pytestmark = pytest.mark.usefixtures('small_classifiers')


def ann(architecture, **options):
    return VGG(architecture, **options) if architecture.startswith('VGG') else ResNet(architecture, **options)


# tests/data/*.npz were computed with the published code in float64; weights and images as `fill` and `ternary` draw
@pytest.mark.parametrize('case, architecture, dataset, leak, alpha, beta, timesteps, seed', [
    ('vgg5_mnist', 'VGG5', 'MNIST', 1.0, 0.3, 0.01, 16, 0),
    ('resnet12_cifar10', 'RESNET12', 'CIFAR10', 0.9375, 0.5, 0.035, 32, 6)])
def test_numbers_of_the_published_code(case, architecture, dataset, leak, alpha, beta, timesteps, seed):
    want = np.load(ROOT / 'tests' / 'data' / f'{case}.npz')
    model = fill(network(architecture, dataset=dataset, timesteps=timesteps, leak=leak, alpha=alpha, beta=beta)
                 .double(), seed).eval()
    c, h, w = INPUT_SHAPES[dataset]
    x = ternary((2, c, h, w), 7 + seed, 1.0 if architecture.startswith('VGG') else 1.25, low=0 if c == 1 else -1)
    assert find_thresholds(model, x, timesteps) == pytest.approx(want['calibrated'].tolist(), rel=1e-6)
    assert (model.timesteps, model.leak) == (timesteps, leak)
    model.threshold_update(1.0, want['thresholds'].tolist())
    logits = model(x)
    loss = F.cross_entropy(logits, torch.arange(2))
    loss.backward()
    assert np.allclose(logits.detach(), want['logits'], rtol=1e-6, atol=1e-6 * abs(want['logits']).max())
    assert loss.item() == pytest.approx(want['loss'].item(), rel=1e-6)
    for name, p in model.named_parameters():
        got = np.array([p.grad.norm(), *p.grad.flatten()[:16]])
        assert np.allclose(got, want[f'grad/{name}'], rtol=1e-6, atol=1e-6 * abs(want[f'grad/{name}']).max()), name


def against_reference(model, x, masks=None, rtol=1e-9):
    """Logits and every gradient of the model and of the reference, on the same weights."""
    labels = torch.arange(len(x)) % 10
    logits = model(x)
    F.cross_entropy(logits / 5, labels).backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    want, history = step_by_step.run(model, x, masks)
    F.cross_entropy(want / 5, labels).backward()
    assert all(torch.stack(spikes).any() for spikes in history), 'a silent layer would hide errors'
    assert torch.allclose(logits, want, rtol=rtol, atol=rtol * want.abs().max().item())
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 0
        assert (got[name] - p.grad).norm() <= rtol * p.grad.norm(), name


@pytest.mark.parametrize('activation', ['STDB', 'Linear'])
@pytest.mark.parametrize('leak', [1.0, 0.9])
@pytest.mark.parametrize('architecture, timesteps', [('VGG5', 14), ('RESNET6', 12)])
def test_against_step_by_step(architecture, timesteps, activation, leak):
    model = fill(network(architecture, activation=activation, dataset='DIGITS', timesteps=timesteps, leak=leak,
                         alpha=0.4, beta=0.2, gamma=0.5).double(), 3).eval()
    x = ternary((3, 1, 8, 8), 5, 1.25, low=0)
    thresholds = find_thresholds(model, x, timesteps)
    model.threshold_update(0.7, thresholds)
    against_reference(model, x)


@pytest.mark.parametrize('shape', [(1, 9, 13), (3, 7, 6)])
def test_odd_image_shapes_against_step_by_step(shape):
    model = fill(network('VGG5', input_shape=shape, timesteps=12).double(), 1).eval()
    x = ternary((2, *shape), 2)
    model.threshold_update(0.7, find_thresholds(model, x, 12))
    against_reference(model, x)


def test_float32_agrees_with_float64_reference():
    model = fill(network('VGG5', dataset='DIGITS', timesteps=14), 3).eval()
    x = ternary((3, 1, 8, 8), 5, low=0).float()
    model.threshold_update(0.7, find_thresholds(model, x, 14))
    against_reference(model, x, rtol=1e-4)


def test_chunks_do_not_change_the_result(monkeypatch):
    model = fill(network('RESNET6', dataset='DIGITS', timesteps=12, activation='STDB').double(), 3).eval()
    x = ternary((5, 1, 8, 8), 5, 1.25, low=0)
    model.threshold_update(0.7, find_thresholds(model, x, 12))
    monkeypatch.setattr(lif_layer, 'chunks', lambda batch, *_: [slice(i, i + 1) for i in range(batch)])
    against_reference(model, x)


@pytest.mark.parametrize('architecture, activation', [('VGG5', 'STDB'), ('VGG5', 'Linear'), ('RESNET6', 'STDB')])
def test_groups_do_not_change_the_result(architecture, activation, monkeypatch):
    model = fill(network(architecture, dataset='DIGITS', timesteps=14, activation=activation).double(), 3).eval()
    x = ternary((5, 1, 8, 8), 5, 1.25, low=0)
    model.threshold_update(0.7, find_thresholds(model, x, 14))
    parts, original = [], SpikeTrain.part
    monkeypatch.setattr(SpikeTrain, 'part', lambda train, at: parts.append(at) or original(train, at))
    # the largest layer of VGG5 takes 64 values a step and gives 64 * 64, that of RESNET6 takes 64 * 64 too
    steps, largest = 14 - model.depth, {'VGG5': 65, 'RESNET6': 128}[architecture] * 64
    monkeypatch.setattr(spiking_network, 'GROUP_BYTES', {'cpu': 2 * steps * largest * 8 + 1})  # two samples at a time
    against_reference(model, x)
    assert [(at.start, at.stop) for at in parts] == [(0, 2), (2, 4), (4, 6)]


def test_dropout_is_one_mask_a_sample_held_over_time():
    model = fill(network('VGG5', dataset='DIGITS', timesteps=14, dropout=0.5).double(), 3)
    x = ternary((4, 1, 8, 8), 5, low=0)
    model.threshold_update(0.4, find_thresholds(model, x, 14))
    model.train()
    masks = {}

    def keep(train, index):
        if train.mask is None:
            return None
        mask = train.mask
        if len(train.shape) == 3:
            c, h, w = train.shape
            mask = mask.view(-1, h, w, c).permute(0, 3, 1, 2)
        masks[index] = mask
        return mask

    original, trains = spiking_network.lif_layer, []
    spiking_network.lif_layer = lambda *args: trains.append(original(*args)) or trains[-1]
    try:
        logits = model(x)
    finally:
        spiking_network.lif_layer = original
    kept = [keep(train, i) for i, train in enumerate(trains)]
    assert [mask is not None for mask in kept] == [False, True, False, True, True]  # none before a pool
    assert set(kept[1].unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(kept[1][0], kept[1][1])
    want, _ = step_by_step.run(model, x, kept)
    assert torch.allclose(logits, want)
    F.cross_entropy(logits, torch.arange(4)).backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(want, torch.arange(4)).backward()
    for a, p in zip(got, model.parameters(), strict=True):
        assert torch.allclose(a, p.grad, atol=1e-9 * p.grad.abs().max().item())
    model.eval()
    assert torch.equal(model(x), model(x))  # ternary input, no dropout: nothing is left to chance


def test_two_models_with_different_surrogates_live_side_by_side():
    x = ternary((2, 1, 8, 8), 5, low=0)

    def gradient(alpha, other=None):
        model = fill(network('VGG5', dataset='DIGITS', timesteps=14, alpha=alpha).double(), 3).eval()
        model.threshold_update(0.7, find_thresholds(model, x, 14))
        if other:
            network('VGG5', dataset='DIGITS', alpha=other)  # the published code's last model built won
        model(x)[0, 0].backward()
        return model.classifier[3].weight.grad

    assert torch.equal(gradient(0.3), gradient(0.3, other=5.0))
    assert torch.allclose(gradient(0.6), 2 * gradient(0.3))  # one surrogate lies behind that layer


def test_no_state_outlives_a_pass():
    model = fill(network('VGG5', dataset='DIGITS', timesteps=14).double(), 3).eval()
    def state():
        return {key: value.tolist() if isinstance(value, torch.Tensor) else value
                for key, value in vars(model).items() if key != '_modules'}

    before = state()
    x = ternary((2, 1, 8, 8), 5, low=0)
    first = model(x)
    assert state() == before
    assert torch.equal(model(x), first)
    assert model(x[:1]).shape == (1, 10)  # another batch size straight after


def test_shorter_than_its_delays_gives_zero():
    model = fill(network('VGG5', dataset='DIGITS', timesteps=5).double(), 3)
    x = ternary((2, 1, 8, 8), 5, low=0)
    model.threshold_update(1.0, [1e-3] * 5)
    logits = model(x)
    assert logits.abs().max() == 0
    logits.sum().backward()
    model.network_update(6, 1.0)
    assert model(x).abs().max() > 0


@pytest.mark.parametrize('architecture', ['VGG5', 'RESNET6'])
def test_the_curve_holds_the_outputs_of_fewer_steps(architecture):
    model = fill(network(architecture, dataset='DIGITS', timesteps=14, default_threshold=0.3).double(), 4).eval()
    x = ternary((3, 1, 8, 8), 1, 1.0 if architecture == 'VGG5' else 1.25, low=0)
    find_thresholds(model, x, 14)
    at = [1, model.depth + 1, 11, 14]
    curve = model.curve(x, at)
    for steps, outputs in zip(at, curve, strict=True):
        model.network_update(steps, 1.0)
        assert torch.allclose(outputs, model(x), rtol=1e-12, atol=1e-12)
    assert curve[0].abs().max() == 0 and curve[-1].abs().max() > 0
    model.network_update(model.depth, 1.0)
    assert not model.curve(x, [1, model.depth]).any()
    for wrong in ([0, 1], [2, 1], [model.depth + 1], [], [1.5], torch.tensor([])):
        with pytest.raises(ValueError, match='at must ascend'):
            model.curve(x, wrong)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_spikes_of_a_narrow_type_are_counted_to_the_last(dtype):
    train = SpikeTrain(torch.ones(3001, 2, 4, dtype=torch.bool), (1, 2, 2), 0, pools=1)
    assert train.total(slice(0, 3001), dtype).tolist() == [[3001]] * 2


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_network_of_a_narrow_type_gives_the_outputs_of_its_weights(dtype):
    model = fill(network('RESNET6', dataset='DIGITS', timesteps=300, bias=True, delay=0), 3).eval().to(dtype)
    x = ternary((2, 1, 8, 8), 5, 1.25, low=0).to(dtype)
    wide = copy.deepcopy(model).float()
    model.threshold_update(0.7, find_thresholds(wide, x.float(), 20))
    wide.threshold_update(1.0, model.thresholds.tolist())
    with torch.no_grad():
        want, outputs, curve = wide(x.float()), model(x), model.curve(x, [150, 300])
    # in the weights' type potentials and counts lose what is added to them: 0.4 of the largest output in bfloat16
    assert (outputs - want).abs().max() < 2e-3 * want.abs().max() and torch.allclose(curve[1], outputs, rtol=1e-4)
    assert model.curve(x, [1])[0].dtype == outputs.dtype == torch.float32


def test_a_network_of_bfloat16_learns_from_the_gradients_of_its_weights():
    model = fill(network('VGG5', dataset='DIGITS', timesteps=16, bias=True, delay=0, default_threshold=0.5), 3).eval()
    model, x = model.bfloat16(), ternary((2, 1, 8, 8), 5, low=0).bfloat16()
    wide = copy.deepcopy(model).float()
    for net, images in ((model, x), (wide, x.float())):
        F.cross_entropy(net(images) / 16, torch.tensor([1, 2])).backward()
    for got, want in zip(model.parameters(), wide.parameters()):
        assert got.grad.dtype == torch.bfloat16
        assert (got.grad.float() - want.grad).norm() < 0.02 * want.grad.norm()


@pytest.mark.parametrize('architecture', ['VGG5', 'RESNET6'])
def test_an_empty_batch_has_no_outputs(architecture):
    model, x = network(architecture, dataset='DIGITS', timesteps=14), torch.zeros(0, 1, 8, 8)
    logits = model(x)
    assert logits.shape == (0, 10) and model.curve(x, [1, 14]).shape == (2, 0, 10)
    logits.sum().backward()


def test_runs_under_autocast():
    model = fill(network('RESNET6', dataset='DIGITS', timesteps=14), 3).eval()
    x = ternary((4, 1, 8, 8), 5, 1.25, low=0).float()
    model.threshold_update(0.7, find_thresholds(model, x, 14))
    exact = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        logits = model(x)
    logits.sum().backward()
    assert logits.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert 0 < (logits - exact).norm() < 0.3 * exact.norm()


def fits(architecture, shape):
    halvings = int(math.log2(min(shape[1:])))
    pools = {'VGG5': 2}.get(architecture, 4) + (shape[1] >= 224)
    return not architecture.startswith('VGG') or pools <= halvings


SHAPES = ['MNIST', 'CIFAR10', 'DIGITS']


@pytest.mark.parametrize('dataset', SHAPES)
@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_every_network_on_every_shape(architecture, dataset):
    shape = INPUT_SHAPES[dataset]
    options = dict(dataset=dataset, labels=7)
    if not fits(architecture, shape):
        for build in (ann, network):
            with pytest.raises(ValueError, match=f'{architecture} halves the image . times'):
                build(architecture, **options)
        return
    dense = ann(architecture, **options)
    spiking = network(architecture, **options, timesteps=3, default_threshold=0.1)
    x = torch.rand(2, *shape)
    assert dense(x).shape == (2, 7)
    dense(x).sum().backward()
    spiking.network_update(spiking.depth + 1, 1.0)  # as few steps as reach the output
    logits = spiking(x)
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert spiking.state_dict().keys() == dense.state_dict().keys() | {'thresholds', 'leaks'}
    spiking.load_state_dict(dense.state_dict())


@pytest.mark.parametrize('architecture', ['VGG9', 'RESNET6'])
def test_imagenet_shape(architecture):
    dense = ann(architecture, dataset='IMAGENET', labels=5)
    spiking = network(architecture, dataset='IMAGENET', labels=5, default_threshold=0.1)
    x = torch.rand(1, 3, 224, 224)
    assert dense(x).shape == (1, 5)
    spiking.network_update(spiking.depth + 1, 1.0)
    logits = spiking(x)
    logits.sum().backward()
    assert logits.shape == (1, 5)
    assert spiking.state_dict().keys() == dense.state_dict().keys() | {'thresholds', 'leaks'}


@pytest.fixture
def narrow(monkeypatch):
    """Every architecture with a few channels only: its pools and strides as they are, a hundredth of the work."""
    monkeypatch.setattr(layers, 'VGG_LAYOUTS', {
        name: [item if item == 'A' else 3 for item in layout] for name, layout in layers.VGG_LAYOUTS.items()})
    monkeypatch.setattr(layers, 'VGG_HIDDEN', 12)
    monkeypatch.setattr(layers, 'RESNET_STAGES', [(3 + i, stride) for i, (_, stride) in enumerate(RESNET_STAGES)])
    original = layers.conv
    monkeypatch.setattr(layers, 'conv', lambda inputs, outputs, *more: original(
        *(3 if size == 64 else size for size in (inputs, outputs)), *more))


# From the smallest to 40: each way in which sizes can halve to 1, with odd and even ones between; not square too.
SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 19, 22, 23, 24, 25, 31, 32, 33, 39, 40]


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_every_image_size_that_builds_trains(architecture, narrow):
    sizes = SIZES[::3] if architecture in ('RESNET20', 'RESNET34') else SIZES  # whose strides are those of RESNET12
    built, learning = 0, []
    for number, size in enumerate(sizes):
        shape, activation = (3, size, size + (0, 3)[number % 2]), ('STDB', 'Linear')[number // 2 % 2]
        try:
            model = network(architecture, input_shape=shape, activation=activation, gamma=0.9, alpha=0.9, beta=0.1)
        except ValueError as error:
            assert re.search('too often|2x2 pixels', str(error))
            continue
        built += 1
        model = fill(model.double(), number).eval()
        model.network_update(model.depth + 2, 0.9)
        model.threshold_update(1.0, [0.05 if activation == 'STDB' else 0.5] * len(model.thresholds))
        x, labels = ternary((2, *shape), number, 1.25), torch.tensor([1, 7])
        F.cross_entropy(model(x), labels).backward()
        got = {name: p.grad for name, p in model.named_parameters()}
        assert all(grad.isfinite().all() for grad in got.values())
        model.zero_grad()
        F.cross_entropy(step_by_step.run(model, x)[0], labels).backward()
        if activation == 'STDB':  # whose gradient reaches every neuron that fired; Linear's those near their thresholds
            learning.append(all(p.grad.any() for p in model.parameters()))
        for name, p in model.named_parameters():
            assert (got[name] - p.grad).norm() <= 1e-9 * p.grad.norm(), (size, name)
    smallest = 2 if architecture.startswith('RESNET') else 4 if architecture == 'VGG5' else 16
    assert built == sum(size >= smallest for size in sizes)
    assert sum(learning) > len(learning) / 2


@pytest.mark.parametrize('part', ['weight', 'potential'])
@pytest.mark.parametrize('architecture', ['VGG5', 'RESNET6'])
def test_a_potential_that_is_not_finite_is_not_taken_for_silence(architecture, part):
    # NaN exceeds no threshold: such a neuron never fires, and what comes behind it would look like a silent network
    model = fill(network(architecture, dataset='DIGITS', timesteps=14, default_threshold=0.3).double(), 3).eval()
    x = ternary((2, 1, 8, 8), 5, 1.25, low=0)
    assert model(x).isfinite().all() and model(x).abs().max() > 0
    with torch.no_grad():
        if part == 'weight':
            model.get_submodule(model.layer_names[1]).weight[0, 0] = math.nan
        else:  # finite weights whose products are not
            model.get_submodule(model.layer_names[1]).weight[0] = 1e308
    assert model(x).isnan().all() and model.curve(x, [8, 14]).isnan().all()
    assert [bool(record.spikes.fault.isnan()) for record in model.record(x)][:2] == [False, True]


@pytest.mark.parametrize('architecture, names', [
    ('VGG5', ['features.0', 'features.3', 'features.6', 'classifier.0', 'classifier.3', 'classifier.6']),
    ('VGG9', ['features.0', 'features.3', 'features.6', 'features.9', 'features.12', 'features.15', 'features.18',
              'classifier.0', 'classifier.3', 'classifier.6']),
    ('RESNET6', ['pre_process.0', 'pre_process.3', 'pre_process.6', 'layer1.0.residual.0', 'layer1.0.residual.3',
                 'layer2.0.residual.0', 'layer2.0.residual.3', 'layer2.0.identity.0', 'classifier.0'])])
def test_published_parameter_names(architecture, names):
    # written down from DESIGN's rule: conv, ReLU, dropout and pool count, a dropout before a pool is left out
    assert list(ann(architecture).state_dict()) == [f'{name}.weight' for name in names]


def test_initial_weights():
    torch.manual_seed(0)
    model = VGG('VGG5')
    assert model.features[3].weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
    assert model.classifier[0].weight.std().item() == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize('options, message', [
    ({'timesteps': 0}, 'timesteps'), ({'timesteps': 2.5}, 'timesteps'), ({'leak': 0}, 'leak'), ({'leak': 1.1}, 'leak'),
    ({'default_threshold': 0}, 'threshold'), ({'default_threshold': math.nan}, 'threshold'),
    ({'activation': 'ReLU'}, 'activation'), ({'dataset': 'SVHN'}, 'data set')])
def test_values_that_make_no_network(options, message):
    with pytest.raises(ValueError, match=message):
        network('VGG5', **options)


def test_unknown_architecture():
    for build in (lambda: VGG('VGG7'), lambda: ResNet('RESNET18'), lambda: network('VGG7'), lambda: network('RES')):
        with pytest.raises(ValueError, match='unknown architecture'):
            build()


def test_threshold_update():
    model = network('RESNET6', default_threshold=2.0)
    given = [1.0, 2.0, 3.0]
    model.threshold_update(0.5, given)
    assert model.thresholds.tolist() == [0.5, 1.0, 1.5] + [2.0] * 4
    assert given == [1.0, 2.0, 3.0]  # the published code emptied the list
    model.threshold_update(1.0, range(1, 8))
    assert model.thresholds.tolist() == [1, 2, 3, 4, 5, 6, 7]
    for bad in ([1.0, 2.0], [1.0, 0.0, 1.0], [1.0, -1.0, 1.0], [1.0, math.inf, 1.0]):
        with pytest.raises(ValueError, match='threshold'):
            model.threshold_update(1.0, bad)
    assert model.thresholds.tolist() == [1, 2, 3, 4, 5, 6, 7]
