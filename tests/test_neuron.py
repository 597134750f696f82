"""The neuron, by hand and against plain autograd."""
import math

import pytest
import torch

from conftest import fill, network
from self_models import STDB, LIFParameters, LinearSpike, PoissonGenerator, Surrogate, find_thresholds
from self_models.lif import lif_backward, lif_forward, surrogate_state
from self_models.surrogate import SURROGATES


def make(threshold=1.0, leak=1.0, activation='STDB', **flags):
    return LIFParameters(threshold, leak, SURROGATES[activation](**flags))


def potentials_and_spikes(current, neuron, dtype=torch.float64):
    u = torch.tensor(current, dtype=dtype).view(-1, 1)
    fired = torch.empty(u.shape, dtype=torch.bool)
    lif_forward(u, fired, neuron, potentials=u)
    return u.flatten().tolist(), fired.int().flatten().tolist()


def test_integrate_and_fire_by_hand():
    # theta 1: u = .6, 1.2 (fires next), 1.2 + .6 - 1 = .8, 1.4 (fires), .9 - .5 ...
    u, fired = potentials_and_spikes([0.6, 0.6, 0.6, 0.6, 0.1, 0.0], make())
    assert u == pytest.approx([0.6, 1.2, 0.8, 1.4, 0.5, 0.5])
    assert fired == [0, 1, 0, 1, 0, 0]


def test_leak_and_soft_reset_by_hand():
    # theta 2, leak 1/2: u = 3 (fires), 1.5 + 2 - 2 = 1.5, .75 + 2 = 2.75 (fires), 1.375 - 2 = -.625
    u, fired = potentials_and_spikes([3, 2, 2, 0], make(threshold=2.0, leak=0.5))
    assert u == [3, 1.5, 2.75, -0.625]
    assert fired == [1, 0, 1, 0]


def test_a_potential_equal_to_the_threshold_does_not_fire():
    assert potentials_and_spikes([0.7, 0.0], make(threshold=0.7))[1] == [0, 0]


def test_state_carries_a_scan_over_a_cut():
    current = torch.randn(40, 7, dtype=torch.float64)
    whole, fired = current.clone(), torch.empty(40, 7, dtype=torch.bool)
    lif_forward(whole, fired, make(leak=0.9), potentials=whole)
    first, second = current[:23].clone(), current[23:].clone()
    part = torch.empty(40, 7, dtype=torch.bool)
    state = lif_forward(first, part[:23], make(leak=0.9), potentials=first)
    lif_forward(second, part[23:], make(leak=0.9), state, potentials=second)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(part, fired) and fired.any()


@pytest.mark.parametrize('delay', [0, 1])
def test_spikes_as_floats(delay):
    neuron = make(0.7, 0.9)._replace(delay=delay, initial_potential=0.5)
    for current in (torch.randn(20, 7, dtype=torch.float64), torch.rand(7, dtype=torch.float64)):
        fired = torch.empty(20, 7, dtype=torch.bool)
        u, _ = lif_forward(current, fired, neuron)
        for dtype in (torch.float64, torch.float32):
            spikes = torch.full((20, 7), torch.nan, dtype=dtype)
            last, before = lif_forward(current, spikes, neuron)
            assert torch.equal(spikes, fired.to(dtype)) and torch.equal(before, fired[-1].double()) and fired.any()
            assert torch.equal(last, u)


def test_stdb_gradient_by_hand():
    z = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    spikes = STDB.apply(z, torch.tensor([1.0, 10.0, 200.0]), 0.5, 0.1)
    assert spikes.tolist() == [0, 0, 1]
    spikes.sum().backward()
    assert z.grad.tolist() == pytest.approx([0.5 * math.exp(-0.1), 0.5 * math.exp(-1), 0.5 * math.exp(-20)])


def test_stdb_does_not_underflow_where_the_published_code_did():
    dt = torch.tensor([150.0])
    assert (torch.exp(-dt) ** 0.01).item() == 0
    z = torch.zeros(1, requires_grad=True)
    STDB.apply(z, dt, 0.3, 0.01).backward()
    assert z.grad.item() == pytest.approx(0.3 * math.exp(-1.5))


def test_linear_gradient_by_hand():
    z = torch.tensor([-1.5, -1.0, -0.25, 0.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    LinearSpike.apply(z, 0.4).sum().backward()
    assert z.grad.tolist() == pytest.approx([0, 0, 0.3, 0.4, 0.2, 0])
    z.grad = None
    LinearSpike.apply(z, torch.full_like(z, 7)).sum().backward()  # as published, with the steps since the last spike
    assert z.grad.tolist() == pytest.approx([0, 0, 0.225, 0.3, 0.15, 0])


@pytest.mark.parametrize('activation', ['STDB', 'Linear'])
def test_surrogates_have_their_published_defaults(activation):
    z = torch.zeros(1, requires_grad=True)
    (STDB.apply(z, torch.zeros(1)) if activation == 'STDB' else LinearSpike.apply(z)).backward()
    assert z.grad.item() == pytest.approx(0.3)


def test_stdb_gradient_of_a_layer_by_hand():
    # one neuron, theta 2, leak 1/2; fires in rows 0 and 2 (see above), first row at step 1
    neuron = make(threshold=2.0, leak=0.5, alpha=1.0, beta=0.1)
    fired = torch.tensor([[True], [False], [True], [False]])
    # steps 1, 2, 3, 4; last earlier spike at -999, 1, 1, 3
    expected = [math.exp(-0.1 * dt) for dt in (1000, 1, 2, 1)]
    grad = torch.full((4, 1), neuron.height, dtype=torch.float64)  # alpha / theta
    lif_backward(grad, fired, 1, neuron)
    want, carried = [], 0.0
    for value in reversed(expected):
        carried = 0.5 * carried + value / 2
        want.insert(0, carried)
    assert grad.flatten().tolist() == pytest.approx(want)


def test_the_factor_of_linear_by_hand():
    potentials = torch.tensor([[0.0, 1.0, 2.0, 3.0, 5.0]])
    assert surrogate_state(potentials, make(2.0, activation='Linear')).tolist() == [[0, 0.5, 1, 0.5, 0]]


@pytest.mark.parametrize('activation, width, want', [  # at z of -3, -1/2, 0, 1/4, 1/2, 1
    ('Rectangle', 1.0, [0, 0, 1, 1, 0, 0]), ('Rectangle', 4.0, [0, 1, 1, 1, 1, 1]),
    ('ATan', 4 / math.pi, [1 / 37, 1 / 2, 1, 4 / 5, 1 / 2, 1 / 5]),  # 1 / (1 + (2 z)^2)
    ('FastSigmoid', 2.0, [1 / 49, 1 / 4, 1, 4 / 9, 1 / 4, 1 / 9]),
    # sigmoid(z log 9) = 9^z / (1 + 9^z)
    ('Sigmoid', math.log(9), [4 * 729 / 730 ** 2, 3 / 4, 1, 4 * 3 ** 0.5 / (1 + 3 ** 0.5) ** 2, 3 / 4, 4 * 9 / 100])])
def test_factors_of_z_by_hand(activation, width, want):
    neuron = make(threshold=2.0, activation=activation, width=width, gamma=0.5)
    z = torch.tensor([[-3, -0.5, 0, 0.25, 0.5, 1]], dtype=torch.float64)
    potentials = 2 * (z + 1)
    assert surrogate_state(potentials, neuron).flatten().tolist() == pytest.approx(want, rel=1e-12)
    assert neuron.surrogate.gradient(z).flatten().tolist() == pytest.approx([value / 2 for value in want], rel=1e-12)
    assert neuron.height == 0.25  # gamma / theta
    assert torch.equal(potentials, 2 * (z + 1)) and z[0, 0] == -3  # as they were


@pytest.mark.parametrize('activation', SURROGATES)
def test_far_from_the_threshold_a_factor_is_finite(activation):
    far = torch.tensor([1e3, 1e20, 3e38])
    if activation == 'STDB':  # of delta_t: 0.3 exp(-0.01 delta_t)
        assert SURROGATES[activation](alpha=0.3, beta=0.01).gradient(far).tolist() == pytest.approx(
            [0.3 * math.exp(-10), 0, 0], rel=1e-5)
        return
    factors = SURROGATES[activation](width=3.0).gradient(far * torch.tensor([[1], [-1]]))
    assert factors.isfinite().all() and factors.max() < 1e-3 and torch.equal(*factors)


def test_stdb_over_time_is_its_factor_of_the_steps_since_the_last_spike():
    surrogate = SURROGATES['STDB'](alpha=0.5, beta=0.07)
    spikes = torch.rand(20, 50, generator=torch.Generator().manual_seed(0)) < 0.2
    first, second = torch.randn(20, 50, dtype=torch.float64).expand(2, 20, 50).clone()
    surrogate.multiply(first, spikes, 3)
    Surrogate.multiply(surrogate, second, spikes, 3)  # step by step, for any factor of the spikes
    assert torch.allclose(first, second, rtol=1e-12)


def test_a_class_that_is_no_surrogate_is_refused(own_classes):
    surrogate, encoding = own_classes
    for name, flags, said in (('Linear', {}, "there is a surrogate 'Linear' already"),
                              ('Steep', {'slope': 'steepness'}, r"unknown flags \['slope'\]: choose of alpha")):
        with pytest.raises(ValueError, match=said):
            type(name, (surrogate,), {'flags': flags})
    assert 'Steep' not in SURROGATES and SURROGATES['Linear'].__module__ == surrogate.__module__
    with pytest.raises(ValueError, match="there is an encoding 'direct' already"):
        type('Still', (encoding,), {}, name='direct')
    for width in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match='width must be above 0'):
            network('VGG5', activation='ATan', width=width)


def test_an_encoding_of_ones_own(own_classes):
    model = fill(network('VGG5', dataset='DIGITS', encoding='Alternating', timesteps=9).double(), 3)
    x = torch.tensor([-1, -0.25, 0, 0.5], dtype=torch.float64).repeat(2, 16).view(2, 1, 8, 8)
    train = model.encode(x, 3)
    want = torch.tensor([-1, 0, 0, 1], dtype=torch.float64).repeat(16).view(8, 8)
    for t, image in enumerate((want, 0 * want, want)):
        assert torch.equal(train.floats(slice(None), slice(t, t + 1), torch.float64)[0, 0], image)
    # the first threshold is the largest current of one step
    current = torch.nn.functional.conv2d(want.view(1, 1, 8, 8), model.features[0].weight, padding=1)
    assert find_thresholds(model, x, 60)[0] == pytest.approx(current.max().item())
    model.network_update(60, 1.0)
    assert model(x).any()


def test_poisson_keeps_sign_and_rate():
    torch.manual_seed(0)
    x = torch.tensor([-1.0, -0.25, 0.0, 0.5, 1.0]).repeat(20000, 1)
    for rate in (1.0, 0.9):
        spikes = PoissonGenerator(rate)(x)
        assert set(spikes.unique().tolist()) == {-1, 0, 1}
        assert torch.allclose(spikes.mean(0), rate * x[0], atol=0.02)
    assert torch.equal(PoissonGenerator()(x).abs()[:, [0, 4]], torch.ones(20000, 2))


def test_poisson_is_fresh_in_every_call():
    x = torch.full((1000,), 0.5)
    encoder = PoissonGenerator()
    assert not torch.equal(encoder(x), encoder(x))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_rates_of_a_narrow_type(dtype):
    x = torch.tensor([0.0005, 0.003, 0.3, 1]).to(dtype)
    spikes = PoissonGenerator()(x.expand(200000, 4))
    assert spikes.dtype == dtype
    p = x.double()
    spread = (p * (1 - p) / 200000).sqrt()
    assert ((spikes.double().mean(0) - p).abs() <= 5 * spread + 1e-12).all()
