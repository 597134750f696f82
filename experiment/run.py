"""What a run is given: its arguments, device, files and log."""
from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from experiment import engine, log, setup, trained_on
from experiment.data import Data
from experiment.files import Paths
from experiment.reporting import metrics
from experiment.start import Start


class Run(NamedTuple):
    """args: settled, see start.py. say: prints a line to the log. board: gives TensorBoard's writer, or None.
    loss_function: as for engine.train_epoch. extra: what goes into checkpoints beside weights and numbers.
    """
    args: Namespace
    device: torch.device
    paths: Paths
    say: Callable
    board: Callable | None
    loss_function: Callable
    extra: dict

    @property
    def test_say(self) -> Callable | None:
        """The function that says the accuracy after every test batch, or None without --test_acc_every_batch."""
        return self.say if getattr(self.args, 'test_acc_every_batch', False) else None

    def test(self, model: torch.nn.Module, dataset: Dataset) -> engine.Metrics:
        """engine.test of a model on a whole set."""
        return engine.test(model, dataset, self.loss_function, self.device, self.args, self.test_say)


def open_run(kind: str, args: Namespace, start: Start, data: Data, model: torch.nn.Module,
             device: torch.device, loss_function: Callable) -> Run:
    """Open the log and, with --tensorboard, TensorBoard; say what run this is. kind: 'ann' or 'snn'.

    Raises UserError if a run would be resumed with other images.
    """
    # before a log is touched
    others = trained_on.check_classes(
        data, start.state, start.path, start.resumed and not args.test_only) if start.state else []
    board = None if args.test_only else metrics.open_board(start.paths.events, args.tensorboard)
    say = log.open_log(kind, start.paths.best.stem, args.log)
    say(log.header(args, model, device))
    notes = [*setup.notes(args, device, model), *start.said, *getattr(model, 'notes', ()), *data.notes, *others]
    if start.state and not start.resumed and not (args.test_only and kind == 'ann'):
        notes += trained_on.notes(args, data, start.state, start.path)
    for note in notes:
        say(note)
    extra = {'classes': data.classes, 'trained_on': trained_on.all_trainings(args, data, start.state)}
    return Run(args, device, start.paths, say, board, loss_function, extra)
