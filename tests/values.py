"""Weights of networks and values of checkpoints, for tests and benchmarks."""
import math

import numpy as np
import torch


def fill(model, seed):
    """Weights that spread activity through every layer and do not depend on torch's generator."""
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(model.named_parameters())):
            r = np.random.RandomState(1000 * seed + i)
            w = (r.standard_normal(tuple(p.shape)) + 0.15) * math.sqrt(2.0 / np.prod(p.shape[1:]))
            p.copy_(torch.as_tensor(w))
    return model


def same(a, b):
    """Whether two checkpoints' values are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
