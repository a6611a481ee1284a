"""Networks made smaller: quantised weights, masks of zeros, low rank, orthogonal maps, and honest sizes."""
