"""`run`: where a run lives on disk."""

from __future__ import annotations

from pydantic import Field

from rlhf.config.base import Section


class RunConfig(Section):
    """The run folder. Without `dir` it is `<root>/<experiment>/<id>`, the id being a hash of the config."""

    dir: str | None = Field(None, description="run folder; null derives it from the experiment and the config")
    root: str = Field("runs", description="parent of the derived run folders")
    cache: str | None = Field(
        None, description="folder in which runs share finished stages, see docs/stage_cache.md; null shares nothing"
    )
