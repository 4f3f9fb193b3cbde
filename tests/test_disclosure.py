"""What a reply carries, and when it leaves: charged, or the same whatever the data.

The checks are functions of a worker's replies, so that a leak can be planted and must be caught by the same check.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import client.private_data
import client.study
import client.worker
from client import approval
from client.data.checks import Count, SiteReport, coarsened
from client.data.load import load_site
from client.reply_time import ReplyTimes, span_s
from client.worker import Worker
from common.disclosure import LEAST_COUNT, coarse, shown
from common.errors import InternalFailure
from common.params import digest, to_arrays, zeros_like
from common.plan import StudyPlan
from common.plan_in_words import plan_in_words
from common.records import (
    DISCLOSURES,
    Disclosure,
    PrepareInstruction,
    SiteReply,
    TrainInstruction,
    disclosures,
)
from common.starting_point import network_of, starting, travelling
from common.tasks import Task, task_of
from common.wire import pack
from tests.conftest import PlanMaker, SiteMaker, join_lab

CHARGED = {name for name, disclosure in DISCLOSURES.items() if disclosure.charged}


# ---- the list -------------------------------------------------------------------------------------------------------


def test_every_field_of_a_reply_says_what_charges_it_or_why_it_is_independent_of_data() -> None:
    assert DISCLOSURES.keys() == {spec.name for spec in dataclasses.fields(SiteReply)}
    assert {"update", "accuracy"} == CHARGED


@pytest.mark.parametrize(
    "spec",
    [
        dataclasses.field(default=0),
        dataclasses.field(default=0, metadata={"disclosure": Disclosure("a count", "", charged=False)}),
        dataclasses.field(default=0, metadata={"disclosure": Disclosure("", "because", charged=True)}),
    ],
    ids=["undeclared", "no-reason", "no-words"],
)
def test_a_field_without_a_charge_or_a_reason_does_not_import(spec: Any) -> None:
    more = dataclasses.make_dataclass("More", [("patients", "int", spec)], bases=(SiteReply,), frozen=True)
    with pytest.raises(TypeError, match=r"More\.patients would leave the hospital without a charge or a reason"):
        disclosures(more)


def test_the_plan_in_words_names_everything_that_leaves(make_plan: PlanMaker) -> None:
    sentence = next(s for s in plan_in_words(make_plan(privacy=None), [], shared_numbers=7) if "What leaves" in s)
    assert all(disclosure.words in sentence for disclosure in DISCLOSURES.values() if not disclosure.charged)


# ---- two hospitals that differ in everything -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Site:
    """A simulated worker with a plan; a fresh state at each call of `replies`."""

    folder: Path
    plan: StudyPlan

    def replies(self, state: str = "state", rounds: int = 2) -> list[SiteReply]:
        """Of prepare and of every round."""
        worker = Worker(self.folder, state=self.folder / state, simulated=True)
        initial, shared = self.start()
        prepared = worker.prepare(PrepareInstruction(self.plan.to_json(), signer="", signature="", initial=initial))
        trained = [
            worker.train(TrainInstruction(self.plan.digest, digest(initial), round=number, shared=shared))
            for number in range(1, rounds + 1)
        ]
        return [prepared, *trained]

    def start(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        network = network_of(self.plan, "alder")
        return to_arrays(starting(self.plan, network)), to_arrays(travelling(self.plan, network))


@pytest.fixture
def two_sites(make_plan: PlanMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Site, Site]:
    """One name, one plan; other patients, numbers of images, pictures and labels. Clocks and entropy are fixed."""
    made = []
    for number, (patients, images, labels) in enumerate([(10, 1, [0, 1]), (23, 7, [1, 1, 0])]):
        folder = tmp_path / str(number)
        folder.mkdir()
        rng = np.random.default_rng(number)
        rows = patients * images
        np.savez(
            folder / "data.npz",
            images=rng.integers(0, 256, (rows, 16, 16), dtype=np.uint8),
            labels=np.resize(labels, rows),
            label_names=np.array(["healthy", "lesion"]),
            patient_ids=np.repeat([f"{number}-{i}" for i in range(patients)], images),
        )
        (folder / "site.yaml").write_text("name: alder\nnpz: data.npz\nbudget: {epsilon: 10, delta: 0.01}\n")
        made.append(Site(folder, make_plan()))
    monkeypatch.setattr("client.ledger._now", lambda last: last + 1.0)
    monkeypatch.setattr("client.reply_time.time.monotonic", lambda: 0.0)
    return made[0], made[1]


@pytest.fixture
def fixed_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every private query is asked of the grant, and answers the same at every site."""

    def gradient(self: Any, params: Any, fixed: Any = None) -> Any:
        with self._query(params, fixed):
            return {name: torch.full_like(value, 0.25) for name, value in params.items()}

    def statistic(self: Any, params: Any, fn: Any) -> Tensor:
        with self._query(params, None):
            return torch.tensor([0.5])

    monkeypatch.setattr(client.study.PrivateDataset, "gradient", gradient)
    monkeypatch.setattr(client.study.PrivateDataset, "statistic", statistic)


def bytes_of(reply: SiteReply, *, without: set[str] = frozenset()) -> bytes:  # type: ignore[assignment]
    """On the wire; the fields `without` are emptied."""
    empty = {"update": {}, "accuracy": 0.0}
    return pack(dataclasses.replace(reply, **{name: empty[name] for name in without}))


def independent_fields_are_equal(one: Site, other: Site) -> bool:
    pairs = zip(one.replies(), other.replies(), strict=True)
    return all(bytes_of(a, without=CHARGED) == bytes_of(b, without=CHARGED) for a, b in pairs)


def replies_are_equal(one: Site, other: Site) -> bool:
    return all(bytes_of(a) == bytes_of(b) for a, b in zip(one.replies(), other.replies(), strict=True))


def test_what_is_declared_independent_is_the_same_at_sites_that_differ_in_everything(
    two_sites: tuple[Site, Site],
) -> None:
    one, other = two_sites
    assert independent_fields_are_equal(one, other)
    assert [reply.code for reply in one.replies("again")] == ["ok"] * 3
    assert one.replies("again")[1].seconds == 1


def test_with_private_queries_fixed_the_whole_reply_is_the_same(
    two_sites: tuple[Site, Site], fixed_queries: None
) -> None:
    """So a charged field is a function of private queries and of public things alone."""
    assert replies_are_equal(*two_sites)


@pytest.mark.parametrize(("query", "moved"), [("gradient", "update"), ("statistic", "accuracy")])
def test_each_charged_field_changes_with_its_own_query(
    two_sites: tuple[Site, Site], fixed_queries: None, monkeypatch: pytest.MonkeyPatch, query: str, moved: str
) -> None:
    before = two_sites[0].replies("before")[1]
    fixed = getattr(client.study.PrivateDataset, query)

    def other(self: Any, *arguments: Any) -> Any:
        result = fixed(self, *arguments)
        return {n: 2 * v for n, v in result.items()} if isinstance(result, dict) else result / 2

    monkeypatch.setattr(client.study.PrivateDataset, query, other)
    after = two_sites[0].replies("after")[1]
    same = {name for name in DISCLOSURES if bytes_of_field(before, name) == bytes_of_field(after, name)}
    assert DISCLOSURES.keys() - same == {moved}


def bytes_of_field(reply: SiteReply, name: str) -> str:
    value = getattr(reply, name)
    return digest(value) if isinstance(value, dict) else repr(value)


def _count_in(field: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A worker that puts its number of images into `field` of a reply."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        honest = Worker._reply

        def leaky(self: Worker, study: Any, *arguments: Any, **named: Any) -> SiteReply:
            reply = honest(self, study, *arguments, **named)
            rows, value = len(study.patients.data), getattr(reply, field)
            told = f"{value}{rows}" if isinstance(value, str) else value + rows
            return dataclasses.replace(reply, **{field: told})

        patch.setattr(Worker, "_reply", leaky)

    return plant


def _mean_image_in_update(patch: pytest.MonkeyPatch) -> None:
    honest = client.study.Study.query

    def leaky(self: Any, *arguments: Any) -> Any:
        outcome = honest(self, *arguments)
        shift = np.float32(self.patients.data.images.float().mean())
        return dataclasses.replace(outcome, update={n: v + shift for n, v in outcome.update.items()})

    patch.setattr(client.study.Study, "query", leaky)


def _chatty_refusals(patch: pytest.MonkeyPatch) -> None:
    def leaky(self: Worker, study: str, compute: Any) -> SiteReply:
        reply: SiteReply = compute()
        images = sum(len(study.patients.data) for study in self._studies.values())
        return dataclasses.replace(reply, reason=f"{images} images were looked at")

    patch.setattr(Worker, "_answer", leaky)


LEAKS = {f"count-in-{name}": _count_in(name) for name in ("version", "queries", "epsilon", "ledger_rows", "seconds")}


@pytest.mark.parametrize("plant", [*LEAKS.values(), _chatty_refusals], ids=[*LEAKS, "chatty"])
def test_a_planted_count_is_caught(
    two_sites: tuple[Site, Site], monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    plant(monkeypatch)
    assert not independent_fields_are_equal(*two_sites)


def test_a_planted_mean_image_is_caught(
    two_sites: tuple[Site, Site], fixed_queries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _mean_image_in_update(monkeypatch)
    assert independent_fields_are_equal(*two_sites)  # the update is charged: the other check must find it
    assert not replies_are_equal(*two_sites)


def test_the_workers_status_is_independent_of_data_too(two_sites: tuple[Site, Site]) -> None:
    told = []
    for site in two_sites:
        site.replies()
        worker = Worker(site.folder, state=site.folder / "state", simulated=True)
        told.append(json.dumps(worker.status()))
    assert told[0] == told[1]


# ---- nobody, a broken patient, a large patient -----------------------------------------------------------------------


def _empty_batches(patch: pytest.MonkeyPatch) -> None:
    nobody = torch.zeros(0, dtype=torch.int64)
    patch.setattr(client.private_data, "draw_patients", lambda *_, **__: nobody)


def _broken_patient(patch: pytest.MonkeyPatch) -> None:
    """The loss and the score of every image of one label are not a number."""

    def broken(plan: StudyPlan, site: str) -> Task:
        task = task_of(plan, site)

        def spoil(values: Tensor, labels: Tensor) -> Tensor:
            return torch.where(labels == 1, values * math.nan, values)

        return dataclasses.replace(
            task, loss=lambda o, y: spoil(task.loss(o, y), y), score=lambda o, y: spoil(task.score(o, y), y)
        )

    patch.setattr(client.study, "task_of", broken)


def _large_patient(patch: pytest.MonkeyPatch) -> None:
    """The first patient has most of the images, all of which count, in many physical batches."""

    def load(folder: Path, plan: StudyPlan, *, site: str) -> Any:
        data = load_site(folder, plan, site=site)
        extra = torch.zeros(300, dtype=torch.int64)
        return data.rows(torch.cat([torch.arange(len(data)), extra]))

    patch.setattr(client.study, "load_site", load)


CASES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "ordinary": lambda patch: None,
    "nobody": _empty_batches,
    "broken": _broken_patient,
    "large": _large_patient,
}


def _size(reply: SiteReply) -> int:
    """Bytes on the wire; a score takes as many digits as it has, which its charge covers."""
    return len(bytes_of(reply, without={"accuracy"}))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The private queries that were asked, in order."""
    found: list[str] = []
    for name in ("gradient", "statistic"):
        honest = getattr(client.study.PrivateDataset, name)

        def watched(self: Any, *arguments: Any, _name: str = name, _honest: Any = honest, **named: Any) -> Any:
            found.append(_name)
            return _honest(self, *arguments, **named)

        monkeypatch.setattr(client.study.PrivateDataset, name, watched)
    return iter([found])


def test_nobody_a_broken_and_a_large_patient_look_alike(
    make_site: SiteMaker, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch, asked: Iterator[list[str]]
) -> None:
    """The same code, reason, size, number of private queries, and span of time."""
    plan = make_plan(sampling={"sample_rate": 0.5, "max_images_per_patient": 400})
    folder, found, seen = make_site("alder", images=1), next(asked), {}
    for name, plant in CASES.items():
        found.clear()
        with monkeypatch.context() as patch:
            plant(patch)
            patch.setattr("client.reply_time.time.monotonic", lambda: 0.0)
            reply = Site(folder, plan).replies(name, rounds=1)[1]
        assert all(np.isfinite(value).all() for value in reply.update.values())
        assert math.isfinite(reply.accuracy)
        seen[name] = (reply.code, reply.reason, _size(reply), tuple(found), reply.queries, reply.seconds)
    assert seen["ordinary"][0] == "ok"
    assert seen["ordinary"][3] == ("gradient", "gradient", "statistic")
    assert set(seen.values()) == {seen["ordinary"]}


def test_a_patient_who_breaks_the_computation_is_a_failure_without_words(
    make_site: SiteMaker, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(self: Any, params: Any, fixed: Any = None) -> Any:
        raise RuntimeError("patient Jane Doe: image 7 of 4711")

    monkeypatch.setattr(client.study.PrivateDataset, "gradient", breaks)
    reply = Site(make_site("alder"), make_plan()).replies(rounds=1)[1]
    assert (reply.code, reply.reason) == (InternalFailure.code, InternalFailure.public_reason)
    assert b"Jane" not in pack(reply)


# ---- when a reply leaves ---------------------------------------------------------------------------------------------


@given(st.floats(1e-6, 1e6))
def test_a_span_is_the_next_power_of_two(seconds: float) -> None:
    span = span_s(seconds)
    assert math.log2(span).is_integer()
    assert span >= max(seconds, 1.0)
    assert span < max(2 * seconds, 1.0 + 1e-9)


class Clock:
    """A clock that only sleeping and `pass_` move."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.slept = 100.0, 0.0
        patch.setattr("client.reply_time.time.monotonic", lambda: self.now)
        patch.setattr("client.reply_time.time.sleep", self.pass_)

    def pass_(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


def left_after(times: ReplyTimes, clock: Clock, compute_s: float, limit_s: float = math.inf) -> tuple[float, float]:
    """(the span that the reply says, the seconds after which it left) of a round that computes so long."""
    since = clock.now
    clock.pass_(compute_s)
    span = times.span("study", since=since)
    times.wait("study", since=since, limit_s=limit_s)
    return span, clock.now - since


def test_replies_leave_at_the_end_of_a_span_that_never_gets_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, times = Clock(monkeypatch), ReplyTimes(held=True)
    seen = [left_after(times, clock, compute_s) for compute_s in (0.01, 0.9, 0.4, 3.1, 0.01, 2.2, 3.9)]
    assert seen == [(1, pytest.approx(1))] * 3 + [(4, pytest.approx(4))] * 4


def test_what_came_after_the_span_was_said_counts_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, times = Clock(monkeypatch), ReplyTimes(held=True)
    since = clock.now
    assert times.span("study", since=since) == 1
    clock.pass_(1.5)  # storing, on a slow disk
    times.wait("study", since=since, limit_s=math.inf)
    assert left_after(times, clock, 0.1) == (2, pytest.approx(2))


def test_nothing_waits_beyond_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, times = Clock(monkeypatch), ReplyTimes(held=True)
    assert left_after(times, clock, 70.0, limit_s=100.0) == (128, pytest.approx(90))
    assert left_after(times, clock, 95.0, limit_s=100.0) == (128, pytest.approx(95))  # late as it is


def test_a_simulation_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert left_after(ReplyTimes(held=False), clock, 3.0) == (4, 3.0)


@pytest.mark.parametrize("fails", [False, True], ids=["answers", "fails"])
def test_a_real_sites_reply_and_failure_leave_at_the_same_moment(
    make_site: SiteMaker, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """A query takes 1.2 s; one that fails at once leaves no sooner, once the study's span is known."""
    plan, folder = make_plan(), make_site("alder")
    (folder / "site.yaml").write_text((folder / "site.yaml").read_text() + "phantom: true\n")
    join_lab(folder, Ed25519PrivateKey.generate())
    worker, site = Worker(folder, state=folder / "state"), Site(folder, plan)
    monkeypatch.setattr(Worker, "_sent_plan", lambda self, instruction: plan)
    approval.approve(folder / "state", plan, by="a test")
    clock, left = Clock(monkeypatch), []

    def slow(self: Any, params: Any, fixed: Any = None) -> Any:
        clock.pass_(0.6)
        if fails and len(left) == 2:
            raise RuntimeError
        with self._query(params, fixed):
            return zeros_like(params)

    monkeypatch.setattr(client.study.PrivateDataset, "gradient", slow)
    initial, shared = site.start()
    instructions = [TrainInstruction(plan.digest, digest(initial), round=r, shared=shared) for r in (1, 2)]
    calls = [lambda: worker.prepare(PrepareInstruction(plan.to_json(), "", "", initial))]
    calls += [lambda i=i: worker.train(i) for i in instructions]  # type: ignore[misc]
    for call in calls:
        began = clock.now
        reply = call()
        left.append(clock.now - began)
    assert reply.code == ("internal-failure" if fails else "ok")
    assert left == [pytest.approx(1), pytest.approx(2), pytest.approx(2)]


def test_the_hold_is_real_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times, began = ReplyTimes(held=True), time.monotonic()
    times.wait("study", since=began - 0.7, limit_s=math.inf)
    assert 0.25 < time.monotonic() - began < 1.0


# ---- counts that are shown -------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
def test_counts_are_shown_in_tens_and_not_below_ten(count: int) -> None:
    assert shown(count) == ("<10" if count < LEAST_COUNT else f"{count - count % 10}+")
    assert coarse(count) % LEAST_COUNT == 0
    assert 0 <= count - coarse(count) < LEAST_COUNT


@given(st.lists(st.integers(1, 99), min_size=1, max_size=5), st.integers(1, 9))
def test_a_small_count_cannot_be_had_by_subtraction(large: list[int], small: int) -> None:
    """What is shown of the total and of the other labels leaves at least nine values for the small one."""
    rest = [10 * count for count in large]
    total, others = coarse(sum(rest) + small), sum(map(coarse, rest))
    fits = [guess for guess in range(1, 10) if coarse(others + guess) == total]
    assert fits == list(range(1, 10))


def test_a_report_that_may_be_sent_on_has_no_exact_count_age_or_extreme() -> None:
    report = SiteReport(
        Path("site"), "alder", counts=(Count("lesion", "train", 31, 9),), images=57, patients=23, training_patients=19,
        images_per_patient=(1, 2.48, 17), masks=3, modalities={"CT": 57}, sexes={"F": 4, "M": 53},
        scanners={"one": 57}, ages=(3.5, 91.0),
    )  # fmt: skip
    assert coarsened(report) == dataclasses.replace(
        report, counts=(Count("lesion", "train", 30, 0),), images=50, patients=20, training_patients=10,
        images_per_patient=(0, 2, 0), masks=0, modalities={"CT": 50}, sexes={"F": 0, "M": 50},
        scanners={"one": 50}, ages=(0, 100),
    )  # fmt: skip
