"""How the label of an image names several findings: `nodule|effusion`, or `none`."""

from __future__ import annotations

FINDINGS_BETWEEN = "|"
NO_FINDING = "none"


def findings_in(label: str) -> tuple[str, ...]:
    """The findings that a label names; none for 'none'."""
    return () if label == NO_FINDING else tuple(part.strip() for part in label.split(FINDINGS_BETWEEN))
