"""Baselines: what colour alone achieves, and what the resolution of stride 4 costs."""
import torch
import torch.nn.functional as F


def components(labels):
    """4-connected components of equal labels [H, W] -> int64 [H, W], the smallest flat index of
    each component.

    Every pixel points at one of its component; roots of neighbours join and chains are cut short
    until all agree."""
    index = torch.arange(labels.numel()).view(labels.shape)
    down, right = labels[1:] == labels[:-1], labels[:, 1:] == labels[:, :-1]
    vertical = torch.stack([index[1:][down], index[:-1][down]])
    horizontal = torch.stack([index[:, 1:][right], index[:, :-1][right]])
    pairs = torch.cat([vertical, horizontal], 1)               # [2, E]
    root = index.flatten()
    while (root[pairs[0]] != root[pairs[1]]).any():
        low, high = root[pairs].amin(0), root[pairs].amax(0)
        root = root.scatter_reduce(0, high, low, "amin")
        while (root != root[root]).any():
            root = root[root]
    return root.view(labels.shape)


class ColourBaseline:
    """What colour alone achieves: k-means on the colours of n images, each cluster the category of
    most of its pixels, each connected piece of a thing category with at least 20 pixels an
    instance. A network should be far above it."""

    def __init__(self, dataset, n=20, clusters=64):
        self.isthing = torch.tensor([c.isthing for c in dataset.categories])
        g = torch.Generator().manual_seed(0)
        colours, categories = [], []
        for i in range(min(n, len(dataset))):
            sample = dataset[i]
            segments = sample.segments.flatten()
            pixels = torch.nonzero(segments)[:, 0]
            pixels = pixels[torch.randint(len(pixels), (2000,), generator=g)]
            colours.append(sample.image.flatten(1)[:, pixels].T)
            categories.append(sample.categories[segments[pixels] - 1])
        colours = torch.cat(colours)                           # [M, 3]
        votes = F.one_hot(torch.cat(categories), len(self.isthing)).float()           # [M, C]
        self.centres = colours[torch.randperm(len(colours), generator=g)[:clusters]]
        for _ in range(15):
            nearest = torch.cdist(colours, self.centres).argmin(1)
            member = F.one_hot(nearest, clusters).float().T    # [K, M]
            self.centres = member @ colours / member.sum(1, keepdim=True).clamp(min=1)
        self.best = (member @ votes).argmax(1)                 # the category of each cluster

    def predict(self, image):
        """image [3, H, W] -> (segments [H, W], categories [N])"""
        cluster = torch.cdist(image.flatten(1).T, self.centres).argmin(1)
        best = self.best[cluster].view(image.shape[1:])
        pieces = torch.where(self.isthing[best], len(self.isthing) + components(best), best)
        _, first, area = torch.unique(pieces, return_inverse=True, return_counts=True)
        segments = ((area >= 20).cumsum(0) * (area >= 20))[first]
        categories = torch.zeros(int(segments.max()) + 1, dtype=torch.long)
        categories[segments] = best
        return segments, categories[1:]


def stride4_ceiling(sample, size):
    """The ground truth squeezed through a stride-4 output of an input of `size` and back ->
    segments [H, W]. No network that predicts at stride 4 can be expected to do better.

    Shares of each segment in cells of 4x4 pixels, enlarged bilinearly; the largest share wins."""
    shape = sample.segments.shape
    small = F.interpolate(sample.segments[None, None].float(), size=size, mode="nearest-exact")
    best, out = torch.full(shape, -1.0), torch.zeros_like(sample.segments)
    for k in range(len(sample.categories) + 1):
        share = F.avg_pool2d((small.long() == k).float(), 4, ceil_mode=True)
        share = F.interpolate(share, size=shape, mode="bilinear", align_corners=False)[0, 0]
        out, best = torch.where(share > best, k, out), torch.maximum(share, best)
    return out
