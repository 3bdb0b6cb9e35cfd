"""Text -> token shards -> batches.at(step). Import the modules; this package itself imports nothing."""
