"""Encodings: a class for each, which makes the input of the first layer at each time step from an image.

No torch is imported here, so that `--help` is quick.
"""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ENCODINGS = {}  # {name: an Encoding}


class Encoding:
    """Spikes of an image's pixels, each with the pixel's sign; or the image itself.

    A subclass is registered when it is defined, under its class's name unless `name` gives another. It has

    description: for the metadata of NIR
    constant: whether the input is the image itself at each step; else it has
    fires(x, t, rate): whether each pixel of images x (B, C, H, W) fires at step t: bool, of that shape; rate: 1 for
        VGG, 0.9 for ResNet (published code)

    Raises ValueError for a name that is taken.
    """
    description = ''
    constant = False

    def __init_subclass__(cls, name: str | None = None, **options):
        super().__init_subclass__(**options)
        name, encoding = name or cls.__name__, cls()
        if ENCODINGS.get(name, encoding).__module__ != cls.__module__:  # a notebook may define its class again
            raise ValueError(f'{cls.__name__}: there is an encoding {name!r} already; give another name')
        ENCODINGS[name] = encoding

    def fires(self, x: 'torch.Tensor', t: int, rate: float) -> 'torch.Tensor':
        raise NotImplementedError(f'the encoding {type(self).__name__} defines no fires')


class Poisson(Encoding, name='poisson'):
    """Rate coding, fresh at every step (Rathi et al. 2020, section 2.1)."""
    description = 'signed Poisson: at each step sign(x) where rand <= input_rate |x|, else 0'

    def fires(self, x, t, rate):
        import torch
        # drawn in float32 at least: bfloat16 draws multiples of 1/256, and 0 <= 0.001 as often
        return torch.rand_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) <= rate * x.abs()


class Direct(Encoding, name='direct'):
    description = 'direct: the image itself at each step'
    constant = True
