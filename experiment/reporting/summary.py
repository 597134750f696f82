"""Metrics files, as ann.py and snn.py write them, as a table and a figure: mean and spread over seeds.

It needs no torch.
"""
import contextlib
import itertools
import json
import os
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from experiment import UserError, former
from experiment.files import write_atomically
from experiment.options import without_effect
from experiment.reporting import figures
from self_models.surrogate import FLAGS

# Runs that differ only in these are repetitions of one experiment.
NOT_SETTINGS = {'seed', 'name', 'resume', 'gpu', 'devices', 'num_workers', 'backend', 'log', 'tensorboard', 'report',
                'split_seed', 'predict', 'export_nir', 'test_acc_every_batch', 'train_acc_batches'}

ALWAYS = ('data', 'architecture', 'timesteps')  # settings that a table always shows
# settings that do not change the converted network
TRAINING = {'epochs', 'learning_rate', 'lr_interval', 'lr_reduce', 'lr_schedule', 'optimizer', 'weight_decay',
            'momentum', 'amsgrad', 'dropout', 'label_smoothing', 'activation', *FLAGS, 'output',
            'learn_threshold', 'learn_leak', 'keep_batch_norm'}


class Run(NamedTuple):
    """What a metrics file says. Accuracies are fractions, or None if the file has none."""
    path: str
    settings: dict
    seed: int
    chosen_on: str  # the images that the best epoch was chosen on: test or validation
    folder: str | None  # of pictures
    ann: float | None  # accuracy on those, as the next
    converted: float | None
    epochs: dict[int, float]  # {epoch: accuracy}, 0: an SNN's before training
    curve: dict[float, float]  # {time steps: accuracy} of a network that was converted, before training
    accuracy: float | None  # of the best epoch, on the test set
    done: int  # epochs
    asked: int
    seconds: list[float]  # of each epoch
    machine: str
    factor: float | None  # the scaling factor that --scaling_factor auto chose, and
    scan: dict[float, float]  # {factor: accuracy} of those that it tried, on
    scanned_on: str | None  # train or validation images
    pretrained: dict  # {flag: file} of the network that it began with; they are among the settings, too


def read(path: str | Path) -> Run:
    """The Run of a metrics file. Raises UserError."""
    try:
        text = Path(path).read_bytes()
        text = text.decode(json.detect_encoding(text))  # editors add a byte-order mark, in UTF-8 or UTF-16
        about, *epochs = [json.loads(line) for line in text.splitlines() if line.strip()]
        return _run(str(path), about, epochs)
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}); give the .jsonl files of runs in logs/') from error
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f'{path}: is no metrics file of ann.py or snn.py, or not a whole one; leave it out') from error


def is_set_aside(path: str) -> bool:
    """Whether a later run of the same name has set this metrics file aside."""
    return Path(path).name.startswith('previous.')


def read_all(paths: list[str]) -> list[Run]:
    """The Runs of metrics files, one named twice once; of those set aside only if there are no others.

    A pattern such as logs/snn/*.jsonl matches them, too. Raises UserError.
    """
    paths = list(dict.fromkeys(paths))
    return [read(path) for path in [path for path in paths if not is_set_aside(path)] or paths]


def _numbers(values):
    """{number: number} of a JSON object, whose keys are texts."""
    return {float(key): float(value) for key, value in values.items()}


def _settings(args):
    """(a run's arguments that make it the experiment that it is, Run.folder, Run.pretrained)."""
    settings = {key: value for key, value in args.items() if key not in NOT_SETTINGS and value is not None}
    # only pictures in folders are told apart by their place
    data, folder = settings.pop('dataset', None), os.path.expanduser(settings.pop('data_dir', ''))
    with contextlib.suppress(ValueError):  # a name that no file here can have
        folder = os.path.realpath(folder)
    folder = folder if data in ('FOLDER', 'IMAGENET') else None
    settings['data'] = data if folder is None else f'{data} {Path(folder).name}'
    settings = former.arguments(settings, spiking='timesteps' in settings)
    # settings that files of former versions lack: left out if they are at their defaults
    unknown = {'keep_batch_norm': False, 'balance_blocks': False, 'bounds': 'layer'}
    if 'width' in without_effect(settings):
        unknown['width'] = settings['width']
    settings = {key: value for key, value in settings.items() if key not in unknown or value != unknown[key]}
    if 'lr_reduce' in settings:  # an int in files of former versions
        settings['lr_reduce'] = float(settings['lr_reduce'])
    pretrained = {key: settings[key] for key in ('pretrained_ann', 'pretrained_snn') if settings.get(key)}
    return settings, folder, pretrained


def _run(path, about, epochs):
    args, machine, processes = about['args'], about.get('machine'), about.get('processes', 1)
    seed = int(args['seed'])
    # batches are of each process
    settings, folder, pretrained = _settings({**args, 'processes': processes} if processes > 1 else args)
    chosen_on = 'validation' if any('validation_accuracy' in epoch for epoch in epochs) else 'test'
    chosen = f'{chosen_on}_accuracy'
    start = next((epoch for epoch in epochs if epoch['epoch'] == 0 and 'ann_accuracy' in epoch), {})
    accuracy = None
    if epochs:
        accuracy = float(epochs[-1].get('best_accuracy', epochs[-1][chosen]))  # epoch 0 is as yet its own best
        if chosen_on == 'validation':  # only at the end is the best epoch tested
            accuracy = next((float(epoch['test_accuracy']) for epoch in epochs
                             if epoch.get(chosen) == accuracy and 'test_accuracy' in epoch), None)
    return Run(
        path, settings, seed, chosen_on, folder,
        ann=float(start['ann_accuracy']) if start else None, converted=float(start[chosen]) if start else None,
        epochs={int(epoch['epoch']): float(epoch[chosen]) for epoch in epochs},
        curve=_numbers(start.get('curve', {})),
        accuracy=accuracy,
        done=max((int(epoch['epoch']) for epoch in epochs), default=0), asked=int(args['epochs']),
        seconds=[float(epoch['seconds']) for epoch in epochs if 'seconds' in epoch], machine=str(machine or '-'),
        factor=float(start['scaling_factor']) if 'scan' in start else None,
        scan=_numbers(start.get('scan', {})), scanned_on=start.get('scanned_on'), pretrained=pretrained)


def _without_seed(run, before):
    """The run, its seed a * in the names of the files that it began with, behind what the pattern `before` matches."""
    return run._replace(settings={**run.settings, **{
        flag: re.sub(rf'{before}{run.seed}(?!\d)', r'\1*', file, flags=re.DOTALL)
        for flag, file in run.pretrained.items()}})


def rows(runs: Iterable[Run]) -> list[list[Run]]:
    """Lists of runs with the same settings, whose best epoch was chosen on the same set. Raises UserError."""
    def key(run):
        return run.chosen_on, run.folder, json.dumps(run.settings, sort_keys=True)

    # runs that start from one file are a row; of the others, those that each start from their own seed's network, whose
    # name may hold that seed at its end or throughout
    forms = [{key(form): form for form in (run, _without_seed(run, '(.*seed[-_]?)'), _without_seed(run, '(seed[-_]?)'))}
             for run in runs]
    count, found = Counter(itertools.chain.from_iterable(forms)), {}
    for of_run in forms:
        chosen = next((each for each in of_run if count[each] > 1), list(of_run)[-1])
        found.setdefault(chosen, []).append(of_run[chosen])
    for row in found.values():
        for run, other in itertools.combinations(row, 2):
            if other.seed == run.seed:
                raise UserError(f'{run.path} and {other.path} are of the same settings and seed, which would count '
                                'twice; leave one out')
    return list(found.values())


def mean_and_spread(values: list[float | None]) -> str:
    """[0.9, 0.92] -> '91.00 ± 1.41', in percent: the sample standard deviation (n - 1), none for a single value.

    If some values are None, the others, and how many they are.
    """
    there = [value for value in values if value is not None]
    if not there:
        return '-'
    text = ' ± '.join(f'{value:.2f}' for value in figures.mean_and_spread(there)[:len(there)])
    return text + (f' ({len(there)} of {len(values)})' if len(there) < len(values) else '')


def epochs_done(row: list[Run]) -> str:
    """'20', or for unfinished runs '7-20 of 20 *'."""
    done = sorted({run.done for run in row})
    text = '-'.join(map(str, dict.fromkeys([done[0], done[-1]])))
    return text if done[0] >= row[0].asked else f'{text} of {row[0].asked} *'


def settings_of(row_list: list[list[Run]], every: bool = False) -> list[dict[str, str]]:
    """The settings of each row as texts: those that differ between rows, and ALWAYS; or every one."""
    found, always = [dict(row[0].settings) for row in row_list], set(ALWAYS)
    for settings, row in zip(found, row_list):
        if chosen := sorted({run.factor for run in row if run.factor is not None}):
            settings['scaling_factor'] = f'auto: {", ".join(map(str, chosen))}'
            always.add('scaling_factor')
    shown = []
    for key in dict.fromkeys([*ALWAYS, *(key for settings in found for key in settings)]):
        values = [settings.get(key) for settings in found]
        if every or len(set(map(repr, values))) > 1 or key in always and values != [None] * len(values):
            shown.append(key)
    return [{key: '-' if settings.get(key) is None else str(settings[key]) for key in shown} for settings in found]


def names(row_list: list[list[Run]]) -> list[str]:
    """For a legend: the settings in which rows differ; of a single row, all that the table shows."""
    found = settings_of(row_list)
    telling = [key for key in found[0] if len({settings[key] for settings in found}) > 1] or found[0]

    def short(key, text):
        files = {settings[key] for settings in found if Path(settings[key]).name == Path(text).name}
        return Path(text).name if len(files) == 1 else text
    return [', '.join(settings[key] if key in ('data', 'architecture') else f'{key} {short(key, settings[key])}'
                      for key in telling if settings[key] != '-') for settings in found]


def results(row_list: list[list[Run]], every: bool = False) -> list[dict[str, str]]:
    """The table of accuracies: a line {heading: text} for each row. every: as of settings_of()."""
    chosen_on = row_list[0][0].chosen_on
    # ann, converted and epochs: accuracies on the images that the best epoch is chosen on
    on = '' if chosen_on == 'test' else ', on validation images'
    with_ann = any(run.ann is not None for row in row_list for run in row)
    table = []
    for line, row in zip(settings_of(row_list, every), row_list):
        ann, seconds = [run.ann for run in row], [value for run in row for value in run.seconds]
        if '*' not in str(row[0].settings.get('pretrained_ann')) and len(set(ann)) == 1:
            ann = ann[:1]  # one ANN for all seeds was measured once
        line['seeds'] = str(len(row))
        if with_ann:
            line |= {f'ANN{on}': mean_and_spread(ann),
                     f'converted{on}': mean_and_spread([run.converted for run in row]),
                     f'last epoch{on}': mean_and_spread([run.epochs.get(run.done or None) for run in row])}
        table.append(line | {
            f'test accuracy, best epoch chosen on {chosen_on} images': mean_and_spread([run.accuracy for run in row]),
            'epochs done': epochs_done(row), 's/epoch': f'{statistics.mean(seconds):.2f}' if seconds else '-',
            'machine': '; '.join(sorted({run.machine for run in row}))})
    return table


def scans(row_list: list[list[Run]], every: bool = False) -> list[dict[str, str]]:
    """The table of what --scaling_factor auto found, a column for each factor. every: as of settings_of()."""
    factors = sorted({factor for row in row_list for run in row for factor in run.scan})
    table = []
    for settings, row in zip(settings_of(row_list, every), row_list):
        line = {key: text for key, text in settings.items() if key not in TRAINING}
        line |= {'images': ', '.join(sorted({run.scanned_on for run in row if run.scan})), 'seeds': str(len(row)),
                 **{str(factor): mean_and_spread([run.scan.get(factor) for run in row]) for factor in factors}}
        if line not in table:  # runs that differ in training alone start from the same scan
            table.append(line)
    return table


def text_of(table: list[dict[str, str]], as_markdown: bool) -> str:
    """A table for a read-me, or in columns of one width each, set flush right."""
    lines = [list(table[0]), *(list(line.values()) for line in table)]
    if as_markdown:
        lines = [[text.replace('|', '\\|') for text in line] for line in lines]
        lines.insert(1, ['---'] * len(lines[0]))
        return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return '\n'.join('  '.join(text.rjust(width) for text, width in zip(line, widths)) for line in lines)


def _number(text):
    """A cell as it sorts: numbers by their value, after what is none."""
    try:
        return 1, float(text), ''
    except ValueError:
        return 0, 0, text


def narrow_table(runs: list[Run], chosen: list[str], as_markdown: bool = False) -> str:
    """The text that --summarize --columns prints: one table of some columns, sorted by its settings.

    The columns are of scans() if there are factors among them, else of results(). The name of a column is its heading,
    or the part before a comma. Raises UserError for an unknown column, and for rows whose settings would look the same.
    """
    row_list, scanned = rows(runs), any(_number(name)[0] for name in chosen)
    if scanned:
        row_list = [row for row in row_list if any(run.scan for run in row)]
        if not row_list:
            raise UserError('--columns: none of these runs tried scaling factors, as --scaling_factor auto does')
    elif len({row[0].chosen_on for row in row_list}) > 1:
        raise UserError('--columns: some of these runs chose their best epoch on test images, others on validation '
                        'images; summarize the two separately')
    table = (scans if scanned else results)(row_list, every=True) if row_list else []
    heading, keys = list(table[0]) if table else [], []
    for name in chosen:
        found = [key for key in heading if name in (key, key.split(',')[0])]
        if not found:
            raise UserError(f'--columns {name}: there is no such column; there are: '
                            + ', '.join(key.split(',')[0] for key in heading))
        keys.append(found[0])
    settings = [key for key in heading[:heading.index('seeds')] if key != 'images']
    telling, seen, shown = [key for key in keys if key in settings], {}, []
    files = {line[key] for line in table for key in keys if key.startswith('pretrained')}
    stems = [Path(file).stem for file in files]
    short = {file: stem for file, stem in zip(files, stems) if stems.count(stem) == 1}
    for line in table:
        shown.append({key: short.get(line[key], line[key]) if key.startswith('pretrained') else line[key]
                      for key in keys})
        other = seen.setdefault(tuple(shown[-1][key] for key in telling), line)
        if differ := [key for key in settings if line[key] != other[key]]:
            raise UserError(f'--columns: some rows differ only in {", ".join(differ)}; add these columns')
    shown.sort(key=lambda line: [_number(line[key]) for key in telling])
    return text_of(shown, as_markdown)


def unfinished(runs: list[Run]) -> list[str]:
    """A line that names the runs with epochs to go, if there are any."""
    named = [f'{run.path} ({run.done} of {run.asked} epochs)' for run in runs if run.done < run.asked]
    return [f'unfinished: {", ".join(named)}'] if named else []


def tables(runs: list[Run], as_markdown: bool = False) -> str:
    """The text that --summarize prints: a table of runs whose best epoch was chosen on test images, one of the others.

    The runs of a row differ only in NOT_SETTINGS. The columns have settings that differ between rows, and ALWAYS. A
    further table has the accuracy at each scaling factor that runs tried. Raises UserError for two runs of the same
    settings and seed.
    """
    parts = ['Accuracies in %: mean ± sample standard deviation over seeds.']
    for chosen_on in ('test', 'validation'):
        if row_list := rows(run for run in runs if run.chosen_on == chosen_on):
            parts.append(text_of(results(row_list), as_markdown))
    if scanned := [row for row in rows(runs) if any(run.scan for run in row)]:
        parts += ['Of the converted network, by scaling factor:', text_of(scans(scanned), as_markdown)]
    parts += [('\\*' if as_markdown else '*') + f' {line}' for line in unfinished(runs)]
    return '\n\n'.join(parts)


def draw(runs: list[Run], path: Path) -> None:
    """Write figures.draw_runs to `path`, a PNG whose description is the text of tables().

    Raises UserError as tables() does, and if there is nothing to draw or the file cannot be written.
    """
    row_list = rows(runs)
    if not any(run.epochs for run in runs):
        raise UserError('--figure: there is no epoch of these runs to draw yet')
    _write(figures.draw_runs(row_list, names(row_list)), runs, path)


def kinds(row_list: list[list[Run]]) -> tuple[dict[str, list[Run]], dict[str, dict[int, list[Run]]]]:
    """Rows for figures.draw_over_time_steps: ({name: row} of ANNs, {name: {T: row}} of spiking networks).

    A spiking network is called published (Poisson input, a step of delay a layer), low latency (direct input, none), or
    what else its input and delay are, with its data and architecture if there are several; an ANN by its activation,
    with the levels of QCFS if they differ. Raises UserError for two rows of one kind and T.
    """
    called = {('poisson', 1): 'published', ('direct', 0): 'low latency'}
    several = [key for key in ('data', 'architecture') if len({row[0].settings.get(key) for row in row_list}) > 1]
    anns, spiking, quantized = {}, {}, [row[0].settings.get('levels') for row in row_list
                                        if row[0].settings.get('activation') == 'QCFS']
    for row in row_list:
        settings = row[0].settings
        timesteps, neuron = settings.get('timesteps'), (settings.get('encoding'), settings.get('delay'))
        name = f'ANN, {settings["activation"]}' if timesteps is None else called.get(
            neuron, '{}, delay {}'.format(*neuron))
        if settings.get('activation') == 'QCFS' and len(set(quantized)) > 1:
            name += f' of {settings.get("levels")} levels'
        name = ', '.join([name, *(settings.get(key, '-') for key in several)])
        known, place = (anns, name) if timesteps is None else (spiking.setdefault(name, {}), timesteps)
        if place in known:
            raise UserError(f'--over_timesteps: {known[place][0].path} and {row[0].path} would be one point ({name}'
                            + (f', T = {timesteps}' if timesteps else '') + '); leave one out')
        known[place] = row
    if not spiking:
        raise UserError('--over_timesteps: none of these files is of snn.py and has a test accuracy; add some of '
                        'logs/snn/, of runs that ended')
    return anns, spiking


def draw_over_time_steps(runs: list[Run], path: Path) -> None:
    """Write figures.draw_over_time_steps to `path`, a PNG as of draw(). Raises UserError."""
    runs = [run for run in runs if run.accuracy is not None]
    _write(figures.draw_over_time_steps(*kinds(rows(runs))), runs, path)


def _write(figure, runs, path):
    about = {'Description': figures.drawable(tables(runs, as_markdown=True))}
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # a letter that the font lacks becomes a box
        write_atomically(path, lambda file: figure.savefig(file, format='png', dpi=120, metadata=about))
