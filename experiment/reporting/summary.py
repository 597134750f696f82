"""Metrics files, as ann.py and snn.py write them, as a table and a figure: mean and spread over seeds.

It needs no torch.
"""
import json
import math
import os
import re
import statistics
import warnings
from pathlib import Path
from typing import NamedTuple

from experiment import UserError
from experiment.files import write_atomically
from experiment.options import FORMER, FORMER_ANN, without_effect
from experiment.reporting import figures
from self_models.surrogate import FLAGS

# Runs that differ in these alone are one experiment: its repetition, and where and how it ran and what it said.
NOT_SETTINGS = {'seed', 'name', 'resume', 'gpu', 'devices', 'num_workers', 'backend', 'log', 'tensorboard', 'report',
                'split_seed', 'predict', 'export_nir', 'test_acc_every_batch', 'train_acc_batches'}

ALWAYS = ('data', 'architecture', 'timesteps')  # settings that a table shows though all of its rows have them in common
# Settings that the converted network does not depend on.
TRAINING = {'epochs', 'learning_rate', 'lr_interval', 'lr_reduce', 'lr_schedule', 'optimizer', 'weight_decay',
            'momentum', 'amsgrad', 'dropout', 'label_smoothing', 'activation', *FLAGS, 'output',
            'learn_threshold', 'learn_leak', 'keep_batch_norm'}


class Run(NamedTuple):
    """What a metrics file says. Accuracies are fractions; None where it says nothing of them."""
    path: str
    settings: dict
    seed: int
    chosen_on: str  # the images that the best epoch was chosen on: test or validation
    folder: str | None  # of pictures
    ann: float | None  # accuracy on those, as the next
    converted: float | None
    epochs: dict[int, float]  # {epoch: accuracy}, 0: an SNN's before training
    curve: dict[str, float]  # {time steps: accuracy} of epoch 0
    accuracy: float | None  # of the best epoch, on the test set
    done: int  # epochs
    asked: int
    seconds: list[float]  # of each epoch
    machine: str
    factor: float | None  # the scaling factor that --scaling_factor auto chose, and
    scan: dict[str, float]  # {factor: accuracy} of those that it tried, on
    scanned_on: str | None  # train or validation images


def read(path):
    """The Run of a metrics file. Raises UserError."""
    try:
        text = Path(path).read_bytes()
        text = text.decode(json.detect_encoding(text))  # editors add a byte-order mark, in UTF-8 or UTF-16
        about, *epochs = [json.loads(line) for line in text.splitlines() if line.strip()]
        return _run(str(path), about['args'], about.get('machine'), epochs)
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}); give the .jsonl files of runs in logs/') from error
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f'{path}: is no metrics file of ann.py or snn.py, or not a whole one; leave it out') from error


def is_set_aside(path):
    """Whether a later run of the same name has set this metrics file aside."""
    return Path(path).name.startswith('previous.')


def read_all(paths):
    """The Runs of metrics files, one named twice once; of those set aside only if there are no others.

    A pattern such as logs/snn/*.jsonl matches them, too. Raises UserError.
    """
    paths = list(dict.fromkeys(paths))
    return [read(path) for path in [path for path in paths if not is_set_aside(path)] or paths]


def _finite(value):
    """A number as a float. Raises ValueError, TypeError or OverflowError for what is none, or is not finite."""
    if not math.isfinite(number := float(value)):
        raise ValueError(f'{value} is not finite')
    return number


def _numbers(values):
    """{text of a number: number} as read from JSON, each checked; the texts stay."""
    return {key: _finite(value) for key, value in values.items() if math.isfinite(_finite(key))}


def _run(path, args, machine, epochs):
    seed = int(args['seed'])
    settings = {key: value for key, value in args.items() if key not in NOT_SETTINGS and value is not None}
    # where a set lies says which it is only if it is a folder of pictures
    data, folder = settings.pop('dataset', None), os.path.expanduser(settings.pop('data_dir', ''))
    try:
        folder = os.path.realpath(folder)
    except ValueError:  # a name that no file here can have
        pass
    pictures = data in ('FOLDER', 'IMAGENET')
    settings['data'] = f'{data} {Path(folder).name}' if pictures else data
    # of files from before there were others
    former = {'lr_schedule': 'step', 'cutout': 0, 'label_smoothing': 0.0,
              **(FORMER if 'timesteps' in settings else FORMER_ANN)}
    if 'scaling_factor' in settings:
        former['threshold_percentile'] = 100.0
    for key, value in former.items():
        settings.setdefault(key, value)
    if 'width' in without_effect(settings):  # files of former versions do not know it, nor the flags of the next line
        del settings['width']
    for key, value in (('keep_batch_norm', False), ('balance_blocks', False), ('bounds', 'layer')):
        if settings.get(key) == value:
            del settings[key]
    if 'lr_reduce' in settings:  # 10 where it was not given, in files of before
        settings['lr_reduce'] = _finite(settings['lr_reduce'])
    for key in ('pretrained_ann', 'pretrained_snn'):  # each seed may start from a network of that seed
        if settings.get(key):
            settings[key] = re.sub(rf'(seed[-_]?){seed}(?!\d)', r'\1*', settings[key])

    chosen_on = 'validation' if any('validation_accuracy' in epoch for epoch in epochs) else 'test'
    chosen = f'{chosen_on}_accuracy'
    start = next((epoch for epoch in epochs if epoch['epoch'] == 0 and 'ann_accuracy' in epoch), {})
    accuracy = None
    if epochs:
        accuracy = _finite(epochs[-1].get('best_accuracy', epochs[-1][chosen]))  # epoch 0 is as yet its own best
        if chosen_on == 'validation':  # only at the end is the best epoch tested
            accuracy = next((_finite(epoch['test_accuracy']) for epoch in epochs
                             if epoch.get(chosen) == accuracy and 'test_accuracy' in epoch), None)
    if 'scan' in start and (start['scanned_on'] not in ('train', 'validation') or 'scaling_factor' not in settings):
        raise ValueError(f'factors scanned on {start["scanned_on"]}')
    return Run(
        path, settings, seed, chosen_on, folder if pictures else None,
        ann=_finite(start['ann_accuracy']) if start else None, converted=_finite(start[chosen]) if start else None,
        epochs={int(epoch['epoch']): _finite(epoch[chosen]) for epoch in epochs},
        curve={key: value for epoch in epochs for key, value in _numbers(epoch.get('curve', {})).items()},
        accuracy=accuracy,
        done=max((int(epoch['epoch']) for epoch in epochs), default=0), asked=int(args['epochs']),
        seconds=[_finite(epoch['seconds']) for epoch in epochs if 'seconds' in epoch], machine=str(machine or '-'),
        factor=_finite(start['scaling_factor']) if 'scan' in start else None,
        scan=_numbers(start.get('scan', {})), scanned_on=start.get('scanned_on'))


def rows(runs):
    """Lists of runs that have all settings, and what their best epoch was chosen on, in common. Raises UserError."""
    found = {}
    for run in runs:
        row = found.setdefault((run.chosen_on, run.folder, json.dumps(run.settings, sort_keys=True)), [])
        for other in row:
            if other.seed == run.seed:
                raise UserError(f'{other.path} and {run.path} are of the same settings and seed, which would count '
                                'twice; leave one out')
        row.append(run)
    return list(found.values())


def mean_and_spread(values):
    """[0.9, 0.92] -> '91.00 ± 1.41', in percent: the sample standard deviation (n - 1), none of a single value.

    Of values that are partly None, those that are there, and how many they are.
    """
    there = [100 * value for value in values if value is not None]
    if not there:
        return '-'
    text = f'{statistics.mean(there):.2f}' + (f' ± {statistics.stdev(there):.2f}' if len(there) > 1 else '')
    return text + (f' ({len(there)} of {len(values)})' if len(there) < len(values) else '')


def epochs_done(row):
    """'20', or of unfinished runs '7-20 of 20 *'."""
    least, most, asked = min(run.done for run in row), max(run.done for run in row), row[0].asked
    if least >= asked:
        return str(least) if least == most else f'{least}-{most}'
    return f'{least} of {asked} *' if least == most else f'{least}-{most} of {asked} *'


def columns(row_list, every=False):
    """The settings that tell rows apart, headings to a list of texts, a text a row; those of ALWAYS in any case.

    every: all settings, whether they tell rows apart or not.
    """
    keys = dict.fromkeys(key for row in row_list for key in (*ALWAYS, *row[0].settings))
    values = {key: [row[0].settings.get(key) for row in row_list] for key in keys}
    for number, row in enumerate(row_list):
        chosen = sorted({run.factor for run in row if run.factor is not None})
        if chosen:
            values['scaling_factor'][number] = f'auto: {", ".join(map(str, chosen))}'
    shown = ALWAYS if all(run.factor is None for row in row_list for run in row) else (*ALWAYS, 'scaling_factor')
    return {key: ['-' if value is None else str(value) for value in column] for key, column in values.items()
            if every or len(set(map(json.dumps, column))) > 1
            or key in shown and any(value is not None for value in column)}


def names(row_list):
    """What tells each row from the others, for a legend; of a single one, what it is of."""
    shown = columns(row_list)
    telling = {key: column for key, column in shown.items() if len(set(column)) > 1} or shown
    bare = ('data', 'architecture')
    return [', '.join(column[number] if key in bare else f'{key} {Path(column[number]).name}'
                      for key, column in telling.items() if column[number] != '-') for number in range(len(row_list))]


def cells(row_list, every=False):
    """The heading of a table and its rows, all as texts. every: as of columns()."""
    chosen_on = row_list[0][0].chosen_on
    settings = columns(row_list, every)
    # All of these are of the images that epochs were compared on, as a run tests nothing else before its end.
    on = '' if chosen_on == 'test' else ', on validation images'
    with_ann = any(run.ann is not None for row in row_list for run in row)
    heading = [*settings, 'seeds', *([f'ANN{on}', f'converted{on}', f'last epoch{on}'] if with_ann else []),
               f'test accuracy, best epoch chosen on {chosen_on} images', 'epochs done', 's/epoch', 'machine']
    body = []
    for number, row in enumerate(row_list):
        ann, of_its_seed = [run.ann for run in row], '*' in str(row[0].settings.get('pretrained_ann'))
        seconds = [value for run in row for value in run.seconds]
        body.append([
            *(column[number] for column in settings.values()), str(len(row)),
            # one ANN for all seeds was measured once
            *([mean_and_spread(ann if of_its_seed or len(set(ann)) > 1 else ann[:1]),
               mean_and_spread([run.converted for run in row]),
               mean_and_spread([run.epochs.get(run.done or None) for run in row])] if with_ann else []),
            mean_and_spread([run.accuracy for run in row]), epochs_done(row),
            f'{statistics.mean(seconds):.2f}' if seconds else '-', '; '.join(sorted({run.machine for run in row}))])
    return heading, body


def scan_cells(row_list, every=False):
    """The table of what --scaling_factor auto found, a column for each factor: its heading and rows, as texts.

    every: as of columns().
    """
    factors = sorted({factor for row in row_list for run in row for factor in run.scan}, key=float)
    settings = {key: column for key, column in columns(row_list, every).items() if key not in TRAINING}
    body = []
    for number, row in enumerate(row_list):
        body.append([*(column[number] for column in settings.values()),
                     ', '.join(sorted({run.scanned_on for run in row if run.scan})), str(len(row)),
                     *(mean_and_spread([run.scan.get(factor) for run in row]) for factor in factors)])
    # runs that differ in training alone start from the same scan: once is enough
    return [*settings, 'images', 'seeds', *factors], [list(line) for line in dict.fromkeys(map(tuple, body))]


def plain(heading, body):
    """Columns of one width each, set flush right."""
    widths = [max(map(len, column)) for column in zip(heading, *body)]
    return '\n'.join('  '.join(text.rjust(width) for text, width in zip(line, widths)) for line in [heading, *body])


def markdown(heading, body):
    """A table for a README."""
    escaped = [[text.replace('|', '\\|') for text in line] for line in [heading, *body]]
    lines = [escaped[0], ['---'] * len(heading), *escaped[1:]]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _number(text):
    """A cell as it sorts: numbers by their value, after what is none."""
    try:
        return 1, float(text), ''
    except ValueError:
        return 0, 0, text


def narrow(row_list, chosen):
    """The heading and rows of some columns: of scan_cells() where factors are among them, else of cells().

    A column is called by its heading, or by that up to a comma; rows are in the order of their settings. Raises
    UserError for a column that is not there, and for rows that then read the same.
    """
    scanned = any(_number(name)[0] for name in chosen)
    if scanned:
        row_list = [row for row in row_list if any(run.scan for run in row)]
    heading, body = (scan_cells if scanned else cells)(row_list, every=True) if row_list else ([], [])
    places = []
    for name in chosen:
        found = [place for place, text in enumerate(heading) if name in (text, text.split(',')[0])]
        if not found:
            raise UserError(f'--columns {name}: there is no such column; there are: '
                            + ', '.join(text.split(',')[0] for text in heading))
        places.append(found[0])

    def shown(line):  # of a checkpoint its name is enough
        return [Path(line[place]).stem if heading[place].startswith('pretrained') else line[place] for place in places]

    settings = [place for place in range(heading.index('seeds')) if heading[place] != 'images']
    telling = [number for number, place in enumerate(places) if place in settings]
    seen = {}
    for line in body:
        other = seen.setdefault(tuple(shown(line)[number] for number in telling), line)
        differ = [heading[place] for place in settings if line[place] != other[place]]
        if differ:
            raise UserError(f'--columns: rows would read the same that differ in {", ".join(differ)}; add that')
    return [heading[place] for place in places], sorted(
        map(shown, body), key=lambda cells: [_number(cells[number]) for number in telling])


def narrow_table(paths, chosen, as_markdown=False):
    """The text that --summarize --columns prints: one table, of some columns. Raises UserError as narrow() does."""
    row_list = rows(read_all(paths))
    if len({row[0].chosen_on for row in row_list}) > 1 and not any(_number(name)[0] for name in chosen):
        raise UserError('--columns: some of these runs chose their best epoch on test images, others on validation '
                        'images; take them one after the other')
    return (markdown if as_markdown else plain)(*narrow(row_list, chosen))


def summarize(paths, as_markdown=False):
    """The text that --summarize prints: a table of the runs whose best epoch was chosen on test images, one of others.

    A row is of runs that differ in NOT_SETTINGS alone, a column of a setting that differs between rows or is one of
    ALWAYS. Runs that chose their scaling factor make a further table, of the accuracies that each factor gave. Raises
    UserError for a file that is no metrics file, and for two of the same settings and seed.
    """
    return tables(read_all(paths), as_markdown)


def tables(runs, as_markdown):
    """The text of summarize(), of Runs."""
    form = markdown if as_markdown else plain
    parts = ['Accuracies in %: mean ± sample standard deviation over seeds.']
    for chosen_on in ('test', 'validation'):
        row_list = rows(run for run in runs if run.chosen_on == chosen_on)
        if row_list:
            parts.append(form(*cells(row_list)))
    scanned = [row for row in rows(runs) if any(run.scan for run in row)]
    if scanned:
        parts += ['Of the converted network, by scaling factor:', form(*scan_cells(scanned))]
    unfinished = [f'{run.path} ({run.done} of {run.asked} epochs)' for run in runs if run.done < run.asked]
    if unfinished:
        parts.append(('\\*' if as_markdown else '*') + f' unfinished: {", ".join(unfinished)}')
    return '\n\n'.join(parts)


def draw(paths, path):
    """Write figures.draw_runs of metrics files to `path`, a PNG whose description is the table of summarize().

    Raises UserError as summarize() does, and where there is nothing to draw or no writing there.
    """
    runs = read_all(paths)
    row_list = rows(runs)
    if not any(run.epochs for run in runs):
        raise UserError('--figure: there is no epoch of these runs to draw yet')
    _write(figures.draw_runs(row_list, names(row_list)), runs, path)


def kinds(row_list):
    """Rows as figures.draw_over_time_steps wants them: ({name: row} of ANNs, {name: {T: row}} of spiking networks).

    A spiking network is called published (Poisson input, a step of delay a layer), low latency (direct input, none), or
    what else its input and delay are; with its data and architecture where there are several. Raises UserError for
    two of one kind and T.
    """
    def what(row):
        settings = row[0].settings
        if 'timesteps' not in settings:
            name = f'ANN, {settings["activation"]}'
        else:
            name = {('poisson', 1): 'published', ('direct', 0): 'low latency'}.get(
                (settings['encoding'], settings['delay']), f'{settings["encoding"]}, delay {settings["delay"]}')
        return ', '.join([name, *(settings.get(key, '-') for key in several)])

    several = [key for key in ('data', 'architecture') if len({row[0].settings.get(key) for row in row_list}) > 1]
    anns, spiking, seen = {}, {}, {}
    for row in row_list:
        name, timesteps = what(row), row[0].settings.get('timesteps')
        other = seen.setdefault((name, timesteps), row)
        if other is not row:
            raise UserError(f'--over_timesteps: {other[0].path} and {row[0].path} would be one point ({name}'
                            + (f', T = {timesteps}' if timesteps else '') + '); leave one out')
        if timesteps is None:
            anns[name] = row
        else:
            spiking.setdefault(name, {})[timesteps] = row
    if not spiking:
        raise UserError('--over_timesteps: none of these files is of a run of snn.py')
    return anns, spiking


def draw_over_time_steps(paths, path):
    """Write figures.draw_over_time_steps of metrics files to `path`, a PNG as of draw(). Raises UserError."""
    runs = [run for run in read_all(paths) if run.accuracy is not None]
    _write(figures.draw_over_time_steps(*kinds(rows(runs))), runs, path)


def _write(figure, runs, path):
    about = {'Description': figures.drawable(tables(runs, as_markdown=True))}
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # a letter that the font lacks becomes a box
        write_atomically(path, lambda file: figure.savefig(file, format='png', dpi=120, metadata=about))
