"""benchmarks/compare.py: its turns, medians and counts, and that what it compares is the same network."""
import argparse
import io
import json
import sys
from pathlib import Path

import pytest
import torch

import ann
import snn
from conftest import CALIBRATION, ROOT, SMALL, fill, network, ternary
from experiment import UserError
from self_models import VGG, ResNet

sys.path.insert(0, str(ROOT / 'benchmarks'))
import compare  # noqa: E402
import converter  # noqa: E402
import layers  # noqa: E402
import machine  # noqa: E402
import mean_or_sum  # noqa: E402
import networks  # noqa: E402

CPU = torch.device('cpu')


def run(wall, disturbed=False, cpu=None):
    return {'wall': wall, 'cpu': cpu or wall, 'disturbed': disturbed}


def test_rows_of_few_steps_are_low_latency():
    assert compare.parse_row('VGG16:4:32') == ('VGG16', 4, 32, True)
    assert compare.parse_row('VGG5:75:16') == ('VGG5', 75, 16, False)


def test_a_run_of_the_first_stands_beside_every_other():
    assert compare.turns(['ours']) == [('ours',)]
    assert compare.turns(['ours', 'a', 'b', 'c']) == [('a', 'ours', 'b'), ('c', 'ours')]


def test_disturbed_runs():
    alone = {'wall': 1.0, 'cpu': 1.9, 'others': 0.02, 'idle': 0.08}
    runs = [alone, alone | {'cpu': 1.6}, alone | {'others': 0.5, 'idle': 0.0}, alone | {'others': 0.5, 'idle': 5.0}]
    runs = [dict(each) for each in runs]
    machine.mark_disturbed(runs)
    assert [each['disturbed'] for each in runs] == [False, True, True, False]


def test_medians_are_of_undisturbed_runs_where_these_are_enough(capsys):
    ours, theirs = [run(1.0)] * 3 + [run(4.0, True)] * 4, [run(2.0)] * 3 + [run(3.0, True)] * 4
    found = {'ours': {'bytes': 2 ** 20, 'runs': ours, 'pairs': []},
             'ann': {'bytes': 2 ** 21, 'runs': theirs, 'pairs': list(zip(ours, theirs))}}
    compare.table(found)
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        'ann', '2.000s', '2.000s', '2', 'MB', '3', 'of', '7', '|', '0.50', '0.50', '0.50', '0.50', '|', '1.00']
    found['ann'] |= {'runs': theirs[1:], 'pairs': found['ann']['pairs'][1:]}
    compare.table(found)
    line, note = capsys.readouterr().out.splitlines()[-2:]
    assert line.split()[1:10] == ['3.000s', '3.000s', '2', 'MB', '2', 'of', '6*', '|', '0.33']
    assert line.split()[10] == '1.33' and note.startswith('* fewer than 3 undisturbed')


def test_arithmetic():
    first, *hidden, last = 64 * 27 * 32 ** 2, 128 * 576 * 16 ** 2, 128 * 1152 * 16 ** 2, 8192 * 4096, 4096 ** 2, 40960
    few, many = compare.parse_row('VGG5:4:2'), compare.parse_row('VGG5:75:3')
    assert networks.arithmetic(few, 'test') == 2 * (first + 4 * sum(hidden) + last)
    assert networks.arithmetic(few, 'train') == 2 * (2 * first + 12 * sum(hidden) + 3 * last)
    assert networks.arithmetic(many, 'train') == 3 * (70 * (2 * first + 3 * sum(hidden)) + 3 * last)
    own = 1024 * (27 + 576) * 64 + 256 * (576 + 1152) * 128 + 64 * (1152 + 2304) * 256 + 2560
    assert networks.arithmetic(compare.parse_row('network:1:5'), 'test') == 5 * own
    assert networks.arithmetic(few, 'train', ann=True) == 2 * (2 * first + 3 * sum(hidden) + 3 * last)


def test_the_networks_of_other_libraries_give_the_same_logits_and_memopt_the_same_gradients():
    pytest.importorskip('spikingjelly')
    pytest.importorskip('snntorch')
    model = fill(network('VGG5', timesteps=3, input_shape=(3, 8, 8), **networks.LOW_LATENCY), 0).eval()
    with torch.no_grad():  # values that float32 adds up exactly, in any order, and never to a threshold
        for weight in model.parameters():
            weight.copy_((weight * 64).round() / 64)
    model.threshold_update(1.0, [value + 2 ** -12 for value in (1.25, 0.875, 1.125, 1.25, 0.75)])
    images = ternary((2, 3, 8, 8)).float()
    with torch.no_grad():
        logits = model(images)
    assert logits.abs().min() > 0
    gradients = []
    for forward, net in (networks.build_spikingjelly(model, CPU),
                         networks.build_spikingjelly(model, CPU, memopt=True, shape=(3, 8, 8)),
                         networks.build_snntorch(model, CPU)):
        net.eval()
        given = forward(images)
        assert torch.equal(given, logits)
        given.square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    for plain, recomputed in zip(gradients[0], gradients[1], strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_the_example_network_in_spikingjelly_gives_the_same_logits_and_gradients():
    pytest.importorskip('spikingjelly')
    model = networks.build_plain(compare.parse_row('network:3:2'), CPU).double()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    forward, net = networks.build_spikingjelly(model, CPU)
    values = [value for key, value in model.state_dict().items() if not key.endswith(('threshold', 'leak'))]
    net.double().load_state_dict(dict(zip(net.state_dict(), values, strict=True)))
    for run in (model.train(), forward):
        run(images).square().sum().backward()
    for ours, theirs in zip(model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(model(images), forward(images))


def test_a_resnet_in_spikingjelly_gives_the_same_logits():
    pytest.importorskip('spikingjelly')
    row = compare.parse_row('RESNET12:3:2')
    model = networks.build_ours(row, CPU, 'Linear').double().eval()
    forward, net = networks.build_spikingjelly_resnet(model, row, CPU)
    net.double().eval()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(forward(images), logits)
    assert logits.abs().min() > 0


def test_what_a_row_compares():
    def names(row, given=None):
        return compare.names_of(compare.parse_row(row), argparse.Namespace(implementations=given))
    assert [name for name in names('network:4:64') if name not in compare.PEERS] == ['plain', 'ann', 'limit']
    assert names('VGG5:4:32')[0] == 'ours' and 'plain' not in names('VGG5:4:32')
    assert names('VGG5:4:32', ['plain', 'ours']) == ['plain', 'ours']
    assert names('network:4:64', ['plain', 'ours']) == ['plain']
    assert names('network:4:64', ['ours']) == []
    for row in ('RESNET20:4:64', 'RESNET12:60:8'):  # whatever is compared can be built
        kept = set(names(row)) & {*compare.PEERS}
        assert kept == ({'spikingjelly'} & set(names('VGG5:4:32')) if row == 'RESNET20:4:64' else set())


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='there is no /proc')
def test_a_worker(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdin', io.StringIO('\n'))
    monkeypatch.setattr(networks, 'name_scans', lambda: None)  # which would stay in this process
    compare.work(argparse.Namespace(worker=['ann_qcfs', 'shares', ['RESNET6', 4, 2, True]], device='cpu', amp=False,
                                    plain_malloc=False))
    memory, ready, found = capsys.readouterr().out.splitlines()
    found = json.loads(found)
    assert json.loads(memory)['bytes'] > 0 and ready == 'ready' and found['wall'] > 0
    assert {'convolutions and matrix products', 'batch norm', 'activations', 'optimizer'} <= set(found['parts'])
    assert 0 < sum(found['parts'].values()) < found['wall']


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('name', ['ours', 'ours_linear', 'ann', 'ann_qcfs'])
@pytest.mark.parametrize('steps', [4, 12])
def test_the_host_waits_for_nothing_within_a_step(name, steps):
    row = compare.parse_row(f'VGG5:{steps}:4')
    step = networks.job(name, 'train', row, torch.device('cuda'), amp=True).run
    step()  # kernels are compiled, gradients made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('text', ['VGG5', 'VGG5:4', 'VGG5:4:0', 'VGG5:-1:8', 'VGG5:four:8', 'VGG5:4:8:1', 'VGG7:4:8'])
def test_a_row_that_is_none_is_refused_with_what_one_is(text):
    with pytest.raises(argparse.ArgumentTypeError, match='as VGG5:75:16'):
        compare.parse_row(text)
    assert compare.parse_row('VGG5:4:8') == ('VGG5', 4, 8, True)


@pytest.mark.parametrize('kind, name, options', [
    (VGG, 'VGG5', {}), (VGG, 'VGG9', {'activation': 'QCFS', 'batch_norm': True}), (ResNet, 'RESNET6', {})])
def test_converters_of_others_can_trace_an_ann(kind, name, options):
    ann, images = converter.relu_of(kind(name, **options)), ternary((2, 3, 32, 32)).float()
    assert torch.equal(torch.fx.symbolic_trace(ann)(images), ann(images))


def test_what_a_conversion_loses_and_where_its_gradient_comes_from(in_an_empty_folder, capsys):
    def call(script, *flags):
        capsys.readouterr()
        parser = (ann if script is ann else snn).get_args_parser()
        script.main(parser.parse_args(list(map(str, (*SMALL, *flags)))))
        return capsys.readouterr().out.splitlines()

    call(ann, '--epochs', 1, '--name', 'relu')
    call(ann, '--activation', 'QCFS', '--levels', 2, '--epochs', 1, '--batch_norm', '--name', 'qcfs')
    quantized = ['--pretrained_ann', 'trained_models/ann/qcfs.pth', '--timesteps', 4]
    first, heading, *rows = call(layers, *quantized)[-9:]
    assert heading.split() == 'layer up to it it alone error silent in the ANN'.split() and len(rows) == 7
    # an ANN all of whose layers give the SNN's means is the SNN
    assert rows[-1].split()[1] == first.split('SNN at T = 4 ')[1].split(',')[0]
    said = call(mean_or_sum, '--pretrained_ann', 'trained_models/ann/relu.pth', '--timesteps', 8, *CALIBRATION)
    assert [line.split(':')[0] for line in said[-2:]] == ['mean', 'sum'] and '96 training images' in said[-3]
    with pytest.raises(UserError, match='holds a QCFS ANN, which is not balanced'):
        call(mean_or_sum, *quantized)
