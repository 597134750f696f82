"""Which images a network was trained on, as its checkpoint says, and which are held out from its next training.

A seed puts a training set into an order: a run trains on the beginning and holds out the end. A run that starts from a
checkpoint takes over its order. So the SNN does not see what the ANN never saw, whatever its --seed.
"""
import argparse
import os
from pathlib import Path

from experiment import UserError
from experiment.data import Data, held_out_of, shuffled

OF_A_FOLDER = ('FOLDER', 'IMAGENET')  # sets that are whatever --data_dir holds


def trainings(state: dict) -> list[dict | None]:
    """The trainings that a checkpoint's network went through, as of all_trainings(); None stands for unknown ones.

    Files of former versions have only the arguments of the last one.
    """
    found, args = state.get('trained_on'), state.get('args')
    if isinstance(found, list) and found and all(entry is None or _is_whole(entry) for entry in found):
        return [entry and _training(entry, entry.get('images')) for entry in found]
    if not _is_whole(args):
        return [None]
    before = [None] if args.get('pretrained_ann') or args.get('pretrained_snn') else []
    return [*before, _training(args, None)]


def all_trainings(args: argparse.Namespace, images: Data, state: dict | None) -> list[dict | None]:
    """The trainings of a run's network, this run's included. state: of the checkpoint that it began with."""
    before = trainings(state) if state else []
    last = _training({**vars(args), 'seed': args.split_seed}, images.full_train_size)
    return before if before[-1:] == [last] else [*before, last]


def _training(args, count):
    """A checkpoint's entry, a dict, for a training with these arguments on a set of `count` images."""
    return {**_set(args), 'images': count, 'seed': args['seed'], 'train_samples': args.get('train_samples'),
            'validation_fraction': args['validation_fraction']}


def _set(entry):
    """The set of a training, a dict: its name and, if it depends on that, the folder."""
    folder = os.path.realpath(os.path.expanduser(entry['data_dir'])) if entry['dataset'] in OF_A_FOLDER else None
    return {'dataset': entry['dataset'], 'data_dir': folder}


def _is_whole(entry):
    """Whether an entry of a file, or a run's arguments there, describes a training in full."""
    return (isinstance(entry, dict) and isinstance(entry.get('dataset'), str)
            and (entry['dataset'] not in OF_A_FOLDER or isinstance(entry.get('data_dir'), str))
            and type(entry.get('seed')) is int and 0 <= entry['seed'] < 2 ** 63
            and all(entry.get(key) is None or type(entry[key]) is int and entry[key] > 0
                    for key in ('images', 'train_samples'))
            and type(entry.get('validation_fraction')) in (int, float) and 0 <= entry['validation_fraction'] < 1)


def choose_split_seed(args: argparse.Namespace, state: dict | None, resumed: bool) -> None:
    """Set args.split_seed, the seed that orders the training set.

    It is --seed. Of a resumed run it is the seed from before. If images are held out, it is that of the first training
    of `state` on this set, as later trainings that held out images took it over. A folder may have moved: then of one
    on as many images, or on any set of this name.
    """
    args.split_seed = args.seed
    if resumed:
        seed = state['args'].get('split_seed')
        args.split_seed = seed if type(seed) is int and seed >= 0 else args.seed
    elif state and args.validation_fraction:
        named = [entry for entry in trainings(state) if entry and entry['dataset'] == args.dataset]
        here = [entry for entry in named if _set(entry) == _set(vars(args))]
        counts = {entry['images'] for entry in here} - {None}
        alike = [entry for entry in named if entry in here or entry['images'] in counts] or named
        args.split_seed = alike[0]['seed'] if alike else args.seed


def check_classes(images: Data, state: dict, path: str | Path, resumed: bool) -> list[str]:
    """Lines to say if the network of `state`, read from `path`, has other classes than the images.

    resumed: whether its training is resumed. Then other classes, or another number of images, raise a UserError.
    """
    known, here, last = state.get('classes'), images.classes, trainings(state)[-1]
    line = None
    if isinstance(known, list) and len(known) == len(here) and known != here:
        number = next(i for i, name in enumerate(here) if name != known[i])
        line = f'{path}: its output {number} is the class {known[number]}, which is {here[number]} here'
    elif resumed and last and last['images'] not in (None, images.full_train_size):
        line = f'{path}: was trained on a set of {last["images"]} images, and here are {images.full_train_size}'
    if line and resumed:
        raise UserError(f'{line}; resume with the same images, or start a new run from its weights with '
                        '--pretrained_ann or --pretrained_snn')
    return [f'{line}; it was trained on other classes'] if line else []


def notes(args: argparse.Namespace, images: Data, state: dict, path: str | Path) -> list[str]:
    """Lines to say of the images held out and the network of `state`, read from `path`."""
    if images.validation is None:
        return []
    whole, seeds, seen, others = images.full_train_size, [], set(), []
    for entry in trainings(state):
        if entry is None:
            others.append('it does not say all that it was trained on')
        elif entry['dataset'] == args.dataset and entry['images'] in (
                (None, whole) if _set(entry) == _set(vars(args)) else (whole,)):
            if _set(entry) != _set(vars(args)):
                others.append(f'its pictures, of {entry["data_dir"]}, are taken for these')
            count = entry['train_samples'] or whole - held_out_of(whole, entry['validation_fraction'])
            seeds.append(entry['seed'])
            seen.update(shuffled(whole, entry['seed'])[:count].tolist())
        else:
            others.append(' '.join(['it was trained on other images, too, of', *filter(None, _set(entry).values())]))
    held = set(shuffled(whole, args.split_seed)[whole - len(images.validation):].tolist())
    as_before = f'as in the training of {path} ' if args.split_seed in seeds else ''
    line = (f'{len(held)} images are held out, {as_before}by seed {args.split_seed}; {path} was trained on '
            f'{len(held & seen)} of them')
    return [line + ''.join(f', as far as is known: {why}' for why in others[:1])]
