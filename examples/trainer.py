"""A captioner fine-tuned on a run's kept pairs by transformers' own Trainer: `CuratedDataset` in a foreign loop.

    capfilt run quickstart runs/quickstart
    python examples/trainer.py runs/quickstart --output runs/quickstart/by-trainer           # the embedded captioner
    python examples/trainer.py runs/mine --model Salesforce/blip-image-captioning-base --output captioner --steps 1000

`torchrun --nproc-per-node 8 examples/trainer.py …` trains on eight GPUs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipImageProcessor, Trainer, TrainingArguments

from capfilt import CuratedDataset
from capfilt.errors import CapfiltError
from capfilt.weights.find import EMBEDDED_DIR

_IGNORED = -100


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and saves; 1 where the run cannot be used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", help="runs with a manifest")
    parser.add_argument("--model", default=str(EMBEDDED_DIR / "blip-captioner"), help="a BLIP captioner")
    parser.add_argument("--output", required=True, type=Path, help="folder for the model")
    parser.add_argument("--steps", type=int, default=20, help="steps of the optimizer")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures of a process in a step")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read and prepare")
    options = parser.parse_args(arguments)
    model = BlipForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)  # not as it was saved
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    images = BlipImageProcessor.from_pretrained(options.model)

    first_token = model.config.text_config.bos_token_id

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        texts = tokenizer([sample["text"] for sample in samples], padding=True, truncation=True, return_tensors="pt")
        texts.input_ids[:, 0] = first_token  # BLIP's decoder begins with [DEC], not with BERT's [CLS]
        return {
            "pixel_values": images([sample["image"] for sample in samples], return_tensors="pt")["pixel_values"],
            "input_ids": texts.input_ids, "attention_mask": texts.attention_mask,
            "labels": texts.input_ids.masked_fill(texts.attention_mask == 0, _IGNORED),
        }  # fmt: skip

    try:  # Trainer hands each process its part of what is read, so the dataset is that of one
        dataset = CuratedDataset(options.runs, batch_size=options.batch_size, rank=0, num_ranks=1)
    except CapfiltError as error:
        print(f"trainer: {error}", file=sys.stderr)
        return 1
    training = TrainingArguments(
        output_dir=str(options.output), max_steps=options.steps, per_device_train_batch_size=options.batch_size,
        dataloader_num_workers=options.num_workers, learning_rate=1e-4, logging_steps=5, save_strategy="no",
        remove_unused_columns=False, report_to=[], dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(model, training, data_collator=collate, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(options.output)
    images.save_pretrained(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
