"""Every method on the same data set, seed and splits, each by its own recipe: a table, a figure.

    python -m lab.compare [--methods seamless maskrcnn ...] [--out DIR] [flags of train.py]
    python -m lab.compare --import mine --methods seamless mine     with a method of your mine.py
"""
import importlib
from pathlib import Path

import numpy as np

from data import DataError
from lab import ends, folders, methods, runs
from lab.draw import new_figure, save
from lab.recipes import RECIPES

COLUMNS = ("PQ", "PQ_th", "PQ_st", "SQ", "RQ", "PQ_dagger", "mIoU", "AP_mask", "AP_box")


def row(result):
    """The columns of the table from the metrics of a run; minutes of training and evaluation."""
    values = {k: result[k]["AP"] if k.startswith("AP") else result[k] for k in COLUMNS}
    return {**values, "minutes": result["run"]["minutes"]}


def table(rows):
    """rows {method: {column: number}} -> text."""
    columns = list(next(iter(rows.values())))
    lines = ["method      " + "".join(f"{c:>10}" for c in columns)]
    for method, values in rows.items():
        lines.append(f"{method:12s}" + "".join(f"{values[c]:10.1f}" for c in columns))
    return "\n".join(lines)


def draw(rows, title, path):
    """Bars: a group for each metric, a bar for each method."""
    figure = new_figure(3.6)
    ax = figure.subplots()
    x, width = np.arange(len(COLUMNS)), 0.8 / len(rows)
    for i, (method, values) in enumerate(rows.items()):
        place = x + (i - (len(rows) - 1) / 2) * width
        bars = ax.bar(place, [values[c] for c in COLUMNS], width, label=method)
        ax.bar_label(bars, fmt="%.0f")
    ax.set_xticks(x, COLUMNS)
    ax.set_ylabel("percent")
    ax.set_title(title)
    ax.legend()
    save(figure, path)


def main(argv=None):
    import train
    parser = ends.Parser(__doc__)
    parser.add_argument("--methods", nargs="+", help="default: all that have a recipe")
    parser.add_argument("--import", dest="modules", nargs="+", default=[], metavar="FILE",
                        help="programs that add methods, as README's mine.py does")
    parser.add_argument("--out", help="folder; default: the first free runs/DATASET-compare-N")
    own, rest = parser.parse_known_args(argv)
    for name in own.modules:
        try:
            importlib.import_module(name.removesuffix(".py"))
        except ModuleNotFoundError as e:
            raise DataError(f"--import {name}: {e}; start from the folder of that file") from e
    flags = train.parse(rest)
    dataset = flags.dataset or "street"
    chosen = own.methods or [m for m in methods.METHODS if (m, dataset) in RECIPES]
    folder = Path(own.out) if own.out else folders.new_folder(f"{dataset}-compare")
    asked = {method: train.parse([*rest, "--method", method, "--out", str(folder / method)])
             for method in chosen}                             # refuses a name before it trains
    rows = {method: row(train.run(flags)) for method, flags in asked.items()}
    print(table(rows))
    runs.write_json(folder / "compare.json", rows)
    draw(rows, f"{dataset}, seed {flags.seed or 0}, test split", folder / "compare.png")


if __name__ == "__main__":
    with ends.one_sentence("lab.compare"):
        main()
