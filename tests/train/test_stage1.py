"""Stage 1 from a run to a folder of plain transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, BertForMaskedLM, Blip2ForImageTextRetrieval

from capfilt.data.rundir import RunDir
from capfilt.errors import UsageError
from capfilt.evaluate.retrieval import evaluate_retrieval
from capfilt.evaluate.retrieval_models import RetrievalOptions, Stage1Retrieval
from capfilt.models.blip2 import Texts
from capfilt.settings import Stage1Settings
from capfilt.train.batches import from_arrays
from capfilt.train.generate import prepare_images
from capfilt.train.pretrained import load_qformer_start
from capfilt.train.saved import encode_texts, load_stage1
from capfilt.train.stage1 import train_stage1, train_stage1_on
from tests.train import small_models

CPU = torch.device("cpu")


def settings_for(blip_dir: Path, **changes: object) -> Stage1Settings:
    base = Stage1Settings(
        image_encoder=str(blip_dir), num_queries=4, embed_dim=16, dropout=0.0, max_steps=6, batch_size=16,
        warmup_steps=2, learning_rate=2e-3, save_every_steps=3, log_every_steps=1, device="cpu",
    )  # fmt: skip
    return replace(base, **changes)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def trained_dir(run: RunDir, blip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    train_stage1([run.path], settings_for(blip_dir), folder)
    return folder


@torch.no_grad()
def test_plain_transformers_loads_it_and_agrees(trained_dir: Path) -> None:
    theirs, info = Blip2ForImageTextRetrieval.from_pretrained(trained_dir, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.eval()
    saved = load_stage1(trained_dir, CPU)
    stage = saved.stage.eval()
    images, captions = small_models.draw_pairs(6, seed=7)
    texts = [own[number % 2] for number, own in enumerate(captions)]
    pixels = prepare_images(list(images), saved.encoder.preparation)
    processor = AutoProcessor.from_pretrained(trained_dir)
    inputs = processor(text=texts, padding=True, return_tensors="pt")
    ours = encode_texts(saved.tokenizer, texts, 32, CPU)
    assert torch.equal(inputs["input_ids"], ours.tokens)
    their_pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(their_pixels, pixels, atol=1e-4, rtol=0)
    image = stage.image_key_values(saved.encoder.vision(pixels))
    matching = theirs(pixel_values=pixels, **inputs, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(stage.itm_logits(image, ours), matching, atol=1e-4, rtol=0)
    contrast = theirs(pixel_values=pixels, **inputs).logits_per_image
    queries = stage.embed_queries(stage.qformer.encode_queries(image)[0])
    found = (queries @ stage.embed_texts(ours).T).amax(dim=1)
    torch.testing.assert_close(found, contrast, atol=1e-4, rtol=0)


def test_a_crash_changes_nothing(
    run: RunDir, blip_dir: Path, trained_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from capfilt.train import stage1

    calls = 0

    def crash(*arguments: object, to_the_longest: bool) -> Texts:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("crash")
        return encode_texts(*arguments, to_the_longest=to_the_longest)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(stage1, "encode_texts", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train_stage1([run.path], settings_for(blip_dir), tmp_path)
    train_stage1([run.path], settings_for(blip_dir), tmp_path)
    expected, found = (load_file(folder / "model.safetensors") for folder in (trained_dir, tmp_path))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_cached_features_and_fresh_ones_train_alike(blip_dir: Path, tmp_path: Path) -> None:
    images, captions = small_models.draw_pairs(40)
    losses = []
    for limit in (1 << 30, 0):
        settings = settings_for(blip_dir, feature_cache_bytes=limit)
        summary = train_stage1_on(from_arrays(images, captions), settings, tmp_path / str(limit))
        losses.append(summary.last_losses)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("losses", [("itc", "itm"), ("itg",)])
def test_losses_can_be_left_out(blip_dir: Path, tmp_path: Path, losses: tuple[str, ...]) -> None:
    images, captions = small_models.draw_pairs(20)
    settings = settings_for(blip_dir, losses=losses, max_steps=1)
    summary = train_stage1_on(from_arrays(images, captions), settings, tmp_path)
    assert summary.last_losses.keys() == {"loss", *losses}


def test_it_learns_to_find_the_image_of_a_text(blip_dir: Path, tmp_path: Path) -> None:
    images, captions = small_models.draw_pairs(400, seed=3)
    settings = settings_for(
        blip_dir, max_steps=60, save_every_steps=1000, log_every_steps=5, batch_size=32, learning_rate=5e-3
    )
    summary = train_stage1_on(from_arrays(images, captions), settings, tmp_path)
    assert all(summary.last_losses[name] < 0.9 * summary.first_losses[name] for name in ("itc", "itg"))
    combinations = [(color, place) for color in small_models.COLORS for place in small_models.PLACES]
    unseen = [small_models.draw_square(*facts, seed=9000 + i) for i, facts in enumerate(combinations)]
    texts = [f"a {color} square on the {place}" for color, place in combinations]
    model = Stage1Retrieval(tmp_path, RetrievalOptions(device="cpu"))
    report, _ = evaluate_retrieval(model, [Image.fromarray(square) for square in unseen], texts, k_test=8)
    for recalls in (report.itc, report.itm):
        assert recalls is not None
        assert recalls.image_to_text[5] >= 75  # chance: 31
        assert recalls.text_to_image[5] >= 75


def test_bert_starts_the_qformer_and_gets_a_row_for_dec(models_dir: Path, blip_dir: Path, tmp_path: Path) -> None:
    bert_dir = small_models.save_bert(models_dir / "bert")
    settings = settings_for(blip_dir, qformer_init=str(bert_dir))
    start = load_qformer_start(settings, vision_width=48)
    vocabulary = 5 + len(small_models.WORDS)
    assert (start.config.depth, start.config.vocab_size, start.dec_token_id) == (
        2,
        vocabulary + 1,
        vocabulary,
    )
    theirs = BertForMaskedLM.from_pretrained(bert_dir).state_dict()
    expected = theirs["bert.encoder.layer.1.intermediate.dense.weight"]
    for ours in ("query", "text"):
        assert torch.equal(start.weights[f"layers.1.{ours}_feed_forward.fc1.weight"], expected)
    assert torch.equal(start.head_weights["vocabulary.bias"], theirs["cls.predictions.bias"])
    assert not [name for name in start.weights if "cross" in name]
    train_stage1_on(from_arrays(*small_models.draw_pairs(20)), replace(settings, max_steps=1), tmp_path)


def test_bert_as_published_names_its_norms_gamma_and_beta(models_dir: Path, blip_dir: Path) -> None:
    bert_dir = small_models.save_bert(models_dir / "published-bert")
    settings = settings_for(blip_dir, qformer_init=str(bert_dir))
    expected = load_qformer_start(settings, vision_width=48)
    state = load_file(bert_dir / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for name in [name for name in state if name.endswith(tuple(old))]:
        ending = name[name.index("LayerNorm.") :]
        state[name.removesuffix(ending) + old[ending]] = state.pop(name)
    assert sum(name.endswith("gamma") for name in state) == 6
    save_file(state, bert_dir / "model.safetensors", metadata={"format": "pt"})
    start = load_qformer_start(settings, vision_width=48)
    for found, wanted in ((start.weights, expected.weights), (start.head_weights, expected.head_weights)):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_blip_may_start_cross_attention_too_and_nothing_at_all(blip_dir: Path) -> None:
    theirs = load_file(blip_dir / "model.safetensors")
    settings = settings_for(blip_dir, init_cross_attention=True)
    weights = load_qformer_start(settings, vision_width=48).weights
    name = "text_encoder.encoder.layer.{}.crossattention.self.key.weight"
    assert torch.equal(weights["layers.2.cross_attention.key.weight"], theirs[name.format(2)])
    assert "layers.1.cross_attention.key.weight" not in weights
    assert not load_qformer_start(replace(settings, init_weights=False), vision_width=48).weights


def test_a_captioner_starts_the_head_of_itg(models_dir: Path) -> None:
    captioner_dir = small_models.save_blip(models_dir / "captioner", captioner=True)
    start = load_qformer_start(settings_for(captioner_dir), vision_width=48)
    theirs = load_file(captioner_dir / "model.safetensors")
    assert torch.equal(
        start.head_weights["norm.weight"], theirs["text_decoder.cls.predictions.transform.LayerNorm.weight"]
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "No image encoder is named"),
        ("/nowhere/blip", "is no folder"),
        ("{run}", "no readable config.json"),
    ],
)
def test_a_wrong_image_encoder(run: RunDir, tmp_path: Path, name: str, message: str) -> None:
    settings = Stage1Settings(image_encoder=name.format(run=run.path))
    with pytest.raises(UsageError, match=message):
        train_stage1([run.path], settings, tmp_path)


def test_loading_something_else(blip_dir: Path) -> None:
    with pytest.raises(UsageError, match=r"expected Blip2ForImageTextRetrieval.*capfilt train stage1"):
        load_stage1(blip_dir, CPU)
