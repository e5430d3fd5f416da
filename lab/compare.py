"""Methods on the same data set, seeds and splits, each by its own recipe: a table, a figure.

    python -m lab.compare [--seeds 3] [--out DIR] [flags of train.py]      equal images
    python -m lab.compare --minutes 6 [...]                          and equal minutes
    python -m lab.compare --methods seamless maskrcnn                these methods only
    python -m lab.compare --import mine --methods seamless mine      with a method of your mine.py

Equal images: each method sees as many crops as the recipe of the first one asks for. Equal minutes:
a method is timed for some steps first, then trains for as many steps as fit, rounded to 50.
A run that DIR has already is not repeated. So two programs may share the work of two cores: give
each `--threads 1`, the same DIR and methods of its own. Then ask for all methods: a table of all.
"""
import csv
import importlib
import json

import numpy as np

from data import DataError
from lab import ends, folders, methods, runs
from lab.draw import new_figure, save
from lab.intervals import paired_t
from lab.recipes import RECIPES

# On the toy street Seamless has CABB and crops at any place by its recipe.
VARIANTS = {"seamless, Eq. 1": ["--method", "seamless", "--box-loss", "standard"],
            "seamless": ["--method", "seamless"],
            "seamless, ISUS": ["--method", "seamless", "--sampler", "isus"]}
COLUMNS = ("PQ", "PQ_th", "PQ_st", "AP_mask", "AP_box", "steps", "minutes")
TIMED = 40                                                     # steps; the first half warms up


def plain(row):
    """The name of a row as that of a folder."""
    return row.replace(", ", "-").replace(" ", "").replace(".", "")


def flags_of(row, words, folder):
    """The flags of train.py for a row of the table; a name that it does not know is refused."""
    import train
    return train.parse([*words, *VARIANTS.get(row, ["--method", row]), "--out", str(folder)])


def result(row, words, folder, seed, steps):
    """Trains and evaluates, unless `folder` holds that run -> the columns of the table."""
    import train
    path = folder / f"{plain(row)}-{steps}-{seed}"
    if not (path / "metrics.json").exists():
        flags = flags_of(row, words, path)
        flags.seed, flags.steps = seed, steps
        train.run(flags)
    found = json.loads((path / "metrics.json").read_text())
    values = {k: found[k]["AP"] if k.startswith("AP") else found[k] for k in COLUMNS[:5]}
    return {**values, "steps": steps, "minutes": found["run"]["minutes"]}


def steps_in(minutes, row, words, folder):
    """How many steps of a method fit into `minutes`, rounded to 50 and at least 50. A training of a
    few steps tells, and is kept. All stages count: the second one of AdaptIS is faster."""
    import train
    path = folder / f"timed-{plain(row)}"
    if not (path / "metrics.json").exists():
        flags = flags_of(row, words, path)
        flags.steps, flags.eval_images = TIMED, 1
        flags.set = [*flags.set, f"fit.interval={TIMED // 2}"]
        train.run(flags)
    with open(path / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    lengths = np.diff([0, *(int(r["step"]) for r in rows)])
    speeds = np.array([float(r["images_per_second"]) for r in rows])
    speeds[0] = speeds[1]                                      # the first steps warm up
    batch = json.loads((path / "metrics.json").read_text())["run"]["batch"]
    each = batch * (lengths / speeds).sum() / TIMED            # seconds of a step
    return max(50, round(minutes * 60 / each / 50) * 50)


def table(rows, title, best="seamless"):
    """rows {method: [{column: number} of each seed]} -> text: means over seeds, and the difference
    of PQ to the row `best` with its 95% interval, paired by seed."""
    lines = [f"{title:18s}" + "".join(f"{c:>9}" for c in COLUMNS) + f"   PQ against {best}"]
    for name, seeds in rows.items():
        means = (np.mean([s[c] for s in seeds]) for c in COLUMNS)
        text = f"{name:18s}" + "".join(f"{m:9.0f}" if c == "steps" else f"{m:9.1f}"
                                       for c, m in zip(COLUMNS, means))
        if best in rows and name != best:
            change = paired_t(*([s["PQ"] for s in side] for side in (seeds, rows[best])))
            text += "   {:+.1f} [{:+.1f}, {:+.1f}]".format(*change)
        lines.append(text)
    return "\n".join(lines)


def draw(tables, path):
    """A bar of PQ for each method, things and stuff as marks, a dot a seed; one panel a table."""
    figure = new_figure(1.2 + 0.33 * len(next(iter(tables.values()))))
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for ax, (title, rows) in zip(panels, tables.items()):
        y = np.arange(len(rows))
        mean = {c: [np.mean([s[c] for s in seeds]) for seeds in rows.values()]
                for c in COLUMNS[:3]}
        ax.barh(y, mean["PQ"], 0.6, color="tab:blue", alpha=0.5, label="PQ")
        for k, seeds in enumerate(rows.values()):
            ax.text(2, k, f"{mean['PQ'][k]:.1f}", va="center")
            ax.plot([s["PQ"] for s in seeds], [k] * len(seeds), ".", color="black", ms=4,
                    label="a seed" if k == 0 else None)
        for column, mark, name in (("PQ_th", "v", "things"), ("PQ_st", "^", "stuff")):
            ax.plot(mean[column], y, mark, color="tab:orange", label=name)
        ax.set_yticks(y, list(rows))
        ax.set(title=title, xlabel="PQ, %", xlim=(0, 100))
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, path)


def main(argv=None):
    import train
    parser = ends.Parser(__doc__)
    parser.add_argument("--methods", nargs="+", help="default: all that have a recipe, but for "
                        f"'two'; and: {', '.join(map(repr, VARIANTS))}")
    parser.add_argument("--import", dest="modules", nargs="+", default=[], metavar="FILE",
                        help="programs that add methods, as README's mine.py does")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ...; default: 3 of them")
    parser.add_argument("--minutes", type=float, help="train each method for so long too")
    parser.add_argument("--out", help="folder; default: the first free runs/DATASET-compare-N")
    own, words = parser.parse_known_args(argv)
    for name in own.modules:
        try:
            importlib.import_module(name.removesuffix(".py"))
        except ModuleNotFoundError as e:
            raise DataError(f"--import {name}: {e}; start from the folder of that file") from e
    flags = train.parse(words)
    if own.seeds < 1 or (own.minutes or 1) <= 0 or flags.seed is not None:
        raise DataError("lab.compare takes --seeds N for the seeds 0 to N - 1, at least one, and "
                        "--minutes above 0")
    dataset = flags.dataset or "street"
    rows = own.methods or [*VARIANTS, *(m for m in methods.METHODS if (m, dataset) in RECIPES
                                        and m not in ("seamless", "two"))]
    fits = {row: train.arguments(flags_of(row, words, "none"))[0]["fit"] for row in rows}
    crops = fits[rows[0]]["steps"] * fits[rows[0]]["batch"]
    asked = {row: crops // fit["batch"] for row, fit in fits.items()}
    folder = folders.make_folder(own.out or folders.new_folder(f"{dataset}-compare"))
    plans = {"equal images": asked}
    if own.minutes:
        plans["equal minutes"] = {row: steps_in(own.minutes, row, words, folder) for row in rows}
    tables = {}
    for title, plan in plans.items():
        tables[title] = {row: [result(row, words, folder, seed, steps)
                               for seed in range(own.seeds)] for row, steps in plan.items()}
    for title, found in tables.items():
        print(f"\n{table(found, title)}")
    runs.write_json(folder / "compare.json", tables)
    draw(tables, folder / "compare.png")


if __name__ == "__main__":
    with ends.one_sentence("lab.compare"):
        main()
