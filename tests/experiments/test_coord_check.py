"""The coordinate check: its figures and verdicts by hand, and that it tells μP from what isn't, in any layout."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megamup import mup
from megamup.cli import load_program
from megamup.config import Config, load_config
from megamup.errors import MegamupError
from megamup.experiments.coord_check import (
    Check,
    Judgement,
    Rms,
    Slopes,
    as_json,
    at_depth,
    at_width,
    check_width,
    ends,
    fit,
    lines,
    mean,
    shrinks_at_init,
    slope,
)
from megamup.experiments.coord_page import figure, html

ROOT = Path(__file__).resolve().parents[2]
MakeConfig = Callable[..., Config]
Found = dict[str, Any]

# --------------------------------------------------------------------------- figures and verdicts


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.0, 0.7, 2.0])
def test_slope_of_a_power_is_exact(power: float) -> None:
    sizes = [64, 128, 192, 512]
    assert slope(sizes, [3.0 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


@pytest.mark.parametrize("broken", [0.0, math.nan, math.inf])
def test_no_slope_through_what_has_no_logarithm(broken: float) -> None:
    for place in range(3):
        values = [1.0, 2.0, 3.0]
        values[place] = broken
        assert slope([1, 2, 4], values) is None


def test_seeds_are_averaged_in_logarithms() -> None:
    runs: list[Rms] = [{"a": [(1.0, 0.0), (2.0, 3.0)]}, {"a": [(4.0, 0.0), (8.0, 12.0)]}]
    assert mean(runs) == {"a": [pytest.approx((2.0, 0.0)), pytest.approx((4.0, 6.0))]}


def test_fit_is_by_module_and_step() -> None:
    rms: dict[int, Rms] = {size: {"a": [(1.0, 0.0), (2.0 / size, 5.0 * size**0.5)]} for size in (64, 128, 256)}
    (found,) = fit(rms, lambda name: (name == "a", "not lazy"))
    assert found.rms == pytest.approx([0, -1])
    assert found.change[0] is None
    assert found.change[1] == pytest.approx(0.5)
    assert (found.judged_at_init, found.judged_change) == (True, "not lazy")


@pytest.mark.parametrize(
    ("judged", "init", "change", "outside"),
    [
        ("flat", 0.1, -0.1, []),
        ("flat", -0.11, 0.0, ["init"]),
        ("flat", 0.0, 0.11, ["change"]),
        ("flat", 0.0, -0.11, ["change"]),
        ("flat", None, None, ["init", "change"]),
        ("not lazy", 0.0, 2.0, []),
        ("not lazy", 0.2, -0.11, ["init", "change"]),
        ("not lazy", 0.0, None, ["change"]),
        ("no", 0.0, -2.0, []),
        ("no", 0.0, None, []),
    ],
)
def test_what_leaves_the_tolerance(
    judged: Judgement, init: float | None, change: float | None, outside: list[str]
) -> None:
    """Only the start's output and the last step's change count; an output that isn't judged has no say."""
    found = Slopes("a", [init, 9.0], [None, change], judged_at_init=True, judged_change=judged)
    assert found.outside(0.1) == outside
    not_judged = Slopes("a", [init, 9.0], [None, change], judged_at_init=False, judged_change=judged)
    assert not_judged.outside(0.1) == [part for part in outside if part != "init"]


@pytest.mark.parametrize(("depth", "half", "last"), [(1, 0, 0), (2, 0, 1), (3, 1, 2), (4, 1, 3), (8, 3, 7)])
def test_blocks_are_compared_half_way_and_last(depth: int, half: int, last: int) -> None:
    outside: Rms = {"embedding.token": [(0.5, 0.0)], "final_norm": [(0.7, 0.0)]}
    blocks: Rms = {f"blocks.{i}{part}": [(float(i), 0.0)] for i in range(depth) for part in ("", ".mlp.down")}
    expected = {f"blocks.half{part}": [(float(half), 0.0)] for part in ("", ".mlp.down")}
    expected |= {f"blocks.last{part}": [(float(last), 0.0)] for part in ("", ".mlp.down")}
    assert ends(outside | blocks) == outside | expected


def test_what_shrinks_at_initialization_by_design(make_config: MakeConfig) -> None:
    plain = make_config()
    assert set(shrinks_at_init(plain, "heads", False)) == {"readout", "moe.router"}
    assert set(shrinks_at_init(plain, "d_head", False)) == {"readout", "moe.router", ".logits"}
    fixed = {f".{part}" for part in ("key", "value", "logits", "core", "output")}
    assert set(shrinks_at_init(plain, "heads", True)) == {"readout", "moe.router"} | fixed
    zero = make_config("mup.zero_init.query=true", "mup.zero_init.residual_out=true")
    starts_at_zero = {".query", ".query_norm", ".logits", ".output", ".down", ".moe"}
    assert set(shrinks_at_init(zero, "heads", False)) == {"readout", "moe.router"} | starts_at_zero


# --------------------------------------------------------------------------- the models


def shape(config: Config) -> tuple[int, ...]:
    model = config.model
    return model.d_model, model.d_ff, model.n_heads, model.n_kv_heads, model.d_head


def test_a_width_grows_heads_or_their_size(make_config: MakeConfig) -> None:
    config = make_config()
    assert shape(config) == (64, 160, 4, 2, 16)
    assert shape(at_width(config, 128)) == (128, 320, 8, 4, 16)
    assert shape(at_width(config, 32)) == (32, 80, 2, 1, 16)
    assert shape(at_width(config, 128, fixed_kv=True)) == (128, 320, 8, 2, 16)
    assert shape(at_width(config, 128, "d_head")) == (128, 320, 4, 2, 32)
    assert at_width(config, 64).model == config.model


def test_the_base_stays_or_is_the_configs_own_model(make_config: MakeConfig) -> None:
    given = make_config()
    assert at_width(given, 128).mup.base == given.mup.base
    assert at_width(given, 128, fixed_kv=True).mup.base.n_kv_heads == 2  # or the table would miss what is fixed
    own = make_config("mup.base.d_model=null", "mup.base.n_heads=null")
    for grow in ("heads", "d_head"):
        base = at_width(own, 128, grow).mup.base
        assert (base.d_model, base.d_ff, base.n_heads, base.n_kv_heads, base.d_head) == shape(own)
    at = mup.ratios(at_width(own, 256))
    assert (at.width["d_model"], at.width["d_ff"], at.width["d_heads"], at.d_head_base) == (4, 4, 4, 16)
    assert at_depth(given, 6).mup.base.n_layers == given.model.n_layers
    assert at_depth(make_config("mup.base.n_layers=3"), 6).mup.base.n_layers == 3
    assert at_depth(given, 6).model.n_layers == 6


@pytest.mark.parametrize(
    ("width", "overrides", "message"),
    [
        (72, (), r"--widths 72: model\.n_heads=4 of d_model=64 would become 4\.5; use widths that keep it whole"),
        (65, (), r"--widths 65: model\.d_ff=160 of d_model=64 would become 162\.5"),
        (16, (), r"--widths 16: model\.n_kv_heads=2 of d_model=64 would become 0\.5"),
        (16, ("model.n_kv_heads=4", "parallel.tensor=2"), r"width 16: model\.n_heads=1 is not divisible by parallel"),
    ],
)
def test_an_impossible_width_is_named(
    make_config: MakeConfig, width: int, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(MegamupError, match=message):
        at_width(make_config(*overrides), width)


def test_an_impossible_width_is_refused_before_anything_is_trained(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megamup.experiments.coord_check.run", lambda *_: pytest.fail("a model was trained"))
    for widths, message in (([64, 128, 72], "--widths 72"), ([64, 64], "--widths 64,64: a slope needs at least two")):
        with pytest.raises(MegamupError, match=message):
            check_width(make_config(), widths)


# --------------------------------------------------------------------------- showing


def test_a_loss_that_diverged_is_not_flat_and_is_still_shown(make_config: MakeConfig) -> None:
    rms: dict[int, Rms] = {
        64: {"a<b>": [(1.0, 0.0), (1.0, 2.0)], "c": [(1.0, 0.0), (1.0, 1.0)]},
        128: {"a<b>": [(1.0, 0.0), (math.inf, math.inf)], "c": [(1.0, 0.0), (1.0, 1.0)]},
    }
    check = Check(make_config(), "width", (64, 128), 0.1, 1, rms, fit(rms, lambda _: (True, "flat")))
    assert not check.flat
    text = list(lines(check))
    assert text[2].endswith("<- change not flat")
    assert text[-1].startswith("mup, tensor=1, pipeline=1: NOT flat: 1 of 2 modules")
    assert strict(json.dumps(as_json(check), allow_nan=False))["rms"]["128"]["a<b>"][1] == [None, None]
    titles = [axes.get_title() for axes in figure(check).axes if axes.get_visible()]
    assert titles == ["a<b>  -", "c  +0.000"]
    assert Words(html(check)).rows["a<b>"][-1] == "change not flat"


class Words(HTMLParser):
    """Cells of a page's rows by their first, and that every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.cells = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "tr":
            self.rows[self.cells[0]] = self.cells[1:]

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def strict(text: str) -> Found:
    """JSON without NaN and infinity."""
    found: Found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return found


# --------------------------------------------------------------------------- tools/coord_check.py


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_program(ROOT / "tools" / "coord_check.py")


Run = Callable[..., tuple[int, Found]]


@pytest.fixture(scope="module")
def check(tool: ModuleType, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``check("a.b=c", ..., "--flag", ...)``: exit code and coord_check.json of the shipped configs; 8 tokens, so few
    that at width 64 they hardly overlap."""

    def run(*arguments: str) -> tuple[int, Found]:
        folder = tmp_path_factory.mktemp("check")
        data = [f"data.train={shards / 'train'}", f"data.valid={shards / 'valid'}", "data.seq_len=8"]
        configs = ["configs/transfer.yaml", "configs/coord_check.yaml"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.cpu_count", lambda: 1)  # a thread a rank: more only wait for each other on so little
            code = tool.main([*configs, *data, *arguments, "--output", str(folder)])
        return code, strict((folder / "coord_check.json").read_text("utf-8")) | {"folder": folder}

    return run


WIDE = ("--widths", "64,128,256", "--steps", "4", "--seeds", "2")
ENDS = ("--widths", "64,256", "--steps", "4", "--tolerance", "0.2")


@pytest.fixture(scope="module")
def one_rank(check: Run) -> tuple[int, Found]:
    return check(*WIDE)


def test_mup_is_flat_and_sp_is_not(check: Run, one_rank: tuple[int, Found]) -> None:
    """The same command but for the parametrization."""
    code, found = one_rank
    assert (code, found["flat"], found["parametrization"]) == (0, True, "mup")
    assert all(not slopes["outside"] for slopes in found["slopes"].values())
    code, found = check("mup.parametrization=sp", *WIDE)
    assert (code, found["flat"], found["parametrization"]) == (1, False, "sp")
    for part in ("attention.value", "mlp.up", "mlp.down"):
        assert found["slopes"][f"blocks.1.{part}"]["change"][-1] > 0.5
    assert found["slopes"]["blocks.1.mlp.down"]["outside"] == ["init", "change"]


def test_tensor_and_pipeline_ranks_have_the_slopes_of_one(check: Run, one_rank: tuple[int, Found]) -> None:
    code, found = check("parallel.tensor=2", "parallel.pipeline=2", *WIDE)
    layout = {"tensor": 2, "pipeline": 2, "context": 1, "sequence": False, "expert": 1}
    assert (code, found["flat"], found["layout"]) == (0, True, layout)
    alone = one_rank[1]["slopes"]
    assert list(found["slopes"]) == list(alone)
    for name, slopes in found["slopes"].items():
        for key in ("rms", "change"):
            assert slopes[key] == pytest.approx(alone[name][key], abs=1e-3), name


def test_output_holds_the_figures_a_picture_and_a_page(one_rank: tuple[int, Found]) -> None:
    _, found = one_rank
    folder: Path = found["folder"]
    assert (found["axis"], found["sizes"], found["steps"], found["seeds"]) == ("width", [64, 128, 256], 4, 2)
    png = (folder / "coord_check.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert width > 600 < height
    (folder / "again.yaml").write_text(found["config"], encoding="utf-8")
    assert load_config([folder / "again.yaml"]).model.d_model == 64
    shown = Words((folder / "coord_check.html").read_text("utf-8")).rows
    for name, slopes in found["slopes"].items():
        init, change, *sizes, verdict = shown[name]
        assert change == f"{slopes['change'][-1]:+.3f}"
        assert init.startswith("(") is not slopes["judged_at_init"]
        assert sizes == [f"{found['rms'][size][name][-1][1]:.3g}" for size in ("64", "128", "256")]
        assert verdict == "flat"


def test_key_heads_that_grow_in_number_are_flat(check: Run) -> None:
    code, found = check("model.n_kv_heads=2", "mup.sigma.hidden=0.006", *ENDS)
    assert code == 0
    assert abs(found["slopes"]["blocks.0.attention.key"]["rms"][0]) < 0.1


def test_key_heads_that_stay_as_few_change_alike(check: Run) -> None:
    """At initialization they shrink by design (megamup/mup.py), so that the learnt part shows at larger widths only."""
    settings = ("model.n_kv_heads=2", "mup.sigma.hidden=0.006", "mup.zero_init.query=false")
    code, found = check(*settings, "--fixed-kv", "--widths", "128,512", "--steps", "6", "--tolerance", "0.2")
    assert code == 0
    key = found["slopes"]["blocks.0.attention.key"]
    assert key["rms"][0] == pytest.approx(-0.5, abs=0.1)
    assert abs(key["change"][-1]) < 0.2


def test_unit_scaled_mup_is_flat_without_a_base(check: Run) -> None:
    defaults = [f"mup.base.{key}=null" for key in ("d_model", "d_ff", "n_heads", "d_head", "n_layers")]
    defaults += [f"mup.sigma.{role}=0.02" for role in ("embedding", "hidden", "residual_out")]
    code, found = check("mup.parametrization=umup", *defaults, "optim.lr=0.1", "--seeds", "2", *ENDS)
    assert (code, found["parametrization"]) == (0, "umup")


def test_depth_is_flat_under_completep_alone(check: Run) -> None:
    small = ["model.d_model=64", "model.n_heads=2", "model.d_ff=128", "data.seq_len=64"]
    small += ["mup.base.d_model=64", "mup.base.n_heads=2", "mup.base.d_ff=128"]
    depths = ("--depths", "2,4,8", "--steps", "4", "--tolerance", "0.15")
    code, found = check(*small, "mup.depth=completep", *depths)
    assert (code, found["axis"], found["sizes"]) == (0, "depth", [2, 4, 8])
    assert {name.split(".")[1] for name in found["slopes"] if name.startswith("blocks.")} == {"half", "last"}
    code, found = check(*small, "mup.depth=none", *depths)
    assert code == 1
    assert found["slopes"]["blocks.last"]["change"][-1] > 0.3


def test_attention_over_the_root_of_d_head_is_found(check: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: heads that grow in size need 1/d_head (Tensor Programs V, definition 4.1)."""
    grow = ("--grow", "d_head", *ENDS)
    assert check(*grow)[0] == 0
    monkeypatch.setattr(mup, "attention_scale", lambda config: config.model.d_head**-0.5)
    code, found = check(*grow)
    assert code == 1
    assert found["slopes"]["blocks.0.attention.logits"]["change"][-1] > 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--widths", "64,128", "--steps", "0"), "--steps 0: expected at least 1"),
        (("--widths", "64,128", "--seeds", "0"), "--seeds 0: expected at least 1"),
        (("--widths", "64,128", "--tolerance", "nan"), "--tolerance nan: expected a positive number"),
        (("--depths", "2,4", "--fixed-kv"), "--grow and --fixed-kv say how a width is filled"),
        (("--depths", "2"), "--depths 2: a slope needs at least two different sizes"),
        (("--widths", "64,72"), "--widths 72: model.n_heads=4 of d_model=64 would become 4.5"),
    ],
)
def test_a_wrong_command_is_one_message(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert tool.main(["configs/transfer.yaml", *arguments]) == 2
    assert f"error: {message}" in capsys.readouterr().err
