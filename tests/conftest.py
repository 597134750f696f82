"""Helpers that several test files use."""
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tests'))
torch.set_num_threads(min(2, torch.get_num_threads()))


def fill(model, seed):
    """Weights that spread activity through every layer and do not depend on torch's generator."""
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(model.named_parameters())):
            r = np.random.RandomState(1000 * seed + i)
            w = (r.standard_normal(tuple(p.shape)) + 0.15) * math.sqrt(2.0 / np.prod(p.shape[1:]))
            p.copy_(torch.from_numpy(w))
    return model


def network(architecture, **options):
    """The spiking network of that name."""
    from self_models import RESNET_SNN_STDB, VGG_SNN_STDB
    return (VGG_SNN_STDB if architecture.startswith('VGG') else RESNET_SNN_STDB)(architecture, **options)


def ternary(shape, seed=0, scale=1.0, low=-1):
    """(B, C, H, W) of -1, 0 and 1 times scale: a Poisson encoder passes them on unchanged, so no draw matters."""
    return torch.from_numpy(np.random.RandomState(seed).randint(low, 2, size=shape) * scale)


def same(a, b):
    """Whether two checkpoints' values are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def command(tmp_path):
    """Run a script of the project in an empty folder: command('ann.py', '--epochs', '1') -> CompletedProcess."""
    def call(script, *flags, timeout=300, env=None, **options):
        return subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], cwd=tmp_path, text=True,
                              capture_output=True, timeout=timeout, env={**os.environ, **(env or {})}, **options)
    return call
