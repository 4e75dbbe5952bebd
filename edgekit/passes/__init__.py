"""Graph passes, one a file: pure functions from a model to a new model. Passes never import each other."""
