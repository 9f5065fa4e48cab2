"""Finding and choosing steering vectors (method.md section 2)."""

from .candidates import Candidates, difference_in_means
from .losses import ntp_loss, po_loss
from .rule import Rejection, choose
from .scores import RefusalTokens, Scores, derive_refusal_tokens
from .sweeping import Sweep, sweep

__all__ = ["Candidates", "RefusalTokens", "Rejection", "Scores", "Sweep", "choose", "derive_refusal_tokens", "difference_in_means", "ntp_loss", "po_loss", "sweep"]
