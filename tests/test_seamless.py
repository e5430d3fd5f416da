"""The spec of seamless.py: the claims of "Seamless Scene Segmentation" (Porzi et al., CVPR 2019).
The oracles are loops over pixels and boxes, closed cases, torchvision's operators."""
import itertools
import math
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.transforms.functional import normalize

import seamless
from claims import claim
from data import IGNORE, Target, mask_boxes
from lab import changes, ledger
from seamless import (GroupNorm, MiniDL, RegionProposalHead, RegionSegmentationHead, Seamless,
                      SemanticHead, at_size, fuse, hardest_pixels_loss, mask_targets, resnet_fpn,
                      sample, smooth_l1_box_loss, window_mean)

CODER = BoxCoder((1.0, 1.0, 1.0, 1.0))                         # the deltas of section 3.2
ISTHING = torch.tensor([False, True, False, True])             # sky, car, road, person
EVERYTHING = dict(high=0.7, low=0.3, count=999, share=0.5)     # to sample
LOSSES = {"rph_score", "rph_box", "rsh_class", "rsh_box", "rsh_mask", "semantic"}


def close(a, b, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def rand(*shape, seed=0, draw=torch.rand):
    return draw(*shape, generator=torch.Generator().manual_seed(seed))


randn = partial(rand, draw=torch.randn)


def random_boxes(n, width, height, seed=0, smallest=2.0):
    r, extent = rand(n, 4, seed=seed), torch.tensor([width, height])
    size = smallest + r[:, :2] * (extent / 2 - smallest)
    corner = r[:, 2:] * (extent - size)
    return torch.cat([corner, corner + size], 1)


def make_target(segments, categories, crowd=()):
    n, boxes = len(categories), mask_boxes(segments, len(categories))
    flags = torch.tensor([k in crowd for k in range(1, n + 1)], dtype=torch.bool)
    return Target(segments, torch.tensor(categories, dtype=torch.long), flags, boxes, boxes.clone(),
                  torch.zeros(n, 4, dtype=torch.bool))


FULL = torch.ones(64, 64, dtype=torch.long)


def street():
    """Segments 1 sky, 2 road, 3 car, 4 person, 5 a crowd of persons; a strip of void."""
    s = FULL.clone()
    s[32:], s[24:48, 4:30], s[10:58, 40:56], s[2:14, 2:20], s[-3:] = 2, 3, 4, 5, 0
    return make_target(s, [0, 2, 1, 3, 3], crowd=[5])


def iou_of(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0) * max(h, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def greedy_nms(boxes, scores, groups, threshold):
    """Best first; a box goes if it overlaps a kept one of its group."""
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(groups[i] != groups[j] or iou_of(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


def clip_box(box, size):
    return [min(max(v, 0), size[1 - i % 2]) for i, v in enumerate(box)]


def slow_box_loss(delta, gt, anchor, beta):
    """Mask R-CNN's smooth L1 of four deltas, term by term."""
    truth = CODER.encode_single(torch.tensor([gt]), torch.tensor([anchor]))[0].tolist()
    sizes = [abs(d - t) for d, t in zip(delta, truth)]
    return sum(z * z / (2 * beta) if z <= beta else z - beta / 2 for z in sizes)


def slow_sample(boxes, target, high, low, rescue=False):
    """For each box "+" positive, "-" negative or "." neither, and the thing of its highest IoU."""
    things = [k for k, c in enumerate(target.categories) if ISTHING[c] and not target.crowd[k]]
    rows = [[iou_of(b, target.boxes[k].tolist()) for k in things] for b in boxes.tolist()]
    tops, roles = [max(column) for column in zip(*rows)], []
    for box, ious in zip(boxes.tolist(), rows):
        x1, y1, x2, y2 = (int(v) for v in clip_box(box, (64, 64)))
        void = [k == 0 or bool(target.crowd[k - 1])
                for row in target.segments[y1:y2, x1:x2].tolist() for k in row]
        positive = max(ious) >= high or (rescue and any(i == t for i, t in zip(ious, tops)))
        negative = max(ious) < low and sum(void) <= 0.7 * len(void)
        role = "+" if positive else "-" if negative else "."
        roles.append((role, things[ious.index(max(ious))]))
    return roles


# --- 3.5 Fusion -------------------------------------------------------------------------------
def slow_fuse(masks, scores, categories, semantic, isthing, stuff_area):
    """3.5 pixel by pixel: {pixel: segment}, categories, scores."""
    segments, kept, pixels = {}, [], list(itertools.product(range(10), range(12)))
    for d in sorted(range(len(masks)), key=lambda d: -scores[d]):
        mask = [p for p in pixels if masks[d][p[0]][p[1]]]
        free = [p for p in mask if p not in segments]
        if scores[d] >= 0.5 and mask and len(free) / len(mask) >= 0.5:
            kept.append((categories[d], scores[d]))
            segments.update({p: len(kept) for p in free})
    rest = [p for p in pixels if p not in segments]
    for c in range(len(isthing)):
        stuff = [p for p in rest if semantic[p[0]][p[1]] == c]
        if not isthing[c] and stuff and len(stuff) >= stuff_area:
            kept.append((c, 1.0))
            segments.update({p: len(kept) for p in stuff})
    return [segments.get(p, 0) for p in pixels], [c for c, _ in kept], [s for _, s in kept]


@claim("porzi2019", "3.5", "fusion equals the algorithm of the text, pixel by pixel", of="fuse")
@pytest.mark.parametrize("detections", [0, 1, 6])
def test_fusion_equals_the_pixel_by_pixel_algorithm(detections):
    """Random cases with equal scores, empty masks, identical masks; no stuff area and a large."""
    assert seamless.example().tolist() == [[1, 1, 2, 0, 3, 3, 0]]
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        masks = torch.zeros(detections, 10, 12, dtype=torch.bool)
        for m in masks:
            x1, y1, w, h = (int(torch.randint(0, k, (), generator=g)) for k in (9, 8, 8, 7))
            m[y1:y1 + h, x1:x1 + w] = True                     # h or w of 0: an empty mask
        if detections > 3:
            masks[3] = masks[0]
        scores = torch.randint(3, 8, (detections,), generator=g) / 8    # exact, with ties
        categories = torch.tensor([1, 3])[torch.randint(0, 2, (detections,), generator=g)]
        semantic = torch.randint(0, 4, (10, 12), generator=g)
        area = 20 * (seed % 2)
        found = fuse(masks, scores, categories, semantic, ISTHING, stuff_area=area)
        slow = slow_fuse(masks.tolist(), scores.tolist(), categories.tolist(), semantic.tolist(),
                         ISTHING.tolist(), area)
        assert tuple(t.flatten().tolist() for t in found) == slow


@claim("porzi2019", "3.5", "half of an instance must be free", of="fuse")
def test_half_of_an_instance_must_be_free_its_score_0_5_and_stuff_4096_pixels():
    """Instance 0 scores higher and has 10 pixels. Instance 1 has 8, `free` of them not of 0."""
    road = torch.full((4, 20), 2)
    for free, kept in ((3, 1), (4, 2), (5, 2), (0, 1), (8, 2)):
        masks = torch.zeros(2, 4, 20, dtype=torch.bool)
        masks[0, 0, :10] = masks[1, 0, 2 + free:10 + free] = True
        rest = torch.tensor([1, 3]), road, ISTHING
        segments, categories, _ = fuse(masks, torch.tensor([0.9, 0.8]), *rest, stuff_area=99)
        assert segments.flatten().bincount(minlength=3)[1:].tolist() == [10, free * (kept == 2)]
    assert fuse(masks, torch.tensor([0.49, 0.5]), *rest)[1].tolist() == [3]
    for shape, n in (((63, 65), 0), ((64, 64), 1)):            # 4095 and 4096 pixels
        masks, none = torch.zeros(0, *shape, dtype=torch.bool), torch.zeros(0)
        assert len(fuse(masks, none, none.long(), torch.full(shape, 2), ISTHING)[1]) == n


# --- 3.3, 3.4 Semantic branch -----------------------------------------------------------------
def slow_hardest(logits, target, fraction):
    total = 0
    for l, t in zip(logits.log_softmax(1).tolist(), target.tolist()):
        costs = sorted(-l[c][i][j] for i, row in enumerate(t) for j, c in enumerate(row) if c >= 0)
        n = math.ceil(fraction * len(costs))
        total += sum(costs[-n:]) / n if n else 0
    return total / len(logits)


@claim("porzi2019", "3.4", "L_ss: the 25% of lowest probability", of="hardest_pixels_loss")
@pytest.mark.parametrize("void", [0.0, 0.3, 0.9, 0.98, 1.0])
def test_the_hardest_quarter_of_the_known_pixels_is_learnt(void):
    """At 0.98 one or two pixels are known; at 1 none: 0 with gradients."""
    logits, target = (2 * randn(3, 5, 7, 9)).requires_grad_(), torch.randint(0, 5, (3, 7, 9))
    target[rand(3, 7, 9) < void] = IGNORE
    for fraction in (0.25, 1.0):
        loss = hardest_pixels_loss(logits, target, fraction)
        assert loss.item() == pytest.approx(slow_hardest(logits, target, fraction), rel=1e-4)
    hardest_pixels_loss(logits, target).backward()
    learnt, known = logits.grad.abs().sum(1) > 0, target != IGNORE
    assert learnt.sum((1, 2)).tolist() == [math.ceil(n / 4) for n in known.sum((1, 2)).tolist()]


@pytest.mark.parametrize("window, rows", [(1, 11), (2, 11), (5, 11), (8, 11), (9, 4), (64, 6)])
def test_the_fast_window_mean_equals_the_plain_one(window, rows):
    """avg_pool2d and replication, as in the docstring, and its gradient. A map of fewer rows or
    columns than the window is pooled over all of them."""
    x, weight = randn(2, 3, rows, 17).double().requires_grad_(), randn(2, 3, rows, 17, seed=1)
    size = [min(window, n) for n in (rows, 17)]
    pad = [(size[1] - 1) // 2, size[1] // 2, (size[0] - 1) // 2, size[0] // 2]
    slow, fast = F.pad(F.avg_pool2d(x, size, 1), pad, mode="replicate"), window_mean(x, window)
    close(fast.double(), slow)
    close(*(torch.autograd.grad((m * weight).sum(), x)[0] for m in (fast, slow)))
    x = (rand(1, 1, rows, 600) + 3).bfloat16()                 # running sums need float32
    assert window_mean(x, window).dtype == torch.bfloat16
    close(window_mean(x, window).float(), window_mean(x.float(), window), rtol=2 ** -8)


def by_hand(m, x, pooled):
    """Figure 2 by functional operators with the weights of m."""
    def layer(block, x, **kw):
        return F.leaky_relu(block[1](F.conv2d(x, block[0].weight, **kw)), 0.01)
    near, far = layer(m.near, x, padding=1), layer(m.far, x, padding=6, dilation=6)
    return layer(m.out, torch.cat([near, far, layer(m.context, pooled)], 1), padding=1)


@claim("porzi2019", "3.3", "with a window as large as the map, global pooling", of="MiniDL")
@claim("porzi2019", "3.3", "translation equivariant", of="MiniDL", figure="seamless.png")
def test_minidl_generalises_global_pooling_and_is_translation_equivariant():
    """Away from borders and in surroundings that differ; with global pooling it is not."""
    m, x = MiniDL(3, 4, 4).eval(), randn(2, 3, 15, 18)
    close(m(x), by_hand(m, x, F.pad(F.avg_pool2d(x, 4, 1), (1, 2, 1, 2), mode="replicate")))
    m = MiniDL(3, 4, 18).eval()
    close(m(x), by_hand(m, x, x.mean((2, 3), keepdim=True).expand_as(x)))
    x = randn(1, 3, 48, 56)
    x[..., 30:] += 9
    for window, equal in ((8, True), (10 ** 6, False)):
        m = MiniDL(3, 4, window).eval()                        # the same pixels in two crops
        a, b = m(x[..., :40, :40])[..., 11:31, 24:32], m(x[..., 3:43, 16:56])[..., 8:28, 8:16]
        assert ((a - b).abs().max() < 1e-3 * a.std()) == equal


def test_the_semantic_head_is_four_unshared_minidl_at_stride_4():
    head = SemanticHead(3, 5, channels=4, window=8).eval()
    features = {s: randn(2, 3, -(-97 // s), -(-131 // s)) for s in (4, 8, 16, 32, 64)}
    maps = [F.interpolate(head.heads[i](features[s]), size=(25, 33), mode="bilinear")
            for i, s in enumerate((4, 8, 16, 32))]
    close(head(features), F.conv2d(torch.cat(maps, 1), head.out.weight, head.out.bias))


# --- 3.2 Boxes to learn from ------------------------------------------------------------------
def test_the_box_loss_is_smooth_l1_summed_over_the_four_deltas():
    anchors, gt = random_boxes(40, 100, 100, 7), random_boxes(40, 100, 100, 8)
    deltas, cut = CODER.encode_single(gt, anchors) + 0.3 * randn(40, 4), torch.ones(40, 4) > 0
    for beta in (1 / 9, 0.5):
        rows = zip(deltas.tolist(), gt.tolist(), anchors.tolist())
        slow = torch.tensor([slow_box_loss(*row, beta) for row in rows])
        close(smooth_l1_box_loss(deltas, gt, anchors, beta, (50, 50), cut), slow, atol=1e-4)


def anchor_cases():
    """Around `street`'s car [4, 24, 30, 48], person [40, 10, 56, 58] and crowd [2, 2, 20, 14]."""
    return torch.tensor([
        [4., 24., 30., 46.], [4., 24., 30., 43.],              # IoU .92, .79 with the car: +
        [4., 24., 30., 36.], [4., 24., 30., 32.],              # .50, .33: neither
        [4., 24., 30., 30.],                                   # .25: -
        [40., 10., 56., 34.], [40., 10., 56., 33.],            # .50 the best of the person: +; .48
        [2., 2., 20., 14.], [2., 2., 20., 17.],                # all crowd, .80 crowd: neither
        [2., 2., 20., 20.], [20., 0., 38., 16.],               # .67 crowd, sky: -
        [0., 61., 20., 64.],                                   # void: neither
        [34., 46., 50., 62.]])                                 # touches the person, some void: -


def test_sample_equals_a_loop_over_boxes():
    """Those above; random ones with whole coordinates, some beyond the border, in random void."""
    for seed in range(4):
        target, more = street(), torch.tensor([[60., 60., 70., 70.]])
        boxes = torch.cat([anchor_cases(), target.boxes[2:4] + 2, more, target.boxes[2:4]])
        if seed:
            target.segments[rand(64, 64, seed=seed) < 0.55] = 0
            boxes = torch.cat([random_boxes(150, 64, 64, seed, smallest=4).round(), boxes])
        for rescue in (True, False):
            roles = slow_sample(boxes, target, 0.7, 0.3, rescue)
            yes, no, truth = sample(boxes, target, ISTHING, **EVERYTHING, rescue=rescue)
            assert yes.tolist() == [n for n, (role, _) in enumerate(roles) if role == "+"]
            assert no.tolist() == [n for n, (role, _) in enumerate(roles) if role == "-"]
            assert (truth[0] - 1).tolist() == [roles[n][1] for n in yes.tolist()]


@pytest.mark.parametrize("positives, negatives, share, drawn", [
    (50, 50, 0.5, (10, 10)), (50, 50, 0.25, (5, 15)), (3, 50, 0.5, (3, 17)), (50, 4, 0.5, (10, 4)),
    (0, 50, 0.5, (0, 20)), (50, 0, 0.25, (5, 0)), (0, 0, 0.5, (0, 0)), (5, 15, 0.25, (5, 15))])
def test_sample_draws_20_boxes_at_most_a_share_of_them_positive(positives, negatives, share, drawn):
    """Negatives replace missing positives, not the other way round. No thing: all are negative."""
    segments = FULL[:40, :40].index_fill(0, torch.arange(9), 2)
    target = make_target(segments, [2, 1] if positives else [2, 2])
    boxes, results = torch.tensor([[0., 0., 40., 9.], [9., 20., 18., 29.]]), []
    boxes = boxes.repeat_interleave(torch.tensor([positives, negatives]), 0)
    for _ in range(2):
        yes, no, truth = sample(boxes, target, ISTHING, high=0.7, low=0.3, count=20, share=share,
                                rescue=True)
        results.append(yes.tolist() + no.tolist())
        assert (len(yes), len(no)) == drawn and len(set(results[-1])) == sum(drawn)
        assert (yes < positives).all() and (no >= positives).all() and len(truth[0]) == len(yes)
    assert (results[0] != results[1]) == (positives > drawn[0] or negatives > drawn[1])     # random


# --- 3.2 Region proposal head -----------------------------------------------------------------
def proposal_head(strides=(4, 8, 16), c=3, **settings):
    torch.manual_seed(0)
    body = SimpleNamespace(channels=c, strides=strides)
    head = RegionProposalHead(ISTHING, body, **{"anchor_scale": 4, **settings}).eval()
    nn.init.normal_(head.out.weight, std=0.5)
    return head, {s: randn(2, c, -(-90 // s), -(-130 // s), seed=s) for s in strides}


@claim("porzi2019", "3.2", "anchors are inside of the image", of="RegionProposalHead")
def test_the_proposal_head_gives_each_anchor_its_five_channels():
    """3x3 stride 2, norm, activation, 1x1: loop over levels, cells, anchors. Anchors are centred
    on ((2j + .5) s, (2i + .5) s) and not beyond the border."""
    head, features = proposal_head()
    for statistic in (head.norm.running_mean, head.norm.running_var):
        nn.init.uniform_(statistic, 0.5, 2)
    scores, deltas, anchors, level = head(features, (90, 130))
    rows = []
    for k, s in enumerate((4, 8, 16)):
        y = F.conv2d(features[s], head.conv.weight, stride=2, padding=1)
        y = head.out(F.leaky_relu(head.norm(y), 0.01))
        for i, j, (n, r) in itertools.product(range(y.shape[2]), range(y.shape[3]),
                                              enumerate((0.5, 1, 2))):
            w, h, u, v = 2 * s / r ** 0.5, 2 * s * r ** 0.5, (2 * j + .5) * s, (2 * i + .5) * s
            box = [u - w, v - h, u + w, v + h]
            if box[0] >= 0 and box[1] >= 0 and box[2] <= 130 and box[3] <= 90:
                rows.append((y[:, 5 * n:5 * n + 5, i, j], box, k))
    five = torch.stack([r[0] for r in rows], 1)
    close(torch.cat([deltas, scores[..., None]], -1), five)
    close(anchors, torch.tensor([r[1] for r in rows]))
    assert level.tolist() == [r[2] for r in rows]
    row = torch.cat([F.conv2d(features[s], head.conv.weight, stride=2, padding=1).flatten(2)
                     for s in (4, 8, 16)], 2)                  # in training the levels share a norm
    head.norm.momentum = 1.0
    head.train()(features, (90, 130))
    close(head.norm.running_mean, row.mean((0, 2)))


def test_proposals_are_the_best_of_each_level_after_nms():
    """Anchors moved by deltas, clipped, NMS in each level; twice as many in training. Loops."""
    anchors, level = random_boxes(90, 100, 80, 16, smallest=20), torch.arange(90) % 3
    scores, deltas = randn(2, 90), 0.4 * randn(2, 90, 4)
    head = proposal_head(proposals=25)[0]
    head.nms_threshold = 0.4
    for training, after in ((False, 25), (True, 50)):
        found = head.train(training).propose((scores, deltas, anchors, level), (80, 100))
        for b in range(2):
            moved = CODER.decode_single(deltas[b], anchors).tolist()
            boxes = [clip_box(box, (80, 100)) for box in moved]
            chosen = [n for n, b in enumerate(boxes) if b[2] - b[0] >= 1 <= b[3] - b[1]]
            kept = greedy_nms(*([t[n] for n in chosen] for t in (boxes, scores[b], level)), 0.4)
            assert 25 < len(kept) < len(chosen) - 10
            close(found[b], torch.tensor([boxes[chosen[i]] for i in kept[:after]]), atol=1e-3)


def test_six_times_as_many_anchors_enter_and_a_proposal_has_a_pixel_a_side():
    """12 equal boxes leave no room for one of another level, 11 do. A tiny image: no loss."""
    head, _ = proposal_head((4,), proposals=1)
    equal, apart = torch.tensor([[90., 90., 99., 99.]]), torch.tensor([[0., 0., 5., 5.]])
    thin = torch.tensor([[0., 0., 20., 0.5], [30., 0., 30.5, 20.], [0., 30., 1., 50.]])
    for anchors, kept in ((torch.cat([equal.repeat(12, 1), apart]), equal), (thin, thin[2:]),
                          (torch.cat([equal.repeat(11, 1), apart]), torch.cat([equal, apart]))):
        n = len(anchors)
        level = torch.arange(n) // 12
        guesses = torch.linspace(1, 0, n)[None], torch.zeros(1, n, 4), anchors, level
        assert torch.equal(head.train().propose(guesses, (99, 99))[0], kept)
    guesses = head.eval()({4: randn(1, 3, 2, 2)}, (8, 8))
    assert head.propose(guesses, (8, 8))[0].shape == (0, 4)
    losses = head.losses(guesses, [make_target(FULL[:8, :8], [1])], (8, 8))
    assert all(v == 0 and v.requires_grad for v in losses.values())


def test_the_proposal_losses_equal_the_sum_over_anchors():
    """One binary cross entropy an anchor, over 256 an image (40 here); the mean box loss of all
    positives of the batch, here from an IoU of 0.5."""
    anchors, t, loss = anchor_cases(), street(), Mock(wraps=smooth_l1_box_loss)
    t.truncated[3] = torch.tensor([True, False, False, True])
    images = [t, make_target(t.segments.clamp(max=3), [0, 2, 1])]
    scores, deltas = 2 * randn(2, 13), 0.3 * randn(2, 13, 4, seed=1)
    head = proposal_head(box_loss=loss)[0]
    head.samples, head.positive, score, box = 40, 0.5, 0, []
    got = head.losses((scores, deltas, anchors, None), images, (64, 64))
    for b, t in enumerate(images):
        for n, (role, k) in enumerate(slow_sample(anchors, t, 0.5, 0.3, True)):
            s, a = scores[b, n].item(), anchors[n].tolist()
            score += {"+": math.log1p(math.exp(-s)), "-": math.log1p(math.exp(s)), ".": 0}[role]
            if role == "+":
                box.append(slow_box_loss(deltas[b, n].tolist(), t.boxes[k].tolist(), a, 1 / 9))
    assert got["rph_score"].item() == pytest.approx(score / 80, rel=1e-4)
    assert got["rph_box"].item() == pytest.approx(sum(box) / len(box), rel=1e-4)
    given = loss.call_args_list[0].kwargs
    assert given["crop_size"] == (64, 64) and [1, 0, 0, 1] in given["truncated"].tolist()
    head.samples = RegionProposalHead.samples                  # of 300 and 300 it takes 128 each
    segments = FULL.index_fill(0, torch.arange(20), 2)
    boxes = torch.tensor([[0., 0., 64., 20.], [10., 30., 40., 60.]]).repeat_interleave(300, 0)
    guesses = torch.full((1, 600), 50.0), torch.zeros(1, 600, 4), boxes, None
    got = head.losses(guesses, [make_target(segments, [2, 1])], (64, 64))
    assert got["rph_score"].item() == pytest.approx(25) and len(loss.call_args.args[0]) == 128


# --- 3.2 Region segmentation head -------------------------------------------------------------
def region_head(things=2, channels=4, **settings):
    """A region head on random features, its scores and corrections loud enough to differ."""
    torch.manual_seed(0)
    isthing = torch.tensor([False, True, False] + [True] * (things - 1))
    body = SimpleNamespace(channels=channels, strides=[4, 8, 16, 32, 64])
    head = RegionSegmentationHead(isthing, body, **{"canonical": 32, **settings})
    nn.init.normal_(head.out.weight, std=0.7)
    return head, {s: randn(2, channels, 64 // s, 96 // s, seed=s) for s in (4, 8, 16, 32)}


@claim("porzi2019", "3.2", "a box is pooled from level k", of="RegionSegmentationHead.pool")
def test_the_region_head_pools_each_box_from_the_level_of_its_size():
    """One box after the other; image and order are kept; an image without boxes."""
    head, features = region_head()
    boxes = [torch.zeros(0, 4), torch.tensor([[0., 0., 60., 60.], [3., 5., 12., 9.],
             [10., 10., 40., 40.], [0., 0., 96., 64.], [20., 9., 37., 25.]])]
    slow = []
    for b in boxes[1]:
        w, h = (b[2:] - b[:2]).tolist()
        s = 2 ** (1 + max(1, min(4, math.floor(3 + math.log2(math.sqrt(w * h) / 32)))))
        slow.append(torchvision.ops.roi_align(features[s][1:], [b[None]], 14, 1 / s, 1, True))
    close(head.pool(features, boxes), torch.cat(slow))
    ramp = ((torch.arange(64.) + 0.5) * 4).expand(1, 1, 64, 64)    # tells its own x
    head, box = region_head(1, 1, canonical=999)[0], torch.tensor([[20., 40., 76., 96.]])
    pooled = head.pool(dict.fromkeys((4, 8, 16, 32), ramp), [box])[0, 0]
    close(pooled, (20 + (torch.arange(14.) + 0.5) * 4).expand(14, 14))


def test_classify_gives_scores_with_void_first_and_a_correction_for_each_thing():
    """5 N + 1 outputs; corrections in Mask R-CNN's units. Two fully connected layers by hand."""
    head, _ = region_head(3)
    pooled = randn(5, 4, 14, 14)
    x = pooled.view(5, 4, 7, 2, 7, 2).mean((3, 5)).flatten(1)
    linear, norm = ([m for m in head.fc if isinstance(m, k)] for k in (nn.Linear, nn.GroupNorm))
    for layer, gn in zip(linear, norm):
        x = F.leaky_relu(gn(x @ layer.weight.T), 0.01)
    y = x @ head.out.weight.T + head.out.bias
    logits, deltas = head.classify(pooled)
    close(logits, y[:, :4])
    close(deltas, y[:, 4:].reshape(5, 3, 4) / torch.tensor([10., 10., 5., 5.]))
    x = pooled                                                 # the mask branch by hand
    for block in head.mask[:4]:
        x = F.leaky_relu(block[1](F.conv2d(x, block[0].weight, padding=1)), 0.01)
    x = F.leaky_relu(head.mask[5](F.conv_transpose2d(x, head.mask[4].weight, stride=2)), 0.01)
    close(head.mask(pooled), F.conv2d(x, head.mask[7].weight, head.mask[7].bias))
    for channels, groups in ((1024, 32), (128, 32), (64, 16), (50, 2), (16, 4), (4, 1), (3, 1)):
        assert GroupNorm(channels).num_groups == groups


def test_mask_targets_read_the_label_map_at_the_centres_of_the_cells():
    """Loops; boxes of one pixel, larger than the map, beyond the border."""
    segments, number = torch.randint(0, 4, (40, 60)), torch.randint(1, 4, (10,))
    boxes = torch.cat([random_boxes(6, 60, 40), torch.tensor([
        [3., 4., 4., 5.], [0., 0., 60., 40.], [50., 30., 70., 50.], [-8., -6., 20., 20.]])])
    got = mask_targets(segments, number, boxes, 9)
    for p, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        for i, j in itertools.product(range(9), range(9)):
            y, x = y1 + (i + 0.5) / 9 * (y2 - y1), x1 + (j + 0.5) / 9 * (x2 - x1)
            y, x = min(max(int(y), 0), 39), min(max(int(x), 0), 59)
            assert got[p, i, j] == float(segments[y, x] == number[p])


@claim("porzi2019", "3.4", "losses of Mask R-CNN", of="RegionSegmentationHead.losses")
def test_the_region_losses_equal_the_sum_over_proposals():
    """Cross entropy over void and things, 10 box losses with beta = 0.1, mask cross entropy of the
    true thing; true boxes are among the proposals. One proposal at a time; void and crowd."""
    head, features = region_head(rois=200)
    features, t = {s: f[..., :64 // s].requires_grad_() for s, f in features.items()}, street()
    other = make_target(torch.where(t.segments == 4, 2, t.segments.clamp(max=3)), [0, 2, 3])
    proposals, targets = [anchor_cases(), anchor_cases()[3:9]], [t, other]
    got = head.losses(features, proposals, targets, (64, 64))
    classes = boxes = masks = count = positives = 0
    for b, t in enumerate(targets):
        every = torch.cat([proposals[b], t.boxes[2:4 - b]])
        for p, (role, k) in zip(every.tolist(), slow_sample(every, t, 0.5, 0.5)):
            if role == ".":
                continue
            pooled = head.pool({s: f[b:b + 1] for s, f in features.items()}, [torch.tensor([p])])
            logits, deltas = head.classify(pooled)
            thing, count = {1: 0, 3: 1}[t.categories[k].item()], count + 1
            classes -= logits[0].log_softmax(0)[thing + 1 if role == "+" else 0].item()
            if role == "+":
                positives += 1
                boxes += slow_box_loss(deltas[0, thing].tolist(), t.boxes[k].tolist(), p, 0.1)
                mask = head.mask(pooled)[0, thing].sigmoid()
                truth = mask_targets(t.segments, torch.tensor([k + 1]), torch.tensor([p]))[0] > 0
                masks -= torch.where(truth, mask, 1 - mask).log().sum().item()
    assert 4 < positives < count - 4
    assert got["rsh_class"].item() == pytest.approx(classes / count, rel=1e-4)
    assert got["rsh_box"].item() == pytest.approx(10 * boxes / count, rel=1e-3)
    assert got["rsh_mask"].item() == pytest.approx(masks / (positives * 28 * 28), rel=1e-3)
    for loss in got.values():                                  # each teaches the features
        grads = torch.autograd.grad(loss, list(features.values()), retain_graph=True)
        assert sum(g.abs().sum() for g in grads) > 0


def test_the_region_head_learns_from_512_proposals_a_quarter_of_them_positive():
    loss, shapes = Mock(wraps=smooth_l1_box_loss), []
    head, features = region_head(box_loss=loss)
    t, sky = street(), torch.tensor([[22., 2., 38., 16.]]).repeat(500, 1)
    t.truncated[3] = torch.tensor([True, False, False, True])
    head.fc.register_forward_hook(lambda m, x, y: shapes.append(len(x[0])))
    head.losses(features, [torch.cat([t.boxes[2:3].repeat(200, 1), sky])] * 2, [t, t], (64, 96))
    assert shapes == [256, 768] and len(loss.call_args.args[0]) == 256
    head.losses(features, [torch.zeros(0, 4)] * 2, [t, t], (64, 96))            # true boxes alone
    (_, gt, anchors), given = loss.call_args
    assert gt.tolist() == anchors.tolist() == t.boxes[2:4].tolist() * 2
    assert given["crop_size"] == (64, 96) and given["beta"] == 0.1
    assert given["truncated"].tolist() == t.truncated[2:4].tolist() * 2


@claim("porzi2019", "3.5", "a second NMS, per category", of="RegionSegmentationHead.detect")
def test_detect_corrects_scores_and_suppresses_per_category():
    """Masks come from the corrected boxes. Loops over proposals and things. A higher threshold
    changes none of the detections above it."""
    head, features = region_head()
    head.nms_threshold, head.detections = 0.2, 7
    proposals = [random_boxes(n, 96, 64, n, smallest=16) for n in (16, 12)]
    proposals = [torch.cat([p, p + 2]) for p in proposals]
    detected, removed, left_out = head.detect(features, proposals, (64, 96), 0.2), 0, 0
    for b, found in enumerate(detected):
        one = {s: f[b:b + 1] for s, f in features.items()}
        boxes, scores, things = [], [], []
        for p in proposals[b]:
            logits, deltas = head.classify(head.pool(one, [p[None]]))
            for c, score in enumerate(logits[0].softmax(0)[1:].tolist()):
                if score > 0.2:
                    moved = CODER.decode_single(deltas[0, c][None], p[None])[0].tolist()
                    boxes.append(clip_box(moved, (64, 96)))
                    scores.append(score)
                    things.append(c)
        kept = greedy_nms(boxes, scores, things, 0.2)
        removed += len(boxes) - len(kept)
        kept = kept[:7]
        close(found["boxes"], torch.tensor([boxes[i] for i in kept]), atol=1e-3)
        close(found["scores"], torch.tensor([scores[i] for i in kept]))
        assert found["categories"].tolist() == [(1, 3)[things[i]] for i in kept]
        slow = [head.mask(head.pool(one, [torch.tensor([boxes[i]])]))[:, things[i]] for i in kept]
        close(found["masks"], torch.cat(slow), rtol=1e-3, atol=1e-3)
    assert removed > 3 and len(set(detected[0]["categories"].tolist())) == 2
    bar = detected[0]["scores"].median().item()
    for few, every in zip(head.detect(features, proposals, (64, 96), bar), detected):
        sure = every["scores"] > bar
        left_out += int((~sure).sum())
        assert all(torch.allclose(few[k], every[k][sure], atol=1e-5) for k in every)
    assert left_out > 2
    sum(f["scores"].sum() for f in detected).backward()
    assert head.out.weight.grad.abs().sum() > 0 and not detected[0]["boxes"].requires_grad


# --- 3.1 Body ---------------------------------------------------------------------------------
@claim("porzi2019", "3.1", "FPN on conv2 to conv5, LeakyReLU of slope 0.01 for ReLU", of="Body")
def test_the_body_is_a_leaky_resnet_and_its_pyramid():
    """M_5 = 1x1(C_5), M_k = 1x1(C_k) + enlarge(M_{k+1}), P_k = 3x3(M_k), with the body's weights;
    sizes rounded up; strides 64 and 128 are every second pixel."""
    torch.manual_seed(0)
    body, image = resnet_fpn("tiny", width=16, extra=2).eval(), rand(2, 3, 97, 131)
    x, maps = normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), []
    for stage in body.stages:
        x = stage(x)
        assert x.min() < 0                                     # no ReLU's output is
        maps.append(x)
    assert [m.shape[1] for m in maps[1:]] == [32, 64, 128, 256]
    features, m = body(image), None
    assert list(features) == [4, 8, 16, 32, 64, 128] == body.strides and body.channels == 16
    for k in (3, 2, 1, 0):
        conv, norm = body.fpn.inner_blocks[k]
        lateral = norm(F.conv2d(maps[k + 1], conv.weight))
        m = lateral if m is None else lateral + F.interpolate(m, lateral.shape[2:], mode="nearest")
        conv, norm = body.fpn.layer_blocks[k]
        close(features[4 << k], norm(F.conv2d(m, conv.weight, padding=1)))
        assert features[4 << k].shape[2:] == (-(-97 // (4 << k)), -(-131 // (4 << k)))
    assert all(torch.equal(features[2 * s], features[s][..., ::2, ::2]) for s in (32, 64))
    relus = [r for r in body.modules() if "ReLU" in type(r).__name__]
    assert len(relus) == 5 and all(r.negative_slope == 0.01 for r in relus)


@claim("porzi2019", "5.1", "frozen parameters, and none in 'no freeze'", of="Body")
@pytest.mark.parametrize("frozen, norms", [(0, False), (1, False), (2, True)])
def test_frozen_stages_and_norms_neither_learn_nor_drift(frozen, norms):
    """frozen=2: stem, conv2; frozen_norm: all norms and statistics, also of synchronised norms."""
    torch.manual_seed(0)
    body = resnet_fpn("tiny", width=16, frozen=frozen, frozen_norm=norms)
    names = [n for n, m in body.stages.named_modules() if isinstance(m, nn.BatchNorm2d)]
    before = {k: v.clone() for k, v in body.state_dict().items()}
    sum(f.sum() + f.square().sum() for f in body.train()(rand(2, 3, 64, 64)).values()).backward()
    torch.optim.SGD([p for p in body.parameters() if p.requires_grad], lr=1.0).step()
    moved = {k for k, v in body.state_dict().items() if not torch.equal(v, before[k])}
    still = {k for k in before if k.startswith(tuple(f"stages.{i}." for i in range(frozen)))
             or (norms and k.startswith("stages.") and k[7:].rsplit(".", 1)[0] in names)}
    assert moved == set(before) - still and (len(still) > 40 or not norms)
    body = nn.SyncBatchNorm.convert_sync_batchnorm(body)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in body.fixed()) == len(names) * norms


def test_bodies_of_torchvision_and_what_is_refused():
    state = torchvision.models.resnet18().state_dict()
    body = resnet_fpn("resnet18", width=8, weights=state).stages
    assert torch.equal(body[0][0].weight, state["conv1.weight"])
    assert torch.equal(body[4][1].conv2.weight, state["layer4.1.conv2.weight"])
    for name, weights in (("resnet-50", None), ("vgg16", None), ("", None), ("tiny", "DEFAULT")):
        with pytest.raises(ValueError, match="use one of tiny, small, resnet18"):
            resnet_fpn(name, weights=weights)
    with pytest.raises(ValueError, match="no category is a thing"):
        Seamless([False, False], resnet_fpn("tiny", width=8))


# --- The whole --------------------------------------------------------------------------------
def tiny_net(extra=1, **settings):
    torch.manual_seed(0)
    return Seamless(ISTHING, resnet_fpn("tiny", width=16, extra=extra),
                    **{**dict(canonical=32, anchor_scale=4, rois=32, proposals=20), **settings})


def test_masks_are_pasted_by_bilinear_interpolation_in_their_boxes():
    """F.grid_sample at the centres of the pixels in a box, up to 1e-4; thin and empty boxes."""
    masks, x, y = randn(8, 5, 5), torch.arange(22) + 0.5, torch.arange(14) + 0.5
    boxes = torch.tensor([[2., 3., 15., 12.], [-4.3, -2.2, 9.1, 6.4], [10.5, 5.5, 30., 25.],
                          [0., 0., 22., 14.], [3.2, 1.1, 4.9, 13.], [40., 2., 50., 8.],
                          [7.46, 6.3, 7.56, 9.], [3.5, 2., 3.5, 6.]])
    small = {"boxes": boxes / torch.tensor([3., 2, 3, 2]), "masks": masks, "scores": None}
    found = at_size(small, (7, 22 / 3), (14, 22))
    close(found["boxes"], boxes)
    for mask, (x1, y1, x2, y2), pasted in zip(masks, boxes, found["masks"]):
        u, v = 2 * (x - x1) / (x2 - x1) - 1, 2 * (y - y1) / (y2 - y1) - 1
        grid = torch.stack(torch.meshgrid(u, v, indexing="xy"), -1)[None]
        value = F.grid_sample(mask[None, None], grid, padding_mode="border", align_corners=False)
        truth = (value[0, 0] > 0) & ((x >= x1) & (x < x2)) & ((y >= y1) & (y < y2))[:, None]
        assert ((pasted == truth) | (value[0, 0].abs() < 1e-4)).all()
    zeros = {"boxes": torch.tensor([[0., 0., 8., 6.]]), "masks": torch.zeros(1, 28, 28)}
    assert not at_size(zeros, (6, 8), (6, 8))["masks"].any()


def staged_net(**settings):
    """A network whose heads say: sky half of the image, road and person a quarter; a sure car of
    16x16 pixels and an unsure person."""
    net = tiny_net(**settings).eval()
    logits = torch.full((1, 4, 16, 24), -5.)
    logits[0, 0, :8] = logits[0, 2, 8:12] = logits[0, 3, 12:] = 5
    net.semantic_head.forward = lambda features: logits
    found = {"boxes": torch.tensor([[8., 8., 24., 24.], [60., 40., 70., 60.]]),
             "scores": torch.tensor([0.9, 0.3]), "categories": torch.tensor([1, 3]),
             "masks": torch.full((2, 28, 28), 4.)}
    net.region_head.detect = lambda features, proposals, size: [dict(found)]
    return net


def test_predict_is_the_fusion_of_both_branches_at_any_size():
    for size, (y, x) in ((None, (1, 1)), ((128, 288), (2, 3))):
        p = staged_net().predict(rand(3, 64, 96), size)
        truth = torch.zeros(64 * y, 96 * x, dtype=torch.long)
        truth[:32 * y], truth[32 * y:48 * y], truth[8 * y:24 * y, 8 * x:24 * x] = 2, 3, 1
        assert torch.equal(p.segments, truth) and p.categories.tolist() == [1, 0, 2]
        close(p.scores, torch.tensor([0.9, 1, 1]))
        close(p.instances["scores"], torch.tensor([0.9, 0.3]))                  # before fusion
        assert p.instances["boxes"][1].tolist() == [60 * x, 40 * y, 70 * x, 60 * y]
        assert p.instances["masks"].sum((1, 2)).tolist() == [256 * x * y, 200 * x * y]
        # Road has a quarter of the image: 2^19 pixels at 1024x2048, at any size.
        for area, kept in ((2 ** 19, [1, 0, 2]), (2 ** 19 + 400, [1, 0])):
            net = staged_net(stuff_area=area)
            assert net.predict(rand(3, 64, 96), size).categories.tolist() == kept
    net = staged_net(score_threshold=0.2)
    assert net.predict(rand(3, 64, 96)).categories.tolist() == [1, 3, 0, 2]
    p = changes.without_void(staged_net()).eval().predict(rand(3, 64, 96))      # as lab.changes has
    assert (p.segments > 0).all() and p.categories.tolist() == [1, 0, 2]


def test_the_settings_reach_the_heads_and_the_outputs_start_near_zero():
    net = Seamless(ISTHING, resnet_fpn("tiny", width=64, extra=1))
    for out in (net.proposal_head.out, net.region_head.out):
        assert 0.009 < out.weight.std() < 0.011 and out.bias.abs().max() == 0
    assert net.region_head.fc[2].weight.shape == (256, 49 * 64)
    assert net.semantic_head.out.weight.shape == (4, 4 * 32, 1, 1)
    net = tiny_net(anchor_scale=2, ratios=(1,), positive=0.4, window=5, mask_loss=len,
                   semantic_loss=max)
    p, r, s = net.proposal_head, net.region_head, net.semantic_head
    assert (p.anchor_scale, p.out.out_channels, p.proposals, p.positive) == (2, 5, 20, 0.4)
    assert s.heads[3].window == 5
    assert (r.mask_loss, net.semantic_loss, r.rois, r.canonical) == (len, max, 32, 32)


@claim("porzi2019", "5.1", "'decay BN': no weight decay on norms", of="Seamless.stages")
def test_one_stage_of_sgd_with_or_without_decay_of_norms():
    net = Seamless(ISTHING, resnet_fpn("tiny", width=8, frozen=2))
    learn = [p for p in net.parameters() if p.requires_grad]
    for norms in (True, False):
        plan = dict(steps=7, lr=0.3, decay=0.01, decay_norms=norms)
        (name, sgd, steps), = net.stages(plan)
        assert (name, steps) == ("all", 7)
        for flat, group in enumerate(sgd.param_groups):
            assert [id(p) for p in group["params"]] == [
                id(p) for p in learn if (p.ndim == 1) == flat]
            settings = [group[k] for k in ("weight_decay", "lr", "momentum", "nesterov")]
            assert settings == [0.01 if norms or not flat else 0, 0.3, 0.9, True]
        assert net.stages({**plan, "adam": True})[0][1].defaults["betas"] == (0.9, 0.999)


# --- lab: the ledger, the demo ----------------------------------------------------------------
@claim("porzi2019", "5.4", "51.43 M parameters, two networks 78.06 M", of="Seamless")
def test_the_ledger_reproduces_the_papers_parameters_exactly():
    """Two bodies share stem and conv2. A deconvolution multiplies each input by each weight."""
    net = ledger.cityscapes()
    rows = ledger.seamless_ledger(net)
    here, there = map(ledger.totals, (net, ledger.released(net)))
    (one, work), pixels = here["one network"], 1024 * 2048
    assert one == sum(p.numel() for p in net.parameters()) == 48_288_147
    assert one + 4_719_104 - 1_572_864 == there["one network"][0] == 51_434_387
    assert there["two networks"][0] == 78_063_507 and rows["ResNet"][:2] == (23_508_032, 23_232_512)
    mask = 4 * 256 * 256 * 9 * 14 * 14 + 256 * 256 * 4 * 14 * 14 + 256 * 8 * 28 * 28
    assert rows["region head, masks"][2] == 100 * mask
    assert (work, here["two networks"][1]) == pytest.approx((0.555e12, 0.845e12), rel=1e-3)
    less = 384 * 128 * 8 * sum(pixels // s ** 2 for s in (4, 8, 16, 32))   # MiniDL; stride 64
    assert work - there["one network"][1] == less - 2048 * 256 * 9 * pixels // 64 ** 2
