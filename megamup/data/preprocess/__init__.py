"""Documents to a corpus: workers encode units into pieces, and pieces are assembled into shards."""
