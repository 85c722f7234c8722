"""capfilt: curate image-text data from the web with BLIP's CapFilt method, and train on the result.

From Python: `Captioner`, `Ranker` and `Filter` work on pictures, `curate` on a run; `read_manifest` gives what it
holds, `CuratedDataset` its pairs to a training loop. They are imported when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = ["Captioner", "CuratedDataset", "Filter", "RankedCaption", "Ranker", "curate", "read_manifest"]

if TYPE_CHECKING:
    from capfilt.api import Captioner, CuratedDataset, Filter, RankedCaption, Ranker, curate, read_manifest


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'capfilt' has no attribute {name!r}")
    from capfilt import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
