"""The miniature world's web site: scenes behind real HTTP, with the alt-text and the servers the web has.

In: `SiteSettings` (how many URLs, a seed, shares). Out: a server on loopback, the URL table a user would
start from, and, kept aside, the truth about every row.

    with WorldSite(SiteSettings(num_urls=2000)) as site:
        site.write_table("urls.parquet")
        site.write_truth("truth.parquet")
        ...
        site.truth(url).verdict

Everything follows from the seed; pictures are painted when they are asked for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from aiohttp import web

from capfilt.errors import UsageError
from capfilt.settings import DownloadSettings
from capfilt.settings.checks import MAX_WORLD_URLS
from capfilt.world.language import judge
from capfilt.world.scenes import SPLITS, Scene, draw_scene, render
from capfilt.world.web_pictures import MEDIA_TYPES, ODD_PICTURES, encode_picture
from capfilt.world.web_servers import ANSWERS, BEHAVIOURS
from capfilt.world.web_texts import CAPTION_WRITERS, strip_markup

CAPTION_SHARES: dict[str, float] = {
    "true": 0.32, "paraphrased": 0.14, "markup": 0.04, "one_fact_changed": 0.13, "other_image": 0.16,
    "shop": 0.07, "file_name": 0.05, "other_language": 0.05, "empty": 0.02, "overlong": 0.02,
}  # fmt: skip
"""Share of each kind of web caption; the first three, one half, are true."""

FIRST_SCENE = 2**40
"""Seeds of the site's scenes count from here: training draws scenes from smaller ones."""

MIN_EDGE_PX, MAX_EDGE_PX = 48, 256

_CACHED_ROWS = 1 << 15
_FOLDERS = ("photos", "img", "media/catalog", "wp-content/uploads/2021/07", "static/images", "gallery/large")
_WORDS = (
    "summer",
    "product",
    "view",
    "item",
    "IMG",
    "picture",
    "garden",
    "home",
    "detail",
    "cover",
    "b%C3%BCro",
)
_SILENT = logging.getLogger("capfilt.world.site")
_SILENT.setLevel(logging.CRITICAL)  # a client that hangs up in the middle is everyday life here
_PATH_INDEX = re.compile(r"-(\d+)\.(?:jpg|png|webp)$")


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """What the site serves."""

    num_urls: int = 2000
    """Rows of the URL table."""
    seed: int = 0
    """Fixes scenes, captions, pictures and misbehaviour."""
    split: str = "train"
    """Split the scenes are drawn from; `test` has pairs of colour and kind that training never shows."""
    caption_shares: Mapping[str, float] = field(default_factory=lambda: dict(CAPTION_SHARES))
    """Kind of web caption → share; the shares sum to 1."""
    behaviour_shares: Mapping[str, float] = field(
        default_factory=lambda: {name: share for name, (share, _) in BEHAVIOURS.items()}
    )
    """Behaviour of the server → share; what is left of 1 is plain."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_urls <= MAX_WORLD_URLS:
            raise UsageError(f"num_urls is {self.num_urls}; expected 1 to {MAX_WORLD_URLS}.")
        if self.split not in SPLITS:
            raise UsageError(f"split is {self.split!r}; expected one of {', '.join(SPLITS)}.")
        for shares, known in ((self.caption_shares, CAPTION_WRITERS), (self.behaviour_shares, BEHAVIOURS)):
            odd = sorted(set(shares) - set(known))
            if odd or min(shares.values(), default=0) < 0 or sum(shares.values()) > 1 + 1e-9:
                raise UsageError(f"Shares are {dict(shares)}; expected shares of {', '.join(known)} up to 1 in all.")
        if abs(sum(self.caption_shares.values()) - 1) > 1e-9:
            raise UsageError(f"Shares of captions sum to {sum(self.caption_shares.values()):g}; expected 1.")


@dataclass(frozen=True, slots=True)
class Truth:
    """What is so about one row of the table."""

    index: int
    """Row of the table."""
    url: str
    scene: Scene
    """What the picture shows."""
    web_caption: str | None
    """The alt-text as it stands in the table."""
    caption_kind: str
    """One of CAPTION_SHARES: how the alt-text was made."""
    verdict: str
    """true, false or unrelated: what the alt-text, without its markup, is to the picture."""
    wrong_facts: tuple[str, ...]
    """What a false text gets wrong."""
    behaviour: str
    """`plain` or one of BEHAVIOURS."""
    reason: str | None
    """Reason code with which a download under the default limits ends; None when a picture comes."""
    width_px: int
    height_px: int
    ending: str
    """jpg, png or webp."""
    quality: int
    """Of the JPEG or WebP encoder."""


class WorldSite:
    """The site as a context manager; its server runs in a thread of its own on loopback."""

    def __init__(self, settings: SiteSettings | None = None, *, port: int = 0) -> None:
        """Args:
        port: port to listen on; 0 for any free one. The table's addresses contain it, so that a download that
            is to be resumed after this process has ended needs a port of its own.
        """
        self.settings = settings or SiteSettings()
        seed, count = self.settings.seed, self.settings.num_urls
        self._kinds = _deal(self.settings.caption_shares, count, [seed, 1])
        shares = dict(self.settings.behaviour_shares)
        shares["plain"] = 1 - sum(shares.values())
        self._behaviours = _deal(shares, count, [seed, 2])
        self.port = port
        self._row = lru_cache(maxsize=_CACHED_ROWS)(self._draw_row)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def base_url(self) -> str:
        """Address of the site; without a port of its own it has one from its start on."""
        if self.port == 0:
            raise UsageError("The site has no address before it runs. Use it in a `with` block, or name a port.")
        return f"http://127.0.0.1:{self.port}"

    # --- rows -----------------------------------------------------------------------------------------------

    def row(self, index: int) -> Truth:
        """The truth about one row of the table."""
        return self._row(self.base_url, index)

    def _draw_row(self, base_url: str, index: int) -> Truth:
        kind, behaviour = self._kinds[index], self._behaviours[index]
        shown = self._original_of(index) if behaviour == "duplicate" else index
        seed = self.settings.seed
        scene = draw_scene(FIRST_SCENE + seed * MAX_WORLD_URLS + shown, self.settings.split)
        width, height, ending, quality = _draw_file(np.random.default_rng([seed, 3, shown]))
        ending = ODD_PICTURES[behaviour][0] if behaviour in ODD_PICTURES else ending
        rng = np.random.default_rng([seed, 4, index])
        text = CAPTION_WRITERS[kind](scene, rng)
        judgement = judge(strip_markup(text or ""), scene)
        url = f"{base_url}/{_pick(_FOLDERS, rng)}/{_pick(_WORDS, rng)}-{index}.{ending}"
        return Truth(
            index=index,
            url=url,
            scene=scene,
            web_caption=text,
            caption_kind=kind,
            verdict=judgement.verdict,
            wrong_facts=judgement.wrong_facts,
            behaviour=behaviour,
            reason=_expected_reason(behaviour, text),
            width_px=width,
            height_px=height,
            ending=ending,
            quality=quality,
        )

    def rows(self) -> Iterator[Truth]:
        """The truth about every row, in the order of the table."""
        return map(self.row, range(self.settings.num_urls))

    def truth(self, url: str) -> Truth:
        """The truth about an address of the table. Raises UsageError for any other."""
        match = _PATH_INDEX.search(url)
        if match is None or int(match[1]) >= self.settings.num_urls:
            raise UsageError(f"{url} is not an address of this site; expected one from its table.")
        return self.row(int(match[1]))

    def _original_of(self, index: int) -> int:
        """The row whose picture a duplicate shows: one that has a plain one, if there is any."""
        rng = np.random.default_rng([self.settings.seed, 5, index])
        for candidate in rng.integers(self.settings.num_urls, size=64):
            if self._behaviours[int(candidate)] == "plain":
                return int(candidate)
        return index

    # --- files ----------------------------------------------------------------------------------------------

    def write_table(self, path: str | Path) -> Path:
        """Write the URL table (columns url and text) as .parquet, .csv or .jsonl, by its name."""
        rows = [(row.url, row.web_caption) for row in self.rows()]
        table = pa.table({"url": [url for url, _ in rows], "text": pa.array([text for _, text in rows], pa.string())})
        return _write(table, Path(path))

    def write_truth(self, path: str | Path) -> Path:
        """Write the truth, a row for each row of the table, as .parquet, .csv or .jsonl, by its name."""
        rows = [
            {
                "url": row.url,
                "text": row.web_caption,
                "scene_seed": row.scene.seed,
                "split": self.settings.split,
                "caption_kind": row.caption_kind,
                "verdict": row.verdict,
                "wrong_facts": " ".join(row.wrong_facts),
                "behaviour": row.behaviour,
                "reason": row.reason,
                "width": row.width_px,
                "height": row.height_px,
            }
            for row in self.rows()
        ]
        return _write(pa.Table.from_pylist(rows), Path(path))

    def picture(self, row: Truth) -> bytes:
        """The file behind a row as the server sends it when it sends one."""
        pixels = render(row.scene, row.width_px, row.height_px)
        if row.behaviour in ODD_PICTURES:
            return ODD_PICTURES[row.behaviour][1](pixels, row.quality)
        return encode_picture(pixels, row.ending, row.quality)

    # --- server ---------------------------------------------------------------------------------------------

    def __enter__(self) -> WorldSite:
        started: threading.Event = threading.Event()
        problems: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(started, problems), name="world-site", daemon=True)
        self._thread.start()
        started.wait()
        if problems:
            raise UsageError(f"The site cannot listen on port {self.port}: {problems[0]}. Name another port.")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        assert self._thread is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self, started: threading.Event, problems: list[BaseException]) -> None:
        asyncio.run(self._serve(started, problems))

    async def _serve(self, started: threading.Event, problems: list[BaseException]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        application = web.Application()
        application.router.add_get("/{path:.+}", self._answer)
        runner = web.AppRunner(
            application, access_log=None, logger=_SILENT, handler_cancellation=True, shutdown_timeout=0.1
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", self.port, backlog=512)
            await site.start()
            self.port = runner.addresses[0][1]
        except OSError as error:
            problems.append(error)
        started.set()
        if not problems:
            await self._stop.wait()
        await runner.cleanup()
        for _ in range(10):  # connections that were cut off are closed in the loop's next rounds
            await asyncio.sleep(0.01)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        match = _PATH_INDEX.search(request.path)
        if match is None or int(match[1]) >= self.settings.num_urls:
            return web.Response(status=404, text="There is nothing here.")
        row = self.row(int(match[1]))
        return await ANSWERS[row.behaviour](request, lambda: self.picture(row), MEDIA_TYPES[row.ending], row.index)


# --- drawing ------------------------------------------------------------------------------------------------


def _deal(shares: Mapping[str, float], count: int, seed: list[int]) -> list[str]:
    """`count` names in the stated shares (rounded by largest remainder), shuffled."""
    names = list(shares)
    exact = np.array([shares[name] for name in names]) * count
    dealt = np.floor(exact + 1e-9).astype(int)
    for index in np.argsort(dealt - exact, kind="stable")[: count - int(dealt.sum())]:
        dealt[index] += 1
    cards = np.repeat(np.arange(len(names)), dealt)
    return [names[card] for card in np.random.default_rng(seed).permutation(cards)]


def _expected_reason(behaviour: str, text: str | None) -> str | None:
    if len((text or "").encode("utf-8")) > DownloadSettings.max_caption_bytes:
        return "caption_too_long"
    return BEHAVIOURS[behaviour][1] if behaviour != "plain" else None


def _draw_file(rng: np.random.Generator) -> tuple[int, int, str, int]:
    """Width, height, ending and quality of a picture: mostly small, of varied aspect."""
    edge = MIN_EDGE_PX * (MAX_EDGE_PX / MIN_EDGE_PX) ** (rng.random() ** 2)
    aspect = float(np.exp(rng.normal(0.1, 0.22)))
    width, height = (int(np.clip(edge * scale, MIN_EDGE_PX, MAX_EDGE_PX)) for scale in (aspect**0.5, aspect**-0.5))
    ending = str(rng.choice(["jpg", "png", "webp"], p=[0.6, 0.25, 0.15]))
    return width, height, ending, int(rng.integers(75, 96))


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _write(table: pa.Table, path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        pa_csv.write_csv(table, path)
    elif path.suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) for row in table.to_pylist())
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    else:
        raise UsageError(f"{path} ends in {path.suffix!r}; expected .parquet, .csv or .jsonl.")
    return path
