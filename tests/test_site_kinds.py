"""What each kind of task asks of a site's rows, the details that are known of them, and what `data check` says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from client.cli import app
from client.data.checks import check_site
from client.data.cutting import make_sites
from client.data.dataset import SiteData
from client.data.load import load_images, load_site
from client.data.rows import Details
from client.site import load_site_config
from common.errors import DataError
from common.plan import RowFilter, StudyPlan

BUDGET = "budget: {epsilon: 10, delta: 0.001}\n"
SHARED = Path(__file__).parents[2] / "shared" / "data"
PlanMaker = Callable[..., StudyPlan]


@pytest.fixture
def plan_of(make_plan: PlanMaker) -> PlanMaker:
    """plan_of("segmentation", ["background", "vessel"], patients=1, where={...}): alder's plan; keywords are the
    site's, and `modalities` the task's."""

    def make(kind: str, labels: list[str], *, modalities: tuple[str, ...] = (), **site: Any) -> StudyPlan:
        task = {"kind": kind, "image_size": 16, "channels": 1, "label_sets": {"set": labels}}
        network = "unet" if kind == "segmentation" else "conv4"
        sites = {"alder": {"labels": "set", "patients": 1} | site, "birch": {"labels": "set", "patients": 1}}
        return make_plan(
            task=task | {"modalities": list(modalities)}, model={"name": network, "width": 8}, sites=sites, quorum=1
        )

    return make


def table_site(folder: Path, table: str, *, site: str = "") -> Path:
    """A folder with a.png ... d.png, their masks a_mask.png ... (a stripe of 0, 1, 2, 3), and `table` as manifest."""
    folder.mkdir(parents=True)
    (folder / "site.yaml").write_text("name: alder\nmanifest: manifest.csv\n" + site + BUDGET)
    for value, name in enumerate("abcd"):
        Image.fromarray(np.full((16, 16), 10 * value, dtype=np.uint8)).save(folder / f"{name}.png")
        mask = np.zeros((16, 16), dtype=np.uint8)
        mask[4:8] = value
        Image.fromarray(mask).save(folder / f"{name}_mask.png")
    (folder / "manifest.csv").write_text(table)
    return folder


def array_site(folder: Path, *, site: str = "", **arrays: Any) -> Path:
    """Four rows of patients p0 to p3, the last for testing; `arrays` replace or add, None leaves one out."""
    folder.mkdir(parents=True)
    (folder / "site.yaml").write_text("name: alder\nnpz: data.npz\n" + site + BUDGET)
    good = {
        "images": np.arange(4, dtype=np.uint8)[:, None, None] * np.ones((1, 16, 16), dtype=np.uint8),
        "labels": np.array(["well", "ill", "well", "ill"]),
        "patient_ids": np.array(["p0", "p1", "p2", "p3"]),
        "split": np.array(["train", "train", "train", "test"]),
    }
    np.savez(folder / "data.npz", **{k: v for k, v in (good | arrays).items() if v is not None}, allow_pickle=False)
    return folder


def refused(folder: Path, plan: StudyPlan) -> list[str]:
    """The problems, each with `folder` cut from its front."""
    with pytest.raises(DataError) as caught:
        load_site(folder, plan)
    return [str(problem).replace(f"{folder}/", "").replace(f"{folder}", "") for problem in caught.value.problems]


def known(data: SiteData) -> list[tuple[str, float | None, str, str]]:
    """The details; None for an age that is not known."""
    return [(d.modality, None if math.isnan(d.age) else d.age, d.sex, d.scanner) for d in data.details]


TOLD = [("CT", 70.0, "F", "one"), ("", None, "", ""), ("MR", 0.5, "M", ""), ("CT", 130.0, "", "two")]


def test_details_come_from_columns(tmp_path: Path, plan_of: PlanMaker) -> None:
    table = (
        "path,label,patient,Modality,age,sex,scanner\n"
        "a.png,well,p0,CT,70,F,one\nb.png,ill,p1,,,,\nc.png,well,p2,MR,0.5,M,\nd.png,ill,p3,CT,130,,two\n"
    )
    plan = plan_of("classification", ["well", "ill"])
    assert known(load_site(table_site(tmp_path / "a", table), plan)) == TOLD
    columns: dict[str, Any] = {
        "modality": np.array(["CT", "", "MR", "CT"]),
        "sex": np.array(["F", "", "M", ""]),
        "scanner": np.array(["one", "", "", "two"]),
    }
    for number, ages in enumerate((np.array([70, np.nan, 0.5, 130]), np.array(["70", "", "0.5", "130"]))):
        assert known(load_site(array_site(tmp_path / str(number), age=ages, **columns), plan)) == TOLD
    whole = load_site(array_site(tmp_path / "whole", age=np.array([70, 1, 2, 3])), plan)
    assert [d.age for d in whole.details] == [70, 1, 2, 3]


@pytest.mark.parametrize("age", ["sixtysix", "-3", "131", "nan", "inf", "1999-03-02"])
def test_an_age_that_is_none_is_told_and_not_quoted(tmp_path: Path, plan_of: PlanMaker, age: str) -> None:
    plan = plan_of("classification", ["well", "ill"])
    table = f"path,label,patient,age\na.png,well,p0,60\nb.png,ill,p1,{age}\n"
    problem = "the age is no number of years from 0 to 130 -- give years, as 63 or 0.5; leave it empty where it is"
    (found,) = refused(table_site(tmp_path / "a", table), plan)
    assert found.startswith(f"manifest.csv:3: {problem}")
    assert age not in found.replace("130", "")
    (found,) = refused(array_site(tmp_path / "b", age=np.array(["60", "", age, ""])), plan)
    assert found.startswith(f"data.npz row 2: {problem}")


def test_ages_as_numbers_have_the_same_bounds(tmp_path: Path, plan_of: PlanMaker) -> None:
    folder = array_site(tmp_path / "a", age=np.array([-1.0, np.nan, np.inf, 130.5]))
    assert [text.split(":")[0] for text in refused(folder, plan_of("classification", ["well", "ill"]))] == [
        "data.npz row 0",
        "data.npz row 2",
        "data.npz row 3",
    ]


MASKS = np.tile(np.eye(16, dtype=np.uint8), (4, 1, 1))


def test_a_row_whose_has_mask_is_false_has_none(tmp_path: Path, plan_of: PlanMaker) -> None:
    plan = plan_of("classification", ["well", "ill"])
    part = array_site(tmp_path / "part", masks=MASKS, has_mask=np.array([True, False, True, True]))
    assert load_site(part, plan).masks is None, "masks are kept only where every row has one"
    assert check_site(part, plan).masks == 3
    full = load_site(array_site(tmp_path / "full", masks=MASKS, has_mask=np.ones(4, dtype=bool)), plan)
    assert full.masks is not None
    assert full.masks.dtype == torch.uint8
    assert full.masks.numpy().tolist() == MASKS.tolist()


def test_findings_become_zeros_and_ones(tmp_path: Path, plan_of: PlanMaker) -> None:
    plan = plan_of("multilabel", ["nodule", "effusion", "mass"])
    table = "path,label,patient\na.png,none,p0\nb.png,effusion,p1\nc.png, mass | nodule |mass,p2\nd.png,fluid|Herd,p3\n"
    folder = table_site(tmp_path / "a", table, site="label_map: {fluid: effusion, Herd: nodule}\n")
    data = load_site(folder, plan)
    assert data.labels.tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 1], [1, 1, 0]]
    assert data.labels.dtype == torch.float32
    assert data.kind == "multilabel"
    assert data.ways == 3
    assert data.targets.equal(data.labels)
    assert len(data.strata.unique()) == 4
    assert data.strata.shape == (4,)


def test_one_finding_is_a_task(tmp_path: Path, plan_of: PlanMaker) -> None:
    folder = array_site(
        tmp_path / "a", labels=np.array(["none", "mass", "clear", "mass"]), site="label_map: {clear: none}\n"
    )
    data = load_site(folder, plan_of("multilabel", ["mass"]))
    assert data.labels.tolist() == [[0], [1], [0], [1]]
    assert data.strata.tolist() == [0, 1, 0, 1]


def test_findings_that_the_plan_does_not_know(tmp_path: Path, plan_of: PlanMaker) -> None:
    plan = plan_of("multilabel", ["nodule", "effusion"])
    table = "path,label,patient\na.png,nodule|SECRET,p0\nb.png,none|nodule,p1\nc.png,nodul,p2\nd.png,nodule|,p3\n"
    allowed = (
        "allowed: nodule, effusion, none (alone; '|' stands between findings); "
        "translate the hospital's own labels with label_map in site.yaml"
    )
    problem = "the plan does not know a finding of this row --"
    assert refused(table_site(tmp_path / "a", table), plan) == [
        f"manifest.csv:2: {problem} {allowed}",
        f"manifest.csv:3: {problem} did you mean 'none'? {allowed}",
        f"manifest.csv:4: {problem} did you mean 'nodule'? {allowed}",
        f"manifest.csv:5: {problem} {allowed}",
    ]
    folder = array_site(tmp_path / "b", labels=np.full(4, "none"), site="label_map: {x: none, y: both}\n")
    assert refused(folder, plan)[0].startswith("site.yaml:3: 'both' is no label of the plan -- allowed: nodule,")


def test_the_vocabulary_of_one_kind_is_not_that_of_another(tmp_path: Path, plan_of: PlanMaker) -> None:
    both = array_site(tmp_path / "a", labels=np.array(["well|ill", "none", "well", "ill"]))
    found = refused(both, plan_of("classification", ["well", "ill"]))
    assert [text.split(" -- ")[0] for text in found] == [
        "data.npz row 0: the plan does not know this label",
        "data.npz row 1: the plan does not know this label",
    ]


@pytest.mark.parametrize("column", ["label,", ""])
def test_segmentation_needs_masks_and_no_labels(tmp_path: Path, plan_of: PlanMaker, column: str) -> None:
    cell = {"label,": ("anything,", ",", "x|y,", ","), "": ("",) * 4}[column]
    lines = "".join(f"{name}.png,{text}p{name},{name}_mask.png\n" for name, text in zip("abcd", cell, strict=True))
    folder = table_site(tmp_path / "a", f"path,{column}patient,mask\n{lines}", site="label_map: {anything: odd}\n")
    plan = plan_of("segmentation", ["background", "vessel", "disc", "cup"])
    data = load_site(folder, plan)
    assert data.labels.tolist() == data.strata.tolist() == [0, 0, 0, 0]
    assert data.labels.dtype == data.targets.dtype == torch.int64
    assert data.targets.shape == (4, 16, 16)
    assert data.targets[:, 5, 0].tolist() == [0, 1, 2, 3]
    assert data.ways == 4
    assert data.label_names == ("background", "vessel", "disc", "cup")


def test_with_two_labels_whatever_is_not_black_is_marked(tmp_path: Path, plan_of: PlanMaker) -> None:
    masks = np.zeros((4, 16, 16), dtype=np.uint8)
    masks[:, 0] = np.array([0, 1, 2, 255])[:, None]
    folder = array_site(tmp_path / "a", masks=masks, labels=None, label_names=None)
    assert load_site(folder, plan_of("segmentation", ["background", "vessel"])).targets[:, 0, 0].tolist() == [
        0,
        1,
        1,
        1,
    ]


def test_labels_of_a_segmentation_may_be_out_of_their_range(tmp_path: Path, plan_of: PlanMaker) -> None:
    folder = array_site(tmp_path / "a", masks=MASKS, labels=np.array([9, 9, -1, 0]), label_names=np.array(["one"]))
    assert len(load_site(folder, plan_of("segmentation", ["background", "vessel"]))) == 4


def test_masks_that_cannot_serve_a_segmentation(tmp_path: Path, plan_of: PlanMaker) -> None:
    three, two = plan_of("segmentation", ["ground", "disc", "cup"]), plan_of("segmentation", ["ground", "vessel"])
    table = "path,patient,mask\na.png,p0,a_mask.png\nb.png,p1,\nc.png,p2,c_mask.png\nd.png,p3,d_mask.png\n"
    none = "this row has no mask -- give a black mask if nothing is to be marked; `sites make --masked-only` leaves"
    folder = table_site(tmp_path / "a", table)
    found = refused(folder, three)
    assert found[0].startswith(f"manifest.csv:3: {none}")
    assert found[1:] == ["manifest.csv:5: the mask holds a value that is not below 3 -- write 0 ground, 1 disc, 2 cup"]
    assert len(refused(folder, two)) == 1, "3 is not black, and with two labels that is all that counts"
    arrays = array_site(tmp_path / "b", masks=MASKS, has_mask=np.array([True, True, False, True]))
    assert [text.split(":")[0] for text in refused(arrays, two)] == ["data.npz row 2"]
    assert len(refused(array_site(tmp_path / "c"), two)) == 4


def test_other_kinds_need_the_label(tmp_path: Path, plan_of: PlanMaker) -> None:
    table = "path,patient,mask\na.png,p0,a_mask.png\n"
    for kind in ("classification", "multilabel", "anomaly"):
        plan = plan_of(kind, ["well", "ill"])
        assert refused(table_site(tmp_path / kind, table), plan)[0].startswith("manifest.csv:1: missing column: label")
        bare = array_site(tmp_path / f"{kind}-npz", labels=None)
        assert refused(bare, plan)[0].startswith("data.npz: missing array: labels")


ANOMALIES = {
    "images": np.arange(6, dtype=np.uint8)[:, None, None] * np.ones((1, 16, 16), dtype=np.uint8),
    "labels": np.array(["well", "odd", "odd", "well", "odd", "well"]),
    "patient_ids": np.array(["p0", "p0", "p1", "p2", "p3", "p3"]),
    "split": np.array(["train", "train", "train", "train", "test", "test"]),
}


def test_only_healthy_images_train_where_anomalies_are_sought(tmp_path: Path, plan_of: PlanMaker) -> None:
    folder = array_site(tmp_path / "a", **ANOMALIES)
    data = load_site(folder, plan_of("anomaly", ["well", "odd"], patients=2))
    assert data.images[:, 0, 0, 0].tolist() == [0, 3, 4, 5]
    assert data.labels.tolist() == data.strata.tolist() == [0, 0, 1, 0]
    assert data.split == ("train", "train", "test", "test")
    assert data.ways == 2
    assert refused(folder, plan_of("anomaly", ["well", "odd"], patients=3)) == [
        ": <10 training patients with a healthy image, but the plan declares 3 for this site -- "
        "enrol more, or have the lab declare fewer (sites.<name>.patients)"
    ]
    three_labels = load_site(folder, plan_of("anomaly", ["well", "odd", "other"]))
    assert three_labels.ways == 2, "those of the self-supervised task"
    assert three_labels.label_names == ("well", "odd", "other")


def test_a_held_out_site_keeps_all_its_rows(tmp_path: Path, plan_of: PlanMaker) -> None:
    folder = array_site(tmp_path / "a", **ANOMALIES)
    held_out = plan_of("anomaly", ["well", "odd"], role="held_out", patients=3)
    assert len(load_site(folder, held_out)) == 6
    assert len(load_site(folder, plan_of("classification", ["well", "odd"], patients=3))) == 6


def test_an_anomalous_training_row_must_still_be_sound(tmp_path: Path, plan_of: PlanMaker) -> None:
    folder = array_site(tmp_path / "a", labels=np.array(["well", "strange", "well", "ill"]))
    assert refused(folder, plan_of("anomaly", ["well", "ill"]))[0].startswith("data.npz row 1: the plan does not know")


SOME_DETAILS = {
    "modality": np.array(["CT", "MR", "CT", ""]),
    "age": np.array([30.0, 40.0, np.nan, 60.0]),
    "sex": np.array(["F", "M", "", "F"]),
    "scanner": np.array(["one", "one", "two", "two"]),
}


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ({}, [0, 1, 2, 3]),
        ({"modality": ["CT"]}, [0, 2]),
        ({"modality": ["MR", "CT"]}, [0, 1, 2]),
        ({"sex": ["F"]}, [0, 3]),
        ({"scanner": ["two"], "sex": ["F"]}, [3]),
        ({"min_age": 40}, [1, 3]),
        ({"max_age": 40}, [0, 1]),
        ({"min_age": 31, "max_age": 59}, [1]),
    ],
)
def test_a_site_may_be_some_of_the_rows(
    tmp_path: Path, plan_of: PlanMaker, where: dict[str, Any], left: list[int]
) -> None:
    folder = array_site(tmp_path / "a", **SOME_DETAILS)
    plan = plan_of("classification", ["well", "ill"], where=where, role="held_out", patients=1)
    if left == [3]:  # no training patient is left
        found = refused(folder, plan)
        assert "<10 training patients, but the plan declares 1" in found[0]
        return
    data = load_site(folder, plan)
    assert data.images[:, 0, 0, 0].tolist() == left
    every = load_site(folder, plan_of("classification", ["well", "ill"]))
    assert every.matching(RowFilter(**where)).images.equal(data.images)


def test_what_a_site_leaves_aside_need_not_fit(tmp_path: Path, plan_of: PlanMaker) -> None:
    columns = SOME_DETAILS | {"labels": np.array(["well", "strange", "ill", "strange"])}
    folder = array_site(tmp_path / "a", **columns)
    assert len(refused(folder, plan_of("classification", ["well", "ill"]))) == 2
    only = {"modalities": ("CT",), "where": {"modality": ["CT"]}}
    assert len(load_site(folder, plan_of("classification", ["well", "ill"], **only))) == 2
    none = plan_of("classification", ["well", "ill"], where={"sex": ["X"]})
    assert refused(folder, none) == [
        ": the site has no usable image -- "
        "check the manifest or npz named in site.yaml and sites.<name>.where in the plan"
    ]


words = st.sampled_from(["", "a", "b"])
ages = st.one_of(st.just(math.nan), st.floats(0, 130))
bounds = st.one_of(st.none(), st.floats(0, 130))
lists = st.one_of(st.none(), st.lists(words, max_size=2))


@given(
    told=st.builds(Details, words, ages, words, words),
    named=st.tuples(lists, lists, lists),
    least=bounds,
    most=bounds,
)
@settings(max_examples=200, deadline=None)
def test_what_is_not_known_matches_only_where_nothing_is_asked(
    told: Details, named: tuple[list[str] | None, ...], least: float | None, most: float | None
) -> None:
    wanted = RowFilter.model_construct(modality=named[0], sex=named[1], scanner=named[2], min_age=least, max_age=most)
    reasons = []
    for value, allowed in zip((told.modality, told.sex, told.scanner), named, strict=True):
        if allowed is not None:
            reasons.append(value == "" or value not in allowed)
    if least is not None:
        reasons.append(math.isnan(told.age) or told.age < least)
    if most is not None:
        reasons.append(math.isnan(told.age) or told.age > most)
    assert told.match(wanted) == (not any(reasons))


def test_rows_without_details_match_only_an_empty_filter() -> None:
    none = torch.zeros(2, dtype=torch.int64)
    data = SiteData(
        "alder", torch.zeros(2, 1, 16, 16, dtype=torch.uint8), none, none, ("a", "b"), ("p",), ("train",) * 2
    )
    assert len(data.matching(RowFilter())) == 2
    assert len(data.matching(RowFilter(sex=["F"]))) == 0


def test_modalities_are_numbered_as_in_the_plan(tmp_path: Path, plan_of: PlanMaker) -> None:
    folder = array_site(tmp_path / "a", **SOME_DETAILS | {"modality": np.array(["CT", "MR", "CT", "US"])})
    data = load_site(folder, plan_of("classification", ["well", "ill"], modalities=("US", "MR", "CT")))
    assert data.modalities is not None
    assert data.modalities.tolist() == [2, 1, 2, 0]
    assert data.inputs()[:, -1, 0, 0].tolist() == [2, 1, 2, 0]
    assert load_site(folder, plan_of("classification", ["well", "ill"])).modalities is None


def test_a_modality_that_the_plan_does_not_name(tmp_path: Path, plan_of: PlanMaker) -> None:
    table = "path,label,patient,modality\na.png,well,p0,CT\nb.png,ill,p1,SECRET\nc.png,ill,p2,\n"
    plan = plan_of("classification", ["well", "ill"], modalities=("CT", "MR"))
    assert refused(table_site(tmp_path / "a", table), plan) == [
        "manifest.csv:3: the plan does not know this modality -- in the column 'modality' write one of: CT, MR",
        "manifest.csv:4: the modality is not known -- in the column 'modality' write one of: CT, MR",
    ]


def test_no_problem_quotes_a_cell(tmp_path: Path, plan_of: PlanMaker) -> None:
    words = ("SECRETLABEL", "SECRETMODALITY", "SECRETAGE", "SECRETSEX", "SECRETSCANNER", "SECRETPATIENT", "SECRETFILE")
    label, modality, age, sex, scanner, patient, file = words
    table = (
        "path,label,patient,modality,age,sex,scanner,mask\n"
        f"a.png,{label},{patient},{modality},{age},{sex},{scanner},\n"
        f"b.png,{label},{patient}1,{modality},,{sex},{scanner},\n"
        f"c.png,well|{label},{patient}2,{modality},,{sex},{scanner},{file}.png\n"
        f"d.png,{label},{patient}3,{modality},,{sex},{scanner},d_mask.png\n"
    )
    for kind in ("classification", "multilabel", "segmentation", "anomaly"):
        modalities = () if kind == "segmentation" else ("CT",)
        plan = plan_of(kind, ["well", "ill", "odd"], modalities=modalities)
        found = " ".join(refused(table_site(tmp_path / kind, table), plan))
        assert found.count("manifest.csv:") >= 4
        assert not any(word in found for word in words), kind


def whole(kind: str) -> SiteData:
    """Five rows in which every field tells the row."""
    row = torch.arange(5)
    labels = torch.eye(5)[:, :3] if kind == "multilabel" else row % 2
    return SiteData(
        "alder",
        row.to(torch.uint8)[:, None, None, None].expand(5, 1, 16, 16),
        labels if kind != "segmentation" else torch.zeros(5, dtype=torch.int64),
        row,
        ("a", "b", "c"),
        tuple("pqrst"),
        ("train", "test", "train", "test", "train"),
        row.to(torch.uint8)[:, None, None].expand(5, 16, 16),
        kind,  # type: ignore[arg-type]
        tuple(Details(age=float(i)) for i in range(5)),
        row % 3,
    )


@pytest.mark.parametrize("kind", ["classification", "multilabel", "segmentation", "anomaly"])
def test_rows_stay_in_agreement(kind: str) -> None:
    data = whole(kind)
    for part, rows in (
        (data.rows(torch.tensor([4, 0, 0])), [4, 0, 0]),
        (data.of_split("test"), [1, 3]),
        (data.matching(RowFilter(min_age=2)), [2, 3, 4]),
    ):
        assert part.images[:, 0, 0, 0].tolist() == part.patients.tolist() == [d.age for d in part.details] == rows
        assert part.labels.equal(data.labels[rows])
        assert part.targets.equal(data.targets[rows])
        assert part.split == tuple(data.split[row] for row in rows)
        assert part.masks is not None
        assert part.masks[:, 0, 0].tolist() == rows
        assert part.modalities is not None
        assert part.modalities.tolist() == [row % 3 for row in rows]
        assert part.kind == kind
        assert part.ways == data.ways
        assert len(part) == len(part.strata) == len(rows)


def test_images_of_no_plan_keep_details_and_masks(tmp_path: Path) -> None:
    folder = array_site(tmp_path / "a", masks=7 * MASKS, labels=np.array(["a|b", "none", "b", "a|b"]), **SOME_DETAILS)
    data = load_images(folder, image_size=16, channels=1)
    assert data.kind == "classification"
    assert data.label_names == ("a|b", "b", "none")
    assert [d.modality for d in data.details] == ["CT", "MR", "CT", ""]
    assert data.masks is not None
    assert data.masks.unique().tolist() == [0, 7]
    assert data.modalities is None


def test_orientation_is_fixed_unless_the_site_says_otherwise(tmp_path: Path) -> None:
    assert load_site_config(array_site(tmp_path / "a")).orientation == "fixed"
    assert load_site_config(array_site(tmp_path / "b", site="orientation: free\n")).orientation == "free"


def counts_of(folder: Path, plan: StudyPlan) -> set[tuple[str, str, int, int]]:
    report = check_site(folder, plan)
    assert report.fit, report.problems
    return {(count.label, count.split, count.images, count.patients) for count in report.counts}


def test_a_report_counts_what_the_kind_asks_about(tmp_path: Path, plan_of: PlanMaker) -> None:
    findings = array_site(tmp_path / "a", labels=np.array(["mass|mass", "mass|fluid", "none", "fluid"]))
    assert counts_of(findings, plan_of("multilabel", ["mass", "fluid"])) == {
        ("mass", "train", 2, 2),
        ("fluid", "train", 1, 1),
        ("none", "train", 1, 1),
        ("fluid", "test", 1, 1),
    }
    masks = np.zeros((4, 16, 16), dtype=np.uint8)
    masks[0, :4], masks[0, 8:], masks[3, 2] = 1, 2, 2
    assert counts_of(array_site(tmp_path / "b", masks=masks), plan_of("segmentation", ["none", "disc", "cup"])) == {
        ("disc", "train", 1, 1),
        ("cup", "train", 1, 1),
        ("none", "train", 2, 2),
        ("cup", "test", 1, 1),
    }
    assert counts_of(array_site(tmp_path / "c", **ANOMALIES), plan_of("anomaly", ["well", "odd"])) == {
        ("well", "train", 2, 2),
        ("well", "test", 1, 1),
        ("odd", "test", 1, 1),
    }


def test_a_report_tells_what_is_known(tmp_path: Path, plan_of: PlanMaker) -> None:
    report = check_site(array_site(tmp_path / "a", masks=MASKS, **SOME_DETAILS))
    assert report.modalities == {"": 1, "CT": 2, "MR": 1}
    assert report.sexes == {"": 1, "F": 2, "M": 1}
    assert report.scanners == {"one": 2, "two": 2}
    assert report.ages == (30, 60)
    assert report.masks == 4
    assert json.loads(json.dumps(report.to_json()))["ages"] == [30, 60]
    assert check_site(array_site(tmp_path / "b")).ages is None
    assert check_site(tmp_path / "b").modalities == {}


def test_the_command_shows_them(tmp_path: Path, plan_of: PlanMaker) -> None:
    shown = CliRunner().invoke(
        app, ["data", "check", str(array_site(tmp_path / "a", masks=MASKS, **SOME_DETAILS)), "--exact"]
    )
    assert shown.exit_code == 0
    for line in (
        "4 with a mask",
        "modality: not known 1, CT 2, MR 1",
        "sex: not known 1, F 2, M 1",
        "scanner: one 2, two 2",
        "age: 30 to 60 years",
    ):
        assert line in shown.output
    plain = CliRunner().invoke(app, ["data", "check", str(array_site(tmp_path / "b"))])
    assert not any(word in plain.output for word in ("modality", "sex", "scanner", "age:"))


def real_sites(tmp_path: Path, name: str, **wish: Any) -> list[Path]:
    return make_sites(tmp_path, [SHARED / f"{name}.npz"], by="site", masked_only=True, **wish)


@pytest.mark.realdata
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real images are not beside this checkout")
def test_vessels_of_two_real_eye_clinics(tmp_path: Path, plan_of: PlanMaker) -> None:
    chase, hrf = real_sites(tmp_path, "retina_vessels_two_sites", names=["chase", "hrf"])
    with np.load(SHARED / "retina_vessels_two_sites.npz") as source:
        share = {word: source["masks"][np.char.startswith(source["site"], word)].mean() for word in ("CHASE", "HRF")}
    plan = plan_of("segmentation", ["background", "vessel"], patients=10)
    for folder, images, word in ((chase, 336, "CHASE"), (hrf, 450, "HRF")):
        data = load_site(folder, plan, site="alder")
        assert data.targets.shape == (images, 16, 16)
        assert data.targets.unique().tolist() == [0, 1]
        assert float(data.targets.float().mean()) == pytest.approx(share[word], rel=0.1)
        marked = {count.label for count in check_site(folder, plan, site="alder").counts}
        assert "vessel" in marked


@pytest.mark.realdata
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real images are not beside this checkout")
def test_lungs_of_the_real_films_that_have_a_mask(tmp_path: Path, plan_of: PlanMaker) -> None:
    said: list[str] = []
    made = real_sites(tmp_path, "tb_cxr", names=["montgomery", "shenzhen"], say=said.append)
    assert said[0].endswith("tb_cxr.npz: 96 of 800 images have no mask and are left out")
    plan = plan_of("segmentation", ["background", "lung"], patients=50)
    sizes = []
    for folder in made:
        data = load_site(folder, plan, site="alder")
        sizes.append(len(data))
        assert float(data.targets.float().mean(dim=(1, 2)).min()) > 0.05, "both lungs are marked"
    assert sizes == [138, 566]


@pytest.mark.realdata
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real images are not beside this checkout")
def test_real_films_without_a_mask_can_still_be_classified(tmp_path: Path, plan_of: PlanMaker) -> None:
    (shenzhen,) = make_sites(tmp_path, [SHARED / "tb_cxr.npz"], by="site", only="Shenzhen_No3_Hospital_CN", names=["s"])
    labels = ["normal", "tuberculosis"]
    data = load_site(shenzhen, plan_of("classification", labels), site="alder")
    assert len(data) == 662
    assert data.masks is None
    with pytest.raises(DataError, match="this row has no mask"):
        load_site(shenzhen, plan_of("segmentation", ["background", "lung"]), site="alder")
    plan = plan_of("anomaly", labels, patients=200)
    healthy = load_site(shenzhen, plan, site="alder")
    assert set(healthy.of_split("train").labels.tolist()) == {0}
    assert set(healthy.of_split("test").labels.tolist()) == {0, 1}
