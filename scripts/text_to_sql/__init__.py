"""Schemas, wordings and the generator of the built-in text-to-SQL rows."""
