"""The one exception that a user is meant to see."""


class MegamupError(ValueError):
    """An error in what the user gave: its message says key, value, what was expected and what to do."""


class OneRankError(MegamupError):
    """A `MegamupError` that only some ranks may meet, so each that does says so."""
