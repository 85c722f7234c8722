"""Settings of the training commands: `TrainSettings` is what all share, each class below is one training."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.settings.checks import DTYPES, require, require_device, require_one_of, require_some_of

IMAGE_ENCODER_LAYERS = ("auto", "second-last", "last")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What every training command shares."""

    max_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 64
    """Images that a process works on at a time; a step has batch_size · accumulation_steps · processes of them."""
    accumulation_steps: int = 1
    """Batches whose gradients make one step, each with the same weight, however many words its texts have; contrast is
    within a batch."""
    learning_rate: float = 1e-4
    """Peak rate (BLIP-2 §3.4: 1e-4)."""
    min_learning_rate: float = 0.0
    """Rate at the end of the cosine."""
    warmup_steps: int = 100
    """Linear warm-up from zero."""
    optimizer: str = "adamw"
    """adamw (all papers), or muon: small models started from nothing learn in a fraction of the steps."""
    weight_decay: float = 0.05
    """Decay of matrices; vectors (norms, biases) have none."""
    beta2: float = 0.98
    """AdamW's second moment (BLIP-2: 0.98)."""
    clip_grad_norm: float = 1.0
    """Global norm at which gradients are clipped; 0 for none."""
    autocast: str = "float32"
    """Precision of matrix products: float32, bfloat16, float16 with scaled losses, or auto: bfloat16 where the device
    is fast at it, else float32; as begun where a training goes on. The weights stay float32. `accelerate launch
    --mixed_precision` goes before float32 and auto."""
    compile: bool = False
    """Compile the layers with torch.compile; the first steps are slow."""
    recompute: bool = False
    """Gradient checkpointing: run each layer again in the backward pass instead of keeping what it computed."""
    sharding: str = "none"
    """Of several processes: none (each has all weights, DDP) or full (each has its share of them, FSDP)."""
    run_weights: tuple[float, ...] = ()
    """How often each run's images are shown in an epoch, in the order of the runs; empty for once each. A fraction
    shows a part of them, another one in every epoch."""
    random_crop: float = 1.0
    """Smallest share of the area a random resized crop keeps; 1 for no crop."""
    random_flip: bool = False
    """Mirror half of the images; wrong where captions say left and right."""
    seed: int = 0
    """Fixes initialisation, order and draws."""
    save_every_steps: int = 500
    """Steps between two checkpoints."""
    log_every_steps: int = 20
    """Steps between two lines of metrics."""
    tensorboard: bool = False
    """Write curves for TensorBoard too, into the output's tensorboard/."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""

    def __post_init__(self) -> None:
        require(self.max_steps >= 1, "max_steps", self.max_steps, "at least 1")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "at least 2 (contrast needs another pair)")
        require(self.accumulation_steps >= 1, "accumulation_steps", self.accumulation_steps, "at least 1")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        lowest = self.min_learning_rate
        require(0 <= lowest <= self.learning_rate, "min_learning_rate", lowest, "0 to learning_rate")
        require_one_of("optimizer", self.optimizer, ("adamw", "muon"))
        require_one_of("autocast", self.autocast, DTYPES)
        require_one_of("sharding", self.sharding, ("none", "full"))
        require(all(w > 0 for w in self.run_weights), "run_weights", self.run_weights, "more than 0 each")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.beta2 < 1, "beta2", self.beta2, "0 or more, less than 1")
        require(self.clip_grad_norm >= 0, "clip_grad_norm", self.clip_grad_norm, "0 (none) or more")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        require(0 < self.random_crop <= 1, "random_crop", self.random_crop, "more than 0, at most 1")
        require(self.save_every_steps >= 1, "save_every_steps", self.save_every_steps, "at least 1")
        require(self.log_every_steps >= 1, "log_every_steps", self.log_every_steps, "at least 1")
        require_device(self.device)


@dataclass(frozen=True, kw_only=True)
class BlipTrainSettings(TrainSettings):
    """BLIP pre-training (ITC + ITM + LM, BLIP §3.2), and what fine-tuning its captioner and filter share with it.

    Deviation: the learning rate falls as a cosine, by step; BLIP's by a tenth an epoch.
    """

    learning_rate: float = 3e-4
    """Peak rate (BLIP §4.1: 3e-4 with ViT-B, 2e-4 with ViT-L)."""
    beta2: float = 0.999
    """AdamW's second moment (BLIP's released code: torch's own)."""
    init: str = ""
    """What training starts from. Pre-training: the output of `train blip` only; empty for nothing. Fine-tuning: that, a
    BLIP folder or hub id, or `embedded`; in a recipe also `@blip`, what its section [train.blip] trained."""
    text_init: str = ""
    """Pre-training: folder or hub id of a BERT whose weights text encoder and decoder start from, with its sizes and
    tokenizer (BLIP §4.1: google-bert/bert-base-uncased); cross-attention starts at random."""
    vision_init: str = ""
    """Pre-training: a published Vision Transformer that the image encoder starts from, with its sizes (BLIP §4.1): file
    in timm's layout, folder or hub id of transformers' ViT or timm's."""
    tokenizer: str = ""
    """Folder or hub id of a BERT-style tokenizer; [DEC] and [ENC] are added where it lacks them (BLIP's released
    code: to bert-base-uncased). Needed where init and text_init are empty."""
    prompt: str = ""
    """Captioner fine-tuning: text before every caption, without loss."""
    dropout: float = 0.1
    """Dropout in text encoder and decoder (BLIP's released configurations: 0.1; here not on attention weights, so that
    the fused kernels can be used)."""
    label_smoothing: float = 0.1
    """LM: share of the target spread over the vocabulary (BLIP's released code: 0.1)."""
    losses: tuple[str, ...] = ("itc", "itm", "lm")
    """Pre-training: losses that are summed (BLIP §3.2: all three); fine-tuning has its own."""
    momentum: float = 0.995
    """ITC: share of its old weights that a momentum encoder keeps in a step (ALBEF §3.5, BLIP: 0.995); 0 for no
    momentum encoders, whose contrast is then within the batch."""
    queue_size: int = 57600
    """ITC: pairs of features of earlier steps that are contrasted with (BLIP's released code: 57,600)."""
    alpha: float = 0.4
    """ITC: weight of the momentum encoders' similarities in its targets (ALBEF §3.5, BLIP: 0.4)."""
    alpha_epochs: float = 2.0
    """ITC: epochs over which alpha rises from 0 (BLIP's released code: 2)."""
    captions_per_image: int = 1
    """LM: kept captions of an image that a step decodes, its features computed once (BLIP: one)."""
    known_false: bool = False
    """ITM: the hard negative text of an image is one that its manifest drops as `known_false`, where there is one
    (BLIP: always another image's)."""
    max_text_tokens: int = 30
    """Longest text in tokens, special tokens included (BLIP's released code: 30 in pre-training)."""
    image_size_px: int | None = None
    """Side of the square input; None: that of what training starts from, and 224 from nothing (BLIP §4.1: 224 in
    pre-training, 384 in fine-tuning). Positions are interpolated where it differs from the start's."""
    patch_size_px: int = 16
    """From nothing: side of a patch."""
    vision_width: int = 768
    """From nothing: width of the image encoder."""
    vision_depth: int = 12
    """From nothing: blocks of the image encoder."""
    text_width: int = 768
    """From nothing: width of the text encoder and decoder."""
    text_depth: int = 12
    """From nothing: layers of the text encoder and decoder."""
    max_positions: int = 512
    """From nothing: longest text the model can hold, in tokens."""
    embed_dim: int = 256
    """From nothing: width of ITC's embeddings."""
    head_width: int = 64
    """From nothing: width of an attention head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dropout", "label_smoothing"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 or more, less than 1")
        require_some_of("losses", self.losses, ("itc", "itm", "lm"))
        require(0 <= self.momentum < 1, "momentum", self.momentum, "0 (none) or more, less than 1")
        require(self.queue_size >= 1, "queue_size", self.queue_size, "at least 1")
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "0 to 1")
        require(self.alpha_epochs >= 0, "alpha_epochs", self.alpha_epochs, "0 or more")
        require(self.captions_per_image >= 1, "captions_per_image", self.captions_per_image, "at least 1")
        require(self.max_text_tokens >= 4, "max_text_tokens", self.max_text_tokens, "at least 4")
        side = self.image_size_px
        require(side is None or side >= 1, "image_size_px", side, "at least 1")
        sizes = ("patch_size_px", "vision_width", "vision_depth", "text_width", "text_depth")
        for name in (*sizes, "max_positions", "embed_dim", "head_width"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("vision_width", "text_width"):
            width = getattr(self, name)
            require(width % self.head_width == 0, name, width, f"a multiple of head_width ({self.head_width})")


@dataclass(frozen=True, kw_only=True)
class CaptionerTrainSettings(BlipTrainSettings):
    """Fine-tuning of a captioner by LM (BLIP §3.3, §5.2)."""

    learning_rate: float = 1e-5
    """Peak rate (BLIP's released code for captions: 1e-5 with ViT-B, 2e-6 with ViT-L)."""
    prompt: str = "a picture of "
    """Text before every caption, without loss (BLIP's released code: "a picture of ")."""
    max_text_tokens: int = 40
    """Longest text in tokens, prompt and special tokens included (BLIP's released code: 40)."""


@dataclass(frozen=True, kw_only=True)
class FilterTrainSettings(BlipTrainSettings):
    """Fine-tuning of a filter by ITC and ITM (BLIP §3.3, §5.1)."""

    learning_rate: float = 1e-5
    """Peak rate (BLIP's released code for retrieval: 1e-5 with ViT-B, 5e-6 with ViT-L)."""
    alpha_epochs: float = 1.0
    """ITC: epochs over which alpha rises from 0 (BLIP's released code for retrieval: 1)."""
    max_text_tokens: int = 35
    """Longest text in tokens, special tokens included (BLIP's released code for retrieval: 35)."""


@dataclass(frozen=True, kw_only=True)
class FrozenEncoderSettings(TrainSettings):
    """What the trainings of BLIP-2 share: an image encoder that is frozen, and a Q-Former after it."""

    image_encoder: str = ""
    """Frozen image encoder: a folder or hub id of a CLIP, BLIP or BLIP-2, open_clip:NAME:WEIGHTS, a .pth of EVA-CLIP,
    or `embedded`. Empty where `init` has one."""
    encoder_dtype: str = "auto"
    """Precision of the frozen image encoder: auto (float32 on a CPU, bfloat16 on a GPU), float32, bfloat16 or
    float16."""
    dropout: float = 0.1
    """Dropout in the Q-Former (BERT: 0.1)."""
    feature_cache_bytes: int = 4 << 30
    """Features of the frozen image encoder are computed once and held in memory up to this size; 0 for never."""
    feature_cache_dir: str | None = None
    """Directory where those features are kept instead, whatever their size, for this training and later ones; None for
    memory. Without random crops and flips only."""
    feature_cache_dtype: str = "auto"
    """Precision of the features in memory and on disk: auto (the image encoder's own), float32, bfloat16, float16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.dropout < 1, "dropout", self.dropout, "0 or more, less than 1")
        for name in ("encoder_dtype", "feature_cache_dtype"):
            require_one_of(name, getattr(self, name), DTYPES)
        directory, varied = self.feature_cache_dir, self.random_crop < 1.0 or self.random_flip
        if directory is not None:
            require(bool(directory), "feature_cache_dir", directory, "a directory, or to be left out")
            expected = "None with random_crop or random_flip: no image stays as it is"
            require(not varied, "feature_cache_dir", directory, expected)


@dataclass(frozen=True, kw_only=True)
class QFormerSettings(FrozenEncoderSettings):
    """What both stages of BLIP-2 share: the frozen image encoder, and the Q-Former where it is a new one."""

    image_encoder: str = ""
    """Frozen image encoder (BLIP-2 §3.2: CLIP ViT-L/14 or EVA-CLIP ViT-g/14): a folder or hub id of a CLIP, BLIP or
    BLIP-2, open_clip:NAME:WEIGHTS, a .pth of EVA-CLIP, or `embedded`; in a recipe also `@captioner` or `@filter`, what
    an earlier section trained. Empty where `init` has one."""
    image_encoder_layer: str = "auto"
    """Block whose output are the image features: second-last (BLIP-2 §3.2), last, or auto: the second-last of a CLIP
    and an EVA-CLIP (as published with BLIP-2 it lacks the last one already), the last of a BLIP."""
    image_size_px: int | None = None
    """Side of the square images; None for the image encoder's own. Positions are interpolated for another."""
    qformer_init: str = ""
    """Folder or hub id of BERT (BLIP-2 §3.1: google-bert/bert-base-uncased) or of a BLIP model, whose text encoder
    and tokenizer a new Q-Former starts from; in a recipe also `@captioner` or `@filter`. Empty takes those of
    image_encoder."""
    init_weights: bool = True
    """Start from qformer_init's weights; otherwise take its sizes and tokenizer only, weights at random."""
    init_cross_attention: bool = False
    """Start from BLIP's cross-attention too, where qformer_init has one; BLIP-2 draws it at random."""
    num_queries: int = 32
    """Query tokens (BLIP-2 §3.1: 32)."""
    cross_attention_every: int = 2
    """Every n-th layer attends to the image (BLIP-2 §3.1: every other)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_queries >= 1, "num_queries", self.num_queries, "at least 1")
        require(self.cross_attention_every >= 1, "cross_attention_every", self.cross_attention_every, "at least 1")
        size = self.image_size_px
        require_one_of("image_encoder_layer", self.image_encoder_layer, IMAGE_ENCODER_LAYERS)
        require(size is None or size >= 1, "image_size_px", size, "at least 1")

    def refuse_given(self, *names: str) -> None:
        """UsageError for one of the settings `names` that is given where `init` has what it says already."""
        for name in names:
            value = getattr(self, name)
            require(value == getattr(type(self), name), name, value, "to be left out with init, whose sizes hold")


@dataclass(frozen=True, kw_only=True)
class Stage1Settings(QFormerSettings):
    """BLIP-2 stage 1: the Q-Former on a frozen image encoder (BLIP-2 §3.2)."""

    init: str = ""
    """Stage-1 model to go on from: what `train stage1` saved, a folder or hub id of a Blip2ForImageTextRetrieval (its
    temperature and head of ITG are new then), or LAVIS's blip2_pretrained.pth. Its sizes hold. Empty for a new one."""
    embed_dim: int = 256
    """Width of ITC's embeddings (released code: 256)."""
    max_text_tokens: int = 32
    """Longest text in tokens, special tokens included (released code: 32)."""
    losses: tuple[str, ...] = ("itc", "itm", "itg")
    """Losses that are summed (BLIP-2 §3.2: all three; Table 6 leaves out itg)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_some_of("losses", self.losses, ("itc", "itm", "itg"))
        require(self.max_text_tokens >= 4, "max_text_tokens", self.max_text_tokens, "at least 4")
        if self.init:
            self.refuse_given("num_queries", "cross_attention_every", "embed_dim", "init_cross_attention")


@dataclass(frozen=True, kw_only=True)
class Stage2Settings(QFormerSettings):
    """BLIP-2 stage 2: Q-Former and projection in front of a frozen language model (BLIP-2 §3.3).

    It starts from `init`, a stage-1 model (in a recipe `@stage1`, its default there: what the section [train.stage1]
    before it trained) or a stage-2 model to go on from. With an empty `init` the Q-Former is a new one on
    `image_encoder`, as stage 1 would begin with it: BLIP-2 without stage 1 (Figure 5).
    """

    min_learning_rate: float = 5e-5
    """Rate at the end of the cosine (BLIP-2 §3.4: 5e-5 in stage 2)."""
    whole_caption_share: float = 0.5
    """T5: share of captions trained with an empty prefix, so that a caption can be asked for without its first
    word. BLIP-2 has none."""
    llm_dtype: str = "auto"
    """Precision of the frozen language model: auto (float32 on a CPU, bfloat16 on a GPU), float32, bfloat16 or
    float16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("llm_dtype", self.llm_dtype, DTYPES)
        share = self.whole_caption_share
        require(0 <= share <= 1, "whole_caption_share", share, "0 to 1")

    def refuse_new_qformer(self) -> None:
        """UsageError for a setting of a new Q-Former, where `init` brings one (and all but some .pth an encoder)."""
        self.refuse_given(
            "qformer_init", "init_weights", "init_cross_attention", "num_queries", "cross_attention_every",
            "image_encoder_layer", "image_size_px",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClipTrainSettings(TrainSettings):
    """A small CLIP in open_clip's layout: a ResNet and a text transformer, trained by contrast (CLIP §2)."""

    max_steps: int = 1500
    """Optimizer steps."""
    batch_size: int = 128
    """Pairs in a step: each image is told from the texts of the others."""
    learning_rate: float = 2e-3
    """Peak rate; far above CLIP's 5e-4, as small models bear."""
    embed_dim: int = 128
    """Width of the shared embedding."""
    image_size_px: int = 64
    """Edge of the square picture; a multiple of 32."""
    vision_stages: tuple[int, ...] = (1, 1, 1, 1)
    """Blocks in each of the ResNet's four stages (RN50: 3, 4, 6, 3)."""
    vision_width: int = 16
    """Channels of the first stage (RN50: 64); the last one has 32 times as many."""
    text_width: int = 128
    """Width of the text transformer; a multiple of 32."""
    text_layers: int = 2
    """Layers of the text transformer."""
    context_length: int = 32
    """Longest text in tokens, start and end included (CLIP: 77)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        stages, side = self.vision_stages, self.image_size_px
        is_resnet = len(stages) == 4 and min(stages) >= 1
        require(is_resnet, "vision_stages", stages, "four numbers, at least 1 each")
        require(side >= 32 and side % 32 == 0, "image_size_px", side, "a multiple of 32")
        require(self.vision_width >= 2, "vision_width", self.vision_width, "at least 2")
        require(self.text_width % 32 == 0, "text_width", self.text_width, "a multiple of 32")
        require(self.text_layers >= 1, "text_layers", self.text_layers, "at least 1")
        require(self.context_length >= 4, "context_length", self.context_length, "at least 4")


@dataclass(frozen=True, kw_only=True)
class LlmTrainSettings(TrainSettings):
    """A small OPT or T5 in transformers' layout, pre-trained to go by what stands before a text."""

    architecture: str = "opt"
    """`opt` (decoder, LM loss) or `t5` (encoder-decoder, prefix LM)."""
    max_steps: int = 4000
    """Optimizer steps."""
    batch_size: int = 64
    """Texts in a step."""
    learning_rate: float = 2e-3
    """Peak rate; far above OPT's own, as small models bear."""
    width: int = 128
    """Width of the model; a multiple of 32, the width of an attention head."""
    depth: int = 4
    """Layers; T5 has as many in its encoder and in its decoder."""
    feed_forward: int = 512
    """Width of the feed-forward layers."""
    max_positions: int = 128
    """OPT: longest input in tokens, visual prompts included."""
    whole_caption_share: float = 0.5
    """T5: share of captions that the decoder writes from their first word."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("architecture", self.architecture, ("opt", "t5"))
        require(self.width >= 32 and self.width % 32 == 0, "width", self.width, "a multiple of 32")
        require(self.depth >= 1, "depth", self.depth, "at least 1")
        require(self.feed_forward >= 1, "feed_forward", self.feed_forward, "at least 1")
        require(self.max_positions >= 16, "max_positions", self.max_positions, "at least 16")
        share = self.whole_caption_share
        require(0 <= share <= 1, "whole_caption_share", share, "0 to 1")
