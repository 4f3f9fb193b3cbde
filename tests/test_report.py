"""The result table by hand-made trials, and a page that stands alone and says what it must."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from common.algorithms import ALGORITHMS
from common.metrics import lead_metric, metrics_of
from common.plan import StudyPlan, TaskKind
from common.trials import CEILING, Trial, interval
from server.history import RoundRecord, SiteOutcome
from server.plots import arm_styles
from server.report import text_table, write_metrics, write_report
from server.results import UNPROTECTED, CurvePoint, Example, Federation, Picture, StudyResults, headline, warnings
from server.summary import Row, summarise

EVIL = "<script>alert(1)</script>"
LEVELS = {"random": 0.55, "fedavg": 0.65, "meta": 0.75}


def trial(*, task: TaskKind = "classification", **fields: Any) -> Trial:
    value = fields.pop("value", 0.5)
    metrics = dict.fromkeys(metrics_of(task), value) | fields.pop("metrics", {})
    base = {"target": "willow", "kind": "held-out site", "ways": 2, "chance": 0.5, "arm": "meta", "shots": 5}
    return Trial(**{**base, "split": 0, "draw": 0, **fields}, metrics=metrics)


def trials_of(target: str, *, levels: Mapping[str, float] = LEVELS, ceiling: float = 0.9, **fields: Any) -> list[Trial]:
    """Two splits, two draws, shots 1 and 5. Splits differ by +-.01, draws by +-.02; the ceiling's splits by +-.01."""
    found = []
    for split in (0, 1):
        noise = 0.02 * split - 0.01
        for draw in (0, 1):
            for arm, level in levels.items():
                for shots in (1, 5):
                    value = level + noise + 0.04 * draw - 0.02
                    found.append(
                        trial(target=target, arm=arm, shots=shots, split=split, draw=draw, value=value, **fields)
                    )
        found.append(trial(target=target, arm=CEILING, shots=0, split=split, value=ceiling + noise, **fields))
    return found


def summary_of(trials: list[Trial]) -> list[Row]:
    return summarise(trials, lead="balanced_accuracy")


def row_of(rows: list[Row], **wanted: Any) -> Row:
    wanted = {"metric": "balanced_accuracy", "shots": 5, "arm": "meta", **wanted}
    (row,) = [r for r in rows if all(getattr(r, key) == value for key, value in wanted.items())]
    return row


def test_a_row_by_hand() -> None:
    row = row_of(summary_of(trials_of("willow")), target="willow")
    assert row.value == interval([0.74, 0.76])  # the splits' means
    assert row.trials == 4
    assert row.targets == 1
    assert row.learnable
    assert row.over_random is not None
    assert row.over_averaging is not None
    assert row.over_random.mean == pytest.approx(0.2)
    # the splits' noise is the same in both arms, and cancels: the difference is paired
    assert row.over_random.high - row.over_random.low == pytest.approx(0, abs=1e-9)
    assert row.over_averaging.mean == pytest.approx(0.1)


def test_no_arm_is_compared_with_itself() -> None:
    rows = summary_of(trials_of("willow"))
    assert row_of(rows, target="willow", arm="random").over_random is None
    assert row_of(rows, target="willow", arm="fedavg").over_averaging is None
    assert row_of(rows, target="willow", arm=CEILING, shots=0).over_random is None


def test_without_privacy_is_held_against_its_like() -> None:
    levels = {**LEVELS, "fedavg without privacy": 0.7, "meta without privacy": 0.85}
    row = row_of(summary_of(trials_of("willow", levels=levels)), target="willow", arm="meta without privacy")
    assert row.over_averaging is not None
    assert row.over_averaging.mean == pytest.approx(0.15)
    assert row.over_random is not None
    assert row.over_random.mean == pytest.approx(0.3)


def test_the_mean_leaves_out_what_nobody_can_learn() -> None:
    flat = dict.fromkeys(LEVELS, 0.5)
    rows = summary_of(trials_of("willow") + trials_of("yew", levels=flat, ceiling=0.52))
    assert not row_of(rows, target="yew").learnable  # .52 +- .13 holds 1/2
    mean = row_of(rows, target=None)
    assert mean.targets == 1
    assert mean.value.mean == pytest.approx(0.75)


def test_what_can_be_learned_is_held_against_its_own_chance() -> None:
    trials = trials_of("willow", ceiling=0.5, chance=0.25) + trials_of("yew", ceiling=0.5, chance=0.4)
    rows = summary_of(trials)  # .5 +- .13 is far from .25, and not from .4
    assert row_of(rows, target="willow").learnable
    assert not row_of(rows, target="yew").learnable
    assert row_of(rows, target="willow").chance == row_of(rows, target=None).chance == 0.25


def test_the_lead_metric_alone_decides_what_can_be_learned() -> None:
    ceiling = [trial(arm=CEILING, shots=0, split=split, value=0.5, metrics={"auroc": 0.9}) for split in (0, 1)]
    assert not row_of(summary_of(ceiling), arm=CEILING, shots=0).learnable
    (row,) = [r for r in summarise(ceiling, lead="auroc") if r.metric == "f1" and r.target]
    assert row.learnable


def test_the_mean_chance_is_over_the_targets_that_count() -> None:
    rows = summary_of(trials_of("willow", chance=0.5) + trials_of("yew", chance=0.3))
    assert row_of(rows, target=None).chance == pytest.approx(0.4)


def test_the_mean_is_over_targets_of_one_kind() -> None:
    better = {arm: level + 0.1 for arm, level in LEVELS.items()}
    other = trials_of("oak", levels=dict.fromkeys(LEVELS, 0.6), kind="held-out patients")
    rows = summary_of(trials_of("willow") + trials_of("yew", levels=better) + other)
    mean = row_of(rows, target=None, kind="held-out site")
    assert mean.value.mean == pytest.approx(0.8)
    assert mean.targets == 2
    assert mean.trials == 8
    assert row_of(rows, target=None, kind="held-out patients").value.mean == pytest.approx(0.6)


def test_a_metric_that_no_query_pool_could_tell_is_nan() -> None:
    blind = [trial(split=split, metrics={"auroc": math.nan}) for split in (0, 1)]
    row = row_of(summary_of(blind), target="willow", metric="auroc")
    assert math.isnan(row.value.mean)
    assert math.isnan(row.value.low)


def plan_of(*, private: bool = True, **changes: Any) -> StudyPlan:
    return StudyPlan.model_validate(
        {
            "study": "test",
            "description": f"a study {EVIL}",
            "task": {"kind": "classification", "image_size": 16, "label_sets": {"two": ["normal", "ill"]}},
            "sites": {
                "alder": {"labels": "two", "patients": 100},
                "birch": {"labels": "two", "patients": 100},
                "willow": {"labels": "two", "patients": 50, "role": "held_out"},
            },
            "rounds": 3,
            "quorum": 1,
            "privacy": {"epsilon": 3.0} if private else "none",
            "evaluation": {"shots": [5, 1], "splits": 2, "draws": 2},
            **changes,
        }
    )


def records(*, private: bool = True) -> list[RoundRecord]:
    """Birch is late in round 2 and rejected in round 3, for a reason that it chose itself."""
    found = []
    for round in range(4):
        epsilon = 0.5 * round if private else 0.0
        alder = SiteOutcome(site="alder", status="ok", code="ok", epsilon=epsilon, accuracy=0.5 + 0.1 * round)
        birch = SiteOutcome(site="birch", status="ok", code="ok", epsilon=epsilon)
        if round == 2:
            birch = SiteOutcome(site="birch", status="late", code="late", reason="no answer in time")
        if round == 3:
            birch = SiteOutcome(site="birch", status="rejected", code="rejected", reason=f"bad {EVIL}")
        found.append(RoundRecord(round=round, status="committed", seconds=1.0, update_norm=0.1, sites=(alder, birch)))
    return found


def results_of(*, private: bool = True, trials: list[Trial] | None = None, **fields: Any) -> StudyResults:
    base: dict[str, Any] = {
        "plan": plan_of(private=private),
        "trials": trials_of("willow") if trials is None else trials,
        "federations": [Federation(arm="meta", records=records(private=private))],
        "curve": [CurvePoint(arm="meta", target="willow", round=r, value=0.6 + 0.05 * r, shots=5) for r in (0, 3)],
        "examples": [Example(site=EVIL, label=EVIL, image=np.zeros((16, 16, 3), dtype=np.uint8))],
        "versions": {"torch": EVIL},
        "seconds": {"evaluation": 75.0},
    }
    return StudyResults(**{**base, **fields})


def test_the_headline_names_figures_and_intervals() -> None:
    title, sentence = headline(results_of(trials=trials_of("willow")))
    assert title == "Ahead of random initialization and federated averaging"
    assert sentence == (
        "With 5 labelled images per class, the meta-initialization (Reptile) reaches a balanced accuracy of"
        " 0.75 [0.62, 0.88] on 1 held-out site, at epsilon 3. That is +0.20 [+0.20, +0.20] against random"
        " initialization (a gain; ahead on 1 of 1); +0.10 [+0.10, +0.10] against federated averaging (a gain; ahead"
        " on 1 of 1)."
    )


def test_the_headline_is_honest_without_a_gain() -> None:
    mixed = trials_of("willow", levels={"random": 0.55, "fedavg": 0.8, "meta": 0.75})
    assert headline(results_of(trials=mixed))[0] == "Ahead of random initialization, behind federated averaging"
    tossed = [
        trial(arm=arm, split=split, value=0.7 + (0.1 if (arm == "meta") == (split == 0) else 0.0))
        for split in (0, 1)
        for arm in ("random", "meta")
    ]
    title, sentence = headline(results_of(trials=tossed))
    assert title == "Not shown to differ from random initialization"
    assert "no difference shown, the interval includes 0; ahead on 0 of 1" in sentence


def test_the_headline_says_when_nothing_can_be_said() -> None:
    flat = trials_of("willow", levels=dict.fromkeys(LEVELS, 0.5), ceiling=0.5)
    assert headline(results_of(trials=flat)) == (
        "Nothing can be said about a gain",
        "On no target did even the ceiling beat guessing, so the starts cannot be compared.",
    )
    assert "No target was evaluated" in headline(results_of(trials=[]))[1]


def test_warnings_name_every_reason() -> None:
    flat = trials_of("willow", levels=dict.fromkeys(LEVELS, 0.5), ceiling=0.5, note="too few images of ill")
    found = warnings(results_of(private=False, trials=flat, phantoms=True, remarks=["a remark"]))
    assert found[0] == UNPROTECTED
    assert found[1].startswith("PHANTOMS: ")
    assert found[2:] == [
        "a remark",
        "willow (held-out site) is not counted in the mean: its ceiling, 0.50 [0.37, 0.63], includes guessing",
        "willow, 1 per class: too few images of ill (12 trials)",
        "willow, 5 per class: too few images of ill (12 trials)",
        "willow, ceiling: too few images of ill (2 trials)",
        "birch missed 1 of 3 rounds: no answer in time",
        f"birch missed 1 of 3 rounds: bad {EVIL}",
    ]


def test_metrics_are_json_without_nan(tmp_path: Path) -> None:
    trials = [*trials_of("willow"), trial(split=7, metrics={"auroc": math.nan})]
    path = tmp_path / "metrics.json"
    write_metrics(path, results_of(trials=trials))

    def refuse(word: str) -> None:
        raise AssertionError(word)

    document = json.loads(path.read_text(), parse_constant=refuse)
    assert document["private"] is True
    assert document["study"] == "test"
    assert document["trials"][-1]["metrics"]["auroc"] is None
    assert document["federations"][0]["records"][3]["sites"][1]["reason"] == f"bad {EVIL}"
    assert document["federations"][0]["records"][1]["sites"][1]["accuracy"] is None
    row = next(r for r in document["summary"] if r["target"] is None and r["shots"] == 5 and r["arm"] == "fedavg")
    assert row["value"]["mean"] == pytest.approx(0.65)
    assert list(tmp_path.iterdir()) == [path]


class Page(HTMLParser):
    """What a browser would fetch or run, how the tags nest, and which ids there are."""

    VOID = ("meta", "img", "link", "br", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.without_alt = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        values = {key: value or "" for key, value in attrs}
        self.without_alt += tag == "img" and not values.get("alt")
        self.ids += [values["id"]] if "id" in values else []
        links = [values.get(key, "") for key in ("src", "href", "xlink:href", "action")]
        self.fetched += [link for link in links if link and not link.startswith(("#", "data:"))]
        assert not any(key.startswith("on") for key in values)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(tmp_path: Path, results: StudyResults) -> str:
    path = tmp_path / "report.html"
    write_report(path, results)
    assert list(tmp_path.iterdir()) == [path]
    return path.read_text()


def test_the_page_stands_alone(tmp_path: Path) -> None:
    page = Page(text := page_of(tmp_path, results_of()))
    assert page.fetched == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"url\((?!#)|@import", text)
    assert page.open == []
    assert page.without_alt == 0
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("h1") == 1
    assert page.tags.count("svg") == 5
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert used <= set(page.ids)


def test_what_a_site_wrote_is_escaped(tmp_path: Path) -> None:
    text = page_of(tmp_path, results_of())
    assert EVIL not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5  # description, reason, site, label, version


def test_the_page_says_what_it_must(tmp_path: Path) -> None:
    results = results_of(phantoms=True)
    text = page_of(tmp_path, results)
    title, sentence = headline(results)
    assert title in text
    assert sentence in text
    for expected in (
        "patient-level epsilon 3",
        "PHANTOMS",
        "no answer in time",
        "evaluation",
        "1 min 15 s",
        "model.name",
    ):
        assert expected in text, expected
    for name, meaning in metrics_of("classification").values():
        assert name in text
        assert meaning in text
    assert text.index("1 per class") < text.index("5 per class")  # whatever the plan's order
    assert UNPROTECTED not in text
    assert len(text) < 3_000_000


def test_without_privacy_is_marked_everywhere(tmp_path: Path) -> None:
    results = results_of(private=False)
    text = page_of(tmp_path, results)
    assert "<title>WITHOUT PRIVACY" in text
    assert f'class="band">{UNPROTECTED}' in text
    captions = re.findall(r"<(caption|figcaption)>(.*?)</\1>", text, flags=re.S)
    marked = [caption for _, caption in captions if "Without privacy." in caption]
    assert len(marked) >= 10
    assert "patient-level epsilon" not in text
    path = tmp_path / "metrics.json"
    write_metrics(path, results)
    document = json.loads(path.read_text())
    assert document["private"] is False
    assert document["warnings"][0] == UNPROTECTED
    assert "WITHOUT PRIVACY" in str(text_table(results).title)


def test_a_page_without_anything_still_comes(tmp_path: Path) -> None:
    text = page_of(tmp_path, results_of(trials=[], federations=[], curve=[], examples=[]))
    assert "Nothing was evaluated." in text
    assert "No federation ran." in text
    assert Page(text).open == []


def test_a_long_run_shows_the_rounds_that_matter(tmp_path: Path) -> None:
    quiet = records()[1]
    long = [RoundRecord(**{**vars(quiet), "round": r}) for r in range(900)]
    long[700] = RoundRecord(**{**vars(records()[2]), "round": 700})
    text = page_of(tmp_path, results_of(federations=[Federation(arm="meta", records=long)]))
    assert "899 rounds are not shown" in text
    assert '<th scope="col">700</th>' in text
    assert "898 of 899" in text
    assert "899 of 899" in text


def test_the_terminal_table_fits_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(text_table(results_of()))
    text = console.export_text()
    assert "mean of 1, held-out site" in text
    assert re.search(r"meta \(reptile\) +│ 0\.75 ± 0\.13 +│ 0\.75 ± 0\.13", text)
    assert re.search(r"ceiling +│ 0\.90 ± 0\.13", text)


def task_of(kind: TaskKind) -> dict[str, Any]:
    """The sections of a plan of another kind of task."""
    label_sets = {"two": ["background", "vessel"] if kind == "segmentation" else ["healthy", "ill"]}
    network = {
        "classification": {"name": "conv4"},
        "multilabel": {"name": "conv4"},
        "segmentation": {"name": "unet"},
        "anomaly": {"name": "autoencoder", "head": "shared"},
    }
    return {"task": {"kind": kind, "image_size": 16, "label_sets": label_sets}, "model": network[kind]}


SQUARE = np.zeros((16, 16), dtype=np.uint8)
SQUARE[4:8, 4:8] = 1
SHIFTED = np.roll(SQUARE, 2, axis=1)  # Dice with the other: 1/2


def pictures_of(kind: TaskKind) -> list[Picture]:
    image = np.full((16, 16), 90, dtype=np.uint8)
    found = {"segmentation": SHIFTED, "anomaly": SHIFTED.astype(np.float32)}[kind]
    base = {"target": "willow", "shots": 5, "image": image, "truth": SQUARE, "caption": EVIL}
    answers: list[tuple[str, np.ndarray | None]] = [("random", None), ("meta", found)]
    return [Picture(**base, arm=arm, found=answer) for arm, answer in answers]


def results_of_kind(kind: TaskKind, **fields: Any) -> StudyResults:
    trials = trials_of("willow", task=kind, chance=0.3)
    return results_of(**{"trials": trials, "plan": plan_of(**task_of(kind)), **fields})


SAYS: dict[TaskKind, tuple[str, str, str]] = {
    "multilabel": ("With 5 labelled images per class", "reaches a balanced accuracy of 0.75", "5 per class"),
    "segmentation": ("With 5 labelled images,", "reaches a Dice score of 0.75", "5 images"),
    "anomaly": ("With 5 labelled healthy images,", "reaches an AUROC of 0.75", "5 healthy images"),
}


@pytest.mark.parametrize("kind", SAYS)
def test_every_kind_of_task_is_spoken_of_in_its_own_words(tmp_path: Path, kind: TaskKind) -> None:
    results = results_of_kind(kind)
    shots, reached, column = SAYS[kind]
    assert headline(results)[1].startswith(shots)
    assert reached in headline(results)[1]
    text = page_of(tmp_path, results)
    page = Page(text)
    assert page.open == []
    assert f'<th scope="col">{column}</th>' in text
    for title, meaning in metrics_of(kind).values():
        assert title in text
        assert meaning in text
    if kind != "multilabel":
        assert not re.search("balanced accuracy|per class", text, flags=re.I)
    title = " ".join(str(text_table(results).title).split())
    assert title.startswith(metrics_of(kind)[lead_metric(kind)][0])
    write_metrics(tmp_path / "metrics.json", results)
    document = json.loads((tmp_path / "metrics.json").read_text())
    assert document["lead_metric"] == lead_metric(kind)
    assert {row["metric"] for row in document["summary"]} == set(metrics_of(kind))


def test_a_note_of_a_segmentation_counts_images() -> None:
    noted = trials_of("willow", task="segmentation", note="odd")
    found = warnings(results_of_kind("segmentation", trials=noted))
    assert "willow, 1 image: odd (12 trials)" in found
    assert "willow, 5 images: odd (12 trials)" in found


def test_masks_are_shown_beside_what_was_found(tmp_path: Path) -> None:
    example = Example(site="alder", label="vessel", image=np.zeros((16, 16), dtype=np.uint8), mask=SQUARE)
    fields = {"pictures": pictures_of("segmentation"), "examples": [example]}
    text = page_of(tmp_path, results_of_kind("segmentation", **fields))
    page = Page(text)
    assert (page.open, page.without_alt, page.tags.count("img")) == ([], 0, 3)  # nothing was found at random
    for words in ("found and true", "found wrongly", "missed", "outlined by the hospital", "Dice 0.50"):
        assert words in text, words
    assert EVIL not in text
    assert "metrics.json" in text
    write_metrics(tmp_path / "metrics.json", results_of_kind("segmentation", **fields))  # without the images


def test_heat_maps_are_shown_for_anomalies(tmp_path: Path) -> None:
    text = page_of(tmp_path, results_of_kind("anomaly", pictures=pictures_of("anomaly")))
    page = Page(text)
    assert (page.open, page.without_alt, page.tags.count("img")) == ([], 0, 3)
    assert "less it looks like the healthy images" in text
    assert "Dice" not in text


def test_the_same_image_is_shown_once_for_all_arms(tmp_path: Path) -> None:
    found = [*pictures_of("segmentation"), *pictures_of("segmentation")]
    other = Picture(**vars(found[1]) | {"image": np.zeros((16, 16), dtype=np.uint8)})
    text = page_of(tmp_path, results_of_kind("segmentation", pictures=[*found, other]))
    assert text.count('<div class="strip large">') == 2
    assert text.count('alt="willow: the image, outlined by the hospital"') == 2


COMPARED = [
    {"name": "fedavg"},
    {"name": "local_only"},
    {"name": "transfer"},
    {"name": "mrmtl", "proximal": 0.1},
    {"name": "fedavg", "label": "weighting", "outer": {"weights": "score"}},
    {"name": "protonet"},
    {"name": "protonet", "label": "longer", "meta_steps": 9},
    {"name": "reptile", "label": "scored", "outer": {"weights": "score"}},
]


def test_every_arm_has_a_title_of_its_own() -> None:
    evaluation = {"shots": [1, 5], "compare": COMPARED}
    results = results_of(plan=plan_of(evaluation=evaluation, algorithm={"name": "prototypes"}))
    arms = ["meta", "random", "fedavg", "local_only", "transfer", "mrmtl", "weighting", "protonet", "longer", "scored"]
    assert [results.title(arm) for arm in arms] == [
        "Meta-initialization (Noisy prototypes)",
        "Random initialization",
        "Federated averaging",
        "Warm start alone",
        "Transfer: warm start, fine-tuned",
        "MR-MTL",
        "Model weighting",
        "Prototypical networks",
        "Prototypical networks (longer)",
        "Reptile, weighted by score",
    ]
    assert results.title("weighting without privacy") == "Model weighting without privacy"


@pytest.mark.parametrize("name", ["fedavg", "local_only", "transfer"])
def test_a_study_of_a_baseline_is_not_called_meta(name: str) -> None:
    title = results_of(plan=plan_of(algorithm={"name": name})).title("meta")
    assert title.endswith(" (study)")
    assert "Meta" not in title


def test_twelve_arms_can_be_told_apart() -> None:
    arms = [*(ALGORITHMS.keys() - {"fomaml"}), "meta", "random", "weighting"]
    both = [*arms, *(f"{arm} without privacy" for arm in arms)]
    styles = arm_styles(both)
    assert len({tuple(sorted(style.items())) for style in styles.values()}) == len(both) == 30
    assert len({(styles[arm]["color"], styles[arm]["marker"]) for arm in arms}) == 15
    few = arm_styles(["meta", "random", "fedavg", "local_only", "a", "b", "c", "d"])
    assert len({style["color"] for style in few.values()}) == 8, "a colour of its own while there is one"
    assert arm_styles(reversed(both)) == styles
    alone = arm_styles(["fedavg", "meta", "random", "local_only"])
    assert alone == {arm: styles[arm] for arm in alone}, "these look the same in every study"
    assert sum(style["color"] == styles["meta"]["color"] for style in styles.values()) == 2  # the study's own, twice
