"""Cutting data sets into hospitals: patients stay whole, folders are whole or absent, the seed decides everything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from client.data import site_folder
from client.data.checks import describe
from client.data.cutting import make_sites
from client.data.load import load_images
from client.site import load_site_config
from common.errors import DataError
from server.cli import app

REAL = Path(__file__).parents[2] / "shared" / "data" / "cxr_four_hospitals.npz"


def data_set(path: Path, *, patients: int = 40, start: int = 0, **more: Any) -> Path:
    """`patients` of 3 images each, labels well/ill by turns, sites north/south by halves; the image holds its row."""
    ids = np.repeat(np.arange(start, start + patients), 3)
    images = (np.arange(3 * patients) % 256).astype(np.uint8)[:, None, None] * np.ones((1, 16, 16), np.uint8)
    columns = {
        "images": images,
        "labels": ids % 2,
        "label_names": np.array(["well", "ill"]),
        "patient_ids": np.char.add("p", ids.astype(str)),
        "site": np.where(ids - start < patients // 2, "North Hospital", "south"),
        "masks": (images > 50).astype(np.uint8),
    }
    np.savez(path, **{name: value for name, value in (columns | more).items() if value is not None})
    return path


def patients_of(folder: Path) -> dict[str, str]:
    """Pseudonym -> split."""
    with np.load(folder / "data.npz", allow_pickle=False) as arrays:
        pairs = set(zip(arrays["patient_ids"].tolist(), arrays["split"].tolist(), strict=True))
    assert len(pairs) == len({patient for patient, _ in pairs}), "a patient is in one split only"
    return dict(pairs)


def test_by_site_column(tmp_path: Path) -> None:
    source = data_set(tmp_path / "set.npz")
    folders = make_sites(tmp_path / "out", [source], by="site", test_fraction=0.25)
    assert [folder.name for folder in folders] == ["north-hospital", "south"]
    north, south = (patients_of(folder) for folder in folders)
    assert len(north) == len(south) == 20
    assert not north.keys() & south.keys()
    assert list(north.values()).count("test") == 4  # 2 of the 10 of each label
    report = describe(folders[0])
    tests = {count.label: count.patients for count in report.counts if count.split == "test"}
    assert tests == {"well": 2, "ill": 2}, "every label has test patients"
    config = load_site_config(folders[0])
    assert (config.name, config.npz, config.phantom) == ("north-hospital", "data.npz", False)
    assert config.budget.delta == pytest.approx(1 / (10 * 16), rel=0.01)


def test_each_row_keeps_its_label_patient_and_mask(tmp_path: Path) -> None:
    source = data_set(tmp_path / "set.npz")
    (folder,) = make_sites(tmp_path / "out", [source], by="dataset", names=["oak"])
    with np.load(folder / "data.npz") as cut, np.load(source) as whole:
        row = cut["images"][:, 0, 0].astype(int)
        np.testing.assert_array_equal(cut["labels"], whole["labels"][row])
        np.testing.assert_array_equal(cut["patient_ids"], whole["patient_ids"][row])
        np.testing.assert_array_equal(cut["masks"], whole["masks"][row])
        assert cut["label_names"].tolist() == ["well", "ill"]


@given(
    sites=st.integers(1, 5), alpha=st.floats(0.02, 50), seed=st.integers(0, 1000), public=st.sampled_from([0.0, 0.3])
)
@settings(max_examples=8, deadline=None)
def test_a_dirichlet_split_shares_no_patient(
    tmp_path_factory: pytest.TempPathFactory, sites: int, alpha: float, seed: int, public: float
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    source = data_set(folder / "set.npz")
    made = make_sites(
        folder / "out", [source], by="dirichlet", sites=sites, alpha=alpha, seed=seed, public_fraction=public
    )
    owners = [patient for site in made for patient in patients_of(site)]
    assert len(owners) == len(set(owners)) == 40, "every patient once, public or in one hospital"
    hospitals = [site for site in made if site.parent.name != "public"]
    assert len(hospitals) == sites
    for site in hospitals if not public else ():
        found = {(count.label, count.split) for count in describe(site).counts}
        assert len(found) == 4, "however small alpha is, each hospital has both labels, to train and to test"


def test_a_small_alpha_skews_the_labels(tmp_path: Path) -> None:
    source = data_set(tmp_path / "set.npz", patients=200)

    def skew(alpha: float) -> float:
        made = make_sites(tmp_path / str(alpha), [source], by="dirichlet", sites=4, alpha=alpha, seed=1)
        shares = []
        for folder in made:
            with np.load(folder / "data.npz") as arrays:
                shares.append(arrays["labels"].mean())
        return float(np.std(shares))

    assert skew(0.3) > 3 * skew(100.0)


def test_public_patients_are_in_no_hospital(tmp_path: Path) -> None:
    made = make_sites(tmp_path / "out", [data_set(tmp_path / "set.npz")], by="dataset", public_fraction=0.3)
    public, own = (patients_of(folder) for folder in made)
    assert made[0] == tmp_path / "out" / "public" / "set"
    assert len(public) == 12
    assert set(public.values()) == {"train"}
    assert not public.keys() & own.keys()


def test_a_data_set_may_be_wholly_public(tmp_path: Path) -> None:
    made = make_sites(tmp_path / "out", [data_set(tmp_path / "set.npz")], by="dataset", public_fraction=1.0)
    assert made == [tmp_path / "out" / "public" / "set"]
    assert len(load_images(made[0], image_size=16, channels=1)) == 120


def test_one_hospital_of_a_pooled_file_renamed_and_limited(tmp_path: Path) -> None:
    (folder,) = make_sites(
        tmp_path / "out", [data_set(tmp_path / "set.npz")], by="site", only="south", names=["oak"], limit_per_class=9
    )
    report = describe(folder)
    assert report.site == "oak"
    by_label = {name: sum(c.images for c in report.counts if c.label == name) for name in ("well", "ill")}
    assert by_label == {"well": 9, "ill": 9}
    assert report.images_per_patient == (3, 3.0, 3), "whole patients are taken"


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    source = data_set(tmp_path / "set.npz")
    contents = [
        (make_sites(tmp_path / name, [source], by="dataset", seed=seed)[0] / "data.npz").read_bytes()
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_pngs_hold_the_same(tmp_path: Path) -> None:
    source = data_set(tmp_path / "set.npz")
    (as_npz,) = make_sites(tmp_path / "npz", [source], by="dataset")
    (as_png,) = make_sites(tmp_path / "png", [source], by="dataset", format="png")
    first, second = (load_images(folder, image_size=16, channels=1) for folder in (as_npz, as_png))
    assert second.images.equal(first.images)
    assert second.split == first.split
    assert [second.label_names[i] for i in second.labels] == [first.label_names[i] for i in first.labels]
    assert second.masks is not None
    assert first.masks is not None
    assert second.masks.equal(first.masks)


DETAILS = {
    "modality": np.full(120, "CT"),
    "age": np.where(np.arange(120) % 3 == 0, np.nan, np.arange(120) / 2),
    "sex": np.array(["F", "M", ""])[np.arange(120) % 3],
    "scanner": np.full(120, ""),
}


@pytest.mark.parametrize("form", ["npz", "png"])
def test_what_is_known_of_an_image_goes_with_it(tmp_path: Path, form: Any) -> None:
    source = data_set(tmp_path / "set.npz", **DETAILS)
    made = make_sites(
        tmp_path / "out", [source], by="dirichlet", sites=2, public_fraction=0.2, limit_per_class=20, format=form
    )
    assert len(made) == 4
    for folder in made:
        data = load_images(folder, image_size=16, channels=1)
        rows = data.images[:, 0, 0, 0].tolist()
        assert [d.modality for d in data.details] == ["CT"] * len(rows)
        assert [d.sex for d in data.details] == DETAILS["sex"][rows].tolist()
        np.testing.assert_array_equal([d.age for d in data.details], DETAILS["age"][rows])
        columns = np.load(folder / "data.npz").files if form == "npz" else (folder / "manifest.csv").read_text()
        assert "age" in columns
        assert "scanner" not in columns, "of which nothing is known"


HAS_MASK = np.arange(120) % 4 > 0


@pytest.mark.parametrize("form", ["npz", "png"])
def test_a_row_without_a_mask_stays_without(tmp_path: Path, form: Any, make_plan: Callable[..., Any]) -> None:
    source = data_set(tmp_path / "set.npz", has_mask=HAS_MASK)
    (folder,) = make_sites(tmp_path / "out", [source], by="dataset", format=form)
    assert describe(folder).masks == 90
    assert load_images(folder, image_size=16, channels=1).masks is None


@pytest.mark.parametrize("form", ["npz", "png"])
def test_rows_without_a_mask_can_be_left_out(tmp_path: Path, form: Any) -> None:
    source, said = data_set(tmp_path / "set.npz", has_mask=HAS_MASK), list[str]()
    wish: dict[str, Any] = {"by": "site", "only": "south", "masked_only": True, "say": said.append}
    (folder,) = make_sites(tmp_path / "out", [source], format=form, **wish)
    assert said == [f"{source}: 15 of 60 images have no mask and are left out"]
    data = load_images(folder, image_size=16, channels=1)
    rows = data.images[:, 0, 0, 0].numpy()
    assert len(rows) == 45
    assert HAS_MASK[rows].all()
    assert data.masks is not None
    np.testing.assert_array_equal(data.masks[:, 0, 0], rows > 50)


def test_no_mask_is_no_masked_site(tmp_path: Path) -> None:
    for columns in ({"masks": None}, {"has_mask": np.zeros(120, dtype=bool)}):
        with pytest.raises(DataError, match="no row has a mask -- give masks, or leave out --masked-only"):
            make_sites(tmp_path / "out", [data_set(tmp_path / "set.npz", **columns)], by="dataset", masked_only=True)


def test_the_command_passes_them_on(tmp_path: Path) -> None:
    source = str(data_set(tmp_path / "set.npz", has_mask=HAS_MASK))
    wish = ["sites", "make", source, "--by", "dataset", "--out", str(tmp_path / "out"), "--public-fraction", "0.2"]
    done = CliRunner().invoke(app, [*wish, "--masked-only", "--orientation", "free"])
    assert done.exit_code == 0, done.output
    assert "30 of 120 images have no mask and are left out" in done.output
    folders = [tmp_path / "out" / "set", tmp_path / "out" / "public" / "set"]
    assert [load_site_config(folder).orientation for folder in folders] == ["free", "free"]
    assert sum(describe(folder).images for folder in folders) == 90
    assert CliRunner().invoke(app, [*wish[:-3], str(tmp_path / "other")]).exit_code == 0
    assert load_site_config(tmp_path / "other" / "set").orientation == "fixed"


def test_nothing_is_overwritten_and_nothing_else_is_written(tmp_path: Path) -> None:
    source, out = data_set(tmp_path / "set.npz"), tmp_path / "out"
    (out / "south").mkdir(parents=True)
    (out / "south" / "kept").write_text("mine")
    (out / "north-hospital").mkdir()
    with pytest.raises(DataError, match=r"out/south: already exists and is not empty -- remove it, or choose another"):
        make_sites(out, [source], by="site")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "north-hospital", "out", "set.npz", "south"]
    (out / "south" / "kept").unlink()
    assert len(make_sites(out, [source], by="site")) == 2, "empty folders are no obstacle"


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = data_set(tmp_path / "set.npz")
    written: list[Path] = []

    def full(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device", str(path))
        path.write_bytes(content)

    monkeypatch.setattr(site_folder, "write_through", full)
    with pytest.raises(OSError, match="No space left"):
        make_sites(tmp_path / "out", [source], by="site")
    assert len(written) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["set.npz"]


@pytest.mark.parametrize(
    ("wish", "problem"),
    [
        ({"by": "site", "only": "west"}, "no row has site 'west' -- it has: North Hospital, south"),
        ({"by": "site", "names": ["oak"]}, "1 names for 2 hospitals -- in this order: north-hospital, south"),
        ({"by": "site", "names": ["oak", "oak"]}, "oak: this name is reserved or given to two hospitals"),
        ({"by": "dataset", "names": ["public"]}, "public: this name is reserved"),
        ({"by": "dataset", "names": ["Oak Tree"]}, "Oak Tree: no valid site name"),
        ({"by": "dirichlet", "sites": 39}, "40 patients are too few for 39 sites with two patients of two labels each"),
        ({"by": "dataset", "test_fraction": 1.0}, "test fraction is 1.0: give at least 0 and below 1"),
        ({"by": "dataset", "public_fraction": -1}, "public fraction is -1: give 0 to 1"),
        ({"by": "dirichlet", "alpha": 0}, "alpha is 0: give a number above 0"),
        ({"by": "dataset", "limit_per_class": 0}, "limit per class is 0: give at least 1"),
    ],
)
def test_wishes_that_cannot_be_met(tmp_path: Path, wish: dict[str, Any], problem: str) -> None:
    source = data_set(tmp_path / "set.npz")
    with pytest.raises(DataError) as caught:
        make_sites(tmp_path / "out", [source], **wish)
    assert problem in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "wish", "problem"),
    [
        ({"site": None}, {"by": "site"}, "has no 'site' column -- cut by data set or by Dirichlet split"),
        ({"labels": np.full(120, 7)}, {"by": "dataset"}, "row 0: the label's number is not below 2"),
        ({"labels": np.full(120, "odd")}, {"by": "dataset"}, "row 0: the label is not in label_names"),
        ({"age": np.full(120, "old")}, {"by": "dataset"}, "row 0: the age is no number of years from 0 to 130"),
        ({"images": np.full((120, 16, 16), np.inf)}, {"by": "dataset"}, "row 0: image: a pixel is NaN or infinite"),
    ],
)
def test_sources_that_cannot_serve(tmp_path: Path, columns: dict[str, Any], wish: Any, problem: str) -> None:
    source = data_set(tmp_path / "set.npz", **columns)
    with pytest.raises(DataError) as caught:
        make_sites(tmp_path / "out", [source], **wish)
    assert problem in str(caught.value)


def test_a_patient_in_two_hospitals_is_refused(tmp_path: Path) -> None:
    sources = [data_set(tmp_path / "one.npz"), data_set(tmp_path / "two.npz", start=37)]
    with pytest.raises(DataError, match="one and two: 3 patient ids are in both"):
        make_sites(tmp_path / "out", sources, by="dataset")
    moved = np.array(["north", "south"])[np.arange(120) % 2]
    with pytest.raises(DataError, match="north and south: 40 patient ids are in both"):
        make_sites(tmp_path / "out", [data_set(tmp_path / "three.npz", site=moved)], by="site")


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_file(), reason="the real images are not beside this checkout")
def test_four_real_hospitals(tmp_path: Path, make_plan: Callable[..., Any]) -> None:
    folders = make_sites(tmp_path, [REAL], by="site")
    assert [describe(folder).images for folder in folders] == [300, 138, 300, 300]
    assert describe(folders[1]).site == "montgomery_county_tb_program_us"
