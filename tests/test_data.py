import errno
import math
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from experiment import UserError, data, picture_files
from experiment.data import Sampling, crop_and_flip, cut_out, epoch_loader, load
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
    one, two = (load('DIGITS', 'nowhere', sampling=Sampling(seed=seed)) for seed in (0, 1))
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
    # The last one's red is half transparent, over black.
    assert [train.images[n, :, 5, 5].tolist() for n in (3, 4)] == [[255, 0, 0], [128, 0, 0]]
    assert torch.equal(test[0][0], torch.tensor([1., -1, -1])[:, None, None].expand(3, 12, 12))


def pixels(file):
    """A picture as the networks get it, in its own size: (H, W, 3)."""
    return picture_files.read(file, lambda image: image).permute(1, 2, 0)


def row(file):
    """The pixels of a picture of one row; those of grey ones as one number each."""
    values = pixels(file)
    assert len(values) == 1
    return [colour[0] if len(set(colour)) == 1 else tuple(colour) for colour in values[0].tolist()]


def refusal(file):
    """The one line that says why a picture is not read, without the file's name, which it starts with."""
    with pytest.raises(UserError) as error:
        picture_files.read(file, lambda image: image)
    text = str(error.value)
    assert text.startswith(f'{file}: ') and '\n' not in text
    return text[len(f'{file}: '):]


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


# What the EXIF standard says of each orientation: the side of the picture at which the stored row 0 is, and column 0.
STORED = {1: lambda picture: picture,                  # top, left
          2: lambda picture: picture[:, ::-1],         # top, right
          3: lambda picture: picture[::-1, ::-1],      # bottom, right
          4: lambda picture: picture[::-1],            # bottom, left
          5: lambda picture: picture.T,                # left, top
          6: lambda picture: picture[:, ::-1].T,       # right, top
          7: lambda picture: picture[::-1, ::-1].T,    # right, bottom
          8: lambda picture: picture[::-1].T}          # left, bottom


@pytest.mark.parametrize('orientation', STORED)
@pytest.mark.parametrize('ending, options', [
    ('jpg', {}), ('png', {}), ('webp', {'lossless': True}), ('tif', {}), ('tif', {'compression': 'tiff_deflate'}),
    ('jfif', {}), ('mpo', {}), ('avif', {'quality': 100})])
def test_pictures_are_turned_upright(tmp_path, ending, options, orientation):
    upright = np.kron([[10, 60, 110], [160, 200, 240]], np.ones((8, 8))).astype(np.uint8)  # JPEG keeps such blocks
    file = tmp_path / f'a.{ending}'
    Image.fromarray(STORED[orientation](upright).copy()).save(file, exif=exif(orientation), **options)
    found = pixels(file).int().numpy()
    assert found.shape == (16, 24, 3) and abs(found - upright[:, :, None]).max() <= 2


@pytest.mark.parametrize('in_memory', [True, False])
def test_pictures_are_turned_upright_wherever_they_are_read(tmp_path, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr(data, 'IN_MEMORY_BYTES', 0)
    lying = np.zeros((8, 8, 3), dtype=np.uint8)
    lying[:, :4] = 255  # white on the left, which orientation 6 turns to the top
    for place in ('train/a', 'train/b', 'test/a'):
        (tmp_path / place).mkdir(parents=True)
        Image.fromarray(lying).save(tmp_path / place / '1.png', exif=exif(6))
    train, test = load('FOLDER', tmp_path, image_size=8)[:2]
    train.transform = test.transform
    for image in (train[0][0], test[0][0], data.picture(tmp_path / 'test/a/1.png', 'FOLDER', (3, 8, 8))):
        assert (image[:, :4] == 1).all() and (image[:, 4:] == -1).all()
    assert data.picture(tmp_path / 'test/a/1.png', 'MNIST', (1, 8, 8))[0, :, 0].tolist() == [1] * 4 + [0] * 4


def test_damaged_exif_does_not_cost_the_picture(tmp_path, recwarn):
    orientation = struct.pack('<HHIHH', 0x0112, 3, 1, 6, 0)
    maker = struct.pack('<HHII', 0x010f, 2, 100, 5000)  # a text that lies behind the end of the block
    lying = Image.fromarray(np.repeat(np.array([[0], [255]], dtype=np.uint8), 2, 1))  # black above white
    for n, (block, turned) in enumerate([
            (b'II*\0\x08\0\0\0\x02\0' + maker + orientation, True),  # what can be read holds
            (b'II*\0\x08\0\0\0\xff\xff' + orientation, True),
            (b'II*\0\x08\0\0\0\x02\0' + orientation[:5], False),
            (b'XX*\0\x08\0\0\0\x01\0' + orientation, False), (b'II', False), (b'', False), (b'\xff' * 40, False)]):
        for ending, options in (('jpg', {}), ('png', {}), ('webp', {'lossless': True})):
            file = tmp_path / f'{n}.{ending}'
            lying.resize((16, 16), 0).save(file, exif=b'Exif\0\0' + block, **options)
            values = pixels(file)[:, :, 0].int()
            bright = values[:, :8] if turned else values[8:]  # orientation 6 turns the lower half to the left
            dark = values[:, 8:] if turned else values[:8]
            assert bright.min() > 250 and dark.max() < 5, (n, ending)
    text = PngInfo()
    text.add_text('Raw profile type exif', 'exif\n\n\nno hexadecimal digits')
    lying.save(tmp_path / 'text.png', pnginfo=text)
    assert pixels(tmp_path / 'text.png')[:, 0, 0].tolist() == [0, 255]
    assert not recwarn.list


def write_png(path, depth, colour_type, content, transparent=b'', palette=b''):
    """A PNG of one row, by the standard: content, its row; transparent, its chunk tRNS."""
    width = len(content) * 8 // depth // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    chunks = [(b'IHDR', struct.pack('>IIBBBBB', width, 1, depth, colour_type, 0, 0, 0)), (b'PLTE', palette),
              (b'tRNS', transparent), (b'IDAT', zlib.compress(b'\0' + content)), (b'IEND', b'')]
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))
        for name, body in chunks if body or name == b'IEND'))
    return path


RED_GREEN = bytes([255, 0, 0, 0, 255, 0])


@pytest.mark.parametrize('depth, colour_type, content, transparent, shown', [
    (8, 6, bytes([255, 200, 100, 0, 255, 200, 100, 128, 255, 200, 100, 255]), b'',  # 200 * 128 / 255 = 100.4
     [0, (128, 100, 50), (255, 200, 100)]),
    (8, 4, bytes([255, 0, 255, 51, 200, 255]), b'', [0, 51, 200]),
    (16, 4, struct.pack('>4H', 65535, 51 * 257, 65535, 0), b'', [51, 0]),
    (16, 6, struct.pack('>4H', 65535, 0, 65535, 128 * 257), b'', [(128, 0, 128)]),
    (8, 3, bytes([0, 1]), b'\0', [0, (0, 255, 0)]),  # an index, as Pillow has it
    (8, 3, bytes([0, 1]), b'\x80\x33', [(128, 0, 0), (0, 51, 0)]),  # bytes
    (4, 3, bytes([0x01]), b'\xff\0', [(255, 0, 0), 0]),
    (8, 0, bytes([200, 201]), b'\0\xc8', [0, 201]),
    (1, 0, b'\x40', b'\0\1', [0] * 8),
    (1, 0, b'\x40', b'\0\0', [0, 255, 0, 0, 0, 0, 0, 0]),
    (2, 0, b'\x1b', b'\0\2', [0, 85, 0, 255]),  # levels 0 to 3; the key is one of these
    (4, 0, b'\x5f', b'\0\x0f', [85, 0]),
    (16, 0, struct.pack('>HH', 51400, 51401), struct.pack('>H', 51400), [0, 200]),
    (8, 2, bytes([255, 0, 9, 255, 0, 8]), struct.pack('>HHH', 255, 0, 9), [0, (255, 0, 8)]),
    (16, 2, struct.pack('>6H', 65535, 0, 512, 65535, 0, 768), struct.pack('>HHH', 65535, 0, 512), [0, (255, 0, 3)])])
def test_transparency_is_composed_over_black(tmp_path, recwarn, depth, colour_type, content, transparent, shown):
    palette = RED_GREEN if colour_type == 3 else b''
    assert row(write_png(tmp_path / 'a.png', depth, colour_type, content, transparent, palette)) == shown
    assert not recwarn.list


def test_a_white_shape_on_a_transparent_ground(tmp_path):
    shape = Image.new('RGBA', (32, 32), (255, 255, 255, 0))
    shape.paste((255, 255, 255, 255), (8, 8, 24, 24))
    for ending, options in (('png', {}), ('webp', {'lossless': True, 'exact': True}), ('tif', {}), ('jp2', {}),
                            ('tga', {}), ('qoi', {}), ('gif', {})):
        shape.save(tmp_path / f'a.{ending}', **options)
        values = pixels(tmp_path / f'a.{ending}')
        assert (values[8:24, 8:24] == 255).all() and values.sum() == 16 * 16 * 3 * 255
    palette = Image.new('P', (2, 1))
    palette.putpalette(RED_GREEN)
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / 'a.gif', transparency=0)
    assert row(tmp_path / 'a.gif') == [0, (0, 255, 0)]
    with_alpha = Image.new('RGBA', (1, 1), (255, 0, 0, 51)).convert('PA')
    with_alpha.save(tmp_path / 'palette.tif')
    assert row(tmp_path / 'palette.tif') == [(51, 0, 0)]


def write_tiff(path, bits, content, *, width, photometric=1, form=1, extra=None, planes=1):
    """A little-endian TIFF of one row, by the standard. form: SampleFormat; extra: ExtraSamples; planes: how many."""
    tags = {256: (4, [width]), 257: (4, [1]), 258: (3, bits), 259: (3, [1]), 262: (3, [photometric]),
            273: (4, [0] * planes), 277: (3, [len(bits)]), 278: (4, [1]), 279: (4, [len(content) // planes] * planes),
            284: (3, [min(planes, 2)]), 339: (3, [form] * len(bits)), **({338: (3, [extra])} if extra else {})}
    start = 8 + 2 + 12 * len(tags) + 4  # of what is too long for an entry

    def body(strips):
        entries, long = b'', b''
        for tag, (kind, values) in sorted({**tags, 273: (4, strips)}.items()):
            packed = struct.pack('<' + {3: 'H', 4: 'I'}[kind] * len(values), *values)
            if len(packed) > 4:
                packed, long = struct.pack('<I', start + len(long)), long + packed
            entries += struct.pack('<HHI', tag, kind, len(values)) + packed.ljust(4, b'\0')
        return b'II*\0\x08\0\0\0' + struct.pack('<H', len(tags)) + entries + b'\0' * 4 + long

    begin = len(body([0] * planes))
    path.write_bytes(body([begin + n * len(content) // planes for n in range(planes)]) + content)
    return path


@pytest.mark.parametrize('bits, content, options, shown', [
    ([16], struct.pack('<3H', 0, 32768, 65535), {}, [0, 128, 255]),
    ([16], struct.pack('<3H', 0, 32768, 65535), {'photometric': 0}, [255, 127, 0]),  # white is 0
    ([12], bytes([0xff, 0xf8, 0x00, 0x01, 0x00]), {}, [255, 128, 1]),  # 4095, 2048, 16
    ([8], bytes([0, 100, 255]), {'photometric': 0}, [255, 155, 0]),
    ([32], struct.pack('<3f', 0, 100 / 255, 1), {'form': 3}, [0, 100, 255]),
    ([32], struct.pack('<3f', 0, 100 / 255, 1), {'form': 3, 'photometric': 0}, [255, 155, 0]),
    ([8, 8], bytes([100, 128, 0, 0, 9, 255]), {'extra': 1}, [100, 0, 9]),  # multiplied by alpha already
    ([8, 8], bytes([200, 51, 255, 0, 9, 255]), {'extra': 2}, [40, 0, 9]),
    ([8] * 4, bytes([100, 0, 0, 100, 0, 0, 0, 0, 9, 8, 7, 255]), {'photometric': 2, 'extra': 1},
     [(100, 0, 0), 0, (9, 8, 7)]),
    ([8] * 4, bytes([255, 0, 0, 51, 255, 0, 0, 0, 9, 8, 7, 255]), {'photometric': 2, 'extra': 2},
     [(51, 0, 0), 0, (9, 8, 7)]),
    ([16] * 3, struct.pack('<9H', 65535, 0, 512, 0, 0, 0, 255, 256, 257), {'photometric': 2},
     [(255, 0, 2), 0, (0, 1, 1)]),
    ([8] * 4, bytes([0, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0, 255]), {'photometric': 5}, [(255, 0, 0), 255, 0]),  # CMYK
    ([8] * 3, bytes(range(9)), {'photometric': 2, 'planes': 3}, [(0, 3, 6), (1, 4, 7), (2, 5, 8)])])
def test_tiff(tmp_path, bits, content, options, shown):
    assert row(write_tiff(tmp_path / 'a.tif', bits, content, width=3, **options)) == shown


def test_lab(tmp_path):
    red = bytes([136, 80, 67])  # sRGB's red has L* 53.2 of 100, a* 80.1 and b* 67.2
    file = write_tiff(tmp_path / 'a.tif', [8] * 3, red + bytes([0, 0, 0, 255, 0, 0]), width=3, photometric=8)
    shown = torch.tensor([[255, 0, 0], [0, 0, 0], [255, 255, 255]])
    assert (pixels(file)[0].int() - shown).abs().max() <= 12  # levels of 0.4 and 1 are coarse


@pytest.mark.parametrize('bits, content, options, reason', [
    ([32], struct.pack('<2i', 5, 300), {'form': 2}, 'integers of mode I'),
    ([32], struct.pack('<2I', 0, 2 ** 32 - 1), {}, 'integers of mode I'),
    ([16], struct.pack('<2h', -5, 300), {'form': 2}, 'integers of mode I'),
    *[([32], struct.pack('<2f', 0.5, value), {'form': 3}, 'floats that are not from 0 to 1')
      for value in (-0.1, 1.1, 255, math.nan, math.inf)],
    ([16] * 3, struct.pack('<6H', *range(6)), {'photometric': 2, 'planes': 3}, '16-bit colours in separate planes')])
def test_pictures_without_a_known_range_are_refused(tmp_path, bits, content, options, reason):
    text = refusal(write_tiff(tmp_path / 'a.tif', bits, content, width=2, **options))
    assert reason in text and 'save it' in text


@pytest.mark.parametrize('value', [-0.1, 255, math.nan])
def test_a_pfm_without_a_known_range_is_refused(tmp_path, value):
    (tmp_path / 'a.pfm').write_bytes(b'Pf\n2 1\n-1.0\n' + struct.pack('<2f', 0.5, value))
    assert 'floats that are not from 0 to 1' in refusal(tmp_path / 'a.pfm')
    (tmp_path / 'a.pfm').write_bytes(b'Pf\n2 1\n-1.0\n' + struct.pack('<2f', 0.5, 1))
    assert row(tmp_path / 'a.pfm') == [128, 255]


def test_a_picture_without_memory_or_rights_is_not_called_damaged(tmp_path, monkeypatch):
    def fails(error):
        def opened(*_, **__):
            raise error
        return opened
    monkeypatch.setattr(Image, 'open', fails(PermissionError(errno.EACCES, 'Permission denied')))
    assert refusal(tmp_path / 'a.png') == 'cannot be read (Permission denied); make it readable'
    monkeypatch.setattr(Image, 'open', fails(OSError(errno.EMFILE, 'Too many open files')))
    assert refusal(tmp_path / 'a.png') == 'cannot be read (Too many open files), though it may be sound; run again'
    monkeypatch.setattr(Image, 'open', fails(MemoryError()))
    with pytest.raises(MemoryError):
        picture_files.read(tmp_path / 'a.png', lambda image: image)


def test_grey_pictures_keep_their_levels(tmp_path):
    levels = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    Image.fromarray(levels.numpy()).save(tmp_path / 'a.png')
    assert torch.equal(data.picture(tmp_path / 'a.png', 'MNIST', (1, 16, 16)), levels[None] / 255)
    picture(tmp_path / 'b.png', (255, 0, 0))
    assert (data.picture(tmp_path / 'b.png', 'MNIST', (1, 16, 16)) == torch.tensor(76.) / 255).all()  # 0.299 * 255


@pytest.mark.parametrize('content, shown', [
    (b'P5 3 1 15\n' + bytes([0, 7, 15]), [0, 119, 255]),  # 7 * 17
    (b'P5 2 1 1023\n' + struct.pack('>2H', 512, 1023), [128, 255]),
    (b'P5 3 1 65535\n' + struct.pack('>3H', 255, 32768, 65535), [0, 128, 255]),
    (b'P2 3 1 1023\n0 512 1023\n', [0, 128, 255]),
    (b'P6 1 1 65535\n' + struct.pack('>3H', 0, 32896, 65535), [(0, 128, 255)]),
    (b'P4 8 1\n\x40', [255, 0, 255, 255, 255, 255, 255, 255])])  # where 1 is black
def test_ppm(tmp_path, content, shown):
    (tmp_path / 'a.pgm').write_bytes(content)
    assert row(tmp_path / 'a.pgm') == shown


@pytest.mark.parametrize('mode, colour, ending, shown', [
    ('CMYK', (0, 255, 255, 0), 'jpg', (255, 0, 0)), ('CMYK', (0, 0, 0, 255), 'jpg', (0, 0, 0)),
    ('YCbCr', (76, 85, 255), 'tif', (255, 0, 0)), ('1', 1, 'bmp', (255, 255, 255)), ('L', 77, 'webp', (77, 77, 77)),
    ('RGBX', (1, 2, 3, 4), 'tif', (1, 2, 3))])
def test_colour_spaces(tmp_path, mode, colour, ending, shown):
    picture(tmp_path / f'a.{ending}', colour, (16, 16), mode)
    difference = pixels(tmp_path / f'a.{ending}').int() - torch.tensor(shown)
    assert difference.abs().max() <= 2


@pytest.mark.parametrize('ending, options', [
    ('gif', {}), ('webp', {'lossless': True}), ('png', {}), ('tif', {})])
def test_the_first_frame_counts(tmp_path, ending, options):
    first, *others = [Image.new('RGB', (2, 2), colour) for colour in ('red', 'blue', 'lime')]
    first.save(tmp_path / f'a.{ending}', save_all=True, append_images=others, **options)
    assert (pixels(tmp_path / f'a.{ending}') == torch.tensor([255, 0, 0])).all()


def test_large_pictures(tmp_path, monkeypatch, recwarn):
    picture(tmp_path / 'a.png', (9, 9, 9), (10, 10))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 60)  # Pillow warns beyond this, and refuses twice as much
    assert (pixels(tmp_path / 'a.png') == 9).all() and not recwarn.list
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 49)
    assert 'decompression bomb' in refusal(tmp_path / 'a.png')


def loop_folder(root):
    """Two classes of two pictures to train on and one to test on."""
    for place in ('train/cat/1', 'train/cat/sub/2', 'train/dog/1', 'train/dog/sub/2', 'test/cat/3', 'test/dog/3'):
        picture(root / f'{place}.png')
    return root


def names(root, part='train'):
    """The pictures that FOLDER takes, with their classes."""
    found = data._folder('FOLDER', root, 32)
    pictures = getattr(found, part)
    return [(found.classes[number], os.path.relpath(file, root / part))
            for file, number in zip(pictures.images, pictures.labels.tolist())]


WITHOUT_LINKS = [('cat', 'cat/1.png'), ('cat', 'cat/sub/2.png'), ('dog', 'dog/1.png'), ('dog', 'dog/sub/2.png')]


def test_hidden_folders_hold_no_pictures(tmp_path):
    loop_folder(tmp_path)
    for place in ('cat/.ipynb_checkpoints/1', 'cat/sub/.trash/deeper/2', 'dog/sub/.a', 'dog/._1', '.git/3'):
        picture(tmp_path / 'train' / f'{place}.png')
    (tmp_path / 'train/cat/sub/.broken.png').symlink_to('nowhere')
    assert names(tmp_path) == WITHOUT_LINKS


@pytest.mark.parametrize('links', [
    {'dog/loop': '.'}, {'dog/loop': '..'}, {'dog/loop': '../..'}, {'dog/sub/loop': '..'},
    {'dog/sub/loop': '../../..'}, {'dog/again': 'sub'}, {'dog/a': 'sub', 'dog/b': 'sub'},
    {'cat/dog': '../dog', 'dog/cat': '../cat'}, {'cat/a': '../dog/sub'}, {'loop': '.'}, {'loop': '..'}])
def test_links_that_lead_back(tmp_path, links):
    loop_folder(tmp_path)
    for link, target in links.items():
        (tmp_path / 'train' / link).symlink_to(target)
    assert names(tmp_path) == WITHOUT_LINKS


def test_links_that_lead_elsewhere(tmp_path):
    root = loop_folder(tmp_path / 'set')
    picture(tmp_path / 'store/one/4.png')
    picture(tmp_path / 'store/two/5.JPG')
    picture(tmp_path / 'eels/eel/6.png')
    picture(tmp_path / 'eels/other/7.png')
    (tmp_path / 'store/one/loop').symlink_to('..')
    (tmp_path / 'eels/eel/up').symlink_to('..')  # to what holds a class; other/ is none of it
    (root / 'train/cat/one').symlink_to(tmp_path / 'store/one')
    (root / 'train/cat/single.png').symlink_to(tmp_path / 'store/two/5.JPG')
    (root / 'train/dog/store').symlink_to('../../../store')
    (root / 'train/eel').symlink_to(tmp_path / 'eels/eel')
    # store/two by way of dog/store, which was there before cat/one/loop; store/one counts once
    assert names(root) == [('cat', 'cat/1.png'), ('cat', 'cat/one/4.png'), ('cat', 'cat/single.png'),
                           ('cat', 'cat/sub/2.png'), ('dog', 'dog/1.png'), ('dog', 'dog/store/two/5.JPG'),
                           ('dog', 'dog/sub/2.png'), ('eel', 'eel/6.png')]
    assert names(root, 'test') == [('cat', 'cat/3.png'), ('dog', 'dog/3.png')]


def test_a_test_folder_that_is_a_link(tmp_path):
    loop_folder(tmp_path)
    (tmp_path / 'test').rename(tmp_path / 'unused')
    (tmp_path / 'test').symlink_to('train')
    assert names(tmp_path, 'test') == names(tmp_path) == WITHOUT_LINKS


PICTURES = {  # Pillow's writer: ends of names
    'JPEG': 'jpg JPG Jpeg jpe jfif JFIF', 'MPO': 'mpo', 'PNG': 'png apng', 'GIF': 'gif GIF', 'AVIF': 'avif',
    'WEBP': 'webp', 'TIFF': 'tif tiff', 'BMP': 'bmp', 'DIB': 'dib', 'JPEG2000': 'jp2 J2K jpx jpf j2c jpc', 'QOI': 'qoi',
    'PPM': 'ppm pgm pnm', 'TGA': 'tga', 'PCX': 'pcx', 'SGI': 'sgi rgb', 'DDS': 'dds', 'ICO': 'ico'}


def test_whatever_pillow_reads_is_read(tmp_path):
    endings = [(kind, ending) for kind in PICTURES for ending in PICTURES[kind].split()]
    loop_folder(tmp_path)
    for number, (kind, ending) in enumerate(endings):
        Image.new('RGB', (16, 16), (0, 200, 0)).save(tmp_path / f'train/dog/{number:02}.{ending}', format=kind)
    found = load('FOLDER', tmp_path, image_size=8)
    assert not found.notes and len(found.train) == len(endings) + 4
    green = found.train.images[found.train.images[:, 1, 0, 0] > 0].int()
    assert len(green) == len(endings)
    assert (green - torch.tensor([0, 200, 0])[:, None, None]).abs().max() <= 3


def test_what_is_left_out_is_counted_and_said(tmp_path, monkeypatch):
    loop_folder(tmp_path)
    before = names(tmp_path)
    for place in ('train/cat/a.heic', 'train/dog/b.HEIC', 'train/dog/sub/Thumbs.db', 'train/dog/notes.txt',
                  'train/dog/paper.pdf', 'train/dog/film.mpg', 'train/dog/draw.eps', 'train/dog/data.h5',
                  'train/dog/README', 'train/dog/7.jpg.part', 'train/loose.png', 'train/.hidden.txt',
                  'train/dog/.DS_Store', 'train/dog/odd.a\nb', 'test/dog/c.heif'):
        (tmp_path / place).write_bytes(b'no picture')
    assert names(tmp_path) == before
    note, = load('FOLDER', tmp_path).notes
    said, train, test = re.fullmatch(f'(.*): {tmp_path}/train: (.*); {tmp_path}/test: (.*)', note).groups()
    assert said.startswith('files left out') and test == '1 .heif'
    assert train.startswith('2 .heic') and sorted(train.split(', ')) == sorted([
        '2 .heic', '1 .db', '1 .txt', '1 .pdf', '1 .mpg', '1 .eps', '1 .h5', '1 without an extension', '1 .part',
        '1 .png in no class', '1 .a\\nb'])
    assert picture_files.listed(Counter(a=1, b=3, c=2, d=2), 2) == '3 b, 2 c, 3 of other names'
    monkeypatch.setitem(Image.OPEN, 'HEIF', Image.OPEN['BMP'])  # as a plugin does
    for ending in ('.heic', '.heif'):
        monkeypatch.setitem(Image.EXTENSION, ending, 'HEIF')
    picture(tmp_path / 'bmp.bmp', (9, 9, 9))
    for place in ('train/cat/a.heic', 'train/dog/b.HEIC', 'test/dog/c.heif'):
        (tmp_path / place).write_bytes((tmp_path / 'bmp.bmp').read_bytes())
    found = load('FOLDER', tmp_path)
    assert (len(found.train), len(found.test)) == (6, 3) and 'heic' not in found.notes[0]


def test_files_left_out_are_said_where_nothing_else_is_there(tmp_path):
    loop_folder(tmp_path)
    assert load('FOLDER', tmp_path).notes == () == load('DIGITS', tmp_path).notes
    for old, new in (('1.png', '1.heic'), ('sub/2.png', 'sub/2.heic')):
        (tmp_path / 'train/cat' / old).rename(tmp_path / 'train/cat' / new)
    text = message('FOLDER', tmp_path)
    assert 'no pictures of class cat;' in text and f'{tmp_path}/train: 2 .heic' in text
    for label in ('cat', 'dog'):
        (tmp_path / f'test/{label}/3.png').rename(tmp_path / f'test/{label}/3')
    text = message('FOLDER', tmp_path)
    assert f'no pictures in sub-folders of {tmp_path}/test;' in text and '/test: 2 without an extension' in text


def test_links_that_are_refused(tmp_path):
    loop_folder(tmp_path)
    (tmp_path / 'train/fox').symlink_to('dog')
    assert 'classes dog and fox are the same folder' in message('FOLDER', tmp_path)
    (tmp_path / 'train/fox').unlink()
    (tmp_path / 'train/dog/notes').symlink_to('nowhere')  # no picture, so nothing is missed
    assert len(load('FOLDER', tmp_path).train) == 4
    (tmp_path / 'train/dog/9.png').symlink_to('nowhere')
    assert message('FOLDER', tmp_path).startswith(f'{tmp_path}/train/dog/9.png: is no file, or a link to none')
    (tmp_path / 'train/dog/9.png').unlink()
    os.mkfifo(tmp_path / 'train/dog/9.png')  # reading which would wait for ever
    assert message('FOLDER', tmp_path).startswith(f'{tmp_path}/train/dog/9.png: is no file')
    (tmp_path / 'train/dog/9.png').unlink()
    (tmp_path / 'train/dog/9.png').symlink_to('9.png')
    assert message('FOLDER', tmp_path).startswith(f'{tmp_path}/train/dog/9.png: is no file, or a link to none')


@pytest.mark.parametrize('place', ['train', 'train/dog', 'train/dog/sub', 'test/cat'])
def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch, place):
    loop_folder(tmp_path)
    scandir = os.scandir

    def refuse(path='.'):  # as it is for all but root
        if os.path.realpath(path) == str(tmp_path / place):
            raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    assert message('FOLDER', tmp_path).startswith(f'{tmp_path / place}: cannot be read (Permission denied)')


@pytest.mark.skipif(sys.platform in ('win32', 'darwin'), reason='file names are text there')
def test_names_of_any_kind(tmp_path):
    root = loop_folder(tmp_path)
    (root / 'train/cat/1.png').rename(root / 'train/cat/1.PNG')
    (root / 'train/cat/sub').rename(root / 'train/cat/sub.jpg')
    odd = os.fsdecode(b'\xe9.png')  # no UTF-8
    (root / 'train/dog/1.png').rename(root / 'train/dog' / odd)
    assert names(root) == [('cat', 'cat/1.PNG'), ('cat', 'cat/sub.jpg/2.png'), ('dog', 'dog/sub/2.png'),
                           ('dog', f'dog/{odd}')]
    (root / 'train/dog' / odd).write_bytes(b'')
    assert message('FOLDER', root).startswith(f'{root}/train/dog/{odd}: not a picture')


def test_folder_labels_go_by_name(tmp_path):
    for n, name in enumerate('abc'):
        picture(tmp_path / 'train' / name / '1.png', (n, 0, 0))
    picture(tmp_path / 'val/c/1.png')
    picture(tmp_path / 'val/b/1.png')
    train, test, classes, _ = load('FOLDER', tmp_path)[:4]
    assert (classes, [label for _, label in train], [label for _, label in test]) == (list('abc'), [0, 1, 2], [1, 2])
    picture(tmp_path / 'test/a/1.png')  # test/ goes before val/
    assert [label for _, label in load('FOLDER', tmp_path).test] == [0]


def test_many_pictures_are_read_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'MANY_FILES', 100)
    count = 300  # enough for several processes
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
def test_pictures_are_decoded_by_as_many_processes_as_asked_for(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(data, 'MANY_FILES', 20)
    picture(tmp_path / 'a.png', (9, 9, 9), (2, 2))

    def prepare(image):
        return image.point(lambda value: 0 if torch.utils.data.get_worker_info() is None else 1)
    images = data._decode([tmp_path / 'a.png'] * 21, prepare, 2, workers)
    assert images.shape == (21, 3, 2, 2) and (images == workers).all()


def test_processes_decode_as_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'MANY_FILES', 20)
    files = [write_png(tmp_path / 'a.png', 16, 0, struct.pack('>4H', 0, 300, 40000, 65535)),
             write_png(tmp_path / 'b.png', 8, 6, bytes(range(64)))]
    noise(tmp_path / 'c.jpg', (30, 20))
    Image.open(tmp_path / 'c.jpg').save(tmp_path / 'd.jpg', exif=exif(6))
    files += [tmp_path / 'c.jpg', tmp_path / 'd.jpg']
    resize = data._resizing('FOLDER', 8)
    one, two = (data._decode(files * 6, resize, 8, workers) for workers in (0, 2))
    assert torch.equal(one, two) and torch.equal(one[:4], data._read_all(files, resize, range(4)))


class Deadly(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


class Faulty(Deadly):
    def __getitem__(self, index):
        raise RuntimeError('Caught RuntimeError in DataLoader worker process 0.')  # torch's words for a bug in one


def test_dead_worker(monkeypatch):
    monkeypatch.setattr(time, 'sleep', lambda *_: None)
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


@pytest.mark.parametrize('crop', [0, 2, 4])
def test_crop_and_flip(crop):
    images = torch.arange(1, 1 + 2 * 3 * 6 * 5, dtype=torch.uint8).reshape(2, 3, 6, 5).repeat(150, 1, 1, 1)
    torch.manual_seed(0)
    crops = crop_and_flip(images, crop)
    assert crops.shape == images.shape and crops.dtype == torch.uint8
    padded = torch.zeros(2, 3, 6 + 2 * crop, 5 + 2 * crop, dtype=torch.uint8)
    padded[:, :, crop:6 + crop, crop:5 + crop] = images[:2]
    places = [(top, left, flip) for top in range(2 * crop + 1) for left in range(2 * crop + 1)
              for flip in (False, True)]
    windows = torch.stack([padded[:, :, top:top + 6, left:left + 5].flip([3] if flip else [])
                           for top, left, flip in places], 1)
    same = (crops.reshape(150, 2, 1, 3, 6, 5) == windows).flatten(3).all(3)  # (150, 2, places)
    assert (same.sum(2) == 1).all()  # every window of a padded image is another one
    seen = {places[number] for number in same.nonzero()[:, 2].tolist()}
    assert [set(values) for values in zip(*seen)] == [set(range(2 * crop + 1))] * 2 + [{False, True}]


@pytest.mark.parametrize('size', [1, 2, 3, 4, 20])
def test_cut_out(size):
    holes = cut_out(torch.ones(600, 3, 6, 5), size) == 0
    assert torch.equal(holes, holes[:, :1].expand_as(holes))  # of all channels alike
    squares = torch.stack([square(top, left, size) for top in range(6) for left in range(5)])
    same = (holes[:, :1] == squares).flatten(2).all(2)  # (600, 30); squares of 20 pixels are all the whole image
    assert same.any(1).all() and same.any(0).all()  # each hole is a square, and the centre may be any pixel


def square(row, column, size):
    """A mask (6, 5) of the square with its centre there; of an even size that is right below the middle."""
    mask = torch.zeros(6, 5, dtype=torch.bool)
    for y in range(row - size // 2, row - size // 2 + size):
        for x in range(column - size // 2, column - size // 2 + size):
            if 0 <= y < 6 and 0 <= x < 5:
                mask[y, x] = True
    return mask


def test_a_square_that_may_leave_nothing():
    assert load('DIGITS', '', cutout=7).train.transform.cutout == 7
    with pytest.raises(UserError, match='--cutout 8: may cover whole images of 8x8 pixels'):
        load('DIGITS', '', cutout=8)


def test_only_training_pictures_are_cut_out(tmp_path):
    sets = load('FOLDER', noise_folder(tmp_path, count=9), sampling=Sampling(validation_fraction=0.2), cutout=4)
    assert [part.transform.cutout for part in (sets.train, sets.test, sets.validation)] == [4, 0, 0]
    assert sets.train.sample(3, 0, like=sets.test).transform.cutout == 0  # those that a conversion chooses by
    plain = load('DIGITS', '').train
    cut = load('DIGITS', '', cutout=4).train
    before, after = (all_of(epoch_loader(dataset, 64, seed=3))[0] for dataset in (plain, cut))
    assert (before == 0)[after != before].logical_not().all() and (after[after != before] == 0).all()
    assert 0 < (after != before).float().mean() < 0.25  # 16 of 64 pixels at most


def test_only_training_pictures_are_augmented(tmp_path):
    train, test = load('FOLDER', noise_folder(tmp_path))[:2]
    assert torch.equal(all_of(epoch_loader(test, 2, seed=1))[0], all_of(epoch_loader(test, 2, seed=2))[0])
    one, two, again = (all_of(epoch_loader(train, 3, seed=seed))[0] for seed in (1, 2, 1))
    assert torch.equal(one, again) and not torch.equal(one, two)
    still, _ = all_of(epoch_loader(load('FOLDER', tmp_path, crop=0).train, 3))
    for image in all_of(epoch_loader(load('FOLDER', tmp_path, crop=0).train, 3, seed=4))[0]:
        assert any(torch.equal(image, each) or torch.equal(image.flip(2), each) for each in still)  # not shifted
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
        train, test = load('DIGITS', '', sampling=Sampling(seed=seed, **samples))[:2]
        return len(train), len(test), train.images

    assert chosen(0, train_samples=20)[:2] == (20, 360)
    assert chosen(0, test_samples=7)[:2] == (1437, 7)
    assert torch.equal(chosen(0, train_samples=20)[2], chosen(0, train_samples=20)[2])
    assert not torch.equal(chosen(0, train_samples=20)[2], chosen(1, train_samples=20)[2])
    assert torch.equal(chosen(0, train_samples=1437)[2], chosen(0)[2])
    for samples, words in (({'train_samples': 1438}, '--train_samples 1438: there are 1437 train images'),
                           ({'test_samples': 361}, '--test_samples 361: there are 360 test images')):
        assert words in message('DIGITS', '', sampling=Sampling(**samples))


def test_images_held_out_for_validation():
    def contents(dataset):
        return {bytes(image.numpy()) for image in dataset.images}

    def digits(**sampling):
        return load('DIGITS', '', sampling=Sampling(**sampling))

    whole, part = digits(), digits(validation_fraction=0.2)
    assert (len(part.train), len(part.validation), len(part.test)) == (1150, 287, 360)
    assert whole.selection == 'test' and part.selection == 'validation'
    assert contents(part.train) | contents(part.validation) == contents(whole.train)
    for name in ('train', 'test'):
        assert not contents(part.validation) & contents(getattr(part, name))
    # fewer training images do not change which ones are held out, nor does holding out change which are taken
    few = digits(train_samples=100, validation_fraction=0.2)
    assert torch.equal(few.validation.images, part.validation.images)
    assert torch.equal(few.train.images, digits(train_samples=100).train.images)
    other = digits(seed=1, validation_fraction=0.2)
    assert not torch.equal(other.validation.images, part.validation.images)


def test_subset_keeps_labels_and_reads_no_more(tmp_path):
    for n in range(30):
        picture(tmp_path / 'train' / 'ab'[n // 15] / f'{n:02}.png', (n, n, n), (4, 4))
    picture(tmp_path / 'test/a/1.png')
    ten = {'image_size': 4, 'sampling': Sampling(train_samples=10)}
    train = load('FOLDER', tmp_path, **ten).train
    numbers = train.images[:, 0, 0, 0].tolist()
    assert len(set(numbers)) == 10 and train.labels.tolist() == [n // 15 for n in numbers]
    left_out = min(set(range(30)) - set(numbers))
    (tmp_path / 'train' / 'ab'[left_out // 15] / f'{left_out:02}.png').write_text('no picture')
    assert len(load('FOLDER', tmp_path, **ten).train) == 10
    assert f'{left_out:02}.png' in message('FOLDER', tmp_path, image_size=4)


@pytest.mark.parametrize('workers', [0, 1])
def test_an_error_of_the_loader_says_its_own_words(workers):
    def fail(indices):
        raise UserError('a/UserError: b.png: not a picture')

    with pytest.raises(UserError) as caught:
        list(data._Loader([[0]], fail, num_workers=workers))
    assert str(caught.value) == 'a/UserError: b.png: not a picture'
