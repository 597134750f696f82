"""The sweep generators: what they expand to, what they refuse, and what the script does when bash runs it."""
import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import ann
import snn
import snn_script
from conftest import ROOT
from experiment import options
from experiment.files import identifier, paths
from experiment.sweeps import sweep

# A target that notes each run's start and end, waits between for TOGETHER starts in all, and exits with the status of
# its seed in STATUS.
TARGET = '''
import os, sys, time
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
def note(event):
    with open('events', 'a') as file:
        file.write(f"{event} {args['--seed']}\\n")
with open('threads', 'a') as file:
    file.write(os.environ.get('OMP_NUM_THREADS', 'all') + '\\n')
note('start')
deadline = time.monotonic() + 60
while open('events').read().count('start') < int(os.environ.get('TOGETHER', 0)) and time.monotonic() < deadline:
    time.sleep(0.02)
time.sleep(float(os.environ.get('SECONDS_EACH', 0)))
note('end')
sys.exit(int(os.environ.get('STATUS', '0,0,0,0').split(',')[int(args['--seed'])]))
'''


def parser():
    """The flags of snn.py that matter here, as it adds them."""
    target = argparse.ArgumentParser()
    options.common_options(target, 1e-4, 'Adam', 0.95, 0.3)
    target.add_argument('--pretrained_ann')
    target.add_argument('--timesteps', type=options.positive_int, default=100)
    target.add_argument('--leak', type=options.fraction, default=1.0)
    return target


@pytest.fixture
def module(tmp_path, monkeypatch):
    """snn.py in a folder of its own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath('snn.py').write_text(TARGET)
    return SimpleNamespace(__name__='snn', __file__=str(tmp_path / 'snn.py'), get_args_parser=parser)


def generate(module, line, published='--seed 0'):
    """Call the generator; the words of each run's command after `run "$PYTHON" snn.py`."""
    sweep.main(module, shlex.split(published), shlex.split(line))
    with open('script.sh') as file:
        return [shlex.split(text)[3:] for text in file if text.startswith('run "')]


def parsed(commands):
    return [parser().parse_args(command) for command in commands]


def names(module, line):
    return [args.name for args in parsed(generate(module, line))]


def start(tmp_path, **environment):
    return subprocess.Popen(
        ['bash', str(tmp_path / 'script.sh')], cwd='/', text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, 'PYTHON': sys.executable, **environment})


def bash(tmp_path, **environment):
    process = start(tmp_path, **environment)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def events(tmp_path):
    file = tmp_path / 'events'
    return file.read_text().splitlines() if file.exists() else []


# --- expansion and names


def test_all_combinations_in_the_order_of_the_command_line(module):
    runs = parsed(generate(module, '--leak 1.0 0.99 -a vgg5 --dataset MNIST --timesteps 50 -s 0 1 2'))
    assert [(args.leak, args.seed) for args in runs] == [(1.0, 0), (1.0, 1), (1.0, 2), (.99, 0), (.99, 1), (.99, 2)]
    assert {(args.architecture, args.dataset, args.timesteps) for args in runs} == {('VGG5', 'MNIST', 50)}
    assert [args.name for args in runs][:2] == ['snn_vgg5_mnist_50_leak1.0_seed0', 'snn_vgg5_mnist_50_leak1.0_seed1']
    assert len({args.name for args in runs}) == 6


def test_a_run_has_the_same_name_whichever_flag_is_written_first(module):
    assert set(names(module, '--seed 0 1 --leak 1.0 0.9')) == set(names(module, '--leak 0.9 1.0 --seed 1 0'))


def test_what_the_identifier_already_says_is_not_repeated(module):
    assert names(module, '-a VGG5 VGG9 --timesteps 50 100') == [
        'snn_vgg5_cifar10_50', 'snn_vgg5_cifar10_100', 'snn_vgg9_cifar10_50', 'snn_vgg9_cifar10_100']


def test_name_is_a_prefix_in_a_sweep_and_a_name_without(module):
    assert names(module, '--name try -a VGG5 VGG9') == ['try_architecture-VGG5', 'try_architecture-VGG9']
    assert names(module, '--name try -a VGG5') == ['try']
    assert names(module, '-a VGG5') == [None]


def test_a_flag_given_twice_loses_no_value(module):
    assert [args.seed for args in parsed(generate(module, '--seed 0 1 --leak 0.9 -s 2'))] == [0, 1, 2]


@pytest.mark.parametrize('line, expected', [
    ('--gpu', [True]), ('--no-gpu', [False]), ('--gpu False', [False]), ('--gpu True False', [True, False]),
    ('--no-gpu --gpu', [False, True]), ('--seed 0', [None])])
def test_switches(module, line, expected):
    assert [args.gpu for args in parsed(generate(module, line))] == expected


def test_bare_resume_stays_bare(module):
    commands = generate(module, '--resume --seed 0 1')
    assert [args.resume for args in parsed(commands)] == [parser().parse_args(['--resume']).resume] * 2
    assert commands[0][:3] == ['--resume', '--seed', '0']


@pytest.mark.parametrize('files, expected', [
    ('x/a.pth y/b.pth', ['a', 'b']),
    ('x/a.pth y/a.pth', ['x-a.pth', 'y-a.pth']),
    ('x/A.pth x/a.pth', ['A-1', 'a-2']),  # one file where case does not count
    ('x/写真.pth x/dög.pth', ['写真', 'dög']),  # in whichever order they are given
    ('"x/a b.pth" "x/a?b.pth"', ['a-b-1', 'a-b-2'])])
def test_names_of_files(module, files, expected):
    for flags, said in (('', ''), ('-a VGG5', 'architecture-VGG5_'), ('-a VGG5 --dataset DIGITS', 'vgg5_digits_100_')):
        # of network and data set nothing but what flags say: nobody has read the files
        assert names(module, f'{flags} --pretrained_ann {files}') == [f'snn_{said}pretrained_ann-{e}' for e in expected]


@pytest.mark.parametrize('words, dest, expected', [
    (['--lr_interval', '0.60 0.80 0.90', '0.5'], 'lr_interval', ['0.60 0.80 0.90', '0.5']),
    (['--data_dir', '$HOME/`x` "y"', "it's; rm *", 'a\nb', ''], 'data_dir',
     ['$HOME/`x` "y"', "it's; rm *", 'a\nb', '']),
    (['--data_dir=-x', '--data_dir', 'y'], 'data_dir', ['-x', 'y']),
    (['--name', 'a b', '-lr', '1e-3', '1e-4'], 'learning_rate', [1e-3, 1e-4])])
@pytest.mark.parametrize('slurm', [False, True])
def test_values_reach_the_target_unchanged_through_bash(module, tmp_path, words, dest, expected, slurm):
    (tmp_path / 'snn.py').write_text('import json, sys\nprint(json.dumps(sys.argv[1:]), file=open("words", "a"))')
    sweep.main(module, [], ['--slurm', *words] if slurm else words)
    for number in range(1, len(expected) + 1) if slurm else ():
        assert task(tmp_path, number)[0] == 0
    if not slurm:
        assert bash(tmp_path)[0] == 0
    runs = parsed(json.loads(line) for line in (tmp_path / 'words').read_text().splitlines())
    assert [getattr(args, dest) for args in runs] == expected


@pytest.mark.parametrize('line, expected', [
    ('--pretrained_snn x/vgg5_digits.pth y/b.pth', ['pretrained_snn-vgg5_digits', 'pretrained_snn-b']),
    ('--pretrained_snn x/b.pth --seed 0 1', ['pretrained_snn-b_seed0', 'pretrained_snn-b_seed1']),
    ('--pretrained_snn x/b.pth --seed 0 1 --resume auto', ['pretrained_snn-b_seed0', 'pretrained_snn-b_seed1']),
    ('--pretrained_snn b --timesteps 9 -a vgg5 --leak 1 .9', [
        f'architecture-vgg5_leak{leak}_pretrained_snn-b_timesteps9' for leak in ('1', '-.9')]),
    ('--pretrained_snn b --timesteps 9 10', ['pretrained_snn-b_timesteps9', 'pretrained_snn-b_timesteps10']),
    ('--resume a.last.pth b.last.pth', ['resume-a', 'resume-b']),
    ('--pretrained_snn x/a.folded.pth x/b.folded.pth', ['pretrained_snn-a', 'pretrained_snn-b'])])
def test_a_run_from_an_snns_checkpoint_claims_no_network_that_its_flags_do_not_name(
        tmp_path, monkeypatch, line, expected):
    monkeypatch.chdir(tmp_path)
    snn_script.main(line.split())
    names = re.findall('^run .*--name (\\S+)$', Path('script.sh').read_text(), re.M)
    assert names == [f'snn_{each}' for each in expected]
    snn_script.main([*line.split(), '--name', 'mine'])
    assert len(re.findall('^run .*--name mine_', Path('script.sh').read_text(), re.M)) == len(expected)


# --- what is refused, with nothing written


@pytest.mark.parametrize('line, said', [
    ('--leak 1.0 2', ["--leak", "'2'"]),
    ('--seed 0 --dataset MNIST CIFAR11', ['--dataset', "'CIFAR11'"]),
    ('--seed 0 0', ['--seed', "'0' and '0'"]),
    ('--leak 1 0.9 1.0', ['--leak', "'1' and '1.0'"]),
    ('--gpu yes True', ['--gpu', "'yes' and 'True'"]),
    ('--no-gpu False', ['--no-gpu False']),
    ('--gpu perhaps', ['--gpu perhaps']),
    ('--seed', ['--seed', 'at least one']),
    ('--name a/b --seed 0 1', ['--name', "'a/b'"]),
    ('--data_dir p p_pretrained_ann-q --pretrained_ann q q_pretrained_ann-q', ['share', 'p_pretrained_ann-q']),
    ('--name x x.last', ['--name', "'x.last'"]),
    ('--see 0 1', ['--see']),
    ('--jobs 0', ['--jobs', "'0'"]),
    ('--jobs 2 --parallel', ['--jobs', '--parallel']),
    ('--gpus 1', ['--gpus', '--slurm']),
    ('--slurm --jobs 2 --parallel', ['--jobs', '--parallel']),
    ('--slurm --partition "a b"', ['--partition', "'a b'"]),
    ('--slurm --time=-1', ['--time', "'-1'"]),
    ('--slurm --partition "x\n#SBATCH --mem=0"', ['--partition']),
    ('--script snn.py', ['--script', "'snn.py'"])])
def test_refused(module, tmp_path, capsys, line, said):
    with pytest.raises(SystemExit) as caught:
        generate(module, line)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.count('\n') == 1 and all(text in error for text in said), error
    assert os.listdir(tmp_path) == ['snn.py']


def test_a_script_of_other_origin_is_written_over_by_no_command_and_in_the_way_of_none(module, tmp_path, capsys):
    (tmp_path / 'script.sh').write_text('echo x\n')
    generate(module, '--script mine.sh')
    metrics = ROOT / 'results/snn/digits_12'
    sweep.main(module, [], ['--summarize', *map(str, metrics.glob('*.jsonl'))])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        generate(module, '')
    assert caught.value.code == 2
    assert "'script.sh' was not written by this command; choose another name" in capsys.readouterr().err
    assert (tmp_path / 'script.sh').read_text() == 'echo x\n'


@pytest.mark.parametrize('flag', ['--report', '--export_nir'])
def test_runs_that_would_write_over_one_another(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        snn_script.main(['--seed', '0', '1', flag, 'x'])
    assert re.search(f'argument {flag}: .*--test_only.*\n$', capsys.readouterr().err)
    snn_script.main(['--seed', '0', flag, 'x'])
    assert f'{flag} x' in Path('script.sh').read_text()


def test_a_target_whose_flag_is_the_sweeps_own(module):
    for flag, dest in (('--jobs', 'workers'), ('--workers', 'jobs'), ('--flags', None)):
        target = argparse.ArgumentParser()
        target.add_argument(flag, dest=dest or 'flags')
        with pytest.raises((ValueError, argparse.ArgumentError), match=flag):
            sweep.get_args_parser('snn', target)


@pytest.mark.parametrize('path', ['missing/script.sh', 'snn.py/script.sh', 'folder.sh'])
def test_where_it_cannot_be_written(module, tmp_path, path):
    (tmp_path / 'folder.sh').mkdir()
    with pytest.raises(SystemExit, match=f'error: {path}: .*--script'):
        sweep.main(module, [], ['--seed', '0', '--script', path])
    assert sorted(os.listdir(tmp_path)) == ['folder.sh', 'snn.py']


# --- the script


def test_every_run_runs_and_the_failed_ones_are_named(module, tmp_path, capsys):
    generate(module, '--seed 0 1 2 3')
    assert capsys.readouterr().out == (
        'script.sh: 4 runs (--seed 0 1 2 3), one after another; start it with: bash script.sh\n')
    assert os.access('script.sh', os.X_OK)
    status, out, err = bash(tmp_path, STATUS='0,3,0,1')
    assert status == 1
    assert events(tmp_path) == [f'{event} {seed}' for seed in range(4) for event in ('start', 'end')]
    heading, first, second = err.splitlines()
    assert heading == '2 of 4 runs failed:'
    assert first.startswith('  status 3: ') and '_seed1' in first
    assert second.startswith('  status 1: ') and '_seed3' in second
    assert [line.split(': ')[0] for line in out.splitlines()] == [f'run {i} of 4' for i in range(1, 5)]
    assert bash(tmp_path)[0] == 0


def most_at_once(lines):
    now = most = 0
    for line in lines:
        now += 1 if line.startswith('start') else -1
        most = max(most, now)
    return most


def test_at_most_jobs_at_a_time(module, tmp_path, capsys):
    commands = generate(module, '--jobs 2 --seed 0 1 2 3')
    assert 'at most 2 at a time' in capsys.readouterr().out
    assert all('--log' in command for command in commands)
    status, _, err = bash(tmp_path, SECONDS_EACH='1', STATUS='1,0,0,0')
    assert most_at_once(events(tmp_path)) == 2
    assert len(events(tmp_path)) == 8
    assert status == 1 and err.startswith('1 of 4 runs failed:') and 'seed0' in err


def test_parallel_starts_all_and_waits(module, tmp_path, capsys):
    generate(module, '--parallel --seed 0 1 2 3')
    assert 'all at once' in capsys.readouterr().out
    assert bash(tmp_path, TOGETHER='4')[0] == 0  # none ends before all have started
    assert [line.split()[0] for line in events(tmp_path)] == ['start'] * 4 + ['end'] * 4


@pytest.mark.parametrize('line, given, cores, threads', [
    ('--seed 0 1', {}, 8, 'all'), ('--jobs 2 --seed 0 1 2', {}, 8, '4'), ('--parallel --seed 0 1 2', {}, 8, '3'),
    ('--jobs 4 --seed 0 1 2 3', {}, 1, '1'), ('--jobs 2 --seed 0 1', {'OMP_NUM_THREADS': '7'}, 8, '7')])
def test_runs_side_by_side_share_the_cores(module, tmp_path, monkeypatch, line, given, cores, threads):
    nproc = tmp_path / 'bin/nproc'
    nproc.parent.mkdir()
    nproc.write_text(f'#!/bin/sh\necho {cores}\n')
    nproc.chmod(0o755)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    generate(module, line)
    assert bash(tmp_path, PATH=f'{nproc.parent}:{os.environ["PATH"]}', **given)[0] == 0
    assert set((tmp_path / 'threads').read_text().split()) == {threads}


@pytest.mark.parametrize('line, logs', [
    ('--parallel --seed 0 1', True), ('--seed 0 1', False), ('--jobs 2 --seed 0', False),
    ('--parallel --seed 0 1 --log False', False)])
def test_log_is_added_where_outputs_would_mix(module, capsys, line, logs):
    assert {args.log for args in parsed(generate(module, line))} == {logs}
    assert ('--log is added' in capsys.readouterr().out) == logs


@pytest.mark.parametrize('pace, started', [('--jobs 1', 1), ('--jobs 2', 2), ('--parallel', 4)])
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_runs(module, tmp_path, pace, started, number):
    generate(module, f'{pace} --seed 0 1 2 3')
    # A pytest in the background may ignore SIGINT; bash would inherit that and could not trap it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(tmp_path, SECONDS_EACH='300')
    signal.signal(signal.SIGINT, before)
    try:
        deadline = time.monotonic() + 60
        while len(events(tmp_path)) < started and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        # communicate() ends when the last process that holds the pipes has gone, thus the runs too.
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert f'stopped after starting {started} of 4 runs' in err
    assert sorted(events(tmp_path)) == [f'start {seed}' for seed in range(started)]


def test_it_holds_no_path_of_this_machine(module, tmp_path):
    for path in ('script.sh', 'sweeps/script.sh'):
        (tmp_path / 'sweeps').mkdir(exist_ok=True)
        sweep.main(module, [], ['--seed', '0', '--script', path])
        assert str(tmp_path) not in (tmp_path / path).read_text()
    (tmp_path / 'script.sh').unlink()
    (tmp_path / 'sweeps/script.sh').rename(tmp_path / 'sweeps/moved.sh')
    subprocess.run(
        ['bash', tmp_path / 'sweeps/moved.sh'], cwd='/', env={**os.environ, 'PYTHON': sys.executable}, check=True)
    assert events(tmp_path) == ['start 0', 'end 0']


def test_a_script_outside_the_project_starts_where_it_is_called(module, tmp_path, monkeypatch, capsys):
    project = tmp_path / 'project'
    project.mkdir()
    (tmp_path / 'snn.py').rename(project / 'snn.py')
    module.__file__ = str(project / 'snn.py')
    generate(module, '--seed 0')
    assert 'in the folder of snn.py' in capsys.readouterr().out
    subprocess.run(['bash', '../script.sh'], cwd=project, env={**os.environ, 'PYTHON': sys.executable}, check=True)
    assert events(project) == ['start 0', 'end 0']


def links_to(script, folder):
    """Links to a script in a new folder: a link, one to that, one that starts at its own folder, one to its folder."""
    folder.mkdir()
    (folder / 'one').symlink_to(script)
    (folder / 'two').symlink_to('one')
    (folder / 'relative').symlink_to(os.path.relpath(script, folder))
    (folder / 'of').symlink_to(script.parent)
    return [folder / 'one', folder / 'two', folder / 'relative', folder / 'of' / script.name]


@pytest.mark.parametrize('path', ['script.sh', 'sweeps/script.sh'])
def test_a_script_called_through_links_finds_the_project(module, tmp_path, path):
    project, folder = tmp_path / 'a project', tmp_path / 'links to it'
    (project / 'sweeps').mkdir(parents=True)
    (tmp_path / 'snn.py').rename(project / 'snn.py')
    module.__file__ = str(project / 'snn.py')
    (project / path).symlink_to('/elsewhere/old.sh')  # it is replaced
    sweep.main(module, [], ['--seed', '0', '--script', str(project / path)])
    links = [project / path, *links_to(project / path, folder)]
    for link in links:
        subprocess.run(['bash', link.name], cwd=link.parent, check=True,
                       env={**os.environ, 'PYTHON': sys.executable, 'CDPATH': str(tmp_path)})
    assert events(project) == ['start 0', 'end 0'] * len(links)


@pytest.mark.parametrize('path', ['quickstart.sh', 'recipes/low_latency.sh', 'recipes/make.sh', 'recipes/pretrained.sh',
                                  'benchmarks/gpu.sh', '.ci/run'])
def test_a_script_of_the_project_called_through_links_finds_it(tmp_path, path):
    project, folder = tmp_path / 'a project', tmp_path / 'links to it'
    (project / path).parent.mkdir(parents=True)
    shutil.copy(ROOT / path, project / path)
    tools = tmp_path / 'bin'
    tools.mkdir()
    for name in ('python', 'python3', 'timeout'):  # that say where they are called, and fail
        (tools / name).write_text('#!/bin/sh\npwd >> "$SEEN"\nexit 1\n')
        (tools / name).chmod(0o755)
    for link in links_to(project / path, folder):
        seen = tmp_path / 'seen'
        subprocess.run(['bash', link.name], cwd=link.parent, capture_output=True, env={
            **os.environ, 'PATH': f'{tools}:{os.environ["PATH"]}', 'SEEN': str(seen), 'RESULTS': str(tmp_path)})
        assert seen.read_text().splitlines()[0] == str(project)
        seen.unlink()


# --- the script as a Slurm array


def task(tmp_path, number, **environment):
    """Run the script as Slurm runs a task of the array: a copy elsewhere, in the folder that it was submitted from."""
    spool = tmp_path / 'spool'
    spool.mkdir(exist_ok=True)
    copy = shutil.copy(tmp_path / 'script.sh', spool / 'slurm_script')
    done = subprocess.run(['bash', copy], cwd=tmp_path, text=True, capture_output=True, timeout=120,
                          env={**os.environ, 'PYTHON': sys.executable, 'SLURM_ARRAY_TASK_ID': str(number),
                               **environment})
    return done.returncode, done.stdout, done.stderr


def directives(tmp_path):
    """The options that sbatch finds: it reads #SBATCH lines up to the first that is no comment."""
    found = {}
    for line in (tmp_path / 'script.sh').read_text().splitlines():
        if not line.startswith('#'):
            return found
        if line.startswith('#SBATCH --'):
            option, found[option] = line.removeprefix('#SBATCH --').split('=', 1)
    return found


@pytest.mark.parametrize('line, expected', [
    ('--seed 0 1 2', {'array': '1-3'}),
    ('--seed 0 1 2 --parallel', {'array': '1-3'}),
    ('--seed 0 1 2 --jobs 2 --partition short --time 1-12:00:00 --gpus a100:1',
     {'array': '1-3%2', 'partition': 'short', 'time': '1-12:00:00', 'gpus': 'a100:1'}),
    ('--seed 0', {'array': '1-1'})])
def test_what_sbatch_is_told(module, tmp_path, line, expected):
    commands = generate(module, f'--slurm {line}')
    found = directives(tmp_path)
    assert (found.pop('job-name'), found.pop('output')) == ('script', 'slurm-%x-%A_%a.out')
    assert found == expected
    assert all('--log' not in command for command in commands)
    generate(module, '--seed 0 1 2')
    assert directives(tmp_path) == {}


def test_a_job_is_named_as_its_script(module, tmp_path):
    sweep.main(module, [], ['--slurm', '--seed', '0', '--script', 'my sweep.sh'])
    (tmp_path / 'my sweep.sh').replace(tmp_path / 'script.sh')
    assert directives(tmp_path)['job-name'] == 'my-sweep'


def test_a_task_is_one_run_and_its_status_the_runs_own(module, tmp_path, capsys):
    generate(module, '--slurm --seed 0 1 2 3')
    said = capsys.readouterr().out
    assert 'start it with: sbatch script.sh in the folder of snn.py' in said
    assert 'sbatch --array=N script.sh; to have it resume' in said
    assert '\n# To start a failed task again: sbatch --array=N FILE' in (
        tmp_path / 'script.sh').read_text()
    status, out, err = task(tmp_path, 3, STATUS='0,0,7,0')
    assert (status, events(tmp_path), err) == (7, ['start 2', 'end 2'], '')  # the third run, that of seed 2
    assert out.startswith('run 3 of 4: ') and '_seed2' in out and out.count('\n') == 1
    assert task(tmp_path, 4)[0] == 0
    assert events(tmp_path)[2:] == ['start 3', 'end 3']


@pytest.mark.parametrize('number', ['', '0', '5', '3x'])
def test_without_a_task_of_its_own_it_runs_nothing(module, tmp_path, number):
    generate(module, '--slurm --seed 0 1 2 3')
    status, out, err = task(tmp_path, number)
    assert (status, out, events(tmp_path)) == (1, '', [])
    assert f"SLURM_ARRAY_TASK_ID is '{number}', not one of 1 to 4" in err and err.count('\n') == 1


def test_a_task_goes_on_where_the_flags_say_so(module, tmp_path, capsys):
    commands = generate(module, '--slurm --seed 0 1 --resume auto')
    assert 'sbatch --array=N script.sh; it resumes from its last checkpoint' in capsys.readouterr().out
    assert [args.resume for args in parsed(commands)] == ['auto', 'auto']


def test_a_signal_reaches_the_run_of_a_task(module, tmp_path):
    generate(module, '--slurm --seed 0 1')
    process = subprocess.Popen(['bash', 'script.sh'], cwd=tmp_path, stdout=subprocess.DEVNULL,
                               env={**os.environ, 'PYTHON': sys.executable, 'SECONDS_EACH': '300',
                                    'SLURM_ARRAY_TASK_ID': '1'})
    deadline = time.monotonic() + 60
    while not events(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == -signal.SIGTERM
    assert events(tmp_path) == ['start 0']


# --- the two scripts


@pytest.mark.parametrize('kind, differs', [
    ('ann', {}),
    ('snn', {'architecture': 'VGG11', 'dataset': 'CIFAR100',
             'pretrained_ann': 'trained_models/ann/ann_vgg11_cifar100.pth'})])
def test_without_arguments_the_published_run(tmp_path, monkeypatch, kind, differs):
    generator, target = importlib.import_module(f'{kind}_script'), importlib.import_module(kind)
    monkeypatch.chdir(tmp_path)
    generator.main(['--script', 'script.sh'])
    line, = (text for text in (tmp_path / 'script.sh').read_text().splitlines() if text.startswith('run "'))
    run, python, file, *words = shlex.split(line)
    assert (run, python, file) == ('run', '$PYTHON', f'{kind}.py')
    defaults, args = (vars(target.get_args_parser().parse_args(given)) for given in ([], words))
    defaults['given'] = args['given']  # which flags were written out
    assert args == {**defaults, **differs}


def test_the_recipes_are_the_rows_of_the_paper(tmp_path):
    done = subprocess.run(['bash', ROOT / 'recipes' / 'make.sh'], text=True, capture_output=True, env={
        **os.environ, 'RECIPES': str(tmp_path), 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'})
    assert done.returncode == 0, done.stderr

    def only(name, module):
        """The arguments of the one command in a script."""
        command, = re.findall('^run .*', (tmp_path / f'{name}_{module.__name__}.sh').read_text(), re.M)
        return module.get_args_parser().parse_args(shlex.split(command)[3:])

    assert len(os.listdir(tmp_path)) == 10
    for architecture, dataset, timesteps in (('VGG5', 'CIFAR10', 75), ('VGG9', 'CIFAR10', 100), (
            'VGG16', 'CIFAR10', 100), ('RESNET20', 'CIFAR10', 250), ('VGG11', 'CIFAR100', 125)):
        name = f'{architecture}_{dataset}'.lower()
        trains, converts = only(name, ann), only(name, snn)
        for args in (trains, converts):
            assert (args.architecture, args.dataset) == (architecture, dataset)
        assert (trains.epochs, converts.epochs, converts.timesteps) == (300, 20, timesteps)
        # starts from what the other one saves
        assert converts.pretrained_ann == str(paths('ann', identifier('ann', trains)).best)
