"""Commands with odd numbers, names of files and outputs: one line and a status, never a traceback."""
import os
import shlex
import subprocess
import sys

import pytest
import torch

import ann
import ann_script
import snn
from conftest import ROOT
from experiment import convert

SMALL = ['-a', 'RESNET6', '--dataset', 'DIGITS', '--train_samples', '96', '--test_samples', '50', '--no-gpu']
ODD = '/tmp/x\udce9'  # the byte 0xe9 in a file name, as Python has it


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(module, *flags):
    module.main(module.get_args_parser().parse_args([str(flag) for flag in flags]))


# -- numbers ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flag', ['--default_threshold', '--alpha', '--beta', '--gamma', '-lr', '--lr_reduce',
                                  '--weight_decay'])
@pytest.mark.parametrize('value', ['1e39', '1e-39', '1e-60', '3.5e38'])
def test_numbers_that_float32_does_not_have(flag, value, capsys):
    with pytest.raises(SystemExit) as caught:
        snn.get_args_parser().parse_args([flag, value])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count('\n') == 1 and f"'{value}' is too " in error and flag in error


@pytest.mark.parametrize('flag', ['--momentum', '--dropout', '--validation_fraction', '--leak'])
def test_fractions_that_would_be_0_in_float32(flag, capsys):
    with pytest.raises(SystemExit):
        snn.get_args_parser().parse_args([flag, '1e-60'])
    assert "'1e-60' is too small" in capsys.readouterr().err


def test_numbers_that_float32_has():
    args = snn.get_args_parser().parse_args(['--default_threshold', '3.4e38', '--alpha', '0', '--beta', '1.2e-38'])
    assert (args.default_threshold, args.alpha, args.beta) == (3.4e38, 0, 1.2e-38)
    assert torch.tensor([args.default_threshold, args.beta]).isfinite().all()


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
    assert status == 0 or '.py: error: what it prints or logs cannot be written' in done.stderr


@pytest.mark.parametrize('line', [f'{{ann.py}} {" ".join(SMALL)} --epochs 1 --name x', '{ann_script.py} --seed 0 1'])
def test_outputs_that_are_closed(line):
    done = shell(f'{line} >&- 2>&-')
    assert done.returncode == 0
    assert os.path.isfile('script.sh' if 'script' in line else 'trained_models/ann/x.pth')


@pytest.mark.parametrize('environment', [
    {'PYTHONIOENCODING': 'ascii'}, {'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}, {'COLUMNS': '1'}])
def test_terminals_that_show_little(metrics, environment):
    done = shell('{ann_script.py} --summarize a.jsonl && {ann_script.py} --help && {ann.py} --help', **environment)
    assert (done.returncode, done.stderr) == (0, '') and '50.00' in done.stdout


def test_a_path_that_is_too_long():
    with pytest.raises(SystemExit, match='^ann_script.py: error: a.*too long'):
        ann_script.main(['--script', 'a' * 5000 + '.sh'])


# -- an ANN that has not learned --------------------------------------------------------------------------------------

@pytest.mark.parametrize('accuracy, counts, chance', [
    (0.09, [1000] * 10, 0.1), (0.1, [1000] * 10, 0.1),
    (0.11, [1000] * 10, 0.1),  # 3 standard errors of 0.003, but below the published 0.15
    (0.15, [1000] * 10, None), (0.15, [10] * 10, 0.1),  # the same is within two of 0.03 on 100 images
    (0.17, [10] * 10, None), (0.9, [900, 100], 0.9), (0.95, [900, 100], None),
    (0.53, [500, 500], 0.5), (0.54, [500, 500], None)])  # 2 sqrt(0.25 / 1000) = 0.032
def test_chance_by_hand(accuracy, counts, chance):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    assert convert.at_chance(accuracy, labels, len(counts)) == (None if chance is None else pytest.approx(chance))


@pytest.mark.parametrize('rate', [1e-9, 1e-3])
def test_an_ann_at_chance_is_said_to_be_before_it_is_converted(rate, capsys):
    images = ['-a', 'RESNET6', '--dataset', 'DIGITS', '--no-gpu']
    run(ann, *images, '--epochs', 2, '--optimizer', 'Adam', '-lr', rate, '--name', 'a')
    capsys.readouterr()
    run(snn, *images, '--test_only', '--timesteps', 7, '--pretrained_ann', 'trained_models/ann/a.pth',
        '--calibration_samples', 20, '--calibration_timesteps', 30)
    lines = capsys.readouterr().out.splitlines()
    said = [number for number, line in enumerate(lines) if line.startswith('this ANN is hardly better than chance')]
    assert len(said) == (rate == 1e-9)
    # right after its accuracy, before the balancing
    assert all(lines[number - 1].startswith('ANN ') and 'no thresholds' in lines[number + 1] for number in said)
