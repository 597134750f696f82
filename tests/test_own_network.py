"""Any network as a spiking one: held to the ANN's own code run one step after another and to the layer-by-layer way;
and what has to be refused."""
import copy
import pickle
import re
import subprocess
import sys
import warnings
from typing import Annotated, NamedTuple

import numpy as np  # noqa: F401  for a text that is evaluated
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, prune

import self_models.layers as layers
import self_models.plain as plain_way
import self_models.threshold_balancing as balancing
import step_by_step
from conftest import ROOT, network, ternary
from self_models import QCFS, VGG, ResNet, convert, copy_weights, find_thresholds, fit_bounds, quantize, spiking
from self_models.architectures import RESNET_STAGES
from self_models.conversion import LayoutError, fold_channels
from self_models.layers import Scale
from self_models.threshold_balancing import DeadLayerError
from self_models.traced import compiled, trace

DIRECT = {'encoding': 'direct', 'delay': 0}
LEARNED = {'learn_threshold': True, 'learn_leak': True}
SHAPE = (2, 8, 8)


# -- networks ---------------------------------------------------------------------------------------------------------

class Net(nn.Module):
    """Modules by name, and the forward that calls them."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.way = forward

    def forward(self, x):
        return self.way(self, x)


def chain(*modules):
    return nn.Sequential(*modules)


def residual(n, x):
    x = n.relu(n.norm0(n.conv0(x)))
    y = n.norm2(n.conv2(n.relu(n.norm1(n.conv1(x)))))
    x = n.relu(y + x)  # one module, called three times
    return n.fc(x.mean((2, 3)))


def in_place(n, x):
    x = F.relu(n.conv0(x), inplace=True)
    y = n.conv1(x)
    y += x
    n.relu(y)  # what it gives is not taken: it changes y
    z = n.conv2(y).relu_()
    z = torch.relu_(z + y)
    return n.fc(z.flatten(1))


def dense(n, x):
    x = n.conv0(x)
    for norm, conv in ((n.norm1, n.conv1), (n.norm2, n.conv2)):
        x = torch.cat([x, conv(torch.relu(norm(x)))], 1)
    return n.fc(F.adaptive_avg_pool2d(n.norm3(x).relu(), 1).flatten(1))


def stem(n, x):
    raw = n.side(x)  # no activation on this way until it meets the others
    y = n.conv1(F.relu(n.conv0(x)))
    z = torch.cat((raw, y), dim=1)
    return n.fc(F.relu(n.conv2(z) + n.side2(raw) + x.mean(1, keepdim=True)).flatten(1)) + n.direct(x.flatten(1))


def views(n, x):
    b = x.size(0)
    x = F.relu(n.conv0(x))
    x = x.view(b, 4, -1).reshape(x.shape[0], 4, 8, 8).permute(0, 1, 3, 2).contiguous().transpose(2, 3)
    x = F.relu(n.conv1(x)).reshape((x.size()[0], -1)).unsqueeze(1).squeeze(1)
    x = F.relu(n.fc0(torch.reshape(x, (-1, 256))))
    return n.fc(torch.flatten(x.unflatten(1, (2, 4)), start_dim=1))


def shuffled(n, x):
    x = F.relu(n.conv0(x))
    a, b = x.chunk(2, dim=1)
    b = F.relu(n.conv1(b))
    x = torch.cat((a, b), 1)
    b, c, h, w = x.size()
    x = torch.transpose(x.view(b, 2, c // 2, h, w), 1, 2).contiguous().view(b, -1, h, w)
    first, second = torch.split(x, 2, 1)
    return n.fc((first - 0.5 * second).mean([2, 3]))


def arithmetic(n, x):
    x = (x - n.mean) / n.std
    x = F.relu(n.conv0(x) * n.scale + 0.1)
    x = 2 * F.relu(-n.conv1(x)) / 3 - x[:, :, :, :].neg()
    x = F.pad(x, (1, 0, 2, 1))
    x = F.interpolate(x, scale_factor=2)
    return F.linear(F.avg_pool2d(x, x.shape[2:]).flatten(1), n.fc.weight, n.fc.bias) @ n.turn


def frames(n, x):
    x = F.relu(n.conv0(x.view(-1, 1, 8, 8)))  # each channel is a sample
    return n.fc(F.relu(n.fc0(F.relu(n.conv1(x)).view(-1, 288))))


def names(n, x):
    raw = also = n.conv0(x)
    raw += 0.1  # which changes `also`
    y = F.relu(n.dim(F.relu(raw + also)).to(x.dtype) * (2 * n.mask))
    y = torch.cat([n.repeat(y), raw * torch.ones(1, 4, 1, 1, device=x.device, dtype=x.dtype)], axis=1)
    count = x.size(1)
    count *= 2
    y = F.relu(n.size(y)).mean(axis=(2, 3)) * (count / x.size(1))
    return F.linear(y, F.normalize(n.fc.weight), n.fc.bias)


def with_mask(net):
    net.register_buffer('mask', torch.tensor([0.7, 0.5, 1.0, 0.8]).view(4, 1, 1))
    return net


def with_tensors(net):
    net.register_buffer('mean', torch.tensor([0.2, -0.1]).view(1, 2, 1, 1))
    net.register_buffer('std', torch.tensor([0.5, 2.0]).view(1, 2, 1, 1))
    net.scale = nn.Parameter(torch.tensor([0.7, 1.3, 1.0, 0.8]).view(4, 1, 1))
    net.turn = nn.Parameter(torch.randn(5, 5))
    return net


def three(function=residual):
    return Net(function, conv0=nn.Conv2d(2, 4, 3, padding=1, bias=False), norm0=nn.BatchNorm2d(4),
               conv1=nn.Conv2d(4, 4, 3, padding=1, bias=False), norm1=nn.BatchNorm2d(4),
               conv2=nn.Conv2d(4, 4, 3, padding=1, bias=False), norm2=nn.BatchNorm2d(4, affine=False),
               relu=nn.ReLU(inplace=True), fc=nn.Linear(4, 5))


def mobile():
    """Depthwise and pointwise convolutions, dilated, strided, asymmetric and of even size."""
    return chain(nn.Conv2d(2, 4, (2, 3), stride=(1, 2), padding=(1, 0)), nn.BatchNorm2d(4), nn.ReLU(),
                 nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6),
                 nn.ReLU(True), nn.Conv2d(6, 6, 4, padding='same', groups=2, padding_mode='circular'), nn.ReLU(),
                 nn.ConvTranspose2d(6, 3, 2, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten(),
                 nn.Linear(18, 5))


def pooled():
    return chain(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False),
                 nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d((1, 2), (2, 1), ceil_mode=True),
                 nn.Conv2d(4, 4, 2, padding=1), nn.ReLU(), nn.AvgPool2d(2, divisor_override=3),
                 nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def max_pooled():
    return Net(lambda n, x: n.fc(F.max_pool2d(F.relu(n.conv1(n.pool(F.relu(n.conv0(x))))), 2).flatten(1)),
               conv0=nn.Conv2d(2, 4, 3, padding=1), pool=nn.MaxPool2d(3, 2, 1), conv1=nn.Conv2d(4, 4, 3, padding=1),
               fc=nn.Linear(16, 5))


def dropped():
    return Net(lambda n, x: n.fc(n.drop(F.relu(n.conv1(F.dropout2d(F.relu(n.conv0(n.first(x))), 0.3, n.training))))
                                 .flatten(1)), first=nn.Dropout(0.2), drop=nn.Dropout(0.4, inplace=True),
               conv0=nn.Conv2d(2, 4, 3, padding=1), conv1=nn.Conv2d(4, 4, 3, 2, padding=1), fc=nn.Linear(64, 5))


def one_dimension():
    return Net(lambda n, x: n.tail(n.head(x.flatten(2))), head=chain(
        nn.Conv1d(2, 4, 5, stride=3), nn.BatchNorm1d(4), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(4, 4, 3), nn.ReLU()),
        tail=chain(nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(),
                   nn.Linear(6, 5)))


def same_twice():
    """One block of layers, called twice, and weights that two layers share."""
    block = chain(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    net = Net(lambda n, x: n.fc(n.block(n.block(n.first(x)) + n.second(x)).flatten(1)), block=block,
              first=nn.Conv2d(2, 4, 3, padding=1), second=nn.Conv2d(2, 4, 3, padding=1), fc=nn.Linear(256, 5))
    net.second.weight = net.first.weight
    return net


OWN = {
    'residual': three,
    'in place': lambda: Net(in_place, conv0=nn.Conv2d(2, 4, 3, padding=1), conv1=nn.Conv2d(4, 4, 3, padding=1),
                            conv2=nn.Conv2d(4, 4, 3, padding=1), relu=nn.ReLU(inplace=True), fc=nn.Linear(256, 5)),
    'dense': lambda: Net(dense, conv0=nn.Conv2d(2, 4, 3), norm1=nn.BatchNorm2d(4), conv1=nn.Conv2d(4, 3, 3, padding=1),
                         norm2=nn.BatchNorm2d(7), conv2=nn.Conv2d(7, 3, 1), norm3=nn.BatchNorm2d(10),
                         fc=nn.Linear(10, 5)),
    'stem': lambda: Net(stem, side=nn.Conv2d(2, 2, 3, padding=1), conv0=nn.Conv2d(2, 4, 3, padding=1),
                        conv1=nn.Conv2d(4, 4, 3, padding=1), conv2=nn.Conv2d(6, 2, 1), side2=nn.Conv2d(2, 2, 1),
                        fc=nn.Linear(128, 5), direct=nn.Linear(128, 5)),
    'views': lambda: Net(views, conv0=nn.Conv2d(2, 4, 3, padding=1), conv1=nn.Conv2d(4, 4, 3, padding=1),
                         fc0=nn.Linear(256, 8), fc=nn.Linear(8, 5)),
    'shuffled': lambda: Net(shuffled, conv0=nn.Conv2d(2, 4, 3, padding=1), conv1=nn.Conv2d(2, 2, 3, padding=1),
                            fc=nn.Linear(2, 5)),
    'arithmetic': lambda: with_tensors(Net(arithmetic, conv0=nn.Conv2d(2, 4, 3, padding=1),
                                           conv1=nn.Conv2d(4, 4, 3, padding=1), fc=nn.Linear(4, 5))),
    'frames': lambda: Net(frames, conv0=nn.Conv2d(1, 4, 3, padding=1), conv1=nn.Conv2d(4, 4, 3), fc0=nn.Linear(288, 8),
                          fc=nn.Linear(8, 5)),
    'names': lambda: with_mask(Net(names, conv0=nn.Conv2d(2, 4, 3, padding=1), dim=nn.Conv2d(4, 4, 3, padding=1),
                                   repeat=nn.Conv2d(4, 4, 1), size=nn.Conv2d(8, 4, 3), fc=nn.Linear(4, 5))),
    'mobile': mobile, 'pooled': pooled, 'max pooled': max_pooled, 'one dimension': one_dimension,
    'same twice': same_twice, 'dropped': dropped}


def torchvision_net(name):
    torchvision = pytest.importorskip('torchvision')
    options = {'googlenet': {'aux_logits': False, 'init_weights': False}}.get(name, {})
    with torch.device('meta'):  # no initial weights of layers that are exchanged
        net = getattr(torchvision.models, name)(weights=None, num_classes=5, **options)
    if name.startswith('vgg'):
        net.classifier[0], net.classifier[3], net.classifier[6] = nn.Linear(25088, 8), nn.Linear(8, 8), nn.Linear(8, 5)
    net.to_empty(device='cpu')
    for module in net.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    return net


def own(name):
    """A network of that name in float64 and eval mode whose batch norms are as training leaves them."""
    torch.manual_seed(3)
    net = (OWN[name] if name in OWN else lambda: torchvision_net(name))().double().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.3, 2.0)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.uniform_(-0.2, 0.4)
    return net


class Largest(step_by_step.Neurons):
    """Leaves activations as they are, and notes the largest input of each."""

    def __init__(self):
        torch.overrides.TorchFunctionMode.__init__(self)
        self.largest = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in step_by_step.RELUS:
            self.largest.append(args[0].max().item())
        return function(*args, **(kwargs or {}))


def made(ann, x, timesteps, part=0.55, **options):
    """A spiking network with thresholds that are a part of each activation's largest input."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        snn = spiking(ann, timesteps, **options).double()
    with torch.no_grad(), Largest() as seen:
        copy.deepcopy(ann).eval()(x.clone())
    snn.threshold_update(part, [max(0.05, each) for each in seen.largest])
    return snn


def agrees(snn, ann, x, at_once=False, silent=False, rtol=1e-9):
    """Outputs at each step and every gradient of the spiking network and of the ANN's own code, step by step."""
    ann = copy.deepcopy(ann)
    weights = torch.randn(snn.timesteps, len(x), 5, dtype=torch.float64)
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(7)
    got = snn.over_time(x)
    (got * weights).sum().backward()
    lif = [value for each in snn.lifs for value in (each.threshold, each.leak) if value.requires_grad]
    own_grads = [value.grad.clone() for value in lif]
    snn_grads = {name: value.grad for name, value in snn.named_parameters()}
    snn.zero_grad()
    torch.manual_seed(7)
    want, seen = step_by_step.run_own(ann, snn, y, at_once)
    (want * weights).sum().backward()
    assert got.shape == want.shape and want.std() > 0
    assert torch.allclose(got, want, rtol=rtol, atol=rtol * want.abs().max().item())
    for name, value in ann.named_parameters():
        if name.endswith('.bound'):  # which is a threshold
            continue
        if value.grad is None:
            assert snn_grads[name] is None
            continue
        close(snn_grads[name], value.grad, rtol, name, silent)
    for number, (a, value) in enumerate(zip(own_grads, lif)):
        close(a, value.grad, rtol, number, silent)
    if snn.encoding == 'direct':
        close(x.grad, y.grad, rtol, 'images', silent)
    return ann


def close(got, want, rtol, name, silent=False):
    assert silent or want.abs().max() > 0, f'{name}: no gradient would hide errors'
    assert (got - want).norm() <= rtol * want.norm() + 1e-13, name


# -- the ANN's own code, one step after another -----------------------------------------------------------------------

@pytest.mark.parametrize('options', [
    dict(DIRECT, activation='Linear', **LEARNED), dict(DIRECT, activation='STDB', initial_potential=0.5, leak=0.9),
    dict(DIRECT, activation='ATan', delay=1, leak=0.9, initial_potential=0.25, **LEARNED)])
@pytest.mark.parametrize('name', OWN)
def test_own_networks_step_by_step(name, options):
    ann, x = own(name), torch.rand(3, *SHAPE, dtype=torch.float64) * 2 - 1
    snn = made(ann, x, 4 + 4 * options['delay'], gamma=0.8, width=1.5, beta=0.1, **options)
    agrees(snn, ann, x)


@pytest.mark.parametrize('name', ['residual', 'stem', 'views', 'same twice', 'mobile'])
def test_poisson_step_by_step(name):
    ann, x = own(name), ternary((3, *SHAPE), 1)  # which pass the encoder unchanged
    snn = made(ann, x, 9, beta=0.1, leak=0.9)
    agrees(snn, ann, x)


@pytest.mark.parametrize('delay', [0, 1])
@pytest.mark.parametrize('name', ['residual', 'dense', 'one dimension', 'same twice', 'dropped', 'mobile'])
def test_training_step_by_step(name, delay):
    # batch norm over T * B currents, dropout's masks held over time
    ann, x = own(name).train(), torch.rand(3, *SHAPE, dtype=torch.float64) * 2 - 1
    snn = made(ann, x, 4 + 4 * delay, activation='Linear', gamma=0.8, encoding='direct', delay=delay, **LEARNED)
    assert all(module.training for module in snn.modules())
    ann = agrees(snn, ann, x, at_once=True, silent=True)  # biases before a batch norm have no gradient
    for key, value in ann.state_dict().items():
        # of the unbiased variance, where the input is the same at all steps, (n - 1) / n counts n once
        assert torch.allclose(snn.state_dict()[key].double(), value.double(), rtol=1e-2), key


@pytest.mark.parametrize('name, size', [('resnet18', 32), ('vgg11_bn', 32), ('densenet121', 32), ('googlenet', 32),
                                        ('shufflenet_v2_x0_5', 32)])
def test_networks_of_torchvision_step_by_step(name, size):
    ann, x = own(name), torch.rand(1, 3, size, size, dtype=torch.float64) * 2 - 1
    snn = made(ann, x, 2, part=0.3, activation='STDB', initial_potential=0.5, beta=0.1, **DIRECT)
    agrees(snn, ann, x, silent=True, rtol=1e-8)


# -- what is refused --------------------------------------------------------------------------------------------------

def between(module):
    return chain(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), module, nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
                 nn.Flatten(), nn.Linear(256, 5))


def calling(expression):
    """A network with an expression of spikes x and of the network n, n.w of which is a convolution."""
    function = eval(f'lambda x, n: {expression}')
    return Net(lambda n, x: n.fc(function(F.relu(n.conv(x)), n).flatten(1)), conv=nn.Conv2d(2, 4, 3, padding=1),
               w=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4), fc=nn.Linear(256, 5))


def over_a_view(x):
    F.relu(x.flatten(2), inplace=True)  # which changes x
    return x


def after_a_view(x):
    y = x.flatten(2)
    F.relu(x, inplace=True)
    return y


class Sequences(nn.Module):
    """A layer on sequences (B, n, 8) of activations; of what it gives the first, if several."""

    def __init__(self, layer, several=True):
        super().__init__()
        self.before, self.layer, self.fc, self.several = nn.Linear(8, 8), layer, nn.Linear(8, 5), several

    def forward(self, x):
        x = F.relu(self.before(x[:, 0]))
        x = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        if self.several:
            x, _ = x
        return self.fc(x.mean(1))


class Inputs(nn.Module):
    """(images, a second input) -> labels; subclasses take other arguments."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(256, 5)

    def forward(self, x, y):
        return self.fc(F.relu(self.conv(x)).flatten(1) + y)


class Keywords(Inputs):
    def forward(self, x, *, y):
        return super().forward(x, y)


class Any(Inputs):
    def forward(self, *images):
        return super().forward(images[0], 0)


class Several(Inputs):
    """What it gives beside the logits."""

    def __init__(self, more):
        super().__init__()
        self.more = more

    def forward(self, x):
        logits = super().forward(x, 0)
        return self.more(logits, x)


class Logits(NamedTuple):
    logits: torch.Tensor


RELU, NORM, LOGITS = 'put nn.ReLU or QCFS in its place', 'put batch norm in its place', 'leave it out: the loss'
ADD, LINEAR, SAMPLES = 'or add them', 'use layers that are linear', 'samples'
REFUSED_MODULES = [
    *((module, RELU) for module in (
        nn.GELU(), nn.SiLU(), nn.Sigmoid(), nn.LeakyReLU(), nn.ReLU6(), nn.PReLU(), nn.ELU(), nn.Tanh(), nn.Hardtanh(),
        nn.Hardswish(), nn.Mish(), nn.Softplus(), nn.Threshold(0.1, 0), nn.GLU(1), nn.Softsign())),
    *((module, NORM) for module in (nn.LayerNorm(8), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.RMSNorm(8),
                                    nn.LocalResponseNorm(2))),
    *((module, LINEAR) for module in (nn.LPPool2d(2, 2), nn.FractionalMaxPool2d(2, 4), nn.AlphaDropout())),
    *((module, SAMPLES) for module in (nn.Flatten(0), nn.Flatten(-4), nn.Unflatten(0, (1, -1)))),
    (nn.Softmax(1), LOGITS), (nn.LogSoftmax(1), LOGITS), (nn.Bilinear(4, 4, 4), ADD),
    (nn.BatchNorm2d(4, track_running_stats=False), 'track_running_stats=True'),
    (nn.MaxPool2d(2, return_indices=True), 'return_indices')]
REFUSED_CALLS = {
    ADD: [
        'x * n.w(x)', 'x * x', 'torch.mul(input=x, other=x)', 'n.w(x).mul_(x)', 'x @ n.w(x)', 'torch.matmul(x, x)',
        'torch.bmm(x[:, 0], x[:, 1])', 'torch.einsum("bchw,bchw->bchw", x, x)', 'x * n.w(x.mean((2, 3), keepdim=True))',
        '1 / (x + 1)', 'torch.true_divide(1, x + 1)', 'x.divide(x + 1)', 'F.conv2d(x, x)', 'F.linear(n.w.weight, x)',
        'torch.addcmul(x, x, x)', 'F.scaled_dot_product_attention(x, x, x)'],
    RELU: [
        'x * torch.sigmoid(n.w(x))', 'x ** 2', 'x.square()', 'abs(x)', 'x.clamp(0, 1)', 'x.clip(max=1)',
        'x.clamp_min(0)', 'torch.minimum(x, n.w(x))', 'x.max(1, keepdim=True)[0]', 'x.amax(1, keepdim=True)',
        'x.sign()', 'x.exp()', 'F.gelu(x)', 'F.leaky_relu(x)', 'F.relu6(x)', 'x.tanh()', 'F.threshold(x, 0.1, 0)'],
    NORM: [
        'x + x.norm(dim=1, keepdim=True)', 'F.normalize(x)', 'F.layer_norm(x, (8, 8))', 'F.group_norm(x, 2)'],
    'torch.cat([x, x, x], 1)': ['x.expand(-1, 4, -1, -1)', 'x.repeat(1, 2, 1, 1)', 'torch.tile(x, (1, 2, 1, 1))'],
    LINEAR: [
        'x.sort(1)[0]', 'x[:, x.argmax()]', 'x.topk(4, 1)[0]', 'torch.where(x > 0, x, 0.1 * x)', 'x.round()', 'x % 1',
        'x // 1', 'x.std(1, keepdim=True)', 'x.int()', 'x.T', 'x.data', 'x.detach()', 'x + torch.rand_like(x)',
        'F.fractional_max_pool2d(x, 2, output_size=4)', 'x.copy_(n.w(x))', 'my_avg_pool2d(x)'],
    SAMPLES: [
        'x - x.mean(0)', 'x - x.mean()', 'x - x.mean(-4)', 'x - x.mean(dim=(0, 2), keepdim=True)', 'x + x.sum()',
        'x.flatten()', 'torch.flatten(x, 0, 1)', 'torch.cat([x, x])', 'torch.cat([x, x], dim=0)',
        'torch.cat([x, x], -4)', 'x[0]', 'x[:2]', 'x[::2]', 'x[None]', 'x[..., 0, 0, 0, 0]', 'x.transpose(0, 1)',
        'x.transpose(1, -4)', 'x.transpose(dim0=0, dim1=1)', 'x.permute(1, 0, 2, 3)',
        'torch.permute(x, dims=(1, 0, 2, 3))', 'x.view(4, -1)', 'x.reshape((1, -1))', 'x.split(1)[0]', 'x.chunk(2)[0]',
        'x.squeeze()', 'x.unsqueeze(0)', 'x.narrow(0, 0, 1)', 'x / x.size(0)', 'x * x.shape[0]', 'x + x.size()[0]',
        'x.view(x.size(0) // 2, -1)', 'x + torch.arange(x.shape[0]).view(-1, 1, 1, 1)', 'x.view(-1, x.size(0))',
        'F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))', 'n.fc.weight @ x.flatten(1)'],
    'rounds': ['torch.div(x, 2, rounding_mode="floor")', 'x.to(torch.int64)', 'x.type(torch.uint8)'],
    'random numbers': ['x + torch.randn(x.shape)', 'x + torch.randn(1)',
                       'x + torch.from_numpy(np.random.randn(4, 1, 1))'],
    'in place': ['n.w.weight.mul_(2) + x[:, :, :3, :3]', 'over_a_view(n.w(x))', 'after_a_view(n.w(x))',
                 'torch.add(x, x, out=x)'],
    'depends on values': ['x if x.sum() > 0 else -x', 'sum(row for row in x)'],
    'index it, as w[0], w[1]': ['sum(row for row in x)'],
    'cannot be traced': ['[x for _ in range(x.max())][0]', 'x * float(x)', 'torch.tensor(x.numpy())'],
    'training=self.training': ['F.dropout(x)', 'F.dropout(x, 0.5, not n.training)'],
    'no_grad': ['torch.no_grad()(n.w)(x)'], LOGITS: ['F.softmax(x, 1)'],
    'nn.BatchNorm': ['F.batch_norm(x, n.norm.running_mean, n.norm.running_var)']}


def refused(ann, words):
    """Refused by name in one line, before anything runs, by whatever is called first."""
    before = {name: value.clone() for name, value in ann.state_dict().items()}
    for call in (lambda: spiking(ann, 2), lambda: quantize(ann)):
        with pytest.raises(ValueError) as caught:
            call()
        assert '\n' not in str(caught.value) and words in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in ann.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize('module, words', REFUSED_MODULES, ids=lambda each: type(each).__name__)
def test_modules_that_are_refused(module, words):
    assert refused(between(module), words).startswith(f'2: {type(module).__name__} ')


@pytest.mark.parametrize('expression, words', [(each, words) for words, all in REFUSED_CALLS.items() for each in all])
def test_calls_that_are_refused(expression, words):
    message = refused(calling(expression), words)
    assert re.match(r'the network: [a-z0-9_]+\(\) |the network: \.[a-zT]+ |Net ', message), message


@pytest.mark.parametrize('ann, words', [
    (lambda: Sequences(nn.LSTM(8, 8)), 'layer: LSTM'), (lambda: Sequences(nn.GRU(8, 8)), 'layer: GRU'),
    (lambda: Sequences(nn.MultiheadAttention(8, 2)), 'layer: MultiheadAttention'),
    (lambda: Sequences(nn.TransformerEncoderLayer(8, 2, 16), False), 'layer: TransformerEncoderLayer'),
    (lambda: chain(nn.Flatten(), nn.Linear(128, 8), nn.ReLU(), nn.Linear(8, 5), nn.Softmax(1)), '4: Softmax'),
    (lambda: chain(nn.Flatten(), nn.Linear(128, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU()), 'behind its last layer'),
    (lambda: chain(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
     'behind its last layer'),
    (lambda: torchvision_net('squeezenet1_1'), 'behind its last layer'),
    (lambda: torchvision_net('mobilenet_v2'), 'features.0.2: ReLU6'),
    (lambda: chain(nn.Flatten(), nn.Linear(128, 5)), 'no ReLU and no QCFS'),
    (lambda: calling('n.fc.weight[:1, :256]'), 'no ReLU'),
    (Inputs, '2 inputs'), (Keywords, '2 inputs'), (Any, 'any number of inputs'),
    (lambda: Several(lambda logits, x: (logits, x)), 'more than one output'),
    (lambda: Several(lambda logits, x: {'logits': logits}), 'more than one output'),
    (lambda: Several(lambda logits, x: Logits(logits)), 'more than one output: return the logits alone'),
    (lambda: Several(lambda logits, x: None), 'more than one output')])
def test_networks_that_are_refused(ann, words):
    refused(ann(), words)


class ConvReLU(nn.Conv2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class OwnLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        return F.linear(x, self.weight)


def test_a_parametrized_layer_is_followed_as_far_as_one_without():
    net = chain(parametrizations.weight_norm(ConvReLU(2, 4, 3)), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                nn.Flatten(), parametrizations.spectral_norm(OwnLinear())).eval()
    assert len(spiking(net, 2).lifs) == 2 == sum(isinstance(each, QCFS) for each in quantize(net).modules())


def test_a_module_runs_the_forward_that_it_was_given():
    net = chain(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    net[1].forward = lambda x: F.relu6(x)
    refused(net, '1: relu6() ')
    net[1].forward, x = lambda x: F.relu(-x), torch.rand(2, *SHAPE)
    net[3].forward = lambda x: F.linear(x, 2 * net[3].weight)  # of a layer, too
    tree, graph = trace(net)
    assert torch.equal(compiled(graph)(tree, x), F.linear(F.relu(-net[0](x)).flatten(1), 2 * net[3].weight))
    assert len(spiking(net, 2).lifs) == 1


def test_weights_that_it_does_not_follow_are_refused():
    net = Net(lambda n, x: n.fc((F.relu(n.conv(x)) * n.all[0].softmax(0)[0]).flatten(1)), conv=nn.Conv2d(2, 4, 3),
              fc=nn.Linear(144, 5))
    net.factors = nn.Parameter(torch.randn(2))
    net.all = [net.factors]
    refused(net, 'read it as self.NAME')


def test_what_the_graph_does_not_read_is_no_matter():
    def forward(n, x):
        n.penalty = sum(weight.pow(2).sum() for weight in n.fc.parameters())
        return n.fc(F.relu(n.conv(x)).flatten(1))

    assert len(spiking(Net(forward, conv=nn.Conv2d(2, 4, 3), fc=nn.Linear(144, 5)), 2).lifs) == 1


@pytest.mark.parametrize('training', [lambda n: False, lambda n: n.training and n.drops])
def test_a_dropout_that_never_drops_stays_idle(training):
    net = Net(lambda n, x: n.fc(F.dropout(F.relu(n.conv(x)), 0.5, training(n)).flatten(1)), conv=nn.Conv2d(2, 4, 3),
              fc=nn.Linear(144, 5))
    net.drops = False
    snn, x = spiking(net, 2, **DIRECT, default_threshold=0.1).train(), torch.rand(2, *SHAPE)
    assert torch.equal(snn(x), snn.eval()(x)) and snn(x).any()
    net.drops = True
    snn = spiking(net, 2, **DIRECT, default_threshold=0.1).train()
    assert torch.equal(snn(x), snn.eval()(x)) == (training(net.train()) is False)


def test_results_that_a_network_keeps():
    net, x = Net(lambda n, x: n.fc(n.seen(F.relu(n.conv(x))).flatten(1)), conv=nn.Conv2d(2, 4, 3),
                 fc=nn.Linear(144, 5)), torch.rand(2, *SHAPE)
    net.seen = lambda x: setattr(net, 'kept', x) or x
    net(x)
    with pytest.raises(ValueError, match='Net cannot be traced.* kept is a result with a gradient: detach it'):
        spiking(net, 2)
    del net.kept
    net.seen = lambda x: x
    prune.l1_unstructured(net.conv, 'weight', 0.5)  # which keeps the product of weight and mask
    want = spiking(net, 2, **DIRECT)(x)
    prune.remove(net.conv, 'weight')
    assert torch.equal(spiking(net, 2, **DIRECT)(x), want)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x


@pytest.mark.parametrize('expression, words', [
    ('Twice.apply(x)', 'torch.autograd.Function of its own'), ('x.view(len(x), -1)', 'x.size(0) for len(x)'),
    ('x.flatten(1)[:, :int(x.size(1) / 2)]', '// for int()')])
def test_refusals_say_what_to_write(expression, words):
    refused(calling(expression), words)


def test_a_published_network_may_have_a_forward_of_its_own_put_on_a_module(narrow):
    x, net = torch.rand(2, 2, 16, 16, dtype=torch.float64), quantize(published('VGG5', batch_norm=True)).eval()
    before = quiet(net, 4)(x)
    net.classifier[-1].forward = lambda x: F.linear(x, 2 * net.classifier[-1].weight)
    assert torch.allclose(quiet(net, 4)(x), 2 * before) and before.any()


def test_paths_that_are_dropped_in_training_are_whole_in_a_spiking_network():
    drop = pytest.importorskip('torchvision').ops.StochasticDepth(0.5, 'row')
    net = chain(nn.Conv2d(2, 4, 3), nn.ReLU(), drop, nn.Flatten(), nn.Linear(144, 5)).train()
    same, x = chain(*net[:2], *net[3:]), torch.rand(2, *SHAPE)
    assert torch.equal(spiking(net, 2, **DIRECT)(x), spiking(same, 2, **DIRECT)(x))
    assert isinstance(quantize(net)[2], type(drop))  # the QCFS ANN's training drops them


def test_a_network_is_refused_for_its_hooks():
    net = own('residual')
    net.relu.register_forward_hook(lambda module, given, output: output * 2)
    refused(net, 'relu: ReLU has hooks')
    net = own('residual')
    net.register_forward_hook(lambda module, given, output: output * 2)
    refused(net, 'Net has hooks')


def branches(n, x):
    y = n.first(x)
    y += n.second(x)  # each ends in an activation in place
    s = n.conv1(x)
    s *= 0.5
    y += s
    total = 0
    for branch in (n.first, n.second):
        total += branch(y)
    return n.fc(F.relu(n.conv2(total)).flatten(1))


def with_values(n, x):
    n.calls += 1
    n.seen.add_(1)
    x = F.relu(n.conv1(x)) if n.flag and n.size.shape[0] == 3 else x
    for _ in range(int(n.twice)):
        x = F.relu(n.conv1(x))
    return n.fc(x.flatten(1))


def matrix(n, x):
    h = F.relu(n.conv1(x)).flatten(1)
    y = h
    y @= n.turn  # a new tensor, as PyTorch has no such call in place
    return n.fc(F.relu(y) + h)


@pytest.mark.parametrize('way', [branches, with_values, matrix])
def test_assignments_with_a_sign_and_buffers_as_values(way):
    torch.manual_seed(0)
    first, second, conv1, conv2 = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(4))
    ann = Net(way, first=chain(first, nn.ReLU(inplace=True)), second=chain(second, nn.ReLU(inplace=True)), conv1=conv1,
              conv2=conv2, fc=nn.Linear(128, 5))
    for name, value in {'calls': 0, 'seen': 0, 'flag': 1, 'twice': 2, 'size': [0, 0, 0]}.items():
        ann.register_buffer(name, torch.tensor(value))
    ann.turn = nn.Parameter(torch.randn(128, 128) / 10)
    ann, x = ann.double().eval(), torch.rand(3, *SHAPE, dtype=torch.float64)
    want = ann(x)
    assert torch.allclose(quantize(ann, 10 ** 7, bound=100.0)(x), want, atol=1e-4)
    agrees(made(ann, x, 4, **DIRECT), ann, x, silent=True)


def test_a_forward_beside_that_of_the_class_is_refused(narrow):
    net = own('residual')
    net.forward = lambda x: 2 * Net.forward(net, x)
    refused(net, 'Net has a forward of its own beside that of its class')
    net = quantize(published('VGG5'))
    net.forward = lambda x: 2 * VGG.forward(net, x)
    with pytest.raises(ValueError, match='VGG has a forward of its own'):
        convert(net, 2)


def on_weights(n, x):
    return n.fc(n.relu(F.linear(x.flatten(1), n.drop(n.relu(n.fc0.weight)))))


@pytest.mark.parametrize('encoding, p', [('direct', 0.5), ('poisson', 0.0)])  # spikes draw random numbers, too
def test_an_activation_and_a_dropout_of_a_weight_stay_as_they_are(encoding, p):
    torch.manual_seed(0)
    ann = Net(on_weights, relu=nn.ReLU(), drop=nn.Dropout(p), fc0=nn.Linear(128, 8, bias=False), fc=nn.Linear(8, 5))
    ann, x = ann.double().eval(), ternary((3, *SHAPE), 1)
    same = chain(nn.Flatten(), nn.Linear(128, 8, bias=False), nn.ReLU(), nn.Linear(8, 5)).double().eval()
    same[3].load_state_dict(ann.fc.state_dict())
    quantized = quantize(ann)
    assert isinstance(quantized.relu, nn.ReLU) and sum(isinstance(each, QCFS) for each in quantized.modules()) == 1
    for training in (False, True):
        torch.manual_seed(1)
        same[1].weight.data = F.dropout(ann.fc0.weight.detach().relu(), p, training)
        snn, want = (spiking(each, 3, default_threshold=0.3, encoding=encoding) for each in (ann, same))
        torch.manual_seed(1)
        assert not any(isinstance(each, plain_way.HeldDropout) for each in snn.modules())
        got, want = snn.train(training).over_time(x), want.over_time(x)
        assert torch.equal(got, want) and want.std() > 0


def positions(n, x):
    height, width = x.shape[2], x.shape[3]
    x = F.relu((n.conv1(x) - n.mean.type_as(x)) * n.scale.expand_as(x))
    y = F.relu(n.conv2(x) + n.place[:, :, :height, :width] + torch.arange(width, device=x.device) / 8)
    return n.fc((y * n.scale.expand_as(y)).flatten(1))


def test_weights_cut_to_the_size_of_an_image():
    torch.manual_seed(0)
    ann = Net(positions, conv1=nn.Conv2d(2, 2, 3, padding=1), conv2=nn.Conv2d(2, 2, 3, padding=1), fc=nn.Linear(128, 5))
    ann.mean, ann.scale = nn.Parameter(torch.rand(2, 1, 1)), nn.Parameter(1 + torch.rand(2, 1, 1))
    ann.place = nn.Parameter(torch.rand(1, 2, 9, 9))
    ann, x = ann.double().eval(), torch.rand(3, *SHAPE, dtype=torch.float64)
    agrees(made(ann, x, 4, activation='Linear', gamma=0.8, **DIRECT), ann, x)


def test_a_network_with_a_block_of_two_names_is_copied():
    torch.manual_seed(0)
    block, x = chain(nn.Flatten(), nn.Linear(128, 8), nn.ReLU()), torch.rand(3, *SHAPE)
    ann = Net(lambda n, x: n.all(x), block=block, all=chain(block, nn.Linear(8, 5)))
    for each in (ann, quantize(ann)):
        snn, fresh = (spiking(each, 4, **DIRECT) for _ in range(2))
        with torch.no_grad():
            for value in fresh.parameters():
                value.zero_()
        fresh.copy_from(each)
        fresh.threshold_update(1.0, snn.thresholds.tolist())
        assert torch.equal(fresh(x), snn(x)) and snn(x).std() > 0


def test_a_train_of_its_own_that_is_lost_is_said():
    class Frozen(Net):
        def train(self, mode=True):
            super().train(mode)
            self.norm0.eval()
            return self

    net = own('residual')
    net.__class__ = Frozen
    for make in (lambda: spiking(net, 2), lambda: quantize(net)):
        with pytest.warns(UserWarning, match='^Frozen: its own train'):
            assert 'train()' in make().notes[0]
    snn = spiking(Net(lambda n, x: n.net(x), net=net), 2).train()  # of a part of the network
    assert not snn.notes and not snn.get_submodule('net.norm0').training and snn.get_submodule('net.norm1').training


def test_a_batch_norm_of_its_own_and_hooks_are_not_folded_away(narrow):
    class Half(nn.BatchNorm2d):
        def forward(self, x):
            return 0.5 * super().forward(x)

    x, net = torch.rand(2, 2, 16, 16, dtype=torch.float64), quantize(published('VGG5', batch_norm=True)).eval()
    want = convert(net, 4)(x)
    prune.l1_unstructured(net.features[0], 'weight', 0.5)
    net.features[0].weight_orig.data *= 3  # as another checkpoint would
    pruned, same = convert(net, 4), quantize(published('VGG5', batch_norm=True)).eval()
    prune.remove(net.features[0], 'weight')
    same.load_state_dict(net.state_dict())
    assert type(pruned).__name__ == 'VGG_SNN_STDB'
    assert torch.equal(pruned(x), convert(same, 4)(x)) and not torch.equal(pruned(x), want)
    net.features[0].register_forward_hook(lambda module, given, output: 0.5 * output)
    assert torch.allclose(convert(net, 4)(x), spiking(net, 4)(x), rtol=1e-4, atol=1e-5)
    net.features[1] = Half(net.features[1].num_features)
    with pytest.raises(ValueError, match='VGG cannot be traced'):
        convert(net, 4)


def adds_to_its_input(n, x):
    x = n.conv0(x)
    x += n.conv1(n.relu(x))
    return n.fc(x.flatten(1))


def test_an_input_of_an_activation_that_is_changed_later_on():
    torch.manual_seed(0)
    conv0, conv1 = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
    ann = Net(adds_to_its_input, conv0=conv0, conv1=conv1, relu=nn.ReLU(), fc=nn.Linear(128, 5)).double().eval()
    x, quantized = torch.rand(3, *SHAPE, dtype=torch.float64), quantize(ann, 10 ** 7, bound=100.0)
    want = ann(x)
    assert torch.allclose(quantized(x), want, atol=1e-4)
    quantized(x).sum().backward()
    want.sum().backward()
    assert torch.allclose(quantized.get_parameter('conv0.weight').grad, conv0.weight.grad, rtol=1e-5)
    drops = chain(nn.Conv2d(2, 2, 3), nn.ReLU(inplace=True), nn.Dropout(inplace=True), nn.Flatten(), nn.Linear(72, 5))
    assert type(quantize(drops)) is nn.Sequential  # changes nothing that QCFS keeps


def stop():
    raise NotImplementedError


def noisy(n, x):
    x = F.relu(n.conv1(x))
    if n.training:
        x = x + torch.randn_like(x)
    return n.fc(x.flatten(1))


@pytest.mark.parametrize('way', [
    noisy, lambda n, x: n.fc((F.relu(n.conv1(x)) * (2 if n.training else 1)).flatten(1)),
    lambda n, x: n.fc(F.relu(n.conv1(x)).flatten(1)) if not n.training else stop()])
def test_code_for_training_alone_that_is_lost_is_said(way):
    with pytest.warns(UserWarning, match='^Net: its code for training alone is left out: make each ReLU an nn.ReLU '):
        quantize(Net(way, conv1=nn.Conv2d(2, 2, 3, padding=1), fc=nn.Linear(128, 5)))


def test_code_for_training_alone_is_kept_if_activations_are_modules():
    ann = Net(lambda n, x: n.fc((n.relu(n.conv1(x)) * (2 if n.training else 1)).flatten(1)), relu=nn.ReLU(),
              conv1=nn.Conv2d(2, 2, 3, padding=1), fc=nn.Linear(128, 5))
    x = torch.rand(2, *SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        net = quantize(ann)
        drops = quantize(Net(lambda n, x: n.fc(F.dropout(F.relu(n.conv1(x)), 0.5, n.training).flatten(1)),
                             conv1=ann.conv1, fc=ann.fc))
    assert not torch.equal(net.train()(x), net.eval()(x))
    assert not torch.equal(drops.train()(x), drops.eval()(x))


def test_bounds_of_channels_behind_a_linear_layer_on_sequences():
    ann = chain(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))
    net = quantize(ann, channels=True)
    assert [len(each.bound) for each in net.modules() if isinstance(each, QCFS)] == [4, 4]
    assert net(torch.rand(2, 2, 8)).shape == (2, 5)


def test_fitting_bounds_leaves_what_is_frozen():
    net = quantize(own('residual').float().train())
    net.get_submodule('norm0').eval()
    fit_bounds(net, torch.rand(4, *SHAPE))
    assert net.training and not net.get_submodule('norm0').training and net.get_submodule('norm1').training


def test_settings_of_a_network_are_those_of_its_neurons():
    ann, x = own('residual'), torch.rand(3, *SHAPE, dtype=torch.float64)
    settings = {'activation': 'ATan', 'gamma': 0.7, 'width': 2.0, 'initial_potential': 0.25}
    snn, want = made(ann, x, 4, **DIRECT, activation='Linear', gamma=0.3), made(ann, x, 4, **DIRECT, **settings)
    for name, value in settings.items():
        setattr(snn, name, value)
    gradients = []
    for each in (snn, want):
        each(x).square().sum().backward()
        gradients.append(each.get_parameter('conv0.weight').grad)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_an_unknown_encoding_is_refused_in_words():
    with pytest.raises(ValueError, match="unknown encoding 'rate'"):
        spiking(own('residual'), 4, encoding='rate')


def test_a_buffer_counts_as_it_is_when_the_network_runs():
    ann, x = own('names'), torch.rand(3, *SHAPE, dtype=torch.float64)
    for net in (quantize(ann, 100), spiking(ann, 4, default_threshold=0.1, **DIRECT)):
        before = net(x)
        net.load_state_dict({**net.state_dict(), 'mask': torch.zeros(4, 1, 1)})
        assert not torch.allclose(net(x), before)


def test_a_network_that_mixes_samples_after_all_is_found_when_it_runs():
    net = Net(lambda n, x: n.fc(F.relu(n.conv(x)).view(-1, 512)), conv=nn.Conv2d(2, 4, 3, padding=1),
              fc=nn.Linear(512, 5))
    with pytest.raises(ValueError, match='3 outputs for 2 images at 3 time steps: its forward mixes samples'):
        spiking(net, 3, **DIRECT)(torch.rand(2, *SHAPE))


# -- code that torch.fx and the network itself may read differently ---------------------------------------------------

class InAList(nn.Module):
    """Calls its layers through a plain list, beside the Sequential that registers them."""

    def __init__(self):
        super().__init__()
        self.steps = [nn.Flatten(), nn.Linear(128, 8), nn.ReLU(), nn.Linear(8, 5)]
        self.net = nn.Sequential(*self.steps)

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class ByType(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(128, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x):
        for layer in self.net:
            x = layer(x) + isinstance(layer, nn.ReLU)
        return x


@pytest.mark.parametrize('make', [InAList, ByType])
def test_code_that_would_not_call_qcfs_runs_by_its_graph(make):
    torch.manual_seed(0)
    ann, x = make().double().eval(), torch.rand(3, *SHAPE, dtype=torch.float64)
    fine, coarse = quantize(ann, 10 ** 7, bound=100.0), quantize(ann, 2)
    assert torch.allclose(fine(x), ann(x), atol=1e-4) and not torch.allclose(coarse(x), ann(x), atol=1e-4)
    coarse(x).sum().backward()
    assert coarse.get_parameter('net.2.bound').grad is not None
    assert fine.state_dict().keys() == {*ann.state_dict(), 'net.2.bound'}
    agrees(made(coarse, x, 4, activation='Linear', gamma=0.8, **DIRECT), coarse, x)


def test_modules_that_the_code_makes_are_converted():
    def inline(n, x):
        return n.net[2](nn.Flatten()(nn.ReLU()(n.net[:2](nn.MaxPool2d(2)(x)))))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(64, 5))
    ann, x = Net(inline, net=net).double().eval(), torch.rand(3, *SHAPE, dtype=torch.float64)
    agrees(made(ann, x, 4, activation='Linear', gamma=0.8, **DIRECT), ann, x)
    drops = Net(lambda n, x: n.fc(nn.Dropout()(F.relu(x.flatten(1)))), fc=nn.Linear(128, 5))
    refused(drops, 'drops in evaluation, too')
    refused(Net(lambda n, x: nn.Linear(128, 5)(F.relu(x.flatten(1)))), 'Net calls a Linear that is no part of it')


def test_hints_that_are_no_code():
    class Hinted(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(128, 5)

        def forward(self, x: Annotated[torch.Tensor, 'B C H W']) -> Annotated[torch.Tensor, 'B labels']:
            return self.fc(F.relu(x.flatten(1)))

    ann, x = Hinted().double().eval(), torch.rand(3, *SHAPE, dtype=torch.float64)
    agrees(made(ann, x, 4, activation='Linear', gamma=0.8, **DIRECT), ann, x)


@pytest.mark.parametrize('flat', [lambda n, x: x.flatten(2), lambda n, x: n.flat(x)])
def test_channels_of_tokens_are_not_taken_for_those_of_features(flat):
    def tokens(n, x):
        return n.head(n.relu(n.fc(flat(n, n.patch(x)).transpose(1, 2))).mean(1))

    ann = Net(tokens, patch=nn.Conv2d(2, 8, 2, 2), fc=nn.Linear(8, 32), flat=nn.Flatten(2), relu=nn.ReLU(),
              head=nn.Linear(32, 5))
    with pytest.raises(ValueError, match='^relu: how many channels it has is unknown: take one bound a layer'):
        quantize(ann, channels=True)


@pytest.mark.parametrize('encoding, count', [('poisson', 1), ('direct', 0)])
def test_a_max_pool_of_poisson_input_is_said(encoding, count):
    ann = chain(nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        notes = spiking(ann, 4, encoding=encoding).notes
    assert len(notes) == count and all(note.startswith('1: the maximum of spikes') for note in notes)



@pytest.mark.parametrize('name', ['residual', 'dense'])  # one module called three times; functions
def test_bounds_of_a_quantized_copy_become_the_thresholds_of_the_anns_network(name):
    ann, x = own(name), torch.rand(3, *SHAPE, dtype=torch.float64)
    quantized, snn = quantize(ann, 4), spiking(ann, 3, **DIRECT, initial_potential=0.5)
    bounds = [module.bound for module in quantized.modules() if isinstance(module, QCFS)]
    for i, bound in enumerate(bounds):
        bound.data.fill_(0.5 + i / 4)
    copy_weights(quantized, snn)
    assert sorted(snn.thresholds.tolist()) == [0.5 + i / 4 for i in range(len(bounds))]
    assert torch.equal(snn(x), spiking(quantized, 3)(x)) and snn(x).std() > 0
    quantized.get_submodule(snn.layer_names[0]).add_module('more', QCFS())
    with pytest.raises(ValueError, match='different layouts'):
        copy_weights(quantized, snn)


def test_the_encoding_is_that_of_the_making():
    snn = spiking(own('residual'), 3, **DIRECT)
    snn.encoding = 'direct'
    for encoding in ('poisson', 'rate'):
        with pytest.raises(ValueError, match=f"encoding cannot become '{encoding}': make the network with it"):
            snn.encoding = encoding


def test_what_only_asks_an_image_for_its_type_is_no_way_from_it():
    def typed(n, x):
        h = F.relu(n.conv1(F.relu(n.conv0(x)).type_as(x)))
        return n.fc((h + torch.arange(8, device=x.device, dtype=x.dtype) / 8).expand_as(h).flatten(1)).type_as(x)

    torch.manual_seed(0)
    ann = Net(typed, conv0=nn.Conv2d(2, 4, 3, padding=1), conv1=nn.Conv2d(4, 4, 3, padding=1), fc=nn.Linear(256, 5))
    ann, x = ann.double().eval(), torch.rand(3, *SHAPE, dtype=torch.float64)
    snn = made(ann, x, 4, activation='Linear', gamma=0.8, **DIRECT)
    assert snn.depth == 2 and not snn.notes
    agrees(snn, ann, x)


def test_tokens_that_are_repeated_for_each_image():
    def with_a_token(n, x):
        x = n.patch(x).flatten(2).transpose(1, 2)
        return n.fc(F.relu(n.fc0(torch.cat([n.token.repeat(x.shape[0], 1, 1), x], 1)))[:, 0])

    torch.manual_seed(0)
    ann = Net(with_a_token, patch=nn.Conv2d(2, 4, 4, 4), fc0=nn.Linear(4, 8), fc=nn.Linear(8, 5))
    ann.token = nn.Parameter(torch.rand(1, 1, 4))
    ann, x = ann.double().eval(), torch.rand(3, *SHAPE, dtype=torch.float64)
    snn = made(ann, x, 4, activation='Linear', gamma=0.8, **DIRECT)
    assert torch.allclose(snn(x), step_by_step.run_own(ann, snn, x, False)[0].sum(0)) and snn(x).std() > 0


def test_a_size_of_images_whose_rank_a_layer_behind_a_sum_tells():
    def normed(n, x):
        x = (x / 2 + 0.5 - n.mean) / n.mean
        return n.fc(F.interpolate(F.relu(n.conv0(x)), size=x.shape[-2:]).mean((2, 3)))

    ann = Net(normed, conv0=nn.Conv2d(2, 4, 3, stride=2), fc=nn.Linear(4, 5))
    ann.register_buffer('mean', torch.rand(2, 1, 1) + 0.5)
    ann, x = ann.double().eval(), torch.rand(3, *SHAPE, dtype=torch.float64)
    agrees(made(ann, x, 4, activation='Linear', gamma=0.8, **DIRECT), ann, x)


@pytest.mark.parametrize('way', [
    lambda n, x: n.fc(n.relu(torch.cat(x.chunk(2, 1)[::-1], 1)).flatten(1)),
    lambda n, x: n.fc(n.relu(n.rows(x[:, 0])).flatten(1)),
    lambda n, x: n.fc(n.relu(n.rows(x.unflatten(1, (1, 2)))).flatten(1)),
    lambda n, x: n.fc(n.relu(n.rows(x[:, :1].squeeze(1))).flatten(1))])
def test_channels_that_nothing_tells_are_asked_for(way):
    ann = Net(way, relu=nn.ReLU(), rows=nn.Linear(8, 8), fc=nn.LazyLinear(5))
    ann(torch.rand(2, *SHAPE))
    with pytest.raises(ValueError, match='^relu: how many channels it has is unknown: take one bound a layer'):
        quantize(ann, channels=True)


def test_balancing_a_network_that_changes_its_type_on_the_way():
    def wider(n, x):
        x = F.relu(n.conv0(x)).flatten(1).double()
        return n.fc(F.relu(n.fc1(F.relu(n.fc0(x)))))

    torch.manual_seed(0)
    ann = Net(wider, conv0=nn.Conv2d(2, 4, 3), fc0=nn.Linear(144, 8), fc1=nn.Linear(8, 8), fc=nn.Linear(8, 5))
    whole, found = copy.deepcopy(ann).double(), []
    ann.fc0, ann.fc1, ann.fc = ann.fc0.double(), ann.fc1.double(), ann.fc.double()
    for net in (ann, whole):
        x = ternary((20, *SHAPE), 1).to(net.conv0.weight.dtype)
        found.append(find_thresholds(spiking(net, 10), x, 10))
    assert found[0] == pytest.approx(found[1], rel=1e-5)

# -- the layer-by-layer way -------------------------------------------------------------------------------------------

@pytest.fixture
def narrow(monkeypatch):
    """Every architecture with a few channels only."""
    monkeypatch.setattr(layers, 'VGG_LAYOUTS', {
        name: [item if item == 'A' else 3 for item in layout] for name, layout in layers.VGG_LAYOUTS.items()})
    monkeypatch.setattr(layers, 'VGG_HIDDEN', 12)
    monkeypatch.setattr(layers, 'RESNET_STAGES', [
        (3 + i if i else 64, stride) for i, (_, stride) in enumerate(RESNET_STAGES)])  # one identity stays plain
    conv, norm = layers.conv, layers.BatchNorm2d
    monkeypatch.setattr(layers, 'conv', lambda inputs, outputs, *more: conv(
        *(3 if size == 64 else size for size in (inputs, outputs)), *more))
    monkeypatch.setattr(layers, 'BatchNorm2d', lambda size: norm(3 if size == 64 else size))
    monkeypatch.setattr(layers, 'Scale', lambda channels=None: Scale(3 if channels == 64 else channels))


def published(architecture, **options):
    """An ANN of the published layout in float64 and eval mode, no weight and no statistic at its initial value."""
    torch.manual_seed(7)
    kind = VGG if architecture.startswith('VGG') else ResNet
    ann = kind(architecture, input_shape=(2, 16, 16), **options).double().eval()
    with torch.no_grad():
        for module in ann.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.normal_(0.1, 1).mul_((2 / module.weight[0].numel()) ** 0.5)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                for values, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.3, 0.5),
                                          (module.running_mean, -0.2, 0.2), (module.running_var, 0.3, 2.0)):
                    values.uniform_(low, high)
            elif isinstance(module, QCFS):
                module.bound.uniform_(1.0, 2.5)
    return ann


def with_biases(ann):
    for module in ann.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.bias = nn.Parameter(torch.rand(len(module.weight), dtype=torch.float64) * 0.3)
    return ann


def both_ways(architecture, timesteps, **options):
    """(lean, plain) spiking networks of one ANN with biases, at the same thresholds and leaks."""
    ann = with_biases(published(architecture))
    options = {'gamma': 0.8, 'beta': 0.1, 'width': 1.5, 'leak': 0.9, 'timesteps': timesteps, **LEARNED, **options}
    lean = network(architecture, input_shape=(2, 16, 16), bias=True, **options).double().eval()
    copy_weights(ann, lean)
    plain = spiking(ann, options.pop('timesteps'), **options).double()
    return lean, plain


IMAGES = {'direct': torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1,
          'poisson': ternary((3, 2, 16, 16), 1, 1.25)}


@pytest.mark.parametrize('encoding', ['direct', 'poisson'])
@pytest.mark.parametrize('delay, timesteps', [(0, 1), (0, 4), (0, 12), (1, 4), (1, 12)])
@pytest.mark.parametrize('architecture, activation', [
    ('VGG5', 'STDB'), ('VGG5', 'Linear'), ('VGG9', 'Linear'), ('RESNET12', 'STDB'), ('RESNET12', 'FastSigmoid')])
def test_both_ways_agree(architecture, activation, delay, timesteps, encoding, narrow):
    lean, plain = both_ways(architecture, timesteps, activation=activation, encoding=encoding, delay=delay,
                            initial_potential=0.5)
    x = IMAGES[encoding]
    found = find_thresholds(lean, x, 10)
    assert find_thresholds(plain, x, 10) == pytest.approx(found, rel=1e-9)
    for model in (lean, plain):
        model.threshold_update(0.3, [value * 0.75 ** i for i, value in enumerate(found)])  # deep layers fire, too
    assert torch.equal(lean.thresholds, plain.thresholds) and lean.leaks.tolist() == plain.leaks.tolist()
    assert (lean.depth, lean.output_delay) == (plain.depth, plain.output_delay)
    a, b, outputs = x.clone().requires_grad_(), x.clone().requires_grad_(), []
    for model, images in ((lean, a), (plain, b)):
        outputs.append(model(images))
        torch.nn.functional.cross_entropy(outputs[-1] / 5, torch.arange(3)).backward()
    assert torch.allclose(*outputs, rtol=1e-6, atol=1e-9) and outputs[0].std() > 0
    at = [1, timesteps]
    assert torch.allclose(lean.curve(x, at), plain.curve(x, at), rtol=1e-6, atol=1e-9)
    if timesteps > lean.output_delay:  # else the biases alone make the last layers fire
        same_spikes(lean, plain, x)
    same_gradients(lean, plain)
    if encoding == 'direct':
        # in one step STDB lets no gradient through a layer that did not fire
        close(a.grad, b.grad, 1e-6, 'images', silent=timesteps == 1 or timesteps <= lean.output_delay)


@pytest.mark.parametrize('architecture', ['VGG5', 'VGG9', 'RESNET12'])
def test_in_one_step_with_a_delay_only_the_last_bias_is_at_the_output(architecture, narrow):
    lean, plain = both_ways(architecture, 1, encoding='direct', delay=1, initial_potential=0.5)
    for model in (lean, plain):
        model.threshold_update(1.0, [0.5] * len(model.thresholds))
        outputs = model(IMAGES['direct'])
        outputs.sum().backward()
        bias = model.get_parameter(f'classifier.{0 if architecture == "RESNET12" else 6}.bias')
        assert torch.equal(outputs, bias.expand_as(outputs))
        assert torch.equal(outputs, model.curve(IMAGES['direct'], [1])[0])
        assert bias.grad.tolist() == [3.0] * len(bias)


def same_spikes(lean, plain, x):
    for one, other in zip(lean.record(x), plain.record(x), strict=True):
        train = one.spikes
        steps = slice(train.start, train.start + len(train.spikes))
        spikes = other.spikes if len(train.shape) == 1 else other.spikes.permute(0, 1, 3, 4, 2)
        assert (spikes.any() or len(spikes) == 1) and not spikes[:train.start].any()
        assert torch.equal(spikes[steps].flatten(2), train.spikes)


def same_gradients(lean, plain):
    """W' = theta W, so dL/dW = theta dL/dW', and dL/dtheta of the plain way has the way through W' in it."""
    theirs, thresholds = dict(plain.named_parameters()), lean.thresholds.detach()
    ours = lean.thresholds.grad.clone()
    scaled = set()  # layers that a plain identity is behind, whose factor is no parameter
    last = len(thresholds) - 1
    behind = [*(each for stage in lean.stages() for each in stage.inputs), (last, lean.classifier[-1])]
    names = {module: name for name, module in lean.named_modules()}
    for source, synapse in behind:
        if isinstance(synapse, Scale):
            scaled.add(source)
            continue
        worth = thresholds[source] if source >= 0 else 1.0
        close(worth * synapse.weight.grad, theirs[f'{names[synapse]}.weight'].grad, 1e-6, names[synapse], True)
        close(synapse.bias.grad, theirs[f'{names[synapse]}.bias'].grad, 1e-6, names[synapse], True)
        if source >= 0:
            ours[source] += (synapse.weight.grad * theirs[f'{names[synapse]}.weight'].detach()).sum()
    wanted = [i for i in range(len(thresholds)) if i not in scaled]
    got = torch.stack([lif.threshold.grad for lif in plain.lifs])
    assert torch.allclose(ours[wanted], got[wanted], rtol=1e-6, atol=1e-9) and ours.abs().max() > 0
    leaks = torch.stack([lif.leak.grad for lif in plain.lifs])
    assert torch.allclose(lean.leaks.grad, leaks, rtol=1e-6, atol=1e-9)


# -- QCFS -------------------------------------------------------------------------------------------------------------

TORCHVISION = ['resnet18', 'vgg11_bn', 'densenet121', 'googlenet', 'shufflenet_v2_x0_5']


@torch.no_grad()
def quantized(ann, levels, x, channels=False):
    """With bounds drawn at random, below the largest that each activation is given."""
    net = quantize(ann, levels, channels=channels)

    def draw(module, given):
        module.bound.uniform_(0.25, 0.75).mul_(given[0].max().clamp(min=0.05))

    hooks = [module.register_forward_pre_hook(draw) for module in net.modules() if isinstance(module, QCFS)]
    net(x.clone())
    for hook in hooks:
        hook.remove()
    return net


def quiet(ann, timesteps, **options):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return convert(ann, timesteps, **options)


def images_for(name):
    shape = (1, 3, 32, 32) if name in TORCHVISION else (3, *SHAPE)
    return torch.rand(*shape, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize('name, channels', [*((name, channels) for name in OWN for channels in (False, True)),
                                            *((name, name == 'resnet18') for name in TORCHVISION)])
def test_one_level_at_one_step_is_the_ann(name, channels):
    ann, x = own(name), images_for(name)
    before = {key: value.clone() for key, value in ann.state_dict().items()}
    with Largest() as calls:
        ann(x.clone())
    net = quantized(ann, 1, x, channels)
    snn = quiet(net, 1)
    bounds = [module.bound for module in net.modules() if isinstance(module, QCFS)]
    assert len(bounds) == len(snn.layer_names) == len(calls.largest)
    assert {bound.dim() for bound in bounds} == {int(channels)}
    assert not net.training and not any(module.training for module in [*net.modules(), *snn.modules()])
    want = net(x)
    assert want.std() > 0 and torch.allclose(snn(x), want, rtol=1e-9, atol=1e-9)
    for each in (net, snn):  # weights keep their names, and the ANN its own
        assert all(torch.equal(each.state_dict()[key], value) for key, value in before.items())
    assert all(torch.equal(value, before[key]) for key, value in ann.state_dict().items())
    assert not any(isinstance(module, QCFS) for module in ann.modules())


@pytest.mark.parametrize('channels', [False, True])
@pytest.mark.parametrize('name', OWN)
def test_quantized_networks_step_by_step(name, channels):
    x = torch.rand(3, *SHAPE, dtype=torch.float64) * 2 - 1
    net = quantized(own(name), 4, x, channels)
    agrees(quiet(net, 4, activation='Linear', gamma=0.8, learn_leak=True).double(), net, x, silent=True)


@pytest.mark.parametrize('channels', [False, True])
@pytest.mark.parametrize('batch_norm', [False, True])
@pytest.mark.parametrize('architecture', ['VGG5', 'VGG9', 'RESNET6', 'RESNET12'])
def test_published_layouts_run_the_lean_way(architecture, batch_norm, channels, narrow):
    ann, x = published(architecture, batch_norm=batch_norm), torch.rand(3, 2, 16, 16, dtype=torch.float64)
    net = quantized(ann, 1, x, channels)
    assert type(net) is type(ann)
    snn = convert(net, 1)
    assert type(snn).__name__ in ('VGG_SNN_STDB', 'RESNET_SNN_STDB')
    want = net(x)
    assert want.std() > 0 and torch.allclose(snn(x), want, rtol=1e-9, atol=1e-12)
    net = quantized(ann, 4, x, channels)
    for timesteps in (1, 4):
        # of the plain way, which the ANN's own code holds
        assert torch.allclose(convert(net, timesteps)(x), spiking(net, timesteps)(x), rtol=1e-9, atol=1e-9)


def test_what_quantize_leaves_and_makes():
    net = quantize(VGG('VGG5', dataset='DIGITS'), 3)
    assert type(net) is VGG and [module.levels for module in net.modules() if isinstance(module, QCFS)] == [3] * 5
    assert quantize(net, 8).features[1].levels == 3  # those that are there stay
    block = torchvision_net('resnet18')
    net = quantize(block, 2, bound=1.5)
    names = [name for name, module in net.named_modules() if isinstance(module, QCFS)]
    assert len(names) == 17 and names[:3] == ['relu', 'layer1.0.relu', 'layer1.0.relu_1']
    assert all(module.bound.item() == 1.5 for module in net.modules() if isinstance(module, QCFS))
    assert net.training and set(net.state_dict()) == set(block.state_dict()) | {f'{name}.bound' for name in names}


def test_a_quantized_network_drops_as_the_ann_does():
    ann, x = own('dropped').train(), torch.rand(3, *SHAPE, dtype=torch.float64)
    net = quantize(ann, 10 ** 6, bound=1e3)
    assert net.training
    torch.manual_seed(1)
    want = ann(x)
    torch.manual_seed(1)
    assert torch.allclose(net(x), want, atol=1e-2) and not torch.allclose(net.eval()(x), want, atol=1e-2)


def test_an_activation_that_has_two_names():
    ann = chain(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    ann = Net(lambda n, x: n.layers(x), activation=ann[1], layers=ann).double().eval()
    x = torch.rand(3, *SHAPE, dtype=torch.float64) * 2 - 1
    net = quantized(ann, 1, x)
    assert not torch.allclose(net(x), ann(x), atol=0.1) and torch.allclose(quiet(net, 1)(x), net(x))
    agrees(made(ann, x, 3, **DIRECT), ann, x)


@torch.fx.wrap
def my_avg_pool2d(x):
    return F.avg_pool2d(x, 2).repeat_interleave(4, 1) ** 2




def test_an_activation_in_place_whose_output_is_not_taken():
    ann = Net(lambda n, x: (n.relu(y := n.conv(x)), n.fc(y.flatten(1)))[1], conv=nn.Conv2d(2, 4, 3, padding=1),
              relu=nn.ReLU(inplace=True), fc=nn.Linear(256, 5)).double().eval()
    x = torch.rand(3, *SHAPE, dtype=torch.float64) * 2 - 1
    net = quantized(ann, 10 ** 6, x)
    assert torch.allclose(quantize(ann, 10 ** 6, bound=10)(x), ann(x), atol=1e-3)
    agrees(quiet(net, 3).double(), net, x, silent=True)


# -- balancing --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('encoding, delay', [('direct', 0), ('direct', 1), ('poisson', 0), ('poisson', 1)])
@pytest.mark.parametrize('name', ['residual', 'in place', 'dense', 'stem', 'views', 'frames', 'names', 'arithmetic',
                                  'same twice', 'pooled'])
def test_thresholds_of_own_networks(name, encoding, delay, monkeypatch):
    ann, x = own(name), ternary((20, *SHAPE), 1)
    snn = spiking(ann, 3, encoding=encoding, delay=delay, initial_potential=0.5, leak=0.9)
    want, given = step_by_step.find_own_thresholds(ann, snn, x, 6), x.clone()
    assert find_thresholds(snn, x, 6) == pytest.approx(want, rel=1e-9) and torch.equal(x, given)
    assert snn.thresholds.tolist() == pytest.approx(want, rel=1e-9)
    assert (snn.timesteps, snn.leak) == (3, 0.9) and not snn.training
    monkeypatch.setattr(balancing, 'CHUNK_BYTES', {'cpu': 40_000})  # a few steps at a time
    monkeypatch.setattr(balancing, 'SPOOL_BYTES', 1000)
    assert find_thresholds(snn, x, 6) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize('encoding', ['direct', 'poisson'])
def test_a_percentile_of_the_currents_of_an_own_network(encoding):
    ann, x = own('residual'), ternary((20, *SHAPE), 1)
    snn = spiking(ann, 3, encoding=encoding, delay=1)
    want = step_by_step.find_own_thresholds(ann, snn, x, 6, 97)
    assert find_thresholds(snn, x, 6, percentile=97) == pytest.approx(want, rel=5e-3)


def test_balancing_with_bounds_of_channels():
    # thresholds are then in units of the bounds
    x = ternary((20, *SHAPE), 1)
    net = quantized(own('residual'), 4, x, channels=True)
    snn = spiking(net, 3)
    want = step_by_step.find_own_thresholds(net, snn, x, 6)
    assert find_thresholds(snn, x, 6) == pytest.approx(want, rel=1e-9)


def test_balancing_leaves_the_rest_as_it_was():
    snn = spiking(own('dropped').train(), 3, **DIRECT)
    snn.conv0.eval()
    modes = {name: module.training for name, module in snn.named_modules()}
    weights = {name: value.clone() for name, value in snn.state_dict().items() if 'threshold' not in name}
    found = find_thresholds(snn, torch.rand(4, *SHAPE, dtype=torch.float64), 5)
    assert all(value > 0 for value in found)
    assert modes == {name: module.training for name, module in snn.named_modules()} and not modes['conv0']
    assert all(torch.equal(value, snn.state_dict()[name]) for name, value in weights.items())


def test_memory_does_not_grow_with_steps(monkeypatch):
    ann, x, lengths = own('residual'), torch.rand(10, *SHAPE, dtype=torch.float64), []
    snn = spiking(ann, 3, **DIRECT)
    for module in (snn.conv1, snn.conv2):
        module.register_forward_hook(lambda _, given, output: lengths.append(len(output)))
    monkeypatch.setattr(balancing, 'CHUNK_BYTES', {'cpu': 20_000})  # two values a neuron: 4 kB an image and step
    find_thresholds(snn, x, 50)
    assert max(lengths) <= 5


@pytest.mark.parametrize('spoil, words', [
    (lambda net: net.conv1.weight.data.zero_(), 'relu_1 has an input of 0'),
    (lambda net: net.norm0.bias.data.fill_(-9), 'relu has an input of 0'),
    (lambda net: net.conv1.weight.data.fill_(float('nan')), 'relu_1 has an input of inf')])
def test_a_layer_without_a_threshold_is_named(spoil, words):
    net = own('residual')
    spoil(net)
    net.norm1 = nn.Identity()
    snn = spiking(net, 3, **DIRECT)
    before = snn.thresholds.tolist()
    with pytest.raises(DeadLayerError, match=words):
        find_thresholds(snn, torch.rand(4, *SHAPE, dtype=torch.float64), 5)
    assert snn.thresholds.tolist() == before and snn.timesteps == 3


# -- a module like any other ------------------------------------------------------------------------------------------

NAMES = ('layers', 'stages', 'activation', 'encoding', 'thresholds', 'timesteps', 'record', 'depth', 'leak', 'notes',
         'input_layer', 'delay', 'initial_leak', 'lifs', 'run', 'graph', 'code', 'meta', 'tree')


def named_badly():
    """Whose children are named as what a spiking network has itself."""
    modules = {name: nn.Linear(6, 6) if i % 2 else nn.ReLU() for i, name in enumerate(NAMES)}
    modules['code'] = chain(nn.ReLU())

    def forward(n, x):
        x = n.first(x.flatten(1))
        for name in NAMES:
            x = getattr(n, name)(x)
        return n.fc(F.relu(n.last(x)))
    return Net(forward, first=nn.Linear(128, 6), last=nn.Linear(6, 6), fc=nn.Linear(6, 5), **modules).double().eval()


def some(name='residual', timesteps=4, **options):
    """(a network, its spiking network, images)"""
    ann, x = named_badly() if name == 'named badly' else own(name), torch.rand(3, *SHAPE, dtype=torch.float64) * 2 - 1
    return ann, made(ann, x, timesteps, **{**DIRECT, 'activation': 'Linear', 'gamma': 0.8, **options}), x


def test_children_named_as_the_attributes_of_a_spiking_network():
    ann, snn, x = some('named badly', **LEARNED)
    agrees(snn, ann, x, silent=True)
    assert isinstance(snn.timesteps, int) and snn.depth == 11 and snn.encoding == 'direct'
    snn.network_update(7, 1.0)
    snn.encoding, snn.notes = 'direct', []
    assert snn.timesteps == 7 and all(lif.timesteps == 7 for lif in snn.lifs)
    find_thresholds(snn, x, 5)
    assert snn.timesteps == 7 and copy.deepcopy(snn).timesteps == 7 and snn.curve(x, [1, 7]).shape == (2, 3, 5)
    again = pickle.loads(pickle.dumps(snn))
    assert torch.equal(again(x), snn(x)) and len(list(again.record(x))) == 11
    traced = quantize(ann)
    assert type(traced).__name__ == 'Traced'
    for copied in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), spiking(traced, 2)):
        assert copied(x).shape == (3, 5)
    assert torch.equal(copy.deepcopy(traced)(x), traced(x))
    assert set(snn.state_dict()) - set(ann.state_dict()) == {
        f'{name}.{value}' for name in snn.layer_names for value in ('threshold', 'leak')}
    assert 'layers' in dict(snn.named_children()) and 'timesteps' in str(snn)


@pytest.mark.parametrize('name', ['residual', 'stem', 'arithmetic', 'dropped', 'shuffled', 'one dimension'])
def test_copies_and_pickles(name):
    ann, snn, x = some(name, **LEARNED)
    want = snn(x)
    for each in (copy.deepcopy(snn), pickle.loads(pickle.dumps(snn)), copy.deepcopy(copy.deepcopy(snn))):
        assert torch.equal(each(x), want) and each.layer_names == snn.layer_names
        assert list(each.state_dict()) == list(snn.state_dict())
        with torch.no_grad():
            for value in each.parameters():
                value.zero_()
        each.timesteps = 9
        assert each(x).std() == 0  # its own weights, by which it runs
    assert torch.equal(snn(x), want) and snn.timesteps == 4
    fresh = spiking(ann, 4, activation='Linear', gamma=0.8, **DIRECT, **LEARNED).double()
    assert not torch.equal(fresh(x), want)
    assert fresh.load_state_dict(snn.state_dict()).missing_keys == [] and torch.equal(fresh(x), want)
    net = quantized(ann, 4, x)
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    if type(net) is not Net:  # which holds a function
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))
    assert 'LIF(T=4, threshold=' in repr(snn)


def test_hooks_types_and_optimizers():
    ann, snn, x = some(**LEARNED)
    seen = []
    hook = snn.conv1.register_forward_hook(lambda module, given, output: seen.append(output.shape))
    snn(x)
    hook.remove()
    assert seen == [(4 * 3, 4, 8, 8)]
    want = snn(x)
    single = copy.deepcopy(snn).to(torch.float32)
    assert single(x.float()).dtype == torch.float32 and torch.allclose(single(x.float()).double(), want, atol=1e-3)
    optimizer = torch.optim.SGD(snn.parameters(), lr=0.1)
    names = dict(snn.named_parameters())
    assert set(names) - set(dict(ann.named_parameters())) == {
        f'relu{i}.{what}' for i in ('', '_1', '_2') for what in ('threshold', 'leak')}
    want.square().sum().backward()
    assert all(value.grad is not None for value in names.values())
    before = {name: value.clone() for name, value in names.items()}
    optimizer.step()
    assert all(not torch.equal(before[name], value) for name, value in names.items())
    assert not torch.equal(snn(x), want)
    snn.train()
    assert all(module.training for module in snn.modules())


@pytest.mark.parametrize('name', ['residual', 'stem'])
def test_learned_thresholds_given_through_functional_call(name):
    ann, snn, x = some(name, **LEARNED)
    snn(x).sum().backward()
    want = {key: value.grad for key, value in snn.named_parameters()}
    given = {key: value.detach().clone().requires_grad_() for key, value in snn.named_parameters()}
    torch.func.functional_call(snn, given, (x,)).sum().backward()
    for key, value in given.items():
        close(value.grad, want[key], 1e-12, key, True)
    # thresholds that are no parameters, too
    ann, snn, x = some(name)
    threshold = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    torch.func.functional_call(snn, {f'{snn.layer_names[0]}.threshold': threshold}, (x,)).sum().backward()
    assert threshold.grad.abs() > 0


@pytest.mark.parametrize('name', ['residual', 'stem', 'mobile'])
@pytest.mark.parametrize('options', [{}, LEARNED, {'activation': 'STDB'}])
def test_narrow_types(name, options):
    ann, snn, x = some(name, **options)
    want, single = snn(x), copy.deepcopy(snn).float()
    with torch.autocast('cpu', torch.bfloat16):
        got = single(x.float())
    assert got.dtype == torch.float32  # a sum over time
    got.square().sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in single.parameters())
    for each in (got, copy.deepcopy(snn).half()(x.half())):
        assert 0 < (each.double() - want).norm() < 0.5 * want.norm()
    assert copy.deepcopy(snn).half()(x.half()).dtype == torch.float16
    assert all(lif.threshold.dtype in (torch.float64, torch.float32) for lif in single.lifs)


@pytest.mark.parametrize('name', ['residual', 'stem', 'views', 'dense', 'shuffled'])
@pytest.mark.parametrize('timesteps', [1, 3])
def test_batches_of_none_and_one_and_other_layouts(name, timesteps):
    ann, snn, x = some(name, timesteps, **LEARNED)
    want = snn(x)
    want.square().sum().backward()
    grads = [value.grad.clone() for value in snn.parameters()]
    for i in range(3):
        assert torch.allclose(snn(x[i:i + 1]), want[i:i + 1], rtol=1e-9, atol=1e-9)
    if name not in ('views', 'shuffled'):  # whose view(b, -1) no empty batch has
        empty = snn(x[:0])
        assert empty.shape == (0, 5) and snn.curve(x[:0], [1, timesteps]).shape == (2, 0, 5)
        empty.sum().backward()
    snn.zero_grad()
    snn.to(memory_format=torch.channels_last)
    got = snn(x.contiguous(memory_format=torch.channels_last))
    got.square().sum().backward()
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)
    for a, value in zip(grads, snn.parameters(), strict=True):
        close(value.grad, a, 1e-9, 'channels last', True)


def test_parts_of_the_channels_go_into_neurons_as_they_are():
    # one image at one step: a part of a tensor, whose first stride is the whole's
    ann = Net(lambda n, x: n.fc((F.relu(x[:, :1]) - F.relu(x[:, 1:])).flatten(1)), fc=nn.Linear(64, 5)).double().eval()
    for timesteps in (1, 3):
        for batch in (1, 2):
            x = torch.rand(batch, *SHAPE, dtype=torch.float64)
            snn = made(ann, x, timesteps, **DIRECT)
            agrees(snn, ann, x, silent=True)


def test_wrapped_networks():
    ann, x = own('residual'), torch.rand(3, *SHAPE, dtype=torch.float64)
    want = spiking(ann, 3, **DIRECT)(x)
    net = quantize(ann, 2)
    for wrapped in (torch.compile, nn.DataParallel, torch.optim.swa_utils.AveragedModel):
        assert torch.equal(spiking(wrapped(copy.deepcopy(ann)), 3, **DIRECT)(x), want)
        assert list(quantize(wrapped(copy.deepcopy(ann)), 2).state_dict()) == list(net.state_dict())
        assert torch.equal(convert(wrapped(copy.deepcopy(net)), 2)(x), convert(net, 2)(x))


def test_a_child_that_is_named_module_is_no_wrapper():
    ann = Net(lambda n, x: n.head(n.module(x)), module=chain(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten()),
              head=nn.Linear(108, 5)).double().eval()
    x = torch.rand(3, *SHAPE, dtype=torch.float64)
    net = quantized(ann, 1, x)
    assert torch.allclose(convert(net, 1)(x), net(x)) and net(x).shape == (3, 5)


@pytest.mark.slow
def test_a_compiled_spiking_network():
    for name in ('residual', 'stem'):
        ann, snn, x = some(name, **LEARNED)
        want = snn(x)
        want.square().sum().backward()
        grads = [value.grad.clone() for value in snn.parameters()]
        snn.zero_grad()
        got = torch.compile(snn, backend='aot_eager')(x)  # torch's own code in place of compiled C++
        got.square().sum().backward()
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)
        for a, value in zip(grads, snn.parameters(), strict=True):
            close(value.grad, a, 1e-9, 'compiled', True)


def test_learned_values_stay_in_their_ranges():
    for options, thresholds, leaks in ((LEARNED, [1e-4, 1e-4, 3.0], [1e-4, 1.0, 0.5]),
                                       ({}, [-1, 0, 3], [-1, 1.5, 0.5])):
        _, snn, _ = some(**options)
        with torch.no_grad():
            for lif, threshold, leak in zip(snn.lifs, (-1.0, 0.0, 3.0), (-1.0, 1.5, 0.5), strict=True):
                lif.threshold.fill_(threshold)
                lif.leak.fill_(leak)
        snn.constrain()
        assert snn.thresholds.tolist() == pytest.approx(thresholds) and snn.leaks.tolist() == pytest.approx(leaks)
    for update, wrong in ((snn.leak_update, [0.5, 1.1, 1.0]), (snn.leak_update, [1.0]),
                          (lambda values: snn.threshold_update(1.0, values), [1.0, 0.0, 1.0]),
                          (lambda values: snn.threshold_update(1.0, values), [1.0])):
        with pytest.raises(ValueError, match='leak|threshold'):
            update(wrong)


@pytest.mark.parametrize('encoding, delay', [('direct', 0), ('direct', 1), ('poisson', 1)])
def test_the_curve_and_the_record(encoding, delay):
    ann, x = own('stem'), ternary((3, *SHAPE), 1)
    snn = made(ann, x, 6, encoding=encoding, delay=delay, initial_potential=0.5, leak=0.9)
    curve = snn.curve(x, [1, 4, 6])
    records, seen = list(snn.record(x)), step_by_step.run_own(ann, snn, x)[1]
    outputs = dict(zip(snn.layer_names, (each for each in seen)))
    assert [record.name for record in records] == snn.layer_names
    for record, lif in zip(records, snn.lifs):
        assert torch.allclose(record.current, torch.stack(outputs[record.name]), rtol=1e-9, atol=1e-12)
        assert record.potentials.isfinite().all() and record.parameters.threshold == lif.threshold
        u = torch.full_like(record.current[0], 0.5 * lif.threshold.item())
        for current, potential, spikes in zip(record.current, record.potentials, record.spikes):
            h = u if delay else 0.9 * u + current
            assert torch.allclose(potential, h) and torch.equal(spikes.bool(), h > lif.threshold)
            u = h - lif.threshold * spikes if not delay else 0.9 * u + current - lif.threshold * spikes
    for steps, output in zip([1, 4, 6], curve, strict=True):
        snn.timesteps = steps
        assert torch.allclose(snn(x), output, rtol=1e-9, atol=1e-9)
    for wrong in ([], [0], [2, 1], [7]):
        with pytest.raises(ValueError, match='ascend'):
            snn.curve(x, wrong)


def test_the_files_of_self_models_are_found_without_importing_them():
    code = 'import self_models; print(self_models.conversion.find_thresholds is self_models.find_thresholds)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout == 'True\n', done.stderr


@pytest.mark.parametrize('options, words', [
    ({'initial_potential': 1.5}, 'initial_potential must be'), ({'delay': 2}, 'unknown delay 2'),
    ({'gama': 1.0}, 'unknown gama'), ({'once': True}, 'unknown once'), ({'width': 0}, 'width'),
    ({'activation': 'Nope'}, "unknown activation 'Nope'"), ({'backend': 'cuda'}, "unknown backend 'cuda'")])
def test_neurons_that_there_are_not(options, words):
    with pytest.raises(ValueError, match=words):
        plain_way.LIF(4, **options)


@pytest.mark.parametrize('once', [False, True])
@pytest.mark.parametrize('options', [{}, LEARNED, {'activation': 'Linear'}, {'activation': 'Linear', **LEARNED}])
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_neurons_in_blocks(options, once, dtype, monkeypatch):
    lif = plain_way.LIF(5, 0.7, 0.9, delay=0, initial_potential=0.5, **options)
    lif.once, results = once, []
    x = torch.randn(2 if once else 10, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    for size in (1000, 7):  # of rows of 96 neurons
        monkeypatch.setattr(plain_way, 'SHORTEST', 1)
        monkeypatch.setattr(plain_way, 'BLOCK', 5 * size // torch.get_num_threads())
        current = x.clone().requires_grad_()
        y = lif(current)
        lif.zero_grad()
        (y * torch.arange(y.numel()).view(y.shape).sin().to(dtype)).sum().backward()
        results.append([y, current.grad, *(value.grad for value in lif.parameters())])
        broken = x.clone()
        broken[0, 0, 0, 0] = torch.nan  # of one neuron
        assert lif(broken).isnan().all()
    for whole, part in zip(*results, strict=True):
        assert whole.any() and torch.allclose(whole, part, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('once', [False, True])
@pytest.mark.parametrize('activation', ['STDB', 'Linear'])
def test_neurons_keep_one_tensor_for_the_backward_pass(activation, once):
    lif, kept = plain_way.LIF(5, activation=activation, delay=0), []
    lif.once = once
    current = torch.randn(2 if once else 10, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda each: each):
        y = lif(current)
    assert [each.data_ptr() for each in kept] == [(y if activation == 'STDB' else current).data_ptr()]


def test_a_potential_that_is_not_finite_is_not_taken_for_silence():
    _, snn, x = some()
    snn.conv1.weight.data[0, 0] = float('nan')
    assert snn(x).isnan().all() and [
        bool(record.potentials.isfinite().all()) for record in snn.record(x)] == [True, False, False]


class Optional(nn.Module):
    """Arguments that need not be given; activations that it keeps; tensors that are no buffers."""

    def __init__(self):
        super().__init__()
        self.relu, self.middle, self.fc = nn.ReLU(), nn.Linear(128, 8), nn.Linear(8, 5)  # the neurons come first
        self.factor = torch.tensor(2.0, dtype=torch.float64)

    def forward(self, x, mask=None, scale=2.0, more=False, sizes=(8, [1]), *, kind='a'):
        b = x.size(0)
        self.seen = [self.relu(self.middle(x.reshape(b, 16 * sizes[0])))]
        x = self.seen[0] * scale * self.factor * torch.tensor([0.25], dtype=torch.float64)
        if kind == 'b':
            x = x + 1
        return (self.fc(x.view(b, -1)), x) if more else self.fc(x.view(b, -1))


def test_optional_arguments_and_kept_activations():
    ann, x = Optional().double().eval(), torch.rand(3, *SHAPE, dtype=torch.float64) * 2 - 1
    snn = made(ann, x, 4, **DIRECT, **LEARNED)
    agrees(snn, ann, x)
    assert snn.depth == 1 and not hasattr(ann, 'seen')
    assert torch.equal(pickle.loads(pickle.dumps(snn))(x), snn(x)) and torch.equal(copy.deepcopy(snn)(x), snn(x))
    net = quantized(ann, 1, x)
    assert torch.allclose(quiet(net, 1)(x), net(x))
    want = step_by_step.find_own_thresholds(ann, snn, x, 6)
    assert find_thresholds(spiking(ann, 4, **DIRECT, **LEARNED), x, 6) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize('name, depth', [('residual', 2), ('stem', 0), ('views', 3), ('dense', 1), ('mobile', 5),
                                         ('same twice', 1)])
def test_the_shortest_way(name, depth):
    for delay in (0, 1):
        snn = spiking(own(name), 5, delay=delay)
        assert (snn.depth, snn.output_delay) == (depth, delay * depth)


def test_a_network_without_parameters():
    ann = Net(lambda n, x: F.relu(x).flatten(1) @ n.weight)
    ann.register_buffer('weight', torch.randn(128, 5, dtype=torch.float64))
    x = torch.rand(3, *SHAPE, dtype=torch.float64)
    snn, net = spiking(ann, 3, **DIRECT), quantized(ann, 1, x)
    assert find_thresholds(snn, x, 4) == [x.max().item()]
    assert torch.allclose(quiet(net, 1)(x), net(x)) and net(x).std() > 0


def positive(ann):
    """Its weights made positive, so that every neuron is given something."""
    for weight in ann.parameters():
        weight.data.abs_()
    return ann


def test_thresholds_of_activations_on_the_image_leave_it_as_it_is():
    ann = positive(chain(nn.Flatten(), nn.ReLU(), nn.Linear(128, 4), nn.ReLU(), nn.Linear(4, 5))).float()
    snn, x = spiking(ann, 4, **DIRECT, initial_potential=0.5), torch.rand(3, *SHAPE)
    before = x.clone()
    found = find_thresholds(snn, x, 1)
    assert torch.equal(x, before) and found[0] == pytest.approx(x.max().item()) and find_thresholds(snn, x, 1) == found


def test_thresholds_under_autocast_are_those_without():
    ann = positive(chain(nn.Flatten(), nn.Linear(128, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 5)))
    ann = ann.float()
    snn, x = spiking(ann, 4, **DIRECT), torch.rand(3, *SHAPE)
    found = find_thresholds(snn, x, 4)
    with torch.autocast('cpu', torch.bfloat16):
        assert find_thresholds(snn, x, 4) == found


def test_thresholds_of_wrapped_networks_and_of_a_whole_float():
    snn, x = spiking(own('residual'), 4, **DIRECT), torch.rand(3, *SHAPE, dtype=torch.float64)
    found = find_thresholds(snn, x, 4)
    assert find_thresholds(torch.optim.swa_utils.AveragedModel(snn), x, 4.0) == found
    copy_weights(own('residual'), torch.compile(snn))
    assert snn.thresholds.tolist() == pytest.approx(found)
    with pytest.raises(ValueError, match='timesteps must be'):
        find_thresholds(snn, x, 0)


def test_a_leak_that_training_has_left_above_1_is_kept():
    snn, x = spiking(own('residual'), 4, **DIRECT, learn_leak=True), torch.rand(3, *SHAPE, dtype=torch.float64)
    snn.lifs[0].leak.data.fill_(1.0625)
    find_thresholds(snn, x, 4)
    assert snn.leaks[0] == 1.0625


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_neurons_keep_their_numbers_in_16_bits(dtype):
    for snn in (spiking(own('residual'), 4, leak=0.999, default_threshold=1.001),
                network('VGG5', dataset='DIGITS', leak=0.999, default_threshold=1.001),
                plain_way.LIF(4, 1.001, 0.999)):
        cast = nn.Sequential(snn).to(dtype)[0]
        values = (cast.thresholds, cast.leaks) if hasattr(cast, 'leaks') else (cast.threshold, cast.leak)
        assert {*values[0].view(-1).tolist()} == {1.001} and {*values[1].view(-1).tolist()} == {0.999}


def test_a_shared_qcfs_is_fitted_to_all_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = QCFS(4)

        def forward(self, x):
            return self.act(0.1 * self.act(x))

    ann, alone = Twice(), nn.Sequential(QCFS(4))
    x = torch.rand(64, 5) * 10
    fit_bounds(ann, x)
    fit_bounds(alone, x)
    assert ann.act.bound == alone[0].bound > 5
    halved = Net(lambda n, x: n.act(n.act(-x) + 0.05 * x), act=QCFS(4))
    fit_bounds(halved, x)
    half = nn.Sequential(QCFS(4)).half()
    fit_bounds(half, 800 * x.half())  # up to 8,000, whose squares and multiples float16 does not hold
    assert 4000 < half[0].bound < 8001
    assert 0 < halved.act.bound <= 0.5  # of its second call, as the first is given nothing above 0


def test_frozen_parts_stay_frozen():
    ann = own('residual').train()
    ann.norm0.eval()
    ann.conv1.weight.requires_grad_(False)
    for each in (spiking(ann, 3, **DIRECT), quantize(ann), convert(quantize(ann), 2)):
        assert each.training and each.norm1.training and not each.norm0.training
        assert each.conv2.weight.requires_grad and not each.conv1.weight.requires_grad
    ann = own('dropped').train()
    ann.drop.eval()
    snn = spiking(ann, 3, **DIRECT)
    x = torch.rand(3, *SHAPE, dtype=torch.float64)
    assert not snn.drop.training and torch.equal(snn.drop(x), x) and snn.first.training


def test_images_are_left_as_they_are():
    def forward(n, x):
        x -= 0.5
        return n.fc(F.relu(n.conv(x)).flatten(1))
    ann = Net(forward, conv=nn.Conv2d(2, 4, 3, padding=1), fc=nn.Linear(256, 5)).double().eval()
    x = torch.rand(20, *SHAPE, dtype=torch.float64)
    before, snn = x.clone(), spiking(ann, 3, **DIRECT)
    assert find_thresholds(snn, x, 6) == pytest.approx([ann.conv(x - 0.5).max().item()], rel=1e-12)
    assert torch.equal(snn(x), snn(x)) and torch.equal(x, before)
    agrees(made(ann, x, 3, **DIRECT), ann, x)


def test_weights_of_another_ann_are_copied_or_refused():
    ann, x = own('residual'), torch.rand(3, *SHAPE, dtype=torch.float64) * 2 - 1
    ann.relu = QCFS(4).double()  # one module, called three times
    snn = convert(ann, 2).double()
    other = copy.deepcopy(ann)
    other.relu.bound.data.fill_(0.7)
    other.fc.weight.data.normal_()
    copy_weights(other, snn)
    assert snn.thresholds.tolist() == pytest.approx([0.7] * 3) and torch.equal(snn(x), convert(other, 2).double()(x))
    before = {key: value.clone() for key, value in snn.state_dict().items()}
    other.fc = nn.Linear(4, 6)
    channels = copy.deepcopy(ann)
    channels.relu = QCFS(4, channels=4)
    for wrong in (other, own('mobile'), channels):
        with pytest.raises(ValueError, match='layout'):
            copy_weights(wrong, snn)
        assert all(torch.equal(value, before[key]) for key, value in snn.state_dict().items())


def test_functions_whose_names_are_taken():
    ann = Net(lambda n, x: n.fc(n.relu(n.conv1(n.relu(n.conv0(x)))).flatten(1)), conv0=nn.Conv2d(2, 4, 3, padding=1),
              conv1=nn.Conv2d(4, 4, 3, padding=1), fc=nn.Linear(256, 5)).double().eval()
    ann.relu, ann.relu_1 = F.relu, 'taken'
    x = torch.rand(3, *SHAPE, dtype=torch.float64)
    snn = made(ann, x, 4, **DIRECT, **LEARNED)
    assert len(set(snn.layer_names)) == 2
    agrees(snn, ann, x)


# -- conversion of the published layouts ------------------------------------------------------------------------------

def lean_of(ann, architecture, **options):
    """The layer-by-layer network that an ANN with biases or batch norm is copied into."""
    snn = network(architecture, input_shape=(2, 16, 16), bias=True, **{'encoding': 'direct', 'delay': 0, **options})
    copy_weights(ann, snn.double().eval())
    return snn


@pytest.mark.parametrize('kind', ['batch norm', 'biases'])
@pytest.mark.parametrize('architecture', ['VGG5', 'RESNET6'])
def test_relu_converges_to_the_ann(architecture, kind, narrow):
    # a spike is worth its threshold: biases and branches of a sum stay in the ANN's units
    ann = published(architecture, batch_norm=kind == 'batch norm')
    ann = with_biases(ann) if kind == 'biases' else ann
    x = torch.rand(4, 2, 16, 16, dtype=torch.float64)
    want = ann(x)
    for snn in (lean_of(ann, architecture, timesteps=600, initial_potential=0.5),
                spiking(ann, 600, initial_potential=0.5, **DIRECT)):
        find_thresholds(snn, x, 50)
        with torch.no_grad():
            assert (snn(x) / 600 - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize('architecture', ['VGG5', 'RESNET6'])
def test_thresholds_that_are_scaled_anew(architecture, narrow):
    ann, x = with_biases(published(architecture)), IMAGES['direct']
    anew, direct = (lean_of(ann, architecture, timesteps=5) for _ in range(2))
    found = find_thresholds(anew, x, 10)
    anew.threshold_update(0.7, found)
    anew.threshold_update(0.4, found)
    find_thresholds(direct, x, 10)
    direct.threshold_update(0.4, found)
    for name, value in direct.state_dict().items():
        assert torch.allclose(anew.state_dict()[name], value, rtol=1e-12), name
    assert torch.allclose(anew(x), direct(x), rtol=1e-9) and direct(x).std() > 0
    assert find_thresholds(direct, x, 10) == pytest.approx(found, rel=1e-9)


def heads():
    for labels, bias in ((10, True), (3, True), (1, False), (10, False), (20, True)):
        yield lambda ann, labels=labels, bias=bias: ann.classifier.__setitem__(
            -1, nn.Linear(ann.classifier[-1].in_features, labels, bias))


@pytest.mark.parametrize('exchange', [
    *heads(), lambda ann: ann.features.__setitem__(1, nn.BatchNorm2d(3, affine=False)),
    lambda ann: ann.classifier[0].register_parameter('bias', nn.Parameter(torch.rand(12)))])
def test_layouts_with_other_heads_biases_and_norms(exchange, narrow):
    ann, x = published('VGG5', batch_norm=True), IMAGES['direct']
    exchange(ann)
    net = quantized(ann.double().eval(), 1, x)
    want = net(x)
    for wrapped in (net, torch.compile(net), nn.DataParallel(net)):
        snn = convert(wrapped, 1)
        assert type(snn).__name__ == 'VGG_SNN_STDB'
        assert snn(x).shape == want.shape and torch.allclose(snn(x), want, rtol=1e-9, atol=1e-12)
    snn = network('VGG5', input_shape=(2, 16, 16), labels=want.shape[1], bias=True, timesteps=1, **DIRECT).double()
    copy_weights(torch.compile(net), snn)
    assert all(torch.equal(value, convert(net, 1).state_dict()[name]) for name, value in snn.state_dict().items())


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 0.5


class Half(QCFS):
    def forward(self, x):
        return super().forward(x / 2)


EXCHANGED = {  # features: conv, norm, activation, pool, ...
    'max pool': ('VGG5', lambda ann: ann.features.__setitem__(3, nn.MaxPool2d(2))),
    'divisor': ('VGG5', lambda ann: ann.features.__setitem__(3, nn.AvgPool2d(2, divisor_override=3))),
    'own convolution': ('VGG5', lambda ann: ann.features.__setitem__(0, Doubled(2, 3, 3, padding=1, bias=False))),
    'own container': ('VGG5', lambda ann: setattr(ann, 'features', Halved(*ann.features))),
    'weight norm': ('VGG5', lambda ann: ann.features.__setitem__(
        0, nn.utils.parametrizations.weight_norm(ann.features[0]))),
    'identity': ('VGG5', lambda ann: ann.features.__setitem__(6, nn.Identity())),
    'head': ('VGG5', lambda ann: setattr(ann, 'classifier', nn.Linear(48, 4))),
    'another norm': ('VGG5', lambda ann: ann.features.__setitem__(2, nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))),
    'pool behind': ('RESNET6', lambda ann: (setattr(ann, 'final_pool', nn.AdaptiveAvgPool2d(1)),
                                            setattr(ann, 'classifier', nn.Sequential(nn.Linear(4, 10))))),
    'no block': ('RESNET6', lambda ann: (setattr(ann, 'layer2', nn.Identity()),
                                         setattr(ann, 'classifier', nn.Linear(192, 10)))),
    'own block': ('RESNET6', lambda ann: setattr(ann.layer1[0], 'identity', Halved(nn.Identity())))}


@pytest.mark.parametrize('name', EXCHANGED)
def test_layouts_whose_modules_were_exchanged_go_the_plain_way(name, narrow):
    architecture, exchange = EXCHANGED[name]
    ann, x = published(architecture, batch_norm=True), IMAGES['direct']
    exchange(ann)
    net = quantized(ann.double().eval(), 1, x)
    want = net(x)
    snn = quiet(net, 1)
    assert want.std() > 0 and torch.allclose(snn(x), want, rtol=1e-9, atol=1e-12)
    assert type(snn).__name__ == 'PlainNetwork'


def test_activations_of_both_kinds_or_of_ones_own(narrow):
    ann = published('RESNET6', activation='QCFS')
    for block in (ann.layer1[0], ann.layer2[0]):
        block.residual[1] = block.activation = nn.ReLU()
    with pytest.raises(ValueError, match='some of its activations are QCFS, others ReLU'):
        convert(ann, 1)
    ann = published('VGG5', activation='QCFS')
    ann.features[1] = Half()
    with pytest.raises(ValueError, match='cannot be traced'):
        convert(ann, 1)
    with pytest.raises(ValueError, match='no bounds'):
        convert(published('VGG5'), 1)


def test_dropouts_of_an_ann_stay_as_they_are(narrow):
    ann = published('VGG5', activation='QCFS', dropout=0.3)
    ann.features[5] = nn.Dropout(0.9)
    snn = convert(ann, 2)
    assert [module.p for module in snn.modules() if isinstance(module, nn.Dropout)] == [0.9, 0.5, 0.5]


@pytest.mark.parametrize('bounds', ['layer', 'channel'])
def test_bounds_need_factors_at_plain_identities(narrow, bounds):
    ann = published('RESNET6', activation='QCFS', bounds=bounds)
    snn = network('RESNET6', input_shape=(2, 16, 16), **DIRECT).double()
    before = {name: value.clone() for name, value in snn.state_dict().items()}
    with pytest.raises(LayoutError, match='scale=True'):
        copy_weights(ann, snn)
    assert all(torch.equal(value, before[name]) for name, value in snn.state_dict().items())


def test_bounds_of_channels_are_folded_on_a_gpu():
    ann = VGG('VGG5', dataset='DIGITS', activation='QCFS', bounds='channel')
    bounds = [module.bound.shape for module in ann.modules() if isinstance(module, QCFS)]
    with FakeTensorMode(), torch.device('cuda'), torch.no_grad():  # tensors without values, so that none is needed
        fold_channels(network('VGG5', dataset='DIGITS', bias=True, **DIRECT), [torch.ones(shape) for shape in bounds])


def test_channels_behind_a_dropout_that_is_a_function():
    def way(n, x):
        return n.fc(n.relu(F.dropout2d(n.conv(x), 0.3, n.training)).flatten(1))
    net = quantize(Net(way, conv=nn.Conv2d(2, 4, 1), relu=nn.ReLU(), fc=nn.Linear(256, 5)), channels=True)
    assert net.relu.bound.shape == (4,)


def test_a_running_sum_of_sixteen_bits_is_not_rounded_at_each_step():
    snn = spiking(Net(lambda n, x: n.fc(F.relu(n.conv(x)).flatten(1)), conv=nn.Conv2d(2, 4, 1), fc=nn.Linear(256, 5)),
                  300, default_threshold=0.1, **DIRECT).bfloat16().eval()
    x = torch.rand(2, *SHAPE).bfloat16()
    want = snn.over_time(x).float().sum(0)
    assert torch.allclose(snn.curve(x, [300])[0].float(), want, rtol=2 ** -8, atol=0)


def test_channels_that_a_network_has_no_factors_for(narrow):
    ann = published('RESNET6', activation='QCFS')
    ann.layer1[0].activation = QCFS(4, channels=3).double()
    snn = network('RESNET6', input_shape=(2, 16, 16), bias=True, **DIRECT).double()
    before = {name: value.clone() for name, value in snn.state_dict().items()}
    with pytest.raises(LayoutError, match="scale='channel'"):
        copy_weights(ann, snn)
    assert all(torch.equal(value, before[name]) for name, value in snn.state_dict().items())
    x = IMAGES['direct']
    assert torch.allclose(convert(ann, 3)(x), spiking(ann, 3)(x), rtol=1e-9)  # bounds of both kinds


@pytest.mark.parametrize('architecture', ['VGG5', 'RESNET6'])
def test_a_state_dict_carries_thresholds_and_leaks(architecture, narrow):
    x = IMAGES['direct']
    for options in ({}, LEARNED):
        snn = lean_of(with_biases(published(architecture)), architecture, timesteps=5, **options)
        snn.threshold_update(0.5, find_thresholds(snn, x, 10))
        snn.leak_update([0.9 - 0.01 * i for i in range(len(snn.leaks))])
        fresh = lean_of(with_biases(published(architecture)), architecture, timesteps=5, **options)
        assert fresh.load_state_dict(snn.state_dict()).missing_keys == []
        assert torch.equal(fresh(x), snn(x)) and fresh.leaks.tolist() == snn.leaks.tolist() and snn(x).std() > 0
        assert torch.equal(fresh.thresholds, snn.thresholds)


def test_a_part_of_a_state_leaves_what_the_weights_carry(narrow):
    snn, x = convert(quantized(published('RESNET6'), 4, IMAGES['direct']), 4), IMAGES['direct']
    same, thresholds = copy.deepcopy(snn), snn.thresholds.tolist()
    snn.load_state_dict({'classifier.0.weight': snn.classifier[0].weight.clone()}, strict=False)
    for each in (snn, same):
        each.threshold_update(0.5, thresholds)
    assert type(snn).__name__ == 'RESNET_SNN_STDB' and snn.balanced == len(thresholds)
    assert torch.equal(snn(x), same(x)) and same(x).std() > 0


def test_a_threshold_given_through_functional_call_gets_its_gradient(narrow):
    for options in ({}, LEARNED):
        snn = lean_of(with_biases(published('VGG5')), 'VGG5', timesteps=5, activation='Linear', **options)
        snn.threshold_update(0.3, find_thresholds(snn, IMAGES['direct'], 10))
        given = snn.thresholds.detach().clone().requires_grad_()
        torch.func.functional_call(snn, {'thresholds': given}, (IMAGES['direct'],)).square().sum().backward()
        assert (given.grad != 0).all() and getattr(snn.thresholds, 'grad', None) is None
        if options:
            snn(IMAGES['direct']).square().sum().backward()
            assert torch.allclose(snn.thresholds.grad, given.grad, rtol=1e-9)
