"""Which training images are held out, and whether the network has been trained on them before.

A training set is put into an order by a seed: a run trains on its beginning and holds out its end. So that what an ANN
never saw stays unseen by the SNN, whatever that one's --seed, a checkpoint says which trainings its network went
through, and a run that starts from it takes over their order.
"""
import os

from experiment import UserError
from experiment.data import held_out_of, shuffled

_PICTURES = ('FOLDER', 'IMAGENET')  # sets that are another one in another folder


def training(args, data):
    """What a checkpoint says of a run's training images, a dict."""
    return {**_set(vars(args)), 'images': data.whole, 'seed': args.split_seed, 'train_samples': args.train_samples,
            'validation_fraction': args.validation_fraction}


def trainings(state):
    """The trainings that a checkpoint's network went through, as of training(); None stands for unknown ones.

    Files of former versions have but the arguments of the last one.
    """
    found = state.get('trained_on')
    if isinstance(found, list) and all(entry is None or _is_whole(entry) for entry in found):
        return found
    saved = state.get('args')
    if not isinstance(saved, dict) or not _is_whole(saved):
        return [None]
    entry = {**_set(saved), 'images': None,
             **{key: saved.get(key) for key in ('seed', 'train_samples', 'validation_fraction')}}
    return [None, entry] if saved.get('pretrained_ann') or saved.get('pretrained_snn') else [entry]


def _set(entry):
    """Which set a training is of, a dict: its name and, of one's own pictures, where they lie."""
    folder = os.path.realpath(os.path.expanduser(entry['data_dir'])) if entry['dataset'] in _PICTURES else None
    return {'dataset': entry['dataset'], 'data_dir': folder}


def _is_whole(entry):
    return (isinstance(entry, dict) and isinstance(entry.get('dataset'), str)
            and (entry['dataset'] not in _PICTURES or isinstance(entry.get('data_dir'), str))
            and type(entry.get('seed')) is int and 0 <= entry['seed'] < 2 ** 63
            and all(entry.get(key) is None or type(entry[key]) is int and entry[key] > 0
                    for key in ('images', 'train_samples'))
            and type(entry.get('validation_fraction')) in (int, float) and 0 <= entry['validation_fraction'] < 1)


def choose(args, state=None, resumed=False):
    """Set args.split_seed, the seed that orders the training set.

    It is --seed; of a run that goes on, what it was; and where images are held out, that of the training on this set
    by which the network of `state` has seen the fewest of them, the last such.
    """
    args.split_seed = args.seed
    if resumed:
        seed = state['args'].get('split_seed')
        args.split_seed = seed if type(seed) is int and seed >= 0 else args.seed
    elif state and args.validation_fraction:
        here = [entry for entry in trainings(state) if entry and _set(entry) == _set(vars(args))][::-1]
        whole = here[0]['images'] if here else None
        count = held_out_of(whole or 0, args.validation_fraction)
        args.split_seed = min((entry['seed'] for entry in here), default=args.seed,
                              key=lambda seed: len(_held_out(whole, seed, count) & _seen(here, whole)) if whole else 0)


def _held_out(whole, seed, count):
    return set(shuffled(whole, seed)[whole - count:].tolist())


def _seen(here, whole):
    """The numbers of the images that trainings on a set of so many were of."""
    counts = [entry['train_samples'] or whole - held_out_of(whole, entry['validation_fraction']) for entry in here]
    return {number for entry, count in zip(here, counts) for number in shuffled(whole, entry['seed'])[:count].tolist()}


def all_trainings(args, data, state=None):
    """The trainings that the network of a run has behind it in the end. state: of the checkpoint that it began with."""
    before = trainings(state) if state else []
    return before + [entry for entry in [training(args, data)] if entry not in before]


def check_classes(data, state, path, goes_on):
    """What is to be said where the network of `state`, read from `path`, is of other classes: a list of lines.

    goes_on: whether its training does; then other classes, or another number of images, raise a UserError.
    """
    known, here, last = state.get('classes'), data.classes, trainings(state)[-1]
    line = None
    if isinstance(known, list) and len(known) == len(here) and known != here:
        number = next(i for i, name in enumerate(here) if name != known[i])
        line = f'{path}: its output {number} is of the class {known[number]}, which is {here[number]} here'
    elif goes_on and last and last['images'] not in (None, data.whole):
        line = f'{path}: was trained on a set of {last["images"]} images, and here are {data.whole}'
    if line and goes_on:
        raise UserError(f'{line}; go on with the same images, or start anew from its weights with --pretrained_ann or '
                        '--pretrained_snn')
    return [f'{line}; what it has learned is of other classes'] if line else []


def notes(args, data, state, path):
    """What is to be said of the images held out and the network of `state`, read from `path`: a list of lines."""
    if data.validation is None:
        return []
    here, others = [], []
    for entry in trainings(state):
        if entry is None:
            others.append('it does not say all that it was trained on')
        elif _set(entry) == _set(vars(args)) and entry['images'] in (None, data.whole):
            here.append(entry)
        else:
            others.append(' '.join(['it was trained on other images, too, of', *filter(None, _set(entry).values())]))
    held = _held_out(data.whole, args.split_seed, len(data.validation))
    as_before = f'as in the training of {path} ' if args.split_seed in [entry['seed'] for entry in here] else ''
    line = (f'{len(held)} images are held out, {as_before}by seed {args.split_seed}; {path} was trained on '
            f'{len(held & _seen(here, data.whole))} of them')
    return [line + ''.join(f', as far as is known: {why}' for why in others[:1])]
