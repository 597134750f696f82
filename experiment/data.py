"""The data sets by name, and the loader of one epoch. Importing it is quick: torchvision comes in where it is used."""
import contextlib
import copy
import io
import math
import os
import socket
import warnings
from collections import Counter, deque
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from experiment import UserError, importing
from experiment.distributed import ALONE
from experiment.options import dead_worker
from self_models.architectures import INPUT_SHAPES

_IDX = [f'{part}-{kind}-ubyte' for part in ('train', 't10k') for kind in ('images-idx3', 'labels-idx1')]
_CIFAR10 = [f'data_batch_{n}' for n in range(1, 6)] + ['test_batch', 'batches.meta']
# name: torchvision's class, its folder under data_dir, the folder in that which holds the files, the files
_TORCHVISION = {
    'MNIST': ('MNIST', 'mnist', 'MNIST/raw', _IDX),
    'FASHIONMNIST': ('FashionMNIST', 'fashion_mnist', 'FashionMNIST/raw', _IDX),
    'CIFAR10': ('CIFAR10', 'cifar_data', 'cifar-10-batches-py', _CIFAR10),
    'CIFAR100': ('CIFAR100', 'cifar_data', 'cifar-100-python', ['train', 'test', 'meta']),
}
# of the sets that say it without their files
CLASS_COUNTS = {'MNIST': 10, 'FASHIONMNIST': 10, 'CIFAR10': 10, 'CIFAR100': 100, 'DIGITS': 10}
# what Pillow opens and is no picture: documents and drawings, videos, measurements
_NO_PICTURES = {'EPS', 'WMF', 'MPEG', 'BUFR', 'FITS', 'GRIB', 'HDF5'}
NO_IMAGE = -100  # the label of an image that counts for nothing; torch's cross-entropy passes it over
# EXIF's orientation: what brings such a picture upright, as Pillow names it
_UPRIGHT = {2: 'FLIP_LEFT_RIGHT', 3: 'ROTATE_180', 4: 'FLIP_TOP_BOTTOM', 5: 'TRANSPOSE', 6: 'ROTATE_270',
            7: 'TRANSVERSE', 8: 'ROTATE_90'}
IN_MEMORY_BYTES = 2 ** 30  # a FOLDER up to this size is decoded once, a larger one in every epoch


class Data(NamedTuple):
    train: Dataset
    test: Dataset
    classes: list[str]
    input_shape: tuple[int, int, int]  # (C, H, W)
    validation: Dataset | None = None  # held out of the training set, to choose the best epoch on
    whole: int = 0  # images in the training set before any were left out
    notes: tuple[str, ...] = ()  # lines to say of its files

    @property
    def selection(self) -> str:
        """The name of the set that epochs are compared on."""
        return 'test' if self.validation is None else 'validation'


class Pictures(Dataset):
    """Samples (image, label): float32 (C, H, W) in [0, 1], or [-1, 1] where `signed`, and an int.

    images: uint8 (N, C, H, W) with values 0 .. top; or a list of files, which `prepare` brings from PIL to one size.
    labels: int64 (N,). augment: crop and flip at random; cutout: pixels of a square that is blotted out, 0 for none.
    Both draw from torch's global generator.
    """

    def __init__(self, images, labels, top=255, signed=True, augment=False, cutout=0, prepare=None):
        self.images, self.labels = images, labels
        self.top, self.signed, self.augment, self.cutout, self.prepare = top, signed, augment, cutout, prepare
        self.in_memory = isinstance(images, torch.Tensor)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def sample(self, count, seed, like):
        """So many of them (all, where they are fewer), the same ones for the same seed, cropped as `like` has it."""
        chosen = copy.copy(self)
        chosen.augment, chosen.cutout, chosen.prepare = like.augment, like.cutout, like.prepare
        chosen.images, chosen.labels = _subset(self.images, self.labels, min(count, len(self)), seed, 'train')
        return chosen

    def batch(self, indices):
        """Images (B, C, H, W) and labels (B,) of a list of indices: some 20 times as quick as one after another."""
        if self.in_memory:
            images = self.images[indices]
        else:
            images = _read_all(self.images, self.prepare, indices)
        if self.augment:
            images = crop_and_flip(images)
        images = images.float().div_(self.top)
        images = images.mul_(2).sub_(1) if self.signed else images
        return (cut_out(images, self.cutout) if self.cutout else images), self.labels[indices]


def crop_and_flip(images, padding=4):
    """Pad (B, C, H, W) with zeros (black), cut each image out at its own random place and flip every other one."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, count))
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)[torch.arange(count), :, top, left]
    return torch.where(torch.rand(count, 1, 1, 1) < 0.5, crops.flip(3), crops)


def cut_out(images, size):
    """Set a square of `size` pixels in each of the images (B, C, H, W) to 0, its centre at a random pixel of the image
    and what lies outside cut off (cutout: DeVries and Taylor, 2017)."""
    count, _, height, width = images.shape

    def within(length):  # (B, length)
        start = torch.randint(length, (count, 1)) - size // 2
        place = torch.arange(length)
        return (place >= start) & (place < start + size)

    return images.masked_fill_((within(height)[:, :, None] & within(width)[:, None])[:, None], 0)


class Sampling(NamedTuple):
    """Which images of a data set are taken: the same ones for the same seeds.

    train_samples, test_samples: so many at random; None for all. validation_fraction: this part of the training set is
    held out. split_seed shuffles that set (None: seed does, as it does the test set); training images are taken from
    its beginning, those held out are its end, so they are the same ones whatever train_samples.
    """
    train_samples: int | None = None
    test_samples: int | None = None
    seed: int = 0
    validation_fraction: float = 0.0
    split_seed: int | None = None


ALL = Sampling()


def load(name, data_dir, image_size=32, sampling=ALL, num_workers=0, cutout=0):
    """The data set `name` as Data; UserError where it is missing, damaged or not as it should be.

    image_size: height and width in pixels that FOLDER pictures are brought to; the other sets have their own.
    num_workers: processes that decode the pictures of a FOLDER, where that is done here; 0 for none. cutout: of
    training images, see Pictures.
    """
    train_samples, test_samples, seed, validation_fraction, split_seed = sampling
    split_seed = seed if split_seed is None else split_seed
    root, notes = Path(os.path.expanduser(data_dir)), []
    if name in _TORCHVISION:
        train, test, classes = _torchvision(name, root)
    elif name == 'DIGITS':
        train, test, classes = _digits()
    elif name in ('IMAGENET', 'FOLDER'):
        try:
            train, test, classes = _folders(name, root, notes.append)
        except OSError as error:
            raise UserError(f'{error.filename}: cannot be read ({error.strerror}); mend or delete it, or say with '
                            '--data_dir where the pictures are') from error
    else:
        raise UserError(f'{name}: no such data set; choose one of {", ".join(INPUT_SHAPES)}')
    whole = len(train[1])
    if validation_fraction and not held_out_of(whole, validation_fraction):
        raise UserError(f'--validation_fraction {validation_fraction} holds out none of {whole} train images; hold out '
                        'a larger part, or leave the flag out to choose the best epoch on the test set')
    held_out = _subset(*train, held_out_of(whole, validation_fraction), split_seed, 'train', from_end=True)
    left = whole - len(held_out[1])
    if left < (train_samples or 1) and validation_fraction:
        raise UserError(f'--validation_fraction {validation_fraction} leaves {left} of {whole} train images; '
                        'hold out a smaller part, or ask for fewer with --train_samples')
    train = _subset(*train, train_samples or left, split_seed, 'train')
    test = _subset(*test, test_samples, seed, 'test')

    augment, how, test_how, shape = True, {}, {}, None
    if name == 'IMAGENET':
        augment, v2 = False, _transforms()  # which do it
        how = {'prepare': v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()])}
        test_how = {'prepare': _imagenet_test()}
        shape = (3, 224, 224)
    elif name == 'FOLDER':
        resize, shape = partial(_resize, size=image_size), (3, image_size, image_size)
        if sum(len(labels) for _, labels in (train, held_out, test)) * math.prod(shape) <= IN_MEMORY_BYTES:
            train, held_out, test = [(_decode(files, resize, image_size, num_workers) if files else files, labels)
                                     for files, labels in (train, held_out, test)]
        how = test_how = {'prepare': resize}
    else:
        augment = name in ('CIFAR10', 'CIFAR100')
        how = test_how = {'top': 16 if name == 'DIGITS' else 255, 'signed': augment}
        shape = tuple(train[0].shape[1:])
    if cutout >= min(shape[1:]):
        raise UserError(f'--cutout {cutout}: may leave nothing of images of {shape[1]}x{shape[2]} pixels; take a '
                        'smaller square')
    return Data(Pictures(*train, augment=augment, cutout=cutout, **how), Pictures(*test, **test_how), classes, shape,
                Pictures(*held_out, **test_how) if len(held_out[1]) else None, whole, tuple(notes))


def epoch_loader(dataset, batch_size, num_workers=0, seed=0, shuffle=False, pin_memory=False, process=ALONE):
    """A DataLoader of (images (B, C, H, W), labels (B,)) for one epoch; the last batch may be smaller.

    process: a distributed.Process. Together they go through batches of world_size times batch_size, of which each gets
    an even part; where there is no image left for it, one whose label is NO_IMAGE. `sizes`, an attribute of the loader,
    lists how many images each batch has, over all processes.
    Order and augmentation depend on seed and batch_size alone, not on num_workers, and torch's global generator is
    left as it was. Iterating raises UserError where a picture cannot be read.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator).tolist() if shuffle else range(len(dataset))
    seeds = torch.randint(2 ** 31, (len(dataset),), generator=generator)
    # Workers take longer to hand over a batch than it takes to cut one out of memory.
    workers = 0 if getattr(dataset, 'in_memory', False) else num_workers
    rank, world_size = process
    batches = [order[i:i + batch_size * world_size] for i in range(0, len(order), batch_size * world_size)]
    return _Loader([list(batch[rank::world_size]) for batch in batches], partial(_batch, dataset, seeds),
                   [len(batch) for batch in batches], num_workers=workers, pin_memory=pin_memory, generator=generator)


class _Loader(DataLoader):
    """Yields make([index, ...]) of each of the batches: so a whole one is cut out and augmented at once."""

    def __init__(self, batches, make, sizes=(), **options):
        super().__init__(batches, batch_size=None, collate_fn=partial(_error_as_value, make), **options)
        self.sizes = sizes

    def __iter__(self):
        try:
            for batch in super().__iter__():
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except (RuntimeError, ConnectionError, FileNotFoundError, EOFError) as error:
            if died := dead_worker(error):
                raise died from error
            raise


def _batch(dataset, seeds, indices):
    if not len(indices):
        images, labels = _batch(dataset, seeds, [0])
        return images, torch.full_like(labels, NO_IMAGE)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seeds[indices[0]]))
        if isinstance(dataset, Pictures):
            return dataset.batch(indices)
        return default_collate([dataset[index] for index in indices])


def _error_as_value(make, indices):
    """make(indices), or the UserError that it raises: raised in a worker, its text would become a traceback."""
    try:
        return make(indices)
    except UserError as error:
        return error


def held_out_of(count, validation_fraction):
    """How many of so many training images are held out."""
    return round(validation_fraction * count)


def shuffled(count, seed):
    """The order that a seed gives so many images: a tensor of their numbers."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _subset(images, labels, samples, seed, part, from_end=False):
    """`samples` of the images and labels, from the beginning or the end of the order that the seed gives them."""
    if samples is None:
        return images, labels
    if samples > len(labels):
        raise UserError(f'--{part}_samples {samples}: there are {len(labels)} {part} images; ask for fewer')
    order = shuffled(len(labels), seed)
    chosen = (order[len(order) - samples:] if from_end else order[:samples]).sort().values
    images = images[chosen] if isinstance(images, torch.Tensor) else [images[index] for index in chosen.tolist()]
    return images, labels[chosen]


def _digits():
    with importing('scikit-learn', 'DIGITS'):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1), torch.from_numpy(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=360, stratify=digits.target, random_state=0)
    return (images[train], labels[train]), (images[test], labels[test]), [str(n) for n in digits.target_names]


def _torchvision(name, root):
    """((images, labels) to train on, the same to test on, classes); downloaded where files are missing."""
    with _importing_torchvision(name):
        import torchvision
    kind, folder, inner, files = _TORCHVISION[name]
    kind, root = getattr(torchvision.datasets, kind), root / folder

    def read(train, download):
        dataset = kind(root, train=train, download=download)
        images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets).long()
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
        if not len(images) == len(labels) > 0:
            raise ValueError(f'{len(images)} images and {len(labels)} labels')
        return images, labels, dataset.classes

    where, timeout = root / inner, socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; without it a firewall that drops packets keeps one waiting for minutes
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            missing = [file for file in files if not (where / file).is_file()]
            train, test = read(train=True, download=bool(missing)), read(train=False, download=False)
    except Exception as error:  # what torchvision raises for missing and damaged files differs from set to set
        reason = (str(error) or type(error).__name__).strip().splitlines()[-1]
        missing = [file for file in files if not (where / file).is_file()]
        if missing:
            archive = f'{kind.filename} into {root}' if name.startswith('CIFAR') else 'the same as .gz'
            raise UserError(f'{name}: cannot be downloaded ({reason}); put {", ".join(missing)} into {where}, '
                            f'or {archive}, or say with --data_dir where it is') from error
        raise UserError(f'{name}: the files in {where} are damaged ({reason}); delete that folder and run again '
                        'to download it anew') from error
    finally:
        socket.setdefaulttimeout(timeout)
    return train[:2], test[:2], list(train[2])


def _folders(name, root, note=lambda line: None):
    """((files, labels) to train on, the same to test on, classes) of train/ and test/ or val/, by sub-folder.

    note: is given a line about the files that are left out, if any.
    """
    if name == 'IMAGENET':
        wanted, tests = f'{root} or {root / "imagenet"} has to hold train/ and val/', ('val',)
        root = root if (root / 'train').is_dir() else root / 'imagenet'
    else:
        wanted, tests = f'{root} has to hold train/ and test/ or val/', ('test', 'val')
    wanted += ', with one sub-folder of pictures for each class; say with --data_dir where it is'
    test_dir = next((root / test for test in tests if (root / test).is_dir()), None)
    for there, what in ((root.is_dir(), root), ((root / 'train').is_dir(), root / 'train'),
                        (test_dir, ' or '.join(str(root / test) for test in tests))):
        if not there:
            raise UserError(f'{name}: there is no {what}; {wanted}')

    left = {root / 'train': Counter(), test_dir: Counter()}
    train, test = (_by_class(folder, found) for folder, found in left.items())
    but = '; '.join(f'{folder}: {_listed(found)}' for folder, found in left.items() if found)
    if but:
        but = f'files left out, being no pictures that Pillow reads or in no class: {but}'
        note(but)
        but = f' ({but})'
    for folder, pictures in ((root / 'train', train), (test_dir, test)):
        if not any(pictures.values()):
            raise UserError(f'{name}: no pictures in sub-folders of {folder}; {wanted}{but}')
    if len(train) < 2:
        raise UserError(f'{root / "train"}: holds one class only, so there is nothing to learn; {wanted}')
    empty = [label for label, files in train.items() if not files]
    if empty:
        raise UserError(f'{root / "train"}: no pictures of class {", ".join(empty)}; add some or delete the folder'
                        + but)
    unknown = [label for label in test if label not in train]
    if unknown:
        raise UserError(f'{test_dir}: class {", ".join(unknown)} is not in {root / "train"}; '
                        'the sub-folders of both must have the same names')
    number = {label: n for n, label in enumerate(train)}
    train_set, test_set = [([file for files in part.values() for file in files],
                            torch.tensor([number[label] for label, files in part.items() for _ in files]))
                           for part in (train, test)]
    return train_set, test_set, list(train)


def _endings():
    """The ends of names of pictures that Pillow reads, in lower case; also those of plugins that are loaded."""
    from PIL import Image
    formats = Image.registered_extensions()  # which loads Pillow's own, too
    readable = {*Image.OPEN, 'MPO'} - _NO_PICTURES  # an MPO is opened as a JPEG
    return {ending for ending, kind in formats.items() if kind in readable}


def _by_class(folder, left):
    """{class: its picture files}, both sorted; files and folders whose names start with a dot are passed over.

    left: a Counter, to which the other files are added by the ends of their names.

    A folder is walked once, however many links lead to it, and where it lies rather than where a link leads to it. A
    link to a folder that holds the class folders leads back, and is passed over. A link to a file counts as a file.
    """
    set_places = (_real(folder), _real(folder.parent))
    around = {path for place in set_places for path in (place, *place.parents)}
    entries, endings = _entries(folder), _endings()
    left.update(f'{_ending(entry)} in no class' for entry in entries if not entry.is_dir())
    places = {entry.name: _real(entry.path) for entry in entries if entry.is_dir()}
    places = {label: place for label, place in places.items() if place not in around}
    first = {}
    for label, place in places.items():
        if (other := first.setdefault(place, label)) != label:
            raise UserError(f'{folder}: classes {other} and {label} are one and the same folder; delete a link')
    walked = around.union(*(place.parents for place in first)) - first.keys()
    files = {label: [] for label in places}
    to_walk = deque((label, os.path.join(folder, label)) for label in places)
    while to_walk:
        label, at = to_walk.popleft()
        if (place := _real(at)) in walked:
            continue
        walked.add(place)
        for entry in _entries(at):
            if entry.is_dir():
                put = to_walk.append if entry.is_symlink() else to_walk.appendleft  # links are followed last
                put((label, entry.path))
            elif _ending(entry) not in endings:
                left[_ending(entry)] += 1
            else:
                if not entry.is_file():
                    raise UserError(f'{entry.path}: is no file, or a link to none; mend or delete it')
                files[label].append(entry.path)
    return {label: sorted(found) for label, found in files.items()}


def _ending(entry):
    ending = os.path.splitext(entry.name)[1].lower() or 'without an extension'
    return ending if ending.isprintable() else ascii(ending)[1:-1]


def _listed(left, most=30):
    """A Counter of _by_class() in words, those that are met most often first."""
    shown = left.most_common(most)
    others = left.total() - sum(count for _, count in shown)
    return ', '.join(f'{count} {what}' for what, count in [*shown, *([('of other names', others)] if others else [])])


def _entries(folder):
    """What a folder holds, sorted by name, but for names that start with a dot."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith('.')), key=lambda entry: entry.name)


def _real(path):
    return Path(os.path.realpath(path))


def _resize(image, size):
    from PIL import Image
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)


def picture(file, name, input_shape):
    """A picture file as a sample of the test set `name`: float32 (C, H, W). Raises UserError where it cannot be read.

    For sets of one channel it becomes grey; light on dark is what they hold.
    """
    channels, height, width = input_shape
    image = _read(file, _imagenet_test() if name == 'IMAGENET' else partial(_resize, size=height))
    if channels == 1:
        parts = torch.tensor([299, 587, 114])[:, None, None]  # in thousandths, of ITU-R 601: grey stays as it is
        image = ((parts * image).sum(0, keepdim=True) + 500).div(1000, rounding_mode='floor').to(torch.uint8)
    images, _ = Pictures(image[None], torch.zeros(1, dtype=torch.int64), signed=channels > 1).batch([0])
    return images[0]


def _imagenet_test():
    v2 = _transforms()
    return v2.Compose([v2.Resize(256), v2.CenterCrop(224)])


def _transforms():
    with _importing_torchvision('IMAGENET'):
        from torchvision.transforms import v2
    return v2


def _importing_torchvision(name):
    """importing() of the package whose version has to be that of torch."""
    fitting = f'0.{int(torch.__version__.split(".")[1]) + 15}'  # torch 2.11 came with 0.26, and so on
    return importing('torchvision', name, f'torch {torch.__version__} goes with torchvision {fitting}; install the two '
                     'together, from one index')


def _read(file, prepare):
    """A picture file as RGB, prepared: uint8 (3, H, W)."""
    import numpy as np
    with importing('pillow', 'pictures'):
        from PIL import Image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow warns of damaged EXIF and of large pictures, which are taken
            with Image.open(file) as opened:
                image = _rgb(opened)
    except UserError as error:
        raise UserError(f'{file}: {error}') from error
    except Exception as error:  # Pillow's decoders raise nearly anything
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UserError(f'{file}: not a picture that can be read ({reason}); replace or delete it') from error
    return torch.from_numpy(np.array(prepare(image))).permute(2, 0, 1)


def _rgb(image):
    """The first frame of a picture that was just opened, as RGB: upright, and over black where it is transparent."""
    import numpy as np
    from PIL import Image
    decoder, _, _, layout = image.tile[0] if image.tile else [None] * 4  # how pixels lie in the file; gone once loaded
    tags = image.tag_v2 if image.format == 'TIFF' else {}
    if decoder == 'raw' and tags.get(284) == 2 and 16 in tags.get(258, ()):  # PlanarConfiguration, BitsPerSample
        raise UserError('holds uncompressed 16-bit colours in separate planes, which Pillow misreads; '
                        'save it compressed or as an 8-bit picture')
    image.filename = ''  # or Pillow maps the file into memory, a TIFF that lies on its side with its sides exchanged
    image.load()
    upright = _UPRIGHT.get(_orientation(image))
    key = image.info.get('transparency')
    if image.mode in ('P', 'PA', 'LA', 'RGBA', 'RGBa'):
        colours = image.convert('RGBA')
        image = Image.new('RGB', image.size)
        image.paste(colours, mask=colours)
    elif image.mode == 'La':  # grey that is composed over black already
        image = image.getchannel(0)
    elif image.mode.startswith('I') or image.mode == 'F':
        image = _eight_bits(image, key, tags)
    elif key is not None:  # one colour that is transparent, in the file's own depth
        if layout in ('L;2', 'L;4'):
            key *= {'L;2': 85, 'L;4': 17}[layout]
        elif layout == 'RGB;16B':
            key = [value // 256 for value in key]
        values = np.array(image.convert('L') if image.mode == '1' else image)
        values[(np.atleast_3d(values) == key).all(-1)] = 0
        image = Image.fromarray(values)
    if image.mode != 'RGB':
        image = image.convert('RGB')
    return image.transpose(Image.Transpose[upright]) if upright else image


def _orientation(image):
    """The EXIF tag of a loaded picture, or None. It is no part of a TIFF any more, which Pillow turns in loading."""
    try:
        return image.getexif().get(0x0112)
    except Exception:  # a damaged block; the picture itself is whole
        return None


def _eight_bits(image, key, tags):
    """A grey picture of 16 bits, or of floats from 0 to 1, as one of 8 bits, which Pillow would clip rather than scale.

    key: the value that is transparent, or None. tags: a TIFF's. Raises UserError where nothing says which value is
    white: for signed and 32-bit integers, and for floats beyond 0 to 1, the range that pictures of floats have by
    convention, and for those that are not numbers.
    """
    import numpy as np
    from PIL import Image
    values = np.array(image)
    if image.mode == 'F':
        if not ((values >= 0) & (values <= 1)).all():
            raise UserError('holds floats that are not from 0 to 1, so what is white is unknown; '
                            'save it as an 8- or 16-bit picture')
        levels = np.rint(values * 255)
    elif image.mode.startswith('I;16') or image.format in ('PNG', 'PPM'):  # the latter have 16 bits at most
        if key is not None:
            values[values == key] = 0
        levels = values // (16 if tags.get(258) == (12,) else 256)  # BitsPerSample
    else:
        raise UserError(f'holds integers of mode {image.mode}, so what is white is unknown; '
                        'save it as an 8- or 16-bit picture')
    levels = levels.astype(np.uint8)
    return Image.fromarray(255 - levels if tags.get(262) == 0 else levels)  # PhotometricInterpretation: white is 0


def _read_all(files, prepare, indices):
    return torch.stack([_read(files[index], prepare) for index in indices])


def _decode(files, prepare, size, num_workers):
    """All the files as uint8 (N, 3, size, size), read by so many processes where there are many files."""
    from tqdm import tqdm
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    workers = num_workers if len(files) > 2000 else 0
    # Batches of 1 MiB, copied at once: a container may have little shared memory, and each batch keeps a file open.
    batch_size = max(1, 2 ** 20 // images[0].nbytes)
    batches = [range(i, min(i + batch_size, len(files))) for i in range(0, len(files), batch_size)]
    loader = _Loader(batches, partial(_read_all, files, prepare), num_workers=workers,
                     generator=torch.Generator())  # else it would draw from the global one
    done = 0
    with tqdm(total=len(files), desc='reading pictures', leave=False, disable=None) as bar:
        for batch in loader:
            images[done:done + len(batch)] = batch
            done += len(batch)
            bar.update(len(batch))
    return images
