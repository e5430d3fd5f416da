"""Panoptic quality and its relatives: how good is a panoptic segmentation?

Mean IoU cannot tell two cars from one. Average precision needs scores and lets masks overlap. A
panoptic segmentation gives each pixel one segment and has no scores. The idea: a predicted and a
true segment of one category match if their IoU is above 1/2. Then they share more than half of
each. Segments of one map do not overlap, so each has at most one match:

    PQ_c  =    sum_TP IoU / |TP|    x    |TP| / (|TP| + |FP| / 2 + |FN| / 2)
                      SQ                              RQ = F1

PQ-dagger (Porzi et al. 2019, section 4). All pixels of a stuff category are one segment. At an IoU
of 1/2 or less it counts 0: in their Figure 3 a pole (0.49) counts 0, a sidewalk (0.62) counts 0.62.
Stuff has at most one pair (predicted, true) in an image. PQ-dagger takes all pairs M_c of IoU > 0:

    PQ-dagger_c = 1 / |M_c|  sum_{M_c} IoU          (things: PQ_c as before)

Stuff that is invented or missed completely in an image is in no pair: PQ-dagger ignores it there.

Acc_th and Prec_th (de Geus and Dubbelman 2023, section 3.3): the pixels that matched things share,
divided by all pixels of true things, or of predicted things. Crops in training (Panoptic FCN, Table
1) raise PQ_th from 51.1 to 52.2, but lower Acc_th from 85.1 to 81.3: large predictions cover
several things. `confusion_ratio` counts them (Figure 5).

    python pq.py [--quick] [--full] [--device D] [--out DIR]      example, the cliff at IoU 1/2
    pytest tests/test_pq.py                                       the spec of this file

Kirillov et al., "Panoptic Segmentation", CVPR 2019. Porzi et al., "Seamless Scene Segmentation",
CVPR 2019. de Geus and Dubbelman, "Intra-Batch Supervision for Panoptic Segmentation on
High-Resolution Images", WACV 2023.
"""

import torch
import torch.distributed as dist


def example():
    """Two maps of ten pixels, by hand: one thing is found, one is missed, one is invented.

    Things 1 share 3 of 4 pixels: IoU 3/4, a match. Things 2 share 2 of 5: no match, so one false
    positive and one false negative. PQ = 3/4 / (1 + 1/2 + 1/2) = 3/8."""
    truth = torch.tensor([[1, 1, 1, 1, 3, 2, 2, 2, 3, 3]])     # segment 3 is stuff
    prediction = torch.tensor([[1, 1, 1, 0, 0, 0, 2, 2, 2, 2]])
    metric = PanopticQuality([True, False])
    metric.update(prediction, [0, 0], truth, [0, 0, 1])
    things = metric.compute()["per_category"][0]
    assert (things["tp"], things["fp"], things["fn"]) == (1, 1, 1)
    assert abs(things["pq"] - 100 * 3 / 8) < 1e-9
    return things


# --- Kirillov et al.: the plain definition ----------------------------------------------------

def plain_pq(pred_segments, pred_categories, gt_segments, gt_categories, category):
    """PQ of one category in one image without crowds, by its definition -> (IoU sum, TP, FP, FN):
    a loop over all pairs of segments. Slow, and the reference for everything below."""
    predictions = [pred_segments == k for k, c in enumerate(pred_categories, 1) if c == category]
    truths = [gt_segments == k for k, c in enumerate(gt_categories, 1) if c == category]
    void, iou_sum, tp, fp, fn = gt_segments == 0, 0.0, 0, 0, 0
    for g in truths:
        ious = [((p & g).sum() / (p & ~void | g).sum()).item() for p in predictions if g.any()]
        tp += sum(iou > 1 / 2 for iou in ious)
        iou_sum += sum(iou for iou in ious if iou > 1 / 2)
        fn += int(g.any().item() and not any(iou > 1 / 2 for iou in ious))
    for p in predictions:
        matched = any((p & g).sum() > (p & ~void | g).sum() / 2 for g in truths)
        fp += int(p.any().item() and not matched and 2 * (p & void).sum() <= p.sum())
    return iou_sum, tp, fp, fn


# --- One pass over the pixels -----------------------------------------------------------------

def check_categories(pred_categories, gt_categories, gt_crowd, count):
    """Categories int64 [P], [G] and crowd bool [G] (None: all False), checked, on the CPU."""
    pred_categories = torch.as_tensor(pred_categories, dtype=torch.int64).cpu()
    gt_categories = torch.as_tensor(gt_categories, dtype=torch.int64).cpu()
    for name, categories in (("predicted", pred_categories), ("ground truth", gt_categories)):
        if ((categories < 0) | (categories >= count)).any():
            raise ValueError(f"{name} categories must lie in 0 to {count - 1}, not "
                             f"{categories.tolist()}")
    crowd = torch.as_tensor([False] * len(gt_categories) if gt_crowd is None else gt_crowd).cpu()
    if crowd.shape != gt_categories.shape:
        raise ValueError(f"there are {len(gt_categories)} ground truth categories but "
                         f"{crowd.numel()} crowd flags")
    return pred_categories, gt_categories, crowd.bool()


def check_segments(name, segments, count):
    """Refuses a map with an id outside of 0..count."""
    if segments.numel() and (segments.min() < 0 or segments.max() > count):
        raise ValueError(f"{name} segments hold ids from {segments.min()} to {segments.max()}, but "
                         f"there are {count} categories")


def joint_areas(pred_segments, gt_segments, P, G):
    """Intersections of maps [H, W] with ids 0..P and 0..G -> int64 [P + 1, G + 1] on the CPU; row
    and column 0 are void. One bincount of pred * (G + 1) + gt."""
    pred_segments, gt_segments = torch.as_tensor(pred_segments), torch.as_tensor(gt_segments)
    if pred_segments.ndim != 2 or pred_segments.shape != gt_segments.shape:
        raise ValueError(f"predicted segments {list(pred_segments.shape)} and ground truth "
                         f"segments {list(gt_segments.shape)} must be maps [H, W] of one shape")
    check_segments("predicted", pred_segments, P)
    check_segments("ground truth", gt_segments, G)
    index = pred_segments.long() * (G + 1) + gt_segments.to(pred_segments.device)     # [H, W]
    return torch.bincount(index.flatten(), minlength=(P + 1) * (G + 1)).view(P + 1, G + 1).cpu()


class PanopticQuality:
    """Adds up a data set image by image; `compute` gives all measures in percent. isthing: [C].
    Call `update` for each image, `all_reduce` if there are several processes, then `compute`.
    PQ comes from sums over all images. It is not the mean of the PQ of images.

    Void and crowd as in COCO's panoptic API. Void pixels of the truth are in no union; those of a
    crowd are. A crowd never matches and is no FN. An unmatched prediction is no FP if more than
    half of it is void or crowd of its category. void_rule="seamless" adds a rule of Porzi et al.
    2019, which their code lacks: no FN if predicted void covers more than half of the segment.
    Choice: of several crowds of one category in an image the last counts, as in the official code.
    Choice: a segment without a pixel does not exist: no FP, no FN.
    Choice: if M_c is empty, PQ-dagger_c is 0/0. It is 0 if c has an FP or an FN, since nothing of
      it was right; else it is left out of the mean, as PQ_c is.
    Choice: pixels under true void or crowd count neither in Acc_th nor in Prec_th nor in mIoU."""

    def __init__(self, isthing, void_rule="coco"):
        if void_rule not in ("coco", "seamless"):
            raise ValueError(f"void_rule must be 'coco' or 'seamless', not {void_rule!r}")
        self.isthing, self.void_rule = torch.as_tensor(isthing).bool().cpu(), void_rule
        C = len(self.isthing)
        self.sums = {name: torch.zeros(C, dtype=torch.float64) for name in (
            "tp", "fp", "fn", "iou", "pairs", "pairs_iou", "tp_pixels")}
        self.sums["pixels"] = torch.zeros(C, C + 1, dtype=torch.float64)      # true x predicted

    @torch.no_grad()
    def update(self, pred_segments, pred_categories, gt_segments, gt_categories, gt_crowd=None):
        """One image: segments int64 [H, W] (0 void), categories int64 [N] of segments 1..N.
        Give all stuff of one category one segment: parts are not joined here."""
        C = len(self.isthing)
        pred_categories, gt_categories, crowd = check_categories(
            pred_categories, gt_categories, gt_crowd, count=C)
        joint = joint_areas(pred_segments, gt_segments, len(pred_categories), G=len(gt_categories))
        pred_area, gt_area = joint.sum(1)[1:], joint.sum(0)[1:]                       # [P], [G]
        on_void, under_void, inter = joint[1:, 0], joint[0, 1:], joint[1:, 1:]        # [P, G]

        union = pred_area[:, None] + gt_area - inter - on_void[:, None]
        iou = inter.double() / union                           # 0/0 is NaN, which matches nothing
        same = (pred_categories[:, None] == gt_categories) & ~crowd                   # [P, G]
        match, pairs = same & (iou > 0.5), same & (iou > 0)                           # TP, M_c

        missed = (gt_area > 0) & ~crowd & ~match.any(0)                               # [G]
        if self.void_rule == "seamless":
            missed &= 2 * under_void <= gt_area
        crowds = crowd & (gt_area > 0)
        later = ((gt_categories[:, None] == gt_categories) & crowds).triu(1).any(1)   # is not last
        own_crowd = (pred_categories[:, None] == gt_categories) & crowds & ~later
        ignored = on_void + (inter * own_crowd).sum(1)                                # [P] pixels
        spurious = (pred_area > 0) & ~match.any(1) & (2 * ignored <= pred_area)       # [P]

        self.sums["fp"].index_add_(0, pred_categories, spurious.double())
        for name, value in (("tp", match.sum(0)), ("iou", torch.where(match, iou, 0).sum(0)),
                            ("pairs", pairs.sum(0)), ("fn", missed),
                            ("pairs_iou", torch.where(pairs, iou, 0).sum(0)),
                            ("tp_pixels", (inter * match).sum(0))):
            self.sums[name].index_add_(0, gt_categories, value.double())
        predicted = torch.cat([torch.tensor([C]), pred_categories])                   # void first
        cell = gt_categories[~crowd] * (C + 1) + predicted[:, None]                   # [P + 1, G']
        pixels = joint[:, 1:][:, ~crowd].flatten().double()
        self.sums["pixels"].view(-1).index_add_(0, cell.flatten(), pixels)

    def all_reduce(self):
        """Sums over the ranks of torch.distributed, once, after the last update."""
        if dist.is_available() and dist.is_initialized():
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            for name, value in self.sums.items():
                value = value.to(device)
                dist.all_reduce(value)
                self.sums[name] = value.cpu()
        return self

    def compute(self):
        """Percent, NaN where there is nothing to average: PQ SQ RQ PQ_dagger, each also with _th
        and _st; Acc_th Prec_th mIoU; per_category: a dict for each category.
        A category without a TP has SQ 0, which lowers the mean SQ."""
        s, thing, pixels = self.sums, self.isthing, self.sums["pixels"]
        tp, fp, fn = s["tp"], s["fp"], s["fn"]
        occurs, nan = tp + fp + fn > 0, torch.tensor(torch.nan, dtype=torch.float64)
        rq = 100 * tp / (tp + fp / 2 + fn / 2)                 # 0/0 = NaN: left out of the mean
        sq = torch.where(occurs, 100 * s["iou"] / tp.clamp(min=1), nan)
        pq = sq * rq / 100
        dagger = torch.where(occurs | (s["pairs"] > 0),
                             100 * s["pairs_iou"] / s["pairs"].clamp(min=1), nan)
        dagger = torch.where(thing, pq, dagger)
        hit = pixels.diagonal()
        iou = 100 * hit / (pixels.sum(1) + pixels.sum(0)[:-1] - hit)
        result = {}
        for name, value in (("PQ", pq), ("SQ", sq), ("RQ", rq), ("PQ_dagger", dagger)):
            for suffix, group in (("", thing | ~thing), ("_th", thing), ("_st", ~thing)):
                result[name + suffix] = value[group].nanmean().item()
        right = s["tp_pixels"][thing].sum()
        result["Acc_th"] = (100 * right / pixels[thing].sum()).item()                 # Eq. 2
        result["Prec_th"] = (100 * right / pixels[:, :-1][:, thing].sum()).item()     # Eq. 3
        result["mIoU"] = iou.nanmean().item()
        columns = dict(pq=pq, sq=sq, rq=rq, pq_dagger=dagger, iou=iou, tp=tp.long(), fp=fp.long(),
                       fn=fn.long(), isthing=thing)
        rows = zip(*(column.tolist() for column in columns.values()))
        return result | {"per_category": [dict(zip(columns, row)) for row in rows]}

    def table(self, names):
        """The result as text, a line for each category that occurs; names [C]."""
        if len(names) != len(self.isthing):
            raise ValueError(f"there are {len(self.isthing)} categories but {len(names)} names")
        result, width = self.compute(), max([len("Things"), *map(len, names)])

        def line(name, row, keys):
            return f"{name:{width}}" + "".join(f"{row[key]:7.1f}" for key in keys)
        lines = [" " * width + "     PQ     SQ     RQ    PQ†    IoU      TP      FP      FN"]
        for name, row in zip(names, result["per_category"]):
            if max(row["tp"], row["fp"], row["fn"]):
                lines.append(line(name, row, ("pq", "sq", "rq", "pq_dagger", "iou"))
                             + f"{row['tp']:8d}{row['fp']:8d}{row['fn']:8d}")
        lines += ["-" * len(lines[0]),
                  line("All", result, ("PQ", "SQ", "RQ", "PQ_dagger", "mIoU")),
                  line("Things", result, ("PQ_th", "SQ_th", "RQ_th", "PQ_dagger_th")),
                  line("Stuff", result, ("PQ_st", "SQ_st", "RQ_st", "PQ_dagger_st")),
                  f"Acc_th {result['Acc_th']:.1f}   Prec_th {result['Prec_th']:.1f}"]
        return "\n".join(lines)


# --- de Geus and Dubbelman: confusion (6.2, Figure 5), overlapping masks (6.4) ----------------

def mask_intersections(masks, segments, count, memory=2 ** 24):
    """Pixels that masks, bool [M, H, W], share with segments 1..count of a map [H, W] -> int64
    [M, count], and the masks' areas [M], on the CPU. At most `memory` pixels at a time."""
    masks, segments = masks.flatten(1), segments.flatten()
    joint = masks.new_zeros(len(masks), count + 1, dtype=torch.int64)
    step = max(1, memory // max(1, len(masks)))
    for i in range(0, len(segments), step):
        m, pixel = masks[:, i:i + step].nonzero(as_tuple=True)
        index = m * (count + 1) + segments[i:i + step][pixel]
        joint += torch.bincount(index, minlength=joint.numel()).view_as(joint)
    return joint[:, 1:].cpu(), joint.sum(1).cpu()


def check_masks(masks, categories, gt_segments, count):
    """ValueError unless masks [M, H, W] fit M categories and `count` true segments [H, W]."""
    if masks.shape != (len(categories), *gt_segments.shape):
        raise ValueError(f"masks {list(masks.shape)} with {len(categories)} categories do not fit "
                         f"segments {list(gt_segments.shape)}: expected [M, H, W], M and [H, W]")
    check_segments("ground truth", gt_segments, count)


def confusion_ratio(pred_segments, pred_categories, gt_segments, gt_categories, isthing, thresholds,
                    gt_crowd=None):
    """How many predicted things are confused -> (confused, all), each int64 [len(thresholds)].

    Confused at T: it covers more than T percent of each of at least two true things. Figure 5 is
    100 sum(confused) / sum(all) over a data set. Instead of segments [H, W] the prediction may be
    masks bool [P, H, W] that overlap.
    Choice: categories do not matter; a crowd is no thing; a prediction without a pixel is none."""
    isthing = torch.as_tensor(isthing).bool().cpu()
    pred_categories, gt_categories, crowd = check_categories(
        pred_categories, gt_categories, gt_crowd, count=len(isthing))
    if pred_segments.ndim == 3:
        check_masks(pred_segments, pred_categories, gt_segments, count=len(gt_categories))
        inter, pred_area = mask_intersections(pred_segments, gt_segments, len(gt_categories))
        gt_area = torch.bincount(gt_segments.flatten(), minlength=len(gt_categories) + 1)[1:].cpu()
    else:
        joint = joint_areas(pred_segments, gt_segments, len(pred_categories), G=len(gt_categories))
        inter, pred_area, gt_area = joint[1:, 1:], joint[1:].sum(1), joint.sum(0)[1:]
    rows, columns = isthing[pred_categories] & (pred_area > 0), isthing[gt_categories] & ~crowd
    inter, area = inter[rows][:, columns], gt_area[columns]                           # [P', G']
    T = torch.as_tensor(thresholds, dtype=torch.float64).cpu()[:, None, None]
    confused = ((100 * inter > T * area).sum(2) >= 2).sum(1)
    return confused, torch.full_like(confused, len(inter))


def instance_pixels(masks, scores, categories, gt_segments, gt_categories, isthing, gt_crowd=None):
    """Acc_th and Prec_th of masks bool [M, H, W] that may overlap (section 6.4) -> counts of pixels
    int64 [3]: right, true, predicted. Acc_th = right / true, Prec_th = right / predicted. Right are
    the pixels that a mask shares with the thing it matches: same category, IoU > 1/2.

    Choice: of two masks that match one thing, the one of higher score gets it; all pixels of the
    other are wrong. Each mask counts all its pixels, except those on void or crowd."""
    isthing = torch.as_tensor(isthing).bool().cpu()
    categories, gt_categories, crowd = check_categories(
        categories, gt_categories, gt_crowd, count=len(isthing))
    check_masks(masks, categories, gt_segments, count=len(gt_categories))
    if len(scores) != len(masks):
        raise ValueError(f"there are {len(masks)} masks but {len(scores)} scores")
    order = torch.argsort(torch.as_tensor(scores).cpu(), descending=True, stable=True)
    order = order[isthing[categories[order]]]
    masks = masks[order.to(masks.device)]
    inter, _ = mask_intersections(masks, gt_segments, len(gt_categories))             # [M, G]
    area = torch.bincount(gt_segments.flatten().cpu(), minlength=len(gt_categories) + 1)[1:]
    iou = inter / (inter.sum(1, keepdim=True) + area - inter).clamp(min=1)
    match = (iou > 0.5) & (categories[order][:, None] == gt_categories) & ~crowd
    first = match & (match.cumsum(0) == 1)                     # of each thing, by falling score
    true = area[isthing[gt_categories] & ~crowd].sum()
    return torch.stack([(inter * first).sum(), true, inter[:, ~crowd].sum()])


def demo(quick=False, full=False, device="cpu", out="figures"):
    """A sidewalk shrinks pixel by pixel: what PQ and PQ-dagger say; two cars taken for one."""
    print("one thing found, one missed, one invented: PQ {pq:.1f}".format(**example()))
    from lab.demo_pq import cliff
    cliff(steps=25 if quick else 961 if full else 241, out=out)


if __name__ == "__main__":
    from data import command_line                              # to run the file, not to import it
    command_line(demo, __doc__, quick="a coarse curve", full="a finer curve")

# Exercises
# 1. Let segments match at IoU >= 1/2. Which sentence of the docstring breaks, which test notices?
# 2. Let each stuff segment without a partner add 1/2 to |M_c| of PQ-dagger. Which tests fail?
# 3. PQ jumps by 51 where an IoU passes 1/2. Change `update` so that it jumps by less than 5. What
#    is the price?
