"""The leaky integrate-and-fire (LIF) neuron: its parameters, its equations, and a layer of them over time.

Time steps t, membrane potential u, threshold theta, leak lambda (1: integrate-and-fire), input current I, spikes o; the
reset is soft, that is by subtraction. As published (Rathi et al. 2020, eqs. 1-4), with a delay of one step, a neuron
fires on the potential before this step's input; without delay it fires in the same step:

    delay 1   o(t) = [u(t-1) > theta],   u(t) = lambda u(t-1) + I(t) - theta o(t)
    delay 0   h(t) = lambda u(t-1) + I(t),   o(t) = [h(t) > theta],   u(t) = h(t) - theta o(t)

both from u(-1) = F theta. A layer is run over all its steps at once. With p[k] the potential after the input at row k,
which is u or h, and s[k] the spike that it causes, which leaves `delay` steps later, both are

    p[k] = lambda p[k-1] + I[k] - r s[k-1],   s[k] = [p[k] > theta],   r = theta (delay 1) or lambda theta (delay 0)
"""
from typing import NamedTuple

import torch

from self_models.surrogate import Surrogate


class LIFParameters(NamedTuple):
    """The parameters of an LIF layer.

    threshold, leak: numbers, or tensors () that gradients are wanted of. backend: 'torch', or 'triton' for the kernels
    of lif_triton.py. delay: steps from input to spike, 1 or 0. initial_potential: F, in thresholds.
    """
    threshold: float | torch.Tensor
    leak: float | torch.Tensor
    surrogate: Surrogate
    backend: str = 'torch'
    delay: int = 1
    initial_potential: float = 0.0

    @property
    def learned(self) -> bool:
        """Whether a gradient of the threshold or the leak is wanted."""
        return any(isinstance(value, torch.Tensor) and value.requires_grad for value in (self.threshold, self.leak))

    @property
    def height(self) -> float | torch.Tensor:
        """Of the surrogate, with respect to the potential: z = u / theta - 1, so dz/du = 1 / theta."""
        return self.surrogate.height / self.threshold

    @property
    def reset_by(self) -> float | torch.Tensor:
        """What a spike takes off the next row's potential."""
        return self.threshold if self.delay else self.leak * self.threshold

    def detached(self) -> 'LIFParameters':
        """The same without gradients; for the torch backend as plain numbers, which waits for a GPU."""
        def plain(value):
            if not isinstance(value, torch.Tensor):
                return value
            return value.detach() if self.backend == 'triton' else value.item()
        return self._replace(threshold=plain(self.threshold), leak=plain(self.leak))

    def initial_state(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(potential, spikes) before the first row, each like a row (M,)."""
        u = torch.zeros_like(like)
        if self.initial_potential:
            u += self.initial_potential * self.threshold
        return u, torch.zeros_like(like)


def lif_forward(current: torch.Tensor, spikes: torch.Tensor, parameters: LIFParameters,
                state: tuple[torch.Tensor, torch.Tensor] | None = None,
                potentials: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run LIF neurons over time: fill `spikes` and, if given, `potentials`; return the state after the last row.

    current: (n, M) floats, the input at n successive steps; or (M,), an input that is the same at all of them.
    spikes: (n, M) bool or floats, rows contiguous: row k is what current[:k+1] causes, which leaves `delay` steps
    later. Of the type of the potentials they are the quickest; the state then holds their last row itself.
    potentials: (n, M) floats to write p to, which may be `current` itself; None where they are not wanted.
    state: what the call on the rows before returned, (potential, spikes), each (M,); None at the start.
    """
    parameters = parameters.detached()
    if parameters.backend == 'triton':
        from self_models import lif_triton
        u, fired = state or parameters.initial_state(current[0] if current.dim() == 2 else current)
        lif_triton.forward(current, potentials, spikes, u, fired, parameters)
        return u, fired
    leak, reset, threshold = parameters.leak, parameters.reset_by, parameters.threshold
    u, fired = state or (current.new_full((1,), parameters.initial_potential * threshold), None)
    inputs = current.unbind() if current.dim() == 2 else [current] * len(spikes)
    outputs = [None] * len(spikes) if potentials is None else potentials.unbind()
    for row, out, fires in zip(inputs, outputs, spikes.unbind(), strict=True):
        # p[k] = lambda p[k-1] + I[k] - r s[k-1]
        if out is not None:
            u = torch.add(row, u, alpha=leak, out=out)
        else:
            u = u if leak == 1 else u.mul_(leak)
            u = row + u if fired is None else u.add_(row)
        if fired is not None:
            u.sub_(fired, alpha=reset)
        if spikes.dtype == u.dtype:
            fired = fires
        elif fired is None:
            fired = torch.empty_like(u)
        torch.gt(u, threshold, out=fired)  # as u / theta - 1 > 0, to the last bit
        if fired is not fires:
            fires.copy_(fired)  # by way of floats, as a CPU reads bools several times slower
    return u, fired


def lif_backward(grad: torch.Tensor, state: torch.Tensor, start: int, parameters: LIFParameters) -> None:
    """Turn the gradient of the spikes into that of the currents, in place.

    grad (n, M): the gradient of the spikes times parameters.height. state (n, M): surrogate_state() of the potentials.
    start: the step at which row 0's spikes leave.

    With ds/dp = height f, the reset without gradient:   g[k] = lambda g[k+1] + f[k] grad[k]
    """
    parameters = parameters.detached()
    if parameters.backend == 'triton':
        from self_models import lif_triton
        lif_triton.backward(grad, state, start, parameters)
        return
    parameters.surrogate.multiply(grad, state, start)
    later, *rows = reversed(grad.unbind())
    for row in rows:
        later = row.add_(later, alpha=parameters.leak)


def surrogate_state(potentials: torch.Tensor, parameters: LIFParameters) -> torch.Tensor:
    """What lif_backward needs, from the potentials p (n, M): the surrogate's factors, or the spikes (bool)."""
    return parameters.surrogate.state(potentials, parameters.detached().threshold)


def parameter_gradients(grad: torch.Tensor, potentials: torch.Tensor,
                        parameters: LIFParameters) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of the threshold, gradient of the leak), each (), from those of the currents.

    grad: g (n, M), as lif_backward leaves it; potentials: p (n, M). With f[k] grad[k] = g[k] - lambda g[k+1] and
    z = p / theta - 1, the gradients are

        theta    sum_k -(g[k] - lambda g[k+1]) p[k] / theta - (r / theta) g[k+1] s[k]   + F lambda g[0]
        lambda   sum_k g[k+1] (p[k] - [delay 0] theta s[k])                             + F theta g[0]
    """
    p = parameters.detached()
    with torch.autocast(grad.device.type, enabled=False):
        own = grad[-1] @ potentials[-1]  # sum_k (g[k] - lambda g[k+1]) p[k]
        carried = spiked = grad.new_zeros(())  # sum_k g[k+1] p[k], sum_k g[k+1] s[k]
        for row, later, potential in zip(grad[:-1].unbind(), grad[1:].unbind(), potentials.unbind(), strict=False):
            own = own + (row - p.leak * later) @ potential
            carried, spiked = carried + later @ potential, spiked + later @ (potential > p.threshold).to(later.dtype)
        first = p.initial_potential * grad[0].sum()
        threshold = -own / p.threshold - (p.reset_by / p.threshold) * spiked + p.leak * first
        leak = carried - (0 if p.delay else p.threshold) * spiked + p.threshold * first
        return threshold, leak
