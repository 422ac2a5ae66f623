"""Multi-agent debate (Du et al. 2023, arXiv 2305.14325; AgentArk §3, phase 1, arXiv 2602.03955).

All agents answer alone; in every later round each sees the question, its own answers so far and its peers' last
answers, and answers again. Updates are simultaneous: round k sees what was said before it. An agent without peers
(alone, or in topology none) checks its own answer. At most agents × rounds calls, and one for a judge or summariser.
"""

import asyncio

from agentark_jax.data.render import Format, Layout, Prompt
from agentark_jax.protocols.aggregate import check_voters, decide, instruction
from agentark_jax.protocols.calls import Draw
from agentark_jax.protocols.config import DebateConfig
from agentark_jax.protocols.peers import PeerSource, neighbours, real
from agentark_jax.protocols.table import Pool, Result, Table
from agentark_jax.records import DEBATE, DEBATER, Question, Turn


async def debate(
    question: Question, pool: Pool, config: DebateConfig, peer_source: PeerSource = real, *, sample: int = 0
) -> Result:
    """Let the agents debate one question; debates of other `sample` numbers are independent of this one.

    The number of rounds is no part of a call's identity: a longer debate continues a stored shorter one. An agent whose
    call fails keeps its last answer in that round; one that has none yet is asked the question alone in the next.
    """
    check_voters(pool, config.aggregation, config.agents)
    table = Table(question, pool, DEBATE, Draw(config.temperature, config.max_tokens))
    said: list[list[Turn]] = [[] for _ in range(config.agents)]

    async def speak(agent: int, round: int) -> Turn:
        own = said[agent]
        if not own:
            return await table.pose(agent, role=DEBATER, round=round, sample=sample)
        heard = neighbours(config.topology, config.agents, agent)
        seen = {peer: said[peer][-1] for peer in heard if said[peer]}
        peers = await peer_source(question, agent, round, seen, table.form(agent))
        return await table.revise(
            agent,
            own if config.history == "all" else own[-1:],
            peers,
            role=DEBATER,
            round=round,
            sample=sample,
            named=config.named,
            shared_first=config.layout == "shared_first",
        )

    before: list[str] = []
    stopped = "rounds"
    for round in range(config.rounds):
        turns = await asyncio.gather(*(speak(agent, round) for agent in range(config.agents)))
        if round == 0:
            table.answered(turns)
        for own, turn in zip(said, turns, strict=True):
            if turn.error is None:
                own.append(turn)
        answers = [table.read(own[-1]) if own else "" for own in said]
        if config.early_stop == "consensus" and all(answers) and len(set(answers)) == 1:
            stopped = "consensus"
        if config.early_stop == "stable" and all(answers) and answers == before:
            stopped = "stable"
        if stopped != "rounds":
            break
        before = answers
    last = [own[-1] for own in said if own]
    final = await decide(table, config.aggregation, last, agent=config.agents, round=round + 1)
    return table.result(final, stopped)


def longest_prompt(question: Question, form: Format, config: DebateConfig) -> int:
    """Tokens of a debate's longest prompt on one question, if every answer takes `config.max_tokens`."""
    said = [0] * config.max_tokens
    prompts: list[Prompt] = [form.question(question)]
    if config.rounds > 1:
        earlier = [said] * (config.rounds - 2 if config.history == "all" else 0)
        layout = Layout(named=config.named, shared_first=config.layout == "shared_first")
        peers = [said] * (config.agents - 1)
        prompts.append(form.revision(question, said, peers, earlier=earlier, layout=layout))
    if config.aggregation in ("judge", "summariser"):
        prompts.append(form.instruction(instruction(question, config.aggregation, [said] * config.agents)))
    return max(sum(map(len, prompt)) for prompt in prompts)


def longest_dialogue(form: Format, config: DebateConfig) -> int:
    """Tokens of the longest answer that tells what a turn of a debate was shown (`render.dialogue_example`).

    Every answer takes `config.max_tokens`; what other tokenizers make of it is not known.
    """
    again, another, better = (len(form.tokenizer.encode(words)) for words in form.telling)
    earlier = config.rounds - 2 if config.history == "all" else 0
    peers = max(len(neighbours(config.topology, config.agents, agent)) for agent in range(config.agents))
    return (earlier + 1 + peers + 1) * config.max_tokens + earlier * again + peers * another + better
