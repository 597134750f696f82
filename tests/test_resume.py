"""Going on: after a kill at any moment, with other flags, from a network that was trained before."""
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ann
import snn
from conftest import CALIBRATION, FEW_STEPS, ROOT, digits, fails, load, metrics_of, run, same, train_ann
from experiment import UserError, checkpoint, data, engine, files, setup
from experiment.reporting import metrics, summary

SMALL = digits(32, 20)
SPIKING = [*SMALL, *FEW_STEPS]
RUNS = [(ann, SMALL), (snn, SPIKING)]
pytestmark = pytest.mark.usefixtures('in_an_empty_folder')


class Killed(BaseException):
    pass


def kill_at(patch, number):
    """Raise Killed in place of the renaming of a file with this number, from 1: saving and setting aside end in one."""
    calls, replace = [], os.replace

    def killed(*names):
        calls.append(names)
        if len(calls) == number:
            raise Killed
        replace(*names)

    patch.setattr(files.os, 'replace', killed)


def accuracies(patch, *values):
    """Every test gives the next of these accuracies, the last one from there on."""
    left = list(values)
    patch.setattr(engine, 'test', lambda *_: engine.Metrics(2.0, left.pop(0) if left[1:] else left[0]))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The checkpoint of an ANN that held a tenth out by seed 0."""
    return train_ann(tmp_path_factory.mktemp('trained'), *SMALL[:4], '--test_samples', 20, '--no-gpu', '--epochs', 1,
                     '--validation_fraction', 0.1)


@pytest.fixture(scope='module')
def epochs(tmp_path_factory):
    """{(script, number): the folder of a run n after so many epochs}. Tests leave them as they are."""
    folders = {}
    for module, flags in RUNS:
        folder = tmp_path_factory.mktemp(module.__name__)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for number, resume in ((1, []), (2, ['--resume'])):
                run(module, *flags, '--name', 'n', '--epochs', number, *resume)
                folders[module, number] = Path(shutil.copytree(folder, tmp_path_factory.mktemp('of') / str(number)))
    return folders


@pytest.fixture
def begun(epochs, in_an_empty_folder):
    """A run of ann.py has done its first epoch here; its flags, but for the number of epochs."""
    shutil.copytree(epochs[ann, 1], '.', dirs_exist_ok=True)
    return [*SMALL, '--name', 'n']


# -- the same run, or another -----------------------------------------------------------------------------------------

def kill_in_epoch(monkeypatch, number):
    calls, original = [], engine.train_epoch

    def train_epoch(*args):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return original(*args)

    monkeypatch.setattr(engine, 'train_epoch', train_epoch)


def last_table(capsys):
    return re.findall(r'^\S.{23} +[\d.]+% +[-\d]+$', capsys.readouterr().out, re.M)


@pytest.mark.parametrize('module', [ann, snn])
def test_a_killed_and_resumed_run_ends_with_the_same_weights(module, trained, monkeypatch, capsys):
    flags = [*digits(96, 50), '--epochs', 4]  # of two steps each
    if module is snn:
        flags += [*FEW_STEPS, *CALIBRATION, '--pretrained_ann', trained]
    run(module, *flags, '--name', 'whole')
    table = last_table(capsys)
    assert len(table) == (0 if module is ann else 3)  # ANN, converted, fine-tuned
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_epoch(patch, 3)
        run(module, *flags, '--name', 'killed')
    torch.rand(7)  # a new process would not go on with this generator either
    run(module, *flags, '--name', 'killed', '--resume')
    assert last_table(capsys) == table
    folder = Path('trained_models', module.__name__)
    for kind in ('.pth', '.last.pth'):
        whole, killed = load(folder / f'whole{kind}'), load(folder / f'killed{kind}')
        assert whole['epoch'] == killed['epoch']
        for key in ('state_dict', 'optimizer', 'accuracy', 'best'):
            assert same(whole[key], killed[key]), key


def test_a_run_that_is_ended_by_fewer_epochs_is_finished(monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_epoch(patch, 3)
        run(ann, *SMALL, '--epochs', 4, '--name', 'k')
    assert summary.read('logs/ann/k.jsonl').asked == 4
    run(ann, *SMALL, '--epochs', 1, '--name', 'k', '--resume')
    found = summary.read('logs/ann/k.jsonl')
    assert (found.done, found.asked) == (2, 2)


def test_resume_auto_starts_anew_where_there_is_nothing(capsys):
    run(ann, *SMALL, '--epochs', 1, '--resume', 'auto')
    assert 'resumed' not in capsys.readouterr().out
    run(ann, *SMALL, '--epochs', 2, '--resume', 'auto')
    assert 'resumed from trained_models/ann/ann_resnet6_digits.last.pth, after epoch 1' in capsys.readouterr().out


def test_resuming_from_another_runs_file_leaves_that_run_alone(capsys):
    run(ann, *SMALL, '--epochs', 1)
    run(ann, *SMALL, '--epochs', 1, '--name', 'mine')
    folder = Path('trained_models/ann')
    before = {path.name: path.read_bytes() for path in folder.glob('*.pth')}
    run(ann, *SMALL, '--epochs', 2, '--name', 'mine', '--resume', folder / 'ann_resnet6_digits.last.pth')
    assert load(folder / 'mine.pth')['epoch'] == 2
    assert (folder / 'previous.1.mine.pth').read_bytes() == before['mine.pth']
    for name in ('ann_resnet6_digits.pth', 'ann_resnet6_digits.last.pth'):
        assert (folder / name).read_bytes() == before[name]


def test_another_runs_file_that_has_enough_epochs_already(begun):
    fails(ann, '1 epochs are done already; for more, raise', *SMALL, '--epochs', 1, '--name', 'mine', '--resume',
          'trained_models/ann/n.last.pth')
    assert not list(Path('trained_models/ann').glob('mine*.pth'))


@pytest.mark.parametrize('change', [
    {'optimizer': None}, {'optimizer': {}}, {'optimizer': 'text'}, {'epoch': 'one'}, {'epoch': -1}, {'best': None},
    {'best': [0.1]}, {'args': []}, {'history': [1]}])
def test_a_training_state_that_cannot_be_resumed(change, begun):
    path = 'trained_models/ann/n.last.pth'
    torch.save({**load(path), **change}, path)
    fails(ann, 'n.last.pth: (holds no training|its optimizer state)', *begun, '--resume')


def test_an_optimizer_state_of_other_shapes_is_refused(begun):
    path = 'trained_models/ann/n.last.pth'
    state = load(path)
    state['optimizer']['state'][0]['momentum_buffer'] = torch.zeros(3)  # a fused step would write beyond it
    torch.save(state, path)
    fails(ann, 'its optimizer state does not fit', *begun, '--resume')


@pytest.mark.parametrize('optimizer', ['SGD', 'Adam'])
def test_an_optimizer_state_of_another_memory_layout_is_the_same(optimizer):
    # a rate at which the network lives on: of a dead one Adam's steps are the same in any order
    flags, path = [*SMALL, '--optimizer', optimizer, '-lr', 1e-4], 'trained_models/ann/ann_resnet6_digits'
    run(ann, *flags, '--epochs', 1)
    state, weights = load(f'{path}.last.pth'), []
    for layout in (torch.contiguous_format, torch.channels_last):
        for values in state['optimizer']['state'].values():
            for key, value in values.items():
                if value is not None and value.dim() == 4:
                    values[key] = value.contiguous(memory_format=layout)
        torch.save(state, f'{path}.last.pth')
        run(ann, *flags, '--epochs', 2, '--resume')
        weights.append(load(f'{path}.last.pth')['state_dict'])
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_flags_hold_on_resume(monkeypatch, begun):
    seen, original = [], engine.train_epoch
    monkeypatch.setattr(engine, 'train_epoch', lambda *args: seen.append(args[2].param_groups[0]) or original(*args))
    run(ann, *begun, '--epochs', 2, '--resume', '--momentum', '0.5', '--weight_decay', '0')
    assert [(group['momentum'], group['weight_decay']) for group in seen] == [(0.5, 0)]


@pytest.mark.parametrize('flags, said', [
    (['--validation_fraction', '0.3'], 'with --validation_fraction 0.0'), (['--seed', '1'], 'with --seed 0'),
    (['--test_samples', '10'], 'with --test_samples 20')])
def test_accuracies_of_other_images_are_not_compared_on_resume(flags, said, begun):
    fails(ann, f'was trained {said};', *begun, '--epochs', 2, '--resume', *flags)
    run(ann, *begun, '--test_only', '--resume', *flags, '--optimizer', 'Adam')  # compares and trains nothing


@pytest.mark.parametrize('flags, said', [
    (['--timesteps', 9], 'with --timesteps 8'), (['--leak', 0.5], 'with --leak 1.0'),
    (['--encoding', 'direct'], 'with --encoding poisson'),
    (['--initial_potential', 0.5], 'with --initial_potential 0.0')])
def test_accuracies_of_other_neurons_are_not_compared_on_resume(flags, said, epochs):
    shutil.copytree(epochs[snn, 1], '.', dirs_exist_ok=True)
    fails(snn, f'was trained {said};', *SPIKING, '--epochs', 2, '--name', 'n', '--resume', *flags)


# -- kills ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('module, flags', RUNS)
@pytest.mark.parametrize('moment', range(1, 8))  # (last, best, metrics) of epochs 1 and 2, the end
def test_log_best_file_and_metrics_agree_after_a_kill_at_any_moment(module, flags, moment, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        accuracies(patch, 0.17, 0.30)
        kill_at(patch, moment)
        with pytest.raises(Killed) if moment < 7 else contextlib.nullcontext():
            run(module, *flags, '--epochs', 2, '--name', 'k')
    capsys.readouterr()
    accuracies(monkeypatch, 0.20)  # every epoch from here on
    run(module, *flags, '--epochs', 3, '--name', 'k', '--resume', 'auto', '-lr', 1e-5)
    # nothing of the first run; its epoch 1, which 0.20 beats; its epoch 2, which nothing does
    accuracy, epoch = (0.20, 1) if moment == 1 else (0.20, 2) if moment <= 4 else (0.30, 2)
    out, folder = capsys.readouterr().out, Path('trained_models', module.__name__)
    if module is ann:
        assert f'best test accuracy {accuracy:.2%}, of epoch {epoch}:' in out
    else:
        assert re.search(rf'^SNN, best epoch \({epoch}\) +{accuracy:.2%} ', out, re.M)
    best, last = load(folder / 'k.pth'), load(folder / 'k.last.pth')
    assert [best['accuracy'], best['epoch']] == best['best'] == last['best'] == [accuracy, epoch]
    about, epochs = metrics_of(f'logs/{module.__name__}/k.jsonl')
    assert about['args']['epochs'] == 3 and [entry['epoch'] for entry in epochs] == [1, 2, 3]
    assert epochs[-1]['best_accuracy'] == accuracy == max(entry['test_accuracy'] for entry in epochs)
    assert last['history'] == epochs
    assert not list(Path().rglob('previous.*')) and not list(Path().rglob('*.tmp'))


@pytest.mark.parametrize('moment', range(1, 7))  # setting aside last, best, metrics; last, best, metrics of epoch 0
def test_an_earlier_run_is_kept_whole_by_a_kill_while_it_is_set_aside(moment, trained, epochs, monkeypatch):
    flags = [*SPIKING, *CALIBRATION, '--pretrained_ann', trained, '--name', 'n']
    shutil.copytree(epochs[snn, 2], '.', dirs_exist_ok=True)
    earlier = [Path('trained_models/snn/n.pth'), Path('trained_models/snn/n.last.pth'), Path('logs/snn/n.jsonl')]
    before = [path.read_bytes() for path in earlier]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, moment + 1)  # after that of the thresholds, which are of another seed
        run(snn, *flags, '--epochs', 1, '--seed', 100 + moment)
    run(snn, *flags, '--epochs', 1, '--seed', 100 + moment, *([] if moment == 1 else ['--resume', 'auto']))
    assert [path.with_name(f'previous.1.{path.name}').read_bytes() for path in earlier] == before
    assert not list(Path().rglob('previous.2.*'))
    assert [entry['epoch'] for entry in metrics_of(earlier[2])[1]] == [0, 1]
    best, last = map(load, earlier[:2])
    assert [best['accuracy'], best['epoch']] == last['best'] and last['epoch'] == 1


def test_checkpoints_that_former_versions_left_at_a_kill_are_brought_in_line(monkeypatch, capsys):
    """They wrote the best epoch's before the last one's."""
    accuracies(monkeypatch, 0.17, 0.30, 0.10)
    run(ann, *SMALL, '--epochs', 1, '--name', 'k')
    folder = Path('trained_models/ann')
    shutil.copy(folder / 'k.last.pth', 'one')
    run(ann, *SMALL, '--epochs', 2, '--name', 'k', '--resume')
    shutil.copy('one', folder / 'k.last.pth')
    run(ann, *SMALL, '--epochs', 3, '--name', 'k', '--resume')
    out = capsys.readouterr().out
    assert 'after epoch 2' in out and 'best test accuracy 30.00%, of epoch 2' in out
    # or the best one is of no epoch that is left: it is kept, and looked for anew
    torch.save({**load(folder / 'k.pth'), 'epoch': 1, 'history': []}, folder / 'k.pth')
    run(ann, *SMALL, '--epochs', 4, '--name', 'k', '--resume')
    out = capsys.readouterr().out
    assert 'k.pth does not hold epoch 2' in out and 'best test accuracy 10.00%, of epoch 3' in out
    assert load(folder / 'k.pth')['epoch'] == 3 and load(folder / 'previous.1.k.pth')['epoch'] == 1


@pytest.mark.parametrize('module, flags', RUNS)
@pytest.mark.parametrize('more', [[], ['--validation_fraction', 0.1]])
@pytest.mark.parametrize('moment', ['metrics', 'test'])
def test_a_run_killed_after_its_last_epoch_is_finished(module, flags, more, moment, monkeypatch):
    flags = [*flags, *more, '--name', 'f', '--epochs', 2]
    path = Path('logs', module.__name__, 'f.jsonl')
    with monkeypatch.context() as patch, pytest.raises(Killed):
        writes, write, load_weights = [], metrics.write, checkpoint.load_weights

        def killed(*arguments):
            writes.append(1)
            if len(writes) == 2:
                raise Killed
            write(*arguments)

        def load_the_best(model, state, where, **options):
            if str(where).endswith('f.pth'):
                raise Killed
            return load_weights(model, state, where, **options)

        if moment == 'metrics':
            patch.setattr(metrics, 'write', killed)
        else:
            patch.setattr(checkpoint, 'load_weights', load_the_best)
        run(module, *flags)
    run(module, *flags, '--resume', 'auto', '--weight_decay', 0.5)
    found, (about, epochs) = summary.read(path), metrics_of(path)
    assert (found.done, found.asked) == (2, 2) and found.accuracy is not None
    assert about['args']['weight_decay'] == 5e-4  # no epoch had the other
    best = load(f'trained_models/{module.__name__}/f.pth')['epoch']
    assert [entry['epoch'] for entry in epochs if 'test_accuracy' in entry] == ([best] if more else [1, 2])
    before = path.read_bytes()
    run(module, *flags, '--resume', 'auto')
    assert path.read_bytes() == before


# -- locks ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('module, flags', RUNS)
@pytest.mark.parametrize('resume', ['auto', 'last', 'own', 'late'])
def test_what_another_run_saves_until_the_name_is_locked_is_resumed(module, flags, resume, epochs, monkeypatch, capsys):
    flags = [*flags, '--name', 'n']
    folder = Path('trained_models', module.__name__)
    if resume != 'late':  # another run's first epoch comes in this moment, too
        shutil.copytree(epochs[module, 1], '.', dirs_exist_ok=True)
    lock = files.lock

    def late(paths):  # the other run ends just before
        shutil.copytree(epochs[module, 2], '.', dirs_exist_ok=True)
        return lock(paths)

    monkeypatch.setattr(files, 'lock', late)
    capsys.readouterr()
    words = {'auto': ['auto'], 'late': ['auto'], 'last': [], 'own': [folder / 'n.last.pth']}[resume]
    run(module, *flags, '--epochs', 3, '--resume', *words)
    assert 'after epoch 2' in capsys.readouterr().out
    assert [entry['epoch'] for entry in load(folder / 'n.last.pth')['history']] == [1, 2, 3]


@pytest.mark.parametrize('module, flags', [(ann, SMALL), (snn, SPIKING)])
def test_a_name_is_taken_before_data_is_read(module, flags, monkeypatch):
    # which can take minutes, in which another run of the name could end
    def load_data(args):
        raise UserError('locked' if list(Path('trained_models', module.__name__).glob('.*.lock')) else 'open')
    monkeypatch.setattr(setup, 'load_data', load_data)
    fails(module, 'locked', *flags)


def test_the_name_that_a_checkpoint_asks_for_is_locked(monkeypatch):
    run(snn, *SPIKING, '--epochs', 1)
    folder, locked, lock = Path('trained_models/snn'), [], files.lock
    monkeypatch.setattr(files, 'lock', lambda paths: locked.append(paths.best.name) or lock(paths))
    shutil.copy(folder / 'snn_resnet6_digits_8.last.pth', 'other.pth')
    run(snn, '--no-gpu', '--resume', 'other.pth', '--epochs', 2, *SMALL[4:-1])
    assert locked == ['snn_resnet6_digits_8.pth']
    assert load(folder / 'snn_resnet6_digits_8.last.pth')['epoch'] == 2
    # a file under the name of another network goes on under that
    shutil.copy('other.pth', folder / 'snn_vgg16_cifar10_100.last.pth')
    run(snn, '--no-gpu', '--resume', '--epochs', 3, *SMALL[4:-1])
    assert locked[1:] == ['snn_vgg16_cifar10_100.pth']
    assert load(folder / 'snn_vgg16_cifar10_100.last.pth')['epoch'] == 3


# -- flags ------------------------------------------------------------------------------------------------------------

def test_flags_of_a_conversion_hold_for_good(trained, capsys):
    start = [*SPIKING, *CALIBRATION, '--pretrained_ann', trained, '--scaling_factor', 0.6, '--name', 'sf']
    run(snn, *start, '--epochs', 1)
    for flag, value in (('scaling_factor', 0.3), ('threshold_percentile', 90), ('calibration_samples', 30),
                        ('calibration_timesteps', 31), ('default_threshold', 0.5)):
        fails(snn, f'--{flag} .*has no effect, as trained_models/snn/sf.last.pth was made with --{flag} ',
              *SPIKING, f'--{flag}', value, '--name', 'sf', '--epochs', 2, '--resume', 'auto')
        fails(snn, f'--{flag} .*has no effect, as trained_models/snn/sf.pth was made with --{flag} ',
              *SPIKING, f'--{flag}', value, '--pretrained_snn', 'trained_models/snn/sf.pth', '--epochs', 1)
    shutil.copy(trained, 'other.pth')
    fails(snn, '--pretrained_ann other.pth', *SPIKING, '--pretrained_ann', 'other.pth', '--name', 'sf', '--resume')
    fails(snn, '--pretrained_snn', *SPIKING, '--pretrained_snn', 'trained_models/snn/sf.pth', '--name', 'sf',
          '--resume')
    os.remove('other.pth')
    run(snn, *start, '--epochs', 2, '--resume', 'auto')  # the same command line goes on
    run(snn, *SMALL, '--timesteps', 8, '--name', 'sf', '--epochs', 3, '--resume')  # and so does one without them
    run(snn, *SMALL, '--pretrained_snn', 'trained_models/snn/sf.pth', '--name', 'more', '--epochs', 1)
    for name, before in (('sf', trained), ('more', None)):
        for each in (metrics_of(f'logs/snn/{name}.jsonl')[0], load(f'trained_models/snn/{name}.last.pth')):
            args = each['args']
            assert {key: args[key] for key in (*convert_flags, 'pretrained_ann')} == {
                'scaling_factor': 0.6, 'threshold_percentile': 100, 'calibration_samples': 20,
                'calibration_timesteps': 30, 'default_threshold': 0.3, 'pretrained_ann': before}


convert_flags = ('scaling_factor', 'threshold_percentile', 'calibration_samples', 'calibration_timesteps',
                 'default_threshold')


QCFS = ['--activation', 'QCFS', '--levels', 4, '--batch_norm']
LEARN = ['--learn_threshold', '--learn_leak', '--activation', 'Linear', '--gamma', 0.5]
STEPS = ['--timesteps', 8, *CALIBRATION[:-1], 40]
KINDS = {  # of runs: the script, the flags of the network that it begins with, its own
    'ann': (ann, None, []), 'ann, QCFS': (ann, None, QCFS), 'ann, idle flags': (ann, None, ['--image_size', 9]),
    'ann from ann': (ann, (ann, []), []), 'ann from QCFS': (ann, (ann, QCFS), ['--levels', 2]),
    'snn from ann': (snn, (ann, []), [*STEPS, '--default_threshold', 0.3]),
    'snn from ann, blocks': (snn, (ann, []), [*STEPS, '--balance_blocks']),
    'snn from ann, auto': (snn, (ann, []), [*STEPS, '--scaling_factor', 'auto', '--encoding', 'direct', '--delay', 0]),
    'snn from ann, plain': (snn, (ann, []), [*STEPS, '--output', 'mean', '--threshold_percentile', 99]),
    'snn from QCFS': (snn, (ann, QCFS), ['--timesteps', 2]),
    'snn from QCFS, blocks': (snn, (ann, QCFS), ['--timesteps', 2, '--balance_blocks']),
    'snn from QCFS, learning': (snn, (ann, QCFS), ['--timesteps', 2, *LEARN]),
    'snn from snn': (snn, (snn, STEPS), ['--timesteps', 9, '--leak', 0.9]),
    'snn from snn, learning': (snn, (snn, [*STEPS, *LEARN]), ['--no-learn_leak']),
    'snn from scratch': (snn, None, STEPS),
    'snn from scratch, threshold': (snn, None, ['--timesteps', 8, '--default_threshold', 0.4])}


@pytest.mark.parametrize('kind, architecture', [
    (kind, name) for kind in KINDS for name in ('VGG5', 'RESNET6') if name == 'VGG5' or KINDS[kind][0] is snn])
def test_a_resumed_run_records_what_an_unbroken_one_does(kind, architecture, monkeypatch):
    monkeypatch.setattr('self_models.layers.VGG_HIDDEN', 64)  # it is quicker
    (module, began, flags), network = KINDS[kind], ['-a', architecture, '--dataset', 'DIGITS']
    if began:
        run(began[0], *network, *SMALL[4:], *began[1], '--epochs', 1, '--name', 'b')
        of = began[0].__name__
        network, flags = [], [*flags, f'--pretrained_{of}', f'trained_models/{of}/b.pth']
    recorded = []
    # unbroken, resumed by the same command, and by one that leaves to the checkpoint what it knows
    for epochs, more in ((1, [*network, *flags]), (2, [*network, *flags, '--resume']), (3, ['--resume'])):
        run(module, *SMALL[4:], *more, '--epochs', epochs, '--name', 'r')
        last = load(f'trained_models/{module.__name__}/r.last.pth')
        assert metrics_of(f'logs/{module.__name__}/r.jsonl')[0]['args'] == last['args'] and last['epoch'] == epochs
        recorded.append({key: value for key, value in last['args'].items() if key not in ('epochs', 'resume')})
        recorded[-1]['trained_on'] = last['trained_on']
    assert recorded[0] == recorded[1] == recorded[2]
    assert (recorded[0]['architecture'], recorded[0]['dataset']) == (architecture, 'DIGITS')


def test_blocks_are_balanced_at_conversion_or_never(monkeypatch, capsys):
    network = ['-a', 'RESNET6', '--dataset', 'DIGITS', *SMALL[4:]]
    run(ann, *network, '--epochs', 1, '--name', 'b')
    run(snn, *SMALL[4:], *STEPS, '--pretrained_ann', 'trained_models/ann/b.pth', '--epochs', 1, '--name', 'r')
    capsys.readouterr()
    run(snn, *SMALL[4:], '--epochs', 2, '--name', 'r', '--resume', '--balance_blocks')
    assert '--balance_blocks has no effect here' in capsys.readouterr().out
    assert metrics_of('logs/snn/r.jsonl')[0]['args']['balance_blocks'] is False


def test_a_resumed_run_shows_what_it_began_with(capsys):
    run(snn, *SPIKING, '--epochs', 1, '--name', 'a')
    capsys.readouterr()
    flags = [*SMALL, '--pretrained_snn', 'trained_models/snn/a.pth', '--epochs']
    run(snn, *flags, 2, '--name', 'whole')
    table = last_table(capsys)
    assert len(table) == 2 and table[0].startswith('loaded SNN')
    run(snn, *flags, 1, '--name', 'b')
    capsys.readouterr()
    run(snn, *flags, 2, '--name', 'b', '--resume')
    assert last_table(capsys) == table


def test_a_run_that_returns_to_former_images_resumes(tmp_path):
    for name, count in (('A', 4), ('B', 6)):
        pictures(tmp_path / name, 256, count)
    flags = ['-a', 'VGG5', '--dataset', 'FOLDER', '--image_size', 8, '--no-gpu', '--num_workers', 0]
    before = []
    for number, name in enumerate('ABA'):
        run(ann, *flags, '--data_dir', tmp_path / name, *before, '--epochs', 1, '--name', number)
        before = ['--pretrained_ann', f'trained_models/ann/{number}.pth']
    assert [entry['images'] for entry in load('trained_models/ann/2.pth')['trained_on']] == [4, 6, 4]
    fails(ann, 'was trained on a set of 4 images, and here are 6', *flags, '--data_dir', tmp_path / 'B', '--epochs', 2,
          '--name', 2, '--resume')
    run(ann, *flags, '--data_dir', tmp_path / 'A', '--epochs', 2, '--name', 2, '--resume')
    assert load('trained_models/ann/2.last.pth')['epoch'] == 2


def test_what_a_published_snn_does_not_say_is_not_recorded():
    run(snn, *SPIKING, '--epochs', 1, '--name', 'own')
    state = load('trained_models/snn/own.pth')
    torch.save({key: state[key] for key in ('state_dict', 'thresholds', 'timesteps', 'leak', 'activation')}, 'p.pth')
    fails(snn, '--scaling_factor 0.1: has no effect, as p.pth was made without', *SMALL, '--pretrained_snn', 'p.pth',
          '--scaling_factor', 0.1, '--epochs', 1)
    run(snn, *SMALL, '--pretrained_snn', 'p.pth', '--epochs', 1, '--name', 'q')
    args = metrics_of('logs/snn/q.jsonl')[0]['args']
    assert [args[key] for key in convert_flags] == [None] * 5
    state = load('trained_models/snn/q.pth')
    assert state['thresholds'] == [0.3] * 7
    run(snn, *SMALL, '--pretrained_snn', 'p.pth', '--epochs', 2, '--name', 'q', '--resume')
    assert summary.read('logs/snn/q.jsonl').done == 2


def test_the_ann_that_a_run_began_with_holds_for_good(trained):
    run(ann, *SMALL, '--pretrained_ann', trained, '--epochs', 1, '--name', 'a')
    fails(ann, '--pretrained_ann other.pth: has no effect', *SMALL, '--pretrained_ann', 'other.pth', '--epochs', 2,
          '--name', 'a', '--resume')
    run(ann, *SMALL, '--epochs', 2, '--name', 'a', '--resume')
    assert metrics_of('logs/ann/a.jsonl')[0]['args']['pretrained_ann'] == trained
    run(ann, *SMALL, '--pretrained_ann', os.path.relpath(trained), '--epochs', 3, '--name', 'a', '--resume')
    assert metrics_of('logs/ann/a.jsonl')[0]['args']['pretrained_ann'] == trained


@pytest.mark.parametrize('module, given, key, value, of', [
    (ann, ['--optimizer', 'Adam', '--momentum', 0.5], 'momentum', 0.9, '--optimizer SGD'),
    (ann, ['--no-amsgrad'], 'amsgrad', True, '--optimizer Adam'),
    (ann, ['--kernel_size', 5], 'kernel_size', 3, 'VGGs'), (ann, ['--image_size', 16], 'image_size', 32, 'FOLDER'),
    (snn, ['--activation', 'Linear', '--alpha', 0.7], 'alpha', 0.3, '--activation STDB'),
    (snn, ['--activation', 'Linear', '--beta', 0.7], 'beta', 0.01, '--activation STDB'),
    (snn, ['--gamma', 0.7], 'gamma', 0.3, '--activation Linear'),
    (snn, ['--activation', 'Linear', '--width', 2], 'width', 1.0, '--activation Rectangle or ATan'),
    (snn, ['--scaling_factor', 0.2], 'scaling_factor', 0.7, 'a conversion')])
def test_a_flag_that_means_nothing_is_said_and_not_recorded(module, given, key, value, of, capsys):
    flags = [*(SMALL if module is ann else SPIKING), *given, '--name', 'i']
    run(module, *flags, '--epochs', 1)
    assert re.search(rf'^--{key} has no effect here: it belongs to .*{of}', capsys.readouterr().out, re.M)
    run(module, *flags, '--epochs', 2, '--resume')  # the same command line goes on
    kind = module.__name__
    for args in (metrics_of(f'logs/{kind}/i.jsonl')[0]['args'], load(f'trained_models/{kind}/i.pth')['args']):
        assert args[key] == value


def test_what_a_run_began_with_may_be_gone_when_it_goes_on(trained):
    run(snn, *SPIKING, '--epochs', 1, '--name', 'first')
    for flag, network in (('--pretrained_snn', 'trained_models/snn/first.pth'), ('--pretrained_ann', trained)):
        began = Path(shutil.copy(network, 'began.pth'))
        flags = [*SPIKING, *(CALIBRATION if flag == '--pretrained_ann' else []), '--name', 's', flag, began]
        run(snn, *flags, '--epochs', 1, '--resume', 'auto')
        began.unlink()
        run(snn, *flags, '--epochs', 2, '--resume', 'auto')
        assert load('trained_models/snn/s.last.pth')['epoch'] == 2
        Path('trained_models/snn/s.last.pth').unlink()
        fails(snn, f'{began}: there is no such file', *flags, '--epochs', 2, '--resume', 'auto')


def test_a_threshold_for_all_means_nothing_where_a_vgg_is_converted(monkeypatch, capsys):
    monkeypatch.setattr('self_models.layers.VGG_HIDDEN', 64)  # it is quicker
    vgg = ['-a', 'VGG5', *SMALL[2:], '--name', 'v']
    run(ann, *vgg, '--epochs', 1)
    flags = [*vgg, *CALIBRATION, '--timesteps', 8, '--default_threshold', 0.2, '--pretrained_ann',
             'trained_models/ann/v.pth', '--epochs']
    run(snn, *flags, 1)
    assert '--default_threshold has no effect here: it belongs to ResNets' in capsys.readouterr().out
    run(snn, *flags, 2, '--resume')  # the same command line goes on
    assert load('trained_models/snn/v.last.pth')['args']['default_threshold'] == 1.0


def test_a_test_says_that_it_heeds_no_flag_of_training(trained, capsys):
    flags = ['--epochs', 3, '-lr', 0.1, '--label_smoothing', 0.1, '--dropout', 0.1, '--tensorboard']
    for module, more in ((ann, []), (snn, [*FEW_STEPS, *CALIBRATION])):
        run(module, *SMALL, *more, '--pretrained_ann', trained, '--test_only', *flags)
        said = re.findall(r'^--(\w+) has no effect here: it belongs to training$', capsys.readouterr().out, re.M)
        assert said == ['dropout', 'epochs', 'label_smoothing', 'learning_rate', 'tensorboard']


@pytest.mark.parametrize('optimizer, flags', [('SGD', ['--no-amsgrad']), ('SGD', ['--image_size', 16]),
                                              ('Adam', ['--momentum', 0.1])])
def test_resume_refuses_no_flag_that_means_nothing(optimizer, flags):
    run(ann, *SMALL, '--optimizer', optimizer, '--epochs', 1)
    run(ann, *SMALL, '--optimizer', optimizer, '--epochs', 2, '--resume', *flags)


def test_resume_refuses_another_amsgrad_under_adam():
    run(ann, *SMALL, '--optimizer', 'Adam', '--epochs', 1)
    fails(ann, 'was trained with --amsgrad True', *SMALL, '--optimizer', 'Adam', '--epochs', 2, '--resume',
          '--no-amsgrad')


# -- checkpoints of other versions -------------------------------------------------------------------------------------

FORMER = [Path(__file__).parent / 'checkpoints' / version for version in ('a109e0c', 'trained_on')]


@pytest.mark.parametrize('folder', FORMER, ids=lambda folder: folder.name)
def test_checkpoints_of_former_versions_are_tested_resumed_and_built_on(folder, capsys):
    """Their weights are of one value each, so that the files are small. They say more from version to version."""
    flags = [*SMALL[4:], '--optimizer', 'SGD', '--validation_fraction', 0.1]
    of_ann, start = [*SMALL[:4], *flags], ['--pretrained_ann', folder / 'ann.pth']
    run(ann, *of_ann, *start, '--test_only')
    run(ann, *of_ann, '--resume', folder / 'ann.pth', '--epochs', 2, '--name', 'a')
    assert [entry['epoch'] for entry in load('trained_models/ann/a.last.pth')['history']] == [1, 2]
    run(snn, *of_ann, *CALIBRATION, *start, '--timesteps', 12, '--default_threshold', 0.3, '--seed', 1, '--test_only')
    said = f'held out, as in the training of {folder / "ann.pth"} by seed 0; {folder / "ann.pth"} was trained on 0 of'
    assert said in capsys.readouterr().out
    run(snn, '--no-gpu', '--test_samples', 20, '--pretrained_snn', folder / 'snn.pth', '--test_only')
    run(snn, *flags, '--resume', folder / 'snn.pth', '--epochs', 2, '--name', 's')
    state = load('trained_models/snn/s.last.pth')
    assert [entry['epoch'] for entry in state['history']] == [0, 1, 2] and state['timesteps'] == 12
    assert (state['args']['scaling_factor'], state['args']['pretrained_ann']) == (0.6, 'trained_models/ann/ann.pth')


# -- images held out --------------------------------------------------------------------------------------------------

def contents(dataset):
    return {image.numpy().tobytes() for image in dataset.images}


def spy(monkeypatch):
    """A list that is given the data of every run."""
    seen, original = [], data.load
    monkeypatch.setattr(data, 'load', lambda *args: seen.append(original(*args)) or seen[-1])
    return seen


def test_an_snn_holds_out_what_its_ann_did(trained, monkeypatch, capsys):
    never_seen = contents(data.load('DIGITS', '', sampling=data.Sampling(validation_fraction=0.1)).validation)
    seen = spy(monkeypatch)
    flags = [*SPIKING, *CALIBRATION, '--validation_fraction', 0.1, '--seed', 1, '--epochs', 1]
    run(snn, *flags, '--pretrained_ann', trained, '--name', 's')
    said = f'144 images are held out, as in the training of {trained} by seed 0; {trained} was trained on 0 of them'
    assert said in capsys.readouterr().out.splitlines()
    run(snn, *flags[:-2], '--epochs', 2, '--name', 's', '--resume')
    run(snn, *SMALL, '--pretrained_snn', 'trained_models/snn/s.pth', '--validation_fraction', 0.1, '--seed', 2,
        '--epochs', 1, '--name', 't')
    run(ann, *SMALL, '--pretrained_ann', trained, '--validation_fraction', 0.1, '--seed', 3, '--epochs', 1)
    assert len(seen) == 4
    for each in seen:
        assert contents(each.validation) == never_seen and not contents(each.train) & never_seen
    assert metrics_of('logs/snn/t.jsonl')[0]['args']['split_seed'] == 0
    assert [entry['seed'] for entry in load('trained_models/snn/t.pth')['trained_on']] == [0, 0]


def test_a_folder_of_pictures_may_have_moved(tmp_path, monkeypatch, capsys):
    for n in range(24):
        for part in ('train', 'test'):
            path = tmp_path / 'old' / part / f'class{n % 2}' / f'{n}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('L', (8, 8), 9 * n).save(path)
    monkeypatch.chdir(tmp_path)
    flags = ['-a', 'RESNET6', '--dataset', 'FOLDER', '--image_size', 8, '--no-gpu', '--num_workers', 0, '--epochs', 1,
             '--validation_fraction', 0.5]
    run(ann, *flags, '--data_dir', 'old', '--name', 'a')
    (tmp_path / 'old').rename('new')
    capsys.readouterr()
    run(ann, *flags, '--data_dir', 'new', '--name', 'b', '--seed', 1, '--pretrained_ann', 'trained_models/ann/a.pth')
    said = (f'12 images are held out, as in the training of trained_models/ann/a.pth by seed 0; '
            'trained_models/ann/a.pth was trained on 0 of them, as far as is known: its pictures, of '
            f'{tmp_path / "old"}, are taken for these')
    assert said in capsys.readouterr().out.splitlines()
    state = load('trained_models/ann/b.pth')
    first, last = state['trained_on'][0], {**state['trained_on'][0], 'seed': 5, 'data_dir': str(tmp_path / 'new')}
    for images, seed in ((99, 5), (24, 0)):  # a folder of other pictures, and one that may be this one
        torch.save({**state, 'trained_on': [{**first, 'data_dir': '/elsewhere', 'images': images}, last]}, 'both.pth')
        run(ann, *flags, '--data_dir', 'new', '--name', 'd', '--seed', 1, '--pretrained_ann', 'both.pth')
        assert f'as in the training of both.pth by seed {seed}' in capsys.readouterr().out
    (tmp_path / 'new/train/class0/0.png').unlink()  # not as many: other pictures, as far as is known
    run(ann, *flags, '--data_dir', 'new', '--name', 'c', '--pretrained_ann', 'trained_models/ann/a.pth')
    assert 'other images, too, of FOLDER' in capsys.readouterr().out


def test_of_several_trainings_the_split_of_the_first_is_taken(trained, capsys):
    run(ann, *SMALL, '--pretrained_ann', trained, '--seed', 1, '--epochs', 1, '--name', 'a')
    capsys.readouterr()
    run(ann, *SMALL, '--pretrained_ann', 'trained_models/ann/a.pth', '--seed', 2, '--epochs', 1, '--name', 'b',
        '--validation_fraction', 0.1)
    order = [torch.randperm(1437, generator=torch.Generator().manual_seed(seed)).tolist() for seed in (0, 1)]
    seen = len(set(order[0][-144:]) & set(order[1][:32]))  # by seed 1 it would be nine of ten
    assert 0 < seen < 10
    assert f'a.pth by seed 0; trained_models/ann/a.pth was trained on {seen} of them' in capsys.readouterr().out


@pytest.mark.parametrize('ann_flags, seed, of', [
    (['--validation_fraction', 0.05], 0, 0.05), ([], 0, 0), (['--train_samples', 100], 0, 0)])
def test_how_many_images_held_out_were_trained_on_is_said(ann_flags, seed, of, monkeypatch, capsys):
    run(ann, *SMALL[:4], '--test_samples', 20, '--no-gpu', '--epochs', 1, *ann_flags)
    count = {'validation_fraction': of, 'train_samples': 100 if '--train_samples' in ann_flags else None}
    trained_on = contents(data.load('DIGITS', '', sampling=data.Sampling(seed=seed, **count)).train)
    seen = spy(monkeypatch)
    capsys.readouterr()
    run(ann, *SMALL, '--pretrained_ann', 'trained_models/ann/ann_resnet6_digits.pth', '--validation_fraction', 0.1,
        '--seed', 1, '--epochs', 1, '--name', 'b')
    overlap = len(contents(seen[0].validation) & trained_on)
    assert overlap == {0.05: 72, 0: 0 if '--train_samples' in ann_flags else 144}[of]  # digits has no image twice
    assert f'was trained on {overlap} of them\n' in capsys.readouterr().out


def test_a_former_version_and_a_published_file_say_what_they_can(trained, capsys):
    state = load(trained)
    del state['trained_on'], state['args']['split_seed']
    torch.save(state, 'former.pth')
    torch.save({'state_dict': state['state_dict']}, 'published.pth')
    torch.save({**state, 'args': {**state['args'], 'dataset': 'MNIST'}}, 'mnist.pth')
    flags = [*SMALL, '--validation_fraction', 0.1, '--seed', 1, '--epochs', 1, '--pretrained_ann']
    for file, said in (('former', 'as in the training of former.pth by seed 0; former.pth was trained on 0 of them'),
                       ('published', 'by seed 1; published.pth was trained on 0 of them, as far as is known: it does '
                                     'not say all that it was trained on'),
                       ('mnist', 'by seed 1; mnist.pth was trained on 0 of them, as far as is known: it was trained on '
                                 'other images, too, of MNIST')):
        run(ann, *flags, f'{file}.pth')
        assert f'144 images are held out, {said}' in capsys.readouterr().out


def test_without_images_held_out_the_seed_alone_decides(trained, monkeypatch):
    wanted = data.load('DIGITS', '', sampling=data.Sampling(train_samples=32, seed=1)).train.images
    seen = spy(monkeypatch)
    run(ann, *SMALL, '--pretrained_ann', trained, '--seed', 1, '--epochs', 1)
    assert torch.equal(seen[0].train.images, wanted)
    assert seen[0].validation is None


@pytest.mark.parametrize('fraction', [0.0003, 1e-9])
def test_a_fraction_that_holds_out_no_image(fraction):
    fails(ann, f'--validation_fraction {fraction} holds out none of 1437 train images; hold out a larger part', *SMALL,
          '--validation_fraction', fraction)


# -- other images -----------------------------------------------------------------------------------------------------

def test_a_network_of_other_classes_is_said_to_be_and_does_not_go_on(trained, capsys):
    state = load(trained)
    torch.save({**state, 'classes': ['oh', *state['classes'][1:]]}, 'other.pth')
    line = 'other.pth: its output 0 is the class oh, which is 0 here; it was trained on other classes'
    images = [*SMALL, '--validation_fraction', 0.1]
    for module, flags in ((ann, ['--test_only']), (ann, ['--epochs', 1]),
                          (snn, [*FEW_STEPS, *CALIBRATION, '--test_only'])):
        for path, times in ((trained, 0), ('other.pth', 1)):
            capsys.readouterr()
            run(module, *images, '--pretrained_ann', path, *flags)
            assert capsys.readouterr().out.splitlines().count(line) == times
    last = str(trained).replace('.pth', '.last.pth')
    torch.save({**load(last), 'classes': ['oh', *state['classes'][1:]]}, 'other.last.pth')
    fails(ann, 'other.last.pth: its output 0 is the class oh, which is 0 here; resume with the same', *images,
          '--optimizer', 'Adam', '--epochs', 5, '--name', 'r', '--resume', 'other.last.pth')
    torch.save({**load(last), 'trained_on': [{**state['trained_on'][0], 'images': 1436}]}, 'other.last.pth')
    fails(ann, 'was trained on a set of 1436 images, and here are 1437; resume with the same', *images,
          '--optimizer', 'Adam', '--epochs', 5, '--name', 'r', '--resume', 'other.last.pth')
    assert not list(Path().rglob('r*.pth')) and not Path('logs/ann/r.jsonl').exists()


# -- cached thresholds ------------------------------------------------------------------------------------------------

def pictures(folder, top, count=8):
    draw = np.random.default_rng(0)
    for part in ('train', 'test'):
        for number in range(count):
            path = folder / part / 'ab'[number % 2] / f'{number}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((draw.random((16, 16, 3)) * top).astype(np.uint8)).save(path)


def test_cached_thresholds_are_those_of_the_pictures_wherever_they_lie(tmp_path, capsys, monkeypatch):
    pictures(tmp_path / 'pics', 256)
    flags = ['-a', 'RESNET6', '--dataset', 'FOLDER', '--image_size', 16, '--no-gpu', '--num_workers', 0]
    run(ann, *flags, '--data_dir', 'pics', '--epochs', 1)
    path = tmp_path / 'trained_models/ann/ann_resnet6_folder.pth'

    def thresholds(folder, *more):
        capsys.readouterr()
        run(snn, *flags, '--data_dir', folder, '--pretrained_ann', path, '--timesteps', 8, '--default_threshold', 0.1,
            '--calibration_timesteps', 30, '--test_only', *more)
        out = capsys.readouterr().out
        return 'thresholds taken from' in out, re.search('^thresholds: (.*)$', out, re.M)[1]

    cached, first = thresholds('pics')
    assert not cached and thresholds(tmp_path / 'pics') == (True, first)
    (tmp_path / 'pics').rename(tmp_path / 'moved')
    assert thresholds('moved') == (True, first)
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    pictures(Path('moved'), 50)  # other pictures under the same relative name
    cached, dark = thresholds('moved')
    assert not cached and dark != first
    for change in (['--seed', 1], ['--threshold_percentile', 99], ['--calibration_samples', 4],
                   ['--calibration_timesteps', 31]):
        assert not thresholds('../moved', *change)[0] and thresholds('../moved', *change)[0]
    # a cache of a former version, which knew the folder only
    cache = Path(f'{path}.thresholds.json')
    entry = json.loads(cache.read_text())
    entry['key'] = {key: value for key, value in entry['key'].items() if key != 'images'} | {'data_dir': '../moved'}
    cache.write_text(json.dumps(entry))
    assert not thresholds('../moved', *change)[0]


# -- leftovers --------------------------------------------------------------------------------------------------------

WRITER = ('import sys; from pathlib import Path; from experiment import files\n'
          'def write(file):\n'
          '    file.write(b"half"); file.flush(); print(flush=True); file.write(sys.stdin.readline().encode())\n'
          'files.write_atomically(Path(sys.argv[1]), write)')


@pytest.fixture
def writer(tmp_path):
    """Start a process that has written half of a file and waits for a line, the rest."""
    processes = []

    def start(path):
        processes.append(subprocess.Popen([sys.executable, '-c', WRITER, str(path)], cwd=ROOT, text=True,
                                          stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        processes[-1].stdout.readline()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.mark.parametrize('name', ['a.pth.thresholds.json', 'report.json', 'net.nir'])
def test_what_a_killed_process_left_half_written_goes_with_the_next_write_and_no_other(tmp_path, name, writer):
    dead = writer(tmp_path / name)
    dead.kill()
    dead.wait()
    assert os.listdir(tmp_path) == [f'{name}.tmp']
    (tmp_path / f'other.{name}.tmp').touch()
    files.write_atomically(tmp_path / name, lambda file: file.write(b'w'))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: b'w', f'other.{name}.tmp': b''}


def test_of_two_processes_that_write_one_file_the_second_waits_for_the_first(tmp_path, writer):
    path, locks, lockf = tmp_path / 'report.json', [], files.fcntl.lockf
    first = writer(path)

    def wait(*given):  # until the first has ended
        locks.append(path.exists())
        if not locks[1:]:
            threading.Timer(0.2, first.communicate, ['whole']).start()
        lockf(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.fcntl, 'lockf', wait)
        files.write_atomically(path, lambda file: file.write(path.read_bytes() + b', and the second'))
    assert locks == [False, True]  # the file that it had opened is the first's by then: it takes another
    assert path.read_bytes() == b'halfwhole, and the second' and os.listdir(tmp_path) == ['report.json']


def test_without_locks_two_processes_that_write_one_file_share_no_temporary_name(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'fcntl', None)
    seen = []

    def write(file):
        seen.append(file)
        file.write(b'first')
        if not seen[1:]:
            files.write_atomically(tmp_path / 'x', write)
            assert (tmp_path / 'x').read_bytes() == b'first'

    def replace(source, target):  # as on Windows, which moves no open file
        assert all(file.closed for file in seen if file.name == source)
        move(source, target)

    move = os.replace
    monkeypatch.setattr(files.os, 'replace', replace)
    files.write_atomically(tmp_path / 'x', write)
    assert len({str(file.name) for file in seen}) == 2 and os.listdir(tmp_path) == ['x']
