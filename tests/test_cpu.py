"""Convolutions of small maps as products over patches, beside torch's own convolutions, in float64."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from self_models import VGG, cpu
from self_models.layers import conv

CPU = torch.device('cpu')


@pytest.mark.parametrize('kernel_size', [1, 3, 5])
@pytest.mark.parametrize('height, width', [(1, 1), (2, 2), (1, 3), (4, 4), (2, 8)])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_they_are_convolutions(kernel_size, height, width, layout):
    ours = conv(3, 5, kernel_size, bias=True).double().to(memory_format=layout)
    nn.init.normal_(ours.bias)
    x = torch.randn(4, 3, height, width, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    assert cpu.takes_patches(ours, x.shape[1:], CPU)
    want = F.conv2d(x, ours.weight, ours.bias, padding=kernel_size // 2)
    down = torch.randn_like(want)
    given = (x, ours.weight, ours.bias)
    for got, expected in zip((ours(x), *torch.autograd.grad(ours(x), given, down)),
                             (want, *torch.autograd.grad(want, given, down)), strict=True):
        assert got.shape == expected.shape and torch.allclose(got, expected, atol=1e-12)


def test_second_derivatives_and_empty_batches():
    layer, x = conv(2, 3, 3).double(), torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, weight: torch.func.functional_call(layer, {'weight': weight}, (x,)),
                                        (x, layer.weight))
    assert layer(x[:0]).shape == (0, 3, 3, 3)


def test_an_ann_of_small_maps_under_the_transforms_of_torch_func():
    ann, x = VGG('VGG5', dataset='DIGITS').double().eval(), torch.rand(3, 1, 8, 8, dtype=torch.float64)
    given = dict(ann.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(ann, parameters, (x,)).pow(2).sum()

    loss(given, x).backward()
    for name, grad in torch.func.grad(loss)({name: value.detach() for name, value in given.items()}, x).items():
        assert torch.allclose(grad, given[name].grad)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(
        {name: value.detach() for name, value in given.items()}, x[:, None])  # the gradient of each image
    assert torch.allclose(each['classifier.0.weight'].sum(0), given['classifier.0.weight'].grad)


@pytest.mark.parametrize('layer, shape, device, answer', [
    (conv(3, 5, 3), (3, 4, 4), 'cpu', True), (conv(3, 5, 3), (3, 5, 4), 'cpu', False),
    (conv(3, 5, 3, stride=2), (3, 4, 4), 'cpu', False), (nn.Conv2d(3, 5, 3), (3, 4, 4), 'cpu', False),
    (conv(3, 5, 3), (3, 4, 4), 'cuda', False), (nn.Linear(48, 5), (48,), 'cpu', False),
    (None, (3, 4, 4), 'cpu', False)])
def test_where_they_are_taken(layer, shape, device, answer):
    assert cpu.takes_patches(layer, shape, torch.device(device)) is answer


@pytest.mark.parametrize('pixels', [4, 5])  # with patches and without
def test_autocast_lowers_them_as_others(pixels):
    layer, x = conv(3, 5, 3, bias=True), torch.randn(2, 3, pixels, pixels)
    with torch.autocast('cpu', torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert torch.allclose(output.float(), layer(x), atol=0.1)
    with torch.autocast('cpu', torch.bfloat16):
        assert layer.double()(x.double()).dtype == torch.float64
