"""Errors a user can act on: each names the thing, what was found and expected, the remedy."""


class VlmflowError(Exception):
    """Base of every error that is the user's to mend; printed without a traceback."""


class RecipeError(VlmflowError):
    """A recipe does not load; the message lists every fault with its line."""


class MissingExtraError(VlmflowError):
    """A package that only an extra brings is not installed; the message names the extra."""


class ArtifactError(VlmflowError):
    """An artifact is missing, damaged, or held by another process."""


class DataError(VlmflowError):
    """A data source yields no usable sample, or more bad ones than the recipe tolerates."""


class WeightError(VlmflowError):
    """Checkpoint tensors are missing, unexpected, mis-shaped or mis-typed; all are listed."""


class ProofError(VlmflowError):
    """A measured proof (swap, precision, reload) failed; the message holds the figures."""


class ProcessError(VlmflowError):
    """A child process failed; the message carries the end of its output."""


class ServeError(VlmflowError):
    """The model server did not come up, died, or answers for another model."""


class TrainError(VlmflowError):
    """A training stage cannot start or went wrong: nothing trainable, NaN loss, wrong layout."""


class EvaluationError(VlmflowError):
    """A benchmark did not produce a score for every sample."""


class GateError(VlmflowError):
    """A score misses a gate of the recipe."""
