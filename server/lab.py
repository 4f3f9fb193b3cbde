"""The coordinating lab's own folder: who it is, its keys, the hospitals that it enrolled, its runs.

LAB/lab.yaml                    name, address, ports
LAB/keys/                       certificate authority, server certificate, key that signs studies (0600)
LAB/sites/SITE.json             enrolled hospitals
LAB/ledgers/SITE.jsonl          what was seen of their ledgers
LAB/superlink/                  Flower's own state
LAB/runs/STUDY/                 checkpoints and records of a study
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, field_validator

from common.addresses import parse_address
from common.errors import Problem, UsageError
from common.files import write_atomically
from common.keys import load_signing_key, make_signing_key, public_hex, write_private
from common.names import Name
from common.validation import Strict, validate
from common.yaml_lines import read_yaml
from server.certificates import RENEW_DAYS, Authority, belong_together, days_left, is_for, read_certificate

LAB_FILE = "lab.yaml"
Port = Annotated[int, Field(ge=1, le=65535)]


class LabConfig(Strict):
    """The lab's own YAML."""

    name: Name
    address: str  # host:port, as hospitals reach the lab
    listen: str  # host:port, where the gateway listens
    superlink_port: Port = 9444  # loopback: Flower's own server, which has no login
    metrics_port: Port | None = 9445  # loopback: Prometheus
    health_port: Port | None = 9446  # loopback: grpc.health.v1

    @field_validator("address", "listen")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        parse_address(value)
        return value


@dataclass(frozen=True)
class Lab:
    """An opened lab folder."""

    folder: Path
    config: LabConfig

    @property
    def authority(self) -> Authority:
        return Authority(self.keys / "ca.crt", self.keys / "ca.key")

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def server_certificate(self) -> Path:
        return self.keys / "server.crt"

    @property
    def server_key(self) -> Path:
        return self.keys / "server.key"

    @property
    def superexec_secret(self) -> Path:
        return self.keys / "superexec.secret"

    @property
    def sites(self) -> Path:
        return self.folder / "sites"

    @property
    def superlink(self) -> Path:
        return self.folder / "superlink"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def signing_key(self) -> Ed25519PrivateKey:
        """The key that signs studies and memberships. Raises UsageError."""
        return load_signing_key(self.keys / "signing.key")

    @property
    def public_key(self) -> str:
        """Hex; what its fingerprint is of."""
        return public_hex(self.signing_key())


def open_lab(folder: Path) -> Lab:
    """The lab in `folder`. Raises UsageError if there is none, or its lab.yaml is not valid."""
    if not (folder / LAB_FILE).is_file():
        raise UsageError(Problem(str(folder), f"holds no {LAB_FILE}", "`consilium-lab provision` makes a lab's folder"))
    return Lab(folder.resolve(), validate(read_yaml(folder / LAB_FILE), LabConfig, UsageError))


def provision(folder: Path, *, name: str, address: str, listen: str | None = None) -> Lab:
    """A lab's folder with all its keys; what is there already stays.

    Raises ValueError for a name or an address that is none, UsageError if a file there cannot be used.
    """
    _, port = parse_address(address)
    if not (folder / LAB_FILE).exists():
        config = LabConfig(name=name, address=address, listen=listen or f"0.0.0.0:{port}")
        write_atomically(folder / LAB_FILE, yaml.safe_dump(config.model_dump(), sort_keys=False).encode())
    lab = open_lab(folder)
    lab.keys.mkdir(mode=0o700, exist_ok=True)
    if not (lab.keys / "signing.key").exists():
        make_signing_key(lab.keys / "signing.key")
    if not lab.authority.certificate.exists():  # never a new key for an old certificate: hospitals hold that
        lab.authority.create(lab.config.name)
    if not lab.superexec_secret.exists():
        write_private(lab.superexec_secret, secrets.token_bytes(32))
    renew_certificate(lab)
    return lab


def renew_certificate(lab: Lab, *, always: bool = False) -> bool:
    """A new server certificate if there is none, it ends soon, or it is for another key or address."""
    host, _ = parse_address(lab.config.address)
    if not always and lab.server_certificate.exists() and lab.server_key.exists():
        current = read_certificate(lab.server_certificate)
        current_fits = is_for(current, host) and belong_together(current, lab.server_key)
        if days_left(current) > RENEW_DAYS and current_fits:
            return False
    lab.authority.issue(host, certificate=lab.server_certificate, key=lab.server_key)
    return True
