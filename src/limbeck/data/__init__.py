"""Data: sources of labelled images, how they are opened, augmented and handed out in batches."""
