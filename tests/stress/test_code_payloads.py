"""Row 14: files that run code where they are opened carelessly, given wherever capfilt opens a file.

Every payload makes a canary. That each would is shown first, by opening it carelessly in a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, KernelConfig, OPTForCausalLM, dynamic_module_utils
from transformers.integrations import bitsandbytes, hub_kernels
from transformers.quantizers import quantizer_bnb_8bit

from capfilt.curation.import_shards import import_shards
from capfilt.curation.tar_patterns import expand_patterns
from capfilt.data.commit import file_sha256
from capfilt.data.rundir import RunDir
from capfilt.data.shards import read_samples
from capfilt.errors import CapfiltError, CorruptionError, UsageError
from capfilt.settings import RankSettings
from capfilt.train.blip2_files import read_blip2
from capfilt.train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from capfilt.train.starts import bert_sizes, find_bert
from capfilt.weights.albef import load_trainable_albef
from capfilt.weights.blip import load_blip
from capfilt.weights.clip import find_clip, load_clip
from capfilt.weights.image_encoders import load_image_encoder
from capfilt.weights.llms import load_llm
from capfilt.weights.model_files import load_tokenizer, read_config, read_weights
from tests import factories
from tests.cli.conftest import capfilt
from tests.stress.conftest import Figure
from tests.train import small_models

CPU = torch.device("cpu")


@dataclass
class Call:
    """Unpickled, it calls a function."""

    function: Any
    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def mkdir(canary: Path) -> Call:
    return Call(os.mkdir, (str(canary),))


def evaluated(canary: Path) -> Call:
    return Call(eval, (f"__import__('os').mkdir({str(canary)!r})",))


def pickled(protocol: int, payload: Callable[[Path], Call] = mkdir) -> Callable[[Path, Path], None]:
    def write(path: Path, canary: Path) -> None:
        path.write_bytes(pickle.dumps({"model": {"x": payload(canary)}}, protocol))

    return write


def by_torch(payload: Callable[[Path], Call], *, zipped: bool) -> Callable[[Path, Path], None]:
    def write(path: Path, canary: Path) -> None:
        content = {"model": {"weight": torch.zeros(2), "x": payload(canary)}}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)

    return write


def object_array(path: Path, canary: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.array([mkdir(canary)], dtype=object), allow_pickle=True)


MKDIR, EVAL = "a pickle that calls posix.mkdir", "a pickle that calls builtins.eval"
PAYLOADS: dict[str, tuple[Callable[[Path, Path], None], str, str]] = {
    "torch's archive": (by_torch(mkdir, zipped=True), MKDIR, "torch.load(path, weights_only=False)"),
    "torch's archive with eval": (
        by_torch(evaluated, zipped=True), r"a pickle that calls (builtins|__builtin__)\.eval",
        "torch.load(path, weights_only=False)",
    ),
    "torch's old form": (by_torch(mkdir, zipped=False), MKDIR, "torch.load(path, weights_only=False)"),
    "a pickle of protocol 0": (pickled(0), MKDIR, "pickle.load(open(path, 'rb'))"),
    "a pickle of protocol 2": (pickled(2), MKDIR, "pickle.load(open(path, 'rb'))"),
    "a pickle of protocol 4": (pickled(4), MKDIR, "pickle.load(open(path, 'rb'))"),
    "a pickle with eval": (pickled(5, evaluated), EVAL, "pickle.load(open(path, 'rb'))"),
    "an array of objects": (object_array, "a NumPy array", "numpy.load(path, allow_pickle=True)"),
}  # fmt: skip
"""Name → how it is written, what the message calls it, what opens it carelessly."""


@pytest.mark.parametrize("name", PAYLOADS)
def test_each_payload_is_live(tmp_path: Path, name: str) -> None:
    write, _, opened = PAYLOADS[name]
    write(tmp_path / "payload", tmp_path / "canary")
    script = f"import sys, pickle, numpy, torch\npath = sys.argv[1]\n{opened}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, tmp_path / "payload"], capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert (tmp_path / "canary").is_dir(), done.stderr


@dataclass(frozen=True)
class Models:
    """Folders in the published layouts, to be spoilt."""

    captioner: Path
    clip: Path
    bert: Path
    opt: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    found = Models(root / "captioner", root / "clip", root / "bert", root / "opt")
    factories.save_captioner(found.captioner)
    factories.save_clip(found.clip)
    small_models.save_bert(found.bert)
    small_models.save_opt(found.opt)
    return found


def in_place_of_weights(source: Path, folder: Path, name: str, write: Callable[[Path], None]) -> Path:
    shutil.copytree(source, folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    write(folder / name)
    return folder


def in_a_checkpoint(folder: Path, write: Callable[[Path], None]) -> None:
    """A checkpoint whose state.json vouches for the payload."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    save_checkpoint(folder, tensors={"w": weight.data}, optimizer=optimizer, state={"step": 1, "fields": {}})
    found = find_checkpoint(folder)
    assert found is not None
    path, state = found
    write(path / "model.safetensors")
    (path / "state.json").write_text(json.dumps({**state, "sha256": _digests(path)}))
    newest = find_checkpoint(folder)
    assert newest is not None
    load_checkpoint(newest[0], tensors={"w": weight.data}, optimizer=optimizer)


def _digests(path: Path) -> dict[str, str]:
    return {name: file_sha256(path / name) for name in ("model.safetensors", "optimizer.safetensors")}


Writer = Callable[[Path], None]
READERS: dict[str, Callable[[Models, Path, Writer], Any]] = {
    "captioner, .pth": lambda m, tmp, write: load_blip(
        str(in_place_of_weights(m.captioner, tmp / "m", "model.pth", write) / "model.pth"), "captioner",
        device=CPU, dtype=torch.float32,
    ),
    "captioner, .bin": lambda m, tmp, write: load_blip(
        str(in_place_of_weights(m.captioner, tmp / "m", "pytorch_model.bin", write)), "captioner",
        device=CPU, dtype=torch.float32,
    ),
    "captioner, named safetensors": lambda m, tmp, write: load_blip(
        str(in_place_of_weights(m.captioner, tmp / "m", "model.safetensors", write)), "captioner",
        device=CPU, dtype=torch.float32,
    ),
    "CLIP, folder": lambda m, tmp, write: load_clip(
        find_clip(RankSettings(clip_model=str(in_place_of_weights(m.clip, tmp / "m", "open_clip_model.bin", write)))),
        CPU, torch.float32,
    ),
    "CLIP, file": lambda m, tmp, write: load_clip(
        find_clip(RankSettings(clip_model="RN50", clip_weights=str(written(tmp / "m.pt", write)))), CPU, torch.float32,
    ),
    "image encoder, .pth": lambda m, tmp, write: load_image_encoder(str(written(tmp / "m.pth", write)), CPU),
    "BLIP-2, .pth": lambda m, tmp, write: read_blip2(written(tmp / "m.pth", write)),
    "ALBEF, .pth": lambda m, tmp, write: load_trainable_albef(str(written(tmp / "m.pth", write))),
    "BERT, .bin": lambda m, tmp, write: read_weights(
        find_bert(str(in_place_of_weights(m.bert, tmp / "m", "pytorch_model.bin", write)))
    ),
    "language model, .bin": lambda m, tmp, write: load_llm(
        in_place_of_weights(m.opt, tmp / "m", "pytorch_model.bin", write)
    ),
    "language model, named safetensors": lambda m, tmp, write: load_llm(
        in_place_of_weights(m.opt, tmp / "m", "model.safetensors", write)
    ),
    "checkpoint of a training": lambda m, tmp, write: in_a_checkpoint(tmp / "m", write),
}  # fmt: skip


def written(path: Path, write: Writer) -> Path:
    write(path)
    return path


@pytest.mark.parametrize("reader", READERS)
def test_no_payload_runs_whatever_reads_it(models: Models, tmp_path: Path, reader: str, figure: Figure) -> None:
    canary = tmp_path / "canary"
    for number, (write, kind, _) in enumerate(PAYLOADS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises((UsageError, CorruptionError)) as caught:
            READERS[reader](models, folder, lambda path, write=write: write(path, canary))
        assert not canary.exists()
        assert re.search(kind, str(caught.value)), str(caught.value)
        assert "weights_only=False" not in str(caught.value).replace(" ", "")
    figure(14, f"{reader}: {len(PAYLOADS)} of {len(PAYLOADS)} payloads refused and named, none ran")


def test_a_program_in_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "m.pt")
    for load in (
        lambda: load_clip(
            find_clip(RankSettings(clip_model="RN50", clip_weights=str(tmp_path / "m.pt"))), CPU, torch.float32
        ),
        lambda: read_blip2(tmp_path / "m.pt"),
    ):
        with pytest.raises(UsageError, match="a TorchScript archive, a program"):
            load()


@dataclass(frozen=True)
class CodeKeys:
    """What a config says, and what runs the code it names."""

    says: dict[str, Any]
    opened_carelessly: Callable[[Path], object]


CODE_KEYS = {
    "auto_map": CodeKeys(
        {"auto_map": dict.fromkeys(["AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"], "evil.T")},
        lambda folder: AutoConfig.from_pretrained(folder, trust_remote_code=True),
    ),
    "auto_map and a model_type nobody knows": CodeKeys(
        {"auto_map": {"AutoConfig": "evil.T"}, "model_type": "evil"},
        lambda folder: AutoConfig.from_pretrained(folder, trust_remote_code=True),
    ),
    "auto_map of a tokenizer": CodeKeys(
        {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"},
        lambda folder: AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
    ),
    "a kernel for attention": CodeKeys(
        {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel"}, OPTForCausalLM.from_pretrained
    ),
    "kernels for layers": CodeKeys(
        {"kernel_config": {"RMSNorm": "evil/kernel:RMSNorm"}},
        lambda folder: OPTForCausalLM.from_pretrained(
            folder, kernel_config=KernelConfig(read_config(folder)["kernel_config"]), use_kernels=True
        ),
    ),
    "a quantiser": CodeKeys(
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, OPTForCausalLM.from_pretrained
    ),
}


class Trap(ModuleType):
    """A package that makes the canary whatever is taken out of it."""

    def __init__(self, name: str, canary: Path) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__dict__["canary"] = canary

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python itself looks at every module
            raise AttributeError(name)
        self.__dict__["canary"].mkdir(exist_ok=True)
        return lambda *args, **options: self


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that appears when code of a config runs: its program, a kernel of the hub, the package of a quantiser.

    The packages that would fetch and run these are not installed; here they are there, for transformers too.
    """
    canary = tmp_path / "canary"
    for name in ("kernels", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, name, Trap(name, canary))
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    for name in ("get_kernel_hub", "LayerRepository"):  # as transformers calls what it takes from that package
        monkeypatch.setattr(hub_kernels, name, lambda *_, **__: sys.modules["kernels"].taken, raising=False)
    monkeypatch.setattr(quantizer_bnb_8bit, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(bitsandbytes, "bnb", sys.modules["bitsandbytes"], raising=False)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield canary
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def with_code(source: Path, folder: Path, keys: CodeKeys, canary: Path) -> Path:
    """A copy of a model whose configs name code, some of which lies beside them."""
    shutil.copytree(source, folder)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass T: pass\n")
    for file in ("config.json", "tokenizer_config.json"):
        found = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        (folder / file).write_text(json.dumps({**found, **keys.says}))
    return folder


@pytest.mark.parametrize("case", CODE_KEYS)
def test_code_that_a_config_names_is_live(models: Models, tmp_path: Path, canary: Path, case: str) -> None:
    folder = with_code(models.opt, tmp_path / "opt", CODE_KEYS[case], canary)
    with contextlib.suppress(Exception):  # it ran by then
        CODE_KEYS[case].opened_carelessly(folder)
    assert canary.is_dir()


def let_open_clip_trust(folder: Path) -> None:
    """Have open_clip hand trust_remote_code to transformers' tokenizer."""
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    path.write_text(json.dumps(config))


def test_the_payload_of_a_clip_folder_is_live(models: Models, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models.clip, tmp_path / "clip"))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'canary')!r})\nclass T: pass\n")
    for file in ("config.json", "tokenizer_config.json"):
        (folder / file).write_text(json.dumps(CODE_KEYS["auto_map of a tokenizer"].says | {"model_type": "bert"}))
    let_open_clip_trust(folder)
    script = "import sys, open_clip; open_clip.get_tokenizer('local-dir:' + sys.argv[1])"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, folder], capture_output=True, check=False)
    assert (tmp_path / "canary").is_dir()
    with pytest.raises(UsageError, match="sets trust_remote_code for its tokenizer"):
        load_clip(find_clip(RankSettings(clip_model=str(folder))), CPU, torch.float32)


@pytest.mark.parametrize("case", CODE_KEYS)
def test_no_code_that_a_config_names_runs(
    models: Models, tmp_path: Path, canary: Path, case: str, figure: Figure
) -> None:
    loaders: dict[str, Callable[[Path], Any]] = {
        "captioner": lambda folder: load_blip(str(folder), "captioner", device=CPU, dtype=torch.float32),
        "bert": lambda folder: (bert_sizes(folder), load_tokenizer(folder)),
        "opt": load_llm,
        "clip": lambda folder: load_clip(find_clip(RankSettings(clip_model=str(folder))), CPU, torch.float32),
    }
    for name, load in loaders.items():
        folder = with_code(getattr(models, name), tmp_path / name, CODE_KEYS[case], canary)
        if name == "clip":
            let_open_clip_trust(folder)
        try:
            load(folder)
        except UsageError as error:
            assert "trust_remote_code=True" not in str(error)  # noqa: PT017 - refusing is as good as passing over
        assert not canary.exists()
        assert not [module for module in sys.modules if module.startswith("transformers_modules")]
    figure(14, f"{case}: 4 of 4 loaders ran nothing")


MEMBERS = ["pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "mp", "py"]


def test_members_of_a_tar_are_never_opened_as_python(tmp_path: Path, figure: Figure) -> None:
    canary = tmp_path / "canary"
    content = pickle.dumps(mkdir(canary))
    image = io.BytesIO()
    factories.draw_picture(0).save(image, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [("k.png", image.getvalue()), *((f"k.{ending}", content) for ending in MEMBERS)]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    run = RunDir.create(tmp_path / "run")
    import_shards([str(tmp_path / "a.tar")], run)
    (sample,) = read_samples(run, "00000")
    assert sample.key == "k"
    assert not canary.exists()
    script = "import sys, webdataset; print(list(webdataset.WebDataset(sys.argv[1], shardshuffle=False).decode()))"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, tmp_path / "a.tar"], capture_output=True, check=False)
    assert canary.is_dir(), "webdataset's decoder ran none of it: the payload is no test"
    figure(14, f"tar members: {len(MEMBERS)} of {len(MEMBERS)} kinds passed over (webdataset's decoder ran one)")


ADDRESSES = [
    "pipe:mkdir canary", "pipe: mkdir canary", "PIPE:mkdir canary", "file:|mkdir canary", "|mkdir canary",
    "http://127.0.0.1:9/a.tar'; mkdir canary; '", 'http://127.0.0.1:9/a.tar"; mkdir canary; "',
    "http://127.0.0.1:9/$(mkdir canary).tar", "http://127.0.0.1:9/`mkdir canary`.tar", "a.tar; mkdir canary",
]  # fmt: skip


def test_no_address_is_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure) -> None:
    """As tars to import, and as addresses to download."""
    monkeypatch.chdir(tmp_path)
    for address in ADDRESSES:
        with pytest.raises(CapfiltError):
            expand_patterns([address])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "urls.txt").write_text("\n".join(ADDRESSES) + "\n")
    done = capfilt("download", "urls.txt", "run", "--timeout", 1, "--allow-private-addresses")
    assert "Traceback" not in done.err
    assert not list(tmp_path.rglob("canary*"))
    figure(14, f"addresses: {len(ADDRESSES)} of {len(ADDRESSES)} are no commands, of tars and of pictures")
