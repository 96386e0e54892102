"""Models and checkpoints from a stranger: code runs only where `model.trust_remote_code` says so, pickles never."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf.cli import main
from rlhf.config.model import ModelConfig
from rlhf.distributed.checkpoints import CheckpointShape, commit, hash_and_sync, partial_folder
from rlhf.distributed.runtime import Runtime
from rlhf.distributed.training_checkpoints import TrainingCheckpoints, find_checkpoint
from rlhf.errors import EXIT_FAILURE, EXIT_USAGE, ArtifactError, UserError
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.models.scalar import ScalarModel
from tests.ppo_example import write_models

RUNTIME = Runtime(0, 1, 0, torch.device("cpu"), "fp32")
CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from transformers import LlamaPreTrainedModel, PreTrainedTokenizerFast
open({sprung!r}, "a").close()
class StrangeConfig(LlamaConfig):
    model_type = "strange"
class StrangeLM(LlamaForCausalLM):
    config_class = StrangeConfig
class StrangeClassifier(LlamaForSequenceClassification):
    config_class = StrangeConfig
    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.num_labels, self.model = 1, LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()
class StrangeTokenizer(PreTrainedTokenizerFast):
    pass
"""
LOADERS: dict[str, Callable[[Path, ModelConfig], Any]] = {
    "policy": lambda folder, config: load_policy(folder / "policy", config),
    "tokenizer": lambda folder, config: load_tokenizer(folder / "policy", config),
    "reward model": lambda folder, config: ScalarModel.load(folder / "reward_model", config),
}


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.sprung), "w")


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `policy` and `reward_model`, which come with code that creates the file `sprung` beside them."""
    # Where transformers copies such code to and imports it from.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    write_models(tmp_path)
    own = {
        "AutoConfig": "strange.StrangeConfig",
        "AutoModelForCausalLM": "strange.StrangeLM",
        "AutoModelForSequenceClassification": "strange.StrangeClassifier",
    }
    for name in ("policy", "reward_model"):
        folder = tmp_path / name
        (folder / "strange.py").write_text(CODE.format(sprung=str(tmp_path / "sprung")))
        _change(folder / "config.json", model_type="strange", auto_map=own)
        auto_map = {"AutoTokenizer": [None, "strange.StrangeTokenizer"]}
        _change(folder / "tokenizer_config.json", tokenizer_class="StrangeTokenizer", auto_map=auto_map)
    return tmp_path


def _load_all(checkpoints: TrainingCheckpoints, folder: Path) -> None:
    checkpoints.load(folder)
    checkpoints.set_generators(folder)


def _change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("what", LOADERS)
def test_code_of_a_model_runs_only_where_the_config_says_so(strange: Path, what: str) -> None:
    with pytest.raises(UserError, match=r"model\.trust_remote_code=true") as refused:
        LOADERS[what](strange, ModelConfig())
    assert refused.value.exit_code in (EXIT_FAILURE, EXIT_USAGE)
    assert not (strange / "sprung").exists()
    LOADERS[what](strange, ModelConfig(trust_remote_code=True))
    assert (strange / "sprung").exists()


def test_a_plan_runs_no_code_of_a_model(strange: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "experiment=smoke", "stages=[sft]", f"model.path={strange / 'policy'}"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (EXIT_FAILURE, EXIT_USAGE)
    assert "model.trust_remote_code=true" in capsys.readouterr().err
    assert not (strange / "sprung").exists()
    with pytest.raises(SystemExit):
        main([*arguments, "model.trust_remote_code=true"])
    assert (strange / "sprung").exists()


def test_code_beside_a_known_model_is_left_alone(strange: Path) -> None:
    _change(strange / "policy/config.json", model_type="llama")
    assert type(load_policy(strange / "policy", ModelConfig())).__module__.startswith("transformers.")
    assert not (strange / "sprung").exists()


def test_weights_that_are_a_pickle_are_not_run(tmp_path: Path) -> None:
    write_models(tmp_path)
    (tmp_path / "policy/model.safetensors").unlink()
    torch.save({"weight": Trap(tmp_path / "sprung")}, tmp_path / "policy/pytorch_model.bin")
    with pytest.raises(ArtifactError, match="policy"):
        load_policy(tmp_path / "policy", ModelConfig())
    assert not (tmp_path / "sprung").exists()


def test_no_file_of_a_checkpoint_is_unpickled(tmp_path: Path) -> None:
    """A stranger's checkpoint is whole by its own list of hashes; each of its files in turn is a pickle."""
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoints, folder = TrainingCheckpoints(module, optimizer, RUNTIME), tmp_path / "checkpoint-1"
    checkpoints.save(folder, shared={"step": torch.ones(2)}, own={"rank": 0})
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    for pickled in contents:
        if folder.exists():
            folder.rename(partial_folder(folder))
        partial_folder(folder).mkdir(exist_ok=True)
        for name, content in contents.items():
            trap = pickle.dumps(Trap(tmp_path / "sprung"))
            (partial_folder(folder) / name).write_bytes(trap if name == pickled else content)
        entries = {path.name: hash_and_sync(path) for path in partial_folder(folder).iterdir()}
        commit(folder, CheckpointShape(1, 0, "fp32"), entries)
        found, _ = find_checkpoint(tmp_path, RUNTIME, 0)
        if found is not None:
            with pytest.raises(ArtifactError):
                _load_all(checkpoints, found)
        assert not (tmp_path / "sprung").exists(), pickled
