"""`python -m cachefold`."""

from __future__ import annotations

from cachefold.cli import main

if __name__ == "__main__":
    main()
