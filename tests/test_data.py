"""The spec of data.py, lab/readers.py and the toy street: crops against explicit loops, data sets
against tiny hand-written trees, a frozen street."""
import colorsys
import json
import math
import sys
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models.detection._utils import BoxCoder

import data
from claims import claim
from data import Category, DataError, Sample, crop, mask_boxes
from lab.readers import (Cityscapes, CocoPanoptic, read_image, write_annotation,
                         write_coco_panoptic)
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


# --- The street -------------------------------------------------------------------------------

def checksum(sample, start=0):
    labels = torch.cat([sample.segments.flatten(), sample.categories]).numpy().astype("<i8")
    image = (sample.image * 255).round().to(torch.uint8).numpy()
    return zlib.crc32(labels.tobytes()), zlib.crc32(image.tobytes(), start)


@pytest.mark.parametrize("index, expected", [
    (0, (1106531375, 4012616737)), (1, (122697881, 2198543228)), (7, (3613738867, 3204499114))])
def test_the_street_is_frozen(index, expected):
    """All results on the street were measured on these very scenes."""
    assert checksum(StreetScenes(10)[index]) == expected


def test_the_example_and_the_demo(tmp_path, capsys, monkeypatch):
    assert data.example()[1].segments.tolist() == [[0, 1], [0, 1], [2, 2]]
    monkeypatch.setattr("lab.street.StreetScenes.__init__.__defaults__", ((64, 128), 0))
    data.demo(quick=True, out=tmp_path)
    assert (tmp_path / "data.png").exists() and "colour baseline: PQ" in capsys.readouterr().out


# --- Cityscapes and IDD -----------------------------------------------------------------------

def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path)


def tree(root, ids, split="val", city="ulm", name="ulm_000000_000019", ending="gtFine_instanceIds"):
    ids = np.array(ids, np.uint16)
    pixels = np.random.default_rng(0).integers(0, 256, (*ids.shape, 3)).astype(np.uint8)
    save(root / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", pixels)
    save(root / f"gtFine/{split}/{city}/{name}_{ending}.png", ids)
    return root


def decoded(sample):
    """Each pixel's (category, crowd), None where void; segments are checked to be 1..N."""
    found = sorted(set(sample.segments.unique().tolist()) - {0})
    assert found == list(range(1, len(sample.categories) + 1))
    rows = [None, *zip(sample.categories.tolist(), sample.crowd.tolist())]
    return [[rows[k] for k in row] for row in sample.segments.tolist()]


IDS = [[7, 7, 7, 1, 26001, 26001], [7, 23, 0, 26, 26, 26000], [8, 23, 29000, 24, 33000, 4],
       [8, 7, 11, 31002, 25, 33]]
TRAIN_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]  # official


def test_cityscapes(tmp_path):
    """Stuff: one segment a category; things: one an instance; a thing's id below 1000: crowd; what
    is not evaluated: void. Labels are read without the image."""
    for city in ("ulm", "aachen"):
        tree(tmp_path, IDS, city=city, name=f"{city}_000000_000001")
    d = Cityscapes(tmp_path, "val")
    assert [s.name for s in d] == ["aachen_000000_000001", "ulm_000000_000001"]
    assert d.category_ids == TRAIN_IDS and [c.name for c in d.categories if c.isthing] == [
        "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    assert d.categories[0].name == "road"
    assert d.categories[6] == Category("traffic light", False, (250, 170, 30))
    s, number = d[0], {}
    for id, found, k in zip(sum(IDS, []), sum(decoded(s), []), s.segments.flatten().tolist()):
        official = id // 1000 if id >= 1000 else id
        evaluated = official in TRAIN_IDS
        assert found == ((TRAIN_IDS.index(official), id in (24, 25, 26, 33)) if evaluated else None)
        assert number.setdefault(id, k) == k
    for file in tmp_path.glob("leftImg8bit/*/*/*.png"):
        pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        assert torch.equal((read_image(file) * 255).round().byte(), pixels)
        file.write_bytes(b"")
    assert all(map(torch.equal, d.labels(0), (s.segments, s.categories, s.crowd)))


def test_idd_has_level_3_labels_and_a_test_split_none(tmp_path):
    """255 is void; images of two drives may have the same name."""
    for drive in ("201", "77"):
        tree(tmp_path, [[0, 1, 255, 4], [4000, 12003, 25, 9001]], city=drive, name="frame0029",
             ending="gtFine_instancelevel3Ids")
    d = Cityscapes(tmp_path, "val", table="idd")
    assert sum(c.isthing for c in d.categories) == 9 and d.category_ids == list(range(26))
    assert [s.name for s in d] == ["201_frame0029", "77_frame0029"]
    assert decoded(d[0]) == [[(0, False), (1, False), None, (4, True)],
                             [(4, False), (12, False), (25, False), (9, False)]]
    tree(tmp_path, IDS, split="test")
    next(tmp_path.glob("gtFine/test/*/*.png")).unlink()
    s = Cityscapes(tmp_path, "test")[0]
    assert s.segments.shape == (4, 6) and s.segments.dtype == torch.int64
    assert not s.segments.any() and len(s.categories) == len(s.crowd) == 0
    assert crop(s, 0, 0, (2, 2))[1].boxes.shape == (0, 4)


# --- COCO's format ----------------------------------------------------------------------------

CATEGORIES = [Category("grass", False, (1, 2, 3)), Category("cow", True, (4, 5, 6)),
              Category("sky", False, (7, 8, 9))]


def coco(root, split="val2017", **options):
    """A tiny data set, labels written by write_coco_panoptic -> the samples it was made of."""
    samples = []
    for i in range(2):
        s, categories = random_sample(i), torch.tensor([1, 0, 1, 2, 1])
        s = Sample(s.image, s.segments, categories, s.crowd & (categories == 1), "")
        _, t = crop(s, 0, 0, (13, 17))
        samples.append(Sample(None, t.segments, t.categories, t.crowd, f"{i:04d}"))
        save(root / split / f"{i:04d}.jpg", np.full((13, 17, 3), 40 * i, np.uint8))
    rows = ((s.name, s.segments, s.categories, s.crowd) for s in samples)
    write_coco_panoptic(root / "annotations" / f"panoptic_{split}", rows, CATEGORIES, **options)
    return samples


def test_coco_panoptic_round_trip(tmp_path):
    """Then an independent reader: id = R + 256 G + 256^2 B, areas and boxes by loops."""
    samples = coco(tmp_path, category_ids=[200, 7, 31], image_ids={"0000": 42})
    d = CocoPanoptic(tmp_path, "val2017")
    assert len(d) == 2 and d.categories == CATEGORIES and d.category_ids == [200, 7, 31]
    assert d.image_ids == {"0000": 42, "0001": "0001"}
    content = json.loads((tmp_path / "annotations/panoptic_val2017.json").read_text())
    assert content["images"][0] == {"id": 42, "file_name": "0000.png", "height": 13, "width": 17}
    assert content["categories"][1] == {"id": 7, "name": "cow", "isthing": 1, "color": [4, 5, 6]}
    for s, r, a in zip(samples, d, content["annotations"]):
        assert torch.equal(s.segments, r.segments) and torch.equal(s.categories, r.categories)
        assert torch.equal(s.crowd, r.crowd) and r.name == s.name and r.image.shape == (3, 13, 17)
        png = np.array(Image.open(tmp_path / "annotations/panoptic_val2017" / a["file_name"]))
        ids = (png.astype(int) @ [1, 256, 256 ** 2]).tolist()
        assert ids == s.segments.tolist() and len(a["segments_info"]) == len(s.categories)
        for k, info in enumerate(a["segments_info"], 1):
            x1, y1, x2, y2 = loop_box(ids, k)
            assert info == {"id": k, "category_id": [200, 7, 31][s.categories[k - 1]],
                            "area": sum(ids, []).count(k), "bbox": [x1, y1, x2 - x1, y2 - y1],
                            "iscrowd": int(s.crowd[k - 1])}
    assert abs(float(r.image.mean()) - 40 / 255) < .01


def test_ids_beyond_a_byte_survive_and_files_may_be_written_apart(tmp_path):
    """65800 segments need the green and the blue channel. A segment without pixels is not listed;
    numpy arrays are as good as tensors."""
    segments = torch.arange(1, 65801).view(200, 329)
    entry = write_annotation(tmp_path, "many", segments, [1] * 65800)
    rgb = np.array(Image.open(tmp_path / "many.png")).astype(int)
    assert np.array_equal(rgb @ [1, 256, 256 ** 2], segments.numpy())
    assert len(entry["segments_info"]) == 65800 and entry["image_id"] == "many"
    entry = write_annotation(tmp_path / "p", "x", np.array([[0, 3], [1, 1]]), [0, 2, 1, 1])
    assert [(i["id"], i["category_id"]) for i in entry["segments_info"]] == [(1, 0), (3, 1)]


@pytest.mark.parametrize("split, pngs, js, images", [
    ("val2017", "annotations/panoptic_val2017", "../panoptic_val2017.json", "val2017"),
    *(("validation", f"validation/{v}panoptic", f"panoptic_{year}.json", "validation/images")
      for v, year in (("v2.0/", 2020), ("v1.2/", 2018), ("", 2018)))])
def test_coco_and_vistas_layouts_are_read(tmp_path, split, pngs, js, images):
    """Two segments of one stuff category become one; crowd is kept; so are official numbers."""
    ids = np.array([[70000, 70000, 0], [513, 2, 2]])
    infos = [{"id": 70000, "category_id": 9, "iscrowd": 1}, {"id": 513, "category_id": 5},
             {"id": 2, "category_id": 5}]
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    save(tmp_path / pngs / "b.png", rgb)
    save(tmp_path / images / "b.jpg", np.zeros((2, 3, 3), np.uint8))
    (tmp_path / pngs / js).write_text(json.dumps({
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 3, "file_name": "b.png", "segments_info": infos}],
        "categories": [{"id": 9, "name": "cow", "isthing": 1},
                       {"id": 5, "name": "sky", "isthing": 0}]}))
    d = CocoPanoptic(tmp_path, split)
    assert d[0].segments.tolist() == [[1, 1, 0], [2, 2, 2]] and d[0].categories.tolist() == [0, 1]
    assert d[0].crowd.tolist() == [True, False] and d[0].name == "b" and len(d) == 1
    assert d.category_ids == [9, 5] and d.image_ids == {"b": 3}
    assert all(len(c.colour) == 3 and max(c.colour) < 256 for c in d.categories)


# --- Refusals: one sentence with the file and the remedy --------------------------------------

LABEL = "gtFine/val/ulm/ulm_000000_000019_gtFine_instanceIds.png"
JS, JPG = "annotations/panoptic_val2017.json", "val2017/0001.jpg"


def ids(value):
    return lambda path: save(path, np.full((4, 6), value, np.uint16))


def replace(old, new):
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new))


@pytest.mark.parametrize("file, damage, words", [
    (LABEL, lambda p: p.unlink(), [LABEL, "unpack gtFine"]),
    (LABEL, lambda p: save(p, np.array(IDS, np.uint16).T), [LABEL, "(6, 4)", "(4, 6)"]),
    (LABEL, ids(34), [" 34,"]), (LABEL, ids(34000), [" 34000,"]),
    (LABEL, lambda p: p.write_bytes(b""), [LABEL, "copy it again"]),
    (LABEL, lambda p: p.write_bytes(p.read_bytes()[:60]), [LABEL, "copy it again"]),
    (JPG, lambda p: p.unlink(), ["0001.jpg is missing"]),
    (JPG, lambda p: ids(1)(p.with_suffix(".png")) or p.with_suffix(".png").rename(p),
     ["I;16", "8 bits a channel"]),
    (JS, lambda p: p.unlink(), [JS, "unpack"]),
    (JS, lambda p: p.write_text("["), [JS, "no readable JSON"]),
    (JS, lambda p: p.write_text("[1]"), [JS, "no panoptic JSON"]),
    (JS, replace(b'"images"', b'"pictures"'), [JS, "images"]),
    (JS, replace(b'{"id": 1,', b'{"id": 9,'), ["0000.png", " 1:"]),
    (JS, replace(b'"category_id": 0', b'"category_id": 77'), [".png", " 77:"])])
def test_damage_is_named_in_one_sentence(tmp_path, file, damage, words):
    tree(tmp_path, IDS)
    coco(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(DataError) as error:
        list(Cityscapes(tmp_path, "val") if file == LABEL else CocoPanoptic(tmp_path, "val2017"))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    for dataset, split, words in ((Cityscapes, "train", "leftImg8bit/train"),
                                  (CocoPanoptic, "val2017", "val2017.json")):
        with pytest.raises(DataError, match=words):
            dataset(tmp_path, split)
    with pytest.raises(DataError, match="createLabels.py"):
        Cityscapes(tree(tmp_path, IDS), "val", table="idd")
