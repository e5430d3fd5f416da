"""Files that are whole or absent, and folders that belong to one run.

A run takes its folder before it does anything else, and no other run can take it. What is written
there is written beside the file and moved into place.
"""
import fcntl
import itertools
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

from data import DataError


class Stopped(Exception):
    """A signal ended the run. The message is one sentence: how to go on. `.number`: the signal."""

    def __init__(self, text, number=signal.SIGINT):
        super().__init__(text)
        self.number = number


def write_file(path, content):
    """Writes bytes beside the file, then moves them into place: whoever is killed, or finds the
    disk full, leaves the file as it was."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        kept = "; the one before is kept" if Path(path).exists() else ""
        raise DataError(f"{path} cannot be written ({e.strerror}){kept}: make room on the disk, or "
                        "give another --out") from e
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path):
    """Creates a folder, if it is missing, and those above it -> its Path."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        return Path(path)
    except OSError as e:
        raise DataError(f"--out {path}: no folder can be made there ({e.strerror}); give another "
                        "one") from e


def new_folder(name):
    """Creates the first of runs/NAME-1, runs/NAME-2, ... that does not exist -> its path. Two runs
    that ask at the same time get two folders."""
    make_folder("runs")
    for n in itertools.count(1):
        try:
            Path("runs", f"{name}-{n}").mkdir()
            return Path("runs", f"{name}-{n}")
        except FileExistsError:
            pass


@contextmanager
def taken(folder, resume=None, new=False):
    """Takes a run's folder for this process alone. `resume`: the folder of the run to go on with.
    new: `new_folder` has just made it.

    The lock lies on the folder itself, and ends with the process. A new folder that is still empty
    at the end is removed. DataError: another run has the folder, or has had it."""
    folder = Path(folder)
    made = [folder, folder.parent] if new else [
        f for f in (folder, *folder.parents) if not f.exists()]
    make_folder(folder)
    lock = os.open(folder, os.O_RDONLY)
    try:
        check_free(folder, lock, resume)
        yield
    except KeyboardInterrupt:
        raise Stopped(how_to_go_on(folder)) from None
    finally:
        os.close(lock)
        for f in made:
            if f.exists() and not any(f.iterdir()):
                f.rmdir()


def check_free(folder, lock, resume):
    """DataError if another process works in this folder, or a run other than `resume` is in it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise DataError(f"another process trains in {folder}: wait until it has ended, or give "
                        "another --out") from None
    if resume and folder.samefile(resume):
        return
    if (folder / "last.pt").exists():
        raise DataError(f"{folder} holds a run already: go on with it by --resume {folder}, or "
                        "give another --out")
    if (folder / "log.csv").exists():
        raise DataError(f"{folder} holds a run that ended before its first checkpoint: delete the "
                        "folder, or give another --out")


def how_to_go_on(folder):
    """A sentence for a run that was stopped."""
    if (folder / "last.pt").exists():
        return f"stopped; go on with --resume {folder}"
    return "stopped before the first checkpoint: train again"


def branch(source, folder):
    """Copies checkpoint, log and curve of a run, so that the copy may go on elsewhere."""
    for name in ("log.csv", "curve.csv", "last.pt"):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
