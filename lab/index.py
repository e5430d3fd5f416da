"""The Index of isus.py kept on disk: reading all labels of a real data set takes minutes.

`cached_index` reads the labels once, shared by all processes of a run, says how far it is, and
writes the table to a file. The next run loads that file if it belongs to the same label files.
"""
import hashlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from data import DataError
from isus import Index, segment_rows

SILENT, INTERVAL = 2.0, (60.0, 0.5)  # seconds until the first progress, and between: file, terminal


class Rows(torch.utils.data.Dataset):
    """The rows of some images of a data set, for a DataLoader: int32 numpy arrays [N, 8]."""

    def __init__(self, dataset, images):
        self.dataset, self.images = dataset, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, j):
        # A tensor would come through a shared file that stays open as long as the tensor lives.
        return segment_rows(self.dataset, self.images[j]).int().numpy()


def fingerprint(dataset):
    """A text that changes with the categories, with the names, sizes and times of label files, and
    with what COCO's JSON says of their segments.

    `dataset.files` lists (name, image, label or None), as readers.py has it."""
    parts = [len(dataset), [(c.name, bool(c.isthing)) for c in dataset.categories]]
    infos = getattr(dataset, "infos", None) or [None] * len(dataset)
    for (name, _, label), info in zip(dataset.files, infos):
        parts += [name, info] if info else [name]
        if label is not None and os.path.exists(label):
            stat = os.stat(label)
            parts.append((os.path.basename(label), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def load_table(path, expected):
    """The table in a file -> (int64 [M, 8] or None, why it cannot be used)."""
    try:
        state = torch.load(path, weights_only=True)
        if state["fingerprint"] == expected:
            return state["table"].long(), ""
        return None, "belongs to another data set, or to other files of this one"
    except FileNotFoundError:
        return None, ""
    except Exception as e:                                     # a torn file can raise anything
        return None, f"is damaged ({type(e).__name__})"


def save_table(path, table, files):
    """Keeps the table with the fingerprint `files`. Writes beside the file and moves into
    place, so that the file is whole or absent."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        torch.save({"fingerprint": files, "table": table.int()}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_rows(dataset, images, workers, say):
    """The rows of these images -> int32 array [N, 8]; `say(text, end)` hears how far it is."""
    parts, begun, shown = [np.zeros((0, 8), np.int32)], time.monotonic(), 0.0
    interval = INTERVAL[sys.stderr.isatty()]
    # A generator of its own: a resumed run must go on with the random numbers it had.
    loader = DataLoader(Rows(dataset, images), batch_size=None, num_workers=workers,
                        collate_fn=np.asarray, generator=torch.Generator())
    for n, rows in enumerate(loader, 1):
        parts.append(rows)
        now = time.monotonic()
        if now - begun > SILENT and now - shown > interval:
            say(f"\rreading labels, once: {n} of {len(images)}", end="")
            shown = now
    if shown:
        seconds = time.monotonic() - begun
        say(f"\rreading labels, once: {len(images)} of {len(images)}, {seconds:.0f} s")
    return np.concatenate(parts)


def gather(value, world_size):
    """The values of all processes, in the order of ranks, on each of them."""
    values = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values


def cached_index(dataset, cache, rank=0, world_size=1, workers=0):
    """The Index of a data set from the file `cache` if it fits, else from the labels -> Index.

    Of `world_size` processes each reads its share, with `workers` helpers, and rank 0 writes the
    file. All must call, and `torch.distributed` must be initialised. If one process cannot use its
    file (a disk may belong to one machine), all read again. DataError: nothing to sample from."""
    def say(text, end="\n"):
        if rank == 0:
            print(text, end=end, file=sys.stderr, flush=True)

    files = fingerprint(dataset)
    table, why = load_table(cache, files)
    if why:
        say(f"{cache} {why}: reading all labels again")
    fits = all(gather(table is not None, world_size))
    if not fits:
        mine = read_rows(dataset, range(rank, len(dataset), world_size), workers, say=say)
        table = torch.from_numpy(np.concatenate(gather(mine, world_size))).long()
        table = table[table[:, 0].argsort(stable=True)]        # the order of images
    try:
        index = Index(table, len(dataset))                     # may refuse: write only afterwards
    except ValueError as e:
        raise DataError(str(e)) from e
    if rank == 0 and not fits:
        try:
            save_table(cache, table, files)
        except (OSError, RuntimeError) as e:                   # a full disk is torch's RuntimeError
            say(f"{cache} cannot be written ({e}): the next run reads all labels again")
    return index
