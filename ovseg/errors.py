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


class NoData(DataError, InputError):
    """Data that are not where they were said to be."""


class NoCheckpoint(CheckpointError, InputError):
    """A checkpoint that is not where it was said to be."""


def first_line(error: BaseException) -> str:
    """Return what an error says in one line: the first of its text, or its kind where it says nothing.

    YAML's errors draw the place over several lines; of them the problem and where it is, "line 3, column 7: expected ...".
    """
    problem = getattr(error, "problem", None)
    mark = getattr(error, "problem_mark", None)
    if isinstance(problem, str) and mark is not None:
        return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(problem.split())}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
