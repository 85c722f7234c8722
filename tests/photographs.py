"""Real photographs with real alt-text behind the world's web servers, for tests that need the true thing.

In: flickr8k-dev-000.tar (1,000 photographs, five human captions each) and web_alt_text.parquet (10,000 rows of
alt-text from the web), from the folder that CAPFILT_SHARED_DATA names. Out: a site on loopback, its URL table, and
what must become of every row. Photographs are read where they are and never copied into the repository.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capfilt.world.site import SiteSettings, WorldSite
from capfilt.world.web_pictures import ODD_PICTURES
from capfilt.world.web_servers import BEHAVIOURS

DATA_DIR = Path(os.environ.get("CAPFILT_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
PHOTOGRAPHS, ALT_TEXTS = DATA_DIR / "flickr8k-dev-000.tar", DATA_DIR / "web_alt_text.parquet"

needs_photographs = pytest.mark.skipif(
    not (PHOTOGRAPHS.exists() and ALT_TEXTS.exists()),
    reason=f"{PHOTOGRAPHS.name} and {ALT_TEXTS.name} are not here; name their folder in CAPFILT_SHARED_DATA",
)

HUMAN_SHARE = 0.5
"""Share of rows whose alt-text is a human caption of the photograph; the others have a row of the web's alt-text."""
DEAD_SHARE = 0.1
"""Dead addresses for each photograph, and at least one for each way in which an address can be dead."""
ODD_SHARE = 0.15
"""Share of photographs that are redirected, mislabelled, turned, or encoded in an odd way."""

# Servers that never answer are left out: only a long time-out tells them from others on a machine that is busy.
_DEAD = [name for name, (_, reason) in BEHAVIOURS.items() if reason not in (None, "timeout")]
_ODD = [name for name, (_, reason) in BEHAVIOURS.items() if reason is None and name != "duplicate"]
_QUALITY = 90


@dataclass(frozen=True)
class Photograph:
    """One photograph as it lies in the tar, and the first of its human captions."""

    name: str
    jpeg: bytes
    human_caption: str


@dataclass(frozen=True)
class Row:
    """One row of the URL table, and what must become of it."""

    index: int
    url: str
    web_caption: str
    is_human: bool
    """Whether the alt-text is a human caption of the photograph."""
    photograph: Photograph
    behaviour: str
    """`plain`, or one of the world's BEHAVIOURS."""
    reason: str | None
    """Reason code with which its download ends; None when the photograph comes."""
    ending: str


def read_photographs(number: int) -> list[Photograph]:
    """The first `number` of the 1,000."""
    found = []
    with tarfile.open(PHOTOGRAPHS) as tar:
        while len(found) < number and (image := tar.next()) is not None:
            described = tar.next()
            assert described is not None
            assert Path(image.name).stem == Path(described.name).stem
            jpeg, captions = (tar.extractfile(member).read() for member in (image, described))  # type: ignore[union-attr]
            found.append(Photograph(Path(image.name).stem, jpeg, json.loads(captions)["captions"][0]))
    return found


class PhotographSite(WorldSite):
    """Every photograph once, and dead addresses between them, served as the world's servers do it.

    Plain photographs are sent byte for byte. Which row is odd, dead or has web alt-text follows from the seed.
    """

    def __init__(self, photographs: list[Photograph], *, seed: int = 0) -> None:
        num_dead = max(len(_DEAD), round(DEAD_SHARE * len(photographs)))
        super().__init__(SiteSettings(num_urls=len(photographs) + num_dead, seed=seed))
        num_odd = round(ODD_SHARE * len(photographs))
        dealt = [_ODD[n % len(_ODD)] for n in range(num_odd)] + ["plain"] * (len(photographs) - num_odd)
        dealt += [_DEAD[n % len(_DEAD)] for n in range(num_dead)]
        rng, num_urls = np.random.default_rng(seed), self.settings.num_urls
        order, self._is_human = rng.permutation(num_urls), rng.permutation(num_urls) < HUMAN_SHARE * num_urls
        self._dealt = [(dealt[n], photographs[n % len(photographs)]) for n in order]
        texts = pq.read_table(ALT_TEXTS, columns=["TEXT"])["TEXT"]
        self._alt_texts = texts.take(rng.choice(len(texts), size=num_urls, replace=False)).to_pylist()

    def row(self, index: int) -> Row:  # type: ignore[override]
        behaviour, photograph = self._dealt[index]
        is_human = bool(self._is_human[index])
        ending = ODD_PICTURES[behaviour][0] if behaviour in ODD_PICTURES else "jpg"
        return Row(
            index=index,
            url=f"{self.base_url}/photos/{photograph.name}-{index}.{ending}",
            web_caption=photograph.human_caption if is_human else self._alt_texts[index],
            is_human=is_human,
            photograph=photograph,
            behaviour=behaviour,
            reason=None if behaviour == "plain" else BEHAVIOURS[behaviour][1],
            ending=ending,
        )

    def rows(self) -> Iterator[Row]:  # type: ignore[override]
        return map(self.row, range(self.settings.num_urls))

    def picture(self, row: Row) -> bytes:  # type: ignore[override]
        if row.behaviour not in ODD_PICTURES:
            return row.photograph.jpeg
        return ODD_PICTURES[row.behaviour][1](np.asarray(Image.open(io.BytesIO(row.photograph.jpeg))), _QUALITY)
