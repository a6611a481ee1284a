"""The language family: next-token distributions, sequences and the policies that produce them."""
