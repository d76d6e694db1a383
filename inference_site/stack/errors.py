"""The one error of starting the stack."""


class StackError(Exception):
    """One line for people: what is wrong, and what to do."""
