"""The spec of the two networks that ibs.py is tried on: lab/masks.py, kernels.py, queries.py and
unified.py. Oracles are loops over cells, pixels, segments in float64, and all permutations."""
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import ibs
import seamless
from claims import claim
from lab import unified
from lab.kernels import Kernels
from lab.queries import Queries

ISTHING = torch.tensor([False, True, True, False])             # stuff 0 and 3, things 1 and 2
SIZE, CELLS, SIZES = (32, 64), (8, 16), [(4, 8), (2, 4), (1, 2)]  # stride 1; 4; 8, 16, 32


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def painted(*rectangles):
    """Rectangles (category, top, left, bottom, right) on void; a sixth entry makes one a crowd."""
    segments = torch.zeros(SIZE, dtype=torch.int64)
    for k, (_, y0, x0, y1, x1, *_) in enumerate(rectangles):
        segments[y0:y1, x0:x1] = k + 1
    rows = torch.tensor([[r[0], len(r) > 5] for r in rectangles]).view(-1, 2).long()
    sample = data.Sample(torch.zeros(3, *SIZE), segments, rows[:, 0], rows[:, 1].bool(), "")
    return data.crop(sample, 0, 0, SIZE)[1]


TARGETS = {
    "street": painted((0, 0, 0, 32, 64), (1, 8, 16, 24, 32), (3, 0, 48, 20, 64), (2, 16, 2, 30, 12),
                      (0, 0, 0, 5, 5, "crowd"), (1, 2, 28, 14, 50)),
    "void between": painted((0, 0, 0, 32, 26), (1, 8, 30, 26, 46), (2, 20, 0, 32, 14, "crowd")),
    "nothing": painted(), "crowd": painted((1, 0, 0, 32, 64, "crowd")),
    "stuff": painted((0, 0, 0, 32, 28), (3, 0, 28, 32, 64)),
    "things": painted((1, 0, 0, 14, 64), (2, 14, 0, 32, 64)),
    "one pixel": painted((1, 5, 5, 6, 6)), "a speck of stuff": painted((0, 0, 0, 1, 1))}
STREET = TARGETS["street"]


def close(a, b, rtol=2e-5, atol=2e-6):
    a, b = (torch.as_tensor(v).detach().double() for v in (a, b))
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def same_gradients(a, b, leaves):
    """Of two scalars, the second from an oracle."""
    for x, y in zip(*(torch.autograd.grad(v, leaves, retain_graph=True, materialize_grads=True)
                      for v in (a, b))):
        close(x, y, rtol=1e-4)


# --- Masks --------------------------------------------------------------------------------------
def truth_by_loop(target, size):
    """At the centre of cell (i, j), by integers: pixel floor((i + 1/2) H / h)."""
    (H, W), (h, w) = target.segments.shape, size
    ids = [[int(target.segments[(2 * i + 1) * H // (2 * h), (2 * j + 1) * W // (2 * w)])
            for j in range(w)] for i in range(h)]
    known = torch.tensor([[float(k > 0 and not target.crowd[k - 1]) for k in row] for row in ids])
    number = torch.arange(1, len(target.crowd) + 1)[:, None, None]
    return (torch.tensor(ids) == number).double(), known.double()


def dice_of(x, y, known):
    p, y = x.double().sigmoid()[known > 0], y[known > 0]
    return 1 - 2 * (p * y).sum() / ((p * p).sum() + (y * y).sum()).clamp(min=1e-9)


def entropy_of(x, y, known):
    p, y = x.double().sigmoid()[known > 0], y[known > 0]
    return -(y * p.log() + (1 - y) * (1 - p).log()).sum() / max(len(y), 1)


def merge_by_loop(logits, scores, categories, size, threshold, overlap, stuff_area):
    """-> {(category, pixels): score}."""
    p, parts = F.interpolate(logits[:, None].double(), size, mode="bilinear")[:, 0].sigmoid(), {}
    able = torch.where(scores > threshold)[0].tolist()
    value = p * (scores * (scores > threshold))[:, None, None]
    for k in able:
        mask = p[k] > 0.5
        won, c = mask & (value.argmax(0) == k), int(categories[k])
        if won.any() and won.sum() >= overlap * mask.sum():
            pixels, best = parts.get((c, k * ISTHING[c].item()), (won, 0))
            parts[c, k * ISTHING[c].item()] = pixels | won, max(best, scores[k].item())
    return {(c, frozenset(map(tuple, torch.nonzero(pixels).tolist()))): best
            for (c, _), (pixels, best) in parts.items() if ISTHING[c] or pixels.sum() >= stuff_area}


def same_merge(segments, categories, scores, want):
    found = {(c, frozenset(map(tuple, torch.nonzero(segments == k).tolist()))): s for k, (c, s)
             in enumerate(zip(categories.tolist(), scores.tolist()), 1)}
    assert set(segments.unique().tolist()) - {0} == set(range(1, len(categories) + 1))
    assert len(found) == len(categories) and found == pytest.approx(want)


# --- Kernels ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, canonical, want", [
    ("street", 12, [18.165, 4.376, 139.564, 12.620, 1.467, 14.720, 3]),
    ("street", 64, [18.009, 4.457, 136.924, 12.288, 1.497, 15.225, 3]),
    ("stuff", 64, [36.936, 4.014, 77.010, 25.564, 1.355, 13.246, 0]),
    ("things", 12, [23.323, 4.250, 110.321, 16.043, 1.298, 14.444, 2]),
    ("one pixel", 12, [10.070, 4.221, 96.667, 6.244, 1.184, 12.343, 1])])
def test_kernels_cost_what_loops_over_cells_said(name, canonical, want):
    """Frozen numbers, which loops confirmed: the losses of position and masks; the sums of
    embeddings and of the gradients of heat, kernels, features; how many are things. Inference."""
    heat = [(randn(20 + n, 2, 4, *s) * 2).requires_grad_() for n, s in enumerate(SIZES)]
    maps = [randn(30 + n, 2, 24, *s).requires_grad_() for n, s in enumerate(SIZES)]
    features = (randn(40, 2, 24, *CELLS) * 0.3).requires_grad_()
    k = Kernels(ISTHING, 8, 24, canonical, positions=2, detections=9)
    k.maps = lambda pyramid: list(zip(heat, maps))
    losses, embeddings, is_thing = k.losses({}, features, [TARGETS[name], STREET])
    sum(losses.values()).backward()
    parts = (embeddings, [h.grad for h in heat], [m.grad for m in maps], [features.grad])
    sums = [sum(x.detach().abs().sum().item() for x in part) for part in parts]
    found = [losses["position"].item(), losses["mask"].item(), *sums, is_thing[0].sum().item()]
    assert found == pytest.approx(want, abs=2e-3)
    sums = [v.detach().float().abs().sum().item() for v in k.embed({}, None)]
    assert sums == pytest.approx([179.918, 10.368, 17], abs=2e-3)


# --- Queries ------------------------------------------------------------------------------------
def cheapest(logits, x, categories, masks, known):
    """[(segment, query), ...] by trying all permutations, costs in float64."""
    p, few = logits.double().softmax(1), len(masks) <= len(x)
    costs = [[float(-2 * p[n, c] + 5 * entropy_of(x[n], m, known) + 5 * dice_of(x[n], m, known))
              for n in range(len(x))] for c, m in zip(categories.tolist(), masks)]
    rows = costs if few else list(zip(*costs))
    best = min(itertools.permutations(range(len(x) if few else len(masks)), len(rows)),
               key=lambda ks: sum(row[k] for row, k in zip(rows, ks)))
    return sorted(pair if few else pair[::-1] for pair in enumerate(best))


@pytest.mark.parametrize("segments, n", [(3, 5), (4, 4), (1, 6), (5, 3), (4, 1), (0, 3)])
def test_the_match_is_the_cheapest_of_all_permutations(segments, n):
    """Of more segments than queries each query gets one. Costs that are not finite end too."""
    q = Queries(ISTHING, 8, 16)
    for seed in range(4):
        logits, x, c = randn(seed, n, 5) * 2, randn(seed, n, 4, 5), torch.arange(segments) % 4
        masks, known = (randn(seed + 20, segments, 4, 5) > 0).float(), (randn(9, 4, 5) > -1).float()
        pairs = torch.stack(q.match(logits, x, c, masks=masks, known=known), 1)
        assert list(map(tuple, pairs.tolist())) == cheapest(logits, x, c, masks, known)
        x[0] = math.nan if seed % 2 else math.inf
        assert len(q.match(logits, x, c, masks=masks, known=known)[1].unique()) == min(segments, n)


@claim("degeus2023", "5.2", "segments outside of the crop need no query", of="Queries")
@claim("degeus2023", "6.4", "instance segmentation: stuff is no object", of="Queries")
@pytest.mark.parametrize("outside, things_only", [(False, False), (True, False), (False, True)])
def test_every_layer_is_matched_and_supervised(outside, things_only):
    """Unless asked for. "No object" weighs a tenth. Embeddings are those of the last layer; those
    of queries that say no object are left out in inference, on the first image."""
    absent = dict(categories=torch.tensor([0, 1, 2, 1]), crowd=torch.tensor([0, 0, 1, 0]).bool())
    targets = [STREET, replace(TARGETS["void between"], **absent)]
    q = Queries(ISTHING, 8, 16, things_only=things_only)
    features = randn(70, 2, 16, *CELLS).requires_grad_()
    answers = [(randn(50 + k, 2, 6, 5).requires_grad_(),
                (randn(60 + k, 2, 6, 16) * 0.3).requires_grad_()) for k in range(2)]
    q.outside, q.answers = outside, lambda pyramid, features: answers
    losses, embeddings, is_thing = q.losses({}, features, targets)
    want, truth = dict.fromkeys(losses, 0.0), [truth_by_loop(t, CELLS) for t in targets]
    for logits, e in answers:
        costs, name, masks = [], torch.full((2, 6), 4), torch.einsum("bnc,bchw->bnhw", e, features)
        for b, (t, (true, known), x) in enumerate(zip(targets, truth, masks)):
            rows = ~t.crowd & (true.flatten(1).any(1) | outside)
            rows = torch.where(rows & (ISTHING[t.categories] | (not things_only)))[0]
            c, true = t.categories[rows], true[rows]
            pairs = cheapest(logits[b].detach(), x.detach(), c, true, known)
            for k, n in pairs:
                name[b, n] = c[k]
                costs.append([f(x[n], true[k], known) for f in (entropy_of, dice_of)])
            assert e is answers[0][1] or torch.equal(embeddings[b], e[b, [n for _, n in pairs]])
            assert torch.equal(is_thing[b], ISTHING[c])
        weight = torch.where(name < 4, 1, 0.1).double()
        surprise = -logits.double().log_softmax(2).gather(2, name[..., None])[..., 0]
        want["class"] = want["class"] + 2 * (weight * surprise).sum() / weight.sum()
        for key, cost in zip(("mask", "dice"), zip(*costs)):
            want[key] = want[key] + 5 * sum(cost) / len(cost)
    for key in want:
        close(losses[key], want[key])
    same_gradients(sum(losses.values()), sum(want.values()), [features, *itertools.chain(*answers)])
    score, category = logits[0].softmax(1).max(1)
    for found, expected in zip(q.embed({}, None), (e[0], score, category)):
        assert torch.equal(found, expected[category < 4]) and 0 < len(found) < 6


# --- The network --------------------------------------------------------------------------------
def network(family, **how):
    torch.manual_seed(0)
    body = seamless.resnet_fpn("tiny", 16)
    return getattr(unified, family)(ISTHING, body, channels=16, **how).eval()


@claim("degeus2023", "4.1", "embeddings of one crop meet the features of another", of="UnifiedNet")
@claim("degeus2023", "4.1", "it teaches embeddings and features, not categories", of="UnifiedNet")
@pytest.mark.parametrize("family", ["kernels", "queries"])
@pytest.mark.parametrize("ids, paired, partners", [
    ([0, 1, 2, 3], True, [[1, 0, 3, 2]]), ([5, 5], True, [[-1, -1]]),
    ([5, 5, 6], False, [[2, 2, 0], [2, 2, 1]])])
def test_intra_batch_supervision_is_the_loss_of_the_partners(family, ids, paired, partners):
    net, images = network(family, ibs_weight=0.7, paired=paired), randn(0, len(ids), 3, *SIZE)
    targets, pyramid = [replace(STREET, image_id=i) for i in ids], net.body(images)
    features, found = net.encoder(pyramid), net.losses(images, targets)
    losses, embeddings, is_thing = net.family.losses(pyramid, features, targets)
    loss = found.pop("ibs")
    wanted = [0.7 * ibs.ibs_loss(embeddings, features, is_thing, torch.tensor(p)) for p in partners]
    assert found.keys() == losses.keys() and min(abs(loss - w) for w in wanted) < 1e-6
    loss.backward()
    silent = ("family.heat", "family.position_head", "family.classifier")
    taught = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert not any(n.startswith(silent) for n in taught) and (len(taught) > 9 or ids == [5, 5])
    net.ibs_weight = 0
    assert net.losses(images, targets).keys() == losses.keys()


@claim("degeus2023", "3.1", "masks are embeddings times features, then a sigmoid", of="UnifiedNet")
@pytest.mark.parametrize("family", ["kernels", "queries"])
@pytest.mark.parametrize("rows, size, stuff_area", [
    ([0, 1, 2, 3], None, 250_000), ([0, 1, 2], (50, 33), 600_000), ([], None, 0)])
def test_a_prediction_is_embeddings_times_features_merged(family, rows, size, stuff_area):
    """With the limits of the network; instances have masks and boxes, row 3 an empty one."""
    net = network(family, score_threshold=0.65, overlap=0.9, stuff_area=stuff_area)
    features = torch.full((1, 16, *CELLS), -7.3)
    features[0, 0, 2:, :8], features[0, 1, 2:, 7:], features[0, 2, :2] = 9, 9, 9
    e, scores = torch.eye(16)[rows], torch.tensor([0.9, 0.8, 0.7, 0.6])[rows]
    categories = torch.tensor([1, 2, 0, 1])[rows]
    net.family.embed = lambda pyramid, f: (e, scores, categories)
    net.encoder.forward = lambda pyramid: features
    found, (h, w) = net.predict(torch.rand(3, *SIZE), size), size or SIZE
    logits, area = torch.einsum("nc,chw->nhw", e, features[0]), stuff_area * h * w / 2 ** 21
    same_merge(*found[:3], merge_by_loop(logits, scores, categories, (h, w), 0.65, 0.9, area))
    things = torch.where(ISTHING[categories])[0]
    masks = F.interpolate(logits[:, None], (h, w), mode="bilinear")[things, 0] > 0
    want = dict(masks=masks, scores=scores[things], categories=categories[things])
    assert all(torch.equal(found.instances[key], value) for key, value in want.items())
    for mask, box in zip(masks, found.instances["boxes"].tolist()):
        ys, xs = torch.where(mask)
        assert box == ([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(ys) else [0] * 4)


@claim("degeus2023", "6.4", "Acc_th, Prec_th and confusion of masks that overlap", of="Instances")
def test_instances_are_measured_before_they_are_merged():
    """Of things of 24 and 40 pixels a mask has 8 and 32; one is empty; one has too low a score."""
    segments = 1 + (torch.arange(8)[:, None] > 2).long().expand(8, 8)
    sample = data.Sample(None, segments, torch.tensor([1, 1]), torch.zeros(2).bool(), "")
    masks = torch.zeros(3, 8, 8).bool()
    masks[::2, 2:] = True
    found = dict(masks=masks, scores=torch.tensor([0.9, 0.8, 0.2]), categories=torch.ones(3).long())
    report = network("kernels").report()
    assert not any(report.compute().values())
    for _ in range(2):
        report.update(sample, data.Prediction(None, None, None, found))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    report.all_reduce()
    dist.destroy_process_group()
    assert report.compute() == {"Acc_th": 100 * 40 / 64, "Prec_th": 100 * 40 / 48, "confusion": 100,
                                "things an image": 2, "empty masks an image": 1}
