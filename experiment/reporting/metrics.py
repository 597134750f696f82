"""The numbers of a run, for programs: logs/{ann,snn}/<identifier>.jsonl, and TensorBoard."""
import argparse
import functools
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from experiment import distributed, importing, log
from experiment.files import write_atomically


def write(path: Path, args: argparse.Namespace, history: list[dict], arguments: dict | None = None) -> None:
    """Write a metrics file: a line about the run (of a resumed one, about its last part), then a line an epoch.

    arguments: what the line says of the flags, in place of `args`. Raises UserError.

    history: dicts of numbers: epoch, learning_rate, train_loss, train_accuracy, test_loss, test_accuracy (with
    --validation_fraction validation_..., and test_... of the best epoch only), best_accuracy, seconds. Accuracies are
    fractions. Epoch 0 is an SNN before fine-tuning. It has also curve, {time steps: accuracy}, and, if converted,
    ann_accuracy, ann_accuracy_on (test or validation) and scaling_factor; if that was chosen, scan, {factor: accuracy},
    and scanned_on (train or validation); with --output fitted output_scale, its factor.
    """
    run = {'command': log.command(), 'args': arguments or log.arguments(args), 'commit': COMMIT,
           'torch': torch.__version__, 'machine': machine(args),
           'processes': distributed.process().world_size}
    text = ''.join(json.dumps(line) + '\n' for line in [run, *history])
    write_atomically(path, lambda file: file.write(text.encode()))


def holds(path: Path, history: list[dict]) -> bool:
    """Whether a metrics file is there, its lines are these epochs', and its run asks for no more of them."""
    try:
        run, *epochs = map(json.loads, path.read_text(encoding='utf-8').splitlines())
        return epochs == json.loads(json.dumps(history)) and run['args']['epochs'] <= epochs[-1]['epoch']
    except (OSError, ValueError, LookupError, TypeError):
        return False


def commit() -> str | None:
    """The git commit of this code, with a '+' if files differ from it; None outside a checkout of its own."""
    root = Path(__file__).resolve().parents[2]
    if not (root / '.git').exists():
        return None
    # not the repository that a variable names, as in a git hook, nor one around the project's folder
    own = {name: value for name, value in os.environ.items() if not re.match('GIT_(?!CONFIG)', name)}
    try:
        done = subprocess.run(['git', 'describe', '--always', '--abbrev=12', '--dirty=+', '--exclude=*'], cwd=root,
                              env={**own, 'GIT_CEILING_DIRECTORIES': str(root.parent)}, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


COMMIT = commit()  # read at the start, as files may change during the run


def machine(args: argparse.Namespace) -> str:
    """What a run computes on, in words."""
    if torch.cuda.is_available() and args.gpu is not False:
        return torch.cuda.get_device_name()
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        processor = next(line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    # a processor's instructions say more about its speed than its name does
    return f'{torch.get_num_threads()} threads of {processor}, {torch.backends.cpu.get_cpu_capability()}'


def open_board(folder: Path, wanted: bool) -> Callable | None:
    """A function that gives the SummaryWriter in a folder, if --tensorboard is given, else None. Raises UserError.

    It opens its file on the first call, since an earlier run's folder may have to be renamed first.
    """
    if not wanted or not distributed.is_main():
        return None
    with importing('tensorboard', '--tensorboard'):
        from torch.utils.tensorboard import SummaryWriter
    return functools.cache(functools.partial(SummaryWriter, folder))


def to_board(board: Callable, entry: dict) -> None:
    """Add an epoch's numbers. board: of open_board()."""
    writer = board()
    for key, value in entry.items():
        if key != 'epoch' and isinstance(value, (int, float)):
            writer.add_scalar(key, value, entry['epoch'])
    writer.flush()
