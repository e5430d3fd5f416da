"""Section 5.2 of de Geus and Dubbelman, undone: queries are asked for what is not in the crop.

Mask2Former's code matched each segment of an IMAGE with a query, seen in the crop or not. "Due to
bipartite matching, these regions required a prediction, which the network could not make." Without
them, PQ on Mapillary Vistas rises from 36.3 to 41.5. A Target of data.py has only what its crop
shows. `AskOutside` brings the other segments back, to measure what they cost:

    model = AskOutside(unified.queries(isthing, body), dataset)
"""
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn


def ask_outside(target, categories):
    """A Target with a row for each segment of its whole image.

    categories: int64 [M], of the image's segments that are no crowds. Rows for those that the crop
    does not show are appended. They have no pixel, and boxes of zeros."""
    categories = categories.to(target.categories.device)
    count = max([0, *categories.tolist(), *target.categories.tolist()]) + 1
    shown = torch.bincount(target.categories[~target.crowd], minlength=count)
    missing = (torch.bincount(categories, minlength=count) - shown).clamp(min=0)     # of each
    more = torch.arange(count, device=missing.device).repeat_interleave(missing)
    rows = {name: F.pad(getattr(target, name), (0, 0, 0, len(more)))
            for name in ("boxes", "full_boxes", "truncated")}
    return replace(target, categories=torch.cat([target.categories, more]),
                   crowd=F.pad(target.crowd, (0, len(more))), **rows)


class AskOutside(nn.Module):
    """A UnifiedNet of queries that is trained without the correction.

    Each segment of the image that is not in the crop gets a query. It learns to name the category
    and to have an empty mask. dataset: the one that the crops come from."""

    def __init__(self, model, dataset):
        super().__init__()
        self.model, self.dataset, self.categories = model, dataset, {}
        model.family.outside = True                            # see lab/queries.py

    def in_image(self, i):
        """Categories of the segments of image i that are no crowds, read once -> int64 [M]."""
        if i not in self.categories:
            _, categories, crowd = self.dataset.labels(i)
            self.categories[i] = categories[~crowd]
        return self.categories[i]

    def losses(self, images, targets):
        """The losses of the model, which is asked for all segments of the images."""
        whole = [ask_outside(t, self.in_image(t.image_id)) for t in targets]
        return self.model.losses(images, whole)

    def predict(self, image, size=None):
        """The prediction of the model."""
        return self.model.predict(image, size)

    def stages(self, fit):
        """The stages of the model."""
        return self.model.stages(fit)
