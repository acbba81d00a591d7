"""Checks of the data set and of the servers that a run needs."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from dist_cifar.config import Config
from dist_cifar.data.arrays import Arrays, content_sha256
from dist_cifar.data.dataset import load_dataset, missing_download
from dist_cifar.tools.doctor.findings import Finding, failed, ok, warning

_REACH_SECONDS = 3.0
"""How long a server has to accept a connection."""


def check_data(config: Config) -> Finding:
    """Checks whether the data set is here with every byte as it was decoded, or can be fetched."""
    url = missing_download(config.data)
    if url is not None:
        problem = unreachable(url)
        if problem:
            hint = f"fetch it where there is a network (dist-cifar data), or put it into data.root={config.data.root}"
            return failed("data", f"{config.data.source} is not here, and {url} is out of reach ({problem})", hint)
        return warning("data", f"{config.data.source} is not here; {url} answers", "fetch it first: dist-cifar data")
    dataset = load_dataset(config.data)
    arrays = Arrays(
        train_images=dataset.train.images,
        train_labels=dataset.train.labels,
        test_images=dataset.test.images,
        test_labels=dataset.test.labels,
        classes=dataset.classes,
    )
    if content_sha256(arrays) != dataset.content_sha256:
        text = f"{dataset.directory}: not the bytes that were decoded, by their SHA-256"
        return failed("data", text, "remove that folder: it is made again; then look at the disk that it is on")
    count = len(dataset.train.labels) + len(dataset.test.labels)
    return ok("data", f"{config.data.source}: {count:,} images, sha256 {dataset.content_sha256[:12]} verified")


def check_tracking(config: Config, environ: Mapping[str, str]) -> Finding:
    """Checks whether W&B can be reached, if the run would use it online."""
    from dist_cifar.tracking.wandb_tracker import is_wanted_online

    if not is_wanted_online(config, environ):
        return ok("W&B", "not used online: disabled, offline, or no key")
    url = environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    problem = unreachable(url)
    if problem:
        return warning("W&B", f"{url} is out of reach ({problem})", "the run continues offline; upload it later")
    return ok("W&B", f"{url} answers")


def unreachable(url: str) -> str | None:
    """The reason why no connection to the server of `url` can be made; None if it can."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        return None if Path(parts.path).exists() else "there is no such file"
    try:
        address = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection(address, timeout=_REACH_SECONDS):
            return None
    except OSError as error:
        return str(error)
