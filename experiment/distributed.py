"""Several processes that train one network together, as torchrun starts them: one for each GPU, or on CPUs.

Without torchrun there is one process, and nothing here has an effect. Each process has the whole network and a part of
every batch; torch's DistributedDataParallel averages the gradients.
"""
import contextlib
import datetime
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from experiment import UserError, options

wanted = options.several_processes


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ.get('LOCAL_RANK', 0))


def start(device: torch.device) -> None:
    """Meet the other processes: by nccl on CUDA, by gloo on CPUs."""
    # Python's handlers run when torch returns, which it does not while another process is missing
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    # the others wait while one balances thresholds, which can take hours
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=datetime.timedelta(days=2))
    dist.barrier()  # else torch logs an error if a process ends before another gets here
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stop() -> None:
    """End this process with status 0 if it is one of several, once all are at the end of their run.

    Without Python's shutdown, in which torch 2.14 aborts now and then (1 of 16 runs), as a thread of gloo is still
    running: the run would count as failed.
    """
    if _started():
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _started():
    return dist.is_available() and dist.is_initialized()


def cause_of(error: RuntimeError) -> str:
    """Why processes cannot reach each other, in one line, of an error of torch.distributed's; '' for others."""
    text = str(error) if isinstance(error, dist.DistError) else ''
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [lines.index(line) + 1 for line in lines[:-1] if line == 'Last error:']  # NCCL's own words come after it
    return f' ({lines[told[0]] if told else lines[0]})' if lines else ''


def is_of_an_ended_process(error: RuntimeError) -> bool:
    """Whether a RuntimeError says that another process has ended, so that this one cannot continue."""
    return isinstance(error, dist.DistError) or any(
        words in str(error) for words in ('closed by peer', 'reset by peer', 'Broken pipe', 'gloo/transport'))


class Process(NamedTuple):
    """rank: the number of a process among all that train together, from 0. world_size: how many these are."""
    rank: int = 0
    world_size: int = 1


ALONE = Process()


def process() -> Process:
    """Which of the processes this is."""
    return Process(dist.get_rank(), dist.get_world_size()) if _started() else ALONE


def is_main() -> bool:
    """Whether this is the process that writes logs and files."""
    return process().rank == 0


def total(values: list[float], device: torch.device) -> list[float]:
    """The sums over all processes of a list of numbers, a list of floats."""
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    if _started():
        dist.all_reduce(sums)
    return sums.tolist()


def from_main(function: Callable) -> Any:
    """function() runs on the main process; all processes get its result, or the UserError that it raises."""
    outcome = [None, None]  # the result, the error
    if is_main():
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = error
    if _started():
        dist.broadcast_object_list(outcome, 0)
    result, error = outcome
    if error:
        raise error
    return result


def share(tensors: Iterable[torch.Tensor]) -> None:
    """Give every process the values that these tensors have in the main process."""
    if _started():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block first, so the others find what it downloads."""
    if _started() and not is_main():
        dist.barrier()
    yield
    if _started() and is_main():
        dist.barrier()


def synchronises(device: torch.device) -> bool:
    """Whether batch norm takes its statistics over all processes, which torch's does on CUDA only."""
    return device.type == 'cuda'


def learner(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model to train: among several processes, wrapped so that gradients are averaged over them.

    On CUDA its batch norms are replaced by SyncBatchNorm, with the same names.
    """
    if not _started():
        return model
    if synchronises(device):
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[device.index] if device.type == 'cuda' else None)
