"""The audit: a sound pipeline passes, planted bugs FAIL or are refused, and the report is the site's own word."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client import approval
from client.audit import PAGE, REPORT, AuditReport, plan_to_audit, run_audit, verified_audit, write_audit
from client.audit_episodes import episode_checks
from client.cli import app
from client.ledger import FILE
from client.membership import init_site
from client.one_run import STRICT_DELTA, STRICT_EPSILON, OneRun, departures, one_run_audits
from client.private_data import PrivateDataset
from client.selftest import Check
from common.accounting import plan_cost
from common.errors import SiteUnfit, UntrustedDocument, UsageError
from common.keys import load_signing_key, public_hex
from common.plan import StudyPlan
from common.plan_rules import EPISODIC
from tests.conftest import PlanMaker, SiteMaker
from tests.planted import OF_A_STUDY, OF_EPISODES

FEW_S = 20.0  # of a run: all three rounds of a tiny plan


def audited(plan: StudyPlan) -> list[OneRun]:
    cost = plan_cost(plan, "alder")
    assert cost is not None
    return list(one_run_audits(plan, cost, budget_s=FEW_S))


# ---- the one-run audit -------------------------------------------------------------------------------------------

FOMAML = {"name": "fomaml", "inner_steps": 1, "inner_lr": 0.1}
NO_SOLVING = {"epsilon": 1000.0, "delta": 0.01, "noise_multiplier": 0.3}


@pytest.fixture
def unsolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strict noise that is given: to solve for it takes seconds."""
    monkeypatch.setattr("client.one_run._strict_noise", lambda *_: 20.0)


def test_a_sound_study_passes_and_the_attack_proves_less_than_is_claimed(make_plan: PlanMaker) -> None:
    own, strict = audited(make_plan(algorithm=FOMAML))
    assert own.verdict == strict.verdict == "PASS"
    assert 0 <= own.shown < own.claimed
    assert strict.shown < strict.claimed <= STRICT_EPSILON
    assert strict.delta == STRICT_DELTA
    assert strict.noise_multiplier > own.noise_multiplier
    assert own.queries == 3 * own.rounds
    assert own.right > 75  # the canaries are seen at all


@pytest.mark.parametrize("bug", OF_A_STUDY)
def test_a_planted_bug_of_a_study_fails(
    bug: str, make_plan: PlanMaker, unsolved: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(algorithm=FOMAML, privacy=NO_SOLVING)
    OF_A_STUDY[bug](monkeypatch)
    runs = audited(plan)
    assert "FAIL" in {run.verdict for run in runs}, [run.line() for run in runs]
    if "BatchNorm" in bug:
        assert "the pipeline refused or broke off" in runs[0].why
        assert "BatchNorm" in runs[0].why or "BatchNorm2d" in runs[0].why or "buffer" in runs[0].why


KINDS: dict[str, dict[str, object]] = {
    "prototypes": {"algorithm": {"name": "prototypes", "inner_steps": 1}},
    "mapping": {"algorithm": {"name": "mapping", "inner_steps": 1}, "model": {"width": 8, "trainable": "mapping"}},
    "metasgd": {"algorithm": {"name": "metasgd", "meta_steps": 1, "episodes": 2}},
    "modalities and views": {
        "task": {
            "kind": "classification",
            "image_size": 16,
            "label_sets": {"lesion": ["healthy", "lesion"]},
            "modalities": ["CT", "MR"],
        },
        "sampling": {"sample_rate": 0.5, "views": 2, "max_images_per_patient": 1},
    },
    "cut and paste": {
        "task": {"kind": "anomaly", "image_size": 16, "label_sets": {"lesion": ["healthy", "lesion"]}},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_study_can_be_audited(kind: str, make_plan: PlanMaker, unsolved: None) -> None:
    plan = make_plan(**KINDS[kind], rounds=1, privacy=NO_SOLVING)
    own, strict = audited(plan)
    assert own.verdict == strict.verdict == "PASS", (own.line(), strict.line())
    if plan.algorithm.name not in EPISODIC:  # there the canaries of an episode share one clip
        assert own.right > 120


def test_a_study_of_episodes_without_noise_fails(
    make_plan: PlanMaker, unsolved: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(self, gradients, params, mechanism, generator):  # type: ignore[no-untyped-def]
        silenced = dataclasses.replace(mechanism, noise_multiplier=1e-9)
        return honest(self, gradients, params, silenced, generator)

    honest = PrivateDataset._noisy_sum_of_episodes
    monkeypatch.setattr(PrivateDataset, "_noisy_sum_of_episodes", silent)
    runs = audited(make_plan(**KINDS["metasgd"], privacy=NO_SOLVING))
    assert "FAIL" in {run.verdict for run in runs}


# ---- episodes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_episode_queries_pass() -> None:
    one, who = episode_checks()
    assert (one.verdict, who.verdict) == ("PASS", "PASS"), (one.line(), who.line())
    assert one.shown > one.claimed / 2
    assert who.shown < one.claimed / 2  # an arrival moves its own episode only


@pytest.mark.parametrize("bug", OF_EPISODES)
@pytest.mark.timeout(240)
def test_a_planted_bug_of_episodes_fails(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find, plant = OF_EPISODES[bug]
    plant(monkeypatch)
    assert (found := find()).verdict == "FAIL", found.line()


# ---- the report --------------------------------------------------------------------------------------------------


def check(verdict: str) -> Check:
    return Check(query="gradient", verdict=verdict, claimed=2.0, shown=1.7, certain=1.2, noise=1.0)  # type: ignore[arg-type]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit whose attacks on single queries take no time."""
    monkeypatch.setattr("client.audit.run_self_test", lambda: iter([check("PASS")]))
    monkeypatch.setattr("client.audit.episode_checks", lambda: iter([check("PASS")]))
    monkeypatch.setattr("client.one_run.BUDGET_S", FEW_S)
    monkeypatch.setattr("client.one_run._strict_noise", lambda *_: 20.0)


def a_site(folder: Path) -> Path:
    init_site(folder, name="alder", epsilon=8, delta=0.01)
    return folder


def test_the_report_is_signed_by_the_site_and_says_what_was_found(
    make_site: SiteMaker, make_plan: PlanMaker, quick: None, tmp_path: Path
) -> None:
    folder, plan = a_site(make_site("alder")), make_plan()
    (folder / "data.npz").unlink()  # no image is read
    heard: list[float] = []
    report = run_audit(folder, plan, lambda share, what: heard.append(share))
    signed = write_audit(folder, report, tmp_path / "out")
    assert heard == sorted(heard)
    assert heard[-1] == pytest.approx(1.0)
    assert not (folder / "state" / FILE).exists()  # nobody's budget
    body, signer = verified_audit(tmp_path / "out" / REPORT)
    assert signer == signed.signer
    assert body == json.loads(json.dumps(report.to_json()))
    assert (body["verdict"], body["site"], body["plan_digest"]) == ("PASS", "alder", plan.digest)
    page = (tmp_path / "out" / PAGE).read_text()
    for told in ("PASS", "<svg", "No patient was part of it", plan.digest, "strict noise", "once in a million"):
        assert told in page, told
    assert "http" not in page.replace("http://www.w3.org/", "")  # nothing to load


def test_a_changed_report_is_not_believed(make_site: SiteMaker, make_plan: PlanMaker, quick: None) -> None:
    folder = a_site(make_site("alder"))
    write_audit(folder, run_audit(folder, make_plan()), folder / "audit")
    file = folder / "audit" / REPORT
    file.write_text(file.read_text().replace("PASS", "FAIL", 1))
    with pytest.raises(UntrustedDocument, match="it was changed, or never signed"):
        verified_audit(file)


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [(["PASS"], "PASS"), (["PASS", "INCONCLUSIVE"], "INCONCLUSIVE"), (["FAIL", "INCONCLUSIVE"], "FAIL")],
)
def test_the_worst_verdict_is_the_report_s(
    parts: list[str], verdict: str, make_site: SiteMaker, make_plan: PlanMaker, quick: None
) -> None:
    report = AuditReport(**(vars(a_report(make_plan())) | {"checks": tuple(map(check, parts))}))
    assert report.verdict == verdict
    folder = a_site(make_site("alder"))
    write_audit(folder, report, folder / "audit")
    assert f'<section class="verdict {verdict}">' in (folder / "audit" / PAGE).read_text()


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ({"name": "reptile", "inner_steps": 1}, ()),
        ({"name": "maml", "inner_steps": 1, "episodes": 2}, ("a weak attack",)),
    ],
    ids=["reptile", "maml"],
)
def test_the_page_says_where_the_attack_was_not_quite_the_study(
    make_site: SiteMaker, make_plan: PlanMaker, algorithm: dict[str, Any], said: tuple[str, ...]
) -> None:
    folder = a_site(make_site("alder"))
    plan = make_plan(rounds=3, algorithm=algorithm)
    write_audit(folder, a_report(plan), folder / "audit")
    page = (folder / "audit" / PAGE).read_text()
    for words in ("Beside 600 canaries stood at most 200 drawn patients", "Of 3 rounds 1 were run", *said):
        assert words in page
    assert ("weak attack" in page) == (algorithm["name"] == "maml")


def a_report(plan: StudyPlan) -> AuditReport:
    run = OneRun(
        title="a run", verdict="PASS", claimed=8.0, delta=0.01, shown=float("nan"), noise_multiplier=1.0, rounds=1
    )
    return AuditReport(
        site="alder",
        time=0.0,
        seconds=1.0,
        version="1",
        study=plan.study,
        plan_digest=plan.digest,
        patients=10,
        phantom=True,
        delta=0.01,
        epsilon=8.0,
        noise_multiplier=1.0,
        checks=(check("PASS"),),
        runs=(run, run),
        departures=departures(plan, (run, run)),
    )


def test_without_the_site_s_key_nothing_is_signed(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    folder = make_site("alder")
    with pytest.raises(UsageError, match=r"site\.key: cannot be read"):
        write_audit(folder, a_report(make_plan()), folder / "audit")
    assert not (folder / "audit").exists()


# ---- which plan --------------------------------------------------------------------------------------------------


def test_the_plan_is_the_one_given_or_the_one_approved_last(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    folder = make_site("alder")
    with pytest.raises(UsageError, match=r"no study is approved here -- give a plan: `--plan study.yaml`"):
        plan_to_audit(folder)
    first, last = make_plan(study="first"), make_plan(study="last")
    for plan in (first, last):
        approval.approve(folder / "state", plan, by="a test")
    assert plan_to_audit(folder) == last
    assert plan_to_audit(folder, study="first") == plan_to_audit(folder, study=first.digest[:12]) == first
    with pytest.raises(UsageError, match="no approved study 'other'"):
        plan_to_audit(folder, study="other")


def test_what_promises_nothing_or_is_for_others_is_refused(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    folder = make_site("alder")
    for plan, error, match in (
        (make_plan(study="open", privacy=None), UsageError, "has no privacy: it promises nothing to audit"),
        (make_plan(study="none", algorithm={"name": "local_only"}), UsageError, "asks no private query"),
        (make_plan(study="far", sites={"birch": {"labels": "lesion", "patients": 9}}, quorum=1), SiteUnfit, "'alder'"),
    ):
        approval.approve(folder / "state", plan, by="a test")
        with pytest.raises(error, match=match):
            plan_to_audit(folder, study=plan.study)


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verdict", "code"), [("PASS", 0), ("INCONCLUSIVE", 0), ("FAIL", 1)])
def test_the_command_s_exit_code_is_the_verdict(
    verdict: str, code: int, make_site: SiteMaker, make_plan: PlanMaker, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.audit.run_self_test", lambda: iter([check(verdict)]))
    folder, plan = a_site(make_site("alder")), make_plan()
    approval.approve(folder / "state", plan, by="a test")
    done = CliRunner().invoke(app, ["audit", str(folder)])
    assert done.exit_code == code, done.output
    assert f"{verdict:12} gradient: mu at least 1.70 of 2.00 claimed" in done.stdout
    assert f"Report: {folder / 'audit' / PAGE}" in done.stdout
    shown = CliRunner().invoke(app, ["audit", "--verify", str(folder / "audit" / REPORT)])
    assert shown.exit_code == 0
    assert shown.stdout.startswith(f"{verdict}: site alder, study tiny")
    told = CliRunner().invoke(app, ["audit", "--verify", str(folder / "audit" / REPORT), "--json"])
    assert json.loads(told.stdout)["audit"]["verdict"] == verdict


def test_the_key_that_signs_is_the_site_s(make_site: SiteMaker, make_plan: PlanMaker, tmp_path: Path) -> None:
    folder = a_site(make_site("alder"))
    write_audit(folder, a_report(make_plan()), tmp_path)
    key = load_signing_key(folder / "state" / "site.key")
    assert verified_audit(tmp_path / REPORT)[1] == public_hex(key)
