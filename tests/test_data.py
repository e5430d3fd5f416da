"""The spec of data.py: crops against explicit loops, data sets against tiny hand-written trees, and a frozen street."""
import colorsys
import json
import multiprocessing
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (CocoPanoptic, Cityscapes, ColourBaseline, DataError, Dice, Sample, StreetScenes, colour_jitter,
                  components, crop, draw, flip, mask_boxes, resize, write_annotation, write_coco_panoptic,
                  write_panoptic_json)


def random_sample(seed, h=13, w=17, n=5):
    """Blocky random segments: some are absent, some in pieces, some touch the border."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((h, w), int)
    for k in rng.permutation(n)[:n - 1] + 1:                            # one of them never occurs
        for _ in range(2):
            y, x = rng.integers(0, h), rng.integers(0, w)
            segments[y:y + rng.integers(1, 7), x:x + rng.integers(1, 7)] = k
    return Sample(torch.from_numpy(rng.random((3, h, w)).astype(np.float32)), torch.from_numpy(segments),
                  torch.from_numpy(rng.integers(0, 9, n)), torch.from_numpy(rng.random(n) < .3), f"s{seed}")


def loop_box(segments, k):
    """The definition: smallest half-open box around the pixels of k; zeros if there are none."""
    places = [(x, y) for y in range(len(segments)) for x in range(len(segments[0])) if segments[y][x] == k]
    if not places:
        return [0, 0, 0, 0]
    xs, ys = zip(*places)
    return [min(xs), min(ys), max(xs) + 1, max(ys) + 1]


# --- Samples and crops ---

@pytest.mark.parametrize("seed", range(4))
def test_boxes_are_the_smallest_around_each_segment(seed):
    s = random_sample(seed)
    assert mask_boxes(s.segments, 5).tolist() == [loop_box(s.segments.tolist(), k) for k in range(1, 6)]


@pytest.mark.parametrize("segments, count", [(torch.zeros(4, 5), 2), (torch.zeros(4, 5), 0), (torch.ones(1, 1), 1)])
def test_boxes_of_nothing_and_of_one_pixel(segments, count):
    boxes = mask_boxes(segments.long(), count)
    assert boxes.dtype == torch.float32 and boxes.shape == (count, 4)
    assert boxes.tolist() == ([[0, 0, 1, 1]] if segments.any() else [[0, 0, 0, 0]] * count)


WINDOWS = [(2, 3, 6, 7), (0, 0, 13, 17), (-3, -4, 8, 9), (9, 12, 8, 9), (-2, -2, 20, 30), (5, 5, 1, 1),
           (40, 3, 4, 4), (-9, 0, 9, 5), (3, 17, 5, 5), (-9, 2, 5, 5), (2, -9, 5, 5)]


@pytest.mark.parametrize("top, left, h, w", WINDOWS)
@pytest.mark.parametrize("seed", range(3))
def test_a_crop_is_what_loops_over_its_pixels_find(seed, top, left, h, w):
    """Image, segments, categories, crowd and all boxes, windows that reach outside the picture or miss it included."""
    s = random_sample(seed)
    H, W, old = 13, 17, s.segments.tolist()
    inside = [[0 <= top + y < H and 0 <= left + x < W for x in range(w)] for y in range(h)]
    window = [[old[top + y][left + x] if inside[y][x] else 0 for x in range(w)] for y in range(h)]
    shown = [k for k in range(1, 6) if any(k in row for row in window)]
    image, t = crop(s, top, left, (h, w))
    assert t.segments.tolist() == [[shown.index(k) + 1 if k else 0 for k in row] for row in window]
    assert t.categories.tolist() == [int(s.categories[k - 1]) for k in shown]
    assert t.crowd.tolist() == [bool(s.crowd[k - 1]) for k in shown]
    assert t.boxes.tolist() == [loop_box(window, k) for k in shown]
    full = [loop_box(old, k) for k in shown]
    assert t.full_boxes.tolist() == [[a - left, b - top, c - left, d - top] for a, b, c, d in full]
    for y in range(h):
        for x in range(w):
            expected = s.image[:, top + y, left + x] if inside[y][x] else torch.zeros(3)
            assert torch.equal(image[:, y, x], expected)
    assert t.boxes.shape == t.full_boxes.shape == t.truncated.shape == (len(shown), 4)


@pytest.mark.parametrize("top, left, h, w", WINDOWS)
@pytest.mark.parametrize("seed", range(3))
def test_truncated_means_pixels_beyond_that_edge(seed, top, left, h, w):
    s = random_sample(seed)
    _, t = crop(s, top, left, (h, w))
    new = 0
    for k in range(1, 6):
        ys, xs = np.nonzero(s.segments.numpy() == k)
        if not any(top <= y < top + h and left <= x < left + w for y, x in zip(ys, xs)):
            continue
        beyond = [any(x < left for x in xs), any(y < top for y in ys),
                  any(x >= left + w for x in xs), any(y >= top + h for y in ys)]
        assert t.truncated[new].tolist() == beyond
        new += 1


def test_an_object_that_ends_exactly_at_the_crops_edge_is_not_truncated():
    segments = torch.zeros(8, 8, dtype=torch.long)
    segments[2:6, 2:6] = 1
    s = Sample(torch.rand(3, 8, 8), segments, torch.tensor([0]), torch.tensor([False]), "")
    _, t = crop(s, 2, 2, (4, 4))
    assert t.boxes.tolist() == t.full_boxes.tolist() == [[0, 0, 4, 4]] and not t.truncated.any()
    assert crop(s, 3, 2, (3, 4))[1].truncated.tolist() == [[False, True, False, False]]


def test_the_crop_of_everything_is_the_full_target():
    s = random_sample(0)
    image, t = crop(s, 0, 0, (13, 17))
    assert torch.equal(image, s.image) and torch.equal(t.boxes, t.full_boxes) and not t.truncated.any()
    assert torch.equal(t.segments > 0, s.segments > 0)


def test_a_crop_remembers_why_and_whence():
    s = random_sample(1)
    shown = sorted(set(s.segments.unique().tolist()) - {0})
    for k in range(6):
        _, t = crop(s, 0, 0, (13, 17), image_id=7, instance=k, scale=.5)
        assert (t.image_id, t.scale) == (7, .5)
        assert t.instance == (shown.index(k) + 1 if k in shown else 0)
    assert crop(s, 0, 0, (13, 17))[1].instance == 0


def test_crops_copy_and_leave_the_sample_alone():
    s = random_sample(2)
    before = s.image.clone(), s.segments.clone()
    image, t = crop(s, 0, 0, (13, 17))
    image.zero_(), t.segments.zero_()
    assert torch.equal(s.image, before[0]) and torch.equal(s.segments, before[1])


def test_a_target_moves_as_a_whole():
    t = crop(random_sample(0), 0, 0, (9, 9), image_id=3, instance=1, scale=2.)[1].to("meta")
    assert all(v.device.type == "meta" for v in vars(t).values() if isinstance(v, torch.Tensor))
    assert (t.image_id, t.scale) == (3, 2.)


@pytest.mark.parametrize("seed", range(3))
def test_flipping_commutes_with_cropping(seed):
    """The crop of the mirrored picture is the mirrored crop: boxes, full boxes and truncated edges change sides."""
    s, (h, w), top, left = random_sample(seed), (6, 8), 3, 4
    image, t = crop(s, top, left, (h, w))
    mirrored, m = crop(flip(s), top, 17 - left - w, (h, w))
    assert torch.equal(mirrored, image.flip(-1)) and torch.equal(m.segments, t.segments.flip(-1))
    assert torch.equal(m.truncated, t.truncated[:, [2, 1, 0, 3]])
    for a, b in ((m.boxes, t.boxes), (m.full_boxes, t.full_boxes)):
        assert torch.equal(a, torch.stack([w - b[:, 2], b[:, 1], w - b[:, 0], b[:, 3]], 1))


def test_flipping_twice_changes_nothing():
    s = random_sample(3)
    assert torch.equal(flip(flip(s)).image, s.image) and not torch.equal(flip(s).segments, s.segments)
    assert flip(s).name == s.name and flip(s).categories is s.categories


@pytest.mark.parametrize("size", [(26, 34), (40, 51), (60, 200), (7, 130)])
@pytest.mark.parametrize("seed", range(4))
def test_resizing_keeps_boxes_within_a_pixel(seed, size):
    """Of the coarser raster, for every object that is at least as large as one of its pixels."""
    rng, segments = np.random.default_rng(seed), torch.zeros(40, 51, dtype=torch.long)
    for k, (y, x) in enumerate([(0, 0), (0, 26), (20, 0), (20, 26)], 1):
        h, w = rng.integers(6, 20), rng.integers(2, 25)
        y, x = y + rng.integers(0, 21 - h), x + rng.integers(0, 26 - w)
        segments[y:y + h, x:x + w] = k
    s = Sample(torch.rand(3, 40, 51), segments, torch.arange(4), torch.zeros(4).bool(), "s")
    r, scale = resize(s, size), torch.tensor([size[1] / 51, size[0] / 40] * 2)
    assert r.image.shape == (3, *size) and r.segments.shape == size and torch.equal(r.categories, s.categories)
    assert ((mask_boxes(segments, 4) * scale - mask_boxes(r.segments, 4)).abs() <= scale.clamp(min=1)).all()


def test_resized_segments_are_the_pixels_under_the_new_centres():
    s = random_sample(5)
    r = resize(s, (7, 30))
    for y in range(7):
        for x in range(30):
            assert r.segments[y, x] == s.segments[int((y + .5) * 13 / 7), int((x + .5) * 17 / 30)]


def test_resizing_is_smooth_in_colour_and_aligned_with_the_segments():
    """A shrunk checkerboard is grey (antialiasing); a ramp stays the same ramp of pixel centres."""
    board = torch.zeros(3, 16, 16)
    board[:, ::2, ::2] = board[:, 1::2, 1::2] = 1
    ramp = ((torch.arange(16) + .5) / 16).expand(3, 16, 16)
    s = Sample(board, torch.zeros(16, 16).long(), torch.zeros(0).long(), torch.zeros(0).bool(), "")
    assert (resize(s, (4, 4)).image - .5).abs().max() < .05
    s.image = ramp
    assert torch.allclose(resize(s, (8, 8)).image[0, 0, 1:-1], ((torch.arange(8) + .5) / 8)[1:-1], atol=1e-3)
    assert resize(s, (16, 16)).image.sub(ramp).abs().max() < 1e-6


def test_colour_jitter_follows_its_generator_and_formula():
    image = torch.rand(3, 5, 6)
    assert torch.allclose(colour_jitter(image, torch.Generator().manual_seed(0), 0.), image, atol=1e-6)
    for seed in range(5):
        b, c, s = [1 + .4 * (2 * u - 1) for u in torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()]
        out = colour_jitter(image, torch.Generator().manual_seed(seed), .4)
        bright = image * b
        for y, x in ((0, 0), (4, 5), (2, 3)):
            pixel = [float(bright.mean() + (bright[k, y, x] - bright.mean()) * c) for k in range(3)]
            grey = sum(pixel) / 3
            expected = [min(max(grey + (v - grey) * s, 0), 1) for v in pixel]
            assert out[:, y, x].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_turned_hue_is_that_of_colorsys_and_comes_last():
    """Relighting: hue, by up to `hue` of the colour circle; brightness, contrast and saturation are drawn before it, as without it."""
    image, turns = torch.rand(3, 4, 5), []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        plain, turned = colour_jitter(image, generator, .1), colour_jitter(image, torch.Generator().manual_seed(seed), .1, hue=.2)
        turn = .2 * (2 * torch.rand((), generator=generator).item() - 1)
        turns.append(turn)
        for y in range(4):
            for x in range(5):
                h, s, v = colorsys.rgb_to_hsv(*plain[:, y, x].tolist())
                assert turned[:, y, x].tolist() == pytest.approx(colorsys.hsv_to_rgb((h + turn) % 1, s, v), abs=1e-4)
    assert min(turns) < 0 < max(turns)


# --- The street ---

def checksum(sample):
    labels = torch.cat([sample.segments.flatten(), sample.categories])
    return zlib.crc32(labels.numpy().astype("<i8").tobytes())


@pytest.mark.parametrize("index, labels, pixels", [
    (0, 1106531375, 4012616737), (1, 122697881, 2198543228), (7, 3613738867, 3204499114)])
def test_the_street_is_frozen(index, labels, pixels):
    """Results in the README were measured on these very scenes: to change a bit of the street is to measure anew."""
    s = StreetScenes(10)[index]
    assert checksum(s) == labels
    assert zlib.crc32((s.image * 255).round().to(torch.uint8).numpy().tobytes()) == pixels


def test_so_are_many_small_scenes():
    """Twenty at a quarter of the size meet every kind of weather, house, vehicle, sign and person."""
    total = 0
    for s in StreetScenes(20, (64, 128), seed=1):
        total = zlib.crc32((s.image * 255).round().to(torch.uint8).numpy().tobytes(), total ^ checksum(s))
    assert total == 1445209719


def test_raw_dice_are_the_ones_numpy_promises():
    """The reference numbers of PCG64 through SeedSequence(0, 3), and their range."""
    raw = np.random.PCG64(np.random.SeedSequence((0, 3))).random_raw(3)
    d = Dice(0, 3)
    first, second = (int(r >> np.uint64(11)) / 2 ** 53 for r in raw[:2])
    assert [d(), d(2., 5.)] == [first, 2 + 3 * second]
    field = Dice(4).field(40, 50)
    assert field.shape == (40, 50) and field.dtype == np.float32 and 0 <= field.min() < .01 and .99 < field.max() < 1
    assert abs(field.mean() - .5) < .02 and {Dice(k).pick("abc") for k in range(20)} == set("abc")


def test_a_scene_depends_on_seed_and_index_alone():
    a, b = StreetScenes(9, (32, 64), seed=5), StreetScenes(4, (32, 64), seed=5)
    b[0], b[1]
    assert torch.equal(a[3].image, b[3].image) and torch.equal(a[3].segments, b[3].segments)
    assert not torch.equal(a[2].image, a[3].image)
    assert not torch.equal(StreetScenes(9, (32, 64), seed=6)[3].image, a[3].image)
    assert torch.equal(a[-1].image, a[8].image) and a[3].name != a[4].name


def _worker(i):
    return checksum(StreetScenes(5, (32, 64))[i])


def test_other_processes_see_the_same_scenes():
    with multiprocessing.get_context("fork").Pool(2, torch.set_num_threads, (1,)) as pool:
        assert pool.map(_worker, range(4)) == [_worker(i) for i in range(4)]


def test_iteration_stops_at_the_end():
    street = StreetScenes(3, (16, 32))
    assert len(list(street)) == len(street) == 3
    with pytest.raises(IndexError):
        street[3]


@pytest.mark.parametrize("index", range(3))
def test_twice_the_resolution_is_the_same_scene(index):
    """Almost all pixels have the category of the one under them in the larger picture, and colours agree on average."""
    small, large = (StreetScenes(3, size)[index] for size in ((128, 256), (256, 512)))
    kinds = [torch.cat([torch.tensor([-1]), s.categories])[s.segments] for s in (small, large)]
    assert (kinds[0] == kinds[1][::2, ::2]).float().mean() > .93
    means = [torch.nn.functional.adaptive_avg_pool2d(s.image, (4, 8)) for s in (small, large)]
    assert (means[0] - means[1]).abs().mean() < .015


def test_a_scene_is_a_valid_sample():
    for s in StreetScenes(4, (64, 128)):
        assert s.image.dtype == torch.float32 and s.image.shape == (3, 64, 128)
        assert 0 <= s.image.min() and s.image.max() <= 1
        assert torch.equal((s.image * 255).round() / 255, s.image), "whole grey levels, as if read from a file"
        assert s.segments.dtype == s.categories.dtype == torch.int64
        assert s.crowd.dtype == torch.bool and not s.crowd.any()
        count = torch.bincount(s.segments.flatten(), minlength=len(s.categories) + 1)
        things = s.categories >= data.CAR
        assert len(count) == len(s.categories) + 1 and (count[1:] >= 1).all()
        assert (count[1:][things] >= 20 * 64 * 128 / (256 * 512)).all(), "too small to label is void"
        assert len(set(s.categories[~things].tolist())) == int((~things).sum()), "one segment of each stuff category"


def test_labels_are_those_of_the_sample():
    street = StreetScenes(2, (32, 64))
    s = street[1]
    assert all(torch.equal(a, b) for a, b in zip(street.labels(1), (s.segments, s.categories, s.crowd)))


def test_objects_are_many_small_and_few_large():
    """What the demo's table says: a long tail of sizes, all categories often, crops that cut."""
    street = list(StreetScenes(25))
    areas = [torch.bincount(s.segments.flatten(), minlength=len(s.categories) + 1)[1:] for s in street]
    area = torch.cat([a[s.categories >= data.CAR] for a, s in zip(areas, street)]).float()
    assert 12 < len(area) / 25 < 25
    assert (area < 32 ** 2).float().mean() > .6 and area.max() > .25 * 256 * 512
    for kind, often in ((data.CAR, .9), (data.PERSON, .8), (data.SIGN, .9), (data.TRUCK, .5), (data.SIDEWALK, .95)):
        assert np.mean([kind in s.categories for s in street]) >= often
    targets = [crop(s, 64, 128, (128, 256))[1] for s in street]
    cut = torch.cat([t.truncated[t.categories >= data.CAR].any(1) for t in targets]).float().mean()
    assert .15 < cut < .5


def test_void_is_rare_but_real():
    void = [float((s.segments == 0).float().mean()) for s in StreetScenes(30, (64, 128))]
    assert min(void) < .005 and .02 < max(void) < .2


# --- Cityscapes and IDD ---

def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path)


def tree(root, ids, split="val", city="ulm", name="ulm_000000_000019", ending="gtFine_instanceIds", dtype=np.uint16):
    ids = np.array(ids)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*ids.shape, 3)).astype(np.uint8)
    save(root / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", pixels)
    save(root / f"gtFine/{split}/{city}/{name}_{ending}.png", ids.astype(dtype))
    return root


IDS = [[7, 7, 7, 1, 26001, 26001], [7, 23, 0, 26, 26, 26000], [8, 23, 29000, 24, 33000, 4], [8, 7, 11, 31002, 25, 33]]


def test_cityscapes_ids_become_segments(tmp_path):
    """Stuff: one segment a class; things: one an instance; a thing's id below 1000: crowd; all unevaluated: void."""
    s = Cityscapes(tree(tmp_path, IDS), "val")[0]
    order = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]       # the official train ids
    seen = {}
    for y, row in enumerate(IDS):
        for x, id in enumerate(row):
            k, kind = int(s.segments[y, x]), id // 1000 if id >= 1000 else id
            if kind not in order:
                assert k == 0
                continue
            assert seen.setdefault(id, k) == k > 0
            assert s.categories[k - 1] == order.index(kind) and s.crowd[k - 1] == (id in (24, 25, 26, 33))
    assert sorted(seen.values()) == list(range(1, len(s.categories) + 1)) and s.name == "ulm_000000_000019"
    assert s.segments.dtype == s.categories.dtype == torch.int64 and s.crowd.dtype == torch.bool
    with Image.open(next(tmp_path.glob("leftImg8bit/*/*/*.png"))) as image:
        assert torch.equal((s.image * 255).round().to(torch.uint8), torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_cityscapes_has_the_official_categories(tmp_path):
    d = Cityscapes(tree(tmp_path, IDS), "val")
    things = ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    assert [c.name for c in d.categories if c.isthing] == things and len(d.categories) == len(d.category_ids) == 19
    assert [c.name for c in d.categories[:3]] == ["road", "sidewalk", "building"]
    assert d.categories[6] == data.Category("traffic light", False, (250, 170, 30)) and d.category_ids[6] == 19


def test_cityscapes_lists_cities_in_order_and_reads_labels_alone(tmp_path):
    for city in ("ulm", "aachen"):
        tree(tmp_path, IDS, city=city, name=f"{city}_000000_000001")
    d = Cityscapes(tmp_path, "val")
    assert len(d) == 2 and [s.name for s in d] == ["aachen_000000_000001", "ulm_000000_000001"]
    for picture in tmp_path.glob("leftImg8bit/*/*/*.png"):
        picture.write_bytes(b"")
    segments, categories, crowd = d.labels(1)
    assert segments.shape == (4, 6) and len(categories) == len(crowd) == segments.max()
    with pytest.raises(IndexError):
        d[2]


def test_a_label_without_any_segment_is_fine(tmp_path):
    s = Cityscapes(tree(tmp_path, [[0, 3], [4, 6]]), "val")[0]
    assert not s.segments.any() and s.categories.shape == s.crowd.shape == (0,)
    assert crop(s, 0, 0, (2, 2))[1].boxes.shape == (0, 4)


def test_idd_has_level_3_labels(tmp_path):
    """17 stuff and 9 things; 255 is void; pictures of two drives may have the same name."""
    ids = [[0, 1, 255, 4], [4000, 12003, 25, 9000], [9001, 9, 22, 22]]
    for drive in ("201", "77"):
        tree(tmp_path, ids, city=drive, name="frame0029", ending="gtFine_instancelevel3Ids")
    d = Cityscapes(tmp_path, "val", table="idd")
    assert sum(c.isthing for c in d.categories) == 9 and len(d.categories) == 26 and d.category_ids == list(range(26))
    s = d[0]
    assert s.name == "201_frame0029" and d[1].name == "77_frame0029"
    kinds = [[0, 1, None, 4], [4, 12, 25, 9], [9, 9, 22, 22]]
    for y in range(3):
        for x in range(4):
            k = int(s.segments[y, x])
            assert (int(s.categories[k - 1]) if k else None) == kinds[y][x]
            assert k == 0 or bool(s.crowd[k - 1]) == (ids[y][x] in (4, 9))
    assert len(s.categories) == 10


def test_a_test_split_without_labels_is_all_void(tmp_path):
    tree(tmp_path, IDS, split="test")
    next(tmp_path.glob("gtFine/test/*/*.png")).unlink()
    d = Cityscapes(tmp_path, "test")
    for segments, categories, crowd in (d.labels(0), (d[0].segments, d[0].categories, d[0].crowd)):
        assert segments.shape == (4, 6) and segments.dtype == torch.int64 and not segments.any()
        assert len(categories) == len(crowd) == 0


# --- COCO's format ---

CATEGORIES = [data.Category("grass", False, (1, 2, 3)), data.Category("cow", True, (4, 5, 6)),
              data.Category("sky", False, (7, 8, 9))]


def coco(root, split="val2017", seed=0, count=2, **options):
    """A tiny data set, labels written by write_coco_panoptic; returns the samples it was made of."""
    samples = []
    for i in range(count):
        s = random_sample(seed + i)
        kinds = torch.tensor([1, 0, 1, 2, 1])
        s = crop(Sample(s.image, s.segments, kinds, s.crowd & (kinds == 1), ""), 0, 0, (13, 17))[1]
        samples.append(Sample(torch.zeros(3, 13, 17), s.segments, s.categories, s.crowd, f"{i:04d}"))
        save(root / split / f"{i:04d}.jpg", np.full((13, 17, 3), 40 * i, np.uint8))
    write_coco_panoptic(root / "annotations" / f"panoptic_{split}",
                        ((s.name, s.segments, s.categories, s.crowd) for s in samples), CATEGORIES, **options)
    return samples


def test_coco_panoptic_round_trip(tmp_path):
    samples = coco(tmp_path, category_ids=[200, 7, 31])
    d = CocoPanoptic(tmp_path, "val2017")
    assert len(d) == 2 and d.categories == CATEGORIES and d.category_ids == [200, 7, 31]
    for s, r in zip(samples, d):
        assert torch.equal(s.segments, r.segments) and torch.equal(s.categories, r.categories)
        assert torch.equal(s.crowd, r.crowd) and r.name == s.name and r.image.shape == (3, 13, 17)
    assert abs(float(d[1].image.mean()) - 40 / 255) < .01
    assert all(torch.equal(a, b) for a, b in zip(d.labels(1), (r.segments, r.categories, r.crowd)))
    with pytest.raises(IndexError):
        d[2]


def test_written_pngs_decode_as_the_format_says(tmp_path):
    """An independent reader: id = R + 256 G + 256^2 B, every id of the PNG in the JSON and the other way round."""
    samples = coco(tmp_path, category_ids=[200, 7, 31], image_ids={"0000": 42})
    content = json.loads((tmp_path / "annotations/panoptic_val2017.json").read_text())
    assert [i["id"] for i in content["images"]] == [a["image_id"] for a in content["annotations"]] == [42, "0001"]
    assert content["images"][0]["width"] == 17 and content["images"][0]["height"] == 13
    assert content["categories"][1] == {"id": 7, "name": "cow", "isthing": 1, "color": [4, 5, 6]}
    for s, a in zip(samples, content["annotations"]):
        rgb = np.array(Image.open(tmp_path / "annotations/panoptic_val2017" / a["file_name"])).astype(int)
        ids = rgb[..., 0] + 256 * rgb[..., 1] + 256 ** 2 * rgb[..., 2]
        assert set(np.unique(ids)) - {0} == {i["id"] for i in a["segments_info"]}
        for info in a["segments_info"]:
            mask = ids == info["id"]
            k = int(s.segments[torch.from_numpy(mask)][0])
            assert np.array_equal(mask, s.segments.numpy() == k) and info["area"] == mask.sum()
            x1, y1, x2, y2 = loop_box(mask.astype(int).tolist(), 1)
            assert info["bbox"] == [x1, y1, x2 - x1, y2 - y1]
            assert info["category_id"] == [200, 7, 31][s.categories[k - 1]] and info["iscrowd"] == int(s.crowd[k - 1])


def test_ids_beyond_a_byte_survive(tmp_path):
    """300 and 65800 segments need the green and the blue channel."""
    for n, shape in ((300, (15, 20)), (65800, (200, 329))):
        segments = torch.arange(1, n + 1).view(shape)
        entry = write_annotation(tmp_path, "many", segments, torch.ones(n).long())
        rgb = np.array(Image.open(tmp_path / "many.png")).astype(int)
        assert np.array_equal(rgb[..., 0] + 256 * rgb[..., 1] + 256 ** 2 * rgb[..., 2], segments.numpy())
        assert len(entry["segments_info"]) == n and entry["segments_info"][0]["iscrowd"] == 0
        assert entry["image_id"] == "many"


def test_pictures_may_be_written_apart_from_the_json(tmp_path):
    """As several processes do; a segment without pixels is not listed, numpy arrays are as good as tensors."""
    entries = [write_annotation(tmp_path / "a" / "p", n, np.array([[0, 3], [1, 1]]), [0, 2, 1, 1]) for n in ("x", "y")]
    write_panoptic_json(tmp_path / "a" / "p", entries, CATEGORIES)
    content = json.loads((tmp_path / "a" / "p.json").read_text())
    listed = [[(i["id"], i["category_id"]) for i in a["segments_info"]] for a in content["annotations"]]
    assert listed == [[(1, 0), (3, 1)]] * 2
    assert [c["id"] for c in content["categories"]] == [0, 1, 2]


def hand_made(root, split, js, pngs, pictures):
    """A data set nobody of ours wrote: ids as COCO's, colours none, annotations in another order than images."""
    ids = np.array([[70000, 70000, 0], [513, 2, 2]])
    infos = [{"id": 70000, "category_id": 9, "iscrowd": 1}, {"id": 513, "category_id": 5, "iscrowd": 0},
             {"id": 2, "category_id": 5}]
    save(pngs / "b.png", np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8))
    save(pictures / "b.jpg", np.zeros((2, 3, 3), np.uint8))
    js.parent.mkdir(parents=True, exist_ok=True)
    js.write_text(json.dumps({
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 3, "file_name": "b.png", "segments_info": infos}],
        "categories": [{"id": 9, "name": "cow", "isthing": 1}, {"id": 5, "name": "sky", "isthing": 0}]}))
    return CocoPanoptic(root, split)


def layouts(root):
    yield "val2017", root / "annotations/panoptic_val2017.json", root / "annotations/panoptic_val2017", root / "val2017"
    for version, year in (("v2.0/", 2020), ("v1.2/", 2018), ("", 2018)):
        folder = root / "validation" / f"{version}panoptic"
        yield "validation", folder / f"panoptic_{year}.json", folder, root / "validation/images"


@pytest.mark.parametrize("layout", range(4), ids=["coco", "vistas 2.0", "vistas 1.2", "vistas 1"])
def test_coco_and_vistas_layouts_are_read(tmp_path, layout):
    """Two segments of one stuff category become one; crowd is kept; official numbers are remembered."""
    d = hand_made(tmp_path, *list(layouts(tmp_path))[layout])
    s = d[0]
    assert s.segments.tolist() == [[1, 1, 0], [2, 2, 2]]
    assert s.categories.tolist() == [0, 1] and s.crowd.tolist() == [True, False]
    assert d.category_ids == [9, 5] and d.image_ids == {"b": 3} and len(d) == 1 and s.name == "b"
    assert [c.isthing for c in d.categories] == [True, False]
    assert all(len(c.colour) == 3 and max(c.colour) < 256 for c in d.categories)


def test_a_coco_test_split_has_pictures_and_the_categories_of_its_siblings(tmp_path):
    coco(tmp_path)
    for name in ("b.jpg", "a.png"):
        save(tmp_path / "test2017" / name, np.zeros((4, 5, 3), np.uint8))
    (tmp_path / "test2017" / "notes.txt").write_text("")
    d = CocoPanoptic(tmp_path, "test2017")
    assert [s.name for s in d] == ["a", "b"] and d.categories == CATEGORIES
    assert d[0].segments.shape == (4, 5) and not d[0].segments.any() and len(d[0].categories) == 0
    save(tmp_path / "alone" / "testing" / "c.jpg", np.zeros((4, 5, 3), np.uint8))
    assert CocoPanoptic(tmp_path / "alone", "testing").categories == []


# --- Errors: one sentence with the file and the remedy ---

def complaint(action):
    with pytest.raises(DataError) as error:
        action()
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_root_is_named(tmp_path):
    assert str(tmp_path / "no") in complaint(lambda: Cityscapes(tmp_path / "no", "train"))
    text = complaint(lambda: CocoPanoptic(tmp_path / "no", "val2017"))
    assert str(tmp_path / "no" / "val2017") in text and "root" in text


def test_pictures_without_labels_are_named(tmp_path):
    tree(tmp_path, IDS)
    label = next(tmp_path.glob("gtFine/val/*/*.png"))
    label.unlink()
    text = complaint(lambda: Cityscapes(tmp_path, "val"))
    assert str(label) in text and "unpack gtFine" in text and "createLabels" not in text
    assert "createLabels.py" in complaint(lambda: Cityscapes(tmp_path, "val", table="idd"))
    save(tmp_path / "val2017" / "a.jpg", np.zeros((4, 5, 3), np.uint8))
    text = complaint(lambda: CocoPanoptic(tmp_path, "val2017"))
    assert "panoptic_val2017.json" in text and "unpack" in text


def test_a_label_of_another_size_is_named(tmp_path):
    tree(tmp_path, IDS)
    label = next(tmp_path.glob("gtFine/val/*/*.png"))
    save(label, np.array(IDS, np.uint16).T)
    text = complaint(lambda: Cityscapes(tmp_path, "val")[0])
    assert str(label) in text and "(6, 4)" in text and "(4, 6)" in text


@pytest.mark.parametrize("id", [34, 999, 34000, 35001, 65535])
def test_an_unknown_cityscapes_id_is_named(tmp_path, id):
    tree(tmp_path, [[7, id], [26000, 0]])
    text = complaint(lambda: Cityscapes(tmp_path, "val")[0])
    assert f" {id}," in text and "instanceIds.png" in text


def test_a_disagreement_of_png_and_json_is_named(tmp_path):
    coco(tmp_path)
    path = tmp_path / "annotations/panoptic_val2017.json"
    content = json.loads(path.read_text())
    gone = content["annotations"][0]["segments_info"].pop()
    content["annotations"][1]["segments_info"][0]["category_id"] = 77
    path.write_text(json.dumps(content))
    d = CocoPanoptic(tmp_path, "val2017")
    text = complaint(lambda: d[0])
    assert "0000.png" in text and f" {gone['id']}:" in text
    assert " 77:" in complaint(lambda: d[1])


@pytest.mark.parametrize("rubbish", [b"", b"not a picture", None], ids=["empty", "text", "cut off"])
@pytest.mark.parametrize("which", ["gtFine", "leftImg8bit"])
def test_a_corrupt_picture_is_named(tmp_path, rubbish, which):
    tree(tmp_path, np.random.default_rng(0).integers(24000, 24900, (40, 50)))
    path = next(tmp_path.glob(f"{which}/val/*/*.png"))
    path.write_bytes(path.read_bytes()[:300] if rubbish is None else rubbish)
    text = complaint(lambda: Cityscapes(tmp_path, "val")[0])
    assert str(path) in text and "copy it again" in text


def test_a_vanished_picture_and_a_broken_json_are_named(tmp_path):
    coco(tmp_path)
    d = CocoPanoptic(tmp_path, "val2017")
    (tmp_path / "val2017/0001.jpg").unlink()
    assert str(tmp_path / "val2017/0001.jpg") in complaint(lambda: d[1])
    path = tmp_path / "annotations/panoptic_val2017.json"
    path.write_text(path.read_text()[:100])
    assert str(path) in complaint(lambda: CocoPanoptic(tmp_path, "val2017"))


# --- Drawing and the baseline ---

def test_draw_colours_categories_and_tells_instances_apart():
    segments = torch.zeros(30, 60, dtype=torch.long)
    segments[:, :20], segments[:, 20:40] = 1, 2
    out = draw(torch.zeros(3, 30, 60), segments, torch.tensor([1, 1]), CATEGORIES)
    assert out.dtype == np.uint8 and out.shape == (30, 60, 3)
    a, b, void = out[15, 10].tolist(), out[15, 30].tolist(), out[15, 50].tolist()
    assert a != b and void == [0, 0, 0] and out[15, 19].tolist() == out[15, 39].tolist() == [255, 255, 255]
    stuff = draw(torch.zeros(3, 30, 60), segments, [0, 2], CATEGORIES)
    assert stuff[15, 10].tolist() == pytest.approx([.7 * v for v in (1, 2, 3)], abs=1)


def test_draw_names_the_large_segments():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    segments = torch.zeros(50, 50, dtype=torch.long)
    segments[5:25, 10:20], segments[40, 40] = 1, 2
    ax = Figure().add_subplot()
    draw(torch.zeros(3, 50, 50), segments, [1, 1], CATEGORIES, ax)
    assert [t.get_text() for t in ax.texts] == ["cow"]
    x, y = ax.texts[0].get_position()
    assert 13 <= x <= 16 and 13 <= y <= 16 and len(ax.images) == 1
    ax = Figure().add_subplot()
    draw(torch.zeros(3, 50, 50), segments, [1, 1], CATEGORIES, ax, names=False)
    assert not ax.texts


@pytest.mark.parametrize("seed", range(4))
def test_components_are_what_a_flood_fill_finds(seed):
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 2 + seed, (11, 14)))
    found = components(labels)
    expected = torch.full((11, 14), -1)
    for start in range(11 * 14):
        if expected.flatten()[start] >= 0:
            continue
        stack = [divmod(start, 14)]
        while stack:
            y, x = stack.pop()
            if expected[y, x] >= 0:
                continue
            expected[y, x] = start
            stack += [(v, u) for v, u in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1))
                      if 0 <= v < 11 and 0 <= u < 14 and labels[v, u] == labels[y, x]]
    assert torch.equal(found, expected)


def test_a_long_snake_is_one_component():
    """The worst case of joining by neighbours: a path that winds through the whole picture."""
    labels = torch.zeros(21, 21, dtype=torch.long)
    labels[::2] = 1
    labels[1::4, -1] = labels[3::4, 0] = 1
    assert len(components(labels)[labels == 1].unique()) == 1


def test_the_baseline_finds_what_colour_tells_and_no_more():
    """Two red squares on green: both are found, each an instance; a dot of 19 pixels is void; equal colours merge."""
    image = torch.zeros(3, 40, 60)
    image[1] = .8
    segments = torch.ones(40, 60, dtype=torch.long)
    for k, (x, w, h) in enumerate([(5, 10, 10), (30, 10, 10), (50, 1, 19)], 2):
        image[:, 5:5 + h, x:x + w] = torch.tensor([.9, 0, 0])[:, None, None]
        segments[5:5 + h, x:x + w] = k
    sample = Sample(image, segments, torch.tensor([0, 1, 1, 1]), torch.zeros(4).bool(), "")

    class One(list):
        categories = CATEGORIES
    found, kinds = ColourBaseline(One([sample]), clusters=8).predict(image)
    assert sorted(kinds.tolist()) == [0, 1, 1]
    for k in (1, 2, 3):
        (j,) = found[segments == k].unique().tolist()
        assert kinds[j - 1] == sample.categories[k - 1] and ((found == j) == (segments == k)).all()
    assert not found[segments == 4].any()


def test_the_baseline_learns_from_n_pictures_and_ignores_void():
    street = StreetScenes(3, (32, 64))
    base = ColourBaseline(street, n=2, clusters=5)
    segments, categories = base.predict(street[0].image)
    assert base.centres.shape == (5, 3) and segments.shape == (32, 64) and len(categories) == segments.max()
    segments = torch.cat([torch.zeros(7, 8), torch.ones(1, 8)]).long()
    void = Sample(torch.rand(3, 8, 8), segments, torch.tensor([2]), torch.tensor([False]), "")

    class One(list):
        categories = CATEGORIES
    assert (ColourBaseline(One([void]), clusters=3).kinds == 2).all()


def test_the_baseline_places_its_clusters_where_the_colours_are():
    """Sixteen k-means centres lie nearer to the pixels of a scene than sixteen of its own pixels drawn at random."""
    sample = StreetScenes(1, (64, 128))[0]

    class One(list):
        categories = data.STREET
    pixels, g = sample.image.flatten(1).T, torch.Generator().manual_seed(1)
    drawn = [pixels[torch.randperm(len(pixels), generator=g)[:16]] for _ in range(20)]
    error = [float(torch.cdist(pixels, c).amin(1).square().mean())
             for c in [ColourBaseline(One([sample]), clusters=16).centres, *drawn]]
    assert error[0] < .8 * min(error[1:])
