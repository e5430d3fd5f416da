"""lab/errors.py: a planted error is named, and its repair gives back what it cost."""
import pytest
import torch

from lab.errors import KINDS, Errors, mean, table

CATEGORIES = torch.tensor([0, 1, 2, 2, 3])                     # road, sky, two cars, a person
TRUTH = torch.tensor([[1] * 20 + [2] * 10 + [3] * 6 + [4] * 6 + [5] * 8])
PLANTED = {  # pixels from, to, and their new segment; the category of a segment
    "category": ([], {5: 2}),
    "confused": ([(36, 40, 3), (40, 42, 1)], {}),              # a mask for one car and a part
    "split": ([(43, 46, 6), (46, 50, 7)], {6: 3, 7: 3}),       # 7 of the person's 8 pixels, in two
    "cut off": ([(32, 36, 1)], {}),                            # a third of the first car is left
    "boundary": ([(23, 36, 3)], {}),                           # the first car covers the sky
    "missed": ([(42, 50, 1)], {}),
    "void": ([(20, 30, 0)], {}),                               # no sky
    "invented": ([(0, 4, 6)], {6: 3}),
    "none": ([], {}), "crowd": ([(42, 50, 0)], {})}            # void where the person is a crowd


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_error_is_named_and_its_repair_gives_it_back(kind):
    segments, categories = TRUTH.clone(), torch.tensor([*CATEGORIES, 0, 0])
    for start, end, id in PLANTED[kind][0]:
        segments[:, start:end] = id
    for id, category in PLANTED[kind][1].items():
        categories[id - 1] = category
    errors = Errors([False, False, True, True])
    errors.update(segments, categories, TRUTH, CATEGORIES, CATEGORIES // 3 * (kind == "crowd") > 0)
    result = errors.compute()
    gain = {k: result[k]["alone"] for k in KINDS}
    assert {k for k in KINDS if result[k]["count"]} == {kind} & set(KINDS)
    assert sum(result[k]["in turn"] for k in KINDS) == pytest.approx(100 - result["PQ"])
    assert result["left"] == pytest.approx(0) and "cut off" in table(mean([result, result]))
    assert kind not in KINDS or max(gain, key=gain.get) == kind
    assert kind != "boundary" or gain[kind] == (100 + 50) / 4  # no sky; of two cars one is found
