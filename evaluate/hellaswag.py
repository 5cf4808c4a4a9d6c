"""HellaSwag: how a scene goes on, four endings (`python -m evaluate.hellaswag`)."""

from evaluate.__main__ import main

main(suite="HellaSwag")
