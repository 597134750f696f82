"""Why the loss sees the output's mean: which images the gradient of a converted network's loss comes from.

    python benchmarks/mean_or_sum.py --pretrained_ann trained_models/ann/ann_vgg5_mnist.pth -a VGG5 --dataset MNIST \\
        --timesteps 12 --train_samples 1000 --calibration_samples 128 --calibration_timesteps 200 --seed 0

Takes the flags of snn.py except --output. Prints, for 512 training images in training mode, how many are
misclassified, their share of the gradient's norm at the logits, and how many images have a norm below 0.05.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import snn  # noqa: E402
from experiment import UserError, engine, from_ann, options, setup  # noqa: E402
from experiment.data import epoch_loader  # noqa: E402
from experiment.run import Run  # noqa: E402
from experiment.start import find_snn  # noqa: E402

IMAGES = 512


def main(args):
    if not args.pretrained_ann:
        raise UserError('--pretrained_ann: name the ANN whose conversion is to be looked at')
    args.output = 'mean'  # without the factor of conversion
    device = setup.set_up_device(args)
    start = find_snn(args, device)
    if not from_ann.balances(args, start):
        raise UserError(f'{args.pretrained_ann}: holds a QCFS ANN, which is not balanced; give one of ReLU')
    data = setup.load_data(args)
    engine.seed_all(args.seed)
    model = setup.build_snn(args, data, start.state).to(device)
    run = Run(args, device, start.paths, print, None, engine.cross_entropy, {})
    from_ann.copy_ann(model, start.state, data, run)
    from_ann.scale_thresholds(model, from_ann.balanced_thresholds(model, data, run), data, run)
    model.train()
    seed = engine.seed_for(args.seed, 1)
    engine.seed_all(seed)
    images, labels = next(iter(epoch_loader(data.train, IMAGES, seed=seed, shuffle=True)))
    with torch.no_grad():
        logits = torch.cat([model(part.to(device)).cpu() for part in images.split(args.batch_size)])
    wrong = logits.argmax(1) != labels
    print(f'{len(labels)} training images, {wrong.float().mean():.0%} misclassified')
    for output, seen in (('mean', logits / args.timesteps), ('sum', logits)):
        # the cross-entropy's gradient at the logits: softmax - one-hot
        norms = (seen.softmax(1) - F.one_hot(labels, logits.shape[1])).norm(dim=1)
        print(f'{output}: loss {F.cross_entropy(seen, labels):.2f}; {norms[wrong].sum() / norms.sum():.0%} of the '
              f'gradient from the misclassified; {(norms < 0.05).float().mean():.0%} of the images below 0.05')


if __name__ == '__main__':
    options.run(main, snn.get_args_parser().parse_args(), 'mean_or_sum.py')
