"""Published versions in the forms of other trainers, with the configuration each wants beside them.

A row is written so that the trainer sees the row's conversation and takes its loss on the row's
response, the last message, alone. What a trainer has no place for is left out by reason, never
bent: a form that can't hold a row's tools or calls must not train on the rest of it.
"""
