"""Text -> tokenizer -> token shards -> datasets: everything between raw text and the trainer.

The modules behind ``megatron-mup data`` import neither torch nor megatron-core, so that the command
line starts at once; the shard format is tested against megatron-core's own reader and writer.
"""
