"""snn.py --pretrained_ann: an ANN is converted, its thresholds, factor and output chosen, and fine-tuned."""
import json
import os
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

import ann
import snn
from conftest import CALIBRATION, FEW_STEPS, SMALL, SPIKING, fails, load, metrics_of, run
from experiment import data, engine, files, from_ann, setup, start
from self_models import VGG

pytestmark = pytest.mark.usefixtures('in_an_empty_folder')


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


def test_a_test_balances_on_the_pictures_of_the_training(trained, capsys):
    flags = [*SPIKING, *CALIBRATION, '--pretrained_ann', trained, '--cutout', 3]
    run(snn, *flags, '--epochs', 1)
    capsys.readouterr()
    run(snn, *flags, '--test_only', '--crop', 2)
    out = capsys.readouterr().out
    assert 'thresholds taken from' in out and '--cutout' not in out
    assert '--crop has no effect here: it belongs to --dataset CIFAR10' in out
    run(snn, *SPIKING, '--pretrained_snn', 'trained_models/snn/snn_resnet6_digits_8.pth', '--cutout', 3, '--test_only')
    assert '--cutout has no effect here: it belongs to training or a balancing' in capsys.readouterr().out


def test_a_threshold_percentile_lowers_thresholds_and_is_not_taken_from_the_cache(trained, capsys):
    def thresholds(*flags):
        run(snn, *SPIKING, *CALIBRATION, '--pretrained_ann', trained, '--test_only', *flags)
        return [float(value) for value in re.search('^thresholds: (.*)$', capsys.readouterr().out, re.M)[1].split()]

    largest, lower = thresholds(), thresholds('--threshold_percentile', '99')
    assert all(b < a for a, b in zip(largest[:3], lower)) and largest[3:] == lower[3:]


# -- what a file says, and what it does not ---------------------------------------------------------------------------

IMAGES = SPIKING[4:-4]  # how many, and the CPU


def test_a_file_says_network_and_data_set_if_no_flag_does(trained, capsys):
    said = f'taken from {trained}: --architecture RESNET6 --dataset DIGITS\n'
    run(snn, '--pretrained_ann', trained, *FEW_STEPS, *IMAGES, *CALIBRATION, '--epochs', 1)
    assert said in capsys.readouterr().out
    args = load('trained_models/snn/snn_resnet6_digits_8.pth')['args']
    assert (args['architecture'], args['dataset'], args['pretrained_ann']) == ('RESNET6', 'DIGITS', trained)
    run(ann, '--pretrained_ann', trained, *IMAGES, '--epochs', 1)
    assert said in capsys.readouterr().out and Path('trained_models/ann/ann_resnet6_digits.pth').is_file()
    run(ann, '--pretrained_ann', trained, *SPIKING[:4], *IMAGES, '--test_only')
    assert 'taken from' not in capsys.readouterr().out
    # what it began with may be gone
    os.rename(trained, f'{trained}.gone')
    try:
        run(ann, *SPIKING[:4], '--pretrained_ann', trained, *IMAGES, '--epochs', 2, '--resume', 'auto')
        fails(ann, 'there is no such file', '--pretrained_ann', trained, *IMAGES, '--epochs', 3, '--resume', 'auto')
    finally:
        os.rename(f'{trained}.gone', trained)
    run(ann, '--pretrained_ann', trained, *IMAGES, '--epochs', 3, '--resume', 'auto')
    assert load('trained_models/ann/ann_resnet6_digits.last.pth')['epoch'] == 3


def settled(module, *flags):
    """The arguments of a run that is only to be tested, once its Start is found."""
    args = module.get_args_parser().parse_args([str(flag) for flag in (*flags, '--test_only')])
    found = start.find_ann(args) if module is ann else start.find_snn(args, torch.device('cpu'))
    return args, found


@pytest.mark.parametrize('module', [ann, snn])
def test_kernel_and_image_size_of_a_file_hold_unless_flags_say_otherwise(module, monkeypatch):
    monkeypatch.setattr('self_models.layers.VGG_HIDDEN', 8)
    sizes = {'kernel_size': 5, 'image_size': 12}
    network = VGG('VGG5', labels=3, dataset='FOLDER', kernel_size=5, input_shape=(3, 12, 12))
    known = {'architecture': 'VGG5', 'dataset': 'FOLDER', **sizes}
    torch.save({'state_dict': network.state_dict(), 'args': known}, 'a.pth')
    args, found = settled(module, '--pretrained_ann', 'a.pth')
    assert {key: vars(args)[key] for key in known} == known
    assert found.paths.best.stem == {ann: 'ann_vgg5_folder', snn: 'snn_vgg5_folder_100'}[module]
    assert 'taken from a.pth: --architecture VGG5 --dataset FOLDER --kernel_size 5 --image_size 12' in found.said
    args, found = settled(module, '--pretrained_ann', 'a.pth', '--image_size', 13, '--kernel_size', 5)
    assert args.image_size == 13 and found.said == ['taken from a.pth: --architecture VGG5 --dataset FOLDER']
    # what is wrong is known before any data are read
    said = 'a.pth: does not fit this network .it holds a VGG5 for FOLDER.; set --architecture'
    for flags in ('--image_size=16', '--kernel_size=3', '--dataset=MNIST', '-a=RESNET6'):
        fails(module, said, '--pretrained_ann', 'a.pth', '--data_dir', 'none', flags)
    fails(module, 'VGG9 halves the image 4 times.*set --architecture and --dataset as a.pth was trained',
          '--pretrained_ann', 'a.pth', '-a', 'VGG9')
    # what no flag could say is not taken
    torch.save({'state_dict': network.state_dict(), 'args': {
        **known, 'architecture': 'resnet18', 'dataset': ['x'], 'kernel_size': 4, 'image_size': True}}, 'odd.pth')
    fails(module, 'odd.pth: does not fit this network', '--pretrained_ann', 'odd.pth')
    args, found = settled(module, '--pretrained_ann', 'odd.pth', *(f'--{key}={value}' for key, value in known.items()))
    assert found.said == []


def test_the_name_that_an_anns_file_asks_for_is_locked(trained, monkeypatch):
    locked, lock = [], files.lock
    monkeypatch.setattr(files, 'lock', lambda paths: locked.append(paths.best.name) or lock(paths))
    for module in (ann, snn):
        fails(module, 'there are 1437 train images', '--pretrained_ann', trained, '--no-gpu', '--train_samples', 2000)
    assert locked == ['ann_resnet6_digits.pth', 'snn_resnet6_digits_100.pth']


def test_a_bare_state_dict_is_converted_and_trained(trained, capsys, monkeypatch):
    weights = load(trained)['state_dict']
    torch.save({f'module._orig_mod.{key}': value for key, value in weights.items()}, 'bare.pth')
    flags = [*FEW_STEPS, *IMAGES, *CALIBRATION, '--test_only', '--pretrained_ann']
    printed = []
    for file in (trained, 'bare.pth'):
        run(snn, *SPIKING[:4], *flags, file)
        out = capsys.readouterr().out
        printed.append(out[out.index('thresholds: '):])
        run(ann, *SPIKING[:4], *IMAGES, '--test_only', '--pretrained_ann', file)
        printed[-1] += re.search('^ANN: .*', capsys.readouterr().out, re.M)[0]
    assert printed[0] == printed[1]
    run(ann, *SPIKING[:4], *IMAGES, '--pretrained_ann', 'bare.pth', '--epochs', 1)
    monkeypatch.setattr(data, 'load', None)  # no data are read for a network that was guessed
    fails(snn, 'bare.pth: does not fit this network; set --architecture, --dataset', *flags, 'bare.pth')
    fails(ann, 'bare.pth: does not fit this network; set --architecture, --dataset', '--pretrained_ann', 'bare.pth')
    fails(snn, 'is a bare state_dict; an SNN also needs', '--pretrained_snn', 'bare.pth')


def test_a_published_snn_loads_and_trains_on(published_class, capsys, monkeypatch):
    run(snn, *SPIKING, '--activation', 'Linear', '--epochs', 1, '--name', 'own')
    state = load('trained_models/snn/own.pth')
    torch.save({**{key: state[key] for key in ('accuracy', 'epoch', 'thresholds', 'timesteps')}, 'leak_mem': 1.0,
                'scaling_threshold': 1.0, 'activation': published_class('LinearSpike'), 'optimizer': state['optimizer'],
                'state_dict': {f'module.{key}': value for key, value in state['state_dict'].items()}}, 'p.pth')
    monkeypatch.delitem(sys.modules, 'spiking_model')
    capsys.readouterr()
    for file in ('trained_models/snn/own.pth', 'p.pth'):
        run(snn, *SPIKING[:-4], '--pretrained_snn', file, '--test_only')
        out = capsys.readouterr().out
        assert 'activation Linear' in out and f'loaded SNN: test accuracy {state["accuracy"]:.2%} at T = 8' in out
    run(snn, *SPIKING[:-4], '--pretrained_snn', 'p.pth', '--epochs', 1)
    assert load('trained_models/snn/snn_resnet6_digits_8.pth')['activation'] == 'Linear'


# -- the scaling factor -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('fraction, images', [(0.0, 'train'), (0.1, 'validation')])
def test_a_scaling_factor_is_chosen_on_images_that_are_not_tested(fraction, images, trained, monkeypatch, capsys):
    monkeypatch.setattr(from_ann, 'FACTORS', (0.01, 0.7, 100.0))  # the largest lets no spike through
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
    digits = data.load('DIGITS', '', sampling=data.Sampling(96, 50, validation_fraction=fraction))
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


@pytest.mark.parametrize('accuracies, factor', [
    ({0.4: 0.80, 0.5: 0.76, 0.7: 0.75}, 0.5),  # of 100 images: sqrt(0.8 * 0.2 / 100) = 0.04, so 0.76 counts as good
    ({0.4: 0.80, 0.5: 0.75, 0.7: 0.75}, 0.4),
    ({0.7: 0.10, 1.1: 1.00, 1.2: 1.00}, 1.1),  # no error at 1
    ({0.8: 0.80, 0.6: 0.79}, 0.6),  # both 0.1 away
])
def test_chosen_factor_by_hand(accuracies, factor):
    assert from_ann.chosen_factor(accuracies, 100) == factor


# -- a fitted output --------------------------------------------------------------------------------------------------

def test_fitting_scale_by_hand():
    class Constant(torch.nn.Module):
        def __init__(self, *logits):
            super().__init__()
            self.logits = torch.tensor([logits])

        def forward(self, images):
            return self.logits.expand(len(images), -1)

    images = data.load('DIGITS', '', sampling=data.Sampling(test_samples=8)).test
    args = snn.get_args_parser().parse_args(['--timesteps', '4', '--num_workers', '0'])
    scale = partial(from_ann.fitting_scale, images=images, device=torch.device('cpu'), args=args)
    # less their means, the sums are 2 and -2, so 0.5 and -0.5 a step; the ANN has 1 and -1, whatever is added to both
    assert scale(Constant(4., 0.), Constant(7., 5.)) == pytest.approx(2)
    # (1, 0, -1) a step against (3, 0, 0), less its mean (2, -1, -1): (2 + 0 + 1) / (1 + 0 + 1)
    assert scale(Constant(4., 0., -4.), Constant(3., 0., 0.)) == pytest.approx(1.5)
    assert scale(Constant(0., 0.), Constant(7., 5.)) == 1  # silent
    assert scale(Constant(0., 4.), Constant(7., 5.)) == 1  # the wrong way round


def test_a_fitted_output_decides_as_the_mean_does(trained, capsys):
    flags = ['-a', 'RESNET6', '--dataset', 'DIGITS', '--pretrained_ann', trained, '--timesteps', 20, '--epochs', 1,
             '--train_samples', 64, '--calibration_samples', 64, '--calibration_timesteps', 40, '-lr', 1e-8,
             '--test_samples', 100, '--no-gpu', '--num_workers', 0]
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
    fails(snn, 'mean.pth has --output mean', *flags, 'trained_models/snn/mean.pth', '--output', 'fitted')


def test_without_an_ann_there_is_nothing_to_fit_the_output_to():
    fails(snn, 'name one with --pretrained_ann', *SPIKING, '--output', 'fitted')
    run(snn, *SPIKING, '--epochs', 1)
    assert load('trained_models/snn/snn_resnet6_digits_8.pth')['args']['output'] == 'mean'


def test_a_silent_output_is_not_said_to_be_fitted(trained, capsys):
    run(snn, *SPIKING, *CALIBRATION, '--pretrained_ann', trained, '--timesteps', 4, '--test_only')
    said = capsys.readouterr().out
    assert 'so it is not fitted' in said and 'multiplied' not in said


# -- an ANN that has not learned --------------------------------------------------------------------------------------

@pytest.mark.parametrize('accuracy, counts, chance', [
    (0.09, [1000] * 10, 0.1), (0.1, [1000] * 10, 0.1),
    (0.11, [1000] * 10, 0.1),  # 3 standard errors of 0.003, but below the published 0.15
    (0.15, [1000] * 10, None), (0.15, [10] * 10, 0.1),  # the same is within two of 0.03 on 100 images
    (0.17, [10] * 10, None), (1.0, [4, 1], None), (0.8, [4, 1], None),  # 0.8 + 2 sqrt(0.16 / 5) is above 1
    (0.9, [900, 100], 0.9), (0.95, [900, 100], None),
    (0.53, [500, 500], 0.5), (0.54, [500, 500], None)])  # 2 sqrt(0.25 / 1000) = 0.032
def test_chance_by_hand(accuracy, counts, chance):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    assert from_ann.at_chance(accuracy, labels, len(counts)) == (None if chance is None else pytest.approx(chance))


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


@pytest.mark.parametrize('place', [{'TMPDIR': 'none'}, {'TMPDIR': 'file'}, {'TMPDIR': '/proc'}, {'TMPDIR': 'full'},
                                   {'TEMP': 'none'}, {'TMPDIR': '', 'TMP': 'none'}], ids=str)
def test_a_temporary_folder_that_cannot_be_written_is_said_before_anything_is_computed(place, trained, monkeypatch):
    Path('file').touch()
    Path('full').mkdir()
    temporary = tempfile.TemporaryFile

    def full(*args, dir=None, **options):
        return open('/dev/full', 'wb') if dir == 'full' else temporary(*args, dir=dir, **options)

    monkeypatch.setattr(tempfile, 'TemporaryFile', full)
    for name in ('TMPDIR', 'TEMP', 'TMP'):
        monkeypatch.delenv(name, raising=False)
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as patch:
        patch.setattr(setup, 'load_data', lambda _: pytest.fail('came to the data'))
        for flags in (['--pretrained_ann', trained], []):  # balanced on the ANN, or on the untrained network
            fails(snn, f'^{name}={value}: spikes cannot be kept there ', *SMALL, *flags, '--timesteps', 8)
    run(snn, *SPIKING, '--epochs', 1)  # needs none, as a flag sets all thresholds


def test_an_ann_of_qcfs_needs_no_temporary_folder(monkeypatch):
    run(ann, *SMALL, '--activation', 'QCFS', '--epochs', 1, '--name', 'q')
    monkeypatch.setenv('TMPDIR', 'none')
    run(snn, *SMALL, '--pretrained_ann', 'trained_models/ann/q.pth', '--timesteps', 8, '--test_only')
