"""All that vrrl.py needs and that is not the algorithm: data, pictures, the embedded model, and the files of a run.

The task. An elf stands on a frozen lake and walks to a gift without stepping into a hole. The
model sees only the picture. Its answer, a list of moves, is drawn on the picture and shown to it.

Contents
    1. Looks and grid pictures    LOOKS, draw_grid, draw_path
    2. The rules of the lake      shortest_distances, walk, progress
    3. Random maps and mistakes   random_layout, sample_shortest_path, corrupt
    4. Reading files              read_manifest, check_layout, load_image
    5. Making the data            make_folder, make_navigation
    6. Tables and charts          table_figure, chart_figure, draw_point, make_figures, own_points
    7. The embedded model         build_embedded, see_talk, point_talk, make_embedded
    8. Speed of the model         KeyValues, grouped_attention, in_threads, backward
    9. Pictures for people        contact_sheet, film_strip, curves
   10. Reading settings           settings_table, check_value, nest
   11. Files of a run             write_file, Stopped, Log, lock, open_run
   12. Report and study           table, differences, report, study, study_report
   13. Real models                Optimizer, KahanOptimizer, checkpoint_layers, check_memory, make_official

A layout is a list of strings of S (start, the elf), F (frozen, safe), H (hole) and G (goal, the
gift). Cells are (row, column), counted from the top left. `rng` is always a random.Random.
"""

import contextlib
import dataclasses
import difflib
import fcntl
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.utils.checkpoint
import transformers
import yaml
from PIL import Image, ImageChops, ImageDraw, ImageFont
from tqdm import tqdm

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}  # (row, col)
CELL = 16          # pixels a cell: one visual token of the small model (patch 8, merge 2)
MAX_DRAWN = 100    # moves; a rambling answer must not slow training down
MAX_SIDE = 4096    # pixels; larger image files are refused before they are decoded
WORDS = {"F": "ice", "H": "hole", "S": "elf", "G": "gift"}
UNDER_PATH = {"F": "path", "H": "crash", "S": "start", "G": "found"}


class UserError(Exception):
    """Something that the user can mend; the message is one line that says where, what, and how."""


class Busy(UserError):
    """A folder is in use by another process."""


# ---------------------------------------------------------------- 1. looks and grid pictures

@dataclass(frozen=True)
class Look:
    """Colours (R, G, B) and the hole's shape. A new look needs one more row in LOOKS."""
    ground: tuple
    grid: tuple
    hole: tuple
    rim: tuple
    hole_shape: str   # disc, square, cross or ring
    coat: tuple
    hat: tuple
    skin: tuple
    box: tuple
    ribbon: tuple
    path: tuple
    alert: tuple      # where a path leaves the grid; unlike every other colour of the look


# Training sees "snow" and random mixes. The other three ask whether a skill survives a change of picture: their
# colours are new, and two of them have holes of a shape that no training picture has.
LOOKS = {
    "snow": Look((238, 245, 250), (200, 214, 224), (72, 142, 206), (36, 92, 152), "disc",
                 (38, 140, 72), (206, 44, 48), (248, 208, 170), (206, 44, 72), (252, 214, 70),
                 (245, 130, 20), (200, 0, 190)),
    "night": Look((38, 46, 78), (62, 74, 112), (4, 4, 10), (128, 92, 190), "square",
                  (84, 190, 220), (236, 236, 250), (214, 170, 140), (70, 170, 90), (240, 240, 240),
                  (250, 220, 60), (255, 70, 90)),
    "desert": Look((236, 208, 150), (206, 172, 110), (140, 62, 34), (92, 36, 20), "cross",
                   (60, 84, 170), (250, 250, 240), (150, 100, 66), (26, 140, 140), (250, 246, 230),
                   (122, 40, 170), (230, 0, 40)),
    "ink": Look((250, 248, 240), (150, 150, 150), (40, 40, 40), (40, 40, 40), "ring",
                (90, 90, 90), (30, 30, 30), (250, 248, 240), (186, 186, 180), (20, 20, 20),
                (30, 110, 220), (226, 30, 30)),
}


# Pictures in the manner of the authors' data, whose colours these are; never among the splits made here.
OFFICIAL = Look((240, 247, 252), (180, 200, 230), (70, 200, 245), (30, 120, 200), "disc", (60, 140, 60), (60, 140, 60),
                (250, 190, 130), (60, 80, 120), (225, 140, 40), (225, 6, 0), (60, 0, 120))
MIXES = tuple(f"mix{n:02d}" for n in range(40))   # random looks, for training


def far_colour(rng, used):
    """A random colour, the farthest of a few from those in `used`, to which it is added."""
    options = [tuple(rng.randrange(256) for _ in range(3)) for _ in range(8)]
    used.append(max(options, key=lambda c: min((math.dist(c, u) for u in used), default=0)))
    return used[-1]


@functools.lru_cache(maxsize=256)
def look_of(name):
    """The Look of this name: a row of LOOKS, or for one of MIXES random colours that its name decides.

    Training on many colours is what lets a small model meet new ones, as a large one has met all.
    """
    if name in LOOKS or name == "official":
        return LOOKS.get(name, OFFICIAL)
    if name not in MIXES:
        raise UserError(f"unknown look {name!r}")
    rng, used = random.Random(name), []
    colour = lambda: far_colour(rng, used)
    ground, hole, path, alert = colour(), colour(), colour(), colour()
    near = lambda c, by: tuple(max(0, min(255, x + by)) for x in c)
    return Look(ground, near(ground, -30), hole, near(hole, -40), rng.choice(("disc", "square")), colour(), colour(),
                colour(), colour(), colour(), path, alert)


def _draw_hole(draw, look, at):
    """One hole; `at(*fractions of the cell)` gives pixels."""
    rim = at(0.06)[0]
    if look.hole_shape == "disc":
        draw.ellipse(at(0.12, 0.12, 0.88, 0.88), fill=look.hole, outline=look.rim, width=rim)
    elif look.hole_shape == "square":
        draw.rectangle(at(0.14, 0.14, 0.86, 0.86), fill=look.hole, outline=look.rim, width=rim)
    elif look.hole_shape == "ring":
        draw.ellipse(at(0.14, 0.14, 0.86, 0.86), outline=look.hole, width=3 * rim)
    else:
        draw.line(at(0.2, 0.2, 0.8, 0.8), fill=look.hole, width=4 * rim)
        draw.line(at(0.2, 0.8, 0.8, 0.2), fill=look.hole, width=4 * rim)


def _draw_elf(draw, look, at):
    """Coat, face, pointed hat with a bobble."""
    draw.polygon(at(0.5, 0.5, 0.8, 0.92, 0.2, 0.92), fill=look.coat, outline=look.coat)
    draw.ellipse(at(0.3, 0.34, 0.7, 0.72), fill=look.skin, outline=look.hat, width=at(0.03)[0])
    draw.polygon(at(0.5, 0.08, 0.76, 0.44, 0.24, 0.44), fill=look.hat)
    draw.ellipse(at(0.43, 0.03, 0.57, 0.17), fill=look.coat)
    for x in (0.4, 0.56):
        draw.ellipse(at(x, 0.5, x + 0.06, 0.57), fill=(20, 20, 20))


def _draw_gift(draw, look, at):
    """Box, lid, ribbon and bow."""
    draw.rectangle(at(0.2, 0.46, 0.8, 0.9), fill=look.box)
    draw.rectangle(at(0.14, 0.34, 0.86, 0.5), fill=look.box, outline=look.ribbon,
                   width=at(0.025)[0])
    draw.rectangle(at(0.43, 0.34, 0.57, 0.9), fill=look.ribbon)
    draw.ellipse(at(0.24, 0.12, 0.5, 0.36), outline=look.ribbon, width=at(0.08)[0])
    draw.ellipse(at(0.5, 0.12, 0.76, 0.36), outline=look.ribbon, width=at(0.08)[0])


@functools.lru_cache(maxsize=256)
def _tile(look, cell, kind):
    """Picture of one cell. Drawn 8 times too large and shrunk, for smooth edges; done once."""
    big = 8 * cell
    tile = Image.new("RGB", (big, big), look_of(look).ground)
    draw, at = ImageDraw.Draw(tile), lambda *fractions: [round(f * big) for f in fractions]
    if kind != "F":
        {"H": _draw_hole, "S": _draw_elf, "G": _draw_gift}[kind](draw, look_of(look), at)
    tile = tile.resize((cell, cell), Image.Resampling.BOX)
    line = max(1, cell // 24)
    draw = ImageDraw.Draw(tile)   # lines at the top and left only: neighbours supply the others
    draw.rectangle((0, 0, cell - 1, line - 1), fill=look_of(look).grid)
    draw.rectangle((0, 0, line - 1, cell - 1), fill=look_of(look).grid)
    return tile


@functools.lru_cache(maxsize=256)
def _lake(look, cell, rows, columns):
    """All ice. Most cells are, so this saves draw_grid most of its work."""
    image = Image.new("RGB", (columns * cell, rows * cell))
    for index in range(rows * columns):
        image.paste(_tile(look, cell, "F"), (index % columns * cell, index // columns * cell))
    return image


def draw_grid(layout, look, cell=CELL):
    """Picture of a layout: RGB, (columns * cell) x (rows * cell) pixels, no margin.

    Without a margin every cell falls on whole patches of the vision tower.
    """
    image = _lake(look, cell, len(layout), len(layout[0])).copy()
    for r, row in enumerate(layout):
        for c, kind in enumerate(row):
            if kind != "F":
                image.paste(_tile(look, cell, kind), (c * cell, r * cell))
    return image


def _bar(draw, a, b, width, colour):
    """Thick line between two points (x, y) on one row or column. Square ends close the corners."""
    half = width / 2 - 0.5
    draw.rectangle((int(min(a[0], b[0]) - half), int(min(a[1], b[1]) - half),
                    int(max(a[0], b[0]) + half), int(max(a[1], b[1]) + half)), fill=colour)


def draw_path(image, shape, start, moves, look="snow", box=None):
    """Feedback: a new RGB image with the path drawn on it. `image` itself is left alone.

    shape: (rows, columns) of the grid, which fills the image, or its box (left, top, right, bottom), in pixels. start: (row, column). moves: names
    from MOVES (KeyError otherwise). A hollow square marks the start, an arrow head the end, and a
    bar the edge where the path leaves the grid and stops. Drawing is purely geometric. It knows
    nothing of holes or goals: whether the path is right is for the model to see.
    """
    image = image.convert("RGB") if image.mode != "RGB" else image.copy()
    draw, look = ImageDraw.Draw(image), look_of(look)
    (rows, columns), (row, column) = shape, start
    left, top, right, bottom = box or (0, 0, *image.size)
    width, height = (right - left) / columns, (bottom - top) / rows   # of a cell, pixels
    unit = min(width, height)
    thick, used = max(2, round(unit / 6)), {}
    first = here = (left + (column + 0.5) * width, top + (row + 0.5) * height)
    step, outside = None, False
    for move in moves[:MAX_DRAWN]:
        dr, dc = step = MOVES[move]
        outside = not (0 <= row + dr < rows and 0 <= column + dc < columns)
        if outside:
            x, y = here[0] + dc * (width - thick) / 2, here[1] + dr * (height - thick) / 2
            _bar(draw, here, (x, y), thick, look.path)
            dx, dy = abs(dr) * (width - thick) * 0.5, abs(dc) * (height - thick) * 0.5
            _bar(draw, (x - dx, y - dy), (x + dx, y + dy), thick, look.alert)
            break
        there = (here[0] + dc * width, here[1] + dr * height)
        # A stretch walked again is drawn beside the first time, so that it does not vanish.
        stretch = (min(row, row + dr), min(column, column + dc), dr == 0)
        times = used[stretch] = used.get(stretch, -1) + 1
        dx, dy = (abs(d) * (0, 1.5, -1.5)[times % 3] * thick for d in step)
        a, b = (here[0] + dx, here[1] + dy), (there[0] + dx, there[1] + dy)
        _bar(draw, a, b, thick, look.path)
        if times % 3:
            _bar(draw, here, a, thick, look.path)
            _bar(draw, b, there, thick, look.path)
        row, column, here = row + dr, column + dc, there
    # Whole pixels, so that dot and arrow head stay symmetric at 16 pixels a cell.
    x, y = int(first[0]), int(first[1])
    for radius, colour in ((round(0.2 * unit), look.path), (round(0.07 * unit), look.ground)):
        draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=colour)
    if step and not outside:
        (dy, dx), size, x, y = step, round(0.36 * unit), int(here[0]), int(here[1])
        tip, tail, side = size - 1, size // 2, size
        draw.polygon(((x + dx * tip, y + dy * tip),
                      (x - dx * tail + dy * side, y - dy * tail + dx * side),
                      (x - dx * tail - dy * side, y - dy * tail - dx * side)), fill=look.path)
    return image


# ---------------------------------------------------------------- 2. the rules of the lake

def find_cell(layout, kind):
    """(row, column) of the first cell of this kind."""
    return next((r, row.index(kind)) for r, row in enumerate(layout) if kind in row)


@functools.lru_cache(maxsize=20_000)   # rewards ask for the same maps again and again
def _distances(layout):
    distance = np.full((len(layout), len(layout[0])), -1, dtype=np.int64)
    queue = deque([find_cell(layout, "G")])
    distance[queue[0]] = 0
    while queue:
        row, column = queue.popleft()
        for dr, dc in MOVES.values():
            r, c = row + dr, column + dc
            if (0 <= r < len(layout) and 0 <= c < len(layout[0]) and layout[r][c] != "H"
                    and distance[r, c] < 0):
                distance[r, c] = distance[row, column] + 1
                queue.append((r, c))
    distance.flags.writeable = False   # callers share it
    return distance


def shortest_distances(layout):
    """Least moves from each cell to the goal: int array (rows, columns), -1 where no way exists."""
    return _distances(tuple(layout))


def walk(layout, moves):
    """What happens to the elf: (outcome, steps), steps being the moves up to the deciding one.

    The first move that leaves the grid or meets a hole decides: "edge" or "hole", even after the
    goal. Without such a move: "past" (the goal was reached before the last move), "short" (it was
    never reached), "longer" (reached at the last move, but a shorter way exists), or "exact".

        walk(["SF", "HG"], ["right", "down"]) == ("exact", 2)
    """
    (row, column), reached = find_cell(layout, "S"), 0
    shortest = int(shortest_distances(layout)[row, column])
    for step, move in enumerate(moves, 1):
        row, column = row + MOVES[move][0], column + MOVES[move][1]
        if not (0 <= row < len(layout) and 0 <= column < len(layout[0])):
            return "edge", step
        if layout[row][column] == "H":
            return "hole", step
        if layout[row][column] == "G" and not reached:
            reached = step
    if not reached:
        return "short", len(moves)
    if reached < len(moves):
        return "past", reached
    return ("exact" if reached == shortest else "longer"), reached


def progress(layout, moves):
    """p_t in [0, 1]: leading moves that each come one closer to the goal, over the optimal length.

    0 when the optimal path is complete and more moves follow: the answer runs past its goal.
    """
    distance, (row, column) = shortest_distances(layout), find_cell(layout, "S")
    optimal, good = int(distance[row, column]), 0
    for move in moves:
        r, c = row + MOVES[move][0], column + MOVES[move][1]
        if not (0 <= r < len(layout) and 0 <= c < len(layout[0])):
            break
        if distance[r, c] < 0 or distance[r, c] >= distance[row, column]:
            break
        row, column, good = r, c, good + 1
    return 0.0 if good == optimal and len(moves) > optimal else good / optimal


# ---------------------------------------------------------------- 3. random maps and mistakes

def random_layout(rng, n, hole_share=(0.1, 0.35)):
    """A solvable n x n layout whose goal is at least 2 moves away.

    From 4 x 4 on, the least distance is itself drawn from 2..n: otherwise near goals prevail.
    """
    least = rng.randint(2, n) if n >= 4 else 2
    while True:
        holes = round(rng.uniform(*hole_share) * (n * n - 2))
        layout = _place(rng, n, holes)
        if shortest_distances(layout)[find_cell(layout, "S")] >= least:
            return layout


def _place(rng, n, holes):
    """n x n cells with a start, a goal and so many holes, anywhere."""
    cells = ["F"] * (n * n)
    for kind, index in zip("SG" + "H" * holes, rng.sample(range(n * n), holes + 2)):
        cells[index] = kind
    return ["".join(cells[r * n:(r + 1) * n]) for r in range(n)]


def sample_shortest_path(layout, rng):
    """One shortest path as move names; every step picks evenly among the moves that come closer."""
    distance, (row, column), path = shortest_distances(layout), find_cell(layout, "S"), []
    while distance[row, column] > 0:
        closer = [m for m, (dr, dc) in MOVES.items()
                  if 0 <= row + dr < len(layout) and 0 <= column + dc < len(layout[0])
                  and distance[row + dr, column + dc] == distance[row, column] - 1]
        path.append(rng.choice(closer))
        row, column = row + MOVES[path[-1]][0], column + MOVES[path[-1]][1]
    return path


def _greedy(layout, rng):
    """The straight way to the goal as if there were no holes: the most natural mistake."""
    (row, column), (goal_row, goal_column) = find_cell(layout, "S"), find_cell(layout, "G")
    moves = (["down" if goal_row > row else "up"] * abs(goal_row - row)
             + ["right" if goal_column > column else "left"] * abs(goal_column - column))
    if rng.random() < 0.5:
        rng.shuffle(moves)
    return moves


def corrupt(layout, path, rng):
    """A wrong answer near the right one: a non-empty list of at most 2 * len(path) + 4 moves.

    path: a shortest path. The kinds of mistake are mixed so that every outcome of walk occurs; the straight way is the
    most frequent, as it is among a model's own mistakes.
    """
    names = list(MOVES)
    while True:
        wrong, kind, at = list(path), min(rng.randrange(10), 6), rng.randrange(len(path))
        if kind == 0:
            wrong[at] = rng.choice(names)
        elif kind == 1:
            wrong = wrong[:-rng.randint(1, 2)]
        elif kind == 2:
            wrong += rng.choices(names, k=rng.randint(1, 2))
        elif kind == 3:
            other = rng.randrange(len(path))
            wrong[at], wrong[other] = wrong[other], wrong[at]
        elif kind == 4:   # a detour: step aside, and back after the next move
            there, back = rng.choice([("up", "down"), ("down", "up"), ("left", "right"),
                                      ("right", "left")])
            wrong[at:at + 1] = [there, wrong[at], back]
        elif kind == 5:
            wrong = rng.choices(names, k=rng.randint(1, len(path) + 2))
        else:
            wrong = _greedy(layout, rng)
        if wrong and walk(layout, wrong)[0] != "exact":
            return wrong


# ---------------------------------------------------------------- 4. reading files

def check_layout(layout):
    """Raise UserError unless this is a solvable layout of 2 to 16 rows and columns."""
    if not isinstance(layout, list) or not all(isinstance(row, str) for row in layout):
        raise UserError("layout is not a list of strings")
    if not 2 <= len(layout) <= 16 or not 2 <= len(layout[0]) <= 16:
        raise UserError("layout needs 2 to 16 rows and columns")
    if len(set(map(len, layout))) > 1:
        raise UserError("layout has rows of different lengths")
    cells = "".join(layout)
    if set(cells) - set(WORDS):
        raise UserError("layout has letters other than S, F, H and G")
    if cells.count("S") != 1 or cells.count("G") != 1:
        raise UserError("layout needs exactly one S and one G")
    if shortest_distances(layout)[find_cell(layout, "S")] < 0:
        raise UserError("layout has no way from S to G")


def read_manifest(path, check=lambda record: None, ids=True):
    """The records of a JSONL file. Image paths are relative to the file's folder.

    check: a task's own look at a record. ids: whether each line must bring its own; otherwise one without gets its line number.
    Raises UserError, "file:line: reason", for the first line that is not a usable record.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    folder, records, seen = path.parent.resolve(), [], set()
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                records.append(_check_record(line, folder, seen, None if ids else f"line-{number}"))
                check(records[-1])
            except UserError as error:
                raise UserError(f"{path}:{number}: {error}") from None
    if not records:
        raise UserError(f"{path}: has no records")
    return records


def _check_record(line, folder, seen, name=None):
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError("not JSON") from None
    if not isinstance(record, dict):
        raise UserError("not a JSON object")
    if name and "id" not in record:
        record["id"] = name
    for key in ("id", "image"):
        if not isinstance(record.get(key), str) or not record[key]:
            raise UserError(f'"{key}" is missing or not a text')
    if record["id"] in seen:
        raise UserError(f"id {record['id']!r} is used twice")
    seen.add(record["id"])
    name = record["image"]
    if Path(name).is_absolute() or "\0" in name:
        raise UserError(f"image {name!r} is not a relative path")
    try:
        target = (folder / name).resolve()   # follows links: a link may lead outside as well
        inside, exists = target.is_relative_to(folder), target.is_file()
    except (OSError, RuntimeError, ValueError) as error:   # too long, a circle of links, ...
        raise UserError(f"image {name!r} is not a usable path ({error})") from None
    if not inside:
        raise UserError(f"image {name!r} leaves the data folder")
    if not exists:
        raise UserError(f"image {name!r} does not exist")
    return record


def load_image(path):
    """Decode an image file to RGB. UserError if missing, broken, or wider or higher than 4096."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)   # ours is stricter
            with Image.open(path) as image:
                if max(image.size) > MAX_SIDE:
                    raise UserError(f"{path}: image is {image.width} x {image.height} pixels, "
                                    f"more than {MAX_SIDE}")
                return image.convert("RGB")
    except UserError:
        raise
    except Exception as error:   # decoders raise many kinds for broken files
        raise UserError(f"{path}: not a usable image ({error})".replace("\n", " ")) from None


cached_image = functools.lru_cache(maxsize=256)(load_image)   # for the pictures of a data folder, which do not change; a split of 250 fits


# ---------------------------------------------------------------- 5. making the data

def sft_turns(answers, thoughts):
    """An example episode: each wrong attempt is drawn, judged in a word, and replaced.

    answers: texts of the attempts, the right one last; thoughts: a judgement of each wrong one. "loss" says what is
    trained: True all, False nothing, "think" the judgement only. Wrong answers are context: the model learns to leave
    them, not to make them.
    """
    turns = [{"text": f"<ANSWER>{answers[0]}</ANSWER>", "loss": not thoughts}]
    for i, thought in enumerate(thoughts, 1):
        text = f"<THINK>{thought}</THINK><ANSWER>{answers[i]}</ANSWER>"
        turns.append({"text": text, "loss": True if i == len(thoughts) else "think"})
    return turns + [{"text": f"<FINAL>{answers[-1]}</FINAL>", "loss": True}]


def _wrong_count(index, rng):
    """How many wrong attempts the SFT trace of this index shows: none in half of them, or 1 to 4."""
    return 0 if index % 2 == 0 else rng.choices((1, 2, 3, 4), (4, 3, 2, 1))[0]


def _sft_record(index, record, rng):
    layout, wrongs = record["layout"], []
    path = sample_shortest_path(layout, rng)
    count = _wrong_count(index, rng)
    while len(wrongs) < count:
        wrong = corrupt(layout, path, rng)
        if wrong not in wrongs:
            wrongs.append(wrong)
    answers = [" ".join(moves) for moves in (*wrongs, path)]
    return {**record, "id": f"sft-{index:04d}", "turns": sft_turns(answers, [walk(layout, wrong)[0] for wrong in wrongs])}


def _plan(train_maps, test_maps, dev_maps):
    """{split: [(size, look), ...]}. Test comes first: the other counts leave it as it is."""
    others, plan = [name for name in LOOKS if name != "snow"], {}
    for part, count in (("test", test_maps), ("dev", dev_maps)):
        for kind, sizes, looks in (("id", (3, 4, 5), ["snow"]), ("size", (6, 7), ["snow"]),
                                   ("look", (3, 4, 5), others), ("both", (6, 7), others)):
            plan[f"{part}_{kind}"] = [(sizes[i % len(sizes)], looks[i // len(sizes) % len(looks)])
                                      for i in range(count)]
    small, middle = min(300, train_maps // 10), round(0.3 * train_maps)   # few 3x3 maps exist
    plan["train"] = [(n, "snow" if i % 4 == 0 else MIXES[i % len(MIXES)]) for n, count in
                     ((3, small), (4, middle), (5, train_maps - small - middle))
                     for i in range(count)]
    return plan


def _draw_records(split, wanted, rng, taken, cell):
    """(record, image) of each map of a split. `taken` holds the layouts of all splits so far, and grows."""
    records = []
    for size, look in wanted:
        for _ in range(1000):
            layout = random_layout(rng, size)
            if tuple(layout) not in taken:
                break
        else:
            raise UserError(f"{split}: no new {size} x {size} map found; ask for fewer")
        taken.add(tuple(layout))
        records.append((layout, look))
    if split == "train":
        rng.shuffle(records)   # sizes mixed; the first ones also serve as SFT examples
    for i, (layout, look) in enumerate(records):
        record = {"id": f"{split}-{i:04d}", "image": f"images/{split}-{i:04d}.png", "layout": layout, "look": look}
        yield record, draw_grid(layout, look, cell)


def make_navigation(folder, *, seed, train_maps, sft_traces, test_maps, dev_maps,
                    cell=CELL, progress=True):
    """Write all navigation splits, previews and data.json into `folder`, unless it is there.

    No layout is in two test, dev or train files; SFT uses training maps.
    """
    if sft_traces > train_maps:
        raise UserError(f"{sft_traces} SFT traces need as many training maps, not {train_maps}")
    settings = {"seed": seed, "train_maps": train_maps, "sft_traces": sft_traces,
                "test_maps": test_maps, "dev_maps": dev_maps, "cell": cell}
    draw = lambda split, wanted, rng, taken: _draw_records(split, wanted, rng, taken, cell)
    make_folder(folder, "navigation", settings, _plan(train_maps, test_maps, dev_maps), draw, _sft_record, _preview, progress)


def make_folder(folder, task, settings, plan, draw, trace, preview, show, taught=lambda record: True):
    """Write a data folder: images, <split>.jsonl, preview_<split>.png and data.json. It appears whole at the end or not at all.

    plan: {split: what to draw}. draw(split, wanted, rng, taken) yields (record, image), `taken` being a set that all splits
    share; trace(index, record, rng) makes an SFT record of a training record; preview(folder, record) gives (picture,
    caption); taught(record): whether a training record may become an SFT record. The same settings give the same bytes.
    """
    folder = Path(folder)
    if (folder / "data.json").is_file():
        return
    if folder.exists():
        raise UserError(f"{folder}: has no data.json; remove it or choose another folder with data=")
    building = folder.with_name(f"{folder.name}.tmp")
    with lock(folder.parent, wait=True):   # another process may be making the same data
        if folder.exists():
            return
        shutil.rmtree(building, ignore_errors=True)   # left by a process that was killed
        try:
            (building / "images").mkdir(parents=True)
            _fill_folder(building, task, settings, plan, draw, trace, preview, show, taught)
            os.sync()   # thousands of pictures: all at once
            os.replace(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)   # nothing is left of it after a success


def _fill_folder(folder, task, settings, plan, draw, trace, preview, show, taught):
    seed, taken, splits = settings["seed"], set(), {}
    with tqdm(total=sum(map(len, plan.values())), desc=task, unit="picture", disable=not show) as bar:
        for split, wanted in plan.items():
            splits[split] = []
            for record, image in draw(split, wanted, random.Random(f"{seed} {split}"), taken):
                image.save(folder / record["image"], compress_level=1)
                splits[split].append(record)
                bar.update()
    order, rng = [record for record in splits["train"] if taught(record)], random.Random(f"{seed} sft")
    rng.shuffle(order)
    splits["sft"] = [trace(i, record, rng) for i, record in enumerate(order[:settings["sft_traces"]])]
    sums = {}
    for split, records in splits.items():
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
        sums[f"{split}.jsonl"] = hashlib.sha256(content).hexdigest()
        _write_safely(folder / f"{split}.jsonl", content)
        items = [preview(folder, record) for record in records[:12]]
        if items:
            contact_sheet(folder / f"preview_{split}.png", items, zoom=3 if items[0][0].width < 300 else 1)
    about = {"task": task, "settings": settings, "sha256": sums,
             "counts": {split: len(records) for split, records in splits.items()}}
    _write_safely(folder / "data.json", (json.dumps(about, indent=2) + "\n").encode())


def _write_safely(path, content):
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _preview(folder, record):
    """(picture, caption) of a record; of an SFT record, with its first answer drawn."""
    image, caption, layout = load_image(folder / record["image"]), record["id"], record["layout"]
    if "turns" in record:
        moves = re.search("<ANSWER>(.*?)</ANSWER>", record["turns"][0]["text"])[1].split()
        shape = (len(layout), len(layout[0]))
        image = draw_path(image, shape, find_cell(layout, "S"), moves, record["look"])
        caption += f": {walk(layout, moves)[0]}"
    return image, caption


# ---------------------------------------------------------------- 6. tables and charts
# Pictures to point at. `embedded`: few large visual tokens and no words, for the small model, where colours mark what is asked
# for. `text`: words and numbers, 400 to 900 pixels along the longer side, for real VLMs. A box is [x0, y0, x1, y1] in pixels, half open:
# exactly the pixels of the target's fill.

STEP, MOST = 8, 32   # the embedded model counts coordinates in steps of 8 pixels, half a visual token, up to 32


RED, BLUE, HAIR = (225, 25, 30), (30, 60, 235), (0, 225, 40)   # marked columns and bars, marked rows, drawn points: the same in every look


@dataclass(frozen=True)
class Style:
    """Colours (R, G, B) and build of tables and charts; None: drawn anew for each picture."""
    page: tuple
    ink: tuple
    head: tuple        # header cells
    bar: tuple
    rules: str = None  # grid, rows or none
    zebra: bool = None
    corner: str = "top left" # of a table, where its two headers meet
    chart: str = "bars"      # bars, sideways or points
    bitmap: bool = False     # Pillow's bitmap font


CORNERS = ("top left", "top right", "bottom left", "bottom right")
# Training sees "paper" and the random MIXES. The others ask whether a skill survives a change of picture: all have other
# colours, slate also headers at a corner, and sand charts of a type, never trained on.
STYLES = {
    "paper": Style((252, 252, 250), (60, 60, 66), (206, 216, 228), (120, 160, 150)),
    "slate": Style((34, 40, 52), (200, 206, 216), (66, 78, 100), (120, 130, 190), "none", True, "bottom right", "sideways"),
    "sand": Style((240, 222, 184), (96, 64, 40), (206, 176, 128), (170, 110, 70), "rows", False, "top right", "points"),
    "print": Style((255, 255, 255), (0, 0, 0), (225, 225, 225), (180, 180, 180), "grid", False, "bottom left", "sideways", True),
}


@functools.lru_cache(maxsize=256)
def style_of(name):
    """The Style of this name: a row of STYLES, or for one of MIXES random colours that its name decides."""
    if name in STYLES:
        return STYLES[name]
    if name not in MIXES:
        raise UserError(f"unknown look {name!r}")
    rng, used = random.Random(f"style {name}"), [RED, BLUE, HAIR]
    page, head, bar = (far_colour(rng, used) for _ in range(3))
    return Style(page, _ink_on(page), head, bar, corner=rng.choice(CORNERS[:3]), chart=rng.choice(("bars", "sideways")))


def _ink_on(colour):
    """Black or white: what is legible on a colour."""
    return (20, 20, 20) if 299 * colour[0] + 587 * colour[1] + 114 * colour[2] > 128_000 else (240, 240, 240)


def _near(colour, by=22):
    return tuple(max(0, c - by) if sum(colour) > 384 else min(255, c + by) for c in colour)


@dataclass(frozen=True)
class Figure:
    """A picture with a question about it.

    paint(fill=None) draws it, with the target filled in another colour if one is given. near: boxes of what may be mistaken
    for the target. columns, rows: pixels of the centres along each side; ends: pixels of the bars' upper, or right, ends.
    strips: (whether it is marked, its box) of each column and each row of a table, or each bar.
    """
    paint: object
    question: str
    box: tuple
    near: tuple
    columns: tuple = ()
    rows: tuple = ()
    ends: tuple = ()
    strips: tuple = ()


def _font_of(style, size):
    return ImageFont.load_default_imagefont() if style.bitmap else _font(size)


def _write(draw, text, font, box, fill, align=0.5):
    """Text inside a box: in its middle, or with align 0 and 1 at its left and right. Half a pixel is rounded down."""
    x0, y0, x1, y1 = font.getbbox(text)
    x = box[0] + int((box[2] - box[0] - (x1 - x0)) * align) - x0
    draw.text((x, (box[1] + box[3] - y0 - y1) // 2), text, fill=fill, font=font)


def _block(draw, box, fill):
    """Fill a half-open box."""
    draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=fill)


CITIES = """Oslo Lima Cairo Turin Quito Perth Dakar Minsk Osaka Porto Accra Delhi Sofia Haifa Lyon Basel Bergen Tunis Hanoi
            Miami""".split()
MONTHS = "January February March April May June July August September October November December".split()
GOODS = "Tea Coffee Juice Milk Water Cocoa Soup Bread Rice Beans Apples Plums Cheese Honey Salt Eggs Flour Figs".split()
NAMES = "north south east west online stores".split()   # of a chart's series


def table_figure(rng, size, look, kind):
    """A table of size (rows, columns), without the headers; the target is one of its cells.

    embedded: one column header and one row header are marked by colour, and so are a few body cells that mean nothing.
    text: the question names the headers.
    """
    (rows, columns), style, text = size, style_of(look), kind == "text"
    rules = style.rules or rng.choice(("grid", "rows", "none"))
    zebra = rng.random() < 0.5 if style.zebra is None else style.zebra
    top, head = rows if "bottom" in style.corner else 0, columns if "right" in style.corner else 0   # where the headers are
    lines, body = [r for r in range(rows + 1) if r != top], [c for c in range(columns + 1) if c != head]
    row, column = rng.choice(lines), rng.choice(body)
    if text:
        font = _font_of(style, rng.randint(14, 20) if columns < 8 else rng.randint(12, 14))
        labels = {(r, head): name for r, name in zip(lines, rng.sample(CITIES, rows))}
        labels |= {(top, c): name for c, name in zip(body, rng.sample(MONTHS, columns))}
        for c in body:
            form, most = rng.choice(("{:.0f}", "{:.1f}", "{:,.0f}")), 10 ** rng.randint(2, 4)
            labels |= {(r, c): form.format(rng.uniform(0, most)) for r in lines}
        need = [max(math.ceil(font.getlength(labels.get((r, c), ""))) for r in range(rows + 1)) for c in range(columns + 1)]
        spare = max(424, min(870, sum(need) + (columns + 1) * rng.randint(16, 60))) - sum(need)
        widths = [n + spare // (columns + 1) + rng.randint(-2, 2) for n in need]
        heights = [font.getbbox("Ag")[3] + rng.randint(10, 20)] * (rows + 1)
        align = rng.choice((0.5, 0.9))
        question = f"Point at the cell in row '{labels[row, head]}' and column '{labels[top, column]}'."
    else:
        heights, widths = [CELL] * (rows + 1), [1]
        while sum(widths) % CELL:   # the whole picture is whole visual tokens
            widths = [rng.choice((16, 16, 32)) for _ in range(columns + 1)]
        dashes = {(r, c): (rng.randint(2, 4), rng.randint(6, 10)) for r in lines for c in body}
        question = "find the cell"
    marks = {(top, column): RED, (row, head): BLUE}
    if not text:
        for cell in rng.sample([(r, c) for r in lines for c in body if (r, c) != (row, column)], rng.randint(0, 3)):
            marks[cell] = rng.choice((RED, BLUE))
    xs, ys = ([sum(part[:i]) for i in range(len(part) + 1)] for part in (widths, heights))
    place = lambda r, c: (xs[c] + (rules == "grid"), ys[r] + (rules != "none"), xs[c + 1], ys[r + 1])   # a cell without its rules

    def paint(fill=None):
        image = Image.new("RGB", (xs[-1], ys[-1]), _near(style.page, 70))   # shows through as rules
        draw = ImageDraw.Draw(image)
        for r in range(rows + 1):
            for c in range(columns + 1):
                colour = style.head if r == top or c == head else _near(style.page) if zebra and r % 2 else style.page
                if not text:
                    colour = marks.get((r, c), colour)
                if fill and (r, c) == (row, column):
                    colour = fill
                box = place(r, c)
                _block(draw, box, colour)
                if text:
                    _write(draw, labels.get((r, c), ""), font, box, _ink_on(colour), 0.1 if c == head else align)
                elif (r, c) in dashes:   # what stands in a cell
                    at, long = dashes[r, c]
                    _block(draw, (xs[c] + at, ys[r] + 8, xs[c] + at + long, ys[r] + 10), style.ink)
        return image

    inside = [(r, c) for r in lines for c in body if (r, c) != (row, column)]
    inside.sort(key=lambda cell: ((cell[0] != row) + (cell[1] != column), math.dist(cell, (row, column))))
    near = [place(*cell) for cell in inside[:4]] + [place(top, column), place(row, head)]
    middle = lambda edges, index: (edges[index] + edges[index + 1]) / 2
    strips = tuple((c == column, (xs[c], 0, xs[c + 1], ys[-1])) for c in body)
    strips += tuple((r == row, (0, ys[r], xs[-1], ys[r + 1])) for r in lines)
    return Figure(paint, question, place(row, column), tuple(near), tuple(middle(xs, c) for c in body),
                  tuple(middle(ys, r) for r in lines), strips=strips)


def _heights(rng, count, most, gap):
    """So many lengths in pixels; the longest and the shortest are so by `gap` pixels at least, and often by little more."""
    while True:
        found = [rng.randint(most // 8 + 4, most) for _ in range(count)]
        if rng.random() < 0.6:   # close rivals: a glance is not enough
            one, other = rng.sample(range(count), 2)
            found[other] = min(most, max(most // 8 + 4, found[one] + rng.choice((-1, 1)) * rng.randint(gap, 3 * gap)))
        order = sorted(found)
        if order[1] - order[0] >= gap and order[-1] - order[-2] >= gap:
            return found


def chart_figure(rng, size, look, kind):
    """A chart of `size` categories: upright bars, bars that lie (`sideways`), or points joined by a line; the target is one of them.

    embedded: the question asks for the tallest, the shortest, or the one in the colour of the marks. text: it may name a
    category, and with several series the series; axes have ticks, and there may be a legend and value labels.
    """
    style, text = style_of(look), kind == "text"
    lying, dots, count = style.chart == "sideways", style.chart == "points", 1
    if text:
        font, count = _font_of(style, rng.randint(12, 15)), rng.choice((2, 3)) if dots else rng.choice((1, 1, 2))
        year, names, series = rng.randint(1990, 2010), rng.sample(GOODS, size), rng.sample(NAMES, count)
        names = [str(year + i) for i in range(size)] if dots else names
        before, after, base, top = 84 if lying else 60, 20, 64 if lying else 44, 84
        slot = rng.randint(max(34, 360 // size), 480 // size) if lying else rng.randint(max(52, 360 // size), 780 // size)
        most, gap, radius = rng.randint(260, 420), 5, rng.randint(5, 8)
        thick = max(8, round(slot * rng.uniform(0.5, 0.8) / count))
        unit = rng.choice((1, 2, 5, 10, 20)) / 100   # the value of a pixel
    else:
        slot, before, after, base, top, gap, radius, thick = CELL, CELL, 0, 8, 4, 3, 4, 10
        most = rng.choice((64, 80, 96)) - base - top
    across = before + slot * size + after       # along the categories, pixels
    along = base + most + top                   # along the values
    width, height = (along, across) if lying else (across, along)
    while True:   # points of two series must not hide each other
        values = [_heights(rng, size, most, gap) for _ in range(count)]
        if not dots or all(abs(a - b) > 2 * radius + 2 for column in zip(*values) for n, a in enumerate(column) for b in column[:n]):
            break

    def place(s, i):
        """Box of the bar or point of series s in category i."""
        value = values[s][i]
        if dots:
            x, y = before + i * slot + slot // 2, height - base - value
            return x - radius, y - radius, x + radius + 1, y + radius + 1
        at = before + i * slot + (slot - thick * count) // 2 + s * thick
        if lying:
            return base, at, base + value, at + thick
        return at, height - base - value, at + thick, height - base

    marked = rng.randrange(size)
    flat = [(s, i) for s in range(count) for i in range(size)]
    value = lambda place: values[place[0]][place[1]]
    ask = rng.choice(("tallest", "shortest", "marked") if not text else ("name",) if count > 1 else ("tallest", "shortest", "name", "name"))
    if ask in ("tallest", "shortest"):
        target = (max if ask == "tallest" else min)(flat, key=value)
        rivals = sorted(flat, key=value, reverse=ask == "tallest")
    else:
        target = rng.choice(flat) if text else (0, marked)
        rivals = sorted(flat, key=lambda one: (abs(one[1] - target[1]) + abs(one[0] - target[0]), one))
    s, i = target
    if not text:
        question = f"find the {ask}"
    elif ask == "name":
        which = f"'{names[i]}'" if count == 1 else f"'{series[s]}' in {names[i]}" if dots else f"'{names[i]}' in the series '{series[s]}'"
        question = f"Point at the {'point' if dots else 'bar'} of {which}."
    else:
        question = f"Point at the {'longest' if lying and ask == 'tallest' else ask} bar."
    if text:
        hues, title = [style.bar, RED, BLUE], rng.choice(("Sales", "Stock", "Orders", "Visits", "Output"))
        notes, lines, steps = not dots and rng.random() < 0.5, rng.random() < 0.5, rng.randint(3, 6)

    def paint(fill=None):
        image = Image.new("RGB", (width, height), style.page)
        draw = ImageDraw.Draw(image)
        if text:
            label(draw)
        if lying:
            _block(draw, (base - 2, 0 if not text else before - 8, base, height - after), style.ink)
        else:
            _block(draw, (before - 4, height - base, width - after, height - base + 2), style.ink)
        hue = lambda s, i: fill if fill and (s, i) == target else hues[s] if text else RED if i == marked else style.bar
        if dots:
            for s in range(count):
                ends = [((x0 + x1) // 2, (y0 + y1) // 2) for x0, y0, x1, y1 in (place(s, i) for i in range(size))]
                draw.line(ends, fill=hues[s] if text else style.ink, width=2)
        for s, i in sorted(flat, key=lambda one: one == target):
            x0, y0, x1, y1 = place(s, i)
            if dots:
                draw.ellipse((x0, y0, x1 - 1, y1 - 1), fill=hue(s, i))
            else:
                _block(draw, (x0, y0, x1, y1), hue(s, i))
            if text and notes and count == 1:
                note = (x1 + 4, y0, x1 + 40, y1) if lying else (x0 - 20, y0 - 18, x1 + 20, y0 - 2)
                _write(draw, f"{value((s, i)) * unit:g}"[:5], font, note, style.ink, 0 if lying else 0.5)
        return image

    def label(draw):
        """Title, legend, ticks and the names of the categories."""
        _write(draw, title, font, (0, 4, width, 28), style.ink)
        left = before
        for s in range(count if count > 1 else 0):
            _block(draw, (left, 34, left + 12, 46), hues[s])
            _write(draw, series[s], font, (left + 16, 32, left + 80, 48), style.ink, 0)
            left += 90
        for n in range(steps + 1):
            at, words = round(most * n / steps), f"{most * n / steps * unit:.1f}"
            if lying:
                if lines and n:
                    _block(draw, (base + at, before - 8, base + at + 1, height - after), _near(style.page, 40))
                _write(draw, words, font, (base + at - 30, before - 24, base + at + 30, before - 10), style.ink)
            else:
                if lines and n:
                    _block(draw, (before, height - base - at, width - after, height - base - at + 1), _near(style.page, 40))
                _write(draw, words, font, (4, height - base - at - 8, before - 8, height - base - at + 8), style.ink, 1)
        for i, name in enumerate(names):
            at = before + i * slot
            _write(draw, name, font, (0, at, base - 6, at + slot) if lying else (at, height - base + 6, at + slot, height - 14),
                   style.ink, 1 if lying else 0.5)

    boxes = [place(*one) for one in flat]
    middles = lambda a, b: tuple((box[a] + box[b]) / 2 for box in boxes)
    tops = [(box[1] + box[3]) / 2 for box in boxes] if dots else [box[2] if lying else box[1] for box in boxes]
    return Figure(paint, question, place(s, i), tuple(place(*one) for one in rivals if one != target)[:5],
                  () if lying else middles(0, 2), middles(1, 3) if lying else (), tuple(tops),
                  tuple((i == marked, box) for (_, i), box in zip(flat, boxes)))


FIGURES = {"table": table_figure, "chart": chart_figure}
SIZES = {("table", "embedded"): ((3, 4, 5), (6, 7)), ("table", "text"): ((4, 5, 6), (8, 9, 10)),
         ("chart", "embedded"): ((3, 4, 5), (6, 7, 8)), ("chart", "text"): ((4, 5, 6), (8, 9, 10))}


def _figure_plan(task, kind, train, test, dev):
    """{split: [(size, look), ...]}: sizes trained on and larger ones, looks trained on and others."""
    small, large = SIZES[task, kind]
    others, plan = [name for name in STYLES if name != "paper"], {}
    trained = ["paper" if i % 4 == 0 else mix for i, mix in enumerate(MIXES)]

    def items(count, sizes, looks):
        pairs = [(r, c) for r in sizes for c in sizes] if task == "table" else list(sizes)
        return [(pairs[i % len(pairs)], looks[(i + i // math.lcm(len(pairs), len(looks))) % len(looks)]) for i in range(count)]   # every size in every look

    for part, count in (("test", test), ("dev", dev)):
        for split, sizes, looks in (("id", small, ["paper"]), ("size", large, ["paper"]), ("look", small, others), ("both", large, others)):
            plan[f"{part}_{split}"] = items(count, sizes, looks)
    return plan | {"train": items(train, small, trained)}


def make_figures(folder, task, *, kind, seed, train, sft_traces, held_back, test, dev, progress=True):
    """Write all splits, previews and data.json of the task `table` or `chart` into `folder`, unless it is there.

    No picture is in two test, dev or train files; SFT uses training pictures, but none of the largest `held_back` sizes.
    """
    plan, most = _figure_plan(task, kind, train, test, dev), SIZES[task, kind][0][-1 - held_back]
    taught = lambda cells: np.max(cells) <= most   # rows and columns, or bars
    enough = sum(taught(size) for size, _ in plan["train"])
    if sft_traces > enough:
        raise UserError(f"points.sft_traces={sft_traces} needs as many training pictures of the sizes that are demonstrated; of "
                        f"points.train={train} these are {enough}: raise points.train, or lower points.held_back")

    def draw(split, wanted, rng, taken):
        for i, (size, look) in enumerate(wanted):
            for _ in range(1000):
                figure = FIGURES[task](rng, size, look, kind)
                image = figure.paint()
                key = hashlib.sha256(image.tobytes()).digest(), image.size
                if key not in taken:
                    break
            else:
                raise UserError(f"{split}: no new picture of size {size} found; ask for fewer")
            taken.add(key)
            name = f"{split}-{i:04d}"
            yield {"id": name, "image": f"images/{name}.png", "size": image.size, "question": figure.question, "box": figure.box,
                   "look": look, "cells": size, "near": figure.near if split == "train" else ()}, image

    trace = lambda index, record, rng: point_trace(record, index, rng)
    settings = {"kind": kind, "seed": seed, "train": train, "sft_traces": sft_traces, "held_back": held_back, "test": test, "dev": dev}
    make_folder(folder, task, settings, plan, draw, trace, _figure_preview, progress, lambda record: taught(record["cells"]))


def _figure_preview(folder, record):
    """(picture with the box drawn, caption); of an SFT record, with its first wrong attempt as well."""
    image, (x0, y0, x1, y1) = load_image(folder / record["image"]), record["box"]
    if record.get("count"):
        image = draw_point(image, record["wrong"][0])
    ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), outline=(255, 0, 255))
    return image, f"{record['id']}: {record['question']}"[:46 if image.width > 300 else 34]


def inside(box, point):
    """Whether a point (x, y), pixels, lies in a half-open box."""
    return box[0] <= point[0] < box[2] and box[1] <= point[1] < box[3]


def gap(box, point):
    """Distance in pixels from a point to a box; 0 inside and on its edge."""
    return math.hypot(*(max(low - p, 0, p - high) for low, p, high in zip(box[:2], point, box[2:])))


def whereabouts(box, point):
    """In words, where a box lies from a point: one or two of left, right, up, down; empty inside."""
    beyond = lambda low, p, high, before, after: [after] * (p < low) + [before] * (p >= high)
    return " ".join(beyond(box[0], point[0], box[2], "left", "right") + beyond(box[1], point[1], box[3], "up", "down"))


def wrong_points(record, rng, count=16):
    """At most so many points in pixels outside the box: something near it in kind, a near miss, or anywhere."""
    (width, height), (x0, y0, x1, y1), found = record["size"], record["box"], []
    for _ in range(20 * count):   # a box may leave little room
        kind = rng.random()
        if record.get("near") and kind < 0.6:
            box = rng.choice(record["near"])
            point = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
        elif kind < 0.8:   # beside the box, up to half its size away
            point = [rng.uniform(1.5 * x0 - 0.5 * x1, 1.5 * x1 - 0.5 * x0), rng.uniform(1.5 * y0 - 0.5 * y1, 1.5 * y1 - 0.5 * y0)]
        else:
            point = [rng.uniform(0, width), rng.uniform(0, height)]
        point = [round(min(max(p, 0), n - 1), 2) for p, n in zip(point, (width, height))]
        if not inside(record["box"], point):
            found.append(point)
    return found[:count]


def point_trace(record, index, rng):
    """An SFT record: how many wrong attempts its trace shows at most, and points to choose them from."""
    record = {**record, "id": f"sft-{index:04d}", "count": _wrong_count(index, rng), "wrong": wrong_points(record, rng)}
    return {key: value for key, value in record.items() if key != "near"}


def point_turns(task, record):
    """The turns of an SFT record in the task's own convention. Points that it cannot tell apart, or that are right there, are left out."""
    box, wrongs = record["box"], []
    right = task.attempt(record, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
    if not task.exact(record, right):
        raise UserError(f"{record['image']}: no point of the scale lies in the box {box}; raise points.scale, or with scale 0 lower points.step")
    for point in record["wrong"]:
        attempt = task.attempt(record, point)
        apart = not any(task.same(attempt, other) for other in (right, *wrongs))
        if len(wrongs) < record["count"] and apart and not task.exact(record, attempt):
            wrongs.append(attempt)
    thoughts = [whereabouts(box, task.pixel(record, wrong)) for wrong in wrongs]
    return sft_turns([f"{x} {y}" for x, y in (*wrongs, right)], thoughts)


def draw_point(image, point, crop=0):
    """Feedback: a new RGB image with a mark at `point`, in pixels; or a crop of it, `crop` pixels a side, moved inside the image.

    Cross hairs and a ringed dot, in a colour that none of our looks uses. The hairs run through the whole image, so that a
    look anywhere along them tells one coordinate.
    """
    image = image.convert("RGB") if image.mode != "RGB" else image.copy()
    radius = max(4, round(max(image.size) / 60))
    x, y = (min(max(int(p), 0), n - 1) for p, n in zip(point, image.size))
    draw, line = ImageDraw.Draw(image), max(1, radius // 4)
    disc = lambda r, **colours: draw.ellipse((x - r, y - r, x + r, y + r), **colours)
    draw.line((0, y, image.width, y), fill=HAIR, width=2)
    draw.line((x, 0, x, image.height), fill=HAIR, width=2)
    disc(radius, outline=(0, 0, 0), width=line)
    disc(radius - line, outline=(255, 255, 255), width=line)
    disc(max(1, radius // 3), fill=HAIR)
    if not crop:
        return image
    wide, high = min(crop, image.width), min(crop, image.height)
    left, top = min(max(x - wide // 2, 0), image.width - wide), min(max(y - high // 2, 0), image.height - high)
    return image.crop((left, top, left + wide, top + high))


def check_points(record, size):
    """Raise UserError unless a record has a question and a box inside its image, whose size is (width, height)."""
    if not isinstance(record.get("question"), str) or not record["question"].strip():
        raise UserError('"question" is missing or not a text')
    box, (width, height) = record.get("box"), size
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
    if not isinstance(box, list) or len(box) != 4 or not all(map(number, box)):
        raise UserError('"box" is missing or not [x0, y0, x1, y1] in pixels')
    if not (box[0] < box[2] and box[1] < box[3]):
        raise UserError(f"box {box} is empty: it needs x0 < x1 and y0 < y1")
    if box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height:
        raise UserError(f"box {box} leaves its image of {width} x {height} pixels")


def own_question(file, question):
    """The example of one's own image and question: no box is known."""
    if not question.strip():
        raise UserError('image= needs question="..."')
    return {"id": Path(file).name, "image": Path(file).name, "size": load_image(file).size, "question": question, "box": None}


def own_points(file, seed, sft_traces, show):
    """{split: records} of a JSONL file of {"image", "question", "box"}; "id" may be left out.

    Images are divided by a hash of their name, 80 % train, 10 % dev, 10 % test, so that no image is on two sides. UserError
    if a line is bad or a part is empty.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"data={file}: task=points needs a JSONL file of image, question and box; give data=FILE")
    parts, folder = {"train": [], "dev_id": [], "test_id": []}, file.parent.resolve()
    size_of = functools.lru_cache(maxsize=None)(lambda name: load_image(file.parent / name).size)   # an image may have many lines
    with tqdm(desc=file.name, unit="line", disable=not show) as bar:
        records = read_manifest(file, lambda record: (check_points(record, size_of(record["image"])), bar.update()), ids=False)
    for record in records:
        record = {key: record[key] for key in ("id", "image", "question", "box")} | {"size": size_of(record["image"])}
        name = (folder / record["image"]).resolve().relative_to(folder).as_posix()   # one image under two names is one image
        share = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
        parts["dev_id" if share == 0 else "test_id" if share == 1 else "train"].append(record)
    for part, records in parts.items():
        if not records:
            raise UserError(f"{file}: none of its images falls into {part.split('_')[0]}; images are divided 8:1:1 by name: add some")
    rng = random.Random(f"{seed} sft")
    chosen = rng.sample(parts["train"], min(sft_traces, len(parts["train"])))
    return parts | {"sft": [point_trace(record, i, rng) for i, record in enumerate(chosen)]}


# ---------------------------------------------------------------- 7. the embedded model
# The default model is small enough for a CPU, but it is a real Qwen3-VL, built from a config. It comes
# with eyes: as a downloaded VLM has seen pictures of all kinds, this one has learnt to say what is in
# pictures of all sizes and looks, and never to solve one. The result lies in assets/embedded as an
# ordinary Hugging Face folder, and vrrl.py loads it as it would load Qwen/Qwen3-VL-4B-Instruct.

VOCABULARY = """user assistant system up down left right ice hole elf gift path crash start found
                edge short past longer find the check it say cells""".split()
POINTING = ["point", "columns", "rows", "bars", "cell", "tallest", "shortest", "marked", "plain", "here",
            *map(str, range(MOST + 1))]
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_embedded(seed, more=()):
    """(model, tokenizer, image processor) of the embedded model, with random weights. more: words beside VOCABULARY.

    One grid cell of 16x16 pixels is 2x2 patches and, merged, one visual token. `initializer_range` decides whether
    it learns to see: with the usual 0.02 a model this small does not. Queries share keys and values in pairs, which
    halves the cache.
    """
    import tokenizers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from vrrl import TAGS
    special = [f"<|{name}|>" for name in "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()]
    vocab = {word: i for i, word in enumerate([*special, "<|unknown|>", *TAGS, *VOCABULARY, *more])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<|unknown|>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token="<|unknown|>",
        additional_special_tokens=special)
    tokenizer.add_tokens(TAGS)
    tokenizer.chat_template = CHAT
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[6, 5, 5], mrope_interleaved=True)
    config = transformers.Qwen3VLConfig(
        text_config=dict(
            vocab_size=88 if more else 64, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, initializer_range=0.06,
            tie_word_embeddings=True, rope_parameters=rope),
        vision_config=dict(
            depth=1, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=8, spatial_merge_size=2,
            temporal_patch_size=2, out_hidden_size=128, num_position_embeddings=256, deepstack_visual_indexes=[],
            initializer_range=0.06),
        image_token_id=vocab["<|image_pad|>"], video_token_id=vocab["<|video_pad|>"], tie_word_embeddings=True,
        vision_start_token_id=vocab["<|vision_start|>"], vision_end_token_id=vocab["<|vision_end|>"])
    torch.manual_seed(seed)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 256, "longest_edge": 1 << 20}, patch_size=8, merge_size=2,
                                         image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return transformers.Qwen3VLForConditionalGeneration(config), tokenizer, processor


def _random_walk(layout, rng, leave):
    """1 to 2n moves from the elf, on the grid except for the last one if `leave`.

    It mostly goes on or turns and seldom steps back, so that it looks like an answer.
    """
    (row, column), n, moves = find_cell(layout, "S"), len(layout), []
    length = rng.randint(1, n if leave else 2 * n)
    while True:
        inside = {m for m, (dr, dc) in MOVES.items() if 0 <= row + dr < n and 0 <= column + dc < n}
        if len(moves) >= length:
            if not leave:
                return moves
            if moves[-1] not in inside:   # it has gone straight on up to the edge
                return moves + [moves[-1]]
            move = moves[-1]
        elif moves and moves[-1] in inside and rng.random() < 0.4:
            move = moves[-1]
        else:
            back = tuple(-d for d in MOVES[moves[-1]]) if moves and rng.random() < 0.9 else None
            move = rng.choice([m for m in MOVES if m in inside and MOVES[m] != back])
        moves.append(move)
        row, column = row + MOVES[move][0], column + MOVES[move][1]


def see_talk(rng, pictures, sizes=(3, 4, 5, 6, 7), looks=(*LOOKS, *MIXES), cell=CELL):
    """A conversation about one map that teaches to see, and nothing about solving: [(image, question, answer), ...].

    Half of the questions name every cell of a picture, row by row: the plain one, or one with a random path drawn, where
    the cells under it have names of their own: a path over ice, a hole, the elf or the gift. The others read the moves of
    a drawn path. In a longer conversation only the first picture's cells are named. A pretrained model has learnt such
    things elsewhere; the small one, which starts from nothing, has not.
    """
    size, look, talk = rng.choice(sizes), rng.choice(looks), []
    layout = _place(rng, size, round(rng.uniform(0, 0.45) * (size * size - 2)))
    for number in range(pictures):
        image, under, at = draw_grid(layout, look, cell), set(), find_cell(layout, "S")
        moves, kind = _random_walk(layout, rng, leave=rng.random() < 0.15), rng.randrange(4)
        if kind or number:
            image = draw_path(image, (size, size), at, moves, look)
            for dr, dc in [(0, 0), *(MOVES[move] for move in moves)]:
                at = (at[0] + dr, at[1] + dc)
                under.add(at)
        if kind % 2 or number:
            talk.append((image, "say the path", " ".join(moves)))
        else:
            names = [(UNDER_PATH if (r, c) in under else WORDS)[layout[r][c]] for r in range(size) for c in range(size)]
            talk.append((image, "say the cells", " ".join(names)))
    return talk


def point_talk(rng, pictures):
    """A conversation about one table or chart that teaches to see, and nothing about solving: [(image, question, answer), ...].

    What is asked for: where a drawn point is, where the columns or rows are, how high the bars reach, in steps of 8 pixels; and
    of each column, row or bar whether it is marked, and whether the point lies on it ("here", if marked "found"). Sizes and looks
    are those of all splits. From the second picture on a point is drawn, as it is in feedback. It is never asked where the target is.
    """
    task = rng.choice(list(FIGURES))
    look, (small, large), talk = rng.choice((*STYLES, *MIXES)), SIZES[task, "embedded"], []
    size = rng.choice(range(small[0], large[-1] + 1))
    figure = FIGURES[task](rng, (size, rng.choice((*small, *large))) if task == "table" else size, look, "embedded")
    plain = figure.paint()
    unit = lambda p: math.ceil(p / STEP - 0.5)
    along = lambda places: " ".join(str(unit(p)) for p in places)
    width, height = plain.size
    asked = ["say the cells"] * 2 + ["say the point"] * 3
    asked += ["say the columns"] * bool(figure.columns) + ["say the rows"] * bool(figure.rows) + ["say the bars"] * bool(figure.ends)
    for n in range(pictures):
        image, question, point = plain, rng.choice(asked), (-1, -1)
        if question == "say the point" or n or rng.random() < 0.5:
            units = rng.randint(0, width // STEP), rng.randint(0, height // STEP)
            if rng.random() < 0.5:   # on a cell or bar
                x0, y0, x1, y1 = rng.choice((figure.box, *figure.near))
                units = unit((x0 + x1) / 2), unit((y0 + y1) / 2)
            point = units[0] * STEP, units[1] * STEP
            image = draw_point(plain, point)
        word = lambda marked, here: ("found" if marked else "here") if here else ("marked" if marked else "plain")
        answers = {"say the cells": lambda: " ".join(word(marked, inside(box, point)) for marked, box in figure.strips),
                   "say the point": lambda: f"{units[0]} {units[1]}",
                   "say the columns": lambda: along(figure.columns), "say the rows": lambda: along(figure.rows), "say the bars": lambda: along(figure.ends)}
        talk.append((image, question, answers[question]()))
    return talk


def make_embedded(folder, cfg):
    """Build the embedded model, teach it to see, and save it as a Hugging Face folder.

    First single pictures, then conversations of up to `see.pictures` of them: seeing must not depend on how much was
    said before. The lessons are those of cfg.task. It starts from random weights, or from a model with fewer words.
    """
    import vrrl
    model, tokenizer, processor = build_embedded(cfg.seed, POINTING if cfg.see.start else ())
    if cfg.see.start:
        weights = model.state_dict()   # shares memory with the model
        for name, old in vrrl.load_policy(cfg.see.start, cfg).model.state_dict().items():
            weights[name][:len(old)] = old   # the embedding has grown; old words keep their ids
    vrrl.save_policy(vrrl.Policy(model, tokenizer, processor, cfg), folder)
    policy, rng, talk = vrrl.load_policy(folder, cfg), random.Random(cfg.seed), vrrl.TASKS[cfg.task].lesson

    def lesson(pictures):
        episode = None
        for image, question, answer in pictures:
            picture, (head, between) = policy.picture(image), policy.prompt(question, question)
            if episode is None:
                episode = vrrl.Episode({}, policy.place(head, picture), picture)
            else:
                episode.turns[-1].picture, episode.turns[-1].feedback = picture, policy.place(between, picture)
            ids = [*policy.encode(answer), policy.end_id]
            episode.turns.append(vrrl.Turn(ids, [True] * len(ids)))
        return episode

    see = cfg.see
    for title, steps, most, rate in (("see", see.steps, 1, see.lr), ("talk", see.talk_steps, see.pictures, see.lr / 2)):
        batch = lambda step: [lesson(talk(rng, rng.randint(1, most))) for _ in range(see.batch)]
        vrrl.supervise(policy, batch, steps, rate, title, vrrl.Log())
        vrrl.save_policy(policy, folder)


# ---------------------------------------------------------------- 8. speed of the model


# oneDNN, which computes the products on a CPU, keeps compiled code for the last 1024 shapes in each thread, and nearly every token of a
# conversation has a new shape: 600 MB that are hardly used again. (With 0 it crashes.)
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


class KeyValues:
    """Keys and values of a batch of conversations: a pair of (B, heads, L, head_dim) a layer.

    The attention layers of transformers only call `update`. Without gradients the tensors grow in
    place (a concatenation would copy everything at every token).
    """

    def __init__(self):
        self.layers, self.length = {}, 0

    def update(self, keys, values, layer, *args, **kwargs):
        new, old, end = (keys, values), self.layers.get(layer), self.length + keys.shape[2]
        if torch.is_grad_enabled():
            if old is not None:
                new = tuple(torch.cat([o[:, :, : self.length], n], 2) for o, n in zip(old, new))
            self.layers[layer] = new
            return new
        if old is None or old[0].shape[2] < end:
            room = tuple(n.new_empty(*n.shape[:2], end + 64, n.shape[3]) for n in new)  # 64 more before the next move
            for r, o in zip(room, old or ()):
                r[:, :, : self.length] = o[:, :, : self.length]
            self.layers[layer] = old = room
        for o, n in zip(old, new):
            o[:, :, self.length : end] = n
        return tuple(o[:, :, :end] for o in old)

    def take(self, rows):
        for layer, pair in self.layers.items():
            self.layers[layer] = tuple(t[:, :, : self.length].index_select(0, rows) for t in pair)


def grouped_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention for a CPU: query (B, heads, W, D), key and value (B, kv_heads, L, D), mask True where W may look at L. Returns (B, W, heads, D), None.

    The queries of the heads that share a key are stacked into one product, a few conversations at a time. For short rows in bf16 this is
    several times faster than PyTorch's fused kernel, with gradients and without.
    """
    size, heads, width, dim = query.shape
    shared, out = key.shape[1], []
    rows = max(1, 1_000_000 // (heads * width * key.shape[2]))  # at a time: their scores stay in the processor's cache
    for q, k, v, mask in zip(*(t.split(rows) for t in (query, key, value, attention_mask))):
        k, v = k.contiguous(), v.contiguous()  # cached ones have room behind them, which slows the products far more than this copy
        scores = q.reshape(len(q), shared, -1, dim) @ k.transpose(2, 3) * scaling
        scores = scores.view(len(q), heads, width, -1).masked_fill(~mask, -1e9).softmax(-1)
        out.append((scores.view(len(q), shared, -1, k.shape[2]) @ v).view(len(q), heads, width, dim))
    return torch.cat(out).transpose(1, 2), None


transformers.AttentionInterface.register("grouped", grouped_attention)


def workers(policy):
    """In how many threads of our own the work on a model is done. On a CPU the operations of a small one are too short to be divided among
    PyTorch's threads, which wait for each other at every operation; a micro-batch or a batch of conversations is worth a thread.
    """
    small = policy.device.type == "cpu" and sum(p.numel() for p in policy.model.parameters()) < 10_000_000
    return min(2, torch.get_num_threads()) if small else 1  # two, since each holds the activations of its part


@contextlib.contextmanager
def one_thread(policy):
    """No threads of PyTorch's in here, if the model is small."""
    before = torch.get_num_threads()
    if workers(policy) > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _pool(count):
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


def in_threads(policy, function, parts):
    """function(part) for each of the parts, in order: side by side in `workers` threads, or one after the other. The results are equal."""
    count = workers(policy)
    return map(function, parts) if count == 1 else _pool(count).map(function, parts)


def backward(policy, loss_of, parts):
    """Adds up the gradient of the parts' losses in the weights' `grad`. loss_of(part): a tuple that begins with the loss. Returns them, the loss as a number.

    Parts are computed as by `in_threads`; their gradients are added in order, so that the sum does not depend on the number of threads.
    """
    weights, alone = [p for p in policy.model.parameters() if p.requires_grad], workers(policy) == 1

    def gradient(part):
        loss, *rest = loss_of(part)
        if alone:  # into `grad` at once: a real model has no room for a second set of gradients
            loss.backward()
        return () if alone else torch.autograd.grad(loss, weights, allow_unused=True), (loss.item(), *rest)

    found = []
    for grads, values in in_threads(policy, gradient, parts):
        found.append(values)
        for weight, grad in zip(weights, grads):
            if grad is not None:
                weight.grad = grad if weight.grad is None else weight.grad.add_(grad)
    return found


# ---------------------------------------------------------------- 9. pictures for people

TEXT, FAINT, LINE = (40, 44, 52), (120, 126, 136), (226, 229, 234)
FRAMES = {"right": (0, 158, 115), "wrong": (213, 60, 40), "": (190, 195, 203)}
# Okabe and Ito's palette: told apart by colour-blind readers too.
PALETTE = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233),
           (230, 159, 0), (0, 0, 0), (150, 140, 40)]


@functools.lru_cache
def _font(size):
    return ImageFont.load_default(size)   # comes with Pillow: the same on every machine


def write_image(path, image):
    """Write a PNG under another name first, so that a reader never meets half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        image.save(temporary, format="PNG")
        to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _wrap(text, font, width, most):
    """Lines no wider than `width` pixels, at most `most` of them; long words are cut."""
    lines = [""]
    for word in text.replace("><", "> <").split():   # a line may break between two tags
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines if len(lines) <= most else lines[:most - 1] + [lines[most - 1][:-1] + "…"]


def _fit(image, side):
    """Scale to `side` pixels. Small ones are enlarged in whole steps first: cells stay crisp."""
    largest = max(image.size)
    if largest < side:
        step = math.ceil(side / largest)
        image = image.resize((image.width * step, image.height * step), Image.Resampling.NEAREST)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def contact_sheet(path, items, columns=4, zoom=3):
    """Write the pictures of items [(image, caption), ...] in a grid, enlarged `zoom` times."""
    font, gap, text = _font(13), 14, 22
    wide = zoom * max(image.width for image, _ in items)
    high = zoom * max(image.height for image, _ in items)
    rows = math.ceil(len(items) / columns)
    size = (gap + columns * (wide + gap), gap + rows * (high + text + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(items):
        x, y = gap + i % columns * (wide + gap), gap + i // columns * (high + text + gap)
        image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
        sheet.paste(image, (x, y))
        draw.text((x, y + image.height + 4), caption, fill=TEXT, font=font)
    write_image(path, sheet)


def draw_strip(path, rows, title="", side=150, most=6):
    """Write episodes as rows of pictures: the question, then each attempt drawn.

    rows: dicts with "images" [PIL], "captions" [str] and "verdicts" ["right", "wrong" or ""] of
    the same length, and a "label" above the row. At most `most` pictures of an episode are shown.
    """
    font, gap, edge, line = _font(12), 18, 4, 15
    box, columns = side + 2 * edge, max([1] + [min(most, len(row["images"])) for row in rows])
    captions = [[_wrap(text, font, box, 9) for text in row["captions"][:most]] for row in rows]
    pictures = [[_fit(image, side) for image in row["images"][:most]] for row in rows]
    highs = [max([p.height for p in row], default=0) + 2 * edge for row in pictures]
    heights = [26 + high + 6 + line * max([len(c) for c in row], default=0) + gap
               for row, high in zip(captions, highs)]
    top = 44 if title else 12
    wide = max(gap + columns * (box + gap), round(_font(18).getlength(title)) + 2 * gap)
    sheet = Image.new("RGB", (wide, top + sum(heights)), "white")
    draw, y = ImageDraw.Draw(sheet), top
    draw.text((gap, 14), title, fill=TEXT, font=_font(18))
    for row, shown, texts, high, height in zip(rows, pictures, captions, highs, heights):
        more = len(row["images"]) - len(shown)
        label = row["label"] + (f"   (+{more} more)" if more > 0 else "")
        draw.text((gap, y), label, fill=TEXT, font=_font(14))
        for i, (picture, lines, verdict) in enumerate(zip(shown, texts, row["verdicts"])):
            x = gap + i * (box + gap)
            draw.rectangle((x, y + 24, x + picture.width + 2 * edge - 1,
                            y + 24 + picture.height + 2 * edge - 1), fill=FRAMES[verdict])
            sheet.paste(picture, (x + edge, y + 24 + edge))
            for j, words in enumerate(lines):
                draw.text((x, y + 24 + high + 6 + j * line), words, fill=TEXT, font=font)
        y += height
    write_image(path, sheet)


def _finite(xs, ys):
    """Points (x, y) with None where the value is missing or not a finite number."""
    return [None if y is None or not math.isfinite(y) else (float(x), float(y))
            for x, y in zip(xs, ys)]


def _averaged(points, reach):
    """Each y replaced by the mean over `reach` values to either side; gaps stay gaps."""
    out = []
    for i, point in enumerate(points):
        near = [p[1] for p in points[max(0, i - reach):i + reach + 1] if p is not None]
        out.append(None if point is None else (point[0], sum(near) / len(near)))
    return out


def _polyline(draw, points, to_pixel, colour, width):
    """Draw the runs between gaps; a run of one point becomes a dot."""
    run = []
    for point in points + [None]:
        if point is not None:
            run.append(to_pixel(point))
        elif run:
            draw.line(run, fill=colour, width=width, joint="curve")
            if len(run) == 1:
                (x, y), r = run[0], width
                draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
            run = []


def draw_curves(path, panels, columns=3):
    """Write a grid of line charts. panels: [(title, {series name: (xs, ys)}), ...].

    Thin pale lines are the values, thick ones their moving average. None and NaN leave gaps.
    """
    wide, high, k = 340, 240, 2   # drawn k times too large, then shrunk: smooth lines
    rows = max(1, math.ceil(len(panels) / columns))
    shown = max(1, min(columns, len(panels)))
    sheet = Image.new("RGB", (shown * wide * k, rows * high * k), "white")
    for i, (title, series) in enumerate(panels):
        chart = Image.new("RGB", (wide * k, high * k), "white")
        _chart(ImageDraw.Draw(chart), title, series, wide, high, k)
        sheet.paste(chart, (i % columns * wide * k, i // columns * high * k))
    write_image(path, sheet.resize((shown * wide, rows * high), Image.Resampling.LANCZOS))


def _chart(draw, title, series, wide, high, k):
    """One chart. Sizes are in final pixels; `k` is the factor by which the picture is larger."""
    small, data = _font(11 * k), {name: _finite(*values) for name, values in series.items()}
    draw.text((52 * k, 8 * k), title, fill=TEXT, font=_font(14 * k))
    x, y = 52 * k, 30 * k
    if len(series) > 1:
        for i, name in enumerate(series):
            length = small.getlength(name) + 26 * k
            if x > 52 * k and x + length > wide * k:
                x, y = 52 * k, y + 15 * k
            draw.line((x, y + 7 * k, x + 12 * k, y + 7 * k), fill=PALETTE[i % 8], width=3 * k)
            draw.text((x + 16 * k, y), name, fill=TEXT, font=small)
            x += length
        y += 18 * k
    left, right, top, bottom = 52 * k, (wide - 16) * k, y + 4 * k, (high - 30) * k
    for part in range(5):
        gx, gy = left + (right - left) * part // 4, top + (bottom - top) * part // 4
        draw.line((gx, top, gx, bottom), fill=LINE, width=k)
        draw.line((left, gy, right, gy), fill=LINE, width=k)
    points = [p for values in data.values() for p in values if p is not None]
    if not points:
        draw.text(((left + right) // 2, (top + bottom) // 2), "no values", fill=FAINT, font=small,
                  anchor="mm")
        return
    xs, ys = zip(*points)
    (x0, x1), (y0, y1) = _span(xs), _span(ys)

    def to_pixel(point):
        return (left + (point[0] - x0) / (x1 - x0) * (right - left),
                bottom - (point[1] - y0) / (y1 - y0) * (bottom - top))

    aside, below = left - 5 * k, bottom + 5 * k
    for value, at, anchor in ((y0, (aside, bottom), "rm"), (y1, (aside, top), "rm"),
                              (x0, (left, below), "la"), (x1, (right, below), "ra")):
        label = f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.3g}"
        draw.text(at, label, fill=FAINT, font=small, anchor=anchor)
    for i, values in enumerate(data.values()):   # all pale lines first: none crosses a thick one
        pale = tuple((c + 2 * 255) // 3 for c in PALETTE[i % 8])
        _polyline(draw, values, to_pixel, pale, k)
    for i, values in enumerate(data.values()):
        reach = len(values) // 24 if len(values) >= 20 else 0   # few values need no smoothing
        _polyline(draw, _averaged(values, reach), to_pixel, PALETTE[i % 8], 2 * k)


def _span(values):
    """(lowest, highest), widened when they are equal so that a flat line sits in the middle."""
    low, high = min(values), max(values)
    pad = 0 if high > low else (abs(low) * 0.1 or 1.0)
    return low - pad, high + pad


def choose(task, episodes, count=6):
    """A few episodes worth looking at, farthest out of distribution first: repairs, a right first answer, a failure."""
    right = lambda e, turn: bool(e.attempts) and task.exact(e.example, e.attempts[turn])
    pool = [e for name in reversed(task.SPLITS) for e in episodes[name]]
    repaired = [e for e in pool if not right(e, 0) and right(e, -1) and e.committed and len(e.attempts) < 6]  # a strip holds 6
    at_once = [e for e in pool if right(e, 0) and e.committed]
    failed = sorted((e for e in pool if not right(e, -1)), key=lambda e: not e.attempts)  # there is more to see where an attempt was drawn
    spread = lambda found, n: found[:: max(1, len(found) // n)][:n]
    return [*spread(repaired, count - 2), *spread(at_once, 1), *spread(failed, 1)]


def film_strip(path, task, episodes, title):
    """A row an episode: the question, then each attempt drawn, with what the model said."""
    rows, tidy = [], lambda text: re.sub(r"\s*(</?\w+>)\s*", r"\1", text)
    for episode in episodes:
        attempts, last = [t for t in episode.all_turns if t.kind == "answer"], episode.all_turns[-1]
        captions = [tidy(t.text) for t in attempts]
        if attempts and last is not attempts[-1]:
            captions[-1] += "  then " + tidy(last.text)
        drawn = [task.feedback(episode.example, t.attempt) for t in attempts]
        verdicts = [{None: "", False: "wrong", True: "right"}[task.exact(episode.example, t.attempt)] for t in attempts]
        rows.append({"label": episode.example["id"], "images": [task.image(episode.example), *drawn],
                     "captions": [task.question(episode.example)[0], *captions], "verdicts": ["", *verdicts]})
    draw_strip(path, rows, title)


def curves(folder):
    """curves.png of a run folder, from its metrics.jsonl: a panel a quantity."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    taught, steps = [m for m in lines if "loss" in m], [m for m in lines if m["stage"] == "rl"]
    series = lambda lines, *keys: {k: ([m["step"] for m in lines], [m.get(k) for m in lines]) for k in keys}
    panels = [(f"loss of {stage}, nats a token", series([m for m in taught if m["stage"] == stage], "loss"))
              for stage in dict.fromkeys(m["stage"] for m in taught)]
    if steps:
        turns = [{t: n / max(1, sum(m["turns"].values())) for t, n in m["turns"].items()} | {"step": m["step"]}
                 for m in steps]
        panels += [(title, series(steps, *keys.split())) for title, keys in {
            "reward": "reward", "accuracy, fresh starts": "first final", "repair after a roll-in prefix": "rollin_repair",
            "commits, well-formed": "commit well_formed", "entropy, nats a token": "entropy",
            "KL to the SFT model": "kl", "gradient norm": "grad_norm", "share of groups kept, of roll-ins": "kept rollins",
            "buffer: share wrong": "buffer_wrong", "buffer: age, steps": "buffer_age"}.items()]
        panels.append(("turns, fresh starts", series(turns, *sorted({t for m in steps for t in m["turns"]}, key=int))))
    draw_curves(folder / "curves.png", panels or [("nothing was trained", {})])


# ---------------------------------------------------------------- 10. reading settings


def settings_table(file=Path(__file__).with_name("config.yaml")):
    """({"rl.steps": [default, allowed, help], ...}, the whole file as YAML reads it)."""
    config, spec = yaml.safe_load(Path(file).read_text()), {}
    for key, entry in config["settings"].items():
        spec.update({f"{key}.{k}": e for k, e in entry.items()} if isinstance(entry, dict) else {key: entry})
    return spec, config


def check_key(key, spec):
    if key not in spec:
        near = difflib.get_close_matches(key, spec, 1) or [k for k in spec if k.split(".")[-1] == key] or ["--help"]
        raise UserError(f"unknown setting '{key}'; nearest: {near[0]}")
    return key


def check_value(key, value, entry):
    """`value` (a word, or what YAML read) as the type of the default and inside what is allowed, or UserError."""
    default, allowed, _ = entry
    try:
        if isinstance(default, bool):
            value = value if isinstance(value, bool) else {"yes": True, "true": True, "no": False, "false": False}[value]
            good = True
        elif isinstance(default, str):
            value = str(value)
            good = allowed == "text" or value in allowed.split("|")
        else:
            value, (low, high) = type(default)(value), map(float, allowed.split(".."))
            good = low <= value <= high  # false for nan as well
    except (ValueError, KeyError, TypeError, OverflowError):
        good = False
    if not good:
        raise UserError(f"{key}={value} is not allowed; allowed: {shown(allowed)}")
    return value


def shown(allowed):
    return allowed.replace("..", " to ").replace("|", ", ")


def of_method(words, method):
    """`words` for one method: its row comes after them, so that `rl.rho=0.8` in a study leaves plain RL without roll-ins."""
    row = settings_table()[1]["methods"][method]
    return [*words, f"method={method}", *(f"{key}={str(value).lower()}" for key, value in row.items())]


def key_of(values):
    """A short name for a dict of settings: what they decide is kept under it."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def nest(flat):
    """{"seed": 0, "rl.steps": 40} as frozen dataclasses: cfg.seed, cfg.rl.steps."""
    sections = {}
    for key, value in flat.items():
        *section, name = key.split(".")
        (sections.setdefault(section[0], {}) if section else sections)[name] = value
    make = lambda name, values: dataclasses.make_dataclass(name, values, frozen=True)(**values)
    return make("Settings", {k: make(k, v) if isinstance(v, dict) else v for k, v in sections.items()})


def settings_help():
    lines = []
    for key, (default, allowed, sentence) in settings_table()[0].items():
        default = ("no", "yes")[default] if isinstance(default, bool) else default
        lines.append(f"  {key}={default}\n      {sentence} ({shown(allowed)})")
    return "\n".join(lines)


# ---------------------------------------------------------------- 11. files of a run


def write_file(path, content):
    """Whole or not at all: a temporary name, fsync, rename. content: text or bytes."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:  # a full disk: leave no half file to fill it further
        temporary.unlink(missing_ok=True)
        raise


def to_disk(path):
    """Wait until a file that was written is on the disk: a rename that follows cannot then leave half of it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


class Stopped(Exception):
    """Ctrl-C or SIGTERM; what was done is saved."""

    asked = False  # set by the first signal, looked at between steps; the second signal ends the process at once

    @classmethod
    def on_signals(cls):
        def soon(number, frame):
            if cls.asked:
                raise KeyboardInterrupt
            cls.asked = True
            os.write(2, b"\nstopping after this step (again: at once)\n")  # print may not be called while another print runs

        cls.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, soon)


class Log:
    """What a run leaves while it works: metrics.jsonl (only what the seed decides), timing.jsonl (seconds), checkpoints/.

    folder: None writes nothing. every: seconds between checkpoints.
    """

    def __init__(self, folder=None, every=20):
        self.folder, self.every, self.started, self.stages, self.bar = folder, every, time.time(), {}, None

    def _append(self, name, line):
        if self.folder:
            tidy = lambda v: (round(v, 6) if math.isfinite(v) else None) if isinstance(v, float) else v  # JSON has no nan
            line = {k: tidy(v) for k, v in line.items()}
            with open(self.folder / name, "a") as file:
                file.write(json.dumps(line) + "\n")

    def __call__(self, line):
        self._append("metrics.jsonl", line)

    def time(self, line):
        """Seconds and counts of a step; `stage` sums them up."""
        self._append("timing.jsonl", line)
        sums = self.stages.setdefault(line["stage"], Counter())
        sums.update({k: v for k, v in line.items() if k not in ("stage", "step")})

    def stage(self, name):
        """The end of a stage: a line on screen and in run.json, with its seconds, rates and peak memory."""
        seconds, self.started = time.time() - self.started, time.time()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        figures, sums = {"seconds": round(seconds, 1), "peak_memory_mb": memory}, self.stages.get(name, {})
        if torch.cuda.is_available():
            figures["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated() >> 20
        if sums:
            sampling, update = sums["seconds_sampling"], sums["seconds_update"]
            figures |= {"rollouts_per_second": round(sums["rollouts"] / (sampling + update), 1),
                        "sampled_tokens_per_second": round(sums["sampled_tokens"] / sampling),
                        "trained_tokens_per_second": round(sums["trained_tokens"] / update),
                        "seconds_sampling": round(sampling, 1), "seconds_update": round(update, 1)}
        print(f"{name}:", ", ".join(f"{v:g} {k.replace('_', ' ')}" for k, v in figures.items()), file=sys.stderr)
        file = self.folder / "run.json"
        about = json.loads(file.read_text()) if file.is_file() else {}
        about.setdefault("stages", {})[name] = figures
        write_file(file, json.dumps(about, indent=1) + "\n")

    def steps(self, title, count, optimizer, state=lambda: None, restore=lambda state: None):
        """1 .. count under a progress bar; goes on from the stage's last checkpoint, and writes one every `every` seconds.

        state() is what the stage remembers beside its optimizer, as JSON; restore(state) puts it back. Raises Stopped.
        """
        done, saved = self._load(title, optimizer, restore), time.time()
        with tqdm(total=count, initial=done, desc=title, unit="step", dynamic_ncols=True) as self.bar:
            for step in range(done + 1, count + 1):
                yield step
                self.bar.update()
                if self.folder and not optimizer.skipped and (Stopped.asked or step == count or time.time() - saved >= self.every):
                    self._save(title, step, optimizer, state())
                    saved = time.time()
                if Stopped.asked:
                    raise Stopped

    def _save(self, title, step, optimizer, state):
        """Keep the last two checkpoints. A name holds the checksum of its file, so that damage is noticed."""
        folder = self.folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        for half in folder.glob("*.tmp"):  # left by a process that was killed
            half.unlink()
        metrics = self.folder / "metrics.jsonl"
        state = json.dumps({"state": state, "metrics": metrics.read_text() if metrics.is_file() else ""})
        content = safetensors.torch.save({**optimizer.state(), "state": torch.tensor(list(state.encode()), dtype=torch.uint8)})
        write_file(folder / f"{title}-{step:07d}-{checksum(content)}.safetensors", content)
        for old in sorted(folder.glob(f"{title}-*.safetensors"))[:-2]:
            old.unlink()

    def _load(self, title, optimizer, restore):
        """Restore a stage's last good checkpoint and the metrics.jsonl of that moment. Returns its step, or 0."""
        if not self.folder:
            return 0
        metrics = self.folder / "metrics.jsonl"
        for file in sorted((self.folder / "checkpoints").glob(f"{title}-*.safetensors"), reverse=True):
            content = file.read_bytes()
            if file.stem.split("-")[-1] == checksum(content):
                found = safetensors.torch.load(content)
                state = json.loads(bytes(found.pop("state").tolist()))
                write_file(metrics, state["metrics"])
                restore(state["state"])
                optimizer.restore(found)
                return int(file.stem.split("-")[1])
            print(f"{file} is damaged; going on from the one before", file=sys.stderr)
            file.rename(file.with_suffix(".damaged"))
        lines = metrics.read_text().splitlines(True) if metrics.is_file() else []
        write_file(metrics, "".join(line for line in lines if f'"stage": "{title}"' not in line and line.endswith("\n")))
        return 0


def checksum(content):
    return hashlib.sha256(content).hexdigest()[:16]


def lock(folder, wait=False):
    """Keep other processes out of a folder until this one ends. Busy if one is in there, unless we wait for it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise Busy(f"{folder} is in use by another process: wait for it, or give run=ANOTHER_NAME") from None
    return file


def _device():
    """The name of the GPU, or of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        return re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux
        return platform.processor() or "CPU"


def open_run(folder, flat):
    """Make the run's folder and write its exact settings. False if it holds these settings' finished run."""
    flat = {**flat, "threads": torch.get_num_threads()}  # another number rounds differently
    settings = {k: v for k, v in flat.items() if k not in ("run", "runs", "data", "results", "mode", "checkpoint")
                and not k.startswith("study.") or k == "data" and Path(v).is_file()}
    old = folder / "settings.yaml"
    if old.is_file():
        before = yaml.safe_load(old.read_text()) or {}
        changed = [f"{k} was {before.get(k)}, now {v}" for k, v in settings.items() if before.get(k) != v]
        if changed and (folder / "metrics.jsonl").is_file():  # without it, nothing was done there yet
            raise UserError(f"{folder} holds a run with other settings ({'; '.join(changed[:4])}): "
                            "give run=ANOTHER_NAME or remove it")
        if (folder / "results.json").is_file():
            return False
    write_file(old, yaml.safe_dump(settings, sort_keys=False))
    about = {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "version": code_version(), "host": platform.node(), "machine": platform.machine(),
             "device": _device(),
             "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version(),
             "torch": torch.__version__, "transformers": transformers.__version__}
    file = folder / "run.json"
    if file.is_file():  # a run that was stopped: keep what its stages took
        before = json.loads(file.read_text())
        about = {**before, **about, "started": before["started"], "resumed": [*before.get("resumed", []), about["started"]]}
    write_file(file, json.dumps(about, indent=1) + "\n")
    return True


def source_of(name):
    """What `model=` names: a folder, as it stands or beside this file, or a hub name. UserError if it is neither."""
    folder = Path(name) if Path(name).is_dir() else Path(__file__).parent / name
    hub_name = not folder.exists() and re.fullmatch(r"(?!assets/|runs/)[\w-][\w.-]*/[\w.-]+", str(name))
    if not (folder / "config.json").is_file() and not hub_name:
        raise UserError(f"model={name}: no folder with a config.json; name a Hugging Face folder or a hub name, "
                        "or make the embedded model again: python data_prep.py embedded")
    return str(name if hub_name else folder)


def save_policy(policy, folder):
    """A Hugging Face folder that `from_pretrained` loads; it appears whole or not at all."""
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for part in (policy.model, policy.tokenizer, policy.processor):
            part.save_pretrained(temporary)
        for file in temporary.iterdir():
            to_disk(file)
    except Exception as error:  # the libraries raise many kinds where a disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{folder} cannot be written: {error}") from None
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def device_of(cfg):
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU; use device=cpu")
    return torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")


def dtype_of(cfg, device):
    """The dtype of weights and activations; norms, logits and the loss are fp32. auto: bf16 where the machine computes in it."""
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return {"auto": torch.bfloat16 if fast else torch.float32}.get(cfg.policy.dtype) or getattr(torch, cfg.policy.dtype)


# ---------------------------------------------------------------- 12. report and study


def wilson(share, n):
    """95 % interval of a share of n outcomes (Wilson's)."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def table(models):
    """Markdown: a row a model and split. models: {name: rows of `evaluate`}."""
    columns = ["first", "final", "committed", "repair_own", "repair_fixed", "break", "commit", "sampled_final"]
    percent = lambda x: "-" if x is None else f"{100 * x:.1f}"
    line = lambda *cells: "| " + " | ".join(map(str, cells)) + " |"
    lines = [line("model", "split", "n", *(c.replace("_", " ") for c in columns), "turns"), line(*["---"] * (len(columns) + 4))]
    for name, rows in models.items():
        for row in rows:
            cells, (low, high) = [percent(row[c]) for c in columns], wilson(row["final"], row["n"])
            cells[1] += f" [{100 * low:.0f}, {100 * high:.0f}]"
            lines.append(line(name, row["split"] + " (ood)" * row["ood"], row["n"], *cells, f"{row['turns']:.1f}"))
        ood = [row for row in rows if row["ood"]]
        if not ood:
            continue
        means = [np.mean(found) if (found := [row[c] for row in ood if row[c] is not None]) else None for c in columns]
        lines.append(line(name, "**mean ood**", sum(row["n"] for row in ood), *(f"**{percent(m)}**" for m in means),
                          f"{np.mean([row['turns'] for row in ood]):.1f}"))
    drawn = {row["split"]: f"{row['drawn']} of {row['n']} in {row['split']}" for rows in models.values() for row in rows if row.get("drawn")}
    if drawn:
        lines.append(f"\nNot comparable with the authors' figures: pictures were drawn here, not theirs ({', '.join(drawn.values())}).")
    return "\n".join(lines)


def bits(found):
    """One character a map: 1 right, 0 wrong, - not counted."""
    return "".join("-" if f is None else "01"[bool(f)] for f in found)


def paired_difference(new, old, key):
    """`seed_difference` of two models of one seed, out of distribution: an interval over maps."""
    alone = lambda rows: [{**row, "seed": 0} for row in rows if row["ood"]]
    return seed_difference(alone(new), alone(old), key)


def differences(models):
    """{key: paired difference of the last model to the first}; models: {name: rows}."""
    first, last = list(models.values())[0], list(models.values())[-1]
    found = {key: paired_difference(last, first, key) for key in ("final", "first", "repair_fixed")} if first is not last else {}
    return {key: value for key, value in found.items() if value}


def report(folder, cfg, task, models, differences, episodes):
    """results.json, report.md, curves.png and episodes.png of a run folder. Returns what is printed.

    models: {name: rows of `evaluate`}; differences: {key: (mean, low, high)} of the last model to the first.
    """
    text = table(models) + "\n"
    for key, found in differences.items():
        mean, low, high = (f"{100 * x:+.1f}" for x in found)
        text += f"\n{[*models][-1]} - {[*models][0]}, out of distribution, {key.replace('_', ' ')}: {mean} points [{low}, {high}]"
    rows = [{"task": cfg.task, "method": name, "seed": cfg.seed, **row} for name, rows in models.items() for row in rows]
    about = f"`{cfg.eval.splits}` splits; percent; greedy unless said; brackets: 95 % intervals; paired over maps."
    write_file(folder / "report.md", f"# {folder.name}\n\n{about}\n\n{text}\n")
    curves(folder)
    film_strip(folder / "episodes.png", task, episodes, f"{folder.name}: each attempt is drawn on the image and shown to the model")
    write_file(folder / "results.json", json.dumps({"rows": rows, "differences": differences}, indent=1) + "\n")
    return text


def probes(task, failed):
    """{probe: picture shown after an attempt} for `failed`, a list of (example, its wrong first attempt).

    undrawn: the image without the attempt. other_attempt: the same image with an attempt on another question drawn.
    other_image: another question's image, with its own attempt drawn. Without another such attempt the probe shows the undrawn
    picture; without another image, the true one.
    """
    after = {example["id"]: failed[n + 1 :] + failed[:n] for n, (example, _) in enumerate(failed)}  # those after it, then from the beginning

    def other_attempt(example, attempt):
        others = (other for _, other in after[example["id"]])
        other = next((o for o in others if not task.same(o, attempt) and not task.exact(example, o)), None)
        return task.image(example) if other is None else task.feedback(example, other)

    def other_image(example, attempt):
        return task.feedback(*next((o for o in after[example["id"]] if o[0]["image"] != example["image"]), (example, attempt)))

    return {"undrawn": lambda example, attempt: task.image(example), "other_attempt": other_attempt, "other_image": other_image}


def study(cfg, words):
    """Each method with every seed, each a run that is skipped once it is done; then tables and a figure from the runs' own files.

    The same command in a second terminal takes the cells that the first is not at. A cell is done when its dev.json is there.
    """
    import vrrl
    task = vrrl.TASKS[cfg.task](cfg)
    for name in task.SPLITS:  # the report picks the best other RL method by dev accuracy: without dev splits, fail now, not after hours
        task.load(f"dev_{name}")
    run = cfg.run or "study-" + study_file(cfg).stem.removeprefix("study_")
    folder = lambda method, seed: Path(cfg.runs) / run / f"{method}-seed{seed}"
    methods = list(dict.fromkeys(cfg.study.methods.split()))
    if not methods:
        raise UserError('study.methods names no method: study.methods="sft vrrl"')
    for method in methods:
        vrrl.read_config([*words, f"method={method}"])  # UserError if there is no such row
    cells = list(itertools.product(range(cfg.study.seeds), methods))
    left = sorted(cells, key=lambda cell: cell[1] != "sft")  # first sft: the others of a seed need its model, and two processes would wait for one

    def report():
        with lock(Path(cfg.runs) / run, wait=True):
            study_report(cfg, [done for s, m in cells if ((done := folder(m, s)) / "dev.json").is_file()])

    while left:
        for seed, method in list(left):
            here = folder(method, seed)
            cell = [*of_method(words, method), "mode=train", f"seed={seed}", "eval.probes=yes", f"run={run}/{here.name}"]
            try:
                vrrl.main(cell)  # prints its table and does nothing else if it is done; UserError if it has other settings
                held = lock(here)
            except Busy:  # another process is at it
                continue
            with held:
                left.remove((seed, method))
                print(f"== {method}, seed {seed}: {len(cells) - len(left)} of {len(cells)}", file=sys.stderr)
                if not (here / "dev.json").is_file():
                    dev, _ = vrrl.read_config([*cell, "eval.splits=dev"])
                    rows, _, _ = vrrl.evaluate(vrrl.load_policy(here / "model", dev), task, dev, title="dev", brief=True)
                    write_file(here / "dev.json", json.dumps(rows) + "\n")
                    gc.collect()  # policies refer to themselves
                    report()
        if left:
            time.sleep(10)
        if Stopped.asked:
            raise Stopped
    report()
    print(study_text(cfg))


RL_BASELINES = ("rl", "rl_reflect", "rtm", "rollin")
PROBES = ("undrawn", "other_attempt", "other_image")


def study_report(cfg, cells):
    """results/study_<task>.json, .md and .png from the cells' own files. cells: run folders."""
    rows, settings, made, order = [], {}, [], list(settings_table()[1]["methods"])
    found = [(folder, yaml.safe_load((folder / "settings.yaml").read_text())) for folder in cells]
    for folder, own in sorted(found, key=lambda cell: (cell[1]["seed"], order.index(cell[1]["method"]))):
        run = json.loads((folder / "run.json").read_text())
        minutes = sum(stage["seconds"] for stage in run["stages"].values()) / 60
        method, seed = own["method"], own["seed"]
        kept = [row for row in json.loads((folder / "results.json").read_text())["rows"] if row["method"] == method]
        dev = json.loads((folder / "dev.json").read_text())
        rows += [{**row, "dev_final": part["final"]} for row, part in zip(kept, dev, strict=True)]
        settings[method] = {k: v for k, v in own.items() if k not in ("method", "seed")}
        made.append({"method": method, "seed": seed, "minutes": round(minutes, 1),
                     **{k: run[k] for k in ("version", "started", "machine", "device", "cores", "threads", "python", "torch", "transformers")}})
    shared = {k: v for k, v in settings[method].items() if all(s.get(k) == v for s in settings.values())}
    about = {"settings": shared, "methods": {m: {k: v for k, v in s.items() if k not in shared} for m, s in settings.items()},
             "cells": made}
    file = study_file(cfg)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    write_file(file.with_suffix(".md"), study_text(cfg) + "\n")
    turns = lambda method, split: _mean([r["after_turn"] for r in rows if r["method"] == method and r["split"] == split])
    panels = [(f"final accuracy after so many turns: {split}",
               {m: (range(1, 1 + len(turns(m, split))), list(turns(m, split))) for m in settings})
              for split in dict.fromkeys(r["split"] for r in rows)]
    draw_curves(file.with_suffix(".png"), panels, columns=2)


def study_file(cfg):
    return Path(cfg.results) / f"study_{cfg.task}{'' if cfg.profile == 'default' else '-' + cfg.profile}.json"


def code_version():
    """A checksum of the program, kept with every run: figures of different versions should not be compared."""
    here = Path(__file__).parent
    return checksum(b"".join((here / name).read_bytes() for name in ("vrrl.py", "data_prep.py", "config.yaml")))


def _mean(values):
    """Mean along the first axis of what is not None; None if nothing is left."""
    values = [v for v in values if v is not None]
    return np.mean(values, 0) if values else None


def outcomes(bits):
    """'01-' -> (0, 1, nan): one number a map, nan where nothing was counted."""
    return np.array([np.nan if b == "-" else float(b) for b in bits])


def seed_difference(new, old, key, against=None, samples=2000):
    """Mean of new - old in `key` over the given rows, with a 95 % bootstrap interval over seeds and maps; None without pairs.

    new, old: rows of two methods, or of one where `against` is another key. Paired by seed, split and map. A draw takes seeds with
    replacement, and for each split one set of maps for all of them, since the maps are common to the seeds.
    """
    rng, key, against = np.random.default_rng(0), f"{key}_by_map", f"{against or key}_by_map"
    place = {(r["seed"], r["split"]): r for r in old}
    pairs = [(r, other) for r in new if (other := place.get((r["seed"], r["split"]))) and key in r and against in other]
    if not pairs:
        return None
    seeds, splits = sorted({r["seed"] for r, _ in pairs}), sorted({r["split"] for r, _ in pairs})
    gaps = {s: np.stack([outcomes(r[key]) - outcomes(o[against]) for seed in seeds for r, o in pairs if (r["seed"], r["split"]) == (seed, s)])
            for s in splits}  # (seeds, maps)
    draws = [(rng.integers(len(seeds), size=len(seeds)), [rng.integers(gap.shape[1], size=gap.shape[1]) for gap in gaps.values()]) for _ in range(samples)]
    chosen = np.stack([seeds_drawn for seeds_drawn, _ in draws])[:, :, None]  # (samples, seeds, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a draw without any counted map
        found = np.stack([np.nanmean(gap[chosen, np.stack([maps[i] for _, maps in draws])[:, None]], (1, 2)) for i, gap in enumerate(gaps.values())], 1)
        means = np.nanmean(found, 1)
        middle = np.nanmean([np.nanmean(gap) for gap in gaps.values()])
        low, high = np.nanpercentile(means, [2.5, 97.5])
    return (float(middle), float(low), float(high)) if math.isfinite(middle) else None


def study_text(cfg):
    """The tables of results/study_<task>.json as Markdown."""
    file = study_file(cfg)
    if not file.is_file():
        raise UserError(f"{file} does not exist: python vrrl.py mode=study task={cfg.task} makes it")
    found = json.loads(file.read_text())
    rows, made = found["rows"], found["about"]["cells"]
    methods = list(dict.fromkeys(r["method"] for r in rows))
    of = lambda method, ood=True: [r for r in rows if r["method"] == method and r["ood"] == ood]
    percent = lambda x: "-" if x is None else f"{100 * x:.1f}"
    points = lambda d: "-" if d is None else f"{100 * d[0]:+.1f} [{100 * d[1]:+.1f}, {100 * d[2]:+.1f}]"
    line = lambda *cells: "| " + " | ".join(map(str, cells)) + " |"
    header = lambda *cells: [line(*cells), line(*["---"] * len(cells))]

    def cell(method, ood, key):
        """Mean over splits and seeds, in brackets the lowest and highest seed."""
        by_seed = {}
        for r in of(method, ood):
            by_seed.setdefault(r["seed"], []).append(r[key])
        by_seed = [m for values in by_seed.values() if (m := _mean(values)) is not None]
        if not by_seed:
            return "-"
        return percent(np.mean(by_seed)) + (f" ({100 * min(by_seed):.0f}-{100 * max(by_seed):.0f})" if len(by_seed) > 1 else "")

    seeds = lambda method: len({r["seed"] for r in of(method)} | {r["seed"] for r in of(method, False)})
    keys = ("first", "final", "committed", "repair_own", "repair_fixed", "break", "commit", "sampled_final")
    text = []
    for ood, title in ((False, "In distribution"), (True, "Out of distribution, mean of its splits")):
        text += ["", f"**{title}**", "", *header("method", "seeds", *(k.replace("_", " ") for k in keys))]
        text += [line(m, seeds(m), *(cell(m, ood, k) for k in keys)) for m in methods]
    splits = list(dict.fromkeys(r["split"] for r in rows))
    text += ["", "**Final accuracy by split**", "", *header("method", *splits)]
    text += [line(m, *(percent(_mean([r["final"] for r in rows if (r["method"], r["split"]) == (m, s)])) for s in splits)) for m in methods]
    common = set.intersection(*({r["seed"] for r in of(m)} for m in RL_BASELINES if of(m)), set(r["seed"] for r in rows))
    dev = {m: _mean([r.get("dev_final") for r in of(m) if r["seed"] in common]) for m in RL_BASELINES if of(m)}
    dev = {m: found for m, found in dev.items() if found is not None}
    if "vrrl" in methods and len(methods) > 1:
        best = max(dev, key=dev.get, default=None)
        text += ["", "**VRRL minus the other methods, out of distribution, points [95 %]**" + (f"; the best other RL method on dev is `{best}`" if best else ""),
                 "", *header("vrrl minus", "final", "first", "repair fixed")]
        text += [line(m + " (best other RL on dev)" * (m == best), *(points(seed_difference(of("vrrl"), of(m), k)) for k in ("final", "first", "repair_fixed")))
                 for m in methods if m != "vrrl"]
    if any(r.get("repair_undrawn") is not None for r in rows):
        text += ["", "**Grounding, out of distribution: repair of the fixed wrong attempts (mean of the splits) when the feedback shows ...; true minus each, points [95 %]**", "",
                 *header("method", "its attempt", *(p.replace("_", " ") for p in PROBES), *(f"minus {p.replace('_', ' ')}" for p in PROBES))]
        text += [line(m, *(cell(m, True, f"repair_{p}") for p in ("fixed", *PROBES)),
                      *(points(seed_difference(of(m), of(m), "repair_fixed", f"repair_{p}")) for p in PROBES)) for m in methods]
    turns = max(len(r["after_turn"]) for r in rows)
    text += ["", "**Final accuracy out of distribution after 1, 2, ... turns**", "", *header("method", *range(1, turns + 1))]
    text += [line(m, *(percent(x) for x in _mean([r["after_turn"] for r in of(m)]))) for m in methods if of(m)]
    device = ", ".join(sorted({f"{c['machine']} {c['device']}, {c['threads']} threads, torch {c['torch']}" for c in made}))
    text += ["", f"{len(made)} runs, {sum(c['minutes'] for c in made):.0f} minutes in all; {device}. {rows[0]['n']} questions a split; percent; greedy unless said; "
             "in brackets the lowest and highest seed. Intervals: bootstrap over seeds and maps; with three seeds or fewer they are too narrow."]
    if len({c.get("version") for c in made}) > 1:
        text += ["", "The runs are of more than one version of the program."]
    return "\n".join(text).strip()
# ---------------------------------------------------------------- 13. the authors' data and real models

# ---- optimizers for bf16 weights


class Optimizer:
    """AdamW on fp32 copies of the weights that may change.

    A bf16 number has 8 significant bits: added to the weight itself, an update below 1/256 of it would be rounded away.
    """

    def __init__(self, policy):
        self.weights = [p for p in policy.model.parameters() if p.requires_grad]
        self.copies = [p.detach().float().clone() for p in self.weights]
        self.adam = torch.optim.AdamW(self.copies, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.skipped = 0  # steps in a row

    def step(self, lr, clip):
        """One update from the model's gradients, which are cleared. Returns their norm before clipping.

        A step whose norm is not finite changes nothing; ten in a row raise UserError.
        """
        norm = self._clip(clip)
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped == 10:
            raise UserError("ten steps in a row had a loss or gradient that is not finite: lower the learning rate and "
                            "give run=ANOTHER_NAME; the last good checkpoint is kept")
        if not self.skipped:
            self._update(lr)
        for weight in self.weights:
            weight.grad = None
        return norm

    def _clip(self, clip):
        for weight, copy in zip(self.weights, self.copies):
            copy.grad = torch.zeros_like(copy) if weight.grad is None else weight.grad.float()
            weight.grad = None
        return torch.nn.utils.clip_grad_norm_(self.copies, clip).item()

    def _update(self, lr):
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()
        self._publish()

    @torch.no_grad()
    def _publish(self):
        torch._foreach_copy_(self.weights, self.copies)

    def state(self):
        """All that a checkpoint needs: {name: tensor}."""
        found = {f"weight.{i}": copy for i, copy in enumerate(self.copies)}
        for i, kept in self.adam.state_dict()["state"].items():
            found |= {f"{name}.{i}": tensor for name, tensor in kept.items()}
        return found

    def restore(self, state):
        """Go on from `state`; the model's weights are set as well."""
        for i, copy in enumerate(self.copies):
            copy.copy_(state[f"weight.{i}"])
            kept = {name: state[f"{name}.{i}"] for name in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{i}" in state}
            self.adam.state[copy] = {name: tensor.to(copy.device) for name, tensor in kept.items()}
        self._publish()


class KahanOptimizer(Optimizer):
    """AdamW on the weights themselves, all its numbers in their type: half the memory of copies, for bf16 weights.

    What rounding takes from a weight is kept in `rest` and added to its next update (Kahan's summation), so that small
    updates add up. Second moments can be bf16 because beta2 is 0.95: with 0.999 they would stand still.
    """

    PART = 1 << 24  # numbers handled at once, in fp32

    def __init__(self, policy):
        self.weights = [p for p in policy.model.parameters() if p.requires_grad]
        new = lambda: [torch.zeros_like(p, requires_grad=False) for p in self.weights]
        self.rest, self.exp_avg, self.exp_avg_sq, self.steps, self.skipped = new(), new(), new(), 0, 0

    def _clip(self, clip):
        norms = [torch.linalg.vector_norm(w.grad, dtype=torch.float32) for w in self.weights if w.grad is not None]
        norm = torch.stack(norms).norm().item() if norms else 0.0
        self.scale = min(1.0, clip / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def _update(self, lr, beta1=0.9, beta2=0.95, eps=1e-8):
        self.steps += 1
        bias1, bias2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        for weight, *kept in zip(self.weights, self.rest, self.exp_avg, self.exp_avg_sq):
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            for w, g, r, m, v in zip(*(t.view(-1).split(self.PART) for t in (weight, grad.contiguous(), *kept))):
                g = g.float() * self.scale
                m.copy_(torch.lerp(m.float(), g, 1 - beta1))
                v.copy_(v.float() * beta2 + (1 - beta2) * g * g)
                wanted = r.float() - lr / bias1 * m.float() / ((v.float() / bias2).sqrt() + eps)
                old = w.to(torch.float32, copy=True)
                w.copy_(old + wanted)
                r.copy_(wanted - (w.float() - old))

    def state(self):
        found = {"steps": torch.tensor(self.steps)}
        for name, tensors in (("weight", self.weights), ("rest", self.rest), ("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            found |= {f"{name}.{i}": tensor.detach() for i, tensor in enumerate(tensors)}
        return found

    @torch.no_grad()
    def restore(self, state):
        self.steps = int(state["steps"])
        for name, tensors in (("weight", self.weights), ("rest", self.rest), ("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            for i, tensor in enumerate(tensors):
                tensor.copy_(state[f"{name}.{i}"])


def optimizer_for(policy):
    """The optimizer of policy.optimizer."""
    return {"master": Optimizer, "kahan": KahanOptimizer}[optimizer_kind(policy.model, policy.cfg, policy.device)](policy)


def by_length(episodes, kept, group):
    """Numbers of the rollouts of the groups `kept`, shortest first, as pairs of one group: a pair shares its opening, and pads less than its whole group would."""
    length = lambda i: len(episodes[i].rest)
    pairs = []
    for n in kept:
        rows = sorted(range(n * group, (n + 1) * group), key=length)
        pairs += [rows[i : i + 2] for i in range(0, group, 2)]
    return [i for pair in sorted(pairs, key=lambda pair: length(pair[-1])) for i in pair]


# ---- memory: less of it, and how much is needed


def checkpoint_layers(model):
    """Gradient checkpointing of every layer, language and vision: only what goes in is kept, the rest is computed again.

    The library's own switch takes the cache away, which holds the opening that a group's rollouts share. Here a layer's
    keys and values go into the checkpoint and come out of it, so that to compute it twice has no side effect.
    """
    for layer in (*model.model.language_model.layers, *model.model.visual.blocks):
        layer.forward = functools.partial(_checkpointed, layer)


def _checkpointed(layer, hidden, past_key_values=None, **rest):
    plain = functools.partial(type(layer).forward, layer)
    if not torch.is_grad_enabled():
        return plain(hidden, past_key_values=past_key_values, **rest) if past_key_values is not None else plain(hidden, **rest)
    if past_key_values is None:
        return torch.utils.checkpoint.checkpoint(functools.partial(plain, **rest), hidden, use_reentrant=False)
    cache, number = past_key_values, layer.self_attn.layer_idx

    def run(hidden, *old):
        own = type(cache)()
        if old:
            own.layers[number], own.length = old, old[0].shape[2]
        return plain(hidden, past_key_values=own, **rest), *own.layers[number]

    old = [t[:, :, :cache.length] for t in cache.layers.get(number, ())]
    hidden, *new = torch.utils.checkpoint.checkpoint(run, hidden, *old, use_reentrant=False)
    cache.layers[number] = tuple(new)
    return hidden


def in_parts(function, *tensors, size=256):
    """function(*tensors), a tuple of tensors, in parts of `size` rows that are computed again in the backward pass.

    Logits of a real vocabulary take 0.6 MB a token in fp32, several times over.
    """
    parts = [torch.utils.checkpoint.checkpoint(function, *part, use_reentrant=False) for part in zip(*(t.split(size) for t in tensors))]
    return tuple(torch.cat(part) for part in zip(*parts))


MENDS = ("lower rl.micro, sft.micro, rl.at_once, eval.batch, policy.max_new, rl.max_turns or the pictures (nav.cell); choose policy.checkpointing=yes, "
         "policy.optimizer=kahan, policy.keep_pictures=no, sft.freeze_vision=yes, rl.freeze_vision=yes; or do without the reference: rl.kl=0 rl.measure_kl=no")


def memory_of(device):
    """Bytes of the GPU, or of the machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def model_sizes(model, cfg):
    """(parameters, those that are trained, bytes of a weight). model: as it is, or on the meta device."""
    count = lambda module: sum(p.numel() for p in module.parameters())
    still = cfg.sft.freeze_vision and cfg.rl.freeze_vision
    return count(model), count(model) - still * count(model.model.visual), next(model.parameters()).element_size()


def optimizer_kind(model, cfg, device):
    """"master" or "kahan". auto: master where all that stays in memory (16 bytes a trained parameter) leaves a quarter for the rest."""
    parameters, trained, size = model_sizes(model, cfg)
    models = 1 + bool(cfg.rl.kl or cfg.rl.measure_kl)  # whatever rl.steps is: all methods share their SFT model
    fits = models * parameters * size + 16 * trained < 0.75 * memory_of(device)
    return {"auto": "master" if fits else "kahan"}.get(cfg.policy.optimizer, cfg.policy.optimizer)


def memory_needed(model, cfg, device, picture, largest=0, training=True):
    """{part: bytes} of a run at its worst: every turn of every conversation as long as it may be.

    model: the model, or the same on the meta device. picture: visual tokens of the largest training picture; largest: of all. Gradients and activations
    on one side and the cache of sampling on the other are never there together. What the libraries keep for
    themselves is counted as 1 GB on a GPU and 2 GB on a CPU, as part of weights.
    """
    text, vision = model.config.text_config, model.config.vision_config
    parameters, trained, size = model_sizes(model, cfg)
    width, layers, heads = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
    head = getattr(text, "head_dim", None) or width // heads
    kv = 2 * text.num_key_value_heads * head * size                                    # bytes a token and layer
    # Kept for the backward pass by one layer, bytes a token (a patch in the vision tower): what norms, projections and MLP go in with.
    layer = (12 * width + 6 * heads * head + 4 * text.intermediate_size) * size + kv
    block = (18 * vision.hidden_size + 4 * vision.intermediate_size) * size
    words = lambda t: len(t) // 3 + 8                                                  # tokens
    longer = functools.partial(max, key=len)                                           # of the words of both kinds of tasks
    opening = words(cfg.protocol.system) + words(longer(cfg.protocol.question, cfg.points.question + 80 * ' ')) + picture
    answered, more = words(longer(cfg.protocol.feedback, cfg.points.reply)) + picture, max(0, largest - picture)
    encoded = picture * (1 + len(getattr(vision, "deepstack_visual_indexes", ()))) * width * size   # bytes a picture

    def update(rows, turns, turn, frozen):
        """Activations of a micro-batch of `rows` conversations, with `turn` tokens in each turn."""
        length = opening + turns * (turn + answered)
        tokens, patches = rows * length, 0 if frozen else rows * (turns + 1) * picture * 4
        scores = 1.3 * rows * heads * length**2 * size * (device.type == "cpu")        # the GPU's kernel keeps none
        if cfg.policy.checkpointing:
            kept = layers * tokens * (width * size + kv) + tokens * layer + scores
            kept += patches * (vision.depth * vision.hidden_size * size + block)
        else:
            kept = layers * (tokens * layer + scores) + patches * vision.depth * block
        return kept + 6 * 4 * text.vocab_size * (256 if cfg.policy.checkpointing else rows * turns * turn)

    parts = dict.fromkeys(("weights", "optimizer", "reference", "gradients", "activations", "cache"), 0)
    parts["weights"] = parameters * size + 10**9 * (1 if device.type == "cuda" else 2)
    sampling = [(cfg.eval.batch, cfg.eval.max_turns + 1, more)]                         # a repair begins with a given turn
    if training:
        kind = optimizer_kind(model, cfg, device)
        parts["optimizer"] = trained * (12 if kind == "master" else 3 * size)
        parts["activations"] = update(cfg.sft.micro, 6, 40, cfg.sft.freeze_vision)      # the longest traces have six short turns
        if cfg.sft.freeze_vision and cfg.policy.keep_pictures:
            parts["activations"] += 3 * max(cfg.nav.sft_traces, cfg.points.sft_traces) * encoded
        if cfg.rl.steps:
            rollouts = cfg.rl.questions * cfg.rl.samples
            turns = cfg.rl.max_turns + cfg.buffer.max_attempts * (cfg.rl.rho < 1)       # a roll-in's turns come on top of the new ones
            parts["reference"] = parameters * size * bool(cfg.rl.kl or cfg.rl.measure_kl)
            frozen = cfg.rl.freeze_vision or parts["reference"] > 0  # the reference's tower always is
            kept = rollouts * turns * encoded * (frozen and cfg.policy.keep_pictures)
            found = update(cfg.rl.micro, turns, cfg.policy.max_new, cfg.rl.freeze_vision) + kept
            parts["activations"] = max(parts["activations"], found)
            sampling.append((cfg.rl.at_once or rollouts, turns, 0))
        # The copies' gradients are fp32, at a moment without activations.
        parts["gradients"] = max(trained * size, 4 * trained * (kind == "master") - parts["activations"])
    said = lambda turns: turns * (cfg.policy.max_new + answered)
    parts["cache"] = max(rows * (opening + said(turns) + (turns + 1) * more) for rows, turns, more in sampling) * layers * kv
    return parts


def memory_sum(parts):
    """Bytes needed at once, with a twentieth for what is lost between the pieces."""
    stay = parts["weights"] + parts["optimizer"] + parts["reference"]
    return 1.05 * (stay + max(parts["gradients"] + parts["activations"], parts["cache"]))


def check_memory(source, cfg, device, dtype, task):
    """Say how much memory a run will need, before its model is loaded; UserError with what to lower if there is less."""
    try:
        config, processor = transformers.AutoConfig.from_pretrained(source), image_processor(source)
        with torch.device("meta"):
            model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    except UserError:
        raise
    except Exception as error:  # half a download, another architecture: the libraries raise many kinds
        raise UserError(f"model={cfg.model} cannot be loaded: {(str(error) or repr(error)).splitlines()[0]}") from None
    training = cfg.mode == "train"
    images = lambda split: [task.image(example) for example in task.load(split)[:32]]
    tokens = lambda split: max(processor.get_number_of_image_patches(i.height, i.width) // processor.merge_size**2 for i in images(split))
    tests = max(tokens("own" if cfg.image else f"{cfg.eval.splits}_{name}") for name in task.SPLITS)
    parts, has = memory_needed(model, cfg, device, tokens("train") if training else tests, tests, training), memory_of(device)
    gb = lambda n: f"{n / 1e9:.1f}"
    line = f"needs about {gb(memory_sum(parts))} GB: " + ", ".join(f"{name} {gb(n)}" for name, n in parts.items()) + f"; has {gb(has)} GB"
    if memory_sum(parts) > has:
        raise UserError(f"{line}; {MENDS}")
    print(line, file=sys.stderr)


# ---- loading


def load_model(name, cfg):
    """(model, tokenizer, image processor) of a Hugging Face folder or hub name, on cfg's device and in its precision."""
    device, source = device_of(cfg), source_of(name)
    kinds = {"text_config": "grouped" if device.type == "cpu" else "sdpa", "vision_config": "sdpa"}   # of attention
    try:
        model, about = transformers.AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype_of(cfg, device), output_loading_info=True, attn_implementation=kinds)
        if cfg.policy.checkpointing:
            checkpoint_layers(model)
        found = model.to(device).eval(), load_tokenizer(source), image_processor(source)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:   # half a download, another architecture: the libraries raise many kinds
        raise UserError(f"model={name} cannot be loaded: {(str(error) or repr(error)).splitlines()[0]}") from None
    if lost := sorted(about["missing_keys"]):   # the library would make them up
        raise UserError(f"model={name} cannot be loaded: its files lack {len(lost)} of the model's tensors, such as {lost[0]}")
    return found


def image_processor(source):
    """The image processor of a folder or hub name, in the class that needs no torchvision: Qwen2.5-VL and Qwen3-VL share it."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    try:
        return Qwen2VLImageProcessorPil.from_pretrained(source)
    except Exception as error:  # missing or broken: the library raises many kinds
        raise UserError(f"model={source} cannot be loaded: {(str(error) or repr(error)).splitlines()[0]}") from None


def load_tokenizer(source):
    """The tokenizer of a folder or hub name, with a chat template that knows images.

    Some releases have two templates: the tokenizer's, for text alone, and the processor's in chat_template.json.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if "image" not in str(tokenizer.chat_template):
        file = transformers.utils.cached_file(source, "chat_template.json", _raise_exceptions_for_missing_entries=False)
        if not file or "image" not in (template := json.loads(Path(file).read_text())["chat_template"]):
            raise UserError("it has no chat template with images")
        tokenizer.chat_template = template
    return tokenizer


# ---- the authors' navigation data


def make_official(data, cfg, maps="", evals=""):
    """The authors' training maps and eval files as a data folder under `data`, for nav.folder. Returns the folder.

    maps: their JSON of training maps; evals: of test maps, or several with commas between. Either may be missing. The splits:
    `train` and `sft` (our demonstrations, on their maps), `test_id` up to 5x5 and `test_size` beyond, sizes in turn. A PNG that
    lies where the file names it is used as it is; another picture is drawn here and its record marked `drawn`.
    """
    splits, used = {"train": [], "test_id": [], "test_size": []}, hashlib.sha256(json.dumps([cfg.nav.cell, cfg.nav.sft_traces, cfg.nav.seed]).encode())
    seen = set()
    for name, training in ((maps, True), *((name, False) for name in evals.split(","))):
        for record in _read_official(Path(name), training, seen) if name else ():
            used.update(json.dumps([record["id"], record["layout"], bool(record["picture"])]).encode())
            size = max(len(record["layout"]), len(record["layout"][0]))
            splits["train" if training else "test_id" if size <= 5 else "test_size"].append(record)
    if not any(splits.values()):
        raise UserError("official: give maps=FILE (training maps), eval=FILE (test maps) or both")
    folder = Path(data) / f"official-{used.hexdigest()[:8]}"
    if (folder / "data.json").is_file():
        return folder
    building = folder.with_name(f"{folder.name}.tmp")
    with lock(folder.parent, wait=True):
        shutil.rmtree(building, ignore_errors=True)
        try:
            (building / "images").mkdir(parents=True)
            _fill_official(building, {name: records for name, records in splits.items() if records}, cfg)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def _read_official(file, training, seen):
    """[{"id", "layout", "picture": path or None}] of one of the authors' files; seen: ids so far. UserError with the number of the entry."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from None
    found = []
    for number, entry in enumerate(entries if isinstance(entries, list) else [None], 1):
        try:
            about = entry if training else entry["metadata"]
            layout = ["".join(row) for row in about["layout"]]
            name = entry["map_id"] if training else f"{about['level']}x{about['level']}-{entry['id']}"
            image = entry.get("input_image", "") if training else entry["input_map"]  # the 5x5 training maps come without
            picture = (file.parent / image).resolve()
            start, goal = (divmod(int(about[key]), len(layout[0])) for key in ("start_pos", "target_pos"))
        except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
            raise UserError(f"{file}: entry {number} is not one of the authors' maps ({error!r})") from None
        try:
            check_layout(layout)
            if (find_cell(layout, "S"), find_cell(layout, "G")) != (start, goal):
                raise UserError("start_pos or target_pos is not where the layout has S and G")
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name in seen:
                raise UserError(f"id {name!r} is used twice or is no plain name")
            if not picture.is_relative_to(file.parent.resolve()):
                raise UserError(f"image {image!r} leaves the folder")
        except UserError as error:
            raise UserError(f"{file}: entry {number}: {error}") from None
        seen.add(name)
        found.append({"id": name, "layout": layout, "picture": picture if picture.is_file() else None})
    return found


def _fill_official(folder, splits, cfg):
    rng, total = random.Random(f"{cfg.nav.seed} official"), sum(map(len, splits.values()))
    with tqdm(total=total, desc="maps", unit="map", disable=None) as bar:
        for split, records in splits.items():
            # Sizes in turn: the first 250, which an evaluation takes by default, are then of all sizes alike.
            turn, counts = [], Counter()
            for record in records:
                counts[len(record["layout"])] += 1
                turn.append((counts[len(record["layout"])], len(record["layout"])))
            splits[split] = records = [record for _, record in sorted(zip(turn, records), key=lambda pair: pair[0])]
            for record in records:
                picture, layout = record.pop("picture"), record["layout"]
                record |= {"image": f"images/{split}-{record['id']}.png", "look": "official"}
                if picture:
                    image = load_image(picture)
                    # Their grid has a white margin.
                    record["box"] = list(ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox() or (0, 0, *image.size))
                else:
                    image, record["drawn"] = draw_grid(layout, "official", cfg.nav.cell), "here"
                image.save(folder / record["image"], compress_level=1)
                bar.update()
    if "train" in splits:
        chosen = rng.sample(splits["train"], min(cfg.nav.sft_traces, len(splits["train"])))
        splits["sft"] = [_sft_record(index, record, rng) for index, record in enumerate(chosen)]
    for split, records in splits.items():
        _write_safely(folder / f"{split}.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())
    drawn = {split: sum("drawn" in record for record in records) for split, records in splits.items()}
    about = {"task": "navigation", "from": "the authors' release, github.com/fc2869/VRRL (Apache-2.0)", "drawn_here": drawn,
             "counts": {split: len(records) for split, records in splits.items()},
             "splits": [split[5:] for split in splits if split.startswith("test_")]}
    _write_safely(folder / "data.json", (json.dumps(about, indent=2) + "\n").encode())


def read_splits(folder):
    """The names of the test splits of a data folder that data_prep.py official has made."""
    try:
        splits = tuple(json.loads((folder / "data.json").read_text())["splits"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"nav.folder={folder}: no folder that `python data_prep.py official` has made") from None
    if not splits:
        raise UserError(f"nav.folder={folder}: has no test maps; make it again with --eval FILE as well")
    return splits


PROTOCOL = {"system": "protocol.system", "question": "protocol.question", "first_user": "protocol.question",
            "feedback": "protocol.feedback", "feedback_user": "protocol.feedback", "max_turns_eval": "eval.max_turns"}


def read_protocol(path):
    """The settings that a protocol file holds: JSON with texts `system`, `question` (or `first_user`) and `feedback` (`feedback_user`).

    `max_turns_eval` is the turn limit of evaluation. `order`, if it is there, must name texts and images in our order: the
    question's text before its image, the feedback's image before its text. Other keys are remarks. Raises UserError.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"protocol={path}: cannot be read as JSON ({error})") from None
    found = {PROTOCOL[key]: value for key, value in given.items() if key in PROTOCOL} if isinstance(given, dict) else {}
    for key in ("protocol.question", "protocol.feedback"):
        if not isinstance(found.get(key), str):
            names = " or ".join(name for name, setting in PROTOCOL.items() if setting == key)
            raise UserError(f"protocol={path}: needs a text {names}")
    if not isinstance(found.get("protocol.system", ""), str):
        raise UserError(f"protocol={path}: system is not a text")
    if type(found.get("eval.max_turns", 1)) is not int:
        raise UserError(f"protocol={path}: max_turns_eval is not a whole number")
    order = " ".join(re.findall("text|image", str(given.get("order", "")))).removeprefix("text text").strip()  # the system's text may be named first
    if order not in ("", "image image text", "text image image text"):
        raise UserError(f"protocol={path}: its order of texts and images is not ours: question text, image; feedback image, text")
    return found


def run_main(function, words):
    """Run `function(words)`; what the user can mend becomes one line and exit code 2."""
    Stopped.on_signals()
    try:
        function(words)
    except Stopped:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except UserError as error:
        message = error
    except (torch.OutOfMemoryError, MemoryError):
        message = f"out of memory: {MENDS}"
    except OSError as error:  # a folder that cannot be written, a full disk
        message = f"{error.filename or 'writing'}: {error.strerror or error}; mend that, or choose other folders with runs= and data="
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(words):
    """`python data_prep.py NAME [key=value ...]`: the data folder of a task, the authors' data, or the embedded model."""
    import vrrl   # here, not above: vrrl imports this file, and only vrrl reads config.yaml
    name, *rest = words or [""]
    files = {}
    if name == "official":  # maps=FILE eval=FILE, or --maps FILE --eval FILE
        given, rest = iter(rest), []
        for word in given:
            key, _, file = word.removeprefix("--").partition("=")
            if key in ("maps", "eval"):
                files[key] = file or next(given, "")
            else:
                rest.append(word)
    cfg, _ = vrrl.read_config(rest)
    torch.set_num_threads(cfg.threads or os.cpu_count())
    if name == "embedded":
        make_embedded(vrrl.HERE / cfg.model, cfg)
    elif name == "study":
        print(study_text(cfg))
    elif name == "official":
        folder = make_official(cfg.data, cfg, files.get("maps", ""), files.get("eval", ""))
        about = json.loads((folder / "data.json").read_text())
        for split, count in about["counts"].items():
            print(f"{split}: {count} maps, {about['drawn_here'][split]} of them drawn here: their PNGs do not lie beside the file")
        print(f"use it with nav.folder={folder}")
    elif name in vrrl.TASKS:
        print(vrrl.TASKS[name](cfg).folder)
    else:
        raise vrrl.UserError(f"'{name}' is not something to make; one of: {', '.join(vrrl.TASKS)}, official, embedded, study")


if __name__ == "__main__":
    import vrrl
    vrrl.run_main(vrrl.data_prep.main, sys.argv[1:])
