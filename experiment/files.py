"""Where a run keeps its files, and writing them so that a fault costs nothing. It needs no torch."""
import contextlib
import os
import re
import secrets
import socket
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from experiment import UserError
from experiment.options import is_own_network


def identifier(kind, args):
    """The name of a run: --name, else e.g. 'ann_vgg16_cifar10' or, with the time steps, 'snn_vgg16_cifar10_100'."""
    if args.name:
        return args.name
    steps = f'_{args.timesteps}' if kind == 'snn' else ''
    architecture = args.architecture
    if is_own_network(architecture):  # nets/small.py:Net is small_net
        file, _, name = architecture.rpartition(':')
        architecture = Path(file).stem if Path(file).stem.lower() == name.lower() else f'{Path(file).stem}_{name}'
    return f'{kind}_{architecture}_{args.dataset}'.lower() + steps


class Paths(NamedTuple):
    """Where a run keeps the checkpoint of its best epoch, the one to resume from, and a line of numbers an epoch."""
    best: Path
    last: Path
    metrics: Path

    @property
    def events(self) -> Path:
        """The folder of what --tensorboard writes."""
        return self.metrics.with_suffix('')


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


def lock(files):
    """Take the run's name for as long as the returned file is open; UserError where another process has it.

    Also deletes the half-written files of killed runs of this name.

    A lock of the operating system, which goes with the process however that ends: nothing stale is left. The file
    itself stays, as deleting it would let two runs lock two files of one name. Where there are no such locks, as on
    Windows or some network file systems, nothing is locked and None returned.
    """
    if fcntl is None:
        return None
    path = files.best.with_name(f'.{files.best.stem}.lock')
    file = open(path, 'a+')  # not 'w', which would empty the file before it is known whose it is
    try:
        # lockf, not flock: it works across NFS, and a worker process that outlives its run does not inherit it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().strip() or 'which has only just started'
        file.close()
        raise UserError(f'{files.best}: another run writes it ({holder}); let it end, or give this one '
                        'another name with --name') from error
    except OSError:
        file.close()
        return None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}, since {time.strftime("%Y-%m-%d %H:%M:%S")}\n')
    file.flush()
    for path in files:
        _delete_half_written(path)
    return file


def set_aside(files, say):
    """Keep the files that an earlier run of the same name left, as previous.N.<name>.

    A run that is killed in between has the next one go on: what is still there gets the same number. The checkpoint to
    resume from goes first, as without it that next run starts anew. Where one cannot be renamed (an OSError), all keep
    their names.
    """
    def kept(path):
        return path.with_name(f'previous.{number}.{path.name}')

    there, number, moved = [path for path in files if path.exists()], 1, []
    while any(kept(path).exists() for path in there):
        number += 1
    try:
        for path in sorted(there, key=lambda path: not path.name.endswith('.last.pth')):
            os.replace(path, kept(path))
            moved.append(path)
    except OSError:
        for path in moved:
            os.replace(kept(path), path)
        raise
    for path in there:
        say(f'{path} is of an earlier run: kept as {kept(path).name}')


def write_atomically(path, write):
    """Call write(file) on a new file that takes the place of `path` only when it is whole. Raises UserError.

    Also deletes what killed processes had half written of `path`.
    """
    with replacing(path, write):
        pass


@contextlib.contextmanager
def replacing(path, write):
    """write_atomically(), with a block that runs when the new file is whole and has not taken its place yet."""
    try:
        _delete_half_written(path)
        temporary, file = _open_temporary(path)
        try:
            with file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                yield
                if fcntl:  # while it is locked
                    os.replace(temporary, path)
            if not fcntl:  # Windows moves no open file
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        cause = error
        while cause and not isinstance(cause, OSError):  # torch.save makes a RuntimeError of a full disk
            cause = cause.__context__
        reason = getattr(cause, 'strerror', None) or str(error).splitlines()[0]
        raise UserError(f'{path}: cannot be written ({reason}); what stood there before is untouched') from error


def _open_temporary(path):
    """(the name of a new file beside `path`, the file), locked while it is open; see _delete_half_written()."""
    while True:
        # processes of two hosts may have the same number
        name = path.with_name(f'{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp')
        file = open(name, 'xb')
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:  # no locks here
            pass
        if name.exists():  # else another process took it for a leftover before it was locked
            return name, file
        file.close()


def _delete_half_written(path):
    """Delete what killed processes had half written of `path`: what nobody has locked or, without locks, for a day."""
    for part in path.parent.glob('*.tmp'):
        # as _open_temporary() calls them; former versions did without the second number
        if not re.fullmatch(re.escape(path.name) + r'\.\d+(-[0-9a-f]{8})?\.tmp', part.name):
            continue
        try:
            with open(part, 'r+b') as file:
                try:
                    if not fcntl:
                        raise OSError
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    continue
                except OSError:
                    if time.time() - part.stat().st_mtime < 24 * 3600:
                        continue
                part.unlink()  # before the lock is given up
        except OSError:  # gone meanwhile, or not ours
            continue
