"""Features of a vision tower for synthetic pixels, so that no processor and none of its dependencies are needed."""

from __future__ import annotations

import torch

from requant.tasks.validating.model import Skeleton

SEED, GRID = 1, (1, 8, 12)  # frames, rows and columns of patches


def features(skeleton: Skeleton) -> torch.Tensor | None:
    """Return the features of one synthetic image, `[patches, hidden]`; None without a tower of a known kind.

    Known are towers that take patches `[patches, channels * frames * side * side]` and a grid (the Qwen-VL families),
    and those that take pixels `[1, channels, size, size]`.
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
        grid = {"image_grid_thw": torch.tensor([[GRID[0], rows, columns]], device=skeleton.device)}
    elif isinstance(getattr(vision, "image_size", None), int):
        pixels, grid = torch.randn(1, channels, vision.image_size, vision.image_size, generator=random), {}
    else:
        return None
    pixels = pixels.to(device=skeleton.device, dtype=skeleton.dtype)
    output = skeleton.model.model.get_image_features(pixel_values=pixels, **grid)
    states = getattr(output, "pooler_output", output)
    return states if isinstance(states, torch.Tensor) else torch.cat(list(states))
