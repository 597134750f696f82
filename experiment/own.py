"""Your own network: a function or class NAME in a FILE.py that the command line names."""
import copy
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from experiment import UserError, options
from self_models.layers import BatchNorm1d, BatchNorm2d
from self_models.traced import activations_of, compiled, trace


def find(architecture: str) -> Callable:
    """What FILE.py:NAME names; the file has run. Raises UserError for a missing file or NAME, or an error in it."""
    file, _, name = architecture.rpartition(':')
    path = Path(file).resolve()
    if not path.is_file():
        _refuse(architecture, f'there is no file {file}')
    try:
        make = getattr(_module(path), name, None)
    except (Exception, SystemExit) as error:  # anything, as it is the user's code
        _refuse(architecture, error=error)
    if make is None:
        _refuse(architecture, f'{file} has no function or class {name}')
    if isinstance(make, nn.Module):
        _refuse(architecture, f'{name} in {file} is a network: give a function or class that returns it')
    if not callable(make):
        _refuse(architecture, f'{name} in {file} is of type {type(make).__name__}: give a function or class')
    return make


def build(architecture: str, labels: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """The network that FILE.py:NAME makes; NAME is given labels and input_shape (C, H, W) if it takes them.

    It has run once, on images of zeros. Raises UserError as `find` does, for an error in NAME, for a result that is no
    nn.Module or has no weights, for a network that cannot become a spiking one, and for one that does not take images
    of input_shape or does not give (B, labels).
    """
    make, name, refuse = find(architecture), architecture.rpartition(':')[2], partial(_refuse, architecture)
    known = {'labels': labels, 'input_shape': tuple(input_shape)}
    try:
        parameters = inspect.signature(make).parameters
        takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        given = {key: value for key, value in known.items() if takes_all or key in parameters}
        network = make(**given)
    except (Exception, SystemExit) as error:
        refuse(error=error)
    if not isinstance(network, nn.Module):
        refuse(f'{name} gives {type(network).__name__}, not an nn.Module')
    if not any(weight.requires_grad for weight in network.parameters()):
        refuse(f'{name} has no weights to train')
    try:
        activations_of(*trace(network))
    except ValueError as error:  # which names the module
        refuse(error)
    except Exception as error:
        refuse('cannot be traced: ', error)
    try:
        _run(network, labels, input_shape, refuse)
    except UserError:
        raise
    except Exception as error:
        refuse(f'its forward fails on images of {"x".join(map(str, input_shape))} (channels, height, width): ', error)
    for module in network.modules():  # a last batch may hold a single image
        module.__class__ = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d}.get(type(module), type(module))
    return network


def _module(path):
    """The module that a file makes, run once."""
    name = f'_own_network_{path.stem}'
    if getattr(sys.modules.get(name), '__file__', None) != str(path):
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.path.append(str(path.parent))  # files in its folder can be imported, as by a script
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _run(network, labels, input_shape, refuse):
    """Run a copy of a network on two images, in evaluation and in training; weights that neither uses are frozen."""
    images = torch.zeros(2, *input_shape)
    network.eval()
    with torch.no_grad():
        network(images)  # which also makes the weights of lazy modules
    network.train()
    copied = copy.deepcopy(network)
    for mode in ('evaluation', 'training'):  # a single pass of training may leave parts out at random
        copied.train(mode == 'training')
        output = copied(torch.zeros_like(images))
        if not isinstance(output, torch.Tensor):
            refuse(f'its forward gives a {type(output).__name__} in {mode}, not a tensor of logits')
        if output.shape != (2, labels):
            refuse(f'gives outputs of shape {tuple(output.shape)} for 2 images in {mode}, not (2, {labels}): the data '
                   f'have {labels} classes')
        if mode == 'training' and options.several_processes():  # which wait for the gradients of all weights
            copied.zero_grad()
        output.sum().backward()
    for weight, used in zip(network.parameters(), copied.parameters()):
        weight.requires_grad_(weight.requires_grad and used.grad is not None)
    _compare(network, images, refuse)


def _compare(network, images, refuse):
    """Refuse a network that computes something else than its graph, of which a spiking one is made, in evaluation."""
    draw, network = torch.Generator().manual_seed(0), copy.deepcopy(network)
    network.eval()
    images = torch.rand(images.shape, generator=draw)
    for weight in network.parameters():
        if weight.is_floating_point() and not weight.any():  # behind zeros, nothing would differ
            weight.data = torch.rand(weight.shape, generator=draw, dtype=weight.dtype)
    tree, graph = trace(network)
    tree.eval()
    with torch.no_grad():
        wanted = network(images.clone())
        try:
            same = torch.allclose(compiled(graph)(tree, images.clone()), wanted, 1e-3, 1e-5, equal_nan=True)
        except Exception as error:
            refuse('what torch.fx follows of its forward fails: ', error)
    if not same:
        refuse('its forward computes something else than what torch.fx follows of it: write it without conditions on '
               'its input, such as isinstance(x, torch.Tensor)')


def _refuse(architecture, why='', error=None):
    said = _said(error, Path(architecture.rpartition(':')[0]).resolve()) if error else ''
    raise UserError(f'--architecture {architecture}: {why}{said}') from error


def _said(error, path):
    """An error of the user's code as one line, with the number of the line that it came from."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if Path(frame.f_code.co_filename) == path]
    line, text = lines[-1] if lines else None, str(error)
    if isinstance(error, SyntaxError) and error.filename == str(path):
        line, text = error.lineno, error.msg
    if isinstance(error, ImportError) and 'relative import' in text:
        text += '; import a file of the same folder by its name, without the dot'
    return f'{type(error).__name__}{f" in line {line}" if line else ""}: {" ".join(text.split())}'
