"""What goes wrong ends in one line that says what to do, and costs no checkpoint."""
import copy
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

import ann
import self_models
import snn
from conftest import CALIBRATION, SMALL, SPIKING, fails, load, run, same
from experiment import UserError, data, engine, options

pytestmark = pytest.mark.usefixtures('in_an_empty_folder')


@pytest.mark.parametrize('error', [
    MemoryError(), RuntimeError('CUDA out of memory. Tried to allocate'), RuntimeError("can't allocate memory: 9 B"),
    RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'), RuntimeError('a bug')])
def test_out_of_memory_is_said_and_a_bug_is_not_hidden(error, monkeypatch):
    def main(args):
        raise error
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    with pytest.raises(RuntimeError if str(error) == 'a bug' else SystemExit, match='a bug|lower --batch_size'):
        options.run(main, None, 'ann.py')


def test_user_errors_are_one_line_and_status_1(called):
    done = called(snn, *SPIKING, '--pretrained_ann', 'no  such.pth')
    assert done.returncode == 1
    assert done.stderr == ('snn.py: error: no  such.pth: there is no such file; '
                           'give the path of a checkpoint that ann.py wrote\n')
    done = called(ann, '--dataset', 'FOLDER', '--data_dir', 'nowhere')
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'nowhere' in done.stderr


def test_operating_system_errors_are_one_line(called):
    Path('logs').write_text('in the way')
    done = called(ann, *SMALL, '--epochs', 1, '--log')
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'logs' in done.stderr


@pytest.mark.parametrize('module, flags', [(ann, SMALL), (snn, SPIKING)])
def test_a_folder_that_cannot_be_written(module, flags):
    Path('trained_models').write_text('in the way')
    fails(module, 'trained_models.*cannot write', *flags, '--epochs', 1)


def test_network_and_data_that_do_not_go_together():
    fails(ann, 'VGG9 halves the image 4 times', '-a', 'VGG9', '--dataset', 'DIGITS')
    fails(snn, 'VGG9 halves the image 4 times', '-a', 'VGG9', '--dataset', 'DIGITS')
    for size in (2, 4):  # each of their convolutions takes a pixel off
        with pytest.raises(ValueError, match=f'VGG16 with kernels of {size} leaves nothing'):
            self_models.VGG('VGG16', kernel_size=size)


def test_more_samples_than_there_are():
    fails(ann, 'there are 1437 train images', *SMALL, '--train_samples', 2000)


def test_a_validation_set_that_leaves_nothing():
    fails(ann, 'leaves 719 of 1437 train images', *SMALL, '--train_samples', 720, '--validation_fraction', '0.5')


@pytest.mark.skipif(torch.cuda.is_available(), reason='CUDA is present')
def test_cuda_asked_for_and_absent():
    fails(ann, 'no CUDA device', *SMALL[:-1], '--gpu')


def test_checkpoints_of_other_networks(trained):
    fails(snn, r'RESNET6 for DIGITS.*no features\.0\.weight', '-a', 'VGG5', '--dataset', 'DIGITS', '--pretrained_ann',
          trained)
    fails(ann, r'no layer3\.0\.', '-a', 'RESNET12', '--dataset', 'DIGITS', '--pretrained_ann', trained)
    fails(snn, 'holds an ANN.*--pretrained_ann', *SPIKING, '--pretrained_snn', trained)


def test_resume_without_a_checkpoint(trained):
    fails(ann, 'there is no trained_models/ann/ann_resnet6_digits.last.pth', *SMALL, '--resume')
    fails(ann, 'no such file', *SMALL, '--resume', 'none.pth')
    fails(ann, 'was trained with --optimizer Adam', *SMALL, '--resume', trained)


def test_a_run_that_fails_early_leaves_earlier_checkpoints_in_place():
    run(snn, *SPIKING, '--epochs', 1)
    folder = Path('trained_models/snn')
    before = {path.name: path.read_bytes() for path in folder.glob('*.pth')}
    fails(snn, 'no such file', *SPIKING, '--pretrained_ann', 'typo.pth')
    fails(snn, 'loss became', *SPIKING, '--epochs', 2, '-lr', '1e38', '--train_samples', 96, '--batch_size', 8)
    assert {path.name: path.read_bytes() for path in folder.glob('*.pth')} == before


# -- packages that do not load -----------------------------------------------------------------------------------------

@pytest.fixture
def broken(monkeypatch, tmp_path):
    """broken(package, words): from now on its import raises this, as one does that was built for other packages."""
    def make(package, words):
        for name in [*sys.modules]:
            if name.split('.')[0] == package or name.startswith(f'torch.utils.{package}'):
                monkeypatch.delitem(sys.modules, name)
        (tmp_path / 'site' / package).mkdir(parents=True)
        (tmp_path / 'site' / package / '__init__.py').write_text(f'raise {words}')
        monkeypatch.syspath_prepend(tmp_path / 'site')
    return make


MISMATCH = "RuntimeError('operator torchvision::nms\\ndoes not exist')"


@pytest.mark.parametrize('name', ['MNIST', 'CIFAR10', 'IMAGENET'])
@pytest.mark.parametrize('version, fitting', [('2.14.1+cpu', '0.29'), ('2.11.0', '0.26')])
def test_a_torchvision_that_does_not_fit_torch_says_which_one_does(name, version, fitting, broken, monkeypatch):
    for part in ('train', 'val'):
        for label in 'ab':
            Path(part, label).mkdir(parents=True)
            Path(part, label, '1.png').touch()
    broken('torchvision', MISMATCH)
    monkeypatch.setattr(torch, '__version__', version)
    said = (f'^{name}: needs torchvision, which does not load .operator torchvision::nms does not exist.; '
            f'torch {re.escape(version)} goes with torchvision {fitting}; install the two together')
    fails(ann, said, *SMALL[:2], '--dataset', name, '--data_dir', '.', '--no-gpu')
    if name == 'IMAGENET':
        with pytest.raises(UserError, match=said):
            data.picture('train/a/1.png', name, (3, 224, 224))


@pytest.mark.parametrize('package, words, said, flags', [
    ('sklearn', "ValueError('numpy.dtype size changed')", 'pip install --force-reinstall scikit-learn', []),
    ('matplotlib', "AttributeError('no _ARRAY_API')", 'pip install --force-reinstall matplotlib', ['--report', 'r']),
    ('nir', "TypeError('')", r'.TypeError.; pip install --force-reinstall nir', ['--export_nir', 'x.nir']),
    ('tensorboard', "TypeError('Descriptors')", 'pip install --force-reinstall tensorboard', ['--tensorboard']),
    ('tensorboard', "ModuleNotFoundError('No google')", 'No google.; pip install tensorboard', ['--tensorboard'])])
def test_a_package_that_does_not_load_is_said(package, words, said, flags, broken):
    broken(package, words)
    fails(snn, f'does not load .*{said}$', *SPIKING, '--epochs', 1, *flags)
    assert not list(Path().rglob('*.pth'))


@pytest.mark.parametrize('workers', [0, 1])
def test_a_pillow_that_does_not_load_is_said(workers, broken):
    broken('PIL', "ImportError('the _imaging extension was built for another version')")
    with pytest.raises(UserError, match='^pictures: needs pillow, .*another version.*--force-reinstall pillow$'):
        data._decode(['a.png'] * 2001, None, 8, workers)


def test_a_pillow_that_does_not_load_is_said_before_a_folder_is_walked(broken):
    for part in ('train', 'test'):
        Path(f'pictures/{part}/cat').mkdir(parents=True)
    broken('PIL', "ImportError('the _imaging extension was built for another version')")
    fails(ann, 'pictures: needs pillow', '--dataset', 'FOLDER', '--data_dir', 'pictures', '--no-gpu', '--epochs', 1)


# -- training that goes wrong -----------------------------------------------------------------------------------------

def test_a_loss_that_is_not_finite():
    fails(ann, 'loss became (nan|inf).*--learning_rate', *SMALL, '-lr', '1e30', '--epochs', 3)


def test_a_loss_that_is_not_finite_after_the_last_step_costs_no_checkpoint():
    whole = ('--batch_size', 96)  # one step an epoch: what it does is only seen in the test
    run(ann, *SMALL, *whole, '--epochs', 1)
    path = Path('trained_models/ann/ann_resnet6_digits.last.pth')
    before = path.read_bytes()
    fails(ann, '^after epoch 2 the loss became nan.*--learning_rate', *SMALL, *whole, '-lr', '1e30', '--epochs', 2,
          '--resume')
    assert path.read_bytes() == before


def test_a_network_that_diverges_says_where_and_leaves_the_last_whole_checkpoint():
    # a NaN potential passes no threshold, so the network falls silent, and the loss of silence is finite: ln 10
    flags = ['-a', 'RESNET6', '--dataset', 'DIGITS', '--train_samples', 64, '--test_samples', 32, '--no-gpu',
             '--timesteps', 12, '--optimizer', 'SGD', '--default_threshold', 0.01]
    run(snn, *flags, '-lr', '1e-9', '--epochs', 1)
    folder = Path('trained_models/snn')
    before = {path.name: path.read_bytes() for path in folder.glob('*.pth')}
    for batch_size, where in ((64, 'after epoch 2'), (16, 'at batch 2')):
        fails(snn, f'^{where} the loss became nan, as the weights of pre_process.0 left the finite range: lower',
              *flags, '-lr', '1e30', '--batch_size', batch_size, '--epochs', 2, '--resume')
        assert {path.name: path.read_bytes() for path in folder.glob('*.pth')} == before


def test_what_is_not_finite_is_named():
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    for model in (self_models.ResNet('RESNET6', dataset='DIGITS'),
                  self_models.RESNET_SNN_STDB('RESNET6', dataset='DIGITS', timesteps=12, default_threshold=0.1)):
        with torch.no_grad():
            model.layer1[0].residual[0].weight.fill_(3e38)  # finite, but sums of it are not
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        shown = data.Pictures((images * 255).byte(), labels, data.Transform(signed=False))
        loader = data.epoch_loader(shown, 4)
        with pytest.raises(UserError, match='^at batch 1 the loss became nan: lower --learning_rate'):
            engine.train_epoch(model, loader, optimizer, engine.cross_entropy, torch.device('cpu'))
        assert same(before, model.state_dict())  # the step was not taken
        with torch.no_grad():
            model.classifier[0].weight[2] = torch.inf
        with pytest.raises(UserError, match='^after epoch 3 the weights of classifier.0 left the finite range'):
            engine.check_finite(1.0, 'after epoch 3', model)


def test_no_progress_stops_the_run(monkeypatch):
    monkeypatch.setattr(engine, 'test', lambda *_: engine.Metrics(2.3, 0.1))
    fails(snn, 'does not progress.*10.00%', *SPIKING, '--epochs', 10, '--train_samples', 8, '--timesteps', 6)
    assert load('trained_models/snn/snn_resnet6_digits_6.last.pth')['epoch'] == 6


# -- conversion that goes wrong ---------------------------------------------------------------------------------------

def test_a_scaling_factor_that_is_too_large(trained):
    fails(snn, r'--scaling_factor 3.4e\+38: a threshold', *SPIKING, *CALIBRATION, '--pretrained_ann', trained,
          '--scaling_factor', '3.4e38')


def test_a_dead_layer_is_named_with_its_flag(trained):
    fails(snn, r'pre_process\.3 never receives a spike.*--calibration_timesteps', *SPIKING, '--pretrained_ann', trained,
          '--calibration_timesteps', 1)
