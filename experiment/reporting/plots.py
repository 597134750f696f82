"""The figures of a report, each drawn from the report's numbers alone. It needs no torch."""
import math
import re

from experiment.reporting import figures
from self_models.surrogate import FLAGS

SNN, SNN_LIGHT, ANN, GREY = '#1f5fa8', '#8fb8de', '#c8553d', '#e6e6e6'


def draw_accuracy(report: dict) -> 'figures.Figure':
    figure, numbers = figures.new_figure(6.4, 4), report['accuracy']
    axes = figure.subplots()
    few = len(numbers['time_steps']) <= 30
    axes.plot(numbers['time_steps'], [100 * value for value in numbers['accuracy']], color=SNN,
              marker='o' if few else None, markersize=4, clip_on=False, label='SNN')
    if numbers['ann'] is not None:
        axes.axhline(100 * numbers['ann'], color=ANN, linestyle='--', label='ANN')
    if report['latency']:
        axes.axvspan(0, report['latency'], color=GREY, linewidth=0, label='nothing of the images is at the output yet')
    axes.set(xlabel='time steps', ylabel='test accuracy (%)', xlim=(0, report['timesteps']), ylim=(0, 102),
             title=f'Accuracy over time, {report["test_images"]} test images')
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=3, frameon=False, fontsize='small')
    return figure


def draw_activity(report: dict) -> 'figures.Figure':
    layers = report['layers']
    figure = figures.new_figure(11, 1.8 + 0.28 * len(layers))
    rate_axes, count_axes, threshold_axes = figure.subplots(1, 3, sharey=True, width_ratios=[2, 1, 1])
    direct = layers[0]['firing_rate_by_step'] is None
    rates = [[math.nan] * layer['first_step'] + (layer['firing_rate_by_step'] or []) for layer in layers]
    rates = [row + [math.nan] * (report['timesteps'] - len(row)) for row in rates]
    names, places = [layer['name'] for layer in layers], range(len(layers))
    rate_axes.set_facecolor(GREY)
    image = rate_axes.imshow(rates, aspect='auto', cmap='viridis', vmin=0, interpolation='none')
    figure.colorbar(image, ax=rate_axes)
    grey = (['the input is no spikes'] if direct else []) + (
        ['silent, or too late for the output'] if layers[0]['steps'] < report['timesteps'] else [])
    rate_axes.xaxis.get_major_locator().set_params(integer=True)
    rate_axes.set(xlabel='time step' + (f' (grey: {"; ".join(grey)})' if grey else ''),
                  title='Firing rate (spikes per neuron and step)')
    rate_axes.set_yticks(places, names, fontsize='small', parse_math=False)  # a name may hold a $
    count_axes.barh(places, [math.nan if layer['spikes_per_neuron'] is None else layer['spikes_per_neuron']
                             for layer in layers], color=SNN)
    steps = ' to '.join(map(str, sorted({min(counted := [layer['steps'] for layer in layers]), max(counted)})))
    count_axes.set(xlabel=f'spikes per neuron and image\n{steps} steps of T = {report["timesteps"]}',
                   title='Spikes')
    threshold_axes.barh(places, [layer['threshold'] or math.nan for layer in layers], color=SNN_LIGHT)
    of_channels = '\n(in units of the bounds of channels)' if report.get('in_units_of_bounds') else ''
    threshold_axes.set(xlabel=f'membrane potential θ{of_channels}', title='Threshold')
    for axes in (count_axes, threshold_axes):
        axes.grid(axis='x', alpha=0.3)
    return figure


def draw_surrogate(report: dict) -> 'figures.Figure':
    numbers = report['surrogate']
    shares = [100 * count / numbers['total'] for count in numbers['count']]
    figure = figures.new_figure(8, 5.5)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.4])
    formula = numbers['formula'].removesuffix(', z = u/theta - 1').replace('delta_t', 'Δt')
    for flag in FLAGS.keys() & numbers.keys():
        formula = re.sub(rf'\b{flag}\b', f'{numbers[flag]:g}', formula)
    top.set(title=f'{numbers["activation"]}: {formula}')
    if 'delta_t' in numbers:
        # a neuron is looked at in T - L steps: of one there is no delta_t, and a single one makes no line
        top.plot(numbers['delta_t'], numbers['gradient'], color=ANN, marker='o' if len(shares) == 1 else None)
        bottom.xaxis.get_major_locator().set_params(integer=True)
        bottom.set_xlim(0, max(2, len(shares) + 1))
        bottom.bar(numbers['delta_t'], shares, width=1, color=SNN)
        bottom.set(xlabel='Δt, time steps since the last earlier spike')
        apart = (f'not drawn: never fired before, {numbers["never_share"]:.1%}\n'
                 f'(gradient {numbers["never_largest_gradient"]:.1e} or less)')
    else:
        edges = numbers['z_edges']
        bottom.set_xlim(edges[0], edges[-1])
        top.plot(edges, numbers['gradient_at_edges'], color=ANN)
        bottom.bar(edges[:-1], shares, width=edges[1] - edges[0], align='edge', color=SNN)
        bottom.set(xlabel='z = u/θ - 1')
        apart = (f'not drawn: below {edges[0]:g}, {numbers["below"] / numbers["total"]:.1%};\n'
                 f'above {edges[-1]:g}, {numbers["above"] / numbers["total"]:.1%}')
    top.set(ylabel='surrogate gradient')
    top.margins(y=0.1)
    top.set_ylim(bottom=0)
    # a logarithmic axis has no place for zeros alone, as of a network that never fires
    bottom.set(ylabel='share of neurons × steps (%)', yscale='log' if any(shares) else 'linear')
    bottom.set_ylim(bottom=None if any(shares) else 0)
    bottom.text(0.98, 0.95, apart, transform=bottom.transAxes, ha='right', va='top', fontsize='small',
                bbox={'facecolor': 'white', 'edgecolor': '0.8'})
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    return figure


def draw_operations(report: dict) -> 'figures.Figure':
    numbers = report['operations']
    rows, energy = numbers['connections'], numbers['energy_uj']
    figure = figures.new_figure(11, 2.5 + 0.45 * len(rows))
    axes, energy_axes = figure.subplots(1, 2, width_ratios=[2.2, 1])
    what = 'SNN: ACs and MACs' if numbers['total']['macs'] > 0 else 'SNN: ACs'

    def snn(*keys):
        return [sum(row[key] for key in (*keys, 'bias_additions')) for row in rows]

    series = [('ANN: MACs', ANN, [row['ann_macs'] + row['ann_additions'] for row in rows], energy['ann']),
              (f'{what}, exact', SNN, snn('synaptic_operations', 'macs'), energy['snn_exact']),
              (f'{what}, rate × FLOPs', SNN_LIGHT, snn('estimate', 'macs_with_padding'), energy['snn_estimate'])]
    for i, (label, color, values, _) in enumerate(series):
        axes.barh([place + 0.27 * (i - 1) for place in range(len(rows))], values, height=0.27, color=color, label=label)
    axes.set_yticks(range(len(rows)), [f'{row["name"]} ({row["kind"]})' for row in rows], fontsize='small',
                    parse_math=False)
    axes.invert_yaxis()
    smallest = min([value for *_, values, _ in series for value in values if value > 0], default=1)
    axes.set(xscale='log', xlim=(smallest / 2, None), xlabel='operations of an image',
             title='Operations of each connection')
    axes.margins(y=0.02)
    figure.legend(*axes.get_legend_handles_labels(), fontsize='small', loc='outside upper center', ncols=3,
                  frameon=False)
    bars = energy_axes.bar([label.replace(': ', ':\n').replace(', ', ',\n') for label, *_ in series],
                           [value for *_, value in series], color=[color for _, color, *_ in series])
    energy_axes.bar_label(bars, fmt='%.4g', padding=2)
    energy_axes.set(ylabel='µJ an image',
                    title=f'Energy\n{numbers["pj_per_mac"]} pJ a MAC, {numbers["pj_per_ac"]} pJ an AC')
    energy_axes.margins(y=0.12)
    energy_axes.tick_params(axis='x', labelsize='small')
    for each, direction in ((axes, 'x'), (energy_axes, 'y')):
        each.grid(axis=direction, alpha=0.3)
        each.set_axisbelow(True)
    figure.supxlabel(
        'Exact: each spike counts as many ACs as its neuron has connections; rate × FLOPs takes a spike before a 2×2 '
        'pool for a quarter of one.\nSynapses only, without memory and neurons. '
        f'Energy: {numbers["energy_source"]}.', fontsize='x-small', x=0.01, ha='left')
    return figure


def draw_training(rows: list[dict]) -> 'figures.Figure':
    figure = figures.new_figure(10, 3.8)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for axes, what, scale in ((loss_axes, 'loss', 1), (accuracy_axes, 'accuracy', 100)):
        for part, color in (('train', SNN_LIGHT), ('validation', '#4a4a4a'), ('test', SNN)):
            points = [(row['epoch'], scale * row[f'{part}_{what}']) for row in rows if f'{part}_{what}' in row]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, marker='o', markersize=3, label=part)
        axes.set(xlabel='epoch', ylabel='cross-entropy' if what == 'loss' else 'accuracy (%)', title=what.capitalize())
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    return figure
