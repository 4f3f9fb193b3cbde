"""What a message from a node means: an outcome for the record, and a reply only if it may be used.

Of an error reply nothing but its number is read: its text comes from an exception at the site.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Message

from common.errors import InternalFailure
from common.records import MalformedRecord, SiteReply
from common.wire import decode
from server.history import SiteOutcome, SiteStatus

Ledger = tuple[int, str]  # row count, hash of the last row

_LONGEST_REASON = 200  # characters
_BROKEN: tuple[SiteStatus, str, str] = ("failed", "client-failed", "the site's client failed")
_ERRORS: dict[int, tuple[SiteStatus, str, str]] = {  # by flwr.common.constant.ErrorCode
    3: ("late", "late", "no answer in time"),  # MESSAGE_UNAVAILABLE: expired before it was answered
    4: ("late", "late", "no answer in time"),  # REPLY_MESSAGE_UNAVAILABLE: the answer expired
    5: ("failed", "node-lost", "the site's node went away"),  # NODE_UNAVAILABLE
    8: ("failed", "client-killed", "the site's client was killed"),  # CLIENT_APP_CRASHED
}


def judge(
    message: Message, *, site: str, seconds: float, objection: Callable[[SiteReply], str | None]
) -> tuple[SiteOutcome, SiteReply | None]:
    """The outcome that `message` is, and its reply if that is of use.

    `objection` says why a reply that calls itself ok may not be used. `site` is whom the message is from as far as the
    lab knows, and `seconds` how long the lab waited for it.
    """
    if message.has_error():
        status, code, reason = _ERRORS.get(message.error.code, _BROKEN)
        return SiteOutcome(site=site, status=status, code=code, reason=reason, seconds=seconds), None
    try:
        reply = decode(message.content, SiteReply)
    except MalformedRecord as error:
        return _rejected(site, f"malformed reply: {error}", seconds), None
    if not reply.ok:
        status = "failed" if reply.code == InternalFailure.code else "refused"
        code, reason = _plain(reply.code), _plain(reply.reason)
        return SiteOutcome(site=site, status=status, code=code, reason=reason, seconds=seconds), None
    reason_against = objection(reply)
    if reason_against:
        return _rejected(site, reason_against, seconds), None
    return _accepted(site, reply), reply


def claimed_site(message: Message) -> str:
    """The site that the message says it is from; empty if it says nothing."""
    try:
        return _plain(decode(message.content, SiteReply).site) if message.has_content() else ""
    except MalformedRecord:
        return ""


def ledger_objection(reply: SiteReply, seen: Ledger | None) -> str | None:
    """A ledger only grows; one that shrank, or changed at the same length, was put back to an older copy."""
    if seen is None:
        return None
    rows, head = seen
    if not head:
        return None
    if reply.ledger_rows < rows:
        return f"the site's ledger went back from {rows} rows to {reply.ledger_rows}"
    if reply.ledger_rows == rows and reply.ledger_head != head:
        return f"the site's ledger has {rows} rows as before, but not the same ones"
    return None


def _accepted(site: str, reply: SiteReply) -> SiteOutcome:
    return SiteOutcome(
        site=site,
        status="ok",
        code="ok",
        seconds=reply.seconds,
        epsilon=reply.epsilon,
        accuracy=reply.accuracy,
        queries=reply.queries,
        ledger_rows=reply.ledger_rows,
        ledger_head=_plain(reply.ledger_head),
    )


def _rejected(site: str, reason: str, seconds: float) -> SiteOutcome:
    return SiteOutcome(site=site, status="rejected", code="rejected", reason=_plain(reason), seconds=seconds)


def _plain(text: str) -> str:
    """What a site wrote, safe for a terminal and a record: printable, and not long."""
    return "".join(c if c.isprintable() else "?" for c in text[:_LONGEST_REASON])
