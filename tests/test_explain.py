"""Explanations: texts to words, probabilities as the scorers give them, maps that lie where the world has things."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from capfilt.curation.scorers import ItmScorer
from capfilt.errors import UsageError
from capfilt.explain import ExplainableModel, load_explainable, read_text
from capfilt.settings import FilterSettings, Stage1Settings
from capfilt.train.generate import prepare_images
from capfilt.train.saved import encode_texts, load_stage1
from capfilt.train.stage1 import train_stage1
from capfilt.world.language import Mention, Statement, phrase
from capfilt.world.scenes import Scene, draw_scene, render
from tests import factories
from tests.train import small_models

NUM_SCENES = 100
PICTURE_PX = 160


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models: `filter`, `captioner`, `stage1`."""
    folder = tmp_path_factory.mktemp("explained")
    config = factories.blip_config(depth=4)
    factories.save_filter(folder / "filter", config=config)
    factories.save_captioner(folder / "captioner", config=config)
    small_models.save_blip(folder / "blip")
    run = small_models.save_run(folder / "run", [8])
    settings = Stage1Settings(
        image_encoder=str(folder / "blip"), num_queries=4, embed_dim=16, dropout=0.0, max_steps=2, batch_size=4,
        warmup_steps=0, device="cpu",
    )  # fmt: skip
    train_stage1([run.path], settings, folder / "stage1")
    return folder


@pytest.fixture(scope="module")
def filter_model(folders: Path) -> ExplainableModel:
    return load_explainable(str(folders / "filter"), device="cpu")


@pytest.fixture(scope="module")
def embedded() -> ExplainableModel:
    return load_explainable("embedded", device="cpu")


# --- words ----------------------------------------------------------------------------------------------------


def test_pieces_are_joined_to_words_and_specials_left_out(filter_model: ExplainableModel) -> None:
    read = read_text(filter_model, "  Two DOGS running, in a <b>t-shirt</b>! ")
    assert read.words == ("two", "dogs", "running,", "in", "a", "t-shirt")
    assert read.shown == "two dogs running, in a t-shirt"
    names = filter_model.tokenizer.convert_ids_to_tokens(read.tokens)
    pieces = [[names[place] for place in word] for word in read.places]
    assert pieces[:2] == [["two"], ["dog", "##s"]]
    assert pieces[5] == ["t", "[UNK]", "s", "##h", "##i", "##r", "##t"]
    flat = [place for word in read.places for place in word]
    assert flat == list(range(1, len(read.tokens) - 1)), "every piece but the special tokens, once"
    assert read.cut == ""
    assert read.tokens[0] == filter_model.first_token_id != filter_model.tokenizer.cls_token_id


def test_what_has_no_room_is_named(filter_model: ExplainableModel) -> None:
    small = replace(filter_model, max_tokens=6)
    read = read_text(small, "a red dog running under the tree")
    assert len(read.tokens) == 6
    assert read.words == ("a", "red", "dog", "running")
    assert read.shown == "a red dog running"
    assert read.cut == "under the tree"
    broken = read_text(small, "a red dog trees")
    assert (broken.words, broken.cut) == (("a", "red", "dog", "trees"), "s"), "a word that is read in part is shown"
    assert read_text(filter_model, "dog " * 60).cut == " ".join(["dog"] * 27), "35 tokens, [ENC] and [SEP] among them"


@pytest.mark.parametrize("text", ["", "  ", "!!!", "<br>", "\x00\x1b"])
def test_a_text_without_words_is_refused(filter_model: ExplainableModel, text: str) -> None:
    with pytest.raises(UsageError, match="holds no words"):
        read_text(filter_model, text)


def test_the_captioners_prompt_is_read_but_not_explained(folders: Path) -> None:
    model = load_explainable(str(folders / "captioner"), device="cpu")
    plain, prompted = read_text(model, "a dog"), read_text(model, "a picture of a dog")
    assert plain == prompted
    assert plain.words == ("a", "dog")
    assert model.tokenizer.decode(plain.tokens[1:-1]) == "a picture of a dog"
    assert [model.tokenizer.convert_ids_to_tokens(plain.tokens)[w[0]] for w in plain.places] == ["a", "dog"]
    assert read_text(model, "picture").words == ("picture",)
    joined = read_text(replace(model, prompt="a "), "dogs")
    assert joined.words == ("dogs",)
    assert read_text(replace(model, prompt="a dog"), "s").words == ("s",), "a prompt without a space behind it"


@pytest.mark.parametrize(
    "text", ["[SEP] dog [CLS] [PAD]", "$\\frac{1}{2}$ dog", "\u202edog\u202c cat", "犬 и 🐶 dog", "dog " * 5000]
)
def test_hostile_texts_are_read_as_words(filter_model: ExplainableModel, text: str) -> None:
    read = read_text(filter_model, text)
    special = set(filter_model.tokenizer.all_special_ids) - {filter_model.tokenizer.unk_token_id}
    assert not special & set(read.tokens[1:-1])
    assert len(read.tokens) <= 35
    (explained,) = filter_model.explain(factories.draw_picture(1), [text])
    assert np.isfinite(explained.maps).all()


# --- models -----------------------------------------------------------------------------------------------------


def test_probability_is_the_filters_score(folders: Path, filter_model: ExplainableModel) -> None:
    picture, texts = factories.draw_picture(2), ["a red dog", "two cats running under the old tree", "dog " * 60]
    scorer = ItmScorer(FilterSettings(filter_model=str(folders / "filter"), device="cpu", dtype="float32"))
    expected = scorer.score([scorer.prepare(picture)], [texts])[0]
    found = filter_model.explain(picture, texts)
    assert [one.probability for one in found] == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in expected}) == 3


def test_probability_is_that_of_stage_1(folders: Path) -> None:
    model = load_explainable(str(folders / "stage1"), device="cpu")
    picture = Image.fromarray(small_models.draw_square("red", "left", seed=1))
    texts = ["a red square on the left", "a green square"]
    found = model.explain(picture, texts)
    saved = load_stage1(folders / "stage1", torch.device("cpu"))
    with torch.no_grad():
        features = saved.encoder.vision(prepare_images([picture, picture], saved.encoder.preparation))
        image = saved.stage.eval().image_key_values(features)
        logits = saved.stage.itm_logits(image, encode_texts(saved.tokenizer, texts, 32, torch.device("cpu")))
    assert [one.probability for one in found] == pytest.approx(logits.softmax(dim=1)[:, 1].tolist(), abs=1e-5)
    assert found[0].words == ("a", "red", "square", "on", "the", "left")


@pytest.mark.parametrize(("kind", "layers", "chosen"), [("filter", (0, 1, 2), 2), ("captioner", (0, 1, 2, 3), 3)])
def test_folders_and_their_layers(folders: Path, kind: str, layers: tuple[int, ...], chosen: int) -> None:
    model = load_explainable(str(folders / kind), device="cpu")
    assert (model.kind, model.layers, model.layer) == (kind, layers, chosen)
    (found,) = model.explain(factories.draw_picture(3), ["a red dogs"], 0)
    assert found.maps.shape == (3, 4, 4)
    assert found.average.shape == (4, 4)
    pieces = found.maps * np.array([1, 1, 2])[:, None, None]  # the last word has two pieces
    np.testing.assert_allclose(found.average, pieces.sum(axis=0) / 4, rtol=1e-4, atol=1e-9)
    total = sum(float(one.sum()) for one in found.maps)
    assert found.shares == pytest.approx([float(one.sum()) / total for one in found.maps], rel=1e-4)
    assert (found.word_probabilities is not None) == (kind == "captioner")


@pytest.mark.parametrize("kind", ["filter", "captioner"])
def test_originals_tell_their_kind(tmp_path: Path, kind: str) -> None:
    build = factories.build_filter if kind == "filter" else factories.build_captioner
    vocabulary = factories.read_bert_vocabulary()
    theirs = build(config=factories.original_config(vocabulary_size=len(vocabulary)))
    factories.save_original(tmp_path / "model.pth", theirs.state_dict())
    factories.save_tokenizer(tmp_path, vocabulary)
    model = load_explainable(str(tmp_path / "model.pth"), device="cpu")
    assert model.kind == kind
    assert model.explain(factories.draw_picture(6), ["hedgehogs"])[0].words == ("hedgehogs",)


def test_embedded_names() -> None:
    assert load_explainable("embedded", device="cpu").kind == "filter"
    assert load_explainable("embedded-captioner", device="cpu").kind == "captioner"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embedded-opt", "OPTForCausalLM; expected one of BlipForImageTextRetrieval, BlipForConditional"),
        ("embedded-clip", "config.json"),
        ("{}/run", "config.json"),
        ("{}/nowhere", "There is no model to explain"),
        ("", "No model to explain is named"),
    ],
)
def test_other_models_are_refused(folders: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_explainable(name.format(folders), device="cpu")


@pytest.mark.parametrize(
    ("kind", "layer", "message"),
    [
        ("filter", 3, "--layer is 3, counted from 0 to 3: in the last one no word.*expected 0 to 2"),
        ("filter", 4, "counted from 0 to 3: expected 0 to 2"),
        ("filter", -1, "expected 0 to 2"),
        ("captioner", 9, "counted from 0 to 3: expected 0 to 3"),
        ("stage1", 1, "that one does not attend to the picture; expected one of 0, 2"),
        ("stage1", 7, "counted from 0 to 2: expected one of 0, 2"),
    ],
)
def test_layers_without_maps_are_refused(folders: Path, kind: str, layer: int, message: str) -> None:
    model = load_explainable(str(folders / kind), device="cpu")
    with pytest.raises(UsageError, match=message):
        model.explain(factories.draw_picture(4), ["a dog"], layer)


@pytest.mark.parametrize("kind", ["filter", "captioner", "stage1"])
def test_another_image_size(folders: Path, kind: str) -> None:
    model = load_explainable(str(folders / kind), device="cpu", image_size_px=56)
    assert model.image_size_px == 56
    assert model.explain(factories.draw_picture(5), ["a dog"])[0].maps.shape == (2, 7, 7)
    own = load_explainable(str(folders / kind), device="cpu", image_size_px=32)
    same = load_explainable(str(folders / kind), device="cpu")
    picture = factories.draw_picture(5)
    assert own.explain(picture, ["a dog"])[0].maps.tobytes() == same.explain(picture, ["a dog"])[0].maps.tobytes()
    with pytest.raises(UsageError, match="--image-size is 60; expected a multiple of 8.*such as 56 or 64"):
        load_explainable(str(folders / kind), device="cpu", image_size_px=60)


# --- where things are -------------------------------------------------------------------------------------------


def covered(scene: Scene, group: int, side: int) -> np.ndarray:
    """How much of each patch the boxes around a group's objects cover, 0 to 1, found on a fine grid."""
    fine = 16
    places = (np.arange(side * fine) + 0.5) / (side * fine)
    inside = np.zeros((side * fine, side * fine), dtype=bool)
    for placement in scene.placements:
        if placement.group == group:
            rows, columns = abs(places - placement.y) <= placement.radius, abs(places - placement.x) <= placement.radius
            inside |= rows[:, None] & columns[None]
    return inside.reshape(side, fine, side, fine).mean(axis=(1, 3))


def share_inside(map_IJ: np.ndarray, cover_IJ: np.ndarray) -> float:
    return float((map_IJ * cover_IJ).sum() / map_IJ.sum()) if map_IJ.sum() > 0 else 0.0


def measure_objects(model: ExplainableModel, layer: int) -> tuple[float, float]:
    """Over scenes: of a text that names a scene's first objects alone, the share of its average map within their
    boxes, and the boxes' share of the picture."""
    shares, areas = [], []
    for seed in range(NUM_SCENES):
        scene = draw_scene(seed, "test")
        group = scene.groups[0]
        statement = Statement((Mention(group.kind, group.color, None, group.count),))
        text = phrase(statement, np.random.default_rng(seed))
        picture = Image.fromarray(render(scene, PICTURE_PX, PICTURE_PX))
        (found,) = model.explain(picture, [text], layer)
        cover = covered(scene, 0, len(found.average))
        shares.append(share_inside(found.average, cover))
        areas.append(cover.mean())
    return float(np.mean(shares)), float(np.mean(areas))


def measure_colors(model: ExplainableModel, layer: int) -> tuple[float, float, int]:
    """Over scenes of two objects of different colours, each named: the share of a colour's map within its own object's
    box and within the other's, and how many colours there were."""
    own, other = [], []
    for seed in range(NUM_SCENES):
        scene = draw_scene(seed, "test")
        if scene.relation is None or scene.groups[0].color == scene.groups[1].color:
            continue
        mentions = tuple(Mention(group.kind, group.color, None, 1) for group in scene.groups)
        text = phrase(Statement(mentions, scene.relation), np.random.default_rng(seed))
        (found,) = model.explain(Image.fromarray(render(scene, PICTURE_PX, PICTURE_PX)), [text], layer)
        covers = [covered(scene, number, len(found.average)) for number in (0, 1)]
        for number, group in enumerate(scene.groups):
            if group.color in found.words:
                map_IJ = found.maps[found.words.index(group.color)]
                own.append(share_inside(map_IJ, covers[number]))
                other.append(share_inside(map_IJ, covers[1 - number]))
    return float(np.mean(own)), float(np.mean(other)), len(own)


def show(figures: dict[int, str]) -> None:
    """By layer; pytest's -rP shows it."""
    sys.stdout.write(f"{figures}\n")


def test_the_filter_sees_objects_where_they_are(embedded: ExplainableModel) -> None:
    found = {layer: measure_objects(embedded, layer) for layer in embedded.layers}
    show({layer: f"{share:.1%} of the map in boxes of {area:.1%}" for layer, (share, area) in found.items()})
    assert embedded.layers == (0, 1)
    assert max(found, key=lambda layer: found[layer][0]) == embedded.layer, "the default is the best"
    share, area = found[embedded.layer]
    assert share > 0.55
    assert area < 0.2


def test_the_filter_tells_colors_apart(embedded: ExplainableModel) -> None:
    found = {layer: measure_colors(embedded, layer) for layer in embedded.layers}
    show({layer: f"{own:.1%} own, {other:.1%} other, n = {n}" for layer, (own, other, n) in found.items()})
    own, other, num_colors = found[embedded.layer]
    assert num_colors > 40
    assert own > 2 * other


def test_the_captioner_sees_objects_where_they_are() -> None:
    model = load_explainable("embedded-captioner", device="cpu")
    found = {layer: measure_objects(model, layer) for layer in model.layers}
    own, other, num_colors = measure_colors(model, model.layer)
    show({layer: f"{share:.1%} of the map in boxes of {area:.1%}" for layer, (share, area) in found.items()})
    show({model.layer: f"{own:.1%} own, {other:.1%} other, n = {num_colors}"})
    assert max(found, key=lambda layer: found[layer][0]) == model.layer, "the default is the best"
    assert found[model.layer][0] > 0.55
    assert own > 2 * other
