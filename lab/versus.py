"""Two recipes, each trained with the same seeds: paired differences with 95% intervals.

    python -m lab.versus "runs/pairs-ibs-*" "runs/pairs-?"

Each pattern names the run folders of one recipe. Prints, for each metric, the mean over seeds on
either side, the mean of the paired differences and its interval (Student's t).
"""
import glob
import json
from pathlib import Path

from data import DataError
from lab import ends
from lab.intervals import paired_t


def flatten(metrics):
    """The numbers of a metrics.json that recipes are compared by -> {name: number}."""
    found = {k: metrics[k] for k in ("PQ", "PQ_th", "PQ_st", "Acc_th", "Prec_th", "mIoU")}
    found["confused, T = 25"] = metrics["confusion"]["25"]
    for kind in ("mask", "box"):
        for key in ("AP", "AP_small", "AP_medium", "AP_large"):
            found[f"{kind} {key}"] = metrics[f"AP_{kind}"][key]
    for key, value in metrics.get("instances", {}).items():
        found[f"before merging, {key}"] = value
    return found


def read(pattern):
    """The finished runs that a pattern names -> {seed: {name: number}}."""
    runs = {}
    for folder in map(Path, sorted(glob.glob(pattern))):
        path = folder / "metrics.json"
        if not path.exists():
            raise DataError(f"{folder} holds no metrics.json: the run has not ended")
        try:
            metrics = json.loads(path.read_text())
            seed = metrics["run"]["seed"]
            row = flatten(metrics)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise DataError(f"{path} is no metrics file of a run ({type(e).__name__}: {e}): "
                            "evaluate the run again") from e
        if seed in runs:
            raise DataError(f"{pattern}: two runs of seed {seed}; name the runs of one recipe only")
        runs[seed] = row
    return runs


def versus(first, second):
    """Two patterns of run folders -> {name: (mean, mean, difference, low, high)}; prints it."""
    a, b = read(first), read(second)
    if not a or set(a) != set(b):
        raise DataError(f"seeds must be the same on both sides, not {sorted(a)} of {first} and "
                        f"{sorted(b)} of {second}")
    print(f"{'':34s}{'first':>8}{'second':>8}   first - second, {len(a)} paired seeds")
    result = {}
    for key in next(iter(a.values())):
        x, y = ([side[seed].get(key) for seed in sorted(side)] for side in (a, b))
        if None in x + y:                                      # no object of that size
            continue
        mean = [sum(v) / len(v) for v in (x, y)]
        result[key] = (*mean, *paired_t(x, y))
        print(f"{key:34s}{mean[0]:8.1f}{mean[1]:8.1f}   {result[key][2]:+6.1f}  "
              f"[{result[key][3]:+.1f}, {result[key][4]:+.1f}]")
    return result


def main(argv=None):
    parser = ends.Parser(__doc__)
    parser.add_argument("first", help="pattern of the first recipe's run folders")
    parser.add_argument("second", help="pattern of the second recipe's run folders")
    flags = parser.parse_args(argv)
    versus(flags.first, flags.second)


if __name__ == "__main__":
    with ends.one_sentence("lab.versus"):
        main()
