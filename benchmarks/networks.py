"""The same network in every implementation that compare.py knows, and the work that is measured.

Layers, weights, thresholds and images are the same. At T of 8 or fewer, all have direct input, no delay and an initial
potential of half a threshold; else all but the ANN have Poisson input and begin at 0.
"""
import contextlib
import functools
import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import step_by_step
from examples.network import network
from experiment import engine
from self_models import RESNET_SNN_STDB, VGG, VGG_SNN_STDB, LIFParameters, ResNet, find_thresholds, spiking
from self_models.lif import lif_backward, lif_forward
from self_models.lif_layer import CHUNK_BYTES
from self_models.plain import LIF
from self_models.surrogate import SURROGATES
from values import fill

EXAMPLE = 'network'  # the row of examples/network.py
LOW_LATENCY = {'encoding': 'direct', 'delay': 0, 'initial_potential': 0.5}
MATRIX = {'cpu': 2048, 'cuda': 8192}  # rows and columns of the products that measure the machine's rate, on all cores


class Job(NamedTuple):
    """Work to be timed. A run's seconds are multiplied by `scale`."""
    run: object
    scale: float = 1.0


# --- networks ---------------------------------------------------------------------------------------------------------

def build_ours(row, device, activation='STDB'):
    """A network whose layers all spike: random weights, thresholds balanced on two images."""
    kind = VGG_SNN_STDB if row.architecture.startswith('VGG') else RESNET_SNN_STDB
    backend = 'triton' if device.type == 'cuda' else 'torch'  # as snn.py chooses
    model = kind(row.architecture, activation, timesteps=row.steps, dropout=0.3, backend=backend,
                 **LOW_LATENCY if row.direct else {})
    return balance(fill(model, 0).to(device))


def build_plain(row, device):
    """spiking() of the ANN, Linear: of the example network, whose batch norm makes it spike at thresholds of 1, or of a
    published one, balanced as build_ours() has it."""
    ann = build_ann(row, device) if row.architecture == EXAMPLE else build_ann(row, device, dropout=0.3)
    # gamma 1 is the height of the other libraries' surrogates
    model = spiking(ann, row.steps, activation='Linear', gamma=1.0, backend='triton' if device.type == 'cuda' else
                    'torch', **LOW_LATENCY if row.direct else {})
    return model if row.architecture == EXAMPLE else balance(model)


def balance(model):
    """A spiking network with thresholds that all its layers reach."""
    device = next(model.parameters()).device
    find_thresholds(model, torch.rand(2, 3, 32, 32, device=device), 40)
    model.threshold_update(0.7, list(model.thresholds))
    return model


def build_ann(row, device, **options):
    """The ANN, as ann.py builds it."""
    if row.architecture == EXAMPLE:
        return network(10, (3, 32, 32)).to(device)
    model = (VGG if row.architecture.startswith('VGG') else ResNet)(row.architecture, **options)
    if 'batch_norm' not in options:  # bounds and batch norm keep their initial values
        fill(model, 0)
    return model.to(device, memory_format=torch.channels_last)


def plain_layers(model):
    """The modules of a spiking VGG in order, flattening included."""
    if isinstance(getattr(model, '0', None), nn.Conv2d):  # the example network is one nn.Sequential
        return list(model.children())
    if not hasattr(model, 'features'):
        raise SystemExit('of a ResNet only SpikingJelly\'s network is built, with direct input: '
                         '--implementations ours ann spikingjelly')
    return [*model.features, nn.Flatten(), *model.classifier]


def if_node(threshold, gradient=None):
    """SpikingJelly's IF neuron with soft reset; gradient: its surrogate, in place of Linear's triangle."""
    from spikingjelly.activation_based import neuron, surrogate

    class Node(neuron.IFNode):
        def forward(self, x):  # its potentials are of the type of x, and in bfloat16 its quick kernels do not run
            return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))

    return Node(threshold, v_reset=None, detach_reset=True,
                surrogate_function=gradient or surrogate.PiecewiseQuadratic(1 / threshold))


def prepare_if_nodes(net, model):
    """Set SpikingJelly's multi-step mode; returns the function that starts all potentials anew."""
    from spikingjelly.activation_based import functional, neuron
    functional.set_step_mode(net, 'm')
    neurons = [module for module in net.modules() if isinstance(module, neuron.IFNode)]

    def reset():
        functional.reset_net(net)
        for each in neurons:
            each.v = model.initial_potential * each.v_threshold

    return reset


def build_spikingjelly(model, device, memopt=False, shape=(3, 32, 32)):
    """The same layers in SpikingJelly's multi-step mode; returns (forward, network).

    memopt: recompute them in the backward pass, block by block, from their input spikes, which are kept as bits. A
    block begins behind a neuron, with its dropout and pool, as spikes behind a dropout are not 0 or 1. shape: (C, H, W)
    of the images.
    """
    from spikingjelly.activation_based import layer, neuron, surrogate

    class Block(nn.Sequential):
        pass

    thresholds, blocks = iter(model.thresholds.tolist()), [[]]
    for module in plain_layers(model):
        if isinstance(module, nn.Conv2d):
            new = layer.Conv2d(module.in_channels, module.out_channels, module.kernel_size, padding=module.padding,
                               bias=False)
        elif isinstance(module, nn.Linear):
            new = layer.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        elif isinstance(module, nn.BatchNorm2d):
            new = layer.BatchNorm2d(module.num_features)
        elif isinstance(module, (nn.ReLU, LIF)):
            new = if_node(next(thresholds), surrogate.ATan() if isinstance(module, nn.ReLU) else None)
        elif isinstance(module, nn.Dropout):
            new = layer.Dropout(module.p)
        elif isinstance(module, nn.AvgPool2d):
            new = layer.AvgPool2d(2)
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            new = layer.AdaptiveAvgPool2d(1)
        else:
            new = layer.Flatten()
        if list(module.parameters()):
            new.load_state_dict(module.state_dict())
        blocks[-1].append(new)
        if isinstance(new, neuron.IFNode):
            blocks.append([])
    net = nn.Sequential(*(Block(*block) for block in blocks)).to(device, memory_format=torch.channels_last)
    reset = prepare_if_nodes(net, model)

    def encode(images):
        if model.encoding == 'direct':
            return images.repeat(model.timesteps, 1, 1, 1, 1)
        draws = torch.rand(model.timesteps, *images.shape, device=device)
        return (draws <= images.abs()).to(images) * images.sign()

    def forward(images):
        reset()
        return net(encode(images)).sum(0)

    if memopt:
        from spikingjelly.activation_based import memopt

        def example(current):
            reset()
            with torch.no_grad():
                current(encode(torch.rand(1, *shape, device=device) * 2 - 1))  # Poisson spikes of both signs
        memopt.optimize_memory(net, Block, example, level=1, compress=True)
    return forward, net


class Steps(nn.Module):
    """A neuron in SpikingJelly's multi-step mode between layers that see (T·B, C, H, W)."""

    def __init__(self, neuron, steps):
        super().__init__()
        self.neuron, self.steps = neuron, steps

    def forward(self, x):
        return self.neuron(x.unflatten(0, (self.steps, -1))).flatten(0, 1)  # (T, B, C, H, W)


def build_spikingjelly_resnet(model, row, device):
    """The ANN's ResNet with an IFNode of SpikingJelly for each ReLU, and our thresholds; returns (forward, network)."""
    from spikingjelly.activation_based import layer
    net, thresholds = build_ann(row, device, dropout=0.3), iter(model.thresholds.tolist())
    for parent in list(net.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.Conv2d):
                module.__class__ = nn.Conv2d  # torch's own, not cpu.py's
            if isinstance(module, nn.ReLU):
                setattr(parent, name, Steps(if_node(next(thresholds)), model.timesteps).to(device))
            elif isinstance(module, nn.Dropout):
                setattr(parent, name, Steps(layer.Dropout(module.p), model.timesteps))
    reset = prepare_if_nodes(net, model)

    def forward(images):
        reset()
        return net(images.repeat(model.timesteps, 1, 1, 1)).unflatten(0, (model.timesteps, -1)).sum(0)

    return forward, net


def build_snntorch(model, device):
    """The same layers in snnTorch, one time step after another; returns (forward, network)."""
    import snntorch
    from snntorch import surrogate
    thresholds, modules, begins = iter(model.thresholds.tolist()), [], {}
    for module in plain_layers(model):
        if isinstance(module, nn.ReLU):
            threshold = next(thresholds)
            module = snntorch.Leaky(beta=1.0, threshold=threshold, spike_grad=surrogate.atan(),
                                    reset_mechanism='subtract')
            begins[module] = model.initial_potential * threshold  # a number, for which a GPU need not wait
        modules.append(module)
    net = nn.Sequential(*modules).to(device)

    def step(x, state):
        for module in net:
            if not isinstance(module, snntorch.Leaky):
                x = module(x)
                continue
            if module not in state:
                state[module] = torch.full_like(x, begins[module])
            x, state[module] = module(x, state[module])
        return x

    def forward(images):
        state = {}
        return sum(step(images if model.encoding == 'direct' else model.input_layer(images), state)
                   for _ in range(model.timesteps))

    return forward, net


def build(name, row, device):
    """(forward, network) of an implementation: images -> the logits added up over time."""
    if name.startswith('ann'):
        model = build_ann(row, device, **dict(activation='QCFS', batch_norm=True) if name == 'ann_qcfs' else {})
        return model, model
    if name == 'plain' or row.architecture == EXAMPLE:
        model = build_plain(row, device)
        return build_spikingjelly(model, device) if name == 'spikingjelly' else (model, model)
    model = build_ours(row, device, 'Linear' if name == 'ours_linear' else 'STDB')
    if not name.startswith('ours'):
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.__class__ = nn.Conv2d  # torch's own, not cpu.py's
    if name == 'spikingjelly' and row.direct and row.architecture.startswith('RESNET'):
        return build_spikingjelly_resnet(model, row, device)
    return {'step_by_step': lambda: ((lambda x: step_by_step.run(model, x)[0]), model),
            'spikingjelly': lambda: build_spikingjelly(model, device),
            'spikingjelly_memopt': lambda: build_spikingjelly(model, device, memopt=True),
            'snntorch': lambda: build_snntorch(model, device)}.get(name, lambda: (model, model))()


# --- work -------------------------------------------------------------------------------------------------------------

def job(name, task, row, device, amp):
    """The Job of implementation `name`; 'limit' is the arithmetic that ours takes, as plain matrix products."""
    torch.manual_seed(0)
    if name == 'limit':
        return matrix_job(arithmetic(row, task), device, amp)
    if task in SCANS:
        return scan_job(name, task, row, device)
    forward, net = build(name, row, device)
    images = torch.rand(row.batch, 3, 32, 32, device=device) * 2 - 1
    if task == 'balance' and name == 'ours':
        return Job(lambda: find_thresholds(net, images, row.steps))
    net.train(task in ('train', 'shares', 'growth'))
    if not net.training:
        def test():
            with torch.no_grad(), engine.autocast(device, amp):
                forward(images)
        return Job(test)
    labels = torch.arange(row.batch, device=device) % 10
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, fused=True)

    def train():
        optimizer.zero_grad()
        with engine.autocast(device, amp):
            loss = F.cross_entropy(forward(images) / row.steps, labels)
        loss.backward()
        optimizer.step()
    return Job(train)


def matrix_job(macs, device, amp):
    """A matrix product, scaled to what so many multiplications and additions take at its rate."""
    # as convolutions of float32 run on CUDA
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    size = MATRIX[device.type]
    a, b = torch.rand(2, size, size, device=device, dtype=torch.bfloat16 if amp else torch.float32)
    return Job(lambda: a @ b, macs / size ** 3)


SCANS = {'scan forward': 'STDB', 'scan backward, STDB': 'STDB', 'scan backward, Linear': 'Linear'}


def scan_job(backend, task, row, device):
    """A neurons' scan over time alone, of as many as go through it at once; backend: 'torch' or 'triton'."""
    size = CHUNK_BYTES[device.type] // (4 * row.steps)
    neuron = LIFParameters(1.0, 1.0, SURROGATES[SCANS[task]](), backend, 0 if row.direct else 1)
    current, spikes = torch.randn(row.steps, size, device=device), torch.zeros(row.steps, size, device=device).bool()
    lif_forward(current, spikes, neuron)
    if task == 'scan forward':
        return Job(lambda: lif_forward(current, spikes, neuron))
    grad = torch.zeros(row.steps, size, device=device)  # zeros stay finite, although it works in place
    state = spikes if neuron.surrogate.of_spikes else torch.rand(row.steps, size, device=device)
    return Job(lambda: lif_backward(grad, state, 1, neuron))


@functools.cache
def layer_sizes(architecture):
    """([multiplications of each synapse, first to last], hidden neurons, LIF layers on the way to the output), of one
    image, at one step."""
    macs, neurons, hooks = [], [], []
    model = network(10, (3, 32, 32)) if architecture == EXAMPLE else (
        VGG if architecture.startswith('VGG') else ResNet)(architecture)
    model.eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            hooks.append(module.register_forward_hook(
                lambda module, _, output: macs.append(output[0].numel() * math.prod(module.weight.shape[1:])
                                                      if output.dim() == 4 else module.weight.numel())))
        elif isinstance(module, nn.ReLU):
            hooks.append(module.register_forward_hook(lambda _, __, output: neurons.append(output[0].numel())))
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    if architecture == EXAMPLE:
        return macs, sum(neurons), len(neurons)
    kind = VGG_SNN_STDB if architecture.startswith('VGG') else RESNET_SNN_STDB
    return macs, sum(neurons), kind(architecture).depth


def arithmetic(row, task, ann=False):
    """Multiplications and additions of a step, with every spike and every 0 taken for a number.

    Training takes three times the forward pass, but that nobody wants the gradient of the images. The first layer of
    direct input is needed once, the output layer once, as its input may be added up over time; with a delay the others
    are needed at T - L steps.
    """
    (first, *hidden, last), _, depth = layer_sizes(row.architecture)
    steps = 1 if ann else row.steps - (0 if row.direct else depth)
    once = 1 if row.direct else steps
    train = task != 'test'
    return row.batch * ((2 if train else 1) * first * once + (3 if train else 1) * (sum(hidden) * steps + last))


# --- where the time goes ----------------------------------------------------------------------------------------------

CPU_PARTS = {  # by the names of operations
    'convolutions and matrix products': ('aten::convolution', 'aten::convolution_backward', 'aten::mm', 'aten::addmm',
                                         'aten::addmm_'),
    'scan over time': ('scan over time', '_LIF', '_LIFBackward'),
    'batch norm': ('aten::batch_norm', 'NativeBatchNormBackward0'),
    'activations': ('aten::relu', 'aten::threshold_backward', '_QCFS', '_QCFSBackward'),
    'pools and dropout': ('aten::avg_pool2d', 'aten::avg_pool2d_backward', 'aten::dropout', 'MulBackward0'),
    'optimizer': ('Optimizer.step#SGD.step',)}
CUDA_PARTS = {  # by parts of the names of kernels; the first two are the scans
    'scan over time': ('^_forward$', '^_backward$'),
    'batch norm': ('batch_norm', 'bn_'),
    'pools and dropout': ('pool', 'dropout'),
    'convolutions and matrix products': ('gemm', 'conv', 'cudnn', 'cutlass', 'xmma', 'nvjet', 'wgrad', 'dgrad'),
    'optimizer': ('fused_sgd', 'FusedSgd', 'multi_tensor')}


def part_of(event, cuda):
    """The part of a step that an event of the profiler belongs to, or None."""
    if not cuda:
        return next((part for part, names in CPU_PARTS.items() if event.name in names), None)
    if event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, 'is_user_annotation', False):
        return None
    return next((part for part, names in CUDA_PARTS.items() if any(re.search(name, event.name) for name in names)),
                None)


@contextlib.contextmanager
def parts_of(device, parts):
    """Add what torch's profiler sees of the work within to parts, {part: seconds}."""
    from torch.profiler import ProfilerActivity, profile
    cuda = device.type == 'cuda'
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        yield
    for event in seen.events():
        part, above = part_of(event, cuda), event.cpu_parent
        while above is not None and not part_of(above, cuda):
            above = above.cpu_parent
        if part and above is None:  # else it is part of one that counts already
            parts[part] = parts.get(part, 0) + event.time_range.elapsed_us() / 1e6


def name_scans():
    """Have the profiler see the scans over time of our networks."""
    from self_models import lif_layer
    for name in ('lif_forward', 'surrogate_state', 'lif_backward'):
        setattr(lif_layer, name, torch.profiler.record_function('scan over time')(getattr(lif_layer, name)))
