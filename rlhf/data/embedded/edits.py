"""Whether the corpus and its gold rewards are those that `CORPUS_VERSION` names, or have been edited here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

# The files that decide texts and gold rewards, by the first digits of their SHA-256. After an edit that changes a text
# or a score raise CORPUS_VERSION; after any edit write the file's hash here.
FILES: Mapping[str, str] = {
    "attributes.py": "ddc8020ff858b1cf",
    "corpus.py": "adef22580239b415",
    "grammar.py": "a0d34831f8ffe8b3",
    "lexicon.py": "6b873b1347d07382",
    "reviews.py": "c18eb5fbf70e5013",
}


def edited_files(folder: Path | None = None, files: Mapping[str, str] = FILES) -> dict[str, str]:
    """The files whose content is not the known one, each with the first digits of its hash ("gone" without a file).

    `CORPUS_VERSION` alone would call a corpus with another word, or another gold reward, the same: what is made from
    it would be taken for finished, and judged to be of the recorded data.
    """
    folder = folder or Path(__file__).parent
    found = {name: _digest(folder / name) for name in files}
    return {name: digest for name, digest in found.items() if digest != files[name]}


def _digest(path: Path) -> str:
    try:
        # However git writes the ends of lines here.
        return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()[:16]
    except OSError:
        return "gone"
