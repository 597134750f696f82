"""Read what torch.save wrote without running anything of it: tensors, numbers, texts, and classes by their names.

torch.load(weights_only=True) calls a few functions that build tensors, and refuses a file that names anything else.
Such a file is read again with a text for each of these names, except for numpy's numbers and arrays, which are built
below. A file that would call or build something by a name finds a text there, and fails.
"""
import io
import pickle
import pickletools
import re
import zipfile
from pathlib import Path

import numpy as np
import torch


def load(path: Path | str) -> object:
    """What is in a file of torch.save, on the CPU.

    A numpy number or array () is a Python number, a larger array a tensor, a class or function its name without the
    module's. Raises pickle.UnpicklingError or TypeError for a file that would call anything else, and whatever torch
    raises on bytes that are no such file.
    """
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:
                pickles = [parts.read(name) for name in parts.namelist() if name.endswith('data.pkl')]
            source, names = path, _scan(pickles)[0]
        else:  # torch before 1.6 wrote five pickles: a number, a version, the machine, the object, the storages' keys
            whole = Path(path).read_bytes()
            names, marks = _scan([io.BytesIO(whole)] * 5)
            source = io.BytesIO(b''.join(whole[a + 1:b] for a, b in zip([-1, *marks], [*marks, len(whole)])))
        values = {**{name: name.split('.')[-1] for name in names}, **_NUMPY}
        with torch.serialization.safe_globals([(value, name) for name, value in values.items()]):
            return _plain(torch.load(source, map_location='cpu', weights_only=True))


def _scan(pickles):
    """(the full names that pickles refer to, where they mark a network's class as one). Nothing is imported.

    Old files hold such a class as ('module', class, file, source text), a tuple if the mark is left out.
    """
    names, marks, items = set(), [], 0
    for code, value, place in (each for part in pickles for each in pickletools.genops(part)):
        if code.name == 'GLOBAL':  # with Python 2's name of the module of int and float
            names.add(re.sub(r'^__builtin__\b', 'builtins', value.replace(' ', '.', 1)))
        items = 0 if code.name == 'MARK' else items + ('PUT' not in code.name)
        if code.name == 'BINPERSID' and items == 6:  # four values, the tuple and the mark; that of a tensor has more
            marks.append(place)
    return names, marks


class _Dtype:
    """Stands for a numpy dtype of numbers or text. A pickle could have numpy's own take bytes of it for pointers."""

    def __init__(self, code, *_):
        if not re.fullmatch(r'[biufcSU]\d+', code):
            raise pickle.UnpicklingError(f'an array of {code}')
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for a numpy array, whose shape, kind and values come after it in a pickle."""

    def __init__(self, *_):
        self.values = np.empty(0)

    def __setstate__(self, state):
        _, shape, kind, by_columns, data = state
        self.values = np.frombuffer(data, kind.dtype).reshape(shape, order='F' if by_columns else 'C')


def _number(kind, data):
    return np.frombuffer(data, kind.dtype)[0].item()


_NUMPY = {'numpy.dtype': _Dtype, 'builtins.bytes': lambda: b''}  # of an empty array
for _core in ('core', '_core'):  # numpy 1 and 2
    _NUMPY |= {f'numpy.{_core}.multiarray.scalar': _number, f'numpy.{_core}.multiarray._reconstruct': _Array}


def _plain(value):
    """A value with the arrays in it, at any depth, as numbers and tensors, and classes of networks as their names."""
    if isinstance(value, _Array):
        values = value.values
        if values.ndim == 0 or values.dtype.kind in 'SU':
            return values.tolist()
        return torch.tensor(values.astype(values.dtype.newbyteorder('=')))
    if isinstance(value, (list, dict)):
        for key in value if isinstance(value, dict) else range(len(value)):
            value[key] = _plain(value[key])
    if type(value) is tuple:
        return value[1] if value[:1] == ('module',) and len(value) == 4 else tuple(map(_plain, value))
    return value
