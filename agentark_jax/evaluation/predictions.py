"""What an arm answers to a question, and what it cost: the unit that every figure is computed from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from agentark_jax.records import Label, Turn, Verdict
from agentark_jax.traces.labels import majority_vote


@dataclass(frozen=True)
class Prediction:
    """One arm's final answer to one question. Tokens and calls are summed over all turns behind it.

    `truncated` are those of the turns that were cut off at their limit.
    """

    question_id: str
    answer: str
    verdict: Verdict
    agreement: float
    prompt_tokens: int
    completion_tokens: int
    turn_keys: tuple[str, ...]
    truncated: int = 0

    @property
    def calls(self) -> int:
        return len(self.turn_keys)

    @property
    def tokens(self) -> int:
        """Read and written."""
        return self.prompt_tokens + self.completion_tokens


def predict(turns: Sequence[Turn], voters: Sequence[Turn], labels: Mapping[str, Label]) -> Prediction:
    """The majority answer of the `voters` among a question's `turns`; all turns count towards its cost.

    Args:
        turns: every turn that was spent on the question, in protocol order.
        voters: the turns whose answers are put to the vote; a single turn decides alone.
        labels: verdict and answer of each turn by key.
    """
    answer, votes = majority_vote([labels[turn.key].answer for turn in voters])
    deciding = next((turn for turn in voters if labels[turn.key].answer == answer), voters[0])
    completions = [turn.completion for turn in turns if turn.completion is not None]
    return Prediction(
        question_id=turns[0].call.question_id,
        answer=answer,
        verdict=labels[deciding.key].verdict,
        agreement=votes / len(voters),
        prompt_tokens=sum(completion.prompt_tokens for completion in completions),
        completion_tokens=sum(len(completion.ids) for completion in completions),
        turn_keys=tuple(turn.key for turn in turns),
        truncated=sum(completion.finish == "length" for completion in completions),
    )


def save_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions as JSON lines."""
    path.write_text("".join(json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in predictions))


def load_predictions(path: Path) -> list[Prediction]:
    """Read what `save_predictions` wrote."""
    records = [json.loads(line) for line in path.read_text().split("\n") if line]
    return [Prediction(**{**record, "turn_keys": tuple(record["turn_keys"])}) for record in records]
