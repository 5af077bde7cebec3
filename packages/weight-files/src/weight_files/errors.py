"""What is raised for files that are missing, damaged, or made for another model."""


class WeightsError(ValueError):
    """Weights that cannot be read, or are not those of the model; nothing was loaded."""
