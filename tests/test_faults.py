"""What befalls a training run from outside: a second run of its name, a kill, a full disk."""
import errno
import os
import re
import resource
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
from conftest import ROOT, SMALL, SPIKING, load
from experiment import UserError, data, files, options

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

@pytest.mark.parametrize('module, flags, name', RUNS)
def test_a_second_run_of_the_same_name_is_refused(training, called, tmp_path, module, flags, name):
    script = f'{module.__name__}.py'
    first = training(script, *flags, '--epochs', '25')
    first.send_signal(signal.SIGSTOP)  # so that it is there, and changes nothing, for as long as the second takes
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
    folder = tmp_path / 'trained_models' / module.__name__
    assert load(folder / f'{name}.last.pth')['epoch'] == 25
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


# -- processes that load data -----------------------------------------------------------------------------------------

DECODES_IN_EVERY_EPOCH = """
import ann
from experiment import data, options
data.IN_MEMORY_BYTES = 0
options.run(ann.main, ann.get_args_parser().parse_args(), 'ann.py')
"""


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
    own = ['x.pth.123.tmp', 'x.last.pth.123.tmp', 'x.last.pth.7.tmp', 'x.jsonl.123.tmp']
    others = ['x.pth', 'x.last.pth', 'x.jsonl', 'y.pth.123.tmp', 'previous.1.x.pth', 'x.pth.pth.123.tmp',
              'a.x.pth.123.tmp', 'x.pth.thresholds.json', 'x.pth.tmp', 'x-pth.123.tmp']
    for name in own + others:
        (tmp_path / name).touch()
    held = files.lock(files.Paths(tmp_path / 'x.pth', tmp_path / 'x.last.pth', tmp_path / 'x.jsonl'))
    assert {path.name for path in tmp_path.iterdir()} == {*others, '.x.lock'}
    held.close()


@pytest.mark.parametrize('module, flags, name', RUNS)
def test_a_disk_that_fills_while_a_run_saves(called, tmp_path, module, flags, name):
    assert called(module, *flags, '--epochs', 1).returncode == 0
    folder = tmp_path / 'trained_models' / module.__name__
    before = {path.name: path.read_bytes() for path in folder.glob('*.pth')}
    assert sorted(before) == [f'{name}.last.pth', f'{name}.pth']

    before_it, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    # no file beyond 1 MB, a third of a checkpoint; Python ignores the signal that comes with it
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, most))
    try:
        full = called(module, *flags, '--epochs', 3, '--resume')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before_it, most))
    assert full.returncode == 1 and full.stderr.count('\n') == 1, full.stderr
    for words in (f'{module.__name__}.py: error: trained_models/', name, 'cannot be written', 'untouched'):
        assert words in full.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != f'.{name}.lock'} == before
    again = called(module, *flags, '--epochs', 2, '--resume')  # with room again, it goes on
    assert again.returncode == 0 and 'after epoch 1' in again.stdout
