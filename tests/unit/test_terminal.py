"""A terminal or pipe that is gone: whoever prints to it goes on, and ends with the exit code it means."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rlhf.runs.console import StageProgress, heading, print_summary
from rlhf.terminal import flush_all, forgiving, say
from tests.command import environment
from tests.unit.runs_example import make_run


def run_unread(code: str, *, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Runs Python code whose standard output is a pipe that nobody reads; `subprocess.STDOUT`: the error as well."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=environment({"PYTHONUNBUFFERED": ""}),
            stdout=writer,
            stderr=stderr,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)


def test_progress_and_headings_outlive_their_reader(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    result = run_unread(
        f"""
        import sys
        from pathlib import Path
        from rlhf.runs.console import StageProgress, heading, print_summary
        from rlhf.runs.folder import RunFolder
        from rlhf.terminal import say
        heading("sft", 1, 2)
        progress = StageProgress("sft", 3)
        progress.update(1, {{}})
        progress.message("a warning")
        progress.close()
        print_summary(RunFolder(Path({str(tmp_path / "run")!r})))
        say("all done")
        print("the end", file=sys.stderr)
        """
    )
    assert (result.returncode, result.stderr) == (0, "the end\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [("Stopped(15, 3)", 143), ("KeyboardInterrupt()", 130), ("UserError('no')", 1), ("RuntimeError('bad')", 1)],
)
def test_an_error_that_nobody_hears_of_keeps_its_exit_code(error: str, code: int) -> None:
    result = run_unread(
        f"""
        from rlhf.errors import Stopped, UserError
        from rlhf.worker import explain, leave
        print("still in the buffer", end="")
        leave(explain({error}, None, debug=True))
        """,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == code


def test_a_reward_function_may_print_to_nobody() -> None:
    result = run_unread(
        """
        import sys
        from rlhf.terminal import forgive_all
        forgive_all()
        for number in range(3000):
            print("reward", number)
        print("done", file=sys.stderr)
        """
    )
    assert (result.returncode, result.stderr) == (0, "done\n")


def test_what_prints_and_nothing_else_still_says_that_it_could_not() -> None:
    result = run_unread("from rlhf.cli import main; main(['config', 'experiment=smoke'])")
    assert (result.returncode, result.stderr) == (1, "")


def test_help_that_nobody_reads_is_no_traceback() -> None:
    result = run_unread(
        """
        import sys
        from rlhf.cli import main
        sys.stdout.reconfigure(write_through=True)
        main(["--help"])
        """
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_closed_terminal_ends_neither_the_live_line_nor_the_stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal, ours = os.openpty()
    with os.fdopen(ours, "w") as stream:
        progress = StageProgress("ppo", 10, stream=stream)
        progress.update(1, {})
        os.close(terminal)
        time.sleep(0.7)  # the line is drawn twice a second
        progress.update(2, {})
        progress.message("a warning")
        progress.close()
        heading("ppo", 1, 2, stream=stream)
        print_summary(make_run(tmp_path / "run"), stream)
    assert capfd.readouterr().err == ""


class FullDisk(io.StringIO):
    """Takes no line until there is room again."""

    full = True

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_a_log_on_a_full_disk_goes_on_when_there_is_room() -> None:
    stream = FullDisk()
    say("lost", stream)
    forgiving(stream).write("lost")
    stream.full = False
    say("kept", stream)
    assert stream.getvalue() == "kept\n"


def test_a_closed_stream_is_no_error_but_a_mistake_in_a_value_is() -> None:
    stream = io.StringIO()
    stream.close()
    say("text", stream)
    with pytest.raises(TypeError):
        forgiving(io.StringIO()).write(3)  # type: ignore[arg-type]


def test_flushing_forgets_what_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        stream.write("unread")
        monkeypatch.setattr(sys, "stdout", stream)
        flush_all()
        assert os.readlink(f"/proc/self/fd/{writer}") == os.devnull
        monkeypatch.undo()
