"""What a run says of itself, and how that is shown.

events    the records of metrics.jsonl and events.jsonl
incident  an incident's phases in words
console   a run on a terminal, or as plain lines in a log
"""
