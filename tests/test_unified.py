"""The spec of the two networks that ibs.py is tried on: lab/masks.py, kernels.py, queries.py and
unified.py. Frozen numbers, which loops over cells, pixels and segments in float64 confirmed."""
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
    "things": painted((1, 0, 0, 14, 64), (2, 14, 0, 32, 64), (2, 0, 50, 14, 64, "crowd")),
    "one pixel": painted((1, 21, 37, 22, 38)), "a speck of stuff": painted((0, 0, 0, 1, 1))}
STREET = TARGETS["street"]


# --- Kernels ------------------------------------------------------------------------------------
def kernels(*names, heat=None, **how):
    """Random kernels, and heat that is the truth of the first crop; its void is "a thing"."""
    *maps, f = [(randn(s[0], 2, 24, *s) / 2).requires_grad_() for s in (*SIZES, CELLS)]
    k = Kernels(ISTHING, 8, 24, strides=(2, 4, 8), layers=1, width=8, **how)    # two levels a thing
    levels = k.truth(TARGETS[names[0]], SIZES)
    heat = heat or [torch.stack([*v.heat[:-1], v.heat[-1].maximum(1 - v.known)]).logit(1e-4)[None]
                    for v in levels]
    k.maps = lambda pyramid: list(zip(heat, maps))
    return k.embed({}, f), maps, f, levels, *k.losses({}, f, [TARGETS[name] for name in names])


@pytest.mark.parametrize("name, want", [
    ("street", [3.298, 11.677, 1.532, 6.566, 14.818, 20, 147.340, 0.301, 10]),
    ("stuff", [3.105, 11.251, 1.829, 6.149, 16.182, 16, 104.693, 0.322, 0]),
    ("things", [3.733, 11.083, 1.484, 6.604, 15.211, 14, 110.248, 0.318, 11]),
    ("one pixel", [1.771, 11.311, 0.953, 5.968, 12.853, 11, 86.743, 0.330, 1])])  # without a cell
def test_kernels_cost_what_loops_over_cells_said(name, want):
    """Losses; gradients of heat, kernels, features; weights, kernels; IBS; things; embed."""
    heat = [(randn(20 + n, 2, 5, *s) * 2 - 3.5).requires_grad_() for n, s in enumerate(SIZES)]
    embedded, maps, f, _, losses, [(e, thing, w)] = kernels(
        name, "street", heat=heat, positions=3, detections=14, similarity=0.1)
    sum(losses.values()).backward()
    parts = [*([x.grad for x in v] for v in (heat, maps, [f])), w, [a.T * b for a, b in zip(e, w)]]
    found = [*losses.values(), *(sum(x.abs().sum() for x in part) for part in parts),
             ibs.ibs_loss(e, f, thing, torch.tensor([1, 0]), weights=w),
             thing[0][w[0] > 0].sum(), *(x.abs().sum() for x in embedded)]
    assert [v.item() for v in found] == pytest.approx([*want, 79.158, 1.794, 14], abs=2e-3)


@pytest.mark.parametrize("coordinates", [True, False])
def test_without_coordinates_a_kernel_is_the_same_at_every_place(coordinates):
    net = unified.kernels(ISTHING, seamless.resnet_fpn("tiny", 8), strides=(4,), layers=1,
                          coordinates=coordinates)
    (_, found), = net.family.maps({4: torch.ones(1, 8, 9, 9)})
    found = found[..., 1:-1, 1:-1]                             # the border sees zeros
    assert torch.allclose(found, found[..., :1, :1], atol=1e-5) == (not coordinates)
    assert net.encoder.out[0][0].in_channels == 64 + 2 * coordinates


@pytest.mark.parametrize("name", TARGETS)
def test_embeddings_of_stuff_agree_between_training_and_inference(name):
    (found, _, c), _, _, levels, _, [(e, thing, _)] = kernels(name)
    names = TARGETS[name].categories[torch.cat([level.stuff for level in levels])]
    mean = (names.unique()[:, None] == names).float()          # over levels
    torch.testing.assert_close(found[~ISTHING[c]], mean @ e[0][~thing[0]] / mean.sum(1)[:, None])


@pytest.mark.parametrize("name", ["street", "void between", "things"])
def test_every_kernel_that_inference_can_use_is_supervised(name):
    (x, _, c), maps, f, levels, _, [(e, thing, w)] = kernels(name, positions=32, similarity=1.0)
    taught = (x[ISTHING[c], None] == e[0][thing[0] & (w[0] > 0)]).all(2).any(1)
    assert taught.all() and len(taught) == sum(len(level.things) for level in levels)
    ibs.ibs_loss(e, f, thing, torch.tensor([1]), weights=w).backward()     # on another crop
    for x, level in zip(maps, levels):
        assert torch.equal(x.grad[0].any(0), level.cells.any(0))


# --- Queries ------------------------------------------------------------------------------------
@pytest.mark.parametrize("segments, n, want", [
    (3, 5, "02 11 23, 00 12 24, 00 12 21, 02 11 20"), (4, 1, "00, 30, 00, 00"), (0, 3, ", , , "),
    (4, 4, "00 12 21 33, 00 12 21 33, 00 12 21 33, 00 11 23 32"), (1, 6, "01, 02, 00, 04"),
    (5, 3, "00 12 21, 00 12 21, 00 21 42, 02 11 40")])
def test_the_match_is_the_cheapest_of_all_permutations(segments, n, want):
    """Pairs (segment, query) of four seeds, confirmed by permutations. Infinite costs end too."""
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
    (False, False, [9.829, 11.838, 8.256, 53.086, 8.820, 20.235, 12.061, 5, 3, 2, 1]),
    (True, False, [9.900, 11.753, 9.087, 61.747, 9.015, 19.222, 12.256, 5, 3, 3, 2]),
    (False, True, [11.653, 11.721, 9.900, 27.402, 9.634, 20.392, 16.686, 3, 3, 1, 1])])
def test_queries_cost_what_loops_said(outside, things_only, want):
    """Losses; sums of embeddings; of gradients of logits, embeddings, features; counts; embed."""
    absent = dict(categories=torch.tensor([0, 1, 2, 1]), crowd=torch.tensor([0, 0, 1, 0]).bool())
    targets = [STREET, replace(TARGETS["void between"], **absent)]
    q = Queries(ISTHING, 8, 16, things_only=things_only)
    features = randn(70, 2, 16, *CELLS).requires_grad_()
    answers = [(randn(50 + k, 2, 6, 5).requires_grad_(),
                (randn(60 + k, 2, 6, 16) * 0.3).requires_grad_()) for k in range(3)]
    q.outside, q.answers = outside, lambda pyramid, features: answers
    losses, [(first, _, _), (second, is_thing, _)] = q.losses({}, features, targets)
    sum(losses.values()).backward()
    parts = (first + second, *([a[i].grad for a in answers] for i in (0, 1)), [features.grad])
    found = [*losses.values(), *(sum(x.abs().sum() for x in part) for part in parts),
             *(n for b in is_thing for n in (torch.tensor(len(b)), b.sum()))]
    kept, scores, categories = q.embed({}, None)
    found = [v.item() for v in (*found, kept.abs().sum(), scores.sum(), *categories)]
    assert found == pytest.approx([*want, 19.427, 2.249, 0, 0, 1, 0, 3], abs=2e-3)


def test_pixels_nearest_to_zero_and_some_at_random_meet_intra_batch_supervision():
    q, x = Queries(ISTHING, 8, 16, points=8), randn(80, 3, 20).requires_grad_()
    found, rare = [q.ibs_pixels(x) for _ in range(200)], q.ibs_pixels(torch.arange(1e3)[None])
    assert torch.equal(found[0][:, :6].abs().sort(1)[0], x.abs().sort(1)[0][:, :6])
    assert torch.equal(torch.stack(found)[:, 0, 6:].unique(), x[0].unique())
    assert torch.autograd.grad(found[0].sum(), x)[0].sum(1).tolist() == [8, 8, 8]
    assert torch.equal(q.ibs_pixels(x[:, :8]), x[:, :8]) and rare[0, :6].mean() > 6  # of 24


# --- The network --------------------------------------------------------------------------------
def network(family, **how):
    torch.manual_seed(0)
    how |= {"channels": 16} | ({"strides": (8, 16, 32), "width": 8} if family == "kernels" else {})
    return getattr(unified, family)(ISTHING, seamless.resnet_fpn("tiny", 16), **how).eval()


@claim("degeus2023", "4.1", "embeddings of one crop meet the features of another", of="UnifiedNet")
@claim("degeus2023", "4.1", "it teaches embeddings and features, not categories", of="UnifiedNet")
@pytest.mark.parametrize("family", ["kernels", "queries"])
@pytest.mark.parametrize("ids, paired, partners", [
    ([0, 1, 2, 3], True, [[1, 0, 3, 2]]), ([5, 5], True, [[-1, -1]]),
    ([5, 5, 6], False, [[2, 2, 0], [2, 2, 1]])])
def test_intra_batch_supervision_is_the_loss_of_the_partners(family, ids, paired, partners):
    net, images = network(family, ibs_weight=0.7, paired=paired), randn(0, len(ids), 3, *SIZE)
    targets, pyramid = [replace(STREET, image_id=i) for i in ids], net.body(images)
    net.family.ibs_pixels = pixels = lambda logits: logits[:, 5:]
    features, found = net.encoder(pyramid), net.losses(images, targets)
    (losses, layers), loss = net.family.losses(pyramid, features, targets), found.pop("ibs")
    wanted = itertools.product(*([ibs.ibs_loss(e, features, x, torch.tensor(p), weights=w,
        pixels=pixels) for p in partners] for e, x, w in layers))
    assert found.keys() == losses.keys() and min(abs(loss - 0.7 * sum(w)) for w in wanted) < 1e-6
    loss.backward()
    silent = ("family.heat", "family.position_head", "family.classifier")
    taught = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert not any(n.startswith(silent) for n in taught) and (len(taught) > 9 or ids == [5, 5])
    net.ibs_weight = 0
    assert net.losses(images, targets).keys() == losses.keys()


@claim("degeus2023", "3.1", "masks are embeddings times features, then a sigmoid", of="UnifiedNet")
@pytest.mark.parametrize("family", ["kernels", "queries"])
@pytest.mark.parametrize("rows, size, stuff_area, want", [
    ([0, 1, 2, 3], None, 250_000, ([898, 767, 383, 15439, 14968, 1337, 1, 0, 0.89989, 0.7], [
        151, 765, 749, 383, 633, 14951, 14823, 1337, 1, 2, 0, 0.9, 0.8, 0.7])),
    ([0, 1, 2], (50, 33), 600_000, ([1007, 643, 20761, 19664, 1, 0.89989], [
        1027, 623, 21012, 19413, 2, 0.8])), ([], None, 0, ([2048, 31744],) * 2)])
def test_a_prediction_is_embeddings_times_features_merged(family, rows, size, stuff_area, want):
    """Frozen numbers, which a loop over masks confirmed: pixels of void and of each segment, sums
    of their rows, categories, scores. Row 1 is unsure: kernels drop it. Row 3 wins void alone."""
    net = network(family, score_threshold=0.65, overlap=0.97, stuff_area=stuff_area)
    features = torch.full((1, 16, *CELLS), -7.3)
    features[0, 0, 2:, :8], features[0, 1, 2:, 7:], features[0, 2, :2, :12] = 9, 9, 9
    features[0, 1, 2:, 11:], features[0, 1, :2, 12:], features[0, 3, :2, 14:] = 0.5, -1, -0.5
    e, categories = torch.eye(16)[rows], torch.tensor([1, 2, 0, 1])[rows]
    answer = e, torch.tensor([0.9, 0.8, 0.7, 0.66])[rows], categories
    net.family.embed, net.encoder.forward = lambda p, f: answer, lambda p: features
    found, (h, w) = net.predict(torch.rand(3, *SIZE), size), size or SIZE
    sums, one = torch.bincount(found.segments.flatten(), torch.arange(h * w) // w), found[3]
    sums = torch.cat([found.segments.flatten().bincount(), sums, *found[1:3]])
    assert sums.tolist() == pytest.approx(want[family == "queries"], abs=1e-5)
    things, x = torch.where(ISTHING[categories])[0], torch.einsum("nc,chw->nhw", e, features[0])
    masks = F.interpolate(x[:, None], (h, w), mode="bilinear")[things, 0] > 0
    assert torch.equal(one["masks"], masks) and torch.equal(one["categories"], categories[things])
    assert one["scores"].tolist() == pytest.approx([0.89989, 0.63216, 0][:len(things)], abs=1e-5)
    for mask, box in zip(masks, one["boxes"].tolist()):
        ys, xs = torch.where(mask)
        assert box == ([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(ys) else [0] * 4)


@claim("degeus2023", "6.4", "Acc_th, Prec_th and confusion of masks that overlap", of="Instances")
def test_instances_are_measured_before_they_are_merged():
    """Of things of 24 and 40 pixels a mask has 8 and 32; one is empty; one has too low a score."""
    segments = 1 + (torch.arange(8)[:, None] > 2).long().expand(8, 8)
    sample = data.Sample(None, segments, torch.tensor([1, 1]), torch.zeros(2).bool(), "")
    masks = torch.tensor([True, False, True])[:, None, None] & (torch.arange(64).view(8, 8) > 15)
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
