"""The one rule by which files become pixels."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from dist_cifar.data import decode
from dist_cifar.data.decode import decode_image, read_file

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_a_photo_is_turned_upright_once(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(Image.fromarray(PIXELS), exif=exif)))))
    found = decode_image(encoded(Image.fromarray(PIXELS), kind, exif=exif, **options))
    assert np.abs(found.astype(int) - expected).max() <= (60 if kind == "JPEG" else 0)
    if orientation < 2:
        assert np.array_equal(expected, PIXELS)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"", b"Exif\0\0MM\0*\0\0\0\x08"]
)
def test_a_damaged_orientation_is_none(exif):
    plain = encoded(Image.fromarray(PIXELS), "JPEG")
    assert np.array_equal(decode_image(encoded(Image.fromarray(PIXELS), "JPEG", exif=exif)), decode_image(plain))


def test_plain_images_keep_every_bit():
    assert np.array_equal(decode_image(encoded(Image.fromarray(PIXELS))), PIXELS)
    large = Image.fromarray(np.kron(PIXELS, np.ones((3, 2, 1), np.uint8)))
    resized = large.resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(decode_image(encoded(large)), np.asarray(resized))


GREY = np.arange(1024, dtype=np.uint8).reshape(32, 32)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.fromarray(GREY), "PNG"),
        (Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(0 * GREY)]), "PNG"),
        (Image.fromarray(GREY.astype(np.uint16) << 8 | 0xFF), "PNG"),
        (Image.fromarray(GREY.astype(np.uint16) << 8), "TIFF"),
        (Image.fromarray(np.dstack([GREY] * 3 + [0 * GREY])), "PNG"),
        (Image.fromarray(np.dstack([GREY] * 3)).convert("CMYK"), "TIFF"),
    ],
    ids=["L", "LA", "16 bits, PNG", "16 bits, TIFF", "RGBA", "CMYK"],
)
def test_every_kind_of_pixels_shows_the_same_grey(image, kind):
    """Transparency is dropped, of 16 bits the upper 8 are kept."""
    assert np.abs(decode_image(encoded(image, kind)).astype(int) - GREY[..., None]).max() == 0


def test_a_colour_profile_is_ignored():
    assert np.array_equal(decode_image(encoded(Image.fromarray(PIXELS), icc_profile=b"no profile")), PIXELS)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused(mode):
    with pytest.raises(ValueError, match="no known range"):
        decode_image(encoded(Image.new(mode, (32, 32)), "TIFF"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"GIF89a", "."),
        (b"<html>404</html>", "no format that Pillow knows"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "EPS is a program"),
    ],
)
def test_what_is_no_image_is_a_reason(data, message):
    with pytest.raises(ValueError, match=message):
        decode_image(data)


def test_warnings_of_pillow_are_not_shown():
    palette = Image.new("P", (32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_image(encoded(palette, transparency=bytes(range(256))))


def test_only_regular_files_of_a_size_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 10)
    (tmp_path / "small").write_bytes(bytes(10))
    (tmp_path / "large").write_bytes(bytes(11))
    (tmp_path / "dangling").symlink_to("nowhere")
    assert read_file(tmp_path / "small") == bytes(10)
    for name, message in (
        ("large", "11 bytes, more than 10"),
        ("dangling", "a link to nothing: nowhere"),
        ("missing", "No such file"),
        ("", "no regular file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_file(tmp_path / name)
