"""Where a run starts: the one place that finds it out, takes the run's name and settles the arguments.

From here on arguments are only read.
"""
import dataclasses
import importlib.util
import os
from typing import IO, NamedTuple

from experiment import UserError, checkpoint, distributed, files, options, split
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
    if not args.resume:
        checkpoint.check_there(args.pretrained_ann, 'ann')
    name = files.identifier('ann', args)
    paths = files.paths('ann', name)
    held = lock(args, paths)
    source, said = resume_file(args, paths, 'ann')
    kind, path, state = 'scratch', source or args.pretrained_ann, None
    if source:
        kind, state = 'resume', checkpoint.load_training(source, 'ann')
        keep(args, state, source, ['pretrained_ann'])
        said = [*said, f"resumed from {source}, after epoch {state['epoch']}"]
    elif args.pretrained_ann:
        kind, state = 'ann', checkpoint.load(args.pretrained_ann, 'ann')
    elif args.test_only:
        raise UserError('--test_only: name the network with --pretrained_ann or --resume')
    if state:  # what its layers are stands in their names
        layers = checkpoint.ann_layers(state)
        for flag in ('activation', 'batch_norm'):
            if flag in args.given and getattr(args, flag) != layers[flag]:
                raise UserError(f'--{flag} {getattr(args, flag)}: the network in {path} has {flag} {layers[flag]}; '
                                'leave the flag out, or train anew')
        vars(args).update({key: value for key, value in layers.items() if key not in args.given})
    said = drop_idle(args) + said
    split.choose(args, state, resumed=kind == 'resume')
    return Start(kind, path, state, name, paths, held, said)


def find_snn(args, device):
    """The Start of a run of snn.py; settles its arguments. Raises UserError."""
    choose_backend(args, device)
    if not args.resume:
        checkpoint.check_there(args.pretrained_ann, 'ann')
    name, paths, held, source, state, said = _open_snn(args)
    kind, path = ('resume', source) if source else ('snn', args.pretrained_snn) if state else ('scratch', None)
    if not state and args.pretrained_ann:
        kind, path, state = 'ann', args.pretrained_ann, checkpoint.load(args.pretrained_ann, 'ann')
    said = drop_idle(args) + said
    if kind in ('scratch', 'ann'):
        said += take_defaults(args, state)
    split.choose(args, state, resumed=kind == 'resume')
    return Start(kind, path, state, name, paths, held, said)


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
    if steps == levels:
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


def drop_idle(args):
    """Put the flags that were given and mean nothing here back to their defaults; returns a line to say for each."""
    idle = options.without_effect(vars(args))
    said = []
    for flag in sorted(args.given & idle.keys()):
        setattr(args, flag, args.defaults[flag])
        said.append(f'--{flag} has no effect here: it is of {idle[flag]}')
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


def _open_snn(args):
    """(name, Paths, lock, the checkpoint to resume from or None, what that or --pretrained_snn holds, lines to say).

    Where no flag says otherwise the checkpoint says the network, and so the run's name. One of the run's own is read
    (again) once the name is locked: another run of that name may have gone on until then. Raises UserError.
    """
    source = args.resume if args.resume not in ('auto', 'last') else None
    if args.resume in ('auto', 'last') and args.name and args.pretrained_snn:  # which may be gone by now
        own = files.paths('snn', args.name).last
        source = own if own.exists() else None
    state, note = _read_snn(args, source)
    name = files.identifier('snn', args)
    paths = files.paths('snn', name)
    held = lock(args, paths)
    source, said = resume_file(args, paths, 'snn')
    read = source or args.pretrained_snn
    if read and os.path.realpath(read) in map(os.path.realpath, paths):
        state, note = _read_snn(args, source)
        if files.identifier('snn', args) != name:  # the file is of another network than it is called by
            for file in filter(None, held):
                file.close()
            name = files.identifier('snn', args)
            paths = files.paths('snn', name)
            held = lock(args, paths)
    return name, paths, held, source, state, [*([note] if note else []), *said]


def _read_snn(args, source):
    """(what the checkpoint to resume from or that of --pretrained_snn holds, a line to say); None, None for neither."""
    if source:
        state = checkpoint.load_training(source, 'snn')
        return state, f'resumed after epoch {state["epoch"]}; ' + adopt(args, state, source, resumed=True)
    if args.pretrained_snn:
        state = checkpoint.load(args.pretrained_snn, 'snn')
        return state, adopt(args, state, args.pretrained_snn)
    return None, None


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


def adopt(args, state, path, resumed=False):
    """Take from an SNN checkpoint what it says of network, images and surrogate, where no flag was given.

    resumed: whether the run goes on, rather than starts from it. Returns a line to say. Raises UserError.
    """
    saved = state['args'] if isinstance(state.get('args'), dict) else {}
    settings = {'output': 'mean'}  # of files that do not say: only a conversion fits the output
    settings |= {key: saved[key] for key in (
        'architecture', 'dataset', 'kernel_size', 'image_size', 'output', *FLAGS, *options.FORMER)
        if type(saved.get(key)) is type(getattr(args, key))}
    settings |= checkpoint.snn_settings(state, path)
    thresholds = settings.pop('thresholds')  # no flag
    settings.pop('leaks', None)
    if resumed:
        keep(args, state, path, ['pretrained_ann', 'pretrained_snn'])
    # thresholds are balanced and scaled already, unless --default_threshold set them all: then these meant nothing
    idle = options.without_effect(vars(args)) if resumed else {}
    fixed = [flag for flag in options.CONVERSION if flag not in idle]
    # the published ResNets' files may have the balanced thresholds only
    if 'default_threshold' not in idle and ('default_threshold' in saved or len(thresholds) > 3):
        fixed.append('default_threshold')
    keep(args, state, path, fixed)
    if 'output' in args.given and args.output == 'mean' and settings['output'] == 'fitted':
        raise UserError(f"--output mean: has no effect, as the conversion has fitted the output of {path}, and it is "
                        'the mean of that; leave the flag out')
    if 'output' in args.given and args.output == 'fitted' and settings['output'] != 'fitted':
        raise UserError(f'--output fitted: only a conversion fits the output, and that of {path} did not; leave the '
                        'flag out, or convert with --pretrained_ann')
    vars(args).update({key: value for key, value in settings.items() if key not in args.given})
    return f'{path}: {args.architecture} for {args.dataset}, runs at ' + ', '.join(
        f'{key} {getattr(args, key)}{" as the flag says" if key in args.given else ""}'
        for key in ('timesteps', 'leak', 'activation', 'output', *(
            key for key, former in options.FORMER.items() if getattr(args, key) != former)))
