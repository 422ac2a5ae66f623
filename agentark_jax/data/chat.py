"""Prompts in a model's own chat format: its template writes the text, sampled ids stand in it verbatim.

A later round is a conversation: the question, the agent's own answers as the assistant's messages, each followed by a
message that asks again; the last of these tells the peers' last answers. The template is rendered with a mark in the
place of every earlier completion; the text between marks is encoded piece by piece and the completions' ids go in
between. A prompt without earlier completions is one piece, so its ids are those of the template applied whole. At a cut
they are so by choice: where the tokenizer would have merged characters on both sides of it (a completion's last letter
with the line break after it), the whole text encodes to other ids, but the model said the ones that stand here.
"""

import json
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from agentark_jax.data.config import PromptConfig
from agentark_jax.data.render import OWN_FIRST, Format, Layout, Part, PlainFormat, Prompt, Segment, without
from agentark_jax.data.template import ChatTemplate, Message, find_template
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.errors import UsageError
from agentark_jax.records import Question, stable_hash

_THINK_END = "</think>"
# Stands for a completion while the template is rendered: private-use characters, which no template trims or changes.
_MARK = "\ue0ff{}\ue0fe"
# Stands for a text by others that spells a control token or a mark, so that it takes no part in ours.
_HIDDEN = re.compile("\ue0fd([0-9a-f]*)\ue0fe")
_MARKS = frozenset("\ue0fd\ue0fe\ue0ff")


class ChatFormat:
    """The format of a model with a chat template.

    The end of turn is what the template closes an assistant's message with; it ends a completion, belongs to its loss,
    and closes an earlier answer exactly once, however that one ended. Where the template drops the thinking of earlier
    answers (Qwen3), it is dropped here too, on ids, and peers do not see each other's.

    Args:
        end_ids: further ids that end a completion (`eos_token_id` of the generation config).
        system: the system message; a template without that role (Gemma) gets it in front of the first question.

    Raises:
        UsageError: a template that fails, that cannot open an answer, or that never ends one.
    """

    PEERS = "Other agents have answered the same question."
    PEER = "\n\nAnother agent's answer:\n```\n{answer}\n```"
    REVISE = (
        "\n\nWeigh these answers against yours, keep what is right, correct what is wrong, and answer the question "
        "again:\n{question}"
    )
    ALONE = "Check your answer step by step, correct what is wrong, and answer the question again:\n{question}"
    NAMED = "\n\nAgent {number}'s answer:\n```\n{answer}\n```"
    LISTED = "\n\nAnswer {number}:\n```\n{answer}\n```"
    EARLIER = "\n\nYour earlier answer:\n```\n{answer}\n```"
    YOU_ARE = "You are agent {number}. "
    SHARED = "{question}\n\nSeveral agents have answered this question, you among them."
    YOURS = "\n\nAnswer {number} is yours."
    YOU_AMONG = "\n\nYou are agent {number}."
    telling = ("\n\nMy next answer:\n", "\n\nAnother answer:\n", "\n\nBetter answer:\n")

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, *, end_ids: Sequence[int] = (), system: str = ""):
        self.tokenizer = tokenizer
        self._template = template
        self._system = system
        if template.render([_user("?")], reply=True) == template.render([_user("?")], reply=False):
            raise UsageError(
                f"{template.where}: knows no add_generation_prompt, so it cannot open an answer. "
                "Add it to the template, or set prompt.format to plain."
            )
        self._end = self._end_of_turn({tokenizer.eos_id, *end_ids})
        self.stop_ids = tuple(dict.fromkeys([self._end, tokenizer.eos_id, *end_ids]))
        self._think_end = self._end_of_thinking()
        self._folds = bool(system) and not self._knows_system()
        texts = [self.PEERS, self.PEER, self.REVISE, self.ALONE]
        self.hash = stable_hash(["chat", template.hash, system, texts, self.stop_ids, tokenizer.hash])

    def question(self, question: Question) -> Prompt:
        return self._spoken(self._asked(self._hidden(question.prompt)), [])

    def revision(
        self,
        question: Question,
        own: Sequence[int],
        peers: Sequence[Sequence[int]],
        *,
        earlier: Sequence[Sequence[int]] = (),
        layout: Layout = OWN_FIRST,
    ) -> Prompt:
        numbers = layout.numbers(1 + len(peers))
        asked, prompt = self._hidden(question.asked), self._hidden(question.prompt)
        revise = self.REVISE.format(question=asked)
        if layout.shared_first and peers:
            listed, mine = layout.listed([own, *peers])
            title, whose = (self.NAMED, self.YOU_AMONG) if layout.named else (self.LISTED, self.YOURS)
            told = [title.format(number=number, answer=_MARK.format(place)) for place, (number, _) in enumerate(listed)]
            told += [self.EARLIER.format(answer=_MARK.format(len(listed) + place)) for place in range(len(earlier))]
            told = [self.SHARED.format(question=prompt), *told, whose.format(number=mine), revise]
            return self._spoken(self._asked("".join(told)), [*(ids for _, ids in listed), *earlier])
        owns = [*earlier, own]
        alone = self.ALONE.format(question=asked)
        messages = self._asked(prompt)
        for place in range(len(owns)):
            messages += [_assistant(_MARK.format(place)), _user(alone)]
        if peers:
            title = self.NAMED if layout.named else self.PEER
            told = [self.YOU_ARE.format(number=numbers[0]) if layout.named else "", self.PEERS]
            told += [
                title.format(number=number, answer=_MARK.format(len(owns) + place))
                for place, number in enumerate(numbers[1:])
            ]
            messages[-1] = _user("".join([*told, revise]))
        return self._spoken(messages, [*owns, *peers])

    def reply(self, question: Question, own: Sequence[int], text: str) -> Prompt:
        asked = self._asked(self._hidden(question.prompt))
        messages = [*asked, _assistant(_MARK.format(0)), _user(self._hidden(text))]
        return self._spoken(messages, [own])

    def instruction(self, parts: Sequence[Part]) -> Prompt:
        said = [part for part in parts if not isinstance(part, str)]
        marks = map(_MARK.format, range(len(said)))
        text = "".join(self._hidden(part) if isinstance(part, str) else next(marks) for part in parts)
        return self._spoken(self._asked(text), said)

    def shown(self, completion: Sequence[int]) -> Segment:
        """As in `Format`: without its end and, where the template drops it, its thinking."""
        ids = without(completion, self.stop_ids)
        if self._think_end not in ids:
            return ids
        start = len(ids) - ids[::-1].index(self._think_end)
        while start < len(ids) and self._is_line_break(ids[start]):
            start += 1
        return ids[start:]

    def response(self, text: str) -> Segment:
        """As in `Format`. The template may put something before the answer: Qwen3 an empty thought, if it may think.

        Raises UsageError where the template writes an answer otherwise than after the prompt it opens one with.
        """
        asked = [_user("?")]
        prompt = self._template.render(asked, reply=True)
        answered = self._template.render([*asked, _assistant(self._hidden(text))], reply=False)
        if not answered.startswith(prompt):
            raise UsageError(
                f"{self._template.where}: writes an answer otherwise than it opens one, so a written answer cannot "
                "follow a prompt. Set prompt.thinking to the mode the template writes answers for, or prompt.format to "
                "plain."
            )
        ids = self._encoded(answered.removeprefix(prompt))
        return ids[: len(ids) - ids[::-1].index(self._end)]

    def _asked(self, text: str) -> list[Message]:
        if self._folds:
            return [_user(f"{self._system}\n\n{text}")]
        return [*([_system(self._system)] if self._system else []), _user(text)]

    def _spoken(self, messages: Sequence[Message], completions: Sequence[Sequence[int]]) -> Prompt:
        """The prompt of a conversation in which marks, numbered from 0, stand for the completions."""
        text = self._template.render(messages, reply=True)
        segments: list[Segment] = []
        for place, ids in enumerate(completions):
            before, _, text = self._cut(text, _MARK.format(place))
            segments += [self._encoded(before), self.shown(ids)]
        return (*segments, self._encoded(text))

    def _hidden(self, text: str) -> str:
        """A text by others as it may stand in a message: itself, unless it could be taken for something of ours."""
        if self.tokenizer.spells_control(text) or not _MARKS.isdisjoint(text):
            return f"\ue0fd{text.encode().hex()}\ue0fe"
        return text

    def _encoded(self, text: str) -> Segment:
        """A part of a rendered conversation."""
        ids: Segment = ()
        encode, encode_text = self.tokenizer.encode, self.tokenizer.encode_text
        for place, part in enumerate(_HIDDEN.split(text)):
            ids += encode_text(bytes.fromhex(part).decode()) if place % 2 else encode(part)
        return ids

    def _cut(self, text: str, mark: str) -> tuple[str, str, str]:
        if text.count(mark) != 1:
            raise UsageError(
                f"{self._template.where}: writes a message {text.count(mark)} times, not once. Repair the template, or "
                "set prompt.format to plain."
            )
        return text.partition(mark)

    def _is_line_break(self, token: int) -> bool:
        text = self.tokenizer.decode([token])
        return text != "" and text.strip("\n") == ""

    # What the template does, found out by asking it

    def _end_of_turn(self, known: set[int]) -> int:
        mark = _MARK.format(0)
        text = self._template.render([_user("?"), _assistant(mark)], reply=False)
        for token in self.tokenizer.encode(self._cut(text, mark)[2]):
            if token in known or self.tokenizer.is_special(token):
                return token
        raise UsageError(
            f"{self._template.where}: closes an answer with no special token, so a completion could never end. "
            "Add one to the template, or set prompt.format to plain."
        )

    def _end_of_thinking(self) -> int | None:
        thought = _MARK.format(0)
        earlier = _assistant(f"<think>\n{thought}\n{_THINK_END}\n\n?")
        if thought in self._template.render([_user("?"), earlier, _user("?")], reply=True):
            return None
        token = self.tokenizer.token_id(_THINK_END)
        if token is None:
            raise UsageError(
                f"{self._template.where}: drops earlier thinking, which cannot be done on token ids, because "
                f"{_THINK_END} is no token of tokenizer.json. Add the token, or set prompt.format to plain."
            )
        return token

    def _knows_system(self) -> bool:
        mark = _MARK.format(0)
        try:
            return mark in self._template.render([_system(mark), _user("?")], reply=True)
        except UsageError:  # Gemma 1 and 2 refuse the role
            return False


def make_format(directory: Path, config: PromptConfig, *, embeddings: int | None = None) -> Format:
    """The format of a model directory: its own chat template or the plain one, as the config says.

    `embeddings`, the rows of the model's embedding, is compared with the tokenizer (`Tokenizer`).

    Raises:
        UsageError: a broken tokenizer or template, or `prompt.format: chat` where there is no template.
    """
    tokenizer = Tokenizer(directory, embeddings)
    found = find_template(directory)
    if config.format == "chat" and found is None:
        raise UsageError(
            f"{directory}: prompt.format is chat, but there is neither a chat_template.jinja nor a chat_template in "
            "tokenizer_config.json. Put the model's template there, or set prompt.format to plain."
        )
    if config.format == "plain" or found is None:
        if config.system:
            raise UsageError(
                f"{directory}: has no chat template, and the plain format has no system message: leave prompt.system "
                "empty."
            )
        return PlainFormat(tokenizer)
    where, source = found
    variables = {**tokenizer.special_tokens, "enable_thinking": config.thinking}
    template = ChatTemplate(source, where, variables, date.fromisoformat(config.date))
    return ChatFormat(tokenizer, template, end_ids=_end_ids(directory, tokenizer), system=config.system)


def _end_ids(directory: Path, tokenizer: Tokenizer) -> list[int]:
    """`eos_token_id` of the generation config: one, several or none."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: not valid JSON ({error}).") from error
    ids: list[int] = [] if found is None else found if isinstance(found, list) else [found]
    strange = [token for token in ids if not tokenizer.has(token)]
    if strange:
        raise UsageError(f"{path}: eos_token_id names {strange}, which tokenizer.json does not contain. Correct it.")
    return ids


def _system(content: str) -> Message:
    return {"role": "system", "content": content}


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
