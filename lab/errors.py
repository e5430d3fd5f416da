"""Where the lost PQ goes: repairs each kind of error in the predictions of a run, and scores again.

    python -m lab.errors RUN [RUN ...]          a table, and RUN/errors.png

Reads what the evaluation wrote into RUN: metrics.json, predictions.json, predictions/. With several
runs of one recipe the table holds means. A true segment without a match has one kind of error, the
first that fits:

    category   a prediction of another category has IoU > 1/2       its category is corrected
    confused   a prediction of its category holds a quarter of it   the prediction is cut into one
               and a quarter of another thing of the category       part for each of these things
    split      several predictions of its category, each half in    they become one
               it, have IoU > 1/2 together
    cut off    a prediction of its category lies half in it, but    it grows over the whole thing
               covers at most half of it
    boundary   its category is there and covers more than half; or  its pixels become the truth's
               it is stuff and its category is there
    missed     none of these; stuff that is not mostly void         it is added
    void       pixels of stuff without a prediction                 they join their category
    invented   a false positive which no error above explains       it is removed

"boundary" also corrects the pixels of all matches (SQ becomes 100), and "void" all pixels of stuff.
Only things can be confused, split or cut off. "alone" is what PQ gains if only this kind of error
is repaired. "in turn" repairs one kind after the other, from above to below, and counts again after
each: together with PQ these numbers give 100, up to what is left at the end.
Choice: a quarter is T = 25% of de Geus and Dubbelman 2023, Figure 5 (pq.confusion_ratio).
"""
import json
from pathlib import Path

import numpy as np
import torch

from data import DataError
from lab import ends, readers, worlds
from lab.draw import new_figure, save
from pq import PanopticQuality, joint_areas

KINDS = ("category", "confused", "split", "cut off", "boundary", "missed", "void", "invented")


def tables(pred, pred_categories, truth, gt_categories, crowd):
    """Of one image -> areas in common [P + 1, G + 1] (row, column 0: void), IoU [P, G], which
    categories agree [P, G], matches [P, G]. A crowd agrees with nothing."""
    joint = joint_areas(pred, truth, len(pred_categories), len(gt_categories))
    union = joint[1:].sum(1)[:, None] + joint[:, 1:].sum(0) - joint[1:, 1:] - joint[1:, :1]
    iou = joint[1:, 1:] / union.clamp(min=1)
    same = (pred_categories[:, None] == gt_categories) & ~crowd
    return joint, iou, same, same & (iou > 0.5)


def holds(joint, same, things):
    """Does prediction p hold a quarter of the thing g of its category? bool [P, G]."""
    inter = joint[1:, 1:]
    return same & things & (4 * inter >= joint[:, 1:].sum(0)) & (inter > 0)


def diagnose(joint, iou, same, match, isthing, crowd):
    """The tables of one image -> {kind: rows}, without "void". A row names a true segment, counted
    from 0, and the predictions that explain its error; of "invented" a prediction alone. Pixels of
    true void do not count. isthing, crowd: bool [G]."""
    inter, size = joint[1:, 1:], joint[:, 1:].sum(0)           # [P, G], [G]
    area, ignored = inter.sum(1), joint[1:, 0] + (inter * crowd).sum(1)       # [P]
    large = holds(joint, same, isthing)                        # [P, G]
    inside = same & isthing & (2 * inter > area[:, None])          # half of p lies in g
    found = {kind: [] for kind in KINDS if kind != "void"}
    unseen = ~isthing & (2 * joint[0, 1:] > size)              # stuff that is void: kind "void"
    lost = (size > 0) & ~crowd & ~match.any(0) & ~unseen
    for g in torch.where(lost)[0].tolist():
        other = torch.where((iou[:, g] > 0.5) & ~same[:, g])[0].tolist()
        merged = torch.where(large[:, g] & (large.sum(1) > 1))[0].tolist()
        parts = torch.where(inside[:, g])[0].tolist()
        within = inter[parts, g].sum()
        kin = torch.where(same[:, g] & (inter[:, g] > 0))[0].tolist()
        best = max(kin, key=lambda p: inter[p, g].item(), default=None)
        half = best is not None and 2 * inter[best, g] > size[g]
        if other:
            found["category"].append((g, *other))
        elif merged:
            found["confused"].append((g, *merged))
        elif len(parts) > 1 and 2 * within > size[g] + area[parts].sum() - within:
            found["split"].append((g, *parts))
        elif best in parts and not half:
            found["cut off"].append((g, best))
        elif half or best is not None and not isthing[g]:
            found["boundary"].append((g, best))
        else:
            found["missed"].append((g,))
    used = {p for rows in found.values() for _, *explained in rows for p in explained}
    alone = torch.where((area > 0) & ~match.any(1) & (2 * ignored <= joint[1:].sum(1)))[0]
    found["invented"] = [(p,) for p in alone.tolist() if p not in used]
    return found


def repair(kind, pred, pred_categories, truth, gt_categories, crowd, isthing):
    """One image with the errors of one kind repaired -> segments [H, W], their categories, and how
    many there were ("boundary": without the matches; "void": pixels). isthing: bool [C].

    A pixel's new segment depends on its old one and on the true one alone: a table [P + 1, G + 1].
    Prediction p keeps its number; the true segment g, counted from 0, has the number P + 1 + g."""
    joint, iou, same, match = tables(pred, pred_categories, truth, gt_categories, crowd)
    P, G = match.shape
    new = torch.arange(P + 1)[:, None].repeat(1, G + 1)
    things = isthing[gt_categories]
    if kind == "void":
        stuff = torch.where(~things & ~crowd)[0]
        new[0, stuff + 1] = P + 1 + stuff
        count = int(joint[0, stuff + 1].sum())
    else:
        rows = diagnose(joint, iou, same, match, things, crowd)[kind]
        count = len(rows)
    if kind == "boundary":
        rows = [*rows, *zip(*(side.tolist() for side in torch.where(match.T)))]
        at = torch.tensor([0, *(p + 1 for _, p in rows)])
        new[at[1:]] = 0                                        # pixels outside of the truth
        for g, _ in rows:
            new[at, g + 1] = P + 1 + g                         # not from false positives
    for g, *predictions in rows if kind not in ("void", "invented") else ():
        if kind in ("category", "split", "cut off"):
            for p in predictions:
                new[p + 1] = P + 1 + g
        if kind in ("cut off", "missed"):
            new[:, g + 1] = P + 1 + g
        if kind == "confused":
            for p in predictions:
                held = torch.where(holds(joint, same, things)[p])[0]
                new[p + 1] = P + 1 + held[joint[p + 1, held + 1].argmax()]     # pixels of no thing
                new[p + 1, held + 1] = P + 1 + held
    if kind == "invented":
        owner = torch.zeros(G + 1, dtype=torch.long)           # what is right at these pixels
        p, g = torch.where(match)
        owner[g + 1] = p + 1
        for p, in rows:
            new[p + 1] = owner
    categories = torch.cat([pred_categories, gt_categories])
    for c in torch.where(~isthing)[0]:                         # stuff: one segment of a category
        parts = torch.where(categories == c)[0] + 1
        new[torch.isin(new, parts)] = parts[0] if len(parts) else 0
    return new[pred, truth], categories, count


class Errors:
    """Adds up images: `update` as PanopticQuality, then `compute`."""

    def __init__(self, isthing):
        self.isthing = torch.as_tensor(isthing).bool()
        self.plain = PanopticQuality(isthing)
        self.alone, self.turn = ({k: PanopticQuality(isthing) for k in KINDS} for _ in range(2))
        self.counts, self.pixels = dict.fromkeys(KINDS, 0), 0

    def update(self, pred_segments, pred_categories, gt_segments, gt_categories, gt_crowd):
        truth = gt_segments, gt_categories, gt_crowd
        self.plain.update(pred_segments, pred_categories, *truth)
        self.pixels += gt_segments.numel()
        turn = pred_segments, pred_categories
        for kind in KINDS:
            segments, categories, count = repair(kind, pred_segments, pred_categories, *truth,
                                                 isthing=self.isthing)
            self.counts[kind] += count
            self.alone[kind].update(segments, categories, *truth)
            turn = repair(kind, *turn, *truth, isthing=self.isthing)[:2]
            self.turn[kind].update(*turn, *truth)

    def compute(self):
        """-> PQ, what is left in the end, and for each kind its count (void: percent of all pixels)
        and points of PQ: repaired alone, of things alone, in turn."""
        plain = self.plain.compute()
        result, last = {"PQ": plain["PQ"], "PQ_th": plain["PQ_th"]}, plain["PQ"]
        for kind in KINDS:
            alone, turn = self.alone[kind].compute(), self.turn[kind].compute()["PQ"]
            count = self.counts[kind]
            result[kind] = {"count": 100 * count / self.pixels if kind == "void" else count,
                            "alone": alone["PQ"] - plain["PQ"],
                            "things": alone["PQ_th"] - plain["PQ_th"], "in turn": turn - last}
            last = turn
        return {**result, "left": 100 - last}


def measure(folder):
    """The errors of a run's predictions -> the dictionary of `Errors.compute`."""
    folder = Path(folder)
    try:
        about = json.loads((folder / "metrics.json").read_text())["run"]
        content = json.loads((folder / "predictions.json").read_text())
        dataset = worlds.open_dataset(about["settings"], about["split"])
    except FileNotFoundError as e:
        raise DataError(f"{e.filename} is missing: name the folder of a run of train.py that has "
                        "ended") from e
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{folder} holds no results of a run of train.py ({type(e).__name__}: {e}):"
                        " train again") from e
    official = getattr(dataset, "category_ids", None) or range(len(dataset.categories))
    number = {id: k for k, id in enumerate(official)}
    entries = {Path(a["file_name"]).stem: a for a in content["annotations"]}
    errors = Errors([c.isthing for c in dataset.categories])
    for i in range(len(entries)):
        sample = dataset[i]
        if sample.name not in entries:
            raise DataError(f"{folder / 'predictions.json'} has no image {sample.name}: evaluate "
                            "the run again on the data set as it is now")
        infos = entries[sample.name]["segments_info"]
        ids = torch.from_numpy(readers.read_file(folder / "predictions" / f"{sample.name}.png",
                                                 readers.as_colours))
        segments = torch.searchsorted(torch.tensor([0, *(s["id"] for s in infos)]), ids)
        categories = torch.tensor([number[s["category_id"]] for s in infos], dtype=torch.long)
        errors.update(segments, categories, sample.segments, sample.categories, sample.crowd)
    return errors.compute()


def mean(results):
    """The mean of equal dictionaries of numbers."""
    first = results[0]
    if isinstance(first, dict):
        return {k: mean([r[k] for r in results]) for k in first}
    return sum(results) / len(results)


def table(result):
    """What `Errors.compute` returned, as text."""
    lines = [f"PQ {result['PQ']:.1f}, of things {result['PQ_th']:.1f}",
             f"{'':10}{'errors':>10}{'alone':>8}{'things':>8}{'in turn':>9}"]
    for kind in KINDS:
        row = result[kind]
        count = f"{row['count']:.1f}" + ("%" if kind == "void" else "")
        lines.append(f"{kind:10}{count:>10}{row['alone']:+8.1f}{row['things']:+8.1f}"
                     f"{row['in turn']:+9.1f}")
    return "\n".join([*lines, f"{'left':10}{'':26}{result['left']:+9.1f}"])


def draw(result, path):
    """Bars: what PQ gains by repairing each kind alone, and in turn."""
    figure = new_figure(3.0)
    ax, at = figure.subplots(), np.arange(len(KINDS))
    for shift, key, label in ((-0.2, "alone", "repaired alone"), (0.2, "in turn", "in turn")):
        bars = ax.bar(at + shift, [result[k][key] for k in KINDS], 0.38, label=label)
        ax.bar_label(bars, fmt="%.1f")
    ax.set_xticks(at, KINDS)
    ax.set_ylabel("points of PQ")
    ax.margins(y=0.1)
    ax.set_title(f"PQ {result['PQ']:.1f}: where the rest goes")
    ax.legend()
    save(figure, path)


def main(argv=None):
    parser = ends.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs of one recipe")
    folders = parser.parse_args(argv).runs
    result = mean([measure(folder) for folder in folders])
    print(table(result))
    draw(result, Path(folders[0], "errors.png"))


if __name__ == "__main__":
    with ends.one_sentence("lab.errors"):
        main()
