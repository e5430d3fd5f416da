"""pq.py: how good is a panoptic segmentation? PQ and its relatives: PQ†, Acc_th and Prec_th, confusion, mIoU, AP.

    Kirillov, He, Girshick, Rother, Dollár: Panoptic Segmentation. CVPR 2019.                                      [PQ]
    Porzi, Rota Bulò, Colovic, Kontschieder: Seamless Scene Segmentation. CVPR 2019, section 4.                   [PQ†]
    de Geus, Dubbelman: Intra-Batch Supervision for Panoptic Segmentation on High-Resolution Images. WACV 2023,
    sections 3.3 and 6.2.                                                                [Acc_th, Prec_th, confusion]

mIoU cannot tell two cars from one; AP wants scores and lets masks overlap. A panoptic segmentation gives each pixel one
segment and has no scores. PQ compares two such maps:

        PQ_c  =    Σ_TP IoU / |TP|    ×    |TP| / (|TP| + ½ |FP| + ½ |FN|)        a pair (s, ŝ) is a TP if IoU > ½
                         SQ                              RQ = F1

Segments do not overlap, so each shares more than half with one other at most: there is no matching problem to solve.
It is an elegant rule, and two of our papers name its price.

PQ† (Porzi et al.). All pixels of a stuff class in an image are one segment, whose worth hangs on a cliff. In their
Figure 3 traffic light and pole come to nothing and sidewalk to 0.62, "even if they look qualitatively similar":

        IoU        0.46  0.49 | 0.51  0.62        Stuff needs no matching: each image has one segment at most.
        PQ_c       0     0    | 0.51  0.62        So M_c takes every pair with IoU > 0:
        PQ†_c      0.46  0.49 | 0.51  0.62                PQ†_c = 1/|M_c| Σ_{M_c} IoU

    That is blunter, not just kinder. What is in no pair costs nothing: a stuff class hallucinated in an image without
    it, and one missed altogether, add nothing to M_c. Each would add one half to PQ's denominator.

Acc_th, Prec_th (de Geus et al.). PQ counts segments, so one large bus that was cut in two weighs as little as one
distant pedestrian. Counting pixels of matched things shows it: training Panoptic FCN on crops instead of full images
(Cityscapes, Table 1) raises PQ_th from 51.1 to 52.2, while Acc_th falls from 85.1 to 81.3 and Prec_th from 91.4 to
86.8. The cause are predictions that cover several instances, which Figure 5 counts: `confusion_ratio`.

Everything but AP is computed from one small matrix, the areas of all intersections (predicted × ground truth
segments), which one bincount over the pixels yields. AP for boxes and masks follows COCO to the last detail.

Run:  python pq.py (the cliff at IoU ½, figures/pq.png; seconds)    Spec:  pytest tests/test_pq.py
                                                                  Speed: python tests/bench.py pq
"""
import argparse
import numpy as np
import torch
import torch.distributed as dist


# --- The one pass over the pixels ------------------------------------------------------------------------------------
def small_inputs(pred_categories, gt_categories, gt_crowd, num_categories):
    """Categories int64 [P], [G] and crowd flags bool [G] (none: all False), checked and on the CPU."""
    pred_categories = torch.as_tensor(pred_categories, dtype=torch.int64).cpu()
    gt_categories = torch.as_tensor(gt_categories, dtype=torch.int64).cpu()
    for which, categories in (("predicted", pred_categories), ("ground truth", gt_categories)):
        if ((categories < 0) | (categories >= num_categories)).any():
            raise ValueError(f"{which} categories must lie in 0 to {num_categories - 1}, not {categories.tolist()}")
    crowd = torch.zeros(len(gt_categories)) if gt_crowd is None else torch.as_tensor(gt_crowd).cpu()
    if crowd.shape != gt_categories.shape:
        raise ValueError(f"there are {len(gt_categories)} ground truth categories but {crowd.numel()} crowd flags")
    return pred_categories, gt_categories, crowd.bool()


def joint_areas(pred_segments, gt_segments, P, G):
    """Areas of all intersections: int64 [P + 1, G + 1] on the CPU; row 0 is predicted void, column 0 true void.

    Integer maps [H, W] on any device, with ids 0..P and 0..G: one bincount of pred * (G + 1) + gt. An id beyond would
    be counted as another pair, so both ranges are looked at first, which costs little beside the counting.
    """
    pred_segments, gt_segments = torch.as_tensor(pred_segments), torch.as_tensor(gt_segments)
    if pred_segments.ndim != 2 or pred_segments.shape != gt_segments.shape:
        raise ValueError(f"predicted segments {list(pred_segments.shape)} and ground truth segments "
                         f"{list(gt_segments.shape)} must be maps [H, W] of one shape")
    for which, segments, N in (("predicted", pred_segments, P), ("ground truth", gt_segments, G)):
        low, high = map(int, torch.aminmax(segments)) if segments.numel() else (0, 0)
        if low < 0 or high > N:
            raise ValueError(f"{which} segments hold ids from {low} to {high}, but there are {N} categories")
    index = torch.add(gt_segments.to(pred_segments.device).long(), pred_segments.long(), alpha=G + 1)    # [H, W]
    return torch.bincount(index.flatten(), minlength=(P + 1) * (G + 1)).view(P + 1, G + 1).cpu()


# --- PQ, SQ, RQ (Kirillov et al.), PQ† (Porzi et al., section 4), Acc_th and Prec_th (de Geus et al., section 3.3) ---
class PanopticQuality:
    """Adds up a data set picture by picture; `compute` gives all measures in percent.

    isthing [C]. Void and crowd as in the official COCO panoptic API:
      - pixels that are void in the ground truth are in no union (those of a crowd are);
      - a crowd segment never matches and is no FN, be it thing or stuff; so a crowd stuff segment is not in M_c either;
      - an unmatched prediction is no FP if more than half of it lies on void plus the crowd of its own category;
      - a ground truth segment under predicted void is an FN. void_rule="seamless" adds the 2019 paper's rule: not so
        if predicted void covers more than half of it.
    Choice: of several crowd segments of one category in an image the last one counts, as in the official code; COCO
      and Cityscapes have one at most.
    Choice: a segment without a pixel does not exist: no FP, no FN. (The official code refuses it in a prediction.)
    Choice: if M_c is empty, PQ†_c is 0/0. It is taken as 0 if c occurs in the ground truth or the predictions, for then
      nothing of c was ever right, and leaving it out would reward a model that misses a rare class wholly over one that
      nearly does. It is left out of the mean, as PQ_c is, only if c never occurs (TP = FP = FN = 0).
    Choice: pixels under true void or any crowd count neither as ground truth for Acc_th nor as false positives for
      Prec_th, since nobody knows what is right there; mIoU ignores them too. Predicted void is a miss for both.
    """

    def __init__(self, isthing, void_rule="coco"):
        if void_rule not in ("coco", "seamless"):
            raise ValueError(f"void_rule must be 'coco' or 'seamless', not {void_rule!r}")
        self.isthing, self.void_rule = torch.as_tensor(isthing).bool().cpu(), void_rule
        C = len(self.isthing)
        names = ("tp", "fp", "fn", "iou", "pairs", "pairs_iou", "tp_pixels")        # counts are exact up to 2^53
        self.sums = {name: torch.zeros(C, dtype=torch.float64) for name in names}
        self.sums["pixels"] = torch.zeros(C, C + 1, dtype=torch.float64)        # true × predicted category (C: void)

    @torch.no_grad()
    def update(self, pred_segments, pred_categories, gt_segments, gt_categories, gt_crowd=None):
        """One picture: segments int64 [H, W] (0 is void), categories int64 [N] of segments 1..N, crowd bool [N]."""
        C = len(self.isthing)
        pred_categories, gt_categories, crowd = small_inputs(pred_categories, gt_categories, gt_crowd, C)
        joint = joint_areas(pred_segments, gt_segments, len(pred_categories), len(gt_categories))   # [P + 1, G + 1]
        pred_area, gt_area = joint.sum(1)[1:], joint.sum(0)[1:]                                     # [P], [G]
        on_void, under_void, inter = joint[1:, 0], joint[0, 1:], joint[1:, 1:]                      # [P], [G], [P, G]

        # Matching: an IoU above one half has no rival, so a comparison is all it takes. 0/0 is NaN and matches nothing.
        iou = inter.double() / (pred_area[:, None] + gt_area - inter - on_void[:, None])            # [P, G]
        same = pred_categories[:, None] == gt_categories                                            # [P, G]
        match = same & ~crowd & (iou > 0.5)
        matching = same & ~crowd & (iou > 0)                                                        # M_c

        # What remains unmatched is wrong, unless it may be ignored.
        missed = (gt_area > 0) & ~crowd & ~match.any(0)                                             # [G]
        if self.void_rule == "seamless":
            missed &= 2 * under_void <= gt_area
        counts = crowd & (gt_area > 0)
        later = (gt_categories[:, None] == gt_categories) & counts                                  # [G, G]
        last_crowd = counts & ~later.triu(1).any(1)
        ignored = on_void + (inter * (same & last_crowd)).sum(1)                                    # [P] pixels
        spurious = (pred_area > 0) & ~match.any(1) & (2 * ignored <= pred_area)                     # [P]

        for name, categories, value in (
                ("tp", gt_categories, match.sum(0)), ("iou", gt_categories, torch.where(match, iou, 0).sum(0)),
                ("fp", pred_categories, spurious), ("fn", gt_categories, missed),
                ("pairs", gt_categories, matching.sum(0)),
                ("pairs_iou", gt_categories, torch.where(matching, iou, 0).sum(0)),
                ("tp_pixels", gt_categories, (inter * match).sum(0))):
            self.sums[name].index_add_(0, categories, value.double())
        rows = torch.cat([torch.tensor([C]), pred_categories])                                    # [P + 1], void first
        cells = gt_categories[~crowd] * (C + 1) + rows[:, None]                                   # [P + 1, G no crowd]
        self.sums["pixels"].view(-1).index_add_(0, cells.flatten(), joint[:, 1:][:, ~crowd].flatten().double())

    def all_reduce(self):
        """Sums over the ranks of torch.distributed, once, after the last update; does nothing without a group."""
        if dist.is_available() and dist.is_initialized():
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            for name, value in self.sums.items():
                value = value.to(device)
                dist.all_reduce(value)
                self.sums[name] = value.cpu()
        return self

    def compute(self):
        """Percent, NaN where there is nothing to average: PQ SQ RQ PQ_dagger, each also with _th and _st; Acc_th
        Prec_th mIoU; per_category: dicts of pq sq rq pq_dagger iou tp fp fn isthing, NaN where it never occurs.
        """
        thing, pixels = self.isthing, self.sums["pixels"]
        tp, fp, fn, iou_sum, pairs, pairs_iou, tp_pixels = list(self.sums.values())[:-1]
        occurs, nan = tp + fp + fn > 0, torch.tensor(torch.nan, dtype=torch.float64)
        rq = 100 * tp / (tp + fp / 2 + fn / 2)                                      # 0/0 = NaN: left out of the mean
        sq = torch.where(occurs, 100 * iou_sum / tp.clamp(min=1), nan)
        pq = sq * rq / 100
        dagger = torch.where(occurs | (pairs > 0), 100 * pairs_iou / pairs.clamp(min=1), nan)
        dagger = torch.where(thing, pq, dagger)
        hit = pixels.diagonal()
        iou = 100 * hit / (pixels.sum(1) + pixels.sum(0)[:-1] - hit)
        result = {}
        for name, value in (("PQ", pq), ("SQ", sq), ("RQ", rq), ("PQ_dagger", dagger)):
            for suffix, group in (("", thing | ~thing), ("_th", thing), ("_st", ~thing)):
                result[name + suffix] = value[group].nanmean().item()
        result["Acc_th"] = (100 * tp_pixels[thing].sum() / pixels[thing].sum()).item()
        result["Prec_th"] = (100 * tp_pixels[thing].sum() / pixels[:, :-1][:, thing].sum()).item()
        result["mIoU"] = iou.nanmean().item()
        columns = {"pq": pq, "sq": sq, "rq": rq, "pq_dagger": dagger, "iou": iou, "tp": tp.long(), "fp": fp.long(),
                   "fn": fn.long(), "isthing": thing}
        rows = zip(*(column.tolist() for column in columns.values()))
        return result | {"per_category": [dict(zip(columns, row)) for row in rows]}

    def table(self, names):
        """The result as text, a line per category that occurs; names [C]."""
        if len(names) != len(self.isthing):
            raise ValueError(f"there are {len(self.isthing)} categories but {len(names)} names")
        result, width = self.compute(), max([len("Things"), *map(len, names)])
        def line(name, row, keys):
            return f"{name:{width}}" + "".join(f"{row[key]:7.1f}" for key in keys)
        lines = [f"{'':{width}}     PQ     SQ     RQ    PQ†    IoU      TP      FP      FN"]
        for name, row in zip(names, result["per_category"]):
            if any(row[key] for key in ("tp", "fp", "fn")):
                lines.append(line(name, row, ("pq", "sq", "rq", "pq_dagger", "iou"))
                             + "".join(f"{row[key]:8d}" for key in ("tp", "fp", "fn")))
        lines += ["-" * len(lines[0]), line("All", result, ("PQ", "SQ", "RQ", "PQ_dagger", "mIoU")),
                  line("Things", result, ("PQ_th", "SQ_th", "RQ_th", "PQ_dagger_th")),
                  line("Stuff", result, ("PQ_st", "SQ_st", "RQ_st", "PQ_dagger_st")),
                  f"Acc_th {result['Acc_th']:.1f}   Prec_th {result['Prec_th']:.1f}"]
        return "\n".join(lines)


# --- Confusion (de Geus et al., section 6.2 and Figure 5) ------------------------------------------------------------
def confusion_ratio(pred_segments, pred_categories, gt_segments, gt_categories, isthing, thresholds, gt_crowd=None):
    """How many predicted thing segments are confused between instances: (confused, all), each int64 [len(thresholds)].

    Confused at T: it covers more than T percent of the area of each of at least two ground truth things, of whatever
    category. Counts, so that images and ranks can be pooled: Figure 5 is 100 * Σ confused / Σ all.
    Instead of segments [H, W] the prediction may be masks bool [P, H, W] that overlap.
    Choice: a crowd is no instance and confuses nobody; a prediction without a pixel is not among all.
    """
    isthing = torch.as_tensor(isthing).bool().cpu()
    pred_categories, gt_categories, crowd = small_inputs(pred_categories, gt_categories, gt_crowd, len(isthing))
    if pred_segments.ndim == 3:
        check_masks(pred_segments, pred_categories, gt_segments, gt_categories)
        inter, pred_area = (v.cpu() for v in mask_intersections(pred_segments, gt_segments, len(gt_categories)))
        gt_area = torch.bincount(gt_segments.flatten(), minlength=len(gt_categories) + 1)[1:].cpu()
    else:
        joint = joint_areas(pred_segments, gt_segments, len(pred_categories), len(gt_categories))   # [P + 1, G + 1]
        inter, pred_area, gt_area = joint[1:, 1:], joint[1:].sum(1), joint.sum(0)[1:]
    rows, columns = isthing[pred_categories] & (pred_area > 0), isthing[gt_categories] & ~crowd
    inter, area = inter[rows][:, columns], gt_area[columns]                       # [P_th, G_th], [G_th]
    T = torch.as_tensor(thresholds, dtype=torch.float64).cpu()[:, None, None]                       # [len, 1, 1]
    confused = ((100 * inter > T * area).sum(2) >= 2).sum(1)
    return confused, torch.full_like(confused, len(inter))


def check_masks(masks, categories, gt_segments, gt_categories):
    """ValueError unless masks [M, H, W] and segments [H, W] of the truth fit each other and their categories."""
    if masks.ndim != 3 or gt_segments.ndim != 2 or masks.shape[1:] != gt_segments.shape or len(masks) != len(categories):
        raise ValueError(f"masks {list(masks.shape)} with {len(categories)} categories do not fit the ground truth {list(gt_segments.shape)}: "
                         "expected [M, H, W], M and [H, W]")
    low, high = map(int, torch.aminmax(gt_segments))
    if low < 0 or high > len(gt_categories):
        raise ValueError(f"ground truth segments hold ids from {low} to {high}, but there are {len(gt_categories)} categories")


def instance_pixels(masks, scores, categories, gt_segments, gt_categories, isthing, gt_crowd=None):
    """Acc_th and Prec_th of instances whose masks bool [M, H, W] may overlap (de Geus et al., section 6.4): counts of pixels
    (right, true, predicted), int64 [3], for pooling: Acc_th = right / true, Prec_th = right / predicted.

    Right are the pixels that a prediction shares with the thing that it matches: same category, IoU > 1/2. The text does not
    say what overlap changes. Choice: two predictions may now claim one thing; it belongs to the one of the higher score, all
    pixels of the other are wrong. Each prediction counts all its pixels, whoever else has them; those on void or a crowd
    count for nobody, as in PanopticQuality.
    """
    isthing = torch.as_tensor(isthing).bool().cpu()
    categories, gt_categories, crowd = small_inputs(categories, gt_categories, gt_crowd, len(isthing))
    check_masks(masks, categories, gt_segments, gt_categories)
    if len(scores) != len(masks):
        raise ValueError(f"there are {len(masks)} masks but {len(scores)} scores")
    order = torch.argsort(torch.as_tensor(scores).cpu(), descending=True, stable=True)
    order = order[isthing[categories[order]]]
    inter = mask_intersections(masks[order.to(masks.device)].bool(), gt_segments, len(gt_categories))[0].cpu()  # [M, G]
    true = torch.bincount(gt_segments.flatten().cpu(), minlength=len(gt_categories) + 1)[1:]
    iou = inter / (inter.sum(1, keepdim=True) + true - inter).clamp(min=1)
    match = (iou > 0.5) & (categories[order][:, None] == gt_categories) & ~crowd
    first = match & (match.cumsum(0) == 1)                                            # of a thing, by falling score
    return torch.stack([(inter * first).sum(), true[isthing[gt_categories] & ~crowd].sum(), inter[:, ~crowd].sum()])


# --- Average precision as COCO defines it ----------------------------------------------------------------------------
COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
AREAS = {"": (0, 1e10), "_small": (0, 32 ** 2), "_medium": (32 ** 2, 96 ** 2), "_large": (96 ** 2, 1e10)}
MAX_DETECTIONS = 100                                              # per image and category


def mask_intersections(pred_masks, gt, num_gt, memory=2 ** 24):
    """Pixels that each of pred_masks bool [M, H, W] shares with each of gt, masks bool [N, H, W] or segments [H, W].

    Returns int64 [M, N] and the areas of the predictions [M]. Only pixels inside a mask are looked at, and at most
    `memory` numbers at a time: a hundred masks of 1024x2048 would be gigabytes as floats.
    """
    pred, gt = pred_masks.flatten(1), gt.flatten(-2)                                                # [M, HW], [(N,) HW]
    M, N = len(pred), num_gt
    inter, area = pred.new_zeros(M, N, dtype=torch.int64), pred.new_zeros(M, dtype=torch.int64)
    step = max(1, memory // max(1, M * (N if gt.ndim == 2 else 1)))
    for i in range(0, pred.shape[1], step):
        m, pixel = pred[:, i:i + step].nonzero(as_tuple=True)                                       # [n] each
        part = gt[..., i:i + step][..., pixel]                                                      # [n] or [N, n]
        area += torch.bincount(m, minlength=M)
        if gt.ndim == 1:
            inter += torch.bincount(m * (N + 1) + part, minlength=M * (N + 1)).view(M, N + 1)[:, 1:]
        else:
            inter.index_add_(0, m, part.T.long())
    return inter, area


def boxes_of(gt, num_gt):
    """Boxes float64 [N, 4] (x1 y1 x2 y2, half open) of masks bool [N, H, W] or segments [H, W], each with a pixel."""
    H, W = gt.shape[-2:]
    if gt.ndim == 2:                                              # which segments does each row, each column hold?
        y, x = (torch.arange(n, device=gt.device) for n in (H, W))
        rows = torch.bincount((gt * H + y[:, None]).flatten(), minlength=(num_gt + 1) * H).view(-1, H)[1:] > 0
        columns = torch.bincount((gt * W + x).flatten(), minlength=(num_gt + 1) * W).view(-1, W)[1:] > 0
    else:
        rows, columns = gt.any(2), gt.any(1)                                                        # [N, H], [N, W]
    (x1, x2), (y1, y2) = ((hit.int().argmax(1), hit.shape[1] - hit.int().flip(1).argmax(1)) for hit in (columns, rows))
    return torch.stack([x1, y1, x2, y2], 1).double()


class AveragePrecision:
    """COCO's AP over a data set, for "mask" or "box". Keeps for each detection only whether it matched, never a mask.

    A detection takes, in the order of scores, the free ground truth of its category with the highest IoU, if that
    reaches the threshold. Crowds, and ground truth outside the area range, are ignored: what matches them is neither
    right nor wrong; a crowd can be matched again and again, by intersection over the detection's own area. An unmatched
    detection outside the area range is ignored too. Ground truth has the area of its mask, also for boxes, as in COCO.
    Precision is made monotone and read off at recall 0, .01, ..., 1. Categories without ground truth are left out.
    Equal scores keep the order of `update`, as in COCO; split over ranks, ties may come in another order.
    """

    def __init__(self, num_categories, iou_thresholds=COCO_THRESHOLDS, kind="mask"):
        if kind not in ("mask", "box"):
            raise ValueError(f"kind must be 'mask' or 'box', not {kind!r}")
        self.num_categories, self.kind = num_categories, kind
        self.thresholds = np.asarray(iou_thresholds, dtype=np.float64).reshape(-1)                  # [T]
        T, A = len(self.thresholds), len(AREAS)
        self.positives = np.zeros((num_categories, A), dtype=np.int64)                              # ground truth
        self.parts = [(np.zeros(0), np.zeros(0, np.int64), np.zeros((0, T, A), bool), np.zeros((0, T, A), bool))]

    @torch.no_grad()
    def update(self, pred, scores, categories, gt, gt_categories, gt_crowd=None, isthing=None):
        """One picture. pred: masks bool [M, H, W] or boxes [M, 4] half open; scores, categories [M];
        gt: segments int64 [H, W] or masks bool [N, H, W]; gt_categories, gt_crowd [N]. With isthing [C] stuff is left
        out on both sides. Choice: ground truth without a pixel does not exist; a detection without one is an FP.
        """
        pred, gt = torch.as_tensor(pred), torch.as_tensor(gt)
        gt = gt.to(pred.device, torch.int64 if gt.ndim == 2 else torch.bool)
        categories, gt_categories, crowd = small_inputs(categories, gt_categories, gt_crowd, self.num_categories)
        isthing = torch.as_tensor([True] * self.num_categories if isthing is None else isthing).bool().cpu()
        scores, N = torch.as_tensor(scores, dtype=torch.float64).cpu(), len(gt_categories)
        if pred.shape[1:] != (gt.shape[-2:] if self.kind == "mask" else (4,)):
            raise ValueError(f"predictions {list(pred.shape)} are no {'masks' if self.kind == 'mask' else 'boxes'} for "
                             f"the ground truth {list(gt.shape)}: expected [M, H, W] or [M, 4]")
        if not len(pred) == len(scores) == len(categories):
            raise ValueError(f"{len(pred)} predictions have {len(scores)} scores and {len(categories)} categories")
        low, high = map(int, torch.aminmax(gt)) if gt.ndim == 2 else (0, len(gt))
        if low < 0 or high > N or gt.ndim == 3 and high < N:
            raise ValueError(f"ground truth segments go from {low} to {high}, but there are {N} categories")

        # The best 100 of each category, in the order of scores; the sort is stable, as pycocotools' is.
        order = torch.sort(scores, descending=True, stable=True).indices
        order = order[isthing[categories[order]]]
        rank = (categories[order][:, None] == categories[order]).tril(-1).sum(1)                    # among its category
        order = order[rank < MAX_DETECTIONS]
        pred, scores, categories = pred[order.to(pred.device)], scores[order], categories[order]

        gt_area = gt_size = torch.bincount(gt.flatten(), minlength=N + 1)[1:] if gt.ndim == 2 else gt.sum((1, 2))
        if self.kind == "mask":
            inter, pred_area = mask_intersections(pred.bool(), gt, N)                               # [M, N], [M]
        else:
            box, pred = boxes_of(gt, N), pred.double()
            corners = torch.minimum(pred[:, None, 2:], box[:, 2:]), torch.maximum(pred[:, None, :2], box[:, :2])
            inter = (corners[0] - corners[1]).clamp(min=0).prod(2)                                  # [M, N]
            pred_area, gt_size = ((v[:, 2:] - v[:, :2]).prod(1) for v in (pred, box))               # [M], [N]
        union = pred_area[:, None] + gt_size - inter
        union = torch.where(crowd.to(union.device), pred_area.double()[:, None], union.double())    # [M, N]
        iou = (inter / union.clamp(min=1e-9)).cpu().masked_fill(categories[:, None] != gt_categories, -1)
        exists = (gt_area.cpu() > 0) & isthing[gt_categories]
        iou, pred_area = iou[:, exists].numpy(), pred_area.cpu().numpy()                            # [M, N], [M]
        gt_area, crowd, gt_categories = (v.cpu()[exists].numpy() for v in (gt_area, crowd, gt_categories))
        low, high = np.array(list(AREAS.values())).T[:, :, None]                                    # [A, 1] each
        gt_ignored = crowd | (gt_area < low) | (gt_area > high)                                     # [A, N]
        np.add.at(self.positives, gt_categories, ~gt_ignored.T)
        matched, onto_ignored = self._match(iou, gt_ignored, crowd)
        outside = ((pred_area < low) | (pred_area > high)).T[:, None]                               # [M, 1, A]
        self.parts.append((scores.numpy(), categories.numpy(), matched, onto_ignored | ~matched & outside))

    def _match(self, iou, gt_ignored, crowd):
        """Greedy matching, all thresholds and area ranges at once: bool [M, T, A] matched, and matched to ignored."""
        (M, N), T, A = iou.shape, len(self.thresholds), len(AREAS)
        matched, ignored = np.zeros((2, M, T, A), dtype=bool)
        free = np.ones((T, A, N), dtype=bool)
        threshold = np.minimum(self.thresholds, 1 - 1e-10)[:, None, None]                           # [T, 1, 1]
        t, a = np.ogrid[:T, :A]
        for d in np.flatnonzero((iou >= threshold.min()).any(1)):  # sequential by nature: each choice binds the next
            candidate = free & (iou[d] >= threshold)                                                # [T, A, N]
            regular = candidate & ~gt_ignored
            candidate = np.where(regular.any(-1, keepdims=True), regular, candidate)            # ignored ones come last
            best = N - 1 - np.where(candidate, iou[d], -1)[..., ::-1].argmax(-1)                    # of equals the last
            matched[d] = candidate.any(-1)
            ignored[d] = matched[d] & gt_ignored[a, best]
            free[t, a, best] &= ~matched[d] | crowd[best]
        return matched, ignored

    def all_reduce(self):
        """Gathers the match flags of all ranks, once, after the last update; does nothing without a process group."""
        if dist.is_available() and dist.is_initialized():
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, (self.positives, self.parts))
            self.positives = sum(positives for positives, _ in gathered)
            self.parts = [part for _, parts in gathered for part in parts]
        return self

    def compute(self):
        """Percent, NaN where there is no ground truth: AP (mean over thresholds), AP50, AP75 (NaN if not asked for),
        AP_small, AP_medium, AP_large; per_threshold {threshold: AP}, per_category [AP of category 0, 1, ...]."""
        scores, categories, matched, ignored = (np.concatenate(v) for v in zip(*self.parts))
        recalls = torch.from_numpy(np.linspace(0, 1, 101))
        ap = torch.full((self.num_categories, len(self.thresholds), len(AREAS)), torch.nan, dtype=torch.float64)
        for c in np.flatnonzero(self.positives[:, 0] > 0):
            own = np.flatnonzero(categories == c)
            own = own[np.argsort(-scores[own], kind="stable")]
            hit, counts = (torch.from_numpy(v[own]).permute(1, 2, 0) for v in (matched, ~ignored))  # [T, A, n]
            tp, fp = (hit & counts).double().cumsum(-1), (~hit & counts).double().cumsum(-1)
            precision = (tp / (tp + fp + np.spacing(1))).flip(-1)
            precision = torch.cummax(precision, -1).values.flip(-1) if len(own) else precision
            precision = torch.nn.functional.pad(precision, (0, 1))                                # 0 where recall ends
            recall = (tp / torch.from_numpy(self.positives[c])[:, None]).contiguous()               # [T, A, n]
            at = torch.searchsorted(recall, recalls.expand(*recall.shape[:2], -1).contiguous())     # [T, A, 101]
            value = 100 * precision.gather(-1, at).mean(-1)                                         # [T, A]
            ap[c] = torch.where(torch.from_numpy(self.positives[c] > 0), value, torch.nan)
        result = {f"AP{suffix}": ap[..., i].nanmean().item() for i, suffix in enumerate(AREAS)}
        result |= {f"AP{t}": ap[:, np.isclose(100 * self.thresholds, t), 0].nanmean().item() for t in (50, 75)}
        per_threshold = dict(zip(self.thresholds.tolist(), ap[..., 0].nanmean(0).tolist()))
        return result | {"per_threshold": per_threshold, "per_category": ap[..., 0].nanmean(1).tolist()}


def average_precision(predictions, ground_truths, num_categories, iou_thresholds=COCO_THRESHOLDS, kind="mask",
                      isthing=None):
    """AP of lists of pictures: predictions (masks or boxes, scores, categories), ground truths (segments or masks,
    categories[, crowd]); see `AveragePrecision.update` for shapes and `AveragePrecision.compute` for the result."""
    if len(predictions) != len(ground_truths):
        raise ValueError(f"{len(predictions)} pictures have predictions but {len(ground_truths)} have ground truth")
    metric = AveragePrecision(num_categories, iou_thresholds, kind)
    for prediction, truth in zip(predictions, ground_truths):
        metric.update(*prediction, *truth, isthing=isthing)
    return metric.compute()


# --- The cliff of Figure 3 -------------------------------------------------------------------------------------------
def draw_street(shift, H=256, W=512):
    """Segments [H, W] 1 sky 2 building 3 road 4 sidewalk 5 car; the sidewalk ends `shift` pixels too early."""
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    segments = torch.where(y > 60 + 25 * ((x // 64 * 37) % 5) // 4, 2, 1)
    segments[y > 0.55 * H] = 3 + (x + shift < 60 + 0.9 * (H - y)).long()[y > 0.55 * H]
    segments[((x - 330) / 70) ** 2 + ((y - 160) / 38) ** 2 < 1] = 5
    return segments


def demo(full=False):
    """A sidewalk shrinks pixel by pixel: what do PQ and PQ† say? Writes figures/pq.png and prints a table."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from pathlib import Path
    plt.rcParams["font.size"] = 13

    truth, rows = draw_street(0), []
    for shift in torch.linspace(0, 120, 961 if full else 241).tolist():
        (metric := PanopticQuality([False] * 4 + [True])).update(draw_street(shift), range(5), truth, range(5))
        rows.append([metric.compute()["per_category"][3][key] for key in ("iou", "pq", "pq_dagger")] + [shift])
    rows = np.array(rows)                                                                           # [shifts, 4]
    at = {iou: rows[np.abs(rows[:, 0] - iou).argmin()] for iou in (46, 49, 51, 62)}

    print(f"{'the paper says':>60} | measured on our sidewalk")
    for name, iou in (("traffic light", 46), ("pole", 49), ("", 51), ("sidewalk", 62)):
        said = f"Seamless, Figure 3: {name:13} IoU .{iou} -> PQ_c {'.62' if iou == 62 else 0}" if name else ""
        print(f"{said:>60} | IoU {at[iou][0]:.1f} -> PQ_c {at[iou][1]:.1f}, PQ†_c {at[iou][2]:.1f}")
    cars = torch.zeros(80, 100, dtype=torch.int64)                      # twenty small cars, and two large ones that are
    cars[:40] = 1 + torch.arange(10).repeat_interleave(10) + 10 * torch.arange(2).repeat_interleave(20)[:, None]
    cars[40:] = 21 + torch.arange(2).repeat_interleave(50)              # taken for one
    (metric := PanopticQuality([True])).update(cars.clamp(max=21), [0] * 21, cars, [0] * 22)
    lost = ", ".join(f"{name} {metric.compute()[name] - 100:.1f}" for name in ("PQ_th", "Acc_th", "Prec_th"))
    print(f"{'IBS, Table 1, crops: PQ_th +1.1, Acc_th -3.8, Prec_th -4.6':>60} | 2 of 22 cars taken for one: {lost}")

    colours = np.array([[120, 170, 215], [95, 95, 100], [128, 64, 128], [225, 60, 215], [25, 35, 150]]) / 255
    figure = plt.figure(figsize=(10, 4.7), dpi=110, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.15))
    for k, iou in enumerate((51, 49)):
        segments, axes = draw_street(at[iou][3]), figure.add_subplot(grid[k, 0])
        picture, wrong = colours[segments.numpy() - 1], (segments != truth).numpy()
        picture[wrong] = 0.35 * picture[wrong] + 0.65                                               # errors in light
        axes.imshow(picture)
        axes.set_title("sidewalk IoU {:.1f}:  PQ$_c$ {:.1f},  PQ$^†_c$ {:.1f}".format(*at[iou]), fontsize=13)
        axes.set_axis_off()
    axes, above = figure.add_subplot(grid[:, 1]), rows[:, 0] > 50
    for part, label in ((above, "PQ$_c$"), (~above, None)):
        axes.plot(rows[part, 0], rows[part, 1], color="tab:red", lw=3, label=label)
    axes.plot(rows[:, 0], rows[:, 2], color="tab:blue", lw=2, ls="--", label="PQ$^†_c$")
    for iou, label, y in ((49, "the two pictures", 16), (51, "", 21)):
        axes.plot(at[iou][0], at[iou][1], "o", color="tab:red", ms=9)
        axes.annotate(label, at[iou][:2], (52, y), arrowprops={"arrowstyle": "->"})
    axes.set(xlim=(20, 100), ylim=(-3, 103), xlabel="IoU of the sidewalk with its ground truth (%)")
    axes.set_title("one stuff class, one picture", fontsize=13)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    path = Path(__file__).parent / "figures" / "pq.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="shift the sidewalk in finer steps")
    demo(parser.parse_args().full)

# Exercises
# 1. Let segments match at IoU >= 0.5. Draw two predictions that both match one ground truth segment. Which sentence of
#    the docstring breaks, and what does test_an_iou_of_exactly_one_half_is_no_match say?
# 2. Make PQ† pay for what it overlooks: let each stuff segment without a partner, on either side, add 1/2 to |M_c|.
#    That is PQ_c with the threshold 0. The loop oracle objects, and the tests that call a hallucinated or missed stuff
#    class free. Which of the two measures would you rather report?
# 3. In the demo give the two large cars the widths 60 and 40. PQ_th and Acc_th recover, for the one prediction now
#    matches the wider car. Does confusion_ratio still see it, and up to which T?
