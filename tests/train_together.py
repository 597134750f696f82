"""What test_distributed.py runs, alone and by torchrun: a spiking network trained for two epochs on ternary images.

    python tests/train_together.py FILE BATCH_SIZE

A Poisson encoder passes ternary images on unchanged, so that no random draw matters. Writes the weights, the training
metrics and a test's to FILE.
"""
import sys
from argparse import Namespace

import torch

from conftest import fill, ternary
from experiment import distributed, engine
from experiment.data import Pictures, Transform, epoch_loader
from self_models import RESNET_SNN_STDB


def main(path, batch_size):
    device = torch.device('cpu')
    if distributed.wanted():
        distributed.start(device)
    process = distributed.process()
    images = ternary((19, 1, 8, 8), 5, low=0).to(torch.uint8)
    dataset = Pictures(images, torch.arange(19) % 10, Transform(top=1, signed=False))
    model = fill(RESNET_SNN_STDB('RESNET6', dataset='DIGITS', timesteps=12, dropout=0.0), 3)
    model.input_layer.rate = 1.0
    model.threshold_update(1.0, [2.0] * 7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    learner, metrics = distributed.learner(model, device), []
    for epoch in (1, 2):
        loader = epoch_loader(dataset, batch_size, seed=epoch, shuffle=True, process=process)
        metrics.append(tuple(engine.train_epoch(learner, loader, optimizer, engine.cross_entropy, device)))
    args = Namespace(seed=0, batch_size=batch_size, num_workers=0, amp=False)
    tested, curve = engine.test_over_time(model, dataset, engine.cross_entropy, device, args, at=[6, 12])
    thresholds = distributed.from_main(lambda: [float(process.rank), 5.0])
    assert thresholds == [0.0, 5.0]
    torch.save({'state_dict': model.state_dict(), 'metrics': metrics, 'tested': tuple(tested), 'curve': curve},
               f'{path}.{process.rank}')


if __name__ == '__main__':
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]))
    distributed.stop()
