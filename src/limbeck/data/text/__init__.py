"""Text: documents read, tokenised, packed into sequences of one length, and handed out in batches."""
