"""The tokenizers of the embedded models: one piece a word of the world, smaller pieces for any other text.

In: the world's vocabulary. Out: folders that `transformers.AutoTokenizer` opens offline (and, for the CLIP,
open_clip through `local-dir:`). The same files every time: nothing is drawn.

    BERT (BLIP)   WordPiece; [DEC] and [ENC] are the last two ids, as BLIP appends them to BERT's 30,522
    CLIP          WordPiece; <|endoftext|> has the highest id, where open_clip's argmax pooling looks for it
    OPT           byte-level BPE (GPT-2's); ids as OPT's: 1 <pad>, 2 </s> (bos and eos); newline is a token
    T5            unigram; ids as T5's: 0 <pad>, 1 </s>, 2 <unk>, a hundred sentinels at the end
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from capfilt.world import lexicon

CLIP_CONTEXT_LENGTH = 32
"""Longest CLIP text in tokens, start and end included; the world's longest caption has 20 words."""

LLM_MAX_TOKENS = 128
"""Longest input of the embedded language models, visual prompts included."""

NUM_SENTINELS = 100
"""T5's <extra_id_0> to <extra_id_99>."""

PROMPT_WORDS = ("Question:", "Answer:", "Short", "answer:", "a photo of")
"""Words of BLIP-2's prompts in their own spelling (BLIP-2 §4.1)."""

_CHARACTERS = string.ascii_lowercase + string.digits
_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"


def build_bert_tokenizer(out_dir: Path) -> BertTokenizer:
    """BLIP's: [PAD] [UNK] [CLS] [SEP] [MASK], words, characters; [DEC] (bos) and [ENC] last."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_word_pieces()]
    tokenizer = BertTokenizer(vocab=_ids(pieces), bos_token="[DEC]", additional_special_tokens=["[ENC]"])
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [len(pieces), len(pieces) + 1]
    _save(tokenizer, out_dir)
    (out_dir / "vocab.txt").write_text("".join(f"{piece}\n" for piece in [*pieces, "[DEC]", "[ENC]"]))
    return tokenizer


def build_clip_tokenizer(out_dir: Path) -> PreTrainedTokenizerFast:
    """CLIP's: padding 0, unknown 1, start 2, words, characters, end last; texts are lower-cased."""
    pieces = ["<|pad|>", "<|unk|>", _CLIP_START, *_word_pieces(), _CLIP_END]
    tokenizer = Tokenizer(models.WordPiece(_ids(pieces), unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = _template(f"{_CLIP_START} $A {_CLIP_END}", tokenizer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=CLIP_CONTEXT_LENGTH,
        pad_token="<|pad|>", unk_token="<|unk|>", bos_token=_CLIP_START, eos_token=_CLIP_END,
    )  # fmt: skip
    _save(fast, out_dir)
    return fast


def build_opt_tokenizer(out_dir: Path) -> PreTrainedTokenizerFast:
    """OPT's: every byte is a token, every word of the world is one, with and without a space before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [*lexicon.vocabulary(), *PROMPT_WORDS]
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,  # no limit: merging ends when each word is one piece
        min_frequency=1,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([form for word in words for form in (word, f" {word}")], trainer)
    tokenizer.post_processor = _template("</s> $A", tokenizer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=LLM_MAX_TOKENS, clean_up_tokenization_spaces=False,
        bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>",
    )  # fmt: skip
    _save(fast, out_dir)
    return fast


def build_t5_tokenizer(out_dir: Path) -> PreTrainedTokenizerFast:
    """T5's: whole words first, else printable characters; </s> closes a text."""
    words = sorted({word for phrase in PROMPT_WORDS for word in phrase.split()} | set(lexicon.vocabulary()))
    characters = ["▁", *(c for c in string.printable if not c.isspace())]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -5.0) for word in words] + [(c, -12.0) for c in characters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = _template("$A </s>", tokenizer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=LLM_MAX_TOKENS, clean_up_tokenization_spaces=False,
        eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=[f"<extra_id_{n}>" for n in range(NUM_SENTINELS)],
    )  # fmt: skip
    _save(fast, out_dir)
    return fast


def _word_pieces() -> list[str]:
    """Words, then characters that start a word and characters that continue one; each piece once."""
    pieces = [*lexicon.vocabulary(), *_CHARACTERS, "?", ",", ":", *(f"##{c}" for c in _CHARACTERS)]
    return list(dict.fromkeys(pieces))


def _ids(pieces: Iterable[str]) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(pieces)}


def _template(form: str, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    special = [(piece, tokenizer.token_to_id(piece)) for piece in form.split() if piece != "$A"]
    return processors.TemplateProcessing(single=form, special_tokens=special)


def _save(tokenizer: Any, out_dir: Path) -> None:
    """Writes the folder in words that transformers 4 knows too, without paths of this machine."""
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out_dir)
    path = out_dir / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("name_or_path", None)
    config["tokenizer_class"] = "BertTokenizer" if "[MASK]" in config.values() else "PreTrainedTokenizerFast"
    if "extra_special_tokens" in config:
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
