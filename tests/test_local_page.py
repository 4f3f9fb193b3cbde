"""The site's own page: only for who has the token; it says what the commands say, and changes nothing."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from client import approval, local_page, local_server
from client.adapted_model import FACTS, PAGE, Facts
from client.cross_validation import ARMS, META
from client.data_check import DataCheck
from client.journal import FILE as JOURNAL
from client.journal import SiteJournal
from client.ledger import FILE as LEDGER
from client.ledger import Ledger
from client.local_page import LocalPage
from client.local_server import HEADERS, local_app
from client.membership import SITE_KEY
from client.release_store import ReleaseStore
from client.review import review
from client.site import load_site_config
from common.accounting import Event
from common.errors import RunError
from common.keys import STUDY, sign
from common.metrics import metrics_of
from common.plan import StudyPlan
from common.records import SiteReply
from tests.conftest import PlanMaker, SiteMaker, join_lab, soon
from tests.readable import Tree, require_readable, text_of

ROOT = Path(__file__).parents[1]
TOKEN, COOKIE = "t" * 43, "consilium-9449"
PATHS = ("/", "/studies", "/privacy", "/privacy/ledger", "/data", "/models")
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
SECRET = "what only people of the hospital may read"
LAB = Ed25519PrivateKey.generate()


def a_model(folder: Path, *, name: str = "lesion") -> Path:
    """As `adapt` leaves it, as far as the page reads it."""
    folder.mkdir(parents=True)
    metrics = {metric: {"mean": 0.7, "low": 0.6, "high": 0.8} for metric in metrics_of("classification")}
    nothing = ("head_lr", "temperature", "calibration_before", "calibration_after", "least_confidence")
    texts = dict.fromkeys(("version", "plan", "start", "start_study", "start_privacy", "model"), "x")
    facts = (
        texts
        | dict.fromkeys((*nothing, "usual_distance", "labels"))
        | {
            **{"site": "alder", "phantom": False, "time": 1.7e9, "own": [], "kind": "classification"},
            **{"label_names": ["healthy", name], "image_size": 16, "channels": 1, "shots": 5, "support_images": 10},
            **{"steps": 1, "lr": 0.1, "patients": 47, "images": 141, "images_of_label": {}, "folds": 5, "repeats": 2},
            **{"chance": 0.5, "metrics": dict.fromkeys(ARMS, metrics), "groups": [], "asked_share": 0.9, "alarms": 0.1},
            **{
                "gains": {arm: metrics for arm in ARMS if arm != META},
                "healthy_scores": [],
                "notes": [],
                "seconds": 1.0,
            },
        }
    )
    (folder / FACTS).write_text(Facts.model_validate(facts).model_dump_json())
    (folder / PAGE).write_text("<!doctype html><title>report</title>")
    return folder


@pytest.fixture
def waiting(make_plan: PlanMaker) -> StudyPlan:
    return make_plan(study="sequel", description=HOSTILE, privacy=given(2.0))


@pytest.fixture
def folder(make_site: SiteMaker, make_plan: PlanMaker, waiting: StudyPlan) -> Path:
    """A study that ran for two rounds, one that waits, and an adapted model."""
    folder, plan = make_site("alder", epsilon=1.5), make_plan(study="lungs", privacy=given(20.0))
    join_lab(folder, LAB)
    state = folder / "state"
    journal, releases = SiteJournal.of(state), ReleaseStore(state / "releases" / plan.digest)
    for sent in (plan, waiting):
        document = sign(STUDY, sent.to_json(), LAB)
        approval.submit(state, sent, document)
        journal.asked(sent, document)
    journal.approved(plan, by=HOSTILE)
    approval.approve(state, plan, by=HOSTILE)
    ledger = Ledger.open(state, load_site_config(folder).budget.terms())
    for round in (1, 2):
        ledger.charge(study=plan.digest, round=round, event=Event(0.5, 20.0, 3))
        update = {"a": np.zeros(100, np.float32)}
        releases.store(SiteReply(site="alder", code="ok", round=round, update=update), {})
        journal.write_up(plan.digest, ledger, releases)
    a_model(folder / "adapted")
    return folder


def given(noise: float) -> dict[str, float]:
    """Privacy with its noise, so that nothing is to be solved for."""
    return {"epsilon": 20.0, "delta": 0.01, "noise_multiplier": noise}


def page_of(folder: Path, *results: Path, exact: bool = False) -> LocalPage:
    return LocalPage(folder, results or (folder / "adapted",), exact, DataCheck(folder))


class Visitor:
    """Asks the application as a browser does, and follows nothing."""

    def __init__(self, app: Any, cookies: dict[str, str]) -> None:
        self.transport, self.cookies = httpx.ASGITransport(app), httpx.Cookies(cookies)

    def request(self, method: str, address: str | httpx.URL, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            here = {"transport": self.transport, "base_url": "http://127.0.0.1:9449", "cookies": self.cookies}
            async with httpx.AsyncClient(**here) as client:
                answer = await client.request(method, address, **options)
                self.cookies = client.cookies
                return answer

        return asyncio.run(ask())

    def get(self, address: str | httpx.URL, **options: Any) -> httpx.Response:
        return self.request("GET", address, **options)


def visitor(page: LocalPage, *, token: str | None = TOKEN) -> Visitor:
    return Visitor(local_app(page, token=TOKEN, cookie=COOKIE), {} if token is None else {COOKIE: token})


# ---- the door


WRONG = ("", "wrong", TOKEN[:-1], TOKEN + "t", "é")


@pytest.mark.parametrize("path", [*PATHS, "/models/x", "/nowhere", "/data?check=1"])
def test_nobody_gets_in_without_the_token(tmp_path: Path, path: str) -> None:
    page = page_of(tmp_path / "alder")
    for token in (None, *WRONG):
        headers = {} if token is None else {"Cookie": f"{COOKIE}={token}".encode()}
        answer = visitor(page, token=None).get(path, headers=headers)
        assert answer.status_code == 403, token
        assert "alder" not in answer.text
        assert "set-cookie" not in answer.headers
    assert page.check.now.number == 0


@pytest.mark.parametrize("token", WRONG, ids=ascii)
def test_a_wrong_token_in_the_address_opens_nothing(tmp_path: Path, token: str) -> None:
    answer = visitor(page_of(tmp_path), token=None).get("/", params={"token": token})
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


def test_the_token_leads_in_and_leaves_the_address(tmp_path: Path) -> None:
    client = visitor(page_of(tmp_path), token=None)
    entered = client.get("/", params={"token": TOKEN})
    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    kept = {part.strip().lower() for part in entered.headers["set-cookie"].split(";")}
    assert {"httponly", "samesite=strict", "path=/"} <= kept
    assert not any(part.startswith(("max-age", "expires", "domain")) for part in kept)  # it ends with the browser
    assert TOKEN not in client.get("/").text
    assert client.get("/").status_code == 200


def test_tokens_are_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    true = local_server.hmac.compare_digest
    monkeypatch.setattr(local_server.hmac, "compare_digest", lambda a, b: bool(compared.append((a, b))) or true(a, b))
    client = visitor(page_of(tmp_path), token="x")
    client.get("/")
    client.get("/", params={"token": "y"})
    assert compared == [(b"x", TOKEN.encode()), (b"y", TOKEN.encode())]


def test_a_name_that_was_led_here_is_turned_away(tmp_path: Path) -> None:
    names = ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:9449", "10.0.0.1:9449", "127.0.0.1:"]
    names += ["[::1]:9449", "evil@127.0.0.1", "127.0.0.1:9449@evil.example", "127x0.0.1", "", "0.0.0.0:9449"]
    client = visitor(page_of(tmp_path), token=None)
    for name in names:
        kept = {"Host": name, "Cookie": f"{COOKIE}={TOKEN}"}
        answers = [client.get("/", params={"token": TOKEN}, headers={"Host": name}), client.get("/data", headers=kept)]
        for answer in answers:
            assert answer.status_code == 421, name
            assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9449", "localhost:8080", "LOCALHOST"])
def test_this_machines_own_names_are_let_in(tmp_path: Path, host: str) -> None:
    headers = {"Host": host, "Cookie": f"{COOKIE}={TOKEN}"}
    assert visitor(page_of(tmp_path)).get("/data", headers=headers).status_code == 200


def test_nothing_but_reading_is_answered(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    client = visitor(page)
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "FOO"):
        for path in (*PATHS, "/data?check=1", f"/?token={TOKEN}"):
            assert client.request(method, path).status_code == 405, (method, path)
    assert page.check.now.number == 0


def test_every_answer_forbids_to_load_run_frame_or_keep_anything(folder: Path) -> None:
    client = visitor(page_of(folder))
    answers = [client.get(path) for path in (*PATHS, "/nowhere", "/models/x", "/?token=x", "/data?check=1")]
    answers += [client.get("/", headers={"Host": "evil.example"}), client.request("POST", "/")]
    assert {answer.status_code for answer in answers} == {200, 303, 403, 404, 405, 421}
    for answer in answers:
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    rules = dict(rule.split(maxsplit=1) for rule in HEADERS["Content-Security-Policy"].split("; "))
    assert rules.pop("style-src") == "'unsafe-inline'"
    assert rules.pop("img-src") == "data:"
    assert rules.keys() >= {"default-src", "base-uri", "form-action", "frame-ancestors"}
    assert set(rules.values()) == {"'none'"}
    assert (HEADERS["Cache-Control"], HEADERS["Referrer-Policy"]) == ("no-store", "no-referrer")


def test_no_address_is_a_path(folder: Path) -> None:
    (folder / "state" / SITE_KEY).write_text(SECRET)
    client = visitor(page_of(folder))
    addresses = ["/models/../state/site.key", "/models/..%2fstate%2fsite.key", "/models/%2e%2e/%2e%2e/state/site.key"]
    addresses += ["/models/adapted", "/models/adapted%2freport.html", "/models//etc/passwd", "/site.yaml", "/static/x"]
    for address in (*addresses, "/state/site.key", f"/models/{folder / 'state' / SITE_KEY}"):
        answer = client.get(httpx.URL("http://127.0.0.1:9449", raw_path=address.encode()))
        assert answer.status_code == 404, address
        assert SECRET not in answer.text


def test_a_report_that_leads_out_of_its_folder_is_not_shown(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.html").write_text(SECRET)
    client = visitor(page_of(folder))
    [address] = re.findall(r'href="(/models/[^"]+)"', client.get("/models").text)
    assert client.get(address).text == (folder / "adapted" / PAGE).read_text()
    (folder / "adapted" / PAGE).unlink()
    (folder / "adapted" / PAGE).symlink_to(tmp_path / "secret.html")
    assert client.get(address).status_code == 404
    assert "Its report is missing" in client.get("/models").text


# ---- what it says


def test_nothing_at_the_site_changes(folder: Path) -> None:
    def standing() -> dict[str, str]:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before, page = standing(), page_of(folder)
    client = visitor(page)
    for path in (*PATHS, "/data?check=1"):
        assert client.get(path).status_code in (200, 303)
    assert soon(lambda: not page.check.now.running)
    assert standing() == before


def test_a_study_that_waits_is_told_as_approve_tells_it(folder: Path, waiting: StudyPlan) -> None:
    said = text_of(visitor(page_of(folder)).get("/studies").text)
    found = review(folder, waiting)
    assert len(found.sentences) == 6
    for sentence in found.sentences:
        question, _, answer = sentence.partition(": ")
        assert f"{question} {answer}" in said
    assert found.cost is not None
    assert f" {found.cost.epsilon:.3f} {found.spent:.3f} {found.after:.3f} {found.budget:g} " in said
    assert found.after > found.budget
    assert "The budget does not cover it" in said
    assert waiting.digest in said
    assert f"consilium-site approve {waiting.digest[:12]} --site {folder}" in said
    assert "lungs" in said
    assert "2 of 3" in said


def test_a_study_outside_the_limits_has_no_command(folder: Path, waiting: StudyPlan) -> None:
    with (folder / "site.yaml").open("a") as file:
        file.write("limits: {tasks: [anomaly]}\n")
    said = text_of(visitor(page_of(folder)).get("/studies").text)
    assert "Refused by this hospital's own limits: the hospital does not allow the task classification." in said
    assert f"consilium-site approve {waiting.digest[:12]}" not in said


def test_a_plan_that_another_lab_signed_is_not_shown(folder: Path, make_plan: PlanMaker) -> None:
    forged = make_plan(study="forged", description="trust me", privacy=given(3.0))
    approval.submit(folder / "state", forged, sign(STUDY, forged.to_json(), Ed25519PrivateKey.generate()))
    said = text_of(visitor(page_of(folder)).get("/studies").text)
    assert f"{forged.digest[:12]} Do not trust it. it is signed by" in said
    assert "trust me" not in said
    assert f"approve {forged.digest[:12]}" not in said


def test_what_was_spent_and_what_left(folder: Path) -> None:
    client, ledger = visitor(page_of(folder)), Ledger.existing(folder / "state")
    said = text_of(client.get("/privacy").text)
    spent = f"psilon {ledger.spent():.3f} of 1.5 is spent at delta 0.01"
    assert spent in said
    assert spent in text_of(client.get("/").text)
    digest = ledger.charges()[0].study[:12]
    size = sum(e.count("bytes") for e in SiteJournal.of(folder / "state").entries() if e.what == "released")
    assert f"lungs ({digest}) 2 {size:,} " in said
    assert "the update yes the algorithm's private queries" in said
    assert "7 entries, none changed, none missing" in said
    assert require_readable(client.get("/privacy/ledger").text).text.count(ledger.head()[1]) == 1


@pytest.mark.parametrize(
    ("exact", "data", "ages", "models"),
    [
        (False, "30+ images of 10+ patients", "age: 40 to 60 years", "40+ patients with 140+ images"),
        (True, "36 images of 12 patients", "age: 47 to 53 years", "47 patients with 141 images"),
    ],
)
def test_counts_are_in_tens_unless_exact_ones_are_asked_for(
    folder: Path, exact: bool, data: str, ages: str, models: str
) -> None:
    with np.load(folder / "data.npz") as kept:
        np.savez(folder / "data.npz", **kept, age=np.repeat([47.0, 53.0], 18))
    page = page_of(folder, exact=exact)
    client = visitor(page)
    assert "were not checked" in client.get("/data").text
    assert client.get("/data?check=1").headers["location"] == "/data"
    assert soon(lambda: not page.check.now.running)
    said = text_of(client.get("/data").text)
    assert "Fit for use." in said
    assert data in said
    assert ages in said
    assert models in text_of(client.get("/models").text)


def test_a_reload_does_not_check_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def check(folder: Path, **_: object) -> Any:
        asked.append(folder)
        raise MemoryError

    monkeypatch.setattr("client.data_check.check_site", check)
    page = page_of(tmp_path)
    client = visitor(page)
    for number, times in (("1", 1), ("1", 1), ("3", 1), ("x", 1), ("²", 1), ("2", 2), ("9" * 5000, 2)):
        client.get("/data", params={"check": number})
        assert soon(lambda: not page.check.now.running)
        assert len(asked) == times, number
    assert "The check failed." in client.get("/data").text


def test_models_elsewhere_are_shown_when_they_are_named(folder: Path, tmp_path: Path) -> None:
    a_model(tmp_path / "models" / "one", name="nodule")
    a_model(tmp_path / "models" / "two", name="bleed")
    (tmp_path / "models" / "two" / FACTS).write_text("{")
    said = text_of(visitor(page_of(folder, tmp_path / "models", folder / "adapted")).get("/models").text)
    assert "healthy, nodule" in said
    assert "healthy, lesion" in said
    assert "two Cannot be shown." in said
    assert "0.70 [0.60, 0.80]" in said
    assert "bleed" not in said


def test_what_runs_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Not running." in text_of(visitor(page_of(folder)).get("/").text)
    worker = {"prepared": ["a"], "approved": ["a", "b"], "version": "9.9"}
    status = {"site": "alder", "lab": "lab", "address": "lab:1", "node": {"started": 0.0}, "worker": worker}
    monkeypatch.setattr(local_page, "site_status", lambda folder: status)
    said = text_of(visitor(page_of(folder)).get("/").text)
    assert "Running. Node and worker answer." in said
    assert "1 of 2 approved studies" in said
    assert "Studies that wait for approval: 1." in said


# ---- whatever is broken


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def just_made(folder: Path) -> None:
    shutil.rmtree(folder / "state")
    (folder / "membership.json").unlink()


def ledger_damaged(folder: Path) -> None:
    (folder / "state" / LEDGER).write_bytes(b"torn")


def ledger_lost(folder: Path) -> None:
    (folder / "state" / LEDGER).unlink()


def journal_damaged(folder: Path) -> None:
    file = folder / "state" / JOURNAL
    file.write_bytes(file.read_bytes().replace(b'"round":1', b'"round":2', 1))


def journal_cut(folder: Path) -> None:
    file = folder / "state" / JOURNAL
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:3]))


def approval_damaged(folder: Path) -> None:
    next((folder / "state" / "approved").glob("*.json")).write_text("[]")


def membership_damaged(folder: Path) -> None:
    (folder / "membership.json").write_text("{}")


@pytest.mark.parametrize(
    ("broken", "told", "still"),
    [
        (emptied, {"/": "site.yaml cannot be used", "/models": "No adapted model lies in"}, {}),
        (
            just_made,
            {"/": "no ledger was opened here", "/studies": "joined no lab yet"},
            {"/models": "healthy, lesion"},
        ),
        (ledger_damaged, {"/": "privacy ledger is missing or damaged"}, {"/studies": "sequel", "/privacy": "lungs ("}),
        (ledger_lost, {"/privacy": "privacy ledger is missing or damaged"}, {"/privacy": "Replies with an update"}),
        (journal_damaged, {"/privacy": "Not confirmed."}, {"/privacy": "is spent at delta"}),
        (journal_cut, {"/privacy": "what came after was cut off"}, {"/privacy": "sequel, lab"}),
        (approval_damaged, {"/studies": "a record cannot be read"}, {"/studies": "What a patient risks"}),
        (membership_damaged, {"/studies": "it is no signed document"}, {"/studies": "2 of 3"}),
    ],
)
def test_what_is_broken_says_so_and_leaves_the_rest(
    folder: Path, broken: Callable[[Path], None], told: dict[str, str], still: dict[str, str]
) -> None:
    broken(folder)
    client = visitor(page_of(folder))
    pages = {path: client.get(path) for path in PATHS if path != "/privacy/ledger"}
    assert {answer.status_code for answer in pages.values()} == {200}
    for path, words in (*told.items(), *still.items()):
        assert words in text_of(pages[path].text), path
    assert client.get("/privacy/ledger").status_code in (200, 404)


def test_what_this_user_may_not_read_is_not_said_to_be_empty(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", forbidden)  # pathlib's glob finds nothing then, and says nothing
    client = visitor(page_of(folder))
    said = {path: text_of(client.get(path).text) for path in ("/", "/studies", "/privacy", "/models")}
    for path, times in (("/", 2), ("/studies", 2), ("/privacy", 3)):
        assert said[path].count(f"{folder / 'state'}: Permission denied -- is this user allowed to read it?") == times
        assert not re.search("No study|Nothing was|no ledger", said[path])
    assert "healthy, lesion" in said["/models"]


# ---- who writes into it, and who reads it


@pytest.fixture
def hostile(folder: Path) -> LocalPage:
    """Every text that somebody else chose is a trap: plan, approver, labels."""
    shutil.rmtree(folder / "adapted")
    a_model(folder / "adapted", name=HOSTILE)
    config = (folder / "site.yaml").read_text().replace("npz: data.npz", "manifest: manifest.csv")
    (folder / "site.yaml").write_text(config)
    quoted = HOSTILE.replace('"', '""')
    (folder / "manifest.csv").write_text(f'path,label,patient\nx.png,"{quoted}",b\n')
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(folder / "x.png")
    page = page_of(folder)
    page.check.begin(1)
    assert soon(lambda: not page.check.now.running)
    return page


@pytest.mark.parametrize("path", ["/studies", "/privacy", "/data", "/models"])
def test_hostile_text_stays_text(hostile: LocalPage, path: str) -> None:
    html = visitor(hostile).get(path).text
    tree = Tree(html)
    assert HOSTILE in tree.text
    assert not tree.all("script", "iframe", "object", "embed", "form", "base", "img", "svg")
    for attributes in tree.all(*{tag for tag, _ in tree.elements}):
        assert not any(name.startswith("on") for name in attributes)
        assert re.match(r"/[a-z]*|#|data:,$", attributes.get("href", "/"))


@pytest.mark.parametrize("path", ["/", "/studies", "/privacy", "/data", "/models", "/nowhere-without-a-token"])
def test_it_can_be_read_without_a_screen_or_a_mouse(hostile: LocalPage, path: str) -> None:
    client = visitor(hostile, token=None if path.startswith("/nowhere") else TOKEN)
    tree = require_readable(client.get(path).text)
    if client.cookies:
        first = next(attributes for tag, attributes in tree.elements if tag == "a")
        assert first == {"class": "skip", "href": "#main"}
        assert tree.all("main")[0]["id"] == "main"
        assert len(tree.all("header")) == len(tree.all("nav")) == len(tree.all("footer")) == 1
        assert [a["href"] for a in tree.all("a") if a.get("aria-current") == "page"] == [path]


def test_every_link_leads_somewhere(folder: Path) -> None:
    client, seen, next_ones = visitor(page_of(folder)), set[str](), ["/"]
    while next_ones:
        address = next_ones.pop()
        if address in seen or address.startswith(("#", "data:")):
            continue
        seen.add(address)
        answer = client.get(address)
        assert answer.status_code in (200, 303), address
        next_ones += [a["href"] for a in Tree(answer.text).all("a", "link")]
    assert len(seen) == 8  # five pages, the ledger, the check, one report


def test_colours_can_be_told_apart() -> None:
    """WCAG 2 AA: 4.5 for text, 3 for what is not."""
    style = (ROOT / "client" / "templates" / "local_style.html").read_text()
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", style))
    pairs = [("ink", "ground"), ("soft", "ground"), ("accent", "ground"), ("ground", "ink"), ("ink", "code")]
    pairs += [("accent", "odd"), *((f"{state}-ink", state) for state in ("well", "odd", "wrong"))]
    assert {name for pair in pairs for name in pair} | {"rule"} == colours.keys()
    for ink, paper in pairs:
        assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


# ---- the process


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address that a real process prints; Ctrl-C ends it with 130 and no traceback."""
    folder = tmp_path_factory.mktemp("elm")
    (folder / "site.yaml").write_text("name: elm\nmanifest: m.csv\nbudget: {epsilon: 1, delta: 0.01}\n")
    command = [sys.executable, "-m", "client.cli", "page", str(folder), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)  # type: ignore[call-overload]
    try:
        yield process.stdout.readline().strip()
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_a_process_answers_on_loopback_alone(running: str) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[A-Za-z0-9_-]{43}", running)
    port = httpx.URL(running).port
    for host, answers in (("127.0.0.1", True), ("127.0.0.2", False)):  # both of this machine's loopback
        with socket.socket() as caller:
            assert (caller.connect_ex((host, port)) == 0) is answers
    with httpx.Client(follow_redirects=True, trust_env=False, timeout=30) as client:
        assert client.get(running.split("?")[0]).status_code == 403
        answer = client.get(running)
        assert answer.status_code == 200
        assert str(answer.url) == f"http://127.0.0.1:{port}/"
        assert "elm" in answer.text
        assert "server" not in answer.headers


def test_a_browser_gets_in_by_the_address_and_keeps_the_rules(running: str, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}"]
    done = subprocess.run(
        [chromium, *flags, "--dump-dom", running],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    tree = Tree(done.stdout)
    assert tree.all("html")[0]["lang"] == "en"
    assert "elm" in tree.text
    assert "What wants a person" in tree.text
    assert not re.search("Content Security Policy|Refused to", done.stderr)


def test_a_page_that_takes_long_keeps_nobody_from_ending() -> None:
    """The thread of a page is a daemon, and what comes of it too late disturbs nothing."""
    release, left = threading.Event(), list[threading.Thread]()

    async def stopped() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(local_server.beside(release.wait), 0.05)
        left.extend(thread for thread in threading.enumerate() if thread.name == "page")

    asyncio.run(stopped())
    assert [thread.daemon for thread in left] == [True]
    release.set()
    left[0].join(10)
    with pytest.raises(KeyError):
        asyncio.run(local_server.beside(lambda: {}["a"]))


def test_a_port_that_is_taken_is_said(running: str, tmp_path: Path) -> None:
    port = httpx.URL(running).port
    with pytest.raises(RunError, match=rf"port {port} of 127.0.0.1: Address already in use; choose another"):
        local_server.serve(page_of(tmp_path), port=port or 0, ready=lambda address: None)
