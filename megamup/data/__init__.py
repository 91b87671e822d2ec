"""From text to batches.

On disk: reading -> tokenizer -> preprocess -> a corpus (manifest, shards). In training: corpus -> samples -> blend ->
collate -> loader. Everything but `loader` runs without torch, so that tokenizing needs no training environment.
"""
