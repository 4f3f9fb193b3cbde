"""A lab and two hospitals on hosts of their own: network namespaces with links between them. One is cut, and mended."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local_federation import local_federation, wait_for
from tests.test_deployment import SITES, folder, write_study

__all__ = ["folder"]  # a fixture

HOSTS = ("lab", *SITES)
PREFIX = f"c{os.getpid() % 10000}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


def namespace(host: str) -> str:
    return f"{PREFIX}-{host}"


@pytest.fixture
def hosts() -> Iterator[None]:
    """One namespace each, on one bridge that has no way out."""
    bridge = f"{PREFIX}br"
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for number, host in enumerate(HOSTS, start=1):
            ip("netns", "add", namespace(host))
            ip("link", "add", f"{PREFIX}v{number}", "type", "veth", "peer", "name", "eth0", "netns", namespace(host))
            ip("link", "set", f"{PREFIX}v{number}", "master", bridge, "up")
            ip("-n", namespace(host), "addr", "add", f"10.99.7.{number}/24", "dev", "eth0")
            ip("-n", namespace(host), "link", "set", "eth0", "up")
            ip("-n", namespace(host), "link", "set", "lo", "up")
    except (subprocess.CalledProcessError, OSError) as error:
        remove(bridge)
        pytest.skip(f"this machine allows no network namespaces: {error}")
    yield
    remove(bridge)


def remove(bridge: str) -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", namespace(host)], capture_output=True, timeout=20, check=False)
    subprocess.run(["ip", "link", "del", bridge], capture_output=True, timeout=20, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("hosts")
def test_a_hospital_whose_link_was_cut_is_named_and_joins_again(folder: Path) -> None:
    study = write_study(folder, "links", rounds=6, quorum=1, round_timeout_s=20)
    inside = {host: ["ip", "netns", "exec", namespace(host)] for host in HOSTS}
    with local_federation(folder, SITES, host="10.99.7.1", inside=inside) as federation:
        run = federation.run(study)
        for site in SITES:
            federation.approve(site, study, by_command=False)
        wait_for("the first round", lambda: len(federation.history("links")) > 1)
        link = f"{PREFIX}v{1 + HOSTS.index('alder')}"
        ip("link", "set", link, "down")
        wait_for("a round without alder", lambda: "ok" not in codes(federation.history("links"), "alder")[-1:])
        ip("link", "set", link, "up")
        federation.finish(run, seconds=600)
        alder, cedar = (codes(federation.history("links"), site) for site in SITES)
        assert len(alder) == len(cedar) == 6
        missed = next(number for number, code in enumerate(alder) if code != "ok")
        assert alder[missed] in ("late", "absent", "node-lost")
        assert "ok" in alder[missed:]
        assert cedar.count("ok") >= 4


def codes(history: list[dict[str, object]], site: str) -> list[str]:
    """What the record says of the site, round by round."""
    return [str(o["code"]) for record in history[1:] for o in record["sites"] if o["site"] == site]  # type: ignore[attr-defined]
