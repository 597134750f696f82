"""Where a run starts: the one place that finds it out, takes the run's name and settles the arguments.

From here on arguments are only read.
"""
import dataclasses
import importlib.util
import os
import shlex
from typing import IO, NamedTuple

import torch

from experiment import UserError, checkpoint, distributed, engine, files, options, own, setup, trained_on
from experiment.data import CLASS_COUNTS, Data
from self_models.architectures import ARCHITECTURES, INPUT_SHAPES
from self_models.conversion import QUANTIZED
from self_models.surrogate import FLAGS


class Start(NamedTuple):
    """How a run starts.

    kind: 'scratch', 'ann' or 'snn' (from a pretrained network), or 'resume'. path, state: of the checkpoint, and what
    it holds; None from scratch. name, paths: of the run. lock: held for as long as this is kept. said: lines.
    """
    kind: str
    path: str | None
    state: dict | None
    name: str
    paths: files.Paths
    lock: list[IO | None]
    said: list[str]

    @property
    def resumed(self) -> bool:
        return self.kind == 'resume'

    def progress(self) -> 'Progress':
        """What is done when the run begins. Only of its own last checkpoint is the best epoch its own."""
        if not self.resumed:
            return Progress([])
        own = files.is_own(self.path, self.paths)
        return Progress(self.state['history'], self.state['epoch'], tuple(self.state['best']) if own else None, not own,
                        self.state['args'])


@dataclasses.dataclass
class Progress:
    """How far a run's training is.

    history: the metrics of the epochs so far. done: the last epoch. best: (accuracy, epoch) so far, or None. fresh:
    whether files of this name are an earlier run's, to be set aside before the first is written. trained_as: the
    arguments of the epochs so far, which are the run's where none is left to train; or None.
    """
    history: list[dict]
    done: int = 0
    best: tuple[float, int] | None = None
    fresh: bool = True
    trained_as: dict | None = None


def find_ann(args):
    """The Start of a run of ann.py; settles its arguments. Raises UserError."""
    start = _open('ann', args)
    if start.kind == 'scratch' and args.test_only:
        raise UserError('--test_only: name the network with --pretrained_ann or --resume')
    if start.state:  # what its layers are stands in their names
        layers = checkpoint.ann_layers(start.state)
        if options.is_own_network(args.architecture):
            del layers['batch_norm']  # its own code's
        for flag in layers.keys() - {'levels'}:
            if flag in args.given and getattr(args, flag) != layers[flag]:
                raise UserError(f'--{flag} {getattr(args, flag)}: the network in {start.path} has {flag} '
                                f'{layers[flag]}; leave the flag out, or train anew')
        if layers['activation'] == 'QCFS' and not layers['levels'] and 'levels' not in args.given:
            raise UserError(f'{start.path}: does not say how many levels its QCFS has; give them with --levels')
        vars(args).update({key: value for key, value in layers.items() if value is not None and key not in args.given})
    said = drop_idle(args, start) + start.said
    return _settled(start, args, said, {flag: getattr(args, flag) for flag in ('activation', 'levels', 'bounds')})


def find_snn(args, device):
    """The Start of a run of snn.py; settles its arguments. Raises UserError."""
    choose_backend(args, device)
    start = _open('snn', args)
    said = drop_idle(args, start) + start.said
    if start.kind in ('scratch', 'ann'):
        said += take_defaults(args, start.state)
    return _settled(start, args, said, {**checkpoint.ann_layers(start.state), 'levels': 1})


def _settled(start, args, said, layers):
    """The Start with all it says, once the last arguments are settled. layers: of setup.build_ann. Raises UserError."""
    if options.is_own_network(args.architecture):
        check_own(args, start, layers)
    elif start.kind == 'ann':
        check_fits(args, start.state, start.path)
    trained_on.choose_split_seed(args, start.state, resumed=start.resumed)
    return start._replace(said=said)


def check_own(args, start, layers):
    """Raise UserError for a network of one's own that cannot be taken, or not with the weights of an ANN's checkpoint.

    Before data are read, or downloaded; where only they say how many classes there are, its file is run and no more.
    """
    engine.seed_all(args.seed)  # of what its file draws, which runs now
    own.find(args.architecture)
    if args.dataset in CLASS_COUNTS:
        data = Data(None, None, [''] * CLASS_COUNTS[args.dataset], INPUT_SHAPES[args.dataset])
        model = setup.build_ann(args, data, **{'batch_norm': None, **layers})
        if start.kind == 'ann':
            checkpoint.fitting(model, start.state, start.path, may_differ=checkpoint.last_layer(model))


def check_fits(args, state, path):
    """Raise UserError if the weights of an ANN's checkpoint are not those of the network that the arguments ask for.

    Before data are read, or downloaded; so the number of classes, and with it the last layer, is left open.
    """
    shape = (3, args.image_size, args.image_size) if args.dataset == 'FOLDER' else INPUT_SHAPES[args.dataset]
    layers = {**checkpoint.ann_layers(state), 'levels': 1}
    try:
        with torch.device('meta'):  # shapes without values
            model = setup.build_ann(args, Data(None, None, [''], shape), **layers)
    except UserError as error:
        raise UserError(f'{error}; set --architecture and --dataset as {path} was trained') from error
    checkpoint.fitting(model, state, path, may_differ=checkpoint.last_layer(model))


def take_defaults(args, state):
    """Settle what the flags of a conversion mean for the ANN of a checkpoint's `state`, or without one (None).

    An ANN of QCFS brings its thresholds: it is converted to direct input, neurons without delay and half a threshold to
    begin with, unless flags say otherwise; nothing is balanced, scaled or fitted. Returns lines to say. Raises
    UserError for flags that mean nothing then.
    """
    if args.output == 'fitted' and not state:
        if 'output' in args.given:
            raise UserError("--output fitted: fits the output to an ANN's; name one with --pretrained_ann")
        args.output = 'mean'
    layers = checkpoint.ann_layers(state) if state else {}
    if args.keep_batch_norm and not layers.get('batch_norm'):
        raise UserError('--keep_batch_norm: ' + (f'the ANN in {args.pretrained_ann} has no batch norm' if state else
                        'a network from scratch has no batch norm') + '; leave the flag out')
    if (options.is_own_network(args.architecture) or args.keep_batch_norm) and args.output == 'fitted':
        if 'output' in args.given:
            raise UserError("--output fitted: the mean output of this network is in its logits' units as it is; leave "
                            'the flag out')
        args.output = 'mean'
    if layers.get('activation') != 'QCFS':
        if args.scaling_factor == 'auto' and not state:
            raise UserError('--scaling_factor auto: chooses by what a trained ANN gives; name one with '
                            '--pretrained_ann, or give a number')
        return []
    for flag in (*options.CONVERSION, 'default_threshold'):
        if flag in args.given:
            raise UserError(f'--{flag}: has no effect on an ANN of QCFS, whose bounds are the thresholds; leave it out')
        setattr(args, flag, None)
    if 'output' in args.given and args.output == 'fitted':
        raise UserError("--output fitted: the mean output of an ANN of QCFS is in its logits' units already; leave the "
                        'flag out')
    settings = {**QUANTIZED, 'output': 'mean'}
    vars(args).update({key: value for key, value in settings.items() if key not in args.given})
    said = [f'--{key} {getattr(args, key)}: the bounds of QCFS fit {key} {value}; otherwise the network does worse '
            'than its ANN until it is fine-tuned' for key, value in QUANTIZED.items() if getattr(args, key) != value]
    levels, steps = layers['levels'], args.timesteps
    if steps == levels or not levels:
        return said
    return [*said, f'--timesteps {steps}: the ANN was trained with {levels} levels; '
            + (f'with {steps + 1} rates for its {levels + 1} values the network loses accuracy, most of which '
               'fine-tuning wins back' if steps < levels else
               'more steps cost more and bring the network nearer to what the ANN would give without levels')]


def choose_backend(args, device):
    """What runs the neurons: --backend or, without it, Triton's kernels on CUDA. Raises UserError.

    Goes into the arguments, which the log shows.
    """
    there = device.type == 'cuda' and importlib.util.find_spec('triton') is not None
    if args.backend == 'triton' and not there:
        raise UserError('--backend triton: needs a CUDA device and the package triton; leave the flag out')
    args.backend = args.backend or ('triton' if there else 'torch')


def drop_idle(args, start=None):
    """Put the flags that mean nothing here back to their defaults, of a run that is resumed to what they were.

    Returns a line to say for each that was given.
    """
    idle, said = options.without_effect(vars(args)), []
    before = start.state['args'] if start and start.resumed else {}
    for flag, of in sorted(idle.items()):
        if flag in args.given:
            said.append(f'--{flag} has no effect here: it is of {of}')
        if flag in args.given or flag in before:
            setattr(args, flag, before.get(flag, args.defaults[flag]))
    return said


def resume_file(args, paths, kind):
    """(the checkpoint that --resume asks for or None, lines to say): of several processes, all get the main one's.

    paths: of the run, whose name is to be locked by now, as another run of that name could write them meanwhile. Raises
    UserError.
    """
    def find():
        if args.resume not in ('auto', 'last'):
            source = args.resume
        elif paths.last.exists():
            source = paths.last
        elif args.resume == 'auto':
            return None, []
        else:
            raise UserError(f'--resume: there is no {paths.last}; say --resume FILE, or leave it out to start anew')
        goes_on = files.is_own(source, paths) and not args.test_only and os.path.isfile(source)
        return source, checkpoint.bring_in_line(paths, kind) if goes_on else []

    return distributed.from_main(find)


def lock(args, paths):
    """Take the run's name for as long as the returned list is kept; a test, which writes nothing, takes none.

    Of several processes the main one takes it. Raises UserError where another run has it, or nothing can be written.
    """
    held = []

    def take():
        files.check_writable(paths.best.parent, paths.metrics.parent)
        held.append(files.lock(paths))

    if not args.test_only:
        distributed.from_main(take)
    return held


def _open(kind, args):
    """The Start of a run, of which the arguments are settled by the checkpoint that it begins with. Raises UserError.

    If no flag says otherwise the checkpoint says the network, and so the run's name. A checkpoint of the run's own is
    read once the name is locked, as another run of that name may have gone on until then.
    """
    named = {'architecture', 'dataset', *(['timesteps'] if getattr(args, 'pretrained_snn', None) else [])}
    name = files.identifier(kind, args)
    begun = None
    # what a run that is resumed under a known name began with may be gone by now
    if not (args.resume in ('auto', 'last') and (args.name or named <= args.given)
            and files.paths(kind, name).last.exists()):
        begun = _read(kind, args, args.resume if args.resume not in ('auto', 'last') else None)
        name = files.identifier(kind, args)
    paths = files.paths(kind, name)
    held = lock(args, paths)
    source, said = resume_file(args, paths, kind)
    path = source or begun and begun[1]
    if not begun or path and os.path.realpath(path) in map(os.path.realpath, paths):
        begun = _read(kind, args, source)
        if files.identifier(kind, args) != name:  # the file is of another network than it is called by
            for file in filter(None, held):
                file.close()
            name = files.identifier(kind, args)
            paths = files.paths(kind, name)
            held = lock(args, paths)
    start, path, state, notes = begun
    return Start(start, path, state, name, paths, held, [*notes, *said])


def _read(kind, args, source):
    """(kind of Start, path, what is in that checkpoint, lines to say), of `source` to resume from or a pretrained file.

    Settles the arguments by it. Raises UserError.
    """
    if source:
        state = checkpoint.load_training(source, kind)
        done = f'after epoch {state["epoch"]}'
        if kind == 'snn':
            return 'resume', source, state, [f'resumed {done}; {adopt(args, state, source, resumed=True)}']
        keep(args, state, source, ['pretrained_ann'])
        return 'resume', source, state, [f'resumed from {source}, {done}', *take_network(args, state, source)]
    if kind == 'snn' and args.pretrained_snn:
        state = checkpoint.load(args.pretrained_snn, 'snn')
        return 'snn', args.pretrained_snn, state, [adopt(args, state, args.pretrained_snn)]
    if args.pretrained_ann:
        state = checkpoint.load(args.pretrained_ann, 'ann')
        return 'ann', args.pretrained_ann, state, take_network(args, state, args.pretrained_ann)
    return 'scratch', None, None, []


def keep(args, state, path, flags):
    """Take over what a checkpoint says of flags that nothing can change any more. Raises UserError for other values."""
    saved = state['args'] if isinstance(state.get('args'), dict) else {}
    if 'scaling_factor' in saved:
        saved = {'threshold_percentile': 100.0, **saved}  # files from before there were others
    for flag in flags:
        value, wanted, pretrained = saved.get(flag), getattr(args, flag), flag in ('pretrained_ann', 'pretrained_snn')
        if not (isinstance(value, str) if pretrained or value == 'auto' else type(value) in (int, float)):
            value = None
        if pretrained and value is None and 'trained_on' not in state:
            continue  # former versions did not keep it on the way
        same = wanted == value or pretrained and value and os.path.realpath(wanted or '') == os.path.realpath(value)
        if flag in args.given and not same:
            raise UserError(f'--{flag} {wanted}: has no effect, as {path} was made '
                            + (f'without --{flag}' if value is None else f'with --{flag} {value}')
                            + '; leave the flag out, or start anew with --pretrained_ann under another --name')
        setattr(args, flag, value)


# the flags that say what a network and its images are, and the values that they may have
NETWORK = {'architecture': ARCHITECTURES, 'dataset': INPUT_SHAPES, 'kernel_size': range(1, 2 ** 31, 2),
           'image_size': range(1, 4097)}


def check_named(args, saved, path):
    """Raise UserError for a checkpoint of a network of one's own whose file the command line does not name: a file that
    a checkpoint names is never run."""
    made_by = saved.get('architecture')
    if isinstance(made_by, str) and options.is_own_network(made_by) and 'architecture' not in args.given:
        raise UserError(f'{path}: holds the network {made_by}, whose file is run only if you name it: add '
                        f'--architecture {shlex.quote(made_by)}')


def take_network(args, state, path):
    """Take from an ANN's checkpoint what it says of network and images, if no flag was given; returns lines to say."""
    saved = state['args'] if isinstance(state.get('args'), dict) else {}
    check_named(args, saved, path)
    taken = {key: saved[key] for key, known in NETWORK.items()
             if key not in args.given and type(saved.get(key)) in (int, str) and saved[key] in known}
    vars(args).update(taken)
    idle = options.without_effect(vars(args))
    words = [f'--{key} {value}' for key, value in taken.items() if key not in idle]
    return [f'taken from {path}: {" ".join(words)}'] if words else []


def adopt(args, state, path, resumed=False):
    """Take from an SNN checkpoint what it says of network, images and surrogate, where no flag was given.

    resumed: whether the run goes on, rather than starts from it. Returns a line to say. Raises UserError.
    """
    saved = state['args'] if isinstance(state.get('args'), dict) else {}
    check_named(args, saved, path)
    settings = {'output': 'mean'}  # of files that do not say: only a conversion fits the output
    settings |= {key: saved[key] for key in (*NETWORK, 'output', *FLAGS, *options.FORMER)
                 if type(saved.get(key)) is type(getattr(args, key))}
    settings |= checkpoint.snn_settings(state, path)
    thresholds, leaks = settings.pop('thresholds'), settings.pop('leaks', [])  # no flags
    if resumed and args.leak == settings['leak']:
        args.given.discard('leak')  # of the run's own command line; since then leaks may have been learned
    if 'output' in args.given and args.output == 'mean' and settings['output'] == 'fitted':
        raise UserError(f"--output mean: has no effect, as the conversion has fitted the output of {path}, and it is "
                        'the mean of that; leave the flag out')
    if 'output' in args.given and args.output == 'fitted' and settings['output'] != 'fitted':
        raise UserError(f'--output fitted: only a conversion fits the output, and that of {path} did not; leave the '
                        'flag out, or convert with --pretrained_ann')
    vars(args).update({key: value for key, value in settings.items() if key not in args.given})
    if resumed:
        keep(args, state, path, ['pretrained_ann', 'pretrained_snn'])
    # thresholds are balanced and scaled already, unless --default_threshold set them all: then these meant nothing
    idle = options.without_effect(vars(args)) if resumed else {}
    fixed = [flag for flag in options.CONVERSION if flag not in idle]
    # the published ResNets' files may have the balanced thresholds only
    if 'default_threshold' not in idle and ('default_threshold' in saved or len(thresholds) > 3):
        fixed.append('default_threshold')
    keep(args, state, path, fixed)
    said = {key: f'{getattr(args, key)}{" as the flag says" if key in args.given else ""}' for key in (
        'timesteps', 'leak', 'activation', 'output', *(
            key for key, former in options.FORMER.items() if key in args.given or getattr(args, key) != former))}
    if set(leaks) - {settings['leak']}:
        said['leak'] = f'{said["leak"]}, in place of those learned' if 'leak' in args.given else 'as learned'
    return f'{path}: {args.architecture} for {args.dataset}, runs at ' + ', '.join(
        f'{key} {value}' for key, value in said.items())
