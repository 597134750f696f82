"""ann.py and snn.py as their user runs them, on the digits that scikit-learn ships: what a training writes and says."""
import functools
import math
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ann
import snn
from conftest import CALIBRATION, ROOT, SMALL, SPIKING, fails, load, metrics_of, run
from experiment import checkpoint, data, engine, setup
from experiment.reporting import metrics
from self_models import cpu as cpu_ways

pytestmark = pytest.mark.usefixtures('in_an_empty_folder')


def test_bfloat16_without_instructions_for_it_is_said(monkeypatch):
    cpu, plain, amp = torch.device('cpu'), *map(ann.get_args_parser().parse_args, ([], ['--amp']))
    model = torch.nn.Linear(1, 1)
    for supported, said in ((True, 0), (False, 1)):
        monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda answer=supported: answer)
        assert (len(setup.notes(amp, cpu, model)), len(setup.notes(plain, cpu, model))) == (said, 0)
    assert setup.notes(amp, torch.device('cuda'), model) == []


def test_no_gpu_means_the_cpu_whatever_devices_are_named():
    assert setup.set_up_device(ann.get_args_parser().parse_args(['--no-gpu', '--devices', '0,1'])).type == 'cpu'


def test_devices_mean_nothing_on_a_cpu():
    args = ann.get_args_parser().parse_args(['--devices', '1'])
    assert setup.notes(args, torch.device('cpu'), torch.nn.Linear(1, 1)) == [
        '--devices has no effect here: it belongs to CUDA']
    assert setup.notes(args, torch.device('cuda', 1), torch.nn.Linear(1, 1)) == []


def test_the_device_of_a_run_becomes_the_current_one(monkeypatch):
    current = []
    for name, function in (('is_available', lambda: True), ('device_count', lambda: 2), ('set_device', current.append)):
        monkeypatch.setattr(torch.cuda, name, function)
    device = setup.set_up_device(ann.get_args_parser().parse_args(['--devices', '1']))
    assert current == [device] == [torch.device('cuda', 1)]


def test_the_flags_of_data_reach_the_data(monkeypatch):
    monkeypatch.setattr(data, 'load', lambda *given: given)
    flags = '--dataset FOLDER --data_dir here --image_size 40 --train_samples 50 --test_samples 30 --seed 2 --crop 7 ' \
            '--validation_fraction 0.25 --num_workers 0 --cutout 9'
    given = setup.load_data(ann.get_args_parser().parse_args(flags.split()))
    assert given == ('FOLDER', 'here', 40, data.Sampling(50, 30, 2, 0.25, None), 0, 9, 7)


def test_learning_rate_schedule():
    args = ann.get_args_parser().parse_args(['--epochs', '10', '-lr', '1'])
    rates = [engine.learning_rate_at(epoch, args) for epoch in range(1, 11)]
    assert rates == pytest.approx([1] * 5 + [0.1] * 2 + [0.01] + [0.001] * 2)
    args.lr_reduce = 1e200  # whose square no float holds
    assert engine.learning_rate_at(10, args) == 0
    args.epochs = 1
    assert engine.learning_rate_at(1, args) == 1


@pytest.mark.parametrize('part, epochs, milestone', [
    ('0.29', 100, 29), ('0.7', 90, 63), ('0.57', 100, 57), ('.58', 100, 58), ('1e-1', 30, 3), ('1', 7, 7), ('1.', 7, 7),
    ('0.6', 3, 1), ('0.999', 1000, 999), ('0.289', 100, 28)])
def test_the_rate_is_divided_at_the_epoch_that_the_decimal_says(part, epochs, milestone):
    args = ann.get_args_parser().parse_args(['--epochs', str(epochs), '-lr', '1', '--lr_interval', part])
    rates = [engine.learning_rate_at(epoch, args) for epoch in range(1, epochs + 1)]
    assert rates == [1.0 if epoch < milestone or milestone == 1 else 0.1 for epoch in range(1, epochs + 1)]


def test_a_hundredth_of_a_hundred_epochs_is_an_epoch():
    for at in range(2, 100):
        args = ann.get_args_parser().parse_args(['--epochs', '100', '-lr', '1', '--lr_interval', f'0.{at:02}'])
        assert [engine.learning_rate_at(epoch, args) for epoch in (at - 1, at)] == [1, 0.1], at


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


def test_amp_trains_and_tests_in_bfloat16(monkeypatch):
    seen, convolve = set(), torch.nn.functional.conv2d

    def conv2d(x, weight, *more, **options):
        seen.add(weight.dtype)
        return convolve(x, weight, *more, **options)

    monkeypatch.setattr(torch.nn.functional, 'conv2d', conv2d)
    run(snn, *SPIKING, '--epochs', 1, '--amp', '--name', 'a')
    assert seen == {torch.bfloat16}
    seen.clear()
    run(snn, *SPIKING, '--epochs', 1, '--name', 'b')
    assert seen == {torch.float32}
    state = load('trained_models/snn/a.pth')
    assert all(weight.dtype == torch.float32 for key, weight in state['state_dict'].items()
               if key not in ('thresholds', 'leaks'))


def epochs_of(path):
    """{epoch: its line of the metrics}"""
    return {entry['epoch']: entry for entry in metrics_of(path)[1]}


@pytest.mark.parametrize('module', [ann, snn])
def test_metrics_file_has_a_line_an_epoch(module, trained, capsys):
    flags = SMALL if module is ann else [*SPIKING, *CALIBRATION, '--pretrained_ann', trained]
    run(module, *flags, '--epochs', 1, '--name', 'm')
    run(module, *flags, '--epochs', 3, '--name', 'm', '--resume')
    out = capsys.readouterr().out
    path = f'logs/{module.__name__}/m.jsonl'
    about, epochs = metrics_of(path)[0], epochs_of(path)
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
    assert list(epochs_of(f'logs/{module.__name__}/previous.1.m.jsonl')) == list(epochs)
    assert max(epochs_of(path)) == 1


@pytest.mark.parametrize('schedule, rates', [
    (['--lr_schedule', 'step', '--lr_interval', '1', '--lr_reduce', 4], [0.4, 0.4, 0.1, 0.1]),
    # half a cosine behind the warm-up of 0.03
    (['--lr_schedule', 'cosine'], [0.4 * 0.001 / 0.031, *(0.2 * (1 + math.cos(math.pi * (done - 0.03) / 0.97))
                                                          for done in (0.25, 0.5, 0.75))])])
@pytest.mark.parametrize('momentum', [0, 0.5])
def test_two_epochs_are_four_steps_of_sgd_on_the_mean_loss_of_a_batch(schedule, rates, momentum):
    args = [*schedule, '--epochs', 2, '-lr', 0.4, '--momentum', momentum, '--weight_decay', 0.1]
    args, labels = ann.get_args_parser().parse_args(list(map(str, args))), torch.tensor([0, 1, 2, 1, 0])
    images = torch.arange(5 * 8, dtype=torch.uint8).view(5, 1, 2, 4)
    dataset, network = data.Pictures(images, labels, data.Transform(top=40, signed=False)), nn.Sequential(
        nn.Flatten(), nn.Linear(8, 3))
    weight, bias = (p.detach().clone().requires_grad_() for p in network.parameters())
    optimizer, device = engine.make_optimizer(network, args), torch.device('cpu')
    for epoch in (1, 2):
        along = engine.Along(rate=functools.partial(engine.learning_rate_at, epoch, args))
        engine.train_epoch(network, data.epoch_loader(dataset, 3), optimizer, engine.cross_entropy, device, along=along)
    pixels, velocity = images.flatten(1) / 40, [0, 0]
    for rate, batch in zip(rates, [slice(0, 3), slice(3, 5)] * 2):
        loss = F.cross_entropy(pixels[batch] @ weight.T + bias, labels[batch])  # a mean
        for i, gradient in enumerate(torch.autograd.grad(loss, (weight, bias))):
            velocity[i] = momentum * velocity[i] + gradient + 0.1 * (weight, bias)[i].detach()
            (weight, bias)[i].data -= rate * velocity[i]
    assert torch.allclose(network[1].weight, weight, atol=1e-6) and torch.allclose(network[1].bias, bias, atol=1e-6)


@pytest.mark.parametrize('output, scale', [('mean', 4), ('sum', 1)])
def test_the_loss_and_confidences_are_of_the_mean_over_the_steps_or_of_the_sum(output, scale, capsys):
    image = pytest.importorskip('PIL.Image')
    flags = [*SMALL, '--timesteps', 4, '--encoding', 'direct', '--delay', 0, '--activation', 'Linear', '--backend',
             'torch', '--default_threshold', 0.3, '--output', output]
    run(snn, *flags, '--epochs', 1, '-lr', 1e-2, '--name', 'o')
    args, state = snn.get_args_parser().parse_args(list(map(str, flags))), load('trained_models/snn/o.pth')
    images = setup.load_data(args)
    model = setup.build_snn(args, images, state).eval()
    checkpoint.load_snn(model, state, 'o.pth')
    given, labels = images.test.batch(list(range(50)))
    wanted = F.cross_entropy(model(given).detach() / scale, labels).item()
    assert epochs_of('logs/snn/o.jsonl')[state['epoch']]['test_loss'] == pytest.approx(wanted, rel=1e-4)
    image.new('L', (8, 8), 100).save('new.png')
    capsys.readouterr()
    run(snn, '--pretrained_snn', 'trained_models/snn/o.pth', '--predict', 'new.png', '--no-gpu')
    confidence, guess = (model(data.picture('new.png', 'DIGITS', (1, 8, 8))[None]) / scale).softmax(1).max(1)
    said, = re.findall(r'new\.png: (\d) ([\d.]+)%', capsys.readouterr().out)
    assert int(said[0]) == guess and float(said[1]) == pytest.approx(100 * confidence.item(), abs=0.06)


def test_label_smoothing_by_hand():
    logits, label = torch.tensor([[math.log(3), 0.]]), torch.tensor([0])  # probabilities 3/4 and 1/4
    for scale, smoothing, want in ((1, 0.0, -math.log(3 / 4)), (1, 0.2, -0.9 * math.log(3 / 4) - 0.1 * math.log(1 / 4)),
                                   (0.5, 0.2, -0.9 * math.log(9 / 10) - 0.1 * math.log(1 / 10))):
        assert engine.cross_entropy(logits, label, scale, smoothing).item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize('module', [ann, snn])
def test_label_smoothing_is_of_training_alone(module, trained):
    # without delay: at T = 8 hardly a spike of a few delayed layers is at the output
    flags = [*(SMALL if module is ann else [*SPIKING, '--delay', 0, *CALIBRATION]), '--pretrained_ann', trained]
    epochs = {}
    for smoothing in ('0', '0.5'):  # at a rate that leaves the weights as they are
        run(module, *flags, '--epochs', 1, '-lr', '1e-12', '--name', 'v', '--label_smoothing', smoothing)
        epochs[smoothing] = epochs_of(f'logs/{module.__name__}/v.jsonl')[1]
    plain, smooth = epochs['0'], epochs['0.5']
    assert smooth['test_loss'] == pytest.approx(plain['test_loss'], abs=1e-6)
    assert abs(smooth['train_loss'] - plain['train_loss']) > 1


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
    epochs = epochs_of(f'logs/{module.__name__}/v.jsonl')
    assert [epochs[n].get('test_accuracy') for n in (1, 2, 3)] == [None, 0.6, None]
    assert load(f'trained_models/{module.__name__}/v.pth')['epoch'] == 2


def test_files_that_are_no_pictures_are_said(capsys):
    from PIL import Image
    for place in ('train/a', 'train/b', 'test/a'):
        Path('set', place).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(f'set/{place}/1.gif')
    Path('set/test/a/2.heic').touch()
    run(ann, '-a', 'RESNET6', '--dataset', 'FOLDER', '--data_dir', 'set', '--image_size', 8, '--epochs', 1, '--no-gpu')
    lines = [line for line in capsys.readouterr().out.splitlines() if '.heic' in line]
    assert len(lines) == 1 and lines[0].startswith('files left out') and lines[0].endswith('set/test: 1 .heic')


def test_tensorboard_gets_the_metrics():
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run(ann, *SMALL, '--epochs', 2, '--tensorboard', '--name', 'b')
    events = EventAccumulator('logs/ann/b').Reload()
    epochs = epochs_of('logs/ann/b.jsonl')
    for key in ('train_loss', 'test_accuracy'):
        assert [(event.step, event.value) for event in events.Scalars(key)] == [
            (n, pytest.approx(epochs[n][key])) for n in (1, 2)]


def test_tensorboard_shows_one_run_of_a_name(monkeypatch):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def steps(folder):
        return [event.step for event in EventAccumulator(f'logs/ann/{folder}').Reload().Scalars('train_loss')]

    flags = [*SMALL, '--tensorboard', '--name', 'b']
    run(ann, *flags, '--epochs', 1)
    run(ann, *flags, '--epochs', 2, '--resume')  # which is the same run
    assert steps('b') == [1, 2]
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(engine, 'train_epoch', None)  # ends the run in its first epoch
        run(ann, *flags, '--epochs', 2)
    assert steps('b') == [1, 2]  # a run that saves nothing leaves what is there
    run(ann, *flags, '--epochs', 1)
    assert (steps('b'), steps('previous.1.b')) == ([1], [1, 2])
    run(ann, *SMALL, '--name', 'b', '--epochs', 1)  # without --tensorboard, too
    assert not Path('logs/ann/b').exists() and steps('previous.2.b') == [1]


@pytest.mark.parametrize('surrogate, width', [(['Linear'], 1.0), (['Rectangle', '--width', 3], 3.0)])
def test_train_from_scratch_and_go_on_from_an_snn(surrogate, width, capsys):
    run(snn, *SPIKING, '--epochs', 1, '--activation', *surrogate, '--train_acc_batches', 1, '--test_acc_every_batch')
    out = capsys.readouterr().out
    assert 'batch 1: train loss' in out and 'test batch 1: accuracy' in out
    run(snn, *SMALL, '--pretrained_snn', 'trained_models/snn/snn_resnet6_digits_8.pth', '--epochs', 1, '--name', 'b')
    out = capsys.readouterr().out
    assert f'timesteps 8, leak 1.0, activation {surrogate[0]}' in out
    state = load('trained_models/snn/b.pth')
    assert (state['activation'], state['args']['activation'], state['args']['width']) == (*2 * surrogate[:1], width)


def test_an_ann_starts_from_another_data_sets_weights(trained, capsys):
    state = load(trained)
    state['state_dict']['classifier.0.weight'] = torch.zeros(4, 512)
    torch.save(state, 'other.pth')
    run(ann, *SMALL, '--pretrained_ann', 'other.pth', '--epochs', 1)
    assert 'classifier.0.weight is for other classes and starts from new weights' in capsys.readouterr().out
    fails(ann, 'does not fit this network.*classifier.0.weight is 4x512, not 10x512', *SMALL, '--pretrained_ann',
          'other.pth', '--test_only')


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='of glibc')
def test_memory_that_was_freed_is_not_cleared_anew():
    cpu_ways.keep_memory()
    faults = []
    for _ in range(30):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(9 * 2 ** 20)  # 36 MiB, 9216 pages; glibc gives back what is above 32
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sum(faults[-10:]) < 9000, faults  # a few small values that take from what was freed may move it


# -- what a run says of the code --------------------------------------------------------------------------------------

@pytest.fixture
def git(monkeypatch):
    """git(folder, words): call git there, with a user of its own; the line that it prints."""
    if not shutil.which('git'):
        pytest.skip('there is no git')
    for name in [name for name in os.environ if name.startswith('GIT_')]:
        monkeypatch.delenv(name)

    def call(folder, words):
        command = ['git', '-c', 'user.name=a', '-c', 'user.email=a', '-C', folder, *words.split()]
        return subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip()
    return call


def test_the_commit_is_of_the_projects_own_repository(tmp_path, monkeypatch, git):
    around, project = tmp_path / 'around', tmp_path / 'around/project'
    code = project / 'experiment/reporting/metrics.py'
    code.parent.mkdir(parents=True)
    code.touch()
    link = tmp_path / 'link'
    link.symlink_to(project)
    commits = {}
    for folder in (around, project):
        (folder / 'file').touch()
        git(folder, 'init')
        git(folder, 'add file')
        git(folder, f'commit -m {folder.name}')
        commits[folder] = git(folder, 'rev-parse HEAD')[:12]
    for file in (code, link / 'experiment/reporting/metrics.py'):
        monkeypatch.setattr(metrics, '__file__', str(file))
        assert metrics.commit() == commits[project]
    with monkeypatch.context() as patch:
        for name, value in (('GIT_DIR', around / '.git'), ('GIT_WORK_TREE', around), ('GIT_INDEX_FILE', 'none')):
            patch.setenv(name, str(value))
            assert metrics.commit() == commits[project]
    (project / '.git').rename(tmp_path / 'away')
    git(around, 'add project')
    git(around, 'commit -m both')
    assert metrics.commit() is None
    monkeypatch.setenv('GIT_DIR', str(around / '.git'))
    assert metrics.commit() is None
    (tmp_path / 'away').rename(project / '.git')
    (project / 'file').write_text('changed')
    assert metrics.commit() == commits[project] + '+'
