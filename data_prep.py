"""Pictures and files of examples for vrrl.py: all that can be made and read without a model.
`rng` is always a random.Random. Colours are (R, G, B). Boxes are (x0, y0, x1, y1) in pixels, half
open: x0 <= x < x1. The same draws from `rng` in the same order give the same pictures."""
import ast, functools, hashlib, itertools, json, math, os, random, shutil, sys, textwrap
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

def random_colour(rng, low=0, high=255):
    """A colour whose three values are in this range."""
    return tuple(rng.randint(low, high) for _ in "RGB")

def far_colours(rng, count, used=()):
    """`count` random colours. Each is, of eight, the farthest from `used` and from those before."""
    used = list(used)

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
    colours = far_colours(rng, 8)
    return Look(*colours, rng.choice(("disc", "square")))

def _paint_hole(draw, look):
    if look.shape == "cross":
        draw.line((80, 80, 320, 320), fill=look.hole, width=96)
        draw.line((80, 320, 320, 80), fill=look.hole, width=96)
        return
    inside = look.ground if look.shape == "ring" else look.hole
    paint = draw.rectangle if look.shape == "square" else draw.ellipse
    paint((52, 52, 348, 348), fill=inside, outline=look.hole, width=72)

def _paint_elf(draw, look):
    draw.polygon((200, 200, 320, 368, 80, 368), fill=look.coat)
    draw.ellipse((120, 136, 280, 288), fill=(240, 196, 158), outline=look.hat, width=12)
    draw.polygon((200, 32, 304, 176, 96, 176), fill=look.hat)
    for x in (160, 224):  # the eyes
        draw.ellipse((x, 200, x + 24, 228), fill=(20, 20, 20))

def _paint_gift(draw, look):
    draw.rectangle((80, 184, 320, 360), fill=look.box)
    draw.rectangle((56, 136, 344, 200), fill=look.box, outline=look.ribbon, width=10)
    draw.rectangle((172, 136, 228, 360), fill=look.ribbon)
    for x in (96, 200):  # the bow
        draw.ellipse((x, 48, x + 104, 144), outline=look.ribbon, width=32)

@functools.lru_cache(maxsize=1024)
def _tile(name, cell, kind):
    """Picture of one cell. It is painted at 400 x 400 pixels and shrunk, for smooth edges."""
    look = look_of(name)
    tile = Image.new("RGB", (400, 400), look.ground)
    draw = ImageDraw.Draw(tile)
    if kind == "H":
        _paint_hole(draw, look)
    elif kind == "S":
        _paint_elf(draw, look)
    elif kind == "G":
        _paint_gift(draw, look)
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
    x0, y0, x1, y1 = box or (0, 0, *image.size)
    rows, columns = shape
    size = np.array([(x1 - x0) / columns, (y1 - y0) / rows])  # (2,): of a cell, along x and y
    thick = max(2, round(min(size) / 6))
    row, column = start
    first = (x0, y0) + np.array([column + 0.5, row + 0.5]) * size  # (2,): the middle of a cell
    here = first
    times = Counter()  # how often the path takes each stretch between two cells
    step = None  # the last move inside the grid, if the path ends inside
    for move in moves[:100]:  # A rambling answer must not slow training down.
        down, right = MOVES[move]
        there = row + down, column + right
        step = np.array([right, down])
        across = abs(step[::-1])  # along the other axis
        if not _is_inside(shape, there):
            edge = here + step * (size - thick) / 2
            half = across * (size - thick) / 2
            _draw_bar(draw, here, edge, thick, look.path)
            _draw_bar(draw, edge - half, edge + half, thick, look.alert)
            step = None
            break
        # A stretch walked again is painted beside the first time, so that it does not vanish.
        stretch = frozenset([(row, column), there])
        aside = across * thick * (0, 1.5, -1.5)[times[stretch] % 3]
        times[stretch] += 1
        end = here + step * size
        for a, b in itertools.pairwise([here, here + aside, end + aside, end]):
            _draw_bar(draw, a, b, thick, look.path)
        (row, column), here = there, end
    _draw_ends(draw, first, here, step, min(size), look)
    return image

def _is_inside(shape, cell):
    """Whether a grid of (rows, columns) has this cell."""
    return 0 <= cell[0] < shape[0] and 0 <= cell[1] < shape[1]

def _draw_bar(draw, a, b, thick, colour):
    """A bar between two points of a row or a column; its square ends close the corners."""
    half = (thick - 1) / 2
    low = np.minimum(a, b) - half
    high = np.maximum(a, b) + half
    corners = np.concatenate([low, high]).astype(int)
    draw.rectangle(corners.tolist(), fill=colour)

def _draw_ends(draw, first, last, step, size, look):
    """The hollow square at the first point and, after a step, the arrow head at the last one."""
    # Whole pixels keep the square and the arrow head symmetric at 16 pixels a cell.
    x, y = first.astype(int).tolist()
    for share, colour in ((0.2, look.path), (0.07, look.ground)):
        radius = round(share * size)
        draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=colour)
    if step is not None:
        x, y = last.astype(int).tolist()
        dx, dy = (round(0.36 * size) * step).tolist()
        draw.polygon((x + dx, y + dy, x + dy, y + dx, x - dy, y - dx), fill=look.path)

def find_cell(layout, kind):
    """(row, column) of the first cell of this kind."""
    for row, kinds in enumerate(layout):
        if kind in kinds:
            return row, kinds.index(kind)

def _around(layout, cell):
    """[(move, cell), ...] of the cells beside a cell."""
    shape = len(layout), len(layout[0])
    found = []
    for move, (down, right) in MOVES.items():
        there = cell[0] + down, cell[1] + right
        if _is_inside(shape, there):
            found.append((move, there))
    return found

def shortest_distances(layout):
    """Least moves from each cell to the goal: int array (rows, columns), -1 where no way exists."""
    distance = np.full((len(layout), len(layout[0])), -1)
    queue = [find_cell(layout, "G")]
    distance[queue[0]] = 0
    for cell in queue:  # The queue grows meanwhile.
        for _, (row, column) in _around(layout, cell):
            if layout[row][column] != "H" and distance[row, column] < 0:
                distance[row, column] = distance[cell] + 1
                queue.append((row, column))
    return distance

def check_layout(layout):
    """Raise UserError unless this is a solvable layout of 2 to 16 rows and columns."""
    if not isinstance(layout, list) or {type(row) for row in layout} != {str}:
        raise UserError("layout is not a list of strings")
    sizes = {len(layout)} | {len(row) for row in layout}
    same = len({len(row) for row in layout}) == 1
    if not same or min(sizes) < 2 or max(sizes) > 16:
        raise UserError("layout needs 2 to 16 rows, all of the same length of 2 to 16 letters")
    if sorted("".join(layout).replace("F", "").replace("H", "")) != ["G", "S"]:
        raise UserError("layout needs one S and one G; its other letters must be F and H")
    if shortest_distances(layout)[find_cell(layout, "S")] < 0:
        raise UserError("layout has no way from S to G")

def shortest_path(layout, rng):
    """Moves of one shortest path; every step picks evenly among the moves that come closer."""
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
    row, column = find_cell(layout, "S")
    goal_row, goal_column = find_cell(layout, "G")
    # A list times a negative number is empty.
    straight = ["down"] * (goal_row - row) + ["up"] * (row - goal_row)
    straight += ["right"] * (goal_column - column) + ["left"] * (column - goal_column)
    pairs = [("up", "down"), ("down", "up"), ("left", "right"), ("right", "left")]
    while True:
        place = rng.randrange(len(path))
        there, back = rng.choice(pairs)
        mixed = rng.sample(straight, len(straight))
        stray = rng.choices(list(MOVES), k=rng.randint(1, len(path) + 2))
        # One move differs, or there is a detour.
        middle = rng.choice([stray[:1], [there, path[place], back]])
        changed = path[:place] + middle + path[place + 1:]
        shorter = path[:-rng.randint(1, 2)]
        longer = path + stray[:2]
        options = [straight, straight, mixed, mixed, stray, shorter, longer, changed]
        wrong = rng.choice(options)
        if wrong and not exact(wrong):
            return wrong

def navigation_plan(train, test, cell):
    """{split: [(n, look, cell), ...]}. Test comes first: other counts leave it as it is."""
    plan = {}
    for part in ("test", "dev"):
        plan[f"{part}_id"] = _in_turn((3, 4, 5), ["snow"], cell, test)
        plan[f"{part}_size"] = _in_turn((6, 7), ["snow"], cell, test)
        plan[f"{part}_look"] = _in_turn((3, 4, 5), ["night", "desert", "ink"], cell, test)
    rng = random.Random("order")
    sizes = [3] * min(300, train // 10)  # Few maps of 3 x 3 exist.
    sizes += [4] * round(0.3 * train)
    sizes += [5] * (train - len(sizes))
    rng.shuffle(sizes)
    plan["train"] = []
    for number, size in enumerate(sizes):
        look = rng.choice(MIXES) if number % 4 else "snow"
        plan["train"].append((size, look, cell))
    return plan

def _in_turn(sizes, looks, cell, count):
    """`count` maps of a plan, of every size in every look in turn."""
    kinds = [(size, look, cell) for look in looks for size in sizes]
    return list(itertools.islice(itertools.cycle(kinds), count))

def make_map(rng, n, look, cell):
    """(record, image) of a new n x n map of cells of so many pixels: 10 to 35 % are holes, and the
    goal is 2 or more moves away."""
    least = rng.randint(2, n) if n >= 4 else 2  # Otherwise near goals prevail.
    for _ in tries("map"):
        holes = round(rng.uniform(0.1, 0.35) * (n * n - 2))
        kinds = "SG" + "H" * holes
        cells = ["F"] * (n * n)
        for kind, place in zip(kinds, rng.sample(range(n * n), len(kinds))):
            cells[place] = kind
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

def figure_plan(kind, train, test):
    """{split: [(shape, size, kind, look-alikes), ...]}; test comes first, as for navigation."""
    plan = {}
    for part in ("test", "dev"):
        for name, (shape, size) in FIGURES[kind].items():
            alike = kind == "embedded" and name != "id"
            plan[f"{part}_{name}"] = [(shape, size, kind, alike)] * test
    shape, size = FIGURES[kind]["id"]
    plan["train"] = [(shape, size, kind)] * train
    return plan

def make_figure(rng, shape, size, kind="embedded", alike=False):
    """(record, RGB image) of a shape in FIGURES; `size` is (lowest, highest) number of its parts;
    alike: whether an embedded figure has LOOK_ALIKES.

    record: question, box of the target, shape, and `within`: a point is right within so many
    pixels of the middle of the box, or, where that is 0, inside the box.
    """
    within = 0
    if kind == "embedded":
        question = "find the red"
        box, image = _embedded_figure(rng, shape, size, alike)
    else:
        question, box, image = _text_figure(rng, shape, size)
        if shape != "bars":
            within = 40
    return {"question": question, "box": list(box), "within": within, "shape": shape}, image

# ---- Embedded figures: each painter gives (box of the target, image).

def _embedded_figure(rng, shape, size, alike):
    # There are 40 palettes, far from the colours that mean something.
    palette = random.Random(f"mix{rng.randrange(40)}")
    colours = Colours(*far_colours(palette, 4, [RED, BLUE, MARK]))
    if shape == "table":
        return _embedded_table(rng, size, colours, alike)
    if shape == "bars":
        return _embedded_bars(rng, size, colours, alike)
    return _embedded_dots(rng, size, colours, alike)

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
    for row in range(rows):
        for column in range(columns):
            boxes.append((xs[column] + rule, ys[row] + rule, xs[column + 1], ys[row + 1]))
            is_head = row == 0 or column == 0
            fills.append(colours.head if is_head else colours.page)
    red = _mark_parts(rng, fills, alike)
    image = Image.new("RGB", (CANVAS, CANVAS), colours.page)
    image.paste(colours.ink, (xs[0], ys[0], xs[-1] + rule, ys[-1] + rule))
    full = rng.random()  # share of the cells that hold a dash
    for box, fill in zip(boxes, fills):
        image.paste(fill, box)
        if rng.random() < full:
            x0, y0, x1, y1 = box
            y = (y0 + y1) // 2
            image.paste(colours.ink, (x0 + 1, y - 1, rng.randint(x0 + 3, x1 - 1), y + 1))
    return boxes[red], image

def _embedded_edges(rng, count):
    """The count + 1 edges of `count` cells along one side of a picture."""
    # Cells of small tables are about as large as those of large ones: crops of both look alike.
    # With 14 parts a cell keeps 5 pixels, so it contains a multiple of 4 for the model.
    length = CANVAS if count > 6 else round(count * rng.uniform(7, 16))
    ends = np.cumsum([0] + [rng.uniform(1, 1.2) for _ in range(count)])
    first = rng.randint(0, CANVAS - length)
    edges = first + ends * length / ends[-1]
    return edges.round().astype(int).tolist()

def _embedded_bars(rng, size, colours, alike):
    """Bars on a line; sometimes the picture takes a quarter turn."""
    count = rng.randint(*size)
    most = rng.randint(76, 90)
    heights = _bar_heights(rng, count, most)
    slot, thick = _bar_widths(rng, 8, 92 // count)
    left = rng.randint(2, CANVAS - 2 - slot * count)
    base = rng.randint(most + 2, 94)
    boxes = _bar_boxes(heights, left, base, slot, thick)
    fills = [colours.fill] * count
    red = _mark_parts(rng, fills, alike)
    image = Image.new("RGB", (CANVAS, CANVAS), colours.page)
    for box, fill in zip(boxes, fills):
        image.paste(fill, box)
    image.paste(colours.ink, (left - 1, base, left + slot * count, base + 1))
    if rng.random() < 0.7:
        return boxes[red], image
    x0, y0, x1, y1 = boxes[red]
    turned = image.transpose(Image.Transpose.ROTATE_270)  # a quarter turn to the right
    return (CANVAS - y1, x0, CANVAS - y0, x1), turned

def _embedded_dots(rng, size, colours, alike):
    """Dots between two axes."""
    count = len(_dot_names(rng, size))
    edge = rng.randint(2, 6)
    base = CANVAS - edge - 1
    dots = _dot_places(rng, count, range(edge + 4, CANVAS - 3), range(3, base - 3), 6)
    fills = [colours.fill] * count
    red = _mark_parts(rng, fills, alike)
    image = _paint_dots((CANVAS, CANVAS), edge, dots, 3, fills, colours)
    return _dot_box(dots[red], 3), image

# ---- Parts of both kinds.

def _bar_heights(rng, count, most):
    """Heights of up to `most` pixels, of which the tallest and the lowest are clear."""
    for _ in tries(f"clear heights for {count} bars"):
        heights = [rng.randint(most // 10, most) for _ in range(count)]
        gaps = np.diff(sorted(heights))
        if gaps[0] >= 5 and gaps[-1] >= 5:
            return heights

def _bar_widths(rng, low, high):
    """(pixels from one bar to the next, pixels of a bar)"""
    slot = rng.randint(low, high)
    thick = rng.randint(max(5, slot * 2 // 5), slot * 9 // 10)
    return slot, thick

def _bar_boxes(heights, left, base, slot, thick):
    """Boxes of bars that stand on a line at `base`, each in the middle of its slot."""
    boxes = []
    x = left + (slot - thick) // 2
    for height in heights:
        boxes.append((x, base - height, x + thick, base))
        x += slot
    return boxes

def _dot_names(rng, size):
    return rng.sample(CITIES + GOODS, rng.randint(*size))

def _dot_places(rng, count, xs, ys, apart):
    """`count` points (x, y) of these ranges, any two of them farther from each other than `apart`."""
    dots = []
    for _ in tries(f"place for {count} dots"):
        place = rng.choice(xs), rng.choice(ys)
        if all(math.dist(place, dot) > apart for dot in dots):
            dots.append(place)
        if len(dots) == count:
            return dots

def _dot_box(dot, radius):
    x, y = dot
    return x - radius, y - radius, x + radius + 1, y + radius + 1

def _paint_dots(size, edge, dots, radius, fills, colours):
    """A new image with dots of these colours, and axes `edge` pixels from its left and bottom."""
    width, height = size
    base = height - edge - 1
    image = Image.new("RGB", size, colours.page)
    image.paste(colours.ink, (edge, 0, edge + 1, base + 1))
    image.paste(colours.ink, (edge, base, width, base + 1))
    draw = ImageDraw.Draw(image)
    for dot, fill in zip(dots, fills):
        draw.circle(dot, radius, fill=fill)
    return image

# ---- Figures of words: each painter gives (question, box of the target, image).

def _text_figure(rng, shape, size):
    page = random_colour(rng, 236, 255)
    head = random_colour(rng, 200, 230)
    ink = random_colour(rng, 0, 100)
    fill = random_colour(rng, 90, 190)
    colours = Colours(page, head, ink, fill)
    if shape == "bars":
        return _text_bars(rng, size, colours)
    if shape == "scatter":
        return _text_dots(rng, size, colours)
    return _text_table(rng, size, colours, shape == "cell")

def _write(draw, box, text, letters, ink):
    """Text in the middle of a box."""
    x0, y0, x1, y1 = box
    middle = (x0 + x1) / 2, (y0 + y1) / 2
    draw.text(middle, text, ink, letters, anchor="mm")

# A cell of a table, of headers too, in columns and rows from the top left; half open as a box is.
Cell = namedtuple("Cell", "x0 y0 x1 y1 text")

def _text_table(rng, size, colours, inner):
    """A table with headers; it asks for a lowest header or, if `inner`, for a cell of the body."""
    rows, columns = rng.randint(*size), rng.randint(*size)  # of the body
    top, left = rng.randint(1, 3), rng.randint(1, 2)  # levels of headers
    column_words, row_words = rng.sample((CITIES, GOODS, YEARS), 2)
    across = _sample_headers(rng, columns, top, column_words, True)
    down = _sample_headers(rng, rows, left, row_words, False)
    cells = [Cell(0, 0, left, top, "")]
    for level, first, end, name in across:
        cells.append(Cell(left + first, level, left + end, level + 1, name))
    for level, first, end, name in down:
        cells.append(Cell(level, top + first, level + 1, top + end, name))
    for x in range(left, left + columns):
        cells += _sample_column(rng, x, range(top, top + rows))
    column, row = rng.randrange(columns), rng.randrange(rows)
    column_name = " under ".join(_names_at(across, column)[:2])
    row_name = _names_at(down, row)[0]
    x, y = left + column, top + row
    if inner:
        asked, target = f"cell in row {row_name} and column {column_name}", (x, y)
    else:
        asked, target = rng.choice([(f"column header {column_name}", (x, top - 1)),
                                    (f"row header {row_name}", (left - 1, y))])
    boxes, image = _paint_table(rng, cells, left, top, colours)
    return f"Point at the {asked}.", boxes[target], image

def _sample_headers(rng, count, levels, words, repeat):
    """[(level, first line, line after the last, name), ...] over `count` lines, from the lowest
    level to level 0. `repeat`: the lowest names may be the same in each group; no other name is
    there twice."""
    names = [f"{word} {n}" for n in (4, 3, 2) for word in words]
    names += rng.sample(words, len(words))
    span = rng.randint(2, 4)  # headers under one of the next level
    groups = None
    if repeat and levels > 1:
        groups = rng.choice((("Q1", "Q2", "Q3", "Q4"), ("low", "mean", "high", "sum")))
    headers = []
    for level in reversed(range(levels)):
        step = span ** (levels - 1 - level)  # lines under one header
        for first in range(0, count, step):
            if groups and step == 1:
                name = groups[first % span]
            else:
                name = names.pop()
            headers.append((level, first, min(first + step, count), name))
    return headers

def _names_at(headers, line):
    """The names over a line, in quotes; the lowest comes first."""
    return [f"'{name}'" for _, first, end, name in headers if first <= line < end]

def _sample_column(rng, x, ys):
    """Cells with numbers, of one form in a column."""
    form = rng.choice(("{:.0f}", "{:.1f}", "{:.2f}", "{:,.0f}", "${:.0f}"))
    most = 10 ** rng.randint(2, 4)
    return [Cell(x, y, x + 1, y + 1, form.format(rng.uniform(0, most))) for y in ys]

def _paint_table(rng, cells, left, top, colours):
    """({(column, row): box of the cell that begins there}, image); the first `left` columns and
    `top` rows are headers."""
    columns, rows = cells[-1].x1, cells[-1].y1
    most_size, most_spare = (18, 40) if columns < 20 else (14, 14)
    letters = font(rng.randint(8 + 4, most_size))
    spare = rng.randint(8, most_spare)  # pixels beside a text
    widths = _column_widths(cells, columns, letters, spare)
    most_spare = 24 if rows < 20 else 12
    height = letters.size + rng.randint(6, most_spare)
    margin = rng.randint(4, 60)
    xs, width = _text_edges(rng, widths, margin)
    ys, height = _text_edges(rng, [height] * rows, margin)
    rule = rng.randint(0, 1)  # pixels between cells
    image = Image.new("RGB", (width, height), colours.page)
    draw = ImageDraw.Draw(image)
    image.paste(colours.ink, (xs[0], ys[0], xs[-1] + rule, ys[-1] + rule))
    boxes = {}
    for cell in cells:
        box = xs[cell.x0] + rule, ys[cell.y0] + rule, xs[cell.x1], ys[cell.y1]
        is_head = cell.x0 < left or cell.y0 < top
        image.paste(colours.head if is_head else colours.page, box)
        _write(draw, box, cell.text, letters, colours.ink)
        boxes[cell.x0, cell.y0] = box
    return boxes, image

def _column_widths(cells, columns, letters, spare):
    """Pixels of each column, so that each text has its place."""
    def span(cell):
        return cell.x1 - cell.x0

    widths = [0] * columns
    for cell in sorted(cells, key=span):
        needed = math.ceil(letters.getlength(cell.text)) + spare
        lack = needed - sum(widths[cell.x0:cell.x1])
        widths[cell.x1 - 1] += max(0, lack)  # A wide cell widens its last column.
    return widths

def _text_edges(rng, lengths, margin):
    """(edges of parts of these lengths, side of the picture): at least `margin` pixels are free at
    both ends, more where the table is small."""
    length = sum(lengths)
    side = max(400, length + 2 * margin)
    first = rng.randint(margin, side - margin - length)
    return np.cumsum([first] + lengths).tolist(), side

def _text_bars(rng, size, colours):
    """Bars with names; it asks for the tallest, for the lowest, or for the bar of a name."""
    count = rng.randint(*size)
    most = rng.randint(300, 600)
    heights = _bar_heights(rng, count, most)
    slot, thick = _bar_widths(rng, 80, 120)
    left, base = 80, most + 60
    right = left + slot * count
    boxes = _bar_boxes(heights, left, base, slot, thick)
    named = rng.randrange(count)
    names = rng.sample(rng.choice((CITIES, GOODS, YEARS)), count)
    image = Image.new("RGB", (right + 20, base + 50), colours.page)
    _write_bars(rng, image, names, left, base, slot, most, colours)
    for box in boxes:
        image.paste(colours.fill, box)
    image.paste(colours.ink, (left - 1, base, right, base + 1))
    asked, target = rng.choice([("tallest bar", heights.index(max(heights))),
                                ("lowest bar", heights.index(min(heights))),
                                (f"bar of '{names[named]}'", named)])
    return f"Point at the {asked}.", boxes[target], image

def _write_bars(rng, image, names, left, base, slot, most, colours):
    """Write title, ticks and names around bars of at most `most` pixels."""
    draw = ImageDraw.Draw(image)
    letters = font(rng.randint(12, 18))
    right = left + slot * len(names)
    title = rng.choice(("Sales", "Stock", "Orders", "Visits", "Output"))
    _write(draw, (left, 0, right, 50), title, letters, colours.ink)
    unit = rng.choice((1, 2, 5, 10))  # of one pixel
    step = rng.choice((50, 100))
    for up in range(0, most + 1, step):
        y = base - up
        image.paste(colours.head, (left - 6, y, right, y + 1))
        _write(draw, (0, y, left - 6, y), str(up * unit), letters, colours.ink)
    for x, name in zip(range(left, right, slot), names):
        _write(draw, (x, base, x + slot, base + 50), name, letters, colours.ink)

def _text_dots(rng, size, colours):
    """Dots with names between two axes."""
    names = _dot_names(rng, size)
    radius = rng.randint(4, 8)
    width, height = rng.randint(700, 1000), rng.randint(600, 900)
    edge = rng.randint(20, 40)
    letters = font(rng.randint(12, 18))
    # No dot and no name may touch another one; a name stands beside its dot.
    longest = max([letters.getlength(name) for name in names])
    reach = max(45, 8 + math.ceil(longest))
    xs = range(edge + radius + 1, width - radius - reach)
    ys = range(edge + radius, height - edge - 1 - radius)
    dots = _dot_places(rng, len(names), xs, ys, 2 * radius + reach)
    target = rng.randrange(len(names))
    fills = [colours.fill] * len(names)
    image = _paint_dots((width, height), edge, dots, radius, fills, colours)
    draw = ImageDraw.Draw(image)
    for (x, y), name in zip(dots, names):
        draw.text((x + radius + 4, y), name, colours.ink, letters, anchor="lm")
    question = f"Point at the dot labelled '{names[target]}'."
    return question, _dot_box(dots[target], radius), image

def draw_crop(image, point, side, mark=True):
    """The side x side pixels around a point (x, y), at the picture's resolution, with a ring."""
    half = side // 2
    crop = Image.new("RGB", (side, side), "#808080")  # Beyond the edge of the picture is grey.
    x, y = point
    crop.paste(image, (half - round(x), half - round(y)))
    draw = ImageDraw.Draw(crop)
    radius = max(3, round(side / 24))
    if mark and side < 100:
        width = 1 if side < 64 else 2
        draw.circle((half, half), radius, outline=MARK, width=width)
    elif mark:
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
    """Keep other processes out of a folder until the file that this returns is closed."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(Path(folder) / "lock", "w")
    how = fcntl.LOCK_EX
    if not wait:
        how |= fcntl.LOCK_NB
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

def digest_of(values):
    """A name of 8 hex digits for what JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

def code_digest(file, names=None):
    """A name of 16 hex digits for what the code of a Python file says: comments, docstrings and
    layout do not count. With names: only these top-level definitions and those that they reach.
    KeyError if the file does not define one of the names."""
    tree = _Wordless().visit(ast.parse(Path(file).read_text(encoding="utf-8")))
    statements = tree.body
    if names is not None:
        statements = _reached(statements, names)
    code = "\n".join([ast.unparse(statement) for statement in statements])
    return hashlib.sha256(code.encode()).hexdigest()[:16]

class _Wordless(ast.NodeTransformer):
    """Takes docstrings out of a tree."""
    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) else node

def _names_in(node):
    """All names below a node; of a.b it is a."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}

def _defined(statement):
    """The names that a top-level statement defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    targets = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets = [statement.target]
    return set().union(*[_names_in(target) for target in targets])

def _reached(statements, names):
    """The statements that define these names or what such a statement uses, in their order."""
    defined = [_defined(statement) for statement in statements]
    for name in names:
        if not any(name in some for some in defined):
            raise KeyError(name)
    wanted, known = set(names), 0
    while len(wanted) > known:  # Each round adds the names that the last one has reached.
        known = len(wanted)
        reached = [s for s, some in zip(statements, defined) if some & wanted]
        for statement in reached:
            wanted |= _names_in(statement)
    return reached

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
                pixels = np.asarray(image) // 257
                image = Image.fromarray(pixels.astype(np.uint8))
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

cached_image = functools.lru_cache(maxsize=256)(load_image)  # do not paint on what it returns

def find_file(folder, name):
    """The path of a file inside a resolved folder, or None. UserError if the name leads out."""
    path = folder / name
    exists = os.path.isfile(path)
    real = path.resolve() if exists else Path(os.path.normpath(path))
    if not real.is_relative_to(folder):
        raise UserError(f"{name!r} leads out of its folder, itself or through a link")
    return path if exists else None

def check_map(record):
    """UserError unless a record of navigation can be used."""
    check_layout(record.get("layout"))
    if record.get("look") not in (*LOOKS, *MIXES):
        raise UserError('"look" is missing or no name of a look')
    # A map has no question, and a box only where its picture has a margin.
    check_figure({"question": "the way", "within": 0, "box": [0, 0, 2, 2]} | record)

def check_figure(record):
    """UserError unless a record has a question, and a box within the size of its image."""
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
    for value in values if good else ():
        # True and False are no numbers here; NaN is in no range.
        good = good and type(value) in (int, float) and least <= value <= 9999
    if not good:
        raise UserError(f'"{key}" is missing or not {form} in pixels')

def read_examples(path, check=None):
    """The examples of a JSONL file. One without "id" is called line-N; images are not opened.
    UserError, "file:line: reason", for the first unusable line. check(record) may add to it."""
    folder = Path(path).parent.resolve()
    records = {}
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
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

def make_folder(folder, task, plan, make, **more):
    """Write a made data set, unless it is there. The same plan gives the same bytes.
    plan: {split: [arguments, ...]}, of what JSON can hold. make(rng, *arguments) gives (record,
    image); no layout or picture is in two places."""
    folder = Path(folder)
    name = hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]
    counts = {split: len(plan[split]) for split in plan}
    about = {"task": task, "plan": name, "counts": counts} | more
    if not folder.exists():
        with lock(folder.parent, wait=True):
            if not folder.exists():  # Another process may have made it meanwhile.
                _write_folder(folder, about, plan, make)

def _write_folder(folder, about, plan, make):
    """Write a data folder whole or not at all."""
    building = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)  # A process that was killed may have left it.
    (building / "images").mkdir(parents=True)
    taken = set()
    try:
        for split in plan:
            _write_split(building, split, plan[split], make, taken)
        write_file(building / "data.json", json.dumps(about, indent=2) + "\n")
        os.sync()  # All pictures at once: there are thousands.
        building.replace(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)  # A success leaves nothing of it.

def _write_split(folder, split, items, make, taken):
    """Write the pictures of a split, its JSONL file, and a preview of the first six."""
    rng = random.Random(split)
    lines, first = [], []
    for arguments in tqdm(items, split, disable=None):
        name = f"{split}-{len(lines):04d}"
        record, image = _make_new(rng, make, arguments, taken, name)
        record |= {"id": name, "image": f"images/{name}.png", "size": image.size}
        image.save(folder / record["image"], compress_level=1)
        lines.append(json.dumps(record) + "\n")
        if len(lines) <= 6:
            first.append((record, image))
    write_file(folder / f"{split}.jsonl", "".join(lines))
    _write_preview(folder / f"preview_{split}.png", split, first)

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

def _write_preview(path, label, examples):
    """A film strip of (record, image); where there is a question, a frame shows its target."""
    row = {"label": label, "images": [], "captions": [], "verdicts": [""] * len(examples)}
    for record, image in examples:
        if "question" in record:
            x0, y0, x1, y1 = record["box"]
            ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), outline="magenta")
        row["images"].append(image)
        row["captions"].append(record.get("question", record["id"]))
    film_strip(path, [row], side=500)

def own_examples(file, check_text=None):
    """{"train", "dev_id", "test_id": examples} of one's own JSONL of "image", "question", "box".
    check_text(name, text) raises UserError where the model cannot read a question."""
    parts = {"train": [], "dev_id": [], "test_id": []}

    def take(record):  # While a line is read, so that an error names it.
        image = cached_image(Path(file).parent / record["image"])
        example = {key: record.get(key) for key in ("id", "image", "question", "box")}
        example |= {"size": list(image.size), "within": 0}
        check_figure(example)
        if check_text:
            check_text("its question", example["question"])
        # Copies of a picture have the same bytes, and so they are in the same part.
        tenth = hashlib.sha256(image.tobytes()).digest()[0] % 10
        part = {0: "dev_id", 1: "test_id"}.get(tenth, "train")
        parts[part].append(example)

    read_examples(file, take)
    if not all(parts.values()):
        raise UserError(f"{file}: too few images to divide them 8:1:1 by their contents; add some")
    return parts

def make_official(data, maps, evals, cell):
    """The authors' maps as a data folder under `data`; returns that folder.

    maps: their JSON of training maps; evals: of test maps, or several with commas between. A PNG
    where the file names it is used; another map is drawn, and its record says "drawn": "here".
    """
    plan = {"train": [], "test_id": [], "test_size": []}
    if maps:
        for layout, picture in _read_official(maps, "input_image"):
            plan["train"].append((layout, picture, cell))
    for file in filter(None, evals.split(",")):
        for layout, picture in _read_official(file, "input_map"):
            split = "test_id" if len(layout) <= 5 else "test_size"
            plan[split].append((layout, picture, cell))
    plan = {split: items for split, items in plan.items() if items}
    entries = []
    for split, items in plan.items():
        random.Random(split).shuffle(items)  # An evaluation takes the first: mix the sizes.
        entries += items
    times = Counter("/".join(layout) for layout, _, _ in entries)
    if {*times.values()} != {1}:
        raise UserError(f"{maps} {evals}: no map, or one is there twice: {times.most_common(1)}")
    pictures = digest(*[picture for _, picture, _ in entries if picture])
    name = hashlib.sha256((json.dumps(plan) + pictures).encode()).hexdigest()[:8]
    folder = Path(data) / f"official-{name}"
    splits = [split.removeprefix("test_") for split in plan if split != "train"]
    make_folder(folder, "navigation", plan, _official_map, splits=splits)
    return folder

def _read_official(file, key):
    """[(layout, path of its picture or ""), ...] of one of the authors' files; `key` is what the
    file calls a picture."""
    folder = Path(file).resolve().parent
    found = []
    try:
        for entry in json.loads(Path(file).read_text(encoding="utf-8-sig")):
            about = entry["metadata"] if key == "input_map" else entry
            layout = ["".join(row) for row in about["layout"]]
            check_layout(layout)
            cells = "".join(layout)
            if (cells.index("S"), cells.index("G")) != (about["start_pos"], about["target_pos"]):
                raise UserError("start_pos or target_pos is not where the layout has S or G")
            picture = find_file(folder, entry.get(key, ""))
            found.append((layout, str(picture or "")))
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
TEXT, FAINT = (40, 44, 52), (120, 126, 136)
FRAMES = {"right": (0, 158, 115), "wrong": (213, 60, 40), "": (190, 195, 203)}
# Okabe and Ito's palette: colour-blind readers too can tell its colours apart.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000", "#968C28"]
GAP = 18  # pixels between the pictures of a film strip

def film_strip(path, rows, title="", side=150, most=6):
    """Write episodes as rows of at most `most` pictures, `side` pixels at the longer side. rows:
    dicts with a "label" and, of one length, "images" [PIL], "captions" [str] and "verdicts"
    ["right", "wrong" or ""]."""
    width = GAP + most * (side + GAP)
    sheet = Image.new("RGB", (width, 100 + len(rows) * (side + 500)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 12), title, TEXT, font(18))
    bottom = 44
    for row in rows:
        draw.text((GAP, bottom), row["label"], TEXT, font(14))
        x, y = GAP, bottom + 24
        for image, caption, verdict in zip(row["images"][:most], row["captions"], row["verdicts"]):
            image = ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.BOX)
            framed = ImageOps.expand(image, 3, FRAMES[verdict])
            sheet.paste(framed, (x - 3, y - 3))
            end = _write_caption(draw, x, y + image.height + 4, caption, side)
            bottom = max(bottom, end + GAP)
            x += side + GAP
    sheet.crop((0, 0, width, bottom)).save(path)

def _write_caption(draw, x, y, caption, width):
    """Write the lines of a text below each other; returns where they end."""
    for line in textwrap.wrap(caption[:400], width // 8):
        draw.text((x, y), line, TEXT, font(13))
        y += 16
    return y

def line_charts(path, panels, columns=3):
    """Write line charts of panels [(title, {series name: (xs, ys)}), ...]; None leaves a gap."""
    rows = math.ceil(len(panels) / columns)
    sheet = Image.new("RGB", (columns * 680, rows * 480), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, series) in enumerate(panels):
        row, column = divmod(number, columns)
        _draw_chart(draw, column * 680, row * 480, title, series)
    # At twice its size a chart is painted without smooth edges; shrinking gives them.
    half = sheet.width // 2, sheet.height // 2
    sheet.resize(half, Image.Resampling.LANCZOS).save(path)

def _draw_chart(draw, x, y, title, series):
    """One chart of 680 x 480 pixels whose upper left corner is (x, y)."""
    x0, x1, y1 = x + 104, x + 648, y + 424
    draw.text((x0, y + 14), title, TEXT, font(28))
    y0 = _draw_legend(draw, x0, y + 52, x + 660, series) + 44
    # Each is an array (points, 2) of x and y, in which None has become NaN.
    lines = [np.array(values, dtype=float).T for values in series.values()]
    known = np.concatenate([np.zeros((0, 2)), *lines])
    known = known[np.isfinite(known[:, 1])]
    low = high = np.zeros(2)
    if len(known):
        low, high = known.min(0), known.max(0)
    _draw_axes(draw, (x0, y0, x1, y1), low, high)
    extent = np.where(high > low, high - low, 1)
    scale = (x1 - x0, y0 - y1) / extent
    for line, colour in zip(lines, itertools.cycle(PALETTE)):
        _draw_line(draw, (line - low) * scale + (x0, y1), colour)

def _draw_legend(draw, left, y, right, names):
    """Write the names of series from `left` to `right` and below; returns y of the last line."""
    x = left
    for name, colour in zip(names, itertools.cycle(PALETTE)):
        length = font(22).getlength(name)
        if x > left and x + length > right:
            x, y = left, y + 26
        draw.text((x, y), name, colour, font(22))
        x += 24 + length
    return y

def _draw_axes(draw, box, low, high):
    """A frame with the lowest and the highest (x, y) at its ends."""
    x0, y0, x1, y1 = box
    draw.rectangle(box, outline=FRAMES[""], width=2)

    def write(x, y, value, anchor):
        draw.text((x, y), f"{value:.4g}", FAINT, font(22), anchor=anchor)

    write(x0 - 10, y1, low[1], "rm")
    write(x0 - 10, y0, high[1], "rm")
    write(x0, y1 + 8, low[0], "la")
    write(x1, y1 + 8, high[0], "ra")

def _draw_line(draw, points, colour):
    """A line through points (x, y). A NaN as y leaves a gap; a point between gaps becomes a dot."""
    run = []
    for x, y in [*points.tolist(), (0, math.nan)]:
        if not math.isnan(y):
            run.append((x, y))
            continue
        draw.line(run, colour, 4, joint="curve")
        if len(run) == 1:
            draw.circle(run[0], 5, colour)
        run = []

def curves(path, files, charts):
    """Paint the lines of metrics.jsonl files.
    charts: {stage: {title: "figure figure ..."}}. Each title becomes a chart of these figures by
    step. Figures that are always None are left out. KeyError names a stage that charts lacks or a
    figure that a line lacks: a new name must not empty its chart silently."""
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
                if set(values) != {None}:
                    series[name.replace("_", " ")] = steps, values
            if series:
                panels.append((f"{stage}: {title}", series))
    line_charts(path, panels or [("nothing was trained", {})])

def table(models, columns):
    """Markdown: a line for each model and split, and for the mean out of distribution.
    models: {name: rows of vrrl.evaluate}. columns: names of figures, shown in percent."""
    names = " | ".join(columns).replace("_", " ")
    lines = [f"| model | split | n | {names} | turns |", "| --- " * (len(columns) + 4) + "|"]
    for model, rows in models.items():
        far = [row for row in rows if row["ood"]]
        if far:
            rows = [*rows, _mean_row(far, columns)]
        for row in rows:
            cells = [model, row["split"], str(row["n"])]
            for name in columns:
                cells.append("-" if row[name] is None else f"{100 * row[name]:.1f}")
            cells.append(f"{row['turns']:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

def _mean_row(rows, columns):
    """The mean of each figure over the rows that know it."""
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
    cells = [str(cell) for cell in range(8, 257)]
    try:
        known = words[:1] == ["official"] and len(given) == 4 and given["cell"] in cells
        if not known or not (given["maps"] or given["eval"]):
            raise UserError(main.__doc__.splitlines()[0])
        folder = make_official(given["data"], given["maps"], given["eval"], int(given["cell"]))
    except (UserError, OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'stopped'}", file=sys.stderr)
        sys.exit(2)
    print(f"use it with data={folder}")

if __name__ == "__main__":
    main(sys.argv[1:])
