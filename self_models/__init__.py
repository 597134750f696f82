"""Networks and neurons of hybrid ANN-SNN conversion and STDB (Rathi et al., ICLR 2020)."""
from self_models.architectures import ARCHITECTURES, INPUT_SHAPES
from self_models.conversion import find_thresholds
from self_models.neuron import STDB, LinearSpike, PoissonGenerator
from self_models.resnet import ResNet, ResNet6, ResNet12, ResNet20, ResNet34
from self_models.resnet_spiking import RESNET_SNN_STDB
from self_models.vgg import VGG
from self_models.vgg_spiking import VGG_SNN_STDB

__all__ = ['ARCHITECTURES', 'INPUT_SHAPES', 'LinearSpike', 'PoissonGenerator', 'RESNET_SNN_STDB', 'ResNet', 'ResNet6',
           'ResNet12', 'ResNet20', 'ResNet34', 'STDB', 'VGG', 'VGG_SNN_STDB', 'find_thresholds']
