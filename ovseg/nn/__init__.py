"""Parts that several systems share: blocks, readouts, CLIP and its towers, grouping, text."""
