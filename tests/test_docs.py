"""What the texts say of the project: links that lead somewhere, commands that parse, every flag in its table."""
import re
import shlex
import warnings

import pytest
import torch

import ann
import snn
from conftest import ROOT
from experiment.sweeps import sweep
from self_models import quantize, spiking

TEXTS = sorted(['README.md', 'results/README.md', 'pretrained/README.md', 'CONTRIBUTING.md', 'CHANGELOG.md',
                *(f'docs/{path.name}' for path in (ROOT / 'docs').glob('*.md'))])
FENCED = re.compile(r'^```(\w*)\n(.*?)^```', re.M | re.S)


def anchors(path):
    """Those that GitHub gives the headings of a text."""
    headings = re.findall('^#+ (.*)$', FENCED.sub('', path.read_text()), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('name', TEXTS)
def test_links_lead_somewhere(name):
    path = ROOT / name
    for link in re.findall(r'\]\(([^)\s]+)\)', FENCED.sub('', path.read_text())):
        if re.match('[a-z]+:', link):
            continue
        file, _, anchor = link.partition('#')
        target = (path.parent / file) if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize('name', TEXTS)
def test_commands_parse(name):
    parsers = {'ann.py': ann.get_args_parser(), 'snn.py': snn.get_args_parser(),
               'ann_script.py': sweep.get_args_parser('ann', ann.get_args_parser()),
               'snn_script.py': sweep.get_args_parser('snn', snn.get_args_parser()),
               **{f'benchmarks/{each}.py': snn.get_args_parser() for each in ('layers', 'converter', 'mean_or_sum')}}
    parsed = 0
    for language, block in FENCED.findall((ROOT / name).read_text()):
        for line in block.replace('\\\n', ' ').splitlines() if language == 'bash' else ():
            words = shlex.split(line, comments=True)
            while words and words[0] not in parsers:
                words = words[1:]
            if words and '...' not in words:
                parsers[words[0]].parse_args(words[1:])
                parsed += 1
    assert parsed >= {'README.md': 4, 'docs/own_network.md': 5, 'docs/sweeps.md': 3}.get(name, 0)


@pytest.mark.parametrize('script', [ann, snn])
def test_every_flag_is_in_the_table_of_flags(script):
    said = (ROOT / 'docs/flags.md').read_text()
    for action in script.get_args_parser()._actions:
        flags = [flag for flag in action.option_strings if flag.startswith('--') and flag != '--help']
        assert not flags or f'`{flags[0]}' in said, flags


@pytest.mark.parametrize('script', [ann, snn])
def test_the_defaults_in_the_table_of_flags(script):
    both, of_ann, of_snn = (ROOT / 'docs/flags.md').read_text().split('\n| of ')[1:]
    parser, found, tables = script.get_args_parser(), {}, both + (of_snn if script is snn else of_ann)
    for names, cell in re.findall(r'^\| ((?:`[^`]+`(?:, )?)+) \|([^|]*)\|', tables, re.M):
        flags, own = re.findall(r'--(\w+)', names), re.search(rf'{script.__name__}\.py (\S+)', cell)
        values = [own[1]] if own else [value.strip("' ") for value in cell.split(', ')]
        found |= dict(zip(flags, values if len(values) >= len(flags) else values * len(flags), strict=False))
    # these stand beside --optimizer
    assert found.keys() == {action.dest for action in parser._actions} - {'help', 'momentum', 'amsgrad'}
    assert found.pop('backend', 'torch') == 'torch'  # on a CPU; the parser does not know yet
    for flag, said in found.items():
        default = parser.get_default(flag)
        none = default is None or default is False
        assert said in ('', 'no', 'all', 'if present') if none else (
            said == str(default) or float(said) == float(default)), flag


def test_the_flags_of_sweeps_are_in_their_page():
    said, target = (ROOT / 'docs/sweeps.md').read_text(), ann.get_args_parser()
    for action in sweep.get_args_parser('ann', target)._actions:
        if action.dest != 'help' and action.option_strings[-1] not in target._option_string_actions:
            assert re.search(re.escape(action.option_strings[-1]) + r'(?![\w-])', said), action.dest


def test_the_read_mes_own_figures_stand_in_the_results():
    text = (ROOT / 'README.md').read_text()
    headline = text[text.index('<!-- headline -->'):text.index('<!-- /headline -->')]
    results = (ROOT / 'results/README.md').read_text()

    def cells(text):
        return [[cell.strip() for cell in line.strip('|').split(' | ')] for line in text.splitlines()
                if line.startswith('| ')]
    measured = [line for line in cells(results) if len(line) == 7 and line[1] in ('direct', 'poisson')]
    encoding = {'published': 'poisson', 'low latency': 'direct'}
    shown = [[network, encoding[recipe], *figures] for recipe, network, *figures, _ in cells(headline)[1:]]
    assert len(shown) == 8 and [line for line in shown if line not in measured] == []


def test_the_python_of_the_read_me():
    text, = re.findall('```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    known = {}
    exec(text, known)
    assert known['logits'].shape == (2, 10) and known['logits'].isfinite().all()


def test_the_network_with_another_normalisation():
    text, = re.findall('```py\n(.*?class Net.*?)```', (ROOT / 'docs/own_network.md').read_text(), re.S)
    known = {}
    exec(text, known)
    net, x = known['Net'](10).eval(), torch.rand(2, 3, 32, 32) * 2 - 1
    with warnings.catch_warnings(action='ignore'):  # of its max pool
        assert spiking(quantize(net), 2)(x).isfinite().all()
    mean, std = torch.tensor([[0.491, 0.482, 0.447], [0.247, 0.243, 0.262]]).view(2, 3, 1, 1)
    normed = ((x + 1) / 2 - mean) / std
    assert torch.allclose(net(x), super(known['Net'], net).forward(normed), atol=1e-5)
