"""Pictures and files of examples for vrrl.py: all that can be made and read without a model.
`rng` is always a random.Random. Colours are (R, G, B). Boxes are (x0, y0, x1, y1) in pixels, half
open: x0 <= x < x1."""
import contextlib, functools, hashlib, json, math, os, random, shutil, sys, textwrap
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

try:
    import fcntl
except ImportError:
    raise SystemExit("error: VRRL runs on Linux and macOS; on Windows inside WSL") from None

font = functools.lru_cache(ImageFont.load_default)  # of a size in pixels; the same everywhere

class UserError(Exception):
    """Something that the user can mend; the message is one line that says where, what, and how."""

def tries(what):
    """10,000 turns for a loop that looks for something by chance; then UserError."""
    yield from range(10_000)
    raise UserError(f"found no {what} in 10,000 tries: ask for fewer")

def far_colour(rng, used):
    """A random colour, the farthest of a few from those in `used`, to which it is added."""
    options = [tuple(rng.randrange(256) for _ in range(3)) for _ in range(8)]
    used.append(max(options, key=lambda c: min((math.dist(c, u) for u in used), default=0)))
    return used[-1]

def near_colour(rng, colour):
    """A random colour at a distance of 70 to 110 from another one."""
    for _ in tries("near colour"):
        found = tuple(rng.randrange(256) for _ in range(3))
        if 70 <= math.dist(found, colour) <= 110:
            return found

# ==================== 1. Navigation ===============================================================
# An elf walks over a frozen lake to a gift. A layout is a list of strings of S (start, the elf),
# F (frozen, safe), H (hole) and G (goal, the gift). Cells are (row, column) from the top left.

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}  # (row, column)
# Colours, and the shape of a hole. `alert` shows where a path leaves the grid, and nothing else.
Look = namedtuple("Look", "ground hole path alert coat hat box ribbon shape")
# Training sees "snow" and the random MIXES; night, desert and ink, with new shapes too, ask whether
# a skill survives a change of picture. "official" has the authors' colours.
LOOKS = {
    "snow": Look("#EEF5FA", "#48C", "#F81", "#C0B", "#284", "#C23", "#C24", "#FD4", "disc"),
    "night": Look("#263052", "#85B", "#FD3", "#F45", "#5BD", "#EEF", "#4A5", "#FFF", "square"),
    "desert": Look("#ECD096", "#832", "#72A", "#E02", "#45A", "#FFE", "#188", "#FFE", "cross"),
    "ink": Look("#FAF8F0", "#222", "#16D", "#E22", "#555", "#222", "#BBB", "#111", "ring"),
    "official": Look("#F0F7FC", "#4CF", "#E10", "#306", "#384", "#384", "#347", "#E82", "disc"),
}
MIXES = tuple(f"mix{number:02d}" for number in range(40))

@functools.lru_cache(maxsize=None)
def look_of(name):
    """The Look of this name; the name of a mix decides its random colours."""
    if name in LOOKS:
        return LOOKS[name]
    rng = random.Random(name)
    colours = []
    for _ in range(8):
        far_colour(rng, colours)
    return Look(*colours, rng.choice(("disc", "square")))

@functools.lru_cache(maxsize=1024)
def _tile(name, cell, kind):
    """Picture of one cell. It is painted at 400 x 400 pixels and shrunk, for smooth edges."""
    look = look_of(name)
    tile = Image.new("RGB", (400, 400), look.ground)
    draw = ImageDraw.Draw(tile)
    if kind == "H" and look.shape == "cross":
        draw.line((80, 80, 320, 320), fill=look.hole, width=96)
        draw.line((80, 320, 320, 80), fill=look.hole, width=96)
    elif kind == "H":
        paint = draw.rectangle if look.shape == "square" else draw.ellipse
        inside = look.ground if look.shape == "ring" else look.hole
        paint((52, 52, 348, 348), fill=inside, outline=look.hole, width=72)
    elif kind == "S":
        draw.polygon((200, 200, 320, 368, 80, 368), fill=look.coat)
        draw.ellipse((120, 136, 280, 288), fill=(240, 196, 158), outline=look.hat, width=12)
        draw.polygon((200, 32, 304, 176, 96, 176), fill=look.hat)
        for left in (160, 224):
            draw.ellipse((left, 200, left + 24, 228), fill=(20, 20, 20))
    elif kind == "G":
        draw.rectangle((80, 184, 320, 360), fill=look.box)
        draw.rectangle((56, 136, 344, 200), fill=look.box, outline=look.ribbon, width=10)
        draw.rectangle((172, 136, 228, 360), fill=look.ribbon)
        for left in (96, 200):
            draw.ellipse((left, 48, left + 104, 144), outline=look.ribbon, width=32)
    tile = tile.resize((cell, cell), Image.Resampling.BOX)
    ground = tile.getpixel((0, 0))
    grid = tuple((6 * value + (0 if sum(ground) > 300 else 255)) // 7 for value in ground)
    # Lines lie at the top and left only: the neighbours bring the others.
    ImageDraw.Draw(tile).line((0, cell, 0, 0, cell, 0), fill=grid, width=max(1, cell // 24))
    return tile

def draw_grid(layout, look, cell=16):
    """RGB picture of a layout, `cell` pixels a cell, no margin; `look` is the name of one."""
    image = Image.new("RGB", (len(layout[0]) * cell, len(layout) * cell))
    for row, kinds in enumerate(layout):
        for column, kind in enumerate(kinds):
            image.paste(_tile(look, cell, kind), (column * cell, row * cell))
    return image

def draw_path(image, shape, start, moves, look="snow", box=None):
    """Feedback: a new RGB image with the path on it, as pure geometry without holes or goals.

    shape: (rows, columns) of the grid, which fills the image or its box (left, top, right,
    bottom) in pixels. start: (row, column). moves: names from MOVES. A hollow square marks the
    start, an arrow head the end, and a bar the edge where the path leaves the grid and stops.
    """
    image = image.convert("RGB")
    draw = ImageDraw.Draw(image)
    look = look_of(look)
    left, top, right, bottom = box or (0, 0, *image.size)
    width, height = (right - left) / shape[1], (bottom - top) / shape[0]  # of a cell, pixels
    unit = min(width, height)
    thick = max(2, round(unit / 6))

    def bar(a, b, colour):  # in a row or a column; its square ends close the corners
        low = [int(min(pair) - thick / 2 + 0.5) for pair in zip(a, b)]
        high = [int(max(pair) + thick / 2 - 0.5) for pair in zip(a, b)]
        draw.rectangle((*low, *high), fill=colour)

    row, column = start
    first = here = (left + (column + 0.5) * width, top + (row + 0.5) * height)
    times = Counter()  # how often the path takes each stretch between two cells
    last = None  # the last move inside the grid, if the path ends inside
    for move in moves[:100]:  # a rambling answer must not slow training down
        dr, dc = MOVES[move]
        if not (0 <= row + dr < shape[0] and 0 <= column + dc < shape[1]):
            x, y = here[0] + dc * (width - thick) / 2, here[1] + dr * (height - thick) / 2
            dx, dy = abs(dr) * (width - thick) / 2, abs(dc) * (height - thick) / 2
            bar(here, (x, y), look.path)
            bar((x - dx, y - dy), (x + dx, y + dy), look.alert)
            last = None
            break
        there = (here[0] + dc * width, here[1] + dr * height)
        # A stretch walked again is painted beside the first time, so that it does not vanish.
        stretch = (min(row, row + dr), min(column, column + dc), dr == 0)
        aside = (0, 1.5 * thick, -1.5 * thick)[times[stretch] % 3]
        times[stretch] += 1
        dx, dy = abs(dr) * aside, abs(dc) * aside
        corners = [here, (here[0] + dx, here[1] + dy), (there[0] + dx, there[1] + dy), there]
        for a, b in zip(corners, corners[1:]):
            bar(a, b, look.path)
        row, column, here = row + dr, column + dc, there
        last = move
    # Whole pixels keep the square and the arrow head symmetric at 16 pixels a cell.
    x, y = map(int, first)
    for radius, colour in ((round(0.2 * unit), look.path), (round(0.07 * unit), look.ground)):
        draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=colour)
    if last:
        x, y = map(int, here)
        dy, dx = (round(0.36 * unit) * step for step in MOVES[last])
        draw.polygon((x + dx, y + dy, x + dy, y + dx, x - dy, y - dx), fill=look.path)
    return image

def find_cell(layout, kind):
    """(row, column) of the first cell of this kind."""
    return next((row, kinds.index(kind)) for row, kinds in enumerate(layout) if kind in kinds)

def _around(layout, row, column):
    """The cells beside a cell, as (move, row, column)."""
    return [(move, row + dr, column + dc) for move, (dr, dc) in MOVES.items()
            if 0 <= row + dr < len(layout) and 0 <= column + dc < len(layout[0])]

def shortest_distances(layout):
    """Least moves from each cell to the goal: int array (rows, columns), -1 where no way exists."""
    distance = np.full((len(layout), len(layout[0])), -1)
    queue = [find_cell(layout, "G")]
    distance[queue[0]] = 0
    for row, column in queue:  # the queue grows meanwhile
        for _, r, c in _around(layout, row, column):
            if layout[r][c] != "H" and distance[r, c] < 0:
                distance[r, c] = distance[row, column] + 1
                queue.append((r, c))
    return distance

def check_layout(layout):
    """Raise UserError unless this is a solvable layout of 2 to 16 rows and columns."""
    if not isinstance(layout, list) or {type(row) for row in layout} != {str}:
        raise UserError("layout is not a list of strings")
    if len({*map(len, layout)}) != 1 or not (2 <= len(layout) <= 16 and 2 <= len(layout[0]) <= 16):
        raise UserError("layout needs 2 to 16 rows, all of the same length of 2 to 16 letters")
    if sorted("".join(layout).replace("F", "").replace("H", "")) != ["G", "S"]:
        raise UserError("layout needs one S and one G; its other letters must be F and H")
    if shortest_distances(layout)[find_cell(layout, "S")] < 0:
        raise UserError("layout has no way from S to G")

def shortest_path(layout, rng):
    """Moves of one shortest path; every step picks evenly among the moves that come closer."""
    distance = shortest_distances(layout)
    row, column = find_cell(layout, "S")
    path = []
    for left in reversed(range(distance[row, column])):  # moves after the next one
        steps = [step for step in _around(layout, row, column) if distance[step[1:]] == left]
        move, row, column = rng.choice(steps)
        path.append(move)
    return path

def wrong_path(layout, path, exact, rng):
    """A wrong answer near `path`, a shortest one: a non-empty list for which exact(moves) fails."""
    # Half the answers go straight to the goal, through holes: a model's most frequent mistake.
    (row, column), (r, c) = find_cell(layout, "S"), find_cell(layout, "G")
    straight = ["down"] * (r - row) + ["up"] * (row - r)
    straight += ["right"] * (c - column) + ["left"] * (column - c)
    pairs = [("up", "down"), ("down", "up"), ("left", "right"), ("right", "left")]
    while True:
        at = rng.randrange(len(path))
        there, back = rng.choice(pairs)
        mixed = rng.sample(straight, len(straight))
        stray = rng.choices(list(MOVES), k=rng.randint(1, len(path) + 2))
        middle = rng.choice([stray[:1], [there, path[at], back]])  # one move differs, or a detour
        wrong = rng.choice([straight, straight, mixed, mixed, stray, path[:-rng.randint(1, 2)],
                            path + stray[:2], path[:at] + middle + path[at + 1:]])
        if wrong and not exact(wrong):
            return wrong

def navigation_plan(train, test, cell):
    """{split: [(n, look, cell), ...]}. Test comes first: other counts leave it as it is."""
    plan = {}
    for part in ("test", "dev"):
        for kind, sizes, looks in (("id", (3, 4, 5), ("snow",)), ("size", (6, 7), ("snow",)),
                                   ("look", (3, 4, 5), ("night", "desert", "ink"))):
            plan[f"{part}_{kind}"] = [
                (sizes[i % len(sizes)], looks[i // len(sizes) % len(looks)], cell)
                for i in range(test)]
    rng = random.Random("order")
    sizes = [3] * min(300, train // 10) + [4] * round(0.3 * train)  # few 3 x 3 maps exist
    sizes += [5] * (train - len(sizes))
    rng.shuffle(sizes)
    plan["train"] = [(size, rng.choice(MIXES) if i % 4 else "snow", cell)
                     for i, size in enumerate(sizes)]
    return plan

def make_map(rng, n, look, cell):
    """(record, image) of a new n x n map of cells of so many pixels: 10 to 35 % are holes, and the
    goal is 2 or more moves away."""
    least = rng.randint(2, n) if n >= 4 else 2  # otherwise near goals prevail
    for _ in tries("map"):
        holes = round(rng.uniform(0.1, 0.35) * (n * n - 2))
        cells = ["F"] * (n * n)
        for kind, index in zip("SG" + "H" * holes, rng.sample(range(n * n), holes + 2)):
            cells[index] = kind
        layout = ["".join(cells[first:first + n]) for first in range(0, n * n, n)]
        if shortest_distances(layout)[find_cell(layout, "S")] >= least:
            return {"layout": layout, "look": look}, draw_grid(layout, look, cell)

# ==================== 2. Grounding ================================================================
# Pictures with a question about one thing in them. `text`: words and numbers, for real models.
# `embedded`: 96 x 96 pixels and colours only, for the embedded model. Its words are 0 to 24 and
# WORDS in assets/make_embedded.py. It points at multiples of 4 pixels: targets are no smaller.

RED = (225, 25, 30)  # the target of an embedded figure
BLUE = (30, 60, 235)  # what distracts from it
MARK = (0, 225, 40)  # a point that is drawn; no figure uses this colour
CANVAS = 96  # pixels of each side of an embedded figure
CITIES = """Oslo Lima Cairo Turin Quito Perth Dakar Minsk Osaka Porto Accra Delhi Sofia Haifa Lyon
            Basel Bergen Tunis Hanoi Miami""".split()
GOODS = """Tea Coffee Juice Milk Water Cocoa Soup Bread Rice Beans Apples Plums Cheese Honey Salt
           Eggs Flour Figs Pears Butter""".split()
YEARS = [str(year) for year in range(1950, 2030)]
# {kind: {split: (shape, lowest and highest number of rows and of columns, of bars, or of dots)}}
# Out of distribution `embedded` has look-alikes too, colours near RED that no training picture has:
# as in a large table of words, they lead the first look astray.
FIGURES = {
    "embedded": {"id": ("table", (3, 6)), "large": ("table", (12, 14)),
                 "bars": ("bars", (9, 11)), "scatter": ("scatter", (22, 28))},
    "text": {"id": ("table", (5, 15)), "large": ("table", (20, 50)), "cell": ("cell", (5, 15)),
             "bars": ("bars", (5, 10)), "scatter": ("scatter", (10, 20))},
}
LOOK_ALIKES = 4, 8  # lowest and highest number in a picture

def figure_plan(kind, train, test):
    """{split: [(shape, size, kind, look-alikes), ...]}; test comes first, as for navigation."""
    plan = {f"{part}_{name}": [(*figure, kind, kind == "embedded" and name != "id")] * test
            for part in ("test", "dev") for name, figure in FIGURES[kind].items()}
    return plan | {"train": [(*FIGURES[kind]["id"], kind)] * train}

def make_figure(rng, shape, size, kind="embedded", alike=False):
    """(record, RGB image) of a shape in FIGURES; `size` is (lowest, highest) number of its parts;
    alike: whether it has LOOK_ALIKES.

    record: question, box of the target, shape, and `within`: a point is right within so many
    pixels of the middle of the box, or, where that is 0, inside the box.
    """
    if kind == "text":  # pale and dark colours
        ends = {"page": (236, 255), "head": (200, 230), "ink": (0, 100), "fill": (90, 190)}
        colours = {part: tuple(rng.randint(*pair) for _ in "RGB") for part, pair in ends.items()}
    else:  # one of 40 palettes, far from the colours that mean something
        palette = random.Random(f"mix{rng.randrange(40)}")
        used = [RED, BLUE, MARK]
        colours = {part: far_colour(palette, used) for part in ("page", "head", "ink", "fill")}
    if shape in ("bars", "scatter"):
        paint = _bars if shape == "bars" else _scatter
        question, box, image = paint(rng, size, colours, kind == "text", alike)
    elif kind == "text":
        question, box, image = _text_table(rng, size, colours, shape == "cell")
    else:
        question, box, image = _embedded_table(rng, size, colours, alike)
    within = 40 if kind == "text" and shape != "bars" else 0
    return {"question": question, "box": list(box), "within": within, "shape": shape}, image

def _block(draw, box, colour):
    """Fill a half-open box."""
    draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=colour)

def _write(draw, box, text, letters, ink):
    """Text in the middle of a box."""
    draw.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), text, ink, letters, anchor="mm")

def _mark_parts(rng, fills, alike):
    """Make some of these colours look-alikes, then up to three BLUE and one RED; its index."""
    for i in rng.sample(range(len(fills)), rng.randint(*LOOK_ALIKES)) if alike else ():
        fills[i] = near_colour(rng, RED)
    for i in rng.sample(range(len(fills)), rng.randint(0, 3)):
        fills[i] = BLUE
    red = rng.randrange(len(fills))
    fills[red] = RED
    return red

def _embedded_table(rng, size, colours, alike):
    """(question, box, image) of a table; `size` counts its headers too."""
    edges = []
    for count in (rng.randint(*size), rng.randint(*size)):
        # Cells of small tables are about as large as those of large ones: crops of both look alike.
        # With 14 parts a cell keeps 5 pixels, so it contains a multiple of 4 for the model.
        length = CANVAS if count > 6 else round(count * rng.uniform(7, 16))
        ends = np.cumsum([0] + [rng.uniform(1, 1.2) for _ in range(count)])
        low = rng.randint(0, CANVAS - length)
        edges.append((low + ends * length / ends[-1]).round().astype(int).tolist())
    xs, ys = edges
    rule = rng.randint(0, 1)  # pixels between cells
    boxes = [(x0 + rule, y0 + rule, x1, y1)
             for y0, y1 in zip(ys, ys[1:]) for x0, x1 in zip(xs, xs[1:])]
    row = len(xs) - 1  # cells
    fills = [colours["head" if i < row or i % row == 0 else "page"] for i in range(len(boxes))]
    red = _mark_parts(rng, fills, alike)
    image = Image.new("RGB", (CANVAS, CANVAS), colours["page"])
    draw = ImageDraw.Draw(image)
    _block(draw, (xs[0], ys[0], xs[-1] + rule, ys[-1] + rule), colours["ink"])
    full = rng.random()  # share of the cells that hold a dash
    for (x0, y0, x1, y1), fill in zip(boxes, fills):
        _block(draw, (x0, y0, x1, y1), fill)
        if rng.random() < full:
            y = (y0 + y1) // 2
            _block(draw, (x0 + 1, y - 1, rng.randint(x0 + 3, x1 - 1), y + 1), colours["ink"])
    return "find the red", boxes[red], image

def _sample_headers(rng, count, levels, words, repeat):
    """{(level, first line, line after the last): name}, level 0 outermost; `repeat` the lowest."""
    names = [f"{word} {n}" for n in (4, 3, 2) for word in words] + rng.sample(words, len(words))
    span = rng.randint(2, 4)  # headers under one of the next level
    lowest = ()  # names that are the same in each group; no other name is used twice
    if repeat and levels > 1:
        lowest = rng.choice((("Q1", "Q2", "Q3", "Q4"), ("low", "mean", "high", "sum")))
    found = {}
    for level in reversed(range(levels)):
        step = span ** (levels - 1 - level)
        for i in range(0, count, step):
            name = lowest[i % span] if lowest and step == 1 else names.pop()
            found[level, i, min(i + step, count)] = name
    return found

def _text_table(rng, size, colours, inner=False):
    """(question, box, image) of a table; it asks for a lowest header or a body cell (`inner`)."""
    rows, columns = rng.randint(*size), rng.randint(*size)  # of the body
    top, left = rng.randint(1, 3), rng.randint(1, 2)  # levels of headers
    words = rng.sample((CITIES, GOODS, YEARS), 2)
    across = _sample_headers(rng, columns, top, words[0], True)
    down = _sample_headers(rng, rows, left, words[1], False)
    # {(first column, first row, column after the last, row after the last): text}
    cells = {(left + a, level, left + b, level + 1): text for (level, a, b), text in across.items()}
    cells |= {(level, top + a, level + 1, top + b): text for (level, a, b), text in down.items()}
    cells[0, 0, left, top] = ""
    for x in range(left, left + columns):
        form = rng.choice(("{:.0f}", "{:.1f}", "{:.2f}", "{:,.0f}", "${:.0f}"))
        most = 10 ** rng.randint(2, 4)
        for y in range(top, top + rows):
            cells[x, y, x + 1, y + 1] = form.format(rng.uniform(0, most))
    x, y = left + rng.randrange(columns), top + rng.randrange(rows)
    above = [f"'{name}'" for (_, a, b), name in across.items() if left + a <= x < left + b]
    column_name = " under ".join(above[:2])  # the lowest comes first
    row_name = f"'{cells[left - 1, y, left, y + 1]}'"
    options = [(f"column header {column_name}", (x, top - 1, x + 1, top)),
               (f"row header {row_name}", (left - 1, y, left, y + 1)),
               (f"cell in row {row_name} and column {column_name}", (x, y, x + 1, y + 1))]
    asked, target = options[2] if inner else rng.choice(options[:2])
    columns, rows = left + columns, top + rows  # with headers
    letters = font(rng.randint(12, 18 if columns < 20 else 14))
    spare = rng.randint(8, 40 if columns < 20 else 14)
    widths = [0] * columns
    for cell in sorted(cells, key=lambda cell: cell[2] - cell[0]):  # a wide one widens its last
        lack = math.ceil(letters.getlength(cells[cell])) + spare - sum(widths[cell[0]:cell[2]])
        widths[cell[2] - 1] += max(0, lack)
    height = letters.size + rng.randint(6, 24 if rows < 20 else 12)
    margin = rng.randint(4, 60)  # pixels around the table, or more where it is small
    wide = max(400, sum(widths) + 2 * margin)
    high = max(400, rows * height + 2 * margin)
    xs = np.cumsum([rng.randint(margin, wide - margin - sum(widths)), *widths]).tolist()
    ys = np.cumsum([rng.randint(margin, high - margin - rows * height)] + [height] * rows).tolist()
    rule = rng.randint(0, 1)  # pixels between cells
    image = Image.new("RGB", (wide, high), colours["page"])
    draw = ImageDraw.Draw(image)
    _block(draw, (xs[0], ys[0], xs[-1] + rule, ys[-1] + rule), colours["ink"])
    boxes = {}
    for cell, text in cells.items():
        boxes[cell] = (xs[cell[0]] + rule, ys[cell[1]] + rule, xs[cell[2]], ys[cell[3]])
        _block(draw, boxes[cell], colours["head" if cell[0] < left or cell[1] < top else "page"])
        _write(draw, boxes[cell], text, letters, colours["ink"])
    return f"Point at the {asked}.", boxes[target], image

def _bars(rng, size, colours, text=False, alike=False):
    """(question, box, image) of bars on a line; `text` asks for the bar of a name or a height."""
    count = rng.randint(*size)
    most = rng.randint(300, 600) if text else rng.randint(76, 90)
    for _ in tries(f"clear heights for {count} bars"):
        heights = [rng.randint(most // 10, most) for _ in range(count)]
        if min(np.diff(sorted(heights))[[0, -1]]) >= 5:  # the tallest and the lowest are clear
            break
    slot = rng.randint(80, 120) if text else rng.randint(8, 92 // count)
    thick = rng.randint(max(5, slot * 2 // 5), slot * 9 // 10)
    left = 80 if text else rng.randint(2, CANVAS - 2 - slot * count)
    right = left + slot * count
    base = most + 60 if text else rng.randint(most + 2, 94)
    xs = range(left + (slot - thick) // 2, right, slot)
    boxes = [(x, base - high, x + thick, base) for x, high in zip(xs, heights)]
    fills = [colours["fill"]] * count
    target = rng.randrange(count) if text else _mark_parts(rng, fills, alike)
    sides = (right + 20, base + 50) if text else (CANVAS, CANVAS)
    image = Image.new("RGB", sides, colours["page"])
    draw = ImageDraw.Draw(image)
    question = "find the red"
    if text:
        names = rng.sample(rng.choice((CITIES, GOODS, YEARS)), count)
        _write_bars(rng, draw, names, left, base, right, most, colours)
        options = [("tallest bar", np.argmax(heights)), ("lowest bar", np.argmin(heights)),
                   (f"bar of '{names[target]}'", target)]
        asked, target = rng.choice(options)
        question = f"Point at the {asked}."
    for box, fill in zip(boxes, fills):
        _block(draw, box, fill)
    _block(draw, (left - 1, base, right, base + 1), colours["ink"])
    x0, y0, x1, y1 = boxes[target]
    if text or rng.random() < 0.7:
        return question, boxes[target], image
    image = image.transpose(Image.Transpose.ROTATE_270)  # a quarter turn to the right
    return question, (CANVAS - y1, x0, CANVAS - y0, x1), image

def _write_bars(rng, draw, names, left, base, right, most, colours):
    """Write title, ticks and names around bars of at most `most` pixels."""
    letters = font(rng.randint(12, 18))
    title = rng.choice(("Sales", "Stock", "Orders", "Visits", "Output"))
    _write(draw, (left, 0, right, 50), title, letters, colours["ink"])
    unit = rng.choice((1, 2, 5, 10))  # of one pixel
    for up in range(0, most + 1, rng.choice((50, 100))):
        _block(draw, (left - 6, base - up, right, base - up + 1), colours["head"])
        _write(draw, (0, base - up, left - 6, base - up), str(up * unit), letters, colours["ink"])
    slot = (right - left) // len(names)
    for x, name in zip(range(left, right, slot), names):
        _write(draw, (x, base, x + slot, base + 50), name, letters, colours["ink"])

def _scatter(rng, size, colours, text=False, alike=False):
    """(question, box, image) of dots between two axes; those of `text` have names."""
    names = rng.sample(CITIES + GOODS, rng.randint(*size))
    radius = rng.randint(4, 8) if text else 3
    width, height = (rng.randint(700, 1000), rng.randint(600, 900)) if text else (CANVAS, CANVAS)
    edge = rng.randint(20, 40) if text else rng.randint(2, 6)  # pixels outside of the axes
    reach = 0  # pixels that a name takes beside its dot, so that no other dot or name touches it
    if text:
        letters = font(rng.randint(12, 18))
        reach = max(45, 8 + math.ceil(max(letters.getlength(name) for name in names)))
    base = height - edge - 1
    dots = []
    for _ in tries(f"place for {len(names)} dots"):
        x = rng.randrange(edge + radius + 1, width - radius - reach)
        y = rng.randrange(radius + edge * text, base - radius)
        if all(math.dist((x, y), dot) > 2 * radius + reach for dot in dots):
            dots.append((x, y))
        if len(dots) == len(names):
            break
    fills = [colours["fill"]] * len(names)
    target = rng.randrange(len(names)) if text else _mark_parts(rng, fills, alike)
    image = Image.new("RGB", (width, height), colours["page"])
    draw = ImageDraw.Draw(image)
    _block(draw, (edge, 0, edge + 1, base + 1), colours["ink"])
    _block(draw, (edge, base, width, base + 1), colours["ink"])
    for (x, y), fill, name in zip(dots, fills, names):
        draw.circle((x, y), radius, fill=fill)
        if text:
            draw.text((x + radius + 4, y), name, colours["ink"], letters, anchor="lm")
    question = f"Point at the dot labelled '{names[target]}'." if text else "find the red"
    x, y = dots[target]
    return question, (x - radius, y - radius, x + radius + 1, y + radius + 1), image

def draw_crop(image, point, side, mark=True):
    """The side x side pixels around a point (x, y), at the picture's resolution, with a ring."""
    half = side // 2
    crop = Image.new("RGB", (side, side), "#808080")  # grey beyond the edge of the picture
    crop.paste(image, (half - round(point[0]), half - round(point[1])))
    draw = ImageDraw.Draw(crop)
    radius = max(3, round(side / 24))
    rings = ((0, MARK, 1 if side < 64 else 2),) if side < 100 else ((2, "white", 5), (1, "red", 3))
    for more, colour, width in rings if mark else ():
        draw.circle((half, half), radius + more, outline=colour, width=width)
    return crop

def draw_hairs(image, point):
    """A copy of the whole picture with cross hairs through a point (x, y) and a ring around it."""
    copy = image.convert("RGB")
    draw = ImageDraw.Draw(copy)
    x, y = round(point[0]), round(point[1])
    thick = max(2, round(max(image.size) / 400))
    draw.line((x, 0, x, image.height), fill=MARK, width=thick)
    draw.line((0, y, image.width, y), fill=MARK, width=thick)
    draw.circle((x, y), 3 + 2 * thick, outline=MARK, width=thick)
    draw.circle((x, y), thick, fill=MARK)
    return copy

# ==================== 3. Data folders =============================================================
# A data folder holds images/, one <split>.jsonl of examples for each split, and data.json. An
# example is a dict with "id", "image" (a path relative to its file) and "size", [width, height].

def write_file(path, content):
    """Write text or bytes whole or not at all."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:  # a full disk: leave no half file to fill it further
        temporary.unlink(missing_ok=True)
        raise

def lock(folder, wait=False):
    """Keep other processes out of a folder until the file that this returns is closed."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(Path(folder) / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise UserError(f"{folder} is in use by another process: wait, or give run=NAME") from None
    return file

def digest(*paths):
    """A name of 16 hex digits for the contents of files, in this order."""
    whole = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]

def digest_of(values):
    """A name of 8 hex digits for what JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

def read_json(file):
    try:
        return json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): remove it") from None

def read_lines(file):
    """The lines of a JSONL log; the last one of a run that was killed may be cut off."""
    found = []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and {"stage", "step"} <= {*line}]

def load_image(path):
    """An image file as RGB, as a viewer shows it on a white page. UserError names the file."""
    try:
        # Opened by its name, a turned TIFF is mapped into memory, and Pillow garbles it.
        with open(path, "rb") as file, Image.open(file) as image:
            if max(image.size) > min(4096, 200 * min(image.size)):  # models refuse longer ones
                raise ValueError(f"{image.width} x {image.height} pixels: at most 4096 and 200:1")
            tags = getattr(image, "tag_v2", {})  # of a TIFF: 258 bits, 262 whether 0 is black
            grey = image.mode[:4], tags.get(258, (16,)), tags.get(262, 1)
            known = grey == ("I;16", (16,), 1) or (image.mode, image.format) == ("I", "PPM")
            keyed = image.format == "PNG" and image.mode != "P" and "transparency" in image.info
            if image.mode[0] in "IF" and not known or keyed and image.tile[0].args != image.mode:
                raise ValueError("unclear which value is white or transparent: save it in 8 bits")
            image = ImageOps.exif_transpose(image)
            if known:
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            page = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(page, image.convert("RGBA")).convert("RGB")
    except Exception as error:  # decoders raise many kinds for broken files
        raise UserError(f"{path}: not a usable image ({' '.join(str(error).split())})") from None

cached_image = functools.lru_cache(maxsize=256)(load_image)  # do not paint on what it returns

def find_file(folder, name):
    """The path of a file inside a resolved folder, or None. UserError if the name leads out."""
    path = folder / name
    there, inside = os.path.isfile(path), Path(os.path.normpath(path)).is_relative_to(folder)
    if not (path.resolve().is_relative_to(folder) if there else inside):
        raise UserError(f"{name!r} leads out of its folder" + " through a link" * inside)
    return path if there else None

def check_map(record):
    """UserError unless a record of navigation can be used."""
    check_layout(record.get("layout"))
    if record.get("look") not in (*LOOKS, *MIXES):
        raise UserError('"look" is missing or no name of a look')
    # A map has no question, and a box only where its picture has a margin.
    check_figure({"question": "the way", "within": 0, "box": [0, 0, 2, 2]} | record)

def check_figure(record):
    """UserError unless a record has a question, and a box within the size of its image."""
    if not isinstance(record.get("question"), str) or not record["question"].strip():
        raise UserError('"question" is missing or not a text')
    for key, count, least, form in (("size", 2, 1, "[width, height]"), ("within", 1, 0, "a number"),
                                    ("box", 4, -9999, "[x0, y0, x1, y1]")):
        values = [record.get(key)] if count == 1 else record.get(key)
        if not isinstance(values, list) or [True] * count != [  # NaN is not in the range
                type(value) in (int, float) and least <= value <= 9999 for value in values]:
            raise UserError(f'"{key}" is missing or not {form} in pixels')
    (x0, y0, x1, y1), (width, height) = record["box"], record["size"]
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise UserError(f"box {record['box']} is empty or leaves its image of {width} x {height}")
    if max(x1, y1) <= 1:
        raise UserError(f"box {record['box']} lies within 0..1 and looks normalised: give pixels")

def read_examples(path, check=lambda record: None):
    """The examples of a JSONL file. One without "id" is called line-N; images are not opened.
    UserError, "file:line: reason", for the first unusable line. check(record) may add to it."""
    folder = Path(path).parent.resolve()
    records = {}
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip(b" \t\r\xef\xbb\xbf"):
            continue
        try:
            record = {"id": f"line-{number}"} | json.loads(line.decode("utf-8-sig"))
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair fails here
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{path}:{number}: not a JSON object in UTF-8") from None
        try:
            for key in ("id", "image"):
                if not isinstance(record.get(key), str) or not record[key]:
                    raise UserError(f'"{key}" is missing or not a text')
            if record["id"] in records:
                raise UserError(f"id {record['id']!r} is used twice")
            if not find_file(folder, record["image"]):
                raise UserError(f"image {record['image']!r} is no file in the folder of this file")
            check(record)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        records[record["id"]] = record
    return list(records.values())

def make_folder(folder, task, plan, make, **more):
    """Write a made data set, unless it is there. The same plan gives the same bytes.
    plan: {split: [arguments, ...]}, of what JSON can hold. make(rng, *arguments) gives (record,
    image); no layout or picture is in two places."""
    folder = Path(folder)
    about = {"task": task, "plan": hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16],
             "counts": {split: len(plan[split]) for split in plan}} | more
    if not folder.exists():
        with lock(folder.parent, wait=True):
            if not folder.exists():  # no other process has just made it
                _write_folder(folder, about, plan, make)

def _write_folder(folder, about, plan, make):
    """Write a data folder whole or not at all."""
    building = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)  # left by a process that was killed
    (building / "images").mkdir(parents=True)
    taken = set()  # hashes of all layouts and pictures so far
    try:
        for split in plan:
            rng = random.Random(split)
            lines = []
            row = {"label": split, "images": [], "captions": [], "verdicts": [""] * 6}
            for arguments in tqdm(plan[split], split, disable=None):
                for _ in tries(f"new picture for {split} after {len(lines)}"):
                    record, image = make(rng, *arguments)
                    # A layout in another look is no new map: no test asks for what was taught.
                    shown = "/".join(record.get("layout", [])).encode() or image.tobytes()
                    if (known := hashlib.sha256(shown).digest()) not in taken:
                        break
                taken.add(known)
                name = f"{split}-{len(lines):04d}"
                record |= {"id": name, "image": f"images/{name}.png", "size": image.size}
                image.save(building / record["image"], compress_level=1)
                lines.append(json.dumps(record) + "\n")
                if len(lines) <= 6:
                    if "question" in record:  # then its box is the target, shown by a frame
                        x0, y0, x1, y1 = record["box"]
                        frame = (x0, y0, x1 - 1, y1 - 1)
                        ImageDraw.Draw(image).rectangle(frame, outline="magenta")
                    row["images"].append(image)
                    row["captions"].append(record.get("question", name))
            write_file(building / f"{split}.jsonl", "".join(lines))
            film_strip(building / f"preview_{split}.png", [row], side=500)
        write_file(building / "data.json", json.dumps(about, indent=2) + "\n")
        os.sync()  # thousands of pictures: all at once
        building.replace(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)  # a success leaves nothing of it

def own_examples(file, check_text=lambda name, text: None):
    """{"train", "dev_id", "test_id": examples} of one's own JSONL of "image", "question", "box".
    check_text(name, text) raises UserError where the model cannot read a question."""
    parts = {"train": [], "dev_id": [], "test_id": []}

    def sort(record):
        image = cached_image(Path(file).parent / record["image"])
        known = {key: record.get(key) for key in ("id", "image", "question", "box")}
        check_text("its question", str(known["question"]))
        record.clear()
        record |= known | {"size": [*image.size], "within": 0}
        tenth = hashlib.sha256(image.tobytes()).digest()[0] % 10  # a copy stays in its part
        check_figure(record)
        parts[{0: "dev_id", 1: "test_id"}.get(tenth, "train")].append(record)

    read_examples(file, sort)
    if not all(parts.values()):
        raise UserError(f"{file}: too few images to divide them 8:1:1 by their contents; add some")
    return parts

def make_official(data, maps, evals, cell):
    """The authors' maps as a data folder under `data`; returns that folder.

    maps: their JSON of training maps; evals: of test maps, or several with commas between. A PNG
    where the file names it is used; another map is drawn, and its record says "drawn": "here".
    """
    plan = {"train": [], "test_id": [], "test_size": []}
    for number, file in enumerate([maps, *evals.split(",")]):
        for layout, picture in _read_official(file, number == 0) if file else ():
            split = "test_id" if len(layout) <= 5 else "test_size"
            plan[split if number else "train"].append((layout, picture, cell))
    times = Counter("/".join(layout) for split in plan for layout, _, _ in plan[split])
    if {*times.values()} != {1}:
        raise UserError(f"{maps} {evals}: no map, or one is there twice: {times.most_common(1)}")
    plan = {split: plan[split] for split in plan if plan[split]}
    for split in plan:
        random.Random(split).shuffle(plan[split])  # an evaluation takes the first: mix the sizes
    pictures = digest(*(picture for split in plan for _, picture, _ in plan[split] if picture))
    name = hashlib.sha256((json.dumps(plan) + pictures).encode()).hexdigest()[:8]
    folder = Path(data) / f"official-{name}"
    make_folder(folder, "navigation", plan, _official_map,
                splits=[split[5:] for split in plan if split != "train"])
    return folder

def _read_official(file, training):
    """[(layout, path of its picture or "")] of one of the authors' files."""
    folder = Path(file).resolve().parent
    found = []
    try:
        for entry in json.loads(Path(file).read_text(encoding="utf-8-sig")):
            about = entry if training else entry["metadata"]
            layout = ["".join(row) for row in about["layout"]]
            check_layout(layout)
            if [*map("".join(layout).index, "SG")] != [about["start_pos"], about["target_pos"]]:
                raise UserError("start_pos or target_pos is not where the layout has S or G")
            name = entry.get("input_image" if training else "input_map", "")
            found.append((layout, str(find_file(folder, name) or "")))
    except Exception as error:  # it can be wrong in many ways
        raise UserError(f"{file}: not the authors' map {len(found) + 1} ({error!r:.200})") from None
    return found

def _official_map(rng, layout, picture, cell):
    """(record, image) of one of the authors' maps, for make_folder."""
    image = load_image(picture) if picture else draw_grid(layout, "official", cell)
    more = {"box": ImageOps.invert(image).getbbox()} if picture else {"drawn": "here"}
    return {"layout": layout, "look": "official"} | more, image  # the box is what is not white

# ==================== 4. Pictures for people ======================================================
TEXT, FAINT = (40, 44, 52), (120, 126, 136)
FRAMES = {"right": (0, 158, 115), "wrong": (213, 60, 40), "": (190, 195, 203)}
# Okabe and Ito's palette: colour-blind readers too can tell its colours apart.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000", "#968C28"]

def film_strip(path, rows, title="", side=150, most=6):
    """Write episodes as rows of at most `most` pictures, `side` pixels at the longer side. rows:
    dicts with a "label" and, of one length, "images" [PIL], "captions" [str] and "verdicts"
    ["right", "wrong" or ""]."""
    gap = 18
    sheet = Image.new("RGB", (gap + most * (side + gap), 100 + len(rows) * (side + 500)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 12), title, TEXT, font(18))
    bottom = 44
    for row in rows:
        draw.text((gap, bottom), row["label"], TEXT, font(14))
        x, top = gap, bottom + 24
        for image, caption, verdict in zip(row["images"][:most], row["captions"], row["verdicts"]):
            image = ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.BOX)
            sheet.paste(ImageOps.expand(image, 3, FRAMES[verdict]), (x - 3, top - 3))
            y = top + image.height + 4
            for line in textwrap.wrap(caption[:400], side // 8):
                draw.text((x, y), line, TEXT, font(13))
                y += 16
            bottom = max(bottom, y + gap)
            x += side + gap
    sheet.crop((0, 0, sheet.width, bottom)).save(path)

def line_charts(path, panels, columns=3):
    """Write line charts of panels [(title, {series name: (xs, ys)}), ...]; None leaves a gap."""
    sheet = Image.new("RGB", (columns * 680, math.ceil(len(panels) / columns) * 480), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, series) in enumerate(panels):
        _draw_chart(draw, i % columns * 680, i // columns * 480, title, series)
    sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS).save(path)

def _draw_chart(draw, left, top, title, series):
    """One chart of 680 x 480 pixels."""
    draw.text((left + 104, top + 14), title, TEXT, font(28))
    x, y = left + 104, top + 52
    lines = []
    for name, values in series.items():
        if x > left + 104 and x + font(22).getlength(name) > left + 660:
            x, y = left + 104, y + 26
        draw.text((x, y), name, PALETTE[len(lines) % len(PALETTE)], font(22))
        x += 24 + font(22).getlength(name)
        lines.append(np.array(values, dtype=float).T)  # None becomes NaN
    known = np.concatenate([np.zeros((0, 2)), *lines])
    known = known[np.isfinite(known[:, 1])]
    low, high = (known.min(0), known.max(0)) if len(known) else np.zeros((2, 2))
    x0, y0, x1, y1 = left + 104, y + 44, left + 648, top + 424
    draw.rectangle((x0, y0, x1, y1), outline=FRAMES[""], width=2)
    for point, value, anchor in (((x0 - 10, y1), low[1], "rm"), ((x0 - 10, y0), high[1], "rm"),
                                 ((x0, y1 + 8), low[0], "la"), ((x1, y1 + 8), high[0], "ra")):
        draw.text(point, f"{value:.4g}", FAINT, font(22), anchor=anchor)
    scale = (x1 - x0, y0 - y1) / np.where(high > low, high - low, 1)
    for i, line in enumerate(lines):
        points = (line - low) * scale + (x0, y1)
        for run in np.split(points, np.flatnonzero(np.isnan(points[:, 1]))):
            run = [(x, y) for x, y in run.tolist() if not math.isnan(y)]
            draw.line(run, PALETTE[i % len(PALETTE)], 4, joint="curve")
            if len(run) == 1:
                draw.circle(run[0], 5, PALETTE[i % len(PALETTE)])

CURVES = {"loss, nats a token": "loss", "reward": "reward", "accuracy, sampled": "first final",
          "commits": "commit", "commits of wrong answers": "commit_wrong rollin_commit_wrong",
          "repair after a wrong state": "rollin_repair", "turns": "turns", "entropy": "entropy",
          "well-formed, repeats": "well_formed repeats", "states": "wrong_states right_states",
          "shares: kept, roll-ins": "kept rollins", "gradient norm": "grad_norm", "KL": "kl"}

def curves(path, files):
    """Paint the lines of metrics.jsonl files: a chart for each stage and each row of CURVES."""
    panels, lines = [], [line for file in files for line in read_lines(file)]
    for stage in dict.fromkeys(line["stage"] for line in lines):
        of_stage = [line for line in lines if line["stage"] == stage]
        steps = [line["step"] for line in of_stage]
        for title, keys in CURVES.items():
            series = {key: (steps, [line.get(key) for line in of_stage]) for key in keys.split()}
            series = {key: pair for key, pair in series.items() if set(pair[1]) - {None, 0.0}}
            if series:
                panels.append((f"{stage}: {title}", series))
    line_charts(path, panels or [("nothing was trained", {})])

def table(models):
    """Markdown, percent: a line for each model and split, and for the mean out of distribution.
    models: {name: rows of vrrl.evaluate}."""
    keys = "first", "final", "repair_own", "repair_fixed", "break", "commit"
    lines = [f"| model | split | n | {' | '.join(keys).replace('_', ' ')} | turns |",
             "| --- " * (len(keys) + 4) + "|"]
    for model, rows in models.items():
        far = [row for row in rows if row["ood"]]
        mean = {"split": "**mean ood**", "n": sum(row["n"] for row in far)}
        for key in (*keys, "turns"):
            known = [row[key] for row in far if row[key] is not None]
            mean[key] = sum(known) / len(known) if known else None
        for row in [*rows, *([mean] if far else [])]:
            cells = ["-" if row[key] is None else f"{100 * row[key]:.1f}" for key in keys]
            cells = [model, row["split"], str(row["n"]), *cells, f"{row['turns']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

def main(words):
    """usage: python data_prep.py official maps=FILE eval=FILE[,FILE] [data=FOLDER] [cell=8..256]

    Makes a data folder of the authors' maps. Where their picture is missing, a cell has 64 pixels.
    """
    given = {"maps": "", "eval": "", "data": "data", "cell": "64"}
    given |= {word.partition("=")[0]: word.partition("=")[2] for word in words[1:]}
    if {"-h", "--help", "help"} & set(words):
        return print(main.__doc__)
    try:
        known = words[:1] == ["official"] and len(given) == 4 and (given["maps"] or given["eval"])
        if not known or given["cell"] not in map(str, range(8, 257)):
            raise UserError(main.__doc__.splitlines()[0])
        folder = make_official(given["data"], given["maps"], given["eval"], int(given["cell"]))
    except (UserError, OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'stopped'}", file=sys.stderr)
        sys.exit(2)
    print(f"use it with data={folder}")

if __name__ == "__main__":
    main(sys.argv[1:])
