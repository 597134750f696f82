"""The data sets by name, and the loader of one epoch. Importing it is quick: torchvision is imported by its users."""
import contextlib
import errno
import io
import math
import multiprocessing.queues
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from experiment import UserError, importing, picture_files
from experiment.distributed import ALONE, Process
from experiment.files import one_at_a_time
from experiment.options import dead_worker
from self_models.architectures import INPUT_SHAPES

# torchvision's class and its folder under data_dir
_TORCHVISION = {'MNIST': ('MNIST', 'mnist'), 'FASHIONMNIST': ('FashionMNIST', 'fashion_mnist'),
                'CIFAR10': ('CIFAR10', 'cifar_data'), 'CIFAR100': ('CIFAR100', 'cifar_data')}
# of the data sets whose number of classes is known without their files
CLASS_COUNTS = {'MNIST': 10, 'FASHIONMNIST': 10, 'CIFAR10': 10, 'CIFAR100': 100, 'DIGITS': 10}
NO_IMAGE = -100  # the label of an image that does not count; torch's cross-entropy ignores it
IN_MEMORY_BYTES = 2 ** 30  # a FOLDER up to this size is decoded once, a larger one in every epoch
MANY_FILES = 2000  # more than these are decoded by several processes


class Transform(NamedTuple):
    """How the images of a set are prepared for a network.

    prepare: resizes a picture from PIL. top: the largest value of a pixel. signed: whether values become -1 .. 1, else
    0 .. 1. augment: flip at random, and shift by up to `crop` pixels. cutout: the size of a square that is set to 0, in
    pixels. Both draw from torch's global generator.
    """
    prepare: Callable | None = None
    top: int = 255
    signed: bool = True
    augment: bool = False
    cutout: int = 0
    crop: int = 4


class Pictures(Dataset):
    """Samples (image, label): float32 (C, H, W), and an int.

    images: uint8 (N, C, H, W), or a list of N picture files, which are read in every epoch. labels: int64 (N,).
    """

    def __init__(self, images: torch.Tensor | list, labels: torch.Tensor, transform: Transform):
        self.images, self.labels, self.transform = images, labels, transform
        self.in_memory = isinstance(images, torch.Tensor)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def subset(self, numbers: torch.Tensor, transform: Transform | None = None) -> 'Pictures':
        """The images of these numbers, sorted by number, with the transform of this set or another one."""
        numbers = numbers.sort().values
        images = self.images[numbers] if self.in_memory else [self.images[number] for number in numbers.tolist()]
        return Pictures(images, self.labels[numbers], transform or self.transform)

    def sample(self, count: int, seed: int, like: 'Pictures') -> 'Pictures':
        """`count` images (all, if there are fewer), the same for the same seed, with the transform of `like`."""
        return self.subset(shuffled(len(self), seed)[:count], like.transform)

    def batch(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) and labels (B,) of a list of indices: some 20 times faster than one by one."""
        prepare, top, signed, augment, cutout, crop = self.transform
        images = self.images[indices] if self.in_memory else _read_all(self.images, prepare, indices)
        if augment:
            images = crop_and_flip(images, crop)
        images = images.float().div_(top)
        if signed:
            images = images.mul_(2).sub_(1)
        if cutout:
            images = cut_out(images, cutout)
        return images, self.labels[indices]


class Data(NamedTuple):
    train: Pictures | None  # None: only the shape of the images is known
    test: Pictures | None
    classes: list[str]
    input_shape: tuple[int, int, int]  # (C, H, W)
    validation: Pictures | None = None  # held out of the training set, to choose the best epoch on
    full_train_size: int = 0  # images in the training set before any were left out
    notes: tuple[str, ...] = ()  # lines to say about its files

    @property
    def selection(self) -> str:
        """The name of the set that epochs are compared on."""
        return 'test' if self.validation is None else 'validation'


def crop_and_flip(images: torch.Tensor, padding: int = 4) -> torch.Tensor:
    """Pad (B, C, H, W) with zeros (black), cut each image out at a random place and flip it with probability 1/2."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, count))
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)[torch.arange(count), :, top, left]
    return torch.where(torch.rand(count, 1, 1, 1) < 0.5, crops.flip(3), crops)


def cut_out(images: torch.Tensor, size: int) -> torch.Tensor:
    """Set a square of `size` pixels to 0 in each of the images (B, C, H, W). Its centre is a random pixel; it may reach
    beyond the image (cutout: DeVries and Taylor, 2017)."""
    count, _, height, width = images.shape

    def within(length):  # (B, length)
        start = torch.randint(length, (count, 1)) - size // 2
        place = torch.arange(length)
        return (place >= start) & (place < start + size)

    return images.masked_fill_((within(height)[:, :, None] & within(width)[:, None])[:, None], 0)


class Sampling(NamedTuple):
    """Which images of a data set are taken: the same for the same seeds.

    train_samples, test_samples: so many at random; None for all. validation_fraction: the part of the training set that
    is held out. split_seed shuffles the training set (None: `seed`, which shuffles the test set). Training images are
    its first ones, the validation images its last ones, whatever train_samples.
    """
    train_samples: int | None = None
    test_samples: int | None = None
    seed: int = 0
    validation_fraction: float = 0.0
    split_seed: int | None = None


ALL = Sampling()


def load(name: str, data_dir: str | Path, image_size: int = 32, sampling: Sampling = ALL, num_workers: int = 0,
         cutout: int = 0, crop: int = 4) -> Data:
    """The data set `name`; UserError if it is missing, damaged or not as it should be.

    image_size: height and width in pixels that FOLDER pictures are resized to; the other sets have their own.
    num_workers: processes that decode the pictures of a small FOLDER, 0 for none. cutout, crop: see Transform; of
    training images.
    """
    if name not in BUILDERS:
        raise UserError(f'{name}: no such data set; choose one of {", ".join(INPUT_SHAPES)}')
    whole = BUILDERS[name](name, Path(os.path.expanduser(data_dir)), image_size)
    _, height, width = whole.input_shape
    if cutout >= min(height, width):
        raise UserError(f'--cutout {cutout}: may cover whole images of {height}x{width} pixels; take a smaller one')
    sets = _sampled(whole.train, whole.test, sampling)
    if name == 'FOLDER' and sum(map(len, sets)) * math.prod(whole.input_shape) <= IN_MEMORY_BYTES:
        sets = [Pictures(_decode(part.images, part.transform.prepare, image_size, num_workers), part.labels,
                         part.transform) for part in sets]
    train, validation, test = sets
    train.transform = train.transform._replace(cutout=cutout, crop=crop)
    return whole._replace(train=train, test=test, validation=validation if len(validation) else None,
                          full_train_size=len(whole.train))


def _sampled(train, test, sampling):
    """[training, validation, test set], the Pictures that `sampling` takes of a whole training set and test set."""
    train_samples, test_samples, seed, fraction, split_seed = sampling
    left = len(train) - held_out_of(len(train), fraction)
    if fraction and left == len(train):
        raise UserError(f'--validation_fraction {fraction} holds out none of {left} train images; hold out a larger '
                        'part, or leave the flag out to choose the best epoch on the test set')
    if fraction and left < (train_samples or 1):
        raise UserError(f'--validation_fraction {fraction} leaves {left} of {len(train)} train images; hold out a '
                        'smaller part, or ask for fewer with --train_samples')
    for part, samples, images in (('train', train_samples, train), ('test', test_samples, test)):
        if samples and samples > len(images):
            raise UserError(f'--{part}_samples {samples}: there are {len(images)} {part} images; ask for fewer')
    order = shuffled(len(train), seed if split_seed is None else split_seed)
    return [train.subset(order[:train_samples or left]), train.subset(order[left:], test.transform),
            test.subset(shuffled(len(test), seed)[:test_samples])]


def epoch_loader(dataset: Dataset, batch_size: int, num_workers: int = 0, seed: int = 0, shuffle: bool = False,
                 pin_memory: bool = False, process: Process = ALONE) -> DataLoader:
    """A DataLoader of (images (B, C, H, W), labels (B,)) for one epoch; the last batch may be smaller.

    process: a distributed.Process. Batches have world_size times batch_size images, of which each process gets an even
    part; if no image is left for it, one whose label is NO_IMAGE. The loader's attribute `sizes` lists how many images
    each batch has, over all processes.
    Order and augmentation depend on seed and batch_size only, not on num_workers, and torch's global generator stays
    as it was. Iterating raises UserError if a picture cannot be read.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator).tolist() if shuffle else range(len(dataset))
    seeds = torch.randint(2 ** 31, (len(dataset),), generator=generator)
    # a batch is taken from memory faster than a worker hands one over
    workers = 0 if getattr(dataset, 'in_memory', False) else num_workers
    rank, world_size = process
    batches = [order[i:i + batch_size * world_size] for i in range(0, len(order), batch_size * world_size)]
    return _Loader([list(batch[rank::world_size]) for batch in batches], partial(_batch, dataset, seeds),
                   [len(batch) for batch in batches], num_workers=workers, pin_memory=pin_memory, generator=generator)


class _Loader(DataLoader):
    """Yields make([index, ...]) for each of the batches, so a batch is cut out and augmented at once."""

    def __init__(self, batches, make, sizes=(), **options):
        super().__init__(batches, batch_size=None, collate_fn=partial(_error_as_value, make),
                         worker_init_fn=_say_no_lost_connections, **options)
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
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.EAGAIN, errno.EMFILE):
                raise
            raise UserError(f'processes that load data cannot start ({error.strerror}); lower --num_workers') from error


def _say_no_lost_connections(_):
    """Of a worker whose run ends while it hands over a batch: Python would print a traceback beside the run's error."""
    hook = sys.excepthook
    sys.excepthook = lambda kind, *error: None if issubclass(kind, ConnectionError) else hook(kind, *error)
    # a batch that it cannot hand over, as if /dev/shm is full: Python would drop it, and the run wait for it for good
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(1))


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
    """make(indices), or the UserError that it raises: torch would put a worker's traceback into its text."""
    try:
        return make(indices)
    except UserError as error:
        return error


def held_out_of(count: int, validation_fraction: float) -> int:
    """How many of so many training images are held out."""
    return round(validation_fraction * count)


def shuffled(count: int, seed: int) -> torch.Tensor:
    """The numbers of so many images, in the order that a seed gives."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _digits(name, *_):
    with importing('scikit-learn', name):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1), torch.from_numpy(digits.target)
    parts = train_test_split(range(len(labels)), test_size=360, stratify=digits.target, random_state=0)
    train, test = (Pictures(images[part], labels[part], Transform(top=16, signed=False)) for part in parts)
    return Data(train, test, [str(n) for n in digits.target_names], INPUT_SHAPES[name])


def _import_torchvision(name):
    """The package torchvision, whose version has to be that of torch."""
    fitting = f'0.{int(torch.__version__.split(".")[1]) + 15}'  # torch 2.11 came with 0.26, and so on
    with importing('torchvision', name, f'torch {torch.__version__} goes with torchvision {fitting}; install the two '
                   'together, from one index'):
        import torchvision
        import torchvision.transforms.v2
    return torchvision


def _torchvision(name, data_dir, _):
    """A data set of torchvision's, downloaded if files are missing."""
    of_class, folder = _TORCHVISION[name]
    kind, root = getattr(_import_torchvision(name).datasets, of_class), data_dir / folder
    if cifar := name.startswith('CIFAR'):
        at, files = root / kind.base_folder, [file for file, _ in kind.train_list + kind.test_list]
        files.append(kind.meta['filename'])
    else:
        at, files = root / of_class / 'raw', [Path(archive).stem for archive, _ in kind.resources]

    def missing():
        return [file for file in files if not (at / file).is_file()]

    def read(train):
        dataset = kind(root, train=train, download=bool(missing()))
        images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets).long()
        images = images.permute(0, 3, 1, 2).contiguous() if cifar else images.unsqueeze(1)
        if not len(images) == len(labels) > 0:
            raise ValueError(f'{len(images)} images and {len(labels)} labels')
        return Pictures(images, labels, Transform(signed=cifar, augment=cifar and train)), list(dataset.classes)

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; else a firewall that drops packets costs minutes
    try:
        # of several runs at once, the first one downloads
        waiting = f'{name}: waits for another run, which downloads it into {root}' if missing() else None
        with contextlib.redirect_stdout(io.StringIO()), one_at_a_time(root, waiting):
            (train, classes), (test, _) = read(train=True), read(train=False)
    except Exception as error:  # torchvision raises many kinds of errors for missing and damaged files
        reason = (str(error) or type(error).__name__).strip().splitlines()[-1]
        if missing():
            archive = f'{kind.filename} into {root}' if cifar else 'the same as .gz'
            raise UserError(f'{name}: cannot be downloaded ({reason}); put {", ".join(missing())} into {at}, '
                            f'or {archive}, or say with --data_dir where it is') from error
        raise UserError(f'{name}: the files in {at} are damaged ({reason}); delete that folder and run again '
                        'to download it anew') from error
    finally:
        socket.setdefaulttimeout(timeout)
    return Data(train, test, classes, INPUT_SHAPES[name])


def _imagenet(name, root, _):
    v2 = _import_torchvision(name).transforms.v2
    crop = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()])
    inner = root if (root / 'train').is_dir() else root / 'imagenet'
    return _by_folders(name, inner, ['val'], f'{root} or {root / "imagenet"}', INPUT_SHAPES[name],
                       [Transform(crop), Transform(_resizing(name, 224))])


def _folder(name, root, size):
    shown = Transform(_resizing(name, size))
    return _by_folders(name, root, ['test', 'val'], root, (3, size, size), [shown._replace(augment=True), shown])


BUILDERS = {**dict.fromkeys(_TORCHVISION, _torchvision), 'DIGITS': _digits, 'IMAGENET': _imagenet, 'FOLDER': _folder}


def _by_folders(name, root, tests, place, shape, transforms):
    """The Data of pictures in a sub-folder for each class, in train/ and in the first of `tests` that is there.

    place: the root, as errors name it. transforms: of training and of test images.
    """
    wanted = (f'{place} has to hold train/ and {" or ".join(f"{test}/" for test in tests)}, with one sub-folder of '
              'pictures for each class; say with --data_dir where it is')
    train_dir, test_dirs = root / 'train', [root / test for test in tests]
    test_dir = next(filter(Path.is_dir, test_dirs), None)
    for there, what in ((root.is_dir(), root), (train_dir.is_dir(), train_dir),
                        (test_dir, ' or '.join(map(str, test_dirs)))):
        if not there:
            raise UserError(f'{name}: there is no {what}; {wanted}')
    try:
        (train, train_others), (test, test_others) = picture_files.by_class(train_dir), picture_files.by_class(test_dir)
    except OSError as error:
        raise UserError(f'{error.filename}: cannot be read ({error.strerror}); repair or delete it, or say with '
                        '--data_dir where the pictures are') from error
    left_out = '; '.join(f'{folder}: {picture_files.listed(others)}'
                         for folder, others in ((train_dir, train_others), (test_dir, test_others)) if others)
    notes = (f'files left out, being no pictures that Pillow reads or in no class: {left_out}',) if left_out else ()
    but = ''.join(f' ({note})' for note in notes)
    for folder, found in ((train_dir, train), (test_dir, test)):
        if not any(found.values()):
            raise UserError(f'{name}: no pictures in sub-folders of {folder}; {wanted}{but}')
    if len(train) < 2:
        raise UserError(f'{train_dir}: holds one class only, so there is nothing to learn; {wanted}')
    if empty := [label for label, files in train.items() if not files]:
        raise UserError(f'{train_dir}: no pictures of class {", ".join(empty)}; add some or delete the folder{but}')
    if unknown := [label for label in test if label not in train]:
        raise UserError(f'{test_dir}: class {", ".join(unknown)} is not in {train_dir}; '
                        'the sub-folders of both must have the same names')
    number = {label: n for n, label in enumerate(train)}
    sets = [Pictures([file for files in part.values() for file in files],
                     torch.tensor([number[label] for label, files in part.items() for _ in files]), transform)
            for part, transform in zip((train, test), transforms)]
    return Data(*sets, list(train), shape, notes=notes)


def _resizing(name, size):
    """What resizes a picture of PIL for a test set."""
    if name == 'IMAGENET':
        v2 = _import_torchvision(name).transforms.v2
        return v2.Compose([v2.Resize(256), v2.CenterCrop(224)])
    return methodcaller('resize', (size, size), 2)  # bilinear


def picture(file: str | Path, name: str, input_shape: tuple[int, int, int]) -> torch.Tensor:
    """A picture file as a sample of the test set `name`: float32 (C, H, W). Raises UserError if it cannot be read.

    For sets of one channel it becomes grey; their images are light on dark.
    """
    channels, height, _ = input_shape
    resize = _resizing(name, height)
    image = picture_files.read(file, resize if channels == 3 else lambda image: resize(image).convert('L'))
    return Pictures(image[None], torch.zeros(1), Transform(signed=channels == 3))[0][0]


def _read_all(files, prepare, indices):
    return torch.stack([picture_files.read(files[index], prepare) for index in indices])


def _decode(files, prepare, size, num_workers):
    """All the files as uint8 (N, 3, size, size), read by so many processes if there are many files."""
    from tqdm import tqdm
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    # batches of 1 MiB: a container may have little shared memory, and each batch keeps a file open
    batch_size = max(1, 2 ** 20 // (3 * size ** 2))
    batches = [range(i, min(i + batch_size, len(files))) for i in range(0, len(files), batch_size)]
    workers = num_workers if len(files) > MANY_FILES else 0
    loader = _Loader(batches, partial(_read_all, files, prepare), num_workers=workers,
                     generator=torch.Generator())  # else it would draw from the global one
    with tqdm(total=len(files), desc='reading pictures', leave=False, disable=None) as bar:
        for numbers, batch in zip(batches, loader):
            images[numbers.start:numbers.stop] = batch
            bar.update(len(batch))
    return images
