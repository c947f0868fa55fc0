"""What every rank of a test imports, loaded once in the process that ranks are forked from."""
