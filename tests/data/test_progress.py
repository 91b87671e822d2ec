import io
import re

import pytest

from megamup.data.progress import ByteProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("megamup.data.progress.time.monotonic", lambda: clock[0])
    said = io.StringIO()
    with ByteProgress("tokenizing", 100_000_000, stream=said, interval=10) as progress:
        for _ in range(5):
            clock[0] += 5
            progress.advance(10_000_000)
    assert said.getvalue().splitlines() == [
        "tokenizing: 20.0 of 100.0 MB (20%), 2.0 MB/s, 40 s left",
        "tokenizing: 40.0 of 100.0 MB (40%), 2.0 MB/s, 30 s left",
    ]


def test_bar_on_a_terminal() -> None:
    said = Terminal()
    with ByteProgress("tokenizing", 4_000_000, stream=said) as progress:
        progress.advance(4_000_000)
    assert re.search(r"tokenizing: 100%.*4\.00M/4\.00M", said.getvalue())


def test_what_an_earlier_run_did_has_no_part_in_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("megamup.data.progress.time.monotonic", lambda: clock[0])
    said = io.StringIO()
    with ByteProgress("tokenizing", 100_000_000, stream=said, interval=10) as progress:
        progress.resume(50_000_000)
        clock[0] += 10
        progress.advance(10_000_000)
    assert said.getvalue() == "tokenizing: 60.0 of 100.0 MB (60%), 1.0 MB/s, 40 s left\n"


def test_an_unknown_total(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("megamup.data.progress.time.monotonic", lambda: clock[0])
    said = io.StringIO()
    with ByteProgress("tokenizing", 0, stream=said, interval=10) as progress:
        clock[0] += 10
        progress.advance(10_000_000)
    assert said.getvalue() == "tokenizing: 10.0 MB, 1.0 MB/s\n"
