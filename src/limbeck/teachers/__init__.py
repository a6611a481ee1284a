"""Teachers that are not run beside the student: stored on disk, or asked over the network."""
