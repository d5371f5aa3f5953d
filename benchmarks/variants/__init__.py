"""Other ways to train and merge than the library has, for the length of a `with` block.

The library keeps what earned its place, so these are swaps of its functions, for ablations.py. One
must be there in training and in measuring: its artefacts look like all others, but depend on it.
"""

from variants import deciding, entries, learning
from variants.registry import VARIANTS, split

__all__ = ["VARIANTS", "deciding", "entries", "learning", "split"]
