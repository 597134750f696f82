"""A small convolutional network, for the scripts to train, convert and fine-tune as any of your own:

    python ann.py --architecture examples/network.py:network --dataset DIGITS --activation QCFS --levels 4 \\
                  --optimizer Adam --learning_rate 2e-3 --lr_schedule cosine --batch_size 32 --epochs 4
    python snn.py --architecture examples/network.py:network --timesteps 4 --activation Linear --epochs 1 \\
                  --pretrained_ann trained_models/ann/ann_network_digits.pth
"""
import torch
from torch import nn


def network(labels, input_shape, width=64, plan=(1, 1, 'pool', 2, 2, 'pool', 4, 4)):
    """A network of 1.1 million weights, for images of input_shape (C, H, W) and so many labels.

    plan: the channels of each convolution, as multiples of width; 'pool', an average pool; 'max', a max pool before the
    last activation; 'stride': the next convolution is of 4x4 with stride 2, so that what follows sees a quarter of the
    pixels.
    """
    layers, channels, size, stride = [], input_shape[0], 3, 1
    for factor in plan:
        if factor == 'pool':
            layers.append(nn.AvgPool2d(2))
        elif factor == 'max':
            layers.insert(-2, nn.MaxPool2d(2))  # right behind the last convolution
        elif factor == 'stride':
            size, stride = 4, 2
        else:
            layers += [nn.Conv2d(channels, factor * width, size, stride, padding=1, bias=False),
                       nn.BatchNorm2d(factor * width), nn.ReLU()]
            channels, size, stride = factor * width, 3, 1
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, labels)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # in which convolutions take less time


def small(labels, input_shape):
    """The same of a quarter of the channels: 73,000 weights."""
    return network(labels, input_shape, width=16)


def deep(labels, input_shape):
    """The thirteen convolutions of VGG16 with an eighth of their channels: 232,000 weights."""
    plan = (1, 1, 'pool', 2, 2, 'pool', 4, 4, 4, 'pool', 8, 8, 8, 'pool', 8, 8, 8)
    return network(labels, input_shape, width=8, plan=plan)


def quick(labels, input_shape):
    """A network that takes half the time of network() to train: 1.3 million weights, few of them at many pixels."""
    return network(labels, input_shape, width=48, plan=('stride', 1, 2, 2, 'pool', 4, 4, 'pool', 8))


def strided(labels, input_shape):
    """A network without pools: 1.5 million weights. Convolutions with stride 2 take less time than pools."""
    return network(labels, input_shape, width=32, plan=(1, 'stride', 2, 2, 'stride', 4, 4, 'stride', 8, 8))


def max_pools(labels, input_shape):
    """A network with max pools: 1.2 million weights.

    A pool before an activation takes the maximum of currents, at each time step. Over few steps that is not the maximum
    of their mean; batch norm behind it and fine-tuning make up for most of it.
    """
    return network(labels, input_shape, width=32, plan=(1, 2, 'max', 2, 4, 'max', 4, 8, 'max', 8))
