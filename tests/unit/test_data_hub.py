"""`datasets` data sets: folders of save_to_disk, and messages when the hub cannot help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi

from rlhf.config.data import HubData, SplitConfig
from rlhf.data import data_hash, load_comparisons, load_demonstrations, load_prompts, preflight
from rlhf.data.hub import choose_splits
from rlhf.data.hub_access import http_errors
from rlhf.errors import ConfigError, DataError
from rlhf.records import Comparison, Demonstration, Message

ROWS = [{"prompt": f"p {i}", "response": f" r {i}"} for i in range(60)]


def config(path: Path | str, **kwargs: Any) -> HubData:
    return HubData(**{"path": str(path), "splits": SplitConfig(validation=0.0, test=0.0), **kwargs})


def test_saved_data_set_with_splits(tmp_path: Path) -> None:
    parts = {"train": ROWS[:40], "validation": ROWS[40:50], "test": ROWS[50:]}
    folder = tmp_path / "saved"
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(folder)
    preflight(config(folder))
    splits = load_demonstrations(config(folder))
    assert splits.train == [Demonstration(row["prompt"], row["response"]) for row in ROWS[:40]]
    assert (len(splits.validation), len(splits.test)) == (10, 10)
    assert str(splits.origin("test", 2)) == f"{folder} [test], row 3"


def test_saved_data_set_without_splits_is_split_by_hash(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    splits = load_prompts(config(folder, splits=SplitConfig(validation=0.2, test=0.3)))
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 60
    assert splits.validation
    assert splits.test


def test_selections_and_conversations_of_a_data_set(tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "Hi"}]
    rows = [
        {
            "chosen": [*turn, {"role": "assistant", "content": f"a{i}"}],
            "rejected": [*turn, {"role": "assistant", "content": "b"}],
        }
        for i in range(6)
    ]
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(rows).select([4, 2]).save_to_disk(folder)
    assert load_comparisons(config(folder)).train == [
        Comparison((Message("user", "Hi"),), "a4", "b"),
        Comparison((Message("user", "Hi"),), "a2", "b"),
    ]


def test_broken_rows_of_a_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([*ROWS[:2], {"prompt": "x", "response": ""}]).save_to_disk(folder)
    with pytest.raises(DataError, match=r"row 3: field 'response' is empty"):
        load_demonstrations(config(folder))
    assert len(load_demonstrations(config(folder, on_bad_row="skip")).train) == 2


def test_hash_follows_content_or_revision(tmp_path: Path) -> None:
    for name, rows in (("a", ROWS), ("b", ROWS), ("c", ROWS[1:])):
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
    one, same, other = (data_hash(config(tmp_path / name)) for name in "abc")
    assert one == data_hash(config(tmp_path / "a"))
    assert one != other
    # `datasets` writes a random fingerprint into every saved folder, so equal rows saved twice may differ.
    assert len(same) == 64
    assert data_hash(config("a/b")) != data_hash(config("a/b", revision="v2"))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train", "test"], {"train": "train", "test": "test"}),
        (["train_prefs", "test_prefs"], {"train": "train_prefs", "test": "test_prefs"}),
        (["all"], {None: "all"}),
        (["train", "train_extra", "dev"], {"train": "train", "validation": "dev"}),
    ],
)
def test_names_of_splits(names: list[str], expected: dict[str | None, str]) -> None:
    assert choose_splits(names, "x") == expected


def test_splits_that_stay_open() -> None:
    with pytest.raises(ConfigError, match=r"several splits for train: train_prefs, train_sft"):
        choose_splits(["train_prefs", "train_sft", "test_sft"], "x")
    with pytest.raises(ConfigError, match=r"no train split; its splits are helpful, test"):
        choose_splits(["helpful", "test"], "x")


def test_paths_that_are_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "p"}\n')
    with pytest.raises(ConfigError, match=r"not a folder written by save_to_disk.*data\.type=files"):
        preflight(config(tmp_path))
    for path in ("./missing", "/no/such/folder", "a/b/c", "~/nowhere-at-all"):
        with pytest.raises(ConfigError, match=r"there is no such folder"):
            load_prompts(config(path))
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"the saved data set is damaged"):
        load_prompts(config(tmp_path))


def test_offline_the_hub_cannot_be_reached() -> None:
    # conftest.py sets HF_HUB_OFFLINE, so `datasets` itself raises here.
    with pytest.raises(DataError, match=r"the hub cannot be reached .*save_to_disk"):
        load_prompts(config("some-owner/some-data-set-that-is-not-cached"))


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (
            DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"),
            ConfigError,
            "no such data set, or it is private",
        ),
        (ConnectionError("Couldn't reach a/b"), DataError, "the hub cannot be reached"),
        (http_errors()[0]("Server disconnected"), DataError, r"the hub cannot be reached \(Server disconnected\)"),
        (ValueError("Config name is missing. Please pick one among: x, y"), ConfigError, "pick one among: x, y"),
        (OSError(28, "No space left on device"), DataError, "cannot be prepared"),
    ],
)
def test_errors_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception], message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(expected, match=message):
        load_prompts(config("a/b", revision="main"))


def test_arguments_reach_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> datasets.DatasetDict:
        calls.append((args, kwargs))
        return datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(load_prompts(config("a/b", name="n", revision="r")).train) == 60
    assert calls == [(("a/b", "n"), {"revision": "r"})]


EXPORT = [
    "x/train/0000.parquet",
    "x/train/0001.parquet",
    "x/val/0000.parquet",
    "y/partial-train/0000.parquet",
    ".gitattributes",
]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A data set that a script makes, and the hub's copy of it; what was asked of `datasets`."""
    calls: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> datasets.DatasetDict:
        calls.append((args, kwargs))
        if args[0] != "parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found b.py")
        return datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *_, **__: EXPORT)
    return calls


def test_a_data_set_that_a_script_makes_is_read_from_the_hubs_copy(script: list[Any]) -> None:
    """As tatsu-lab/alpaca_farm: `datasets` has not run scripts since version 4."""
    assert len(load_prompts(config("a/b", name="x")).train) == 60
    branch = "hf://datasets/a/b@refs/convert/parquet/x"
    assert script[1] == (
        ("parquet",),
        {
            "data_files": {
                "train": [f"{branch}/train/0000.parquet", f"{branch}/train/0001.parquet"],
                "val": [f"{branch}/val/0000.parquet"],
            }
        },
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "xx"}, r"no configuration xx \(data.name\), only x, y. Did you mean x\?"),
        ({}, r"no configuration None \(data.name\), only x, y"),
        ({"name": "y"}, r"the beginning of it alone \(partial-train\)"),
        ({"name": "x", "revision": "v2"}, "data.revision is v2"),
    ],
)
def test_a_copy_that_does_not_do_says_why(script: list[Any], values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_prompts(config("a/b", **values))
    assert len(script) == 1


def test_other_errors_of_datasets_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(RuntimeError, match="something else"):
        load_prompts(config("a/b"))
