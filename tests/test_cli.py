"""``megamup NAME``: finds the programs, in a checkout and in a wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from megamup.cli import main, programs

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("megamup", "tools", "launch", "configs", "ds_configs")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    model = {"arch": "gpt", "d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 32, "max_seq_len": 8}
    values = {
        "model": model,
        "data": {"train": "shard"},
        "train": {"steps": 5},
        "precision": "bf16",
        "deepspeed": "ds_configs/zero1.json",
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_programs_are_those_of_tools_and_launch() -> None:
    files = {path.stem: path for folder in ("tools", "launch") for path in (ROOT / folder).glob("*.py")}
    assert programs() == files
    assert {"plan", "sweep", "scaling", "pretrain", "preprocess_data", "train_tokenizer"} <= set(files)


@pytest.mark.parametrize(
    ("arguments", "code"), [([], 2), (["plann"], 2), (["--json"], 2), (["--help"], 0), (["-h"], 0)]
)
def test_without_a_known_program_the_names_are_listed(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int
) -> None:
    assert main(arguments) == code
    captured = capsys.readouterr()
    listed = (captured.out + captured.err).splitlines()[-1].removeprefix("NAME: ").split(", ")
    assert listed == sorted(programs())


def test_a_program_gets_the_rest_of_the_line(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["megamup"])
    assert main(["plan", str(config_file), "train.steps=7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 7 * 32 * 8


def test_a_program_passes_its_exit_status_on(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["megamup", "plan", str(config_file), "train.steps=0"])
    assert main() == 2
    assert "train.steps=0" in capsys.readouterr().err


def test_help_names_the_command_as_it_was_typed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["megamup"])
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "--help"])
    assert capsys.readouterr().out.startswith("usage: megamup plan ")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources (building writes beside them), unpacked as pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in SHIPPED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "-w", str(folder), str(source)], capture_output=True, text=True, cwd=folder)
    if built.returncode and ("No module named pip" in built.stderr or "Cannot import 'setuptools" in built.stderr):
        pytest.skip("pip and setuptools are needed to build a wheel")
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    shutil.rmtree(source)
    return target


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``megamup ...`` of the wheel, from a folder that is no checkout."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment["PYTHONPATH"] = str(installed)
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )


def test_a_wheel_holds_every_program_and_zero_file(installed: Path, tmp_path: Path) -> None:
    listing = "import megamup.cli as c, json; print(json.dumps({n: str(p) for n, p in c.programs().items()}))"
    done = run(installed, tmp_path, "-c", listing)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == set(programs())
    assert all(path.startswith(str(installed / "megamup")) for path in found.values())
    shipped = {path.name for path in (ROOT / "ds_configs").glob("*.json")}
    assert {path.name for path in (installed / "megamup" / "ds_configs").glob("*.json")} == shipped
    assert (installed / "megamup" / "py.typed").is_file()
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"megamup"}


def test_a_wheel_plans_outside_the_checkout(
    installed: Path, tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ZeRO 1 over 2 ranks: the shipped zero1.json is found in the wheel, and halves the optimizer's bytes."""
    done = run(installed, tmp_path, "-m", "megamup.cli", "plan", str(config_file), "--ranks", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    total = found["parameters"]["total"]
    assert found["state_bytes_per_rank"] == {"weights": 2 * total, "gradients": 4 * total, "optimizer": 6 * total}
    assert main(["plan", str(config_file), "--ranks", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_programs_are_executable() -> None:
    """As the README starts them."""
    for path in [*(ROOT / "tools").glob("*.py"), *(ROOT / "launch").iterdir()]:
        if path.suffix in (".py", ".sbatch"):
            assert os.access(path, os.X_OK), path
