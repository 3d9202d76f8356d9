"""Generated input for the shipped demo and the GSM8K recipe, with its truth in a side folder."""
