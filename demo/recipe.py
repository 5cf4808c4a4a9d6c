"""How `finetune.py` trains where no data is named: what gives the demo model its gain in a few minutes on two cores."""

RECIPE = {"max_steps": 100, "batch_size": 8, "lr": 2e-3, "warmup_epochs": 0.04}
