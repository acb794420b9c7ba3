"""Errors a user meets.

Each message says what is wrong, the value seen, what is accepted, what to do.
"""


class InputError(ValueError):
    """An image, a label list or another argument that cannot be used."""


class DataError(RuntimeError):
    """Data on disk that is missing or damaged."""


class ConfigError(ValueError):
    """A recipe with an unknown key or a value of the wrong kind."""


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, incomplete or belongs to another model."""


class ProcessError(RuntimeError):
    """Another process of the same run that did not come, has ended or does not answer."""


class WeightsError(InputError):
    """Weights that can be had neither from the cache nor from the network.

    Attributes:
        why: the reason alone, without the ways on.
    """

    why: str = ""


class NotFinite(CheckpointError, ValueError):
    """Weights that hold NaN or an infinity, told by what a model makes of them."""


class NoData(DataError, InputError):
    """Data that are not where they were said to be."""


class NoCheckpoint(CheckpointError, InputError):
    """A checkpoint that is not where it was said to be."""


# What torch, transformers and numpy advise where a file holds code: to run it.
_ADVICE = ("weights_only", "trust_remote_code", "allow_pickle", "unsafely")


def first_line(error: BaseException) -> str:
    """Return what an error says in one line; its kind where it says nothing.

    YAML's errors draw the place over several lines; of them it is the problem and where it is.
    Advice to run code that came with a file is not passed on.
    """
    problem = getattr(error, "problem", None)
    mark = getattr(error, "problem_mark", None)
    if isinstance(problem, str) and mark is not None:
        return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(problem.split())}"
    text = str(error).strip()
    if any(word in text for word in _ADVICE):
        return "it holds code, which is not run"
    return (text or type(error).__name__).splitlines()[0]
