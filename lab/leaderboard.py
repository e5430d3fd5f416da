"""The leaderboard: the best PQ on the toy street after six minutes on two CPU cores.

    python train.py ... --seed 0 --out runs/mine-0          and the same with seeds 1 and 2
    python -m lab.leaderboard runs/mine-0 runs/mine-1 runs/mine-2 --name "wider crops"

The second command reads metrics.json of the finished runs and adds a row to
lab/results/leaderboard.json and to RESULTS.md, or says in one sentence why these runs are no entry.
Any method may enter. Settings are chosen on val (`--eval-every`), never on test.
"""
import json
import re
import shlex
import subprocess
from pathlib import Path

from data import DataError
from lab import ends, report
from lab.runs import write_json
from lab.worlds import TOYS

SEEDS, MINUTES, THREADS = 3, 6.0, 2                            # at least; at most; at most
IMAGES = TOYS["street"][2]["test"]
COLUMNS = ("PQ", "PQ_th", "PQ_st", "minutes")
FREE = ("seed", "workers", "eval_every")                       # settings in which runs may differ


def command_of(facts):
    """The command of a run without its seed and its folder, for the table."""
    words, kept = shlex.split(facts["command"]), []
    while words:
        word = words.pop(0)
        if word in ("--seed", "--out"):
            words[:1] = []
        elif not word.startswith(("--seed=", "--out=")):
            kept.append(Path(word).name if word.endswith(".py") else word)
    return " ".join([*kept, "--seed S"])


def read(folder):
    """A finished run -> (the facts that all runs of a row share, its seed, its numbers)."""
    path = Path(folder, "metrics.json")
    try:
        metrics = json.loads(path.read_text())
        facts = metrics["run"]
        shared = {"settings": {k: v for k, v in facts["settings"].items() if k not in FREE},
                  "command": command_of(facts), "hardware": facts["hardware"],
                  "split": facts["split"], "images": metrics["images"]}
        numbers = {c: float({**metrics, **facts}[c]) for c in COLUMNS}
        return shared, int(facts["seed"]), numbers
    except OSError:
        raise DataError(f"{folder} holds no metrics.json: the run has not ended") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{path} is no metrics file of a training ({type(e).__name__}: {e}): train "
                        "again with this version") from e


def why_not(row):
    """Why a row of the table breaks the rules, as the end of a sentence; "" if it keeps them."""
    threads = re.match(r"1 x (\d+) threads of a .*CPU", row["hardware"])
    slowest = max(numbers["minutes"] for numbers in row["seeds"].values())
    if not row["command"] or not row["commit"]:
        return "it has no command or no commit: hand it in with this program"
    if len(row["seeds"]) < SEEDS:
        return f"it has {len(row['seeds'])} seeds and needs {SEEDS}: train with others too"
    if not threads or int(threads[1]) > THREADS:
        return f"it ran on {row['hardware']}: train with --device cpu --threads {THREADS}"
    if slowest > MINUTES:
        return f"a run took {slowest:.1f} minutes and may take {MINUTES:g}: lower --steps"
    if "--resume" in row["command"]:
        return "a run was resumed, so its command does not repeat it: train without a stop"
    return ""


def entry(folders, name, commit):
    """Finished runs -> a row of the table. DataError: they are no entry."""
    rows = [read(folder) for folder in folders]
    shared = rows[0][0]
    for folder, (facts, _, _) in zip(folders, rows):
        other = [key for key in facts if facts[key] != shared[key]]
        if other:
            raise DataError(f"{folder}: its {other[0]} differs from that of {folders[0]}; the runs "
                            "of a row differ in their seed alone")
    seeds = [seed for _, seed, _ in rows]
    if len(set(seeds)) < len(seeds):
        raise DataError(f"two runs of seed {max(seeds, key=seeds.count)}: give one of each seed")
    if shared["settings"]["dataset"] != "street" or shared["images"] != IMAGES:
        raise DataError(f"{folders[0]} was evaluated on {shared['images']} images of "
                        f"{shared['settings']['dataset']}: an entry needs the {IMAGES} of street")
    if shared["split"] != "test":
        raise DataError(f"{folders[0]} was evaluated on {shared['split']}: an entry needs test")
    row = {"name": name, "command": shared["command"], "commit": commit,
           "hardware": shared["hardware"],
           "seeds": {str(seed): numbers for _, seed, numbers in sorted(rows, key=lambda r: r[1])}}
    why = why_not(row)
    if why:
        raise DataError(f"{name} is no entry: {why}")
    return row


def committed():
    """The short name of the commit that is checked out. DataError if a program differs from it."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=report.ROOT, capture_output=True,
                              text=True).stdout.strip()
    changed = git("status", "--porcelain", "--", "*.py")
    if changed or not git("rev-parse", "HEAD"):
        raise DataError("a row names the commit that repeats it: commit your programs first"
                        + f" ({changed.split()[-1]})" * bool(changed))
    return git("rev-parse", "--short", "HEAD")


def main(argv=None):
    parser = ends.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    parser.add_argument("--name", required=True, help="what is different, in a few words")
    flags = parser.parse_args(argv)
    row = entry(flags.runs, flags.name, committed())
    path = report.RESULTS / "leaderboard.json"
    table = json.loads(path.read_text())
    rows = [r for r in table["rows"] if r["name"] != row["name"]] + [row]
    table["rows"] = sorted(rows, key=lambda r: -report.mean(r, "PQ"))
    write_json(path, table)
    (report.ROOT / "RESULTS.md").write_text(report.report())
    place = [r["name"] for r in table["rows"]].index(row["name"]) + 1
    print(f"{row['name']}: PQ {report.mean(row, 'PQ'):.1f}, place {place} of {len(rows)}. Commit "
          "lab/results/leaderboard.json and RESULTS.md, and send both.")


if __name__ == "__main__":
    with ends.one_sentence("lab.leaderboard"):
        main()
