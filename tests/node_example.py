"""One node of a run whose ranks are small scripts: `python -m tests.node_example SETTINGS RANK [KEY=VALUE ...]`.

SETTINGS is a JSON file with `folder` (the run folder, with the ranks' script `rank.py`), `num_nodes`, `num_processes`,
`port`, `timeout`, `silent` and `stages`; with `raises` node 0 fails with that message once rank 1 is there, and with
`pause` it makes the file `paused` after each stage and does nothing for so many seconds. KEY=VALUE changes what this
node takes for its config. It ends like the command does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from rlhf.distributed import stopping
from rlhf.distributed.follower import follow
from rlhf.distributed.launch import launch, reserved_port
from rlhf.distributed.leader import Leader
from rlhf.distributed.nodes import NodePlace
from rlhf.errors import ConfigError, Stopped, UserError

PREAMBLE = """
import json, os, pathlib, signal, subprocess, sys, time
from rlhf.distributed.launch import die_with_parent
die_with_parent()
folder = pathlib.Path(__file__).parent
rank = os.environ["RANK"]
"""
READY = '(folder / f"ready{rank}").touch()\n'
SLEEP = READY + "time.sleep(60)\n"


def write_settings(folder: Path, rank_code: str, **settings: Any) -> Path:
    """The settings of a run in `folder` whose ranks do `rank_code`: two nodes of one process but for `settings`."""
    (folder / "rank.py").write_text(PREAMBLE + textwrap.dedent(rank_code))
    with reserved_port() as port:
        pass
    defaults = {"num_nodes": 2, "num_processes": 1, "port": port, "timeout": 60, "silent": 6, "stages": ["sft"]}
    path = folder / "settings.json"
    path.write_text(json.dumps({"folder": str(folder), **defaults, **settings}))
    return path


def start_node(settings: Path, rank: int, *changes: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Starts one node; standard output and error come together."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.node_example", str(settings), str(rank), *changes],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def outputs(*nodes: subprocess.Popen[str], seconds: float = 20) -> list[str]:
    """What the nodes printed, once they have ended."""
    return [node.communicate(timeout=seconds)[0] for node in nodes]


def values_of(settings: dict[str, Any], rank: int) -> dict[str, Any]:
    """What the node takes for its config."""
    return {"distributed": {"node_rank": rank, "num_threads": 1}, "stages": settings["stages"]}


def main(path: str, rank: str, *changes: str) -> int:
    """Runs the node. Returns its exit code."""
    settings = json.loads(Path(path).read_text())
    folder = Path(settings["folder"])
    own = dict(change.split("=") for change in changes)
    values = {**values_of(settings, int(rank)), **own}
    place = NodePlace(
        int(rank),
        settings["num_nodes"],
        settings.get("host", "127.0.0.1"),
        settings["port"],
        settings["num_processes"],
        settings["timeout"],
        settings["silent"],
    )
    command = [sys.executable, str(folder / "rank.py")]
    if place.rank > 0:
        return follow(place, folder, values, lambda stage: [*command, stage])
    with Leader(place) as leader:
        leader.meet(folder, values)
        for stage in settings["stages"]:
            with leader.stage(stage) as peers:
                if "raises" in settings:
                    while not (folder / "ready1").exists():
                        time.sleep(0.02)
                    raise ConfigError(settings["raises"])
                result = launch([*command, stage], settings["num_processes"], log_folder=folder / "logs", peers=peers)
            print(f"{stage}: {result.describe()}\n{result.log_tail}", flush=True)
            if result.exit_code:
                break
            if "pause" in settings:
                (folder / "paused").touch()
                time.sleep(settings["pause"])
        leader.end(result.exit_code)
        return result.exit_code


if __name__ == "__main__":
    stopping.install()
    try:
        code = main(*sys.argv[1:])
    except (UserError, Stopped) as error:
        print(f"error: {error}")
        code = error.exit_code
    sys.exit(code)
