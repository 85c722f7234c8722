"""The models behind the stages of curation: what makes captions, CLIP scores and ITM scores.

In: settings. Out: a captioner and scorers, each loaded when it is first needed and once.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from capfilt.settings import CaptionSettings, FilterSettings, RankSettings

MODELS = {"captions": "captioner", "clip": "clip_scorer", "itm": "itm_scorer"}
"""Stage → what fills it; the manifest needs no model."""


class StageModels:
    """The models of the stages asked for, each loaded once, when it is first needed.

    One object serves the passes over any number of runs with the same settings.
    """

    def __init__(
        self,
        caption: CaptionSettings | None = None,
        rank: RankSettings | None = None,
        filter: FilterSettings | None = None,  # noqa: A002 - the stage's name
    ) -> None:
        self.caption, self.rank, self.filter = caption, rank, filter

    @cached_property
    def captioner(self) -> Any:
        """Fills captions."""
        from capfilt.curate.captioner import BlipCaptioner

        assert self.caption is not None
        return BlipCaptioner(self.caption)

    @cached_property
    def clip_scorer(self) -> Any:
        """Fills clip."""
        from capfilt.curate.scorers import SCORERS

        assert self.rank is not None
        return SCORERS["clip"](self.rank)

    @cached_property
    def itm_scorer(self) -> Any:
        """Fills itm."""
        from capfilt.curate.scorers import SCORERS

        assert self.filter is not None
        return SCORERS["itm"](self.filter)

    def of(self, stage: str) -> Any:
        """What fills a stage."""
        return getattr(self, MODELS[stage])

    @cached_property
    def share_vision(self) -> bool:
        """Whether captioner and filter see a picture with the same image encoder; then it is held once."""
        digest = getattr(self.itm_scorer, "vision_digest", "")
        is_same = bool(digest) and digest == self.captioner.vision_digest
        if is_same:
            self.itm_scorer.use_vision(self.captioner.vision)
        return is_same
