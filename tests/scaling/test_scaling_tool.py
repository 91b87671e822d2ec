"""`tools/scaling.py` as its user meets it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

MakeRun = Callable[..., Path]


Capture = pytest.CaptureFixture[str]


def run(tool: ModuleType, capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    code = tool.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def fit_file(tool: ModuleType, capsys: Capture, ladder: list[Path], tmp_path: Path) -> Path:
    path = tmp_path / "fit.json"
    code, _, _ = run(tool, capsys, "fit", "--law", "power", "--runs", *ladder, "--exclude", "w2048", "--output", path)
    assert code == 0
    return path


def test_fit_prints_one_object(tool: ModuleType, capsys: Capture, ladder: list[Path], truth: dict[str, float]) -> None:
    code, out, err = run(tool, capsys, "fit", "--law", "power", "--objective", "loss", "--runs", *ladder, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["law"] == "power"
    assert answer["inputs"] == ["C"]
    assert answer["objective_name"] in ("log", "loss", "huber")
    assert set(answer["parameters"]) == set(answer["intervals"]) == set("abc")
    for name, (low, high) in answer["intervals"].items():
        assert low < answer["parameters"][name] < high
        assert low < truth[name] < high
    assert answer["objective"] == pytest.approx(sum((p["loss"] - p["fitted"]) ** 2 for p in answer["points"]))
    assert answer["residual_std"] == pytest.approx((answer["objective"] / 3) ** 0.5)
    assert answer["convention"]["flops"] == "6N"
    expected = {"starts", "share_of_starts_at_optimum", "gradient_norm", "condition_number", "at_bound"}
    assert expected < set(answer["optimum"])
    assert [point["name"] for point in answer["points"]][:2] == ["w64", "w128"]


def test_what_fit_prints_is_what_it_writes(
    tool: ModuleType, capsys: Capture, ladder: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "fit.json"
    _, out, _ = run(tool, capsys, "fit", "--law", "power", "--runs", *ladder, "--output", path, "--json")
    assert json.loads(out) == json.loads(path.read_text())


def test_fit_prints_an_aligned_table(tool: ModuleType, capsys: Capture, ladder: list[Path]) -> None:
    code, out, _ = run(tool, capsys, "fit", "--law", "power", "--x", "N", "--runs", *ladder)
    assert code == 0
    assert "L = a·N^b + c" in out
    assert "non_embedding" in out
    lines = out.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("run "))) :][:7]
    assert len({len(line) for line in table}) == 1


def test_predict(tool: ModuleType, capsys: Capture, fit_file: Path, truth: dict[str, float]) -> None:
    code, out, _ = run(tool, capsys, "predict", "--fit", fit_file, "--at", "C=1.2e19", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["at"] == {"C": 1.2e19}
    expected = truth["a"] * 1.2e19 ** truth["b"] + truth["c"]
    assert answer["low"] < expected < answer["high"]
    assert answer["loss"] == pytest.approx(expected, rel=0.01)
    code, out, _ = run(tool, capsys, "predict", "--fit", fit_file, "--at", "C=1.2e19")
    assert code == 0
    assert "of one new run" in out


def test_report(tool: ModuleType, capsys: Capture, fit_file: Path, ladder: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    code, out, _ = run(tool, capsys, "report", "--fit", fit_file, "--holdout", ladder[-1], "--output", page)
    assert code == 0
    assert "w2048: predicted" in out
    assert "inside 95% interval" in out
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_three_points_fit_without_intervals(tool: ModuleType, capsys: Capture, ladder: list[Path]) -> None:
    code, out, _ = run(tool, capsys, "fit", "--law", "power", "--runs", *ladder[:3], "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["intervals"] == {name: [None, None] for name in "abc"}
    assert "leave none to measure the noise by" in answer["interval_note"]
    assert answer["residual_std"] is None


def test_three_points_predict_without_interval(
    tool: ModuleType, capsys: Capture, ladder: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "three.json"
    run(tool, capsys, "fit", "--law", "power", "--runs", *ladder[:3], "--output", path)
    _, out, _ = run(tool, capsys, "predict", "--fit", path, "--at", "C=1e20", "--json")
    answer = json.loads(out)
    assert (answer["low"], answer["high"]) == (None, None)
    assert "add a run" in answer["interval_note"]


def test_warnings_are_printed(tool: ModuleType, capsys: Capture, tmp_path: Path) -> None:
    table = tmp_path / "rising.csv"
    table.write_text("N,L\n1e6,2.0\n1e7,2.1\n1e8,2.3\n1e9,2.4\n")
    code, _, err = run(tool, capsys, "fit", "--law", "power", "--data", table, "--columns", "N=N,L=L")
    assert code == 0
    assert "warning: a lies on its bound 0" in err


FIT = ("fit", "--law", "power")
GRID = [(n, d) for n in (1e6, 1e7, 1e8) for d in (1e8, 1e9, 1e10)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*FIT, "--runs", "nowhere"), "--runs: nowhere is no run folder"),
        ((*FIT, "--data", "none.csv", "--columns", "C=C,L=L"), "--data: none.csv is no file"),
        ((*FIT, "--data", "none.csv"), "--columns: missing"),
        ((*FIT, "--data", "none.csv", "--columns", "C:C"), "--columns: 'C:C' is no KEY=VALUE"),
        (("predict", "--fit", "none.json", "--at", "C=1"), "--fit: none.json is no file"),
        (("predict", "--fit", "fit.json", "--at", "N=1e9"), "--at: N=1e+09 given; the law power takes C"),
        (
            ("predict", "--fit", "fit.json", "--at", "C=much"),
            "--at C is 'much'; expected a finite number above 0",
        ),
        (("predict", "--fit", "fit.json", "--at", "C"), "--at: 'C' is no KEY=VALUE"),
        (
            ("report", "--fit", "fit.json", "--holdout", "w64", "--output", "r.html"),
            "w64 is one of the fitted runs",
        ),
        (("report", "--fit", "fit.json", "--output", "fit.json/r.html"), "fit.json"),
        (("fit", "--law", "isoflop", "--x", "N", "--runs", "w64"), "--x: N: is the input of power"),
        (("fit", "--law", "annealing", "--intervals", "delta", "--runs", "w64"), "--intervals, --critical-batch"),
        ((*FIT, "--data", "t.csv", "--columns", "C=C,L=L", "--loss", "loss"), "--loss: loss: says what is read of run"),
        ((*FIT, "--data", "t.csv", "--columns", "C=C,L=L", "--parameters", "total"), "--parameters: total: says what"),
        ((*FIT, "--runs", "w64", "--critical-batch", "fit.json"), "fit.json is of power; expected critical-batch"),
        (
            ("predict", "--fit", "fit.json", "--at", "L=0.5", "--json"),
            "gives no C there; expected a loss above",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    tool: ModuleType,
    capsys: Capture,
    fit_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(fit_file.parent)
    code, out, err = run(tool, capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_two_points_are_refused(tool: ModuleType, capsys: Capture, make_run: MakeRun) -> None:
    runs = [make_run("a", parameters=1e6), make_run("b", parameters=1e7)]
    code, _, err = run(tool, capsys, *FIT, "--runs", *runs)
    assert code == 2
    assert "error: points: 2 given; the law power has the 3 parameters a, c, b" in err


def test_an_input_that_the_table_lacks_is_refused(tool: ModuleType, capsys: Capture, tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    table.write_text("N,L\n1e6,2.0\n")
    code, _, err = run(tool, capsys, *FIT, "--x", "C", "--data", table, "--columns", "N=N,L=L")
    assert code == 2
    assert "error: --law power: needs C, which 1 of 1 points lack" in err


def test_an_unknown_law_is_refused_with_those_there_are(tool: ModuleType, capsys: Capture) -> None:
    code, _, err = run(tool, capsys, "fit", "--law", "chinchila", "--runs", "x")
    assert code == 2
    assert "error: law: 'chinchila' is unknown; expected one of power, kaplan-n" in err
    assert "did you mean 'chinchilla'?" in err


@pytest.mark.parametrize("start", [["--help"], ["fit", "--help"]])
def test_it_starts_without_torch_deepspeed_or_matplotlib(start: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "tools" / "scaling.py"), *start],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "megamup" in imported
    assert not imported & {"torch", "deepspeed", "matplotlib"}


def test_flags_are_refused_where_they_would_do_nothing(tool: ModuleType, capsys: Capture, tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    table.write_text("N,D,L\n" + "\n".join(f"{n},{d},{5 - 0.1 * i}" for i, (n, d) in enumerate(GRID)))
    common = ("--data", table, "--columns", "N=N,D=D,L=L")
    _, _, err = run(tool, capsys, "fit", "--law", "chinchilla", "--x", "N", *common)
    assert "the law chinchilla is one of N, D; expected no x" in err
    _, _, err = run(tool, capsys, "fit", "--law", "power", "--smooth", "share=0.1", *common)
    assert "--smooth: share=0.1" in err
    assert "single points" in err
    for option, value, expected in (("--seed", "-1", "from 0 on"), ("--seed", "x", "from 0 on")):
        with pytest.raises(SystemExit):
            tool.main(["fit", "--law", "power", option, value, *map(str, common)])
        assert expected in capsys.readouterr().err


def test_runs_get_their_least_compute_from_a_critical_batch(
    tool: ModuleType, capsys: Capture, ladder: list[Path], tmp_path: Path
) -> None:
    """B_crit = 2e8·L^-4.76 as a table of steps; then L(C_min) of runs, C_min = C/(1 + B/B_crit)."""
    table = tmp_path / "steps.csv"
    rows = [
        f"{batch},{1000 * (4 / loss) ** 8 * (1 + 2e8 * loss**-4.76 / batch)},{loss}"
        for loss in (4.0, 3.5, 3.0)
        for batch in (4096, 16384, 65536, 262144)
    ]
    table.write_text("B,S,L\n" + "\n".join(rows))
    critical, fitted = tmp_path / "critical.json", tmp_path / "cmin.json"
    code, _, _ = run(
        tool,
        capsys,
        "fit",
        "--law",
        "critical-batch",
        "--data",
        table,
        "--columns",
        "B=B,S=S,L=L",
        "--output",
        critical,
    )
    assert code == 0
    arguments = ("fit", "--law", "kaplan-cmin", "--runs", *ladder, "--critical-batch", critical, "--output", fitted)
    assert run(tool, capsys, *arguments)[0] == 0
    for point in json.loads(fitted.read_text())["points"]:
        inputs, critical_batch = point["inputs"], 2e8 * point["loss"] ** -4.76
        assert inputs["Cmin"] == pytest.approx(inputs["C"] / (1 + inputs["B"] / critical_batch), rel=1e-5)
        assert inputs["Smin"] == pytest.approx(inputs["S"] / (1 + critical_batch / inputs["B"]), rel=1e-5)
