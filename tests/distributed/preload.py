"""Nothing: what every rank of a distributed test imports, loaded once before the ranks are forked."""
