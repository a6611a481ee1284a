"""Each paper's central claim in miniature: an experiment with named arms, equal budgets, several seeds and a margin."""
