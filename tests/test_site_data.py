"""A site's folder becomes SiteData, or every problem with file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.data.checks import check_site, describe
from client.data.load import load_images, load_site
from client.site import load_site_config
from common.errors import DataError
from common.plan import StudyPlan

GOOD = """path,label,patient,split
a.png,healthy,p1,train
b.png,lesion,p2,
c.png,lesion,p2,val
d.png,healthy,p3,test
"""
BUDGET = "budget: {epsilon: 10, delta: 0.001}\n"
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def plan(make_plan: Callable[..., StudyPlan]) -> StudyPlan:
    """16x16 grey, healthy or lesion; alder declares 2 patients, birch 1."""
    sites = {"alder": {"labels": "lesion", "patients": 2}, "birch": {"labels": "lesion", "patients": 1}}
    return make_plan(sites=sites, quorum=1)


def manifest_site(
    folder: Path, table: str = "", *, site: str = "manifest: manifest.csv\n", size: int = 20, masks: bool = False
) -> Path:
    """A folder with a.png ... d.png, shades 10, 20, 30, 40, and `table` as its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "site.yaml").write_text("name: alder\n" + site + BUDGET)
    for shade, name in zip((10, 20, 30, 40), "abcd", strict=True):
        Image.fromarray(np.full((size, size), shade, dtype=np.uint8)).save(folder / f"{name}.png")
        if masks:
            Image.fromarray(np.eye(size, dtype=np.uint8)).save(folder / f"{name}_mask.png")
    (folder / "manifest.csv").write_text(table or GOOD)
    return folder


def npz_site(folder: Path, *, site: str = "", **arrays: Any) -> Path:
    """A folder with data.npz; `arrays` replace or add to four good rows; None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "site.yaml").write_text("name: alder\nnpz: data.npz\n" + site + BUDGET)
    good = {
        "images": np.arange(4, dtype=np.uint8)[:, None, None] * np.ones((1, 16, 16), dtype=np.uint8),
        "labels": np.array([0, 1, 1, 0]),
        "label_names": np.array(["healthy", "lesion"]),
        "patient_ids": np.array(["p1", "p2", "p2", "p3"]),
        "split": np.array(["train", "train", "val", "test"]),
    }
    np.savez(folder / "data.npz", **{k: v for k, v in (good | arrays).items() if v is not None}, allow_pickle=True)
    return folder


def refused(folder: Path, plan: StudyPlan) -> list[str]:
    """The problems, each with `folder` cut from its front."""
    with pytest.raises(DataError) as caught:
        load_site(folder, plan)
    assert caught.value.exit_code == 2
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


def test_a_manifest_becomes_rows_that_agree(tmp_path: Path, plan: StudyPlan) -> None:
    data = load_site(manifest_site(tmp_path / "alder"), plan)
    assert data.site == "alder"
    assert data.images.shape == (4, 1, 16, 16)
    assert data.images[:, 0, 8, 8].tolist() == [10, 20, 30, 40]
    assert [data.label_names[i] for i in data.labels.tolist()] == ["healthy", "lesion", "lesion", "healthy"]
    assert [data.patient_ids[i] for i in data.patients.tolist()] == ["p1", "p2", "p2", "p3"]
    assert data.split == ("train", "train", "train", "test"), "val counts as train"
    assert data.masks is None


def test_masks_follow_their_images(tmp_path: Path, plan: StudyPlan) -> None:
    table = "mask,path,label,patient,age,ward\na_mask.png,a.png,healthy,p1,70,x\nb_mask.png,b.png,lesion,p2,,\n"
    data = load_site(manifest_site(tmp_path / "alder", table, size=16, masks=True), plan)
    assert data.masks is not None
    assert data.masks.shape == (2, 16, 16)
    np.testing.assert_array_equal(data.masks[1], np.eye(16))


def test_an_npz_becomes_the_same(tmp_path: Path, plan: StudyPlan) -> None:
    data = load_site(npz_site(tmp_path / "alder", masks=np.ones((4, 16, 16), dtype=bool)), plan)
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert data.labels.tolist() == [0, 1, 1, 0]
    assert data.split == ("train", "train", "train", "test")
    assert data.masks is not None
    assert data.masks.min() == 1


def test_class_indices_are_the_plans_not_the_files(tmp_path: Path, plan: StudyPlan) -> None:
    names = np.array(["lesion", "healthy"])
    assert load_site(npz_site(tmp_path / "alder", label_names=names), plan).labels.tolist() == [1, 0, 0, 1]


def test_a_hospitals_own_labels_are_translated(tmp_path: Path, plan: StudyPlan) -> None:
    folder = npz_site(tmp_path / "alder", label_names=None, site="label_map: {0: healthy, 1: lesion}\n")
    assert load_site(folder, plan).labels.tolist() == [0, 1, 1, 0]


def test_the_name_in_the_plan_may_differ(tmp_path: Path, plan: StudyPlan) -> None:
    folder = manifest_site(tmp_path / "alder")
    assert load_site(folder, plan, site="birch").site == "birch"
    with pytest.raises(DataError, match=r"site.yaml:1: the plan has no site 'oak' -- the plan's sites: alder, birch"):
        load_site(folder, plan, site="oak")


def test_medmnist_counts_each_image_as_a_patient_and_says_so(tmp_path: Path, plan: StudyPlan) -> None:
    folder = tmp_path / "alder"
    npz_site(folder, site="label_map: {0: healthy, 1: lesion}\n")
    parts = {f"{part}_images": np.full((n, 28, 28), n, dtype=np.uint8) for part, n in (("train", 3), ("test", 2))}
    labels = {f"{part}_labels": np.ones((n, 1), dtype=np.uint8) for part, n in (("train", 3), ("test", 2))}
    np.savez(folder / "data.npz", **parts, **labels)
    data = load_site(folder, plan)
    assert data.split == ("train",) * 3 + ("test",) * 2
    assert data.images[:, 0, 0, 0].tolist() == [3, 3, 3, 2, 2]
    assert len(data.patient_ids) == 5
    assert "a patient of its own" in " ".join(describe(folder).notes)


def test_public_images_bring_their_own_labels(tmp_path: Path) -> None:
    data = load_images(npz_site(tmp_path / "alder"), image_size=16, channels=3)
    assert data.label_names == ("healthy", "lesion")
    assert data.images.shape == (4, 3, 16, 16)


def test_all_problems_of_a_manifest_come_at_once(tmp_path: Path, plan: StudyPlan) -> None:
    table = (
        "path,label,patient,split\n"
        "a.png,healthy,p1,train\n"  # 2
        "gone.png,healthy,p1,train\n"  # 3
        "../outside.png,healthy,p1,train\n"  # 4
        "cut.png,healthy,p1,train\n"  # 5
        "b.png,leison,p2,train\n"  # 6
        "c.png,lesion,p1,test\n"  # 7
        "small.png,lesion,p5,train\n"  # 8
        "d.png,,p6,later\n"  # 9
        "\n"
        "a.png,lesion,p7,train\n"  # 11
        "link.png,lesion,p8,train\n"  # 12
        "d.png,lesion,p9,train,more,cells\n"  # 13
    )
    folder = manifest_site(tmp_path / "alder", table)
    Image.new("L", (12, 40)).save(folder / "small.png")
    Image.new("L", (12, 40)).save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:900])
    found = refused(folder, plan)
    expected = [
        "manifest.csv:3: image: there is no such file -- mend or leave out the row",
        "manifest.csv:4: image: the path leaves the site's folder -- copy the file into it",
        "manifest.csv:5: image: the file is damaged, or no PNG, JPEG, TIFF, DICOM or NIfTI -- "
        "mend or leave out the row",
        "manifest.csv:6: the plan does not know this label -- did you mean 'lesion'? allowed: healthy, lesion; "
        "translate the hospital's own labels with label_map in site.yaml",
        "manifest.csv:7: this patient is in split 'test' here and in 'train' at manifest.csv:2 -- "
        "put all images of a patient into one split",
        "manifest.csv:8: the image is 12x40 pixels; the plan needs at least 16x16 -- export larger images",
        "manifest.csv:9: the cell 'label' is empty -- fill it in",
        "manifest.csv:9: unknown split -- write 'train', 'val' (counted as train: nothing is tuned on a site's "
        "validation part) or 'test'",
        "manifest.csv:11: the same image as manifest.csv:2 -- list each image once",
        "manifest.csv:12: image: the path leaves the site's folder -- copy the file into it",
        "manifest.csv:13: 6 cells, but 4 columns -- quote cells with commas",
    ]
    assert sorted(found) == sorted(expected)


def test_no_error_quotes_a_pseudonym_a_label_or_a_path(tmp_path: Path, plan: StudyPlan) -> None:
    table = (
        "path,label,patient,split\nMRS_SMITH.png,SECRET,JOHN,train\na.png,SECRET,JOHN,train\nb.png,lesion,JOHN,test\n"
    )
    text = " ".join(refused(manifest_site(tmp_path / "alder", table), plan))
    assert "manifest.csv:2" in text
    assert not any(word in text for word in ("SMITH", "SECRET", "JOHN"))


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("path;label;patient\n", "manifest.csv:1: missing column: path, label, patient -- the first line names"),
        ("path,label\na.png,lesion\n", "manifest.csv:1: missing column: patient"),
        ("\n", "manifest.csv:1: the manifest is empty"),
        ("path,label,patient\n", "the site has no usable image -- check the manifest or npz"),
        ('path,label,patient\n"a.png,lesion,p1\n', "manifest.csv: cannot be read as a CSV file: Error"),
        ("path,label,patient\na.png,lesion,p1\n", "<10 training patients, but the plan declares 2 for this site"),
        ("path,label,patient\n\0,lesion,p1\n", "manifest.csv:2: image: no valid path"),
    ],
)
def test_a_manifest_that_cannot_serve(tmp_path: Path, plan: StudyPlan, table: str, problem: str) -> None:
    found = refused(manifest_site(tmp_path / "alder", table), plan)
    assert len(found) == 1
    assert problem in found[0]


def test_the_line_is_the_one_in_the_file_even_after_cells_of_two_lines(tmp_path: Path, plan: StudyPlan) -> None:
    table = 'path,label,patient,scanner\na.png,lesion,p1,"two\nlines"\ngone.png,lesion,p2,x\n'
    assert refused(manifest_site(tmp_path / "alder", table), plan)[0].startswith("manifest.csv:4: image")


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path: Path, plan: StudyPlan) -> None:
    folder = manifest_site(tmp_path / "alder")
    (folder / "manifest.csv").write_bytes(b"\xef\xbb\xbf" + (folder / "manifest.csv").read_bytes())
    assert len(load_site(folder, plan)) == 4


def test_masks_must_fit_their_images(tmp_path: Path, plan: StudyPlan) -> None:
    table = (
        "path,label,patient,mask\n"
        "a.png,lesion,p1,a_mask.png\n"
        "b.png,lesion,p2,wide.png\n"
        "c.png,lesion,p3,\n"  # without a mask it can still be classified
        ",lesion,p4,d_mask.png\n"
        "d.png,lesion,p5,gone.png\n"
    )
    folder = manifest_site(tmp_path / "alder", table, masks=True)
    Image.new("L", (20, 30)).save(folder / "wide.png")
    assert refused(folder, plan) == [
        "manifest.csv:3: the mask is 20x30 pixels, its image 20x20 -- give a mask of the image's own size",
        "manifest.csv:5: the cell 'path' is empty -- fill it in",
        "manifest.csv:6: mask: there is no such file -- mend it or leave the column out",
    ]


FOUR = np.zeros((4, 16, 16))


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"labels": np.array([0, 1, 1])}, "data.npz: labels has 3 rows, images has 4"),
        ({"masks": np.zeros((4, 8, 8), dtype=np.uint8)}, "data.npz: masks is uint8 (4, 8, 8); allowed"),
        ({"masks": np.zeros((3, 16, 16), dtype=np.uint8)}, "data.npz: masks has 3 rows, images has 4"),
        ({"images": np.zeros((4, 16, 16), dtype=complex)}, "data.npz: images is of type complex128"),
        ({"images": np.zeros((4, 16))}, "data.npz: images has shape (4, 16); allowed: (n, H, W)"),
        ({"images": np.where(np.arange(4)[:, None, None] == 2, np.nan, FOUR)}, "data.npz row 2: image: a pixel is NaN"),
        ({"images": np.zeros((4, 8, 8), dtype=np.uint8)}, "data.npz row 0: the image is 8x8 pixels; the plan needs"),
        ({"labels": np.array([0, 1, 5, -1])}, "data.npz row 2: the label's number is not below 2"),
        ({"labels": np.array([0.0, 1, 1, 0])}, "data.npz: labels is float64 (4,); allowed: one whole number or text"),
        ({"labels": np.array([None, 1, 1, 0])}, "data.npz: holds pickled objects, which are never opened"),
        ({"labels": np.zeros((4, 2), dtype=int)}, "data.npz: labels is int64 (4, 2)"),
        ({"age": np.zeros((4, 2))}, "data.npz: age is float64 (4, 2); allowed: one number or text a row"),
        ({"sex": np.zeros(4)}, "data.npz: sex is float64 (4,); allowed: one whole number or text a row"),
        ({"scanner": np.array(["x"])}, "data.npz: scanner has 1 rows, images has 4"),
        ({"has_mask": np.ones(4, dtype=bool)}, "data.npz: has_mask is there, but masks is missing"),
        ({"has_mask": np.ones(3, dtype=bool), "masks": FOUR.astype(bool)}, "data.npz: has_mask has 3 rows, images has"),
        ({"has_mask": np.ones(4), "masks": FOUR.astype(bool)}, "data.npz: has_mask is float64 (4,); allowed: bool"),
        ({"patient_ids": None}, "data.npz: missing array: patient_ids"),
        ({"patient_ids": np.array(["p", "p", "q", ""])}, "data.npz row 3: the patient's id is empty"),
        ({"split": np.array(["train", "test", "test", "x"])}, "data.npz row 3: unknown split"),
        ({"patient_ids": np.array(["p", "p", "q", "q"])}, "data.npz row 3: this patient is in split 'test' here"),
        ({"label_names": np.array(["healthy", "tumour"])}, "data.npz row 1: the plan does not know this label"),
        ({key: FOUR[:0] if key == "images" else np.array([], dtype=int) for key in ("images", "labels", "patient_ids")}
         | {"split": None}, "the site has no usable image"),
    ],
)  # fmt: skip
def test_an_npz_that_cannot_serve(tmp_path: Path, plan: StudyPlan, arrays: dict[str, Any], problem: str) -> None:
    assert problem in refused(npz_site(tmp_path / "alder", **arrays), plan)[0]


def test_files_that_are_no_npz(tmp_path: Path, plan: StudyPlan) -> None:
    folder = npz_site(tmp_path / "alder")
    whole = (folder / "data.npz").read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        (folder / "data.npz").write_bytes(content)
        (told,) = refused(folder, plan)
        assert "not an npz file" in told
        assert told.endswith(" -- write it with numpy.savez_compressed")
    with (folder / "data.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    assert "not an npz file" in refused(folder, plan)[0]
    (folder / "data.npz").unlink()
    assert refused(folder, plan) == ["data.npz: there is no such file -- check the path"]


def test_medmnist_parts_must_match(tmp_path: Path, plan: StudyPlan) -> None:
    folder = npz_site(tmp_path / "alder")
    np.savez(folder / "data.npz", train_images=FOUR, train_labels=np.zeros(3, int), test_images=FOUR[:, :8])
    assert refused(folder, plan) == [
        "data.npz: test_images has no test_labels",
        "data.npz: train_images and train_labels differ in length",
        "data.npz: its parts hold images of different sizes",
    ]


def test_a_long_list_of_problems_is_cut(tmp_path: Path, plan: StudyPlan) -> None:
    lines = "".join(f"gone{i}.png,lesion,p{i}\n" for i in range(50))
    folder = manifest_site(tmp_path / "alder", "path,label,patient\n" + lines)
    found = refused(folder, plan)
    assert len(found) == 21
    assert found[-1] == ": and 30 more problems -- `consilium-site data check` lists all"
    assert len(check_site(folder, plan).problems) == 50


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "name: alder\nmanifest: m.csv\nnpz: d.npz\n" + BUDGET,
            "give exactly one of 'manifest' (a CSV file) and 'npz'",
        ),
        ("name: alder\n" + BUDGET, "give exactly one of 'manifest' (a CSV file) and 'npz'"),
        ("name: Alder!\nnpz: d.npz\n" + BUDGET, "site.yaml:1: name is 'Alder!': use lower-case letters"),
        (
            "name: alder\nnpz: ../d.npz\n" + BUDGET,
            "site.yaml:2: npz is '../d.npz': give a path inside the site's folder",
        ),
        ("name: alder\nnpz: d.npz\nstate: /root\n" + BUDGET, "site.yaml:3: state is '/root': give a path inside"),
        ("name: alder\nnpz: d.npz\n", "site.yaml:1: 'budget' is missing -- add it"),
        ("name: alder\nnpz: d.npz\nbudget: {epsilon: 0, delta: 2}\n", "site.yaml:3: budget.epsilon is 0"),
        ("name: alder\nnpz: d.npz\norientation: up\n" + BUDGET, "site.yaml:3: orientation is 'up'"),
        (
            "name: alder\nnpz: d.npz\ndevcie: cpu\n" + BUDGET,
            "site.yaml:3: unknown key 'devcie' -- did you mean 'device'?",
        ),
    ],
)
def test_a_site_file_that_cannot_serve(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(DataError) as caught:
        load_site_config(tmp_path)
    assert problem in str(caught.value)


def test_a_missing_site_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"site.yaml: there is no such file"):
        load_site_config(tmp_path)


def test_label_map_must_lead_to_labels_of_the_plan(tmp_path: Path, plan: StudyPlan) -> None:
    folder = manifest_site(tmp_path / "alder", site="manifest: manifest.csv\nlabel_map:\n  sick: lesoin\n")
    assert refused(folder, plan)[0].startswith(
        "site.yaml:4: 'lesoin' is no label of the plan -- did you mean 'lesion'?"
    )


def test_a_report_counts_labels_splits_and_patients(tmp_path: Path, plan: StudyPlan) -> None:
    report = check_site(manifest_site(tmp_path / "alder"), plan)
    assert report.fit
    assert [(c.label, c.split, c.images, c.patients) for c in report.counts] == [
        ("healthy", "test", 1, 1),
        ("healthy", "train", 1, 1),
        ("lesion", "train", 2, 1),
    ]
    assert (report.images, report.patients, report.training_patients) == (4, 3, 2)
    assert report.images_per_patient == (1, 1.33, 2)
    assert json.loads(json.dumps(report.to_json()))["fit"] is True


def test_a_report_without_a_plan_still_finds_what_is_broken(tmp_path: Path) -> None:
    folder = manifest_site(tmp_path / "alder", "path,label,patient\na.png,anything,p1\ngone.png,x,p2\n")
    report = check_site(folder)
    assert not report.fit
    assert report.images == 1
    assert [problem.where for problem in report.problems] == [f"{folder}/manifest.csv:3"]
    with pytest.raises(DataError, match=r"manifest.csv:3"):
        describe(folder)


@pytest.mark.realdata
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real images are not beside this checkout")
def test_a_real_medmnist_file(tmp_path: Path, plan: StudyPlan) -> None:
    folder = npz_site(tmp_path / "alder", site="label_map: {0: healthy, 1: lesion}\n")
    (folder / "data.npz").write_bytes((SHARED / "medmnist" / "pneumoniamnist.npz").read_bytes())
    data = load_site(folder, plan)
    assert len(data) == 4708 + 524 + 624
    assert data.split.count("test") == 624
