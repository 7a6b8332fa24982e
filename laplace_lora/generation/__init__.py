"""Which tokens a language model is unsure of, in a given text or in one that it writes.

No fitting; any posterior over a causal language model's adapters will do.
"""

from laplace_lora.generation.decoding import generate
from laplace_lora.generation.scoring import score
from laplace_lora.generation.token_predictions import TokenPredictions

__all__ = ["TokenPredictions", "generate", "score"]
