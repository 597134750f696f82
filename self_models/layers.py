"""The modules of VGG and ResNet, built from the table in architectures.py, that ANN and SNN share.

They carry no bias and no batch norm: an LIF layer has neither, so the weights can be copied as they are.
"""
import math

from torch import nn

from self_models.architectures import (
    RESNET_BLOCKS,
    RESNET_STAGES,
    VGG11_CIFAR100,
    VGG11_CIFAR100_HIDDEN,
    VGG_HIDDEN,
    VGG_LAYOUTS,
    input_shape_of,
)


def conv(inputs, outputs, kernel_size, stride=1):
    """A convolution without bias that, at stride 1 and an odd kernel, keeps height and width."""
    return nn.Conv2d(inputs, outputs, kernel_size, stride=stride, padding=(kernel_size - 1) // 2, bias=False)


def vgg_layers(vgg_name, labels, dataset, kernel_size, dropout, input_shape=None):
    """(features, classifier): the two nn.Sequential of a VGG.

    A dropout that would stand directly before a pool is left out (Rathi et al., published code).
    Raises ValueError for an unknown name and for images too small for the network's pools.
    """
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
            layers += [conv(channels, item, kernel_size), nn.ReLU(), nn.Dropout(dropout)]
            channels = item
            height, width = (size + 2 * ((kernel_size - 1) // 2) - kernel_size + 1 for size in (height, width))
    hidden = VGG11_CIFAR100_HIDDEN if on_cifar100 else VGG_HIDDEN
    classifier = nn.Sequential(
        nn.Linear(channels * height * width, hidden, bias=False), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(hidden, hidden, bias=False), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(hidden, labels, bias=False))
    return nn.Sequential(*layers), classifier


class BasicBlock(nn.Module):
    """conv-ReLU-dropout-conv plus identity, then ReLU. In an SNN the two ReLUs are LIF layers."""

    def __init__(self, inputs, outputs, stride, dropout):
        super().__init__()
        self.residual = nn.Sequential(
            conv(inputs, outputs, 3, stride), nn.ReLU(), nn.Dropout(dropout), conv(outputs, outputs, 3))
        changes = stride != 1 or inputs != outputs
        self.identity = nn.Sequential(*[conv(inputs, outputs, 1, stride)] if changes else [])

    def forward(self, x):
        return (self.residual(x) + self.identity(x)).relu()


def resnet_layers(resnet_name, labels, dataset, dropout, input_shape=None):
    """[pre_process, layer1, layer2, layer3, layer4, final_pool, classifier] of a ResNet, each an nn.Module.

    Raises ValueError for an unknown name and for images under 2x2 pixels.
    """
    if resnet_name not in RESNET_BLOCKS:
        raise ValueError(f'unknown architecture {resnet_name!r}: choose one of {", ".join(RESNET_BLOCKS)}')
    channels, height, width = input_shape_of(dataset, input_shape)
    large = min(height, width) >= 224
    if large:
        height, width = -(-height // 2), -(-width // 2)
    if min(height, width) < 2:
        raise ValueError(f'{resnet_name} needs images of 2x2 pixels or more, not {height}x{width}')
    pre_process = nn.Sequential(
        conv(channels, 64, 3, 2 if large else 1), nn.ReLU(), nn.Dropout(dropout),
        conv(64, 64, 3), nn.ReLU(), nn.Dropout(dropout),
        conv(64, 64, 3), nn.ReLU(), nn.AvgPool2d(2))
    channels, height, width = 64, height // 2, width // 2
    stages = []
    for (outputs, stride), count in zip(RESNET_STAGES, RESNET_BLOCKS[resnet_name], strict=True):
        blocks = []
        for i in range(count):
            blocks.append(BasicBlock(channels, outputs, stride if i == 0 else 1, dropout))
            channels = outputs
        if blocks:
            height, width = -(-height // stride), -(-width // stride)
        stages.append(nn.Sequential(*blocks))
    final_pool = nn.AdaptiveAvgPool2d(2) if large else nn.Identity()
    height, width = (2, 2) if large else (height, width)
    return [pre_process, *stages, final_pool, nn.Sequential(nn.Linear(channels * height * width, labels, bias=False))]


def initialize(model):
    """Conv2d N(0, sqrt(2 / (k^2 C_out))), Linear N(0, 0.01), as in the published code."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
