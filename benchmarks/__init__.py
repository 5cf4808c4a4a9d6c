"""What a layout costs: computed (`benchmarks.layouts`) and measured (`benchmarks.exchange`)."""
