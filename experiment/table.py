"""The results of snn.py: accuracy over time before training, and the table of accuracies at the end."""
import contextlib
from pathlib import Path

from torch.optim import Optimizer

from experiment import UserError, checkpoint, distributed, engine
from experiment.data import Data
from experiment.reporting import report
from experiment.run import Run
from experiment.start import Progress, Start
from self_models.spiking_network import SpikingNetwork

# what a conversion may measure
MEASURED = ('ann_accuracy', 'ann_accuracy_on', 'scaling_factor', 'scanned_on', 'scan', 'output_scale')
WHAT = {'ann': 'converted', 'snn': 'loaded', 'resume': 'loaded', 'scratch': 'untrained'}


class Results:
    """The accuracies of a run, a line each, on the set on which epochs are compared; on the test set if it only tests.

    found: what the conversion measured. progress gets epoch 0.
    """

    def __init__(self, start: Start, found: dict, progress: Progress, data: Data, run: Run):
        self.start, self.found, self.progress, self.data, self.run = start, found, progress, data, run
        self.chosen_on = 'test' if run.args.test_only else data.selection
        self.lines = [('ANN', found['ann_accuracy'])] if found else []
        self.curve = None
        begun = progress.history[0] if progress.history else {}
        if begun.get('epoch') == 0 and not run.args.test_only:  # a resumed run also shows what it began with
            self.found = {key: begun[key] for key in MEASURED if key in begun}
            what = WHAT['ann' if 'ann_accuracy' in begun or run.args.pretrained_ann else 'snn']
            accuracies = {'ANN': begun.get('ann_accuracy'), f'{what} SNN': begun.get(f'{self.chosen_on}_accuracy')}
            self.lines = [(what, accuracy) for what, accuracy in accuracies.items() if accuracy is not None]

    def time_steps(self, points: int) -> list[int]:
        return sorted({max(1, self.run.args.timesteps * i // points) for i in range(1, points + 1)})

    def test_start(self, model: SpikingNetwork, optimizer: Optimizer | None) -> None:
        """Test the network before training. If it is trained then, this is epoch 0."""
        run, what, at = self.run, WHAT[self.start.kind], self.time_steps(100)
        # the curve takes no more time than a test: logits after t steps are W times the spikes so far
        tested, self.curve = engine.test_over_time(model, getattr(self.data, self.chosen_on), run.loss_function,
                                                   run.device, run.args, run.test_say, at)
        engine.check_finite(tested.loss, 'in the test', model, trains=False)
        self.lines.append((f'{what} SNN', tested.accuracy))
        run.say(f'{what} SNN: {self.chosen_on} accuracy {tested.accuracy:.2%} at T = {run.args.timesteps}, loss '
                f'{tested.loss:.4f}')
        run.say(f'{self.chosen_on} accuracy after time steps: ' + ', '.join(
            f'{t}: {value:.2%}' for t, value in zip(at, self.curve) if t in self.time_steps(10)))
        if lost := self.lost_by_conversion(model, tested.accuracy):
            run.say(lost)
        if not run.args.test_only:
            self.progress.history.append({
                'epoch': 0, f'{self.chosen_on}_loss': tested.loss, f'{self.chosen_on}_accuracy': tested.accuracy,
                **self.found, 'curve': dict(zip(map(str, at), self.curve))})
            engine.save(model, optimizer, run, self.progress, tested.accuracy)

    def lost_by_conversion(self, model: SpikingNetwork, accuracy: float) -> str | None:
        """A line on what the conversion lost and why, if that is more than a point of the ANN's accuracy, else None."""
        lost = self.found.get('ann_accuracy', 0) - accuracy
        if lost <= 0.01:
            return None
        steps, args, why, remedies = self.run.args.timesteps, self.run.args, [], []
        if model.balanced < len(model.layer_names):
            why.append('the thresholds of the residual blocks are not balanced, as published')
            remedies.append('--balance_blocks')
        if self.curve[-1] > self.curve[len(self.curve) * 9 // 10 - 1] or steps <= 16:
            why.append(f'{steps} time steps tell few rates apart')
            remedies.append('more --timesteps')
        if model.output_delay > steps / 20:
            why.append(f'the delays of {model.depth} layers take {model.output_delay} of the {steps} steps')
            remedies.append('--delay 0')
        if args.scaling_factor not in (None, 'auto'):
            why.append(f'at a scaling factor of {args.scaling_factor} neurons may be slow to fire, or saturate')
            remedies.append('--scaling_factor auto')
        return (f'the conversion loses {100 * lost:.1f} points of the ANN: {"; ".join(why) or "its rates are coarse"}. '
                f'Fine-tuning recovers most of it; so may {" or ".join(remedies) or "more --timesteps"}')

    def say_table(self) -> None:
        args, lines = self.run.args, list(self.lines)
        if not args.test_only:
            accuracy, epoch = self.progress.best
            lines.append((f'SNN, best epoch ({epoch})', accuracy))
        self.run.say('\n'.join(['', f'{"":<24}{f"{self.chosen_on} accuracy":>20}{"time steps":>12}', *(
            f'{what:<24}{accuracy:>20.2%}{"-" if what == "ANN" else args.timesteps:>12}' for what, accuracy in lines)]))
        if not args.test_only:
            self.run.say(f'saved in {self.run.paths.best}')

    def report(self, model: SpikingNetwork) -> None:
        """Write --report of the network tested, or of the best epoch."""
        run, tested, history, later = self.run, None, None, None
        if not run.args.test_only:
            tested = run.paths.folded if run.args.keep_batch_norm else run.paths.best
            history = self.progress.history
            _, self.curve = engine.test_over_time(model, self.data.test, run.loss_function, run.device, run.args, None,
                                                  self.time_steps(100))
        elif self.start.kind in ('snn', 'resume'):
            tested, history = self.start.path, self.start.state.get('history')
            path = Path(tested)
            with contextlib.suppress(UserError):  # the history of a best epoch's checkpoint ends at that epoch
                last = checkpoint.load_training(path.with_name(f'{path.stem.removesuffix(".folded")}.last.pth'), 'snn')
                later = last['history'] if last['best'][1] == self.start.state.get('epoch') else None
        ann_accuracy = dict(self.lines).get('ANN') if self.chosen_on == 'test' else None
        if distributed.is_main():
            report.write(model, self.data, run, report.Known(self.time_steps(100), self.curve, ann_accuracy, self.found,
                                                             tested, history, later))
