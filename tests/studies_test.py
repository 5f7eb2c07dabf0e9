"""experiments.reproduce: all studies run at smoke scale and write a page."""
