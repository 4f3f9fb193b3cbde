"""What a site released, round by round, so that a lost reply is sent again and never computed twice.

A release and what the site keeps of the round (its head, for one) are one file: after a crash both are there, or
neither.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from common.checkpoint import load_checkpoint, save_checkpoint
from common.params import Params, to_arrays, to_tensors
from common.records import SiteReply
from common.timing import timed

_UPDATE, _KEPT = "update/", "kept/"


@dataclass(frozen=True)
class ReleaseStore:
    """Releases of one study (plan digest) under one site's state folder.

    Not `durable`, as in a simulation, a release survives a kill, and a power cut may lose it: its round is then spent.
    """

    folder: Path
    durable: bool = True

    @timed("store")
    def store(self, reply: SiteReply, kept: Params) -> None:
        """Write a release before it is sent."""
        tensors = {_UPDATE + name: value for name, value in to_tensors(reply.update).items()}
        tensors |= {_KEPT + name: value for name, value in kept.items()}
        scalars = {f.name: getattr(reply, f.name) for f in fields(reply) if f.name != "update"}
        save_checkpoint(self._file(reply.round), tensors, {"reply": json.dumps(scalars)}, durable=self.durable)

    @timed("store")
    def load(self, round: int) -> SiteReply | None:
        """The stored release of a round, or None if there is none.

        Raises CheckpointError if it is there and broken.
        """
        if not self._file(round).exists():
            return None
        tensors, metadata = load_checkpoint(self._file(round), None)
        return SiteReply(**json.loads(metadata["reply"]), update=to_arrays(_under(_UPDATE, tensors)))

    def rounds(self) -> list[int]:
        """The rounds of which a release is stored."""
        return sorted(int(file.stem.removeprefix("round-")) for file in self.folder.glob("round-*.safetensors"))

    def kept_before(self, round: int) -> Params | None:
        """What the last release before `round` left at the site, or None."""
        last = next((r for r in range(round - 1, 0, -1) if self._file(r).exists()), None)
        if last is None:
            return None
        tensors, _ = load_checkpoint(self._file(last), None)
        return _under(_KEPT, tensors)

    def _file(self, round: int) -> Path:
        return self.folder / f"round-{round:05d}.safetensors"


def _under(prefix: str, tensors: Params) -> Params:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
