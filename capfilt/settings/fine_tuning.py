"""Settings of BLIP-2's fine-tuning for captions and for questions (BLIP-2 §4.2, §4.3).

Defaults are the paper's. "Table 9" and "Table 10" are those of its appendix, captions and questions with ViT-g. The
released configuration for COCO captions (`caption_coco_ft.yaml`) says the same of captions where a default names it;
what names a table alone was not checked against the paper's text. That configuration also crops (half of the area at
least) and mirrors the images: random_crop=0.5, random_flip=true, with which no features are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.settings.checks import DTYPES, require, require_one_of
from capfilt.settings.training import FrozenEncoderSettings


@dataclass(frozen=True, kw_only=True)
class Blip2TuningSettings(FrozenEncoderSettings):
    """What both share: the language model is frozen; Q-Former, projection and, where asked, image encoder train."""

    batch_size: int = 16
    """Images that a process works on at a time (released configuration: 16 on each GPU)."""
    learning_rate: float = 1e-5
    """Peak rate (released configuration: 1e-5, down to 0)."""
    warmup_steps: int = 1000
    """Linear warm-up from zero (released configuration: 1,000)."""
    beta2: float = 0.999
    """AdamW's second moment (Table 9 and 10: 0.999)."""
    image_size_px: int = 364
    """Side of the square images, for which positions are interpolated; 0 for the model's own."""
    train_image_encoder: bool = False
    """Train the image encoder too, as the paper does; it computes in float32 then, or as `autocast` says, and no
    features are kept."""
    image_encoder_decay: float = 0.95
    """Layer-wise decay of the image encoder's learning rate: its last block has this share of the rate, each block
    before it this share of the next one's; 1 for none (Table 9 and 10: 0.95 with some of the language models, others
    have 1 or 0.9)."""
    llm_dtype: str = "auto"
    """Precision of the frozen language model: auto (float32 on a CPU, bfloat16 on a GPU), float32, bfloat16 or
    float16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.image_size_px >= 0, "image_size_px", self.image_size_px, "at least 1, or 0 for the model's own")
        decay = self.image_encoder_decay
        require(0 < decay <= 1, "image_encoder_decay", decay, "more than 0, at most 1 (none)")
        require_one_of("llm_dtype", self.llm_dtype, DTYPES)
        if self.train_image_encoder:
            is_plain = self.encoder_dtype in ("auto", "float32")
            require(is_plain, "encoder_dtype", self.encoder_dtype, "auto or float32 where the image encoder trains")
            directory = self.feature_cache_dir
            require(directory is None, "feature_cache_dir", directory, "None where the image encoder trains")


@dataclass(frozen=True, kw_only=True)
class Blip2CaptionsSettings(Blip2TuningSettings):
    """BLIP-2 fine-tuned for captions (BLIP-2 §4.2)."""

    max_steps: int = 11_000
    """Optimizer steps (5 epochs over COCO's 567,000 training captions in batches of 256: 11,070)."""
    accumulation_steps: int = 16
    """Batches whose gradients make one step (Table 9: 256 images in a step; released configuration: 16 on each of 16
    GPUs)."""
    prompt: str = "a photo of"
    """Text before every caption, without loss (released configuration: "a photo of "); ask for captions with it."""


@dataclass(frozen=True, kw_only=True)
class Blip2VqaSettings(Blip2TuningSettings):
    """BLIP-2 fine-tuned for questions about images (BLIP-2 §4.3)."""

    max_steps: int = 25_700
    """Optimizer steps (5 epochs over the 658,000 questions of VQAv2's train and val in batches of 128: 25,708; the
    paper adds Visual Genome's)."""
    accumulation_steps: int = 8
    """Batches whose gradients make one step (Table 10: 128 questions in a step)."""
    image_size_px: int = 490
    """Side of the square images, for which positions are interpolated (Table 10: 490); 0 for the model's own."""
    prompt: str = ""
    """Frame with {} for the question, without loss; empty for the model's: "Question: {} Answer:" for OPT, "Question:
    {} Short answer:" for T5 (BLIP-2 §4.1; Table 10 has the first)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.prompt or "{}" in self.prompt, "prompt", self.prompt, "a text with {} for the question")
