"""How close a model is to its original: perplexity, KL divergence, agreement of the likeliest token."""
