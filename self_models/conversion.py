"""From an ANN to a spiking network: copy weights, fold batch norm, take QCFS bounds as thresholds."""
from functools import partial
from itertools import zip_longest

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from self_models.layers import Scale, compute_weights
from self_models.plain import LIF, QUANTIZED, PlainNetwork, checked_bound, spiking
from self_models.published import PoissonGenerator
from self_models.qcfs import QCFS
from self_models.resnet import ResNet
from self_models.resnet_spiking import RESNET_SNN_STDB
from self_models.spiking_network import SpikingNetwork, Stage
from self_models.threshold_balancing import DeadLayerError, find_thresholds
from self_models.traced import unwrapped
from self_models.vgg import VGG
from self_models.vgg_spiking import VGG_SNN_STDB

__all__ = ['QUANTIZED', 'DeadLayerError', 'LayoutError', 'convert', 'copy_weights', 'find_thresholds',
           'is_quantized']


class LayoutError(ValueError):
    """An ANN and a spiking network whose modules are not of one layout."""


def is_quantized(ann: nn.Module) -> bool:
    """Whether an ANN's activations are QCFS."""
    return any(isinstance(module, QCFS) for module in ann.modules())


def has_biases(ann: nn.Module) -> bool:
    """Whether the spiking network of an ANN needs biases: if the ANN has some, or batch norm, which becomes a bias."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, 'bias', None) is not None
               for module in ann.modules())


def convert(ann: nn.Module, timesteps: int, **options) -> SpikingNetwork:
    """The spiking network of a QCFS ANN, ready to run: no threshold needs balancing.

    Its output over `timesteps` steps, divided by them, stands for the ANN's logits; at T = 1 and levels 1 it equals
    them. A VGG or a ResNet becomes a VGG_SNN_STDB or a RESNET_SNN_STDB with batch norm folded (by its running
    statistics); any other network, also one of these whose modules were exchanged, becomes spiking(ann). options: of
    those, in place of direct input, delay 0, initial potential 1/2 and leak 1.

    Raises ValueError for an ANN without QCFS, whose thresholds are to be balanced (find_thresholds), for a network that
    cannot be spiking, and if a bound or a batch norm is not finite or not above 0. Source: Bu et al., ICLR 2022.
    """
    ann = unwrapped(ann)
    if not is_quantized(ann):
        raise ValueError('an ANN without QCFS has no bounds that become thresholds: train quantize(ann), or balance '
                         'the thresholds of spiking(ann, timesteps) with find_thresholds')
    check_values(ann)
    kind = next((kind for kind in (VGG, ResNet) if isinstance(ann, kind) and type(ann).forward is kind.forward), None)
    if kind and 'forward' not in vars(ann):
        weight, head = next(ann.parameters()), [*ann.classifier.modules()][-1]
        layout = {**ann.layout, 'labels': getattr(head, 'out_features', ann.layout['labels'])}
        build = VGG_SNN_STDB if kind is VGG else partial(RESNET_SNN_STDB, scale=scales_of(ann))
        snn = build(**{**layout, 'timesteps': timesteps, 'bias': has_biases(ann), **QUANTIZED, **options})
        snn.to(weight.device, weight.dtype).train(ann.training)
        try:
            copy_weights(ann, snn)
            copy_settings(ann, snn, options.get('dropout'))
            return snn
        except LayoutError:
            pass
    if 'dropout' in options:
        raise ValueError('dropout is an option of a VGG or a ResNet: set p of the dropouts of your own network')
    return spiking(ann, timesteps, **options)


@torch.no_grad()
def copy_settings(ann: nn.Module, snn: SpikingNetwork, dropout: float | None) -> None:
    """Freeze what is frozen in an ANN of the same layout, and drop where and as often as it drops; dropout: what the
    spiking network was given in place of the ANN's, or None."""
    def learned(module, what):  # pruning and norms compute a weight from others, of longer names
        return [p.requires_grad for name, p in module.named_parameters()
                if name.removeprefix('parametrizations.').startswith(what)]

    for source, norm, target in matching_layers(ann, snn):
        target.weight.requires_grad_(any(learned(source, 'weight')))
        if target.bias is not None:
            biases = learned(source, 'bias') + (learned(norm, '') if norm else [])
            target.bias.requires_grad_(any(biases) if biases else target.weight.requires_grad)
    dropouts = ([each for each in network.modules() if isinstance(each, nn.Dropout)] for network in (ann, snn))
    for own, new in zip(*dropouts):
        new.training = own.training
        if new.p != dropout:
            new.p = own.p


def scales_of(ann: nn.Module) -> bool | str:
    """The `scale` of a RESNET_SNN_STDB that a QCFS ANN is converted to."""
    return 'channel' if any(module.bound.dim() for module in ann.modules() if isinstance(module, QCFS)) else True


@torch.no_grad()
def copy_weights(ann: nn.Module, snn: SpikingNetwork) -> None:
    """Copy an ANN's weights and biases into the spiking network of its layout, batch norm folded.

    QCFS bounds become thresholds. As spikes are 0 or 1, a bound also multiplies the weights of the next synapse, or the
    Scale of a plain identity. Bounds of channels go into the weights on both sides, and the threshold is 1. If the
    spiking network has biases, a threshold multiplies the weights behind it for an ANN with ReLU, too, now and when it
    is balanced. Raises ValueError as `convert` does, and for an ANN and a spiking network of different layouts (of VGG
    and ResNet a LayoutError, which is one); nothing is copied then.
    """
    ann, snn = unwrapped(ann), unwrapped(snn)
    if isinstance(snn, PlainNetwork):
        check_values(ann)
        snn.copy_from(ann)
        return
    pairs = list(matching_layers(ann, snn))
    quantized, relus = ([each for each in ann.modules() if isinstance(each, kind)] for kind in (QCFS, nn.ReLU))
    if quantized and relus:
        raise LayoutError('some activations of the ANN are QCFS, others ReLU')
    bounds = [checked_bound(module.bound) for module in quantized]
    factors = [module.factor for module in snn.modules() if isinstance(module, Scale)]
    if bounds and any(synapse is None for stage in snn.stages() for _, synapse in stage.inputs):
        raise LayoutError('the ANN has bounds, but the plain identities of the spiking network have no factors for '
                          'them: build it with scale=True')
    if any(bound.dim() for bound in bounds) and not all(factor.dim() for factor in factors):
        raise LayoutError("the ANN has bounds of channels, but the spiking network has no factors for them: build it "
                          "with scale='channel'")
    folded = [(target, *folded_layer(source, norm)) for source, norm, target in pairs if source is not None]
    for target, weight, bias in folded:
        target.weight.copy_(weight)
        if target.bias is not None:
            target.bias.copy_(0 if bias is None else bias)
    for factor in factors:
        factor.fill_(1)
    snn.carried = None
    if any(bound.dim() for bound in bounds):
        fold_channels(snn, bounds)
        snn.threshold_update(1.0, [1.0] * len(bounds))
    elif bounds:
        snn.threshold_update(1.0, [bound.item() for bound in bounds])
    if bounds or snn.carries:
        snn.carry(snn.thresholds.tolist())


def fold_channels(snn: SpikingNetwork, bounds: list[torch.Tensor]) -> None:
    """Divide a layer's input by the bounds of its channels and multiply its output by them, so that its threshold is 1:
    each row of its W is divided by theta, each column of the next W multiplied."""
    last = [Stage(((len(bounds) - 1, snn.classifier[-1]),))]
    for stage, bound in zip([*snn.stages(), *last], [*bounds, bounds[0].new_ones(())]):
        for source, synapse in stage.inputs:
            if isinstance(synapse, Scale):
                synapse.factor.copy_((bounds[source] / bound).view(-1, 1, 1))
                continue
            ones, tail = [1] * (synapse.weight.dim() - 2), synapse.weight.shape[1]
            synapse.weight /= bound.view(-1, 1, *ones)
            if synapse.bias is not None:
                synapse.bias /= bound
            if source >= 0:  # behind a feature map a linear layer has a column for each pixel of a channel
                columns = bounds[source].repeat_interleave(tail // max(1, bounds[source].numel()))
                synapse.weight *= columns.view(1, -1, *ones)


def matching_layers(ann: nn.Module, snn: nn.Module):
    """Yield (layer of the ANN, its batch norm or None, layer of the SNN) for each convolution and linear layer.

    Raises ValueError unless both have the same modules in the same order, apart from batch norm, which the SNN lacks,
    and a plain identity's Scale.
    """
    def is_own(module):
        return 'forward' in vars(module) or not type(module).forward.__module__.startswith(('torch.', 'self_models.'))

    def leaves(network):
        return [(name, module) for name, module in network.named_modules() if is_own(module) or not list(
            module.children()) and not isinstance(module, (nn.Sequential, Scale, nn.Identity))]

    def layout(module):
        if is_own(module):
            return type(module).forward,
        if isinstance(module, nn.Linear):
            return 'linear', module.weight.shape
        if isinstance(module, nn.Conv2d):
            return ('convolution', module.weight.shape, module.stride, module.padding, module.dilation, module.groups,
                    module.padding_mode)
        if isinstance(module, (nn.ReLU, QCFS)):
            return ('activation',)
        if isinstance(module, nn.AvgPool2d):
            return ('average pool', *(size if isinstance(size, tuple) else (size, size) for size in (
                module.kernel_size, module.stride, module.padding)), module.ceil_mode, module.divisor_override)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return 'adaptive average pool', module.output_size
        return 'dropout' if isinstance(module, nn.Dropout) else type(module).__name__,

    for name in compute_weights(ann):
        raise LayoutError(f'{name or "the ANN"} has hooks, which a copy of its weights does not run: remove them')
    targets = [(name, module) for name, module in leaves(snn) if not isinstance(module, PoissonGenerator)]
    sources, norms, last = [], {}, None
    for name, module in leaves(ann):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not is_own(module) and last not in {None, *norms}:
            check_norm(module)
            norms[last] = module
            continue
        last = len(sources) if isinstance(module, (nn.Conv2d, nn.Linear)) else None
        sources.append((name, module))
    for i, ((name, source), (other, target)) in enumerate(zip_longest(sources, targets, fillvalue=('nothing', None))):
        if source is None or target is None or layout(source) != layout(target):
            raise LayoutError(f'{name} of the ANN is {source}, and {other} of the spiking network {target}: the two '
                              'are of different layouts')
        if isinstance(source, (nn.Conv2d, nn.Linear)):
            if not isinstance(target.weight, nn.Parameter):
                raise ValueError(f'the weight of {other} of the spiking network is computed from others, as by '
                                 'pruning: make it permanent first, as prune.remove does')
            if target.bias is None and (source.bias is not None or i in norms):
                raise LayoutError(f'{name} of the ANN has a bias or a batch norm, but {other} of the spiking network '
                                  'has no bias: build it with bias=True')
            yield source, norms.get(i), target


def folded_layer(layer: nn.Module, norm: nn.Module | None) -> tuple:
    """(weight, bias or None) of a layer with its batch norm folded in."""
    # gamma (W x + b - mean) / sqrt(var + eps) + beta
    if norm is None:
        return layer.weight, layer.bias
    factor = (norm.running_var + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    bias = ((0 if layer.bias is None else layer.bias) - norm.running_mean) * factor
    weight = layer.weight * factor.view(-1, *[1] * (layer.weight.dim() - 1))
    return weight, bias if norm.bias is None else bias + norm.bias


def check_values(ann: nn.Module) -> None:
    """Raise ValueError if a bound or a batch norm is not finite, a bound not above 0 or a variance below."""
    for module in ann.modules():
        if isinstance(module, QCFS):
            checked_bound(module.bound)
        elif isinstance(module, LIF) and module.bounds is not None:
            checked_bound(module.bounds)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not (
                module.running_var is None or is_lazy(module.running_var)):
            check_norm(module)


def check_norm(norm: nn.Module) -> None:
    if norm.running_var is None:
        raise ValueError('a batch norm has no running statistics to fold')
    for what in ('weight', 'bias', 'running_mean', 'running_var'):
        values = getattr(norm, what)
        if values is not None and (not values.isfinite().all() or what == 'running_var' and values.min() < 0):
            raise ValueError(f'the {what} of a batch norm is not finite or, of a variance, below 0')
