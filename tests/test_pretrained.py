"""The networks in pretrained/, as the read-me has users try them first."""
import re
from pathlib import Path

import pytest
import torch

import snn
from conftest import ROOT, SPIKING, fails, load, run
from examples import network
from experiment import checkpoint, data, own
from recipes import slim

FILES = sorted((ROOT / 'pretrained').glob('*.pth'))
PAGE = (ROOT / 'pretrained/README.md').read_text()
DIGITS = ('--architecture', f'{ROOT}/examples/network.py:small', '--pretrained_snn',
          ROOT / 'pretrained/small_digits_4.pth', '--no-gpu')
pytestmark = pytest.mark.usefixtures('in_an_empty_folder')


def test_digits_has_the_accuracy_that_its_page_gives(capsys):
    run(snn, *DIGITS, '--test_only')
    percent, = re.findall(r'\| `small_digits_4\.pth` \|.*\| ([\d.]+) \|', PAGE)
    out = capsys.readouterr().out
    found, = re.findall(r'loaded SNN +([\d.]+)%', out)
    assert abs(float(found) - float(percent)) < 0.6  # two of 360 images: processors add up in other orders
    line, = re.findall('small_digits_4.pth: .* runs at (.*)', out)
    assert 'gamma 1.0' in line and 'alpha' not in line  # the file's, not the default; alpha is STDB's


def test_digits_says_what_a_picture_shows(capsys):
    from PIL import Image

    test = data.load('DIGITS', '').test
    for i in range(20):
        Image.fromarray((test.images[i, 0].long() * 255 // 16).byte().numpy()).save(f'{i}.png')
    run(snn, *DIGITS, '--predict', *(f'{i}.png' for i in range(20)))
    said = capsys.readouterr().out.splitlines()[1:]
    assert sum(line.startswith(f'{i}.png: {test.labels[i]} ') for i, line in enumerate(said)) >= 18


@pytest.mark.parametrize('path', sorted((ROOT / 'pretrained').glob('quick_*')), ids=lambda path: path.name)
def test_a_network_of_cifar10_classifies_a_picture(path, capsys):
    from PIL import Image

    Image.new('RGB', (40, 40), 'blue').save('sky.png')
    run(snn, '-a', f'{ROOT}/examples/network.py:quick', '--pretrained_snn', path, '--predict', 'sky.png', '--no-gpu')
    guesses = dict(re.findall(r'(\w+) ([\d.]+)%', capsys.readouterr().out.splitlines()[-1]))
    assert guesses.keys() <= {'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'}
    assert len(guesses) == 3 and 99 / 10 < sum(map(float, guesses.values())) <= 100.2


@pytest.mark.parametrize('name, weights', [
    ('network', '1.1 million'), ('small', '73,000'), ('deep', '232,000'), ('quick', '1.3 million'),
    ('max_pools', '1.2 million'), ('strided', '1.5 million')])
def test_the_networks_to_start_from_are_as_large_as_they_say(name, weights):
    make = getattr(network, name)
    count = sum(p.numel() for p in make(10, (3, 32, 32)).parameters())
    assert f'{weights} weights' in f'{count / 1e6:.1f} million weights, or {round(count, -3):,} weights'
    assert f'{weights} weights' in make.__doc__ and own.build(f'{ROOT}/examples/network.py:{name}', 10, (3, 32, 32))


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.name)
def test_a_file_holds_a_network_and_nothing_of_its_makers(path):
    state = checkpoint.load(path, 'snn')
    assert 'optimizer' not in state and re.search(rf'\| `{path.name}` \|.*\| \d+\.\d+ \|', PAGE)
    folders = [state['args']['data_dir'], *(each['data_dir'] for each in state['trained_on'])]
    assert all(folder is None or folder.startswith('~/Datasets') for folder in folders)
    assert all(torch.isfinite(value).all() for value in state['state_dict'].values())


def test_all_together_take_six_megabytes_at_most():
    assert 0 < sum(path.stat().st_size for path in FILES) <= 6e6


def test_slim_rounds_the_weights_and_leaves_out_the_training():
    run(snn, *SPIKING, '--data_dir', '/home/me/x', '--epochs', 1, '--name', 'k')
    whole = load('trained_models/snn/k.pth')
    slim.main('trained_models/snn/k.pth', 's.pth')
    small = torch.load('s.pth')
    assert whole.keys() - small.keys() >= {'optimizer', 'history', 'best'}
    assert small['args']['data_dir'] == '~/Datasets' and whole['args']['data_dir'] == '/home/me/x'
    kinds = set()
    for name, value in whole['state_dict'].items():
        wanted = value.half() if value.dim() > 1 else value  # a convolution or linear layer; a vector or number
        assert torch.equal(small['state_dict'][name], wanted) and small['state_dict'][name].dtype == wanted.dtype
        kinds.add(value.dim() > 1)
    assert True in kinds and small['thresholds'] == whole['thresholds']


def test_slim_keeps_what_a_network_gives(capsys):
    """Rounded once, weights stay as they are when they are rounded again; the answers are those of the rounded ones."""
    small = str(ROOT / 'pretrained/small_digits_4.pth')
    slim.main(small, 'again.pth')
    first, second = torch.load(small), torch.load('again.pth')
    assert first.keys() == second.keys() and first['thresholds'] == second['thresholds']
    assert all(torch.equal(value, second['state_dict'][name]) for name, value in first['state_dict'].items())
    run(snn, *DIGITS[:2], '--pretrained_snn', 'again.pth', '--no-gpu', '--epochs', 1, '--train_samples', 32,
        '--test_samples', 50)  # it can be trained on
    fails(snn, 'holds no training to resume', *DIGITS[:2], '--no-gpu', '--resume', 'again.pth')
    Path('text.pth').write_text('no checkpoint')
    torch.save(first['state_dict'], 'bare.pth')
    torch.save({**first, 'args': {}}, 'no_args.pth')
    for path, said in (('none.pth', 'there is no such file'), ('text.pth', 'not a checkpoint'),
                       ('bare.pth', 'does not say what it was trained on'),
                       ('no_args.pth', 'does not say what it was trained on')):
        with pytest.raises(slim.UserError, match=said):
            slim.main(path, 'never.pth')
    assert not Path('never.pth').exists()
