"""The benchmark of meta-gradients: all rows take the same gradient, and the table says what was measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from common.episodes import Episode
from common.params import Params, scale
from deploy.benchmarks import meta_gradient
from deploy.benchmarks.meta_gradient import LIMIT, OURS, ROWS, WAYS, Row, Work, check, mean, rows_of, table
from tests.exact_queries import conv_learner, images


def small(tasks: int = 2) -> Work:
    """Of 8 filters and 16 pixels, rows that count alike."""
    learner, params = conv_learner(ways=WAYS)
    learner.network.load_state_dict(params)  # where peers start

    def task(number: int) -> Episode:
        sides = (images(rows, 100 * number + rows, ways=WAYS) for rows in (2 * WAYS, WAYS))
        return Episode(*(batch._replace(weights=torch.ones_like(batch.weights)) for batch in sides))

    return Work(learner, params, [task(number) for number in range(tasks)])


def test_all_rows_take_the_gradient_that_consilium_takes() -> None:
    rows = list(rows_of(peers=()))
    assert {algorithm for algorithm, _ in rows} == ROWS.keys()
    check(rows, small())


@pytest.mark.parametrize("algorithm", ROWS)
def test_a_row_of_other_work_is_noticed(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ROWS[algorithm][OURS]
    other: Callable[[Work], Params] = lambda work: scale(honest(work), 1.1)  # noqa: E731
    monkeypatch.setitem(ROWS[algorithm], "other", other)
    with pytest.raises(SystemExit, match=f"{algorithm}, other: the gradient is 0.1 of its length away"):
        check([(algorithm, OURS), (algorithm, "other")], small(1))


def test_peers_that_are_not_there_have_no_row() -> None:
    assert ("MAML", "torchopt") in rows_of(peers=("torchopt",))
    assert not {"torchopt", "higher"} & {name for _, name in rows_of(peers=())}


def test_the_table_has_medians_and_shares_of_the_limit() -> None:
    ours = Row("MAML", OURS, 4, [0.5, 9.0, 0.4], 3 * 2**20)
    limit = Row("MAML", LIMIT, 4, [0.2, 0.25, 7.0], None)
    assert list(table([ours, limit]))[2:] == [
        f"| MAML | 4 | {OURS} | 2.00 | 2.00 | 3 |",
        f"| MAML | 4 | {LIMIT} | 4.00 | 1.00 |  |",
    ]


def test_the_mean_over_tasks() -> None:
    assert mean({"w": torch.tensor([value])} for value in (1.0, 2.0, 6.0)) == {"w": torch.tensor([3.0])}


@pytest.mark.skipif(not meta_gradient.TELLS_PEAKS, reason="Linux tells the peak")
def test_memory_is_that_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def holds_64_mb(work: Work) -> Params:
        return {"w": torch.ones(2**24 if len(work.episodes) > 2 else 1)}

    monkeypatch.setitem(ROWS["MAML"], OURS, holds_64_mb)
    peak = meta_gradient.peak_of("MAML", OURS, 3, "cpu", torch.get_num_threads())
    assert peak is not None
    assert peak / 2**20 == pytest.approx(64, abs=8)
