"""lab/errors.py: a planted error is named, and its repair gives back what it cost."""
import pytest
import torch

from lab.errors import KINDS, Errors, mean, table

ISTHING = [False, False, True, True]                           # road, sky, car, person
CATEGORIES = torch.tensor([0, 1, 2, 2, 3])                     # two cars, a person
TRUTH = torch.tensor([[1] * 20 + [2] * 10 + [3] * 6 + [4] * 6 + [5] * 8])

# What is wrong: pixels that change (from, to, id), and categories of ids.
PLANTED = {
    "category": ([], {5: 2}),
    "confused": ([(36, 42, 3)], {}),                           # one mask for both cars
    "split": ([(43, 46, 6), (46, 50, 7)], {6: 3, 7: 3}),       # the person is 7 of 8 pixels in two
    "cut off": ([(32, 36, 1)], {}),                            # a third of the first car is left
    "boundary": ([(30, 31, 0), (20, 22, 1)], {}),              # matched, but not exactly
    "missed": ([(42, 50, 1)], {}),
    "void": ([(20, 30, 0)], {}),                               # no sky
    "invented": ([(0, 4, 6)], {6: 3}),
}


def errors_of(pixels, renamed, truth=TRUTH, crowd=(0, 0, 0, 0, 0)):
    """The result of `Errors` for the truth with these changes."""
    segments = TRUTH.clone()
    for start, end, id in pixels:
        segments[:, start:end] = id
    categories = torch.tensor([*CATEGORIES, 0, 0])
    for id, category in renamed.items():
        categories[id - 1] = category
    errors = Errors(ISTHING)
    errors.update(segments, categories, truth, CATEGORIES, torch.tensor(crowd).bool())
    return errors.compute()


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_error_is_named_and_its_repair_gives_it_back(kind):
    result = errors_of(*PLANTED[kind])
    counted = {k for k in KINDS if result[k]["count"]}
    assert counted - {"boundary"} == {kind} - {"boundary"}     # "boundary" counts unmatched ones
    gain = {k: result[k]["alone"] for k in KINDS}
    assert max(gain, key=gain.get) == kind and gain[kind] > 0
    lost = 100 - result["PQ"]
    assert sum(result[k]["in turn"] for k in KINDS) + result["left"] == pytest.approx(lost)
    assert result["left"] == pytest.approx(0)
    assert kind in table(mean([result, result]))


def test_a_mask_that_is_too_large_is_a_boundary_and_crowds_are_no_errors():
    result = errors_of([(23, 36, 3)], {})                      # the first car covers the sky
    assert result["boundary"]["count"] == 2 and result["boundary"]["alone"] == 37.5
    result = errors_of([(42, 50, 0)], {}, crowd=(0, 0, 0, 0, 1))
    assert all(result[k]["count"] == 0 for k in KINDS) and result["PQ"] == 100


def test_a_perfect_prediction_has_no_error():
    result = errors_of([], {})
    assert result["PQ"] == 100 and result["left"] == 0
    assert all(result[k] == dict.fromkeys(result[k], 0) for k in KINDS)
