"""Dropout: what nn.Dropout promises, with a mask that is drawn in another way."""
import math

import pytest
import torch

from self_models.cpu import Dropout


@pytest.mark.parametrize('p', [0.1, 0.5, 0.9])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_values_are_dropped_with_probability_p_and_the_others_scaled(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(8, 32, 15, 17, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    y = Dropout(p)(x)
    assert (y.shape, y.dtype, y.stride()) == (x.shape, dtype, x.stride())
    assert set(y.unique().tolist()) == {0, torch.tensor(1 / (1 - p), dtype=dtype).item()}
    kept = (y > 0).flatten(0, 1).double()
    assert kept.mean().item() == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p) / kept.numel()))
    # each value has a draw of its own: neighbours, and those that share 64 bits, agree as often as chance has it
    flat = (y.permute(0, 2, 3, 1).flatten() > 0)
    for distance in (1, 2, 3, 4):
        alike = (flat[:-distance] == flat[distance:]).double()
        assert alike.mean().item() == pytest.approx(p * p + (1 - p) ** 2, abs=3 / math.sqrt(alike.numel()))
    y.sum().backward()
    assert torch.equal(x.grad, y)  # of ones


def test_what_nothing_is_dropped_of():
    x = torch.rand(5, 7)
    assert Dropout(0.5).eval()(x) is x and Dropout(0.0)(x) is x
    assert not Dropout(1.0)(x).any()
    assert Dropout(1 - 2 ** -20)(torch.ones(10000)).count_nonzero() < 10  # p is rounded, never up to 1


def test_the_seed_decides():
    x, masks = torch.ones(1001), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(Dropout(0.5)(x))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
