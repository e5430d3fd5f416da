"""The spec of affinity_head.py, after Q. Li, X. Qi, P. H. S. Torr, "Unifying Training and Inference
for Panoptic Segmentation" (CVPR 2020). Oracles are the formulas in plain loops, the dense matrix A,
brute force over all assignments, torch's own count of operations, and cases computed by hand."""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from claims import claim
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import affinity_head as ah
import seamless
from data import IGNORE, Prediction, Target, new_numbers
from lab import affinity_rows, readings

ISTHING = torch.tensor([False, True, False, True, False])      # things 1, 3; stuff 0, 2, 4


def rand(seed, *shape, draw=torch.rand):
    return draw(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randn(seed, *shape):
    return rand(seed, *shape, draw=torch.randn)


def test_the_example_by_hand_is_right():
    assert ah.example() == [[2, 0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]]


# --- 3.4.2 Dense instance affinity head -------------------------------------------------------
@claim("li2020", "3.4.2", "Q (Q^T Psi) is (Q Q^T) Psi", of="affinity_head.apply_affinity")
@pytest.mark.parametrize("hw, c, k", [(30, 4, 7), (1, 3, 2), (12, 5, 0)])
def test_the_affinity_is_applied_as_if_the_dense_matrix_existed(hw, c, k):
    """The definition, sum_j A_ij Psi_j(k), in loops; one pixel and no channel among the cases."""
    q, keys, psi = randn(1, hw, c), randn(2, hw, c), randn(3, hw, k)
    for given, used in ((keys, keys), (None, q)):
        a = [[(q[i] * used[j]).sum() / hw for j in range(hw)] for i in range(hw)]
        expected = torch.stack([sum(a[i][j] * psi[j] for j in range(hw)) for i in range(hw)])
        torch.testing.assert_close(ah.apply_affinity(q, psi, given), expected, rtol=0, atol=1e-12)


def operations(function):
    """Two for each multiply-add of the matrix products; convolutions are left out."""
    with FlopCounterMode(display=False) as counter:
        function()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for name, n in counts.items() if "conv" not in str(name))


def pyramid(seed, batch=1, c_in=6, size=(13, 18)):
    """Features of strides 4 to 32, each level half of the one before, rounded up."""
    out = {}
    for stride in (4, 8, 16, 32):
        out[stride] = randn(seed + stride, batch, c_in, *size).float()
        size = [-(-n // 2) for n in size]
    return out


def loud_head(c_in=6, channels=8, std=1.):
    """A head whose 1x1 convolutions are not small: its affinity is as large as the potential."""
    torch.manual_seed(0)
    head = ah.InstanceAffinityHead(c_in, channels)
    for m in head.modules():
        if isinstance(m, nn.GroupNorm) or getattr(m, "kernel_size", 0) == (1, 1):
            nn.init.normal_(m.weight, std=std)
            nn.init.normal_(m.bias, std=std)
    return head


@claim("li2020", "3.4.2", "99.8% fewer multiply-adds: 5 billion FLOPS for 800x1300",
       of="affinity_head.apply_affinity", figure="affinity_head.png")
def test_it_takes_the_papers_five_billion_operations():
    """torch counts on the meta device, at no cost: d = 4, C = 128, D + N_st = 100 + 53."""
    q, psi = (torch.empty(200 * 325, n, device="meta") for n in (128, 153))
    fast, slow = operations(lambda: ah.apply_affinity(q, psi)), operations(lambda: q @ q.T @ psi)
    assert fast == 5_091_840_000 and f"{1 - fast / slow:.1%}" == "99.8%"
    head, f, psi = loud_head(), pyramid(0), torch.rand(7, 13, 18)
    assert operations(lambda: head(f, [psi])) == 2 * 2 * 13 * 18 * 8 * 7           # nor has it A


@claim("li2020", "3.4.2", "P = Psi + phi_1(Q) (phi_0(Q)^T Psi): a residual connection",
       of="affinity_head.InstanceAffinityHead")
@claim("li2020", "3.4.2", "one set of weights serves a dynamic number of channels",
       of="affinity_head.InstanceAffinityHead")
@torch.no_grad()
@pytest.mark.parametrize("h, w", [(16, 24), (13, 18), (1, 1)])
def test_the_head_adds_the_dense_affinity_of_its_factors(h, w):
    """Q by hand: two 3x3, group norm, ReLU on each level; enlarged, concatenated, 1x1. A batch of
    five channels and none; sizes that are no multiple of anything, and one cell."""
    head, f, levels = loud_head(), pyramid(0, 2, size=(h, w)), []
    for x in f.values():
        for conv, norm in zip(head.convs, head.norms):
            x = F.conv2d(x, conv.weight, padding=1)
            x = F.group_norm(x, 2, norm.weight, norm.bias, norm.eps).relu()
        levels.append(F.interpolate(x, size=(h, w), mode="bilinear", align_corners=False))
    q = F.conv2d(torch.cat(levels, 1), head.out.weight, head.out.bias)
    one, zero = (F.elu(F.conv2d(q, m.weight, m.bias)).double().flatten(2)
                 for m in (head.phi1, head.phi0))
    psis = [torch.rand(5, h, w), torch.rand(0, h, w)]
    for b, got in enumerate(head(f, psis)):
        a, psi = one[b].T @ zero[b] / (h * w), psis[b].double().flatten(1).T
        expected = (psi + a @ psi).T.reshape(-1, h, w).float()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_new_head_is_nearly_the_identity_and_learns_everywhere():
    """Choices: a small phi_1, and ELU: affinities have both signs, no silent channel is dead."""
    head, psi = ah.InstanceAffinityHead(6), torch.rand(5, 13, 18)
    (p,), (q,), (keys,) = head(pyramid(5), [psi]), *head.factors(pyramid(5))
    assert 0 < (p - psi).abs().max() < .1 and q.abs().mean() < .15 * keys.abs().mean()
    assert (q @ keys.T).min() < 0 < (q @ keys.T).max()
    (p * torch.randn(5, 13, 18)).sum().backward()
    assert all((w.grad != 0).any() for w in head.parameters())
    assert (head.phi0.bias.grad != 0).all() and (head.phi1.bias.grad != 0).all()
    for channels, groups in ((128, 32), (256, 32), (64, 16), (20, 1), (50, 2), (3, 1)):
        assert ah.InstanceAffinityHead(2, channels).norms[1].num_groups == groups


@claim("li2020", "1, Figure 1", "parts of an object that its box cut off are recovered",
       of="affinity_head.InstanceAffinityHead", figure="affinity_head.png")
def test_a_pixel_that_its_box_cut_off_is_recovered():
    """Two cars and road, 4x8 cells, boxes one column short; colours are features. The head learns
    40 steps on three rows and recovers the column in the fourth."""
    truth, row = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]).expand(4, 8), torch.arange(4) == 1
    found = {"boxes": torch.tensor([[4., 0, 12, 16], [12, 0, 20, 16]]), "scores": torch.ones(2),
             "categories": torch.tensor([1, 1])}
    car = torch.where(truth < 2, 2., -2.)
    psi, _ = ah.dynamic_potential(found, torch.stack([-car, car]), [False, True], (16, 32))
    image = F.one_hot(truth).movedim(-1, 0)[None].float()
    f = {s: F.interpolate(image, size=(max(16 // s, 1), 32 // s)) for s in (4, 8, 16, 32)}
    torch.manual_seed(0)
    head = ah.InstanceAffinityHead(3, 8)
    optimiser = torch.optim.Adam(head.parameters(), .02)
    for _ in range(40):
        p, = head(f, [psi])
        optimiser.zero_grad()
        F.cross_entropy(10 * p.movedim(0, -1)[~row].flatten(0, 1), truth[~row].flatten()).backward()
        optimiser.step()
    assert (psi.argmax(0) == truth)[row][0].tolist() == [False] + [True] * 4 + [False, True, True]
    assert (p.argmax(0) == truth)[row].all()


# --- 3.4.1 Dynamic potential head -------------------------------------------------------------
def cells(low, high, n, d):
    """Of n cells of d pixels those whose centres are in an interval, else that of its middle."""
    return ([j for j in range(n) if low <= (j + .5) * d < high] or
            [j for j in range(n) if j * d <= (low + high) / 2 < (j + 1) * d])


def hats(cell, d, low, high, s):
    """Weights of s mask cells between `low` and `high` at a cell's centre: bilinear, the last
    cell's beyond them."""
    u = min(max(((cell + .5) * d - low) / (high - low) * s - .5, 0), s - 1)
    return torch.tensor([max(0, 1 - abs(u - y)) for y in range(s)], dtype=torch.float64)


def potential_by_loop(found, logits, d, variant):
    """The formulas of section 3.4.1, pixel by pixel."""
    (_, h, w), raw = logits.shape, variant == "A"
    v, channels = logits if raw else logits.softmax(0), []
    for k, (x1, y1, x2, y2) in enumerate(found["boxes"].tolist()):
        rows, columns, channel = cells(y1, y2, h, d), cells(x1, x2, w, d), []
        for i, j in itertools.product(range(h), range(w)):
            value = v[found["categories"][k], i, j]
            if "masks" in found:
                m = hats(i, d, y1, y2, 3) @ found["masks"][k] @ hats(j, d, x1, x2, 3)
                m = m if raw else m.sigmoid()
                value = value * m if variant == "B" else value + m
            score = 1 if raw else found["scores"][k]
            channel.append(score * value * (i in rows and j in columns))
        channels.append(torch.stack(channel).view(h, w))
    return torch.stack(channels + list(v[~ISTHING]))


def detections(seed, count=4, size=(5, 7), stride=4):
    """Some detections, one tiny around the centre of cell (1, 2), others over the border too, and
    logits of a map."""
    scale = torch.tensor([size[1] * stride, size[0] * stride])
    low = (rand(seed, count, 2) * 1.1 - .1) * scale
    boxes = torch.cat([low, low + rand(seed + 1, count, 2) * .7 * scale + .2], 1)
    boxes[:1] = torch.tensor([[2.5, 1.5, 2.5, 1.5]]) * stride + torch.tensor([-.1, -.1, .05, .05])
    return dict(boxes=boxes, scores=rand(seed + 2, count), masks=randn(seed + 3, count, 3, 3),
                categories=torch.tensor([1, 3, 3, 1, 1])[:count]), randn(seed + 4, 5, *size)


@claim("li2020", "3.4.1", "each variant is its formula, in the box only; stuff as it is",
       of="affinity_head.dynamic_potential")
@pytest.mark.parametrize("count, stride", [(4, 4), (0, 4), (5, 3)])
@pytest.mark.parametrize("variant, masked", [("A", True), ("B", True), ("B", False), ("C", True),
                                             ("C", False)])
def test_each_variant_is_its_formula_at_every_pixel(variant, masked, count, stride):
    """And its gradients: "gradients ... flow to the object detection submodule" (A.4)."""
    found, logits = detections(count, count, stride=stride)
    leaves = [x.requires_grad_() for x in (logits, found["scores"], found["masks"])]
    if not masked:
        del found["masks"]
    got, kinds = ah.dynamic_potential(found, logits, ISTHING, (5 * stride, 7 * stride), variant)
    expected = potential_by_loop(found, logits, stride, variant)
    assert kinds.tolist() == [1, 3, 3, 1, 1][:count] + [0, 2, 4] and kinds.dtype == torch.int64
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-6)
    for leaf in leaves:
        a, b = (torch.autograd.grad((x * randn(9, *got.shape)).sum(), leaf, allow_unused=True,
                                    retain_graph=True)[0] for x in (got, expected))
        a, b = (torch.zeros_like(leaf) if v is None else v for v in (a, b))
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@claim("li2020", "A.3", "B is high only where both cues are high; C favours things",
       of="affinity_head.dynamic_potential")
@claim("li2020", "3.4.1", "unconfident detections are attenuated: the lower score loses an overlap",
       of="affinity_head.dynamic_potential")
def test_what_variants_and_scores_do():
    """V and M of a thing are high or low in four cells; V of stuff is the rest."""
    v, m = torch.tensor([[.9, .9, .1, .1]]), torch.tensor([.9, .1, .9, .1])
    found = {"boxes": torch.tensor([[0., 0, 16, 4]]), "scores": torch.ones(1),
             "categories": torch.tensor([1]), "masks": m.logit().expand(1, 4, 4)}
    logits = torch.stack([1 - v, v]).log()
    b, c = (ah.dynamic_potential(found, logits, [False, True], (4, 16), k)[0] for k in "BC")
    assert (b[0] > .5).tolist() == (b[0] > b[1]).tolist() == [[True, False, False, False]]
    assert (c[0] > c[1]).tolist() == [[True, True, True, False]]
    two = {"boxes": torch.tensor([[0., 0, 12, 4], [0, 0, 16, 4]]), "scores": torch.tensor([.6, .9]),
           "categories": torch.tensor([1, 1])}
    psi, _ = ah.dynamic_potential(two, logits, [False, True], (4, 16))
    assert (psi[0, 0, :3] < psi[1, 0, :3]).all()


def test_what_cannot_be_is_refused():
    found, logits = detections(0)
    for call, sentence in [
            (lambda: ah.dynamic_potential(found, logits, ISTHING, (20, 28), "b"), "'B' or 'C'"),
            (lambda: ah.dynamic_potential({}, logits, ISTHING, (20, 28), "A"), "variant B"),
            (lambda: ah.assign([[math.nan, 1], [1, 2]]), "finite"),
            (lambda: ah.assign([[math.inf, 1], [1, -math.inf]]), "finite")]:
        with pytest.raises(ValueError, match=sentence):
            call()


# --- 3.5 Panoptic matching loss ---------------------------------------------------------------
@claim("li2020", "3.5", "the match maximises the sum of IoUs; greed would be wrong",
       of="affinity_head.assign")
@pytest.mark.parametrize("seed", range(4))
def test_no_assignment_has_a_larger_sum(seed):
    """240 matrices, empty, wide and tall, gains of both signs, many ties, against all
    permutations. Of [[.9, .8], [.7, 0]] greed takes .9 + 0, the best sum is .8 + .7."""
    assert ah.assign([[.9, .8], [.7, .0]]).tolist() == [1, 0]
    r = np.random.default_rng(seed)
    for n in range(60):
        rows, columns = r.integers(0, 6, 2)
        gain = r.random((rows, columns)) - .3 * (n % 3)
        gain = np.round(gain * 4) / 4 if n % 2 else gain
        column = ah.assign(gain)
        pairs = [(i, c) for i, c in enumerate(column.tolist()) if c >= 0]
        assert column.shape == (rows,) and column.dtype == np.int64 and (column >= -1).all()
        assert len(pairs) == len({c for _, c in pairs}) == min(rows, columns)
        wide = gain if rows <= columns else gain.T
        best = max(sum(wide[i, c] for i, c in enumerate(p))
                   for p in itertools.permutations(range(wide.shape[1]), len(wide)))
        assert sum(gain[i, c] for i, c in pairs) == pytest.approx(best, abs=1e-12)


def target(segments, categories, crowd=None, boxes=None):
    """A Target whose boxes are found by looking at every pixel."""
    places = [torch.nonzero(segments == k + 1).flip(1) for k in range(len(categories))]
    if boxes is None:
        boxes = [[*p.amin(0), *p.amax(0) + 1] if len(p) else [0] * 4 for p in places]
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return Target(segments, torch.tensor(categories, dtype=torch.int64),
                  torch.tensor(crowd or [False] * len(places)).bool(), boxes, boxes, boxes > 1e9)


def found_at(boxes, categories):
    return {"boxes": torch.as_tensor(boxes).float().view(-1, 4),
            "categories": torch.as_tensor(categories, dtype=torch.int64)}


def blocks(h, w):
    """Two rows of three blocks: void, stuff, stuff; two things, a crowd."""
    segments = torch.arange(h)[:, None] * 2 // h * 3 + torch.arange(w) * 3 // w
    return target(segments, [0, 4, 1, 3, 1], [False] * 4 + [True])


HALVES = torch.tensor([1, 2]).repeat_interleave(20).expand(24, 40).contiguous()    # side by side
LEFT, RIGHT = [0., 0, 20, 24], [20., 0, 40, 24]


@claim("li2020", "3.5", "T* has the largest sum of box IoUs within the category",
       of="affinity_head.match_segments")
@pytest.mark.parametrize("kinds, boxes, categories, crowd, channels", [
    ([1, 1], [[0, 0, 38, 24], LEFT], [1, 1], None, [1, 0]),            # IoU .53 and 1; .47 and 0
    ([1, 3], [LEFT, [20, 0, 30, 24]], [3, 3], None, [IGNORE, 1]),      # only its own category
    ([4, 0], [LEFT], [1], None, [3, 1]), ([2, 4], [], [], None, [1, 2]),           # stuff
    ([1, 1], [[0, 0, 21, 24]], [1], [True, False], [IGNORE, 0]),       # a crowd takes no detection
    ([0, 1], [LEFT], [1], [True, True], [IGNORE, IGNORE]),             # nor a channel
    ([1, 2], [RIGHT], [1], None, [IGNORE, 2]),                         # no overlap is no match
    ([1, 2], [[math.nan] * 4], [1], None, [IGNORE, 2]),                # of a network that diverged
    ([1, 1], [[2, 0, 20, 24], [-90, 0, 20, 24]], [1, 1], None, [1, IGNORE])])      # clipped: IoU 1
def test_the_match_by_hand(kinds, boxes, categories, crowd, channels):
    got = ah.match_segments(found_at(boxes, categories), target(HALVES, kinds, crowd), ISTHING)
    assert got.tolist() == channels and got.dtype == torch.int64


def loss_by_loop(P, found, t, isthing, scale):
    """Pixel by pixel, with gradients."""
    match, (h, w), values = ah.match_segments(found, t, isthing), P.shape[1:], []
    for i, j in itertools.product(range(h), range(w)):
        y, x = (int((v + .5) * n / m) for v, n, m in zip((i, j), t.segments.shape, (h, w)))
        k = int(t.segments[y, x])
        if k and match[k - 1] != IGNORE:
            values.append(-(scale * P[:, i, j]).log_softmax(0)[match[k - 1]])
    return sum(values) / len(values)


@claim("li2020", "3.5", "cross entropy against the matched truth",
       of="affinity_head.panoptic_matching_loss")
@pytest.mark.parametrize("things, scale, h, w", [(2, 10., 6, 10), (1, 1., 7, 11), (0, 3., 3, 5)])
def test_the_loss_is_the_mean_cross_entropy_of_cells_with_a_target(things, scale, h, w):
    """And its gradient; the sizes of the map need not divide the image's."""
    t, P = blocks(24, 40), rand(things, 3 + things, h, w).requires_grad_()
    found = found_at(t.boxes[2:2 + things] + 2, [1, 3][:things])
    got, expected = (f(P, found, t, ISTHING, scale)
                     for f in (ah.panoptic_matching_loss, loss_by_loop))
    assert got.shape == () and got.item() == pytest.approx(expected.item(), abs=2e-6)
    grads = (torch.autograd.grad(x, P)[0] for x in (got, expected))
    torch.testing.assert_close(*grads, rtol=0, atol=1e-6)


def test_the_floor_of_the_loss_is_that_of_a_perfect_potential():
    """log(1 + (K - 1) e^-scale) for K = 50; the scale is 10 by default."""
    P, isthing = torch.zeros(50, 6, 10), torch.tensor([True] + [False] * 48)
    P[0, :, :5], P[1, :, 5:] = 1, 1
    found, t = found_at([LEFT, RIGHT], [0, 0]), target(HALVES, [0, 0])
    for options, floor in (({}, .0022), ({"scale": 1.}, 2.9458)):
        loss = ah.panoptic_matching_loss(P, found, t, isthing, **options)
        assert loss.item() == pytest.approx(floor, abs=5e-5)


# --- A.2, B: the Lovasz losses ----------------------------------------------------------------
@claim("li2020", "A.2, B", "the Lovasz extension: the convex surrogate of 1 - IoU",
       of="affinity_head.lovasz")
@pytest.mark.parametrize("p", [1, 9])
def test_the_lovasz_extension_is_its_definition(p):
    """The errors in falling order, each times what 1 - IoU gains when its pixel goes wrong too."""
    errors, truth, expected = rand(p, 4, p).requires_grad_(), rand(9, 4, p) < .5, 0.
    truth[0], truth[1] = False, True
    for row, mask in zip(errors, truth):
        guess, before = mask.clone(), 0.
        for i in row.argsort(descending=True).tolist():
            guess[i] = ~guess[i]
            after = 1 - (guess & mask).sum() / (guess | mask).sum() if (guess | mask).any() else 0.
            expected, before = expected + row[i] * (after - before) / 4, after
    got = ah.lovasz(errors, truth.double())
    assert got.item() == pytest.approx(expected.item(), abs=1e-6)
    a, b = (torch.autograd.grad(x, errors)[0] for x in (got, expected))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@claim("li2020", "B", "of certain predictions: 1 - mean IoU", of="affinity_head.lovasz_softmax")
def test_lovasz_losses_of_certain_predictions():
    """Unknown pixels and absent categories do not count; a batch of two counts as one image.
    Hinge: of margins +-1 it is 2 (1 - IoU); beyond 1 errors are 0."""
    true, sure = torch.tensor([[1., 1, 1, 0, 0]]), torch.tensor([[1., -1, 3, 1, -2]])
    assert ah.lovasz_hinge(sure, true).item() == pytest.approx(2 * (1 - 2 / 4))
    truth = torch.tensor([0, 0, 0, 1, 1, 2, IGNORE, 1])
    guess = torch.tensor([0, 0, 1, 1, 2, 2, 3, 1])
    logits = 1e3 * F.one_hot(guess, 4).view(2, 1, 4, 4).movedim(-1, 1).float()
    iou = (2 / 3 + 2 / 4 + 1 / 2) / 3
    assert ah.lovasz_softmax(logits, truth.view(2, 1, 4)).item() == pytest.approx(1 - iou)
    soft, known = randn(0, 2, 4, 1, 4), truth.view(2, 1, 4) != IGNORE
    errors = (F.one_hot(truth.clamp(min=0), 4).T - soft.softmax(1).movedim(1, 0).flatten(1)).abs()
    expected = ah.lovasz(errors[:3, known.flatten()], F.one_hot(truth[truth >= 0], 3).T.double())
    assert torch.allclose(ah.lovasz_softmax(soft, truth.view(2, 1, 4)).double(), expected)


# --- Inference and the whole method -----------------------------------------------------------
@claim("li2020", "3.4.2", "inference is an argmax over the channels", of="affinity_head.segment")
@pytest.mark.parametrize("size, shift, d", [((24, 36), 0, 4), ((21, 35), -50., 0), ((6, 9), 0, 11)])
def test_inference_is_an_argmax_over_the_enlarged_channels(size, shift, d):
    """Channels that win no pixel are no segments; things keep their score, stuff has 1."""
    P, scores = randn(1, 11, 6, 9) + shift, rand(2, d)
    P[2], P[4] = P[2] - 20, P[3]                               # of equal channels the first wins
    segments, categories, got = ah.segment(P, torch.arange(11) % 5, scores, size)
    best = F.interpolate(P[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0)
    winners, expected = best.unique(return_inverse=True)
    assert torch.equal(segments, expected + 1) and not {2, 4} & set(winners.tolist())
    assert torch.equal(categories, winners % 5)
    assert torch.allclose(got.double(), torch.cat([scores, torch.ones(11)])[winners])
    none = ah.segment(P[:0], torch.arange(0), scores[:0], size)
    assert none[0].shape == size and not none[0].any() and len(none[1]) == len(none[2]) == 0


class Base(nn.Module):
    """What Affinity asks of a base. Four detections; two have scores above .5, one at .5."""

    def __init__(self, masks=True):
        super().__init__()
        torch.manual_seed(3)
        self.isthing, self.stuff_area, self.score_threshold = ISTHING, 0, .5
        self.score, self.convolution = nn.Parameter(torch.ones(())), nn.Conv2d(3, 5, 1)
        nn.init.normal_(self.convolution.weight)
        found, _ = detections(0, 4, (16, 24))
        self.found = {k: v.float() if v.is_floating_point() else v for k, v in found.items()
                      if k != "masks" or masks} | {"scores": torch.tensor([.9, .8, .5, .2])}
        self.body = lambda x: {s: F.avg_pool2d(x, s, ceil_mode=True) for s in (4, 8, 16, 32)}
        self.semantic_head = lambda features: self.convolution(features[4])
        self.detection_losses = lambda *inputs: (
            {"rph_box": 2 * self.score, "rsh_class": 3 * self.score}, [torch.eye(5, 4)] * 2)
        self.semantic_losses = lambda *inputs: {"semantic": 7 * self.score}
        self.proposal_head = SimpleNamespace(proposals=3)
        self.region_head = SimpleNamespace(detect=self.detect, add_masks=lambda features, found: [
            {**f, "masks": torch.ones(len(f["boxes"]), 2, 2)} for f in found])

    def detect(self, features, proposals, size=None, score_threshold=.05):
        """Seamless.detect(features, size), region_head.detect(features, proposals, size, ...)."""
        assert size is None or all(len(p) == 3 for p in proposals)
        found = {k: v[self.found["scores"] > score_threshold] for k, v in self.found.items()}
        return [{**found, "scores": found["scores"] * self.score}] * len(features[4])


IMAGES = F.interpolate(randn(0, 2, 3, 4, 6).float(), size=(62, 95))
TARGETS = [blocks(62, 95), target(blocks(62, 95).segments.flip(1), [4, 1, 1, 3, 0])]


@claim("li2020", "4", "weights of detection, semantic and panoptic losses: 0.25, 1, 1",
       of="affinity_head.Affinity")
@pytest.mark.parametrize("variant, scale", [("A", 1.), ("B", 10.), ("C", 10.)])
def test_the_losses_are_weighted_and_learn_on_detections_above_the_cut_off(variant, scale):
    base = Base()
    model, features = ah.Affinity(base, loud_head(3), variant=variant), base.body(IMAGES)
    found = {k: v[:2] for k, v in base.found.items()}
    psis = [ah.dynamic_potential(found, v, ISTHING, (62, 95), variant)[0]
            for v in base.semantic_head(features)]
    panoptic = sum(ah.panoptic_matching_loss(p, found, t, ISTHING, scale).item()
                   for p, t in zip(model.head(features, psis), TARGETS)) / 2
    for weights, (d, s, p) in (({}, (.25, 1, 1)), ({"loss_weights": (5, 6, 7)}, (5, 6, 7))):
        losses = ah.Affinity(base, model.head, variant=variant, **weights).losses(IMAGES, TARGETS)
        assert {k: v.item() for k, v in losses.items()} == pytest.approx(
            {"rph_box": 2 * d, "rsh_class": 3 * d, "semantic": 7 * s, "panoptic": panoptic * p})


@claim("li2020", "A.4", "gradients of the panoptic loss reach the detector's scores",
       of="affinity_head.Affinity")
@pytest.mark.parametrize("end_to_end", ["all", "head", "none"])
def test_what_the_panoptic_loss_trains(end_to_end):
    base, images = Base(), IMAGES.clone().requires_grad_()
    model = ah.Affinity(base, ah.InstanceAffinityHead(3, 8), end_to_end=end_to_end)
    losses = model.losses(images, TARGETS)
    assert ("panoptic" in losses) == (end_to_end != "none")
    if end_to_end != "none":
        leaves = [base.score, base.convolution.weight, images, *model.head.parameters()]
        grads = torch.autograd.grad(losses["panoptic"], leaves, allow_unused=True)
        assert [g is not None for g in grads[:3]] == [end_to_end == "all"] * 3
        assert all(g.any() for g in grads if g is not None) and grads[3] is not None


@claim("li2020", "A.4", "true boxes have a uniform score of 1", of="affinity_head.Affinity")
def test_true_boxes_are_detections_of_score_1(monkeypatch):
    seen, loss = [], ah.panoptic_matching_loss
    monkeypatch.setattr(ah, "panoptic_matching_loss",
                        lambda p, f, *a, **k: seen.append(f) or loss(p, f, *a, **k))
    ah.Affinity(Base(), None, true_boxes=True).losses(IMAGES, TARGETS)
    for f, t in zip(seen, TARGETS):
        things = ISTHING[t.categories] & ~t.crowd
        assert torch.equal(f["boxes"], t.boxes[things]) and "masks" in f and len(f["boxes"]) > 1
        assert torch.equal(f["categories"], t.categories[things]) and (f["scores"] == 1).all()


@claim("li2020", "C", "small stuff becomes void", of="affinity_head.segment")
@pytest.mark.parametrize("masks, headed", [(True, True), (False, False)])
def test_a_prediction_at_another_size(masks, headed):
    """Detections at .5 and above become segments; all are instances. A mask is the logit above 0
    in the box, or, without masks, the category's pixels in the box."""
    base, size, head = Base(masks), (100, 180), loud_head(3, std=.1) if headed else None
    model, found = ah.Affinity(base, head), base.found
    logits, sure = base.semantic_head(base.body(IMAGES)), {k: v[:3] for k, v in found.items()}
    psi, channels = ah.dynamic_potential(sure, logits[0], ISTHING, (62, 95))
    psi = head(base.body(IMAGES[:1]), [psi])[0] if headed else psi
    segments, categories, scores = ah.segment(psi, channels, sure["scores"], size)
    areas, order = segments.flatten().bincount()[1:][~ISTHING[categories]].sort()
    base.stuff_area = areas[1].item() * 2048 * 1024 / (100 * 180)      # all but the smallest stay
    p, kept = model.predict(IMAGES[0], size), torch.ones(len(categories)).bool()
    kept[categories == categories[~ISTHING[categories]][order[0]]] = False
    assert torch.equal(p.segments, new_numbers(kept)[segments]) and not kept.all()
    assert torch.equal(p.categories, categories[kept]) and torch.equal(p.scores, scores[kept])
    boxes = found["boxes"] * torch.tensor([180 / 95, 100 / 62] * 2)
    torch.testing.assert_close(p.instances["boxes"], boxes)
    v = F.interpolate(logits[:1], size, mode="bilinear")[0].argmax(0)
    inside = ah.paste(found["masks"], boxes, size, size) > 0 if masks else (
        v == found["categories"][:, None, None])
    inside &= ah.box_gate(boxes, size, size)
    assert (p.instances["masks"] != inside).sum() < 20 < inside.sum()
    assert model.predict(IMAGES[0]).segments.shape == (62, 95)


# --- lab: readings of a checkpoint ------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("more, things", [(1, 1), (2, 0)])     # one wins more than half of its mask
def test_the_readings_share_their_instances(more, things):
    model, area = ah.Affinity(Base(), loud_head(3)), 300 * 2048 * 1024 / (62 * 95)
    model.base.found["masks"] += more
    found = readings.readings(model, IMAGES[0], (62, 95))
    fine, free = found.pop("argmax, fine"), found.pop("argmax, fine, half free")
    assert list(found) == [*affinity_rows.COLUMNS] and model.head is not None
    sure = {k: v[:3] for k, v in model.base.found.items()}
    v = seamless.resize_logits(model.base.semantic_head(model.base.body(IMAGES)).float(), (62, 95))
    psi, channels = ah.dynamic_potential(sure, v[0], ISTHING, (62, 95), model.variant)
    assert torch.equal(fine.categories[fine.segments - 1], channels[psi.argmax(0)])
    won, masks = psi.argmax(0).flatten().bincount()[:3], fine.instances["masks"][:3]
    kept = (won > 0) & (2 * won >= masks.sum((1, 2)))
    assert ISTHING[free.categories].sum() == kept.sum() == things and (won > 0).sum() == 1
    assert torch.equal(found["affinity"].segments, model.predict(IMAGES[0]).segments)
    rules, filled = (torch.cat([torch.tensor([-1]), found[k].categories])[found[k].segments]
                     for k in ("heuristic", "filled"))
    assert (filled >= 0).all() and torch.equal(filled[rules >= 0], rules[rules >= 0])
    model.base.stuff_area, model.head = area, None
    trimmed = readings.trim(found["argmax"], ISTHING, 300)
    assert torch.equal(trimmed.segments, model.predict(IMAGES[0]).segments)


def test_the_rules_way_to_void_takes_stuff_where_a_thing_is_likeliest():
    """A row of stuff 0, a thing 2, stuff 1; the likeliest categories. The lone stuff 1 vanishes."""
    kept = Prediction(torch.tensor([[1, 1, 2, 3]]), torch.tensor([0, 2, 1]), torch.ones(3), {})
    found = readings.with_void(kept, torch.tensor([[0, 2, 1, 2]]), torch.tensor([0, 0, 1]).bool())
    assert found.segments.tolist() == [[1, 0, 2, 0]] and found.categories.tolist() == [0, 2]


@pytest.mark.parametrize("row, count, moves", [
    ("head", 2, True), ("fixed scores", 2, False), ("all detections", 4, True)])
def test_rows_of_the_street_fix_the_scores_or_match_more_detections(row, count, moves, monkeypatch):
    seen, loss = [], ah.panoptic_matching_loss
    monkeypatch.setattr(ah, "panoptic_matching_loss",
                        lambda p, f, *a, **k: seen.append(len(f["scores"])) or loss(p, f, *a, **k))
    base = Base()
    panoptic = affinity_rows.ROWS[row][1](base, loud_head(3)).losses(IMAGES, TARGETS)["panoptic"]
    grad = torch.autograd.grad(panoptic, base.score, allow_unused=True)[0]
    assert seen == [count] * 2 and (grad is not None) == moves and base.score_threshold == 0.5
