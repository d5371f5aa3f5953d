"""`cachefold import-megatron`: a DMC checkpoint of Megatron-LM as an artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachefold.writable import check_writable


def run(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder with mp_rank_00, or with iter_XXXXXXX.")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the artefact.")],
    hf: Annotated[
        str,
        typer.Option(help="Base model, folder or hub id; without, the Llama 2 of this shape."),
    ] = "",
    cr: Annotated[
        float | None, typer.Option(help="Ratio it was trained for, where it does not say.")
    ] = None,
) -> None:
    """Turn a DMC checkpoint of Megatron-LM into an artefact."""
    if out.exists():
        raise ValueError(f"--out {out} is there already; give a new folder")
    check_writable(out)
    from transformers.utils import logging

    from cachefold.models.hub import ANY_REVISION, save_folded
    from cachefold.models.megatron import read_checkpoint
    from cachefold.models.shapes import check_same_shape, name_of_shape
    from cachefold.zoo import base_config

    logging.disable_progress_bar()
    vocab_size = base_config(hf).vocab_size if hf else None
    found = read_checkpoint(checkpoint, cr=cr, vocab_size=vocab_size)
    name = hf or name_of_shape(found.config)
    if name is None:
        raise ValueError(
            f"{checkpoint} has the shape of no Llama 2; name the base model, whose tokenizer and "
            "shape it has: --hf FOLDER_OR_HUB_ID"
        )
    check_same_shape(found.config, base_config(name), name)
    save_folded(
        found.build(), out, base={"id": name, "revision": ANY_REVISION},
        extra={"imported": {"format": "megatron", "iteration": found.iteration}},
    )  # fmt: skip
    print(
        f"{found.config.num_hidden_layers} layers, iteration {found.iteration}, "
        f"{found.policy.name} cr {found.policy.cr:g} window {found.policy.window}, "
        f"base {name}; written: {out}"
    )
