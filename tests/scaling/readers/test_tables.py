"""Tables in: formats, products of columns, filters, curves of rows, W&B's exports; and published tables."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.curves import parse_at
from megamup.scaling.readers.columns import parse_expression, parse_pairs
from megamup.scaling.readers.conventions import parse_stated
from megamup.scaling.run_arguments import add_run_arguments, read_curves, read_ladder
from megamup.scaling.runs import Ladder, Reading, load, load_csv

NDC = {"N": "n", "D": "d", "C": "c", "L": "loss"}


def arguments(*given: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    return parser.parse_args([str(word) for word in given])


def ladder_of(*given: str | Path) -> Ladder:
    return read_ladder(arguments(*given))


def write_ndc(path: Path, factor: float, n: str = "n") -> Path:
    """Ten points of C = factor·N·D."""
    sizes = 1e6 * 2.0 ** np.arange(10)
    lines = [f"{size},{20 * size},{factor * 20 * size**2},{2 + size**-0.2}" for size in sizes]
    path.write_text("\n".join([f"{n},d,c,loss", *lines]) + "\n")
    return path


def test_csv_tabs_json_lines_and_a_json_list_are_the_same(tmp_path: Path) -> None:
    rows = [{"n": 1e6, "loss": 3.0}, {"n": 2e6, "loss": 2.5}]
    texts = {
        "a.csv": "n,loss\n1e6,3.0\n2e6,2.5\n",
        "a.tsv": "n\tloss\n1e6\t3.0\n2e6\t2.5\n",
        "a.txt": "\n".join(json.dumps(row) for row in rows),
        "a.json": json.dumps(rows),
    }
    for name, text in texts.items():
        tmp_path.joinpath(name).write_text(text)
    points = [load_csv(tmp_path / name, {"N": "n", "L": "loss"}).points for name in texts]
    assert [[(p.inputs, p.loss) for p in found] for found in points] == [[({"N": 1e6}, 3.0), ({"N": 2e6}, 2.5)]] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"n": 1, "loss": 2}\n{"n": 1, \n', r"t:2: .* is not JSON"),
        ("[1, 2]", r"t, entry 1: '1' is no JSON object"),
        ('{"n": 1, "loss": 2}\n{"n": 1}\n', r"t:2: loss is None; expected a finite number above 0"),
        ("n,loss\n", r"t holds no row"),
        ("", r"t holds no row"),
        ("n,n,loss\n1,2,3\n", r"t has two columns 'n'"),
    ],
)
def test_a_broken_table_is_told_where(tmp_path: Path, text: str, message: str) -> None:
    tmp_path.joinpath("t").write_text(text)
    with pytest.raises(MegamupError, match=message):
        load_csv(tmp_path / "t", {"N": "n", "L": "loss"})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n", 2.0),
        ("20*m*n", 120.0),
        ("1e9 * m / n", 1.5e9),
        ("1/n", 0.5),
        ("train/loss", 5.0),  # a name, as it is one
        ("train/loss/n", 2.5),
        ("7", 7.0),
    ],
)
def test_a_value_may_be_a_product(text: str, value: float) -> None:
    scope = {"n": 2.0, "m": 3.0, "train/loss": 5.0}
    assert parse_expression("D", text, list(scope), "t").value(scope, "t:1") == value


@pytest.mark.parametrize("text", ["n+m", "n**m", "n*", "*n", "n*x", "-1*n", "n*inf", "n*(m)"])
def test_a_value_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(MegamupError, match=r"--columns: D=.*: t has no column .*; it has n, m"):
        parse_expression("D", text, ["n", "m"], "t")


def test_pairs_may_hold_commas_and_stand_in_several_options() -> None:
    assert parse_pairs(["L=a, b,N=c=d", "D=e"], "--columns", "") == {"L": "a, b", "N": "c=d", "D": "e"}
    with pytest.raises(MegamupError, match=r"--columns: L is given twice, a and b"):
        parse_pairs(["L=a", "L=b"], "--columns", "L=loss")
    with pytest.raises(MegamupError, match=r"--columns: 'L' is no KEY=VALUE; expected such as L=loss"):
        parse_pairs(["L"], "--columns", "L=loss")


@pytest.mark.parametrize(("factor", "stated"), [(6.0, "C/(N·D) = 6 (6ND)"), (8.0, "C/(N·D) = 8 (not 6ND")])
def test_the_ratio_of_flops_to_size_and_tokens_is_stated(tmp_path: Path, factor: float, stated: str) -> None:
    assert load_csv(write_ndc(tmp_path / "t.csv", factor), NDC).convention["ratio"].startswith(stated)


def test_forward_flops_for_all_of_training_are_refused(tmp_path: Path) -> None:
    table = write_ndc(tmp_path / "t.csv", 2.1)
    with pytest.raises(MegamupError, match=r"C/\(N·D\) = 2.1: C looks like 2·N·D, forward only; .* C=3\*COLUMN"):
        load_csv(table, NDC)
    assert load_csv(table, NDC | {"C": "3*c"}).convention["ratio"].startswith("C/(N·D) = 6.3")


def test_units_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MegamupError, match=r"C/\(N·D\) = 6e-15: less than the forward pass takes"):
        load_csv(write_ndc(tmp_path / "t.csv", 6e-15), NDC)


def test_a_convention_that_the_figures_contradict_is_refused(tmp_path: Path) -> None:
    table = write_ndc(tmp_path / "t.csv", 8.0)
    with pytest.raises(MegamupError, match=r"--convention: flops=6N, but C/\(N·D\) = 8; expected 6"):
        load((), [table], Reading(columns=NDC, stated={"flops": "6N"}))
    assert load((), [table], Reading(columns=NDC, stated={"flops": "palm"})).convention["flops"] == "palm"
    with pytest.raises(
        MegamupError, match=r"--convention: flops=palms: unknown; did you mean 'palm'\?; expected one of"
    ):
        parse_stated(["flops=palms"])
    with pytest.raises(MegamupError, match=r"--convention: 'flop' is unknown; did you mean 'flops'"):
        parse_stated(["flop=6N"])


def test_tables_of_different_columns_are_no_ladder(tmp_path: Path) -> None:
    tables = [write_ndc(tmp_path / "a.csv", 6), write_ndc(tmp_path / "b.csv", 6)]
    assert len(load((), tables, Reading(columns=NDC))) == 20
    with pytest.raises(MegamupError, match=r"b\.csv has no column 'n'"):
        load((), [tables[0], write_ndc(tmp_path / "b.csv", 6, n="m")], Reading(columns=NDC))


@pytest.fixture
def curves(tmp_path: Path) -> Path:
    """Two runs of five rows each, and one of another kind."""
    path = tmp_path / "curves.csv"
    lines = [
        f"{run},{n},{d * 1e6},{loss - d / 10}" for run, n, loss in (("a", 1e6, 4), ("b", 2e6, 3)) for d in range(1, 6)
    ]
    path.write_text("run,n,tokens,loss\n" + "\n".join([*lines, "x,1e6,1e6,9.0"]) + "\n")
    return path


OF_RUNS = "run=run,L=loss,N=n,D=tokens"


def test_rows_of_one_run_are_points_that_share_it(curves: Path) -> None:
    ladder = ladder_of("--data", curves, "--columns", OF_RUNS, "--exclude", "x")
    assert ladder.runs.tolist() == [0] * 5 + [1] * 5
    assert ladder.points[0].name == "row 2"


def test_rows_of_one_run_are_its_curve_where_a_moment_is_asked_for(curves: Path) -> None:
    ladder = ladder_of("--data", curves, "--columns", OF_RUNS, "--where", "run=a,b", "--at", "tokens=2e6")
    assert [point.name for point in ladder.points] == ["a", "b"]
    assert ladder.losses == pytest.approx([3.8, 2.8])
    assert ladder.convention["loss"] == "as in column loss at 2e+06 tokens, interpolated in log tokens"
    found = read_curves(arguments("--data", curves, "--columns", OF_RUNS, "--where", "run=b"))
    assert [(point.inputs["N"], curve.loss.tolist()) for point, curve in found] == [
        (2e6, pytest.approx([2.9, 2.8, 2.7, 2.6, 2.5]))
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--columns", "L=loss,D=tokens", "--at", "final"), r"single points; .* --columns run=COLUMN"),
        (("--columns", "run=run,L=loss,N=n", "--at", "final"), r"D is missing; expected the tokens at every row"),
        (("--columns", "name=run,L=loss,N=n"), r"column run \(.* told by run=run instead\): 'a' is given twice"),
        (("--columns", OF_RUNS, "--where", "runn=a"), r"--where runn: .* no column 'runn'; did you mean 'run'"),
        (("--columns", OF_RUNS, "--where", "run=c"), r"no row of .* has .*; expected one at least: run is a, b, x"),
        (("--columns", OF_RUNS, "--where", "run"), r"--where: 'run' is no COLUMN=VALUE"),
        (("--columns", OF_RUNS, "--exclude", "c"), r"--exclude: no run is called 'c'"),
        ((), r"--columns: missing; --data needs its columns named"),
    ],
)
def test_what_a_table_cannot_give_is_told(curves: Path, given: tuple[str, ...], message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        ladder_of("--data", curves, *given)
    with pytest.raises(MegamupError, match=r"--runs, --data: both missing"):
        ladder_of()


def test_a_chart_that_wandb_exported_is_a_curve_for_each_run(tmp_path: Path) -> None:
    chart, runs = tmp_path / "chart.csv", tmp_path / "runs.csv"
    header = '"Step","a - 1 - train/loss","a - 1 - train/loss__MIN","a - 1 - train/loss__MAX","b - train/loss"'
    chart.write_text(header + '\n"10","3.5","3.5","3.5",""\n"20","3.0","3.0","3.0","2.9"\n"30","","","","2.8"\n')
    runs.write_text('"Name","State","params"\n"a - 1","finished","1000"\n"b","finished","2000"\n')
    columns = "L=train/loss,D=step*512,N=params"
    ladder = ladder_of("--data", chart, "--facts", runs, "--columns", columns)
    assert [(p.name, p.loss, p.inputs["N"], p.inputs["D"]) for p in ladder.points] == [
        ("a - 1", 3.0, 1000, 20 * 512),
        ("b", 2.8, 2000, 30 * 512),
    ]


def test_a_history_that_wandb_exported_has_empty_cells(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    rows = [{"run": run, "_step": step, "tokens": step * 512, "loss": 3.0} for run in "ab" for step in (1, 2)]
    rows[1]["eval"] = rows[3]["eval"] = 2.5
    path.write_text("\n".join(json.dumps({"eval": None} | row) for row in rows))
    ladder = ladder_of("--data", path, "--columns", "run=run,L=eval,S=_step,N=1e6")
    assert [(p.name, p.loss, p.inputs["S"], p.inputs["D"]) for p in ladder.points] == [
        ("a", 2.5, 2, 1024),
        ("b", 2.5, 2, 1024),
    ]
    with pytest.raises(MegamupError, match=r"run=runs: .* no column 'runs'; did you mean 'run'"):
        ladder_of("--data", path, "--columns", "run=runs,L=eval")
    columns = "run=run,L=eval,S=_step,N=1e6"
    assert [p.name for p in ladder_of("--data", path, "--columns", columns, "--where", "run=b").points] == ["b"]


def test_steps_of_a_history_are_the_trainers_own_only_where_all_records_have_them(tmp_path: Path) -> None:
    path, columns = tmp_path / "h.csv", "L=loss,D=tokens"
    path.write_text("_step,step,tokens,loss\n9,4,4096,3.5\n10,5,5120,3.0\n2,1,1024,4\n")
    assert ladder_of("--data", path, "--columns", columns).points[0].inputs["S"] == 5
    path.write_text("_step,step,tokens,loss\n9,4,4096,3.5\n10,,5120,3.0\n2,1,1024,4\n")
    assert ladder_of("--data", path, "--columns", columns).points[0].inputs["S"] == 10


def test_the_104_runs_of_gadre_et_al(published: Path) -> None:
    table = published / "gadre_overtraining" / "models_104.csv"
    columns = "name=name,L=loss_c4_val,N=N,D=20*chinchilla_multiplier*N,C=6*N*D"
    ladder = ladder_of("--data", table, "--columns", columns, "--where", "train_dataset=rpj")
    assert len(ladder) == 35
    assert ladder.convention["ratio"] == "C/(N·D) = 6 (6ND)"
    with pytest.raises(MegamupError, match="forward only"):
        ladder_of("--data", table, "--columns", columns.replace("6*N*D", "2*N*D"))


def test_the_curves_of_gemstones(published: Path) -> None:
    table = published / "gemstones" / "wandb_df_for_fitting_hot.jsonl"
    columns = "run=run_name,L=final_loss,N=params_active_precise,D=tokens,S=step"
    ladder = ladder_of("--data", table, "--columns", columns)
    assert (len(ladder), ladder.runs.max() + 1) == (220, 22)
    assert len(load((), [table], Reading(columns=parse_pairs([columns], "", ""), at=parse_at("curve:5")))) == 110


def test_the_ladder_of_olmo(published: Path) -> None:
    folder, columns = published / "olmo_ladder", "L=c4_en,N=N,D=D,C=flops"
    given = ("--where", "size=190M,370M,760M,1B", "--exclude", "190M-0.5xC")
    final = ladder_of("--data", folder / "ladder_losses_final.csv", "--columns", f"name=run,{columns}", *given)
    ends = ladder_of(
        "--data", folder / "ladder_losses_all.csv", "--columns", f"run=run,{columns}", *given, "--at", "final"
    )
    assert final.sorted_by("C").losses.tolist() == ends.sorted_by("C").losses.tolist()


def test_forward_only_flops_among_others_are_refused(tmp_path: Path) -> None:
    """Rows counted as 2·N·D and rows counted as 6·N·D in one table are two conventions."""
    table = tmp_path / "t.csv"
    rows = [f"{n},{20 * n},{(2, 6)[i % 2] * 20 * n * n},{4 - 0.2 * i}" for i, n in enumerate((1e6, 3e6, 1e7, 3e7, 1e8))]
    table.write_text("n,d,c,loss\n" + "\n".join(rows))
    with pytest.raises(MegamupError, match=r"forward only, in 3 of 5 points and like more in others"):
        load_csv(table, NDC)
