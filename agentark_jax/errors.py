"""The two ways a command ends badly.

Every message names the file, the key and the fix; the command line prints it without a traceback.
"""


class AgentArkError(Exception):
    """Something went wrong while running: a corrupted file, a full disk, a server that is gone (exit code 1)."""

    exit_code = 1


class UsageError(AgentArkError):
    """What the user asked for cannot be done as written: a config key, a value, an input file (exit code 2)."""

    exit_code = 2


def require(holds: bool, key: str, value: object, wanted: str) -> None:
    """Raises UsageError for the value of a key that is not what is wanted."""
    if not holds:
        raise UsageError(f"{key}: {value!r} is not possible; it must be {wanted}")
