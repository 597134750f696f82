"""What a spiking network did on the test images, as figures and as one JSON with every number in them.

connections.py finds which layers are connected, count.py counts spikes and operations, numbers.py makes the JSON, and
plots.py draws the figures from the JSON alone.
"""
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

from experiment import UserError, files, log, setup
from experiment.data import Data
from experiment.reporting import count, figures, numbers, plots
from experiment.run import Run
from self_models.spiking_network import SpikingNetwork


class Known(NamedTuple):
    """What is known of a network already.

    at, accuracy: time steps and the test accuracies (fractions) after them. ann_accuracy: the ANN's, or None.
    conversion: what the conversion measured, {} if there was none. checkpoint: the file that the network is
    from, or None for one that was just converted or not trained. history, later: as of numbers.training_rows().
    """
    at: list[int]
    accuracy: list[float]
    ann_accuracy: float | None
    conversion: dict
    checkpoint: Path | str | None
    history: list | None = None
    later: list | None = None


def check(folder: str, model: SpikingNetwork) -> None:
    """Raise UserError, before the evaluation, if the report could not be written."""
    figures.check('--report')
    if silent := setup.too_few_steps(model):
        raise UserError(f'--report: {silent}')
    files.check_writable(Path(folder))


def write(model: SpikingNetwork, data: Data, run: Run, known: Known) -> None:
    """Measure the network on the test images and write the figures and report.json into the folder of --report.

    Raises UserError.
    """
    args, folder = run.args, Path(run.args.report)
    folder.mkdir(parents=True, exist_ok=True)  # a folder of the run's own name may have been set aside
    layers, connections = count.measure(model, data, run.device, args)
    training, line = numbers.training_rows(known.checkpoint, known.history, known.later)
    report = {
        'command': log.command(), 'checkpoint': known.checkpoint and str(known.checkpoint),
        'arguments': log.arguments(args), 'test_images': len(data.test), 'timesteps': model.timesteps,
        'leak': model.leak, 'leaks': model.leaks.tolist(), 'depth': model.depth, 'latency': model.output_delay,
        'delay': model.delay, 'encoding': model.encoding, 'initial_potential': model.initial_potential,
        'conversion': known.conversion,
        'accuracy': {'time_steps': known.at, 'accuracy': known.accuracy, 'ann': known.ann_accuracy},
        **numbers.summary(model, layers, connections, len(data.test)), 'training': training,
        # a network from scratch has no bounds
        'in_units_of_bounds': bool(args.pretrained_ann or args.pretrained_snn) and numbers.in_units_of_bounds(model)}
    drawn = {'accuracy': plots.draw_accuracy(report), 'activity': plots.draw_activity(report),
             'surrogate': plots.draw_surrogate(report), 'operations': plots.draw_operations(report)}
    if training:
        drawn['training'] = plots.draw_training(training)
    else:
        (folder / 'training.png').unlink(missing_ok=True)  # a former report's
    report['figures'] = [f'{name}.png' for name in drawn]
    for name, figure in drawn.items():
        files.write_atomically(folder / f'{name}.png', partial(figure.savefig, format='png', dpi=150))
    text = json.dumps(report, indent=1)
    files.write_atomically(folder / 'report.json', lambda file: file.write(text.encode()))
    total, energy = report['operations']['total'], report['operations']['energy_uj']
    more = ''.join(f', {total[key]:.4g} {what}' for key, what in (
        ('macs', 'MACs'), ('bias_additions', 'additions of biases')) if total[key])
    run.say(line)
    run.say(f'report: {folder / "report.json"}, {", ".join(report["figures"])}; an image takes '
            f'{total["synaptic_operations"]:.4g} synaptic operations{more}, '
            f'{energy["snn_exact"]:.4g} uJ, the ANN {total["ann_macs"]:.4g} MACs, {energy["ann"]:.4g} uJ')
