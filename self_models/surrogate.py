"""Surrogate gradients: a class for each.

A spike is [z > 0], z = u / theta - 1. In place of its gradient with respect to z stands the surrogate's height times a
factor, a function of z or of the time since the neuron's last earlier spike. No torch is imported here, so that the
flags are known without waiting for it.
"""
import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

SURROGATES = {}  # {name: class}, in the order of their definition
NEVER = 999  # before its first spike a neuron counts as having fired at step -999 (published code)


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """A surrogate gradient with the values of its flags.

    A subclass is registered when it is defined, under its class's name unless `name` gives another. It has

    flags: {flag: what it is}, of alpha, beta, gamma and width those that it uses. The one that is the 'height'
        multiplies the factor; without one nothing does.
    formula: of the gradient, in the names of these flags; for reports
    of_spikes: whether the factor is a function of the spikes, so that these are kept for the backward pass; else it is
        computed from the potentials and kept
    factor(z): the factor for z of any shape, which may be overwritten, of that shape; of_spikes: factor(delta_t), the
        time steps since the neuron's last earlier spike, from 1 on, as floats

    Raises ValueError for a width that is not above 0, and for a subclass with unknown flags or a name that is taken.
    """
    alpha: float = 0.3
    beta: float = 0.01
    gamma: float = 0.3
    width: float = 1.0

    name: ClassVar[str]
    flags: ClassVar[dict[str, str]] = {}
    formula: ClassVar[str] = 'factor(z)'
    of_spikes: ClassVar[bool] = False

    def __init_subclass__(cls, name: str | None = None, **options):
        super().__init_subclass__(**options)
        cls.name = name or cls.__name__
        if unknown := cls.flags.keys() - FLAGS.keys():
            raise ValueError(f'{cls.__name__}: unknown flags {sorted(unknown)}: choose of {", ".join(FLAGS)}')
        if SURROGATES.get(cls.name, cls).__module__ != cls.__module__:  # a notebook may define its class again
            raise ValueError(f'{cls.__name__}: there is a surrogate {cls.name!r} already; give another name')
        SURROGATES[cls.name] = cls

    def __post_init__(self):
        if not 0 < self.width < math.inf:
            raise ValueError(f'width must be above 0, not {self.width}')

    @property
    def height(self) -> float:
        return next((getattr(self, flag) for flag, what in self.flags.items() if what == 'height'), 1.0)

    def factor(self, z: 'torch.Tensor') -> 'torch.Tensor':
        raise NotImplementedError(f'the surrogate {self.name} defines no factor')

    def gradient(self, z: 'torch.Tensor') -> 'torch.Tensor':
        """Height times factor: the gradient of a spike with respect to z. z, or delta_t: floats of any shape."""
        return self.height * self.factor(z.clone())

    def state(self, potentials: 'torch.Tensor', threshold: 'float | torch.Tensor') -> 'torch.Tensor':
        """What multiply() needs, from the potentials (n, M): the spikes, bool, or the factors."""
        if self.of_spikes:
            return potentials > threshold
        return self.factor((potentials / threshold).sub_(1)).to(potentials.dtype)

    def multiply(self, grad: 'torch.Tensor', state: 'torch.Tensor', start: int) -> None:
        """Multiply the gradient of the spikes, grad (n, M), by the factor, in place; start: the step of row 0."""
        if not self.of_spikes:
            grad.mul_(state)
            return
        delta_t = grad.new_full(grad[0].shape, start + NEVER)
        for row, fired in zip(grad, state, strict=True):
            row.mul_(self.factor(delta_t.clone()))
            delta_t.masked_fill_(fired, 0).add_(1)


FLAGS = {field.name: field.default for field in dataclasses.fields(Surrogate)}  # of all surrogates, and their defaults


class SpikeTimeDependent(Surrogate, name='STDB'):
    """Rathi et al. 2020, eq. 12; delta_t: time steps since the neuron's last earlier spike."""
    flags = {'alpha': 'height', 'beta': 'decay'}
    formula = 'alpha exp(-beta delta_t)'
    of_spikes = True

    def factor(self, delta_t):
        # of the product: exp(-delta_t)**beta underflows to 0 in float32 from delta_t = 104
        return (-self.beta * delta_t).exp()

    def multiply(self, grad, state, start):
        if type(self).factor is not SpikeTimeDependent.factor:
            return super().multiply(grad, state, start)
        # without an exponential for each neuron and step: with s the spikes
        # f[k] = exp(-beta) max(f[k-1], s[k-1]),   f[0] = exp(-beta (start + 999))
        import torch
        rows, decay = grad.unbind(), math.exp(-self.beta)
        factor = torch.full_like(rows[0], self.before_first_spike(start))
        earlier = torch.empty_like(factor)
        rows[0].mul_(factor)
        for row, fired in zip(rows[1:], state.view(torch.uint8).unbind(), strict=False):
            earlier.copy_(fired)
            row.mul_(torch.maximum(factor, earlier, out=factor).mul_(decay))

    def before_first_spike(self, start: int) -> float:
        """The factor of a neuron at step `start` that has not fired yet."""
        return math.exp(-self.beta * (start + NEVER))


# These work in place, as a second tensor of that size can cost more time than the arithmetic.
class Linear(Surrogate):
    """Bellec et al. 2018."""
    flags = {'gamma': 'height'}
    formula = 'gamma max(0, 1 - |z|)'

    def factor(self, z):
        return z.abs_().neg_().add_(1).clamp_(min=0)


class Rectangle(Surrogate):
    """Wu et al. 2018 (STBP)."""
    flags = {'gamma': 'height', 'width': 'width'}
    formula = 'gamma [|z| < width / 2]'

    def factor(self, z):
        return z.abs_().lt_(self.width / 2)


class ATan(Surrogate):
    """Fang et al. 2021."""
    flags = {'gamma': 'height', 'width': 'steepness'}
    formula = 'gamma / (1 + (pi/2 * width * z)^2)'

    def factor(self, z):
        return z.mul_(math.pi / 2 * self.width).square_().add_(1).reciprocal_()


class FastSigmoid(Surrogate):
    """Zenke & Ganguli 2018 (SuperSpike)."""
    flags = {'gamma': 'height', 'width': 'steepness'}
    formula = 'gamma / (1 + width * |z|)^2'

    def factor(self, z):
        return z.abs_().mul_(self.width).add_(1).square_().reciprocal_()


class Sigmoid(Surrogate):
    """The derivative of the logistic function."""
    flags = {'gamma': 'height', 'width': 'steepness'}
    formula = '4 * gamma * s (1 - s), s = sigmoid(width * z)'

    def factor(self, z):
        s = z.abs_().mul_(-self.width).sigmoid_()  # of the side on which s - s^2 loses no digits
        return s.addcmul_(s, s, value=-1).mul_(4)


def users(flag: str) -> list[str]:
    """The names of the surrogates that a flag means something to."""
    return [name for name, surrogate in SURROGATES.items() if flag in surrogate.flags]


def meaning(flag: str) -> str:
    """What a flag is, and of which surrogates: 'width of Rectangle; steepness of ATan, Sigmoid'."""
    found = {}
    for name in users(flag):
        found.setdefault(SURROGATES[name].flags[flag], []).append(name)
    return '; '.join(f'{what} of {", ".join(names)}' for what, names in found.items())
