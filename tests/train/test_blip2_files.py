"""Published BLIP-2 models, small: to go on from in both stages and to generate with; what is refused, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BlipImageProcessor, OPTForCausalLM, T5ForConditionalGeneration

from capfilt.errors import UsageError
from capfilt.settings import Stage1Settings, Stage2Settings
from capfilt.train.batches import from_arrays
from capfilt.train.blip2_files import find_stage, read_blip2
from capfilt.train.generate import load_generator, prepare_images
from capfilt.train.saved import encode_texts, load_stage1, load_stage2, save_stage1
from capfilt.train.stage1 import train_stage1_on
from capfilt.train.stage2 import train_stage2_on
from capfilt.weights.llms import load_llm
from tests import blip2_layouts
from tests.cli.conftest import capfilt
from tests.train import small_models

CPU = torch.device("cpu")
STEPS = {"max_steps": 2, "batch_size": 8, "warmup_steps": 0, "learning_rate": 1e-3, "dropout": 0.0, "device": "cpu"}
TEXTS = ["a red square on the left", "here is a blue square"]
NUM_WORDS = 5 + len(small_models.WORDS)
"""Of the tokenizer; [DEC] comes behind, as in the published models."""


def dataset() -> Any:
    return from_arrays(*small_models.draw_pairs(20))


def draw() -> list[Any]:
    return list(small_models.draw_pairs(2, seed=7)[0])


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save_bert(tmp_path_factory.mktemp("bert"))


def make_older(folder: Path) -> None:
    """config.json with what those on the hub still say, since transformers once asked for it."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_decoder_only_language_model": True, "torch_dtype": "float32", "initializer_factor": 1.0}
    config["vision_config"] |= {"dropout": 0.0, "num_channels": 3, "projection_dim": 512, "initializer_factor": 1.0}
    config["qformer_config"] |= {"classifier_dropout": None, "position_embedding_type": "absolute"}
    (folder / "config.json").write_text(json.dumps(config))


def copy_tokenizer(source: Path, folder: Path) -> None:
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


@pytest.fixture(scope="module")
def itm_dir(bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `Salesforce/blip2-itm-vit-g`: no temperature, no head of ITG, nothing of ours in its config."""
    folder = tmp_path_factory.mktemp("itm")
    blip2_layouts.build_itm(NUM_WORDS + 1).save_pretrained(folder)
    make_older(folder)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    copy_tokenizer(bert_dir, folder)
    return folder


@pytest.fixture(scope="module", params=["opt", "t5"])
def llm_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = small_models.save_opt if request.param == "opt" else small_models.save_t5
    return save(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def generation_model(llm_dir: Path) -> Any:
    """A `Blip2ForConditionalGeneration` whose language model is the one of `llm_dir`, with a row for <image>."""
    cls = OPTForCausalLM if (llm_dir / "config.json").read_text().count('"opt"') else T5ForConditionalGeneration
    llm = cls.from_pretrained(llm_dir)
    rows = llm.get_input_embeddings().weight.shape[0]
    llm.resize_token_embeddings(rows + 1, mean_resizing=False)
    if getattr(llm.config, "bos_token_id", None) is None:
        llm.config.bos_token_id = 1  # as that of blip2-flan-t5-xl
    model = blip2_layouts.build_generation(llm.config, image_token_id=rows)
    model.language_model.load_state_dict(llm.state_dict())
    return model


@pytest.fixture(scope="module")
def generation_dir(generation_model: Any, llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `Salesforce/blip2-opt-2.7b`: in shards with an index."""
    folder = tmp_path_factory.mktemp("generation")
    generation_model.save_pretrained(folder, max_shard_size="300kB")
    assert len(list(folder.glob("model-0*.safetensors"))) > 1
    make_older(folder)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(llm_dir)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_stage1_goes_on_from_a_published_model(itm_dir: Path, tmp_path: Path) -> None:
    saved = load_stage1(itm_dir, CPU)
    stage, texts = saved.stage.eval(), encode_texts(saved.tokenizer, TEXTS, 32, CPU)
    pixels = prepare_images(draw(), saved.encoder.preparation)
    theirs = blip2_layouts.build_itm(NUM_WORDS + 1)
    inputs = {"pixel_values": pixels, "input_ids": texts.tokens, "attention_mask": texts.mask.long()}
    expected = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
    image = stage.image_key_values(saved.encoder.vision(pixels))
    torch.testing.assert_close(stage.itm_logits(image, texts), expected, atol=1e-4, rtol=0)
    assert (stage.dec_token_id, stage.temperature.item()) == (NUM_WORDS, pytest.approx(0.07))
    with torch.enable_grad():
        train_stage1_on(dataset(), Stage1Settings(init=str(itm_dir), **STEPS), tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (itm_dir, tmp_path))
    assert before.keys() == after.keys()
    frozen = [name for name in before if "vision_model" in name and "post_layernorm" not in name]
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["query_tokens"], after["query_tokens"])
    assert (before["query_tokens"] - after["query_tokens"]).abs().max() < 0.01  # two small steps from there


def test_stage1_goes_on_from_its_own_with_the_head_it_had(itm_dir: Path, tmp_path: Path) -> None:
    train_stage1_on(dataset(), Stage1Settings(init=str(itm_dir), **STEPS), tmp_path / "first")
    extra = load_file(tmp_path / "first" / "stage1_extra.safetensors")
    again = load_stage1(tmp_path / "first", CPU).stage.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in extra.items())


@torch.no_grad()
def test_a_published_model_generates_what_transformers_does(generation_dir: Path, generation_model: Any) -> None:
    generator = load_generator(generation_dir, device="cpu")
    pixels = prepare_images(draw(), generator.encoder.preparation)
    length = {"max_new_tokens": 8, "min_new_tokens": 3}
    end, pad = generator.stage.llm.end_token_id, generator.stage.llm.tokenizer.pad_token_id
    tokens = generation_model.generate(pixels, do_sample=False, eos_token_id=end, pad_token_id=pad, **length)
    expected = [text.strip() for text in generator.stage.llm.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    assert generator.generate(draw(), **length) == expected
    assert any(expected)
    ours = generator.stage.visual_prompts(generator.encoder.vision(pixels))
    theirs = generation_model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_stage2_goes_on_with_the_language_model_inside(generation_dir: Path, llm_dir: Path, tmp_path: Path) -> None:
    settings = Stage2Settings(min_learning_rate=0.0, **STEPS)
    train_stage2_on(dataset(), generation_dir, "", settings, tmp_path)
    before, after = load_stage2(generation_dir, CPU), load_stage2(tmp_path, CPU)
    old, new = (saved.stage.llm.model.state_dict() for saved in (before, after))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert not torch.equal(before.stage.projection.weight, after.stage.projection.weight)
    with pytest.raises(UsageError, match="has a language model of its own. Leave --llm out"):
        train_stage2_on(dataset(), generation_dir, str(llm_dir), settings, tmp_path / "x")


def test_a_shard_that_lacks_is_named(generation_dir: Path, tmp_path: Path) -> None:
    for source in generation_dir.iterdir():
        if "00001-of" not in source.name:
            (tmp_path / source.name).write_bytes(source.read_bytes())
    with pytest.raises(UsageError, match=r"lacks model-00001-of-0000\d\.safetensors, which model\.safetensors\.index"):
        load_stage2(tmp_path, CPU)


def test_weights_that_torch_saved(generation_dir: Path, generation_model: Any, tmp_path: Path) -> None:
    for source in generation_dir.iterdir():
        if "safetensors" not in source.name:
            (tmp_path / source.name).write_bytes(source.read_bytes())
    torch.save(generation_model.state_dict(), tmp_path / "pytorch_model.bin")
    found, expected = (load_stage2(folder, CPU).stage.state_dict() for folder in (tmp_path, generation_dir))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def lavis_dir(bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """blip2_pretrained.pth whole and without its image encoder, that one alone, and BERT's tokenizer beside them."""
    folder = tmp_path_factory.mktemp("lavis")
    copy_tokenizer(bert_dir, folder)
    theirs = blip2_layouts.build_itm(NUM_WORDS + 1).state_dict()
    torch.manual_seed(9)
    state = blip2_layouts.lavis_state(theirs)
    blip2_layouts.save_pth(folder / "whole.pth", state)
    trained = {k: v for k, v in state.items() if not k.startswith("visual_encoder.")}
    blip2_layouts.save_pth(folder / "trained.pth", trained)
    eva = {k.removeprefix("visual_encoder."): v for k, v in state.items() if k.startswith("visual_encoder.")}
    torch.save(eva, folder / "eva_vit_g.pth")
    return folder


def test_lavis_stage1_loads_with_its_head_and_its_encoder(lavis_dir: Path, itm_dir: Path, tmp_path: Path) -> None:
    whole = load_stage1(lavis_dir / "whole.pth", CPU)
    parts = load_stage1(lavis_dir / "trained.pth", CPU, image_encoder=str(lavis_dir / "eva_vit_g.pth"))
    expected = load_stage1(itm_dir, CPU)
    lavis = torch.load(lavis_dir / "whole.pth", weights_only=True)["model"]
    for found in (whole, parts):
        vision = found.encoder.vision.state_dict()
        assert all(torch.equal(vision[k], v) for k, v in expected.encoder.vision.state_dict().items())
        bridge = found.stage.qformer.state_dict()
        assert all(torch.equal(bridge[k], v) for k, v in expected.stage.qformer.state_dict().items())
        assert torch.equal(found.stage.vision_norm.weight, expected.stage.vision_norm.weight)
        head = {k: v for k, v in found.stage.state_dict().items() if k.startswith("lm_head.")}
        names = {"transform.": "transform.dense.", "norm.": "transform.LayerNorm.", "vocabulary.": "decoder."}
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                assert torch.equal(head[f"lm_head.{ours}{kind}"], lavis[f"Qformer.cls.predictions.{theirs}{kind}"])
        assert found.stage.temperature.item() == pytest.approx(0.05)
        assert found.stage.dec_token_id == NUM_WORDS
    save_stage1(tmp_path, whole.encoder, whole.stage, whole.tokenizer, whole.embed_dim)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(itm_dir / "model.safetensors").keys()


def test_lavis_stage1_trains_on_and_starts_stage2(lavis_dir: Path, llm_dir: Path, tmp_path: Path) -> None:
    run = small_models.save_run(tmp_path / "run", [12])
    eva = ("--image-encoder", lavis_dir / "eva_vit_g.pth")
    steps = ("--max-steps", 1, "--batch-size", 4, "--warmup-steps", 0, "--device", "cpu")
    command = ("train", "stage1", run.path, "--init", lavis_dir / "trained.pth", *eva, *steps)
    done = capfilt(*command, "--output", tmp_path / "1")
    assert done.code == 0, done.err
    command = ("train", "stage2", run.path, "--init", lavis_dir / "whole.pth", "--llm", llm_dir, *steps)
    done = capfilt(*command, "--output", tmp_path / "2")
    assert done.code == 0, done.err
    assert find_stage(tmp_path / "2") == "stage2"


def test_lavis_stage2_wants_its_language_model(
    generation_model: Any, lavis_dir: Path, llm_dir: Path, tmp_path: Path, itm_dir: Path
) -> None:
    family = generation_model.config.text_config.model_type
    state = blip2_layouts.lavis_state(generation_model.state_dict(), llm=family, with_vision=False)
    path = blip2_layouts.save_pth(tmp_path / "blip2_stage2.pth", state)
    assert find_stage(path) == "stage2"
    eva = blip2_layouts.eva_state(generation_model.vision_model.state_dict())
    torch.save(eva, tmp_path / "eva_vit_g.pth")
    eva_name = str(tmp_path / "eva_vit_g.pth")
    llm = load_llm(llm_dir)
    found = load_stage2(path, CPU, llm=llm, image_encoder=eva_name)
    pixels = prepare_images(draw(), found.encoder.preparation)
    with torch.no_grad():
        expected = generation_model.get_image_features(pixels).pooler_output
        prompts = found.stage.eval().visual_prompts(found.encoder.vision(pixels))
    torch.testing.assert_close(prompts, expected, atol=1e-4, rtol=0)
    texts = load_generator(path, "cpu", "auto", str(llm_dir), eva_name).generate(draw(), max_new_tokens=4)
    assert len(texts) == 2
    settings = Stage2Settings(image_encoder=eva_name, min_learning_rate=0.0, **STEPS)
    train_stage2_on(dataset(), path, str(llm_dir), settings, tmp_path / "out")
    with pytest.raises(UsageError, match="holds no language model: LAVIS saves none. Give --llm"):
        load_stage2(path, CPU, image_encoder=eva_name)
    with pytest.raises(UsageError, match="holds no image encoder. Give --image-encoder"):
        load_stage2(path, CPU, llm=llm)
    other = small_models.save_t5(tmp_path / "t5") if family == "opt" else small_models.save_opt(tmp_path / "opt")
    with pytest.raises(UsageError, match=f"was trained on a '{family}' of width 48; --llm is"):
        load_stage2(path, CPU, llm=load_llm(other), image_encoder=eva_name)
    with pytest.raises(UsageError, match="was saved by LAVIS after stage2; expected one of stage1"):
        read_blip2(path, "stage1")


def test_what_does_not_go_together(itm_dir: Path, lavis_dir: Path, blip_dir: Path, tmp_path: Path) -> None:
    cases = [
        ({"init": str(itm_dir), "image_encoder": str(blip_dir)}, "has an image encoder of its own"),
        ({"init": str(itm_dir), "image_encoder_layer": "last"}, "Leave --image-encoder-layer out"),
        ({"init": str(itm_dir), "qformer_init": str(blip_dir)}, "brings a Q-Former of its own"),
        ({"init": str(lavis_dir / "trained.pth")}, "holds no image encoder. Give --image-encoder"),
        ({"init": str(lavis_dir / "trained.pth"), "image_encoder": str(blip_dir)}, "features of width 48; .* on 88"),
        ({"init": str(blip_dir)}, "expected Blip2ForImageTextRetrieval"),
    ]
    for given, message in cases:
        with pytest.raises(UsageError, match=message):
            train_stage1_on(dataset(), Stage1Settings(**given, **STEPS), tmp_path / "out")
    with pytest.raises(UsageError, match="num_queries is 4; expected to be left out with init"):
        Stage1Settings(init=str(itm_dir), num_queries=4)
    with pytest.raises(UsageError, match="No language model is named"):
        train_stage2_on(dataset(), itm_dir, "", Stage2Settings(min_learning_rate=0.0, **STEPS), tmp_path / "out")


def test_a_tokenizer_with_more_words_than_the_model(lavis_dir: Path, blip_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(blip_dir)
    tokenizer.add_tokens(["more", "words"])
    tokenizer.save_pretrained(tmp_path)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert "[DEC]" in vocabulary
    state = torch.load(lavis_dir / "whole.pth", weights_only=True)["model"]
    state["Qformer.bert.embeddings.word_embeddings.weight"] = torch.randn(5, 64)
    state["Qformer.cls.predictions.decoder.weight"] = state["Qformer.bert.embeddings.word_embeddings.weight"].clone()
    for ending in ("bias", "decoder.bias"):
        state[f"Qformer.cls.predictions.{ending}"] = torch.zeros(5)
    blip2_layouts.save_pth(tmp_path / "x.pth", state)
    with pytest.raises(UsageError, match="knows 5, .DEC. included"):
        load_stage1(tmp_path / "x.pth", CPU)
