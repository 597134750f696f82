"""Where a run keeps its files, and writing them so that a fault costs nothing. It needs no torch."""
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from experiment import UserError


def identifier(kind, args):
    """The name of a run: --name, else e.g. 'ann_vgg16_cifar10' or, with the time steps, 'snn_vgg16_cifar10_100'."""
    if args.name:
        return args.name
    steps = f'_{args.timesteps}' if kind == 'snn' else ''
    return f'{kind}_{args.architecture}_{args.dataset}'.lower() + steps


class Paths(NamedTuple):
    """Where a run keeps the checkpoint of its best epoch, the one to resume from, and a line of numbers an epoch."""
    best: Path
    last: Path
    metrics: Path


def paths(kind, name):
    """The Paths of the run `name`."""
    folder = Path('trained_models', kind)
    return Paths(folder / f'{name}.pth', folder / f'{name}.last.pth', Path('logs', kind, f'{name}.jsonl'))


def is_own(source, files):
    """Whether the checkpoint `source` that a run resumes from is that run's own last one."""
    return source is not None and os.path.realpath(source) == os.path.realpath(files.last)


def check_writable(*folders):
    """Make folders and raise UserError, before hours of work, where files cannot be written there."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f'{folder}: cannot write there ({error.strerror}); '
                            'make the folder writable or name another') from error


def set_aside(files, say):
    """Keep the files that an earlier run of the same name left, as previous.N.<name>."""
    number = 1
    while any(path.with_name(f'previous.{number}.{path.name}').exists() for path in files):
        number += 1
    for path in files:
        if path.exists():
            kept = path.with_name(f'previous.{number}.{path.name}')
            os.replace(path, kept)
            say(f'{path} is of an earlier run: kept as {kept.name}')


def write_atomically(path, write):
    """Call write(file) on a new file that takes the place of `path` only when it is whole. Raises UserError."""
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        try:
            with open(temporary, 'wb') as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        reason = getattr(error, 'strerror', None) or str(error).splitlines()[0]
        raise UserError(f'{path}: cannot be written ({reason}); what stood there before is untouched') from error
