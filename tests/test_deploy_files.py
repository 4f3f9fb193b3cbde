"""What is shipped for running Consilium as a service: units, images, compose files, manifests, monitoring, handbook.

No container engine and no cluster is here: these tests hold structure, and that every command and metric exists.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import typer
import yaml
from prometheus_client import CollectorRegistry

import client.cli
import client.node
import server.cli
from common.children import Child
from server.lab import LabConfig
from server.serving import Standing

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
FOLDERS = ("systemd", "docker", "compose", "kubernetes", "monitoring")
FILES = sorted(p for name in FOLDERS for p in (DEPLOY / name).rglob("*") if p.is_file())
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SYSTEMD = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="this machine has no systemd-analyze")


def relative(path: Path) -> str:
    return path.relative_to(DEPLOY).as_posix()


def documents(path: Path) -> list[Any]:
    """A YAML file's documents; a key that is given twice is an error."""

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            assert len(keys) == len(set(keys)), f"{path}:{node.start_mark.line + 1}: a key is given twice"
            return super().construct_mapping(node, deep)

    return list(yaml.load_all(path.read_text(), Loader))


# What every file must be


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix in (".yaml", ".yml", ".json")], ids=relative)
def test_a_file_loads(path: Path) -> None:
    loaded = [json.loads(path.read_text())] if path.suffix == ".json" else documents(path)
    assert loaded
    assert all(isinstance(document, dict) for document in loaded)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_names_no_package_host(path: Path) -> None:
    assert "://" not in path.read_text()


def test_images_are_of_this_version() -> None:
    text = "".join(path.read_text() for path in [*FILES, DEPLOY / "operations.md"])
    versions = re.findall(r"consilium-(?:lab|site):([0-9.]+)", text)
    assert versions
    assert set(versions) == {VERSION}


# systemd


@SYSTEMD
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
@pytest.mark.parametrize("with_drop_ins", [False, True], ids=["alone", "with drop-ins"])
def test_a_unit_is_sound_and_hardened(unit: Path, with_drop_ins: bool, tmp_path: Path) -> None:
    shutil.copy(unit, tmp_path)
    drop_ins = unit.with_name(f"{unit.name}.d")
    if with_drop_ins and drop_ins.exists():
        shutil.copytree(drop_ins, tmp_path / drop_ins.name)
    complaints = [line for line in analyze("verify", "--man=no", f"./{unit.name}", folder=tmp_path) if line]
    absent = re.compile(rf"{unit.name}: Command /opt/consilium/bin/consilium-\w+ is not executable: No such file")
    assert [line for line in complaints if not absent.match(line)] == []
    *_, verdict = analyze("security", "--offline=true", f"./{unit.name}", folder=tmp_path)
    exposure = re.search(r"exposure level for .*: ([0-9.]+)", verdict)
    assert exposure, verdict
    assert float(exposure[1]) < 3.0


def analyze(*arguments: str, folder: Path) -> list[str]:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"}
    done = subprocess.run(
        ["systemd-analyze", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    return (done.stderr + done.stdout).strip().splitlines()


def settings(unit: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / unit).read_text().splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def test_the_worker_has_no_network_and_the_node_no_data() -> None:
    worker, node = settings("consilium-worker.service"), settings("consilium-node.service")
    assert worker["PrivateNetwork"] == ["yes"]
    assert worker["RestrictAddressFamilies"] == ["AF_UNIX"]
    assert "PrivateUsers" not in worker, "it would not see who knocks at its socket"
    assert worker["User"] != node["User"]
    assert node["TemporaryFileSystem"] == ["/var/lib/consilium:ro"]
    seen = " ".join(node["BindPaths"] + node["BindReadOnlyPaths"]).split()
    assert {Path(path).name for path in seen} == {"site.yaml", "membership.json", "node", "run"}
    assert {Path(path).name for path in node["BindPaths"]} == {"node"}


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_is_started_again_for_good(unit: Path) -> None:
    found = settings(unit.name)
    assert found["Restart"] == ["always"]
    assert found["StartLimitIntervalSec"] == ["0"]
    if unit.stem == "consilium-node":
        assert int(found["RestartSec"][0]) >= client.node._NODE_RESTART_S


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to other users")
@pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="this machine has no systemd-tmpfiles")
def test_users_and_folders_are_made_as_the_wall_needs_them(tmp_path: Path) -> None:
    """As after `init` and `join`, which root runs."""
    (tmp_path / "etc").mkdir()
    site = tmp_path / "var" / "lib" / "consilium" / "site"
    for name in ("site.yaml", "membership.json", "manifest.csv", "state/site.key", "node/node.key"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).touch(mode=0o600)
    made = "consilium.{}.conf", "consilium-lab.{}.conf"
    for program, kind, options in (("sysusers", "sysusers", ()), ("tmpfiles", "tmpfiles", ("--create",))):
        files = [str(DEPLOY / "systemd" / name.format(kind)) for name in made]
        subprocess.run([f"systemd-{program}", f"--root={tmp_path}", *options, *files], check=True, timeout=60)
    names = {number: name for name, number in ids(tmp_path / "etc" / "passwd")} | {0: "root"}
    groups = {number: name for name, number in ids(tmp_path / "etc" / "group")} | {0: "root"}

    def owned(name: str) -> tuple[str, str, str]:
        found = (site / name).stat()
        return names[found.st_uid], groups[found.st_gid], f"{stat.S_IMODE(found.st_mode):o}"

    worker, node = "consilium-worker", "consilium-node"
    assert owned("") == ("root", "consilium", "750")
    assert owned("site.yaml") == owned("membership.json") == ("root", "consilium", "640")
    assert owned("manifest.csv") == ("root", worker, "640")
    assert owned("images") == ("root", worker, "750")
    assert owned("state") == (worker, worker, "700")
    assert owned("state/site.key") == (worker, worker, "600")
    assert owned("node") == (node, node, "700")
    assert owned("node/node.key") == (node, node, "600")
    assert owned("run") == (worker, "consilium", "2750")
    assert owned("../lab") == ("consilium-lab", "consilium-lab", "700")
    members = (tmp_path / "etc" / "group").read_text()
    assert re.search(r"^consilium:.*:consilium-(worker,consilium-node|node,consilium-worker)$", members, re.MULTILINE)


def ids(path: Path) -> Iterator[tuple[str, int]]:
    for line in path.read_text().splitlines():
        name, _, number, *_ = line.split(":")
        yield name, int(number)


# Images


def stages() -> dict[str, list[str]]:
    """Instructions by stage; before the first FROM under ''."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ").splitlines():
        if line.startswith("FROM "):
            name = line.split()[-1]
            found[name] = []
        if line.strip():
            found[name].append(" ".join(line.split()))
    return found


def image_users() -> dict[str, int]:
    found = re.findall(r"useradd --uid (\d+) --gid consilium .*?(consilium-\w+)", DOCKERFILE)
    return {name: int(number) for number, name in found}


def test_base_images_are_pinned_by_tag() -> None:
    known = stages()
    arguments = dict(line.removeprefix("ARG ").split("=") for line in known[""])
    bases = [line.split()[1] for lines in known.values() for line in lines if line.startswith("FROM ")]
    outside = [re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], base) for base in bases if base not in known]
    assert outside
    for base in outside:
        assert re.fullmatch(r"[a-z]+:\d+\.\d+\.\d+-[a-z-]+", base), f"{base} moves under one's feet"


@pytest.mark.parametrize(("stage", "user"), [("lab", "consilium-lab"), ("site", "consilium-node")])
def test_an_image_runs_as_nobody_special_and_knows_its_health(stage: str, user: str) -> None:
    lines = stages()[stage]
    (number,) = [line.removeprefix("USER ") for line in lines if line.startswith("USER ")]
    assert number == f"{image_users()[user]}:10000"
    (health,) = [line for line in lines if line.startswith("HEALTHCHECK ")]
    assert f'"consilium-{stage}", "status"' in health


def test_an_image_holds_the_wheel_and_not_the_source() -> None:
    """So the worker's check against the wheel's RECORD can hold."""
    (installs,) = [line for line in stages()["installed"] if "pip install" in line]
    assert "--no-index --find-links /wheels" in installs
    assert not any(line.startswith("COPY") for line in stages()["installed"])


def test_the_users_of_compose_and_kubernetes_are_the_images() -> None:
    known = image_users()
    assert set(known) == {"consilium-worker", "consilium-node", "consilium-lab"}
    used = {int(service["user"].split(":")[0]) for _, service in services()}
    for pod in pods():
        used |= {c["securityContext"].get("runAsUser", pod["securityContext"].get("runAsUser")) for c in all_of(pod)}
    assert used == set(known.values())


# Compose


def services() -> list[tuple[str, dict[str, Any]]]:
    files = [documents(DEPLOY / "compose" / name)[0] for name in ("lab.yaml", "site.yaml")]
    return [item for file in files for item in file["services"].items()]


@pytest.mark.parametrize(("name", "service"), services(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_compose_service_is_locked_down(name: str, service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
    assert service["restart"] == "always"
    assert service["healthcheck"]["test"]
    assert not {"privileged", "cap_add", "devices", "pid", "ipc"} & set(service)
    assert all(mount["bind"] == {"create_host_path": False} for mount in service["volumes"])


def test_the_worker_and_the_node_share_the_socket_and_two_files_under_compose() -> None:
    by_name = dict(services())
    worker, node = by_name["worker"], by_name["node"]
    assert worker["network_mode"] == "none"
    assert "network_mode" not in node
    inside = {name: {m["target"]: m.get("read_only", False) for m in by_name[name]["volumes"]} for name in by_name}
    assert set(inside["worker"]) & set(inside["node"]) == {"/site/site.yaml", "/site/membership.json", "/site/run"}
    assert {target for target, read_only in inside["worker"].items() if not read_only} == {"/site/state", "/site/run"}
    assert {target for target, read_only in inside["node"].items() if not read_only} == {"/site/node"}


# Kubernetes


def manifests() -> list[dict[str, Any]]:
    return [document for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")) for document in documents(path)]


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {found["metadata"]["name"]: found for found in manifests() if found["kind"] == kind}


def pods() -> list[dict[str, Any]]:
    return [found["spec"]["template"]["spec"] for found in of_kind("StatefulSet").values()]


def all_of(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def test_every_pod_keeps_to_the_restricted_profile() -> None:
    assert len(pods()) == 2
    for pod in pods():
        shared = pod["securityContext"]
        assert shared["runAsNonRoot"] is True
        assert shared["seccompProfile"] == {"type": "RuntimeDefault"}
        assert shared["fsGroupChangePolicy"] == "OnRootMismatch", "else each mount opens the private keys to the group"
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for container in all_of(pod):
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert own.get("runAsUser", shared.get("runAsUser", 0)) > 0
    for namespace in of_kind("Namespace").values():
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_every_container_is_probed_by_a_command() -> None:
    """The health port is on loopback, where a probe from outside the Pod does not come."""
    for pod in pods():
        for container in pod["containers"]:
            for probe in ("readinessProbe", "livenessProbe"):
                assert "consilium-" in " ".join(container[probe]["exec"]["command"])
                assert container[probe]["timeoutSeconds"] >= 10


def test_every_mount_has_its_volume() -> None:
    for found in of_kind("StatefulSet").values():
        pod = found["spec"]["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        volumes |= {claim["metadata"]["name"] for claim in found["spec"]["volumeClaimTemplates"]}
        mounted = {mount["name"] for container in all_of(pod) for mount in container["volumeMounts"]}
        assert mounted == volumes
        assert found["spec"]["selector"]["matchLabels"] == found["spec"]["template"]["metadata"]["labels"]


def test_the_node_of_a_pod_has_no_data() -> None:
    by_name = {container["name"]: container for pod in pods() for container in pod["containers"]}
    inside = {n: {m["mountPath"]: m.get("readOnly", False) for m in c["volumeMounts"]} for n, c in by_name.items()}
    shared = set(inside["worker"]) & set(inside["node"]) - {"/tmp"}
    assert shared == {"/site/site.yaml", "/site/membership.json", "/site/run"}
    assert inside["node"]["/site/run"] is True
    assert by_name["worker"]["securityContext"]["runAsUser"] != by_name["node"]["securityContext"]["runAsUser"]


def test_only_the_gateway_is_let_in() -> None:
    lab, site = (of_kind("NetworkPolicy")[name]["spec"] for name in ("consilium-lab", "consilium-site"))
    assert lab["ingress"] == [{"ports": [{"port": "gateway", "protocol": "TCP"}]}]
    assert (lab["egress"], site["ingress"]) == ([], [])
    assert {port["port"] for rule in site["egress"] for port in rule["ports"]} == {9443, 53}
    assert all(rule.get("to") for rule in site["egress"])
    for policy, name in ((lab, "consilium-lab"), (site, "consilium-site")):
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        labels = of_kind("StatefulSet")[name]["spec"]["template"]["metadata"]["labels"]
        assert policy["podSelector"]["matchLabels"] == labels


def test_the_site_of_the_manifest_is_one_that_the_worker_accepts(tmp_path: Path) -> None:
    from client.site import load_site_config

    (tmp_path / "site.yaml").write_text(of_kind("ConfigMap")["site"]["data"]["site.yaml"])
    config = load_site_config(tmp_path)
    assert config.node_user in image_users()
    assert config.verified_install


# Monitoring


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """Every metric that the lab and a node show."""
    status = {"epsilon_spent": 1.0, "epsilon_budget": 8.0, "rounds_charged": 3, "pending": []}
    monkeypatch.setattr(client.node, "WorkerProxy", lambda path: SimpleNamespace(status=lambda: status))
    child = Child("program", ["true"], tmp_path, {})
    lab = Standing(online={"elm": True}, children=[child])
    lab.traffic.note(200)
    names = set()
    for standing in (lab, client.node.NodeStanding(tmp_path, [child])):
        registry = CollectorRegistry()
        registry.register(standing)
        names |= {sample.name for metric in registry.collect() for sample in metric.samples}
    return names


def expressions() -> list[tuple[str, str]]:
    (alerts,) = documents(DEPLOY / "monitoring" / "alerts.yml")
    found = [(rule["alert"], rule["expr"]) for group in alerts["groups"] for rule in group["rules"]]
    dashboard = json.loads((DEPLOY / "monitoring" / "grafana-dashboard.json").read_text())
    for panel in dashboard["panels"]:
        found += [(panel["title"], target["expr"]) for target in panel.get("targets", [])]
    return found


def test_every_metric_that_is_watched_is_shown_and_the_other_way_round(shown: set[str]) -> None:
    watched = {name for _, expression in expressions() for name in re.findall(r"\bconsilium_\w+", expression)}
    assert watched - shown == set(), "no program shows it"
    assert shown - watched == set(), "nothing watches it"


def test_the_dangers_have_alerts() -> None:
    text = dict(expressions())
    assert "consilium_site_online == 0" in text["ConsiliumSiteOffline"]
    assert "consilium_certificate_days < 14" in text["ConsiliumCertificateEnds"]
    assert "consilium_epsilon_spent / consilium_epsilon_budget" in text["ConsiliumEpsilonNearlySpent"]
    assert "consilium_serving == 0" in text["ConsiliumLabNotServing"]


def test_panels_do_not_overlap() -> None:
    dashboard = json.loads((DEPLOY / "monitoring" / "grafana-dashboard.json").read_text())
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        own = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not own & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        cells |= own
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(numbers) == len(set(numbers))


def test_prometheus_asks_the_port_that_the_lab_has() -> None:
    (config,) = documents(DEPLOY / "monitoring" / "prometheus.yml")
    (job,) = config["scrape_configs"]
    port = LabConfig.model_fields["metrics_port"].default
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{port}"]}]
    assert all((DEPLOY / "monitoring" / name).is_file() for name in config["rule_files"])


# Commands

PROGRAMS: dict[str, click.Command] = {
    "consilium-lab": typer.main.get_command(server.cli.app),
    "consilium-site": typer.main.get_command(client.cli.app),
}
_CALL = re.compile(
    r"(?<![\w./:-])(?<!-n )(?:/opt/consilium/bin/)?(consilium-(?:lab|site)) +"
    r"""((?!consilium-)[a-z](?:"[^"]*"|[^"'`|;&#}])*)"""
)


def calls(line: str) -> list[str]:
    """Command lines of the two programs in a line: as a shell has them, or in exec form ([a, b] or ["a", "b"])."""
    line = re.sub(r"systemctl [^`]*", "", line)  # units are called like programs
    plain = re.sub(r'"([^" ]*)"', r"\1", line).translate(str.maketrans("[],", "   "))
    return [f"{program} {' '.join(rest.split())}" for program, rest in _CALL.findall(plain)]


def command_lines() -> list[tuple[str, str, bool]]:
    """(file, command line, whether it is whole): prose and comments may name a command without its arguments."""
    found = []
    for path in FILES:
        if path.suffix == ".json":
            continue
        for line in re.sub(r"\\\n[# ]*", " ", path.read_text()).splitlines():
            whole = "`" not in line and not line.lstrip().startswith("#") and path.parent.name != "monitoring"
            found += [(relative(path), call, whole) for call in calls(line)]
    handbook = (DEPLOY / "operations.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", handbook, flags=re.DOTALL)
    for block in blocks:
        found += [("operations.md", call, True) for line in block.splitlines() for call in calls(line)]
    prose = re.sub(r"```.*?```", "", handbook, flags=re.DOTALL)
    found += [("operations.md", call, False) for quoted in re.findall(r"`[^`]+`", prose) for call in calls(quoted)]
    return found


def problem_with(line: str, *, whole: bool) -> str | None:
    """What is wrong with a command line, by the programs themselves."""
    program, *words = shlex.split(line, comments=True)
    command: click.Command = PROGRAMS[program]
    name = program
    while isinstance(command, click.Group):
        if not words or words[0] not in command.commands:
            return f"{name} has no command {' '.join(words[:1])!r}"
        name, command, words = f"{name} {words[0]}", command.commands[words[0]], words[1:]
    options = {option for parameter in command.params for option in parameter.opts}
    unknown = {word.split("=")[0] for word in words if word.startswith("--")} - options
    if unknown:
        return f"{name} has no option {', '.join(sorted(unknown))}"
    asked = [p.opts[0] for p in command.params if isinstance(p, click.Option) and p.prompt and p.opts[0] not in words]
    try:
        if whole:
            command.make_context(name, words + [word for option in asked for word in (option, "ab12")])
    except click.ClickException as error:
        return f"{line}: {error.format_message()}"
    return None


@pytest.mark.parametrize(("file", "line", "whole"), command_lines())
def test_a_command_line_exists(file: str, line: str, whole: bool) -> None:
    assert problem_with(line, whole=whole) is None


def test_command_lines_are_found_everywhere() -> None:
    lines = command_lines()
    whole = [(file, line) for file, line, is_whole in lines if is_whole]
    assert {file.split("/")[0] for file, _, _ in lines} == {*FOLDERS, "operations.md"}
    assert ("systemd/consilium-worker.service", "consilium-site worker /var/lib/consilium/site") in whole
    assert ("docker/Dockerfile", "consilium-lab serve --lab /lab") in whole
    assert ("compose/site.yaml", "consilium-site start --node-only /site") in whole
    assert ("kubernetes/lab.yaml", "consilium-lab status --lab /lab") in whole
    assert ("kubernetes/site.yaml", "consilium-site worker /site") in whole
    assert any(file == "operations.md" and "--renew" in line for file, line in whole)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("consilium-lab server --lab LAB", "consilium-lab has no command 'server'"),
        ("consilium-site start --node", "consilium-site start has no option --node"),
        ("consilium-site worker", "Missing argument 'FOLDER'"),
        ("consilium-lab provision --lab LAB", "Missing option '--address'"),
    ],
)
def test_a_wrong_command_line_is_seen(line: str, problem: str) -> None:
    assert problem in (problem_with(line, whole=True) or "")
