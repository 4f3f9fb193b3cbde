"""What usual settings cost a patient: the table of deploy/privacy-costs.md.

python -m deploy.benchmarks.epsilon_table > deploy/privacy-costs.md
"""

from __future__ import annotations

from collections.abc import Iterator

import typer

from common.accounting import Event, epsilon, epsilon_rdp

RATES = (0.1, 0.2, 0.5)  # q
QUERIES = {24: "6 x 4", 100: "20 x 5"}  # private queries of a study: rounds x queries a round
NOISES = (1.0, 2.0, 4.0)  # z
PATIENTS = (100, 1000)  # N

_TEXT = """\
# What a study costs a patient

Epsilon of a whole study by PLD, in brackets by RDP, the cross-check, at delta = 1/(10 N); N enrolled patients of whom
each joins a private query with probability q; noise of z times what one patient can move. Every kind of query costs the
same: z is counted in units of what a patient moves there (C for `gradient`, 2C for `episode_gradient`).
"""
_END = """\
Twice the noise costs less than half; a patient who joins more often, or is asked more often, costs more. A larger
hospital promises a smaller delta, so the same z costs it a little more; its mean is over more patients. What one plan
costs each of its sites: `consilium-lab study check PLAN.yaml`. Made by `python -m deploy.benchmarks.epsilon_table`.
"""


def lines() -> Iterator[str]:
    """The page."""
    yield from _TEXT.splitlines()
    yield ""
    columns = [f"N = {patients}, z = {noise:g}" for patients in PATIENTS for noise in NOISES]
    yield _row("q", "rounds x queries", *columns)
    yield _row(*["---"] * (2 + len(columns)))
    for rate in RATES:
        for count, said in QUERIES.items():
            cells = [_cell(Event(rate, noise, count), patients) for patients in PATIENTS for noise in NOISES]
            yield _row(f"{rate:g}", said, *cells)
    yield ""
    yield from _END.splitlines()


def _cell(event: Event, patients: int) -> str:
    delta = 1 / (10 * patients)
    return f"{epsilon([event], delta):.2f} ({epsilon_rdp([event], delta):.2f})"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for line in lines():
        typer.echo(line)
