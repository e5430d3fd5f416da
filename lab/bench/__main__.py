"""Measures speed and memory: python -m lab.bench [SUBJECT ...]

Without arguments all subjects run. Each prints its numbers and fails where one misses its bar. Each
runs in a process of its own, on one thread unless it says otherwise.
"""
import argparse
import importlib
import subprocess
import sys

import torch

SUBJECTS = ("pq", "cabb", "seamless", "isus", "adaptis", "affinity", "ibs", "input", "memory")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", metavar="subject", help=", ".join(SUBJECTS))
    chosen = parser.parse_args(argv).subjects or SUBJECTS
    unknown = [name for name in chosen if name not in SUBJECTS]
    if unknown:
        parser.error(f"no subject {', '.join(unknown)}; there are {', '.join(SUBJECTS)}")
    if len(chosen) == 1:
        subject = importlib.import_module(f"lab.bench.bench_{chosen[0]}")
        print(f"--- {chosen[0]}: {subject.__doc__.splitlines()[0]}", flush=True)
        torch.set_num_threads(1)
        try:
            return subject.measure()
        except AssertionError:
            sys.exit(f"{chosen[0]} missed its bar, see above; other programs may be the reason")
    failed = [name for name in chosen
              if subprocess.run([sys.executable, "-m", "lab.bench", name]).returncode]
    if failed:
        sys.exit(f"below its bar: {', '.join(failed)}")


if __name__ == "__main__":
    main()
