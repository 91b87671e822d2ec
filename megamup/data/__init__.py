"""From text to batches: readers -> tokenizer -> shards (on disk) -> samples -> blend -> collate -> loader.

Everything but `loader` runs without torch, so that tokenizing needs no training environment.
"""
