"""Networks and neurons of hybrid ANN-SNN conversion and STDB (Rathi et al., ICLR 2020)."""
import importlib

from self_models.architectures import ARCHITECTURES, INPUT_SHAPES

_HOMES = {
    'Encoding': 'encoding', 'LIF': 'plain', 'LIFParameters': 'lif', 'LayerRecord': 'spiking_network',
    'LinearSpike': 'published', 'NEVER': 'surrogate', 'PoissonGenerator': 'published', 'QCFS': 'qcfs',
    'RESNET_SNN_STDB': 'resnet_spiking', 'ResNet': 'resnet', 'ResNet6': 'resnet', 'ResNet12': 'resnet',
    'ResNet20': 'resnet', 'ResNet34': 'resnet', 'STDB': 'published', 'Scale': 'layers', 'Surrogate': 'surrogate',
    'VGG': 'vgg', 'VGG_SNN_STDB': 'vgg_spiking', 'convert': 'conversion', 'copy_weights': 'conversion',
    'find_thresholds': 'threshold_balancing', 'fit_bounds': 'qcfs', 'quantize': 'traced', 'spiking': 'plain'}

__all__ = ['ARCHITECTURES', 'INPUT_SHAPES', *_HOMES]


def __getattr__(name):
    """Import a network, or a file, on its first use, so that the tables can be had without waiting for torch."""
    if name in _HOMES.values():
        return importlib.import_module(f'{__name__}.{name}')
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)
