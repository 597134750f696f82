"""Any network as a spiking one: held to the ANN's own code run one step after another and to the layer-by-layer way;
and what has to be refused."""
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import step_by_step
from conftest import ternary
from self_models import spiking

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
