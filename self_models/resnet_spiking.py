"""ResNet as a spiking network."""
import torch

from self_models.layers import resnet_layers
from self_models.lif_layer import SynapticInput, lif_layer
from self_models.spike_train import DirectInput, SpikeTrain
from self_models.spiking_network import Layers, SpikingNetwork, stages_of


class RESNET_SNN_STDB(SpikingNetwork):
    """The ResNet of resnet.py with an LIF layer in place of every ReLU (Rathi et al. 2020).

    resnet_name, labels, dataset, input_shape: as for ResNet, as are the parameters' names, so that its state_dict
    fits. activation: the surrogate gradient, of alpha, beta, gamma and width. timesteps T; leak in (0, 1];
    default_threshold: of every LIF layer until threshold_update, of those in blocks thereafter. dropout: one mask a
    sample, held over all steps. backend: 'torch', or 'triton' for fused kernels on CUDA. bias: biases in every layer,
    and a factor in every plain identity, as an ANN with batch norm needs them once that is folded. width, encoding,
    delay, initial_potential, learn_threshold, learn_leak: as for SpikingNetwork. Raises ValueError for values that make
    no network.
    """

    def __init__(self, resnet_name: str, activation: str = 'STDB', labels: int = 10, timesteps: int = 100,
                 leak: float = 1.0, default_threshold: float = 1.0, alpha: float = 0.3, beta: float = 0.01,
                 dropout: float = 0.2, dataset: str = 'CIFAR10', gamma: float = 0.3,
                 input_shape: tuple | None = None, backend: str = 'torch', bias: bool = False, **options):
        super().__init__(activation, timesteps, leak, default_threshold, alpha, beta, gamma, backend, rate=0.9,
                         **options)
        (self.pre_process, self.layer1, self.layer2, self.layer3, self.layer4, self.final_pool,
         self.classifier) = resnet_layers(resnet_name, labels, dataset, dropout, input_shape, bias=bias)
        blocks = [f'{name}.{i}' for name in ('layer1', 'layer2', 'layer3', 'layer4')
                  for i in range(len(getattr(self, name)))]
        pre_process = [f'pre_process.{i}' for i in (0, 3, 6)]
        names = pre_process + [f'{block}.residual.{i}' for block in blocks for i in (0, 3)]
        # the shortest way goes through the identities
        self.set_layers(names, depth=len(pre_process) + len(blocks), balanced=len(pre_process))

    def balanced_stages(self) -> list[tuple]:
        return stages_of(self.pre_process)

    def convolutional(self, train: SpikeTrain | DirectInput) -> Layers:
        train = yield from self.chain(train, self.balanced_stages())
        index = self.balanced
        for block in (*self.layer1, *self.layer2, *self.layer3, *self.layer4):
            conv1, _, dropout, conv2 = block.residual
            inputs = [SynapticInput(train, conv1)]
            inner = lif_layer(inputs, self.lif_parameters(index), dropout)
            yield inputs, inner
            inputs = [SynapticInput(train, *block.identity), SynapticInput(inner, conv2)]
            train = lif_layer(inputs, self.lif_parameters(index + 1))
            yield inputs, train
            index += 2
        return train

    def readout(self, counts: torch.Tensor, steps: int) -> torch.Tensor:
        return super().readout(self.final_pool(counts), steps)
