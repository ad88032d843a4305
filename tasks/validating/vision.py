"""What a vision tower makes of synthetic pixels: no processor, and so none of its dependencies, is needed."""

from __future__ import annotations

import torch

from requant.tasks.validating.model import Skeleton

SEED, GRID = 1, (1, 8, 12)  # frames, rows and columns of patches


def features(skeleton: Skeleton) -> torch.Tensor | None:
    """The features of one synthetic image, or None where there is no tower, or one that is not known here.

    Known: towers that take patches `[patches, channels * frames * side * side]` and a grid (the Qwen-VL families), and
    those that take pixels `[1, channels, size, size]`.
    """
    vision = getattr(skeleton.model.config, "vision_config", None)
    if vision is None:
        return None
    skeleton.load_rest()
    random = torch.Generator().manual_seed(SEED)
    channels = int(getattr(vision, "in_channels", 0) or getattr(vision, "num_channels", 3))
    if hasattr(vision, "temporal_patch_size") and hasattr(vision, "spatial_merge_size"):
        width = channels * vision.temporal_patch_size * vision.patch_size**2
        rows, columns = (side * vision.spatial_merge_size // 2 for side in GRID[1:])
        pixels = torch.randn(GRID[0] * rows * columns, width, generator=random)
        more = {"image_grid_thw": torch.tensor([[GRID[0], rows, columns]], device=skeleton.device)}
    elif isinstance(getattr(vision, "image_size", None), int):
        pixels, more = torch.randn(1, channels, vision.image_size, vision.image_size, generator=random), {}
    else:
        return None
    pixels = pixels.to(device=skeleton.device, dtype=skeleton.dtype)
    output = skeleton.model.model.get_image_features(pixel_values=pixels, **more)
    found = getattr(output, "pooler_output", output)
    return found if isinstance(found, torch.Tensor) else torch.cat(list(found))
