"""The spec of adaptis.py (Sofiiuk, Barinova, Konushin, ICCV 2019).
Oracles: loops, the dense convolution, breadth-first search, finite differences, planted answers."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptis import (AdaIN, AdaptIS, InstanceSelection, RelativeCoordConv, UNet, adain, bilinear,
                     binary_cross_entropy, conv, example, focal_loss, local_maxima,
                     normalized_focal_loss, sample_batch, sample_points, segment_instances)
from claims import claim
from data import DataError, Sample, crop, mask_boxes
from lab import clicks, demo_adaptis
from lab.cells import OverlappingCells

torch.set_num_threads(1)
PAPER = "sofiiuk2019"
FIT = dict(steps=100, lr=1e-4, lr_body=5e-5, decay=0.5)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def lively(module, seed=0):
    """Random weights and running statistics, so that no batch norm is the identity; eval mode."""
    g = seeded(seed)
    for name, p in itertools.chain(module.named_parameters(), module.named_buffers()):
        if p.is_floating_point():
            noise = torch.randn(p.shape, generator=g) * 0.5
            p.data = noise.abs() + 0.5 if "var" in name else noise
    return module.eval()


def blocks(h, w, *boxes):
    """Segments: block (y0, x0, y1, x1) number k is segment k, later ones hide earlier ones."""
    s = torch.zeros(h, w, dtype=torch.long)
    for k, (y0, x0, y1, x1) in enumerate(boxes, 1):
        s[y0:y1, x0:x1] = k
    return s


def at(*places):
    """Points at the centres of pixels (row, column)."""
    return torch.tensor([[j + 0.5, i + 0.5] for i, j in places]).reshape(-1, 2)


def target(segments, categories, crowd=None):
    sample = Sample(torch.zeros(3, *segments.shape), segments, torch.tensor(categories).long(),
                    torch.tensor(crowd or [False] * len(categories)).bool(), "")
    return crop(sample, 0, 0, tuple(segments.shape))[1]


# --- 4 The greedy algorithm -------------------------------------------------------------------
def planted(*answers):
    """propose() of confidence maps, each for points of its region; and a list of its points."""
    asked = []

    def propose(points):
        asked.append(points.clone())
        out = torch.zeros(len(points), *answers[0].shape)
        for n, (x, y) in enumerate(points.long().tolist()):
            for c in reversed(answers):
                out[n] = c if c[y, x] > 0 else out[n]
        return out, torch.zeros(len(points), 2, dtype=torch.long)
    return propose, asked


def hills(h, w, seed, window=None):
    """Smooth random confidences in a window around each point; nonsense beyond the edge."""
    maps = F.interpolate(rand(6, 1, 4, 4, seed=seed), (h, w), mode="bicubic")[:, 0]
    maps = ((maps - 0.65) * 4 + 0.5).clamp(0.01, 0.99)
    owner, (wh, ww) = maps.argmax(0), window or (h, w)

    def propose(points):
        x, y = points.long().unbind(1)
        far = torch.hypot(points[:, 0] - w / 2, points[:, 1])[:, None, None]
        C = F.pad(maps[owner[y, x]] - 0.002 * far, (0, ww, 0, wh), value=0.97)
        u, v = ((k - n // 2 if window else 0 * k).clamp(min=0) for k, n in ((x, ww), (y, wh)))
        C = torch.stack([c[b:b + wh, a:a + ww] for c, a, b in zip(C, u.tolist(), v.tolist())])
        return C, torch.stack([u, v], 1)
    return propose


def slow_greedy(propose, unknown, rounds, *, threshold, patience, min_area, background):
    """Section 4 on whole maps: the surest answer of each round, then R by one argmax."""
    (h, w), known, found, idle = unknown.shape, ~unknown, [], 0
    for points in rounds:
        if known[points[:, 1].long(), points[:, 0].long()].all() or idle == patience:
            continue
        whole = torch.zeros(len(points), h, w)
        for out, c, (x, y) in zip(whole, *propose(points)):
            part = out[y:y + c.shape[0], x:x + c.shape[1]]
            part[:] = c[:part.shape[0], :part.shape[1]]
        means = [c[c > 0.2].double().mean().nan_to_num() for c in whole]
        c = whole[int(torch.stack(means).argmax())]
        m = c > threshold
        added = bool(m.any()) and (m & known).sum().item() / m.sum().item() < 0.5
        if added:
            found.append(c)
            known = known | m
        idle = 0 if added else idle + 1
    labels, scores = torch.zeros(h, w).long(), []
    owner = torch.stack([background.clamp(min=threshold), *found]).numpy().argmax(0)
    owner = torch.tensor(owner)
    for k, c in enumerate(found, 1):
        if (owner == k).sum() >= max(min_area, 1):
            scores.append(c[owner == k].mean().item())
            labels[owner == k] = len(scores)
    return labels, torch.tensor(scores)


@claim(PAPER, "6", "of 7 random points the surest is taken", of="segment_instances",
       figure="adaptis.png")
@pytest.mark.parametrize("seed, window, min_area, patience, per_round", [
    (0, None, 1, 20, 7), (1, None, 4, 20, 3), (2, (9, 7), 1, 5, 7), (3, (6, 12), 3, 3, 2),
    (4, (30, 30), 1, 2, 7), (5, (5, 5), 1, 99, 4)])
def test_rounds_are_those_of_the_slow_algorithm(seed, window, min_area, patience, per_round):
    h, w, asked = 13, 15, []
    propose, unknown = hills(h, w, seed, window), rand(h, w, seed=seed + 9) > 0.1
    background = [torch.zeros(h, w), rand(h, w, seed=seed + 5)][seed % 2]
    given = (rand(40, 2, seed=seed) * torch.tensor([w, h])).floor() + 0.5
    for points, rounds in ((None, asked), (given, given[:, None])):
        labels, scores = segment_instances(
            lambda batch: asked.append(batch) or propose(batch), unknown, 0.6, 0.5, per_round,
            patience, points=points, min_area=min_area, generator=seeded(seed),
            background=background if seed else None)
        expected, means = slow_greedy(propose, unknown, rounds, threshold=0.6, patience=patience,
                                      min_area=min_area, background=background)
        assert torch.equal(labels, expected) and torch.allclose(scores, means, atol=1e-5)
        if points is None:                                     # each unknown pixel once at most
            assert all(len(p) == per_round for p in asked[:-1]) and len(asked[-1]) <= per_round
            asked = torch.cat(asked)
            assert len(asked.unique(dim=0)) == len(asked) and (asked % 1 == 0.5).all()
            assert unknown[asked[:, 1].long(), asked[:, 0].long()].all() and labels.max() > 0
            asked = []


@claim(PAPER, "4", "added if the intersection is lower than 50%", of="segment_instances")
@pytest.mark.parametrize("shared, added", [(3, True), (4, False), (5, False)])
def test_less_than_half_of_it_is_segmented(shared, added):
    first, second = blocks(4, 20, (0, 0, 1, 8)), blocks(4, 20, (0, 8 - shared, 1, 16 - shared))
    propose, _ = planted(first * 0.9, second * 0.6)
    points, unknown = at((0, 1), (0, 15 - shared)), torch.ones(4, 20).bool()
    labels, scores = segment_instances(propose, unknown, points=points)
    assert torch.equal(labels, first + 2 * second * (1 - first) * added)
    unknown[0, 8 - shared:8] = False                           # the same pixels, known as stuff
    assert len(segment_instances(propose, unknown, points=points[1:])[1]) == added
    more = segment_instances(propose, unknown, points=points[1:], overlap=shared / 8 + 0.01)
    assert len(more[1]) == 1                                   # a share of the mask


@claim(PAPER, "4", "R(x, y) = argmax_i C_i(x, y)", of="segment_instances")
def test_each_pixel_goes_to_the_surest():
    a, b = torch.linspace(0.95, 0.6, 12)[None].clone(), torch.linspace(0.55, 0.99, 12)[None].clone()
    a[:, 7:], b[:, :4] = 0, 0
    for ca, cb in ((a, b), ((a > 0) * 0.75, (b > 0) * 0.75)):  # of equals the first keeps it
        labels, scores = segment_instances(planted(ca, cb)[0], a >= 0, points=at((0, 0), (0, 11)))
        assert torch.equal(labels, torch.where(ca >= cb, 1, 2))
        for k, c in ((1, ca), (2, cb)):
            assert abs(scores[k - 1] - c[labels == k].mean()) < 1e-5


@claim(PAPER, "4", "ends when all is segmented or no point is left", of="segment_instances")
def test_the_greedy_algorithm_ends():
    a, b = blocks(4, 8, (0, 0, 4, 4)), blocks(4, 8, (0, 4, 4, 8))
    propose, asked = planted(a * 0.9, b * 0.9)
    segment_instances(propose, a + b > 0, per_round=1, generator=seeded(0))
    assert len(asked) == 2                                     # all is segmented
    for size, patience, counts in (((4, 5), 99, [7, 7, 6]), ((20, 20), 3, [7, 7, 7])):
        propose, asked = planted(torch.zeros(size))            # no point, no patience left
        segment_instances(propose, torch.ones(size).bool(), patience=patience)
        assert [len(p) for p in asked] == counts
    for unknown, points in ((a < 0, None), (a < 0, at((0, 0))), (a == 0, torch.zeros(0, 2))):
        propose, asked = planted(torch.ones(4, 8))
        labels, scores = segment_instances(propose, unknown, points=points)
        assert not asked and labels.shape == (4, 8) and not labels.any() and scores.shape == (0,)
    propose, _ = planted(torch.full((1, 1), 0.7))              # one pixel is one object
    assert segment_instances(propose, torch.ones(1, 1).bool())[0].tolist() == [[1]]


def test_a_mask_exceeds_the_threshold():
    c = torch.tensor([[0.75] * 3 + [0.875] * 3 + [0.6] * 2])
    labels, scores = segment_instances(planted(c)[0], c > 0, 0.75, points=at((0, 0)))
    assert labels[0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0] and scores.tolist() == [0.875]


# --- 3 The network's parts --------------------------------------------------------------------
def tents(features, points, stride):
    """Each centre weighs 1 - distance in x times 1 - distance in y. Points beyond the outermost
    centres are moved there."""
    axes = []
    for d, n in enumerate(features.shape[:1:-1]):
        place = (points[..., d] / stride - 0.5).clamp(0, n - 1)
        axes.append((1 - (place[..., None] - torch.arange(n)).abs()).clamp(min=0))
    return torch.einsum("bchw,bkw,bkh->bkc", features, *axes)


@claim(PAPER, "3", "other parameters of AdaIN vary the output for the same input", of="AdaIN")
def test_adain_is_its_formula():
    assert example().int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    x = randn(3, 4, 5, 6, dtype=torch.float64) * 3 + 2
    scale, shift = randn(3, 4, seed=1).double(), randn(3, 4, seed=2).double()
    out = AdaIN()(x, scale, shift)
    assert torch.allclose(out, adain(x, scale, shift))         # fast and plain
    for n, c in itertools.product(range(3), range(4)):
        v = x[n, c].flatten().tolist()
        mean = sum(v) / 30
        std = math.sqrt(sum((a - mean) ** 2 for a in v) / 30 + 1e-5)
        assert torch.allclose(out[n, c], scale[n, c] * (x[n, c] - mean) / std + shift[n, c])
    large = AdaIN()(1000 + 0.01 * randn(1, 1, 64, 64), torch.ones(1, 1), torch.zeros(1, 1))
    assert abs(large.std() - 0.95) < 0.02                      # stable: sqrt(1e-4 / 1.1e-4) = .953
    one = AdaIN()(randn(2, 3, 1, 1), torch.ones(2, 3), shift[:2, :3].float())
    assert torch.allclose(one[..., 0, 0], shift[:2, :3].float(), atol=1e-4)    # no deviation
    rounded = AdaIN()(x.bfloat16(), scale, shift.bfloat16())
    assert rounded.dtype == torch.bfloat16 and torch.allclose(rounded.double(), out, atol=0.1)
    given = [v.clone().requires_grad_() for v in (x, scale, shift)]
    fast, plain = (torch.autograd.grad((f(*given) ** 3).sum(), given) for f in (AdaIN(), adain))
    assert all(map(torch.allclose, fast, plain))


@claim(PAPER, "3", "-1 corresponds to x - R and +1 to x + R", of="RelativeCoordConv")
@pytest.mark.parametrize("radius, stride", [(8, 1), (8, 2), (5, 4), (280, 2)])
def test_relative_coordinates_are_their_definition(radius, stride):
    points, corners = rand(4, 2) * 30, torch.tensor([[0, 0], [4, 8], [12, 0], [8, 16]])
    out = RelativeCoordConv(radius, stride)(points, corners, (5, 7))
    assert out.shape == (4, 2, 5, 7)
    for n, i, j in itertools.product(range(4), range(5), range(7)):
        x, y = corners[n, 0] + (j + 0.5) * stride, corners[n, 1] + (i + 0.5) * stride
        expected = torch.stack([x - points[n, 0], y - points[n, 1]]) / radius
        assert torch.allclose(out[n, :, i, j], expected.clamp(-1, 1), atol=1e-5)


def head(stride=2, window=(8, 12), coordinates=True, radius=9, blocks=1):
    return lively(InstanceSelection(4, stride, width=5, blocks=blocks, window=window, radius=radius,
                                    coordinates=coordinates))


def test_a_channel_that_was_always_silent_is_not_blown_up():
    layer, image = conv(1, 1).eval(), torch.ones(1, 1, 5, 5)
    nn.init.ones_(layer[0].weight), layer[2].running_var.zero_()       # 0 in all of training
    assert 0 < layer(image).max() <= 10.01 * layer[:2](image).max()


def convolved(layer, x):
    return F.conv2d(x[None], layer.weight, layer.bias, padding=1)[0].clamp(min=0)


def dense(m, features, point, *, corner, size, stride, coordinates=True):
    """One point of one image [C, h, w]: the first convolution on the whole concatenated map."""
    c, h, w = features.shape
    x, y = ((torch.arange(n) + 0.5) * stride for n in (w, h))
    maps, kernel = features, m.share.weight
    if coordinates:
        place = torch.stack([((x - point[0]) / 9).clamp(-1, 1).expand(h, w),
                             ((y - point[1]) / 9).clamp(-1, 1)[:, None].expand(h, w)])
        maps = torch.cat([features, place])                    # [F; C]
        kernel = torch.cat([kernel, F.pad(m.place.weight, (1, 1, 1, 1))], 1)   # 1x1 within 3x3
    z = F.conv2d(maps[None], kernel, m.share.bias, padding=1)[0].clamp(min=0)
    z = z[:, corner[1]:corner[1] + size[0], corner[0]:corner[0] + size[1]]
    q = tents(features[None], point[None, None], stride)[0, 0]
    first, _, second, _, third = m.controller.layers           # linear, ReLU, linear, ReLU, linear
    q = third.weight @ (second.weight @ (first.weight @ q + first.bias).clamp(min=0) + second.bias
                        ).clamp(min=0) + third.bias
    scale, shift = (q.view(2, -1, 5, 1, 1) + torch.tensor([1, 0]).view(2, 1, 1, 1, 1))
    for k in range(len(scale)):
        z = convolved(m.adapted[k - 1], z) if k else z
        mean, var = z.mean((1, 2), keepdim=True), z.var((1, 2), keepdim=True, unbiased=False)
        z = scale[k] * (z - mean) / (var + 1e-5).sqrt() + shift[k]
    layer, _, bn = m.layers[0]                                 # convolution, ReLU, batch norm
    s = bn.weight / (bn.running_var + bn.eps).sqrt()
    z = convolved(layer, z) * s[:, None, None] + (bn.bias - bn.running_mean * s)[:, None, None]
    z = F.conv2d(z[None], m.layers[1].weight, m.layers[1].bias)[0]             # [stride^2, h, w]
    out = torch.zeros(size[0] * stride, size[1] * stride)
    for i, j in itertools.product(range(out.shape[0]), range(out.shape[1])):
        out[i, j] = z[(i % stride) * stride + j % stride, i // stride, j // stride]
    return out / 5 - 1.7


@claim(PAPER, "3", "coordinates are concatenated with the features", of="InstanceSelection")
@pytest.mark.parametrize("stride, window, coordinates, blocks", [
    (2, (8, 12), True, 1), (2, None, True, 2), (1, (5, 3), True, 3), (2, (8, 8), False, 1),
    (4, (99, 99), True, 3)])
def test_head_is_the_dense_network(stride, window, coordinates, blocks):
    m, features = head(stride, window, coordinates, blocks=blocks), randn(2, 4, 7, 9)
    points = rand(2, 4, 2, seed=3) * torch.tensor([9.0, 7.0]) * stride
    points[:, 3] = torch.tensor([9 * stride - 0.1, 7 * stride - 0.1])
    with torch.no_grad():
        logits, corners = m(features, points)
        cells, size = m.corners(points.reshape(-1, 2), (7, 9))
        others = torch.zeros_like(cells)
        moved, there = m(features, points, m.share(features), others)
        assert torch.equal(corners, cells * stride) and torch.equal(there, others)
        for n in range(8):
            for found, corner in ((logits, cells), (moved, others)):
                expected = dense(m, features[n // 4], points[n // 4, n % 4], stride=stride,
                                 corner=corner[n].tolist(), size=size, coordinates=coordinates)
                assert torch.allclose(found[n], expected, atol=2e-4)
    beyond = torch.tensor([[[-3.0, 99], [99, -3], [4, 99], [99, 4]]]).expand(2, 4, 2)
    expected = tents(features, beyond, stride)
    assert torch.allclose(bilinear(features, beyond, stride), expected, atol=1e-5)


@pytest.mark.parametrize("stride, window, cells", [
    (2, (8, 12), (4, 6)), (2, (7, 11), (4, 6)), (4, (9, 8), (3, 2)), (2, (100, 10), (20, 5)),
    (2, None, (20, 30))])
def test_a_window_has_its_size_and_the_point_in_its_middle_and_lies_inside(stride, window, cells):
    points = torch.cat([rand(100, 2), torch.zeros(1, 2), torch.ones(1, 2)]) * torch.tensor([30, 20])
    corners, size = head(stride, window).corners(points * stride, (20, 30))
    assert tuple(size) == cells and corners.dtype == torch.int64
    for (x, y), (u, v) in zip(points.tolist(), corners.tolist()):
        for p, c, n, full in ((x, u, cells[1], 30), (y, v, cells[0], 20)):
            assert 0 <= c <= full - n and c <= p <= c + n
            best = p - n / 2                                   # the point in the middle
            assert abs(c - best) < 0.5001 or (c == 0 and best < 0) or (c == full - n < best)


def test_mask_does_not_depend_on_the_image_far_away():
    """Deviation: the window. The paper's head, which sees the whole map, is disturbed."""
    small, points = randn(1, 4, 12, 16), torch.tensor([[[15.5, 11.5], [17.3, 13.2]]])
    large, moved = randn(1, 4, 30, 40, seed=9) * 20, points + torch.tensor([20.0, 14.0])
    large[:, :, 7:19, 10:26] = small
    m = head(window=(8, 12))
    (a, corner_a), (b, corner_b) = m(small, points), m(large, moved)
    assert torch.allclose(a, b, atol=2e-3)
    assert torch.equal(corner_a + torch.tensor([20, 14]), corner_b)
    a, b = (head(window=None)(f, p)[0] for f, p in ((small, points), (large, moved)))
    assert not torch.allclose(a, b[:, 14:38, 20:52], atol=0.1)


@claim(PAPER, "Figure 2", "points of one object produce the same mask", of="InstanceSelection")
def test_two_points_of_one_object_give_one_mask():
    features = randn(1, 4, 3)[:, :, blocks(8, 10, (0, 0, 8, 5), (2, 4, 7, 10))]
    points = at((2, 2), (12, 4), (8, 14), (12, 18))[None]      # two on each object; stride 2
    a, b, c, d = head(window=None, coordinates=False)(features, points)[0]     # one Q an object
    assert torch.allclose(a, b, atol=1e-5) and torch.allclose(c, d, atol=1e-5)
    assert not torch.allclose(a, c, atol=0.1)


@claim(PAPER, "6", "objects with coinciding boxes are told apart by points", of="AdaIN")
def test_crossing_objects_of_one_box_have_two_masks():
    """Two diagonals of a square. The embedding is one-hot; the controller passes it on as scale."""
    up = torch.eye(7).bool().flip(0)
    down = torch.eye(7).bool() & ~up
    assert torch.equal(*mask_boxes(up.long() + 2 * down.long(), 2))
    features = torch.stack([up, down])[None].float()

    def propose(points):
        q = bilinear(features, points[None], 1)[0]
        logits = AdaIN()(features.expand(len(points), -1, -1, -1), q, -q)
        return (4 * logits.sum(1)).sigmoid(), torch.zeros(len(points), 2).long()
    labels, _ = segment_instances(propose, up | down, points=at((0, 0), (0, 6)))
    assert torch.equal(labels == 1, down) and torch.equal(labels == 2, up)


# --- 3 Training, appendix A -------------------------------------------------------------------
@claim(PAPER, "3", "a random object, then a random point at that object", of="sample_points")
def test_objects_are_drawn_equally_often():
    segments = blocks(10, 10, (0, 0, 9, 10), (9, 9, 10, 10), (9, 0, 10, 4), (9, 5, 10, 9))
    points, ids = sample_points(segments, torch.tensor([1, 2, 4]), 6000, seeded(1))
    counts = torch.bincount(ids, minlength=5).tolist()
    assert counts[0] == counts[3] == 0
    assert all(abs(counts[k] - 2000) < 180 for k in (1, 2, 4))         # five standard deviations
    x, y = points.floor().long().unbind(1)
    assert torch.equal(segments[y, x], ids) and (points % 1 == 0.5).all()
    pixels = torch.bincount((y * 10 + x)[ids == 4], minlength=100)[95:99].tolist()
    assert all(abs(n - counts[4] / 4) < 97 for n in pixels)    # pixels, too
    one, _ = sample_points(blocks(4, 5, (3, 4, 4, 5)), torch.tensor([1]), 3, seeded(0))
    assert one.tolist() == [[4.5, 3.5]] * 3                    # an object of one pixel
    targets = [target(s, [1, 1, 1, 0], [False, False, True, False])        # a crowd, stuff
               for s in (segments, 0 * segments, segments.flip(0))]
    points, ids, known, area, _ = sample_batch(targets, torch.tensor([False, True]), 6000)
    x, y = points.floor().long().unbind(2)
    assert not ids[1].any() and torch.equal(known[torch.arange(3)[:, None], y, x][::2], ids[::2])
    for b, void in ((0, 0), (2, 6)):                           # image 1 has void alone, number 5
        assert set(ids[b].tolist()) == {void + 1, void + 2} and (known[b] == 0).sum() == 5
        assert abs((ids[b] == void + 1).sum() - 3000) < 195    # five standard deviations
        assert area[void:void + 5].tolist() == [1, 90, 1, 4, 4]


def masks_of(n=3, seed=0):
    """Logits, masks and weights of which some are 0."""
    return (randn(n, 4, 5, seed=seed, dtype=torch.float64) * 2, rand(n, 4, 5, seed=seed + 1) > 0.6,
            (rand(n, 4, 5, seed=seed + 2) > 0.3).double())


@claim(PAPER, "A", "NFL = -1/P (1 - p)^gamma log p", of="normalized_focal_loss")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [0, 1, 2, 3.5])
def test_nfl_is_its_formula_and_so_are_fl_and_bce(weighted, gamma):
    logits, masks, weight = masks_of()
    p, w = torch.where(masks, logits, -logits).sigmoid(), weight if weighted else 1 + 0 * weight
    weight = weight if weighted else None
    for n in range(3):
        total = (w[n] * (1 - p[n]) ** gamma * -p[n].log()).sum()
        fl, nfl = (f(logits, masks, weight, gamma)[n] for f in (focal_loss, normalized_focal_loss))
        assert torch.isclose(fl, total / w[n].sum())
        assert torch.isclose(nfl, total / (w[n] * (1 - p[n]) ** gamma).sum())
        bce = binary_cross_entropy(logits, masks, weight)[n]
        assert torch.isclose(bce, (w[n] * -p[n].log()).sum() / w[n].sum())
    assert torch.equal(focal_loss(logits, masks), focal_loss(logits, masks, gamma=2))


def test_gradient_of_p_is_stopped():
    logits, masks, weight = masks_of(1)
    z = logits.clone().requires_grad_()
    grad = torch.autograd.grad(normalized_focal_loss(z, masks, weight).sum(), z)[0]
    sign = torch.where(masks, 1, -1)
    p = (sign * logits).sigmoid()
    P = (weight * (1 - p) ** 2).sum()
    pull = weight * (1 - p) ** 2 * ((1 - p) - 2 * p * p.log()) / P
    assert torch.allclose(grad, -sign * pull, atol=1e-6)


@claim(PAPER, "A", "NFL has the total gradient of BCE (no: more)", of="normalized_focal_loss")
def test_nfl_pulls_harder():
    masks = rand(4, 5, 5) > 0.5
    for z in (-3.0, 0.5, 4.0):                                 # all -log p equal: both losses are
        logits = torch.where(masks, z, -z).double()
        nfl, bce = normalized_focal_loss(logits, masks), binary_cross_entropy(logits, masks)
        assert torch.allclose(nfl, bce, rtol=1e-4) and (focal_loss(logits, masks) < bce).all()
    for seed, right in itertools.product(range(10), (0.0, 1.0, 4.0)):
        logits, masks, _ = masks_of(2, seed=seed)
        logits = (logits + torch.where(masks, right, -right)).requires_grad_()
        nfl, bce = (torch.autograd.grad(f(logits, masks).sum(), logits)[0].abs().sum((1, 2))
                    for f in (normalized_focal_loss, binary_cross_entropy))
        assert (nfl >= bce * (1 - 1e-6)).all() and (right < 4 or (nfl > 2 * bce).all())


@pytest.mark.parametrize("loss", [binary_cross_entropy, focal_loss, normalized_focal_loss])
def test_degenerate_masks_cost_a_finite_sum(loss):
    logits, masks, weight = masks_of()
    nothing = loss(logits.requires_grad_(), masks, torch.zeros_like(weight))
    assert nothing.tolist() == [0, 0, 0] and nothing.requires_grad
    for z in (-300.0, 12.0, 300.0):
        extreme = torch.where(masks, z, -z).float().requires_grad_()
        value = loss(extreme, masks).sum()
        assert value.isfinite() and torch.autograd.grad(value, extreme)[0].isfinite().all()
        assert z < 0 or value < 1e-4
    p = 1 / (1 + math.exp(-9))                                 # P is at least 1/1000
    value = normalized_focal_loss(torch.full((1, 4, 4), 9.0).double(), torch.ones(1, 4, 4))
    assert value.item() == pytest.approx(-16 * (1 - p) ** 2 * math.log(p) / 1e-3)


# --- 5 Panoptic segmentation, with planted networks -------------------------------------------
def breadth_first(score):
    """Plateau after plateau -> pixels nearest to the centres, the highest first."""
    pixels = list(itertools.product(*map(range, score.shape)))
    left, found = set(pixels), []
    for start in pixels:
        if start not in left:
            continue
        queue = [start]
        for i, j in queue:
            near = {(v, u) for v in (i - 1, i, i + 1) for u in (j - 1, j, j + 1)} & set(pixels)
            queue += [q for q in sorted(near) if q not in queue and score[q] == score[start]]
        left -= set(queue)
        around = [q for q in pixels for i, j in queue if abs(q[0] - i) < 2 and abs(q[1] - j) < 2]
        if max(score[q] for q in around) == score[start]:
            n, y, x = len(queue), sum(p[0] for p in queue), sum(p[1] for p in queue)
            far = {p: (n * p[0] - y) ** 2 + (n * p[1] - x) ** 2 for p in sorted(queue)}
            found.append((-score[start].item(), start, min(far, key=far.get)))
    return [pixel for _, _, pixel in sorted(found)]


@claim(PAPER, "5", "local maximums by breadth-first search", of="local_maxima")
@pytest.mark.parametrize("seed", range(15))
def test_local_maxima_are_those_of_breadth_first_search(seed):
    h, w = [(7, 9), (8, 8), (1, 15), (15, 1), (3, 12), (1, 1)][seed % 6]
    score = (rand(h, w, seed=seed) * [2, 3, 4, 6, 50][seed % 5]).floor()
    assert torch.equal(local_maxima(score), at(*breadth_first(score)))
    assert local_maxima(score * math.nan).shape == (0, 2)


class Planted(nn.Module):
    """A module that calls a function; counts the images that it has seen."""

    def __init__(self, function, channels=3, stride=1):
        super().__init__()
        self.function, self.channels, self.stride, self.seen = function, channels, stride, 0

    def forward(self, features):
        self.seen += len(features)
        return self.function(features)


class Maps(nn.Module):
    """A head of fixed masks: a point gets the first confidence map above 0.05 there. The second
    view has the mirrored maps, with half of the confidence."""

    def __init__(self, *maps, stride=1):
        super().__init__()
        self.maps, self.stride, self.asked, self.share = maps, stride, [], Planted(lambda f: f)

    def corners(self, points, size):
        return torch.zeros(len(points), 2, dtype=torch.long), size

    def forward(self, features, points, shared=None, corners=None):
        h, w = (n * self.stride for n in features.shape[2:])
        out = torch.full((*points.shape[:2], h, w), -20.0)
        for b, n in itertools.product(range(len(points)), range(points.shape[1])):
            x, y = points[b, n].long().tolist()
            self.asked += [(x, y)] if b == 0 else []
            for c in reversed(self.maps):
                c = c.flip(1) * 0.5 if b else c
                out[b, n] = c.clamp(1e-7, 1 - 1e-7).logit() if c[y, x] > 0.05 else out[b, n]
        return out.flatten(0, 1), torch.zeros(len(out.flatten(0, 1)), 2).long()


def model_of(maps, isthing=(False, True, True), proposal=None, stride=1, **kwargs):
    """AdaptIS on images whose channels are the probabilities of the categories."""
    encoder = Planted(lambda images: F.avg_pool2d(images, stride), stride=stride)
    m = AdaptIS(isthing, encoder, width=4, blocks=1, proposals=float(proposal is not None),
                **{"stuff_area": 0, **kwargs})
    m.semantic, m.selection = Planted(lambda f: f.clamp(min=1e-9).log()), Maps(*maps, stride=stride)
    if proposal is not None:
        m.proposal = Planted(lambda f: proposal.expand(len(f), 1, -1, -1))
    return m.eval()


def seen_as(categories, sure=0.9):
    out = torch.full((3, *categories.shape), (1 - sure) / 2)
    return out.scatter(0, categories[None], sure)


def check_prediction(p, isthing, h, w):
    """Things come first; instances are these, with their masks and boxes."""
    n, things = len(p.categories), int(torch.tensor(isthing)[p.categories].sum())
    assert p.segments.shape == (h, w) and set(p.segments.unique().tolist()) | {0} == {*range(n + 1)}
    masks = p.segments == torch.arange(1, things + 1)[:, None, None]
    expected = dict(masks=masks, scores=p.scores[:things], categories=p.categories[:things],
                    boxes=mask_boxes(p.segments, n)[:things])
    assert all(torch.equal(p.instances[k], v) for k, v in expected.items())
    assert (p.scores[things:] == 1).all()


def scene():
    """11x14: stuff 0; a thing 1 of 25 pixels on the border, a thing 2 of 20 in two parts."""
    categories = torch.zeros(11, 14, dtype=torch.long)
    categories[4:9, 0:5], categories[6:11, 7:9], categories[6:11, 11:13] = 1, 2, 2
    return categories, [(categories == 1) * 0.8, (categories == 2) * 0.7]


@claim(PAPER, "5", "stuff by the semantic branch counts as segmented", of="AdaptIS")
def test_stuff_comes_from_the_semantic_branch_and_things_from_the_greedy_algorithm():
    categories, masks = scene()
    m = model_of(masks)
    p = m.predict(seen_as(categories))
    check_prediction(p, m.isthing.tolist(), 11, 14)
    assert torch.equal(p.categories[p.segments - 1], categories)
    assert sorted(p.instances["scores"].tolist()) == pytest.approx([0.7, 0.8])
    asked, m.selection = m.selection.asked, Maps(*masks)
    assert all(categories[y, x] > 0 for x, y in asked)         # stuff is never asked
    m.predict(seen_as(categories))
    assert m.selection.asked == asked                          # results repeat
    for numbers in (dict(threshold=0.75), dict(min_area=21)):  # a thing without a mask is void
        p = model_of(masks, **numbers).predict(seen_as(categories))
        assert torch.equal(p.segments == 0, categories == 2)
    scores = torch.full((11, 14), -4.0)                        # the points of a proposal branch
    scores[5, 2], scores[1, 12], scores[8, 8], scores[7, 3] = 1.0, 5.0, 2.0, 0.5
    m = model_of(masks, proposal=scores, per_round=1)
    m.predict(seen_as(categories))
    assert m.selection.asked == [(8, 8), (2, 5)]               # (12, 1) is stuff, (3, 7) known
    m.random_points, m.selection.asked = True, []
    m.predict(seen_as(categories))
    assert m.selection.asked != [(8, 8), (2, 5)] and len(m.selection.asked) > 0
    p = model_of([]).predict(seen_as(torch.ones(5, 7).long()))  # no object at all
    assert not p.segments.any() and len(p.scores) == 0


@claim(PAPER, "4", "the head runs several times per image, the backbone once", of="AdaptIS")
@pytest.mark.parametrize("flip", [False, True])
def test_the_backbone_runs_once_however_many_points_are_asked(flip):
    m = model_of([], patience=6, per_round=5, flip=flip)
    m.predict(seen_as(torch.ones(8, 8, dtype=torch.long)))
    assert m.encoder.seen == m.selection.share.seen == 1 + flip and len(m.selection.asked) == 30


@pytest.mark.parametrize("stuff_area, kept", [(0, [0, 1]), (6, [0, 1]), (7, [0]), (19, [])])
def test_little_stuff_is_void(stuff_area, kept):
    """18 pixels of one stuff and 6 of another; stuff_area is counted at 1024x2048."""
    categories = blocks(4, 6, (0, 0, 2, 3))
    m = model_of([], (False, False, True), stuff_area=stuff_area * 1024 * 2048 / 24)
    for size, factor in (((4, 6), 1), ((8, 12), 4)):
        p = m.predict(seen_as(categories), size)
        assert p.categories.tolist() == kept
        assert (p.segments > 0).sum() == factor * sum([18, 6][c] for c in kept)


@claim(PAPER, "5", "l(M) = argmax_l of the sum of p_l over M", of="AdaptIS")
def test_the_category_of_an_instance_is_that_of_the_highest_summed_probability():
    """One very sure pixel outvotes three that lean the other way."""
    image = torch.tensor([0.1, 0.8, 0.1])[:, None, None].repeat(1, 3, 8)
    image[:, 1, 1:4] = torch.tensor([0.02, 0.5, 0.48])[:, None]
    m = model_of([blocks(3, 8, (1, 1, 2, 5)) * 0.9])
    assert m.predict(image).categories.tolist() == [1]
    image[:, 1, 4] = torch.tensor([0.02, 0.03, 0.95])
    assert m.predict(image).categories.tolist() == [2]
    image = seen_as(torch.zeros(3, 8, dtype=torch.long), sure=0.98)    # a thing's, though stuff
    image[:, 1, 1:4] = torch.tensor([0.44, 0.11, 0.45])[:, None]       # has as high a sum; two
    p = model_of([blocks(3, 8, (1, 1, 2, 6)) * 0.9]).predict(image)    # pixels are sure stuff
    assert p.categories.tolist() == [2, 0] and (p.segments == 1).sum() == 3


@claim(PAPER, "7", "horizontal flip at test time", of="AdaptIS")
@pytest.mark.parametrize("width, window", [(24, (10, 12)), (24, None), (20, (8, 8))])
def test_with_flip_a_mirrored_image_gives_the_mirrored_result(width, window):
    m = lively(AdaptIS([False, True, True], UNet((4, 4), 4), width=4, blocks=1, window=window,
                       radius=9, min_area=3, stuff_area=0, flip=True), 5)
    image = rand(3, 16, width, seed=2)
    with torch.no_grad():
        m.semantic[-1].bias -= m.semantic(m.encoder(image[None])).mean((0, 2, 3))
    a, b = m.predict(image), m.predict(image.flip(2))
    ca, cb = (F.pad(p.categories, (1, 0), value=-1)[p.segments] for p in (a, b))
    assert (ca == cb.flip(1)).float().mean() > 0.995
    assert len(a.instances["masks"]) == len(b.instances["masks"]) > 0
    assert torch.allclose(a.scores.sort()[0], b.scores.sort()[0], atol=1e-3)
    categories = blocks(4, 8, (0, 2, 4, 6))                    # the second view is half as sure
    found = model_of([categories * 0.8], flip=True).predict(seen_as(categories))
    assert found.categories.tolist() == [1, 0] and found.scores[0] == pytest.approx(0.6)
    scores = torch.full((2, 1, 4, 8), -9.0)                    # sigmoids: .747 at (3, 1), .731
    scores[0, 0, 1, 3], scores[1, 0, 1, 4], scores[0, 0, 2, 5], scores[1, 0, 2, 2] = 5, 0, 1, 1
    m = model_of([], proposal=scores, flip=True, per_round=1)
    m.predict(seen_as(torch.ones(4, 8).long()))
    assert m.selection.asked[:2] == [(3, 1), (5, 2)]


def test_a_prediction_may_be_asked_at_another_size():
    categories, masks = scene()
    m = model_of(masks)
    own = m.predict(seen_as(categories))
    for h, w in ((22, 28), (11, 14), (1, 1), (3, 4), (5, 7), (17, 3)):
        p = m.predict(seen_as(categories), (h, w))
        check_prediction(p, m.isthing.tolist(), h, w)
        rows, columns = ([int((i + 0.5) * old / new) for i in range(new)]
                         for old, new in ((11, h), (14, w)))
        expected = own.categories[own.segments[rows][:, columns] - 1]
        assert torch.equal(p.categories[p.segments - 1], expected)


# --- 3, 5 Training: losses and stages ---------------------------------------------------------
def small(loss=normalized_focal_loss, points=5, window=(8, 10), proposals=0.25, stride=2, **kwargs):
    torch.manual_seed(0)
    return AdaptIS((False, True, True), UNet((4, 4), 4, stride), width=4, blocks=1, window=window,
                   radius=9, points=points, loss=loss, proposals=proposals, **kwargs)


def watch(m):
    """Points, logits and corners of every call of the head."""
    calls = []
    m.selection.register_forward_hook(lambda _, inputs, out: calls.append((inputs[1], *out)))
    return calls


def street(seed=0, h=16, w=20, crowd=False):
    """Stuff, two things and a third that may be a crowd, void in a corner."""
    s = blocks(h, w, (0, 0, h, w), (2, 3, 9, 8), (6, 7, 14, 15), (0, 12, 5, 20))
    s[12:, :3] = 0
    return target(s.roll((seed, 3 * seed), (0, 1)), [0, 1, 2, 1], [False, False, False, crowd])


def category_of(t):
    return F.pad(torch.where(t.crowd, -1, t.categories), (1, 0), value=-1)[t.segments]


def cut(values, corner, size):
    """The window at corner (x, y) of a map [H, W]; 0 beyond the edge."""
    u, v = corner.tolist()
    return F.pad(values, (0, size[1], 0, size[0]))[v:v + size[0], u:u + size[1]]


@pytest.mark.parametrize("h, w, window, stride", [
    (16, 20, (8, 10), 2), (15, 17, (8, 10), 2), (17, 21, None, 4), (17, 21, (8, 12), 4)])
def test_the_losses_compare_masks_on_windows_and_categories_on_known_pixels(h, w, window, stride):
    given, images = [], rand(2, 3, h, w)
    m = small(lambda *args: given.append(args) or normalized_focal_loss(*args), window=window,
              stride=stride)
    calls, targets = watch(m), [street(0, h, w, crowd=True), street(1, h, w)]
    losses = m.losses(images, targets)
    ((points, logits, corners),), ((seen, masks, known),) = calls, given
    assert points.shape == (2, 5, 2) and torch.equal(logits, seen)
    for n in range(10):
        t, (x, y) = targets[n // 5], points[n // 5, n % 5].long().tolist()
        clear, size = category_of(t) >= 0, masks.shape[1:]
        assert category_of(t)[y, x] > 0 and (points % 1 == 0.5).all()
        assert torch.equal(known[n], cut(clear, corners[n], size))
        shows = cut(clear & (t.segments == t.segments[y, x]), corners[n], size)
        assert torch.equal(masks[n] & known[n], shows)
    value = normalized_focal_loss(seen, masks, known).mean().item()
    assert losses["masks"].item() == pytest.approx(value, rel=1e-5)
    logits = F.interpolate(m.semantic(m.encoder(images)), scale_factor=stride, mode="bilinear")
    picked = [z[(c[c >= 0], *torch.where(c >= 0))] for z, c in
              zip(logits.log_softmax(1), map(category_of, targets))]
    assert losses["semantic"].item() == pytest.approx(-torch.cat(picked).mean().item(), rel=1e-4)


def second_stage(m):
    """The model as the training loop leaves it: only the second stage's parameters learn."""
    _, optimiser, _ = m.stages(FIT)[1]
    learning = {id(p) for group in optimiser.param_groups for p in group["params"]}
    for p in m.parameters():
        p.requires_grad_(id(p) in learning)
    return m.train()


@claim(PAPER, "5", "proposals are trained afterwards, all else is frozen", of="AdaptIS")
def test_while_proposals_learn_nothing_else_moves():
    m = second_stage(small())
    before = {n: b.clone() for n, b in m.named_buffers()}
    losses = m.losses(rand(2, 3, 16, 20), [street(0), street(1)])
    assert set(losses) == {"proposals"} and losses["proposals"] > 0
    losses["proposals"].backward()
    for n, p in m.named_parameters():
        assert (p.grad is not None) == n.startswith("proposal")
    moved = {n for n, b in m.named_buffers() if not torch.equal(b, before[n])}
    assert moved and all(n.startswith("proposal") for n in moved)
    for learns in (True, False):                               # the first stage comes back
        found = m.requires_grad_(learns).losses(rand(1, 3, 16, 20), [street(0)])
        assert set(found) == {"masks", "semantic"}


@claim(PAPER, "5", "of 48 points on a random object the top 20% by IoU are positive", of="AdaptIS")
@pytest.mark.parametrize("seed", [2, 5])
def test_the_proposal_loss_is_that_of_a_loop(seed):
    m = lively(second_stage(small(window=(24, 30), threshold=[0.5, 0.4][seed % 2])), seed)
    calls, each, images = watch(m), [], rand(3, 3, 40, 50, seed=seed)
    things = blocks(40, 50, (3, 4, 30, 28), (10, 20, 38, 46), (0, 30, 12, 50))
    targets = [target(things, [1, 2, 1], [False, False, crowd]) for crowd in (False, True)]
    targets.insert(1, target(0 * things, []))
    torch.manual_seed(seed)
    loss = m.losses(images, targets)["proposals"]
    ((points, logits, corners),), maps = calls, m.proposal(m.encoder(images)).detach()
    for b in (0, 2):
        (k,) = {int(things[y, x]) for x, y in points[b].long().tolist()}       # one object
        clear, ious = category_of(targets[b]) >= 0, []
        for n in range(48 * b, 48 * b + 48):
            claimed = (logits[n].sigmoid() > m.threshold) & cut(clear, corners[n], (24, 30))
            right = (claimed & cut(things == k, corners[n], (24, 30))).sum().item()
            ious.append(right / (claimed.sum().item() + (things == k).sum().item() - right))
        z, order = tents(maps[b:b + 1], points[b:b + 1], 2)[0, :, 0], sorted(ious)[::-1]
        assert order[9] > order[10]                            # else a tie could go either way
        each.append(F.softplus(z).sum() - z[torch.tensor(ious) >= order[9]].sum())
    assert loss.item() == pytest.approx(sum(each).item() / 96, rel=1e-4)
    empty = m.losses(images[:1], targets[1:2])["proposals"]
    assert empty == 0 and empty.requires_grad


@claim(PAPER, "7", "Adam; the backbone has a rate of its own", of="AdaptIS")
def test_stages_are_the_masks_and_then_the_proposals():
    m = small()
    names = {id(p): n for n, p in m.named_parameters()}
    m.encoder.last[0].weight.requires_grad_(False)             # a frozen layer stays frozen
    stages, learning = m.stages(FIT), []
    assert [(name, steps) for name, _, steps in stages] == [("masks", 75), ("proposals", 25)]
    for stage, optimiser, _ in stages:
        for g in optimiser.param_groups:
            parts = {names[id(p)].split(".")[0] for p in g["params"]}
            assert (parts == {"proposal"}) == (stage == "proposals") and g["betas"] == (0.9, 0.999)
            assert isinstance(optimiser, torch.optim.Adam) and g["weight_decay"] == 0.5
            assert g["lr"] == (5e-5 if parts == {"encoder"} else 1e-4)
            learning += [names[id(p)] for p in g["params"]]
    assert sorted([*learning, "encoder.last.0.weight"]) == sorted(names.values())
    stages = small(proposals=0).stages(FIT)
    assert [(name, steps) for name, _, steps in stages] == [("masks", 100)]


# --- 6 The toy's backbone, the world, the demo ------------------------------------------------
@pytest.mark.parametrize("stride, widths", [(2, (4, 4)), (4, (4, 4)), (2, (4, 5, 6))])
def test_the_unet_gives_a_map_at_its_stride_for_every_size(stride, widths):
    net, seen = lively(UNet(widths, 3, stride), 1), []
    net.first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[2:]))
    n = stride * 2 ** (len(widths) - 1)
    h, w = 2 * n - stride, 3 * n - stride - 1
    image = rand(1, 3, h, w)                                   # padded by its own last pixels
    padded, out = F.pad(image, (0, stride + 1, 0, stride), mode="replicate"), net(image)
    assert out.shape == (1, 3, math.ceil(h / stride), math.ceil(w / stride))
    assert torch.allclose(out, net(padded)[..., :out.shape[2], :out.shape[3]], atol=1e-6)
    assert set(map(tuple, seen)) == {(2 * n // stride, 3 * n // stride)}       # and no further


def test_a_click_and_the_counts_of_the_demo(tmp_path, monkeypatch):
    import matplotlib
    monkeypatch.chdir(tmp_path)
    torch.save({"model": demo_adaptis.build().state_dict()}, "kept.pt")
    canvas = clicks.window(demo_adaptis.load("kept.pt"), OverlappingCells(1)[0].image).canvas
    x, y = canvas.figure.axes[0].transData.transform((9.0, 12.0))
    event = matplotlib.backend_bases.MouseEvent("button_press_event", canvas, x, y, 1)
    canvas.callbacks.process("button_press_event", event)
    assert canvas.figure.axes[0].get_title().startswith("(9, 12):")
    truth, labels = torch.tensor([[0, 0, 1, 1, 2, 2, 2]]), torch.tensor([[1, 1, 1, 0, 0, 2, 2]])
    assert demo_adaptis.found_and_false(labels, truth, torch.tensor([0, 1])) == (1, 1, 0)


@pytest.mark.parametrize("call, sentence", [
    (lambda: AdaptIS([False, False], UNet()), "nothing to point at"),
    (lambda: sample_points(blocks(4, 5), torch.zeros(0).long(), 4), "at least one"),
    (lambda: sample_points(blocks(4, 5, (0, 0, 2, 2)), torch.tensor([1, 9]), 4), "with a pixel"),
    (lambda: OverlappingCells(3, 49), "50 pixels at least"),
    (lambda: OverlappingCells(3, 96, (5, 4)), r"\(fewest, most\)"),
    (lambda: demo_adaptis.load("nowhere.pt"), "train a network first"),
    (lambda: demo_adaptis.authors_images(None, "nowhere", None), "--authors takes the folder"),
    (lambda: clicks.read("nowhere.png"), "cannot be read as an image")])
def test_refusals(call, sentence):
    with pytest.raises((ValueError, IndexError, DataError), match=sentence):
        call()
