"""What befalls a training run from outside: a second run of its name, a kill, a full disk."""
import errno
import re
import signal
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from experiment import files

SMALL = ['-a', 'RESNET6', '--dataset', 'DIGITS', '--train_samples', '96', '--test_samples', '50', '--no-gpu']
SPIKING = [*SMALL, '--timesteps', '8', '--default_threshold', '0.3']
RUNS = [('ann.py', SMALL, 'ann_resnet6_digits'), ('snn.py', SPIKING, 'snn_resnet6_digits_8')]


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

@pytest.mark.parametrize('script, flags, name', RUNS)
def test_a_second_run_of_the_same_name_is_refused(training, command, tmp_path, script, flags, name):
    first = training(script, *flags, '--epochs', '25')
    first.send_signal(signal.SIGSTOP)  # so that it is there, and changes nothing, for as long as the second takes
    before = contents(tmp_path)
    second = command(script, *flags, '--epochs', 1, '--resume', 'auto', '--log')
    assert second.returncode == 1 and second.stderr.count('\n') == 1
    for words in (f'{script}: error: ', f'{name}.pth', f'process {first.pid} on ', 'since 20', '--name'):
        assert words in second.stderr
    # one that writes no checkpoint needs no name of its own
    tested = command(script, *flags, '--test_only', '--resume')
    assert tested.returncode == 0, tested.stderr
    assert contents(tmp_path) == before
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=120)
    assert (first.returncode, errors) == (0, '')
    folder = tmp_path / 'trained_models' / script[:3]
    assert torch.load(folder / f'{name}.last.pth', weights_only=True)['epoch'] == 25
    assert sorted(path.name for path in folder.glob('*.pth')) == [f'{name}.last.pth', f'{name}.pth']


def test_a_killed_run_leaves_no_lock(training, command):
    first = training('ann.py', *SMALL, '--epochs', '5000')
    other = command('ann.py', *SMALL, '--epochs', 1, '--name', 'other')
    assert other.returncode == 0, other.stderr
    first.kill()
    first.wait()
    after = command('ann.py', *SMALL, '--epochs', 1)
    assert after.returncode == 0, after.stderr


@pytest.mark.parametrize('missing', ['module', 'support'])
def test_without_locks_runs_run(tmp_path, monkeypatch, missing):
    def lockf(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    if missing == 'module':
        monkeypatch.setattr(files, 'fcntl', None)
    else:
        monkeypatch.setattr(files.fcntl, 'lockf', lockf)
    assert files.lock((tmp_path / 'x.pth', tmp_path / 'x.last.pth')) is None
