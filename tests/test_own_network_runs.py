"""Runs of the scripts with --architecture FILE.py:NAME, a network of one's own."""
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from test_distributed import close, start
from torch import nn

import ann
import snn
from conftest import CALIBRATION, ROOT, fails, load, run, same
from experiment import UserError, data, distributed, engine, files, own, setup
from experiment.sweeps import sweep
from self_models import QCFS, VGG_SNN_STDB, quantize, spiking

pytestmark = pytest.mark.usefixtures('in_an_empty_folder')

NETWORKS = """
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def chain(labels, input_shape):  # lazy: what it makes of images of any size is known when it first sees one
    return nn.Sequential(nn.Conv2d(input_shape[0], 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
                         nn.LazyLinear(24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, labels))


class Shared(nn.Module):  # one ReLU twice, one of a function, a sum, and a layer of no use
    def __init__(self, labels):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.unused, self.relu, self.head = nn.Linear(3, 3), nn.ReLU(), nn.Linear(8, labels)

    def forward(self, x):
        x = self.relu(self.first(x))
        x = self.relu(self.second(x) + x)
        return self.head(F.relu(self.second(x)).mean((2, 3)))


class Named(nn.Module):  # with weights called as a neuron's, and the last layer registered first
    def __init__(self, labels, input_shape):
        super().__init__()
        self.head, self.body = nn.Linear(8, labels), nn.Linear(math.prod(input_shape), 8)
        self.thresholds, self.leaks, self.bound = (nn.Parameter(0.1 * torch.rand(8)) for _ in range(3))

    def forward(self, x):
        return self.head(F.relu(self.body(x.flatten(1)) + self.thresholds + self.leaks + self.bound))


def mlp(*layers):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), *layers)


def gelu():
    return mlp(nn.GELU(), nn.Linear(8, 10))


def without_activation():
    return mlp(nn.Linear(8, 10))


def for_seven(**given):
    return mlp(nn.ReLU(), nn.Linear(8, 7))


def maps():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 10, 3))


def of_larger_images():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10))


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp(nn.ReLU(), nn.Linear(8, 10))

    def forward(self, x):
        return self.layers(x.view(-1, 3))


def pooled():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10))


class TwoInTraining(ByHand):
    def forward(self, x):
        return (self.layers(x), x) if self.training else self.layers(x)


class TwoInputs(ByHand):
    def forward(self, x, y):
        return self.layers(x + y)


class Uncopied(ByHand):
    def __init__(self):
        super().__init__()
        self.made = self.layers[1].weight * 2


def no_module(labels):
    return labels


def no_weights():
    return nn.Sequential(nn.Flatten(), nn.ReLU())


def frozen():
    return mlp(nn.ReLU(), nn.Linear(8, 10)).requires_grad_(False)


def wants_more(width):
    return mlp(nn.ReLU(), nn.Linear(8, width))


def stops():
    raise KeyError('no\\nsuch key')


def quits():
    raise SystemExit(3)


def four_levels():
    from self_models import QCFS
    return mlp(QCFS(4), nn.Linear(8, 10))


def named_twice():
    return Twice(mlp(nn.ReLU()))


class Twice(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block, self.all = block, nn.Sequential(block, nn.Linear(8, 10))

    def forward(self, x):
        return self.all(x)


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.conv, self.last = mlp(nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.first(x)
        return self.last(x if self.training else x + self.conv(torch.relu(x)))


class Way(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.net = way, mlp(nn.ReLU(), nn.Linear(8, 10))

    def forward(self, x):
        return self.net(self.way(x))


def asks_its_type():
    return Way(lambda x: (x - 0.5) / 0.25 if isinstance(x, torch.Tensor) else x)


def numpy_size():
    return Way(lambda x: x.view(-1, np.prod(x.shape[1:])))


def some_levels():
    from self_models import QCFS
    return nn.Sequential(mlp(QCFS(4), nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 10))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.std = torch.tensor(0.5), torch.tensor(0.2)  # no buffers

    def forward(self, x):
        return (x - self.mean) / self.std


def normed():
    return nn.Sequential(Normed(), mlp(nn.ReLU(), nn.Linear(8, 10)))


class Scaled(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.weight = module, nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        return x + self.weight * self.module(x)


def scaled():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), Scaled(nn.Conv2d(8, 8, 3, padding=1)), nn.ReLU(), nn.Flatten(),
                         nn.Linear(288, 10))


class StillNormed(ByHand):  # a train() that gives nothing back
    def forward(self, x):
        return self.layers(x)

    def train(self, mode=True):
        super().train(mode)


made = for_seven()
number = 5
"""
DIGITS = ['--dataset', 'DIGITS', '--train_samples', 97, '--test_samples', 50, '--no-gpu', '--num_workers', 0,
          '--batch_size', 32]
QUANTIZED = ['--activation', 'QCFS', '--levels', 4]
ADAM = ['--optimizer', 'Adam', '-lr', '5e-3']


def of(name, *flags):
    return ['-a', f'nets.py:{name}', *DIGITS, *flags]


@pytest.fixture(autouse=True)
def nets(tmp_path):
    """The file of NETWORKS in the folder of the test."""
    (tmp_path / 'nets.py').write_text(NETWORKS)


@pytest.fixture(scope='module')
def anns(tmp_path_factory):
    """{network: the checkpoint of its ANN}, chain of ReLU, Shared of QCFS. Tests leave them as they are."""
    folder = tmp_path_factory.mktemp('anns')
    (folder / 'nets.py').write_text(NETWORKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(ann, *of('chain', *ADAM, '--epochs', 2))
        run(ann, *of('Shared', *ADAM, *QUANTIZED, '--epochs', 2))
    return {'chain': f'{folder}/trained_models/ann/ann_nets_chain_digits.pth',
            'Shared': f'{folder}/trained_models/ann/ann_nets_shared_digits.pth'}


def converted(anns, name, *flags):
    """Flags of snn.py from one of the ANNs."""
    of_relu = ['--timesteps', 12, *CALIBRATION] if name == 'chain' else ['--timesteps', 4]
    return of(name, '--pretrained_ann', anns[name], *of_relu, '--activation', 'Linear', *flags)


def accuracy_of(out, what):
    return float(re.findall(rf'{what}: test accuracy ([\d.]+)%', out)[-1])


def test_cached_thresholds_are_of_the_networks_code_too(tmp_path, capsys):
    flags = of('chain', *CALIBRATION, '--pretrained_ann', 'trained_models/ann/a.pth', '--timesteps', 4, '--test_only')
    run(ann, *of('chain', *ADAM, '--epochs', 1, '--name', 'a'))

    def cached(*more):
        capsys.readouterr()
        run(snn, *flags, *more)
        return 'thresholds taken from' in capsys.readouterr().out

    assert not cached() and cached() and cached('--timesteps', 6)
    text = NETWORKS.replace('nn.AvgPool2d(2)', 'nn.MaxPool2d(2, 2)')  # of another length, so that no cached code runs
    assert text != NETWORKS
    (tmp_path / 'nets.py').write_text(text)
    with warnings.catch_warnings(action='ignore'):
        sys.modules.pop('_own_network_nets')
        assert not cached() and cached()


def test_cached_thresholds_are_of_the_networks_numbers_too(tmp_path, capsys):
    flags = of('normed', *CALIBRATION, '--pretrained_ann', 'trained_models/ann/a.pth', '--timesteps', 4, '--test_only')
    run(ann, *of('normed', *ADAM, '--epochs', 1, '--name', 'a'))
    for changed in (False, True):
        if changed:
            (tmp_path / 'nets.py').write_text(NETWORKS.replace('tensor(0.2)', 'tensor(0.25, dtype=torch.bfloat16)'))
            sys.modules.pop('_own_network_nets')
        capsys.readouterr()
        run(snn, *flags)
        run(snn, *flags)
        assert capsys.readouterr().out.count('thresholds taken from') == 1


def test_a_weight_may_be_called_as_a_bound_is():
    run(ann, *of('Named', *QUANTIZED, '--epochs', 1, '--name', 'q'))
    run(ann, *of('Named', *QUANTIZED, '--epochs', 2, '--name', 'q', '--resume'))
    run(snn, *of('Named', '--pretrained_ann', 'trained_models/ann/q.pth', '--timesteps', 4, '--test_only'))


def test_a_part_may_be_called_module_beside_a_weight_of_its_own():
    run(ann, *of('scaled', '--epochs', 1, '--name', 's'))
    run(snn, *of('scaled', '--pretrained_ann', 'trained_models/ann/s.pth', *CALIBRATION, '--timesteps', 4,
                 '--epochs', 1))


def test_a_train_of_its_own_may_give_nothing_back():
    run(ann, *of('StillNormed', '--epochs', 1, '--name', 'r'))
    run(ann, *of('StillNormed', *QUANTIZED, '--pretrained_ann', 'trained_models/ann/r.pth', '--epochs', 1, '--name',
                 'q'))
    run(snn, *of('StillNormed', '--pretrained_ann', 'trained_models/ann/q.pth', '--timesteps', 2, '--epochs', 1))


def test_a_default_threshold_holds_for_its_own_qcfs_from_scratch(capsys):
    run(snn, *of('four_levels', '--timesteps', 8, '--default_threshold', 0.5, '--epochs', 1))
    assert '\nthresholds: 0.5\n' in capsys.readouterr().out


def test_bounds_of_channels_that_nothing_learns(capsys):
    fails(ann, '--bounds channel: the code of nets.py:four_levels has QCFS of its own', *of('four_levels', *QUANTIZED),
          '--bounds', 'channel')
    flags = of('chain', '--bounds', 'channel', '--name', 'c')  # of ReLU
    run(ann, *flags, '--epochs', 1)
    run(ann, *flags, '--epochs', 2, '--resume')
    assert capsys.readouterr().out.count('--bounds has no effect here: it belongs to --activation QCFS') == 2


def test_pictures_are_not_cut_for_a_test_of_qcfs(anns, capsys):
    run(snn, *converted(anns, 'Shared', '--test_only', '--cutout', 3))
    assert '--cutout has no effect here: it belongs to training\n' in capsys.readouterr().out


# -- what it reaches --------------------------------------------------------------------------------------------------

def test_the_example_learns_the_digits_at_four_time_steps(capsys):
    own = ['-a', ROOT / 'examples/network.py:network', '--no-gpu', '--batch_size', 32]
    run(ann, *own, '--dataset', 'DIGITS', *QUANTIZED, '--optimizer', 'Adam', '-lr', '2e-3', '--lr_schedule', 'cosine',
        '--epochs', 3)
    run(snn, *own, '--pretrained_ann', 'trained_models/ann/ann_network_digits.pth', '--timesteps', 4, '--test_only')
    assert accuracy_of(capsys.readouterr().out, 'converted SNN') >= 95


def test_balanced_thresholds_bring_a_network_of_relu_near_its_ann_at_100_steps(capsys):
    whole = ['-a', 'nets.py:chain', '--dataset', 'DIGITS', '--no-gpu', '--num_workers', 0]
    run(ann, *whole, '--optimizer', 'Adam', '-lr', '1e-2', '--epochs', 3)
    ann_accuracy = 100 * load('trained_models/ann/ann_nets_chain_digits.pth')['accuracy']
    assert ann_accuracy > 90
    run(snn, *whole, '--pretrained_ann', 'trained_models/ann/ann_nets_chain_digits.pth', '--timesteps', 100,
        '--scaling_factor', 1, '--calibration_samples', 50, '--calibration_timesteps', 100, '--test_only')
    assert accuracy_of(capsys.readouterr().out, 'converted SNN') > ann_accuracy - 3


DOCS = (ROOT / 'docs/own_network.md').read_text()


def test_the_commands_of_its_page(capsys):
    Path('examples').symlink_to(ROOT / 'examples')
    for block in re.findall('```bash\n(.*?)```', DOCS, re.S):
        for line in block.replace('\\\n', ' ').splitlines():
            python, script, *flags = shlex.split(line)
            assert python == 'python'
            run({'ann.py': ann, 'snn.py': snn}[script], *flags, '--no-gpu')
    out = capsys.readouterr().out
    assert accuracy_of(out, 'loaded SNN') > 95  # T = 2, fine-tuned
    assert accuracy_of(out, 'converted SNN') > 90  # ReLU, T = 100
    table, = re.findall('```\n +test accuracy +time steps\n(.*?)```', DOCS, re.S)
    shown = [float(value) for value in re.findall(r'([\d.]+)%', table)]
    best = load('trained_models/snn/snn_network_small_digits_2.pth')
    found = [best['history'][0][key] for key in ('ann_accuracy', 'test_accuracy')] + [best['accuracy']]
    assert [100 * value for value in found] == pytest.approx(shown, abs=2)  # it differs between processors


def test_the_python_of_its_page():
    text, = re.findall('```python\n(.*?)```', DOCS, re.S)
    sys.modules.pop('_own_network_network', None)
    network = own.build(f'{ROOT}/examples/network.py:small', 10, (1, 8, 8))
    images = torch.rand(4, 1, 8, 8)
    known = {'network': network, 'images': images, 'batches': [(images, torch.arange(4))] * 2}
    exec(text, known)
    assert known['logits'].shape == (4, 10) and known['snn'].thresholds.tolist() == known['thresholds']
    assert known['ann'] is not network and not any(isinstance(module, QCFS) for module in network.modules())


def layers_of(heading):
    """The nn.NAME in the table below a heading of the page, as modules that follow 8 channels."""
    table = DOCS.split(f'## {heading}')[1].split('##')[0]
    names = [name for line in table.splitlines() if line.startswith('|') for cell in line.split('|')[1:3 if heading ==
             'What it may contain' else 2] for name in re.findall(r'nn\.(\w+)', cell)]
    given = {'Conv': (8, 8, 3), 'Linear': (8, 8), 'Batch': (8,), 'Adaptive': (1,), 'AvgPool': (2,), 'MaxPool': (2,),
             'Unflatten': (1, (2, 4)), 'PixelS': (2,), 'ZeroPad': (1,), 'LayerNorm': (8,), 'Group': (2, 8),
             'Instance': (8,), 'LocalR': (2,), 'Softmax': (1,), 'LogS': (1,), 'Multihead': (8, 2), 'LSTM': (8, 8)}
    return [(name, next((value for key, value in given.items() if name.startswith(key)), ())) for name in names]


@pytest.mark.parametrize('name, given', [layer for layer in layers_of('What it may contain')
                                         if layer[0] not in ('ReLU', 'Sequential')])
def test_what_its_page_says_may_stand_in_it(name, given):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), getattr(nn, name)(*given), nn.Conv2d(8, 4, 1))
    with warnings.catch_warnings(action='ignore'):  # of a max pool
        assert len(spiking(network, 3).lifs) == 1


@pytest.mark.parametrize('name, given', [layer for layer in layers_of('What is refused') if layer[0] != 'ReLU'])
def test_what_its_page_says_is_refused(name, given):
    layer = getattr(nn, name)(*given)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer, self.last = nn.Linear(8, 8), layer, nn.Linear(8, 4)

        def forward(self, x):
            x = self.first(x).relu()
            x = {'MultiheadAttention': lambda: self.layer(x, x, x)[0], 'LSTM': lambda: self.layer(x)[0]}.get(
                name, lambda: self.layer(x))()
            return self.last(x)

    with pytest.raises(ValueError, match='^layer: '):
        spiking(Network(), 3)


# -- the ways of a run ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flags', [[], [*QUANTIZED, '--bounds', 'channel', '--validation_fraction', 0.1]])
@pytest.mark.parametrize('name', ['chain', 'Shared'])
def test_a_resumed_ann_ends_as_one_that_was_not_stopped(name, flags):
    run(ann, *of(name, *ADAM, *flags, '--epochs', 2, '--name', 'whole'))
    run(ann, *of(name, *ADAM, *flags, '--epochs', 1, '--name', 'parts'))
    run(ann, *of(name, *ADAM, *flags, '--epochs', 2, '--name', 'parts', '--resume'))
    whole, parts = (load(f'trained_models/ann/{each}.last.pth') for each in ('whole', 'parts'))
    assert same(whole['state_dict'], parts['state_dict']) and same(whole['optimizer'], parts['optimizer'])
    ignored = dict.fromkeys(('name', 'resume'))
    assert {**whole['args'], **ignored} == {**parts['args'], **ignored}


@pytest.mark.parametrize('name, flags', [
    ('chain', []), ('chain', ['--learn_threshold', '--learn_leak', '--leak', 0.9, '--validation_fraction', 0.1]),
    ('Shared', []), ('Shared', ['--learn_threshold', '--learn_leak'])])
def test_a_resumed_snn_ends_as_one_that_was_not_stopped(anns, name, flags):
    flags = [*flags, '-lr', '1e-2']
    run(snn, *converted(anns, name, *flags, '--epochs', 2, '--name', 'whole'))
    run(snn, *converted(anns, name, *flags, '--epochs', 1, '--name', 'parts'))
    # what is used up may be left out
    run(snn, *of(name, *flags, '--epochs', 2, '--name', 'parts', '--resume'))
    whole, parts = (load(f'trained_models/snn/{each}.last.pth') for each in ('whole', 'parts'))
    for key in ('state_dict', 'optimizer', 'thresholds', 'leaks', 'timesteps', 'activation'):
        assert same(whole[key], parts[key]), key
    ignored = dict.fromkeys(('name', 'resume'))
    assert {**whole['args'], **ignored} == {**parts['args'], **ignored}
    learns = '--learn_leak' in flags
    assert (len(set(whole['leaks'])) > 1) == learns
    first = load('trained_models/snn/whole.pth')
    assert learns or whole['thresholds'] == first['thresholds']


def test_bounds_of_channels_convert_to_the_same_outputs_as_the_plain_way(capsys):
    run(ann, *of('Shared', *ADAM, *QUANTIZED, '--bounds', 'channel', '--epochs', 1))
    path = 'trained_models/ann/ann_nets_shared_digits.pth'
    run(snn, *of('Shared', '--pretrained_ann', path, '--timesteps', 4, '--activation', 'Linear', '--epochs', 1))
    state, images = load('trained_models/snn/snn_nets_shared_digits_4.last.pth'), torch.rand(5, 1, 8, 8)
    assert [state['state_dict'][f'{name}.bounds'].shape for name in ('relu', 'relu_1', 'relu_2')] == [(8,)] * 3
    module = sys.modules['_own_network_nets']
    model = spiking(quantize(module.Shared(10), 4, channels=True), 4)
    model.load_state_dict(state['state_dict'])
    args = snn.get_args_parser().parse_args([str(flag) for flag in of('Shared', '--timesteps', 4, '--encoding',
                                             'direct', '--delay', 0, '--initial_potential', 0.5, '--backend', 'torch')])
    of_run = setup.build_snn(args, data.Data(None, None, [''] * 10, (1, 8, 8)), state)
    of_run.load_state_dict(state['state_dict'])
    assert torch.equal(of_run.eval()(images), model.eval()(images))
    capsys.readouterr()
    run(ann, *of('Shared', '--test_only', '--pretrained_ann', path))  # the file says QCFS, levels and bounds
    assert accuracy_of(capsys.readouterr().out, 'ANN') == pytest.approx(100 * load(path)['accuracy'], abs=0.01)


def test_a_trained_network_is_tested_gone_on_with_and_asked(anns, capsys):
    run(snn, *converted(anns, 'Shared', '--epochs', 1, '--test_acc_every_batch'))
    path, own = 'trained_models/snn/snn_nets_shared_digits_4.pth', of('Shared')
    capsys.readouterr()
    run(snn, *own, '--pretrained_snn', path, '--test_only')
    assert accuracy_of(capsys.readouterr().out, 'loaded SNN') == round(100 * load(path)['accuracy'], 2)
    run(snn, *own, '--pretrained_snn', path, '--timesteps', 7, '--epochs', 1, '--amp', '--activation', 'ATan',
        '--learn_threshold', '-lr', '1e-2')
    state = load('trained_models/snn/snn_nets_shared_digits_7.last.pth')
    assert (state['timesteps'], state['activation']) == (7, 'ATan')
    assert state['args']['architecture'] == 'nets.py:Shared' and state['thresholds'] != load(path)['thresholds']
    run(snn, *own, '--timesteps', 4, '--resume', '--test_only')

    from PIL import Image
    images = data.load('DIGITS', '').test.images
    for number in range(8):
        Image.fromarray((images[number, 0].long() * 255 // 16).byte().numpy()).save(f'{number}.png')
    capsys.readouterr()
    run(snn, '-a', 'nets.py:Shared', '--no-gpu', '--pretrained_snn', path, '--predict',
        *(f'{number}.png' for number in range(8)))
    first, *said = capsys.readouterr().out.splitlines()
    assert first.startswith(f'{path}: nets.py:Shared for DIGITS')
    assert [line.split(':')[0] for line in said] == [f'{number}.png' for number in range(8)]


def test_pictures_of_ones_own(capsys):
    from PIL import Image
    for part, count in (('train', 17), ('test', 4)):
        for name, shade in (('dark', 30), ('light', 220)):
            Path('pictures', part, name).mkdir(parents=True)
            for number in range(count):
                Image.new('RGB', (9, 7), (shade + number,) * 3).save(Path('pictures', part, name, f'{number}.png'))
    folder = ['--dataset', 'FOLDER', '--data_dir', 'pictures', '--image_size', 10, '--no-gpu', '--num_workers', 0]
    # of 34 pictures the last batch holds one, of which batch norm has no statistics
    run(ann, '-a', 'nets.py:chain', *folder, *ADAM, '--epochs', 3, '--batch_size', 11)
    path = 'trained_models/ann/ann_nets_chain_folder.pth'
    assert load(path)['accuracy'] == 1 and load(path)['classes'] == ['dark', 'light']
    # data set and image size are the file's
    run(snn, '-a', 'nets.py:chain', '--data_dir', 'pictures', '--pretrained_ann', path, '--timesteps', 30, *CALIBRATION,
        '--epochs', 1, '--no-gpu', '--num_workers', 0)
    capsys.readouterr()
    run(snn, '-a', 'nets.py:chain', '--no-gpu', '--pretrained_snn', 'trained_models/snn/snn_nets_chain_folder_30.pth',
        '--predict', 'pictures/test/dark/1.png', 'pictures/test/light/1.png')
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == ['dark', 'light']
    fails(ann, r'of_larger_images: its forward fails on images of 3x10x10 .*784', '-a', 'nets.py:of_larger_images',
          *folder, '--epochs', 1)


@pytest.mark.parametrize('module', [ann, snn])
def test_initial_weights_are_those_of_its_own_code_by_the_seed(module, monkeypatch):
    seen = []
    monkeypatch.setattr(engine, 'train', lambda model, *rest, **more: seen.append(model.state_dict()) or exit())
    flags = ['--timesteps', 5, '--default_threshold', 0.5] if module is snn else []
    for seed in (3, 3, 4):
        with pytest.raises(SystemExit):
            run(module, *of('Shared', *flags, '--seed', seed))
    torch.manual_seed(3)
    wanted = sys.modules['_own_network_nets'].Shared(10).state_dict()
    for key, weight in wanted.items():
        assert torch.equal(seen[0][key], weight) and torch.equal(seen[1][key], weight)
        assert not torch.equal(seen[2][key], weight)


def test_flags_that_mean_nothing_for_it_say_so(anns, capsys):
    run(ann, *of('chain', '--batch_norm', '--kernel_size', 5, '--dropout', 0.4, '--epochs', 1))
    said = capsys.readouterr().out
    for flag in ('batch_norm', 'kernel_size', 'dropout'):
        assert re.search(f'^--{flag} has no effect here', said, re.M)
    args = load('trained_models/ann/ann_nets_chain_digits.pth')['args']
    assert (args['batch_norm'], args['kernel_size'], args['dropout']) == (False, 3, 0.2)
    idle = {'kernel_size': 5, 'dropout': 0.4, 'default_threshold': 2}
    run(snn, *converted(anns, 'chain', '--test_only', '--balance_blocks', '--keep_batch_norm',
                        *(f'--{flag}={value}' for flag, value in idle.items())))
    said = capsys.readouterr().out
    for flag in ('balance_blocks', 'keep_batch_norm', *idle):
        assert re.search(f'^--{flag} has no effect here', said, re.M), flag
    capsys.readouterr()
    run(snn, *of('pooled', '--timesteps', 4, '--default_threshold', 1, '--epochs', 1))
    assert capsys.readouterr().out.count('2: the maximum of spikes at each step is not that of the ANN') == 1
    fails(snn, '--output fitted: .* leave the flag out', *converted(anns, 'chain', '--output', 'fitted'))


def test_its_own_quantized_activations_are_of_the_levels_that_the_flags_say(capsys):
    for flags in ([], ['--activation', 'QCFS']):
        fails(ann, 'its code has QCFS of 4 levels: say so with --activation QCFS --levels 4',
              *of('four_levels', *flags))
    run(ann, *of('four_levels', *QUANTIZED, '--epochs', 1))
    run(snn, *of('four_levels', '--pretrained_ann', 'trained_models/ann/ann_nets_four_levels_digits.pth', '--timesteps',
                 4, '--test_only'))
    assert 'the ANN was trained with' not in capsys.readouterr().out  # T = 4 is that of 4 levels


def test_relus_beside_quantized_activations_become_such(capsys):
    run(ann, *of('some_levels', *QUANTIZED, '--epochs', 1))
    own = of('some_levels', '--timesteps', 4, '--activation', 'Linear')
    run(snn, *own, '--pretrained_ann', 'trained_models/ann/ann_nets_some_levels_digits.pth', '--epochs', 1)
    path = 'trained_models/snn/snn_nets_some_levels_digits_4.pth'
    capsys.readouterr()
    run(snn, *own, '--pretrained_snn', path, '--test_only')
    assert accuracy_of(capsys.readouterr().out, 'loaded SNN') == round(100 * load(path)['accuracy'], 2)
    run(snn, *own, '--epochs', 2, '--resume')
    assert load(path.replace('.pth', '.last.pth'))['epoch'] == 2
    fails(snn, 'some of its activations are QCFS, others ReLU', *own, '--epochs', 1, '--name', 'scratch')


def test_a_network_of_relu_whose_block_has_two_names_gets_bounds(capsys):
    run(ann, *of('named_twice', '--epochs', 1, '--name', 'r'))
    for flags in ([], ['--bounds', 'channel']):
        run(ann, *of('named_twice', '--pretrained_ann', 'trained_models/ann/r.pth', *QUANTIZED, *flags, '--test_only'))
    assert capsys.readouterr().out.count('QCFS takes the place of its ReLU') == 2


def test_a_network_with_a_block_of_two_names_becomes_spiking(capsys):
    for name, flags in (('r', []), ('q', QUANTIZED)):
        run(ann, *of('named_twice', '--epochs', 1, '--name', name, *flags))
        run(snn, *of('named_twice', '--pretrained_ann', f'trained_models/ann/{name}.pth', '--timesteps', 4,
                     *([] if flags else CALIBRATION), '--epochs', 1, '--name', name))
        capsys.readouterr()
        run(snn, *of('named_twice', '--pretrained_snn', f'trained_models/snn/{name}.pth', '--test_only'))
        assert accuracy_of(capsys.readouterr().out, 'loaded SNN') == round(
            100 * load(f'trained_models/snn/{name}.pth')['accuracy'], 2)


def test_weights_that_a_pass_of_training_leaves_out_are_trained():
    network = own.build('nets.py:Skips', 10, (1, 8, 8))
    assert all(weight.requires_grad for weight in network.parameters())


def test_weights_that_are_named_as_a_neurons_are_decay():
    args = ann.get_args_parser().parse_args(['--optimizer', 'Adam', '--no-amsgrad', '--weight_decay', '0.1'])
    network = own.build('nets.py:Named', 10, (1, 8, 8))
    learned = {'learn_threshold': True, 'learn_leak': True, 'timesteps': 2}
    for model, free in ((network, []), (quantize(network, channels=True), ['relu.bound']),
                        (spiking(network, **learned), ['relu.threshold', 'relu.leak']),
                        (VGG_SNN_STDB('VGG5', dataset='DIGITS', **learned), ['thresholds', 'leaks'])):
        optimizer = engine.make_optimizer(model, args)
        decays = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
        assert not optimizer.defaults['amsgrad'] and {name for name, p in model.named_parameters() if not decays[id(p)]
                                                      } == set(free)


@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_a_weight_that_gets_its_first_gradient_late_is_trained_as_torch_does(momentum):
    args = ann.get_args_parser().parse_args(['--momentum', str(momentum)])
    networks = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [engine.make_optimizer(networks[0], args), torch.optim.SGD(
        networks[1].parameters(), args.learning_rate, momentum, weight_decay=args.weight_decay, foreach=False)]
    for skipped in (True, False, True, False):
        for network, optimizer in zip(networks, optimizers):
            optimizer.zero_grad()
            (network[0] if skipped else network)(torch.ones(5, 3)).square().sum().backward()
            optimizer.step()
    assert all(map(torch.allclose, *(network.parameters() for network in networks)))


def test_the_seed_decides_what_any_generator_draws():
    drawn = []
    for seed in (3, 3, 4):
        engine.seed_all(seed)
        drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert drawn[0] == drawn[1] and all(a != b for a, b in zip(drawn[0], drawn[2]))


def test_code_that_torch_fx_follows_otherwise_is_refused_before_training():
    for name, words in (('asks_its_type', 'nets.py:asks_its_type: its forward computes something else than what torch.'
                                          'fx follows of it: write it without conditions on its input'),
                        ('numpy_size', 'nets.py:numpy_size: what torch.fx follows of its forward fails: ')):
        fails(ann, re.escape(words), *of(name, '--epochs', 1))


def test_going_on_with_another_file_of_the_same_weights_is_said(capsys):
    for folder in ('one', 'two'):
        Path(folder).mkdir()
        shutil.copy('nets.py', folder)
    run(ann, *DIGITS, '-a', 'one/nets.py:chain', '--epochs', 1, '--name', 'c')
    capsys.readouterr()
    run(ann, *DIGITS, '-a', 'two/nets.py:chain', '--epochs', 2, '--name', 'c', '--resume')
    assert 'was trained as one/nets.py:chain, and goes on as two/nets.py:chain' in capsys.readouterr().out
    run(ann, *DIGITS, '-a', './two/nets.py:chain', '--epochs', 3, '--name', 'c', '--resume')
    assert 'goes on as' not in capsys.readouterr().out


# -- several runs, several processes ----------------------------------------------------------------------------------

def words_of(script):
    """The words of each run of a script."""
    return [shlex.split(line)[2:] for line in Path(script).read_text().splitlines() if line.startswith('run "$PYTHON"')]


def test_networks_of_a_sweep_have_names_and_files_of_their_own(monkeypatch, capsys, tmp_path):
    for folder in ('one', 'two'):
        Path(folder).mkdir()
        Path(folder, 'net.py').write_text(NETWORKS)
    networks = ['one/net.py:chain', 'two/net.py:chain', 'two/net.py:Shared', str(tmp_path / 'nets.py:Shared'), 'VGG5',
                'nets/of/the/project.py:Net']
    Path('my nets').mkdir()
    Path('my nets', 'a:b.py').write_text(NETWORKS)
    networks.append('my nets/a:b.py:Shared')
    sweep.main(ann, [], ['-a', *networks, '--dataset', 'DIGITS', '--epochs', '1', '--seed', '0', '1'])
    runs = words_of('script.sh')
    assert len({words[words.index('--name') + 1] for words in runs}) == 2 * len(networks)
    monkeypatch.chdir(ROOT)  # where the script runs
    for words, wanted in zip(runs[::2], networks, strict=True):
        args = ann.get_args_parser().parse_args(words[1:])
        file, _, name = args.architecture.rpartition(':')
        if wanted in ('VGG5', 'nets/of/the/project.py:Net'):  # that is not here is seen from there
            assert args.architecture == wanted
        else:
            assert os.path.samefile(file, tmp_path / wanted.rpartition(':')[0]) and wanted.endswith(f':{name}')
    monkeypatch.chdir(tmp_path)
    sweep.main(snn, [], ['-a', 'nets.py:chain', 'nets.py:Shared', '--pretrained_ann', 'a.pth', '--timesteps', '4', '8'])
    assert len({words[words.index('--name') + 1] for words in words_of('script.sh')}) == 4


def test_a_table_says_which_network(capsys):
    for name, seed in (('chain', 0), ('chain', 1), ('Shared', 0)):
        run(ann, *of(name, '--epochs', 1, '--seed', seed, '--name', f'{name}_{seed}'))
    capsys.readouterr()
    sweep.main(ann, [], ['--summarize', *map(str, sorted(Path('logs/ann').glob('*.jsonl')))])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if 'nets.py' in line]
    assert [(row[1], row[2]) for row in rows] == [('nets.py:Shared', '1'), ('nets.py:chain', '2')]


def calls_of(tmp_path, script, *words, **environment):
    """[(script, its arguments)] of the runs that a recipe would start; arguments are parsed, or words."""
    tools, seen = tmp_path / 'bin', tmp_path / 'seen'
    tools.mkdir(exist_ok=True)
    (tools / 'python').write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done >> "$SEEN"; echo >> "$SEEN"\n')
    (tools / 'python').chmod(0o755)
    seen.unlink(missing_ok=True)
    inherited = {key: value for key, value in os.environ.items() if key not in (
        'EPOCHS', 'FURTHER', 'EXTRA', 'SEEDS', 'DATA', 'AMP', 'ARCHITECTURE', 'PRETRAINED')}
    subprocess.run(['bash', ROOT / script, *words], check=True, capture_output=True, env={
        **inherited, 'PATH': f'{tools}:{os.environ["PATH"]}', 'SEEN': str(seen), **environment})
    calls = [call.split('\n') for call in seen.read_text().strip().split('\n\n')]
    parsers = {'ann.py': ann.get_args_parser(), 'snn.py': snn.get_args_parser()}
    return [(name, parsers[name].parse_args(given) if name in parsers else given) for name, *given in calls]


def test_the_low_latency_recipe_takes_it(tmp_path):
    own = f'{tmp_path}/my nets/Net.py:Small'
    found = [args for script, args in calls_of(tmp_path, 'recipes/low_latency.sh', ARCHITECTURE=own, SEEDS='0')
             if script != 'snn_script.py']
    assert [args.architecture for args in found] == [own] * 6
    names = [args.name for args in found]
    assert names[0] == 'net_small_qcfs_seed0' and len(set(names)) == 6
    looked = [args.name for script, args in calls_of(  # what a look leaves is not taken for the whole runs'
        tmp_path, 'recipes/low_latency.sh', ARCHITECTURE=own, SEEDS='0', FURTHER='1', EXTRA='--train_samples 64')
        if script != 'snn_script.py']
    assert looked[0] == 'net_small_train_samples_64_qcfs_seed0' and not {*looked} & {*names}
    assert looked[-1] == 'net_small_train_samples_64_low_latency_1_1_seed0'


@pytest.mark.parametrize('script, words', [
    ('quickstart.sh', []), ('recipes/low_latency.sh', []), ('recipes/pretrained.sh', re.findall(
        r'^(?!train)(\w+)\(\) {', (ROOT / 'recipes/pretrained.sh').read_text(), re.M))])
def test_a_recipe_starts_from_what_it_has_made(script, words, tmp_path):
    made, extra = set(), {} if script == 'quickstart.sh' else {'EXTRA': '--train_samples 64'}
    for name, args in calls_of(tmp_path, script, *words, PRETRAINED=str(tmp_path / 'new'), **extra):
        if name in ('ann.py', 'snn.py'):
            assert args.pretrained_ann in {None, *made} and (not extra or args.train_samples == 64)
            kind = name.removesuffix('.py')
            made.add(f'trained_models/{kind}/{files.identifier(kind, args)}.pth')
        elif name == 'recipes/slim.py':
            assert args[0] in made
    assert len(made) >= 4


def test_two_processes_train_it_as_one_does_with_twice_the_batch(anns, tmp_path, capsys):
    """Its layer of no use gets no gradient, which several processes would wait for."""
    flags = converted(anns, 'Shared', '--epochs', 1, '-lr', '1e-2', '--train_samples', 40, '--learn_threshold')
    run(snn, *flags, '--name', 'one')
    out = start('snn.py', *flags, '--batch_size', 16, '--name', 'two', cwd=tmp_path)
    assert '2 processes, each with batches of 16' in out and 'batch norm is not' not in out
    one, two = (load(f'trained_models/snn/{name}.last.pth') for name in ('one', 'two'))
    assert close(one['state_dict'], two['state_dict']) and one['thresholds'] == pytest.approx(two['thresholds'])


def test_batch_norm_among_several_processes(monkeypatch):
    """On CPUs a line says that it is not synchronised; on GPUs torch's is put in its place, under the same names."""
    args = snn.get_args_parser().parse_args([str(flag) for flag in of('chain', '--timesteps', 3, '--backend', 'torch')])
    model = setup.build_snn(args, data.Data(None, None, [''] * 10, (1, 8, 8))).eval()
    x, before = torch.rand(3, 1, 8, 8), list(model.state_dict())
    torch.manual_seed(0)
    wanted = model(x)
    monkeypatch.setattr(distributed, 'wanted', lambda: True)
    assert any('batch norm is not synchronised' in line for line in setup.notes(args, torch.device('cpu'), model))
    monkeypatch.setattr(distributed, '_started', lambda: True)
    monkeypatch.setattr(torch.nn.parallel, 'DistributedDataParallel', lambda model, device_ids: model)
    learner = distributed.learner(model, torch.device('cuda', 0))
    assert learner is model and list(model.state_dict()) == before
    assert [type(module).__name__ for module in model.modules()].count('SyncBatchNorm') == 1
    torch.manual_seed(0)
    assert torch.equal(learner(x), wanted)


# -- a file is run only if the command line names it ------------------------------------------------------------------

@pytest.mark.parametrize('given', [[], ['-a', 'RESNET6'], ['-a', 'nets.py:Shared']])
def test_a_file_that_a_checkpoint_names_is_not_run(anns, given):
    Path('evil.py').write_text('open("ran", "w")\n' + NETWORKS)
    run(snn, *converted(anns, 'Shared', '--epochs', 1))
    Path('a.png').write_bytes(b'')
    Path('trained_models/ann').mkdir()
    ways = {'ann': [(ann, '--pretrained_ann', 'ann.pth'), (snn, '--pretrained_ann', 'ann.pth'),
                    (ann, '--resume', 'ann.pth'), (ann, '--resume', '--name', 'x')],
            'snn': [(snn, '--pretrained_snn', 'snn.pth'), (snn, '--resume', 'snn.pth'),
                    (snn, '--resume', '--name', 'x'), (snn, '--pretrained_snn', 'snn.pth', '--predict', 'a.png')]}
    for kind, path in (('ann', anns['Shared'].replace('.pth', '.last.pth')),
                       ('snn', 'trained_models/snn/snn_nets_shared_digits_4.last.pth')):
        state = load(path)
        for made_by in ('evil.py:Shared', str(Path('evil.py:Shared').resolve())):
            state['args']['architecture'] = made_by
            for file in (f'{kind}.pth', f'trained_models/{kind}/x.last.pth'):
                torch.save(state, file)
            for module, *flags in ways[kind]:
                try:
                    run(module, *DIGITS, *given, *flags, '--test_only')
                except UserError as error:
                    assert given or str(error).endswith(f': holds the network {made_by}, whose file is run only if you '
                                                        f'name it: add --architecture {made_by}')
                else:
                    assert given == ['-a', 'nets.py:Shared']
                assert not Path('ran').exists()
    run(ann, *DIGITS, '-a', 'evil.py:Shared', '--test_only', '--pretrained_ann', anns['Shared'])
    assert Path('ran').exists()


# -- what is wrong with it is one line --------------------------------------------------------------------------------

@pytest.mark.parametrize('name, words', [
    ('nothing', 'nets.py has no function or class nothing'),
    ('number', 'number in nets.py is of type int: give a function or class'),
    ('made', 'made in nets.py is a network: give a function or class that returns it'),
    ('no_module', 'no_module gives int, not an nn.Module'), ('no_weights', 'no_weights has no weights to train'),
    ('frozen', 'frozen has no weights to train'), ('wants_more', "TypeError: .*'width'"),
    ('stops', r"KeyError in line \d+: 'no\\nsuch key'"), ('quits', r'SystemExit in line \d+: 3'),
    ('gelu', '2: GELU has no spiking counterpart: put nn.ReLU or QCFS'), ('without_activation', 'no ReLU and no QCFS'),
    ('TwoInputs', 'takes 2 inputs'), ('TwoInTraining', 'gives a tuple in training, not a tensor'),
    ('Uncopied', 'cannot be traced: RuntimeError: Only Tensors created'),
    ('for_seven', r'\(2, 7\).*not \(2, 10\): the data have 10 classes'),
    ('maps', r'\(2, 10, 4, 4\).*not \(2, 10\)'),
    ('of_larger_images', r'forward fails on images of 1x8x8 \(channels, height, width\): RuntimeError: mat1 and mat2'),
    ('ByHand', r'forward fails on images of 1x8x8 .*: RuntimeError in line \d+: shape')])
def test_what_is_wrong_with_a_network(name, words, monkeypatch):
    def read(*_):
        raise AssertionError('before data are read')
    monkeypatch.setattr(data, 'load', read)
    for module in (ann, snn):
        fails(module, f'^--architecture nets.py:{name}: .*{words}', *of(name, '--epochs', 1))
    if name in ('gelu', 'for_seven'):  # also of a set that is to be downloaded
        own = {'gelu': 'GELU', 'for_seven': '3x32x32'}[name]
        fails(ann, own, '-a', f'nets.py:{name}', '--dataset', 'CIFAR100', '--epochs', 1, '--no-gpu')


@pytest.mark.parametrize('text, words', [
    ('def network(:\n', r'SyntaxError in line 1: invalid syntax$'), ('x = 1\n\n1 / 0\n', 'ZeroDivisionError in line 3'),
    ('import no_such_package\n', "ModuleNotFoundError in line 1: No module named 'no_such_package'"),
    ('from .beside import net\n', 'ImportError in line 1: .* by its name, without the dot'),
    ('import broken_beside\n', r'SyntaxError in line 1: .*broken_beside.py, line 2'),
    ('import sys\nsys.exit("no")\n', 'SystemExit in line 2: no'), ('network = "a\0b"\n', 'null bytes')])
def test_what_is_wrong_with_a_file(text, words):
    Path('wrong.py').write_text(text)
    Path('broken_beside.py').write_text('\n)\n')
    # the second time as the first, and before pictures are looked for
    for data_set in (DIGITS, DIGITS, ['--dataset', 'FOLDER', '--data_dir', 'none', '--no-gpu']):
        fails(ann, f'^--architecture wrong.py:network: .*{words}', '-a', 'wrong.py:network', *data_set)


def test_where_a_file_may_lie_and_what_its_name_may_be(called):
    for folder, file in (('a b', 'my net.py'), ('a:b', 'c:d.py'), ('C:\\nets', 'net.py')):
        Path(folder).mkdir()
        Path(folder, 'parts_of_it.py').write_text('from torch.nn import ReLU')
        Path(folder, file).write_text(NETWORKS + '\nfrom parts_of_it import ReLU\n')
        run(ann, '-a', f'{folder}/{file}:Shared', *DIGITS, '--epochs', 1)
        assert Path('trained_models/ann', f'ann_{Path(file).stem}_shared_digits.pth').exists()
        del sys.modules['parts_of_it']
    Path('folder.py').mkdir()
    for missing, words in (('none.py:Net', 'there is no file none.py'), ('folder.py:Net', 'there is no file folder.py'),
                       ('C:\\none\\net.py:Net', 'there is no file')):
        fails(ann, words, '-a', missing, *DIGITS)
    for unnamed in ('nets.py', 'nets.py:', 'nets.py:Shared.made', 'nets.py:Shared()', 'nets.py:a b', 'nets.pyc:Shared'):
        done = called(ann, '-a', unnamed)
        assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'FILE.py:NAME' in done.stderr


def test_weights_of_another_training(anns, capsys):
    torch.save(load(anns['chain'])['state_dict'], 'weights.pt')
    run(snn, *converted({'chain': 'weights.pt'}, 'chain', '--test_only'))
    run(snn, *converted(anns, 'chain', '--test_only'))
    said = re.findall('^(?:thresholds|converted SNN): .*', capsys.readouterr().out, re.M)
    assert len(said) == 4 and said[:2] == said[2:]


def test_weights_may_be_called_as_a_neurons_and_registered_in_any_order(capsys):
    run(ann, *of('Named', *ADAM, '--epochs', 1))
    path = 'trained_models/ann/ann_nets_named_digits.pth'
    run(ann, *of('Named', '--test_only', '--pretrained_ann', path))
    assert accuracy_of(capsys.readouterr().out, 'ANN') == round(100 * load(path)['accuracy'], 2)
    run(snn, *of('Named', '--pretrained_ann', path, '--timesteps', 6, *CALIBRATION, '--epochs', 1))
    saved = load('trained_models/snn/snn_nets_named_digits_6.pth')
    run(snn, *of('Named', '--pretrained_snn', 'trained_models/snn/snn_nets_named_digits_6.pth', '--test_only'))
    assert accuracy_of(capsys.readouterr().out, 'loaded SNN') == round(100 * saved['accuracy'], 2)
    # of another number of classes
    state = load(path)
    state['state_dict'] |= {'head.weight': torch.zeros(3, 8), 'head.bias': torch.zeros(3)}
    torch.save(state, 'other.pth')
    run(ann, *of('Named', '--pretrained_ann', 'other.pth', '--epochs', 1))
    assert re.search(r'weights from other.pth; its head.(weight|bias) and head.(weight|bias) is for other classes',
                     capsys.readouterr().out)


def test_other_weights_than_the_networks(anns):
    for module in (ann, snn):
        fails(module, 'does not fit this network .*it holds a nets.py:Shared for DIGITS.; set --architecture, '
              '--dataset and --image_size as it was trained', *of('chain'),
              '--pretrained_ann', anns['Shared'])
        fails(module, 'does not fit this network', *DIGITS, '-a', 'VGG5', '--pretrained_ann', anns['Shared'])
