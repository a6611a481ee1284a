"""The methods, one file each, in a folder for each family; found by `limbeck.core.registry`."""
