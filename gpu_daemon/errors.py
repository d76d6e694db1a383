"""What can go wrong in the daemon. server.py maps each to a gRPC status, once."""


class DaemonError(Exception):
    """Base. The text is for operators; it never reaches a client."""


class InvalidCommand(DaemonError):
    """A command that can never succeed as sent."""


class InvalidGrammar(InvalidCommand):
    """A grammar that cannot be compiled here, or that a choice's tokens do not follow."""


class InvalidPicture(InvalidCommand):
    """A picture that cannot be decoded, or is beyond what is decoded here."""


class ModelNotReady(DaemonError):
    """The model is not loaded here."""


class LoadFailed(DaemonError):
    """The model's files are missing, damaged or too large."""


class StaleEpoch(DaemonError):
    """The caller believes in another epoch of this daemon."""


class Draining(DaemonError):
    """New work is refused: the daemon is on its way out."""
