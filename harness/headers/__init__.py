"""Headers of models that are not here: where they are read from, and the sparse files that stand for the models."""
