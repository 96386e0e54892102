"""What looks like padding is a token when the mask says so: EOS inside a prompt, and a pad token that is EOS."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf.batches import PromptBatch, Rollout
from rlhf.models.generation import generate
from rlhf.models.scalar import ScalarModel, sequence_scores
from rlhf.models.scoring import response_logprobs
from rlhf.ops.losses import pairwise_loss
from rlhf.ops.sequences import left_pad, right_pad

# One token for both, as many tokenizers have it. A turn ends with it, so a prompt of several turns holds some.
EOS = PAD = 2
STOP = 7
TURNS = [5, 6, EOS, 8, 9, EOS, 4]
SHORT = [5, EOS, 4]


@pytest.fixture(scope="module")
def policy() -> PreTrainedModel:
    """Logits far from uniform, so that a token that is masked by mistake shows."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        eos_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return cast(PreTrainedModel, model.eval())


@pytest.fixture(scope="module")
def scalar(policy: PreTrainedModel) -> ScalarModel:
    return ScalarModel.from_policy(policy, seed=7).eval()


def _scores(model: ScalarModel, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return sequence_scores(model(ids, mask), mask)


def _forced(policy: PreTrainedModel, prompt: list[int], tokens: list[int]) -> Tensor:
    """Uniform numbers (1, R) that make the policy draw `tokens` after `prompt`."""
    numbers, so_far = [], list(prompt)
    for token in tokens:
        with torch.no_grad():
            weights = policy(input_ids=torch.tensor([so_far])).logits[0, -1].double().softmax(-1)
        numbers.append(float(weights[:token].sum() + weights[token] / 2))
        so_far.append(token)
    return torch.tensor([numbers], dtype=torch.float64)


@pytest.mark.parametrize(
    ("stop_ids", "drawn", "kept", "stopped"),
    [
        ([EOS], [8, 9, 8, 9], [8, 9, 8, 9], False),
        ([EOS], [8, EOS, 8, 9], [8, EOS], True),
        ([STOP], [8, EOS, STOP, 9], [8, EOS, STOP], True),
        ([STOP], [8, EOS, 8, EOS], [8, EOS, 8, EOS], False),
        ([EOS, STOP], [8, STOP, EOS, 9], [8, STOP], True),
    ],
)
def test_a_response_stops_by_its_own_tokens_alone_rows_19_and_20(
    policy: PreTrainedModel, stop_ids: list[int], drawn: list[int], kept: list[int], stopped: bool
) -> None:
    """Rows 19, 20: an EOS in the prompt ends nothing, and which tokens do is the caller's list, EOS or not."""
    prompt, mask = left_pad([TURNS], pad_id=PAD, width=9)
    result = generate(
        policy,
        prompt,
        mask,
        uniforms=_forced(policy, TURNS, drawn),
        temperature=1.0,
        max_response_tokens=4,
        stop_ids=stop_ids,
        pad_id=PAD,
    )
    assert result.response_ids[result.response_mask].tolist() == kept
    assert result.stopped.tolist() == [stopped]


def test_the_score_is_read_behind_the_last_turn_rows_21_38_39_and_43(scalar: ScalarModel) -> None:
    """Rows 21, 38, 39, 43: with pad == EOS and several turns, a score is that of the sequence alone.

    Wherever the padding sits. The first pad less one would be inside the prompt: an EOS stands there.
    """
    sequences = [[*TURNS, 8, 9, EOS], [*SHORT, 6], [*SHORT, 6, EOS, EOS]]
    alone = torch.cat([_scores(scalar, *right_pad([sequence], pad_id=PAD)) for sequence in sequences])
    assert len({round(score, 3) for score in alone.tolist()}) == 3
    for pad in (left_pad, right_pad):
        for width in (10, 15):
            found = _scores(scalar, *pad(sequences, pad_id=PAD, width=width))
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    ids, mask = right_pad(sequences, pad_id=PAD)
    # A real EOS at the end counts: without it the score is another one.
    shorter = mask.clone()
    shorter[0, 9] = False
    assert (_scores(scalar, ids, shorter)[0] - alone[0]).abs() > 1e-3
    # Padding in the middle: the same tokens, three empty slots after the prompt.
    middle_ids = torch.full((1, 13), PAD)
    middle_mask = torch.zeros(1, 13, dtype=torch.bool)
    slots = [*range(7), 10, 11, 12]
    middle_ids[0, slots], middle_mask[0, slots] = torch.tensor(sequences[0]), True
    torch.testing.assert_close(_scores(scalar, middle_ids, middle_mask), alone[:1], atol=1e-5, rtol=0)


def test_the_length_of_the_padding_changes_no_loss_row_37(scalar: ScalarModel) -> None:
    """Row 37: pairs padded to any width, on either side, give the loss of the pairs alone; and row 40: their sum."""
    chosen, rejected = [[*TURNS, 8, EOS], [*SHORT, 9, EOS]], [[*TURNS, 9, 9, 9, EOS], [*SHORT, EOS]]

    def loss(pad: Any, width: int | None, rows: slice) -> float:
        first, second = (_scores(scalar, *pad(side[rows], pad_id=PAD, width=width)) for side in (chosen, rejected))
        return pairwise_loss(chosen=first, rejected=second)[0].item()

    alone = sum(loss(right_pad, None, slice(row, row + 1)) for row in range(2))
    for pad in (left_pad, right_pad):
        for width in (11, 16):
            assert loss(pad, width, slice(0, 2)) == pytest.approx(alone, abs=1e-5)


def test_a_real_pad_token_is_attended_to_row_22(policy: PreTrainedModel) -> None:
    """Row 22: log-probs with the carried mask are those of the sequence alone; one rebuilt from ids gives others."""
    prompts, prompt_mask = left_pad([TURNS, SHORT], pad_id=PAD)
    responses, response_mask = right_pad([[8, EOS], [6, EOS, 9, EOS]], pad_id=PAD)
    rollout = Rollout(
        prompts=PromptBatch(prompts, prompt_mask, torch.arange(2), torch.zeros(2, dtype=torch.long)),
        response_ids=responses,
        response_mask=response_mask,
        stopped=torch.tensor([True, True]),
        sampling_logprobs=torch.zeros(responses.shape),
    )
    assert rollout.attention_mask.sum().item() == 7 + 3 + 2 + 4
    assert rollout.response_lengths.tolist() == [2, 4]

    def logprobs(mask: Tensor) -> Tensor:
        arguments: dict[str, Any] = {"num_prompt": prompts.shape[1], "temperature": 1.0}
        with torch.no_grad():
            return response_logprobs(policy, input_ids=rollout.input_ids, attention_mask=mask, **arguments)

    found = logprobs(rollout.attention_mask)
    for row, (prompt, response) in enumerate(((TURNS, [8, EOS]), (SHORT, [6, EOS, 9, EOS]))):
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            expected = policy(input_ids=ids).logits[0].log_softmax(-1)
        for slot, token in enumerate(response):
            assert found[row, slot].item() == pytest.approx(expected[len(prompt) + slot - 1, token].item(), abs=1e-4)
    rebuilt = logprobs(rollout.input_ids != PAD)
    assert (rebuilt - found)[response_mask].abs().max() > 1e-2
