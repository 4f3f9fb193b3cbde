"""Small sites and plans that many tests share."""

from __future__ import annotations

import functools
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.membership import MEMBERSHIP_FILE, SITE_KEY
from common.enrolment import Membership, grant_membership
from common.keys import make_signing_key, public_hex
from common.plan import StudyPlan
from server.certificates import Authority

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # by a shell that put the tests into the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the programs that tests start would inherit it

SiteMaker = Callable[..., Path]
PlanMaker = Callable[..., StudyPlan]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What may take longest begins first, so that at the end no processor waits for another's long test."""
    items.sort(key=_limit_s, reverse=True)


def _limit_s(item: pytest.Item) -> float:
    limit = item.get_closest_marker("timeout")
    return float(limit.args[0]) if limit else 0.0


def soon(holds: Callable[[], bool], *, timeout_s: float = 10.0) -> bool:
    """Whether it holds within the time."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@functools.cache
def a_certificate() -> str:
    """Of some authority, PEM."""
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder) / "ca.crt", Path(folder) / "ca.key")
        authority.create("test")
        return authority.certificate.read_text()


def join_lab(folder: Path, lab: Ed25519PrivateKey) -> None:
    """Make the site in `folder` a member of the lab with this key, with a key of its own."""
    if not (folder / "state" / SITE_KEY).exists():
        make_signing_key(folder / "state" / SITE_KEY)
    membership = Membership(
        folder.name, node_key="", lab="lab", address="lab:1", authority=a_certificate(), lab_key=public_hex(lab)
    )
    (folder / MEMBERSHIP_FILE).write_text(grant_membership(membership, lab).to_json())


@pytest.fixture
def make_site(tmp_path: Path) -> SiteMaker:
    """make_site('alder', patients=12, images=3): a site folder of 16x16 images whose label is their brightness."""

    def make(name: str, *, patients: int = 12, images: int = 3, seed: int = 0, epsilon: float = 10.0) -> Path:
        folder = tmp_path / "sites" / name
        folder.mkdir(parents=True)
        rng = np.random.default_rng(seed)
        rows = patients * images
        patient_ids = np.repeat([f"{name}-{i:03d}" for i in range(patients)], images)
        labels = np.repeat(np.arange(patients) % 2, images)
        pictures = rng.normal(100 + 60 * labels[:, None, None], 30, (rows, 16, 16)).clip(0, 255).astype(np.uint8)
        names = np.array(["healthy", "lesion"])
        np.savez(folder / "data.npz", images=pictures, labels=labels, label_names=names, patient_ids=patient_ids)
        (folder / "site.yaml").write_text(f"name: {name}\nnpz: data.npz\nbudget: {{epsilon: {epsilon}, delta: 0.01}}\n")
        return folder

    return make


@pytest.fixture
def make_plan() -> PlanMaker:
    """make_plan(rounds=2, privacy=None): a plan of alder, birch and cedar; keywords replace whole sections."""

    def make(**changes: Any) -> StudyPlan:
        sites = {name: {"labels": "lesion", "patients": 10} for name in ("alder", "birch", "cedar")}
        plan: dict[str, Any] = {
            "study": "tiny",
            "task": {
                "kind": "classification",
                "image_size": 16,
                "channels": 1,
                "label_sets": {"lesion": ["healthy", "lesion"]},
            },
            "sites": sites,
            "model": {"name": "conv4", "width": 8, "trainable": "film"},
            "algorithm": {"name": "reptile", "inner_steps": 2, "inner_lr": 0.1},
            "rounds": 3,
            "quorum": 2,
            "sampling": {"sample_rate": 0.5},
            "privacy": {"epsilon": 8.0, "delta": 0.01},
        }
        plan |= changes
        if plan["privacy"] is None:
            plan["privacy"] = "none"
        return StudyPlan.model_validate(plan)

    return make
