"""A trained model, used: taken from a run directory, asked about pictures, evaluated on other data, exported.

Contract: the model computes as the run's own evaluation did (weights, normalisation, precision), so `evaluate` on the
run's test split gives the number of its summary. An exported graph takes pixels as Pillow gives them and has been
compared with the model on `CHECKED_IMAGES` images before it is written.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dist_cifar.augment.cpu import normalize
from dist_cifar.augment.image import ImageStats
from dist_cifar.config import Config, config_from_values
from dist_cifar.data.decode import decode_image
from dist_cifar.data.sources.synthetic import synthetic_split
from dist_cifar.errors import CheckpointError, ConfigError, nearest_path, one_line
from dist_cifar.models.resnet import build_model
from dist_cifar.ops.precision import set_precision
from dist_cifar.run.atomic_io import make_dirs, write_atomic
from dist_cifar.run.checkpoint import MANIFEST, Checkpoint, CheckpointStore, read_checkpoint, weights_sha256
from dist_cifar.run.predictions import softmax, wilson_interval
from dist_cifar.run.run_dir import RunDir, is_run, latest_run, require_run

CHECKED_IMAGES = 256
_TOLERANCE = 1e-3
"""Of logits, relative to the largest: other kernels add up float32 in another order."""
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """The model of a checkpoint, ready to be asked."""

    module: nn.Module
    """float32 [n, 3, 32, 32], normalised, to logits float32 [n, classes]; in evaluation mode."""
    device: torch.device
    classes: tuple[str, ...]
    stats: ImageStats
    """Statistics of the training images."""
    config: Config
    """Of the run."""
    checkpoint: Path
    step: int
    sha256: str
    """`weights_sha256` of the weights."""

    def probabilities(self, images: npt.NDArray[np.uint8], *, tta: bool = False) -> npt.NDArray[np.float32]:
        """Of uint8 [n, 32, 32, 3]: float32 [n, classes]. `tta` averages each image with its mirror image."""
        module = HorizontalFlipTTA(self.module) if tta else self.module
        rows = []
        with torch.inference_mode():
            for start in range(0, len(images), _BATCH):
                batch = images[start : start + _BATCH]
                inputs = normalize(np.ascontiguousarray(batch), np.arange(len(batch)), self.stats)
                rows.append(softmax(module(inputs.to(self.device)).float().cpu().numpy()))
        return np.concatenate(rows)


class HorizontalFlipTTA(nn.Module):
    """Test-time augmentation: the mean of the probabilities of an image and of its mirror image, as logits."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised float32 [n, 3, 32, 32] to logits float32 [n, classes]."""
        both = self._module(images).softmax(1) + self._module(images.flip(3)).softmax(1)
        return (both / 2).log()


# --- loading -----------------------------------------------------------------------------------------------------


def load_classifier(path: Path | None, device: torch.device) -> Classifier:
    """The best model of the run directory `path` (the newest where none was chosen), or that of one of its checkpoints.

    Without `path`, of the run below `runs/` that was written to last. Raises `CheckpointError` or `ConfigError`.
    """
    path = latest_run(Path("runs")) if path is None else path
    checkpoint = _of_run(path) if is_run(path) else _named(path)
    state = checkpoint.state
    try:
        config = config_from_values(state["config"])
        classes, stats = tuple(state["classes"]), ImageStats(mean=tuple(state["mean"]), std=tuple(state["std"]))
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: it was written by another version of dist_cifar ({error}); use that one"
        ) from None
    model = build_model(config.model, num_classes=len(classes), seed=config.run.seed)
    model.load_state_dict(checkpoint.tensors["model"])
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    set_precision(model, config.compute.precision, device)
    return Classifier(
        module=model,
        device=device,
        classes=classes,
        stats=stats,
        config=config,
        checkpoint=checkpoint.path,
        step=checkpoint.step,
        sha256=weights_sha256(checkpoint.tensors["model"]),
    )


def _named(path: Path) -> Checkpoint:
    try:
        return read_checkpoint(_directory_of(path))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; restore it from a copy, or take another of this run") from None


def _directory_of(path: Path) -> Path:
    """Of the checkpoint `path`, which may be the file `best` or `latest` that names one. Raises `ConfigError`."""
    folder = path
    if path.name in ("best", "latest") and path.is_file():
        folder = path.parent / path.read_text().strip()
    if (folder / MANIFEST).exists():
        return folder
    near = path.parent if (path.parent / MANIFEST).exists() else None
    if path.parent.name == "checkpoints":
        near = nearest_path(path)
    if near is None:
        require_run(path)
    raise ConfigError(f"{path}: this is no checkpoint; did you mean {near}?")


def _of_run(path: Path) -> Checkpoint:
    store = CheckpointStore(
        RunDir(path).checkpoints,
        keep_last=1,
        keep_best=1,
        keep_every_steps=None,
        on_write_error="raise",
    )
    checkpoint = store.load_best() or store.load_newest()
    if checkpoint is None:
        raise CheckpointError(f"{path}: this run has not saved a checkpoint yet; wait for its first evaluation")
    return checkpoint


# --- predicting --------------------------------------------------------------------------------------------------


def load_images(
    sources: Sequence[str], stdin: Callable[[], bytes]
) -> Iterator[tuple[str, npt.NDArray[np.uint8] | str]]:
    """Each picture's name with its pixels, uint8 [32, 32, 3], or with what is wrong with it.

    A source is a file, a folder, of which every file counts but hidden ones, or `-`: the bytes of one picture from
    standard input. Photos are turned upright as their EXIF tag says.
    """
    for source in sources:
        path = Path(source)
        if source == "-":
            yield "-", _pixels(stdin)
        elif path.is_dir():
            files = [Path(top) / name for top, _, names in os.walk(path) for name in names]
            visible = sorted(f for f in files if not any(part[0] == "." for part in f.relative_to(path).parts))
            if not visible:
                yield source, "the folder holds no file; give pictures"
            for file in visible:
                yield str(file), _pixels(file.read_bytes)
        elif path.exists():
            yield source, _pixels(path.read_bytes)
        else:
            near = nearest_path(path)
            hint = f"did you mean {near}?" if near else "give a picture, a folder of them, or -"
            yield source, f"there is no such file; {hint}"


def _pixels(read: Callable[[], bytes]) -> npt.NDArray[np.uint8] | str:
    try:
        data = read()
        return decode_image(data, upright=True) if data else "it is empty; give a picture"
    except (OSError, ValueError) as error:
        return f"not a readable picture ({one_line(error)})"


def top_k(probabilities: npt.NDArray[np.float32], classes: Sequence[str], top: int) -> list[tuple[str, float]]:
    """The `top` most probable classes of one picture, [classes], the first the most probable."""
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [(classes[i], float(probabilities[i])) for i in order]


def batched(items: Iterable[Any], size: int = _BATCH) -> Iterator[list[Any]]:
    """Lists of at most `size` items."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# --- exporting ---------------------------------------------------------------------------------------------------


class WithPreprocessing(nn.Module):
    """The graph that is exported: pixels in, logits out, the normalisation inside."""

    def __init__(self, module: nn.Module, stats: ImageStats) -> None:
        super().__init__()
        self._module = module
        self._mean: torch.Tensor
        self._std: torch.Tensor
        self.register_buffer("_mean", torch.tensor(stats.mean).view(1, 3, 1, 1))
        self.register_buffer("_std", torch.tensor(stats.std).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 32, 32, 3], RGB, to logits float32 [n, classes]."""
        scaled = images.permute(0, 3, 1, 2).float() / 255
        return self._module((scaled - self._mean) / self._std)


def export(classifier: Classifier, kind: str, directory: Path) -> tuple[Path, float]:
    """Writes the model as `kind` (`torch` or `onnx`) and its card into `directory`.

    Weights and arithmetic are float32. Returns the file and the largest difference of a logit from the model's own, on
    `CHECKED_IMAGES` images in batches of three sizes. Raises `ConfigError` if the packages are missing and
    `CheckpointError` if the graph computes something else, in which case nothing is written.
    """
    module = build_model(classifier.config.model, num_classes=len(classifier.classes), seed=0)
    module.load_state_dict(classifier.module.state_dict())
    graph = WithPreprocessing(module, classifier.stats).eval()
    metadata = describe(classifier)
    images = torch.from_numpy(synthetic_split(1, CHECKED_IMAGES)[0])
    data, compute = (_to_torch if kind == "torch" else _to_onnx)(graph, images[:2], metadata)
    difference = _difference(graph, compute, images)
    make_dirs(directory)
    path = directory / ("model.pt2" if kind == "torch" else "model.onnx")
    write_atomic(path, data)
    # Another export may lie there, of this model or of another one; both kinds hold the hash as text.
    beside = [name for name in _SNIPPETS if (directory / name).exists()]
    files = [name for name in beside if classifier.sha256.encode() in (directory / name).read_bytes()]
    write_atomic(directory / "README.md", model_card(classifier, metadata, _summary_of(classifier), files))
    return path, difference


Compute = Callable[[torch.Tensor], npt.NDArray[np.float32]]


def _to_torch(graph: nn.Module, example: torch.Tensor, metadata: Mapping[str, Any]) -> tuple[bytes, Compute]:
    program = torch.export.export(graph, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    data = io.BytesIO()
    torch.export.save(program, data, extra_files={"metadata.json": json.dumps(metadata)})
    data.seek(0)
    module = torch.export.load(data).module()
    return data.getvalue(), lambda images: module(images).detach().numpy()


def _to_onnx(graph: nn.Module, example: torch.Tensor, metadata: Mapping[str, Any]) -> tuple[bytes, Compute]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch needs it
    except ImportError as error:
        raise ConfigError(f"--to onnx: {error.name} is not installed; pip install -e '.[onnx]'") from None
    program = torch.onnx.export(
        graph,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )
    assert program is not None
    model = program.model_proto
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    data = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda images: session.run(["logits"], {"images": images.numpy()})[0]


def _difference(graph: nn.Module, compute: Compute, images: torch.Tensor) -> float:
    """Largest difference of a logit; the batches have 1, 55 and 200 images."""
    with torch.no_grad():
        expected = graph(images).numpy()
    found = np.concatenate([compute(part) for part in images.split([1, 55, len(images) - 56])])
    difference = float(np.abs(found - expected).max())
    if not difference <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise CheckpointError(f"export: logits of the graph differ from the model's by {difference:.3g}; not written")
    return difference


def describe(classifier: Classifier) -> dict[str, Any]:
    """What goes with an exported model: what it takes, what it gives, where it comes from."""
    return {
        "model": classifier.config.model.name,
        "classes": list(classifier.classes),
        "input": "images: uint8 [batch, 32, 32, 3], RGB; other sizes are resized to 32x32 by an antialiased bilinear"
        " filter",
        "normalisation": {
            "inside the graph": True,
            "mean": list(classifier.stats.mean),
            "std": list(classifier.stats.std),
        },
        "output": "logits: float32 [batch, classes]; softmax gives probabilities",
        "step": str(classifier.step),
        "weights_sha256": classifier.sha256,
    }


def _summary_of(classifier: Classifier) -> dict[str, Any]:
    """The summary of the run, if the exported checkpoint is the one that it is about."""
    summary = RunDir(classifier.checkpoint.parent.parent).summary()
    return summary if summary.get("best_step") == classifier.step else {}


_PREPARE = """
image = Image.open("photo.jpg").convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
images = np.asarray(image)[None]  # uint8 [1, 32, 32, 3]
"""
_NAME_IT = """\
probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
probabilities /= probabilities.sum(axis=1, keepdims=True)
best = probabilities[0].argmax()
print(classes[best], probabilities[0][best])
"""
_SNIPPETS = {
    "model.onnx": """\
import json

import numpy as np
import onnxruntime
from PIL import Image
{prepare}
session = onnxruntime.InferenceSession("model.onnx")
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
(logits,) = session.run(["logits"], dict(images=images))
""",
    "model.pt2": """\
import json

import numpy as np
import torch
from PIL import Image
{prepare}
extra = dict.fromkeys(["metadata.json"], "")
model = torch.export.load("model.pt2", extra_files=extra).module()
classes = json.loads(extra["metadata.json"])["classes"]
logits = model(torch.from_numpy(images.copy())).detach().numpy()
""",
}
"""How each file that `export` writes is run."""


def usage(name: str) -> str:
    """A Python program that classifies `photo.jpg` with the file `name`."""
    return _SNIPPETS[name].format(prepare=_PREPARE) + _NAME_IT


def model_card(
    classifier: Classifier, metadata: Mapping[str, Any], summary: Mapping[str, Any], files: Sequence[str]
) -> str:
    """A Markdown page for the folder of an exported model, with the header that Hugging Face's hub reads.

    `files` are the exported ones, keys of `_SNIPPETS`; `summary` is empty for another checkpoint than the best.
    """
    config = classifier.config
    data = config.data.source if config.data.source != "folder" else Path(config.data.root).name
    header = ["pipeline_tag: image-classification", f"tags: [image-classification, {config.model.name}]"]
    if summary:
        right, count = summary["test_class_accuracy"], int(np.sum(summary["test_confusion"]))
        low, high = wilson_interval(int(np.trace(np.array(summary["test_confusion"]))), count)
        results = [
            f"Accuracy on the {count:,} test images: {summary['test_accuracy']:.2%}, 95% interval {low:.2%} to"
            f" {high:.2%} (cross entropy {summary['test_loss']:.4f}). The checkpoint is the best of the run on the"
            f" {summary['best_chosen_on']} split.",
            "",
            "| class | accuracy |",
            "|---|---|",
            *(f"| {name} | {'-' if share is None else f'{share:.1%}'} |" for name, share in right.items()),
        ]
        header += [
            "model-index:",
            f"- name: {config.model.name}",
            "  results:",
            "  - task: {type: image-classification}",
            f"    dataset: {{name: {json.dumps(data)}, type: {json.dumps(data)}, split: test}}",
            f"    metrics: [{{type: accuracy, value: {summary['test_accuracy']:.6g}}}]",
        ]
    else:
        results = ["Not evaluated on the test split: the run had not ended, or this is not its best checkpoint."]
    lines = [
        "---",
        *header,
        "---",
        "",
        f"# {config.model.name} for {len(classifier.classes)} classes",
        "",
        f"An image classifier ({config.model.norm} norm) that was trained by dist_cifar on the images of {data}.",
        "",
        "## Use",
        "",
        f"- Input: {metadata['input']}. Pixels are normalised inside the graph.",
        f"- Output: {metadata['output']}.",
        f"- Classes, in the order of the logits: {', '.join(classifier.classes)}.",
        *(line for name in files for line in ("", f"`{name}`:", "", "```python", usage(name).rstrip(), "```")),
        "",
        "## Results",
        "",
        *results,
        "",
        "## Training",
        "",
        f"- Step {classifier.step:,}, weights SHA-256 `{classifier.sha256}`.",
        f"- Seed {config.run.seed}, strategy `{config.strategy.name}`, {config.compute.precision},"
        f" augmentation `{config.augment.policy}`.",
        *(
            [
                f"- {summary['epochs']:g} epochs on {summary['world_size']} x {summary['device']},"
                f" {summary['wall_seconds']:,.0f} s; source {summary['git_revision'] or 'not in a checkout'}.",
                f"- Images SHA-256 `{summary['data_sha256']}`.",
            ]
            if summary
            else []
        ),
        "",
        "## Limits",
        "",
        "It knows these classes alone and gives one of them for any picture. It saw pictures of 32x32 pixels; what a"
        " larger one shows in its details is lost.",
        "",
    ]
    return "\n".join(lines)
