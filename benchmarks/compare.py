"""Time and memory of a training step, an evaluation step and threshold balancing, beside other ways to do the same.

    python benchmarks/compare.py                                        # VGG5 and VGG16 on two cores, an hour or less
    python benchmarks/compare.py --rows VGG16:100:64 --device cuda --amp --json gpu.json

It compares, on the same weights, thresholds and images of CIFAR's shape, where they are installed:

    ours           self_models
    step_by_step   tests/step_by_step.py, the equations one time step after another, as the published code runs them
    spikingjelly   SpikingJelly, multi-step mode; on CUDA its Triton or CuPy backend where that is installed
    snntorch       snnTorch

Each runs in a process of its own; runs are interleaved, so that a machine that drifts drifts for all. A ratio is
ours / theirs of the medians. Memory is the peak above what the process held before its first step.
"""
import argparse
import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
IMPLEMENTATIONS = ('ours', 'step_by_step', 'spikingjelly', 'snntorch')
BALANCE_IMPLEMENTATIONS = ('ours', 'forward')  # forward: one evaluation pass of ours on the same images and steps
BALANCE_SAMPLES, BALANCE_STEPS = 32, 200  # thresholds are found over many steps: by default 512 images and 1000


def get_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', nargs='+', default=['VGG5:75:16', 'VGG16:50:8'], metavar='NET:T:B',
                        help='architecture, time steps, batch size')
    parser.add_argument('--tasks', nargs='+', default=['train', 'test', 'balance', 'shares', 'growth'],
                        choices=['train', 'test', 'balance', 'shares', 'growth'])
    parser.add_argument('--implementations', nargs='+', default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast, for all')
    parser.add_argument('--json', metavar='FILE', help='write every number there')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    return parser.parse_args()


# --- in a worker process ----------------------------------------------------------------------------------------------

def build_ours(architecture, steps, device):
    """A network whose layers all spike: random weights, thresholds balanced on two images."""
    import torch

    from conftest import fill
    from self_models import RESNET_SNN_STDB, VGG_SNN_STDB, find_thresholds
    kind = VGG_SNN_STDB if architecture.startswith('VGG') else RESNET_SNN_STDB
    backend = 'triton' if device.type == 'cuda' else 'torch'  # as snn.py chooses
    model = fill(kind(architecture, timesteps=steps, dropout=0.3, backend=backend), 0).to(device)
    find_thresholds(model, torch.rand(2, 3, 32, 32, device=device), 40)
    model.threshold_update(0.7, list(model.thresholds))
    return model


def plain_layers(model):
    """The modules of a spiking VGG in order, flattening included."""
    from torch import nn
    if not hasattr(model, 'features'):
        raise SystemExit('the peers are built for VGG only: --implementations ours step_by_step')
    return [*model.features, nn.Flatten(), *model.classifier]


def build_spikingjelly(model, device):
    """The same layers in SpikingJelly's multi-step mode; returns (forward, parameters)."""
    import torch
    from spikingjelly.activation_based import functional, layer, neuron, surrogate
    from torch import nn
    thresholds, modules = iter(model.thresholds), []
    for module in plain_layers(model):
        if isinstance(module, nn.Conv2d):
            new = layer.Conv2d(module.in_channels, module.out_channels, module.kernel_size, padding=module.padding,
                               bias=False)
            new.weight.data = module.weight.data.clone()
        elif isinstance(module, nn.Linear):
            new = layer.Linear(module.in_features, module.out_features, bias=False)
            new.weight.data = module.weight.data.clone()
        elif isinstance(module, nn.ReLU):
            new = neuron.IFNode(next(thresholds), v_reset=None, surrogate_function=surrogate.ATan(), detach_reset=True)
        elif isinstance(module, nn.Dropout):
            new = layer.Dropout(module.p)
        elif isinstance(module, nn.AvgPool2d):
            new = layer.AvgPool2d(2)
        else:
            new = layer.Flatten()
        modules.append(new)
    net = nn.Sequential(*modules).to(device)
    functional.set_step_mode(net, 'm')
    if device.type == 'cuda':
        for backend in ('triton', 'cupy'):
            if importlib.util.find_spec(backend):
                functional.set_backend(net, backend, neuron.IFNode)
                break
        print('spikingjelly backend:', next(m.backend for m in modules if isinstance(m, neuron.IFNode)),
              file=sys.stderr)

    def forward(images):
        functional.reset_net(net)
        steps = (model.timesteps, *images.shape)
        return net((torch.rand(steps, device=device) <= images.abs()).to(images) * images.sign()).sum(0)

    return forward, net


def build_snntorch(model, device):
    """The same layers in snnTorch, one time step after another; returns (forward, parameters)."""
    import snntorch
    from snntorch import surrogate
    from torch import nn
    thresholds, modules = iter(model.thresholds), []
    for module in plain_layers(model):
        if isinstance(module, nn.ReLU):
            module = snntorch.Leaky(beta=1.0, threshold=next(thresholds), spike_grad=surrogate.atan(),
                                    reset_mechanism='subtract')
        modules.append(module)
    net = nn.Sequential(*modules).to(device)

    def forward(images):
        state = {m: m.init_leaky() for m in net if isinstance(m, snntorch.Leaky)}
        total = 0
        for _ in range(model.timesteps):
            x = model.input_layer(images)
            for module in net:
                if module in state:
                    x, state[module] = module(x, state[module])
                else:
                    x = module(x)
            total = total + x
        return total

    return forward, net


class Memory:
    """Peak bytes above what was held when it was made; reset() starts a new peak."""

    def __init__(self, device):
        self.device = device
        self.start = self._now()
        self.reset()

    def _status(self, key):
        line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    def _now(self):
        import torch
        return torch.cuda.memory_allocated() if self.device.type == 'cuda' else self._status('VmRSS')

    def reset(self):
        import torch
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        else:
            Path('/proc/self/clear_refs').write_text('5')

    def peak(self):
        import torch
        top = torch.cuda.max_memory_allocated() if self.device.type == 'cuda' else self._status('VmHWM')
        return top - self.start


def task_of(name, task, row, device, amp):
    """A function that does the work once, of implementation `name`."""
    import torch
    import torch.nn.functional as F

    import step_by_step
    from self_models import find_thresholds
    architecture, steps, batch = row
    torch.manual_seed(0)
    model = build_ours(architecture, steps, device)
    images = torch.rand(batch, 3, 32, 32, device=device) * 2 - 1
    labels = torch.arange(len(images), device=device) % 10
    forward, net = {
        'ours': lambda: (model, model), 'forward': lambda: (model, model),
        'step_by_step': lambda: ((lambda x: step_by_step.run(model, x)[0]), model),
        'spikingjelly': lambda: build_spikingjelly(model, device),
        'snntorch': lambda: build_snntorch(model, device)}[name]()
    net.train(task in ('train', 'shares', 'growth'))
    lowered = torch.autocast(device.type, torch.bfloat16) if amp else contextlib.nullcontext()
    if task == 'balance' and name == 'ours':
        return lambda: find_thresholds(model, images, steps)
    if not net.training:
        def test():
            with torch.no_grad(), lowered:
                forward(images)
        return test
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def train():
        optimizer.zero_grad()
        with lowered:
            loss = F.cross_entropy(forward(images) / steps, labels)
        loss.backward()
        optimizer.step()
    return train


def clock_parts(device):
    """Time what a step of ours spends where; returns {part: seconds}, filled from then on."""
    import torch
    import torch.nn.functional as F

    from self_models import lif_layer
    parts = {}

    def clock(owner, name, part):
        plain = getattr(owner, name)

        def timed(*args, **options):
            if device.type == 'cuda':
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = plain(*args, **options)
            if device.type == 'cuda':
                torch.cuda.synchronize()
            parts[part] = parts.get(part, 0) + time.perf_counter() - start
            return result
        setattr(owner, name, timed)

    for name in ('conv2d', 'linear'):
        clock(F, name, 'convolutions and matrix products')
    for name in ('input_gradient', 'weight_gradient'):
        clock(lif_layer.SynapticInput, name, 'convolutions and matrix products')
    for name in ('lif_forward', 'linear_factor', 'lif_backward'):
        clock(lif_layer, name, 'scan over time')
    clock(torch.optim.SGD, 'step', 'optimizer')
    return parts


def work(args):
    """The worker: warm up, then a measurement for every line on stdin."""
    import torch
    name, task = args.worker.split(':')
    torch.set_flush_denormal(True)
    device = torch.device(args.device)
    architecture, steps, batch = args.rows[0].split(':')
    run = task_of(name, task, (architecture, int(steps), int(batch)), device, args.amp)
    memory, parts = Memory(device), clock_parts(device) if task == 'shares' else {}
    run()
    print('ready', flush=True)
    for _ in sys.stdin:
        memory.reset()
        parts.clear()
        start = time.perf_counter()
        run()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        print(json.dumps({'seconds': time.perf_counter() - start, 'bytes': memory.peak(), 'parts': parts}), flush=True)


# --- in the parent ----------------------------------------------------------------------------------------------------

def measure(row, task, names, args):
    """{name: {'seconds': [...], 'bytes': peak, 'parts': {...}}}: interleaved runs of a worker for each name."""
    workers = {}
    for name in names:
        command = [sys.executable, __file__, '--worker', f'{name}:{task}', '--rows', row, '--device', args.device]
        workers[name] = subprocess.Popen(command + ['--amp'] * args.amp, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True)
        workers[name].stdout.readline()  # warmed up; the next one is not started beside it
    results = {name: {'seconds': [], 'bytes': 0, 'parts': {}} for name in names}
    for _ in range(args.repeats if task != 'growth' else 1):
        for name in list(workers):
            worker = workers[name]
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.write('\n')
                worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                print(f'{name} failed on {task} of {row}', file=sys.stderr)
                del workers[name], results[name]
                continue
            found = json.loads(line)
            results[name]['seconds'].append(found['seconds'])
            results[name]['bytes'] = max(results[name]['bytes'], found['bytes'])
            for part, seconds in found['parts'].items():
                results[name]['parts'][part] = results[name]['parts'].get(part, 0) + seconds
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return results


def table(results, of='ours'):
    """Lines: median, range and peak of each, and ours as a ratio of it."""
    print(f'{"":<14}{"median":>9}{"min":>9}{"max":>9}{"peak":>10}{"time ratio":>12}{"memory ratio":>14}')
    base = results.get(of)
    for name, found in results.items():
        seconds = found['seconds']
        ratios = '' if base is None or name == of else (
            f'{statistics.median(base["seconds"]) / statistics.median(seconds):>12.2f}'
            f'{base["bytes"] / found["bytes"] if found["bytes"] > 0 else float("nan"):>14.2f}')
        print(f'{name:<14}{statistics.median(seconds):>8.2f}s{min(seconds):>8.2f}s{max(seconds):>8.2f}s'
              f'{found["bytes"] / 2**20:>7.0f} MB{ratios}', flush=True)


def spikes_held(architecture, batch):
    """Hidden neurons times batch: bytes that one byte for each neuron takes a time step."""
    import torch

    from self_models import VGG
    sizes = []
    model = VGG(architecture)
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.register_forward_hook(lambda _, __, output: sizes.append(output[0].numel()))
    model(torch.zeros(1, 3, 32, 32))
    return batch * sum(sizes)


def main():
    args = get_args()
    if args.worker:
        return work(args)
    import torch
    installed = [name for name in args.implementations
                 if name in ('ours', 'step_by_step') or importlib.util.find_spec(name)]
    machine = torch.cuda.get_device_name() if args.device == 'cuda' else f'{torch.get_num_threads()} threads'
    precision = 'bfloat16 autocast' if args.amp else 'float32'
    print(f'{args.device} ({machine}), torch {torch.__version__}, {precision}')
    everything = {'device': args.device, 'machine': machine, 'torch': torch.__version__, 'precision': precision,
                  'rows': {}}
    for row in args.rows:
        found = everything['rows'][row] = {}
        for task in args.tasks:
            architecture, steps, batch = row.split(':')
            if task == 'balance':
                steps, batch = str(BALANCE_STEPS), str(BALANCE_SAMPLES)
            print(f'\n{architecture}, T = {steps}, B = {batch}: {task}')
            if task in ('train', 'test'):
                found[task] = measure(row, task, installed, args)
                table(found[task])
            elif task == 'balance':
                found[task] = measure(f'{architecture}:{steps}:{batch}', task, BALANCE_IMPLEMENTATIONS, args)
                table(found[task])
            elif task == 'shares':
                found[task] = measure(row, task, ['ours'], args)
                total, parts = sum(found[task]['ours']['seconds']), found[task]['ours']['parts']
                for part, seconds in (parts | {'rest': total - sum(parts.values())}).items():
                    print(f'{part:<34}{seconds / total:>7.1%}')
            else:
                held = spikes_held(architecture, int(batch))
                series = [int(steps), 2 * int(steps), 4 * int(steps)]
                found[task] = {n: measure(f'{architecture}:{n}:{batch}', task, ['ours'], args)['ours']['bytes']
                               for n in series}
                print(f'{"T":>6}{"peak":>11}{"growth for each step":>24}{"one byte a neuron":>20}')
                for before, n in zip([None, *series], series, strict=False):
                    growth = '' if before is None else (
                        f'{(found[task][n] - found[task][before]) / (n - before) / 2**20:>21.2f} MB'
                        f'{held / 2**20:>17.2f} MB')
                    print(f'{n:>6}{found[task][n] / 2**20:>8.0f} MB{growth}', flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(everything, indent=1))
    return None


if __name__ == '__main__':
    main()
