"""The plain reference: the equations one time step after another, differentiated by autograd.

It uses the modules of a network of self_models but none of its machinery, so the two can be held against each other.
"""
import math

import torch
from torch import nn

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
