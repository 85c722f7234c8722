"""One of several processes that take a step together, for the tests: started by torchrun, or run alone.

    … tests/train/ranks_worker.py OUT.safetensors SHARDING

Every objective gets the same joint batch whatever the number of processes, each process its own rows of it. Written
by the first: losses averaged over the processes, and the gradient of every weight, whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertTokenizer, OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from capfilt.models.albef import Albef, AlbefConfig, AlbefLosses
from capfilt.models.blip import Blip, FilterLosses, FineTuning
from capfilt.models.blip2 import Blip2FineTuning, Stage1, Stage2, Texts
from capfilt.models.llms import wrap_llm
from capfilt.models.med import MEDConfig
from capfilt.models.momentum import MomentumConfig
from capfilt.models.qformer import QFormerConfig
from capfilt.models.vit import VisionTransformer, ViTConfig
from capfilt.settings import AlbefTrainSettings, TrainSettings
from capfilt.train.albef import AlbefInputs, follow_model
from capfilt.train.batches import Batch, Cursor, Draws
from capfilt.train.processes import Processes, full_tensor, join_processes

NUM_ROWS = 8
VIT = ViTConfig(image_size_px=16, patch_size_px=8, width=32, depth=2, num_heads=2, mlp_width=64)
MED = MEDConfig(
    vocab_size=30, width=32, depth=2, num_heads=2, mlp_width=64, max_positions=16, vision_width=32,
    sep_token_id=2, dec_token_id=28, enc_token_id=29,
)  # fmt: skip
ALBEF = AlbefConfig(
    vocab_size=30, width=32, depth=2, text_depth=1, num_heads=2, mlp_width=64, max_positions=16, vision_width=32,
    sep_token_id=2, cls_token_id=1, mask_token_id=3,
)  # fmt: skip
QFORMER = QFormerConfig(
    num_queries=4, width=32, depth=2, num_heads=2, mlp_width=64, vision_width=32, vocab_size=30, max_positions=16,
    dropout=0.0,
)  # fmt: skip


def draw_tokens(generator: torch.Generator) -> Tensor:
    """Texts of different lengths, [CLS] first, [SEP] last, padded."""
    tokens = torch.full((NUM_ROWS, 9), 0)
    for row in range(NUM_ROWS):
        words = torch.randint(3, 28, (2 + row % 5,), generator=generator)
        tokens[row, : len(words) + 2] = torch.tensor([1, *words.tolist(), 2])
    return tokens


class WordTokenizer:
    """Numbers as words, which is all that stage 2 needs of a tokenizer here."""

    unk_token_id, eos_token_id, pad_token_id = 0, 2, 1

    def __call__(self, text: str, add_special_tokens: bool = False) -> Any:
        ids = [3 if word == "\n" else int(word) for word in ([text] if text == "\n" else text.split())]
        return type("Encoded", (), {"input_ids": ids})()


def build_stage2(family: str) -> Stage2:
    sizes: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 1, "eos_token_id": 2}
    if family == "opt":
        config = OPTConfig(
            **sizes, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, dropout=0.0,
            word_embed_proj_dim=32, max_position_embeddings=64, bos_token_id=2,
        )  # fmt: skip
        model: Any = OPTForCausalLM(config)
    else:
        config = T5Config(
            **sizes, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=1,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
    config_without_text = QFormerConfig(**{**vars(QFORMER), "with_text": False})
    return Stage2(config_without_text, wrap_llm(model, WordTokenizer()))


def build_tuning(family: str, *, with_vision: bool) -> Blip2FineTuning:
    vision = VisionTransformer(VIT) if with_vision else None
    if vision is not None:
        vision.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return Blip2FineTuning(build_stage2(family), vision)


def build_blip(momentum: bool) -> Blip:
    model = Blip(VisionTransformer(VIT), MED, embed_dim=16)
    model.start_momentum(MomentumConfig(0.9, 24) if momentum else None)
    return model


def build_albef(momentum: bool) -> AlbefLosses:
    model = Albef(VisionTransformer(VIT), ALBEF, embed_dim=16)
    return AlbefLosses(model, MomentumConfig(0.9, 24) if momentum else None)


def albef_inputs(images: Tensor, tokens: Tensor, processes: Processes, step: int) -> dict[str, Any]:
    """Made by the training's own code: alone padded to the longest text, with others to the setting."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *(f"w{number}" for number in range(5, 30))]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    texts = [" ".join(words[token] for token in row if token > 2) for row in tokens.tolist()]
    settings = AlbefTrainSettings(init="x", max_text_tokens=12, mlm_share=0.4)
    batch = Batch(images, texts, [str(row) for row in range(len(texts))], Cursor(0, 3 + NUM_ROWS))
    return AlbefInputs(settings, tokenizer, processes, num_images=4)(batch, Draws(0, step, ranks=processes.ranks))


OBJECTIVES: dict[str, Callable[[], nn.Module]] = {
    "blip": lambda: build_blip(momentum=False),
    "blip-momentum": lambda: build_blip(momentum=True),
    "filter": lambda: FineTuning(FilterLosses(build_blip(momentum=False).filter)),
    "albef": lambda: build_albef(momentum=False),
    "albef-momentum": lambda: build_albef(momentum=True),
    "stage1": lambda: Stage1(QFORMER, embed_dim=16, dec_token_id=28),
    "stage2-opt": lambda: build_stage2("opt"),
    "stage2-t5": lambda: build_stage2("t5"),
    "tuning-opt": lambda: build_tuning("opt", with_vision=True),
    "tuning-t5": lambda: build_tuning("t5", with_vision=False),
}


def inputs_of(name: str, processes: Processes, step: int) -> dict[str, Any]:
    """This process's rows of the joint batch."""
    generator = torch.Generator().manual_seed(7 + step)
    images, tokens = torch.randn(NUM_ROWS, 3, 16, 16, generator=generator), draw_tokens(generator)
    features = torch.randn(NUM_ROWS, 5, 32, generator=generator)
    num_own = NUM_ROWS // processes.num
    own = slice(processes.ranks.offset(num_own), processes.ranks.offset(num_own) + num_own)
    uniform = Draws(0, step, ranks=processes.ranks).uniform(2, num_own)
    if name.startswith(("stage2", "tuning")):
        texts = [" ".join(str(5 + (row * k) % 30) for k in range(2 + row % 4)) for row in range(NUM_ROWS)]
        if name.startswith("tuning"):
            prompts = [" ".join(str(4 + row + place) for place in range(row % 3)) for row in range(NUM_ROWS)]
            given = {"images_BCHW": images[own]} if name == "tuning-opt" else {"features_BPD": features[own]}
            return {"prompts": prompts[own], "texts": texts[own], "ranks": processes.ranks, **given}
        return {
            "features_BPD": features[own], "texts": texts[own], "ranks": processes.ranks,
            "draws": uniform[0].tolist(),
        }  # fmt: skip
    if name == "stage1":
        return {
            "features_BPD": features[own], "texts": Texts(tokens=tokens[own], mask=tokens[own] != 0),
            "ranks": processes.ranks, "uniform_2B": uniform,
        }  # fmt: skip
    if name.startswith("albef"):
        return albef_inputs(images[own], tokens[own], processes, step)
    losses = ("itc", "itm") if name == "filter" else ("itc", "itm", "lm")
    return {
        "images_BCHW": images[own], "tokens_RT": tokens[own], "losses": losses, "ranks": processes.ranks,
        "uniform_2B": uniform, "alpha": 0.4,
    }  # fmt: skip


def take_steps(name: str, processes: Processes, num_steps: int = 3) -> dict[str, Tensor]:
    """Losses of every step, and the gradients of the last, by name."""
    torch.manual_seed(0)
    objective = OBJECTIVES[name]().train()
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.ndim >= 2 and parameter.requires_grad:
                parameter.mul_(3)  # lively: otherwise all similarities are about equal
    module = processes.wrap(objective, some_unused=False)
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.02)
    found: dict[str, Tensor] = {}
    for step in range(num_steps):
        optimizer.zero_grad()
        losses = module(**inputs_of(name, processes, step))
        losses["loss"].backward()
        for key, value in losses.items():
            found[f"{name}/{step}/{key}"] = processes.gather_values(value.detach()[None].clone()).mean()
        if step + 1 < num_steps:
            optimizer.step()
        if name == "blip-momentum":
            momentum = objective.filter_losses.momentum
            assert momentum is not None
            momentum.follow(objective.filter)
            found[f"{name}/{step}/queue"] = momentum.queue.features()[0].clone()
        if isinstance(objective, AlbefLosses) and objective.momentum is not None:
            follow_model(objective)
            found[f"{name}/{step}/queue"] = objective.momentum.queue.features()[1].clone()
    for key, parameter in objective.named_parameters():
        if parameter.grad is not None:
            found[f"{name}/gradient/{key}"] = full_tensor(parameter.grad).clone()
    return found


def main(output: Path, sharding: str) -> None:
    processes = join_processes(TrainSettings(device="cpu", sharding=sharding))
    found: dict[str, Tensor] = {}
    for name in OBJECTIVES:
        found |= take_steps(name, processes)
    if processes.is_main:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, output)
    processes.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
