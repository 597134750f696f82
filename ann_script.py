"""Write script.sh, which runs ann.py for every combination of the values given for its flags.

    python ann_script.py                            # VGG16 on CIFAR10 as published
    python ann_script.py --architecture VGG5 --dataset MNIST --dropout 0.1 0.2 --seed 0 1 2 --jobs 2

Then: bash script.sh
"""
import ann
from experiment.sweeps import sweep

PUBLISHED = [
    '--dataset', 'CIFAR10', '--architecture', 'VGG16', '--seed', '0',
    '--epochs', '300', '--batch_size', '64', '--optimizer', 'SGD', '--learning_rate', '1e-2',
    '--lr_interval', '0.60 0.80 0.90', '--lr_reduce', '10', '--weight_decay', '5e-4', '--momentum', '0.9',
    '--dropout', '0.2', '--kernel_size', '3',
]


def main(argv: list[str] | None = None) -> None:
    sweep.main(ann, PUBLISHED, argv)


if __name__ == '__main__':
    main()
