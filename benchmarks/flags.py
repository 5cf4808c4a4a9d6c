"""What the flags of several measurements may be."""

from moa.knobs import METHODS


def methods_named(text: str) -> list[str]:
    """The methods that --methods names, with commas. ValueError for one that is none or has no preset."""
    known = [method for method in METHODS if method != "custom"]
    for method in text.split(","):
        if method not in known:
            raise ValueError(f"--methods: {method!r} is none of {', '.join(known)}")
    return text.split(",")
