"""The one table of VGG and ResNet layouts and of image shapes. It does not import torch, so `--help` is quick."""

INPUT_SHAPES = {  # channels, height, width
    'MNIST': (1, 28, 28), 'FASHIONMNIST': (1, 28, 28), 'CIFAR10': (3, 32, 32), 'CIFAR100': (3, 32, 32),
    'IMAGENET': (3, 224, 224), 'FOLDER': (3, 32, 32), 'DIGITS': (1, 8, 8)}

VGG_LAYOUTS = {  # 'A' is a 2x2 average pool, a number the output channels of a convolution
    'VGG5': [64, 'A', 128, 128, 'A'],
    'VGG9': [64, 'A', 128, 256, 'A', 256, 512, 'A', 512, 'A', 512],
    'VGG11': [64, 'A', 128, 256, 'A', 512, 512, 'A', 512, 'A', 512, 512],
    'VGG13': [64, 64, 'A', 128, 128, 'A', 256, 256, 'A', 512, 512, 512, 'A', 512],
    'VGG16': [64, 64, 'A', 128, 128, 'A', 256, 256, 256, 'A', 512, 512, 512, 'A', 512, 512, 512],
    'VGG19': [64, 64, 'A', 128, 128, 'A', 256, 256, 256, 256, 'A', 512, 512, 512, 512, 'A', 512, 512, 512, 512]}
VGG11_CIFAR100 = [64, 'A', 128, 256, 256, 'A', 512, 512, 512, 'A', 512, 512]
VGG_HIDDEN, VGG11_CIFAR100_HIDDEN = 4096, 1024  # width of the classifier's two hidden layers

RESNET_BLOCKS = {  # basic blocks in each stage
    'RESNET6': [1, 1, 0, 0], 'RESNET12': [1, 1, 1, 1], 'RESNET20': [2, 2, 2, 2], 'RESNET34': [3, 4, 6, 3]}
RESNET_STAGES = [(64, 1), (128, 2), (256, 2), (512, 2)]  # output channels, stride of the first block

ARCHITECTURES = (*VGG_LAYOUTS, *RESNET_BLOCKS)


def input_shape_of(dataset: str, input_shape: tuple | None = None) -> tuple:
    """(C, H, W) of `dataset`, unless `input_shape` says otherwise. Raises ValueError for an unknown data set."""
    if input_shape is not None:
        return tuple(input_shape)
    if dataset not in INPUT_SHAPES:
        raise ValueError(f'unknown data set {dataset!r}: choose one of {", ".join(INPUT_SHAPES)}')
    return INPUT_SHAPES[dataset]
