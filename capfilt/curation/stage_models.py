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
        from capfilt.curation.captioner import BlipCaptioner

        assert self.caption is not None
        return BlipCaptioner(self.caption)

    @cached_property
    def clip_scorer(self) -> Any:
        """Fills clip."""
        from capfilt.curation.scorers import SCORERS

        assert self.rank is not None
        return SCORERS["clip"](self.rank)

    @cached_property
    def itm_scorer(self) -> Any:
        """Fills itm."""
        from capfilt.curation.scorers import SCORERS

        assert self.filter is not None
        return SCORERS["itm"](self.filter)

    def of(self, stage: str) -> Any:
        """What fills a stage."""
        return getattr(self, MODELS[stage])

    @cached_property
    def vision_is_shared(self) -> bool:
        """Whether captioner and filter see a picture with the same image encoder, on the same device."""
        captioner, scorer = self.captioner, self.itm_scorer
        digest = getattr(scorer, "vision_digest", "")
        return bool(digest) and (digest, scorer.device) == (captioner.vision_digest, captioner.device)

    def share_vision(self) -> None:
        """Hold the image encoder once, where it is the same."""
        if self.vision_is_shared:
            self.itm_scorer.use_vision(self.captioner.vision)
