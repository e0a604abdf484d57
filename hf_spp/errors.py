"""Every error of hf_spp. Each says what was given, where, what is accepted and what to do."""


class SPPError(Exception):
    """Base class of every error that hf_spp raises on purpose."""


class SPPConfigError(SPPError, ValueError):
    """A configuration value is not accepted: an unknown metric, empty axes, a tolerance below zero."""


class UnsupportedArchitectureError(SPPError, ValueError):
    """No channel group could be found in the model."""


class IllegalAxisError(SPPError, ValueError):
    """A configured axis may not move in this model, or is unknown."""


class UnsupportedModelError(SPPError, TypeError):
    """The model's weights cannot be reordered as they are: quantized, on the meta device, or no module at all."""


class NonFiniteWeightsError(SPPError, ValueError):
    """A weight holds NaN or infinity, so saliency has no order."""


class CalibrationError(SPPError, ValueError):
    """A metric needs calibration data and got none, or data that the model cannot run on."""


class ExampleInputsError(SPPError, ValueError):
    """The proof of equal function has no inputs: none were given and none could be built from the config."""


class EqualFunctionError(SPPError, RuntimeError):
    """The reordered model computed something else; the model was restored bit for bit."""


class OrdersError(SPPError, ValueError):
    """Stored orders are no permutations, or belong to another model."""


class CheckpointError(SPPError, OSError):
    """A file of a checkpoint is missing, damaged, or written by a newer version."""


class HubError(SPPError, OSError):
    """The Hugging Face Hub could not be reached, or refused."""


class AssetError(SPPError, OSError):
    """A pinned model or data set of the demo could not be fetched, or its checksum is wrong."""


class CardError(SPPError, ValueError):
    """A model card, or a result row that goes into it, is malformed."""


class DatasetError(SPPError, ValueError):
    """A data set lacks a split or a column that the task needs."""


class CallbackError(SPPError, RuntimeError):
    """`SPPCallback` was used in a way that would lose or repeat a reordering."""


class OptimizerError(SPPError, ValueError):
    """An optimizer's state cannot move with the channels of the weights; nothing was moved."""


class AdapterError(SPPError, ValueError):
    """An adapter does not belong to the model of the orders, or its weights cannot be carried over."""


class RanksDisagreeError(SPPError, RuntimeError):
    """The processes of a run would have reordered the model in different ways; nothing was moved."""


class SubnetworkError(SPPError, ValueError):
    """A sub-network cannot be cut as asked: a width that the model does not have, a budget that is too small."""


class AppError(SPPError, RuntimeError):
    """The page of a checkpoint cannot be shown, or cannot answer what it was asked."""
