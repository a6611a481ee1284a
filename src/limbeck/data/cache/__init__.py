"""The teacher cache: what a teacher says about every item, asked once, stored on disk, read back in any order."""
