"""The data sets: where their bytes come from (fetch), how they are made (prepare) and read (dataset)."""
