"""ResNet as a spiking network."""
import torch

from self_models.layers import resnet_layers
from self_models.spiking_network import LayerByLayer, Stage, stages_of


class RESNET_SNN_STDB(LayerByLayer):
    """The ResNet of resnet.py with an LIF layer in place of every ReLU (Rathi et al. 2020).

    resnet_name, labels, dataset, input_shape: as for ResNet, as are the parameters' names, so that its state_dict
    fits. activation: the surrogate gradient by its name, with alpha, beta, gamma and width. timesteps T; leak in
    (0, 1]; default_threshold: of every LIF layer until threshold_update, of those in blocks thereafter. dropout: one
    mask a sample, held over all steps. backend: 'torch', or 'triton' for fused kernels on CUDA. bias: biases in every
    layer, as an ANN with batch norm leaves them once that is folded. scale: a factor in every plain identity, for
    spikes that are worth their threshold, or 'channel', for bounds of channels; biases bring it with them. encoding,
    delay, initial_potential, learn_threshold, learn_leak, width: as for SpikingNetwork. Raises ValueError for values
    that make no network.
    """

    def __init__(self, resnet_name: str, activation: str = 'STDB', labels: int = 10, timesteps: int = 100,
                 leak: float = 1.0, default_threshold: float = 1.0, alpha: float = 0.3, beta: float = 0.01,
                 dropout: float = 0.2, dataset: str = 'CIFAR10', gamma: float = 0.3,
                 input_shape: tuple | None = None, backend: str = 'torch', bias: bool = False,
                 scale: bool | str = False, **options):
        super().__init__(activation, timesteps, leak, default_threshold, alpha, beta, gamma, backend, rate=0.9,
                         **options)
        (self.pre_process, self.layer1, self.layer2, self.layer3, self.layer4, self.final_pool,
         self.classifier) = resnet_layers(resnet_name, labels, dataset, dropout, input_shape, bias=bias,
                                          scale=scale or bias)
        blocks = [f'{name}.{i}' for name in ('layer1', 'layer2', 'layer3', 'layer4')
                  for i in range(len(getattr(self, name)))]
        pre_process = [f'pre_process.{i}' for i in (0, 3, 6)]
        names = pre_process + [f'{block}.residual.{i}' for block in blocks for i in (0, 3)]
        # the shortest way goes through the identities
        self.set_layers(names, depth=len(pre_process) + len(blocks), first=len(pre_process), carries=bias or scale)

    def stages(self) -> list[Stage]:
        stages = stages_of(self.pre_process)
        for block in (*self.layer1, *self.layer2, *self.layer3, *self.layer4):
            conv1, _, dropout, conv2 = block.residual
            before, inner = len(stages) - 1, len(stages)
            identity = block.identity[0] if len(block.identity) else None
            stages += [Stage(((before, conv1),), dropout), Stage(((before, identity), (inner, conv2)))]
        return stages

    def readout(self, counts: torch.Tensor, steps: int) -> torch.Tensor:
        return super().readout(self.final_pool(counts), steps)
