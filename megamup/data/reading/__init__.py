"""Input to documents: where files are (sources), what they are (formats), how they are divided (units).

A unit is a stretch of the input that a worker reads by itself; it hands on its documents in batches of texts, in memory
that grows neither with the file nor with the document.
"""
