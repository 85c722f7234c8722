"""The tokenizers of the embedded models: whole words, the published ids, the same files every time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, Blip2Processor, BlipImageProcessor

from capfilt.world.language import caption, full_caption, question
from capfilt.world.scenes import draw_scene
from capfilt.world.tokenizers import (
    CLIP_CONTEXT_LENGTH,
    NUM_SENTINELS,
    build_bert_tokenizer,
    build_clip_tokenizer,
    build_opt_tokenizer,
    build_t5_tokenizer,
)

BUILDERS: dict[str, Callable[[Path], Any]] = {
    "bert": build_bert_tokenizer,
    "clip": build_clip_tokenizer,
    "opt": build_opt_tokenizer,
    "t5": build_t5_tokenizer,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    for name, build in BUILDERS.items():
        build(root / name)
    return {name: root / name for name in BUILDERS}


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


def world_texts(num_scenes: int = 300) -> list[str]:
    texts = []
    for seed in range(num_scenes):
        scene, rng = draw_scene(seed, "test"), np.random.default_rng(seed)
        asked, answer = question(scene, rng)
        texts += [caption(scene, rng), full_caption(scene, rng), asked.removesuffix("?"), answer]
    return texts


@pytest.mark.parametrize("name", BUILDERS)
def test_every_word_of_the_world_is_one_piece(opened: dict[str, Any], name: str) -> None:
    tokenizer = opened[name]
    for text in world_texts():
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        assert len(tokens) == len(text.split()), tokenizer.convert_ids_to_tokens(tokens)
        assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("name", BUILDERS)
def test_two_builds_give_the_same_files(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    BUILDERS[name](tmp_path)
    first = {path.name: path.read_bytes() for path in folders[name].iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_bert_has_the_ids_of_blip(opened: dict[str, Any]) -> None:
    tokenizer = opened["bert"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3, 4]
    last = len(tokenizer) - 1
    assert tokenizer.bos_token == "[DEC]"
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [last - 1, last]
    tokens = tokenizer("A red BALL, xyz 42").input_ids
    assert tokens[0] == tokenizer.cls_token_id
    assert tokens[-1] == tokenizer.sep_token_id
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode([last, *tokens], skip_special_tokens=True) == "a red ball, xyz 42"


def test_clip_ends_with_the_highest_id_even_when_cut(opened: dict[str, Any]) -> None:
    tokenizer = opened["clip"]
    encoded = tokenizer(
        ["a ball", "a red ball on the grass " * 20],
        padding="max_length", truncation=True, max_length=CLIP_CONTEXT_LENGTH, return_tensors="pt",
    ).input_ids  # fmt: skip
    assert encoded.shape == (2, CLIP_CONTEXT_LENGTH)
    assert encoded.argmax(dim=1).tolist() == [3, CLIP_CONTEXT_LENGTH - 1]
    assert encoded.max().item() == len(tokenizer) - 1 == tokenizer.eos_token_id


def test_opt_has_the_ids_of_opt_and_spells_any_text(opened: dict[str, Any]) -> None:
    tokenizer = opened["opt"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2, 2)
    assert tokenizer("a ball").input_ids[0] == 2
    assert len(tokenizer("\n", add_special_tokens=False).input_ids) == 1
    for text in ("Zürich 42 — 犬!\n", "Question: how many? Answer: two", "  \ta\x00b"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_t5_has_the_ids_of_t5(opened: dict[str, Any]) -> None:
    tokenizer = opened["t5"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("a ball").input_ids[-1] == 1
    last = tokenizer.convert_tokens_to_ids(f"<extra_id_{NUM_SENTINELS - 1}>")
    assert last == len(tokenizer) - 1
    prompt = "Question: what color is the ball? Short answer:"
    assert tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True) == prompt


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_blip2_processor_takes_the_tokenizer(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    Blip2Processor(BlipImageProcessor(), tokenizer, num_query_tokens=4).save_pretrained(tmp_path)
    processor = Blip2Processor.from_pretrained(tmp_path)
    read: Any = processor(images=np.zeros((8, 8, 3), np.uint8), text="a red ball", return_tensors="pt")
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (read.input_ids == image_token).sum().item() == 4
