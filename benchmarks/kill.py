"""Kill training runs at random moments: is every checkpoint readable, does each run resume, is its result the same?

    python benchmarks/kill.py                       # 20 kills of ann.py and 20 of snn.py; some 15 minutes

One run of each script is not killed. Another, with the same flags and --resume auto, is killed (SIGKILL) at a random
moment: by turns before the end of its first epoch, in the next five epochs, and within 10 ms after a save began. After
each kill, every checkpoint must load as tensors only, every metrics file must be complete, and a run with --resume auto
must end the epoch after the last one saved; then it is killed, too, and so on. At last it is trained to the end, where
weights, optimizer, best accuracy and the metrics of each epoch, without its seconds, must equal those of the first run
bit for bit. Ends with status 1 if they do not.
"""
import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
from experiment.reporting import summary  # noqa: E402
from values import same  # noqa: E402

SMALL = ['-a', 'RESNET6', '--dataset', 'DIGITS', '--train_samples', '96', '--test_samples', '50', '--no-gpu',
         '--optimizer', 'Adam', '-lr', '1e-3']
FLAGS = {'ann': SMALL,
         'snn': [*SMALL, '-lr', '1e-4', '--pretrained_ann', 'trained_models/ann/whole.pth', '--timesteps', '12',
                 '--default_threshold', '0.3', '--calibration_samples', '20', '--calibration_timesteps', '30']}
EPOCHS_A_KILL = 8  # 6 before the kill, 1 after it and 1 to spare


def start(folder, kind, epochs, *flags):
    return subprocess.Popen([sys.executable, ROOT / f'{kind}.py', *FLAGS[kind], '--epochs', str(epochs), *flags],
                            cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def next_epoch(process):
    """(the number in the next line of the table of epochs, or None where there is none; what was said before it)."""
    said = ''
    for line in process.stdout:
        if found := re.match(r' +(\d+) +\S+ +\d\.\d{4} ', line):
            return int(found[1]), said
        said += line
    return None, said


def await_moment(process, number, models, first, each, draw):
    """Wait for the random moment of kill `number`; returns how it is called."""
    if number % 3 == 1:
        time.sleep(draw.uniform(0, first))
        return 'before its first epoch ended'
    next_epoch(process)
    if number % 3 == 2:
        time.sleep(draw.uniform(0, 5 * each))
        return 'while it trained'
    while process.poll() is None and not any(models.glob('*.tmp')):
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.01))
    return 'while it saved'


def kill(process):
    """Whether it was still running."""
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


def whole_run(folder, kind, epochs):
    """Train without a disturbance; returns the seconds to the end of the first epoch, and of an epoch."""
    began = time.perf_counter()
    process = start(folder, kind, epochs, '--name', 'whole')
    number, said = next_epoch(process)
    first = time.perf_counter() - began
    rest, _ = process.communicate()
    if number is None or process.returncode:
        sys.exit(f'{kind}.py failed:\n{said}{rest}')
    return first, (time.perf_counter() - began - first) / (epochs - 1)


def unreadable(folder):
    """Which checkpoints and metrics files do not load, with the reason."""
    problems = []
    for path in sorted([*folder.rglob('*.pth'), *folder.rglob('*.jsonl')]):
        try:
            if path.suffix == '.pth':
                torch.load(path, map_location='cpu', weights_only=True)['state_dict']
            else:
                summary.read(path)
        except Exception as error:  # torch's reader raises many kinds of errors for damaged files
            problems.append(f'{path.relative_to(folder)} is unreadable: {error!r}')
    return problems


def differences(folder):
    """What the checkpoints of the run that was left alone and of the killed one do not agree in."""
    problems = []
    for suffix in ('.pth', '.last.pth'):
        whole, killed = (torch.load(folder / f'{name}{suffix}', weights_only=True) for name in ('whole', 'killed'))
        for epoch in [*whole['history'], *killed['history']]:
            epoch.pop('seconds', None)
        problems += [f'killed{suffix}: its {key} is not that of the run that was left alone'
                     for key in ('state_dict', 'optimizer', 'epoch', 'accuracy', 'best', 'thresholds', 'history')
                     if not same(whole.get(key), killed.get(key))]
    return problems


def torment(folder, kind, kills, draw):
    """Kill a run `kills` times and compare its end; returns what went wrong."""
    epochs = EPOCHS_A_KILL * kills
    flags = ('--name', 'killed', '--resume', 'auto')
    first, each = whole_run(folder, kind, epochs)
    print(f'{kind}.py left alone: {first:.1f} s to the end of the first epoch, {each:.2f} s an epoch after it')
    models = folder / 'trained_models' / kind
    last, problems, survived, saving = models / 'killed.last.pth', [], 0, 0
    for number in range(1, kills + 1):
        process = start(folder, kind, epochs, *flags)
        moment = await_moment(process, number, models, first, each, draw)
        if not kill(process):
            sys.exit(f'{kind}.py ended before it could be killed; raise EPOCHS_A_KILL')
        part = any(models.glob('*.tmp'))
        saving += part
        wrong = unreadable(folder)
        epoch = torch.load(last, weights_only=True)['epoch'] if last.exists() and not wrong else 0
        process = start(folder, kind, epochs, *flags)
        reached, said = next_epoch(process)
        kill(process)
        if reached != epoch + 1:
            wrong.append(f'it does not go on after epoch {epoch} but with {reached}: {said[-1000:]}')
        wrong += unreadable(folder)
        # one, if the second kill hit a save, too; the next run deletes it
        if len(left := list(models.glob('*.tmp'))) > 1:
            wrong.append(f'{len(left)} half-written files have piled up')
        survived += not wrong
        problems += [f'kill {number}: {text}' for text in wrong]
        print(f'{kind}.py, kill {number} {moment}: {"a half-written file, " if part else ""}epoch {epoch} saved, '
              f'{"; ".join(wrong) or f"resumed with epoch {reached}"}', flush=True)
    process = start(folder, kind, epochs, *flags)
    said, _ = process.communicate()
    end = [f'the run does not end: {said[-1000:]}'] if process.returncode else differences(models)
    print(f'{kind}.py: {kills} kills, {saving} of them with a file half written, {survived} survived; '
          f'after {epochs} epochs {"NOT " if end else ""}the same, bit for bit, as the run that was left alone')
    return [f'{kind}.py: {text}' for text in problems + end]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20, metavar='N', help='of each script; default %(default)s')
    parser.add_argument('--seed', type=int, default=0, help='of the moments; default %(default)s')
    args = parser.parse_args()
    problems, draw = [], random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        for kind in FLAGS:  # snn.py converts what ann.py trained
            problems += torment(Path(folder), kind, args.kills, draw)
    print('\n'.join(problems))
    sys.exit(1 if problems else 0)


if __name__ == '__main__':
    main()
