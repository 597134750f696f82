"""Write script.sh: a run of ann.py or snn.py for every combination of the values given for its flags.

With --slurm the script is an array of Slurm jobs. ann_script.py and snn_script.py call main(). The flags come from the
target's own parser, which also parses each command before anything is written.
"""
import argparse
import itertools
import math
import os
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from experiment import UserError, options
from experiment.files import identifier, paths, write_atomically
from experiment.reporting import figures, summary

SBATCH = ('gpus', 'time', 'partition')  # flags for sbatch
Pair = tuple[str, str | None]  # an option and its value, or None


class Values(argparse.Action):
    """Collect a target's flag in args.flags: {dest: [(option, text), ...]}, the text None for a flag without value."""

    def __call__(self, parser, args, texts, option) -> None:
        if not option.startswith('--'):
            option = next(s for s in self.option_strings if s.startswith('--'))
        pairs = [(option, text) for text in texts or [None]]
        # a new dict, as the first one is the parser's; a flag given twice is swept over all its values
        args.flags = {**args.flags, self.dest: args.flags.get(self.dest, []) + pairs}


def script_path(text: str) -> str:
    if not text.endswith('.sh'):
        raise argparse.ArgumentTypeError(f'{text!r} does not end in .sh; name a script')
    return text


def figure_path(text: str) -> str:
    if not text.endswith('.png'):
        raise argparse.ArgumentTypeError(f'{text!r} does not end in .png; name a PNG')
    return text


def slurm_value(text: str) -> str:
    if text[:1] in ('', '-') or ' ' in text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is no value for sbatch: leave out spaces and a '-' in front")
    return text


def get_args_parser(kind: str, target: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags of the parser `target` (of ann.py or snn.py), each with one value or several, and the sweep's own."""
    parser = options.OneLineParser(
        prog=f'{kind}_script.py',
        usage=f'%(prog)s [--parallel | --jobs N] [--script FILE] [--slurm [--gpus G] [--time T] [--partition P]] '
              f'[flags of {kind}.py, each with one value or several], or --summarize FILE ... [--markdown] '
              '[--columns NAME ...] [--figure FILE.png] [--over_timesteps FILE.png]',
        description=f'Write a script that runs {kind}.py for every combination of the values given, the last flag '
                    f'varying fastest, each run under its own --name. Without flags of {kind}.py: the published run.')
    add = parser.add_mutually_exclusive_group().add_argument
    add('--parallel', action='store_true', help='start all runs at once')
    add('--jobs', type=options.positive_int, metavar='N',
        help='at most N runs at a time; default 1, with --slurm as many as Slurm starts')
    parser.add_argument('--script', type=script_path, default='script.sh', metavar='FILE',
                        help='the script to write; default %(default)s')
    add = parser.add_argument_group('Slurm').add_argument
    add('--slurm', action='store_true', help='write an array of jobs for sbatch, a task for each run')
    add('--gpus', type=slurm_value, metavar='N', help='GPUs of a task; see sbatch')
    add('--time', type=slurm_value, metavar='TIME', help='time limit of a task; see sbatch')
    add('--partition', type=slurm_value, metavar='NAME', help='where the tasks run; see sbatch')
    add = parser.add_argument_group('results').add_argument
    add('--summarize', type=options.not_empty, nargs='+', metavar='FILE', help='instead of a script, print a table of '
        f'these metrics files (logs/{kind}/*.jsonl), with mean and spread over seeds')
    add('--markdown', action='store_true', help='the table in Markdown')
    add('--columns', nargs='+', metavar='NAME', help='only these columns: settings, seeds, ANN, converted, last epoch, '
        'test accuracy, epochs done, s/epoch, machine; or scaling factors that were tried')
    add('--figure', type=figure_path, metavar='FILE.png',
        help='also draw accuracy over epochs, over time steps and by scaling factor')
    add('--over_timesteps', type=figure_path, metavar='FILE.png',
        help="also draw the best epochs' accuracy over T: ANNs, published and low latency networks")
    parser.set_defaults(flags={})
    own = {'flags', *(action.dest for action in parser._actions)}
    add = parser.add_argument_group(f'flags of {kind}.py').add_argument
    for action in target._actions:
        if action.dest == 'help' or not action.option_strings:
            continue
        if action.dest in own:  # two flags of one spelling argparse itself refuses
            raise ValueError(f'{action.option_strings[0]} of {kind}.py clashes with a flag of {kind}_script.py')
        choices = f'{", ".join(map(str, action.choices))}; ' if action.choices else ''
        add(*action.option_strings, action=Values, dest=action.dest, nargs='*' if action.nargs in (0, '?') else '+',
            default=action.default, metavar=action.metavar, help=choices + (action.help or ''))
    return parser


def words(pairs: Iterable[Pair]) -> list[str]:
    """[('--seed', '0'), ('--gpu', None)] -> ['--seed', '0', '--gpu']"""
    # '=', as a value that begins with '-' would be taken for a flag
    return [word for option, text in pairs for word in (
        [option] if text is None else [f'{option}={text}'] if text.startswith('-') else [option, text])]


def distinct(texts: list[str]) -> bool:
    """Whether no two are equal, also on a file system that does not tell upper from lower case."""
    return len({text.casefold() for text in texts}) == len(texts)


def plain(text: str) -> str:
    """The text with a dash in place of characters that are special in a file name."""
    return re.sub(r'[^\w.,=+-]+', '-', text)


def labels(texts: list[str]) -> list[str]:
    """Distinct parts of a file name for the values of one flag: 'x/a.pth' is 'a', or 'x-a.pth' beside 'y/a.pth'."""
    short = [os.path.basename(text.rstrip('/')).removesuffix('.pth') for text in texts]
    numbered = [f'{text}-{i}' for i, text in enumerate(short, 1)]
    return next(filter(distinct, (list(map(plain, form)) for form in (short, texts, numbered))))


def checkpoints_of(kind: str, flags: dict[str, list[Pair]]) -> list[str]:
    """The flags of a sweep that name a checkpoint which sets the network, data or time steps, since no flag does."""
    named = ['pretrained_snn', 'resume'] if kind == 'snn' else []
    if not {'architecture', 'dataset'} <= flags.keys():
        named += ['pretrained_ann', 'resume']
    return [dest for dest in named if any(text not in (None, 'auto', 'last') for _, text in flags.get(dest, []))]


def seen_from(root: str, word: str) -> str:
    """FILE.py:NAME with the path as seen from the folder `root`, where the script runs; any other word as it is.

    A FILE that is not here is already relative to `root`, as paths of other flags are.
    """
    path, _, name = word.rpartition(':')
    here = options.is_own_network(word) and os.path.isfile(path) and not os.path.isabs(path)
    return f'{os.path.relpath(path, os.path.realpath(root))}:{name}' if here else word


def expand(kind: str, target: argparse.ArgumentParser, flags: dict[str, list[Pair]]) -> list[list[str]]:
    """The command-line words of each run, every one of them parsed by `target`; its error() ends the first misfit.

    flags: {dest: [(option, text), ...]} as Values collects them. Several runs each get a --name: the identifier that
    a run would have anyway and, sorted, the flags that vary without showing in it. So a run's name does not depend on
    the order in which flags are written, and a sweep can be generated anew to resume it. If a checkpoint says what
    network it is, the name is made of that file's and of what flags say: nobody has read the checkpoint.
    """
    def parse(run):
        return target.parse_args(words(run.values()))

    runs = [dict(zip(flags, pairs)) for pairs in itertools.product(*flags.values())]
    if len(runs) == 1:
        parse(runs[0])
        return [words(runs[0].values())]
    for dest in ('report', 'export_nir'):
        if len(flags.get(dest, runs)) < len(runs):
            target.error(f'argument --{dest}: the runs would overwrite each other; leave it out, and give it for each '
                         'run, with snn.py --test_only --pretrained_snn FILE')

    checkpoints = checkpoints_of(kind, flags) if 'name' not in flags else []
    named = {*checkpoints, 'architecture', 'dataset', 'timesteps'} if checkpoints else ()

    def own(args):
        return kind if checkpoints else identifier(kind, args)

    parts = {}  # {dest: {(option, text): the part of a name}}
    for dest, pairs in flags.items():
        parsed = [parse({**runs[0], dest: pair}) for pair in pairs]
        values = [getattr(args, dest) for args in parsed]
        texts = [str(value) if text is None else text for value, (_, text) in zip(values, pairs)]
        for i, (option, _) in enumerate(pairs):
            if (first := values.index(values[i])) < i:
                target.error(f'argument {option}: {texts[first]!r} and {texts[i]!r} are the same value; leave one out')
        if dest in named or not distinct(list(map(own, parsed))):
            parts[dest] = {pair: dest + ('' if label[:1].isdigit() else '-') + label
                           for pair, label in zip(pairs, labels(texts))}

    for run in runs:
        name = '_'.join([own(parse(run)), *(parts[dest][run[dest]] for dest in sorted(parts))])
        run['name'] = ('--name', name.removesuffix('.last').removesuffix('.folded'))
    names = [identifier(kind, parse(run)) for run in runs]
    if not distinct([str(path) for name in names for path in paths(kind, name)]):
        target.error(f'two runs would share a checkpoint, among: {" ".join(sorted(names))}; add --name')
    return [words(run.values()) for run in runs]


def way_home(path: str, root: str) -> str:
    """The folder `root` as seen from the script at `path`, for bash; '' if the script is outside of root.

    It also works if the script is called through a link. A link at `path` is replaced.
    """
    up = os.path.relpath(os.path.realpath(root), os.path.realpath(os.path.dirname(path)))
    if not set(up.split(os.sep)) <= {'.', '..'}:
        return ''  # the path would name folders of this machine
    here = '$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")'  # an old macOS has no -f
    return here + ('' if up == '.' else f'/{up}')


def fill(template: str, **values) -> str:
    """The text of a file in this folder, with a value for each @name@."""
    text = Path(__file__).with_name(template).read_text()
    return re.sub('@([a-z_]+)@', lambda found: str(values[found[1]]), text)


def main(module: ModuleType, published: list[str], argv: list[str] | None = None) -> None:
    """Write the script that runs `module` (ann or snn) with the flags in argv; if it has none, with `published`."""
    options.prepare_streams()
    argv = sys.argv[1:] if argv is None else argv
    kind, target = module.__name__, module.get_args_parser()
    parser = get_args_parser(kind, target)
    target.error = parser.error
    try:
        args = parser.parse_args(argv)
        check(args, parser)
        if args.summarize:
            summarize(args, parser.prog)
        else:
            args.flags = args.flags or parser.parse_args(published).flags
            write(module, target, args, argv)
        sys.stdout.flush()
    except UserError as error:
        options.fail(parser.prog, str(error))
    except BrokenPipeError:  # `| head` has read enough
        options.flush_output()
    except OSError as error:
        options.fail(parser.prog, options.said(error))


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """End with an error if flags do not go together."""
    for needed, flags in (('slurm', SBATCH), ('summarize', ('markdown', 'columns', 'figure', 'over_timesteps'))):
        for flag in flags:
            if getattr(args, flag) and not getattr(args, needed):
                parser.error(f'argument --{flag}: needs --{needed}')
    if args.summarize and (args.flags or args.slurm):
        parser.error('argument --summarize: writes no script; leave out the flags of one')


def summarize(args: argparse.Namespace, prog: str) -> None:
    """Print the table of metrics files, and draw the figures that are wanted."""
    for flag in ('figure', 'over_timesteps'):
        if getattr(args, flag):
            figures.check(f'--{flag}')
    aside = list(filter(summary.is_set_aside, args.summarize))
    if 0 < len(aside) < len(args.summarize):
        print(f'{prog}: left out, as later runs have replaced them: {", ".join(aside)}; to see them, give '
              'only these', file=sys.stderr)
    runs = summary.read_all(args.summarize)
    for line in summary.unfinished(runs) if args.columns else ():  # the other tables mark such runs
        print(f'{prog}: {line}', file=sys.stderr)
    try:
        print(summary.narrow_table(runs, args.columns, args.markdown) if args.columns else
              summary.tables(runs, args.markdown), flush=True)
    except BrokenPipeError:  # the figure is still drawn
        options.flush_output()
    if args.figure:
        summary.draw(runs, Path(args.figure))
    if args.over_timesteps:
        summary.draw_over_time_steps(runs, Path(args.over_timesteps))


def write(module: ModuleType, target: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> None:
    """Write the script of the runs that args.flags ask for, and say how to start it."""
    kind, root, flags, path = module.__name__, os.path.dirname(module.__file__), args.flags, Path(args.script)
    if path.is_file() and '\n# Runs of ' not in path.read_text(errors='replace')[:200]:
        target.error(f'argument --script: {args.script!r} was not written by this command; choose another name')
    total = math.prod(map(len, flags.values()))
    limit = total if args.parallel else min(args.jobs or 1, total)
    add_log = limit > 1 and 'log' not in flags and not args.slurm  # a Slurm task has its own file
    if add_log:
        flags = {**flags, 'log': [('--log', None)]}
    commands = [[seen_from(root, word) for word in command] for command in expand(kind, target, flags)]
    home = '' if args.slurm else way_home(args.script, root)  # Slurm runs a copy of the script in another folder
    text = fill(  # scripts for every bash since 3.2, which is macOS's
        'slurm.sh.in' if args.slurm else 'script.sh.in', kind=kind, total=total, limit=limit,
        made_by=' '.join(shlex.join(['python', f'{kind}_script.py', *argv]).splitlines()),
        runs='\n'.join(f'run "$PYTHON" {kind}.py {shlex.join(command)}' for command in commands),
        go_home=f'CDPATH= cd -- "{home}" || exit 1' if home else f'# Start it in the folder of {kind}.py.',
        job_name=plain(path.stem), at_once=f'%{args.jobs}' if args.jobs else '',
        sbatch=''.join(f'#SBATCH --{flag}={getattr(args, flag)}\n' for flag in SBATCH if getattr(args, flag)))
    try:
        # atomically, as a bash that runs the script reads it bit by bit
        write_atomically(path, lambda file: file.write(text.encode('utf-8', 'surrogateescape')))
    except UserError as reason:
        raise UserError(f'{reason}; --script names another place') from reason
    mode = path.stat().st_mode
    path.chmod(mode | (mode & 0o444) >> 2)  # executable for whom it is readable

    pace = (f'at most {args.jobs} at a time' if args.jobs else 'as Slurm has room') if args.slurm else (
        'one after another' if limit == 1 else 'all at once' if limit == total else f'at most {limit} at a time')
    varying = ' × '.join(shlex.join(dict.fromkeys(words(pairs))) for pairs in flags.values() if len(pairs) > 1)
    quoted = shlex.quote(args.script)
    print(f'{args.script}: ' + (f'{total} runs ({varying}), {pace}' if total > 1 else '1 run')
          + f'; start it with: {"sbatch" if args.slurm else "bash"} {quoted}'
          + ('' if home else f' in the folder of {kind}.py'))
    if args.slurm:
        resumes = ('--resume', 'auto') in flags.get('resume', [])
        print(f'to start a failed task again: sbatch --array=N {quoted}; ' + (
            'it resumes from its last checkpoint' if resumes else
            'to have it resume from its last checkpoint, add --resume auto to the flags'))
    if add_log:
        print('--log is added to each run, as their outputs would mix; see logs/')
