"""The demo: a small instruction-tuned model in Meta's layout, and arithmetic word problems to fine-tune it on."""

# What finetune.py trains with where no data is named: it gives the demo model its gain in a few minutes on two cores.
RECIPE = {"max_steps": 100, "batch_size": 8, "lr": 2e-3, "warmup_epochs": 0.04}
