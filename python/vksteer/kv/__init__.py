"""Cache steering: a vector for every layer's keys and values, added to one entry of a prompt's
cache, once (docs/cache-steering.md).
"""

from .cache_steer import CacheSteer
from .cache_vectors import CacheVector, load
from .contrast import contrastive_prompts
from .extraction import extract

__all__ = ["CacheSteer", "CacheVector", "contrastive_prompts", "extract", "load"]
