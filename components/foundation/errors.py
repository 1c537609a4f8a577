"""Every error that saferlhf raises on purpose.

    SaferlhfError
    +-- SettingsError        a setting is unknown, malformed or out of range
    +-- DataError            a data file is missing, unreadable, or holds too many bad records
    +-- ModelError           a model folder, tokenizer or adapter cannot be used
    +-- StoreError           the S3 store cannot be reached or breaks its promises
    |   +-- IntegrityError   an object is missing, truncated, or its digest differs
    |   |   +-- MissingError there is no such object
    |   +-- ConflictError    somebody else has already written what we wanted to write
    |   +-- StoreUnavailableError  the store does not answer, or says that it cannot now
    +-- TrackingError        the MLflow server cannot be reached or refuses a call
    |   +-- TrackingUnavailableError  the server does not answer
    +-- AnnotationError      an annotator failed, or too few of its replies were usable
    +-- LabelsAwaited        no failure: people have not labelled everything yet
    +-- NothingNew           no failure: too few new preference pairs since the champion's
    +-- TrainingError        training cannot start or must stop
    |   +-- GateError        a model is not good enough for the next stage to stand on
    |   +-- ConstraintError  the cost threshold is inert or impossible
    |   +-- DivergenceError  a loss, gradient, score or KL divergence is out of hand
    |   +-- OutOfMemoryError this machine's or a GPU's memory is too small for the stage
    +-- ServiceError         a local server (S3, MLflow) did not start
    |   +-- RolloutError     the rollout server did not start, died, or answered nonsense
    +-- ClusterError         Kubernetes or Kubeflow cannot be reached, or refuses a call
        +-- ClusterUnavailableError  it does not answer, or says that it cannot now
        +-- JobConflictError there is a TrainJob of our name that is not ours
        +-- JobDeletedError  somebody else deleted the TrainJob
        +-- JobFailedError   the TrainJob ended as Failed, or was preempted too often

A message says what is wrong, with the value, and what to do. The command line
prints the message alone, without a traceback, and exits with status 1 (75 where labels are awaited, 3 where nothing is
new).
"""


class SaferlhfError(Exception):
    """Base of all errors that have an explanation for the user."""


class SettingsError(SaferlhfError):
    """A setting is unknown, malformed or out of range."""


class DataError(SaferlhfError):
    """A data file is missing, unreadable, or holds too many bad records."""


class ModelError(SaferlhfError):
    """A model folder, tokenizer or adapter cannot be used."""


class StoreError(SaferlhfError):
    """The S3 store cannot be reached or breaks its promises."""


class IntegrityError(StoreError):
    """An object is missing, truncated, or its digest differs from the manifest."""


class MissingError(IntegrityError):
    """There is no such object."""


class ConflictError(StoreError):
    """Somebody else has already written what we wanted to write."""


class StoreUnavailableError(StoreError):
    """The store does not answer, or says that it cannot now; asking again may help."""


class TrackingError(SaferlhfError):
    """The MLflow server cannot be reached or refuses a call."""


class TrackingUnavailableError(TrackingError):
    """The MLflow server does not answer; asking again may help."""


class AnnotationError(SaferlhfError):
    """An annotator failed, or too few of its replies were usable."""


class LabelsAwaited(SaferlhfError):
    """No failure: the run stands still until people have labelled what is missing; it goes on when started again."""


class NothingNew(SaferlhfError):
    """No failure: a run ends early, for it has too few preference pairs that the champion's run did not have."""


class TrainingError(SaferlhfError):
    """Training cannot start or must stop."""


class GateError(TrainingError):
    """A model is not good enough for the next stage to stand on."""


class ConstraintError(TrainingError):
    """The cost threshold is inert (every policy meets it) or impossible (none can)."""


class DivergenceError(TrainingError):
    """A loss, a gradient or a score is not finite, or the policy has left its reference far behind."""


class OutOfMemoryError(TrainingError):
    """The memory of this machine, or of a GPU, is too small for the stage; the next attempt would end alike."""


class ServiceError(SaferlhfError):
    """A local server did not start or did not become healthy."""


class RolloutError(ServiceError):
    """The rollout server did not start, died, did not answer in time, or answered nonsense."""


class ClusterError(SaferlhfError):
    """Kubernetes or Kubeflow cannot be reached, or refuses a call."""


class ClusterUnavailableError(ClusterError):
    """Kubeflow does not answer, or says that it cannot now; asking again may help."""


class JobConflictError(ClusterError):
    """There is a TrainJob of our name that is not ours."""


class JobDeletedError(ClusterError):
    """Somebody else deleted the TrainJob that a step was following."""


class JobFailedError(ClusterError):
    """The TrainJob ended as Failed, or was preempted too often; the message has its log's end and its events."""
