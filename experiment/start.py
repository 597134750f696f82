"""How a run starts: the one place that decides it, locks the run's name and settles the arguments.

After that, arguments are only read.
"""
import dataclasses
import importlib.util
import os
import shlex
from argparse import Namespace
from pathlib import Path
from typing import IO, NamedTuple

import torch

from experiment import UserError, checkpoint, distributed, engine, files, former, options, own, setup, trained_on
from experiment.data import CLASS_COUNTS, Data
from self_models.architectures import ARCHITECTURES, INPUT_SHAPES
from self_models.conversion import QUANTIZED
from self_models.surrogate import FLAGS


class Start(NamedTuple):
    """How a run starts.

    kind: 'scratch', 'ann' or 'snn' (from a pretrained network), or 'resume'. path, state: the checkpoint's path and
    content; None from scratch. paths: of the run. lock: held as long as this object lives. said: lines to say.
    """
    kind: str
    path: Path | str | None
    state: dict | None
    paths: files.Paths
    lock: list[IO | None]
    said: list[str]

    @property
    def resumed(self) -> bool:
        return self.kind == 'resume'

    def progress(self) -> 'Progress':
        """What is done when the run begins. The best epoch counts only in the run's own last checkpoint."""
        if not self.resumed:
            return Progress([])
        own = files.is_own(self.path, self.paths)
        return Progress(self.state['history'], self.state['epoch'], tuple(self.state['best']) if own else None, not own,
                        self.state['args'])


@dataclasses.dataclass
class Progress:
    """How far a run's training is.

    history: the metrics of the epochs so far. done: the last epoch. best: (accuracy, epoch) so far, or None. fresh:
    whether files of this name are an earlier run's and must be set aside before the first is written. trained_as: the
    arguments of the epochs so far, or None; they are the run's if no epoch is left to train.
    """
    history: list[dict]
    done: int = 0
    best: tuple[float, int] | None = None
    fresh: bool = True
    trained_as: dict | None = None


def find_ann(args: Namespace) -> Start:
    """The Start of a run of ann.py; settles its arguments. Raises UserError."""
    start, quantizes = _open('ann', args), False
    if start.kind == 'scratch' and args.test_only:
        raise UserError('--test_only: name the network with --pretrained_ann or --resume')
    if start.state:  # the names of its weights say what the layers are
        layers = checkpoint.ann_layers(start.state)
        if options.is_own_network(args.architecture):
            del layers['batch_norm']  # its own code decides
        quantizes = start.kind == 'ann' and (args.activation, layers['activation']) == ('QCFS', 'ReLU')
        if quantizes:  # QCFS takes the place of ReLU
            del layers['activation'], layers['bounds']
        elif layers['activation'] == 'ReLU':
            del layers['bounds']  # without effect
        for flag in layers.keys() - {'levels'}:
            if flag in args.given and getattr(args, flag) != layers[flag]:
                raise UserError(f'--{flag} {getattr(args, flag)}: the network in {start.path} has {flag} '
                                f'{layers[flag]}; leave the flag out, or train a new one')
        if layers.get('activation') == 'QCFS' and not layers['levels'] and 'levels' not in args.given:
            raise UserError(f'{start.path}: does not say how many levels its QCFS has; give the number with --levels')
        _settle(args, {key: value for key, value in layers.items() if value is not None})
    said = drop_idle(args, start) + start.said
    flags = ('activation', 'levels', 'bounds', 'batch_norm')
    layers = {flag: getattr(args, flag) for flag in flags}
    return _checked(start, args, said, layers | ({'activation': 'ReLU'} if quantizes else {}))


def find_snn(args: Namespace, device: torch.device) -> Start:
    """The Start of a run of snn.py; settles its arguments. Raises UserError."""
    choose_backend(args, device)
    start = _open('snn', args)
    said = drop_idle(args, start) + start.said
    if start.kind in ('scratch', 'ann'):
        said += take_defaults(args, start.state)
    return _checked(start, args, said, {**checkpoint.ann_layers(start.state), 'levels': 1})


def _settle(args, values):
    """Set the arguments that no flag has given to these values."""
    vars(args).update({key: value for key, value in values.items() if key not in args.given})


def _checked(start, args, said, layers):
    """The Start with all it says, once its arguments are checked. layers: of setup.build_ann. Raises UserError."""
    if start.resumed and not args.test_only:
        check_lasting(args, start.state, start.path)
    check_network(args, start, layers)
    trained_on.choose_split_seed(args, start.state, resumed=start.resumed)
    return start._replace(said=said)


def check_network(args: Namespace, start: Start, layers: dict) -> None:
    """Raise UserError if the user's own network cannot be converted, or if an ANN's weights do not fit.

    Called before data are read or downloaded. The last layer of a published network, which depends on the number of
    classes, is not checked. Nor is the user's own network if only the data tell that number; its file is run.
    """
    classes, device = 1 if start.kind == 'ann' else None, 'meta'  # shapes without values
    if own_code := options.is_own_network(args.architecture):
        engine.seed_all(args.seed)  # its file runs now and may draw random numbers
        own.find(args.architecture)
        classes, device = CLASS_COUNTS.get(args.dataset), 'cpu'
    if not classes:
        return
    shape = setup.input_shape(args)
    try:
        with torch.device(device):
            model = setup.build_ann(args, Data(None, None, [''] * classes, shape), **layers)
    except UserError as error:
        if own_code:
            raise
        raise UserError(f'{error}; set --architecture and --dataset as {start.path} was trained') from error
    if start.kind == 'ann':
        checkpoint.fitting(model, start.state, start.path, may_differ=checkpoint.last_layer(model))


def take_defaults(args: Namespace, state: dict | None) -> list[str]:
    """Settle the flags of a conversion for the ANN in a checkpoint's `state`, or from scratch (None); returns lines.

    A QCFS ANN brings its thresholds. Unless flags say otherwise, it is converted to direct input and neurons without
    delay that begin at half a threshold. Nothing is balanced, scaled or fitted. Raises UserError for flags without
    effect.
    """
    layers = checkpoint.ann_layers(state)
    quantized = layers['activation'] == 'QCFS'
    if args.keep_batch_norm and not layers['batch_norm']:
        raise UserError('--keep_batch_norm: ' + (f'the ANN in {args.pretrained_ann} has no batch norm' if state else
                        'a network from scratch has no batch norm') + '; leave the flag out')
    if args.scaling_factor == 'auto' and not state:
        raise UserError('--scaling_factor auto: needs a trained ANN; name one with --pretrained_ann, or give a number')
    for flag in (*options.CONVERSION, 'default_threshold') if quantized else ():
        if flag in args.given:
            raise UserError(f'--{flag}: has no effect on a QCFS ANN, whose bounds are the thresholds; leave it out')
        setattr(args, flag, None)
    unfitted = {
        "needs a trained ANN; name one with --pretrained_ann": not state,
        "the mean output of this network is already in the units of its logits; leave the flag out":
            options.is_own_network(args.architecture) or args.keep_batch_norm,
        "the mean output of a QCFS ANN is already in the units of its logits; leave the flag out": quantized}
    for why in [why for why, holds in unfitted.items() if holds and args.output == 'fitted']:
        if 'output' in args.given:
            raise UserError(f'--output fitted: {why}')
        args.output = 'mean'
    said = []
    if state and (layers['batch_norm'] or args.balance_blocks) and not quantized and (
            args.default_threshold != args.defaults['default_threshold']):
        said.append('--default_threshold has no effect here: it belongs to ResNets whose blocks are not balanced')
    if args.balance_blocks and (quantized or layers['batch_norm']):
        args.balance_blocks = False
        said.append('--balance_blocks has no effect here: it belongs to ANNs of ReLU without batch norm')
    if not quantized:
        return said
    said += [f'--{flag} has no effect here: it belongs to training' for flag in ('crop', 'cutout')
             if args.test_only and flag in args.given and getattr(args, flag) != args.defaults[flag]]
    _settle(args, QUANTIZED)
    said += [f'--{key} {getattr(args, key)}: the bounds of QCFS fit {key} {value}; with another value the network is '
             'less accurate than its ANN until it is fine-tuned'
             for key, value in QUANTIZED.items() if getattr(args, key) != value]
    levels, steps = layers['levels'], args.timesteps
    if levels and steps < levels:
        said.append(f'--timesteps {steps}: the ANN was trained with {levels} levels; with {steps + 1} rates for its '
                    f'{levels + 1} values the network loses accuracy; fine-tuning recovers most of it')
    if levels and steps > levels:
        said.append(f'--timesteps {steps}: the ANN was trained with {levels} levels; more steps take more time and '
                    'bring the network nearer to the ANN without levels')
    return said


def choose_backend(args: Namespace, device: torch.device) -> None:
    """Set args.backend, which runs the neurons: without the flag, Triton's kernels on CUDA. Raises UserError."""
    there = device.type == 'cuda' and importlib.util.find_spec('triton') is not None
    if args.backend == 'triton' and not there:
        raise UserError('--backend triton: needs a CUDA device and the package triton; leave the flag out')
    args.backend = args.backend or ('triton' if there else 'torch')


# flags that the optimizer's state or the best accuracy so far depends on
LASTING = ('optimizer', 'amsgrad', 'dataset', 'image_size', 'seed', 'validation_fraction', 'test_samples', 'levels',
           'timesteps', 'leak', 'encoding', 'delay', 'initial_potential', 'learn_threshold', 'learn_leak')


def check_lasting(args: Namespace, state: dict, path: Path | str) -> None:
    """Raise UserError if a resumed training has other flags than it can continue with."""
    idle = options.without_effect(vars(args))
    for flag in LASTING:
        before = state['args'].get(flag)
        if flag not in idle and before != getattr(args, flag, None):
            trained = f'without --{flag}' if before is None else f'with --{flag} {before}'
            raise UserError(f'{path}: was trained {trained}; keep to that, or start a new run from its weights with '
                            '--pretrained_ann or --pretrained_snn')


def drop_idle(args: Namespace, start: Start | None = None) -> list[str]:
    """Reset the flags without effect to their defaults or, in a resumed run, to their values before.

    Returns a line to say for each that was given.
    """
    idle, said = options.without_effect(vars(args)), []
    before = start.state['args'] if start and start.resumed else {}
    if 'balance_blocks' in before and before['balance_blocks'] != args.balance_blocks:
        idle.setdefault('balance_blocks', 'conversions of ResNets, and this network is converted already')
    for flag, of in sorted(idle.items()):
        if flag in args.given:
            said.append(f'--{flag} has no effect here: it belongs to {of}')
        if flag in args.given or flag in before:
            setattr(args, flag, before.get(flag, args.defaults[flag]))
    return said


def _open(kind, args):
    """The Start of a run, with the arguments settled by the checkpoint that it begins with. Raises UserError.

    The name comes first, then its lock, then the checkpoint, which another run of the name may write until then.
    """
    paths = files.paths(kind, _name(kind, args))
    held, source, repaired = _take(kind, args, paths)
    start, path = ('resume', source) if source else _pretrained(args)
    if not path:
        return Start('scratch', None, None, paths, held, [])
    state = checkpoint.load_training(path, kind) if source else checkpoint.load(path, start)
    if 'timesteps' in state:  # an SNN's
        line = adopt(args, state, path, resumed=bool(source))
        said = [f'resumed after epoch {state["epoch"]}; {line}' if source else line]
    else:
        if source:
            keep(args, state, path, ['pretrained_ann'])
        said = [f'resumed from {path}, after epoch {state["epoch"]}'] if source else []
        said += take_network(args, state, path)
    made_by = state['args'].get('architecture')
    if source and options.is_own_network(args.architecture) and isinstance(made_by, str) and (
            os.path.realpath(made_by) != os.path.realpath(args.architecture)):
        said.append(f'{path}: was trained as {made_by}, and goes on as {args.architecture}')
    return Start(start, path, state, paths, held, said + repaired)


def _pretrained(args):
    """('snn' or 'ann', the path of the network that the flags name to start from); 'ann' and None without one."""
    snn = getattr(args, 'pretrained_snn', None)  # ann.py has no such flag
    return ('snn', snn) if snn else ('ann', args.pretrained_ann)


def _name(kind, args):
    """The name of a run, by its flags or the checkpoint that it begins with. Raises UserError.

    The file is read only if needed: the one that a resumed run began with may be gone.
    """
    of, path = _pretrained(args) if args.resume in (None, 'auto', 'last') else (kind, args.resume)
    asked = {'architecture', 'dataset', *(['timesteps'] if of == 'snn' else [])} - args.given
    if path and asked and not args.name:
        state, args = checkpoint.load(path, of), Namespace(**vars(args))
        take_network(args, state, path)
        if 'timesteps' in asked:
            args.timesteps = checkpoint.snn_settings(state, path)['timesteps']
    return files.identifier(kind, args)


def _take(kind, args, paths):
    """([the lock of a run's name], the checkpoint that --resume asks for or None, lines to say). Raises UserError.

    The lock is held as long as the list lives. A test writes nothing and takes none. Of several processes the main one
    takes the lock, and all get the checkpoint that it finds.
    """
    held = []

    def find():
        if not args.test_only:
            files.check_writable(paths.best.parent, paths.metrics.parent)
            held.append(files.lock(paths))
        if not args.resume or args.resume == 'auto' and not paths.last.exists():
            return None, []
        source = paths.last if args.resume in ('auto', 'last') else args.resume
        if args.resume == 'last' and not source.exists():
            raise UserError(f'--resume: there is no {source}; give --resume FILE, or leave the flag out')
        goes_on = files.is_own(source, paths) and not args.test_only and os.path.isfile(source)
        return source, checkpoint.bring_in_line(paths, kind) if goes_on else []

    return held, *distributed.from_main(find)


def keep(args: Namespace, state: dict, path: Path | str, flags: list[str]) -> None:
    """Take from a checkpoint the flags that can no longer change. Raises UserError if other values were given."""
    saved = state['args']
    for flag in flags:
        value, wanted, pretrained = saved.get(flag), getattr(args, flag), flag in former.PRETRAINED
        if pretrained and flag not in saved:
            continue  # the file does not say
        if not (isinstance(value, str) if pretrained or value == 'auto' else type(value) in (int, float)):
            value = None
        same = wanted == value or pretrained and value and os.path.realpath(wanted or '') == os.path.realpath(value)
        if flag in args.given and not same:
            raise UserError(f'--{flag} {wanted}: has no effect, as {path} was made '
                            + (f'without --{flag}' if value is None else f'with --{flag} {value}')
                            + '; leave the flag out, or start a new run with --pretrained_ann and another --name')
        setattr(args, flag, value)


# flags of the network and its images, and their possible values
NETWORK = {'architecture': ARCHITECTURES, 'dataset': INPUT_SHAPES, 'kernel_size': range(1, 2 ** 31, 2),
           'image_size': range(1, 4097)}
# flags of how its neurons run and learn
SPIKING = ('encoding', 'delay', 'initial_potential', 'learn_threshold', 'learn_leak', 'keep_batch_norm')


def _saved(args, state, path):
    """The arguments in a checkpoint. Raises UserError for the user's own network if the command line does not name its
    file: a file is never run because a checkpoint names it."""
    made_by = state['args'].get('architecture')
    if isinstance(made_by, str) and options.is_own_network(made_by) and 'architecture' not in args.given:
        raise UserError(f'{path}: holds the network {made_by}, whose file is run only if you name it: add '
                        f'--architecture {shlex.quote(made_by)}')
    return state['args']


def take_network(args: Namespace, state: dict, path: Path | str) -> list[str]:
    """Take from an ANN's checkpoint the flags of network and images that were not given; returns lines to say."""
    saved = _saved(args, state, path)
    taken = {key: saved[key] for key, known in NETWORK.items()
             if key not in args.given and type(saved.get(key)) in (int, str) and saved[key] in known}
    _settle(args, taken)
    idle = options.without_effect(vars(args))
    words = [f'--{key} {value}' for key, value in taken.items() if key not in idle]
    return [f'taken from {path}: {" ".join(words)}'] if words else []


def adopt(args: Namespace, state: dict, path: Path | str, resumed: bool = False) -> str:
    """Take from an SNN checkpoint the flags of network, images and surrogate that were not given.

    resumed: whether the run is resumed from it. Returns a line to say. Raises UserError.
    """
    saved = _saved(args, state, path)
    settings = {key: saved[key] for key in (*NETWORK, 'output', *FLAGS, *SPIKING)
                if type(saved.get(key)) is type(getattr(args, key))}
    settings |= checkpoint.snn_settings(state, path)
    thresholds, leaks = settings.pop('thresholds'), settings.pop('leaks')  # no flags
    if resumed and args.leak == settings['leak']:
        args.given.discard('leak')  # repeats the run's own command line; leaks may have been learned since
    outputs = args.output, settings['output']
    if 'output' in args.given and (outputs == ('mean', 'fitted') or outputs[0] == 'fitted' != outputs[1]):
        raise UserError(f'--output {args.output}: only a conversion decides whether the output is fitted, and {path} '
                        f'has --output {settings["output"]}; leave the flag out, or convert with --pretrained_ann')
    _settle(args, settings)
    in_place = settings.get('keep_batch_norm', False)
    if args.keep_batch_norm != in_place and not options.is_own_network(args.architecture):
        raise UserError(f'--keep_batch_norm {args.keep_batch_norm}: {path} has '
                        f'{"batch norm in place" if in_place else "no batch norm, or has it folded"}; leave the flag '
                        'out, or convert with --pretrained_ann')
    if resumed:
        keep(args, state, path, ['pretrained_ann', 'pretrained_snn'])
    # thresholds are balanced and scaled already; these flags had no effect if --default_threshold set them all
    idle = options.without_effect(vars(args)) if resumed else {}
    fixed = [flag for flag in options.CONVERSION if flag not in idle]
    # files of the published ResNets may have only the balanced thresholds
    if 'default_threshold' not in idle and ('default_threshold' in saved or len(thresholds) > 3):
        fixed.append('default_threshold')
    keep(args, state, path, fixed)
    unknown = options.without_effect(vars(args)).keys()  # to this surrogate, for one
    said = {key: f'{getattr(args, key)}{" as the flag says" if key in args.given else ""}' for key in (
        'timesteps', 'leak', 'activation', 'output', *(
            key for key in (*FLAGS, *SPIKING)
            if key not in unknown and (key in args.given or getattr(args, key) != args.defaults[key])))}
    if set(leaks) - {settings['leak']}:
        said['leak'] = f'{said["leak"]}, in place of those learned' if 'leak' in args.given else 'as learned'
    return f'{path}: {args.architecture} for {args.dataset}, runs at ' + ', '.join(
        f'{key} {value}' for key, value in said.items())
