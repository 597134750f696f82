"""What several test files use: flags of small runs, calls of the scripts, networks, fixtures."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

if 'PYTEST_XDIST_WORKER' in os.environ:  # one of two processes: a thread each, also in what tests start
    os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch

import ann
from experiment import UserError, options
from values import fill, same  # noqa: F401  for the tests

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tests'))
torch.set_num_threads(min(2, torch.get_num_threads()))


# -- flags of small runs ----------------------------------------------------------------------------------------------

def digits(train, test):
    """The flags of a small network on so many of the digits that scikit-learn ships."""
    return ['-a', 'RESNET6', '--dataset', 'DIGITS', '--train_samples', str(train), '--test_samples', str(test),
            '--no-gpu']


SMALL = digits(96, 50)
FEW_STEPS = ['--timesteps', '8', '--default_threshold', '0.3']
SPIKING = [*SMALL, *FEW_STEPS]
CALIBRATION = ['--calibration_samples', '20', '--calibration_timesteps', '30']


# -- scripts called in this process -----------------------------------------------------------------------------------

def run(module, *flags):
    """What a script does with these flags; what goes wrong is raised."""
    module.main(module.get_args_parser().parse_args([str(flag) for flag in flags]))


def fails(module, words, *flags):
    """The run ends in a UserError of one line that says these words."""
    with pytest.raises(UserError, match=words) as caught:
        run(module, *flags)
    assert '\n' not in str(caught.value)


def load(path):
    """A checkpoint, as tensors only."""
    return torch.load(path, weights_only=True)


def metrics_of(path):
    """(the line about the run, the epochs' lines)"""
    first, *rest = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return first, rest


def train_ann(folder, *flags):
    """Train an ANN of digits with Adam in this folder; the path of its checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(ann, *flags, '--optimizer', 'Adam', '-lr', '1e-3')
    return str(folder / 'trained_models' / 'ann' / 'ann_resnet6_digits.pth')


# -- networks and values ----------------------------------------------------------------------------------------------

def network(architecture, **options):
    """The spiking network of that name."""
    from self_models import RESNET_SNN_STDB, VGG_SNN_STDB
    return (VGG_SNN_STDB if architecture.startswith('VGG') else RESNET_SNN_STDB)(architecture, **options)


def ternary(shape, seed=0, scale=1.0, low=-1):
    """(B, C, H, W) of -1, 0 and 1 times scale: a Poisson encoder passes them on unchanged, so no draw matters."""
    return torch.from_numpy(np.random.RandomState(seed).randint(low, 2, size=shape) * scale)


# -- fixtures ---------------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def the_same_draws():
    """A test draws the same numbers whatever ran before it: in float32 some draws make a spike flip."""
    torch.manual_seed(0)


@pytest.fixture
def own_classes(monkeypatch):
    """The surrogate Gaussian and the encoding Alternating of docs/architecture.md, and a surrogate of spikes, Inverse.

    The plain reference knows them, too. Yields the base classes.
    """
    import step_by_step
    from self_models.encoding import ENCODINGS, Encoding
    from self_models.surrogate import SURROGATES, Surrogate
    before = dict(SURROGATES), dict(ENCODINGS)
    text = (ROOT / 'docs' / 'architecture.md').read_text()
    exec(text.split('```python\n')[1].split('```')[0], {'__name__': 'own'})

    class Inverse(Surrogate):
        flags = {'alpha': 'height'}
        formula = 'alpha / delta_t, without beta'
        of_spikes = True

        def factor(self, delta_t):
            return 1 / delta_t

    monkeypatch.setitem(step_by_step.GRADIENTS, 'Gaussian',
                        lambda z, model: model.gamma * torch.exp(-(z * model.width) ** 2))
    monkeypatch.setitem(step_by_step.GRADIENTS, 'Inverse', lambda delta_t, model: model.alpha / delta_t)
    monkeypatch.setattr(step_by_step, 'OF_SPIKES', ['STDB', 'Inverse'])
    yield Surrogate, Encoding
    for registered, old in zip((SURROGATES, ENCODINGS), before, strict=True):
        registered.clear()
        registered.update(old)


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """The checkpoint of an ANN that has learned something. Tests leave it as it is."""
    return train_ann(tmp_path_factory.mktemp('trained'), '-a', 'RESNET6', '--dataset', 'DIGITS', '--epochs', 4,
                     '--no-gpu')


@pytest.fixture
def small_classifiers(monkeypatch, request):
    """VGGs' classifiers of 64 in place of 4096 neurons, which no test but those of stored numbers needs."""
    if 'numbers' not in request.node.name:
        monkeypatch.setattr('self_models.layers.VGG_HIDDEN', 64)


@pytest.fixture
def published_class(tmp_path, monkeypatch):
    """A class of the published code whose module is gone when its file is read, and leaves a folder if imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path('spiking_model.py').write_text("import os; os.mkdir('ran')")
    module = ModuleType('spiking_model')
    monkeypatch.setitem(sys.modules, 'spiking_model', module)

    def named(name, base=torch.autograd.Function):
        setattr(module, name, type(name, (base,), {'__module__': 'spiking_model', '__qualname__': name}))
        return getattr(module, name)

    yield named
    assert not Path('ran').exists()


@pytest.fixture
def called(monkeypatch, capsys):
    """Call a script as its command does, but in this process, which spares the start of torch.

    called(ann, '--epochs', 1) -> CompletedProcess. For what is about processes there is `command`.
    """
    def call(module, *flags):
        capsys.readouterr()
        status = 0
        with monkeypatch.context() as patch:
            patch.setattr(signal, 'signal', lambda *_: None)  # pytest keeps its own
            try:
                args = module.get_args_parser().parse_args([str(flag) for flag in flags])
                options.run(module.main, args, f'{module.__name__}.py')
            except SystemExit as ended:
                status = ended.code or 0
        out, errors = capsys.readouterr()
        if isinstance(status, str):  # Python prints it as it ends
            status, errors = 1, f'{errors}{status}\n'
        return subprocess.CompletedProcess(flags, status, out, errors)
    return call


@pytest.fixture
def command(tmp_path):
    """Run a script of the project in an empty folder: command('ann.py', '--epochs', '1') -> CompletedProcess."""
    def call(script, *flags, timeout=300, env=None, **options):
        return subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], cwd=tmp_path, text=True,
                              capture_output=True, timeout=timeout, env={**os.environ, **(env or {})}, **options)
    return call
