"""The warm start: public images in, one body out; nothing of a hospital's own in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from client.data.phantoms import make_phantom_sites
from common.algorithms.protonet import prototype_loss
from common.checkpoint import load_checkpoint
from common.episodes import Batch, Episode, evenly
from common.errors import DataError, UsageError
from common.inner_loop import adapt
from common.learner import Learner
from common.mapping import ENCODER
from common.models import BODY, HEAD, Network, build_model, parameters
from common.params import Params
from common.plan import AdaptationSpec, StudyPlan
from common.tasks import RECONSTRUCTION, TASKS
from server.meta_train import meta_train
from server.pretrain import pretrain
from server.public_episodes import draw_episode
from server.public_sets import PublicSet, lessons_of
from server.simulation import load_public, site_folders
from server.start import initial_parameters
from server.task_encoder import needs_encoder, train_encoder
from server.warm_start import make_warm_start
from tests.conftest import PlanMaker, SiteMaker

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"
WAVES = np.sin(np.arange(16) * 1.6)[:, None].repeat(16, axis=1)
SEGMENTATION: dict[str, Any] = {
    "task": {"kind": "segmentation", "image_size": 16, "label_sets": {"lesion": ["background", "lesion"]}},
    "model": {"name": "unet", "width": 8},
}
AUTOENCODER: dict[str, Any] = {
    "task": {"kind": "anomaly", "image_size": 16, "label_sets": {"lesion": ["healthy", "lesion"]}},
    "model": {"name": "autoencoder", "width": 8, "trainable": "all", "head": "shared"},
}
MULTILABEL: dict[str, Any] = {
    "task": {"kind": "multilabel", "image_size": 16, "label_sets": {"lesion": ["nodule", "effusion"]}}
}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.pretrain._BATCH", dict.fromkeys(["conv4", "autoencoder"], 48) | {"unet": 16})
    monkeypatch.setattr("server.meta_train._EPISODES", 2)
    monkeypatch.setattr("server.meta_train._LR", 2e-3)
    monkeypatch.setattr("server.task_encoder._STEPS", 100)


def public_set(images: np.ndarray, labels: np.ndarray, names: tuple[str, ...] = ("no", "yes")) -> PublicSet:
    """Each image is of a patient of its own."""
    pixels = torch.from_numpy(images.clip(0, 255).astype(np.uint8)).unsqueeze(1)
    return PublicSet("drawn", pixels, torch.from_numpy(labels), names, torch.arange(len(labels)))


def stripes_of(count: int, seed: int) -> PublicSet:
    """Stripes across or along, which no change of brightness hides."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    waves = np.where(labels[:, None, None], WAVES, WAVES.T)
    return public_set(128 + 60 * waves + rng.normal(0, 10, (count, 16, 16)), labels)


def sides_of(count: int, seed: int) -> PublicSet:
    """Bright on the left or on the right."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    left = (np.arange(16) < 8)[None, None] == (labels[:, None, None] == 0)
    return public_set(60 + 130 * left + rng.normal(0, 10, (count, 16, 16)), labels)


def patches_of(count: int, seed: int) -> PublicSet:
    """A patch of stripes along among stripes across: brightness alone doesn't tell where it is."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, 16, 16), dtype=bool)
    for mask in masks:
        top, left = rng.integers(0, 8, 2)
        mask[top : top + 8, left : left + 8] = True
    drawn = public_set(128 + 60 * np.where(masks, WAVES.T, WAVES), np.zeros(count, dtype=np.int64))
    return replace(drawn, masks=torch.from_numpy(masks * np.uint8(255)))


def with_values(plan: StudyPlan, body: Params) -> Network:
    network = build_model(plan.model, plan.task, ways=2, seed=plan.seed)
    network.load_state_dict(body, strict=False)
    return network


@torch.no_grad()
def accuracy(plan: StudyPlan, body: Params, known: PublicSet, new: PublicSet) -> float:
    """Of the nearest class mean."""
    network = with_values(plan, body)
    features, others = (network.body(public.inputs()) for public in (known, new))
    means = torch.stack([features[known.labels == label].mean(dim=0) for label in (0, 1)])
    return float((torch.cdist(others, means).argmin(dim=1) == new.labels).float().mean())


def test_the_body_learns_and_its_features_are_centred(make_plan: PlanMaker) -> None:
    plan, public = make_plan(), stripes_of(80, seed=0)
    body = pretrain([public], plan, steps=40, seed=0)
    assert all(name.startswith(BODY) for name in body)
    assert accuracy(plan, body, public, stripes_of(40, seed=1)) > 0.9
    for values in (body, meta_train(body, [public], plan, steps=1, seed=0)):
        with torch.no_grad():
            features = with_values(plan, values).body(public.inputs())
        assert float(features.mean(dim=0).abs().max()) < 1e-3
        assert float(features.square().sum(dim=1).mean()) == pytest.approx(1.0, abs=1e-3)


def test_the_same_seed_gives_the_same_start(make_plan: PlanMaker) -> None:
    plan, public = make_plan(), stripes_of(40, seed=0)
    one, two = (meta_train(pretrain([public], plan, steps=3, seed=5), [public], plan, steps=2, seed=5) for _ in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_left_and_right_are_learned_where_orientation_is_fixed_and_not_where_it_is_free(
    make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.augment._INVERTED", 0.0)  # the negative of one side is the other
    plan, found = make_plan(), []
    for free in (False, True):
        public, new = (replace(sides_of(80, seed=seed), free=free) for seed in (0, 1))
        found.append(accuracy(plan, pretrain([public], plan, steps=20, seed=0), public, _of_views(new)))
    assert found[0] > 0.95
    assert 0.35 < found[1] < 0.65


def _of_views(public: PublicSet) -> PublicSet:
    """One random view of each image."""
    views = public.views(torch.arange(len(public)), torch.Generator().manual_seed(0))
    return replace(public, images=((views * 0.25 + 0.5) * 255).to(torch.uint8))


def test_a_u_net_learns_where_the_patch_is(make_plan: PlanMaker) -> None:
    plan = make_plan(**SEGMENTATION)
    public, new, unmasked = patches_of(60, seed=0), patches_of(20, seed=1), stripes_of(10, seed=0)
    (lesson,) = lessons_of([public, unmasked], plan)  # a set without masks teaches nothing here
    assert (lesson.ways, set(lesson.targets.unique().tolist())) == (2, {0, 1})
    body = pretrain([public, unmasked], plan, steps=60, seed=0)
    dices = [dice(plan, values, public, new) for values in (body, parameters(with_values(plan, {})))]
    assert dices[0] > 0.8
    assert dices[1] < dices[0] - 0.1  # the random body
    with pytest.raises(DataError, match=r"no public images with masks -- .*sites make --masked-only"):
        pretrain([unmasked], plan, steps=1, seed=0)


def dice(plan: StudyPlan, start: Params, known: PublicSet, new: PublicSet) -> float:
    """Of a fresh head, trained on the body's features of `known`."""
    network = with_values(plan, start)
    learner = Learner(network, TASKS["segmentation"])
    (first, second) = lessons_of([known, new], plan)
    support = evenly(first.public.inputs(), first.targets)
    phi = adapt(learner, parameters(network), support, AdaptationSpec(trainable="head", steps=60, lr=1.0))
    return float(learner.task.score(learner.outputs(phi, second.public.inputs()), second.targets).mean())


def test_an_autoencoder_keeps_its_head(make_plan: PlanMaker) -> None:
    plan, public = make_plan(**AUTOENCODER), sides_of(60, seed=0)
    body = pretrain([public], plan, steps=60, seed=0)
    assert {name for name in body if name.startswith(HEAD)} == {"head.weight", "head.bias"}
    inputs = sides_of(20, seed=1).inputs()
    with torch.no_grad():
        before, after = (float(RECONSTRUCTION.loss(with_values(plan, v)(inputs), inputs).mean()) for v in ({}, body))
    assert after < 0.7 * before


def test_findings_joined_by_a_bar_are_learned_each_by_itself(make_plan: PlanMaker) -> None:
    plan = make_plan(**MULTILABEL)
    names = ("effusion", "mass|nodule", "none")
    joined = replace(stripes_of(6, seed=0), labels=torch.tensor([0, 1, 2, 2, 1, 0]), label_names=names)
    several, single = lessons_of([joined, stripes_of(6, seed=0)], plan)
    assert several.targets.tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]]
    assert (several.ways, several.task) == (3, TASKS["multilabel"])
    assert torch.equal(single.targets, stripes_of(6, seed=0).labels)
    assert lessons_of([joined], make_plan())[0].ways == 3  # elsewhere a name is a name
    assert pretrain([joined, stripes_of(6, seed=0)], plan, steps=2, seed=0)


def test_only_the_modalities_that_are_shown_move_their_table(make_plan: PlanMaker) -> None:
    task = {"kind": "classification", "image_size": 16, "label_sets": {"lesion": ["healthy", "lesion"]}}
    plan = make_plan(task=task | {"modalities": ["film", "ultrasound"]})
    public = replace(stripes_of(20, seed=0), modalities=torch.ones(20, dtype=torch.int64))
    tables = [value for name, value in pretrain([public], plan, steps=3, seed=0).items() if "table" in name]
    assert len(tables) == 4
    for table in tables:
        assert not table[0].any()
        assert table[1].any()
    strange = replace(public, name="slides", modalities=torch.full((20,), -1))
    with pytest.raises(DataError, match=r"does not name: slides -- give .* one of: film, ultrasound"):
        pretrain([public, strange], plan, steps=1, seed=0)


def several_patients(public: PublicSet, images: int) -> PublicSet:
    """Each patient with so many images, of both labels."""
    return replace(public, patients=torch.arange(len(public)) // images)


@pytest.mark.parametrize("seed", range(20))
def test_an_episode_is_a_fair_task_without_a_shared_patient(seed: int) -> None:
    """The pixels of each image here are its patient's number, its label and its own number."""
    labels = torch.arange(60) % 3
    patients = torch.arange(60) // 4
    pixels = torch.stack([patients, labels, torch.arange(60)], dim=1).to(torch.uint8).reshape(60, 3, 1, 1)
    public = _Unchanged("numbers", pixels, labels, ("a", "b", "c"), patients)
    support, query = draw_episode([public], [1, 3], torch.Generator().manual_seed(seed))
    of_support, of_query = (set(batch.inputs[:, 0].flatten().tolist()) for batch in (support, query))
    assert not of_support & of_query
    assert len(of_support) + len(of_query) == len(support.inputs) + len(query.inputs)  # one image of each patient
    assert set(support.targets.bincount().tolist()) <= {1, 3} or len(support.targets) < 3
    assert len(set(support.targets.bincount().tolist())) == 1
    assert set(query.targets.tolist()) == set(support.targets.tolist()) == set(range(int(support.targets.max()) + 1))
    for batch in (support, query):
        names = {(int(target), int(row[1])) for target, row in zip(batch.targets, batch.inputs, strict=True)}
        assert len(names) == len(support.targets.unique())  # a target is one label, and a label one target


class _Unchanged(PublicSet):
    def views(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        return self.images[rows].float()


ALGORITHMS = {
    "reptile": {"name": "reptile"},
    "protonet": {"name": "protonet"},
    "maml": {"name": "maml", "inner_steps": 2, "inner_lr": 0.1, "head_lr": 1.0},
    "anil": {"name": "anil", "inner_steps": 3, "inner_lr": 1.0},
    "metasgd": {"name": "metasgd", "inner_steps": 2, "inner_lr": 0.1, "head_lr": 1.0},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_meta_training_lowers_what_a_few_shots_cost(make_plan: PlanMaker, name: str) -> None:
    """From a random body, on stripes that it has not seen."""
    plan = make_plan(algorithm=ALGORITHMS[name], evaluation={"shots": [1, 5]})
    random = {n: v for n, v in parameters(with_values(plan, {})).items() if n.startswith(BODY)}
    public = stripes_of(40, seed=0)
    begun = meta_train(random, [public], plan, steps=0, seed=0)
    learned = meta_train(random, [public], plan, steps=5, seed=0)
    assert begun.keys() == learned.keys() == random.keys()
    before, after = (mean_prototype_loss(plan, body, stripes_of(40, seed=1)) for body in (begun, learned))
    assert after < 0.8 * before


def mean_prototype_loss(plan: StudyPlan, body: Params, public: PublicSet) -> float:
    learner, rng = Learner(with_values(plan, body), TASKS["classification"]), torch.Generator().manual_seed(3)
    head = {"head.weight": torch.zeros(2, 32), "head.bias": torch.zeros(2)}
    with torch.no_grad():
        losses = [prototype_loss(learner, body | head, draw_episode([public], [5], rng)) for _ in range(10)]
    return float(torch.stack(losses).mean())


def test_meta_training_follows_the_plan_s_own_algorithm(make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """One plain step of ANIL's loss in place of Adam's is the gradient that autograd takes through the head's steps."""
    episode = Episode(*(Batch(*evenly(s.inputs(), s.labels)) for s in (stripes_of(4, seed=0), stripes_of(8, seed=1))))
    monkeypatch.setattr("server.meta_train.draw_episode", lambda sets, shots, rng: episode)
    monkeypatch.setattr("torch.optim.Adam", lambda values, lr: torch.optim.SGD(values, lr=0.5))
    plan = make_plan(algorithm=ALGORITHMS["anil"])
    public = stripes_of(40, seed=0)
    start = meta_train(pretrain([public], plan, steps=2, seed=0), [public], plan, steps=0, seed=0)
    moved = meta_train(start, [public], plan, steps=1, seed=0)
    network = with_values(plan, start)
    head = [torch.zeros(2, 32, requires_grad=True), torch.zeros(2, requires_grad=True)]
    features = [network.body(batch.inputs) for batch in episode]
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(features[0] @ head[0].T + head[1], episode.support.targets)
        head = [h - g for h, g in zip(head, torch.autograd.grad(loss, head, create_graph=True), strict=True)]
    torch.nn.functional.cross_entropy(features[1] @ head[0].T + head[1], episode.query.targets).backward()
    weight = network.get_parameter("body.1.weight")
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) > 1e-4
    assert torch.allclose(moved["body.1.weight"], start["body.1.weight"] - 0.5 * weight.grad, atol=1e-6)


def test_meta_training_says_what_it_cannot_learn_from(make_plan: PlanMaker) -> None:
    few = stripes_of(6, seed=0)
    with pytest.raises(UsageError, match="no public set has 2 labels with 4 patients each"):
        meta_train({}, [few], make_plan(), steps=1, seed=0)
    with pytest.raises(UsageError, match=r"task.kind is 'multilabel' -- leave out --meta-steps"):
        meta_train({}, [few], make_plan(**MULTILABEL), steps=1, seed=0)


def mapped(make_plan: PlanMaker, warm_start: str | None = None) -> StudyPlan:
    model = {"name": "conv4", "width": 8, "trainable": "mapping", "warm_start": warm_start}
    return make_plan(model=model, algorithm={"name": "mapping"}, evaluation={"compare": []})


def test_support_sets_of_one_hospital_are_nearest_to_each_other(
    make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Held-out patients of five phantom hospitals; chance is a fifth."""
    plan = mapped(make_plan)
    make_phantom_sites(tmp_path, names=["alder", "cedar", "larch", "maple", "hazel"], patients=32, image_size=16)
    sets = [load_public(folder, plan) for folder in site_folders(tmp_path).values()]
    body = pretrain(sets, plan, steps=15, seed=0)
    encoder, retrieved = train_encoder(body, sets, plan, seed=0)
    assert all(name.startswith(ENCODER) for name in encoder)
    assert retrieved > 0.9
    monkeypatch.setattr("server.task_encoder._STEPS", 0)
    assert train_encoder(body, sets, plan, seed=0)[1] < retrieved - 0.05


def test_the_encoder_is_made_where_a_mapping_is_trained_or_compared_with(make_plan: PlanMaker) -> None:
    compared = {"compare": [{"name": "mapping", "trainable": "mapping"}]}
    assert needs_encoder(mapped(make_plan))
    assert needs_encoder(make_plan(evaluation=compared))
    assert not needs_encoder(make_plan())


def write(plan: StudyPlan, file: Path) -> Path:
    file.write_text(plan.to_json().replace("/", "\\/").replace('"privacy":null', '"privacy":"none"'))  # JSON is YAML
    return file


def test_a_plan_starts_from_the_file_and_hospitals_images_are_left_out(
    make_site: SiteMaker, make_plan: PlanMaker, tmp_path: Path
) -> None:
    folder = make_site("alder")
    plan = mapped(make_plan, "warm.safetensors")
    file = write(plan, tmp_path / "plan.yaml")
    public = tmp_path / "public" / "alder"
    public.parent.mkdir()
    folder.rename(public)
    hospital = make_site("birch", seed=1)
    shared = dict(np.load(public / "data.npz"))
    shared["images"][:5] = np.load(hospital / "data.npz")["images"][:5]  # five films that are in both
    np.savez(public / "data.npz", **shared)
    written = make_warm_start(file, public.parent, None, avoid=hospital.parent, steps=2, meta_steps=1, seed=0)
    assert written == tmp_path / "warm.safetensors"
    found = load_checkpoint(written)
    assert found.metadata["images"] == str(len(load_public(public, plan)) - 5)
    assert (found.metadata["steps"], found.metadata["meta_steps"]) == ("2", "1")
    assert "encoder_retrieval" in found.metadata
    start = initial_parameters(plan, tmp_path)
    for name in ("body.1.weight", "encoder.of_task.weight"):
        assert torch.equal(start[name], found.tensors[name])
    segmenting = write(make_plan(**SEGMENTATION), tmp_path / "segmenting.yaml")
    with pytest.raises(UsageError, match=r"task.kind is 'segmentation' -- leave out --meta-steps"):
        make_warm_start(segmenting, public.parent, written, avoid=None, steps=10**6, meta_steps=1, seed=0)
    unnamed = write(make_plan(), tmp_path / "unnamed.yaml")
    with pytest.raises(UsageError, match="names no file to write"):
        make_warm_start(unnamed, public.parent, None, avoid=None, steps=2, seed=0)


def test_orientation_and_modalities_come_from_the_folder(
    make_site: SiteMaker, make_plan: PlanMaker, tmp_path: Path
) -> None:
    folder = make_site("alder")
    plan = make_plan()
    assert not load_public(folder, plan).free
    assert load_public(folder, plan).modalities is None
    with (folder / "site.yaml").open("a") as file:
        file.write("orientation: free\n")
    shared = dict(np.load(folder / "data.npz"))
    kinds = np.where(np.arange(len(shared["labels"])) % 2, "film", "slide")
    np.savez(folder / "data.npz", **shared, modality=kinds)
    task = plan.task.model_copy(update={"modalities": ["ultrasound", "film"]})
    public = load_public(folder, plan.model_copy(update={"task": task}))
    assert public.free
    assert public.modalities is not None
    assert public.modalities.tolist()[:4] == [-1, 1, -1, 1]


@pytest.mark.realdata
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real images are not beside this checkout, in ../shared/data")
def test_a_u_net_learns_real_nuclei(make_plan: PlanMaker) -> None:
    """A fresh head finds more nuclei of new images on a body that learned others than on a random one."""
    plan = make_plan(**SEGMENTATION | {"task": SEGMENTATION["task"] | {"image_size": 32}})
    with np.load(REAL_DATA / "nuclei_dsb2018.npz") as file:
        images, masks = file["images"][:, ::2, ::2].mean(axis=3), file["masks"][:, ::2, ::2]
    nuclei = replace(public_set(images, np.zeros(len(images), dtype=np.int64)), masks=torch.from_numpy(masks))
    public, known, new = (nuclei.rows(torch.arange(start, len(nuclei), 16)) for start in (0, 4, 8))
    body = pretrain([public], plan, steps=100, seed=0)
    learned, random = (dice(plan, values, known, new) for values in (body, parameters(with_values(plan, {}))))
    assert learned > random + 0.08
