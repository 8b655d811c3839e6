"""Numbers that stand in a table: the oracle of flora, distances between sets of images, protocols and reports."""
