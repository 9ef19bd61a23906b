"""The words of the small world: its people, places and things, and the sentences told of them.

Stories are drawn from these by seed: another word, or another order, is another world.
"""

SHE = tuple("Mara Ana Cleo Eva Gwen Ida Kira Olga".split())
HE = tuple("Tom Ben Dan Finn Hugo Jon Leo Rolf".split())
PEOPLE = SHE + HE
PLACES = tuple(
    "kitchen garden attic cellar hall barn market school harbour mill library park".split()
)
THINGS = tuple(
    "lamp kite book drum key map ball cup hat rope clock flute box broom mirror bell".split()
)
GOODS = tuple("apple pear plum egg stone shell coin button".split())
ANIMALS = tuple("dog cat horse cow goat duck fox owl".split())
COLOURS = tuple("red blue green black white brown grey yellow".split())
SIZES = ("big", "small", "tiny", "huge")
MOODS = ("happy", "sad", "tired", "proud", "calm", "angry")
NUMBERS = tuple("no one two three four five six seven eight nine ten".split())
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
WEATHER = ("cold", "warm", "windy", "rainy", "sunny", "foggy")
FOODS = ("bread", "soup", "cheese", "rice", "cake", "fish", "honey", "porridge")

LINKS = ("", "", "", "Then ", "Later ", "After that ", "Soon ")

PUT = (
    "{name} put the {thing} in the {new}.",
    "{name} left the {thing} in the {new}.",
    "The {thing} stood in the {new}.",
    "There was a {thing} in the {new}.",
)
MOVE = (
    "{name} carried the {thing} from the {old} to the {new}.",
    "{name} took the {thing} to the {new}.",
    "{name} brought the {thing} from the {old} into the {new}.",
    "{name} found the {thing} in the {old} and moved it to the {new}.",
    "the {thing} was moved to the {new} by {name}.",
)
GIVE = (
    "{name} gave the {thing} to {other}.",
    "{name} handed the {thing} to {other}.",
    "{other} got the {thing} from {name}.",
    "{other} borrowed the {thing} from {name}.",
    "{name} lent the {thing} to {other}.",
)
TAKE = ("{name} picked up the {thing}.", "{name} took the {thing}.", "{name} grabbed the {thing}.")
GO = (
    "{name} went to the {new}.",
    "{name} walked to the {new}.",
    "{name} ran into the {new}.",
    "{name} left for the {new}.",
)
ORDERS = (
    ("older", "younger", "oldest", "youngest"),
    ("taller", "shorter", "tallest", "shortest"),
    ("faster", "slower", "fastest", "slowest"),
    ("stronger", "weaker", "strongest", "weakest"),
)
CAUSES = (
    ("it rained all night", "the path was wet", "slipped on the path"),
    ("the wind was strong", "the hat flew away", "ran after the hat"),
    ("the oven was too hot", "the cake was burnt", "baked a new cake"),
    ("the bridge was broken", "the road was closed", "took the boat"),
    ("the window was open", "the room was cold", "put on a coat"),
    ("the lamp had no oil", "the cellar was dark", "lit a candle"),
    ("the goat found the gate open", "the flowers were eaten", "mended the gate"),
    ("the clock was slow", "the train was gone", "walked home"),
    ("the bucket had a hole", "the floor was wet", "looked for a mop"),
    ("the well was dry", "the horse was thirsty", "fetched water from the river"),
    ("the drum was loud", "the baby woke up", "sang a song"),
    ("the snow was deep", "the school was closed", "built a snowman"),
)
