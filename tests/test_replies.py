"""What a message means: the site's words are cleaned, an error's text is never read, a ledger only grows."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from common.records import SiteReply
from common.wire import encode
from server.local_grid import LocalGrid
from server.replies import claimed_site, judge, ledger_objection


@pytest.fixture
def question() -> Message:
    LocalGrid(ClientApp(), nodes=1)  # gives messages their sender
    return Message(RecordDict(), 1, "train.round")


def judged(message: Message, objection: str | None = None):
    return judge(message, site="alder", seconds=4.0, objection=lambda reply: objection)


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        (0, "failed", "the site's client failed"),
        (2, "failed", "the site's client failed"),
        (3, "late", "no answer in time"),
        (4, "late", "no answer in time"),
        (5, "failed", "the site's node went away"),
        (8, "failed", "the site's client was killed"),
        (99, "failed", "the site's client failed"),
    ],
)
def test_errors_by_number_and_never_by_text(question, code, status, reason):
    outcome, reply = judged(Message(Error(code, "ValueError: patient 4711"), reply_to=question))
    assert (outcome.status, outcome.reason, outcome.seconds, reply) == (status, reason, 4.0, None)


def test_an_ok_reply_and_an_objection_to_it(question):
    sent = SiteReply(site="alder", code="ok", accuracy=0.5, epsilon=0.5, ledger_rows=3, ledger_head="ab", seconds=0.25)
    outcome, reply = judged(Message(encode(sent), reply_to=question))
    assert reply == sent
    assert (outcome.status, outcome.epsilon, outcome.ledger_rows, outcome.seconds) == ("ok", 0.5, 3, 0.25)
    outcome, reply = judged(Message(encode(sent), reply_to=question), "it is of no use")
    assert (outcome.status, outcome.reason, reply) == ("rejected", "it is of no use", None)


def test_what_a_site_writes_is_made_safe(question):
    sent = SiteReply(site="al\x1bder", code="not\napproved", reason="no" + "!" * 1000)
    message = Message(encode(sent), reply_to=question)
    outcome, _ = judged(message)
    assert (outcome.status, outcome.code, len(outcome.reason)) == ("refused", "not?approved", 200)
    assert claimed_site(message) == "al?der"


def test_a_malformed_reply(question):
    message = Message(RecordDict({"fields": ConfigRecord({"site": "alder"})}), reply_to=question)
    outcome, reply = judged(message)
    assert (outcome.status, outcome.reason, reply) == (
        "rejected",
        "malformed reply: the message carries no record",
        None,
    )
    assert claimed_site(message) == ""
    assert claimed_site(Message(Error(2), reply_to=question)) == ""


@pytest.mark.parametrize(
    ("rows", "head", "expected"),
    [
        (6, "other", None),
        (5, "head", None),
        (5, "other", "the site's ledger has 5 rows as before, but not the same ones"),
        (4, "head", "the site's ledger went back from 5 rows to 4"),
    ],
)
def test_a_ledger_only_grows(rows, head, expected):
    reply = SiteReply(site="alder", code="ok", ledger_rows=rows, ledger_head=head)
    assert ledger_objection(reply, (5, "head")) == expected
    assert ledger_objection(reply, None) is None
