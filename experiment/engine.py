"""The loops over batches and epochs that ann.py and snn.py share."""
import math
import random
import time
from argparse import Namespace
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from experiment import UserError, checkpoint, distributed, files, log
from experiment.data import NO_IMAGE, Data, epoch_loader
from experiment.reporting import metrics
from self_models.qcfs import QCFS
from self_models.spiking_network import SpikingNetwork

if TYPE_CHECKING:  # these import this module
    from experiment.run import Run
    from experiment.start import Progress


class Metrics(NamedTuple):
    """Means over the samples of a pass."""
    loss: float
    accuracy: float  # a fraction


def seed_for(seed: int, epoch: int, rank: int = 0) -> int:
    """A seed of its own for each epoch (0: evaluation), so that a resumed run draws what an unbroken one would.

    rank: of one of several processes, whose draws should differ.
    """
    return int(np.random.SeedSequence((seed, epoch, *([rank] if rank else []))).generate_state(1)[0])


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)  # of the CPU and of every CUDA device
    np.random.seed(seed % 2 ** 32)  # the code of your own network may draw from these two
    random.seed(seed)


WARM_UP = 0.03  # of a cosine schedule's run, in which the rate rises from 0


def learning_rate_at(epoch: int, args: Namespace, part: float = 0.0) -> float:
    """The learning rate in an epoch (1, 2, ...), of which a part (0 to 1) is done.

    --lr_schedule step: divided by lr_reduce on reaching each lr_interval * epochs. The first epoch always has the full
    rate, also in a run too short for the intervals. cosine: down to 0 over the run, after a linear warm-up.
    """
    if args.lr_schedule == 'cosine':
        done = (epoch - 1 + part) / args.epochs
        if done < WARM_UP:
            return args.learning_rate * (done + 1e-3) / (WARM_UP + 1e-3)
        return args.learning_rate * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2
    rate = args.learning_rate
    # as decimals: the float 0.29 is a little less than 0.29, and times 100 less than 29
    for milestone in {int(Fraction(part) * args.epochs) for part in args.lr_interval.split()}:
        if 1 < milestone <= epoch:
            rate /= args.lr_reduce
    return rate


def make_optimizer(model: nn.Module, args: Namespace) -> Optimizer:
    """SGD or Adam as the flags say; fused, as an unfused step takes as long as a small network's gradient.

    Thresholds, leaks and bounds of QCFS take no weight decay.
    """
    free = checkpoint.neuron_keys(model)  # weights of the user's own network may have such names, too
    free |= {f'{name}.bound' for name, module in model.named_modules() if isinstance(module, QCFS)}
    free = [p for name, p in model.named_parameters() if name in free]
    groups = [{'params': [p for p in model.parameters() if all(p is not other for other in free)]}]
    groups += [{'params': free, 'weight_decay': 0.0}] if free else []
    common = dict(lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    if args.optimizer == 'SGD':
        optimizer = torch.optim.SGD(groups, momentum=args.momentum, **common)
        optimizer.register_step_pre_hook(add_momentum)
        return optimizer
    return torch.optim.Adam(groups, amsgrad=args.amsgrad, **common)


def add_momentum(optimizer: Optimizer, *_) -> None:
    """Give weights that have a gradient for the first time a momentum of 0. torch's fused step knows that of all or of
    none, but the code of your own network may leave weights out of some steps."""
    for group in optimizer.param_groups:
        for p in group['params']:
            if group['momentum'] and p.grad is not None and optimizer.state[p].get('momentum_buffer') is None:
                optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)


def autocast(device: torch.device, amp: bool) -> torch.autocast:
    """The context of a forward pass: if `amp`, convolutions and matrix products run in bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp)


def cross_entropy(logits: Tensor, labels: Tensor, scale: float = 1.0, smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of logits / scale (B, labels), summed over the samples; labels (B,).

    smoothing: a part of each label, in [0, 1), that is spread evenly over all labels (Szegedy et al., 2016).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a sum is too much for bfloat16
    return F.cross_entropy(logits / scale, labels, reduction='sum', label_smoothing=smoothing)


class Along(NamedTuple):
    """What train_epoch does besides training.

    say: prints a line about the training so far after every so many batches (every). rate: the learning rate of the
    next step, as a function of the part of the epoch that is done.
    """
    say: Callable | None = None
    every: int | None = None
    rate: Callable | None = None


def check_finite(loss: float, where: str, model: nn.Module, trains: bool = True) -> None:
    """Raise UserError if a loss or a model's weights are not finite; the message names the first such weights."""
    wrong = next((name.removesuffix('.weight') for name, weight in model.named_parameters()
                  if not weight.isfinite().all()), None)
    said = [] if math.isfinite(loss) else [f'the loss became {loss}']
    said += [f'the weights of {wrong} left the finite range'] if wrong else []
    if said:
        remedy = 'lower --learning_rate' + (
            ', or the surrogate gradient with --alpha or --gamma, or raise the thresholds'
            if isinstance(model, SpikingNetwork) else '')
        if not trains:
            remedy = 'use another copy of the checkpoint, or train it anew'
        raise UserError(f'{where} {", as ".join(said)}: {remedy}')


class Meter:
    """Loss and accuracy of a training pass so far.

    A batch's numbers are read when the next one is on its way, so that the host does not wait for a GPU within a step.
    """

    def __init__(self, model: nn.Module, along: Along):
        self.model, self.along, self.waiting = model, along, None
        self.loss, self.correct, self.seen = 0.0, 0, 0

    def add(self, number: int, labels: Tensor, logits: Tensor, loss: Tensor) -> None:
        """Take up a batch (its number from 1, what it gave), and read the one before. Raises UserError."""
        hits, size = (logits.detach().argmax(1) == labels).sum(), (labels != NO_IMAGE).sum()
        numbers = torch.stack([loss, hits.to(loss.dtype), size.to(loss.dtype)]).to('cpu', non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if loss.is_cuda else None
        self.read()
        self.waiting = number, numbers, copied

    def read(self) -> None:
        """Read the batch that is waiting, if one is. Raises UserError for a loss that is not finite."""
        if not self.waiting:
            return
        (number, numbers, copied), self.waiting = self.waiting, None
        if copied:  # and what the GPU has been given since is not waited for
            copied.synchronize()
        loss, hits, size = numbers.tolist()
        if not math.isfinite(loss):
            check_finite(loss, f'at batch {number}', self.model)
        self.loss, self.correct, self.seen = self.loss + loss, self.correct + int(hits), self.seen + int(size)
        if self.seen and self.along.every and number % self.along.every == 0:
            self.along.say(f'  batch {number}: train loss {self.loss / self.seen:.4f}, train accuracy '
                           f'{self.correct / self.seen:.2%}')

    def __str__(self):
        return f'loss {self.loss / self.seen:.4f}, accuracy {self.correct / self.seen:.2%}' if self.seen else ''

    def metrics(self, device: torch.device) -> Metrics:
        """The Metrics of all processes."""
        self.read()
        loss, correct, seen = distributed.total([self.loss, self.correct, self.seen], device)
        return Metrics(loss / seen, correct / seen)


def train_epoch(model: nn.Module, loader: DataLoader, optimizer: Optimizer, loss_function: Callable,
                device: torch.device, amp: bool = False, along: Along | None = None) -> Metrics:
    """One pass over a loader with an optimizer step a batch; returns its Metrics.

    loss_function: (logits (B, labels), labels (B,)) -> the sum of the samples' losses. amp: whether in bfloat16. along:
    an Along, or None.
    Among several processes the loader yields this one's part of each batch; the Metrics are of all.
    Raises UserError at the first loss that is not finite; the step that it would lead to is not taken.
    """
    model.train()
    world_size, along = distributed.process().world_size, along or Along()
    constrained = [module for module in model.modules() if hasattr(module, 'constrain')]
    meter = Meter(model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model, along)
    bar = tqdm(loader, desc='train', leave=False, disable=None if distributed.is_main() else True)
    for number, (images, labels) in enumerate(bar, 1):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        optimizer.zero_grad()
        if along.rate:
            for group in optimizer.param_groups:
                group['lr'] = along.rate((number - 1) / len(loader))
        with autocast(device, amp):
            logits = model(images)
            loss = loss_function(logits, labels)
        # the mean over the whole batch; gradients are averaged over the processes, so times their number
        (loss * (world_size / loader.sizes[number - 1])).backward()
        loss = loss.detach()
        if optimizer.defaults.get('fused'):
            # Such a step heeds this without a wait for the GPU: the weights stay as they were when it went wrong.
            optimizer.found_inf = (~loss.isfinite()).float()
        optimizer.step()
        for module in constrained:  # thresholds and bounds above 0, leaks in (0, 1]
            module.constrain()
        meter.add(number, labels, logits, loss)
        bar.set_postfix_str(str(meter), refresh=False)
    return meter.metrics(device)


def test(model: nn.Module, dataset: Dataset, loss_function: Callable, device: torch.device, args: Namespace,
         say: Callable | None = None) -> Metrics:
    """The Metrics on a whole set, always with the same random draws: a checkpoint gives its accuracy again."""
    return test_over_time(model, dataset, loss_function, device, args, say)[0]


@torch.no_grad()
def test_over_time(model: nn.Module, dataset: Dataset, loss_function: Callable, device: torch.device,
                   args: Namespace, say: Callable | None = None,
                   at: list[int] | None = None) -> tuple[Metrics, list[float]]:
    """test(), and with it the accuracies of a spiking network after each of `at` time steps.

    loss_function: as for train_epoch. say: prints the accuracy after every batch. at: time steps in ascending order, of
    which the last gives the Metrics; None for all of them at once.
    """
    process = distributed.process()
    seed_all(seed_for(args.seed, 0, process.rank))
    loader = epoch_loader(dataset, args.batch_size, args.num_workers, pin_memory=device.type == 'cuda', process=process)
    model.eval()
    total_loss, correct, seen = 0.0, torch.zeros(len(at or [0]), dtype=torch.int64), 0
    bar = tqdm(loader, desc='test', leave=False, disable=None if distributed.is_main() else True)
    for number, (images, labels) in enumerate(bar, 1):
        seen += (labels != NO_IMAGE).sum().item()
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast(device, args.amp):
            outputs = model.curve(images, at) if at else model(images)[None]  # (len(at), B, labels)
            total_loss += loss_function(outputs[-1], labels).item()
        correct += (outputs.argmax(2) == labels).sum(1).cpu()
        accuracy = correct[-1].item() / max(1, seen)
        bar.set_postfix_str(f'accuracy {accuracy:.2%}', refresh=False)
        if say:
            say(f'  test batch {number}: accuracy {accuracy:.2%} of {seen} images')
    total_loss, seen, *correct = distributed.total([total_loss, seen, *correct.tolist()], device)
    accuracies = [count / seen for count in correct]
    return Metrics(total_loss / seen, accuracies[-1]), accuracies


def least_progress(classes: int) -> float:
    """The accuracy below which a network has learned nothing: for ten classes 0.15, as published."""
    return min(0.15, 1.5 / classes)


def train(model: nn.Module, optimizer: Optimizer, data: Data, run: 'Run', progress: 'Progress',
          chance_epochs: int) -> None:
    """Train from epoch progress.done + 1 to args.epochs; leaves the model at its best epoch, progress.best.

    Epochs are compared on the validation set if there is one; the best epoch is then tested at the end.
    run: run.Run. progress: start.Progress, which is updated. chance_epochs: for so many epochs the accuracy may be
    near chance; after one more, the run stops with a UserError.
    """
    args, chosen_on, trained_as = run.args, data.selection, None
    if progress.done >= args.epochs:
        enough = f'{progress.done} epochs are done already; for more, raise --epochs'
        if progress.fresh:  # no epoch would be this run's
            raise UserError(enough)
        run.say(enough)
        trained_as = progress.trained_as and {**progress.trained_as, 'epochs': progress.done}
    learner = distributed.learner(model, run.device)
    run.say(f'the best epoch is chosen on the {chosen_on} set'
            + (', as in the published code; --validation_fraction holds one out' if chosen_on == 'test' else ''))
    run.say(log.heading(chosen_on))
    for epoch in range(progress.done + 1, args.epochs + 1):
        start = time.perf_counter()
        entry = {'epoch': epoch, 'learning_rate': learning_rate_at(epoch, args),
                 **train_and_test(epoch, model, learner, optimizer, data, run)}
        accuracy = entry[f'{chosen_on}_accuracy']
        entry['best_accuracy'] = max(progress.best[0] if progress.best else -1.0, accuracy)
        entry['seconds'] = time.perf_counter() - start
        progress.history.append(entry)
        save(model, optimizer, run, progress, accuracy)
        run.say(log.epoch_line(entry))
        if run.board:
            metrics.to_board(run.board, entry)
        if epoch > chance_epochs and progress.best[0] < least_progress(len(data.classes)):
            raise UserError(f'training does not progress: the best accuracy after {epoch} epochs is '
                            f'{progress.best[0]:.2%}; change --learning_rate, and for an SNN --scaling_factor, --alpha '
                            'or --activation')
    finish(model, data, run, progress, trained_as)


def train_and_test(epoch: int, model: nn.Module, learner: nn.Module, optimizer: Optimizer, data: Data,
                   run: 'Run') -> dict[str, float]:
    """One epoch of a model, trained as `learner`, and its test; returns {train_loss, ...} for the history.

    Raises UserError if the loss or the weights are not finite, before the last checkpoint is replaced.
    """
    args, rank = run.args, distributed.process().rank
    along = Along(run.say, getattr(args, 'train_acc_batches', None), partial(learning_rate_at, epoch, args))
    seed_all(seed_for(args.seed, epoch, rank))
    loader = epoch_loader(data.train, args.batch_size, args.num_workers, seed_for(args.seed, epoch), shuffle=True,
                          pin_memory=run.device.type == 'cuda', process=distributed.process())
    trained = train_epoch(learner, loader, optimizer, partial(run.loss_function, smoothing=args.label_smoothing),
                          run.device, args.amp, along)
    # DistributedDataParallel shares batch norm's statistics before each step, so not those of the last one
    distributed.share(model.buffers())
    tested = run.test(model, getattr(data, data.selection))
    check_finite(tested.loss, f'after epoch {epoch}', model)
    return {'train_loss': trained.loss, 'train_accuracy': trained.accuracy,
            f'{data.selection}_loss': tested.loss, f'{data.selection}_accuracy': tested.accuracy}


def finish(model: nn.Module, data: Data, run: 'Run', progress: 'Progress', trained_as: dict | None = None) -> None:
    """Load the best epoch; test it if it was chosen on the validation set. Write the metrics if they are not complete.

    trained_as: the arguments that the metrics are to name, if not the run's.
    """
    if distributed.is_main():
        state = checkpoint.read(run.paths.best)
        load = checkpoint.load_snn if isinstance(model, SpikingNetwork) else checkpoint.load_weights
        load(model, state, run.paths.best)
    distributed.share(model.state_dict().values())
    if data.validation is not None:
        accuracy, epoch = progress.best
        tested = run.test(model, data.test)
        run.say(f'test accuracy {tested.accuracy:.2%} and loss {tested.loss:.4f} of epoch {epoch}, which had the best '
                f'validation accuracy, {accuracy:.2%}')
        for entry in progress.history:
            if entry['epoch'] == epoch:
                entry.update(test_loss=tested.loss, test_accuracy=tested.accuracy)
    # the metrics of a finished run stay as they are
    if distributed.is_main() and not metrics.holds(run.paths.metrics, progress.history):
        metrics.write(run.paths.metrics, run.args, progress.history, trained_as)


def save(model: nn.Module, optimizer: Optimizer, run: 'Run', progress: 'Progress', accuracy: float) -> None:
    """Record the last epoch of progress.history as done, at this accuracy. Write the checkpoint to resume from, then
    the checkpoint of the best epoch if this is the best, then the metrics.

    If a kill comes in between, a resumed run writes the rest from the first file. The files of an earlier run of this
    name are renamed only when the first two checkpoints are complete, so a full disk costs neither run its files. The
    history is in the checkpoints, too, so that a resumed run has all its metrics. Only the main process writes.
    """
    paths, epoch = run.paths, progress.history[-1]['epoch']
    improved = progress.best is None or accuracy > progress.best[0]
    if improved:
        progress.best = accuracy, epoch
    fresh, said = progress.fresh, []
    progress.done, progress.fresh = epoch, False
    if not distributed.is_main():
        return
    state = {'accuracy': accuracy, 'epoch': epoch, **run.extra, 'state_dict': model.state_dict(),
             **(checkpoint.snn_state(model) if isinstance(model, SpikingNetwork) else {}),
             'optimizer': optimizer.state_dict(), 'best': list(progress.best),
             'args': log.arguments(run.args), 'history': progress.history}
    if fresh:
        write = partial(torch.save, state)
        with files.replacing(paths.best, write), files.replacing(paths.last, write):  # the latter ends first
            # a folder of that name may hold something else, such as a report
            events = [paths.events] if any(paths.events.glob('events.out.tfevents*')) else []
            files.set_aside([*paths, paths.folded, *events], said.append)
    else:
        checkpoint.save(state, paths.last)
        if improved:
            checkpoint.copy(paths.last, paths.best)
    for line in said:
        run.say(line)
    metrics.write(paths.metrics, run.args, progress.history)


def load_optimizer(optimizer: Optimizer, state: dict, path: Path | str) -> None:
    """Restore the optimizer's state from the checkpoint `path`, with the settings of the flags. Raises UserError.

    state: of checkpoint.load_training().
    """
    settings = [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state['optimizer'])
        for weight, values in optimizer.state.items():
            for key, value in values.items():
                if key != 'step' and value is not None:
                    if not checkpoint.is_dense(value) or value.shape != weight.shape:
                        raise ValueError(key)
                    # in the layout of the weight, as fused optimizers require
                    values[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
    except Exception as error:  # load_state_dict raises many kinds of errors
        raise UserError(f'{path}: its optimizer state does not fit this network; start a new run from its weights with '
                        '--pretrained_ann or --pretrained_snn') from error
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
