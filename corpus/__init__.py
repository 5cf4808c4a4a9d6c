"""The public data sets of the paper: fetching them, checking them, and finding test rows among training rows."""
