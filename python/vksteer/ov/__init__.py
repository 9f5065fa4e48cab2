"""The OV circuit under steering (docs/method.md section 7): what steering adds to every head, which
tokens that promotes, and the weights behind it.
"""

from .attention_change import Rerouted, Rerouting, rerouting
from .decomposition import Decomposition, DirectShares, decompose, direct_shares
from .direct import Attribution, direct_logit_attribution
from .lens import Hit, Lens, logit_lens
from .value_vectors import SteeringValueVectors, steering_value_vectors
from .weights import Factored, HeadWeights, head_weights, singular_lens

__all__ = [
    "Attribution",
    "Decomposition",
    "DirectShares",
    "Factored",
    "HeadWeights",
    "Hit",
    "Lens",
    "Rerouted",
    "Rerouting",
    "SteeringValueVectors",
    "decompose",
    "direct_logit_attribution",
    "direct_shares",
    "head_weights",
    "logit_lens",
    "rerouting",
    "singular_lens",
    "steering_value_vectors",
]
