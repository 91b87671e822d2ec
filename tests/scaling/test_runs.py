"""Run folders and tables in, and what each bad one is told."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megamup.errors import MegamupError
from megamup.scaling.curves import parse_at, parse_smoothing, smoothed
from megamup.scaling.readers.run_folder import read_metrics
from megamup.scaling.runs import (
    Ladder,
    Point,
    Reading,
    load,
    load_csv,
    load_curves,
    load_holdout,
    load_runs,
    read_curve,
)

MakeRun = Callable[..., Path]


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_run_is_its_last_flops_its_parameters_and_its_last_valid_loss(
    make_run: MakeRun, truth: dict[str, float]
) -> None:
    ladder = load_runs([make_run("small", parameters=2e6)])
    (point,) = ladder.points
    assert point.name == "small"
    assert point.inputs == {
        "N": 2e6,
        "C": pytest.approx(6 * 2e6 * 4e7),
        "D": pytest.approx(4e7),
        "S": 100,
        "B": pytest.approx(4e5),
        "lr": 2e-3,
    }
    expected_loss = truth["a"] * point.inputs["C"] ** truth["b"] + truth["c"]
    assert point.loss == pytest.approx(expected_loss)
    expected = {"flops": "6N", "parameters": "non_embedding", "loss": "valid_loss at the final step"}
    assert ladder.convention.items() >= expected.items()
    assert ladder.convention["ratio"] == "C/(N·D) = 6"


def test_training_loss_is_smoothed_and_says_how(make_run: MakeRun) -> None:
    run = make_run("a")
    ladder = load_runs([run], loss="loss")
    assert ladder.points[0].loss == smoothed(read_curve(run), parse_smoothing("share=0.02")).loss[-1]
    assert ladder.convention["loss"] == (
        "loss at the final step, debiased EMA with a half-life of 0.02 of the tokens seen"
    )


def test_unique_tokens_are_those_of_the_share_of_the_corpus(make_run: MakeRun) -> None:
    (point,) = load_runs([make_run("a", samples={"code": (1000, 1.0)})]).points
    assert point.inputs["U"] == 64_000


def test_unique_tokens_of_a_blend_are_those_seen(make_run: MakeRun) -> None:
    # 2e7 tokens, half of each source: one is repeated, the other isn't used up.
    run = make_run("a", samples={"small": (1000, 1.0), "large": (10**9, 1.0)})
    assert load_runs([run]).points[0].inputs["U"] == pytest.approx(64_000 + 1e7)


def test_a_run_may_be_read_anywhere_on_its_curve(make_run: MakeRun) -> None:
    runs = [make_run("a"), make_run("b", last_step=60)]
    reading = Reading(loss="loss", at=parse_at("tokens=1e7"), smoothing=parse_smoothing("none"))
    ladder = load(runs, (), reading)
    assert [point.inputs["D"] for point in ladder.points] == [1e7, 1e7]
    assert ladder.points[0].inputs["S"] == pytest.approx(50)
    assert ladder.points[0].loss == pytest.approx(read_curve(runs[0]).loss[49])
    assert ladder.convention["loss"] == "loss at 1e+07 tokens, interpolated in log tokens"
    with pytest.raises(MegamupError, match=r"b: --at: step=90 is outside the curve, which goes from 1 to 60"):
        load(runs, (), Reading(loss="loss", at=parse_at("step=90")))


def test_points_of_one_curve_share_their_run(make_run: MakeRun) -> None:
    ladder = load([make_run("a"), make_run("b")], (), Reading(loss="loss", at=parse_at("curve:4")))
    assert [point.name for point in ladder.points[:4]] == ["a 1/4", "a 2/4", "a 3/4", "a 4/4"]
    assert ladder.runs.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert ladder.points[0].inputs["S"] == 20  # the end of warm-up
    assert ladder.points[3].inputs["S"] == 100


def test_the_least_loss_of_a_run_that_overfits(make_run: MakeRun) -> None:
    run = make_run("a")
    with run.joinpath("metrics.jsonl").open("a") as file:
        file.write('{"step": 100, "valid_loss": 9.0}\n')
    (point,) = load([run], (), Reading(at=parse_at("best"))).points
    assert (point.inputs["S"], point.loss < 9) == (50, True)


def test_points_before_the_end_of_a_decaying_rate_are_warned_of(make_run: MakeRun) -> None:
    run, reading = make_run("a", schedule="cosine"), Reading(loss="loss", at=parse_at("fraction=0.5"))
    assert "schedule.kind=cosine" in load([run], (), reading).warnings[0]
    assert load_runs([run]).warnings == ()
    assert load([make_run("b")], (), reading).warnings == ()


def test_whole_curves_come_with_what_is_constant_in_their_runs(make_run: MakeRun) -> None:
    ladder, (curve,) = load_curves([make_run("a", last_step=60)], (), Reading(loss="loss"))
    assert len(curve) == 60
    assert ladder.points[0].loss == curve.loss[-1]
    assert ladder.columns(["N", "B", "lr", "S"]).tolist() == [[1e6, pytest.approx(2e5), 2e-3, 60]]


def test_a_folder_of_runs_stands_for_its_runs(make_run: MakeRun) -> None:
    folder = make_run("b").parent
    make_run("a")
    folder.joinpath("study.journal").write_text("")
    assert [point.name for point in load_runs([folder]).points] == ["a", "b"]


def test_runs_are_kept_by_their_facts(make_run: MakeRun) -> None:
    runs = [make_run("a", schedule="wsd"), make_run("b")]
    reading = Reading(where={"schedule.kind": ("wsd",)})
    assert [point.name for point in load(runs, (), reading).points] == ["a"]
    with pytest.raises(MegamupError, match=r"--where: a has no 'schedule\.kinds'; did you mean 'schedule\.kind'"):
        load(runs, (), Reading(where={"schedule.kinds": ("wsd",)}))
    with pytest.raises(MegamupError, match=r"--exclude, --where: leave none of a, b"):
        load(runs, (), Reading(where={"schedule.kind": ("linear",)}))


def test_total_parameters_are_counted_when_asked(make_run: MakeRun) -> None:
    ladder = load_runs([make_run("a", parameters=1e6)], parameters="total")
    assert ladder.points[0].inputs["N"] == 1.5e6
    assert ladder.convention["parameters"] == "total"


def test_an_evaluation_may_be_on_the_line_of_its_step(make_run: MakeRun) -> None:
    run = make_run("a", valid_loss=False)
    lines = run.joinpath("metrics.jsonl").read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {"valid_loss": 3.25})
    run.joinpath("metrics.jsonl").write_text("\n".join(lines))
    assert load_runs([run]).points[0].loss == 3.25


def test_a_half_written_last_line_is_dropped(make_run: MakeRun) -> None:
    metrics = make_run("a") / "metrics.jsonl"
    whole = read_metrics(metrics)
    with metrics.open("a") as file:
        file.write('{"step": 101, "lo')
    assert read_metrics(metrics) == whole


def test_steps_that_a_resumed_run_wrote_twice_count_once(make_run: MakeRun) -> None:
    metrics = make_run("a") / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join(lines[:60] + lines[40:]))
    assert [record["step"] for record in read_metrics(metrics)] == list(range(1, 101))


def test_a_broken_line_in_the_middle_is_an_error_with_its_line(make_run: MakeRun) -> None:
    metrics = make_run("a") / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    lines[6] = '{"step": 7, "lo'
    metrics.write_text("\n".join(lines))
    with pytest.raises(MegamupError, match=r"metrics\.jsonl:7: .* is no JSON object with a `step`"):
        read_metrics(metrics)


def test_a_curve_is_loss_against_tokens(make_run: MakeRun) -> None:
    curve = read_curve(make_run("a"))
    assert len(curve.tokens) == len(curve.loss) == 100
    assert curve.tokens[-1] == pytest.approx(2e7)


def test_a_run_short_of_its_last_step_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(MegamupError, match=r"short: stopped at step 60 of 100 .* --exclude short"):
        load_runs([make_run("whole"), make_run("short", last_step=60)])


def test_an_excluded_run_is_not_read(make_run: MakeRun) -> None:
    ladder = load_runs([make_run("whole"), make_run("short", last_step=60)], exclude=["short"])
    assert [point.name for point in ladder.points] == ["whole"]


def test_an_excluded_name_that_no_run_has_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(MegamupError, match=r"no run is called 'w128'; did you mean 'w1024'\?; there are w1024"):
        load_runs([make_run("w1024")], exclude=["w128"])


def test_mixed_conventions_are_refused(make_run: MakeRun) -> None:
    with pytest.raises(MegamupError, match=r"convention: flops: a: 6N, b: palm; expected one, .* --convention flops"):
        load_runs([make_run("a"), make_run("b", convention="palm")])


def test_a_run_without_final_evaluation_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(MegamupError, match=r"a: valid_loss is missing .* 100 \(nowhere .* --loss loss"):
        load_runs([make_run("a", valid_loss=False)])
    with pytest.raises(MegamupError, match=r"b: valid_loss is missing .* 120 \(last at step 100\)"):
        load_runs([make_run("b", steps=120)])


def test_a_diverged_run_is_refused(make_run: MakeRun) -> None:
    run = make_run("a")
    with run.joinpath("metrics.jsonl").open("a") as file:
        file.write('{"step": 100, "valid_loss": NaN}\n')
    with pytest.raises(MegamupError, match=r"step 100 \(name a\): valid_loss is nan; expected a finite number above 0"):
        load_runs([run])


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MegamupError, match=r"--runs: .* is no run folder, nor holds any; a run's folder has config"):
        load_runs([tmp_path])


def test_a_run_given_twice_is_refused(make_run: MakeRun) -> None:
    run = make_run("a")
    with pytest.raises(MegamupError, match=r"--runs: .* is given twice"):
        load_runs([run, run.parent / "." / "a"])


def test_two_runs_of_one_name_are_told_apart_by_their_paths(make_run: MakeRun) -> None:
    names = [point.name for point in load_runs([make_run("x/a"), make_run("y/a")]).points]
    assert names[0].endswith("x/a")
    assert names[1].endswith("y/a")


@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
def test_a_missing_file_is_named(make_run: MakeRun, name: str) -> None:
    run = make_run("a")
    run.joinpath(name).unlink()
    with pytest.raises(MegamupError, match=rf"{name}: no such file; expected"):
        load_runs([run])


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "config.yaml",
            "steps: 100",
            "steps: many",
            r"config\.yaml: train\.steps is 'many'; expected a number",
        ),
        ("config.yaml", "steps: 100", "steps: [", r"config\.yaml: is not YAML"),
        ("environment.json", '"6N"', "6", r"flops_convention is 6; expected its name"),
        ("environment.json", "{", "", r"environment\.json: is not JSON"),
        (
            "environment.json",
            '"non_embedding"',
            '"other"',
            r"parameters\.non_embedding is None; expected a number",
        ),
    ],
)
def test_a_bad_file_is_told_what_it_should_hold(make_run: MakeRun, name: str, old: str, new: str, message: str) -> None:
    run = make_run("a")
    replace_text(run / name, old, new)
    with pytest.raises(MegamupError, match=message):
        load_runs([run])


def test_held_out_runs_are_read_as_the_ladder_was(ladder: list[Path]) -> None:
    fitted = load_runs(ladder[:-1], loss="loss", parameters="total")
    (held,) = load_holdout(ladder[-1:], fitted)
    assert held == load_runs(ladder[-1:], loss="loss", parameters="total").points[0]


def test_a_fitted_run_is_not_held_out(ladder: list[Path]) -> None:
    with pytest.raises(MegamupError, match=r"w64 is one of the fitted runs; .* --exclude w64"):
        load_holdout(ladder[:1], load_runs(ladder))


def test_held_out_runs_are_read_at_the_same_moment(ladder: list[Path]) -> None:
    reading = Reading(loss="loss", at=parse_at("fraction=0.5"), smoothing=parse_smoothing("weight=0.9"))
    (held,) = load_holdout(ladder[-1:], load(ladder[:-1], (), reading))
    assert held == load(ladder[-1:], (), reading).points[0]


def test_a_held_out_run_of_another_convention_is_refused(ladder: list[Path], make_run: MakeRun) -> None:
    with pytest.raises(MegamupError, match=r"--holdout: flops: the fitted runs: 6N, held out: palm; expected one"):
        load_holdout([make_run("other", convention="palm")], load_runs(ladder))


def test_runs_and_a_table_are_one_ladder_where_the_table_is_known_to_count_alike(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run, table = make_run("a"), tmp_path / "t.csv"
    table.write_text("name,n,d,flops,loss\nb,1e7,2e8,1.2e16,2.5\n")
    columns = {"name": "name", "N": "n", "D": "d", "C": "flops", "L": "loss"}
    with pytest.raises(MegamupError, match=r"flops: .*t\.csv: as in column flops, a: 6N; expected one"):
        load([run], [table], Reading(columns=columns))
    stated = {"flops": "6N", "parameters": "non_embedding", "loss": "valid_loss at the final step"}
    ladder = load([run], [table], Reading(columns=columns, stated=stated))
    assert [point.name for point in ladder.points] == ["b", "a"]
    assert ladder.convention["ratio"] == "C/(N·D) = 6 (6ND)"
    with pytest.raises(MegamupError, match=r"--convention: flops=palm, but a says '6N'"):
        load([run], [table], Reading(columns=columns, stated=stated | {"flops": "palm"}))


def test_a_ladder_says_what_is_not_known() -> None:
    ladder = Ladder((Point("a", {"N": 1.0, "D": 2.0}, 3.0), Point("b", {"N": 1.0}, 3.0)), {})
    assert ladder.columns(["N"]).tolist() == [[1.0], [1.0]]
    with pytest.raises(MegamupError, match=r"D \(tokens seen\) is not known of b; expected .* --columns D=COLUMN"):
        ladder.columns(["N", "D"])


def test_the_hash_is_of_the_data_and_of_how_it_counts() -> None:
    points = (Point("a", {"N": 1.0, "D": 2.0}, 3.0), Point("b", {"N": 2.0, "D": 2.0}, 2.5))
    ladder = Ladder(points, {"flops": "6N"})
    moved = (Point("b", {"D": 2.0, "N": 2.0}, 2.5, Path("x"), "b"), points[0])
    assert Ladder(moved, {"flops": "6N"}).hash() == ladder.hash()
    assert Ladder(points, {"flops": "palm"}).hash() != ladder.hash()
    assert Ladder((points[0], Point("b", {"N": 2.0, "D": 2.0}, 2.51)), {"flops": "6N"}).hash() != ladder.hash()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "runs.csv"
    path.write_text("run,params,flops,final_loss\na,1e6,1e14,3.0\nb,1e7,1e16,2.5\n")
    return path


def test_csv_columns_are_mapped(table: Path) -> None:
    ladder = load_csv(table, {"name": "run", "N": "params", "C": "flops", "L": "final_loss"})
    assert [point.name for point in ladder.points] == ["a", "b"]
    assert ladder.points[1].inputs == {"N": 1e7, "C": 1e16}
    assert ladder.points[1].loss == 2.5
    assert ladder.convention["flops"] == "as in column flops"


def test_csv_rows_without_a_name_are_called_by_their_line(table: Path) -> None:
    ladder = load_csv(table, {"C": "flops", "L": "final_loss"}, exclude=["row 2"])
    assert [point.name for point in ladder.points] == ["row 3"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"C": "flop", "L": "final_loss"},
            r"C=flop: .* no column 'flop'; did you mean 'flops'\?; it has run, ",
        ),
        ({"C": "flops"}, r"is not enough; expected L=COLUMN and N=COLUMN or C=COLUMN"),
        ({"C": "flops", "loss": "final_loss"}, r"'loss' is unknown; expected L, N, D, C, S, B, U, lr, name, run"),
        ({"C": "run", "L": "final_loss"}, r"runs\.csv:2: run is 'a'; expected a finite number above 0"),
        ({"C": "flops", "L": "final_loss", "name": "nom"}, r"name=nom: .* no column 'nom'"),
    ],
)
def test_csv_columns_that_do_not_fit_are_told_why(table: Path, columns: dict[str, str], message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        load_csv(table, columns)


@pytest.mark.parametrize("value", ["", "abc", "nan", "-1", "0", "inf"])
def test_csv_values_must_be_positive_numbers(table: Path, value: str) -> None:
    replace_text(table, "2.5", value)
    with pytest.raises(MegamupError, match=rf"runs\.csv:3: final_loss is '{value}'; expected a finite number"):
        load_csv(table, {"C": "flops", "L": "final_loss"})


def test_a_short_csv_row_is_told_its_line(table: Path) -> None:
    replace_text(table, "1e16,2.5", "1e16")
    with pytest.raises(MegamupError, match=r"runs\.csv:3: final_loss is None"):
        load_csv(table, {"C": "flops", "L": "final_loss"})


def test_a_missing_csv_is_told(tmp_path: Path) -> None:
    with pytest.raises(MegamupError, match=r"--data: .*none\.csv is no file"):
        load_csv(tmp_path / "none.csv", {"C": "flops", "L": "loss"})
