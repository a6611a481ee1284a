"""Methods whose student is the data themselves."""
