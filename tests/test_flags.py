"""The flags of ann.py and snn.py: their defaults, what they take, and what they refuse."""
import re
import subprocess
import sys

import pytest
import torch

import ann
import snn
from conftest import ROOT
from experiment import options

PUBLISHED = {  # of both scripts
    'seed': 0, 'dataset': 'CIFAR10', 'batch_size': 64, 'architecture': 'VGG16', 'epochs': 300,
    'lr_interval': '0.60 0.80 0.90', 'lr_reduce': 10, 'weight_decay': 5e-4, 'amsgrad': True, 'kernel_size': 3,
    'devices': '0', 'log': False, 'test_only': False, 'pretrained_ann': None}


@pytest.mark.parametrize('module, more', [
    (ann, {'learning_rate': 1e-2, 'optimizer': 'SGD', 'momentum': 0.9, 'dropout': 0.2}),
    (snn, {'learning_rate': 1e-4, 'optimizer': 'Adam', 'momentum': 0.95, 'dropout': 0.3, 'pretrained_snn': None,
           'timesteps': 100, 'leak': 1.0, 'scaling_factor': 0.7, 'default_threshold': 1.0, 'activation': 'STDB',
           'alpha': 0.3, 'beta': 0.01, 'gamma': 0.3, 'width': 1.0, 'encoding': 'poisson',
           'test_acc_every_batch': False, 'train_acc_batches': 200,
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
    ('ann.py', ['--resume', '']), ('ann.py', ['--devices', 'a']), ('ann.py', ['--devices', '0,0']),
    ('ann.py', ['--epoch', '3']),
    ('ann.py', ['--timesteps', '5']), ('ann.py', ['--momentum', '2']), ('ann.py', ['--weight_decay', '-1']),
    ('ann.py', ['--train_samples', '0']), ('ann.py', ['--lr_reduce', '0']), ('ann.py', ['--seed']),
    ('snn.py', ['--timesteps', '0']), ('snn.py', ['--leak', '0']), ('snn.py', ['--leak', '1.01']),
    ('snn.py', ['--scaling_factor', '0']), ('snn.py', ['--scaling_factor', '-0.7']),
    ('snn.py', ['--default_threshold', '0']), ('snn.py', ['--activation', 'ReLU']), ('snn.py', ['--alpha', 'inf']),
    ('snn.py', ['--beta', '-1']), ('snn.py', ['--width', '0']), ('snn.py', ['--encoding', 'rate']),
    ('snn.py', ['--scaling_factor', 'best']),
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


def test_a_value_with_spaces_wants_quotes(capsys):
    for flags, said in ((['--lr_interval', '0.6', '0.8'], True), (['--epoch', '3'], False)):
        with pytest.raises(SystemExit) as stopped:
            ann.get_args_parser().parse_args(flags)
        assert stopped.value.code == 2 and ('in quotes' in capsys.readouterr().err) is said


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


def test_surrogates_and_encodings_are_offered_without_waiting_for_torch(own_classes):
    code = 'import sys, snn; snn.get_args_parser().format_help(); sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
    text = ' '.join(snn.get_args_parser().format_help().split())
    assert re.search(r'--width X width of Rectangle; steepness of ATan, FastSigmoid, Sigmoid,( \w+,)* Gaussian;', text)
    assert re.search(r'--alpha X height of STDB,( \w+,)* Inverse; default 0.3', text)
    assert '{poisson,direct,Alternating}' in text
    args = snn.get_args_parser().parse_args(['--activation', 'Gaussian', '--encoding', 'Alternating'])
    assert options.without_effect(vars(args)).keys() & {'alpha', 'beta', 'gamma', 'width'} == {'alpha', 'beta'}
