"""Writes RESULTS.md from the files lab/results/*.json.

    python -m lab.report                                        writes RESULTS.md
    python -m lab.report --add NAME "ROW=runs/a-*" "ROW=..."    keeps the metrics of finished runs

A file in lab/results holds one table:
    order, title, text      where it stands, what it is called, sentences above it
    columns                 names of metrics
    rows                    [{"name": ..., "seeds": {seed: {column: number}}}] of measured runs, or
                            [{"name": ..., "cells": [text, ...]}] of numbers without a metrics file
                            a row may have its own command, commit, hardware (see the leaderboard)
    differences             [[row, row], ...]: paired over the seeds, with 95% intervals
    command, commit, hardware, split
    older                   true: measured before val and test were split, on what is now val
"""
import glob
import json
import subprocess
from pathlib import Path

from data import DataError
from lab import ends
from lab.intervals import paired_t
from lab.runs import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "lab" / "results"
HEAD = """# Results

`python -m lab.report` wrote this file from `lab/results/*.json`; a test compares both. Toy worlds
have three splits: train, val (recipes are chosen there) and test (reported here). A table marked
*older* was measured before val and test were split: on the images that are val now, and without
kept metrics files. Brackets hold 95% intervals of paired differences (Student's t over seeds).
"""


def mean(row, column):
    """Mean over the seeds of a row, or None where no seed has a number."""
    values = [m[column] for m in row["seeds"].values() if m.get(column) is not None]
    return sum(values) / len(values) if values else None


def cells(row, columns):
    """The texts of a row's cells."""
    if "cells" in row:
        return [str(c) for c in row["cells"]]
    texts = []
    for column in columns:
        value = mean(row, column)
        texts.append("" if value is None else f"{value:.1f}")
    return texts


def difference(table, first, second):
    """A row of paired differences `first - second` with intervals, over their common seeds."""
    rows = {r["name"]: r for r in table["rows"]}
    a, b = rows[first]["seeds"], rows[second]["seeds"]
    texts = []
    for column in table["columns"]:
        pairs = [(a[s][column], b[s][column]) for s in sorted(set(a) & set(b))]
        pairs = [p for p in pairs if None not in p]            # a metric without a number
        if not pairs:
            texts.append("")
            continue
        d, low, high = paired_t(*zip(*pairs))
        texts.append(f"{d:+.1f} [{low:+.1f}, {high:+.1f}]")
    return [f"**{first} - {second}**", *texts]


def section(table):
    """One table as Markdown."""
    older = " (older)" if table.get("older") else ""
    lines = [f"## {table['title']}{older}", "", *table.get("text", []), ""]
    measured = any("seeds" in row for row in table["rows"])
    columns = table["columns"]
    own = [k for k in ("command", "commit", "hardware") if any(k in r for r in table["rows"])]
    head = ["", *columns, *(["seeds"] if measured else []), *own]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in table["rows"]:
        texts = [row["name"], *cells(row, columns)]
        if measured:
            texts.append(", ".join(sorted(row.get("seeds", {}), key=int)))
        texts += [f"`{row[k]}`" if k == "command" and k in row else row.get(k, "") for k in own]
        lines.append("| " + " | ".join(texts) + " |")
    for first, second in table.get("differences", []):
        texts = difference(table, first, second) + [""] * (measured + len(own))
        lines.append("| " + " | ".join(texts) + " |")
    facts = [f"{key}: {table[key]}" for key in ("split", "hardware", "commit") if table.get(key)]
    if facts:
        lines += ["", "; ".join(facts) + "."]
    if table.get("command"):
        lines += ["", "```bash", *([table["command"]] if isinstance(table["command"], str)
                                   else table["command"]), "```"]
    return "\n".join(lines)


def report():
    """All tables in their order -> the text of RESULTS.md."""
    tables = []
    for path in sorted(RESULTS.glob("*.json")):
        try:
            tables.append(json.loads(path.read_text()))
        except ValueError as e:
            raise DataError(f"{path} is no JSON ({e}): mend it by hand or measure again") from e
    tables.sort(key=lambda t: (t.get("order", 99), t["title"]))
    return HEAD + "\n" + "\n\n".join(section(t) for t in tables) + "\n"


def pick(metrics, column):
    """A number of a metrics.json by the name of its column, such as "PQ" or "AP_mask.AP50"."""
    value = metrics
    for part in column.split("."):
        value = value[part]
    if not isinstance(value, (int, float, type(None))):
        raise TypeError(f"{column} is no number")
    return value


def add(name, rows):
    """Keeps the metrics of finished runs in lab/results/NAME.json: rows of (name, pattern).

    The file must exist with title and columns; its rows of these names are replaced."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise DataError(f"{path} does not exist: write it first, with title, columns and rows []")
    table = json.loads(path.read_text())
    for label, pattern in rows:
        seeds, hardware = {}, table.get("hardware")
        for file in sorted(glob.glob(f"{pattern}/metrics.json")):
            try:
                metrics = json.loads(Path(file).read_text())
                facts = metrics["run"]
                keys = table.get("keys", {})
                seeds[str(facts["seed"])] = {c: pick({**metrics, **facts}, keys.get(c, c))
                                             for c in table["columns"]}
                hardware = facts["hardware"]
            except (ValueError, KeyError, TypeError) as e:
                raise DataError(f"{file} is no metrics file of a run ({type(e).__name__}: {e}): "
                                "evaluate the run again") from e
        if not seeds:
            raise DataError(f"{pattern}: no folder of a finished run; --add takes NAME, then "
                            "\"ROW=pattern of run folders\"")
        table["rows"] = [r for r in table["rows"] if r["name"] != label]
        table["rows"].append({"name": label, "seeds": seeds})
        table["hardware"] = hardware
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                          text=True)
    table["commit"] = head.stdout.strip()
    write_json(path, table)


def main(argv=None):
    parser = ends.Parser(__doc__)
    parser.add_argument("--add", nargs="+", metavar=("NAME", "ROW=RUNS"), help="keep metrics")
    flags = parser.parse_args(argv)
    if flags.add:
        rows = [row.split("=", 1) for row in flags.add[1:]]
        if not rows or any(len(row) < 2 for row in rows):
            raise DataError("--add takes NAME, then \"ROW=pattern of run folders\"")
        add(flags.add[0], rows)
    (ROOT / "RESULTS.md").write_text(report())


if __name__ == "__main__":
    with ends.one_sentence("lab.report"):
        main()
