"""From an ANN's checkpoint to a spiking network, its thresholds balanced or taken from the cache."""
import math
import tempfile

import torch

from experiment import UserError, checkpoint, distributed, engine, setup
from experiment.data import epoch_loader
from experiment.options import CONVERSION
from self_models.conversion import QUANTIZED, copy_weights, find_thresholds, is_quantized

FACTORS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)  # that --scaling_factor auto tries

# what convert() returns, as far as it was measured
MEASURED = ('ann_accuracy', 'ann_accuracy_on', 'scaling_factor', 'scanned_on', 'scan', 'output_scale')


def balanced_thresholds(model, data, args, say):
    """Thresholds of a network, before scaling: from the cache beside the ANN, or balanced now.

    Of a network from scratch, its untrained self's, which no file holds.
    """
    images, _ = next(iter(epoch_loader(data.train, args.calibration_samples, seed=engine.seed_for(args.seed, 0),
                                       shuffle=True)))
    # the pictures themselves, as a folder's may change and a folder may move; the seed draws their spikes, too
    key = checkpoint.thresholds_key(model, {
        'architecture': args.architecture, 'dataset': args.dataset, 'images': checkpoint.digest({'images': images}),
        'timesteps': args.calibration_timesteps, 'percentile': args.threshold_percentile, 'seed': args.seed,
        'encoding': args.encoding, 'delay': args.delay, 'initial_potential': args.initial_potential})
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


def take_defaults(args, state):
    """Settle what the flags of a conversion mean for the ANN of a checkpoint's `state`, or without one (None).

    An ANN of QCFS brings its thresholds: it is converted to direct input, neurons without delay and half a threshold to
    begin with, unless flags say otherwise; nothing is balanced, scaled or fitted. Returns lines to say. Raises
    UserError for flags that mean nothing then.
    """
    layers = checkpoint.ann_layers(state) if state else {}
    if layers.get('activation') != 'QCFS':
        if args.scaling_factor == 'auto' and not state:
            raise UserError('--scaling_factor auto: chooses by what a trained ANN gives; name one with '
                            '--pretrained_ann, or give a number')
        return []
    for flag in (*CONVERSION, 'default_threshold'):
        if flag in args.given:
            raise UserError(f'--{flag}: has no effect on an ANN of QCFS, whose bounds are the thresholds; leave it out')
        setattr(args, flag, None)
    if 'output' in args.given and args.output == 'fitted':
        raise UserError("--output fitted: the mean output of an ANN of QCFS is in its logits' units already; leave the "
                        'flag out')
    settings = {**QUANTIZED, 'output': 'mean'}
    vars(args).update({key: value for key, value in settings.items() if key not in args.given})
    levels, steps = layers['levels'], args.timesteps
    if steps == levels:
        return []
    return [f'--timesteps {steps}: the ANN was trained with {levels} levels; '
            + (f'with {steps + 1} rates for its {levels + 1} values the network loses accuracy, most of which '
               'fine-tuning wins back' if steps < levels else
               'more steps cost more and bring the network nearer to what the ANN would give without levels')]


def scan_factors(model, thresholds, images, device, args):
    """{scaling factor: accuracy} of the converted network at its time steps on a data set, for each of FACTORS."""
    scan = {}
    for factor in FACTORS:
        model.threshold_update(factor, thresholds)
        scan[factor] = engine.test(model, images, engine.cross_entropy, device, args).accuracy
    return scan


def chosen_factor(scan, count):
    """Of the scaling factors that do as well as the best one, that nearest to the usual 0.7, then the lower one.

    scan: {factor: accuracy} on `count` images, over which accuracy p has a standard error of sqrt(p (1 - p) / count).
    As well as the best: within one of those (the one-standard-error rule, Breiman et al. 1984).
    """
    best = max(scan.values())
    least = best - math.sqrt(best * (1 - best) / count)
    return min((factor for factor in scan if scan[factor] >= least),
               key=lambda factor: (round(abs(factor - 0.7), 6), factor))


@torch.no_grad()
def fitting_scale(model, ann, images, device, args):
    """What the mean output of a converted network is to be multiplied by to be the ANN's logits, by least squares.

    Logits (B, labels) are taken less their mean over the labels, which the softmax does not see:
        scale = sum <z_ANN, z_SNN> / sum <z_SNN, z_SNN>
    over the images of a data set. 1 where that is not above 0, as the output then says nothing.
    """
    model.eval()
    ann.eval()
    engine.seed_all(engine.seed_for(args.seed, 0))
    both = square = 0.0
    for batch, _ in epoch_loader(images, args.batch_size, args.num_workers):
        with engine.lowered(device, args.amp):
            outputs = [net(batch.to(device)).double() for net in (ann, model)]
        wanted, got = (logits - logits.mean(1, keepdim=True) for logits in outputs)
        both += (wanted * got).sum().item()
        square += got.square().sum().item()
    return args.timesteps * both / square if both > 0 else 1.0


def at_chance(accuracy, labels, classes):
    """What naming the commonest class always would give where an accuracy is not clearly above that, else None.

    Clearly: by two standard errors over so many images, and at many classes by what fit() asks of a training.
    """
    chance = labels.bincount().max().item() / len(labels)
    least = max(chance + 2 * math.sqrt(chance * (1 - chance) / len(labels)), engine.least_progress(classes))
    return chance if accuracy < least else None


def measure_ann(ann, data, chosen_on, device, args, say):
    """The ANN's accuracy on the set chosen_on, said; and so is one that is hardly above chance."""
    accuracy = engine.test(ann, getattr(data, chosen_on), engine.cross_entropy, device, args).accuracy
    say(f'ANN {args.pretrained_ann}: {chosen_on} accuracy {accuracy:.2%}')
    if chance := at_chance(accuracy, getattr(data, chosen_on).labels, len(data.classes)):
        say(f'this ANN is hardly better than chance ({chance:.2%} for the commonest class), and what is converted from '
            'it will not be either: stop here and train it further, or with another --learning_rate')
    return accuracy


def copy_ann(model, state, data, device, args):
    """Copy the weights of the ANN in a checkpoint's `state` into the spiking network; returns that ANN."""
    ann = setup.build_ann(args, data, **checkpoint.ann_layers(state)).to(device)
    checkpoint.load_weights(ann, state, args.pretrained_ann)
    try:
        copy_weights(ann, model)
    except ValueError as error:
        raise UserError(f'{args.pretrained_ann}: {error}; train the ANN anew') from error
    return ann


def scale_thresholds(model, thresholds, factor):
    try:
        model.threshold_update(factor, thresholds)
    except ValueError as error:
        raise UserError(f'--scaling_factor {factor}: {error}') from error


def convert(model, state, data, chosen_on, device, args, say):
    """Copy the ANN's weights, balance and scale the thresholds, fit the output; returns what was measured.

    state: of the ANN's checkpoint. chosen_on: 'test' or 'validation', the set that the ANN's accuracy is of. An ANN of
    QCFS has its thresholds, and its output needs no fitting.
    """
    ann = copy_ann(model, state, data, device, args)
    found = {'ann_accuracy': measure_ann(ann, data, chosen_on, device, args, say), 'ann_accuracy_on': chosen_on}
    if is_quantized(ann):
        return found
    thresholds = distributed.from_main(lambda: balanced_thresholds(model, data, args, say))
    found['scaling_factor'] = args.scaling_factor
    # the test set has no part in what follows
    scanned_on = 'train' if data.validation is None else 'validation'
    images = getattr(data, scanned_on).sample(args.calibration_samples, args.seed, like=data.test)
    if args.scaling_factor == 'auto':
        found['scanned_on'] = scanned_on
        scan = scan_factors(model, thresholds, images, device, args)
        found['scaling_factor'] = chosen_factor(scan, len(images))
        found['scan'] = {str(factor): accuracy for factor, accuracy in scan.items()}
        say(f'scaling factors on {found["scanned_on"]} images: ' + ', '.join(
            f'{factor}: {accuracy:.2%}' for factor, accuracy in scan.items())
            + f'; taken: {found["scaling_factor"]}')
    scale_thresholds(model, thresholds, found['scaling_factor'])
    if args.output == 'fitted':
        scale = distributed.from_main(lambda: fitting_scale(model, ann, images, device, args))
        with torch.no_grad():  # changes no prediction: there is no threshold after it
            for parameter in model.classifier[-1].parameters():
                parameter *= scale
        found['output_scale'] = scale
        say(f"the output layer's weights are multiplied by {scale:.4g}, which fits its mean to the ANN's logits"
            if scale != 1 else "the output has nothing of the ANN's logits, so it is not fitted to them")
    return found


def balance_untrained(model, data, device, args, say):
    """Balance and scale the thresholds of a network from scratch, where no --default_threshold sets them.

    At the default threshold hardly a spike passes its layers, and then there is no gradient.
    """
    thresholds = distributed.from_main(lambda: balanced_thresholds(model, data, args, say))
    scale_thresholds(model, thresholds, args.scaling_factor)
