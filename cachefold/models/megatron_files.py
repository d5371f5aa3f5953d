"""Files of a Megatron-LM checkpoint: which ones belong together, and reading them safely."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TRACKER = "latest_checkpointed_iteration.txt"
WEIGHTS = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?$")


class _Unread:
    """Takes the place of an object that the import has no use for; runs nothing of it."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


UNREAD = (
    "megatron.core.enums.ModelType",
    "_io.BytesIO",  # extra state of Transformer Engine
    "numpy.ndarray",  # states of random number generators, here and below
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
)
"""Classes that such pickles name and that are read as `_Unread`."""
ALLOWED: list[Any] = [argparse.Namespace, *((_Unread, name) for name in UNREAD)]


@dataclass(frozen=True, slots=True)
class RankFile:
    """One file of a checkpoint.

    Attributes:
        path: of the file, for messages.
        content: what it holds; tensors are on the CPU.
    """

    path: Path
    content: dict[str, Any]


def find_ranks(folder: str | Path) -> list[list[Path]]:
    """Finds the files of a checkpoint.

    Args:
        folder: with `mp_rank_XX` folders in it (as published), or with `iter_XXXXXXX` folders and
            the file that names the latest (as Megatron-LM writes).

    Returns:
        For every pipeline rank the files of its tensor-parallel ranks, in order.

    Raises:
        ValueError: no checkpoint there, another format, or ranks are missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; give the folder that holds {TRACKER}")
    ranks = _rank_folders(folder)
    if not ranks:
        folder = _iteration(folder)
        ranks = _rank_folders(folder)
    if not ranks:
        raise ValueError(_why_no_ranks(folder))
    pipeline, tensor = (1 + max(rank[i] for rank in ranks) for i in (0, 1))
    for stage in range(pipeline):
        for rank in range(tensor):
            place = ranks.get((stage, rank))
            if place is None or not (place / WEIGHTS).is_file():
                name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
                raise ValueError(
                    f"{folder / name / WEIGHTS} is missing; the other folders belong to a "
                    f"checkpoint of {tensor} tensor-parallel x {pipeline} pipeline ranks"
                )
    return [[ranks[stage, rank] / WEIGHTS for rank in range(tensor)] for stage in range(pipeline)]


def _rank_folders(folder: Path) -> dict[tuple[int, int], Path]:
    """Folders by (pipeline rank, tensor rank)."""
    found = {}
    for path in folder.glob("mp_rank_*"):
        match = _RANK.match(path.name)
        if match is None:
            raise ValueError(
                f"{path}: a rank folder is named mp_rank_TT or mp_rank_TT_PPP (tensor, pipeline); "
                "expert parallelism is not for DMC models"
            )
        found[int(match[2] or 0), int(match[1])] = path
    return found


def _iteration(folder: Path) -> Path:
    """Folder of the latest iteration, as the tracker file says."""
    tracker = folder / TRACKER
    if not tracker.is_file():
        raise ValueError(
            f"{folder} is no Megatron checkpoint: it has neither mp_rank_XX folders nor {TRACKER}"
        )
    word = tracker.read_text(encoding="utf-8").strip()
    if word != "release" and not word.isdecimal():
        raise ValueError(f"{tracker} must hold a number or the word release, got {word!r}")
    found = folder / (word if word == "release" else f"iter_{int(word):07d}")
    if not found.is_dir():
        raise ValueError(f"{tracker} names {found.name}, and there is no folder {found}")
    return found


def _why_no_ranks(folder: Path) -> str:
    if any(folder.glob("*.distcp")) or (folder / "metadata.json").is_file():
        return (
            f"{folder} is a distributed checkpoint (--ckpt-format torch_dist or zarr); have "
            "Megatron-LM write it as --ckpt-format torch (--ckpt-convert-format torch)"
        )
    return f"{folder} has no mp_rank_XX folders; give the folder of a whole checkpoint"


def load_rank(path: Path) -> RankFile:
    """Reads one file; nothing that its pickle names is run but the making of tensors.

    Raises:
        ValueError: the pickle names anything beyond that, or the file can't be read.
    """
    with torch.serialization.safe_globals(ALLOWED):
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            content = (
                None
                if unsafe
                else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            )
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            first = str(error).strip().partition("\n")[0]
            raise ValueError(f"can't read {path}: {first}; download or copy it again") from error
    if unsafe:
        raise ValueError(_refusal(path, unsafe))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a Megatron checkpoint")
    return RankFile(path, content)


def _refusal(path: Path, unsafe: Iterable[str]) -> str:
    return (
        f"{path}: a pickle can run any code, so only tensors and argparse.Namespace are read from "
        f"it (weights_only=True), with placeholders for {', '.join(UNREAD)}; this one also names "
        f"{', '.join(sorted(unsafe))}. Nothing of it was run. If you trust whoever made it, load "
        "it yourself and save it again without these"
    )
