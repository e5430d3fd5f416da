"""Decoded images and labels on disk. A crop of 512x1024 takes 79 ms of a core from a PNG of
1024x2048 and its label, 30 ms from the cache (`python -m lab.bench input`).

`--cache DIR` gives each image a file of 3 bytes a pixel, and 1 or 4 for its segments: 25 GB for the
2,975 images of Cityscapes. The operating system keeps these files in memory where there is room, so
that each image is decoded once, for all epochs, loading processes and later runs.
"""
import hashlib
import os
import shutil
import sys
from pathlib import Path

import torch
from torch.utils.data import get_worker_info

from data import DataError, Sample

RESERVE = 4 * 2 ** 30  # bytes that stay free on the disk, for checkpoints


class Decoded:
    """A data set of readers.py that keeps what it has decoded in `folder`, a file an image.

    A file is used while image, label and categories are those that it was made of, and made anew
    otherwise. Where the disk has less than RESERVE left, images are decoded at each use. Images of
    more than 8 bits are kept with 8."""

    def __init__(self, dataset, folder):
        self.dataset, self.folder, self.full = dataset, Path(folder), False
        self.categories, self.files = dataset.categories, dataset.files
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{os.getpid()}.tmp").touch()
            (self.folder / f"{os.getpid()}.tmp").unlink()
        except OSError as e:
            raise DataError(f"--cache {folder}: it cannot be written to ({e.strerror}); give a "
                            "folder on a disk of your own") from None

    def __len__(self):
        return len(self.dataset)

    def fingerprint(self, i):
        """A text that changes with the files of image i, their times, and what they mean."""
        name, *files = self.files[i]
        stats = [os.stat(f) for f in files if f is not None and os.path.exists(f)]
        infos = getattr(self.dataset, "infos", None)           # COCO: what a label's colours mean
        parts = (name, [(s.st_size, s.st_mtime_ns) for s in stats], infos and infos[i],
                 [(c.name, c.isthing) for c in self.categories])
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def path(self, i):
        """The file of image i: its name, and a number made of where the image lies."""
        name, image, _ = self.files[i]
        place = hashlib.sha256(str(Path(image).resolve()).encode()).hexdigest()
        return self.folder / f"{name}-{place[:12]}.pt"

    def kept(self, i):
        """What is kept of image i: its file's dictionary, mapped into memory, or None."""
        try:
            state = torch.load(self.path(i), mmap=True, weights_only=True)
            return state if state["fingerprint"] == self.fingerprint(i) else None
        except Exception:                                      # absent; a torn file raises anything
            return None

    def keep(self, i, sample):
        """Writes the file of image i, beside its place and then into it."""
        small = torch.uint8 if len(sample.categories) < 256 else torch.int32
        image = (sample.image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
        state = {"fingerprint": self.fingerprint(i), "image": image, "crowd": sample.crowd,
                 "segments": sample.segments.to(small), "categories": sample.categories}
        temporary = self.path(i).with_suffix(f".{os.getpid()}.tmp")
        try:
            room = shutil.disk_usage(self.folder).free - 4 * image.numel()
            if room < RESERVE:
                raise OSError(f"less than {RESERVE >> 30} GiB are left")
            torch.save(state, temporary)
            os.replace(temporary, self.path(i))
        except (OSError, RuntimeError) as e:                   # torch.save: RuntimeError
            temporary.unlink(missing_ok=True)
            self.full = True
            if not get_worker_info() or get_worker_info().id == 0:
                print(f"--cache {self.folder}: {e}; other images are decoded at each use",
                      file=sys.stderr, flush=True)

    def __getitem__(self, i):
        state = self.kept(i)
        if state is None:
            sample = self.dataset[i]
            if not self.full:
                self.keep(i, sample)
            return sample
        return Sample(state["image"].permute(2, 0, 1).float().div_(255), state["segments"].long(),
                      state["categories"].clone(), state["crowd"].clone(), self.files[i][0])

    def labels(self, i):
        """(segments, categories, crowd) of image i; see readers.Folder."""
        state = self.kept(i)
        if state is None:
            return self.dataset.labels(i)
        return state["segments"].long(), state["categories"].clone(), state["crowd"].clone()
