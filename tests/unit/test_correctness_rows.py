"""Every known bug of RLHF code bases has a test here that would catch it; this file says which.

The rows number bugs that shipped somewhere. A test carries the numbers it is for in its name (`..._row_14`,
`rows_1_and_3`) or in its docstring ("Rows 1, 14: ..."). Tests that say it in words are listed in `SAID_IN_WORDS`.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

ROWS: dict[int, str] = {
    1: "values and rewards of padded slots reach no advantage",
    2: "the score lands on the last response token, whether or not the response stopped",
    3: "advantages are non-zero exactly under the mask",
    4: "a tensor that is not a bool mask is refused as one, and arguments have names",
    5: "a KL term alone lowers the KL to the reference",
    6: "the logged KL is the one that was charged",
    7: "scoring reproduces sampling at the temperature; what scoring cannot reproduce is refused",
    8: "the first ratio is 1",
    9: "dropout is off in PPO, with gradient checkpointing too",
    10: "accumulating k micro-batches is one batch of k times the size",
    11: "uneven micro-batches: sums are divided once",
    12: "whitening and means are over all ranks",
    13: "the mean of a sequence counts no padding",
    14: "NaN in padding never reaches a result or a gradient",
    15: "excluded rows do not enter normalisation",
    16: "filtered rows are inert",
    17: "a table of advantages and returns worked by hand",
    18: "metrics do not depend on the length of the padding",
    19: "the missing-EOS penalty reads the response only",
    20: "a stop token that is not EOS ends a response",
    21: "the score's index comes from the mask, also when pad is EOS and the prompt has several turns",
    22: "masks are carried, never rebuilt from ids",
    23: "the reference does not move with the policy",
    24: "with adapters the reference is the SFT model: KL 0 at step 0",
    25: "the optimiser's state survives a resume",
    26: "every configured number changes the result",
    27: "every trainable parameter learns",
    28: "rewards are not shifted by one: an oracle that shares no line",
    29: "no operation broadcasts",
    30: "Adam's epsilon where TensorFlow has it",
    31: "whitening moves the mean exactly when asked",
    32: "whitening with the biased variance",
    33: "left padding changes no logit",
    34: "ranks that stop at different lengths do not wait for each other under ZeRO-3",
    35: "the KL penalty is not clamped at zero",
    36: "the adaptive KL's target is per sequence and says so",
    37: "the length of the padding changes no reward-model loss",
    38: "the score is read at the last attended token",
    39: "a batch of one scores as a padded batch, whatever the pad token",
    40: "the loss of a batch is the mean over its pairs",
    41: "the new head follows from the seed",
    42: "the head is in the saved file and gives the same scores",
    43: "a score does not depend on where the padding sits",
    44: "EOS is in the labels: a model that learned eight texts stops",
    45: "exactly one BOS, and the EOS stays one",
    46: "a rank whose batch is fully masked does not hang the others",
    47: "golden loss and gradient norm of a fixed batch; the reduction is configured",
    48: "a label says on which side its answer was shown",
}

# Tests whose names say the property in words, for rows that are theirs all the same: file, then function.
SAID_IN_WORDS: dict[int, tuple[tuple[str, str], ...]] = {
    9: (("unit/test_models_loading.py", "test_disabled_dropout_makes_training_mode_deterministic"),),
    10: (
        ("distributed/test_engine.py", "test_every_partition_gives_the_plain_loop"),
        ("pipeline/test_trl_stages.py", "test_accumulation_changes_nothing"),
    ),
    25: (
        ("distributed/test_engine.py", "test_resume_is_bit_identical"),
        ("distributed/test_trl_stages.py", "test_killed_ranks_go_on_to_the_same_bytes"),
    ),
    33: (("unit/test_generation.py", "test_left_padding_never_matters"),),
    37: (("pipeline/test_trl_stages.py", "test_reward_loss_is_the_mean_over_the_pairs_of_the_whole_batch"),),
    38: (("unit/test_models_scalar.py", "test_the_score_is_read_at_the_last_attended_token"),),
    39: (
        ("unit/test_models_scalar.py", "test_a_score_depends_on_the_real_tokens_alone"),
        ("unit/test_architectures.py", "test_reward_model_round_trips"),
        ("pipeline/test_trl_stages.py", "test_reward_model_scores_survive_saving_and_padding"),
    ),
    40: (("pipeline/test_trl_stages.py", "test_reward_loss_is_the_mean_over_the_pairs_of_the_whole_batch"),),
    41: (("unit/test_models_scalar.py", "test_the_head_follows_from_its_seed_alone"),),
    42: (
        ("unit/test_models_scalar.py", "test_saving_keeps_scores_and_head"),
        ("distributed/test_trl_stages.py", "test_what_ranks_saved_loads_with_plain_transformers"),
    ),
    43: (("unit/test_models_scalar.py", "test_a_score_depends_on_the_real_tokens_alone"),),
    44: (
        ("unit/test_stages_trl.py", "test_labels_leave_the_prompt_out_and_keep_eos"),
        ("pipeline/test_trl_stages.py", "test_a_model_that_knows_eight_texts_by_heart_stops_after_each"),
    ),
    45: (
        ("unit/test_tokenization.py", "test_one_bos_where_the_tokenizer_uses_one_and_one_eos_always"),
        ("unit/test_tokenization.py", "test_one_bos_and_one_eos_with_every_template"),
    ),
    47: (("pipeline/test_trl_stages.py", "test_sft_loss_is_the_mean_over_the_tokens_of_the_whole_batch"),),
    48: (("unit/test_annotators.py", "test_label_records_the_side_on_which_the_chosen_response_was_shown"),),
}

# Rows without a test, each with the reason; a row that gets one must leave.
PENDING: dict[int, str] = {}

_LIST = r"(\d+(?:(?:, (?:and )?| and )\d+)*)"
_IN_NAME = re.compile(r"(?:^|_)rows?_(\d+(?:_(?:and_)?\d+)*)(?=_|$)")
_IN_DOCSTRING = re.compile(rf"\b[Rr]ows? {_LIST}(?=:| for |,? masked)")


def rows_in_name(name: str) -> set[int]:
    """The rows that a test's name carries."""
    return {int(number) for match in _IN_NAME.finditer(name) for number in re.findall(r"\d+", match[1])}


def rows_in_docstring(docstring: str) -> set[int]:
    """The rows that a docstring opens a statement with: "Row 3: ...", "Rows 1, 14: ...", "... and row 40 for ..."."""
    return {int(number) for match in _IN_DOCSTRING.finditer(docstring) for number in re.findall(r"\d+", match[1])}


def _tests() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield path.relative_to(TESTS).as_posix(), node


@cache
def covered() -> dict[int, set[tuple[str, str]]]:
    """The tests of each row, by file and function."""
    found: dict[int, set[tuple[str, str]]] = defaultdict(set)
    everything = set()
    for file, node in _tests():
        everything.add((file, node.name))
        for row in rows_in_name(node.name) | rows_in_docstring(ast.get_docstring(node) or ""):
            found[row].add((file, node.name))
    for row, places in SAID_IN_WORDS.items():
        for place in places:
            assert place in everything, f"row {row}: {place[0]} has no {place[1]} any more"
            found[row].add(place)
    return found


def test_numbers_are_read_from_names_and_docstrings() -> None:
    assert rows_in_name("test_padding_never_matters_rows_1_14_18") == {1, 14, 18}
    assert rows_in_name("test_rows_8_and_24_the_first_step") == {8, 24}
    assert rows_in_name("test_row_7_rescoring_at_0_7") == {7}
    assert rows_in_name("test_row_order_never_matters") == rows_in_name("test_every_row_1x") == set()
    assert rows_in_docstring("Rows 1, 14, 18: outputs") == {1, 14, 18}
    assert rows_in_docstring("Rows 4 and 29: a mask") == {4, 29}
    assert rows_in_docstring("Row 11 for the value loss and row 40 for pairs: a sum") == {11, 40}
    assert rows_in_docstring("The third of 4 rows is row 2 of the file.") == set()


def test_rows_are_numbered_without_a_gap() -> None:
    assert list(ROWS) == list(range(1, 49))


@pytest.mark.parametrize("row", ROWS)
def test_every_bug_has_a_test_that_would_catch_it(row: int) -> None:
    if row in PENDING:
        assert not covered()[row], f"row {row} has a test now: take it out of PENDING"
    else:
        assert covered()[row], f"row {row} has no test: {ROWS[row]}"


def test_no_test_names_a_row_that_does_not_exist() -> None:
    assert set(covered()) <= set(ROWS)
