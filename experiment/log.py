"""What a run says: to the terminal, or with --log to logs/{ann,snn}/<identifier>.log."""
import sys
from pathlib import Path

import torch

COLUMNS = [  # heading, width, how the value is written
    ('epoch', 7, '{}'), ('lr', 9, '{:.2g}'), ('train loss', 12, '{:.4f}'), ('train acc', 11, '{:.2%}'),
    ('test loss', 11, '{:.4f}'), ('test acc', 10, '{:.2%}'), ('best', 9, '{:.2%}'), ('time', 8, '{:.0f}s')]


def open_log(kind, identifier, to_file):
    """A function say(text) that prints a line, to the end of the log file where `to_file`. Raises OSError."""
    if not to_file:
        return lambda text: print(text, flush=True)
    path = Path('logs', kind, f'{identifier}.log')
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, 'a', encoding='utf-8', buffering=1)  # after what is there; line by line, for `tail -f`
    print(f'this run writes to {path}', flush=True)
    return lambda text: print(text, file=file)


def header(args, model, device):
    """The lines that open a log: the command, every argument, the network, the machine."""
    count = sum(p.numel() for p in model.parameters())
    return '\n'.join([
        f'command: python {" ".join(sys.argv)}',
        *(f'  {key}: {value}' for key, value in arguments(args).items()),
        str(model),
        f'{count:,} weights; {device}, torch {torch.__version__}, {torch.get_num_threads()} threads', ''])


def arguments(args):
    """Every argument of a run, as numbers and texts."""
    return {key: value for key, value in vars(args).items() if key != 'given'}


def heading():
    return ''.join(f'{name:>{width}}' for name, width, _ in COLUMNS)


def epoch_line(*values):
    """One line of the table whose heading is heading()."""
    return ''.join(f'{how.format(value):>{width}}' for value, (_, width, how) in zip(values, COLUMNS, strict=True))
