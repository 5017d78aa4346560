"""Results of `flowcut bench` as one page of HTML that loads nothing: engines.webpage.report."""
