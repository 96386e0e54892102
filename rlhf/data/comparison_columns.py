"""What a row says of a comparison besides its texts: margin, probability, who decided. `Comparison` names the columns.

Files of other programs have columns of these names too. A `margin` or a `probability` that makes no sense is refused,
since it would change what is learnt; of the others, what is no such thing is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_TRUTHS = {"true": True, "false": False, "1": True, "0": False}


def comparison_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Comparison` after the texts, those that the row has; null and empty text count as absent.

    Raises `ValueError` for a margin that is no finite number and a probability outside [0.5, 1].
    """
    probability = _number(row, "probability")
    if probability is not None and not 0.5 <= probability <= 1:
        raise ValueError(
            f"field 'probability' is how likely chosen is the better one, from 0.5 to 1, found {row['probability']!r}; "
            "swap the responses where it is below"
        )
    found = {
        "margin": _number(row, "margin"),
        "annotator": _name(row.get("annotator")),
        "chosen_shown_first": _truth(row.get("chosen_shown_first")),
        "probability": probability,
        "agreement": _share(row.get("agreement")),
        "num_annotators": _count(row.get("num_annotators")),
        "source": _name(row.get("source")),
    }
    return {name: value for name, value in found.items() if value is not None}


def _number(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"field '{name}' is a number, found {value!r}")
    return number


def _name(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value).strip() or None


def _truth(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    return _TRUTHS.get(str(value).lower())


def _share(value: Any) -> float | None:
    try:
        share = float(value)
    except (TypeError, ValueError):
        return None
    return share if 0 <= share <= 1 else None


def _count(value: Any) -> int | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number >= 1 and number.is_integer() else None
