"""Which training images are held out, and whether the network has been trained on them before.

A training set is put into an order by a seed: a run trains on its beginning and holds out its end. So that what an ANN
never saw stays unseen by the SNN, whatever that one's --seed, a checkpoint says which trainings its network went
through, and a run that starts from it takes over their order.
"""
import os

from experiment.data import held_out_of, shuffled


def training(args, data):
    """What a checkpoint says of a run's training images, a dict."""
    return {'dataset': args.dataset, 'data_dir': _folder(args.data_dir), 'images': data.whole, 'seed': args.split_seed,
            'train_samples': args.train_samples, 'validation_fraction': args.validation_fraction}


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
    entry = {key: saved.get(key) for key in ('dataset', 'seed', 'train_samples', 'validation_fraction')}
    entry |= {'data_dir': _folder(saved['data_dir']), 'images': None}
    return [None, entry] if saved.get('pretrained_ann') or saved.get('pretrained_snn') else [entry]


def _folder(path):
    return os.path.realpath(os.path.expanduser(path))


def _is_whole(entry):
    return (isinstance(entry, dict) and isinstance(entry.get('dataset'), str) and isinstance(entry.get('data_dir'), str)
            and type(entry.get('seed')) is int and 0 <= entry['seed'] < 2 ** 63
            and all(entry.get(key) is None or type(entry[key]) is int and entry[key] > 0
                    for key in ('images', 'train_samples'))
            and type(entry.get('validation_fraction')) in (int, float) and 0 <= entry['validation_fraction'] < 1)


def choose(args, state=None, resumed=False):
    """Set args.split_seed, the seed that orders the training set.

    It is --seed; of a run that goes on, what it was; and where images are held out, that of the last training on this
    set that the network of `state` went through.
    """
    args.split_seed = args.seed
    if resumed:
        seed = state['args'].get('split_seed')
        args.split_seed = seed if type(seed) is int and seed >= 0 else args.seed
    elif state and args.validation_fraction:
        for entry in trainings(state):
            if entry and _is_of(entry, args.dataset, args.data_dir):
                args.split_seed = entry['seed']


def all_trainings(args, data, state=None):
    """The trainings that the network of a run has behind it in the end. state: of the checkpoint that it began with."""
    before = trainings(state) if state else []
    return before + [entry for entry in [training(args, data)] if entry not in before]


def _is_of(entry, dataset, data_dir):
    """Whether a training was on this set. The named sets are the same wherever they lie."""
    return entry['dataset'] == dataset and (dataset not in ('FOLDER', 'IMAGENET')
                                            or entry['data_dir'] == _folder(data_dir))


def notes(args, data, state, path):
    """What is to be said of the images held out and the network of `state`, read from `path`: a list of lines."""
    if data.validation is None:
        return []
    held = set(shuffled(data.whole, args.split_seed)[-len(data.validation):].tolist())
    seen, others = set(), []
    for entry in trainings(state):
        if entry is None:
            others.append('it does not say all that it was trained on')
        elif _is_of(entry, args.dataset, args.data_dir) and entry['images'] in (None, data.whole):
            count = entry['train_samples'] or data.whole - held_out_of(data.whole, entry['validation_fraction'])
            seen |= set(shuffled(data.whole, entry['seed'])[:count].tolist())
        else:
            others.append(f'it was trained on {entry["dataset"]} in {entry["data_dir"]} as well')
    known = any(entry and _is_of(entry, args.dataset, args.data_dir) for entry in trainings(state))
    by = f'as in the training of {path}, by seed {args.split_seed}' if known else f'by seed {args.split_seed}'
    line = f'{len(held)} images are held out {by}; {path} was trained on {len(held & seen)} of them'
    return [line + ''.join(f', as far as is known: {why}' for why in others[:1])]
