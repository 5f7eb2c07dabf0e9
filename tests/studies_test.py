"""experiments.reproduce: every study runs at smoke scale and writes its page."""
