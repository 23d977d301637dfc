"""What a script says instead of a traceback when only its user can go on."""


class UsageError(Exception):
    """Something only the user can mend. The message is one line: what is wrong, with which value, what to do."""

    exit_code = 2
