"""`rlhf prove experiment=NAME [keep=FOLDER] [until=config|plan|data|steps]`: proves a full-scale config on a CPU.

Four parts, a line each: the config resolves; its memory is planned; the adapters of its data sets read stand-ins with
the real columns; the first steps of every stage run on tiny models of the same architectures.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import data
from rlhf.config import STUDIES_OF_RUNS, RLHFConfig, config_to_yaml
from rlhf.config.compose import load_config
from rlhf.config.data import source_of
from rlhf.errors import EXIT_FAILURE, EXIT_SUCCESS, ConfigError, UserError
from rlhf.proving.scaling import changes, scaled
from rlhf.runs.console import quiet_libraries
from rlhf.runs.folder import RunFolder
from rlhf.runs.manifest import read_manifest
from rlhf.terminal import say

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from rlhf.config.data import Kind

PARTS = ("config", "plan", "data", "steps")
# How much of a failed run's output is shown.
_LINES = 15
_STEPS_SECONDS = 600.0


@dataclass
class Proof:
    """The lines so far; `failed` counts those that say FAIL. `names`: what messages call a path of the proof's own."""

    show: Callable[[str], None] = say
    failed: int = 0
    names: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def part(self, title: str) -> Iterator[list[str]]:
        """One line: PASS with what the caller says of it, or FAIL with the reason of a `UserError` inside."""
        started = time.monotonic()
        said: list[str] = []
        try:
            yield said
        except UserError as error:
            self.failed += 1
            text = str(error)
            for path, name in self.names.items():
                text = text.replace(path, name)
            self.show(f"FAIL  {title}  {time.monotonic() - started:.1f} s\n      {text}")
        else:
            self.show(f"PASS  {title}  {time.monotonic() - started:.1f} s  {'; '.join(said)}".rstrip())


def run_prove(arguments: Sequence[str]) -> int:
    """Runs the proof. Raises `ConfigError` for a config that does not resolve; else 0, or 1 when a line says FAIL."""
    quiet_libraries()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or deepspeed warns that it finds no GPU
    keep, until, rest = _own_arguments(arguments)
    started = time.monotonic()
    config = load_config(rest).config
    proof = Proof(started=started)
    proof.show(f"PASS  config  {time.monotonic() - started:.1f} s  {config.experiment}: {', '.join(config.stages)}")
    with _folder(keep) as folder:
        prove(config, folder, until, proof)
    seconds = time.monotonic() - started
    verdict = "FAIL" if proof.failed else "PASS"
    kept = f"; its files are in {keep}" if keep else ""
    proof.show(f"{verdict}  {config.experiment} as far as a CPU can tell, in {seconds:.0f} s{kept}")
    return EXIT_FAILURE if proof.failed else EXIT_SUCCESS


def prove(config: RLHFConfig, folder: Path, until: str, proof: Proof) -> None:
    """The parts behind the first, up to `until`, with all files in `folder`."""
    wanted = PARTS[1 : PARTS.index(until) + 1]
    models: dict[str, tuple[PreTrainedConfig, str]] = {}
    if wanted:
        with proof.part("models") as said:
            from rlhf.proving.stand_ins import real_configs

            models |= real_configs(config)
            said += [f"{path}: {real.model_type} ({source})" for path, (real, source) in models.items()]
    if proof.failed:
        return
    if "plan" in wanted:
        with proof.part("plan") as said:
            said.append(_plan(config, folder, models))
    if "data" not in wanted:
        return
    small: list[RLHFConfig] = []
    with proof.part("data") as said:
        small.append(_make_stand_ins(config, folder, models, said, proof.names))
    if "steps" in wanted and small:
        with proof.part("sizes") as said:
            shrunk = scaled(small[0])
            for line in changes(config, shrunk):
                proof.show(f"      {line}")
            said.append("the keys above were changed, no other")
        if not proof.failed:
            _run_steps(shrunk, folder, proof)


def _own_arguments(arguments: Sequence[str]) -> tuple[Path | None, str, list[str]]:
    """`keep` and `until`, and what is left for the config."""
    own: dict[str, str] = {}
    rest = []
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if equals and name in ("keep", "until"):
            own[name] = value
        else:
            rest.append(argument)
    until = own.get("until", PARTS[-1])
    if until not in PARTS:
        raise ConfigError(f"until={until}: expected one of {', '.join(PARTS)}")
    if "keep" not in own:
        return None, until, rest
    keep = Path(own["keep"]).expanduser()
    if not own["keep"] or (keep.exists() and (not keep.is_dir() or any(keep.iterdir()))):
        raise ConfigError(f"keep={own['keep']}: expected the name of a folder that is empty or not there yet")
    return keep.absolute(), until, rest


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="rlhf-prove-") as name:
        yield Path(name)


def _plan(config: RLHFConfig, folder: Path, models: dict[str, tuple[PreTrainedConfig, str]]) -> str:
    """The verdict of `rlhf plan`. Raises `UserError` when a stage does not fit."""
    from rlhf.planning.lengths import PLANNED_STAGES
    from rlhf.planning.plan import make_plan
    from rlhf.planning.render import verdict
    from rlhf.proving.stand_ins import with_shapes

    if not set(config.stages) & set(PLANNED_STAGES):
        return f"no stage that is planned ({', '.join(PLANNED_STAGES)})"
    plan = make_plan(with_shapes(config, folder / "shapes", models))
    text = f"{config.plan.gpu} x {config.distributed.world_size}: {verdict(plan)}"
    if not plan.fits:
        raise UserError(text)
    return text


def _make_stand_ins(
    config: RLHFConfig,
    folder: Path,
    models: dict[str, tuple[PreTrainedConfig, str]],
    said: list[str],
    names: dict[str, str],
) -> RLHFConfig:
    """The config on stand-ins, whose adapters have read every kind of record that the stages need."""
    from rlhf.proving.stand_ins import names_of_data, texts_of, write_data, write_models

    small = write_models(config, folder / "models", models, texts_of(config))
    small, notes = write_data(small, folder / "data")
    said += notes
    names |= names_of_data(config, small)
    data.preflight(small.data)
    loaders: dict[Kind, Callable[[Any], Any]] = {
        "demonstrations": data.load_demonstrations,
        "comparisons": data.load_comparisons,
        "prompts": data.load_prompts,
    }
    for kind, load in loaders.items():
        source = source_of(small.data, kind)
        if source is None or (kind == "comparisons" and not data.gives_comparisons(small.data)):
            continue
        splits = load(small.data)
        said.append(f"{len(splits.train)}+{len(splits.validation)}+{len(splits.test)} {kind}")
    return small


def _run_steps(config: RLHFConfig, folder: Path, proof: Proof) -> None:
    """Runs the config on the stand-ins; a line for each stage."""
    run = RunFolder(folder / "run")
    path = folder / "proof.yaml"
    path.write_text(f"# @package _global_\n{config_to_yaml(config)}", encoding="utf-8")
    log = folder / "output.txt"
    # One process works on all stages, as a rank of another launcher does: what is imported is imported once.
    alone = any(stage in STUDIES_OF_RUNS for stage in config.stages)
    rank = {} if alone else {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **rank, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if rank:
        environment["MASTER_PORT"] = str(_free_port())
    command = [sys.executable, "-m", "rlhf", "run", f"experiment={path}", f"run.dir={run.path}"]
    failure = None
    with log.open("w", encoding="utf-8") as stream:
        try:
            code = subprocess.run(
                command, env=environment, stdout=stream, stderr=subprocess.STDOUT, timeout=_STEPS_SECONDS, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code, failure = EXIT_FAILURE, f"it did not end within {_STEPS_SECONDS:.0f} s"
    stages = read_manifest(run).get("stages", {}) if run.path.exists() else {}
    for name in config.stages:
        known = stages.get(name, {})
        if known.get("status") == "finished":
            proof.show(f"PASS  steps of {name}  {float(known.get('seconds') or 0):.1f} s")
        else:
            proof.failed += 1
            proof.show(f"FAIL  steps of {name}  {known.get('status', 'not started')}")
    if code != EXIT_SUCCESS:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES:]
        proof.failed += not proof.failed
        ended = failure or f"rlhf run ended with exit code {code}"
        proof.show("\n".join([f"      {ended}; its last lines:", *(f"      {line}" for line in lines)]))


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
