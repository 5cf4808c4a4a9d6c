"""The demo: a small instruction-tuned model in Meta's layout, and arithmetic word problems to fine-tune it on."""
