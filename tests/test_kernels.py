"""The Triton kernels against the plain scans; without a GPU under Triton's interpreter."""
import os

import pytest
import torch

from conftest import fill, ternary
from self_models import RESNET_SNN_STDB, VGG_SNN_STDB, LIFParameters, find_thresholds
from self_models.lif import lif_backward, lif_forward, surrogate_state
from self_models.surrogate import SURROGATES

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
if DEVICE == 'cpu':
    os.environ['TRITON_INTERPRET'] = '1'  # read when the kernels are imported, which their first use does
pytest.importorskip('triton')

pytestmark = pytest.mark.usefixtures('small_classifiers')


def both(steps, neurons, dtype=torch.float64, **options):
    """(torch, triton), of each: potentials, spikes and gradient of the currents of one run, and its last state."""
    values = {'threshold': 0.7, 'leak': 0.9, 'surrogate': SURROGATES['STDB'](beta=0.04), **options}
    results = []
    for backend in ('torch', 'triton'):
        generator = torch.Generator().manual_seed(steps)
        current, grad = (torch.randn(steps, neurons, dtype=torch.float64, generator=generator).to(DEVICE, dtype)
                         for _ in range(2))
        neuron = LIFParameters(**values, backend=backend)
        # rows apart from one another, as those of a few samples among many are
        fired = torch.zeros(steps, neurons + 5, dtype=torch.bool, device=DEVICE)
        state = lif_forward(current, fired[:, 2:neurons + 2], neuron, potentials=current)
        lif_backward(grad, surrogate_state(current, neuron), 3, neuron)
        results.append((current, fired, grad, *state))
    return results


@pytest.mark.parametrize('steps, neurons', [(1, 1), (1, 300), (7, 256), (40, 513)])
@pytest.mark.parametrize('options', [{}, {'leak': 1.0}, *({'surrogate': kind()} for kind in SURROGATES.values())])
def test_against_the_plain_scans(steps, neurons, options):
    plain, fused = both(steps, neurons, **options)
    assert torch.equal(plain[1], fused[1])  # the spikes, and nothing beside them
    for want, got in zip(plain, fused, strict=True):
        assert torch.allclose(want.double(), got.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', ['Gaussian', 'Inverse'])
def test_surrogates_of_ones_own_against_the_plain_scans(name, own_classes):
    for want, got in zip(*both(7, 300, surrogate=SURROGATES[name]()), strict=True):
        assert torch.allclose(want.double(), got.double(), rtol=1e-12, atol=1e-12)


def test_float32_is_close_to_float64():
    (_, fired, grad, *_), _ = both(30, 400)
    _, (potentials32, fired32, grad32, *_) = both(30, 400, dtype=torch.float32)
    same = (fired == fired32).all(0)[2:402]  # a potential at the threshold may round to either side
    assert potentials32.dtype == torch.float32 and same.float().mean() > 0.99
    assert torch.allclose(grad32[:, same].double(), grad[:, same], rtol=1e-4, atol=1e-5)


def test_currents_with_gaps():
    current = torch.randn(12, 100, dtype=torch.float64, device=DEVICE)[:, ::2]  # as of a slice in a network
    plain, fused = torch.zeros(2, 12, 50, dtype=torch.bool, device=DEVICE)
    for backend, spikes in (('torch', plain), ('triton', fused)):
        lif_forward(current, spikes, LIFParameters(0.7, 0.9, SURROGATES['STDB'](), backend))
    assert torch.equal(plain, fused) and plain.any()


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_spikes_as_floats(dtype):
    current = torch.randn(12, 50, dtype=torch.float64, device=DEVICE)
    plain, fused = torch.empty(2, 12, 50, dtype=dtype, device=DEVICE)
    for backend, spikes in (('torch', plain), ('triton', fused)):
        lif_forward(current, spikes, LIFParameters(0.7, 0.9, SURROGATES['STDB'](), backend))
    assert torch.equal(plain, fused) and plain.any()


def test_state_goes_on_from_call_to_call():
    neuron = LIFParameters(0.7, 0.9, SURROGATES['STDB'](beta=0.04), 'triton')
    current = torch.randn(12, 50, dtype=torch.float64, device=DEVICE)
    fired = torch.zeros(12, 50, dtype=torch.bool, device=DEVICE)
    whole = current.clone()
    lif_forward(whole, fired, neuron, potentials=whole)
    state = lif_forward(current[:5], fired[:5], neuron, potentials=current[:5])
    lif_forward(current[5:], fired[5:], neuron, state, potentials=current[5:])
    assert torch.equal(whole, current)


@pytest.mark.parametrize('kind, architecture, activation', [
    *((VGG_SNN_STDB, 'VGG5', activation) for activation in ('STDB', 'Linear', 'ATan')),
    *((RESNET_SNN_STDB, 'RESNET6', activation) for activation in ('STDB', 'Linear'))])
def test_networks_agree(kind, architecture, activation):
    results = []
    x = ternary((2, 1, 8, 8), 5, 1.25, low=0).to(DEVICE)
    for backend in ('torch', 'triton'):
        model = fill(kind(architecture, activation=activation, dataset='DIGITS', timesteps=12, backend=backend,
                          default_threshold=0.5, width=3.0).double(), 3).to(DEVICE)
        thresholds = find_thresholds(model, x, 12)
        model.threshold_update(0.7, thresholds)
        model.eval()
        model(x).logsumexp(1).sum().backward()
        results.append([torch.tensor(thresholds), model(x).detach(), *(p.grad for p in model.parameters())])
    for want, got in zip(*results, strict=True):
        assert want.abs().max() > 0
        assert torch.allclose(want, got, rtol=1e-9, atol=1e-12 * want.abs().max().item())


def test_unknown_backend():
    with pytest.raises(ValueError, match="choose 'torch' or 'triton'"):
        VGG_SNN_STDB('VGG5', backend='cupy')
