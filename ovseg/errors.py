"""Errors a user meets. Each message says what is wrong, the value seen, what is accepted, what to do."""


class InputError(ValueError):
    """An image, a label list or another argument that cannot be used."""


class DataError(RuntimeError):
    """Data on disk that is missing or damaged."""


class ConfigError(ValueError):
    """A recipe with an unknown key or a value of the wrong kind."""


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, incomplete or belongs to another model."""


class WeightsError(InputError):
    """Weights that can be had neither from the cache nor from the network."""


class NotFinite(CheckpointError, ValueError):
    """Weights that hold NaN or an infinity, told by what a model makes of them."""


class NoData(DataError, InputError):
    """Data that are not where they were said to be."""


class NoCheckpoint(CheckpointError, InputError):
    """A checkpoint that is not where it was said to be."""


def first_line(error: BaseException) -> str:
    """Of its text; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
