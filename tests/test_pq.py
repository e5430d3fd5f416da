"""The spec of pq.py and lab/ap.py. The oracles are loops over segments and detections, written from
the definitions; the official evaluations' numbers of the same random images are kept below."""
import numpy as np
import pytest
import torch
import torch.distributed as dist

import pq
from claims import claim
from lab.ap import AveragePrecision, average_precision, boxes_of
from lab.paint import Dice
from pq import PanopticQuality, confusion_ratio, instance_pixels, mask_intersections

ISTHING = [False, False, False, True, True, True]              # the last category is never used
C = len(ISTHING)
# What cityscapesscripts 2.3.0 and pycocotools 2.0.11 say of IMAGES and AP_IMAGES, in percent.
OFFICIAL = {"PQ": 36.3381489795, "SQ": 72.9212540804, "RQ": 49.7999409895,
            "PQ_th": 35.6194491154, "SQ_th": 71.905877834, "RQ_th": 49.5528648306,
            "PQ_st": 36.8172822222, "SQ_st": 73.598171578, "RQ_st": 49.9646584287}
OFFICIAL_AP = {                                                # AP, .50, .75, small, medium, large
    "mask": [48.02915826, 67.80876493, 57.42680604, 50.64968266, 47.09660052, 85.0],
    "box": [54.4217034, 69.71795536, 56.9796202, 45.26237624, 59.36401862, 18.65190773]}


# --- Random images ----------------------------------------------------------------------------
class Rolls(Dice):
    """Random numbers that no version of numpy changes."""

    def rolls(self, *shape):
        return self.field(*shape).astype(float)

    def integers(self, low, high, *shape):
        return (low + (high - low) * self.rolls(*shape)).astype(int)


def random_image(seed):
    """A truth of 4x5 cells and a prediction with cells moved, pixels changed, segments merged or of
    another category; void, crowds; each id has a pixel -> arguments of PanopticQuality.update."""
    g = Rolls(seed)
    G = 1 + int(8 * g())
    cells = g.integers(0, G + 1, 4, 5)
    moved = np.where(g.rolls(4, 5) < 0.25, g.integers(0, G + 1, 4, 5), cells)
    gt, pred = (m.repeat(4, 0).repeat(3, 1) for m in (cells, moved))
    pred = np.where(g.rolls(*pred.shape) < 0.1, g.integers(0, G + 1, *pred.shape), pred)
    if g() < 0.3:
        pred[pred == 1] = min(2, G)
    gt_categories = g.integers(0, C - 1, G)
    pred_categories = np.where(g.rolls(G) < 0.2, g.integers(0, C - 1, G), gt_categories)
    crowd = g.rolls(G) < 0.25

    def compact(m):
        ids = np.unique(m[m > 0])
        return torch.from_numpy(np.searchsorted(ids, m) * (m > 0) + (m > 0)), ids - 1
    (gt, gt_ids), (pred, pred_ids) = compact(gt), compact(pred)
    return (pred, torch.from_numpy(pred_categories[pred_ids]), gt,
            torch.from_numpy(gt_categories[gt_ids]), torch.from_numpy(crowd[gt_ids]))


IMAGES = [random_image(seed) for seed in range(150)]


def measure(images, isthing=ISTHING, **options):
    metric = PanopticQuality(isthing, **options)
    for image in images:
        metric.update(*image)
    return metric.compute()


def rows(text):
    """Rows of digits -> a map [H, W]."""
    return torch.tensor([[int(v) for v in row] for row in text.split()])


def stack(segments, count):
    """bool [count, H, W] of segments 1..count."""
    return segments == torch.arange(1, count + 1)[:, None, None]


def one(pred, pred_categories, gt, gt_categories, crowd=None, **options):
    """The metric of one image; categories 0 and 1 are things, 2 and 3 stuff."""
    image = (rows(pred), pred_categories, rows(gt), gt_categories, crowd)
    return measure([image], [True, True, False, False], **options)


def counts(result, category=0):
    return tuple(result["per_category"][category][key] for key in ("tp", "fp", "fn"))


# --- The loop over segments -------------------------------------------------------------------
def loop_over_segments(images, rule):
    """Counts and sums by their definitions, {name: [C]}."""
    names = ("tp", "fp", "fn", "iou", "pairs", "pairs_iou", "right", "hit", "true", "predicted")
    s = {name: np.zeros(C) for name in names}
    for pred, pred_categories, gt, gt_categories, crowd in images:
        truths = list(zip(stack(gt, len(crowd)), gt_categories.tolist(), crowd.tolist()))
        guesses = list(zip(stack(pred, len(pred_categories)), pred_categories.tolist()))
        judged, matched = gt > 0, set()
        for g, c, is_crowd in truths:
            if is_crowd:
                judged = judged & ~g
                continue
            before = len(matched)
            for i, (p, cp) in enumerate(guesses):
                both, either = (p & g).sum().item(), (p & (gt > 0) | g).sum().item()
                if c == cp and both:
                    s["pairs"][c] += 1
                    s["pairs_iou"][c] += both / either
                if c == cp and 2 * both > either:
                    matched.add(i)
                    s["tp"][c] += 1
                    s["iou"][c] += both / either
                    s["right"][c] += both
            assert len(matched) <= before + 1                  # no match is shared
            excused = rule == "seamless" and 2 * (g & (pred == 0)).sum() > g.sum()
            s["fn"][c] += len(matched) == before and not excused
        for i, (p, c) in enumerate(guesses):
            crowds = [g for g, cg, is_crowd in truths if is_crowd and cg == c]
            free = (gt == 0) | (crowds[-1] if crowds else False)
            s["fp"][c] += i not in matched and bool(2 * (p & free).sum() <= p.sum())
        true, guess = (torch.cat([torch.tensor([-1]), c])[m][judged]
                       for m, c in ((gt, gt_categories), (pred, pred_categories)))
        for c in range(C):
            s["true"][c] += (true == c).sum()
            s["predicted"][c] += (guess == c).sum()
            s["hit"][c] += ((true == c) & (guess == c)).sum()
    return s


@pytest.mark.filterwarnings("ignore:invalid value")            # 0/0 where nothing occurs
@pytest.mark.parametrize("rule", ["coco", "seamless"])
def test_all_measures_agree_with_a_loop_over_segments(rule):
    """On 150 images with void and crowds; the means run over the categories that occur."""
    result, s = measure(IMAGES, void_rule=rule), loop_over_segments(IMAGES, rule)
    weight, thing = s["tp"] + s["fp"] / 2 + s["fn"] / 2, np.array(ISTHING)
    want = {"pq": 100 * s["iou"] / weight, "rq": 100 * s["tp"] / weight,
            "sq": 100 * s["iou"] / np.where(weight, np.maximum(s["tp"], 1), np.nan),
            "iou": 100 * s["hit"] / (s["true"] + s["predicted"] - s["hit"])}
    want["pq_dagger"] = np.where(thing, want["pq"], 100 * s["pairs_iou"] / s["pairs"])
    for key, column in {**want, **{key: s[key] for key in ("tp", "fp", "fn")}}.items():
        found = [row[key] for row in result["per_category"]]
        assert found == pytest.approx(column.tolist(), abs=1e-9, nan_ok=True), key
    for suffix, group in (("", thing | ~thing), ("_th", thing), ("_st", ~thing)):
        for name, key in (("PQ", "pq"), ("SQ", "sq"), ("RQ", "rq"), ("PQ_dagger", "pq_dagger")):
            mean = np.nanmean(want[key][group])
            assert result[name + suffix] == pytest.approx(mean, abs=1e-9), name + suffix
    right, true, predicted = (s[key][thing].sum() for key in ("right", "true", "predicted"))
    whole = [100 * right / true, 100 * right / predicted, np.nanmean(want["iou"])]
    assert [result[k] for k in ("Acc_th", "Prec_th", "mIoU")] == pytest.approx(whole, abs=1e-9)


@claim("kirillov2019", "Section 4", "PQ, SQ and RQ of the official code", of="PanopticQuality")
def test_pq_sq_rq_equal_the_official_evaluation():
    result = measure(IMAGES)
    assert {name: result[name] for name in OFFICIAL} == pytest.approx(OFFICIAL, abs=1e-9)


def test_the_plain_definition_agrees_without_crowds():
    images = [image for image in IMAGES if not image[4].any()]
    images.append((rows("1110"), [0, 0], rows("1000"), [0, 0], None))  # ids without pixels
    result = measure(images)
    for c in range(C):
        iou, *want = (sum(v) for v in zip(*(pq.plain_pq(*i[:4], category=c) for i in images)))
        assert counts(result, c) == tuple(want)
        if want[0]:
            assert result["per_category"][c]["sq"] == pytest.approx(100 * iou / want[0], abs=1e-4)
    assert pq.plain_pq(rows("1100"), [0], rows("1111"), [0], category=0) == (0, 0, 1, 1)


# --- PQ, by hand ------------------------------------------------------------------------------
@claim("kirillov2019", "Section 4.1", "PQ = SQ x RQ, and RQ is F1", of="PanopticQuality")
def test_pq_is_sq_times_rq():
    """Matches of IoU 3/4 and 2/3, three FP, two FN; F1 of 2/5 and 2/4."""
    result = one("1110222" "345", [0] * 5, "1111344" "222", [0] * 4)
    sq, rq = (3 / 4 + 2 / 3) / 2, 2 / (5 / 2 + 4 / 2)
    found = [result[name] / 100 for name in ("SQ", "RQ", "PQ")]
    assert counts(result) == (2, 3, 2) and found == pytest.approx([sq, rq, sq * rq])


def section4(text):
    return claim("porzi2019", "Section 4", text, of="PanopticQuality")


# Prediction, truth, their categories, crowd flags of the truth, void rule; (TP, FP, FN) of
# category 0.
COUNTS = [
    pytest.param("1100", "1111", [0], [0], None, "coco", (0, 1, 1),
                 marks=section4("an IoU of exactly 1/2 is no match")),
    ("11100", "11111", [0], [0], None, "coco", (1, 0, 0)),
    pytest.param("111111", "110000", [0], [0], None, "coco", (1, 0, 0),
                 marks=section4("void pixels of the truth are in no union")),
    ("1111", "1122", [0], [0, 1], [False, True], "coco", (0, 1, 1)),            # a crowd's are
    pytest.param("11111", "00022", [0], [0, 1], None, "coco", (0, 0, 0),
                 marks=section4("a prediction more than half on void is no false positive")),
    ("1111", "0022", [0], [0, 1], None, "coco", (0, 1, 0)),                     # half on void
    ("11111", "01122", [0], [0, 1], [True, False], "coco", (0, 0, 0)),          # void and crowd
    ("11111", "01122", [0], [1, 1], [True, False], "coco", (0, 1, 0)),          # another's crowd
    ("11111", "11122", [0], [0, 0], [True, True], "coco", (0, 1, 0)),           # the last crowd
    ("11111", "22211", [0], [0] * 3, [True] * 3, "coco", (0, 0, 0)),            # ... that shows
    ("1111", "1111", [0], [0], [True], "coco", (0, 0, 0)),                      # no match, no miss
    ("0000", "1111", [], [0], [True], "coco", (0, 0, 0)),
    ("00011", "11111", [1], [0], None, "coco", (0, 0, 1)),                      # predicted void
    pytest.param("00011", "11111", [1], [0], None, "seamless", (0, 0, 0),
                 marks=section4("a segment more than half under predicted void is not missed")),
    ("0011", "1111", [1], [0], None, "seamless", (0, 0, 1)),
    ("1100", "1100", [0] * 3, [0] * 3, None, "coco", (1, 0, 0)),                # ids without pixels
    ("0000", "1111", [], [0], None, "coco", (0, 0, 1)),                         # no prediction
    ("0000", "0000", [], [], None, "coco", (0, 0, 0)),                          # all void
]


@pytest.mark.parametrize("pred, gt, pred_categories, gt_categories, crowd, rule, want", COUNTS)
def test_tp_fp_fn_by_hand(pred, gt, pred_categories, gt_categories, crowd, rule, want):
    result = one(pred, pred_categories, gt, gt_categories, crowd=crowd, void_rule=rule)
    assert counts(result) == want
    assert np.isnan(result["per_category"][0]["pq"]) == (want == (0, 0, 0))


# --- PQ-dagger --------------------------------------------------------------------------------
@claim("porzi2019", "Figure 3", "PQ of stuff drops to 0 below an IoU of 1/2, PQ-dagger does not",
       of="PanopticQuality", figure="pq.png")
@pytest.mark.parametrize("iou, expected", [(46, 0), (49, 0), (51, 51), (62, 62)])
def test_the_cliff(iou, expected):
    pred, gt = torch.zeros(2, 1, 100, dtype=torch.int64)
    gt[:], pred[0, :iou] = 1, 1
    result = measure([(pred, [0], gt, [0])])
    assert result["PQ"] == pytest.approx(expected) and result["PQ_dagger"] == pytest.approx(iou)


@section4("PQ-dagger is the mean IoU of the pairs; things keep PQ")
def test_pq_dagger_averages_the_pairs():
    gt, half, most = rows("1111"), rows("1100"), rows("0111")
    result = measure([(half, [0], gt, [0]), (most, [0], gt, [0])])
    assert result["PQ_dagger_st"] == pytest.approx(100 * (2 / 4 + 3 / 4) / 2)
    assert result["PQ_st"] == pytest.approx(100 * (3 / 4) / (1 + 1 / 2 + 1 / 2))
    thing = one("11000", [0], "11111", [0])
    assert thing["PQ_dagger"] == thing["PQ"] == 0


@section4("stuff that is hallucinated or missed completely is in no pair")
@pytest.mark.parametrize("pred, gt", [(0, 3), (3, 0)])
def test_pq_dagger_ignores_stuff_without_a_partner(pred, gt):
    ones = torch.ones(1, 4).long()
    row = measure([(ones, [0], ones, [0]), (ones, [pred], ones, [gt])])["per_category"][0]
    assert row["pq_dagger"] == 100 and row["pq"] == pytest.approx(100 / 1.5)


def test_pq_dagger_where_no_pair_exists():
    """0 for a category that occurs, left out if it never does or is crowd; a pair counts even where
    both its segments are excused."""
    result = one("1111", [3], "1111", [2])
    assert [result["per_category"][c]["pq_dagger"] for c in (2, 3)] == [0, 0]
    assert np.isnan(one("1111", [2], "1111", [2])["per_category"][3]["pq_dagger"])
    assert np.isnan(one("1111", [2], "1111", [2], [True])["PQ_dagger"])
    result = one("001111", [2], "111000", [2], void_rule="seamless")
    assert counts(result, 2) == (0, 0, 0) and np.isnan(result["PQ"])
    assert result["PQ_dagger"] == pytest.approx(100 / 3)


# --- Acc_th, Prec_th, mIoU --------------------------------------------------------------------
@claim("degeus2023", "Section 3.3", "Acc_th counts pixels where PQ counts segments",
       of="PanopticQuality", figure="pq.png")
def test_one_large_confused_thing_costs_little_pq_and_much_accuracy():
    gt = torch.arange(1, 11).repeat_interleave(torch.tensor([1] * 8 + [40, 40]))[None]
    result = measure([(gt.clamp(max=9), [3] * 9, gt, [3] * 10)])
    assert result["PQ_th"] == pytest.approx(100 * 8 / (8 + 1 / 2 + 2 / 2))
    assert result["Acc_th"] == result["Prec_th"] == pytest.approx(100 * 8 / 88)


@claim("degeus2023", "Eq. 2 and 3", "right is a pixel that a thing shares with its match",
       of="PanopticQuality")
def test_acc_and_prec_by_hand():
    """Pixels under true void or crowd count neither as missed nor as wrong."""
    result = one("1110003333", [0, 0, 2], "1111223333", [0, 0, 2])
    assert (result["Acc_th"], result["Prec_th"]) == pytest.approx((100 * 3 / 6, 100))
    result = one("111122444", [0, 0, 0, 1], "111300555", [0, 0, 2, 0, 1], [False] * 4 + [True])
    assert (result["Acc_th"], result["Prec_th"]) == pytest.approx((100, 100 * 3 / 4))
    result = one("11111", [0], "11122", [0, 0])
    assert result["Acc_th"] == result["Prec_th"] == pytest.approx(100 * 3 / 5)
    assert one("1100", [2], "1111", [2])["mIoU"] == pytest.approx(50)
    assert one("1122", [0, 0], "1222", [0, 0])["mIoU"] == 100  # it does not see instances


# --- Confusion, and masks that overlap --------------------------------------------------------
def overlapping(seed):
    """The predicted segments of an image as masks, some doubled, half of them grown by a pixel,
    with scores in no order -> masks, scores, categories, truth, its categories, crowd."""
    pred, pred_categories, gt, gt_categories, crowd = random_image(seed)
    g, P = Rolls(1000 + seed), len(pred_categories)
    which = torch.from_numpy(g.rolls(2 * P).argsort()[:P] % P)
    masks = stack(pred, P)[which]
    masks[::2, 1:] |= masks[::2, :-1].clone()
    scores = torch.from_numpy(g.rolls(P).argsort() / 100)
    return masks, scores, pred_categories[which], gt, gt_categories, crowd


@claim("degeus2023", "Figure 5", "confused: more than T% of each of at least two true things",
       of="confusion_ratio")
def test_confusion_agrees_with_a_loop():
    """Of segments, of the same as masks, and of masks that overlap, each by itself."""
    T, most = [0, 10, 33.3, 50, 80], 0
    for seed, (pred, pred_categories, gt, gt_categories, crowd) in enumerate(IMAGES):
        things = [gt == j for j, c in enumerate(gt_categories.tolist(), 1)
                  if ISTHING[c] and not crowd[j - 1]]
        apart = stack(pred, len(pred_categories)), pred_categories
        overlap = overlapping(seed)
        for given, masks, categories in ((pred, *apart), (apart[0], *apart),
                                         (overlap[0], overlap[0], overlap[2])):
            chosen = [m for m, c in zip(masks, categories.tolist()) if ISTHING[c] and m.any()]
            covered = [[(m & g).sum().item() / g.sum().item() for g in things] for m in chosen]
            expected = [sum(sum(v > t / 100 for v in row) >= 2 for row in covered) for t in T]
            found = confusion_ratio(given, categories, gt, gt_categories, isthing=ISTHING,
                                    thresholds=T, gt_crowd=crowd)
            assert [v.tolist() for v in found] == [expected, [len(chosen)] * len(T)]
            most = max(most, expected[3])
    assert most > 0 and found[0].dtype == found[1].dtype == torch.int64
    for pred in (rows("111100"), rows("111100")[None] > 0):    # 100% of one and 50% of the other
        confused, _ = confusion_ratio(pred, [3], rows("112222"), [3, 3, 3], isthing=ISTHING,
                                      thresholds=[49, 50])
        assert confused.tolist() == [1, 0]


@claim("degeus2023", "Section 6.4", "Acc_th and Prec_th of instances whose masks overlap",
       of="instance_pixels")
def test_pixels_of_overlapping_masks_agree_with_loops():
    for seed in range(150):
        masks, scores, categories, gt, gt_categories, crowd = overlapping(seed)
        truths = list(zip(stack(gt, len(crowd)), gt_categories.tolist(), crowd.tolist()))
        judged = sum((g for g, _, is_crowd in truths if not is_crowd), gt < 0)
        right, predicted, taken = 0, 0, set()
        for d in scores.argsort(descending=True).tolist():
            if not ISTHING[categories[d]]:
                continue
            predicted += (masks[d] & judged).sum().item()
            for k, (g, c, is_crowd) in enumerate(truths):
                both, either = (masks[d] & g).sum(), (masks[d] & (gt > 0) | g).sum()
                free = c == categories[d] and not is_crowd and k not in taken
                if free and 2 * both > either:
                    taken.add(k)
                    right += both.item()
        true = sum(g.sum().item() for g, c, is_crowd in truths if ISTHING[c] and not is_crowd)
        found = instance_pixels(masks, scores, categories, gt, gt_categories, isthing=ISTHING,
                                gt_crowd=crowd)
        assert found.tolist() == [right, true, predicted] and found.dtype == torch.int64, seed
    gt_categories, crowd = [*gt_categories, 3], [*crowd, False]          # a thing without a pixel
    assert torch.equal(found, instance_pixels(masks, scores, categories, gt, gt_categories,
                                              isthing=ISTHING, gt_crowd=crowd))


@pytest.mark.parametrize("memory, chunks", [(1, 1001), (40, 51), (2 ** 24, 1)])
def test_intersections_do_not_depend_on_the_chunks(memory, chunks, monkeypatch):
    pred, gt = torch.ones(2, 11, 91, dtype=torch.bool), torch.ones(11, 91, dtype=torch.int64)
    pred[1, 3:], gt[5, 5], calls, bincount = False, 2, [], torch.bincount
    monkeypatch.setattr(torch, "bincount", lambda *a, **k: calls.append(a) or bincount(*a, **k))
    inter, area = mask_intersections(pred, gt, 2, memory=memory)
    assert inter.tolist() == [[1000, 1], [273, 0]] and area.tolist() == [1001, 273]
    assert len(calls) == chunks


# --- Average precision ------------------------------------------------------------------------
def ap_images(kind):
    """The images above eight times as large, for all three ranges of area; many equal scores."""
    predictions, truths = [], []
    for seed in range(60):
        masks, scores, categories, gt, *truth = overlapping(seed)
        if seed % 2:                                           # the truth, half of it 2 pixels off
            masks, categories = stack(gt, len(truth[0])), truth[0]
            scores = torch.from_numpy(Rolls(seed).rolls(len(masks)))
        masks, gt = (m.repeat_interleave(8, -1).repeat_interleave(8, -2) for m in (masks, gt))
        masks[::2] = masks[::2].roll(2 * (seed % 2), 2)
        keep = masks.any(2).any(1)
        pred = masks[keep] if kind == "mask" else boxes_of(masks[keep], int(keep.sum()))
        predictions.append((pred, (10 * scores[keep]).round() / 10, categories[keep]))
        truths.append((gt, *truth))
    return predictions, truths


AP_IMAGES = {kind: ap_images(kind) for kind in ("mask", "box")}


@pytest.mark.parametrize("kind", AP_IMAGES)
def test_ap_equals_pycocotools(kind):
    """COCO's rule with ties, crowds and each area range, whichever way the truth is written."""
    predictions, truths = AP_IMAGES[kind]
    found = average_precision(predictions, truths, C, kind=kind)
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    assert [found[name] for name in names] == pytest.approx(OFFICIAL_AP[kind], abs=1e-6)
    each = list(found["per_threshold"].values())
    assert each[0] == found["AP50"] and np.mean(each) == pytest.approx(found["AP"])
    assert np.nanmean(found["per_category"]) == pytest.approx(found["AP"])
    stacks = [(stack(gt, len(categories)), categories, crowd) for gt, categories, crowd in truths]
    assert str(average_precision(predictions, stacks, C, kind=kind)) == str(found)
    few = average_precision(predictions, truths, C, kind=kind, iou_thresholds=(0.5, 0.7))
    assert np.isnan(few["AP75"]) and few["AP"] == pytest.approx((each[0] + each[4]) / 2)


M = torch.eye(2).bool()[..., None].repeat(1, 1, 10)            # two masks [2, 10]


# --- Refusals, ranks, text, demo --------------------------------------------------------------
ONES, MASKS = torch.ones(2, 2).long(), torch.ones(2, 2, 2).bool()


def update(pred=ONES, pred_categories=(0,), gt=ONES, gt_categories=(0,), crowd=None):
    PanopticQuality(ISTHING).update(pred, pred_categories, gt, gt_categories, crowd)


def update_ap(pred=M, scores=(0.5, 0.4), categories=(0, 1), gt=M, gt_categories=(0, 1)):
    AveragePrecision(2).update(pred, scores, categories, gt, gt_categories)


def pixels(masks=MASKS, scores=(1, 1), categories=(3, 3), gt=ONES):
    instance_pixels(masks, scores, categories, gt, [3], isthing=ISTHING)


@pytest.mark.parametrize("call, arguments, sentence", [
    (update, dict(pred=torch.zeros(2, 3).long()), r"\[2, 3\] and ground truth segments \[2, 2\] m"),
    (update, dict(pred=ONES[0], gt=ONES[0]), r"must be maps \[H, W\]"),
    (update, dict(pred=rows("02 00")), "predicted segments hold ids from 0 to 2, but there are 1"),
    (update, dict(gt=-rows("03 00")), "ground truth segments hold ids from -3 to 0"),
    (update, dict(pred_categories=[C]), "predicted categories must lie in 0 to 5"),
    (update, dict(gt_categories=[-1]), "ground truth categories must lie in 0 to 5"),
    (update, dict(crowd=[True, False]), "1 ground truth categories but 2 crowd flags"),
    (PanopticQuality, dict(isthing=ISTHING, void_rule="no"), "void_rule must be 'coco' or"),
    (PanopticQuality(ISTHING).table, dict(names=["road"]), "6 categories but 1 names"),
    (pixels, dict(masks=MASKS[:, :, :1]), "do not fit"), (pixels, dict(categories=[3]), "do not f"),
    (pixels, dict(scores=[1]), "2 masks but 1 scores"), (pixels, dict(gt=2 * ONES), "ids from 2"),
    (confusion_ratio, dict(pred_segments=MASKS, pred_categories=[3], gt_segments=ONES,
                           gt_categories=[3], isthing=ISTHING, thresholds=[25]), "do not fit"),
    (update_ap, dict(pred=MASKS), r"\[2, 2, 2\] do not fit the ground truth \[2, 2, 10\]"),
    (update_ap, dict(pred=M.float()), "masks must be bool, not torch.float32"),
    (update_ap, dict(scores=[0.5, float("nan")]), "a score is NaN"),
    (update_ap, dict(scores=[0.5]), "2 predictions have 1 scores and 2 categories"),
    (update_ap, dict(gt_categories=[0]), "go from 0 to 2, but there are 1 categor"),
    (AveragePrecision, dict(num_categories=2, kind="keypoint"), "kind must be 'mask' or 'box'"),
    (average_precision, dict(predictions=[1], ground_truths=[], num_categories=2), "1 images h")])
def test_wrong_input_ends_in_one_clear_sentence(call, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(**arguments)


def test_two_ranks_add_up(monkeypatch):
    """all_reduce sums PQ's counts and gathers AP's match flags; without a group it does nothing.
    Here the other rank has seen the same images."""
    quality, precision = PanopticQuality(ISTHING), AveragePrecision(C)
    for image, prediction, truth in zip(IMAGES, *AP_IMAGES["mask"]):
        quality.update(*image)
        precision.update(*prediction, *truth)
    alone = {name: value.clone() for name, value in quality.all_reduce().sums.items()}
    twice = average_precision(*(side * 2 for side in AP_IMAGES["mask"]), C)["AP"]
    for name, function in (
            ("is_initialized", lambda: True), ("get_backend", lambda: "gloo"),
            ("get_world_size", lambda: 2), ("all_reduce", lambda value: value.mul_(2)),
            ("all_gather_object", lambda out, value: out.__setitem__(slice(2), [value, value]))):
        monkeypatch.setattr(dist, name, function)
    assert all(torch.equal(value, 2 * alone[name])
               for name, value in quality.all_reduce().sums.items())
    assert precision.all_reduce().compute()["AP"] == pytest.approx(twice)


def test_the_table_names_the_categories_that_occur():
    """A category that is only hallucinated (car) or only missed (sign) is one of them."""
    metric = PanopticQuality([False, True, True, True])
    metric.update(rows("11122"), [0, 1], rows("11113"), [0, 3, 3])
    table = metric.table(["road", "car", "person", "sign"]).splitlines()
    assert table[1] == "road     75.0   75.0  100.0   75.0   75.0       1       0       0"
    assert table[5] == "All      25.0   25.0   33.3   25.0   25.0" and len(table) == 9
    assert [line.split()[0] for line in table[1:4]] == ["road", "car", "sign"]


def test_the_example_and_the_demo(tmp_path, capsys):
    assert pq.example()["pq"] == pytest.approx(37.5)
    pq.demo(quick=True, out=tmp_path)
    assert (tmp_path / "pq.png").exists() and "2 of 22 cars" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_everything_is_the_same_on_a_gpu():
    def cuda(side):
        return [tuple(v.cuda() for v in image) for image in side]
    assert str(measure(cuda(IMAGES))) == str(measure(IMAGES))
    for kind, images in AP_IMAGES.items():
        there = average_precision(*map(cuda, images), C, kind=kind)
        assert str(there) == str(average_precision(*images, C, kind=kind))
