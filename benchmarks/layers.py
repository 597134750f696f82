"""Where a QCFS ANN loses accuracy at conversion: layer by layer, on the test images.

    python benchmarks/layers.py --pretrained_ann trained_models/ann/vgg9_qcfs.pth --timesteps 4 --test_samples 1000

Takes the flags of snn.py. For each layer it prints

    up to it      the ANN's accuracy if this layer and all before it give the SNN's mean output over time
    it alone      the ANN's accuracy if this layer alone has as many levels as there are time steps
    error         |SNN's mean output - ANN's output| / |ANN's output| of the layer (Euclidean norms)
    silent        the share of its neurons that do not spike at all, and the share that is 0 in the ANN
"""
import math
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from converter import open_ann  # noqa: E402

import snn  # noqa: E402
from experiment import UserError, options  # noqa: E402
from experiment.data import epoch_loader  # noqa: E402
from self_models import LIF, QCFS, spiking  # noqa: E402
from self_models.conversion import QUANTIZED, is_quantized  # noqa: E402


def outputs_of(network, images, given=None):
    """(logits, {name: output of each QCFS or LIF}) of a network, in which those named in `given` give that instead."""
    found, hooks = {}, []

    def hook(name):
        def called(module, inputs, output):
            found[name] = (given or {}).get(name, output)
            return found[name]
        return called

    for name, module in network.named_modules():
        if isinstance(module, (QCFS, LIF)):
            hooks.append(module.register_forward_hook(hook(name)))
    logits = network(images)
    for each in hooks:
        each.remove()
    return logits, found


@torch.no_grad()
def measure(ann, network, loader, device):
    """Sums over the test images: a Counter of {(what, layer): sum}."""
    sums, modules = Counter(), dict(ann.named_modules())

    def add(what, layer, logits):
        sums[what, layer] += (logits.argmax(1) == labels).sum().item()

    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        logits, exact = outputs_of(ann, images)
        total, spikes = outputs_of(network, images)  # each spike worth its threshold
        means = {name: spikes[name].unflatten(0, (network.timesteps, -1)).mean(0) for name in network.layer_names}
        add('ANN', None, logits)
        add('SNN', None, total)
        sums['images', None] += len(images)
        for i, name in enumerate(means, 1):
            add('up to', name, outputs_of(ann, images, dict(list(means.items())[:i]))[0])
            levels, modules[name].levels = modules[name].levels, network.timesteps
            add('alone', name, ann(images))
            modules[name].levels = levels
            sums['error', name] += (means[name] - exact[name]).square().sum().item()
            sums['size', name] += exact[name].square().sum().item()
            sums['silent', name] += (means[name] == 0).sum().item()
            sums['zero', name] += (exact[name] == 0).sum().item()
            sums['values', name] += exact[name].numel()
    return sums


def main(args):
    ann, data, device = open_ann(args)
    if not is_quantized(ann):
        raise UserError(f'{args.pretrained_ann}: holds no QCFS ANN; train one with ann.py --activation QCFS')
    network = spiking(ann.eval(), args.timesteps, **QUANTIZED).eval()
    sums = measure(ann, network, epoch_loader(data.test, args.batch_size), device)

    count = sums['images', None]
    print(f'ANN {sums["ANN", None] / count:.2%}, SNN at T = {args.timesteps} {sums["SNN", None] / count:.2%}, on '
          f'{count} test images')
    print(f'{"layer":<24}{"up to it":>10}{"it alone":>10}{"error":>8}{"silent":>9}{"in the ANN":>12}')
    for name in [name for what, name in sums if what == 'size']:
        print(f'{name:<24}{sums["up to", name] / count:>10.2%}{sums["alone", name] / count:>10.2%}'
              f'{(sums["error", name] / (sums["size", name] or math.nan)) ** 0.5:>8.2f}'
              f'{sums["silent", name] / sums["values", name]:>9.1%}{sums["zero", name] / sums["values", name]:>12.1%}')


if __name__ == '__main__':
    options.run(main, snn.get_args_parser().parse_args(), 'layers.py')
