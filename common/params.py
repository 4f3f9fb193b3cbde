"""Arithmetic on named tensors: `Params` maps a parameter's name to its tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

Params = dict[str, Tensor]
Arrays = dict[str, np.ndarray]  # what travels and what is stored: no torch needed to hold it


def add(left: Mapping[str, Tensor], right: Mapping[str, Tensor], *, scale: float = 1.0) -> Params:
    """left + scale * right, over left's names; both must hold the same names."""
    _same_names(left, right)
    return {name: value + scale * right[name] for name, value in left.items()}


def subtract(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Params:
    """left - right."""
    return add(left, right, scale=-1.0)


def scale(params: Mapping[str, Tensor], factor: float) -> Params:
    """factor * params."""
    return {name: factor * value for name, value in params.items()}


def zeros_like(params: Mapping[str, Tensor]) -> Params:
    """A zero tensor for each name."""
    return {name: torch.zeros_like(value) for name, value in params.items()}


def norm(params: Mapping[str, Tensor]) -> float:
    """L2 norm over all names together, in float64."""
    return float(sum(float(value.double().square().sum()) for value in params.values()) ** 0.5)


def select(params: Mapping[str, Tensor], names: Iterable[str]) -> Params:
    """The named tensors only."""
    return {name: params[name] for name in names}


def within(params: Mapping[str, Tensor], prefix: str) -> Params:
    """Those whose names begin with `prefix`, named by the rest."""
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def detach(params: Mapping[str, Tensor]) -> Params:
    """Copies cut from every graph."""
    return {name: value.detach().clone() for name, value in params.items()}


def to_arrays(params: Mapping[str, Tensor]) -> Arrays:
    """As float32 numpy arrays, sorted by name."""
    return {name: params[name].detach().cpu().numpy().astype(np.float32, order="C") for name in sorted(params)}


def to_tensors(arrays: Mapping[str, np.ndarray]) -> Params:
    """As float32 tensors that own their memory."""
    return {name: torch.from_numpy(np.array(value, dtype=np.float32)) for name, value in arrays.items()}


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) over names, shapes and bytes; independent of the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name], dtype="<f4")
        sha.update(f"{name}{value.shape}".encode())
        sha.update(value.tobytes())
    return sha.hexdigest()


def _same_names(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    if left.keys() != right.keys():
        raise ValueError(f"parameter names differ: {sorted(left.keys() ^ right.keys())}")
