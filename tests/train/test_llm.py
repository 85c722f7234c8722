"""Pre-training of the language models: what they read and write, what they learn, who opens them."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from capfilt.data.llm_texts import LlmText, write_llm_texts
from capfilt.errors import UsageError
from capfilt.settings import LlmTrainSettings
from capfilt.train.batches import Cursor
from capfilt.train.llm import (
    ARCHITECTURES,
    continue_texts,
    iterate_text_batches,
    train_llm,
    train_llm_on,
)
from capfilt.weights.llms import load_llm
from capfilt.weights.model_files import load_tokenizer
from capfilt.world.tokenizers import build_opt_tokenizer, build_t5_tokenizer

COLORS = ("red", "green", "blue", "yellow", "pink", "white")
KINDS = ("ball", "box", "star", "ring")
BUILDERS: dict[str, Callable[[Path], Any]] = {"opt": build_opt_tokenizer, "t5": build_t5_tokenizer}
SETTINGS = LlmTrainSettings(
    width=64, depth=2, feed_forward=128, batch_size=24, max_steps=8, warmup_steps=10, learning_rate=5e-3,
    save_every_steps=4, log_every_steps=4,
)  # fmt: skip
FAMILIES = sorted(ARCHITECTURES)

Trained = dict[str, Path]


def flat(places: list[list[int]]) -> list[int]:
    """The ids of places that hold one each."""
    assert all(len(place) == 1 for place in places)
    return [place[0] for place in places]


def draw_texts() -> list[LlmText]:
    """Captions and questions that only their preambles can tell."""
    pairs = list(itertools.product(COLORS, KINDS))
    captions = [LlmText(f"a {color} {kind}", f"{kind} {color}.") for color, kind in pairs]
    questions = [LlmText(color, f"{kind} {color}.", f"what color is the {kind}?") for color, kind in pairs]
    return captions + questions


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    for name, build in BUILDERS.items():
        build(root / name)
    return {name: root / name for name in BUILDERS}


@pytest.fixture(scope="module")
def trained(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Both architectures, trained until they go by their preambles."""
    root = tmp_path_factory.mktemp("trained")
    for name in FAMILIES:
        settings = replace(SETTINGS, architecture=name, max_steps=160, save_every_steps=160)
        train_llm_on(draw_texts(), tokenizers[name], settings, root / name)
    return {name: root / name for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_learns_to_go_by_the_preamble(trained: Trained, name: str) -> None:
    texts = draw_texts()
    written = continue_texts(trained[name], texts)
    assert np.mean([w == t.text for w, t in zip(written, texts, strict=True)]) >= 0.9
    assert continue_texts(trained[name], texts, batch_size=1)[::7] == written[::7]


def test_an_untrained_t5_still_tells_places_by_their_words(tokenizers: dict[str, Path]) -> None:
    """Where embeddings drown in what the encoder adds, a word's likes are not found, and sides are guessed."""
    settings = replace(SETTINGS, architecture="t5", width=128, depth=4)
    torch.manual_seed(0)
    llm: Any = ARCHITECTURES["t5"].build(load_tokenizer(tokenizers["t5"]), settings)
    words = torch.tensor([load_tokenizer(tokenizers["t5"])("a red ball left of a blue box").input_ids])
    embedded = llm.model.get_input_embeddings()(words)
    encoded = llm.model.encoder(inputs_embeds=embedded).last_hidden_state
    assert torch.cosine_similarity(encoded, embedded, dim=2).min() > 0.3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_preamble_works_as_visual_prompts_do(trained: Trained, name: str) -> None:
    """Stage 2 gives vectors where the preamble stood; given the preamble's own, the same text follows."""
    texts = draw_texts()[::5]
    expected = continue_texts(trained[name], texts)
    llm: Any = load_llm(str(trained[name]))
    for text, written in zip(texts, expected, strict=True):
        tokens = llm.tokenizer(text.preamble, add_special_tokens=False, return_tensors="pt").input_ids
        visual = llm.model.get_input_embeddings()(tokens)
        prompt = llm.question_prompt.format(text.question) if text.question else ""
        assert llm.generate(visual, [prompt], max_new_tokens=12) == [written]


@pytest.mark.parametrize("name", FAMILIES)
def test_words_joined_in_a_preamble_are_summed_at_one_place(trained: Trained, name: str) -> None:
    llm: Any = load_llm(str(trained[name]))
    ours = ARCHITECTURES[name](llm.model, llm.tokenizer)
    table = llm.model.get_input_embeddings()
    ids = [llm.tokenizer(f" {word}", add_special_tokens=False).input_ids for word in ("red", "ball", "box")]
    assert [len(i) for i in ids] == [1, 1, 1]
    places = [table(torch.tensor(ids[0] + ids[1])).sum(dim=0), table(torch.tensor(ids[2]))[0]]
    if name == "t5":
        llm.whole_caption_share = 1.0
    expected = llm.caption_loss(torch.stack(places)[None], ["a red ball"])
    encoded = ours.encode(LlmText("a red ball", " red+ball box"))
    assert encoded.given[:2] == [ids[0] + ids[1], ids[2]]
    assert ours.loss([encoded], torch.device("cpu")).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_that_of_stage_2_for_the_same_vectors(trained: Trained, name: str) -> None:
    text = draw_texts()[3]
    llm: Any = load_llm(str(trained[name]))
    ours = ARCHITECTURES[name](llm.model, llm.tokenizer)
    tokens = llm.tokenizer(text.preamble, add_special_tokens=False, return_tensors="pt").input_ids
    if name == "t5":
        llm.whole_caption_share = 1.0
    expected = llm.caption_loss(llm.model.get_input_embeddings()(tokens), [text.text])
    assert ours.loss([ours.encode(text)], torch.device("cpu")).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_transformers_opens_what_is_saved(trained: Trained, name: str) -> None:
    kind: Any = {"opt": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}[name]
    model, info = kind.from_pretrained(trained[name], output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    assert all(t.dtype == torch.float16 for t in load_file(trained[name] / "model.safetensors").values())
    ends = GenerationConfig.from_pretrained(trained[name]).eos_token_id
    tokenizer = load_tokenizer(trained[name])
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    assert ends == ([*newline, 2] if name == "opt" else 1)
    prompt = "ring blue.</s>" if name == "opt" else "ring blue."
    tokens = tokenizer(prompt, add_special_tokens=name == "t5", return_tensors="pt").input_ids
    written = model.generate(tokens, max_new_tokens=12)[0]
    written = written[tokens.shape[1] :] if name == "opt" else written
    assert tokenizer.decode(written, skip_special_tokens=True).strip() == "a blue ring"


def test_opt_reads_preamble_end_question_and_writes_up_to_the_newline(tokenizers: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(tokenizers["opt"])
    opt: Any = ARCHITECTURES["opt"].build(tokenizer, SETTINGS)
    encoded = opt.encode(LlmText("red", "a red ball.", "what color is the ball?"))
    assert tokenizer.decode(flat(encoded.given)) == "a red ball.</s>Question: what color is the ball? Answer:"
    assert tokenizer.decode(encoded.written) == " red\n"
    plain = opt.encode(LlmText("a red ball"))
    assert (tokenizer.decode(flat(plain.given)), tokenizer.decode(plain.written)) == ("</s>", "a red ball\n")
    cut = opt.encode(LlmText("a red ball", "box" + " box" * 499))
    assert len(cut.given) + len(cut.written) == SETTINGS.max_positions
    assert tokenizer.decode(flat(cut.given)).endswith(" box</s>")


@pytest.mark.parametrize("num_words", [126, 127, 128, 129, 500])
def test_opt_cuts_a_text_that_is_longer_than_its_position_table(tokenizers: dict[str, Path], num_words: int) -> None:
    opt: Any = ARCHITECTURES["opt"].build(load_tokenizer(tokenizers["opt"]), SETTINGS)
    encoded = opt.encode(LlmText("box" + " box" * (num_words - 1), "a red ball " * 9))
    assert len(encoded.given) >= 1
    assert len(encoded.given) + len(encoded.written) == SETTINGS.max_positions == 128
    assert torch.isfinite(opt.loss([encoded], torch.device("cpu")))


def test_t5_splits_a_caption_as_stage_2_does(tokenizers: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(tokenizers["t5"])
    settings = replace(SETTINGS, architecture="t5", whole_caption_share=0.25)
    t5: Any = ARCHITECTURES["t5"].build(tokenizer, settings)
    text, seen = LlmText("one two three four five six", "a ball."), Counter()
    for split in np.linspace(0, 1, 401)[:-1]:
        encoded = t5.encode(text, float(split))
        given, written = tokenizer.decode(flat(encoded.given)), tokenizer.decode(encoded.written)
        rest = written.removesuffix("</s>").split()
        prefix = given.removesuffix("</s>").removeprefix("a ball.").split()
        assert prefix + rest == text.text.split()
        seen[len(prefix)] += 1
    assert seen == {0: 100, 1: 100, 2: 100, 3: 100}
    asked = t5.encode(LlmText("red", "a ball.", "what color?"), 0.9)
    assert tokenizer.decode(flat(asked.given)) == "a ball. Question: what color? Short answer:</s>"
    assert tokenizer.decode(asked.written) == "red</s>"


def test_an_epoch_brings_every_text_once_and_a_cursor_goes_on() -> None:
    texts = [LlmText("a" * (1 + n % 40)) for n in range(1000)]
    stream = iterate_text_batches(texts, replace(SETTINGS, batch_size=20), Cursor())
    batches = list(itertools.islice(stream, 60))
    assert sorted(key for batch in batches[:50] for key in batch.keys) == [f"{n:09d}" for n in range(1000)]
    assert batches[50].epoch == 1
    assert [b.keys for b in batches[50:]] != [b.keys for b in batches[:10]]
    spread = [np.ptp([len(t.text) for t in batch.llm_texts]) for batch in batches]
    assert np.mean(spread) < 5  # texts of about one length stand together
    again = iterate_text_batches(texts, replace(SETTINGS, batch_size=20), batches[30].cursor)
    assert [next(again).keys for _ in range(29)] == [b.keys for b in batches[31:]]


@pytest.mark.parametrize("name", FAMILIES)
def test_goes_on_exactly_where_it_stopped(tokenizers: dict[str, Path], name: str, tmp_path: Path) -> None:
    path, settings = tmp_path / "texts.jsonl", replace(SETTINGS, architecture=name)
    write_llm_texts(path, draw_texts())
    train_llm(path, tokenizers[name], settings, tmp_path / "whole")
    train_llm(path, tokenizers[name], settings, tmp_path / "parts")
    for file in ("training.json", "model.safetensors"):  # as if it had been killed after its first checkpoint
        (tmp_path / "parts" / file).unlink()
    last = sorted((tmp_path / "parts" / "checkpoints").iterdir())[-1]
    last.rename(tmp_path / "last")
    train_llm(path, tokenizers[name], settings, tmp_path / "parts")
    whole, parts = (load_file(tmp_path / part / "model.safetensors") for part in ("whole", "parts"))
    for key, tensor in whole.items():
        assert torch.equal(tensor, parts[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokenizer_is_saved_as_it_was(trained: Trained, tokenizers: dict[str, Path], name: str) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (trained[name] / file).read_bytes() == (tokenizers[name] / file).read_bytes()


def test_a_tokenizer_in_other_files_is_saved_too(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """OPT's published one has vocab.json and merges.txt, and no tokenizer.json."""
    whole = json.loads((tokenizers["opt"] / "tokenizer.json").read_text())
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (tmp_path / "slow" / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / "slow" / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "</s>"}))
    train_llm_on(draw_texts(), tmp_path / "slow", replace(SETTINGS, max_steps=1), tmp_path / "out")
    expected = load_tokenizer(tokenizers["opt"])("a red ball", add_special_tokens=False).input_ids
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found("a red ball", add_special_tokens=False).input_ids == expected
    assert str(tmp_path) not in (tmp_path / "out" / "tokenizer_config.json").read_text()


def test_a_mistyped_tokenizer_is_no_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("httpx.Client.send", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no readable tokenizer"):
        train_llm_on(draw_texts(), Path("facebook/opt-125n"), SETTINGS, tmp_path / "out")


def test_what_cannot_be_trained_on_is_refused(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="do not fill a batch"):
        train_llm_on(draw_texts()[:5], tokenizers["opt"], SETTINGS, tmp_path)
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        train_llm_on(draw_texts(), tmp_path, SETTINGS, tmp_path)
    with pytest.raises(UsageError, match="opt, t5"):
        replace(SETTINGS, architecture="bloom")
