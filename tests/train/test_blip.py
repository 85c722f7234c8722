"""Training BLIP from shards: it learns, its results open in plain transformers, and one part starts the next."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BertForMaskedLM,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)

from capfilt.data.manifest import read_manifest
from capfilt.data.rundir import RunDir
from capfilt.data.sealed import read_sealed, sealed_bytes
from capfilt.errors import FingerprintMismatchError, UsageError
from capfilt.settings import BlipTrainSettings
from capfilt.train.batches import iterate_batches
from capfilt.train.blip import captions_of, train_blip, train_captioner, train_filter
from capfilt.train.blip_start import load_part, start_blip
from capfilt.train.pairs import read_pairs
from capfilt.weights.blip import load_blip, load_trainable_blip
from capfilt.world.tokenizers import build_bert_tokenizer
from capfilt.world.training_run import WorldRunSettings, write_world_run
from tests import factories
from tests.models import small_vits
from tests.train import small_models

TINY = BlipTrainSettings(
    image_size_px=32, patch_size_px=8, vision_width=32, vision_depth=1, text_width=32, text_depth=1, head_width=16,
    max_positions=48, embed_dim=16, max_steps=12, warmup_steps=2, batch_size=8, learning_rate=3e-3,
    log_every_steps=4, dropout=0.0, label_smoothing=0.0, queue_size=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def world_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    settings = WorldRunSettings(num_scenes=48, scenes_per_shard=24)
    return write_world_run(tmp_path_factory.mktemp("world") / "run", settings)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_bert_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def pre_trained(world_run: RunDir, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("blip") / "out"
    summary = train_blip([world_run.path], replace(TINY, tokenizer=str(tokenizer_dir)), output)
    assert summary.last_losses["lm"] < summary.first_losses["lm"]
    return output


def test_both_parts_open_in_transformers_with_equal_outputs(pre_trained: Path) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    theirs, info = BlipForConditionalGeneration.from_pretrained(pre_trained / "captioner", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = load_trainable_blip(pre_trained / "captioner", "captioner")
    tokens = ours.tokenizer(["a red ball", "two blue stars"], return_tensors="pt", padding=True).input_ids
    with torch.no_grad():
        features = theirs.vision_model(images)[0]
        expected = theirs.text_decoder(tokens, encoder_hidden_states=features).logits
        found = ours.model(images, tokens)
    ends = tokens != ours.tokenizer.pad_token_id
    assert torch.allclose(found[ends], expected[ends], atol=1e-4)

    theirs, info = BlipForImageTextRetrieval.from_pretrained(pre_trained / "filter", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = load_trainable_blip(pre_trained / "filter", "filter")
    mask = ends.long()
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=images, attention_mask=mask, use_itm_head=True)[0]
        found = ours.model.itm_logits(ours.model.vision(images), tokens, ends)
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_captioner_of_pre_training_continues_no_prompt(pre_trained: Path) -> None:
    device = torch.device("cpu")
    assert load_blip(str(pre_trained / "captioner"), "captioner", device=device, dtype=torch.float32).prompt == ""


def test_processor_opens_in_transformers(pre_trained: Path) -> None:
    processor = AutoProcessor.from_pretrained(pre_trained / "captioner")
    assert type(processor).__name__ == "BlipProcessor"
    assert processor.tokenizer("a red ball").input_ids[0] == processor.tokenizer.cls_token_id


def test_captioner_learns_from_there(world_run: RunDir, pre_trained: Path, tmp_path: Path) -> None:
    settings = replace(TINY, init=str(pre_trained), prompt="a picture of ", max_steps=30)
    summary = train_captioner([world_run.path], settings, tmp_path / "out")
    assert summary.last_losses["lm"] < 0.8 * summary.first_losses["lm"]
    assert BlipForConditionalGeneration.from_pretrained(tmp_path / "out").config.capfilt_prompt == "a picture of "


def test_filter_learns_from_there(world_run: RunDir, pre_trained: Path, tmp_path: Path) -> None:
    settings = replace(TINY, init=str(pre_trained), max_steps=20, momentum=0.0)  # a queue that fills raises ITC
    summary = train_filter([world_run.path], settings, tmp_path / "out")
    assert set(summary.last_losses) >= {"itc", "itm", "loss"}
    assert summary.last_losses["loss"] < summary.first_losses["loss"]


def test_the_prompt_is_the_captioners_alone(
    world_run: RunDir, pre_trained: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    settings = replace(TINY, init=str(pre_trained), max_steps=1, log_every_steps=1)
    trainings = {"captioner": train_captioner, "filter": train_filter, "blip": train_blip}
    for part, training in trainings.items():
        chosen = replace(settings, init="", tokenizer=str(tokenizer_dir)) if part == "blip" else settings
        plain = training([world_run], chosen, tmp_path / part / "plain").first_losses
        prompted = training([world_run], replace(chosen, prompt="a picture of "), tmp_path / part / "prompted")
        assert (prompted.first_losses["loss"] == plain["loss"]) == (part != "captioner")


def test_dropout_is_that_of_the_settings_and_saved(world_run: RunDir, pre_trained: Path, tmp_path: Path) -> None:
    settings = replace(TINY, init=str(pre_trained), max_steps=1, log_every_steps=1, dropout=0.3)
    losses = [
        train_captioner([world_run], replace(settings, dropout=dropout), tmp_path / str(dropout)).first_losses["lm"]
        for dropout in (0.3, 0.0)
    ]
    assert losses[0] != losses[1]
    config = json.loads((tmp_path / "0.3" / "config.json").read_text())["text_config"]
    assert config["hidden_dropout_prob"] == 0.3
    part, both = load_part(settings, "filter"), start_blip(settings)[0]
    anew = start_blip(replace(settings, init="", text_init=str(small_models.save_bert(tmp_path / "bert"))))[0]
    for module in (part.model, both, anew):
        rates = {child.p for child in module.modules() if isinstance(child, torch.nn.Dropout)}
        assert rates == {0.3}


def test_what_is_done_is_said_without_a_look_at_the_pictures(
    world_run: RunDir, tokenizer_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(world_run.path, tmp_path / "run")
    settings = replace(TINY, tokenizer=str(tokenizer_dir), max_steps=1)
    done = train_blip([tmp_path / "run"], settings, tmp_path / "out")
    for tar in (tmp_path / "run" / "shards").glob("*.tar"):
        tar.write_bytes(b"")
    assert train_blip([tmp_path / "run"], settings, tmp_path / "out") == replace(done, already_done=True)


def test_an_image_shown_again_is_decoded_with_other_captions(tmp_path: Path) -> None:
    run = write_world_run(tmp_path / "run", WorldRunSettings(num_scenes=24))
    settings = replace(TINY, captions_per_image=2, run_weights=(2.0,), batch_size=24)
    dataset = read_pairs([run], image_size_px=32, run_weights=(2.0,))
    stream = iterate_batches(dataset, settings)
    drawn: dict[str, list[tuple[str, ...]]] = {}
    for batch in (next(stream), next(stream)):
        texts = captions_of(dataset, batch, settings)
        for place, key in enumerate(batch.keys):
            drawn.setdefault(key, []).append(tuple(texts[2 * place : 2 * place + 2]))
    assert {len(pairs) for pairs in drawn.values()} == {2}
    assert sum(first != second for first, second in drawn.values()) > 12


def test_known_false_captions_and_several_captions_change_the_losses(tokenizer_dir: Path, tmp_path: Path) -> None:
    run = write_world_run(tmp_path / "run", WorldRunSettings(num_scenes=24, false_captions_per_scene=2))
    settings = replace(TINY, tokenizer=str(tokenizer_dir), max_steps=2, log_every_steps=1)
    plain = train_blip([run], settings, tmp_path / "plain").first_losses
    known = train_blip([run], replace(settings, known_false=True), tmp_path / "known").first_losses
    several = train_blip([run], replace(settings, captions_per_image=3), tmp_path / "several").first_losses
    assert known["itm"] != plain["itm"]
    assert (known["itc"], known["lm"]) == pytest.approx((plain["itc"], plain["lm"]), rel=1e-5)
    assert several["lm"] != pytest.approx(plain["lm"], rel=1e-5)


def test_a_prompt_that_leaves_no_room_for_a_caption_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    run = write_world_run(tmp_path / "run", WorldRunSettings(num_scenes=8))
    settings = replace(TINY, tokenizer=str(tokenizer_dir), max_steps=1)
    train_blip([run], settings, tmp_path / "blip")
    tuning = replace(settings, tokenizer="", init=str(tmp_path / "blip"), prompt="a picture of", max_text_tokens=5)
    with pytest.raises(UsageError, match="of which the prompt takes 3; expected at least 6"):
        train_captioner([run], tuning, tmp_path / "captioner")
    train_captioner([run], replace(tuning, max_text_tokens=6), tmp_path / "captioner")


def test_captions_without_a_word_are_left_out(tmp_path: Path) -> None:
    run = write_world_run(tmp_path / "run", WorldRunSettings(num_scenes=8, captions_per_scene=2))
    whole = read_pairs([run], image_size_px=32)
    path = run.stage_file("manifest", "00000")
    table, record, _ = read_sealed(path)
    rows = table.to_pylist()
    first = [row for row in rows if row["key"] == whole.keys[0]]
    second = [row for row in rows if row["key"] == whole.keys[1]]
    for row in [*first, *second[:-1]]:
        row["text"] = "... <br/> !"
    path.write_bytes(sealed_bytes(pa.Table.from_pylist(rows, schema=table.schema), record))
    left = read_pairs([run], image_size_px=32)
    assert list(left.keys) == list(whole.keys)[1:]
    assert left.captions_of(0) == whole.captions_of(1)[-1:]


def test_known_false_captions_are_those_of_the_image(tmp_path: Path) -> None:
    run = write_world_run(tmp_path / "run", WorldRunSettings(num_scenes=24, false_captions_per_scene=2))
    rows = read_manifest([run], ["key", "text", "drop_reason"]).to_pylist()
    dataset = read_pairs([run], image_size_px=32, known_false=True)
    for row, key in enumerate(dataset.keys):
        expected = [r["text"] for r in rows if r["key"] == key and r["drop_reason"] == "known_false"]
        assert dataset.false_captions_of(row) == expected
    assert read_pairs([run], image_size_px=32).false_captions_of(0) == []


def test_pre_training_goes_on_from_its_own_output(world_run: RunDir, pre_trained: Path, tmp_path: Path) -> None:
    before = load_trainable_blip(pre_trained / "filter", "filter").model.state_dict()
    settings = replace(TINY, init=str(pre_trained), max_steps=1, learning_rate=1e-9, weight_decay=0.0)
    train_blip([world_run.path], settings, tmp_path / "out")
    after = load_trainable_blip(tmp_path / "out" / "filter", "filter").model.state_dict()
    assert max((after[name] - before[name]).abs().max().item() for name in before) < 1e-6


def test_the_temperature_is_gone_on_from(world_run: RunDir, pre_trained: Path, tmp_path: Path) -> None:
    learned = json.loads((pre_trained / "filter" / "config.json").read_text())["capfilt_temperature"]
    assert learned != pytest.approx(0.07, rel=1e-3)
    settings = replace(TINY, init=str(pre_trained), max_steps=1, learning_rate=1e-9, weight_decay=0.0)
    assert start_blip(settings)[0].filter_losses.contrast.value() == pytest.approx(learned)
    train_filter([world_run.path], settings, tmp_path / "out")
    assert load_trainable_blip(tmp_path / "out", "filter").temperature == pytest.approx(learned)
    config = json.loads((tmp_path / "out" / "config.json").read_text()) | {"capfilt_temperature": "hot"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="capfilt_temperature 'hot'; expected a number above 0"):
        load_trainable_blip(tmp_path / "out", "filter")


def test_parts_that_do_not_belong_together_are_refused(world_run: RunDir, pre_trained: Path, tmp_path: Path) -> None:
    settings = replace(TINY, init=str(pre_trained), max_steps=2)
    mixed = tmp_path / "mixed"
    train_captioner([world_run.path], settings, mixed / "captioner")
    (mixed / "filter").symlink_to(pre_trained / "filter")
    with pytest.raises(UsageError, match="weights that they share, the first vision.class_embedding"):
        train_blip([world_run.path], replace(settings, init=str(mixed)), tmp_path / "out")


def test_pre_training_goes_on_from_both_parts_alone(world_run: RunDir, pre_trained: Path, tmp_path: Path) -> None:
    for init in (str(pre_trained / "captioner"), "embedded", str(tmp_path), "Salesforce/blip"):
        with pytest.raises(UsageError, match="no output of `capfilt train blip`"):
            train_blip([world_run.path], replace(TINY, init=init), tmp_path / "out")


def test_both_parts_identify_what_pre_training_goes_on_from(
    world_run: RunDir, pre_trained: Path, tmp_path: Path
) -> None:
    settings = replace(TINY, init=str(tmp_path / "init"), max_steps=1)
    shutil.copytree(pre_trained, tmp_path / "init")
    train_blip([world_run.path], settings, tmp_path / "out")
    config = tmp_path / "init" / "filter" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(FingerprintMismatchError, match="another model to start from"):
        train_blip([world_run.path], settings, tmp_path / "out")


def test_embedded_means_the_embedded_model_of_the_part(world_run: RunDir, tmp_path: Path) -> None:
    settings = replace(TINY, init="embedded", max_steps=1)
    assert train_filter([world_run.path], settings, tmp_path / "filter").steps == 1
    assert train_captioner([world_run.path], settings, tmp_path / "captioner").steps == 1


def test_starting_from_nothing_needs_a_tokenizer(world_run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--tokenizer"):
        train_blip([world_run.path], TINY, tmp_path / "out")


def test_sizes_that_do_not_fit_are_refused(world_run: RunDir, tokenizer_dir: Path, tmp_path: Path) -> None:
    settings = replace(TINY, tokenizer=str(tokenizer_dir))
    with pytest.raises(UsageError, match="image_size_px is 33; expected a multiple of the patch, 8"):
        train_blip([world_run], replace(settings, image_size_px=33), tmp_path / "out")
    with pytest.raises(UsageError, match="max_text_tokens is 30; expected at most 20, the positions of the model"):
        train_blip([world_run], replace(settings, max_positions=20), tmp_path / "out")


def test_the_tokenizer_of_bert_gets_the_tokens_of_blip(world_run: RunDir, tmp_path: Path) -> None:
    """As BLIP's code has it: [DEC] is bos and follows the 30,522 tokens of bert-base-uncased, then [ENC]."""
    factories.save_tokenizer(tmp_path / "bert", factories.read_bert_vocabulary())
    settings = replace(TINY, tokenizer=str(tmp_path / "bert"), max_steps=2)
    assert train_blip([world_run], settings, tmp_path / "out").steps == 2

    for part, model_class in (("captioner", BlipForConditionalGeneration), ("filter", BlipForImageTextRetrieval)):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / part)
        assert (len(tokenizer), tokenizer.bos_token, tokenizer.bos_token_id) == (30524, "[DEC]", 30522)
        assert tokenizer.convert_tokens_to_ids("[ENC]") == 30523
        assert tokenizer("[ENC] a red ball").input_ids[1] == 30523
        assert tokenizer.decode([30522, *tokenizer("a red ball").input_ids], skip_special_tokens=True) == "a red ball"
        model, info = model_class.from_pretrained(tmp_path / "out" / part, output_loading_info=True)
        assert not info["missing_keys"]
        text = model.config.text_config
        assert (text.vocab_size, text.bos_token_id, text.sep_token_id, text.pad_token_id) == (30524, 30522, 102, 0)
    assert len(model.text_encoder.get_input_embeddings().weight) == 30524

    tuned = replace(TINY, init=str(tmp_path / "out"), max_steps=1)
    assert train_captioner([world_run], tuned, tmp_path / "tuned").steps == 1
    pixels = torch.zeros(1, 3, 32, 32)
    written = BlipForConditionalGeneration.from_pretrained(tmp_path / "tuned").generate(pixels, max_new_tokens=3)
    assert written[0, 0] == 30522


def test_a_token_that_is_there_is_not_added_again(world_run: RunDir, tmp_path: Path) -> None:
    vocabulary = [*factories.VOCABULARY, "[ENC]"]
    factories.save_tokenizer(tmp_path / "bert", vocabulary)
    train_blip([world_run], replace(TINY, tokenizer=str(tmp_path / "bert"), max_steps=1), tmp_path / "out")
    text = BlipForConditionalGeneration.from_pretrained(tmp_path / "out" / "captioner").config.text_config
    assert text.vocab_size == len(vocabulary) + 1
    assert (text.enc_token_id, text.bos_token_id) == (len(vocabulary) - 1, len(vocabulary))


def test_a_tokenizer_of_another_kind_is_refused(world_run: RunDir, tmp_path: Path) -> None:
    small_models.save_opt(tmp_path / "opt")
    with pytest.raises(UsageError, match=r"no \[CLS\], \[SEP\]; expected one of BERT's kind"):
        train_blip([world_run], replace(TINY, tokenizer=str(tmp_path / "opt")), tmp_path / "out")


def test_bert_starts_the_text_side(world_run: RunDir, tmp_path: Path) -> None:
    """Before a step is taken, encoder and decoder give BERT's own features of a text, and its predictions."""
    bert_dir = small_models.save_bert(tmp_path / "bert")
    bert = BertForMaskedLM.from_pretrained(bert_dir).eval()
    with torch.no_grad():
        bert.bert.embeddings.token_type_embeddings.weight.normal_()
    bert.save_pretrained(bert_dir)
    settings = replace(TINY, text_init=str(bert_dir))
    model, start = start_blip(settings)
    tokens = start.tokenizer(["a red square", "what color"], return_tensors="pt", padding=True).input_ids
    mask = tokens != start.tokenizer.pad_token_id
    with torch.no_grad():
        expected = bert.bert(tokens, attention_mask=mask.long()).last_hidden_state
        logits = bert(tokens, attention_mask=mask.long()).logits
        found = model.filter.encoder(tokens, mask_BT=mask)
        predicted = model.captioner.head(found)
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(predicted[mask][:, : logits.shape[2]], logits[mask], atol=1e-4, rtol=0)
    encoder, decoder = model.filter.encoder.layers[1], model.captioner.decoder.layers[1]
    assert torch.equal(encoder.self_attention.query.weight, decoder.self_attention.query.weight)
    assert model.filter.encoder.config.vocab_size == bert.config.vocab_size + 2
    assert train_blip([world_run.path], replace(settings, max_steps=2), tmp_path / "out").steps == 2


def test_a_bert_that_lacks_a_weight_is_refused(world_run: RunDir, tmp_path: Path) -> None:
    bert_dir = small_models.save_bert(tmp_path / "bert")
    state = load_file(bert_dir / "model.safetensors")
    del state["bert.encoder.layer.1.output.dense.bias"]
    save_file(state, bert_dir / "model.safetensors")
    with pytest.raises(UsageError, match=r"lacks 1 weights, such as bert.encoder.layer.1.output.dense.bias"):
        train_blip([world_run.path], replace(TINY, text_init=str(bert_dir)), tmp_path / "out")


def test_what_is_no_bert_is_refused(world_run: RunDir, tmp_path: Path) -> None:
    """DistilBERT's sizes have other names, of which transformers knows some."""
    bert_dir = small_models.save_bert(tmp_path / "bert")
    sizes = {"model_type": "distilbert", "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64, "vocab_size": 40}
    for config, said in ((sizes, "uses None; expected 'gelu'"), ({"model_type": "no such"}, "Give a BERT")):
        (bert_dir / "config.json").write_text(json.dumps(config))
        with pytest.raises(UsageError, match=said):
            train_blip([world_run.path], replace(TINY, text_init=str(bert_dir)), tmp_path / "out")


def test_fine_tuning_at_another_size_interpolates_positions(
    world_run: RunDir, pre_trained: Path, tmp_path: Path
) -> None:
    settings = replace(TINY, init=str(pre_trained), image_size_px=48, max_steps=1)
    train_captioner([world_run.path], settings, tmp_path / "out")
    theirs = BlipForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert theirs.config.vision_config.image_size == 48
    assert theirs.vision_model.embeddings.position_embedding.shape[1] == 1 + 6 * 6
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert dict(processor.image_processor.size) == {"height": 48, "width": 48}
    with pytest.raises(UsageError, match="--image-size-px 50"):
        train_filter([world_run.path], replace(settings, image_size_px=50), tmp_path / "odd")


def test_a_published_vit_starts_the_image_encoder(world_run: RunDir, tokenizer_dir: Path, tmp_path: Path) -> None:
    """timm's own features before a step is taken; its sizes are those of the model."""
    theirs = small_vits.build_timm(image_size_px=32)
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    save_file(state, tmp_path / "vit.safetensors")
    settings = replace(TINY, tokenizer=str(tokenizer_dir), vision_init=str(tmp_path / "vit.safetensors"))
    model, _ = start_blip(settings)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.filter.vision(images), theirs.forward_features(images), atol=1e-4, rtol=0)
    assert model.filter.encoder.config.vision_width == model.filter.vision.config.width == theirs.embed_dim
    assert train_blip([world_run.path], replace(settings, max_steps=2), tmp_path / "out").steps == 2


@pytest.fixture
def original_pth(tmp_path: Path) -> Path:
    """As the release's model_base.pth: both parts, what they share tied, and what only pre-training needs."""
    vocabulary = factories.read_bert_vocabulary()
    config = factories.original_config(vocabulary_size=len(vocabulary))
    state = factories.build_filter(seed=1, config=config).state_dict()
    decoder = factories.build_captioner(seed=2, config=config).state_dict()
    decoder = {name: tensor for name, tensor in decoder.items() if name.startswith("text_decoder.")}
    for name in decoder:
        shared = name.replace("text_decoder.bert.", "text_encoder.")
        if shared in state and ".attention." not in name:
            decoder[name] = state[shared]
    decoder["text_decoder.cls.predictions.decoder.weight"] = state["text_encoder.embeddings.word_embeddings.weight"]
    folder = tmp_path / "release"
    folder.mkdir()
    factories.save_original(folder / "model_base.pth", {**state, **decoder})
    content = torch.load(folder / "model_base.pth", weights_only=True)["model"]
    torch.save({"model": content | {"temp": torch.tensor(0.021)}}, folder / "model_base.pth")
    factories.save_tokenizer(folder, vocabulary)
    return folder / "model_base.pth"


def test_the_releases_pth_is_trained_further(world_run: RunDir, original_pth: Path, tmp_path: Path) -> None:
    settings = replace(TINY, init=str(original_pth), max_steps=1, batch_size=2)
    model, _ = start_blip(settings)
    content = torch.load(original_pth, weights_only=True)["model"]
    query = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(model.filter.encoder.layers[0].self_attention.query.weight, content[f"text_encoder.{query}"])
    assert torch.equal(
        model.captioner.decoder.layers[0].self_attention.query.weight, content[f"text_decoder.bert.{query}"]
    )
    assert model.filter_losses.contrast.value() == pytest.approx(float(content["temp"]))
    assert train_captioner([world_run.path], settings, tmp_path / "captioner").steps == 1
    assert train_filter([world_run.path], settings, tmp_path / "filter").steps == 1
    assert train_blip([world_run.path], settings, tmp_path / "blip").steps == 1
    content["text_decoder.bert.surprise"] = torch.zeros(1)
    torch.save({"model": content}, original_pth)
    with pytest.raises(UsageError, match=r"unknown: text_decoder\.bert\.surprise"):
        train_captioner([world_run.path], settings, tmp_path / "odd")


def test_parts_of_the_release_that_are_not_tied_are_refused(original_pth: Path) -> None:
    content = torch.load(original_pth, weights_only=True)["model"]
    name = "text_decoder.bert.encoder.layer.1.output.dense.bias"
    content[name] = content[name] + 1
    torch.save({"model": content}, original_pth)
    with pytest.raises(UsageError, match=r"differ in 1 of .* the first decoder.layers.1.feed"):
        start_blip(replace(TINY, init=str(original_pth)))
