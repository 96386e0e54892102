"""The formats that can be imported, in the order in which they are tried on a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rlhf.preferences.exchange import argilla, label_studio, lossless, pairs, rated
from rlhf.preferences.exchange.items import Fields, ImportedTask, ImportOptions


@dataclass(frozen=True)
class ImportFormat:
    """How a format is recognised and read; `read` is None for our own label format, which has no need to guess."""

    describes: str
    fits: Callable[[Fields], bool]
    read: Callable[[Fields, ImportOptions], list[ImportedTask]] | None


IMPORT_FORMATS: Mapping[str, ImportFormat] = {
    "labels": ImportFormat("our own labels, every version: schema", lossless.fits, None),
    "label_studio": ImportFormat("Label Studio's JSON: data, annotations", label_studio.fits, label_studio.read),
    "argilla": ImportFormat("Argilla's records: fields, responses", argilla.fits, argilla.read),
    "rated_list": ImportFormat(
        "pairs rated by several: response1, response2, annotator1, annotator2, ...",
        rated.fits_rated_list,
        rated.read_rated_list,
    ),
    "ratings": ImportFormat("rated responses: prompt, response, rating", rated.fits_ratings, rated.read_ratings),
    "hh": ImportFormat("HH-RLHF: chosen, rejected as transcripts", pairs.fits("hh"), pairs.read_hh),
    "trl": ImportFormat(
        "TRL preference, our comparisons: chosen, rejected and usually prompt", pairs.fits("preference"), pairs.read_trl
    ),
}
