"""Checkpoints: whole or absent, and never taken for something that they are not."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.checkpoint import load_checkpoint, save_checkpoint, shapes
from common.errors import CheckpointError
from common.params import digest, to_arrays

ROOT = Path(__file__).resolve().parent.parent
TENSORS = {"body.weight": torch.arange(6.0).reshape(2, 3), "body.bias": torch.tensor([1.0, -2.0])}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "round-0001.safetensors"
    save_checkpoint(path, TENSORS, {"plan": "abc", "round": "1"})
    return path


def test_round_trip(path):
    tensors, metadata = load_checkpoint(path, shapes(TENSORS))
    assert tensors.keys() == TENSORS.keys()
    assert all(tensors[name].equal(TENSORS[name]) for name in TENSORS)
    assert metadata == {"plan": "abc", "round": "1", "format": "1", "digest": digest(to_arrays(TENSORS))}


def test_what_was_read_does_not_follow_the_file(path):
    tensors = load_checkpoint(path).tensors
    path.write_bytes(bytes(path.stat().st_size))
    assert tensors["body.bias"].equal(TENSORS["body.bias"])


def test_the_folder_is_made_and_nothing_else_is_in_it(tmp_path):
    save_checkpoint(tmp_path / "new" / "a.safetensors", TENSORS, {})
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.safetensors"]


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"a.safetensors: does not exist -- check the path"):
        load_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_torn(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=r"round-0001.safetensors: is no readable safetensors file \(.*torn or damaged"
    ):
        load_checkpoint(path)


def test_a_flipped_bit(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="its content does not match its digest -- it is damaged"):
        load_checkpoint(path)


def test_a_foreign_safetensors_file(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="has format None, not '1' -- "):
        load_checkpoint(tmp_path / "a.safetensors")


def test_not_float32(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.float64)}, tmp_path / "a.safetensors", metadata={"format": "1"})
    with pytest.raises(CheckpointError, match="holds tensors that are not float32"):
        load_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ({"body.weight": (2, 3)}, "it has 'body.bias'"),
        ({**shapes(TENSORS), "head.bias": (2,)}, "it lacks 'head.bias'"),
        ({"body.weight": (2, 3), "stem.bias": (2,)}, "it lacks 'stem.bias'; has 'body.bias'"),
        ({"body.weight": (3, 2), "body.bias": (2,)}, "body.weight has shape (2, 3), not (3, 2)"),
    ],
)
def test_another_network(path, template, what):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, template)
    assert f"is of another network: {what} -- use the plan that it was made with" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(path, value):
    broken = {**TENSORS, "body.bias": torch.tensor([value, 0.0])}
    with pytest.raises(CheckpointError, match=r"body.bias is not finite -- nothing was written"):
        save_checkpoint(path, broken, {})
    assert load_checkpoint(path).tensors["body.bias"].equal(TENSORS["body.bias"])
    arrays = to_arrays(broken)
    save_file(broken, path, metadata={"format": "1", "digest": digest(arrays)})
    with pytest.raises(CheckpointError, match=r"body.bias is not finite -- take another"):
        load_checkpoint(path)


def test_a_full_disk_leaves_the_old_file(path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device -- make room"):
        save_checkpoint(path, {"a": torch.ones(1)}, {})
    assert load_checkpoint(path, shapes(TENSORS)).metadata["round"] == "1"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_kill_leaves_a_whole_file(tmp_path):
    """A process that does nothing but overwrite one checkpoint is killed in the middle."""
    path = tmp_path / "a.safetensors"
    loop = (
        "import sys, torch; from pathlib import Path; from common.checkpoint import save_checkpoint\n"
        "for i in range(10**6): save_checkpoint(Path(sys.argv[1]), {'a': torch.full((200_000,), float(i))}, {})"
    )
    writer = subprocess.Popen([sys.executable, "-c", loop, str(path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    tensor = load_checkpoint(path, {"a": (200_000,)}).tensors["a"]
    assert tensor.min() == tensor.max()
