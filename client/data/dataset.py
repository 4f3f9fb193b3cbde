"""One site's images in memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from client.data.rows import Details
from common.images import normalise, with_modality
from common.plan import RowFilter, TaskKind


@dataclass(frozen=True)
class SiteData:
    """Images of one site, ready for the plan's network. Rows agree across all fields."""

    site: str
    images: Tensor  # uint8 (n, C, H, W), the plan's size and channels
    labels: Tensor  # int64 (n,), index into label_names; multilabel: float (n, L) of 0 and 1; segmentation: zeros
    patients: Tensor  # int64 (n,), index into patient_ids
    label_names: tuple[str, ...]
    patient_ids: tuple[str, ...]  # pseudonyms
    split: tuple[str, ...]  # per row: "train" or "test"; a patient is never in two
    masks: Tensor | None = None  # uint8 (n, H, W), 0 = background; None unless every row has one
    kind: TaskKind = "classification"
    details: tuple[Details, ...] = ()  # per row
    modalities: Tensor | None = None  # int64 (n,), index into the plan's modalities; None if the plan names none

    @property
    def ways(self) -> int:
        """How many outputs the task has; for anomalies the two of its self-supervised task."""
        return 2 if self.kind == "anomaly" else len(self.label_names)

    @property
    def targets(self) -> Tensor:
        """What losses compare outputs with: the labels; for segmentation int64 masks (n, H, W)."""
        return self.targets_at(slice(None))

    def targets_at(self, index: Tensor | slice) -> Tensor:
        """The targets of some rows."""
        if self.kind != "segmentation":
            return self.labels[index]
        if self.masks is None:
            raise ValueError(f"site {self.site} has no mask for every row")
        return self.masks[index].long()

    @property
    def strata(self) -> Tensor:
        """int64 (n,): what a fair split deals evenly: the label, or the combination of findings."""
        return self.labels if self.labels.dim() == 1 else torch.unique(self.labels, dim=0, return_inverse=True)[1]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor) -> SiteData:
        """The rows at `index` (int64); patients keep their numbers."""
        keep = index.tolist()
        return dataclasses.replace(
            self,
            images=self.images[index],
            labels=self.labels[index],
            patients=self.patients[index],
            split=tuple(self.split[i] for i in keep),
            masks=None if self.masks is None else self.masks[index],
            details=tuple(self.details[i] for i in keep) if self.details else (),
            modalities=None if self.modalities is None else self.modalities[index],
        )

    def of_split(self, split: str) -> SiteData:
        """The rows of one split; all of them are not copied."""
        if all(s == split for s in self.split):
            return self
        return self.rows(torch.tensor([i for i, s in enumerate(self.split) if s == split], dtype=torch.int64))

    def matching(self, wanted: RowFilter) -> SiteData:
        """The rows whose details match; what is not known matches only where nothing is asked for."""
        known = self.details or (Details(),) * len(self)
        return self.rows(torch.tensor([i for i, d in enumerate(known) if d.match(wanted)], dtype=torch.int64))

    def inputs(self, index: Tensor | None = None) -> Tensor:
        """float32, ready for a network: (m, C, H, W), with one more channel where the plan has modalities."""
        every = torch.arange(len(self)) if index is None else index
        return self.as_inputs(self.images[every], every)

    def as_inputs(self, images: Tensor, index: Tensor) -> Tensor:
        """The same of views (0 to 255) of the rows at `index`."""
        inputs = normalise(images)
        return inputs if self.modalities is None else with_modality(inputs, self.modalities[index])
