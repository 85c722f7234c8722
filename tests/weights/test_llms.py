"""Language models from disk: what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from capfilt.errors import UsageError
from capfilt.weights.llms import build_llm, load_llm
from capfilt.weights.model_files import load_tokenizer, read_weights
from tests.train import small_models


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_one_from_its_weights_is_the_one_of_its_folder(tmp_path: Path, dtype: torch.dtype | None) -> None:
    folder = small_models.save_opt(tmp_path / "opt")
    state = {name: tensor.half() for name, tensor in read_weights(folder).items()}
    config, tokenizer = AutoConfig.from_pretrained(folder), load_tokenizer(folder)
    found = build_llm(config, state, tokenizer, torch.device("cpu"), dtype)
    expected = load_llm(folder, dtype=torch.float16).model.to(dtype or torch.float16).state_dict()
    assert found.model.state_dict().keys() == expected.keys()
    for name, tensor in found.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0)
    state.pop(next(iter(state)))
    with pytest.raises(UsageError, match="The language model lacks or does not know"):
        build_llm(config, state, tokenizer, torch.device("cpu"), dtype)


def test_weights_of_other_shapes_are_named(tmp_path: Path) -> None:
    folder = small_models.save_opt(tmp_path / "opt")
    config = json.loads((folder / "config.json").read_text())
    found = config["ffn_dim"]
    (folder / "config.json").write_text(json.dumps({**config, "ffn_dim": found + 4}))
    said = rf"weights of other shapes than its config says, such as .*fc1.bias: \({found},\); expected \({found + 4},\)"
    with pytest.raises(UsageError, match=said):
        load_llm(folder)
    with pytest.raises(UsageError, match=said):
        build_llm(
            AutoConfig.from_pretrained(folder), read_weights(folder), load_tokenizer(folder), torch.device("cpu"), None
        )
