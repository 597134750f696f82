"""What the flags of a run ask for: its device, data and networks."""
import shlex
import sys
import warnings
from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING

import torch

import self_models
from experiment import UserError, checkpoint, distributed, options, own
from experiment import data as data_sets
from experiment.data import Data
from self_models import INPUT_SHAPES, cpu
from self_models.conversion import has_biases
from self_models.spiking_network import SpikingNetwork
from self_models.surrogate import FLAGS

if TYPE_CHECKING:
    from experiment.start import Start

FOR_BOUNDS = 128  # training images that the bounds of QCFS are fitted to


def set_up_device(args: Namespace) -> torch.device:
    """The torch.device that --gpu and --devices ask for. Raises UserError if it is not there.

    If torchrun started several processes, they meet here, and each has its own device.

    To be called before torch computes anything: threads copy the setting below when they start.
    """
    # Weight decay shrinks the weights of dead units into denormal numbers, on which a CPU is many times slower.
    torch.set_flush_denormal(True)
    cpu.keep_memory()
    device = _device(args)
    if device.type == 'cuda':
        torch.cuda.set_device(device)  # Triton starts its kernels on the current device, wherever the tensors are
    if distributed.wanted():
        distributed.start(device)
    return device


def _device(args):
    wanted = torch.cuda.is_available() if args.gpu is None else args.gpu
    if args.gpu is False:
        return torch.device('cpu')
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


def notes(args: Namespace, device: torch.device, model: torch.nn.Module) -> list[str]:
    """Lines to say about the flags and the network on this device."""
    said = []
    if 'devices' in args.given and device.type == 'cpu':
        said.append('--devices has no effect here: it belongs to CUDA')
    normed = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if distributed.wanted() and normed and not distributed.synchronises(device):
        said.append("batch norm is not synchronised on CPUs: each process takes the statistics of its own part of a "
                    "batch, and the main one's running statistics are kept")
    slow = torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if args.amp and device.type == 'cpu' and slow:
        said.append('--amp: this processor has no instructions for bfloat16 and computes it many times slower than '
                    'float32; leave the flag out')
    return said


def input_shape(args: Namespace) -> tuple[int, int, int]:
    """(C, H, W) of the images of --dataset."""
    return (3, args.image_size, args.image_size) if args.dataset == 'FOLDER' else INPUT_SHAPES[args.dataset]


def load_data(args: Namespace) -> Data:
    """The data set that the flags ask for, as experiment.data.Data. Raises UserError."""
    with distributed.main_first():
        sampling = data_sets.Sampling(args.train_samples, args.test_samples, args.seed, args.validation_fraction,
                                      getattr(args, 'split_seed', None))
        return data_sets.load(args.dataset, args.data_dir, args.image_size, sampling, args.num_workers, args.cutout,
                              args.crop)


def build_ann(args: Namespace, data: Data, activation: str, levels: int, batch_norm: bool,
              bounds: str) -> torch.nn.Module:
    """The ANN that the flags ask for, for this data. Raises UserError if the two do not go together, and for
    your own network if it cannot become a spiking one."""
    if options.is_own_network(args.architecture):
        model = own.build(args.architecture, len(data.classes), data.input_shape)
        try:
            with warnings.catch_warnings(action='ignore'):  # its notes are said later, with the run's
                return self_models.quantize(model, levels, bounds == 'channel') if activation == 'QCFS' else model
        except ValueError as error:
            raise UserError(f'--architecture {args.architecture}: {error}') from error
    # in bfloat16 a training step takes 0.6 of the time in this layout; in float32 it makes no difference
    return _build(self_models.VGG, self_models.ResNet, args, data, activation=activation, levels=levels,
                  batch_norm=batch_norm, bounds=bounds).to(memory_format=torch.channels_last)


def build_snn(args: Namespace, data: Data, state: dict | None = None) -> SpikingNetwork:
    """The spiking network that the flags ask for, for this data and for the weights of a checkpoint's `state`.

    Raises UserError if they do not go together.
    """
    neurons = {flag: getattr(args, flag) for flag in (
        'activation', 'timesteps', 'leak', 'backend', 'encoding', 'delay', 'initial_potential', 'learn_threshold',
        'learn_leak', *FLAGS)}
    neurons['default_threshold'] = args.default_threshold or 1.0  # None if all thresholds come from the checkpoint
    if options.is_own_network(args.architecture) or args.keep_batch_norm:
        ann = build_ann(args, data, **{**checkpoint.ann_layers(state), 'levels': 1})
        try:
            with warnings.catch_warnings(action='ignore'):
                if state and any(isinstance(module, self_models.QCFS) for module in ann.modules()):
                    ann = self_models.quantize(ann, 1)  # an SNN's file does not say that its other ReLUs became QCFS
                return self_models.spiking(ann, **neurons)
        except ValueError as error:
            raise UserError(f'--architecture {args.architecture}: {error}') from error
    scale = state is not None and checkpoint.has_scales(state) or args.balance_blocks
    resnet = partial(self_models.RESNET_SNN_STDB, scale=scale)
    return _build(self_models.VGG_SNN_STDB, resnet, args, data, **neurons,
                  bias=state is not None and checkpoint.has_biases(state))


def _build(vgg, resnet, args, data, **options):
    options |= {'labels': len(data.classes), 'dropout': args.dropout, 'dataset': args.dataset,
                'input_shape': data.input_shape}
    try:
        if args.architecture.startswith('VGG'):
            return vgg(args.architecture, kernel_size=args.kernel_size, **options)
        return resnet(args.architecture, **options)
    except ValueError as error:
        raise UserError(str(error)) from error


def load_ann(model: torch.nn.Module, start: 'Start', data: Data, args: Namespace) -> str:
    """Load the weights that a training of an ANN starts from; returns a line to say. Raises UserError.

    If they were trained with ReLU and the model has QCFS, its bounds are fitted to training images.
    """
    state, line = start.state, f'weights from {start.path}'
    quantizes = args.activation != checkpoint.ann_layers(state)['activation']
    if quantizes:
        new = {f'{name}.bound': module.bound for name, module in model.named_modules(remove_duplicate=False)
               if isinstance(module, self_models.QCFS)}  # some have several names
        state = {**state, 'state_dict': {**state['state_dict'], **new}}
    may_differ = () if args.test_only else checkpoint.last_layer(model)
    if last := checkpoint.load_weights(model, state, start.path, may_differ):
        line += f'; its {" and ".join(last)} is for other classes and starts from new weights'
    if quantizes:
        some = data.train.sample(FOR_BOUNDS, args.seed, like=data.test)
        images, _ = some.batch(list(range(len(some))))
        self_models.fit_bounds(model, images.to(next(model.parameters()).device))
        line += f'; QCFS takes the place of its ReLU, with bounds fitted to {len(images)} training images'
    return line


def check_qcfs(model: torch.nn.Module, args: Namespace) -> None:
    """Raise UserError if the code of your own network has QCFS of other levels or bounds than the flags say."""
    found = [module for module in model.modules() if isinstance(module, self_models.QCFS)]
    wanted = args.levels if args.activation == 'QCFS' else None
    for levels in {module.levels for module in found} - {wanted}:
        raise UserError(f'--architecture {args.architecture}: its code has QCFS of {levels} levels: say so with '
                        f'--activation QCFS --levels {levels}; all QCFS need the same')
    if args.bounds == 'channel' and not all(module.bound.dim() for module in found):
        raise UserError(f'--bounds channel: the code of {args.architecture} has QCFS of its own, with a bound a layer; '
                        'leave the flag out')


def check_steps(model: SpikingNetwork, args: Namespace) -> list[str]:
    """Lines to say about too few time steps; UserError if several processes were to train."""
    silent = too_few_steps(model)
    if silent and distributed.wanted() and not args.test_only:  # DistributedDataParallel needs a gradient
        raise UserError(silent)
    return [silent] if silent else []


def too_few_steps(model: SpikingNetwork) -> str | None:
    """What to say if a spiking network has too few time steps for its images to reach the output, else None."""
    if model.timesteps > model.output_delay:
        return None
    what = 'nothing of the images' if has_biases(model) else 'no spike'
    return (f'--timesteps {model.timesteps}: on the shortest way each of {model.depth} spiking layers delays by one '
            f'step (none with --delay 0), so {what} reaches the output in fewer than {model.depth + 1}, and nothing '
            'is learned; take more')
