"""One forward pass of each network as a picture: what its parts return, its shape, what it feeds.

    python -m lab.shapes [seamless adaptis affinity_head ibs kernels queries] [--out DIR]

Each demo draws the network that it has trained. The command above draws all in seconds. Without
training their numbers mean nothing, only their shapes do; but adaptis takes the weights of its last
demo, if there are any, and ibs learns in a second. How pictures are to be read: lab/sheet.py.
"""
import argparse

import torch

from adaptis import sample_points
from affinity_head import InstanceAffinityHead, dynamic_potential, segment
from ibs import mask_logits
from lab import balls, demo_adaptis, demo_affinity, demo_ibs, ends, unified
from lab.draw import draw
from lab.figure_adaptis import coloured
from lab.recipes import RECIPES
from lab.sheet import INSIDE, Box, Sheet, probabilities, recorded, side_by_side, with_boxes
from lab.worlds import world
from seamless import Seamless, resnet_fpn


def segments_of(image, found, categories):
    """A Prediction's segments in colours -> uint8 [H, W, 3]."""
    return draw(image, found.segments, found.categories, categories, names=False)


UNTRAINED = "\nNothing here is trained: the numbers mean nothing, only their shapes do."


def seamless(out="figures", body=None, head=None, scenes=None):
    """Draws seamless.Seamless on a body and a semantic head of a demo; the other heads are new."""
    scenes, trained = scenes or world("street", "test", 1), body is not None
    sample, categories = scenes[0], scenes.categories
    body = body or resnet_fpn("tiny", width=48)
    model = Seamless([c.isthing for c in categories], body, canonical=56, anchor_scale=2,
                     proposals=100, window=4).eval()
    model.semantic_head = head or model.semantic_head
    model, image = model.cpu().eval(), sample.image
    with recorded(model, "proposal_head.propose", "region_head.pool", "region_head.classify",
                  "region_head.detect", "at_size", "fuse") as calls:
        found = model.predict(image)
    levels = calls["body"][0]
    proposals, detected = (calls[k][0][0] for k in ("proposal_head.propose", "region_head.detect"))
    masks = calls["at_size"][0]["masks"]
    again, maps = calls["region_head.pool"][1], calls["region_head.mask"][0]
    boxes = [
        Box("image", 0, 0, image, image.permute(1, 2, 0).numpy()),
        *(Box(f"body.stages.{k}", k, 0, calls[f"body.stages.{k}"][0][0]) for k in range(1, 5)),
        *(Box(f"body[{s}]", k, 1, levels[s][0]) for k, s in enumerate((4, 8, 16, 32), 1)),
        Box("semantic_head", 0, 2, calls["semantic_head"][0][0]),
        *(Box(f"MiniDL: heads.{k}", k + 1, 2, calls[f"semantic_head.heads.{k}"][0][0])
          for k in range(4)),
        Box("proposal_head", 1, 3, calls["proposal_head"][0][0][0]),
        Box("propose: boxes", 2, 3, proposals, with_boxes(image, proposals[:12])),
        Box("region_head.pool", 3, 3, calls["region_head.pool"][0]),
        Box("region_head.classify", 4, 3, calls["region_head.classify"][0][0]),
        Box("detect: boxes", 4, 4, detected["boxes"], with_boxes(image, detected["boxes"][:12])),
        Box("pool of these boxes", 3, 4, again), Box("region_head.mask", 2, 4, maps),
        Box("at_size: masks", 1, 4, masks, side_by_side(masks, 2, 2)),
        Box("fuse: segments", 0, 4, found.segments, segments_of(image, found, categories))]
    title = ("Seamless: the body, then a pyramid whose levels feed both branches. Row 3: the "
             "semantic branch labels each pixel.\nRows 4 and 5: the instance branch finds boxes, "
             "then masks; `fuse` joins both.")
    if trained:
        title += (" Body and semantic head are the demo's.\nThe demo does not train the instance "
                  "branch: its boxes mean nothing, only their shapes do.")
    sheet = Sheet(title + UNTRAINED * (not trained), boxes)
    sheet.feed("image", *(f"body.stages.{k}" for k in range(1, 5)), "body[32]", "body[16]",
               "body[8]", "body[4]", "MiniDL: heads.0", "semantic_head")
    for k, s in enumerate((4, 8, 16), 1):
        sheet.feed(f"body.stages.{k}", f"body[{s}]")
        sheet.feed(f"body[{2 * s}]", f"MiniDL: heads.{k}")
        sheet.arrow((k + 1.5, 5), (k + 1.5, 5.35), (0.75, 5.35), (0.75, 5))
    for place, lane in (((1.5, 6), 5.65), ((3.5, 6), 5.65), ((3.5, 8), 7.5)):   # all levels
        sheet.arrow((1.5, 3.4), (5, 3.4), (5, lane), (place[0], lane), place)
    sheet.feed("proposal_head", "propose: boxes", "region_head.pool", "region_head.classify",
               "detect: boxes", "pool of these boxes", "region_head.mask", "at_size: masks",
               "fuse: segments")
    sheet.arrow((0.3, 5), (0.3, 8))
    return sheet.save(out, "seamless")


def adaptis(out="figures", model=None):
    """Draws adaptis.AdaptIS with one point, on the cells' first test image."""
    kept = demo_adaptis.KEPT
    trained = model is not None or kept.exists()
    model = model or (demo_adaptis.load(kept) if trained else demo_adaptis.build())
    model, sample = model.cpu().eval(), world("cells", "test", 1)[0]
    image = sample.image
    area = torch.bincount(sample.segments.flatten())[1:] * (sample.categories == 1)
    points, _ = sample_points(sample.segments, area.argmax()[None] + 1, 1,
                              torch.Generator().manual_seed(3))
    with recorded(model, "bilinear", "windows") as calls:
        features = model.encoder(image[None])
        logits, corners = model.selection(features, points[None])
        labels = demo_adaptis.instance_map(model.predict(image))
    seen = torch.cat([corners, corners + torch.tensor(logits.shape[:0:-1])], 1)
    parts = ["first", "down.0", "down.1", "down.2"]
    boxes = [
        Box("image", 0, 0, image, image.permute(1, 2, 0).numpy()),
        *(Box(f"encoder.{part}", k, 0, calls[f"encoder.{part}"][0][0])
          for k, part in enumerate(parts, 1)),
        Box("encoder: features", 0, 1, features[0]),
        *(Box(f"encoder.up.{k}", k + 1, 1, calls[f"encoder.up.{k}"][0][0]) for k in range(3)),
        Box("points", 0, 2, points, with_boxes(image, seen, points.tolist())),
        Box("selection.relative", 1, 2, calls["selection.relative"][0][0],
            side_by_side(calls["selection.relative"][0][0], 1, 2)),
        Box("selection.place", 2, 2, calls["selection.place"][0][0]),
        Box("selection.share", 0, 3, calls["selection.share"][0][0]),
        Box("windows", 1, 3, calls["windows"][0][0].movedim(-1, 0)),
        *(Box(f"selection.adain {k + 1}", k + 2, 3, calls["selection.adain"][k][0])
          for k in range(3)),
        Box("bilinear: Q", 0, 4, calls["bilinear"][0][0]),
        Box("selection.controller", 1, 4, torch.cat(calls["selection.controller"][0])),
        Box("selection.layers", 4, 4, calls["selection.layers"][0][0]),
        Box("selection: logits", 3, 4, logits, probabilities(logits[0].sigmoid())),
        Box("predict: segments", 2, 4, labels, coloured(image, labels, max(1, int(labels.max()))))]
    title = ("AdaptIS. Top: the U-Net, down and up again. Below: a point (cyan) and the window "
             "around it.\nQ, the features at the point, becomes a scale and a shift for each "
             "channel of three AdaIN layers: the mask of one object.\nThe greedy algorithm asks "
             "at many points and makes segments of their masks.")
    sheet = Sheet(title + UNTRAINED * (not trained), boxes, ratio=0.75)
    sheet.feed("image", *(f"encoder.{part}" for part in parts))
    sheet.arrow((4.5, 1), (4.5, 2.5), (4 - INSIDE, 2.5))
    sheet.feed("encoder.up.2", "encoder.up.1", "encoder.up.0", "encoder: features")
    for k, part in enumerate(parts[:3]):
        sheet.feed(f"encoder.{part}", f"encoder.up.{k}")
    for row in (6.5, 8.5):
        sheet.arrow((INSIDE, 2.5), (0, 2.5), (0, row), (INSIDE, row))
    sheet.feed("points", "selection.relative", "selection.place", "selection.adain 1")
    sheet.feed("selection.share", "windows", "selection.adain 1", "selection.adain 2",
               "selection.adain 3", "selection.layers", "selection: logits", "predict: segments")
    sheet.feed("bilinear: Q", "selection.controller")
    for k in (2, 3, 4):
        sheet.arrow((1.5, 8), (1.5, 7.5), (k + 0.2, 7.5), (k + 0.2, 7))
    return sheet.save(out, "adaptis")


def affinity_head(out="figures", encoder=None, head=None):
    """Draws affinity_head.InstanceAffinityHead on the demo's encoder and a test image of balls."""
    trained = encoder is not None
    encoder = (encoder or demo_affinity.Encoder()).cpu().eval()
    head = (head or InstanceAffinityHead(32, 64)).cpu().eval()
    image, _, logits, found = balls.scene(demo_affinity.TEST)
    psi, channels = dynamic_potential(found, logits, balls.ISTHING, image_size=image.shape[1:])
    middle = found["boxes"][0].view(2, 2).mean(0)
    with recorded(encoder) as below, recorded(head, "factors", "apply_affinity") as calls:
        features = encoder(image[None])
        answer = head(features, [psi])[0]
        row = demo_affinity.affinity_row(head, features, middle.tolist())
    queries, keys = calls["factors"][0]
    segments, categories, _ = segment(answer, channels, found["scores"], image.shape[1:])
    parts = ["stem", "down.0", "down.1", "down.2"]
    a_psi = calls["apply_affinity"][0].T.view(psi.shape)
    pixels = len(queries[0])
    boxes = [
        Box("image", 0, 0, image, image.permute(1, 2, 0).numpy()),
        *(Box(f"encoder.{part}", k, 0, below[f"encoder.{part}"[8:]][0][0])
          for k, part in enumerate(parts, 1)),
        *(Box(f"features[{s}]", k, 1, features[s][0]) for k, s in enumerate((4, 8, 16, 32), 1)),
        Box("head.out: Q", 0, 2, calls["out"][0][0]),
        *(Box(f"head.convs, norms {k}", k, 2, calls["norms.1"][k - 1][0]) for k in range(1, 5)),
        Box('found["boxes"]', 0, 3, found["boxes"],
            with_boxes(image, found["boxes"], [middle.tolist()])),
        Box("head.phi1(Q)", 1, 3, queries[0], queries[0].mean(1).view(row.shape).numpy()),
        Box("row of A (not built)", 2, 3, torch.empty(pixels, pixels, device="meta"),
            row.numpy()),
        Box("head.phi0(Q)", 3, 3, keys[0], keys[0].mean(1).view(row.shape).numpy()),
        Box("logits: V", 0, 4, logits), Box("potential: Psi", 1, 4, psi, side_by_side(psi)),
        Box("apply_affinity: A Psi", 2, 4, a_psi, side_by_side(a_psi)),
        Box("head: P", 3, 4, answer, side_by_side(answer)),
        Box("segment", 4, 4, segments,
            draw(image, segments, categories, balls.CATEGORIES, names=False))]
    title = ("The affinity head. The potential Psi has a channel for each box, then one for each "
             "stuff category.\nA = phi1(Q) phi0(Q)ᵀ / HW moves it between pixels that belong "
             "together: P = Psi + A Psi. The argmax of P is the result.\nThe row of A is that of "
             "the cyan pixel.")
    sheet = Sheet(title + UNTRAINED * (not trained), boxes, ratio=0.62)
    sheet.feed("image", *(f"encoder.{part}" for part in parts))
    sheet.feed("features[32]", "features[16]", "features[8]", "features[4]")
    for k, (part, s) in enumerate(zip(parts, (4, 8, 16, 32)), 1):
        sheet.feed(f"encoder.{part}", f"features[{s}]", f"head.convs, norms {k}")
        if k > 1:
            sheet.arrow((k + 0.5, 5), (k + 0.5, 5.3), (0.8, 5.3), (0.8, 5))
    sheet.feed("head.convs, norms 1", "head.out: Q")
    for column in (1.5, 3.5):
        sheet.arrow((0.4, 5), (0.4, 5.65), (column, 5.65), (column, 6))
    for name in ("phi1", "phi0"):
        sheet.feed(f"head.{name}(Q)", "row of A (not built)")
    sheet.feed("row of A (not built)", "apply_affinity: A Psi")
    sheet.feed('found["boxes"]', "potential: Psi")
    sheet.feed("logits: V", "potential: Psi", "apply_affinity: A Psi", "head: P", "segment")
    return sheet.save(out, "affinity_head")


def ibs(out="figures"):
    """Draws ibs.MinimalNet on the demo's two images; it learns from them in a second or two."""
    model, images, targets = demo_ibs.learn_two_cars(1.0)
    with recorded(model) as calls:
        embeddings, features = model(images, [t.boxes[1:] for t in targets])
    boxes = []
    for i, (row, name) in enumerate(((0, "A"), (3, "B"))):
        boxes += [
            Box(f"image {name}", 0, row, images[i], images[i].permute(1, 2, 0).numpy()),
            Box(f"body, {name}", 1, row, calls["body"][0][i]),
            Box(f"features, {name}", 1, 1 + i, features[i]),
            Box(f"kernels, {name}", 2, row, calls["kernels"][0][i]),
            Box(f"embeddings, {name}", 3 + i, row, embeddings[i])]
        for j, other in enumerate("AB"):
            logits = mask_logits(embeddings[j], features[i])
            boxes.append(Box(f"mask_logits E{other} F{name}", 3 + j, 1 + i, logits,
                             probabilities(logits[0].sigmoid())))
    title = ("ibs.MinimalNet on two images, trained with IBS. The embedding E of a thing is the "
             "kernel at the middle of its box.\nIts mask is E times the features F. Times the F "
             "of the other image it must find nothing: that is IBS.\nFour masks: dark is "
             "probability 0, yellow 1.")
    sheet = Sheet(title, boxes, ratio=0.75)
    for row, name in ((0, "A"), (3, "B")):
        sheet.feed(f"image {name}", f"body, {name}", f"kernels, {name}", f"embeddings, {name}")
        sheet.feed(f"body, {name}", f"features, {name}", f"mask_logits EA F{name}")
        sheet.feed(f"embeddings, {name}", f"mask_logits E{name} F{name}")
    sheet.arrow((2.5, 2.5), (2.5, 1.5), (4.5, 1.5), (4.5, 2))
    sheet.arrow((2.5, 4.5), (2.5, 5.5), (4.3, 5.5), (4.3, 5))
    sheet.arrow((3.2, 1), (3.2, 1.25), (3, 1.25), (3, 4.5), (3 + INSIDE, 4.5))
    sheet.arrow((5 - INSIDE, 6.5), (5, 6.5), (5, 2.5), (5 - INSIDE, 2.5))
    return sheet.save(out, "ibs")


def unified_net(model, name):
    """The pass of a UnifiedNet, untrained if None -> model, calls, the boxes of every family."""
    if model is None:                                          # untrained: whatever it finds
        names = [c.isthing for c in world("parking", "test", 1).categories]
        settings = RECIPES["ibs" if name == "kernels" else name, "parking"]["model"]
        settings = {**settings, "score_threshold": 0.0}
        if name == "queries":
            settings["strides"] = (32, 16, 8)                  # as for real images
        model = getattr(unified, name)(names, resnet_fpn("tiny", 64), **settings)
    scenes = world("parking", "test", 1)
    model, image = model.cpu().eval(), scenes[0].image
    with recorded(model, "family.embed", "mask_logits", "merge") as calls:
        found = model.predict(image)
    levels, masks = calls["body"][0], calls["mask_logits"][0]
    boxes = [
        Box("image", 0, 0, image, image.permute(1, 2, 0).numpy()),
        *(Box(f"body[{s}]", k, 0, levels[s][0]) for k, s in enumerate((4, 8, 16, 32), 1)),
        Box("encoder: F", 1, 1, calls["encoder"][0][0]),
        Box("family.embed: E", 2, 3, calls["family.embed"][0][0]),
        Box("mask_logits: E F", 1, 3, masks, side_by_side(masks)),
        Box("merge: segments", 0, 3, found.segments, segments_of(image, found, scenes.categories))]
    return model, calls, boxes


def joined(sheet):
    """The arrows that kernels and queries share."""
    sheet.feed("image", "body[4]", "encoder: F", "mask_logits: E F")
    for column in (2.5, 3.5, 4.5):
        sheet.arrow((column, 1), (column, 1.35), (1.75, 1.35), (1.75, 2))
    sheet.feed("family.embed: E", "mask_logits: E F", "merge: segments")


def kernels(out="figures", model=None):
    """Draws lab/kernels.py on a parking lot: heat says where, kernels say what."""
    _, calls, boxes = unified_net(model, "kernels")
    places = {"encoder: F": (0, 1), "mask_logits: E F": (0, 2), "family.embed: E": (1, 3)}
    boxes = [box._replace(**dict(zip(("column", "row"), places.get(box.name, box[1:3]))))
             for box in boxes]
    levels = range(1, 5)
    for k in levels:
        heat = calls["family.heat"][k - 1][0]
        boxes += [Box(f"family.heat {k}", k, 1, heat, probabilities(heat[:-1].sigmoid().amax(0))),
                  Box(f"family.kernel {k}", k, 2, calls["family.kernel"][k - 1][0])]
    title = ("Kernels. The heat has a peak for each thing and a region for each stuff category "
             "(here: its largest probability).\nThe kernel of a peak is an embedding E. Its mask "
             "is E times the features F, for things and stuff alike.")
    sheet = Sheet(title + UNTRAINED * (model is None), boxes)
    sheet.feed("image", "body[4]")
    sheet.feed("encoder: F", "mask_logits: E F", "merge: segments")
    sheet.arrow((1 + INSIDE, 6.5), (0.97, 6.5), (0.97, 4.75), (1 - INSIDE, 4.75))
    for k, s in zip(levels, (4, 8, 16, 32)):
        sheet.arrow((k + 0.5, 1), (k + 0.5, 1.35), (0.5, 1.35), (0.5, 2))
        sheet.feed(f"body[{s}]", f"family.heat {k}")
        sheet.arrow((k + 0.3, 1), (k + 0.3, 1.65), (k, 1.65), (k, 4.5), (k + INSIDE, 4.5))
        sheet.arrow((k + 0.5, 5), (k + 0.5, 5.5), (1.5, 5.5), (1.5, 6))
        sheet.arrow((k + 0.5, 3), (k + 0.5, 3.5), (5, 3.5), (5, 5.5), (1.5, 5.5), (1.5, 6))
    return sheet.save(out, "kernels")


def queries(out="figures", model=None):
    """Draws lab/queries.py on a parking lot: each layer reads one level of the pyramid."""
    net, calls, boxes = unified_net(model, "queries")
    for k in range(3):
        boxes += [Box(f"family.inputs.{k}", 4 - k, 1, calls[f"family.inputs.{k}"][0][0]),
                  Box(f"layer {k}: norms.{k}.2", 4 - k, 2, calls[f"family.norms.{k}.2"][0][0])]
    boxes += [Box("family.classifier", 3, 3, calls["family.classifier"][-1][0]),
              Box("family.query", 4, 3, net.family.query.weight)]
    title = ("Queries. Learned vectors read one level of the pyramid in each layer, inside of "
             "their own masks.\nThe last layer gives each a category or \"no object\", and an "
             "embedding E, whose mask is E times the features F.")
    sheet = Sheet(title + UNTRAINED * (model is None), boxes)
    joined(sheet)
    for k, s in enumerate((32, 16, 8)):
        sheet.feed(f"body[{s}]", f"family.inputs.{k}", f"layer {k}: norms.{k}.2")
    sheet.feed("family.query", *(f"layer {k}: norms.{k}.2" for k in range(3)), "family.embed: E")
    sheet.arrow((2.5, 5), (2.5, 5.5), (3.5, 5.5), (3.5, 6))
    sheet.feed("family.classifier", "family.embed: E")
    return sheet.save(out, "queries")


NETWORKS = {f.__name__: f for f in (seamless, adaptis, affinity_head, ibs, kernels, queries)}


def main(argv=None):
    """Draws the networks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--out", default="runs/shapes", help="folder; default: runs/shapes")
    flags = parser.parse_args(argv)
    for name in flags.networks or NETWORKS:
        if name not in NETWORKS:
            parser.error(f"no network {name!r}: take one of {', '.join(NETWORKS)}")
        torch.manual_seed(0)
        NETWORKS[name](flags.out)


if __name__ == "__main__":
    with ends.one_sentence("lab.shapes"):
        main()
