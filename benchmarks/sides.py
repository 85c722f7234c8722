"""What is timed: capfilt's side of each piece of work, and what a user of transformers or open_clip would write.

In: the name of a piece of work, a side, and a `Case`. Out: a function that does one pass. The baselines are batched,
in inference mode and in the right dtype, as their documentation shows; both sides get the same weights, pictures
and texts.
Our side keeps freed memory, as the shard loop does once its models are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipProcessor,
)  # fmt: skip

from benchmarks.models import MAX_LENGTH, MIN_NEW_TOKENS, PROMPT_IDS, draw_pictures, read_end_bias, write_pictures
from capfilt.settings import EMBEDDED, CaptionSettings, FilterSettings, RankSettings
from capfilt.weights.blip import BLIP_PROMPT
from capfilt.weights.find import find_embedded
from capfilt.weights.host_memory import keep_freed_memory
from capfilt.weights.model_files import read_config

NUM_CAPTIONS = 10
TEXTS = (
    "a red bicycle leaning on a white wall", "two dogs running along the beach at sunset",
    "a bowl of soup with bread beside it on a wooden table", "people waiting for a train", "an old church",
    "a man in a blue jacket rides a horse through the snow", "three boats in a small harbour",
    "a black cat asleep on a sofa", "a plate of fruit", "children playing football in a park near the river",
    "a busy street with many cars and tall buildings", "a lighthouse on a rock above the sea",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What a side is built for."""

    models: Path
    """Folder of `benchmarks.models`."""
    size: str
    """base, large or embedded."""
    dtype: str
    """float32 or bfloat16."""
    batch_size: int
    num_texts: int = 3
    num_images: int = 8
    """Of a pass over a shard."""
    realistic_ends: bool = False
    """Captions end by themselves, not at their longest."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """As torch has it."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]

    @property
    def captioner(self) -> str:
        """Folder of the captioner."""
        return self._folder("captioner")

    @property
    def filter(self) -> str:
        """Folder of the ITM filter."""
        return self._folder("filter")

    def _folder(self, kind: str) -> str:
        return str(find_embedded(kind) if self.is_embedded else self.models / f"{kind}-{self.size}")

    @property
    def is_embedded(self) -> bool:
        """The small trained models of the package."""
        return self.size == "embedded"

    @property
    def clip(self) -> tuple[str, str | None]:
        """open_clip's name of the CLIP, and its weights."""
        if self.is_embedded:
            return f"local-dir:{find_embedded('clip')}", None
        return "ViT-L-14", str(self.models / "clip.safetensors")

    @property
    def min_length(self) -> int:
        """Shortest caption, prompt included."""
        if self.is_embedded:
            return CaptionSettings.min_length
        return len(PROMPT_IDS) + MIN_NEW_TOKENS if self.realistic_ends else MAX_LENGTH

    def caption_settings(self) -> CaptionSettings:
        """Ten captions by nucleus sampling."""
        return CaptionSettings(
            captioner=self.captioner, num_captions=NUM_CAPTIONS, min_length=self.min_length,
            max_length=CaptionSettings.max_length if self.is_embedded else MAX_LENGTH,
            dtype=self.dtype, batch_size=self.batch_size, device="cpu",
        )  # fmt: skip

    def rank_settings(self) -> RankSettings:
        """CLIP scores; the best two are kept."""
        model, weights = (EMBEDDED, None) if self.is_embedded else self.clip
        return RankSettings(
            clip_model=model, clip_weights=weights, dtype=self.dtype, batch_size=self.batch_size, device="cpu"
        )

    def filter_settings(self) -> FilterSettings:
        """ITM scores."""
        return FilterSettings(filter_model=self.filter, dtype=self.dtype, batch_size=self.batch_size, device="cpu")


Pass = Callable[[], object]


# --- decoding -----------------------------------------------------------------------------------------------


def our_decoding(case: Case) -> Pass:
    """Image features to ten texts of each."""
    from capfilt.models.decoding import write_captions
    from capfilt.models.med import Captioner
    from capfilt.models.packed import pack_linears
    from capfilt.weights.blip import load_blip

    model = load_blip(case.captioner, "captioner", device=torch.device("cpu"), dtype=case.torch_dtype).model
    assert isinstance(model, Captioner)
    if case.realistic_ends:
        model.head.vocabulary.bias[model.decoder.config.sep_token_id] += read_end_bias(Path(case.captioner))
    features = read_features(case)
    del model.vision
    pack_linears(model)
    keep_freed_memory()
    keys, settings = [str(number) for number in range(case.batch_size)], case.caption_settings()
    return lambda: write_captions(model, features, keys, PROMPT_IDS, settings)


def transformers_decoding(case: Case) -> Pass:
    """The text decoder's `generate`, ten sequences returned for each image."""
    model, features = _transformers_captioner(case), read_features(case)
    del model.vision_model
    return lambda: _generate(model, features, case)


def read_features(case: Case) -> Tensor:
    """Image features (B, P + 1, D) that both sides decode from."""
    return load_file(case.models / f"features-{case.size}.safetensors")["features"][: case.batch_size].to(
        case.torch_dtype
    )


def _transformers_captioner(case: Case) -> Any:
    model: Any = BlipForConditionalGeneration.from_pretrained(case.captioner, dtype=case.torch_dtype).eval()
    if case.realistic_ends:
        with torch.no_grad():
            bias = model.text_decoder.cls.predictions.bias
            bias[model.config.text_config.sep_token_id] += read_end_bias(Path(case.captioner))
    return model


@cache
def prompt_ids(case: Case) -> list[int]:
    """[DEC] and the prompt; the embedded models have a vocabulary of their own."""
    if not case.is_embedded:
        return PROMPT_IDS
    config = read_config(Path(case.captioner))
    start = config["text_config"]["bos_token_id"]
    return [start, *_tokenizer(case.captioner)(config.get("capfilt_prompt", BLIP_PROMPT)).input_ids[1:-1]]


@torch.inference_mode()
def _generate(model: Any, features_BPD: Tensor, case: Case) -> Tensor:
    settings = case.caption_settings()
    return model.text_decoder.generate(
        input_ids=torch.tensor([prompt_ids(case)]).expand(len(features_BPD), -1), encoder_hidden_states=features_BPD,
        encoder_attention_mask=torch.ones(features_BPD.shape[:2], dtype=torch.long),
        eos_token_id=model.config.text_config.sep_token_id, pad_token_id=model.config.text_config.pad_token_id,
        do_sample=True, top_p=settings.top_p, top_k=settings.top_k, min_length=case.min_length,
        max_length=settings.max_length, num_return_sequences=NUM_CAPTIONS,
        repetition_penalty=settings.repetition_penalty,
    )  # fmt: skip


# --- captioning, pixels to texts ------------------------------------------------------------------------


def our_captioning(case: Case) -> Pass:
    """Pictures to ten texts."""
    from capfilt.curation.captioner import BlipCaptioner

    captioner, pictures = BlipCaptioner(case.caption_settings()), draw_pictures(case.batch_size)
    keep_freed_memory()
    keys = [str(number) for number in range(len(pictures))]
    return lambda: captioner.caption(pictures, keys)


def transformers_captioning(case: Case) -> Pass:
    """Processor, `generate`, decoded texts."""
    write_captions, pictures = transformers_captioner(case), draw_pictures(case.batch_size)
    return lambda: write_captions(pictures)


def transformers_captioner(case: Case) -> Callable[[Sequence[Image.Image]], list[str]]:
    """Pictures to texts, ten of each, one image after another."""
    model = _transformers_captioner(case)
    images, tokenizer = BlipImageProcessor.from_pretrained(case.captioner), _tokenizer(case.captioner)

    @torch.inference_mode()
    def write(pictures: Sequence[Image.Image]) -> list[str]:
        pixels = images(list(pictures), return_tensors="pt").pixel_values.to(case.torch_dtype)
        features = model.vision_model(pixel_values=pixels).last_hidden_state
        return tokenizer.batch_decode(_generate(model, features, case), skip_special_tokens=True)

    return write


def _tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def data_juicer_captioning(python: str, case: Case) -> list[str]:
    """Command of data-juicer's side, with the decoding that the others have; `python` is its environment's."""
    settings = case.caption_settings()
    generate = {
        "top_p": settings.top_p, "top_k": settings.top_k, "repetition_penalty": settings.repetition_penalty,
        "min_new_tokens": case.min_length - len(PROMPT_IDS), "max_new_tokens": MAX_LENGTH - len(PROMPT_IDS),
    }  # fmt: skip
    pictures = write_pictures(case.models / f"pictures-{case.batch_size}", case.batch_size)
    return [
        python, "-m", "benchmarks.data_juicer", case.captioner, str(pictures), "--num-captions", str(NUM_CAPTIONS),
        "--generate", json.dumps(generate),
    ]  # fmt: skip


# --- image-text matching ------------------------------------------------------------------------------------


def our_matching(case: Case) -> Pass:
    """ITM scores of every picture with `num_texts` texts."""
    from capfilt.curation.scorers import ItmScorer

    scorer = ItmScorer(case.filter_settings())
    keep_freed_memory()
    pictures, texts = draw_pictures(case.batch_size), list(TEXTS[: case.num_texts])
    return lambda: scorer.score([scorer.prepare(picture) for picture in pictures], [texts] * len(pictures))


def transformers_filter(case: Case) -> tuple[Any, Any]:
    """The model and what prepares pictures and texts for it."""
    model: Any = BlipForImageTextRetrieval.from_pretrained(case.filter, dtype=case.torch_dtype).eval()
    return model, BlipProcessor(BlipImageProcessor.from_pretrained(case.filter), _tokenizer(case.filter))


def transformers_matching_of_pairs(case: Case) -> Pass:
    """As transformers' documentation shows it: one picture with one text at a time."""
    model, processor = transformers_filter(case)
    pictures, texts = draw_pictures(case.batch_size), TEXTS[: case.num_texts]

    @torch.inference_mode()
    def work() -> object:
        scores = []
        for picture in pictures:
            for text in texts:
                inputs = processor(images=picture, text=text, return_tensors="pt")
                inputs["pixel_values"] = inputs["pixel_values"].to(case.torch_dtype)
                scores.append(model(**inputs, use_itm_head=True)[0].float().softmax(1)[:, 1])
        return scores

    return work


def transformers_matching_encoded_once(case: Case) -> Pass:
    """A careful user's: a picture is encoded once, its features repeated for its texts, one batch of all."""
    model, processor = transformers_filter(case)
    pictures, texts = draw_pictures(case.batch_size), list(TEXTS[: case.num_texts])
    return lambda: match_texts(model, processor, pictures, texts * len(pictures), case.torch_dtype)


@torch.inference_mode()
def match_texts(
    model: Any, processor: Any, pictures: Sequence[Image.Image], texts: Sequence[str], dtype: torch.dtype
) -> Tensor:
    """ITM probabilities (N,) of N texts, as many of each picture, one picture after another."""
    pixels = processor(images=list(pictures), return_tensors="pt").pixel_values.to(dtype)
    features = model.vision_model(pixel_values=pixels).last_hidden_state
    features = features.repeat_interleave(len(texts) // len(pictures), 0)
    tokens = processor.tokenizer(list(texts), padding=True, truncation=True, max_length=35, return_tensors="pt")
    hidden = model.text_encoder(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=features,
        encoder_attention_mask=torch.ones(features.shape[:2], dtype=torch.long),
    ).last_hidden_state  # fmt: skip
    return model.itm_head(hidden[:, 0]).float().softmax(1)[:, 1]


# --- CLIP -----------------------------------------------------------------------------------------------


def our_clip(case: Case) -> Pass:
    """CLIP scores of every picture with ten texts of its own."""
    from capfilt.curation.scorers import ClipScorer

    scorer = ClipScorer(case.rank_settings())
    keep_freed_memory()
    pictures = draw_pictures(case.batch_size)
    texts = _own_texts(len(pictures))
    return lambda: scorer.score([scorer.prepare(picture) for picture in pictures], texts)


def open_clip_scores(case: Case) -> Pass:
    """Every picture with ten texts of its own."""
    score, pictures = open_clip_model(case), draw_pictures(case.batch_size)
    texts = _own_texts(len(pictures))
    return lambda: score(pictures, texts)


def open_clip_model(case: Case) -> Callable[[Sequence[Image.Image], Sequence[Sequence[str]]], Tensor]:
    """Scores (B, N) of N texts of each of B pictures, as open_clip's documentation shows it: texts are padded."""
    import open_clip

    (name, weights), precision = case.clip, {"float32": "fp32", "bfloat16": "bf16"}[case.dtype]
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=weights, precision=precision)
    prepare: Any = transform
    tokenize, network = open_clip.get_tokenizer(name), cast(Any, model.eval())

    @torch.inference_mode()
    def score(pictures: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> Tensor:
        pixels = torch.stack([prepare(picture) for picture in pictures]).to(case.torch_dtype)
        images_BE = network.encode_image(pixels, normalize=True)
        texts_NE = network.encode_text(tokenize([text for own in texts for text in own]), normalize=True)
        return (texts_NE.view(len(pictures), -1, images_BE.shape[1]) * images_BE[:, None]).sum(2)

    return score


def _own_texts(num_pictures: int) -> list[list[str]]:
    """Ten texts for each picture, all of them different."""
    return [[f"{text} {number}" for text in TEXTS[:NUM_CAPTIONS]] for number in range(num_pictures)]
