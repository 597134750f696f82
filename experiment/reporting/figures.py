"""Drawing with matplotlib, without a screen, and the figures of metrics files. It needs no torch."""
import math
import os
import statistics
import textwrap
from collections.abc import Iterable
from itertools import cycle, product
from typing import TYPE_CHECKING

from experiment import importing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ('#1f5fa8', '#c8553d', '#3b8f5a', '#8a5aa8', '#c79a2a', '#4a4a4a', '#5fb3c8', '#d885a8')
LINES = ('-', '--', ':', '-.')  # once the colors are used up


def check(flag: str) -> None:
    """Raise UserError, before any work, if a flag's figures cannot be drawn."""
    with importing('matplotlib', flag):
        new_figure(1, 1)


def new_figure(width: float, height: float) -> 'Figure':
    """An empty figure of matplotlib's, for files only: no pyplot, which keeps figures and looks for a screen."""
    os.environ['MPLBACKEND'] = 'agg'  # matplotlib does not load with a notebook's backend that is not installed
    import matplotlib.backends.backend_agg  # noqa: F401  for PNG files
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    rcParams['text.usetex'] = False  # whatever the user's matplotlibrc says: there may be no LaTeX
    return Figure(figsize=(width, height), layout='constrained')


def drawable(text: str) -> str:
    """A text that matplotlib draws: bytes in a file name that are no Unicode become escapes."""
    text = text.encode('utf-8', 'backslashreplace').decode()
    return f' {text}' if text.startswith('_') else text  # a legend leaves out names that begin with _


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1; 0 of a single value) of fractions, in %."""
    values = [100 * value for value in values]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0


def draw_runs(row_list: list[list], names: list[str]) -> 'Figure':
    """The accuracies of rows of summary.Runs, a line each: mean and, shaded, sample standard deviation over seeds.

    Up to three axes: over epochs and, for converted networks, over time steps and by scaling factor. names: of the
    rows, for the legend.
    """
    runs = [run for row in row_list for run in row]
    chosen_on = ' or '.join(sorted({run.chosen_on for run in runs}))
    scanned_on = ' or '.join(sorted({run.scanned_on for run in runs if run.scan}))
    panels = [('epochs', 'epoch', f'After each epoch, {chosen_on} images'),
              ('curve', 'time steps', f'Converted, {chosen_on} images'),
              ('scan', 'scaling factor', f'Converted, {scanned_on} images')]
    panels = [panel for panel in panels if any(getattr(run, panel[0]) for run in runs)]
    width = max(4.4 * len(panels), 6.4)
    names = [textwrap.fill(drawable(name), int(14 * width)) for name in names]
    figure = new_figure(width, 4 + 0.2 * sum(name.count('\n') + 1 for name in names))
    for axes, (field, x, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for row, name, (line, color) in zip(row_list, names, cycle(product(LINES, COLORS))):
            fractions = [getattr(run, field) for run in row]  # {place: fraction}
            at = sorted({place for each in fractions for place in each})
            found = [mean_and_spread(each[place] for each in fractions if place in each) for place in at]
            axes.plot(at, [mean for mean, _ in found], color=color, linestyle=line,
                      marker='o' if len(at) <= 20 else None, markersize=3.5, label=name)
            axes.fill_between(at, [mean - spread for mean, spread in found], [mean + spread for mean, spread in found],
                              color=color, alpha=0.2, lw=0)
        axes.set(xlabel=x, ylabel='accuracy (%)', title=title)
        axes.grid(alpha=0.3)
        if field == 'epochs':
            axes.xaxis.get_major_locator().set_params(integer=True)
            anns = sorted({run.ann for run in runs if run.ann is not None})
            for number, ann in enumerate(anns):
                axes.axhline(100 * ann, color='0.5', linestyle=':', label='_' if number else 'ANN')
    legend = figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside lower center', frameon=False,
                           fontsize='small')
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold a $
    return figure


def draw_over_time_steps(anns: dict[str, list], spiking: dict[str, dict[int, list]]) -> 'Figure':
    """Test accuracy over T: a line for each kind of spiking network, with its spread over seeds, the ANNs as levels.

    anns, spiking: as of summary.kinds().
    """
    def accuracy(row):
        mean, spread = mean_and_spread(run.accuracy for run in row)
        return mean, spread if len(row) > 1 else math.nan

    figure = new_figure(6.4, 4)
    axes = figure.subplots()
    for (name, at), color in zip(sorted(spiking.items()), cycle(COLORS)):
        steps = sorted(at)
        means, spreads = zip(*(accuracy(at[step]) for step in steps))
        several = any(len(at[step]) > 1 for step in steps)  # one run has no spread
        axes.errorbar(steps, means, spreads if several else None, color=color, marker='o', markersize=4, capsize=3,
                      label=drawable(name))
    for (name, row), line in zip(sorted(anns.items()), cycle(LINES[1:])):
        axes.axhline(accuracy(row)[0], color='0.4', linestyle=line, label=drawable(name))
    steps = sorted({step for at in spiking.values() for step in at})
    axes.set_xscale('log', base=2)
    axes.set_xticks(steps, list(map(str, steps)))
    axes.minorticks_off()
    axes.set(xlabel='time steps T', ylabel='test accuracy (%)')
    axes.grid(alpha=0.3)
    for text in axes.legend(frameon=False, fontsize='small').get_texts():
        text.set_parse_math(False)
    return figure
