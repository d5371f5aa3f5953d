"""What several verbs share: loading an artefact on its base model, and cache facts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachefold.cli._places import find_artefact
from cachefold.writable import check_writable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cachefold.cache.folded import FoldedCache
    from cachefold.policies.base import Policy

DTYPES = ("bfloat16", "float16", "float32")
MEBI = 1024 * 1024
LONG = 1024
"""Tokens at which the ratios of a dial are meant, unless it was calibrated otherwise."""
SHIPPED = Path("artefacts/smollm2-135m-dial-wide")


@dataclass(frozen=True, slots=True)
class Artefact:
    """An artefact that is there, and what is asked of it, which it serves; no model is loaded."""

    folder: Path
    config: dict[str, Any]
    policy: Policy
    dtype: str
    cr: float | None
    preset: str | None

    @property
    def base(self) -> str:
        """Zoo name, folder or hub id of its base model."""
        return str(self.config["base"]["id"])


def check_can_change(folder: Path) -> None:
    """Refuses an artefact in a folder that can't be written to.

    Raises:
        ValueError: no right to.
    """
    check_writable(folder, "artefact", "copy the artefact to a folder of your own first")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A folded model with its tokenizer and the config of its artefact."""

    model: Any
    tokenizer: Any
    config: dict[str, Any]


def open_artefact(
    folder: Path, dtype: str = "bfloat16", cr: float | None = None, preset: str | None = None
) -> Artefact:
    """Finds an artefact and checks what is asked of it, before anything slow is loaded.

    Args:
        folder: of the artefact, or its name; see `find_artefact`.
        dtype: of the base model.
        cr: ratio to set a dial to; None = as it is.
        preset: kind of text a dial was calibrated for; None = `bulk`.

    Raises:
        ValueError: no artefact, unknown dtype, or a ratio or preset that the model doesn't serve.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    folder = find_artefact(folder)  # before the slow imports
    from cachefold.core.dial import Dial
    from cachefold.models.dial import check_dial
    from cachefold.models.hub import read_config
    from cachefold.policies import get_policy

    config = read_config(folder)
    policy = get_policy(**config["policy"])
    check_dial(policy, Dial(config.get("dial", {})), cr, preset)
    return Artefact(folder, config, policy, dtype, cr, preset)


def load(artefact: Artefact, *, merge: bool = False) -> Loaded:
    """Loads an artefact on its base model (zoo name, folder or hub id), on CUDA when there.

    Args:
        artefact: as `open_artefact` gives it.
        merge: add the adapters into the weights, where nothing is compared with the dense model.

    Raises:
        ValueError: the base model can't be loaded, or the weights don't fit it.
    """
    import torch
    from transformers.utils import logging

    from cachefold.models.fold import merge_weights
    from cachefold.models.hub import load_folded
    from cachefold.zoo import load_base

    logging.disable_progress_bar()
    base, tokenizer = load_base(artefact.base, getattr(torch, artefact.dtype))
    _check_revision(artefact.config, base)
    model: Any = load_folded(artefact.folder, base, cr=artefact.cr, preset=artefact.preset)
    if torch.cuda.is_available():
        model.to("cuda")
    if merge:
        merge_weights(model)
    return Loaded(model, tokenizer, artefact.config)


def _check_revision(config: dict[str, Any], base: PreTrainedModel) -> None:
    """Warns when the base is not the one the artefact was made on: the adapters may not fit."""
    from cachefold.models.hub import fits_revision
    from cachefold.zoo import base_revision

    wanted, found = config["base"]["revision"], base_revision(config["base"]["id"], base)
    if not fits_revision(wanted, found):
        print(
            f"warning: the artefact was made on {config['base']['id']} {wanted}, this is {found}",
            file=sys.stderr,
        )


def load_base_of(loaded: Loaded) -> PreTrainedModel:
    """Loads the original model of an artefact once more, in the dtype of the folded one."""
    from cachefold.zoo import load_base

    model, _ = load_base(str(loaded.config["base"]["id"]), loaded.model.dtype)
    return model.to(loaded.model.device)  # type: ignore[arg-type]  # transformers' own stub


def greedy_or_sample(model: PreTrainedModel, temperature: float) -> dict[str, Any]:
    """Gives arguments for generate(): greedy at temperature 0, else sampling.

    For greedy, defaults of the model that only sampling knows are dropped: transformers warns.

    Args:
        model: to write with.
        temperature: >= 0.
    """
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature}
    for name in ("temperature", "top_p", "top_k"):
        setattr(model.generation_config, name, None)
    return {"do_sample": False}


def short_note(cache: FoldedCache, policy: dict[str, Any]) -> str:
    """Says why a short text has not reached the ratio asked for; empty if that is not why.

    Args:
        cache: of one sequence.
        policy: options of the policy that filled it.
    """
    seen, asked, delay = cache.get_seq_length(), policy.get("cr"), policy.get("delay", 0)
    # From there on a dial's ratios are meant, or exact tokens are under a tenth of what is kept.
    if asked is None or seen > min(LONG, 10 * asked * delay):
        return ""
    if cache.compression_ratio() > 0.9 * asked:
        return ""
    return (
        f"note: the newest {delay} tokens stay exact, so that {seen:,} tokens are too few for the "
        f"ratio of {asked:g} that was asked for"
    )


def cache_line(cache: FoldedCache) -> str:
    """Describes a cache of one sequence: tokens, entries per head, ratio, bytes."""
    seen, ratio = cache.get_seq_length(), cache.compression_ratio()
    return (
        f"seen {seen:,} | kept {round(seen / ratio):,} | cr {ratio:.2f} | cache "
        f"{cache.nbytes() / MEBI:.1f} MiB (dense {cache.dense_nbytes() / MEBI:.1f} MiB)"
    )
