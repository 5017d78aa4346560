"""`flowcut plan`: what a model asks of a GPU, counted from its graphs, and what that GPU could do at best."""
