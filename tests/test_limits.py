"""The hospital's limits come before any approval, speak of no data, and a person reads what a study costs."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import pytest

from client.ledger import FILE, Ledger, Terms
from client.limits import cost_here, require_open, require_within
from client.review import review
from client.site import Limits, load_site_config
from common.accounting import Event, epsilon, queries_per_round
from common.errors import LedgerDamaged, OutsideLimits, SiteUnfit
from common.plan import StudyPlan

PlanMaker = Callable[..., StudyPlan]
SiteMaker = Callable[..., Path]


@pytest.fixture
def make_plan(make_plan: PlanMaker) -> PlanMaker:
    """With a noise multiplier of its own, so that nothing is to be solved for."""
    return lambda **changes: make_plan(
        **{"privacy": {"epsilon": 20.0, "delta": 0.01, "noise_multiplier": 2.0}} | changes
    )


def limited(folder: Path, limits: str) -> Path:
    with (folder / "site.yaml").open("a") as file:
        file.write(f"limits: {{{limits}}}\n")
    return folder


def refusal(folder: Path, plan: StudyPlan) -> str:
    with pytest.raises(OutsideLimits) as refused:
        require_within(load_site_config(folder), plan)
    assert str(refused.value) == refused.value.public_reason  # all of it may reach the lab
    return refused.value.public_reason


def test_a_plan_within_the_limits_passes(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    folder = limited(
        make_site("alder"),
        "epsilon_per_study: 20, min_patients: 10, tasks: [classification], algorithms: [reptile]",
    )
    require_within(load_site_config(folder), make_plan())


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ("tasks: [segmentation, anomaly]", "the hospital does not allow the task classification"),
        ("tasks: []", "the hospital does not allow the task classification"),
        ("algorithms: [maml]", "the hospital does not allow the algorithm reptile"),
        ("min_patients: 11", "the plan declares 10 patients here; the hospital wants 11"),
        ("epsilon_per_study: 1.5", "the plan costs epsilon 1.76 here; the hospital allows 1.5 a study"),
    ],
)
def test_each_limit_refuses_with_its_reason(
    make_site: SiteMaker, make_plan: PlanMaker, limits: str, reason: str
) -> None:
    assert refusal(limited(make_site("alder"), limits), make_plan()) == reason


def test_the_reason_is_the_same_whatever_the_data(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    """The plan's declared number decides, not the patients that there are."""
    many, few = make_site("alder", patients=12), make_site("birch", patients=2)
    reasons = {refusal(limited(folder, "min_patients: 11"), make_plan()) for folder in (many, few)}
    assert len(reasons) == 1


def test_a_site_outside_the_plan_is_unfit(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    with pytest.raises(SiteUnfit, match="the plan has no training site 'willow'"):
        require_within(load_site_config(make_site("willow")), make_plan())
    sites = {name: {"labels": "lesion", "patients": 10, "role": role} for name, role in
             (("alder", "held_out"), ("birch", "train"), ("cedar", "train"))}  # fmt: skip
    with pytest.raises(SiteUnfit):
        require_within(load_site_config(make_site("alder")), make_plan(sites=sites))


@pytest.mark.parametrize("delta", [0.1, 0.5, 0.999])
def test_a_delta_that_gives_a_patient_away_is_refused(make_site: SiteMaker, make_plan: PlanMaker, delta: float) -> None:
    """With delta 1/N one of N patients may be published, and epsilon still looks small."""
    plan = make_plan(privacy={"epsilon": 8.0, "delta": delta, "noise_multiplier": 2.0})
    reason = "the plan's delta would allow it to publish one of 10 patients outright"
    assert refusal(make_site("alder"), plan) == reason


def test_a_plan_that_breaks_its_own_promise_is_refused(
    make_site: SiteMaker, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.accounting.noise_multiplier_for", lambda **_: 1.0)  # its advice to the lab: slow
    plan = make_plan(privacy={"epsilon": 1.0, "delta": 0.01, "noise_multiplier": 0.5})
    assert refusal(make_site("alder"), plan) == "the plan's privacy cannot be met"
    assert review(make_site("birch"), plan).objection is not None


def test_without_privacy_nothing_is_charged_and_limits_still_hold(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    plan = make_plan(privacy=None)
    require_within(load_site_config(limited(make_site("alder"), "epsilon_per_study: 0.1")), plan)
    assert cost_here(plan, "alder") is None
    assert "does not allow the task" in refusal(limited(make_site("birch"), "tasks: [anomaly]"), plan)


# ---- hours ---------------------------------------------------------------------------------------------------------


def is_open(hours: str | None, at: str) -> bool:
    try:
        require_open(Limits(hours=hours), datetime.time.fromisoformat(at))
    except OutsideLimits:
        return False
    return True


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("08:00-18:00", ["08:00", "12:00", "17:59:59"], ["07:59:59", "18:00", "00:00", "23:59"]),
        ("19:00-07:00", ["19:00", "23:59:59", "00:00", "06:59:59"], ["07:00", "12:00", "18:59:59"]),
        ("00:00-06:00", ["00:00", "05:59"], ["06:00", "23:59"]),
        ("22:00-00:00", ["22:00", "23:59:59"], ["00:00", "21:59"]),
        (None, ["00:00", "12:00"], []),
    ],
)
def test_hours_hold_across_midnight_and_end_where_they_end(
    hours: str | None, inside: list[str], outside: list[str]
) -> None:
    assert [at for at in inside + outside if is_open(hours, at)] == inside


def test_the_hospitals_own_clock_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
            return cls(2026, 1, 1, 0, 0)  # midnight, which is false as a number of seconds

    monkeypatch.setattr("client.limits.datetime.datetime", Clock)
    require_open(Limits(hours="19:00-07:00"))
    with pytest.raises(OutsideLimits, match="the hospital computes from 08:00-18:00 only"):
        require_open(Limits(hours="08:00-18:00"))


@pytest.mark.parametrize("hours", ["", "8-18", "08:00", "08:00-", "08:00-25:00", "always"])
def test_hours_of_nonsense_are_refused(hours: str) -> None:
    with pytest.raises(ValueError, match='write from and to as "19:00-07:00"'):
        Limits(hours=hours)
    with pytest.raises(ValueError, match="the hours begin when they end"):
        Limits(hours="08:00-08:00")


# ---- what a person reads -------------------------------------------------------------------------------------------


def test_a_review_says_what_the_study_costs_on_top_of_what_is_spent(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    folder, plan = make_site("alder", epsilon=50.0), make_plan()
    spent = Event(sample_rate=0.1, noise_multiplier=2.0, count=6)
    before = review(folder, plan)
    Ledger.open(folder / "state", Terms(epsilon=50.0, delta=0.01)).charge(study="a" * 64, round=1, event=spent)
    after = review(folder, plan)
    assert (before.spent, after.spent) == (0.0, epsilon([spent], 0.01))
    assert after.cost is not None
    coming = Event(after.cost.sample_rate, after.cost.noise_multiplier, queries_per_round(plan) * plan.rounds)
    assert after.after == epsilon([spent, coming], 0.01) > before.after == after.cost.epsilon
    text = "\n".join(after.lines("leipzig"))
    assert text.startswith(f"Study 'tiny', signed by leipzig; digest {plan.digest}\n")
    assert f"epsilon {after.spent:.3f} of 50 is spent;\n  after all 3 rounds of this study it would be" in text
    assert "REFUSED" not in text
    assert "does not cover" not in text
    told = after.to_json()
    assert (told["digest"], told["epsilon_after"], told["objection"]) == (plan.digest, after.after, None)


def test_a_review_says_that_the_budget_does_not_cover_it(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    text = "\n".join(review(make_site("alder", epsilon=1.0), make_plan()).lines("leipzig"))
    assert "The budget does not cover it: the site would refuse the last rounds." in text


def test_a_review_says_what_the_hospital_itself_refuses(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    reviewed = review(limited(make_site("alder"), "tasks: [anomaly]"), make_plan())
    last = list(reviewed.lines("leipzig"))[-1]
    assert last == "REFUSED: the hospital does not allow the task classification"
    assert reviewed.to_json()["objection"] == "the hospital does not allow the task classification"
    elsewhere = review(make_site("willow"), make_plan())
    assert isinstance(elsewhere.objection, SiteUnfit)
    assert elsewhere.cost is None


def test_a_lost_ledger_is_not_reviewed_as_a_full_budget(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    folder = make_site("alder")
    Ledger.open(folder / "state", Terms(epsilon=10.0, delta=0.01))
    (folder / "state" / FILE).unlink()
    with pytest.raises(LedgerDamaged):
        review(folder, make_plan())
