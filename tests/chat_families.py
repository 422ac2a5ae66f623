"""Small model directories with tokenizers and chat templates built like those of four families.

The templates are written for these tests: they have each family's tokens and peculiarities, not its text.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_TEXTS = [
    "Mia has 3 apples and buys 4 more. How many apples does she have now?\n",
    "3 + 4 = 7. The answer is 7.\n\nOther agents have answered the same question.\n\n",
    "Another agent's answer:\n```\nWeigh these answers against yours, keep what is right, correct what is wrong\n```\n",
    "Check your answer step by step. The answer is wrong, the answer is 12.\n",
    "system\nuser\nassistant\nmodel\nYou are helpful. Today is 26 Jul 2024.\n\n",
] * 4
_WORDS = r"'(?:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Qwen3: thinking may be switched off by an empty thought in the prompt; earlier thoughts are dropped, and an answer
# that is the last message gets a thought, if only an empty one.
_QWEN3 = r"""
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set asked = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set asked.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages if message.role != 'system' %}
    {%- set parts = message.content.split('</think>') %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- if messages.index(message) > asked.last %}
            {%- set thought = parts[0].split('<think>')[-1] if parts|length > 1 else '' %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + parts[-1].lstrip('\n') }}
        {%- else %}
            {{- parts[-1].lstrip('\n') if parts|length > 1 else message.content }}
        {%- endif %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

# Qwen2.5: its own system message where none is given.
_QWEN25 = r"""
{%- set given = messages and messages[0]['role'] == 'system' %}
{{- '<|im_start|>system\n' ~ (messages[0]['content'] if given else 'You are helpful.') ~ '<|im_end|>\n' }}
{%- for message in (messages[1:] if given else messages) %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Llama 3: a system message with today's date, headers, trimmed texts, no line break after the end of turn.
_LLAMA3 = r"""
{{- bos_token }}
{%- macro header(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{% endmacro %}
{%- set today = date_string if date_string is defined else strftime_now('%d %b %Y') %}
{%- set given = messages[0].role == 'system' %}
{{- header('system') + 'Today is ' + today + '.\n\n' }}
{{- (messages[0].content | trim if given else '') + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {{- header(message.role) + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}"""

# Gemma 3: no system role (its text goes in front of the first question), strict turns, the assistant is the model.
_GEMMA3 = r"""{{ bos_token }}
{%- set first = '' %}
{%- if messages[0].role == 'system' %}
    {%- set first = messages[0].content + '\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != ['user', 'assistant'][loop.index0 % 2] %}
        {{- raise_exception('user and assistant take turns') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\n' }}
    {{- (first if loop.first else '') + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")

# template, special tokens, other added tokens, named tokens, all that end a completion by the generation config
FAMILIES = {
    "qwen3": (_QWEN3, _QWEN_TOKENS, ("<think>", "</think>"), {"eos": "<|im_end|>"}, ("<|im_end|>", "<|endoftext|>")),
    "qwen2.5": (_QWEN25, _QWEN_TOKENS, (), {"eos": "<|im_end|>", "pad": "<|endoftext|>"}, ("<|endoftext|>",)),
    "llama3": (_LLAMA3, _LLAMA_TOKENS, (), {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"}, ("<|eot_id|>",)),
    "gemma3": (_GEMMA3, _GEMMA_TOKENS, ("\n\n",), {"bos": "<bos>", "eos": "<eos>"}, ("<eos>", "<end_of_turn>")),
}


def write_family(name: str, directory: Path, texts: Sequence[str] = _TEXTS, vocabulary: int = 420) -> Path:
    """A model directory of a family, without weights; the template is in a file of its own or in the config.

    The tokenizer is trained on `texts`, to about so many tokens.
    """
    template, special, added, named, ends = FAMILIES[name]
    directory.mkdir(parents=True)
    tokenizer = (_gemma_like if name == "gemma3" else _byte_level)(special, texts, vocabulary)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{role}_token": token for role, token in named.items()}
    if name in ("qwen3", "gemma3"):
        (directory / "chat_template.jinja").write_text(template)
        config["chat_template"] = "the file is the one that counts"
    elif name == "llama3":
        config["chat_template"] = [{"name": "tools", "template": "?"}, {"name": "default", "template": template}]
    else:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    ids = [tokenizer.token_to_id(token) for token in ends]
    generation = {"eos_token_id": ids if len(ids) > 1 else ids[0]}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def write_tokens(strings: list[str], decoder: decoders.Decoder | None, directory: Path) -> Path:
    """A directory with a tokenizer alone, whose ids 0, 1, … are spelled like this; then comes a control token."""
    directory.mkdir()
    tokenizer = Tokenizer(models.WordLevel({text: index for index, text in enumerate(strings)}, unk_token=strings[0]))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return directory


def _byte_level(special: tuple[str, ...], texts: Sequence[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def _gemma_like(special: tuple[str, ...], texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Spaces are ordinary characters, so tokens run across words and line breaks; unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary + 100, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator((text.replace(" ", "▁") for text in texts), trainer)
    # The bytes are no control tokens: keep the trained vocabulary, mark the family's own tokens alone.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(content))
