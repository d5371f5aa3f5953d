"""The dial: one model for any compression ratio, its merge logits moved by a position.

A position is in logits of a merge: 0 stands for a ratio of 2, `log(cr - 1)` for a ratio cr. How far
a head's decisions move with it is learned; which position really gives a ratio is calibrated.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cachefold.core.names import closest

NEVER = -1e4
"""Position of a ratio of 1: nothing merges."""
DEFAULT_PRESET = "bulk"
"""Kind of text meant where none is named: all kinds mixed."""
_GOLDEN = (math.sqrt(5) - 1) / 2


def nominal_position(cr: float) -> float:
    """Position that stands for a ratio: the logit of the mean merge decision 1 - 1/cr.

    >>> nominal_position(2.0), round(nominal_position(8.0), 3), nominal_position(1.0)
    (0.0, 1.946, -10000.0)
    """
    return math.log(cr - 1.0) if cr > 1.0 else NEVER


def ratio_of_step(step: int, least: float, most: float) -> float:
    """Ratio trained for at a step: log-uniform between two bounds, evenly spread over any stretch.

    Multiples of the golden ratio modulo 1 fill the range without clumps or a random state.

    >>> [round(ratio_of_step(step, 1.0, 8.0), 2) for step in range(4)]
    [3.61, 1.63, 5.9, 2.67]
    """
    share = (step + 1) * _GOLDEN % 1.0
    return least * (most / least) ** share


@dataclass(frozen=True, slots=True)
class Dial:
    """Which position gives a ratio: measured, for kinds of text (presets).

    >>> dial = Dial({"chat": [(1.5, -1.0), (6.0, 1.0)]})
    >>> round(dial.position(3.0, "chat"), 6)
    0.0
    """

    tables: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """For each preset, (ratio reached, position) pairs, two or more, rising in both; empty = not
    calibrated, and positions are nominal."""
    preset: str = DEFAULT_PRESET
    """The one meant where none is named."""

    def table(self, preset: str | None) -> Sequence[tuple[float, float]]:
        """The pairs of a preset (None = the usual one); none for `bulk` that isn't calibrated.

        Raises:
            ValueError: not calibrated for this preset.
        """
        name = preset or self.preset
        if name == DEFAULT_PRESET and name not in self.tables:
            return ()
        if name not in self.tables:
            known = ", ".join(self.tables) or "none; run `cachefold calibrate`"
            raise ValueError(
                f"unknown preset {name!r}.{closest(name, list(self.tables))} Calibrated: {known}."
            )
        return self.tables[name]

    def position(self, cr: float, preset: str | None = None) -> float:
        """Position for a ratio, linear in the logarithm of the ratio between measured ones.

        Beyond the measured ratios the first or last segment goes on.

        Raises:
            ValueError: the dial is calibrated, but not for this preset.
        """
        table = self.table(preset)
        if cr <= 1.0 or not table:
            return nominal_position(cr)
        ratios = [ratio for ratio, _ in table]
        end = min(max(bisect.bisect(ratios, cr), 1), len(table) - 1)
        (low, start), (high, stop) = table[end - 1], table[end]
        return start + (stop - start) * math.log(cr / low) / math.log(high / low)
