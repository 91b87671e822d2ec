"""Who may race whom, and how time is taken."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import contestants
import numpy as np
import pytest
import torch
from race import (
    RaceError,
    Result,
    Span,
    Standings,
    batches,
    bounded,
    check_same_work,
    execute,
    prepare,
    steady_tokens_per_s,
)

from megamup.config import config_from

LLAMA = {"arch": "llama", "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
GPT = {"arch": "gpt", "d_model": 32, "n_layers": 2, "n_heads": 4}
SIZES = {"vocab_size": 64, "max_seq_len": 16}


def values(model: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {"model": model | SIZES, "batch": {"global_sequences": 4}, "train": {"steps": 3}} | sections


def result(name: str, tokens_per_s: float = 100.0, **changed: Any) -> Result:
    given: dict[str, Any] = {"parameters": 1000, "losses": {1: 5.0, 10: 4.0}} | changed
    return Result(name, "eager", given["parameters"], given["losses"], tokens_per_s, 1.0, Span(10.0, 0.0))


@pytest.mark.parametrize(
    ("model", "sections"),
    [
        (LLAMA, {"mup": {"base": {"d_model": 16, "d_ff": 24, "n_heads": 2, "n_kv_heads": 1}}}),
        (LLAMA | {"tie_embeddings": True}, {}),
        (GPT, {}),
    ],
)
def test_transformers_starts_as_the_bare_loop_does(model: dict[str, Any], sections: dict[str, Any]) -> None:
    """The same loss and the same number of parameters, μP's multipliers folded into the weights."""
    sigma = {"embedding": 0.5, "hidden": 0.2, "residual_out": 0.2, "readout": 0.2}
    mup = sections.get("mup", {}) | {"sigma": sigma}
    config = config_from(values(model, data={"train": "shard"}, mup=mup))
    tokens = torch.randint(SIZES["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(0))
    nets = [contestants.CONTESTANTS[name](config, torch.device("cpu"), "eager") for name in ("bare", "transformers")]
    ours, theirs = (float(net.loss(tokens[:, :-1], tokens[:, 1:]).detach()) for net in nets)
    assert abs(ours - np.log(SIZES["vocab_size"])) > 1e-2  # weights have a say
    assert theirs == pytest.approx(ours, rel=1e-5)
    counts = {sum(parameter.numel() for parameter in net.module.parameters()) for net in nets}
    assert len(counts) == 1


def test_a_contestant_trains_on_the_batches_of_the_run(tmp_path: Path) -> None:
    race = prepare(values(LLAMA), tmp_path, warm=1, threads=1)
    windows = np.load(race.windows)
    assert windows.shape == (3, 4, 17)
    assert (windows == batches(race.config)).all()
    net = contestants.bare(race.config, torch.device("cpu"), "eager")
    timed = contestants.train(net, race.config, windows, 1, torch.device("cpu"))
    assert timed.losses[0] == pytest.approx(np.log(SIZES["vocab_size"]), rel=0.02)
    assert timed.losses[-1] < timed.losses[0]
    assert 0 < timed.seconds < 60


def test_steady_speed_leaves_out_the_first_steps_and_pauses() -> None:
    def record(step: int, time_unix_s: float, **more: float) -> dict[str, float]:
        return {"step": step, "tokens": 100 * step, "time_unix_s": time_unix_s, **more}

    records = [record(1, 50.0), record(10, 100.0, saving_s=7.0), record(20, 105.0, evaluation_s=1.0)]
    records.append(record(30, 112.0, saving_s=2.0))  # a record has the pauses since the one before
    with pytest.raises(RaceError, match="no records at step 15"):
        steady_tokens_per_s(records, 15)
    with pytest.raises(RaceError, match="no records at step 30 and after"):
        steady_tokens_per_s(records, 30)
    assert steady_tokens_per_s(records, 10) == pytest.approx(2000 / 9)


def test_who_does_other_work_voids_the_race() -> None:
    ours = result("megamup")
    check_same_work([ours, result("bare"), result("litgpt", losses={1: 5.0001, 10: 3.0})])
    with pytest.raises(RaceError, match="litgpt has 999 parameters, megamup 1,000"):
        check_same_work([ours, result("litgpt", parameters=999)])
    with pytest.raises(RaceError, match=r"first loss of litgpt is 5\.100000"):
        check_same_work([ours, result("litgpt", losses={1: 5.1})])
    with pytest.raises(RaceError, match=r"step 10: loss 4\.000000 of megamup, 4\.010000 of the bare loop"):
        check_same_work([ours, result("bare", losses={1: 5.0, 10: 4.01})])


def test_ratios_are_taken_within_a_turn(tmp_path: Path) -> None:
    """A machine that is twice as slow in one turn changes medians of speeds, and no ratio."""
    race = prepare(values(LLAMA), tmp_path, warm=1, threads=1)
    turns = [{"megamup": result("megamup", 98 * pace), "bare": result("bare", 100 * pace)} for pace in (1, 0.5, 2)]
    standings = Standings(race, peak_flops=1e9, turns=turns)
    assert standings.ratios("bare") == pytest.approx([0.98] * 3)
    assert standings.missed({"bare": 0.97}) == []
    assert standings.missed({"bare": 0.99}) == ["missed: megamup at 0.980 of bare, expected at least 0.99"]
    assert "| 0.980 (0.980 to 0.980) |" in standings.table()[3]


def test_a_command_that_takes_too_long_takes_its_children_with_it(tmp_path: Path) -> None:
    child = "import time; open('{0}', 'w').write(str(__import__('os').getpid())); time.sleep(60)"
    pid_file = tmp_path / "pid"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child.format(pid_file)!r}])"
    with open(tmp_path / "log", "w") as sink:
        assert bounded([sys.executable, "-c", code], sink, {}, 3.0) is None
    pid = int(pid_file.read_text())
    until = time.monotonic() + 5
    while Path(f"/proc/{pid}/stat").exists() and time.monotonic() < until:
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    assert state.strip()[:1] in ("", "Z")


def test_a_contestant_that_fails_says_why(tmp_path: Path) -> None:
    race = prepare(values(LLAMA), tmp_path, warm=1, threads=1)
    with pytest.raises(RaceError, match=r"(?s)broken: exit code 3.*no such thing"):
        execute(race, "broken", [sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"])
