"""The files of a run, and how to write them so that a fault loses nothing. It needs no torch."""
import contextlib
import errno
import os
import secrets
import socket
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from experiment import UserError
from experiment.options import is_own_network

# numbers of errors of reading a file that say nothing of what it holds
PASSING = {errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOENT, errno.ESTALE, errno.ETIMEDOUT}


class Unreadable(UserError):
    """A file that cannot be read now, which says nothing of what it holds."""


def identifier(kind: str, args: Namespace) -> str:
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
    """A run's checkpoint of the best epoch, its last checkpoint, to resume from, and its metrics, a line an epoch."""
    best: Path
    last: Path
    metrics: Path

    @property
    def folded(self) -> Path:
        """The best epoch with its batch norm folded, which --keep_batch_norm writes."""
        return self.best.with_suffix('.folded.pth')

    @property
    def events(self) -> Path:
        """The folder that --tensorboard writes."""
        return self.metrics.with_suffix('')


def paths(kind: str, name: str) -> Paths:
    """The Paths of the run `name`."""
    folder = Path('trained_models', kind)
    return Paths(folder / f'{name}.pth', folder / f'{name}.last.pth', Path('logs', kind, f'{name}.jsonl'))


def is_own(source: Path | str, files: Paths) -> bool:
    """Whether the checkpoint `source` is the run's own last checkpoint."""
    return os.path.realpath(source) == os.path.realpath(files.last)


def probe(folder: Path | str) -> None:
    """Raise OSError if no file can be written in a folder, as a full disk refuses its first byte."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b' ')


def check_writable(*folders: Path) -> None:
    """Make folders. Raises UserError, before hours of work, if files cannot be written there."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe(folder)
        except OSError as error:
            raise UserError(f'{folder}: cannot write there ({error.strerror}); '
                            'make the folder writable or name another') from error


def lock(files: Paths) -> IO | None:
    """Lock the run's name as long as the returned file is open. Raises UserError if another process has the lock.

    Also deletes what a killed run of this name had half written. The operating system removes the lock with the
    process. The file stays: deleting it would let two runs lock two files of one name. Without such locks, as on
    Windows or some network file systems, nothing is locked and None is returned.
    """
    file = open(files.best.with_name(f'.{files.best.stem}.lock'), 'a+')  # not 'w': it may be another run's
    try:
        if not _lock(file, wait=False):
            file.close()
            return None
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().strip() or 'just started'
        file.close()
        raise UserError(f'{files.best}: another run writes it ({holder}); let it end, or give this run '
                        'another name with --name') from error
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}, since {time.strftime("%Y-%m-%d %H:%M:%S")}\n')
    file.flush()
    for path in files:
        _temporary(path).unlink(missing_ok=True)
    return file


def _lock(file, wait):
    """Lock an open file; returns whether there are locks here. Without `wait`: OSError if another process has it."""
    try:
        # lockf, not flock: it works across NFS, and a worker process that outlives its run does not inherit it
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except (BlockingIOError, PermissionError):
        raise
    except (AttributeError, OSError):  # no fcntl, or no locks in this folder
        return False


@contextlib.contextmanager
def one_at_a_time(folder: Path, waiting: str | None = None) -> Iterator[None]:
    """Keep other processes out of such a block for the same folder; nothing does if the folder cannot be written.
    waiting: what to say, if anything, before a wait."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(open(folder / '.lock', 'a'))
            try:
                _lock(file, wait=False)
            except (BlockingIOError, PermissionError):
                if waiting:
                    print(waiting, file=sys.stderr)
                _lock(file, wait=True)
        yield


def set_aside(files: Iterable[Path], say: Callable[[str], object]) -> None:
    """Rename the files of an earlier run of the same name to previous.N.<name>.

    The checkpoint to resume from is the first. After a kill the next run then starts from the beginning, and renames
    the rest with the same number. If one cannot be renamed (an OSError), all keep their names.
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


def write_atomically(path: Path, write: Callable[[IO], object]) -> None:
    """Call write(file) on a new file, which replaces `path` once it is whole. Raises UserError."""
    with replacing(path, write):
        pass


@contextlib.contextmanager
def replacing(path: Path, write: Callable[[IO], object]) -> Iterator[None]:
    """write_atomically(), with a block that runs when the new file is whole, before it replaces `path`."""
    try:
        file, temporary = _open_temporary(path)
        with file:  # it keeps its lock until it has replaced `path`
            try:
                with contextlib.nullcontext() if fcntl else file:  # Windows neither moves nor deletes an open file
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                    yield
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except (OSError, RuntimeError) as error:
        cause = error
        while cause and not isinstance(cause, (OSError, KeyboardInterrupt)):  # torch.save makes a RuntimeError of both
            cause = cause.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        reason = getattr(cause, 'strerror', None) or (str(error) or repr(error)).splitlines()[0]
        raise UserError(f'{path}: cannot be written ({reason}); the file that was there is untouched') from error


def _temporary(path):
    return path.with_name(f'{path.name}.tmp')


def _open_temporary(path):
    """(an empty file beside `path`, its name) that no other process writes.

    The name is always the same: what a killed process left is overwritten, and a process that writes the file is waited
    for. Without locks, the name is unique.
    """
    name = _temporary(path)
    while fcntl:
        # not truncated, as another process may be writing it
        file = open(name, 'wb', opener=lambda path, flags: os.open(path, flags & ~os.O_TRUNC, 0o666))
        if not _lock(file, wait=True):
            if not os.fstat(file.fileno()).st_size:  # this call has made it
                name.unlink(missing_ok=True)
            file.close()
            break
        with contextlib.suppress(FileNotFoundError):
            if os.path.samefile(file.fileno(), name):
                file.truncate(0)
                return file, name
        file.close()  # it was another process's, which has replaced `path` with it
    name = path.with_name(f'{path.name}.{secrets.token_hex(8)}.tmp')
    return open(name, 'xb'), name
