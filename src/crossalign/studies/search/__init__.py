"""Search over settings: the space, the promotion rule, the durable record, and the loop that hands out the work."""
