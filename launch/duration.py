"""Time as people say it."""


def in_words(seconds: float) -> str:
    """Return "3.2 s", "5 min 7 s", "4 h 12 min" or, of two days and more, "2.5 days"."""
    minutes, rest = divmod(float(seconds), 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours >= 48:
        return f"{seconds / 86400:.1f} days"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest:.0f} s" if minutes else f"{rest:.1f} s"
