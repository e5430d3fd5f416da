"""The spec of the two networks that ibs.py is tried on: lab/masks.py, kernels.py, queries.py and
unified.py. Frozen numbers, which loops over cells, pixels and segments in float64 confirmed."""
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
@pytest.mark.parametrize("segments, n, want", [
    (3, 5, "02 11 23, 00 12 24, 00 12 21, 02 11 20"), (4, 1, "00, 30, 00, 00"), (0, 3, ", , , "),
    (4, 4, "00 12 21 33, 00 12 21 33, 00 12 21 33, 00 11 23 32"), (1, 6, "01, 02, 00, 04"),
    (5, 3, "00 12 21, 00 12 21, 00 21 42, 02 11 40")])
def test_the_match_is_the_cheapest_of_all_permutations(segments, n, want):
    """Pairs (segment, query) of four seeds, which a search of all permutations confirmed. Of more
    segments than queries each query gets one. Costs that are not finite end too."""
    q, found = Queries(ISTHING, 8, 16), []
    for seed in range(4):
        logits, x, c = randn(seed, n, 5) * 2, randn(seed, n, 4, 5), torch.arange(segments) % 4
        masks, known = (randn(seed + 20, segments, 4, 5) > 0).float(), (randn(9, 4, 5) > -1).float()
        pairs = torch.stack(q.match(logits, x, c, masks=masks, known=known), 1)
        found.append(" ".join(f"{segment}{query}" for segment, query in pairs.tolist()))
        x[0] = math.nan if seed % 2 else math.inf
        assert len(q.match(logits, x, c, masks=masks, known=known)[1].unique()) == min(segments, n)
    assert ", ".join(found) == want


@claim("degeus2023", "5.2", "segments outside of the crop need no query", of="Queries")
@claim("degeus2023", "6.4", "instance segmentation: stuff is no object", of="Queries")
@pytest.mark.parametrize("outside, things_only, want", [
    (False, False, [6.950, 7.761, 5.471, 26.243, 6.021, 12.946, 9.991, 5, 3, 2, 1]),
    (True, False, [6.987, 7.714, 6.025, 30.771, 6.173, 12.364, 9.894, 5, 3, 3, 2]),
    (False, True, [8.138, 7.568, 6.543, 12.746, 6.603, 12.498, 13.738, 3, 3, 1, 1])])
def test_queries_cost_what_loops_said(outside, things_only, want):
    """Frozen numbers, which loops over layers, segments and pixels confirmed: the losses of two
    layers; the sums of matched embeddings and of the gradients of class logits, embeddings,
    features; how many segments of each image are matched, and are things. Inference."""
    absent = dict(categories=torch.tensor([0, 1, 2, 1]), crowd=torch.tensor([0, 0, 1, 0]).bool())
    targets = [STREET, replace(TARGETS["void between"], **absent)]
    q = Queries(ISTHING, 8, 16, things_only=things_only)
    features = randn(70, 2, 16, *CELLS).requires_grad_()
    answers = [(randn(50 + k, 2, 6, 5).requires_grad_(),
                (randn(60 + k, 2, 6, 16) * 0.3).requires_grad_()) for k in range(2)]
    q.outside, q.answers = outside, lambda pyramid, features: answers
    losses, matched, is_thing = q.losses({}, features, targets)
    sum(losses.values()).backward()
    parts = (matched, *([answer[i].grad for answer in answers] for i in (0, 1)), [features.grad])
    sums = [sum(x.detach().abs().sum().item() for x in part) for part in parts]
    counts = [count for b in is_thing for count in (len(b), int(b.sum()))]
    found = [*(losses[key].item() for key in ("class", "mask", "dice")), *sums, *counts]
    assert found == pytest.approx(want, abs=2e-3)
    kept, scores, categories = q.embed({}, None)               # of the last layer, first image
    found = [kept.abs().sum().item(), scores.sum().item(), *categories.tolist()]
    assert found == pytest.approx([14.186, 2.159, 2, 3, 0, 2], abs=2e-3)


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
@pytest.mark.parametrize("rows, size, stuff_area, want", [
    ([0, 1, 2, 3], None, 250_000, [771, 765, 512, 15001, 14951, 1792, 1, 0, 0.9, 0.7]),
    ([0, 1, 2], (50, 33), 600_000, [1042, 608, 21881, 18544, 1, 0.9]),
    ([], None, 0, [2048, 31744])])
def test_a_prediction_is_embeddings_times_features_merged(family, rows, size, stuff_area, want):
    """Frozen numbers, which a loop over masks confirmed: pixels of void and of each segment, sums
    of their rows, categories, scores. Instances have masks and boxes, row 3 an empty one."""
    net = network(family, score_threshold=0.65, overlap=0.9, stuff_area=stuff_area)
    features = torch.full((1, 16, *CELLS), -7.3)
    features[0, 0, 2:, :8], features[0, 1, 2:, 7:], features[0, 2, :2] = 9, 9, 9
    e, scores = torch.eye(16)[rows], torch.tensor([0.9, 0.8, 0.7, 0.6])[rows]
    categories = torch.tensor([1, 2, 0, 1])[rows]
    net.family.embed = lambda pyramid, f: (e, scores, categories)
    net.encoder.forward = lambda pyramid: features
    found, (h, w) = net.predict(torch.rand(3, *SIZE), size), size or SIZE
    sums = torch.bincount(found.segments.flatten(), torch.arange(h * w) // w)
    sums = torch.cat([found.segments.flatten().bincount(), sums, *found[1:3]])
    assert sums.tolist() == pytest.approx(want)
    things, x = torch.where(ISTHING[categories])[0], torch.einsum("nc,chw->nhw", e, features[0])
    masks = F.interpolate(x[:, None], (h, w), mode="bilinear")[things, 0] > 0
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
