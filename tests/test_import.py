"""A folder of originals becomes a manifest: right rows, right pixels, and nothing in it that names a patient."""

from __future__ import annotations

import csv
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from client.cli import app
from client.data.convert import Job, convert_all
from client.data.imports import Choice, Imported, import_images
from client.data.origins import SEALED, find_origin
from client.data.pseudonyms import KEY_FILE, Pseudonyms
from client.data.readers import UnreadableImageError, read_image
from client.data.slices import SliceRule, parse_rule
from common.errors import DataError, UsageError
from tests.scans import compressed, dicom

nibabel = pytest.importorskip("nibabel", reason="the extra 'imaging' is not installed")

ROOT = Path(__file__).parents[1]
RAMP = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30)
AXIAL = [1, 0, 0, 0, 1, 0]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "site.yaml").write_text("name: alder\nmanifest: manifest.csv\nbudget: {epsilon: 10, delta: 0.001}\n")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "export").mkdir()
    return tmp_path / "export"


def rows(site: Path) -> list[dict[str, str]]:
    with (site / "manifest.csv").open() as file:
        return list(csv.DictReader(file))


def take(source: Path, site: Path, table: str = "", **choice: Any) -> Imported:
    labels = source.parent / "labels.csv"
    labels.write_text(table)
    return import_images(source, site, labels=labels if table else None, choice=Choice(**choice), processes=1)


def told(done: Imported) -> list[str]:
    return sorted(f"{Path(problem.where).name}: {problem.what}" for problem in done.left_out)


def series(folder: Path, count: int, *, name: str = "1.9", **attributes: Any) -> None:
    """Axial slices, 2 mm apart, the grey of each its place from the feet; file names say nothing of their order."""
    for z in range(count):
        pixels = np.full((20, 30), 10 * z, dtype=np.uint8)
        place = {"ImageOrientationPatient": AXIAL, "ImagePositionPatient": [0, 0, 2 * z]}
        dicom(folder / f"IM{(3 * z) % count:04d}", pixels, SeriesInstanceUID=name, **place, **attributes)


SECRETS = {
    "PatientName": "Zebulon^Quirke",
    "PatientID": "MRN-4711-XQ",
    "OtherPatientIDs": "OTHER-9182",
    "PatientBirthDate": "19530607",
    "AccessionNumber": "ACC55501",
    "StudyDate": "20210908",
    "StudyTime": "101112",
    "ReferringPhysicianName": "Doktor^Wessel",
    "InstitutionName": "Saint Nowhere",
    "StationName": "WARD7PC",
    "StudyDescription": "Quirke knee",
    "SeriesInstanceUID": "1.2.840.999.5",
    "StudyInstanceUID": "1.2.840.999.4",
    "StudyID": "STUDY808",
    "PatientAddress": "Elm Street 5",
    "ImageComments": "Mr Quirke again",
}


def test_nothing_that_is_written_names_a_patient(source: Path, site: Path) -> None:
    dicom(source / "Quirke_Zebulon" / "MRN-4711-XQ.dcm", RAMP, **SECRETS)
    info = Image.Exif()
    info[0x010E] = "Zebulon Quirke"
    (source / "MRN-4711-XQ").mkdir()
    Image.fromarray(RAMP.astype(np.uint8)).save(source / "MRN-4711-XQ" / "Quirke.jpg", exif=info)
    volume = nibabel.Nifti1Image(np.zeros((9, 9, 2), dtype=np.int16), np.eye(4))
    volume.header["descrip"] = b"Zebulon Quirke"
    nibabel.save(volume, source / "MRN-4711-XQ" / "Quirke.nii.gz")
    done = take(source, site, patients_by_folder=True)
    assert (done.images, done.patients, done.left_out) == (4, 1, ())
    planted = {*SECRETS.values(), "Zebulon", "Quirke", "4711", "1953", "2021", "Doktor", "Wessel", "1.2.840", "export"}
    for path in site.rglob("*"):
        written = (path.relative_to(site).as_posix() + "\n").encode() + (path.read_bytes() if path.is_file() else b"")
        assert not [secret for secret in planted if secret.lower().encode() in written.lower()], path
    for row in rows(site):
        Image.open(site / row["path"]).load()
        assert Image.open(site / row["path"]).info == {}


def test_a_planted_name_would_be_seen(source: Path, site: Path) -> None:
    """The test above, on a manifest that keeps the name of the file."""
    dicom(source / "Quirke.dcm", RAMP)
    take(source, site)
    (site / "manifest.csv").write_text((site / "manifest.csv").read_text() + "images/Quirke.png,,x,,,,,,,\n")
    assert any(b"Quirke" in path.read_bytes() for path in site.rglob("*") if path.is_file())


def test_an_image_leads_back_to_its_original_with_the_key_alone(source: Path, site: Path, tmp_path: Path) -> None:
    mask = np.zeros((20, 30), dtype=np.uint8)
    dicom(source / "Quirke" / "film", np.stack([RAMP, RAMP + 300]))
    for name, pixels in (("b.png", RAMP.astype(np.uint8)), ("b_mask.png", mask)):
        Image.fromarray(pixels).save(source / name)
    take(source, site, "file,patient,label,mask\nQuirke/film,,x,\nb.png,P2,x,b_mask.png\n")
    lines = rows(site)
    for number, row in enumerate(lines, start=2):
        for asked in (row["path"], f"{site}/manifest.csv:{number}", str(number), str(site / row["path"])):
            path, frame = find_origin(site, asked)
            assert f"-{frame:04d}.png" in row["path"]
            assert path in (source / "Quirke" / "film", source / "b.png")
        if row["mask"]:
            assert (path, find_origin(site, row["mask"])[0]) == (source / "b.png", source / "b_mask.png")
    printed = CliRunner().invoke(app, ["data", "origin", lines[0]["path"], "--site", str(site)])
    assert str(find_origin(site, lines[0]["path"])[0]) in printed.output
    sealed = site / "state" / SEALED
    assert b"Quirke" not in sealed.read_bytes()
    for asked in ("own.png", "images/ab/cd-0000.png"):
        with pytest.raises(DataError, match="import again"):
            find_origin(site, asked)
    with pytest.raises(DataError, match="no such line"):
        find_origin(site, "manifest.csv:99")
    (site / "state" / KEY_FILE).write_bytes(bytes(32))
    with pytest.raises(DataError, match="sealed under another key"):
        find_origin(site, lines[0]["path"])


def test_the_pages_of_a_tiff_are_slices_by_rule(source: Path, site: Path) -> None:
    pages = [Image.fromarray(RAMP + 1000 * page) for page in range(4)]
    pages[0].save(source / "stack.tif", save_all=True, append_images=pages[1:])
    marks = [Image.fromarray(np.full((20, 30), page % 2, dtype=np.uint8)) for page in range(4)]
    marks[0].save(source / "marks.tif", save_all=True, append_images=marks[1:])
    table = "file,patient,mask\nstack.tif,P1,marks.tif\n"
    assert take(source, site, table, rule=parse_rule("mask")).images == 2
    top = 3000 + int(RAMP.max())
    for row in rows(site):
        page = int(row["path"][-8:-4])
        assert page in (1, 3)
        expected = np.rint((RAMP + 1000.0 * page) * (255 / top)).astype(np.uint8)
        np.testing.assert_array_equal(read_image(site / row["path"]), expected)  # one window for all pages
        assert read_image(site / row["mask"]).max() == 1
    pages[0].resize((9, 9)).save(source / "pyramid.tif", save_all=True, append_images=pages[1:2])
    (done,) = take(source, site, table + "pyramid.tif,P1,\n", rule=parse_rule("mask")).left_out
    assert done.what.startswith("the table has no label")
    done = take(source, site, "file,patient,label\nstack.tif,P1,x\npyramid.tif,P1,x\n")
    assert done.images == 4
    assert [p.what for p in done.left_out if "pyramid" in p.where] == [
        "its 2 pages are of different sizes or kinds, no slices of one stack; save the one that is meant alone"
    ]


def test_a_nifti_of_several_volumes_is_not_one_of_them(source: Path, site: Path) -> None:
    for name, shape in (("series.nii", (8, 8, 3, 5)), ("one.nii", (8, 8, 3, 1))):
        nibabel.save(nibabel.Nifti1Image(np.ones(shape, dtype=np.int16), np.eye(4)), source / name)
    done = take(source, site, "file,patient,label\nseries.nii,P1,x\none.nii,P1,x\n")
    assert done.images == 3
    (problem,) = (problem for problem in done.left_out if "series.nii" in problem.where)
    assert problem.what.startswith("the file holds 5 volumes, in time or of several contrasts; write the one")


def test_the_key_is_the_owners_alone_and_pseudonyms_are_keyed(source: Path, site: Path, tmp_path: Path) -> None:
    dicom(source / "a", RAMP, PatientID=" mrn 1")
    dicom(source / "b", RAMP, PatientID="MRN  1")
    dicom(source / "c", RAMP, PatientID="MRN 2")
    done = take(source, site)
    assert done.patients == 2, "two spellings are one patient"
    key = site / "state" / KEY_FILE
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(key.read_bytes()) == 32
    here, elsewhere = Pseudonyms(key.read_bytes()), Pseudonyms(bytes(32))
    assert {row["patient"] for row in rows(site)} == {here.patient("mrn 1"), here.patient("MRN 2")}
    assert here.patient("mrn 1") != elsewhere.patient("mrn 1"), "another site's pseudonym is another"
    key.chmod(0o644)
    with pytest.raises(UsageError, match="others can read"):
        take(source, site)


def test_labels_come_by_file_series_study_and_patient_the_nearest_first(source: Path, site: Path) -> None:
    for name, series_uid, study, patient in (
        ("a", "1.1", "2.1", "P1"), ("b", "1.2", "2.1", "P1"), ("c", "1.3", "2.1", "P1"), ("d", "1.4", "2.3", "P1"),
        ("e", "1.5", "2.9", "P2"),
    ):  # fmt: skip
        pixels = RAMP + ord(name)
        dicom(source / name, pixels, SeriesInstanceUID=series_uid, StudyInstanceUID=study, PatientID=patient,
              BitsStored=16, WindowCenter=ord(name) + 300, WindowWidth=600)  # fmt: skip
    table = (
        "file,series,study,patient,label,split,age\n"
        ",,,P1,of patient,test,44\n,,2.1,,of study,,\n,1.2,,,of series,,\na,,,,of file,,\n"
        "gone,,,,x,,\n"
    )
    done = take(source, site, table)
    assert told(done) == ["e: the table has no label for it", "labels.csv:6: nothing that was found is what this line "
                          "names"]  # fmt: skip
    assert sorted(row["label"] for row in rows(site)) == ["of file", "of patient", "of series", "of study"]
    assert {(row["split"], row["age"]) for row in rows(site)} == {("test", "44")}, "of the patient's line"


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("name,label\n", "no column says what the labels are of"),
        ("file,label\na,x\na,y\n", "labels.csv:3: it contradicts line 2"),
        ("file,label\n,x\n", "labels.csv:2: it says not what it is of"),
        ("file,label,split\na,x,later\n", "labels.csv:2: unknown split"),
        ('file,label\n"a,x\n', "cannot be read as a CSV file"),
    ],
    ids=["columns", "contradiction", "nothing", "split", "quote"],
)
def test_a_table_that_cannot_serve(source: Path, site: Path, table: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        take(source, site, table)


@pytest.mark.parametrize(
    ("rule", "greys"),
    [("every:1", [0, 10, 20, 30, 40, 50, 60]), ("every:3", [0, 30, 60]), ("index:0,6,9", [0, 60]), ("middle", [30])],
)
def test_a_series_is_a_volume_in_the_patients_own_order(source: Path, site: Path, rule: str, greys: list[int]) -> None:
    series(source, 7)
    dicom(source / "film", np.full((20, 30), 200, dtype=np.uint8), SeriesInstanceUID="1.8")
    take(source, site, rule=parse_rule(rule))
    assert sorted(int(read_image(site / row["path"])[0, 0]) for row in rows(site)) == [*greys, 200]


@pytest.mark.parametrize(("rule", "taken"), [("mask", [3, 4]), ("mask:1", [2, 3, 4, 5])])
def test_slices_around_a_mask(source: Path, site: Path, rule: str, taken: list[int]) -> None:
    values, mask = np.zeros((12, 14, 8), dtype=np.uint8), np.zeros((12, 14, 8), dtype=np.uint8)
    values += np.arange(8, dtype=np.uint8) * 10
    mask[3, 2:4, 3:5] = 2
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), source / "brain.nii.gz")
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), source / "brain_mask.nii.gz")
    done = take(source, site, "file,patient,mask\nbrain.nii.gz,P1,brain_mask.nii.gz\n", rule=parse_rule(rule))
    assert (done.images, done.left_out) == (len(taken), ())
    found = {int(read_image(site / row["path"])[0, 0]): read_image(site / row["mask"]) for row in rows(site)}
    assert sorted(found) == [10 * z for z in taken]
    assert found[30][10:12, 8].tolist() == [2, 2], "it lies where its image lies"


def test_masks_of_another_size_or_place_are_told(source: Path, site: Path) -> None:
    for name, size, steps in (("a", 8, 1), ("b", 9, 1), ("c", 8, 2)):
        image = np.ones((8, 8, 4), dtype=np.uint8)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), source / f"{name}.nii")
        mask = nibabel.Nifti1Image(np.ones((size, 8, 4), dtype=np.uint8), np.diag([steps, 1, 1, 1.0]))
        nibabel.save(mask, source / f"{name}_mask.nii")
    table = "file,patient,mask\n" + "".join(f"{n}.nii,P{n},{n}_mask.nii\n" for n in "abc") + "a.nii,Pa,a_mask.nii\n"
    assert told(take(source, site, table)) == [
        "b.nii: its mask is 9x8 pixels, it is 8x8",
        "c.nii: its mask: the mask lies elsewhere than its image: their affines differ",
    ]


def test_bad_files_are_named_and_left_out(source: Path, site: Path) -> None:
    dicom(source / "good", RAMP)
    uid = "1.2.3.77"
    for name in ("twin-1", "twin-2"):
        dicom(source / name, RAMP, SOPInstanceUID=uid)
    cut = dicom(source / "cut", RAMP)
    cut.write_bytes(cut.read_bytes()[:-300])
    dicom(source / "anonymous", RAMP, PatientID="")
    dicom(source / "drawn", RAMP, BurnedInAnnotation="YES")
    dicom(source / "seg", RAMP, Modality="SEG")
    (source / "letter.txt").write_text("dear colleague")
    (source / "empty").touch()
    (source / "link").symlink_to(source / "good")
    os.mkfifo(source / "pipe")
    Image.fromarray(RAMP.astype(np.uint8)).save(source / "whose.png")
    done = take(source, site)
    assert done.images == 2
    assert told(done) == [
        "anonymous: whose image it is is not known",
        "cut: its pixels are damaged, missing, or of a kind that is not decoded",
        "drawn: it says that a text was drawn into its pixels",
        "empty: it is no image",
        "letter.txt: it is no image",
        "link: it is a link, or no ordinary file",
        "pipe: it is a link, or no ordinary file",
        "seg: it is a segmentation object, no picture",
        "twin-2: the same image is in another file too",
        "whose.png: whose image it is is not known",
    ]
    assert all(problem.remedy for problem in done.left_out)
    assert take(source, site, keep_burnt_in=True).images == 3


def test_of_two_copies_the_whole_one_is_taken(source: Path, site: Path) -> None:
    whole = dicom(source / "second", RAMP, PatientID="1")
    (source / "first").write_bytes(whole.read_bytes()[:-500])
    done = take(source, site)
    assert (done.images, told(done)) == (1, ["first: the same image is in another file too"])


def crash(job: Job) -> tuple[int, ...]:
    if "bad" in job.path.name:
        os.kill(os.getpid(), signal.SIGSEGV)
    return job.frames


def test_a_decoder_that_crashes_takes_nobody_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.data.convert.convert", crash)
    names = ["a", "bad-1", "b", "bad-2", "c", "d"]
    jobs = [Job(tmp_path / n, "picture", (0,), 1, False, SliceRule(), tmp_path / n) for n in names]
    done = {job.path.name: outcome for job, outcome in convert_all(jobs, 1)}
    assert len(done) == len(names)
    for name, outcome in done.items():
        assert isinstance(outcome, UnreadableImageError) == ("bad" in name), name


def test_again_writes_nothing_anew_and_a_changed_file_is_read_again(source: Path, site: Path) -> None:
    for name in "abc":
        dicom(source / name, RAMP + ord(name), PatientID=name)
    take(source, site, test_fraction=0.5)
    first, table = {p: p.stat().st_mtime_ns for p in site.rglob("*.png")}, (site / "manifest.csv").read_bytes()
    take(source, site, test_fraction=0.5)
    assert {p: p.stat().st_mtime_ns for p in site.rglob("*.png")} == first
    assert (site / "manifest.csv").read_bytes() == table
    dicom(source / "b", RAMP[::-1].copy(), PatientID="b")
    (source / "c").unlink()
    take(source, site, test_fraction=0.5)
    now = {p: p.stat().st_mtime_ns for p in site.rglob("*.png")}
    assert len(now) == 2
    assert len(now.keys() & first.keys()) == 1, "a is as it was, b has another name, c is gone"


def test_rows_from_elsewhere_stay(source: Path, site: Path, tmp_path: Path) -> None:
    (site / "manifest.csv").write_text("path,label,patient,ward\nown.png,lesion,p1,7\n")
    dicom(source / "a", RAMP, PatientID="A")
    take(source, site)
    other = tmp_path / "second"
    dicom(other / "a", RAMP.T.copy(), PatientID="A")
    for _ in range(2):
        take(other, site)
    assert [row["ward"] for row in rows(site)].count("7") == 1
    assert len(rows(site)) == 3
    assert len({row["patient"] for row in rows(site)}) == 2, "the same patient in both exports"


def test_a_patient_is_in_one_split_whatever_else_is_imported(source: Path, site: Path) -> None:
    for patient in range(40):
        for view in range(2):
            dicom(source / f"{patient}-{view}", RAMP[:8, :8].copy(), PatientID=str(patient))
    take(source, site, test_fraction=0.3)
    splits = {(row["patient"], row["split"]) for row in rows(site)}
    assert len(splits) == 40
    assert 4 <= sum(split == "test" for _, split in splits) <= 22, "12 of 40, within 3.4 standard deviations"


def test_the_cause_of_an_empty_import_is_told(source: Path, site: Path) -> None:
    (source / "letter.txt").write_text("dear colleague")
    with pytest.raises(DataError, match=r"letter.txt: it is no image(.|\n)*no image was found"):
        take(source, site)
    assert not (site / "manifest.csv").exists()


def test_without_the_extra_the_command_says_so_once(source: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dicom(source / "a", RAMP)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"^DICOM and NIfTI need the extra"):
        take(source, site)


@pytest.mark.parametrize("text", ["every:0", "every:x", "index:-1", "mask:-1", "often", "index:"])
def test_rules_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is no rule"):
        parse_rule(text)


def test_the_command_imports_compressed_films_with_a_window(source: Path, site: Path) -> None:
    plain = dicom(source.parent / "film", RAMP, PixelSpacing=[0.5, 0.7], Manufacturer="Acme", PatientSex="F")
    for syntax in ("jpeg", "jpeg-ls", "jpeg-2000", "rle"):
        compressed(plain, syntax).rename(source / syntax)
    result = CliRunner().invoke(
        app, ["data", "import", str(source), "--site", str(site), "--window", "300,600", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"images": 1, "patients": 1, "left_out": 3}, "one image in four syntaxes"
    assert "the same image is in another file too" in result.stderr
    (row,) = rows(site)
    assert (row["scanner"], row["sex"], row["spacing_mm"]) == ("Acme", "F", "0.5x0.7")
    expected = np.rint(np.clip((RAMP - 299.5) / 599 + 0.5, 0, 1) * 255)
    np.testing.assert_array_equal(read_image(site / row["path"]), expected)
    wrong = CliRunner().invoke(app, ["data", "import", str(source), "--site", str(site), "--window", "3"])
    assert isinstance(wrong.exception, UsageError)


def test_stopped_by_a_person_the_same_command_goes_on(source: Path, site: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (700, 700), dtype=np.uint16)
    for index in range(30):
        dicom(source / str(index), pixels + index, PatientID=str(index))
    command = [
        sys.executable,
        "-m",
        "client.cli",
        "data",
        "import",
        str(source),
        "--site",
        str(site),
        "--processes",
        "1",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(site.rglob("*.png"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(timeout=60) == 130, process.stderr
    kept = {path: path.stat().st_mtime_ns for path in site.rglob("*.png") if not path.name.startswith(".")}
    assert 3 <= len(kept) < 30
    assert not (site / "manifest.csv").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "30+ images of 30+ patients; left out: 0")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "they were not written again"
    assert len(list(site.rglob("*.png"))) == len(list((site / "images").rglob("*"))) - 1 == 30
