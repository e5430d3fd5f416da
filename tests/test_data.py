"""The spec of data.py and of the toy street: crops against explicit loops, frozen worlds."""
import colorsys
import math
import sys
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection._utils import BoxCoder

import data
from claims import claim
from data import Sample, crop, mask_boxes
from lab.cells import OverlappingCells
from lab.parking import Parking
from lab.street import StreetScenes


def random_sample(seed, h=13, w=17, n=5):
    """Blocky random segments: some are absent, some in pieces, some touch the border."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((h, w), int)
    for k in rng.permutation(n)[:n - 1] + 1:                   # one of them never occurs
        for _ in range(2):
            y, x = rng.integers(0, h), rng.integers(0, w)
            segments[y:y + rng.integers(1, 7), x:x + rng.integers(1, 7)] = k
    image = torch.from_numpy(rng.random((3, h, w)).astype(np.float32))
    return Sample(image, torch.from_numpy(segments), torch.from_numpy(rng.integers(0, 9, n)),
                  torch.from_numpy(rng.random(n) < .3), f"s{seed}")


def loop_box(segments, k):
    """The definition: the smallest half-open box around the pixels of k; zeros if it has none."""
    places = [(x, y) for y, row in enumerate(segments) for x, v in enumerate(row) if v == k]
    if not places:
        return [0, 0, 0, 0]
    xs, ys = zip(*places)
    return [min(xs), min(ys), max(xs) + 1, max(ys) + 1]


# --- Crops ------------------------------------------------------------------------------------
def plain_crop(sample, top, left, window, size=None, flip=False):
    """The definition: resize all, mirror all, then look at each pixel of the window."""
    (h, w), old = window, sample.segments
    H, W = size or old.shape
    image = F.interpolate(sample.image[None], (H, W), mode="bilinear", antialias=True)[0]
    rows = [int((y + .5) * old.shape[0] / H) for y in range(H)]
    columns = [int((x + .5) * old.shape[1] / W) for x in range(W)]
    columns, image = (columns[::-1], image.flip(-1)) if flip else (columns, image)
    out, segments = torch.zeros(3, h, w), [[0] * w for _ in range(h)]
    for y in range(h):
        for x in range(w):
            if 0 <= top + y < H and 0 <= left + x < W:
                out[:, y, x] = image[:, top + y, left + x]
                segments[y][x] = int(old[rows[top + y], columns[left + x]])
    full = {}
    for k in range(1, len(sample.categories) + 1):
        x1, y1, x2, y2 = loop_box(old.tolist(), k)
        ys = [i for i, v in enumerate(rows) if y1 <= v < y2]
        xs = [i for i, v in enumerate(columns) if x1 <= v < x2]
        if any(k in row for row in segments):
            full[k] = [xs[0] - left, ys[0] - top, xs[-1] + 1 - left, ys[-1] + 1 - top]
    return out, segments, full


WINDOWS = [(2, 3, 6, 7), (0, 0, 13, 17), (-3, -4, 8, 9), (9, 12, 8, 9), (-2, -2, 20, 30),
           (5, 5, 1, 1), (40, 3, 4, 4), (-9, 0, 9, 5), (3, 17, 5, 5), (2, -9, 5, 5), (12, 16, 1, 1)]


@claim("porzi2021", "Footnote 1", "crop the mask, then take the box of the rest", of="data.crop")
@claim("porzi2021", "Footnote 2", "truncated: the object goes on beyond the edge", of="data.crop")
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [None, (26, 34), (4, 30), (20, 5)])
def test_a_crop_is_what_loops_over_its_pixels_find(size, flip):
    """Windows that reach outside of the image, or miss it, or end where objects end; resized and
    mirrored."""
    for seed in range(3):
        s = random_sample(seed)
        for top, left, h, w in WINDOWS:
            image, t = crop(s, top, left, (h, w), size=size, flip=flip)
            want, segments, full = plain_crop(s, top, left, (h, w), size=size, flip=flip)
            shown = list(full)
            number = {0: 0, **{k: i for i, k in enumerate(shown, 1)}}
            assert t.segments.tolist() == [[number[k] for k in row] for row in segments]
            assert t.categories.tolist() == [int(s.categories[k - 1]) for k in shown]
            assert t.crowd.tolist() == [bool(s.crowd[k - 1]) for k in shown]
            assert t.boxes.tolist() == [loop_box(segments, k) for k in shown]
            assert t.full_boxes.tolist() == list(full.values())
            assert t.truncated.tolist() == [[x1 < 0, y1 < 0, x2 > w, y2 > h]
                                            for x1, y1, x2, y2 in full.values()]
            assert image.shape == want.shape and (image - want).abs().max() < 2e-6
            assert t.boxes.shape == t.full_boxes.shape == t.truncated.shape == (len(shown), 4)


def test_a_crop_remembers_where_it_comes_from_and_copies():
    s = random_sample(1)
    before, shown = s.image.clone(), sorted(set(s.segments.unique().tolist()) - {0})
    for k in range(6):
        image, t = crop(s, 0, 0, (13, 17), boxes=mask_boxes(s.segments, 5), image_id=7, instance=k,
                        scale=.5)
        assert t.instance == (shown.index(k) + 1 if k in shown else 0)
        image.zero_()
    assert torch.equal(s.image, before) and torch.equal(t.full_boxes, t.boxes)
    moved = t.to("meta")
    assert all(v.device.type == "meta" for v in vars(moved).values() if torch.is_tensor(v))
    assert (moved.image_id, moved.scale) == (7, .5)


@pytest.mark.parametrize("size", [(8, 10), (16, 20), (3, 20)])
def test_a_random_pixel_shows_a_chosen_segment_and_all_are_equally_likely(size):
    """Of the resized label's pixels with segment 2 or 3. A segment that resizing loses is found at
    its place."""
    segments = torch.zeros(8, 10, dtype=torch.long)
    segments[1:5, 2:6], segments[4:8, 7:9], segments[0, 0], segments[7, 9] = 2, 3, 1, 4
    rows, columns = (data.nearest(old, new) for old, new in zip((8, 10), size))
    scaled = segments[rows[:, None], columns]
    g, counts = torch.Generator().manual_seed(0), torch.zeros(size)
    for _ in range(1000):
        y, x, k = data.random_pixel(segments, (2, 1, 9, 8), torch.tensor([2, 3]), size=size,
                                    generator=g)
        assert scaled[y, x] == k and k in (2, 3)
        counts[y, x] += 1
    chosen = (scaled == 2) | (scaled == 3)
    counts, mean = counts[chosen], 1000 / int(chosen.sum())
    assert (counts > 0).all() and ((counts - mean).abs() < 5 * math.sqrt(mean)).all()
    for corner, (h, w) in ((1, (0, 0)), (4, (7, 9))):
        y, x, k = data.random_pixel(segments, (w, h, w + 1, h + 1), torch.tensor([corner]),
                                    size=size, generator=g)
        assert k == corner and (y // (size[0] / 2), x // (size[1] / 2)) == (h // 7, w // 9)
        assert y < size[0] and x < size[1]


def test_collate_pads_with_black_and_void():
    crops = [crop(random_sample(0), 0, 0, window) for window in ((6, 9), (8, 5))]
    images, targets = data.collate(crops)
    assert images.shape == (2, 3, 8, 9)
    for k, ((image, t), (h, w)) in enumerate(zip(crops, ((6, 9), (8, 5)))):
        assert torch.equal(images[k], F.pad(image, (0, 9 - w, 0, 8 - h)))
        assert torch.equal(targets[k].segments, F.pad(t.segments, (0, 9 - w, 0, 8 - h)))


# --- Boxes and segments -----------------------------------------------------------------------
def test_encode_and_decode_are_torchvisions():
    g = torch.Generator().manual_seed(0)
    corner, size = 50 * torch.rand(2, 2, 40, 2, generator=g).double()
    boxes, anchors = torch.cat([corner, corner + size + 1], 2)
    coder = BoxCoder((1., 1., 1., 1.))
    deltas = coder.encode_single(boxes, anchors)
    assert torch.allclose(data.encode(boxes, anchors), deltas, atol=1e-9)
    assert torch.allclose(data.decode(deltas, anchors), boxes, atol=1e-9)
    huge = torch.tensor([[0., 0, 9, 9]]).double()              # the largest log size is a limit
    assert torch.allclose(data.decode(huge, anchors[:1]), coder.decode_single(huge, anchors[:1]))
    assert (data.decode(huge, anchors[:1], limit=20.) - anchors[:1]).abs().min() > 1000


@claim("porzi2019", "Section 3.2", "level floor(k0 + log2(sqrt(w h) / 224)), k0 = 3",
       of="data.pyramid_level")
def test_the_pyramid_level_of_a_box():
    sizes = [(1, 1), (55, 57), (56, 56), (111, 112), (112, 112), (224, 112), (224, 224), (448, 448),
             (9999, 9999), (100, 500), (0, 5)]
    boxes = torch.tensor([[3., 4, 3 + w, 4 + h] for w, h in sizes])
    for levels, canonical in ((4, 224), (5, 224), (4, 64)):
        want = [max(1, min(levels, math.floor(3 + math.log2(math.sqrt(w * h) / canonical))))
                if w else 1 for w, h in sizes]
        found = data.pyramid_level(boxes, levels, canonical)
        assert found.tolist() == want and found.dtype == torch.int64
    assert data.pyramid_level(torch.full((1, 4), torch.nan)).tolist() == [1]


def test_boxes_numbers_and_semantics_of_segments():
    """mask_boxes against loops, also of nothing and of one pixel; thing_truth and semantic_target
    leave crowds out; dropped segments get 0."""
    for seed in range(4):
        s = random_sample(seed)
        boxes = mask_boxes(s.segments, 5)
        assert boxes.tolist() == [loop_box(s.segments.tolist(), k) for k in range(1, 6)]
        _, t = crop(s, 0, 0, (9, 9))
        isthing = torch.arange(9) % 2 == 0
        kept = [k for k, (c, w) in enumerate(zip(t.categories.tolist(), t.crowd.tolist()), 1)
                if c % 2 == 0 and not w]
        rows = [k - 1 for k in kept]
        number, *rest = data.thing_truth(t, isthing)
        assert number.tolist() == kept
        for found, want in zip(rest, (t.boxes, t.truncated, t.categories)):
            assert torch.equal(found, want[rows])
        category = [-1, *(-1 if w else c for c, w in zip(t.categories.tolist(), t.crowd.tolist()))]
        assert data.semantic_target(t).tolist() == [[category[k] for k in r]
                                                    for r in t.segments.tolist()]
    for segments, count in ((torch.zeros(4, 5), 2), (torch.zeros(4, 5), 0), (torch.ones(1, 1), 1)):
        boxes = mask_boxes(segments.long(), count)
        assert boxes.dtype == torch.float32 and boxes.shape == (count, 4)
        assert boxes.tolist() == [[0, 0, 1, 1] if segments.any() else [0, 0, 0, 0]] * count
    keep = torch.tensor([True, False, True, True, False])
    assert data.new_numbers(keep).tolist() == [0, 1, 0, 2, 3, 0]


def test_colour_jitter_follows_its_generator_its_formula_and_colorsys():
    """Factors of brightness, contrast and saturation in 1 - .4 .. 1 + .4, then the hue."""
    image, turns = torch.rand(3, 4, 5), []
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        b, c, s = (1 + .4 * (2 * u - 1) for u in torch.rand(3, generator=g).tolist())
        turn = .2 * (2 * torch.rand((), generator=g).item() - 1)
        turns.append(turn)
        found = data.colour_jitter(image, torch.Generator().manual_seed(seed), .4)
        turned = data.colour_jitter(image, torch.Generator().manual_seed(seed), .4, hue=.2)
        bright = image * b
        for y, x in ((0, 0), (3, 4), (2, 1)):
            pixel = [float(bright.mean() + (bright[k, y, x] - bright.mean()) * c) for k in range(3)]
            grey = sum(pixel) / 3
            pixel = [min(max(grey + (v - grey) * s, 0), 1) for v in pixel]
            assert found[:, y, x].tolist() == pytest.approx(pixel, abs=1e-5)
            h, s_, v = colorsys.rgb_to_hsv(*pixel)
            want = colorsys.hsv_to_rgb((h + turn) % 1, s_, v)
            assert turned[:, y, x].tolist() == pytest.approx(want, abs=1e-4)
    assert min(turns) < 0 < max(turns)


def test_the_command_line_runs_the_demo_and_prints_help(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["x.py", *arguments])
        data.command_line(lambda **how: print(how), "a text", quick="fast", full="slow")
    for words, out in ((["--full"], "figures"), (["--quick"], "runs/quick")):
        run("--device", "cuda", *words)
        how = dict(quick="--quick" in words, full="--full" in words, device="cuda", out=out)
        assert eval(capsys.readouterr().out) == how
    with pytest.raises(SystemExit):
        run("--help")
    assert "a text" in capsys.readouterr().out


# --- Toy worlds -------------------------------------------------------------------------------
def checksum(sample, start=0):
    labels = torch.cat([sample.segments.flatten(), sample.categories]).numpy().astype("<i8")
    image = (sample.image * 255).round().to(torch.uint8).numpy()
    return zlib.crc32(labels.tobytes()), zlib.crc32(image.tobytes(), start)


@pytest.mark.parametrize("world, i, expected", [
    (StreetScenes(10), 0, (1106531375, 4012616737)), (StreetScenes(10), 1, (122697881, 2198543228)),
    (StreetScenes(10), 7, (3613738867, 3204499114)),
    (Parking(50, seed=1), 2, (1293287101, 3031245220)),
    (OverlappingCells(12, seed=1), 3, (855502642, 660908180)),
    (OverlappingCells(12, seed=1, varied=1), 5, (1939419876, 2154118681)),
    (OverlappingCells(1, count=(4, 4), twins=1.0), 0, (153809484, 1089853467))])
def test_the_toy_worlds_are_frozen(world, i, expected):
    """All results were measured on these very images."""
    assert checksum(world[i]) == expected


def test_the_example_and_the_demo(tmp_path, capsys, monkeypatch):
    assert data.example()[1].segments.tolist() == [[0, 1], [0, 1], [2, 2]]
    monkeypatch.setattr("lab.street.StreetScenes.__init__.__defaults__", ((64, 128), 0))
    data.demo(quick=True, out=tmp_path)
    assert (tmp_path / "data.png").exists() and "colour baseline: PQ" in capsys.readouterr().out
