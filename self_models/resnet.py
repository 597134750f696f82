"""ResNet as an ANN."""
from functools import partial

import torch
from torch import nn

from self_models.layers import initialize, resnet_layers


class ResNet(nn.Module):
    """A bias-free ResNet whose first 7x7 convolution is replaced by three of 3x3 (Rathi et al. 2020, section 3).

    resnet_name: a key of architectures.RESNET_BLOCKS. labels: number of classes. dataset: a key of INPUT_SHAPES;
    input_shape (C, H, W) overrides the shape that it implies. activation: 'ReLU', or 'QCFS' of so many levels
    with a bound for each 'layer' or 'channel' (bounds). batch_norm: behind every layer but the last. Raises ValueError
    if they do not go together.
    """

    def __init__(self, resnet_name: str, labels: int = 10, dropout: float = 0.2, dataset: str = 'CIFAR10',
                 input_shape: tuple | None = None, activation: str = 'ReLU', levels: int = 8,
                 batch_norm: bool = False, bounds: str = 'layer'):
        super().__init__()
        self.layout = dict(resnet_name=resnet_name, labels=labels, dataset=dataset, dropout=dropout,
                           input_shape=input_shape)  # the spiking network of this layout has them, too
        (self.pre_process, self.layer1, self.layer2, self.layer3, self.layer4, self.final_pool,
         self.classifier) = resnet_layers(**self.layout, activation=activation, levels=levels, batch_norm=batch_norm,
                                          bounds=bounds)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) images -> (B, labels) logits."""
        x = self.pre_process(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4, self.final_pool):
            x = stage(x)
        return self.classifier(x.flatten(1))


# the published names
ResNet6, ResNet12, ResNet20, ResNet34 = (partial(ResNet, f'RESNET{number}') for number in (6, 12, 20, 34))
