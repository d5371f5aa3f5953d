"""Writes and reads a FoldedCache as one safetensors file with its facts as metadata."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from cachefold.cache.codecs import PAGE, Biased, Codec, Vectors, get_codec
from cachefold.cache.compressed import CompressedLayer
from cachefold.cache.packed import packed_count
from cachefold.cache.state import has_sizes

if TYPE_CHECKING:
    from cachefold.cache.folded import FoldedCache

FORMAT = "cachefold-cache-2"


def save(cache: FoldedCache, path: str | Path) -> None:
    """Writes `cache` to `path`, wholly or not at all; spare capacity is left out."""
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        for name, tensor in _layer_tensors(layer, index).items():
            tensors[f"{index}.{name}"] = tensor.contiguous()
    layers: list[Any] = cache.layers
    seen = [layer.get_seq_length() for layer in layers]
    facts = _facts(cache) | {"seen": seen, "names": sorted(tensors)}
    # JSON in one metadata field: safetensors metadata are strings only.
    metadata = {"format": FORMAT, "cachefold": json.dumps(facts)}
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        save_file(tensors, Path(scratch) / "cache", metadata=metadata)
        os.replace(Path(scratch) / "cache", path)


def _facts(cache: FoldedCache) -> dict[str, Any]:
    """What must agree between a file and the cache it is read into."""
    return {
        "delay": cache.delay,
        "window": cache.window,
        "evictor": None if cache.evictor is None else cache.evictor.to_dict(),
        "codec": cache.codec,
        "num_layers": len(cache.layers),
        "folded_layers": cache.folded_layers,
        "num_kv_heads": cache.num_kv_heads,
        "kv_heads": cache.kv_heads,
        "proportional": cache.proportional,
        "cr": cache.cr,
        "preset": cache.preset,
        "head_dim": cache.head_dim,
        "dtype": None if cache.dtype is None else str(cache.dtype).removeprefix("torch."),
        "kinds": [type(layer).__name__ for layer in cache.layers],
    }


def _layer_tensors(layer: Any, index: int) -> dict[str, Tensor]:
    if isinstance(layer, CompressedLayer):
        return layer.tensors()
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise ValueError(
            f"layer {index} keeps a {type(layer).__name__}, which can't be saved; only full and "
            "sliding-window attention caches can"
        )
    if not layer.is_initialized:
        return {}
    return {"keys": layer.keys, "values": layer.values}


def load(cache: FoldedCache, path: str | Path, device: torch.device | str) -> None:
    """Reads `path` into `cache`, which is left as it was when the file doesn't fit."""
    facts, tensors = _read(Path(path), device)
    facts.setdefault("proportional", False)  # not in files written before there was such a thing
    for name, expected in _facts(cache).items():
        if facts.get(name) != expected:
            raise ValueError(
                f"{path} was saved with {name}={facts.get(name)!r}, but this cache has "
                f"{name}={expected!r}; load it into a cache of the same model and policy"
            )
    if sorted(tensors) != facts["names"] or len(facts["seen"]) != len(cache.layers):
        raise ValueError(f"{path} is damaged: tensors are missing; save the cache again")
    split: list[dict[str, Tensor]] = [{} for _ in cache.layers]
    for name, tensor in tensors.items():
        index, _, rest = name.partition(".")
        split[int(index)][rest] = tensor
    for parts in split:
        _check_shapes(cache, parts, path)
        _check_lengths(parts, path)
    for layer, parts, seen in zip(cache.layers, split, facts["seen"], strict=True):
        _fill(layer, parts, seen)


def _read(path: Path, device: torch.device | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise ValueError(f"{path} doesn't exist; write a cache with cache.save(path) first")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is not a saved cache of this version (format "
                    f"{metadata.get('format')!r}, expected {FORMAT!r}); write it with cache.save"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}); write it with cache.save(path)"
        ) from error
    return json.loads(metadata["cachefold"]), tensors


def _check_shapes(cache: FoldedCache, parts: dict[str, Tensor], path: str | Path) -> None:
    """The tensors are what the facts say; the file may have been written by another hand."""
    for name in ("closed_key", "tail.key", "ring.key", "slot_key", "keys"):
        if name not in parts:
            continue
        heads, dim = parts[name].shape[1], parts[name].shape[-1]
        if name == "closed_key":
            dim -= has_sizes(parts)  # the bias of an entry lies with its key
        pooled = None if name == "keys" else cache.kv_heads  # of a layer that stays dense
        wanted = (pooled or cache.num_kv_heads, cache.head_dim)
        if (heads, dim) != wanted:
            raise ValueError(
                f"{path} holds {heads} kv heads of {dim} channels, but the model has "
                f"{wanted[0]} of {wanted[1]}; load it for the model it came from"
            )
    sizes = [f"{run}.size" in parts for run in ("tail", "ring") if f"{run}.key" in parts]
    if any(has != cache.proportional for has in sizes):
        raise ValueError(f"{path} is damaged: sizes of entries are missing; save the cache again")
    if cache.codec is None:
        return
    for name, width in _widths(get_codec(cache.codec), parts).items():
        if parts[name].shape[-1] != width:
            raise ValueError(
                f"{path} holds {name!r} in rows of {parts[name].shape[-1]} bytes, but codec "
                f"{cache.codec} makes {width}; save the cache again with this version"
            )


def _widths(codec: Codec, parts: dict[str, Tensor]) -> dict[str, int]:
    """Bytes of what the codec packs, by the names of tensors."""
    if "packed" in parts:
        key = parts["closed_key"]
        dims = key.shape[-1], parts["closed_value"].shape[-1]
        codec = Biased(codec, key.dtype) if has_sizes(parts) else codec
        return {"packed": codec.page_nbytes(*dims)}
    if "packed_key" not in parts:
        return {}
    keys, values = codec.alone()
    return {
        "packed_key": Vectors(keys, parts["slot_key"].shape[-1]).nbytes,
        "packed_value": Vectors(values, parts["slot_value"].shape[-1]).nbytes,
    }


def _check_lengths(parts: dict[str, Tensor], path: str | Path) -> None:
    vacant = parts.get("vacant")
    if vacant is not None and vacant.numel():
        width = parts.get("packed_key", parts["slot_key"]).shape[2]
        if int(vacant.min()) < 0 or int(vacant.max()) > width:
            raise ValueError(
                f"{path} is damaged: the next entry of a head goes to slot {int(vacant.max())} of "
                f"{width}; save the cache again"
            )
    lengths = parts.get("lengths")
    if lengths is None or not lengths.numel():
        return
    capacity = parts["closed_key"].shape[2]
    if "packed" in parts:
        in_pages = packed_count(lengths)
        if int(in_pages.max()) > parts["packed"].shape[2] * PAGE:
            raise ValueError(f"{path} is damaged: packed pages are missing; save the cache again")
        lengths = lengths - in_pages
    if int(lengths.min()) < 0 or int(lengths.max()) > capacity:
        raise ValueError(
            f"{path} is damaged: a head counts {int(lengths.max())} entries of {capacity} stored; "
            "save the cache again"
        )


def _fill(layer: Any, parts: dict[str, Tensor], seen: int) -> None:
    if isinstance(layer, CompressedLayer):
        layer.load_tensors(parts, seen)
        return
    # Not reset(): in transformers 5.17 that zeroes tensors in place which an undo still needs.
    if parts:
        layer.lazy_initialization(parts["keys"], parts["values"])
        layer.keys, layer.values = parts["keys"], parts["values"]
    elif layer.is_initialized:
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = seen
