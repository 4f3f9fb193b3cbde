"""One site's images in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.images import normalise


@dataclass(frozen=True)
class SiteData:
    """Images of one site, ready for the plan's network. Rows agree across all fields."""

    site: str
    images: Tensor  # uint8 (n, C, H, W), the plan's size and channels
    labels: Tensor  # int64 (n,), index into label_names
    patients: Tensor  # int64 (n,), index into patient_ids
    label_names: tuple[str, ...]
    patient_ids: tuple[str, ...]  # pseudonyms
    split: tuple[str, ...]  # per row: "train" or "test"; a patient is never in two
    masks: Tensor | None = None  # uint8 (n, H, W), 0 = background

    @property
    def ways(self) -> int:
        return len(self.label_names)

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor) -> SiteData:
        """The rows at `index` (int64); patients keep their numbers."""
        keep = index.tolist()
        return SiteData(
            self.site,
            self.images[index],
            self.labels[index],
            self.patients[index],
            self.label_names,
            self.patient_ids,
            tuple(self.split[i] for i in keep),
            None if self.masks is None else self.masks[index],
        )

    def of_split(self, split: str) -> SiteData:
        """The rows of one split."""
        return self.rows(torch.tensor([i for i, s in enumerate(self.split) if s == split], dtype=torch.int64))

    def normalised(self, index: Tensor | None = None) -> Tensor:
        """float32 (m, C, H, W), ready for a network."""
        return normalise(self.images if index is None else self.images[index])
