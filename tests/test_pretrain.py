"""The warm start: public images in, one body out; nothing of a hospital's own in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.augment import augment
from common.checkpoint import load_checkpoint
from common.errors import UsageError
from common.models import build_model
from common.plan import ModelSpec, TaskSpec
from server.pretrain import PublicSet, pretrain
from server.simulation import load_public
from server.start import initial_parameters
from server.warm_start import make_warm_start
from tests.conftest import PlanMaker, SiteMaker

TASK = TaskSpec(kind="classification", image_size=16, channels=1, label_sets={"two": ["no", "yes"]})
MODEL = ModelSpec(name="conv4", width=8)


def stripes_of(count: int, seed: int) -> PublicSet:
    """Stripes across or along, which no change of brightness hides."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    waves = np.sin(np.arange(16) * 1.6)[None, :, None].repeat(16, axis=2)
    images = (
        128 + 60 * np.where(labels[:, None, None], waves, waves.transpose(0, 2, 1)) + rng.normal(0, 10, (count, 16, 16))
    )
    pixels = torch.from_numpy(images.clip(0, 255).astype(np.uint8)).unsqueeze(1)
    return PublicSet("stripes", pixels, torch.from_numpy(labels), 2)


def test_the_body_learns_and_its_features_are_centred() -> None:
    public = stripes_of(80, seed=0)
    body = pretrain([public], MODEL, TASK, steps=40, seed=0)
    network = build_model(MODEL, TASK, ways=2)
    network.load_state_dict(body, strict=False)
    new = stripes_of(40, seed=1)
    with torch.no_grad():
        features, others = (network.body((p.images.float() / 255 - 0.5) / 0.25) for p in (public, new))
    assert float(features.mean(dim=0).abs().max()) < 1e-3
    assert float(features.square().sum(dim=1).mean()) == pytest.approx(1.0, abs=1e-3)
    means = torch.stack([features[public.labels == label].mean(dim=0) for label in (0, 1)])
    nearest = torch.cdist(others, means).argmin(dim=1)
    assert float((nearest == new.labels).float().mean()) > 0.9


def test_the_same_seed_gives_the_same_start() -> None:
    public = stripes_of(40, seed=0)
    one, two = (pretrain([public], MODEL, TASK, steps=3, seed=5) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_plan_starts_from_the_file_and_hospitals_images_are_left_out(
    make_site: SiteMaker, make_plan: PlanMaker, tmp_path: Path
) -> None:
    folder = make_site("alder")
    plan = make_plan(model={"name": "conv4", "width": 8, "warm_start": "warm.safetensors"})
    file = tmp_path / "plan.yaml"
    file.write_text(plan.to_json().replace("/", "\\/"))  # JSON is YAML
    public = tmp_path / "public" / "alder"
    public.parent.mkdir()
    folder.rename(public)
    hospital = make_site("birch", seed=1)
    shared = dict(np.load(public / "data.npz"))
    shared["images"][:5] = np.load(hospital / "data.npz")["images"][:5]  # five films that are in both
    np.savez(public / "data.npz", **shared)
    written = make_warm_start(file, public.parent, None, avoid=hospital.parent, steps=2, seed=0)
    assert written == tmp_path / "warm.safetensors"
    assert load_checkpoint(written).metadata["images"] == str(len(load_public(public, plan).labels) - 5)
    start = initial_parameters(plan, tmp_path)
    assert torch.equal(start["body.1.weight"], load_checkpoint(written).tensors["body.1.weight"])
    unnamed = tmp_path / "unnamed.yaml"
    unnamed.write_text(make_plan().to_json())
    with pytest.raises(UsageError, match="names no file to write"):
        make_warm_start(unnamed, public.parent, None, avoid=None, steps=2, seed=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.sampled_from([1, 3]), st.integers(0, 1000))
def test_a_view_has_the_image_s_shape_and_stays_in_range(count: int, channels: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    images = torch.rand((count, channels, 16, 16), generator=rng)
    views = augment(images, rng)
    assert views.shape == images.shape
    assert float(views.min()) >= 0.0
    assert float(views.max()) <= 1.0


def test_a_view_is_never_mirrored() -> None:
    """A bright left half stays on the left in every view: laterality is a label."""
    image = torch.zeros(64, 1, 32, 32)
    image[..., :16] = 0.8
    image[..., 16:] = 0.4
    views = augment(image, torch.Generator().manual_seed(0))
    left, right = views[..., :8].mean(dim=(1, 2, 3)), views[..., -8:].mean(dim=(1, 2, 3))
    inverted = left < right  # photographic inversion swaps them in some views, mirroring would in half
    assert float(inverted.float().mean()) < 0.4
