"""Tells the weights in a folder from another version of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

KINDS = ("*.safetensors", "*.bin")
"""Files of weights; transformers reads the first kind that is there, and so does this."""
WHOLE = 1 << 30
"""Bytes up to which a file is read whole: a few seconds."""
PIECES, PIECE = 1024, 1 << 16
"""Of a larger file so many pieces of so many bytes are read, evenly spread. A tensor that takes
more than a thousandth of the file is in at least one, and training changes tensors throughout."""


def fingerprint(folder: Path) -> str | None:
    """16 hex digits of a SHA-256 over names, sizes and contents of the weight files.

    Args:
        folder: of a model in the layout of transformers.

    Returns:
        None where it has no weight file.

    >>> fingerprint(Path("/nowhere")) is None
    True
    """
    found = (sorted(folder.glob(kind)) for kind in KINDS)
    files = next((paths for paths in found if paths), [])
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + _content(path))
    return digest.hexdigest()[:16] if files else None


def _content(path: Path) -> bytes:
    """Digest of a file: of all of it, or of pieces of a large one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").digest()
        digest = hashlib.sha256()
        for piece in range(PIECES):
            file.seek(piece * (size - PIECE) // (PIECES - 1))
            digest.update(file.read(PIECE))
        return digest.digest()
