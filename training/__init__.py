"""Fine-tuning: settings, the loop, checkpoints and logs."""
