"""Phantom hospitals: the same from the same seed, each patient on its own, lesions where their masks say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from client.data.checks import describe
from client.data.load import load_images, load_site
from client.data.phantoms import PROFILES, draw_hospital, make_phantom_sites
from client.site import load_site_config
from common.errors import DataError
from common.images import normalise
from common.models import build_model
from common.plan import ModelSpec, StudyPlan, TaskSpec

HEALTHY = "none"


def test_there_are_eight_hospitals_of_four_modalities_or_more() -> None:
    assert len(PROFILES) >= 8
    assert len({profile.modality.title for profile in PROFILES.values()}) >= 4
    assert len({lesion for profile in PROFILES.values() for lesion in profile.labels.values()} - {HEALTHY}) >= 6


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_hospital_is_drawn(name: str, channels: int) -> None:
    site = draw_hospital(name, patients=8, image_size=32, channels=channels, seed=0)
    count = len(site.labels)
    assert site.images.shape == ((count, 32, 32) if channels == 1 else (count, 32, 32, 3))
    assert site.images.dtype == np.uint8
    assert site.images.reshape(count, -1).std(axis=1).min() > 10, "no image is empty"
    assert site.masks is not None
    lesion = site.masks.reshape(count, -1).any(axis=1)
    sick = np.array([PROFILES[name].labels[site.label_names[label]] != HEALTHY for label in site.labels])
    np.testing.assert_array_equal(lesion[~sick], False)
    assert lesion[sick].mean() > 0.9, "a view may turn a small lesion out of the field"
    assert 0.002 < site.masks[sick].mean() < 0.3


def test_patients_have_two_to_five_images_that_differ() -> None:
    site = draw_hospital("alder", patients=60, image_size=32, channels=1, seed=0)
    _, counts = np.unique(site.patients, return_counts=True)
    assert set(counts) == {2, 3, 4, 5}
    assert len(np.unique(site.images, axis=0)) == len(site.images)


def test_views_of_a_patient_resemble_each_other_more_than_other_patients() -> None:
    site = draw_hospital("cedar", patients=30, image_size=32, channels=1, seed=0)
    flat = site.images.reshape(len(site.images), -1).astype(float)
    distance = ((flat[:, None] - flat[None]) ** 2).mean(axis=2)
    same = site.patients[:, None] == site.patients[None]
    alike = site.labels[:, None] == site.labels[None]
    assert distance[same & ~np.eye(len(flat), dtype=bool)].mean() < 0.8 * distance[~same & alike].mean()


def test_a_patient_depends_on_seed_name_and_number_alone() -> None:
    few = draw_hospital("elm", patients=4, image_size=32, channels=1, seed=5)
    many = draw_hospital("elm", patients=9, image_size=32, channels=1, seed=5)
    np.testing.assert_array_equal(few.images, many.images[: len(few.images)])
    other = draw_hospital("elm", patients=4, image_size=32, channels=1, seed=6)
    assert len(other.images) != len(few.images) or (other.images != few.images).any()


@pytest.mark.parametrize("name", ["poplar", "spruce"])
def test_two_findings_come_independently(name: str) -> None:
    site = draw_hospital(name, patients=80, image_size=32, channels=1, seed=0)
    shown = [set(site.label_names[label].split("|")) - {HEALTHY} for label in site.labels]
    patients = dict(zip(site.patients.tolist(), shown, strict=True))
    table = [
        [sum(("nodule" in f) == n and ("effusion" in f) == e for f in patients.values()) for n in (0, 1)]
        for e in (0, 1)
    ]
    assert table == [[20, 20], [20, 20]]
    assert site.masks is not None
    area = np.array([[bool(f), len(f) == 2, mask.mean()] for f, mask in zip(shown, site.masks, strict=True)])
    assert area[area[:, 0] == 0, 2].max() == 0
    one, two = (area[(area[:, 0] == 1) & (area[:, 1] == both), 2].mean() for both in (0, 1))
    assert two == pytest.approx(2 * one, rel=0.2), "both are marked where both are drawn"


def test_two_findings_are_a_multilabel_task(tmp_path: Path, make_plan: Callable[..., StudyPlan]) -> None:
    (folder,) = make_phantom_sites(tmp_path, names=["spruce"], patients=16, image_size=16)
    task = {"kind": "multilabel", "image_size": 16, "label_sets": {"chest": ["nodule", "effusion"]}}
    plan = make_plan(task=task, sites={"spruce": {"labels": "chest", "patients": 8}}, quorum=1)
    data = load_site(folder, plan)
    patients = {int(patient): tuple(row) for patient, row in zip(data.patients, data.labels.tolist(), strict=True)}
    assert sorted(patients.values()) == sorted([(0, 0), (0, 1), (1, 0), (1, 1)] * 4)
    assert data.masks is not None


def test_details_are_the_patients_own(tmp_path: Path) -> None:
    site = draw_hospital("cedar", patients=200, image_size=16, channels=1, seed=0)
    by_patient = {patient: set() for patient in site.patients.tolist()}
    for patient, details in zip(site.patients.tolist(), site.details, strict=True):
        by_patient[patient].add(details)
    assert all(len(told) == 1 for told in by_patient.values())
    people = [told.pop() for told in by_patient.values()]
    ages = [person.age for person in people]
    assert min(ages) >= 20
    assert max(ages) <= 90
    assert np.mean(ages) == pytest.approx(55, abs=5)
    assert 70 < sum(person.sex == "F" for person in people) < 130
    assert {person.sex for person in people} == {"F", "M"}
    assert {(person.modality, person.scanner) for person in people} == {("head CT", "cedar-scanner")}
    (folder,) = make_phantom_sites(tmp_path, names=["cedar"], patients=8, image_size=16)
    report = describe(folder)
    assert report.modalities == {"head CT": report.images}
    assert report.scanners == {"cedar-scanner": report.images}
    assert sum(report.sexes.values()) == report.images
    assert report.ages is not None


@pytest.mark.parametrize(("name", "orientation"), [("maple", "free"), ("rowan", "free"), ("cedar", "fixed")])
def test_only_what_lies_under_a_microscope_is_free_to_turn(tmp_path: Path, name: str, orientation: str) -> None:
    (folder,) = make_phantom_sites(tmp_path, names=[name], patients=4, image_size=16)
    assert load_site_config(folder).orientation == orientation


def test_folders_say_what_they_are(tmp_path: Path) -> None:
    folders = make_phantom_sites(tmp_path, names=["larch", "oak"], patients=12, image_size=32, channels=3, seed=0)
    assert [folder.name for folder in folders] == ["larch", "oak"]
    for folder in folders:
        assert load_site_config(folder).phantom
        assert "PHANTOM" in (folder / "PHANTOM.txt").read_text()
        report = describe(folder)
        assert "PHANTOM" in report.notes[0]
        assert report.patients == 12
        assert {count.split for count in report.counts} == {"train", "test"}
    assert load_images(folders[0], image_size=32, channels=3).images.shape[1:] == (3, 32, 32)


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    first, again, other = (
        make_phantom_sites(tmp_path / name, names=["maple"], patients=6, image_size=32, seed=seed)[0]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert (first / "data.npz").read_bytes() == (again / "data.npz").read_bytes()
    assert (first / "data.npz").read_bytes() != (other / "data.npz").read_bytes()


def test_wishes_that_cannot_be_met(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"palm: no such phantom hospital -- there are: alder, birch"):
        make_phantom_sites(tmp_path / "out", names=["alder", "palm"])
    with pytest.raises(DataError, match=r"patients 1, channels 2, image size 8"):
        make_phantom_sites(tmp_path / "out", names=["alder"], patients=1, channels=2, image_size=8)
    assert not (tmp_path / "out").exists()


def test_eight_hospitals_are_made_in_seconds(tmp_path: Path) -> None:
    start = time.process_time()
    make_phantom_sites(tmp_path, names=list(PROFILES)[:8], patients=80, image_size=48)
    assert time.process_time() - start < 10


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads on small tensors are many times slower than one wherever another process runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_small_network_learns_the_question_and_not_from_brightness_alone() -> None:
    site = draw_hospital("birch", patients=80, image_size=32, channels=1, seed=0)
    images, labels = normalise(torch.from_numpy(site.images)[:, None]), torch.from_numpy(site.labels)
    unseen = torch.from_numpy(np.unique(site.patients, return_inverse=True)[1] % 8 >= 6)
    means = images.mean(dim=(1, 2, 3))
    by_brightness = max(
        float(((means > t) == labels.bool()).float().mean()) for t in means.quantile(torch.linspace(0, 1, 50))
    )
    assert by_brightness < 0.9

    task = TaskSpec(kind="classification", image_size=32, label_sets={"opacity": list(site.label_names)})
    network = build_model(ModelSpec(width=16), task, ways=2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    rng = torch.Generator().manual_seed(0)
    seen = (~unseen).nonzero().flatten()
    for _ in range(200):
        batch = seen[torch.randint(len(seen), (32,), generator=rng)]
        optimizer.zero_grad()
        cross_entropy(network(images[batch]), labels[batch]).backward()
        optimizer.step()
    guess = network(images[unseen]).argmax(1)
    assert float((guess == labels[unseen]).float().mean()) > 0.85
