"""From the table of a finished sweep to claims with verdicts and a figure: experiments/results/NAME."""
