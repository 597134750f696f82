"""What trained networks are asked: --predict for the classes of pictures, --test_only for an accuracy."""
import os
import re
from pathlib import Path

import pytest
import torch

import ann
import snn
from conftest import CALIBRATION, SMALL, SPIKING, fails, load, run
from experiment import data

pytestmark = pytest.mark.usefixtures('in_an_empty_folder')


def test_predict_says_the_classes_of_pictures(trained, capsys, tmp_path):
    from PIL import Image

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
    torch.save({**state, 'args': {**state['args'], 'dataset': 'SVHN'}}, 'other.pth')
    fails(snn, 'is of an unknown data set SVHN', '--no-gpu', '--pretrained_snn', 'other.pth', '--predict', '0.png')
    del state['classes']
    torch.save(state, 'old.pth')
    fails(snn, 'old.pth does not name its classes', '--no-gpu', '--pretrained_snn', 'old.pth', '--predict', '0.png')


def answers(capsys, *flags):
    capsys.readouterr()
    run(snn, '--no-gpu', *flags)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize('encoding', ['poisson', 'direct'])
def test_an_answer_is_of_its_picture_alone(encoding, capsys):
    from PIL import Image
    run(snn, *SPIKING, '--encoding', encoding, '--epochs', 1, '--name', 'k')
    for i, image in enumerate(data.load('DIGITS', '').test.images[:5, 0]):
        Image.fromarray((image.long() * 255 // 16).byte().numpy()).save(f'{i}.png')
    names = [f'{i}.png' for i in range(5)]
    flags = ['--pretrained_snn', 'trained_models/snn/k.pth', '--predict']
    first = answers(capsys, *flags, *names)[1:]
    assert [line.split(':')[0] for line in first] == names and len({line[5:] for line in first}) > 1
    assert answers(capsys, *flags, *names[::-1])[1:] == first[::-1]
    assert answers(capsys, *flags, names[3], names[3])[1:] == [first[3]] * 2
    assert answers(capsys, *flags, *names, '--batch_size', 2)[2:] == first
    seeded = answers(capsys, *flags, *names, '--seed', 1)
    if encoding == 'direct':
        assert seeded[1:] == ['--seed has no effect here: it belongs to --encoding poisson', *first]
    else:
        assert seeded[1:] != first and len(seeded) == 6


def test_flags_that_mean_nothing_beside_predict_are_said(capsys, tmp_path):
    from PIL import Image
    run(snn, *SPIKING, '--epochs', 1, '--activation', 'Linear')
    Image.new('L', (8, 8), 99).save('a.png')
    before = sorted(tmp_path.rglob('*'))
    flags = ['--pretrained_snn', 'trained_models/snn/snn_resnet6_digits_8.pth', '--predict', 'a.png']
    about, answer = answers(capsys, *flags)
    values = {'train_samples': 5, 'test_samples': 5, 'name': 'x', 'resume': 'auto', 'report': 'r', 'export_nir': 'x'}
    heeded = {'architecture': 'RESNET6', 'dataset': 'DIGITS', 'timesteps': 8, 'leak': 1.0, 'encoding': 'poisson',
              'delay': 1, 'initial_potential': 0, 'default_threshold': 0.3, 'output': 'mean', 'seed': 0, 'gpu': False,
              'devices': 0, 'amp': False, 'backend': 'torch'}
    of = {'kernel_size': 'VGGs', 'image_size': '--dataset FOLDER'}
    idle = []
    for action in snn.get_args_parser()._actions:
        if action.dest not in ('help', 'predict', 'pretrained_snn', 'pretrained_ann'):
            value = heeded[action.dest] if action.dest in heeded else values.get(action.dest, action.default)
            flags += [action.option_strings[-1 if action.dest == 'learning_rate' else 0], value]
            idle += [action.dest] if action.dest not in heeded else []
    flags[flags.index('--activation') + 1] = 'STDB'
    assert {'report', 'export_nir', 'resume', 'epochs', 'test_only', 'scaling_factor', 'gamma'} <= {*idle}
    said = answers(capsys, *flags)
    assert said[0].replace(' as the flag says', '').startswith(about) and said[-1] == answer
    assert said[1:-1] == [f'--{flag} has no effect here: it belongs to {of.get(flag, "runs that train or test")}'
                          for flag in sorted(idle)]
    assert sorted(tmp_path.rglob('*')) == before


def test_test_only_evaluates_what_it_resumes(capsys):
    run(snn, *SPIKING, '--epochs', 1)
    capsys.readouterr()
    run(snn, *SPIKING, '--test_only', '--resume')
    assert re.search(r'^loaded SNN: test accuracy', capsys.readouterr().out, re.M)


def test_test_only_wants_a_trained_ann():
    fails(ann, '--test_only: name the network', *SMALL, '--test_only')


def test_test_only_says_the_logged_accuracy_and_writes_nothing(trained, capsys, tmp_path):
    before = Path(trained).read_bytes()
    accuracy = load(trained)['accuracy']
    run(ann, '-a', 'RESNET6', '--dataset', 'DIGITS', '--pretrained_ann', trained, '--test_only', '--no-gpu')
    assert f'test accuracy {accuracy:.2%} on 360 images' in capsys.readouterr().out
    assert Path(trained).read_bytes() == before and os.listdir(tmp_path) == []


def test_too_few_steps_are_said(capsys):
    run(snn, *SPIKING, '--timesteps', 4, '--test_only')
    assert 'no spike reaches the output in fewer than 6' in capsys.readouterr().out
