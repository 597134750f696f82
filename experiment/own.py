"""A network of one's own: a function or class NAME in a FILE.py that the command line names."""
import importlib.util
import inspect
import sys
from pathlib import Path

from torch import nn

from experiment import UserError


def build(architecture: str, labels: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """The network that FILE.py:NAME makes; NAME is given labels and input_shape (C, H, W) if it takes them.

    Raises UserError for a missing file or NAME, an error in it, and what is no nn.Module.
    """
    file, _, name = architecture.rpartition(':')
    path = Path(file).resolve()
    if not path.is_file():
        raise UserError(f'--architecture {architecture}: there is no file {file}')
    module = f'_own_network_{path.stem}'
    if getattr(sys.modules.get(module), '__file__', None) != str(path):
        spec = importlib.util.spec_from_file_location(module, path)
        loaded = sys.modules[module] = importlib.util.module_from_spec(spec)
        sys.path.append(str(path.parent))  # what lies beside it can be imported, as for a script
        try:
            spec.loader.exec_module(loaded)
        except (Exception, SystemExit) as error:  # anything, as it is the user's code
            del sys.modules[module]
            raise UserError(f'--architecture {architecture}: {_said(error, path)}') from error
    make = getattr(sys.modules[module], name, None)
    if not callable(make):
        raise UserError(f'--architecture {architecture}: {file} has no function or class {name}')
    known = {'labels': labels, 'input_shape': tuple(input_shape)}
    try:
        parameters = inspect.signature(make).parameters.values()
        takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
        given = {key: value for key, value in known.items() if takes_all or key in {each.name for each in parameters}}
        network = make(**given)
    except (Exception, SystemExit) as error:
        raise UserError(f'--architecture {architecture}: {_said(error, path)}') from error
    if not isinstance(network, nn.Module):
        raise UserError(f'--architecture {architecture}: {name} gives a {type(network).__name__}, not an nn.Module')
    if not any(True for _ in network.parameters()):
        raise UserError(f'--architecture {architecture}: {name} has no weights to train')
    return network


def _said(error, path):
    """An error of the user's code in a line, with the line of the file that it came from."""
    trace, line = error.__traceback__, None
    while trace:
        line = trace.tb_lineno if Path(trace.tb_frame.f_code.co_filename) == path else line
        trace = trace.tb_next
    line = getattr(error, 'lineno', None) or line
    text = ' '.join(str(error).split())
    return f'{type(error).__name__}{f" in line {line}" if line else ""}: {text}'
