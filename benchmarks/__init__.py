"""Programs that measure; every number in the documents comes from one of them."""
