"""Decodes an image file of any format that Pillow reads.

Contract: the result is RGB (transparency dropped, the first frame of an animation), resized to 32x32 by `Image.resize`
with the antialiased bilinear filter, aspect ratio not kept, if it has another size. Of 16 bits a channel, the upper 8
are kept. The bytes may be hostile: an image that would decode to too many pixels is refused before it is decoded.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from dist_cifar.augment.image import IMAGE_SIZE
from dist_cifar.errors import one_line

_MAX_PIXELS = 64_000_000
"""Limit for one image: more is a mistake or a decompression bomb."""


def decode_image(data: bytes, *, upright: bool = False) -> npt.NDArray[np.uint8]:
    """The image as uint8 [32, 32, 3]; `upright` turns it as its orientation tag says, which is ignored otherwise.

    Raises `ValueError`, which says why, for bytes that are not a readable image.
    """
    try:
        return _decode(data, upright)
    except UnidentifiedImageError:
        raise ValueError("no format that Pillow knows") from None
    except Exception as error:  # decoders raise anything on bytes that are not an image
        raise ValueError(one_line(error)) from None


def _decode(data: bytes, upright: bool) -> npt.NDArray[np.uint8]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what is too large is refused below
        opened = Image.open(io.BytesIO(data))
    with opened:
        image: Image.Image = opened
        if image.width * image.height > _MAX_PIXELS:  # known from the header, before anything is decoded
            raise ValueError(f"{image.width}x{image.height} pixels, more than {_MAX_PIXELS:,}; make it smaller")
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would cut off what is above 255
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {image.mode} have no known range: save it with 8 or 16 bits a channel")
        if image.mode == "P":
            image = image.convert("RGBA")  # straight to RGB, Pillow warns of a palette with transparency
        image = image.convert("RGB")
        if image.size != (IMAGE_SIZE, IMAGE_SIZE):
            image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
        return np.asarray(image)
