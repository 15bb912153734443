"""How the decoder is cut for tensor parallelism: heads, inner features and vocabulary."""

PLAN = {
    "embed.tokens": "embedding_rowwise",
    "blocks.*.attention.query": "colwise",
    "blocks.*.attention.key": "colwise",
    "blocks.*.attention.value": "colwise",
    "blocks.*.attention.output": "rowwise",
    "blocks.*.feed_forward.gate": "colwise",
    "blocks.*.feed_forward.up": "colwise",
    "blocks.*.feed_forward.dropout": "colwise",
    "blocks.*.feed_forward.down": "rowwise",
    "head.output": "colwise",
}
"""The output stays cut over the vocabulary: the loss takes it so."""
