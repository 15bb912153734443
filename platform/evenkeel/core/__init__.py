"""Values that everything else is said in: ids, clusters, model shapes, layouts, boxes, votes.

Frozen dataclasses and pure functions of them; nothing here imports more than the standard library's
`dataclasses`, `typing`, `math` and `json`.
"""
