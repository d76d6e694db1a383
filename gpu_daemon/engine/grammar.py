"""What a sequence may say next: a grammar compiled against the model's vocabulary, one state a sequence. No tensors.

A grammar comes from clients, by way of the site: compiling it is bounded and happens off the engine's thread, and a state
that cannot go on ends its own sequence only.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from gpu_daemon.errors import InvalidGrammar

MAX_BYTES = 256 << 10
# A step of a grammar costs tens of microseconds; these end one that would hold everybody's step for more than a moment.
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


class GrammarCompiler:
    """Of one model. `vocab_size` counts the rows of its logits, which may be more than its tokens."""

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_ids: Iterable[int]) -> None:
        """Raises OSError or ValueError for a file that is no tokenizer's."""
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(tokenizer_file.read_text(), n_vocab=vocab_size, eos_token=sorted(eos_ids))

    def compile(self, source: str, generated: Many[Many[int]]) -> list[Grammar]:
        """A state for each choice, past the tokens it already has. Raises InvalidGrammar; takes up to 0.3 s."""
        if len(source) > MAX_BYTES:
            raise InvalidGrammar("the grammar is too long")
        first = LLMatcher(self._tokenizer, source, log_level=0, limits=LIMITS)
        if first.is_error():
            raise InvalidGrammar("the grammar cannot be compiled")
        return [self._resumed(first.deep_copy(), ids) for ids in generated]

    def _resumed(self, matcher: LLMatcher, ids: Many[int]) -> Grammar:
        if not matcher.consume_tokens(list(ids)):
            raise InvalidGrammar("the tokens of an earlier attempt do not follow the grammar")
        return Grammar(matcher, self._vocab_size)


class Grammar:
    """One sequence's place in its grammar. Not for two threads at once."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._words = np.zeros(-(-vocab_size // 32), np.int32)

    def allowed(self) -> NDArray[np.bool_]:
        """[vocabulary]: which tokens may come next. Once it is complete, only those that end a text."""
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        bits = np.unpackbits(self._words.view(np.uint8), count=self._vocab_size, bitorder="little")
        return bits.view(np.bool_)

    def advance(self, token_id: int) -> None:
        """Takes the token that was drawn."""
        self._matcher.consume_token(token_id)

    @property
    def failed(self) -> bool:
        """It met a limit, or a token it does not allow: the sequence cannot go on."""
        return bool(self._matcher.is_error())

    @property
    def complete(self) -> bool:
        """Nothing may follow but the end."""
        return bool(self._matcher.is_stopped()) and not self.failed
