"""The spec of adaptis.py: "AdaptIS: Adaptive Instance Selection Network" (Sofiiuk, Barinova, Konushin, ICCV 2019).

Oracles: loops over pixels, cells and points, the dense convolution of the concatenated map, breadth-first search, finite
differences, torch's own operators, and small models planted in place of the learned ones, whose every answer is known.
A share of n draws with probability p may be off by five of its standard deviations, sqrt(p (1 - p) / n).
"""
import itertools
import math
import subprocess
import sys
import time
from pathlib import Path

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
LENGTHS, WIDTHS = (18, 47), (6, 11)                                      # "Choice: cells are 18 to 47 pixels long, 6 to 11 wide"


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


@pytest.mark.parametrize("size, shape", [(96, (96, 96)), ((50, 70), (50, 70)), ((130, 50), (130, 50)), (160, (160, 160)),
                                         (50, (50, 50))])
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
    for x, y, angle in [(23.52, 4.53, 0.01), (4.53, 23.52, 1.58), (71 - 23.52, 59.43, 0.01), (66.43, 64 - 23.52, 1.56),
                        (17.2, 17.2, 0.8),
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
    assert np.flatnonzero(owner[30]).tolist() == list(range(15, 45))
    assert np.flatnonzero(owner[:, 30]).tolist() == list(range(26, 34))


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
    """Choice: 18 to 47 pixels long, 6 to 11 wide, uniformly; directions are uniform."""
    for values, (low, high) in zip([np.concatenate([c[k] for c in many_cells()]) for k in (2, 3)], (LENGTHS, WIDTHS)):
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)
        assert abs(values.std() - (high - low) / 12 ** 0.5) < 0.02 * (high - low)
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
    return [((c[i - 1], a[i - 1], l[i], w[i]), (c[i], a[i], l[i], w[i])) for c, a, l, w in cells for i in range(1, len(a))
            if l[i] == l[i - 1]]


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


@pytest.mark.parametrize("kwargs", [dict(size=49), dict(size=(49, 96)), dict(size=(96, 49)), dict(count=(5, 4)),
                                    dict(count=(-1, 4))])
def test_pictures_too_small_for_a_cell_are_refused(kwargs):
    """A cell of 47 pixels needs a side of 50; count is (fewest, most)."""
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
    features, points, weight = randn(2, 2, 3, 4).requires_grad_(), rand(2, 5, 2) * torch.tensor([8.0, 6.0]), randn(2, 5, 2)
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
            expected = scale[n, c].item() * (x[n, c, i, j].item() - mean) / std + shift[n, c].item()
            assert abs(out[n, c, i, j].item() - expected) < 1e-6


def test_after_adain_each_channel_has_the_given_mean_and_deviation():
    """"One can vary the network output for the same input by providing different parameters to AdaIN"."""
    x, scale, shift = randn(2, 3, 8, 9) * 50 + 7, randn(2, 3, seed=1), randn(2, 3, seed=2)
    out = AdaIN()(x, scale, shift)
    assert torch.allclose(out.mean((2, 3)), shift, atol=1e-4)
    assert torch.allclose(out.flatten(2).std(2, unbiased=False), scale.abs(), atol=1e-4)


def test_adain_of_a_constant_map_is_the_shift():
    """Degenerate: no deviation at all, one place alone."""
    shift = randn(2, 3)
    assert torch.allclose(AdaIN()(torch.full((2, 3, 4, 4), 5.0), torch.ones(2, 3), shift),
                          shift[..., None, None].expand(2, 3, 4, 4), atol=1e-4)
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
    args = [randn(2, 2, 3, 3, dtype=torch.float64), randn(2, 2, seed=1, dtype=torch.float64),
            randn(2, 2, seed=2, dtype=torch.float64)]
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
        place = torch.stack([((x - point[0]) / radius).clamp(-1, 1).expand(h, w),
                             ((y - point[1]) / radius).clamp(-1, 1)[:, None].expand(h, w)])
        maps = torch.cat([features, place])
        kernel = torch.cat([kernel, F.pad(m.place.weight, (1, 1, 1, 1))], 1)             # a 1x1 kernel is the middle of a 3x3 one
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


@pytest.mark.parametrize("stride, window, cells", [
    (2, (8, 12), (4, 6)), (2, (7, 11), (4, 6)), (2, (1, 2), (1, 1)), (4, (9, 8), (3, 2)), (1, (5, 6), (5, 6)),
    (2, (40, 41), (20, 21)), (2, (100, 10), (20, 5)), (2, (39, 200), (20, 30))])
def test_a_window_has_its_size_and_the_point_in_its_middle_and_lies_inside(stride, window, cells):
    """A window of ceil(window / stride) cells, never more than the map; it is moved inside where it would reach beyond."""
    m, (h, w) = head(stride, window), (20, 30)
    ends, line = [[0.0, 0.0], [w * stride - 0.01, h * stride - 0.01]], [[x * stride / 4, 5.0 * stride] for x in range(4 * w)]
    points = torch.cat([rand(300, 2) * torch.tensor([w, h]) * stride, torch.tensor(ends + line)])
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
    small, points = randn(1, 4, 12, 16), torch.tensor([[[15.5, 11.5], [17.3, 13.2]]])
    large = randn(1, 4, 30, 40, seed=9) * 20
    large[:, :, 7:19, 10:26] = small
    a, corner_a = m(small, points)
    b, corner_b = m(large, points + torch.tensor([20.0, 14.0]))
    assert torch.allclose(a, b, atol=2e-3) and torch.equal(corner_a + torch.tensor([20, 14]), corner_b)
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
    features, points = randn(2, 4, 7, 9), rand(2, 3, 2) * 14
    corners = torch.tensor([[0, 0], [3, 3], [1, 2], [2, 0], [0, 3], [3, 1]])
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
        assert torch.allclose(one[0], logits[4 * b + k], atol=1e-3) and torch.equal(corner[0], corners[4 * b + k])


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
    assert far[1, 1] and far[4:8, 5:9].all() and far.sum() == 17                     # the window's 2x2 cells, and one more around
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


@pytest.mark.parametrize("objects", [[], [2], [1, 2], [3, 4], [1, 9], [9]])
def test_there_is_no_point_on_an_object_that_does_not_show(objects):
    """No object, or one without a pixel: an error, not a point somewhere else."""
    with pytest.raises(ValueError):
        sample_points(blocks(4, 5, (0, 0, 2, 2), (3, 3, 4, 4), (3, 3, 4, 5)), torch.tensor(objects).long(), 4, seeded(0))


# --- Appendix A: normalized focal loss -----------------------------------------------------------------------------------------

def masks_of(n=3, h=4, w=5, seed=0, dtype=torch.float64):
    """Logits, masks and weights of which some are 0."""
    return (randn(n, h, w, seed=seed, dtype=dtype) * 2, rand(n, h, w, seed=seed + 1) > 0.6,
            (rand(n, h, w, seed=seed + 2) > 0.3).to(dtype))


def truth_probability(z, m):
    """What the network gives to what is true of the pixel: sigmoid(z) on the object, 1 - sigmoid(z) elsewhere."""
    p = 1 / (1 + math.exp(-z))
    return p if m else 1 - p


def pixels(logits, masks, weight=None):
    """For each mask the list of the p of the pixels that count."""
    weight = torch.ones_like(logits) if weight is None else weight
    return [[truth_probability(z, m) for z, m, w in zip(a.flatten().tolist(), b.flatten().tolist(), c.flatten().tolist()) if w]
            for a, b, c in zip(logits, masks, weight)]


@pytest.mark.parametrize("weighted", [False, True])
def test_binary_cross_entropy_is_the_mean_of_minus_log_p(weighted):
    """-log p, averaged over the pixels of each mask that count -> [N]."""
    logits, masks, weight = masks_of()
    expected = [sum(-math.log(p) for p in ps) / len(ps) for ps in pixels(logits, masks, weight if weighted else None)]
    out = binary_cross_entropy(logits, masks, weight) if weighted else binary_cross_entropy(logits, masks)
    assert out.shape == (3,) and torch.allclose(out.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [0, 1, 2, 3.5])
def test_the_focal_loss_is_its_formula(weighted, gamma):
    """FL = -(1 - p)^gamma log p, averaged over the pixels."""
    logits, masks, weight = masks_of(seed=4)
    w = weight if weighted else None
    expected = [sum(-(1 - p) ** gamma * math.log(p) for p in ps) / len(ps) for ps in pixels(logits, masks, w)]
    assert torch.allclose(focal_loss(logits, masks, w, gamma).double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [0, 1, 2, 3.5])
def test_the_normalized_focal_loss_is_its_formula(weighted, gamma):
    """NFL = -1/P sum (1 - p)^gamma log p with P = sum (1 - p)^gamma."""
    logits, masks, weight = masks_of(seed=8)
    w = weight if weighted else None
    expected = [sum(-(1 - p) ** gamma * math.log(p) for p in ps) / sum((1 - p) ** gamma for p in ps)
                for ps in pixels(logits, masks, w)]
    assert torch.allclose(normalized_focal_loss(logits, masks, w, gamma).double(), torch.tensor(expected, dtype=torch.float64),
                          atol=1e-6)


def test_gamma_is_two():
    """The focal loss's usual gamma."""
    logits, masks, _ = masks_of()
    for loss in (focal_loss, normalized_focal_loss):
        assert torch.equal(loss(logits, masks), loss(logits, masks, None, 2))
        assert not torch.equal(loss(logits, masks), loss(logits, masks, None, 1))


def test_without_focus_both_are_binary_cross_entropy():
    """gamma = 0: all weights are 1, P is their number."""
    logits, masks, weight = masks_of()
    for loss in (focal_loss, normalized_focal_loss):
        assert torch.allclose(loss(logits, masks, weight, 0), binary_cross_entropy(logits, masks, weight), atol=1e-6)


@pytest.mark.parametrize("loss", [binary_cross_entropy, focal_loss, normalized_focal_loss])
def test_pixels_of_weight_zero_do_not_count(loss):
    """Void teaches nothing: neither value nor gradient depends on it, and it does not thin out the mean either."""
    logits, masks, weight = masks_of()
    logits.requires_grad_()
    out = loss(logits, masks, weight)
    grad = torch.autograd.grad(out.sum(), logits)[0]
    assert torch.equal(grad != 0, weight != 0)
    other = torch.where(weight > 0, logits.detach(), 7.0)
    assert torch.allclose(loss(other, masks ^ (weight == 0), weight), out, atol=1e-9)
    for n in range(3):
        keep = weight[n] > 0
        assert torch.allclose(loss(logits[n][keep][None, None], masks[n][keep][None, None]), out[n:n + 1], atol=1e-6)


@pytest.mark.parametrize("loss", [binary_cross_entropy, focal_loss, normalized_focal_loss])
def test_a_mask_without_a_known_pixel_costs_nothing(loss):
    """Degenerate: all void; finite, with a finite gradient, and its neighbours are undisturbed. No mask at all: [0]."""
    logits, masks, weight = masks_of()
    weight[1] = 0
    logits.requires_grad_()
    out = loss(logits, masks, weight)
    assert out[1] == 0 and torch.allclose(out[[0, 2]], loss(logits[[0, 2]], masks[[0, 2]], weight[[0, 2]]))
    assert (torch.autograd.grad(out.sum(), logits)[0][1] == 0).all()
    assert loss(torch.zeros(0, 3, 3), torch.zeros(0, 3, 3, dtype=torch.bool)).shape == (0,)


@pytest.mark.parametrize("loss", [binary_cross_entropy, focal_loss, normalized_focal_loss])
def test_one_pixel_of_probability_one_half_costs_log_two(loss):
    """Closed cases: logit 0 is p = 1/2, on the object and beside it."""
    factor = 0.25 if loss is focal_loss else 1
    for m in (True, False):
        out = loss(torch.zeros(1, 1, 1), torch.full((1, 1, 1), m))
        assert abs(out.item() - factor * math.log(2)) < 1e-5


@pytest.mark.parametrize("loss", [binary_cross_entropy, focal_loss, normalized_focal_loss])
def test_extreme_logits_are_finite(loss):
    """Values and gradients at logits of +-1000; being wrong there costs, being right does not."""
    masks = torch.tensor([[[True, False]], [[False, True]]])
    logits = torch.tensor([[[1000.0, -1000.0]], [[1000.0, -1000.0]]], requires_grad=True)
    out = loss(logits, masks)
    grad = torch.autograd.grad(out.sum(), logits)[0]
    assert out.isfinite().all() and grad.isfinite().all()
    assert 0 <= out[0] < 1e-3 and 900 < out[1] < 1100 and grad[0].abs().max() < 1e-3
    assert grad[1, 0, 0] > 0.4 and grad[1, 0, 1] < -0.4


def test_masks_that_are_all_right_cost_almost_nothing():
    """P fades with the loss; their quotient stays finite and small."""
    masks = rand(2, 6, 6) > 0.5
    for z in (5.0, 12.0, 40.0, 300.0):
        logits = torch.where(masks, z, -z).requires_grad_()
        out = normalized_focal_loss(logits, masks)
        assert (out >= 0).all() and out.max() <= math.log1p(math.exp(-z)) * 1.01 + 1e-6
        assert torch.autograd.grad(out.sum(), logits)[0].isfinite().all()


def test_the_gradient_of_p_is_stopped_and_that_of_the_weights_is_not():
    """Appendix A in numbers: central differences with P held fixed, at every logit."""
    logits, masks, weight = masks_of(1)
    logits.requires_grad_()
    grad = torch.autograd.grad(normalized_focal_loss(logits, masks, weight).sum(), logits)[0].flatten()
    z, m, w = logits.flatten().tolist(), masks.flatten().tolist(), weight.flatten().tolist()
    ps = [truth_probability(a, b) for a, b in zip(z, m)]
    total = sum(c * (1 - p) ** 2 for p, c in zip(ps, w))
    def cost(a, b):
        return -(1 - truth_probability(a, b)) ** 2 * math.log(truth_probability(a, b)) / total
    for k in range(len(z)):
        assert abs(grad[k].item() - w[k] * (cost(z[k] + 1e-4, m[k]) - cost(z[k] - 1e-4, m[k])) / 2e-4) < 1e-6
        p, slope = ps[k], w[k] * (1 - ps[k]) ** 2 * ((1 - ps[k]) - 2 * ps[k] * math.log(ps[k])) / total   # the docstring's
        assert abs(abs(grad[k].item()) - slope) < 1e-6 and (grad[k] < 0) == (m[k] and w[k] > 0)


def test_cross_entropy_and_focal_loss_have_their_own_gradients():
    """Nothing is stopped in them."""
    logits, masks, weight = masks_of(1)
    for loss in (binary_cross_entropy, focal_loss):
        if loss(logits, masks, weight).dtype == torch.float64:
            assert torch.autograd.gradcheck(lambda z: loss(z, masks, weight), logits.clone().requires_grad_())


def test_the_weights_of_the_normalized_focal_loss_sum_to_one_as_those_of_the_mean():
    """"The total gradient of the NFL is equal to the total gradient of BCE": in the sense of the weights. Where all -log p are
    equal both losses are equal, however small (1 - p) is, and the focal loss is not."""
    masks = rand(4, 5, 5) > 0.5
    for z in (-3.0, 0.5, 2.0, 4.0):
        logits = torch.where(masks, z, -z).double()
        assert torch.allclose(normalized_focal_loss(logits, masks), binary_cross_entropy(logits, masks), rtol=1e-4)
        assert (focal_loss(logits, masks) < 0.99 * binary_cross_entropy(logits, masks)).all()


@pytest.mark.parametrize("z, total", [(4.0, None), (5.0, 1e-3), (9.0, 1e-3)])
def test_p_is_no_less_than_a_thousandth_of_a_pixel(z, total):
    """Choice: a mask that is right everywhere gives 0, not 0 / 0; here 16 pixels of the same p."""
    p = 1 / (1 + math.exp(-z))
    out = normalized_focal_loss(torch.full((1, 4, 4), z, dtype=torch.float64), torch.ones(1, 4, 4, dtype=torch.bool))
    expected = -16 * (1 - p) ** 2 * math.log(p) / (total or 16 * (1 - p) ** 2)
    assert abs(out.item() / expected - 1) < 1e-3


def test_by_the_logits_the_normalized_focal_loss_pulls_harder_than_cross_entropy():
    """The failing of the claim: the sum of |derivatives| by the logits is never less than that of BCE, and far more in the
    end."""
    for seed, right in itertools.product(range(20), (0.0, 1.0, 4.0)):
        logits, masks, _ = masks_of(2, seed=seed)
        logits = (logits + torch.where(masks, right, -right)).requires_grad_()
        nfl, bce = [torch.autograd.grad(f(logits, masks).sum(), logits)[0].abs().sum((1, 2))
                    for f in (normalized_focal_loss, binary_cross_entropy)]
        assert (nfl >= bce * (1 - 1e-6)).all()
        if right == 4:
            assert (nfl > 2 * bce).all()


# --- 4 Class-agnostic instance segmentation: the greedy algorithm --------------------------------------------------------------

class Planted:
    """propose() of a list of confidence maps, each with the region in which a point gets it; remembers its points."""

    def __init__(self, h, w, *answers):
        self.h, self.w, self.answers, self.calls = h, w, answers, []

    def __call__(self, points):
        self.calls.append(points.clone())
        out = torch.zeros(len(points), self.h, self.w)
        for n, (x, y) in enumerate(points.tolist()):
            for region, c in self.answers:
                if region[int(y), int(x)]:
                    out[n] = c
                    break
        return out, torch.zeros(len(points), 2, dtype=torch.long)

    @property
    def points(self):
        return torch.cat(self.calls) if self.calls else torch.zeros(0, 2)


def area(h, w, *boxes):
    """Union of boxes y0, x0, y1, x1."""
    return blocks(h, w, *boxes) > 0


def everywhere(h, w):
    return torch.ones(h, w, dtype=torch.bool)


def at(*places):
    """Points at the centres of pixels (row, column)."""
    return torch.tensor([[j + 0.5, i + 0.5] for i, j in places]).reshape(-1, 2)


def slow_whole(c, corner, h, w):
    """A window's confidences in the whole picture, 0 outside; what lies beyond the edge is lost."""
    whole = torch.zeros(h, w)
    for i, j in itertools.product(range(c.shape[0]), range(c.shape[1])):
        y, x = int(corner[1]) + i, int(corner[0]) + j
        if 0 <= y < h and 0 <= x < w:
            whole[y, x] = c[i, j]
    return whole


def slow_labels(found, threshold, min_area, h, w):
    """The last step: each pixel to the highest C of those above the threshold; small objects are dropped."""
    labels, scores, kept = torch.zeros(h, w, dtype=torch.long), [], 0
    owner = [[max(((c[i, j].item(), -k) for k, c in enumerate(found) if c[i, j] > threshold), default=(0, 1)) for j in range(w)]
             for i in range(h)]
    for k, c in enumerate(found):
        mine = torch.tensor([[owner[i][j][1] == -k for j in range(w)] for i in range(h)])
        if mine.sum() >= max(min_area, 1):
            kept += 1
            labels[mine] = kept
            scores.append(c[mine].double().mean().item())
    return labels, scores


def slow_greedy(propose, unknown, points, threshold=0.5, overlap=0.5, patience=20, min_area=1):
    """Section 4 with given points, one at a time."""
    h, w = unknown.shape
    known, found, idle = ~unknown, [], 0
    for p in points:
        if known.all() or idle == patience:
            break
        if known[int(p[1]), int(p[0])]:
            continue
        c, corner = propose(p[None])
        c = slow_whole(c[0], corner[0], h, w)
        m = c > threshold
        if m.any() and (m & known).sum().item() / m.sum().item() < overlap:
            found.append(c)
            known, idle = known | m, 0
        else:
            idle += 1
    return slow_labels(found, threshold, min_area, h, w)


class Hills:
    """Smooth random confidences in a window around each point, which may reach over the edge."""

    def __init__(self, h, w, seed, window=None):
        self.h, self.w, self.window = h, w, window
        maps = F.interpolate(rand(6, 1, 4, 4, seed=seed), (h, w), mode="bicubic", align_corners=False)[:, 0]
        self.maps = ((maps - 0.65) * 4 + 0.5).clamp(0.01, 0.99)
        self.owner = maps.argmax(0)

    def __call__(self, points):
        size = self.window or (self.h, self.w)
        out, corners = torch.zeros(len(points), *size), torch.zeros(len(points), 2, dtype=torch.long)
        for n, (x, y) in enumerate(points.tolist()):
            if self.window:
                corners[n] = torch.tensor([max(0, int(x) - size[1] // 2), max(0, int(y) - size[0] // 2)])
            c = self.maps[self.owner[int(y), int(x)]] - 0.002 * math.hypot(x - self.w / 2, y)
            for i, j in itertools.product(range(size[0]), range(size[1])):
                v, u = i + int(corners[n, 1]), j + int(corners[n, 0])
                out[n, i, j] = c[v, u] if 0 <= v < self.h and 0 <= u < self.w else 0.97                # beyond: nonsense
        return out, corners


def test_disjoint_objects_are_found_exactly():
    """Section 4: one object after the other, until all is known; a background that no mask claims stays nobody's."""
    a, b, c = area(12, 16, (0, 0, 5, 7)), area(12, 16, (7, 3, 12, 12)), area(12, 16, (0, 9, 6, 16))
    propose = Planted(12, 16, (a, a * 0.9), (b, b * 0.8), (c, c * 0.7))
    labels, scores = segment_instances(propose, a | b | c, generator=seeded(0))
    assert labels.dtype == torch.int64 and labels.max() == 3 and torch.equal(labels > 0, a | b | c)
    for m, s in ((a, 0.9), (b, 0.8), (c, 0.7)):
        k = labels[m].unique()
        assert len(k) == 1 and k > 0 and (labels == k).sum() == m.sum() and abs(scores[k - 1] - s) < 1e-5
    everything = segment_instances(propose, everywhere(12, 16), generator=seeded(0), patience=200)[0]
    assert torch.equal(everything > 0, a | b | c) and everything.max() == 3


@pytest.mark.parametrize("shared, added", [(3, True), (4, False), (5, False)])
def test_an_object_is_added_only_if_less_than_half_of_it_is_segmented(shared, added):
    """"In case the intersection is lower than 50%, we add the new object": of 8 pixels 4 known ones are too many."""
    first, second = area(4, 20, (0, 0, 1, 8)), area(4, 20, (0, 8 - shared, 1, 16 - shared))
    propose = Planted(4, 20, (first, first * 0.9), (second, second * 0.6))
    trace = []
    labels, scores = segment_instances(propose, everywhere(4, 20), points=at((0, 1), (0, 15 - shared)), trace=trace)
    assert [t["added"] for t in trace] == [True, added] and len(scores) == 1 + added
    assert torch.equal(labels == 1, first) and torch.equal(labels == 2, second & ~first & added)


@pytest.mark.parametrize("overlap, added", [(0.25, False), (0.26, True), (1.0, True), (0.1, False), (0.0, False)])
def test_overlap_is_a_share_of_the_new_mask(overlap, added):
    """|M and S| / |M|: 2 of 8 pixels here, whatever the sizes of S and of the union."""
    first, second = area(4, 30, (0, 0, 4, 8)), area(4, 30, (0, 6, 1, 14))
    propose = Planted(4, 30, (first, first * 0.9), (second, second * 0.6))
    labels, _ = segment_instances(propose, everywhere(4, 30), points=at((0, 1), (0, 13)), overlap=overlap)
    assert (labels == 2).any() == (added and overlap > 0) and (labels == 1).any() == (overlap > 0)


@pytest.mark.parametrize("stuff, added", [(3, True), (4, False)])
def test_stuff_counts_as_segmented(stuff, added):
    """Section 5: "instead of starting with an empty map S we mark all the stuff pixels in S as segmented"."""
    m = area(3, 10, (1, 1, 2, 9))
    unknown = everywhere(3, 10)
    unknown[1, 1:1 + stuff] = False
    labels, scores = segment_instances(Planted(3, 10, (m, m * 0.8)), unknown, points=at((1, 8)))
    assert len(scores) == added and (labels > 0).any() == added


def test_an_object_added_before_counts_as_segmented_as_well():
    """S grows by M: a second mask that lies half on the first one and half on nothing is ignored, on the third it is judged
    anew."""
    a, b, c = area(2, 12, (0, 0, 1, 4)), area(2, 12, (0, 2, 1, 6)), area(2, 12, (0, 5, 1, 9))
    propose = Planted(2, 12, (a, a * 0.6), (b, b * 0.9), (c, c * 0.9))
    trace = []
    labels, _ = segment_instances(propose, everywhere(2, 12), points=at((0, 0), (0, 5), (0, 8)), trace=trace)
    assert [t["added"] for t in trace] == [True, False, True]
    assert labels[0].tolist() == [1, 1, 1, 1, 0, 2, 2, 2, 2, 0, 0, 0]                       # what was ignored claims nothing


def test_each_pixel_goes_to_the_surest_object():
    """R(x, y) = argmax_i C_i(x, y), not to the first one."""
    a, b = area(1, 12, (0, 0, 1, 7)), area(1, 12, (0, 4, 1, 12))
    ca, cb = a * torch.linspace(0.95, 0.6, 12), b * torch.linspace(0.55, 0.99, 12)
    labels, scores = segment_instances(Planted(1, 12, (a, ca), (b, cb)), everywhere(1, 12), points=at((0, 0), (0, 11)))
    expected = [1 if ca[0, j] >= cb[0, j] else 2 for j in range(12)]
    assert labels[0].tolist() == expected and 0 < expected.index(2) < 7
    for k, c in ((1, ca), (2, cb)):
        assert abs(scores[k - 1] - c[labels == k].mean()) < 1e-5                              # over its final mask


def test_of_equally_sure_objects_the_first_keeps_the_pixel():
    """argmax of equal values: the earlier object."""
    a, b = area(1, 12, (0, 0, 1, 7)), area(1, 12, (0, 4, 1, 12))
    labels, _ = segment_instances(Planted(1, 12, (a, a * 0.75), (b, b * 0.75)), everywhere(1, 12), points=at((0, 0), (0, 11)))
    assert labels[0].tolist() == [1] * 7 + [2] * 5


@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.75])
def test_a_mask_is_where_the_confidence_exceeds_the_threshold(threshold):
    """M = C > T: exactly T does not belong to it, in S and in the result."""
    c = torch.zeros(1, 9)
    c[0, :8] = torch.tensor([threshold] * 3 + [threshold + 0.125] * 3 + [threshold - 0.125] * 2)
    trace = []
    labels, scores = segment_instances(Planted(1, 9, (everywhere(1, 9), c)), everywhere(1, 9), threshold=threshold,
                                       points=at((0, 0)), trace=trace)
    assert labels[0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0] and torch.equal(trace[0]["mask"], labels > 0)
    assert abs(scores[0] - threshold - 0.125) < 1e-6


def test_of_a_round_the_mask_of_the_highest_mean_confidence_is_kept():
    """Section 6: "among the 7 results we chose the one with the highest average confidence of the object mask": not the highest
    sum, not the highest single value, and nothing outside the mask counts."""
    large, peak, sure = area(6, 8, (0, 0, 3, 8)), area(6, 8, (3, 0, 5, 8)), area(6, 8, (5, 0, 6, 2))
    empty = ~area(6, 8, (0, 0, 5, 8), (5, 0, 6, 2))
    cp = peak * 0.6
    cp[3, 0] = 1.0
    cs = sure * 0.8
    cs[0:4] = 0.3
    propose = Planted(6, 8, (large, large * 0.7 + 0.49 * ~large), (peak, cp), (sure, cs), (empty, empty * 0.5))
    kinds = set()
    for seed in range(8):
        trace = []
        segment_instances(propose, everywhere(6, 8), per_round=9, patience=99, generator=seeded(seed), trace=trace)
        for t in trace:
            rank = [[m[int(y), int(x)].item() for m in (empty, peak, large, sure)].index(True) for x, y in t["points"].tolist()]
            assert rank[t["kept"]] == max(rank)                                              # means: none, .6 and a bit, .7, .8
            kinds.add(tuple(sorted(set(rank))))
    assert (0, 1, 2, 3) in kinds and (0, 1, 2) in kinds


def test_only_the_kept_one_of_a_round_is_added():
    """One object a round at most."""
    a, b = area(2, 8, (0, 0, 2, 4)), area(2, 8, (0, 4, 2, 8))
    trace = []
    labels, _ = segment_instances(Planted(2, 8, (a, a * 0.7), (b, b * 0.8)), everywhere(2, 8), per_round=6, trace=trace,
                                  generator=seeded(0))
    assert len(trace) == 2 and torch.equal(trace[0]["mask"], b) and torch.equal(labels == 1, b) and torch.equal(labels == 2, a)


def test_the_greedy_algorithm_ends_when_nothing_is_unknown():
    """"Either when all pixels in S are marked as segmented": no further point is asked."""
    a, b = area(4, 8, (0, 0, 4, 4)), area(4, 8, (0, 4, 4, 8))
    propose = Planted(4, 8, (a, a * 0.9), (b, b * 0.9))
    segment_instances(propose, everywhere(4, 8), per_round=1, generator=seeded(0))
    assert len(propose.calls) == 2
    propose = Planted(4, 8, (a, a * 0.9), (b, b * 0.9))
    segment_instances(propose, everywhere(4, 8), points=at((0, 0), (0, 5), (1, 1), (1, 5), (2, 2)), per_round=2)
    assert sum(len(c) for c in propose.calls) <= 4 and propose.calls[0].tolist() == [[0.5, 0.5], [5.5, 0.5]]


@pytest.mark.parametrize("points", [None, at((0, 0), (2, 1))])
def test_where_nothing_is_unknown_nobody_is_asked(points):
    """Degenerate: all stuff. No object, no score, no call."""
    propose = Planted(3, 4, (everywhere(3, 4), torch.ones(3, 4)))
    labels, scores = segment_instances(propose, torch.zeros(3, 4, dtype=torch.bool), points=points)
    assert not propose.calls and labels.shape == (3, 4) and (labels == 0).all() and labels.dtype == torch.int64
    assert scores.shape == (0,)


def test_without_points_there_are_no_objects():
    """Degenerate: the proposal branch found nothing."""
    propose = Planted(3, 4, (everywhere(3, 4), torch.ones(3, 4)))
    labels, scores = segment_instances(propose, everywhere(3, 4), points=torch.zeros(0, 2))
    assert not propose.calls and (labels == 0).all() and scores.shape == (0,)


def test_a_picture_of_one_pixel_is_one_object():
    """Degenerate: 1x1; one point, fewer than per_round."""
    propose = Planted(1, 1, (everywhere(1, 1), torch.full((1, 1), 0.7)))
    labels, scores = segment_instances(propose, everywhere(1, 1))
    assert labels.tolist() == [[1]] and propose.points.tolist() == [[0.5, 0.5]] and abs(scores.item() - 0.7) < 1e-6


@pytest.mark.parametrize("per_round, patience", [(1, 1), (1, 5), (7, 3), (3, 8)])
def test_patience_is_the_number_of_rounds_without_a_new_object(per_round, patience):
    """Masks that are empty are no objects; after `patience` such rounds in a row it ends."""
    propose, trace = Planted(20, 20), []
    labels, _ = segment_instances(propose, everywhere(20, 20), per_round=per_round, patience=patience, generator=seeded(0),
                                  trace=trace)
    assert len(propose.points) == per_round * patience and len(trace) == patience and (labels == 0).all()
    assert not any(t["added"] for t in trace) and all(len(t["points"]) == per_round for t in trace)


@pytest.mark.parametrize("patience, found", [(3, 2), (2, 1)])
def test_a_new_object_renews_the_patience(patience, found):
    """Given points, each its own round: two in vain, an object, two in vain, another object."""
    a, b = area(3, 12, (0, 0, 1, 4)), area(3, 12, (0, 6, 1, 10))
    points = at((2, 0), (2, 1), (0, 0), (2, 2), (2, 3), (0, 7), (2, 4), (2, 5), (2, 6), (2, 7))
    for per_round in (1, 3, 20):
        trace = []
        _, scores = segment_instances(Planted(3, 12, (a, a * 0.9), (b, b * 0.9)), everywhere(3, 12), points=points,
                                      patience=patience,
                                      per_round=per_round, trace=trace)
        if patience == 3:
            assert len(scores) == 2
            assert [t["added"] for t in trace] == [False, False, True, False, False, True, False, False, False]
        else:
            assert len(scores) == 0 and len(trace) == 2
    _, scores = segment_instances(Planted(3, 12, (a, a * 0.9), (b, b * 0.9)), everywhere(3, 12), points=points[1:],
                                  patience=patience)
    assert len(scores) == found


@pytest.mark.parametrize("per_round", [1, 4, 7])
def test_each_pixel_is_asked_at_most_once_and_all_are_in_the_end(per_round):
    """Run out of points: every unknown pixel was asked once, at its centre, and none twice; the last round may be smaller."""
    unknown = area(6, 7, (1, 1, 5, 6))
    propose, trace = Planted(6, 7), []
    segment_instances(propose, unknown, per_round=per_round, patience=99, generator=seeded(3), trace=trace)
    points = propose.points.tolist()
    assert len(points) == 20 == len({tuple(p) for p in points}) and len(trace) == -(-20 // per_round)
    assert all(x % 1 == y % 1 == 0.5 and unknown[int(y), int(x)] for x, y in points)
    assert [len(t["points"]) for t in trace] == [per_round] * (20 // per_round) + [20 % per_round] * (20 % per_round > 0)


def test_random_points_are_uniform_over_the_unknown_pixels():
    """"Simple random sampling" of unknown points: the first point of many runs."""
    unknown, counts = area(3, 5, (0, 0, 2, 2), (2, 3, 3, 5)), torch.zeros(3, 5)
    for seed in range(1200):
        propose = Planted(3, 5)
        segment_instances(propose, unknown, per_round=1, patience=1, generator=seeded(seed))
        x, y = propose.points[0].tolist()
        counts[int(y), int(x)] += 1
    assert torch.equal(counts > 0, unknown) and all(share_is(c, 1200, 1 / 6) for c in counts[unknown].tolist())


def test_the_same_generator_gives_the_same_result():
    """Repeatable; another seed asks elsewhere."""
    propose = [Planted(9, 9) for _ in range(3)]
    for p, seed in zip(propose, (1, 1, 2)):
        segment_instances(p, everywhere(9, 9), patience=3, generator=seeded(seed))
    assert torch.equal(propose[0].points, propose[1].points) and not torch.equal(propose[0].points, propose[2].points)


@pytest.mark.parametrize("per_round", [1, 2, 3, 7])
def test_given_points_are_taken_in_their_order_without_those_that_became_known(per_round):
    """Section 5: "we remove the point proposals that have been marked as segmented at the previous steps"; how many are run at a
    time changes the work, not the result."""
    a, b = area(3, 12, (0, 0, 1, 4)), area(3, 12, (0, 6, 1, 10))
    unknown = everywhere(3, 12)
    unknown[1] = False
    points = at((0, 7), (1, 3), (0, 8), (2, 5), (0, 0), (0, 9), (0, 3), (2, 6), (1, 1))
    propose, trace = Planted(3, 12, (a, a * 0.9), (b, b * 0.6)), []
    labels, _ = segment_instances(propose, unknown, points=points, per_round=per_round, trace=trace)
    assert torch.equal(labels == 1, b) and torch.equal(labels == 2, a)                # the order of the points, not of the scores
    rounds = [t["points"][t["kept"]].tolist() for t in trace]
    assert rounds == at((0, 7), (2, 5), (0, 0), (2, 6)).tolist() and [t["added"] for t in trace] == [True, False, True, False]
    assert all(len(c) <= per_round for c in propose.calls) and [1.5, 1.5] not in propose.points.tolist()
    assert [3.5, 1.5] not in propose.points.tolist()
    if per_round == 1:
        assert propose.points.tolist() == rounds


def test_points_are_run_per_round_at_a_time():
    """The first call has the first per_round points that are unknown at the start."""
    propose = Planted(2, 20)
    unknown = everywhere(2, 20)
    unknown[0, 3] = False
    segment_instances(propose, unknown, points=at(*[(0, j) for j in range(10)]), per_round=4, patience=99)
    assert [[int(x) for x, _ in c.tolist()] for c in propose.calls] == [[0, 1, 2, 4], [5, 6, 7, 8], [9]]


@pytest.mark.parametrize("min_area, kept", [(1, 3), (2, 2), (3, 2), (4, 1), (6, 1), (7, 0)])
def test_objects_with_fewer_than_min_area_pixels_are_dropped(min_area, kept):
    """Choice: after the last step; sizes 6, 3 and 1; labels stay contiguous and scores go with them."""
    objects = [area(3, 12, (0, 0, 1, 1)), area(3, 12, (0, 2, 2, 5)), area(3, 12, (0, 6, 1, 9))]
    propose = Planted(3, 12, *[(m, m * s) for m, s in zip(objects, (0.9, 0.8, 0.7))])
    labels, scores = segment_instances(propose, everywhere(3, 12), points=at((0, 0), (0, 2), (0, 6)), min_area=min_area)
    left = [(m, s) for m, s in zip(objects, (0.9, 0.8, 0.7)) if m.sum() >= min_area]
    assert len(left) == kept == len(scores) == labels.max()
    for k, (m, s) in enumerate(left, 1):
        assert torch.equal(labels == k, m) and abs(scores[k - 1] - s) < 1e-5


def test_an_object_that_loses_all_its_pixels_is_no_object():
    """A surer mask may take another one over wholly at the last step."""
    a, b = area(1, 12, (0, 4, 1, 8)), area(1, 12, (0, 0, 1, 12))
    labels, scores = segment_instances(Planted(1, 12, (a, a * 0.6), (b, b * 0.9)), everywhere(1, 12), points=at((0, 5), (0, 0)))
    assert (labels == 1).all() and scores.shape == (1,) and abs(scores.item() - 0.9) < 1e-6


def test_windows_may_reach_over_the_edge():
    """Outside of a window C = 0, and what a window says about places beyond the picture counts nowhere: the last cells of a map
    whose picture is no multiple of the stride."""
    def propose(points):
        return torch.full((len(points), 4, 4), 0.9), (points.long() - 2).clamp(min=0)
    trace = []
    labels, scores = segment_instances(propose, everywhere(8, 9), points=at((0, 0), (7, 8), (1, 8), (7, 1)), trace=trace)
    expected = torch.zeros(8, 9, dtype=torch.long)
    expected[:4, :4], expected[5:, 6:], expected[:4, 6:], expected[5:, :4] = 1, 2, 3, 4
    assert torch.equal(labels, expected) and len(scores) == 4 and all(t["added"] for t in trace)


@pytest.mark.parametrize("turned", [False, True])
def test_the_overlap_is_counted_within_the_picture(turned):
    """A mask that hangs over the edge: of its 4 pixels inside 2 are known: not added, although 2 of 8 would be few."""
    def propose(points):
        size, corner = ((4, 2), [0, 2]) if turned else ((2, 4), [2, 0])
        return torch.full((len(points), *size), 0.9), torch.tensor([corner] * len(points))
    for known, count in ((2, 0), (1, 1)):
        unknown = everywhere(4, 4)
        unknown[0, 4 - known:] = False
        if turned:
            unknown = unknown.T.contiguous()
        labels, scores = segment_instances(propose, unknown, points=at((0, 0)))
        assert len(scores) == count and (labels > 0).sum() == 4 * count


def test_the_mean_confidence_is_that_within_the_picture():
    """Of two windows in a round the one that is surer inside is kept, whatever it says beyond the edge."""
    def propose(points):
        c = torch.full((len(points), 2, 4), 0.6)
        c[:, :, 2:] = 0.99
        for n, (x, _) in enumerate(points.tolist()):
            if x < 2:
                c[n] = 0.7
        return c, torch.tensor([[0 if x < 2 else 2, 0] for x, _ in points.tolist()])
    trace = []
    segment_instances(propose, everywhere(2, 4), per_round=8, trace=trace)
    assert trace[0]["points"][trace[0]["kept"], 0] < 2


def test_the_trace_tells_each_round():
    """For each round: points, which was kept, its mask, was it added."""
    a, trace = area(4, 6, (1, 2, 3, 6)), []
    segment_instances(Planted(4, 6, (a, a * 0.9)), everywhere(4, 6), trace=trace, generator=seeded(0), patience=2)
    assert len(trace) >= 2 and all({"points", "kept", "mask", "added"} <= set(t) for t in trace)
    assert sum(t["added"] for t in trace) == 1 and all(t["mask"].dtype == torch.bool for t in trace)
    done = [t for t in trace if t["added"]][0]
    x, y = done["points"][done["kept"]].tolist()
    assert a[int(y), int(x)] and torch.equal(done["mask"], a)


@pytest.mark.parametrize("seed, window, min_area, patience, per_round", [
    (0, None, 1, 20, 7), (1, None, 4, 20, 3), (2, (9, 7), 1, 5, 7), (3, (6, 12), 3, 3, 2), (4, (30, 30), 1, 2, 7),
    (5, (5, 5), 1, 99, 4)])
def test_with_given_points_the_result_is_that_of_the_slow_algorithm(seed, window, min_area, patience, per_round):
    """Section 4, one point at a time, on smooth random confidences; stuff is known from the start."""
    h, w = 14, 17
    propose, unknown = Hills(h, w, seed, window), rand(h, w, seed=seed + 50) > 0.15
    points = (rand(40, 2, seed=seed) * torch.tensor([w, h])).floor() + 0.5
    labels, scores = segment_instances(propose, unknown, points=points, min_area=min_area, patience=patience, per_round=per_round)
    expected, means = slow_greedy(propose, unknown, points, min_area=min_area, patience=patience)
    assert torch.equal(labels, expected) and torch.allclose(scores.double(), torch.tensor(means).double(), atol=1e-5)
    assert labels.max() > 1


@pytest.mark.parametrize("seed, window", [(0, None), (1, (9, 7)), (2, (6, 6)), (3, None)])
def test_with_random_points_the_rounds_are_those_of_the_slow_algorithm(seed, window):
    """The points come from the trace; everything else is done again, slowly."""
    h, w, threshold = 13, 15, 0.6
    propose, unknown, trace = Hills(h, w, seed, window), rand(h, w, seed=seed + 9) > 0.1, []
    labels, scores = segment_instances(propose, unknown, threshold=threshold, per_round=5, patience=6, trace=trace,
                                       generator=seeded(seed))
    known, asked, found, idle = ~unknown, set(), [], 0
    for t in trace:
        left = [(j + 0.5, i + 0.5) for i, j in (~known).nonzero().tolist() if (j + 0.5, i + 0.5) not in asked]
        points = [tuple(p) for p in t["points"].tolist()]
        assert idle < 6 and len(points) == len(set(points)) == min(5, len(left)) > 0 and set(points) <= set(left)
        asked |= set(points)
        answers = [slow_whole(c, corner, h, w) for c, corner in zip(*propose(t["points"]))]
        masks = [c > threshold for c in answers]
        means = [c[m].double().mean().item() if m.any() else -1 for c, m in zip(answers, masks)]
        k = t["kept"]
        assert means[k] >= max(means) - 1e-6
        added = bool(masks[k].any()) and (masks[k] & known).sum().item() / masks[k].sum().item() < 0.5
        assert t["added"] == added
        if added:
            found.append(answers[k])
            known |= masks[k]
        idle = 0 if added else idle + 1
    assert idle == 6 or known.all() or not [1 for i, j in (~known).nonzero().tolist() if (j + 0.5, i + 0.5) not in asked]
    expected, means = slow_labels(found, threshold, 1, h, w)
    assert torch.equal(labels, expected) and torch.allclose(scores.double(), torch.tensor(means).double(), atol=1e-5)
    assert len(found) > 1


# --- 5 Point proposals: local maxima -------------------------------------------------------------------------------------------

def breadth_first(score):
    """The paper's way: plateau after plateau; maxima as {(row, column): value}."""
    h, w = score.shape
    seen, out = set(), {}
    for start in itertools.product(range(h), range(w)):
        if start in seen:
            continue
        queue, plateau, top = [start], {start}, True
        while queue:
            i, j = queue.pop(0)
            for v, u in itertools.product((i - 1, i, i + 1), (j - 1, j, j + 1)):
                if 0 <= v < h and 0 <= u < w and (v, u) not in plateau:
                    if score[v, u] == score[i, j]:
                        plateau.add((v, u))
                        queue.append((v, u))
                    elif score[v, u] > score[i, j]:
                        top = False
        seen |= plateau
        if top:
            n, ci, cj = len(plateau), sum(p[0] for p in plateau), sum(p[1] for p in plateau)
            best = min(sorted(plateau), key=lambda p: (n * p[0] - ci) ** 2 + (n * p[1] - cj) ** 2)  # whole numbers: ties are ties
            out[best] = score[best].item()
    return out


@pytest.mark.parametrize("seed", range(30))
def test_local_maxima_are_those_of_breadth_first_search(seed):
    """Section 5: "we first find local maximums ... a standard method based on breadth-first search"; maps with many plateaus."""
    h, w = [(7, 9), (12, 12), (1, 15), (15, 1), (3, 20), (9, 5)][seed % 6]
    score = (rand(h, w, seed=seed) * [2, 3, 4, 6, 50][seed % 5]).floor()
    points, values = local_maxima(score)
    expected = breadth_first(score)
    assert points.shape == (len(values), 2)
    found = {(int(y - 0.5), int(x - 0.5)): v for (x, y), v in zip(points.tolist(), values.tolist())}
    assert found == expected and len(values) == len(expected) and (points % 1 == 0.5).all()
    assert (values[:-1] >= values[1:]).all()


@pytest.mark.parametrize("score, expected", [
    (torch.zeros(1, 1), [(0, 0)]), (torch.full((3, 5), 2.0), [(1, 2)]), (torch.full((2, 2), -1.0), [(0, 0)]),
    (torch.zeros(1, 4), [(0, 1)]),
    (torch.tensor([[1.0, 0, 3, 0, 2]]), [(0, 2), (0, 4), (0, 0)]), (torch.tensor([[1.0], [2], [3]]), [(2, 0)]),
    (torch.tensor([[5.0, 0], [0, 5]]), [(0, 0)]), (torch.tensor([[-3.0, -9, -2]]), [(0, 2), (0, 0)]),
    (torch.tensor([[1.0, 1, 1, 2], [0, 0, 0, 0]]), [(0, 3)]),
    (torch.tensor([[4.0, 4, 4], [4, 0, 4], [4, 4, 4]]), [(0, 1)]),
    (torch.tensor([[0.0, 1, 0, 0, 0, 7, 7, 7]]), [(0, 6), (0, 1)])])
def test_local_maxima_of_closed_cases(score, expected):
    """One pixel, constants, one row; diagonals touch; the point is the pixel nearest to the centre of mass, of several the first;
    a slope beside a higher pixel is none; the highest comes first."""
    points, values = local_maxima(score)
    assert points.tolist() == [[j + 0.5, i + 0.5] for i, j in expected] and values.tolist() == [score[p].item() for p in expected]


def test_local_maxima_of_a_map_without_plateaus_are_those_of_a_pooling():
    """Nothing equal: pixels that are the largest of their 3x3 neighbourhood, sorted."""
    score = randn(40, 50)
    points, values = local_maxima(score)
    tops = (F.max_pool2d(score[None, None], 3, 1, 1)[0, 0] == score)
    assert torch.equal(values, score[tops].sort(descending=True).values)
    assert all(score[int(y), int(x)] == v for (x, y), v in zip(points.tolist(), values.tolist()))


def test_a_long_winding_plateau_is_one_maximum():
    """Breadth first search goes around every corner: a spiral; and a plateau with one higher pixel at its far end is none."""
    score = torch.zeros(13, 13)
    for k in range(0, 13, 4):
        score[k] = 1
    score[0:5, 12] = score[4:9, 0] = score[8:13, 12] = 1
    assert len(local_maxima(score)[0]) == 1 and local_maxima(score)[1].tolist() == [1]
    score[12, 0] = 2
    assert local_maxima(score)[0].tolist() == [[0.5, 12.5]]


# --- 5 Panoptic segmentation, with planted branches ----------------------------------------------------------------------------

class Eye(nn.Module):
    """An encoder whose features are the picture itself, averaged over stride x stride pixels; counts the pictures it sees."""

    def __init__(self, channels=3, stride=1):
        super().__init__()
        self.channels, self.stride, self.seen, self.calls = channels, stride, 0, 0
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        self.seen, self.calls = self.seen + len(images), self.calls + 1
        return F.avg_pool2d(images, self.stride, ceil_mode=True) * self.weight


class Log(nn.Module):
    """A semantic branch for pictures whose channels are the probabilities themselves."""

    def forward(self, features):
        return features.clamp(min=1e-9).log()


class Maps(nn.Module):
    """A head of fixed masks: a point gets the first confidence map that exceeds one half there, or none; windows are whole
    pictures. In a mirrored picture (told by its corner pixel) it answers with mirrored masks."""

    def __init__(self, *confidences, stride=1, mark=None):
        super().__init__()
        self.maps, self.stride, self.mark, self.asked, self.shared = confidences, stride, mark, [], 0

    def share(self, features):
        self.shared += 1
        return features

    def corners(self, points, size):
        return torch.zeros(len(points), 2, dtype=torch.long), size

    def forward(self, features, points, shared=None, corners=None):
        h, w = (n * self.stride for n in features.shape[2:])
        out = torch.full((points.shape[0] * points.shape[1], h, w), -20.0)
        for n, (x, y) in enumerate(points.reshape(-1, 2).tolist()):
            self.asked.append((x, y))
            for c in self.maps:
                c = F.pad(c, (0, w - c.shape[1], 0, h - c.shape[0]))
                if self.mark is not None and features[n // points.shape[1], 0, 0, 0] != self.mark:
                    c = c.flip(1)
                if c[int(y), int(x)] > 0.5:
                    out[n] = c.clamp(1e-7, 1 - 1e-7).logit()
                    break
        return out, torch.zeros(len(out), 2, dtype=torch.long)


class Fixed(nn.Module):
    """A proposal branch with one answer for all pictures."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, features):
        return self.scores[None, None].expand(len(features), 1, *self.scores.shape)


def planted(confidences, isthing=(False, True, True), proposal=None, stride=1, mark=None, **kwargs):
    m = AdaptIS(torch.tensor(isthing), Eye(len(isthing), stride), width=4, blocks=1, adains=1, proposals=proposal is not None,
                **kwargs)
    m.semantic, m.selection = Log(), Maps(*confidences, stride=stride, mark=mark)
    if proposal is not None:
        m.proposal = Fixed(proposal)
    return m.eval()


def seen_as(classes, n=3, sure=0.9):
    """A picture [n, H, W] whose channels are the probabilities of the classes."""
    out = torch.full((n, *classes.shape), (1 - sure) / (n - 1))
    return out.scatter(0, classes[None], sure)


def check_prediction(p, isthing, h, w):
    """Segments are contiguous, stuff occurs once, instances are the things with their boxes and masks."""
    n = len(p.categories)
    assert p.segments.shape == (h, w) and p.segments.dtype == torch.int64
    assert set(range(1, n + 1)) <= set(p.segments.unique().tolist()) <= set(range(n + 1)) and len(p.scores) == n
    stuff = [c for c in p.categories.tolist() if not isthing[c]]
    things = [k for k, c in enumerate(p.categories.tolist(), 1) if isthing[c]]
    assert len(stuff) == len(set(stuff)) and ((p.scores >= 0) & (p.scores <= 1)).all()
    i = p.instances
    assert len(i["boxes"]) == len(i["masks"]) == len(i["scores"]) == len(i["categories"]) == len(things)
    assert i["masks"].dtype == torch.bool and i["masks"].shape == (len(things), h, w) and i["boxes"].shape == (len(things), 4)
    for k, box, mask, score, category in zip(things, i["boxes"], i["masks"], i["scores"], i["categories"]):
        assert torch.equal(mask, p.segments == k) and category == p.categories[k - 1] and abs(score - p.scores[k - 1]) < 1e-6
        ys, xs = mask.nonzero().unbind(1)
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def scene():
    """11 x 14: stuff 0 above; things 1 and 2 below, one of them on the border, the other in two parts."""
    classes = torch.zeros(11, 14, dtype=torch.long)
    classes[4:9, 0:5], classes[6:11, 7:9], classes[6:11, 11:13] = 1, 2, 2
    return classes, [(classes == 1) * 0.8, (classes == 2) * 0.7]


def test_stuff_comes_from_the_semantic_branch_and_things_from_the_greedy_algorithm():
    """Section 5: stuff by argmax; instances with the category of the highest probability."""
    classes, masks = scene()
    p = segment_panoptic(planted(masks), seen_as(classes))
    check_prediction(p, (False, True, True), 11, 14)
    assert sorted(p.categories.tolist()) == [0, 1, 2] and (p.segments > 0).all()
    assert torch.equal(p.categories[p.segments - 1], classes)
    assert sorted(round(s, 3) for s in p.instances["scores"].tolist()) == [0.7, 0.8]


def test_scores_of_stuff_lie_between_zero_and_one():
    """Scores lie in 0..1; the surer of two kinds of stuff does not score lower."""
    classes = torch.zeros(4, 6, dtype=torch.long)
    classes[:, 3:] = 1
    image = torch.where(classes == 0, torch.tensor([0.9, 0.05, 0.05])[:, None, None],
                        torch.tensor([0.3, 0.6, 0.1])[:, None, None])
    p = segment_panoptic(planted([], isthing=(False, False, True)), image)
    check_prediction(p, (False, False, True), 4, 6)
    scores = dict(zip(p.categories.tolist(), p.scores.tolist()))
    assert scores[0] >= scores[1]


def test_two_things_of_one_category_are_two_segments_and_stuff_in_two_parts_is_one():
    """The task: an instance id to each thing; a stuff category has at most one segment."""
    classes = torch.zeros(6, 10, dtype=torch.long)
    classes[:, 3:7] = 1
    left, right = area(6, 10, (0, 3, 6, 5)), area(6, 10, (0, 5, 6, 7))
    p = segment_panoptic(planted([left * 0.8, right * 0.9]), seen_as(classes))
    check_prediction(p, (False, True, True), 6, 10)
    assert sorted(p.categories.tolist()) == [0, 1, 1] and sorted(m.sum() for m in p.instances["masks"]) == [12, 12]


def test_a_thing_pixel_without_an_instance_is_void():
    """Choice: a pixel that looks like a thing but belongs to no instance becomes void."""
    classes, masks = scene()
    p = segment_panoptic(planted(masks[:1]), seen_as(classes))
    check_prediction(p, (False, True, True), 11, 14)
    assert torch.equal(p.segments == 0, classes == 2) and sorted(p.categories.tolist()) == [0, 1]


@pytest.mark.parametrize("stuff_area, kept", [(0, [0, 1]), (6, [0, 1]), (7, [0]), (18, [0]), (19, [])])
def test_stuff_of_fewer_than_stuff_area_pixels_is_void(stuff_area, kept):
    """Choice: 18 pixels of one stuff and 6 of another; exactly stuff_area are enough, counted at 1024x2048."""
    classes = torch.zeros(4, 6, dtype=torch.long)
    classes[:2, :3] = 1
    p = segment_panoptic(planted([], isthing=(False, False, True), stuff_area=stuff_area * 1024 * 2048 / classes.numel()), seen_as(classes))
    check_prediction(p, (False, False, True), 4, 6)
    assert sorted(p.categories.tolist()) == kept
    for c in range(2):
        assert (p.segments[classes == c] > 0).all() == (c in kept) and (p.segments[classes == c] > 0).any() == (c in kept)


def test_the_category_of_an_instance_is_that_of_the_highest_summed_probability():
    """l(M) = argmax sum p: one very sure pixel outvotes three that lean the other way; not a majority of pixels."""
    image = torch.tensor([0.1, 0.8, 0.1])[:, None, None].repeat(1, 3, 8)
    image[:, 1, 1:4] = torch.tensor([0.02, 0.5, 0.48])[:, None]
    image[:, 1, 4] = torch.tensor([0.02, 0.03, 0.95])
    m = area(3, 8, (1, 1, 2, 5))
    p = segment_panoptic(planted([m * 0.9]), image)
    assert p.categories.tolist() == [2] and p.segments[1].tolist() == [0, 1, 1, 1, 1, 0, 0, 0]
    image[:, 1, 4] = torch.tensor([0.02, 0.49, 0.49])
    assert segment_panoptic(planted([m * 0.9]), image).categories.tolist() == [1]


def test_the_category_of_an_instance_is_one_among_the_things():
    """Choice: although stuff has the highest sum over its mask, of which two fifths are known as stuff."""
    image = seen_as(torch.zeros(3, 8, dtype=torch.long), sure=0.98)
    image[:, 1, 1:4] = torch.tensor([0.44, 0.11, 0.45])[:, None]
    p = segment_panoptic(planted([area(3, 8, (1, 1, 2, 6)) * 0.9]), image)
    check_prediction(p, (False, True, True), 3, 8)
    assert sorted(p.categories.tolist()) == [0, 2] and p.categories[p.segments[1, 2] - 1] == 2


def test_an_instance_that_lies_mostly_on_stuff_is_none():
    """Stuff is marked as segmented: half of the mask on stuff is too much."""
    classes = torch.zeros(3, 8, dtype=torch.long)
    classes[1, 1:4] = 2
    p = segment_panoptic(planted([area(3, 8, (1, 1, 2, 7)) * 0.9]), seen_as(classes))
    assert p.categories.tolist() == [0] and torch.equal(p.segments == 0, classes == 2) and len(p.instances["masks"]) == 0


def test_points_are_asked_only_where_things_are():
    """Stuff is never asked; with proposals the points are their local maxima, the highest first."""
    classes, masks = scene()
    m = planted(masks)
    segment_panoptic(m, seen_as(classes))
    assert m.selection.asked and all(classes[int(y), int(x)] > 0 for x, y in m.selection.asked)
    scores = torch.full((11, 14), -4.0)
    scores[5, 2], scores[1, 12], scores[8, 8], scores[7, 3], scores[9, 12] = 1.0, 5.0, 2.0, 0.5, 3.0
    m = planted(masks, proposal=scores, per_round=1)
    p = segment_panoptic(m, seen_as(classes))
    assert m.selection.asked[0] == (12.5, 9.5) and m.selection.asked[1] == (2.5, 5.5) and len(m.selection.asked) == 2
    assert torch.equal(p.categories[p.segments - 1], classes)


def test_without_a_proposal_nothing_is_found_where_no_maximum_lies():
    """Points are the local maxima and no others."""
    classes, masks = scene()
    scores = torch.zeros(11, 14)
    scores[8, 8] = 1
    p = segment_panoptic(planted(masks, proposal=scores), seen_as(classes))
    assert sorted(p.categories.tolist()) == [0, 2] and torch.equal(p.segments == 0, classes == 1)


@pytest.mark.parametrize("name, value, things", [("threshold", 0.75, 1), ("threshold", 0.85, 0), ("threshold", 0.6, 2),
                                                 ("min_area", 21, 1),
                                                 ("min_area", 20, 2), ("patience", 1, 2), ("min_area", 26, 0)])
def test_the_model_s_numbers_reach_the_greedy_algorithm(name, value, things):
    """Threshold T, min_area, patience are those of the model; things of 25 and 20 pixels with confidences .8 and .7."""
    classes, masks = scene()
    p = segment_panoptic(planted(masks, **{name: value}), seen_as(classes))
    check_prediction(p, (False, True, True), 11, 14)
    assert len(p.instances["masks"]) == things


@pytest.mark.parametrize("per_round, patience", [(2, 3), (5, 1)])
def test_per_round_and_patience_are_those_of_the_model(per_round, patience):
    """No object anywhere: per_round points in each of patience rounds."""
    m = planted([], per_round=per_round, patience=patience)
    p = segment_panoptic(m, seen_as(torch.ones(8, 8, dtype=torch.long)))
    assert len(m.selection.asked) == per_round * patience and (p.segments == 0).all() and p.categories.shape == (0,)


@pytest.mark.parametrize("kind", ["stuff", "things"])
def test_pictures_of_stuff_alone_and_of_things_alone(kind):
    """Degenerate: no thing: no point is asked; no stuff: one instance fills the picture."""
    h, w = 5, 7
    m = planted([torch.full((h, w), 0.9)])
    p = segment_panoptic(m, seen_as(torch.full((h, w), int(kind == "things"))))
    check_prediction(p, (False, True, True), h, w)
    assert (p.segments == 1).all() and p.categories.tolist() == [int(kind == "things")]
    assert (len(m.selection.asked) > 0) == (kind == "things")


def test_results_repeat_without_a_generator_and_follow_one_that_is_given():
    """Random points come from a generator with seed 0 unless one is given."""
    asked = []
    for g in (None, None, seeded(0), seeded(1)):
        m = planted([])
        torch.manual_seed(len(asked))
        segment_panoptic(m, seen_as(torch.ones(20, 20, dtype=torch.long)), generator=g)
        asked.append(m.selection.asked)
    assert asked[0] == asked[1] == asked[2] != asked[3]


def test_the_trace_of_the_greedy_algorithm_is_handed_through():
    """For the figures."""
    classes, masks = scene()
    trace = []
    segment_panoptic(planted(masks), seen_as(classes), trace=trace)
    assert sum(t["added"] for t in trace) == 2


@pytest.mark.parametrize("h, w, stride", [(11, 14, 2), (9, 9, 4), (7, 5, 2), (1, 3, 2)])
def test_pictures_whose_size_is_no_multiple_of_the_stride(h, w, stride):
    """The map is larger than the picture; what is beyond does not count. Probabilities are bilinear between the cells'
    centres."""
    coarse = rand(3, -(-h // stride), -(-w // stride), seed=h)
    coarse[2] *= 0
    coarse = coarse / coarse.sum(0)
    image = coarse.repeat_interleave(stride, 1).repeat_interleave(stride, 2)[:, :h, :w]
    m = planted([], stride=stride, isthing=(False, False, True))
    p = segment_panoptic(m, image)
    check_prediction(p, (False, False, True), h, w)
    feature = F.avg_pool2d(image[None], stride, ceil_mode=True)
    fine = F.interpolate(feature.clamp(min=1e-9).log(), scale_factor=stride, mode="bilinear", align_corners=False)[0, :, :h, :w]
    other = F.interpolate(feature, scale_factor=stride, mode="bilinear", align_corners=False)[0, :, :h, :w]
    classes = p.categories[p.segments - 1]
    assert torch.equal(classes, fine.argmax(0)) or torch.equal(classes, other.argmax(0))


@pytest.mark.parametrize("w", [9, 10, 11, 12])
def test_the_cells_of_a_mirrored_picture_lie_on_those_of_the_picture(w):
    """With `flip` a picture whose width is no multiple of the stride is filled up before it is mirrored: an encoder that averages
    each cell sees the same cells in both views, and a head that knows no left and right gives the same masks."""
    classes = torch.zeros(8, w, dtype=torch.long)
    classes[:, 5:] = 1
    image = seen_as(classes, sure=0.99)
    a, b = [segment_panoptic(planted([], stride=4, isthing=(False, False, True)), image, flip=flip) for flip in (False, True)]
    assert torch.equal(a.segments, b.segments) and len(a.categories) == 2
    m = lively(InstanceSelection(3, 4, width=4, blocks=1, window=(8, 8), radius=9, adains=1, coordinates=False))
    for p in m.parameters():
        if p.dim() == 4:
            p.data = p.data.mean((2, 3), keepdim=True).expand_as(p).contiguous()
    last = m.layers[-1]
    last.weight.data[:], last.bias.data[:] = last.weight.data[:1], last.bias.data[:1]
    found = []
    for flip in (False, True):
        model = planted([], stride=4, isthing=(False, True, True))
        model.selection = m
        found.append(segment_panoptic(model, image, flip=flip))
    assert torch.equal(found[0].segments, found[1].segments) and torch.allclose(found[0].scores, found[1].scores, atol=1e-4)


def test_things_of_an_odd_picture_keep_to_the_picture():
    """Masks of windows that hang over the edge: one instance in the last corner."""
    classes = torch.zeros(9, 11, dtype=torch.long)
    classes[6:, 8:] = 1
    p = segment_panoptic(planted([F.pad((classes == 1) * 0.9, (0, 1, 0, 1), value=0.9)], stride=2), seen_as(classes, sure=0.99))
    check_prediction(p, (False, True, True), 9, 11)
    assert p.instances["boxes"].tolist() == [[8, 6, 11, 9]]


def test_flip_averages_the_probabilities_of_the_mirrored_picture():
    """Semantic probabilities and confidences: the mean of both views, not one of them; the mirrored view is mirrored back."""
    h, w = 4, 8
    classes = torch.zeros(h, w, dtype=torch.long)
    classes[:, 2:6] = 1
    class Ramp(nn.Module):                                                   # a branch that is biased to stuff on its right
        def forward(self, features):
            p = features.clone()
            p[:, 0, :, 4:] += 3 * (features[:, 0, :, 4:] < 0.5)
            return (p / p.sum(1, keepdim=True)).log()
    image = seen_as(classes)
    m = planted([(classes == 1) * 0.8])
    m.semantic = Ramp()
    plain, both = segment_panoptic(m, image), segment_panoptic(m, image, flip=True)
    # Thing .9 and stuff .05 on the left; .225 and .7625 on the right; their means are .5625 and .40625 on both sides.
    assert plain.categories.tolist() == [0] and plain.segments[0].tolist() == [1, 1, 0, 0, 1, 1, 1, 1]
    assert both.categories.tolist() == [1, 0] and both.segments[0].tolist() == [2, 2, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("a, b, found", [(0.9, 0.2, True), (0.9, 0.05, False), (0.45, 0.6, True), (0.45, 0.5, False)])
def test_flip_averages_the_confidences_of_masks(a, b, found):
    """C is the mean of the point's confidence in the picture and of the mirrored point's in the mirrored one."""
    classes = torch.zeros(5, 9, dtype=torch.long)
    classes[1:4, 0:4] = 1
    class Two(Maps):
        def forward(self, features, points, shared=None, corners=None):
            out = torch.full((points.shape[0] * points.shape[1], 5, 9), -20.0)
            for n, (x, y) in enumerate(points.reshape(-1, 2).tolist()):
                c = (classes == 1) * a
                if features[n // points.shape[1], 1, 1, 0] < 0.5:                        # mirrored
                    c = ((classes == 1) * b).flip(1)
                if c[int(y), int(x)] > 0:
                    out[n] = c.clamp(1e-7).logit()
            return out, torch.zeros(len(out), 2, dtype=torch.long)
    m = planted([])
    m.selection = Two()
    p = segment_panoptic(m, seen_as(classes), flip=True)
    assert len(p.instances["masks"]) == found
    if found:
        assert torch.equal(p.instances["masks"][0], classes == 1) and abs(p.instances["scores"].item() - (a + b) / 2) < 1e-3


@pytest.mark.parametrize("width, window", [(24, (10, 12)), (24, None), (20, (8, 8))])
def test_with_flip_a_mirrored_picture_gives_the_mirrored_result(width, window):
    """The mean of both views does not know which one came first; windows are mirrored, too."""
    torch.manual_seed(3)
    m = AdaptIS(torch.tensor([False, True, True]), UNet((4, 4), 4), width=4, blocks=1, adains=1, window=window, radius=9,
                min_area=3)
    lively(m, 5)
    image = rand(3, 16, width, seed=2)
    with torch.no_grad():
        m.semantic.layers[-1].bias += m.semantic(m.encoder(image[None])).mean((0, 2, 3)).neg()
    a, b = segment_panoptic(m, image, flip=True), segment_panoptic(m, image.flip(2), flip=True)
    ca, cb = [torch.cat([torch.tensor([-1]), p.categories])[p.segments] for p in (a, b)]
    assert (ca == cb.flip(1)).float().mean() > 0.995 and len(a.instances["masks"]) == len(b.instances["masks"]) > 0
    assert torch.allclose(a.instances["scores"].sort()[0], b.instances["scores"].sort()[0], atol=1e-3)
    plain = [segment_panoptic(m, x) for x in (image, image.flip(2))]
    assert not torch.equal(plain[0].segments > 0, plain[1].segments.flip(1) > 0) or not torch.equal(
        plain[0].scores.sort()[0], plain[1].scores.sort()[0])


@pytest.mark.parametrize("size", [(22, 28), (44, 28), (11, 14)])
def test_a_prediction_may_be_asked_at_another_size(size):
    """predict(image, size): the prediction at `size`; whole multiples of the planted scene's."""
    classes, masks = scene()
    p = planted(masks).predict(seen_as(classes), size)
    check_prediction(p, (False, True, True), *size)
    big = classes.repeat_interleave(size[0] // 11, 0).repeat_interleave(size[1] // 14, 1)
    assert torch.equal(p.categories[p.segments - 1], big)


def test_a_prediction_may_be_smaller_than_its_picture():
    """Boxes, masks and segments at half the size: nearest pixels, for ids must not mix; boxes go with the size."""
    classes = torch.zeros(12, 16, dtype=torch.long)
    classes[4:8, 2:10], classes[11, 15] = 1, 2
    masks = [(classes == 1) * 0.8, (classes == 2) * 0.7]
    p = planted(masks).predict(seen_as(classes), (6, 8))
    check_prediction(p, (False, True, True), 6, 8)
    k = p.categories.tolist().index(1) + 1
    assert torch.equal(p.segments == k, (classes == 1)[::2, ::2])
    own = planted(masks).predict(seen_as(classes))
    for h, w in ((1, 1), (3, 4), (5, 7), (17, 3), (12, 32)):
        p = planted(masks).predict(seen_as(classes), (h, w))
        rows, cols = [min(11, int((i + 0.5) * 12 / h)) for i in range(h)], [min(15, int((j + 0.5) * 16 / w)) for j in range(w)]
        nearest = own.segments[rows][:, cols]
        left = [k for k in range(1, len(own.categories) + 1) if (nearest == k).any()]       # what shrinks to nothing is dropped
        assert torch.equal(p.segments, sum((nearest == k) * new for new, k in enumerate(left, 1)))
        things = [k - 1 for k in left if k <= len(own.instances["scores"])]
        assert torch.equal(p.instances["masks"], own.instances["masks"][things][:, rows][:, :, cols])
        assert torch.allclose(p.instances["boxes"], own.instances["boxes"][things] * torch.tensor([w / 16, h / 12, w / 16, h / 12]))
        assert p.scores.tolist() == [own.scores[k - 1] for k in left] and p.categories.tolist() == [own.categories[k - 1] for k in left]
        assert torch.equal(p.instances["scores"], own.instances["scores"][things])
        assert torch.equal(p.instances["categories"], own.instances["categories"][things])


def test_predict_is_segment_panoptic_with_the_model_s_flip():
    """At the picture's own size by default."""
    m = lively(AdaptIS(torch.tensor([False, True, True]), UNet((4, 4), 4), width=4, blocks=1, adains=1, window=(8, 8), radius=9),
               1)
    image = rand(3, 15, 18)
    for flip in (False, True):
        m.flip = flip
        a, b = m.predict(image), segment_panoptic(m, image, flip=flip)
        check_prediction(a, (False, True, True), 15, 18)
        assert torch.equal(a.segments, b.segments) and torch.equal(a.scores, b.scores) and not a.scores.requires_grad
    assert AdaptIS(torch.tensor([False, True]), UNet((4, 4), 4), width=4, blocks=1, adains=1, flip=True).flip is True


@pytest.mark.parametrize("flip", [False, True])
def test_the_backbone_runs_once_however_many_points_are_asked(flip):
    """Section 4: "only a light-weight AdaptIS head needs to be run several times per image, while the backbone runs only
    once"."""
    m = planted([], patience=6, flip=flip)
    m.predict(seen_as(torch.ones(8, 8, dtype=torch.long)))
    assert m.encoder.seen == 1 + flip and len(m.selection.asked) >= 42 and m.selection.shared <= 1 + flip


# --- 3, 5 Training: AdaptIS.losses, the proposal stage, stages ------------------------------------------------------------

ISTHING = (False, True, True)


def small(loss=normalized_focal_loss, seed=0, points=5, window=(8, 10), proposals=True, stride=2, **kwargs):
    torch.manual_seed(seed)
    return AdaptIS(torch.tensor(ISTHING), UNet((4, 4), 4, stride), width=4, blocks=1, adains=1, window=window, radius=9,
                   points=points, loss=loss, proposals=proposals, **kwargs)


class Spy:
    """A mask loss that remembers what it was given."""

    def __init__(self, value=None):
        self.value, self.seen = value, []

    def __call__(self, logits, masks, weight=None, *args):
        self.seen.append((logits.detach(), masks, weight))
        return binary_cross_entropy(logits, masks, weight) if self.value is None else logits.sum((1, 2)) * 0 + self.value


def watch(m):
    """Points, ids of pictures and corners of every call of the head."""
    seen, forward = [], m.selection.forward
    def call(features, points, *args, **kwargs):
        out = forward(features, points, *args, **kwargs)
        seen.append((points.detach().clone(), out[0].detach(), out[1].clone()))
        return out
    m.selection.forward = call
    return seen


def street(seed=0, h=16, w=20, crowd=False):
    """Stuff, two things and a third that is a crowd, void in a corner."""
    s = blocks(h, w, (0, 0, h, w), (2, 3, 9, 8), (6, 7, 14, 15), (0, 12, 5, 20))
    s[12:, :3] = 0
    return label(s.roll((seed, 3 * seed), (0, 1)), [0, 1, 2, 1], [False, False, False, crowd])


def known_classes(target):
    """Class of each pixel, -1 where there is none: void or a crowd."""
    h, w = target.segments.shape
    return torch.tensor([[-1 if (k := int(target.segments[i, j])) == 0 or target.crowd[k - 1] else int(target.categories[k - 1])
                          for j in range(w)] for i in range(h)])


@pytest.mark.parametrize("h, w, stride", [(16, 20, 2), (15, 17, 2), (17, 21, 4)])
def test_the_semantic_loss_is_the_cross_entropy_of_all_known_pixels(h, w, stride):
    """Section 5: jointly trained; void and crowds teach nothing; logits are bilinear between the cells' centres."""
    m, images = small(stride=stride), rand(2, 3, h, w)
    targets = [street(0, h, w, crowd=True), street(1, h, w)]
    loss = m.losses(images, targets)["semantic"]
    logits = F.interpolate(m.semantic(m.encoder(images)), scale_factor=stride, mode="bilinear", align_corners=False)[:, :, :h, :w]
    total, n = 0.0, 0
    for z, t in zip(logits.log_softmax(1), targets):
        for (i, j), c in zip(itertools.product(range(h), range(w)), known_classes(t).flatten().tolist()):
            if c >= 0:
                total, n = total - z[c, i, j].item(), n + 1
    assert abs(loss.item() - total / n) < 1e-4


@pytest.mark.parametrize("h, w, window, stride", [(16, 20, (8, 10), 2), (15, 17, (8, 10), 2), (15, 17, None, 2),
                                                  (6, 7, (8, 10), 2), (17, 21, (8, 12), 4), (17, 21, None, 4)])
def test_the_truth_of_a_mask_is_the_object_at_the_point_on_its_window(h, w, window, stride):
    """Section 3: the network's output for (I, Q(x, y)) is compared to the mask of the object there; void, crowds
    and what lies beyond the picture are left out."""
    spy = Spy()
    m = small(spy, window=window, stride=stride)
    calls = watch(m)
    targets = [street(0, h, w, crowd=True), street(1, h, w)]
    if h < 10:
        targets = [label(blocks(h, w, (0, 0, h, w), (1, 1, 3, 4)), [0, 1]),
                   label(blocks(h, w, (0, 0, h, w), (5, 0, 6, 1), (0, 0, 1, 7)), [0, 2, 1])]
    loss = m.losses(rand(2, 3, h, w), targets)["mask"]
    (points, logits, corners), (seen, masks, weight) = calls[0], spy.seen[0]
    assert len(calls) == len(spy.seen) == 1 and points.shape == (2, 5, 2) and torch.equal(logits, seen)
    assert masks.dtype == torch.bool
    for n in range(10):
        t, (x, y), corner = targets[n // 5], points[n // 5, n % 5].tolist(), corners[n].tolist()
        k = int(t.segments[int(y), int(x)])
        assert k > 0 and ISTHING[t.categories[k - 1]] and not t.crowd[k - 1] and x % 1 == y % 1 == 0.5
        classes = known_classes(t)
        for i, j in itertools.product(range(masks.shape[1]), range(masks.shape[2])):
            v, u = i + corner[1], j + corner[0]
            inside = v < h and u < w
            known = inside and classes[v, u] >= 0
            assert bool(weight[n, i, j]) == known and (not known or bool(masks[n, i, j]) == (int(t.segments[v, u]) == k))
    assert abs(loss - binary_cross_entropy(logits, masks, weight).mean()) < 1e-5


def test_every_object_of_a_picture_is_pointed_at():
    """Object-level stratification: things only, no crowds, each equally often; K points a picture."""
    spy = Spy()
    m = small(spy, points=200)
    calls = watch(m)
    m.losses(rand(1, 3, 16, 20), [street(0, crowd=True)])
    s = street(0).segments
    ids = [int(s[int(y), int(x)]) for x, y in calls[0][0][0].tolist()]
    assert len(ids) == 200 and set(ids) == {2, 3} and share_is(ids.count(2), 200, 0.5)


def test_objects_are_the_things_that_show():
    """Numbers of the things with a pixel that are no crowds; stuff and hidden segments are none."""
    m = small()
    assert m.objects(street(0)).tolist() == [2, 3, 4] and m.objects(street(0, crowd=True)).tolist() == [2, 3]
    hidden = label(blocks(6, 6, (0, 0, 6, 6), (1, 1, 2, 2), (1, 1, 3, 3)), [0, 1, 2])
    assert m.objects(hidden).tolist() == [3] and m.objects(hidden).dtype == torch.int64
    assert m.objects(label(torch.zeros(4, 4, dtype=torch.long), [])).shape == (0,)
    assert m.objects(label(blocks(4, 4, (0, 0, 4, 4)), [1], [True])).shape == (0,)


def test_the_truth_on_windows_is_that_of_a_loop():
    """truth(segments [B, H, W], ids [B, K], corners [B K, 2], size): masks, and where truth is known at all: not in void."""
    segments = torch.stack([street(0).segments, street(1).segments])
    ids, corners = torch.tensor([[2, 3, 4], [3, 3, 1]]), torch.tensor([[0, 0], [12, 10], [4, 0], [2, 8], [0, 10], [12, 2]])
    masks, known = small().truth(segments, ids, corners, (6, 8))
    assert masks.shape == known.shape == (6, 6, 8) and masks.dtype == torch.bool
    for n, i, j in itertools.product(range(6), range(6), range(8)):
        v, u = i + int(corners[n, 1]), j + int(corners[n, 0])
        k = int(segments[n // 3, v, u])
        assert bool(known[n, i, j]) == (k > 0) and bool(masks[n, i, j]) == (k == int(ids[n // 3, n % 3]))


def grads(m, loss, names):
    """Gradients of the parameters whose names start so; None where none is attached."""
    ps = [p for n, p in m.named_parameters() if n.startswith(names)]
    return torch.autograd.grad(loss, ps, allow_unused=True)


@pytest.mark.parametrize("kind", ["no objects", "all void", "crowd only", "one pixel", "batch of one", "mixed"])
def test_every_picture_gives_a_loss_and_every_parameter_a_gradient(kind):
    """Zero with gradients attached where there is nothing to learn from, so that DDP never waits."""
    things = street(0)
    targets = {"no objects": [label(blocks(16, 20, (0, 0, 16, 20)), [0])] * 2,
               "all void": [label(torch.zeros(16, 20, dtype=torch.long), [])] * 2,
               "crowd only": [label(blocks(16, 20, (0, 0, 16, 20)), [1], [True])] * 2,
               "one pixel": [label(blocks(16, 20, (15, 19, 16, 20)), [1])] * 2, "batch of one": [things],
               "mixed": [things, label(torch.zeros(16, 20, dtype=torch.long), [])]}[kind]
    m = small()
    losses = m.losses(rand(len(targets), 3, 16, 20), targets)
    assert set(losses) == {"mask", "semantic"}
    assert all(v.shape == () and v.isfinite() and v.requires_grad for v in losses.values())
    found = grads(m, losses["mask"] + losses["semantic"], ("encoder", "selection", "semantic"))
    assert all(g is not None and g.isfinite().all() for g in found)
    if kind in ("no objects", "all void", "crowd only"):
        assert losses["mask"] == 0
        assert all(g is None or (g == 0).all() for g in grads(m, m.losses(rand(2, 3, 16, 20), targets)["mask"], ("selection",)))
    else:
        assert losses["mask"] > 0
    assert (losses["semantic"] == 0) == (kind in ("all void", "crowd only"))


def test_a_picture_without_objects_adds_zero():
    """The mask loss is the mean over the points of the pictures with objects; one without adds nothing to it."""
    m = small(Spy(2.0))
    empty = label(blocks(16, 20, (0, 0, 16, 20)), [0])
    both, half, none = [m.losses(rand(2, 3, 16, 20), t)["mask"].item()
                        for t in ([street(0), street(1)], [empty, street(1)], [empty, empty])]
    assert abs(both - 2) < 1e-6 and none == 0 and abs(half - 2) < 1e-6


def test_void_and_crowd_pixels_do_not_matter_to_the_mask_loss():
    """The same points on the same pictures; what is void in one is part of an object in the other: other loss; but if only the
    segment number under void or crowd changes nothing changes."""
    images, losses = rand(1, 3, 16, 20), []
    base = street(0)
    crowd = label(base.segments, [0, 1, 2, 1], [False, False, False, True])
    void = label(torch.where(base.segments == 4, 0, base.segments), [0, 1, 2])
    for t in (crowd, void):
        m = small()
        torch.manual_seed(4)
        losses.append(m.losses(images, [t]))
    assert torch.equal(losses[0]["mask"], losses[1]["mask"]) and torch.equal(losses[0]["semantic"], losses[1]["semantic"])


def test_the_encoder_runs_once_for_all_points_of_a_batch():
    """Training as well: one feature map, K points."""
    m = small(points=9)
    count, forward = [], m.encoder.forward
    m.encoder.forward = lambda x: (count.append(len(x)), forward(x))[1]
    m.losses(rand(2, 3, 16, 20), [street(0), street(1)])
    assert count == [2]


def test_the_default_mask_loss_is_the_normalized_focal_loss():
    """"In our experiments we used a modification of Focal Loss"; 6 points a picture, T = .5, rates of the toy problem."""
    m = AdaptIS(torch.tensor([False, True]), UNet((4, 4), 4), width=4, blocks=3)
    assert m.loss is normalized_focal_loss and m.points == 6 and m.threshold == 0.5 and m.per_round == 7 and m.stride == 2
    assert m.isthing.tolist() == [False, True] and m.proposal is not None


# the proposal stage

def freeze_all_but_proposals(m):
    for n, p in m.named_parameters():
        p.requires_grad_(n.startswith("proposal"))
    return m.train()


def test_while_proposals_learn_nothing_else_moves():
    """"The point proposal network was trained afterwards with frozen backbone, semantic segmentation and AdaptIS branches":
    gradients for that branch alone, running statistics of all others stay, the others are in eval mode, their parameters too."""
    m = freeze_all_but_proposals(small())
    before = {n: b.clone() for n, b in m.named_buffers()}
    losses = m.losses(rand(2, 3, 16, 20), [street(0), street(1)])
    assert set(losses) == {"proposal"} and losses["proposal"].isfinite() and losses["proposal"] > 0
    losses["proposal"].backward()
    for n, p in m.named_parameters():
        assert (p.grad is not None and p.grad.isfinite().all()) == n.startswith("proposal")
    for n, b in m.named_buffers():
        if not n.startswith("proposal"):
            assert torch.equal(b, before[n]), n
    assert any(not torch.equal(b, before[n]) for n, b in m.named_buffers() if n.startswith("proposal"))
    assert m.proposal.training


def test_the_mask_stage_comes_back_after_the_proposal_stage():
    """Which losses there are follows from what may learn; the frozen modules learn again in training mode afterwards."""
    m = freeze_all_but_proposals(small())
    m.losses(rand(1, 3, 16, 20), [street(0)])
    m.requires_grad_(True).train()
    before = {n: b.clone() for n, b in m.named_buffers()}
    assert set(m.losses(rand(1, 3, 16, 20), [street(0)])) == {"mask", "semantic"}
    assert any(not torch.equal(b, before[n]) for n, b in m.named_buffers() if n.startswith("encoder"))


class Growing(Maps):
    """A head whose mask for a point of the object is the object without its first columns: the further right, the worse, so that
    the IoU falls with x."""

    def __init__(self, segments, k):
        super().__init__()
        self.segments, self.k = segments, k

    def forward(self, features, points, shared=None, corners=None):
        out = torch.full((points.shape[0] * points.shape[1], *self.segments.shape), -9.0)
        for n, (x, _) in enumerate(points.reshape(-1, 2).tolist()):
            self.asked.append((x, _))
            out[n, (self.segments == self.k) & (torch.arange(self.segments.shape[1]) >= int(x))] = 9.0
        return out, torch.zeros(len(out), 2, dtype=torch.long)


def proposal_labels(segments, target, head_, count=48, best=0.2, logit=0.0):
    """Watches proposal_loss through the gradient of a map of scores -> loss, gradient [H, W], points asked."""
    m = planted([], proposal=torch.zeros(segments.shape))
    m.selection = head_
    scores = torch.full(segments.shape, logit, requires_grad=True)
    m.proposal.scores = scores
    image = torch.rand(1, 3, *segments.shape)
    numbers = {} if (count, best) == (48, 0.2) else dict(count=count, best=best)
    loss = m.proposal_loss(image, segments[None], [m.objects(target)], **numbers)
    return loss, torch.autograd.grad(loss, scores)[0], head_.asked


@pytest.mark.parametrize("count, best, positive", [(48, 0.2, 10), (20, 0.25, 5), (10, 0.5, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_fifth_of_the_points_are_positive(seed, count, best, positive):
    """"The points that fall into top 20% are marked as positive examples and the others as negative": 10 of 48, by IoU; binary
    cross entropy, read from its gradient (p - label) / count at the points."""
    torch.manual_seed(seed)
    target = label(blocks(9, 70, (0, 0, 9, 70), (1, 2, 8, 66)), [0, 1])
    loss, grad, asked = proposal_labels(target.segments, target, Growing(target.segments, 2), count, best, logit=1.5)
    assert len(asked) == count and all(target.segments[int(y), int(x)] == 2 for x, y in asked)
    p = 1 / (1 + math.exp(-1.5))
    order = sorted(asked)                                                              # the smaller x, the higher the IoU
    edge = order[positive - 1][0]
    total, expected = 0.0, torch.zeros(9, 70)
    surely, maybe = [q for q in asked if q[0] < edge], [q for q in asked if q[0] == edge]
    for x, y in asked:
        expected[int(y), int(x)] += p / count
    for x, y in surely:
        expected[int(y), int(x)] -= 1 / count
    off = (expected - grad) * count                                           # the points of equal IoU share what is left
    assert abs(off.sum() - (positive - len(surely))) < 1e-3 and (off.abs() < 1e-4).logical_or(torch.arange(70) == int(edge)).all()
    total = (positive * -math.log(p) + (count - positive) * -math.log(1 - p)) / count
    assert abs(loss.item() - total) < 1e-5 and len(maybe) > 0


def test_iou_counts_what_is_wrongly_claimed_too():
    """IoU = intersection / union: points whose masks cover more than the object are worse here than those of three quarters
    of it, although they miss nothing."""
    target = label(blocks(8, 40, (0, 0, 8, 40), (2, 2, 6, 34)), [0, 1])

    class Greedy(Maps):
        def forward(self, features, points, shared=None, corners=None):
            out = torch.full((points.shape[1], 8, 40), -9.0)
            for n, (x, y) in enumerate(points.reshape(-1, 2).tolist()):
                self.asked.append((x, y))
                if x < 12:
                    out[n, 2:6, 2:26] = 9.0                                                            # IoU 96 / 128 = .75
                else:
                    out[n, 2:6, 2:34] = out[n, 6:, 2:26] = 9.0                              # IoU 128 / 176 = .73, recall 1
            return out, torch.zeros(len(out), 2, dtype=torch.long)
    for seed in range(3):
        torch.manual_seed(seed)
        _, grad, asked = proposal_labels(target.segments, target, Greedy())
        assert sum(x < 12 for x, _ in asked) >= 10 and (grad < -1e-6).any() and ((grad < -1e-6).nonzero()[:, 1] < 12).all()


@pytest.mark.parametrize("logit, threshold, better", [(0.3, 0.5, True), (-0.3, 0.5, False), (1.0, 0.8, False), (-0.3, 0.4, True)])
def test_masks_of_proposals_are_cut_at_the_models_threshold(logit, threshold, better):
    """M = C > T: points on the left answer with the whole object at `logit`, the others surely with half of it."""
    target = label(blocks(8, 40, (0, 0, 8, 40), (2, 2, 6, 34)), [0, 1])

    class Faint(Maps):
        def forward(self, features, points, shared=None, corners=None):
            out = torch.full((points.shape[1], 8, 40), -9.0)
            for n, (x, y) in enumerate(points.reshape(-1, 2).tolist()):
                self.asked.append((x, y))
                out[n, 2:6, 2:34 if x < 17 else 18] = logit if x < 17 else 9.0
            return out, torch.zeros(len(out), 2, dtype=torch.long)
    m = planted([], proposal=torch.zeros(8, 40), threshold=threshold)
    m.selection = Faint()
    m.proposal.scores = torch.zeros(8, 40, requires_grad=True)
    torch.manual_seed(0)
    loss = m.proposal_loss(torch.rand(1, 3, 8, 40), target.segments[None], [m.objects(target)])
    columns = (torch.autograd.grad(loss, m.proposal.scores)[0] < -1e-6).nonzero()[:, 1]
    assert len(columns) and ((columns < 17) == better).all()


def test_void_does_not_count_in_the_iou_of_proposals():
    """Void teaches nothing: masks that spill into void alone are as good as exact ones, and better than those that miss a
    column."""
    s = blocks(8, 40, (0, 0, 8, 40), (2, 2, 6, 34))
    s[6:, :] = 0
    target = label(s, [0, 1])

    class Spill(Maps):
        def forward(self, features, points, shared=None, corners=None):
            out = torch.full((points.shape[1], 8, 40), -9.0)
            for n, (x, y) in enumerate(points.reshape(-1, 2).tolist()):
                self.asked.append((x, y))
                out[n, 2:6, 2:34 if x < 8 else 30] = 9.0
                out[n, 6:] = 9.0 if x < 8 else -9.0
            return out, torch.zeros(len(out), 2, dtype=torch.long)
    torch.manual_seed(1)
    _, grad, asked = proposal_labels(s, target, Spill(), count=40)
    assert sum(x < 8 for x, _ in asked) >= 8 and ((grad < -1e-6).nonzero()[:, 1] < 8).all()


def test_points_of_proposals_lie_on_one_object_of_each_picture():
    """"We pick a random object and sample several random point proposals in this object": 48 on one, not on several."""
    m, objects = freeze_all_but_proposals(small()), set()
    calls = watch(m)
    for _ in range(8):
        m.losses(rand(2, 3, 16, 20), [street(0), street(1)])
    for points, _, _ in calls:
        assert points.shape[-2] in (48, 96) or points.numel() == 2 * 96
    points = torch.stack([c[0].reshape(2, 48, 2) for c in calls])
    for run, b in itertools.product(range(8), range(2)):
        s = street(b).segments
        ids = {int(s[int(y), int(x)]) for x, y in points[run, b].tolist()}
        assert len(ids) == 1 and ids <= {2, 3, 4}
        objects |= ids
    assert len(objects) > 1


def test_proposals_without_objects_cost_nothing_with_gradients_attached():
    """Degenerate: no object, all void, crowds only; and a picture with objects beside one without."""
    void = label(torch.zeros(16, 20, dtype=torch.long), [])
    crowd = label(blocks(16, 20, (0, 0, 16, 20)), [1], [True])
    for targets in ([void, void], [crowd], [void, street(0)]):
        m = freeze_all_but_proposals(small())
        loss = m.losses(rand(len(targets), 3, 16, 20), targets)["proposal"]
        loss.backward()
        assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in m.proposal.parameters())
        assert (loss == 0) == (len(targets) == 1 or targets[1] is void)


def test_the_encoder_runs_once_for_all_proposals():
    """48 points, one feature map."""
    m = freeze_all_but_proposals(small())
    count, forward = [], m.encoder.forward
    m.encoder.forward = lambda x: (count.append(len(x)), forward(x))[1]
    m.losses(rand(2, 3, 16, 20), [street(0), street(1)])
    assert count == [2]


# stages

def test_stages_are_the_masks_and_then_the_proposals():
    """Section 7: Adam with beta 0.9 and 0.999, an own rate for the backbone; all else first, then the proposals alone."""
    m = small(rates=(5e-5, 1e-4), proposal_share=0.25)
    stages = m.stages()
    assert [s[3] for s in stages] == [0.75, 0.25]                                          # shares of the steps
    for stage in stages:
        optimiser = stage[2](stage[1])
        assert isinstance(optimiser, torch.optim.Adam) and all(g["betas"] == (0.9, 0.999) for g in optimiser.param_groups)
    names = {id(p): n for n, p in m.named_parameters()}
    rate = {names[id(p)]: g["lr"] for _, groups, make, _ in stages for g in make(groups).param_groups for p in g["params"]}
    assert rate == {n: 5e-5 if n.startswith("encoder") else 1e-4 for n in names.values()}
    parts = [[names[id(p)] for g in groups for p in g["params"]] for _, groups, _, _ in stages]
    assert all(n.startswith("proposal") for n in parts[1]) and sorted(parts[0] + parts[1]) == sorted(names.values())
    assert len({s[0] for s in stages}) == 2 and all(isinstance(s[0], str) for s in stages)


def test_without_proposals_there_is_one_stage():
    """The toy problem: random points, no such branch."""
    m = small(proposals=False)
    stages = m.stages()
    assert len(stages) == 1 and m.proposal is None and stages[0][3] == 1
    assert {id(p) for g in stages[0][1] for p in g["params"]} == {id(p) for p in m.parameters()}
    assert set(m.losses(rand(1, 3, 16, 20), [street(0)])) == {"mask", "semantic"}
    assert small(proposal_share=0.1).stages()[1][3] == 0.1


def test_the_unet_pads_a_picture_to_whole_cells_of_its_coarsest_level_and_no_further():
    """Levels at strides 2, 4, 8, 16: a picture that 16 divides is not padded, another one by its own last row and column."""
    for widths, multiple in (((4, 4), 4), ((4, 4, 4), 8), ((4, 4, 4, 4), 16)):
        torch.manual_seed(0)
        net, seen = UNet(widths, 4).eval(), []
        net.first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-2:]))
        image = rand(1, 3, 2 * multiple, 3 * multiple)
        whole = net(image)
        cut = net(image[..., :-1, :-2])
        assert [tuple(s) for s in seen] == [(multiple, 3 * multiple // 2)] * 2
        padded = torch.cat([image[..., :-1, :-2], image[..., :-1, -3:-2].expand(-1, -1, -1, 2)], 3)
        padded = torch.cat([padded, padded[..., -1:, :]], 2)
        assert torch.allclose(cut, net(padded)[..., :cut.shape[2], :cut.shape[3]], atol=1e-6) and whole.shape[2] == multiple


# --- The toy problem as a whole: counting, files, the window one clicks in ----------------------------------------------

def test_found_and_false_against_a_plain_count():
    """IoU above one half finds an object; an instance that finds none is false, unless more than half of it is void."""
    g = torch.Generator().manual_seed(5)
    for _ in range(40):
        n, m = (int(torch.randint(0, 6, (), generator=g)) for _ in range(2))
        truth = torch.randint(0, m + 2, (3, 3), generator=g).repeat_interleave(4, 0).repeat_interleave(4, 1)
        labels = torch.where(torch.rand(12, 12, generator=g) < .7, (truth * 7 + 1) % (n + 1), torch.randint(0, n + 1, (12, 12), generator=g))
        categories = torch.cat([torch.zeros(1), (torch.rand(m, generator=g) < .8).float()]).long()       # segment 1 is ground
        found = sum(any(2 * ((labels == i) & (truth == k)).sum() > ((labels == i) | (truth == k)).sum() for i in range(1, n + 1))
                    for k in range(1, m + 2) if categories[k - 1] == 1)
        objects = sum(int((truth == k).any()) for k in range(1, m + 2) if categories[k - 1] == 1)
        false = 0
        for i in range(1, n + 1):
            mine = labels == i
            hits = any(2 * (mine & (truth == k)).sum() > (mine | (truth == k)).sum() for k in range(1, m + 2) if categories[k - 1] == 1)
            false += int(mine.any() and not hits and 2 * (mine & (truth == 0)).sum() <= mine.sum())
        assert adaptis.found_and_false(labels, truth, categories) == (found, objects, false)


def test_an_instance_half_on_void_is_false_and_one_pixel_more_makes_it_neither():
    """The rule of the panoptic evaluation; and an IoU of exactly one half finds nothing."""
    truth, labels = torch.tensor([[0, 0, 1, 1, 2, 2, 2, 2]]), torch.tensor([[1, 1, 1, 1, 0, 0, 2, 2]])
    categories = torch.tensor([0, 1])
    assert adaptis.found_and_false(labels, truth, categories) == (0, 1, 2)
    labels[0, 3] = 0
    assert adaptis.found_and_false(labels, truth, categories) == (0, 1, 1)
    labels[0, 5] = 2
    assert adaptis.found_and_false(labels, truth, categories) == (1, 1, 0)


def test_the_toy_model_is_that_of_section_6():
    """Ground and cell, no proposal branch (points are random), seven points a round, and what is smaller than an object is none."""
    model = adaptis.toy_model()
    assert model.isthing.tolist() == [False, True] and model.proposal is None and model.per_round == 7 and model.min_area == 30
    assert model.selection.window == (64, 64) and model.selection.relative.radius == 48 and model.threshold == .5
    assert adaptis.toy_model(window=None, threshold=.75).selection.window is None


def test_load_reads_what_the_trainer_and_the_demo_write_and_names_what_it_cannot_read(tmp_path):
    model = adaptis.toy_model()
    torch.save({"model": model.state_dict(), "step": 3}, tmp_path / "last.pt")
    read = adaptis.load(tmp_path / "last.pt")
    assert not read.training and all(torch.equal(v, read.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="no such file"):
        adaptis.load(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    for name in ("text.pt", "other.pt"):
        with pytest.raises(ValueError, match=f"{name} holds no weights"):
            adaptis.load(tmp_path / name)


@pytest.fixture
def toy_with_squares():
    """A toy model that answers every point with the 5x5 pixels around it, counting its backbone's and its head's runs."""
    model = adaptis.toy_model().eval()
    model.runs = {"backbone": 0, "head": 0}
    encode = model.encoder.forward
    def encoder(images):
        model.runs["backbone"] += 1
        return encode(images)
    def head(features, points, shared=None, corners=None):
        model.runs["head"] += 1
        first, window = model.selection.corners(points[0], features.shape[-2:])
        rows, cols = (torch.arange(2 * n) + .5 for n in window)
        at = points[0] - 2 * first
        near = ((rows - at[:, 1:]).abs() < 2.5)[:, :, None] & ((cols - at[:, :1]).abs() < 2.5)[:, None]
        return torch.where(near, 3., -3.), 2 * first
    model.encoder.forward, model.selection.forward = encoder, head
    return model


def click(figure, x, y, inside=True):
    """A mouse click at the point (x, y) of the picture, as matplotlib's backends send it."""
    from matplotlib.backend_bases import MouseEvent
    figure.canvas.draw()
    px, py = figure.axes[0].transData.transform((x, y)) if inside else (1, 1)
    figure.canvas.callbacks.process("button_press_event", MouseEvent("button_press_event", figure.canvas, px, py, button=1))


def test_a_click_paints_the_object_under_the_cursor(toy_with_squares):
    """The mask of the clicked point is painted, another click adds another colour, the backbone runs once, clicks beside the picture do nothing."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = adaptis.click_window(toy_with_squares, torch.rand(3, 95, 131))                    # no multiple of the stride, wider than the window
    ax = figure.axes[0]
    overlay = ax.images[1]
    assert overlay.get_array()[..., 3].sum() == 0
    click(figure, 100.5, 40.5)
    painted = np.asarray(overlay.get_array())
    wanted = np.zeros((95, 131), bool)
    wanted[38:43, 98:103] = True
    assert np.array_equal(painted[..., 3] > 0, wanted) and "25 pixels" in ax.get_title() and "0.95" in ax.get_title()
    click(figure, 130.5, 94.5)                                                          # the last pixel
    both = np.asarray(overlay.get_array())
    wanted[92:, 128:] = True
    assert np.array_equal(both[..., 3] > 0, wanted) and not np.array_equal(both[94, 130], both[40, 100])
    click(figure, 20.5, 20.5)
    both = np.asarray(overlay.get_array())
    assert len({tuple(both[y, x]) for y, x in ((40, 100), (94, 130), (20, 20))}) == 3                  # a colour for each
    click(figure, 0, 0, inside=False)
    assert np.array_equal(np.asarray(overlay.get_array()), both) and toy_with_squares.runs == {"backbone": 1, "head": 3}
    plt.close(figure)


def test_the_command_opens_the_window_on_a_number_or_a_file_and_names_what_is_wrong(tmp_path, monkeypatch, capsys):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf().axes[0].images[0].get_array().shape[:2]))
    torch.save({"model": adaptis.toy_model().state_dict()}, tmp_path / "toy.pt")
    Image.fromarray(np.zeros((70, 80, 3), np.uint8)).save(tmp_path / "picture.png")
    for file in ("7", tmp_path / "picture.png"):
        adaptis.main(["--click", str(file), "--weights", str(tmp_path / "toy.pt")])
    assert shown == [(96, 96), (70, 80)]
    plt.close("all")
    (tmp_path / "broken.png").write_text("x")
    for words, text in ((["--click", str(tmp_path / "broken.png")], "broken.png cannot be read as a picture"),
                        (["--click", "7", "--weights", str(tmp_path / "none.pt")], "none.pt: no such file; train a model first")):
        with pytest.raises(SystemExit) as stop:
            adaptis.main(words)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and text in err and len(err.strip().splitlines()) == 1


def test_the_file_stands_alone(tmp_path):
    """It imports, answers --help and segments a picture in a folder without our other files."""
    (tmp_path / "adaptis.py").write_text((Path(adaptis.__file__)).read_text())
    code = "import torch, adaptis; print(adaptis.toy_model().eval().predict(adaptis.OverlappingCells(1)[0].image).segments.shape)"
    for words in (["adaptis.py", "--help"], ["-c", code]):
        run = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    assert "96, 96" in run.stdout
