"""The preprocessing program, from files to shards, as its user starts it."""

import functools
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megamup.data.corpus import Corpus
from megamup.data.preprocess.encode import Encoder
from megamup.data.preprocess.worker import encode_lane, write_encoder
from megamup.data.reading import units
from megamup.data.reading.documents import ReadOptions
from megamup.data.reading.sources import find
from megamup.data.reading.units import plan_units
from megamup.data.tokenizer import ByteTokenizer, load_tokenizer
from megamup.data.work.folder import WorkFolder
from megamup.data.work.lanes import Lane
from megamup.errors import MegamupError

Main = Callable[[list[str]], int]
RunTool = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).resolve().parents[3]
TOOL = str(ROOT / "tools" / "preprocess_data.py")


def write_lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def read_back(prefix: Path, spec: str = "bytes") -> list[str]:
    """The documents of a corpus as text, each without the end-of-document token that it must have."""
    tokenizer = load_tokenizer(spec)
    corpus = Corpus(str(prefix))
    documents = [corpus.document(index) for index in range(len(corpus))]
    assert all(document[-1] == tokenizer.eod_id for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


def files_of(folder: Path, prefix: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(f"{prefix}*") if path.is_file()}


@pytest.fixture
def documents() -> list[str]:
    """Of very different lengths, about 3 MB in all, so that there are several batches."""
    generator = random.Random(0)
    words = ["alpha", "βήτα", "\n", "gamma ", " ", "δ"]
    return [" ".join(generator.choices(words, k=generator.randrange(1, 2000))) for _ in range(500)]


@pytest.fixture
def source(tmp_path: Path, documents: list[str]) -> Path:
    return write_lines(tmp_path / "source.jsonl", documents)


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
    corpus = Corpus(str(tmp_path / "out"))
    size = sum(len(text.encode()) for text in documents)
    assert corpus.manifest is not None
    assert corpus.manifest.text_bytes == size == corpus.n_tokens - 500
    assert corpus.manifest.text_words == sum(len(text.split()) for text in documents)
    assert corpus.manifest.sources == [{"path": str(source), "files": 1, "bytes": source.stat().st_size}]
    said = capsys.readouterr().out
    assert f"out: 500 documents, {corpus.n_tokens:,} tokens (uint16), 1.00 bytes per token" in said
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
    source = write_lines(tmp_path / "a.jsonl", ["one", "", "two", ""])
    assert preprocess_main(arguments(source, tmp_path / "out", "--workers", "1")) == 0
    assert read_back(tmp_path / "out") == ["one", "two"]
    assert "left out 2 documents: empty" in capsys.readouterr().out


def test_many_inputs_of_many_kinds(preprocess_main: Main, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ["1", "2"])
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
        ("a.jsonl", b'{"text": ""}\n{"text": ""}\n', "no documents are left: 2 empty"),
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
    assert list(tmp_path.glob("out*")) == []


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
    assert "left out 2 documents: unreadable" in said
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
    small = write_lines(tmp_path / "small.jsonl", ["an earlier shard"])
    out = tmp_path / "out"
    assert preprocess_main(arguments(small, out, "--workers", "1")) == 0
    before = files_of(tmp_path, "out")
    for workers in ("1", "2"):
        result = run_python("-c", LIMITED, TOOL, *arguments(source, out, "--workers", workers))
        assert result.returncode == 2
        assert result.stderr.splitlines()[-1].startswith("error: ")
        assert "out.work/pieces: cannot be written: File too large; nothing is lost" in result.stderr
        assert "Traceback" not in result.stderr
        assert files_of(tmp_path, "out") == before
    assert read_back(out) == ["an earlier shard"]


def test_a_corrected_file_costs_no_more_than_itself(
    preprocess_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was tokenized before an error is not tokenized again once its cause is mended, or left out."""
    monkeypatch.setattr(units, "UNIT_BYTES", 1000)
    write_lines(tmp_path / "a.jsonl", ["0123456789" * 90])
    (tmp_path / "b.jsonl").write_text('{"text": broken}\n')
    write_lines(tmp_path / "c.jsonl", ["9876543210" * 90])
    call = ["--input", *(str(tmp_path / f"{name}.jsonl") for name in "abc"), "--output-prefix", str(tmp_path / "out")]
    call += ["--tokenizer", "bytes", "--workers", "1"]
    assert preprocess_main(call) == 2
    assert "b.jsonl:1: not JSON" in capsys.readouterr().err
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.work" / "pieces").glob("*.json")}
    assert done

    pieces: dict[str, int] = {}
    discard = WorkFolder.discard

    def keep_names(folder: WorkFolder) -> None:
        pieces.update({path.name: path.stat().st_mtime_ns for path in (folder.path / "pieces").glob("*.json")})
        discard(folder)

    monkeypatch.setattr(WorkFolder, "discard", keep_names)
    assert preprocess_main([*call, "--on-error", "skip"]) == 0
    assert len(read_back(tmp_path / "out")) == 2
    assert done.items() <= pieces.items()
    write_lines(tmp_path / "b.jsonl", ["mended"])
    assert preprocess_main(call) == 0
    assert read_back(tmp_path / "out") == ["0123456789" * 90, "mended", "9876543210" * 90]


def test_a_changed_input_is_not_taken_from_earlier_work(preprocess_main: Main, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["old", "text"])
    work = WorkFolder(str(tmp_path / "out"))
    assert preprocess_main([*arguments(source, tmp_path / "out"), "--part", "0/1"]) == 0
    before = source.stat()
    write_lines(source, ["new", "text"])  # of the same size
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert preprocess_main(arguments(source, tmp_path / "out")) == 0
    assert read_back(tmp_path / "out") == ["new", "text"]
    assert not work.path.exists()


def test_another_tokenizer_is_not_taken_from_earlier_work(
    preprocess_main: Main, source: Path, tmp_path: Path, model_path: Path, documents: list[str]
) -> None:
    assert preprocess_main([*arguments(source, tmp_path / "out"), "--part", "0/1"]) == 0
    call = ["--input", str(source), "--output-prefix", str(tmp_path / "out"), "--tokenizer", str(model_path)]
    assert preprocess_main(call) == 0
    assert read_back(tmp_path / "out", str(tmp_path / "out.tokenizer")) == documents


def test_killed_while_publishing(
    preprocess_main: Main, source: Path, tmp_path: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any number of renames, and even if what was renamed is lost, the same command makes all of it."""
    call = arguments(source, tmp_path / "out", "--shard-size", "2MB", "--workers", "1")
    for renames in range(5):
        done = iter(range(renames))

        def replace(source: str, target: str, done: Iterator[int] = done) -> None:
            if Path(target).parent == tmp_path and Path(target).suffix in (".bin", ".idx") and next(done, None) is None:
                raise KeyboardInterrupt
            os.rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            assert preprocess_main(call) == 130
        assert not (tmp_path / "out.json").exists()
        assert len(list(tmp_path.glob("out-*"))) == renames
        for path in list(tmp_path.glob("out-*"))[::2]:
            path.unlink()
        assert preprocess_main(call) == 0
        assert read_back(tmp_path / "out") == documents
        for path in tmp_path.glob("out[.-]*"):
            path.unlink() if path.is_file() else shutil.rmtree(path)


def test_input_that_changes_while_it_is_read(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    (unit,) = plan_units(find([str(source)]))
    work = WorkFolder(str(tmp_path / "out"))
    with work.held(), work.alive() as alive:
        encoder = write_encoder(Encoder(ByteTokenizer()), work.path)
        source.write_text(source.read_text().replace("two", "tvo"))
        with pytest.raises(MegamupError, match=r"a\.jsonl: changed while it was read; wait until it is whole"):
            encode_lane(encoder, ReadOptions(), unit, "key", Lane(0, 0, 1), alive)
        assert list((work.path / "pieces").iterdir()) == []


def test_the_same_file_twice(preprocess_main: Main, source: Path, tmp_path: Path, documents: list[str]) -> None:
    out = ["--output-prefix", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert preprocess_main(["--input", str(source), str(source), *out]) == 0
    assert read_back(tmp_path / "out") == documents * 2


def test_parts_and_merge(
    preprocess_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a Slurm array does it, in any order, a part twice: the bytes of one process."""
    monkeypatch.setattr(units, "UNIT_BYTES", 1 << 14)
    generator = random.Random(0)
    texts = [generator.randbytes(generator.randrange(3000)).hex() for _ in range(40)]
    source = write_lines(tmp_path / "source.jsonl", texts)
    options = ("--shard-size", "20kB", "--valid-fraction", "0.3", "--workers", "1")
    assert preprocess_main(arguments(source, tmp_path / "one", *options)) == 0
    call = arguments(source, tmp_path / "out", *options)
    assert preprocess_main([*call, "--part", "2/3"]) == 0
    capsys.readouterr()
    assert preprocess_main([*call, "--merge"]) == 2
    assert "isn't tokenized yet; run the parts that are missing (--part) before --merge" in capsys.readouterr().err
    for part in ("0/3", "1/3", "0/3"):
        assert preprocess_main([*call, "--part", part]) == 0
    assert preprocess_main([*call, "--merge"]) == 0
    one = {name.removeprefix("one"): data for name, data in files_of(tmp_path, "one").items() if "json" not in name}
    out = {name.removeprefix("out"): data for name, data in files_of(tmp_path, "out").items() if "json" not in name}
    assert one == out
    assert len(one) > 10
    assert sorted(read_back(tmp_path / "out_train") + read_back(tmp_path / "out_valid")) == sorted(texts)


def test_equal_documents_are_on_one_side(preprocess_main: Main, tmp_path: Path) -> None:
    texts = [f"document {number % 50}" for number in range(300)]
    source = write_lines(tmp_path / "a.jsonl", texts)
    assert preprocess_main(arguments(source, tmp_path / "out", "--valid-fraction", "0.4", "--workers", "1")) == 0
    train, valid = set(read_back(tmp_path / "out_train")), set(read_back(tmp_path / "out_valid"))
    assert train | valid == set(texts)
    assert not train & valid


def test_filters(preprocess_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["short", "long enough to stay", "short too"])
    option = ("--filter", "length:min_characters=10", "--workers", "1")
    assert preprocess_main(arguments(source, tmp_path / "out", *option)) == 0
    assert read_back(tmp_path / "out") == ["long enough to stay"]
    assert "left out 2 documents: length:min_characters=10" in capsys.readouterr().out
    manifest = Corpus(str(tmp_path / "out")).manifest
    assert manifest is not None
    assert manifest.left_out == {"length:min_characters=10": 2}


def test_a_million_empty_documents(preprocess_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": ""}\n' * 500_000 + b'{"text": "one"}\n' + b'{"text": ""}\n' * 500_000)
    assert preprocess_main(arguments(source, tmp_path / "out", "--workers", "2")) == 0
    assert read_back(tmp_path / "out") == ["one"]
    assert "left out 1,000,000 documents: empty" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz"])
def test_a_document_of_200_mb_in_bounded_memory(tmp_path: Path, run_python: RunTool, name: str) -> None:
    """All processes together stay below what the document's ids alone take."""
    line = b"All happy families are alike; every unhappy family is unhappy in its own way. "
    text = line * (200_000_000 // len(line))
    opener = functools.partial(gzip.open, compresslevel=1) if name.endswith(".gz") else open
    with opener(tmp_path / name, "wb") as file:
        file.write(b'{"text": "' + text + b'"}\n' if "jsonl" in name else text)
    result = run_python("-c", PEAK, TOOL, *arguments(tmp_path / name, tmp_path / "out", "--workers", "2"))
    assert result.returncode == 0, result.stderr
    corpus = Corpus(str(tmp_path / "out"))
    assert (len(corpus), corpus.n_tokens) == (1, len(text) + 1)
    ids, step = corpus.document(0), len(line) << 10
    assert all(ids[start : start + 78].tobytes() == ids[:78].tobytes() for start in range(0, len(text), step))
    assert 50e6 < int(result.stdout.splitlines()[-1]) < 400e6


PEAK = """
import psutil, runpy, sys, threading
sys.argv = sys.argv[1:]
peak, stop = 0, threading.Event()

def pss(process):
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0

def watch():
    global peak
    this = psutil.Process()
    while not stop.wait(0.03):
        peak = max(peak, sum(map(pss, [this, *this.children(recursive=True)])))

watcher = threading.Thread(target=watch)
watcher.start()
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    if end.code:
        raise
finally:
    stop.set()
    watcher.join()
print(peak)
"""


def start(call: list[str]) -> subprocess.Popen[str]:
    """The program in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, TOOL, *call],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background has SIGINT ignored, which programs inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.fixture(scope="module")
def mixed_source(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A plain file of several units, a compressed one of several pieces, and small ones: 45 MB of text."""
    folder = tmp_path_factory.mktemp("mixed")
    generator = random.Random(0)
    texts = [generator.randbytes(generator.randrange(500, 1500)).hex() for _ in range(9_000)]
    write_lines(folder / "plain.jsonl", texts)
    with gzip.open(folder / "packed.jsonl.gz", "wt", compresslevel=1) as file:
        file.writelines(json.dumps({"text": text[::-1]}) + "\n" for text in texts * 2)
    for number in range(20):
        (folder / f"{number}.txt").write_text(texts[number][:100])
    return [str(folder / "plain.jsonl"), str(folder)]


def kill_options(inputs: list[str], prefix: Path) -> list[str]:
    return [
        *("--input", *inputs, "--output-prefix", str(prefix), "--tokenizer", "bytes", "--workers", "2"),
        *("--valid-fraction", "0.1", "--shard-size", "30MB"),
    ]


def test_killed_at_20_random_moments(preprocess_main: Main, mixed_source: list[str], tmp_path: Path) -> None:
    """Every time it is started again the job goes on; whenever it ends, the bytes are those of a run never killed."""
    begin = time.monotonic()
    (tmp_path / "never").mkdir()
    (tmp_path / "often").mkdir()
    assert preprocess_main(kill_options(mixed_source, tmp_path / "never" / "out")) == 0
    expected = files_of(tmp_path / "never", "out")
    assert len(expected) > 8
    call, generator = kill_options(mixed_source, tmp_path / "often" / "out"), random.Random(0)
    longest = 1.5 * (time.monotonic() - begin)
    kills = resumed = 0
    while kills < 20:
        process = start(call)
        try:
            process.wait(timeout=generator.uniform(0, longest))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=10)  # ends when the workers, which hold the other ends, have ended too
            kills += 1
            resumed += any((tmp_path / "often" / "out.work" / "pieces").glob("*.json"))
            continue
        assert process.returncode == 0, process.communicate()[1]
        assert files_of(tmp_path / "often", "out") == expected
        for path in (tmp_path / "often").glob("out*.json"):
            path.unlink()
    process = start(call)
    assert process.wait(timeout=60) == 0, process.communicate()[1]
    assert files_of(tmp_path / "often", "out") == expected
    assert resumed >= 3  # some kills found work that the next start went on from


def test_interrupted(preprocess_main: Main, mixed_source: list[str], tmp_path: Path) -> None:
    """Ctrl-C reaches all processes of a terminal: one line, and what is done is kept."""
    process = start(kill_options(mixed_source, tmp_path / "out"))
    pieces = tmp_path / "out.work" / "pieces"
    deadline = time.monotonic() + 30
    while not any(pieces.glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert process.communicate()[1] == "interrupted: what is done is kept; the same command goes on\n"
    assert files_of(tmp_path, "out") == {}
    assert any(pieces.glob("*.json"))
    assert preprocess_main(kill_options(mixed_source, tmp_path / "out")) == 0


def test_two_at_one_output(
    preprocess_main: Main, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with WorkFolder(str(tmp_path / "out")).held():
        assert preprocess_main(arguments(source, tmp_path / "out")) == 2
        assert "out.work: another process is working on it now" in capsys.readouterr().err
    assert preprocess_main(arguments(source, tmp_path / "out")) == 0


def test_from_standard_input(tmp_path: Path, source: Path, documents: list[str]) -> None:
    call = [sys.executable, TOOL, "--input", "-", "--output-prefix", str(tmp_path / "out"), "--tokenizer", "bytes"]
    with gzip.open(tmp_path / "packed", "wb") as file:
        file.write(source.read_bytes())
    for given in (source, tmp_path / "packed"):
        with open(given, "rb") as file:
            subprocess.run(call, stdin=file, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert read_back(tmp_path / "out") == documents


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
