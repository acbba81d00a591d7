"""A function from outside the package that changes each training image before the policy's operations.

Contract: the function runs in processes of its own, which import no more than it does. For every image it gets a
`numpy.random.Generator` that is seeded by (seed, epoch, index of the image), and the global generators of Python, numpy
and torch are seeded from that: whatever it draws from, neither the number of processes nor of ranks changes the result.
The processes end with the one that has started them.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dist_cifar import plugins
from dist_cifar.errors import ConfigError, UserError

_LENGTH = struct.Struct("<q")


class OwnTransform:
    """Calls the function `name` with `options` in `workers` processes, which start with the first call."""

    def __init__(self, name: str, options: Mapping[str, Any], *, seed: int, workers: int) -> None:
        self._setting = (name, dict(options), seed)
        self._workers = workers
        self._processes: list[subprocess.Popen[bytes]] = []

    def __call__(
        self, images: npt.NDArray[np.uint8], epoch: int, indices: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.uint8]:
        """The images [n, 32, 32, 3] whose places in the data set are `indices`, transformed.

        Raises `ConfigError` if the function fails or returns something else than such an image.
        """
        if not self._processes:
            self._start()
        parts = np.array_split(np.arange(len(images)), self._workers)
        for process, part in zip(self._processes, parts, strict=True):
            _send(process.stdin, (images[part], epoch, indices[part]))
        found = [_receive(process.stdout) for process in self._processes]
        for answer in found:
            if isinstance(answer, str):
                raise ConfigError(answer)
        return np.concatenate(found)

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        self._processes = []

    def _start(self) -> None:
        command = [sys.executable, "-m", "dist_cifar.augment.transform"]
        for _ in range(self._workers):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(), start_new_session=True
            )
            self._processes.append(process)
            _send(process.stdin, (self._setting, plugins.pickled_registrations("augmentation")))


def transformed(
    function: Any,
    name: str,
    options: Mapping[str, Any],
    images: npt.NDArray[np.uint8],
    *,
    seed: int,
    epoch: int,
    indices: npt.NDArray[np.int64],
) -> npt.NDArray[np.uint8]:
    """What `function` makes of each of `images`, uint8 [n, 32, 32, 3]. Raises `ConfigError`."""
    out = np.empty_like(images)
    for row, image, index in zip(out, images, indices, strict=True):
        generator = np.random.default_rng([seed, epoch, int(index)])
        _seed_globals(int(generator.integers(2**32)))
        try:
            result = np.asarray(function(image.copy(), generator, **options))
        except Exception as error:
            raise plugins.broken(f"augment.transform={name}", error, "the transform of an image") from None
        if result.dtype != np.uint8 or result.shape != image.shape:
            raise ConfigError(
                f"augment.transform={name}: returns {result.dtype} {list(result.shape)}; it must be uint8"
                f" {list(image.shape)}"
            )
        row[:] = result
    return out


def _seed_globals(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)


# --- the process -------------------------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    # The function of a worker is called for one image after the other: threads would only be in the way of the ranks.
    return os.environ | {"OMP_NUM_THREADS": "1"}


def _send(stream: IO[bytes] | None, value: Any) -> None:
    assert stream is not None
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    try:
        stream.write(_LENGTH.pack(len(data)) + data)
        stream.flush()
    except BrokenPipeError:
        raise ConfigError("augment.transform: its process has ended; its error is above") from None


def _receive(stream: IO[bytes] | None) -> Any:
    assert stream is not None
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise ConfigError("augment.transform: its process has ended; its error is above")
    return pickle.loads(stream.read(_LENGTH.unpack(header)[0]))


def _serve() -> None:
    """Answers each batch on standard input, until that ends. What the function prints goes to standard error."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # the rank decides when it ends
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    batches: Any = sys.stdin.buffer
    (name, options, seed), registrations = _receive(batches)
    plugins.restore(pickle.loads(registrations) if registrations else [])
    try:
        function: Any = plugins.find("augmentation", "augment.transform", name)
        failure = None
    except UserError as error:
        function, failure = None, str(error)
    while True:
        if not batches.peek(1):
            return
        images, epoch, indices = _receive(batches)
        answer: Any = failure
        if failure is None:
            try:
                answer = transformed(function, name, options, images, seed=seed, epoch=epoch, indices=indices)
            except UserError as error:
                answer = str(error)
        _send(answers, answer)


if __name__ == "__main__":
    _serve()
