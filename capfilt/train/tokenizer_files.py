"""The tokenizer of a trained language model or CLIP, written beside its weights.

In: a loaded tokenizer. Out: its files in the model's folder, the same whatever was encoded with it before and
wherever it was read from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from capfilt.weights.model_files import reset_padding

_OF_THIS_MACHINE = ("name_or_path", "is_local", "local_files_only")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer in words that transformers 4 knows too, without paths of this machine."""
    reset_padding(tokenizer)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in _OF_THIS_MACHINE}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
