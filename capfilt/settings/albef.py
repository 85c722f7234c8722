"""Settings of ALBEF's training."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.settings.checks import require, require_some_of
from capfilt.settings.training import TrainSettings


@dataclass(frozen=True, kw_only=True)
class AlbefTrainSettings(TrainSettings):
    """ALBEF pre-training (ITC + ITM + MLM with momentum distillation, ALBEF §3)."""

    learning_rate: float = 1e-4
    """Peak rate (ALBEF §3.5: 1e-4)."""
    min_learning_rate: float = 1e-5
    """Rate at the end of the cosine (ALBEF §3.5: 1e-5)."""
    max_steps: int = 20_000
    """Optimizer steps (ALBEF §3.5: 30 epochs in batches of 512, of 14.1M images some 830,000)."""
    warmup_steps: int = 1000
    """Linear warm-up from zero (ALBEF §3.5: 1,000 steps)."""
    weight_decay: float = 0.02
    """Decay of matrices (ALBEF §3.5: 0.02); vectors (norms, biases) have none."""
    beta2: float = 0.999
    """AdamW's second moment (ALBEF's released code: AdamW's own 0.999)."""
    random_crop: float = 0.2
    """Smallest share of the area a random resized crop keeps; 1 for no crop (ALBEF's released code: 0.2, with
    RandAugment, which is not done here)."""
    random_flip: bool = True
    """Mirror half of the images, as ALBEF's released code does; wrong where captions say left and right."""
    init: str = ""
    """ALBEF to go on from: what `train albef` saved, or the release's ALBEF.pth, with its momentum encoders and queue
    where it has them. Empty for a new one."""
    text_init: str = ""
    """New one: folder or hub id of BERT whose sizes, first layers and tokenizer are taken (ALBEF §3.1:
    google-bert/bert-base-uncased)."""
    vision_init: str = ""
    """New one: image encoder to start from, with its sizes: DeiT's .pth (ALBEF §3.1: deit_base_patch16_224) or another
    file in timm's layout, a folder or hub id of a ViT. Positions are interpolated to image_size_px."""
    tokenizer: str = ""
    """Folder or hub id of a BERT-style tokenizer. Needed where neither init nor text_init is given; empty with them."""
    losses: tuple[str, ...] = ("itc", "itm", "mlm")
    """Losses that are summed (ALBEF §3.2: all three)."""
    mlm_share: float = 0.15
    """MLM: share of the tokens that are to be found (ALBEF §3.2: 15%)."""
    momentum: float = 0.995
    """ITC, MLM: share of its old weights that the momentum model keeps in a step (ALBEF §3.5: 0.995); 0 for no momentum
    model: contrast is then within the batch, and MLM has no pseudo-labels."""
    queue_size: int = 65536
    """ITC: pairs of features of earlier steps that are contrasted with (ALBEF §3.5: 65,536)."""
    alpha: float = 0.4
    """ITC, MLM: weight of the momentum model in their targets (ALBEF §3.5: 0.4)."""
    alpha_epochs: float = 1.0
    """Epochs over which alpha rises from 0 (ALBEF §3.5 and its released code: the first)."""
    dropout: float = 0.1
    """New one: dropout in the text and fusion encoder (BERT: 0.1)."""
    max_text_tokens: int = 25
    """Longest text in tokens, special tokens included (ALBEF's released code: 25 in pre-training)."""
    image_size_px: int | None = None
    """Side of the square input; None: that of `init`, and 256 for a new one (ALBEF §3.5: 256 in pre-training, 384 in
    fine-tuning). Positions are interpolated where it differs from the start's."""
    patch_size_px: int = 16
    """From nothing: side of a patch."""
    vision_width: int = 768
    """From nothing: width of the image encoder."""
    vision_depth: int = 12
    """From nothing: blocks of the image encoder."""
    text_width: int = 768
    """From nothing: width of the text and fusion encoder."""
    text_depth: int = 6
    """New one: layers of the text encoder (ALBEF §3.1: BERT's first 6)."""
    fusion_depth: int = 6
    """New one: layers of the fusion encoder (ALBEF §3.1: BERT's last 6)."""
    max_positions: int = 512
    """From nothing: longest text the model can hold, in tokens."""
    embed_dim: int = 256
    """New one: width of ITC's embeddings (ALBEF §3.2: 256)."""
    head_width: int = 64
    """From nothing: width of an attention head."""
    save_original: bool = False
    """Write albef.pth too: everything in the original release's layout, which has attention heads of width 64."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_some_of("losses", self.losses, ("itc", "itm", "mlm"))
        require(0 < self.mlm_share < 1, "mlm_share", self.mlm_share, "more than 0, less than 1")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "0 (none) or more, less than 1")
        require(self.queue_size >= 1, "queue_size", self.queue_size, "at least 1")
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "0 to 1")
        require(self.alpha_epochs >= 0, "alpha_epochs", self.alpha_epochs, "0 or more")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "0 or more, less than 1")
        require(self.max_text_tokens >= 4, "max_text_tokens", self.max_text_tokens, "at least 4")
        side = self.image_size_px
        require(side is None or side >= 1, "image_size_px", side, "at least 1")
        sizes = ("patch_size_px", "vision_width", "vision_depth", "text_width", "text_depth")
        for name in (*sizes, "fusion_depth", "max_positions", "embed_dim", "head_width"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("vision_width", "text_width"):
            width = getattr(self, name)
            require(width % self.head_width == 0, name, width, f"a multiple of head_width ({self.head_width})")
        for name in ("text_init", "vision_init", "tokenizer"):
            value = getattr(self, name)
            require(not (self.init and value), name, value, "nothing, where init gives the model")
        require(not (self.text_init and self.tokenizer), "tokenizer", self.tokenizer, "nothing, with text_init's own")
