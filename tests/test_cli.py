"""ann.py and snn.py as their user runs them, on the digits that scikit-learn ships."""
import copy
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import ann
import self_models
import snn
from conftest import ROOT, same
from experiment import UserError, convert, data, engine, options, setup

SMALL = ['-a', 'RESNET6', '--dataset', 'DIGITS', '--train_samples', '96', '--test_samples', '50', '--no-gpu']
SPIKING = [*SMALL, '--timesteps', '8', '--default_threshold', '0.3']
CALIBRATION = ['--calibration_samples', '20', '--calibration_timesteps', '30']


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(module, *flags):
    module.main(module.get_args_parser().parse_args([str(flag) for flag in flags]))


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The checkpoint of an ANN that has learned something."""
    folder, before = tmp_path_factory.mktemp('trained'), os.getcwd()
    os.chdir(folder)
    try:
        run(ann, '-a', 'RESNET6', '--dataset', 'DIGITS', '--epochs', 4, '--optimizer', 'Adam', '-lr', '1e-3',
            '--no-gpu')
    finally:
        os.chdir(before)
    return str(folder / 'trained_models' / 'ann' / 'ann_resnet6_digits.pth')


@pytest.mark.parametrize('error', [
    MemoryError(), RuntimeError('CUDA out of memory. Tried to allocate'), RuntimeError("can't allocate memory: 9 B"),
    RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'), RuntimeError('a bug')])
def test_out_of_memory_is_said_and_a_bug_is_not_hidden(error, monkeypatch):
    def main(args):
        raise error
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    with pytest.raises(RuntimeError if str(error) == 'a bug' else SystemExit, match='a bug|lower --batch_size'):
        options.run(main, None, 'ann.py')


# -- flags ------------------------------------------------------------------------------------------------------------

PUBLISHED = {  # of both scripts
    'seed': 0, 'dataset': 'CIFAR10', 'batch_size': 64, 'architecture': 'VGG16', 'epochs': 300,
    'lr_interval': '0.60 0.80 0.90', 'lr_reduce': 10, 'weight_decay': 5e-4, 'amsgrad': True, 'kernel_size': 3,
    'devices': '0', 'log': False, 'test_only': False, 'pretrained_ann': None}


@pytest.mark.parametrize('module, more', [
    (ann, {'learning_rate': 1e-2, 'optimizer': 'SGD', 'momentum': 0.9, 'dropout': 0.2}),
    (snn, {'learning_rate': 1e-4, 'optimizer': 'Adam', 'momentum': 0.95, 'dropout': 0.3, 'pretrained_snn': None,
           'timesteps': 100, 'leak': 1.0, 'scaling_factor': 0.7, 'default_threshold': 1.0, 'activation': 'STDB',
           'alpha': 0.3, 'beta': 0.01, 'gamma': 0.3, 'test_acc_every_batch': False, 'train_acc_batches': 200,
           'calibration_samples': 512, 'calibration_timesteps': 1000})])
def test_published_defaults(module, more):
    args = vars(module.get_args_parser().parse_args([]))
    assert {**PUBLISHED, **more}.items() <= args.items()
    assert args['given'] == set()


def test_published_short_names():
    args = ann.get_args_parser().parse_args(['-s', '3', '-a', 'vgg5', '-lr', '0.5'])
    assert (args.seed, args.architecture, args.learning_rate) == (3, 'VGG5', 0.5)
    assert args.given == {'seed', 'architecture', 'learning_rate'}


@pytest.mark.parametrize('words, value', [
    ([], None), (['--gpu'], True), (['--no-gpu'], False), (['--gpu', 'False'], False), (['--gpu', 'true'], True),
    (['--gpu', '0'], False), (['--no-gpu', '--gpu'], True)])
def test_booleans_do_what_they_say(words, value):
    assert ann.get_args_parser().parse_args(words).gpu is value


@pytest.mark.parametrize('script, flags', [
    ('ann.py', ['--architecture', 'VGG7']), ('ann.py', ['--dataset', 'SVHN']), ('ann.py', ['--epochs', '0']),
    ('ann.py', ['--epochs', '2.5']), ('ann.py', ['--batch_size', '-1']), ('ann.py', ['--learning_rate', 'nan']),
    ('ann.py', ['--learning_rate', '0']), ('ann.py', ['--dropout', '1']), ('ann.py', ['--kernel_size', '2']),
    ('ann.py', ['--lr_interval', '0.5 x']), ('ann.py', ['--lr_interval', '1.5']), ('ann.py', ['--gpu', 'maybe']),
    ('ann.py', ['--no-gpu', 'True']), ('ann.py', ['--optimizer', 'RMSprop']), ('ann.py', ['--seed', '-1']),
    ('ann.py', ['--name', '../x']), ('ann.py', ['--name', 'x.last']), ('ann.py', ['--name', 'a\nb']),
    ('ann.py', ['--pretrained_ann', '']), ('ann.py', ['--seed', '9' * 30]),
    ('ann.py', ['--resume', '']), ('ann.py', ['--devices', 'a']), ('ann.py', ['--epoch', '3']),
    ('ann.py', ['--timesteps', '5']), ('ann.py', ['--momentum', '2']), ('ann.py', ['--weight_decay', '-1']),
    ('ann.py', ['--train_samples', '0']), ('ann.py', ['--lr_reduce', '0']), ('ann.py', ['--seed']),
    ('snn.py', ['--timesteps', '0']), ('snn.py', ['--leak', '0']), ('snn.py', ['--leak', '1.01']),
    ('snn.py', ['--scaling_factor', '0']), ('snn.py', ['--scaling_factor', '-0.7']),
    ('snn.py', ['--default_threshold', '0']), ('snn.py', ['--activation', 'ReLU']), ('snn.py', ['--alpha', 'inf']),
    ('snn.py', ['--beta', '-1']), ('snn.py', ['--scaling_factor', 'best']),
    ('snn.py', ['--threshold_percentile', '0']), ('snn.py', ['--threshold_percentile', '101']),
    ('snn.py', ['--calibration_samples', '0']), ('snn.py', ['--train_acc_batches', '0']),
    ('snn.py', ['--pretrained_ann', 'a', '--pretrained_snn', 'b'])])
def test_bad_flags_end_with_status_2(script, flags, capsys):
    module = {'ann.py': ann, 'snn.py': snn}[script]
    with pytest.raises(SystemExit) as caught:
        module.get_args_parser().parse_args(flags)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count('\n') == 1
    assert message.startswith(f'{script}: error: ') and flags[0] in message


# -- what goes wrong ends in one line ---------------------------------------------------------------------------------

def fails(module, words, *flags):
    with pytest.raises(UserError, match=words) as caught:
        run(module, *flags)
    assert '\n' not in str(caught.value)


def test_user_errors_are_one_line_and_status_1(command):
    done = command('snn.py', *SPIKING, '--pretrained_ann', 'none.pth')
    assert done.returncode == 1
    assert done.stderr == ('snn.py: error: none.pth: there is no such file; '
                           'give the path of a checkpoint that ann.py wrote\n')
    done = command('ann.py', '--dataset', 'FOLDER', '--data_dir', 'nowhere')
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'nowhere' in done.stderr


def test_network_and_data_that_do_not_go_together():
    fails(ann, 'VGG9 halves the image 4 times', '-a', 'VGG9', '--dataset', 'DIGITS')
    fails(snn, 'VGG9 halves the image 4 times', '-a', 'VGG9', '--dataset', 'DIGITS')


def test_more_samples_than_there_are():
    fails(ann, 'there are 1437 train images', *SMALL, '--train_samples', 2000)


def test_a_value_with_spaces_wants_quotes(capsys):
    for flags, said in ((['--lr_interval', '0.6', '0.8'], True), (['--epoch', '3'], False)):
        with pytest.raises(SystemExit) as stopped:
            ann.get_args_parser().parse_args(flags)
        assert stopped.value.code == 2 and ('wants quotes' in capsys.readouterr().err) is said


@pytest.mark.skipif(torch.cuda.is_available(), reason='CUDA is present')
def test_cuda_asked_for_and_absent():
    fails(ann, 'no CUDA device', *SMALL[:-1], '--gpu')


def test_checkpoints_of_other_networks(trained):
    fails(snn, r'RESNET6 for DIGITS.*no features\.0\.weight', '-a', 'VGG5', '--dataset', 'DIGITS', '--pretrained_ann',
          trained)
    fails(ann, r'no layer3\.0\.', '-a', 'RESNET12', '--dataset', 'DIGITS', '--pretrained_ann', trained)
    fails(snn, 'holds an ANN.*--pretrained_ann', *SPIKING, '--pretrained_snn', trained)


def test_a_loss_that_is_not_finite():
    fails(ann, 'loss became (nan|inf).*--learning_rate', *SMALL, '-lr', '1e30', '--epochs', 3)


def test_a_loss_that_is_not_finite_after_the_last_step_costs_no_checkpoint():
    whole = ('--batch_size', 96)  # one step an epoch: what it does is only seen in the test
    run(ann, *SMALL, *whole, '--epochs', 1)
    path = Path('trained_models/ann/ann_resnet6_digits.last.pth')
    before = path.read_bytes()
    fails(ann, 'loss became nan after epoch 2.*--learning_rate', *SMALL, *whole, '-lr', '1e30', '--epochs', 2,
          '--resume')
    assert path.read_bytes() == before


def test_a_network_that_diverges_says_where_and_leaves_the_last_whole_checkpoint():
    # a NaN potential passes no threshold, so the network falls silent, and the loss of silence is finite: ln 10
    flags = ['-a', 'RESNET6', '--dataset', 'DIGITS', '--train_samples', 64, '--test_samples', 32, '--no-gpu',
             '--timesteps', 12, '--optimizer', 'SGD', '--default_threshold', 0.01]
    run(snn, *flags, '-lr', '1e-9', '--epochs', 1)
    folder = Path('trained_models/snn')
    before = {path.name: path.read_bytes() for path in folder.glob('*.pth')}
    for batch_size, where in ((64, 'after epoch 2'), (16, 'at batch 2')):
        fails(snn, f'loss became nan {where}, as the weights of pre_process.0 left the finite range.*--learning_rate',
              *flags, '-lr', '1e30', '--batch_size', batch_size, '--epochs', 2, '--resume')
        assert {path.name: path.read_bytes() for path in folder.glob('*.pth')} == before


def test_what_is_not_finite_is_named():
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    for model, named in ((self_models.ResNet('RESNET6', dataset='DIGITS'), 'the output of layer1.0.residual.0'),
                         (self_models.RESNET_SNN_STDB('RESNET6', dataset='DIGITS', timesteps=12, default_threshold=0.1),
                          'the membrane potentials of layer1.0.residual.0')):
        with torch.no_grad():
            model.layer1[0].residual[0].weight.fill_(3e38)  # finite, but sums of it are not
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        loader = data.epoch_loader(data.Pictures((images * 255).byte(), labels, signed=False), 4)
        with pytest.raises(UserError, match=f'at batch 1, as {named} left the finite range'):
            engine.train_epoch(model, loader, optimizer, engine.cross_entropy, torch.device('cpu'))
        assert same(before, model.state_dict())  # the step was not taken
        with torch.no_grad():
            model.classifier[0].weight[2] = torch.inf
        with pytest.raises(UserError, match='the weights of classifier.0 left the finite range after epoch 3'):
            engine.check_finite(1.0, 'after epoch 3', model)


def test_a_scaling_factor_that_is_too_large(trained):
    fails(snn, r'--scaling_factor 3.4e\+38: a threshold', *SPIKING, *CALIBRATION, '--pretrained_ann', trained,
          '--scaling_factor', '3.4e38')


def test_bfloat16_without_instructions_for_it_is_said(monkeypatch):
    cpu, plain, amp = torch.device('cpu'), *map(ann.get_args_parser().parse_args, ([], ['--amp']))
    for supported, said in ((True, 0), (False, 1)):
        monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda answer=supported: answer)
        assert (len(setup.notes(amp, cpu)), len(setup.notes(plain, cpu))) == (said, 0)
    assert setup.notes(amp, torch.device('cuda')) == []


def test_the_device_of_a_run_becomes_the_current_one(monkeypatch):
    current = []
    for name, function in (('is_available', lambda: True), ('device_count', lambda: 2), ('set_device', current.append)):
        monkeypatch.setattr(torch.cuda, name, function)
    device = setup.set_up_device(ann.get_args_parser().parse_args(['--devices', '1']))
    assert current == [device] == [torch.device('cuda', 1)]


def test_no_progress_stops_the_run(monkeypatch):
    monkeypatch.setattr(engine, 'test', lambda *_: engine.Metrics(2.3, 0.1))
    fails(snn, 'does not progress.*10.00%', *SPIKING, '--epochs', 10, '--train_samples', 8, '--timesteps', 6)
    assert load('trained_models/snn/snn_resnet6_digits_6.last.pth')['epoch'] == 6


@pytest.mark.parametrize('module, flags', [(ann, SMALL), (snn, SPIKING)])
def test_a_folder_that_cannot_be_written(module, flags):
    Path('trained_models').write_text('in the way')
    fails(module, 'trained_models.*cannot write', *flags, '--epochs', 1)


def test_operating_system_errors_are_one_line(command, tmp_path):
    (tmp_path / 'logs').write_text('in the way')
    done = command('ann.py', *SMALL, '--epochs', 1, '--log')
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'logs' in done.stderr


def test_resume_without_a_checkpoint(trained):
    fails(ann, 'there is no trained_models/ann/ann_resnet6_digits.last.pth', *SMALL, '--resume')
    fails(ann, 'no such file', *SMALL, '--resume', 'none.pth')
    fails(ann, 'was trained with --optimizer Adam', *SMALL, '--resume', trained)


def test_a_dead_layer_is_named_with_its_flag(trained):
    fails(snn, r'pre_process\.3 never receives a spike.*--calibration_timesteps', *SPIKING, '--pretrained_ann', trained,
          '--calibration_timesteps', 1)


# -- runs -------------------------------------------------------------------------------------------------------------

def test_learning_rate_schedule():
    args = ann.get_args_parser().parse_args(['--epochs', '10', '-lr', '1'])
    rates = [engine.learning_rate_at(epoch, args) for epoch in range(1, 11)]
    assert rates == pytest.approx([1] * 5 + [0.1] * 2 + [0.01] + [0.001] * 2)
    args.lr_reduce = 1e200  # whose square no float holds
    assert engine.learning_rate_at(10, args) == 0
    args.epochs = 1
    assert engine.learning_rate_at(1, args) == 1


def test_ann_run_writes_what_it_says(command, tmp_path):
    flags = [*SMALL, '--epochs', '2', '--lr_interval', '0.5 0.9', '--log', '--name', 'mine']
    done = command('ann.py', *flags)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / 'logs/ann/mine.log').read_text()
    assert '\r' not in log  # no trace of a progress bar
    said = re.search(r'^command: (.*)$', log, re.M).group(1)
    assert shlex.split(said) == ['python', str(ROOT / 'ann.py'), *flags]
    for words in ('architecture: RESNET6', 'kernel_size: 3', '(pre_process)', 'train loss', 'best test accuracy',
                  'chosen on the test set, as in the published code'):
        assert words in log
    lines = re.findall(r'^ +(\d+) +0\.\d+ +\d\.\d{4} +[\d.]+% +\d\.\d{4} +[\d.]+% +[\d.]+% +\d+s$', log, re.M)
    assert lines == ['1', '2']  # exactly --epochs of them
    state = load(tmp_path / 'trained_models/ann/mine.pth')
    assert {'accuracy', 'epoch', 'state_dict', 'optimizer', 'args'} <= state.keys()
    assert 0 <= state['accuracy'] <= 1 and state['args']['architecture'] == 'RESNET6'
    folder = tmp_path / 'trained_models/ann'
    assert sorted(path.name for path in folder.glob('*.pth')) == ['mine.last.pth', 'mine.pth']


class Killed(Exception):
    pass


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
    flags = [*SMALL, '--epochs', 4] if module is ann else [
        *SPIKING, *CALIBRATION, '--pretrained_ann', trained, '--epochs', 4]
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


@pytest.mark.parametrize('change', [
    {'optimizer': None}, {'optimizer': {}}, {'optimizer': 'text'}, {'epoch': 'one'}, {'epoch': -1}, {'best': None},
    {'best': [0.1]}, {'args': []}, {'history': [1]}])
def test_a_training_state_that_cannot_be_resumed(change):
    run(ann, *SMALL, '--epochs', 1)
    path = 'trained_models/ann/ann_resnet6_digits.last.pth'
    torch.save({**load(path), **change}, path)
    fails(ann, 'ann_resnet6_digits.last.pth: (holds no training|its optimizer state)', *SMALL, '--resume')


def test_an_optimizer_state_of_other_shapes_is_refused():
    run(ann, *SMALL, '--epochs', 1)
    path = 'trained_models/ann/ann_resnet6_digits.last.pth'
    state = load(path)
    state['optimizer']['state'][0]['momentum_buffer'] = torch.zeros(3)  # a fused step would write beyond it
    torch.save(state, path)
    fails(ann, 'its optimizer state does not fit', *SMALL, '--resume')


def test_flags_hold_on_resume(monkeypatch):
    run(ann, *SMALL, '--epochs', 1)
    seen, original = [], engine.train_epoch
    monkeypatch.setattr(engine, 'train_epoch', lambda *args: seen.append(args[2].param_groups[0]) or original(*args))
    run(ann, *SMALL, '--epochs', 2, '--resume', '--momentum', '0.5', '--weight_decay', '0')
    assert [(group['momentum'], group['weight_decay']) for group in seen] == [(0.5, 0)]


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


def test_another_runs_file_that_has_enough_epochs_already():
    run(ann, *SMALL, '--epochs', 1)
    fails(ann, '1 epochs are done already; a larger --epochs', *SMALL, '--epochs', 1, '--name', 'mine', '--resume',
          'trained_models/ann/ann_resnet6_digits.last.pth')
    assert not list(Path('trained_models/ann').glob('mine*.pth'))


@pytest.mark.parametrize('flags, said', [
    (['--validation_fraction', '0.3'], 'with --validation_fraction 0.0'), (['--seed', '1'], 'with --seed 0'),
    (['--test_samples', '40'], 'with --test_samples 50')])
def test_accuracies_of_other_images_are_not_compared_on_resume(flags, said):
    run(ann, *SMALL, '--epochs', 1)
    fails(ann, f'was trained {said};', *SMALL, '--epochs', 2, '--resume', *flags)
    run(ann, *SMALL, '--test_only', '--resume', *flags, '--optimizer', 'Adam')  # compares and trains nothing


@pytest.mark.parametrize('flags, said', [
    (['--timesteps', 9], 'with --timesteps 8'), (['--leak', 0.5], 'with --leak 1.0')])
def test_accuracies_of_other_neurons_are_not_compared_on_resume(flags, said):
    run(snn, *SPIKING, '--epochs', 1, '--name', 'mine')
    fails(snn, f'was trained {said};', *SPIKING, '--epochs', 2, '--name', 'mine', '--resume', *flags)


@pytest.mark.parametrize('module, flags', [(ann, SMALL), (snn, SPIKING)])
def test_a_name_is_taken_before_data_is_read(module, flags, monkeypatch):
    # which can take minutes, in which another run of the name could end
    def load_data(args):
        raise UserError('locked' if list(Path('trained_models', module.__name__).glob('.*.lock')) else 'open')
    monkeypatch.setattr(setup, 'load_data', load_data)
    fails(module, 'locked', *flags)


def test_a_run_that_fails_early_leaves_earlier_checkpoints_in_place():
    run(snn, *SPIKING, '--epochs', 1)
    folder = Path('trained_models/snn')
    before = {path.name: path.read_bytes() for path in folder.glob('*.pth')}
    fails(snn, 'no such file', *SPIKING, '--pretrained_ann', 'typo.pth')
    fails(snn, 'loss became', *SPIKING, '--epochs', 2, '-lr', '1e38', '--train_samples', 96, '--batch_size', 8)
    assert {path.name: path.read_bytes() for path in folder.glob('*.pth')} == before


def test_test_only_evaluates_what_it_resumes(capsys):
    run(snn, *SPIKING, '--epochs', 1)
    capsys.readouterr()
    run(snn, *SPIKING, '--test_only', '--resume')
    assert re.search(r'^loaded SNN: test accuracy', capsys.readouterr().out, re.M)


def test_resume_auto_starts_anew_where_there_is_nothing(capsys):
    run(ann, *SMALL, '--epochs', 1, '--resume', 'auto')
    assert 'resumed' not in capsys.readouterr().out
    run(ann, *SMALL, '--epochs', 2, '--resume', 'auto')
    assert 'resumed from trained_models/ann/ann_resnet6_digits.last.pth, after epoch 1' in capsys.readouterr().out


def test_test_only_wants_a_trained_ann():
    fails(ann, '--test_only: name the network', *SMALL, '--test_only')


def test_test_only_says_the_logged_accuracy_and_writes_nothing(trained, capsys, tmp_path):
    before = Path(trained).read_bytes()
    accuracy = load(trained)['accuracy']
    run(ann, '-a', 'RESNET6', '--dataset', 'DIGITS', '--pretrained_ann', trained, '--test_only', '--no-gpu')
    assert f'test accuracy {accuracy:.2%} on 360 images' in capsys.readouterr().out
    assert Path(trained).read_bytes() == before and os.listdir(tmp_path) == []


def test_amp_trains_and_tests_in_bfloat16(monkeypatch):
    seen, convolve = set(), torch.nn.functional.conv2d

    def conv2d(x, weight, **options):
        seen.add(weight.dtype)
        return convolve(x, weight, **options)

    monkeypatch.setattr(torch.nn.functional, 'conv2d', conv2d)
    run(snn, *SPIKING, '--epochs', 1, '--amp', '--name', 'a')
    assert seen == {torch.bfloat16}
    seen.clear()
    run(snn, *SPIKING, '--epochs', 1, '--name', 'b')
    assert seen == {torch.float32}
    state = load('trained_models/snn/a.pth')
    assert all(weight.dtype == torch.float32 for weight in state['state_dict'].values())


@pytest.mark.parametrize('fraction, images', [(0.0, 'train'), (0.1, 'validation')])
def test_a_scaling_factor_is_chosen_on_images_that_are_not_tested(fraction, images, trained, monkeypatch, capsys):
    monkeypatch.setattr(convert, 'FACTORS', (0.01, 0.7, 100.0))  # the largest lets no spike through
    seen, original = [], engine.test

    def spy(model, dataset, *rest):
        seen.append((type(model).__name__, dataset))
        return original(model, dataset, *rest)

    monkeypatch.setattr(engine, 'test', spy)
    flags = [*SPIKING, *CALIBRATION, '--pretrained_ann', trained, '--timesteps', 12, '--validation_fraction', fraction,
             '--epochs', 1]
    run(snn, *flags, '--scaling_factor', 'auto', '--name', 'a')
    # of 96 images trained on, or 144 held out, the 20 asked for
    assert [name for name, _ in seen[:4]] == ['ResNet', *['RESNET_SNN_STDB'] * 3]
    digits = data.load('DIGITS', '', train_samples=96, test_samples=50, validation_fraction=fraction)
    source = {image.numpy().tobytes() for image in getattr(digits, images).images}
    for _, dataset in seen[1:4]:
        assert len(dataset) == 20 and {image.numpy().tobytes() for image in dataset.images} <= source
    start = metrics_of('logs/snn/a.jsonl')[1][0]
    assert list(start['scan']) == ['0.01', '0.7', '100.0'] and start['scanned_on'] == images
    best = max(start['scan'].values())
    least = best - (best * (1 - best) / 20) ** 0.5
    assert start['scan'][str(start['scaling_factor'])] >= least > start['scan']['100.0']
    assert f"taken: {start['scaling_factor']}\n" in capsys.readouterr().out
    run(snn, *flags, '--scaling_factor', start['scaling_factor'], '--name', 'b')
    again = metrics_of('logs/snn/b.jsonl')[1][0]
    assert 'scan' not in again and again['curve'] == start['curve']


def test_a_threshold_percentile_lowers_thresholds_and_is_not_taken_from_the_cache(trained, capsys):
    def thresholds(*flags):
        run(snn, *SPIKING, *CALIBRATION, '--pretrained_ann', trained, '--test_only', *flags)
        return [float(value) for value in re.search('^thresholds: (.*)$', capsys.readouterr().out, re.M)[1].split()]

    largest, lower = thresholds(), thresholds('--threshold_percentile', '99')
    assert all(b < a for a, b in zip(largest[:3], lower)) and largest[3:] == lower[3:]


def test_convert_fine_tune_and_evaluate(trained, capsys, tmp_path):
    before = Path(trained).read_bytes()
    flags = ['-a', 'RESNET6', '--dataset', 'DIGITS', '--no-gpu', '--default_threshold', '0.3', '--train_samples', 200,
             '--test_samples', 100]
    run(snn, *flags, *CALIBRATION, '--pretrained_ann', trained, '--timesteps', 12, '--leak', '0.99', '--epochs', 2)
    out = capsys.readouterr().out
    ann_accuracy, converted = (float(re.search(rf'^{what} .*?test accuracy ([\d.]+)%', out, re.M)[1])
                               for what in ('ANN', 'converted SNN:'))
    assert ann_accuracy > 60
    assert re.search(r'^thresholds:( [\d.]+){7}$', out, re.M)
    path = tmp_path / 'trained_models/snn/snn_resnet6_digits_12.pth'
    state = load(path)
    assert round(state['accuracy'] * 100, 2) >= converted  # fine-tuning never ends below its start
    assert (state['timesteps'], state['leak'], state['activation']) == (12, 0.99, 'STDB')
    assert state['thresholds'][3:] == [0.3] * 4
    assert Path(trained).read_bytes() == before

    # balanced thresholds are cached beside the ANN, unscaled, and found there again
    cached = json.loads(Path(f'{trained}.thresholds.json').read_text())['thresholds']
    assert [0.7 * value for value in cached] == pytest.approx(state['thresholds'][:3])
    run(snn, *flags, *CALIBRATION, '--pretrained_ann', trained, '--timesteps', 12, '--test_only', '--name', 'again',
        '--data_dir', os.path.expanduser('~/Datasets'))  # the default, as a shell gives it
    assert 'thresholds taken from' in capsys.readouterr().out
    assert sorted(file.name for file in path.parent.glob('*.pth')) == [f'{path.stem}.last.pth', path.name]

    # evaluated alone, it runs as it was trained, and says so; the file knows network and data set
    content = path.read_bytes()
    run(snn, '--no-gpu', '--test_samples', 100, '--pretrained_snn', path, '--test_only')
    out = capsys.readouterr().out
    assert f'test accuracy {state["accuracy"]:.2%} at T = 12' in out
    assert 'timesteps 12, leak 0.99, activation STDB' in out
    run(snn, *flags, '--pretrained_snn', path, '--test_only', '--timesteps', 9)
    out = capsys.readouterr().out
    assert 'timesteps 9 as the flag says, leak 0.99' in out and 'at T = 9' in out
    assert path.read_bytes() == content
    # what a file says that cannot be is not taken; a flag is
    torch.save({**state, 'args': {**state['args'], 'architecture': 7, 'alpha': 'high', 'dataset': 'MNIST'}}, 'odd.pth')
    run(snn, *flags, '--pretrained_snn', 'odd.pth', '--test_only')
    assert f'test accuracy {state["accuracy"]:.2%} at T = 12' in capsys.readouterr().out


def metrics_of(path):
    """(the line about the run, {epoch: its line})"""
    first, *rest = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return first, {entry['epoch']: entry for entry in rest}


@pytest.mark.parametrize('module', [ann, snn])
def test_metrics_file_has_a_line_an_epoch(module, trained, capsys):
    flags = SMALL if module is ann else [*SPIKING, *CALIBRATION, '--pretrained_ann', trained]
    run(module, *flags, '--epochs', 1, '--name', 'm')
    run(module, *flags, '--epochs', 3, '--name', 'm', '--resume')
    out = capsys.readouterr().out
    about, epochs = metrics_of(f'logs/{module.__name__}/m.jsonl')
    assert about['args']['epochs'] == 3 and about['args']['architecture'] == 'RESNET6' and about['torch']
    assert list(epochs) == ([1, 2, 3] if module is ann else [0, 1, 2, 3])
    state = load(f'trained_models/{module.__name__}/m.pth')
    assert epochs[state['epoch']]['test_accuracy'] == state['accuracy'] == epochs[3]['best_accuracy']
    assert max(entry['test_accuracy'] for entry in epochs.values()) == state['accuracy']
    assert f"{epochs[2]['train_loss']:.4f}" in out and epochs[2]['seconds'] > 0
    assert state['classes'] == [str(digit) for digit in range(10)]
    if module is snn:
        assert epochs[0]['curve']['8'] == epochs[0]['test_accuracy']
        assert f"ANN {trained}: test accuracy {epochs[0]['ann_accuracy']:.2%}" in out
    run(module, *flags, '--epochs', 1, '--name', 'm')  # anew
    assert list(metrics_of(f'logs/{module.__name__}/previous.1.m.jsonl')[1]) == list(epochs)
    assert max(metrics_of(f'logs/{module.__name__}/m.jsonl')[1]) == 1


@pytest.mark.parametrize('module', [ann, snn])
def test_a_validation_set_chooses_the_epoch(module, monkeypatch, capsys):
    tests, original = [], engine.test_over_time

    def test_over_time(model, dataset, *args):
        tests.append(len(dataset))
        tested, curve = original(model, dataset, *args)
        # the second epoch is the best on the 144 images held out, the last one on the 50 test images
        value = {1: 0.2, 2: 0.9, 3: 0.4}[len(tests)] if len(dataset) == 144 else 0.6
        return tested._replace(accuracy=value), curve

    monkeypatch.setattr(engine, 'test_over_time', test_over_time)
    run(module, *(SMALL if module is ann else SPIKING), '--epochs', 3, '--validation_fraction', '0.1', '--name', 'v')
    assert tests == [144, 144, 144, 50]  # the test set is looked at once, at the end
    out = capsys.readouterr().out
    assert 'chosen on the validation set\n' in out and 'val acc' in out and 'test acc ' not in out
    assert 'test accuracy 60.00%' in out and 'epoch 2, which had the best validation accuracy, 90.00%' in out
    _, epochs = metrics_of(f'logs/{module.__name__}/v.jsonl')
    assert [epochs[n].get('test_accuracy') for n in (1, 2, 3)] == [None, 0.6, None]
    assert load(f'trained_models/{module.__name__}/v.pth')['epoch'] == 2


def test_a_validation_set_that_leaves_nothing():
    fails(ann, 'leaves 719 of 1437 train images', *SMALL, '--train_samples', 720, '--validation_fraction', '0.5')


def test_tensorboard_gets_the_metrics():
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run(ann, *SMALL, '--epochs', 2, '--tensorboard', '--name', 'b')
    events = EventAccumulator('logs/ann/b').Reload()
    _, epochs = metrics_of('logs/ann/b.jsonl')
    for key in ('train_loss', 'test_accuracy'):
        assert [(event.step, event.value) for event in events.Scalars(key)] == [
            (n, pytest.approx(epochs[n][key])) for n in (1, 2)]


def test_predict_says_the_classes_of_pictures(trained, capsys, tmp_path):
    from PIL import Image

    from experiment import data
    run(snn, '-a', 'RESNET6', '--dataset', 'DIGITS', '--no-gpu', *CALIBRATION, '--pretrained_ann', trained,
        '--timesteps', 12, '--default_threshold', '0.3', '--epochs', 2, '--train_samples', 200, '--test_samples', 50)
    test = data.load('DIGITS', '').test
    for i in range(40):
        Image.fromarray((test.images[i, 0].long() * 255 // 16).byte().numpy()).save(f'{i}.png')
    before = sorted(tmp_path.rglob('*'))
    capsys.readouterr()
    path = 'trained_models/snn/snn_resnet6_digits_12.pth'
    run(snn, '--pretrained_snn', path, '--no-gpu', '--predict', *(f'{i}.png' for i in range(40)))
    first, *said = capsys.readouterr().out.splitlines()
    assert 'timesteps 12' in first and len(said) == 40
    right = 0
    for i, line in enumerate(said):
        guesses = re.fullmatch(rf'{i}\.png: (\d) ([\d.]+)%, (\d) ([\d.]+)%, (\d) ([\d.]+)%', line).groups()
        confidences = [float(value) for value in guesses[1::2]]
        assert confidences == sorted(confidences, reverse=True) and sum(confidences) <= 100.2
        right += int(guesses[0]) == test.labels[i]
    assert right >= 14  # of 40; chance is 4
    assert sorted(tmp_path.rglob('*')) == before  # nothing is written
    Path('no.png').write_text('no picture')
    for words, flags in (('none.png: is not a file', ['--pretrained_snn', path, '--predict', 'none.png']),
                         ('trained_models: is not a file', ['--pretrained_snn', path, '--predict', 'trained_models']),
                         ('no.png: not a picture', ['--pretrained_snn', path, '--predict', 'no.png']),
                         ('--predict: name the network', ['--predict', '0.png'])):
        fails(snn, words, '--no-gpu', *flags)
    run(snn, '--pretrained_snn', path, '--no-gpu', '--predict', '0.png', '--timesteps', 3)
    assert 'no spike reaches the output in fewer than 6' in capsys.readouterr().out
    state = load(path)
    del state['classes']
    torch.save(state, 'old.pth')
    fails(snn, 'old.pth does not name its classes', '--no-gpu', '--pretrained_snn', 'old.pth', '--predict', '0.png')


def test_train_from_scratch_and_go_on_from_an_snn(capsys):
    run(snn, *SPIKING, '--epochs', 1, '--activation', 'Linear', '--train_acc_batches', 1, '--test_acc_every_batch')
    out = capsys.readouterr().out
    assert 'batch 1: train loss' in out and 'test batch 1: accuracy' in out
    run(snn, *SMALL, '--pretrained_snn', 'trained_models/snn/snn_resnet6_digits_8.pth', '--epochs', 1, '--name', 'b')
    out = capsys.readouterr().out
    assert 'timesteps 8, leak 1.0, activation Linear' in out
    assert load('trained_models/snn/b.pth')['activation'] == 'Linear'


def test_an_ann_starts_from_another_data_sets_weights(trained, capsys):
    state = load(trained)
    state['state_dict']['classifier.0.weight'] = torch.zeros(4, 512)
    torch.save(state, 'other.pth')
    run(ann, *SMALL, '--pretrained_ann', 'other.pth', '--epochs', 1)
    assert 'classifier.0.weight is for other classes, so that one starts anew' in capsys.readouterr().out


def test_too_few_steps_are_said(capsys):
    run(snn, *SPIKING, '--timesteps', 4, '--test_only')
    assert 'no spike reaches the output in fewer than 6' in capsys.readouterr().out


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


@pytest.mark.parametrize('module', ['ann', 'snn', 'ann_script', 'snn_script'])
def test_importing_has_no_side_effects(module, tmp_path):
    done = subprocess.run([sys.executable, '-c', f'import {module}'], cwd=tmp_path, text=True, capture_output=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr, os.listdir(tmp_path)) == (0, '', '', [])


@pytest.mark.parametrize('accuracies, factor', [
    ({0.4: 0.80, 0.5: 0.76, 0.7: 0.75}, 0.5),  # of 100 images: sqrt(0.8 * 0.2 / 100) = 0.04, so 0.76 counts as good
    ({0.4: 0.80, 0.5: 0.75, 0.7: 0.75}, 0.4),
    ({0.7: 0.10, 1.1: 1.00, 1.2: 1.00}, 1.1),  # no error at 1
    ({0.8: 0.80, 0.6: 0.79}, 0.6),  # both 0.1 away
])
def test_chosen_factor_by_hand(accuracies, factor):
    assert convert.chosen_factor(accuracies, 100) == factor


def test_fitting_scale_by_hand():
    class Constant(torch.nn.Module):
        def __init__(self, *logits):
            super().__init__()
            self.logits = torch.tensor([logits])

        def forward(self, images):
            return self.logits.expand(len(images), -1)

    images = data.load('DIGITS', '', 32, None, 8, 0).test
    args = snn.get_args_parser().parse_args(['--timesteps', '4', '--num_workers', '0'])
    scale = partial(convert.fitting_scale, images=images, device=torch.device('cpu'), args=args)
    # less their means, the sums are 2 and -2, so 0.5 and -0.5 a step; the ANN has 1 and -1, whatever is added to both
    assert scale(Constant(4., 0.), Constant(7., 5.)) == pytest.approx(2)
    # (1, 0, -1) a step against (3, 0, 0), less its mean (2, -1, -1): (2 + 0 + 1) / (1 + 0 + 1)
    assert scale(Constant(4., 0., -4.), Constant(3., 0., 0.)) == pytest.approx(1.5)
    assert scale(Constant(0., 0.), Constant(7., 5.)) == 1  # silent
    assert scale(Constant(0., 4.), Constant(7., 5.)) == 1  # the wrong way round


def test_a_fitted_output_decides_as_the_mean_does(trained, capsys):
    flags = ['-a', 'RESNET6', '--dataset', 'DIGITS', '--pretrained_ann', trained, '--timesteps', 20, '--epochs', 1,
             '--train_samples', 64, '--calibration_samples', 64, '--calibration_timesteps', 40, '-lr', 1e-8,
             '--no-gpu', '--num_workers', 0]
    starts = []
    for output in ('mean', 'fitted'):
        run(snn, *flags, '--output', output, '--name', output)
        line = Path(f'logs/snn/{output}.jsonl').read_text().splitlines()[1]
        starts.append(json.loads(line))
    mean, fitted = starts
    assert fitted['curve'] == mean['curve'] and 'output_scale' not in mean
    last = list(load(trained)['state_dict'].values())[-1]
    weights = load('trained_models/snn/fitted.pth')['state_dict']['classifier.0.weight']
    torch.testing.assert_close(weights, last * fitted['output_scale'], atol=1e-6, rtol=1e-5)

    # going on, the output is what the conversion made it
    flags = ['--no-gpu', '--test_samples', 64, '--test_only', '--pretrained_snn']
    for output in ('mean', 'fitted'):
        capsys.readouterr()
        run(snn, *flags, f'trained_models/snn/{output}.pth')
        assert f'activation STDB, output {output}\n' in capsys.readouterr().out
    run(snn, *flags, 'trained_models/snn/fitted.pth', '--output', 'fitted')
    fails(snn, 'mean.pth did not', *flags, 'trained_models/snn/mean.pth', '--output', 'fitted')


def test_without_an_ann_there_is_nothing_to_fit_the_output_to():
    fails(snn, 'name one with --pretrained_ann', *SPIKING, '--output', 'fitted')
    run(snn, *SPIKING, '--epochs', 1)
    assert load('trained_models/snn/snn_resnet6_digits_8.pth')['args']['output'] == 'mean'


def test_a_silent_output_is_not_said_to_be_fitted(trained, capsys):
    run(snn, *SPIKING, *CALIBRATION, '--pretrained_ann', trained, '--timesteps', 4, '--test_only')
    said = capsys.readouterr().out
    assert 'so it is not fitted' in said and 'multiplied' not in said
