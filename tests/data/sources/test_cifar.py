"""The official archives, end to end: a small archive with a specification of its own, served on loopback."""

import dataclasses
import hashlib
import io
import multiprocessing
import os
import pickle
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from dist_cifar.data.sources import cifar
from dist_cifar.data.sources.cifar import CIFAR10, CIFAR100, ArchiveSpec, read_archive
from dist_cifar.errors import ConfigError, DataError
from tests import PATIENCE_SECONDS

CLASSES = ["cat", "dog", "frog"]
PER_BATCH = 7


def md5(data):
    return hashlib.md5(data).hexdigest()


def make_batches(rng_seed=0):
    """The arrays of each file, as the archive holds them: planes first, rows flattened."""
    generator = np.random.default_rng(rng_seed)
    return {
        name: (
            generator.integers(0, 256, (PER_BATCH, 3072), dtype=np.uint8),
            generator.integers(0, 3, PER_BATCH).tolist(),
        )
        for name in ("data_batch_1", "data_batch_2", "test_batch")
    }


def make_files(batches=None):
    files = {
        name: pickle.dumps({"data": data, "labels": labels}, protocol=2)
        for name, (data, labels) in (batches or make_batches()).items()
    }
    return files | {"batches.meta": pickle.dumps({"label_names": CLASSES}, protocol=2)}


def make_tar(files, extra=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"small-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in extra:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


def make_spec(tar, files, **changes):
    spec = ArchiveSpec(
        name="small",
        url="http://127.0.0.1:9/none",
        filename="small.tar.gz",
        size_bytes=len(tar),
        md5=md5(tar),
        sha256=hashlib.sha256(tar).hexdigest(),
        folder="small-py",
        train_md5={name: md5(files.get(name, b"")) for name in ("data_batch_1", "data_batch_2")},
        test_md5={"test_batch": md5(files.get("test_batch", b""))},
        meta_md5={"batches.meta": md5(files.get("batches.meta", b""))},
        label_key="labels",
        classes_key="label_names",
    )
    return dataclasses.replace(spec, **changes)


@pytest.fixture
def serve():
    """Serves bytes on loopback; returns the address and the list of requests."""
    servers = []

    def start(body, *, promised=None, status=200):
        requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if promised is None else promised))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/small.tar.gz", requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def put(tmp_path, files=None, extra=(), **changes):
    """An archive in `tmp_path`, and its specification."""
    files = make_files() if files is None else files
    tar = make_tar(files, extra)
    (tmp_path / "small.tar.gz").write_bytes(tar)
    return make_spec(tar, files, **changes)


def assert_is_the_data(arrays):
    batches = make_batches()
    train = np.concatenate([batches["data_batch_1"][0], batches["data_batch_2"][0]])
    assert arrays.train_images.shape == (2 * PER_BATCH, 32, 32, 3)
    assert arrays.train_images.dtype == np.uint8
    assert arrays.train_images.flags.c_contiguous
    for channel in range(3):
        planes = train[:, channel * 1024 : (channel + 1) * 1024].reshape(-1, 32, 32)
        assert np.array_equal(arrays.train_images[..., channel], planes)
    assert arrays.train_labels.tolist() == batches["data_batch_1"][1] + batches["data_batch_2"][1]
    assert arrays.train_labels.dtype == np.int64
    assert np.array_equal(arrays.test_images[..., 1].reshape(-1, 1024), batches["test_batch"][0][:, 1024:2048])
    assert arrays.test_labels.tolist() == batches["test_batch"][1]
    assert arrays.classes == ("cat", "dog", "frog")


# --- found --------------------------------------------------------------------------------------------------------


def test_the_archive_is_found_in_root_or_is_root(tmp_path):
    spec = put(tmp_path)
    assert_is_the_data(read_archive(spec, tmp_path, None))
    assert_is_the_data(read_archive(spec, tmp_path / "small.tar.gz", None))


def test_nothing_is_unpacked_to_disk(tmp_path):
    read_archive(put(tmp_path), tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["small.tar.gz"]


def test_a_wrong_archive_of_the_user_stays(tmp_path):
    spec = put(tmp_path)
    path = tmp_path / "small.tar.gz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"small.tar.gz: has {spec.size_bytes - 1} bytes, small has {spec.size_bytes}"):
        read_archive(spec, tmp_path, None)
    assert path.exists()


@pytest.mark.parametrize("name", ["md5", "sha256"])
def test_each_hash_is_checked(tmp_path, name):
    spec = put(tmp_path, **{name: "0" * 32})
    with pytest.raises(DataError, match=f"has the {name} .*small has 0000.*move it away"):
        read_archive(spec, tmp_path, None)


def test_an_unpacked_folder_is_read_and_verified(tmp_path):
    files = make_files()
    spec = make_spec(make_tar(files), files)
    folder = tmp_path / "small-py"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert_is_the_data(read_archive(spec, tmp_path, None))

    (folder / "test_batch").write_bytes(files["data_batch_1"])
    with pytest.raises(DataError, match="test_batch: has the md5"):
        read_archive(spec, tmp_path, None)
    (folder / "test_batch").unlink()
    with pytest.raises(DataError, match="test_batch: cannot be read"):
        read_archive(spec, tmp_path, None)


def test_python_2_pickles_are_read(tmp_path):
    """The official files are protocol 2 of Python 2: str keys and an array whose buffer is a str."""
    files = make_files()
    data = make_batches()["test_batch"][0]
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x07M\x00\x0ct"
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + data.size.to_bytes(4, "little") + data.tobytes() + b"tb"
    )
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in make_batches()["test_batch"][1]) + b"e"
    files["test_batch"] = b"\x80\x02}(U\x04data" + array + b"U\x06labels" + labels + b"u."
    assert_is_the_data(read_archive(put(tmp_path, files), tmp_path, None))


def test_the_specifications_are_whole():
    for spec in (CIFAR10, CIFAR100):
        assert spec.url.startswith("https://") and spec.url.endswith(f"/{spec.filename}")
        assert (len(spec.md5), len(spec.sha256)) == (32, 64)
        assert {len(digest) for digest in spec.file_md5.values()} == {32}
    assert (len(CIFAR10.file_md5), len(CIFAR100.file_md5)) == (7, 3)


# --- hostile or damaged -------------------------------------------------------------------------------------------


def member(name, kind=tarfile.REGTYPE, link="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


@pytest.mark.parametrize(
    "extra",
    [
        member("small-py/../../escaped", size=1),
        member("/tmp/escaped", size=1),
        member("small-py/link", tarfile.SYMTYPE, "/etc/passwd"),
        member("small-py/link", tarfile.LNKTYPE, "small-py/test_batch"),
        member("small-py/device", tarfile.CHRTYPE),
    ],
    ids=["parent", "absolute", "symlink", "hard link", "device"],
)
def test_members_that_point_outside_are_refused(tmp_path, extra):
    """By the hash; and even an archive whose hash were that of its specification would lead nowhere."""
    folder = tmp_path / "data"
    folder.mkdir()
    files = make_files()
    forged = put(folder, files, extra=[extra])
    with pytest.raises(DataError, match=r"small.tar.gz: has .*, small has .*; move it away"):
        read_archive(make_spec(make_tar(files), files), folder, None)
    before = set(tmp_path.rglob("*")) | set(Path("/tmp").glob("escaped"))
    assert_is_the_data(read_archive(forged, folder, None))
    assert set(tmp_path.rglob("*")) | set(Path("/tmp").glob("escaped")) == before


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hostile_archive(tmp_path, name, data):
    """An archive in which one file has another content."""
    path = tmp_path / "hostile.tar.gz"
    path.write_bytes(make_tar(make_files() | {name: data}))
    return path


@pytest.mark.parametrize("name", ["test_batch", "batches.meta"])
def test_a_hostile_pickle_does_not_run(tmp_path, name):
    """The hash refuses it; one with the hash of its specification is refused by the unpickler."""
    proof = tmp_path / "it ran"
    evil = pickle.dumps({"data": Hostile(proof), "labels": []}, protocol=2)
    with pytest.raises(DataError, match=r"has (the md5|\d+ bytes)"):
        read_archive(make_spec(make_tar(make_files()), make_files()), hostile_archive(tmp_path, name, evil), None)
    with pytest.raises(pickle.UnpicklingError, match=r"it asks for posix\.mkdir"):
        read_archive(put(tmp_path, make_files() | {name: evil}), tmp_path, None)
    assert not proof.exists()
    pickle.loads(evil)  # the proof that it would have
    assert proof.exists()


@pytest.mark.parametrize(
    ("module", "name"), [("builtins", "eval"), ("__builtin__", "getattr"), ("numpy", "load"), ("numpy", "fromfile")]
)
def test_only_array_names_are_allowed(tmp_path, module, name):
    evil = f"c{module}\n{name}\n.".encode()
    with pytest.raises(pickle.UnpicklingError, match=f"asks for {module}.{name}"):
        read_archive(put(tmp_path, make_files() | {"test_batch": evil}), tmp_path, None)


def test_other_codecs_are_refused(tmp_path):
    evil = b"c_codecs\nencode\n(S'a'\nS'rot13'\ntR."
    with pytest.raises(pickle.UnpicklingError, match="encoding 'rot13'"):
        read_archive(put(tmp_path, make_files() | {"test_batch": evil}), tmp_path, None)


def bad_batch(**changes):
    data, labels = make_batches()["test_batch"]
    return pickle.dumps({"data": data, "labels": labels} | changes, protocol=2)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("test_batch", b"no pickle"),
        ("test_batch", b""),
        ("test_batch", pickle.dumps([1], 2)),
        ("test_batch", bad_batch(data=np.zeros((PER_BATCH, 3072), np.float32))),
        ("test_batch", bad_batch(data=np.zeros((PER_BATCH, 3071), np.uint8))),
        ("test_batch", bad_batch(data=np.zeros((PER_BATCH - 1, 3072), np.uint8))),
        ("test_batch", bad_batch(data=np.zeros((8, 3072), np.uint8), labels=[0] * 8)),
        ("test_batch", bad_batch(labels=[3] * PER_BATCH)),
        ("test_batch", bad_batch(labels=[-1] * PER_BATCH)),
        ("test_batch", bad_batch(labels=[True] * PER_BATCH)),
        ("batches.meta", pickle.dumps({"label_names": ["cat"]}, 2)),
        ("batches.meta", pickle.dumps({"label_names": [1, 2, 3]}, 2)),
    ],
)
def test_another_content_is_refused_before_it_is_unpickled(tmp_path, monkeypatch, name, data):
    """In the archive and in its unpacked folder."""
    monkeypatch.setattr(cifar, "_Unpickler", lambda *args, **kwargs: pytest.fail("unpickled before it was verified"))
    files = make_files()
    spec = make_spec(make_tar(files), files)
    with pytest.raises(DataError, match=r"has (\d+ bytes|the md5 .*), small has .*; move it away"):
        read_archive(spec, hostile_archive(tmp_path, name, data), None)
    folder = tmp_path / "small-py"
    folder.mkdir()
    for known, content in (files | {name: data}).items():
        (folder / known).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: has the md5 .*, small has .*; move {folder} away"):
        read_archive(spec, tmp_path, None)


def test_a_missing_member_is_refused(tmp_path):
    files = make_files()
    spec = make_spec(make_tar(files), files)
    del files["data_batch_2"]
    (tmp_path / "small.tar.gz").write_bytes(make_tar(files))
    with pytest.raises(DataError, match="bytes, small has"):
        read_archive(spec, tmp_path, None)


def test_what_is_no_tar_is_refused(tmp_path):
    (tmp_path / "small.tar.gz").write_bytes(b"a page of the hotel's network")
    files = make_files()
    with pytest.raises(DataError, match="has 29 bytes, small has"):
        read_archive(make_spec(make_tar(files), files), tmp_path, None)


# --- downloaded ---------------------------------------------------------------------------------------------------


def left_in(folder):
    return {path.name for path in folder.iterdir()} - {"small.tar.gz.lock"}


def test_a_download_is_verified_and_kept(tmp_path, serve, said):
    files = make_files()
    tar = make_tar(files)
    url, requests = serve(tar)
    root = tmp_path / "new" / "data"
    for _ in range(2):
        assert_is_the_data(read_archive(make_spec(tar, files), root, url))
    assert len(requests) == 1
    assert left_in(root) == {"small.tar.gz"}
    assert (root / "small.tar.gz").read_bytes() == tar
    assert url in said[0] and str(root / "small.tar.gz") in said[0]


def test_without_a_mirror_the_official_address_is_asked(tmp_path, serve):
    files = make_files()
    tar = make_tar(files)
    url, _ = serve(tar)
    assert_is_the_data(read_archive(make_spec(tar, files, url=url), tmp_path, None))


def test_a_file_address_is_a_mirror(tmp_path):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    spec = put(mirror)
    url = (mirror / "small.tar.gz").as_uri()
    assert_is_the_data(read_archive(spec, tmp_path / "data", url))


@pytest.mark.parametrize(
    ("body", "promised", "message"),
    [
        (lambda tar: tar[:-9], None, "has .* bytes, small has"),
        (lambda tar: tar[:-9], 10**6, "bytes, small has|cannot be downloaded"),
        (lambda tar: tar + b"more", None, "has .* bytes, small has"),
        (lambda tar: tar[:-1] + b"?", None, "has the md5"),
    ],
    ids=["short", "cut off", "long", "altered"],
)
def test_a_wrong_download_is_removed_and_never_opened(tmp_path, serve, monkeypatch, body, promised, message):
    files = make_files()
    tar = make_tar(files)
    url, _ = serve(body(tar), promised=promised)
    monkeypatch.setattr(tarfile, "open", lambda *args, **kwargs: pytest.fail("opened before it was verified"))
    with pytest.raises(DataError, match=message):
        read_archive(make_spec(tar, files), tmp_path, url)
    assert left_in(tmp_path) == set()


def test_a_forged_md5_does_not_pass(tmp_path, serve):
    files = make_files()
    tar = make_tar(files)
    url, _ = serve(tar)
    with pytest.raises(DataError, match="has the sha256"):
        read_archive(make_spec(tar, files, sha256="0" * 64), tmp_path, url)
    assert left_in(tmp_path) == set()


def test_an_endless_download_is_cut_off(tmp_path, monkeypatch):
    files = make_files()
    spec = make_spec(make_tar(files), files)
    served = []

    def endless(*args):
        while True:
            served.append(1)
            yield b"\0" * spec.size_bytes

    monkeypatch.setattr(cifar, "_receive", endless)
    with pytest.raises(DataError, match="bytes, small has"):
        read_archive(spec, tmp_path, None)
    assert len(served) == 2


def test_without_network_the_error_says_what_to_do(tmp_path, serve):
    files = make_files()
    spec = make_spec(make_tar(files), files)  # nobody listens on its port
    with pytest.raises(DataError) as caught:
        read_archive(spec, tmp_path, None)
    message = str(caught.value)
    for part in (spec.url, str(tmp_path / "small.tar.gz"), "data.source=folder", "data.source=synthetic"):
        assert part in message
    assert "\n" not in message
    assert left_in(tmp_path) == set()

    url, _ = serve(b"", status=404)
    with pytest.raises(DataError, match=r"cannot be downloaded .HTTP Error 404"):
        read_archive(spec, tmp_path, url)


@pytest.mark.parametrize("url", ["ftp://host/x", "small.tar.gz", "data:,x", "http://[", "https://me:secret@host/x"])
def test_other_addresses_are_refused_without_showing_them(tmp_path, url):
    files = make_files()
    with pytest.raises(ConfigError, match=r"data\.url") as caught:
        read_archive(make_spec(make_tar(files), files), tmp_path, url)
    assert "secret" not in str(caught.value)


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    files = make_files()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"set data\.root to"):
        read_archive(make_spec(make_tar(files), files), tmp_path / "file" / "data", None)


def download_together(spec, root, url, barrier, results):
    barrier.wait(PATIENCE_SECONDS)
    results.put(read_archive(spec, root, url).train_labels.tolist())


def test_processes_that_start_at_once_download_once(tmp_path, serve):
    files = make_files()
    tar = make_tar(files)
    url, requests = serve(tar)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    arguments = (make_spec(tar, files), tmp_path, url, barrier, results)
    processes = [context.Process(target=download_together, args=arguments, daemon=True) for _ in range(4)]
    for process in processes:
        process.start()
    labels = [results.get(timeout=PATIENCE_SECONDS) for _ in processes]
    for process in processes:
        process.join()
    assert len(requests) == 1
    assert all(found == labels[0] for found in labels)
