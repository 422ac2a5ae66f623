"""What a run refuses before anything expensive starts: sizes that a later stage could not work with."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import jax

from agentark_jax.arms import ARMS
from agentark_jax.config import PAD_FITS, RunConfig
from agentark_jax.data.render import Layout, Prompt
from agentark_jax.errors import UsageError
from agentark_jax.generation import Model, Seat
from agentark_jax.models import transformer
from agentark_jax.models.config import load_config
from agentark_jax.protocols.config import DebateConfig
from agentark_jax.protocols.debate import longest_dialogue, longest_prompt
from agentark_jax.protocols.single import hinted
from agentark_jax.records import Question
from agentark_jax.training.config import FitConfig
from agentark_jax.training.mesh import check_mesh, make_mesh
from agentark_jax.training.rewards import reward_function
from agentark_jax.training.state import partition


def check_lengths(
    config: RunConfig, raw: Model, seats: Sequence[Seat], layout: Layout, questions: Mapping[str, list[Question]]
) -> int:
    """The longest call of a debate or a student in tokens, prompt and completion, as far as models take that many.

    Args:
        raw: the run's own model.
        seats: who debates.
        layout: of later rounds, in debates and in the warm start.
        questions: by split.

    Raises:
        UsageError: a configured length is too short for what will come.
    """
    form = raw.form
    asked = [question for split in questions.values() for question in split]
    alone = max(_length(form.question(question)) for question in asked)
    gold = max(len(form.response(question.rationale)) for question in questions["warm_start"])
    answer_limit, peers = config.debate.max_tokens, max(config.debate.agents, config.warm_start.peers)
    shown = [[0] * answer_limit] * peers
    together = max(_length(form.revision(question, shown[0], shown[1:], layout=layout)) for question in asked)
    rounds = max(config.debate.rounds, config.evaluate.rounds)
    settings = replace(config.debate, agents=peers, rounds=rounds)
    models = list(dict.fromkeys(seat.model for seat in seats))
    # Another tokenizer may take more tokens for what was said; what then exceeds this room is left out, and counted.
    stretch = 2 if len({model.form.tokenizer.hash for model in models}) > 1 else 1
    longest = max(
        min(together + answer_limit, raw.config.max_positions),
        *(_longest_call(model, asked, settings, stretch) for model in models),
    )
    learned = longest_dialogue(form, config.debate) if "dialogue" in config.learned else answer_limit
    longest = max(longest, min(alone + learned, raw.config.max_positions))
    if "hinted" in config.learned:
        for model in models:
            told = max(_length(hinted(question, model.form)) for question in questions["debate"])
            longest = max(longest, min(told + answer_limit, model.config.max_positions))
    if not all(ARMS[name].generated or ARMS[name].reinforced for name in config.learned):
        learned = max(learned, *(len(form.response(question.rationale)) for question in questions["debate"]))
    room = max(longest, min(config.methods.context, raw.config.max_positions) if config.methods.chosen() else 0)
    needed = {
        "debate.max_tokens": (answer_limit, gold, "the longest gold rationale of the warm start"),
        "engine.context": (config.engine.context, room, "the longest call of a debate, a method or a student"),
        "warm_start.answer.row_length": (config.warm_start.answer.row_length, alone + gold, "an example"),
        "warm_start.revision.row_length": (config.warm_start.revision.row_length, together + gold, "an example"),
        "fit.row_length": (config.fit.row_length, alone + learned, "an example"),
    }
    for key in config.fits:
        if key in PAD_FITS:
            needed[f"{key}.row_length"] = (attrgetter(key)(config).row_length, alone + answer_limit, "an example")
    short = [
        f"{key} is {given}, but {what} can take {wanted} tokens"
        for key, (given, wanted, what) in needed.items()
        if given is not None and given < wanted
    ]
    if short:
        raise UsageError("; ".join(short) + ": raise to that.")
    return longest


def check_fits(config: RunConfig, directory: Path, judge: Path | None = None) -> None:
    """Raises UsageError for a fit that does not go with the model of a directory or with the devices here.

    Process reward models start from that of the directory `judge`, or from the same.
    """
    if config.reinforced and jax.process_count() > 1 and not config.engine.servers:
        raise UsageError(
            f"engine.servers is empty, but {jax.process_count()} processes train, and the embedded engine would hold a "
            f"policy of one of them alone: name SGLang servers, or leave {', '.join(sorted(config.reinforced))} out of "
            "arms."
        )
    for name in config.rl.rewards_chosen.coefficients if config.reinforced else ():
        if ":" in name:
            try:
                reward_function(name)
            except UsageError as error:
                raise UsageError(f"rl.rewards.{error}") from error
    for key in config.fits:
        fit: FitConfig = attrgetter(key)(config)
        place = judge if judge is not None and key.startswith("prm.") else directory
        model = load_config(place)
        if fit.row_length > model.max_positions:
            raise UsageError(
                f"{key}.row_length: {fit.row_length} tokens, but {place / 'config.json'} has "
                f"{model.max_positions} positions; shorten the rows"
            )
        try:
            trainable, frozen = partition(transformer.param_shapes(model), fit.freeze, last_layers=fit.last_layers)
            check_mesh(make_mesh(fit.mesh), model, {**trainable, **frozen}, fit.rows, fit.accumulation)
        except UsageError as error:
            raise UsageError(f"{key}.{error}") from error


def _longest_call(model: Model, asked: Sequence[Question], settings: DebateConfig, stretch: int) -> int:
    """Tokens of the longest call that a model gets in a debate, where what is quoted may take `stretch` times as many.

    Raises UsageError where one cannot fit: what debates quote they leave out, and say so, but not the rest.
    """
    form, positions = model.form, model.config.max_positions
    wordiest = max(asked, key=lambda question: _length(form.question(question)))
    shortest = longest_prompt(wordiest, form, replace(settings, max_tokens=1)) + settings.max_tokens
    if shortest > positions:
        raise UsageError(
            f"{model.directory / 'config.json'}: the model takes {positions} tokens, but a call of a debate, "
            f"without what it quotes, can take {shortest}: lower debate.max_tokens or debate.agents, ask shorter "
            "questions, or set debate.aggregation to majority."
        )
    quoted = replace(settings, max_tokens=stretch * settings.max_tokens)
    return min(max(longest_prompt(question, form, quoted) for question in asked) + settings.max_tokens, positions)


def _length(prompt: Prompt) -> int:
    return sum(len(segment) for segment in prompt)
