"""One reader a kind of data; each returns a training source and, where the data bring one, a validation source."""
