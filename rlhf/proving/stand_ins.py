"""Replaces the models and data sets that a config names by stand-ins in a folder; the rest of the config stays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import RLHFConfig, config_from_values
from rlhf.config.data import EmbeddedData, FileData, HubData, LabelledTextData, PartsData, SourceConfig
from rlhf.errors import ConfigError
from rlhf.proving.known_models import config_of
from rlhf.proving.schemas import Row, known_schema, rows_of, schema_of_format, sentence
from rlhf.proving.tiny_models import Role, write_tiny

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Values = dict[str, Any]
# The last part of keys that may name a model.
_MODEL_KEYS = {"path", "policy", "reference", "reward_model", "value_model", "base", "baseline", "model", "decode_with"}
_SCORER_KEYS = {"reward_model", "value_model"}


@dataclass(frozen=True)
class NamedModel:
    """A model that the config names: by which keys, and what it is used as."""

    path: str
    keys: tuple[tuple[str, ...], ...]
    role: Role


def named_models(config: RLHFConfig) -> list[NamedModel]:
    """The models that the config names and its stages may load, each once for each use."""
    found: dict[tuple[str, Role], list[tuple[str, ...]]] = {}
    stages = set(config.stages)
    for key, value in _leaves(config.model_dump(mode="json")):
        role = _role(key)
        unused = key[0] in type(config).model_fields and key[0] in _STAGE_SECTIONS and key[0] not in stages
        if isinstance(value, str) and role is not None and not unused:
            found.setdefault((value, role), []).append(key)
    return [NamedModel(path, tuple(keys), role) for (path, role), keys in found.items()]


_STAGE_SECTIONS = {"sft", "collect", "reward_model", "reward_report", "ppo", "dpo", "best_of_n", "evaluate"}


def _leaves(values: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _leaves(value, (*prefix, name))
    else:
        yield prefix, values


def _role(key: tuple[str, ...]) -> Role | None:
    """What the model at a key is used as; None where the key names no model."""
    last = key[-1]
    if last not in _MODEL_KEYS or key[0] in ("run", "serve", "tracking", "launcher", "zero"):
        return None
    if last == "decode_with":
        return "tokenizer"
    if key[0] == "data":
        return None
    if "arguments" in key:
        return "classifier"
    if last == "path":
        return "policy" if key == ("model", "path") else "scorer"
    return "scorer" if last in _SCORER_KEYS else "policy"


def real_configs(config: RLHFConfig) -> dict[str, tuple[PreTrainedConfig, str]]:
    """By path: the config of every model that is named, and where it is from. Raises `ConfigError`."""
    found: dict[str, tuple[PreTrainedConfig, str]] = {}
    fallback: PreTrainedConfig | None = None
    if config.model.path is not None:
        found[config.model.path] = config_of(config.model.path, None, config.model)
        fallback = found[config.model.path][0]
    for model in named_models(config):
        if model.path not in found:
            found[model.path] = config_of(model.path, fallback, config.model)
    return found


def with_shapes(config: RLHFConfig, folder: Path, real: dict[str, tuple[PreTrainedConfig, str]]) -> RLHFConfig:
    """The config with folders that hold nothing but each model's config.json: what a plan reads."""
    places: dict[tuple[str, Role], str] = {}
    for number, model in enumerate(named_models(config)):
        place = folder / f"{number}-{model.path.replace('/', '--')}"
        place.mkdir(parents=True, exist_ok=True)
        body = real[model.path][0].to_dict()
        body["architectures"] = None
        (place / "config.json").write_text(json.dumps(body, default=str), encoding="utf-8")
        places[model.path, model.role] = str(place)
    return replace_models(config, places)


def write_models(
    config: RLHFConfig, folder: Path, real: dict[str, tuple[PreTrainedConfig, str]], texts: Sequence[str]
) -> RLHFConfig:
    """The config with tiny models in `folder`."""
    places: dict[tuple[str, Role], str] = {}
    for number, model in enumerate(named_models(config)):
        place = folder / f"{model.role}-{model.path.strip('/').replace('/', '--')}"
        write_tiny(place, real[model.path][0], model.role, texts, seed=number)
        places[model.path, model.role] = str(place)
    return replace_models(config, places)


def replace_models(config: RLHFConfig, places: dict[tuple[str, Role], str]) -> RLHFConfig:
    """The config with other paths for the models it names."""
    values = config.model_dump(mode="json")
    for model in named_models(config):
        for key in model.keys:
            _set(values, key, places[model.path, model.role])
    values["model"]["revision"] = None
    return config_from_values(values, "the proof's models")


def _set(values: Values, key: tuple[str, ...], value: Any) -> None:
    *parents, last = key
    for parent in parents:
        values = values[parent]
    values[last] = value


# --- data -------------------------------------------------------------------------------------------------------------


def sources_of(config: RLHFConfig) -> dict[str, SourceConfig]:
    """The sources of the data by their key below `data`; a single source has the key ""."""
    return config.data.sources() if isinstance(config.data, PartsData) else {"": config.data}


def write_data(config: RLHFConfig, folder: Path) -> tuple[RLHFConfig, list[str]]:
    """The config with stand-ins for its data sets in `folder`, and what stands for what.

    Files that are there are taken as they are. Raises `ConfigError` for a data set of which neither id nor format is
    known, and for a configuration that a known one has not. Token ids are written by the tokenizer that `decode_with`
    names, which must be a stand-in already.
    """
    values = config.model_dump(mode="json")
    notes = []
    for name, source in sources_of(config).items():
        if isinstance(source, EmbeddedData) or _is_there(source):
            notes.append(f"{name or 'data'}: as it is")
            continue
        key = f"data.{name}" if name else "data"
        known = known_schema(source, key)
        schema = known or schema_of_format(source)
        if schema is None:
            raise ConfigError(
                f"{key}.path={source.path} is no data set whose columns are known here: name its row format in "
                f"{key}.format, or give a file that is there"
            )
        rows = rows_of(schema)
        place = folder / (name or "data")
        section = values["data"][name] if name else values["data"]
        if isinstance(source, FileData):
            rows = {"train": [row for split in rows.values() for row in split]}
            section["path"] = str(_write_file(place, _encoded(rows["train"], source.decode_with)))
        else:
            decode_with = source.decode_with if isinstance(source, HubData) else None
            _save({split: _encoded(own, decode_with) for split, own in rows.items()}, place)
            section["path"] = str(place)
            section["revision"] = None
        num_rows = sum(len(own) for own in rows.values())
        guessed = "" if known else f" (not known here: columns of format {getattr(source, 'format', None)})"
        notes.append(f"{name or 'data'}: {source.path}{guessed} by {num_rows} rows of {', '.join(rows)}")
    return config_from_values(values, "the proof's data"), notes


def names_of_data(before: RLHFConfig, after: RLHFConfig) -> dict[str, str]:
    """By the path of a stand-in: what it stands for, for messages about it."""
    real = sources_of(before)
    pairs = [(real[name], source) for name, source in sources_of(after).items()]
    return {
        stand_in.path: f"{source.path} (its stand-in)"
        for source, stand_in in pairs
        if not isinstance(source, EmbeddedData) and not isinstance(stand_in, EmbeddedData)
        if source.path != stand_in.path
    }


def _is_there(source: FileData | HubData | LabelledTextData) -> bool:
    return Path(source.path).expanduser().exists()


def _encoded(rows: list[Row], decode_with: str | None) -> list[Row]:
    if decode_with is None:
        return rows
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(decode_with)
    encode = tokenizer.encode
    return [{name: encode(value) if isinstance(value, str) else value for name, value in row.items()} for row in rows]


def _write_file(place: Path, rows: list[Row]) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    path = place / "train.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def _save(rows: dict[str, list[Row]], place: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    splits = {name: datasets.Dataset.from_list(own) for name, own in rows.items()}
    datasets.DatasetDict(splits).save_to_disk(str(place))


def texts_of(config: RLHFConfig) -> list[str]:
    """What the stand-ins' tokenizers are trained on: the words of all stand-ins."""
    headings = (
        "SUBREDDIT: r/relationships\n\nTITLE: POST: TL;DR:\n\nHuman: Assistant: ### Instruction: Input: Response:\n"
    )
    return [headings, *(f" {sentence(number)}" for number in range(240)), "a warm clever dull film. It is bad, good."]
