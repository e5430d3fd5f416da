"""The spec of ibs.py, lab/parking.py, lab/outside.py and the demo's pieces. Oracles are loops over
pixels, all allowed windows, counts of draws, slices of the unresized image. See test_unified.py."""
import collections
import itertools
import math
import types

import pytest
import torch
from torch.utils.data import DataLoader

import ibs
import isus
from claims import claim
from data import Category, Sample, collate, crop
from ibs import pick
from lab import demo_ibs, outside
from lab.parking import Parking

IDS = torch.tensor([5, 5, 7, 5, 9, 7])                         # images of six crops
PAIR = torch.tensor([1, 0])                                    # each of two crops meets the other


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def close(a, b, rel=1e-5, abs=0.0):
    a, b = (torch.as_tensor(v).item() for v in (a, b))
    assert a == pytest.approx(b, rel=rel, abs=abs)


def test_the_example_holds():
    close(ibs.example(), (27 / 64 * math.log(4) + 3 / 64 * math.log(4 / 3)) / 2)


# --- 4.1 The loss -----------------------------------------------------------------------------
def loss_by_loops(embeddings, features, is_thing, targets, alpha, gamma):
    """Lin et al. 2017 at truth 0, pixel by pixel: -(1 - alpha) p^gamma log(1 - p)."""
    masks = []
    for e, thing, target in zip(embeddings, is_thing, targets.tolist()):
        for row in e[thing] if target >= 0 else []:
            pixels = []
            for y, x in itertools.product(*map(range, features.shape[2:])):
                p = torch.sigmoid((row * features[target, :, y, x]).sum())
                pixels.append(-(1 - alpha) * p ** gamma * (1 - p).log())
            masks.append(sum(pixels) / len(pixels))
    return sum(masks) / max(len(masks), 1)


CASES = {"usual": ((3, 0, 2), (2, 3), [2, 0, 1]), "one pixel": ((2, 4), (1, 1), [1, 0]),
         "no target": ((2, 2), (3, 2), [-1, -1]), "one target": ((2, 3), (2, 2), [-1, 0]),
         "no segment": ((0, 0), (2, 2), [1, 0]), "a batch of one": ((3,), (2, 2), [-1])}


@claim("degeus2023", "4.1", "focal loss of masks of things on another crop towards zero",
       of="ibs_loss")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.5, 0.0), (0.1, 3.0)])
def test_the_loss_is_the_focal_loss_towards_zero_and_so_is_its_gradient(case, alpha, gamma):
    counts, size, targets = CASES[case]
    g, how = seeded(3), dict(dtype=torch.float64, requires_grad=True)
    embeddings = [torch.randn(n, 4, generator=g, **how) for n in counts]
    features = torch.randn(len(counts), 4, *size, generator=g, **how)
    case = (embeddings, features, [torch.rand(n, generator=g) < 0.7 for n in counts],
            torch.tensor(targets), alpha, gamma)
    truth, leaves = loss_by_loops(*case), [*embeddings, features]
    for loss in (ibs.ibs_loss(*case), ibs.plain_ibs_loss(*case)):
        close(loss, truth)
        if truth:
            first, second = (torch.autograd.grad(v, leaves, retain_graph=True,
                                                 materialize_grads=True) for v in (loss, truth))
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)


@claim("degeus2023", "4.1", "a confused mask costs, that of stuff does not", of="ibs_loss")
def test_a_planted_confusion_costs_and_its_gradient_separates_both_sides():
    """Thing 0 of crop 0 lights up the left half of crop 1, its stuff all of it, nothing else."""
    first = torch.tensor([[6.0, 0.0], [0.0, 6.0], [0.0, -6.0]], requires_grad=True)
    second = torch.tensor([[0.0, -6.0]], requires_grad=True)
    features = torch.ones(2, 2, 4, 8)
    features[:, 0] = -1
    features[1, 0, :, :4] = 1
    features.requires_grad_()
    is_thing = [torch.tensor([True, False, True]), torch.tensor([True])]
    loss = ibs.ibs_loss([first, second], features, is_thing, PAIR)
    loss.backward()
    close(loss, 0.75 * 6 / 2 / 3, rel=2e-2)                    # half of the pixels, one of 3 masks
    assert first.grad[0, 0] > 0 and first.grad[0].abs().sum() > 100 * first.grad[1:].abs().sum()
    left, right = features.grad[1, 0, :, :4], features.grad[1, 0, :, 4:]
    assert (left > 0).all() and right.abs().max() < 1e-3 * left.min()


def test_the_mean_of_two_kernels_hides_what_one_of_them_costs():
    kernels, features = torch.tensor([[10.0], [-30.0]]), torch.ones(2, 1, 1, 1)
    for e, cost in ((kernels, 3.75), (kernels.mean(0, keepdim=True), 7e-14)):
        close(ibs.ibs_loss([e, e], features, [torch.ones(len(e)).bool()] * 2, PAIR), cost, rel=0.05)


def test_an_extreme_logit_has_a_finite_gradient_whatever_gamma_is():
    for gamma, x in itertools.product((0.0, 0.5, 1.0, 2.0), (-120.0, 0.0, 120.0)):
        e, true = torch.tensor([[x]], requires_grad=True), torch.tensor([True])
        ibs.ibs_loss([e, e], torch.ones(2, 1, 1, 1), [true] * 2, PAIR, gamma=gamma).backward()
        assert e.grad.isfinite().all()


@pytest.mark.parametrize("things, targets, thing", [(3, [-1, -1], True), (3, [1, 0], False),
                                                    (0, [1, 0], True)])
def test_without_a_target_or_a_thing_the_loss_is_0_with_gradients(things, targets, thing):
    embeddings = [torch.ones(things, 4, requires_grad=True) for _ in range(2)]
    features = torch.ones(2, 4, 5, 6, requires_grad=True)
    loss = ibs.ibs_loss(embeddings, features, [torch.full((things,), thing)] * 2,
                        torch.tensor(targets))
    loss.backward()
    assert loss.item() == 0 and loss.shape == ()
    assert all(v.grad is not None and not v.grad.any() for v in (*embeddings, features))


# --- 4.1 Which crop meets which ---------------------------------------------------------------
@claim("degeus2023", "4.1", "the embeddings of a crop meet a random other crop", of="pick_targets")
def test_no_crop_is_its_own_target_nor_one_of_the_same_image():
    """2000 draws; all allowed pairs are drawn equally often, within five standard deviations."""
    assert torch.equal(ibs.pick_targets(IDS, seeded(1)), ibs.pick_targets(IDS, seeded(1)))
    counts, g = collections.Counter(), seeded(0)
    for _ in range(2000):
        counts.update(enumerate(ibs.pick_targets(IDS, g).tolist()))
    allowed = [(i, t) for i in range(6) for t in range(6) if IDS[i] != IDS[t]]
    assert set(counts) == set(allowed)
    for i, t in allowed:
        n = sum(a == i for a, _ in allowed)
        assert abs(counts[i, t] - 2000 / n) < 5 * math.sqrt(2000 / n * (1 - 1 / n))


@claim("degeus2023", "4.2", "IBS is applied between the two crops of a pair", of="pick_targets")
def test_crops_of_a_pair_are_each_others_targets():
    for ids, targets in (([1, 2, 3, 4], [1, 0, 3, 2]), ([1, 2, 4, 4, 5], [1, 0, -1, -1, -1])):
        assert ibs.pick_targets(torch.tensor(ids), paired=True).tolist() == targets


# --- 4.2 Crop sampling ------------------------------------------------------------------------
@claim("degeus2023", "4.2, step 4", "segments of a pair are resized to a similar size",
       of="common_size")
@pytest.mark.parametrize("first, second", [(10., 30.), (30., 10.), (20., 20.), (10., 40.),
                                           (10., 41.), (41., 10.)])
def test_the_common_size_is_uniform_among_those_that_both_can_reach(first, second):
    """Equal sizes if the limits allow it; otherwise the limits that bring them closest."""
    g, sizes = seeded(0), []
    for _ in range(1000):
        s, t = ibs.common_size(first, second, (0.5, 2.0), g)
        assert 0.5 - 1e-12 <= min(s, t) and max(s, t) <= 2 + 1e-12
        sizes.append((first * s, second * t))
    a, b = torch.tensor(sizes, dtype=torch.float64).T
    low, high = max(first, second) / 2, min(first, second) * 2
    if low > high:
        assert len(set(sizes)) == 1 and sorted(sizes[0]) == pytest.approx([high, low])
    else:
        assert torch.allclose(a, b) and abs(a.mean().item() - (low + high) / 2) < 0.7
        assert a.min() <= low + 0.02 * (high - low) and a.max() >= high - 0.02 * (high - low)


def allowed_starts(pixel, low, high, length, window):
    """All places inside of the image where a window contains the pixel, and the whole segment if
    there is room for one pixel more."""
    if window >= length:
        return [0]
    starts = [s for s in range(length - window + 1) if s <= pixel < s + window]
    if high - low <= window - 1:
        starts = [s for s in starts if s <= low and high <= s + window]
    return starts


@claim("degeus2023", "4.2, step 5", "the crop contains the segment", of="window_start")
def test_windows_contain_the_segment_at_a_random_place():
    g = seeded(4)
    for case in range(150):
        length, window = 1 + pick(15, g), 1 + pick(15, g)
        low, high = (torch.rand(2, generator=g) * length).sort().values.tolist()
        pixel = min(int(low + (high - low) * torch.rand((), generator=g)), length - 1)
        if case % 3 == 0:                                      # a segment of whole pixels
            low, high, pixel = int(low), int(low) + 1, int(low)
        allowed = allowed_starts(pixel, low, high, length, window)
        counts = collections.Counter(ibs.window_start(pixel, (low, high), length, window, g)
                                     for _ in range(120))
        assert set(counts) == set(allowed), (pixel, low, high, length, window)
        n = len(allowed)
        assert max(counts.values()) < 120 / n + 5 * math.sqrt(120 / n * (1 - 1 / n)) + 1


class Samples(list):
    """A data set with a category that occurs in its first image only, the bus."""
    categories = [Category("road", False, (0, 0, 0)), Category("car", True, (0, 0, 1)),
                  Category("person", True, (1, 0, 0)), Category("bus", True, (1, 1, 0))]

    def labels(self, i):
        return self[i].segments, self[i].categories, self[i].crowd


def rectangles(i):
    """Road with two cars, a person and a crowd of cars; of image 0 with a bus.
    Red is the column and green the row of a pixel: (x + 1) / 200, (y + 1) / 200."""
    g, (y, x) = seeded(i), torch.meshgrid(torch.arange(90), torch.arange(120), indexing="ij")
    segments, categories = torch.ones(90, 120, dtype=torch.int64), [0]
    for k, category in enumerate([1, 1, 2, 1] if i else [3]):
        h, w = 6 + pick(16, g), 6 + pick(30, g)
        top, left = 22 * k + pick(23 - h, g), pick(121 - w, g)
        segments[top:top + h, left:left + w] = k + 2
        categories.append(category)
    image = torch.stack([(x + 1) / 200, (y + 1) / 200, 0.0 * x])
    crowd = torch.arange(len(categories)) == 4
    return Sample(image, segments, torch.tensor(categories), crowd, str(i))


DATA = Samples(rectangles(i) for i in range(12))
INDEX = isus.build_index(DATA)


def sampler(size=(48, 64), data=DATA, **how):
    index = INDEX if data is DATA else isus.build_index(data)
    return ibs.PairedCropSampler(data, index, size, **how)


def native_segment(image, t):
    """The number of the chosen segment in its unresized image; the colours say where it was."""
    x, y = (200 * image[:2, t.segments == t.instance]).round().long() - 1
    k, = DATA[t.image_id].segments[y, x].unique().tolist()
    return k


@claim("degeus2023", "4.2, steps 1-3", "a pair shows a category of two images",
       of="PairedCropSampler")
def test_pairs_show_one_category_of_two_images():
    """300 pairs: categories, images and segments are uniform; no crowds; whole where it fits."""
    pairs, categories, cars, whole = sampler(seed=1, scale=(1, 1)), [], collections.Counter(), 0
    for p in range(300):
        pair = pairs.pair(p)
        assert len({t.image_id for _, t in pair}) == len(pair) == 2
        for image, t in pair:
            assert image.shape == (3, 48, 64) and t.instance > 0 and t.scale == 1
            k, native = native_segment(image, t), DATA[t.image_id]
            category = native.categories[k - 1].item()
            assert not native.crowd[k - 1]
            cars[t.image_id, k] += category == 1
            size = t.full_boxes[t.instance - 1].view(2, 2).diff(dim=0)[0]
            if size[0] <= 63 and size[1] <= 47:
                whole += 1
                assert not t.truncated[t.instance - 1].any()
        categories.append(category)
        assert {int(t.categories[t.instance - 1]) for _, t in pair} == {category}
    assert set(categories) == {1, 2} and abs(categories.count(1) - 150) < 44 and whole == 600
    seen = [n for n in cars.values() if n]
    assert len(seen) == 22 and max(seen) < 40                  # 11 images with two cars each


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_at_native_size_a_crop_is_a_slice_of_the_image(flip):
    for p, size in itertools.product(range(12), [(40, 40), (100, 30), (1, 1)]):
        for image, t in sampler(size, flip=flip, scale=(1, 1), seed=5).pair(p):
            x, y = (200 * image[:2, :90]).round().long() - 1   # the image has 90 rows
            assert (x.diff(dim=1) == (-1 if flip else 1)).all() and (y.diff(dim=0) == 1).all()
            label = DATA[t.image_id].segments[y, x]
            mask = t.segments == t.instance
            assert torch.equal(mask[:90], label == native_segment(image, t)) and mask.any()
            assert not t.segments[90:].any() and not image[:, 90:].any()


@claim("degeus2023", "4.2, step 4", "the segments of a pair have a similar size",
       of="PairedCropSampler")
def test_the_segments_of_a_pair_have_a_similar_size():
    """Windows larger than the image show segments whole: their areas are those after resizing."""
    lengths = {}
    for short_side in (0, 180):
        pairs = sampler((720, 960), seed=2, scale=(0.25, 4), short_side=short_side)
        for p in range(8):
            found = [(t.segments == t.instance).sum().item() ** 0.5 for _, t in pairs.pair(p)]
            close(*found, rel=0.12)
            lengths[short_side, p] = found[0]
    for p in range(8):                                         # sigma does not know short_side
        close(lengths[180, p] / lengths[0, p], 2, rel=0.12)


@pytest.mark.parametrize("measure", ["mask", "box"])
def test_stuff_is_drawn_if_asked_for_and_all_roads_have_a_box_of_one_size(measure):
    pairs = map(sampler(seed=2, stuff=True, measure=measure).pair, range(40))
    roads = [(a, b) for (_, a), (_, b) in pairs if a.categories[a.instance - 1] == 0]
    assert len(roads) > 5 and all((a.scale == b.scale) == (measure == "box") for a, b in roads)


def test_jitter_and_hue_change_colours_only():
    (plain, a), _ = sampler(seed=2).pair(0)
    for how in (dict(jitter=0.3), dict(hue=0.2)):
        (image, b), _ = sampler(seed=2, **how).pair(0)
        assert torch.equal(a.segments, b.segments) and not torch.equal(plain, image)


def test_batches_are_made_of_whole_pairs_that_depend_on_seed_and_number_alone():
    """One process, two ranks, two loading processes: the same pairs."""
    pairs = [sampler(seed=3).pair(p) for p in range(12)]

    def same(batch, numbers):
        images, targets = batch
        crops = [crop for p in numbers for crop in pairs[p]]
        assert torch.equal(images, torch.stack([image for image, _ in crops]))
        assert [t.image_id for t in targets] == [t.image_id for _, t in crops]

    same(sampler(seed=3, batch=4).batch(2), [4, 5])
    same(sampler(seed=3).batch(7), [7])
    for rank in (0, 1):
        same(sampler(seed=3, batch=4, rank=rank, world=2).batch(1), [4 + rank, 6 + rank])
    for workers in (0, 2):
        loader = DataLoader(sampler(seed=3, batch=4, start=2), batch_size=None,
                            num_workers=workers, generator=seeded(0))
        for b, batch in zip((2, 3, 4), loader):
            same(batch, [2 * b, 2 * b + 1])
    assert not torch.equal(sampler(seed=4).batch(0)[0], sampler(seed=3).batch(0)[0])


@pytest.mark.parametrize("how, sentence", [
    (dict(batch=3), "3 crops a process are not made of pairs"),
    (dict(batch=0), "take an even number"),
    (dict(scale=(2.0, 0.5)), "two positive factors, the smaller first"),
    (dict(scale=(0.0, 1.0)), "two positive factors"),
    (dict(scale=(1.0, math.inf)), "two positive factors"),
    (dict(data=Samples(DATA[:2])), "no category of things occurs in two images")])
def test_what_cannot_be_sampled_is_refused(how, sentence):
    with pytest.raises(ValueError, match=sentence):
        sampler(**how)


# --- The minimal network ----------------------------------------------------------------------
def painted(*rectangles, size=(32, 48), image_id=0):
    """Rectangles (category, top, left, bottom, right) on void; a sixth entry makes one a crowd."""
    segments = torch.zeros(size, dtype=torch.int64)
    for k, (_, y0, x0, y1, x1, *_) in enumerate(rectangles):
        segments[y0:y1, x0:x1] = k + 1
    categories = torch.tensor([r[0] for r in rectangles], dtype=torch.int64)
    crowd = torch.tensor([len(r) > 5 for r in rectangles], dtype=torch.bool)
    image = torch.rand(3, *size, generator=seeded(image_id))
    return crop(Sample(image, segments, categories, crowd, ""), 0, 0, size, image_id=image_id)


STREET = ((0, 0, 0, 32, 20), (1, 6, 4, 22, 18), (1, 8, 24, 32, 30), (2, 4, 32, 12, 46, "crowd"))


@claim("degeus2023", "3.1", "masks are the sigmoid of embeddings times features", of="MinimalNet")
def test_the_minimal_network_learns_masks_and_that_other_crops_have_none():
    images, targets = collate([painted(*STREET), painted(*STREET[:2], image_id=1)])
    net = ibs.MinimalNet([False, True, True], 8, ibs_weight=0.7)
    embeddings, features = net(images, [t.boxes[1:3] for t in targets])
    kernels = net.kernels(net.body(images))
    assert torch.equal(embeddings[0][0], kernels[0, :, 3, 2])  # the middle is y 14, x 11
    assert torch.equal(embeddings[0][1], kernels[0, :, 5, 6])  # y 20, x 27
    total = 0.0
    for b, t in enumerate(targets):
        for n, e in enumerate(embeddings[b]):
            for y, x in itertools.product(range(8), range(12)):
                segment = t.segments[4 * y + 2, 4 * x + 2].item()
                if segment in (1, 2, 3):                       # 0 is void, 4 is a crowd
                    x = (e * features[b, :, y, x]).sum() * (1 if segment == n + 2 else -1)
                    total -= torch.sigmoid(x).log() / (8 * 12) / 2
    losses = net.losses(images, targets)
    close(losses["mask"], total)
    true = [torch.ones(len(e)).bool() for e in embeddings]
    close(losses["ibs"], 0.7 * ibs.ibs_loss(embeddings, features, true, PAIR))
    losses["ibs"].backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@claim("degeus2023", "4", "trained on crops alone masks are confused; IBS separates them",
       of="MinimalNet", figure="ibs.png")
def test_two_cars_are_confused_without_supervision_and_told_apart_with_it():
    assert demo_ibs.two_cars(0.0) == ((100, 100), (100, 100))
    assert demo_ibs.two_cars(1.0) == ((0, 0), (100, 100))


# --- lab: what lies outside of the crop (5.2), parking lots, the demo -------------------------
@claim("degeus2023", "5.2", "segments outside of the crop required a prediction", of="ask_outside")
def test_a_network_without_the_correction_is_asked_for_all_segments_of_the_image():
    network = types.SimpleNamespace(family=types.SimpleNamespace(outside=False),
                                    losses=lambda images, targets: targets)
    images, targets = sampler((32, 32), scale=(1, 1)).batch(0)
    wrapped = outside.AskOutside(network, DATA)
    for t in wrapped.losses(images, targets):
        assert sorted(t.categories[~t.crowd].tolist()) == [0, 1, 1, 2]
    assert network.family.outside and min(len(t.categories) for t in targets) < 4
