"""The spec of seamless.py: the claims of "Seamless Scene Segmentation" (Porzi et al., CVPR 2019), one a test.

The oracles are written from the paper: explicit loops over pixels and boxes, closed cases, torchvision's own operators.
Small nets on small pictures; the slowest tests come last.
"""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import roi_align

import seamless
from seamless import (IGNORE, GroupNorm, MiniDL, RegionProposalHead, RegionSegmentationHead, Seamless, SemanticHead, box_loss, decode, encode,
                      fuse, hardest_pixels_loss, inside, make_anchors, mask_targets, match, paste_masks, pyramid_level,
                      resize_logits, resnet_fpn, sample, semantic_target, thing_truth, void_fraction, void_mask, window_mean)

ISTHING = torch.tensor([False, True, False, True])      # sky, car, road, person: things and stuff alternate on purpose


# --- Material for the tests -----------------------------------------------------------------------------------------------

def random_boxes(n, width, height, seed=0, smallest=2.0):
    g = torch.Generator().manual_seed(seed)
    size = smallest + torch.rand(n, 2, generator=g) * (torch.tensor([width, height]) / 2 - smallest)
    corner = torch.rand(n, 2, generator=g) * (torch.tensor([width, height]) - size)
    return torch.cat([corner, corner + size], 1)


def make_target(segments, categories, crowd=(), truncated=None):
    """A target whose boxes are read off the label map, segment by segment."""
    boxes = []
    for k in range(1, len(categories) + 1):
        y, x = torch.where(segments == k)
        boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
    n = len(categories)
    return SimpleNamespace(segments=segments, categories=torch.tensor(categories, dtype=torch.long),
                           crowd=torch.tensor([k in crowd for k in range(1, n + 1)], dtype=torch.bool),
                           boxes=torch.tensor(boxes, dtype=torch.float).reshape(n, 4),
                           truncated=torch.zeros(n, 4, dtype=torch.bool) if truncated is None else torch.tensor(truncated))


def street(size=64):
    """Sky above road; a car, a person, a crowd of persons, a strip of void: segments 1 sky, 2 road, 3 car, 4 person, 5 crowd."""
    s = torch.ones(size, size, dtype=torch.long)
    s[size // 2:] = 2
    s[24:48, 4:30] = 3
    s[10:58, 40:56] = 4
    s[2:14, 2:20] = 5
    s[-3:] = 0
    return make_target(s, [0, 2, 1, 3, 3], crowd=[5])


def tiny_net(seed=0, extra=1, **kw):
    torch.manual_seed(seed)
    body_kw = {k: kw.pop(k) for k in ("frozen", "frozen_norm") if k in kw}
    return Seamless(ISTHING, resnet_fpn("tiny", width=16, extra=extra, **body_kw),
                    **{**dict(hidden=16, box_channels=32, mask_channels=16, semantic_channels=8, canonical=32, anchor_scale=4,
                              samples=(32, 32), after=(40, 40), detections=20), **kw})


def region_head(classes=2, channels=4, seed=0, **kw):
    """A region head on random features, its output layer loud enough that scores and corrections differ."""
    torch.manual_seed(seed)
    head = RegionSegmentationHead(channels, [4, 8, 16, 32], classes, **{**dict(canonical=32, box_channels=16, mask_channels=8), **kw})
    nn.init.normal_(head.out.weight, std=0.7)
    features = {s: torch.randn(2, channels, 64 // s, 96 // s) for s in (4, 8, 16, 32)}
    return head, features


def iou_of(a, b):
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    w, h = min(ax2, bx2) - max(ax1, bx1), min(ay2, by2) - max(ay1, by1)
    both = max(w, 0) * max(h, 0)
    return both / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - both)


def greedy_nms(boxes, scores, groups, threshold):
    """Non-maxima suppression as everybody explains it: best first, out goes what overlaps a kept one of the same group."""
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(groups[i] != groups[j] or iou_of(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


def move_box(box, delta):
    """Section 3.2: (u + o_u w, v + o_v h), (w e^{o_w}, h e^{o_h})."""
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    u, v = (x1 + x2) / 2 + delta[0] * w, (y1 + y2) / 2 + delta[1] * h
    w, h = w * math.exp(delta[2]), h * math.exp(delta[3])
    return [u - w / 2, v - h / 2, u + w / 2, v + h / 2]


def clip_box(box, size):
    return [min(max(box[0], 0), size[1]), min(max(box[1], 0), size[0]), min(max(box[2], 0), size[1]), min(max(box[3], 0), size[0])]


def slow_box_loss(delta, gt, anchor, beta):
    (ax1, ay1, ax2, ay2), (x1, y1, x2, y2) = anchor, gt
    truth = [((x1 + x2) / 2 - (ax1 + ax2) / 2) / (ax2 - ax1), ((y1 + y2) / 2 - (ay1 + ay2) / 2) / (ay2 - ay1),
             math.log((x2 - x1) / (ax2 - ax1)), math.log((y2 - y1) / (ay2 - ay1))]
    total = 0
    for d, t in zip(delta, truth):
        z = abs(d - t)
        total += z * z / (2 * beta) if z <= beta else z - beta / 2
    return total


def share_of_void(box, target):
    """Pixel by pixel, for boxes with whole coordinates."""
    x1, y1, x2, y2 = (int(v) for v in box)
    void = [k == 0 or bool(target.crowd[k - 1]) for row in target.segments[y1:y2, x1:x2].tolist() for k in row]
    return sum(void) / len(void)


class Recorder:
    """A box loss passed in from outside: remembers what it was called with."""
    def __init__(self):
        self.calls = []

    def __call__(self, deltas, gt_boxes, anchors, beta, crop_size=None, truncated=None):
        self.calls.append(SimpleNamespace(deltas=deltas, gt=gt_boxes, anchors=anchors, beta=beta, crop_size=crop_size, truncated=truncated))
        return box_loss(deltas, gt_boxes, anchors, beta)


# --- 3.2 Boxes ------------------------------------------------------------------------------------------------------------

def test_encode_equals_torchvisions_box_coder():
    """3.2, the vocabulary: deltas are torchvision's BoxCoder((1, 1, 1, 1))."""
    boxes, anchors = random_boxes(50, 200, 100, 1), random_boxes(50, 200, 100, 2)
    torch.testing.assert_close(encode(boxes, anchors), BoxCoder((1., 1., 1., 1.)).encode_single(boxes, anchors))


def test_decode_moves_an_anchor_as_section_3_2_says():
    """3.2: centre (u_a + o_u w_a, v_a + o_v h_a), dimensions (w_a e^{o_w}, h_a e^{o_h})."""
    anchors, deltas = random_boxes(50, 200, 100, 3), torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    slow = [move_box(a, d) for a, d in zip(anchors.tolist(), deltas.tolist())]
    torch.testing.assert_close(decode(deltas, anchors), torch.tensor(slow), rtol=1e-4, atol=1e-3)


def test_decode_equals_torchvisions_box_coder():
    """3.2: the same coding as torchvision, including its limit for very large boxes."""
    anchors, deltas = random_boxes(50, 200, 100, 4), 4 * torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(decode(deltas, anchors), BoxCoder((1., 1., 1., 1.)).decode_single(deltas, anchors), rtol=1e-4, atol=1e-3)


def test_decode_is_the_inverse_of_encode():
    """3.2: whatever the pair of boxes, down to one pixel."""
    boxes, anchors = random_boxes(50, 200, 100, 5, smallest=1.0), random_boxes(50, 200, 100, 6)
    torch.testing.assert_close(decode(encode(boxes, anchors), anchors), boxes, rtol=1e-4, atol=1e-3)


def test_decode_of_absurd_deltas_stays_finite():
    """3.2: an untrained network may say anything; a box grows 62.5 times at most."""
    box = decode(torch.tensor([[0., 0., 1e4, 1e4]]), torch.tensor([[0., 0., 16., 8.]]))
    torch.testing.assert_close(box[:, 2:] - box[:, :2], torch.tensor([[1000., 500.]]))


def test_box_loss_is_smooth_l1_summed_over_the_four_deltas():
    """3.4 (Mask R-CNN): z^2 / 2β up to β, |z| - β/2 beyond, for two values of β."""
    anchors, gt = random_boxes(40, 100, 100, 7), random_boxes(40, 100, 100, 8)
    deltas = encode(gt, anchors) + 0.3 * torch.randn(40, 4, generator=torch.Generator().manual_seed(2))
    for beta in (1 / 9, 0.5):
        slow = [slow_box_loss(d, g, a, beta) for d, g, a in zip(deltas.tolist(), gt.tolist(), anchors.tolist())]
        torch.testing.assert_close(box_loss(deltas, gt, anchors, beta), torch.tensor(slow), rtol=1e-4, atol=1e-4)


def test_box_loss_does_not_know_about_crops():
    """The vocabulary: the standard loss takes crop_size and truncated and ignores them."""
    anchors, gt = random_boxes(10, 100, 100, 9), random_boxes(10, 100, 100, 10)
    args = (torch.zeros(10, 4), gt, anchors, 0.1)
    assert torch.equal(box_loss(*args, (50, 50), torch.ones(10, 4, dtype=torch.bool)), box_loss(*args))


def test_box_loss_of_no_box_is_empty():
    """Degenerate: nothing matched; [0] that can be summed, with gradient."""
    deltas = torch.zeros(0, 4, requires_grad=True)
    loss = box_loss(deltas, torch.zeros(0, 4), torch.zeros(0, 4), 0.1)
    assert loss.shape == (0,) and loss.sum().requires_grad


@pytest.mark.parametrize("w, h, level", [(224, 224, 3), (223, 224, 2), (447, 447, 3), (448, 448, 4), (112, 112, 2), (111, 112, 1),
                                         (112, 448, 3), (56, 896, 3), (1, 1, 1), (5000, 5000, 4), (0, 50, 1)])
def test_level_rule_is_mask_rcnns(w, h, level):
    """3.2: k = max(1, min(4, floor(3 + log2(sqrt(w h) / 224)))): only the area counts; degenerate: no width at all."""
    assert pyramid_level(torch.tensor([[7., 9., 7. + w, 9. + h]])).tolist() == [level]


def test_level_rule_depends_on_size_relative_to_canonical_only():
    """3.2: pictures and canonical size 1024 times smaller give the same levels."""
    boxes = random_boxes(100, 2000, 2000, 11)
    assert torch.equal(pyramid_level(boxes / 1024, canonical=224 / 1024), pyramid_level(boxes))


def test_level_rule_never_leaves_the_levels_that_exist():
    """3.2: with two levels a box is served by 1 or 2; k0 shifts the rule."""
    boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 112., 112.], [0., 0., 900., 900.]])
    assert pyramid_level(boxes, levels=2).tolist() == [1, 2, 2]
    assert pyramid_level(boxes, k0=2).tolist() == [1, 1, 4]


def test_anchors_stand_where_the_stride_2_convolution_looks():
    """3.2: output cell (i, j) reads the features around (2i, 2j), whose centre is ((2j + .5) s, (2i + .5) s); loops."""
    slow = []
    for i in range(3):
        for j in range(5):
            for ratio in (0.5, 1, 2):
                w, h = 32 / math.sqrt(ratio), 32 * math.sqrt(ratio)
                x, y = (2 * j + 0.5) * 4, (2 * i + 0.5) * 4
                slow.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    torch.testing.assert_close(make_anchors((3, 5), 4, 32, (0.5, 1, 2)), torch.tensor(slow))


def test_anchors_have_their_area_and_ratio():
    """3.2: pre-defined dimensions: area size^2, height / width the ratio."""
    a = make_anchors((2, 2), 16, 128, (0.5, 1, 2))
    w, h = (a[:, 2:] - a[:, :2]).T
    torch.testing.assert_close(w * h, torch.full((12,), 128. ** 2))
    torch.testing.assert_close(h / w, torch.tensor([0.5, 1, 2]).repeat(4))


def test_inside_means_entirely_contained():
    """3.2, the set A: a box may touch the border; one coordinate beyond it and it is out."""
    fit = [0., 0., 40., 20.]
    out = [[-1., 0., 40., 20.], [0., -1., 40., 20.], [0., 0., 41., 20.], [0., 0., 40., 21.]]
    assert inside(torch.tensor([fit, [1., 2., 3., 4.], *out]), (20, 40)).tolist() == [True, True, False, False, False, False]


def test_void_fraction_equals_counting_pixels():
    """3.4 (sampling): loops over the pixels of each box; boxes on the border and without a pixel among them."""
    g = torch.Generator().manual_seed(3)
    void = torch.rand(17, 23, generator=g) < 0.4
    x, y = torch.randint(0, 24, (60, 2), generator=g).sort(1).values, torch.randint(0, 18, (60, 2), generator=g).sort(1).values
    boxes = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)
    boxes = torch.cat([boxes, torch.tensor([[0, 0, 23, 17], [0, 0, 1, 1], [22, 16, 23, 17], [5, 5, 5, 9], [4, 4, 4, 4]])])
    slow = []
    for x1, y1, x2, y2 in boxes.tolist():
        pixels = [bool(void[i, j]) for i in range(y1, y2) for j in range(x1, x2)]
        slow.append(sum(pixels) / max(len(pixels), 1))
    torch.testing.assert_close(void_fraction(boxes.float(), void), torch.tensor(slow))


def test_void_fraction_rounds_boxes_to_pixels_and_cuts_them_at_the_border():
    """3.4 (sampling): [-3, -2, 2.4, 1.6] has the pixels x < 2, y < 2."""
    void = torch.zeros(4, 4, dtype=torch.bool)
    void[0, 0] = True
    assert void_fraction(torch.tensor([[-3., -2., 2.4, 1.6], [-9., -9., 99., 99.]]), void).tolist() == [1 / 4, 1 / 16]


def test_match_takes_the_object_of_highest_iou():
    """3.4 (Mask R-CNN): positive from `high` on, negative below `low`, neither between; loops."""
    boxes, gt = random_boxes(120, 60, 60, 12), random_boxes(5, 60, 60, 13, smallest=15)
    boxes = torch.cat([boxes, gt, gt + 2])
    index, label = match(boxes, gt, 0.6, 0.3)
    seen = set()
    for b, i, l in zip(boxes.tolist(), index.tolist(), label.tolist()):
        ious = [iou_of(b, g) for g in gt.tolist()]
        best = max(ious)
        assert l == (1 if best >= 0.6 else 0 if best < 0.3 else IGNORE)
        assert best == 0 or ious[i] == best
        seen.add(l)
    assert seen == {1, 0, IGNORE}


def test_match_at_the_thresholds():
    """3.4 (Mask R-CNN): IoU of exactly `high` is positive, of exactly `low` not negative; one threshold leaves nothing between."""
    gt, boxes = torch.tensor([[0., 0., 8., 8.]]), torch.tensor([[0., 0., 8., 4.], [0., 0., 8., 2.], [0., 0., 8., 1.]])   # 1/2, 1/4, 1/8
    assert match(boxes, gt, 0.5, 0.25)[1].tolist() == [1, IGNORE, 0]
    assert match(boxes, gt, 0.25, 0.25)[1].tolist() == [1, 1, 0]


def test_match_rescues_the_best_box_of_an_object():
    """3.4 (Mask R-CNN): however low its IoU; ties all win; without `rescue` none does; an object that nothing touches has none."""
    gt = torch.tensor([[0., 0., 10., 10.], [50., 50., 60., 60.], [90., 90., 95., 95.]])
    boxes = torch.tensor([[0., 0., 10., 9.], [40., 50., 52., 60.], [58., 50., 70., 60.], [45., 50., 51., 60.], [20., 20., 30., 30.]])
    index, label = match(boxes, gt, 0.7, 0.3, rescue=True)
    assert label.tolist() == [1, 1, 1, 0, 0] and index[:3].tolist() == [0, 1, 1]
    assert match(boxes, gt, 0.7, 0.3)[1].tolist() == [1, 0, 0, 0, 0]


def test_a_rescued_box_stands_for_the_object_it_overlaps_most():
    """3.4 (Mask R-CNN): two cars share their only box, with IoU .6 and .4: it is positive for both and stands for the first."""
    gt, boxes = torch.tensor([[0., 4., 10., 10.], [0., 0., 10., 4.]]), torch.tensor([[0., 0., 10., 10.], [20., 20., 30., 30.]])
    for order, own in (([0, 1], 0), ([1, 0], 1)):
        index, label = match(boxes, gt[order], 0.7, 0.3, rescue=True)
        assert label.tolist() == [1, 0] and index[0] == own


def test_match_rescues_no_more_than_the_best():
    """3.4 (Mask R-CNN): with rescue the other labels are as without; loops."""
    boxes, gt = random_boxes(80, 60, 60, 14), random_boxes(6, 60, 60, 15)
    label, plain = match(boxes, gt, 0.7, 0.3, rescue=True)[1], match(boxes, gt, 0.7, 0.3)[1]
    best = {max(range(80), key=lambda n: iou_of(boxes[n].tolist(), g)) for g in gt.tolist()}
    assert any(plain[n] != 1 for n in best)
    assert label.tolist() == [1 if n in best else plain[n].item() for n in range(80)]


def test_match_without_objects_or_without_boxes():
    """Degenerate: no object: all boxes are negative; no box: nothing."""
    none, some = torch.zeros(0, 4), random_boxes(3, 50, 50)
    assert match(some, none, 0.7, 0.3, rescue=True)[1].tolist() == [0, 0, 0]
    assert match(none, some, 0.7, 0.3, rescue=True)[1].tolist() == []
    assert match(none, none, 0.5, 0.5)[0].tolist() == []


@pytest.mark.parametrize("positives, negatives, count, share, expected", [
    (50, 50, 20, 0.5, (10, 10)), (50, 50, 20, 0.25, (5, 15)), (3, 50, 20, 0.5, (3, 17)), (50, 4, 20, 0.5, (10, 4)),
    (0, 50, 20, 0.5, (0, 20)), (50, 0, 20, 0.25, (5, 0)), (0, 0, 20, 0.5, (0, 0)), (5, 15, 20, 0.25, (5, 15))])
def test_sample_draws_count_boxes_at_most_a_share_of_them_positive(positives, negatives, count, share, expected):
    """3.4 (Mask R-CNN): missing positives are made up for by negatives, not the other way round; ignored boxes are never drawn."""
    label = torch.tensor([1] * positives + [0] * negatives + [IGNORE] * 30)[torch.randperm(positives + negatives + 30)]
    p, n = sample(label, count, share)
    assert (len(p), len(n)) == expected
    assert (label[p] == 1).all() and (label[n] == 0).all() and len({*p.tolist(), *n.tolist()}) == sum(expected)


def test_sample_draws_at_random():
    """3.4 (Mask R-CNN): every box has its chance: over 200 draws of 5 of 10, each appears 100 times, give or take."""
    torch.manual_seed(0)
    label = torch.tensor([1] * 10 + [0] * 10)
    drawn = torch.zeros(20)
    for _ in range(200):
        drawn[torch.cat(sample(label, 10, 0.5))] += 1
    assert drawn.sum() == 2000 and drawn.min() > 60 and drawn.max() < 140


def test_thing_truth_leaves_stuff_and_crowds_out():
    """3.4: the instance branch learns the things that are single objects; ids are those of the label map."""
    t = street()
    t.truncated[3] = torch.tensor([True, False, True, False])
    ids, boxes, truncated, categories = thing_truth(t, ISTHING)
    assert ids.tolist() == [3, 4] and categories.tolist() == [1, 3]
    assert boxes.tolist() == [[4, 24, 30, 48], [40, 10, 56, 58]] and truncated.tolist() == [[False] * 4, [True, False, True, False]]


def test_void_mask_is_void_and_crowd():
    """3.4: pixel by pixel."""
    t = street()
    slow = [[k == 0 or k == 5 for k in row] for row in t.segments.tolist()]
    assert void_mask(t).tolist() == slow


def test_semantic_target_is_the_category_of_each_pixel():
    """3.4: Y_ij, IGNORE where void or crowd; pixel by pixel."""
    t = street()
    slow = [[IGNORE if k in (0, 5) else [0, 2, 1, 3][k - 1] for k in row] for row in t.segments.tolist()]
    assert semantic_target(t).tolist() == slow


def test_a_target_without_any_segment_is_all_void():
    """Degenerate: the crop of an unlabelled corner."""
    t = make_target(torch.zeros(4, 5, dtype=torch.long), [])
    assert void_mask(t).all() and (semantic_target(t) == IGNORE).all() and len(thing_truth(t, ISTHING)[0]) == 0


# --- 3.2 Region proposal head ---------------------------------------------------------------------------------------------

def proposal_head(seed=0, **kw):
    torch.manual_seed(seed)
    head = RegionProposalHead(3, [4, 8, 16], hidden=6, **{**dict(anchor_scale=4), **kw}).eval()
    nn.init.normal_(head.out.weight, std=0.5)
    features = {s: torch.randn(2, 3, -(-90 // s), -(-130 // s)) for s in (4, 8, 16)}
    return head, features, (90, 130)


def test_rph_gives_each_anchor_its_five_channels():
    """3.2: 3x3 stride 2, norm, activation, 1x1 with 5 channels an anchor (o_u o_v o_w o_h o_s): loop over levels, cells, anchors."""
    head, features, size = proposal_head()
    nn.init.uniform_(head.norm.running_mean), nn.init.uniform_(head.norm.running_var, 0.5, 2)
    scores, deltas, anchors, level = head(features, size)
    rows = []
    for k, s in enumerate((4, 8, 16)):
        y = F.conv2d(features[s], head.conv.weight, stride=2, padding=1)
        y = head.out(F.leaky_relu(head.norm(y), 0.01))
        a = make_anchors(y.shape[-2:], s, 4 * s, (0.5, 1, 2)).view(*y.shape[-2:], 3, 4)
        for i, j, r in itertools.product(range(y.shape[-2]), range(y.shape[-1]), range(3)):
            x1, y1, x2, y2 = a[i, j, r].tolist()
            if x1 >= 0 and y1 >= 0 and x2 <= 130 and y2 <= 90:
                rows.append((y[:, 5 * r:5 * r + 5, i, j], a[i, j, r], k))
    five = torch.stack([r[0] for r in rows], 1)
    torch.testing.assert_close(deltas, five[..., :4])
    torch.testing.assert_close(scores, five[..., 4])
    assert torch.equal(anchors, torch.stack([r[1] for r in rows])) and level.tolist() == [r[2] for r in rows]


@pytest.mark.parametrize("training", [True, False])
def test_only_anchors_inside_the_image_exist(training):
    """3.2, the set A: in training and at test time; on each level some are gone and some remain."""
    head, features, (h, w) = proposal_head()
    scores, deltas, anchors, level = head.train(training)(features, (h, w))
    assert all(x1 >= 0 and y1 >= 0 and x2 <= w and y2 <= h for x1, y1, x2, y2 in anchors.tolist())
    for k, s in enumerate((4, 8, 16)):
        cells = math.ceil(math.ceil(h / s) / 2) * math.ceil(math.ceil(w / s) / 2)
        assert 0 < (level == k).sum() < 3 * cells
    assert scores.shape == (2, len(anchors)) and deltas.shape == (2, len(anchors), 4)


def test_the_levels_share_one_normalisation():
    """3.2, Choice: in training the norm sees all levels as one row of pixels: mean and variance over all of them."""
    head, features, size = proposal_head()
    row = torch.cat([F.conv2d(features[s], head.conv.weight, stride=2, padding=1).flatten(2) for s in (4, 8, 16)], 2)
    head.norm.momentum = 1.0
    head.train()(features, size)
    torch.testing.assert_close(head.norm.running_mean, row.mean((0, 2)))
    torch.testing.assert_close(head.norm.running_var, row.transpose(0, 1).flatten(1).var(1))


def test_a_picture_too_small_for_any_anchor_has_no_proposals():
    """Degenerate: 8x8 pixels, the smallest anchor has 16."""
    head, _, _ = proposal_head()
    scores, deltas, anchors, level = head({s: torch.randn(1, 3, -(-8 // s), -(-8 // s)) for s in (4, 8, 16)}, (8, 8))
    assert len(anchors) == 0
    assert head.proposals(scores[0], deltas[0], anchors, level, (8, 8)).shape == (0, 4)


def test_proposals_are_the_best_of_each_level_after_nms():
    """3.2, 3.5: anchors moved by their deltas, cut at the border, NMS within a level guided by the score, the best `after`; loops."""
    g = torch.Generator().manual_seed(5)
    anchors = random_boxes(90, 100, 80, 16, smallest=20)
    scores, deltas, level = torch.randn(90, generator=g), 0.4 * torch.randn(90, 4, generator=g), torch.arange(90) % 3
    head = RegionProposalHead(3, [4, 8, 16], 4, after=(99, 25), nms_threshold=0.4).eval()
    boxes = [clip_box(move_box(a, d), (80, 100)) for a, d in zip(anchors.tolist(), deltas.tolist())]
    chosen = [n for n in range(90) if min(boxes[n][2] - boxes[n][0], boxes[n][3] - boxes[n][1]) >= 1]
    kept = greedy_nms([boxes[n] for n in chosen], [scores[n] for n in chosen], [level[n] for n in chosen], 0.4)
    assert 25 < len(kept) < len(chosen) - 10 < 80
    slow = torch.tensor([boxes[chosen[i]] for i in kept[:25]])
    torch.testing.assert_close(head.proposals(scores, deltas, anchors, level, (80, 100)), slow, rtol=1e-4, atol=1e-3)


def grid_of_anchors(n):
    """n anchors that do not overlap."""
    corner = torch.stack([torch.arange(n) % 8, torch.arange(n) // 8], 1) * 10.0
    return torch.cat([corner, corner + 5], 1)


def test_training_and_test_keep_different_numbers_of_proposals():
    """3.2: "distinct filtering steps for training and test time": `after` is a pair (training, test)."""
    head = RegionProposalHead(3, [4, 8], 4, after=(20, 10))
    args = (torch.linspace(1, 0, 40), torch.zeros(40, 4), grid_of_anchors(40), torch.arange(40) // 20, (300, 300))
    assert len(head.train().proposals(*args)) == 20 and len(head.eval().proposals(*args)) == 10


def test_only_the_best_anchors_of_each_level_enter_the_suppression():
    """3.2 (Mask R-CNN): 12000 of a level for 2000, so six for one: 12 equal boxes of high score leave no room for a 13th."""
    head = RegionProposalHead(3, [4, 8], 4, after=(2, 1)).train()
    for equal, kept in ((12, 1), (11, 2)):
        anchors = torch.cat([torch.tensor([[100., 100., 120., 120.]]).repeat(equal, 1), grid_of_anchors(8)])
        scores = torch.linspace(1, 0, len(anchors))
        assert len(head.proposals(scores, torch.zeros(len(anchors), 4), anchors, torch.ones(len(anchors), dtype=torch.long), (200, 200))) == kept


def test_a_proposal_has_at_least_one_pixel_a_side():
    """3.2: thinner than a pixel on either side it pools nothing and is dropped; exactly one pixel stays."""
    anchors = torch.tensor([[0., 0., 20., 0.5], [30., 0., 30.5, 20.], [0., 30., 1., 50.], [60., 60., 80., 80.]])
    head = RegionProposalHead(3, [4], 4)
    kept = head.proposals(torch.arange(4.), torch.zeros(4, 4), anchors, torch.zeros(4, dtype=torch.long), (100, 100))
    assert kept.tolist() == [[60, 60, 80, 80], [0, 30, 1, 50]]


def anchor_cases():
    """Anchors with whole coordinates around `street`'s car [4, 24, 30, 48], person [40, 10, 56, 58], crowd [2, 2, 20, 14]."""
    return torch.tensor([
        [4., 24., 30., 46.],      # IoU .92 with the car: positive
        [4., 24., 30., 43.],      # .79: positive
        [4., 24., 30., 36.],      # .50: neither
        [4., 24., 30., 32.],      # .33: neither
        [4., 24., 30., 30.],      # .25: negative
        [40., 10., 56., 34.],     # .50, the best of the person: positive
        [40., 10., 56., 33.],     # .48: neither
        [2., 2., 20., 14.],       # all crowd: neither
        [2., 2., 20., 17.],       # .80 crowd: neither
        [2., 2., 20., 20.],       # .67 crowd: negative
        [20., 0., 38., 16.],      # sky: negative
        [0., 61., 20., 64.],      # void: neither
        [34., 46., 50., 62.]])    # touches the person, some void: negative


def test_rph_losses_equal_the_sum_over_anchors():
    """3.4 (Mask R-CNN): one binary cross entropy an anchor, over 256 an image; Choice: the mean box loss of all positives of the
    batch.  Loops, two images with 3 and 1 positives; with more samples than anchors nothing is left to chance."""
    anchors, t = anchor_cases(), street()
    images = [t, make_target(t.segments.clamp(max=3), [0, 2, 1])]            # in the second, person and crowd belong to the car
    g = torch.Generator().manual_seed(6)
    scores, deltas = 2 * torch.randn(2, 13, generator=g), 0.3 * torch.randn(2, 13, 4, generator=g)
    head = RegionProposalHead(3, [4], 4, samples=40)
    got = head.losses(scores, deltas, anchors, images, ISTHING, (64, 64))
    score_sum = box_sum = 0
    roles = []
    for b, t in enumerate(images):
        gts = [t.boxes[k].tolist() for k in range(len(t.categories)) if ISTHING[t.categories[k]] and not t.crowd[k]]
        tops = [max(iou_of(a, g) for a in anchors.tolist()) for g in gts]
        for n, a in enumerate(anchors.tolist()):
            ious = [iou_of(a, g) for g in gts]
            positive = max(ious) >= 0.7 or any(i == top for i, top in zip(ious, tops))
            negative = not positive and max(ious) < 0.3 and share_of_void(a, t) <= 0.7
            s = scores[b, n].item()
            score_sum += math.log1p(math.exp(-s)) if positive else math.log1p(math.exp(s)) if negative else 0
            if positive:
                box_sum += slow_box_loss(deltas[b, n].tolist(), gts[ious.index(max(ious))], a, 1 / 9)
            roles.append("+" if positive else "-" if negative else ".")
    assert "".join(roles[:13]) == "++..-+...--.-" and roles.count("+") == 4
    assert got["rph_score"].item() == pytest.approx(score_sum / 80, rel=1e-4)
    assert got["rph_box"].item() == pytest.approx(box_sum / roles.count("+"), rel=1e-4)


def test_rph_learns_from_a_sample_half_of_it_positive_at_most():
    """3.4 (Mask R-CNN): 8 of 60 anchors: 4 of the 20 positives and 4 negatives.  An undecided score costs log 2 each."""
    t = make_target(torch.ones(64, 64, dtype=torch.long).index_fill(0, torch.arange(20), 2), [2, 1])       # car [0, 0, 64, 20]
    anchors = torch.cat([torch.tensor([[0., 0., 64., 20.]]).repeat(20, 1), torch.tensor([[10., 30., 40., 60.]]).repeat(40, 1)])
    recorder = Recorder()
    head = RegionProposalHead(3, [4], 4, samples=8, box_loss=recorder)
    loss = head.losses(torch.zeros(1, 60), torch.zeros(1, 60, 4), anchors, [t], ISTHING, (64, 64))
    assert loss["rph_score"].item() == pytest.approx(math.log(2)) and len(recorder.calls[0].deltas) == 4
    sure = head.losses(torch.full((1, 60), 50.), torch.zeros(1, 60, 4), anchors, [t], ISTHING, (64, 64))
    assert sure["rph_score"].item() == pytest.approx(50 * 4 / 8)


def test_anchors_over_a_crowd_are_never_negatives():
    """3.4, the vocabulary: a crowd is void for training: a head that is sure of an object there pays nothing."""
    t = make_target(torch.ones(32, 32, dtype=torch.long), [1], crowd=[1])
    head = RegionProposalHead(3, [4], 4)
    got = head.losses(torch.full((1, 5), 100.), torch.zeros(1, 5, 4), random_boxes(5, 32, 32), [t], ISTHING, (32, 32))
    assert got["rph_score"] == 0 and got["rph_box"] == 0


# --- 3.2 Region segmentation head -----------------------------------------------------------------------------------------

def test_group_norm_computes_in_float32_whatever_it_is_given():
    """3.2: bf16 goes in; out comes GN of its exact values, not rounded again."""
    x = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(30)).bfloat16()
    got = GroupNorm(8)(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, F.group_norm(x.float(), 2))


@pytest.mark.parametrize("channels, groups", [(1024, 32), (256, 32), (128, 32), (64, 16), (48, 4), (50, 2), (16, 4), (8, 2), (4, 1), (3, 1)])
def test_group_norm_has_32_groups_of_four_channels_or_more(channels, groups):
    """3.2: GN [52] with its default of 32 groups; thin layers have fewer."""
    assert GroupNorm(channels).num_groups == groups


def test_rsh_pools_each_box_from_the_level_of_its_size():
    """3.2: RoIAlign 14x14 on level k, one box after the other; image and order are kept; degenerate: an image without boxes."""
    head, features = region_head()
    boxes = [torch.zeros(0, 4), torch.tensor([[0., 0., 60., 60.], [3., 5., 12., 9.], [10., 10., 40., 40.], [0., 0., 96., 64.], [20., 9., 37., 25.]])]
    slow = []
    for b in boxes[1]:
        w, h = (b[2:] - b[:2]).tolist()
        k = max(1, min(4, math.floor(3 + math.log2(math.sqrt(w * h) / 32))))
        slow.append(roi_align(features[2 ** (k + 1)][1:], [b[None]], 14, 1 / 2 ** (k + 1), 1, True))
    torch.testing.assert_close(head.pool(features, boxes), torch.cat(slow))


def test_roi_align_puts_pixel_centres_at_one_half():
    """3.2, the vocabulary: on a map that tells its own x, a cell of the box holds the x of its centre."""
    ramp = ((torch.arange(64.) + 0.5) * 4).expand(1, 1, 64, 64)
    head = RegionSegmentationHead(1, [4], 1, box_channels=4, mask_channels=4)
    pooled = head.pool({4: ramp}, [torch.tensor([[20., 40., 76., 96.]])])[0, 0]
    torch.testing.assert_close(pooled, (20 + (torch.arange(14.) + 0.5) * 4).expand(14, 14))


def test_classify_gives_class_scores_with_void_first_and_a_correction_for_each_class():
    """3.2: 5 N + 1 output units; corrections in Mask R-CNN's units (10, 10, 5, 5).  The two fully connected layers by hand."""
    head, features = region_head(classes=3)
    pooled = torch.randn(5, 4, 14, 14, generator=torch.Generator().manual_seed(7))
    halved = pooled.view(5, 4, 7, 2, 7, 2).mean((3, 5)).flatten(1)
    first, gn1, second, gn2 = (m for m in head.fc if isinstance(m, (nn.Linear, nn.GroupNorm)))
    x = F.leaky_relu(gn1(halved @ first.weight.T), 0.01)
    x = F.leaky_relu(gn2(x @ second.weight.T), 0.01)
    y = x @ head.out.weight.T + head.out.bias
    logits, deltas = head.classify(pooled)
    torch.testing.assert_close(logits, y[:, :4])
    for c in range(3):
        torch.testing.assert_close(deltas[:, c], y[:, 4 + 4 * c:8 + 4 * c] / torch.tensor([10., 10., 5., 5.]))


def test_the_mask_branch_is_four_convolutions_a_deconvolution_and_a_1x1():
    """3.2: four 3x3, each with GN and LeakyReLU; 2x2 deconvolution of stride 2, GN, LeakyReLU; 1x1 with a mask for each class."""
    layers = [type(m).__name__ for m in region_head()[0].mask]
    assert layers == ["Conv2d", "GroupNorm", "LeakyReLU"] * 4 + ["ConvTranspose2d", "GroupNorm", "LeakyReLU", "Conv2d"]
    assert region_head(classes=3)[0].mask(torch.randn(2, 4, 14, 14)).shape == (2, 3, 28, 28)


def test_the_output_layers_start_near_zero():
    """Mask R-CNN: the heads begin with small corrections and no opinion: weights N(0, 0.01^2), biases 0."""
    for out in (RegionProposalHead(64, [4], 128).out, RegionSegmentationHead(4, [4], 20, box_channels=64, mask_channels=4).out):
        assert 0.008 < out.weight.std() < 0.012 and out.bias.abs().max() == 0


def test_mask_targets_read_the_label_map_at_the_centres_of_the_cells():
    """3.4 (Mask R-CNN), Choice: loops; boxes larger and smaller than 28 pixels, of one pixel, beyond the border."""
    g = torch.Generator().manual_seed(8)
    segments = torch.randint(0, 4, (2, 40, 60), generator=g)
    boxes = torch.cat([random_boxes(6, 60, 40, 17), torch.tensor([[3., 4., 4., 5.], [0., 0., 60., 40.], [50., 30., 70., 50.], [-8., -6., 20., 20.]])])
    owner, segment = torch.tensor([0, 1] * 5), torch.randint(1, 4, (10,), generator=g)
    got = mask_targets(segments, owner, segment, boxes, 9)
    for p, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        for i, j in itertools.product(range(9), range(9)):
            y, x = y1 + (i + 0.5) / 9 * (y2 - y1), x1 + (j + 0.5) / 9 * (x2 - x1)
            y, x = min(max(int(y), 0), 39), min(max(int(x), 0), 59)
            assert got[p, i, j] == float(segments[owner[p], y, x] == segment[p])


def test_the_mask_target_of_a_box_around_a_rectangle_is_all_foreground():
    """3.4 (Mask R-CNN): 28x28 by default; half of a box twice as wide."""
    segments = torch.zeros(1, 30, 50, dtype=torch.long)
    segments[0, 5:19, 10:38] = 1
    one = torch.ones(2, dtype=torch.long)
    full, half = mask_targets(segments, one * 0, one, torch.tensor([[10., 5., 38., 19.], [10., 5., 66., 19.]]).clamp(max=50.))
    assert full.shape == (28, 28) and full.all()
    assert half.mean().item() == pytest.approx(28 / 40, abs=0.04)


def rsh_case():
    """A region head with two images of proposals: positives, negatives, void, crowd."""
    head, features = region_head(samples=200)
    features = {s: f[..., :64 // s] for s, f in features.items()}
    t = street()
    t.truncated[2, 0] = True
    other = make_target(torch.where(t.segments == 4, 2, t.segments.clamp(max=3)), [0, 2, 3])     # the car's place is a person's
    return head, features, [anchor_cases(), anchor_cases()[3:9]], [t, other]


def test_rsh_losses_equal_the_sum_over_proposals():
    """3.4 (Mask R-CNN): cross entropy over classes and void, 10 box losses with β = 0.1, mask cross entropy of the true class;
    positives from IoU .5 on, ground truth among the proposals.  Loops, one proposal at a time, nothing left to chance."""
    head, features, proposals, targets = rsh_case()
    index = torch.tensor([-7, 0, -7, 1])                                     # category -> class
    got = head.losses(features, proposals, targets, ISTHING, index, (64, 64))
    classes = boxes = masks = count = positives = 0
    for b, t in enumerate(targets):
        things = [k for k in range(len(t.categories)) if ISTHING[t.categories[k]] and not t.crowd[k]]
        gts = [t.boxes[k].tolist() for k in things]
        for p in proposals[b].tolist() + gts:
            ious = [iou_of(p, g) for g in gts]
            k = ious.index(max(ious))
            positive = ious[k] >= 0.5
            if not positive and share_of_void(p, t) > 0.7:
                continue
            count += 1
            pooled = head.pool({s: f[b:b + 1] for s, f in features.items()}, [torch.tensor([p])])
            logits, deltas = head.classify(pooled)
            own = index[t.categories[things[k]]].item()
            classes -= logits[0].log_softmax(0)[own + 1 if positive else 0].item()
            if positive:
                positives += 1
                boxes += slow_box_loss(deltas[0, own].tolist(), gts[k], p, 0.1)
                mask = head.mask(pooled)[0, own].sigmoid()
                for i, j in itertools.product(range(28), range(28)):
                    y, x = int(p[1] + (i + 0.5) / 28 * (p[3] - p[1])), int(p[0] + (j + 0.5) / 28 * (p[2] - p[0]))
                    q = mask[i, j].item()
                    masks -= math.log(q if t.segments[y, x] == things[k] + 1 else 1 - q)
    assert 4 < positives < count - 4
    assert got["rsh_class"].item() == pytest.approx(classes / count, rel=1e-4)
    assert got["rsh_box"].item() == pytest.approx(10 * boxes / count, rel=1e-3)
    assert got["rsh_mask"].item() == pytest.approx(masks / (positives * 28 * 28), rel=1e-3)


def test_the_region_heads_losses_reach_the_features():
    """3.2, 3.4: trained end to end: class and box losses, and the mask loss, each have a gradient in the maps they pool from."""
    head, features, proposals, targets = rsh_case()
    features = {s: f.requires_grad_() for s, f in features.items()}
    losses = head.losses(features, proposals, targets, ISTHING, torch.tensor([0, 0, 0, 1]), (64, 64))
    for v in losses.values():
        grads = torch.autograd.grad(v, list(features.values()), retain_graph=True)
        assert sum(g.abs().sum() for g in grads) > 0


def test_ten_times_beta_a_tenth_is_mask_rcnns_loss_of_tenfold_deltas():
    """3.4, Choice: 10 ℓ_0.1(δ) = ℓ_1(10 δ)."""
    z = torch.linspace(-1, 1, 41)
    ten = 10 * F.smooth_l1_loss(z, 0 * z, beta=0.1, reduction="none")
    torch.testing.assert_close(ten, F.smooth_l1_loss(10 * z, 0 * z, beta=1.0, reduction="none"))


def test_rsh_learns_from_a_sample_a_quarter_of_it_positive_at_most():
    """3.4 (Mask R-CNN): 8 proposals an image, 2 of them positive, though there are many of both."""
    recorder = Recorder()
    head, features = region_head(samples=8, box_loss=recorder)
    t = street()
    proposals = [torch.cat([t.boxes[2:3].repeat(30, 1), torch.tensor([[22., 2., 38., 16.]]).repeat(30, 1)])] * 2
    shapes = []
    head.fc.register_forward_hook(lambda m, x, y: shapes.append(len(x[0])))
    head.losses(features, proposals, [t, t], ISTHING, torch.tensor([0, 0, 0, 1]), (64, 96))
    assert shapes == [16] and len(recorder.calls[0].deltas) == 4


def test_ground_truth_is_among_the_proposals():
    """3.4 (Mask R-CNN): with no proposal at all, the head still learns the two objects; their box targets are zero."""
    recorder = Recorder()
    head, features = region_head(box_loss=recorder)
    t = street()
    head.losses({s: f[:1] for s, f in features.items()}, [torch.zeros(0, 4)], [t], ISTHING, torch.tensor([0, 0, 0, 1]), (64, 96))
    call, = recorder.calls
    assert call.gt.tolist() == t.boxes[2:4].tolist() == call.anchors.tolist()


def test_proposals_over_a_crowd_are_never_negatives():
    """3.4, the vocabulary: a crowd is void for training; with nothing else to learn from, the loss is 0 with gradient."""
    head, features = region_head()
    t = make_target(torch.ones(64, 96, dtype=torch.long), [1], crowd=[1])
    got = head.losses(features, [random_boxes(9, 96, 64)] * 2, [t, t], ISTHING, torch.tensor([0, 0, 0, 1]), (64, 96))
    assert all(v == 0 and v.requires_grad for v in got.values())


def test_detect_corrects_scores_and_suppresses_per_class():
    """3.5: scores from the softmax, boxes corrected by each class, second NMS per class, best first; masks of the class from the
    CORRECTED box.  Loops over proposals and classes."""
    head, features = region_head(score_threshold=0.2, nms_threshold=0.2, detections=7)
    proposals = [random_boxes(16, 96, 64, 18, smallest=16), random_boxes(12, 96, 64, 19, smallest=16)]
    suppressed = 0
    for b, found in enumerate(head.detect(features, proposals, (64, 96))):
        one = {s: f[b:b + 1] for s, f in features.items()}
        boxes, scores, classes = [], [], []
        for p in proposals[b]:
            logits, deltas = head.classify(head.pool(one, [p[None]]))
            for c, score in enumerate(logits[0].softmax(0)[1:].tolist()):
                if score > 0.2:
                    boxes.append(clip_box(move_box(p.tolist(), deltas[0, c].tolist()), (64, 96))), scores.append(score), classes.append(c)
        kept = greedy_nms(boxes, scores, classes, 0.2)
        suppressed += len(boxes) - len(kept)
        kept = kept[:7]
        torch.testing.assert_close(found["boxes"], torch.tensor([boxes[i] for i in kept]), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found["scores"], torch.tensor([scores[i] for i in kept]), rtol=1e-4, atol=1e-5)
        assert found["classes"].tolist() == [classes[i] for i in kept] and len(set(found["classes"].tolist())) == 2
        slow = torch.cat([head.mask(head.pool(one, [torch.tensor([boxes[i]])]))[:, classes[i]] for i in kept])
        torch.testing.assert_close(found["masks"], slow, rtol=1e-3, atol=1e-3)
    assert suppressed > 3


def test_who_wants_the_sure_ones_gets_the_same_as_who_leaves_out_the_others():
    """detect(score_threshold): nobody is suppressed by a worse one, so a higher bar changes none of those above it."""
    head, features = region_head(score_threshold=0.2, nms_threshold=0.2, detections=7)
    proposals = [random_boxes(16, 96, 64, 18, smallest=16), random_boxes(12, 96, 64, 19, smallest=16)]
    bar = head.detect(features, proposals, (64, 96))[0]["scores"].median().item()
    left_out = 0
    for few, all_ in zip(head.detect(features, proposals, (64, 96), bar), head.detect(features, proposals, (64, 96))):
        sure = all_["scores"] > bar
        left_out += int((~sure).sum())
        assert all(torch.allclose(few[k].float(), all_[k][sure].float(), atol=1e-5) and len(few[k]) == int(sure.sum()) for k in all_)
    assert left_out > 2


def test_two_classes_may_claim_the_same_place():
    """3.5: "this time independently per class": one box, two classes of .47 each: both survive, one of each."""
    head, features = region_head()
    nn.init.zeros_(head.out.weight)
    with torch.no_grad():
        head.out.bias.copy_(torch.tensor([0., 2, 2] + [0.] * 8))
    found = head.detect(features, [torch.tensor([[5., 5., 40., 40.]]).repeat(3, 1), torch.zeros(0, 4)], (64, 96))
    assert found[0]["classes"].sort().values.tolist() == [0, 1] and len(found[1]["scores"]) == 0


@pytest.mark.parametrize("delta", [(50, 0, 0, 0), (0, 50, 0, 0)])
def test_a_detection_that_leaves_the_image_is_none(delta):
    """3.5, degenerate: corrected by five of its own widths (or heights) to the right (or down) nothing of it remains."""
    head, features = region_head(classes=1)
    nn.init.zeros_(head.out.weight)
    with torch.no_grad():
        head.out.bias.copy_(torch.tensor([0., 2, *delta]))
    found = head.detect(features, [torch.tensor([[60., 30., 90., 60.]]), torch.zeros(0, 4)], (64, 96))
    assert [len(f["boxes"]) for f in found] == [0, 0]


def test_scores_of_detections_have_gradient_and_boxes_have_none():
    """detect: what learns on top of detections reaches the class scores; boxes are where the masks are pooled, no more."""
    head, features = region_head()
    found = head.detect(features, [random_boxes(6, 96, 64), random_boxes(6, 96, 64, 1)], (64, 96))
    sum(f["scores"].sum() for f in found).backward()
    assert head.out.weight.grad.abs().sum() > 0 and not any(f["boxes"].requires_grad for f in found)


# --- 3.3 Semantic segmentation branch -------------------------------------------------------------------------------------

@pytest.mark.parametrize("window", [1, 2, 5, 8])
def test_window_mean_equals_avg_pool_with_replicated_border(window):
    """3.3: average pooling of stride 1 without padding, then replication: nn.AvgPool2d and F.pad(mode="replicate").  What an even
    window loses is odd: the surplus pixel is on the far side."""
    x = torch.randn(2, 3, 11, 17, generator=torch.Generator().manual_seed(9))
    near, far = (window - 1) // 2, window // 2
    slow = F.pad(nn.AvgPool2d(window, stride=1)(x), (near, far, near, far), mode="replicate")
    torch.testing.assert_close(window_mean(x, window), slow, rtol=1e-4, atol=1e-5)


def test_window_mean_of_a_small_map_is_global_pooling():
    """3.3: "we obtain the same output at training time if we keep the kernel size equal to the training input resolution"."""
    x = torch.randn(2, 3, 6, 9, generator=torch.Generator().manual_seed(10))
    for window in (9, 64):
        torch.testing.assert_close(window_mean(x, window), nn.AdaptiveAvgPool2d(1)(x).expand_as(x), rtol=1e-4, atol=1e-5)


def test_window_mean_of_a_map_smaller_along_one_axis_only():
    """3.3: height 4 is pooled whole, width 12 by the window of 5."""
    x = torch.randn(1, 2, 4, 12, generator=torch.Generator().manual_seed(11))
    slow = F.pad(F.avg_pool2d(x, (4, 5), 1), (2, 2, 1, 2), mode="replicate")
    torch.testing.assert_close(window_mean(x, 5), slow, rtol=1e-4, atol=1e-5)


def test_window_mean_in_bf16_is_as_good_as_its_last_rounding():
    """3.3: running sums need float32; the result comes back in the input's type."""
    x = (torch.rand(1, 1, 8, 600, generator=torch.Generator().manual_seed(12)) + 3).bfloat16()
    got = window_mean(x, 8)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), window_mean(x.float(), 8), rtol=2 ** -8, atol=0)


def test_window_mean_has_the_gradient_of_avg_pool():
    """3.3: the running sums are as differentiable as the pooling."""
    x = torch.randn(1, 2, 7, 9, dtype=torch.double, requires_grad=True, generator=torch.Generator().manual_seed(13))
    w = torch.randn(1, 2, 7, 9, generator=torch.Generator().manual_seed(14))
    fast, = torch.autograd.grad((window_mean(x, 3) * w).sum(), x)
    slow, = torch.autograd.grad((F.pad(F.avg_pool2d(x, 3, 1), (1, 1, 1, 1), mode="replicate") * w).sum(), x)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def mini_dl(window, seed=0):
    torch.manual_seed(seed)
    return MiniDL(3, 4, window).eval()


def by_hand(m, x, pooled):
    """Figure 2 with functional operators and the weights of m; every convolution is followed by norm and LeakyReLU(0.01)."""
    def layer(block, x, **kw):
        conv, norm, _ = block
        return F.leaky_relu(norm(F.conv2d(x, conv.weight, **kw)), 0.01)
    near, far = layer(m.near, x, padding=1), layer(m.far, x, padding=6, dilation=6)
    return layer(m.out, torch.cat([near, far, layer(m.context, pooled)], 1), padding=1)


def test_minidl_is_three_parallel_branches_and_a_convolution():
    """3.3, Figure 2: 3x3, 3x3 with dilation 6, 64x64 pooling with a 1x1; concatenated, 3x3.  The resolution is kept."""
    m, x = mini_dl(4), torch.randn(2, 3, 15, 18, generator=torch.Generator().manual_seed(15))
    pooled = F.pad(F.avg_pool2d(x, 4, 1), (1, 2, 1, 2), mode="replicate")
    torch.testing.assert_close(m(x), by_hand(m, x, pooled), rtol=1e-4, atol=1e-5)


def test_minidl_pools_over_64x64_and_has_128_channels():
    """3.3: the paper's numbers are the defaults."""
    m = MiniDL(8)
    assert m.window == 64 and m(torch.randn(2, 8, 3, 4)).shape == (2, 128, 3, 4)


def test_minidl_equals_global_pooling_on_maps_smaller_than_the_window():
    """3.3: it generalises DeepLabV3's head: with the window as large as the training map both are the same."""
    m, x = mini_dl(16), torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(16))
    torch.testing.assert_close(m(x), by_hand(m, x, x.mean((2, 3), keepdim=True).expand_as(x)), rtol=1e-4, atol=1e-5)


def moved(m):
    """The same pixels at two places of two crops, far from the border: outputs of both."""
    x = torch.randn(1, 3, 48, 56, generator=torch.Generator().manual_seed(17))
    x[..., 30:] += 9                                                         # surroundings that differ
    a, b = m(x[..., :40, :40]), m(x[..., 3:43, 16:56])
    return a[..., 11:31, 24:32], b[..., 8:28, 8:16]


def test_minidl_is_translation_equivariant_away_from_the_border():
    """3.3, reason i: a pixel's output does not depend on where in the picture it stands, nor on what stands beyond the window."""
    a, b = moved(mini_dl(8))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_global_pooling_is_not_translation_equivariant():
    """3.3, reason i: the same head with a window that takes in the whole map."""
    a, b = moved(mini_dl(10 ** 6))
    assert (a - b).abs().max() > 0.1 * a.std()


def test_semantic_head_is_four_unshared_minidl_at_stride_4():
    """3.3: one a level, upsampled to stride 4, concatenated, 1x1; the levels 64 and 128 are not read."""
    torch.manual_seed(0)
    head = SemanticHead(3, 5, channels=4, window=8).eval()
    features = {s: torch.randn(2, 3, -(-97 // s), -(-131 // s)) for s in (4, 8, 16, 32, 64)}
    maps = [F.interpolate(head.heads[i](features[s]), size=(25, 33), mode="bilinear") for i, s in enumerate((4, 8, 16, 32))]
    slow = F.conv2d(torch.cat(maps, 1), head.out.weight, head.out.bias)
    torch.testing.assert_close(head(features), slow, rtol=1e-4, atol=1e-5)
    parameters = [p for m in head.heads for p in m.parameters()]
    assert len({id(p) for p in parameters}) == len(parameters) == 4 * 4 * 3


def test_resize_puts_pixel_centres_at_one_half():
    """3.3, the vocabulary: a ramp that tells its own x stays one, away from the border; the same size stays as it is."""
    ramp = ((torch.arange(8.) + 0.5) * 4).expand(1, 1, 6, 8)
    big = resize_logits(ramp, (24, 32))
    torch.testing.assert_close(big[0, 0, :, 2:-2], (torch.arange(32.) + 0.5)[2:-2].expand(24, 28))
    assert big.shape == (1, 1, 24, 32) and resize_logits(ramp, torch.Size([6, 8])) is ramp


# --- 3.4 Training losses --------------------------------------------------------------------------------------------------

def slow_hardest(logits, target, fraction=0.25):
    per_image = []
    for l, t in zip(logits, target):
        costs = []
        for i, j in itertools.product(range(t.shape[0]), range(t.shape[1])):
            if t[i, j] != IGNORE:
                p = l[:, i, j].exp() / l[:, i, j].exp().sum()
                costs.append(-math.log(p[t[i, j]].item()))
        n = math.ceil(fraction * len(costs))
        per_image.append(sum(sorted(costs)[-n:]) / n if n else 0)
    return sum(per_image) / len(per_image)


@pytest.mark.parametrize("void", [0.0, 0.3, 0.9])
def test_the_hardest_quarter_of_the_pixels_is_learnt_and_void_is_none_of_them(void):
    """3.4, L_ss: ω = 4 / (W H) on the 25% of lowest probability, 0 elsewhere; sorted loops; odd sizes, so a rounded quarter."""
    g = torch.Generator().manual_seed(18)
    logits, target = 2 * torch.randn(3, 5, 7, 9, generator=g), torch.randint(0, 5, (3, 7, 9), generator=g)
    target[torch.rand(3, 7, 9, generator=g) < void] = IGNORE
    assert hardest_pixels_loss(logits, target).item() == pytest.approx(slow_hardest(logits, target), rel=1e-4)


def test_exactly_a_quarter_of_the_pixels_has_gradient():
    """3.4: ω_ij = 0 for three of four: 16 of 64; they are those of lowest probability."""
    g = torch.Generator().manual_seed(19)
    logits, target = torch.randn(1, 3, 8, 8, generator=g).requires_grad_(), torch.randint(0, 3, (1, 8, 8), generator=g)
    hardest_pixels_loss(logits, target).backward()
    learnt = logits.grad.abs().sum(1)[0] > 0
    p = logits.detach().softmax(1).gather(1, target[:, None])[0, 0]
    assert learnt.sum() == 16 and p[learnt].max() < p[~learnt].min()


def test_the_weight_of_a_hard_pixel_is_4_over_the_number_of_pixels():
    """3.4: τ = 4 / (W H): an undecided picture of C categories costs log C, as if all pixels counted."""
    assert hardest_pixels_loss(torch.zeros(2, 7, 4, 8), torch.ones(2, 4, 8, dtype=torch.long)).item() == pytest.approx(math.log(7))


def test_with_fraction_one_the_loss_is_the_plain_cross_entropy():
    """3.4: without mining."""
    g = torch.Generator().manual_seed(20)
    logits, target = torch.randn(2, 4, 6, 5, generator=g), torch.randint(0, 4, (2, 6, 5), generator=g)
    torch.testing.assert_close(hardest_pixels_loss(logits, target, fraction=1.0), F.cross_entropy(logits, target))


def test_each_image_of_the_batch_has_its_own_hardest_quarter():
    """3.4: "the per-image segmentation loss": the batch's is the mean over the images, an easy image keeps its share."""
    g = torch.Generator().manual_seed(21)
    logits, target = torch.randn(2, 4, 6, 6, generator=g), torch.randint(0, 4, (2, 6, 6), generator=g)
    logits[0] *= 10
    each = [hardest_pixels_loss(logits[b:b + 1], target[b:b + 1]).item() for b in range(2)]
    assert hardest_pixels_loss(logits, target).item() == pytest.approx(sum(each) / 2, rel=1e-5)


def test_an_image_with_one_labelled_pixel_learns_from_it():
    """3.4, Choice: the quarter is rounded up."""
    target = torch.full((1, 5, 5), IGNORE)
    target[0, 2, 3] = 1
    logits = torch.zeros(1, 3, 5, 5)
    logits[0, 1, 2, 3] = math.log(2)                                         # p = 2/4
    assert hardest_pixels_loss(logits, target).item() == pytest.approx(math.log(2))


def test_an_image_that_is_all_void_costs_nothing_and_still_has_gradient():
    """3.4, Choice: 0, not NaN, and DDP need not wait."""
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = hardest_pixels_loss(logits, torch.full((1, 4, 4), IGNORE))
    loss.backward()
    assert loss == 0 and logits.grad.abs().max() == 0


# --- 3.5 Testing and panoptic fusion --------------------------------------------------------------------------------------

def bilinear(mask, u, v):
    s = len(mask)
    u, v = min(max(u, 0), s - 1), min(max(v, 0), s - 1)
    j, i = min(int(u), s - 2), min(int(v), s - 2)
    a, b = u - j, v - i
    return (1 - b) * ((1 - a) * mask[i][j] + a * mask[i][j + 1]) + b * ((1 - a) * mask[i + 1][j] + a * mask[i + 1][j + 1])


def test_paste_masks_is_bilinear_interpolation_in_the_box():
    """3.5: pixel by pixel, logit above 0; boxes inside, across the border, outside, thin; those of less than 1e-4 may fall either way."""
    masks = torch.randn(7, 5, 5, generator=torch.Generator().manual_seed(22))
    boxes = torch.tensor([[2., 3., 15., 12.], [-4.3, -2.2, 9.1, 6.4], [10.5, 5.5, 30., 25.], [0., 0., 22., 14.], [3.2, 1.1, 4.9, 13.], [40., 2., 50., 8.], [7.2, 6.3, 7.3, 6.35]])
    got = paste_masks(masks, boxes, (14, 22), chunk=3)
    assert got.dtype == torch.bool and got.shape == (7, 14, 22)
    for m, (x1, y1, x2, y2), pasted in zip(masks.tolist(), boxes.tolist(), got.tolist()):
        for i, j in itertools.product(range(14), range(22)):
            x, y = j + 0.5, i + 0.5
            value = bilinear(m, (x - x1) / (x2 - x1) * 5 - 0.5, (y - y1) / (y2 - y1) * 5 - 0.5) if x1 <= x < x2 and y1 <= y < y2 else -1
            assert abs(value) < 1e-4 or pasted[i][j] == (value > 0)


def test_paste_masks_equals_interpolate_where_boxes_have_whole_coordinates():
    """3.5: F.interpolate, pixel centres at +.5."""
    masks = torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(23))
    slow = torch.zeros(40, 50, dtype=torch.bool)
    slow[4:37, 9:46] = F.interpolate(masks[None], size=(33, 37), mode="bilinear")[0, 0] > 0
    assert (paste_masks(masks, torch.tensor([[9., 4., 46., 37.]]), (40, 50))[0] != slow).sum() <= 1


def test_a_foreground_mask_fills_the_pixels_whose_centres_are_in_its_box():
    """The vocabulary: boxes are half open: a centre at x1 is in, one at x2 is out."""
    got = paste_masks(torch.ones(1, 28, 28), torch.tensor([[2.5, 1.5, 5.5, 3.5]]), (6, 8))[0]
    slow = torch.zeros(6, 8, dtype=torch.bool)
    slow[1:3, 2:5] = True
    assert torch.equal(got, slow)


def test_a_mask_in_a_box_thinner_than_a_pixel():
    """3.5, degenerate: [3.4, 3.6] holds one centre, in its middle: the mask's middle column decides."""
    mask = torch.full((1, 28, 28), -1.0)
    mask[..., 13:15] = 1
    got = paste_masks(mask, torch.tensor([[3.4, 0., 3.6, 6.]]), (6, 8))[0]
    assert got[:, 3].all() and got.sum() == 6


def test_paste_masks_of_an_empty_box_or_of_nothing_is_empty():
    """3.5, degenerate: no width; no detections; a logit of 0 is not foreground."""
    assert not paste_masks(torch.ones(1, 28, 28), torch.tensor([[3.5, 2., 3.5, 6.]]), (6, 8)).any()
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (6, 8)).shape == (0, 6, 8)
    assert not paste_masks(torch.zeros(1, 28, 28), torch.tensor([[0., 0., 8., 6.]]), (6, 8)).any()


def slow_fuse(masks, scores, categories, semantic, isthing, score_threshold, overlap, stuff_area):
    """Section 3.5 pixel by pixel, in Python's lists."""
    h, w = len(semantic), len(semantic[0])
    pixels = list(itertools.product(range(h), range(w)))
    segments, cats, kept_scores = [[0] * w for _ in range(h)], [], []
    for d in sorted(range(len(masks)), key=lambda d: -scores[d]):            # Python's sort is stable: of equals the first
        mine = [(i, j) for i, j in pixels if masks[d][i][j]]
        free = [(i, j) for i, j in mine if segments[i][j] == 0]
        if scores[d] < score_threshold or not mine or len(free) / len(mine) < overlap:
            continue
        cats.append(categories[d]), kept_scores.append(scores[d])
        for i, j in free:
            segments[i][j] = len(cats)
    unassigned = [(i, j) for i, j in pixels if segments[i][j] == 0]
    for c in range(len(isthing)):
        mine = [(i, j) for i, j in unassigned if semantic[i][j] == c]
        if not isthing[c] and mine and len(mine) >= stuff_area:
            cats.append(c), kept_scores.append(1.0)
            for i, j in mine:
                segments[i][j] = len(cats)
    return segments, cats, kept_scores


@pytest.mark.parametrize("detections", [0, 1, 6])
def test_fusion_equals_the_pixel_by_pixel_algorithm(detections):
    """3.5: 20 random cases each, with equal scores, empty masks, identical masks."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        masks = torch.zeros(detections, 10, 12, dtype=torch.bool)
        for m in masks:
            x1, y1, w, h = (int(torch.randint(0, k, (), generator=g)) for k in (9, 8, 8, 7))
            m[y1:y1 + h, x1:x1 + w] = True                                   # h or w of 0: an empty mask
        if detections > 3:
            masks[3] = masks[0]
        scores = torch.randint(3, 8, (detections,), generator=g) / 8         # exact in binary, with ties
        categories = torch.tensor([1, 3])[torch.randint(0, 2, (detections,), generator=g)]
        semantic = torch.randint(0, 4, (10, 12), generator=g)
        segments, cats, kept = fuse(masks, scores, categories, semantic, ISTHING, 0.5, 0.5, 20)
        slow = slow_fuse(masks.tolist(), scores.tolist(), categories.tolist(), semantic.tolist(), ISTHING.tolist(), 0.5, 0.5, 20)
        assert (segments.tolist(), cats.tolist(), kept.tolist()) == slow


def two_instances(free_of_second):
    """Instance 0 scores higher; instance 1 has 8 pixels, of which so many are not instance 0's."""
    masks = torch.zeros(2, 4, 20, dtype=torch.bool)
    masks[0, 0, :10] = True
    masks[1, 0, 10 - (8 - free_of_second):10 + free_of_second] = True
    return masks, torch.tensor([0.9, 0.8]), torch.tensor([1, 3]), torch.ones(4, 20, dtype=torch.long), ISTHING


@pytest.mark.parametrize("free, kept", [(3, 1), (4, 2), (5, 2), (0, 1), (8, 2)])
def test_fusion_keeps_an_instance_only_if_half_of_it_is_free(free, kept):
    """3.5: "provided that the latter number of pixels covers at least 50% of the instance"; it gets those pixels only."""
    segments, categories, _ = fuse(*two_instances(free), stuff_area=1)
    assert len(categories) == kept and (segments == 1).sum() == 10 and (segments == 2).sum() == (free if kept == 2 else 0)


def test_fusion_serves_the_higher_score_first():
    """3.5: "in reverse classification score order": with the scores exchanged, the other one keeps all its pixels."""
    masks, scores, *rest = two_instances(5)
    segments, categories, kept = fuse(masks, scores.flip(0), *rest, stuff_area=1)
    assert categories.tolist() == [3, 1] and torch.equal(segments == 1, masks[1]) and kept.tolist() == scores.tolist()


def test_a_discarded_instance_frees_its_pixels_for_the_next():
    """3.5: an instance that is dropped has marked nothing."""
    masks = torch.zeros(3, 1, 12, dtype=torch.bool)
    masks[0, 0, :6], masks[1, 0, 1:8], masks[2, 0, 6:8] = True, True, True
    segments, *_ = fuse(masks, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 1, 1]), torch.ones(1, 12, dtype=torch.long), ISTHING)
    assert segments.tolist() == [[1] * 6 + [2] * 2 + [0] * 4]


def test_instances_of_low_score_do_not_take_part():
    """3.5, Choice: a score of exactly the threshold does."""
    masks, _, *rest = two_instances(8)
    assert fuse(masks, torch.tensor([0.49, 0.5]), *rest, stuff_area=1)[1].tolist() == [3]
    assert fuse(masks, torch.tensor([0.49, 0.5]), *rest, score_threshold=0.3, stuff_area=1)[1].tolist() == [3, 1]


@pytest.mark.parametrize("area, kept", [(15, []), (16, [2]), (17, [2])])
def test_stuff_smaller_than_the_threshold_becomes_void(area, kept):
    """3.5: "if the total amount of pixels of any stuff class is smaller than a given threshold": 16 here, 4096 in the paper."""
    semantic = torch.ones(40, dtype=torch.long)
    semantic[:area] = 2
    segments, categories, scores = fuse(torch.zeros(0, 4, 10, dtype=torch.bool), torch.zeros(0), torch.zeros(0, dtype=torch.long),
                                        semantic.view(4, 10), ISTHING, stuff_area=16)
    assert categories.tolist() == kept and segments.count_nonzero() == area * len(kept) and scores.tolist() == [1.0] * len(kept)


def test_the_threshold_for_stuff_is_4096_pixels():
    """3.5: "4096 in our case": 63x65 = 4095 pixels are void, 64x64 are not."""
    nothing = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    for shape, n in (((63, 65), 0), ((64, 64), 1)):
        assert len(fuse(torch.zeros(0, *shape, dtype=torch.bool), *nothing, torch.zeros(shape, dtype=torch.long), ISTHING)[1]) == n


def test_only_what_the_instances_leave_counts_for_the_threshold():
    """3.5: "remaining unassigned pixels": 40 pixels of road, 10 of them under an instance: 30."""
    masks, scores, categories, semantic, isthing = two_instances(8)
    semantic[:2] = 2
    assert fuse(masks[:1], scores[:1], categories[:1], semantic, isthing, stuff_area=31)[1].tolist() == [1]
    assert fuse(masks[:1], scores[:1], categories[:1], semantic, isthing, stuff_area=30)[1].tolist() == [1, 2]


def test_a_thing_that_only_the_semantic_head_sees_becomes_void():
    """3.5: "or void if it belongs to thing"."""
    semantic = torch.tensor([[0, 0, 1, 3, 2, 2]])
    segments, categories, _ = fuse(torch.zeros(0, 1, 6, dtype=torch.bool), torch.zeros(0), torch.zeros(0, dtype=torch.long), semantic, ISTHING, stuff_area=0)
    assert segments.tolist() == [[1, 1, 0, 0, 2, 2]] and categories.tolist() == [0, 2]


# --- 3.1 Shared backbone --------------------------------------------------------------------------------------------------

def test_every_relu_is_a_leaky_relu_of_slope_one_hundredth():
    """3.1: iABN's LeakyReLU with slope 0.01 everywhere: body, heads."""
    kinds = [m for m in tiny_net().modules() if "ReLU" in type(m).__name__]
    assert len(kinds) > 20 and all(type(m) is nn.LeakyReLU and m.negative_slope == 0.01 for m in kinds)


def test_the_residual_blocks_use_the_leaky_relu():
    """3.1: what leaves a stage may be negative, which no ReLU's output is."""
    torch.manual_seed(0)
    x = torch.rand(1, 3, 64, 64)
    for stage in resnet_fpn("tiny", width=16).stages:
        x = stage(x)
        assert x.min() < 0


@pytest.mark.parametrize("extra", [0, 2])
def test_the_pyramid_has_strides_4_to_32_and_64_and_128_where_asked(extra):
    """3.1: sizes are rounded up: 97 x 131 pixels."""
    torch.manual_seed(0)
    body = resnet_fpn("tiny", width=16, extra=extra).eval()
    features = body(torch.rand(1, 3, 97, 131))
    assert list(features) == [4, 8, 16, 32, 64, 128][:4 + extra] == body.strides
    assert all(f.shape == (1, 16, math.ceil(97 / s), math.ceil(131 / s)) for s, f in features.items())


def test_the_extra_levels_are_every_second_pixel():
    """3.1: "akin to the original FPN", without parameters."""
    torch.manual_seed(0)
    features = resnet_fpn("tiny", width=16, extra=2).eval()(torch.rand(1, 3, 128, 160))
    assert torch.equal(features[64], features[32][..., ::2, ::2]) and torch.equal(features[128], features[64][..., ::2, ::2])


def test_the_pyramid_is_torchvisions_on_conv2_to_conv5():
    """3.1: "linked to the output of the modules conv2, conv3, conv4 and conv5" of a picture normalised as ImageNet's."""
    torch.manual_seed(0)
    body, image = resnet_fpn("tiny", width=16).eval(), torch.rand(2, 3, 64, 96)
    x = body.stages[0](torchvision.transforms.functional.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    c = {}
    for k in (1, 2, 3, 4):
        x = body.stages[k](x)
        c[f"conv{k + 1}"] = x.clone()
    assert [m.shape[1] for m in c.values()] == [32, 64, 128, 256]
    for got, slow in zip(body(image).values(), body.fpn(c).values(), strict=True):
        torch.testing.assert_close(got, slow)


def one_step(body):
    """A step of SGD that moves whatever can move."""
    optimiser = torch.optim.SGD([p for p in body.parameters() if p.requires_grad], lr=1.0)
    before = {k: v.clone() for k, v in body.state_dict().items()}
    body.train()
    sum(f.sum() + f.square().sum() for f in body(torch.rand(2, 3, 64, 64)).values()).backward()
    optimiser.step()
    return {k for k, v in body.state_dict().items() if not torch.equal(v, before[k])}, set(before)


def test_frozen_stages_and_norms_neither_learn_nor_drift():
    """3.1: frozen=2 is the stem and conv2, and every norm of the ResNet stays as ImageNet made it, statistics too; the convolutions
    of conv3 to conv5 and the whole pyramid learn."""
    torch.manual_seed(0)
    body = resnet_fpn("tiny", width=16, frozen=2, frozen_norm=True)
    norms = {f"stages.{name}" for name, m in body.stages.named_modules() if isinstance(m, nn.BatchNorm2d)}
    moved, everything = one_step(body)
    frozen = {k for k in everything if k.startswith(("stages.0", "stages.1.")) or k.rsplit(".", 1)[0] in norms}
    assert len(frozen) > 40 and moved == everything - frozen


def test_without_freezing_everything_learns():
    """5.1, the variant "no freeze": weights, norms and statistics all move."""
    torch.manual_seed(0)
    moved, everything = one_step(resnet_fpn("tiny", width=16))
    assert moved == everything


def test_frozen_stages_alone_leave_the_other_norms_learning():
    """3.1: frozen=1 is the stem only."""
    torch.manual_seed(0)
    moved, everything = one_step(resnet_fpn("tiny", width=16, frozen=1))
    assert everything - moved == {k for k in everything if k.startswith("stages.0")}


def test_frozen_norms_survive_the_conversion_to_synchronised_norms():
    """3.1: iABN^sync across GPUs comes from convert_sync_batchnorm; the frozen ones stay frozen, the others do not."""
    body = nn.SyncBatchNorm.convert_sync_batchnorm(resnet_fpn("tiny", width=16, frozen_norm=True)).train()
    for name, m in body.named_modules():
        if isinstance(m, nn.SyncBatchNorm):
            assert m.training == m.weight.requires_grad == name.startswith("fpn")
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in body.modules()) > 15


def test_evaluation_mode_is_left_and_entered_by_train():
    """3.1: freezing does not get in the way of train and eval."""
    body = resnet_fpn("tiny", width=16, frozen=1)
    assert not any(m.training for m in body.eval().modules())
    assert body.train() is body and body.training and body.stages[4].training and not any(m.training for m in body.stages[0].modules())


@pytest.mark.parametrize("name", ["resnet-50", "vgg16", "resnetty", ""])
def test_an_unknown_body_is_refused_in_one_sentence(name):
    """resnet_fpn raises ValueError and says what there is."""
    with pytest.raises(ValueError, match="unknown body.*tiny"):
        resnet_fpn(name)


def test_a_thin_body_has_no_imagenet_weights():
    """resnet_fpn raises ValueError rather than start from nothing in silence."""
    with pytest.raises(ValueError, match="no ImageNet weights"):
        resnet_fpn("small", weights="DEFAULT")


# --- The whole ------------------------------------------------------------------------------------------------------------

LOSSES = {"rph_score", "rph_box", "rsh_class", "rsh_box", "rsh_mask", "semantic"}


def check_gradients(net, losses):
    sum(losses.values()).backward()
    assert set(losses) == LOSSES and all(v.shape == () and v.isfinite() and v >= 0 for v in losses.values())
    missing = [n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
    assert not missing


def test_losses_are_the_six_of_the_two_branches():
    """3.4: scalars, positive on an ordinary picture, with a gradient for every parameter of the network."""
    net = tiny_net()
    losses = net.losses(torch.rand(2, 3, 64, 64), [street(), street()])
    check_gradients(net, losses)
    assert all(v > 0 for v in losses.values()) and all(p.grad.abs().max() > 0 for n, p in net.named_parameters() if n.endswith("out.weight"))


def nothing_to_learn():
    full = torch.ones(64, 64, dtype=torch.long)
    dot = full.clone()
    dot[30, 40], dot[63, 63] = 2, 3
    return {"all void": (make_target(0 * full, []), LOSSES),
            "crowd only": (make_target(full, [3], crowd=[1]), LOSSES),
            "no things": (make_target(full, [2]), {"rph_box", "rsh_box", "rsh_mask"}),
            "things of one pixel": (make_target(dot, [0, 1, 3]), set()),
            "one thing that fills the picture": (make_target(full, [1]), set())}


@pytest.mark.parametrize("case", nothing_to_learn())
def test_where_there_is_nothing_to_learn_losses_are_zero_with_gradients(case):
    """The vocabulary, Model: a batch of one; zero with gradients attached to every parameter, so that DDP never waits."""
    target, zero = nothing_to_learn()[case]
    net = tiny_net()
    losses = net.losses(torch.rand(1, 3, 64, 64), [target])
    check_gradients(net, losses)
    assert {k for k, v in losses.items() if v == 0} == zero


def test_a_picture_too_small_for_any_anchor_still_trains():
    """Degenerate: 12 pixels and a smallest anchor of 16: proposals are the ground truth alone."""
    net = tiny_net()
    s = torch.ones(12, 12, dtype=torch.long)
    s[2:9, 3:8] = 2
    losses = net.losses(torch.rand(2, 3, 12, 12), [make_target(s, [0, 1])] * 2)
    check_gradients(net, losses)
    assert losses["rph_score"] == 0 and losses["rsh_mask"] > 0


def test_a_box_loss_from_outside_is_called_by_both_heads():
    """The vocabulary, Box losses: (deltas, gt_boxes, anchors, beta, crop_size, truncated), one row each for the same object;
    crop_size is (height, width)."""
    recorder = Recorder()
    net = tiny_net(box_loss=recorder)
    t = street()
    t.segments = F.pad(t.segments, (0, 32))
    t.truncated = torch.tensor([[False] * 4] * 2 + [[True, False, False, False], [False, True, True, True], [True] * 4])
    cut = {tuple(b): c for b, c in zip(t.boxes.tolist(), t.truncated.tolist())}
    net.losses(torch.rand(2, 3, 64, 96), [t, t])
    assert [c.beta for c in recorder.calls] == [pytest.approx(1 / 9)] * 2 + [0.1]       # the first head calls once an image
    for c in recorder.calls:
        n = len(c.deltas)
        assert n > 0 and c.deltas.shape == c.gt.shape == c.anchors.shape == c.truncated.shape == (n, 4)
        assert c.deltas.requires_grad and not c.gt.requires_grad and not c.anchors.requires_grad
        assert tuple(c.crop_size) == (64, 96) and c.truncated.dtype == torch.bool
        assert [cut[tuple(g)] for g in c.gt.tolist()] == c.truncated.tolist()


def test_detect_gives_things_only_with_masks_of_28x28():
    """3.2, 3.5: boxes in the image, categories among the things, best score first; nothing but what the docstring promises."""
    net = tiny_net().eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        found = net.detect(net.body(images), (64, 96))
    assert len(found) == 2
    for f in found:
        d = len(f["scores"])
        assert 1 < d <= 20 and f["boxes"].shape == (d, 4) and f["masks"].shape == (d, 28, 28)
        assert set(f["categories"].tolist()) <= {1, 3} and inside(f["boxes"], (64, 96)).all()
        assert (f["scores"].diff() <= 0).all()


def test_detections_are_boxes_scores_categories_and_masks_and_no_more():
    """The vocabulary, Prediction: `instances` holds exactly these four."""
    net = tiny_net().eval()
    assert set(net.predict(torch.rand(3, 64, 64)).instances) == {"boxes", "scores", "categories", "masks"}


def test_detect_takes_the_same_path_in_training_and_at_test_time():
    """detect: with the norms held still, training and evaluation mode give the same detections, scores with gradient in both."""
    net = tiny_net(frozen_norm=True)
    images = torch.rand(1, 3, 64, 64)
    results = []
    for mode in (True, False):
        net.train(mode)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        results.append(net.detect(net.body(images), (64, 64))[0])
    a, b = results
    assert len(a["scores"]) > 0 and a["scores"].requires_grad and b["scores"].requires_grad
    assert all(torch.equal(a[k], b[k]) for k in ("boxes", "scores", "categories", "masks"))


def test_a_data_set_without_things_is_refused_in_one_sentence():
    """Seamless raises ValueError: the instance branch would have no class."""
    with pytest.raises(ValueError, match="no category is a thing"):
        Seamless([False, False], resnet_fpn("tiny", width=8))


def test_classes_and_categories_are_translated_both_ways():
    """The vocabulary: categories are contiguous over things and stuff; the region head counts things only."""
    net = tiny_net()
    assert net.things.tolist() == [1, 3] and net.thing_index[net.things].tolist() == [0, 1] and net.region_head.classes == 2
    found = {"boxes": torch.zeros(2, 4), "scores": torch.ones(2), "classes": torch.tensor([1, 0]), "masks": torch.zeros(2, 28, 28)}
    net.region_head.detect = lambda *_: [found]
    assert net.detect(net.body(torch.rand(1, 3, 64, 64)), (64, 64))[0]["categories"].tolist() == [3, 1]


def staged_net(stuff_area=4096):
    """A network whose heads say what we want: semantic logits at stride 4 and two detections with sure masks."""
    net = tiny_net(stuff_area=stuff_area).eval()
    logits = torch.full((1, 4, 16, 24), -5.)
    logits[0, 0, :8], logits[0, 2, 8:12], logits[0, 3, 12:] = 5, 5, 5        # sky half of the height, road a quarter, person a quarter
    net.semantic_head.forward = lambda features: logits
    found = {"boxes": torch.tensor([[8., 8., 24., 24.], [60., 40., 70., 60.]]), "scores": torch.tensor([0.9, 0.3]),
             "categories": torch.tensor([1, 3]), "masks": torch.full((2, 28, 28), 4.)}
    net.detect = lambda features, size: [dict(found)]
    return net


def test_predict_is_the_fusion_of_both_branches():
    """3.5: sky 1/2 of the picture less the car's 16x16 pixels, road 1/4, the semantic head's person is void."""
    p = staged_net().predict(torch.rand(3, 64, 96))
    expected = torch.zeros(64, 96, dtype=torch.long)
    expected[:32], expected[32:48], expected[8:24, 8:24] = 2, 3, 1
    assert torch.equal(p.segments, expected) and p.categories.tolist() == [1, 0, 2] and p.scores.tolist() == [pytest.approx(0.9), 1, 1]
    assert p.instances["scores"].tolist() == [pytest.approx(0.9), pytest.approx(0.3)]          # before fusion, the unsure one too
    assert p.instances["masks"].sum((1, 2)).tolist() == [16 * 16, 10 * 20]


def test_predict_at_another_size_scales_boxes_masks_and_logits():
    """predict: height 64 -> 128, width 96 -> 288; boxes are scaled by 3 and 2."""
    p = staged_net().predict(torch.rand(3, 64, 96), size=(128, 288))
    assert p.segments.shape == (128, 288) and p.instances["masks"].shape == (2, 128, 288)
    assert p.instances["boxes"].tolist() == [[24, 16, 72, 48], [180, 80, 210, 120]]
    expected = torch.zeros(128, 288, dtype=torch.long)
    expected[:64], expected[64:96], expected[16:48, 24:72] = 2, 3, 1
    assert torch.equal(p.segments, expected)


@pytest.mark.parametrize("size", [None, (128, 288)])
@pytest.mark.parametrize("stuff_area, kept", [(2 ** 19, [1, 0, 2]), (2 ** 19 + 400, [1, 0])])
def test_the_area_threshold_for_stuff_is_scaled_with_the_picture(stuff_area, kept, size):
    """3.5: 4096 pixels at 1024x2048.  Road has a quarter of the picture: 2^19 pixels there; one more is too much, at any size."""
    assert staged_net(stuff_area).predict(torch.rand(3, 64, 96), size).categories.tolist() == kept


def test_predict_fuses_with_the_networks_own_score_threshold():
    """3.5, Choice: the unsure person, 0.3, takes part if the threshold is 0.2; half of it lies over the road."""
    net = staged_net()
    net.score_threshold = 0.2
    assert net.predict(torch.rand(3, 64, 96)).categories.tolist() == [1, 3, 0, 2]


def test_predict_of_an_untrained_network_on_an_odd_sized_picture():
    """The vocabulary, Prediction: 97x131 pixels; segments 0..N, a category and a score for each, masks and boxes of the same size."""
    p = tiny_net().eval().predict(torch.rand(3, 97, 131))
    n = len(p.categories)
    assert p.segments.shape == (97, 131) and p.segments.dtype == torch.int64 and not p.scores.requires_grad
    assert set(p.segments.unique().tolist()) | {0} == set(range(n + 1)) and p.scores.shape == (n,)
    assert p.instances["masks"].dtype == torch.bool and p.instances["masks"].shape == (len(p.instances["boxes"]), 97, 131)


def test_a_prediction_without_any_detection_is_stuff_and_void():
    """3.5, degenerate: nothing above the score threshold of the region head."""
    net = tiny_net().eval()
    net.region_head.score_threshold = 1.0
    p = net.predict(torch.rand(3, 64, 64))
    assert len(p.instances["scores"]) == 0 and p.instances["masks"].shape == (0, 64, 64) and not ISTHING[p.categories].any()


def test_the_numbers_of_mask_rcnn_are_the_defaults():
    """5: "we take all the hyperparameters of the instance segmentation branch from [19]"."""
    p, r = RegionProposalHead(4, [4], 4), RegionSegmentationHead(4, [4], 2, box_channels=4, mask_channels=4)
    assert (p.samples, p.after, p.nms_threshold, p.anchor_scale, p.ratios) == (256, (2000, 1000), 0.7, 8, (0.5, 1, 2))
    assert (r.samples, r.score_threshold, r.nms_threshold, r.detections, r.canonical) == (512, 0.05, 0.5, 100, 224)


def test_the_numbers_given_to_the_network_reach_its_heads():
    """Seamless: samples is (anchors, proposals), after (training, testing)."""
    net = tiny_net(samples=(11, 13), after=(7, 5), detections=3, anchor_scale=2, ratios=(1,), score_threshold=0.4)
    p, r = net.proposal_head, net.region_head
    assert (p.samples, p.after, p.anchor_scale, p.ratios, r.samples, r.detections, net.score_threshold) == (11, (7, 5), 2, (1,), 13, 3, 0.4)


def test_the_canonical_size_reaches_the_region_head():
    """3.2: `canonical` reaches the level rule: a box of 32 is served by level 3 (stride 16) where 32 is canonical."""
    net = tiny_net(canonical=32)
    features = {s: torch.full((1, 16, 64 // s, 64 // s), float(s)) for s in (4, 8, 16, 32, 64)}
    assert net.region_head.pool(features, [torch.tensor([[8., 8., 40., 40.]])]).round().unique().tolist() == [16]


# --- Slower: real ResNets, the ledger, learning ---------------------------------------------------------------------------

def test_a_body_starts_from_a_state_dict_of_torchvisions_resnet():
    """5: "we initialize our backbone with weights extracted from PyTorch's ResNet despite using a different activation"."""
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    body = resnet_fpn("resnet18", width=8, weights=state)
    assert torch.equal(body.stages[0][0].weight, state["conv1.weight"]) and torch.equal(body.stages[4][1].conv2.weight, state["layer4.1.conv2.weight"])


def test_the_default_body_is_a_resnet_50_with_a_pyramid_of_256():
    """3.1: ResNet-50's stages give 256, 512, 1024, 2048 channels."""
    body = resnet_fpn()
    assert [m[0].in_channels for m in body.fpn.inner_blocks] == [256, 512, 1024, 2048] and body.channels == 256 and body.strides == [4, 8, 16, 32]


def test_the_region_head_learns():
    """3.4: on the same proposals, twenty steps of SGD lower the losses of class, box and mask."""
    head, features, proposals, targets = rsh_case()
    args = (features, proposals, targets, ISTHING, torch.tensor([0, 0, 0, 1]), (64, 64))
    optimiser = torch.optim.SGD(head.parameters(), 0.02, 0.9)
    history = []
    for _ in range(20):
        losses = head.losses(*args)
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()
        history.append(losses)
    assert len(history[0]) == 3 and all(history[-1][k] < 0.8 * history[0][k] for k in history[0])


def test_the_network_learns():
    """3.4: twenty steps of SGD on one picture lower every loss but the region head's box loss, whose positives are the ground
    truth alone at first (and those boxes need no correction)."""
    net = tiny_net(samples=(64, 64))
    g = torch.Generator().manual_seed(0)
    t = street()
    colours = torch.rand(6, 3, generator=g)
    image = (colours[t.segments].permute(2, 0, 1) + 0.05 * torch.randn(3, 64, 64, generator=g))[None].repeat(2, 1, 1, 1)
    optimiser = torch.optim.SGD(net.parameters(), 0.02, 0.9)
    history = []
    for _ in range(20):
        losses = net.losses(image, [t, t])
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()
        history.append({k: v.item() for k, v in losses.items()})
    first, last = ({k: sum(h[k] for h in three) for k in LOSSES - {"rsh_box"}} for three in (history[:3], history[-3:]))
    assert all(last[k] < 0.9 * first[k] for k in first), (first, last)


# The ledger of 5.4

@pytest.fixture(scope="module")
def cityscapes():
    """{part: (parameters, trainable, multiply-adds)} of the paper's Cityscapes model."""
    return seamless.ledger()


def conv_work(c_in, c_out, kernel, height, width):
    return c_in * c_out * kernel * kernel * height * width


def test_the_body_in_the_ledger_is_a_resnet_50(cityscapes):
    """5.4: torchvision's ResNet-50 without its last layer has 23,508,032 parameters and, at 224x224, 4.087 T/1000 multiply-adds
    (torchvision's own figure, 4.089 with the last layer); at 1024x2048 that is 41.8 times as much."""
    total, trainable, work = cityscapes["ResNet-50"]
    assert total == 25_557_032 - 2_049_000
    net = torchvision.models.resnet50()
    frozen = [p for n, p in net.named_parameters() if n.startswith(("conv1", "layer1")) or "bn" in n or "downsample.1" in n]
    assert trainable == total - sum(p.numel() for p in frozen)
    assert work == pytest.approx((4.089e9 - 2048 * 1000) * 1024 * 2048 / 224 ** 2, rel=1e-3)


def test_the_pyramid_in_the_ledger(cityscapes):
    """5.4: four 1x1 and four 3x3 convolutions with 256 outputs and their norms."""
    total, trainable, work = cityscapes["pyramid"]
    assert total == trainable == sum(c * 256 + 256 * 256 * 9 + 4 * 256 for c in (256, 512, 1024, 2048))
    assert work == sum(conv_work(c, 256, 1, 1024 // s, 2048 // s) + conv_work(256, 256, 3, 1024 // s, 2048 // s)
                       for c, s in zip((256, 512, 1024, 2048), (4, 8, 16, 32)))


def test_the_region_proposal_head_in_the_ledger(cityscapes):
    """5.4: a 3x3 of stride 2 and a 1x1 with 15 outputs on strides 4 to 64."""
    total, _, work = cityscapes["region proposal head"]
    assert total == 256 * 256 * 9 + 2 * 256 + 256 * 15 + 15
    assert work == sum(conv_work(256, 256, 3, 512 // s, 1024 // s) + conv_work(256, 15, 1, 512 // s, 1024 // s) for s in (4, 8, 16, 32, 64))


def test_the_region_head_in_the_ledger(cityscapes):
    """5.4: 100 objects pass through two fully connected layers (and 5 x 8 + 1 outputs), and through the mask branch; a deconvolution
    makes one product for each of its INPUTS and weights."""
    total, _, work = cityscapes["region head, boxes"]
    assert total == 256 * 49 * 1024 + 1024 * 1024 + 2 * 2 * 1024 + 1024 * 41 + 41 and work == 100 * (256 * 49 * 1024 + 1024 * 1024 + 1024 * 41)
    total, _, work = cityscapes["region head, masks"]
    assert total == 4 * 256 * 256 * 9 + 256 * 256 * 4 + 5 * 2 * 256 + 256 * 8 + 8
    assert work == 100 * (4 * conv_work(256, 256, 3, 14, 14) + conv_work(256, 256, 2, 14, 14) + conv_work(256, 8, 1, 28, 28))


def test_the_semantic_head_in_the_ledger(cityscapes):
    """5.4: four MiniDL with 128 channels and a 1x1 to 19 categories at stride 4."""
    total, _, work = cityscapes["semantic head"]
    mini = 256 * 128 * (9 + 9 + 1) + 384 * 128 * 9
    assert total == 4 * (mini + 4 * 2 * 128) + 512 * 19 + 19
    assert work == sum(mini * (1024 // s) * (2048 // s) for s in (4, 8, 16, 32)) + conv_work(512, 19, 1, 256, 512)


def test_the_ledger_is_within_8_percent_of_51_43_million_parameters(cityscapes):
    """5.4: trainable parameters of the one network."""
    assert sum(row[1] for row in cityscapes.values()) == pytest.approx(51.43e6, rel=0.08)


def test_the_ledger_is_within_10_percent_of_0_514_tera_multiply_adds(cityscapes):
    """5.4: one picture of 1024x2048."""
    assert sum(row[2] for row in cityscapes.values()) == pytest.approx(0.514e12, rel=0.10)


def test_a_second_network_repeats_body_and_pyramid(monkeypatch, capsys):
    """5.4: "two networks" have ResNet and pyramid twice, everything else once."""
    rows = {"ResNet-50": (0, 10e6, 1e11), "pyramid": (0, 4e6, 2e11), "semantic head": (0, 3e6, 4e11)}
    monkeypatch.setattr(seamless, "ledger", lambda: rows)
    seamless.print_ledger()
    lines = capsys.readouterr().out.splitlines()
    one, two = (next(line for line in lines if line.strip().startswith(words)) for words in ("one network", "two networks"))
    assert "17.00 M" in one and "0.700 T" in one and "31.00 M" in two and "1.000 T" in two


GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_bf16_gives_the_losses_of_float32_to_two_digits(device):
    """5 (mixed precision): boxes, running sums, norms and losses stay float32 under autocast; the sampling is the same."""
    got, images = [], torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    t = SimpleNamespace(**{k: v.to(device) for k, v in vars(street()).items()})
    for bf16 in (False, True):
        net = tiny_net(samples=(999, 999), extra=0).to(device)
        net.proposal_head.after = (0, 0)                                     # the region head learns the ground truth alone
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            got.append(net.losses(images, [t, t]))
            p = net.eval().predict(images[0, :, :49, :57])
        check_gradients(net, got[-1])
        assert p.segments.shape == (49, 57)
    full, half = got
    assert all(v.dtype == torch.float32 and v.item() == pytest.approx(full[k].item(), rel=0.02, abs=1e-3) for k, v in half.items())
