"""What befalls a training run from outside: a second run of its name, a kill, a full disk."""
import errno
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import ann
import snn
from conftest import ROOT, SMALL, SPIKING, fails, load, run
from experiment import UserError, data, files, log, options

RUNS = [(ann, SMALL, 'ann_resnet6_digits'), (snn, SPIKING, 'snn_resnet6_digits_8')]
pytestmark = pytest.mark.usefixtures('in_an_empty_folder')


@pytest.fixture
def training(tmp_path):
    """Start a run and return it as soon as it has ended its first epoch; it is killed when the test ends."""
    processes = []

    def start(script, *flags):
        process = subprocess.Popen([sys.executable, ROOT / script, *flags], cwd=tmp_path, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(process)
        for line in process.stdout:
            if re.match(r' +1 ', line):
                return process
        raise AssertionError(process.stderr.read())

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


# -- two runs of one name ---------------------------------------------------------------------------------------------

STOPS_AFTER_AN_EPOCH = """
import os, signal, {0}
from experiment import log, options

line = log.epoch_line

def stop(entry):
    if entry['epoch'] == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return line(entry)

log.epoch_line = stop
options.run({0}.main, {0}.get_args_parser().parse_args(), '{0}.py')
"""


@pytest.mark.parametrize('module, flags, name', RUNS)
def test_a_second_run_of_the_same_name_is_refused(called, tmp_path, module, flags, name):
    script = f'{module.__name__}.py'
    with subprocess.Popen(
            [sys.executable, '-c', STOPS_AFTER_AN_EPOCH.format(module.__name__), *flags, '--epochs', '2'], cwd=tmp_path,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': str(ROOT)}
            ) as first:
        try:
            os.waitpid(first.pid, os.WUNTRACED)  # it is there, and changes nothing, for as long as the second takes
            before = contents(tmp_path)
            second = called(module, *flags, '--epochs', 1, '--resume', 'auto', '--log')
            assert second.returncode == 1 and second.stderr.count('\n') == 1
            for words in (f'{script}: error: ', f'{name}.pth', f'process {first.pid} on ', 'since 20', '--name'):
                assert words in second.stderr
            # one that writes no checkpoint needs no name of its own
            tested = called(module, *flags, '--test_only', '--resume')
            assert tested.returncode == 0, tested.stderr
            assert contents(tmp_path) == before
            first.send_signal(signal.SIGCONT)
            _, errors = first.communicate(timeout=120)
            assert (first.returncode, errors) == (0, '')
        finally:
            first.kill()
    folder = tmp_path / 'trained_models' / module.__name__
    assert load(folder / f'{name}.last.pth')['epoch'] == 2
    assert sorted(path.name for path in folder.glob('*.pth')) == [f'{name}.last.pth', f'{name}.pth']


def test_a_killed_run_leaves_no_lock(training, called):
    first = training('ann.py', *SMALL, '--epochs', '5000')
    other = called(ann, *SMALL, '--epochs', 1, '--name', 'other')
    assert other.returncode == 0, other.stderr
    first.kill()
    first.wait()
    after = called(ann, *SMALL, '--epochs', 1)
    assert after.returncode == 0, after.stderr


def test_ctrl_c_leaves_a_whole_checkpoint(tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / 'ann.py', *SMALL, '--epochs', '5000'], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               # a shell starts background jobs with the signal ignored, these tests perhaps too
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for line in process.stdout:
        if re.match(r' +2 ', line):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert 'stopped; the last checkpoint is whole' in errors and 'Traceback' not in errors
    assert load(tmp_path / 'trained_models/ann/ann_resnet6_digits.last.pth')['epoch'] >= 2


@pytest.mark.parametrize('missing', ['module', 'support'])
def test_without_locks_runs_run(tmp_path, monkeypatch, missing):
    def lockf(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    if missing == 'module':
        monkeypatch.setattr(files, 'fcntl', None)
    else:
        monkeypatch.setattr(files.fcntl, 'lockf', lockf)
    assert files.lock(files.Paths(tmp_path / 'x.pth', tmp_path / 'x.last.pth', tmp_path / 'x.jsonl')) is None
    monkeypatch.chdir(tmp_path)
    run(ann, *SMALL, '--epochs', 1, '--name', 'k')
    assert {path.name for path in Path('trained_models/ann').iterdir()} - {'.k.lock'} == {'k.pth', 'k.last.pth'}
    assert [path.name for path in Path('logs/ann').iterdir()] == ['k.jsonl']


# -- processes that load data -----------------------------------------------------------------------------------------

DECODES_IN_EVERY_EPOCH = """
import ann
from experiment import data, options
data.IN_MEMORY_BYTES = 0
options.run(ann.main, ann.get_args_parser().parse_args(), 'ann.py')
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='shared memory counts as files there')
def test_a_batch_that_cannot_be_handed_over_ends_the_run(tmp_path):
    for part in ('train', 'test'):
        for number in range(64):
            path = tmp_path / part / f'class{number % 2}' / f'{number}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (8, 8)).save(path)
    done = subprocess.run(  # a batch of 3 MB, and room for 1 MB, as in a container with little shared memory
        [sys.executable, '-c', DECODES_IN_EVERY_EPOCH, '-a', 'RESNET6', '--dataset', 'FOLDER', '--data_dir', '.',
         '--image_size', '64', '--no-gpu'], cwd=tmp_path, text=True, capture_output=True, timeout=120,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)))
    assert done.returncode == 1
    assert re.search('^ann.py: error: a process that loads data died.*--num_workers.*\n$', done.stderr), done.stderr


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='there is no /proc to find those processes in')
@pytest.mark.parametrize('ended, status, said', [
    ('a worker', 1, '^ann.py: error: a process that loads data died.*--num_workers.*\n$'),
    ('all at once', 130, '^\nann.py: stopped; .*\n$'), ('workers first', 130, '^\nann.py: stopped; .*\n$')])
def test_a_process_that_loads_data_ends_wherever_the_training_is(tmp_path, ended, status, said):
    for path in ('train/a', 'train/b', 'test/a', 'test/b'):
        (tmp_path / path).mkdir(parents=True)
        Image.new('RGB', (16, 16)).save(tmp_path / path / '0.png')
        for number in range(1, 500 if 'train' in path else 2):
            (tmp_path / path / f'{number}.png').symlink_to('0.png')
    flags = ['-a', 'RESNET6', '--dataset', 'FOLDER', '--data_dir', '.', '--image_size', '16', '--batch_size', '2',
             '--no-gpu']
    process = subprocess.Popen([sys.executable, '-c', DECODES_IN_EVERY_EPOCH, *flags], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                               env={**os.environ, 'PYTHONPATH': str(ROOT)})
    try:
        next(line for line in process.stdout if line.startswith('the best epoch is chosen'))
        children, workers = Path(f'/proc/{process.pid}/task/{process.pid}/children'), []
        while len(workers) < 2 and process.poll() is None:
            workers = children.read_text().split()
        time.sleep(0.3)  # it trains
        if ended == 'all at once':
            os.killpg(process.pid, signal.SIGTERM)
        else:
            os.kill(int(workers[0]), signal.SIGKILL if ended == 'a worker' else signal.SIGTERM)
        if ended == 'workers first':
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status and re.fullmatch(said, errors), errors


@pytest.mark.parametrize('words, status', [
    ('DataLoader worker (pid 7) is killed by signal: Killed. ', 1),
    ('DataLoader worker (pid 7) exited unexpectedly with exit code 1.\nDetails are lost', 1),
    ('DataLoader worker (pid(s) 7, 8) exited unexpectedly', 1),
    ('Caught RuntimeError in DataLoader worker process 0.', 'raised')])  # a bug in one
def test_what_torch_says_of_a_process_that_loads_data(words, status, monkeypatch):
    def main(args):
        raise RuntimeError(words)
    for module, name in ((signal, 'signal'), (time, 'sleep')):
        monkeypatch.setattr(module, name, lambda *_: None)
    with pytest.raises(RuntimeError if status == 'raised' else SystemExit, match='DataLoader|--num_workers'):
        options.run(main, None, 'ann.py')


@pytest.mark.parametrize('error, died', [
    (ConnectionResetError(104, 'Connection reset by peer'), True), (EOFError(), True),
    (EOFError('Caught EOFError in DataLoader worker process 0.'), False), (RuntimeError('a bug'), False)])
def test_what_a_loader_says_of_a_process_that_died(error, died, monkeypatch):
    def fetch(*_):
        raise error
    monkeypatch.setattr(time, 'sleep', lambda *_: None)
    loader = data.epoch_loader(data.load('DIGITS', '', sampling=data.Sampling(8, 8)).test, 4)
    monkeypatch.setattr(torch.utils.data.dataloader._BaseDataLoaderIter, '__next__', fetch)
    with pytest.raises(UserError if died else type(error)):
        list(loader)


def test_a_stop_that_was_lost_while_processes_started_is_one_all_the_same(monkeypatch, capsys):
    def main(args):
        try:
            options._stop(os.getpid())
        except KeyboardInterrupt:
            pass
        raise RuntimeError('DataLoader worker (pid(s) 7, 8) exited unexpectedly')
    monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        options.run(main, None, 'ann.py')
    assert ended.value.code == 130 and capsys.readouterr().err.startswith('\nann.py: stopped;')


# -- files ------------------------------------------------------------------------------------------------------------

def test_what_a_killed_run_left_half_written_goes_with_the_next(tmp_path):
    own = ['x.pth.tmp', 'x.last.pth.tmp', 'x.jsonl.tmp']
    others = ['x.pth', 'x.last.pth', 'x.jsonl', 'y.pth.tmp', 'previous.1.x.pth', 'x.pth.pth.tmp', 'a.x.pth.tmp',
              'x.pth.thresholds.json', 'x-pth.tmp', 'x.pth.123.tmp']
    for name in own + others:
        (tmp_path / name).touch()
    held = files.lock(files.Paths(tmp_path / 'x.pth', tmp_path / 'x.last.pth', tmp_path / 'x.jsonl'))
    assert {path.name for path in tmp_path.iterdir()} == {*others, '.x.lock'}
    held.close()


def all_but_locks(folder):
    return {path: content for path, content in contents(folder).items() if path.suffix != '.lock'}


def test_of_several_processes_one_at_a_time_downloads(tmp_path):
    code = ("import sys; from experiment import files; print('ready', flush=True)\n"
            "files.one_at_a_time(files.Path(sys.argv[1])).__enter__()")
    with files.one_at_a_time(tmp_path):
        other = subprocess.Popen([sys.executable, '-c', code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE)
        assert other.stdout.readline() == b'ready\n'
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.5)
    assert other.wait(60) == 0
    with files.one_at_a_time(tmp_path / '.lock' / 'no folder'):  # nor does what cannot be written hinder
        pass


@pytest.mark.parametrize('module, flags, name', RUNS)
def test_a_disk_that_fills_while_a_run_saves(called, tmp_path, module, flags, name):
    assert called(module, *flags, '--epochs', 1).returncode == 0
    before = all_but_locks(tmp_path)
    assert sorted(path.name for path in before) == [f'{name}.jsonl', f'{name}.last.pth', f'{name}.pth']

    for resume in (['--resume'], []):  # the same run, or a new one of its name
        before_it, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        # no file beyond 1 MB, a third of a checkpoint; Python ignores the signal that comes with it
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, most))
        try:
            full = called(module, *flags, '--epochs', 3, *resume)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before_it, most))
        assert full.returncode == 1 and full.stderr.count('\n') == 1, full.stderr
        for words in (f'{module.__name__}.py: error: trained_models/', name, 'cannot be written (File too large)'):
            assert words in full.stderr
        assert all_but_locks(tmp_path) == before
    again = called(module, *flags, '--epochs', 2, '--resume')  # with room again, it goes on
    assert again.returncode == 0 and 'after epoch 1' in again.stdout


class Full:
    """A file on a disk that takes so many bytes more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def test_a_disk_that_fills_at_any_byte_of_a_checkpoint_is_called_full(tmp_path):
    path, state = tmp_path / 'x.pth', {'weights': torch.zeros(999), 'name': 'x'}
    torch.save(state, path)
    before = path.read_bytes()
    for room in range(0, len(before), 97):
        with pytest.raises(UserError) as full:
            files.write_atomically(path, lambda file, room=room: torch.save(state, Full(file, room)))
        assert str(full.value) == (
            f'{path}: cannot be written (No space left on device); the file that was there is untouched')
        assert all_but_locks(tmp_path) == {path: before}


class Stopped(Full):
    """A file in the middle of which the process is told to stop."""

    def write(self, data):
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            self.room = math.inf
            raise KeyboardInterrupt
        return self.file.write(data)


def test_a_stop_at_any_byte_of_a_checkpoint_is_no_error_of_the_disk(tmp_path):
    path, state = tmp_path / 'x.pth', {'weights': torch.zeros(999), 'name': 'x'}
    torch.save(state, path)
    before = path.read_bytes()
    for room in range(0, len(before), 97):
        with pytest.raises(KeyboardInterrupt):
            files.write_atomically(path, lambda file, room=room: torch.save(state, Stopped(file, room)))
        assert all_but_locks(tmp_path) == {path: before}


@pytest.mark.parametrize('call, number', [('fsync', 1), ('fsync', 2), ('replace', 1), ('replace', 2), ('replace', 3)])
def test_a_new_run_that_cannot_save_leaves_an_earlier_one_its_name(call, number, monkeypatch, tmp_path):
    """Two checkpoints are written, then three files set aside."""
    run(ann, *SMALL, '--epochs', 1)
    before, calls, original = all_but_locks(tmp_path), [], getattr(os, call)

    def full(*names):
        calls.append(names)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return original(*names)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, full)
        fails(ann, '^trained_models/ann/.*pth: cannot be written .No space left on device.', *SMALL, '--seed', 1,
              '--epochs', 1)
    assert all_but_locks(tmp_path) == before
    run(ann, *SMALL, '--epochs', 2, '--resume')


def test_a_best_checkpoint_of_no_epoch_that_is_left_stays_while_there_is_no_room_for_another(monkeypatch, tmp_path):
    run(ann, *SMALL, '--epochs', 1, '--name', 'k')
    best, last = (tmp_path / 'trained_models/ann' / name for name in ('k.pth', 'k.last.pth'))
    torch.save({**load(last), 'epoch': 2, 'history': 2 * load(last)['history']}, last)
    torch.save({**load(best), 'accuracy': 0.99}, best)
    before = best.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'copyfileobj', lambda source, file: Full(file, 9).write(source.read()))
        fails(ann, '^trained_models/ann/k.pth: cannot be written .No space left', *SMALL, '--epochs', 3, '--name', 'k',
              '--resume')
    assert best.read_bytes() == before and not list(best.parent.glob('previous.*'))


def test_an_output_that_fails_as_an_earlier_run_is_set_aside_costs_neither(monkeypatch, tmp_path):
    run(ann, *SMALL, '--epochs', 1)
    before = all_but_locks(tmp_path)

    def full(kind, name, to_file):
        def say(text):
            if 'is of an earlier run' in text:
                raise OSError(errno.ENOSPC, 'No space left on device')
        return say

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(log, 'open_log', full)
        run(ann, *SMALL, '--seed', 1, '--epochs', 1)
    run(ann, *SMALL, '--seed', 1, '--epochs', 2, '--resume')
    for path, content in before.items():
        assert path.with_name(f'previous.1.{path.name}').read_bytes() == content


def test_a_worker_whose_run_ends_says_no_lost_connections(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, 'excepthook', lambda kind, *error: seen.append(kind))
    data._say_no_lost_connections(0)
    for error in (ConnectionResetError(), ValueError()):
        sys.excepthook(type(error), error, None)
    assert seen == [ValueError]
