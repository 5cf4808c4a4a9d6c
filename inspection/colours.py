"""Cividis, a scale from dark blue to yellow: brighter as a value grows, and the same for all kinds of colour vision."""

Colour = tuple[int, int, int]

CIVIDIS = ("00224e", "1a386f", "434e6c", "61656f", "7d7c78", "9b9476", "bcae6c", "dec958", "fee838")


def colour(share: float) -> Colour:
    """Of 0 to 1 on the scale."""
    place = min(max(share, 0.0), 1.0) * (len(CIVIDIS) - 1)
    i = min(int(place), len(CIVIDIS) - 2)
    low, high = (bytes.fromhex(CIVIDIS[j]) for j in (i, i + 1))
    return tuple(round(a + (b - a) * (place - i)) for a, b in zip(low, high, strict=True))


def ink(background: Colour) -> Colour:
    """Black or white, whichever stands out more from it (by the contrast of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in background)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 0.05 * 1.05 else (255, 255, 255)


def web(colour: Colour) -> str:
    """As a page names it."""
    return f"#{bytes(colour).hex()}"
