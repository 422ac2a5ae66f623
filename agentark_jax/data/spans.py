"""Which characters of a completion each of its tokens has a part in, without encoding or decoding anything twice."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from agentark_jax.data.tokenizer import Tokenizer

# One character of UTF-8, or as much of one as there is before it goes wrong: what decoding replaces by one U+FFFD
# (Unicode, table 3-7 and "maximal subpart"). Anything else is a wrong byte by itself.
_CHARACTER = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]?"
    rb"|(?:\xe0[\xa0-\xbf]|\xed[\x80-\x9f]|[\xe1-\xec\xee\xef][\x80-\xbf])[\x80-\xbf]?"
    rb"|(?:\xf0[\x90-\xbf]|[\xf1-\xf3][\x80-\xbf]|\xf4[\x80-\x8f])[\x80-\xbf]{0,2}"
    rb"|[\x00-\xff]"
)


class Spans(NamedTuple):
    """The text of T tokens, and for each the characters `text[starts[t]:ends[t]]` that it has a part in.

    A character whose bytes are in several tokens is in the span of each of them; other spans do not overlap, and none
    leaves a gap. A token without text (a control token) has an empty span where the text goes on after it. `starts` [T]
    never falls.
    """

    text: str
    starts: np.ndarray
    ends: np.ndarray


def spans(ids: Sequence[int], tokenizer: Tokenizer) -> Spans:
    """The characters of `tokenizer.decode(ids)` by token, in time linear in its bytes (see `Tokenizer.pieces`)."""
    pieces = tokenizer.pieces(ids)
    content = b"".join(pieces)
    first_bytes = np.fromiter((found.start() for found in _CHARACTER.finditer(content)), np.int64)
    lengths = np.asarray([len(piece) for piece in pieces], np.int64)
    end_bytes = np.cumsum(lengths)
    start_bytes = end_bytes - lengths
    # A byte is of the last character that begins at it or before; where no byte is left, the text has come to its end.
    starts = np.searchsorted(first_bytes, start_bytes, side="right") - (start_bytes < len(content))
    ends = np.where(lengths > 0, np.searchsorted(first_bytes, end_bytes, side="left"), starts)
    return Spans(content.decode(errors="replace"), starts, ends)
