"""Sequence mixers with one interface: softmax attention, linear attentions and state-space models.

A mixer maps hidden states (batch, length, width) to new ones by a matrix over the tokens, one for each head. How that
matrix is applied (at once, in blocks, token by token) is the mixer's own affair; `materialize` shows it.
"""
