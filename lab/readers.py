"""Readers of Cityscapes, IDD, COCO panoptic and Mapillary Vistas; a writer of COCO's format.

Each reader is a sequence of Samples in the official layout of its data set. An empty or damaged
folder ends in one sentence that says what is missing.

Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016. Varma et
al., "IDD: A Dataset for Exploring Problems of Autonomous Navigation in Unconstrained Environments",
WACV 2019. Kirillov et al., "Panoptic Segmentation", CVPR 2019 (the format of JSON and PNG).
"""
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from data import Category, DataError, Sample, mask_boxes
from lab.folders import write_file

CITYSCAPES = """
road 7 128 64 128, sidewalk 8 244 35 232, building 11 70 70 70, wall 12 102 102 156,
fence 13 190 153 153, pole 17 153 153 153, traffic light 19 250 170 30, traffic sign 20 220 220 0,
vegetation 21 107 142 35, terrain 22 152 251 152, sky 23 70 130 180, person 24 220 20 60,
rider 25 255 0 0, car 26 0 0 142, truck 27 0 0 70, bus 28 0 60 100, train 31 0 80 100,
motorcycle 32 0 0 230, bicycle 33 119 11 32"""
IDD = """
road 0 128 64 128, parking 1 250 170 160, sidewalk 2 244 35 232,
non-drivable fallback 3 152 251 152, person 4 220 20 60, rider 5 255 0 0, motorcycle 6 0 0 230,
bicycle 7 119 11 32, autorickshaw 8 255 204 54, car 9 0 0 142, truck 10 0 0 70, bus 11 0 60 100,
vehicle fallback 12 136 143 153, curb 13 220 190 40, wall 14 102 102 156, fence 15 190 153 153,
guard rail 16 180 165 180, billboard 17 174 64 67, traffic sign 18 220 220 0,
traffic light 19 250 170 30, pole 20 153 153 153, obs-str-bar-fallback 21 169 187 214,
building 22 70 70 70, bridge 23 150 100 100, vegetation 24 107 142 35, sky 25 70 130 180"""
# Evaluated labels with id and colour; ids of things; ids that may occur; ending of label files.
TABLES = {
    "cityscapes": (CITYSCAPES, range(24, 34), range(34), "_gtFine_instanceIds.png"),
    "idd": (IDD, range(4, 13), [*range(26), 255], "_gtFine_instancelevel3Ids.png"),
}


ENDINGS = (".jpg", ".jpeg", ".JPG", ".png", ".tif")  # of images that COCO's JSON calls otherwise
LIMIT = 100_000_000  # pixels: a larger image needs more memory than networks here are made for
MISSING = "correct the path, or unpack the data set again"
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is a warning or a traceback


def read_file(path, convert=np.array):
    """convert(PIL image) of an image file, its pixels as an array by default. What `convert` finds
    wrong it raises as DataError, a sentence to which this function adds the path."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > LIMIT:
                raise DataError(f"has {image.width}x{image.height} pixels, the limit is "
                                f"{LIMIT // 10 ** 6} megapixels: shrink it or cut it into parts")
            return convert(image)
    except DataError as e:
        raise DataError(f"{path} {e}") from None
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {MISSING}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder: give the image files in it") from None
    except Exception as e:                                     # a torn file can raise anything
        text = " ".join(str(e).replace(f" '{path}'", "").split()) or type(e).__name__
        raise DataError(f"{path} is no readable image ({text}): copy it again from its source"
                        ) from None


def as_rgb(image):
    """A PIL image of any mode -> float32 [3, H, W] in 0..1.

    Integers of n bits lie in 0..2^n - 1, float numbers in 0..1. A camera's EXIF orientation is
    applied. Choice: transparent pixels are seen before white, as a browser shows them."""
    tags = getattr(image, "tag_v2", {})                        # of TIFF: 258 bits, 262 white is 0
    bits = min(tags.get(258, (16,)))
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        if bits > 16 and image.mode != "F":
            raise DataError(f"has integers of {bits} bits, whose white is unknown: convert it to "
                            "16 bits")
        white = 1 if image.mode == "F" else 2 ** bits - 1
        grey = torch.from_numpy(np.array(image).astype(np.float32))
        if not (grey.min() >= 0 and grey.max() <= white):      # also where one of them is NaN
            raise DataError(f"has pixels from {grey.min():g} to {grey.max():g} but they must lie "
                            f"in 0 to {white}: rescale them")
        grey = 1 - grey / white if tags.get(262) == 0 else grey / white
        return grey.repeat(3, 1, 1)
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def read_image(path):
    """An image file of any kind that Pillow reads -> float32 [3, H, W] in 0..1, RGB; of an
    animation the first frame. DataError if it is none, or has more than LIMIT pixels."""
    return read_file(path, as_rgb)


def height_and_width(image):
    """Of a PIL image as `as_rgb` turns it, without decoding it."""
    turned = image.getexif().get(274, 1) > 4                   # 274: orientation
    return image.size if turned else image.size[::-1]


def as_ids(image):
    """A PIL image with one whole number a pixel -> the array of these numbers."""
    ids = np.array(image)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2 ** 24:
        raise DataError(f"has pixels of mode {image.mode} where a label has an id: take the file "
                        "of instance ids, not of colours")
    return ids


def as_colours(image):
    """A PIL image -> the numbers R + 256 G + 256^2 B of its pixels."""
    if image.mode not in ("RGB", "RGBA", "P"):
        raise DataError(f"has pixels of mode {image.mode} where a label has colours: take the PNG "
                        "of the panoptic annotations")
    return np.array(image.convert("RGB")).astype(np.int64) @ [1, 256, 256 ** 2]


class Folder:
    """A data set on disk. `.files` lists (name, image, label or None). `.read(i)` returns a label:
    ids [H, W] and rows (id, category, crowd)."""

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        name, image_file, label_file = self.files[i]
        image = read_image(image_file)
        segments, categories, crowd = self.labels(i)
        if segments.shape != image.shape[1:]:
            raise DataError(f"{label_file} has height and width {tuple(segments.shape)} but "
                            f"{image_file} has {tuple(image.shape[1:])}: take label and image from "
                            "the same archive")
        return Sample(image, segments, categories, crowd, name)

    def labels(self, i):
        """(segments, categories, crowd) of image i without decoding the image; all void where there
        is no label."""
        if self.files[i][2] is None:
            none = torch.zeros(0, dtype=torch.long)
            size = read_file(self.files[i][1], height_and_width)
            return torch.zeros(size, dtype=torch.long), none, none.bool()
        ids, rows = self.read(i)
        number, found, stuff = np.zeros(2**24, np.int64), [], {}       # pages come when touched
        for id, category, crowd in rows:
            thing = self.categories[category].isthing
            if thing or category not in stuff:                 # stuff: one segment of a category
                found.append((category, crowd))
            number[id] = len(found) if thing else stuff.setdefault(category, len(found))
        found = torch.tensor(found, dtype=torch.long).reshape(-1, 2)
        return torch.from_numpy(number[ids]), found[:, 0].contiguous(), found[:, 1].bool()


class Cityscapes(Folder):
    """root/leftImg8bit/<split>/<city>/*_leftImg8bit.png with
    root/gtFine/<split>/<city>/*_gtFine_instanceIds.png.

    A label pixel is 1000 c + n for instance n of label c, or c alone: stuff, or a group of things
    without separate labels, which becomes crowd. Labels that the benchmark does not evaluate are
    void. `table="idd"` reads the Indian Driving Dataset, level 3 labels (17 stuff, 9 things), as
    AutoNUE's public code writes them."""

    def __init__(self, root, split, table="cityscapes"):
        text, things, self.known, ending = TABLES[table]
        self.category_ids, self.categories, self.files = [], [], []
        for row in text.strip().replace("\n", " ").split(", "):
            name, id, *colour = row.rsplit(" ", 4)
            self.category_ids.append(int(id))
            self.categories.append(Category(name, int(id) in things, tuple(map(int, colour))))
        folder = Path(root, "leftImg8bit", split)
        for image in sorted(folder.glob("*/*_leftImg8bit.*")):
            name = image.name.rsplit("_leftImg8bit", 1)[0]
            label = Path(root, "gtFine", split, image.parent.name, name + ending)
            if not label.exists() and split != "test":
                how = " and run AutoNUE's createLabels.py --id-type level3Id --instance True"
                raise DataError(f"{image} has no label {label}: unpack gtFine beside leftImg8bit"
                                + (how if table == "idd" else ""))
            if table == "idd":                                 # its names repeat in other folders
                name = f"{image.parent.name}_{name}"
            self.files.append((name, image, label if label.exists() else None))
        if not self.files:
            raise DataError(f"there are no images {folder}/*/*_leftImg8bit.*: the root must hold "
                            "leftImg8bit and gtFine")

    def read(self, i):
        """The ids of label i and its rows (id, category, crowd); see Folder."""
        label, rows = self.files[i][2], []
        ids = read_file(label, as_ids)
        for id in np.flatnonzero(np.bincount(ids.ravel())).tolist():   # np.unique would sort
            official = id // 1000 if id >= 1000 else id
            if official not in self.known:
                raise DataError(f"{label} has the id {id}, which is no known label: take an "
                                "instance map of this data set")
            if official in self.category_ids:
                category = self.category_ids.index(official)
                rows.append((id, category, id < 1000 and self.categories[category].isthing))
        return ids, rows


class CocoPanoptic(Folder):
    """Panoptic JSON with PNGs whose colour is the segment's id = R + 256 G + 256^2 B.

    COCO and your own: root/annotations/panoptic_<split>.json, a folder of that name of PNGs, images
    in root/<split>. Mapillary Vistas: root/<split>/v2.0/panoptic/panoptic_2020.json (or v1.2,
    panoptic_2018.json), root/<split>/images. Categories are numbered in the JSON's order;
    `.category_ids` and `.image_ids` (by name) keep official numbers."""

    def __init__(self, root, split):
        root, self.files, self.infos, self.image_ids = Path(root), [], [], {}
        mapillary = [root / split / "v2.0/panoptic/panoptic_2020.json",
                     root / split / "v1.2/panoptic/panoptic_2018.json",
                     root / split / "panoptic/panoptic_2018.json"]
        paths = [root / f"annotations/panoptic_{split}.json", *mapillary]
        path = next((p for p in paths if p.exists()), None)
        folder = next((f for f in (root / split / "images", root / split) if f.is_dir()), None)
        due = mapillary[0] if folder == root / split / "images" else paths[0]
        if folder is None:
            raise DataError(f"there is no folder {root / split} of images: the root must hold it, "
                            f"and {paths[0]}")
        if path is None and not split.startswith("test"):
            raise DataError(f"{folder} has images but there is no {due}: write or unpack the "
                            "panoptic annotations there")
        others = sorted(root.glob("annotations/panoptic_*.json"))      # a test set's categories
        source = path or next(iter(others), None)
        again = "mend it, or copy it again from the data set's archive"
        try:
            content = json.loads(source.read_text()) if source else {"categories": []}
            self.take(content, folder, path)
        except DataError as e:
            raise DataError(f"{source} {e}: {again}") from None
        except (ValueError, RecursionError, OSError) as e:
            raise DataError(f"{source} is no readable JSON ({e}): {again}") from None
        except (KeyError, TypeError, AttributeError) as e:
            raise DataError(f"{source} is no panoptic JSON of COCO's format ({type(e).__name__}: "
                            f"{e}): {again}") from None
        if not self.files:
            raise DataError(f"{path or folder} lists no image: unpack the data set again")

    def take(self, content, folder, path):
        """Keeps what the JSON says. KeyError or TypeError where it lacks what the format has."""
        self.category_ids = [c["id"] for c in content["categories"]]
        self.categories = []
        for k, c in enumerate(content["categories"], 1):
            colour = tuple(c.get("color", (91 * k % 256, 53 * k % 256, 99)))
            fine = len(colour) == 3 and all(0 <= v < 256 for v in colour)
            if not fine or c["isthing"] not in (0, 1):
                raise DataError(f"gives the category {c['name']} the colour {colour} and isthing "
                                f"{c['isthing']}")
            self.categories.append(Category(str(c["name"]), bool(c["isthing"]), colour))
        if path is None:
            images = [p for p in sorted(folder.iterdir()) if p.suffix in (".jpg", ".png")]
            self.files = [(p.stem, p, None) for p in images]
            return
        number = {id: k for k, id in enumerate(self.category_ids)}
        if not number or len(number) < len(self.category_ids):
            raise DataError("has no categories, or two of one id")
        images = {image["id"]: folder / image["file_name"] for image in content["images"]}
        labels = path.with_suffix("")                          # COCO's place
        if not labels.is_dir():
            labels = path.parent                               # Mapillary's
        for a in content["annotations"]:
            if a["image_id"] not in images:
                raise DataError(f"has labels of image {a['image_id']}, which is not among its "
                                "images")
            image = images[a["image_id"]]
            if not image.exists():                             # the JSON may name the label instead
                others = [image.with_suffix(ending) for ending in ENDINGS]
                image = next((p for p in others if p.exists()), others[0])
            rows = {}
            for s in a["segments_info"]:
                if s["category_id"] not in number:
                    raise DataError(f"has a segment of category {s['category_id']} in "
                                    f"{a['file_name']}, which is not among its categories")
                if type(s["id"]) is not int or not 0 < s["id"] < 2 ** 24 or s["id"] in rows:
                    raise DataError(f"has a segment of id {s['id']} in {a['file_name']}: it must "
                                    "be a whole number from 1 to 2^24 - 1, and there once")
                rows[s["id"]] = (number[s["category_id"]], bool(s.get("iscrowd")))
            self.files.append((image.stem, image, labels / a["file_name"]))
            self.infos.append(rows)
            self.image_ids[image.stem] = a["image_id"]
        if len(self.image_ids) < len(self.files):
            raise DataError("has two labels of one image, or two images of one name")

    def read(self, i):
        """The ids of label i and its rows (id, category, crowd); see Folder."""
        label, rows = self.files[i][2], self.infos[i]
        ids = read_file(label, as_colours)
        strange = set(np.unique(ids).tolist()) - {0, *rows}
        if strange:
            raise DataError(f"{label} has the id {min(strange)}, which its JSON does not list: "
                            "take both from the same release")
        return ids, [(id, *row) for id, row in rows.items()]


# --- Writers ----------------------------------------------------------------------------------

def write_annotation(folder, name, segments, categories, *, crowd=None, category_ids=None,
                     image_id=None):
    """Writes folder/<name>.png and returns its entry for the JSON, so that many processes can share
    the images."""
    segments, count = torch.as_tensor(segments).cpu().long(), len(categories)
    Path(folder).mkdir(parents=True, exist_ok=True)
    rgb = torch.stack([segments & 255, segments >> 8 & 255, segments >> 16], -1)
    Image.fromarray(rgb.to(torch.uint8).numpy()).save(Path(folder, f"{name}.png"))
    area = torch.bincount(segments.flatten(), minlength=count + 1).tolist()
    infos = []
    for k, (c, box) in enumerate(zip(categories, mask_boxes(segments, count).int().tolist()), 1):
        x1, y1, x2, y2 = box
        if area[k]:
            infos.append({"id": k, "category_id": category_ids[int(c)] if category_ids else int(c),
                          "area": area[k], "bbox": [x1, y1, x2 - x1, y2 - y1],
                          "iscrowd": int(crowd is not None and crowd[k - 1])})
    return {"image_id": name if image_id is None else image_id, "file_name": f"{name}.png",
            "segments_info": infos, "height": segments.shape[0], "width": segments.shape[1]}


def write_panoptic_json(path, annotations, categories, category_ids=None):
    """Writes <path>.json around the entries that `write_annotation` returned."""
    images = [{"id": a["image_id"], **{k: a[k] for k in ("file_name", "height", "width")}}
              for a in annotations]
    rows = [{"id": category_ids[k] if category_ids else k, "name": c.name,
             "isthing": int(c.isthing), "color": list(c.colour)} for k, c in enumerate(categories)]
    content = {"images": images, "annotations": annotations, "categories": rows}
    write_file(f"{path}.json", json.dumps(content, allow_nan=False).encode())


def write_coco_panoptic(path, predictions, categories, category_ids=None, image_ids=None):
    """Writes predictions, rows of (name, segments, categories) or (..., crowd), as <path>.json and
    PNGs in <path>/. Evaluation servers want official numbers back: pass a data set's
    `.category_ids` and `.image_ids`."""
    Path(path).mkdir(parents=True, exist_ok=True)
    entries = []
    for name, segments, segment_categories, *crowd in predictions:
        entries.append(write_annotation(
            path, name, segments, segment_categories, crowd=crowd[0] if crowd else None,
            category_ids=category_ids, image_id=(image_ids or {}).get(name)))
    write_panoptic_json(path, entries, categories, category_ids)
