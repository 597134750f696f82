"""From an ANN to a spiking network: copying its weights, folding batch norm, putting QCFS bounds to thresholds."""
import math
from itertools import zip_longest

import torch
from torch import nn

from self_models.encoding import PoissonGenerator
from self_models.layers import Scale
from self_models.qcfs import QCFS
from self_models.resnet import ResNet
from self_models.resnet_spiking import RESNET_SNN_STDB
from self_models.spiking_network import SpikingNetwork
from self_models.threshold_balancing import DeadLayerError, find_thresholds
from self_models.vgg import VGG
from self_models.vgg_spiking import VGG_SNN_STDB

__all__ = ['DeadLayerError', 'convert', 'copy_weights', 'find_thresholds', 'is_quantized']

# with which the mean output of a network of QCFS is the ANN's (Bu et al. 2022, theorem 2)
QUANTIZED = {'encoding': 'direct', 'delay': 0, 'initial_potential': 0.5, 'leak': 1.0}


def is_quantized(ann: nn.Module) -> bool:
    """Whether an ANN's activations are QCFS."""
    return any(isinstance(module, QCFS) for module in ann.modules())


def has_biases(ann: nn.Module) -> bool:
    """Whether the spiking network of an ANN needs biases: for its own, or those that its batch norms fold into."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, 'bias', None) is not None
               for module in ann.modules())


def unwrapped(ann: nn.Module) -> nn.Module:
    """The network itself, of one that torch.compile or a parallel wrapper holds."""
    while True:
        inner = getattr(ann, '_orig_mod', getattr(ann, 'module', None))
        if not isinstance(inner, nn.Module):
            return ann
        ann = inner


def convert(ann: VGG | ResNet, timesteps: int, **options) -> SpikingNetwork:
    """The spiking network of an ANN whose activations are QCFS, ready to run: nothing is left to be balanced.

    Its output over `timesteps` steps, divided by them, stands for the ANN's logits; at T = 1 and levels 1 it equals
    them. Batch norm is folded in its running statistics. options: of VGG_SNN_STDB or RESNET_SNN_STDB, in place of
    direct input, delay 0, initial potential 1/2 and leak 1.

    Raises ValueError for an ANN without QCFS, whose thresholds are to be balanced (find_thresholds), for one whose
    modules are not those of its layout, and if a bound or a batch norm is not finite or not above 0. Source: Bu et al.,
    ICLR 2022.
    """
    ann = unwrapped(ann)
    if not is_quantized(ann):
        raise ValueError('an ANN without QCFS has no bounds to take thresholds from: build the spiking network, copy '
                         'the weights with copy_weights and balance the thresholds with find_thresholds')
    kind, scale = (VGG_SNN_STDB, {}) if isinstance(ann, VGG) else (RESNET_SNN_STDB, {'scale': True})
    weight, head = next(ann.parameters()), ann.classifier[-1]
    layout = {**ann.layout, 'labels': getattr(head, 'out_features', ann.layout['labels'])}
    snn = kind(**layout, timesteps=timesteps, bias=has_biases(ann), **scale, **{**QUANTIZED, **options})
    snn.to(weight.device, weight.dtype).train(ann.training)
    copy_weights(ann, snn)
    return snn


@torch.no_grad()
def copy_weights(ann: VGG | ResNet, snn: SpikingNetwork) -> None:
    """Copy an ANN's weights and biases into the spiking network of its layout, batch norm folded.

    Of QCFS activations the bounds become thresholds; as spikes are 0 or 1, a bound also goes into the weights of the
    next synapse, of a plain identity into its Scale. If the spiking network has biases, so does each threshold of an
    ANN with ReLU, now and when it is balanced. Raises ValueError as `convert` does, and for an ANN and a spiking
    network of different layouts; then nothing is copied.
    """
    ann = unwrapped(ann)
    pairs = list(matching_layers(ann, snn))
    folded = [(target, *folded_layer(source, norm, target)) for source, norm, target in pairs if source is not None]
    bounds = [bound_of(module) for module in ann.modules() if isinstance(module, QCFS)]
    for target, weight, bias in folded:
        target.weight.copy_(weight)
        if target.bias is not None:
            target.bias.copy_(0 if bias is None else bias)
    for module in snn.modules():
        if isinstance(module, Scale):
            module.factor.fill_(1)
    snn.carried = None
    if bounds:
        snn.threshold_update(1.0, bounds)
    if bounds or snn.carries:
        snn.carry(snn.thresholds.tolist())


def matching_layers(ann: nn.Module, snn: nn.Module):
    """Yield (layer of the ANN, its batch norm or None, layer of the SNN) for each convolution and linear layer.

    Raises ValueError if the two do not have the same modules in the same order, but for batch norm, which the SNN does
    without, and a plain identity's Scale.
    """
    def leaves(network):
        return [(name, module) for name, module in network.named_modules()
                if not list(module.children()) and not isinstance(module, (nn.Sequential, Scale, nn.Identity))]

    def layout(module):
        if isinstance(module, nn.Linear):
            return 'linear', module.weight.shape
        if isinstance(module, nn.Conv2d):
            return ('convolution', module.weight.shape, module.stride, module.padding, module.dilation, module.groups,
                    module.padding_mode)
        if isinstance(module, (nn.ReLU, QCFS)):
            return ('activation',)
        if isinstance(module, nn.AvgPool2d):
            return ('average pool', *(size if isinstance(size, tuple) else (size, size) for size in (
                module.kernel_size, module.stride, module.padding)), module.ceil_mode)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return 'adaptive average pool', module.output_size
        return 'dropout' if isinstance(module, nn.Dropout) else type(module).__name__,

    targets = [(name, module) for name, module in leaves(snn) if not isinstance(module, PoissonGenerator)]
    sources, norms, last = [], {}, None
    for name, module in leaves(ann):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and last is not None and last not in norms:
            check_norm(module)
            norms[last] = module
            continue
        last = len(sources) if isinstance(module, (nn.Conv2d, nn.Linear)) else None
        sources.append((name, module))
    for i, ((name, source), (other, target)) in enumerate(zip_longest(sources, targets, fillvalue=('nothing', None))):
        if source is None or target is None or layout(source) != layout(target):
            raise ValueError(f'{name} of the ANN is {source}, and {other} of the spiking network {target}: they are of '
                             'different layouts')
        if isinstance(source, (nn.Conv2d, nn.Linear)):
            if target.bias is None and (source.bias is not None or i in norms):
                raise ValueError(f'{name} of the ANN has a bias or a batch norm, and {other} of the spiking network '
                                 'has no bias: build that with bias=True')
            yield source, norms.get(i), target


def folded_layer(layer: nn.Module, norm: nn.Module | None, target: nn.Module) -> tuple:
    """(weight, bias or None) of a layer with its batch norm folded in: gamma (W x + b - mean) / sqrt(var + eps) + beta"""
    if norm is None:
        return layer.weight, layer.bias
    factor = (norm.running_var + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    bias = ((0 if layer.bias is None else layer.bias) - norm.running_mean) * factor
    weight = layer.weight * factor.view(-1, *[1] * (layer.weight.dim() - 1))
    return weight, bias if norm.bias is None else bias + norm.bias


def bound_of(activation: QCFS) -> float:
    bound = activation.bound.item()
    if not 0 < bound < math.inf:
        raise ValueError(f'a QCFS bound must be finite and above 0, not {bound}')
    return bound


def check_norm(norm: nn.Module) -> None:
    if norm.running_var is None:
        raise ValueError('a batch norm has no running statistics to fold')
    for what in ('weight', 'bias', 'running_mean', 'running_var'):
        values = getattr(norm, what)
        if values is not None and (not values.isfinite().all() or what == 'running_var' and values.min() < 0):
            raise ValueError(f'the {what} of a batch norm is not finite or, of a variance, below 0')
