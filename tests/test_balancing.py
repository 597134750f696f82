"""Threshold balancing."""
import copy
from unittest import mock

import pytest
import torch

import self_models.threshold_balancing as balancing
import step_by_step
from conftest import fill, ternary
from self_models import RESNET_SNN_STDB, VGG_SNN_STDB, find_thresholds

pytestmark = pytest.mark.usefixtures('small_classifiers')


def vgg5(**options):
    return fill(VGG_SNN_STDB('VGG5', dataset='DIGITS', **options).double(), 4)


@pytest.mark.parametrize('build, scale', [
    (vgg5, 1.0), (lambda: fill(RESNET_SNN_STDB('RESNET6', dataset='DIGITS').double(), 4), 1.25)])
def test_against_one_layer_after_another(build, scale):
    model = build()
    x = ternary((6, 1, 8, 8), 1, scale, low=0)
    want = step_by_step.find_thresholds(model, x, 30)
    assert find_thresholds(model, x, 30) == pytest.approx(want, rel=1e-9)
    assert len(want) == (5 if scale == 1.0 else 3)


@pytest.mark.parametrize('percentile', [99.7, 97, 100])
def test_a_percentile_of_the_currents(percentile):
    # the first to 1 / 32768 of the largest; a hair's difference there moves single spikes in the layers behind
    model, x = vgg5(), ternary((9, 1, 8, 8), 1, low=0)
    want = step_by_step.find_thresholds(model, x, 30, percentile)
    found = find_thresholds(model, x, 30, percentile=percentile)
    assert found[0] == pytest.approx(want[0], rel=1e-4) and found[:3] == pytest.approx(want[:3], rel=5e-3)
    assert found[3:] == pytest.approx(want[3:], rel=1e-2)  # of 64 neurons each
    assert (found[0] < find_thresholds(model, x, 30)[0]) == (percentile < 100)


def test_a_percentile_by_hand():
    # 0.1, 0.2 ... 1.0 in any order and blocks: the 1 + round(0.75 * 9) = 8th, found from above to 2 / BINS of 1.0
    values = torch.tensor([3, 7, 1, 10, 2, 9, 4, 8, 5, 6]).view(2, 5) / 10

    def current(group, first, stop):
        return values[group, first:stop]

    pieces, bar = balancing.Pieces([slice(0, 1), slice(1, 2)], [(0, 2), (2, 5)]), mock.Mock()
    found = {p: balancing.current_percentile(current, pieces, p, bar) for p in (75, 99.9, 1)}
    for p, want in ((75, 0.8), (99.9, 1.0), (1, 0.1)):
        assert want - 1e-6 <= found[p] <= want + 2 / balancing.BINS
    values -= 0.85  # two are above 0
    assert balancing.current_percentile(current, pieces, 75, bar) == 0
    values[1, 4] = torch.nan
    assert balancing.current_percentile(current, pieces, 75, bar) == float('inf')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('percentile', [99, 50])
def test_a_percentile_of_a_narrow_type(dtype, percentile):
    # 5000 values, which neither type counts to; all are multiples of 1 / 64 below 2, which both hold
    values = (torch.randperm(5000) % 128).view(2, 2500) / 64
    pieces = balancing.Pieces([slice(0, 1), slice(1, 2)], [(0, 1000), (1000, 2500)])
    found = balancing.current_percentile(lambda group, first, stop: values[group, first:stop].to(dtype), pieces,
                                         percentile, mock.Mock())
    want = values.flatten().sort().values[round(percentile / 100 * 4999)].item()
    assert want - 1e-6 <= found <= want + 4 / balancing.BINS


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_thresholds_of_a_network_of_a_narrow_type(dtype):
    model, x = vgg5(delay=0).to(dtype), ternary((9, 1, 8, 8), 1, low=0).to(dtype)
    wide = copy.deepcopy(model).float()  # of the same weights
    for percentile, layers in ((100, 1), (99, 5), (60, 5)):  # one extreme says little of the layers behind
        found = find_thresholds(model, x, 30, percentile=percentile)
        want = find_thresholds(wide, x.float(), 30, percentile=percentile)
        assert found[:layers] == pytest.approx(want[:layers], rel=0.02), percentile


@pytest.mark.slow
def test_groups_blocks_and_files_do_not_change_the_result(monkeypatch):
    model, x = vgg5(), ternary((40, 1, 8, 8), 1, low=0)
    want = step_by_step.find_thresholds(model, x, 25)
    monkeypatch.setattr(balancing, 'SPOOL_BYTES', 1000)   # spikes go to a temporary file
    monkeypatch.setattr(balancing, 'CHUNK_BYTES', {'cpu': 200_000})  # a few steps at a time
    assert find_thresholds(model, x, 25) == pytest.approx(want, rel=1e-9)
    want = step_by_step.find_thresholds(model, x, 25, 99)
    assert find_thresholds(model, x, 25, percentile=99) == pytest.approx(want, rel=1e-2)


@pytest.mark.slow
def test_memory_grows_neither_with_images_nor_with_steps(monkeypatch):
    model, x = vgg5(), ternary((40, 1, 8, 8), 1, low=0)
    sizes, original = [], balancing.SynapticInput.output

    def output(synapse, spikes, *weights):
        found = original(synapse, spikes, *weights)
        sizes.append(spikes.nbytes + found.nbytes)
        return found

    monkeypatch.setattr(balancing.SynapticInput, 'output', output)
    # the largest convolution takes and gives 64 * 64 + 64 values of 8 bytes: 33 kB an image and step
    monkeypatch.setattr(balancing, 'BLOCK_BYTES', 200_000)
    monkeypatch.setattr(balancing, 'CHUNK_BYTES', {'cpu': 100_000})
    find_thresholds(model, x, 24)
    assert max(sizes) <= 200_000


def test_by_hand_on_the_first_layer():
    model, x = vgg5(), ternary((2, 1, 8, 8), 1, low=0)
    assert find_thresholds(model, x, 12)[0] == pytest.approx(model.features[0](x).max().item())


def test_leaves_the_model_at_the_thresholds_and_else_as_it_was():
    model = vgg5(timesteps=17, leak=0.9, dropout=0.5).train()
    x = ternary((2, 1, 8, 8), 1, low=0)
    found = find_thresholds(model, x, 12)
    assert model.thresholds.tolist() == found and all(isinstance(value, float) for value in found)
    assert (model.timesteps, model.leak, model.training) == (17, 0.9, True)
    assert found == find_thresholds(model.eval(), x, 12)  # no dropout, whatever the mode


def test_resnet_blocks_keep_the_default_threshold():
    model = fill(RESNET_SNN_STDB('RESNET6', dataset='DIGITS', default_threshold=0.75).double(), 4)
    find_thresholds(model, ternary((2, 1, 8, 8), 1, 1.25, low=0), 12)
    assert model.thresholds[3:].tolist() == [0.75] * 4


def test_layers_that_get_no_spike_or_no_current_are_named():
    model, x = vgg5(), ternary((2, 1, 8, 8), 1, low=0)
    # at a threshold that is its largest current, a layer fires on its third step at the earliest: the first at t = 2,
    # the second at t = 4
    with pytest.raises(balancing.DeadLayerError, match=r'features\.3 never receives a spike within 2 time steps'):
        find_thresholds(model, x, 2)
    with pytest.raises(balancing.DeadLayerError, match=r'features\.6 never receives a spike within 4 time steps'):
        find_thresholds(model, x, 4)
    with torch.no_grad():
        model.features[3].weight.abs_().neg_()
    with pytest.raises(balancing.DeadLayerError, match=r'features\.3 has an input of 0.0 at most'):
        find_thresholds(model, x, 12)
    with pytest.raises(balancing.DeadLayerError, match=r'features\.0'):
        find_thresholds(model, torch.zeros(2, 1, 8, 8, dtype=torch.float64), 12)
    assert model.timesteps == 100  # restored after the error
    with pytest.raises(ValueError, match='timesteps'):
        find_thresholds(model, x, 0)
    for images in (x[:0], x[0], x.to(torch.uint8)):
        with pytest.raises(ValueError, match='images must be floats'):
            find_thresholds(model, images, 12)
    for percentile in (0, 100.1, float('nan')):
        with pytest.raises(ValueError, match='percentile'):
            find_thresholds(model, x, 12, percentile=percentile)
    with pytest.raises(balancing.DeadLayerError, match=r'features\.0 .*0\.1th percentile is not above 0.*higher'):
        find_thresholds(model, x, 12, percentile=0.1)
    with torch.no_grad():
        model.features[0].weight[0] = torch.nan
    with pytest.raises(balancing.DeadLayerError, match=r'features\.0 has an input of inf'):
        find_thresholds(model, x, 12)
    assert model.timesteps == 100


def test_a_poisson_input_gives_the_published_estimate():
    # theta of the first layer: the largest W x over the draws; with many draws close to that of x = 1 everywhere
    torch.manual_seed(0)
    model, x = vgg5(), torch.full((4, 1, 8, 8), 0.9, dtype=torch.float64)
    bound = model.features[0].weight.clamp(min=0).sum((1, 2, 3)).max().item()
    theta = find_thresholds(model, x, 200)[0]
    assert 0.6 * bound < theta <= bound
