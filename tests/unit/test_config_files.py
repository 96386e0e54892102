"""Every file under configs/ composes; the user's own files and folders take part; configs survive a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlhf.config import (
    RLHFConfig,
    config_from_file,
    config_hash,
    config_to_yaml,
    load_config,
    packaged_config_folder,
    render_sources,
    schema,
)
from rlhf.config.provenance import flatten
from rlhf.config.serialize import plain_values
from rlhf.errors import ConfigError

CONFIGS = packaged_config_folder()
GROUPS = ("model", "data", "zero", "peft", "launcher", "ppo", "experiment")
# A sweep's file is W&B's, and no part of a config.
FILES = sorted(
    path.relative_to(CONFIGS).with_suffix("").as_posix()
    for path in CONFIGS.rglob("*.yaml")
    if path.parent.name != "sweep"
)
MANDATORY = {
    "model/local": ("model.path=x",),
    "data/files": ("data.path=x",),
    "data/hub": ("data.path=x",),
    "data/labelled_text": ("data.path=x",),
    "experiment/movie_reviews": ("data.path=x",),
}


@pytest.fixture(autouse=True)
def _empty_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", FILES)
def test_every_file_loads(name: str) -> None:
    if name == "config":
        assert load_config([]).config == load_config(["model=tiny", "data=embedded", "zero=none"]).config
        return
    group, _, choice = name.partition("/")
    loaded = load_config([f"{group}={choice}", *MANDATORY.get(name, ())])
    assert group in GROUPS
    # What a file sets is what comes out, with the file as its source.
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    values.pop("defaults", None)
    prefix = "" if group == "experiment" else f"{group}."
    for key, value in values.items():
        if isinstance(value, dict) or value == "???":
            continue
        assert loaded.sources[f"{prefix}{key}"].startswith(f"configs/{name}.yaml:")


@pytest.mark.parametrize("name", sorted(name for name in MANDATORY if name != "experiment/movie_reviews"))
def test_mandatory_values_are_asked_for(name: str) -> None:
    group, _, choice = name.partition("/")
    with pytest.raises(ConfigError, match=rf"add {group}\.path=(FOLDER|PATH)"):
        load_config([f"{group}={choice}"])


@pytest.mark.parametrize("family", ["pythia", "qwen3", "llama", "gemma", "gpt2", "smollm"])
def test_short_model_names_give_hub_ids(family: str) -> None:
    path = load_config([f"model={family}"]).config.model.path
    assert path is not None
    assert path.count("/") == 1


@pytest.mark.parametrize("group", ["model", "data", "zero"])
def test_files_set_only_what_differs_from_the_defaults(group: str) -> None:
    for path in sorted((CONFIGS / group).glob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        assert isinstance(values, dict)
        assert path.read_text().startswith("#"), f"{path} says nothing about itself"
        loaded = load_config([f"{group}={path.stem}", *MANDATORY.get(f"{group}/{path.stem}", ())])
        for key, source in loaded.sources.items():
            name = tuple(key.split("."))
            # `type`, `path` and `stage` are set although they are the default: they are what such a file is about.
            if source.startswith(f"configs/{group}/") and name[-1] not in ("type", "path", "stage"):
                variant = str(loaded.config.data.type) if name[0] == "data" else None
                entry = schema.find(name, variant)
                value = flatten(plain_values(loaded.config))[name]
                assert entry is not None
                assert value != entry.field.default, f"{source} sets {key} to its default"


def test_no_field_has_two_bounds_of_one_kind() -> None:
    """pydantic keeps the last of two `ge` without a word."""
    for candidates in schema.entries().values():
        for entry in candidates:
            kinds = [type(constraint) for constraint in entry.field.metadata if hasattr(constraint, "__slots__")]
            assert len(kinds) == len(set(kinds)), entry.key


def test_section_defaults_are_their_class_defaults() -> None:
    """A file that sets one key of a section must not lose what the field's default instance had set besides."""
    for candidates in schema.entries().values():
        for entry in candidates:
            if entry.is_section and not entry.field.is_required():
                assert entry.field.default == type(entry.field.default)(), entry.key


def test_experiment_wins_over_groups_and_arguments_over_all() -> None:
    write(
        Path("mine.yaml"),
        "# @package _global_\ndefaults:\n  - override /model: gpt2\nmodel:\n  path: from_file\n  attention: eager\n",
    )
    loaded = load_config(["experiment=mine.yaml", "model.attention=sdpa"])
    assert loaded.config.model.path == "from_file"
    assert loaded.config.model.attention == "sdpa"
    assert loaded.config.experiment == "mine"
    assert loaded.sources["model.path"] == "mine.yaml:5"
    assert loaded.sources["model.attention"] == "argument model.attention=sdpa"
    assert loaded.sources["experiment"] == "argument experiment=mine.yaml"
    assert loaded.sources["model.revision"] == "default"
    # A choice on the command line wins over the experiment's choice.
    chosen = load_config(["experiment=mine.yaml", "model=tiny"])
    assert chosen.config.model.path == "from_file"
    assert load_config(["model.path=x", "model=gpt2"]).config.model.path == "x"


@pytest.mark.parametrize("group", ["model", "data", "zero"])
def test_a_yaml_path_is_a_choice_of_any_group(group: str) -> None:
    texts = {"model": "path: 'a=b, c'\n", "data": "type: files\npath: p\n", "zero": "stage: 3\n"}
    path = write(Path("folder with = and space") / "my file.yaml", texts[group])
    loaded = load_config([f"{group}={path}"])
    first = {"model": "model.path", "data": "data.type", "zero": "zero.stage"}[group]
    assert loaded.sources[first] == f"{path}:1"
    assert load_config([f"{group}={path.resolve()}"]).config == loaded.config


def test_two_files_of_one_name_stay_apart() -> None:
    first, second = write(Path("a/x.yaml"), "path: first\n"), write(Path("b/x.yaml"), "path: second\n")
    assert load_config([f"model={first}"]).config.model.path == "first"
    assert load_config([f"model={second}"]).config.model.path == "second"
    write(Path("a/x.yaml"), "path: changed\n")
    assert load_config([f"model={first}"]).config.model.path == "changed"


def test_working_folder_and_extra_folder_come_first(tmp_path: Path) -> None:
    write(Path("configs/model/mine.yaml"), "path: working\n")
    write(Path("configs/model/tiny.yaml"), "path: shadow\n")
    write(Path("configs/experiment/123.yaml"), "# @package _global_\ndefaults:\n  - override /model: mine\n")
    loaded = load_config(["model=mine"])
    assert loaded.config.model.path == "working"
    assert loaded.sources["model.path"] == "./configs/model/mine.yaml:1"
    assert load_config([]).config.model.path == "shadow"
    numbered = load_config(["experiment=123"]).config
    assert (numbered.experiment, numbered.model.path) == ("123", "working")
    extra = tmp_path / "extra"
    write(extra / "model/mine.yaml", "path: extra\n")
    assert load_config(["model=mine"], extra_config_folder=extra).config.model.path == "extra"
    assert load_config([], extra_config_folder=extra).config.model.path == "shadow"


def test_a_strangers_configs_folder_changes_nothing() -> None:
    expected = load_config(["experiment=smoke"])
    write(Path("configs/config.yaml"), "defaults:\n  - server: apache\nport: 80\n")
    write(Path("configs/server/apache.yaml"), "broken: [\n")
    assert load_config(["experiment=smoke"]) == expected


def test_working_in_the_checkout_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_config(["experiment=quickstart"])
    monkeypatch.chdir(CONFIGS.parent)
    assert load_config(["experiment=quickstart"]) == expected


def test_interpolations_see_values_of_every_origin() -> None:
    write(Path("e.yaml"), "# @package _global_\nsft:\n  batch_size: ${ppo.batch_size}\nseed: ${ppo.num_updates}\n")
    loaded = load_config(["experiment=e.yaml", "ppo.batch_size=48", "run.dir=out/${experiment}-${seed}"])
    assert loaded.config.sft.batch_size == 48
    assert loaded.config.seed == loaded.config.ppo.num_updates
    assert loaded.config.run.dir == f"out/e-{loaded.config.seed}"
    assert loaded.sources["sft.batch_size"] == "e.yaml:3"


def test_round_trip_through_yaml() -> None:
    arguments = ["experiment=smoke", "ppo.learning_rate=5e-7", "run.dir=123", "model.revision='null'"]
    arguments += ["tracking.tags=[a, 'true', '1e3']", "zero.extra.timers={'a': {'b': [1, None, True, 'x']}}"]
    arguments += [r"zero.extra.timers.s=\${x}", "zero.extra.timers.t='3e-6'", "zero.stage=1"]
    arguments += ["model.chat_template=line\nline: {{ x }} # not a comment", "tracking.project=naïve ☃"]
    config = load_config(arguments).config
    assert config.zero.extra["timers"]["s"] == "${x}"
    Path("config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    again = config_from_file("config.yaml")
    assert again == config
    assert config_to_yaml(again) == config_to_yaml(config)
    assert config_hash(again) == config_hash(config)
    defaults = config_from_file(write(Path("empty.yaml"), "{}\n"))
    assert defaults == RLHFConfig()


def test_a_hand_edited_config_loads_with_scientific_numbers() -> None:
    write(Path("config.yaml"), "ppo:\n  learning_rate: 5e-7\n  num_updates: 1e2\nstages: [ppo]\n")
    config = config_from_file("config.yaml")
    assert (config.ppo.learning_rate, config.ppo.num_updates, config.stages) == (5e-7, 100, ("ppo",))


def test_hash_follows_values_and_leaves_out_what_it_is_told() -> None:
    base = load_config([]).config
    other = load_config(["run.dir=elsewhere", "tracking.project=p"]).config
    assert config_hash(base) != config_hash(other)
    assert config_hash(base, exclude=("run", "tracking.project")) == config_hash(
        other, exclude=("run", "tracking.project")
    )
    assert config_hash(base) == config_hash(load_config(["seed=1"]).config)


def test_listing_is_yaml_with_a_source_for_every_value() -> None:
    loaded = load_config(["experiment=quickstart", "ppo.learning_rate=3e-6", "run.dir=a # b\nc: d"])
    text = render_sources(loaded)
    assert yaml.safe_load(text) == yaml.safe_load(config_to_yaml(loaded.config))
    lines = [line for line in text.splitlines() if not line.endswith(":")]
    assert all("  # " in line for line in lines)
    assert next(line for line in lines if line.startswith("  learning_rate: 3.0e-06")).endswith(
        "# argument ppo.learning_rate=3e-6"
    )
    number = 1 + (CONFIGS / "experiment/quickstart.yaml").read_text().splitlines().index("experiment: quickstart")
    assert loaded.sources["experiment"] == f"configs/experiment/quickstart.yaml:{number}"
