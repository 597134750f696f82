"""VGG as an ANN."""
import torch
from torch import nn

from self_models.layers import initialize, vgg_layers


class VGG(nn.Module):
    """A bias-free VGG with average pooling (Rathi et al. 2020, section 3).

    vgg_name: a key of architectures.VGG_LAYOUTS. labels: number of classes. dataset: a key of INPUT_SHAPES;
    input_shape (C, H, W) overrides the shape that it implies. activation: 'ReLU', or 'QCFS' of so many levels
    with a bound for each 'layer' or 'channel' (bounds). batch_norm: behind every layer but the last. Raises ValueError
    if they do not go together.
    """

    def __init__(self, vgg_name: str = 'VGG16', labels: int = 10, dataset: str = 'CIFAR10', kernel_size: int = 3,
                 dropout: float = 0.2, input_shape: tuple | None = None, activation: str = 'ReLU', levels: int = 8,
                 batch_norm: bool = False, bounds: str = 'layer'):
        super().__init__()
        self.layout = dict(vgg_name=vgg_name, labels=labels, dataset=dataset, kernel_size=kernel_size, dropout=dropout,
                           input_shape=input_shape)  # the spiking network of this layout has them, too
        self.features, self.classifier = vgg_layers(**self.layout, activation=activation, levels=levels,
                                                    batch_norm=batch_norm, bounds=bounds)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) images -> (B, labels) logits."""
        x = self.features(x)
        # not while torch.fx traces the network, as other converters do: x is a proxy then
        if isinstance(x, torch.Tensor) and x.requires_grad and x.is_contiguous(memory_format=torch.channels_last):
            # the last pool's gradient in the pool's own layout: in another, a CPU takes some seven times as long
            x.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))
        return self.classifier(x.flatten(1))
