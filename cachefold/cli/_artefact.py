"""What several verbs share: loading an artefact on its base model, and cache facts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cachefold.cache.folded import FoldedCache

DTYPES = ("bfloat16", "float16", "float32")
MEBI = 1024 * 1024
SHIPPED = Path("artefacts/smollm2-135m-cr2")
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A folded model with its tokenizer and the config of its artefact."""

    model: Any
    tokenizer: Any
    config: dict[str, Any]


def find(path: Path) -> Path:
    """The path from the working folder, else the same beside the code."""
    beside = REPOSITORY / path
    return beside if not path.exists() and beside.exists() else path


def load_artefact(folder: Path, dtype: str = "bfloat16") -> Loaded:
    """Loads an artefact and its base model (zoo name, folder or hub id), on CUDA when there.

    Raises:
        ValueError: no artefact, unknown dtype, or the base model can't be loaded.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    folder = find(folder)
    if not (folder / "cachefold.json").is_file():  # before the slow imports
        raise ValueError(
            f"{folder} is no cachefold artefact: cachefold.json is missing. `cachefold ls "
            "artefacts` shows those nearby; `cachefold retrofit` makes one (RUN/final)"
        )
    import torch

    from cachefold.models.hub import load_folded, read_config

    config = read_config(folder)
    base, tokenizer = load_base_model(str(config["base"]["id"]), getattr(torch, dtype))
    model: Any = load_folded(folder, base)
    if torch.cuda.is_available():
        model.to("cuda")
    return Loaded(model, tokenizer, config)


def load_base_model(name: str, dtype: Any) -> tuple[PreTrainedModel, Any]:
    """Loads a dense model and its tokenizer from a zoo name, a folder or a hub id.

    Raises:
        ValueError: it can't be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "/" not in name and not Path(name).is_dir():
        from cachefold.zoo import load_base

        return load_base(name, dtype=dtype)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return model.eval(), AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"can't load base model {name}: {error}") from error


def load_base_of(loaded: Loaded) -> PreTrainedModel:
    """Loads the original model of an artefact once more, in the dtype of the folded one."""
    model, _ = load_base_model(str(loaded.config["base"]["id"]), loaded.model.dtype)
    return model.to(loaded.model.device)  # type: ignore[arg-type]  # transformers' own stub


def greedy_or_sample(model: PreTrainedModel, temperature: float) -> dict[str, Any]:
    """Gives arguments for generate(): greedy at temperature 0, else sampling.

    For greedy, defaults of the model that only sampling knows are dropped: transformers warns.

    Raises:
        ValueError: negative temperature.
    """
    if temperature < 0:
        raise ValueError(f"--temperature must be >= 0, got {temperature}")
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature}
    for name in ("temperature", "top_p", "top_k"):
        setattr(model.generation_config, name, None)
    return {"do_sample": False}


def cache_line(cache: FoldedCache) -> str:
    """Describes a cache of one sequence: tokens, entries per head, ratio, bytes."""
    seen, ratio = cache.get_seq_length(), cache.compression_ratio()
    return (
        f"seen {seen:,} | kept {round(seen / ratio):,} | cr {ratio:.2f} | cache "
        f"{cache.nbytes() / MEBI:.1f} MiB (dense {cache.dense_nbytes() / MEBI:.1f} MiB)"
    )
