"""The classic family: logits, features and relations of classifiers, the baselines that everyone compares with."""
