"""Artefacts: what was trained in one safetensors file beside a JSON config.

That is decision weights, with adapters or with weights of the base model where those were trained;
the rest of the base model is named, not copied. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel

from cachefold.models.dial import turn_dial
from cachefold.models.families import check_model
from cachefold.models.fold import check_unmerged, fold, is_folded, merge_weights, unfold
from cachefold.models.lora import add_lora, check_unadapted, lora_rank
from cachefold.models.weights import ALL_WEIGHTS, load_artefact_state, trainable_state
from cachefold.policies import get_policy, policy_class
from cachefold.policies.budget import BudgetPolicy

WEIGHTS = "cachefold.safetensors"
CONFIG = "cachefold.json"
FORMAT = 1
ANY_REVISION = "any"
"""Revision of the base of an artefact that holds all weights: those of the base don't matter."""
LOCAL = "local"
"""Revision of a base in a folder; artefacts say `local:DIGEST` since that tells weights apart."""


def save_folded(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    base: dict[str, str],
    extra: dict[str, Any] | None = None,
) -> Path:
    """Writes an artefact of a folded model; each file is complete or absent.

    It gets decision weights and adapters, and those weights of the base that are trainable.

    Args:
        model: folded.
        folder: where to; made if missing.
        base: `id` (zoo name, hub id or folder) and `revision` (or `ANY_REVISION`) of the base.
        extra: facts to keep beside it.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not folded, by a policy that learns nothing, or its adapters are
            merged into the weights.

    >>> import tempfile
    >>> from cachefold import DMC, fold
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = fold(LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=1)), DMC())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(p.name for p in save_folded(model, folder, base={"id": "tiny"}).iterdir())
    ['cachefold.json', 'cachefold.safetensors']
    """
    check_model(model)
    if not is_folded(model):
        raise ValueError("only a folded model can be saved; call fold(model, policy) first")
    name = model.config.cachefold["name"]
    if issubclass(policy_class(name), BudgetPolicy):
        raise ValueError(
            f"{name} learns nothing, so that there is nothing to save; load the base model and "
            "call fold(model, policy) again"
        )
    check_unmerged(model, "saved as an artefact")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = trainable_state(model)
    whole = len(weights) == len([*model.parameters()])
    config = _config(model, base) | {ALL_WEIGHTS: whole} | (extra or {})
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        save_file(weights, Path(scratch) / WEIGHTS, metadata={"format": "pt"})
        (Path(scratch) / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for name in (WEIGHTS, CONFIG):
            os.replace(Path(scratch) / name, folder / name)
    return folder


def fits_revision(made: str | None, found: str) -> bool:
    """Whether an artefact made on one revision of its base belongs on another.

    Args:
        made: as its config says.
        found: of the base that is there.

    >>> fits_revision("local:1f", "local:2e"), fits_revision("local", "local:2e")
    (False, True)
    """
    if made == LOCAL:  # an older artefact, which doesn't say which weights the folder had
        return found.partition(":")[0] == LOCAL
    return made in (found, ANY_REVISION)


def update_config(folder: str | Path, changes: dict[str, Any]) -> None:
    """Changes keys of the JSON config of an artefact; the file is the old or the new one.

    Raises:
        ValueError: no artefact there.
    """
    config = read_config(folder) | changes
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        (Path(scratch) / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        os.replace(Path(scratch) / CONFIG, Path(folder) / CONFIG)


def _config(model: PreTrainedModel, base: dict[str, str]) -> dict[str, Any]:
    rank = lora_rank(model)
    state: Any = model
    tables = {name: list(table) for name, table in state._cachefold_dial.tables.items()}
    config = {"format": FORMAT, "base": base, "policy": model.config.cachefold, "lora_rank": rank}
    return config | ({"dial": tables} if tables else {})


def read_config(folder: str | Path) -> dict[str, Any]:
    """Reads the JSON config of an artefact.

    Raises:
        ValueError: no artefact there, or a format this version does not know.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no cachefold artefact: {CONFIG} is missing")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); save the artefact again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise ValueError(f"{path}: format {found!r}; this version reads {FORMAT}")
    for key, kind in (("base", dict), ("policy", dict), ("lora_rank", int)):
        if not isinstance(config.get(key), kind):
            raise ValueError(
                f"{path}: {key!r} is missing or no {kind.__name__}; save the artefact again"
            )
    if "name" not in config["policy"]:
        raise ValueError(f"{path}: 'policy.name' is missing; save the artefact again")
    return config


def file_digest(path: Path) -> str:
    """Tells a file from another version of it: 16 hex digits of its SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def artefact_digest(folder: str | Path) -> str:
    """Tells an artefact from every other, and from itself with other weights or a new preset.

    Raises:
        ValueError: no artefact there, or it can't be read.
    """
    parts = []
    for name in (WEIGHTS, CONFIG):
        try:
            parts.append(file_digest(Path(folder) / name))
        except OSError as error:
            raise ValueError(f"{folder} is no artefact that can be measured: {error}") from error
    return "-".join(parts)


def refuse_artefact(folder: str | Path) -> None:
    """Refuses the folder of an artefact where a base model is wanted; it lies as models lie.

    Raises:
        ValueError: it is one, with its base model.
    """
    if (Path(folder) / CONFIG).is_file() and not (Path(folder) / "config.json").is_file():
        base = read_config(folder)["base"].get("id")
        raise ValueError(
            f"{folder} is an artefact of base model {base}, and a base model is wanted here: pass "
            f"{base}. An artefact is for load_folded(folder, base), `cachefold generate "
            "--artefact` or `init` of a recipe"
        )


def load_folded(
    folder: str | Path,
    base_model: PreTrainedModel,
    *,
    cr: float | None = None,
    preset: str | None = None,
    merge: bool = False,
) -> PreTrainedModel:
    """Folds `base_model` in place with an artefact's policy and weights.

    Args:
        folder: an artefact written by `save_folded`.
        base_model: the dense base model, freshly loaded.
        cr: ratio that a dial is set to unless a cache asks for another; None = the policy's own.
        preset: kind of text meant unless a cache names another; None = `bulk`.
        merge: lay adapters and projections together, for faster decoding; see `merge_weights`.

    Returns:
        The same model, folded, in eval mode.

    Raises:
        ValueError: no artefact, it does not fit the model, or the model has adapters; it is then as
            it was.

    >>> import tempfile
    >>> from cachefold import DMC, fold
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> def load_base():
    ...     return LlamaForCausalLM(LlamaConfig(
    ...         hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    ...         vocab_size=10))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     folder = save_folded(fold(load_base(), DMC(cr=3)), folder, base={"id": "tiny"})
    ...     load_folded(folder, load_base()).config.cachefold["cr"]
    3
    """
    config = read_config(folder)
    check_unadapted(base_model)  # an artefact was made on the base alone
    trainable = [(parameter, parameter.requires_grad) for parameter in base_model.parameters()]
    fold(base_model, get_policy(**config["policy"]))
    try:
        turn_dial(base_model, config.get("dial", {}), cr, preset)
        if config["lora_rank"]:
            add_lora(base_model, config["lora_rank"])
        load_artefact_state(base_model, Path(folder) / WEIGHTS, config)
    except ValueError:
        unfold(base_model)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise
    if merge:
        merge_weights(base_model)
    return base_model.eval().requires_grad_(False)
