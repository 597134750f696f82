"""From an ANN's checkpoint to a spiking network, its thresholds balanced or taken from the cache."""
import hashlib
import math
import os
import tempfile
from argparse import Namespace
from functools import reduce

import torch
from torch import nn
from torch.utils.data import Dataset

from experiment import UserError, checkpoint, distributed, engine, files, setup
from experiment.data import Data, epoch_loader
from experiment.graph import graph_of
from experiment.run import Run
from experiment.start import Start
from self_models.conversion import copy_weights, find_thresholds, is_quantized
from self_models.plain import LIF, HeldDropout, PlainNetwork, Repeat
from self_models.spiking_network import SpikingNetwork

FACTORS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)  # that --scaling_factor auto tries


def balances(args: Namespace, start: Start) -> bool:
    """Whether a run balances thresholds: not if a QCFS ANN brings them or --default_threshold sets them."""
    if start.kind == 'ann':
        return checkpoint.ann_layers(start.state)['activation'] != 'QCFS'
    return start.kind == 'scratch' and 'default_threshold' not in args.given


def check_temporary_folder() -> None:
    """Raise UserError, before any work, if spikes would go to another temporary folder than the environment says."""
    name = next(filter(os.environ.get, ('TMPDIR', 'TEMP', 'TMP')), None)  # of which Python takes the first that it can
    if name:
        try:
            files.probe(os.environ[name])
        except OSError as error:
            raise UserError(f'{name}={os.environ[name]}: spikes cannot be kept there ({error.strerror}); name a folder '
                            'that can be written, or unset it') from error


def balanced_thresholds(model: SpikingNetwork, data: Data, run: Run) -> list[float]:
    """Thresholds of a network, before scaling: from the cache beside the ANN, or balanced now, by the main process.

    A network from scratch is balanced untrained, without a cache. At the default threshold hardly any spike would pass
    its layers, and there would be no gradient.
    """
    return distributed.from_main(lambda: _balanced_thresholds(model, data, run.args, run.say))


def _balanced_thresholds(model, data, args, say):
    images, _ = next(iter(epoch_loader(data.train, args.calibration_samples, seed=engine.seed_for(args.seed, 0),
                                       shuffle=True)))
    # a hash of the images, as a folder may change or move; the seed also draws their spikes
    key = checkpoint.thresholds_key(model, {
        'architecture': args.architecture, 'dataset': args.dataset, 'images': checkpoint.digest({'images': images}),
        'timesteps': args.calibration_timesteps, 'percentile': args.threshold_percentile, 'seed': args.seed,
        'encoding': args.encoding, 'delay': args.delay, 'initial_potential': args.initial_potential,
        'carried': bool(model.carried), 'code': _code(model)})
    if args.pretrained_ann:
        thresholds, note = checkpoint.cached_thresholds(args.pretrained_ann, key, model.balanced)
        say(note)
        if thresholds:
            return thresholds
    engine.seed_all(engine.seed_for(args.seed, 0))
    try:
        thresholds = find_thresholds(model, images, args.calibration_timesteps, progress=True,
                                     percentile=args.threshold_percentile)
    except ValueError as error:
        raise UserError(f'{error} (--calibration_timesteps, --calibration_samples, --threshold_percentile'
                        + (')' if args.pretrained_ann else '; or --default_threshold sets them all)')) from error
    except OSError as error:
        raise UserError(f'{tempfile.gettempdir()}: no room for spikes ({error.strerror}); set TMPDIR to '
                        'a larger place, or lower --calibration_samples or --calibration_timesteps') from error
    if args.pretrained_ann:
        try:
            checkpoint.cache_thresholds(args.pretrained_ann, key, thresholds)
        except UserError as error:
            say(f'thresholds are not cached: {error}')
    return thresholds


def _code(model):
    """A hash of what a plain network calls, as its weights do not tell it; None of any other network."""
    if not isinstance(model, PlainNetwork):
        return None
    graph, modules, lines = graph_of(model), dict(model.named_modules()), []
    for name in dict.fromkeys(node.target for node in graph.nodes if node.op == 'call_module'):
        module = modules[name]
        if not isinstance(module, (LIF, HeldDropout, Repeat)):  # which hold T and more that balancing does not heed
            settings = {key: value for key, value in vars(module).items() if key[0] != '_' and key != 'training'
                        and isinstance(value, (bool, int, float, str, tuple, list, type(None)))}
            lines.append(f'{name} {module} {sorted(settings.items())}')
    lines += [checkpoint.digest({node.target: value}) for node in graph.nodes if node.op == 'get_attr'
              and isinstance(value := reduce(getattr, node.target.split('.'), model._space), torch.Tensor)]
    return hashlib.sha256('\n'.join([str(graph), *lines]).encode()).hexdigest()


def chosen_factor(scan: dict[float, float], count: int) -> float:
    """Of the scaling factors that do as well as the best one, the nearest to the usual 0.7, or the lower of two.

    scan: {factor: accuracy} on `count` images. Accuracy p has a standard error of sqrt(p (1 - p) / count). As well as
    the best: within one standard error (the one-standard-error rule, Breiman et al. 1984).
    """
    best = max(scan.values())
    least = best - math.sqrt(best * (1 - best) / count)
    return min((factor for factor in scan if scan[factor] >= least),
               key=lambda factor: (round(abs(factor - 0.7), 6), factor))


@torch.no_grad()
def fitting_scale(model: SpikingNetwork, ann: nn.Module, images: Dataset, device: torch.device,
                  args: Namespace) -> float:
    """The factor that brings the mean output of a converted network to the ANN's logits, by least squares.

    The mean of the logits (B, labels) over the labels, which the softmax ignores, is subtracted:
        scale = sum <z_ANN, z_SNN> / sum <z_SNN, z_SNN>
    over the images of a data set. 1 if that is not above 0, as the output then has no information.
    """
    model.eval()
    ann.eval()
    engine.seed_all(engine.seed_for(args.seed, 0))
    both = square = 0.0
    for batch, _ in epoch_loader(images, args.batch_size, args.num_workers):
        with engine.autocast(device, args.amp):
            outputs = [net(batch.to(device)).double() for net in (ann, model)]
        wanted, got = (logits - logits.mean(1, keepdim=True) for logits in outputs)
        both += (wanted * got).sum().item()
        square += got.square().sum().item()
    return args.timesteps * both / square if both > 0 else 1.0


def folded(model: SpikingNetwork, args: Namespace, data: Data) -> SpikingNetwork:
    """The spiking network of a published layout with the batch norm of `model`, its plain form, folded into weights and
    biases."""
    args = Namespace(**{**vars(args), 'keep_batch_norm': False})
    weights, like = model.state_dict(), next(model.parameters())
    bounds = 'channel' if any(lif.bounds is not None for lif in model.lifs) else 'layer'
    ann = setup.build_ann(args, data, 'QCFS', 1, True, bounds).to(like)
    wanted = {key: weights.get(key) for key in ann.state_dict()}
    for name, lif in zip(model.layer_names, model.lifs):
        wanted[f'{name}.bound'] = lif.threshold if lif.bounds is None else lif.threshold * lif.bounds
    ann.load_state_dict(wanted)
    network = setup.build_snn(args, data, {'state_dict': wanted}).to(like)
    copy_weights(ann, network)
    if not network.learn_leak:
        network.leaks = network.leaks.double()  # in float32 most would be other leaks
    network.leak_update(model.leaks.tolist())
    return network


def fold_batch_norm(model: SpikingNetwork, data: Data, run: Run) -> SpikingNetwork:
    """folded(model), saved as NAME.folded.pth; says what each of the two gives on the set that epochs are compared on.
    Of several processes the main one saves."""
    network, images = folded(model, run.args, data), getattr(data, data.selection)
    before, after = (run.test(each, images).accuracy for each in (model, network))
    path = run.paths.folded
    run.say(f'{path}: the best network with its batch norm folded; {data.selection} accuracy {after:.2%}, with batch '
            f'norm in place {before:.2%}')
    if distributed.is_main():
        state = checkpoint.read(run.paths.best)
        del state['optimizer']
        state |= {'accuracy': after, 'state_dict': network.state_dict(), **checkpoint.snn_state(network)}
        checkpoint.save({**state, 'args': {**state['args'], 'keep_batch_norm': False}}, path)
    return network


def at_chance(accuracy: float, labels: torch.Tensor, classes: int) -> float | None:
    """The share of the commonest class if an accuracy is not clearly above it, else None.

    Clearly: by two standard errors over these images and, if there are many classes, above engine.least_progress. None,
    too, for too few images to tell.
    """
    chance = labels.bincount().max().item() / len(labels)
    least = max(chance + 2 * math.sqrt(chance * (1 - chance) / len(labels)), engine.least_progress(classes))
    return chance if accuracy < least < 1 else None


def copy_ann(model: SpikingNetwork, state: dict, data: Data, run: Run) -> nn.Module:
    """Copy the weights of the ANN in a checkpoint's `state` into the spiking network, batch norm folded; returns it."""
    path = run.args.pretrained_ann
    layers = checkpoint.ann_layers(state)
    # weights and bounds are the same for any number of levels
    ann = setup.build_ann(run.args, data, **{**layers, 'levels': layers['levels'] or 1}).to(run.device)
    checkpoint.load_weights(ann, state, path)
    try:
        copy_weights(ann, model)
    except ValueError as error:
        raise UserError(f'{path}: {error}; train a new ANN') from error
    return ann


def measure_ann(ann: nn.Module, state: dict, data: Data, run: Run) -> dict:
    """{ann_accuracy, ann_accuracy_on}: on the set on which the run measures accuracy. Says it, and if it is chance.

    {} for a QCFS ANN if the checkpoint's `state` does not say how many levels it has.
    """
    if is_quantized(ann) and not checkpoint.ann_layers(state)['levels']:
        run.say(f'{run.args.pretrained_ann} does not say how many levels its QCFS has: its own accuracy is not '
                'measured (ann.py --test_only --levels L does it); the conversion does not depend on them')
        return {}
    chosen_on = 'test' if run.args.test_only else data.selection
    images = getattr(data, chosen_on)
    accuracy = engine.test(ann, images, engine.cross_entropy, run.device, run.args).accuracy
    run.say(f'ANN {run.args.pretrained_ann}: {chosen_on} accuracy {accuracy:.2%}')
    if chance := at_chance(accuracy, images.labels, len(data.classes)):
        run.say(f'this ANN is hardly better than chance ({chance:.2%} for the commonest class), nor will the converted '
                'network be: stop here and train it further, or with another --learning_rate; if it was trained '
                'elsewhere, it needs the pixels that it was trained with')
    return {'ann_accuracy': accuracy, 'ann_accuracy_on': chosen_on}


def looked_at(data: Data, args: Namespace) -> tuple[str, Dataset]:
    """(name of the set, images) on which a conversion chooses; never the test set."""
    name = 'train' if data.validation is None else 'validation'
    return name, getattr(data, name).sample(args.calibration_samples, args.seed, like=data.test)


def scale_thresholds(model: SpikingNetwork, thresholds: list[float], data: Data, run: Run) -> dict:
    """Set the balanced thresholds times --scaling_factor, which 'auto' chooses; returns what was measured."""
    args, found, scan = run.args, {'scaling_factor': run.args.scaling_factor}, {}
    if args.scaling_factor == 'auto':
        found['scanned_on'], images = looked_at(data, args)
        for factor in FACTORS:
            model.threshold_update(factor, thresholds)
            scan[factor] = engine.test(model, images, engine.cross_entropy, run.device, args).accuracy
        found['scaling_factor'] = chosen_factor(scan, len(images))
        found['scan'] = {str(factor): accuracy for factor, accuracy in scan.items()}
        run.say(f'scaling factors on {found["scanned_on"]} images: ' + ', '.join(
            f'{factor}: {accuracy:.2%}' for factor, accuracy in scan.items())
            + f'; taken: {found["scaling_factor"]}')
    try:
        model.threshold_update(found['scaling_factor'], thresholds)
    except ValueError as error:
        raise UserError(f'--scaling_factor {found["scaling_factor"]}: {error}') from error
    return found


def fit_output(model: SpikingNetwork, ann: nn.Module, data: Data, run: Run) -> dict:
    """With --output fitted, multiply the output layer so that its mean over time is the ANN's logits."""
    if run.args.output != 'fitted':
        return {}
    _, images = looked_at(data, run.args)
    scale = distributed.from_main(lambda: fitting_scale(model, ann, images, run.device, run.args))
    with torch.no_grad():  # changes no prediction: there is no threshold after it
        for parameter in model.classifier[-1].parameters():
            parameter *= scale
    run.say(f"the output layer's weights are multiplied by {scale:.4g}, which fits its mean to the ANN's logits"
            if scale != 1 else "the output has no information on the ANN's logits, so it is not fitted to them")
    return {'output_scale': scale}
