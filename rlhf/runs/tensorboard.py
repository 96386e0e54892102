"""TensorBoard: one event file for each start of a stage, in `<run>/tensorboard/<stage>`, without torch or TensorFlow.

Every stage is a run of its own to TensorBoard, so the names and steps are those of `metrics.jsonl`. A resumed stage
begins a file with the events up to its checkpoint in the place of the earlier one: TensorBoard's own way, a mark after
which later steps are forgotten, forgets numbers but no texts.
"""

from __future__ import annotations

import html
import math
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.runs.files import disk_errors
from rlhf.runs.folder import RunFolder, StageResult
from rlhf.runs.jsonable import to_jsonable
from rlhf.runs.sinks import Ending, Start

FOLDER = "tensorboard"
# What the first record of every event file says.
_FORMAT = "brain.Event:2"
# A record is its length, a checksum of that, the event and a checksum of it.
_HEADER, _CHECKSUM_BYTES = struct.Struct("<QI"), 4
# What ends a cell, or would be shown as emphasis, though it is part of a sample.
_ESCAPED = {ord(character): f"&#{ord(character)};" for character in "|*_`[]#\\~"}


def event_folder(run: RunFolder, stage: str) -> Path:
    """Where the stage's event files lie."""
    return run.path / FOLDER / stage


class TensorBoardSink:
    """Writes one event file; each record is whole in the file when the method returns."""

    def __init__(self, path: Path, stage: str) -> None:
        """Begins the file `path`. Raises `DiskFullError`, `ImportError`."""
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.path = path
        self.stage = stage
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        self._text_metadata = create_summary_metadata(display_name=None, description="")
        self._text_tensor: Any = lambda text: tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING,
            string_val=[text.encode("utf-8", errors="backslashreplace")],
            tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)]),
        )
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer: Any = RecordWriter(path.open("xb"))
        self._write(event_pb2.Event(wall_time=time.time(), file_version=_FORMAT))

    @classmethod
    def open(cls, start: Start) -> TensorBoardSink | None:
        """A file with the events up to the step that the stage goes on from; None unless the config asks for one."""
        if not start.config.tensorboard or start.resume_step is None:
            return None
        earlier = sorted(event_folder(start.folder, start.stage).glob("events.out.tfevents.*"))
        # A TensorBoard that is looking goes on to the file whose name comes next.
        number = int(earlier[-1].suffix[1:]) + 1 if earlier else 0
        sink = cls(event_folder(start.folder, start.stage) / f"events.out.tfevents.{number:010d}", start.stage)
        kept = {}
        for path in earlier:
            for event in sink._events_in(path):
                if event.WhichOneof("what") == "summary" and event.step <= start.resume_step > 0:
                    kept[event.step, event.summary.value[0].tag] = event
        for event in kept.values():
            sink._write(event)
        for path in earlier:
            path.unlink(missing_ok=True)
        return sink

    def _events_in(self, path: Path) -> Iterator[Any]:
        """The events of an earlier file, without one that was cut off."""
        content, place = path.read_bytes(), 0
        while place + _HEADER.size <= len(content):
            begin = place + _HEADER.size
            length = _HEADER.unpack_from(content, place)[0]
            place = begin + length + _CHECKSUM_BYTES
            if place <= len(content):
                yield self._events.Event.FromString(content[begin : begin + length])

    def log(self, line: int, step: int, metrics: Mapping[str, float | None]) -> None:
        """One scalar for each number; what is not finite is left out."""
        values = [
            self._summaries.Summary.Value(tag=name, simple_value=value)
            for name, value in metrics.items()
            if value is not None and math.isfinite(value)
        ]
        self._log(step, values)

    def log_samples(self, line: int, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table as the text `<stage>/samples`."""
        if not rows:
            return
        value = self._summaries.Summary.Value(
            tag=f"{self.stage}/samples",
            metadata=self._text_metadata,
            tensor=self._text_tensor(markdown_table(rows)),
        )
        self._log(step, [value])

    def record(self, result: StageResult, inputs: Mapping[str, str]) -> None:
        """TensorBoard has no place for results without a step."""

    def close(self, ending: Ending) -> None:
        """Closes the file; closing again does nothing."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with disk_errors(self.path):
                writer.close()

    def _log(self, step: int, values: Sequence[Any]) -> None:
        if values:
            summary = self._summaries.Summary(value=values)
            self._write(self._events.Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        if self._writer is None:
            return
        with disk_errors(self.path):
            self._writer.write(event.SerializeToString())
            self._writer.flush()


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table: texts are shown as they are, line breaks as such, structures as JSON-like text."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(_cell(row.get(name)) for name in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value: Any) -> str:
    plain = to_jsonable(value)
    text = f"{plain:.4g}" if isinstance(plain, float) else str("" if plain is None else plain)
    return "<br>".join(html.escape(text, quote=False).translate(_ESCAPED).splitlines())
