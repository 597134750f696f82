"""Picture files: finding them in the folders of classes, and reading one. Importing this does not import Pillow."""
import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from experiment import UserError, importing
from experiment.files import PASSING

# what Pillow opens besides pictures: documents and drawings, videos, measurements
NO_PICTURES = {'EPS', 'WMF', 'MPEG', 'BUFR', 'FITS', 'GRIB', 'HDF5'}


def by_class(folder: Path) -> tuple[dict[str, list[str]], Counter]:
    """({class: its picture files}, both sorted; a Counter of the other files by their extensions).

    A folder counts once, even if links lead to it: links are followed last, and never to a folder around a class.
    """
    _, labels, files = next(_walk(folder))
    others, endings = Counter(f'{_ending(file)} in no class' for file in files), _endings()
    around = {place for top in (folder.resolve(), folder.parent.resolve()) for place in (top, *top.parents)}
    classes = {}  # {its folder without links: its name}
    for label in labels:
        if (place := (folder / label).resolve()) in classes:
            raise UserError(f'{folder}: classes {classes[place]} and {label} are the same folder; delete a link')
        if place not in around:
            classes[place] = label

    walked = around.union(*(place.parents for place in classes)) - classes.keys()
    found = {label: [] for label in classes.values()}
    to_walk = [(label, folder / label) for label in found]
    for label, top in to_walk:  # links that are met are appended
        for at, folders, files in _walk(top):
            if (place := Path(at).resolve()) in walked:
                folders.clear()
                continue
            walked.add(place)
            to_walk += [(label, link) for name in folders if os.path.islink(link := os.path.join(at, name))]
            for file in files:
                if (ending := _ending(file)) not in endings:
                    others[ending] += 1
                elif not os.path.isfile(path := os.path.join(at, file)):
                    raise UserError(f'{path}: is no file, or a link to none; repair or delete it')
                else:
                    found[label].append(path)
    return {label: sorted(files) for label, files in found.items()}, others


def _walk(top):
    """os.walk() sorted by name, without hidden files and folders; raises OSError. It follows no links."""
    def fail(error):
        raise error

    for at, folders, files in os.walk(top, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        yield at, folders, [name for name in files if not name.startswith('.')]


def _endings():
    """The extensions of pictures that Pillow and its loaded plugins read, in lower case."""
    with importing('pillow', 'pictures'):
        from PIL import Image
    formats = Image.registered_extensions()  # this loads Pillow's own plugins
    readable = {*Image.OPEN, 'MPO'} - NO_PICTURES  # an MPO is opened as a JPEG
    return {ending for ending, kind in formats.items() if kind in readable}


def _ending(name):
    ending = os.path.splitext(name)[1].lower() or 'without an extension'
    return ending if ending.isprintable() else ascii(ending)[1:-1]


def listed(counts: Counter, most: int = 30) -> str:
    """A Counter in words, the most frequent first."""
    shown = counts.most_common(most)
    others = counts.total() - sum(count for _, count in shown)
    return ', '.join(f'{count} {what}' for what, count in [*shown, *([('of other names', others)] if others else [])])


def read(file: str | Path, prepare: Callable) -> torch.Tensor:
    """A picture file as RGB, prepared: uint8 (C, H, W)."""
    with importing('pillow', 'pictures'):
        from PIL import Image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # damaged EXIF and large pictures are read all the same
            with Image.open(file) as opened:
                image = _rgb(opened)
    except UserError as error:
        raise UserError(f'{file}: {error}') from error
    except MemoryError:  # no fault of the file
        raise
    except PermissionError as error:  # nor is this
        raise UserError(f'{file}: cannot be read ({error.strerror}); make it readable') from error
    except Exception as error:  # Pillow's decoders raise nearly anything
        reason = ' '.join(str(error).split()) or type(error).__name__
        if getattr(error, 'errno', None) in PASSING:
            raise UserError(f'{file}: cannot be read ({error.strerror}), though it may be sound; run again') from error
        raise UserError(f'{file}: not a picture that can be read ({reason}); replace or delete it') from error
    return torch.from_numpy(np.atleast_3d(np.array(prepare(image)))).permute(2, 0, 1)


def _rgb(image):
    """The first frame of a picture that was just opened, as RGB: upright, and over black if it is transparent."""
    from PIL import Image, ImageOps
    decoder, _, _, layout = image.tile[0] if image.tile else [None] * 4  # how pixels are stored; gone once loaded
    tags = image.tag_v2 if image.format == 'TIFF' else {}
    if decoder == 'raw' and tags.get(284) == 2 and 16 in tags.get(258, ()):  # PlanarConfiguration, BitsPerSample
        raise UserError('holds uncompressed 16-bit colours in separate planes, which Pillow misreads; '
                        'save it compressed or as an 8-bit picture')
    image.filename = ''  # else Pillow maps the file into memory, with the sides of a rotated TIFF exchanged
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF; the picture itself is intact
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith('I') or image.mode == 'F':
        image = _eight_bits(image, tags)
    elif image.mode == 'La':  # grey, already composed over black
        image = image.getchannel(0)
    elif image.has_transparency_data:
        if layout in ('L;2', 'L;4'):  # the colour that is transparent is in the file's own depth
            image.info['transparency'] *= {'L;2': 85, 'L;4': 17}[layout]
        elif layout == 'RGB;16B':
            image.info['transparency'] = tuple(value // 256 for value in image.info['transparency'])
        colours = image.convert('RGBA')
        image = Image.new('RGB', image.size)
        image.paste(colours, mask=colours)
    return image.convert('RGB')


def _eight_bits(image, tags):
    """A grey picture of 16 bits, or of floats from 0 to 1, scaled to 8 bits; Pillow would clip it.

    tags: a TIFF's. Raises UserError if it is unknown which value is white: for signed and 32-bit integers, and for
    floats outside of 0 to 1, the usual range, or NaN.
    """
    from PIL import Image
    values = np.array(image)
    if image.mode == 'F' and ((values >= 0) & (values <= 1)).all():
        levels = np.rint(values * 255)
    elif image.mode.startswith('I;16') or image.mode == 'I' and image.format == 'PPM':  # of 16 bits at most
        values[values == image.info.get('transparency', -1)] = 0
        levels = values // (16 if tags.get(258) == (12,) else 256)  # BitsPerSample
    else:
        what = 'floats that are not from 0 to 1' if image.mode == 'F' else f'integers of mode {image.mode}'
        raise UserError(f'holds {what}, so what is white is unknown; save it as an 8- or 16-bit picture')
    levels = levels.astype(np.uint8)
    return Image.fromarray(255 - levels if tags.get(262) == 0 else levels)  # PhotometricInterpretation: white is 0
