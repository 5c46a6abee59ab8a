"""Prompt lookup: guess the next tokens from an earlier occurrence of the last ones, and let the model check them.

A draft is what followed the latest earlier occurrence of the last n tokens of prompt and generated text. One step then
computes the token that plain generation would choose after each drafted token; the draft is kept as far as it agrees.
What is generated does not depend on drafts, so they may be bad; `DraftBudget` sees to it that bad ones cost little.

Source: Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding (the n-gram draft); Leviathan et al. 2023,
arXiv:2211.17192 (speculative decoding). Written for this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# What the rule of DraftBudget assumes, in units of a step without drafts. They are constants, not times measured while
# generating, so that drafts -- and with them every bit of the result -- are the same in each run.
ROW_COST = 0.1  # one more row in a step
MAX_ROWS = 16  # of a step; kernels that stream weights take no more at this price
INITIAL_BALANCE = 0.5
MAX_BALANCE = 1.5
INCOME_PER_STEP = 0.02

_INITIAL_ACCEPTANCE = 0.5
_ACCEPTANCE_DECAY = 0.8  # weight of the past in the running estimate: the last 5 or so drafted tokens decide
_MIN_NGRAM_SIZE = 2  # shorter matches are chance; used only where max_ngram_size is 1


class NgramIndex:
    """The tokens of one sequence and where each n-gram of them last occurred."""

    def __init__(self, tokens: Sequence[int], max_ngram_size: int) -> None:
        self._sizes = range(max_ngram_size, min(_MIN_NGRAM_SIZE, max_ngram_size) - 1, -1)
        self._tokens: list[int] = []
        # n-gram -> index of the token that followed it; the n-gram at the very end is not in yet
        self._followed_at: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        end = len(self._tokens)
        for size in self._sizes:
            if size <= end:
                self._followed_at[tuple(self._tokens[end - size :])] = end
        self._tokens.append(token)

    def continuation(self, num_tokens: int) -> list[int]:
        """What followed the latest earlier occurrence of the last n tokens, n as large as possible; [] if there is
        none. Where the occurrence overlaps the end, its continuation goes on periodically: a b a b -> a b a ..."""
        end = len(self._tokens)
        for size in self._sizes:
            start = self._followed_at.get(tuple(self._tokens[-size:])) if size <= end else None
            if start is not None:
                period = end - start
                return [self._tokens[start + i % period] for i in range(num_tokens)]
        return []


class DraftBudget:
    """How many tokens to draft for one sequence. The rule, in units of a step without drafts:

    A drafted token costs `row_cost`, an accepted one saves 1. Each sequence has a balance, which starts at
    INITIAL_BALANCE, earns INCOME_PER_STEP per step, pays for drafts, receives what they save and holds at most
    MAX_BALANCE. A draft costs at most the balance. So n steps cost at most 0.02 n + 0.5 more than without drafts,
    however bad these are, and a change of text costs at most 1.5 steps.

    Within the balance, the length k maximises the expected tokens per cost,
    (1 + p + ... + p^k) / (1 + row_cost k), p the running estimate of a drafted token's acceptance. Where that is k = 0,
    one token is drafted whenever the balance allows it, to notice text that repeats again.
    """

    def __init__(self) -> None:
        self._balance = INITIAL_BALANCE
        self._acceptance = _INITIAL_ACCEPTANCE

    def num_tokens(self, limit: int, row_cost: float) -> int:
        """Tokens to draft, at most `limit`. Called once per step."""
        self._balance = min(self._balance + INCOME_PER_STEP, MAX_BALANCE)
        # a hair more than the balance, lest 3 x 0.1 > 0.3 cost a token
        affordable = min(limit, int(self._balance / row_cost + 1e-6))
        if affordable < 1 or row_cost >= 1:
            return 0
        best, best_rate = 1, 1.0
        expected, reached = 1.0, 1.0
        for k in range(1, affordable + 1):
            reached *= self._acceptance
            expected += reached
            rate = expected / (1 + row_cost * k)
            if rate > best_rate:
                best, best_rate = k, rate
        return best

    def spend(self, num_drafted: int, row_cost: float) -> None:
        """Pays for a draft."""
        self._balance -= row_cost * num_drafted

    def settle(self, num_drafted: int, num_accepted: int) -> None:
        """Receives what the draft of the last step has saved."""
        self._balance = min(self._balance + num_accepted, MAX_BALANCE)
        # tokens after the first wrong one were not tried
        for outcome in [1.0] * num_accepted + [0.0] * (num_accepted < num_drafted):
            self._acceptance += (1 - _ACCEPTANCE_DECAY) * (outcome - self._acceptance)


@dataclass
class _Draftee:
    index: NgramIndex
    budget: DraftBudget = field(default_factory=DraftBudget)
    num_new_tokens: int = 0  # that the index has
    num_drafted: int = 0  # in the step before


class PromptLookup:
    """Drafts for the sequences of one `generate` call.

    Args:
        prompts: token ids of each sequence.
        max_draft_tokens: longest draft. max_ngram_size: longest n-gram to look for.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], max_draft_tokens: int, max_ngram_size: int) -> None:
        self._sequences = [_Draftee(NgramIndex(ids, max_ngram_size)) for ids in prompts]
        self._max_draft_tokens = max_draft_tokens

    def draft(self, row: int, new_tokens: Sequence[int], room: int, num_active: int) -> list[int]:
        """What may follow in sequence `row`; often nothing.

        Args:
            new_tokens: all that was generated so far, at least one token more than at the last call.
            room: longest draft that generation has room for.
            num_active: sequences that share the step.
        """
        sequence = self._sequences[row]
        # A step serves all sequences: to save this one's share of it is worth less, the more they are.
        row_cost = ROW_COST * num_active
        added = new_tokens[sequence.num_new_tokens :]
        sequence.budget.settle(sequence.num_drafted, len(added) - 1)
        for token in added:
            sequence.index.append(token)
        sequence.num_new_tokens = len(new_tokens)
        limit = min(self._max_draft_tokens, room, MAX_ROWS // num_active - 1)
        draft = sequence.index.continuation(sequence.budget.num_tokens(limit, row_cost))
        sequence.budget.spend(len(draft), row_cost)
        sequence.num_drafted = len(draft)
        return draft
