"""The spec of adaptis.py: "AdaptIS: Adaptive Instance Selection Network" (Sofiiuk, Barinova, Konushin, ICCV 2019).

Oracles: loops over pixels, cells and points, the dense convolution of the concatenated map, breadth-first search, finite
differences, torch's own operators, and small models planted in place of the learned ones, whose every answer is known.
A share of n draws with probability p may be off by five of its standard deviations, sqrt(p (1 - p) / n).
"""
import itertools
import math
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import adaptis
from adaptis import (AdaIN, AdaptIS, Branch, Controller, InstanceSelection, OverlappingCells, RelativeCoordConv, Sample, UNet,
                     bilinear, binary_cross_entropy, focal_loss, local_maxima, normalized_focal_loss, sample_points,
                     segment_instances, segment_panoptic)

torch.set_num_threads(1)


# --- Material for the tests -----------------------------------------------------------------------------------------------

def seeded(seed):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def share_is(count, n, p):
    """Is count of n a likely outcome of probability p?"""
    return abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p))


def lively(module, seed=0):
    """Random weights and running statistics, so that no batch norm is the identity; eval mode."""
    g = seeded(seed)
    for name, p in itertools.chain(module.named_parameters(), module.named_buffers()):
        if p.is_floating_point():
            p.data = torch.randn(p.shape, generator=g) * 0.5 if "var" not in name else 0.5 + torch.rand(p.shape, generator=g)
    return module.eval()


def blocks(h, w, *boxes):
    """Segments: block (y0, x0, y1, x1) number k is segment k, later ones hide earlier ones."""
    s = torch.zeros(h, w, dtype=torch.long)
    for k, (y0, x0, y1, x1) in enumerate(boxes, 1):
        s[y0:y1, x0:x1] = k
    return s


def label(segments, categories, crowd=None):
    n = len(categories)
    return Sample(torch.zeros(3, *segments.shape), segments, torch.tensor(categories, dtype=torch.long),
                  torch.tensor(crowd if crowd is not None else [False] * n, dtype=torch.bool), "")


# --- 6 Toy data: overlapping cells -----------------------------------------------------------------------------------------

RIM, BODY = [np.asarray(c, float).reshape(3) for c in (OverlappingCells.RIM, OverlappingCells.BODY)]


def slow_paint(h, w, centre, angle, length, width):
    """Pixel by pixel: the signed distance to each rod, its coverage, and the colour of rim and body mixed over what was there."""
    image, owner = np.ones((3, h, w)), np.zeros((h, w), int)
    rim, body = RIM, BODY
    for k in range(len(angle)):
        ux, uy, half = math.cos(angle[k]), math.sin(angle[k]), (length[k] - width[k]) / 2
        for i, j in itertools.product(range(h), range(w)):
            dx, dy = j + 0.5 - centre[k, 0], i + 0.5 - centre[k, 1]
            if abs(dx) > 30 or abs(dy) > 30:
                continue
            t = max(-half, min(half, dx * ux + dy * uy))                                  # nearest place of the rod's axis
            d = math.hypot(dx - t * ux, dy - t * uy) - width[k] / 2
            coverage, inside = max(0.0, min(1.0, 0.5 - d)), max(0.0, min(1.0, 0.5 - (d + 1.6)))
            colour = inside * body + (1 - inside) * rim
            image[:, i, j] = coverage * colour + (1 - coverage) * image[:, i, j]
            if coverage >= 0.5:
                owner[i, j] = k + 1
    return image, owner


def many_cells(n=1500, **kwargs):
    data = OverlappingCells(1, **kwargs)
    return [data.cells(np.random.default_rng(i)) for i in range(n)]


def reach(angle, length, width):
    """How far a rod goes from its centre along x and y."""
    return np.abs(np.stack([np.cos(angle), np.sin(angle)], 1)) * ((length - width) / 2)[:, None] + width[:, None] / 2


def test_a_picture_depends_on_seed_and_index_alone():
    """Docstring of OverlappingCells: picture i depends on (seed, i) alone, whatever was looked at before."""
    a, b = OverlappingCells(6, seed=3), OverlappingCells(9, seed=3)
    forward = [a[i] for i in range(6)]
    for i in (5, 2, 0, 2):
        s = b[i]
        assert torch.equal(s.image, forward[i].image) and torch.equal(s.segments, forward[i].segments)
        assert torch.equal(s.categories, forward[i].categories) and s.name == forward[i].name
    torch.manual_seed(5), np.random.seed(5)
    assert torch.equal(OverlappingCells(1, seed=3)[0].image, forward[0].image)


def test_other_seeds_and_other_indices_give_other_pictures():
    """(seed, i), both: no picture of one seed comes back in another, not even shifted by one."""
    pictures = [OverlappingCells(4, seed=s)[i].image for s in range(4) for i in range(4)]
    for a, b in itertools.combinations(pictures, 2):
        assert not torch.equal(a, b)
    names = {OverlappingCells(4, seed=s)[i].name for s in range(2) for i in range(4)}
    assert len(names) == 8


@pytest.mark.parametrize("size, shape", [(96, (96, 96)), ((50, 70), (50, 70)), ((130, 50), (130, 50)), (160, (160, 160)), (50, (50, 50))])
@pytest.mark.parametrize("augment", [False, True])
def test_a_picture_keeps_to_the_vocabulary(size, shape, augment):
    """float32 in 0..1; segments int64, contiguous; segment 1 is the ground (stuff 0), the others cells (things 1), no crowds."""
    for i in range(3):
        s = OverlappingCells(3, size=size, augment=augment)[i]
        assert s.image.shape == (3, *shape) and s.image.dtype == torch.float32
        assert 0 <= s.image.min() and s.image.max() <= 1 and s.image.is_contiguous()
        n = len(s.categories)
        assert s.segments.shape == shape and s.segments.dtype == torch.int64 and s.categories.dtype == torch.int64
        assert set(range(1, n + 1)) <= set(s.segments.unique().tolist()) <= set(range(n + 1))
        assert s.categories.tolist() == [0] + [1] * (n - 1) and s.crowd.dtype == torch.bool and s.crowd.tolist() == [False] * n


def test_the_categories_are_ground_and_cell():
    """Ground is stuff and cells are things."""
    assert [c.isthing for c in OverlappingCells.categories] == [False, True] and len(OverlappingCells(7)) == 7


def test_painting_is_that_of_a_slow_painter():
    """Docstring of paint: coverage clip(1/2 - d, 0, 1), a rim 1.6 wide, later cells cover earlier ones."""
    data = OverlappingCells(1, size=(52, 60), count=(7, 7))
    for seed in range(2):
        cells = data.cells(np.random.default_rng(seed))
        image, owner = data.paint(*cells)
        slow_image, slow_owner = slow_paint(52, 60, *cells)
        assert image.shape == (3, 52, 60) and np.abs(image - slow_image).max() < 1e-5
        assert np.array_equal(owner, slow_owner)


def test_a_cell_on_the_border_of_a_larger_picture_is_painted_whole():
    """Painting measures a cell on 50x50 pixels of its own, also in the corners."""
    data = OverlappingCells(1, size=(64, 71))
    for x, y, angle in [(23.5, 5, 0.0), (5, 23.5, math.pi / 2), (71 - 23.5, 59, 0.0), (66, 64 - 23.5, math.pi / 2), (17.2, 17.2, 0.8),
                        (71 - 17.2, 64 - 17.2, 0.7), (35.3, 32.0, -1.0)]:
        cell = np.array([[x, y]]), np.array([angle]), np.array([45.0]), np.array([7.0])
        image, owner = data.paint(*cell)
        slow_image, slow_owner = slow_paint(64, 71, *cell)
        assert np.abs(image - slow_image).max() < 1e-5 and np.array_equal(owner, slow_owner) and owner.sum() > 250


def test_a_pixel_belongs_to_the_cell_that_covers_half_of_it():
    """Owner: coverage of at least one half, that is a signed distance of at most 0; here some pixels lie exactly there."""
    data = OverlappingCells(1, size=60)
    cell = np.array([[30.0, 30.5]]), np.array([0.0]), np.array([30.0]), np.array([8.0])       # rows 26.5 to 34.5, exactly
    _, owner = data.paint(*cell)
    assert np.flatnonzero(owner[:, 30]).tolist() == list(range(26, 35))
    cell = np.array([[30.0, 30.0]]), np.array([0.0]), np.array([30.0]), np.array([8.0])       # columns 15 to 45
    _, owner = data.paint(*cell)
    assert np.flatnonzero(owner[30]).tolist() == list(range(15, 45)) and np.flatnonzero(owner[:, 30]).tolist() == list(range(26, 34))


def test_nothing_painted_is_white_ground():
    """No object: an empty picture has one segment, the ground, and it is white without augmentation."""
    s = OverlappingCells(2, count=(0, 0), augment=False)[1]
    assert s.categories.tolist() == [0] and (s.segments == 1).all() and (s.image == 1).all()


def test_without_augmentation_colours_are_mixtures_of_ground_rim_and_body():
    """`augment` alone brings noise: without it every colour lies in the triangle of white, rim and body."""
    corners = np.stack([np.ones(3), RIM, BODY], 1)                                                            # [3 rgb, 3]
    image = OverlappingCells(1, augment=False)[0].image.flatten(1).double().numpy()
    weights = np.linalg.solve(corners, image)
    assert weights.min() > -1e-4 and np.abs(weights.sum(0) - 1).max() < 1e-3
    noisy = OverlappingCells(9, augment=True)[[i for i in range(9) if OverlappingCells(9)[i].image[:, 0, 0].lt(0.99).any()][0]]
    weights = np.linalg.solve(corners, noisy.image.flatten(1).double().numpy())
    assert np.abs(weights.sum(0) - 1).max() > 0.01


def test_the_segments_are_those_that_paint_shows_and_small_ones_are_void():
    """Choice: a cell with fewer than 30 visible pixels is void; ground and the other cells keep their pixels and their order."""
    data, seen = OverlappingCells(60, seed=1), 0
    for i in range(60):
        s, clean = data[i], OverlappingCells(60, seed=1, augment=False)[i]
        assert torch.equal(s.segments, clean.segments)                                              # noise changes no label
        segments, areas = s.segments, torch.bincount(s.segments.flatten(), minlength=len(s.categories) + 1)
        assert (areas[2:] >= 30).all()
        seen += int((areas[0] > 0) and (areas[0] < 30 * 22))
    assert seen > 5


@pytest.mark.parametrize("pixels", range(28, 32))
def test_thirty_pixels_are_an_object_and_twenty_nine_are_not(monkeypatch, pixels):
    """Choice: fewer than 30 pixels show -> void, not ground; exactly 30 are an object."""
    data = OverlappingCells(1, size=60, augment=False)

    def paint(*_):
        owner = np.zeros((60, 60), np.int64)
        owner[5:15, 5:15] = 1
        owner[20:20 + pixels, 40] = 2
        owner[50:58, 50:58] = 4                                                                        # the third one is hidden
        return np.ones((3, 60, 60), np.float32), owner
    monkeypatch.setattr(data, "paint", paint)
    monkeypatch.setattr(data, "cells", lambda _: (np.full((4, 2), 30.0), np.zeros(4), np.full(4, 30.0), np.full(4, 8.0)))
    s = data[0]
    kept = pixels >= 30
    assert s.categories.tolist() == [0] + [1] * (3 if kept else 2)
    assert (s.segments[20:20 + pixels, 40] == (3 if kept else 0)).all() and (s.segments[5:15, 5:15] == 2).all()
    assert (s.segments[50:58, 50:58] == (4 if kept else 3)).all() and (s.segments == 1).sum() == 3600 - 100 - 64 - pixels
    assert (s.segments == 0).sum() == (0 if kept else pixels)


def test_a_picture_is_the_painting_of_its_cells():
    """Labels against the slow painter: the cells come from the picture's own generator, found by watching `cells` and `paint`."""
    data, seen = OverlappingCells(3, size=(50, 55), count=(5, 8), augment=False), []
    paint = data.paint
    data.paint = lambda *cells: (seen.append(cells), paint(*cells))[1]
    for i in range(3):
        s = data[i]
        image, owner = slow_paint(50, 55, *seen[-1])
        assert np.abs(s.image.numpy() - image).max() < 1e-5
        expected, k = torch.ones(50, 55, dtype=torch.long), 1
        for cell in range(1, len(seen[-1][1]) + 1):
            shows = torch.from_numpy(owner == cell)
            k += int(shows.sum() >= 30)
            expected[shows] = k if shows.sum() >= 30 else 0
        assert torch.equal(s.segments, expected) and len(s.categories) == k


def test_labels_are_those_of_the_picture():
    """`labels(i)`: segments, categories, crowd of picture i."""
    data = OverlappingCells(4, seed=2)
    for i in (3, 0):
        segments, categories, crowd = data.labels(i)
        assert torch.equal(segments, data[i].segments) and torch.equal(categories, data[i].categories)
        assert torch.equal(crowd, data[i].crowd)


@pytest.mark.parametrize("count", [(8, 22), (3, 3), (1, 2), (0, 1)])
def test_the_number_of_cells_lies_within_count_and_both_ends_occur(count):
    """Section 6: "from 8 to 22 elongated objects", each number equally often."""
    n = 1500
    numbers = np.bincount([len(c[1]) for c in many_cells(n, count=count)], minlength=count[1] + 1)
    assert len(numbers) == count[1] + 1 and numbers[:count[0]].sum() == 0
    ways = count[1] - count[0] + 1
    assert all(share_is(k, n, 1 / ways) for k in numbers[count[0]:])


def test_cells_have_the_sizes_of_the_authors():
    """Choice: 20 to 45 pixels long, 7 to 11.5 wide, uniformly; directions are uniform."""
    for values, low, high in zip([np.concatenate([c[k] for c in many_cells()]) for k in (2, 3)], (20, 7), (45, 11.5)):
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low) and abs(values.std() - (high - low) / 12 ** 0.5) < 0.02 * (high - low)
    angle = np.concatenate([c[1][:1] for c in many_cells()])
    for k in (2, 4):                                                                       # no direction of a rod is preferred
        assert abs(np.exp(1j * k * angle).mean()) < 5 / math.sqrt(len(angle))


@pytest.mark.parametrize("size", [96, (50, 50), (60, 150)])
def test_cells_lie_wholly_inside(size):
    """Choice: cells lie wholly inside, with one pixel to spare, and may come that near to each side."""
    height, width = (size, size) if isinstance(size, int) else size
    low, high = [], []
    for centre, angle, length, thick in many_cells(800, size=size):
        r = reach(angle, length, thick)
        low.append(centre - r), high.append(np.array([width, height]) - centre - r)
    low, high = np.concatenate(low), np.concatenate(high)
    assert min(low.min(), high.min()) > 1 - 1e-6
    assert (low.min(0) < 1.2).all() and (high.min(0) < 1.2).all()


def test_centres_are_spread_over_the_whole_picture():
    """Section 6: "position and orientation of those objects are sampled at random": first cells are uniform where they fit."""
    share = []
    for centre, angle, length, thick in many_cells():
        r = reach(angle, length, thick)[0] + 1
        share.append((centre[0] - r) / (96 - 2 * r))
    share = np.array(share)
    assert share.min() > -1e-9 and share.max() < 1 + 1e-9 and np.abs(share.mean(0) - 0.5).max() < 5 * 0.29 / math.sqrt(len(share))
    assert np.abs(share.std(0) - 12 ** -0.5).max() < 0.02


def twins(cells):
    """(one, other) of neighbours in the order of painting with the very same size."""
    return [((c[i - 1], a[i - 1], l[i], w[i]), (c[i], a[i], l[i], w[i])) for c, a, l, w in cells for i in range(1, len(a)) if l[i] == l[i - 1]]


def is_mirrored(one, other):
    s = (one[1] + other[1]) % math.pi
    return min(s, math.pi - s) < 1e-9


def test_a_quarter_of_the_cells_are_twins_half_of_them_mirrored():
    """A cell is with probability 1/4 the twin of another one: same size; mirrored or turned, equally often."""
    cells = many_cells(1500)
    pairs = twins(cells)
    assert share_is(len(pairs), sum(len(c[1]) - 1 for c in cells), 0.25)
    assert share_is(sum(is_mirrored(*p) for p in pairs), len(pairs), 0.5)


def test_twins_have_nearly_the_same_centre():
    """Same size, nearly the same centre: about 1.5 pixels off, to all sides alike."""
    offsets = np.array([q[0] - p[0] for p, q in twins(many_cells())])
    assert np.abs(offsets.mean(0)).max() < 0.15 and np.abs(offsets.std(0) - 1.5).max() < 0.1
    assert np.abs(offsets).max() < 9


def test_twins_that_are_not_mirrored_are_turned_by_a_few_degrees():
    """Some seven degrees, either way."""
    turned = np.array([q[1] - p[1] for p, q in twins(many_cells()) if not is_mirrored(p, q)])
    assert abs(turned.mean()) < 0.02 and 0.11 < turned.std() < 0.13


def test_boxes_of_twins_nearly_coincide():
    """"Objects of very similar bounding boxes": boxes of mirrored twins have the same size, and twins' boxes a high IoU."""
    def box(cell):
        r = reach(*[np.array([v]) for v in cell[1:]])[0]
        return np.concatenate([cell[0] - r, cell[0] + r])
    ious = []
    for p, q in twins(many_cells(300)):
        a, b = box(p), box(q)
        if is_mirrored(p, q):
            assert np.allclose(a[2:] - a[:2], b[2:] - b[:2])
        inter = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
        ious.append(inter / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inter))
    assert np.median(ious) > 0.75 and np.mean(np.array(ious) > 0.5) > 0.9


def test_noise_is_partly_grey_and_partly_coloured_and_some_pictures_are_clean():
    """Docstring of disturb, on flat grey pictures, which blur does not change: correlation of colours, strengths, mean."""
    data, deviations, correlations = OverlappingCells(1, size=50), [], []
    for seed in range(300):
        noise = data.disturb(np.full((3, 50, 50), 0.5, np.float32), np.random.default_rng(seed)).astype(float) - 0.5
        deviations.append(noise.std())
        if 1e-3 < noise.std() < 0.15:                                                              # where clipping is rare
            flat = noise.reshape(3, -1)
            correlations.append(np.corrcoef(flat)[np.triu_indices(3, 1)].mean())
            assert np.abs(flat.mean(1)).max() < 0.02 and abs((noise[:, 1:] * noise[:, :-1]).mean()) < 0.2 * (noise ** 2).mean()
    deviations = np.array(deviations)
    assert 0.08 < (deviations < 1e-4).mean() < 0.3 and 0.25 < deviations.max() < 0.35
    assert 0.4 < np.mean(correlations) < 0.6 and min(correlations) < 0.05 and max(correlations) > 0.95


def test_blur_is_a_gaussian_of_up_to_one_pixel():
    """Docstring of disturb: a single bright pixel in pictures without noise becomes a Gaussian, which keeps its sum."""
    data, sigmas = OverlappingCells(1, size=50), []
    for seed in range(400):
        dot = np.full((3, 50, 50), 0.2, np.float32)
        if data.disturb(np.full((3, 50, 50), 0.2, np.float32), np.random.default_rng(seed)).std() > 1e-4:
            continue
        dot[:, 20, 30] = 0.9
        out = (data.disturb(dot, np.random.default_rng(seed)).astype(float) - 0.2) / 0.7
        assert abs(out[0].sum() - 1) < 1e-3 and np.allclose(out[0], out[2], atol=1e-5)
        ratio = out[0, 20, 31] / out[0, 20, 30]
        if ratio > 1e-3:
            sigmas.append(math.sqrt(-0.5 / math.log(ratio)))
            for dy, dx in itertools.product(range(-2, 3), repeat=2):
                assert abs(out[0, 20 + dy, 30 + dx] - out[0, 20, 30] * ratio ** (dx * dx + dy * dy)) < 3e-3
        else:
            sigmas.append(0)
    sigmas = np.array(sigmas)
    assert 0.9 < sigmas.max() <= 1 + 1e-3 and 0.2 < (sigmas == 0).mean() < 0.7


def test_noise_stays_within_the_range_of_an_image():
    """float32, 0..1, also where white meets the strongest noise, and both ends are reached."""
    data = OverlappingCells(1, size=50)
    out = [data.disturb(np.full((3, 50, 50), v, np.float32), np.random.default_rng(s)) for s in range(20) for v in (0, 0.5, 1)]
    assert min(o.min() for o in out) == 0 and max(o.max() for o in out) == 1 and all(o.dtype == np.float32 for o in out)


@pytest.mark.parametrize("kwargs", [dict(size=49), dict(size=(49, 96)), dict(size=(96, 49)), dict(count=(5, 4)), dict(count=(-1, 4))])
def test_pictures_too_small_for_a_cell_are_refused(kwargs):
    """A cell of 45 pixels needs a side of 50; count is (fewest, most)."""
    with pytest.raises(ValueError):
        OverlappingCells(1, **kwargs)[0]


@pytest.mark.parametrize("i", [3, -1, 100])
def test_a_picture_out_of_range_is_an_index_error(i):
    """A sequence of samples: `for sample in data` ends."""
    data = OverlappingCells(3, size=50)
    with pytest.raises(IndexError):
        data[i]
    with pytest.raises(IndexError):
        data.labels(i)
    assert len(list(data)) == 3


def test_fifty_pictures_are_painted_within_a_second():
    """Nothing needs to be stored."""
    data, best = OverlappingCells(50), 9
    for _ in range(3):
        start = time.process_time()
        for i in range(50):
            data[i]
        best = min(best, time.process_time() - start)
        if best < 1:
            break
    assert best < 1


# --- 3 Point proposals: Q(x, y) --------------------------------------------------------------------------------------------

def loop_bilinear(features, points, stride):
    """Weights of the four centres around the point, which is moved to the outermost centres first."""
    b, c, h, w = features.shape
    out = torch.zeros(b, points.shape[1], c, dtype=features.dtype)
    for n, k in itertools.product(range(b), range(points.shape[1])):
        x, y = (float(v) / stride - 0.5 for v in points[n, k])
        x, y = max(0.0, min(w - 1.0, x)), max(0.0, min(h - 1.0, y))
        for i, j in itertools.product(range(h), range(w)):
            out[n, k] += features[n, :, i, j] * max(0.0, 1 - abs(x - j)) * max(0.0, 1 - abs(y - i))
    return out


@pytest.mark.parametrize("h, w, stride", [(5, 7, 1), (5, 7, 2), (4, 3, 4), (1, 1, 2), (1, 6, 2), (3, 1, 8)])
def test_bilinear_is_the_mean_of_the_four_centres_around_a_point(h, w, stride):
    """Section 3: "for each point (x, y) we obtain the corresponding embedding with bilinear interpolation"."""
    features = randn(2, 3, h, w, seed=h)
    points = (rand(2, 40, 2, seed=w) * 1.2 - 0.1) * torch.tensor([w, h]) * stride              # some are outside
    assert torch.allclose(bilinear(features, points, stride), loop_bilinear(features, points, stride), atol=1e-5)


def test_bilinear_is_exact_at_the_centres_of_cells():
    """The centre of cell (i, j) is pixel place ((j + .5) stride, (i + .5) stride)."""
    features = randn(1, 3, 4, 6)
    for stride in (1, 2, 4):
        points = torch.tensor([[(j + 0.5) * stride, (i + 0.5) * stride] for i in range(4) for j in range(6)])[None]
        assert torch.allclose(bilinear(features, points, stride)[0].T.reshape(3, 4, 6), features[0], atol=1e-5)


def test_beyond_the_outermost_centres_the_map_goes_on_unchanged():
    """The corners of the picture read the corner cells."""
    features = randn(1, 2, 3, 5)
    out = bilinear(features, torch.tensor([[[0.0, 0.0], [10.0, 0.0], [0.0, 6.0], [10.0, 6.0], [-9.0, 3.0]]]), 2)[0]
    expected = torch.stack([features[0, :, i, j] for i, j in [(0, 0), (0, 4), (2, 0), (2, 4), (1, 0)]])
    assert torch.allclose(out, expected, atol=1e-5)


def test_bilinear_lets_the_gradient_through_to_the_features():
    """"The gradient propagates to all components of AdaptIS and to the backbone"."""
    features, points, weight = randn(2, 2, 3, 4).requires_grad_(), rand(2, 5, 2) * torch.tensor([8.0, 6.0]), randn(2, 5, 2, seed=3)
    grad, slow = [torch.autograd.grad((f(features, points, 2) * weight).sum(), features)[0] for f in (bilinear, loop_bilinear)]
    assert torch.allclose(grad, slow, atol=1e-5) and grad.abs().sum() > 1


# --- 3 Instance selection: AdaIN, relative coordinates, controller -----------------------------------------------------------

def test_adain_is_its_definition():
    """Scale (x - mean) / std + shift, mean and standard deviation over the places of each channel of each sample."""
    x, scale, shift = randn(3, 4, 5, 6, dtype=torch.float64) * 3 + 2, randn(3, 4, seed=1).double(), randn(3, 4, seed=2).double()
    out = AdaIN()(x, scale, shift)
    for n, c in itertools.product(range(3), range(4)):
        v = x[n, c].flatten().tolist()
        mean = sum(v) / 30
        std = math.sqrt(sum((a - mean) ** 2 for a in v) / 30 + 1e-5)
        for i, j in itertools.product(range(5), range(6)):
            assert abs(out[n, c, i, j].item() - (scale[n, c].item() * (x[n, c, i, j].item() - mean) / std + shift[n, c].item())) < 1e-6


def test_after_adain_each_channel_has_the_given_mean_and_deviation():
    """"One can vary the network output for the same input by providing different parameters to AdaIN"."""
    x, scale, shift = randn(2, 3, 8, 9) * 50 + 7, randn(2, 3, seed=1), randn(2, 3, seed=2)
    out = AdaIN()(x, scale, shift)
    assert torch.allclose(out.mean((2, 3)), shift, atol=1e-4)
    assert torch.allclose(out.flatten(2).std(2, unbiased=False), scale.abs(), atol=1e-4)


def test_adain_of_a_constant_map_is_the_shift():
    """Degenerate: no deviation at all, one place alone."""
    shift = randn(2, 3)
    assert torch.allclose(AdaIN()(torch.full((2, 3, 4, 4), 5.0), torch.ones(2, 3), shift), shift[..., None, None].expand(2, 3, 4, 4), atol=1e-4)
    assert torch.allclose(AdaIN()(randn(2, 3, 1, 1), torch.ones(2, 3), shift)[..., 0, 0], shift, atol=1e-4)


def test_adain_does_not_mix_samples_or_channels_and_keeps_no_state():
    """Training and evaluation are the same."""
    x, scale, shift = randn(3, 2, 4, 4), randn(3, 2, seed=1), randn(3, 2, seed=2)
    ada = AdaIN()
    whole = ada(x, scale, shift)
    assert torch.allclose(ada.eval()(x[1:2], scale[1:2], shift[1:2]), whole[1:2], atol=1e-6)
    assert torch.allclose(ada(x[:, 1:], scale[:, 1:], shift[:, 1:]), whole[:, 1:], atol=1e-6) and not list(ada.parameters())


def test_adain_has_the_gradient_of_its_formula():
    """By x, by scale and by shift."""
    args = [randn(2, 2, 3, 3, dtype=torch.float64), randn(2, 2, seed=1, dtype=torch.float64), randn(2, 2, seed=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(AdaIN(), [a.requires_grad_() for a in args])


@pytest.mark.parametrize("radius, stride", [(8, 1), (8, 2), (5, 4), (280, 2)])
def test_relative_coordinates_are_their_definition(radius, stride):
    """Section 3: "-1 corresponds to x - R and +1 corresponds to x + R"; x comes first."""
    points, corners, (h, w) = rand(4, 2) * 30, torch.tensor([[0, 0], [4, 8], [12, 0], [8, 16]]), (5, 7)
    out = RelativeCoordConv(radius, stride)(points, corners, (h, w))
    assert out.shape == (4, 2, h, w)
    for n, i, j in itertools.product(range(4), range(h), range(w)):
        x, y = corners[n, 0].item() + (j + 0.5) * stride, corners[n, 1].item() + (i + 0.5) * stride
        expected = [max(-1, min(1, (v - p.item()) / radius)) for v, p in ((x, points[n, 0]), (y, points[n, 1]))]
        assert torch.allclose(out[n, :, i, j], torch.tensor(expected, dtype=torch.float32), atol=1e-5)


def test_relative_coordinates_are_zero_at_the_point_and_end_at_one_radius():
    """Beyond R all places look alike: exactly +-1."""
    out = RelativeCoordConv(3, 1)(torch.tensor([[4.5, 2.5]]), torch.zeros(1, 2, dtype=torch.long), (6, 12))[0]
    assert torch.allclose(out[0, 0], torch.tensor([-1, -1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1, 1, 1, 1, 1]), atol=1e-6)
    assert torch.allclose(out[1, :, 0], torch.tensor([-2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1]), atol=1e-6)
    assert out.min() == -1 and out.max() == 1


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (0, 5)])
def test_the_controller_gives_scale_and_shift(shape):
    """Q [..., channels] -> scale and shift [..., outputs], halves of one "characteristic vector" of three linear layers."""
    controller = lively(Controller(5, 7, hidden=11))
    q = randn(*shape)
    scale, shift = controller(q)
    assert scale.shape == shift.shape == (*shape[:-1], 7)
    linears = [m for m in controller.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == [(5, 11), (11, 11), (11, 14)]
    v = q
    for k, m in enumerate(linears):
        v = v @ m.weight.T + m.bias
        v = v.clamp(min=0) if k < 2 else v
    whole = torch.cat([scale, shift], -1)
    first, second = v[..., :7], v[..., 7:]
    off = whole - v                                                               # a fixed offset of the scale (1, say) is free
    assert torch.allclose(off[..., 7:], torch.zeros_like(second), atol=1e-4)
    assert first.numel() == 0 or torch.allclose(off[..., :7], off.flatten()[0].expand_as(first), atol=1e-4)


def test_a_convolution_comes_before_the_relu_and_the_relu_before_the_norm():
    """Figure 8: "Each conv layer is followed by ReLU activation and BatchNorm"; sizes stay."""
    for kernel in (1, 3):
        layer = lively(adaptis.conv(3, 4, kernel) if kernel == 1 else adaptis.conv(3, 4))
        c, bn = [next(m for m in layer.modules() if isinstance(m, t)) for t in (nn.Conv2d, nn.BatchNorm2d)]
        x = randn(2, 3, 5, 6)
        y = F.conv2d(x, c.weight, c.bias, padding=kernel // 2).clamp(min=0)
        s = bn.weight / (bn.running_var + bn.eps).sqrt()
        assert torch.allclose(layer(x), y * s[:, None, None] + (bn.bias - bn.running_mean * s)[:, None, None], atol=1e-5)
        assert c.kernel_size == (kernel, kernel)


# --- 3 The instance selection network ------------------------------------------------------------------------------------------

def head(stride=2, window=(8, 12), coordinates=True, radius=9, seed=0, blocks=1, adains=1):
    return lively(InstanceSelection(4, stride, width=5, blocks=blocks, window=window, radius=radius, coordinates=coordinates,
                                    adains=adains), seed)


def norm(x, bn):
    s = bn.weight / (bn.running_var + bn.eps).sqrt()
    return x * s[:, None, None] + (bn.bias - bn.running_mean * s)[:, None, None]


def dense(m, features, point, corner, size, stride, radius, coordinates=True):
    """One point of one picture, [C, h, w]: the first convolution on the whole concatenated map, then the window alone."""
    c, h, w = features.shape
    x = (torch.arange(w) + 0.5) * stride
    y = (torch.arange(h) + 0.5) * stride
    maps, kernel = features, m.share.weight
    if coordinates:
        place = torch.stack([((x - point[0]) / radius).clamp(-1, 1).expand(h, w), ((y - point[1]) / radius).clamp(-1, 1)[:, None].expand(h, w)])
        maps = torch.cat([features, place])
        kernel = torch.cat([kernel, F.pad(m.place.weight, (1, 1, 1, 1))], 1)              # a 1x1 kernel is the middle of a 3x3 one
    z = F.conv2d(maps[None], kernel, m.share.bias, padding=1)[0]
    z = z[:, corner[1]:corner[1] + size[0], corner[0]:corner[0] + size[1]].clamp(min=0)
    scale, shift = m.controller(loop_bilinear(features[None], point[None, None], stride)[0, 0])
    scale, shift = scale.reshape(-1, 5, 1, 1), shift.reshape(-1, 5, 1, 1)
    for k in range(len(scale)):
        if k:
            z = F.conv2d(z[None], m.adapted[k - 1].weight, m.adapted[k - 1].bias, padding=1)[0].clamp(min=0)
        mean, var = z.mean((1, 2), keepdim=True), z.var((1, 2), keepdim=True, unbiased=False)
        z = scale[k] * (z - mean) / (var + 1e-5).sqrt() + shift[k]
    for layer in m.layers[:-1]:
        z = norm(F.conv2d(z[None], layer[0].weight, layer[0].bias, padding=1)[0].clamp(min=0), layer[2])
    z = F.conv2d(z[None], m.layers[-1].weight, m.layers[-1].bias)[0]                       # [stride^2, h, w]
    out = torch.zeros(size[0] * stride, size[1] * stride)
    for i, j in itertools.product(range(out.shape[0]), range(out.shape[1])):
        out[i, j] = z[(i % stride) * stride + j % stride, i // stride, j // stride]
    return out


@pytest.mark.parametrize("stride, window, coordinates, blocks, adains", [
    (2, (8, 12), True, 1, 1), (2, None, True, 2, 1), (1, (5, 3), True, 1, 2), (2, (8, 8), False, 1, 1), (4, (99, 99), True, 3, 1),
    (2, (8, 99), True, 3, 2), (2, (8, 8), True, 2, 3)])
def test_the_head_is_the_dense_network_on_the_concatenated_map(stride, window, coordinates, blocks, adains):
    """Section 3, Figure 4: features and coordinates are concatenated; conv, AdaIN by the controller of Q(x, y), conv, mask."""
    m = head(stride, window, coordinates, blocks=blocks, adains=adains)
    assert len(m.adapted) == adains - 1 and len(m.layers) == blocks + 2 - adains
    features = randn(2, 4, 7, 9)
    points = torch.cat([rand(2, 6, 2, seed=3) * torch.tensor([9.0, 7.0]) * stride,
                        torch.tensor([[[0.1, 0.2], [9 * stride - 0.1, 7 * stride - 0.1]]]).expand(2, 2, 2)], 1)
    with torch.no_grad():
        logits, corners = m(features, points)
        cells, size = m.corners(points.reshape(-1, 2), (7, 9))
        assert torch.equal(corners.long(), cells.long() * stride) and logits.shape == (16, size[0] * stride, size[1] * stride)
        for n in range(16):
            expected = dense(m, features[n // 8], points[n // 8, n % 8], cells[n].long().tolist(), size, stride, 9, coordinates)
            assert torch.allclose(logits[n], expected, atol=2e-4)


@pytest.mark.parametrize("stride, window, cells", [(2, (8, 12), (4, 6)), (2, (7, 11), (4, 6)), (2, (1, 2), (1, 1)), (4, (9, 8), (3, 2)),
                                                   (1, (5, 6), (5, 6)), (2, (40, 41), (20, 21)), (2, (100, 10), (20, 5)), (2, (39, 200), (20, 30))])
def test_a_window_has_its_size_and_the_point_in_its_middle_and_lies_inside(stride, window, cells):
    """A window of ceil(window / stride) cells, never more than the map; it is moved inside where it would reach beyond."""
    m, (h, w) = head(stride, window), (20, 30)
    points = torch.cat([rand(300, 2) * torch.tensor([w, h]) * stride, torch.tensor([[0.0, 0.0], [w * stride - 0.01, h * stride - 0.01]]),
                        torch.tensor([[x * stride / 4, 5.0 * stride] for x in range(4 * w)])])
    corners, size = m.corners(points, (h, w))
    assert tuple(size) == cells and corners.shape == points.shape and not corners.is_floating_point()
    for (x, y), corner in zip((points / stride).tolist(), corners.tolist()):
        for p, c, n, full in ((x, corner[0], cells[1], w), (y, corner[1], cells[0], h)):
            assert 0 <= c <= full - n and c <= p <= c + n
            low, high = p - n / 2 - 0.5 - 1e-4, p - n / 2 + 0.5 + 1e-4                        # the free choice of the corner
            assert low <= c <= high or (c == 0 and high < 0) or (c == full - n and low > full - n)


def test_without_a_window_the_head_sees_the_whole_map():
    """`window=None` is the paper's own head."""
    m = head(window=None)
    corners, size = m.corners(rand(5, 2) * 10, (6, 9))
    assert tuple(size) == (6, 9) and corners.tolist() == [[0, 0]] * 5


@pytest.mark.parametrize("blocks, adains", [(1, 0), (1, 3), (3, 5), (3, -1)])
def test_adain_follows_at_least_the_first_layer_and_at_most_all(blocks, adains):
    """Choice: "AdaIN after the first `adains` layers of all", `blocks` + 1: another number is an error."""
    with pytest.raises(ValueError):
        head(blocks=blocks, adains=adains)
    assert head(blocks=3, adains=4).controller(torch.zeros(4))[0].shape == (20,)


def test_a_window_larger_than_the_picture_is_the_picture():
    """Degenerate: picture smaller than the window: the same answer as the head without a window."""
    a, b = head(window=(96, 96)), head(window=None)
    features, points = randn(1, 4, 6, 9), rand(1, 5, 2) * 12
    for x, y in zip(a(features, points), b(features, points)):
        assert torch.allclose(x.float(), y.float(), atol=1e-5)


def test_the_mask_of_a_point_does_not_depend_on_the_picture_far_away():
    """The lesson of the window: a larger picture around it changes neither the statistics nor the mask."""
    m = head(window=(8, 12), stride=2)
    small, points = randn(1, 4, 12, 16), torch.tensor([[[15.0, 11.0], [17.3, 13.2]]])
    large = randn(1, 4, 30, 40, seed=9) * 20
    large[:, :, 7:19, 10:26] = small
    a, corner_a = m(small, points)
    b, corner_b = m(large, points + torch.tensor([20.0, 14.0]))
    assert torch.allclose(a, b, atol=1e-4) and torch.equal(corner_a + torch.tensor([20, 14]), corner_b)
    whole = head(window=None)
    c = whole(large, points + torch.tensor([20.0, 14.0]))[0][:, 14:38, 20:52]
    assert not torch.allclose(whole(small, points)[0], c, atol=0.1)                    # while the paper's own head is disturbed


def test_what_is_shared_may_be_computed_once():
    """`shared` is `share(features)`: the same answer, and features then count only through Q."""
    m = head()
    features, points = randn(2, 4, 7, 9), rand(2, 3, 2) * 14
    own, cached = m(features, points), m(features, points, shared=m.share(features))
    assert torch.equal(own[0], cached[0]) and torch.equal(own[1], cached[1])
    assert not torch.allclose(m(features, points, shared=m.share(features * 2))[0], own[0], atol=1e-3)


def test_the_head_may_be_given_other_windows_than_its_own():
    """`corners`, in cells: the same point seen in another window."""
    m = head()
    features, points, corners = randn(2, 4, 7, 9), rand(2, 3, 2) * 14, torch.tensor([[0, 0], [3, 3], [1, 2], [2, 0], [0, 3], [3, 1]])
    logits, found = m(features, points, corners=corners)
    assert torch.equal(found.long(), corners * 2)
    for n in range(6):
        expected = dense(m, features[n // 3], points[n // 3, n % 3], corners[n].tolist(), (4, 6), 2, 9)
        assert torch.allclose(logits[n], expected, atol=2e-4)


def test_pictures_and_points_of_a_batch_do_not_mix():
    """Points are [B, K, 2], answers come as [B K]: those of the first picture first."""
    m = head()
    features, points = randn(3, 4, 7, 9), rand(3, 4, 2) * 14
    logits, corners = m(features, points)
    for b, k in itertools.product(range(3), range(4)):
        one, corner = m(features[b:b + 1], points[b:b + 1, k:k + 1])
        assert torch.allclose(one[0], logits[4 * b + k], atol=1e-5) and torch.equal(corner[0], corners[4 * b + k])


def test_the_gradient_reaches_the_features_through_the_controller_and_through_the_window():
    """"The gradient from the loss propagates to all components of AdaptIS and to the backbone"."""
    m = head(window=(4, 4), stride=2)
    features = randn(1, 4, 10, 12).requires_grad_()
    point = torch.tensor([[[3.0, 3.0]]])
    def reached(**kwargs):
        return torch.autograd.grad(m(features, point, **kwargs)[0].pow(2).sum(), features)[0].abs().sum((0, 1)) > 0
    only_q = reached(shared=m.share(features).detach())
    assert only_q.nonzero().tolist() == [[1, 1]]                                          # (3, 3) is the centre of cell (1, 1)
    far = reached(corners=torch.tensor([[6, 5]]))
    assert far[1, 1] and far[4:8, 5:9].any() and far[0].any() and not far[:, 10:].any() and not far[9].any()
    for name, p in m.named_parameters():
        assert torch.autograd.grad(m(features, point)[0].pow(2).sum(), p)[0].isfinite().all(), name


def test_without_coordinates_the_mask_knows_its_place_only_from_the_features():
    """Appendix B: the ablation without Relative CoordConv: on a constant map all points of a window give the same."""
    with_, without = head(window=None), head(window=None, coordinates=False)
    features, points = torch.ones(1, 4, 8, 8), torch.tensor([[[2.0, 2.0], [12.0, 9.0]]])
    a, b = without(features, points)[0]
    assert torch.allclose(a, b, atol=1e-5)
    a, b = with_(features, points)[0]
    assert not torch.allclose(a, b, atol=1e-2)


@pytest.mark.parametrize("outputs", [1, 5])
def test_a_branch_keeps_the_size_of_the_map(outputs):
    """Features [B, C, h, w] -> logits [B, outputs, h, w] of any sign: the last layer is a plain convolution."""
    out = lively(Branch(4, outputs, width=6))(randn(2, 4, 5, 7))
    assert out.shape == (2, outputs, 5, 7) and out.min() < 0 < out.max()


def test_a_branch_is_two_layers_and_a_linear_one():
    """Choice: two layers of conv, ReLU, norm, then one value for each output."""
    m, x = lively(Branch(4, 3, width=6)), randn(2, 4, 5, 7)
    convs, norms = [[k for k in m.modules() if isinstance(k, t)] for t in (nn.Conv2d, nn.BatchNorm2d)]
    assert len(convs) == 3 and len(norms) == 2
    z = x
    for c, n in zip(convs, norms):
        z = norm(F.conv2d(z, c.weight, c.bias, padding=c.kernel_size[0] // 2).clamp(min=0), n)
    assert torch.allclose(m(x), F.conv2d(z, convs[2].weight, convs[2].bias, padding=convs[2].kernel_size[0] // 2), atol=1e-4)


@pytest.mark.parametrize("stride, widths", [(2, (4, 4)), (2, (4, 5, 6)), (4, (4, 4)), (2, (4, 4, 4, 4)), (2, (4,)), (1, (4, 4))])
def test_the_unet_gives_a_map_at_its_stride_for_every_size(stride, widths):
    """Images [B, 3, H, W] -> [B, channels, ceil(H / stride), ceil(W / stride)], no multiple of anything needed."""
    m = lively(UNet(widths, 3, stride))
    assert m.channels == 3 and m.stride == stride
    for h, w in [(1, 1), (1, 9), (2, 3), (7, 5), (16, 16), (17, 31), (33, 8), (12, 20)]:
        out = m(rand(2, 3, h, w))
        assert out.shape == (2, 3, -(-h // stride), -(-w // stride)) and out.isfinite().all()


def test_the_unet_sees_every_pixel():
    """"Keeps every bit of detail": each pixel and colour, the last odd ones too, has an influence."""
    m = lively(UNet((8, 8), 8), 1)
    for h, w in [(8, 8), (7, 9), (5, 6)]:
        x = rand(1, 3, h, w).requires_grad_()
        weight = randn(*m(x).shape, seed=4)
        grad = torch.autograd.grad((m(x) * weight).sum(), x)[0]
        assert (grad != 0).float().mean() == 1


def test_a_shifted_picture_gives_a_shifted_map():
    """A convolutional network, away from the borders: shifted by the coarsest stride of the widths (2 and 4, here)."""
    m, x = lively(UNet((4, 4), 4)), rand(1, 3, 64, 64)
    y = torch.roll(x, (4, 8), (2, 3))
    assert torch.allclose(m(y)[:, :, 12:-8, 14:-8], torch.roll(m(x), (2, 4), (2, 3))[:, :, 12:-8, 14:-8], atol=1e-5)


def test_the_unet_joins_fine_and_coarse():
    """Skip connections: a pixel changes its own cell, and one 20 pixels away as well, as widths reach strides 2, 4, 8, 16."""
    m, x = lively(UNet((4, 4, 4, 4), 4), 2), rand(1, 3, 128, 128)
    y = x.clone()
    y[0, :, 64, 64] += 1
    changed = ((m(x) - m(y)).abs() > 1e-6).any(1)[0]
    assert changed[32, 32] and changed.nonzero()[:, 0].max() - changed.nonzero()[:, 0].min() >= 16
    shallow = lively(UNet((4,), 4), 2)
    changed = ((shallow(x) - shallow(y)).abs() > 1e-6).any(1)[0].nonzero()
    assert (changed.max(0).values - changed.min(0).values).max() <= 8


# --- 3 Training: object-level stratification -----------------------------------------------------------------------------------

def test_every_point_lies_at_the_centre_of_a_pixel_of_its_object():
    """Section 3: "a random object and then a random point at that object", (x, y) = (j + .5, i + .5)."""
    segments = blocks(9, 12, (0, 0, 9, 12), (2, 3, 6, 5), (8, 11, 9, 12), (0, 7, 1, 12))
    points, ids = sample_points(segments, torch.tensor([2, 3, 4]), 400, seeded(0))
    assert points.shape == (400, 2) and points.is_floating_point() and ids.shape == (400,) and ids.dtype == torch.int64
    for (x, y), k in zip(points.tolist(), ids.tolist()):
        assert x % 1 == y % 1 == 0.5 and segments[int(y), int(x)] == k and k in (2, 3, 4)


def test_objects_are_drawn_equally_often_whatever_their_sizes():
    """"Object-level stratification": one pixel against ninety."""
    segments = blocks(10, 10, (0, 0, 9, 10), (9, 9, 10, 10), (9, 0, 10, 4), (9, 5, 10, 9))
    _, ids = sample_points(segments, torch.tensor([1, 2, 4]), 6000, seeded(1))
    counts = torch.bincount(ids, minlength=5).tolist()
    assert counts[0] == counts[3] == 0 and all(share_is(counts[k], 6000, 1 / 3) for k in (1, 2, 4))


def test_pixels_of_an_object_are_drawn_equally_often():
    """The first and the last pixel, those on the border of the picture too, two parts of one object alike."""
    segments = blocks(6, 7, (0, 0, 2, 3), (5, 5, 6, 7))
    segments[5, 0] = 1                                                                                 # a second part of object 1
    points, ids = sample_points(segments, torch.tensor([2, 1]), 7000, seeded(2))
    n = int((ids == 1).sum())
    table = torch.zeros(6, 7)
    for (x, y), k in zip(points.tolist(), ids.tolist()):
        if k == 1:
            table[int(y), int(x)] += 1
    assert torch.equal(table > 0, segments == 1) and all(share_is(c, n, 1 / 7) for c in table[segments == 1].tolist())


def test_points_are_repeated_by_their_generator():
    """Seeds repeat points, other seeds do not, torch's own generator stands in for none; draws do not depend on each other."""
    segments = blocks(20, 20, (0, 0, 20, 10), (0, 10, 20, 20))
    draws = [torch.cat(sample_points(segments, torch.tensor([1, 2]), 5, seeded(s))[:1]) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    torch.manual_seed(7)
    a = sample_points(segments, torch.tensor([1, 2]), 5)
    torch.manual_seed(7)
    b = sample_points(segments, torch.tensor([1, 2]), 5)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_one_pixel_is_an_object_and_no_points_are_no_points():
    """Degenerate: an object of one pixel in the last corner; count 0."""
    points, ids = sample_points(blocks(4, 5, (3, 4, 4, 5)), torch.tensor([1]), 3, seeded(0))
    assert points.tolist() == [[4.5, 3.5]] * 3 and ids.tolist() == [1, 1, 1]
    points, ids = sample_points(blocks(4, 5, (3, 4, 4, 5)), torch.tensor([1]), 0, seeded(0))
    assert points.shape == (0, 2) and ids.shape == (0,)


@pytest.mark.parametrize("objects", [[], [2], [1, 2]])
def test_there_is_no_point_on_an_object_that_does_not_show(objects):
    """No object, or one without a pixel: an error, not a point somewhere else."""
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        for seed in range(20):
            sample_points(blocks(4, 5, (0, 0, 2, 2)), torch.tensor(objects, dtype=torch.long), 4, seeded(seed))
