"""The plain reference: the equations one time step after another, differentiated by autograd.

It uses the modules of a network of self_models but none of its machinery, so the two can be held against each other.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from self_models import QCFS

OF_SPIKES = ['STDB']  # surrogates of the steps since the neuron's last earlier spike; the others are of z
GRADIENTS = {  # of a spike with respect to z, from these
    'STDB': lambda x, model: model.alpha * torch.exp(-model.beta * x),
    'Linear': lambda x, model: model.gamma * (1 - x.abs()).clamp(min=0),
    'Rectangle': lambda x, model: model.gamma * (x.abs() < model.width / 2).to(x.dtype),
    'ATan': lambda x, model: model.gamma / (1 + (math.pi * model.width * x / 2) ** 2),
    'FastSigmoid': lambda x, model: model.gamma / (1 + model.width * x.abs()) ** 2,
    'Sigmoid': lambda x, model: 4 * model.gamma * torch.sigmoid(model.width * x) * (1 - torch.sigmoid(model.width * x))}


class Spike(torch.autograd.Function):
    """[z > 0] with the surrogate gradient of a model."""

    @staticmethod
    def forward(ctx, z, x, model):
        ctx.save_for_backward(x)
        ctx.model = model
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        return grad * GRADIENTS[ctx.model.activation](x, ctx.model), None, None


class Layer:
    """One LIF layer, from u(-1) = F theta:

    delay 1   u(t) = leak u(t-1) + input(t) - theta o(t), o(t) = [u(t-1) / theta - 1 > 0]
    delay 0   h(t) = leak u(t-1) + input(t), o(t) = [h(t) / theta - 1 > 0], u(t) = h(t) - theta o(t)
    """

    def __init__(self, model, index):
        self.threshold, self.leak, self.model = model.thresholds[index], model.leaks[index], model
        self.u = self.last = None

    def fire(self, potential, t):
        z = potential / self.threshold - 1
        spikes = Spike.apply(z, t - self.last if self.model.activation in OF_SPIKES else z.detach(), self.model)
        self.last = torch.where(spikes.bool(), torch.full_like(self.last, t), self.last)
        return spikes

    def step(self, current, t):
        """Input current at step t -> spikes at step t, which with a delay do not depend on it yet."""
        if self.u is None:
            self.last = torch.full_like(current.detach(), -999)
            self.u = torch.zeros_like(current.detach()) + self.model.initial_potential * self.threshold
        if self.model.delay:
            spikes = self.fire(self.u, t)
            self.u = self.leak * self.u + current - self.threshold * spikes.detach()
        else:
            h = self.leak * self.u + current
            spikes = self.fire(h, t)
            self.u = h - self.threshold * spikes.detach()
        return spikes


def run(model, images, masks=None):
    """(logits, spikes): logits (B, labels) as the model's forward; spikes: for each LIF layer the list over t.

    masks: for each LIF layer the dropout factors (B, ...) held over time, or None.
    """
    layers = [Layer(model, i) for i in range(len(model.layer_names))]
    history, logits = [[] for _ in layers], 0

    def lif(index, current, t):
        spikes = layers[index].step(current, t)
        history[index].append(spikes.detach())
        return spikes if masks is None or masks[index] is None else spikes * masks[index]

    def chain(x, modules, t):
        index = 0
        for module in modules:
            if isinstance(module, nn.ReLU):
                x = lif(index, x, t)
                index += 1
            elif isinstance(module, nn.Linear):
                x = module(x.flatten(1))
            elif not isinstance(module, nn.Dropout):
                x = module(x)
        return x, index

    for t in range(model.timesteps):
        x = images if model.encoding == 'direct' else model.input_layer(images)
        if hasattr(model, 'features'):
            x, _ = chain(x, [*model.features, *model.classifier], t)
        else:
            x, index = chain(x, model.pre_process, t)
            for block in (*model.layer1, *model.layer2, *model.layer3, *model.layer4):
                inner = lif(index, block.residual[0](x), t)
                x = lif(index + 1, block.residual[3](inner) + block.identity(x), t)
                index += 2
            x = model.classifier[0](model.final_pool(x).flatten(1))
        logits = logits + x
    return logits, history


@torch.no_grad()
def find_thresholds(model, images, timesteps, percentile=100):
    """Thresholds of the balanced layers, each found by a run of its own through the layers before it.

    A percentile is taken of the currents at the steps that the delays of the layers before leave, by nearest rank.
    """
    found, before = [], (model.timesteps, model.leak, model.thresholds.clone())
    model.network_update(timesteps, 1.0)
    for index in range(model.balanced):
        currents = []
        module = model.get_submodule(model.layer_names[index])
        hook = module.register_forward_hook(lambda _, __, output, seen=currents: seen.append(output.flatten()))
        run(model, images)
        hook.remove()
        values = torch.cat(currents[0 if module.bias is not None else index * model.delay:]).sort().values
        found.append(values[round(percentile / 100 * (len(values) - 1))].item())
        model.thresholds[index] = found[-1]
    model.network_update(*before[:2])
    model.thresholds.copy_(before[2])
    return found


# -- any network ------------------------------------------------------------------------------------------------------

RELUS = (F.relu, F.relu_, torch.relu, torch.Tensor.relu, torch.Tensor.relu_)
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)


class Neurons(TorchFunctionMode):
    """Puts a Layer in place of each ReLU, wherever a network's own code calls one, and holds dropout's masks over time.

    A spike is worth its threshold. The n-th call in each pass is of the n-th Layer. at_once: how many steps one pass
    goes through, (steps * B, ...); each Layer still takes one after the other. seen: what each Layer was given, a list
    over the passes.
    """

    def __init__(self, model, at_once=1):
        super().__init__()
        self.layers = [Layer(model, i) for i in range(len(model.layer_names))]
        self.seen, self.masks = [[] for _ in self.layers], []
        self.model, self.at_once = model, at_once

    def begin(self, t):
        """A pass that starts at step t."""
        self.t, self.calls, self.dropouts = t, 0, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in DROPOUTS:
            return self.dropout(function, *args, **kwargs)
        if function not in RELUS:
            return function(*args, **kwargs)
        x = args[0] if args else kwargs['input']
        in_place = function.__name__.endswith('_') or kwargs.get('inplace') or len(args) > 1 and args[1]
        spikes = self.fire(x.clone())
        return x.copy_(spikes) if in_place else spikes

    def fire(self, current, bound=None):
        """Currents at one step, or at several one after the other -> what the spikes are worth. bound: of a QCFS, (),
        or (C,) for channels, which is what a spike of theirs is worth at a threshold of 1."""
        layer, self.calls = self.layers[self.calls], self.calls + 1
        worth = 1.0
        if bound is not None and bound.dim():
            worth = bound.view(-1, *[1] * (current.dim() - 2))
        current = current / worth
        self.seen[self.calls - 1].append(current.detach())
        steps = current.unflatten(0, (self.at_once, len(current) // self.at_once))
        spikes = [layer.step(each, self.t + i) for i, each in enumerate(steps)]
        return torch.cat(spikes) * layer.threshold * worth

    def dropout(self, function, x, p=0.5, training=True, inplace=False):
        if not training or not p:
            return x
        if len(self.masks) == self.dropouts:
            self.masks.append(function(torch.ones_like(x[:len(x) // self.at_once]), p, True))
        self.dropouts += 1
        mask = torch.cat([self.masks[self.dropouts - 1]] * self.at_once)
        return x.copy_(x * mask) if inplace else x * mask


def run_own(ann, model, images, at_once=False):
    """(outputs at each step (T, B, ...), what each layer was given, a list over the passes) of an ANN whose own code
    runs one time step after the other, with neurons in place of its activations.

    model: whose thresholds, leaks, surrogate, delay, encoding and time steps they have. at_once: the code runs once, on
    (T * B, ...), as batch norm in training needs; the neurons still take one step after the other.
    """
    neurons = Neurons(model, model.timesteps if at_once else 1)
    quantized = [module for module in ann.modules() if isinstance(module, QCFS)]
    outputs = []
    for module in quantized:
        module.forward = lambda x, module=module: neurons.fire(x, module.bound.detach())
    try:
        with neurons:
            for t in range(0, model.timesteps, neurons.at_once):
                steps = [images.clone() if model.encoding == 'direct' else model.input_layer(images)
                         for _ in range(neurons.at_once)]
                neurons.begin(t)
                outputs.append(ann(torch.cat(steps)))
    finally:
        for module in quantized:
            del module.forward
    output = torch.cat(outputs)
    return output.view(model.timesteps, -1, *output.shape[1:]), neurons.seen


@torch.no_grad()
def find_own_thresholds(ann, model, images, timesteps, percentile=100):
    """The thresholds of a network's neurons, each found by a run of its own with those found before it."""
    own = Settings(model, timesteps)
    for index in range(len(model.layer_names)):
        values = torch.cat([each.flatten() for each in run_own(ann, own, images)[1][index]]).sort().values
        own.thresholds[index] = values[round(percentile / 100 * (len(values) - 1))]
    return own.thresholds.tolist()


class Settings:
    """What Layer and run_own ask a model, at other time steps, leak 1 and thresholds of its own."""

    def __init__(self, model, timesteps):
        for name in ('layer_names', 'encoding', 'input_layer', 'delay', 'initial_potential', 'activation', 'alpha',
                     'beta', 'gamma', 'width'):
            setattr(self, name, getattr(model, name))
        self.timesteps, self.leaks = timesteps, torch.ones(len(model.layer_names), dtype=torch.float64)
        self.thresholds = torch.full_like(self.leaks, 1e300)  # until they are found
