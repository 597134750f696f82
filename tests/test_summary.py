"""The table and the figure of a sweep's metrics files, from files whose means and spreads are worked out here."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ann_script
import snn_script
from conftest import ROOT
from experiment import UserError
from experiment.reporting import figures, summary, tables


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write a metrics file and return its name: written('a', [epochs], seed=1, leak=0.9)."""
    monkeypatch.chdir(tmp_path)

    def write(name, epochs, **args):
        args = {'architecture': 'VGG5', 'epochs': 2, 'seed': 0, 'name': name, 'resume': None, 'leak': 1.0,
                'pretrained_ann': 'ann.pth', 'log': False, 'devices': '0', 'num_workers': 2, 'lr_interval': '0.6 0.8',
                **args}
        lines = [{'command': 'python snn.py', 'args': args, 'commit': None, 'torch': '2', 'machine': 'x'}, *epochs]
        path = tmp_path / f'{name}.jsonl'
        path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
        return path.name
    return write


def epochs(*accuracies, on='test', best=None, seconds=(2.0, 4.0)):
    """The lines of epochs 1, 2, ... with these accuracies."""
    return [{'epoch': number, 'learning_rate': 0.1, 'train_loss': 1.0, 'train_accuracy': 0.5, f'{on}_loss': 1.0,
             f'{on}_accuracy': accuracy, 'best_accuracy': max(accuracies[:number]) if best is None else best,
             'seconds': seconds[number - 1]} for number, accuracy in enumerate(accuracies, 1)]


def converted(accuracy, ann, on='test'):
    return {'epoch': 0, f'{on}_loss': 1.0, f'{on}_accuracy': accuracy, 'ann_accuracy': ann}


def summarized(paths, as_markdown=False):
    return summary.tables(summary.read_all(paths), as_markdown)


def narrow_table(paths, *args, **options):
    return summary.narrow_table(summary.read_all(paths), *args, **options)


def table(paths):
    """The text of a summary as its tables, each a list of {heading: cell}, and its last lines."""
    text = summarized(paths, True)
    tables = []
    for part in text.split('\n\n'):
        if part.startswith('|'):
            heading, rule, *body = [[cell.strip() for cell in line.strip('|').split(' | ')]
                                    for line in part.splitlines()]
            assert rule == ['---'] * len(heading)
            tables.append([dict(zip(heading, line, strict=True)) for line in body])
    return tables, text


ON_TEST = 'test accuracy, best epoch chosen on test images'
ON_VALIDATION = 'test accuracy, best epoch chosen on validation images'


def test_mean_and_sample_standard_deviation(written):
    # best: 90, 92, 97. Mean 93; deviations -3, -1, 4, squares 9 + 1 + 16 = 26, / 2 = 13, root 3.61 (of n: 2.94).
    # last: 85, 92, 97. Mean 91.33; squares 40.11 + 0.44 + 32.11 = 72.67, / 2 = 36.33, root 6.03.
    # converted: 50, 60, 70: mean 60, deviation 10. Seconds: 2 and 4 in each run, mean 3.
    paths = [written(f'leaky{seed}', [converted(start, 0.95), *epochs(first, second)], seed=seed, leak=0.9,
                     resume='auto' if seed else None, devices=str(seed), num_workers=seed, log=bool(seed),
                     backend='triton' if seed else 'torch')
             for seed, start, first, second in ((0, 0.5, 0.90, 0.85), (1, 0.6, 0.80, 0.92), (2, 0.7, 0.97, 0.97))]
    # a single seed has no spread; its converted network was never surpassed
    paths.append(written('other', [converted(0.88, 0.95), *epochs(0.7, 0.8, best=0.88, seconds=(1.0, 1.5))], seed=2))
    tables, text = table(paths)
    assert tables == [[
        {'architecture': 'VGG5', 'leak': '0.9', 'seeds': '3', 'ANN': '95.00', 'converted': '60.00 ± 10.00',
         'last epoch': '91.33 ± 6.03', ON_TEST: '93.00 ± 3.61', 'epochs done': '2', 's/epoch': '3.00', 'machine': 'x'},
        {'architecture': 'VGG5', 'leak': '1.0', 'seeds': '1', 'ANN': '95.00', 'converted': '88.00',
         'last epoch': '80.00', ON_TEST: '88.00', 'epochs done': '2', 's/epoch': '1.25', 'machine': 'x'}]]
    assert 'unfinished' not in text and 'sample standard deviation' in text


def test_two_anns_of_one_accuracy_are_two(written):
    def of(name):
        return [written(f'{name}{seed}'.replace('/', '-'), [converted(0.5, 0.95), *epochs(0.9, 0.9)], seed=seed,
                        pretrained_ann=name.format(seed)) for seed in (0, 1)]
    assert [table(of(name))[0][0][0]['ANN'] for name in ('ann.pth', 'ann_seed{}.pth')] == ['95.00', '95.00 ± 0.00']


def test_plain_columns_are_aligned(written):
    # ANNs have no converted network. 60 and 70: mean 65; deviations -5 and 5, squares 50 / 1, root 7.07.
    paths = [written('a', epochs(0.6, 0.5), seed=0), written('b', epochs(0.1, 0.7), seed=1),
             written('c', epochs(0.25, 0.2), architecture='RESNET20')]
    heading, *body = summarized(paths).split('\n\n')[1].splitlines()
    assert len({len(line) for line in (heading, *body)}) == 1
    assert heading.split()[:2] == ['architecture', 'seeds'] and 'chosen on test images' in heading
    assert 'ANN' not in heading and 'converted' not in heading
    assert body[0].split() == ['VGG5', '2', '65.00', '±', '7.07', '2', '3.00', 'x']
    assert body[1].split() == ['RESNET20', '1', '25.00', '2', '3.00', 'x']
    end = heading.index('seeds') + len('seeds')
    assert [line[:end].split()[-1] for line in body] == ['2', '1']  # below their heading


def test_validation_chooses_the_epoch_and_the_test_accuracy_is_that_epochs(written):
    # seed 0: epoch 1 is best on validation, though epoch 2 is on test. Seed 1: epoch 2.
    # their last ones on validation: 60 and 65, mean 62.5, root of 2.5^2 + 2.5^2 = 3.54
    # 80 and 84: mean 82, deviations -2 and 2, squares 8 / 1, root 2.83. ANNs: 90 and 92, mean 91, root of 2 = 1.41.
    first, second = epochs(0.7, 0.6, on='validation'), epochs(0.5, 0.65, on='validation')
    first[0]['test_accuracy'], first[1]['test_accuracy'] = 0.80, 0.99
    second[1]['test_accuracy'] = 0.84
    paths = [written('a', [converted(0.4, 0.90, on='validation'), *first], seed=0),
             written('b', [converted(0.2, 0.92, on='validation'), *second], seed=1)]
    (row,), = table(paths)[0]
    assert row == {'architecture': 'VGG5', 'seeds': '2', 'ANN, on validation images': '91.00 ± 1.41',
                   'converted, on validation images': '30.00 ± 14.14',
                   'last epoch, on validation images': '62.50 ± 3.54', ON_VALIDATION: '82.00 ± 2.83',
                   'epochs done': '2', 's/epoch': '3.00', 'machine': 'x'}
    # beside runs without a validation set: tables of their own, never one mean
    tables, _ = table([*paths, written('c', epochs(0.3, 0.2), seed=2)])
    assert [list(rows[0])[-4] for rows in tables] == [ON_TEST, ON_VALIDATION]
    assert [rows[0]['seeds'] for rows in tables] == ['1', '2']


def test_a_converted_network_that_stays_the_best_on_validation(written):
    start = {**converted(0.9, 0.95, on='validation'), 'test_accuracy': 0.89}
    (row,), = table([written('a', [start, *epochs(0.5, 0.6, on='validation', best=0.9)])])[0]
    assert row[ON_VALIDATION] == '89.00'


def test_unfinished_runs_are_marked(written):
    paths = [written('a', epochs(0.6, 0.8), seed=0), written('b', epochs(0.7), seed=1), written('c', [], seed=2)]
    (row,), = table(paths)[0]
    # 80 and 70: mean 75, root of 50 = 7.07
    assert (row['seeds'], row[ON_TEST], row['epochs done']) == ('3', '75.00 ± 7.07 (2 of 3)', '0-2 of 2 *')
    assert summarized(paths).endswith(
        '* unfinished: b.jsonl (1 of 2 epochs), c.jsonl (0 of 2 epochs)')
    # not tested yet, as its best epoch is not known before the end
    (row,), = table([written('d', epochs(0.7, on='validation'))])[0]
    assert (row[ON_VALIDATION], row['epochs done']) == ('-', '1 of 2 *')
    (row,), = table([written('e', [converted(0.4, 0.9)])])[0]  # just converted
    assert (row['converted'], row[ON_TEST], row['epochs done'], row['s/epoch']) == ('40.00', '40.00', '0 of 2 *', '-')


def test_chosen_columns_come_with_a_line_on_unfinished_runs(written, capsys):
    paths = [written('a', epochs(0.9, 0.9)), written('b', epochs(0.5), seed=1)]
    snn_script.main(['--summarize', *paths, '--columns', 'leak', 'test accuracy'])
    shown, said = capsys.readouterr()
    assert '70.00 ± 28.28' in shown and said == 'snn_script.py: unfinished: b.jsonl (1 of 2 epochs)\n'
    snn_script.main(['--summarize', paths[0], '--columns', 'leak', 'test accuracy'])
    assert capsys.readouterr().err == ''


def test_runs_of_several_processes_are_another_experiment(written):
    runs = [Path(written(name, epochs(0.5, 0.6), seed=seed)) for seed, name in enumerate('abc')]
    for path in runs[1:]:
        first, *rest = path.read_text().splitlines()
        path.write_text('\n'.join([json.dumps({**json.loads(first), 'processes': 4}), *rest]) + '\n')
    assert [len(row) for row in summary.rows(summary.read_all([str(path) for path in runs]))] == [1, 2]
    (found,) = table(map(str, runs))[0]
    assert [row['processes'] for row in found] == ['-', '4']


def test_each_seed_may_start_from_an_ann_of_its_own(written):
    paths = [written(f's{seed}', epochs(0.5, 0.5), seed=seed, pretrained_ann=f'ann_seed{seed}.pth') for seed in (1, 11)]
    (row,), = table(paths)[0]
    assert row['seeds'] == '2' and 'pretrained_ann' not in row
    other = written('other', epochs(0.5, 0.5), seed=1, pretrained_ann='ann_seed11.pth')  # that of another seed
    assert [row['pretrained_ann'] for row in table([*paths, other])[0][0]] == ['ann_seed*.pth', 'ann_seed11.pth']
    # each of two ANNs, named after seeds, with each of two seeds
    grid = [written(f'g{number}{seed}', epochs(0.5, 0.6 + number / 10), seed=seed, pretrained_ann=f'g_seed{number}.pth')
            for number in (0, 1) for seed in (0, 1)]
    rows = table(grid)[0][0]
    assert [(row['pretrained_ann'], row['seeds'], row[ON_TEST]) for row in rows] == [
        ('g_seed0.pth', '2', '60.00 ± 0.00'), ('g_seed1.pth', '2', '70.00 ± 0.00')]
    # one ANN, named after a seed, for several seeds
    paths = [written(f't{seed}', epochs(0.5, 0.5), seed=seed, pretrained_ann='x/ann_seed0.pth') for seed in (0, 1, 2)]
    (row,), = table(paths)[0]
    assert row['seeds'] == '3'
    paths.append(written('u', epochs(0.5, 0.7), seed=1, pretrained_ann='y/ann_seed0.pth'))
    shown = summary.narrow_table(list(map(summary.read, paths)), ['pretrained_ann', 'seeds'])
    assert [line.split() for line in shown.splitlines()[1:]] == [['x/ann_seed0.pth', '3'], ['y/ann_seed0.pth', '1']]
    with pytest.raises(UserError, match='none of these runs tried scaling factors'):
        summary.narrow_table(list(map(summary.read, paths)), ['timesteps', '0.7'])


@pytest.mark.parametrize('files', [
    ['d_seed0_seed0.pth', 'd_seed0_seed1.pth'],  # SNNs of two seeds from the ANN of seed 0, each trained further
    ['d_seed0/x_seed0.pth', 'd_seed1/x_seed1.pth']])
def test_a_networks_name_may_hold_two_seeds(written, files):
    paths = [written(f's{seed}', epochs(0.5, 0.6 + seed / 10), seed=seed, pretrained_snn=file)
             for seed, file in enumerate(files)]
    (row,), = table(paths)[0]
    assert (row['seeds'], row[ON_TEST]) == ('2', '65.00 ± 7.07')


def test_a_setting_that_some_runs_do_not_have(written):
    paths = [written('a', epochs(0.5, 0.5)), written('b', epochs(0.5, 0.5), dropout='a|b')]
    rows, = table(paths)[0]
    assert [row['dropout'] for row in rows] == ['-', 'a\\|b']


def test_data_and_time_steps_always_stand_there_and_a_folder_by_its_name(written):
    paths = [written('a', epochs(0.5, 0.5), dataset='MNIST', data_dir='/here', timesteps=9),
             written('b', epochs(0.7, 0.7), dataset='MNIST', data_dir='/there', timesteps=9, seed=1),
             written('c', epochs(0.6, 0.6), dataset='FOLDER', data_dir='~/x/cats', timesteps=9),
             written('d', epochs(0.6, 0.6), dataset='FOLDER', data_dir='~/y/cats', timesteps=9)]
    first, second, third = table(paths)[0][0]  # another folder of that name is another set
    assert second == third
    assert [(row['data'], row['timesteps'], row['seeds']) for row in (first, second)] == [
        ('MNIST', '9', '2'), ('FOLDER cats', '9', '1')]
    assert 'data_dir' not in first and 'dataset' not in first


def test_scaling_factors_that_were_tried(written):
    # at 0.5: 20 and 40, mean 30, deviations of 10, root of 200 = 14.14; the best of each seed is another
    scans = [{'0.5': 0.2, '1.0': 0.6}, {'0.5': 0.4, '1.0': 0.3}]
    paths = [written(f's{seed}', [{**converted(0.4, 0.9), 'scan': scan, 'scanned_on': 'train', 'scaling_factor': best},
                                  *epochs(0.5, 0.6)], seed=seed, scaling_factor='auto', timesteps=8)
             for seed, scan, best in ((0, scans[0], 1.0), (1, scans[1], 0.5))]
    (row,), (tried,) = table(paths)[0]
    assert row['scaling_factor'] == 'auto: 0.5, 1.0'
    assert tried == {'architecture': 'VGG5', 'timesteps': '8', 'scaling_factor': 'auto: 0.5, 1.0', 'images': 'train',
                     'seeds': '2', '0.5': '30.00 ± 14.14', '1.0': '45.00 ± 21.21'}
    paths.append(written('given', [converted(0.4, 0.9), *epochs(0.5, 0.6)], scaling_factor=0.7, timesteps=8))
    (auto, given), (again,) = table(paths)[0]
    assert (auto['scaling_factor'], given['scaling_factor']) == ('auto: 0.5, 1.0', '0.7') and again == tried
    # trained in two ways from one start: two rows of results, one of the scan
    start = {**converted(0.4, 0.9), 'scan': scans[0], 'scanned_on': 'train', 'scaling_factor': 1.0}
    for flag, values, scans in (('learning_rate', (0.1, 0.2), 1), ('lr_schedule', ('step', 'cosine'), 1),
                                ('learn_threshold', (False, True), 1), ('learn_leak', (False, True), 1),
                                ('cutout', (0, 8), 2), ('crop', (2, 4), 2)):  # which the balanced thresholds follow
        paths = [written(f'{flag}{value}', [start, *epochs(0.5, 0.6)], **{flag: value}, scaling_factor='auto')
                 for value in values]
        assert [len(part) for part in table(paths)[0]] == [2, scans], flag


def test_the_figure(written):
    # epoch 0: 20 and 40, mean 30, root of 10^2 + 10^2 = 14.14; epoch 1: 50 and 52, mean 51, root of 2 = 1.41
    # after 10 time steps: 10 and 30, mean 20, spread 14.14. The other row was not converted and did three epochs.
    paths = [written(f's{seed}', [{**converted(start, 0.9), 'scan': {'0.5': 0.2, '1.0': start}, 'scanned_on': 'train',
                                   'scaling_factor': 1.0, 'curve': {'2': 0.1, '10': early}}, *epochs(first)],
                     seed=seed, timesteps=12, scaling_factor='auto')
             for seed, start, early, first in ((0, 0.2, 0.1, 0.5), (1, 0.4, 0.3, 0.52))]
    paths.append(written('scratch', epochs(0.25, 0.5, 0.75, seconds=(1, 1, 1)), timesteps=8, pretrained_ann=None))
    row_list = summary.rows(map(summary.read, paths))
    names = summary.names(row_list)
    assert names == ['timesteps 12, pretrained_ann ann.pth, scaling_factor auto: 1.0, threshold_percentile 100.0',
                     'timesteps 8']
    over_epochs, over_time, by_factor = figures.draw_runs(row_list, names).axes
    hybrid, scratch, ann = over_epochs.lines
    for line, points in ((hybrid, [(0, 30), (1, 51)]), (scratch, [(1, 25), (2, 50), (3, 75)]),
                         (over_time.lines[0], [(2, 10), (10, 20)]), (by_factor.lines[0], [(0.5, 20), (1, 30)])):
        assert line.get_xydata() == pytest.approx(np.array(points))
    assert list(ann.get_ydata()) == [90, 90]
    shaded = over_time.collections[0].get_paths()[0].vertices[:, 1]
    assert (shaded.min(), shaded.max()) == pytest.approx((20 - 14.142, 20 + 14.142), abs=1e-3)
    assert [len(axes.lines[-1].get_xdata()) for axes in (over_time, by_factor)] == [0, 0]  # of scratch: nothing


@pytest.mark.parametrize('backend', ['module://matplotlib_inline.backend_inline', 'nonsense', 'qtagg', ''])
def test_a_figure_is_drawn_whatever_the_environment_says_of_windows(written, tmp_path, backend):
    metrics = written('a', epochs(0.5, 0.6))
    (tmp_path / 'matplotlibrc').write_text('savefig.format: pdf\ntext.usetex: True')
    left = {key: value for key, value in os.environ.items() if key != 'DISPLAY'}
    code = f'import ann_script; ann_script.main(["--summarize", {str(metrics)!r}, "--figure", "x.png"])'
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, text=True, capture_output=True,
                          env={**left, 'MPLBACKEND': backend, 'PYTHONPATH': str(ROOT)})
    assert (done.returncode, done.stderr) == (0, '')
    assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')


def test_the_figures_file(written, tmp_path, capsys):
    paths = [written('a', epochs(0.5, 0.25)), written('b', epochs(0.5, 0.5), leak=0.9)]
    ann_script.main(['--summarize', *paths, '--figure', 'made.png'])
    with Image.open('made.png') as image:
        assert image.text['Description'] == summarized(paths, True)  # what it shows goes with it
    (tmp_path / 'kept').write_text('')
    for flags, status, said in ((['--summarize', written('none', []), '--figure', 'x.png'], 1, 'no epoch'),
                                (['--summarize', *paths, '--figure', 'kept/x.png'], 1, 'kept'),
                                (['--summarize', *paths, '--figure', 'x.pdf'], 2, '.png'),
                                (['--figure', 'x.png'], 2, '--summarize')):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            ann_script.main(flags)
        error = capsys.readouterr().err or f'{caught.value.code}\n'
        assert (caught.value.code == 2) == (status == 2) and said in error and error.count('\n') == 1
    assert not (tmp_path / 'x.png').exists()


# but those of what tests before left open, which happens to be collected during this one
@pytest.mark.filterwarnings('error', 'ignore::ResourceWarning', 'ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('folder', [
    'p$^$q', '$\\frac$', '$$', '\udce9', '写真', '_x', 'a\nb', '~no-such-user/x', '~no-such-user', '%s {x}'])
def test_a_folder_of_any_name_is_drawn_as_it_is_called(written, folder):
    paths = [written(name, epochs(0.5, 0.5), dataset='FOLDER', data_dir=f'{name}/{folder}') for name in ('a', 'b')]
    paths.append(written('c', epochs(0.5, 0.5), dataset='FOLDER', data_dir=folder))
    ann_script.main(['--summarize', *paths, '--figure', 'made.png'])
    Image.open('made.png').verify()
    row_list = summary.rows(map(summary.read, paths))
    texts = figures.draw_runs(row_list, summary.names(row_list)).legends[0].get_texts()
    shown = ' '.join(folder.split('/')[-1].replace('\udce9', '\\udce9').split())
    assert all(text.get_text() == f'FOLDER {shown}, VGG5' and not text.get_parse_math() for text in texts)


def test_names_that_begin_with_an_underscore_are_in_the_legend(written):
    row_list = summary.rows(summary.read(written(name, epochs(0.5), architecture=f'_{name}.py:net')) for name in 'ab')
    legend = figures.draw_runs(row_list, summary.names(row_list)).legends[0]
    assert [text.get_text().strip()[:6] for text in legend.get_texts()] == ['_a.py:', '_b.py:']


def test_a_home_that_nobody_has_stays_as_it_is_written(written):
    run = summary.read(written('a', epochs(0.5, 0.5), dataset='FOLDER', data_dir='~nobody-has/x'))
    assert (run.settings['data'], run.folder) == ('FOLDER x', os.path.join(os.getcwd(), '~nobody-has', 'x'))


@pytest.mark.parametrize('values', [
    {'curve': {'x': 0.5}}, {'curve': [1]}, {'curve': {'1': None}}, {'scan': {'a': 0.5}}, {'scaling_factor': {}},
    {'scaling_factor': 'x'}, {'ann_accuracy': 10 ** 400}, {'test_accuracy': []}])
def test_values_that_no_run_writes(written, values):
    start = {**converted(0.4, 0.9), 'scan': {'0.5': 0.4}, 'scanned_on': 'train', 'scaling_factor': 0.5, **values}
    path = written('a', [start, *epochs(0.5, 0.6)], scaling_factor='auto')
    with pytest.raises(SystemExit, match='^ann_script.py: error: a.jsonl: is no metrics file.*leave it out$'):
        ann_script.main(['--summarize', path, '--figure', 'made.png'])


def test_a_default_that_was_given_is_no_other_setting(written):
    paths = [written(f'{seed}', epochs(0.5, 0.5), seed=seed, lr_reduce=reduce) for seed, reduce in ((0, 10), (1, 10.0))]
    assert table(paths)[0][0][0]['seeds'] == '2'


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-32'])
@pytest.mark.parametrize('end', ['\n', '\r\n', '\n\n'])
def test_a_file_that_an_editor_has_saved(written, encoding, end):
    path = written('a', epochs(0.5, 0.75))
    with open(path, encoding='utf-8') as file:
        text = file.read()
    with open(path, 'wb') as file:
        file.write((text.replace('\n', end) + end).encode(encoding))
    assert summary.read(path).accuracy == 0.75


def test_runs_that_later_ones_replaced_are_left_out_and_said(written, capsys):
    paths = [written('a', epochs(0.5, 0.75)), written('previous.1.a', epochs(0.2, 0.25)),
             written('previous.12.b', epochs(0.1, 0.1), seed=1)]
    ann_script.main(['--summarize', *paths, '--markdown'])
    shown, said = capsys.readouterr()
    assert '75.00' in shown and '25.00' not in shown and 'previous' not in shown
    assert said.count('\n') == 1 and 'previous.1.a.jsonl, previous.12.b.jsonl' in said
    assert '25.00' not in narrow_table(paths, ['seeds', 'test accuracy'])
    ann_script.main(['--summarize', *paths[1:]])  # on purpose
    shown, said = capsys.readouterr()
    assert '17.50' in shown and not said  # the mean of 25 and 10


def test_the_same_run_twice(written):
    paths = [written(name, epochs(0.5, 0.5)) for name in ('a', 'b')]
    with pytest.raises(UserError, match='a.jsonl and b.jsonl are of the same settings and seed.*leave one out'):
        summarized(paths)
    assert table([paths[0], paths[0]])[0][0][0]['seeds'] == '1'


@pytest.mark.parametrize('text', ['', 'text', '[]', '{}', '3', '{"args": {}}', '{"args": {"seed": 0}}\n{"epoch": 1}',
                                  '{"args": {"seed": 0, "epochs": 2}}\n{"epo', '\xff', 'null',
                                  '{"args": {"seed": 0, "epochs": 2}}\n{"epoch": 1, "test_accuracy": "high"}',
                                  '{"args": {"seed": 0, "epochs": 2}}\n7', '[' * 100000])
def test_files_that_are_no_metrics(tmp_path, text):
    path = tmp_path / 'a.jsonl'
    path.write_bytes(text.encode('latin-1'))
    with pytest.raises(UserError, match='a.jsonl: is no metrics file') as caught:
        summarized([str(path)])
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('script', [ann_script, snn_script])
def test_the_flags(written, tmp_path, capsys, script):
    paths = [written('a', epochs(0.5, 0.25))]
    script.main(['--summarize', *paths])
    assert '50.00' in capsys.readouterr().out
    script.main(['--summarize', *paths, '--markdown'])
    assert '| --- |' in capsys.readouterr().out
    for flags, said in ((['--summarize', *paths, '--seed', '0'], '--summarize'), (['--markdown'], '--markdown'),
                        (['--summarize', *paths, '--slurm'], '--summarize'), (['--summarize'], '--summarize')):
        with pytest.raises(SystemExit) as caught:
            script.main(flags)
        errors = capsys.readouterr().err
        assert caught.value.code == 2 and said in errors and errors.count('\n') == 1
    assert [path.name for path in tmp_path.iterdir()] == paths  # no script.sh


def test_a_file_that_is_not_there_is_one_line_and_status_1(tmp_path):
    done = subprocess.run([sys.executable, ROOT / 'ann_script.py', '--summarize', 'none.jsonl'], cwd=tmp_path,
                          text=True, capture_output=True)
    assert done.returncode == 1
    assert done.stderr.startswith('ann_script.py: error: none.jsonl: cannot be read') and done.stderr.count('\n') == 1


@pytest.mark.skipif(os.name == 'nt', reason='a pipe that closes early is another error there')
def test_a_reader_that_has_seen_enough_costs_neither_a_traceback_nor_the_figure(written):
    path, (reading, writing) = written('a', epochs(0.8, 0.9)), os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, ROOT / 'ann_script.py', '--summarize', path, '--figure', 'made.png'],
                          stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, '')
    Image.open('made.png').verify()


def test_some_columns_in_the_order_of_their_settings(written):
    paths = [written(f'T{timesteps}{activation}', [converted(0.5, 0.9), *epochs(0.6, accuracy)], timesteps=timesteps,
                     activation=activation)
             for timesteps, activation, accuracy in ((100, 'STDB', 0.7), (9, 'STDB', 0.65), (9, 'Linear', 0.8))]
    names = ['timesteps', 'activation', 'last epoch', 'leak', 'test accuracy']
    assert narrow_table(paths, names, as_markdown=True).splitlines() == [
        f'| timesteps | activation | last epoch | leak | {ON_TEST} |', '| --- | --- | --- | --- | --- |',
        '| 9 | Linear | 80.00 | 1.0 | 80.00 |', '| 9 | STDB | 65.00 | 1.0 | 65.00 |',
        '| 100 | STDB | 70.00 | 1.0 | 70.00 |']
    for names, said in ((['timesteps', 'ANN'], 'activation'), (['colour'], 'no such column; there are: data')):
        with pytest.raises(UserError, match=said):
            narrow_table(paths, names)
    other = written('validated', epochs(0.5, 0.5, on='validation'))
    with pytest.raises(UserError, match='validation'):
        narrow_table([*paths, other], ['timesteps', 'activation'])


def test_columns_of_factors_are_of_the_scan(written):
    scan = {'scan': {'0.5': 0.2, '1.0': 0.6}, 'scanned_on': 'train', 'scaling_factor': 1.0}
    paths = [written('auto', [{**converted(0.4, 0.9), **scan}, *epochs(0.5, 0.6)], scaling_factor='auto', timesteps=8),
             written('given', [converted(0.4, 0.9), *epochs(0.5, 0.6)], scaling_factor=0.7, timesteps=8)]
    assert narrow_table(paths, ['timesteps', '1.0'], as_markdown=True).splitlines()[2:] == ['| 8 | 60.00 |']


def test_the_figure_over_time_steps(written, capsys):
    low = {'encoding': 'direct', 'delay': 0}
    paths = [written(f'low{timesteps}{seed}', [converted(0.5, 0.9), *epochs(0.6, accuracy)], seed=seed,
                     timesteps=timesteps, **low)
             for timesteps, seed, accuracy in ((4, 0, 0.8), (4, 1, 0.9), (1, 0, 0.7))]
    paths += [written('published', [converted(0.5, 0.9), *epochs(0.6, 0.75)], timesteps=75),
              written('ann', epochs(0.6, 0.95), activation='QCFS', pretrained_ann=None)]
    anns, spiking = summary.kinds(summary.rows(map(summary.read, paths)))
    assert list(anns) == ['ANN, QCFS'] and {name: sorted(at) for name, at in spiking.items()} == {
        'low latency': [1, 4], 'published': [75]}
    fewer = written('fewer', epochs(0.6, 0.9), activation='QCFS', levels=4, pretrained_ann=None)
    more = written('more', epochs(0.6, 0.9), activation='QCFS', levels=8, pretrained_ann=None)
    assert list(summary.kinds(summary.rows(map(summary.read, [fewer, more, *paths[:1]])))[0]) == [
        'ANN, QCFS of 4 levels', 'ANN, QCFS of 8 levels']
    axes, = figures.draw_over_time_steps(anns, spiking).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines['ANN, QCFS'].get_ydata()[0] == 95
    assert axes.containers[0].lines[0].get_xydata() == pytest.approx(np.array([(1, 70), (4, 85)]))  # 80 and 90
    (first, second), = [bars.get_segments() for bars in axes.containers[0].lines[2]]
    assert len(first) == 0  # one run has no spread
    assert second == pytest.approx(np.array([(4, 85 - 50 ** 0.5), (4, 85 + 50 ** 0.5)]))
    snn_script.main(['--summarize', *paths, '--over_timesteps', 'made.png'])
    Image.open('made.png').verify()
    paths.append(written('again', [converted(0.5, 0.9), *epochs(0.6, 0.9)], timesteps=4, learning_rate=1, **low))
    capsys.readouterr()
    for of, said in ((paths, 'low40.jsonl and again.jsonl would be one point'),
                     (['ann.jsonl'], 'none of these files is of snn.py and has a test accuracy')):
        with pytest.raises(SystemExit, match=said):
            snn_script.main(['--summarize', *of, '--over_timesteps', 'made.png'])


READ_MES = ['README.md', 'results/README.md', 'docs/findings.md', 'docs/low_latency.md', 'pretrained/README.md']


@pytest.mark.parametrize('name', READ_MES)
def test_the_tables_in_the_read_mes_are_those_of_the_results(name, tmp_path):
    text = (ROOT / name).read_text()
    (tmp_path / 'made.md').write_text(text)
    tables.main([tmp_path / 'made.md'])
    assert (tmp_path / 'made.md').read_text() == text  # else: python -m experiment.reporting.tables README.md ...
    for figure in tables.FIGURE.finditer(text):
        with Image.open(tmp_path / figure['path']) as made, Image.open((ROOT / name).parent / figure['path']) as there:
            assert made.text['Description'] == there.text['Description']


def test_the_results_are_read_at_a_glance():
    lines = (ROOT / 'results/README.md').read_text().splitlines()
    assert len(lines) <= 150
    assert all(line.count(' | ') < 7 for line in lines if line.startswith('| '))


def test_every_run_of_the_results_stands_in_a_table():
    text = ''.join((ROOT / name).read_text() for name in READ_MES)
    shown = {path for match in tables.TABLE.finditer(text) for path in tables.files(match['files'])}
    assert shown == set(map(str, (ROOT / 'results').rglob('*.jsonl')))


@pytest.mark.parametrize('page', [b"<!-- table: results/snn/digits_12/*.jsonl --columns 'leak -->\n", b'caf\xe9\n',
                                  b'<!-- table: /a.jsonl --columns leak -->\n'], ids=['quote', 'latin', 'path'])
def test_a_page_that_cannot_be_read_is_named(tmp_path, page):
    (tmp_path / 'page.md').write_bytes(page)
    with pytest.raises(UserError, match='page.md: .*correct its comments'):
        tables.main([tmp_path / 'page.md'])
    assert (tmp_path / 'page.md').read_bytes() == page


def test_a_table_whose_files_are_gone():
    with pytest.raises(UserError, match='none.jsonl: there is no such file'):
        tables.rewritten('<!-- table: results/none.jsonl --columns leak -->\n| leak |\n\nmore\n')


@pytest.mark.parametrize('page, made', [
    ('COMMENT\n| old |\n| 1 |\n', 'COMMENT\nTABLE\n'), ('COMMENT\n| old |\n| 1 |', 'COMMENT\nTABLE\n'),
    ('COMMENT\n', 'COMMENT\nTABLE\n'), ('COMMENT', 'COMMENT\nTABLE\n'), ('COMMENT\n\nmore', 'COMMENT\nTABLE\n\nmore'),
    ('\ufeffCOMMENT\n| old |\n', '\ufeffCOMMENT\nTABLE\n'),
    ('a\r\nCOMMENT\r\n| old |\r\n| 1 |\r\n\r\n| b |\r\n', 'a\r\nCOMMENT\r\nTABLE\r\n\r\n| b |\r\n'),
    ('a\r\nCOMMENT\r\n| old |\r\n| 1 |', 'a\r\nCOMMENT\r\nTABLE\r\n'), ('COMMENT\r\n', 'COMMENT\r\nTABLE\r\n'),
    ('a\r\nb\nCOMMENT\n| old |\n\nc\r\n', 'a\r\nb\nCOMMENT\nTABLE\n\nc\r\n'),
    ('COMMENT\n| old |\n   \nmore\n', 'COMMENT\nTABLE\n   \nmore\n'),
    ('COMMENT\n| old |\n## more\n', 'COMMENT\nTABLE\n## more\n'), ('COMMENT \n| old |\n', 'COMMENT \nTABLE\n'),
    (' COMMENT\n| old |\n', ' COMMENT\nTABLE\n')])
def test_a_page_keeps_its_line_ends_and_no_old_row(written, monkeypatch, tmp_path, page, made):
    written('run', epochs(0.5, 0.75), leak=0.5)
    monkeypatch.setattr(tables, 'ROOT', tmp_path)

    def filled(text):
        end = '\r\n' if 'COMMENT\r\n' in text else '\n'
        return text.replace('COMMENT', '<!-- table: run.jsonl --columns leak seeds -->').replace(
            'TABLE', end.join(['| leak | seeds |', '| --- | --- |', '| 0.5 | 1 |'])).encode()

    (tmp_path / 'page.md').write_bytes(filled(page))
    for _ in range(2):  # the second time nothing changes
        tables.main([tmp_path / 'page.md'])
        assert (tmp_path / 'page.md').read_bytes() == filled(made)


@pytest.mark.parametrize('folder', sorted({path.parent for path in (ROOT / 'results').rglob('*.jsonl')}),
                         ids=lambda folder: folder.name)
def test_the_figures_are_those_of_the_results(folder):
    table = summarized(sorted(map(str, folder.glob('*.jsonl'))), True)
    with Image.open(folder / 'figure.png') as figure:
        assert figure.text['Description'] == table


@pytest.mark.parametrize('kind, new', [
    ('snn/fashion_14', {'encoding': 'poisson', 'delay': 1, 'initial_potential': 0.0, 'learn_threshold': False,
                        'learn_leak': False, 'lr_schedule': 'step', 'cutout': 0, 'crop': 4, 'label_smoothing': 0.0,
                        'width': 1.0}),
    ('ann', {'activation': 'ReLU', 'levels': 8, 'batch_norm': False, 'lr_schedule': 'step', 'cutout': 0, 'crop': 4,
             'label_smoothing': 0.0})])
def test_runs_of_before_there_were_other_neurons_are_of_the_same_experiment(kind, new, tmp_path):
    old = sorted((ROOT / 'results' / kind).glob('*.jsonl'))[0]
    about, *epochs = old.read_text().splitlines()
    about = json.loads(about)
    about['args'].update(new, seed=about['args']['seed'] + 1)
    (tmp_path / 'new.jsonl').write_text('\n'.join([json.dumps(about), *epochs]) + '\n')
    assert len(summary.rows(summary.read_all([old, tmp_path / 'new.jsonl']))) == 1
