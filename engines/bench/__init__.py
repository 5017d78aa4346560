"""`flowcut bench`: prefill latency of an engine directory, beside its baseline and its peers, in one process."""
