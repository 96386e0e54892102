"""Log-probs and entropies against loops in float64, their gradients, and the memory they take."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.ops import logprobs as module
from rlhf.ops.logprobs import Excluded, entropy, logprobs_and_entropy, row_blocks, token_logprobs
from tests.unit import oracles
from tests.unit.ragged import backward


def _case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return 2.0 * torch.randn(3, 4, 7, dtype=dtype), torch.randint(0, 7, (3, 4))


def test_by_hand() -> None:
    # Odds 1 : 3 at temperature 1, so probabilities 1/4 and 3/4; at temperature 1/2 the odds are 1 : 9.
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, math.log(3.0)]]])
    tokens = torch.tensor([[0, 1]])
    found, entropies = logprobs_and_entropy(logits=logits, tokens=tokens, temperature=1.0)
    assert found[0].tolist() == pytest.approx([math.log(0.25), math.log(0.75)])
    # 1/4 log 4 + 3/4 log(4/3) = 0.562335
    assert entropies[0].tolist() == pytest.approx([0.562335, 0.562335], abs=1e-6)
    cold = token_logprobs(logits=logits, tokens=tokens, temperature=0.5)
    assert cold[0].tolist() == pytest.approx([math.log(0.1), math.log(0.9)])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_against_oracle(temperature: float) -> None:
    logits, tokens = _case()
    found, entropies = logprobs_and_entropy(logits=logits, tokens=tokens, temperature=temperature)
    assert found.dtype == torch.float32
    for row in range(3):
        for slot in range(4):
            expected = oracles.log_softmax(logits[row, slot].tolist(), temperature)[tokens[row, slot]]
            assert found[row, slot].item() == pytest.approx(expected, abs=1e-5)
            expected = oracles.entropy(logits[row, slot].tolist(), temperature)
            assert entropies[row, slot].item() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(found, token_logprobs(logits=logits, tokens=tokens, temperature=temperature))
    assert torch.equal(entropies, entropy(logits=logits, temperature=temperature))


def test_gradients_are_numerically_right() -> None:
    logits, tokens = _case(torch.float64)
    logits.requires_grad_()

    def both(leaf: Tensor) -> tuple[Tensor, Tensor]:
        return logprobs_and_entropy(logits=leaf, tokens=tokens, temperature=0.7)

    assert torch.autograd.gradcheck(both, (logits,))
    assert torch.autograd.gradcheck(lambda leaf: token_logprobs(logits=leaf, tokens=tokens, temperature=0.7), (logits,))
    assert torch.autograd.gradcheck(lambda leaf: entropy(logits=leaf, temperature=0.7), (logits,))


@pytest.mark.parametrize("max_entries", [1, 7, 14, 28, 60])
def test_blocks_change_nothing(max_entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, tokens = _case(torch.float64)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        found, entropies = logprobs_and_entropy(logits=leaf, tokens=tokens, temperature=0.7)
        backward(found.sum() + (entropies * tokens).sum())
        assert leaf.grad is not None
        return found.detach(), entropies.detach(), leaf.grad

    whole = run()
    monkeypatch.setattr(module, "MAX_BLOCK_ENTRIES", max_entries)
    for first, second in zip(whole, run(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_entries", [1, 5, 10, 35, 100])
def test_blocks_cover_every_token_once(max_entries: int) -> None:
    seen = np.zeros((4, 7), dtype=int)
    for block in row_blocks(torch.Size([4, 7, 5]), max_entries):
        seen[block] += 1
        assert seen[block].size * 5 <= max(max_entries, 5)
    assert (seen == 1).all()


class _Float32Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the size of every float32 tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.largest = max(self.largest, tensor.numel())
        return result


def test_bf16_logits_have_no_float32_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BLOCK_ENTRIES", 64)
    logits = torch.randn(8, 4, 16).bfloat16().requires_grad_()
    tokens = torch.randint(0, 16, (8, 4))
    with _Float32Sizes() as sizes:
        found, entropies = logprobs_and_entropy(logits=logits, tokens=tokens, temperature=0.7)
        backward(found.sum() + entropies.sum())
    assert found.dtype == torch.float32
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    assert 0 < sizes.largest <= 64
    # The numbers are those of float32 logits with the same values.
    exact = token_logprobs(logits=logits.detach().float(), tokens=tokens, temperature=0.7)
    assert torch.equal(found.detach(), exact)


def test_excluded_tokens_have_no_entropy() -> None:
    # Two of three tokens are left, equally likely: entropy log 2.
    logits = torch.tensor([[[0.0, 0.0, -math.inf]]], requires_grad=True)
    found = entropy(logits=logits, temperature=0.7)
    assert found.item() == pytest.approx(math.log(2))
    backward(found.sum())
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def _excluded_case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Excluded]:
    """Tokens 2 and 5 are left out in the first two slots of the first two rows; none of them stands there."""
    logits, tokens = _case(dtype)
    slots = torch.zeros(3, 4, dtype=torch.bool)
    slots[:2, :2] = True
    tokens[:2, :2] = torch.tensor([[0, 1], [3, 6]])
    return logits, tokens, Excluded(torch.tensor([2, 5]), slots)


@pytest.mark.parametrize("max_entries", [7, 14, 10**6])
def test_excluded_slots_against_oracle(max_entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An excluded token is one that the softmax never had; the gradient is that of the shorter softmax."""
    monkeypatch.setattr(module, "MAX_BLOCK_ENTRIES", max_entries)
    logits, tokens, excluded = _excluded_case()
    kept_logits = logits.clone()
    found, entropies = logprobs_and_entropy(logits=logits, tokens=tokens, temperature=0.7, excluded=excluded)
    alone = token_logprobs(logits=logits, tokens=tokens, temperature=0.7, excluded=excluded)
    assert torch.equal(found, alone)
    assert torch.equal(logits, kept_logits), "the logits themselves are left alone"
    for row in range(3):
        for slot in range(4):
            kept = [0, 1, 3, 4, 6] if excluded.slots[row, slot] else list(range(7))
            entries = logits[row, slot, kept].tolist()
            expected = oracles.log_softmax(entries, 0.7)[kept.index(int(tokens[row, slot]))]
            assert found[row, slot].item() == pytest.approx(expected, abs=1e-5)
            assert entropies[row, slot].item() == pytest.approx(oracles.entropy(entries, 0.7), abs=1e-5)


def test_excluded_slots_have_numerically_right_gradients() -> None:
    logits, tokens, excluded = _excluded_case(torch.float64)
    logits.requires_grad_()

    def both(leaf: Tensor) -> tuple[Tensor, Tensor]:
        return logprobs_and_entropy(logits=leaf, tokens=tokens, temperature=0.7, excluded=excluded)

    assert torch.autograd.gradcheck(both, (logits,))
    found, entropies = both(logits)
    backward(found.sum() + entropies.sum())
    assert logits.grad is not None
    assert (logits.grad[:2, :2, [2, 5]] == 0).all()
    assert (logits.grad[2, :, [2, 5]] != 0).all()


def test_an_excluded_token_itself_is_impossible_and_has_no_gradient() -> None:
    logits, tokens, excluded = _excluded_case()
    tokens[0, 0] = 5
    logits.requires_grad_()
    found = token_logprobs(logits=logits, tokens=tokens, temperature=0.7, excluded=excluded)
    assert found[0, 0] == -math.inf
    assert found.isinf().sum() == 1
    backward(found[0, 0])
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[0, 0, [2, 5]] == 0).all()


def test_unused_tokens_get_zero_gradient_row_14() -> None:
    """Row 14: logits of a padded slot may be NaN; a loss that masks it leaves no NaN behind."""
    logits, tokens = _case()
    logits[0, 2:] = float("nan")
    logits.requires_grad_()
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 2:] = False
    found, entropies = logprobs_and_entropy(logits=logits, tokens=tokens, temperature=1.0)
    backward(torch.where(mask, found + entropies, 0.0).sum())
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[0, 2:] == 0).all()
    assert (logits.grad[mask].abs().sum(-1) > 0).all()


def test_non_contiguous_logits() -> None:
    wide = torch.randn(2, 6, 5)
    tokens = torch.randint(0, 5, (2, 3))
    view = wide[:, 2:5]
    expected = token_logprobs(logits=view.contiguous(), tokens=tokens, temperature=1.0)
    assert torch.equal(token_logprobs(logits=view, tokens=tokens, temperature=1.0), expected)


def test_refusals() -> None:
    logits, tokens = _case()
    with pytest.raises(ValueError, match=r"logits .* tokens"):
        token_logprobs(logits=logits, tokens=tokens[:1], temperature=1.0)
    with pytest.raises(ValueError, match="logits must have 3 axes"):
        token_logprobs(logits=logits[0], tokens=tokens, temperature=1.0)
    with pytest.raises(TypeError, match="tokens must be an integer"):
        token_logprobs(logits=logits, tokens=tokens.float(), temperature=1.0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        token_logprobs(logits=logits, tokens=tokens, temperature=0.0)
    narrow = Excluded(torch.tensor([1]), torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"excluded slots \(B, R\) and tokens"):
        token_logprobs(logits=logits, tokens=tokens, temperature=1.0, excluded=narrow)
    with pytest.raises(TypeError, match="excluded_slots must be a bool"):
        token_logprobs(logits=logits, tokens=tokens, temperature=1.0, excluded=Excluded(narrow.token_ids, tokens))
