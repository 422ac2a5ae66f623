"""The two ways a command ends badly, and what may be said of it.

Every message names the file, the key and the fix; the command line prints it without a traceback. Messages quote what
others wrote (servers, models, files), and are kept: in the trace store, in logs. So none holds a secret, or a character
that a terminal would obey.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

# Escape sequences whole, then every other control character but line feed and tab, marks that reorder text, and what
# cannot be printed.
_CONTROLS = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
    re.DOTALL,
)
# Who names a user in an address, or gives a key with it; then keys by the shapes that their issuers give them.
_SECRETS = re.compile(
    r"(?<=://)[^\s/@?#]{1,400}(?=@)"
    r"|(?<=[?&])(?P<name>[\w-]{0,40}(?:key|token|secret|password|signature|credential)=)[^\s&#'\"]{1,4000}"
    r"|(?P<scheme>\bBearer )[^\s'\"]{8,4000}"
    r"|\b(?:hf_|gh[pousr]_)[A-Z0-9]{20,400}|\b(?:sk-|xox[bp]-)[\w-]{20,400}|\bAKIA[A-Z0-9]{16}\b",
    re.I,
)
_VARIABLE = re.compile(r"(?:\A|_)(?:TOKEN|KEY|SECRET|PASSWORD)\Z")
_SHORTEST = 8  # characters of an environment variable that is taken for a secret
SECRET = "[secret]"


def plain(text: str) -> str:
    """A text that others wrote, without what a terminal would obey."""
    return _CONTROLS.sub("", text)


def redacted(text: str) -> str:
    """A text without secrets.

    They are users and keys in addresses, keys known by their shape, and the values of environment variables whose names
    end in TOKEN, KEY, SECRET or PASSWORD.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _VARIABLE.search(name):
            text = text.replace(value, SECRET)
    return _SECRETS.sub(lambda found: (found["name"] or found["scheme"] or "") + SECRET, text)


class AgentArkError(Exception):
    """Something went wrong while running: a corrupted file, a full disk, a server that is gone (exit code 1)."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(redacted(plain(str(message))))


class UsageError(AgentArkError):
    """What the user asked for cannot be done as written: a config key, a value, an input file (exit code 2)."""

    exit_code = 2


def require(holds: bool, key: str, value: object, wanted: str) -> None:
    """Raises UsageError for the value of a key that is not what is wanted."""
    if not holds:
        raise UsageError(f"{key}: {value!r} is not possible; it must be {wanted}")


@contextmanager
def memory_for(what: str, fix: str) -> Iterator[None]:
    """Where the block runs out of memory, on a device or on the host, the error says what to change.

    Raises AgentArkError in the place of what XLA and NumPy raise then; everything else goes on as it is.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = next(iter(str(error).splitlines()), "")[:300]
        raise AgentArkError(f"{what}: out of memory ({line or type(error).__name__}). {fix}") from error
