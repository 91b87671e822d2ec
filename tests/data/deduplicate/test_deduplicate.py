"""tools/deduplicate.py: what stays, in what order, and what becomes of an interrupted run."""

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from megamup.cli import load_program
from megamup.data.reading.documents import ReadOptions
from megamup.data.reading.sources import find
from megamup.data.reading.units import plan_units

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "deduplicate.py"

Main = Callable[[list[str]], int]


@pytest.fixture(scope="session")
def deduplicate_main() -> Main:
    main: Main = load_program(TOOL).main
    return main


@pytest.fixture
def texts(corpus: Callable[[str], Path]) -> list[str]:
    """Of the C4 sample, those of some length; none is like another."""
    with open(corpus("c4_sample.jsonl"), encoding="utf-8") as file:
        every = [json.loads(line)["text"] for line in file]
    return [text for text in every if len(text.split()) >= 100][:400]


def write_lines(path: Path, texts: Iterable[str]) -> Path:
    data = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read_back(folder: Path) -> list[str]:
    """The documents of a folder, as preprocessing reads them."""
    documents: list[str] = []
    ends = True
    for unit in plan_units(find([str(folder)])):
        for _, batches in unit.pieces(ReadOptions(), lambda piece: True):
            for batch in batches:
                for place, text in enumerate(batch.texts):
                    documents += [text] if ends else [documents.pop() + text]
                    ends = place < len(batch.texts) - 1 or not batch.continues
    return documents


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(Path(f"{folder}.report.json").read_text())
    return report


def arguments(inputs: Iterable[Path], output: Path, method: str, *options: str) -> list[str]:
    return ["--input", *map(str, inputs), "--output", str(output), "--method", method, *options]


def nearly(text: str) -> str:
    """The text with a word of its middle changed, and another layout."""
    words = text.split()
    words[len(words) // 2] = "something-else"
    return "\n".join(words).upper()


@pytest.mark.parametrize("method", ["exact", "minhash"])
def test_the_first_of_each_stays_in_order_for_any_number_of_workers(
    method: str, deduplicate_main: Main, texts: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("rensa")
    one, two, three = texts[:100], texts[100:250], texts[250:]
    copies = [*one[:20], *map(nearly, two[:30]), *two[30:60]]
    inputs = [
        write_lines(tmp_path / "one.jsonl", [*one, *one[::-10]]),
        write_lines(tmp_path / "two.jsonl.gz", [*two, *copies]),
        write_lines(tmp_path / "three.jsonl", [*copies, *three, "", "", "short", "short"]),
    ]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text(three[7])
    (tmp_path / "folder" / "b.txt").write_text("A text that stands nowhere else.")
    inputs.append(tmp_path / "folder")
    kept = list(map(nearly, two[:30])) if method == "exact" else []
    expected = [*one, *two, *kept, *three, "", "short", "A text that stands nowhere else."]

    for workers in ("1", "2"):
        assert deduplicate_main(arguments(inputs, tmp_path / workers, method, "--workers", workers)) == 0
    assert read_back(tmp_path / "1") == expected
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert sorted(os.listdir(tmp_path)) == sorted(
        [*(path.name for path in inputs), "1", "2", "1.report.json", "2.report.json"]
    )
    report = report_of(tmp_path / "1")
    assert report == report_of(tmp_path / "2")
    documents = [110, 230, 80 + 150 + 4, 2]
    assert [entry["documents"] for entry in report["inputs"]] == documents
    assert [entry["duplicates"] for entry in report["inputs"]] == [10, 80 - len(kept), 82, 1]
    assert report["documents"] == sum(documents)
    assert report["kept"] == len(expected)


def test_compressed_output_and_other_keys(deduplicate_main: Main, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    rows = [{"title": f"{number % 3}", "body": 'déjà\u2028vu \\ "1"\n'} for number in range(9)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--text-key", "title", "body", "--compress", "--workers", "1")
    assert deduplicate_main(arguments([source], tmp_path / "out", "exact", *options)) == 0
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".zst"]
    assert read_back(tmp_path / "out") == [f'{number}\n\ndéjà\u2028vu \\ "1"\n' for number in range(3)]


@pytest.mark.parametrize("method", ["exact", "minhash"])
def test_long_documents(method: str, deduplicate_main: Main, tmp_path: Path) -> None:
    """These come in several texts, in a plain file and in a stream."""
    pytest.importorskip("rensa")
    long = " ".join(f"word{number * number % 99991}" for number in range(460_000))
    other = long.replace("word5", "term5")
    inputs = [
        write_lines(tmp_path / "a.jsonl", ["before", long, "between", other, long]),
        write_lines(tmp_path / "b.jsonl.gz", [other, "after", long]),
    ]
    assert len(long) > 4 << 20
    assert deduplicate_main(arguments(inputs, tmp_path / "out", method, "--workers", "1")) == 0
    assert read_back(tmp_path / "out") == ["before", long, "between", other, "after"]


def test_unreadable_documents(deduplicate_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "one"}\n{"body": "two"}\n{"text": "one"}\n{"text": "three"}\n')
    out = tmp_path / "out"
    assert deduplicate_main(arguments([source], out, "exact", "--workers", "1")) == 2
    assert "a.jsonl:2: no key 'text'" in capsys.readouterr().err
    assert not out.exists()
    assert deduplicate_main(arguments([source], out, "exact", "--workers", "1", "--on-error", "skip")) == 0
    assert read_back(out) == ["one", "three"]
    assert report_of(out)["unreadable"] == 1
    assert "a.jsonl:2: no key 'text'" in capsys.readouterr().out


def test_bad_arguments(deduplicate_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n\n")
    for inputs, output, options, message in [
        ([source], "full", ("exact",), "full: exists already; remove it, or name another folder"),
        ([source], "out", ("exact", "--threshold", "0.8"), "--threshold: has no meaning with --method exact"),
        ([source], "out", ("minhash", "--threshold", "8"), "--threshold 8.0: expected a similarity from 0.1 to 1"),
        ([blank], "out", ("exact",), "no documents in the input"),
        ([tmp_path / "b.jsonl"], "out", ("exact",), "did you mean"),
    ]:
        assert deduplicate_main(arguments(inputs, tmp_path / output, options[0], *options[1:])) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_killed_at_any_time_and_started_again(deduplicate_main: Main, texts: list[str], tmp_path: Path) -> None:
    inputs = [write_lines(tmp_path / f"{number}.jsonl", texts[number:] * 30) for number in range(6)]
    assert deduplicate_main(arguments(inputs, tmp_path / "whole", "exact", "--workers", "1")) == 0
    command = [sys.executable, str(TOOL), *arguments(inputs, tmp_path / "out", "exact", "--workers", "2")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    work, kills = tmp_path / "out.work", 0
    markers: dict[Path, int] = {}
    for most in (1, 15, 40, 60):  # of 72: two passes, each with a marker for 18 units and for their pieces
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list((work / "pieces").glob("*.json"))) < most:
                time.sleep(0.001)
            kills += process.poll() is None
            process.kill()
        assert all(path.stat().st_mtime_ns == made for path, made in markers.items())  # nothing is made again
        markers = {path: path.stat().st_mtime_ns for path in (work / "pieces").glob("*-*-*.json")}
    assert kills == 4
    assert deduplicate_main(arguments(inputs, tmp_path / "out", "exact", "--workers", "1")) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not work.exists()


def test_unfinished_work_on_another_input_is_no_use(deduplicate_main: Main, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "one"}\n' * 3 + b"broken\n")
    assert deduplicate_main(arguments([source], tmp_path / "out", "exact", "--workers", "1")) == 2
    source.write_bytes(b'{"text": "two"}\n' * 3)
    assert deduplicate_main(arguments([source], tmp_path / "out", "exact", "--workers", "1")) == 0
    assert read_back(tmp_path / "out") == ["two"]
