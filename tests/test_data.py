import os
import pickle
import signal
import struct
import subprocess
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from experiment import UserError, data
from experiment.data import crop_and_flip, epoch_loader, load
from self_models import INPUT_SHAPES


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    import torchvision

    def fail(*args, **kwargs):
        raise URLError('no network in a test')

    monkeypatch.setattr(torchvision.datasets.mnist, 'download_and_extract_archive', fail)
    monkeypatch.setattr(torchvision.datasets.cifar, 'download_and_extract_archive', fail)


def write_idx(folder, train=12, test=5):
    """An MNIST of random images, the first all white; the images by file name."""
    folder.mkdir(parents=True)
    written = {}
    for part, count in (('train', train), ('t10k', test)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[0] = 255
        (folder / f'{part}-images-idx3-ubyte').write_bytes(struct.pack('>iiii', 2051, count, 28, 28) + images.tobytes())
        labels = bytes(n % 10 for n in range(count))
        (folder / f'{part}-labels-idx1-ubyte').write_bytes(struct.pack('>ii', 2049, count) + labels)
        written[part] = images
    return written


def write_cifar(folder, monkeypatch, kind, files, classes, labels_key, classes_key):
    """Two random images in each of `files` (the last is the test set); torchvision's checksums are taken out."""
    import torchvision
    folder.mkdir(parents=True)
    written = {}
    for file in files:
        written[file] = np.random.default_rng(len(written)).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
        (folder / file).write_bytes(pickle.dumps({'data': written[file].reshape(2, -1), labels_key: [0, 3]}))
    kind = getattr(torchvision.datasets, kind)
    (folder / kind.meta['filename']).write_bytes(pickle.dumps({classes_key: classes}))
    monkeypatch.setattr(kind, 'train_list', [(file, None) for file in files[:-1]])
    monkeypatch.setattr(kind, 'test_list', [(files[-1], None)])
    monkeypatch.setattr(kind, 'meta', {**kind.meta, 'md5': None})
    return written


def picture(path, value=0, size=(32, 32), mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def noise(path, size=(32, 32), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def noise_folder(root, test='test', count=8, size=(32, 32)):
    for n in range(count):
        noise(root / 'train' / 'ab'[n % 2] / f'{n:02}.png', size, n)
    noise(root / test / 'a' / '0.png', size, 100)
    noise(root / test / 'b' / '0.png', size, 101)
    return root


def all_of(loader):
    images, labels = zip(*loader)
    return torch.cat(images), torch.cat(labels)


def message(*args, **kwargs):
    """The one line that load(...) fails with."""
    with pytest.raises(UserError) as error:
        load(*args, **kwargs)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_importing_is_quick():
    code = "import sys, experiment.data; print({'torchvision', 'sklearn', 'PIL'} & set(sys.modules) or 'none')"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    assert subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True).stdout == 'none\n'


def test_names():
    assert tuple(INPUT_SHAPES) == ('MNIST', 'FASHIONMNIST', 'CIFAR10', 'CIFAR100', 'IMAGENET', 'FOLDER', 'DIGITS')
    assert 'MNIST, FASHIONMNIST' in message('SVHN', '.')


@pytest.mark.parametrize('name, folder', [
    ('MNIST', 'mnist/MNIST/raw'), ('FASHIONMNIST', 'fashion_mnist/FashionMNIST/raw')])
def test_mnist(tmp_path, name, folder):
    written = write_idx(tmp_path / folder)
    train, test, classes, shape = load(name, str(tmp_path))[:4]
    assert (len(train), len(test), len(classes), shape) == (12, 5, 10, (1, 28, 28))
    for part, images in ((train, written['train']), (test, written['t10k'])):  # neither is augmented
        loaded, labels = all_of(epoch_loader(part, 4, seed=1))
        assert torch.equal(loaded, torch.from_numpy(images)[:, None] / 255) and loaded.max() == 1
        assert labels.tolist() == [n % 10 for n in range(len(images))]
    image, label = train[11]
    assert (image.shape, image.dtype, label, type(label)) == ((1, 28, 28), torch.float32, 1, int)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write_idx(tmp_path / 'Datasets/mnist/MNIST/raw')
    assert len(load('MNIST', '~/Datasets').train) == 12


@pytest.mark.parametrize('name, files, keys, inner', [
    ('CIFAR10', ['data_batch_1', 'data_batch_2', 'test_batch'], ('labels', 'label_names'), 'cifar-10-batches-py'),
    ('CIFAR100', ['train', 'test'], ('fine_labels', 'fine_label_names'), 'cifar-100-python')])
def test_cifar(tmp_path, monkeypatch, name, files, keys, inner):
    monkeypatch.setitem(data._TORCHVISION, name, (*data._TORCHVISION[name][:3], files))
    names = ['cat', 'dog', 'eel', 'fox']
    written = write_cifar(tmp_path / 'cifar_data' / inner, monkeypatch, name, files, names, *keys)
    train, test, classes, shape = load(name, tmp_path)[:4]
    assert (len(train), len(test), classes, shape) == (2 * len(files) - 2, 2, names, (3, 32, 32))
    images, labels = all_of(epoch_loader(test, 2, seed=1))
    assert torch.equal(images, (torch.from_numpy(written[files[-1]]) / 255 - .5) / .5)
    assert labels.tolist() == [0, 3]
    assert next(iter(epoch_loader(test, 2)))[0].is_contiguous()  # the files hold the channels first, torchvision last
    one, two = (all_of(epoch_loader(train, 2, seed=seed))[0] for seed in (1, 2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize('name, parts', [
    ('MNIST', ['mnist/MNIST/raw', 'train-images-idx3-ubyte', 't10k-labels-idx1-ubyte']),
    ('FASHIONMNIST', ['fashion_mnist/FashionMNIST/raw', 'train-images-idx3-ubyte']),
    ('CIFAR10', ['cifar_data/cifar-10-batches-py', 'data_batch_5', 'cifar-10-python.tar.gz']),
    ('CIFAR100', ['cifar_data/cifar-100-python', 'train, test, meta', 'cifar-100-python.tar.gz'])])
def test_missing_set(tmp_path, capfd, name, parts):
    text = message(name, tmp_path)
    assert all(part in text for part in [*parts, 'no network in a test', str(tmp_path), '--data_dir'])
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('file, content', [
    ('train-images-idx3-ubyte', b''), ('t10k-labels-idx1-ubyte', struct.pack('>ii', 2049, 5) + b'\0'),
    ('train-images-idx3-ubyte', struct.pack('>iiii', 2051, 12, 28, 28) + b'\0' * 5000),
    ('train-labels-idx1-ubyte', struct.pack('>ii', 2049, 3) + b'\0\1\2')])
def test_damaged_mnist(tmp_path, file, content):
    folder = tmp_path / 'mnist/MNIST/raw'
    write_idx(folder)
    (folder / file).write_bytes(content)
    text = message('MNIST', tmp_path)
    assert 'damaged' in text and f'{folder} ' in text and 'delete' in text


def test_damaged_cifar(tmp_path):
    folder = tmp_path / 'cifar_data/cifar-100-python'
    folder.mkdir(parents=True)
    for file in ('train', 'test', 'meta'):
        (folder / file).write_bytes(b'half a file')
    text = message('CIFAR100', tmp_path)
    assert 'damaged' in text and f'{folder} ' in text and 'delete' in text


def test_digits():
    from sklearn.datasets import load_digits
    one, two = load('DIGITS', 'nowhere', seed=0), load('DIGITS', 'nowhere', seed=1)
    assert (len(one.train), len(one.test), one.input_shape, len(one.classes)) == (1437, 360, (1, 8, 8), 10)
    images, labels = (torch.cat(parts) for parts in zip(*(all_of(epoch_loader(part, 500)) for part in one[:2])))
    assert (images.min(), images.max()) == (0, 1)
    pixels = load_digits().images.reshape(1797, -1)
    assert sorted(map(tuple, (images * 16).reshape(1797, -1).tolist())) == sorted(map(tuple, pixels.tolist()))
    assert 34 <= labels[1437:].bincount().min() and labels[1437:].bincount().max() <= 38
    assert torch.equal(one.train.images, two.train.images)
    assert torch.equal(all_of(epoch_loader(one.train, 500, seed=1))[0], images[:1437])


def test_folder_takes_any_picture(tmp_path):
    picture(tmp_path / 'train/grey/1.png', 255, (40, 20), 'L')
    picture(tmp_path / 'train/grey/2.tif', 65535 // 2, (8, 8), 'I;16')
    picture(tmp_path / 'train/grey/deeper/3.JPG', (128, 128, 128), (100, 7))
    picture(tmp_path / 'train/red/1.png', (255, 0, 0, 255), (5, 5), 'RGBA')
    palette = Image.new('P', (6, 6))
    palette.putpalette([255, 0, 0])
    palette.save(tmp_path / 'train/red/2.png', transparency=b'\x80')
    (tmp_path / 'train/red/notes.txt').write_text('no picture')
    (tmp_path / 'train/red/._1.png').write_text('left by another system')
    (tmp_path / 'train/.cache').mkdir()
    picture(tmp_path / 'test/red/1.bmp', (255, 0, 0))
    train, test, classes, shape = load('FOLDER', tmp_path, image_size=12)[:4]
    assert (classes, shape, len(test), test[0][1]) == (['grey', 'red'], (3, 12, 12), 1, 1)
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    # No picture is cropped or flipped in memory; those of one colour keep it through resizing.
    assert [train.images[n].unique().tolist() for n in range(3)] == [[255], [127], [128]]
    assert all(torch.equal(train.images[n, :, 5, 5], torch.tensor([255, 0, 0], dtype=torch.uint8)) for n in (3, 4))
    assert torch.equal(test[0][0], torch.tensor([1., -1, -1])[:, None, None].expand(3, 12, 12))


def test_folder_labels_go_by_name(tmp_path):
    for n, name in enumerate('abc'):
        picture(tmp_path / 'train' / name / '1.png', (n, 0, 0))
    picture(tmp_path / 'val/c/1.png')
    picture(tmp_path / 'val/b/1.png')
    train, test, classes, _ = load('FOLDER', tmp_path)[:4]
    assert (classes, [label for _, label in train], [label for _, label in test]) == (list('abc'), [0, 1, 2], [1, 2])
    picture(tmp_path / 'test/a/1.png')  # test/ goes before val/
    assert [label for _, label in load('FOLDER', tmp_path).test] == [0]


def test_many_pictures_are_read_in_order(tmp_path):
    count = 2100  # enough for several processes
    for folder, n in [(tmp_path / 'train/a', count), (tmp_path / 'train/b', 1), (tmp_path / 'test/a', 1)]:
        folder.mkdir(parents=True)
        for i in range(n):
            (folder / f'{i:04}.ppm').write_bytes(b'P6 1 1 255\n' + bytes([i // 256, i % 256, 7]))
    torch.manual_seed(3)
    images = load('FOLDER', tmp_path, image_size=1).train.images.long()[:count]
    assert (images[:, 0] * 256 + images[:, 1]).flatten().tolist() == list(range(count))
    assert images[:, 2].unique().tolist() == [7]
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(3))  # the global one is untouched


def test_folder_errors(tmp_path):
    root = tmp_path / 'set'
    assert f'there is no {root};' in message('FOLDER', root)
    root.mkdir()
    assert f'there is no {root}/train;' in message('FOLDER', root)
    (root / 'train').mkdir()
    assert f'there is no {root}/test or {root}/val;' in message('FOLDER', root)
    (root / 'val').mkdir()
    assert f'in sub-folders of {root}/train;' in message('FOLDER', root)
    (root / 'train/a').mkdir()
    assert f'in sub-folders of {root}/train;' in message('FOLDER', root)
    picture(root / 'train/a/1.png')
    assert f'in sub-folders of {root}/val;' in message('FOLDER', root)
    picture(root / 'val/a/1.png')
    assert 'one class only' in message('FOLDER', root)
    (root / 'train/hollow').mkdir()
    assert 'no pictures of class hollow;' in message('FOLDER', root)
    picture(root / 'train/hollow/1.png')
    picture(root / 'val/zebra/1.png')
    picture(root / 'val/yak/1.png')
    text = message('FOLDER', root)
    assert 'class yak, zebra is not in' in text and f'{root}/val' in text and f'{root}/train' in text


@pytest.mark.parametrize('content', [b'', b'no picture', 'half'])
def test_unreadable_picture(tmp_path, content):
    bad = noise_folder(tmp_path) / 'train/a/00.png'
    bad.write_bytes(bad.read_bytes()[:900] if content == 'half' else content)
    assert message('FOLDER', tmp_path).startswith(f'{bad}: ')


@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_picture_in_an_epoch(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(data, 'IN_MEMORY_BYTES', 0)
    bad = noise_folder(tmp_path) / 'train/a/00.png'
    bad.write_bytes(b'no picture')
    loader = epoch_loader(load('FOLDER', tmp_path).train, 2, workers, shuffle=True)
    with pytest.raises(UserError) as error:
        all_of(loader)
    assert str(error.value).startswith(f'{bad}: ') and '\n' not in str(error.value)


@pytest.mark.parametrize('workers', [0, 1])
def test_pictures_are_decoded_by_as_many_processes_as_asked_for(tmp_path, workers):
    picture(tmp_path / 'a.png', (9, 9, 9), (2, 2))

    def prepare(image):
        return image.point(lambda value: 0 if torch.utils.data.get_worker_info() is None else 1)
    images = data._decode([tmp_path / 'a.png'] * 2001, prepare, 2, workers)
    assert images.shape == (2001, 3, 2, 2) and (images == workers).all()


class Deadly(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


class Faulty(Deadly):
    def __getitem__(self, index):
        raise RuntimeError('Caught RuntimeError in DataLoader worker process 0.')  # torch's words for a bug in one


def test_dead_worker():
    with pytest.raises(UserError, match='--num_workers') as error:
        all_of(epoch_loader(Deadly(), 2, num_workers=1))
    assert '\n' not in str(error.value)
    with pytest.raises(RuntimeError, match='Caught RuntimeError'):  # no user can put that right
        all_of(epoch_loader(Faulty(), 2))


@pytest.mark.parametrize('inner', ['', 'imagenet'])
def test_imagenet(tmp_path, inner):
    noise_folder(tmp_path / inner, 'val', 4, (260, 300))
    picture(tmp_path / inner / 'val/a/white.png', (255, 255, 255), (50, 80))
    train, test, classes, shape = load('IMAGENET', tmp_path)[:4]
    assert (len(train), len(test), classes, shape) == (4, 3, ['a', 'b'], (3, 224, 224))
    one, two, again = (all_of(epoch_loader(train, 2, seed=seed))[0] for seed in (1, 2, 1))
    assert one.shape == (4, 3, 224, 224) and one.is_contiguous() and one.min() < -.5 and one.max() > .5
    assert torch.equal(one, again) and not torch.equal(one, two)
    images, labels = all_of(epoch_loader(test, 2, seed=1))
    assert torch.equal(images, all_of(epoch_loader(test, 2, seed=2))[0]) and labels.tolist() == [0, 0, 1]
    assert (images[1] == 1).all()


def test_imagenet_errors(tmp_path):
    text = message('IMAGENET', tmp_path)
    assert f'{tmp_path} or {tmp_path}/imagenet has to hold train/ and val/' in text
    noise_folder(tmp_path, 'test')  # but ImageNet's test/ has no labels
    assert f'there is no {tmp_path}/val;' in message('IMAGENET', tmp_path)
    picture(tmp_path / 'val/1.png')
    assert f'in sub-folders of {tmp_path}/val;' in message('IMAGENET', tmp_path)


def test_crop_and_flip():
    images = torch.arange(1, 1 + 2 * 3 * 6 * 5, dtype=torch.uint8).reshape(2, 3, 6, 5).repeat(150, 1, 1, 1)
    torch.manual_seed(0)
    crops = crop_and_flip(images)
    assert crops.shape == images.shape and crops.dtype == torch.uint8
    seen = set()
    for image, crop in zip(images, crops):
        padded = torch.zeros(3, 14, 13, dtype=torch.uint8)
        padded[:, 4:10, 4:9] = image
        places = [(top, left, flip) for top in range(9) for left in range(9) for flip in (False, True)
                  if torch.equal(crop, padded[:, top:top + 6, left:left + 5].flip([2] if flip else []))]
        assert len(places) == 1  # every window of this padded image is another one
        seen.add(places[0])
    assert [set(values) for values in zip(*seen)] == [set(range(9)), set(range(9)), {False, True}]


def test_only_training_pictures_are_augmented(tmp_path):
    train, test = load('FOLDER', noise_folder(tmp_path))[:2]
    assert torch.equal(all_of(epoch_loader(test, 2, seed=1))[0], all_of(epoch_loader(test, 2, seed=2))[0])
    one, two, again = (all_of(epoch_loader(train, 3, seed=seed))[0] for seed in (1, 2, 1))
    assert torch.equal(one, again) and not torch.equal(one, two)
    assert one.min() == -1 and one.max() == 1 and one.dtype == torch.float32 and one.is_contiguous()


def test_an_epoch_depends_on_its_seed_alone(tmp_path, monkeypatch):
    noise_folder(tmp_path, count=9)
    in_memory = load('FOLDER', tmp_path).train
    monkeypatch.setattr(data, 'IN_MEMORY_BYTES', 0)
    on_disk = load('FOLDER', tmp_path).train
    assert in_memory.in_memory and not on_disk.in_memory
    torch.manual_seed(5)
    state = torch.get_rng_state()
    loader = epoch_loader(in_memory, 4, seed=7, shuffle=True)
    images, labels = all_of(loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(loader) == 3 and sorted(labels.tolist()) == [0] * 5 + [1] * 4
    torch.manual_seed(6)
    for again in (loader, epoch_loader(on_disk, 4, 0, 7, True), epoch_loader(on_disk, 4, 2, 7, True)):
        other_images, other_labels = all_of(again)
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)
    assert not torch.equal(images, all_of(epoch_loader(in_memory, 4, seed=8, shuffle=True))[0])


def test_order(tmp_path):
    write_idx(tmp_path / 'mnist/MNIST/raw', train=100)
    train = load('MNIST', tmp_path).train
    train.labels = torch.arange(100)
    orders = [all_of(epoch_loader(train, 8, seed=seed, shuffle=True))[1].tolist() for seed in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert orders[0] != orders[1] and list(range(100)) not in orders
    assert all_of(epoch_loader(train, 8))[1].tolist() == list(range(100))


def test_loader_takes_other_data_sets():
    dataset = torch.utils.data.TensorDataset(torch.arange(5.), torch.arange(5))
    assert all_of(epoch_loader(dataset, 2))[1].tolist() == [0, 1, 2, 3, 4]


def test_subsets(tmp_path):
    def chosen(seed, **samples):
        train, test = load('DIGITS', '', seed=seed, **samples)[:2]
        return len(train), len(test), train.images

    assert chosen(0, train_samples=20)[:2] == (20, 360)
    assert chosen(0, test_samples=7)[:2] == (1437, 7)
    assert torch.equal(chosen(0, train_samples=20)[2], chosen(0, train_samples=20)[2])
    assert not torch.equal(chosen(0, train_samples=20)[2], chosen(1, train_samples=20)[2])
    assert torch.equal(chosen(0, train_samples=1437)[2], chosen(0)[2])
    assert '--train_samples 1438: there are 1437 train images' in message('DIGITS', '', train_samples=1438)
    assert '--test_samples 361: there are 360 test images' in message('DIGITS', '', test_samples=361)


def test_images_held_out_for_validation():
    def contents(dataset):
        return {bytes(image.numpy()) for image in dataset.images}

    whole = load('DIGITS', '')
    part = load('DIGITS', '', validation_fraction=0.2)
    assert (len(part.train), len(part.validation), len(part.test)) == (1150, 287, 360)
    assert whole.selection == 'test' and part.selection == 'validation'
    assert contents(part.train) | contents(part.validation) == contents(whole.train)
    for name in ('train', 'test'):
        assert not contents(part.validation) & contents(getattr(part, name))
    # fewer training images do not change which ones are held out, nor does holding out change which are taken
    few = load('DIGITS', '', train_samples=100, validation_fraction=0.2)
    assert torch.equal(few.validation.images, part.validation.images)
    assert torch.equal(few.train.images, load('DIGITS', '', train_samples=100).train.images)
    other = load('DIGITS', '', seed=1, validation_fraction=0.2)
    assert not torch.equal(other.validation.images, part.validation.images)


def test_subset_keeps_labels_and_reads_no_more(tmp_path):
    for n in range(30):
        picture(tmp_path / 'train' / 'ab'[n // 15] / f'{n:02}.png', (n, n, n), (4, 4))
    picture(tmp_path / 'test/a/1.png')
    train = load('FOLDER', tmp_path, image_size=4, train_samples=10).train
    numbers = train.images[:, 0, 0, 0].tolist()
    assert len(set(numbers)) == 10 and train.labels.tolist() == [n // 15 for n in numbers]
    left_out = min(set(range(30)) - set(numbers))
    (tmp_path / 'train' / 'ab'[left_out // 15] / f'{left_out:02}.png').write_text('no picture')
    assert len(load('FOLDER', tmp_path, image_size=4, train_samples=10).train) == 10
    assert f'{left_out:02}.png' in message('FOLDER', tmp_path, image_size=4)
