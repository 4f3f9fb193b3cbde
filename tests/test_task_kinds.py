"""Every kind of task, from phantom hospitals to the report, through the same command's code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.experiment import simulate_study
from server.progress import ProgressBars
from server.results import StudyResults

BASE: dict[str, Any] = {
    "seed": 3,
    "rounds": 2,
    "quorum": 2,
    "model": {"name": "conv4", "width": 8},
    "algorithm": {"name": "reptile", "inner_steps": 1},
    "sampling": {"sample_rate": 0.5},
    "privacy": {"epsilon": 8},
    "evaluation": {
        "shots": [2],
        "splits": 2,
        "draws": 1,
        "adaptation": {"trainable": "head", "steps": 5},
        "compare": [],
        "curve_points": 0,
        "ceiling": False,
    },
}


def sites(labels: dict[str, str], *held_out: str) -> dict[str, Any]:
    return {
        name: {"labels": of, "patients": 12, "role": "held_out" if name in held_out else "train"}
        for name, of in labels.items()
    }


STUDIES: dict[str, dict[str, Any]] = {
    "multilabel": {
        "task": {"kind": "multilabel", "label_sets": {"chest": ["nodule", "effusion"]}},
        "sites": sites({"poplar": "chest", "spruce": "chest"}),
    },
    "segmentation": {
        "task": {"kind": "segmentation", "label_sets": {"any": ["background", "lesion"]}},
        "model": {"name": "unet", "width": 8},
        "sites": sites({"alder": "any", "elm": "any", "yew": "any"}, "yew"),
    },
    "anomaly": {
        "task": {"kind": "anomaly", "label_sets": {"nodule": ["normal", "nodule"], "mass": ["normal", "mass"]}},
        "sites": sites({"alder": "nodule", "elm": "mass"}),
    },
    "reconstruction": {
        "task": {"kind": "anomaly", "label_sets": {"nodule": ["normal", "nodule"], "mass": ["normal", "mass"]}},
        "model": {"name": "autoencoder", "width": 8, "head": "shared", "trainable": "all"},
        "algorithm": {"name": "reptile", "inner_steps": 1, "inner_lr": 0.01},
        "sites": sites({"alder": "nodule", "elm": "mass"}),
    },
    "modalities": {
        "task": {
            "kind": "classification",
            "label_sets": {"nodule": ["normal", "nodule"], "mass": ["normal", "mass"]},
            "modalities": ["chest X-ray", "brain MRI, T1 with contrast"],
        },
        "algorithm": {"name": "anil", "inner_steps": 1, "episodes": 4, "meta_steps": 1},
        "sites": sites({"alder": "nodule", "elm": "mass"}),
        "evaluation": {"fuse": "patient", "subgroups": {"women": {"sex": ["F"]}, "nobody": {"min_age": 200}}},
    },
    "weighting": {
        "task": {"kind": "classification", "label_sets": {"nodule": ["normal", "nodule"], "mass": ["normal", "mass"]}},
        "outer": {"weights": "score"},
        "sites": sites({"alder": "nodule", "elm": "mass"}),
        "evaluation": {"compare": ["anil", {"name": "mrmtl", "proximal": 0.1}, "mapping", "metasgd", "transfer"]},
    },
}


def run(name: str, folder: Path) -> StudyResults:
    study = {"study": name, **BASE, **STUDIES[name]}
    study["evaluation"] = BASE["evaluation"] | STUDIES[name].get("evaluation", {})
    study["task"] = {"image_size": 32, "channels": 1} | study["task"]
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    from rich.console import Console

    with ProgressBars(Console(quiet=True)) as bars:
        return simulate_study(file, None, folder / "run", watcher=bars, engine="local", resume=True, jobs=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_from_images_to_the_report(name: str, tmp_path: Path) -> None:
    results = run(name, tmp_path)
    assert [record.status for f in results.federations for record in f.records].count("below_quorum") == 0
    assert results.trials
    for trial in results.trials:
        assert "diverged" not in trial.note
        assert not math.isnan(trial.metrics[results.lead])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "PHANTOMS" in page
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["lead_metric"] == results.lead
    pictured = {"segmentation", "anomaly", "reconstruction"}
    assert bool(results.pictures) == (name in pictured)
    if name == "modalities":
        assert {trial.target for trial in results.trials} == {"alder", "elm", "alder/women", "elm/women"}
    if name == "weighting":
        assert {"meta", "anil", "mrmtl", "mapping", "metasgd", "transfer", "random"} == {
            trial.arm for trial in results.trials
        }
        own = next(federation for federation in results.federations if federation.arm == "meta")
        scores = [site.accuracy for record in own.records[1:] for site in record.sites]
        assert all(0 <= score <= 1 for score in scores)
