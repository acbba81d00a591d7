"""What a checkpoint holds: every bit of every tensor, and a digest of weights."""

from __future__ import annotations

import math

import torch

from dist_cifar.run import checkpoint
from dist_cifar.run.checkpoint import weights_sha256
from tests.run.checkpoint_harness import REAL, mutant
from tests.run.test_checkpoint_damage import check_missing_and_extra_files
from tests.run.test_checkpoint_full_disk import check_full_disk
from tests.run.test_checkpoint_retention import check_fallback_is_not_pushed_out, check_retention


def test_every_bit_returns(tmp_path):
    base = torch.randn(2, 3, 4, 5)
    model = {
        "fp32": base,
        "special": torch.tensor([math.nan, -math.nan, math.inf, -math.inf, -0.0, 1e-45]),
        "nan payload": torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32),
        "bf16": torch.randn(7).bfloat16(),
        "fp16": torch.randn(7).half(),
        "int32": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
        "int16": torch.tensor([-(2**15), 2**15 - 1], dtype=torch.int16),
        "int8": torch.tensor([-128, 127, 1], dtype=torch.int8),
        "fp64": torch.randn(7, dtype=torch.float64),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "uint8": torch.arange(256).to(torch.uint8),
        "bool": torch.tensor([True, False]),
        "0-dim": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "transposed": base.transpose(1, 2),
        "same storage": base,
        "part of it": base[1, 1:],
        "expanded": torch.randn(3, 1).expand(3, 5),
        'name with "quotes", ü': torch.randn(2),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    before = weights_sha256(model)
    state = {"lr": 0.1 + 0.2, "best": -math.inf, "worst": math.inf, "tiny": 5e-324, "epoch": 3, "é": ["a", None, True]}
    store, _ = REAL.store(tmp_path)
    assert {tensor.dtype for tensor in model.values()} == checkpoint.DTYPES.keys()
    store.begin_save(7, {"model": model, "empty": {}}, {**state, "nan": math.nan})
    assert weights_sha256(model) == before
    loaded = store.load_newest()
    assert (loaded.step, loaded.path) == (7, tmp_path / "step-00000007")
    assert loaded.tensors["empty"] == {}
    assert loaded.tensors["model"].keys() == model.keys()
    assert weights_sha256(loaded.tensors["model"]) == before
    for name, tensor in loaded.tensors["model"].items():
        assert (tensor.dtype, tensor.shape, tensor.is_contiguous()) == (model[name].dtype, model[name].shape, True)
    assert math.isnan(loaded.state.pop("nan"))
    assert loaded.state == state
    loaded.tensors["model"]["fp32"].zero_()  # it is the caller's own
    assert loaded.tensors["model"]["same storage"].any()


def test_the_digest_of_weights_sees_every_change_and_no_layout():
    weights = {"a": torch.randn(2, 3, 4, 4), "b": torch.arange(4), "c": torch.tensor(1.5)}
    digest = weights_sha256(weights)
    assert digest == weights_sha256(dict(reversed(weights.items())))
    assert digest == weights_sha256({**weights, "a": weights["a"].contiguous(memory_format=torch.channels_last)})
    assert digest == weights_sha256({**weights, "a": torch.nn.Parameter(weights["a"])})
    flipped = weights["a"].clone()
    flipped.view(torch.int32).view(-1)[77] ^= 1
    changes = [
        {"a": flipped},
        {"a": weights["a"].reshape(2, 3, 16)},
        {"a": weights["a"].view(torch.int32)},
        {"b": weights["b"].to(torch.int32)},
        {"b": weights["b"].to(torch.float64)},
        {"c": torch.tensor([1.5])},
        {"c": torch.tensor(-1.5)},
        {"d": torch.empty(0)},
    ]
    digests = {weights_sha256({**weights, **change}) for change in changes}
    renamed = {"e" if name == "c" else name: tensor for name, tensor in weights.items()}
    swapped = {**weights, "b": weights["c"], "c": weights["b"]}
    digests |= {digest, weights_sha256(renamed), weights_sha256(swapped)}
    assert len(digests) == len(changes) + 3


def test_a_mutant_that_changes_nothing_passes(tmp_path):
    code = mutant("checkpoint", "FORMAT = 2", "FORMAT = 2")
    for check in (check_retention, check_fallback_is_not_pushed_out, check_missing_and_extra_files, check_full_disk):
        check(code, tmp_path / check.__name__)
