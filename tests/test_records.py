"""What the lab and a site say to each other."""

from __future__ import annotations

import dataclasses

from common.records import SiteReply


def test_a_reply_carries_what_is_accounted_for_and_nothing_else() -> None:
    """Add a field here only with its charge, or the reason why it does not depend on data, beside it in records.py."""
    charged = {"update", "accuracy"}
    independent = {"site", "code", "reason", "version", "plan_digest", "round", "queries", "epsilon"}
    independent |= {"ledger_rows", "ledger_head", "seconds"}
    assert {field.name for field in dataclasses.fields(SiteReply)} == charged | independent
