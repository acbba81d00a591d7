"""Folders and zips of pictures, against Pillow itself."""

import io
import os
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_cifar.data.sources import image_folder
from dist_cifar.data.sources.image_folder import content_key, find_layout, read_folder, signature
from dist_cifar.errors import DataError

generator = np.random.default_rng(0)


def picture(kind="PNG", mode="RGB", size=(32, 32), **options):
    buffer = io.BytesIO()
    pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def small_set():
    """Names in no order, of several formats, modes and sizes."""
    return {
        "train/dog/b.jpg": picture("JPEG", size=(40, 30)),
        "train/cat/10.png": picture(),
        "train/cat/2.bmp": picture("BMP"),
        "train/cat/Z.png": picture(mode="L"),
        "train/dog/a.gif": picture("GIF", mode="P"),
        "test/dog/x.png": picture(mode="RGBA", size=(5, 7)),
        "test/cat/y.webp": picture("WEBP", lossless=True),
        "test/cat/t.png": picture(mode="P", transparency=bytes(range(256))),
        "test/cat/w.tif": picture("TIFF", mode="CMYK", size=(64, 64)),
    }


def write_folder(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write(kind, tmp_path, files):
    return write_folder(tmp_path / "set", files) if kind == "folder" else write_zip(tmp_path / "set.zip", files)


both = pytest.mark.parametrize("kind", ["folder", "zip"])


def as_pillow_reads(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of palettes with transparency
        image = Image.open(io.BytesIO(data)).convert("RGB")
    if image.size != (32, 32):
        image = image.resize((32, 32), Image.Resampling.BILINEAR)
    return np.asarray(image)


@pytest.mark.filterwarnings("error:Palette images")  # Pillow's, of what `decode` converts in two steps
@both
def test_pixels_labels_and_order(tmp_path, kind):
    files = small_set()
    arrays = read_folder(write(kind, tmp_path, files))
    train = ["train/cat/10.png", "train/cat/2.bmp", "train/cat/Z.png", "train/dog/a.gif", "train/dog/b.jpg"]
    test = ["test/cat/t.png", "test/cat/w.tif", "test/cat/y.webp", "test/dog/x.png"]
    assert np.array_equal(arrays.train_images, [as_pillow_reads(files[name]) for name in train])
    assert np.array_equal(arrays.test_images, [as_pillow_reads(files[name]) for name in test])
    assert arrays.train_labels.tolist() == [0, 0, 0, 1, 1]
    assert arrays.test_labels.tolist() == [0, 0, 0, 1]
    assert arrays.train_labels.dtype == np.int64
    assert arrays.classes == ("cat", "dog")


@both
def test_one_top_folder_hidden_files_and_strays(tmp_path, kind):
    files = small_set()
    wrapped = {f"set of 2026/{name}": data for name, data in files.items()} | {
        "__MACOSX/set of 2026/train/cat/._10.png": b"resource fork",
        ".DS_Store": b"finder",
        "set of 2026/.DS_Store": b"finder",
        "set of 2026/train/.hidden/1.png": b"hidden",
        "set of 2026/train/cat/.10.png.swp": b"hidden",
        "set of 2026/train/cats.txt": b"cat",
        "set of 2026/LICENSE": b"free",
        "README": b"read me",
    }
    found = read_folder(write(kind, tmp_path, wrapped))
    plain = read_folder(write_folder(tmp_path / "plain", files))
    assert np.array_equal(found.train_images, plain.train_images)
    assert np.array_equal(found.test_images, plain.test_images)
    assert found.classes == plain.classes


@both
def test_decoding_is_announced(tmp_path, kind, said):
    read_folder(write(kind, tmp_path, small_set()))
    assert len(said) == 1 and "decoding 9 images of 2 classes" in said[0]


@both
def test_zip_and_folder_say_what_is_wrong(tmp_path, kind):
    def error(files):
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        target.mkdir()
        with pytest.raises(DataError) as caught:
            read_folder(write(kind, target, files))
        return str(caught.value)

    good = small_set()
    without_test = {name: data for name, data in good.items() if name.startswith("train")}
    assert "no test/<class>/ in it, found train" in error(without_test)
    assert "no pictures/train/<class>/ in it, found 1.png" in error({"pictures/1.png": picture()})
    assert "fox in train/ but not in test/" in error(good | {"train/fox/1.png": picture()})
    assert "fox in test/ but not in train/" in error(good | {"test/fox/1.png": picture()})
    assert "lies below a class folder" in error(good | {"train/cat/more/1.png": picture()})
    unknown = error(good | {"test/cat/1.png": b"notes"})
    assert "test/cat/1.png is not a readable image (no format that Pillow knows)" in unknown
    cut = good["train/dog/b.jpg"]
    assert "train/dog/b.jpg is not a readable image" in error(good | {"train/dog/b.jpg": cut[: len(cut) // 2]})


def test_an_empty_class_is_named(tmp_path):
    root = write_folder(tmp_path / "set", small_set())
    (root / "train" / "fox").mkdir()
    with pytest.raises(DataError, match="train/fox/ is empty"):
        read_folder(root)
    path = write_zip(tmp_path / "set.zip", small_set() | {"train/fox/": b""})
    with pytest.raises(DataError, match="train/fox/ is empty"):
        read_folder(path)


@pytest.mark.parametrize("name", ["../escaped.png", "train/../../x", "/etc/passwd", "..\\x", "C:\\x", "\\\\host\\x"])
def test_zip_members_that_point_outside_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="points outside"):
        read_folder(write_zip(tmp_path / "set.zip", small_set() | {name: picture()}))


def test_what_is_neither_folder_nor_zip(tmp_path):
    path = tmp_path / "set.zip"
    path.write_bytes(b"no zip")
    with pytest.raises(DataError, match="neither a folder nor a zip"):
        read_folder(path)
    with pytest.raises(DataError, match="no such file or folder"):
        signature(tmp_path / "missing")


def test_a_damaged_zip_member_is_named(tmp_path):
    files = small_set()
    path = write_zip(tmp_path / "set.zip", files)
    data = bytearray(path.read_bytes())
    data[data.index(files["train/cat/10.png"]) + 60] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train/cat/10.png is not a readable image .*CRC"):
        read_folder(path)


def png_of(width, height):
    """A PNG that promises so many black pixels and holds them in a few kilobytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_100, 10_000, 20_000], ids=["above ours", "Pillow warns", "Pillow refuses"])
def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path, monkeypatch, side):
    monkeypatch.setattr(Image.Image, "convert", lambda *args: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"cat/0\.png is not a readable image .*pixels"):
        read_folder(write_folder(tmp_path, {"train/cat/0.png": png_of(side, side), "test/cat/0.png": b""}))


@both
def test_files_that_unpack_to_too_much_are_not_read(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(image_folder, "_MAX_FILE_BYTES", 10_000)
    with pytest.raises(DataError, match=r"train/cat/0.png is not a readable image .*10000 bytes"):
        read_folder(write(kind, tmp_path, small_set() | {"train/cat/0.png": bytes(10_001)}))


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    root = write_folder(tmp_path, small_set())
    os.mkfifo(root / "train" / "cat" / "0.png")
    with pytest.raises(DataError, match=r"train/cat/0.png is not a readable image"):
        read_folder(root)
    with pytest.raises(DataError, match=r"train/cat/0\.png: neither a file nor a folder"):
        signature(root)
    (root / "train" / "cat" / "0.png").unlink()
    (root / "train" / "cat" / "0.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"train/cat/0.png is not a readable image"):
        read_folder(root)


def test_a_link_that_leads_back_up_ends(tmp_path):
    root = write_folder(tmp_path, small_set())
    (root / "train" / "loop").symlink_to(root)
    with pytest.raises(DataError, match="lies below a class folder"):
        read_folder(root)


def test_layout_is_pure_and_ignores_order_and_repetition():
    names = ["test/a/1", "train/a/2", "train/a/10", "train/", "train/a/", "train/a/2"]
    expected = {"train": {"a": ["train/a/10", "train/a/2"]}, "test": {"a": ["test/a/1"]}}
    assert find_layout(Path("r"), names) == find_layout(Path("r"), names[::-1]) == expected


# --- keys ---------------------------------------------------------------------------------------------------------


@both
def test_the_key_is_of_the_content(tmp_path, kind):
    files = small_set()
    root = write(kind, tmp_path, files)
    before = content_key(root), signature(root)

    moved = root.rename(tmp_path / "moved")
    assert (content_key(moved), signature(moved)) == before

    touched = moved if kind == "zip" else moved / "train/cat/10.png"
    os.utime(touched, ns=(1, 1))
    assert content_key(moved) == before[0]
    assert signature(moved) != before[1]


def test_the_key_of_a_folder_sees_bytes_and_names(tmp_path):
    root = write_folder(tmp_path, small_set())
    keys = {content_key(root)}
    path = root / "train/cat/10.png"
    path.write_bytes(picture())
    keys.add(content_key(root))
    path.rename(root / "train/cat/11.png")
    keys.add(content_key(root))
    (root / "train/fox").mkdir()
    keys.add(content_key(root))
    assert len(keys) == 4
    (root / ".hidden").write_text("of no account")
    assert content_key(root) in keys


@both
def test_the_signature_reads_no_content(tmp_path, kind, monkeypatch):
    root = write(kind, tmp_path, small_set())
    monkeypatch.setattr("builtins.open", lambda *args: pytest.fail("read"))
    signature(root)
