"""What ann.py and snn.py share: data, checkpoints, epoch loops, options, logs, sweeps."""
import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Something the user can put right. Its text is one line that says what is wrong and what to do."""


@contextlib.contextmanager
def importing(package: str, what: str, advice: str | None = None) -> Iterator[None]:
    """Raise UserError if an import in the block fails, whatever it raises: a package that is there may be broken.

    what: what needs the package. advice: what to do, if that is not to install it.
    """
    try:
        yield
    except Exception as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        install = 'pip install' if isinstance(error, ModuleNotFoundError) else 'pip install --force-reinstall'
        raise UserError(f'{what}: needs {package}, which does not load ({reason}); '
                        f'{advice or f"{install} {package}"}') from error
