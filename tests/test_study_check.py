"""`consilium-lab study check`: the plan in words, its cost at every site, and plans that cannot be met."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import PlanError
from common.models import build_model, parameters, part_names, shared_names
from common.plan import load_plan
from server.cli import app
from server.study import StudyCheck, check_study

PLAN = """\
study: tiny
task: {kind: classification, image_size: 16, label_sets: {two: [no, yes], three: [a, b, c]}}
sites:
  alder: {labels: two, patients: 200}
  birch:
    labels: three
    patients: 500
  cedar:
    labels: three
    patients: 30
    role: held_out
model: {width: 8, trainable: film}
algorithm: {name: fomaml, inner_steps: 4}
rounds: 40
quorum: 2
sampling: {sample_rate: 0.1}
privacy:
  epsilon: 3
  monitor: false
evaluation: {shots: [1, 5]}
"""


def check(folder: Path, *changes: tuple[str, str]) -> StudyCheck:
    text = PLAN
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "study.yaml").write_text(text)
    return check_study(folder / "study.yaml")


def problems(folder: Path, *changes: tuple[str, str]) -> list[str]:
    with pytest.raises(PlanError) as refused:
        check(folder, *changes)
    return [str(problem).removeprefix(f"{folder}/") for problem in refused.value.problems]


def test_the_cost_of_200_queries_is_the_published_one(tmp_path: Path) -> None:
    alder, birch = (row.privacy for row in check(tmp_path).costs)
    assert (alder.site, alder.queries, alder.delta) == ("alder", 200, 1 / 2000)
    assert alder.noise_multiplier == pytest.approx(1.75, abs=0.006)
    assert birch.noise_multiplier == pytest.approx(1.86, abs=0.006)
    for cost in (alder, birch):
        assert 2.98 < cost.epsilon <= 3 < cost.epsilon_rdp < 3.6


def test_the_noise_is_weighed_against_what_a_gradient_can_be(tmp_path: Path) -> None:
    checked = check(tmp_path)
    for row, ways in zip(checked.costs, (2, 3), strict=True):
        network = build_model(checked.plan.model, checked.plan.task, ways=ways)
        values = parameters(network)
        numbers = sum(values[name].numel() for name in part_names(network, "film"))  # the head among them
        expected = row.privacy.noise_multiplier * math.sqrt(numbers) / (0.1 * row.privacy.patients)
        assert row.noise_to_signal == pytest.approx(expected)


def test_the_words_answer_the_questions(tmp_path: Path) -> None:
    checked = check(tmp_path)
    words = checked.sentences
    network = build_model(checked.plan.model, checked.plan.task, ways=2)
    shared = sum(parameters(network)[name].numel() for name in shared_names(network, checked.plan.model))
    assert [sentence.split(":")[0] for sentence in words] == [
        "What is learned",
        "From whom",
        "How",
        "What leaves a hospital",
        "What a patient risks",
        "What a simulation measures",
    ]
    learned, whom, how, leaves, risk, measured = words
    assert "First-order MAML" in learned
    assert "16 x 16 pixels and 1 channel:" in learned
    assert f"({shared} numbers)" in learned
    assert "2 hospitals (alder, birch)" in whom
    assert "cedar never trains" in whom
    assert "40 rounds" in how
    assert "5 questions" in how
    assert f"one noisy update of {shared} numbers. Beside it go, whatever the data: " in leaves
    assert leaves.endswith("Images, labels, counts and the last layer stay.")
    assert "epsilon is at most 3.00" in risk
    assert "errs in at least 1 of 21.1 guesses" in risk, "1 + e^3 = 21.09"
    assert "1, 5 images per class, 20 draws, against a random start, Federated averaging" in measured


def test_bounds_are_rounded_up(tmp_path: Path) -> None:
    checked = check(tmp_path, ("epsilon: 3", "epsilon: 8"))
    said = float(checked.sentences[4].split("at most ")[1].split()[0])
    assert max(row.privacy.epsilon for row in checked.costs) <= said <= 8


def test_the_monitor_leaves_an_accuracy(tmp_path: Path) -> None:
    assert "and one noisy accuracy" in check(tmp_path, ("monitor: false", "monitor: true")).sentences[3]


def test_without_privacy_nothing_is_promised(tmp_path: Path) -> None:
    checked = check(tmp_path, ("privacy:\n  epsilon: 3\n  monitor: false\n", "privacy: none\n"))
    assert "accuracy" not in checked.sentences[3]  # the monitor is a private query; without privacy there is none
    assert checked.costs == ()
    assert "WITHOUT PRIVACY" in checked.sentences[4]
    assert checked.warnings[0].startswith("WITHOUT PRIVACY: for simulation only; every real site refuses this plan")
    assert checked.to_json()["privacy"] == "none"


def test_local_only_releases_nothing(tmp_path: Path) -> None:
    checked = check(tmp_path, ("name: fomaml, inner_steps: 4", "name: local_only"))
    assert "nothing in common" in checked.sentences[0]
    assert "nothing that depends on a patient" in checked.sentences[3]
    assert "risks: nothing" in checked.sentences[4]
    sites = json.loads(json.dumps(checked.to_json(), allow_nan=False))["sites"]
    assert [site["noise_multiplier"] for site in sites] == [None, None]
    assert [site["epsilon"] for site in sites] == [0, 0]


def test_noise_below_the_budget_is_refused_for_every_site_at_its_line(tmp_path: Path) -> None:
    found = problems(tmp_path, ("  monitor: false", "  monitor: false\n  noise_multiplier: 1.0"))
    assert [p.split(" costs ")[0] for p in found] == [
        "study.yaml:20: site alder: privacy.noise_multiplier 1",
        "study.yaml:20: site birch: privacy.noise_multiplier 1",
    ]
    assert "above privacy.epsilon 3 -- use 1.751 or more, or leave noise_multiplier out" in found[0]


def test_an_epsilon_out_of_reach_is_refused(tmp_path: Path) -> None:
    found = problems(tmp_path, ("epsilon: 3", "epsilon: 1e-12\n  delta: 1e-9"))
    assert len(found) == 2
    assert found[0].startswith("study.yaml:18: site alder: privacy.epsilon 1e-12 at delta 1e-09 cannot be reached")
    assert found[0].endswith("raise privacy.epsilon, or ask fewer queries (rounds, algorithm.inner_steps)")


def test_less_than_one_patient_per_query_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, ("patients: 200", "patients: 9")) == [
        "study.yaml:4: site alder: 0.9 patients join a query on average (sample_rate * patients)"
        " -- raise sampling.sample_rate or enrol more: at least one"
    ]


def test_a_site_with_fewer_patients_than_shots_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, ("patients: 30", "patients: 5")) == [
        "study.yaml:10: site cedar: 5 patients are too few to evaluate 5 shots"
        " -- at least 6: one per shot, and two per label"
    ]
    assert problems(tmp_path, ("[1, 5]", "[1, 31]"))[0].endswith("at least 31: one per shot, and two per label")


def test_a_site_left_out_in_turn_must_be_fit_for_evaluation_too(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, ("[1, 5]", "[1, 201], leave_one_out: [alder]"), ("patients: 30", "patients: 300"))
    assert found.startswith("study.yaml:4: site alder: 200 patients are too few to evaluate 201 shots")


def test_a_delta_that_allows_to_publish_a_patient_is_refused(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, ("epsilon: 3", "epsilon: 3\n  delta: 2e-3"))
    assert found.startswith("study.yaml:19: privacy.delta 0.002 is not below 1/500: it allows to publish one patient")
    check(tmp_path, ("epsilon: 3", "epsilon: 3\n  delta: 1.9e-3"))


def test_a_warm_start_that_is_not_there_is_refused(tmp_path: Path) -> None:
    change = ("trainable: film", "trainable: film, warm_start: start.safetensors")
    (found,) = problems(tmp_path, change)
    assert found.startswith(f"study.yaml:12: model.warm_start: there is no file {tmp_path}/start.safetensors")
    (tmp_path / "start.safetensors").touch()
    assert "the warm start start.safetensors" in check(tmp_path, change).sentences[0]


def test_several_reasons_are_told_together(tmp_path: Path) -> None:
    found = problems(tmp_path, ("patients: 200", "patients: 9"), ("patients: 30", "patients: 5"))
    assert [p.split(": ")[0] for p in found] == ["study.yaml:4", "study.yaml:10"]


def test_noise_that_drowns_everything_is_warned_of(tmp_path: Path) -> None:
    assert not any("too strong" in warning for warning in check(tmp_path).warnings)
    drowned = check(tmp_path, ("trainable: film", "trainable: all, name: resnet"), ("epsilon: 3", "epsilon: 0.1"))
    assert any("The noise is too strong to learn anything" in warning for warning in drowned.warnings)


def test_an_empty_promise_is_warned_of(tmp_path: Path) -> None:
    assert not any("next to nothing" in warning for warning in check(tmp_path).warnings)
    large = check(tmp_path, ("epsilon: 3", "epsilon: 30"))
    assert "An epsilon above 10 promises a patient next to nothing." in large.warnings


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("deploy/studies/*.yaml")), ids=lambda p: p.name)
def test_every_shipped_study_can_be_met(path: Path, tmp_path: Path) -> None:
    (tmp_path / path.name).write_text(path.read_text())
    if start := load_plan(path).model.warm_start:
        (tmp_path / start).touch()  # made by `pretrain`, not shipped
    checked = check_study(tmp_path / path.name)
    assert not any("too strong" in warning for warning in checked.warnings)
    assert checked.plan.privacy is not None
    assert 0 < max(row.privacy.epsilon for row in checked.costs) <= checked.plan.privacy.epsilon


def test_the_command_prints_words_and_costs(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(PLAN)
    done = CliRunner().invoke(app, ["study", "check", str(tmp_path / "study.yaml")])
    assert done.exit_code == 0, done.output
    assert "What a patient risks: " in done.output
    row = next(line.split() for line in done.output.splitlines() if line.startswith(" alder"))
    assert row[:5] == ["alder", "200", "20", "200", "1.751"]
    assert row[7] == "5.0e-04"


def test_the_command_speaks_json(tmp_path: Path) -> None:
    checked = check(tmp_path)
    done = CliRunner().invoke(app, ["study", "check", str(tmp_path / "study.yaml"), "--json"])
    told = json.loads(done.output)
    assert told == json.loads(json.dumps(checked.to_json()))
    assert told["digest"] == checked.plan.digest


def test_the_command_refuses_with_exit_code_2_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(PLAN.replace("quorum: 2", "quorum: 3"))
    root = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {root!r}); from server.cli import main; main()"
    command = [sys.executable, "-c", code, "study", "check", "study.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "study.yaml:15: quorum is 3 -- at most 2: so many sites have role 'train'\n"
