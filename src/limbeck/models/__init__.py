"""Networks: the shipped ones, those of timm and transformers, and how they are built, saved and described."""
