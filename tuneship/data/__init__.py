"""Rows: where they come from (`sources`), which are good and who is held out (`rows`), and how
they fill a forward pass (`packing`)."""
