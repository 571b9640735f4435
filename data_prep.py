"""Pictures and files of examples for vrrl.py: all that can be made and read without a model.
`rng` is always a random.Random. Colours are (R, G, B). Boxes are (x0, y0, x1, y1) in pixels, half
open: x0 <= x < x1.

    1. Navigation          maps, paths on them, right and wrong ways
    2. Grounding           figures with a question about one thing in them
    3. Data folders        files, digests, images and examples; making and reading data
    4. Pictures for people film strips of episodes, line charts, tables

What is made depends on a plan and on names alone: the same draws from `rng` in the same order give
the same bytes. Who adds a draw changes all that is made after it."""
import ast, functools, hashlib, json, math, os, random, shutil, sys, textwrap
from collections import Counter, namedtuple
from itertools import cycle, pairwise
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
    """10,000 turns for a loop that looks for something by chance; then UserError. A loop that finds
    it leaves by `break` or `return`."""
    yield from range(10_000)
    raise UserError(f"found no {what} in 10,000 tries: ask for fewer")

def random_colour(rng, low=0, high=255):
    """A colour whose three values are in this range."""
    return tuple(rng.randint(low, high) for _ in "RGB")

def far_colours(rng, count, used=()):
    """`count` random colours. Each is, of eight, the farthest from `used` and from those before."""
    used = list(used)  # The caller's list stays as it is.

    def distance(colour):
        return min([math.dist(colour, other) for other in used], default=0)

    for _ in range(count):
        options = [random_colour(rng) for _ in range(8)]
        used.append(max(options, key=distance))
    return used[-count:]

def near_colour(rng, colour):
    """A random colour at a distance of 70 to 110 from another one."""
    for _ in tries("near colour"):
        found = random_colour(rng)
        if 70 <= math.dist(found, colour) <= 110:
            return found

# ==================== 1. Navigation ===============================================================
# An elf walks over a frozen lake to a gift. A layout is a list of strings of S (start, the elf),
# F (frozen, safe), H (hole) and G (goal, the gift). Cells are (row, column) from the top left.

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}  # (row, column)
# Colours, and the shape of a hole. `alert` shows where a path leaves the grid, and nothing else.
Look = namedtuple("Look", "ground hole path alert coat hat box ribbon shape")
# Training sees "snow" and random mixes; night, desert and ink, with new shapes too, ask whether
# a skill survives a change of picture. "official" has the authors' colours.
LOOKS = {
    "snow": "#EEF5FA #48C #F81 #C0B #284 #C23 #C24 #FD4 disc",
    "night": "#263052 #85B #FD3 #F45 #5BD #EEF #4A5 #FFF square",
    "desert": "#ECD096 #832 #72A #E02 #45A #FFE #188 #FFE cross",
    "ink": "#FAF8F0 #222 #16D #E22 #555 #222 #BBB #111 ring",
    "official": "#F0F7FC #4CF #E10 #306 #384 #384 #347 #E82 disc",
}

def random_mix(rng, draw):
    """The name of one of the 40 random palettes of a draw of the data, see make.draw."""
    return f"mix{40 * draw + rng.randrange(40)}"

@functools.lru_cache(maxsize=None)
def look_of(name):
    """The Look of this name; the name of a mix decides its random colours."""
    if name in LOOKS:
        return Look(*LOOKS[name].split())
    rng = random.Random(name)
    # Far colours, so that all things differ from the ground and from each other.
    colours = far_colours(rng, 8)
    return Look(*colours, rng.choice(("disc", "square")))

# What a cell shows, on 400 x 400 pixels; a hole by its shape. Each row says what is painted, the
# colours of its inside and of its outline, the width of the outline, and the numbers x y x y ... of
# its corners.
ICONS = {
    "disc": "ellipse hole hole 72 52 52 348 348",
    "square": "rectangle hole hole 72 52 52 348 348",
    "ring": "ellipse ground hole 72 52 52 348 348",
    "cross": """polygon hole - 0 47 114 287 354 354 287 114 47
                polygon hole - 0 46 287 286 47 353 114 113 354""",
    "S": """polygon coat - 0 200 200 320 368 80 368
            ellipse skin hat 12 120 136 280 288
            polygon hat - 0 200 32 304 176 96 176
            ellipse eyes - 0 160 200 184 228
            ellipse eyes - 0 224 200 248 228""",
    "G": """rectangle box - 0 80 184 320 360
            rectangle box ribbon 10 56 136 344 200
            rectangle ribbon - 0 172 136 228 360
            ellipse - ribbon 32 96 48 200 144
            ellipse - ribbon 32 200 48 304 144""",
    "F": "",
}

@functools.lru_cache(maxsize=1024)
def _tile(name, cell, kind):
    """Picture of one cell. It is painted at 400 x 400 pixels and shrunk, for smooth edges."""
    look = look_of(name)
    colours = look._asdict() | {"skin": "#F0C49E", "eyes": "#141414", "-": None}
    icon = look.shape if kind == "H" else kind
    tile = Image.new("RGB", (400, 400), look.ground)
    draw = ImageDraw.Draw(tile)
    for row in ICONS[icon].splitlines():
        shape, inside, outline, width, *corners = row.split()
        corners = [int(number) for number in corners]
        paint = getattr(draw, shape)  # draw.ellipse, draw.polygon or draw.rectangle
        paint(corners, colours[inside], colours[outline], width=int(width))
    tile = tile.resize((cell, cell), Image.Resampling.BOX)
    # The line of the grid is a little darker than a pale ground, and paler than a dark one.
    ground = tile.getpixel((0, 0))
    tint = 0 if sum(ground) > 300 else 255
    colour = tuple((6 * value + tint) // 7 for value in ground)
    # Lines lie at the top and left only: the neighbours bring the others.
    width = max(1, cell // 24)
    ImageDraw.Draw(tile).line((0, cell, 0, 0, cell, 0), fill=colour, width=width)
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
    # Sizes, cells, steps and points are arrays (2,): y before x, as a cell is (row, column).
    size = np.array([bottom - top, right - left]) / shape  # of a cell in pixels
    thick = max(2, round(min(size) / 6))
    cell = np.array(start)
    here = first = (top, left) + (cell + 0.5) * size
    times = Counter()  # how often the path takes each stretch between two cells
    step = None  # the last one inside the grid, if the path ends inside
    for move in moves[:100]:  # A rambling answer must not slow training down.
        step = np.array(MOVES[move])
        across = abs(step[::-1])
        there = cell + step
        if there.min() < 0 or (there >= shape).any():
            # The path ends at the edge of its cell, and a bar lies along that edge.
            half = (size - thick) / 2
            edge = here + step * half
            _draw_bar(draw, here, edge, thick, look.path)
            _draw_bar(draw, edge - across * half, edge + across * half, thick, look.alert)
            step = None
            break
        end = here + step * size
        corners = [here, end]
        # A stretch walked again is painted beside the first time, so that it does not vanish.
        stretch = tuple(cell + there)  # twice its middle: the same there and back
        aside = across * thick * (0, 1.5, -1.5)[times[stretch] % 3]
        times[stretch] += 1
        if aside.any():
            corners = [here, here + aside, end + aside, end]
        for a, b in pairwise(corners):
            _draw_bar(draw, a, b, thick, look.path)
        cell, here = there, end
    _draw_ends(draw, first, here, step, min(size), look)
    return image

def _draw_bar(draw, a, b, thick, colour):
    """A bar between two points of a row or a column; its square ends close the corners."""
    half = (thick - 1) / 2
    y0, x0 = (np.minimum(a, b) - half).astype(int)
    y1, x1 = (np.maximum(a, b) + half).astype(int)
    draw.rectangle((x0, y0, x1, y1), fill=colour)

def _draw_ends(draw, first, last, step, size, look):
    """A hollow square at the first point and, after a step, an arrow head at the last point; size:
    of a cell."""
    # Whole pixels keep the square and the arrow head symmetric at 16 pixels a cell.
    for share, colour in ((0.2, look.path), (0.07, look.ground)):
        side = 2 * round(share * size) + 1
        _draw_bar(draw, first, first, side, colour)
    if step is not None:
        y, x = last.astype(int)
        dy, dx = round(0.36 * size) * step
        # The tip, then the two corners on the axis across the step.
        draw.polygon((x + dx, y + dy, x + dy, y + dx, x - dy, y - dx), fill=look.path)

def find_cell(layout, kind):
    """(row, column) of the first cell of this kind."""
    for row, kinds in enumerate(layout):
        if kind in kinds:
            return row, kinds.index(kind)

def _around(layout, cell):
    """The cells beside a cell, as (move, cell)."""
    for move, (down, right) in MOVES.items():
        row, column = cell[0] + down, cell[1] + right
        if 0 <= row < len(layout) and 0 <= column < len(layout[0]):
            yield move, (row, column)

def shortest_distances(layout):
    """Least moves from each cell to the goal: int array (rows, columns), -1 where no way exists."""
    distance = np.full((len(layout), len(layout[0])), -1)
    queue = [find_cell(layout, "G")]
    distance[queue[0]] = 0
    for cell in queue:  # The queue grows meanwhile.
        for _, there in _around(layout, cell):
            row, column = there
            if layout[row][column] != "H" and distance[there] < 0:
                distance[there] = distance[cell] + 1
                queue.append(there)
    return distance

def check_layout(layout):
    """Raise UserError unless this is a solvable layout of 2 to 16 rows and columns."""
    if not isinstance(layout, list) or {type(row) for row in layout} != {str}:
        raise UserError("layout is not a list of strings")
    widths = {len(row) for row in layout}
    if len(widths) > 1 or min(widths) < 2 or not 2 <= len(layout) <= 16 or max(widths) > 16:
        raise UserError("layout needs 2 to 16 rows, all of the same length of 2 to 16 letters")
    if sorted("".join(layout).replace("F", "").replace("H", "")) != ["G", "S"]:
        raise UserError("layout needs one S and one G; its other letters must be F and H")
    if shortest_distances(layout)[find_cell(layout, "S")] < 0:
        raise UserError("layout has no way from S to G")

def shortest_path(layout, rng):
    """Moves of one shortest path; every step picks evenly among the moves that come closer.
    "S F / F G" has two of them, ["right", "down"] and ["down", "right"]."""
    distance = shortest_distances(layout)
    cell = find_cell(layout, "S")
    path = []
    while distance[cell] > 0:
        nearer = distance[cell] - 1
        steps = [step for step in _around(layout, cell) if distance[step[1]] == nearer]
        move, cell = rng.choice(steps)
        path.append(move)
    return path

def wrong_path(layout, path, exact, rng):
    """A wrong answer near `path`, a shortest one: a non-empty list for which exact(moves) fails."""
    # Half the answers go straight to the goal, through holes: a model's most frequent mistake.
    down, right = np.subtract(find_cell(layout, "G"), find_cell(layout, "S")).tolist()
    # A list times a negative number is empty.
    straight = ["down"] * down + ["up"] * -down + ["right"] * right + ["left"] * -right
    back = {"up": "down", "down": "up", "left": "right", "right": "left"}
    while True:
        place = rng.randrange(len(path))
        there = rng.choice(list(MOVES))
        mixed = rng.sample(straight, len(straight))
        stray = rng.choices(list(MOVES), k=rng.randint(1, len(path) + 2))
        # One move differs, or there is a detour.
        middle = rng.choice([stray[:1], [there, path[place], back[there]]])
        changed = path[:place] + middle + path[place + 1:]
        shorter = path[:-rng.randint(1, 2)]
        longer = path + stray[:2]
        wrong = rng.choice([straight, straight, mixed, mixed, stray, shorter, longer, changed])
        if wrong and not exact(wrong):
            return wrong

def navigation_plan(train, test, cell, draw=0):
    """{split: [(n, look, cell), ...]}. Test comes first: other counts leave it as it is."""
    splits = {
        "id": ((3, 4, 5), ["snow"]),  # sides of maps, looks
        "size": ((6, 7), ["snow"]),
        "look": ((3, 4, 5), ["night", "desert", "ink"]),
    }
    plan = {}
    for part in ("test", "dev"):
        for name, (sizes, looks) in splits.items():
            maps = [(size, look, cell) for look in looks for size in sizes]
            plan[f"{part}_{name}"] = (maps * test)[:test]  # each in turn
    # 30 % of the training maps are 4 x 4, most others 5 x 5. Every fourth has the look of test_id.
    rng = random.Random(f"order {draw}")
    sizes = [3] * min(300, train // 10)  # Few maps of 3 x 3 exist.
    sizes += [4] * round(0.3 * train)
    sizes += [5] * (train - len(sizes))
    rng.shuffle(sizes)
    plan["train"] = []
    for number, size in enumerate(sizes):
        look = random_mix(rng, draw) if number % 4 else "snow"
        plan["train"].append((size, look, cell))
    return plan

def make_map(rng, n, look, cell):
    """(record, image) of a new n x n map of cells of so many pixels: 10 to 35 % are holes, and the
    goal is 2 or more moves away."""
    least = rng.randint(2, n) if n >= 4 else 2  # Otherwise near goals prevail.
    for _ in tries("map"):
        holes = round(rng.uniform(0.1, 0.35) * (n * n - 2))
        kinds = "SG" + "H" * holes  # Each takes a cell of its own.
        cells = ["F"] * (n * n)
        for kind, place in zip(kinds, rng.sample(range(n * n), len(kinds))):
            cells[place] = kind
        layout = textwrap.wrap("".join(cells), n)  # rows of n letters
        # Where no way exists, the distance is -1.
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
    "embedded": {
        "id": ("table", (3, 6)),
        "large": ("table", (12, 14)),
        "bars": ("bars", (9, 11)),
        "scatter": ("scatter", (22, 28)),
    },
    "text": {
        "id": ("table", (5, 15)),
        "large": ("table", (20, 50)),
        "cell": ("cell", (5, 15)),
        "bars": ("bars", (5, 10)),
        "scatter": ("scatter", (10, 20)),
    },
}
LOOK_ALIKES = 4, 8  # lowest and highest number in a picture
Colours = namedtuple("Colours", "page head ink fill")  # of one figure

def figure_plan(kind, train, test, draw=0):
    """{split: [(shape, size, kind, draw, look-alikes), ...]}; test is first, as for navigation."""
    plan = {}
    # Test and dev have every split; training sees "id" alone.
    for part in ("test", "dev"):
        for name, (shape, size) in FIGURES[kind].items():
            alike = kind == "embedded" and name != "id"
            plan[f"{part}_{name}"] = [(shape, size, kind, draw, alike)] * test
    shape, size = FIGURES[kind]["id"]
    plan["train"] = [(shape, size, kind, draw)] * train
    return plan

def make_figure(rng, shape, size, kind="embedded", draw=0, alike=False):
    """(record, RGB image) of a shape in FIGURES; `size` is (lowest, highest) number of its parts;
    draw: whose palettes it has; alike: whether an embedded figure has LOOK_ALIKES.

    record: question, box of the target, shape, and `within`: a point is right within so many
    pixels of the middle of the box, or, where that is 0, inside the box.
    """
    text = kind == "text"
    if text:  # Pale and dark colours: all words can be read.
        page = random_colour(rng, 236, 255)
        head = random_colour(rng, 200, 230)
        ink = random_colour(rng, 0, 100)
        fill = random_colour(rng, 90, 190)
        colours = Colours(page, head, ink, fill)
    else:  # One of 40 palettes, far from the colours that mean something.
        palette = random.Random(random_mix(rng, draw))
        colours = Colours(*far_colours(palette, 4, [RED, BLUE, MARK]))
    if shape == "scatter":
        figure = _scatter(rng, size, colours, text, alike)
    elif shape == "bars" and text:
        figure = _text_bars(rng, size, colours)
    elif shape == "bars":
        figure = _embedded_bars(rng, size, colours, alike)
    elif text:
        figure = _text_table(rng, size, colours, shape == "cell")
    else:
        figure = _embedded_table(rng, size, colours, alike)
    question, box, image = figure
    within = 40 if text and shape != "bars" else 0
    return {"question": question, "box": list(box), "within": within, "shape": shape}, image

# Each painter below returns (question, box of the target, image). image.paste(colour, box) fills a
# half-open box.

def _mark_parts(rng, fills, alike):
    """Make some of these colours look-alikes, then up to three BLUE and one RED; its index."""
    places = range(len(fills))
    if alike:
        count = rng.randint(*LOOK_ALIKES)
        for place in rng.sample(places, count):
            fills[place] = near_colour(rng, RED)
    for place in rng.sample(places, rng.randint(0, 3)):
        fills[place] = BLUE
    red = rng.choice(places)
    fills[red] = RED
    return red

def _embedded_table(rng, size, colours, alike):
    """A table without words; `size` counts its headers too."""
    columns, rows = rng.randint(*size), rng.randint(*size)
    xs = _embedded_edges(rng, columns)
    ys = _embedded_edges(rng, rows)
    rule = rng.randint(0, 1)  # pixels between cells
    boxes, fills = [], []
    for y0, y1 in pairwise(ys):
        for x0, x1 in pairwise(xs):
            boxes.append((x0 + rule, y0 + rule, x1, y1))
            is_head = x0 == xs[0] or y0 == ys[0]
            fill = colours.head if is_head else colours.page
            fills.append(fill)
    red = _mark_parts(rng, fills, alike)  # the number of the target's cell
    image = Image.new("RGB", (CANVAS, CANVAS), colours.page)
    # All cells stand on one block of ink, which shows between them.
    image.paste(colours.ink, (xs[0], ys[0], xs[-1] + rule, ys[-1] + rule))
    full = rng.random()  # share of the cells that hold a dash
    for box, fill in zip(boxes, fills):
        image.paste(fill, box)
        # A dash stands for words: it begins at the left and may end anywhere.
        if rng.random() < full:
            x0, y0, x1, y1 = box
            y = (y0 + y1) // 2
            end = rng.randint(x0 + 3, x1 - 1)
            image.paste(colours.ink, (x0 + 1, y - 1, end, y + 1))
    return "find the red", boxes[red], image

def _embedded_edges(rng, count):
    """The count + 1 edges of `count` cells along one side of a picture."""
    # Cells of small tables are about as large as those of large ones: crops of both look alike.
    # With 14 parts a cell keeps 5 pixels, so it contains a multiple of 4 for the model.
    length = CANVAS if count > 6 else round(count * rng.uniform(7, 16))
    ends = np.cumsum([0] + [rng.uniform(1, 1.2) for _ in range(count)])
    first = rng.randint(0, CANVAS - length)
    edges = first + ends * length / ends[-1]
    return edges.round().astype(int).tolist()

def _text_table(rng, size, colours, inner):
    """A table with headers; it asks for a lowest header or, if `inner`, for a cell of the body."""
    height, width = rng.randint(*size), rng.randint(*size)  # of the body, in cells
    top, left = rng.randint(1, 3), rng.randint(1, 2)  # levels of headers
    # The numbers of the columns and rows of the body. The headers have those from 0.
    columns = range(left, left + width)
    rows = range(top, top + height)
    column_words, row_words = rng.sample((CITIES, GOODS, YEARS), 2)
    across = _sample_headers(rng, columns, top, column_words, top > 1)
    down = _sample_headers(rng, rows, left, row_words, False)
    cells = []
    for x in columns:  # The numbers of a column have one form.
        form = rng.choice("{:.0f} {:.1f} {:.2f} {:,.0f} ${:.0f}".split())
        most = 10 ** rng.randint(2, 4)
        cells += [(x, y, x + 1, y + 1, form.format(rng.uniform(0, most))) for y in rows]
    # Headers of rows are headers of columns after x and y have changed places.
    cells += [(x0, y0, x1, y1, name) for y0, x0, y1, x1, name in down]
    cells += across
    cells.append((0, 0, left, top, ""))
    x, y = rng.choice(columns), rng.choice(rows)
    column_name = " under ".join(_names_at(across, x)[:2])
    row_name = _names_at(down, y)[0]
    # A lowest name may be there in each group: the name of its group makes it clear.
    if inner:
        asked, target = f"cell in row {row_name} and column {column_name}", (x, y)
    else:
        column_header = f"column header {column_name}", (x, top - 1)
        row_header = f"row header {row_name}", (left - 1, y)
        asked, target = rng.choice((column_header, row_header))
    boxes, image = _paint_table(rng, cells, columns, rows, colours)
    return f"Point at the {asked}.", boxes[target], image

def _sample_headers(rng, columns, levels, words, repeat):
    """Cells over a range of columns, from the lowest level to level 0, as `_paint_table` has them.
    With `repeat` the lowest headers are called the same in each group; no other name is there
    twice."""
    # Names are taken from the end: first the words alone, then "Oslo 2" and so on.
    names = [f"{word} {n}" for n in (4, 3, 2) for word in words]
    names += rng.sample(words, len(words))
    span = rng.randint(2, 4)  # headers under one of the next level
    group = []
    if repeat:
        group = rng.choice(("Q1 Q2 Q3 Q4", "low mean high sum")).split()
    headers = []
    step = 1  # columns under one header
    for level in reversed(range(levels)):
        for number, first in enumerate(columns[::step]):
            name = group[number % span] if group else names.pop()
            end = min(first + step, columns.stop)
            headers.append((first, level, end, level + 1, name))
        group = []
        step *= span
    return headers

def _names_at(headers, column):
    """The names over a column, in quotes; the lowest comes first."""
    return [f"'{name}'" for first, _, end, _, name in headers if first <= column < end]

def _paint_table(rng, cells, columns, rows, colours):
    """({(column, row) of a cell's first corner: box}, image).
    cells: [(first column, first row, column after the last, row after the last, text), ...], a
    wide one after the narrower ones below it. columns, rows: ranges of those of the body."""
    # Large tables have small letters and little space, so that the picture stays small.
    most_size, most_spare = (18, 40) if columns.stop < 20 else (14, 14)
    letters = font(rng.randint(12, most_size))
    spare = rng.randint(8, most_spare)  # pixels beside a text
    widths = _column_widths(cells, columns.stop, letters, spare)
    most_spare = 24 if rows.stop < 20 else 12
    line = letters.size + rng.randint(6, most_spare)  # pixels of a row
    margin = rng.randint(4, 60)
    xs, width = _text_edges(rng, widths, margin)
    ys, height = _text_edges(rng, [line] * rows.stop, margin)
    rule = rng.randint(0, 1)  # pixels between cells
    image = Image.new("RGB", (width, height), colours.page)
    draw = ImageDraw.Draw(image)
    image.paste(colours.ink, (xs[0], ys[0], xs[-1] + rule, ys[-1] + rule))
    boxes = {}
    for x0, y0, x1, y1, text in cells:
        box = xs[x0] + rule, ys[y0] + rule, xs[x1], ys[y1]
        in_body = x0 in columns and y0 in rows
        fill = colours.page if in_body else colours.head
        image.paste(fill, box)
        _write(draw, box, text, letters, colours.ink)
        boxes[x0, y0] = box
    return boxes, image

def _column_widths(cells, count, letters, spare):
    """Pixels of each column, so that every text has its place."""
    widths = [0] * count
    for first, _, end, _, text in cells:
        needed = math.ceil(letters.getlength(text)) + spare
        # A text that is too wide widens the last of its columns.
        widths[end - 1] += max(0, needed - sum(widths[first:end]))
    return widths

def _text_edges(rng, lengths, margin):
    """(edges of parts of these lengths, side of the picture). At least `margin` pixels are free at
    both ends, more where the table is small."""
    length = sum(lengths)
    side = max(400, length + 2 * margin)
    first = rng.randint(margin, side - margin - length)
    return np.cumsum([first] + lengths).tolist(), side

def _write(draw, box, text, letters, ink):
    """Text in the middle of a box."""
    x0, y0, x1, y1 = box
    draw.text(((x0 + x1) / 2, (y0 + y1) / 2), text, ink, letters, anchor="mm")

def _sample_bars(rng, count, most, slots):
    """(heights of up to `most` pixels, pixels from one bar to the next, pixels of a bar)"""
    for _ in tries(f"clear heights for {count} bars"):
        heights = [rng.randint(most // 10, most) for _ in range(count)]
        gaps = np.diff(sorted(heights))
        if gaps[0] >= 5 and gaps[-1] >= 5:  # The tallest and the lowest bar are clear.
            break
    slot = rng.randint(*slots)
    thick = rng.randint(max(5, slot * 2 // 5), slot * 9 // 10)
    return heights, slot, thick

def _bar_boxes(heights, left, base, slot, thick):
    """Boxes of bars that stand on a line at y = base, each in the middle of its slot; the first
    slot begins at `left`. slot, thick: pixels from one bar to the next, and of a bar."""
    x = left + (slot - thick) // 2
    boxes = []
    for height in heights:
        boxes.append((x, base - height, x + thick, base))
        x += slot
    return boxes

def _embedded_bars(rng, size, colours, alike):
    """Bars on a line; sometimes the picture takes a quarter turn."""
    count = rng.randint(*size)
    most = rng.randint(76, 90)
    heights, slot, thick = _sample_bars(rng, count, most, (8, 92 // count))
    left = rng.randint(2, CANVAS - 2 - slot * count)
    base = rng.randint(most + 2, 94)
    boxes = _bar_boxes(heights, left, base, slot, thick)
    fills = [colours.fill] * count
    red = _mark_parts(rng, fills, alike)
    image = Image.new("RGB", (CANVAS, CANVAS), colours.page)
    for box, fill in zip(boxes, fills):
        image.paste(fill, box)
    image.paste(colours.ink, (left - 1, base, left + slot * count, base + 1))
    x0, y0, x1, y1 = box = boxes[red]
    if rng.random() >= 0.7:
        # (x, y) goes to (CANVAS - y, x).
        image = image.transpose(Image.Transpose.ROTATE_270)  # to the right
        box = CANVAS - y1, x0, CANVAS - y0, x1
    return "find the red", box, image

def _text_bars(rng, size, colours):
    """Bars with names; it asks for the tallest, for the lowest, or for the bar of a name."""
    count = rng.randint(*size)
    most = rng.randint(300, 600)  # pixels of a bar
    heights, slot, thick = _sample_bars(rng, count, most, (80, 120))
    left, base = 80, most + 60
    right = left + slot * count
    named = rng.randrange(count)
    names = rng.sample(rng.choice((CITIES, GOODS, YEARS)), count)
    image = Image.new("RGB", (right + 20, base + 50), colours.page)
    draw = ImageDraw.Draw(image)
    letters = font(rng.randint(12, 18))
    title = rng.choice("Sales Stock Orders Visits Output".split())
    _write(draw, (left, 0, right, 50), title, letters, colours.ink)
    unit = rng.choice((1, 2, 5, 10))  # of one pixel
    step = rng.choice((50, 100))  # pixels from one tick to the next
    for up in range(0, most + 1, step):
        y = base - up
        image.paste(colours.head, (left - 6, y, right, y + 1))
        _write(draw, (0, y, left - 6, y), str(up * unit), letters, colours.ink)
    boxes = _bar_boxes(heights, left, base, slot, thick)
    for x, box, name in zip(range(left, right, slot), boxes, names):
        image.paste(colours.fill, box)
        _write(draw, (x, base, x + slot, base + 50), name, letters, colours.ink)
    image.paste(colours.ink, (left - 1, base, right, base + 1))
    # It asks for one of three.
    bars = [("tallest bar", np.argmax(heights)), ("lowest bar", np.argmin(heights)),
            (f"bar of '{names[named]}'", named)]
    asked, target = rng.choice(bars)
    return f"Point at the {asked}.", boxes[target], image

def _scatter(rng, size, colours, text, alike):
    """Dots between two axes. With `text` they have names, and it asks for the dot of one."""
    names = rng.sample(CITIES + GOODS, rng.randint(*size))
    fills = [colours.fill] * len(names)
    if text:
        radius = rng.randint(4, 8)
        width, height = rng.randint(700, 1000), rng.randint(600, 900)
        edge = top = rng.randint(20, 40)  # pixels that are free
        letters = font(rng.randint(12, 18))
        longest = max([letters.getlength(name) for name in names])
        # A name stands beside its dot. No other dot or name may touch it.
        reach = max(45, 8 + math.ceil(longest))
    else:
        radius, width, height = 3, CANVAS, CANVAS
        edge = rng.randint(2, 6)
        reach = top = 0
    base = height - edge - 1
    # A dot touches neither an axis nor the edge of the picture, nor does its name.
    xs = range(edge + radius + 1, width - radius - reach)
    ys = range(top + radius, base - radius)
    dots = _sample_dots(rng, len(names), xs, ys, 2 * radius + reach)
    image = Image.new("RGB", (width, height), colours.page)
    draw = ImageDraw.Draw(image)
    image.paste(colours.ink, (edge, 0, edge + 1, base + 1))
    image.paste(colours.ink, (edge, base, width, base + 1))
    if text:
        target = rng.randrange(len(names))
        question = f"Point at the dot labelled '{names[target]}'."
        for (x, y), name in zip(dots, names):
            draw.text((x + radius + 4, y), name, colours.ink, letters, anchor="lm")
    else:
        target = _mark_parts(rng, fills, alike)
        question = "find the red"
    for dot, fill in zip(dots, fills):
        draw.circle(dot, radius, fill=fill)
    x, y = dots[target]
    return question, (x - radius, y - radius, x + radius + 1, y + radius + 1), image

def _sample_dots(rng, count, xs, ys, apart):
    """`count` points (x, y) of these ranges, any two of them farther from each other than `apart`.
    UserError where so many do not fit."""
    dots = []
    for _ in tries(f"place for {count} dots"):
        point = rng.choice(xs), rng.choice(ys)
        if all(math.dist(point, dot) > apart for dot in dots):
            dots.append(point)
        if len(dots) == count:
            return dots

def draw_crop(image, point, side, mark=True):
    """The side x side pixels around a point (x, y), at the picture's resolution, with a ring."""
    half = side // 2
    crop = Image.new("RGB", (side, side), "#808080")  # Beyond the edge of the picture is grey.
    x, y = point
    crop.paste(image, (half - round(x), half - round(y)))
    draw = ImageDraw.Draw(crop)
    radius = max(3, round(side / 24))
    if mark and side < 100:
        draw.circle((half, half), radius, outline=MARK, width=1 + side // 64)
    elif mark:  # Red on white is seen on pages of any colour.
        draw.circle((half, half), radius + 2, outline="white", width=5)
        draw.circle((half, half), radius + 1, outline="red", width=3)
    return crop

# ==================== 3. Data folders =============================================================
# A data folder holds images/, one <split>.jsonl of examples for each split, and data.json. An
# example is a dict with "id", "image" (a path relative to its file) and "size", [width, height].

def write_file(path, content):
    """Write text or bytes whole or not at all."""
    if isinstance(content, str):
        content = content.encode()
    # A rename is atomic, once the bytes are on the disk.
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:  # The disk may be full: leave no half file to fill it further.
        temporary.unlink(missing_ok=True)
        raise

def lock(folder, wait=False):
    """Keep other processes out of a folder until the file that this returns is closed, or this
    process ends. If another one has the folder: UserError, or `wait` for it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(Path(folder) / "lock", "w")
    how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    try:
        fcntl.flock(file, how)
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

def _short_name(text, digits):
    """The first hex digits of the digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]

def digest_of(values):
    """A name of 8 hex digits for what JSON can hold."""
    return _short_name(json.dumps(values, sort_keys=True), 8)

def code_digest(file, names=None):
    """A name of 16 hex digits for what the code of a Python file says: comments, docstrings and
    layout do not count. With names: only these top-level definitions and those that they reach.
    KeyError if the file does not define one of the names."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    statements = _Wordless().visit(tree).body
    if names is not None:
        statements = _reached(statements, names)
    return _short_name("\n".join([ast.unparse(statement) for statement in statements]), 16)

class _Wordless(ast.NodeTransformer):
    """Takes docstrings out of a tree. The tree of Python's parser has no comments and no layout."""
    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) else node

def _reached(statements, names):
    """The statements that define these names or what such statements use, in their order."""
    definitions = {}  # {name: the statements that define it}
    for statement in statements:
        for name in _defined(statement):
            definitions.setdefault(name, []).append(statement)
    todo = list(names)
    reached = set()
    for name in todo:  # The list grows meanwhile.
        for statement in definitions[name]:  # A name may be defined in several places.
            if statement not in reached:
                reached.add(statement)
                todo += _names_in(statement, ast.Load) & definitions.keys()
    return [statement for statement in statements if statement in reached]

def _defined(statement):
    """The names that a top-level function, class or assignment defines."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Assign):  # a = b = 1 has two targets; a, b = 1, 2 has a tuple.
        return _names_in(ast.Tuple(statement.targets))
    if isinstance(statement, ast.AnnAssign | ast.AugAssign):
        return _names_in(statement.target)
    return set()

def _names_in(node, context=ast.expr_context):
    """The names that stand in a part of a tree; context: ast.Load for those that are used."""
    names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
    return {name.id for name in names if isinstance(name.ctx, context)}

def read_json(file):
    """What a JSON file holds. UserError if it is damaged."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): remove it") from None

def read_lines(file):
    """The lines of a JSONL log; the last one of a run that was killed may be cut off."""
    if not file.is_file():
        return []
    found = []
    for text in file.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "stage" in line and "step" in line:
            found.append(line)
    return found

def load_image(path):
    """An image file as RGB, as a viewer shows it on a white page. UserError names the file."""
    try:
        # Opened by its name, a turned TIFF is mapped into memory, and Pillow garbles it.
        with open(path, "rb") as file, Image.open(file) as image:
            is_deep = _is_deep_grey(image)
            _check_image(image, is_deep)
            image = ImageOps.exif_transpose(image)
            if is_deep:
                image = Image.fromarray(np.uint8(np.asarray(image) // 257))
            # What is transparent shows the page behind it.
            page = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(page, image.convert("RGBA")).convert("RGB")
    except Exception as error:  # Decoders raise many kinds for broken files.
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a usable image ({reason})") from None

def _is_deep_grey(image):
    """Whether an image has grey values of 16 bits, from 0 for black to 65535 for white."""
    if image.format == "PPM":
        return image.mode == "I"
    tags = getattr(image, "tag_v2", {})  # A TIFF has these.
    bits, white = tags.get(258, (16,)), tags.get(262, 1)  # bits of a value; 0: white is 0
    return image.mode.startswith("I;16") and bits == (16,) and white == 1

def _check_image(image, is_deep):
    """ValueError if models refuse an image of this size, or if its values have no clear meaning."""
    longer, shorter = max(image.size), min(image.size)
    if longer > 4096 or longer > 200 * shorter:
        raise ValueError(f"{image.width} x {image.height} pixels: at most 4096 and 200:1")
    unclear = image.mode[0] in "IF" and not is_deep
    # One value of a PNG may stand for transparent. Where Pillow decodes into another mode, it no
    # longer finds that value.
    if image.format == "PNG" and image.mode != "P" and "transparency" in image.info:
        unclear = unclear or image.tile[0].args != image.mode
    if unclear:
        raise ValueError("unclear which value is white or transparent: save it in 8 bits")

# Do not paint on what it returns. 40 images of 4096 x 4096 pixels take 2 GB; small ones are read
# again in no time.
cached_image = functools.lru_cache(maxsize=40)(load_image)

def find_file(folder, name):
    """The path of a file inside a resolved folder, or None. UserError if the name leads out."""
    # A file is judged by where it really lies, after links; a name without a file by itself.
    path = folder / name
    exists = os.path.isfile(path)
    real = path.resolve() if exists else Path(os.path.normpath(path))
    if not real.is_relative_to(folder):
        raise UserError(f"{name!r} leads out of its folder, itself or through a link")
    return path if exists else None

def check_map(record):
    """UserError unless a record of navigation has a usable layout and look, and a box within its
    image where it has one."""
    check_layout(record.get("layout"))
    look = str(record.get("look"))
    if look not in LOOKS and not look.startswith("mix"):
        raise UserError('"look" is missing or no name of a look')
    # A map has no question, and a box only where its picture has a margin.
    check_figure({"question": "the way", "within": 0, "box": [0, 0, 2, 2]} | record)

def check_figure(record):
    """UserError unless a record has a question, and a box within the size of its image.
    record: at least "question", "size", "within" and "box"."""
    question, within = record.get("question"), record.get("within")
    if not isinstance(question, str) or not question.strip():
        raise UserError('"question" is missing or not a text')
    _check_pixels("size", "[width, height]", record.get("size"), 2, 1)
    _check_pixels("within", "a number", [within], 1, 0)
    _check_pixels("box", "[x0, y0, x1, y1]", record.get("box"), 4, -9999)
    box = x0, y0, x1, y1 = record["box"]
    width, height = record["size"]
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise UserError(f"box {box} is empty or leaves its image of {width} x {height}")
    if max(x1, y1) <= 1:
        raise UserError(f"box {box} lies within 0..1 and looks normalised: give pixels")

def _check_pixels(key, form, values, count, least):
    """UserError unless `values` is a list of `count` numbers from `least` to 9999."""
    good = isinstance(values, list) and len(values) == count
    # True and False are no numbers here; NaN is in no range.
    if not good or not all(type(n) in (int, float) and least <= n <= 9999 for n in values):
        raise UserError(f'"{key}" is missing or not {form} in pixels')

def read_examples(path, check=None):
    """The examples of a JSONL file. One without "id" is called line-N; images are not opened.
    UserError, "file:line: reason", for the first unusable line. check(record) may add to it."""
    folder = Path(path).parent.resolve()
    records = {}  # by id, in the order of the lines
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        # Blank lines may hold a byte order mark, as an empty file has it.
        if not line.strip(b" \t\r\xef\xbb\xbf"):
            continue
        try:
            record = _read_record(line, number)
            if record["id"] in records:
                raise UserError(f"id {record['id']!r} is used twice")
            if not find_file(folder, record["image"]):
                raise UserError(f"image {record['image']!r} is no file in the folder of this file")
            if check:
                check(record)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        records[record["id"]] = record
    return list(records.values())

def _read_record(line, number):
    """The record of one line of bytes, with texts as "id" and "image"."""
    try:
        record = {"id": f"line-{number}"} | json.loads(line.decode("utf-8-sig"))
        json.dumps(record, ensure_ascii=False).encode()  # Half a surrogate pair fails here.
    except (ValueError, TypeError, RecursionError):
        raise UserError("not a JSON object in UTF-8") from None
    for key in ("id", "image"):
        if not isinstance(record.get(key), str) or not record[key]:
            raise UserError(f'"{key}" is missing or not a text')
    return record

def make_folder(folder, task, plan, make, draw=0, **more):
    """Write a made data set, unless it is there. The same plan gives the same bytes.
    plan: {split: [arguments, ...]}, of what JSON can hold. make(rng, *arguments) gives (record,
    image); no layout or picture is in two places. draw: another number, other pictures."""
    folder = Path(folder)
    counts = {split: len(plan[split]) for split in plan}
    # data.json tells people, and programs, what the folder holds.
    about = {"task": task, "plan": _short_name(json.dumps(plan), 16), "counts": counts} | more
    if not folder.exists():
        with lock(folder.parent, wait=True):
            if not folder.exists():  # Another process may have made it meanwhile.
                _write_folder(folder, about, plan, make, draw)

def _write_folder(folder, about, plan, make, draw):
    """Write a data folder whole or not at all."""
    building = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)  # A process that was killed may have left it.
    (building / "images").mkdir(parents=True)
    taken = set()  # hashes, over all splits
    try:
        for split in plan:
            rng = random.Random(f"{split} {draw}")
            _write_split(building, split, plan[split], make, rng, taken)
        write_file(building / "data.json", json.dumps(about, indent=2) + "\n")
        os.sync()  # All pictures at once: there are thousands.
        building.replace(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)  # A success leaves nothing of it.

def _write_split(folder, split, items, make, rng, taken):
    """Write the pictures of a split, its JSONL file, and a preview of the first six."""
    records = []
    for arguments in tqdm(items, split, disable=None):
        name = f"{split}-{len(records):04d}"
        record, image = _make_new(rng, make, arguments, taken, name)
        # Ids and files are numbered within the split.
        record |= {"id": name, "image": f"images/{name}.png", "size": image.size}
        image.save(folder / record["image"], compress_level=1)
        records.append(record)
    lines = [json.dumps(record) + "\n" for record in records]
    write_file(folder / f"{split}.jsonl", "".join(lines))
    preview(folder, split, records, folder)

def _make_new(rng, make, arguments, taken, name):
    """(record, image) of what is not in `taken`, hashes of all layouts and pictures so far."""
    for _ in tries(f"new picture for {name}"):
        record, image = make(rng, *arguments)
        # A layout in another look is no new map: no test asks for what was taught.
        content = "/".join(record.get("layout", [])).encode() or image.tobytes()
        known = hashlib.sha256(content).digest()
        if known not in taken:
            taken.add(known)
            return record, image

def own_examples(file, check_text, quiet=False):
    """{"train", "dev_id", "test_id", and "test_X" for each split X of one's own: examples} of a
    JSONL file of "image", "question", "box" and perhaps "split".
    check_text(name, text) raises UserError where the model cannot read a question. quiet: without a
    progress bar."""
    parts = {"train": [], "dev_id": [], "test_id": []}
    known = {}  # the part of each picture

    def take(record):
        # This runs while a line is read, so that the error names the line. Keys that have a meaning
        # elsewhere are not taken over.
        image = cached_image(Path(file).parent / record["image"])
        example = {key: record.get(key) for key in ("id", "image", "question", "box")}
        example |= {"size": list(image.size), "within": 0}
        check_figure(example)
        check_text("its question", example["question"])
        # Copies of a picture have the same bytes, and so they are in the same part.
        picture = hashlib.sha256(image.tobytes()).digest()
        part = _own_part(record.get("split"), picture)
        if known.setdefault(picture, part) != part:
            raise UserError(f"its picture is in {known[picture]} by a line before, and here in "
                            f'{part}: give all lines of a picture and its copies one "split"')
        parts.setdefault(part, []).append(example)
        bar.update()

    lines = len(Path(file).read_bytes().splitlines())
    with tqdm(total=lines, desc="read pictures", unit="line", disable=quiet) as bar:
        read_examples(file, take)
    return parts

def _own_part(split, picture):
    """The part that a line names: "test_night" for "night". Without a name pictures are divided
    8:1:1 by their digests."""
    if split is None:
        return {0: "dev_id", 1: "test_id"}.get(picture[0] % 10, "train")
    is_word = isinstance(split, str) and split.isalnum() and split.islower()
    if not is_word or split in ("id", "val"):
        raise UserError(f'"split" is {split!r}: give train, dev, test, or the name of a test split '
                        "of your own, in small letters and digits, not id or val")
    return {"train": "train", "dev": "dev_id", "test": "test_id"}.get(split, f"test_{split}")

def make_official(data, maps, evals, cell):
    """The authors' maps as a data folder under `data`; returns that folder.

    maps: their JSON of training maps; evals: of test maps, or several with commas between. A PNG
    where the file names it is used; another map is drawn, and its record says "drawn": "here".
    """
    plan = {"train": _read_official(maps, "input_image", cell), "test_id": [], "test_size": []}
    for file in evals.split(","):
        for item in _read_official(file, "input_map", cell):
            split = "test_id" if len(item[0]) <= 5 else "test_size"  # by the rows of its layout
            plan[split].append(item)
    plan = {split: items for split, items in plan.items() if items}
    for split in plan:
        random.Random(split).shuffle(plan[split])  # An evaluation takes the first: mix the sizes.
    items = sum(plan.values(), [])
    times = Counter("/".join(layout) for layout, _, _ in items)
    if {*times.values()} != {1}:
        raise UserError(f"{maps} {evals}: no map, or one is there twice: {times.most_common(1)}")
    # The folder's name says what is in it: maps, and the bytes of their pictures.
    pictures = digest(*[picture for _, picture, _ in items if picture])
    name = _short_name(json.dumps(plan) + pictures, 8)
    folder = Path(data) / f"official-{name}"
    splits = [split.removeprefix("test_") for split in plan if split != "train"]
    make_folder(folder, "navigation", plan, _official_map, splits=splits)
    return folder

def _read_official(file, key, cell):
    """[(layout, path of its picture or "", cell), ...] of one of the authors' files; none of "".
    key: what the file calls a picture."""
    if not file:
        return []
    folder = Path(file).resolve().parent
    found = []
    try:
        for entry in json.loads(Path(file).read_text(encoding="utf-8-sig")):
            about = entry["metadata"] if key == "input_map" else entry
            layout = ["".join(row) for row in about["layout"]]
            check_layout(layout)
            cells = "".join(layout)  # Positions count all cells, row by row.
            if (cells.index("S"), cells.index("G")) != (about["start_pos"], about["target_pos"]):
                raise UserError("start_pos or target_pos is not where the layout has S or G")
            picture = find_file(folder, entry.get(key, ""))
            found.append((layout, str(picture or ""), cell))
    except Exception as error:  # The file can be wrong in many ways.
        raise UserError(f"{file}: not the authors' map {len(found) + 1} ({error!r:.200})") from None
    return found

def _official_map(rng, layout, picture, cell):
    """(record, image) of one of the authors' maps, for make_folder."""
    record = {"layout": layout, "look": "official"}
    if not picture:
        return record | {"drawn": "here"}, draw_grid(layout, "official", cell)
    image = load_image(picture)
    box = ImageOps.invert(image).getbbox()  # what is not white
    return record | {"box": box}, image

# ==================== 4. Pictures for people ======================================================
TEXT, FAINT = "#282C34", "#787E88"
FRAMES = {"right": "#009E73", "wrong": "#D53C28", "": "#BEC3CB"}
# Okabe and Ito's palette: colour-blind readers too can tell its colours apart.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#968C28"]
GAP = 18  # pixels between the pictures of a film strip

def film_strip(path, rows, title="", side=150, most=6):
    """Write episodes as rows of at most `most` pictures, `side` pixels at the longer side. rows:
    dicts with a "label" and, of one length, "images" [PIL], "captions" [str] and "verdicts"
    ["right", "wrong" or ""]."""
    width = GAP + most * (side + GAP)
    # Texts have different lengths: the sheet is high enough for all, and is cut in the end.
    height = 500 + len(rows) * (side + 900)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    bottom = 11 + _write_lines(draw, GAP, 12, title, width, 18)
    for row in rows:
        x, y = GAP, 7 + _write_lines(draw, GAP, bottom, row["label"], width, 14)
        for image, caption, verdict in zip(row["images"][:most], row["captions"], row["verdicts"]):
            image = image.convert("RGB")
            image = ImageOps.contain(image, (side, side), Image.Resampling.BOX)
            sheet.paste(ImageOps.expand(image, 3, FRAMES[verdict]), (x - 3, y - 3))
            below = _write_lines(draw, x, y + image.height + 4, caption, side, 13)
            bottom = max(bottom, below + GAP)
            x += side + GAP
    sheet.crop((0, 0, width, bottom)).save(path)

def preview(folder, split, records, source):
    """Write preview_SPLIT.png with the first six of these examples; source: their folder."""
    records = records[:6]
    images = [framed(record, source) for record in records]
    captions = [record.get("question", record["id"]) for record in records]
    row = {"label": split, "images": images, "captions": captions, "verdicts": [""] * 6}
    film_strip(folder / f"preview_{split}.png", [row], side=500)

def framed(record, folder):
    """The image of an example; if it asks for a point, with a frame around the target."""
    image = load_image(folder / record["image"])
    if "question" in record:
        wide = 1 + max(image.size) // 150  # pixels; it is seen on a small picture too
        frame = np.add(record["box"], (-wide, -wide, wide - 1, wide - 1))
        ImageDraw.Draw(image).rectangle([*frame], None, "magenta", wide)
    return image

def _write_lines(draw, x, y, text, width, size):
    """Write a text in lines of so many pixels, 24 at most; returns y below them."""
    # The font has hardly more letters than ASCII; others would all be the same empty box.
    plain = text.encode("ascii", "backslashreplace").decode()
    for line in textwrap.wrap(plain, int(1.6 * width / size), max_lines=24):
        draw.text((x, y), line, TEXT, font(size))
        y += size + 3
    return y

def line_charts(path, panels, columns=3):
    """Write line charts of panels [(title, {name: (xs, ys, ys of another run, ...)}), ...].
    Several runs are their mean, in a pale band from the lowest to the highest. None is a gap."""
    rows = math.ceil(len(panels) / columns)
    sheet = Image.new("RGB", (columns * 340, rows * 240), "white")
    for number, (title, series) in enumerate(panels):
        row, column = divmod(number, columns)
        # At twice its size a chart is painted without smooth edges; shrinking gives them.
        chart = _draw_chart(title, series).reduce(2)
        sheet.paste(chart, (column * 340, row * 240))
    sheet.save(path)

def _draw_chart(title, series):
    """A picture of 680 x 480 pixels: title, names of the series in their colours, and below axes
    with the lines."""
    chart = Image.new("RGB", (680, 480), "white")
    draw = ImageDraw.Draw(chart, "RGBA")  # What is below a colour of eight digits shines through.
    below = _write_lines(draw, 24, 14, title, 640, 26)
    lines = {}  # Arrays (1 + runs, points) of x and of each run's y; None has become NaN.
    for name, values in series.items():
        line = np.array(values, float)
        if np.isnan(line[1:]).all():
            name += ": no values"
        lines[name] = line
    top = _draw_legend(draw, below + 9, lines) + 44
    # The ticks, and their pixels. y grows upwards, unlike in pictures.
    xs = _ticks([line[0] for line in lines.values()])
    ys = _ticks([line[1:] for line in lines.values()])
    across = np.linspace(104, 636, len(xs))
    up = np.linspace(424, top, len(ys))
    for value, x in zip(xs, across):
        draw.text((x, 432), f"{value:g}", FAINT, font(22), "ma")
    for value, y in zip(ys, up):
        draw.line((104, y, 636, y), "#DDE1E6", 2)
        draw.text((94, y), f"{value:g}", FAINT, font(22), "rm")
    for line, colour in zip(lines.values(), cycle(PALETTE)):
        _draw_line(draw, np.interp(line[0], xs, across), np.interp(line[1:], ys, up), colour)
    return chart

def _draw_legend(draw, y, names):
    """Write the names of series, in as many lines as they need; returns y of the last line."""
    x = 24
    for name, colour in zip(names, cycle(PALETTE)):
        length = font(22).getlength(name)
        if x + length > 660:
            x, y = 24, y + 26
        draw.text((x, y), name, colour, font(22))
        x += 24 + length
    return y

def _ticks(parts):
    """Round numbers at equal distances that reach over 0 and all values of some arrays, but for
    NaN: 0, 10, 20, 30, 40 over 37."""
    values = np.concatenate([[0], *parts], axis=None)
    low, high = np.nanmin(values), np.nanmax(values)
    # The first of ... 1, 2, 5, 10, 20, 50 ... that goes this way in five steps.
    steps = np.outer(10.0 ** np.arange(-20, 20), (1, 2, 5))
    step = steps[steps >= (high - low) / 5].min()
    return step * np.arange(low // step, math.ceil(high / step) + 1)

def _draw_line(draw, xs, runs, colour):
    """The mean of runs, an array (runs, points), in a band from the lowest to the highest. Where
    none has a value there is a gap; a point between gaps becomes a dot."""
    runs = np.ma.masked_invalid(runs)
    for part in np.ma.clump_unmasked(runs.mean(0)):  # slices without gaps
        x, y = xs[part], runs[:, part]
        lower, upper = [*zip(x, y.min(0))], [*zip(x, y.max(0))]
        draw.polygon(lower + upper[::-1], colour + "30")  # 30: how much it covers, of FF
        middle = [*zip(x, y.mean(0))]
        draw.line(middle, colour, 4, joint="curve")
        if len(middle) == 1:
            draw.circle(middle[0], 5, colour)

def curves(path, files, charts):
    """Paint the lines of metrics.jsonl files.
    charts: {stage: {title: "figure figure ..."}}. Each title becomes a chart of these figures by
    step. KeyError names a stage that charts lacks or a figure that a line lacks: a new name must
    not empty its chart silently."""
    lines, panels = [], []
    for file in files:
        lines += read_lines(file)
    for stage in dict.fromkeys(line["stage"] for line in lines):  # in their order
        of_stage = [line for line in lines if line["stage"] == stage]
        steps = [line["step"] for line in of_stage]
        for title, names in charts[stage].items():
            series = {}
            for name in names.split():
                values = [line[name] for line in of_stage]
                series[name.replace("_", " ")] = steps, values
            panels.append((f"{stage}: {title}", series))
    line_charts(path, panels or [("nothing was trained", {})])

def table(models, columns):
    """Markdown: a line for each model and split, and for the mean out of distribution.
    models: {name: rows of vrrl.evaluate}. columns: names of figures, shown in percent."""
    names = " | ".join(columns).replace("_", " ")
    rule = "| --- " * (len(columns) + 4)
    lines = [f"| model | split | n | {names} | turns |", f"{rule}|"]
    for model, rows in models.items():
        # Each split counts the same in the mean, however many questions it has.
        far = [row for row in rows if row["ood"]]
        if far:
            rows = [*rows, _mean_row(far, columns)]
        for row in rows:
            cells = [model, row["split"], str(row["n"])]
            for name in columns:
                value = row[name]
                shown = "-" if value is None else f"{100 * value:.1f}"
                cells.append(shown)
            cells.append(f"{row['turns']:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

def _mean_row(rows, columns):
    """The mean of each figure over the rows that know it; None where none does, as for repairs
    where nothing was wrong."""
    mean = {"split": "**mean ood**", "n": sum(row["n"] for row in rows)}
    for name in [*columns, "turns"]:
        known = [row[name] for row in rows if row[name] is not None]
        mean[name] = sum(known) / len(known) if known else None
    return mean

def main(words):
    """usage: python data_prep.py official maps=FILE eval=FILE[,FILE] [data=FOLDER] [cell=8..256]

    Makes a data folder of the authors' maps. Where their picture is missing, a cell has 64 pixels.
    """
    if {"-h", "--help", "help"} & set(words):
        return print(main.__doc__)
    given = {"maps": "", "eval": "", "data": "data", "cell": "64"}
    for word in words[1:]:
        key, _, value = word.partition("=")
        given[key] = value
    try:
        known = words[:1] == ["official"] and len(given) == 4  # no other key
        known = known and given["cell"] in map(str, range(8, 257))
        if not known or not (given["maps"] or given["eval"]):
            raise UserError(main.__doc__.splitlines()[0])
        cell = int(given["cell"])
        folder = make_official(given["data"], given["maps"], given["eval"], cell)
    except (UserError, OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'stopped'}", file=sys.stderr)
        sys.exit(2)
    print(f"use it with data={folder}")

if __name__ == "__main__":
    main(sys.argv[1:])
