"""From an ANN to a spiking network: copying its weights, folding batch norm, putting QCFS bounds to thresholds."""
import math

import torch
from torch import nn

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


def has_batch_norm(ann: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in ann.modules())


def convert(ann: VGG | ResNet, timesteps: int, **options) -> SpikingNetwork:
    """The spiking network of an ANN whose activations are QCFS, ready to run: nothing is left to be balanced.

    Its output over `timesteps` steps, divided by them, stands for the ANN's logits; at T = 1 and levels 1 it equals
    them. Batch norm is folded in its running statistics. options: of VGG_SNN_STDB or RESNET_SNN_STDB, in place of
    direct input, delay 0, initial potential 1/2 and leak 1.

    Raises ValueError for an ANN without QCFS, whose thresholds are to be balanced (find_thresholds), and where a bound
    or a batch norm is not finite or not above 0. Source: Bu et al., ICLR 2022.
    """
    if not is_quantized(ann):
        raise ValueError('an ANN without QCFS has no bounds to take thresholds from: build the spiking network, copy '
                         'the weights with copy_weights and balance the thresholds with find_thresholds')
    kind = VGG_SNN_STDB if isinstance(ann, VGG) else RESNET_SNN_STDB
    weight = next(ann.parameters())
    snn = kind(**ann.layout, timesteps=timesteps, bias=has_batch_norm(ann), **{**QUANTIZED, **options})
    snn.to(weight.device, weight.dtype).train(ann.training)
    copy_weights(ann, snn)
    return snn


@torch.no_grad()
def copy_weights(ann: VGG | ResNet, snn: SpikingNetwork) -> None:
    """Copy an ANN's weights into the spiking network of its layout, batch norm folded.

    Of QCFS activations the bounds become thresholds; as spikes are 0 or 1, a bound also goes into the weights of the
    next synapse, of a plain identity into its Scale. Raises ValueError as `convert` does.
    """
    thresholds = []

    def fold(source, norm, target, height):
        # gamma (W x - mean) / sqrt(var + eps) + beta
        factor, shift = torch.ones_like(source.weight[:, :1].flatten(1)[:, 0]), None
        if norm is not None:
            check_norm(norm)
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            shift = norm.bias - norm.running_mean * factor
        target.weight.copy_(source.weight * factor.view(-1, *[1] * (source.weight.dim() - 1)) * height)
        if shift is not None:
            target.bias.copy_(shift)

    def height_of(activation):
        if not isinstance(activation, QCFS):
            return 1.0
        bound = activation.bound.item()
        if not 0 < bound < math.inf:
            raise ValueError(f'a QCFS bound must be finite and above 0, not {bound}')
        thresholds.append(bound)
        return bound

    def chain(sources, targets, height):
        """Fold the synapses of two chains of modules; returns the height of the last spikes."""
        targets = [module for module in targets if isinstance(module, (nn.Conv2d, nn.Linear))]
        sources = list(sources)
        for i, module in enumerate(sources):
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                following = sources[i + 1] if i + 1 < len(sources) else None
                norm = following if isinstance(following, nn.modules.batchnorm._BatchNorm) else None
                fold(module, norm, targets.pop(0), height)
            elif isinstance(module, (nn.ReLU, QCFS)):
                height = height_of(module)
        return height

    if isinstance(ann, VGG):
        chain([*ann.features, *ann.classifier], [*snn.features, *snn.classifier], 1.0)
    else:
        last = chain(ann.pre_process, snn.pre_process, 1.0)
        for stage in ('layer1', 'layer2', 'layer3', 'layer4'):
            for source, target in zip(getattr(ann, stage), getattr(snn, stage), strict=True):
                chain(source.residual, target.residual, last)
                chain(source.identity, target.identity, last)
                for module in target.identity:
                    if isinstance(module, Scale):
                        module.factor.fill_(last)
                last = height_of(source.activation)
        chain(ann.classifier, snn.classifier, last)
    if thresholds:
        snn.threshold_update(1.0, thresholds)


def check_norm(norm: nn.Module) -> None:
    if not (norm.track_running_stats and norm.running_var is not None):
        raise ValueError('a batch norm has no running statistics to fold')
    for what in ('weight', 'bias', 'running_mean', 'running_var'):
        values = getattr(norm, what)
        if not values.isfinite().all() or what == 'running_var' and values.min() < 0:
            raise ValueError(f'the {what} of a batch norm is not finite or, of a variance, below 0')
