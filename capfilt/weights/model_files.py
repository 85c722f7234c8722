"""A model's folder in transformers' layout: configuration, weights, tokenizer, and how it wants its images.

In: a folder. Out: its parts; UsageError names what is missing or cannot be read. Nothing is unpickled
(weights_only), and no code of a folder runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from capfilt.data.commit import file_sha256
from capfilt.data.texts import first_line
from capfilt.errors import MissingPackageError, UsageError
from capfilt.models.convert_blip2 import State
from capfilt.weights.find import SIDE_FILES
from capfilt.weights.foreign_files import describe_file

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_TENSORS_AT_ONCE = 16
_LAYOUT_ADVICE = "Give a model in transformers' layout."
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Endings of names as BERT was published with them → as transformers has them now."""


@dataclass(frozen=True)
class ImagePreparation:
    """How an image encoder wants its images: resized to a square of this side, then normalised."""

    image_size_px: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resizer: str = "torchvision"
    """torchvision or pillow."""


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds."""
    return read_json(folder / "config.json")


def named_classes(config: Mapping[str, Any]) -> list[str]:
    """transformers' classes that a config.json names."""
    found = config.get("architectures")
    return list(map(str, found)) if isinstance(found, list) else []


def load_config(path: str | Path, advice: str) -> Any:
    """transformers' reading of the config.json of a folder or hub id. UsageError that ends in `advice` where there is
    none, or where it is of a kind that transformers does not know.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers' checks of a configuration raise errors without a common base
        raise UsageError(f"transformers cannot read {path}/config.json ({loading_problem(error)}). {advice}") from error


def loading_problem(error: Exception) -> str:
    """The error's first line, but not transformers' advice to run what lies beside a model."""
    if "trust_remote_code" in str(error):
        return "it wants a program of its own, its auto_map; none is run"
    return first_line(error)


def find_weights(folder: Path) -> list[Path]:
    """The files of the weights: safetensors (sharded or not), else .bin. UsageError where a shard of an index lacks."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            _refuse_missing_shards(folder, files)
            return files
    raise UsageError(f"{folder} has no model.safetensors. Give a model in transformers' layout.")


def _refuse_missing_shards(folder: Path, files: list[Path]) -> None:
    """An index names the shards of its kind; without one there is one file."""
    for index in folder.glob(f"*{files[0].suffix}.index.json"):
        weight_map = read_json(index).get("weight_map", {})
        named = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set[str]()
        if missing := sorted(named - {file.name for file in files}):
            raise UsageError(f"{folder} lacks {', '.join(missing)}, which {index.name} names. Fetch them again.")


def read_weights(folder: Path, dtype: torch.dtype | None = None) -> State:
    """All tensors of a folder, by transformers' names, those that BERT's published weights have older names for too.

    With a dtype, floating-point tensors are brought to it as they are read.
    """
    state: State = {}
    for file in find_weights(folder):
        if file.suffix == ".safetensors":
            state |= read_safetensors(file, dtype)
        else:
            state |= {name: _in_dtype(tensor, dtype) for name, tensor in read_torch_file(file).items()}
    return {_present_name(name): tensor for name, tensor in state.items()}


def _in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _present_name(name: str) -> str:
    for old, new in _OLD_NAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def read_safetensors(path: Path, dtype: torch.dtype | None = None) -> State:
    """Copies of a file's tensors.

    The file is mapped anew for every few of them: what was mapped stays in memory until it is closed, and the whole
    file would lie there beside the copies.
    """
    state: State = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for start in range(0, len(names), _TENSORS_AT_ONCE):
            with safe_open(path, framework="pt") as file:
                for name in names[start : start + _TENSORS_AT_ONCE]:
                    state[name] = _in_dtype(file.get_tensor(name), dtype).clone()
        return state
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(
            f"The weights in {path} cannot be read ({first_line(error)}): the file is {describe_file(path)}. "
            "Fetch them again."
        ) from error


def read_torch_file(path: Path) -> dict[str, Any]:
    """The dictionary in a .bin or .pth. Raises UsageError where it holds anything but plain tensors."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds of errors for files that are not what they should be
        raise UsageError(
            f"{path} is not a file of plain tensors: it is {describe_file(path)}. Nothing in it was run. Give "
            "safetensors, or a checkpoint that torch loads with weights_only."
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}; expected a dictionary of weights.")
    return content


def refuse_foreign_weights(path: Path) -> None:
    """UsageError, which says what the file is, where it cannot be read as plain tensors: other libraries' errors advise
    to run it.
    """
    read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)


@contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """UsageErrors raised inside name the folder or file `source`, where they do not yet."""
    try:
        yield
    except UsageError as error:
        if str(source) in str(error) or isinstance(error, MissingPackageError):
            raise
        raise UsageError(f"{source}: {error}") from error


def refuse_odd_shapes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """UsageError naming weights that do not have the shapes of their places in `expected`."""
    odd = [
        f"{name} {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
        for name, tensor in found.items()
        if tensor.shape != expected[name].shape
    ]
    if odd:
        raise UsageError(f"{len(odd)} weights do not have the sizes of the config: {'; '.join(odd[:5])}.")


def save_tensors(path: Path, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write weights as safetensors, in another floating-point dtype where one is given; readable for everyone."""
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True).contiguous()
        for name, tensor in state.items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors keeps its files to their owner


def reset_padding(tokenizer: Any) -> None:
    """Forget what the last batch was cut and padded to: it is no property of a tokenizer that is saved."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()


def read_tensors(path: Path) -> State:
    """The weights in a file: safetensors, or a .pth that has them under `model` or by themselves."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    content = read_torch_file(path)
    state = content.get("model", content)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UsageError(f"{path} holds no weights under `model`. Give a checkpoint as it was released.")
    return state


def weights_digest(folder: Path) -> str:
    """sha256 over config, tokenizer and weights of a folder, an image encoder's inside it included.

    A training goes on only with the same.
    """
    inner = ("image_encoder/*.json", "image_encoder/*.safetensors")
    return _digest(folder, (*SIDE_FILES, "*.safetensors", "pytorch_model*.bin", *inner))


def tokenizer_digest(folder: Path) -> str:
    """The same of a folder whose tokenizer alone is read: weights beside it do not count."""
    return _digest(folder, SIDE_FILES)


def _digest(folder: Path, patterns: Iterable[str]) -> str:
    digest = hashlib.sha256()
    names = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    for name in sorted(names - {"training.json"}):
        digest.update(f"{name}\0".encode())
        digest.update(bytes.fromhex(file_sha256(folder / name)))
    return digest.hexdigest()


def load_tokenizer(folder: Path, *, is_bert: bool = False) -> Any:
    """The tokenizer of a folder; `is_bert` says which class it has where tokenizer_config.json does not.

    What kind of model lies beside it does not count then: transformers need not know it.
    """
    from transformers import AutoTokenizer, BertConfig, BertTokenizer

    try:
        if is_bert and not (folder / "tokenizer_config.json").is_file():
            tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
        else:
            known = {"config": BertConfig()} if is_bert else {}
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **known)
    except Exception as error:  # the tokenizers' errors have no common base
        raise UsageError(
            f"{folder} has no readable tokenizer ({loading_problem(error)}). Add tokenizer.json."
        ) from error
    tokenizer.init_kwargs["local_files_only"] = False  # saving keeps it; where it was read is no property of it
    return tokenizer


def read_preparation(folder: Path, image_size_px: int) -> ImagePreparation:
    """The image encoder's size; mean and deviation from the folder's image processor, CLIP's where not given.

    The processor's own size is not asked: some published folders state one that the encoder cannot take.
    """
    processor = read_image_processor(folder)
    mean, std = (
        _three_numbers(folder, name, processor.get(name, default))
        for name, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
    )
    return ImagePreparation(image_size_px, mean, std)


def _three_numbers(folder: Path, name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(isinstance(n, int | float) for n in value):
        raise UsageError(f"The image processor in {folder} has {name} {value!r}; expected three numbers.")
    return tuple(value)


def read_image_processor(folder: Path) -> dict[str, Any]:
    """What preprocessor_config.json and processor_config.json say of images; where both do, the latter's word."""
    processor: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name)
            processor |= found.get("image_processor", found)
    return processor


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of a model's folder. UsageError where there is none."""
    inside = sorted(folder.parent.name for folder in path.parent.glob("*/config.json"))
    advice = f"There are models in its {', '.join(inside)}: give one of them." if inside else _LAYOUT_ADVICE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = "" if isinstance(error, FileNotFoundError) else f" ({first_line(error)})"
        raise UsageError(
            f"{path.parent} cannot be read as a model: it has no readable {path.name}{problem}. {advice}"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no JSON object. {advice}")
    return content
