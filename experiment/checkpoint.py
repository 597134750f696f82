"""Checkpoints: loaded as tensors only, weights matched name by name; the cache of thresholds."""
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from experiment import UserError, former, unpickling
from experiment.files import PASSING, Paths, Unreadable, replacing, set_aside, write_atomically
from experiment.options import is_own_network
from self_models import LIF, VGG, ResNet
from self_models.conversion import check_values
from self_models.spiking_network import LayerByLayer, SpikingNetwork
from self_models.surrogate import SURROGATES
from self_models.traced import FUNCTION_SYNAPSES, LIKE, MATRIX_PRODUCTS, SYNAPSES, source_of, trace

MOST_SHOWN = 4  # of the weights that do not fit


def save(state: dict, path: Path) -> None:
    """Write a checkpoint: a dict of tensors, numbers, texts, lists and dicts."""
    write_atomically(path, lambda file: torch.save(state, file))


def load(path: Path | str, kind: str) -> dict:
    """The dict in a checkpoint file, on the CPU, tensors only; of a bare state_dict {'state_dict': that}.

    kind: 'ann' or 'snn'. Raises UserError.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path}: there is no such file; give the path of a checkpoint that {kind}.py wrote')
    state = read(path)
    if isinstance(state, dict) and state and all(isinstance(value, torch.Tensor) for value in state.values()):
        if kind == 'snn' or {'thresholds', 'leaks'} <= set(map(plain_name, state)):
            raise UserError(f'{path}: is a bare state_dict; an SNN also needs thresholds, timesteps and a leak: give '
                            'a file that snn.py wrote, or weights of an ANN with --pretrained_ann')
        state = {'state_dict': state}
    if not isinstance(state, dict) or not isinstance(state.get('state_dict'), dict):
        raise UserError(f"{path}: is not a checkpoint of {kind}.py, as it has no 'state_dict'; give another file")
    holds = 'snn' if 'timesteps' in state else 'ann'
    if holds != kind:
        raise UserError(f'{path}: holds an {holds.upper()}, not an {kind.upper()}; '
                        f'give it to snn.py with --pretrained_{holds}')
    return former.checkpoint(state)


def load_training(path: Path | str, kind: str) -> dict:
    """load() of a checkpoint from which training can be resumed. Raises UserError."""
    state = load(path, kind)
    best = state.get('best')
    if not (type(state.get('epoch')) is int and state['epoch'] >= 0 and 'epochs' in state['args']
            and isinstance(best, list) and len(best) == 2
            and all(isinstance(value, (int, float)) for value in (*best, state.get('accuracy')))
            and isinstance(state.setdefault('history', []), list)
            and all(isinstance(entry, dict) for entry in state['history'])):
        raise UserError(f'{path}: holds no training to resume; give the file that ends in .last.pth')
    return state


def bring_in_line(paths: Paths, kind: str) -> list[str]:
    """Before a run is resumed: write the best epoch of paths.last to paths.best if a kill has prevented that.

    An epoch is written to paths.last first. The caller holds the lock. Returns lines to say. Raises UserError.
    """
    last, best, said = load_training(paths.last, kind), {}, []
    try:
        best = load_training(paths.best, kind)
        if [best['accuracy'], best['epoch']] == last['best']:
            return said
    except Unreadable:
        raise
    except UserError:  # a damaged file counts as missing
        pass
    if best.get('history') and best['history'][:-1] == last['history']:  # former versions wrote paths.best first
        copy(paths.best, paths.last)
    elif last['best'][1] == last['epoch']:
        copy(paths.last, paths.best)
    else:
        said.append(f'{paths.best} does not hold epoch {last["best"][1]}, the best so far; the best is now '
                    f'looked for from epoch {last["epoch"]} on')
        last['best'] = [last['accuracy'], last['epoch']]
        save(last, paths.last)
        with open(paths.last, 'rb') as whole, replacing(paths.best, partial(shutil.copyfileobj, whole)):
            set_aside([paths.best], said.append)
    return said


def copy(source: Path, target: Path) -> None:
    """Copy a checkpoint file atomically, which takes less time than to serialise it again."""
    with open(source, 'rb') as whole:
        write_atomically(target, lambda file: shutil.copyfileobj(whole, file))


def read(path: Path | str) -> object:
    """What torch.save wrote to `path`, on the CPU, tensors only. Raises UserError."""
    try:
        with warnings.catch_warnings(action='ignore'):  # torch's advice on other kinds of files does not apply
            return unpickling.load(path)
    except (pickle.UnpicklingError, TypeError) as error:
        raise UserError(f'{path}: holds something other than tensors and is not loaded, since that could run '
                        'code; save its state_dict and numbers alone with torch.save') from error
    except PermissionError as error:
        raise Unreadable(f'{path}: cannot be read ({error.strerror}); make the file readable or give another'
                         ) from error
    except Exception as error:  # torch's reader raises nearly anything on bytes that are not its own
        if getattr(error, 'errno', None) in PASSING:
            raise Unreadable(f'{path}: cannot be read ({error.strerror}), though it may be sound; run again') from error
        asked = re.search(r'tried to allocate (\d+) bytes', str(error))
        if isinstance(error, MemoryError) or asked and int(asked[1]) <= os.path.getsize(path):  # else it is damaged
            raise
        raise UserError(f'{path}: is damaged, cut short or not a checkpoint; use another copy, or give a file that '
                        'ann.py or snn.py wrote') from error


def load_weights(model: nn.Module, state: dict, path: Path | str, may_differ: Sequence[str] = ()) -> list[str]:
    """Copy a checkpoint's weights into a model, name by name; returns the names that fitting() leaves out."""
    weights, kept = fitting(model, state, path, may_differ)
    model.load_state_dict({**model.state_dict(), **weights})
    try:
        check_values(model)
    except ValueError as error:
        raise UserError(f'{path}: {error}; use another copy, or train it anew') from error
    return kept


def plain_name(key: object) -> str:
    """A weight's name without what torch.compile (_orig_mod.) and parallel modules (module.) put into it."""
    return '.'.join(part for part in str(key).split('.') if part not in ('module', '_orig_mod'))


def fitting(model: nn.Module, state: dict, path: Path | str,
            may_differ: Sequence[str]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """({name: weight} of a checkpoint, as a model calls them, [names of those left out]).

    may_differ: names of weights that are left out if their shapes differ. Any other missing, surplus or misshapen
    weight raises a UserError that lists the first of them.
    """
    names = {plain_name(key): key for key in model.state_dict()}  # the user's own network may have a child 'module'
    same = state['state_dict'].keys() == model.state_dict().keys()
    weights = {key if same else names.get(plain_name(key), plain_name(key)): value
               for key, value in state['state_dict'].items()}
    problems = ['names twice, with and without module.'] if len(weights) < len(state['state_dict']) else []
    neurons = neuron_keys(model)  # thresholds and leaks are elsewhere in the file, whether learned or not
    wanted = {key: value for key, value in model.state_dict().items() if key not in neurons}
    weights = {key: value for key, value in weights.items() if key not in neurons}
    problems += [f'no {key}' for key in wanted if key not in weights]
    problems += [f'surplus {key}' for key in weights if key not in wanted]
    kept, spoilt = [], []
    for key in (key for key in wanted if key in weights):
        if not is_dense(weights[key], wanted[key].is_floating_point()):
            kind = 'floats' if wanted[key].is_floating_point() else 'integers'
            spoilt.append(f'{key} is not a dense tensor of {kind}')
        elif weights[key].shape != wanted[key].shape:
            if key in may_differ and weights[key].shape[1:] == wanted[key].shape[1:]:
                kept.append(key)
            else:
                found, asked = ('x'.join(map(str, each[key].shape)) for each in (weights, wanted))
                problems.append(f'{key} is {found}, not {asked}')
        elif not torch.isfinite(weights[key].to(wanted[key].dtype)).all():
            spoilt.append(f'{key} is not finite')
    if spoilt and not problems:
        raise UserError(f'{path}: {_first(spoilt)}; use another copy, or train it anew')
    if problems := problems + spoilt:
        known = state.get('args', {})
        of = str(known.get('architecture'))
        holds = f' (it holds a {of} for {known["dataset"]})' if {'architecture', 'dataset'} <= known.keys() else ''
        published = not is_own_network(of) and isinstance(model, (VGG, ResNet, SpikingNetwork))
        flags = ', --image_size and --kernel_size' if published else ' and --image_size'
        raise UserError(f'{path}: does not fit this network{holds}; set --architecture, --dataset{flags} '
                        f'as it was trained: {_first(problems)}')
    return {key: value for key, value in weights.items() if key not in kept}, kept


def _first(problems):
    """The first few of them, and how many more there are."""
    more = len(problems) - MOST_SHOWN
    return ', '.join(sorted(problems)[:MOST_SHOWN]) + (f' and {more} more' if more > 0 else '')


def last_layer(model: nn.Module) -> list[str]:
    """The names of the weights of a network's last layer, or layers, and of what follows."""
    tree, graph = trace(model)
    modules, names = dict(tree.named_modules()), []
    nodes = [node for node in graph.nodes if node.op == 'output']
    weights = set()
    for node in graph.nodes:
        if node.op == 'get_attr' or node.target in LIKE and source_of(node) in weights:
            weights.add(node)
    for node in nodes:  # from the output back
        module = modules[node.target] if node.op == 'call_module' else nn.Identity()
        names += [node.target] if node.op == 'get_attr' else [
            f'{node.target}.{name}' for name, _ in module.named_parameters()]
        if isinstance(module, SYNAPSES):
            continue
        of_weights = node in weights or node.target in FUNCTION_SYNAPSES | MATRIX_PRODUCTS
        nodes += [source for source in node.all_input_nodes if not of_weights or source in weights]
    return names


def is_dense(value: object, floats: bool = True) -> bool:
    """Whether a value is a plain tensor of floating-point numbers, or of integers."""
    return (isinstance(value, torch.Tensor) and value.layout == torch.strided and value.is_floating_point() == floats
            and not value.is_complex() and not value.is_meta and not value.is_quantized)


def neuron_keys(model: nn.Module) -> set[str]:
    """The names of a spiking network's thresholds and leaks in its state_dict; an ANN has none."""
    if isinstance(model, LayerByLayer):
        return {'thresholds', 'leaks'}
    return {f'{name}.{what}' for name, module in model.named_modules(remove_duplicate=False)  # some have several names
            if isinstance(module, LIF) for what in ('threshold', 'leak')}


def snn_state(model: SpikingNetwork) -> dict:
    """What an SNN's checkpoint holds beside the weights. The thresholds are scaled."""
    return {'thresholds': model.thresholds.tolist(), 'timesteps': model.timesteps, 'activation': model.activation,
            'leak': model.initial_leak, 'leaks': model.leaks.tolist()}


def ann_layers(state: dict | None) -> dict:
    """{activation, batch_norm, levels, bounds} of the network in an ANN's checkpoint, or of the ANN of an SNN's.

    The names of the weights tell what args do not, as in published files; levels may be None. state: None for a
    network from scratch, which has ReLU.
    """
    weights, saved = (state['state_dict'], state.get('args', {})) if state else ({}, {})
    names = {str(key): value for key, value in weights.items()}
    if 'timesteps' in (state or {}):  # an SNN's neurons have bounds of channels beside their threshold and their leak
        neurons = [key[:-5] for key in names if key.endswith('.leak') and f'{key[:-5]}.threshold' in names]
        # beside others, they are of QCFS in the code
        whole = all(f'{name}.bounds' in names for name in neurons)
        bounds = [names[f'{name}.bounds'] for name in neurons] if whole else []
    else:
        bounds = [value for key, value in names.items() if key.rsplit('.', 1)[-1] == 'bound']
    activation, levels = saved.get('activation'), saved.get('levels')
    if activation not in ('ReLU', 'QCFS'):
        activation = 'QCFS' if bounds else 'ReLU'
    # a weight of your own network may be called as a bound is
    channel = activation == 'QCFS' and saved.get('bounds') != 'layer' and any(
        getattr(value, 'ndim', 0) for value in bounds)
    return {'activation': activation, 'bounds': 'channel' if channel else 'layer',
            'batch_norm': 'running_var' in {key.rsplit('.', 1)[-1] for key in names},
            'levels': levels if type(levels) is int and levels > 0 else None}


def has_biases(state: dict) -> bool:
    """Whether the network in a checkpoint has biases, or batch norm that is folded into biases."""
    return any(str(key).endswith(('.bias', '.running_var')) for key in state['state_dict'])


def has_scales(state: dict) -> bool | str:
    """Whether a ResNet's plain identities have a factor, or need one for the bounds of QCFS; 'channel': one each."""
    found = [value for key, value in state['state_dict'].items() if str(key).endswith(('.factor', '.bound'))]
    return 'channel' if any(getattr(value, 'ndim', 0) for value in found) else bool(found)


def snn_settings(state: dict, path: Path | str) -> dict:
    """{thresholds, timesteps, leak, leaks, activation} of an SNN checkpoint; the thresholds are scaled.

    leaks: of each layer, or [] if the file does not say. Raises UserError for missing or impossible values.
    """
    try:
        scale = float(state.get('scaling_threshold', 1.0))
        settings = {'thresholds': [float(value) * scale for value in state['thresholds']],
                    'timesteps': int(state['timesteps']), 'leak': float(state['leak']),
                    'leaks': [float(value) for value in state.get('leaks', ())],
                    'activation': state.get('activation', 'STDB')}
        whole = (settings['timesteps'] == state['timesteps'] >= 1 and 0 < settings['leak'] <= 1
                 and settings['thresholds'] and all(0 < value < math.inf for value in settings['thresholds'])
                 and all(0 < value <= 1 for value in settings['leaks']) and isinstance(settings['activation'], str))
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
        whole = False
    if not whole:
        raise UserError(f'{path}: is not a whole SNN checkpoint, which has thresholds above 0, timesteps of 1 or more '
                        'and a leak in (0, 1]; give another file')
    if settings['activation'] not in SURROGATES:
        raise UserError(f'{path}: its surrogate {settings["activation"]} is none of {", ".join(SURROGATES)}; from '
                        'Python, import the file that defines it first; for the scripts, put its class into '
                        'self_models/surrogate.py')
    return settings


def load_snn(model: SpikingNetwork, state: dict, path: Path | str, leaks: bool = True) -> None:
    """Copy the weights, thresholds and, if wanted, the leaks of an SNN checkpoint into a model. Raises UserError."""
    load_weights(model, state, path)
    settings = snn_settings(state, path)
    known = getattr(state['state_dict'], '_metadata', {}).get('', {})
    carries = isinstance(model, LayerByLayer) and bool(known.get('carries', model.carried))
    try:
        if carries and len(settings['thresholds']) == len(model.layer_names):
            model.carried = None  # the weights of the file carry its thresholds already
        model.threshold_update(1.0, settings['thresholds'])
        if carries:
            model.carried = model.thresholds.tolist()
        if leaks and settings['leaks']:
            model.leak_update(settings['leaks'])
    except ValueError as error:
        raise UserError(f'{path}: {error}') from error


def thresholds_key(model: nn.Module, settings: dict) -> dict:
    """What balanced thresholds depend on: {'weights': a hash, **settings}."""
    neurons = neuron_keys(model)
    tensors = [*model.state_dict().items(), *model.named_buffers()]  # some buffers are not in the state
    return {'weights': digest({key: value for key, value in tensors if key not in neurons}), **settings}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of a dict of tensors, with their names, dtypes and shapes."""
    found = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        found.update(f'{key} {value.dtype} {tuple(value.shape)}'.encode())
        values = value.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
        found.update(values.view(torch.uint8).numpy().tobytes())  # as bytes, as numpy has no bfloat16
    return found.hexdigest()


def cached_thresholds(path: Path | str, key: dict, count: int) -> tuple[list[float] | None, str]:
    """(`count` thresholds or None, a line to say) from the cache beside the ANN checkpoint `path`."""
    cache = Path(f'{path}.thresholds.json')
    try:
        entry = json.loads(cache.read_text())
        known = {**former.CACHE_KEY, **entry['key']}
        differing = [name for name in key if known.get(name) != key[name]]
        thresholds = [float(value) for value in entry['thresholds']]
        if len(thresholds) != count or not all(0 < value < math.inf for value in thresholds):
            raise ValueError
    except FileNotFoundError:
        return None, f'no thresholds of this ANN are cached yet; {cache} will hold them'
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, f'{cache} cannot be read; thresholds are balanced again'
    if differing:
        return None, f'{cache} is for other {", ".join(differing)}; thresholds are balanced again'
    return thresholds, f'thresholds taken from {cache}'


def cache_thresholds(path: Path | str, key: dict, thresholds: list[float]) -> None:
    """Keep thresholds beside the ANN checkpoint `path`. Raises UserError if the file cannot be written."""
    text = json.dumps({'key': key, 'thresholds': thresholds}, indent=1)
    write_atomically(Path(f'{path}.thresholds.json'), lambda file: file.write(text.encode()))
