"""`cachefold calibrate`: teach a dial which ratio it reaches on a kind of text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachefold.core.dial import DEFAULT_PRESET

if TYPE_CHECKING:
    from cachefold.cli._artefact import Artefact


def run(
    artefact: Annotated[Path, typer.Argument(help="Folder of an artefact with a dial.")],
    files: Annotated[list[Path], typer.Argument(help="Text of the kind: .jsonl, .txt, also .gz.")],
    preset: Annotated[str, typer.Option(help="Name for the kind of text.")] = DEFAULT_PRESET,
    tokens: Annotated[
        int, typer.Option(min=64, help="Tokens of a text, at which a ratio is meant.")
    ] = 1024,
    texts: Annotated[int, typer.Option(min=1, help="Most texts; evenly spaced ones.")] = 8,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    replace: Annotated[
        bool, typer.Option("--replace", help="Measure a preset anew that is there already.")
    ] = False,
) -> None:
    """Measure a dial on your own text and keep the result in the artefact as a preset."""
    from cachefold.cli._artefact import check_can_change, load, open_artefact
    from cachefold.models.calibration import calibrate, check_has_dial
    from cachefold.models.hub import update_config
    from cachefold.text import check_file, evenly_spaced, load_blocks

    opened = open_artefact(artefact, dtype)
    check_has_dial(opened.policy)
    _check_preset(opened, preset, replace)
    check_can_change(opened.folder)
    for file in files:
        check_file(file)
    loaded = load(opened)
    blocks = evenly_spaced(load_blocks(files, loaded.tokenizer, tokens), texts)
    table = calibrate(loaded.model, {preset: blocks})[preset]
    update_config(opened.folder, {"dial": loaded.config.get("dial", {}) | {preset: table}})
    # A name may mean a folder beside the code, so this says which artefact was changed.
    changed = opened.folder.resolve()
    print(f"preset {preset}, {len(blocks)} texts of {tokens} tokens, written to {changed}")
    for ratio, position in table:
        print(f"position {position:+.1f}  cr {ratio:.2f}")


def _check_preset(artefact: Artefact, preset: str, replace: bool) -> None:
    """Refuses to lose a calibration; `bulk` is what every call uses that names no preset.

    Raises:
        ValueError: no name, or one that is there and isn't to be replaced.
    """
    if not preset.strip():
        raise ValueError("--preset needs a name for the kind of text, such as --preset legal")
    known = artefact.config.get("dial", {})
    if preset in known and not replace:
        raise ValueError(
            f"{artefact.folder.resolve()} has a preset {preset!r} already (presets there: "
            f"{', '.join(known)}); give another name with --preset NAME, or measure this one anew "
            "with --replace"
        )
