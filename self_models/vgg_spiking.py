"""VGG as a spiking network."""
from self_models.layers import vgg_layers
from self_models.spiking_network import LayerByLayer, Stage, stages_of


class VGG_SNN_STDB(LayerByLayer):
    """The VGG of vgg.py with an LIF layer in place of every ReLU (Rathi et al. 2020).

    vgg_name, labels, dataset, kernel_size, input_shape: as for VGG, as are the parameters' names, so that its
    state_dict fits. activation: the surrogate gradient, of alpha, beta, gamma and width. timesteps T;
    leak in (0, 1]; default_threshold: of every LIF layer until threshold_update. dropout: one mask a sample, held
    over all steps. backend: 'torch', or 'triton' for fused kernels on CUDA. bias: biases in every layer, as an ANN with
    batch norm leaves them once that is folded. width, encoding, delay, initial_potential, learn_threshold,
    learn_leak: as for SpikingNetwork. Raises ValueError for values that make no network.
    """

    def __init__(self, vgg_name: str, activation: str = 'STDB', labels: int = 10, timesteps: int = 100,
                 leak: float = 1.0, default_threshold: float = 1.0, alpha: float = 0.3, beta: float = 0.01,
                 dropout: float = 0.2, kernel_size: int = 3, dataset: str = 'CIFAR10', gamma: float = 0.3,
                 input_shape: tuple | None = None, backend: str = 'torch', bias: bool = False, **options):
        super().__init__(activation, timesteps, leak, default_threshold, alpha, beta, gamma, backend, rate=1.0,
                         **options)
        self.features, self.classifier = vgg_layers(vgg_name, labels, dataset, kernel_size, dropout, input_shape,
                                                    bias=bias)
        names = [f'{part}.{i}' for part in ('features', 'classifier')
                 for i, module in enumerate(getattr(self, part)) if hasattr(module, 'weight')]
        self.set_layers(names[:-1], depth=len(names) - 1, first=len(names) - 1, carries=bias)

    def stages(self) -> list[Stage]:
        return stages_of([*self.features, *self.classifier[:-1]])
