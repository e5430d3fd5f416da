"""The spec of ibs.py: pairs of crops, and the loss that asks things of one crop to be nowhere in the other.  Oracles: plain loops,
values computed by hand, counts over thousands of draws."""
import collections
import math

import pytest
import torch
from torch.utils.data import DataLoader

import ibs
from data import Category, Sample

IDS = torch.tensor([5, 5, 7, 5, 9, 7])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --- 4.1 Whose features? ------------------------------------------------------------------------------------------------

def test_no_crop_is_its_own_target_nor_one_of_the_same_image():
    """4.1: "each object instance only occurs in one crop", over 2000 draws; and every allowed pair is drawn equally often."""
    counts, g = collections.Counter(), seeded(0)
    for _ in range(2000):
        for i, t in enumerate(ibs.pick_targets(IDS, g).tolist()):
            assert 0 <= t != i and IDS[t] != IDS[i]
            counts[i, t] += 1
    allowed = [(i, t) for i in range(6) for t in range(6) if IDS[i] != IDS[t]]
    assert set(counts) == set(allowed)
    for i, t in allowed:
        n = sum(a == i for a, _ in allowed)
        assert abs(counts[i, t] - 2000 / n) < 5 * math.sqrt(2000 / n * (1 - 1 / n))      # five standard deviations


def test_crops_without_another_image_have_no_target():
    """4.1, degenerate: a batch of one, a batch of one image, no batch."""
    assert ibs.pick_targets(torch.tensor([3])).tolist() == [-1]
    assert ibs.pick_targets(torch.tensor([3, 3, 3])).tolist() == [-1] * 3
    assert ibs.pick_targets(torch.zeros(0, dtype=torch.int64)).tolist() == []
    assert ibs.pick_targets(torch.tensor([3, 3, 4]))[:2].tolist() == [2, 2]


def test_pairs_of_the_sampler_are_each_others_targets():
    """4.2: "we then make sure that IBS is applied between the crops that contain different segments of the same class"."""
    assert ibs.pick_targets(torch.tensor([1, 2, 3, 4, 5, 6]), paired=True).tolist() == [1, 0, 3, 2, 5, 4]
    assert ibs.pick_targets(torch.tensor([1, 2, 4, 4, 5]), paired=True).tolist() == [1, 0, -1, -1, -1]


def test_targets_follow_their_generator():
    many = torch.arange(50)
    assert torch.equal(ibs.pick_targets(many, seeded(1)), ibs.pick_targets(many, seeded(1)))
    assert not torch.equal(ibs.pick_targets(many, seeded(1)), ibs.pick_targets(many, seeded(2)))


# --- 4.1 The loss -------------------------------------------------------------------------------------------------------

def constant(logit, n=3, c=4):
    """Embeddings and features of two crops whose products are `logit` everywhere."""
    return [torch.full((n, c), logit / c)] * 2, torch.ones(2, c, 5, 6), [torch.ones(n, dtype=torch.bool)] * 2


@pytest.mark.parametrize("alpha, gamma", [(.25, 2.), (.5, 0.), (.1, 3.)])
def test_the_loss_is_the_focal_loss_towards_nowhere(alpha, gamma):
    """4.1: mask by mask and pixel by pixel, -(1 - α) p^γ log(1 - p)."""
    g, counts = seeded(3), (3, 0, 2)
    E = [torch.randn(n, 4, generator=g, dtype=torch.float64) for n in counts]
    features = torch.randn(3, 4, 2, 3, generator=g, dtype=torch.float64)
    thing, targets = [torch.tensor([True, False, True]), torch.zeros(0, dtype=torch.bool), torch.tensor([True, True])], torch.tensor([2, 0, 1])
    each = []
    for i in range(3):
        for n in range(counts[i]):
            if thing[i][n]:
                pixels = []
                for y in range(2):
                    for x in range(3):
                        z = sum(float(E[i][n, c] * features[targets[i], c, y, x]) for c in range(4))
                        p = 1 / (1 + math.exp(-z))
                        pixels.append(-(1 - alpha) * p**gamma * math.log(1 - p))
                each.append(sum(pixels) / 6)
    assert ibs.ibs_loss(E, features, thing, targets, alpha, gamma).item() == pytest.approx(sum(each) / len(each), rel=1e-5)


def test_the_loss_at_minus_ten_at_zero_and_at_ten():
    """4.1: nothing where all is dark, .75 * .25 * log 2 at 0, the logit itself where a mask is sure of itself."""
    targets = torch.tensor([1, 0])
    at = {z: ibs.ibs_loss(*constant(z), targets).item() for z in (-10., 0., 10.)}
    assert 0 < at[-10.] < 1e-11 and at[0.] == pytest.approx(.75 * .25 * math.log(2), rel=1e-5) and at[10.] == pytest.approx(7.5, rel=1e-3)


def test_a_planted_confusion_costs_and_its_gradient_takes_both_sides_apart():
    """4.1: embedding 0 of crop 0 lights up half of crop 1."""
    E = [torch.tensor([[6., 0.], [0., -6.]], requires_grad=True), torch.tensor([[0., -6.]], requires_grad=True)]
    features = torch.zeros(2, 2, 4, 8)
    features[:, 1], features[:, 0] = 1, -1
    features[1, 0, :, :4] = 1
    features.requires_grad_()
    thing = [torch.tensor([True, True]), torch.tensor([True])]
    loss = ibs.ibs_loss(E, features, thing, torch.tensor([1, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(.75 * 6 / 2 / 3, rel=2e-2)
    assert E[0].grad[0, 0] > 0 and E[0].grad[0].abs().sum() > 100 * E[0].grad[1].abs().sum()
    assert (features.grad[1, 0, :, :4] > 0).all() and features.grad[1, :, :, 4:].abs().max() < 1e-3 * features.grad[1, 0, :, :4].min()


def test_stuff_is_ignored():
    """4.1: road is in every crop, and its mask is not empty anywhere."""
    E, features, thing = constant(10.)
    E = [torch.cat([torch.full((1, 4), -2.5), e]) for e in E]
    assert ibs.ibs_loss(E, features, [torch.tensor([True] + [False] * 3)] * 2, torch.tensor([1, 0])).item() < 1e-11


@pytest.mark.parametrize("case", ["no pair", "no things", "nothing"])
def test_nothing_to_confuse_is_zero_with_gradients(case):
    """4.1, degenerate: a batch of one picture; crops without things; crops without anything."""
    E, features, thing = constant(10., n=0 if case == "nothing" else 3)
    E, features = [e.clone().requires_grad_() for e in E], features.requires_grad_()
    loss = ibs.ibs_loss(E, features, thing if case == "no pair" else [t & False for t in thing], torch.tensor([-1, -1] if case == "no pair" else [1, 0]))
    loss.backward()
    assert loss.item() == 0 and all(e.grad is not None and not e.grad.any() for e in E) and not features.grad.any()


def test_the_weight_of_a_mask_depends_neither_on_its_size_nor_on_its_crop():
    """Choice: mean over pixels, then over all masks of the batch."""
    E, features, thing = constant(0.)
    some = [thing[0], torch.tensor([True, False, False])]
    for f in (features, features.repeat(1, 1, 3, 2)):
        assert ibs.ibs_loss(E, f, some, torch.tensor([1, 0])).item() == pytest.approx(.75 * .25 * math.log(2), rel=1e-5)
    E = [E[0], torch.full((3, 4), -2.5)]                                       # three masks at .13, one at 0
    assert ibs.ibs_loss(E, features, some, torch.tensor([1, 0])).item() == pytest.approx(.75 * .75 * .25 * math.log(2), rel=1e-5)


# --- 4.2 Crop sampling --------------------------------------------------------------------------------------------------

class Rectangles:
    """Pictures of rectangles: road everywhere, cars and a person here and there; one crowd of cars; one picture of a bus only."""
    categories = [Category("road", False, (0, 0, 0)), Category("car", True, (0, 0, 1)), Category("person", True, (1, 0, 0)), Category("bus", True, (1, 1, 0))]

    def __init__(self, count=12):
        self.samples = []
        for i in range(count):
            g = seeded(i)
            segments, kinds, crowd = torch.ones(90, 120, dtype=torch.int64), [0], [False]
            for k, kind in enumerate([1, 1, 2, 1] if i else [3]):
                h, w = 6 + int(torch.randint(20, (), generator=g)), 6 + int(torch.randint(30, (), generator=g))
                y, x = 22 * k + int(torch.randint(22 - min(h, 21), (), generator=g)), int(torch.randint(120 - w, (), generator=g))
                segments[y:min(y + h, 22 * (k + 1)), x:x + w] = k + 2
                kinds.append(kind), crowd.append(i > 0 and k == 3)
            self.samples.append(Sample(torch.rand(3, 90, 120, generator=g), segments, torch.tensor(kinds), torch.tensor(crowd), str(i)))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]

    def labels(self, i):
        return self.samples[i].segments, self.samples[i].categories, self.samples[i].crowd


DATA = Rectangles()


def test_pairs_show_one_category_of_two_images_whole_where_it_fits():
    """4.2, steps 1, 2, 3, 5, over 600 pairs: things, of two pictures, no crowd, no class of one picture; visible, and whole if
    they fit the crop."""
    sampler, seen, whole = ibs.PairedCropSampler(DATA, (48, 64), seed=1), collections.Counter(), 0
    for k in range(600):
        pair = sampler.pair(k)
        (_, a), (_, b) = pair
        assert a.image_id != b.image_id and len(pair) == 2
        kinds = {int(t.categories[t.instance - 1]) for _, t in pair}
        assert len(kinds) == 1 and kinds <= {1, 2}
        seen[kinds.pop()] += 1
        for image, t in pair:
            assert image.shape == (3, 48, 64) and t.instance > 0 and (t.segments == t.instance).any()
            assert not t.crowd[t.instance - 1]
            x1, y1, x2, y2 = t.full_boxes[t.instance - 1].tolist()
            if x2 - x1 <= 62 and y2 - y1 <= 46:
                whole += 1
                assert not t.truncated[t.instance - 1].any()
    assert abs(seen[1] - 300) < 62 and whole > 900                             # uniform in classes, whatever their number


def test_the_segments_of_a_pair_have_a_similar_size():
    """4.2, step 4: square roots of the areas before cropping within 10% where no limit acts; and all within the limits."""
    sampler, free = ibs.PairedCropSampler(DATA, (48, 64), s0=180, scale=(.5, 2.), seed=2), 0
    for k in range(300):
        lengths, areas = [], []
        for _, t in sampler.pair(k):
            s = DATA[t.image_id]
            assert .5 - 1e-9 <= t.scale <= 2 + 1e-9
            # who was chosen?  A segment of its category whose box, resized, is the target's full box
            size = [round(n * 2 * t.scale) for n in s.segments.shape]
            f = t.full_boxes[t.instance - 1]
            match = [n for n in range(1, len(s.categories) + 1) if s.categories[n - 1] == t.categories[t.instance - 1]
                     and ((lambda ys, xs: abs((xs.max() - xs.min() + 1) * size[1] / 120 - (f[2] - f[0])) < 2 and
                           abs((ys.max() - ys.min() + 1) * size[0] / 90 - (f[3] - f[1])) < 2)(*torch.where(s.segments == n)))]
            areas.append([int((s.segments == n).sum()) ** .5 * 2 for n in match])
            lengths.append([a * t.scale for a in areas[-1]])
            assert match
        if all(len(v) == 1 for v in lengths):
            (a,), (b,) = lengths
            (low,), (high,) = sorted(areas)
            if high * .5 <= low * 2:
                free += 1
                assert max(a, b) / min(a, b) < 1.1
            else:
                assert max(a, b) / min(a, b) == pytest.approx(high * .5 / (low * 2), rel=1e-6)
    assert free > 100


@pytest.mark.parametrize("first, second", [(10., 30.), (30., 10.), (20., 20.), (10., 41.), (41., 10.)])
def test_common_size_is_uniform_among_what_both_can_reach(first, second):
    """4.2, step 4: equal lengths if the limits allow it; else the ends that bring them closest."""
    g, lengths = seeded(0), []
    for _ in range(2000):
        s, t = ibs.common_size(first, second, (.5, 2.), g)
        assert .5 - 1e-12 <= min(s, t) and max(s, t) <= 2 + 1e-12
        lengths.append((first * s, second * t))
    a, b = torch.tensor(lengths, dtype=torch.float64).T
    lo, hi = max(first, second) / 2, min(first, second) * 2
    if lo > hi:
        assert {round(v, 6) for v in a.tolist() + b.tolist()} == {lo, hi} and len(set(lengths)) == 1
    else:
        assert torch.allclose(a, b) and a.mean().item() == pytest.approx((lo + hi) / 2, rel=.03)
        assert a.min() < lo + .02 * (hi - lo) and a.max() > hi - .02 * (hi - lo)


def test_a_pair_depends_on_seed_and_number_alone_and_stays_whole_with_workers_and_ranks():
    """4.2: pairs share a batch and a process; a resumed run goes on exactly; two ranks share the pairs out."""
    def of(**how):
        return ibs.PairedCropSampler(DATA, (32, 32), **how)

    def numbers(sampler, workers, n):
        loader = iter(DataLoader(sampler, batch_size=None, num_workers=workers, generator=seeded(0)))
        return [torch.cat([image for image, _ in next(loader)]) for _ in range(n)]
    plain = [torch.cat([image for image, _ in of(seed=3).pair(k)]) for k in range(8)]
    for workers in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(numbers(of(seed=3), workers, 6), plain))
        assert all(torch.equal(a, b) for a, b in zip(numbers(of(seed=3, start=2, rank=1, world=2), workers, 3), plain[3::2]))
    assert not torch.equal(torch.cat([image for image, _ in of(seed=4).pair(0)]), plain[0])


def test_mirrored_crops_contain_their_segment_too():
    """4.2, step 5."""
    for flip in (0., 1.):
        sampler = ibs.PairedCropSampler(DATA, (40, 40), flip=flip, seed=5)
        for k in range(60):
            for image, t in sampler.pair(k):
                assert (t.segments == t.instance).any()


def test_what_cannot_make_pairs_says_so():
    class Alone(Rectangles):
        def __init__(self):
            super().__init__(2)                                                # cars and persons in one picture, a bus in the other
    with pytest.raises(ValueError, match="two pictures"):
        ibs.PairedCropSampler(Alone(), (32, 32))
    with pytest.raises(ValueError, match="scale"):
        ibs.PairedCropSampler(DATA, (32, 32), scale=(2., .5))
