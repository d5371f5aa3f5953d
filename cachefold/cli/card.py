"""`cachefold card`: the model card of an artefact, with its picture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer


def run(
    artefact: Annotated[Path, typer.Argument(help="Folder of the artefact (RUN/final).")],
    name: Annotated[str, typer.Option(help="Of the artefact; without, that of its folder.")] = "",
) -> None:
    """Write README.md beside an artefact: what it is, how it was made, what was measured."""
    from cachefold.cli._artefact import check_can_change
    from cachefold.cli._places import find_artefact
    from cachefold.retrofit.card import CARD, CURVE, HELDOUT, card, tables_of
    from cachefold.retrofit.run import FINAL

    folder = find_artefact(artefact)
    path = folder.resolve()
    name = name or (path.parent.name if path.name == FINAL else path.name)
    check_can_change(folder)
    card(folder, name)  # what is missing is said before anything is written
    tables, others = tables_of(folder)
    if others:
        print(
            f"tables of {folder / HELDOUT} left out: {others}, made of other weights or before a "
            "calibration; `cachefold reproduce` measures anew"
        )
    elif not tables:
        print(f"no table: {HELDOUT} of `cachefold reproduce` is not in {folder}")
    if find_spec("matplotlib") is None:
        print("no picture: pip install matplotlib, and run this again for one")
    else:
        from cachefold.retrofit.curve import draw

        draw(folder, folder / CURVE)
    (folder / CARD).write_text(card(folder, name), encoding="utf-8")
    print(f"written: {folder / CARD}")
