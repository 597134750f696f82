"""ann.py and snn.py on a GPU: what they do there is what they do on a CPU."""
import json
from pathlib import Path

import nir
import pytest
import torch
from PIL import Image

import ann
import snn
from conftest import metrics_of, run

pytestmark = [pytest.mark.usefixtures('in_an_empty_folder'),
              pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')]

GPU, CPU = ['--gpu'], ['--no-gpu']
SMALL = ['-a', 'RESNET6', '--dataset', 'DIGITS', '--train_samples', 1000, '--test_samples', 100]
ANN = [*SMALL, '--optimizer', 'Adam', '-lr', '1e-3', '--dropout', 0]
CALIBRATION = ['--calibration_samples', 20, '--calibration_timesteps', 30]
QCFS = ['--activation', 'QCFS', '--levels', 4, '--batch_norm']
SNN = {
    'published': ([], ['--timesteps', 20, '--default_threshold', '0.3', '--scaling_factor', 'auto', *CALIBRATION]),
    'leaky': ([], ['--timesteps', 20, '--default_threshold', '0.3', '--leak', '0.95', '--learn_threshold',
                   '--learn_leak', *CALIBRATION]),
    'low latency': (QCFS, ['--timesteps', 2, '--activation', 'Linear']),
    'bounds of channels': ([*QCFS, '--bounds', 'channel'], ['--timesteps', 2, '--activation', 'Linear']),
}


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """TF32, torch's default for convolutions on a GPU, would differ in the third digit."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


# in QCFS a value between two levels may round to either side
@pytest.mark.parametrize('flags, close', [([], 1e-4), (QCFS, 1e-3)], ids=['relu', 'qcfs'])
def test_an_ann_trains_as_on_a_cpu(flags, close):
    for name, device in (('gpu', GPU), ('cpu', CPU)):  # the same images, the same weights to begin with
        run(ann, *ANN, *flags, *device, '--epochs', 1, '--batch_size', 1000, '--name', name)
    on_gpu, on_cpu = (metrics_of(f'logs/ann/{name}.jsonl')[1][0]['train_loss'] for name in ('gpu', 'cpu'))
    assert on_gpu == pytest.approx(on_cpu, rel=close)  # of the one step, before which the networks are alike


@pytest.mark.parametrize('amp', [[], ['--amp']], ids=['float32', 'amp'])
@pytest.mark.parametrize('kind', SNN)
def test_files_of_a_gpu_serve_a_cpu_and_the_other_way_round(kind, amp):
    of_ann, of_snn = SNN[kind]
    run(ann, *ANN, *of_ann, *amp, *GPU, '--epochs', 3, '--name', 'a')
    run(snn, *SMALL, *of_snn, *amp, *GPU, '--pretrained_ann', 'trained_models/ann/a.pth', '--epochs', 1, '--name', 's')
    run(snn, *SMALL, *of_snn, *amp, *CPU, '--resume', 'trained_models/snn/s.last.pth', '--epochs', 2, '--name', 's')
    run(snn, *SMALL, *of_snn, *amp, *GPU, '--resume', 'trained_models/snn/s.last.pth', '--epochs', 3, '--name', 's')
    assert [epoch['epoch'] for epoch in metrics_of('logs/snn/s.jsonl')[1]] == [0, 1, 2, 3]
    found = []
    for device in (GPU, CPU):
        run(snn, *SMALL, *device, '--encoding', 'direct', '--pretrained_snn', 'trained_models/snn/s.pth',
            '--test_only', '--report', f'report{device[0]}')
        found.append(json.loads(Path(f'report{device[0]}/report.json').read_text()))
    gpu, cpu = found  # a potential at the threshold may round to either side
    assert gpu['accuracy']['accuracy'] == pytest.approx(cpu['accuracy']['accuracy'], abs=0.02)
    rates = [[layer['firing_rate'] for layer in report['layers'][1:-1]] for report in found]
    assert rates[0] == pytest.approx(rates[1], rel=0.01) and min(rates[0]) > 0


def test_a_picture_is_classified_and_a_network_exported(capsys):
    run(ann, *ANN, *QCFS, *GPU, '--epochs', 2, '--name', 'a')
    run(snn, *SMALL, *GPU, '--pretrained_ann', 'trained_models/ann/a.pth', '--timesteps', 2, '--epochs', 1, '--name',
        's', '--export_nir', 's.nir')
    Image.new('L', (8, 8), 100).save('grey.png')
    said = []
    for device in (GPU, CPU):
        capsys.readouterr()
        run(snn, '--pretrained_snn', 'trained_models/snn/s.pth', '--predict', 'grey.png', *device)
        said.append([line for line in capsys.readouterr().out.splitlines() if 'grey.png' in line])
    assert said[0] == said[1] and said[0]
    assert nir.read('s.nir').nodes
