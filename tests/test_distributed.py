"""Several processes, which talk by gloo, against one."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ann
import snn
import train_together
from conftest import CALIBRATION, ROOT, digits, load, metrics_of, network, run, same, train_ann
from experiment import UserError, distributed, setup
from self_models import VGG, convert

SMALL = digits(97, 50)  # processes get unequal parts


def start(script, *flags, cwd, status=0):
    """Run a script of the project on two processes; returns what they print, where it is to fail their errors."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '--']
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / script), *map(str, flags)], cwd=cwd,
        text=True, capture_output=True, timeout=300,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}'})
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def close(one, two):
    assert one.keys() == two.keys()
    return all(torch.allclose(one[key], two[key], rtol=1e-5, atol=1e-5 * one[key].abs().max().item()) for key in one)


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(tmp_path):
    # 19 images in batches of 6: the last one has an image for the first process only
    train_together.main(tmp_path / 'one', 6)
    start('tests/train_together.py', tmp_path / 'two', 3, cwd=tmp_path)
    one, first, second = (load(tmp_path / name) for name in ('one.0', 'two.0', 'two.1'))
    assert close(one['state_dict'], first['state_dict']) and close(first['state_dict'], second['state_dict'])
    assert one['metrics'][0][0] != one['metrics'][1][0], 'no step was taken'
    for found in (first, second):
        assert found['metrics'] == [pytest.approx(epoch, rel=1e-5) for epoch in one['metrics']]
        assert found['tested'] == pytest.approx(one['tested'], rel=1e-5) and found['curve'] == one['curve']


@pytest.mark.slow
def test_an_ann_trained_by_two_processes(tmp_path, in_an_empty_folder):
    flags = [*SMALL, '--dropout', 0, '--epochs', 2]
    run(ann, *flags, '--batch_size', 16, '--name', 'one')
    out = start('ann.py', *flags, '--batch_size', 8, '--name', 'two', cwd=tmp_path)
    assert out.count('best test accuracy') == 1, 'one process writes'
    one, two = (load(f'trained_models/ann/{name}.pth') for name in ('one', 'two'))
    assert close(one['state_dict'], two['state_dict'])
    for a, b in zip(one['history'], two['history'], strict=True):
        assert {key: b[key] for key in b if key != 'seconds'} == pytest.approx(
            {key: a[key] for key in a if key != 'seconds'}, rel=1e-4)
    assert sorted(path.name for path in Path('trained_models/ann').glob('*.pth')) == [
        f'{name}{kind}' for name in ('one', 'two') for kind in ('.last.pth', '.pth')]


@pytest.mark.parametrize('error, cause', [
    (torch.distributed.DistBackendError('NCCL error in: a.cpp:3\nncclSystemError: a call failed.\nLast error:\n'
                                        'cannot create shared memory\n'), ' (cannot create shared memory)'),
    (torch.distributed.DistNetworkError('The server socket cannot listen: port 29500 is in use'),
     ' (The server socket cannot listen: port 29500 is in use)'),
    (RuntimeError('[gloo/transport/tcp/pair.cc:547] Connection closed by peer'), '')])
def test_why_processes_cannot_reach_each_other_is_said(error, cause):
    assert distributed.is_of_an_ended_process(error) and distributed.cause_of(error) == cause


@pytest.mark.slow
def test_an_snn_converted_and_trained_by_two_processes(tmp_path):
    flags = [*SMALL, '--pretrained_ann', train_ann(tmp_path, *SMALL, '--epochs', 2), '--timesteps', 10, *CALIBRATION,
             '--validation_fraction', '0.1', '--default_threshold', '0.3']
    out = start('snn.py', *flags, '--epochs', 1, '--name', 's', cwd=tmp_path)
    out += start('snn.py', *flags, '--epochs', 2, '--name', 's', '--resume', cwd=tmp_path)
    assert '2 processes, each with batches of 64' in out
    assert len(re.findall(r'^thresholds:', out, re.M)) == 2  # one a run
    _, epochs = metrics_of(tmp_path / 'logs/snn/s.jsonl')
    assert [entry['epoch'] for entry in epochs] == [0, 1, 2]
    # of 50 test images and 144 held out, every one was counted once
    tested, = [50 * entry['test_accuracy'] for entry in epochs if 'test_accuracy' in entry]
    for count in (tested, *(144 * entry['validation_accuracy'] for entry in epochs)):
        assert count == pytest.approx(round(count))


EACH_EPOCH = """
import os, torch, ann
from experiment import engine, options

save = engine.save

def save_everywhere(model, optimizer, run, progress, accuracy):
    torch.save(model.state_dict(), f'{progress.history[-1]["epoch"]}.{os.environ["RANK"]}')
    save(model, optimizer, run, progress, accuracy)

engine.save = save_everywhere
options.run(ann.main, ann.get_args_parser().parse_args(), 'ann.py')
"""


def test_batch_norm_of_two_processes_ends_alike_on_both_and_converts(tmp_path, monkeypatch, capsys):
    (tmp_path / 'each_epoch.py').write_text(EACH_EPOCH)
    out = start(tmp_path / 'each_epoch.py', *SMALL, '--train_samples', 900, '--activation', 'QCFS', '--levels', 4,
                '--batch_norm', '--optimizer', 'Adam', '-lr', '1e-3', '--epochs', 2, '--batch_size', 16, '--name', 'a',
                cwd=tmp_path)
    assert 'batch norm is not synchronised on CPUs' in out
    for epoch in (1, 2):  # also what the test images of this epoch went through
        first, second = (torch.load(tmp_path / f'{epoch}.{rank}', weights_only=True) for rank in (0, 1))
        assert same(first, second)
    monkeypatch.chdir(tmp_path)
    state = load('trained_models/ann/a.pth')
    variances = [value for key, value in state['state_dict'].items() if key.endswith('running_var')]
    assert variances and all(value.isfinite().all() and value.min() > 0 for value in variances)
    about, epochs = metrics_of('logs/ann/a.jsonl')
    assert about['processes'] == 2
    assert epochs[-1]['train_loss'] < epochs[0]['train_loss'] and state['accuracy'] > 0.5
    capsys.readouterr()
    run(ann, *SMALL, '--test_only', '--pretrained_ann', 'trained_models/ann/a.pth')
    loss = epochs[state['epoch'] - 1]['test_loss']
    assert f'{state["accuracy"]:.2%} on 50 images, loss {loss:.4f}' in capsys.readouterr().out
    run(snn, *SMALL, '--pretrained_ann', 'trained_models/ann/a.pth', '--timesteps', 16, '--test_only')
    converted, = re.findall(r'converted SNN: test accuracy (.*)%', capsys.readouterr().out)
    assert float(converted) / 100 > 0.9 * state['accuracy']


def test_a_synchronised_batch_norm_has_the_names_and_values_of_one_that_is_not(monkeypatch):
    """torch's synchronises on CUDA only, so here it is used, and converted, but not trained."""
    model, x = VGG('VGG5', dataset='DIGITS', activation='QCFS', batch_norm=True).eval(), torch.rand(3, 1, 8, 8)
    optimizer, before, logits = torch.optim.SGD(model.parameters(), lr=0.1), model.state_dict(), model(x)
    monkeypatch.setattr(distributed, '_started', lambda: True)
    monkeypatch.setattr(torch.nn.parallel, 'DistributedDataParallel', lambda model, device_ids: model)
    learner = distributed.learner(model, torch.device('cuda', 0))
    assert learner is model and any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d) for module in model.modules())
    assert list(before) == list(model.state_dict()) and same(dict(before), dict(model.state_dict()))
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]['params']}
    monkeypatch.undo()
    assert torch.equal(model(x), logits) and convert(model, 4)(x).isfinite().all()


def test_too_few_time_steps_for_a_spike_at_the_output_say_how_many_it_takes(monkeypatch):
    """DistributedDataParallel wants a gradient, so several processes do not train then."""
    model, args = network('RESNET6', dataset='DIGITS', timesteps=5), snn.get_args_parser().parse_args([])
    words = '^--timesteps 5: .* in fewer than 6, .*; take more$'
    line, = setup.check_steps(model, args)
    assert re.search(words, line)
    monkeypatch.setattr(distributed, 'wanted', lambda: True)
    with pytest.raises(UserError, match=words):
        setup.check_steps(model, args)


def said(errors):
    """How many lines of error the processes wrote; beside them stands torchrun's own summary, with its traceback."""
    assert errors.count('Traceback') == 1 and 'gloo' not in errors.lower() and 'stopped' not in errors, errors
    return len(re.findall('^[a-z]+.py: error: ', errors, re.M))


def test_an_error_of_the_main_process_alone_is_one_line(tmp_path):
    errors = start('ann.py', '--dataset', 'FOLDER', '--data_dir', 'nowhere', '--no-gpu', cwd=tmp_path, status=1)
    assert said(errors) == 1 and 'ann.py: error: FOLDER: there is no nowhere; ' in errors


FAILING = """
import os, ann
from experiment import UserError, engine, options, setup

def main(args):
    def fail(*_):
        raise UserError('a thing is wrong; mend it')
    if os.environ['RANK'] == '1':
        setattr({where}, fail)
    ann.main(args)

options.run(main, ann.get_args_parser().parse_args(), 'ann.py')
"""


@pytest.mark.slow
@pytest.mark.parametrize('where', ["setup, '_device'", "engine, 'check_finite'"])  # before they have met, and after
def test_an_error_of_another_process_alone_is_one_line(tmp_path, where):
    (tmp_path / 'failing.py').write_text(FAILING.replace('{where}', where))
    errors = start(tmp_path / 'failing.py', *SMALL, '--epochs', 2, cwd=tmp_path, status=1)
    assert said(errors) == 1 and 'ann.py: error: a thing is wrong; mend it\n' in errors


LOSES_INTERRUPTS = """
import os, time, ann
from experiment import UserError, options

def main(args):
    end = time.monotonic() + (3 if os.environ['RANK'] == '1' else 0)
    while time.monotonic() < end:
        try:
            time.sleep(0.1)
        except BaseException:
            pass
    raise UserError('a thing is wrong; mend it')

options.run(main, ann.get_args_parser().parse_args(), 'ann.py')
"""


def test_a_process_that_loses_an_interrupt_is_ended_all_the_same(tmp_path):
    """Seen where a process still imported a library when torchrun ended it: the error stood there twice."""
    (tmp_path / 'losing.py').write_text(LOSES_INTERRUPTS)
    errors = start(tmp_path / 'losing.py', *SMALL, cwd=tmp_path, status=1)
    assert said(errors) == 1 and 'ann.py: error: a thing is wrong; mend it\n' in errors


def test_the_documented_command_as_it_stands(tmp_path):
    line, = re.findall('^torchrun -.*$', (ROOT / 'docs/sweeps.md').read_text(), re.M)
    assert line.endswith(' --log') and ' ann.py ' in line
    line = line.replace('--nproc_per_node 4', '--nproc_per_node 2').replace('ann.py', shlex.quote(str(ROOT / 'ann.py')))
    done = subprocess.run(
        ['bash', '-c', f'{line} {shlex.join(map(str, SMALL))} --epochs 1 --name x'], cwd=tmp_path, text=True,
        capture_output=True, timeout=300, env={
            **os.environ, 'OMP_NUM_THREADS': '1', 'PET_STANDALONE': '1',  # --standalone: a port that nobody has
            'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'})
    assert done.returncode == 0, done.stderr
    assert '2 processes, each with batches of 16' in (tmp_path / 'logs/ann/x.log').read_text()


def test_several_devices_without_torchrun_say_what_to_type(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['ann.py', '--devices', '0,1', '--seed', '3'])
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    with pytest.raises(UserError, match=r'type: torchrun --nproc_per_node 2 -- ann.py --devices 0,1 --seed 3$'):
        setup.set_up_device(ann.get_args_parser().parse_args(sys.argv[1:]))


@pytest.mark.parametrize('left', [
    {'WORLD_SIZE': '2'}, {'WORLD_SIZE': ''}, {'WORLD_SIZE': 'two'}, {'WORLD_SIZE': '2', 'RANK': '0'},
    {'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_PORT': '29500'}, {'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': 'here'},
    {'WORLD_SIZE': '2', 'RANK': '', 'MASTER_ADDR': 'here', 'MASTER_PORT': '29500'},
    {'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': 'here', 'MASTER_PORT': '29500', 'LOCAL_RANK': ''},
    {'WORLD_SIZE': '2', 'RANK': '2', 'MASTER_ADDR': 'here', 'MASTER_PORT': '29500'},
    {'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': 'here', 'MASTER_PORT': '70000'},
    {'WORLD_SIZE': '1', 'RANK': '0', 'MASTER_ADDR': 'here', 'MASTER_PORT': '29500', 'LOCAL_RANK': '0'},
    {'LOCAL_RANK': 'x'}], ids=str)
def test_what_is_left_of_a_torchrun_starts_none(left, monkeypatch, called):
    for name in ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert distributed.wanted() is False
    wrong = called(ann, *SMALL, '--test_only')  # without a network
    assert (wrong.returncode, wrong.stderr.count('\n')) == (1, 1)
