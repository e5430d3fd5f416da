"""What in the affinity head's training helps on the toy street: rows, readings, seeds, intervals.

    python -m lab.affinity_rows [--seeds 3] [--rows ROW ...] [--out DIR] [flags of train.py]

Question: is a network with affinities, trained end to end and read by argmax, better than one whose
detections and semantic logits are fused by Seamless's rules? Readings with and without the rules'
way to void are compared with each other, see lab/readings.py.

    detections      no head, no panoptic loss
    ... heavier V   the same with 1.5 times the semantic weight, as the panoptic loss teaches V too
    Psi             no head; the panoptic loss of the potential trains all
    head alone      the panoptic loss trains the head only (`model.end_to_end=head`)
    head            the recipe: it trains all, variant C
    variant B       masks times semantics in Psi, not their sum
    fixed scores    Psi takes scores as constants: the panoptic loss cannot lower them
    all detections  training matches all detections above 0.05, inference takes those above 0.5

What refutes the paper: over the seeds, PQ of "head", read by its better argmax, is not above that
of "detections", read by its better rules: the 95% interval of the difference reaches 0. If box AP
falls by the panoptic loss pushing scores down, "fixed scores" has the box AP of "detections".

A run that DIR has already is not repeated. Each trains as `python train.py --method affinity` does,
about ten minutes of a CPU thread, and is read on the first --count images of the test split.
"""
import json
from pathlib import Path

import numpy as np

from affinity_head import Affinity
from data import DataError
from lab import changes, ends, methods, readings, runs
from lab.draw import new_figure, save
from lab.intervals import paired_t

PLAIN = ["model.affinity=False", "model.end_to_end=none"]
RULES, ARGMAX = ("heuristic", "filled"), ("argmax", "argmax, void")
COLUMNS = (*RULES, *ARGMAX, "affinity", "affinity, void")


class FixedScores(Affinity):
    """No gradient of the panoptic loss reaches the scores."""

    def outputs(self, features, found, logits, image_size):
        """See Affinity."""
        found = [{**f, "scores": f["scores"].detach()} for f in found]
        return super().outputs(features, found, logits, image_size)


class AllDetections(Affinity):
    """Training builds Psi from all detections above `least`, inference from those above 0.5."""
    least = 0.05

    def losses(self, images, targets):
        """See Affinity."""
        usual, self.base.score_threshold = self.base.score_threshold, self.least
        try:
            return super().losses(images, targets)
        finally:
            self.base.score_threshold = usual


ROWS = {  # settings, class
    "detections": (PLAIN, Affinity),
    "detections, heavier V": ([*PLAIN, "model.loss_weights=(1, 1.5, 0)"], Affinity),
    "Psi": (["model.affinity=False"], Affinity),
    "head alone": (["model.end_to_end=head"], Affinity),
    "head": ([], Affinity),
    "variant B": (["model.variant=B"], Affinity),
    "fixed scores": ([], FixedScores),
    "all detections": ([], AllDetections)}


def measured(row, seed, folder, words, count):
    """Trains a row and reads it, unless `folder` holds it -> the table of lab/readings.py."""
    path = folder / "readings.json"
    if not path.exists():
        settings, kind = ROWS[row]

        def build(*how):
            net = methods.build_affinity(*how)
            net.__class__ = kind
            return net
        net, scenes, place, about = changes.trained("affinity", build, settings, seed=seed,
                                                    folder=folder, words=words, split="test",
                                                    images=count)
        table = readings.compare(net, scenes, place)
        table["run"] = dict(about, images=count, hardware=place.hardware())
        runs.write_json(path, table)
    return json.loads(path.read_text())


def numbers(seeds, reading, key="PQ"):
    """Of each seed the PQ of a reading, small stuff trimmed; or AP_box, AP_mask."""
    if reading.startswith("AP"):
        return np.array([m[reading] for m in seeds])
    return np.array([m[f"{reading} trimmed"][key] for m in seeds])


def best(seeds, names):
    """The reading of `names` whose mean PQ is the highest."""
    names = [n for n in names if f"{n} trimmed" in seeds[0]]
    return max(names, key=lambda n: numbers(seeds, n).mean())


def text(rows):
    """rows {name: [table of each seed]} -> PQ of each reading, box AP and mask AP, means over the
    seeds; paired differences with 95% intervals."""
    columns = (*COLUMNS, "AP_box", "AP_mask")
    lines = ["PQ by reading".ljust(24) + "".join(f"{c:>16s}" for c in columns)]
    for name, seeds in rows.items():
        cells = (f"{numbers(seeds, c).mean():16.1f}"
                 if c in seeds[0] or f"{c} trimmed" in seeds[0] else " " * 16 for c in columns)
        lines.append(f"{name:24s}" + "".join(cells))
    plain = rows.get("detections")
    for name, seeds in rows.items() if plain else ():
        if name != "detections":
            way = best(seeds, COLUMNS[2:])
            sides = (numbers(seeds, way), numbers(plain, best(plain, RULES)))
            boxes = (numbers(v, "AP_box") for v in (seeds, plain))
            lines.append("{} by {} - detections by {}: PQ {:+.1f} [{:+.1f}, {:+.1f}], box AP "
                         "{:+.1f} [{:+.1f}, {:+.1f}]".format(
                             name, way, best(plain, RULES), *paired_t(*sides), *paired_t(*boxes)))
    for name, seeds in rows.items():
        for a, b in (("affinity", "argmax"), ("affinity, void", "argmax, void"),
                     ("argmax, void", "argmax"), ("argmax, void", "heuristic")):
            if f"{a} trimmed" in seeds[0]:
                change = paired_t(numbers(seeds, a), numbers(seeds, b))
                lines.append("{}, PQ by {} - by {}: {:+.1f} [{:+.1f}, {:+.1f}]".format(
                    name, a, b, *change))
    return "\n".join(lines)


def draw(rows, path):
    """PQ of each row by each reading, a dot a seed; box AP beside it."""
    figure = new_figure(1 + 0.45 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    y = np.arange(len(rows))
    for k, reading in enumerate(COLUMNS):
        for row, seeds in enumerate(rows.values()):
            if f"{reading} trimmed" in seeds[0]:
                v = numbers(seeds, reading)
                at = np.full(len(v), row + (k - 2.5) * 0.13)
                left.plot(v, at, ".", color=f"C{k}", ms=4)
                left.plot(v.mean(), at[0], "|", color=f"C{k}", ms=9, mew=2)
        left.plot([], [], "|", color=f"C{k}", mew=2, label=reading)
    for row, seeds in enumerate(rows.values()):
        v = numbers(seeds, "AP_box")
        right.barh(row, v.mean(), 0.6, color="tab:blue", alpha=0.5)
        right.plot(v, [row] * len(v), ".", color="black", ms=4)
    left.set_yticks(y, list(rows))
    left.invert_yaxis()
    left.set(xlabel="PQ, %; a dot is a seed, a bar the mean")
    right.set(xlabel="box AP, %")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    save(figure, path)


def main(argv=None):
    """-> {row: [readings of each seed]}."""
    parser = ends.Parser(__doc__)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW",
                        help=f"of {', '.join(map(repr, ROWS))}; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ...; default: 3 of them")
    parser.add_argument("--count", type=int, default=100, help="images to read; default: 100")
    parser.add_argument("--out", default="runs/affinity-rows")
    own, words = parser.parse_known_args(argv)
    if own.seeds < 1:
        raise DataError("--seeds: at least one")
    rows = {}
    for row in own.rows:
        label = row.replace(" ", "-").replace(",", "")
        rows[row] = [measured(row, seed, Path(own.out, f"{label}-{seed}"), words, own.count)
                     for seed in range(own.seeds)]
        print(f"{row}: box AP " + ", ".join(f"{m['AP_box']:.1f}" for m in rows[row]), flush=True)
    print(f"\n{text(rows)}")
    draw(rows, Path(own.out, "affinity_rows.png"))
    return rows


if __name__ == "__main__":
    with ends.one_sentence("lab.affinity_rows"):
        main()
