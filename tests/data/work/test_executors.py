"""Where work runs: the same results, errors and end for processes and Ray."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megamup.data.preprocess.filters import load_filter
from megamup.data.work.executors import Executor, make_executor
from megamup.errors import MegamupError

Main = Callable[[list[str]], int]


@pytest.fixture(scope="module", params=["processes", "ray"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "ray":
        pytest.importorskip("ray", reason="Ray isn't installed")
    with make_executor(request.param, 2) as made:
        yield made


def test_results_and_errors(executor: Executor) -> None:
    futures = [executor.submit(pow, number, 2) for number in range(20)]
    assert [future.result(timeout=60) for future in futures] == [number**2 for number in range(20)]
    failed = executor.submit(load_filter, "nothing")
    with pytest.raises(MegamupError, match=r"^--filter nothing: no such filter") as caught:
        failed.result(timeout=60)
    assert "Traceback" not in str(caught.value)  # Ray's own errors are the worker's traceback


def test_work_runs_in_other_processes(executor: Executor) -> None:
    assert executor.submit(os.getpid).result(timeout=60) != os.getpid()


def test_ray_gives_the_bytes_of_processes(preprocess_main: Main, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray isn't installed")
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"document {number}\n" * 1000 * number)
    call = ["--input", str(tmp_path), "--tokenizer", "bytes", "--workers", "2", "--suffix", ".txt"]
    for executor in ("processes", "ray"):
        (tmp_path / executor).mkdir()
        prefix = str(tmp_path / executor / "out")
        assert preprocess_main([*call, "--output-prefix", prefix, "--executor", executor]) == 0
    processes, ray = (
        {path.name: path.read_bytes() for path in (tmp_path / executor).iterdir() if path.is_file()}
        for executor in ("processes", "ray")
    )
    assert processes == ray
    assert len(ray) == 3
