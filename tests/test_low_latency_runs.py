"""ann.py and snn.py at T of 1 to 8, as their user runs them: QCFS, its conversion, fine-tuning, from scratch."""
import json
import re
from pathlib import Path

import pytest
import torch

import ann
import snn
from conftest import CALIBRATION, fails, load, metrics_of, run, same
from experiment import checkpoint, data, engine, from_ann, setup
from self_models import VGG

pytestmark = pytest.mark.usefixtures('in_an_empty_folder')

SMALL = ['-a', 'RESNET6', '--dataset', 'DIGITS', '--train_samples', 96, '--test_samples', 50, '--no-gpu']
QCFS = [*SMALL, '--activation', 'QCFS', '--levels', 4, '--batch_norm', '--lr_schedule', 'cosine', '--optimizer', 'Adam',
        '-lr', '1e-3']


@pytest.fixture(scope='module')
def quantized(tmp_path_factory):
    """The checkpoint of an ANN with QCFS and batch norm."""
    folder = tmp_path_factory.mktemp('quantized')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(ann, *QCFS, '--epochs', 4, '--name', 'q')
    return str(folder / 'trained_models/ann/q.pth')


def test_an_ann_of_qcfs_is_tested_without_naming_its_layers(quantized, capsys):
    run(ann, *SMALL, '--test_only', '--pretrained_ann', quantized)
    assert f'test accuracy {load(quantized)["accuracy"]:.2%}' in capsys.readouterr().out


def test_a_cosine_goes_from_a_warm_up_to_0():
    args = ann.get_args_parser().parse_args(['--lr_schedule', 'cosine', '-lr', '1', '--epochs', '10'])
    rates = [engine.learning_rate_at(epoch, args, part) for epoch in range(1, 11) for part in (0, 0.5)]
    assert rates[0] < 0.05 and max(rates) == pytest.approx(1, abs=0.01) and rates.index(max(rates)) == 1
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert engine.learning_rate_at(10, args, 1.0) == pytest.approx(0)
    # half way between the end of the warm-up and that of the run: half the rate
    assert engine.learning_rate_at(1, args, 10 * (1 + engine.WARM_UP) / 2) == pytest.approx(0.5)


def test_a_file_of_qcfs_needs_no_other_flag_than_time_steps_and_an_snns_none(quantized, capsys):
    run(snn, *SMALL, '--pretrained_ann', quantized, '--timesteps', 2, '--epochs', 1, '--name', 'two')
    out = capsys.readouterr().out
    assert '4 levels; with 3 rates for its 5 values' in out and 'balanced' not in out
    state = load('trained_models/snn/two.last.pth')
    args = state['args']
    assert (args['encoding'], args['delay'], args['initial_potential'], args['leak']) == ('direct', 0, 0.5, 1.0)
    assert args['output'] == 'mean' and args['scaling_factor'] is None and args['default_threshold'] is None
    _, epochs = metrics_of('logs/snn/two.jsonl')
    assert epochs[0]['epoch'] == 0 and epochs[0].keys() >= {'ann_accuracy', 'curve'} and 'scan' not in epochs[0]
    accuracy = load('trained_models/snn/two.pth')['accuracy']
    run(snn, '--pretrained_snn', 'trained_models/snn/two.pth', '--test_only', '--test_samples', 50, '--no-gpu')
    out = capsys.readouterr().out
    assert f'loaded SNN: test accuracy {accuracy:.2%} at T = 2' in out
    # from a larger T to a smaller one
    run(snn, '--pretrained_snn', 'trained_models/snn/two.pth', '--timesteps', 1, '--epochs', 1, *SMALL[4:], '--name',
        'one')
    assert load('trained_models/snn/one.pth')['timesteps'] == 1


@pytest.mark.parametrize('flags, said', [
    (['--scaling_factor', '0.5'], 'scaling_factor'), (['--threshold_percentile', 99], 'threshold_percentile'),
    (['--calibration_samples', 5], 'calibration_samples'), (['--default_threshold', 1], 'default_threshold'),
    (['--calibration_timesteps', 5], 'calibration_timesteps'), (['--output', 'fitted'], 'output fitted')])
def test_flags_that_mean_nothing_for_qcfs_are_refused(flags, said, quantized):
    fails(snn, f'^--{said}: .*QCFS', *SMALL, '--pretrained_ann', quantized, '--timesteps', 2, *flags)


def test_flags_that_qcfs_was_not_trained_for_are_said_to_cost_accuracy(quantized, capsys):
    run(snn, *SMALL, '--pretrained_ann', quantized, '--timesteps', 9, '--delay', 1, '--leak', 1, '--test_only')
    out = capsys.readouterr().out
    assert '--delay 1: the bounds of QCFS fit delay 0; ' in out and out.count('the bounds of QCFS fit') == 1
    assert '--timesteps 9: the ANN was trained with 4 levels; more steps' in out


@pytest.mark.parametrize('spoil, said', [
    (lambda weights: weights.pop('pre_process.2.bound'), 'no pre_process.2.bound'),
    (lambda weights: weights.update({'pre_process.2.bound': torch.tensor(-1.0)}), 'bound must be finite and above 0'),
    (lambda weights: weights.update({'pre_process.2.bound': torch.tensor(torch.nan)}), 'bound is not finite'),
    (lambda weights: weights.pop('pre_process.1.running_var'), 'no pre_process.1.running_var'),
    (lambda weights: weights['pre_process.1.running_var'].neg_(), 'running_var of a batch norm'),
    (lambda weights: weights.update({'pre_process.1.num_batches_tracked': torch.tensor(1.5)}), 'tensor of integers')])
def test_bounds_and_batch_norms_that_are_missing_or_wrong(spoil, said, quantized):
    state = load(quantized)
    spoil(state['state_dict'])
    checkpoint.save(state, Path('spoilt.pth'))
    fails(snn, f'spoilt.pth: .*{said}', *SMALL, '--pretrained_ann', 'spoilt.pth', '--timesteps', 2)
    fails(snn, f'spoilt.pth: .*{said}', *SMALL, '--pretrained_ann', 'spoilt.pth', '--keep_batch_norm', '--epochs', 1)
    for flag in ('--pretrained_ann', '--resume'):
        fails(ann, f'spoilt.pth: .*{said}', *SMALL, flag, 'spoilt.pth', '--test_only')


def test_a_test_with_a_loss_that_is_no_number_is_an_error(quantized):
    state = load(quantized)
    state['state_dict']['classifier.0.weight'].fill_(3e38)
    checkpoint.save(state, Path('large.pth'))
    said = 'in the test the loss became (nan|inf)(, as the weights of .*)?: use another copy of the checkpoint'
    for module, *flags in ((ann,), (snn, '--timesteps', 2)):
        fails(module, said, *SMALL, '--pretrained_ann', 'large.pth', '--test_only', *flags)


def test_levels_of_0_are_no_levels(capsys):
    with pytest.raises(SystemExit) as stopped:
        ann.get_args_parser().parse_args(['--levels', '0'])
    assert stopped.value.code == 2 and '--levels' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        snn.get_args_parser().parse_args(['--initial_potential', '1'])


@pytest.mark.parametrize('architecture, flags', [('VGG5', []), ('RESNET6', ['--bounds', 'channel'])])
def test_an_ann_of_relu_is_trained_further_with_qcfs(architecture, flags, capsys):
    network = ['-a', architecture, '--dataset', 'DIGITS', '--no-gpu', '--num_workers', 0, '--test_samples', 100]
    adam = ['--optimizer', 'Adam', '-lr', 1e-3, '--batch_size', 16, '--batch_norm']
    run(ann, *network, *adam, '--train_samples', 600, '--epochs', 2, '--name', 'relu')
    capsys.readouterr()
    start = ['--pretrained_ann', 'trained_models/ann/relu.pth', '--activation', 'QCFS', *flags]
    accuracies = []
    for levels in (1, 64):  # of many levels it is nearly the ANN of ReLU
        run(ann, *network, *start, '--levels', levels, '--test_only')
        out = capsys.readouterr().out
        accuracies.append(float(re.findall(r'test accuracy ([\d.]+)%', out)[-1]))
    assert 'QCFS takes the place of its ReLU, with bounds fitted to 128 training images' in out
    trained = 100 * load('trained_models/ann/relu.pth')['accuracy']
    assert trained > 50 and abs(accuracies[1] - trained) <= 3 and accuracies[0] < trained - 3
    run(ann, *network, *adam[:-1], *start, '--levels', 4, '--train_samples', 64, '--epochs', 1, '--name', 'q')
    state = load('trained_models/ann/q.pth')
    bounds = [value for name, value in state['state_dict'].items() if name.endswith('.bound')]
    assert state['args']['levels'] == 4 and {value.dim() for value in bounds} == {int(bool(flags))}
    run(snn, *network, '--pretrained_ann', 'trained_models/ann/q.pth', '--timesteps', 2, '--test_only')
    fails(ann, '--activation QCFS: the network in .* has activation ReLU', *network, '--activation', 'QCFS', '--resume',
          '--name', 'relu', '--epochs', 5)


def test_layers_that_a_checkpoint_has_not(quantized):
    fails(ann, r'--activation ReLU: the network in .*q.pth has activation QCFS', *SMALL, '--pretrained_ann', quantized,
          '--activation', 'ReLU')
    run(ann, *SMALL, '--epochs', 1)
    fails(ann, r'--batch_norm True: the network in .*digits.pth has batch_norm False', *SMALL, '--batch_norm',
          '--pretrained_ann', 'trained_models/ann/ann_resnet6_digits.pth')


def test_a_last_batch_of_one_image():
    run(ann, *QCFS, '--train_samples', 33, '--batch_size', 16, '--epochs', 1)
    model = VGG('VGG5', dataset='DIGITS', batch_norm=True)  # whose classifier has one value a channel then
    assert model(torch.rand(1, 1, 8, 8)).isfinite().all()


class Killed(Exception):
    pass


def test_learned_thresholds_and_leaks_go_on_bit_for_bit(quantized, monkeypatch):
    flags = [*SMALL, '--pretrained_ann', quantized, '--timesteps', 2, '--epochs', 3, '--learn_threshold',
             '--learn_leak', '--leak', 1, '--activation', 'Linear', '--lr_schedule', 'cosine']
    run(snn, *flags, '--name', 'whole')
    calls, original = [], engine.train_epoch

    def train_epoch(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(engine, 'train_epoch', train_epoch)
        run(snn, *flags, '--name', 'killed')
    run(snn, *flags, '--name', 'killed', '--resume')
    for kind in ('.pth', '.last.pth'):
        whole, killed = (load(f'trained_models/snn/{name}{kind}') for name in ('whole', 'killed'))
        for key in ('state_dict', 'optimizer', 'accuracy', 'best', 'thresholds', 'leaks'):
            assert same(whole[key], killed[key]), key
    first, last = load('trained_models/snn/whole.pth'), load('trained_models/snn/whole.last.pth')
    assert len(set(last['leaks'])) > 1 and all(0 < leak <= 1 for leak in last['leaks'])
    decay = [group['weight_decay'] for group in last['optimizer']['param_groups']]
    assert decay == [5e-4, 0.0] and first['thresholds'] and len(last['thresholds']) == 7
    for flag, said in (('--delay=1', '--delay 0'), ('--no-learn_threshold', '--learn_threshold True'),
                       ('--no-learn_leak', '--learn_leak True')):
        fails(snn, f'was trained with {said}', *flags, '--name', 'killed', '--resume', flag, '--epochs', 4)


@pytest.fixture(scope='module')
def learned(quantized, tmp_path_factory):
    """The checkpoint of an SNN whose leaks are learned, from 1.0."""
    folder = tmp_path_factory.mktemp('learned')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(snn, *SMALL, '--pretrained_ann', quantized, '--timesteps', 4, '--learn_leak', '--learn_threshold',
            '--activation', 'Linear', '-lr', '1e-2', '--epochs', 1, '--name', 'l')
    state = load(folder / 'trained_models/snn/l.last.pth')
    # one of them happens to be what was begun with
    state['leaks'] = [1.0, 0.9, 0.800001, 0.7, 0.6, 0.5, 0.4]
    torch.save(state, folder / 'l.pth')
    return str(folder / 'l.pth')


@pytest.mark.parametrize('flags, leaks, line', [
    ([], '1 0.9 0.8 0.7 0.6 0.5 0.4', 'leak as learned, '),
    (['--no-learn_leak'], '1 0.9 0.8 0.7 0.6 0.5 0.4', 'leak as learned, .*learn_leak False as the flag says'),
    *((['--leak', leak], ' '.join([leak] * 7), f'leak {float(leak)} as the flag says, in place of those learned, ')
      for leak in ('0.8', '0.800001', '1', '0.9')),
    (['--leak', '0.8', '--no-learn_leak'], ' '.join(['0.8'] * 7), 'leak 0.8 as the flag says')])
def test_learned_leaks_are_shown_and_do_what_the_line_says(learned, capsys, flags, leaks, line):
    leaks = leaks.replace('0.800001', '0.8')
    flags = ['--pretrained_snn', learned, *SMALL[4:], *flags, '-lr', '1e-12']
    run(snn, *flags, '--epochs', 1)
    out = capsys.readouterr().out
    assert f'\nleaks: {leaks}\n' in out or '0.8' in flags and 'leaks: ' not in out
    assert re.search(line, out)
    for file in ('snn_resnet6_digits_4.pth', 'snn_resnet6_digits_4.last.pth'):
        state = load(f'trained_models/snn/{file}')
        assert state['leaks'] == pytest.approx([float(leak) for leak in leaks.split()], abs=1e-5)
        assert state['args']['learn_leak'] is ('--no-learn_leak' not in flags)
    run(snn, *flags, '--epochs', 2, '--resume')  # the same command line
    assert load('trained_models/snn/snn_resnet6_digits_4.last.pth')['epoch'] == 2


def test_thresholds_that_were_learned_can_be_frozen(learned):
    before = load(learned)['thresholds']
    for flag, same_as_before in (('--learn_threshold', False), ('--no-learn_threshold', True)):
        run(snn, '--pretrained_snn', learned, *SMALL[4:], flag, '-lr', '1e-2', '--epochs', 1)
        state = load('trained_models/snn/snn_resnet6_digits_4.last.pth')
        assert (state['thresholds'] == before) is same_as_before
        assert state['args']['learn_threshold'] is not same_as_before


def test_levels_that_a_file_does_not_say(quantized, capsys):
    state = load(quantized)
    torch.save(state['state_dict'], 'bare.pth')
    torch.save({**state, 'args': {**state['args'], 'levels': None}}, 'none.pth')
    capsys.readouterr()
    for file in ('bare.pth', 'none.pth'):
        fails(ann, f'{file}: does not say how many levels its QCFS has; give the number with --levels', *SMALL,
              '--test_only', '--pretrained_ann', file)
        run(ann, *SMALL, '--test_only', '--pretrained_ann', file, '--levels', 4)
        assert f'ANN: test accuracy {state["accuracy"]:.2%}' in capsys.readouterr().out
    run(ann, *SMALL, '--pretrained_ann', 'bare.pth', '--levels', 2, '--epochs', 1)
    assert load('trained_models/ann/ann_resnet6_digits.pth')['args']['levels'] == 2
    converted = []
    for file in (quantized, 'bare.pth'):
        capsys.readouterr()
        run(snn, *SMALL, '--pretrained_ann', file, '--timesteps', 2, '--epochs', 1, '--name', 'c')
        out = capsys.readouterr().out
        for words, of in (('bare.pth does not say how many levels', 'bare.pth'), ('trained with 4 levels', quantized),
                          (f'ANN {file}: test accuracy', quantized)):
            assert (words in out) is (file == of), words
        converted.append(metrics_of('logs/snn/c.jsonl')[1][0]['curve'])
    assert converted[0] == converted[1]


def test_an_ann_goes_on_with_the_levels_that_it_was_trained_with():
    run(ann, *QCFS, '--epochs', 1)
    fails(ann, 'was trained with --levels 4; keep to that', *QCFS, '--epochs', 2, '--resume', '--levels', 8)
    run(ann, *SMALL, '--optimizer', 'Adam', '--epochs', 2, '--resume')
    assert load('trained_models/ann/ann_resnet6_digits.last.pth')['args']['levels'] == 4


def test_relu_with_batch_norm_is_folded_and_balanced_as_before(capsys):
    run(ann, *SMALL, '--batch_norm', '--epochs', 2, '--optimizer', 'Adam', '-lr', '1e-3')
    run(snn, *SMALL, '--pretrained_ann', 'trained_models/ann/ann_resnet6_digits.pth', '--timesteps', 8, '--epochs', 1,
        '--calibration_samples', 20, '--calibration_timesteps', 30, '--encoding', 'direct', '--delay', 0)
    out = capsys.readouterr().out
    assert 'no thresholds of this ANN are cached yet' in out and "fits its mean to the ANN's logits" in out
    state = load('trained_models/snn/snn_resnet6_digits_8.pth')
    assert 'classifier.0.bias' in state['state_dict'] and state['args']['scaling_factor'] == 0.7


def test_from_scratch_thresholds_are_balanced_unless_a_flag_sets_them(capsys):
    flags = [*SMALL, '--epochs', 1, '--timesteps', 4, '--encoding', 'direct', '--delay', 0, '--calibration_samples', 20,
             '--calibration_timesteps', 4]
    run(snn, *flags)
    balanced = load('trained_models/snn/snn_resnet6_digits_4.pth')['thresholds']
    assert len(set(balanced[:3])) == 3 and balanced[3:] == [1.0] * 4  # blocks keep the default, as in conversion
    run(snn, *flags[:-4], '--default_threshold', 0.4)
    assert load('trained_models/snn/snn_resnet6_digits_4.pth')['thresholds'] == [0.4] * 7
    fails(snn, '--scaling_factor auto: needs a trained ANN', *flags, '--scaling_factor', 'auto')


def test_from_scratch_a_resumed_run_is_recorded_under_the_factor_of_its_thresholds(capsys):
    flags = [*SMALL, '--timesteps', 4, '--encoding', 'direct', '--delay', 0, '--calibration_samples', 20,
             '--calibration_timesteps', 4, '--scaling_factor', 0.6]
    run(snn, *flags, '--epochs', 1)
    fails(snn, r'--scaling_factor 0\.3: has no effect, as .* with --scaling_factor 0\.6', *flags[:-1], 0.3, '--epochs',
          2, '--resume')
    run(snn, *flags, '--epochs', 2, '--resume')
    run(snn, *flags[:-2], '--epochs', 3, '--resume')  # taken over where no flag is given
    about, epochs = metrics_of('logs/snn/snn_resnet6_digits_4.jsonl')
    assert about['args']['scaling_factor'] == 0.6 and len(epochs) == 3


def test_pictures_are_predicted_by_a_network_of_few_steps(quantized, capsys):
    image = pytest.importorskip('PIL.Image')
    image.new('L', (8, 8), 200).save('new.png')
    run(snn, *SMALL, '--pretrained_ann', quantized, '--timesteps', 2, '--epochs', 1, '--name', 'two')
    capsys.readouterr()
    run(snn, '--pretrained_snn', 'trained_models/snn/two.pth', '--predict', 'new.png', '--no-gpu')
    assert re.search(r'^new\.png: \d \d+\.\d%, ', capsys.readouterr().out, re.M)


@pytest.mark.parametrize('bounds', ['layer', 'channel'])
def test_batch_norm_is_kept_in_fine_tuning_and_folded_afterwards(bounds, capsys):
    run(ann, *QCFS, '--epochs', 1, '--bounds', bounds, '--name', 'q')
    weights = load('trained_models/ann/q.pth')['state_dict']
    assert weights['pre_process.2.bound'].shape == ((64,) if bounds == 'channel' else ())
    flags = [*SMALL, '--pretrained_ann', 'trained_models/ann/q.pth', '--timesteps', 2, '--activation', 'Linear',
             '--batch_size', 32, '--keep_batch_norm', '--name', 'kept', '--leak', 0.9]
    run(snn, *flags, '--epochs', 1)
    kept = load('trained_models/snn/kept.last.pth')['state_dict']
    assert not torch.equal(kept['pre_process.1.running_mean'], weights['pre_process.1.running_mean'])  # it was trained
    run(snn, *flags, '--epochs', 2, '--resume', '--report', 'r')
    said = re.findall('.*its batch norm folded.*', capsys.readouterr().out)[-1]
    before, after = re.search(r'folded; test accuracy ([\d.]+)%, with batch norm in place ([\d.]+)%', said).groups()
    assert abs(float(before) - float(after)) <= 2  # one image of 50: a spike may flip by rounding
    folded = load('trained_models/snn/kept.folded.pth')
    assert 'pre_process.0.bias' in folded['state_dict'] and not any('running' in key for key in folded['state_dict'])
    assert set(folded['leaks']) == {0.9} and f'{100 * folded["accuracy"]:.2f}' == before
    report = json.loads(Path('r/report.json').read_text())
    assert report['checkpoint'].endswith('kept.folded.pth') and report['accuracy']['accuracy'][-1] == folded['accuracy']
    for file, accuracy in (('kept.folded', before), ('kept', after)):  # each runs without another flag
        run(snn, '--pretrained_snn', f'trained_models/snn/{file}.pth', '--test_only', *SMALL[4:])
        assert f'test accuracy {accuracy}%' in capsys.readouterr().out
    fails(snn, 'kept.folded.pth has no batch norm, or has it folded; leave the flag out', *SMALL, '--pretrained_snn',
          'trained_models/snn/kept.folded.pth', '--keep_batch_norm')
    fails(snn, 'kept.last.pth has batch norm in place; leave the flag out', *flags, '--no-keep_batch_norm', '--resume')
    image = pytest.importorskip('PIL.Image')
    image.new('L', (8, 8), 200).save('new.png')
    run(snn, '--pretrained_snn', 'trained_models/snn/kept.pth', '--predict', 'new.png', '--no-gpu', '--keep_batch_norm')
    assert re.search(r'^new\.png: \d \d+\.\d%, ', capsys.readouterr().out, re.M)
    files = {Path(f'trained_models/snn/previous.1.kept{end}') for end in ('.pth', '.last.pth', '.folded.pth')}
    run(snn, *flags, '--epochs', 1, '--no-keep_batch_norm')
    assert all(map(Path.exists, files)) and not Path('trained_models/snn/kept.folded.pth').exists()


def test_a_default_threshold_is_nothing_if_all_blocks_are_balanced(capsys):
    run(ann, *SMALL, '--batch_norm', '--epochs', 1, '--name', 'r')
    flags = [*SMALL, *CALIBRATION, '--pretrained_ann', 'trained_models/ann/r.pth', '--timesteps', 4,
             '--default_threshold', 0.3, '--name', 's', '--resume', 'auto']
    run(snn, *flags, '--epochs', 1)
    assert '--default_threshold has no effect here: it belongs to ResNets whose blocks are' in capsys.readouterr().out
    run(snn, *flags, '--epochs', 2)


def test_balancing_of_blocks_is_nothing_to_a_qcfs_ann(capsys):
    run(ann, *QCFS, '--epochs', 1, '--bounds', 'channel', '--name', 'q')
    run(snn, *SMALL, '--pretrained_ann', 'trained_models/ann/q.pth', '--timesteps', 2, '--test_only',
        '--balance_blocks')
    assert '--balance_blocks has no effect here: it belongs to ANNs of ReLU without' in capsys.readouterr().out


def test_batch_norm_that_is_not_there_cannot_be_kept(trained):
    fails(snn, '^--keep_batch_norm: .*no batch norm', *SMALL, '--pretrained_ann', trained, '--keep_batch_norm')
    fails(snn, '^--keep_batch_norm: a network from scratch', *SMALL, '--keep_batch_norm')


def test_folding_gives_the_network_with_batch_norm_to_rounding():
    # in float64, where no spike flips, with learned thresholds and leaks that training has moved
    args = snn.get_args_parser().parse_args([str(flag) for flag in (
        *SMALL, '--keep_batch_norm', '--learn_threshold', '--learn_leak', '--timesteps', 4, '--backend', 'torch',
        '--encoding', 'direct', '--delay', 0, '--initial_potential', 0.5)])
    images = data.Data(None, [], [str(i) for i in range(10)], (1, 8, 8))
    for bounds in ('layer', 'channel'):
        kept = setup.build_ann(args, images, 'QCFS', 1, True, bounds).double().eval()
        state = {'state_dict': kept.state_dict()}
        network = setup.build_snn(args, images, state).double().eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for name, value in network.named_parameters():
                if name.endswith('threshold'):
                    value.uniform_(0.5, 2).mul_(1 if bounds == 'channel' else 0.03)
                elif name.endswith('leak'):
                    value.uniform_(0.8, 1)
            for name, value in network.named_buffers():
                if name.endswith('running_var'):
                    value.uniform_(0.5, 1.5)
                elif name.endswith('bounds'):
                    value.uniform_(0.02, 0.06)
        x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
        want = network(x)
        folded = from_ann.folded(network, args, images).double().eval()
        assert want.std() > 0 and (folded(x) - want).abs().max() <= 1e-9 * want.abs().max()
