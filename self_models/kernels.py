"""The LIF layer's two scans over time as Triton kernels: the potentials stay in registers from step to step.

They do what `integrate` and `integrate_backward` of neuron.py do, which stay the reference, on CUDA, or on a CPU
under Triton's interpreter (TRITON_INTERPRET=1 set before this is imported).
"""
import torch
import triton
import triton.language as tl

BLOCK = 256  # neurons of a program


@triton.jit(do_not_specialize=['steps'])
def _forward(current, codes, u, spikes, scalars, steps, neurons, current_stride, code_stride, BLOCK: tl.constexpr):
    # u(t) = leak u(t-1) + I(t) - threshold o(t), o(t) = [u(t-1) > threshold]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < neurons
    leak, threshold = tl.load(scalars), tl.load(scalars + 1)
    potential = tl.load(u + i, inside, other=0)
    fired = tl.load(spikes + i, inside, other=0) > 0
    code = tl.zeros([BLOCK], tl.int32)
    for k in range(steps):
        potential = leak * potential + tl.load(current + i, inside, other=0)
        potential = tl.where(fired, potential - threshold, potential)
        fired = potential > threshold
        code = tl.where(fired, k + 1, code)
        tl.store(current + i, potential, inside)
        tl.store(codes + i, code.to(codes.dtype.element_ty), inside)
        current += current_stride  # not k * stride, which can pass 2^31
        codes += code_stride
    tl.store(u + i, potential, inside)
    tl.store(spikes + i, fired.to(spikes.dtype.element_ty), inside)


@triton.jit(do_not_specialize=['steps', 'never'])  # not a new compilation for each layer and T
def _backward(grad, state, scalars, steps, neurons, grad_stride, state_stride, never, STDB: tl.constexpr,
              BLOCK: tl.constexpr):
    # g[k] = leak g[k+1] + scale f[k] grad[k]; f is exp(-beta dt) for STDB, else it stands in `state`
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < neurons
    leak, scale, beta = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    last = (steps - 1).to(tl.int64)
    grad += last * grad_stride
    state += last * state_stride
    carried = tl.zeros([BLOCK], grad.dtype.element_ty)
    for j in range(steps):
        k = steps - 1 - j
        if STDB:
            # the last spike before row k stands in row k - 1; without one, dt reaches back to step -999
            code = tl.load(state - state_stride + i, inside & (k > 0), other=0).to(tl.int32)
            dt = tl.where(code > 0, k + 1 - code, k + never)
            factor = tl.exp(-beta * dt.to(carried.dtype))
        else:
            factor = tl.load(state + i, inside, other=0)
        carried = leak * carried + scale * factor * tl.load(grad + i, inside, other=0)
        tl.store(grad + i, carried, inside)
        grad -= grad_stride
        state -= state_stride


def _scalars(tensor, *values):
    """Numbers in the tensor's own precision (Triton would pass float32), without the host waiting for a copy."""
    return torch.stack([torch.full((), value, dtype=tensor.dtype, device=tensor.device) for value in values])


def integrate(current, codes, neuron, state=None):
    """neuron.integrate: fills codes and turns current (n, M) into potentials in place; returns (u, spikes)."""
    steps, neurons = current.shape
    u, spikes = state or (torch.zeros_like(current[0]), torch.zeros_like(current[0]))
    _forward[(triton.cdiv(neurons, BLOCK),)](
        current, codes, u, spikes, _scalars(current, neuron.leak, neuron.threshold), steps, neurons,
        current.stride(0), codes.stride(0), BLOCK=BLOCK)
    return u, spikes


def integrate_backward(grad, state, start, neuron):
    """neuron.integrate_backward: turns the gradient of the spikes, grad (n, M), into that of the currents in place."""
    from self_models.neuron import NEVER, surrogate_scale
    steps, neurons = grad.shape
    _backward[(triton.cdiv(neurons, BLOCK),)](
        grad, state, _scalars(grad, neuron.leak, surrogate_scale(neuron), neuron.beta), steps, neurons,
        grad.stride(0), state.stride(0), start + NEVER, STDB=neuron.activation == 'STDB', BLOCK=BLOCK)
