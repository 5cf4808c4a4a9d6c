"""Looking inside a mixture: router statistics, figures, single rows, and runs side by side."""
