"""Write script.sh, which runs snn.py for every combination of the values given for its flags.

    python snn_script.py                            # VGG11 on CIFAR100 from its ANN, at the defaults
    python snn_script.py -a VGG5 --dataset MNIST --pretrained_ann trained_models/ann/ann_vgg5_mnist.pth \\
        --leak 1.0 0.99 --seed 0 1 2 --jobs 2

Then: bash script.sh
"""
import snn
from experiment.sweeps import sweep

PUBLISHED = [
    '--dataset', 'CIFAR100', '--architecture', 'VGG11', '--seed', '0',
    '--pretrained_ann', 'trained_models/ann/ann_vgg11_cifar100.pth',
    '--epochs', '300', '--batch_size', '64', '--optimizer', 'Adam', '--amsgrad', 'True', '--learning_rate', '1e-4',
    '--lr_interval', '0.60 0.80 0.90', '--lr_reduce', '10', '--weight_decay', '5e-4',
    '--dropout', '0.3', '--kernel_size', '3',
    '--timesteps', '100', '--leak', '1.0', '--scaling_factor', '0.7', '--default_threshold', '1.0',
    '--activation', 'STDB', '--alpha', '0.3', '--beta', '0.01',
]


def main(argv: list[str] | None = None) -> None:
    sweep.main(snn, PUBLISHED, argv)


if __name__ == '__main__':
    main()
