"""Pictures of shapes whose colour is preferred, the raters who vote on them, and what a picture shows.

A picture is [3, SIZE, SIZE] in [-1, 1]: one shape, warm (red to orange) or cold (blue to cyan), on black. The shape is
the condition of the model, its colour is what raters judge. Most prefer the warm picture of every shape: of some
almost all do, of others hardly more than half. A rater votes for it with the shape's agreement, which is sigmoid(2a)
of the Mallows-theta model one rank apart. So the dispersion of every pair is known.
"""

from typing import NamedTuple

import torch

SIZE = 16
SHAPES = ("disc", "square", "triangle", "cross")
CENTRES = (7.0, 8.0)
RADII = (4.0, 5.0)


class Pairs(NamedTuple):
    """B pairs of pictures [B, 3, SIZE, SIZE], their shapes [B] and the agreement of raters on each [B]."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    shapes: torch.Tensor
    agreement: torch.Tensor


def _mask(shape, x, y, radius):
    """[SIZE, SIZE] of 0 and 1: one shape about (x, y)."""
    pixels = torch.arange(SIZE, dtype=torch.float32)
    dx, dy = pixels[None, :] - x, pixels[:, None] - y
    across, down = dx.abs(), dy.abs()
    inside = torch.maximum(across, down) <= radius
    if shape == "disc":
        inside = dx**2 + dy**2 <= radius**2
    elif shape == "square":
        inside = torch.maximum(across, down) <= radius - 1
    elif shape == "triangle":
        inside = inside & (2 * across <= dy + radius)
    else:
        inside = inside & (torch.minimum(across, down) <= 1)
    return inside.float()


MASKS = torch.stack(  # [shapes, places and sizes, SIZE, SIZE]
    [torch.stack([_mask(shape, x, y, r) for x in CENTRES for y in CENTRES for r in RADII]) for shape in SHAPES]
)


def draw(shapes, warm, generator):
    """Pictures [B, 3, SIZE, SIZE] of shapes [B] in warm or cold colours [B] (bool), at random places and sizes."""
    count = len(shapes)
    masks = MASKS[shapes, torch.randint(MASKS.shape[1], (count,), generator=generator)][:, None]
    colours = torch.stack([warm.float(), 0.6 * torch.rand(count, generator=generator), (~warm).float()], dim=1)
    return 2 * masks * colours[:, :, None, None] - 1


def check_agreement(agreement):
    """ValueError for what is not one number in (0.5, 1] a shape."""
    if len(agreement) != len(SHAPES) or not all(0.5 < share <= 1 for share in agreement):
        raise ValueError(
            f"agreement must be {len(SHAPES)} numbers in (0.5, 1], for {', '.join(SHAPES)}; got {agreement}"
        )


def draw_pairs(count, agreement, generator, *, consensus=False):
    """Pairs with one rater's vote each, every shape equally often.

    Args:
        count: number of pairs. agreement: one number in (0.5, 1] a shape, the chance of voting with the majority.
        consensus: let every vote be the majority's, to measure against.
    """
    shapes = torch.arange(count) % len(SHAPES)
    shares = torch.tensor(agreement, dtype=torch.float64)[shapes]
    warm_wins = (torch.rand(count, generator=generator, dtype=torch.float64) < shares) | consensus
    return Pairs(draw(shapes, warm_wins, generator), draw(shapes, ~warm_wins, generator), shapes, shares)


class Seen(NamedTuple):
    """What a picture shows: the nearest shape [B] and how warm its colour is [B], from -1 (blue) to 1 (red)."""

    shapes: torch.Tensor
    warmth: torch.Tensor


def look(pictures):
    """The shape whose outline correlates most with the brightness, and the mean of red minus blue inside it."""
    pixels = ((pictures + 1) / 2).clamp(0, 1)
    masks = MASKS.flatten(0, 1).flatten(1)
    outlines = torch.nn.functional.normalize(masks - masks.mean(1, keepdim=True), dim=1)
    brightness = pixels.amax(1).flatten(1)
    best = ((brightness - brightness.mean(1, keepdim=True)) @ outlines.T).argmax(1)
    inside = masks[best]
    warmth = ((pixels[:, 0] - pixels[:, 2]).flatten(1) * inside).sum(1) / inside.sum(1)
    return Seen(best // MASKS.shape[1], warmth)
