"""The LIF layer's two scans over time as Triton kernels: the potentials stay in registers from step to step.

They do what `lif_forward` and `lif_backward` of lif.py do, which stay the reference, on CUDA, or on a CPU under
Triton's interpreter (TRITON_INTERPRET=1 set before this is imported).
"""
import math

import torch
import triton
import triton.language as tl

from self_models.surrogate import SpikeTimeDependent

BLOCK = 256  # neurons of a program


@triton.jit(do_not_specialize=['steps'])
def _forward(current, potentials, spikes, u, fired, scalars, steps, neurons, current_stride, potentials_stride,
             spikes_stride, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    # p[k] = lambda p[k-1] + I[k] - r s[k-1],   s[k] = [p[k] > theta]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < neurons
    leak, threshold, reset = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    potential = tl.load(u + i, inside, other=0)
    spike = tl.load(fired + i, inside, other=0) > 0
    step = 0
    while step < steps:  # not range(), for which Triton 3.6's interpreter fails on numpy 2.4
        potential = leak * potential + tl.load(current + i, inside, other=0)
        potential = tl.where(spike, potential - reset, potential)
        spike = potential > threshold
        if KEEP:
            tl.store(potentials + i, potential, inside)
        # by way of float32: Triton's interpreter turns a bool into the bits of a bfloat16
        tl.store(spikes + i, spike.to(tl.float32).to(spikes.dtype.element_ty), inside)
        current += current_stride  # not k * stride, which can pass 2^31
        potentials += potentials_stride
        spikes += spikes_stride
        step += 1
    tl.store(u + i, potential, inside)
    tl.store(fired + i, spike.to(fired.dtype.element_ty), inside)


@triton.jit(do_not_specialize=['steps'])
def _backward(grad, state, scalars, steps, neurons, grad_stride, state_stride, STDB: tl.constexpr,
              FACTORS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < neurons
    leak, factor, decay = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    last = (steps - 1).to(tl.int64)
    if STDB:
        # f[k] = exp(-beta) max(f[k-1], s[k-1]) is known from the past, the gradient from the future: two passes
        ahead, spikes = grad, state
        factors = tl.zeros([BLOCK], grad.dtype.element_ty) + factor
        step = 0
        while step < steps:
            tl.store(ahead + i, factors * tl.load(ahead + i, inside, other=0), inside)
            spike = tl.load(spikes + i, inside, other=0) > 0
            factors = decay * tl.where(spike, 1.0, factors)
            ahead += grad_stride
            spikes += state_stride
            step += 1
        tl.debug_barrier()  # what one thread stored above another may load below
    # g[k] = lambda g[k+1] + f[k] grad[k]
    grad += last * grad_stride
    state += last * state_stride
    carried = tl.zeros([BLOCK], grad.dtype.element_ty)
    step = 0
    while step < steps:
        value = tl.load(grad + i, inside, other=0)
        if FACTORS:
            value *= tl.load(state + i, inside, other=0)
        carried = leak * carried + value
        tl.store(grad + i, carried, inside)
        grad -= grad_stride
        state -= state_stride
        step += 1


def _scalars(tensor, *values):
    """Numbers in the tensor's own precision (Triton would pass float32), without the host waiting for a copy."""
    return torch.stack([value.to(tensor.dtype) if isinstance(value, torch.Tensor)
                        else torch.full((), value, dtype=tensor.dtype, device=tensor.device) for value in values])


def forward(current: torch.Tensor, potentials: torch.Tensor | None, spikes: torch.Tensor, u: torch.Tensor,
            fired: torch.Tensor, parameters) -> None:
    """lif_forward of lif.py, from the state (u, fired), which it overwrites with the last one."""
    keep, steps, neurons = potentials is not None, len(spikes), u.numel()
    target = potentials if keep else u  # a pointer that nothing is written to
    current = current if current.stride(-1) == 1 else current.contiguous()  # the kernel reads rows without gaps
    with torch.cuda.device_of(current):
        _forward[(triton.cdiv(neurons, BLOCK),)](
            current, target, spikes.view(torch.uint8) if spikes.dtype == torch.bool else spikes, u, fired,
            _scalars(u, parameters.leak, parameters.threshold, parameters.reset_by), steps, neurons,
            current.stride(0) if current.dim() == 2 else 0, target.stride(0) if keep else 0, spikes.stride(0),
            KEEP=keep, BLOCK=BLOCK)


def backward(grad: torch.Tensor, state: torch.Tensor, start: int, parameters) -> None:
    """lif_backward of lif.py: turns the gradient of the spikes, grad (n, M), into that of the currents in place."""
    (steps, neurons), surrogate, first, decay = grad.shape, parameters.surrogate, 0.0, 0.0
    stdb = type(surrogate) is SpikeTimeDependent
    if stdb:
        first, decay = surrogate.before_first_spike(start), math.exp(-surrogate.beta)
    elif surrogate.of_spikes:  # the kernel knows no other factor of the spikes
        surrogate.multiply(grad, state, start)
    with torch.cuda.device_of(grad):
        _backward[(triton.cdiv(neurons, BLOCK),)](
            grad, state.view(torch.uint8) if surrogate.of_spikes else state,
            _scalars(grad, parameters.leak, first, decay), steps, neurons, grad.stride(0), state.stride(0), STDB=stdb,
            FACTORS=not surrogate.of_spikes, BLOCK=BLOCK)
