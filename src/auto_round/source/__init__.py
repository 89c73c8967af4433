"""Where models come from: checkpoints opened lazily, a meta skeleton of the model, and the blocks in it."""
