"""Embeddings as queries, after Mask2Former (B. Cheng et al., "Masked-attention Mask Transformer for
Universal Image Segmentation", CVPR 2022), one of the two networks that ibs.py is tried on.

    N learned queries --> layer 1 --> layer 2 --> layer 3 --> embeddings [N, C], and the category of
                             |           |           |        each, or "no object"
    pyramid at stride       32          16           8

A query is a vector that is learned. In each layer it reads the cells of one level of the pyramid,
but only those inside the mask that it has after the layer before (masked attention).

This is a small network. Where the released code of de Geus and Dubbelman, which builds on
Mask2Former's, does something else, a line `Deviation:` says so.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from affinity_head import assign
from lab.masks import cross_entropy, dice, segment_masks


def sine(x):
    """The places of the cells of x [B, C, h, w], C a multiple of 4 -> [1, C, h, w] for attention.

    The first half of the channels are sines and cosines of f y, the second half of f x, with y and
    x in 0..1 of this input and frequencies f = 2 pi 10000^(-4 i / C)."""
    c, (h, w) = x.shape[1] // 4, x.shape[-2:]
    frequency = 2 * math.pi * 10000 ** (-torch.arange(c, device=x.device) / c)
    rows, columns = ((torch.arange(n, device=x.device) + 0.5) / n * frequency[:, None]
                     for n in (h, w))                          # [c, h], [c, w]
    down = [f(rows)[:, :, None].expand(c, h, w) for f in (torch.sin, torch.cos)]
    across = [f(columns)[:, None].expand(c, h, w) for f in (torch.sin, torch.cos)]
    return torch.cat(down + across)[None].to(x.dtype)


class Queries(nn.Module):
    """N queries that become embeddings, each with a category or "no object".

    isthing: bool [categories]; c_in: channels of the pyramid; channels: C of the embeddings, a
    multiple of `heads` and of 4. queries: N. layers, heads: of the attention.
    strides: of the pyramid's levels that the layers read in turn.
    no_object: weight of queries without a segment in the loss "class".
    weights: of "class", "mask" (cross entropy) and "dice", in losses and in matching alike.
    points: pixels of each mask that intra-batch supervision reads; see `ibs_pixels`.
    things_only: instance segmentation (section 6.4 of de Geus and Dubbelman): stuff is "no object".

    Weights 2, 5, 5, 0.1 for "no object" and 12,544 points are Mask2Former's.
    Choice: of more segments than queries, those of the cheapest assignment are learnt.
    Deviation: the released code has nine layers, here there are three.
    Deviation: its features come from six layers of deformable attention among the cells of strides
    8, 16 and 32 (the pixel decoder), here from a few convolutions (FeatureEncoder). So no cell sees
    the whole image before the queries read it.
    Deviation: its losses and its matching see 12,544 points of each mask, here all known cells at
    stride 4."""
    coordinates = False    # of the feature encoder: queries have `sine`
    rescored = False       # merging needs the score of the category alone
    outside = False        # do segments outside of the crop need a query? See lab/outside.py

    def __init__(self, isthing, c_in, channels, strides=(32, 16, 8), queries=100, layers=3, heads=8,
                 no_object=0.1, weights=(2.0, 5.0, 5.0), points=12544, things_only=False):
        super().__init__()
        if channels % heads or channels % 4:
            raise ValueError(f"channels={channels} must be a multiple of heads={heads} and of 4")
        if len(strides) > layers:
            raise ValueError(f"{layers} layers read {layers} levels at most: give fewer strides")
        self.strides, c = tuple(strides), channels
        weight = torch.cat([torch.ones(len(isthing)), torch.tensor([no_object])])
        self.register_buffer("isthing", isthing, persistent=False)
        self.register_buffer("class_weight", weight, persistent=False)
        self.query, self.place = nn.Embedding(queries, c), nn.Embedding(queries, c)
        self.level = nn.Embedding(len(self.strides), c)
        self.inputs = nn.ModuleList(nn.Conv2d(c_in, c, 1) for _ in self.strides)
        self.cross_attention, self.self_attention = (
            nn.ModuleList(nn.MultiheadAttention(c, heads, batch_first=True) for _ in range(layers))
            for _ in range(2))
        self.feed_forward = nn.ModuleList(
            nn.Sequential(nn.Linear(c, 4 * c), nn.ReLU(), nn.Linear(4 * c, c))
            for _ in range(layers))
        self.norms = nn.ModuleList(nn.ModuleList(nn.LayerNorm(c) for _ in range(3))
                                   for _ in range(layers))
        self.last_norm, self.classifier = nn.LayerNorm(c), nn.Linear(c, len(isthing) + 1)
        self.mask_head = nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Linear(c, c), nn.ReLU(),
                                       nn.Linear(c, c))
        self.weights, self.heads, self.points = weights, heads, points
        self.things_only = things_only

    # --- From pyramid and features to embeddings ------------------------------------------------

    def answers(self, pyramid, features):
        """-> after no layer, one layer, two, ...: class logits [B, N, categories + 1] and
        embeddings [B, N, C]. The first pair is the same for all images.

        Attention compares query + place with cell + sine, and reads cells without it."""
        q, place = (table.weight.expand(len(features), -1, -1)
                    for table in (self.query, self.place))
        answers = [self.answer(q)]
        for i, norms in enumerate(self.norms):
            k = i % len(self.strides)
            x = self.inputs[k](pyramid[self.strides[k]]) + self.level.weight[k][:, None, None]
            cells, keys = x.flatten(2).mT, (x + sine(x)).flatten(2).mT    # [B, hw, C]
            hidden = self.hidden_cells(answers[-1][1], features, x.shape[-2:])
            hidden = hidden.repeat_interleave(self.heads, 0)              # [B heads, N, hw]
            heard = self.cross_attention[i](q + place, keys, cells, attn_mask=hidden,
                                            need_weights=False)[0]
            q = norms[0](q + heard)
            heard = self.self_attention[i](q + place, q + place, q, need_weights=False)[0]
            q = norms[1](q + heard)
            q = norms[2](q + self.feed_forward[i](q))
            answers.append(self.answer(q))
        return answers

    def answer(self, q):
        """Queries [B, N, C] -> class logits [B, N, categories + 1], embeddings [B, N, C]."""
        q = self.last_norm(q)
        return self.classifier(q).float(), self.mask_head(q).float()

    @torch.no_grad()
    def hidden_cells(self, embeddings, features, size):
        """The cells of a level of `size` that a query must not read, bool [B, N, hw]: those outside
        of its own mask. A query whose mask is empty there may read all: a softmax over no cell
        is 0/0."""
        logits = torch.einsum("bnc,bchw->bnhw", embeddings, features)
        hidden = (F.interpolate(logits, size, mode="bilinear") < 0).flatten(2)
        return hidden & ~hidden.all(2, keepdim=True)

    def embed(self, pyramid, features):
        """Inference on the first image -> embeddings [N, C], scores [N], categories [N] of the
        queries whose best class is an object."""
        logits, embeddings = self.answers(pyramid, features)[-1]
        scores, categories = logits[0].softmax(1).max(1)
        keep = categories < len(self.isthing)
        return embeddings[0, keep], scores[keep], categories[keep]

    # --- Losses ---------------------------------------------------------------------------------

    def losses(self, pyramid, features, targets):
        """-> losses "class", "mask", "dice", summed over `answers` (deep supervision); for each
        layer, for intra-batch supervision: the matched embeddings of each crop, a list of [N_b, C];
        which of them are things, a list of bool [N_b]; None, as all count alike. Not of the queries
        before the first layer, which are the same for all images."""
        truth = [segment_masks(t, features.shape[-2:]) for t in targets]
        total, layers = {"class": 0.0, "mask": 0.0, "dice": 0.0}, []
        for logits, embeddings in self.answers(pyramid, features):
            each, matched, is_thing = self.layer_losses(
                logits, embeddings, features, targets=targets, truth=truth)
            total = {name: total[name] + w * each[name] for name, w in zip(total, self.weights)}
            layers.append((matched, is_thing, None))
        return total, layers[1:]

    def ibs_pixels(self, logits):
        """The pixels of each mask that intra-batch supervision reads: logits [N, P] -> [N, points].

        As Mask2Former samples them: the three quarters of `points` with logits nearest to 0 among
        3 `points` random pixels, and a quarter at random. All pixels, if there are no more.
        Choice: pixels; Mask2Former takes places between them, by interpolation. Choice: the quarter
        is a part of the 3 `points`."""
        n, pixels = self.points, logits.shape[1]
        if pixels <= n:
            return logits
        order = torch.rand_like(logits).argsort(1)
        some, rest = (logits.gather(1, order[:, :k]) for k in (3 * n, n - n * 3 // 4))
        nearest = some.detach().abs().topk(n * 3 // 4, largest=False)[1]
        return torch.cat([some.gather(1, nearest), rest], 1)

    def layer_losses(self, logits, embeddings, features, targets, truth):
        """The losses of one pair of `answers` without weights, matched embeddings, is_thing.

        "class" is the cross entropy over all queries, weighted by `no_object`; "mask" and "dice"
        are means over the segments of the batch.
        Section 5.2: segments outside of the crop are removed, as they "required a prediction, which
        the network could not make". Choice: also those inside that have no cell at stride 4."""
        categories, entropy, overlap, matched, is_thing = [], [], [], [], []
        for b, (t, (masks, known)) in enumerate(zip(targets, truth)):
            needed = ~t.crowd & (self.outside | masks.flatten(1).any(1))
            if self.things_only:
                needed = needed & self.isthing[t.categories]
            rows = torch.where(needed)[0]
            x = (embeddings[b] @ features[b].flatten(1)).unflatten(1, known.shape)       # [N, h, w]
            segment, query = self.match(
                logits[b], x, t.categories[rows], masks=masks[rows], known=known)
            rows = rows[segment]
            category = torch.full((len(x),), len(self.isthing), device=x.device)     # "no object"
            category[query] = t.categories[rows]
            categories.append(category)
            entropy.append(cross_entropy(x[query], masks[rows], known))
            overlap.append(dice(x[query], masks[rows], known))
            matched.append(embeddings[b, query])
            is_thing.append(self.isthing[t.categories[rows]])
        entropy, overlap, categories = map(torch.cat, (entropy, overlap, categories))
        n = max(len(entropy), 1)
        losses = {"class": F.cross_entropy(logits.flatten(0, 1), categories, self.class_weight),
                  "mask": entropy.sum() / n, "dice": overlap.sum() / n}
        return losses, matched, is_thing

    @torch.no_grad()
    def match(self, logits, x, categories, masks, known):
        """The one-to-one assignment of G segments to N queries of the least total cost

            -w_class p(category) + w_mask cross entropy + w_dice dice

        logits [N, categories + 1], x [N, h, w] mask logits, categories [G], masks [G, h, w] ->
        segments int64 [M] in ascending order and their queries [M], M = min(G, N)."""
        with torch.autocast(x.device.type, enabled=False):     # sums over all cells
            k, x = known.flatten(), x.flatten(1).float()
            y, p = masks.flatten(1) * k, x.sigmoid() * k
            # Of all pairs by matrix products, [N, G]: sums of log(1 + e^x) - x y, and of p y.
            entropy = ((F.softplus(x) * k).sum(1)[:, None] - (x * k) @ y.T) / k.sum().clamp(min=1)
            squares = (p * p).sum(1)[:, None] + (y * y).sum(1)
            overlap = 1 - 2 * (p @ y.T) / squares.clamp(min=1)
        w_class, w_mask, w_dice = self.weights
        cost = -w_class * logits.softmax(1)[:, categories] + w_mask * entropy + w_dice * overlap
        # A network that has diverged has NaN costs. Its loss is NaN and tells so; matching goes on.
        cost = np.nan_to_num(cost.cpu().numpy(), nan=0, posinf=10 ** 6)    # -inf does not occur
        query = torch.as_tensor(assign(-cost.T), device=x.device)         # [G], -1: left over
        segment = torch.where(query >= 0)[0]
        return segment, query[segment]
