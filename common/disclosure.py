"""Counts of patients and images, as they are shown where somebody outside the hospital may see them.

Small counts point at people, and exact ones can be subtracted from each other: so a count is shown rounded down to
tens, and not at all below ten. Two totals that differ by one patient look the same nine times of ten, and a difference
of two counts that are shown is known to within ten.
"""

from __future__ import annotations

LEAST_COUNT = 10


def coarse(count: int) -> int:
    """`count` rounded down to a multiple of LEAST_COUNT; 0 says that there are fewer."""
    return count // LEAST_COUNT * LEAST_COUNT


def shown(count: int) -> str:
    """'<10', or as '80+' for 80 to 89."""
    return f"{coarse(count)}+" if count >= LEAST_COUNT else f"<{LEAST_COUNT}"
