"""What writes the generated pages, one file a kind of page."""
