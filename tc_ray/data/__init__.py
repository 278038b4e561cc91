"""Examples: read, checked, split, tokenised, put in order and in batches."""
