"""Methods on classifiers and backbones of images: ensembles, selection, search, exits, masking."""
