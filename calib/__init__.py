"""Constants that static engines need, measured over data."""
