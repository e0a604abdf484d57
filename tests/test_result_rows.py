import pytest

from hf_spp.cards.result_rows import check_rows, results_table, runs_table
from hf_spp.errors import CardError


def row(dataset="fashion-mnist", method="spp", accuracy=0.775, f1=0.777, **more):
    return {"dataset": dataset, "method": method, "accuracy": accuracy, "f1": f1, **more}


def test_results_table_is_the_papers():
    rows = [
        row(d, m, a, a - 0.004) for d, a in (("CIFAR-10", 0.967), ("CIFAR-100", 0.845)) for m in ("spp", "original")
    ]
    assert results_table([*rows, row("CIFAR-10", "pruning-rank", 0.4882, 0.4653)]) == (
        "| Method | CIFAR-10 | CIFAR-100 |\n"
        "| :--- | ---: | ---: |\n"
        "| Original | 96.70 / 96.30 | 84.50 / 84.10 |\n"
        "| Pruning-Rank | 48.82 / 46.53 | – |\n"
        "| SPP | 96.70 / 96.30 | 84.50 / 84.10 |"
    )


def test_results_table_averages_seeds():
    table = results_table([row(accuracy=0.7, f1=0.5, seed=0), row(accuracy=0.8, f1=0.5, seed=1)])
    assert table.endswith("| SPP | 75.00 ± 7.07 / 50.00 ± 0.00 |")


def test_results_table_separates_models():
    lines = results_table([row(model="a/x"), row(model="b|y"), row()]).split("\n")
    assert lines[0] == "| Model | Method | fashion-mnist |"
    assert lines[2:] == [
        "| a/x | SPP | 77.50 / 77.70 |",
        "| b\\|y | SPP | 77.50 / 77.70 |",
        "| – | SPP | 77.50 / 77.70 |",
    ]


def test_results_table_refuses_nothing():
    with pytest.raises(CardError, match="hold no accuracy"):
        results_table([])


def test_local_paths_do_not_reach_the_table():
    assert "| x | SPP |" in results_table([row(model="/home/someone/x/"), row(model="a/b")])
    with pytest.raises(CardError, match="repeats"):
        results_table([row(model="/a/x"), row(model="/b/x")])


def test_runs_table_has_only_columns_that_rows_fill():
    rows = [row(seed=0, seconds=20.04, max_abs_diff=7e-6), row("a|b", "original", train_samples=None)]
    assert runs_table(rows).split("\n") == [
        "| Data set | Method | Seed | Seconds | Outputs moved by (max) |",
        "| :--- | :--- | ---: | ---: | ---: |",
        "| fashion-mnist | SPP | 0 | 20.0 | 7.0e-06 |",
        "| a\\|b | Original | – | – | – |",
    ]
    assert runs_table([row()]) == ""


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"dataset": "a", "method": "spp"}], "Row 0 of the results lacks accuracy, f1"),
        ([row(accuracy=77.5)], "accuracy 77.5 in row 0"),
        ([row(f1=float("nan"))], "f1 nan"),
        ([row(accuracy=True)], "accuracy True"),
        ([row(accuracy="0.7")], "accuracy '0.7'"),
        ([row(method="SPP")], "method 'SPP' in row 0"),
        ([row(dataset="a\nb")], "dataset in row 0"),
        ([row(dataset="---")], "gives no identifier"),
        ([row(), row(accuracy=0.1)], "Row 1 of the results repeats"),
        ([row("CIFAR 10"), row("cifar-10")], "share the identifier 'cifar-10'"),
    ],
)
def test_rows_are_refused(rows, message):
    with pytest.raises(CardError, match=message):
        check_rows(rows)
