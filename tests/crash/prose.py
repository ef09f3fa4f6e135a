"""Short texts that share sentences, so that chunks repeat within documents and across them."""

import random

WORDS = ("heron", "otter", "badger", "mill", "ford", "weir", "moon", "tide", "root", "star", "reed", "lynx")
COMMON = [f"Everybody at the {place} knows the {animal} by its name." for place in WORDS[3:6] for animal in WORDS[:3]]


def sentence(generator: random.Random) -> str:
    if generator.random() < 0.3:
        return generator.choice(COMMON)
    return (
        f"The {generator.choice(WORDS)} met the {generator.choice(WORDS)} {generator.randrange(1000)} times "
        f"near the {generator.choice(WORDS)}."
    )


def text(generator: random.Random, mark: int, before: str | None = None) -> str:
    """A text with a word of its own, `mark123`; some are edits of the one before."""
    if before and generator.random() < 0.5:
        kept = [each for each in before.split("\n") if not each.startswith("mark")]
        place = generator.randrange(len(kept) + 1)
        if generator.random() < 0.3 and len(kept) > 1:
            kept.pop(place % len(kept))
        else:
            kept.insert(place, sentence(generator))
    else:
        kept = [sentence(generator) for _ in range(generator.randint(1, 12))]
    return "\n".join([*kept, f"mark{mark} closes it."])
