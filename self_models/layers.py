"""The modules of VGG and ResNet, built from the table in architectures.py, that ANN and SNN share.

As published they carry no bias and no batch norm, so that the weights can be copied as they are. An ANN may have batch
norm, which conversion folds into weights and biases, so an SNN may have biases.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from self_models.architectures import (
    RESNET_BLOCKS,
    RESNET_STAGES,
    VGG11_CIFAR100,
    VGG11_CIFAR100_HIDDEN,
    VGG_HIDDEN,
    VGG_LAYOUTS,
    input_shape_of,
)
from self_models.cpu import Conv2d, Dropout
from self_models.qcfs import QCFS

ACTIVATIONS = ('ReLU', 'QCFS')


class Scale(nn.Module):
    """A factor of a plain identity, set by conversion: a spike there stands for a layer's bound, not for 1.

    channels: a factor for each of so many, (C, 1, 1); None for one, ().
    """

    def __init__(self, channels: int | None = None):
        super().__init__()
        self.register_buffer('factor', torch.ones(() if channels is None else (channels, 1, 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of any shape -> the same shape and type."""
        return x * self.factor.to(x.dtype)


class _OneValue:
    """Batch norm that normalises a single value per channel, which has no statistics, by the running statistics.

    A last batch may hold a single image.
    """

    def forward(self, x):
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class BatchNorm1d(_OneValue, nn.BatchNorm1d):
    """nn.BatchNorm1d, also of a single image."""


class BatchNorm2d(_OneValue, nn.BatchNorm2d):
    """nn.BatchNorm2d, also of a single pixel."""


class Parts:
    """Makes the layers of a network.

    bias: of convolutions and linear layers. activation: 'ReLU' or 'QCFS', of `levels`, with a bound for each 'layer' or
    each 'channel' (bounds). batch_norm: behind every convolution and linear layer but the last. scale: a factor in
    every plain identity, or 'channel': one for each channel. Raises ValueError for others.
    """

    def __init__(self, bias: bool = False, activation: str = 'ReLU', levels: int = 8, batch_norm: bool = False,
                 scale: bool | str = False, bounds: str = 'layer'):
        if activation not in ACTIVATIONS:
            raise ValueError(f'unknown activation {activation!r}: choose one of {", ".join(ACTIVATIONS)}')
        for what, value, known in (('bounds', bounds, ('layer', 'channel')),
                                   ('scale', scale, (False, True, 'channel'))):
            if value not in known:
                raise ValueError(f'unknown {what} {value!r}: choose {" or ".join(map(repr, known))}')
        self.bias, self.levels, self.batch_norm, self.scale = bias, levels, batch_norm, scale
        self.quantized, self.by_channel = activation == 'QCFS', bounds == 'channel'

    def activation(self, channels: int) -> nn.Module:
        return QCFS(self.levels, channels=channels if self.by_channel else None) if self.quantized else nn.ReLU()

    def conv(self, inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
        """[a convolution that, at stride 1 and an odd kernel, keeps height and width, and its batch norm if any]"""
        layer = conv(inputs, outputs, kernel_size, stride, self.bias)
        return [layer, BatchNorm2d(outputs)] if self.batch_norm else [layer]

    def linear(self, inputs: int, outputs: int) -> list[nn.Module]:
        layer = nn.Linear(inputs, outputs, bias=self.bias)
        return [layer, BatchNorm1d(outputs)] if self.batch_norm else [layer]


class Exact(nn.Module):
    """Buffers that `exact` names are not cast to 16 bits with the module: in bfloat16 a leak of 0.999 is 1."""
    exact: tuple[str, ...] = ()

    def _apply(self, fn, *args, **options):
        kept = {name: self._buffers[name] for name in self.exact if name in self._buffers}
        super()._apply(fn, *args, **options)
        for name, values in kept.items():
            new = self._buffers[name]
            if new.itemsize < min(4, values.itemsize):
                self._buffers[name] = new.to(values.dtype) if values.is_meta else values.to(new.device)
        return self


def compute_weights(network: nn.Module) -> list[str]:
    """Compute the weights that torch's pruning and older norms of weights compute before a module is called, for code
    that calls none. Returns the paths of modules that have other hooks, which do not run."""
    others = []
    for name, module in network.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if isinstance(hook, BasePruningMethod) or type(hook).__module__.startswith('torch.nn.utils.'):
                hook(module, ())
            else:
                others.append(name)
    return others


def conv(inputs: int, outputs: int, kernel_size: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution that, at stride 1 and an odd kernel, keeps height and width."""
    return Conv2d(inputs, outputs, kernel_size, stride=stride, padding=(kernel_size - 1) // 2, bias=bias)


def vgg_layers(vgg_name: str, labels: int, dataset: str, kernel_size: int, dropout: float,
               input_shape: tuple | None = None, **parts) -> tuple[nn.Sequential, nn.Sequential]:
    """(features, classifier): the two nn.Sequential of a VGG. parts: of Parts.

    A dropout that would stand directly before a pool is left out (Rathi et al., published code).
    Raises ValueError for an unknown name and for images too small for the network's pools.
    """
    parts = Parts(**parts)
    if vgg_name not in VGG_LAYOUTS:
        raise ValueError(f'unknown architecture {vgg_name!r}: choose one of {", ".join(VGG_LAYOUTS)}')
    channels, height, width = input_shape_of(dataset, input_shape)
    on_cifar100 = vgg_name == 'VGG11' and dataset == 'CIFAR100'
    layout = VGG11_CIFAR100 if on_cifar100 else VGG_LAYOUTS[vgg_name]
    if min(height, width) >= 224:
        layout = layout + ['A']
    pools = layout.count('A')
    if min(height, width) >> pools < 1:
        raise ValueError(f'{vgg_name} halves the image {pools} times, too often for {height}x{width} pixels: '
                         'choose a network with fewer pools (VGG5 has 2) or larger images')
    layers = []
    for item in layout:
        if item == 'A':
            if isinstance(layers[-1], nn.Dropout):
                layers.pop()
            layers.append(nn.AvgPool2d(2))
            height, width = height // 2, width // 2
        else:
            layers += [*parts.conv(channels, item, kernel_size), parts.activation(item), Dropout(dropout)]
            channels = item
            height, width = (size + 2 * ((kernel_size - 1) // 2) - kernel_size + 1 for size in (height, width))
        if min(height, width) < 1:  # a convolution with an even kernel takes a pixel off
            raise ValueError(f'{vgg_name} with kernels of {kernel_size} leaves nothing of such images: choose an odd '
                             'kernel_size, or larger images')
    hidden = VGG11_CIFAR100_HIDDEN if on_cifar100 else VGG_HIDDEN
    classifier = nn.Sequential(
        *parts.linear(channels * height * width, hidden), parts.activation(hidden), Dropout(0.5),
        *parts.linear(hidden, hidden), parts.activation(hidden), Dropout(0.5),
        nn.Linear(hidden, labels, bias=parts.bias))
    return nn.Sequential(*layers), classifier


class BasicBlock(nn.Module):
    """conv-ReLU-dropout-conv plus identity, then ReLU. In an SNN the two ReLUs are LIF layers. parts: Parts."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float, parts: Parts):
        super().__init__()
        self.residual = nn.Sequential(
            *parts.conv(inputs, outputs, 3, stride), parts.activation(outputs), Dropout(dropout),
            *parts.conv(outputs, outputs, 3))
        if stride != 1 or inputs != outputs:
            identity = parts.conv(inputs, outputs, 1, stride)
        else:
            identity = [Scale(outputs if parts.scale == 'channel' else None)] if parts.scale else []
        self.identity, self.activation = nn.Sequential(*identity), parts.activation(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.residual(x) + self.identity(x))


def resnet_layers(resnet_name: str, labels: int, dataset: str, dropout: float, input_shape: tuple | None = None,
                  **parts) -> list[nn.Module]:
    """[pre_process, layer1, layer2, layer3, layer4, final_pool, classifier] of a ResNet, each an nn.Module. parts: of
    Parts.

    Raises ValueError for an unknown name and for images under 2x2 pixels.
    """
    resnet_name = resnet_name.upper()  # as published
    if resnet_name not in RESNET_BLOCKS:
        raise ValueError(f'unknown architecture {resnet_name!r}: choose one of {", ".join(RESNET_BLOCKS)}')
    parts = Parts(**parts)
    channels, height, width = input_shape_of(dataset, input_shape)
    large = min(height, width) >= 224
    if large:
        height, width = -(-height // 2), -(-width // 2)
    if min(height, width) < 2:
        raise ValueError(f'{resnet_name} needs images of 2x2 pixels or more, not {height}x{width}')
    pre_process = nn.Sequential(
        *parts.conv(channels, 64, 3, 2 if large else 1), parts.activation(64), Dropout(dropout),
        *parts.conv(64, 64, 3), parts.activation(64), Dropout(dropout),
        *parts.conv(64, 64, 3), parts.activation(64), nn.AvgPool2d(2))
    channels, height, width = 64, height // 2, width // 2
    stages = []
    for (outputs, stride), count in zip(RESNET_STAGES, RESNET_BLOCKS[resnet_name], strict=True):
        blocks = []
        for i in range(count):
            blocks.append(BasicBlock(channels, outputs, stride if i == 0 else 1, dropout, parts))
            channels = outputs
        if blocks:
            height, width = -(-height // stride), -(-width // stride)
        stages.append(nn.Sequential(*blocks))
    final_pool = nn.AdaptiveAvgPool2d(2) if large else nn.Identity()
    height, width = (2, 2) if large else (height, width)
    classifier = nn.Sequential(nn.Linear(channels * height * width, labels, bias=parts.bias))
    return [pre_process, *stages, final_pool, classifier]


def initialize(model: nn.Module) -> None:
    """Conv2d N(0, sqrt(2 / (k^2 C_out))), Linear N(0, 0.01), as in the published code; biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
