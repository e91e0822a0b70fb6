"""Read models of a company: one file each, with views in the folder ``views``."""
