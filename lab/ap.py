"""Average precision as COCO defines it: detections compete for each true object by their scores.

For each category the detections of a whole data set are sorted by score. Each takes the free true
object that it overlaps most, if the IoU reaches a threshold. The precision is averaged over recall
0, 0.01, ..., 1, then over the thresholds 0.50, 0.55, ..., 0.95. tests/test_pq.py compares it with
loops over the detections and, where pycocotools is installed, with its numbers.
"""
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import mask_boxes
from pq import check_categories, mask_intersections

COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
AREAS = {"": (0, 1e10), "_small": (0, 32**2), "_medium": (32**2, 96**2), "_large": (96**2, 1e10)}
MAX_DETECTIONS = 100                                           # per image and category


def intersections(masks, gt, count):
    """Pixels that masks, bool [M, H, W], share with `gt`: segments int64 [H, W] with ids 1..count,
    or masks bool [count, H, W] that may overlap -> int64 [M, count], and the masks' areas [M]."""
    if gt.ndim == 2:
        return mask_intersections(masks, gt, count)
    shared = torch.zeros(len(masks), count, dtype=torch.int64)
    for k, one in enumerate(gt):
        shared[:, k] = (masks & one).sum((1, 2)).cpu()
    return shared, masks.sum((1, 2)).cpu()


def boxes_of(gt, count):
    """Boxes float64 [count, 4] of segments int64 [H, W] or of masks bool [count, H, W]."""
    if gt.ndim == 2:
        return mask_boxes(gt, count).double()
    first, last = [], []
    for hit in (gt.any(1), gt.any(2)):                         # columns, rows
        first.append(hit.int().argmax(1))
        last.append(hit.shape[1] - hit.int().flip(1).argmax(1))
    return torch.stack(first + last, 1).double()


class AveragePrecision:
    """COCO's AP over a data set, for "mask" or "box". Keeps only whether each detection matched.

    A detection takes, in the order of scores, the free ground truth of its category with the
    highest IoU, if that reaches the threshold. Crowds, and ground truth outside the area range, are
    ignored: what matches them is neither right nor wrong; a crowd can be matched again and again,
    by intersection over the detection's own area. An unmatched detection outside the area range is
    ignored too. Ground truth has the area of its mask, also for boxes, as in COCO. Precision is
    made monotone and read off at recall 0, .01, ..., 1. Categories without ground truth are left
    out. Equal scores keep the order of `update`, as in COCO; split over ranks, ties may come in
    another order. areas: {suffix of AP: (least, largest area)}, "" first; None: COCO's."""

    def __init__(self, num_categories, iou_thresholds=COCO_THRESHOLDS, kind="mask", areas=None):
        if kind not in ("mask", "box"):
            raise ValueError(f"kind must be 'mask' or 'box', not {kind!r}")
        self.num_categories, self.kind, self.areas = num_categories, kind, areas or AREAS
        self.thresholds = np.asarray(iou_thresholds, dtype=np.float64).reshape(-1)    # [T]
        T, A = len(self.thresholds), len(self.areas)
        self.positives = np.zeros((num_categories, A), dtype=np.int64)                # ground truth
        nothing = np.zeros((0, T, A), bool)
        self.parts = [(np.zeros(0), np.zeros(0, np.int64), nothing, nothing)]

    @torch.no_grad()
    def update(self, pred, scores, categories, gt, gt_categories, gt_crowd=None, isthing=None):
        """One image. pred: masks bool [M, H, W] or boxes [M, 4] half open; scores, categories [M];
        gt: segments int64 [H, W] or masks bool [N, H, W]; gt_categories, gt_crowd [N]. With isthing
        [C] stuff is left out on both sides.

        Choice: ground truth without a pixel does not exist; a detection without one is an FP."""
        pred, gt = torch.as_tensor(pred), torch.as_tensor(gt)
        gt = gt.to(pred.device, torch.int64 if gt.ndim == 2 else torch.bool)
        categories, gt_categories, crowd = check_categories(
            categories, gt_categories, gt_crowd, count=self.num_categories)
        isthing = [True] * self.num_categories if isthing is None else isthing
        isthing = torch.as_tensor(isthing).bool().cpu()
        scores, N = torch.as_tensor(scores, dtype=torch.float64).cpu(), len(gt_categories)
        self._check(pred, scores, categories, gt=gt, N=N)

        # The best 100 of each category, by falling score; the sort is stable, as pycocotools' is.
        order = torch.sort(scores, descending=True, stable=True).indices
        order = order[isthing[categories[order]]]
        same = categories[order][:, None] == categories[order]
        order = order[same.tril(-1).sum(1) < MAX_DETECTIONS]   # its rank among its category
        pred, scores, categories = pred[order.to(pred.device)], scores[order], categories[order]

        if gt.ndim == 2:
            gt_area = torch.bincount(gt.flatten(), minlength=N + 1)[1:].cpu()         # [N]
        else:
            gt_area = gt.sum((1, 2)).cpu()
        if self.kind == "mask":
            inter, pred_area = intersections(pred, gt, N)                             # [M, N], [M]
            gt_size = gt_area
        else:
            pred, box = pred.double().cpu(), boxes_of(gt, N).cpu()
            low = torch.maximum(pred[:, None, :2], box[:, :2])
            high = torch.minimum(pred[:, None, 2:], box[:, 2:])
            inter = (high - low).clamp(min=0).prod(2)
            pred_area, gt_size = ((v[:, 2:] - v[:, :2]).prod(1) for v in (pred, box))
        union = (pred_area[:, None] + gt_size - inter).double()
        union = torch.where(crowd, pred_area.double()[:, None], union)
        iou = (inter / union.clamp(min=1e-9)).masked_fill(categories[:, None] != gt_categories, -1)

        exists = (gt_area > 0) & isthing[gt_categories]
        iou, pred_area = iou[:, exists].numpy(), pred_area.numpy()                    # [M, N], [M]
        gt_area, crowd = gt_area[exists].numpy(), crowd[exists].numpy()
        low, high = np.array(list(self.areas.values())).T[:, :, None]                 # [A, 1] each
        gt_ignored = crowd | (gt_area < low) | (gt_area > high)                       # [A, N]
        np.add.at(self.positives, gt_categories[exists].numpy(), ~gt_ignored.T)
        matched, onto_ignored = self._match(iou, gt_ignored, crowd)                   # [M, T, A]
        outside = ((pred_area < low) | (pred_area > high)).T[:, None]                 # [M, 1, A]
        ignored = onto_ignored | ~matched & outside
        self.parts.append((scores.numpy(), categories.numpy(), matched, ignored))

    def _check(self, pred, scores, categories, gt, N):
        """ValueError, in one sentence, for what does not fit together."""
        if self.kind == "mask" and pred.dtype != torch.bool:
            raise ValueError(f"masks must be bool, not {pred.dtype}: compare their logits with 0")
        if scores.isnan().any():
            raise ValueError("a score is NaN: nothing can be sorted by it")
        if pred.shape[1:] != (gt.shape[-2:] if self.kind == "mask" else (4,)):
            raise ValueError(f"predictions {list(pred.shape)} do not fit the ground truth "
                             f"{list(gt.shape)}: kind={self.kind!r} expects "
                             + ("[M, H, W]" if self.kind == "mask" else "[M, 4]"))
        if not len(pred) == len(scores) == len(categories):
            raise ValueError(f"{len(pred)} predictions have {len(scores)} scores and "
                             f"{len(categories)} categories")
        low, high = map(int, torch.aminmax(gt)) if gt.ndim == 2 else (0, len(gt))
        if low < 0 or high > N or gt.ndim == 3 and high < N:
            raise ValueError(f"ground truth segments go from {low} to {high}, but there are {N} "
                             "categories")

    def _match(self, iou, gt_ignored, crowd):
        """Greedy matching, all thresholds and area ranges at once: bool [M, T, A] matched, and
        matched to ignored. A loop over detections, since each choice binds the next."""
        (M, N), T, A = iou.shape, len(self.thresholds), len(self.areas)
        matched, ignored = np.zeros((2, M, T, A), dtype=bool)
        free = np.ones((T, A, N), dtype=bool)
        threshold = np.minimum(self.thresholds, 1 - 1e-10)[:, None, None]             # [T, 1, 1]
        t, a = np.ogrid[:T, :A]
        for d in np.flatnonzero((iou >= threshold.min()).any(1)):
            candidate = free & (iou[d] >= threshold)                                  # [T, A, N]
            regular = candidate & ~gt_ignored
            candidate = np.where(regular.any(-1, keepdims=True), regular, candidate)  # ignored last
            value = np.where(candidate, iou[d], -1)
            best = N - 1 - value[..., ::-1].argmax(-1)                                # last of ties
            matched[d] = candidate.any(-1)
            ignored[d] = matched[d] & gt_ignored[a, best]
            free[t, a, best] &= ~matched[d] | crowd[best]
        return matched, ignored

    def all_reduce(self):
        """Gathers the match flags of all ranks, once, after the last update; does nothing without a
        process group."""
        if dist.is_available() and dist.is_initialized():
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, (self.positives, self.parts))
            self.positives = sum(positives for positives, _ in gathered)
            self.parts = [part for _, parts in gathered for part in parts]
        return self

    def compute(self):
        """Percent, NaN where there is no ground truth: AP (mean over thresholds), AP50, AP75 (NaN
        if not asked for), AP_small, AP_medium, AP_large; per_threshold {threshold: AP},
        per_category [AP of category 0, 1, ...]."""
        scores, categories, matched, ignored = (np.concatenate(v) for v in zip(*self.parts))
        recalls = torch.from_numpy(np.linspace(0, 1, 101))
        shape = (self.num_categories, len(self.thresholds), len(self.areas))
        ap = torch.full(shape, torch.nan, dtype=torch.float64)
        for c in np.flatnonzero(self.positives[:, 0] > 0):
            rows = np.flatnonzero(categories == c)
            rows = rows[np.argsort(-scores[rows], kind="stable")]
            hit = torch.from_numpy(matched[rows]).permute(1, 2, 0)                    # [T, A, n]
            counts = torch.from_numpy(~ignored[rows]).permute(1, 2, 0)
            tp, fp = (hit & counts).double().cumsum(-1), (~hit & counts).double().cumsum(-1)
            precision = tp / (tp + fp + np.spacing(1))
            if len(rows):                                      # the best at this recall or beyond
                precision = torch.cummax(precision.flip(-1), -1).values.flip(-1)
            precision = F.pad(precision, (0, 1))               # 0 where recall ends
            positives = torch.from_numpy(self.positives[c])
            recall = (tp / positives[:, None]).contiguous()    # [T, A, n]
            at = torch.searchsorted(recall, recalls.expand(*recall.shape[:2], -1).contiguous())
            value = 100 * precision.gather(-1, at).mean(-1)                           # [T, A]
            ap[c] = torch.where(positives > 0, value, torch.nan)
        result = {f"AP{suffix}": ap[..., i].nanmean().item() for i, suffix in enumerate(self.areas)}
        for percent in (50, 75):
            chosen = np.isclose(100 * self.thresholds, percent)
            result[f"AP{percent}"] = ap[:, chosen, 0].nanmean().item()
        each = ap[..., 0].nanmean(0).tolist()
        result["per_threshold"] = dict(zip(self.thresholds.tolist(), each))
        result["per_category"] = ap[..., 0].nanmean(1).tolist()
        return result


def average_precision(predictions, ground_truths, num_categories, **options):
    """AP of lists of images: predictions (masks or boxes, scores, categories), ground truths
    (segments or masks, categories[, crowd]); see `AveragePrecision.update` for shapes and
    `AveragePrecision.compute` for the result. options: iou_thresholds, kind, isthing."""
    if len(predictions) != len(ground_truths):
        raise ValueError(f"{len(predictions)} images have predictions but {len(ground_truths)} "
                         "have ground truth")
    isthing = options.pop("isthing", None)
    metric = AveragePrecision(num_categories, **options)
    for prediction, truth in zip(predictions, ground_truths):
        metric.update(*prediction, *truth, isthing=isthing)
    return metric.compute()
