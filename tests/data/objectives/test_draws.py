import numpy as np

from megamup.data.objectives.draws import Draws


def test_numbers_are_uniform_and_independent_of_their_neighbours() -> None:
    numbers = Draws("key").uniform("purpose", np.arange(400), 256)
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    counts = np.histogram(numbers, 64, (0, 1))[0]
    expected = numbers.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 103  # chi-square of 63 degrees, 99.9%
    for other in (numbers[1:, :], np.roll(numbers, 1, 0)[1:, 1:]):  # samples beside each other, and diagonally
        assert abs(np.corrcoef(numbers[: len(other), : other.shape[1]].ravel(), other.ravel())[0, 1]) < 0.012
    assert abs(np.corrcoef(numbers[:, 1:].ravel(), numbers[:, :-1].ravel())[0, 1]) < 0.012


def test_numbers_are_functions_of_key_purpose_sample_and_place() -> None:
    draws = Draws("key")
    many = draws.bits("a", np.arange(10**12, 10**12 + 50), 20)
    assert (draws.bits("a", np.array([10**12 + 7]), 5)[0] == many[7, :5]).all()
    assert (Draws("key").bits("a", np.arange(10**12, 10**12 + 50), 20) == many).all()
    assert (draws.bits("b", np.arange(10**12, 10**12 + 50), 20) != many).all()
    assert (Draws("other").bits("a", np.arange(10**12, 10**12 + 50), 20) != many).all()


def test_numbers_stay_what_they_were() -> None:
    """Others would change what a run that is resumed reads."""
    assert Draws("seed 1234").bits("order", np.array([0, 10**9]), 2).tolist() == [
        [17403160919807668592, 10072644674165210335],
        [9161908008908938195, 2116803053632718814],
    ]


def test_below() -> None:
    found = Draws("key").below("purpose", np.arange(3000), 7, 3)
    assert found.shape == (3000, 3)
    assert set(found.ravel().tolist()) == set(range(7))
    assert abs(np.bincount(found.ravel()) - 9000 / 7).max() < 150
