"""`cachefold generate`: continue a prompt with a folded model."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachefold.cli._artefact import SHIPPED

if TYPE_CHECKING:
    from torch import Tensor

    from cachefold.cache.folded import FoldedCache
    from cachefold.cli._artefact import Loaded


def run(
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the text to continue; - for stdin.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the chat template.")
    ] = False,
    artefact: Annotated[
        Path, typer.Option(help="Folder that a retrofit wrote, or its name.")
    ] = SHIPPED,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    cr: Annotated[float | None, typer.Option(help="Ratio of an artefact with a dial.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Kind of text its dial was calibrated for: chat, code, bulk.")
    ] = None,
) -> None:
    """Continue a prompt, then say what the cache kept."""
    text = _read_prompt(prompt, prompt_file)
    from cachefold.cli._artefact import load, open_artefact

    loaded = load(open_artefact(artefact, dtype, cr, preset), merge=True)
    import torch

    from cachefold.models.fold import new_cache

    torch.manual_seed(seed)
    cache = new_cache(loaded.model)
    _stream(loaded, cache, _encode(loaded, text, chat), max_new_tokens, temperature)


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give the text to continue with --prompt TEXT or --prompt-file FILE")
    if prompt_file is None:
        text = prompt or ""
    elif str(prompt_file) == "-":
        text = sys.stdin.read()
    else:
        try:
            text = prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"can't read --prompt-file {prompt_file}: {error}") from error
    if not text.strip():
        raise ValueError("the prompt is empty")
    return text


def _encode(loaded: Loaded, text: str, chat: bool) -> Tensor:
    """Ids of the prompt, (1, T)."""
    tokenizer = loaded.tokenizer
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("--chat: the tokenizer of the base model has no chat template")
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).input_ids
    return ids.to(loaded.model.device)


def _stream(
    loaded: Loaded, cache: FoldedCache, ids: Tensor, max_new_tokens: int, temperature: float
) -> None:
    import torch
    from transformers import TextStreamer

    from cachefold.cli._artefact import cache_line, greedy_or_sample, short_note

    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    output = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
        past_key_values=cache, streamer=streamer, pad_token_id=_pad(loaded),
        **greedy_or_sample(loaded.model, temperature),
    )  # fmt: skip
    rate = (output.shape[1] - ids.shape[1]) / (time.perf_counter() - start)
    print(f"{cache_line(cache)} | {rate:.{0 if rate >= 10 else 1}f} tok/s", flush=True)
    if note := short_note(cache, loaded.model.config.cachefold):
        print(note, file=sys.stderr)


def _pad(loaded: Loaded) -> int:
    tokenizer = loaded.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return 0 if pad is None else pad
