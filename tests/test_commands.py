"""Scripts as commands of a shell, with odd names of files and outputs: one line and a status, never a traceback."""
import os
import shlex
import subprocess
import sys

import pytest
import torch

import ann
import ann_script
import snn
from conftest import ROOT, SMALL, run

pytestmark = pytest.mark.usefixtures('in_an_empty_folder')


ODD = '/tmp/x\udce9'  # the byte 0xe9 in a file name, as Python has it


@pytest.mark.parametrize('module', ['ann', 'snn', 'ann_script', 'snn_script'])
def test_importing_has_no_side_effects(module, tmp_path):
    done = subprocess.run([sys.executable, '-c', f'import {module}'], cwd=tmp_path, text=True, capture_output=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr, os.listdir(tmp_path)) == (0, '', '', [])


# -- names of files that are no text ----------------------------------------------------------------------------------

@pytest.mark.skipif(sys.platform in ('win32', 'darwin'), reason='file names are text there')
def test_a_name_that_is_no_text_goes_through_training_resuming_and_summary(capsys):
    run(ann, *SMALL, '--epochs', 1, '--data_dir', ODD, '--log', '--name', 'a')
    run(ann, *SMALL, '--epochs', 2, '--data_dir', ODD, '--log', '--name', 'a', '--resume')
    with open('logs/ann/a.log', encoding='utf-8') as file:
        assert r'data_dir: /tmp/x\udce9' in file.read()
    assert torch.load('trained_models/ann/a.pth', weights_only=True)['args']['data_dir'] == ODD
    run(snn, *SMALL, '--epochs', 1, '--timesteps', 8, '--data_dir', ODD, '--log', '--name', 's', '--report', 'r\udce9',
        '--default_threshold', 0.3, '--pretrained_ann', 'trained_models/ann/a.pth', '--calibration_samples', 8,
        '--calibration_timesteps', 30)
    assert os.path.isfile(b'r\xe9/report.json')
    ann_script.main(['--summarize', 'logs/snn/s.jsonl', '--figure', 'f\udce9.png'])
    ann_script.main(['--data_dir', ODD, 'y', '--script', 's\udce9.sh'])
    assert os.path.isfile(b'f\xe9.png') and b"'/tmp/x\xe9'" in open(b's\xe9.sh', 'rb').read()


def test_a_path_that_is_too_long():
    with pytest.raises(SystemExit, match='^ann_script.py: error: a.*too long'):
        ann_script.main(['--script', 'a' * 5000 + '.sh'])


# -- outputs ----------------------------------------------------------------------------------------------------------

def shell(line, **environment):
    """A command of a shell; {ann.py} and the like stand for Python and a script of the project."""
    for script in ('ann.py', 'ann_script.py'):
        line = line.replace(f'{{{script}}}', f'{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / script))}')
    return subprocess.run(['bash', '-c', line], text=True, capture_output=True, env={**os.environ, **environment})


@pytest.fixture
def metrics(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"args": {"seed": 0, "epochs": 1, "data_dir": "é"}}\n'
                                      '{"epoch": 1, "test_accuracy": 0.5}\n')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='there is no /dev/full')
@pytest.mark.parametrize('line, status', [
    (f'{{ann.py}} {" ".join(SMALL)} --epochs 1', 1), ('{ann_script.py} --summarize a.jsonl', 1),
    ('{ann_script.py} --seed 0 1', 1), ('{ann_script.py} --help', 0)])
def test_an_output_that_is_full(metrics, line, status):
    done = shell(f'{line} > /dev/full')
    assert done.returncode == status and done.stderr.count('\n') == status, done.stderr
    assert status == 0 or '.py: error: the output or log cannot be written' in done.stderr


@pytest.mark.parametrize('line', [f'{{ann.py}} {" ".join(SMALL)} --epochs 1 --name x', '{ann_script.py} --seed 0 1'])
def test_outputs_that_are_closed(line):
    done = shell(f'{line} >&- 2>&-')
    assert done.returncode == 0
    assert os.path.isfile('script.sh' if 'script' in line else 'trained_models/ann/x.pth')


@pytest.mark.parametrize('line, status', [('{ann.py} --epochs 0', 2), ('{ann.py} --help', 0)])
def test_an_output_that_is_closed_before_the_flags_are_read(line, status):
    done = shell(f'{line} >&-')
    assert done.returncode == status and 'Traceback' not in done.stderr, done.stderr


@pytest.mark.parametrize('environment', [
    {'PYTHONIOENCODING': 'ascii'}, {'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}, {'COLUMNS': '1'}])
def test_terminals_that_show_little(metrics, environment):
    done = shell('{ann_script.py} --summarize a.jsonl && {ann_script.py} --help && {ann.py} --help', **environment)
    assert (done.returncode, done.stderr) == (0, '') and '50.00' in done.stdout
