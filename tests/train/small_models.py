"""Random models of a few thousand weights in the published layouts, a run with real shards, for the tests.

In: a folder. Out: folders that transformers opens (BLIP, BERT, OPT, T5 with tokenizers), a run directory.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from capfilt.data.commit import commit_stage, input_digest
from capfilt.data.manifest import iterate_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.schemas import SCHEMAS
from capfilt.data.tars import write_tar

IMAGE_PX = 32
COLORS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}
PLACES = ("left", "right", "top", "bottom")
WORDS = (
    *COLORS,
    *PLACES,
    "a",
    "square",
    "on",
    "the",
    "here",
    "is",
    "question",
    "what",
    "color",
    "short",
    "answer",
    ":",
    "?",
)


def draw_square(color: str, place: str, seed: int) -> np.ndarray:
    """uint8 (S, S, 3): a square on noise."""
    pixels = np.random.default_rng(seed).integers(90, 130, (IMAGE_PX, IMAGE_PX, 3), dtype=np.uint8)
    half = IMAGE_PX // 2
    rows = {"top": slice(0, half), "bottom": slice(half, None)}.get(place, slice(8, 24))
    columns = {"left": slice(0, half), "right": slice(half, None)}.get(place, slice(8, 24))
    pixels[rows, columns] = COLORS[color]
    return pixels


def draw_pairs(num_images: int, seed: int = 0) -> tuple[np.ndarray, list[list[str]]]:
    """Images (N, S, S, 3) and two true captions each."""
    rng = np.random.default_rng(seed)
    images, captions = [], []
    for number in range(num_images):
        color, place = str(rng.choice(list(COLORS))), str(rng.choice(PLACES))
        images.append(draw_square(color, place, 1000 * seed + number))
        captions.append([f"a {color} square on the {place}", f"here is a {color} square on the {place}"])
    return np.stack(images), captions


def save_blip(folder: Path, *, captioner: bool = False, seed: int = 0) -> Path:
    """A BLIP folder with its tokenizer and image processor."""
    torch.manual_seed(seed)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "[DEC]", "[ENC]"]
    text = {
        "vocab_size": len(vocab), "hidden_size": 32, "encoder_hidden_size": 48, "intermediate_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 40, "projection_dim": 16,
        "bos_token_id": len(vocab) - 2, "sep_token_id": 3, "eos_token_id": 3, "initializer_range": 0.2,
    }  # fmt: skip
    vision = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": IMAGE_PX, "patch_size": 8, "initializer_range": 0.2,
    }  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16)
    model = (BlipForConditionalGeneration if captioner else BlipForImageTextRetrieval)(config)
    model.save_pretrained(folder)
    _save_bert_tokenizer(folder, vocab)
    BlipImageProcessor(size={"height": IMAGE_PX, "width": IMAGE_PX}).save_pretrained(folder)
    return folder


def save_bert(folder: Path) -> Path:
    """A BERT folder, whose tokenizer lacks [DEC], as the published one does."""
    torch.manual_seed(1)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=40,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    _save_bert_tokenizer(folder, vocab)
    return folder


def save_opt(folder: Path, *, tied: bool = True) -> Path:
    """An OPT folder; its tokenizer starts a text with </s> and knows the newline."""
    torch.manual_seed(2)
    vocab = {token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "\n", *WORDS])}
    tokenizer = _word_tokenizer(vocab, processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)]))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = OPTConfig(
        vocab_size=len(vocab), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96,
        max_position_embeddings=96, word_embed_proj_dim=48, pad_token_id=1, bos_token_id=2, eos_token_id=2,
        init_std=0.3, tie_word_embeddings=tied, dropout=0.0,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


def save_t5(folder: Path, *, tied: bool = False) -> Path:
    """A T5 folder in FlanT5's form: gated GELU, output matrix of its own."""
    torch.manual_seed(3)
    vocab = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = _word_tokenizer(vocab, processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)]))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(vocab), d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=tied,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():  # lively, and padding never the most probable token
        for matrix in {id(m): m for m in (model.shared.weight, model.lm_head.weight)}.values():
            torch.nn.init.normal_(matrix)[0] = 0.0
    model.save_pretrained(folder)
    return folder


def save_run(folder: Path, shards: list[int], seed: int = 0, drop_every: int = 0) -> RunDir:
    """A run of so many samples per shard, each with two kept captions; every n-th sample keeps none."""
    run = RunDir.create(folder)
    for number, size in enumerate(shards):
        _commit_shard(run, f"{number:05d}", *draw_pairs(size, seed + number), drop_every)
    return run


def save_generation(folder: Path, name: str) -> RunDir:
    """A generation of the run, whose manifest keeps the first caption of an image alone."""
    run = RunDir.open(folder, name)
    for _, shard, table in iterate_manifest([folder]):
        rows = table.to_pylist()
        for row in rows:
            if row["caption_index"] > 0:
                row |= {"kept": False, "drop_reason": "low_itm"}
        num_keys = len({row["key"] for row in rows})
        _commit(run, "manifest", shard, rows, num_keys, input_digest(run, "manifest", shard))
    return run


def _commit_shard(run: RunDir, shard: str, images: np.ndarray, captions: list[list[str]], drop_every: int) -> None:
    keys = [f"{shard}{index:04d}" for index in range(len(images))]
    encoded = [_png(image) for image in images]
    with run.new_staging() as staging:
        members = [
            (f"{key}.{ending}", content)
            for key, data in zip(keys, encoded, strict=True)
            for ending, content in (("png", data), ("txt", b"web"), ("json", b"{}"))
        ]
        index = write_tar(staging / "shard.tar", members)[::3]
        rows = [
            {
                "key": key, "url": f"http://x/{key}", "caption": "web", "status": "success",
                "width": IMAGE_PX, "height": IMAGE_PX,
                "original_width": IMAGE_PX, "original_height": IMAGE_PX,
                "sha256": hashlib.sha256(data).hexdigest(), "image_ext": "png",
                "image_offset": member.offset, "image_length": member.length,
            }
            for key, data, member in zip(keys, encoded, index, strict=True)
        ]  # fmt: skip
        _commit(run, "shards", shard, rows, len(keys), "", tar=staging / "shard.tar")
    texts = [(key, i, text) for key, own in zip(keys, captions, strict=True) for i, text in enumerate(own)]
    tables = {
        "captions": [{"key": k, "caption_index": i, "text": t} for k, i, t in texts],
        "clip": [
            {"key": k, "caption_index": i, "source": "synthetic", "text": t, "rank": i + 1}
            for k, i, t in texts
        ],
        "itm": [{"key": k, "caption_index": i, "itm_score": 0.9} for k, i, _ in texts],
        "manifest": [
            {
                "shard": shard, "key": k, "url": f"http://x/{k}", "caption_index": i, "source": "synthetic",
                "text": t, "itm_score": 0.9, "kept": kept, "drop_reason": None if kept else "low_itm",
                "sha256": rows[keys.index(k)]["sha256"],
            }
            for k, i, t in texts
            for kept in [not drop_every or (keys.index(k) + 1) % drop_every != 0]
        ],
    }  # fmt: skip
    for stage, content in tables.items():
        _commit(run, stage, shard, content, len(keys), input_digest(run, stage, shard))


def _commit(
    run: RunDir, stage: str, shard: str, rows: list[dict], num_keys: int, digest: str, tar: Path | None = None
) -> None:
    table = pa.Table.from_pylist(rows, schema=SCHEMAS[stage])
    commit_stage(run, stage, shard, table, fields={}, input_digest=digest, rows_in=num_keys, tar=tar)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _save_bert_tokenizer(folder: Path, vocab: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    BertTokenizer(vocab={token: index for index, token in enumerate(vocab)}).save_pretrained(folder)


def _word_tokenizer(vocab: dict[str, int], template: processors.TemplateProcessing) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()]
    )
    tokenizer.post_processor = template
    return tokenizer
