"""The spec of isus.py, lab/index.py and lab/demo_isus.py: section 2.1 of "Improving Panoptic
Segmentation at All Scales". Oracles: the formula, loops over pixels, F.interpolate, counting."""
import math
import os
from collections import Counter
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import data
import isus
from claims import claim
from isus import CropSampler, build_index, class_uniform_choice, scale_for_level
from lab import demo_isus, index, octaves

torch.set_num_threads(1)
SKY, CAR, SIGN, ROAD, NEVER, GROUP, TRUCK = range(7)
NAMES = ("sky", "car", "sign", "road", "never", "group", "truck")
CATEGORIES = [data.Category(name, name not in ("sky", "road"), (0, 0, 0)) for name in NAMES]
WHERE = {SKY: {0}, CAR: {0}, SIGN: {0, 1}, ROAD: {0, 1}, TRUCK: {3}}    # in which images of `town`
WIDE = dict(scale_things=(1e-3, 1e3), canonical=32)                      # no sigma is clamped
NATIVE = dict(scale=(1, 1), scale_things=(1, 1))


# --- Material for the tests -------------------------------------------------------------------
class Images(list):
    """Samples as a data set that remembers which labels were read."""
    def __init__(self, samples):
        super().__init__(samples)
        self.categories, self.read = CATEGORIES, []

    def labels(self, i):
        self.read.append(i)
        return self[i].segments, self[i].categories, self[i].crowd


def sample(h, w, *blocks):
    """A noisy image, nowhere black, of rectangles (category, y1, x1, y2, x2) or (..., True) for
    crowds; later ones hide earlier ones. Its first channel numbers the pixels, in thousandths."""
    segments = torch.zeros(h, w, dtype=torch.long)
    for k, (_, y1, x1, y2, x2, *_) in enumerate(blocks, 1):
        segments[y1:y2, x1:x2] = k
    image = 0.1 + 0.9 * torch.rand(3, h, w, generator=torch.Generator().manual_seed(h))
    image[0] = ((torch.arange(h * w) + 1.0) / 1000).view(h, w)
    categories = torch.tensor([b[0] for b in blocks], dtype=torch.long)
    crowd = torch.tensor([len(b) > 5 for b in blocks], dtype=torch.bool)
    return data.Sample(image, segments, categories, crowd, "")


def town():
    """Cars wide and tall, signs of one pixel in a corner and of four at a border, a truck that
    hides the sky, crowds, an image of nothing, a category of crowds only."""
    return Images([
        sample(24, 32, (SKY, 0, 0, 24, 32), (ROAD, 12, 0, 24, 32), (CAR, 13, 4, 19, 16),
               (CAR, 9, 20, 21, 26), (SIGN, 0, 31, 1, 32), (CAR, 20, 0, 24, 3, True)),
        sample(30, 20, (ROAD, 0, 0, 30, 20), (GROUP, 4, 4, 12, 12, True),
               (CAR, 15, 3, 22, 18, True), (SIGN, 28, 0, 30, 2)),
        sample(12, 40), sample(16, 18, (SKY, 0, 0, 16, 18), (TRUCK, 0, 0, 16, 18))])


def loop_rows(dataset):
    """(image, segment, category, crowd, box) of every segment with a pixel, by loops."""
    rows = []
    for i, s in enumerate(dataset):
        for k, (c, crowd) in enumerate(zip(s.categories.tolist(), s.crowd.tolist()), 1):
            ys, xs = (v.tolist() for v in torch.where(s.segments == k))
            if ys:
                rows.append((i, k, c, crowd, [min(xs), min(ys), max(xs) + 1, max(ys) + 1]))
    return rows


def index_rows(table):
    columns = (table.image, table.segment, table.category, table.crowd, table.box)
    return list(zip(*(column.tolist() for column in columns)))


def sampler(dataset=None, **how):
    dataset = dataset or town()
    how = {"size": (9, 11), "mode": "isus", **how}
    table = build_index(dataset) if how["mode"] in ("isus", "cus") else None
    return CropSampler(dataset, how.pop("table", table), **how)


def crops(n, dataset=None, **how):
    s = sampler(dataset, **how)
    return [s.crop(k) for k in range(n)]


def targets(n, dataset=None, **how):
    return [t for _, t in crops(n, dataset, **how)]


def chosen(t):
    """The category of the segment for which the crop was taken."""
    return int(t.categories[t.instance - 1])


def uniform(values, ways):
    """Do `ways` outcomes occur among the values, each equally often within five deviations?"""
    counts, mean = Counter(values), len(values) / ways
    off = 5 * math.sqrt(mean * (1 - 1 / ways))
    return len(counts) == ways and all(abs(c - mean) <= off for c in counts.values())


def same(a, b):
    """Are two crops, or two batches, equal? The images to the last bit."""
    return torch.equal(a[0], b[0]) and repr(a[1]) == repr(b[1])


# --- The crops of a seed ----------------------------------------------------------------------
GOLDEN = {  # image, instance, sigma, sums of x1 and of y1 of the full boxes of crops 0, 1 and 3
    "isus": [(0, 2, 1.102, -1, 7), (0, 3, 3.0, -131, -22), (0, 3, 1.824, -65, 1)],
    "cus": [(0, 2, 1.102, -1, 7), (0, 2, 1.551, 2, 4), (0, 3, 1.505, -7, -16)],
    "uniform": [(0, 0, 1.938, -18, -12), (2, 0, 1.343, 0, 0), (3, 0, 0.621, 0, 0)],
    "full": [(0, 0, 1.938, 83, 87), (2, 0, 1.343, 0, 0), (3, 0, 0.621, 0, 0)]}


def test_the_crops_of_a_seed_stay_what_they_are():
    """A checkpoint of any age is resumed with the crops that it would have had. An index of the
    data set changes none."""
    how = dict(seed=4, short_side=20, scale_things=(0.4, 3), canonical=32)
    for mode, expected in GOLDEN.items():
        for table in ({}, {"table": build_index(town())}):
            s = sampler(mode=mode, **table, **how)
            found = [s.crop(k)[1] for k in (0, 1, 3)]
            assert [(t.image_id, t.instance, round(t.scale, 3), *t.full_boxes.sum(0).tolist()[:2])
                    for t in found] == expected


# --- Step 3: the scale that brings an instance to a level -------------------------------------
def random_boxes(n, seed):
    """Sides from a quarter of a pixel to a thousand, and thin boxes."""
    g = torch.Generator().manual_seed(seed)
    sides = 2 ** (12 * torch.rand(n, 2, generator=g) - 2)
    thin = [[0, 0, 0.01, 5], [0, 0, 5, 0.01], [0, 0, 0.02, 0.02]]
    return torch.cat([7 * sides, 8 * sides], 1).tolist() + thin


def level_of(size, levels=4, canonical=224, k0=3):
    """The rule, for one size: floor(k0 + log2(size / canonical)), within 1 to `levels`."""
    return min(max(math.floor(k0 + math.log2(size / canonical)), 1), levels)


@claim("porzi2021", "2.1", "the selected instance will be assigned to the selected level",
       of="scale_for_level")
@pytest.mark.parametrize("levels, canonical, k0",
                         [(4, 224, 3), (5, 224, 4), (6, 30, 1), (2, 0.3, 2), (1, 64, 1)])
def test_the_resized_instance_is_assigned_to_the_level(levels, canonical, k0):
    """Its size is in the level's octave. Below the first and beyond the last, sigma is on the same
    side of 1: smaller things do not shrink for the first level, larger ones not grow for the last.
    """
    g, rule = torch.Generator().manual_seed(0), dict(levels=levels, canonical=canonical, k0=k0)
    for (x1, y1, x2, y2), level in product(random_boxes(25, 2), range(1, levels + 1)):
        sigma = scale_for_level((x1, y1, x2, y2), level, (1e-9, 1e9), generator=g, **rule)
        size = sigma * math.sqrt((x2 - x1) * (y2 - y1))
        octave = math.floor(k0 + math.log2(size / canonical))
        assert isinstance(sigma, float) and level_of(size, **rule) == level
        assert octave == level or octave < level == 1 <= sigma or octave > level == levels >= sigma
        assert level == isus.pyramid_level(sigma * torch.tensor([[x1, y1, x2, y2]]), **rule)


@claim("porzi2021", "2.1", "we clamp sigma to a limited range r_th", of="scale_for_level")
@pytest.mark.parametrize("level", range(1, 5))
def test_sigma_is_clamped_to_r_th(level):
    """It reaches the level if any sigma of a grid over r_th does, else it is the limit that comes
    nearest. A box of no size gets the upper one, unless for level 1."""
    seen, grid = Counter(), [0.4 * (3.0 / 0.4) ** (k / 400) for k in range(401)]
    for seed, box in enumerate(random_boxes(60, 3)):
        size = 8 * math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        sigma = scale_for_level([8 * v for v in box], level, (0.4, 3.0),
                                generator=torch.Generator().manual_seed(seed))
        levels = [level_of(s * size) for s in grid[2:-2]]      # not by rounding alone
        assert 0.4 <= sigma <= 3.0
        assert level not in levels or level_of(sigma * size) == level
        outside = level not in (level_of(s * size) for s in grid)
        assert not outside or sigma == (0.4 if levels[0] > level else 3.0)
        seen[sigma if outside else "free"] += 1
    assert len(seen) == (3 if 1 < level < 4 else 2)
    assert level == 1 or scale_for_level([0] * 4, level, (0.4, 3.0), torch.Generator()) == 3.0
    assert isus.example()[1] == 4
    for wrong in (0, level + 1):
        with pytest.raises(ValueError, match=f"level {wrong} does not exist.* 1 to {level}"):
            scale_for_level((0, 0, 9, 9), wrong, (0.5, 2), torch.Generator(), levels=level)


def test_all_sigmas_that_reach_the_level_are_drawn_log_uniformly():
    """A thing of 80 pixels, level 2 serves 112 to 224 and r_th ends at 2: sigma in 1.4 to 2. For
    level 1, below 112, sigma lies in 0.7 to 1.4, and r_th begins at 0.9."""
    g = torch.Generator().manual_seed(0)
    for level, r_th, low, high in ((2, (0.5, 2.0), 1.4, 2.0), (1, (0.9, 2.0), 0.9, 1.4)):
        found = [scale_for_level((0, 0, 80, 80), level, r_th, generator=g) for _ in range(2000)]
        assert low <= min(found) < 1.01 * low and 0.99 * high < max(found) <= high
        assert uniform([int(4 * math.log(s / low) / math.log(high / low)) for s in found], 4)


# --- The index, steps 1 and 2 -----------------------------------------------------------------
def test_the_index_says_what_loops_find():
    """Crowds have rows, but belong to no category. Each label is read once."""
    dataset = town()
    table, rows = build_index(dataset), loop_rows(dataset)
    assert index_rows(table) == rows and dataset.read == list(range(len(dataset)))
    assert table.image_count == len(dataset)
    assert table.categories == sorted({c for _, _, c, crowd, _ in rows if not crowd})
    for c in range(9):
        single = {i: [r for r, row in enumerate(rows) if (row[0], *row[2:4]) == (i, c, False)]
                  for i in range(len(dataset))}
        assert all(table.rows(i, c).tolist() == single[i] for i in single)
        assert table.images_with(c).tolist() == [i for i in single if single[i]]
    for i, s in enumerate(dataset):
        assert table.rows(i).tolist() == [r for r, row in enumerate(rows) if row[0] == i]
        expected = data.mask_boxes(s.segments, len(s.categories))
        assert torch.equal(table.boxes(i, len(s.categories)), expected)


def test_an_index_of_nothing_is_refused():
    """No image, only void, only crowds."""
    for samples in ([], [sample(5, 6)], [sample(5, 6, (CAR, 1, 1, 3, 3, True))]):
        with pytest.raises(ValueError, match=f"none of the {len(samples)} labels has a segment"):
            build_index(Images(samples))


@claim("porzi2021", "2.1", "1) sample a semantic class with uniform probability; 2) load an image "
       "that contains that class", of="class_uniform_choice")
def test_categories_are_uniform_and_then_images_that_contain_them():
    table, g = build_index(town()), torch.Generator().manual_seed(0)
    draws = [class_uniform_choice(table, g) for _ in range(3000)]
    assert uniform([c for c, _ in draws], len(WHERE))          # not that of crowds only
    for category, images in WHERE.items():
        found = [i for c, i in draws if c == category]
        assert set(found) == images and uniform(found, len(images))


# --- Steps 2 to 4 in the sampler --------------------------------------------------------------
@claim("porzi2021", "2.1", "we also sample a random instance of that class from the image and a "
       "random feature pyramid level", of="CropSampler")
@pytest.mark.parametrize("short_side, levels", [(0, 3), (40, 4)])
def test_the_levels_of_chosen_instances_are_uniform(short_side, levels):
    """As long as no sigma is clamped: of tiny ones, large ones, ones at the border. The crop shows
    them if it is placed at the instance."""
    found = targets(300, short_side=short_side, levels=levels, place="instance", **WIDE)
    boxes = [t.full_boxes[t.instance - 1].tolist() for t in found if CATEGORIES[chosen(t)].isthing]
    assert uniform(isus.pyramid_level(torch.tensor(boxes), levels, canonical=32).tolist(), levels)


@claim("porzi2021", "2.1", "produce a random crop from an area of the image where the selected "
       "class is visible", of="CropSampler")
@pytest.mark.parametrize("mode", ["isus", "cus"])
@pytest.mark.parametrize("size", [(9, 11), (1, 1), (4, 40), (64, 64)])
def test_the_crop_shows_the_chosen_segment(mode, size):
    """Stuff or a thing, no crowd, small or large; categories are uniform."""
    found = targets(90, mode=mode, size=size, scale=(1, 3), scale_things=(0.7, 30), canonical=32)
    for t in found:
        assert t.instance > 0 and (t.segments == t.instance).any() and t.segments.shape == size
        assert t.image_id in WHERE[chosen(t)] and not t.crowd[t.instance - 1]
    assert uniform([chosen(t) for t in found], len(WHERE))


@claim("porzi2021", "2.1", "the same steps as in CUS, except that the scale augmentation procedure "
       "is made instance-aware", of="CropSampler")
def test_isus_places_a_crop_at_the_category_or_at_its_instance():
    """Two cars of 16 and 64 pixels: places are uniform in pixels, or in instances."""
    cars = Images([sample(20, 20, (CAR, 1, 1, 5, 5), (CAR, 9, 9, 17, 17))])
    for how, share in ((dict(mode="cus"), 0.8), ({}, 0.8), (dict(place="instance"), 0.5)):
        found = targets(300, cars, size=(2, 2), canonical=32, **NATIVE, **how)
        assert sum(t.instance == len(t.categories) and (t.full_boxes[-1, 2:] - t.full_boxes[-1, :2])
                   .eq(8).all().item() for t in found) == pytest.approx(300 * share, abs=40)


@claim("porzi2021", "2.1", "when a stuff class is selected: uniformly sample sigma from a range "
       "r_st", of="CropSampler")
@pytest.mark.parametrize("mode", isus.MODES)
def test_the_ranges_of_things_and_of_stuff_are_two(mode):
    """In other modes than isus the range of things does not matter."""
    found = targets(200, mode=mode, scale_things=(1.1, 1.6), scale=(2, 4), canonical=32)
    clamped = [t.scale for t in found if mode == "isus" and CATEGORIES[chosen(t)].isthing]
    free = [t.scale for t in found if mode != "isus" or not CATEGORIES[chosen(t)].isthing]
    assert mode != "isus" or {1.1, 1.6} < set(clamped) and all(1.1 <= v <= 1.6 for v in clamped)
    assert all(2 <= v < 4 for v in free) and uniform([int(2 * v) for v in free], 4)
    if mode in ("uniform", "full"):
        assert uniform([t.image_id for t in found], 4) and not any(t.instance for t in found)


@claim("porzi2021", "2.1", "re-scale it such that its shortest side matches a predefined size s0",
       of="CropSampler")
@pytest.mark.parametrize("short_side, flip", [(0, 0.0), (15, 1.0), (50, 0.0)])
def test_whole_images_are_the_resized_samples(short_side, flip):
    """By s0 and sigma, mirrored or not, as F.interpolate and the boxes of the resized label say."""
    dataset = town()
    for image, t in crops(20, dataset, mode="full", short_side=short_side, scale=(1, 3), flip=flip):
        s = dataset[t.image_id]
        factor = t.scale * (short_side / min(s.segments.shape) if short_side else 1)
        size = tuple(round(n * factor) for n in s.segments.shape)
        expected = F.interpolate(s.image[None], size, mode="bilinear", antialias=True)[0]
        label = F.interpolate(s.segments[None, None].double(), size, mode="nearest-exact")[0, 0]
        expected, label = (v.flip(-1) if flip else v for v in (expected, label))
        torch.testing.assert_close(image, expected, atol=1e-5, rtol=0)
        assert torch.equal(t.segments > 0, label > 0) and not t.truncated.any()
    assert all(i.shape == (3, 1, 1) for i, _ in crops(3, mode="full", scale=(0.001, 0.01)))


@claim("porzi2021", "2.1", "ISUS will have the effect of smoothing out the object scale "
       "distribution", of="CropSampler", figure="isus.png")
def test_isus_smooths_the_scales_of_lone_things():
    """Where images show one thing each and r_th reaches every level: 2 bits are equal shares. On
    streets with eight things a crop the demo finds no such effect."""
    things = [sample(40, 40, (CAR, 9, 9, 9 + n, 9 + n)) for n in [4] * 12 + [9] * 12 + [18]]
    bits = {}
    for name, mode, limits in (("native", "uniform", (1, 1)), ("cus", "cus", (0.25, 20)),
                               ("isus", "isus", (0.25, 20))):
        found = targets(200, Images(things), mode=mode, scale=limits, scale_things=limits,
                        canonical=16, size=(40, 40))
        boxes = torch.cat([t.full_boxes for t in found])
        bits[name] = demo_isus.entropy(isus.pyramid_level(boxes, canonical=16).bincount())
    assert bits["native"] < 1.3 and bits["cus"] < 1.3 and bits["isus"] > 1.95, bits


# --- Batches ----------------------------------------------------------------------------------
def test_processes_and_workers_share_the_crops_of_a_batch():
    """Process 1 of 2 has every second crop; two loading processes deliver batches in order."""
    one, half = sampler(batch=6, start=3), sampler(batch=3, start=3, rank=1, world=2)
    for b, found in zip((3, 4, 5), DataLoader(half, batch_size=None, num_workers=2)):
        expected = data.collate([one.crop(6 * b + k) for k in (1, 3, 5)])
        assert same(tuple(found), expected) and same(half.batch(b), expected)


@pytest.mark.parametrize("wrong, sentence", [
    (dict(mode="paired"), "mode = paired must be one of isus, cus, uniform, full"),
    (dict(size=(0, 9)), "size = .* at least one pixel"), (dict(size=(9,)), "size = .* a width"),
    (dict(scale=(2, 0.5)), "scale = .* positive"), (dict(scale=(0, 1)), "scale = .* positive"),
    (dict(scale=(1, math.inf)), "scale = "), (dict(scale_things=(1, math.inf)), "scale_things ="),
    (dict(scale_things=(2, 0.5)), "scale_things ="), (dict(scale_things=(0, 1)), "scale_things ="),
    (dict(place="level"), "place = level must be category or instance"),
    (dict(short_side=-1), "short_side = -1 must be 0"), (dict(batch=0), "batch = 0"),
    (dict(index=None), "index = None must be given"),
    (dict(dataset=Images([]), index=None, mode="full"), "has 0 images"),
    (dict(dataset=Images(town()[:3])), "has 3 images")])
def test_what_cannot_be_sampled_is_refused(wrong, sentence):
    fine = dict(dataset=town(), index=build_index(town()), size=(1, 1), **NATIVE)
    CropSampler(**fine)
    with pytest.raises(ValueError, match=sentence):
        CropSampler(**{**fine, **wrong})


# --- lab: the index on disk, the demo ---------------------------------------------------------
class Filed(Images):
    """The town with label files, one image without a label, one whose file is missing."""
    def __init__(self, folder):
        super().__init__(town())
        labels = (folder / "0.png", None, folder / "nowhere.png", folder / "3.png")
        labels[0].open("a").close()                            # makes it, or leaves it as it is
        self.files = [(f"name{i}", folder / f"{i}.jpg", label) for i, label in enumerate(labels)]


def use(dataset, cache, capsys):
    """Builds or loads an index, checks it -> (was it loaded?, what was said)."""
    assert index_rows(index.cached_index(dataset, cache)) == loop_rows(dataset)
    assert os.listdir(cache.parent) == [cache.name]            # no temporary file
    return dataset.read == [], capsys.readouterr().err


@pytest.mark.parametrize("change, why", [
    (lambda d, cache: setattr(d, "categories", CATEGORIES[::-1]), "belongs to another data set"),
    (lambda d, cache: os.utime(d.files[0][2], (5, 5)), "belongs to another data set"),
    (lambda d, cache: d.files[2][2].write_text("a new label"), "belongs to another data set"),
    (lambda d, cache: cache.write_bytes(cache.read_bytes()[:99]), "is damaged"),
    (lambda d, cache: torch.save({"weights": torch.zeros(3)}, cache), "is damaged")])
def test_a_kept_index_is_used_until_the_data_set_changes(tmp_path, capsys, change, why):
    """One line says why labels are read again. The global generator is left alone."""
    before, cache = torch.random.get_rng_state(), tmp_path / "new" / "index.pt"
    assert use(Filed(tmp_path), cache, capsys) == (False, "")
    assert use(Filed(tmp_path), cache, capsys) == (True, "")
    dataset = Filed(tmp_path)
    change(dataset, cache)
    loaded, said = use(dataset, cache, capsys)
    assert not loaded and said == f"{cache} {why}{said.split(why)[1]}" and said.count("\n") == 1
    dataset.read = []
    assert use(dataset, cache, capsys) == (True, "")
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", octaves.SETTINGS)
def test_ap_of_a_level_is_that_of_the_things_on_it(name):
    """By the areas of the masks, of which the box is a known part; AP_34 is of levels 3 and 4."""
    setting = octaves.SETTINGS[name]
    for n in (3, 10, 20, 40, 60, 90, 120, 200):
        level = int(isus.pyramid_level(torch.tensor([[0, 0, n, n]]), canonical=setting.canonical))
        inside = [k for k, (low, high) in enumerate(setting.areas().values())
                  if low <= setting.fill * n * n < high]
        assert inside == [0, level, *([5] if level > 2 else [])]
    assert isus.pyramid_level(torch.tensor([[8., 8., 0., 0.], [math.nan] * 4])).tolist() == [1, 1]


def test_the_demo_prints_its_tables_and_writes_its_figure(tmp_path, monkeypatch, capsys):
    assert demo_isus.entropy(torch.tensor([3, 0, 3, 6])) == pytest.approx(1.5)
    monkeypatch.setattr(demo_isus, "world", lambda *_: town())
    demo_isus.compare_samplers(4, 20, out=tmp_path)
    said = capsys.readouterr().out
    assert said.count(" bits") >= 8 and "clamped" in said and (tmp_path / "isus.png").exists()
