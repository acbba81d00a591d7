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

from dist_cifar.config import DataConfig
from dist_cifar.data import decode, image_tree
from dist_cifar.data.dataset import load_dataset
from dist_cifar.data.sources.image_folder import ImageFolder, content_key, find_layout, read_folder, signature
from dist_cifar.errors import DataError, UserError

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
    assert "train/fox/ has no counterpart in test/" in error(good | {"train/fox/1.png": picture()})
    assert "test/fox/ has no counterpart in train/" in error(good | {"test/fox/1.png": picture()})
    assert "lies below a class folder" in error(good | {"train/cat/more/1.png": picture()})
    unknown = error(good | {"test/cat/1.png": b"notes"})
    assert "test/cat/1.png is not a readable image (no format that Pillow knows)" in unknown
    cut = good["train/dog/b.jpg"]
    assert "train/dog/b.jpg is not a readable image" in error(good | {"train/dog/b.jpg": cut[: len(cut) // 2]})


def test_an_empty_class_is_named(tmp_path):
    root = write_folder(tmp_path / "set", small_set())
    (root / "train" / "fox").mkdir()
    (root / "train" / "fox" / "Thumbs.db").write_bytes(b"windows")
    (root / "test" / "fox").mkdir()
    with pytest.raises(DataError, match="2 faults: train/fox/ is empty; test/fox/ is empty"):
        read_folder(root)
    path = write_zip(tmp_path / "set.zip", small_set() | {"train/fox/": b"", "test/fox/1.png": picture()})
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
    for module in (decode, image_tree):
        monkeypatch.setattr(module, "MAX_FILE_BYTES", 10_000)
    with pytest.raises(DataError, match=r"train/cat/0.png is not a readable image .*more than 10,000"):
        read_folder(write(kind, tmp_path, small_set() | {"train/cat/0.png": bytes(10_001)}))


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    root = write_folder(tmp_path, small_set())
    os.mkfifo(root / "train" / "cat" / "0.png")
    (root / "train" / "cat" / "1.png").symlink_to("nowhere")
    (root / "train" / "cat" / "2.txt").write_text("notes")
    (root / "test" / "cat" / "loop").symlink_to("loop")
    (root / "train" / "fox").symlink_to("gone")
    (root / "test" / "dog" / "empty.png").touch()
    for read in (read_folder, content_key):  # the key is asked for first, and has the whole list too
        with pytest.raises(DataError) as caught:
            read(root)
        for fault in (
            ": 6 faults: ",
            "train/fox is a link to nothing: gone",
            "train/cat/0.png is not a readable image (no regular file)",
            "train/cat/1.png is not a readable image (a link to nothing: nowhere)",
            "train/cat/2.txt is not a readable image (no format that Pillow knows)",
            "test/cat/loop is not a readable image (",
            "test/dog/empty.png is not a readable image (it is empty)",
        ):
            assert fault in str(caught.value)
    assert signature(root) == signature(root)
    with pytest.raises(DataError, match="neither a folder nor a zip"):
        signature(root / "train" / "cat" / "0.png")


def test_a_link_that_leads_back_up_ends(tmp_path):
    root = write_folder(tmp_path, small_set())
    (root / "train" / "loop").symlink_to(root)
    with pytest.raises(DataError, match="lies below a class folder"):
        read_folder(root)


def test_layout_is_pure_and_ignores_order_and_repetition():
    names = ["test/a/1", "train/a/2", "train/a/10", "train/", "train/a/", "train/a/2"]
    expected = {"train": {"a": ["train/a/10", "train/a/2"]}, "test": {"a": ["test/a/1"]}}
    found = find_layout(Path("r"), names)
    assert found == find_layout(Path("r"), names[::-1])
    assert (found.splits, found.prefix, found.faults) == (expected, "", [])


# --- keys ---------------------------------------------------------------------------------------------------------


@both
def test_the_key_is_of_the_content(tmp_path, kind):
    files = small_set()
    root = write(kind, tmp_path, files)
    before = content_key(root), signature(root)

    assert (content_key(root), signature(root)) == before
    assert content_key(root.rename(tmp_path / "moved")) == before[0]

    touched = tmp_path / "moved" if kind == "zip" else tmp_path / "moved/train/cat/10.png"
    os.utime(touched, ns=(1, 1))
    assert content_key(tmp_path / "moved") == before[0]
    assert signature(tmp_path / "moved") != before[1]


@both
@pytest.mark.parametrize("how", ["written over", "replaced"])
def test_the_signature_sees_other_bytes_of_the_same_size_and_time(tmp_path, kind, how):
    root = write(kind, tmp_path, small_set())
    file = root if kind == "zip" else root / "train/cat/2.bmp"
    os.utime(file, ns=(1, 1))
    before = signature(root)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if how == "replaced":
        (tmp_path / "new").write_bytes(data)
        os.utime(tmp_path / "new", ns=(1, 1))
        os.replace(tmp_path / "new", file)
    else:
        file.write_bytes(data)
        os.utime(file, ns=(1, 1))
    assert signature(root) != before


def test_a_folder_that_changes_while_it_is_decoded_is_refused(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "set", small_set())
    decoded = decode.decode_image

    def change(data):
        (root / "train/cat/2.bmp").touch()
        return decoded(data)

    monkeypatch.setattr(decode, "decode_image", change)
    with pytest.raises(DataError, match="changed while it was read"):
        ImageFolder().read(DataConfig(source="folder", root=str(root)))


@pytest.mark.parametrize("place", ["cache", ".", "set of 2026/cache", "set of 2026/train/.cache"])
def test_a_cache_in_the_data_folder_is_no_data(tmp_path, place):
    root = write_folder(tmp_path, {f"set of 2026/{name}": data for name, data in small_set().items()})
    cache_dir = root / place
    config = DataConfig(source="folder", root=str(root), cache_dir=str(cache_dir))
    before = load_dataset(config).content_sha256
    found = sorted(cache_dir.iterdir())
    assert [load_dataset(config).content_sha256 for _ in range(2)] == [before] * 2
    assert sorted(cache_dir.iterdir()) == found


@pytest.mark.parametrize("place", ["train", "test/cat", "train/cache"])
def test_a_cache_among_the_images_is_refused(tmp_path, place):
    root = write_folder(tmp_path, small_set())
    with pytest.raises(DataError, match=r"data\.cache_dir=.*: lies among the images"):
        load_dataset(DataConfig(source="folder", root=str(root), cache_dir=str(root / place)))


def test_the_key_of_a_folder_sees_bytes_and_names(tmp_path):
    root = write_folder(tmp_path, small_set())
    keys = {content_key(root)}
    path = root / "train/cat/10.png"
    path.write_bytes(picture())
    keys.add(content_key(root))
    path.rename(root / "train/cat/11.png")
    keys.add(content_key(root))
    (root / "train/cat").rename(root / "train/fox")
    (root / "test/cat").rename(root / "test/fox")
    keys.add(content_key(root))
    assert len(keys) == 4
    for name in (".hidden", "README", "train/desktop.ini", "train/fox/Thumbs.db", "train/notes.txt"):
        (root / name).write_text("of no account")
    assert content_key(root) in keys


@both
def test_the_signature_reads_no_content(tmp_path, kind, monkeypatch):
    root = write(kind, tmp_path, small_set())
    monkeypatch.setattr("builtins.open", lambda *args: pytest.fail("read"))
    signature(root)


# --- names --------------------------------------------------------------------------------------------------------


def test_the_two_forms_of_an_accent_are_one_class_in_one_order(tmp_path):
    nfc, nfd = "caf\u00e9", "cafe\u0301"
    shades = {name: picture() for name in "abcd"}

    def pixels(root, first, second):
        files = {
            f"train/{first}/1.png": shades["a"],
            f"train/{second}/2.png": shades["b"],
            f"train/cafz/{first}.png": shades["c"],
            f"test/{second}/1.png": shades["d"],
            "test/cafz/1.png": shades["d"],
        }
        return read_folder(write_folder(root, files))

    found = [pixels(tmp_path / str(i), *forms) for i, forms in enumerate(((nfc, nfc), (nfd, nfc), (nfc, nfd)))]
    for arrays in found:
        assert arrays.classes == ("cafz", nfc)
        assert arrays.train_labels.tolist() == [0, 1, 1]
        assert np.array_equal(arrays.train_images, found[0].train_images)


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\x1b[31mred", b"a\nb", b"\x7f", "a\u2028b".encode()])
def test_a_class_whose_name_cannot_be_stored_or_shown_is_refused(tmp_path, name):
    root = write_folder(tmp_path, small_set())
    for split in ("train", "test"):
        os.rename(root / split / "cat", os.path.join(os.fsencode(root / split), name))
    with pytest.raises(DataError, match=r"2 faults: .* cannot be a class: its name "):
        content_key(root)


def test_markup_and_odd_names_of_files_are_read(tmp_path):
    root = write_folder(tmp_path, {f"{split}/<b>&amp;/1.png": picture() for split in ("train", "test")})
    os.rename(root / "train/<b>&amp;/1.png", os.fsencode(root / "train/<b>&amp;") + b"/\xff\x1b.png")
    assert read_folder(root).classes == ("<b>&amp;",)
    load_dataset(DataConfig(source="folder", root=str(root), cache_dir=str(tmp_path / "c")))


# --- zips of other systems, and hostile ones ----------------------------------------------------------------------


def patched(path, at, value, size=2, record=b"PK\1\2"):
    """Changes the field `at` of every entry in the directory of a zip, or in the header of every member."""
    data = bytearray(path.read_bytes())
    start = data.find(record)
    while start >= 0:
        data[start + at : start + at + size] = value.to_bytes(size, "little")
        start = data.find(record, start + 1)
    path.write_bytes(data)
    return path


def test_a_zip_of_windows_is_read(tmp_path):
    files = small_set()
    plain = read_folder(write_zip(tmp_path / "plain.zip", files))
    with zipfile.ZipFile(tmp_path / "windows.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name.replace("/", "\\")), data)
    found = read_folder(tmp_path / "windows.zip")
    assert found.classes == plain.classes and np.array_equal(found.train_images, plain.train_images)


def test_a_zip_of_macos_has_the_names_that_were_written(tmp_path):
    names = [f"{split}/cafe\u0301/1.png" for split in ("train", "test")]
    path = write_zip(tmp_path / "x.zip", {name: picture() for name in names})
    patched(patched(path, 8, 0), 6, 0, record=b"PK\3\4")  # without the flag of UTF-8
    assert read_folder(path).classes == ("caf\u00e9",)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (6, 99, "zip file version 9.9"),
        (8, 1, "is encrypted; make a zip without a password"),
        (10, 9, "5 faults: .*compression"),
        (24, 0xFFFFFFF0, "unpacks to .* as a decompression bomb does"),
        (30, 0xFFF0, "neither a folder nor a zip"),
    ],
    ids=["version", "encrypted", "method", "bomb", "directory"],
)
def test_a_zip_that_cannot_be_read_is_one_line(tmp_path, at, value, message):
    names = ["train/a/1", "train/a/2", "train/a/3", "train/a/4", "test/a/1"]
    path = write_zip(tmp_path / "x.zip", {name: picture() for name in names})
    with pytest.raises(DataError, match=message) as caught:
        read_folder(patched(path, at, value, size=4 if at == 24 else 2))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_zip_without_end_or_with_a_name_that_is_no_utf8(tmp_path):
    path = write_zip(tmp_path / "x.zip", small_set() | {"train/caf\u00e9/1.png": picture()})
    data = path.read_bytes()
    path.write_bytes(data.replace("caf\u00e9".encode(), b"caf\xff\xff"))
    with pytest.raises(DataError, match=r"x\.zip: neither a folder nor a zip that can be read"):
        read_folder(path)
    path.write_bytes(data[:-30])
    with pytest.raises(DataError, match=r"x\.zip: neither a folder nor a zip that can be read"):
        read_folder(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_are_twice_in_a_zip_and_links_are_faults(tmp_path):
    path = write_zip(tmp_path / "x.zip", small_set())
    link = zipfile.ZipInfo("train/cat/link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train/cat/10.png", picture())
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match=r"2 faults: train/cat/10\.png is in it twice; .*link\.png .*\(a link\)"):
        read_folder(path)


def test_a_member_unpacks_to_no_more_than_it_declares(tmp_path):
    """A reader that unpacks a whole chunk of such a method at once would need gigabytes."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        for split in ("train", "test"):
            archive.writestr(f"{split}/a/1.png", bytes(20_000_000))
    with pytest.raises(DataError, match="2 faults"):
        read_folder(patched(path, 24, 100, size=4))


def test_the_first_ten_faults_are_listed_and_the_others_counted(tmp_path):
    root = write_folder(tmp_path, small_set() | {f"train/cat/{i:02}.txt": b"text" for i in range(13)})
    with pytest.raises(DataError) as caught:
        read_folder(root)
    assert ": 13 faults: train/cat/00.txt" in str(caught.value) and "; and 3 more;" in str(caught.value)
    assert "09.txt" in str(caught.value) and "10.txt" not in str(caught.value)


def test_damaged_zips_and_images_raise_nothing_but_errors_of_the_user(tmp_path):
    """Bytes of the directory, of headers and of pictures, changed at random."""
    random = np.random.default_rng(1)
    plain = write_zip(tmp_path / "plain.zip", small_set()).read_bytes()
    directory = plain.find(b"PK\1\2")
    path, read = tmp_path / "x.zip", 0
    for _ in range(400):
        data = bytearray(plain)
        for _ in range(random.choice((1, 1, 2, 4))):
            data[random.integers(directory if random.random() < 0.7 else 0, len(data))] = random.integers(256)
        path.write_bytes(data)
        try:
            read_folder(path)
            read += 1
        except UserError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
    assert 0 < read < 400
    for data in small_set().values():
        for _ in range(60):
            damaged = bytearray(data)
            for _ in range(random.choice((1, 4, 16))):
                damaged[random.integers(min(200, len(data)))] = random.integers(256)
            try:
                assert decode.decode_image(bytes(damaged)).shape == (32, 32, 3)
            except ValueError as error:
                assert len(str(error)) < 400
