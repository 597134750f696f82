"""What the flags of a run ask for: its device, data, networks, and checkpoint to resume from."""
import importlib.util
import os
import shlex
import sys

import torch

import self_models
from experiment import UserError, checkpoint, data, distributed, files, options


def set_up_device(args):
    """The torch.device that --gpu and --devices ask for. Raises UserError where it is not there.

    Where torchrun started several processes, they meet here, and each has its own device.

    To be called before torch computes anything: threads take over the setting below when they start.
    """
    # Weight decay shrinks the weights of dead units into denormal numbers, on which a CPU is many times slower.
    torch.set_flush_denormal(True)
    device = _device(args)
    if device.type == 'cuda':
        torch.cuda.set_device(device)  # Triton starts its kernels on the current device, wherever the tensors are
    if distributed.wanted():
        distributed.start(device)
    return device


def _device(args):
    wanted = torch.cuda.is_available() if args.gpu is None else args.gpu
    numbers = [int(n) for n in args.devices.split(',')]
    if len(numbers) > 1 and not distributed.wanted():
        command = shlex.join(['torchrun', '--nproc_per_node', str(len(numbers)), '--', *sys.argv])
        raise UserError(f'--devices {args.devices}: a process uses one device; for several type: {command}')
    if not wanted:
        return torch.device('cpu')
    if not torch.cuda.is_available():
        raise UserError('--gpu: torch finds no CUDA device here; leave the flag out or say --no-gpu to use the CPU')
    if distributed.wanted():
        if 'devices' not in args.given:
            numbers = list(range(torch.cuda.device_count()))
        if distributed.local_rank() >= len(numbers):
            raise UserError(f'torchrun started more processes than there are devices ({len(numbers)}): lower '
                            '--nproc_per_node, or name more with --devices')
        numbers = [numbers[distributed.local_rank()]]
    if max(numbers) >= torch.cuda.device_count():
        raise UserError(f'--devices {args.devices}: this machine has {torch.cuda.device_count()} CUDA device(s), '
                        'numbered from 0')
    return torch.device('cuda', numbers[0])


def choose_backend(args, device):
    """What runs the neurons: --backend or, without it, Triton's kernels on CUDA. Raises UserError.

    Goes into the arguments, which the log shows.
    """
    there = device.type == 'cuda' and importlib.util.find_spec('triton') is not None
    if args.backend == 'triton' and not there:
        raise UserError('--backend triton: needs a CUDA device and the package triton; leave the flag out')
    args.backend = args.backend or ('triton' if there else 'torch')


def notes(args, device):
    """What is to be said of the flags on this device, a list of lines."""
    slow = torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if args.amp and device.type == 'cpu' and slow:
        return ['--amp: this processor has no instructions for bfloat16 and computes it many times slower than '
                'float32; leave the flag out']
    return []


def drop_idle(args):
    """Put the flags that were given and mean nothing here back to their defaults; returns a line to say for each."""
    idle = options.without_effect(vars(args))
    said = []
    for flag in sorted(args.given & idle.keys()):
        setattr(args, flag, args.defaults[flag])
        said.append(f'--{flag} has no effect here: it is of {idle[flag]}')
    return said


def load_data(args):
    """The data set that the flags ask for, as experiment.data.Data. Raises UserError."""
    with distributed.main_first():
        return data.load(args.dataset, args.data_dir, args.image_size, args.train_samples, args.test_samples,
                         args.seed, args.validation_fraction, args.num_workers, getattr(args, 'split_seed', None))


def build_ann(args, data, activation, levels, batch_norm):
    """The ANN that the flags ask for, for this data. Raises UserError where the two do not go together."""
    # in bfloat16 a training step takes 0.6 of the time in this layout; in float32 it makes no difference
    return _build(self_models.VGG, self_models.ResNet, args, data, activation=activation, levels=levels,
                  batch_norm=batch_norm).to(memory_format=torch.channels_last)


def build_snn(args, data, state=None):
    """The spiking network that the flags ask for, for this data and for the weights of a checkpoint's `state`.

    Raises UserError where they do not go together.
    """
    return _build(self_models.VGG_SNN_STDB, self_models.RESNET_SNN_STDB, args, data,
                  activation=args.activation, timesteps=args.timesteps, leak=args.leak, backend=args.backend,
                  encoding=args.encoding, delay=args.delay, initial_potential=args.initial_potential,
                  learn_threshold=args.learn_threshold, learn_leak=args.learn_leak,
                  bias=state is not None and checkpoint.has_biases(state),
                  # None where all thresholds are the checkpoint's
                  default_threshold=args.default_threshold or 1.0, alpha=args.alpha, beta=args.beta, gamma=args.gamma)


def _build(vgg, resnet, args, data, **options):
    options |= {'labels': len(data.classes), 'dropout': args.dropout, 'dataset': args.dataset,
                'input_shape': data.input_shape}
    try:
        if args.architecture.startswith('VGG'):
            return vgg(args.architecture, kernel_size=args.kernel_size, **options)
        return resnet(args.architecture, **options)
    except ValueError as error:
        raise UserError(str(error)) from error


def too_few_steps(model):
    """What to say where no spike can reach the output of a spiking network, else None."""
    if model.timesteps > model.latency:
        return None
    return (f'--timesteps {model.timesteps}: each of the {model.depth} spiking layers delays by one step, so no spike '
            f'reaches the output in fewer than {model.depth + 1}, and nothing is learned; take more')


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


def open_snn(args):
    """(name, Paths, lock, the checkpoint to resume from or None, what that or --pretrained_snn holds, lines to say).

    Where no flag says otherwise the checkpoint says the network, and so the run's name. One of the run's own is read
    (again) once the name is locked: another run of that name may have gone on until then. Raises UserError.
    """
    source = args.resume if args.resume not in ('auto', 'last') else None
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
        'architecture', 'dataset', 'kernel_size', 'image_size', 'alpha', 'beta', 'gamma', 'output', *options.FORMER)
        if type(saved.get(key)) is type(getattr(args, key))}
    settings |= checkpoint.snn_settings(state, path)
    thresholds = settings.pop('thresholds')  # no flag
    settings.pop('leaks', None)
    fixed = list(options.CONVERSION)
    if resumed:
        fixed = ['pretrained_ann', 'pretrained_snn']
        if saved.get('pretrained_ann') or saved.get('pretrained_snn'):  # else flags of a conversion are none of it
            fixed += options.CONVERSION
    # the published ResNets' files may have the balanced thresholds only
    if 'default_threshold' in saved or len(thresholds) > 3:
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
