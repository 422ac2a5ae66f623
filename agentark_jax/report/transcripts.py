"""Debates for the page's browser: compact JSON, compressed, so that 10,000 answers of usual length take 2 MB.

The page's script decompresses them. Base64 has no character that an HTML parser reacts to, so what a model wrote cannot
leave its element.
"""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any

from agentark_jax.report import words

PACKED_BYTES = 6_000_000  # of transcripts in the page, so that it stays below 10 MB
PLAIN_BYTES = 24_000_000  # of them when decompressed, so that it opens at once
_TURN_KEYS = ("agent", "text", "answer", "verdict", "flip", "tokens")


def pack(results: Mapping[str, Any], transcripts: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """(base64 of gzipped JSON, how many of `transcripts` are in it): as many of the first ones as the limits allow."""
    labels = {arm: words.arm_label(results, arm) for arm in results["arms"]}
    head, used, items = f'{{"arms":{_json(labels)},"items":[', 0, []
    for transcript in transcripts:
        item = _json(_compact(transcript))
        used += len(item.encode()) + 1
        if used > PLAIN_BYTES:
            break
        items.append(item)
    while True:
        plain = f"{head}{','.join(items)}]}}"
        packed = base64.b64encode(gzip.compress(plain.encode(), mtime=0)).decode()
        if len(packed) <= PACKED_BYTES or not items:
            return packed, len(items)
        # All have to do with about as much room: the share that fits, and a little less.
        items = items[: int(len(items) * 0.97 * PACKED_BYTES / len(packed))]


def _compact(transcript: Mapping[str, Any]) -> dict[str, Any]:
    """A transcript with turns as lists in the order of `_TURN_KEYS`, which halves the overhead of short turns."""
    item = {key: value for key, value in transcript.items() if key != "rounds"}
    return item | {"rounds": [[[turn[key] for key in _TURN_KEYS] for turn in turns] for turns in transcript["rounds"]]}


def _json(value: Any) -> str:
    return words.clean(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True))
