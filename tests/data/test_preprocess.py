"""The preprocessing program, from files to shards, as its user starts it."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megamup.data.shards import Shard
from megamup.data.tokenizer import load_tokenizer

Main = Callable[[list[str]], int]
RunTool = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).resolve().parents[2]
TOOL = str(ROOT / "tools" / "preprocess_data.py")


def write_corpus(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def read_back(prefix: Path, spec: str = "bytes") -> list[str]:
    """The documents of a shard as text, each without the end-of-document token that it must have."""
    tokenizer = load_tokenizer(spec)
    shard = Shard(str(prefix))
    documents = [shard.document(index) for index in range(len(shard))]
    assert all(document[-1] == tokenizer.eod_id for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


def files_of(folder: Path, prefix: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith(prefix)}


@pytest.fixture
def documents() -> list[str]:
    """Of very different lengths, about 3 MB in all, so that there are several batches."""
    generator = random.Random(0)
    words = ["alpha", "βήτα", "\n", "gamma ", " ", "δ"]
    return [" ".join(generator.choices(words, k=generator.randrange(1, 2000))) for _ in range(500)]


@pytest.fixture
def source(tmp_path: Path, documents: list[str]) -> Path:
    return write_corpus(tmp_path / "source.jsonl", documents)


def arguments(source: Path, prefix: Path, *others: str) -> list[str]:
    return ["--input", str(source), "--output-prefix", str(prefix), "--tokenizer", "bytes", *others]


def test_text_comes_back(
    preprocess_main: Main,
    source: Path,
    tmp_path: Path,
    documents: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert preprocess_main(arguments(source, tmp_path / "out", "--workers", "1")) == 0
    assert read_back(tmp_path / "out") == documents
    shard = Shard(str(tmp_path / "out"))
    size = sum(len(text.encode()) for text in documents)
    assert shard.manifest is not None
    assert shard.manifest.text_bytes == size == shard.n_tokens - 500
    assert shard.manifest.sources == [{"path": str(source), "files": 1, "bytes": source.stat().st_size}]
    said = capsys.readouterr().out
    assert f"out: 500 documents, {shard.n_tokens:,} tokens (uint16), 1.00 bytes per token" in said
    assert f"{size / 1e6:.1f} MB of text from 1 files" in said
    assert "MB/s" in said


@pytest.mark.parametrize("split", [(), ("--valid-fraction", "0.2")])
def test_same_bytes_for_any_number_of_workers(
    preprocess_main: Main, source: Path, tmp_path: Path, split: tuple[str, ...]
) -> None:
    outputs = []
    for workers in ("1", "2", "3"):
        folder = tmp_path / workers
        folder.mkdir()
        assert preprocess_main(arguments(source, folder / "out", "--workers", workers, *split)) == 0
        outputs.append(files_of(folder, "out"))
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(outputs[0]) == (6 if split else 3)


def test_sentencepiece_in_workers(
    preprocess_main: Main, source: Path, tmp_path: Path, documents: list[str], model_path: Path
) -> None:
    args = ["--input", str(source), "--output-prefix", str(tmp_path / "out"), "--tokenizer", str(model_path)]
    assert preprocess_main([*args, "--workers", "2"]) == 0
    assert read_back(tmp_path / "out", str(model_path)) == documents


def test_valid_split_is_by_document_and_deterministic(
    preprocess_main: Main, source: Path, tmp_path: Path, documents: list[str]
) -> None:
    def split(name: str, seed: str) -> tuple[list[str], list[str]]:
        options = ("--valid-fraction", "0.1", "--seed", seed, "--workers", "1")
        assert preprocess_main(arguments(source, tmp_path / name, *options)) == 0
        return read_back(tmp_path / f"{name}_train"), read_back(tmp_path / f"{name}_valid")

    train, valid = split("a", "0")
    assert sorted(train + valid) == sorted(documents)
    assert 25 < len(valid) < 75
    assert split("b", "0") == (train, valid)
    assert split("c", "1") != (train, valid)


def test_empty_validation_part(preprocess_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "one.txt"
    source.write_text("one document")
    options = ("--valid-fraction", "0.01", "--workers", "1")
    assert preprocess_main(arguments(source, tmp_path / "out", *options)) == 2
    said = capsys.readouterr().err
    assert "no document fell into" in said
    assert "out_valid' with --valid-fraction 0.01" in said
    assert files_of(tmp_path, "out") == {}


def test_empty_documents_are_counted(preprocess_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_corpus(tmp_path / "a.jsonl", ["one", "", "two", ""])
    assert preprocess_main(arguments(source, tmp_path / "out", "--workers", "1")) == 0
    assert read_back(tmp_path / "out") == ["one", "two"]
    assert "skipped 2 empty documents" in capsys.readouterr().out


def test_many_inputs_of_many_kinds(preprocess_main: Main, tmp_path: Path) -> None:
    write_corpus(tmp_path / "a.jsonl", ["1", "2"])
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"3"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "c.md").write_text("4")
    inputs = [str(tmp_path / name) for name in ("a.jsonl", "b.txt.gz", "folder")]
    out = ["--output-prefix", str(tmp_path / "out"), "--tokenizer", "bytes", "--workers", "1"]
    assert preprocess_main(["--input", *inputs, *out]) == 0
    assert read_back(tmp_path / "out") == ["1", "2", "3", "4"]


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "absent.txt': no such file or folder"),
        ("empty.txt", b"", "empty.txt': the file is empty"),
        ("latin.txt", b"caf\xe9", "latin.txt: not UTF-8: byte 0xe9 at byte 3"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "one"}\n{"body": "two"}\n', "a.jsonl:2: no key 'text'; its keys: 'body'"),
        ("a.jsonl", b'{"text": ""}\n{"text": ""}\n', "no documents: 2 were empty and 0 unreadable"),
    ],
)
def test_bad_input_is_one_message_and_no_output(
    preprocess_main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    workers: str,
    name: str,
    content: bytes | None,
    message: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert preprocess_main(arguments(tmp_path / name, tmp_path / "out", "--workers", workers)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert files_of(tmp_path, "out") == {}


def test_unreadable_documents_can_be_skipped(
    preprocess_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("good")
    (folder / "b.txt").write_bytes(b"caf\xe9")
    (folder / "c.jsonl").write_text('{"text": "also good"}\n{}\n')
    options = ("--on-error", "skip", "--workers", "1")
    assert preprocess_main(arguments(folder, tmp_path / "out", *options)) == 0
    assert read_back(tmp_path / "out") == ["good", "also good"]
    said = capsys.readouterr().out
    assert "skipped 2 unreadable documents:" in said
    assert "b.txt: not UTF-8" in said
    assert "c.jsonl:2: no key 'text'" in said


def test_bad_arguments(preprocess_main: Main, source: Path, tmp_path: Path) -> None:
    for option in (("--workers", "0"), ("--valid-fraction", "1"), ("--on-error", "ignore")):
        with pytest.raises(SystemExit, match="2"):
            preprocess_main(arguments(source, tmp_path / "out", *option))


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_full_disk_leaves_the_earlier_shard(
    preprocess_main: Main, source: Path, tmp_path: Path, run_python: RunTool
) -> None:
    """A limit on the size of files fails a write as a full disk does, with another errno."""
    small = write_corpus(tmp_path / "small.jsonl", ["an earlier shard"])
    out = tmp_path / "out"
    assert preprocess_main(arguments(small, out, "--workers", "1")) == 0
    before = files_of(tmp_path, "out")
    for workers in ("1", "2"):
        result = run_python("-c", LIMITED, TOOL, *arguments(source, out, "--workers", workers))
        assert result.returncode == 2
        assert result.stderr.splitlines()[-1].startswith("error: ")
        assert "out.bin: cannot be written: File too large" in result.stderr
        assert "Traceback" not in result.stderr
        assert files_of(tmp_path, "out") == before
    assert read_back(out) == ["an earlier shard"]


@pytest.fixture
def large_source(tmp_path: Path) -> Path:
    """Text that takes some seconds, so that a signal finds the program at work."""
    path = tmp_path / "large.jsonl"
    line = json.dumps({"text": "0123456789" * 100}) + "\n"
    path.write_text(line * 60_000)
    return path


def start_and_signal(source: Path, prefix: Path, number: signal.Signals) -> subprocess.Popen[str]:
    """Start the program on two workers, send it a signal once it writes, and wait for its end."""
    process = subprocess.Popen(
        [sys.executable, TOOL, *arguments(source, prefix, "--workers", "2")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background has SIGINT ignored, which programs inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    temporary = Path(f"{prefix}.bin.tmp")
    deadline = time.monotonic() + 30
    while not (temporary.exists() and temporary.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.wait(timeout=30)
    return process


def test_interrupt_leaves_nothing(large_source: Path, tmp_path: Path) -> None:
    process = start_and_signal(large_source, tmp_path / "out", signal.SIGINT)
    assert process.returncode == 130
    assert process.communicate()[1] == "interrupted: nothing was written\n"
    assert files_of(tmp_path, "out") == {}


def test_killed_and_started_again(preprocess_main: Main, large_source: Path, tmp_path: Path) -> None:
    process = start_and_signal(large_source, tmp_path / "out", signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    process.communicate(timeout=10)  # ends when the workers, which hold the other ends, have ended too
    assert list(files_of(tmp_path, "out")) == ["out.bin.tmp"]
    assert preprocess_main(arguments(large_source, tmp_path / "out", "--workers", "1")) == 0
    assert sorted(files_of(tmp_path, "out")) == ["out.bin", "out.idx", "out.json"]
    assert len(Shard(str(tmp_path / "out"))) == 60_000


@pytest.mark.parametrize("tool", ["preprocess_data", "train_tokenizer"])
def test_help_needs_no_training_packages(run_python: RunTool, tool: str) -> None:
    """Megatron's preprocessing dies where a training dependency is missing; this one loads none."""
    result = run_python("-X", "importtime", str(ROOT / "tools" / f"{tool}.py"), "--help")
    assert result.returncode == 0
    assert "usage:" in result.stdout
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "megamup" in imported
    assert not imported & {"torch", "deepspeed", "megatron", "transformers"}


@pytest.mark.parametrize("name", ["c4_sample.jsonl", "novels.jsonl.gz"])
def test_real_text_comes_back(preprocess_main: Main, tmp_path: Path, corpus: Callable[[str], Path], name: str) -> None:
    path = corpus(name)
    opener = gzip.open if name.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    assert preprocess_main(arguments(path, tmp_path / "out", "--workers", "2")) == 0
    assert read_back(tmp_path / "out") == texts
