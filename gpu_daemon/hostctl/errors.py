"""What hostctl answers when it does not do what it was asked."""


class Refused(Exception):
    """Never started: the words are no command, the epoch is of the past, or the configuration is wrong. Exit status 2."""


class Failed(Exception):
    """Tried, and undone. Exit status 1."""
