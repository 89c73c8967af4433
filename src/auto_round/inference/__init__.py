"""Running quantised layers: the backend seam, choosing between backends, the module, and transformers' three hooks."""
