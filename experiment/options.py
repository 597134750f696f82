"""The flags that ann.py and snn.py have in common, their types, and how a script ends. It needs no torch."""
import argparse
import errno
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn, TextIO

from experiment import UserError
from self_models import surrogate
from self_models.architectures import ARCHITECTURES, INPUT_SHAPES

FLOAT32 = 2.0 ** -126, (2 - 2.0 ** -23) * 2.0 ** 127  # its smallest normal number and its largest


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False, open_high: bool = False,
           float32: bool = True) -> Callable:
    """An argparse type: a `kind` (int or float) in [low, high]; open_low, open_high: without that bound.

    float32: whether a float other than 0 must be finite and not 0 in float32, in which networks compute.
    """
    bounds = f'{"above" if open_low else "at least"} {low}'
    if high < math.inf:
        bounds += f' and {"below" if open_high else "at most"} {high}'

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf or open_low and value == low or open_high and value == high:
            noun = 'a whole number' if kind is int else 'a number'
            raise argparse.ArgumentTypeError(f'{text!r} is not {noun} {bounds}')
        if kind is float and float32 and value and not FLOAT32[0] <= abs(value) <= FLOAT32[1]:
            raise argparse.ArgumentTypeError(f'{text!r} is too {"large" if abs(value) > 1 else "small"} for float32, '
                                             f'which goes from {FLOAT32[0]:.2g} to {FLOAT32[1]:.2g}')
        return value

    return parse


positive_int, natural_int = number(int, 1, 2 ** 31 - 1), number(int, 0, 2 ** 31 - 1)
positive, non_negative = number(float, 0, open_low=True), number(float, 0)
fraction, percentile = number(float, 0, 1, open_low=True), number(float, 0, 100, open_low=True)
below_one = number(float, 0, 1, open_high=True)


def factor(text: str) -> float | str:
    """'auto' or a number above 0."""
    try:
        # the threshold that it gives is checked for float32, not the factor
        return text if text == 'auto' else number(float, 0, open_low=True, float32=False)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor 'auto'") from error


def odd_int(text: str) -> int:
    value = positive_int(text)
    if value % 2 == 0:
        raise argparse.ArgumentTypeError(f'{text!r} is even; a kernel needs an odd size to keep the image size')
    return value


def intervals(text: str) -> str:
    """'0.60 0.80 0.90' -> the same text, each part checked to be a fraction of the epochs in (0, 1]."""
    for part in text.split():
        fraction(part)
    return text


def devices(text: str) -> str:
    """'0' or '0,1': the CUDA devices by number."""
    numbers = [natural_int(part) for part in text.split(',')]
    if len(set(numbers)) < len(numbers):  # two processes cannot share a device: NCCL fails
        raise argparse.ArgumentTypeError(f'{text!r} names a device twice')
    return text


def name(text: str) -> str:
    """A part of file names; no other run's files can have the same names."""
    taken = text.startswith(('.', 'previous.')) or text.endswith(('.last', '.folded', '.log', '.jsonl'))
    if not text.isprintable() or '/' in text or taken or not 0 < len(text.encode()) <= 200:
        raise argparse.ArgumentTypeError(f"{text!r} does not serve as a file name: 1 to 200 bytes, no '/', not "
                                         "beginning with '.' or 'previous.', not ending in '.last', '.folded', '.log' "
                                         "or '.jsonl'")
    return text


def not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError('is empty; give a path, or leave the flag out')
    return text


def is_own_network(architecture: str) -> bool:
    """Whether an architecture is the user's own network, FILE.py:NAME."""
    return architecture.rpartition(':')[0].endswith('.py')


def architecture(text: str) -> str:
    """A name of architectures.py, in capitals, or FILE.py:NAME."""
    if is_own_network(text) or text.endswith('.py'):
        if not text.rpartition(':')[2].isidentifier():
            raise argparse.ArgumentTypeError(f'{text!r} names no function or class in the file: FILE.py:NAME')
        return text
    if text.upper() not in ARCHITECTURES:
        raise argparse.ArgumentTypeError(
            f'invalid choice: {text!r} (choose from {", ".join(map(repr, ARCHITECTURES))}, or FILE.py:NAME, a network '
            'of your own)')
    return text.upper()


class Switch(argparse.Action):
    """A boolean that understands --flag, --no-flag, --flag True and --flag False."""

    WORDS = {'true': True, 'yes': True, '1': True, 'false': False, 'no': False, '0': False}

    def __init__(self, option_strings: list[str], dest: str, default: bool | None = False, help: str | None = None):
        strings = [*option_strings, *('--no-' + s[2:] for s in option_strings if s.startswith('--'))]
        super().__init__(strings, dest, nargs='?', default=default, help=help, metavar='BOOL')

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: str | None,
                 option_string: str | None = None) -> None:
        negative = option_string.startswith('--no-')
        if value is None:
            result = not negative
        elif negative or value.lower() not in self.WORDS:
            parser.error(f'{option_string} {value}: use {self.option_strings[0]}, --no-{self.dest} '
                         f'or {self.option_strings[0]} True|False')
        else:
            result = self.WORDS[value.lower()]
        setattr(namespace, self.dest, result)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage, and that knows no abbreviations."""

    def __init__(self, **options: object):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        fail(self.prog, message, 2)

    def print_help(self, file: TextIO | None = None) -> None:
        try:
            super().print_help(file)
        except OSError:  # the output is full; exit() handles it, as some versions of argparse ignore the error
            pass

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        flush_output()  # of --help
        super().exit(status, message)


class Parser(OneLineParser):
    """A OneLineParser whose result also holds `given`, the names of the arguments on the command line, and `defaults`,
    the default of each argument."""

    def __init__(self, **options: object):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        if message.startswith('unrecognized arguments: ') and not message.split(': ')[1].startswith('-'):
            message += '; put a value with spaces in quotes'
        super().error(message)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None,
                         ) -> tuple[argparse.Namespace, list[str]]:
        unset = object()
        probe = argparse.Namespace(**{action.dest: unset for action in self._actions})
        super().parse_known_args(args, probe)
        parsed, rest = super().parse_known_args(args, namespace)
        parsed.given = {name for name, value in vars(probe).items() if value is not unset}
        parsed.defaults = {name: self.get_default(name) for name in vars(probe)}
        return parsed, rest


def common_options(parser: argparse.ArgumentParser, learning_rate: float, optimizer: str, momentum: float,
                   dropout: float) -> None:
    """Add the flags of both scripts. The arguments are the defaults that differ between them."""
    add = parser.add_argument_group('network').add_argument
    add('-a', '--architecture', type=architecture, default='VGG16', metavar='NAME|FILE.py:NAME',
        help=f'{", ".join(ARCHITECTURES)}; or a function or class of your own that returns a network; default '
             '%(default)s')
    add('--dropout', type=below_one, default=dropout, metavar='P',
        help="dropout after convolutions that no pool follows (in a VGG's classifier 0.5); default %(default)s")
    add('--kernel_size', type=odd_int, default=3, metavar='K', help='of the VGG convolutions; default %(default)s')

    add = parser.add_argument_group('data').add_argument
    add('--dataset', type=str.upper, default='CIFAR10', choices=list(INPUT_SHAPES), help='default %(default)s')
    add('--data_dir', default='~/Datasets', metavar='DIR', help='folder of the data sets; default %(default)s')
    add('--image_size', type=number(int, 1, 4096), default=32, metavar='PIXELS',
        help='height and width to which FOLDER pictures are resized; default %(default)s')
    add('--num_workers', type=natural_int, default=2, metavar='N',
        help='processes that load data, 0 for none; default %(default)s')
    add('--train_samples', type=positive_int, metavar='N', help='train on a seeded subset of N images')
    add('--test_samples', type=positive_int, metavar='N', help='test on a seeded subset of N images')
    add('--validation_fraction', type=below_one, default=0.0, metavar='F',
        help='hold out this part of the training set and choose the best epoch on it; default 0: choose on the test '
             'set')
    add('--crop', type=number(int, 0, 32), default=4, metavar='PIXELS',
        help='shift each training image of CIFAR or FOLDER at random by up to so many pixels, 0 to 32; each is '
             'also flipped with probability 1/2; default %(default)s')
    add('--cutout', type=natural_int, default=0, metavar='PIXELS',
        help='blot out a square of this size in each training image, at a random place; default 0: none')

    add = parser.add_argument_group('training').add_argument
    add('--epochs', type=positive_int, default=300, metavar='N', help='default %(default)s')
    add('--batch_size', type=positive_int, default=64, metavar='N', help='default %(default)s')
    add('-lr', '--learning_rate', type=positive, default=learning_rate, metavar='LR', help='default %(default)s')
    add('--lr_interval', type=intervals, default='0.60 0.80 0.90', metavar='"F F F"',
        help='fractions of the epochs at which the learning rate is divided; default "%(default)s"')
    add('--lr_reduce', type=positive, default=10.0, metavar='X', help='it is divided by this; default %(default)s')
    add('--lr_schedule', default='step', choices=['step', 'cosine'],
        help='step: see --lr_interval; cosine: down to 0 over the epochs, after a short warm-up; default %(default)s')
    add('--optimizer', default=optimizer, choices=['SGD', 'Adam'], help='default %(default)s')
    add('--label_smoothing', type=below_one, default=0.0, metavar='X',
        help='spread this part of each training label evenly over all labels; default %(default)s')
    add('--weight_decay', type=non_negative, default=5e-4, metavar='X', help='default %(default)s')
    add('--momentum', type=number(float, 0, 1), default=momentum, metavar='X', help='of SGD; default %(default)s')
    add('--amsgrad', action=Switch, default=True, help='of Adam; default %(default)s')

    add = parser.add_argument_group('run').add_argument
    add('-s', '--seed', type=natural_int, default=0, metavar='N', help='default %(default)s')
    add('--gpu', action=Switch, default=None, help='use CUDA; default: if torch finds it')
    add('--amp', action=Switch, help='convolutions and matrix products in bfloat16 (autocast)')
    add('--devices', type=devices, default='0', metavar='N', help='number of the CUDA device; default %(default)s')
    add('--log', action=Switch, help='write logs/... instead of printing to the terminal')
    add('--tensorboard', action=Switch, help='write scalars for TensorBoard too')
    add('--name', type=name, help='name of the log and the checkpoints, in place of one made of the settings')
    add('--test_only', action=Switch, help='evaluate once; write no checkpoint')
    add('--resume', type=not_empty, nargs='?', const='last', metavar='FILE|auto',
        help="resume from this run's last checkpoint or from FILE; 'auto': from the last checkpoint if there is one")


# flags of a conversion; they do not apply to a network from scratch or one that is converted already
CONVERSION = ('scaling_factor', 'threshold_percentile', 'calibration_samples', 'calibration_timesteps')

# flags without effect in a test
TRAINING = ('epochs', 'learning_rate', 'lr_interval', 'lr_reduce', 'lr_schedule', 'optimizer', 'label_smoothing',
            'weight_decay', 'momentum', 'amsgrad', 'dropout', 'learn_threshold', 'learn_leak', 'tensorboard',
            'train_acc_batches')
# flags that --predict uses: the network, its device, and the random draws of its input
PREDICTING = {'predict', 'pretrained_snn', 'architecture', 'kernel_size', 'dataset', 'image_size', 'timesteps', 'leak',
              'encoding', 'delay', 'initial_potential', 'output', 'default_threshold', 'seed', 'gpu', 'devices', 'amp',
              'backend'}


def without_effect(settings: dict) -> dict[str, str]:
    """{flag: what it belongs to} of the flags without effect among a run's arguments, {name: value}."""
    get = settings.get
    own = is_own_network(str(get('architecture')))
    vgg = not own and str(get('architecture')).startswith('VGG')
    predict, from_ann = get('predict'), bool(get('pretrained_ann'))
    balances = from_ann or bool(get('pretrained_snn')) or 'default_threshold' not in get('given', ())
    on_training_images = balances and 'scaling_factor' in settings and not get('pretrained_snn')
    rules = [  # (what the flags belong to, whether the run has that, the flags)
        ('--lr_schedule step', get('lr_schedule', 'step') == 'step', ['lr_interval', 'lr_reduce']),
        ('--optimizer SGD', get('optimizer') == 'SGD', ['momentum']),
        ('--optimizer Adam', get('optimizer') == 'Adam', ['amsgrad']),
        *((f'--activation {" or ".join(surrogate.users(flag))}', get('activation') in surrogate.users(flag), [flag])
          for flag in surrogate.FLAGS),
        ('--activation QCFS', get('activation') == 'QCFS', ['levels', 'bounds']),
        ('--dataset FOLDER', get('dataset') == 'FOLDER', ['image_size']),
        ('--dataset CIFAR10, CIFAR100 or FOLDER', get('dataset') in ('CIFAR10', 'CIFAR100', 'FOLDER'), ['crop']),
        ('VGGs', vgg, ['kernel_size']),
        ('the published networks; your own network keeps it always', not own, ['keep_batch_norm']),
        ('the published networks', not own, ['dropout', 'batch_norm']),
        ('conversions of ResNets', from_ann and not (own or vgg), ['balance_blocks']),
        # a conversion balances all thresholds of a VGG or of the user's own network
        ('ResNets and networks from scratch', not ((vgg or own) and (predict or from_ann)), ['default_threshold']),
        ('a conversion or a balancing, which --default_threshold replaces', balances, CONVERSION),
        ('--encoding poisson', not (predict and get('encoding') == 'direct'), ['seed']),
        ('training', not get('test_only'), TRAINING),
        ('training or a balancing', on_training_images or not get('test_only'), ['crop', 'cutout']),
        ('runs that train or test', not predict, settings.keys() - PREDICTING)]
    return {flag: of for of, holds, flags in rules if not holds for flag in flags if flag in settings}


def prepare_streams() -> None:
    """Make print() work on any terminal, and if the standard output or error is closed."""
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, 'w'))
        elif hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')  # for characters that the terminal cannot show


def flush_output() -> None:
    """Write what is printed. If the output cannot be written, Python's flush at exit does not fail again."""
    try:
        if sys.stdout:  # else it is closed
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def said(error: OSError) -> str:
    """An OSError in one line."""
    if error.filename is None and error.errno in (errno.ENOSPC, errno.EPIPE, errno.EDQUOT):
        return f'the output or log cannot be written ({error.strerror}); make room, or write elsewhere'
    where = f'{error.filename}: ' if error.filename else ''
    return f'{where}{error.strerror or error}'


def several_processes() -> bool:
    """Whether torchrun started this process beside others.

    A WORLD_SIZE without torchrun's address, left over in a shell or container, does not count.
    """
    try:
        rank, size, port = (int(os.environ[name]) for name in ('RANK', 'WORLD_SIZE', 'MASTER_PORT'))
        int(os.environ.get('LOCAL_RANK', 0))
    except (KeyError, ValueError):
        return False
    return 0 <= rank < size > 1 and 0 < port < 2 ** 16 and bool(os.environ.get('MASTER_ADDR'))


def fail(script: str, message: str, status: int = 1, main_waits: bool = False) -> NoReturn:
    """End a script with one line on stderr and a status that is not 0.

    Several processes usually fail for the same reason, and torchrun ends the others once one has ended. So all
    processes but the main one wait before they print. main_waits: the main process waits, too.
    """
    line = f'{script}: error: {" ".join(message.splitlines())}'
    flush_output()
    if several_processes():
        if main_waits or os.environ.get('RANK') != '0':
            _end_on_signals()
            time.sleep(5)
        print(line, file=sys.stderr, flush=True)
        os._exit(status)  # torch may abort in Python's shutdown, see distributed.stop()
    if status == 1:
        sys.exit(line)
    print(line, file=sys.stderr)
    sys.exit(status)


def _end_on_signals():
    """From now on torchrun's signal and Ctrl-C end this process at once, without a message."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _stop(process, *_):
    """The handler of Ctrl-C and of SIGTERM, which a batch scheduler sends, often to all processes of a run.

    process: the number of the process that set it. Processes that load data inherit it until torch sets their own.
    """
    if os.getpid() != process:
        os._exit(0)
    sys.unraisablehook = _nothing  # no message from a loader that was about to start
    if hasattr(signal, 'SIGCHLD'):  # not on Windows; torch's handler raises an error when processes that load data end
        signal.signal(signal.SIGCHLD, _nothing)
    raise KeyboardInterrupt


def _nothing(*_):
    pass


def dead_worker(error: Exception) -> UserError | None:
    """The UserError for an error that means that a process that loads data died, else None.

    error: torch's RuntimeError, which may come at any line, or a loader's OSError or EOFError.
    """
    lost = isinstance(error, OSError | EOFError) and not str(error).startswith('Caught ')  # torch's prefix
    if not lost and not str(error).startswith('DataLoader worker'):
        return None
    if sys.unraisablehook == _nothing:  # a KeyboardInterrupt was lost while processes started
        raise KeyboardInterrupt
    time.sleep(2)  # a signal to all processes may have reached the loader first
    return UserError('a process that loads data died, probably as memory or shared memory ran out; '
                     'lower --num_workers or --batch_size')


def run(main: Callable, args: argparse.Namespace, script: str) -> None:
    """Run main(args) as a command. An error that the user can put right ends in one line on stderr and status 1."""
    prepare_streams()
    if several_processes() and os.environ.get('RANK') != '0':
        _end_on_signals()  # it writes no files, and some code swallows a KeyboardInterrupt
    else:
        signal.signal(signal.SIGTERM, partial(_stop, os.getpid()))
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # a job in the background ignores it
            signal.signal(signal.SIGINT, partial(_stop, os.getpid()))
    try:
        _report_errors(main, args, script)
    except KeyboardInterrupt:
        print(f'\n{script}: stopped; the last checkpoint is whole; --resume resumes from it, if there is one',
              file=sys.stderr, flush=True)
        if several_processes():
            os._exit(130)
        sys.exit(130)


def _report_errors(main, args, script):
    try:
        main(args)
        sys.stdout.flush()
        if several_processes():
            from experiment import distributed
            distributed.stop()
    except UserError as error:
        fail(script, str(error))
    except (RuntimeError, MemoryError) as error:
        if died := dead_worker(error):
            fail(script, str(died))
        if isinstance(error, MemoryError) or any(words in str(error) for words in (
                'out of memory', 'allocate memory', 'ALLOC_FAILED', 'calculation overflowed')):
            fail(script, 'out of memory; lower --batch_size, --timesteps, --image_size or --kernel_size')
        if several_processes():
            from experiment import distributed
            if distributed.is_of_an_ended_process(error):
                fail(script, 'another process of this run has ended, so this one ends, too'
                     f'{distributed.cause_of(error)}', main_waits=True)
        raise
    except OSError as error:
        fail(script, said(error))
