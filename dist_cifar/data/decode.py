"""Reads and decodes an image file of any format that Pillow reads: the one rule of training, evaluation and `predict`.

Contract: the result is RGB, resized to 32x32 by `Image.resize` with the antialiased bilinear filter, aspect ratio not
kept, if it has another size. A photo is turned upright as its orientation tag says. Transparency is dropped and colour
profiles are ignored; of an animation the first frame counts; of 16 bits a channel, the upper 8 are kept. Other color
spaces are converted by Pillow. The bytes may be hostile: what would decode to too many pixels is refused before it is
decoded, and what a file makes its decoder raise is a `ValueError` that says why.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from dist_cifar.augment.image import IMAGE_SIZE
from dist_cifar.errors import one_line

VERSION = 2
"""Increase it when a file is decoded to other bytes: the decoded images in caches are then made again."""
MAX_FILE_BYTES = 256_000_000
"""Limit for one file."""
_MAX_PIXELS = 64_000_000
"""Limit for one image: more is a mistake or a decompression bomb."""
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by the orientation of EXIF 2.3."""


def read_file(path: Path) -> bytes:
    """The content of a regular file. Raises `ValueError`, which says why, for anything else and for what is too large.

    Nothing else is opened: a pipe would be waited for, and a device may have effects.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("no regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise ValueError(f"{status.st_size:,} bytes, more than {MAX_FILE_BYTES:,}")
        with path.open("rb") as file:
            return read_stream(file)
    except OSError as error:
        raise ValueError(why_unreadable(path, error)) from None


def why_unreadable(path: Path, error: OSError) -> str:
    """The reason for `error`, which the file `path` has raised, without its name."""
    if path.is_symlink() and not os.path.exists(path):
        return f"a link to nothing: {os.readlink(path)}"
    return error.strerror or type(error).__name__


def read_stream(file: IO[bytes]) -> bytes:
    """What an open file still holds. Raises `ValueError` where that is too much or cannot be read."""
    try:
        data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(error.strerror) from None
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"more than {MAX_FILE_BYTES:,} bytes")
    return data


def decode_image(data: bytes) -> npt.NDArray[np.uint8]:
    """The image as uint8 [32, 32, 3]. Raises `ValueError`, which says why, for bytes that are not a readable image."""
    if not data:
        raise ValueError("it is empty")
    with _one_kind_of_error(), Image.open(io.BytesIO(data)) as opened:
        return _pixels(opened)


def pixels_of(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The same for an image of Pillow's, which may not have been read yet."""
    with _one_kind_of_error():
        return _pixels(image)


@contextlib.contextmanager
def _one_kind_of_error() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of files that can be read all the same
            yield
    except UnidentifiedImageError:
        raise ValueError("no format that Pillow knows") from None
    except Exception as error:  # decoders raise anything on bytes that are not an image
        raise ValueError(one_line(error)) from None


def _pixels(opened: Image.Image) -> npt.NDArray[np.uint8]:
    if opened.width * opened.height > _MAX_PIXELS:  # known from the header, before anything is decoded
        raise ValueError(f"{opened.width}x{opened.height} pixels, more than {_MAX_PIXELS:,}; make it smaller")
    if opened.format == "EPS":  # Pillow would have another program run it
        raise ValueError("EPS is a program and no image; convert it to PNG")
    opened.load()  # before the orientation is read: Pillow turns TIFF here, and forgets their tag
    image = _as_rgb(_upright(opened))
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged tag, which may hold anything, says nothing about the pixels
        turn = None
    return image if turn is None else image.transpose(turn)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would cut off what is above 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range: save it with 8 or 16 bits a channel")
    if image.mode == "La":
        image = image.convert("LA")
    elif image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns of a palette with transparency
    return image.convert("RGB")
