"""From a meta-initialization to a tested, explained, exported model of a hospital's own question; on drawn images."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from client.adapt import Learned
from client.adapted_model import (
    FACTS,
    MODEL,
    PAGE,
    SUPPORT,
    AdaptedModel,
    Facts,
    Measured,
    Support,
    in_figures,
    load_adapted,
    read_facts,
    told,
)
from client.calibration import pooled, probabilities
from client.cli import app
from client.cross_validation import ARMS, META, RANDOM, SCRATCH, choose, cross_validate
from client.data.load import load_site
from client.data.phantoms import make_phantom_sites
from client.export import ONNX, ONNX_PACKAGES, check_onnx, export, model_card
from client.predict import ANSWERED, UNLIKE, UNSURE, Shown, _say, answer, predict
from client.question import own_question, read_start
from client.splits import most_folds, patient_folds
from client.subgroups import EVERYONE, groups_of, lead_estimate
from common.checkpoint import save_checkpoint
from common.errors import CheckpointError, DataError, RunError, UsageError
from common.metrics import (
    anomaly_metrics,
    classification_metrics,
    metrics_of,
    multilabel_metrics,
    segmentation_metrics,
)
from common.models import BODY, build_model, parameters
from common.params import digest, to_arrays
from common.plan import StudyPlan
from common.starting_point import outputs_of, starting
from common.trials import interval
from tests.readable import require_readable

STUDY: dict[str, Any] = {
    "study": "small",
    "task": {
        "kind": "classification",
        "image_size": 16,
        "label_sets": {"nodule": ["normal", "nodule"], "chest": ["normal", "nodule", "effusion"]},
    },
    "sites": {"alder": {"labels": "nodule", "patients": 10}},
    "model": {"name": "conv4", "width": 8},
    "rounds": 1,
    "quorum": 1,
    "privacy": {"epsilon": 8, "delta": 0.001},
    "evaluation": {"shots": [3], "splits": 2, "draws": 1, "adaptation": {"trainable": "head", "steps": 4, "lr": 1.0}},
}


def plan_of(**changes: Any) -> StudyPlan:
    return StudyPlan.model_validate(STUDY | changes)


def write_start(path: Path, plan: StudyPlan, /, **metadata: str) -> Path:
    body = parameters(build_model(plan.model, plan.task, ways=2, seed=3))
    save_checkpoint(path, {name: value for name, value in body.items() if name.startswith(BODY)}, metadata)
    return path


@pytest.fixture(scope="module", autouse=True)
def _short_training() -> Iterator[None]:
    """From scratch in few steps: what is tested here is who sees what."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("client.adapt._STEPS", 5)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drawn hospitals, a study and a start."""
    folder = tmp_path_factory.mktemp("hospital")
    make_phantom_sites(folder, names=("alder", "willow"), patients=30, image_size=16)
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    write_start(folder / "meta.safetensors", plan_of(), public="histology", images="100")
    return folder


def typed(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def adapted(place: Path) -> Path:
    before = sorted(path.relative_to(place) for path in (place / "willow").rglob("*"))
    command = ("adapt", place / "willow", "--from", place / "meta.safetensors", "--plan", place / "study.yaml")
    printed = typed(*command, "--labels", "chest", "--right", "0.4", "--out", place / "adapted")
    assert "Nothing left this hospital and nothing was charged" in printed
    assert "PHANTOMS" in printed
    assert "learned from public images alone (histology)" in printed
    after = sorted(path.relative_to(place) for path in (place / "willow").rglob("*"))
    assert before == after  # no ledger, no journal, no release
    return place / "adapted"


def test_adapt_writes_a_model_that_can_be_read_again(adapted: Path) -> None:
    assert {path.name for path in adapted.iterdir()} == {FACTS, MODEL, SUPPORT, PAGE}
    model = load_adapted(adapted)
    assert model.facts.label_names == ["normal", "nodule", "effusion"]
    assert model.facts.support_images == 9
    assert model.facts.folds == 5
    assert model.facts.model == digest(to_arrays(model.params))
    assert set(model.facts.metrics) == set(ARMS)
    assert set(model.facts.gains) == {RANDOM, SCRATCH}
    assert model.facts.temperature is not None
    assert model.facts.temperature > 0


def test_the_page_stands_alone_and_is_honest(adapted: Path) -> None:
    page = (adapted / PAGE).read_text()
    assert len(require_readable(page).all("table")) == 2
    facts = read_facts(adapted)
    assert told(facts) in page
    assert "Nothing left the hospital, and nothing was charged" in page
    assert "Not a medical device" in page
    assert page.count("data:image/png;base64,") == 8
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page


@pytest.mark.parametrize("change", ["weights", "support", "facts", "nothing"])
def test_an_adapted_model_in_pieces_is_refused(adapted: Path, tmp_path: Path, change: str) -> None:
    for file in adapted.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if change == "weights":
        params = {name: value + 1 for name, value in load_adapted(adapted).params.items()}
        save_checkpoint(tmp_path / MODEL, params, {})
    elif change == "support":
        save_checkpoint(tmp_path / SUPPORT, {"images": torch.zeros(1)}, {"model": read_facts(adapted).model})
    elif change == "facts":
        (tmp_path / FACTS).write_text("{}")
    else:
        (tmp_path / FACTS).unlink()
    with pytest.raises(CheckpointError, match="consilium-site adapt"):
        load_adapted(tmp_path)


def test_folds_part_the_patients_and_each_shows_every_label(place: Path) -> None:
    data = load_site(place / "willow", own_question(plan_of(), "willow", labels="chest", own=()))
    folds = patient_folds(data, 5, seed=0)
    asked = torch.cat([fold.query for fold in folds])
    assert asked.sort().values.tolist() == list(range(len(data)))
    for fold in folds:
        assert not set(data.patients[fold.support].tolist()) & set(data.patients[fold.query].tolist())
        assert set(data.labels[fold.query].tolist()) == {0, 1, 2}
    assert most_folds(data) == 10
    other = patient_folds(data, 5, seed=0, repeat=1)
    assert any(not torch.equal(a.query, b.query) for a, b in zip(folds, other, strict=True))


def test_no_patient_who_judges_was_in_a_support_set(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Support sets as they reach the adaptation and the training from scratch, against who is asked next."""
    plan = own_question(plan_of(), "willow", labels="chest", own=())
    data, seen = load_site(place / "willow", plan), []

    def spy(name: str, rows_at: int, patients_at: int | None) -> None:
        import client.cross_validation as module

        real = getattr(module, name)

        def told_on(*given: Any) -> Any:
            seen.append((name, given[rows_at] if patients_at is None else given[patients_at]))
            return real(*given)

        monkeypatch.setattr(module, name, told_on)

    spy("adapted_here", 1, None)
    spy("train", 3, None)
    spy("judge", 0, 3)
    start = read_start(place / "meta.safetensors", plan).params
    cross_validate(start, data, plan, shots=2, watch=lambda share, what: None)
    assert [name for name, _ in seen[:6]] == ["adapted_here", "judge", "adapted_here", "judge", "train", "judge"]
    first = [rows for name, rows in seen[:6] if name != "judge"]
    assert torch.equal(first[0], first[1])  # the same images for all
    assert torch.equal(first[0], first[2])
    for (_, rows), (name, query) in zip(seen[::2], seen[1::2], strict=True):
        assert name == "judge"
        assert len(rows) == 6
        assert not set(data.patients[rows].tolist()) & set(query.patients.tolist())


def test_rate_and_steps_are_chosen_on_the_support_set_alone(place: Path) -> None:
    """Whatever is true of all others, the choice is the same; and it does follow the support set."""
    plan = own_question(plan_of(), "willow", labels="chest", own=())
    data = load_site(place / "willow", plan)
    start = read_start(place / "meta.safetensors", plan).params
    rows = torch.cat([torch.nonzero(data.labels == label).flatten()[:12] for label in range(3)])
    others = torch.ones(len(data), dtype=torch.bool).index_fill(0, rows, False)
    labels, images = data.labels.clone(), data.images.clone()
    labels[others], images[others] = (labels[others] + 1) % 3, 0
    changed = replace(data, labels=labels, images=images)
    assert choose(Learned.of(start, data, plan), rows) == choose(Learned.of(start, changed, plan), rows)


@pytest.mark.parametrize(("learnable", "rate", "steps"), [(True, 3.0, 4), (False, 0.3, 1)], ids=["learnable", "noise"])
def test_the_choice_follows_what_can_be_learned(place: Path, learnable: bool, rate: float, steps: int) -> None:
    """Where the features tell the label, the longest way loses least; where they tell nothing, the shortest."""
    plan = own_question(plan_of(), "willow", labels=None, own=("a", "b"))
    patients = torch.arange(12)
    data = replace(
        load_site(place / "willow", own_question(plan_of(), "willow", labels="chest", own=())).rows(torch.arange(12)),
        patients=patients,
        patient_ids=tuple(f"p{i}" for i in range(12)),
        labels=patients % 2,
        label_names=("a", "b"),
    )
    network = build_model(plan.model, plan.task, ways=2)
    learned = Learned.of(parameters(network), data, plan)
    noise = torch.randn(12, learned.inputs.shape[1], generator=torch.Generator().manual_seed(5))
    signal = ((2.0 * data.labels - 1) / 6).unsqueeze(1).expand(noise.shape)
    spec = choose(replace(learned, inputs=signal if learnable else noise), torch.arange(12))
    assert (spec.lr, spec.steps) == (rate, steps)


def test_a_single_image_of_each_kind_leaves_the_plans_rate(place: Path) -> None:
    plan = own_question(plan_of(), "willow", labels="chest", own=())
    data = load_site(place / "willow", plan)
    rows = torch.cat([torch.nonzero(data.labels == label).flatten()[:1] for label in range(3)])
    learned = Learned.of(read_start(place / "meta.safetensors", plan).params, data, plan)
    assert choose(learned, rows) == plan.evaluation.adaptation


def test_overlapping_folds_widen_an_interval_by_the_known_factor() -> None:
    values = [0.1, 0.2, 0.4, 0.3]
    plain, wide = interval(values), interval(values, overlap=0.25)
    assert wide.mean == plain.mean
    assert (wide.high - wide.mean) / (plain.high - plain.mean) == pytest.approx(math.sqrt(1 + 4 * 0.25))


# what a start is


def test_a_round_is_completed_by_its_runs_start_and_says_its_privacy(tmp_path: Path) -> None:
    plan = plan_of()
    write_start(tmp_path / "initial.safetensors", plan)
    (tmp_path / "plan.json").write_text(plan.to_json())
    body = read_start(tmp_path / "initial.safetensors", plan).params
    name = next(name for name in body if body[name].dim() == 1)
    origin = {"plan": plan.digest, "initial": digest(to_arrays(body))}
    save_checkpoint(tmp_path / "round-0002.safetensors", {name: body[name] + 1}, origin)
    start = read_start(tmp_path, plan)
    assert torch.equal(start.params[name], body[name] + 1)
    assert start.params.keys() == body.keys()
    assert start.study == plan.digest
    assert "epsilon at most 8 at delta 0.001" in start.privacy
    assert "not known" in read_start(tmp_path / "initial.safetensors", plan).privacy

    write_start(tmp_path / "initial.safetensors", plan_of(model={"name": "resnet", "width": 8}))
    with pytest.raises(CheckpointError, match="take both files from one run"):
        read_start(tmp_path, plan)


def test_a_start_without_privacy_or_of_an_unknown_plan_says_so(tmp_path: Path) -> None:
    open_plan = plan_of(privacy="none")
    path = write_start(tmp_path / "meta.safetensors", open_plan, plan=open_plan.digest)
    assert "may give patients away" in read_start(path, open_plan).privacy
    assert "is not the one given" in read_start(path, plan_of()).privacy


def test_a_start_of_another_network_is_refused(tmp_path: Path) -> None:
    path = write_start(tmp_path / "meta.safetensors", plan_of(model={"name": "conv4", "width": 16}))
    with pytest.raises(CheckpointError, match="is of another network"):
        read_start(path, plan_of())
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no round"):
        read_start(tmp_path / "empty", plan_of())


@pytest.mark.parametrize(
    ("site", "labels", "own", "found"),
    [
        ("alder", None, (), ("normal", "nodule")),
        ("yew", "chest", (), ("normal", "nodule", "effusion")),
        ("yew", None, ("clean", "ill"), ("clean", "ill")),
        ("yew", None, (), "--labels nodule | chest"),
        ("yew", "bleed", (), "no label set 'bleed'"),
        ("yew", "chest", ("a", "b"), "both are given"),
        ("yew", None, ("a",), "at least 2 different labels"),
        ("yew", None, ("a", "a"), "different labels"),
    ],
)
def test_whose_question_is_asked(site: str, labels: str | None, own: Sequence[str], found: object) -> None:
    if isinstance(found, str):
        with pytest.raises(UsageError) as error:
            own_question(plan_of(), site, labels=labels, own=own)
        assert found in str(error.value)
    else:
        assert own_question(plan_of(), site, labels=labels, own=own).labels_of(site) == found


def test_a_hospital_that_trained_is_measured_on_its_test_patients_alone(place: Path, tmp_path: Path) -> None:
    plan = plan_of()
    write_start(tmp_path / "meta.safetensors", plan, plan=plan.digest)
    command = ("adapt", place / "alder", "--from", tmp_path / "meta.safetensors", "--plan", place / "study.yaml")
    facts = json.loads(typed(*command, "--out", tmp_path / "out", "--json"))
    held = load_site(place / "alder", own_question(plan, "alder", labels=None, own=())).of_split("test")
    assert facts["images"] == len(held)
    assert "only its test patients are used" in facts["notes"][0]


def test_a_label_of_a_single_patient_is_refused(place: Path) -> None:
    plan = own_question(plan_of(), "willow", labels="chest", own=())
    data = load_site(place / "willow", plan)
    lonely = data.rows(
        torch.nonzero((data.labels < 2) | (data.patients == data.patients[data.labels == 2][0])).flatten()
    )
    with pytest.raises(DataError, match="a single patient"):
        cross_validate({}, lonely, plan, shots=1, watch=lambda share, what: None)


# what is told


def facts_with(adapted: Path, **gains: tuple[float, float, float]) -> Facts:
    facts = read_facts(adapted)
    found = {arm: {"balanced_accuracy": Measured(mean=m, low=lo, high=hi)} for arm, (m, lo, hi) in gains.items()}
    return facts.model_copy(update={"gains": found})


@pytest.mark.parametrize(
    ("random", "scratch", "sentence"),
    [
        ((0.2, 0.1, 0.3), (0.1, 0.05, 0.15), "A gain is shown: Balanced accuracy is 0.10 [0.05, 0.15] higher"),
        ((0.2, -0.1, 0.5), (0.1, -0.05, 0.25), "No gain is shown"),
        ((0.2, 0.1, 0.3), (0.1, -0.05, 0.25), "none over the whole network trained from scratch"),
        ((0.2, 0.1, 0.3), (-0.2, -0.3, -0.1), "worse here than the whole network trained from scratch"),
    ],
    ids=["gain", "none", "over one", "worse"],
)
def test_a_gain_is_told_only_where_it_is_shown(
    adapted: Path, random: tuple[float, ...], scratch: tuple[float, ...], sentence: str
) -> None:
    facts = facts_with(adapted, random=random, scratch=scratch)  # type: ignore[arg-type]
    assert sentence in told(facts)


def test_figures_show_what_is_known() -> None:
    assert in_figures(Measured(mean=0.5, low=0.4, high=0.6)) == "0.50 [0.40, 0.60]"
    assert in_figures(Measured(mean=0.5, low=None, high=None)) == "0.50"
    assert in_figures(Measured(mean=None, low=None, high=None)) == "–"


# predict


def test_predict_answers_a_folder_and_leaves_bad_files_out(adapted: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for name, size in (("a.png", 20), ("deep/b.png", 40), ("small.png", 8)):
        Image.fromarray(rng.integers(0, 255, (size, size), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / ".hidden.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "link.png").symlink_to(folder / "a.png")
    out = tmp_path / "out"
    told_json = json.loads(typed("predict", folder, "--model", adapted, "--out", out, "--confidence", "0", "--json"))
    assert sum(told_json["images"].values()) == 2
    assert [line.split(":")[0] for line in told_json["left_out"]] == ["notes.txt", "small.png", "torn.png"]
    assert told_json["images_per_second"] > 0
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert [row["image"] for row in rows] == ["a.png", "deep/b.png"]
    for row in rows:
        shares = [float(row[f"probability of {name}"]) for name in ("normal", "nodule", "effusion")]
        assert sum(shares) == pytest.approx(1, abs=2e-4)
        assert float(row["confidence"]) == pytest.approx(max(shares), abs=1e-4)
        assert row["status"] in (ANSWERED, UNLIKE)
        assert (row["answer"] != "") == (row["status"] == ANSWERED)
        assert Image.open(out / row["overlay"]).width == 3 * 400 + 16
    with pytest.raises(UsageError, match="is not empty"):
        typed("predict", folder, "--model", adapted, "--out", out)


def test_predict_is_silent_below_its_confidence_and_far_from_what_it_knows(adapted: Path, place: Path) -> None:
    model = load_adapted(adapted)
    out = place / "unsure"
    done = predict(place / "willow", model, out, modality=None, least=1.01, overlays=False)
    images = len(load_site(place / "willow", model.plan))
    assert done.counts[ANSWERED] == 0
    assert done.counts[UNSURE] + done.counts[UNLIKE] == done.images == images
    assert done.counts[UNLIKE] <= 0.2 * images  # of images like the support
    assert not (out / "overlays").exists()
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert {row["answer"] for row in rows} == {""}
    support = model.support.images[0].numpy().astype(np.uint8)
    far = replace(model, facts=model.facts.model_copy(update={"usual_distance": 0.0}))
    shown = [Shown("x", support[0], support, 0), Shown("y", 255 - support[0], 255 - support, 0)]
    near, away = answer(far, far.learner, shown, least=0.0)[1]
    assert near.nearest == 0
    assert near.distance == pytest.approx(0, abs=1e-3)
    assert away.status == UNLIKE


def test_predict_of_nothing_is_an_error(adapted: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no image"):
        typed("predict", tmp_path, "--model", adapted, "--out", tmp_path / "out")
    with pytest.raises(UsageError, match="no modality of the model"):
        typed("predict", tmp_path, "--model", adapted, "--out", tmp_path / "out", "--modality", "CT")


def of_kind(kind: str, labels: list[str], **changes: Any) -> dict[str, Any]:
    return {"task": {"kind": kind, "image_size": 16, "label_sets": {"it": labels}}} | changes


def short(trainable: str) -> dict[str, Any]:
    return STUDY["evaluation"] | {"adaptation": {"trainable": trainable, "steps": 1, "lr": 0.01}}


KINDS = {
    "segmentation": of_kind(
        "segmentation", ["background", "it"], model={"name": "unet", "width": 8}, evaluation=short("all")
    ),
    "anomaly": of_kind("anomaly", ["normal", "nodule"]),
    "autoencoder": of_kind(
        "anomaly",
        ["normal", "nodule"],
        model={"name": "autoencoder", "width": 8, "head": "shared", "trainable": "all"},
        evaluation=short("all"),
    ),
    "multilabel": of_kind("multilabel", ["nodule", "effusion"]),
    "metasgd": of_kind("classification", ["normal", "nodule"], algorithm={"name": "metasgd"}),
}
KINDS = {name: changes | {"sites": {"alder": {"labels": "it", "patients": 10}}} for name, changes in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_task_is_adapted_predicted_and_exported(place: Path, tmp_path: Path, kind: str) -> None:
    plan, site = plan_of(**KINDS[kind]), place / "alder"
    if kind == "multilabel":
        site = tmp_path / "willow"
        shutil.copytree(place / "willow", site)
        config = yaml.safe_load((site / "site.yaml").read_text()) | {"label_map": {"normal": "none"}}
        (site / "site.yaml").write_text(yaml.safe_dump(config))
    start = starting(plan, build_model(plan.model, plan.task, ways=2, seed=3))
    save_checkpoint(tmp_path / "meta.safetensors", start, {})
    (tmp_path / "plan.json").write_text(plan.to_json())
    made, out, card = tmp_path / "made", tmp_path / "out", tmp_path / "card"
    typed("adapt", site, "--from", tmp_path / "meta.safetensors", "--labels", "it", "--shots", "2", "--out", made)
    typed("predict", site, "--model", made, "--out", out, "--confidence", "0", "--no-overlays")
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert len(rows) == read_facts(made).images
    (tmp_path / "two").mkdir()
    for number, pixels in enumerate(np.load(site / "data.npz")["images"][:2]):
        Image.fromarray(pixels).save(tmp_path / "two" / f"{number}.png")
    typed("predict", tmp_path / "two", "--model", made, "--out", tmp_path / "drawn")
    assert len(list((tmp_path / "drawn" / "overlays").glob("*.png"))) == 2
    if kind == "segmentation":
        mask = np.asarray(Image.open(out / next(row["mask"] for row in rows if row["status"] == ANSWERED)))
        assert mask.shape == (16, 16)
        assert set(np.unique(mask)) <= {0, 1}
    if kind in ("anomaly", "autoencoder"):
        assert {row["answer"] for row in rows} <= {"usual", "unusual"}
    typed("export", "--model", made, "--out", card)
    assert {path.name for path in card.iterdir()} == {"model.safetensors", "model.json", "MODEL_CARD.md"}


# export


def test_the_card_tells_no_exact_count_and_no_small_group(adapted: Path, tmp_path: Path) -> None:
    printed = typed("export", "--model", adapted, "--out", tmp_path / "card")
    assert "stays in the hospital" in printed
    assert {path.name for path in (tmp_path / "card").iterdir()} == {"model.safetensors", "model.json", "MODEL_CARD.md"}
    facts = read_facts(adapted)
    card = (tmp_path / "card" / "MODEL_CARD.md").read_text()
    for words in (
        "Not a medical device",
        "PHANTOMS",
        "30+ patients",
        facts.start_privacy,
        "ECE",
        "sex: F",
        "willow-scanner",
    ):
        assert words in card, words
    assert f"{facts.images} " not in card
    assert str(facts.images) not in (tmp_path / "card" / "model.json").read_text().replace(
        facts.model + facts.start, ""
    )
    for count in facts.images_of_label.values():
        assert f" {count} images" not in card
    small = facts.groups[-1].model_copy(update={"name": "one-of-a-kind", "patients": 9})
    assert "one-of-a-kind" not in model_card(facts.model_copy(update={"groups": [*facts.groups, small]}))
    told_ten = small.model_copy(update={"patients": 10})
    assert "one-of-a-kind" in model_card(facts.model_copy(update={"groups": [*facts.groups, told_ten]}))


def test_onnx_without_its_packages_names_the_extra(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.export.ONNX_PACKAGES", ("a_package_that_nobody_has",))
    with pytest.raises(UsageError, match=r"a_package_that_nobody_has.*consilium\[export\]"):
        typed("export", "--model", adapted, "--out", tmp_path / "card", "--onnx")
    assert not (tmp_path / "card").exists()


MODALITIES = {"modalities": ["XR", "CT"]}
EXPORTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # task, model; every network and every kind of task
    "conv4 classification": ({}, {"name": "conv4"}),
    "resnet multilabel, two modalities": ({"kind": "multilabel"} | MODALITIES, {"name": "resnet"}),
    "unet segmentation": ({"kind": "segmentation"}, {"name": "unet"}),
    "conv4 anomaly, two modalities": ({"kind": "anomaly"} | MODALITIES, {"name": "conv4"}),
    "autoencoder anomaly": ({"kind": "anomaly"}, {"name": "autoencoder", "head": "shared", "trainable": "all"}),
}


def adapted_model(adapted: Path, task: dict[str, Any], model: dict[str, Any]) -> AdaptedModel:
    """Of any kind, with values drawn at random for every parameter, at 28 pixels: no power of two."""
    several = {"episodes": 2} if "modalities" in task else {}
    task = {"kind": "classification", "image_size": 28, "label_sets": {"it": ["normal", "nodule"]}} | task
    sites = {"alder": {"labels": "it", "patients": 10}}
    plan = own_question(
        plan_of(task=task, model=model | {"width": 8}, sites=sites, algorithm=several), "willow", labels="it", own=()
    )
    rng = torch.Generator().manual_seed(6)
    network = build_model(plan.model, plan.task, ways=outputs_of(plan, "willow"))
    params = {
        name: value + 0.2 * torch.randn(value.shape, generator=rng) for name, value in parameters(network).items()
    }
    images = torch.randint(0, 256, (5, 1, 28, 28), generator=rng).float()
    support = Support(images, torch.zeros(5), torch.zeros(5, 1), torch.arange(5) % 2)
    changes = {"kind": plan.task.kind, "image_size": 28, "label_names": ["normal", "nodule"], "temperature": 0.4}
    unknown = dict.fromkeys(metrics_of(plan.task.kind), Measured(mean=None, low=None, high=None))
    figures = {"metrics": {META: unknown}, "gains": {RANDOM: unknown}, "healthy_scores": [i / 40 for i in range(40)]}
    facts = read_facts(adapted).model_copy(update=changes | figures)
    model = AdaptedModel(facts, plan, params, support)
    features = pooled(model.learner.features(params, model.support_batch().inputs).detach())
    return replace(model, support=replace(support, features=features))


@pytest.mark.parametrize("kind", EXPORTED)
def test_onnx_says_what_predict_says(adapted: Path, tmp_path: Path, kind: str) -> None:
    for package in ONNX_PACKAGES:
        pytest.importorskip(package, reason=f"{package} of consilium[export] is not installed")
    from onnxruntime import InferenceSession

    model, path = adapted_model(adapted, *EXPORTED[kind]), tmp_path / "card" / ONNX
    export(model, path.parent, onnx=True)
    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    several = bool(model.plan.task.modalities)
    rng = np.random.default_rng(2)
    for count in (1, 7):
        images = rng.integers(0, 256, (count, 1, 28, 28)).astype(np.uint8)
        which = np.arange(count)[::-1].copy() % 2
        asked = {"images": images.astype(np.float32)} | ({"modalities": which} if several else {})
        (found,) = session.run(None, asked)
        shown = [Shown("", image[0], image, int(at)) for image, at in zip(images, which, strict=True)]
        raw, _ = answer(model, model.learner, shown)
        if model.facts.kind != "anomaly":
            raw = probabilities(raw, model.facts.kind, 0.4)
        np.testing.assert_allclose(found, raw, rtol=1e-4, atol=1e-5)
    told = session.get_modelmeta().custom_metadata_map
    assert (told["task"], json.loads(told["labels"])) == (model.facts.kind, ["normal", "nodule"])
    assert (told["temperature"], told["phantom"]) == ("0.4", "true")
    assert "Not a medical device" in told["notice"]
    assert "Lanczos" in told["preprocessing"]
    if model.facts.kind == "anomaly":
        edge = json.loads(told["unusual_above"])
        said = [_say(model, torch.tensor(edge + more))[0] for more in (-1e-4, 1e-4)]
        assert said == ["usual", "unusual"]
    assert str(Path(__file__).parents[1]).encode() not in path.read_bytes()

    bent = replace(model, params={name: -value for name, value in model.params.items()})
    inputs = {"images": model.support.images} | ({"modalities": model.support.modalities} if several else {})
    with pytest.raises(RunError, match="onnxruntime and torch differ by"):
        check_onnx(bent, path, inputs)
    assert not path.exists()


# subgroups


def test_group_values_are_the_metrics_themselves(place: Path) -> None:
    plan = own_question(plan_of(), "willow", labels="chest", own=())
    data = load_site(place / "willow", plan)
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(len(data), 3, generator=rng)
    right = classification_metrics(logits.softmax(1), data.labels)["balanced_accuracy"]
    found = groups_of(data, logits, seed=0)
    assert found[0].detail == EVERYONE
    assert found[0].value.mean == pytest.approx(right)
    assert found[0].value.low < right < found[0].value.high
    assert all(group.patients >= 10 for group in found)
    women = [i for i, detail in enumerate(data.details) if detail.sex == "F"]
    here = next(group for group in found if group.name == "F")
    expected = classification_metrics(logits[women].softmax(1), data.labels[women])["balanced_accuracy"]
    assert (here.images, here.value.mean) == (len(women), pytest.approx(expected))

    findings = (torch.rand(len(data), 2, generator=rng) > 0.5).float()
    several = replace(data, kind="multilabel", labels=findings, label_names=("x", "y"))
    value = lead_estimate(several, logits[:, :2], seed=0).mean
    assert value == pytest.approx(multilabel_metrics(logits[:, :2].sigmoid(), findings)["balanced_accuracy"])

    healthy = replace(data, kind="anomaly")
    value = lead_estimate(healthy, logits[:, 0], seed=0).mean
    assert value == pytest.approx(anomaly_metrics(logits[:, 0], data.labels > 0)["auroc"])

    masks = replace(data, kind="segmentation", label_names=("background", "it"))
    pixels = torch.randn(len(data), 2, 16, 16, generator=rng)
    value = lead_estimate(masks, pixels, seed=0).mean
    assert value == pytest.approx(segmentation_metrics(pixels.argmax(1), masks.targets, 2)["dice"])


def test_an_interval_over_patients_is_wider_than_one_over_their_copies(place: Path) -> None:
    """Ten copies of each image say nothing new: the patient is drawn, never the image."""
    plan = own_question(plan_of(), "willow", labels="chest", own=())
    data = load_site(place / "willow", plan)
    logits = torch.randn(len(data), 3, generator=torch.Generator().manual_seed(0))
    once, copies = lead_estimate(data, logits, seed=0), torch.arange(len(data)).repeat(10)
    tenfold = lead_estimate(data.rows(copies), logits[copies], seed=0)
    assert (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high))


def test_meta_is_the_first_arm() -> None:
    assert next(iter(ARMS)) == META
