"""Compare time and memory of a training step, an evaluation step and threshold balancing with other implementations.

    python benchmarks/compare.py                                        # on two cores, an hour
    python benchmarks/compare.py --rows VGG16:100:64 VGG16:4:128 --device cuda --amp --json gpu.json

A row is NET:T:batch; the NET `network` is examples/network.py with its batch norm. T of 8 or fewer means low latency:
direct input, no delay and an initial potential of half a threshold. With the same weights, thresholds and images of
CIFAR's shape it compares, if they are installed:

    ours                 self_models, STDB; ours_linear: with --activation Linear
    plain                spiking() of the ANN, Linear; of the row `network` compared with ann, spikingjelly and limit
    ann                  the ANN of the same layers; ann_qcfs: with QCFS and batch norm
    step_by_step         tests/step_by_step.py, the equations one time step after another, as the published code does
    spikingjelly         SpikingJelly, multi-step mode, with the kernels that it chooses; potentials in float32
    spikingjelly_memopt  the same with its memopt (level 1, bit-compressed spikes); in training only
    snntorch             snnTorch
    limit                the arithmetic of ours as large matrix products at the machine's rate, measured next to it

Each runs in its own process, in short runs by turns, with a run of ours next to every other one, so that a drift of the
machine affects all. Runs that other work disturbed are recognised and left out of the medians. The ratios are ours /
theirs: of the medians of wall seconds; the median over neighbouring runs; of the medians of CPU seconds; and of memory,
the peak above what the process held before its first step. The last column is the time in steps of the ANN, by
neighbouring runs. While timed, all keep freed memory, as ann.py and snn.py do.
"""
import argparse
import contextlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(ROOT / 'benchmarks')]

from self_models.architectures import ARCHITECTURES  # noqa: E402

IMPLEMENTATIONS = ('ours', 'ours_linear', 'ann', 'step_by_step', 'spikingjelly', 'spikingjelly_memopt', 'snntorch',
                   'limit')
PEERS = ('spikingjelly', 'spikingjelly_memopt', 'snntorch')
OF_EXAMPLE = ('plain', 'ann', 'spikingjelly', 'limit')  # of the row `network`
TRAINING_ONLY = ('ours_linear', 'spikingjelly_memopt')
BALANCE_IMPLEMENTATIONS = ('ours', 'forward')  # forward: an evaluation of ours on the same images and steps
BALANCE_SAMPLES, BALANCE_STEPS = 32, 200  # snn.py's defaults are 512 images and 1000 steps
FEW_STEPS = 8  # the most T of a low latency row
ANN_BATCH = 128  # of the ANNs whose shares of time are shown
RUN_SECONDS = 1.0  # a run is one step, or as many as fit into this time
ENOUGH = 3  # undisturbed runs for a median
TASKS = ('train', 'test', 'balance', 'shares', 'growth', 'kernels')


class Row(NamedTuple):
    architecture: str
    steps: int
    batch: int
    direct: bool  # low latency

    def __str__(self):
        return f'{self.architecture}, T = {self.steps}, B = {self.batch}'


def parse_row(text):
    architecture, *numbers = text.split(':')
    try:
        steps, batch = map(int, numbers)
    except ValueError:
        steps = batch = 0
    if architecture not in (*ARCHITECTURES, 'network') or steps < 1 or batch < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a network, its time steps and batch size, as VGG5:75:16')
    return Row(architecture, steps, batch, steps <= FEW_STEPS)


def get_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', nargs='+', type=parse_row, metavar='NET:T:B',
                        default=list(map(parse_row, ('VGG5:75:16', 'VGG16:50:8', 'VGG5:4:64', 'VGG16:4:32'))))
    parser.add_argument('--tasks', nargs='+', default=TASKS[:-1], choices=TASKS,
                        help='kernels: the scans over time alone, on CUDA in Triton beside plain torch; default all '
                             'others')
    parser.add_argument('--implementations', nargs='+', choices=(*IMPLEMENTATIONS, 'ann_qcfs', 'plain'),
                        help='default all but ann_qcfs and plain, of the row `network` plain, ann, spikingjelly, limit')
    parser.add_argument('--repeats', type=int, default=9, help='runs of each; default %(default)s')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast, for all')
    parser.add_argument('--plain_malloc', action='store_true',
                        help='the other libraries give freed memory back to the system, as they do by themselves')
    parser.add_argument('--json', metavar='FILE', help='write every number there')
    parser.add_argument('--worker', type=json.loads, help=argparse.SUPPRESS)  # [implementation, task, row]
    return parser.parse_args()


# --- in a worker process ----------------------------------------------------------------------------------------------

def work(args):
    """The worker: warm up, then a run for every line on stdin."""
    import machine
    import networks
    import torch

    from self_models.cpu import keep_memory
    name, task, row = args.worker
    torch.set_flush_denormal(True)
    device = torch.device(args.device)
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    job = networks.job(name, task, Row(*row), device, args.amp)
    parts, profiled = {}, contextlib.nullcontext()
    memory = machine.Memory(device)
    job.run()
    job.run()  # while the gradients of the first one are in memory
    print(json.dumps({'bytes': memory.peak()}), flush=True)
    if not (args.plain_malloc and name in PEERS):
        keep_memory()  # not before, as freed memory that is kept would count
    times = 1
    if task == 'shares':
        networks.name_scans()
    elif task != 'growth':
        times = math.ceil(RUN_SECONDS / machine.timed(job.run, 1, wait)['wall'])
    if device.type == 'cuda':
        torch.cuda.empty_cache()  # the others are on the same GPU
    print('ready', flush=True)
    for _ in sys.stdin:
        if device.type == 'cuda':
            job.run()  # allocates the memory again that is released below
            wait()
        if task == 'shares':
            profiled = networks.parts_of(device, parts)
        with profiled:
            found = machine.timed(job.run, times, wait)
        found['wall'], found['cpu'] = found['wall'] * job.scale, found['cpu'] * job.scale
        if device.type == 'cuda':
            torch.cuda.empty_cache()
        print(json.dumps(found | {'parts': parts}), flush=True)


# --- in the parent ----------------------------------------------------------------------------------------------------

class Worker:
    """A process that runs a task of one implementation, once for every call."""

    def __init__(self, name, task, row, args):
        self.name, self.runs = name, []
        command = [sys.executable, __file__, '--worker', json.dumps([name, task, row]), '--device', args.device]
        self.process = subprocess.Popen(
            command + ['--amp'] * args.amp + ['--plain_malloc'] * args.plain_malloc, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
            env={**os.environ, 'KINETO_LOG_LEVEL': '5'})  # else torch's profiler prints a lot
        line = self.process.stdout.readline()
        self.bytes = json.loads(line)['bytes'] if line else 0
        self.process.stdout.readline()  # wait until it is warm before the next one starts

    def run(self):
        """One run, {'wall', 'cpu', ...}; None where the process has failed."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write('\n')
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            return None
        self.runs.append(json.loads(line))
        return self.runs[-1]

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def turns(names):
    """One turn for all: groups of names that run one after the other, each with the first one's run beside its own."""
    base, *others = names
    groups = [(*others[i:i + 1], base, *others[i + 1:i + 2]) for i in range(0, len(others), 2)]
    return groups or [(base,)]


def measure(row, task, names, args):
    """{name: {'bytes': peak, 'runs': [...], 'pairs': [(run of the first name, run of this one beside it), ...]}}.

    A run: what machine.timed says, 'parts', and whether it was 'disturbed'.
    """
    import machine
    workers = {name: Worker(name, task, row, args) for name in names}
    pairs = {name: [] for name in names}
    for _ in range(args.repeats):
        for group in turns(list(workers)):
            runs = {name: workers[name].run() for name in group}
            for name in [name for name, run in runs.items() if run is None]:
                print(f'{name} failed on {task} of {row}', file=sys.stderr)
                args.failed.append(name)
                workers.pop(name).close()
            if names[0] not in workers:
                raise SystemExit(f'{names[0]} failed, which the others are compared with')
            for name, run in runs.items():
                if run and name != names[0]:
                    pairs[name].append((runs[names[0]], run))
    for worker in workers.values():
        worker.close()
        machine.mark_disturbed(worker.runs)
    return {name: {'bytes': worker.bytes, 'runs': worker.runs, 'pairs': pairs[name]}
            for name, worker in workers.items()}


def quiet(runs):
    """(the runs that other work did not disturb, True); where they are too few all of them, False."""
    left = [run for run in runs if not run['disturbed']]
    return (left, True) if len(left) >= min(ENOUGH, len(runs)) else (runs, False)


def median(found, key):
    return statistics.median(run[key] for run in quiet(found['runs'])[0])


def pair_ratio(found):
    """The median ratio of neighbouring runs, undisturbed ones where these are enough; 1 without any."""
    if not found['pairs']:
        return 1.0
    pairs = [{'ratio': first['wall'] / own['wall'], 'disturbed': first['disturbed'] or own['disturbed']}
             for first, own in found['pairs']]
    return statistics.median(pair['ratio'] for pair in quiet(pairs)[0])


def table(results):
    """Lines: the medians and the peak of each, the first one's as ratios of them, how many steps of the ANN each is."""
    base, few = next(iter(results.values())), False
    print(f'{"":<62}|{next(iter(results)) + " / this":>18}')
    print(f'{"":<20}{"wall":>9}{"CPU":>9}{"peak":>10}{"undisturbed":>13} |'
          f'{"wall":>7}{"beside":>8}{"CPU":>7}{"memory":>8}' + (f' | {"ANNs":>6}' if 'ann' in results else ''))
    for name, found in results.items():
        runs, enough = found['runs'], quiet(found['runs'])[1]
        few = few or not enough
        undisturbed = f'{sum(not run["disturbed"] for run in runs)} of {len(runs)}' + (' ' if enough else '*')
        line = f'{name:<20}{median(found, "wall"):>8.3f}s{median(found, "cpu"):>8.3f}s'
        line += f'{"":>10}' if name == 'limit' else f'{found["bytes"] / 2**20:>7.0f} MB'
        line += f'{undisturbed:>13} |'
        if found is not base:
            line += (f'{median(base, "wall") / median(found, "wall"):>7.2f}{pair_ratio(found):>8.2f}'
                     f'{median(base, "cpu") / median(found, "cpu"):>7.2f}')
            line += f'{"":>8}' if name == 'limit' or found['bytes'] <= 0 else f'{base["bytes"] / found["bytes"]:>8.2f}'
        else:
            line += f'{"":>30}'
        if 'ann' in results and name != 'limit':
            line += f' | {pair_ratio(results["ann"]) / pair_ratio(found):>6.2f}'
        print(line, flush=True)
    if few:
        print(f'* fewer than {ENOUGH} undisturbed runs: the medians are of all')


def say_limit(row, task, results):
    """What share of the time the arithmetic would take at the machine's rate."""
    import networks
    if 'limit' not in results:
        return
    macs, name = networks.arithmetic(row, task), next(iter(results))
    rate = macs / median(results['limit'], 'wall')
    share = 1 / pair_ratio(results['limit'])
    print(f'at the {rate / 1e9:.0f} GMAC/s of matrix products, the {macs / 1e9:.1f} GMAC of {name} would take '
          f'{share:.0%} of its time (by neighbouring runs)', flush=True)
    if 'ann' in results:
        part = networks.arithmetic(row, task, ann=True) / macs
        print(f'and the {part * macs / 1e9:.1f} GMAC of the ANN {share * part * pair_ratio(results["ann"]):.0%} of its',
              flush=True)


def show_shares(results):
    """What share of a step went where: {name: {part: share}}."""
    shares = {}
    for name, found in results.items():
        total = sum(run['wall'] for run in found['runs'])
        parts = {part: seconds / total for part, seconds in found['runs'][-1]['parts'].items()}  # they add up to 1
        shares[name] = parts | {'rest': 1 - sum(parts.values())}
    print(f'{"":<34}' + ''.join(f'{name:>18}' for name in shares))
    for part in dict.fromkeys(part for parts in shares.values() for part in parts):
        print(f'{part:<34}' + ''.join(f'{parts.get(part, 0):>18.1%}' for parts in shares.values()), flush=True)
    return shares


def show_growth(row, args):
    """The peak at T, 2 T and 4 T, and how it grows with a step: {T: bytes}."""
    import networks
    held, before, found = row.batch * networks.layer_sizes(row.architecture)[1], None, {}
    print(f'{"T":>6}{"peak":>11}{"growth for each step":>24}{"one byte a neuron":>20}')
    for n in (row.steps, 2 * row.steps, 4 * row.steps):
        worker = Worker('plain' if row.architecture == 'network' else 'ours', 'growth', row._replace(steps=n), args)
        found[n] = worker.bytes
        worker.close()
        if not found[n]:
            print(f'{worker.name} failed on growth at T = {n} of {row}', file=sys.stderr)
            args.failed.append(worker.name)
            del found[n]
            break
        growth = '' if before is None else (
            f'{(found[n] - found[before]) / (n - before) / 2**20:>21.2f} MB{held / 2**20:>17.2f} MB')
        print(f'{n:>6}{found[n] / 2**20:>8.0f} MB{growth}', flush=True)
        before = n
    return found


def installed(name):
    return name not in PEERS or importlib.util.find_spec(name.removesuffix('_memopt'))


def names_of(row, args, task='train'):
    """The implementations that a row compares in a task, the first one with the others."""
    known = OF_EXAMPLE if row.architecture == 'network' else (*IMPLEMENTATIONS, 'ann_qcfs', 'plain')
    default = OF_EXAMPLE if row.architecture == 'network' else IMPLEMENTATIONS
    if row.architecture.startswith('RESNET'):  # of the others' networks only this one is built
        default = [name for name in default if name not in PEERS or name == 'spikingjelly' and row.direct]
    return [name for name in args.implementations or default
            if name in known and installed(name) and (task != 'test' or name not in TRAINING_ONLY)]


def run_task(task, row, args):
    """Measure, print, and return what was found."""
    import networks
    if task in ('train', 'test'):
        found = measure(row, task, names_of(row, args, task), args)
        table(found)
        say_limit(row, task, found)
    elif task == 'balance':
        found = measure(row, task, BALANCE_IMPLEMENTATIONS, args)
        table(found)
    elif task == 'shares':
        example = row.architecture == 'network'
        ours = {'plain': row.batch} if example else {'ours': row.batch, 'ours_linear': row.batch}
        anns = {'ann': ANN_BATCH} if example else {'ann': ANN_BATCH, 'ann_qcfs': ANN_BATCH}
        of = {f'{name}, B={batch}': measure(row._replace(batch=batch), task, [name], args)[name]
              for name, batch in (ours | anns).items()}
        found = show_shares(of)
    elif task == 'growth':
        found = show_growth(row, args)
    else:
        found = {}
        for scan in networks.SCANS:
            print(f'{scan}:')
            found[scan] = measure(row, scan, ('triton', 'torch') if args.device == 'cuda' else ('torch',), args)
            table(found[scan])
    return found


def main():
    args = get_args()
    if args.worker:
        return work(args)
    import torch
    machine = torch.cuda.get_device_name() if args.device == 'cuda' else f'{torch.get_num_threads()} threads'
    precision = 'bfloat16 autocast' if args.amp else 'float32'
    print(f'{args.device} ({machine}), torch {torch.__version__}, {precision}')
    for name in args.implementations or IMPLEMENTATIONS:
        if not installed(name):
            print(f'{name}: not installed')
    for row in args.rows:  # before hours of measuring
        for task in args.tasks:
            if task in ('train', 'test') and not names_of(row, args, task):
                return f'--implementations: none of these is installed and can {task} {row.architecture}'
    args.failed = []
    everything = {'device': args.device, 'machine': machine, 'torch': torch.__version__, 'precision': precision,
                  'rows': {}}
    for row in args.rows:
        found = everything['rows'][':'.join(map(str, row[:3]))] = {}
        for task in args.tasks:
            at = row
            if task == 'balance':
                if row.direct or row.architecture == 'network':  # nothing is balanced at low latency
                    continue
                at = row._replace(steps=BALANCE_STEPS, batch=BALANCE_SAMPLES)
            print(f'\n{at}: {task}', flush=True)
            found[task] = run_task(task, at, args)
            if args.json:  # also if something failed later
                Path(args.json).write_text(json.dumps(everything, indent=1))
    return f'failed: {", ".join(args.failed)}' if args.failed else None


if __name__ == '__main__':
    sys.exit(main())
