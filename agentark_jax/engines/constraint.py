"""Completions that must match a regular expression: which tokens may come next, by llguidance, as in SGLang."""

import llguidance
import llguidance.numpy
import numpy as np

from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.errors import AgentArkError


class Constrainer:
    """Makes constraints for one tokenizer. `vocabulary` is the model's number of token ids, padding included."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._json, self._vocabulary = tokenizer.to_json(), vocabulary
        self._tokenizers: dict[tuple[int, ...], llguidance.LLTokenizer] = {}
        self.words = llguidance.numpy.allocate_token_bitmask(1, vocabulary).shape[1]

    def constrain(self, regex: str, stop_ids: tuple[int, ...]) -> "Constraint":
        """A completion that begins; a stop id may end it where it matches. Raises AgentArkError for a bad regex."""
        if stop_ids not in self._tokenizers:
            self._tokenizers[stop_ids] = llguidance.LLTokenizer(
                self._json, n_vocab=self._vocabulary, eos_token=list(stop_ids) or None
            )
        grammar = llguidance.LLMatcher.grammar_from_regex(regex)
        problem = llguidance.LLMatcher.validate_grammar(grammar, self._tokenizers[stop_ids])
        if problem:
            raise AgentArkError(f"the regex {regex!r} is not possible: {problem.splitlines()[0]}")
        return Constraint(llguidance.LLMatcher(self._tokenizers[stop_ids], grammar), self.words)


class Constraint:
    """How far one completion has come. `allowed` [W] int32 has a bit for each token id that may come next."""

    def __init__(self, matcher: llguidance.LLMatcher, words: int) -> None:
        self._matcher = matcher
        self.allowed = np.zeros(words, np.int32)
        self._look_ahead()

    def advance(self, token: int) -> None:
        """Takes note of the token that was sampled."""
        self._matcher.consume_token(token)
        self._look_ahead()

    def _look_ahead(self) -> None:
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self.allowed[None], 0)
