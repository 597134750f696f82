"""Checkpoints: what loads, what is refused and how, and that a file is never half written."""
import errno
import functools
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import same
from experiment import UserError, checkpoint, files
from self_models import RESNET_SNN_STDB, ResNet


def resnet6(labels=10):
    return ResNet('RESNET6', labels=labels, dataset='DIGITS')


def saved(path, **more):
    torch.save({'accuracy': 0.5, 'epoch': 3, 'state_dict': resnet6().state_dict(), **more}, path)
    return str(path)


def refused(path, words, kind='ann'):
    with pytest.raises(UserError, match=words) as caught:
        checkpoint.load(str(path), kind)
    assert '\n' not in str(caught.value) and str(path) in str(caught.value)


def test_round_trip(tmp_path):
    model = resnet6()
    checkpoint.save({'state_dict': model.state_dict(), 'args': {'a': 1, 'b': None, 'c': 'x'}}, tmp_path / 'a.pth')
    state = checkpoint.load(tmp_path / 'a.pth', 'ann')
    other = resnet6()
    assert checkpoint.load_weights(other, state, 'a.pth') == []
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert state['args'] == {'a': 1, 'b': None, 'c': 'x'}
    assert os.listdir(tmp_path) == ['a.pth']


def test_missing_directory_and_empty_files_are_refused(tmp_path):
    refused(tmp_path / 'none.pth', 'no such file')
    refused(tmp_path, 'no such file')
    (tmp_path / 'empty.pth').touch()
    refused(tmp_path / 'empty.pth', 'not a checkpoint')
    (tmp_path / 'text.pth').write_text('not a checkpoint at all')
    refused(tmp_path / 'text.pth', 'not a checkpoint')


@pytest.mark.parametrize('share', [0.1, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, share):
    data = open(saved(tmp_path / 'a.pth'), 'rb').read()
    (tmp_path / 'b.pth').write_bytes(data[:int(len(data) * share)])
    refused(tmp_path / 'b.pth', 'damaged|not a checkpoint')


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = saved(tmp_path / 'a.pth')

    def refuse(path):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr('experiment.unpickling.load', refuse)
    refused(path, r'cannot be read \(Permission denied\)')


@pytest.mark.parametrize('number', [errno.EMFILE, errno.EIO])
def test_a_passing_fault_is_not_called_damage(tmp_path, monkeypatch, number):
    path = saved(tmp_path / 'a.pth')

    def refuse(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr('experiment.unpickling.load', refuse)
    refused(path, rf'cannot be read \({os.strerror(number)}\), though it may be sound; run again')


# -- what a file would run --------------------------------------------------------------------------------------------

def ran(*_, **__):
    """What no file may call; it leaves a folder."""
    os.mkdir('ran')


class Calls:
    """Pickled as a call of these."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


class Sets:
    """Pickled as an object made without a call, and a call of its __setstate__."""

    def __getstate__(self):
        return 'state'

    __new__ = __setstate__ = lambda cls, *_: ran() if Path('armed').exists() else object.__new__(cls)


CODE = "__import__('os').mkdir('ran')"
EVIL = {
    'os': lambda: Calls(os.system, ('mkdir ran',)), 'mkdir': lambda: Calls(os.mkdir, ('ran',)),
    'eval': lambda: Calls(eval, (CODE,)), 'exec': lambda: Calls(exec, (CODE,)),
    'import': lambda: Calls(__import__, ('trap',)), 'getattr': lambda: Calls(getattr, (Sets, 'reduced')),
    "the project's own": lambda: Calls(ran, ()), 'partial': lambda: functools.partial(ran),
    'state': lambda: Calls(Calls, (), {'reduced': 1}), 'items': lambda: Calls(dict, (), None, None, iter([(1, 2)])),
    'newobj and build': Sets, 'a key': lambda: {Calls(ran, ()): 1}, 'a list': lambda: [(Calls(ran, ()),)],
    'a network': lambda: torch.nn.Linear(2, 2), 'a module of os': lambda: os.system,
    'of tensors': lambda: Calls(torch._tensor._rebuild_from_type_v2, (ran, torch.Tensor, (), {})),
    'objects of numpy': lambda: np.array([ran], dtype=object), 'a date': lambda: np.datetime64('2026-01-01'),
    'of numpy': lambda: Calls(np.dtype, (Calls(ran, ()),)), 'a path': lambda: Path('ran')}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('new', [True, False], ids=['zip', 'old'])
@pytest.mark.parametrize('what', EVIL)
def test_code_is_not_run(tmp_path, monkeypatch, what, new):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path('trap.py').write_text(CODE)
    torch.save({'state_dict': {}, 'extra': EVIL[what]()}, 'a.pth', _use_new_zipfile_serialization=new)
    Path('armed').touch()
    refused('a.pth', 'other than tensors and is not loaded, since that could run code; save its state_dict')
    assert not Path('ran').exists()


def text(value):
    return b'X' + len(value).to_bytes(4, 'little') + value.encode()


NAME = b'ctest_checkpoint\nran\n'


@pytest.mark.parametrize('stream', [
    NAME + b')R', NAME + b')\x81', NAME + b')}\x92', b'(' + NAME + b'o', b'(itest_checkpoint\nran\n',
    text('test_checkpoint') + text('ran') + b'\x93)R', b'\x82\x01', NAME + b'}b', NAME + b'}}\x86b',
    NAME + b'Na', NAME + text('a') + b'Ns', NAME + b'Q', text('ran') + b')R', text('ran') + b')\x81',
    text('storage') + NAME + text('0') + text('cpu') + b'K\x01(tQ', NAME + b')R' + NAME + b')R'],
    ids=['reduce', 'newobj', 'newobj_ex', 'obj', 'inst', 'stack_global', 'extension', 'build', 'build slots', 'append',
         'setitem', 'persistent', 'a text', 'a text as class', 'storage', 'twice'])
def test_no_way_to_call_a_name(tmp_path, monkeypatch, stream):
    monkeypatch.chdir(tmp_path)
    torch.save({}, 'a.pth')
    with zipfile.ZipFile('a.pth') as old, zipfile.ZipFile('b.pth', 'w') as new:
        for name in old.namelist():
            new.writestr(name, b'\x80\x02' + stream + b'.' if name.endswith('data.pkl') else old.read(name))
    refused('b.pth', 'other than tensors|is damaged')
    assert not Path('ran').exists()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('new', [True, False], ids=['zip', 'old'])
def test_a_class_is_read_as_its_name(published_class, monkeypatch, new):
    net = published_class('Net', torch.nn.Module)
    torch.save({'state_dict': {}, 'activation': published_class('STDPSpike'), 'layers': [torch.nn.ReLU, {'net': net}],
                'again': torch.nn.ReLU, 'number': float, 'eval': eval}, 'a.pth', _use_new_zipfile_serialization=new)
    monkeypatch.delitem(sys.modules, 'spiking_model')
    assert checkpoint.read('a.pth') == {
        'state_dict': {}, 'activation': 'STDPSpike', 'layers': ['ReLU', {'net': 'Net'}], 'again': 'ReLU',
        'number': 'float', 'eval': 'eval'}
    assert 'spiking_model' not in sys.modules


@pytest.mark.parametrize('name, surrogate', [
    ('STDPSpike', 'STDB'), ('STDB', 'STDB'), ('LinearSpike', 'Linear'), ('Linear', 'Linear'), ('Other', None)])
def test_a_class_says_the_surrogate(published_class, name, surrogate):
    state = {'state_dict': {}, 'timesteps': 10, 'thresholds': [1.0], 'leak_mem': 1.0}
    torch.save({**state, 'activation': published_class(name)}, 'a.pth')
    state = checkpoint.load('a.pth', 'snn')
    if surrogate:
        assert checkpoint.snn_settings(state, 'a.pth')['activation'] == surrogate
    else:
        with pytest.raises(UserError, match='surrogate Other is none of STDB, Linear, .*import the file'):
            checkpoint.snn_settings(state, 'a.pth')


@pytest.mark.parametrize('new', [True, False], ids=['zip', 'old'])
def test_numbers_of_numpy_are_numbers(tmp_path, new):
    weight = torch.arange(6.).reshape(2, 3)
    odd = {'float': np.float64(0.9), 'int': np.int64(4), 'bool': np.bool_(True), 'half': np.float16(2), 'scalar':
           np.array(3.5), 'whole': np.array(7), 'text': np.str_('STDB'), 'in': (np.float32(0.5), [np.int8(-3)]),
           'complex': np.complex128(1j)}
    plain = {'float': 0.9, 'int': 4, 'bool': True, 'half': 2.0, 'scalar': 3.5, 'whole': 7, 'text': 'STDB',
             'in': (0.5, [-3]), 'complex': 1j}
    arrays = {'rows': np.arange(6.), 'columns': weight.numpy().T, 'big': np.arange(3, dtype='>i4'),
              'none': np.array([])}
    others = {'dtype': torch.float32, 'device': torch.device('cpu'), 'size': torch.Size([2, 3]), 'nothing': None,
              'tensor': weight, 'parameter': torch.nn.Parameter(weight)}
    torch.save({**odd, **arrays, **others, 'state_dict': {'w': weight.numpy()}}, tmp_path / 'a.pth',
               _use_new_zipfile_serialization=new)
    state = checkpoint.load(tmp_path / 'a.pth', 'ann')
    for key, value in plain.items():
        assert state[key] == value and type(state[key]) is type(value), key
    tensors = {'rows': torch.arange(6.).double(), 'columns': weight.T, 'big': torch.arange(3, dtype=torch.int32),
               'none': torch.zeros(0).double()}
    for key, value in {**tensors, **others}.items():
        assert same(state[key], value) and type(state[key]) is type(value), key
        assert not isinstance(value, torch.Tensor) or state[key].dtype == value.dtype, key
    assert same(state['state_dict'], {'w': weight})


# -- what else is in a file -------------------------------------------------------------------------------------------


def test_files_without_weights_are_refused(tmp_path):
    torch.save([1, 2], tmp_path / 'list.pth')
    refused(tmp_path / 'list.pth', 'state_dict')


@pytest.mark.parametrize('named', [
    '{}', 'module.{}', '_orig_mod.{}', 'module._orig_mod.{}', '_orig_mod.module.{}', '_orig_mod._orig_mod.module.{}'])
@pytest.mark.parametrize('bare', [True, False])
def test_weights_of_compiled_and_parallel_networks(tmp_path, named, bare):
    source, model = resnet6(), resnet6()
    weights = {named.format(key).replace('layer1.0', 'layer1._orig_mod.0.module'): value
               for key, value in source.state_dict().items()}
    torch.save(weights if bare else {'state_dict': weights}, tmp_path / 'a.pth')
    checkpoint.load_weights(model, checkpoint.load(tmp_path / 'a.pth', 'ann'), 'a.pth')
    assert same(model.state_dict(), source.state_dict())
    with pytest.raises(UserError, match='names twice'):
        checkpoint.load_weights(model, {'state_dict': {**weights, 'module._orig_mod.classifier.0.weight': weights[
            named.format('classifier.0.weight')], 'classifier.module.0.weight': torch.zeros(10, 512)}}, 'a.pth')


def test_weights_as_torch_itself_names_them():
    model = resnet6()
    model.layer1 = torch.compile(model.layer1)  # nothing is compiled before it runs
    for wrapped in (torch.compile(model), torch.nn.DataParallel(model), torch.compile(torch.nn.DataParallel(model))):
        assert checkpoint.load_weights(resnet6(), {'state_dict': wrapped.state_dict()}, 'a.pth') == []


def test_a_bare_state_dict_is_an_anns(tmp_path):
    torch.save(resnet6().state_dict(), tmp_path / 'bare.pth')
    state = checkpoint.load(tmp_path / 'bare.pth', 'ann')
    assert state.keys() == {'state_dict', 'args'} and checkpoint.load_weights(resnet6(), state, 'bare.pth') == []
    refused(tmp_path / 'bare.pth', 'is a bare state_dict; an SNN also needs thresholds, timesteps and a leak', 'snn')
    weights = RESNET_SNN_STDB('RESNET6', dataset='DIGITS', learn_threshold=True).state_dict()
    torch.save({f'module.{key}': value for key, value in weights.items()}, tmp_path / 'snn.pth')
    for kind in ('ann', 'snn'):
        refused(tmp_path / 'snn.pth', 'an SNN also needs', kind)
    torch.save({}, tmp_path / 'empty.pth')
    refused(tmp_path / 'empty.pth', "as it has no 'state_dict'")


def test_weights_of_a_network_of_ones_own_may_be_called_thresholds_or_leaks(tmp_path):
    def network():
        made = torch.nn.Sequential(torch.nn.Linear(2, 2))
        made.thresholds = torch.nn.Parameter(torch.rand(3))
        return made

    source, model = network(), network()
    torch.save(source.state_dict(), tmp_path / 'bare.pth')
    checkpoint.load_weights(model, checkpoint.load(tmp_path / 'bare.pth', 'ann'), 'bare.pth')
    assert same(dict(model.state_dict()), dict(source.state_dict()))


def test_an_snn_is_not_an_ann(tmp_path):
    refused(saved(tmp_path / 'ann.pth'), '--pretrained_ann', 'snn')
    refused(saved(tmp_path / 'snn.pth', timesteps=10), '--pretrained_snn', 'ann')


def test_weights_that_do_not_fit_are_all_named(tmp_path):
    state = {'state_dict': resnet6().state_dict(), 'args': {'architecture': 'RESNET6', 'dataset': 'DIGITS'}}
    weights = state['state_dict']
    weights['extra.weight'] = weights.pop('pre_process.0.weight')
    weights['pre_process.3.weight'] = torch.zeros(2, 3)
    weights['layer1.0.residual.0.weight'] = torch.full_like(weights['layer1.0.residual.0.weight'], torch.nan)
    model = resnet6()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UserError) as caught:
        checkpoint.load_weights(model, state, 'a.pth')
    for words in ('no pre_process.0.weight', 'surplus extra.weight', 'pre_process.3.weight is 2x3, not 64x64x3x3',
                  'layer1.0.residual.0.weight is not finite', 'RESNET6 for DIGITS', '--architecture'):
        assert words in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_weights_that_are_spoilt_are_not_said_to_be_of_another_network():
    state = {'state_dict': resnet6().state_dict(), 'args': {'architecture': 'RESNET6', 'dataset': 'DIGITS'}}
    state['state_dict']['pre_process.0.weight'].view(-1)[0] = torch.nan
    with pytest.raises(UserError) as caught:
        checkpoint.load_weights(resnet6(), state, 'a.pth')
    assert str(caught.value) == 'a.pth: pre_process.0.weight is not finite; use another copy, or train it anew'


def test_another_data_sets_ann_keeps_all_but_its_last_layer():
    source, target = resnet6(labels=7), resnet6()
    head = target.classifier[0].weight.clone()
    state = {'state_dict': source.state_dict()}
    with pytest.raises(UserError, match='classifier.0.weight is 7x512, not 10x512'):
        checkpoint.load_weights(target, state, 'a.pth')
    new = checkpoint.load_weights(target, state, 'a.pth', may_differ=['classifier.0.weight'])
    assert new == ['classifier.0.weight']
    assert torch.equal(target.classifier[0].weight, head)
    assert torch.equal(target.pre_process[0].weight, source.pre_process[0].weight)


def test_published_forms_load(tmp_path):
    # an ANN saved from DataParallel, accuracy a tensor, thresholds written into it by the published snn.py
    weights = {f'module.{key}': value for key, value in resnet6().state_dict().items()}
    optimizer = torch.optim.SGD(resnet6().parameters(), lr=0.1).state_dict()
    torch.save({'accuracy': torch.tensor(0.9), 'epoch': 200, 'state_dict': weights, 'optimizer': optimizer,
                'thresholds': [1.0, 2.0, 3.0]}, tmp_path / 'ann.pth')
    checkpoint.load_weights(resnet6(), checkpoint.load(tmp_path / 'ann.pth', 'ann'), 'ann.pth')
    # SNNs: the older form has leak_mem and scaling_threshold, the newer one leak; thresholds may be tensors
    old = {'accuracy': 0.9, 'epoch': 2, 'state_dict': weights, 'optimizer': optimizer, 'timesteps': 250,
           'thresholds': [torch.tensor(2.0), 3.0, 4.0], 'leak_mem': torch.tensor(0.99), 'scaling_threshold': 0.5}
    new = {**{key: value for key, value in old.items() if key not in ('leak_mem', 'scaling_threshold')},
           'leak': 1.0, 'activation': 'Linear'}
    for name, state, thresholds, leak in (('old', old, [1.0, 1.5, 2.0], 0.99), ('new', new, [2.0, 3.0, 4.0], 1.0)):
        torch.save(state, tmp_path / name)
        loaded = checkpoint.load(tmp_path / name, 'snn')
        settings = checkpoint.snn_settings(loaded, name)
        assert settings['thresholds'] == thresholds
        assert settings['leak'] == pytest.approx(leak)
        assert settings['timesteps'] == 250
        model = RESNET_SNN_STDB('RESNET6', dataset='DIGITS')
        checkpoint.load_weights(model, loaded, name)
        model.threshold_update(1.0, settings['thresholds'])
        assert model.thresholds.tolist() == [*thresholds, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize('change', [
    {'thresholds': None}, {'thresholds': []}, {'thresholds': [0.0]}, {'thresholds': [float('nan')]}, {'leak': None},
    {'leak': 2.0}, {'leak': 0}, {'timesteps': 0}, {'timesteps': 2.5}, {'timesteps': float('inf')},
    {'timesteps': 'many'}, {'activation': 1}, {'activation': ['STDB']}])
def test_half_an_snn_is_refused(change):
    state = {'timesteps': 10, 'thresholds': [1.0], 'leak': 1.0, 'leaks': [], 'activation': 'STDB'}
    assert checkpoint.snn_settings(state, 'a.pth') == state
    state.update(change)
    with pytest.raises(UserError, match='not a whole SNN checkpoint'):
        checkpoint.snn_settings(state, 'a.pth')


def test_identifiers():
    args = SimpleNamespace(name=None, architecture='VGG16', dataset='CIFAR10', timesteps=100)
    assert files.identifier('ann', args) == 'ann_vgg16_cifar10'
    assert files.identifier('snn', args) == 'snn_vgg16_cifar10_100'
    assert files.identifier('snn', SimpleNamespace(name='mine')) == 'mine'


def test_earlier_runs_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths, said = files.paths('ann', 'x'), []
    files.check_writable(paths.best.parent, paths.metrics.parent)
    files.set_aside(paths, said.append)
    assert said == [] and os.listdir(paths[0].parent) == []
    for number in (1, 2):
        for path in paths:
            path.write_text(f'run {number}')
        files.set_aside(paths, said.append)
    assert {name: (paths[0].parent / name).read_text() for name in os.listdir(paths[0].parent)} == {
        'previous.1.x.pth': 'run 1', 'previous.1.x.last.pth': 'run 1',
        'previous.2.x.pth': 'run 2', 'previous.2.x.last.pth': 'run 2'}
    assert 'kept as previous.1.x.pth' in said[0]


def test_events_of_earlier_runs_are_kept_under_the_number_of_their_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths, said = files.paths('ann', 'a.b'), []
    assert paths.events == Path('logs/ann/a.b')
    paths.best.parent.mkdir(parents=True)
    for number in (1, 2, 3):
        paths.best.write_text(f'run {number}')
        if number != 1:  # the first wrote none
            paths.events.mkdir(parents=True)
            (paths.events / 'events').write_text(f'run {number}')
        files.set_aside([*paths, paths.events], said.append)
    assert {str(path.relative_to('logs/ann')): path.read_text() for path in Path('logs/ann').rglob('events')} == {
        'previous.2.a.b/events': 'run 2', 'previous.3.a.b/events': 'run 3'}
    assert 'logs/ann/a.b is of an earlier run: kept as previous.3.a.b' in said


def test_threshold_cache_is_refused_when_anything_changed(tmp_path):
    path, model = str(tmp_path / 'a.pth'), RESNET_SNN_STDB('RESNET6', dataset='DIGITS')
    settings = {'samples': 512, 'timesteps': 1000}
    key = checkpoint.thresholds_key(model, settings)
    assert checkpoint.cached_thresholds(path, key, 2)[0] is None
    checkpoint.cache_thresholds(path, key, [1.25, 2.5])
    assert checkpoint.cached_thresholds(path, key, 2)[0] == [1.25, 2.5]
    found, note = checkpoint.cached_thresholds(path, checkpoint.thresholds_key(model, {**settings, 'timesteps': 10}), 2)
    assert found is None and 'timesteps' in note
    with torch.no_grad():
        model.classifier[0].weight[0, 0] += 1
    found, note = checkpoint.cached_thresholds(path, checkpoint.thresholds_key(model, settings), 2)
    assert found is None and 'weights' in note
    (tmp_path / 'a.pth.thresholds.json').write_text('{"half')
    found, note = checkpoint.cached_thresholds(path, key, 2)
    assert found is None and 'cannot be read' in note
    for bad in ([1.0], [1.0, -1.0], [1.0, float('nan')]):
        checkpoint.cache_thresholds(path, key, bad)
        assert checkpoint.cached_thresholds(path, key, 2)[0] is None


@pytest.mark.parametrize('bad', [
    'text', 3, torch.zeros(64, 1, 3, 3, dtype=torch.int64), torch.zeros(64, 1, 3, 3).to_sparse(),
    torch.full((64, 1, 3, 3), 1e300, dtype=torch.float64)])
def test_weights_that_are_no_floats_are_named(bad):
    state = {'state_dict': {**resnet6().state_dict(), 'pre_process.0.weight': bad}}
    with pytest.raises(UserError, match=r'pre_process\.0\.weight is (not a dense tensor|not finite)'):
        checkpoint.load_weights(resnet6(), state, 'a.pth')
    with pytest.raises(UserError, match='surplus 7'):
        checkpoint.load_weights(resnet6(), {'state_dict': {**resnet6().state_dict(), 7: torch.zeros(1)}}, 'a.pth')
