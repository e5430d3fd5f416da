"""Spec of pq.py. The oracles are loops over segments and detections, written from the definitions; where
cityscapesscripts and pycocotools are installed, the official evaluations are asked too."""
import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import pq as module
from pq import (AveragePrecision, PanopticQuality, average_precision, boxes_of, confusion_ratio, instance_pixels,
                joint_areas, mask_intersections)

ISTHING = [False, False, False, True, True, True]                            # the last category is never used
C = len(ISTHING)


# --- Random pictures -------------------------------------------------------------------------------------------------
def random_picture(seed):
    """A ground truth of 4x5 cells, and a prediction that has most of it right: some cells moved, pixels flipped,
    segments fused or with another category; void on both sides, some crowds. Each id has a pixel."""
    g = np.random.default_rng(seed)
    G = int(g.integers(1, 9))
    cells = g.integers(0, G + 1, (4, 5))
    other = np.where(g.random((4, 5)) < 0.25, g.integers(0, G + 1, (4, 5)), cells)
    grow = lambda m: m.repeat(4, 0).repeat(3, 1)                             # noqa: E731
    gt, pred = grow(cells), grow(other)
    pred = np.where(g.random(pred.shape) < 0.1, g.integers(0, G + 1, pred.shape), pred)
    if g.random() < 0.3:
        pred[pred == 1] = min(2, G)                                          # two segments fused
    gt_categories = g.integers(0, C - 1, G)
    pred_categories = np.where(g.random(G) < 0.2, g.integers(0, C - 1, G), gt_categories)
    crowd = g.random(G) < 0.25

    def compact(m):
        ids = np.unique(m[m > 0])
        return np.searchsorted(ids, m) * (m > 0) + (m > 0), ids - 1
    (gt, gt_ids), (pred, pred_ids) = compact(gt), compact(pred)
    return (torch.from_numpy(pred), torch.from_numpy(pred_categories[pred_ids]), torch.from_numpy(gt),
            torch.from_numpy(gt_categories[gt_ids]), torch.from_numpy(crowd[gt_ids]))


PICTURES = [random_picture(seed) for seed in range(300)]


def measure(pictures, isthing=ISTHING, **options):
    metric = PanopticQuality(isthing, **options)
    for picture in pictures:
        metric.update(*picture)
    return metric.compute()


def one(pred, pred_categories, gt, gt_categories, crowd=None, isthing=(True, True, False, False), **options):
    """Metric of one picture that is written down as rows of digits."""
    rows = lambda text: torch.tensor([[int(v) for v in row] for row in text.split()])  # noqa: E731
    return measure([(rows(pred), pred_categories, rows(gt), gt_categories, crowd)], list(isthing), **options)


def counts(result, category=0):
    return tuple(result["per_category"][category][key] for key in ("tp", "fp", "fn"))


# --- The oracle of PQ: loops over segments ---------------------------------------------------------------------------
def loop_over_segments(pictures, rule):
    stats = [dict(tp=0, fp=0, fn=0, iou=0.0, pairs=0, pairs_iou=0.0, hit=0, truth=0, guess=0) for _ in range(C)]
    right = truth = guess = 0
    for pred, pred_categories, gt, gt_categories, crowd in pictures:
        pred, gt = pred.numpy(), gt.numpy()
        judged = gt > 0
        for j, is_crowd in enumerate(crowd, 1):
            if is_crowd:
                judged = judged & (gt != j)
        partner_of_pred, partner_of_gt = {}, {}
        for j, cj in enumerate(gt_categories.tolist(), 1):
            if crowd[j - 1]:
                continue
            for i, ci in enumerate(pred_categories.tolist(), 1):
                if ci != cj:
                    continue
                both = ((pred == i) & (gt == j)).sum()
                either = (((pred == i) & (gt != 0)) | (gt == j)).sum()
                if both > 0:
                    stats[cj]["pairs"] += 1
                    stats[cj]["pairs_iou"] += both / either
                if 2 * both > either:
                    assert i not in partner_of_pred and j not in partner_of_gt
                    partner_of_pred[i], partner_of_gt[j] = j, i
                    stats[cj]["tp"] += 1
                    stats[cj]["iou"] += both / either
                    right += both * ISTHING[cj]
        for j, cj in enumerate(gt_categories.tolist(), 1):
            mostly_void = ((gt == j) & (pred == 0)).sum() > (gt == j).sum() / 2
            if not crowd[j - 1] and j not in partner_of_gt and not (rule == "seamless" and mostly_void):
                stats[cj]["fn"] += 1
        for i, ci in enumerate(pred_categories.tolist(), 1):
            crowds = [j for j, cj in enumerate(gt_categories.tolist(), 1) if cj == ci and crowd[j - 1]]
            free = (gt == 0) | (gt == crowds[-1] if crowds else False)
            if i not in partner_of_pred and not ((pred == i) & free).sum() > (pred == i).sum() / 2:
                stats[ci]["fp"] += 1
        gt_class = np.concatenate([[-1], gt_categories.numpy()])[gt]
        pred_class = np.concatenate([[-1], pred_categories.numpy()])[pred]
        for c in range(C):
            stats[c]["hit"] += (judged & (gt_class == c) & (pred_class == c)).sum()
            stats[c]["truth"] += (judged & (gt_class == c)).sum()
            stats[c]["guess"] += (judged & (pred_class == c)).sum()
    truth = sum(s["truth"] for s, thing in zip(stats, ISTHING) if thing)
    guess = sum(s["guess"] for s, thing in zip(stats, ISTHING) if thing)
    rows = []
    for s, thing in zip(stats, ISTHING):
        if s["tp"] + s["fp"] + s["fn"] == 0:
            rows.append(None)
            continue
        weight = s["tp"] + s["fp"] / 2 + s["fn"] / 2
        row = {"pq": s["iou"] / weight, "sq": s["iou"] / s["tp"] if s["tp"] else 0, "rq": s["tp"] / weight,
               "iou": s["hit"] / (s["truth"] + s["guess"] - s["hit"])}
        row["pq_dagger"] = row["pq"] if thing else s["pairs_iou"] / s["pairs"] if s["pairs"] else 0
        rows.append({key: 100 * value for key, value in row.items()} | {key: s[key] for key in ("tp", "fp", "fn")})
    return rows, 100 * right / truth, 100 * right / guess


@pytest.fixture(scope="module", params=["coco", "seamless"])
def both(request):
    return measure(PICTURES, void_rule=request.param), *loop_over_segments(PICTURES, request.param)


def mean(rows, key, thing=None):
    values = [row[key] for row, t in zip(rows, ISTHING) if row is not None and thing in (None, t)]
    return sum(values) / len(values)


@pytest.mark.parametrize("key", ["tp", "fp", "fn", "pq", "sq", "rq", "pq_dagger", "iou"])
def test_each_category_agrees_with_a_loop_over_segments(both, key):
    """Section 4, the definition of PQ_c, on 300 pictures with void and crowds, under both void rules."""
    result, rows, _, _ = both
    for row, expected in zip(result["per_category"], rows):
        assert expected is None and key in ("tp", "fp", "fn") or expected is None and np.isnan(row[key]) \
            or row[key] == pytest.approx(expected[key], abs=1e-9)


@pytest.mark.parametrize("name, key", [("PQ", "pq"), ("SQ", "sq"), ("RQ", "rq"), ("PQ_dagger", "pq_dagger")])
@pytest.mark.parametrize("suffix, thing", [("", None), ("_th", True), ("_st", False)])
def test_means_run_over_the_categories_that_occur(both, name, key, suffix, thing):
    """Section 4: PQ = 1/N Σ PQ_c; PQ_Th and PQ_St over things and stuff."""
    result, rows, _, _ = both
    assert result[name + suffix] == pytest.approx(mean(rows, key, thing), abs=1e-9)


def test_acc_and_prec_agree_with_a_loop_over_segments(both):
    """IBS, Eq. 2 and 3, with the pixels pooled over the data set."""
    result, _, acc, prec = both
    assert (result["Acc_th"], result["Prec_th"]) == pytest.approx((acc, prec), abs=1e-9)


def test_miou_agrees_with_a_loop_over_categories(both):
    """Semantic IoU pooled over the data set; void and crowd ground truth ignored."""
    assert both[0]["mIoU"] == pytest.approx(mean(both[1], "iou"), abs=1e-9)


def test_pq_sq_rq_equal_the_official_evaluation(tmp_path):
    """cityscapesscripts' copy of the COCO panoptic API, from PNG files, to 1e-9."""
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPanopticSemanticLabeling")
    from PIL import Image
    pairs = []
    for k, (pred, pred_categories, gt, gt_categories, crowd) in enumerate(PICTURES):
        entries = []
        for side, m, categories in (("gt", gt, gt_categories), ("pred", pred, pred_categories)):
            Image.fromarray(np.stack([m, 0 * m, 0 * m], -1).astype(np.uint8)).save(tmp_path / f"{side}{k}.png")
            entries.append({"file_name": f"{side}{k}.png", "image_id": k, "segments_info": [
                {"id": i, "category_id": c, "area": int((m == i).sum()), "iscrowd": int(side == "gt" and crowd[i - 1])}
                for i, c in enumerate(categories.tolist(), 1)]})
        pairs.append(entries)
    categories = {c: {"id": c, "name": str(c), "isthing": int(thing)} for c, thing in enumerate(ISTHING)}
    stat = official.pq_compute_single_core(0, pairs, str(tmp_path), str(tmp_path), categories)
    expected, result = official.average_pq(stat, categories), measure(PICTURES)
    for group, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st")):
        for key in ("pq", "sq", "rq"):
            assert result[key.upper() + suffix] == pytest.approx(100 * expected[group][key], abs=1e-9)


# --- Matching --------------------------------------------------------------------------------------------------------
def test_pq_is_sq_times_rq():
    """Kirillov et al., by hand: matches of IoU 3/4 and 2/3, three FP, two FN; RQ is F1: of 2/5 and 2/4."""
    result = one("1110222" "345", [0] * 5, "1111344" "222", [0] * 4)
    assert counts(result) == (2, 3, 2) and result["SQ"] == pytest.approx(100 * (3 / 4 + 2 / 3) / 2)
    assert result["RQ"] == pytest.approx(100 * 2 / (5 / 2 + 4 / 2))
    assert result["PQ"] == pytest.approx(result["SQ"] * result["RQ"] / 100)


def test_an_iou_of_exactly_one_half_is_no_match():
    """Section 4: TP_c asks for IoU > 0.5, so that a segment has one partner at most."""
    assert counts(one("1100", [0], "1111", [0])) == (0, 1, 1)
    assert counts(one("11100", [0], "11111", [0])) == (1, 0, 0)


def test_segments_match_within_their_category_only():
    result = one("1111", [1], "1111", [0])
    assert counts(result, 0) == (0, 0, 1) and counts(result, 1) == (0, 1, 0)


def test_true_void_is_in_no_union():
    """Section 4: pixels labeled as void in the ground truth are not counted in IoU computations."""
    result = one("111111", [0], "110000", [0])
    assert counts(result) == (1, 0, 0) and result["PQ"] == pytest.approx(100)


def test_a_crowd_stays_in_the_union():
    """The official code takes only void out of the union: 2 of 4 pixels are no match."""
    assert counts(one("1111", [0], "1122", [0, 1], [False, True])) == (0, 1, 1)


def test_a_prediction_mostly_on_void_is_no_false_positive():
    """Section 4: more than 50% on void; exactly half of it is not enough."""
    assert counts(one("11111", [0], "00022", [0, 1])) == (0, 0, 0)
    assert counts(one("1111", [0], "0022", [0, 1])) == (0, 1, 0)


def test_a_prediction_mostly_on_void_and_crowd_of_its_category_is_no_false_positive():
    """COCO panoptic API: void and crowd are added up; a crowd of another category does not help."""
    assert counts(one("11111", [0], "01122", [0, 1], [True, False])) == (0, 0, 0)
    assert counts(one("11111", [0], "01122", [1, 1], [True, False])) == (0, 1, 0)


def test_of_several_crowds_of_a_category_the_last_with_a_pixel_counts():
    """The official code keeps one crowd per category."""
    assert counts(one("11111", [0], "11122", [0, 0], [True, True])) == (0, 1, 0)
    assert counts(one("11111", [0], "22211", [0, 0], [True, True])) == (0, 0, 0)
    assert counts(one("11111", [0], "22211", [0, 0, 0], [True, True, True])) == (0, 0, 0)


@pytest.mark.parametrize("category", [0, 2])
def test_a_crowd_never_matches_and_is_never_missed(category):
    """COCO panoptic API; category 2 is stuff, so a crowd stuff segment is not in M_c either."""
    result = one("1111", [category], "1111", [category], [True])
    assert counts(result, category) == (0, 0, 0) and np.isnan(result["PQ"]) and np.isnan(result["PQ_dagger"])
    assert counts(one("0000", [], "1111", [category], [True]), category) == (0, 0, 0)


def test_ground_truth_mostly_under_predicted_void_is_missed_unless_the_rule_is_seamless():
    """Section 4's extra rule asks for more than 50%; the official code does not have it."""
    assert counts(one("00011", [1], "11111", [0])) == (0, 0, 1)
    assert counts(one("00011", [1], "11111", [0], void_rule="seamless")) == (0, 0, 0)
    assert counts(one("0011", [1], "1111", [0], void_rule="seamless")) == (0, 0, 1)


def test_a_segment_without_a_pixel_does_not_exist():
    """Choice of PanopticQuality: neither a false positive nor missed, on either side."""
    assert counts(one("1100", [0, 0, 0], "1100", [0, 0, 0])) == (1, 0, 0)


@pytest.mark.parametrize("gt, expected", [("0000", (0, 0, 0)), ("1111", (0, 0, 1))])
def test_no_prediction_at_all(gt, expected):
    result = one("0000", [], gt, [0] * (gt != "0000"))
    assert counts(result) == expected and (result["PQ"] == 0 if expected[2] else np.isnan(result["PQ"]))
    assert np.isnan(result["Prec_th"]) and (result["Acc_th"] == 0 if expected[2] else np.isnan(result["Acc_th"]))


def test_one_pixel_is_a_picture():
    result = one("1", [0], "1", [0])
    assert [result[key] for key in ("PQ", "SQ", "RQ", "PQ_th", "PQ_dagger", "Acc_th", "Prec_th", "mIoU")] == [100] * 8
    assert np.isnan(result["PQ_st"])


def test_a_picture_without_pixels_adds_nothing():
    result = measure([(torch.zeros(0, 4).long(), [], torch.zeros(0, 4).long(), [])])
    assert np.isnan(result["PQ"]) and all(counts(result, c) == (0, 0, 0) for c in range(C))


def test_integer_maps_of_any_kind_give_the_same():
    """uint8 PNGs must not overflow in pred * (G + 1) + gt: here 20 * 21 + 20."""
    m = torch.arange(1, 21).reshape(4, 5)
    for kind in (torch.uint8, torch.int16, torch.int32, torch.int64):
        assert measure([(m.to(kind), [3] * 20, m.to(kind), [3] * 20)])["per_category"][3]["tp"] == 20
    assert measure([(m.numpy(), [3] * 20, m.numpy(), [3] * 20)])["PQ"] == 100


# --- PQ† -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("iou, expected", [(46, 0), (49, 0), (51, 51), (62, 62)])
def test_pq_of_stuff_falls_off_a_cliff_where_pq_dagger_does_not(iou, expected):
    """Seamless, Figure 3: traffic light 0.46 and pole 0.49 come to nothing, sidewalk 0.62 does not."""
    pred, gt = torch.zeros(2, 1, 100, dtype=torch.int64)
    gt[:], pred[0, :iou] = 1, 1
    result = measure([(pred, [0], gt, [0])])
    assert result["PQ"] == pytest.approx(expected) and result["PQ_dagger"] == pytest.approx(iou)


def test_pq_dagger_keeps_pq_for_things():
    """Section 4: PQ†_c = PQ_c if c is no stuff class."""
    result = one("11000", [0], "11111", [0])
    assert result["PQ_dagger"] == result["PQ"] == 0


def test_pq_dagger_averages_the_iou_of_the_pairs_in_m_c():
    """Section 4, two pictures by hand: (2/4 + 3/4) / 2."""
    gt, pred = torch.ones(1, 4).long(), torch.tensor([[1, 1, 0, 0]])
    result = measure([(pred, [0], gt, [0]), (torch.tensor([[0, 1, 1, 1]]), [0], gt, [0])])
    assert result["PQ_dagger_st"] == pytest.approx(100 * (2 / 4 + 3 / 4) / 2)
    assert result["PQ_st"] == pytest.approx(100 * (3 / 4) / (1 + 1 / 2 + 1 / 2))


def test_pq_dagger_does_not_punish_a_hallucinated_stuff_class():
    """A stuff prediction in a picture without that class is in no pair of M_c; PQ pays half a segment."""
    ones = torch.ones(1, 4).long()
    row = measure([(ones, [0], ones, [0]), (ones, [0], ones, [3])])["per_category"][0]
    assert row["pq_dagger"] == 100 and row["pq"] == pytest.approx(100 / 1.5)


def test_pq_dagger_does_not_punish_a_stuff_class_that_is_missed_altogether():
    """The same from the other side: ground truth without any prediction of its class is in no pair of M_c."""
    ones = torch.ones(1, 4).long()
    row = measure([(ones, [0], ones, [0]), (ones, [3], ones, [0])])["per_category"][0]
    assert row["pq_dagger"] == 100 and row["pq"] == pytest.approx(100 / 1.5)


def test_pq_dagger_of_a_class_that_never_meets_its_ground_truth_is_zero():
    """Choice for 0/0: M_c is empty; the class occurs in the ground truth (2) or the prediction (3)."""
    result = one("1111", [3], "1111", [2])
    assert [result["per_category"][c]["pq_dagger"] for c in (2, 3)] == [0, 0] and result["PQ_dagger"] == 0


def test_pq_dagger_leaves_out_a_class_that_never_occurs():
    result = one("1111", [2], "1111", [2])
    assert np.isnan(result["per_category"][3]["pq_dagger"]) and result["PQ_dagger"] == 100


def test_pq_dagger_keeps_a_pair_whose_segments_are_both_excused():
    """Prediction mostly on true void, ground truth mostly under predicted void: TP = FP = FN = 0, yet a pair."""
    result = one("01111", [2], "11000", [2], void_rule="seamless")
    assert counts(result, 2) == (0, 0, 1)
    result = one("001111", [2], "111000", [2], void_rule="seamless")
    assert counts(result, 2) == (0, 0, 0) and np.isnan(result["PQ"]) and result["PQ_dagger"] == pytest.approx(100 / 3)


# --- Acc_th, Prec_th, mIoU -------------------------------------------------------------------------------------------
def test_acc_counts_pixels_where_pq_counts_segments():
    """IBS, section 3.3: one large confused thing costs little PQ_th and much Acc_th."""
    gt = torch.arange(1, 11).repeat_interleave(torch.tensor([1] * 8 + [40, 40]))[None]
    result = measure([(gt.clamp(max=9), [3] * 9, gt, [3] * 10)])
    assert result["PQ_th"] == pytest.approx(100 * 8 / (8 + 1 / 2 + 2 / 2))
    assert result["Acc_th"] == result["Prec_th"] == pytest.approx(100 * 8 / 88)


def test_acc_counts_the_intersection_of_matched_things_over_all_true_thing_pixels():
    """Eq. 2: thing 1 is matched (3 of 4), thing 2 is void, the stuff does not count."""
    result = one("1110003333", [0, 0, 2], "1111223333", [0, 0, 2])
    assert result["Acc_th"] == pytest.approx(100 * 3 / 6) and result["Prec_th"] == pytest.approx(100)


def test_prec_does_not_judge_pixels_under_void_or_crowd():
    """Choice: of the predicted thing pixels 3 are right, 1 is on stuff, 2 are on void, 3 on a crowd."""
    result = one("111122444", [0, 0, 0, 1], "111300555", [0, 0, 2, 0, 1], [False] * 4 + [True])
    assert result["Prec_th"] == pytest.approx(100 * 3 / 4) and result["Acc_th"] == pytest.approx(100)


def test_a_matched_pixel_must_lie_in_the_partner():
    """IBS, section 3.3: a true positive pixel intersects with the matched ground truth segment."""
    result = one("11111", [0], "11122", [0, 0])
    assert result["Acc_th"] == result["Prec_th"] == pytest.approx(100 * 3 / 5)


def test_predicted_void_is_a_miss_for_miou():
    result = one("1100", [2], "1111", [2])
    assert result["mIoU"] == pytest.approx(50)


def test_miou_merges_the_segments_of_a_category():
    """Confusion between instances is invisible to it: that is why PQ was made."""
    result = one("1122", [0, 0], "1222", [0, 0])
    assert result["mIoU"] == 100 and result["PQ"] < 100


# --- Confusion -------------------------------------------------------------------------------------------------------
def test_a_prediction_is_confused_if_it_covers_more_than_t_percent_of_two_things():
    """IBS, section 6.2: it covers 100% of thing 1 and 50% of thing 2; at T = 50 no longer."""
    pred, gt = torch.tensor([[1, 1, 1, 1, 0, 0]]), torch.tensor([[1, 1, 2, 2, 2, 2]])
    confused, everything = confusion_ratio(pred, [3], gt, [3, 3], ISTHING, [0, 49, 50, 51])
    assert confused.tolist() == [1, 1, 0, 0] and everything.tolist() == [1, 1, 1, 1]
    assert confused.dtype == everything.dtype == torch.int64


def test_confusion_agrees_with_a_loop_over_segments():
    """Figure 5, pooled over 300 pictures."""
    thresholds, expected, total = [0, 10, 33.3, 50, 80], np.zeros(5), 0
    result = sum(torch.stack(confusion_ratio(*p[:4], ISTHING, thresholds, gt_crowd=p[4])) for p in PICTURES)
    for pred, pred_categories, gt, gt_categories, crowd in PICTURES:
        for i, ci in enumerate(pred_categories.tolist(), 1):
            total += ISTHING[ci]
            for k, T in enumerate(thresholds):
                covered = [((pred == i) & (gt == j)).sum() / (gt == j).sum() > T / 100
                           for j, cj in enumerate(gt_categories.tolist(), 1) if ISTHING[cj] and not crowd[j - 1]]
                expected[k] += ISTHING[ci] and sum(covered) >= 2
    assert result.tolist() == [expected.tolist(), [total] * 5] and expected[3] > 0


def test_a_prediction_without_a_pixel_is_not_among_all():
    m = torch.tensor([[1, 2]])
    confused, everything = confusion_ratio(m * 0 + 1, [3, 3], m, [3, 3], ISTHING, [50.0])
    assert (confused.item(), everything.item()) == (1, 1)


# --- Masks that overlap -----------------------------------------------------------------------------------------------
def overlapping(seed):
    """Things of a picture as masks that are grown by a pixel, some doubled, with scores in no order."""
    pred, pred_categories, gt, gt_categories, crowd = random_picture(seed)
    g = np.random.default_rng(1000 + seed)
    rows = np.concatenate([np.arange(len(pred_categories))] * 2)[g.permutation(2 * len(pred_categories))[:max(1, len(pred_categories))]]
    masks = torch.stack([pred == k + 1 for k in rows])
    masks[::2, 1:] |= masks[::2, :-1].clone()
    return masks, torch.from_numpy(g.permutation(len(rows)) / 100), pred_categories[rows], gt, gt_categories, crowd


def test_pixels_of_overlapping_masks_agree_with_loops():
    """IBS, section 6.4, on 300 pictures: greedy by score, IoU > 1/2, a thing only once; nobody counts void or crowds."""
    for seed in range(300):
        masks, scores, categories, gt, gt_categories, crowd = overlapping(seed)
        counts = [(gt > 0)] + [gt != k + 1 for k in range(len(crowd)) if crowd[k]]
        judged = torch.stack(counts).all(0)
        right, predicted, taken = 0, 0, set()
        for d in scores.argsort(descending=True).tolist():
            if not ISTHING[categories[d]]:
                continue
            predicted += (masks[d] & judged).sum().item()
            for k, c in enumerate(gt_categories.tolist()):
                truth = gt == k + 1
                union = ((masks[d] & (gt > 0)) | truth).sum()
                if c == categories[d] and not crowd[k] and k not in taken and 2 * (masks[d] & truth).sum() > union:
                    taken.add(k)
                    right += (masks[d] & truth).sum().item()
        true = sum((gt == k + 1).sum().item() for k, c in enumerate(gt_categories.tolist()) if ISTHING[c] and not crowd[k])
        got = instance_pixels(masks, scores, categories, gt, gt_categories, ISTHING, crowd)
        assert got.tolist() == [right, true, predicted] and got.dtype == torch.int64, seed


def test_without_overlap_they_are_acc_th_and_prec_th():
    """The same three numbers as PanopticQuality's where masks do not overlap."""
    counts = 0
    for p, c, gt, gc, crowd in PICTURES:
        counts = counts + instance_pixels(torch.stack([p == k + 1 for k in range(len(c))]), torch.ones(len(c)), c, gt, gc, ISTHING, crowd)
    result = measure(PICTURES)
    assert (100 * counts[0] / counts[1]).item() == pytest.approx(result["Acc_th"]) and (100 * counts[0] / counts[2]).item() == pytest.approx(result["Prec_th"])


def test_a_second_mask_of_a_thing_is_wrong_and_the_score_says_which():
    gt, mask = torch.tensor([[1, 1, 1, 1, 2, 2]]), torch.tensor([[[1, 1, 1, 0, 0, 0]], [[1, 1, 1, 1, 1, 0]]]).bool()
    args = (torch.tensor([3, 3]), gt, torch.tensor([3, 0]), ISTHING)
    assert instance_pixels(mask, torch.tensor([.2, .9]), *args).tolist() == [4, 4, 8]
    assert instance_pixels(mask, torch.tensor([.9, .2]), *args).tolist() == [3, 4, 8]
    assert instance_pixels(mask[:0], torch.zeros(0), torch.zeros(0).long(), *args[1:]).tolist() == [0, 4, 0]


def test_a_last_segment_without_a_pixel_confuses_nobody_and_is_not_true():
    """Categories may name more segments than the truth shows, as a resized label does."""
    gt, masks = torch.tensor([[1, 1, 2, 2, 2]]), torch.ones(1, 1, 5).bool()
    assert [v.item() for v in confusion_ratio(masks, [3], gt, [3, 3, 3, 3], ISTHING, [25])] == [1, 1]
    assert instance_pixels(masks, torch.ones(1), torch.tensor([3]), gt, torch.tensor([3, 3, 3, 3]), ISTHING).tolist() == [3, 5, 5]


def test_masks_that_do_not_fit_are_refused():
    gt, masks, one = torch.ones(4, 6).long(), torch.ones(2, 4, 6).bool(), torch.tensor([3])
    for m, c, s, sentence in ((masks[:, :, :4], one.repeat(2), 2, "do not fit"), (masks, one, 2, "do not fit"), (masks, one.repeat(2), 1, "1 scores")):
        with pytest.raises(ValueError, match=sentence):
            instance_pixels(m, torch.ones(s), c, gt, one, ISTHING)
    with pytest.raises(ValueError, match="do not fit"):
        confusion_ratio(masks[:, :, :4], one.repeat(2), gt, one, ISTHING, [25])
    with pytest.raises(ValueError, match="ids from 2 to 2"):
        instance_pixels(masks, torch.ones(2), one.repeat(2), 2 * gt, one, ISTHING)


def test_confusion_of_masks_that_overlap_is_that_of_each_mask():
    """Section 6.2 for 6.4: each mask as if it were the only one of its picture; as segments where they do not overlap."""
    thresholds = [0, 20, 50]
    for seed in range(100):
        masks, _, categories, gt, gt_categories, crowd = overlapping(seed)
        alone = [torch.stack(confusion_ratio(m.long(), [c], gt, gt_categories, ISTHING, thresholds, crowd)) for m, c in zip(masks, categories)]
        assert torch.equal(torch.stack(confusion_ratio(masks, categories, gt, gt_categories, ISTHING, thresholds, crowd)), sum(alone))
        p, c, gt, gc, crowd = PICTURES[seed]
        a, b = (confusion_ratio(v, c, gt, gc, ISTHING, thresholds, crowd) for v in (p, torch.stack([p == k + 1 for k in range(len(c))])))
        assert torch.equal(torch.stack(a), torch.stack(b))


# --- Wrong input, ranks, text ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("change, sentence", [
    (dict(pred=torch.zeros(2, 3).long()), r"segments \[2, 3\] and ground truth segments \[2, 2\] must be maps"),
    (dict(pred=torch.zeros(4).long(), gt=torch.zeros(4).long()), r"must be maps \[H, W\]"),
    (dict(pred=torch.full((2, 2), 2)), "predicted segments hold ids from 2 to 2, but there are 1 categories"),
    (dict(pred=torch.full((2, 2), -1)), "predicted segments hold ids from -1 to -1"),
    (dict(gt=torch.tensor([[0, 3], [0, 0]])), "ground truth segments hold ids from 0 to 3, but there are 1 categories"),
    (dict(gt=torch.tensor([[0, -3], [0, 0]])), "ground truth segments hold ids from -3 to 0"),
    (dict(pred_categories=[C]), f"predicted categories must lie in 0 to {C - 1}"),
    (dict(pred_categories=[-1]), f"predicted categories must lie in 0 to {C - 1}"),
    (dict(gt_categories=[C]), f"ground truth categories must lie in 0 to {C - 1}"),
    (dict(crowd=[True, False]), "1 ground truth categories but 2 crowd flags")])
def test_wrong_input_ends_in_one_clear_sentence(change, sentence):
    """An id without a category would silently be another pair of the joint histogram."""
    ones = torch.ones(2, 2).long()
    given = dict(pred=ones, pred_categories=[0], gt=ones, gt_categories=[0], crowd=None)
    with pytest.raises(ValueError, match=sentence):
        PanopticQuality(ISTHING).update(*(given | change).values())


def test_an_unknown_void_rule_ends_in_one_clear_sentence():
    with pytest.raises(ValueError, match="void_rule must be 'coco' or 'seamless'"):
        PanopticQuality(ISTHING, void_rule="cityscapes")


def test_the_joint_histogram_counts_every_pixel_once():
    pred, _, gt, _, _ = PICTURES[0]
    joint = joint_areas(pred, gt, 9, 9)
    assert joint.shape == (10, 10) and joint.sum() == pred.numel()
    assert all(joint[i, j] == ((pred == i) & (gt == j)).sum() for i in range(10) for j in range(10))


def _rank(rank, folder, results):
    """One of two processes: every second picture each, then both must know the whole."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    metric, ap = PanopticQuality(ISTHING), AveragePrecision(3)
    for picture in PICTURES[rank:20:2]:
        metric.update(*picture)
    for prediction, truth in zip(*(side[rank:20:2] for side in AP_PICTURES["mask"])):
        ap.update(*prediction, *truth)
    result = [metric.all_reduce().compute(), ap.all_reduce().compute()["AP"]]
    Path(results, f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_ranks_agree_with_one(tmp_path):
    """all_reduce sums PQ's counts and gathers AP's match flags: both ranks report what one process would."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_rank, args=(rank, tmp_path, tmp_path)) for rank in range(2)]
    [p.start() for p in processes]
    [p.join(60) for p in processes]
    rank_by_rank = (side[:20:2] + side[1:20:2] for side in AP_PICTURES["mask"])                      # for equal scores
    expected = measure(PICTURES[:20]), average_precision(*rank_by_rank, 3)["AP"]
    for rank in range(2):
        quality, ap = json.loads((tmp_path / f"{rank}.json").read_text())
        assert ap == pytest.approx(expected[1], abs=1e-6)
        for key in ("PQ", "SQ", "RQ_th", "PQ_dagger_st", "Acc_th", "Prec_th", "mIoU"):
            assert quality[key] == pytest.approx(expected[0][key], abs=1e-9)


def test_all_reduce_without_a_process_group_changes_nothing():
    metric = PanopticQuality(ISTHING)
    metric.update(*PICTURES[0])
    before = str(metric.compute())
    assert str(metric.all_reduce().compute()) == before


def test_the_table_names_the_categories_that_occur():
    metric = PanopticQuality([False, True, True])
    metric.update(torch.tensor([[1, 1, 1, 2]]), [0, 1], torch.tensor([[1, 1, 1, 1]]), [0])
    lines = metric.table(["road", "car", "pedestrian"]).splitlines()
    assert [line.split()[0] for line in lines[1:3] + lines[4:]] == ["road", "car", "All", "Things", "Stuff", "Acc_th"]
    assert lines[1].split() == ["road", "75.0", "75.0", "100.0", "75.0", "75.0", "1", "0", "0"]
    assert lines[2].split() == ["car", "0.0", "0.0", "0.0", "0.0", "0.0", "0", "1", "0"]
    assert lines[4].split() == ["All", "37.5", "37.5", "50.0", "37.5", "37.5"]
    assert lines[5].split()[1:] == ["0.0"] * 4 and lines[6].split()[1:] == ["75.0", "75.0", "100.0", "75.0"]
    assert len(lines[0]) == len(lines[1]) == len(lines[3]) and set(lines[3]) == {"-"}
    assert lines[7] == "Acc_th nan   Prec_th 0.0"
    with pytest.raises(ValueError, match="3 categories but 1 names"):
        metric.table(["road"])


def test_a_class_that_is_only_missed_or_only_hallucinated_is_in_the_table():
    metric = PanopticQuality([True, True])
    metric.update(torch.tensor([[1]]), [0], torch.tensor([[1]]), [1])
    assert [line.split()[0] for line in metric.table(["a", "b"]).splitlines()[1:3]] == ["a", "b"]


def test_the_file_stands_alone_and_answers_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pq.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(module.__file__, run_name="__main__")
    assert end.value.code == 0 and "--full" in capsys.readouterr().out


# --- Average precision -----------------------------------------------------------------------------------------------
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RANGES = {"AP": (0, 1e10), "AP_small": (0, 32 ** 2), "AP_medium": (32 ** 2, 96 ** 2), "AP_large": (96 ** 2, 1e10)}


def random_ap_picture(seed, kind, size=130):
    """Overlapping rectangles as ground truth, detections near them, with equal scores, crowds, and empty pictures."""
    g = np.random.default_rng(seed)
    N, extra = (0 if seed % 7 == 3 else int(g.integers(1, 7))), (0 if seed % 5 == 2 else int(g.integers(1, 5)))
    side = np.array([8, 31, 32, 33, 60, 96, 97, 120])

    def corners(n):
        wh = np.stack([g.choice(side, n), g.choice(side, n)], 1)
        xy = (g.random((n, 2)) * (size - wh + 1)).astype(int)
        return np.concatenate([xy, xy + wh], 1)

    def masks(boxes):
        out = np.zeros((len(boxes), size, size), bool)
        for k, (x1, y1, x2, y2) in enumerate(boxes):
            out[k, y1:y2, x1:x2] = True
        return out
    truth, repeats = corners(N), int(g.integers(1, 3)) * (seed % 11 > 0)
    near = np.clip(np.repeat(truth, repeats, 0) + g.integers(-4, 5, (N * repeats, 4)), 0, size)
    boxes = np.concatenate([near, corners(extra)])
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    gt_categories = g.integers(0, 2, N)
    categories = np.concatenate([np.repeat(gt_categories, repeats), g.integers(0, 3, extra)])    # 2: never in the truth
    categories = np.where(g.random(len(boxes)) < 0.1, 1 - categories % 2, categories)
    scores = np.round(g.random(len(boxes)), 1)                                                       # many ties
    gt_masks = masks(truth)
    gt_masks[::2, ::7] = False                                               # their area is not that of the box
    pred = boxes.astype(np.float64) if kind == "box" else masks(boxes)
    return (torch.from_numpy(pred), torch.from_numpy(scores), torch.from_numpy(categories)), \
        (torch.from_numpy(gt_masks), torch.from_numpy(gt_categories), torch.from_numpy(g.random(N) < 0.2))


AP_PICTURES = {kind: tuple(zip(*(random_ap_picture(seed, kind) for seed in range(40)))) for kind in ("mask", "box")}


def rectangle(mask):
    y, x = np.nonzero(mask)
    return x.min(), y.min(), x.max() + 1, y.max() + 1


def overlap(kind, a, mask, crowd):
    """IoU, or the share of the detection where the ground truth is a crowd."""
    if kind == "mask":
        inter, area, other = (a & mask).sum(), a.sum(), mask.sum()
    else:
        b = rectangle(mask)
        inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        area, other = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return inter / (area if crowd else area + other - inter)


def slow_ap(kind, low, high):
    """AP per category (2 of them) and threshold, from COCO's definition: greedy matching, then for each of 101 recalls
    the best precision at that recall or beyond."""
    result = np.full((2, len(THRESHOLDS)), np.nan)
    for c in range(2):
        for k, threshold in enumerate(THRESHOLDS):
            outcomes, positives = [], 0
            for (pred, scores, categories), (gt, gt_categories, crowd) in zip(*AP_PICTURES[kind]):
                gts = [(m.numpy(), bool(w)) for m, cc, w in zip(gt, gt_categories, crowd) if cc == c]
                ignored = [w or not low <= m.sum() <= high for m, w in gts]
                positives += ignored.count(False)
                dets = sorted(((-s.item(), n) for n, (s, cc) in enumerate(zip(scores, categories)) if cc == c))
                taken = set()
                for minus_score, n in dets:
                    a = pred[n].numpy()
                    best = None
                    for j, (m, w) in enumerate(gts):
                        quality = OVERLAPS[kind](a, m, w)
                        if quality < threshold or j in taken and not w:
                            continue
                        if best is None or (not ignored[j], quality) >= best[:2]:
                            best = (not ignored[j], quality, j)
                    area = a.sum() if kind == "mask" else (a[2] - a[0]) * (a[3] - a[1])
                    if best is not None:
                        taken.add(best[2])
                        outcomes.append((minus_score, "tp" if best[0] else "ignored"))
                    else:
                        outcomes.append((minus_score, "fp" if low <= area <= high else "ignored"))
            if positives:
                outcomes.sort(key=lambda o: o[0])                            # stable: ties keep the pictures' order
                kinds = [o for _, o in outcomes if o != "ignored"]
                right = np.cumsum([o == "tp" for o in kinds])
                curve = [(tp / positives, tp / n) for n, tp in enumerate(right, 1)]
                result[c, k] = 100 * np.mean([max((p for r, p in curve if r >= at), default=0)
                                              for at in np.linspace(0, 1, 101)])
    return result


def remembering(kind):
    """The same overlaps are asked for at each threshold and area range."""
    memory = {}

    def ask(a, mask, crowd):
        key = (a.tobytes(), mask.__array_interface__["data"][0], crowd)
        if key not in memory:
            memory[key] = overlap(kind, a, mask, crowd)
        return memory[key]
    return ask


OVERLAPS = {kind: remembering(kind) for kind in ("mask", "box")}
COMPUTED = {kind: average_precision(*AP_PICTURES[kind], 3, kind=kind) for kind in ("mask", "box")}


@pytest.mark.parametrize("kind", ["mask", "box"])
@pytest.mark.parametrize("name", list(RANGES))
def test_ap_agrees_with_a_loop_over_detections(kind, name):
    """COCO's rule with ties, crowds, empty pictures, a category without ground truth, in each area range."""
    expected = slow_ap(kind, *RANGES[name])
    assert COMPUTED[kind][name] == pytest.approx(np.nanmean(expected), abs=1e-9)
    if name == "AP":
        assert COMPUTED[kind]["per_category"][:2] == pytest.approx(expected.mean(1).tolist(), abs=1e-9)
        assert list(COMPUTED[kind]["per_threshold"].values()) == pytest.approx(expected.mean(0).tolist(), abs=1e-9)
        assert [COMPUTED[kind][n] for n in ("AP50", "AP75")] == pytest.approx(expected.mean(0)[[0, 5]].tolist())
        assert np.isnan(COMPUTED[kind]["per_category"][2])


@pytest.mark.parametrize("kind", ["mask", "box"])
def test_ap_equals_pycocotools(kind, capsys):
    """All six numbers of COCO's summary to 1e-6 percent."""
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools import mask as rle
    from pycocotools.cocoeval import COCOeval
    truth, found = coco.COCO(), []
    annotations = []
    encode = lambda m: rle.encode(np.asfortranarray(m.numpy().astype(np.uint8)))  # noqa: E731
    xywh = lambda b: [float(b[0]), float(b[1]), float(b[2] - b[0]), float(b[3] - b[1])]  # noqa: E731
    for k, ((pred, scores, categories), (gt, gt_categories, crowd)) in enumerate(zip(*AP_PICTURES[kind])):
        for m, c, w in zip(gt, gt_categories.tolist(), crowd.tolist()):
            annotations.append(dict(id=len(annotations) + 1, image_id=k, category_id=c, iscrowd=int(w),
                                    area=int(m.sum()), segmentation=encode(m), bbox=xywh(rectangle(m.numpy()))))
        for p, s, c in zip(pred, scores.tolist(), categories.tolist()):
            found.append(dict(image_id=k, category_id=c, score=s)
                         | (dict(segmentation=encode(p)) if kind == "mask" else dict(bbox=xywh(p.tolist()))))
    truth.dataset = dict(images=[dict(id=k, height=130, width=130) for k in range(40)], info={},
                         categories=[dict(id=c, name=str(c)) for c in range(3)], annotations=annotations)
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(found), "segm" if kind == "mask" else "bbox")
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    ours = [COMPUTED[kind][name] for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")]
    assert ours == pytest.approx((100 * evaluation.stats[:6]).tolist(), abs=1e-6)


def squares(n, size=10):
    """n masks of one row each."""
    masks = torch.zeros(n, n, size, dtype=torch.bool)
    masks[torch.arange(n), torch.arange(n)] = True
    return masks


def test_ap_reads_precision_at_101_recalls():
    """One of two objects is found, alone: precision 1 at the recalls 0, .01, ..., .50, which are 51 of 101."""
    m = squares(2)
    result = average_precision([(m[:1], [0.5], [0])], [(m, [0, 0])], 1)
    assert result["AP"] == pytest.approx(100 * 51 / 101)


@pytest.mark.parametrize("side, small, medium, large", [(31, 1, 0, 0), (32, 1, 1, 0), (33, 0, 1, 0), (96, 0, 1, 1),
                                                        (97, 0, 0, 1)])
@pytest.mark.parametrize("as_map", [True, False])
def test_area_ranges_include_both_ends(side, small, medium, large, as_map):
    """COCO: small up to 32², medium up to 96² pixels; a square of exactly that size is in both ranges."""
    m = torch.zeros(1, 100, 100, dtype=torch.bool)
    m[:, :side, :side] = True
    result = average_precision([(m, [0.5], [0])], [(m[0].long() if as_map else m, [0])], 1)
    for name, there in (("AP_small", small), ("AP_medium", medium), ("AP_large", large)):
        assert result[name] == pytest.approx(100) if there else np.isnan(result[name])


def test_ap_makes_precision_monotone():
    """A false positive first, then the object: precision 1/2 at every recall. The other way round it does no harm."""
    m = squares(2)
    assert average_precision([(m, [0.9, 0.8], [0, 0])], [(m[1:], [0])], 1)["AP"] == pytest.approx(50)
    assert average_precision([(m, [0.8, 0.9], [0, 0])], [(m[1:], [0])], 1)["AP"] == pytest.approx(100)


@pytest.mark.parametrize("place, expected", [(99, 1), (100, 0)])
def test_only_the_best_hundred_of_a_category_count(place, expected):
    """maxDets: 130 detections of each of two categories; the one that is right comes after `place` better ones."""
    m = squares(2)
    pred = m[torch.ones(260).long()]
    pred[2 * place + 1] = m[0]
    result = average_precision([(pred, torch.linspace(1, 0, 260), torch.arange(260) % 2)], [(m[:1], [1])], 2)
    assert result["AP"] == pytest.approx(expected)


def test_no_detection_is_zero_and_no_ground_truth_is_left_out():
    m, nothing = squares(1), torch.zeros(0, 1, 10, dtype=torch.bool)
    result = average_precision([(nothing, [], [])], [(m, [1])], 3)
    assert result["AP"] == result["AP_small"] == 0 and np.isnan(result["AP_large"])
    assert np.isnan(result["per_category"][0]) and result["per_category"][1] == 0
    assert np.isnan(average_precision([(m, [1.0], [0])], [(nothing, [])], 3)["AP"])
    assert np.isnan(average_precision([], [], 3)["AP"])


def test_an_empty_mask_is_a_false_positive_and_empty_ground_truth_does_not_exist():
    """Choice of AveragePrecision."""
    m = squares(2)
    with_empty = torch.stack([m[0] & m[1], m[0]])
    assert average_precision([(with_empty, [0.9, 0.8], [0, 0])], [(m[:1], [0])], 1)["AP"] == pytest.approx(50)
    for kind, pred in (("mask", m[:1]), ("box", [[0.0, 0, 10, 1]])):
        result = average_precision([(pred, [0.9], [0])], [(with_empty, [0, 0])], 1, kind=kind)
        assert result["AP"] == pytest.approx(100)


def test_a_detection_inside_a_crowd_is_ignored_however_small():
    """For a crowd it is the share of the detection that counts: a quarter of a pixel wide and high, all inside."""
    gt = torch.tensor([[1] * 10, [2] * 10])
    pred = [[3.0, 1.5, 3.25, 1.75], [0, 0, 10, 1]]
    result = average_precision([(pred, [0.9, 0.8], [0, 0])], [(gt, [0, 0], [False, True])], 1, kind="box")
    assert result["AP"] == pytest.approx(100)


@pytest.mark.parametrize("kind", ["mask", "box"])
def test_segments_and_masks_are_two_ways_to_write_one_ground_truth(kind):
    predictions, truths = zip(*(random_ap_picture(seed, kind) for seed in range(12)))
    maps, stacks = [], []
    for masks, categories, crowd in truths:
        ids = torch.arange(1, len(masks) + 1)[:, None, None]
        segments = (masks * ids).amax(0) if len(masks) else torch.zeros(130, 130).long()
        maps.append((segments, categories, crowd))
        stacks.append((segments == ids, categories, crowd))
    a, b = (str(average_precision(predictions, t, 3, kind=kind)) for t in (maps, stacks))
    assert a == b and average_precision(predictions, maps, 3, kind=kind)["AP"] > 5


def test_thresholds_can_be_chosen():
    """AdaptIS, section 6, reports AP at .5, .7, .8 and .9: columns of COCO's ten."""
    chosen = average_precision(*AP_PICTURES["mask"], 3, iou_thresholds=(0.5, 0.7, 0.8, 0.9))["per_threshold"]
    ten = list(COMPUTED["mask"]["per_threshold"].values())
    assert list(chosen) == [0.5, 0.7, 0.8, 0.9]
    assert list(chosen.values()) == pytest.approx([ten[k] for k in (0, 4, 6, 8)])
    single = average_precision(*AP_PICTURES["mask"], 3, iou_thresholds=0.7)
    assert single["AP"] == chosen[0.7] and np.isnan(single["AP50"]) and np.isnan(single["AP75"])


def test_a_threshold_of_one_asks_for_the_very_mask():
    m = squares(2)
    result = average_precision([(m, [0.9, 0.8], [0, 0])], [(m, [0, 0])], 1, iou_thresholds=[1.0])
    assert result["AP"] == pytest.approx(100)


def test_stuff_is_left_out_on_both_sides():
    """With isthing [C]: a stuff detection is no false positive, a stuff segment is not missed."""
    segments, m = torch.tensor([[1] * 10, [2] * 10]), squares(2)
    result = average_precision([(m, [0.9, 0.8], [0, 1])], [(segments, [0, 1])], 2, isthing=[False, True])
    assert result["AP"] == pytest.approx(100) and np.isnan(result["per_category"][0])
    result = average_precision([(m[:0], [], [])], [(segments, [0, 1])], 2, isthing=[False, True])
    assert np.isnan(result["per_category"][0]) and result["per_category"][1] == 0


@pytest.mark.parametrize("memory", [1, 40, 2 ** 24])
def test_intersections_do_not_depend_on_the_chunks(memory):
    """A chunk's border must not lose a pixel, whichever way the ground truth is written."""
    pred, gt = torch.ones(2, 11, 91, dtype=torch.bool), torch.ones(11, 91, dtype=torch.int64)
    pred[1, 3:], gt[5, 5] = False, 2
    for truth in (gt, torch.stack([gt == 1, gt == 2])):
        inter, area = mask_intersections(pred, truth, 2, memory)
        assert inter.tolist() == [[1000, 1], [273, 0]] and area.tolist() == [1001, 273]


@pytest.mark.parametrize("as_map, pixels", [(True, 20), (False, 10)])
def test_a_chunk_holds_no_more_numbers_than_memory_allows(monkeypatch, as_map, pixels):
    """A hundred masks of 1024x2048 never stand in memory as numbers; yet chunks are no smaller than need be."""
    sizes, plain = [], torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda t, **options: sizes.append(t.shape[1]) or plain(t, **options))
    gt, pred = torch.ones(20, 30, dtype=torch.int64), torch.ones(3, 20, 30, dtype=torch.bool)
    mask_intersections(pred, gt if as_map else torch.stack([gt == 1, gt == 2]), 2, memory=60)
    assert set(sizes) == {pixels} and sum(sizes) == 600


@pytest.mark.parametrize("as_map", [True, False])
def test_boxes_are_half_open(as_map):
    """x1 y1 x2 y2 with x2 = last pixel + 1, of whatever shape the segment is."""
    gt = torch.zeros(6, 9, dtype=torch.int64)
    gt[1, 2] = gt[4, 7] = 1
    gt[5, 8], gt[0, 0:3] = 2, 3
    boxes = boxes_of(gt if as_map else torch.stack([gt == k for k in (1, 2, 3)]), 3)
    assert boxes.tolist() == [[2, 1, 8, 5], [8, 5, 9, 6], [0, 0, 3, 1]]


@pytest.mark.parametrize("change, sentence", [
    (dict(pred=torch.zeros(2, 3, 4).bool()), r"predictions \[2, 3, 4\] are no masks for the ground truth \[2, 2, 10\]"),
    (dict(scores=[0.5]), "2 predictions have 1 scores and 2 categories"),
    (dict(categories=[0]), "2 predictions have 2 scores and 1 categories"),
    (dict(categories=[0, 2]), "predicted categories must lie in 0 to 1"),
    (dict(gt_categories=[0]), "go from 0 to 2, but there are 1 categories"),
    (dict(gt_categories=[0, 0, 0]), "go from 0 to 2, but there are 3 categories"),
    (dict(gt=torch.full((2, 10), 3)), "go from 3 to 3, but there are 2 categories"),
    (dict(gt=torch.full((2, 10), -1)), "go from -1 to -1")])
def test_wrong_input_of_ap_ends_in_one_clear_sentence(change, sentence):
    given = dict(pred=squares(2), scores=[0.5, 0.4], categories=[0, 1], gt=squares(2), gt_categories=[0, 1])
    with pytest.raises(ValueError, match=sentence):
        AveragePrecision(2).update(*(given | change).values())


def test_other_wrong_input_of_ap_ends_in_one_clear_sentence():
    with pytest.raises(ValueError, match="kind must be 'mask' or 'box'"):
        AveragePrecision(2, kind="keypoint")
    with pytest.raises(ValueError, match=r"predictions \[2, 2, 10\] are no boxes"):
        AveragePrecision(2, kind="box").update(squares(2), [0.5, 0.4], [0, 1], squares(2), [0, 1])
    with pytest.raises(ValueError, match="1 pictures have predictions but 0 have ground truth"):
        average_precision([1], [], 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_everything_is_the_same_on_a_gpu():
    there = [tuple(v.cuda() for v in picture) for picture in PICTURES]
    assert str(measure(there)) == str(measure(PICTURES))
    for kind in ("mask", "box"):
        predictions, truths = ([tuple(v.cuda() for v in p) for p in side] for side in AP_PICTURES[kind])
        assert str(average_precision(predictions, truths, 3, kind=kind)) == str(COMPUTED[kind])
