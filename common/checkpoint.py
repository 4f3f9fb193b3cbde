"""Checkpoints: named float32 tensors and a few words about them, in one safetensors file.

Written whole or not at all; checked against their own digest and the caller's template when read.
The same form serves a round of a run, a starting point, and a public warm start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.errors import CheckpointError, Problem
from common.files import write_atomically
from common.params import Params, digest, to_arrays

FORMAT = "1"
_FORMAT, _DIGEST = "format", "digest"  # metadata keys that every checkpoint has


class Checkpoint(NamedTuple):
    """What a checkpoint file holds."""

    tensors: Params
    metadata: dict[str, str]  # as saved, with "format" and "digest"


def save_checkpoint(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], *, durable: bool = True
) -> None:
    """Write `tensors` as float32, with `metadata`, the format version and the tensors' SHA-256.

    Raises CheckpointError if a value is not finite or the file cannot be written; `path` is then as it was.
    """
    broken = _not_finite(tensors)
    if broken:
        raise _error(path, f"{broken} is not finite", "nothing was written; the file before it is still good")
    arrays = to_arrays(tensors)
    data = save(arrays, metadata={**metadata, _FORMAT: FORMAT, _DIGEST: digest(arrays)})
    try:
        write_atomically(path, data, durable=durable)
    except OSError as error:
        raise _error(
            path, f"cannot be written: {error.strerror}", "make room or mend the folder, then resume"
        ) from error


def load_checkpoint(path: Path, template: Mapping[str, Sequence[int]] | None = None) -> Checkpoint:
    """Read `path`; with a `template` (name -> shape), its names and shapes must be exactly those.

    Raises CheckpointError if the file is missing, torn, changed, not finite, or of another network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors: Params = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise _error(path, "does not exist", "check the path") from None
    except (OSError, SafetensorError) as error:
        raise _error(
            path, f"is no readable safetensors file ({error})", "it is torn or damaged; take another"
        ) from None
    if metadata.get(_FORMAT) != FORMAT:
        raise _error(path, f"has format {metadata.get(_FORMAT)!r}, not {FORMAT!r}", "write it with this version")
    if any(value.dtype != torch.float32 for value in tensors.values()):
        raise _error(path, "holds tensors that are not float32", "it was not written by this program")
    if metadata.get(_DIGEST) != digest(to_arrays(tensors)):
        raise _error(path, "its content does not match its digest", "it is damaged; take another")
    broken = _not_finite(tensors)
    if broken:
        raise _error(path, f"{broken} is not finite", "take another")
    if template is not None:
        _check_template(path, tensors, template)
    return Checkpoint(tensors, metadata)


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The template of `tensors`."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _check_template(path: Path, tensors: Params, template: Mapping[str, Sequence[int]]) -> None:
    missing, unknown = sorted(template.keys() - tensors.keys()), sorted(tensors.keys() - template.keys())
    if missing or unknown:
        what = "; ".join(f"{word} {names[0]!r}" for word, names in (("lacks", missing), ("has", unknown)) if names)
        raise _error(path, f"is of another network: it {what}", "use the plan that it was made with")
    for name, value in tensors.items():
        if tuple(value.shape) != tuple(template[name]):
            what = f"is of another network: {name} has shape {tuple(value.shape)}, not {tuple(template[name])}"
            raise _error(path, what, "use the plan that it was made with")


def _not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    return next((name for name, value in tensors.items() if not bool(torch.isfinite(value).all())), None)


def _error(path: Path, what: str, remedy: str) -> CheckpointError:
    return CheckpointError(str(Problem(str(path), what, remedy)))
