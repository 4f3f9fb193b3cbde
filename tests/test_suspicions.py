"""`data check` points a person at copies across patients, empty images and drawn text, and draws a contact sheet."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from typer.testing import CliRunner

from client.cli import app
from client.data.phantoms import draw_hospital
from client.data.phantoms.profiles import PROFILES
from client.data.rows import Row
from client.data.sheet import Sheet
from client.data.suspicions import Suspicions, has_text

SHARED = Path(__file__).parents[2] / "shared" / "data"


def body(seed: int, size: int = 160) -> np.ndarray:
    """A smooth random image, uint8 (size, size), unlike that of any other seed."""
    coarse = np.random.default_rng(seed).integers(0, 200, (12, 12), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def row(number: int, pixels: np.ndarray, patient: str, mask: np.ndarray | None = None) -> Row:
    return Row(f"manifest.csv:{number}", pixels, "lesion", patient, "train", mask)


def seen(*rows: Row) -> list[str]:
    suspicions = Suspicions()
    for each in rows:
        suspicions.look(each)
    assert all(problem.remedy for problem in suspicions.all())
    return [f"{problem.where}: {problem.what}" for problem in suspicions.all()]


def jpeg(pixels: np.ndarray) -> np.ndarray:
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "JPEG", quality=60)
    return np.asarray(Image.open(packed))


ALTERED = {
    "jpeg": jpeg,
    "shrunk": lambda pixels: np.asarray(Image.fromarray(pixels).resize((97, 97))),
    "dimmed": lambda pixels: (pixels * 0.7 + 20).astype(np.uint8),
    "coloured": lambda pixels: np.stack([pixels] * 3, axis=2),
}


def test_the_same_image_of_two_patients_is_told_once() -> None:
    images = [row(n, body(n), f"p{n}") for n in range(2, 40)]
    assert seen(*images) == []
    assert seen(*images, row(90, body(7), "other"), row(91, body(8), "p8")) == [
        "manifest.csv:90: the same image as manifest.csv:7, of another patient"
    ], "a copy of one's own image is no suspicion"


@pytest.mark.parametrize("how", ALTERED)
def test_an_altered_copy_is_told(how: str) -> None:
    images = [row(n, body(n), f"p{n}") for n in range(2, 9)]
    found = seen(*images, row(90, ALTERED[how](body(5)), "other"))
    assert found == ["manifest.csv:90: nearly the same image as manifest.csv:5, of another patient"]


@pytest.mark.parametrize("few", [1, 64], ids=["tables", "one by one"])
def test_copies_are_found_across_the_blocks_of_the_table_of_pairs(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.data.suspicions._AT_ONCE", 4)
    monkeypatch.setattr("client.data.suspicions._FEW", few)
    images = [row(n, body(n, 64), f"p{n}") for n in range(30)]
    found = seen(*images, *(row(100 + n, body(n, 64), f"copy{n}") for n in (0, 3, 4, 29)))
    assert [line.split(":")[1] for line in found] == ["100", "103", "104", "129"]


def every_pair_compared(pictures: np.ndarray, patients: list[str]) -> list[str]:
    """What the copies' definition says, word by word."""
    steps = (np.diff(pictures.astype(int), axis=2) > 0).reshape(len(pictures), -1)
    told = []
    for late in range(len(pictures)):
        for early in range(late):
            near = np.count_nonzero(steps[late] != steps[early]) <= 16 and patients[late] != patients[early]
            if near and np.corrcoef(pictures[late].ravel(), pictures[early].ravel())[0, 1] >= 0.98:
                same = (pictures[late] == pictures[early]).all()
                told.append(f"{late}: {'the same' if same else 'nearly the same'} image as {early}, of another patient")
                break
    return told


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 5, 40]), st.sampled_from([1, 6, 64]))
@settings(max_examples=25, deadline=None)
def test_what_is_told_is_what_comparing_all_pairs_tells(seed: int, people: int, few: int) -> None:
    rng = np.random.default_rng(seed)
    originals = rng.integers(0, 256, (6, 16, 17)) * (
        rng.random((6, 1, 17)) < 0.6
    )  # dark columns: bits that tell nothing
    noise = rng.normal(0, 1, (60, 16, 17)) * rng.choice([0, 0.5, 1, 2, 4, 8], (60, 1, 1))
    pictures = (originals[rng.integers(0, 6, 60)] + noise).clip(0, 255).astype(np.uint8)
    patients = [f"p{n}" for n in rng.integers(0, people, 60)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("client.data.suspicions._FEW", few)
        found = seen(*(row(n, pictures[n], patients[n]) for n in range(60)))
    assert [line.removeprefix("manifest.csv:").replace("manifest.csv:", "") for line in found] == every_pair_compared(
        pictures, patients
    )


def test_empty_images_are_told_and_are_nobodys_copies() -> None:
    flat = np.full((64, 64), 90, dtype=np.uint8)
    faint = flat + np.random.default_rng(0).integers(0, 2, (64, 64), dtype=np.uint8)
    assert seen(row(2, flat, "a"), row(3, flat, "b"), row(4, faint, "c")) == [
        "manifest.csv:2: every pixel has the same value",
        "manifest.csv:3: every pixel has the same value",
        "manifest.csv:4: the image is almost empty",
    ]


@pytest.mark.parametrize("letters", [10, 14, 20, 32])
@pytest.mark.parametrize("coloured", [False, True], ids=["grey", "yellow"])
def test_drawn_text_is_seen(letters: int, coloured: bool) -> None:
    picture = Image.fromarray(body(1, 320) // 3).convert("RGB")
    assert not has_text(np.asarray(picture))
    ink = (255, 255, 0) if coloured else (255, 255, 255)
    ImageDraw.Draw(picture).text((8, 200), "DOE JANE 12.03.1961", fill=ink, font=ImageFont.load_default(letters))
    assert has_text(np.asarray(picture if coloured else picture.convert("L")))
    (told,) = seen(row(2, np.asarray(picture), "a"))
    assert "letters seem to be drawn" in told


@pytest.mark.parametrize("profile", PROFILES)
def test_phantoms_hold_no_text(profile: str) -> None:
    images = draw_hospital(profile, patients=3, image_size=160, channels=1, seed=1).images
    assert not any(has_text(pixels) for pixels in images)


@pytest.mark.realdata
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real images are not beside this checkout")
def test_real_films_of_different_patients_are_no_copies_and_one_scans_neighbours_are() -> None:
    for name, expected in (("cxr_four_hospitals", 0), ("nih_cxr_normal_abnormal", 0), ("brain_tumor_mri", 6)):
        table = np.load(SHARED / f"{name}.npz")
        images, patients = table["images"], table["patient_ids"]
        found = seen(*(row(n, images[n], str(patients[n])) for n in range(500)))
        assert len(found) == 0 if expected == 0 else len(found) >= expected, name


def test_a_sheet_shows_every_label_and_outlines_masks(tmp_path: Path) -> None:
    mask = np.zeros((160, 160), dtype=np.uint8)
    mask[40:80, 40:80] = 1
    sheet = Sheet()
    for n in range(30):
        sheet.look(row(n, body(n), f"p{n}", mask))
    sheet.look(Row("data.npz row 3", np.zeros((20, 40, 3), dtype=np.uint8), "", "p", "test", None))
    sheet.write(tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    outlined = (pixels == (255, 90, 0)).all(axis=2)
    assert pixels.shape[1] == 8 * 158 + 8
    assert outlined.sum() == 8 * 4 * 37, "eight pictures, in each the border of a square of 38 pixels"
    assert outlined[: pixels.shape[0] // 2].sum() == 0, "images without a label come first, and have no mask here"


def test_the_command_tells_suspicions_and_the_site_stays_fit(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("name: alder\nmanifest: manifest.csv\nbudget: {epsilon: 10, delta: 0.001}\n")
    for n, seed in enumerate((1, 2, 1)):
        Image.fromarray(body(seed)).save(tmp_path / f"{n}.png")
    lines = [f"{n}.png,lesion,SECRET{n}\n" for n in range(3)]
    (tmp_path / "manifest.csv").write_text("path,label,patient\n" + "".join(lines))
    command = ["data", "check", str(tmp_path), "--sheet", str(tmp_path / "sheet.png")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert "manifest.csv:4: the same image as" in result.stderr
    assert "SECRET" not in result.output
    assert "fit for use" in result.stdout
    assert Image.open(tmp_path / "sheet.png").size[0] > 1000
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert told["fit"]
    assert len(told["suspicions"]) == 1
