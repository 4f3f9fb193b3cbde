"""The study plan: every mistake at once with file and line, nothing coerced, one digest for one meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import PlanError
from common.plan import StudyPlan, load_plan, plan_from_json
from common.plan_rules import UNSCORED
from server.experiment import arms_of

PLAN = """\
study: tiny
task:
  kind: classification
  image_size: 32
  label_sets:
    chest: [normal, nodule]
    brain: [normal, mass, bleed]
sites:
  alder: {labels: chest, patients: 40}
  birch: {labels: brain, patients: 50}
  cedar:
    labels: chest
    patients: 30
    role: held_out
model:
  width: 16
  trainable: film
algorithm:
  name: reptile
  inner_lr: 0.1
outer:
  lr: 1
rounds: 3
quorum: 2
sampling:
  sample_rate: 0.5
privacy:
  epsilon: 3
  clip: 1.0
evaluation:
  shots: [1, 5]
  leave_one_out: [alder]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def changed(*changes: tuple[str, str]) -> str:
    text = PLAN
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def problems(folder: Path, text: str) -> list[str]:
    """Every problem that loading `text` reports, without the folder's name."""
    with pytest.raises(PlanError) as refused:
        load_plan(write(folder, text))
    return [str(problem).removeprefix(f"{folder}/") for problem in refused.value.problems]


def test_a_plan_loads_with_its_defaults(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, PLAN))
    assert plan.training_sites == ("alder", "birch")
    assert plan.held_out_sites == ("cedar",)
    assert plan.labels_of("birch") == ("normal", "mass", "bleed")
    assert plan.privacy is not None
    assert plan.privacy.delta is None
    assert plan.outer.lr == 1.0
    assert plan.algorithm.inner_steps == 5


ONE_MISTAKE = [
    ("name: reptile", "name: retile", 19, "algorithm.name is 'retile': must be", "did you mean 'reptile'?"),
    ("trainable: film", "trainable: flim", 17, "model.trainable is 'flim': must be", "did you mean 'film'?"),
    ("  clip: 1.0", "  clipp: 1.0", 29, "unknown key 'privacy.clipp'", "did you mean 'clip'?"),
    ("    role: held_out", "    rolle: held_out", 14, "unknown key 'sites.cedar.rolle'", "did you mean 'role'?"),
    (
        "  lr: 1\n",
        "  lr: 1\n  zeal: 3\n",
        23,
        "unknown key 'outer.zeal'",
        "allowed: lr, momentum, optimizer, secure_sum, weights",
    ),
    ("labels: brain,", "labels: brian,", 10, "sites.birch.labels is 'brian', which is no key", "did you mean 'brain'?"),
    ("out: [alder]", "out: [elder]", 32, "evaluation.leave_one_out names 'elder'", "did you mean 'alder'?"),
    ("out: [alder]", "out: [alder, alder]", 32, "evaluation.leave_one_out names 'alder' twice", "keep one"),
    ("quorum: 2", "quorum: 3", 24, "quorum is 3", "at most 2: so many sites have role 'train'"),
    ("quorum: 2", "", 1, "'quorum' is missing", "add it"),
    ("quorum: 2", "quorum: true", 24, "quorum is True: must be a whole number", ""),
    ("quorum: 2", "quorum: 2.0", 24, "quorum is 2.0: must be a whole number", ""),
    ("quorum: 2", "quorum: '2'", 24, "quorum is '2': must be a whole number", "write it without quotes"),
    ("quorum: 2", "quorum: 010", 24, "quorum is '010': must be a whole number", "write it without quotes"),
    ("quorum: 2", "quorum:", 24, "quorum is empty: must be a whole number", ""),
    ("rate: 0.5", "rate: '0.5'", 26, "sampling.sample_rate is '0.5': must be a number", "write it without quotes"),
    ("rate: 0.5", "rate: 50%", 26, "sampling.sample_rate is '50%': must be a number", "write it without quotes"),
    ("rate: 0.5", "rate: true", 26, "sampling.sample_rate is True: must be a number", ""),
    ("rate: 0.5", "rate: 0", 26, "sampling.sample_rate is 0: must be greater than 0", ""),
    ("rate: 0.5", "rate: 1.01", 26, "sampling.sample_rate is 1.01: must be less than or equal to 1", ""),
    ("epsilon: 3", "epsilon: .nan", 28, "privacy.epsilon is nan: must be a finite number", ""),
    ("epsilon: 3", "epsilon: .inf", 28, "privacy.epsilon is inf: must be a finite number", ""),
    ("epsilon: 3", "epsilon: 3\n  delta: 1.5", 29, "privacy.delta is 1.5: must be less than 1", ""),
    ("epsilon: 3", "epsilon: 3\n  unit: image", 29, "privacy.unit is 'image': must be 'patient'", ""),
    ("epsilon: 3", "epsilon: 3\n  monitor: yes", 29, "privacy.monitor is 'yes': must be true or false", ""),
    ("image_size: 32", "image_size: 33", 4, "task.image_size is 33: must be 16, 28, 32,", ""),
    ("image_size: 32", "image_size: 32\n  channels: true", 5, "task.channels is True: must be a whole number", ""),
    ("width: 16", "width: 20", 16, "model.width is 20: must be a multiple of 8", ""),
    ("[normal, nodule]", "[true, nodule]", 6, "task.label_sets.chest.0 is True: must be a string", "put it in quotes"),
    ("[normal, nodule]", "[0, nodule]", 6, "task.label_sets.chest.0 is 0: must be a string", "put it in quotes"),
    ("[normal, nodule]", "[normal]", 6, "task.label_sets.chest is ['normal']", "give at least two labels"),
    ("[normal, nodule]", "[a, b, a]", 6, "task.label_sets.chest names 'a' twice", "keep one"),
    ("  cedar:", "  Cedar!:", 11, "sites.Cedar! is 'Cedar!': use lower-case letters", ""),
    ("study: tiny", "study: ../tiny", 1, "study is '../tiny': use lower-case letters", ""),
    ("study: tiny", "study: 7", 1, "study is 7: must be a string", "put it in quotes"),
    ("inner_lr: 0.1", "proximal: 0.1", 20, "proximal is 0.1 and name is 'reptile'", "for fedprox"),
    ("name: reptile", "name: fedprox", 18, "proximal is 0 and name is 'fedprox'", "above 0"),
    ("trainable: film", "trainable: head", 17, "model.trainable is 'head', but heads belong", "model.head: shared"),
    ("trainable: film", "head: shared", 17, "model.head is 'shared', but the sites differ", "chest 2, brain 3"),
    ("shots: [1, 5]", "compare: [fedag]", 31, "evaluation.compare.0.name is 'fedag': must be", "mean 'fedavg'?"),
    ("shots: [1, 5]", "compare: [fomaml, fedprox]", 31, "proximal is 0 and name is 'fedprox'", "above 0"),
    ("shots: [1, 5]", "compare: [{name: fedavg, lr: 1}]", 31, "unknown key 'evaluation.compare.0.lr'", "inner_lr"),
    ("shots: [1, 5]", "compare: [protonet, protonet]", 31, "evaluation.compare names 'protonet' twice", "'label'"),
    ("shots: [1, 5]", "compare: [{name: fedavg, label: A!}]", 31, "evaluation.compare.0.label is 'A!'", "lower-case"),
    ("shots: [1, 5]", "compare: [{name: mapping, trainable: film}]", 31, "algorithm mapping with trainable 'film'", ""),
    ("shots: [1, 5]", "compare: [{name: fedavg, label: meta}]", 31, "evaluation.compare labels an arm 'meta'", "label"),
    ("shots: [1, 5]", "compare: [{name: maml, trainable: mapping}]", 31, "algorithm maml with trainable 'mapping'", ""),
    ("shots: [1, 5]", "compare: [{name: maml, meta_lr: 0}]", 31, "evaluation.compare.0.meta_lr is 0: must be", ""),
    ("shots: [1, 5]", "compare: [mrmtl]", 31, "proximal is 0 and name is 'mrmtl'", "above 0 for fedprox and mrmtl"),
    ("shots: [1, 5]", "fuse: site", 31, "evaluation.fuse is 'site': must be 'image' or 'patient'", ""),
    ("shots: [1, 5]", "subgroups: {Old: {min_age: 60}}", 31, "evaluation.subgroups.Old is 'Old': use lower", ""),
    ("shots: [1, 5]", "subgroups: {old: {minage: 60}}", 31, "unknown key 'evaluation.subgroups.old.minage'", "min_age"),
    ("shots: [1, 5]", "subgroups: {old: {min_age: 60, max_age: 50}}", 31, "min_age 60 is above max_age 50", "is both"),
    ("name: reptile", "name: mapping", 19, "algorithm mapping with trainable 'film'", "set both, or neither"),
    ("name: reptile", "name: reptile\n  episodes: 0", 20, "algorithm.episodes is 0: must be", ""),
    ("name: reptile", "name: maml\n  meta_steps: 0", 20, "algorithm.meta_steps is 0: must be", ""),
    (
        "width: 16",
        "width: 16\n  name: unet",
        17,
        "model.name is 'unet', but task.kind is 'classification'",
        "conv4 or resnet",
    ),
    (
        "width: 16",
        "width: 16\n  name: autoencoder",
        17,
        "model.name is 'autoencoder', but task.kind",
        "conv4 or resnet",
    ),
    ("kind: classification", "kind: segmentation", 15, "model.name is 'conv4', but task.kind is 'segm", "use unet"),
    ("image_size: 32", "image_size: 32\n  modalities: [ct, '']", 5, "task.modalities.1 is ''", ""),
    (
        "patients: 40}",
        "patients: 40, prevalence: [0.5, 0.4]}",
        9,
        "sites.alder.prevalence is [0.5, 0.4]: the shares",
        "must sum to 1",
    ),
    ("patients: 40}", "patients: 40, prevalence: [0.5, 0.3, 0.2]}", 9, "3 shares for 2 labels", "normal, nodule"),
    ("patients: 40}", "patients: 40, prevalence: [1.0, 0.0]}", 9, "sites.alder.prevalence.1 is 0.0: must be", ""),
    ("patients: 40}", "patients: 40, where: {sex: f}}", 9, "sites.alder.where.sex is 'f': must be a list", ""),
    ("rate: 0.5", "rate: 0.5\n  views: 17", 27, "sampling.views is 17: must be less than or equal to 16", ""),
    ("  clip: 1.0", "  feature_clip: 0", 29, "privacy.feature_clip is 0: must be greater than 0", ""),
    ("shots: [1, 5]", "shots: []", 31, "evaluation.shots is []: list should have at least 1 item", ""),
    ("shots: [1, 5]", "shots: 5", 31, "evaluation.shots is 5: must be a list", ""),
]


@pytest.mark.parametrize(("old", "new", "line", "what", "remedy"), ONE_MISTAKE)
def test_one_mistake_is_one_problem_at_its_line(
    tmp_path: Path, old: str, new: str, line: int, what: str, remedy: str
) -> None:
    (problem,) = problems(tmp_path, changed((old, new)))
    assert problem.startswith(f"study.yaml:{line}: {what}")
    assert remedy in problem


def test_every_mistake_is_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = changed(
        ("image_size: 32", "image_size: 33"),
        ("labels: brain,", "labels: brian,"),
        ("patients: 30", "patients: 0"),
        ("name: reptile", "name: retile"),
        ("rounds: 3", "round: 3"),
        ("quorum: 2", "quorum: 9"),
        ("epsilon: 3", "epsilon: -1"),
    )
    lines = [problem.split(": ")[0] for problem in problems(tmp_path, text)]
    assert lines == [f"study.yaml:{n}" for n in (1, 4, 10, 13, 19, 23, 24, 28)]


ANOMALY = (
    ("kind: classification", "kind: anomaly"),
    ("width: 16", "name: autoencoder\n  head: shared"),
)
SEVERAL_MISTAKES = [
    (
        "a shared head of an autoencoder draws images and has no number of labels",
        ANOMALY,
        [],
    ),
    (
        "an autoencoder's last layer belongs to no site",
        (("kind: classification", "kind: anomaly"), ("width: 16", "name: autoencoder")),
        ["study.yaml:15: model.head is 'site', but an autoencoder's last layer draws the image"],
    ),
    (
        "prototypes need classes",
        (*ANOMALY, ("name: reptile", "name: protonet")),
        ["study.yaml:20: protonet compares images with class means, but task.kind is 'anomaly' -- use another"],
    ),
    (
        "in a comparison too",
        (*ANOMALY, ("shots: [1, 5]", "compare: [fedavg, prototypes]")),
        ["study.yaml:32: prototypes compares images with class means, but task.kind is 'anomaly'"],
    ),
    (
        "a U-Net is not conditioned on modalities",
        (
            ("kind: classification", "kind: segmentation"),
            ("image_size: 32", "modalities: [ct, mr]"),
            ("width: 16", "name: unet"),
        ),
        ["study.yaml:4: task.modalities names 2, but a unet is not conditioned on them -- leave them out"],
    ),
    (
        "each modality has an episode",
        (("image_size: 32", "modalities: [ct, mr, us]"), ("inner_lr: 0.1", "episodes: 2")),
        ["study.yaml:20: algorithm.episodes is 2, for 3 modalities -- give at least one episode for each"],
    ),
    (
        "masks are not fused over images",
        (
            ("kind: classification", "kind: segmentation"),
            ("width: 16", "name: unet"),
            ("shots: [1, 5]", "fuse: patient"),
        ),
        ["study.yaml:31: evaluation.fuse is 'patient', but a mask belongs to its image -- use 'image'"],
    ),
    (
        "only classes are weighed",
        (("kind: classification", "kind: multilabel"), ("patients: 40}", "patients: 40, prevalence: [0.5, 0.5]}")),
        ["study.yaml:9: task.kind is 'multilabel' -- leave it out: only classification weighs classes"],
    ),
    (
        "a score must be released to be a weight",
        (("  lr: 1\n", "  weights: score\n"), ("  clip: 1.0", "  monitor: false")),
        ["study.yaml:22: outer.weights is 'score', but privacy.monitor is false: no score is released -- set"],
    ),
    (
        "the mapping is trained by its own algorithm",
        (("trainable: film", "trainable: mapping"), ("shots: [1, 5]", "compare: [{name: fedavg, trainable: film}]")),
        ["study.yaml:19: algorithm reptile with trainable 'mapping' -- 'mapping' is both the algorithm and what it"],
    ),
    (
        "nothing is asked, so nothing has to fit",
        (
            ("trainable: film", "trainable: mapping"),
            ("name: reptile", "name: transfer"),
            ("shots: [1, 5]", "compare: [local_only]"),
        ),
        [],
    ),
    (
        "one finding is enough",
        (("kind: classification", "kind: multilabel"), ("[normal, nodule]", "[nodule]")),
        [],
    ),
]


@pytest.mark.parametrize(
    ("changes", "expected"), [case[1:] for case in SEVERAL_MISTAKES], ids=[case[0] for case in SEVERAL_MISTAKES]
)
def test_what_does_not_fit_together_is_told_at_its_line(
    tmp_path: Path, changes: tuple[tuple[str, str], ...], expected: list[str]
) -> None:
    text = changed(*changes)
    if not expected:
        load_plan(write(tmp_path, text))
        return
    found = problems(tmp_path, text)
    assert len(found) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(found, expected, strict=True)), found


def test_a_score_can_be_a_weight_without_privacy_and_is_then_asked_for(tmp_path: Path) -> None:
    text = section("privacy: none")
    assert not load_plan(write(tmp_path, text)).monitored
    assert load_plan(write(tmp_path, text.replace("  lr: 1\n", "  weights: score\n"))).monitored


def test_a_comparison_takes_what_it_does_not_say_from_the_study(tmp_path: Path) -> None:
    plan = load_plan(
        write(
            tmp_path,
            changed(
                ("inner_lr: 0.1", "inner_lr: 0.1\n  episodes: 5"),
                ("shots: [1, 5]", "compare: [maml, {name: mrmtl, label: far, proximal: 0.5, inner_lr: 0.2}]"),
            ),
        )
    )
    maml, far = plan.evaluation.compare
    assert (maml.arm, far.arm) == ("maml", "far")
    assert maml.algorithm(plan.algorithm) == plan.algorithm.model_copy(update={"name": "maml"})
    assert far.algorithm(plan.algorithm) == plan.algorithm.model_copy(
        update={"name": "mrmtl", "proximal": 0.5, "inner_lr": 0.2}
    )


def section(text: str) -> str:
    """The plan with `text` in place of its privacy section."""
    head, tail = PLAN.split("privacy:\n  epsilon: 3\n  clip: 1.0\n")
    return f"{head}{text}\n{tail}"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "study.yaml:1: 'privacy' is missing"),
        ("privacy:", "study.yaml:27: privacy is empty: write 'privacy: none' for a simulation"),
        ("privacy: off", "study.yaml:27: privacy is 'off': must be 'none', or a mapping with epsilon"),
        ("privacy: 3", "study.yaml:27: privacy is 3: must be a mapping of keys to values"),
        ("privacy: {clip: 1}", "study.yaml:27: 'privacy.epsilon' is missing"),
    ],
)
def test_privacy_is_never_left_out_by_mistake(tmp_path: Path, text: str, what: str) -> None:
    (problem,) = problems(tmp_path, section(text))
    assert problem.startswith(what)


def test_no_privacy_must_be_said(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, section("privacy: none")))
    assert plan.privacy is None
    assert plan_from_json(plan.to_json()) == plan


def test_precision_needs_noise(tmp_path: Path) -> None:
    text = section("privacy: none").replace("  lr: 1\n", "  lr: 1\n  weights: precision\n")
    (problem,) = problems(tmp_path, text)
    assert problem.startswith("study.yaml:23: outer.weights is 'precision', which weighs by the noise")


def test_some_site_must_train(tmp_path: Path) -> None:
    text = changed(
        ("chest, patients: 40", "chest, patients: 40, role: held_out"),
        ("brain, patients: 50", "brain, patients: 50, role: held_out"),
        ("  leave_one_out: [alder]\n", ""),
    )
    assert problems(tmp_path, text) == ["study.yaml:8: no site has role 'train' -- give at least one site that role"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "study.yaml:1: the file is empty"),
        ("# nothing\n", "study.yaml:1: the file is empty"),
        ("- study: tiny\n", "study.yaml:1: the file must hold a mapping of keys to values"),
        ("tiny\n", "study.yaml:1: the file must hold a mapping of keys to values"),
        ("study: tiny\ntask:\n\tkind: x\n", "study.yaml:3: not valid YAML: found character '\\t'"),
        ("study: [tiny\n", "study.yaml:2: not valid YAML: expected ',' or ']'"),
        ("study: a: b\n", "study.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("a: &x 1\nb: *x\n", "study.yaml:2: not valid YAML: an alias (*name) is not allowed: write the value out"),
        ("study: " + 3000 * "[" + 3000 * "]", "study.yaml:1: not usable: it is nested too deeply"),
        ("study: !!python/object/apply:os.getcwd []\n", "study.yaml:1: not valid YAML: could not determine"),
        ("a: 1\n---\nb: 2\n", "study.yaml:2: not valid YAML: but found another document"),
        ("study: tiny\nrounds: 1\x00\n", "study.yaml:2: not valid YAML: the character '\\x00' is not allowed"),
        ("rounds: " + 5000 * "9", "study.yaml:1: not usable: Exceeds the limit (4300 digits)"),
    ],
)
def test_what_is_no_yaml_mapping_is_refused_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    (only,) = problems(tmp_path, text)
    assert only.startswith(problem)


def test_repeated_keys_are_all_named(tmp_path: Path) -> None:
    text = PLAN.replace("  clip: 1.0", "  clip: 1.0\n  clip: 2.0") + "rounds: 9\n"
    assert [p.split(" --")[0] for p in problems(tmp_path, text)] == [
        "study.yaml:30: key 'privacy.clip' is given twice, first in line 29",
        "study.yaml:34: key 'rounds' is given twice, first in line 23",
    ]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    with pytest.raises(PlanError, match=r"study\.yaml: there is no such file -- check the path"):
        load_plan(path)
    with pytest.raises(PlanError, match="cannot be read: Is a directory"):
        load_plan(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"study\.yaml: is not UTF-8 text"):
        load_plan(path)
    path.write_bytes(b"#" * 1_000_001)
    with pytest.raises(PlanError, match="is larger than 1,000,000 bytes"):
        load_plan(path)


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "1E-5", "+1e-5", "0.00001", ".00001", "0.1e-4"])
def test_every_way_to_write_a_number_is_the_number(tmp_path: Path, text: str) -> None:
    plan = load_plan(write(tmp_path, changed(("inner_lr: 0.1", f"inner_lr: {text}"))))
    assert plan.algorithm.inner_lr == 1e-5


def test_yes_no_and_dates_are_labels_as_written(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, changed(("[normal, nodule]", "[yes, no, 2026-01-02, 1:30, on]"))))
    assert plan.labels_of("alder") == ("yes", "no", "2026-01-02", "1:30", "on")


def backwards(value: Any) -> Any:
    """Every mapping, at any depth, in the opposite order."""
    if isinstance(value, dict):
        return {key: backwards(inner) for key, inner in reversed(value.items())}
    return value


def test_the_digest_depends_on_the_meaning_alone(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, PLAN))
    reordered = yaml.safe_dump(backwards(yaml.safe_load(PLAN)), sort_keys=False)
    for same in (
        reordered,
        "# a comment\n" + PLAN,
        changed(("lr: 1\n", "lr: 1.00\n")),
        changed(("epsilon: 3", "epsilon: 3.0\n  delta: auto\n  unit: patient")),
        changed(("name: reptile", "name: reptile\n  inner_steps: 5\n  head_lr: null")),
        changed(("shots: [1, 5]", "shots: [1, 5]\n  compare: [{name: fedavg}]")),
    ):
        assert load_plan(write(tmp_path, same)).digest == plan.digest


def leaves(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """Every value of nested mappings and lists, with its place."""
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*here, key))]
    return [(here, value)]


OTHERS: dict[str, list[Any]] = {  # valid values to try for the fields that are no plain numbers; none: a closed field
    "kind": [],
    "unit": [],
    "head": [],
    "proximal": [],
    "labels": ["brain", "chest"],
    "role": ["train", "held_out"],
    "model.name": ["resnet"],
    "trainable": ["all", "film"],
    "algorithm.name": ["fomaml"],
    "optimizer": ["adam"],
    "weights": ["patients"],
    "warm_start": ["start.safetensors"],
    "image_size": [64],
    "channels": [3],
    "width": [24],
    "quorum": [2],
    "chest": [["normal", "cyst"]],
    "brain": [["normal", "mass"]],
    "shots": [[2]],
    "compare": [["fomaml"]],
    "leave_one_out": [[]],
    "study": ["other"],
    "description": ["other"],
    "delta": [1e-4],
    "head_lr": [0.3],
    "noise_multiplier": [2.0],
    "sample_rate": [0.25],
    "momentum": [0.5],
    "modalities": [["ct"]],
    "where": [{"sex": ["f"]}],
    "alder.prevalence": [[0.5, 0.5]],
    "prevalence": [],
    "subgroups": [{"old": {"min_age": 60}}],
    "fuse": ["patient"],
    "noise": ["discrete"],
    "secure_sum": [],  # tests/test_secure_sum.py: it wants more sites
}


def another(place: tuple[Any, ...], value: Any) -> Any:
    """A valid value for this field that is not `value`; None if there is none."""
    for name in (".".join(place[-2:]), place[-1]):
        if name in OTHERS:
            return next((other for other in OTHERS[name] if other != value), None)
    return (not value) if isinstance(value, bool) else value + 1


def test_every_field_is_in_the_digest(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, PLAN.replace("quorum: 2", "quorum: 1").replace("[alder]", "[cedar]")))
    tried = 0
    for place, value in leaves(json.loads(plan.to_json())):
        other = another(place, value)
        if other is None:
            continue
        data = json.loads(plan.to_json())
        inner = data
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = other
        assert plan_from_json(json.dumps(data)).digest != plan.digest, place
        tried += 1
    assert tried > 35


finite = st.floats(1e-6, 1e3, allow_nan=False)


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    label = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
    names = draw(st.lists(st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True), min_size=1, max_size=5, unique=True))
    sets = draw(
        st.dictionaries(
            st.sampled_from(["one", "two"]), st.lists(label, min_size=2, max_size=4, unique=True), min_size=1
        )
    )
    sites = {
        name: {"labels": draw(st.sampled_from(sorted(sets))), "patients": draw(st.integers(1, 10**6))} for name in names
    }
    privacy = draw(
        st.sampled_from(
            ["none", {"epsilon": draw(finite)}, {"epsilon": draw(finite), "delta": draw(st.floats(1e-9, 0.5))}]
        )
    )
    return {
        "study": draw(st.from_regex(r"[a-z0-9][a-z0-9_-]{0,40}", fullmatch=True)),
        "description": draw(st.text(st.characters(exclude_categories=["Cs"]))),
        "seed": draw(st.integers(0, 2**31 - 1)),
        "task": {"kind": "classification", "label_sets": sets},
        "sites": sites,
        "algorithm": {"inner_lr": draw(finite), "inner_steps": draw(st.integers(1, 100))},
        "outer": {"lr": draw(finite), "momentum": draw(st.floats(0, 0.999))},
        "rounds": draw(st.integers(1, 10_000)),
        "quorum": draw(st.integers(1, len(names))),
        "privacy": privacy,
    }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(data=plans())
def test_a_plan_survives_the_wire(data: dict[str, Any]) -> None:
    plan = StudyPlan.model_validate(data)
    again = plan_from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest
    assert again.to_json() == plan.to_json()


@pytest.mark.parametrize("change", [{"rounds": 0}, {"quorum": 7}, {"extra": 1}, {"privacy": {"epsilon": float("nan")}}])
def test_the_wire_is_checked_like_the_file(tmp_path: Path, change: dict[str, Any]) -> None:
    data = json.loads(load_plan(write(tmp_path, PLAN)).to_json()) | change
    with pytest.raises(ValueError, match=next(iter(change))):
        plan_from_json(json.dumps(data))


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("deploy/studies/*.yaml")), ids=lambda p: p.name)
def test_every_shipped_study_is_valid(path: Path) -> None:
    plan = load_plan(path)
    assert plan.study == path.stem
    if path.name not in ("pair.yaml", "attacks.yaml"):  # run by real hospitals; attacked: there is nothing to measure
        assert plan.held_out_sites or plan.evaluation.leave_one_out, "nothing would be shown"


@pytest.mark.parametrize("name", sorted(UNSCORED))
def test_what_leaves_nothing_to_score_is_not_weighed_by_score(make_plan, name: str) -> None:
    assert make_plan(outer={"weights": "score"}).monitored
    with pytest.raises(ValidationError, match=f"{name} adapts nothing at the site that could be scored"):
        make_plan(algorithm={"name": name}, outer={"weights": "score"}, evaluation={"compare": []})
    compared = make_plan(outer={"weights": "score"}, evaluation={"compare": [name]})
    assert {arm.plan.outer.weights for arm in arms_of(compared)} == {"score", "equal"}


def test_a_plan_that_maps_may_be_compared_with_what_does_not(make_plan) -> None:
    plan = make_plan(algorithm={"name": "mapping"}, model={"name": "conv4", "width": 8, "trainable": "mapping"})
    trained = {arm.name: arm.plan.model.trainable for arm in arms_of(plan)}
    assert trained == {"meta": "mapping", "fedavg": "film"}
