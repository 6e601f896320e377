"""The embedded world: scenes as data, their captions and renderer, an exact verifier, and the training of its models."""
