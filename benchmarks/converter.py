"""Conversion without training, compared with SpikingJelly's converters on the same ANN: test accuracy at each T.

    python benchmarks/converter.py --pretrained_ann trained_models/ann/vgg5_qcfs_seed0.pth -a VGG5 --dataset CIFAR10

Takes the flags of snn.py, for a QCFS or ReLU ANN. SpikingJelly converts ReLU only, so it gets the ReLU that QCFS
quantizes; the row 'ANN, ReLU' has the accuracy of that ANN. All use direct input.

    this                  self_models.convert, of QCFS only
    SpikingJelly max      RateCodingRecipe(mode='Max')
    SpikingJelly 99.9%    RateCodingRecipe(mode='99.9%', channel_wise=True, half_threshold=True)
    SpikingJelly local    LocalThresholdBalancingRecipe() (Bu, Li and Yu, CVPR 2025)
"""
import copy
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import snn  # noqa: E402
from experiment import UserError, checkpoint, engine, options, setup  # noqa: E402
from experiment.data import epoch_loader  # noqa: E402
from experiment.start import find_snn  # noqa: E402
from self_models import QCFS, convert  # noqa: E402
from self_models.conversion import is_quantized  # noqa: E402

STEPS = (1, 2, 4, 8, 16, 32)
IMAGES = 512  # training images for SpikingJelly's calibration
EPOCHS = 50  # passes over them of its local threshold balancing, in batches of 32


class OverTime(nn.Module):
    """A network of SpikingJelly that offers what a SpikingNetwork does: outputs after each of some numbers of steps."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def curve(self, x, at):
        """(B, C, H, W) -> (len(at), B, labels), summed over the steps."""
        from spikingjelly.activation_based import functional
        functional.reset_net(self.net)
        total, outputs = 0, []
        with torch.autocast(x.device.type, enabled=False):  # under which its potentials and sums would have 16 bits
            for step in range(1, at[-1] + 1):
                total = total + self.net(x)
                if step in at:
                    outputs.append(total)
        return torch.stack(outputs)


def relu_of(ann):
    """A copy of an ANN with ReLU where it has QCFS, and torch's own layers, which torch.fx can trace."""
    ann = copy.deepcopy(ann)
    for module in list(ann.modules()):
        for name, child in module.named_children():
            if isinstance(child, QCFS):
                setattr(module, name, nn.ReLU())
            for plain in (nn.BatchNorm1d, nn.BatchNorm2d, nn.Conv2d):
                if isinstance(child, plain):
                    child.__class__ = plain  # ours differ only in forward()
    return ann.eval()


def open_ann(args):
    """(the ANN of --pretrained_ann, the Data, the device), as the flags of snn.py say. Raises UserError."""
    if not args.pretrained_ann:
        raise UserError('--pretrained_ann: name the ANN that is to be converted')
    device = setup.set_up_device(args)
    state = find_snn(args, device).state
    data = setup.load_data(args)
    ann = setup.build_ann(args, data, **checkpoint.ann_layers(state)).to(device)
    checkpoint.load_weights(ann, state, args.pretrained_ann)
    return ann, data, device


def main(args):
    try:
        from spikingjelly.activation_based import ann2snn
    except ImportError as error:
        raise UserError('SpikingJelly is not here: pip install spikingjelly') from error
    ann, data, device = open_ann(args)
    relu = relu_of(ann)
    images, labels = next(iter(epoch_loader(data.train, IMAGES, seed=args.seed, shuffle=True)))
    images = [images, labels]
    # each batch of it moves the thresholds on a little
    updates = [list(part) for part in zip(*(each.split(IMAGES // 16) for each in images))] * EPOCHS

    def row(name, *accuracies):
        print(f'{name:20}' + ''.join(f'{accuracy:9.2%}' for accuracy in accuracies), flush=True)

    def over_time(model):
        return engine.test_over_time(model, data.test, engine.cross_entropy, device, args, at=STEPS)[1]

    print(f'{"T":20}' + ''.join(f'{steps:9}' for steps in STEPS))
    for name, net in (('ANN', ann), ('ANN, ReLU', relu))[:2 if is_quantized(ann) else 1]:
        row(name, engine.test(net, data.test, engine.cross_entropy, device, args).accuracy)
    if is_quantized(ann):
        row('this', *over_time(convert(ann, STEPS[-1]).to(device)))
    for name, recipe in (
            ('SpikingJelly max', ann2snn.RateCodingRecipe([images], mode='Max')),
            ('SpikingJelly 99.9%', ann2snn.RateCodingRecipe([images], mode='99.9%', channel_wise=True,
                                                            half_threshold=True)),
            ('SpikingJelly local', ann2snn.LocalThresholdBalancingRecipe(updates))):
        row(name, *over_time(OverTime(ann2snn.Converter(recipe).convert(copy.deepcopy(relu)).eval())))


if __name__ == '__main__':
    options.run(main, snn.get_args_parser().parse_args(), 'converter.py')
