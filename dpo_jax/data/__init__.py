"""From files of preferences to packed batches: numpy and tokenizers, never models or losses."""
