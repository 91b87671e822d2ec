from collections.abc import Callable
from typing import Any

import numpy as np

from megamup.data.objectives.causal import Causal, Prefix
from megamup.data.objectives.draws import Draws

Make = Callable[..., Any]


def test_inputs_and_targets_are_one_row(make_text: Make, collate_text: Make) -> None:
    objective, text = Causal(16), make_text(16)
    assert objective.width == 17
    columns = collate_text(objective, text)
    assert set(columns) == {"tokens", "targets"}
    assert np.shares_memory(columns["tokens"], columns["targets"])
    assert columns["tokens"][3].tolist() == text.row(3)[:-1].tolist()
    assert columns["targets"][3].tolist() == text.row(3)[1:].tolist()


def test_documents_are_numbered_and_end_with_their_last_token(make_text: Make, collate_text: Make) -> None:
    columns = collate_text(Causal(40, eod_id=0), make_text(40, document=5))
    for tokens, documents in zip(columns["tokens"], columns["documents"], strict=True):
        expected, number = [], 0
        for token in tokens.tolist():
            expected.append(number)
            number += token == 0
        assert documents.tolist() == expected
    assert columns["documents"].max() > 5


def test_past_the_end_nothing_counts(make_text: Make, collate_text: Make) -> None:
    text = make_text(16, samples=3, counted=5)
    columns = collate_text(Causal(16), text, samples=4)
    assert [int((row >= 0).sum()) for row in columns["targets"]] == [16, 16, 5, 0]
    assert columns["targets"][2, :5].tolist() == text.text(2)[:5].tolist()
    assert columns["tokens"][2, :5].tolist() == text.row(2)[:5].tolist(), "all that these targets see"


def test_a_prefix_is_read_but_not_learnt(make_text: Make, collate_text: Make) -> None:
    text = make_text(9)
    columns = collate_text(Prefix(9, Draws("key"), eod_id=0), text, samples=4000)
    first = (columns["targets"] >= 0).argmax(1)
    for row in range(50):
        assert columns["tokens"][row].tolist() == text.row(row)[:-1].tolist()
        assert columns["targets"][row].tolist() == [-1] * first[row] + text.row(row)[1 + first[row] :].tolist()
    counts = np.bincount(first, minlength=9)
    assert counts[8] == 0, "something is learnt of each"
    assert abs(counts[:8] - 500).max() < 100, "prefixes of 1 to 8 tokens, each as likely"
    assert set(columns) == {"tokens", "targets", "documents"}


def test_a_prefix_past_the_end(make_text: Make, collate_text: Make) -> None:
    columns = collate_text(Prefix(16, Draws("key")), make_text(16, samples=1, counted=5), samples=2)
    assert (columns["targets"][0, 5:] == -1).all()
    assert (columns["targets"][1] == -1).all()
