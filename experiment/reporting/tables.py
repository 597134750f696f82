"""Update the tables of pages, each from the metrics files that the comment above it names.

    python -m experiment.reporting.tables README.md */README.md docs/*.md

A table is what `snn_script.py --summarize FILES --markdown --columns NAMES` prints; its comment says

    <!-- table: results/snn/fashion_14/*.jsonl --columns leak ANN converted 'last epoch' -->

with paths relative to the project's folder. A table ends at the next line that does not begin with |. The figure below

    <!-- over_timesteps: results/ann/a.jsonl results/snn/b/*.jsonl -->

is what `snn_script.py --summarize FILES --over_timesteps FIGURE` draws. It needs no torch.
"""
import re
import shlex
import sys
from pathlib import Path

from experiment import UserError
from experiment.files import write_atomically
from experiment.options import fail, said
from experiment.reporting import summary

ROOT = Path(__file__).resolve().parents[2]
# a page may begin with a byte-order mark, its lines may end in CRLF, the last one in nothing
TABLE = re.compile(r'^(\ufeff?[ \t]*<!-- table: (?P<files>.+?) --columns (?P<columns>.+?) -->[ \t]*)(?P<end>\r?\n|\Z)'
                   r'(?:[ \t]*\|[^\r\n]*(?:\r?\n|\Z))*', re.M)
FIGURE = re.compile(r'^\ufeff?<!-- over_timesteps: (?P<files>.+?) -->\r?\n!\[.*\]\((?P<path>.+?)\)', re.M)


def files(words: str) -> list[str]:
    """The metrics files that a comment names, in order. Raises UserError."""
    found = []
    for pattern in shlex.split(words):
        there = sorted(ROOT.glob(pattern))
        if not there:
            raise UserError(f'{pattern}: there is no such file; correct the comment above the table')
        found += map(str, there)
    return found


def rewritten(text: str) -> str:
    """The text of a page with its tables updated. Raises UserError."""
    def table(match):
        end, runs = match['end'] or '\n', summary.read_all(files(match['files']))
        lines = summary.narrow_table(runs, shlex.split(match['columns']), as_markdown=True)
        return match[1] + end + lines.replace('\n', end) + end

    return TABLE.sub(table, text)


def main(paths: list[str | Path]) -> None:
    for path in map(Path, paths):
        try:
            text = rewritten(path.read_bytes().decode())
            figures = [(figure['path'], files(figure['files'])) for figure in FIGURE.finditer(text)]
        except (ValueError, NotImplementedError) as error:  # not UTF-8, an open quote, an absolute path
            raise UserError(f'{path}: {error}; correct its comments, or save it as UTF-8') from error
        write_atomically(path, lambda file, text=text: file.write(text.encode()))
        for figure, named in figures:
            summary.draw_over_time_steps(summary.read_all(named), path.parent / figure)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail('tables', str(error))
    except OSError as error:
        fail('tables', said(error))
