"""Several routing methods on the same model, data and seeds, for `moe-dist compare`. Imports no torch."""
