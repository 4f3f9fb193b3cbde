"""The secure sum: exact, uniform to who sees a part of it, refused where it would say too much, ended by a dropout."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import client.secure_sum
from client import approval
from client.membership import SITE_KEY
from client.release_store import ReleaseStore
from client.secure_sum import Masking, Masks
from client.worker import Worker
from common.errors import BadInstruction, PlanError
from common.keys import MASKING_KEY, fingerprint, make_signing_key, parse_signed, public_hex, sign
from common.params import Arrays, to_tensors
from common.plan import StudyPlan, load_plan
from common.plan_in_words import plan_in_words
from common.records import SiteReply, TrainInstruction
from common.secure_sum import FixedPoint, fixed_point, roster_digest, roster_of
from common.wire import decode, encode, pack, unpack
from server.aggregation import MaskedMean, reason_to_reject
from server.run_folder import final_parameters, run_history, starting_parameters
from server.simulation import Federation, run_federation
from server.start import initial_parameters, round_names
from tests.conftest import PlanMaker, SiteMaker
from tests.test_worker import charges, instruct, instruction, real_worker

pytestmark = pytest.mark.usefixtures("at_once")
CERTAIN = 1e-7
NAMES = ("alder", "birch", "cedar", "elm")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.reply_time.time.sleep", lambda seconds: None)


def secure_plan(make_plan: PlanMaker, names: tuple[str, ...] = NAMES, **changes: Any) -> StudyPlan:
    settings = {
        "sites": {name: {"labels": "lesion", "patients": 10} for name in names},
        "quorum": 3,
        "outer": {"secure_sum": {"range": 16}},
        "privacy": {"epsilon": 100.0, "delta": 0.01, "noise_multiplier": 4.0, "monitor": False},
        "evaluation": {"compare": []},
    }
    return make_plan(**{**settings, **changes})


def maskings(plan: StudyPlan, names: tuple[str, ...], *, signed: bool = False) -> list[Masking]:
    encoding = fixed_point(plan)
    assert encoding is not None
    signers = [Ed25519PrivateKey.generate() if signed else None for _ in names]
    return [
        Masking(name, plan, encoding, X25519PrivateKey.generate(), signer, {})
        for name, signer in zip(names, signers, strict=True)
    ]


def roster(sites: list[Masking]) -> str:
    return roster_of({site.site: site.document() for site in sites})


def updates(names: tuple[str, ...], size: int = 1000, seed: int = 0) -> dict[str, Arrays]:
    rng = np.random.default_rng(seed)
    return {
        name: {"w": rng.normal(0, 1, (size, 2)).astype(np.float32), "b": rng.normal(0, 9, 3).astype(np.float32)}
        for name in names
    }


def masked_by(site: Masking, roster: str, update: Arrays, *, round: int = 1) -> SiteReply:
    masks = site.masks(roster, round)
    return masks.masked(SiteReply(site.site, "ok", update=update, masked_for=masks.roster_digest))


# ---- fixed point -----------------------------------------------------------------------------------------------------


@given(st.floats(1e-3, 1e5), st.integers(3, 50), st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_the_sum_of_encoded_numbers_is_exact_and_never_overflows(size: float, sites: int, values: list[float]) -> None:
    encoding = FixedPoint(size, sites)
    array = np.array(values, dtype=np.float32)
    total = np.zeros(len(array), dtype=np.uint32)
    for _ in range(sites):  # all of them as far out as can be
        total += encoding.encode(array)
    steps = np.rint(np.clip(array.astype(np.float64), -size, size) / encoding.step)
    assert np.array_equal(encoding.decode(total), sites * steps * encoding.step)
    assert np.abs(sites * steps).max() <= 2**31 - 1
    assert encoding.step <= 2 * size * sites / (2**31 - 1 - sites)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_encoded(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        FixedPoint(1.0, 3).encode(np.array([value]))


# ---- masks -----------------------------------------------------------------------------------------------------------


def sum_is_exact(plan: StudyPlan, names: tuple[str, ...]) -> bool:
    """The masked sum is the sum of the encoded updates, bit by bit."""
    sites, plain = maskings(plan, names, signed=True), updates(names)
    everyone, encoding = roster(sites), sites[0].encoding
    totals = {key: np.zeros_like(value, dtype=np.uint32) for key, value in plain[names[0]].items()}
    wanted = {key: value.copy() for key, value in totals.items()}
    for site in sites:
        for key, value in masked_by(site, everyone, plain[site.site]).update.items():
            totals[key] += value
            wanted[key] += encoding.encode(plain[site.site][key])
    return all(np.array_equal(totals[key], wanted[key]) for key in totals)


@pytest.mark.parametrize("sites", [3, 4])
def test_the_sum_is_exact(make_plan: PlanMaker, sites: int) -> None:
    assert sum_is_exact(secure_plan(make_plan), NAMES[:sites])


def _both_add(self: Masks, update: Arrays) -> Arrays:
    total = np.concatenate([self.encoding.encode(update[name]).ravel() for name in sorted(update)])
    for key in self.streams.values():
        total = total + np.frombuffer(client.secure_sum._stream(key, 4 * len(total)), dtype="<u4")
    parts = np.split(total, np.cumsum([update[name].size for name in sorted(update)])[:-1])
    return {n: p.reshape(update[n].shape) for n, p in zip(sorted(update), parts, strict=True)}


def test_masks_that_do_not_cancel_are_noticed(make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Masks, "_masked", _both_add)
    assert not sum_is_exact(secure_plan(make_plan), NAMES)


def is_uniform(words: np.ndarray) -> bool:
    """Every byte of uint32 words, by chi-square, and each word against the next."""
    for shift in (0, 8, 16, 24):
        counts = np.bincount((words >> shift) & 255, minlength=256)
        if stats.chisquare(counts).pvalue < CERTAIN:
            return False
    unit = words / 2**32
    ks = stats.kstest(unit, "uniform").pvalue
    return bool(ks > CERTAIN and stats.pearsonr(unit[1:], unit[:-1]).pvalue > CERTAIN)


def uniform_in_every_view(plan: StudyPlan) -> bool:
    """One masked update of zeros, its change to the next round, and to another site's: all uniform."""
    sites = maskings(plan, NAMES)
    everyone, zeros = roster(sites), {"w": np.zeros(40_000, np.float32)}
    one, again, other = (
        masked_by(site, everyone, zeros, round=number).update["w"]
        for site, number in ((sites[0], 1), (sites[0], 2), (sites[1], 1))
    )
    return is_uniform(one) and is_uniform(again - one) and is_uniform(other - one)


def test_a_masked_update_is_uniform_to_who_has_no_key(make_plan: PlanMaker) -> None:
    assert uniform_in_every_view(secure_plan(make_plan))


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("_stream", lambda key, length: bytes(length)),
        ("_stream", lambda key, length: (key * (length // 32 + 1))[:length]),
        ("_stream_key", lambda shared, context: shared),  # the same mask in every round
    ],
    ids=["no-mask", "short-period", "round-not-in-key"],
)
def test_masks_that_hide_too_little_are_noticed(
    make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch, name: str, bug: Callable[..., bytes]
) -> None:
    monkeypatch.setattr(client.secure_sum, name, bug)
    assert not uniform_in_every_view(secure_plan(make_plan))


# ---- rosters ---------------------------------------------------------------------------------------------------------


def _other_body(site: Masking, **changes: str) -> str:
    body = json.loads(parse_signed(site.document()).body) | changes
    assert site.signer is not None
    return sign(MASKING_KEY, json.dumps(body), site.signer).to_json()


def _unsigned(site: Masking) -> str:
    return dataclasses.replace(parse_signed(site.document()), signature="00" * 64).to_json()


ROSTERS: dict[str, Callable[[list[Masking]], str]] = {
    "empty": lambda sites: "",
    "no-json": lambda sites: "{",
    "deep": lambda sites: "[" * 50_000,
    "large": lambda sites: roster(sites) + " " * 200_000,
    "list": lambda sites: "[]",
    "numbers": lambda sites: '{"birch": 1}',
    "too-few": lambda sites: roster(sites[:2]),
    "without-me": lambda sites: roster(sites[1:]),
    "stranger": lambda sites: roster([*sites, dataclasses.replace(sites[1], site="yew")]),
    "my-key-changed": lambda sites: roster(
        [dataclasses.replace(sites[0], key=X25519PrivateKey.generate()), *sites[1:]]
    ),
    "unsigned": lambda sites: roster_of({s.site: _unsigned(s) if s.site == "birch" else s.document() for s in sites}),
    "for-another": lambda sites: roster_of({s.site: sites[0].document() for s in sites}),
    "other-study": lambda sites: roster_of({s.site: _other_body(s, study="0" * 64) for s in sites}),
    "no-point": lambda sites: roster_of({s.site: _other_body(s, key="00") for s in sites}),
    "low-order": lambda sites: roster_of(
        {s.site: _other_body(s, key="00" * 32) if s.site == "birch" else s.document() for s in sites}
    ),
}


@pytest.mark.parametrize("name", ROSTERS)
def test_a_roster_that_does_not_fit_is_refused(make_plan: PlanMaker, name: str) -> None:
    sites = maskings(secure_plan(make_plan), NAMES, signed=True)
    sites[0].masks(roster(sites), 1)
    with pytest.raises(BadInstruction):
        sites[0].masks(ROSTERS[name](sites), 1)


@pytest.mark.parametrize(
    ("peers", "fits"),
    [
        (lambda sites: {}, True),
        (lambda sites: {s.site: fingerprint(public_hex(s.signer)) for s in sites}, True),
        (lambda sites: {s.site: fingerprint(public_hex(sites[0].signer)) for s in sites}, False),
        (lambda sites: {"birch": fingerprint(public_hex(sites[1].signer))}, False),
    ],
    ids=["not-compared", "compared", "the-lab-in-the-middle", "one-only"],
)
def test_fingerprints_that_hospitals_compared_are_checked(
    make_plan: PlanMaker, peers: Callable[[list[Masking]], dict[str, str]], fits: bool
) -> None:
    sites = maskings(secure_plan(make_plan), NAMES, signed=True)
    site = dataclasses.replace(sites[0], peers=peers(sites))
    if fits:
        assert site.masks(roster(sites), 1).streams.keys() == set(NAMES[1:])
    else:
        with pytest.raises(BadInstruction):
            site.masks(roster(sites), 1)


# ---- workers ---------------------------------------------------------------------------------------------------------


def a_real_worker(make_site: SiteMaker, name: str, plan: StudyPlan, seed: int) -> Worker:
    folder = make_site(name, seed=seed, epsilon=200.0)
    make_signing_key(folder / "state" / SITE_KEY)
    approval.approve(folder / "state", plan, by="Dr Example")
    return real_worker(folder)


def test_real_workers_sum_over_the_wire_and_survive_restarts(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    plan = secure_plan(make_plan)
    workers = {name: a_real_worker(make_site, name, plan, i) for i, name in enumerate(NAMES)}
    keys = {name: unpack(pack(w.prepare(instruction(plan))), SiteReply).masking_key for name, w in workers.items()}
    order = unpack(pack(instruct(plan, roster=roster_of(keys))), TrainInstruction)
    restarted = Worker(workers["elm"]._folder, state=workers["elm"]._state)
    replies = {name: (restarted if name == "elm" else w).train(order) for name, w in workers.items()}
    mean = MaskedMean({n: v.shape for n, v in order.shared.items()}, fixed_point(plan))  # type: ignore[arg-type]
    plain: dict[str, Any] = {}
    for name, worker in workers.items():
        reply = decode(encode(unpack(pack(replies[name]), SiteReply)), SiteReply)
        assert reply.code == "ok"
        assert all(value.dtype == np.uint32 for value in reply.update.values())
        mean.add(reply.update, weight=1.0)
        stored = ReleaseStore(worker._state / "releases" / plan.digest).load(1)
        assert stored is not None
        plain[name] = to_tensors(stored.update)
    step = FixedPoint(16.0, 4).step
    for key, value in mean.mean().items():
        wanted = torch.stack([plain[name][key] for name in NAMES]).double().mean(dim=0)
        assert float((value - wanted).abs().max()) <= step
    again = workers["alder"].train(order)  # sent again, not drawn again
    assert all(np.array_equal(again.update[key], replies["alder"].update[key]) for key in again.update)


def test_a_release_is_masked_for_one_roster_only(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    plan = secure_plan(make_plan)
    workers = {name: a_real_worker(make_site, name, plan, i) for i, name in enumerate(NAMES)}
    keys = {name: worker.prepare(instruction(plan)).masking_key for name, worker in workers.items()}
    alder = workers["alder"]
    assert alder.train(instruct(plan)).code == "bad-instruction"  # without a roster nothing is charged
    assert charges(alder, plan) == 0
    assert alder.train(instruct(plan, roster=roster_of(keys))).code == "ok"
    fewer = roster_of({name: keys[name] for name in NAMES[:3]})
    refused = alder.train(instruct(plan, roster=fewer))
    assert (refused.code, refused.update) == ("bad-instruction", {})
    assert alder.train(instruct(plan, round=2, roster=fewer)).code == "ok"
    assert charges(alder, plan) == 2


def test_a_plan_without_a_secure_sum_takes_no_roster(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    plan, folder = secure_plan(make_plan, outer={}), make_site("alder", epsilon=200.0)
    approval.approve(folder / "state", plan, by="Dr Example")
    worker = real_worker(folder)
    assert worker.prepare(instruction(plan)).masking_key == ""
    assert worker.train(instruct(plan, roster="{}")).code == "bad-instruction"
    assert worker.train(instruct(plan)).code == "ok"


# ---- the lab ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_federation(make_plan: PlanMaker, make_site: SiteMaker, tmp_path: Path) -> Callable[[StudyPlan], Federation]:
    folders = {name: make_site(name, seed=i, epsilon=200.0) for i, name in enumerate(NAMES)}
    return lambda plan: Federation(plan, tmp_path / "run", folders, initial_parameters(plan, tmp_path))


def stored_mean(federation: Federation, round: int, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    releases = [
        ReleaseStore(federation.folder / "sites" / name / "releases" / federation.plan.digest).load(round)
        for name in names
    ]
    tensors = [to_tensors(release.update) for release in releases if release is not None]
    return {key: torch.stack([each[key] for each in tensors]).mean(dim=0) for key in tensors[0]}


def test_a_federation_learns_from_the_sum_alone(
    make_federation: Callable[[StudyPlan], Federation], make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lab's parameters move by the mean of what the sites hold; what it receives is no update."""
    federation, received = make_federation(secure_plan(make_plan, rounds=1)), []
    honest = MaskedMean.add
    monkeypatch.setattr(MaskedMean, "add", lambda s, u, **w: (received.append(u), honest(s, u, **w))[1])
    run_federation(federation)
    start, final = starting_parameters(federation.folder), final_parameters(federation.folder)
    mean = stored_mean(federation, 1, NAMES)
    assert set(mean) == set(round_names(federation.plan))
    for key, value in mean.items():
        assert torch.allclose(final[key] - start[key], value, atol=1e-6)
    assert len(received) == 4
    assert is_uniform(np.concatenate([value.ravel() for update in received for value in update.values()]))


def test_a_dropout_ends_the_round_and_the_next_has_new_masks(
    make_federation: Callable[[StudyPlan], Federation], make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Birch fails in round 2: the round is lost, it sits out round 3, and is back in round 4."""
    federation, digests = make_federation(secure_plan(make_plan, rounds=4)), {}
    honest = Worker.train

    def train(self: Worker, order: TrainInstruction) -> SiteReply:
        digests[order.round] = (sorted(json.loads(order.roster)), roster_digest(order.roster))
        if (self.site, order.round) == ("birch", 2):
            return SiteReply(site="birch", code="internal-failure", reason="the site failed")
        return honest(self, order)

    monkeypatch.setattr(Worker, "train", train)
    run_federation(federation)
    records = run_history(federation.folder)
    assert [record.status for record in records[1:]] == ["committed", "below_quorum", "committed", "committed"]
    assert [names for names, _ in digests.values()] == [
        list(NAMES),
        list(NAMES),
        ["alder", "cedar", "elm"],
        list(NAMES),
    ]
    birch = {record.round: next(o for o in record.sites if o.site == "birch") for record in records[1:]}
    assert (birch[2].status, birch[3].status, birch[4].status) == ("failed", "absent", "ok")
    assert birch[3].reason == "it dropped out of the round before"
    one, two, three = (final_parameters(federation.folder, round=number) for number in (1, 2, 3))
    assert all(one[key].equal(two[key]) for key in one)
    for key, value in stored_mean(federation, 3, ("alder", "cedar", "elm")).items():
        assert torch.allclose(three[key] - two[key], value, atol=1e-6)


def test_a_lost_round_is_summed_again_from_what_was_sent(
    make_federation: Callable[[StudyPlan], Federation], make_plan: PlanMaker
) -> None:
    federation = make_federation(secure_plan(make_plan, rounds=2))
    run_federation(federation)
    before = final_parameters(federation.folder)
    (federation.folder / "round-0002.safetensors").unlink()
    run_federation(federation, resume=True)
    after = final_parameters(federation.folder)
    assert all(before[key].equal(after[key]) for key in before)  # integers: to the last bit, in any order


TEMPLATE = {"w": (2,)}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"masked_for": "other"}, "does not carry the masks of this round's sites"),
        ({"masked_for": ""}, "does not carry the masks of this round's sites"),
        ({"update": {"w": np.zeros(2, np.float32)}}, "w is float32"),
        ({"update": {"w": np.zeros(3, np.uint32)}}, "has shape (3,)"),
    ],
    ids=["good", "other-roster", "unmasked", "float", "shape"],
)
def test_what_is_not_masked_for_the_round_is_kept_out(changes: dict[str, Any], reason: str | None) -> None:
    reply = SiteReply("alder", "ok", plan_digest="p", round=1, update={"w": np.zeros(2, np.uint32)}, masked_for="m")
    found = reason_to_reject(
        dataclasses.replace(reply, **changes), site="alder", plan_digest="p", round=1, template=TEMPLATE, masked_for="m"
    )
    assert found is None if reason is None else reason in str(found)


def test_a_plain_round_takes_no_integers() -> None:
    reply = SiteReply("alder", "ok", plan_digest="p", round=1, update={"w": np.zeros(2, np.uint32)})
    assert reason_to_reject(reply, site="alder", plan_digest="p", round=1, template=TEMPLATE) == "w is uint32"


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"outer": {"secure_sum": {}, "weights": "patients"}}, "in a secure sum the lab sees no update that it could"),
        ({"privacy": {"epsilon": 8.0, "monitor": True}}, "every hospital's score would leave by itself"),
        ({"quorum": 2}, "the sum of so few says too much of each"),
        ({"evaluation": {"compare": [], "leave_one_out": ["alder"]}, "sites": 3}, "over 2 hospitals, one left out"),
        ({"sites": 51}, "a secure sum over 51 hospitals"),
        ({"outer": {"secure_sum": {"range": -1}}}, "range"),
        (
            {"outer": {}, "evaluation": {"compare": [{"name": "fedavg", "outer": {
                "secure_sum": {}, "weights": "patients"}}]}},
            "leave outer.secure_sum out of comparisons",
        ),
    ],
    ids=["weights", "monitor", "quorum", "leave-one-out", "fifty-one", "range", "comparison"],
)  # fmt: skip
def test_a_plan_that_contradicts_a_secure_sum_is_refused(
    make_plan: PlanMaker, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    good = secure_plan(make_plan).model_dump(mode="json")
    if isinstance(changes.get("sites"), int):
        sites = {f"site{n:02d}": {"labels": "lesion", "patients": 10} for n in range(changes["sites"])}
        changes = {**changes, "sites": sites}
        if "evaluation" in changes:
            changes["evaluation"] = {"compare": [], "leave_one_out": ["site00"]}
    (tmp_path / "plan.yaml").write_text(json.dumps(good))
    assert load_plan(tmp_path / "plan.yaml").digest == secure_plan(make_plan).digest
    (tmp_path / "plan.yaml").write_text(json.dumps(good | changes))
    with pytest.raises(PlanError) as caught:
        load_plan(tmp_path / "plan.yaml")
    assert reason in str(caught.value)


def test_the_range_is_in_the_digest(make_plan: PlanMaker) -> None:
    plans = [secure_plan(make_plan, outer={"secure_sum": spec}) for spec in ({}, {"range": 8}, None)]
    assert len({plan.digest for plan in plans}) == 3


def test_the_plan_says_so_in_words(make_plan: PlanMaker) -> None:
    leaves = plan_in_words(secure_plan(make_plan, privacy=None), [], shared_numbers=7)[3]
    assert "masked: the lab can read only the sum over all hospitals of a round" in leaves
    assert "masked" not in plan_in_words(make_plan(privacy=None), [], shared_numbers=7)[3].split("Beside")[0]


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("sites", "most_s"), [(3, 2.0), (10, 4.0), (50, 20.0)])
def test_its_cost_is_about_what_its_module_says(make_plan: PlanMaker, sites: int, most_s: float) -> None:
    """CPU seconds of a site for a million numbers, and bytes on the wire."""
    names = tuple(f"site{n:02d}" for n in range(sites))
    everyone = maskings(secure_plan(make_plan, names), names, signed=True)
    text, update = roster(everyone), {"w": np.zeros(1_000_000, np.float32)}
    began = time.process_time()
    reply = masked_by(everyone[0], text, update)
    seconds = time.process_time() - began
    assert seconds < most_s
    assert len(pack(reply)) < 4_001_500
    assert len(text) < 700 * sites
