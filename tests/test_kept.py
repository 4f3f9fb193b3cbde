"""A site's second start takes images from its state folder: the same ones, and never one that has changed since."""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import client.data.npz
from client.cli import app
from client.data import kept
from client.data.dataset import SiteData
from client.data.kept import ImageStore
from client.data.load import load_site
from client.data.manifest import read_image
from client.grant import Grant
from client.membership import SITE_KEY
from client.private_data import Mechanism, Patients, PrivateDataset
from client.worker import Worker
from common.errors import DataError
from common.keys import make_signing_key
from common.plan import StudyPlan
from common.starting_point import network_of
from common.tasks import task_of
from tests.conftest import PlanMaker

LABELS = ("healthy", "lesion")
LINES = [f"i/{n}.png,{LABELS[n % 2]},p{n},{('train', 'test')[n % 5 == 4]},{'FM'[n % 3 == 0]},\n" for n in range(20)]
MASKED = [line.replace(",\n", f",m/{n}.png\n") for n, line in enumerate(LINES)]


@pytest.fixture(autouse=True)
def _now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files made a moment ago are trusted, but where a test is about that, and the disk may be as full as it is."""
    monkeypatch.setattr(kept, "_TICK_NS", 0)
    monkeypatch.setattr(kept, "_SPARE", 0)


@pytest.fixture
def plan(make_plan: PlanMaker) -> StudyPlan:
    return plan_of(make_plan)


def plan_of(make_plan: PlanMaker, kind: str = "classification", **site: Any) -> StudyPlan:
    sets = {"lesion": ["background", "lesion"] if kind == "segmentation" else list(LABELS)}
    task = {"kind": kind, "image_size": 16, "channels": 1, "label_sets": sets}
    model = {"segmentation": {"name": "unet", "width": 8, "trainable": "all"}}.get(kind, {"name": "conv4", "width": 8})
    sites = {"alder": {"labels": "lesion", "patients": 2} | site}
    return make_plan(sites=sites, quorum=1, task=task, model=model)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Twenty 20x20 images of as many patients, every fifth for testing; for each there is a mask."""
    folder, rng = tmp_path / "alder", np.random.default_rng(0)
    for name, values in (("i", 256), ("m", 2)):
        (folder / name).mkdir(parents=True)
        for n in range(20):
            draw(folder / name / f"{n}.png", rng.integers(0, values, (20, 20), dtype=np.uint8))
    (folder / "state").mkdir()
    (folder / "site.yaml").write_text("name: alder\nmanifest: manifest.csv\nbudget: {epsilon: 10, delta: 0.001}\n")
    write(folder, LINES)
    return folder


def draw(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path, compress_level=0)  # so that size does not depend on the pixels


def write(folder: Path, lines: list[str]) -> None:
    (folder / "manifest.csv").write_text("path,label,patient,split,sex,mask\n" + "".join(lines))


def files(folder: Path) -> list[Path]:
    return sorted((folder / "state" / "images").iterdir())


@dataclasses.dataclass(frozen=True)
class Start:
    data: SiteData
    read: list[str]  # the files that were decoded
    said: list[str]


def start(folder: Path, plan: StudyPlan, split: str | None = "train") -> Start:
    """Load the site with what is kept; it must be what is there without."""
    said, read, log = list[str](), list[str](), logging.Logger("test")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)

    def watched(path: Path) -> np.ndarray:
        read.append(path.name)
        return read_image(path)

    with patch("client.data.manifest.read_image", watched):
        data = load_site(folder, plan, split=split, store=ImageStore(folder / "state", log))
    bare = load_site(folder, plan)
    require_same(data, bare if split is None else bare.of_split(split))
    return Start(data, read, said)


def require_same(one: SiteData, other: SiteData) -> None:
    """Bit for bit, in every field."""
    for field in dataclasses.fields(SiteData):
        a, b = getattr(one, field.name), getattr(other, field.name)
        equal = torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else repr(a) == repr(b)
        assert equal, field.name


@pytest.mark.parametrize("split", ["train", "test", None], ids=str)
@pytest.mark.parametrize("lines", [LINES, MASKED, MASKED[:9] + LINES[9:]], ids=["bare", "masked", "some masked"])
def test_a_second_start_reads_nothing_and_has_the_same(
    site: Path, plan: StudyPlan, lines: list[str], split: str | None
) -> None:
    write(site, lines)
    assert len(start(site, plan, split).read) == 20
    second = start(site, plan, split)
    assert second.read == []
    assert second.said == ["images: 20, of which 0 were read; the others were kept"]
    assert len(start(site, plan, "train").read) == 0, "what one caller keeps serves the others"


def test_a_split_is_mapped_and_only_the_owner_may_read_it(site: Path, plan: StudyPlan) -> None:
    data = start(site, plan).data
    train = next(path for path in files(site) if path.name.endswith("train"))
    assert str(train) in Path("/proc/self/maps").read_text()
    assert {path.stat().st_mode & 0o777 for path in files(site)} == {0o600}
    assert train.parent.stat().st_mode & 0o777 == 0o700
    assert data.images.is_contiguous()
    assert data.rows(torch.tensor([3])).images.max() > 0


def rewritten(path: Path) -> None:
    draw(path, np.full((20, 20), 7, dtype=np.uint8))


def another_renamed(path: Path) -> None:
    rewritten(path.with_name("new.png"))
    os.replace(path.with_name("new.png"), path)


def led_elsewhere(path: Path) -> None:
    rewritten(path.with_name("new.png"))
    path.unlink()
    path.symlink_to("new.png")


@pytest.mark.parametrize("change", [rewritten, another_renamed, led_elsewhere], ids=lambda change: change.__name__)
def test_a_changed_file_is_read_again_even_if_its_size_and_time_are_the_old_ones(
    site: Path, plan: StudyPlan, change: Callable[[Path], None]
) -> None:
    before = start(site, plan).data
    path = site / "i/3.png"
    old = path.stat()
    change(path)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    after = start(site, plan)
    assert after.read == [path.resolve().name]
    assert not torch.equal(after.data.images, before.images)
    assert after.data.images[3].unique().tolist() == [7]
    assert start(site, plan).read == [], "and is kept from then on"


def test_a_changed_mask_is_read_again(site: Path, plan: StudyPlan) -> None:
    write(site, MASKED)
    start(site, plan)
    rewritten(site / "m/3.png")
    after = start(site, plan).data
    assert after.masks is not None
    assert after.masks[3].unique().tolist() == [7]


def test_a_file_that_changed_a_moment_ago_is_not_trusted(
    site: Path, plan: StudyPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (site / "i").iterdir():
        os.utime(path, ns=(0, 0))
    monkeypatch.setattr(kept, "_TICK_NS", 3600 * 10**9)
    start(site, plan)
    assert len(start(site, plan).read) == 20, "a second writing within the clock's tick would not show"


def test_a_file_that_changes_while_it_is_read_is_not_kept(site: Path, plan: StudyPlan) -> None:
    def slow(path: Path) -> np.ndarray:
        pixels = read_image(path)
        if path.name == "3.png":
            time.sleep(0.02)
            rewritten(path)
        return pixels

    with patch("client.data.manifest.read_image", slow):
        load_site(site, plan, store=ImageStore(site / "state"))
    assert start(site, plan).read == ["3.png"]


CHANGED = {
    "as it was": (LINES, []),
    "one more": ([*LINES, "i/x.png,lesion,px,train,F,\n"], ["x.png"]),
    "one less": (LINES[:7] + LINES[8:], []),
    "the last ones left out": (LINES[:11], []),
    "another order": (LINES[::-1], []),
    "another label": ([LINES[0].replace("healthy", "lesion"), *LINES[1:]], []),
    "another split": ([LINES[0].replace("train", "test"), *LINES[1:]], ["0.png"]),
    "masks": (MASKED, [f"{n}.png" for n in range(20)]),
}


@pytest.mark.parametrize("split", ["train", None], ids=str)
@pytest.mark.parametrize("case", CHANGED)
def test_only_what_is_new_to_the_manifest_is_read(site: Path, plan: StudyPlan, case: str, split: str | None) -> None:
    lines, expected = CHANGED[case]
    rewritten(site / "i/x.png")
    start(site, plan, split)
    write(site, lines)
    assert start(site, plan, split).read == expected
    assert start(site, plan, split).read == []
    write(site, LINES)
    start(site, plan, split)


@pytest.mark.parametrize("place", [0, 0.3, 0.97, -1], ids=["first", "pixels", "keys", "last"])
def test_a_damaged_file_is_said_and_made_anew(site: Path, plan: StudyPlan, place: float) -> None:
    start(site, plan)
    path = next(path for path in files(site) if path.name.endswith("train"))
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if place >= 0 else -1] ^= 1
    path.write_bytes(content)
    again = start(site, plan)
    assert len(again.read) == 16
    assert again.said[0] == f"{path} is damaged: its images are read anew"
    assert start(site, plan).read == []


@pytest.mark.parametrize(
    "foreign",
    [lambda old: b"", lambda old: old[:-7], lambda old: old[200:], lambda old: b"x" * 5000, lambda old: old + old],
    ids=["empty", "cut", "its end", "another", "twice"],
)
def test_what_is_no_such_file_is_made_anew(site: Path, plan: StudyPlan, foreign: Callable[[bytes], bytes]) -> None:
    start(site, plan)
    for path in files(site):
        path.write_bytes(foreign(path.read_bytes()))
    assert len(start(site, plan).read) == 20
    assert start(site, plan).read == []


def test_a_file_of_another_view_under_this_ones_name_is_not_taken(site: Path, make_plan: PlanMaker) -> None:
    write(site, MASKED)
    plain, segmentation = plan_of(make_plan), plan_of(make_plan, "segmentation")
    start(site, plain)
    (test, train) = files(site)
    start(site, segmentation)
    for path in {*files(site)} - {test, train}:
        path.write_bytes((train if path.name.endswith("train") else test).read_bytes())
    assert len(start(site, segmentation).read) == 20


def test_other_software_reads_everything_anew_and_removes_what_the_old_kept(
    site: Path, plan: StudyPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(site, plan)
    before = files(site)
    for name in (f"{kept.software()}abc.tmp", f"{kept.software()}-unused-for-years-train"):
        (before[0].parent / name).write_bytes(b"left behind")
        os.utime(before[0].parent / name, (0, 0))
    start(site, plan)
    assert files(site) == before
    monkeypatch.setattr(kept, "software", lambda: "other")
    assert len(start(site, plan).read) == 20
    assert len(files(site)) == 2
    assert not {*files(site)} & {*before}


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["os.fsync", "tempfile.mkstemp", "os.replace", "os.utime", "shutil.disk_usage"])
def test_a_full_disk_costs_time_only(site: Path, plan: StudyPlan, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    with monkeypatch.context() as full:
        full.setattr(f"client.data.kept.{where}", no_room)
        first = start(site, plan)
    assert first.said == [
        f"images cannot be kept for the next start ({site}/state/images): {OSError(28, os.strerror(28))}"
    ]
    assert files(site) == []


def test_the_last_of_the_disk_is_the_ledgers(site: Path, plan: StudyPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_SPARE", 2**60)
    assert start(site, plan).said[0].endswith("the disk is nearly full")
    assert files(site) == []


def test_a_site_where_nothing_can_be_written_works(site: Path, plan: StudyPlan) -> None:
    (site / "state").rmdir()
    assert start(site, plan).said == []
    assert not (site / "state").exists(), "a state folder is made by those who own it"
    (site / "state").write_text("")
    assert "cannot be kept" in start(site, plan).said[0]


def test_two_starts_at_once_are_both_right(site: Path, plan: StudyPlan) -> None:
    others = [lambda: start(site, plan), lambda: rewritten(site / "i/2.png"), lambda: start(site, plan)]

    def meanwhile(path: Path) -> np.ndarray:
        while path.name == "7.png" and others:
            others.pop(0)()
        return read_image(path)

    with patch("client.data.manifest.read_image", meanwhile):
        slow = load_site(site, plan, split="train", store=ImageStore(site / "state"))
    assert slow.images[2].unique().numel() > 1, "what was there when it was read"
    assert start(site, plan).read == ["2.png"]


def test_what_another_process_puts_there_meanwhile_is_not_taken_for_ones_own(
    site: Path, plan: StudyPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(site, plan)
    theirs, replace = {path: path.read_bytes() for path in files(site)}, os.replace
    write(site, LINES[::-1])

    def overtaken(source: Path, target: Path) -> None:
        replace(source, target)
        target.unlink()
        target.write_bytes(theirs[target])

    monkeypatch.setattr("client.data.kept.os.replace", overtaken)
    assert start(site, plan).read == []


def test_a_bad_image_is_told_on_every_start(site: Path, plan: StudyPlan) -> None:
    start(site, plan)
    (site / "i/3.png").write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(DataError, match=r"manifest.csv:5: image: the file is damaged"):
            start(site, plan)
    assert len(files(site)) == 2, "nothing half-written"
    (site / "i/3.png").unlink()
    with pytest.raises(DataError, match=r"manifest.csv:5: image: there is no such file"):
        start(site, plan)


def test_a_wrong_label_or_a_patient_in_two_splits_is_told_although_the_image_is_kept(
    site: Path, plan: StudyPlan
) -> None:
    start(site, plan)
    write(site, [LINES[0].replace("healthy", "leison"), *LINES[1:4], LINES[4].replace("p4", "p0"), *LINES[5:]])
    with pytest.raises(DataError) as caught:
        start(site, plan)
    assert [str(problem.what)[:24] for problem in caught.value.problems] == [
        "the plan does not know t",
        "this patient is in split",
    ]


@pytest.mark.parametrize(
    ("kind", "of_site"),
    [("anomaly", {}), ("segmentation", {}), ("multilabel", {}), ("classification", {"where": {"sex": ["M"]}})],
    ids=["anomaly", "segmentation", "multilabel", "where"],
)
def test_rows_that_take_no_part_are_not_read_again_either(
    site: Path, make_plan: PlanMaker, kind: str, of_site: dict[str, Any]
) -> None:
    plan = plan_of(make_plan, kind, **of_site)
    lines = MASKED if kind == "segmentation" else LINES
    if kind == "multilabel":
        lines = [line.replace("healthy", "none") for line in lines]
    write(site, lines)
    assert len(start(site, plan).read) == 20
    assert start(site, plan).read == []
    write(site, [lines[0], lines[1].replace("lesion", "healthy").replace(",F,", ",M,"), *lines[2:]])
    start(site, plan)


FORMS: dict[str, Callable[[np.ndarray], dict[str, np.ndarray]]] = {
    "npz": lambda images: {"images": images, "labels": np.arange(20) % 2, "patient_ids": np.arange(20)},
    "with masks": lambda images: {**FORMS["npz"](images), "masks": images > 90},
    "medmnist": lambda images: {
        "train_images": images[:15],
        "train_labels": np.arange(15)[:, None] % 2,
        "test_images": images[15:],
        "test_labels": np.ones((5, 1), dtype=np.uint8),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_an_npz_is_not_unpacked_a_second_time(
    site: Path, plan: StudyPlan, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site / "site.yaml").write_text(
        "name: alder\nnpz: data.npz\nlabel_map: {0: healthy, 1: lesion}\nbudget: {epsilon: 10, delta: 0.001}\n"
    )
    images = np.random.default_rng(1).integers(0, 256, (20, 20, 20), dtype=np.uint8)
    np.savez(site / "data.npz", **FORMS[form](images))
    start(site, plan)
    bare = load_site(site, plan).of_split("train")
    with monkeypatch.context() as broken:
        broken.setattr(client.data.npz, "to_uint8", no_room)
        require_same(load_site(site, plan, split="train", store=ImageStore(site / "state")), bare)
    np.savez(site / "data.npz", **FORMS[form](255 - images))
    assert torch.equal(start(site, plan).data.images, start(site, plan).data.images)


def test_private_queries_have_the_same_numbers(site: Path, plan: StudyPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.private_data.os_generator", lambda: torch.Generator().manual_seed(5))
    mechanism = Mechanism(sample_rate=0.5, noise_multiplier=1.0, clip=1.0, batch=8.0, max_images=2)
    torch.manual_seed(0)
    network = network_of(plan, "alder")
    bare, answers = load_site(site, plan).of_split("train"), []
    for data in (bare, start(site, plan).data, start(site, plan).data):
        private = PrivateDataset(Patients(data, network, task_of(plan, "alder")), mechanism, Grant(2))
        sums = private.class_sums(private.public)
        answers.append([*private.gradient(private.public).values(), sums.features, sums.counts])
    assert len(answers[0]) > 5
    assert all(torch.equal(a, b) for other in answers[1:] for a, b in zip(answers[0], other, strict=True))


def test_a_worker_keeps_images_and_a_simulated_one_does_not(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.worker.require_self_test", lambda state: None)
    make_signing_key(site / "state" / SITE_KEY)
    real, simulated = (Worker(site, state=site / "state", simulated=simulated) for simulated in (False, True))
    assert isinstance(real._load, functools.partial)
    assert isinstance(simulated._load, functools.partial)
    assert real._load.keywords["store"] is not None
    assert simulated._load.keywords["store"] is None


def test_data_check_reads_everything_and_can_forget(site: Path, plan: StudyPlan) -> None:
    start(site, plan)
    before = CliRunner().invoke(app, ["data", "check", str(site), "--json"])
    assert len(files(site)) == 2
    after = CliRunner().invoke(app, ["data", "check", str(site), "--json", "--forget"])
    assert before.stdout == after.stdout
    assert not (site / "state/images").exists()
    assert len(start(site, plan).read) == 20
