"""Settings of what trained models write: captions, continuations, answers.

None stands for the default of the model and the task, which capfilt/evaluate/writers.py lists with their sources.
"""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.settings.checks import DTYPES, require, require_device, require_one_of


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How a model writes texts of images."""

    prompt: str | None = None
    """Text that is continued; for answers the frame of the question, with {} for it."""
    num_beams: int | None = None
    """Beams of beam search; 1 is greedy."""
    min_new_tokens: int | None = None
    """Shortest text in tokens, prompt not counted."""
    max_new_tokens: int | None = None
    """Longest text in tokens, prompt not counted."""
    length_penalty: float | None = None
    """Beam search: a score is divided by length to this power; below 0 favours short texts. Of stage-2 models alone."""
    top_p: float | None = None
    """Nucleus sampling: smallest set of tokens with this probability (BLIP §4.2: 0.9); None searches, with no draws."""
    top_k: int = 50
    """Tokens considered at each draw; 0 for all. transformers applies 50 unless told otherwise."""
    temperature: float = 1.0
    """Divides the logits before a draw."""
    seed: int = 0
    """Fixes the draws: a captioner's of each image, a stage-2 model's of each batch of the same images."""
    batch_size: int | None = None
    """Images (or questions) at a time; None: 16 for stage 2, for captioners as `capfilt caption` chooses."""
    llm: str = ""
    """Language model of a LAVIS .pth, which has none: folder or hub id."""
    image_encoder: str = ""
    """Image encoder of a LAVIS .pth that was saved without: folder, hub id or file."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16; auto keeps what a stage-2 model was saved in."""

    def __post_init__(self) -> None:
        for name in ("num_beams", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        least, most = self.min_new_tokens, self.max_new_tokens
        require(least is None or least >= 0, "min_new_tokens", least, "0 or more")
        require(least is None or most is None or least <= most, "min_new_tokens", least, "at most max_new_tokens")
        require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "more than 0, at most 1")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        require(self.temperature > 0, "temperature", self.temperature, "more than 0")
        draws = self.top_p is not None
        require(draws or self.temperature == 1, "temperature", self.temperature, "1 without top_p, which makes it draw")
        beams, penalty = self.num_beams, self.length_penalty
        require(not draws or beams in (None, 1), "num_beams", beams, "no beams with top_p: it draws")
        require(not draws or penalty is None, "length_penalty", penalty, "none with top_p: it draws")
        require_device(self.device)
        require_one_of("dtype", self.dtype, DTYPES)
