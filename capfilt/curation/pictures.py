"""Pictures as models want them: resized to a square, brought to the device, normalised.

In: RGB pictures. Out: tensors; B pictures, three channels, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor
from torch.nn.functional import interpolate

from capfilt.weights.model_files import ImagePreparation


def to_square(image: Image, preparation: ImagePreparation) -> Tensor:
    """Resize an RGB picture to a square, bicubic and antialiased: uint8 (3, S, S).

    torchvision's resizer is that of transformers' processor, Pillow's that of BLIP's released code. What torchvision
    calls for it is called here itself: importing torchvision takes seconds, a picture a fraction of a millisecond.
    """
    image, side_px = image.convert("RGB"), preparation.image_size_px
    if preparation.resizer == "pillow":
        return _to_tensor(image.resize((side_px, side_px), Resampling.BICUBIC))
    assert preparation.resizer == "torchvision", preparation.resizer
    pixels = _to_tensor(image)[None]
    return interpolate(pixels, (side_px, side_px), mode="bicubic", align_corners=False, antialias=True)[0]


def _to_tensor(image: Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pinned(pixels: Tensor, device: torch.device) -> Tensor:
    """For a GPU in pinned memory, which is copied from while the processor goes on; for others as they are.

    Done where pictures are prepared, in the decoding threads.
    """
    return pixels.pin_memory() if device.type == "cuda" else pixels


def stacked(images: Sequence[Tensor], device: torch.device) -> Tensor:
    """Prepared pictures as one batch on the device.

    Only CUDA's copies go on by themselves: to Apple's GPUs such a copy may be read before it is done.
    """
    return torch.stack([image.to(device, non_blocking=device.type == "cuda") for image in images])


def normalise(images: Sequence[Tensor], preparation: ImagePreparation, like: Tensor) -> Tensor:
    """Pictures of uint8 (3, S, S) as one normalised batch (B, 3, S, S), of the device and dtype of `like`."""
    mean = torch.tensor(preparation.mean, device=like.device).view(3, 1, 1)
    std = torch.tensor(preparation.std, device=like.device).view(3, 1, 1)
    return ((stacked(images, like.device).float() / 255 - mean) / std).to(like.dtype)
