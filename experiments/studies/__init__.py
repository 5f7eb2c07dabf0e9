"""The studies of the paper's figures and table; see `experiments.reproduce`."""
