"""Methods whose student is the teacher, rewritten cheaper."""
