"""Adapters: one file an ecosystem, and the only place that imports it."""
