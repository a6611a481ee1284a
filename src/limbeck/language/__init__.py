"""What methods on language models share: predictions at the tokens that count, generation, decoding."""
