"""Exit codes and messages of `consilium-site data check`, and how both command lines end."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import typer

from client.data.phantoms import make_phantom_sites
from common.command_line import run
from common.errors import CheckpointError, DataError, Problem

ROOT = Path(__file__).parents[1]


def consilium_site(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "client.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def ending(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """The exit code of a command that raises `error`."""
    app = typer.Typer()

    @app.command()
    def command() -> None:
        raise error

    return exit_code(app, monkeypatch)


def exit_code(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["consilium"])
    monkeypatch.setattr("atexit.register", lambda function: None)  # this process does not end here
    with pytest.raises(SystemExit) as caught:
        run(app)
    return caught.value.code


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (DataError(Problem("m.csv:3", "bad", "mend")), 2, "m.csv:3: bad -- mend\n"),
        (CheckpointError("broken"), 1, "broken\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/x"),
            1,
            "the disk is full (/data/x): nothing was left",
        ),
        (typer.Exit(3), 3, ""),
    ],
)
def test_each_error_has_its_exit_code(
    error: BaseException,
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ending(error, monkeypatch) == code
    stderr = capsys.readouterr().err
    assert stderr.startswith(told)
    assert "Traceback" not in stderr


def test_an_error_nobody_foresaw_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()

    @app.command()
    def command() -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(sys, "argv", ["consilium"])
    monkeypatch.setattr("atexit.register", lambda function: None)
    with pytest.raises(OSError, match="Permission denied"):
        run(app)


def test_ctrl_c_beside_a_thread_inside_torch_aborts_nothing() -> None:
    """A thread that comes back from C++ into an interpreter that shuts down ends the process with SIGABRT."""
    program = """
        import threading, time, torch, typer
        from common.command_line import run

        def busy():
            while True:
                end = start = torch.ones(64, 64, requires_grad=True)
                for _ in range(200):
                    end = end * 1.0
                end.register_hook(lambda gradient: None)
                end.sum().backward()

        app = typer.Typer()

        @app.command()
        def command():
            for _ in range(4):
                threading.Thread(target=busy, daemon=True).start()
            time.sleep(0.3)
            raise KeyboardInterrupt

        run(app)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 130, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sites")
    return make_phantom_sites(out, names=["hazel"], patients=9, image_size=32, format="png")[0]


def test_a_sound_site(site: Path) -> None:
    done = consilium_site("data", "check", site)
    assert done.returncode == 0, done.stderr
    assert "fit for use" in done.stdout
    assert "note: PHANTOM" in done.stdout
    for label in ("normal", "cyst", "mass"):
        assert label in done.stdout
    assert "<10 patients (<10 train); mean" in done.stdout
    report = json.loads(consilium_site("data", "check", site, "--json").stdout)
    assert (report["fit"], report["patients"], report["images_per_patient"][2]) == (True, 0, 0)
    report = json.loads(consilium_site("data", "check", site, "--json", "--exact").stdout)
    assert report["fit"] is True
    assert report["patients"] == 9
    assert sum(count["images"] for count in report["counts"]) == report["images"]


def test_a_site_with_problems(site: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_text("path,label,patient\ngone.png,normal,p1\n")
    (tmp_path / "site.yaml").write_text((site / "site.yaml").read_text())
    done = consilium_site("data", "check", tmp_path)
    assert done.returncode == 2
    assert "manifest.csv:2: image: there is no such file -- mend or leave out the row" in done.stderr
    done = consilium_site("data", "check", tmp_path, "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["problems"][0]["where"].endswith("manifest.csv:2")


def test_a_site_that_does_not_fit_the_plan(site: Path) -> None:
    plan = ROOT / "deploy" / "studies" / "demo.yaml"
    done = consilium_site("data", "check", site, "--plan", plan)
    assert done.returncode == 2
    assert "site.yaml:1: the plan has no site 'hazel'" in done.stderr
    done = consilium_site("data", "check", site, "--plan", plan, "--site", "alder")
    assert done.returncode == 2
    assert "the plan does not know this label -- allowed: normal, nodule" in done.stderr


@pytest.mark.parametrize("arguments", [["data", "chek"], ["data", "check"], ["data", "check", ".", "--colour"]])
def test_wrong_usage(arguments: list[str]) -> None:
    done = consilium_site(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_plan_that_is_not_there(site: Path) -> None:
    done = consilium_site("data", "check", site, "--plan", "nowhere.yaml")
    assert done.returncode == 2
    assert done.stderr == "nowhere.yaml: there is no such file -- check the path\n"
