"""One node of a run whose ranks are small scripts: `python -m tests.node_example SETTINGS RANK [KEY=VALUE ...]`.

SETTINGS is a JSON file with `folder` (the run folder, with the ranks' script `rank.py`), `num_nodes`, `num_processes`,
`port`, `timeout`, `silent`, `stages`, how long ranks have to end (`grace`), and how much longer node 0 waits for the
ranks of others (`patience`); with `raises` node 0 fails with that message once rank 1 is there. Between two stages
node 0 makes the file `paused` and does nothing for `pause` seconds or, where that is "told", until another node has
said something. KEY=VALUE changes what this node takes for its config. A node other than 0 makes the file `RANK.joined`
when it has joined. It ends like the command does.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import textwrap
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rlhf.distributed import launch as launching
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
# Longer than anybody here waits for the end of it.
SLEEP = READY + "time.sleep(600)\n"

_HELD_PORTS = ExitStack()
atexit.register(_HELD_PORTS.close)


def held_port() -> int:
    """A free port that nobody else is given before this process ends; node 0 can listen on it all the same."""
    return _HELD_PORTS.enter_context(reserved_port())


def write_settings(folder: Path, rank_code: str, **settings: Any) -> Path:
    """The settings of a run in `folder` whose ranks do `rank_code`: two nodes of one process but for `settings`."""
    (folder / "rank.py").write_text(PREAMBLE + textwrap.dedent(rank_code))
    defaults = {"num_nodes": 2, "num_processes": 1, "port": held_port(), "stages": ["sft"]}
    # Longer than `outputs` waits: what should end a run at once is not to pass because one of these did.
    defaults |= {"timeout": 300, "silent": 300, "grace": 300, "patience": 300}
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


def outputs(*nodes: subprocess.Popen[str], seconds: float = 120) -> list[str]:
    """What the nodes printed, once they have ended; fails when they do not in time."""
    return [node.communicate(timeout=seconds)[0] for node in nodes]


def values_of(settings: dict[str, Any], rank: int) -> dict[str, Any]:
    """What the node takes for its config."""
    return {"distributed": {"node_rank": rank, "num_threads": 1}, "stages": settings["stages"]}


def main(path: str, rank: str, *changes: str) -> int:
    """Runs the node. Returns its exit code."""
    settings = json.loads(Path(path).read_text())
    folder = Path(settings["folder"])
    launching._PEERS_SECONDS = settings["patience"]
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
    grace = settings["grace"]
    if place.rank > 0:
        joined = folder / f"{rank}.joined"
        return follow(place, folder, values, lambda stage: [*command, stage], prepare=joined.touch, grace_seconds=grace)
    logs, number = folder / "logs", settings["num_processes"]
    with Leader(place) as leader:
        leader.meet(folder, values)
        for stage in settings["stages"]:
            with leader.stage(stage) as peers:
                if "raises" in settings:
                    while not (folder / "ready1").exists():
                        time.sleep(0.02)
                    raise ConfigError(settings["raises"])
                result = launch([*command, stage], number, log_folder=logs, peers=peers, grace_seconds=grace)
            print(f"{stage}: {result.describe()}\n{result.log_tail}", flush=True)
            if result.exit_code:
                break
            if "pause" in settings and stage != settings["stages"][-1]:
                (folder / "paused").touch()
                _pause(leader, settings["pause"])
        leader.end(result.exit_code)
        return result.exit_code


def _pause(leader: Leader, pause: float | str) -> None:
    if pause != "told":
        time.sleep(float(pause))
        return
    while all(node.channel._messages.empty() for node in leader._nodes.values()):
        time.sleep(0.01)


if __name__ == "__main__":
    stopping.install()
    try:
        code = main(*sys.argv[1:])
    except (UserError, Stopped) as error:
        print(f"error: {error}")
        code = error.exit_code
    sys.exit(code)
