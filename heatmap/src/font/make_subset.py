"""Makes DejaVuSans.ttf from the whole font: python make_subset.py /usr/share/fonts/truetype/dejavu/DejaVuSans.ttf"""

import pathlib
import sys

from fontTools import subset
from fontTools.ttLib import TTFont

# Latin, spacing and combining marks, Greek, Cyrillic, punctuation, currency, letter-like signs, arrows, operators, pictures of
# control characters, boxes and shapes: what the vocabularies of tokenizers use as marks is among them.
RANGES = """20-7e a0-24f 2b0-36f 370-3ff 400-52f 1e00-1eff 2010-2027 2030-205e 20a0-20bf 2100-214f 2190-22ff 2400-2426 2500-25ff"""

options = subset.Options()
# Marks find their letters; no kerning, so that a text is as wide as its letters.
options.layout_features = ["mark", "mkmk", "ccmp"]
options.hinting = False
options.name_IDs = ["*"]
options.notdef_outline = True

font = TTFont(sys.argv[1], recalcTimestamp=False)
subsetter = subset.Subsetter(options)
bounds = [[int(end, 16) for end in piece.split("-")] for piece in RANGES.split()]
subsetter.populate(unicodes=[character for first, last in bounds for character in range(first, last + 1)])
subsetter.subset(font)
font.save(pathlib.Path(__file__).with_name("DejaVuSans.ttf"))
