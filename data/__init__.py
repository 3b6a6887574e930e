"""Training data: the toy world renderer and the FastComposer folder layout."""
