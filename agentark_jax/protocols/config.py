"""Settings of the ways agents talk."""

from dataclasses import dataclass

from agentark_jax.errors import UsageError


@dataclass(frozen=True)
class DebateConfig:
    """Debate: every agent answers, then revises in sight of its peers' last answers; the majority decides.

    Attributes:
        agents: number of agents (the paper's main study has 5).
        rounds: rounds, the first included (at most 3 in the paper).
        temperature: sampling temperature of every call.
        max_tokens: longest completion of every call, in tokens.
    """

    agents: int = 3
    rounds: int = 2
    temperature: float = 0.8
    max_tokens: int = 64

    def __post_init__(self) -> None:
        if self.agents < 1:
            raise UsageError(f"debate.agents is {self.agents}: a debate needs at least one agent.")
        if self.rounds < 1:
            raise UsageError(f"debate.rounds is {self.rounds}: a debate has at least one round.")
        if self.temperature <= 0:
            raise UsageError(f"debate.temperature is {self.temperature}: with 0 or less all agents say the same.")
        if self.max_tokens < 1:
            raise UsageError(f"debate.max_tokens is {self.max_tokens}: give a positive number of tokens.")
