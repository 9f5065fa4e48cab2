"""Finding and choosing steering vectors (docs/method.md section 2)."""

from .calibrating import calibrate
from .calibration import Range, RangeRow
from .candidates import Candidates, difference_in_means
from .comparing import compare
from .comparison import Comparison
from .examples import Example, TrainingData, training_data
from .losses import ntp_loss, po_loss
from .rule import Rejection, choose
from .scores import RefusalTokens, Scores, derive_refusal_tokens
from .sweeping import Sweep, sweep
from .trained import Training
from .training import train_ntp, train_po
from .weighting import token_weights

__all__ = [
    "Candidates",
    "Comparison",
    "Example",
    "Range",
    "RangeRow",
    "RefusalTokens",
    "Rejection",
    "Scores",
    "Sweep",
    "Training",
    "TrainingData",
    "calibrate",
    "choose",
    "compare",
    "derive_refusal_tokens",
    "difference_in_means",
    "ntp_loss",
    "po_loss",
    "sweep",
    "token_weights",
    "train_ntp",
    "train_po",
    "training_data",
]
