"""Settings of what comes before training: download, captions, ranks, filter.

`fingerprint_fields` of a class names the settings that change the stage's output (workers, paths and batch sizes do
not, so they may change between a run and its resumption).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from capfilt.settings.checks import DECODINGS, DTYPES, RESIZERS, require, require_device, require_one_of


@dataclass(frozen=True, kw_only=True)
class DownloadSettings:
    """URL table → WebDataset shards (img2dataset's reader, resizer and formats; a guarded fetch)."""

    fingerprint_fields: ClassVar[tuple[str, ...]] = (
        "url_column", "caption_column", "samples_per_shard", "num_shards", "image_size_px", "jpeg_quality",
        "max_body_bytes", "max_pixels", "max_aspect_ratio", "max_caption_bytes",
    )  # fmt: skip

    url_column: str = "url"
    """Column of the table that holds the address."""
    caption_column: str = "text"
    """Column of the table that holds the web caption."""
    samples_per_shard: int = 1000
    """Rows of the table that go into one shard."""
    num_shards: int | None = None
    """Number of shards; replaces samples_per_shard when given."""
    image_size_px: int = 512
    """Shorter edges above this are scaled down to it, aspect kept; smaller images stay as they are."""
    jpeg_quality: int = 95
    """JPEG quality of a re-encoded image (img2dataset's default)."""
    num_processes: int = 2
    """Shards downloaded at the same time, each in a supervised process of its own."""
    num_threads: int = 32
    """Connections at the same time in one shard."""
    connections_per_host: int = 16
    """Connections at the same time to one host, in one shard."""
    robots_txt: bool = False
    """Ask every site for its robots.txt, and for nothing that it forbids."""
    timeout_seconds: float = 30.0
    """Wall clock over one whole exchange, redirects included."""
    retries: int = 0
    """Further tries of an address whose first try failed in a way that may pass."""
    max_body_bytes: int = 20_000_000
    """Longest body read of one address."""
    max_redirects: int = 5
    """Redirects followed; the address is checked and pinned at every hop."""
    max_pixels: int = 50_000_000
    """Largest picture decoded, by the size its header states."""
    max_aspect_ratio: float = 20.0
    """Longest edge over shortest edge at most."""
    max_caption_bytes: int = 8192
    """Longest web caption kept, in UTF-8 bytes."""
    ports: tuple[int, ...] = (80, 443)
    """Ports that may be addressed; any port when private addresses are allowed."""
    allow_private_addresses: bool = False
    """Opens loopback, private and other reserved networks, for a site of one's own."""

    def __post_init__(self) -> None:
        require(self.samples_per_shard >= 1, "samples_per_shard", self.samples_per_shard, "at least 1")
        require(self.num_shards is None or self.num_shards >= 1, "num_shards", self.num_shards, "at least 1")
        require(self.timeout_seconds > 0, "timeout_seconds", self.timeout_seconds, "more than 0 seconds")
        require(self.image_size_px >= 16, "image_size_px", self.image_size_px, "at least 16 pixels")
        require(1 <= self.jpeg_quality <= 100, "jpeg_quality", self.jpeg_quality, "1 to 100")
        require(self.num_processes >= 1, "num_processes", self.num_processes, "at least 1")
        require(self.num_threads >= 1, "num_threads", self.num_threads, "at least 1")
        per_host = self.connections_per_host
        require(per_host >= 1, "connections_per_host", per_host, "at least 1")


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """BLIP captioner (BLIP §3, CapFilt; BLIP-2 §3.4 for ten captions)."""

    fingerprint_fields: ClassVar[tuple[str, ...]] = (
        "num_captions", "decoding", "top_p", "top_k", "temperature", "repetition_penalty", "num_beams",
        "min_length", "max_length", "prompt", "seed", "resizer",
    )  # fmt: skip

    captioner: str = ""
    """Folder or hub id of a BLIP captioner (transformers layout), an original .pth, or `embedded`."""
    num_captions: int = 10
    """Captions drawn for each image (BLIP-2 §3.4: ten)."""
    decoding: str = "nucleus"
    """nucleus, greedy, beam or top-k. Greedy and beam give one caption an image."""
    top_p: float = 0.9
    """Nucleus: smallest set of tokens with this probability (BLIP §4.2)."""
    top_k: int = 50
    """Tokens considered at each step; 0 for all. transformers applies 50 unless told otherwise."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    repetition_penalty: float = 1.1
    """Divides (multiplies, if negative) the logits of tokens already written (BLIP: 1.1)."""
    num_beams: int = 3
    """Beams when decoding is beam (BLIP: 3)."""
    min_length: int = 5
    """Shortest text in tokens, prompt included (BLIP's released demo: 5)."""
    max_length: int = 20
    """Longest text in tokens, prompt included (BLIP's released demo: 20)."""
    prompt: str | None = None
    """Text the captions continue; None takes the model's own ("a picture of " for BLIP)."""
    resizer: str = "torchvision"
    """What resizes pictures: torchvision (as transformers' processor does, to the bit) or pillow (as BLIP's released
    code does: a few values differ by one level of 255, where a picture becomes wider and less high one in 1,000 by up
    to six). Captioner and filter share an image encoder only where it is the same."""
    seed: int = 0
    """With the sample's key and the caption's index it fixes every draw."""
    batch_size: int | None = None
    """Images captioned at a time; does not change the captions, on a GPU but for rounding. None: 32, with CUDA as
    many as fit into a part of its free memory."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: str = "auto"
    """auto (bfloat16 on a GPU and on a CPU that is fast at it, else float32), float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        require_one_of("decoding", self.decoding, DECODINGS)
        require(self.num_captions >= 1, "num_captions", self.num_captions, "at least 1")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0, at most 1")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        require(self.temperature > 0, "temperature", self.temperature, "more than 0")
        require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "more than 0")
        require(self.num_beams >= 1, "num_beams", self.num_beams, "at least 1")
        require(1 <= self.min_length <= self.max_length, "min_length", self.min_length, "1 to max_length")
        require(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require_device(self.device)
        require_one_of("dtype", self.dtype, DTYPES)
        require_one_of("resizer", self.resizer, RESIZERS)
        single = self.decoding in ("greedy", "beam")
        require(not single or self.num_captions == 1, "num_captions", self.num_captions, f"1 with {self.decoding}")


@dataclass(frozen=True, kw_only=True)
class RankSettings:
    """CLIP similarity and top K (BLIP-2 §3.4: ViT-L/14, top two)."""

    fingerprint_fields: ClassVar[tuple[str, ...]] = ("keep", "include_web")

    clip_model: str = "ViT-L-14"
    """open_clip model name, or `embedded`."""
    clip_weights: str | None = None
    """open_clip tag (`openai`) or a local file; None takes `openai`."""
    keep: int = 2
    """Captions kept for each image, best CLIP score first."""
    include_web: bool = False
    """Rank the web caption among the synthetic ones (BLIP-2's recipe) instead of passing it to the filter."""
    batch_size: int | None = None
    """Images scored at a time; does not change the scores, on a GPU but for rounding. None: 32, with CUDA as many as
    fit into a part of its free memory."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: str = "auto"
    """auto (bfloat16 on a GPU and on a CPU that is fast at it, else float32), float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        require(self.keep >= 1, "keep", self.keep, "at least 1")
        require(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require_device(self.device)
        require_one_of("dtype", self.dtype, DTYPES)


@dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """ITM head (BLIP §3.3: a text is noisy when the head says the pair does not match)."""

    fingerprint_fields: ClassVar[tuple[str, ...]] = ("first_token", "resizer")

    filter_model: str = ""
    """Folder or hub id of a BLIP ITM model (transformers layout), an original .pth, or `embedded`."""
    threshold: float = 0.5
    """Pairs with a lower ITM score are dropped (BLIP's author: 0.5 on softmax(logits)[1])."""
    first_token: str = "enc"
    """First text token: `enc` ([ENC], as trained) or `cls` (as transformers feeds it)."""
    resizer: str = "torchvision"
    """What resizes pictures: torchvision (as transformers' processor does, to the bit) or pillow (as BLIP's released
    code does: a few values differ by one level of 255, where a picture becomes wider and less high one in 1,000 by up
    to six). Captioner and filter share an image encoder only where it is the same."""
    batch_size: int | None = None
    """Images scored at a time; does not change the scores, on a GPU but for rounding. None: 32, with CUDA as many as
    fit into a part of its free memory."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: str = "auto"
    """auto (bfloat16 on a GPU and on a CPU that is fast at it, else float32), float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        require(0 <= self.threshold <= 1, "threshold", self.threshold, "0 to 1")
        require_one_of("first_token", self.first_token, ("enc", "cls"))
        require_one_of("resizer", self.resizer, RESIZERS)
        require(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require_device(self.device)
        require_one_of("dtype", self.dtype, DTYPES)
