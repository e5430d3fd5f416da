"""The spec of ibs.py: pairs of crops, the loss that asks things of one crop to be nowhere in the other, and two unified families of
networks, kernels (Panoptic FCN) and queries (Mask2Former), with what carries them.

Oracles are loops over pixels, cells and segments, counts over thousands of draws, all permutations, certificates of
optimality, finite differences, and cases computed by hand."""
import collections
import colorsys
import copy
import functools
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import data
import ibs
import seamless
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


def test_an_extreme_logit_has_a_finite_gradient_whatever_gamma_is():
    """sigmoid(-120) is 0 in float32, and 0 ** (gamma - 1) would be infinite for gamma below 1."""
    for gamma, x in itertools.product((0., .5, 1., 2.), (-120., 0., 120.)):
        e = torch.tensor([[x]], requires_grad=True)
        ibs.ibs_loss([e, e], torch.ones(2, 1, 1, 1), [torch.tensor([True])] * 2, torch.tensor([1, 0]), gamma=gamma).backward()
        assert e.grad.isfinite().all()


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


def test_a_chosen_segment_lies_anywhere_in_its_crop():
    """4.2, step 5 says that a crop contains the segment, not where: in 400 pairs it touches the left part as often as the right."""
    sampler, place = ibs.PairedCropSampler(DATA, (48, 64), seed=2), []
    for k in range(400):
        for _, t in sampler.pair(k):
            x1, _, x2, _ = t.boxes[t.instance - 1].tolist()
            if x2 - x1 <= 40 and not t.truncated[t.instance - 1].any():
                place.append(x1 / (64 - (x2 - x1)))                                # 0 at the left edge, 1 at the right one
    place = torch.tensor(place)
    assert len(place) > 400 and (place < .2).float().mean() < .45 and (place > .8).float().mean() > .1 and place.std() > .2


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


# --- 3.1 Unified panoptic segmentation: toys for the networks ---------------------------------------------------------------

ISTHING = torch.tensor([False, True, True, False])          # stuff 0, 3; things 1, 2
SIZE, SIZES, CELLS = (32, 64), [(4, 8), (2, 4), (1, 2)], (8, 16)   # a picture, its maps at strides 8, 16, 32, and at 4


def randn(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def of(segments, categories, crowd=None, image_id=0):
    """The Target of a whole picture."""
    n = len(categories)
    sample = data.Sample(torch.zeros(3, *segments.shape), segments, torch.tensor(categories, dtype=torch.int64),
                         torch.zeros(n, dtype=torch.bool) if crowd is None else torch.tensor(crowd, dtype=torch.bool), "")
    return data.crop(sample, 0, 0, tuple(segments.shape), image_id)[1]


def painted(*rectangles, size=SIZE, image_id=0):
    """Rectangles (category, top, left, bottom, right) one over the other on void; a sixth entry makes one a crowd."""
    segments = torch.zeros(size, dtype=torch.int64)
    for k, (_, y0, x0, y1, x1, *_) in enumerate(rectangles):
        segments[y0:y1, x0:x1] = k + 1
    return of(segments, [r[0] for r in rectangles], [len(r) > 5 for r in rectangles], image_id)


def renumbered(target, order):
    """The same truth with its segments in another order: new row k is old row order[k]."""
    number = torch.zeros(len(order) + 1, dtype=torch.int64)
    number[torch.tensor(order) + 1] = torch.arange(1, len(order) + 1)
    return replace(target, segments=number[target.segments], categories=target.categories[order], crowd=target.crowd[order],
                   boxes=target.boxes[order], full_boxes=target.full_boxes[order], truncated=target.truncated[order])


STREET = painted((0, 0, 0, 32, 64), (1, 8, 16, 24, 32), (3, 0, 48, 20, 64), (2, 16, 2, 30, 12), (0, 0, 0, 5, 5, "crowd"), (1, 2, 28, 14, 50))
CROWDED = painted((0, 0, 0, 32, 26), (1, 8, 30, 26, 46), (3, 0, 52, 20, 64), (2, 20, 0, 32, 14, "crowd"))      # and void between
DEGENERATE = {"nothing": painted(), "crowd": painted((1, 0, 0, 32, 64, "crowd")), "stuff": painted((0, 0, 0, 32, 28), (3, 0, 28, 32, 64)),
              "things": painted((1, 0, 0, 32, 28), (2, 0, 28, 32, 64)), "one pixel": painted((1, 5, 5, 6, 6)), "a speck of stuff": painted((0, 0, 0, 1, 1))}


def at_centres(target, size):
    """Per cell the segment at its centre, by integers: pixel floor((i + 1/2) H / h)."""
    (H, W), (h, w), ids = target.segments.shape, size, target.segments.tolist()
    return [[ids[(2 * i + 1) * H // (2 * h)][(2 * j + 1) * W // (2 * w)] for j in range(w)] for i in range(h)]


def truth_by_loop(target, size):
    ids, crowd = at_centres(target, size), target.crowd.tolist()
    masks = [[[float(s == n + 1) for s in row] for row in ids] for n in range(len(crowd))]
    known = [[float(s > 0 and not crowd[s - 1]) for s in row] for row in ids]
    return torch.tensor(masks, dtype=torch.float64).view(-1, *size), torch.tensor(known, dtype=torch.float64)


def dice_of_cells(x, y, known):
    """The formula on the cells that count, one mask."""
    p, y = torch.sigmoid(x[known > 0]), y[known > 0]
    return 1 - 2 * (p * y).sum() / ((p * p).sum() + (y * y).sum())


def entropy_of_cells(x, y, known):
    p, y = torch.sigmoid(x[known > 0]), y[known > 0]
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


def both_of_cells(x, y, known):
    """What a mask of a kernel costs: dice and cross entropy."""
    return dice_of_cells(x, y, known) + entropy_of_cells(x, y, known)


def close(a, b, rtol=2e-5, atol=1e-6):                       # sums of some hundred float32 terms
    torch.testing.assert_close(torch.as_tensor(a).detach().double(), torch.as_tensor(b).detach().double(), rtol=rtol, atol=atol)


def no_nan(*values):
    for v in values:
        if isinstance(v, dict):
            no_nan(*v.values())
        elif isinstance(v, (list, tuple)):
            no_nan(*v)
        else:
            assert torch.as_tensor(v).isfinite().all()


# --- Small parts ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("channels, groups", [(1, 1), (2, 1), (4, 1), (8, 2), (16, 4), (32, 8), (64, 16), (128, 32), (256, 32), (512, 32)])
def test_group_norm_has_32_groups_of_four_channels_at_least(channels, groups):
    """GroupNorm: each group of each picture has mean 0 and variance 1, by a loop."""
    norm, x = ibs.GroupNorm(channels), randn(0, 2, channels, 3, 5) * 3 + 1
    y = norm(x)
    for b, k in itertools.product(range(2), range(groups)):
        part = slice(k * channels // groups, (k + 1) * channels // groups)
        v = x[b, part].double()
        close(y[b, part], (v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt(), atol=5e-6)


def test_group_norm_stays_in_float32_under_autocast():
    """GroupNorm: "in float32, as CUDA's autocast has it": bf16 comes in, and no bit of it is lost."""
    norm, x = ibs.GroupNorm(8), (randn(1, 1, 8, 40, 40) + 30).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    v = x.double().view(2, 4, 40, 40)
    assert y.dtype == torch.float32
    close(y[0].view(2, 4, 40, 40), (v - v.mean((1, 2, 3), True)) / (v.var((1, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt(), atol=1e-4)


@pytest.mark.parametrize("size", [(3, 5), (2, 2), (7, 4)])
def test_coordinates_run_from_minus_one_to_one_in_equal_steps(size):
    """add_coordinates: the left edge of THIS input is -1, the right one 1, cells know their centres; behind the channels."""
    x, (h, w) = randn(0, 2, 3, *size), size
    y = ibs.add_coordinates(x)
    assert y.shape == (2, 5, h, w) and torch.equal(y[:, :3], x) and torch.equal(y[0, 3:], y[1, 3:])
    rows, columns = sorted(y[0, 3:], key=lambda m: bool(m[0, 0] != m[0, -1]))
    for i, j in itertools.product(range(h), range(w)):
        assert columns[i, j] == pytest.approx((2 * j + 1) / w - 1, abs=1e-6) and rows[i, j] == pytest.approx((2 * i + 1) / h - 1, abs=1e-6)


def test_coordinates_of_a_single_cell_are_numbers_and_gradients_pass():
    """add_coordinates, degenerate: one row, one column."""
    for size in ((1, 1), (1, 3), (3, 1)):
        x = randn(0, 1, 2, *size).requires_grad_()
        y = ibs.add_coordinates(x)
        y.sum().backward()
        assert y.isfinite().all() and y.abs()[:, 2:].max() <= 1 and (x.grad == 1).all()


def pyramid_of(seed, size=SIZE, batch=1, c=8):
    out, (h, w) = {}, (-(-n // 4) for n in size)
    for stride in (4, 8, 16, 32):
        out[stride] = randn(seed + stride, batch, c, h, w)
        h, w = -(-h // 2), -(-w // 2)
    return out


@pytest.mark.parametrize("size", [(32, 48), (37, 45), (4, 4), (70, 33), (1, 1)])
@pytest.mark.parametrize("coordinates", [False, True])
def test_features_have_the_size_of_stride_4_and_all_levels_speak(size, coordinates):
    """FeatureEncoder: {4, 8, 16, 32} -> [B, channels, H/4, W/4]; sizes that are no multiple of 32; all weights learn."""
    torch.manual_seed(0)
    encoder, pyramid = ibs.FeatureEncoder(8, 12, coordinates), {s: x.requires_grad_() for s, x in pyramid_of(0, size, 2).items()}
    f = encoder(pyramid)
    assert f.shape == (2, 12, -(-size[0] // 4), -(-size[1] // 4)) and f.isfinite().all()
    (f * randn(1, *f.shape)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    if size != (1, 1):
        assert all(p.grad.any() for p in encoder.parameters()) and all(x.grad.any() for x in pyramid.values())


def test_only_an_encoder_with_coordinates_tells_two_look_alikes_apart():
    """add_coordinates: "without it a convolution cannot tell two look-alikes apart".  All cells alike, far from the border."""
    pyramid = {s: torch.ones(1, 8, 416 // s, 416 // s) * randn(s, 1, 8, 1, 1) for s in (4, 8, 16, 32)}
    for coordinates in (False, True):
        torch.manual_seed(0)
        with torch.no_grad():
            f = ibs.FeatureEncoder(8, 4, coordinates)(pyramid)[0, :, 42:62, 42:62]
        spread = (f - f[:, :1, :1]).abs().amax()
        assert (spread > 1e-3) if coordinates else (spread < 1e-5)


@torch.no_grad()
def test_features_of_a_picture_do_not_depend_on_the_batch():
    """Group norm: "other crops" meet in the loss, not in the norm of the encoder."""
    torch.manual_seed(0)
    encoder, pyramid = ibs.FeatureEncoder(8, 12, True), pyramid_of(2, batch=3)
    for b in range(3):
        close(encoder({s: x[b:b + 1] for s, x in pyramid.items()})[0], encoder(pyramid)[b], atol=1e-5)


@pytest.mark.parametrize("size", [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1), (32, 48), (5, 7), (64, 96)])
@pytest.mark.parametrize("target", [STREET, CROWDED], ids=["street", "crowded"])
def test_the_truth_is_taken_at_the_centres_of_cells(target, size):
    """segment_masks, cell by cell; void and crowd do not count, sizes may be anything."""
    masks, known = ibs.segment_masks(target, size)
    want, counts = truth_by_loop(target, size)
    assert torch.equal(masks.double(), want) and torch.equal(known.double(), counts) and masks.dtype == known.dtype == torch.float32


@pytest.mark.parametrize("size", [(h, w) for h in (37, 50, 101) for w in (45, 96, 127)])
def test_odd_sizes_meet_the_same_pixels(size):
    """segment_masks on maps of ceil(H / 4) cells: exact integers decide, not rounding errors."""
    segments = torch.randint(0, 6, size, generator=seeded(0))
    target = of(segments, [0, 1, 2, 3, 1], [False, False, True, False, False])
    for stride in (4, 8, 16, 32):
        masks, known = ibs.segment_masks(target, [-(-n // stride) for n in size])
        want, counts = truth_by_loop(target, [-(-n // stride) for n in size])
        assert torch.equal(masks.double(), want) and torch.equal(known.double(), counts)


def test_a_picture_of_void_has_no_mask_and_no_cell_and_one_of_crowds_has_masks_that_do_not_count():
    """segment_masks, degenerate."""
    masks, known = ibs.segment_masks(DEGENERATE["nothing"], CELLS)
    assert masks.shape == (0, *CELLS) and known.shape == CELLS and not known.any()
    masks, known = ibs.segment_masks(DEGENERATE["crowd"], CELLS)
    assert masks.shape == (1, *CELLS) and not known.any()


def test_renumbered_segments_have_renumbered_masks():
    order = [3, 0, 5, 1, 4, 2]
    (a, known), (b, same) = ibs.segment_masks(STREET, CELLS), ibs.segment_masks(renumbered(STREET, order), CELLS)
    assert torch.equal(a[order], b) and torch.equal(known, same)


def test_dice_is_its_formula_over_the_cells_that_count_and_broadcasts():
    """dice: 1 - 2 Σ p y / (Σ p² + Σ y²), cell by cell, every mask against every truth."""
    x, y, known = randn(0, 3, 1, 4, 5, dtype=torch.float64), (randn(1, 2, 4, 5) > 0).double(), (randn(2, 4, 5) > -.5).double()
    got = ibs.dice(x, y, known)
    assert got.shape == (3, 2)
    for n, m in itertools.product(range(3), range(2)):
        close(got[n, m], dice_of_cells(x[n, 0], y[m], known))


def test_dice_at_hand():
    """dice: p = 1/2 on four cells of which one is true: 1 - 2 (1/2) / (4/4 + 1) = 1/2; 0 where all is right, 1 where all is wrong."""
    y, known = torch.tensor([[1., 0], [0, 0]]), torch.ones(2, 2)
    assert ibs.dice(torch.zeros(2, 2), y, known).item() == pytest.approx(.5, rel=1e-5)
    assert ibs.dice(torch.zeros(2, 2), y, torch.tensor([[1., 0], [0, 1]])).item() == pytest.approx(1 - 1 / 1.5, rel=1e-5)
    assert ibs.dice(200 * y - 100, y, known).item() == pytest.approx(0, abs=1e-5) and ibs.dice(100 - 200 * y, y, known).item() == pytest.approx(1, abs=1e-5)


def test_void_cells_change_nothing_in_dice_and_get_no_gradient():
    x, y, known = randn(0, 4, 5), (randn(1, 4, 5) > 0).float(), (randn(2, 4, 5) > 0).float()
    leaf = x.clone().requires_grad_()
    ibs.dice(leaf, y, known).backward()
    assert not leaf.grad[known == 0].any() and leaf.grad[known > 0].all()
    other = torch.where(known > 0, x, x + 50)
    assert torch.equal(ibs.dice(other, y, known), ibs.dice(x, y, known))
    assert torch.equal(ibs.dice(x, torch.where(known > 0, y, 1 - y), known), ibs.dice(x, y, known))


def test_dice_has_the_gradient_of_its_formula_and_of_finite_differences():
    """dice, in float32: a step of 1/100 errs by its square, rounding by 1e-7 / 1e-2."""
    x, y, known = randn(0, 3, 4).requires_grad_(), (randn(1, 3, 4) > 0).float(), (randn(2, 3, 4) > -.7).float()
    v, g = randn(3, 3, 4), torch.autograd.grad(ibs.dice(x, y, known), x)[0]
    close(g, torch.autograd.grad(dice_of_cells(x.double(), y, known), x)[0])
    with torch.no_grad():
        want = (ibs.dice(x + .01 * v, y, known) - ibs.dice(x - .01 * v, y, known)).item() / .02
    assert (g * v).sum().item() == pytest.approx(want, rel=1e-3)


def test_dice_of_nothing_is_a_number_with_a_gradient_that_is_one():
    """dice, degenerate: an empty truth, an empty mask, no cell that counts."""
    for x, y, known in itertools.product((0., -200., 200.), (0., 1.), (0., 1.)):
        leaf = torch.full((3, 4), x).requires_grad_()
        loss = ibs.dice(leaf, torch.full((3, 4), y), torch.full((3, 4), known))
        loss.backward()
        assert 0 <= loss.item() <= 1 + 1e-6 and leaf.grad.isfinite().all()


@pytest.mark.parametrize("size", [(5, 7), (16, 3), (1, 1)])
def test_positions_are_sines_and_cosines_of_the_place(size):
    """sine: [1, C, h, w]; the first half depends on y alone, the second on x alone, by the same rule: sin 2 pi v and cos 2 pi v are
    among the channels, v in 0..1 of this input, and each channel that is a sine has its cosine."""
    (h, w), c = size, 16
    p = ibs.sine(torch.zeros(3, c, h, w)).double()
    assert p.shape == (1, c, h, w) and torch.equal(ibs.sine(torch.zeros(3, c, w, h))[0, 8:], ibs.sine(torch.zeros(3, c, h, w))[0, :8].transpose(1, 2))
    assert torch.equal(p[0, :8, :, :1].expand(8, h, w), p[0, :8]) and torch.equal(p[0, 8:, :1].expand(8, h, w), p[0, 8:])
    for values, n in ((p[0, :8, :, 0], h), (p[0, 8:, 0], w)):
        v = (torch.arange(n, dtype=torch.float64) + .5) / n
        for wave in (torch.sin(2 * math.pi * v), torch.cos(2 * math.pi * v)):
            assert (values - wave).abs().amax(1).min() < 1e-6
        left = list(values)
        while left:                                          # sin^2 + cos^2 = 1 pairs the channels
            one = left.pop()
            k = min(range(len(left)), key=lambda k: (one ** 2 + left[k] ** 2 - 1).abs().max().item())
            assert (one ** 2 + left.pop(k) ** 2 - 1).abs().max() < 1e-6


def test_frequencies_fall_geometrically_and_no_two_places_are_alike():
    """sine: from a map so fine that its first cell tells frequencies (sin x = x)."""
    p = ibs.sine(torch.zeros(1, 32, 512, 1))[0, :16, :, 0].double()
    f = sorted((row[0].item() * 512 / math.pi for row in p if row[0] < .5), reverse=True)
    assert len(f) == 8 and f[0] == pytest.approx(1, rel=1e-4)
    assert all(b / a == pytest.approx(f[1] / f[0], rel=1e-3) for a, b in zip(f, f[1:])) and 0 < f[1] < 1
    assert (p[:, :, None] - p[:, None]).abs().amax(0)[~torch.eye(512, dtype=torch.bool)].min() > 1e-5


# --- Kernels: where is what ----------------------------------------------------------------------------------------------

def places_by_loop(target, sizes, canonical):
    out, (H, W) = [], target.segments.shape
    for level, (h, w) in enumerate(sizes):
        ids, bumps, regions = at_centres(target, (h, w)), {}, {}
        for n, c in enumerate(target.categories.tolist()):
            if target.crowd[n]:
                continue
            if not ISTHING[c]:
                regions[n] = torch.tensor([[float(s == n + 1) for s in row] for row in ids])
                continue
            ys, xs = torch.where(target.segments == n + 1)
            y0, x0, y1, x1 = int(ys.min()), int(xs.min()), int(ys.max()) + 1, int(xs.max()) + 1
            root = math.sqrt((y1 - y0) * (x1 - x0))
            if level == (0 if root < canonical else 1 if root < 2 * canonical else 2):
                i, j = (y0 + y1) * h // (2 * H), (x0 + x1) * w // (2 * W)
                sy, sx = max(.4, (y1 - y0) / 12 * h / H), max(.4, (x1 - x0) / 12 * w / W)
                bumps[n] = torch.tensor([[math.exp(-((y - i) / sy) ** 2 / 2 - ((x - j) / sx) ** 2 / 2) for x in range(w)] for y in range(h)])
        known = torch.tensor([[float(s > 0 and not target.crowd[s - 1]) for s in row] for row in ids])
        out.append((bumps, regions, known))
    return out


def kernels(**how):
    torch.manual_seed(0)
    return ibs.Kernels(ISTHING, 8, 24, **how)


def sizes_of(size):
    return [tuple(-(-n // s) for n in size) for s in (8, 16, 32)]


def same_places(got, want):
    for place, (bumps, regions, known) in zip(got, want):
        assert sorted(place.things.tolist()) == sorted(bumps) and place.things.dtype == place.stuff.dtype == torch.int64
        assert {n for n, r in regions.items() if r.any()} <= set(place.stuff.tolist()) <= set(regions)
        assert place.bumps.shape == (len(bumps), *known.shape) and place.regions.shape == (len(place.stuff), *known.shape)
        for k, n in enumerate(place.things.tolist()):
            close(place.bumps[k], bumps[n], rtol=1e-4)
            assert place.bumps[k].max() == 1
        assert all(torch.equal(place.regions[k], regions[n]) for k, n in enumerate(place.stuff.tolist()))
        assert torch.equal(place.known, known)
    assert len(got) == len(want) == 3


@pytest.mark.parametrize("target", [STREET, CROWDED, *DEGENERATE.values()], ids=["street", "crowded", *DEGENERATE])
@pytest.mark.parametrize("canonical", [8, 12, 16, 64])
def test_things_are_bumps_and_stuff_is_its_region(target, canonical):
    """Kernels.places, by loops over segments and cells."""
    same_places(kernels(canonical=canonical).places(target, SIZES), places_by_loop(target, SIZES, canonical))


@pytest.mark.parametrize("size", [(37, 45), (70, 101), (130, 33)])
def test_places_on_maps_that_are_rounded_up(size):
    """Kernels.places: a picture of 45 pixels has 6 cells of 7.5."""
    h, w = size
    target = painted((0, 0, 0, h, w), (1, 1, 1, h - 2, w - 3), (3, 0, 0, 9, 9), (2, h // 2, w // 3 + 1, h, w), (1, h - 7, 0, h, 20), size=size)
    for canonical in (20, 1000):
        same_places(kernels(canonical=canonical).places(target, sizes_of(size)), places_by_loop(target, sizes_of(size), canonical))


def test_the_top_of_a_thing_lies_in_the_cell_where_the_map_shows_it():
    """Kernels.places: regions, masks and bumps of one map share its cells.  33 pixels are 5 cells of 6.6: a thing from 20 to 24 has
    its middle, and the centre of one cell, in the cell from 19.8 to 26.4."""
    target = painted((0, 0, 0, 36, 33), (1, 0, 20, 8, 24), size=(36, 33))
    mask, place = ibs.segment_masks(target, (5, 5))[0][1], kernels().places(target, sizes_of((36, 33)))[0]
    assert torch.nonzero(mask).tolist() == [[0, 3]] and torch.nonzero(place.bumps[0] == 1).tolist() == [[0, 3]]


@pytest.mark.parametrize("box, level", [((15, 16), 0), ((16, 16), 1), ((8, 32), 1), ((8, 31), 0), ((31, 32), 1), ((32, 32), 2), ((64, 16), 2), ((64, 64), 2), ((1, 1), 0)])
def test_a_thing_belongs_to_one_level_by_the_root_of_its_boxs_area(box, level):
    """Kernels: "to the first below `canonical` pixels, to the second below twice that", else to the third; canonical = 16."""
    places = kernels(canonical=16).places(painted((1, 0, 0, *box), size=(64, 64)), sizes_of((64, 64)))
    assert [len(p.things) for p in places] == [int(level == k) for k in range(3)]


def test_64_pixels_are_the_default_border():
    for side, level in ((63, 0), (64, 1), (127, 1), (128, 2)):
        places = kernels().places(painted((2, 0, 0, side, side), size=(128, 128)), sizes_of((128, 128)))
        assert [len(p.things) for p in places] == [int(level == k) for k in range(3)]


def test_a_bump_at_hand():
    """Kernels.places: a box of 96 x 24 pixels at stride 8: sigma is one cell across, two fifths of a cell down; its middle (52, 20)
    lies in cell (2, 6)."""
    place = kernels().places(painted((1, 8, 4, 32, 100), size=(64, 128)), sizes_of((64, 128)))[0]
    assert place.bumps[0, 2, 6] == 1
    assert place.bumps[0, 2, 7] == place.bumps[0, 2, 5] == pytest.approx(math.exp(-.5), rel=1e-5)
    assert place.bumps[0, 2, 8].item() == pytest.approx(math.exp(-2), rel=1e-5)
    assert place.bumps[0, 3, 6] == place.bumps[0, 1, 6] == pytest.approx(math.exp(-.5 / .16), rel=1e-5)


def test_places_follow_the_numbering_of_segments():
    order, k = [3, 0, 5, 1, 4, 2], kernels(canonical=12)
    for a, b in zip(k.places(STREET, SIZES), k.places(renumbered(STREET, order), SIZES)):
        things = {order[n]: m for n, m in zip(b.things.tolist(), b.bumps)}
        stuff = {order[n]: m for n, m in zip(b.stuff.tolist(), b.regions)}
        assert set(things) == set(a.things.tolist()) and set(stuff) == set(a.stuff.tolist()) and torch.equal(a.known, b.known)
        assert all(torch.equal(things[n], m) for n, m in zip(a.things.tolist(), a.bumps))
        assert all(torch.equal(stuff[n], m) for n, m in zip(a.stuff.tolist(), a.regions))


def position_by_loop(heat, target, canonical):
    """Both focal losses: stuff as a mean over the cells of a level and its categories, summed over levels.  Void and crowd cells
    cost nothing, but for the tops of things, which are known to be there."""
    things, stuff, count = 0., 0., 0
    for x, (bumps, regions, known) in zip(heat, places_by_loop(target, [h.shape[-2:] for h in heat], canonical)):
        count += len(bumps)
        for c in range(4):
            y = torch.zeros(known.shape, dtype=torch.float64)
            for n, m in (bumps if ISTHING[c] else regions).items():
                if target.categories[n] == c:
                    y = y.maximum(m)
            p = torch.sigmoid(x[c])
            top, rest = y == 1, (y < 1) & (known > 0)
            if not ISTHING[c]:
                top = top & (known > 0)
            loss = -((1 - p) ** 2 * p.log())[top].sum() - ((1 - y) ** 4 * p ** 2 * (1 - p).log())[rest].sum()
            if ISTHING[c]:
                things = things + loss
            else:
                stuff = stuff + loss / (2 * known.numel())
    return things / max(count, 1) + stuff


def heat_of(seed, sizes=SIZES):
    return [randn(seed + k, 4, *s) * 2 for k, s in enumerate(sizes)]


@pytest.mark.parametrize("target", [STREET, CROWDED, *DEGENERATE.values()], ids=["street", "crowded", *DEGENERATE])
@pytest.mark.parametrize("canonical", [12, 64])
def test_the_position_loss_is_the_two_focal_losses_and_so_is_its_gradient(target, canonical):
    """Kernels.position_loss: CenterNet's for things, sum / number of things; the same for stuff, a mean over cells (here: of each
    level, over its categories too).  Two bumps of one category meet by their maximum."""
    k, heat = kernels(canonical=canonical), [h.requires_grad_() for h in heat_of(0)]
    loss, want = k.position_loss(heat, target, k.places(target, SIZES)), position_by_loop([h.double() for h in heat], target, canonical)
    close(loss, want)
    for a, b in zip(torch.autograd.grad(loss, heat), torch.autograd.grad(want, heat)):
        close(a, b, rtol=1e-4, atol=1e-6)


def test_the_top_of_a_thing_counts_where_the_centre_of_its_cell_is_void():
    """Kernels.position_loss: one pixel beside all centres, and a frame around void, are to be found as any other thing."""
    frame = painted((1, 2, 2, 30, 62))
    frame.segments[8:24, 8:56] = 0
    for target, cell in ((DEGENERATE["one pixel"], (0, 0)), (frame, (2, 4))):
        k, heat = kernels(), [torch.zeros(4, *s).requires_grad_() for s in SIZES]
        places = k.places(target, SIZES)
        g = torch.autograd.grad(k.position_loss(heat, target, places), heat)
        assert places[0].known[cell] == 0 and g[0][1][cell] < 0
        assert not g[0][ISTHING][:, (places[0].known == 0) & (places[0].bumps[0] < 1)].any()


def test_a_position_loss_at_hand():
    """Kernels.position_loss at p = 1/2: a thing in the only known cell costs log 2 / 4 in its own category's map; the other
    thing's category has log 2 / 4 too, and stuff twice log 2 / 4 as a mean."""
    k, target = kernels(), painted((1, 0, 0, 8, 8), size=(8, 8))
    heat = [torch.zeros(4, 1, 1)] * 3
    want = math.log(2) / 4 * (2 * 3 + 1 * 3)                 # things: two maps on three levels; stuff: a mean on three levels
    assert k.position_loss(heat, target, k.places(target, [(1, 1)] * 3)).item() == pytest.approx(want, rel=1e-5)


def test_neighbouring_bumps_of_one_category_keep_both_tops():
    """Kernels.position_loss: the truth is the larger of both, so that it is never above 1 and a top is a top."""
    target, k = painted((1, 8, 8, 24, 24), (1, 8, 24, 24, 40)), kernels()
    heat = heat_of(3)
    close(k.position_loss(heat, target, k.places(target, SIZES)), position_by_loop([h.double() for h in heat], target, 64))
    sure = [torch.full((4, *s), -30.) for s in SIZES]
    for n in (1, 2):
        (i,), (j,) = torch.where(k.places(target, SIZES)[0].bumps[n - 1] == 1)
        sure[0][1, i, j] = 30.
    assert k.position_loss(sure, target, k.places(target, SIZES)).item() < 1e-6


@pytest.mark.parametrize("logit", [-100., -20., 20., 100.])
def test_a_position_loss_of_extreme_heat_is_finite_with_finite_gradients(logit):
    """Kernels.position_loss: log p of a logit of -100 is -100, not -inf."""
    k, heat = kernels(), [torch.full((4, *s), logit).requires_grad_() for s in SIZES]
    loss = k.position_loss(heat, STREET, k.places(STREET, SIZES))
    no_nan(loss, torch.autograd.grad(loss, heat))
    tops = len([n for n in range(6) if ISTHING[STREET.categories[n]] and not STREET.crowd[n]])
    if logit == -100:                                        # what is there is missed: tops cost 100 each, regions 100 a cell
        regions = sum(sum(float(r.sum()) for r in regions.values()) / (2 * known.numel()) for _, regions, known in places_by_loop(STREET, SIZES, 64))
        assert loss.item() == pytest.approx(100 * tops / tops + 100 * regions, rel=1e-5)


def test_heat_in_void_and_crowds_is_nobodys_business():
    """Kernels.places: `known`; no loss there, and no gradient."""
    k, heat = kernels(), [h.requires_grad_() for h in heat_of(5)]
    places = k.places(CROWDED, SIZES)
    loss = k.position_loss(heat, CROWDED, places)
    for g, p, h in zip(torch.autograd.grad(loss, heat), places, heat):
        assert not g[:, p.known == 0].any() and g[ISTHING][:, p.known > 0].any()
    other = [torch.where(p.known > 0, h, h + 7) for h, p in zip(heat, places)]
    assert k.position_loss(other, CROWDED, places).item() == pytest.approx(loss.item(), rel=1e-6)
    assert min(float(p.known.min()) for p in places) == 0


def test_the_position_loss_does_not_know_numbers_of_segments():
    k, heat, other = kernels(canonical=12), heat_of(6), renumbered(STREET, [5, 4, 3, 2, 1, 0])
    close(k.position_loss(heat, STREET, k.places(STREET, SIZES)), k.position_loss(heat, other, k.places(other, SIZES)), rtol=1e-6)


# --- Kernels: what to look for -------------------------------------------------------------------------------------------

@torch.no_grad()
def test_three_levels_of_maps_with_shared_weights():
    """Kernels.maps: heat for each category and kernels of C channels at strides 8, 16, 32; equal levels are treated equally."""
    k, pyramid = kernels(), pyramid_of(0, (37, 45), 2)
    maps = k.maps(pyramid)
    assert [(tuple(h.shape), tuple(e.shape)) for h, e in maps] == [((2, 4, *s), (2, 24, *s)) for s in sizes_of((37, 45))]
    x = randn(0, 1, 8, 5, 6)
    first, *rest = k.maps({s: x for s in (4, 8, 16, 32)})
    for other in rest:
        close(other[0], first[0]), close(other[1], first[1])


def test_maps_do_not_look_at_stride_4():
    k, pyramid = kernels(), {s: x.requires_grad_() for s, x in pyramid_of(0).items()}
    sum((h * randn(0, *h.shape)).sum() + (e * randn(1, *e.shape)).sum() for h, e in k.maps(pyramid)).backward()
    assert pyramid[4].grad is None or not pyramid[4].grad.any()
    assert all(pyramid[s].grad.any() for s in (8, 16, 32))


def planted(k, heat, maps):
    """`k` with these maps instead of its own: heat and kernels, a list over levels each."""
    k.maps = lambda pyramid: list(zip(heat, maps))
    return k


def one_hot(sizes=SIZES, batch=1, channels=64):
    """Kernel maps that tell which cells an embedding is made of: channel n is cell n, counted through all levels."""
    out, n = [], 0
    for h, w in sizes:
        m = torch.zeros(batch, channels, h, w)
        for i, j in itertools.product(range(h), range(w)):
            m[:, n, i, j], n = 1., n + 1
        out.append(m)
    return out


def flat(sizes, *values):
    """Cells of all levels in a row."""
    return torch.cat([v.reshape(-1) for v in values])


def kernels_by_loop(heat, maps, features, targets, canonical, positions):
    """Weighted dice and cross entropy of things, those of stuff for a batch: losses of all segments, embeddings and which are things."""
    each, embeddings, things = [], [], []
    for b, target in enumerate(targets):
        places, rows = places_by_loop(target, [h.shape[-2:] for h in heat], canonical), []
        masks, known = truth_by_loop(target, features.shape[-2:])
        for level, (bumps, _, _) in enumerate(places):
            for n, bump in sorted(bumps.items()):
                p = heat[level][b, target.categories[n]].detach().sigmoid()
                cells = sorted(((float(p[i, j]), i, j) for i, j in itertools.product(*map(range, bump.shape)) if bump[i, j] > .1), reverse=True)[:positions]
                total, loss, mean = sum(s for s, _, _ in cells), 0., 0.
                for s, i, j in cells:
                    e = maps[level][b, :, i, j]
                    loss = loss + s / total * both_of_cells(torch.einsum("c,chw->hw", e, features[b]), masks[n], known)
                    mean = mean + s / total * e
                rows.append((n, loss, mean))
        order = [n for n, _, _ in rows]
        for n, c in enumerate(target.categories.tolist()):
            if not ISTHING[c] and not target.crowd[n]:
                cells = [maps[level][b, :, i, j] for level, (_, regions, known_here) in enumerate(places)
                         for i, j in itertools.product(*map(range, known_here.shape)) if regions[n][i, j]]
                if cells:
                    e = sum(cells) / len(cells)
                    rows.append((n, both_of_cells(torch.einsum("c,chw->hw", e, features[b]), masks[n], known), e))
        each += [loss for _, loss, _ in rows]
        embeddings.append({n: e for n, _, e in rows})
        things.append(order)
    return each, embeddings, things


def case_of_kernels(canonical=64, targets=(STREET, CROWDED), channels=24, **how):
    k = kernels(canonical=canonical, **how)
    heat = [randn(20 + n, len(targets), 4, *s).requires_grad_() for n, s in enumerate(SIZES)]
    maps = [randn(30 + n, len(targets), channels, *s).requires_grad_() for n, s in enumerate(SIZES)]
    features = (randn(40, len(targets), channels, *CELLS) * .3).requires_grad_()
    return planted(k, heat, maps), heat, maps, features, list(targets)


@pytest.mark.parametrize("canonical", [12, 64])
def test_mask_losses_and_embeddings_of_kernels_are_those_of_the_loops(canonical):
    """Kernels.losses: weighted dice and cross entropy of things, those of the mean kernel of stuff; 3 times the mean over all segments of the batch;
    things first; 1 times the mean position loss over pictures."""
    k, heat, maps, features, targets = case_of_kernels(canonical)
    losses, embeddings, is_thing = k.losses({}, features, targets)
    each, want, things = kernels_by_loop([h.double() for h in heat], [m.double() for m in maps], features.double(), targets, canonical, 7)
    assert set(losses) == {"position", "mask"}
    close(losses["mask"], 3 * sum(each) / len(each))
    close(losses["position"], sum(position_by_loop([h[b].double() for h in heat], t, canonical) for b, t in enumerate(targets)) / 2)
    for e, mine, n_things, thing in zip(embeddings, want, things, is_thing):
        assert e.shape == (len(mine), 24) and thing.tolist() == [True] * len(n_things) + [False] * (len(mine) - len(n_things))
        left = list(mine)
        for row, t in zip(e, thing.tolist()):                # each row is one of the loop's, none twice
            n = min(left, key=lambda n: (mine[n] - row).abs().max().item())
            close(row, mine[n], atol=1e-5)
            assert (n in n_things) == t
            left.remove(n)
    for g, w in zip(torch.autograd.grad(losses["mask"], [features, *maps]), torch.autograd.grad(3 * sum(each) / len(each), [features, *maps])):
        close(g, w, rtol=1e-4, atol=1e-6)


def test_under_autocast_heat_and_kernels_are_float32_and_losses_too():
    """bf16 has two digits and a half: what is summed over a map, or divided by a sum, is float32.  Features may come as bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        assert all(v.dtype == torch.float32 for level in kernels().maps(pyramid_of(0)) for v in level)
    k, heat, maps, features, targets = case_of_kernels()
    rough = features.detach().bfloat16()
    want = k.losses({}, rough.float(), targets)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = k.losses({}, rough, targets)[0]
    assert all(v.dtype == torch.float32 for v in got.values())
    close(got["position"], want["position"]), close(got["mask"], want["mask"], rtol=5e-3)


def test_weights_multiply_the_losses_of_kernels():
    """Kernels(weights=(1.0, 3.0)): position and mask."""
    (k, _, _, f, t), (other, *_) = case_of_kernels(), case_of_kernels(weights=(5., 6.))
    a, b = k.losses({}, f, t)[0], other.losses({}, f, t)[0]
    close(b["position"], 5 * a["position"]), close(b["mask"], 2 * a["mask"])


def stands_for(canonical, target, heat, positions=7, sizes=SIZES):
    """The weight of each cell of all levels in the first embedding."""
    k = planted(kernels(canonical=canonical, positions=positions), heat, one_hot(sizes, channels=220))
    e = k.losses({}, randn(0, 1, 220, *[4 * n for n in sizes[1]]), [target])[1][0]
    assert e[0].sum().item() == pytest.approx(1, rel=1e-5)
    return [e[0, n:n + h * w].view(h, w) for n, (h, w) in zip(np.cumsum([0] + [h * w for h, w in sizes]), sizes)]


def test_the_best_cells_of_a_bump_stand_for_a_thing_in_proportion_to_their_scores():
    """Kernels.losses: a box of 128 x 32 at stride 8 has sigma 4/3: of its row, cells within one sigma belong to any bump; cells
    four sigmas away to none, whatever their scores are.  The best `positions` remain."""
    size = (64, 160)
    target, heat = painted((1, 16, 16, 48, 144), size=size), [torch.full((1, 4, *s), -3.) for s in sizes_of(size)]
    p = torch.tensor([.2, .6, .4])
    heat[0][0, 1, 4, 9:12] = p.logit()                       # the middle (32, 80) is in cell (4, 10)
    heat[0][0, 1, 4, 16], heat[0][0, 1, 7] = 4., 4.
    heat[0][0, 2] = 4.                                       # another category's scores are not this thing's
    three = stands_for(1000, target, heat, 3, sizes_of(size))
    close(three[0][4, 9:12], p / p.sum())
    two = stands_for(1000, target, heat, 2, sizes_of(size))
    close(two[0][4, 9:12], torch.tensor([0, .6, .4]))
    one = stands_for(1000, target, heat, 1, sizes_of(size))
    close(one[0][4, 9:12], torch.tensor([0., 1, 0]))
    many = stands_for(1000, target, heat, 100, sizes_of(size))
    assert not many[0][4, 16] and not many[0][7].any() and (many[0] > 0).sum() >= 3
    assert not any(v[1:][k].any() for v in (one, two, three, many) for k in (0, 1))


def test_a_thing_of_one_cell_has_the_kernel_of_that_cell():
    """Kernels.losses, degenerate: fewer cells than `positions`; one pixel."""
    heat = [torch.full((1, 4, *s), -50.) for s in SIZES]     # scores of 1e-22 do not divide to NaN
    for y, x in ((0, 0), (5, 5), (31, 63), (16, 16)):
        weight = stands_for(64, painted((1, y, x, y + 1, x + 1)), [h * 0 for h in heat])
        assert weight[0][y // 8, x // 8] == pytest.approx(1, rel=1e-5)
    k = planted(kernels(), heat, one_hot())
    no_nan(k.losses({}, randn(0, 1, 64, *CELLS), [painted((1, 5, 5, 6, 6))])[:2])


def test_stuff_is_the_mean_kernel_of_its_region_over_all_levels():
    """Kernels.losses: every cell of the region counts once, at whichever level."""
    target, heat = painted((3, 0, 0, 32, 24), (1, 8, 8, 16, 16)), [torch.zeros(1, 4, *s) for s in SIZES]
    e, thing = (v[0] for v in planted(kernels(), heat, one_hot()).losses({}, randn(0, 1, 64, *CELLS), [target])[1:])
    inside = flat(SIZES, *[torch.tensor([[float(s == 1) for s in row] for row in at_centres(target, size)]) for size in SIZES])
    assert thing.tolist() == [True, False]
    close(e[1, :len(inside)], inside / inside.sum())


def test_cross_entropy_is_the_mean_over_the_cells_that_count_and_broadcasts():
    """cross_entropy: -y log p - (1 - y) log(1 - p), cell by cell, every mask against every truth; 0 where no cell counts."""
    x, y, known = randn(0, 3, 1, 4, 5), (randn(1, 2, 4, 5) > 0).float(), (randn(2, 4, 5) > -1).float()
    got = ibs.cross_entropy(x, y, known)
    assert got.shape == (3, 2) and ibs.cross_entropy(x, y, known * 0).eq(0).all()
    for n, m in itertools.product(range(3), range(2)):
        close(got[n, m], entropy_of_cells(x[n, 0].double(), y[m].double(), known))


@pytest.mark.parametrize("kind", ["thing", "stuff"])
def test_a_mask_that_has_died_is_called_back(kind):
    """Kernels, the Deviation: at logits of -30 wherever a segment is dice is 1 and flat; its embedding and features must hear of it."""
    target = painted((1, 8, 8, 24, 24) if kind == "thing" else (3, 0, 0, 32, 24))
    k, features = planted(kernels(), [torch.zeros(1, 4, *s) for s in SIZES], [torch.ones(1, 16, *s) for s in SIZES]), torch.full((1, 16, *CELLS), -30 / 16).requires_grad_()
    truth, known = ibs.segment_masks(target, CELLS)
    assert ibs.dice(torch.full(CELLS, -30.), truth[0], known).item() == pytest.approx(1, abs=1e-6)
    assert torch.autograd.grad(ibs.dice((torch.ones(1, 16) @ features[0].flatten(1)).view(CELLS), truth[0], known), features)[0].abs().max() < 1e-8
    slope = torch.autograd.grad(k.losses({}, features, [target])[0]["mask"], features)[0][0]       # of 3 log(1 + e^x) - x y, a mean
    inside, cells = truth[0] > 0, known.sum().item()
    close(slope[:, inside], torch.full((16, int(inside.sum())), -3 / cells), rtol=1e-4), close(slope[:, (known > 0) & ~inside], 0 * slope[:, (known > 0) & ~inside])


def test_an_untrained_network_of_kernels_is_undecided_about_every_pixel():
    """Kernels: "all masks begin at 1/2", however large its features are."""
    k, pyramid = kernels(), pyramid_of(0)
    e = torch.cat([m.flatten(2) for _, m in k.maps(pyramid)], 2)[0]
    assert (e.T @ F.normalize(randn(3, e.shape[0], 50), dim=0)).sigmoid().sub(.5).abs().max() < .1


def test_heat_learns_from_positions_and_kernels_from_masks():
    """Kernels.losses: who gets a gradient.  What intra-batch supervision pushes are kernels and features, not scores."""
    k, heat, maps, features, targets = case_of_kernels()
    losses, embeddings, _ = k.losses({}, features, targets)
    g = torch.autograd.grad(losses["position"], [*heat, *maps, features], allow_unused=True, retain_graph=True)
    assert all(v is not None and v.any() for v in g[:3]) and all(v is None or not v.any() for v in g[3:])
    for value in (losses["mask"], torch.cat(embeddings).square().sum()):
        g = torch.autograd.grad(value, [*heat, *maps], allow_unused=True, retain_graph=True)
        assert all(v is None or not v.any() for v in g[:3]) and all(v is not None and v.any() for v in g[3:4])
    assert torch.autograd.grad(losses["mask"], features)[0].any()


def test_mask_losses_of_kernels_hear_nothing_of_void_and_crowds_and_of_numbers():
    """segment_masks: cells that do not count; renumbering."""
    k, heat, maps, features, targets = case_of_kernels()
    a, e, _ = k.losses({}, features, targets)
    known = torch.stack([truth_by_loop(t, CELLS)[1] for t in targets])[:, None]
    b = k.losses({}, torch.where(known > 0, features, features + 3), targets)[0]
    assert not known.all()
    c, other, _ = k.losses({}, features, [renumbered(targets[0], [4, 2, 0, 5, 3, 1]), renumbered(targets[1], [1, 3, 2, 0])])
    for name in a:
        close(b[name], a[name]), close(c[name], a[name])
    assert sorted(round(v, 4) for v in other[0].sum(1).tolist()) == sorted(round(v, 4) for v in e[0].sum(1).tolist())


@pytest.mark.parametrize("name", DEGENERATE)
def test_kernels_of_degenerate_pictures_are_numbers_with_gradients(name):
    """Kernels.losses: no segment, only crowd, only stuff, only things, a speck."""
    torch.manual_seed(0)
    k, pyramid, features = kernels(), pyramid_of(0, batch=2), randn(1, 2, 24, *CELLS).requires_grad_()
    for targets in ([DEGENERATE[name]] * 2, [DEGENERATE[name], STREET]):
        losses, embeddings, is_thing = k.losses(pyramid, features, targets)
        sum(losses.values()).backward()
        no_nan(losses, embeddings, features.grad, [p.grad for p in k.parameters() if p.grad is not None])
        expected = {"nothing": (0, 0), "crowd": (0, 0), "stuff": (0, 2), "things": (2, 0), "one pixel": (1, 0), "a speck of stuff": (0, 0)}[name]
        assert (int(is_thing[0].sum()), int((~is_thing[0]).sum())) == expected and embeddings[0].shape == (sum(expected), 24)
        assert is_thing[0].dtype == torch.bool
    assert losses["position"] > 0 and features.grad.any()


@pytest.mark.parametrize("isthing", [[True] * 4, [False] * 4], ids=["only things", "only stuff"])
def test_worlds_without_stuff_or_without_things_learn_and_answer(isthing):
    """Kernels and Queries, degenerate: every category is a thing; none is."""
    for family in (ibs.Kernels, ibs.Queries):
        torch.manual_seed(0)
        f, pyramid, features = family(torch.tensor(isthing), 8, 16), pyramid_of(0), randn(1, 1, 16, *CELLS)
        losses, embeddings, things = f.losses(pyramid, features, [STREET])
        no_nan(losses, embeddings)
        assert all(v > 0 for v in losses.values()) and things[0].tolist() == [isthing[0]] * len(things[0]) and len(things[0]) > 0
        f.score_threshold = 0.
        no_nan(f.embed(pyramid, features))


# --- Kernels at test time ------------------------------------------------------------------------------------------------

def found(k, heat, maps=None, sizes=SIZES, channels=64):
    with torch.no_grad():
        return planted(k, heat, one_hot(sizes, channels=channels) if maps is None else maps).embed({}, torch.zeros(1, channels, 8, 12))


def cold(sizes=SIZES):
    return [torch.full((1, 4, *s), -10.) for s in sizes]


def test_peaks_are_the_largest_of_three_by_three_cells_above_the_threshold():
    """Kernels.embed: by category; a neighbour that is larger, on the same level and in the same category, takes the place."""
    heat, k = cold(), kernels()
    for c, i, j, p in ((1, 1, 1, .9), (1, 1, 2, .8), (1, 2, 2, .7), (1, 3, 5, .5), (1, 0, 5, .29), (2, 1, 2, .6), (2, 3, 0, .31)):
        heat[0][0, c, i, j] = math.log(p / (1 - p))
    heat[1][0, 1, 0, 0] = 0.
    e, scores, categories = found(k, heat)
    got = sorted((round(s, 4), c, int(v.argmax())) for v, s, c in zip(e, scores.tolist(), categories.tolist()))
    assert got == [(.31, 2, 24), (.5, 1, 29), (.5, 1, 32), (.6, 2, 10), (.9, 1, 9)]
    assert torch.equal(e.sum(1), torch.ones(5))


def test_a_stricter_threshold_keeps_fewer_peaks():
    heat = cold()
    for j, p in ((0, .4), (2, .6), (4, .8)):
        heat[0][0, 1, 1, j] = math.log(p / (1 - p))
    assert [len(found(kernels(score_threshold=t), heat)[0]) for t in (.3, .5, .7)] == [3, 2, 1]


def test_at_most_so_many_detections_the_best():
    """Kernels(detections=..)."""
    heat = cold()
    for i, j, p in ((0, 0, .4), (0, 2, .9), (0, 4, .5), (2, 0, .8), (2, 2, .7), (2, 4, .6)):
        heat[0][0, 1, i, j] = math.log(p / (1 - p))
    e, scores, _ = found(kernels(detections=3), heat)
    assert sorted(e.argmax(1).tolist()) == [2, 16, 18] and sorted(round(s, 4) for s in scores.tolist()) == [.7, .8, .9]


def test_peaks_with_the_kernel_of_a_better_one_are_the_same_object():
    """Kernels.embed: "kernels of one category that are alike are the same object and are averaged under the best score"."""
    heat, maps = cold(), [torch.zeros(1, 64, *s) for s in SIZES]
    for level, c, i, j, p in ((0, 1, 0, 0, .9), (0, 1, 0, 3, .5), (1, 1, 0, 2, .7), (0, 2, 3, 0, .6)):
        heat[level][0, c, i, j] = math.log(p / (1 - p))
    maps[0][0, 0, 0, 0], maps[0][0, 0, 0, 3], maps[1][0, 0, 0, 2], maps[0][0, 0, 3, 0] = 1., 2., 6., 1.
    e, scores, categories = found(kernels(), heat, maps)
    assert sorted(zip(categories.tolist(), [round(s, 4) for s in scores.tolist()], e[:, 0].tolist())) == [(1, .9, 3.), (2, .6, 1.)]


def test_stuff_has_one_embedding_for_its_region():
    """Kernels: "one for each region of stuff": where its heat is high on all levels; beside a thing."""
    heat, maps = cold(), one_hot()
    heat[0][0, 3, 2:] = 3.
    heat[0][0, 1, 0, 0] = 2.
    e, scores, categories = found(kernels(), heat, maps)
    assert sorted(categories.tolist()) == [1, 3]
    stuff = e[categories == 3][0]
    close(stuff[16:32], torch.full((16,), 1 / 16))
    assert not stuff[:16].any() and not stuff[32:].any()


def test_a_picture_of_stuff_only_has_the_embeddings_of_its_stuff():
    """Kernels.embed, degenerate: no peak at all, two regions."""
    heat = cold()
    heat[0][0, 0, :2], heat[0][0, 3, 2:] = 3., 3.
    e, scores, categories = found(kernels(), heat)
    assert sorted(categories.tolist()) == [0, 3] and e.shape == (2, 64) and scores.isfinite().all()


def test_a_picture_where_nothing_is_found_has_no_embedding():
    """Kernels.embed, degenerate: neither peak nor region."""
    e, scores, categories = found(kernels(), cold())
    assert e.shape == (0, 64) and scores.shape == categories.shape == (0,) and categories.dtype == torch.int64


def test_a_plateau_of_equal_scores_with_equal_kernels_is_one_object():
    """Kernels.embed, degenerate: bf16 scores are often equal."""
    heat, maps = cold(), [torch.ones(1, 64, *s) for s in SIZES]
    heat[0][0, 1] = 1.
    e, scores, _ = found(kernels(), heat, maps)
    assert len(e) == 1 and scores.item() == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-5)
    close(e[0], torch.ones(64))


@torch.no_grad()
def test_inference_of_kernels_is_on_the_first_picture():
    """Kernels.embed: "on the first picture"."""
    k, pyramid = kernels(score_threshold=.005), pyramid_of(3, batch=2)
    a, b = k.embed(pyramid, None), k.embed({s: x[:1] for s, x in pyramid.items()}, None)
    assert len(a[0]) > 0
    for x, y in zip(a, b):
        close(x, y, atol=1e-5)


def fuse_by_loop(kernel, scores, categories, similarity):
    groups = []
    for n in range(len(kernel)):
        for g in groups:
            m = g[0]
            cosine = (kernel[n] * kernel[m]).sum() / (kernel[n].norm() * kernel[m].norm())
            if categories[n] == categories[m] and cosine > similarity:
                g.append(n)
                break
        else:
            groups.append([n])
    return torch.stack([kernel[g].mean(0) for g in groups]), scores[[g[0] for g in groups]], categories[[g[0] for g in groups]]


@pytest.mark.parametrize("seed", range(5))
def test_alike_kernels_of_one_category_are_one_object(seed):
    """fuse_kernels by a loop: six directions far apart, noise far below the threshold, lengths of all kinds, three categories."""
    g = seeded(seed)
    directions, which = torch.linalg.qr(torch.randn(8, 6, generator=g))[0].T, torch.randint(6, (25,), generator=g)
    kernel = (directions[which] + .02 * torch.randn(25, 8, generator=g)) * (.2 + torch.rand(25, 1, generator=g) * 3)
    scores, categories = torch.rand(25, generator=g).sort(descending=True)[0], torch.randint(3, (25,), generator=g)
    for a, b in zip(ibs.fuse_kernels(kernel, scores, categories), fuse_by_loop(kernel, scores, categories, .9)):
        close(a, b)


@pytest.mark.parametrize("seed", range(5))
def test_whoever_has_joined_another_leads_nobody(seed):
    """fuse_kernels on kernels so dense that likenesses form chains: one after the other, by falling scores, a kernel joins the
    best of those that stand for an object already, or stands for one itself."""
    g = seeded(seed)
    kernel, scores = torch.randn(30, 3, generator=g), torch.rand(30, generator=g).sort(descending=True)[0]
    categories = torch.randint(2, (30,), generator=g)
    got, want = ibs.fuse_kernels(kernel, scores, categories, .7), fuse_by_loop(kernel, scores, categories, .7)
    assert len(got[0]) == len(want[0]) < 20
    for a, b in zip(got, want):
        close(a, b)


def test_the_cosine_must_be_above_the_similarity_and_length_does_not_matter():
    """fuse_kernels: 0.6 between (1, 0) and (3, 4); opposite kernels are not alike; a kernel of zeros is no NaN."""
    kernel, s, c = torch.tensor([[1., 0], [3, 4]]), torch.tensor([.9, .8]), torch.tensor([1, 1])
    assert len(ibs.fuse_kernels(kernel, s, c, .61)[0]) == 2
    one = ibs.fuse_kernels(kernel, s, c, .59)
    assert one[0].tolist() == [[2., 2.]] and one[1].tolist() == pytest.approx([.9]) and one[2].tolist() == [1]
    assert len(ibs.fuse_kernels(kernel, s, torch.tensor([1, 2]), .5)[0]) == 2
    assert len(ibs.fuse_kernels(torch.tensor([[1., 0], [-1, 0]]), s, c, .5)[0]) == 2
    no_nan(ibs.fuse_kernels(torch.zeros(2, 2), s, c))


def test_a_chain_of_likenesses_stays_in_its_category():
    """fuse_kernels: 0 is of another category; 1 and 2 are alike, 2 and 3 are, 1 and 3 are not.  Whatever becomes of 3, the
    object of another category is left alone, and 1 has the best score of its own."""
    angle = torch.tensor([.3, 0., .4, .8])
    kernel = torch.stack([angle.cos(), angle.sin()], 1)
    e, scores, categories = ibs.fuse_kernels(kernel, torch.tensor([.9, .8, .7, .6]), torch.tensor([2, 1, 1, 1]), .9)
    assert categories.tolist()[:2] == [2, 1] and scores.tolist()[:2] == pytest.approx([.9, .8])
    close(e[0], kernel[0])
    assert (e[:, 0] > .6).all() and set(categories.tolist()[1:]) == {1}


def test_fusing_nothing_gives_nothing_and_one_kernel_stays():
    """fuse_kernels, degenerate: N = 0, N = 1."""
    one = ibs.fuse_kernels(torch.tensor([[3., 4]]), torch.tensor([.5]), torch.tensor([2]))
    assert [v.tolist() for v in one] == [[[3., 4.]], [.5], [2]]
    e, s, c = ibs.fuse_kernels(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert e.shape == (0, 4) and s.shape == c.shape == (0,)


# --- The assignment ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("g, d", [(1, 1), (1, 5), (2, 2), (3, 3), (3, 5), (4, 4), (4, 6), (5, 5), (2, 7)])
@pytest.mark.parametrize("kind", ["real", "ties", "zeros"])
def test_the_assignment_is_the_best_of_all_permutations(g, d, kind):
    """assign, by brute force; with many ties; a gain of nothing."""
    for seed in range(6):
        r = np.random.default_rng(seed)
        gain = {"real": r.random((g, d)), "ties": r.integers(0, 3, (g, d)).astype(float), "zeros": np.zeros((g, d))}[kind]
        columns = ibs.assign(gain)
        assert isinstance(columns, np.ndarray) and columns.dtype == np.int64 and columns.shape == (g,)
        assert len(set(columns.tolist())) == g and 0 <= columns.min() and columns.max() < d
        best = max(sum(gain[i, c] for i, c in enumerate(p)) for p in itertools.permutations(range(d), g))
        assert gain[np.arange(g), columns].sum() == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_no_exchange_of_any_length_improves_a_large_assignment(seed):
    """assign: a certificate for sizes that permutations do not reach.  In the graph "i takes the column of j" no cycle gains
    anything (Floyd-Warshall); a free column is one more owner without a wish."""
    r, g, d = np.random.default_rng(seed), 14, (14, 20, 14, 33)[seed]
    gain = r.random((g, d)) * 10 ** r.integers(-3, 4, (g, 1)).astype(float) if seed % 2 else r.integers(0, 4, (g, d)).astype(float)
    columns = ibs.assign(gain)
    assert len(set(columns.tolist())) == g
    free = [c for c in range(d) if c not in columns]
    owned = [*columns.tolist(), *free]
    step = np.zeros((d, d))                                  # owners without a row: all columns are worth nothing to them
    step[:g] = gain[:, owned] - gain[np.arange(g), columns][:, None]
    for k in range(d):
        step = np.maximum(step, step[:, k:k + 1] + step[k:k + 1])
    assert step.diagonal().max() <= 1e-9


def test_a_planted_assignment_is_found_and_a_bonus_for_a_row_changes_nothing():
    """assign: a permutation of 40 hidden in noise; rows may be moved as a whole, since each is assigned once."""
    r = np.random.default_rng(0)
    hidden, gain = r.permutation(60)[:40], r.random((40, 60))
    gain[np.arange(40), hidden] += 2
    assert ibs.assign(gain).tolist() == hidden.tolist()
    assert ibs.assign(gain + 100 * r.random((40, 1))).tolist() == hidden.tolist()
    order = r.permutation(40)
    assert ibs.assign(gain[order]).tolist() == hidden[order].tolist()


def test_rows_that_want_the_same_column_share_for_the_best():
    """assign, at hand: greedy takes 10 + 1; the best sum is 9 + 8."""
    assert ibs.assign(np.array([[10., 9.], [8., 1.]])).tolist() == [1, 0]
    assert ibs.assign(np.array([[3., 2., 0.], [3., 0., 0.], [3., 2., 1.]])).tolist() == [1, 0, 2]


def test_nobody_to_assign():
    """assign, degenerate: G = 0, with columns and without."""
    for d in (0, 4):
        columns = ibs.assign(np.zeros((0, d)))
        assert columns.shape == (0,) and columns.dtype == np.int64


# --- Queries -------------------------------------------------------------------------------------------------------------

def queries(n=6, layers=3, seed=0, **how):
    torch.manual_seed(seed)
    return ibs.Queries(ISTHING, 8, 16, queries=n, layers=layers, heads=4, **how)


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 48), (37, 45), (70, 33)])
@pytest.mark.parametrize("layers", [1, 3, 4])
def test_every_layer_answers_and_the_untouched_queries_first(size, layers):
    """Queries.answers: layers + 1 of class logits [B, N, categories + 1] and embeddings [B, N, C]; the first depends on no picture."""
    q, h = queries(layers=layers), [-(-n // 4) for n in size]
    answers = q.answers(pyramid_of(0, size, 2), randn(1, 2, 16, *h))
    assert [(tuple(a.shape), tuple(e.shape)) for a, e in answers] == [((2, 6, 5), (2, 6, 16))] * (layers + 1)
    other = q.answers(pyramid_of(5, size, 2), randn(6, 2, 16, *h))
    for k, (a, b) in enumerate(zip(answers, other)):
        no_nan(a, b)
        assert all(torch.allclose(x, y, atol=1e-6) == (k == 0) for x, y in zip(a, b))
        assert all(torch.allclose(x[0], x[1], atol=1e-6) == (k == 0) for x in a)


@torch.no_grad()
def test_queries_have_places_which_are_added_where_they_look_and_not_to_what_they_say():
    """Queries.answers: attention compares query + place with cells + positions, and reads cells and queries without them."""
    q, seen, said = queries(layers=1), {}, {}
    parts = {"cross": q.cross[0], "among": q.among[0], "feed": q.feed[0], **{f"norm{k}": m for k, m in enumerate(q.norms[0])}}
    for name, m in parts.items():
        m.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args}))
        m.register_forward_hook(lambda m, args, out, name=name: said.update({name: out}))
    pyramid = pyramid_of(0)
    q.answers(pyramid, randn(1, 1, 16, *CELLS))
    place, cells = q.place.weight[None], (q.inputs[0](pyramid[32]) + q.level.weight[0][:, None, None])
    look, keys, values = seen["cross"]
    close(look, q.query.weight[None] + place), close(values, cells.flatten(2).mT), close(keys - values, ibs.sine(cells).flatten(2).mT, atol=1e-5)
    look, keys, values = seen["among"]
    close(look - values, place, atol=1e-6), close(keys, look)
    close(seen["norm0"][0], q.query.weight[None] + said["cross"][0])             # what is heard is added to what was known
    close(seen["norm1"][0], values + said["among"][0])
    close(seen["norm2"][0], said["norm1"] + said["feed"])


def test_answers_of_a_picture_do_not_depend_on_the_batch():
    q, pyramid, f = queries(), pyramid_of(0, batch=3), randn(1, 3, 16, *CELLS)
    together = q.answers(pyramid, f)
    for b in range(3):
        for (a, e), (x, y) in zip(together, q.answers({s: v[b:b + 1] for s, v in pyramid.items()}, f[b:b + 1])):
            close(a[b:b + 1], x, atol=1e-5), close(e[b:b + 1], y, atol=1e-5)


@torch.no_grad()
def test_permuted_queries_answer_permuted():
    """Queries: nothing but what it learnt tells one query from another."""
    q, pyramid, f, order = queries(), pyramid_of(0), randn(1, 1, 16, *CELLS), [3, 0, 5, 1, 4, 2]
    before = q.answers(pyramid, f)
    tables = [m for m in q.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == 6]
    assert tables
    for m in tables:
        m.weight.copy_(m.weight[order].clone())
    for (a, e), (x, y) in zip(before, q.answers(pyramid, f)):
        close(x, a[:, order], atol=1e-5), close(y, e[:, order], atol=1e-5)


@pytest.mark.parametrize("layers, seen", [(1, {32}), (2, {32, 16}), (3, {32, 16, 8})])
def test_layers_take_strides_32_16_8_in_turn(layers, seen):
    """Queries: which levels the last answer depends on; stride 4 speaks through the features alone."""
    q, pyramid = queries(layers=layers), {s: x.requires_grad_() for s, x in pyramid_of(0, (64, 96)).items()}
    logits, e = q.answers(pyramid, randn(1, 1, 16, 16, 24))[-1]
    ((logits * randn(2, *logits.shape)).sum() + (e * randn(3, *e.shape)).sum()).backward()
    assert {s for s, x in pyramid.items() if x.grad is not None and x.grad.any()} == seen


@torch.no_grad()
def test_the_fourth_layer_reads_stride_32_again_where_the_third_answers_mask_lies():
    """Queries: "in turn", "each only where its mask of the layer before lies".  One query; what changes lies where it is blind in
    layer 1 and sees in layer 4: the first three layers hear nothing of it."""
    q, size = queries(1, 4), (160, 128)
    pyramid, f = pyramid_of(0, size), randn(4, 1, 16, 40, 32)
    answers = q.answers(pyramid, f)
    masks = [q.blind(answers[k][1], f, (5, 4)).view(5, 4) for k in (0, 3)]
    late, never = masks[0] & ~masks[1], masks[0] & masks[1]
    assert late.any() and never.any()
    for cells, first in ((late, 4), (never, 5)):
        other = dict(pyramid)
        other[32] = pyramid[32] + cells * randn(8, 1, 8, 5, 4)
        moved = [(a[1] - b[1]).abs().max() > 1e-4 for a, b in zip(answers, q.answers(other, f))]
        assert moved == [k >= first for k in range(5)]


def test_a_query_is_blind_outside_of_its_own_mask():
    """Queries.blind at the features' own size, cell by cell: blind where the mask's probability is below 1/2."""
    e, f = randn(0, 2, 5, 4), randn(1, 2, 4, 6, 7)
    blind = queries().blind(e, f, (6, 7))
    assert blind.shape == (2, 5, 42) and blind.dtype == torch.bool
    for b, n, i, j in itertools.product(range(2), range(5), range(6), range(7)):
        assert bool(blind[b, n, i * 7 + j]) == (float((e[b, n] * f[b, :, i, j]).sum()) < 0)


@pytest.mark.parametrize("size", [(4, 8), (2, 4), (1, 2)])
def test_on_a_coarser_level_a_cell_is_seen_if_the_mask_covers_it(size):
    """Queries.blind: masks that are made of whole cells of the level, so that any way to shrink them agrees."""
    cells = randn(2, 1, 3, *size)
    f = cells.repeat_interleave(8 // size[0], 2).repeat_interleave(16 // size[1], 3)
    blind = queries().blind(torch.eye(3)[None], f, size)
    want = cells < 0
    want[want.all(2, keepdim=True).all(3, keepdim=True).expand_as(want)] = False             # an empty mask: it sees everything
    assert torch.equal(blind.view(1, 3, *size), want)


def test_a_query_with_an_empty_mask_sees_everything():
    """Queries.blind: "a query whose mask is empty there would see nothing and attend to nothing, which is 0/0"."""
    f, e = torch.ones(1, 1, *CELLS), torch.tensor([[[-5.], [5.], [0.]]])
    f[0, 0, 0, 0] = -1                                       # a corner of query 0, too small for the coarse levels
    assert not queries().blind(e, f, (1, 2))[0].any()
    fine = queries().blind(e, f, CELLS)[0]
    assert fine[0].sum() == 127 and not fine[0, 0] and fine[1].sum() == 1 and fine[1, 0]
    assert not fine[2].any()


def test_blindness_is_decided_without_gradients():
    e, f = randn(0, 1, 2, 4).requires_grad_(), randn(1, 1, 4, *CELLS).requires_grad_()
    assert not queries().blind(e, f, (4, 6)).requires_grad


@torch.no_grad()
@pytest.mark.parametrize("sign", [1, -1])
def test_attention_reads_only_what_the_query_sees(sign):
    """Queries, masked attention: one query, one layer; what changes where it is blind changes nothing, and elsewhere everything."""
    q, size = queries(1, 1), (128, 96)
    e = q.answers(pyramid_of(0, size), torch.zeros(1, 16, 32, 24))[0][1]                      # [1, 1, C], of no picture
    f, pyramid = torch.zeros(1, 16, 32, 24), pyramid_of(0, size)
    f[0, :, :16], f[0, :, 16:] = sign * e[0, 0, :, None, None], -sign * e[0, 0, :, None, None]  # it sees the upper (lower) half
    blind = q.blind(e, f, (4, 3)).view(4, 3)
    assert blind[2:].all() == (sign > 0) and blind.sum() == 6
    base = q.answers(pyramid, f)[1]
    for part in (blind, ~blind):
        other = dict(pyramid)
        other[32] = pyramid[32] + part * randn(8, 1, 8, 4, 3)
        change = max((x - y).abs().max().item() for x, y in zip(q.answers(other, f)[1], base))
        assert (change < 1e-6) == (part is blind) and (part is blind or change > 1e-3)


def test_empty_masks_see_as_much_as_full_ones_and_make_no_nan_forward_or_backward():
    """Queries.blind: all masks of all queries and layers are empty, or full: the names of the queries are the same."""
    names = []
    for sign in (-1., 1.):
        q, pyramid = queries(), {s: x.requires_grad_() for s, x in pyramid_of(0).items()}
        plain = q.answer
        q.answer = lambda x: (plain(x)[0], torch.full_like(plain(x)[1], sign))  # noqa: B023
        answers = q.answers(pyramid, torch.ones(1, 16, *CELLS))
        assert not q.blind(answers[0][1], torch.ones(1, 16, *CELLS), (1, 2)).any()
        sum(logits.square().sum() for logits, _ in answers).backward()
        no_nan(answers, [p.grad for p in q.parameters() if p.grad is not None], [pyramid[s].grad for s in (8, 16, 32)])
        names.append(torch.stack([logits for logits, _ in answers]))
    assert torch.equal(*names)


def match_costs(logits, x, categories, masks, known):
    p = logits.double().softmax(-1)
    return [[float(-2 * p[n, c] + 5 * entropy_of_cells(x[n].double(), masks[g], known) + 5 * dice_of_cells(x[n].double(), masks[g], known))
             for n in range(len(logits))] for g, c in enumerate(categories.tolist())]


def best_match(costs, n):
    return list(min(itertools.permutations(range(n), len(costs)), key=lambda p: sum(costs[g][k] for g, k in enumerate(p))))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("segments, n", [(3, 5), (4, 4), (1, 1), (1, 6)])
def test_the_match_is_the_cheapest_of_all_permutations(segments, n, seed):
    """Queries.match: least -2 p(class) + 5 cross entropy + 5 dice, each by loops, over all permutations; void does not count."""
    logits, x = randn(seed, n, 5) * 2, randn(seed + 10, n, 4, 5)
    masks, known = (randn(seed + 20, segments, 4, 5) > 0).float(), (randn(seed + 30, 4, 5) > -1).float()
    categories = torch.randint(4, (segments,), generator=seeded(seed))
    segment, got = queries().match(logits, x, categories, masks, known)
    assert segment.tolist() == list(range(segments))
    assert got.dtype == torch.int64 and got.tolist() == best_match(match_costs(logits, x, categories, masks.double(), known.double()), n)


def test_the_match_weighs_class_against_masks_as_its_weights_say():
    """Queries(weights=(class, cross entropy, dice)): a query of the right name and one of the right mask."""
    known, mask = torch.ones(4, 4), torch.zeros(1, 4, 4)
    mask[0, :2] = 1
    x = torch.stack([2 - 4 * mask[0], 4 * mask[0] - 2]) * .1
    logits = torch.tensor([[0., 9, 0, 0, 0], [9., 0, 0, 0, 0]])
    assert queries(weights=(2., .1, .1)).match(logits, x, torch.tensor([1]), mask, known)[1].tolist() == [0]
    assert queries(weights=(.01, 5., .01)).match(logits, x, torch.tensor([1]), mask, known)[1].tolist() == [1]
    assert queries(weights=(.01, .01, 5.)).match(logits, x, torch.tensor([1]), mask, known)[1].tolist() == [1]


def test_a_match_of_nothing_is_empty_and_nothing_known_is_no_nan():
    """Queries.match, degenerate: G = 0; all void."""
    q = queries()
    got = q.match(randn(0, 6, 5), randn(1, 6, 4, 5), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4, 5), torch.ones(4, 5))[1]
    assert got.shape == (0,) and got.dtype == torch.int64
    got = q.match(randn(0, 6, 5), randn(1, 6, 4, 5), torch.tensor([1, 2]), torch.zeros(2, 4, 5), torch.zeros(4, 5))[1]
    assert len(set(got.tolist())) == 2


def test_a_match_of_extreme_logits_is_finite():
    """Queries.match: logits of 500 in float32."""
    mask = torch.zeros(2, 4, 4)
    mask[0, :2], mask[1, 2:] = 1, 1
    x = torch.stack([torch.full((4, 4), -500.), 1000 * mask[1] - 500, torch.full((4, 4), 500.), 1000 * mask[0] - 500])
    assert queries(4).match(torch.zeros(4, 5), x, torch.tensor([1, 1]), mask, torch.ones(4, 4))[1].tolist() == [3, 1]


def queries_by_loop(answers, features, targets, no_object=.1):
    """Losses summed over layers, and the queries matched in the last: class is the weighted mean over all queries of the batch, the
    others are means over all segments of the batch."""
    total = dict.fromkeys(("class", "mask", "dice"), 0.)
    for logits, e in answers:
        nll = weight = ce = di = 0.
        count, matched = 0, []
        for b, target in enumerate(targets):
            rows = [n for n in range(len(target.categories)) if not target.crowd[n]]
            masks, known = truth_by_loop(target, features.shape[-2:])
            masks, categories = masks[rows], target.categories[rows]
            x = torch.einsum("nc,chw->nhw", e[b].double(), features[b].double())
            queries_ = best_match(match_costs(logits[b].detach(), x.detach(), categories, masks, known), len(x))
            matched.append(queries_)
            name = dict(zip(queries_, categories.tolist()))
            for n, row in enumerate(logits[b].double()):
                w = 1. if n in name else no_object
                nll, weight = nll - w * row.log_softmax(0)[name.get(n, 4)], weight + w
            for g, n in enumerate(queries_):
                ce, di, count = ce + entropy_of_cells(x[n], masks[g], known), di + dice_of_cells(x[n], masks[g], known), count + 1
        total["class"] += 2 * nll / weight
        total["mask"] += 5 * ce / max(count, 1)
        total["dice"] += 5 * di / max(count, 1)
    return total, matched


def case_of_queries(targets=(STREET, CROWDED), n=6, layers=1, **how):
    q, b = queries(n, layers, **how), len(targets)
    answers = [((randn(50 + k, b, n, 5)).requires_grad_(), (randn(60 + k, b, n, 16) * .3).requires_grad_()) for k in range(layers + 1)]
    q.answers = lambda pyramid, features: answers
    return q, answers, randn(70, b, 16, *CELLS).requires_grad_(), list(targets)


def test_every_layers_answer_is_matched_and_supervised():
    """Queries.losses, by loops and permutations: 2 class + 5 cross entropy + 5 dice, "no object" weighs a tenth, summed over
    layers; the embeddings are those of the LAST layer's matched queries, in the order of segments without crowds."""
    q, answers, features, targets = case_of_queries()
    losses, embeddings, is_thing = q.losses({}, features, targets)
    want, matched = queries_by_loop(answers, features, targets)
    assert set(losses) == set(want)
    for name in want:
        close(losses[name], want[name])
    leaves = [features, *[v for a in answers for v in a]]
    for a, b in zip(torch.autograd.grad(sum(losses.values()), leaves, retain_graph=True), torch.autograd.grad(sum(want.values()), leaves)):
        close(a, b, rtol=1e-4, atol=1e-6)
    for b, t in enumerate(targets):
        assert torch.equal(embeddings[b], answers[-1][1][b, matched[b]])
        assert is_thing[b].tolist() == [bool(ISTHING[c]) for c in t.categories[~t.crowd]]
    g = torch.autograd.grad(torch.cat(embeddings).sum(), leaves, allow_unused=True)
    assert g[-1].any() and all(v is None or not v.any() for v in g[:-1])                    # of the last layer, and not its names


def test_weights_and_the_weight_of_no_object_are_heard():
    """Queries(no_object, weights)."""
    targets = (painted((1, 0, 0, 32, 64)),)
    q, answers, f, t = case_of_queries(targets, 1)           # one query: there is nothing to match
    twice = case_of_queries(targets, 1, weights=(6., 10., 20.))[0]
    a, b = q.losses({}, f, t)[0], twice.losses({}, f, t)[0]
    close(b["class"], 3 * a["class"]), close(b["mask"], 2 * a["mask"]), close(b["dice"], 4 * a["dice"])
    for weight in (.1, 1.):
        q, answers, f, t = case_of_queries(no_object=weight)
        close(q.losses({}, f, t)[0]["class"], queries_by_loop(answers, f, t, weight)[0]["class"])


def test_losses_of_queries_hear_nothing_of_void_and_crowds_of_numbers_and_of_the_order_of_queries():
    q, answers, f, targets = case_of_queries()
    a, e, _ = q.losses({}, f, targets)
    known = torch.stack([truth_by_loop(t, CELLS)[1] for t in targets])[:, None]
    void = q.losses({}, torch.where(known > 0, f, f + 3), targets)[0]
    numbers, other, _ = q.losses({}, f, [renumbered(targets[0], [4, 2, 0, 5, 3, 1]), renumbered(targets[1], [1, 3, 2, 0])])
    order = [2, 0, 5, 4, 1, 3]
    q.answers = lambda pyramid, features: [(x[:, order], y[:, order]) for x, y in answers]
    permuted, same, _ = q.losses({}, f, targets)
    for name in a:
        close(void[name], a[name]), close(numbers[name], a[name]), close(permuted[name], a[name])
    assert torch.equal(other[0], e[0][[2, 0, 4, 3, 1]]) and torch.equal(same[0], e[0]) and not known.all()


@pytest.mark.parametrize("name", DEGENERATE)
def test_queries_of_degenerate_pictures_are_numbers_with_gradients(name):
    """Queries.losses: no segment, only crowd, only stuff, only things, a speck; "segments without a cell ... are not asked for"."""
    q, pyramid, features = queries(), pyramid_of(0, batch=2), randn(1, 2, 16, *CELLS).requires_grad_()
    for targets in ([DEGENERATE[name]] * 2, [DEGENERATE[name], STREET]):
        losses, embeddings, is_thing = q.losses(pyramid, features, targets)
        sum(losses.values()).backward()
        no_nan(losses, embeddings, features.grad, [p.grad for p in q.parameters() if p.grad is not None])
        if not name.startswith("a speck"):
            things, stuff = {"nothing": (0, 0), "crowd": (0, 0), "stuff": (0, 2), "things": (2, 0), "one pixel": (0, 0)}[name]     # no cell shows it
            assert (int(is_thing[0].sum()), int((~is_thing[0]).sum())) == (things, stuff) and embeddings[0].shape == (things + stuff, 16)
        assert is_thing[0].dtype == torch.bool and losses["class"] > 0
    assert features.grad.any()


def test_where_nothing_is_all_queries_learn_to_say_no_object():
    """Queries.losses, degenerate: class logits alone get a gradient, towards "no object", the last."""
    q, answers, f, _ = case_of_queries((DEGENERATE["nothing"], DEGENERATE["crowd"]))
    losses, _, _ = q.losses({}, f, [DEGENERATE["nothing"], DEGENERATE["crowd"]])
    sum(losses.values()).backward()
    assert losses["mask"] == 0 and losses["dice"] == 0
    for logits, e in answers:
        assert (logits.grad[..., 4] < 0).all() and (logits.grad[..., :4] > 0).all() and (e.grad is None or not e.grad.any())


def test_one_query_and_one_segment():
    """Queries, degenerate: N = 1; the self-attention of one is no NaN."""
    q, pyramid, f = queries(1), pyramid_of(0), randn(1, 1, 16, *CELLS)
    losses, e, thing = q.losses(pyramid, f, [painted((1, 4, 4, 20, 20))])
    no_nan(losses, e)
    assert e[0].shape == (1, 16) and thing[0].tolist() == [True]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("segments, n", [(5, 3), (4, 1), (6, 5)])
def test_of_more_segments_than_queries_the_best_matched_are_learnt(segments, n, seed):
    """Queries, a Choice: every query gets a segment, the cheapest assignment of all permutations of segments; the rest is let go."""
    logits, x = randn(seed, n, 5) * 2, randn(seed + 10, n, 4, 5)
    masks, known = (randn(seed + 20, segments, 4, 5) > 0).float(), torch.ones(4, 5)
    categories = torch.randint(4, (segments,), generator=seeded(seed))
    segment, query = queries().match(logits, x, categories, masks, known)
    costs = match_costs(logits, x, categories, masks.double(), known.double())
    want = best_match([list(row) for row in zip(*costs)], segments)          # of each query its segment
    assert segment.tolist() == sorted(want) and query.tolist() == [want.index(g) for g in sorted(want)]
    q = queries(1)
    losses, embeddings, _ = q.losses(pyramid_of(0), randn(1, 1, 16, *CELLS), [STREET])
    assert len(embeddings[0]) == 1 and all(v.isfinite() for v in losses.values())


def test_a_network_that_has_diverged_says_nan_and_does_not_hang():
    """Queries.match on NaN and infinities: the loss is NaN, for the trainer to see; assign by itself refuses them."""
    q, answers, features, targets = case_of_queries()
    with torch.no_grad():
        answers[0][1][0, 2] = math.nan
    assert sum(q.losses({}, features, targets)[0].values()).isnan()
    segment, query = queries(3).match(torch.zeros(3, 5), torch.full((3, 4, 4), math.inf), torch.tensor([1, 2]), torch.zeros(2, 4, 4), torch.ones(4, 4))
    assert len(set(query.tolist())) == 2
    for v in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="finite"):
            ibs.assign(np.array([[1., v], [0., 1.]]))


def test_queries_that_say_no_object_are_silent_at_test_time():
    """Queries.embed: those whose best class is an object, with its probability as their score; of the first picture, last layer."""
    q, answers, f, _ = case_of_queries()
    with torch.no_grad():
        answers[-1][0][0] = torch.tensor([[0., 0, 0, 0, 3], [4, 0, 0, 0, 3], [0, 0, 2, 0, 1], [9, 0, 0, 0, 9.1], [0, 1, 0, 0, 0], [0, 0, 0, -1, 5]])
        e, scores, categories = q.embed({}, f)
    p = answers[-1][0][0].softmax(1)
    assert categories.tolist() == [0, 2, 1] and torch.equal(e, answers[-1][1][0, [1, 2, 4]])
    close(scores, torch.stack([p[1, 0], p[2, 2], p[4, 1]]))


def test_no_query_may_name_an_object():
    """Queries.embed, degenerate."""
    q, answers, f, _ = case_of_queries()
    with torch.no_grad():
        answers[-1][0][..., 4] = 50.
        e, scores, categories = q.embed({}, f)
    assert e.shape == (0, 16) and scores.shape == categories.shape == (0,)


def test_all_parameters_of_the_queries_learn():
    """Queries: deep supervision reaches every weight."""
    q, f = queries(), randn(1, 2, 16, 16, 24)
    targets = [painted((0, 0, 0, 64, 96), (1, 8, 8, 40, 40), size=(64, 96)), painted((3, 0, 0, 64, 96), (2, 8, 8, 40, 40), size=(64, 96))]
    sum(q.losses(pyramid_of(0, (64, 96), 2), f, targets)[0].values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in q.parameters())
    assert sum(not p.grad.any() for p in q.parameters()) == 0


# --- Merging -------------------------------------------------------------------------------------------------------------

def merge_by_loop(logits, scores, categories, size, threshold, overlap, stuff_area=0.):
    """-> {(category, pixels)} and the scores of those of one mask; stuff of several masks has None."""
    n, (H, W) = len(logits), size
    x = F.interpolate(logits[:, None].double(), size, mode="bilinear", align_corners=False)[:, 0] if n and logits.shape[-2:] != size else logits.double()
    p, scores, won, own = x.sigmoid().tolist(), scores.tolist(), [set() for _ in range(n)], [0] * n
    able = [k for k in range(n) if scores[k] > threshold]
    for i, j in itertools.product(range(H), range(W)):
        for k in able:
            own[k] += p[k][i][j] > .5
        if able:
            k = max(able, key=lambda k: scores[k] * p[k][i][j])
            if p[k][i][j] > .5:
                won[k].add((i, j))
    out, stuff = {}, {}
    for k in able:
        if own[k] and len(won[k]) and len(won[k]) >= overlap * own[k]:
            c = int(categories[k])
            if ISTHING[c]:
                out[c, frozenset(won[k])] = scores[k]
            else:
                pixels, known = stuff.get(c, (set(), []))
                stuff[c] = pixels | won[k], known + [scores[k]]
    for c, (pixels, known) in stuff.items():
        if len(pixels) >= stuff_area:
            out[c, frozenset(pixels)] = known[0] if len(known) == 1 else None
    return out


def as_dict(segments, categories, scores):
    assert segments.dtype == torch.int64 and len(categories) == len(scores) and categories.dtype == torch.int64
    assert set(segments.flatten().tolist()) - {0} == set(range(1, len(categories) + 1))      # every one visible, no number left out
    return {(int(c), frozenset(map(tuple, torch.nonzero(segments == k + 1).tolist()))): float(s) for k, (c, s) in enumerate(zip(categories, scores))}


def same_merge(got, want):
    got = as_dict(*got)
    assert set(got) == set(want)
    for key, score in want.items():
        assert score is None or got[key] == pytest.approx(score, rel=1e-5)
    return got


@pytest.mark.parametrize("size", [(8, 16), (32, 64), (30, 61), (5, 7)])
@pytest.mark.parametrize("seed", range(3))
def test_merging_is_the_loop_over_pixels(seed, size):
    """merge: largest score times probability, above 1/2, overlap, one segment for each category of stuff; sizes of all kinds."""
    g = seeded(seed)
    logits = F.interpolate(torch.randn(1, 9, 3, 4, generator=g) * 6, CELLS, mode="bilinear")[0]
    scores, categories = torch.rand(9, generator=g), torch.randint(4, (9,), generator=g)
    some = 0
    for threshold, overlap, area in ((.3, .5, 0.), (.3, .5, 9.), (.1, .2, 0.), (.5, .9, 0.), (0., 0., 0.)):
        want = merge_by_loop(logits, scores, categories, size, threshold, overlap, area)
        got = ibs.merge(logits, scores, categories, ISTHING, size, threshold, overlap, area)
        assert got[0].shape == size
        some += len(same_merge(got, want))
    assert some > 5


def blocks(*columns, size=(4, 8)):
    """Logits of masks that hold the columns a..b: 9 inside, -9 outside."""
    out = torch.full((len(columns), *size), -9.)
    for k, (a, b) in enumerate(columns):
        out[k, :, a:b] = 9.
    return out


def merged(logits, scores, categories, threshold=.3, overlap=.5, area=0.):
    return ibs.merge(logits, torch.tensor(scores), torch.tensor(categories), ISTHING, tuple(logits.shape[-2:]), threshold, overlap, area)


def columns_of(result):
    """{(category, sorted columns)} of what was merged."""
    return sorted((c, sorted({x for _, x in pixels})) for c, pixels in as_dict(*result))


def test_a_segment_lives_if_it_keeps_half_of_its_pixels():
    """merge, overlap: the better one takes 2 of 4 columns, or 3 of 4; the pixels of a dead one are void."""
    assert columns_of(merged(blocks((0, 4), (2, 6)), [.9, .8], [1, 1])) == [(1, [0, 1, 2, 3]), (1, [4, 5])]
    segments, *_ = three = merged(blocks((0, 4), (1, 5)), [.9, .8], [1, 1])
    assert columns_of(three) == [(1, [0, 1, 2, 3])] and not segments[:, 4:].any()
    assert len(merged(blocks((0, 4), (1, 5)), [.9, .8], [1, 1], overlap=.25)[1]) == 2
    assert len(merged(blocks((0, 4), (0, 4)), [.9, .8], [1, 1], overlap=0.)[1]) == 1         # nothing is left of the second


def test_a_pixel_is_nobodys_where_its_best_mask_is_below_one_half():
    """merge: "the pixels where its own probability is above 1/2"."""
    x = blocks((0, 4), (4, 8))
    x[:, :, 3] = torch.tensor([[-.1], [-9.]])
    assert columns_of(merged(x, [.9, .8], [1, 2])) == [(1, [0, 1, 2]), (2, [4, 5, 6, 7])]


def test_scores_at_or_below_the_threshold_take_no_pixel_from_others():
    """merge: "among those above `score_threshold`"."""
    assert columns_of(merged(blocks((0, 8), (0, 4)), [.3, .31], [1, 2], threshold=.305)) == [(2, [0, 1, 2, 3])]
    assert columns_of(merged(blocks((0, 4)), [.2], [1])) == []


def test_stuff_of_two_masks_has_the_better_ones_score():
    """merge: a segment's score, whichever of its masks comes first."""
    logits = torch.full((2, 2, 4), -9.)
    logits[0, :, :2], logits[1, :, 2:] = 9., 9.
    for scores in ([.4, .9], [.9, .4]):
        _, categories, s = ibs.merge(logits, torch.tensor(scores), torch.tensor([3, 3]), ISTHING, (2, 4), .3, .5)
        assert categories.tolist() == [3] and s.tolist() == pytest.approx([.9])


def test_stuff_of_one_category_is_one_segment_and_things_are_not():
    """merge: two pieces of road are one road, two cars are two; also when the pieces overlap not at all."""
    assert columns_of(merged(blocks((0, 2), (5, 7)), [.9, .8], [0, 0])) == [(0, [0, 1, 5, 6])]
    assert columns_of(merged(blocks((0, 2), (5, 7)), [.9, .8], [0, 3])) == [(0, [0, 1]), (3, [5, 6])]
    assert columns_of(merged(blocks((0, 2), (5, 7)), [.9, .8], [1, 1])) == [(1, [0, 1]), (1, [5, 6])]


def test_small_stuff_is_void_and_small_things_are_not():
    """merge, `stuff_area`: 8 pixels at least; of both pieces together."""
    for area, n in ((8., 1), (8.5, 0)):
        assert len(merged(blocks((0, 2)), [.9], [0], area=area)[1]) == n
    assert len(merged(blocks((0, 2)), [.9], [1], area=100.)[1]) == 1
    assert len(merged(blocks((0, 2), (4, 6)), [.9, .8], [0, 0], area=16.)[1]) == 1


def test_merging_does_not_depend_on_the_order_of_masks():
    logits, scores, categories = F.interpolate(randn(2, 1, 7, 3, 4) * 6, CELLS, mode="bilinear")[0], torch.rand(7, generator=seeded(1)), torch.tensor([0, 1, 1, 2, 3, 0, 1])
    order = torch.tensor([4, 2, 6, 0, 5, 3, 1])
    a = as_dict(*ibs.merge(logits, scores, categories, ISTHING, (30, 45), .1, .3))
    b = as_dict(*ibs.merge(logits[order], scores[order], categories[order], ISTHING, (30, 45), .1, .3))
    assert set(a) == set(b) and len(a) > 2


@pytest.mark.parametrize("case", ["no mask", "zero masks", "empty masks", "low scores"])
def test_merging_nothing_gives_void(case):
    """merge, degenerate: N = 0; logits of 0 everywhere (nowhere above 1/2); masks that are empty; nobody sure of himself."""
    n = 0 if case == "no mask" else 3
    logits = torch.full((n, *CELLS), {"zero masks": 0., "empty masks": -20.}.get(case, 9.))
    scores = torch.full((n,), .1 if case == "low scores" else .9)
    segments, categories, s = ibs.merge(logits, scores, torch.ones(n, dtype=torch.int64), ISTHING, (30, 45), .3, .5)
    assert segments.shape == (30, 45) and segments.dtype == torch.int64 and not segments.any() and categories.shape == s.shape == (0,)


# --- 5.2 What lies outside of the crop ------------------------------------------------------------------------------------

def test_asking_for_outside_adds_a_row_for_every_segment_that_the_crop_does_not_show():
    """ask_outside: a picture of two stuff segments and five things, a crop of one and two."""
    target = painted((0, 0, 0, 32, 64), (1, 8, 16, 24, 32), (2, 0, 48, 20, 64), (1, 0, 0, 5, 5, "crowd"))
    more = ibs.ask_outside(target, torch.tensor([0, 3, 1, 1, 2, 1, 2]))
    assert sorted(more.categories[4:].tolist()) == [1, 1, 2, 3] and more.categories[:4].tolist() == target.categories.tolist()
    assert torch.equal(more.segments, target.segments) and more.crowd.tolist() == [False] * 3 + [True] + [False] * 4
    for k, width in (("boxes", 4), ("full_boxes", 4), ("truncated", 4)):
        assert getattr(more, k).shape == (8, width) and torch.equal(getattr(more, k)[:4], getattr(target, k))
        assert not getattr(more, k)[4:].any() and getattr(more, k).dtype == getattr(target, k).dtype
    whole = ibs.ask_outside(target, target.categories[:3])
    assert whole.categories.tolist() == target.categories.tolist()
    assert ibs.ask_outside(painted(), torch.tensor([2])).categories.tolist() == [2]


@pytest.mark.parametrize("outside", [False, True])
def test_only_an_uncorrected_network_gives_queries_to_what_is_outside(outside):
    """5.2: "removing ground-truth segments outside the cropped region ... these regions required a prediction"."""
    target = painted((0, 0, 0, 32, 64), (1, 8, 16, 24, 32))
    more = ibs.ask_outside(target, torch.tensor([0, 1, 1, 2]))
    q, answers, features, _ = case_of_queries([target], n=6, outside=outside)
    plain, with_more = (q.losses({}, features, [t]) for t in (target, more))
    assert len(plain[1][0]) == 2 and len(with_more[1][0]) == (4 if outside else 2)
    assert with_more[2][0].tolist() == ([False, True, True, True] if outside else [False, True])
    if not outside:
        assert all(torch.equal(plain[0][n], with_more[0][n]) for n in plain[0])
    else:                                                    # by loops: the segments outside have empty masks, and are named
        want, _ = queries_by_loop([(a.detach(), e.detach()) for a, e in answers], features.detach(), [more])
        for n in want:
            close(with_more[0][n], want[n], rtol=1e-4)


def test_a_network_of_things_only_is_not_asked_for_stuff():
    """6.4: instance segmentation.  The pixels of stuff count: no thing is there."""
    target = painted((0, 0, 0, 32, 64), (1, 8, 16, 24, 32), (2, 0, 48, 20, 64), (3, 20, 0, 30, 12))
    q, answers, features, _ = case_of_queries([target], n=6, things_only=True)
    losses, embeddings, is_thing = q.losses({}, features, [target])
    assert len(embeddings[0]) == 2 and is_thing[0].tolist() == [True, True]
    masks, known = truth_by_loop(target, CELLS)
    total = dict.fromkeys(losses, 0.)
    for logits, e in answers:
        x = torch.einsum("nc,chw->nhw", e[0].double(), features[0].double())
        chosen = best_match(match_costs(logits[0].detach(), x.detach(), target.categories[1:3], masks[1:3], known), 6)
        for g, n in enumerate(chosen):
            total["mask"] += 5 * entropy_of_cells(x[n], masks[1 + g], known) / 2
            total["dice"] += 5 * dice_of_cells(x[n], masks[1 + g], known) / 2
    close(losses["mask"], total["mask"], rtol=1e-4), close(losses["dice"], total["dice"], rtol=1e-4)


# --- What it costs --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["kernels", "queries"])
def test_the_ledger_counts_every_product_once(family):
    """6 of what it must show: parameters, and multiply-adds counted by hooks on layers; attention by its four projections and two
    products of N queries with hw keys."""
    net, size = net_of(family), (64, 96)
    got = ibs.ledger(net, size)
    assert next(net.parameters()).device.type == "cpu" and all(p.requires_grad for p in net.parameters())     # net is as it was
    assert {k: v[0] for k, v in got.items()} == {
        "body": sum(p.numel() for p in net.body.parameters()), "feature encoder": sum(p.numel() for p in net.encoder.parameters()),
        "embeddings": sum(p.numel() for p in net.family.parameters()), "embeddings x features": 0}
    work = collections.Counter()

    def hook(name):
        def count(m, _, out):
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                work[name] += out.numel() * m.weight[0].numel()
        return count
    parts = {"body": net.body, "feature encoder": net.encoder, "embeddings": net.family}
    handles = [m.register_forward_hook(hook(name)) for name, part in parts.items() for m in part.modules()
               if not isinstance(m, nn.modules.linear.NonDynamicallyQuantizableLinear)]
    with torch.no_grad():
        pyramid = net.eval().body(torch.zeros(1, 3, *size))
        features = net.encoder(pyramid)
        net.family.maps(pyramid) if family == "kernels" else net.family.answers(pyramid, features)
    for h in handles:
        h.remove()
    hw, n, c = 16 * 24, 10, 32
    if family == "queries":
        for k in range(3):
            keys = hw // 4 ** (3 - k)
            work["embeddings"] += n * c * hw                                  # the masks that a layer looks through
            work["embeddings"] += 2 * n * c * c + 2 * keys * c * c + 2 * n * keys * c           # cross attention
            work["embeddings"] += 4 * n * c * c + 2 * n * n * c                                 # among queries
    work["embeddings x features"] = (n if family == "queries" else net.family.detections) * c * hw
    assert {k: v[1] for k, v in got.items()} == dict(work)


# --- The parking lot ------------------------------------------------------------------------------------------------------

def test_a_parking_lot_is_full_of_large_look_alike_things():
    """Parking: what the confusion needs, counted on 60 pictures: things of 15 pixels and more (root of area), several of a kind."""
    lot = ibs.Parking(60, seed=3)
    things, sizes, alike = [], [], []
    for i in range(60):
        s = lot[i]
        assert s.image.shape == (3, 128, 256) and s.image.dtype == torch.float32 and 0 <= s.image.min() and s.image.max() <= 1
        area = torch.bincount(s.segments.flatten(), minlength=len(s.categories) + 1)
        assert len(area) == len(s.categories) + 1 and s.categories[:2].tolist() == [0, 1] and not s.crowd.any()
        assert (area[1:3] > 0).all() and (area[3:] >= lot.SMALLEST).all() and area[0] < 0.01 * 128 * 256
        things.append(len(area) - 3), sizes.extend(area[3:].float().sqrt().tolist()), alike.append(torch.bincount(s.categories[2:]).max().item())
    assert 15 < np.mean(things) < 22 and 24 < np.mean(sizes) < 34 and np.mean(alike) > 7


def test_vehicles_are_numbered_from_the_back_to_the_front_and_hide_what_is_behind():
    """Parking.paint: who is painted later lies before, lower in the picture; the picture shows each pixel's owner's colour."""
    s = ibs.Parking(9, seed=1)[4]
    boxes = data.mask_boxes(s.segments, len(s.categories))[2:]
    rows = boxes[:, 3]
    assert (rows.diff() < -15).sum() == 0 and rows.max() > 110 and rows.min() < 70
    hedge, ground = (s.image[:, s.segments == k] for k in (2, 1))
    assert hedge[1].mean() > hedge[0].mean() + .1 and (ground.mean(1) - ground.mean()).abs().max() < .02


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("left, bottom", [(10.3, 52.6), (-12.4, 47.1), (57.2, 70.9), (20.6, 21.2)], ids=["inside", "cut left", "cut right and below", "cut above"])
def test_a_vehicle_is_painted_pixel_by_pixel_as_it_is_drawn_here(kind, left, bottom):
    """Parking.paint, every pixel's centre by itself: body with a darker rim, glass, lamps, two tyres with a gap between them; a car
    leans in from .55 of its height to a roof of .7, a van from .7 to .85, a bus hardly; glass begins at .55, .65, .5."""
    image, owner = np.full((64, 80, 3), .3), np.full((64, 80), 7)
    width, height = 36.7, 31.9
    ibs.Parking(1).paint(image, owner, 9, kind, left, bottom, width, height, np.random.default_rng(5))
    knee, roof, glass = [(.55, .7, .55), (.7, .85, .65), (.92, .96, .5)][kind]
    r = np.random.default_rng(5)
    paint = np.array(colorsys.hsv_to_rgb(r.random(), r.uniform(.25, .75), r.uniform(.45, .95)))
    for y, x in itertools.product(range(64), range(80)):
        across, up = abs(x + .5 - (left + width / 2)) / (width / 2), (bottom - (y + .5)) / height
        half = 1 if up < knee else 1 - (1 - roof) * (up - knee) / (1 - knee)
        inside = across < half and 0 < up < 1
        if not inside or up < .16 and across <= .5:
            want, who = np.full(3, .3), 7
        else:
            who = 9
            if up < .16:
                want = np.full(3, .08)
            elif .63 < across < .87 and .3 < up < .42:
                want = np.array([.95, .95, .8])
            elif across < .85 * half and glass < up < .94:
                want = np.array([.15, .2, .25])
            else:
                want = paint * (.8 + .3 * up) * (.75 if across > half - .07 or up > .96 else 1)
        assert owner[y, x] == who and image[y, x] == pytest.approx(want, abs=1e-6), (y, x)


def test_pictures_of_a_parking_lot_depend_on_seed_and_number_alone():
    a, b, c = ibs.Parking(5, seed=1), ibs.Parking(50, seed=1), ibs.Parking(5, seed=2)
    assert torch.equal(a[3].image, b[3].image) and torch.equal(a[3].segments, b.labels(3)[0]) and not torch.equal(a[3].image, a[2].image)
    assert not torch.equal(a[3].image, c[3].image) and a[3].name != c[3].name
    with pytest.raises(IndexError):
        a[5]


def test_vehicles_of_a_kind_differ_in_paint():
    """Parking: "only paint, size and what hides them tell them apart"; without that no network could."""
    colours = []
    for i in range(20):
        s = ibs.Parking(20, seed=5)[i]
        colours += [s.image[:, s.segments == k].quantile(.8, dim=1) for k in range(3, len(s.categories) + 1)]
    assert torch.stack(colours).std(0).min() > .12


def test_the_embedding_of_a_vehicle_is_the_best_scored_that_covers_most_of_it():
    masks = torch.zeros(4, 4, 8, dtype=torch.bool)
    masks[0, :, :3], masks[1, :, :2], masks[2, :, 4:], masks[3, :, :1] = True, True, True, True
    truth = torch.zeros(4, 8, dtype=torch.bool)
    truth[:, :3] = True
    things = {"masks": masks, "scores": torch.tensor([.4, .6, .9, .95])}
    assert torch.equal(ibs.embedding_of(things, truth), masks[1]) and ibs.embedding_of(things, ~masks[0] & ~masks[2]) is None


@pytest.mark.parametrize("mode", ["full", "uniform", "paired"])
def test_batches_of_the_demo_hold_as_many_pixels_as_they_say(mode):
    """batches: six crops, pairs together, or two whole pictures; images and targets of one size."""
    import isus
    scenes = isus.Kept(ibs.Parking(6, seed=1))
    images, targets = next(ibs.batches(scenes, isus.build_index(scenes), mode))
    assert images.shape[:2] == ((2, 3) if mode == "full" else (6, 3)) and all(t.segments.shape == images.shape[2:] for t in targets)
    if mode == "full":
        assert 102 <= images.shape[2] <= 160 and images.shape[3] == pytest.approx(2 * images.shape[2], abs=2)
        assert all(len(t.categories) >= 10 for t in targets)
    else:
        assert images.shape[2:] == (80, 160)
        ids = [t.image_id for t in targets]
        assert mode == "uniform" or all(a != b for a, b in zip(ids[::2], ids[1::2]))


# --- The whole -----------------------------------------------------------------------------------------------------------

BIG = (64, 96)
NAMES = {"kernels": {"position", "mask"}, "queries": {"class", "mask", "dice"}}
FAMILIES = sorted(NAMES)


def street(shift=0, image_id=0, size=BIG):
    """A picture with its truth: sky over road, two things, a crowd, void at the bottom."""
    h, w = size
    target = painted((3, 0, 0, h // 2, w), (0, h // 2, 0, h - 4, w), (1, 20, 8 + shift, 44, 40 + shift), (2, 12, 60, 50, 80), (1, 0, 84, 10, 96, "crowd"),
                     size=size, image_id=image_id)
    colours = torch.tensor([[0, 0, 0], [.2, .5, .9], [.4, .4, .4], [.9, .1, .1], [.1, .8, .1], [.7, .7, 0]])
    return colours[target.segments].permute(2, 0, 1) + .05 * torch.rand(3, *size, generator=seeded(shift)), target


@functools.cache
def tiny():
    torch.manual_seed(0)
    return seamless.resnet_fpn("tiny", 32)


def net_of(family, seed=0, **how):
    body = copy.deepcopy(tiny())
    torch.manual_seed(seed)
    return ibs.UnifiedNet(ISTHING, body, family, 32, **({"queries": 10} if family == "queries" else {}) | how)


def batch(ids, size=BIG):
    images, targets = zip(*[street(4 * k, i, size) for k, i in enumerate(ids)])
    return torch.stack(images), list(targets)


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_zero_leaves_intra_batch_supervision_out(family):
    """UnifiedNet: "ibs_weight 0 turns intra-batch supervision off"; the other losses are the same to the bit."""
    images, targets = batch([0, 1])
    off, on, twice = (net_of(family, ibs_weight=w).losses(images, targets) for w in (0., 1., 2.))
    assert set(off) == NAMES[family] and set(on) == NAMES[family] | {"ibs"}
    assert all(off[n].item() == pytest.approx(on[n].item(), rel=1e-6) for n in off) and all(v.ndim == 0 for v in on.values())
    assert on["ibs"] > 0 and twice["ibs"].item() == pytest.approx(2 * on["ibs"].item(), rel=1e-5)
    no_nan(on)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_loss_of_the_embeddings_on_the_other_crops_features(family):
    """4.1: {E_1, F_2}, {E_2, F_1} in a batch of two; and it is nothing new at any other place of the network."""
    net, (images, targets) = net_of(family, ibs_weight=.7), batch([0, 1])
    pyramid = net.body(images)
    features = net.encoder(pyramid)
    losses, embeddings, is_thing = net.family.losses(pyramid, features, targets)
    got = net.losses(images, targets)
    close(got["ibs"], .7 * ibs.ibs_loss(embeddings, features, is_thing, torch.tensor([1, 0])))
    assert all(got[n].item() == pytest.approx(v.item(), rel=1e-5) for n, v in losses.items()) and features.shape == (2, 32, 16, 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_crops_of_one_picture_do_not_supervise_each_other(family):
    """4.1: "under the assumption that each object instance only occurs in one crop"."""
    net, (images, targets) = net_of(family, ibs_weight=1.), batch([5, 5])
    losses = net.losses(images, targets)
    assert losses["ibs"] == 0
    sum(losses.values()).backward()
    no_nan([p.grad for p in net.parameters() if p.grad is not None])
    images, targets = batch([5, 5, 6])                       # 0 and 1 meet 2; 2 meets 0 or 1
    pyramid = net.body(images)
    features = net.encoder(pyramid)
    _, e, thing = net.family.losses(pyramid, features, targets)
    allowed = [ibs.ibs_loss(e, features, thing, torch.tensor([2, 2, t])).item() for t in (0, 1)]
    torch.manual_seed(0)
    seen = {min((0, 1), key=lambda t: abs(allowed[t] - v)) for v in (net.losses(images, targets)["ibs"].item() for _ in range(12))
            if min(abs(a - v) for a in allowed) < 1e-5}
    assert seen == {0, 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_of_the_sampler_supervise_each_other(family):
    """4.2 and UnifiedNet, `paired`: crops 2 k and 2 k + 1, and no others."""
    net, (images, targets) = net_of(family, ibs_weight=1., paired=True), batch([0, 1, 2, 3])
    pyramid = net.body(images)
    features = net.encoder(pyramid)
    _, e, thing = net.family.losses(pyramid, features, targets)
    want = ibs.ibs_loss(e, features, thing, torch.tensor([1, 0, 3, 2])).item()
    assert [net.losses(images, targets)["ibs"].item() for _ in range(3)] == pytest.approx([want] * 3, rel=1e-5)
    images, targets = batch([0, 1, 2, 2])
    assert net.losses(images, targets)["ibs"].isfinite()


@pytest.mark.parametrize("family", FAMILIES)
def test_intra_batch_supervision_pushes_embeddings_and_features_and_nothing_else(family):
    """4.1: gradients reach encoder and body; nobody's name, nobody's heat."""
    net, (images, targets) = net_of(family, ibs_weight=1.), batch([0, 1])
    net.losses(images, targets)["ibs"].backward()
    touched = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(n.startswith("body") for n in touched) and any(n.startswith("encoder") for n in touched)
    silent = ("family.heat", "family.position") if family == "kernels" else ("family.name",)
    assert any(n.startswith("family") for n in touched) and not any(n.startswith(silent) for n in touched)
    assert any(n.startswith(silent) for n, _ in net.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_changes_at_test_time(family):
    """4: "should not require changes to the network architecture", "does not add any computational complexity during testing"."""
    off, on = net_of(family), net_of(family, ibs_weight=1.)
    assert {n: v.shape for n, v in off.state_dict().items()} == {n: v.shape for n, v in on.state_dict().items()}
    on.load_state_dict(off.state_dict())
    image, _ = street()
    heard = []
    for net in (off, on):
        net.eval(), net.family.__dict__.update(score_threshold=0.)
        heard.append(net.predict(image))
    a, b = heard
    assert torch.equal(a.segments, b.segments) and torch.equal(a.categories, b.categories) and torch.equal(a.scores, b.scores)
    assert set(a.instances) == set(b.instances) and all(torch.equal(v, b.instances[n]) for n, v in a.instances.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_all_parameters_learn(family):
    """UnifiedNet: a parameter without gradient would stop data-parallel training."""
    net, (images, targets) = net_of(family, ibs_weight=1.), batch([0, 1])
    sum(net.losses(images, targets).values()).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    no_nan([p.grad for p in net.parameters()])


@pytest.mark.parametrize("weight", [0., 1.])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_steps_on_one_picture_reduce_the_losses(family, weight):
    """UnifiedNet: eight steps of AdamW on two crops."""
    net, (images, targets) = net_of(family, ibs_weight=weight), batch([0, 1])
    optimiser, history = torch.optim.AdamW(net.parameters(), 1e-3), []
    for _ in range(8):
        losses = net.losses(images, targets)
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()
        history.append({n: v.item() for n, v in losses.items()})
    assert sum(history[-1].values()) < .8 * sum(history[0].values())
    assert all(history[-1][n] < history[0][n] for n in NAMES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_under_autocast_are_float32_and_near(family):
    """bf16 has 8 bits: a per cent or two, and no NaN; gradients of float32 weights are float32."""
    net, (images, targets) = net_of(family, ibs_weight=1.), batch([0, 1])
    exact = net.losses(images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net.losses(images, targets)
    sum(rough.values()).backward()
    for n, v in rough.items():
        assert v.dtype == torch.float32 and v.item() == pytest.approx(exact[n].item(), rel=.05)
    no_nan([p.grad for p in net.parameters() if p.grad is not None])
    net.eval()
    with torch.autocast("cpu", torch.bfloat16):
        p = net.predict(images[0])
    assert p.segments.shape == BIG and p.scores.isfinite().all()


@pytest.mark.parametrize("size", [(64, 96), (61, 75), (33, 64), (70, 47)])
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_any_size_learn_and_are_predicted(family, size):
    """UnifiedNet: sizes that are no multiples of 4 or 32."""
    net = net_of(family, ibs_weight=1.)
    (a, t), (b, u) = (street(k, k, (max(size[0], 50), max(size[1], 96))) for k in (0, 1))
    (a, t), (b, u) = (data.crop(data.Sample(image, v.segments, v.categories, v.crowd, ""), 0, 0, size, v.image_id) for image, v in ((a, t), (b, u)))
    losses = net.losses(torch.stack([a, b]), [t, u])
    sum(losses.values()).backward()
    no_nan(losses, [p.grad for p in net.parameters() if p.grad is not None])
    net.eval()
    p = net.predict(a)
    assert p.segments.shape == size and int(p.segments.max()) == len(p.categories) == len(p.scores)
    assert net.predict(a, (40, 30)).segments.shape == (40, 30)


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_degenerate_pictures_learn(family, name):
    """UnifiedNet: nothing to learn is no reason to stop; both pictures alike, or one of them."""
    net, images = net_of(family, ibs_weight=1.), torch.rand(2, 3, *SIZE, generator=seeded(0))
    for other in (DEGENERATE[name], STREET):
        losses = net.losses(images, [DEGENERATE[name], replace(other, image_id=1)])
        net.zero_grad()
        sum(losses.values()).backward()
        no_nan(losses, [p.grad for p in net.parameters() if p.grad is not None])
        assert set(losses) == NAMES[family] | {"ibs"} and (other is STREET or name in ("things", "one pixel") or losses["ibs"] == 0)


def said(net, embeddings, scores, categories, features, body=True):
    """`net` in evaluation mode whose family and encoder say this of any picture."""
    net.eval()
    net.family.embed = lambda pyramid, f: (embeddings, torch.tensor(scores), torch.tensor(categories, dtype=torch.int64))
    net.encoder.forward = lambda pyramid: features
    return net


def planted_picture():
    """Four embeddings that are unit vectors and features [4, 16, 24] with the masks of left, right, top and bottom."""
    f = torch.full((1, 32, 16, 24), -9.)
    f[0, 0, 8:, :8], f[0, 1, 8:, 10:], f[0, 2, :8], f[0, 3, 14:, 20:] = 9., 9., 9., 9.
    return torch.eye(32)[:4], f


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prediction_is_embeddings_times_features_merged(family):
    """3.1: "a matrix multiplication between embeddings E and features F, followed by a sigmoid activation"."""
    e, f = planted_picture()
    scores, categories = [.9, .8, .7, .6], [1, 2, 0, 1]
    net = said(net_of(family, stuff_area=0), e, scores, categories, f)
    for size in (None, (32, 48), (50, 33)):
        p = net.predict(torch.rand(3, *BIG, generator=seeded(0)), size)
        own = size or BIG
        want = merge_by_loop(torch.einsum("nc,chw->nhw", e, f[0]), torch.tensor(scores), torch.tensor(categories), own, .3, .5)
        same_merge((p.segments, p.categories, p.scores), want)
        assert p.segments.shape == own and len(want) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_instances_are_the_things_before_they_were_merged(family):
    """Prediction: masks bool [M, H, W], boxes [M, 4], scores and categories of things; also of those that merging drops."""
    e, f = planted_picture()
    net = said(net_of(family, stuff_area=0), e, [.9, .8, .7, .6], [1, 2, 0, 1], f)
    p = net.predict(torch.rand(3, *BIG, generator=seeded(0)))
    masks, boxes, scores, categories = (p.instances[n] for n in ("masks", "boxes", "scores", "categories"))
    assert masks.dtype == torch.bool and masks.shape == (3, *BIG) and boxes.shape == (3, 4) and scores.shape == (3,)
    assert sorted(zip(categories.tolist(), [round(s, 4) for s in scores.tolist()])) == [(1, .6), (1, .9), (2, .8)]
    x = F.interpolate(torch.einsum("nc,chw->nhw", e, f[0])[None], BIG, mode="bilinear")[0]
    for m, box, s in zip(masks, boxes, scores.tolist()):
        assert torch.equal(m, x[[.9, .8, .7, .6].index(round(s, 4))] > 0)
        ys, xs = torch.where(m)
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["no embedding", "only stuff", "only things", "empty masks"])
def test_predictions_of_nothing_are_void_and_of_one_kind_are_of_that_kind(family, case):
    """UnifiedNet.predict, degenerate."""
    e, f = planted_picture()
    rows = {"no embedding": [], "only stuff": [2], "only things": [0, 1], "empty masks": [0, 1]}[case]
    f = f * 0 - 9 if case == "empty masks" else f
    kinds = [[1, 2, 0, 1][r] for r in rows]
    p = said(net_of(family, stuff_area=0), e[rows], [.9] * len(rows), kinds, f).predict(torch.rand(3, *BIG, generator=seeded(0)))
    assert sorted(p.categories.tolist()) == ([] if case == "empty masks" else sorted(kinds)) and p.segments.shape == BIG
    assert p.segments.any() == (case in ("only stuff", "only things"))
    assert len(p.instances["masks"]) == len(p.instances["boxes"]) == len(p.instances["scores"]) == len(p.instances["categories"])
    no_nan(p.instances["boxes"])


@pytest.mark.parametrize("family", FAMILIES)
def test_thresholds_of_the_network_are_those_of_the_merging(family):
    """UnifiedNet(score_threshold, overlap, stuff_area)."""
    e, f = planted_picture()
    image = torch.rand(3, *BIG, generator=seeded(0))

    def count(**how):
        return len(said(net_of(family, **{"stuff_area": 0} | how), e, [.9, .8, .7, .6], [1, 2, 0, 1], f).predict(image).categories)
    assert count() == 3 and count(score_threshold=.75) == 2 and count(score_threshold=.85) == 1 and count(stuff_area=10**9) == 2
    assert count(overlap=0.) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_stuff_area_counts_pixels_at_1024x2048(family):
    """UnifiedNet(stuff_area), as seamless.py has it: stuff on half of the picture is there up to 2**20, at any size."""
    e, f = planted_picture()
    for size, (area, n) in itertools.product((BIG, (32, 48)), ((.98 * 2**20, 1), (1.02 * 2**20, 0))):
        p = said(net_of(family, stuff_area=area), e[2:3], [.9], [0], f).predict(torch.rand(3, *BIG, generator=seeded(0)), size)
        assert len(p.categories) == n


@pytest.mark.parametrize("family", FAMILIES)
def test_predicting_needs_no_gradient_and_leaves_the_weights_alone(family):
    net = net_of(family).eval()
    before = {n: v.clone() for n, v in net.state_dict().items()}
    p = net.predict(street()[0])
    assert not p.scores.requires_grad and all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    q = net.predict(street()[0], BIG)
    assert torch.equal(p.segments, q.segments)
