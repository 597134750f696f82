"""What a run says: to the terminal, or with --log to logs/{ann,snn}/<identifier>.log."""
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from experiment import distributed

COLUMNS = {  # of an epoch's entry in the metrics: heading, width, how the value is written
    'epoch': ('epoch', 7, '{}'), 'learning_rate': ('lr', 9, '{:.2g}'),
    'train_loss': ('train loss', 12, '{:.4f}'), 'train_accuracy': ('train acc', 11, '{:.2%}'),
    'validation_loss': ('val loss', 11, '{:.4f}'), 'validation_accuracy': ('val acc', 10, '{:.2%}'),
    'test_loss': ('test loss', 11, '{:.4f}'), 'test_accuracy': ('test acc', 10, '{:.2%}'),
    'best_accuracy': ('best', 9, '{:.2%}'), 'seconds': ('time', 8, '{:.0f}s')}


def open_log(kind: str, identifier: str, to_file: bool) -> Callable[[str], None]:
    """A function say(text) that prints a line or, with `to_file`, appends it to the log file. Raises OSError.

    Of several processes the main one prints.
    """
    if not distributed.is_main():
        return lambda text: None
    if not to_file:
        return lambda text: print(text, flush=True)
    path = Path('logs', kind, f'{identifier}.log')
    path.parent.mkdir(parents=True, exist_ok=True)
    # line by line, for `tail -f`; file names that are not valid text are escaped as in the terminal
    file = open(path, 'a', encoding='utf-8', errors='backslashreplace', buffering=1)
    print(f'this run writes to {path}', flush=True)
    return lambda text: print(text, file=file)


def header(args: Namespace, model: torch.nn.Module, device: torch.device) -> str:
    """The lines that open a log: the command, every argument, the network, the machine."""
    count, world_size = sum(p.numel() for p in model.parameters()), distributed.process().world_size
    return '\n'.join([
        f'command: {command()}',
        *(f'  {key}: {value}' for key, value in arguments(args).items()),
        str(model),
        f'{count:,} weights; {device}, torch {torch.__version__}, {torch.get_num_threads()} threads'
        + (f', {world_size} processes, each with batches of {args.batch_size}' if world_size > 1 else ''), ''])


def command() -> str:
    """The command of this run, quoted for a shell."""
    return shlex.join(['python', *sys.argv])


def arguments(args: Namespace) -> dict:
    """The arguments of a run, {flag: value}."""
    return {key: value for key, value in vars(args).items() if key not in ('given', 'defaults')}


def heading(selection: str) -> str:
    """The heading of the lines of epoch_line(). selection: 'test' or 'validation', on which epochs are compared."""
    other = 'test' if selection == 'validation' else 'validation'
    return ''.join(f'{name:>{width}}' for key, (name, width, _) in COLUMNS.items() if not key.startswith(other))


def epoch_line(entry: dict[str, float]) -> str:
    """One line of the table: an epoch's entry in the metrics."""
    return ''.join(f'{how.format(entry[key]):>{width}}' for key, (_, width, how) in COLUMNS.items() if key in entry)
